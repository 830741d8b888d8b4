//! Owns: the command iscsi-target: its arguments, its start and its end.
//! Promises: 0 ended when asked to, 1 refused or failed, 2 usage; nothing is served before everything could be opened.
//! Must not know: PDUs, CDBs.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::connection::{Entrance, Socket, serve as serve_connection};
use crate::memory::Pool;
use crate::server::Server;
use crate::status::Report;

/// Where the daemon answers.
const CONTROL: &str = "/run/iscsi-target.sock";
/// Time that initiators get to log out when the daemon ends.
const FAREWELL: u16 = 3;

const AFTER_HELP: &str = "\
Examples:
  iscsi-target serve --portal 127.0.0.1:3260 --target iqn.2026-01.com.example:disk=/srv/disk.img,thin
  iscsi-target serve --config /etc/iscsi-target.toml
  iscsi-target reload
  iscsi-target status --json

Exit status: 0 ended when asked to, 1 refused or failed, 2 usage.";

/// Serves image files, block devices and disk files of a mounted volume as iSCSI LUNs.
#[derive(Debug, Parser)]
#[command(name = "iscsi-target", version, after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM
    #[command(
        after_help = "Example:\n  iscsi-target serve --portal 0.0.0.0:3260 --target iqn.2026-01.com.example:a=/srv/0.img --target iqn.2026-01.com.example:a=/srv/1.img,readonly"
    )]
    Serve {
        /// Address to listen on; more than one gives each target as many ports. Port 0: any that is free
        #[arg(long, value_name = "ADDR:PORT")]
        portal: Vec<SocketAddr>,
        /// A LUN: its target's name and its path; a name given again gets the next LUN, from 0 on.
        /// Options: thin, readonly, removable, cdrom, direct, blocksize=512|4096, physical=512|4096
        #[arg(long, value_name = "IQN=PATH[,OPTION...]")]
        target: Vec<String>,
        /// The same and more (CHAP, who may use what) from a TOML file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Folder that keeps persistent reservations over a restart; without it they do not survive one, and initiators are told so
        #[arg(long, value_name = "FOLDER")]
        state_dir: Option<PathBuf>,
        /// Socket for `status` and `reload`
        #[arg(long, value_name = "SOCKET", default_value = CONTROL)]
        control: PathBuf,
        /// Memory for the data of commands under way, of all sessions together, in MiB; a session has at most a quarter of it
        #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(128..1 << 20))]
        memory: u32,
        /// Log more
        #[arg(short, long)]
        verbose: bool,
    },
    /// Serve what --config says now; sessions stay. SIGHUP does the same
    #[command(after_help = "Example:\n  iscsi-target reload")]
    Reload {
        /// Socket of the daemon
        #[arg(long, value_name = "SOCKET", default_value = CONTROL)]
        control: PathBuf,
    },
    /// What the running daemon serves, and to whom
    #[command(after_help = "Example:\n  iscsi-target status --json")]
    Status {
        /// Print the facts as JSON
        #[arg(long)]
        json: bool,
        /// Socket of the daemon
        #[arg(long, value_name = "SOCKET", default_value = CONTROL)]
        control: PathBuf,
    },
}

/// Runs the command and gives its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // --help and --version are errors of clap too, with status 0. Nobody reads a closed standard output.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let done = match arguments.command {
        Command::Serve { portal, target, config, state_dir, control, memory, verbose } => {
            log(verbose);
            let origin = Origin { portals: portal, targets: target, file: config };
            serve(origin, state_dir.as_deref(), &control, Pool::new((memory as usize) << 20))
        }
        Command::Status { json, control } => status(&control, json),
        Command::Reload { control } => reload(&control),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iscsi-target: {error}");
            ExitCode::from(1)
        }
    }
}

fn log(verbose: bool) {
    let default = if verbose { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("ISCSI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false)
        .init();
}

/// Where the configuration comes from.
struct Origin {
    portals: Vec<SocketAddr>,
    targets: Vec<String>,
    file: Option<PathBuf>,
}

impl Origin {
    fn configuration(&self) -> Result<Config, String> {
        let mut config = match &self.file {
            Some(file) => Config::read(file).map_err(|error| error.to_string())?,
            None => Config::default(),
        };
        config.portals.extend(&self.portals);
        for target in &self.targets {
            config.add(target).map_err(|error| error.to_string())?;
        }
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }
}

/// What can be asked of the daemon.
#[derive(Clone, Copy, Debug)]
enum Request {
    Status,
    Reload,
}

/// A connection that was accepted.
type Accepted = (std::net::TcpStream, Entrance);

fn serve(origin: Origin, state: Option<&Path>, control: &Path, memory: Rc<Pool>) -> Result<(), String> {
    let config = origin.configuration()?;
    allow_files();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| format!("signals: {error}"))?;
    let mut listeners = Vec::new();
    for portal in &config.portals {
        let listener = TcpListener::bind(portal).map_err(|error| {
            format!("cannot listen on {portal}: {error}; is another target running, or is the address not this host's?")
        })?;
        listeners.push(listener);
    }
    let portals: Result<Vec<SocketAddr>, _> = listeners.iter().map(TcpListener::local_addr).collect();
    let portals = portals.map_err(|error| error.to_string())?;
    let socket = control_socket(control)?;
    let served = tokio_uring::start(async {
        let server = Server::open(&config, portals.clone(), state, memory).await.map_err(|error| error.to_string())?;
        let (accepted, mut accepting) = mpsc::unbounded_channel::<Accepted>();
        for (nth, listener) in listeners.into_iter().enumerate() {
            let (accepted, local) = (accepted.clone(), portals[nth]);
            thread("iscsi-accept", move || accept(&listener, nth as u16 + 1, local, &accepted))?;
        }
        let (asked, mut asking) = mpsc::unbounded_channel::<(Request, Option<UnixStream>)>();
        let hung_up = asked.clone();
        thread("iscsi-control", move || {
            for mut stream in socket.incoming().flatten() {
                let Some(request) = request(&mut stream) else { continue };
                if asked.send((request, Some(stream))).is_err() {
                    break;
                }
            }
        })?;
        let (ended, mut has_ended) = tokio::sync::oneshot::channel();
        thread("iscsi-signals", move || {
            for signal in signals.forever() {
                // Nobody receives when the daemon has ended already.
                if signal != SIGHUP {
                    let _ = ended.send(signal);
                    return;
                }
                let _ = hung_up.send((Request::Reload, None));
            }
        })?;
        let origin = Rc::new(origin);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for portal in &portals {
            tracing::info!("listening on {portal}");
        }
        loop {
            tokio::select! {
                Some((stream, entrance)) = accepting.recv() => {
                    match Socket::new(stream) {
                        Ok(socket) => drop(tokio_uring::spawn(serve_connection(server.clone(), socket, entrance))),
                        Err(error) => tracing::warn!(%error, peer = %entrance.peer, "a connection cannot be served"),
                    }
                }
                Some((request, stream)) = asking.recv() => {
                    drop(tokio_uring::spawn(answer(server.clone(), origin.clone(), request, stream)));
                }
                _ = second.tick() => server.tick(),
                _ = &mut has_ended => break,
            }
        }
        say_farewell(&server).await;
        server.flush().await;
        Ok::<(), String>(())
    });
    let _ = std::fs::remove_file(control);
    served
}

/// A session has up to two descriptors of files: as many as the system allows, where it usually gives fewer at first.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    spawned.map(drop).map_err(|error| format!("cannot start a thread: {error}"))
}

fn accept(listener: &TcpListener, portal: u16, bound: SocketAddr, accepted: &mpsc::UnboundedSender<Accepted>) {
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                if let Err(error) = stream.set_nonblocking(true) {
                    tracing::warn!(%error, %peer, "a connection cannot be served");
                    continue;
                }
                let local = stream.local_addr().unwrap_or(bound);
                if accepted.send((stream, Entrance { peer, local, portal })).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Binds the control socket, in the place of one that nobody listens at any more.
fn control_socket(path: &Path) -> Result<UnixListener, String> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(format!("{}: another iscsi-target answers there; give another --control", path.display()));
            }
            std::fs::remove_file(path).map_err(|error| format!("{}: {error}", path.display()))?;
            UnixListener::bind(path).map_err(|error| format!("{}: {error}", path.display()))
        }
        bound => bound.map_err(|error| format!("{}: {error}; give another --control", path.display())),
    }
}

/// Whoever asks says what at once, and takes the answer at once.
const CONTROL_TIME: Duration = Duration::from_secs(1);

/// Reads what is asked for. `None`: nothing that is known.
fn request(stream: &mut UnixStream) -> Option<Request> {
    stream.set_read_timeout(Some(CONTROL_TIME)).ok()?;
    stream.set_write_timeout(Some(CONTROL_TIME)).ok()?;
    let mut word = [0; 7];
    stream.read_exact(&mut word).ok()?;
    match &word {
        b"status\n" => Some(Request::Status),
        b"reload\n" => Some(Request::Reload),
        _ => None,
    }
}

async fn answer(server: Rc<Server>, origin: Rc<Origin>, request: Request, stream: Option<UnixStream>) {
    let answer = match request {
        Request::Status => serde_json::to_value(server.status()).expect("a report is plain data"),
        Request::Reload => match reload_from(&server, &origin).await {
            Ok(changes) => serde_json::json!({ "changes": changes }),
            Err(error) => serde_json::json!({ "error": error }),
        },
    };
    if let Some(mut stream) = stream {
        // The reader may be gone.
        let _ = stream.write_all(answer.to_string().as_bytes());
    }
}

async fn reload_from(server: &Server, origin: &Origin) -> Result<Vec<String>, String> {
    let done = match origin.file {
        None => Err("the daemon was started without --config: there is nothing to read again".to_owned()),
        Some(_) => match origin.configuration() {
            Ok(config) => server.reload(&config).await.map_err(|error| error.to_string()),
            Err(error) => Err(error),
        },
    };
    match &done {
        Ok(changes) => tracing::info!(?changes, "the configuration was read again"),
        Err(error) => tracing::error!(%error, "the configuration was read again, and nothing has changed"),
    }
    done
}

/// Asks all initiators to log out, and closes the connections of those that do not.
async fn say_farewell(server: &Rc<Server>) {
    let sessions = server.sessions();
    sessions.iter().for_each(|session| session.ask_to_leave(FAREWELL));
    let deadline = std::time::Instant::now() + Duration::from_secs(FAREWELL.into());
    while !server.sessions().is_empty() && std::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for session in server.sessions() {
        session.close().await;
    }
}

/// Asks the daemon. The answer is JSON; an object with `error` is a refusal.
fn ask(control: &Path, request: &str) -> Result<serde_json::Value, String> {
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", control.display());
    let mut stream = UnixStream::connect(control).map_err(|error| {
        format!("no iscsi-target answers at {}: {error}; is it running, with this --control?", control.display())
    })?;
    writeln!(stream, "{request}").map_err(|error| told(&error))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|error| told(&error))?;
    let answer: serde_json::Value = serde_json::from_str(&text).map_err(|error| told(&error))?;
    match answer["error"].as_str() {
        Some(error) => Err(error.to_owned()),
        None => Ok(answer),
    }
}

fn status(control: &Path, json: bool) -> Result<(), String> {
    let answer = ask(control, "status")?;
    let mut out = std::io::stdout().lock();
    if json {
        return writeln!(out, "{answer:#}").map_err(|error| error.to_string());
    }
    let report: Report = serde_json::from_value(answer).map_err(|error| format!("{}: {error}", control.display()))?;
    report.print(&mut out).map_err(|error| error.to_string())
}

fn reload(control: &Path) -> Result<(), String> {
    let answer = ask(control, "reload")?;
    let mut out = std::io::stdout().lock();
    let changes = answer["changes"].as_array().into_iter().flatten().filter_map(|change| change.as_str());
    let mut printed = changes.map(|change| writeln!(out, "{change}"));
    printed.try_for_each(|line| line).map_err(|error| error.to_string())
}
