//! Owns: a program that has files of a mount open in a process of its own, and the way to tell it what to do.
//! Promises: what it has open no other process of a test inherits (a child of the test would have to close it, which waits for the mount);
//! a call's answer is that of the system. Must not know: what is tested.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use serde::{Deserialize, Serialize};

use crate::harness::{program, signal};
use crate::storm::writer::Writer;

/// What the program is told to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Call {
    /// Open for reading and writing.
    Open(String),
    /// Create, truncate and open.
    Create(String),
    /// Write a number of one byte at an offset of an open file.
    Write(String, u64, usize, u8),
    /// fsync(2) of an open file.
    Sync(String),
    /// close(2) of an open file.
    Close(String),
    /// Remove a name.
    Remove(String),
}

/// A running program.
pub struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Starts one.
    pub fn start() -> Program {
        let mut command = Command::new(program("host-program"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("host-program starts");
        let (input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        Program { child, input, output: BufReader::new(output) }
    }

    /// Tells it to do something, without waiting for the answer.
    pub fn begin(&mut self, call: &Call) {
        let line = serde_json::to_string(call).expect("a call is JSON");
        writeln!(self.input, "{line}").expect("the program listens");
    }

    /// The answer to what was begun.
    pub fn answer(&mut self) -> io::Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the program answers");
        match line.trim().parse().unwrap_or_else(|error| panic!("{line:?}: {error}")) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Tells it to do something and waits for the answer.
    pub fn call(&mut self, call: Call) -> io::Result<()> {
        self.begin(&call);
        self.answer()
    }

    /// Sends it a signal.
    pub fn signal(&self, number: libc::c_int) {
        signal(self.child.id(), number);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path as calls have it.
pub fn text(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").to_owned()
}

/// The program's side: carries out what standard input says until it ends, or writes in a storm if its arguments say so.
pub fn serve() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [storm, mount, notes, name, seed, run] = arguments.as_slice()
        && storm == "storm"
    {
        return write_in_storm(Path::new(mount), Path::new(notes), name, seed, run);
    }
    let mut open = BTreeMap::new();
    for line in io::stdin().lines() {
        let Ok(call) = line.and_then(|line| serde_json::from_str(&line).map_err(io::Error::from)) else {
            return ExitCode::from(2);
        };
        let errno = carry_out(&mut open, call).err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
        println!("{errno}");
    }
    ExitCode::SUCCESS
}

/// A writer of the kill storm, until its mount is gone.
fn write_in_storm(mount: &Path, notes: &Path, name: &str, seed: &str, run: &str) -> ExitCode {
    let (Ok(seed), Ok(run)) = (seed.parse(), run.parse()) else { return ExitCode::from(2) };
    match Writer::new(mount, notes, name, seed, run).and_then(|mut writer| writer.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn carry_out(open: &mut BTreeMap<String, File>, call: Call) -> io::Result<()> {
    let missing = || io::Error::from_raw_os_error(libc::EBADF);
    match call {
        Call::Open(path) => {
            let file = File::options().read(true).write(true).open(&path)?;
            open.insert(path, file);
        }
        Call::Create(path) => {
            let file = File::create(&path)?;
            open.insert(path, file);
        }
        Call::Write(path, offset, length, byte) => {
            open.get(&path).ok_or_else(missing)?.write_all_at(&vec![byte; length], offset)?;
        }
        Call::Sync(path) => open.get(&path).ok_or_else(missing)?.sync_all()?,
        Call::Close(path) => {
            let file = open.remove(&path).ok_or_else(missing)?;
            // SAFETY: the descriptor was owned by `file` alone, which has given it up.
            if unsafe { libc::close(file.into_raw_fd()) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Call::Remove(path) => fs::remove_file(path)?,
    }
    Ok(())
}
