//! Owns: `iscsi-target` daemons and volumes on their LUNs.
//! Promises: a daemon answers when it is handed out, and ends with its owner.
//! Must not know: what tests do with the LUNs.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU16, Ordering};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Luns, command, folder, program, run, wait_for};
use crate::networks::Network;

/// Ports that storages of this process have looked for.
static TAKEN: AtomicU16 = AtomicU16::new(0);

/// Starts a daemon whose files are in `folder`, and gives the addresses where it listens.
pub fn launch(folder: &Path, arguments: &[String]) -> (Child, Vec<String>) {
    launch_at(folder, arguments, |command| command)
}

/// The same; `place` says where the command runs.
pub fn launch_at(folder: &Path, arguments: &[String], place: impl FnOnce(Command) -> Command) -> (Child, Vec<String>) {
    let control = folder.join("control");
    let mut command = Command::new(program("iscsi-target"));
    command.arg("serve").arg("--control").arg(&control).arg("--state-dir").arg(folder).args(arguments);
    let mut command = place(command);
    let log = folder.join("log");
    let log_file = File::options().create(true).append(true).open(&log).expect("a log");
    let mut daemon = command.stderr(log_file).spawn().expect("iscsi-target starts");
    let ask = || {
        let mut status = Command::new(program("iscsi-target"));
        status.args(["status", "--json", "--control"]).arg(&control).output().expect("iscsi-target runs")
    };
    wait_for("the target to answer", || {
        let ended = daemon.try_wait().expect("a child can be waited for");
        assert!(ended.is_none(), "iscsi-target has ended, {ended:?}: {}", fs::read_to_string(&log).unwrap_or_default());
        ask().status.success()
    });
    let told: Value = serde_json::from_slice(&ask().stdout).expect("JSON");
    let portals = told["portals"].as_array().expect("a list").iter();
    (daemon, portals.map(|portal| portal.as_str().expect("an address").to_owned()).collect())
}

fn name(nth: usize) -> String {
    format!("iqn.2026-01.test:lun{nth}")
}

/// A daemon with image files as LUNs, one target for each.
pub struct Storage {
    folder: TempDir,
    arguments: Vec<String>,
    portal: String,
    count: usize,
    daemon: Child,
}

impl Storage {
    /// One on this machine, and a volume on its LUNs.
    pub fn with_volume(count: usize) -> (Storage, Luns) {
        // A port that nobody gets by chance while the target is away: below those that the kernel gives out, where an initiator that
        // tries to connect could even meet itself.
        let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        // Tests beside this one look for theirs at the same time.
        let nth = TAKEN.fetch_add(1, Ordering::Relaxed) % 40 * 250;
        let first = 10_000 + (std::process::id() % 10_000) as u16 + nth;
        let port = (first..30_000).find(free).expect("a port is free");
        let storage = Self::start(format!("127.0.0.1:{port}"), count, |command| command);
        let luns = Luns::elsewhere(self::folder(), &storage.urls());
        format(&luns);
        (storage, luns)
    }

    /// One where the storage of a network is, and a volume on its LUNs that the hosts of that network mount.
    pub fn in_network(network: Network, count: usize) -> (Storage, Luns) {
        let storage = Self::start(format!("{}:3260", Network::ADDRESS), count, |command| network.at_storage(&command));
        let luns = Luns::in_network(self::folder(), &storage.urls(), network);
        format(&luns);
        (storage, luns)
    }

    fn start(portal: String, count: usize, place: impl FnOnce(Command) -> Command) -> Storage {
        let folder = folder();
        let mut arguments = vec!["--portal".to_owned(), portal.clone()];
        for nth in 0..count {
            let image = folder.path().join(format!("lun{nth}.img"));
            File::create(&image).and_then(|file| file.set_len(300 << 20)).expect("an image file can be made");
            arguments.extend(["--target".to_owned(), format!("{}={},thin", name(nth), image.display())]);
        }
        let (daemon, _) = launch_at(folder.path(), &arguments, place);
        Storage { folder, arguments, portal, count, daemon }
    }

    fn urls(&self) -> Vec<String> {
        (0..self.count).map(|nth| format!("iscsi://{}/{}/0", self.portal, name(nth))).collect()
    }

    /// The image file of a LUN.
    pub fn image(&self, nth: usize) -> std::path::PathBuf {
        self.folder.path().join(format!("lun{nth}.img"))
    }

    /// What the daemon says of itself.
    pub fn status(&self) -> Value {
        let mut ask = command("iscsi-target");
        ask.args(["status", "--json", "--control"]).arg(self.folder.path().join("control"));
        serde_json::from_str(&run(&mut ask)).expect("JSON")
    }

    /// SIGKILL.
    pub fn crash(&mut self) {
        self.daemon.kill().expect("a child can be killed");
        self.daemon.wait().expect("a child can be waited for");
    }

    /// Starts it again at the same address, on the LUNs' network if they have one.
    pub fn restart(&mut self, luns: &Luns) {
        (self.daemon, _) = launch_at(self.folder.path(), &self.arguments, |command| luns.at_storage(command));
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn format(luns: &Luns) {
    let mut mkfs = command("mkfs.vmfs");
    mkfs.args(["-L", "shared", "--lease", "fast"]).args(luns.images());
    run(&mut luns.at_storage(mkfs));
}
