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
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tokio::sync::mpsc;

use crate::config::Config;
use crate::connection::{Entrance, serve as serve_connection};
use crate::memory::Pool;
use crate::server::Server;

/// Where the daemon answers `status`.
const CONTROL: &str = "/run/iscsi-target.sock";
/// Time that initiators get to log out when the daemon ends.
const FAREWELL: u16 = 3;

const AFTER_HELP: &str = "\
Examples:
  iscsi-target serve --portal 127.0.0.1:3260 --target iqn.2026-01.com.example:disk=/srv/disk.img,thin
  iscsi-target serve --config /etc/iscsi-target.toml
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
        /// Options: thin, readonly, removable, direct, blocksize=512|4096
        #[arg(long, value_name = "IQN=PATH[,OPTION...]")]
        target: Vec<String>,
        /// The same and more (CHAP, who may use what) from a TOML file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Folder that keeps persistent reservations over a restart; without it they do not survive one, and initiators are told so
        #[arg(long, value_name = "FOLDER")]
        state_dir: Option<PathBuf>,
        /// Socket for `status`
        #[arg(long, value_name = "SOCKET", default_value = CONTROL)]
        control: PathBuf,
        /// Memory for the data of commands under way, of all sessions together, in MiB; a session has at most a quarter of it
        #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(128..1 << 20))]
        memory: u32,
        /// Log more
        #[arg(short, long)]
        verbose: bool,
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
            let config = configuration(portal, &target, config.as_deref());
            let memory = Pool::new((memory as usize) << 20);
            config.and_then(|config| serve(&config, state_dir.as_deref(), &control, memory))
        }
        Command::Status { json, control } => status(&control, json),
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

fn configuration(portals: Vec<SocketAddr>, targets: &[String], file: Option<&Path>) -> Result<Config, String> {
    let mut config = match file {
        Some(file) => Config::read(file).map_err(|error| error.to_string())?,
        None => Config::default(),
    };
    config.portals.extend(portals);
    for target in targets {
        config.add(target).map_err(|error| error.to_string())?;
    }
    config.check().map_err(|error| error.to_string())?;
    Ok(config)
}

/// A connection that was accepted.
type Accepted = (std::net::TcpStream, Entrance);

fn serve(config: &Config, state: Option<&Path>, control: &Path, memory: Rc<Pool>) -> Result<(), String> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| format!("signals: {error}"))?;
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
        let server = Server::open(config, portals.clone(), state, memory).await.map_err(|error| error.to_string())?;
        let (accepted, mut accepting) = mpsc::unbounded_channel::<Accepted>();
        for (nth, listener) in listeners.into_iter().enumerate() {
            let (accepted, local) = (accepted.clone(), portals[nth]);
            thread("iscsi-accept", move || accept(&listener, nth as u16 + 1, local, &accepted))?;
        }
        let (asked, mut asking) = mpsc::unbounded_channel::<UnixStream>();
        thread("iscsi-control", move || {
            for stream in socket.incoming().flatten() {
                if asked.send(stream).is_err() {
                    break;
                }
            }
        })?;
        let (ended, mut has_ended) = tokio::sync::oneshot::channel();
        thread("iscsi-signals", move || {
            if let Some(signal) = signals.forever().next() {
                // Nobody receives when the daemon has ended already.
                let _ = ended.send(signal);
            }
        })?;
        for portal in &portals {
            tracing::info!("listening on {portal}");
        }
        loop {
            tokio::select! {
                Some((stream, entrance)) = accepting.recv() => {
                    match tokio::net::TcpStream::from_std(stream) {
                        Ok(stream) => drop(tokio_uring::spawn(serve_connection(server.clone(), stream, entrance))),
                        Err(error) => tracing::warn!(%error, peer = %entrance.peer, "a connection cannot be served"),
                    }
                }
                Some(stream) = asking.recv() => answer(&server, stream),
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

fn answer(server: &Server, mut stream: UnixStream) {
    let report = serde_json::to_vec(&server.status()).expect("a report is plain data");
    // The reader may be gone, and a slow one holds up nobody for long.
    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
    let _ = stream.write_all(&report);
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

fn status(control: &Path, json: bool) -> Result<(), String> {
    let mut stream = UnixStream::connect(control).map_err(|error| {
        format!("no iscsi-target answers at {}: {error}; is it running, with this --control?", control.display())
    })?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|error| format!("{}: {error}", control.display()))?;
    let report: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", control.display()))?;
    let mut out = std::io::stdout().lock();
    let printed = if json { writeln!(out, "{report:#}") } else { print(&mut out, &report) };
    printed.map_err(|error| error.to_string())
}

fn print(out: &mut impl Write, report: &serde_json::Value) -> std::io::Result<()> {
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    for portal in list(&report["portals"]) {
        writeln!(out, "portal {}", text(&portal))?;
    }
    for target in list(&report["targets"]) {
        writeln!(out, "target {}", text(&target["name"]))?;
        for lun in list(&target["luns"]) {
            let flags = [("thin", &lun["thin"]), ("read-only", &lun["read_only"])];
            let flags: String =
                flags.iter().filter(|(_, on)| **on == true).map(|(name, _)| format!(", {name}")).collect();
            let (number, path) = (&lun["lun"], text(&lun["path"]));
            writeln!(out, "  lun {number}: {path}, {} bytes in blocks of {}{flags}", lun["bytes"], lun["block_size"])?;
        }
        for session in list(&target["sessions"]) {
            let (who, peer) = (text(&session["initiator"]), text(&session["peer"]));
            writeln!(
                out,
                "  session {}: {who} from {peer}, {} s, {} commands, {} bytes read, {} written",
                session["tsih"],
                session["seconds"],
                session["commands"],
                session["bytes_read"],
                session["bytes_written"]
            )?;
        }
    }
    Ok(())
}
