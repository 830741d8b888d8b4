//! Owns: becoming a daemon: the parent that waits for the mount, and the child's word that it is up.
//! Promises: the parent ends with status 0 exactly when the volume is mounted; else the child's error text and status are its own.
//! Must not know: what is mounted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, ExitCode, Stdio};

const READY: &[u8] = b"mounted\n";

/// Runs this program again as the daemon, with the same arguments, and waits until the volume is mounted.
pub fn run_parent() -> ExitCode {
    match start_child() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mount.vmfs: the daemon cannot be started: {error}");
            ExitCode::from(1)
        }
    }
}

fn start_child() -> io::Result<ExitCode> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .arg("--tell-parent")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    match status.code() {
        Some(code @ 1..=255) => Ok(ExitCode::from(code as u8)),
        _ => {
            eprintln!("mount.vmfs: the daemon ended with {status} before the volume was mounted");
            Ok(ExitCode::from(1))
        }
    }
}

/// Leaves the terminal and its session.
pub fn detach() {
    // It fails only for the leader of a process group, which a fresh child is not.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!("no session of its own: {error}");
    }
}

/// Lets the parent end with status 0, and gives up standard input, output and error and the working directory.
pub fn tell_parent() -> io::Result<()> {
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let mut output = io::stdout().lock();
    output.write_all(READY)?;
    output.flush()?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}
