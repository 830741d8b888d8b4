//! Owns: the command mount.vmfs from its arguments to its exit status.
//! Promises: 0 mounted (in the foreground: unmounted cleanly), 1 refused or failed, 2 usage; errors go to standard error.
//! Must not know: how a volume is mounted.

use std::process::ExitCode;

use crate::logging::{self, Sink};
use crate::options::{self, Mount};
use crate::{allocator, daemon, session};

/// Runs the command.
pub fn run() -> ExitCode {
    let mount = match options::parse(std::env::args_os()) {
        Ok(mount) => mount,
        Err(error) => {
            // --help and --version are errors of clap too, with status 0. Nobody reads a closed standard output.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    if !mount.foreground && !mount.tell_parent {
        return daemon::run_parent();
    }
    match serve(&mount) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if is_daemon(&mount) || mount.log.is_some() {
                tracing::error!("{error}");
            }
            eprintln!("mount.vmfs: {error}");
            ExitCode::from(1)
        }
    }
}

fn is_daemon(mount: &Mount) -> bool {
    mount.tell_parent && !mount.foreground
}

fn serve(mount: &Mount) -> Result<(), String> {
    allocator::give_memory_back();
    let is_daemon = is_daemon(mount);
    let sink = match &mount.log {
        Some(path) => Sink::file(path).map_err(|error| format!("the log {}: {error}", path.display()))?,
        None if is_daemon => Sink::system_log(),
        None => Sink::Stderr,
    };
    // A daemon's errors before it is up go to its parent's standard error, as text.
    logging::start(sink, mount.verbose);
    if is_daemon {
        daemon::detach();
    }
    session::serve(mount, || match is_daemon {
        true => daemon::tell_parent().map_err(|error| format!("telling the parent: {error}")),
        false => Ok(()),
    })
}
