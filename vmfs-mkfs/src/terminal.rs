//! Owns: what all commands share: the runtime, opening LUNs, the progress bar, how an error ends a command.
//! Promises: a bar is drawn on a terminal only; an error says object, cause and next step on standard error.
//! Must not know: which command runs.

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::lun::{Lun, OpenLun};

/// Exit status of a command that was refused or failed.
pub const FAILED: u8 = 1;
/// Exit status of a wrong command line.
pub const USAGE: u8 = 2;

/// Runs a command's work on this thread.
///
/// # Panics
/// When the kernel gives no event descriptors.
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime needs only memory");
    runtime.block_on(work)
}

/// Waits for work that may watch heartbeats, and says so when it takes longer than a second.
pub async fn watching<T>(command: &str, work: impl Future<Output = T>) -> T {
    let notice = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let _ = writeln!(std::io::stderr(), "{command}: a LUN looks in use; watching its heartbeats for some seconds");
        std::future::pending::<T>().await
    };
    tokio::select! {
        done = work => done,
        never = notice => never,
    }
}

/// Opens LUNs by path or URL; one named twice is refused.
pub fn open_luns(paths: &[String], how: OpenLun) -> Result<Vec<Rc<dyn Lun>>, FsError> {
    for (nth, path) in paths.iter().enumerate() {
        if paths[..nth].contains(path) {
            let message = format!("{path} was given twice; give each LUN once");
            return Err(FsError::refused(FsErrorKind::Invalid, message));
        }
    }
    paths.iter().map(|path| luns::open_lun(path, how)).collect()
}

/// A bar for work counted in bytes, or in things.
pub fn progress_bar(what: &'static str, bytes: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
    let template = match bytes {
        true => "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} ETA {eta}",
        false => "{msg} {wide_bar} {pos}/{len} {per_sec} ETA {eta}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Prints a line; a closed standard output is nobody's fault.
pub fn say(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints facts as JSON.
pub fn say_json(value: &impl serde::Serialize) {
    say(serde_json::to_string_pretty(value).expect("facts have string keys only"));
}

/// Prints why a command ended and gives its status.
pub fn fail(command: &str, error: impl std::fmt::Display, status: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{command}: {error}");
    ExitCode::from(status)
}

/// Ends a command whose command line was wrong, or that only shows its help: 0 for help and version, else `usage`.
pub fn usage(error: &clap::Error, usage: u8) -> ExitCode {
    let _ = error.print();
    ExitCode::from(if error.exit_code() == 0 { 0 } else { usage })
}
