//! Owns: VMs of a test: the test guest with a job on a disk, what it and its program say, and what its disk must hold.
//! Promises: a VM that a test started ends with it.
//! Must not know: how a job is done, the format.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use test_guest::pattern::{Content, SECTOR, inspect};

use crate::harness::{Luns, Mount, PATIENCE, command, run, signal, wait_for};

/// A running VM, with what its guest and the program itself say in files.
pub struct Guest {
    /// The program `vmm`.
    pub child: Child,
    log: PathBuf,
    errors: PathBuf,
}

impl Guest {
    /// Starts `job` on `disk`; `name` names the files.
    pub fn start(luns: &Luns, disk: &Path, job: &str, name: &str) -> Guest {
        Guest::start_by(luns, vmm(luns, disk, job), name)
    }

    /// The same by a command of its own, `vmm run` with a job, wherever that runs.
    pub fn start_by(luns: &Luns, mut command: Command, name: &str) -> Guest {
        let (log, errors) = (luns.beside(format!("{name}.log")), luns.beside(format!("{name}.err")));
        command.arg("--serial").arg(format!("file:{}", log.display())).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(File::create(&errors).unwrap()).spawn().unwrap();
        Guest { child, log, errors }
    }

    /// What the guest has written to its serial port.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What the program has written to standard error.
    pub fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits until `condition`.
    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn(&Guest) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            let (said, errors) = (self.said(), self.errors());
            assert!(start.elapsed() < PATIENCE, "it never came to this: {what}\n{said}\n{errors}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the guest says `word`.
    #[track_caller]
    pub fn wait_for_output(&self, word: &str) {
        self.wait_until(&format!("the guest says {word:?}"), |guest| guest.said().contains(word));
    }

    /// Waits until the program says `word`.
    #[track_caller]
    pub fn wait_for_error(&self, word: &str) {
        self.wait_until(&format!("the program says {word:?}"), |guest| guest.errors().contains(word));
    }

    /// Waits until the program has ended, and gives its exit status.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the program does not end: {}", self.errors());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Passes of `job=verify` that the guest has been through.
    pub fn passes(&self) -> usize {
        self.said().matches("pass generation=").count()
    }

    /// Waits until the guest has been through more than two further passes.
    #[track_caller]
    pub fn wait_for_more_passes(&self) {
        let before = self.passes();
        self.wait_until("more passes", |guest| guest.passes() > before + 2);
    }

    /// What was in flight ends: waits for a second in which nothing changes, neither in the guest nor on the LUNs, which are image files.
    #[track_caller]
    pub fn wait_until_nothing_changes(&self, luns: &Luns) {
        let changed = |lun: &PathBuf| fs::metadata(lun).unwrap().modified().unwrap();
        let state = || (self.said(), luns.images().iter().map(changed).collect::<Vec<_>>());
        wait_for("a second in which nothing changes behind the closed gate", || {
            let before = state();
            thread::sleep(Duration::from_secs(1));
            state() == before
        });
    }

    /// Ends `job=verify` on the first `size` bytes of the disk, whose data file is `flat`: no command of it failed, no byte was wrong, and the
    /// last pass is there.
    #[track_caller]
    pub fn end_verified(&mut self, flat: &Path, size: u64, seed: u64) {
        signal(self.child.id(), libc::SIGTERM);
        assert_eq!(self.wait_for_end(), Some(0), "{}", self.errors());
        let said = self.said();
        assert_eq!(self.passes(), said.matches(" mismatches=0 ").count(), "{said}");
        assert!(!said.contains("failed="), "{said}");
        let last = self.passes() as u64;
        assert_stamped(flat, size, seed, |_| last);
    }

    /// The last "flushed" line: generation and number of blocks.
    pub fn flushed(&self) -> (u64, u64) {
        let said = self.said();
        let complete = said.rfind('\n').map_or("", |end| &said[..end]);
        let line = complete.lines().rfind(|line| line.starts_with("flushed ")).expect("a flush was acknowledged");
        let number = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)).unwrap().parse().unwrap();
        (number("generation="), number("blocks="))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asserts that the first `size` bytes of a disk carry stamps of `seed`, of at least the generation that `oldest` says of a byte.
#[track_caller]
pub fn assert_stamped(flat: &Path, size: u64, seed: u64, oldest: impl Fn(u64) -> u64) {
    let bytes = fs::read(flat).unwrap();
    for (sector, bytes) in (0..size / SECTOR as u64).zip(bytes.chunks_exact(SECTOR)) {
        let (found, oldest) = (inspect(bytes, seed, sector), oldest(sector * SECTOR as u64));
        let fine = match found {
            Content::Stamped(generation) => generation >= oldest,
            Content::Zero => oldest == 0,
            Content::Foreign => false,
        };
        assert!(fine, "sector {sector} should carry generation {oldest} or later: {found:?}");
    }
}

/// The test guest as a kernel beside the images; made once.
pub fn kernel(luns: &Luns) -> PathBuf {
    let path = luns.beside("guest.elf");
    if !path.exists() {
        run(command("test-guest").arg("--output").arg(&path));
    }
    path
}

/// The adapters that a guest's disk can hang on.
pub const HBAS: [&str; 4] = ["pvscsi", "lsilogic", "buslogic", "virtio-scsi"];

/// `vmm run` of the test guest with `job` on `disk`, on the default adapter.
pub fn vmm(luns: &Luns, disk: &Path, job: &str) -> Command {
    vmm_on(luns, disk, HBAS[0], job)
}

/// The same on the adapter `hba`.
pub fn vmm_on(luns: &Luns, disk: &Path, hba: &str, job: &str) -> Command {
    let mut vmm = command("vmm");
    vmm.args(["run", "--memory", "64M", "--cmdline", job, "--kernel"]).arg(kernel(luns));
    vmm.arg("--disk").arg(format!("{},hba={hba}", disk.display()));
    vmm
}

/// Makes a disk on a mount and gives the path of its descriptor.
pub fn disk(mount: &Mount, name: &str, size: &str, format: &str) -> PathBuf {
    let path = mount.at(name);
    run(command("vmfs").args(["disk", "create", "-s", size, "-d", format]).arg(&path));
    path
}
