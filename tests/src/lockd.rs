//! Owns: a vmfs-lockd of a test's own.
//! Promises: it ends with the test, whatever comes of that.
//! Must not know: what is tested.

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::harness::{Luns, command, signal, wait_for};

/// A running vmfs-lockd with a folder of its own.
pub struct Lockd {
    /// The process.
    pub child: Child,
    /// Folder of its socket, state file and log.
    pub folder: PathBuf,
}

impl Lockd {
    /// Starts one beside the LUN files.
    pub fn start(luns: &Luns) -> Lockd {
        let folder = luns.beside("run");
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder).unwrap();
        Lockd { child: Lockd::spawn(&folder), folder }
    }

    fn spawn(folder: &Path) -> Child {
        let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
        let mut lockd = command("vmfs-lockd");
        lockd.arg("--folder").arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = lockd.spawn().unwrap();
        wait_for("vmfs-lockd answers", || facts(folder).is_some_and(|facts| facts["process"] == child.id()));
        child
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after it has ended.
    pub fn start_again(&mut self) {
        self.child = Lockd::spawn(&self.folder);
    }

    /// SIGSTOP.
    pub fn stop(&self) {
        signal(self.child.id(), libc::SIGSTOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        signal(self.child.id(), libc::SIGCONT);
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap()
    }

    /// The mount option that names it.
    pub fn option(&self) -> String {
        format!("lockd={}", self.folder.join("lockd.sock").display())
    }

    /// How many slots it keeps.
    pub fn slots(&self) -> usize {
        let facts = facts(&self.folder).expect("vmfs-lockd answers");
        let mounts = facts["mounts"].as_array().unwrap();
        mounts.iter().map(|mount| mount["slots"].as_array().unwrap().len()).sum()
    }
}

impl Drop for Lockd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the daemon of a folder says of itself; none: it does not answer.
fn facts(folder: &Path) -> Option<Value> {
    let out = command("vmfs-lockd").args(["status", "--json", "--folder"]).arg(folder).output().unwrap();
    out.status.success().then(|| serde_json::from_slice(&out.stdout).unwrap())
}
