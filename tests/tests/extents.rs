//! LUNs that are added while hosts work: nothing stops, everybody uses them, what was written is there.

#[path = "extents/remove.rs"]
mod remove;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lockd::client::{DirectFile, Segment};
use tests::harness::{Luns, Mount, command, output, refused, run, wait_for};
use vmfs_core::buf::AlignedBuf;
use vmfs_core::gate::GateState;
use vmfs_core::mapping::epoch::RunRef;

/// A LUN that belongs to nobody, in the folder where the volume's LUNs lie.
fn blank(luns: &Luns, name: &str, mib: u64) -> std::path::PathBuf {
    let path = luns.beside(name);
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn members(mount: &Mount) -> usize {
    let said = run(command("vmfs").args(["extent", "list", "--json"]).arg(mount.path()));
    serde_json::from_str::<serde_json::Value>(&said).unwrap().as_array().unwrap().len()
}

/// Files that each host writes.
const FILES: u32 = 60;

#[track_caller]
fn wait_for_members(mount: &Mount, count: usize, longest: Duration) -> Duration {
    let began = Instant::now();
    while members(mount) != count {
        assert!(
            began.elapsed() < longest,
            "{} has {} members: {}",
            mount.path().display(),
            members(mount),
            mount.log()
        );
        thread::sleep(Duration::from_millis(50));
    }
    began.elapsed()
}

fn pattern(host: u8, number: u32) -> Vec<u8> {
    (0..1 << 20).map(|at: u32| (at as u8) ^ (at >> 8) as u8 ^ host ^ number as u8).collect()
}

fn write_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Writes `count` files of 1 MiB. Until every host has the added LUN (`is_there`) a full volume is the truth: such a file is written again.
fn write_files(folder: &Path, host: u8, count: u32, is_there: &AtomicBool) {
    let began = Instant::now();
    for number in 0..count {
        let path = folder.join(format!("h{host}-{number}"));
        loop {
            // Bounded, so that a LUN that never comes is a failure and no test without end.
            let was_there = is_there.load(Ordering::Acquire) || began.elapsed() > Duration::from_secs(60);
            match write_file(&path, &pattern(host, number)) {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::StorageFull && !was_there => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) => panic!("{}: {error}", path.display()),
            }
        }
    }
}

#[test]
fn three_hosts_under_load_use_an_added_lun_without_a_remount() {
    let luns = Luns::formatted(1, 128, &[]);
    let mounts = [luns.mount(1), luns.mount(2), luns.mount(3)];
    let (new, is_there) = (blank(&luns, "added.img", 256), AtomicBool::new(false));
    // Together more than the first LUN holds: without the second one they would never end.
    thread::scope(|scope| {
        for (host, mount) in (1..=3u8).zip(&mounts) {
            let is_there = &is_there;
            scope.spawn(move || write_files(mount.path(), host, FILES, is_there));
        }
        let said = run(command("vmfs").args(["extent", "add"]).arg(&new).arg(mounts[0].path()));
        assert!(said.contains("added as lun2"), "{said}");
        for mount in &mounts {
            let took = wait_for_members(mount, 2, Duration::from_secs(20));
            println!("{}: after {took:?}", mount.path().display());
        }
        is_there.store(true, Ordering::Release);
    });
    for host in 1..=3u8 {
        let reader = &mounts[usize::from(host) % 3];
        for number in 0..FILES {
            assert_eq!(fs::read(reader.at(format!("h{host}-{number}"))).unwrap(), pattern(host, number));
        }
    }
    for mount in mounts {
        mount.unmount();
    }
    run(command("fsck.vmfs").arg("-n").args(luns.images()).arg(&new));
    let said = refused(command("mount.vmfs").arg(luns.spec()).arg(luns.beside("mnt1")), 1);
    assert!(said.contains("missing lun2") && said.contains("added.img"), "{said}");
}

#[test]
fn a_guest_goes_on_when_its_thin_disk_outgrows_its_lun_to_one_that_was_added_meanwhile() {
    let luns = Luns::formatted(1, 128, &[]);
    let mount = luns.mount(1);
    let (disk, kernel) = (mount.at("disk.vmdk"), luns.beside("guest.elf"));
    run(command("test-guest").arg("--output").arg(&kernel));
    run(command("vmfs").args(["disk", "create", "-s", "256M", "-d", "thin"]).arg(&disk));
    let new = blank(&luns, "added.img", 256);
    let log = luns.beside("guest.log");
    let mut vmm = command("vmm");
    vmm.args(["run", "--memory", "64M", "--kernel"]).arg(&kernel).arg("--disk").arg(&disk);
    vmm.args(["--cmdline", "job=verify size=192M bs=64k depth=8 seed=11", "--serial"])
        .arg(format!("file:{}", log.display()));
    let mut guest = vmm.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    // The VM has the disk open before the LUN comes.
    let began = Instant::now();
    while fs::metadata(&log).map_or(0, |found| found.len()) == 0 {
        assert!(began.elapsed() < Duration::from_secs(90), "the guest says nothing");
        thread::sleep(Duration::from_millis(5));
    }
    run(command("vmfs").args(["extent", "add"]).arg(&new).arg(mount.path()));
    let status = guest.wait().unwrap();
    let said = fs::read_to_string(&log).unwrap();
    assert!(status.success() && said.contains(" 0 failed"), "{status}: {said}");
    let text = run(command("vmfs").args(["extent", "list", "--json"]).arg(mount.path()));
    let listed: serde_json::Value = serde_json::from_str(&text).unwrap();
    let used = listed[1]["total_blocks"].as_u64().unwrap() - listed[1]["free_blocks"].as_u64().unwrap();
    assert!(used > 60, "the guest's data does not lie on the added LUN: {text}");
    mount.unmount();
    run(command("fsck.vmfs").arg("-n").args(luns.images()).arg(&new));
}

#[test]
fn a_lun_that_holds_something_is_added_only_by_force_and_a_member_never_twice() {
    let (luns, other) = (Luns::formatted(1, 128, &[]), Luns::formatted(1, 128, &[]));
    let mount = luns.mount(1);
    let add = |lun: &Path, force: bool| {
        let mut vmfs = command("vmfs");
        vmfs.args(["extent", "add"]).args(force.then_some("--force")).arg(lun).arg(mount.path());
        vmfs
    };
    let said = refused(&mut add(&other.images()[0], false), 1);
    assert!(said.contains("holds lun1 of the VMFS volume") && said.contains("force"), "{said}");
    run(&mut add(&other.images()[0], true));
    let said = refused(&mut add(&other.images()[0], true), 1);
    assert!(said.contains("is lun2 of this volume already"), "{said}");
    let said = refused(&mut add(&luns.beside("absent.img"), false), 1);
    assert!(said.contains("check the path"), "{said}");
    assert_eq!(members(&mount), 2);
    mount.unmount();
    run(command("fsck.vmfs").arg("-n").args(luns.images()).args(other.images()));
}

#[test]
fn a_lun_that_became_larger_is_used_by_every_host_and_its_files_are_read_by_all() {
    let luns = Luns::formatted(1, 64, &[]);
    let mounts = [luns.mount(1), luns.mount(2)];
    let image = &luns.images()[0];
    let grow = |lun: &Path| {
        let mut vmfs = command("vmfs");
        vmfs.args(["extent", "grow", "--json"]).arg(lun).arg(mounts[0].path());
        vmfs
    };
    let said = refused(&mut grow(image), 1);
    assert!(said.contains("has not become larger by one block"), "{said}");
    let said = refused(&mut grow(Path::new("lun9")), 1);
    assert!(said.contains("lun9 is no LUN of this volume"), "{said}");
    fs::OpenOptions::new().write(true).open(image).unwrap().set_len(256 << 20).unwrap();
    let said = run(&mut grow(image));
    let grown: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((grown["index"].as_u64(), grown["to_bytes"].as_u64()), (Some(1), Some(256 << 20)), "{said}");
    let is_there = AtomicBool::new(true);
    // More than it held before.
    write_files(mounts[0].path(), 1, FILES, &is_there);
    for number in 0..FILES {
        assert_eq!(fs::read(mounts[1].at(format!("h1-{number}"))).unwrap(), pattern(1, number));
    }
    let began = Instant::now();
    loop {
        let said = run(command("vmfs").args(["extent", "list", "--json"]).arg(mounts[1].path()));
        let listed: serde_json::Value = serde_json::from_str(&said).unwrap();
        if listed[0]["bytes"].as_u64() == Some(256 << 20) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{said}");
        thread::sleep(Duration::from_millis(50));
    }
    write_files(mounts[1].path(), 2, FILES, &is_there);
    for mount in mounts {
        mount.unmount();
    }
    run(command("fsck.vmfs").arg("-n").args(luns.images()));
}

/// Writes pieces over a file until it is told to end, and gives what the file holds then.
fn write_over(path: &Path, end: &AtomicBool) -> Vec<u8> {
    let file = fs::File::create(path).unwrap();
    let mut model = vec![0u8; 8 << 20];
    let mut round = 0usize;
    while !end.load(Ordering::Acquire) {
        let (at, length) = (round * 7_919_713 % (7 << 20), 1 + round * 4_801 % 200_000);
        let bytes: Vec<u8> = (0..length).map(|nth| (nth >> 5) as u8 ^ round as u8).collect();
        file.write_all_at(&bytes, at as u64).unwrap();
        model[at..at + length].copy_from_slice(&bytes);
        if round.is_multiple_of(16) {
            file.sync_data().unwrap();
        }
        round += 1;
    }
    model.truncate(file.metadata().unwrap().len() as usize);
    model
}

/// Pieces of a range of a disk whose data this program moves itself: LUN position, bytes on the LUN, with the references that keep them.
fn pieces(disk: &DirectFile, at: u64, length: u64) -> Vec<(usize, u64, u64, RunRef)> {
    loop {
        let (mut found, mut unknown) = (Vec::new(), false);
        disk.resolve(at, length, &mut |segment| match segment {
            Segment::Data { lun, offset, length, reference } => found.push((lun, offset, length, reference)),
            Segment::Unknown { .. } => unknown = true,
            Segment::Zero { .. } => panic!("an eager-zeroed disk has space everywhere"),
        });
        if !unknown {
            return found;
        }
        drop(found);
        disk.load(at, length).unwrap();
        thread::yield_now();
    }
}

/// Writes over a disk as a VMM does, in place on the LUNs, until it is told to end; gives what it holds then.
fn write_in_place(disk: &DirectFile, end: &AtomicBool) -> Vec<u8> {
    let mut model = vec![0u8; disk.size() as usize];
    let mut round = 0u64;
    while !end.load(Ordering::Acquire) {
        let (at, length) = (round * 7919 % 2032 * 4096, (1 + round % 16) * 4096);
        let mut done = 0;
        for (lun, offset, bytes, reference) in pieces(disk, at, length) {
            while disk.gate(lun) != GateState::Open {
                thread::sleep(Duration::from_millis(5));
            }
            let mut piece = AlignedBuf::zeroed(bytes as usize);
            piece.iter_mut().enumerate().for_each(|(nth, byte)| *byte = (nth >> 9) as u8 ^ round as u8);
            let target = fs::File::from(disk.lun(lun).access.descriptor().unwrap().try_clone().unwrap());
            target.write_all_at(&piece, offset).unwrap();
            drop(reference);
            model[(at + done) as usize..(at + done + bytes) as usize].copy_from_slice(&piece);
            done += bytes;
        }
        round += 1;
    }
    model
}

#[test]
fn the_first_lun_is_drained_while_a_guest_runs_on_it_and_files_are_written() {
    let luns = Luns::formatted(2, 256, &[]);
    let mounts = [luns.mount(1), luns.mount(2)];
    let drain = || {
        let mut vmfs = command("vmfs");
        vmfs.args(["extent", "drain", "--json"]).arg(&luns.images()[0]).arg(mounts[0].path());
        vmfs
    };
    let (is_there, end) = (AtomicBool::new(true), AtomicBool::new(false));
    write_files(mounts[0].path(), 1, 30, &is_there);
    // A program that moves the data of a disk on the first LUN itself, and a guest whose disk lies there.
    let held = mounts[0].at("held.vmdk");
    run(command("vmfs").args(["disk", "create", "-s", "8M", "-d", "eagerzeroedthick"]).arg(&held));
    let held = DirectFile::open(&mounts[0].at("held-flat.vmdk"), true).unwrap();
    let luns_of = |disk: &DirectFile| -> BTreeSet<u8> {
        pieces(disk, 0, disk.size()).iter().map(|(lun, ..)| disk.lun(*lun).index.get()).collect()
    };
    assert_eq!(luns_of(&held), [1].into());
    let (disk, kernel, log) = (mounts[0].at("disk.vmdk"), luns.beside("guest.elf"), luns.beside("guest.log"));
    run(command("test-guest").arg("--output").arg(&kernel));
    run(command("vmfs").args(["disk", "create", "-s", "128M", "-d", "thin"]).arg(&disk));
    let mut vmm = command("vmm");
    vmm.args(["run", "--memory", "64M", "--kernel"]).arg(&kernel).arg("--disk").arg(&disk);
    vmm.args(["--cmdline", "job=verify size=96M bs=64k depth=8 seed=5", "--serial"])
        .arg(format!("file:{}", log.display()));
    let model = thread::scope(|scope| {
        let writing = scope.spawn(|| write_over(&mounts[0].at("busy"), &end));
        let moving = scope.spawn(|| write_in_place(&held, &end));
        let mut guest = vmm.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        wait_for("the guest has begun", || fs::metadata(&log).is_ok_and(|found| found.len() > 0));
        let out = output(&mut drain());
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert!(report["moved_bytes"].as_u64().unwrap() >= 38 << 20, "{report}");
        // What another host or a close had just then stayed; what programs move themselves did not.
        let stayed: Vec<&str> =
            report["stayed"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert!(!stayed.contains(&"held-flat.vmdk") && !stayed.contains(&"disk-flat.vmdk"), "{report}");
        wait_for("nothing is left on the first LUN", || output(&mut drain()).status.success());
        let status = guest.wait().unwrap();
        let said = fs::read_to_string(&log).unwrap();
        assert!(status.success() && said.contains(" 0 failed"), "{status}: {said}");
        end.store(true, Ordering::Release);
        let model = writing.join().unwrap();
        let other = mounts[1].at("busy");
        wait_for("the writer's file is closed", || fs::read(&other).is_ok_and(|bytes| bytes.len() == model.len()));
        assert!(fs::read(&other).unwrap() == model);
        moving.join().unwrap()
    });
    assert_eq!(luns_of(&held), [2].into());
    drop(held);
    let other = mounts[1].at("held-flat.vmdk");
    wait_for("the program's disk is closed", || fs::read(&other).is_ok());
    assert!(fs::read(&other).unwrap() == model);
    for number in 0..30 {
        assert_eq!(fs::read(mounts[1].at(format!("h1-{number}"))).unwrap(), pattern(1, number));
    }
    // Nothing new is put there, by any host.
    write_files(mounts[1].path(), 2, 20, &is_there);
    let report: serde_json::Value = serde_json::from_str(&run(&mut drain())).unwrap();
    assert!(report["moved_bytes"] == 0 && report["left_bytes"] == 0, "{report}");
    let listed = run(command("vmfs").args(["extent", "list", "--json"]).arg(mounts[1].path()));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!((&listed[0]["state"], &listed[1]["state"]), (&"Draining".into(), &"Active".into()), "{listed}");
    // Taken back by the other host.
    let cancel = || {
        let mut vmfs = command("vmfs");
        vmfs.args(["extent", "drain", "--cancel", "--json", "lun1"]).arg(mounts[1].path());
        vmfs
    };
    let said: serde_json::Value = serde_json::from_str(&run(&mut cancel())).unwrap();
    assert_eq!((&said["index"], &said["state"]), (&1.into(), &"Active".into()), "{said}");
    assert!(refused(&mut cancel(), 1).contains("not being drained"));
    for mount in mounts {
        mount.unmount();
    }
    luns.assert_clean();
}

#[test]
fn a_lun_that_lies_where_nobody_looks_is_found_by_the_hosts_that_watch_its_folder() {
    let luns = Luns::formatted(1, 64, &[]);
    // Longer than the path that the volume records for other hosts.
    let folder = luns.beside("a-folder-with-a-name-that-is-too-long-to-be-recorded-with-the-lun-itself");
    fs::create_dir(&folder).unwrap();
    let adder = luns.mount(1);
    let blind = luns.mount(2);
    let watching = luns.mount_with(3, &["-o", &format!("watch={}/added-*.img", folder.display())]);
    let new = folder.join("added-1.img");
    fs::File::create(&new).unwrap().set_len(64 << 20).unwrap();
    run(command("vmfs").args(["extent", "add"]).arg(&new).arg(adder.path()));
    wait_for("the watching host has it", || members(&watching) == 2);
    wait_for("the other one says that it has not", || blind.status().to_string().contains("was not found here"));
    assert_eq!(members(&blind), 1);
    // What is written there is read by the one that has it.
    fs::create_dir(adder.at("new")).unwrap();
    write_files(&adder.at("new"), 1, 3, &AtomicBool::new(true));
    for number in 0..3 {
        assert_eq!(fs::read(watching.at(format!("new/h1-{number}"))).unwrap(), pattern(1, number));
    }
    for mount in [adder, blind, watching] {
        mount.unmount();
    }
    run(command("fsck.vmfs").arg("-n").args(luns.images()).arg(&new));
}

#[test]
fn a_blank_lun_that_appears_is_added_and_a_grown_one_is_used_where_that_was_asked_for_and_nothing_else_is_touched() {
    let luns = Luns::formatted(1, 64, &[]);
    let said = refused(command("mount.vmfs").arg(luns.spec()).arg(luns.beside("m")).args(["-o", "format-blank"]), 2);
    assert!(said.contains("needs watch"), "{said}");
    let folder = luns.beside("luns");
    fs::create_dir(&folder).unwrap();
    let mount = luns.mount_with(1, &["-o", &format!("watch={},format-blank,grow", folder.display())]);
    let (blank, full) = (folder.join("a-blank.img"), folder.join("b-full.img"));
    let full_file = fs::File::create(&full).unwrap();
    full_file.set_len(64 << 20).unwrap();
    full_file.write_all_at(b"somebody's", 5 << 20).unwrap();
    let file = fs::File::create(&blank).unwrap();
    file.set_len(64 << 20).unwrap();
    wait_for("the blank one is added", || members(&mount) == 2);
    wait_for("the other one is named", || mount.log().contains("b-full.img: it holds something"));
    let mut bytes = fs::read(&full).unwrap();
    assert_eq!(&bytes[5 << 20..(5 << 20) + 10], b"somebody's");
    bytes[5 << 20..(5 << 20) + 10].fill(0);
    assert!(bytes.iter().all(|byte| *byte == 0));
    file.set_len(256 << 20).unwrap();
    wait_for("it has grown", || {
        let said = run(command("vmfs").args(["extent", "list", "--json"]).arg(mount.path()));
        serde_json::from_str::<serde_json::Value>(&said).unwrap()[1]["bytes"] == 256 << 20
    });
    assert_eq!(members(&mount), 2);
    // More than the volume had before.
    write_files(mount.path(), 1, 100, &AtomicBool::new(true));
    mount.unmount();
    run(command("fsck.vmfs").arg("-n").args(luns.images()).arg(&blank));
}
