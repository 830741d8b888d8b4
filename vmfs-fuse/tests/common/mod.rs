//! Owns: images, mounts and their removal, for the tests of this crate.
//! Promises: what a test made is unmounted and removed, also when it fails; only processes it started are ended.
//! Must not know: the format.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmfs_core::check::{Finding, check};
use vmfs_core::env::Env;
use vmfs_core::lun::{Lun, OpenLun, open_lun};
use vmfs_core::mkfs::{self, MkfsOptions};
use vmfs_core::real_env::RealEnv;

/// Nothing that a test waits for takes as long, however much else the machine does.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Image files with a volume on them.
pub struct Images {
    pub folder: TempDir,
    pub paths: Vec<PathBuf>,
}

impl Images {
    /// A volume of `count` LUNs of `mib` MiB.
    pub fn new(count: usize, mib: u64) -> Images {
        let folder = tempfile::Builder::new().prefix("vmfs-fuse.").tempdir().unwrap();
        let paths: Vec<_> = (0..count).map(|n| folder.path().join(format!("lun{n}.img"))).collect();
        for path in &paths {
            File::create(path).unwrap().set_len(mib << 20).unwrap();
        }
        make_volume(&paths);
        Images { folder, paths }
    }

    /// LUNs that are there already, without a volume yet.
    pub fn of_paths(paths: Vec<PathBuf>) -> Images {
        let folder = tempfile::Builder::new().prefix("vmfs-fuse.").tempdir().unwrap();
        Images { folder, paths }
    }

    /// Makes a volume of them.
    pub fn format(&self) {
        make_volume(&self.paths);
    }

    /// What the checker finds.
    pub fn fsck(&self) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let open = |path: &PathBuf| open_lun(path.to_str().unwrap(), OpenLun { read_only: true, ..OpenLun::default() });
        let luns: Vec<Rc<dyn Lun>> = self.paths.iter().map(|path| open(path).unwrap()).collect();
        let mut findings: Vec<Finding> = Vec::new();
        runtime.block_on(check(&luns, &mut findings)).unwrap();
        findings.iter().map(|finding| format!("{finding:?}")).collect()
    }

    /// The images as mount.vmfs wants them.
    pub fn spec(&self) -> String {
        self.paths.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(",")
    }

    /// A new directory beside the images.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Mounts as host `host` in the foreground.
    pub fn mount(&self, host: u8) -> Mount {
        self.mount_with(host, &[])
    }

    /// Mounts as host `host` with more arguments.
    pub fn mount_with(&self, host: u8, arguments: &[&str]) -> Mount {
        let point = self.directory(&format!("mnt{host}"));
        let log = File::options().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let child = mount_command()
            .arg(self.spec())
            .arg(&point)
            .args(["--foreground", "--host-id", &format!("00000000-0000-0000-0000-0000000000{host:02x}")])
            .args(["--host-name", &format!("host{host}")])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut mount = Mount { child: Some(child), point, log: self.folder.path().join("log") };
        mount.wait_until_mounted();
        mount
    }
}

fn make_volume(paths: &[PathBuf]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    runtime.block_on(async {
        let open = |path: &PathBuf| open_lun(path.to_str().unwrap(), OpenLun::default()).unwrap();
        let luns: Vec<Rc<dyn Lun>> = paths.iter().map(open).collect();
        let plan = mkfs::plan(&env, &luns, MkfsOptions::default()).await.unwrap();
        mkfs::execute(&env, &luns, &plan, &mut |_| ()).await.unwrap();
    });
}

/// The program under test.
pub fn mount_command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mount-vmfs"))
}

/// Runs a command of the system that must succeed; gives its standard output.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command of the system.
pub fn try_run(program: &str, arguments: &[&str]) -> Output {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new(program).args(arguments).env("PATH", path).stdin(Stdio::null()).output().unwrap()
}

/// Everything a command said.
pub fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}{err}", output.status)
}

/// Whether something is mounted there.
pub fn is_mounted(point: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == point.to_str())
}

/// Waits until `done`, or fails.
#[track_caller]
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: it never came to this");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A mounted volume.
pub struct Mount {
    child: Option<Child>,
    pub point: PathBuf,
    log: PathBuf,
}

impl Mount {
    /// A path on the mount.
    pub fn at(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// The same as text.
    pub fn text_at(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Process of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    #[track_caller]
    fn wait_until_mounted(&mut self) {
        let start = Instant::now();
        while !is_mounted(&self.point) {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                self.child = None;
                panic!("mount.vmfs ended with {status}: {}", self.log());
            }
            assert!(start.elapsed() < PATIENCE, "not mounted: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Unmounts by umount(8); the daemon must end with status 0.
    #[track_caller]
    pub fn unmount(mut self) {
        run("umount", &[self.point.to_str().unwrap()]);
        self.wait_for_clean_end();
    }

    /// Sends a signal; the daemon must unmount and end with status 0.
    #[track_caller]
    pub fn end_by(mut self, signal: rustix::process::Signal) {
        self.signal(signal);
        self.wait_for_clean_end();
        assert!(!is_mounted(&self.point));
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    #[track_caller]
    fn wait_for_clean_end(&mut self) {
        let mut child = self.child.take().unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "mount.vmfs ended with {status}: {}", self.log());
                return;
            }
            if start.elapsed() > PATIENCE {
                child.kill().unwrap();
                panic!("mount.vmfs does not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, as a crash of the host.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if is_mounted(&self.point) {
            let _ = try_run("umount", &["-l", self.point.to_str().unwrap()]);
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() && self.child.is_some() {
            eprintln!("log of {}:\n{}", self.point.display(), self.log());
        }
        self.end();
    }
}

/// A small random number generator whose seed is in the test.
pub struct Random(pub u64);

impl Random {
    /// 0..`end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Bytes that hold no long zeros.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.below(255) as u8 + 1).collect()
    }
}

/// Added to the seeds of random tests, so that one that failed can be run again, and others tried: `VMFS_TEST_SEED`.
pub fn seed() -> u64 {
    std::env::var("VMFS_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}
