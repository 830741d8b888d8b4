//! Owns: the command vmfs-lockd: its arguments, its start and its end.
//! Promises: one daemon a folder; 0 ended when asked to, 1 refused or failed, 2 usage; the service manager hears READY when mounts are
//! served. Must not know: mounts, slots.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmfs_core::units::Uuid;

use super::daemon::Daemon;
use super::messages::Id;
use super::notify::Notify;
use super::{SOCKET, client, default_socket, record, socket};
use crate::server;

const AFTER_HELP: &str = "\
Examples:
  vmfs-lockd                          keeps the slots of all mounts of this host; usually a service of systemd
  vmfs-lockd --folder /run/test       with a socket, state file and lock of its own
  vmfs-lockd status                   what is kept, and for how long it is good

mount.vmfs uses a daemon that runs (-o lockd=auto), a certain one (-o lockd=SOCKET), or none (-o lockd=no).
When it ends, mounts stand still before their leases run out, and go on when it is started again within the lease.
Exit status: 0 ended when asked to, 1 refused or failed, 2 usage.";

/// Keeps the slots of this host's mounts: joins, renews and leaves them, and tells mounts and VMMs by the gate page.
#[derive(Debug, Parser)]
#[command(name = "vmfs-lockd", version, after_help = AFTER_HELP)]
struct Arguments {
    /// Folder of socket, state file and lock [default: /run/vmfs; for other users than root $XDG_RUNTIME_DIR/vmfs]
    #[arg(long, value_name = "FOLDER", global = true)]
    folder: Option<PathBuf>,
    /// Log more
    #[arg(short, long)]
    verbose: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the running daemon keeps
    #[command(after_help = "Example:\n  vmfs-lockd status --json")]
    Status {
        /// Print the facts as JSON
        #[arg(long)]
        json: bool,
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
    let folder = arguments.folder.clone().or_else(|| default_socket().parent().map(Path::to_owned));
    let folder = folder.expect("the default socket lies in a folder");
    let done = match arguments.command {
        Some(Command::Status { json }) => status(&folder.join(SOCKET), json),
        None => serve(&folder, arguments.verbose),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmfs-lockd: {error}");
            ExitCode::from(1)
        }
    }
}

fn serve(folder: &Path, verbose: bool) -> Result<(), String> {
    let default = if verbose { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("VMFS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // Standard error is the journal's; where nobody reads it any more the daemon goes on.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .log_internal_errors(false)
        .init();
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| format!("signals: {error}"))?;
    let notify = Notify::from_environment().map_err(|error| format!("NOTIFY_SOCKET: {error}"))?;
    server::make_private(folder).map_err(|error| error.to_string())?;
    let _lock = lock(folder)?;
    let boot = boot_id()?;
    let state = folder.join("lockd.state");
    let before = record::load(&state, boot).unwrap_or_else(|error| {
        tracing::error!("{error}");
        None
    });
    let path = folder.join(SOCKET);
    let listener = socket::bind_at(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let daemon = Daemon::new(boot, state, path.clone(), before);
    let (heard, hearing) = tokio::sync::mpsc::unbounded_channel();
    let spawned = std::thread::Builder::new().name("lockd-accept".to_owned());
    spawned.spawn(move || socket::accept_all(&listener, &heard)).map_err(|error| format!("threads: {error}"))?;
    let (ended, has_ended) = tokio::sync::oneshot::channel();
    let watching = std::thread::Builder::new().name("lockd-signals".to_owned());
    let watch = move || {
        if let Some(signal) = signals.forever().next() {
            // The daemon has ended already when nobody receives.
            let _ = ended.send(signal);
        }
    };
    watching.spawn(watch).map_err(|error| format!("threads: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|error| format!("the runtime: {error}"))?;
    tracing::info!("{} slot(s) kept before; serving at {}", daemon.slots(), path.display());
    notify.ready();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        tokio::select! {
            () = daemon.run(hearing, &notify) => {}
            signal = has_ended => tracing::info!("signal {}: ending", signal.unwrap_or_default()),
        }
    });
    notify.stopping();
    match daemon.slots() {
        0 => {}
        slots => {
            tracing::warn!("{slots} slot(s) are not renewed any more: start vmfs-lockd again before their leases end")
        }
    }
    // Commands at LUNs that hang are not waited for.
    runtime.shutdown_background();
    Ok(())
}

/// The lock that one daemon holds for its life.
fn lock(folder: &Path) -> Result<File, String> {
    let path = folder.join("lockd.lock");
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    let mut file = file.map_err(|error| named(&error))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let process = fs::read_to_string(&path).unwrap_or_default();
            return Err(named(&format!("vmfs-lockd runs already (process {}); end that one first", process.trim())));
        }
        Err(TryLockError::Error(error)) => return Err(named(&error)),
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|error| named(&error))?;
    Ok(file)
}

fn boot_id() -> Result<Id, String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(PATH).map_err(|error| format!("{PATH}: {error}"))?;
    Uuid::parse(text.trim()).map(Id).ok_or_else(|| format!("{PATH}: {text:?} is no UUID"))
}

fn status(path: &Path, json: bool) -> Result<(), String> {
    let next = "is vmfs-lockd started? See systemctl status vmfs-lockd";
    let facts = client::status(path).map_err(|error| format!("{}: {error}; {next}", path.display()))?;
    let text =
        if json { serde_json::to_string_pretty(&facts).map_err(|error| error.to_string())? } else { describe(&facts) };
    // Nobody reads a closed standard output.
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(())
}

/// The facts for people.
fn describe(facts: &Value) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut lines = vec![format!("vmfs-lockd, process {}, at {}", facts["process"], word(&facts["socket"]))];
    for mount in facts["mounts"].as_array().into_iter().flatten() {
        lines.push(format!(
            "volume {} for {} ({}){}",
            word(&mount["volume"]),
            word(&mount["host_name"]),
            word(&mount["program"]),
            if mount["connected"] == Value::Bool(true) { "" } else { ", not connected" }
        ));
        for slot in mount["slots"].as_array().into_iter().flatten() {
            let left = slot["lease_left_ms"].as_u64().unwrap_or(0);
            lines.push(format!(
                "  lun{} {}: slot {} generation {}, {}, lease good for {}.{} s",
                slot["lun"],
                word(&slot["path"]),
                slot["slot"],
                slot["generation"],
                word(&slot["state"]),
                left / 1000,
                left % 1000 / 100
            ));
        }
    }
    if lines.len() == 1 {
        lines.push("no mount".to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_words_are_a_usage_error_and_help_has_an_example() {
        let parse = |words: &[&str]| Arguments::try_parse_from(std::iter::once(&"vmfs-lockd").chain(words));
        assert_eq!(parse(&["--bogus"]).unwrap_err().exit_code(), 2);
        assert_eq!(parse(&["status", "--folder", "/x"]).unwrap().folder, Some(PathBuf::from("/x")));
        let help = parse(&["--help"]).unwrap_err();
        assert_eq!(help.exit_code(), 0);
        assert!(help.to_string().contains("Examples:"));
    }

    #[test]
    fn a_second_daemon_in_one_folder_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        let refused = lock(folder.path()).unwrap_err();
        assert!(refused.contains("lockd.lock") && refused.contains(&std::process::id().to_string()), "{refused}");
        drop(first);
        lock(folder.path()).unwrap();
    }
}
