//! Promises of the command `vmm run` with disks in plain files, seen from outside: exit status, messages, bytes on disk.
//! These tests need /dev/kvm.

#[path = "command/firmware.rs"]
mod firmware;

use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;
use test_guest::pattern::{Content, Order, SECTOR, Visit, first_mismatch, inspect};

const MIB: u64 = 1 << 20;

/// A folder with the guest's image and a disk.
struct Setup {
    folder: TempDir,
}

impl Setup {
    fn new(disk_bytes: u64) -> Setup {
        let setup = Setup { folder: tempfile::tempdir().expect("temporary folder") };
        fs::write(setup.path("guest.elf"), test_guest::IMAGE).expect("image written");
        File::create(setup.disk()).expect("disk made").set_len(disk_bytes).expect("disk sized");
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn disk(&self) -> PathBuf {
        self.path("disk.img")
    }

    /// `vmm run` with the image, `job` and further arguments.
    fn command(&self, job: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(["run", "--cmdline", job, "--kernel"]).arg(self.path("guest.elf"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same with the disk, run to its end.
    fn run(&self, job: &str) -> Finished {
        self.run_with(job, &["--disk", self.disk().to_str().expect("UTF-8")])
    }

    fn run_with(&self, job: &str, arguments: &[&str]) -> Finished {
        Finished::of(self.command(job, arguments).output().expect("vmm starts"))
    }

    /// Starts a machine and waits until its serial output holds `word`.
    fn start_until(&self, job: &str, word: &str) -> Child {
        let serial = self.path("serial");
        let sink = format!("file:{}", serial.display());
        let disk = self.disk();
        let arguments = ["--serial", &sink, "--disk", disk.to_str().expect("UTF-8")];
        let mut child = self.command(job, &arguments).spawn().expect("vmm starts");
        while !fs::read_to_string(&serial).unwrap_or_default().contains(word) {
            assert_eq!(child.try_wait().expect("child"), None, "vmm ended early");
            std::thread::yield_now();
        }
        child
    }
}

#[derive(Debug)]
struct Finished {
    status: Option<i32>,
    output: String,
    errors: String,
}

impl Finished {
    fn of(output: Output) -> Finished {
        Finished {
            status: output.status.code(),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn terminate(child: &Child) {
    kill_process(Pid::from_child(child), Signal::TERM).expect("signalled");
}

fn end(mut child: Child) -> Finished {
    terminate(&child);
    let status = child.wait().expect("ended").code();
    let mut errors = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut errors).expect("read");
    Finished { status, output: String::new(), errors }
}

fn flip_a_bit(path: &Path, offset: u64) {
    let mut file = File::options().read(true).write(true).open(path).expect("disk");
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut byte)).expect("read");
    byte[0] ^= 1;
    file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(&byte)).expect("written");
}

#[test]
fn what_the_guest_writes_is_in_the_file_and_nothing_else() {
    let setup = Setup::new(32 * MIB);
    let run = setup.run("job=verify offset=4M size=16M block=64k depth=16 seed=7 passes=2");
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.output.ends_with("guest: 9 passed, 0 failed\n"), "{run:?}");
    let bytes = fs::read(setup.disk()).expect("disk");
    assert_eq!(bytes.len() as u64, 32 * MIB);
    let (start, end) = ((4 * MIB) as usize, (20 * MIB) as usize);
    assert_eq!(first_mismatch(&bytes[start..end], 7, start as u64 / SECTOR as u64, 2), None);
    assert!(bytes[..start].iter().chain(&bytes[end..]).all(|byte| *byte == 0));
}

#[test]
fn a_later_machine_reads_what_an_earlier_one_wrote_and_finds_a_flipped_bit() {
    let setup = Setup::new(8 * MIB);
    assert_eq!(setup.run("job=verify seed=3 block=32k").status, Some(0));
    let check = setup.run("job=check seed=3 block=4k interrupt=intx");
    assert_eq!(check.status, Some(0), "{check:?}");
    flip_a_bit(&setup.disk(), 5 * MIB + 77);
    let check = setup.run("job=check seed=3 block=4k");
    assert_eq!(check.status, Some(1), "{check:?}");
    assert!(check.output.contains(&format!("mismatch sector={}", 5 * MIB / SECTOR as u64)), "{check:?}");
}

#[test]
fn a_disk_that_is_in_use_is_refused_with_who_holds_it() {
    let setup = Setup::new(MIB);
    let first = setup.start_until("job=spin", "spinning");
    let second = setup.run("job=exit");
    assert_eq!(second.status, Some(1), "{second:?}");
    assert!(second.errors.contains("disk.img") && second.errors.contains(&first.id().to_string()), "{second:?}");
    let disk = setup.disk();
    let sink = format!("file:{}", setup.path("serial").display());
    let third = setup.run_with("job=exit", &["--disk", disk.to_str().expect("UTF-8"), "--serial", &sink]);
    assert_eq!(third.status, Some(1), "{third:?}");
    assert_eq!(
        fs::read_to_string(setup.path("serial")).expect("serial"),
        "spinning\n",
        "the first one's output is left alone"
    );
    let ended = end(first);
    assert_eq!(ended.status, Some(0), "{ended:?}");
    assert_eq!(setup.run("job=exit").status, Some(0), "the lock is gone with its holder");
}

#[test]
fn garbage_errors_and_discards_leave_the_adapter_and_the_disk_sound() {
    let setup = Setup::new(24 * MIB);
    for job in [
        "job=garbage seed=5",
        "job=garbage seed=5 interrupt=intx",
        "job=errors",
        "job=unmap size=24M block=64k",
        "job=info",
    ] {
        let run = setup.run(job);
        assert_eq!(run.status, Some(0), "{job}: {run:?}");
        assert!(run.output.contains(" passed, 0 failed\n"), "{job}: {run:?}");
    }
}

#[test]
fn what_was_flushed_is_there_after_the_monitor_was_killed() {
    let setup = Setup::new(16 * MIB);
    let job = "job=write seed=9 block=16k depth=8 flush=64 passes=1000";
    let mut child = setup.start_until(job, "pass=1 generation=2 blocks=512\n");
    child.kill().and_then(|()| child.wait()).expect("killed");
    let serial = fs::read_to_string(setup.path("serial")).expect("serial output");
    let flushed = serial.lines().rfind(|line| line.starts_with("flushed ")).expect("a flush");
    let number = |key: &str| -> u64 {
        let word = flushed.split(' ').find_map(|word| word.strip_prefix(key)).expect("key");
        word.parse().expect("number")
    };
    let (pass, generation, done) = (number("pass="), number("generation="), number("blocks="));
    let bytes = fs::read(setup.disk()).expect("disk");
    let visit = Visit::new(Order::Random, 1024, 9, pass);
    for index in 0..1024 {
        let block = visit.block(index) as usize * (16 << 10);
        for offset in (block..block + (16 << 10)).step_by(SECTOR) {
            let found = inspect(&bytes[offset..offset + SECTOR], 9, (offset / SECTOR) as u64);
            let oldest = if index < done { generation } else { generation - 1 };
            // What came after the last flush that was told, this pass or the next, may be there or not.
            let fine = matches!(found, Content::Stamped(found) if (oldest..=generation + 1).contains(&found));
            assert!(fine, "visit {index} of {done}, offset {offset}: {found:?}, flushed {flushed}");
        }
    }
}

#[test]
fn a_signal_stops_the_machine_with_status_zero_and_keeps_what_was_written() {
    let setup = Setup::new(16 * MIB);
    let child = setup.start_until("job=write seed=2 block=64k flush=32 passes=1000000", "generation=2");
    let ended = end(child);
    assert_eq!((ended.status, ended.errors.as_str()), (Some(0), ""));
    let bytes = fs::read(setup.disk()).expect("disk");
    for (sector, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
        assert!(matches!(inspect(bytes, 2, sector as u64), Content::Stamped(_)), "sector {sector}");
    }
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let setup = Setup::new(4 * MIB);
    let disk = format!("{},readonly,serial=ABC 123", setup.disk().display());
    let info = setup.run_with("job=info", &["--disk", &disk]);
    assert!(info.output.contains("readonly=1") && info.output.contains("serial=\"ABC 123\""), "{info:?}");
    let write = setup.run_with("job=write", &["--disk", &disk]);
    assert_eq!(write.status, Some(1), "{write:?}");
    assert!(write.output.contains("Check(Sense(7, 39, 0))"), "{write:?}");
    assert!(fs::read(setup.disk()).expect("disk").iter().all(|byte| *byte == 0));
}

#[test]
fn the_end_of_a_file_that_is_no_whole_block_is_not_hidden_in_silence() {
    let setup = Setup::new(4 * MIB + 100);
    let info = setup.run("job=info");
    assert_eq!(info.status, Some(0), "{info:?}");
    assert!(info.output.contains(&format!("capacity_bytes={} ", 4 * MIB)), "{info:?}");
    assert!(info.errors.contains("disk.img") && info.errors.contains("not the last 100"), "{info:?}");
    File::options().write(true).open(setup.disk()).and_then(|file| file.set_len(4 * MIB)).expect("cut");
    assert_eq!(setup.run("job=info").errors, "");
}

#[test]
fn a_reader_that_has_gone_does_not_keep_the_machine_from_ending() {
    let setup = Setup::new(MIB + 100);
    for job in ["job=info", "job=exit status=3", "job=fault"] {
        let disk = setup.disk();
        let mut child =
            setup.command(job, &["--json", "--disk", disk.to_str().expect("UTF-8")]).spawn().expect("vmm starts");
        drop((child.stdout.take(), child.stderr.take()));
        let status = child.wait().expect("it ends");
        assert_eq!(status.code(), Some(i32::from(job != "job=info")), "{job}");
    }
}

#[test]
fn several_disks_are_targets_in_their_order() {
    let setup = Setup::new(4 * MIB);
    let other = setup.path("other.img");
    File::create(&other).expect("made").set_len(6 * MIB).expect("sized");
    let disks = [setup.disk(), other].map(|path| path.to_str().expect("UTF-8").to_string());
    for hba in ["pvscsi", "lsilogic", "buslogic", "virtio-scsi"] {
        let disks = disks.clone().map(|disk| format!("{disk},hba={hba}"));
        let arguments = ["--disk", &disks[0], "--disk", &disks[1]];
        for (target, bytes) in [(0, 4 * MIB), (1, 6 * MIB)] {
            let run = setup.run_with(&format!("job=info target={target}"), &arguments);
            assert!(run.output.contains(&format!("adapter={hba} ")), "{run:?}");
            assert!(run.output.contains(&format!("capacity_bytes={bytes} ")), "{run:?}");
        }
    }
}

#[test]
fn an_iso_image_is_the_medium_of_a_cd_rom_drive() {
    let setup = Setup::new(4 * MIB);
    for hba in ["pvscsi", "lsilogic", "buslogic", "virtio-scsi"] {
        let run = setup.run_with("job=info", &["--disk", &format!("{},cdrom,hba={hba}", setup.disk().display())]);
        assert_eq!(run.status, Some(0), "{run:?}");
        assert!(run.output.contains("inquiry type=5 ") && run.output.contains("Virtual CD-ROM"), "{run:?}");
        assert!(run.output.contains(&format!("capacity_bytes={} block_bytes=2048\n", 4 * MIB)), "{run:?}");
    }
    // Several machines may have the same medium.
    let medium = format!("{},cdrom", setup.disk().display());
    let twice = setup.run_with("job=info", &["--disk", &medium, "--disk", &medium]);
    assert_eq!(twice.status, Some(0), "{twice:?}");
}

#[test]
fn the_report_as_json_says_how_it_ended() {
    let setup = Setup::new(MIB);
    for (job, flags, status, outcome) in [
        ("job=exit status=0", &["--json"][..], 0, "exited"),
        ("job=exit status=4", &["--json"], 1, "exited"),
        ("job=fault", &["--json"], 1, "failed"),
        ("job=reset", &["--json", "--exit-on-reset"], 0, "reset"),
    ] {
        let run = setup.run_with(job, flags);
        assert_eq!(run.status, Some(status), "{job}: {run:?}");
        let report: serde_json::Value = serde_json::from_str(run.output.lines().last().expect("a line")).expect("JSON");
        assert_eq!(report["outcome"], outcome, "{job}");
        assert!(report["exits"]["port"].is_u64() && report["seconds"].is_number(), "{report}");
    }
}

#[test]
fn serial_output_goes_where_it_was_asked_to() {
    let setup = Setup::new(MIB);
    let sink = format!("file:{}", setup.path("console").display());
    let run = setup.run_with("job=exit", &["--serial", &sink]);
    assert_eq!((run.status, run.output.as_str()), (Some(0), ""));
    assert_eq!(fs::read_to_string(setup.path("console")).expect("console"), "guest: 0 passed, 0 failed\n");
    let run = setup.run_with("job=exit", &["--serial", "none"]);
    assert_eq!((run.status, run.output.as_str()), (Some(0), ""));
}

#[test]
fn each_refusal_names_the_object_the_cause_and_the_next_step() {
    let setup = Setup::new(MIB);
    File::create(setup.path("odd.img")).expect("made").set_len(100).expect("sized");
    File::create(setup.path("empty.img")).expect("made");
    let folder = setup.folder.path().to_str().expect("UTF-8").to_string();
    let path = |name: &str| setup.path(name).to_str().expect("UTF-8").to_string();
    for (arguments, status, named) in [
        (vec!["--disk".into(), path("missing.img")], 1, "missing.img"),
        (vec!["--disk".into(), folder.clone()], 1, folder.as_str()),
        (vec!["--disk".into(), path("odd.img")], 1, "odd.img"),
        (vec!["--disk".into(), path("empty.img")], 1, "empty.img"),
        (vec!["--disk".into(), path("disk.img"), "--disk".into(), folder.clone() + "/./disk.img"], 1, "given twice"),
        (vec!["--disk".into(), path("disk.img") + ",hba=floppy"], 2, "\"floppy\""),
        (vec!["--disk".into(), path("disk.img") + ",fast"], 2, "\"fast\""),
        (vec!["--memory".into(), "1M".into()], 1, "guest memory"),
        (vec!["--memory".into(), "lots".into()], 2, "lots"),
        (vec!["--cpus".into(), "0".into()], 2, "--cpus"),
        (vec!["--serial".into(), "telnet".into()], 2, "telnet"),
        (vec!["--serial".into(), "file:/nonexistent/x".into()], 1, "/nonexistent/x"),
        (vec!["--kernel".into()], 2, "--kernel"),
        (vec!["--frobnicate".into()], 2, "--frobnicate"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let run = setup.run_with("job=exit", &arguments);
        assert_eq!(run.status, Some(status), "{arguments:?}: {run:?}");
        assert!(run.errors.contains(named) && !run.errors.contains("panicked"), "{arguments:?}: {run:?}");
    }
}

#[test]
fn the_help_has_an_example() {
    for arguments in [&["--help"][..], &["run", "--help"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_vmm")).args(arguments).output().expect("vmm starts");
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("vmm run --kernel"));
    }
}
