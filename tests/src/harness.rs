//! Owns: LUN images, mounts and programs of a test, and their removal.
//! Promises: what a test made is unmounted and removed, also when it panics; only processes it started are ended.
//! Must not know: the format; it looks from outside.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::networks::Network;

/// Nothing that a test waits for takes as long, however much else the machine does.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Multiplies the counts of long tests: `VMFS_TEST_SCALE`, 1 when unset.
pub fn scale(count: u64) -> u64 {
    count * std::env::var("VMFS_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// The program `name` of this build.
///
/// # Panics
/// When it was not built: `cargo build --workspace --bins` with the same profile comes first.
pub fn program(name: &str) -> PathBuf {
    // Cargo builds mkfs-vmfs; scripts/install puts it in place as mkfs.vmfs.
    let name = &name.replace('.', "-");
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.ancestors().find(|p| p.join(name).is_file());
    folder.map(|p| p.join(name)).unwrap_or_else(|| {
        panic!("{name} is not built beside {}: run cargo build --workspace --bins first", test.display())
    })
}

/// A command of this build.
pub fn command(name: &str) -> Command {
    Command::new(program(name))
}

/// A command of the system, which must be installed (`scripts/setup test`).
pub fn system(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Runs a command and gives its output.
pub fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?} does not start: {e}"))
}

/// Standard output and error of a finished command, for messages.
pub fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a command that must succeed and gives its standard output.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let out = output(command);
    assert!(out.status.success(), "{command:?}: {}", text(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Runs a command that must fail with this exit status, and gives what it said on standard error.
#[track_caller]
pub fn refused(command: &mut Command, status: i32) -> String {
    let out = output(command);
    assert_eq!(out.status.code(), Some(status), "{command:?}: {}", text(&out));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!said.contains("panicked"), "{command:?} panicked: {said}");
    said
}

/// A folder for a test's files, on a file system that takes direct I/O (`VMFS_TEST_DIR` or the temporary folder).
pub fn folder() -> TempDir {
    let parent = std::env::var_os("VMFS_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    tempfile::Builder::new().prefix("vmfs-test.").tempdir_in(parent).expect("the test folder can be made")
}

/// LUN image files that carry a volume.
pub struct Luns {
    folder: TempDir,
    images: Vec<PathBuf>,
    /// Where the LUNs and the hosts that mount them are, if not on this machine's own network.
    network: Option<Network>,
}

impl Luns {
    /// Image files of `mib` MiB each, without a volume.
    pub fn blank(count: usize, mib: u64) -> Luns {
        let folder = folder();
        let images: Vec<PathBuf> = (0..count).map(|n| folder.path().join(format!("lun{n}.img"))).collect();
        for image in &images {
            File::create(image).and_then(|f| f.set_len(mib << 20)).expect("an image file can be made");
        }
        Luns { folder, images, network: None }
    }

    /// LUNs elsewhere, by their URLs. Beside them, files go into `folder`.
    pub fn elsewhere(folder: TempDir, urls: &[String]) -> Luns {
        Luns { folder, images: urls.iter().map(PathBuf::from).collect(), network: None }
    }

    /// The same, on a network of their own: host N mounts on machine N of it. Tools and hosts that it does not have run beside the storage.
    pub fn in_network(folder: TempDir, urls: &[String], network: Network) -> Luns {
        Luns { network: Some(network), ..Luns::elsewhere(folder, urls) }
    }

    /// The network on which they are, if it is one of their own.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// A command, made to run where the LUNs are.
    pub fn at_storage(&self, command: Command) -> Command {
        match &self.network {
            Some(network) => network.at_storage(&command),
            None => command,
        }
    }

    /// A command, made to run on a host.
    pub fn at_host(&self, host: u8, command: Command) -> Command {
        match &self.network {
            Some(network) if network.has_host(host) => network.at_host(host, &command),
            _ => self.at_storage(command),
        }
    }

    /// What starts `mount.vmfs` in the foreground as host number `host`.
    pub fn mount_command(&self, host: u8, point: &Path, arguments: &[&str]) -> Command {
        let mut mount = command("mount.vmfs");
        mount
            .arg(self.spec())
            .arg(point)
            .args(["--foreground", "--host-id", &format!("00000000-0000-0000-0000-0000000000{host:02x}")])
            .args(["--host-name", &format!("host{host}")])
            .args(arguments);
        self.at_host(host, mount)
    }

    fn fsck(&self, arguments: &[&str]) -> Command {
        let mut fsck = command("fsck.vmfs");
        fsck.args(arguments).args(&self.images);
        self.at_storage(fsck)
    }

    /// The same with a volume made by `mkfs.vmfs` and these further arguments.
    pub fn formatted(count: usize, mib: u64, arguments: &[&str]) -> Luns {
        let luns = Luns::blank(count, mib);
        run(command("mkfs.vmfs").args(["-L", "test"]).args(arguments).args(&luns.images));
        luns
    }

    /// The same volume after its first LUN was taken out.
    pub fn without_first(mut self) -> Luns {
        self.images.remove(0);
        self
    }

    /// The image files.
    pub fn images(&self) -> &[PathBuf] {
        &self.images
    }

    /// A path in the folder of the images.
    pub fn beside(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.folder.path().join(name.as_ref())
    }

    /// The images as `mount.vmfs` wants them.
    pub fn spec(&self) -> String {
        let all: Vec<_> = self.images.iter().map(|p| p.to_str().expect("test paths are UTF-8")).collect();
        all.join(",")
    }

    /// What `fsck.vmfs -n --json` says; there must be no broken rule.
    #[track_caller]
    pub fn report(&self) -> Value {
        let said = run(&mut self.fsck(&["-n", "--json"]));
        let report: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert_eq!(report["errors"], 0, "fsck.vmfs found errors: {report:#}");
        report
    }

    /// Asserts that what hosts left is recovered: no slot, no mark, no block in quarantine. Locks of hosts that are gone may be left: whoever
    /// opens the file next takes them.
    #[track_caller]
    pub fn assert_recovered(&self) {
        let report = self.report();
        let findings = report["findings"].as_array().expect("a list");
        let slots =
            findings.iter().filter(|finding| ["heartbeat", "arena"].iter().any(|of| finding["structure"] == *of));
        assert_eq!(slots.count(), 0, "a host is not recovered: {report:#}");
        for lun in report["luns"].as_array().expect("a list") {
            assert!(lun["marked"] == 0 && lun["quarantined"] == 0, "blocks stay in use: {report:#}");
        }
    }

    /// Asserts that `fsck.vmfs -n` finds no broken rule.
    #[track_caller]
    pub fn assert_clean(&self) {
        run(&mut self.fsck(&["-n"]));
    }

    /// Mounts the volume as host number `host` with further arguments.
    #[track_caller]
    pub fn mount_with(&self, host: u8, arguments: &[&str]) -> Mount {
        self.mount_by(host, arguments, |command| command.spawn().expect("mount.vmfs starts"))
    }

    /// The same; the process is started by `start`.
    #[track_caller]
    pub fn mount_by(&self, host: u8, arguments: &[&str], start: impl FnOnce(&mut Command) -> Child) -> Mount {
        let point = self.beside(format!("mnt{host}"));
        fs::create_dir_all(&point).expect("a mount point can be made");
        let log =
            File::options().create(true).append(true).open(self.beside(format!("mount{host}.log"))).expect("a log");
        let mut mount = self.mount_command(host, &point, arguments);
        mount.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        let child = start(&mut mount);
        let mut mount = Mount { child: Some(child), point, log: self.beside(format!("mount{host}.log")) };
        mount.wait_until_mounted();
        mount
    }

    /// Mounts the volume as host number `host`.
    #[track_caller]
    pub fn mount(&self, host: u8) -> Mount {
        self.mount_with(host, &[])
    }
}

/// Waits until `done`, or fails with what was waited for.
#[track_caller]
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "it never came to this: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Whether something is mounted at `point`.
pub fn is_mounted(point: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is there");
    let point = point.to_str().expect("test paths are UTF-8");
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(point))
}

/// A mounted volume: one host.
pub struct Mount {
    child: Option<Child>,
    point: PathBuf,
    log: PathBuf,
}

impl Mount {
    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// A path below the mount point.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.point.join(name)
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon runs").id()
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    #[track_caller]
    fn wait_until_mounted(&mut self) {
        let start = Instant::now();
        while !is_mounted(&self.point) {
            let child = self.child.as_mut().expect("the daemon runs");
            if let Some(status) = child.try_wait().expect("the daemon can be waited for") {
                self.child = None;
                panic!("mount.vmfs ended with {status}: {}", self.log());
            }
            assert!(start.elapsed() < PATIENCE, "no mount: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// umount(8); the daemon must end with status 0.
    #[track_caller]
    pub fn unmount(mut self) {
        run(system("umount").arg(&self.point));
        self.expect_clean_end();
    }

    /// SIGTERM; the daemon must unmount and end with status 0.
    #[track_caller]
    pub fn terminate(mut self) {
        signal(self.pid(), libc::SIGTERM);
        self.expect_clean_end();
        assert!(!is_mounted(&self.point), "still mounted after SIGTERM");
    }

    #[track_caller]
    fn expect_clean_end(&mut self) {
        let status = self.wait_for_end();
        assert!(status.success(), "mount.vmfs ended with {status}: {}", self.log());
    }

    /// Waits until the daemon has ended by itself.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the daemon runs");
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("the daemon can be waited for") {
                return status;
            }
            if start.elapsed() > PATIENCE {
                let _ = child.kill();
                panic!("mount.vmfs does not end: {}", self.log());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the daemon has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// SIGSTOP, as a host that stands still.
    pub fn pause(&self) {
        signal(self.pid(), libc::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        signal(self.pid(), libc::SIGCONT);
    }

    /// The answer of `vmfs status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.try_status().unwrap_or_else(|| panic!("{}: no status: {}", self.point.display(), self.log()))
    }

    /// The same; `None`: the mount gave no answer.
    pub fn try_status(&self) -> Option<Value> {
        let out = output(command("vmfs").args(["status", "--json"]).arg(&self.point));
        let status: Value = serde_json::from_slice(&out.stdout).ok()?;
        Some(status[0].clone())
    }

    /// What this mount knows of the slots of a host, by its name: one for each LUN.
    #[track_caller]
    pub fn slots_of(&self, host: &str) -> Vec<Value> {
        let status = self.status();
        let luns = status["luns"].as_array().expect("a list").iter();
        let hosts = luns.flat_map(|lun| lun["hosts"].as_array().expect("a list").clone());
        hosts.filter(|slot| slot["name"] == host).collect()
    }

    /// Waits until this mount is the only one that has slots: what others left is recovered.
    #[track_caller]
    pub fn wait_until_alone(&self) {
        wait_for("the recovery of every other host", || {
            let status = self.status();
            let mut hosts = status["luns"].as_array().expect("a list").iter().flat_map(|lun| lun["hosts"].as_array());
            hosts.all(|hosts| hosts.iter().all(|host| host["own"] == true))
        });
    }

    /// What `vmfs why-locked` says of a file.
    #[track_caller]
    pub fn why_locked(&self, name: &str) -> String {
        run(command("vmfs").arg("why-locked").arg(self.at(name)))
    }

    /// SIGKILL, as a crash of the host. The dead mount stays in the tree until this is dropped: what works on it gets ENOTCONN.
    pub fn crash(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The same, and the dead mount point is removed.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.crash();
        if is_mounted(&self.point) {
            let _ = output(system("umount").arg("-l").arg(&self.point));
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if thread::panicking() && self.child.is_some() {
            eprintln!("log of {}:\n{}", self.point.display(), self.log());
        }
        self.end();
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: libc::c_int) {
    // SAFETY: kill(2) takes two integers and touches no memory of this process.
    unsafe { libc::kill(pid as libc::pid_t, signal) };
}

/// A loop device on a file, detached when dropped.
pub struct Loop(PathBuf);

impl Loop {
    /// Attaches `file`.
    pub fn attach(file: &Path) -> Loop {
        Loop::attach_with(file, &[])
    }

    /// Attaches `file` with further arguments of losetup(8).
    pub fn attach_with(file: &Path, arguments: &[&str]) -> Loop {
        Loop(PathBuf::from(run(system("losetup").args(["--find", "--show"]).args(arguments).arg(file)).trim()))
    }

    /// The device.
    pub fn device(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = output(system("losetup").arg("--detach").arg(&self.0));
    }
}

/// Another file system mounted by a test, unmounted when dropped.
pub struct OtherMount(PathBuf);

impl OtherMount {
    /// mount(8) of `device` at `point`.
    pub fn new(device: &Path, point: &Path) -> OtherMount {
        fs::create_dir_all(point).expect("a mount point can be made");
        run(system("mount").arg(device).arg(point));
        OtherMount(point.to_owned())
    }
}

impl Drop for OtherMount {
    fn drop(&mut self) {
        let _ = output(system("umount").arg(&self.0));
    }
}
