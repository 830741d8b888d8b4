//! Hosts that are killed, that stand still or that are slow: what they held is had after their lease and not before, what they left is
//! recovered, and one that wakes up too late writes nothing more and ends. Real processes on image files.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use tests::harness::{Luns, Mount, PATIENCE, refused, run, signal, wait_for};
use tests::machines::{Guest, assert_stamped, disk, vmm};
use tests::program::{Call, Program, text};
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::lease;

/// D of the fast profile: nobody may take a lock earlier than this after its holder's last renewal.
fn earliest() -> Duration {
    lease::takeover_after(&LeaseTimes::FAST)
}

/// Opens for writing; `None`: another host holds it.
#[track_caller]
fn try_open(path: &Path) -> Option<File> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Some(file),
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{}: {error}", path.display());
            None
        }
    }
}

/// Opens for writing again and again until that works; gives the file and when it was had.
#[track_caller]
fn open_when_free(path: &Path) -> (File, Instant) {
    let start = Instant::now();
    loop {
        if let Some(file) = try_open(path) {
            return (file, Instant::now());
        }
        assert!(start.elapsed() < PATIENCE, "{} is never free", path.display());
        thread::sleep(Duration::from_millis(50));
    }
}

fn beats(watcher: &Mount, host: &str) -> Vec<u64> {
    watcher.slots_of(host).iter().map(|slot| slot["beat"].as_u64().expect("a number")).collect()
}

/// Waits for a renewal of `host` on every LUN that came after the moment that is given: its last one is not older.
#[track_caller]
fn after_a_renewal(watcher: &Mount, host: &str) -> Instant {
    let before = Instant::now();
    let first = beats(watcher, host);
    wait_for("a renewal", || {
        let now = beats(watcher, host);
        now.len() == first.len() && now.iter().zip(&first).all(|(now, then)| now > then)
    });
    before
}

/// Work of a host that is going to die: files with durable and with lost bytes, one without a name, names under change.
fn leave_work(mount: &Mount) -> Program {
    fs::create_dir(mount.at("work")).unwrap();
    let mut program = Program::start();
    for n in 0..8 {
        let path = text(&mount.at(format!("work/f{n}")));
        for call in [
            Call::Create(path.clone()),
            Call::Write(path.clone(), 0, 3_000_000, n + 1),
            Call::Sync(path.clone()),
            Call::Write(path, 3_000_000, 1_000_000, 99),
        ] {
            program.call(call).unwrap();
        }
    }
    program.call(Call::Remove(text(&mount.at("work/f7")))).unwrap();
    for n in 0..30 {
        fs::write(mount.at(format!("work/small{n}")), "x").unwrap();
    }
    program
}

/// What [`leave_work`] made durable is there.
fn assert_work(mount: &Mount) {
    for n in 0..7 {
        let bytes = fs::read(mount.at(format!("work/f{n}"))).unwrap();
        assert!(bytes.len() >= 3_000_000 && bytes[..3_000_000].iter().all(|byte| *byte == n + 1), "work/f{n}");
        assert!(bytes[3_000_000..].iter().all(|byte| [0, 99].contains(byte)), "work/f{n} has foreign bytes");
    }
    for n in 0..30 {
        assert_eq!(fs::read_to_string(mount.at(format!("work/small{n}"))).unwrap(), "x");
    }
}

/// Removes everything; then no block may hold data.
fn assert_all_space_is_freed(luns: &Luns, mount: Mount) {
    for entry in fs::read_dir(mount.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    mount.unmount();
    let report = luns.report();
    assert_eq!(report["recoverable"], 0, "something is left behind: {report:#}");
    for lun in report["luns"].as_array().unwrap() {
        assert_eq!(lun["data"], 0, "blocks of nobody are in use: {lun:#}");
    }
}

#[test]
fn the_lock_of_a_killed_host_is_had_after_its_lease_and_all_that_it_left_is_recovered() {
    let luns = Luns::formatted(2, 512, &["--lease", "fast"]);
    let (mut one, two) = (luns.mount(1), luns.mount(2));
    let held = leave_work(&one);
    let path = disk(&one, "disk.vmdk", "256M", "thin");
    let job = "job=write size=64M bs=64k depth=8 seed=3 pattern=sequential flush=16 passes=1000";
    let mut guest = Guest::start(&luns, &path, job, "writer");
    guest.wait_for_output("flushed pass=0 generation=1 blocks=64");
    // The watch begins with the first one who waits: here it is long under way when the host dies.
    assert!(try_open(&two.at("work/f0")).is_none());
    let why = two.why_locked("disk.vmdk");
    assert!(why.contains("host1") && why.contains("mounted since") && why.contains("can be taken in"), "{why}");
    let last_renewal = after_a_renewal(&two, "host1");
    one.crash();
    let killed = Instant::now();
    drop(held);
    wait_for("why-locked to say that the host stands still", || {
        let (why, gone) =
            (two.why_locked("disk.vmdk"), two.slots_of("host1").iter().any(|slot| slot["state"] != "Live"));
        why.contains("has stood still for") || gone
    });
    let (file, taken) = open_when_free(&two.at("work/f0"));
    assert!(taken - last_renewal >= earliest(), "taken {:?} after the last renewal began", taken - last_renewal);
    println!("takeover: a dead host's lock was had {:.1} s after it was killed", (taken - killed).as_secs_f64());
    drop(file);
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    let (generation, blocks) = guest.flushed();
    drop(open_when_free(&two.at("disk-flat.vmdk")));
    assert_stamped(&two.at("disk-flat.vmdk"), 64 << 20, 3, |byte| {
        if byte < blocks * (64 << 10) { generation } else { generation - 1 }
    });
    let again = "job=verify size=64M bs=64k depth=8 seed=4";
    let said = run(&mut vmm(&luns, &two.at("disk.vmdk"), again));
    assert!(said.contains(" 0 failed"), "{said}");
    two.wait_until_alone();
    assert_work(&two);
    let log = two.log();
    assert!(log.contains("is taken over") && log.contains("was recovered"), "{log}");
    drop(one);
    two.unmount();
    luns.assert_recovered();
    assert_all_space_is_freed(&luns, luns.mount(3));
}

/// Stops `mount` until `watcher` has claimed its slots. One that is stopped in the middle of a compare-and-write keeps the cell's range
/// locked, as no host with a disk would: then it goes on and is stopped again.
#[track_caller]
fn stop_until_claimed(mount: &Mount, watcher: &Mount, host: &str, wait: &Path) {
    for _ in 0..5 {
        mount.pause();
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            assert!(try_open(wait).is_none(), "a lock was given away while its holder may still write");
            let slots = watcher.slots_of(host);
            if !slots.is_empty() && slots.iter().all(|slot| slot["state"] == "Breaking") {
                return;
            }
            thread::sleep(Duration::from_millis(200));
        }
        assert!(watcher.slots_of(host).iter().all(|slot| slot["state"] == "Live"), "one slot was claimed, one was not");
        mount.resume();
        thread::sleep(Duration::from_secs(3));
    }
    panic!("a host that stands still is never claimed: {}", watcher.log());
}

#[test]
fn a_host_that_wakes_up_after_it_was_claimed_writes_nothing_more_and_ends_with_its_vms() {
    let luns = Luns::formatted(2, 256, &["--lease", "fast"]);
    let (mut one, mut two) = (luns.mount(1), luns.mount(2));
    let mut program = leave_work(&one);
    let path = disk(&one, "disk.vmdk", "64M", "thin");
    run(&mut vmm(&luns, &path, "job=write size=16M bs=64k depth=8 seed=6"));
    let mut guest = Guest::start(&luns, &path, "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000", "sleeper");
    guest.wait_for_output("pass generation=2");
    stop_until_claimed(&one, &two, "host1", &two.at("disk-flat.vmdk"));
    let why = two.why_locked("disk.vmdk");
    assert!(why.contains("host1") && why.contains("its lease is over") && why.contains("have ended"), "{why}");
    let warnings = two.status()["warnings"].to_string();
    assert!(warnings.contains("host1") && warnings.contains("is being taken over by this host"), "{warnings}");
    guest.wait_for_error("stands still");
    // A program waits for the stopped mount with bytes in its hands.
    program.begin(&Call::Write(text(&one.at("work/f0")), 0, 500_000, 77));
    // The breaker dies too: from here on nobody but the sleeper could write to the LUNs.
    two.crash();
    let before: Vec<_> = luns.images().iter().map(|lun| fs::read(lun).unwrap()).collect();
    one.resume();
    let status = one.wait_for_end();
    assert_eq!(status.code(), Some(1), "{}", one.log());
    assert!(!tests::harness::is_mounted(one.path()), "it is still in the tree");
    let log = one.log();
    let said = log.lines().rfind(|line| line.starts_with("mount.vmfs: ")).unwrap_or_else(|| panic!("{log}"));
    let images = luns.images()[0].parent().unwrap().to_str().unwrap();
    for word in ["host1", "was fenced", "lun", images, "by host2", "mount again"] {
        assert!(said.contains(word), "it does not say {word:?}: {said}");
    }
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    assert!(guest.errors().contains("disk-flat.vmdk"), "{}", guest.errors());
    program.answer().expect_err("nothing that was written too late is acknowledged");
    drop(program);
    for (lun, before) in luns.images().iter().zip(&before) {
        let after = fs::read(lun).unwrap();
        let changed: Vec<_> =
            before.chunks(512).zip(after.chunks(512)).enumerate().filter(|(_, (a, b))| a != b).collect();
        let places: Vec<_> = changed.iter().map(|(sector, _)| format!("{:#x}", sector * 512)).take(20).collect();
        assert!(changed.is_empty(), "{} was written after the claim, at {places:?}\n{log}", lun.display());
    }
    // Two dead hosts, one of them in the middle of a takeover.
    let three = luns.mount(3);
    let (file, _) = open_when_free(&three.at("work/f0"));
    drop(file);
    let said = run(&mut vmm(&luns, &three.at("disk.vmdk"), "job=verify size=16M bs=64k depth=8 seed=7"));
    assert!(said.contains(" 0 failed"), "{said}");
    three.wait_until_alone();
    assert_work(&three);
    drop((one, two));
    assert_all_space_is_freed(&luns, three);
}

#[test]
fn a_host_that_is_slow_for_less_than_its_lease_keeps_its_locks_and_goes_on() {
    let luns = Luns::formatted(1, 256, &["--lease", "fast"]);
    let (one, two) = (luns.mount(1), luns.mount(2));
    let (mut program, path) = (Program::start(), text(&one.at("f")));
    program.call(Call::Create(path.clone())).unwrap();
    program.call(Call::Write(path.clone(), 0, 100_000, 1)).unwrap();
    let (mut short, mut round) = (0, 1);
    while short < 3 {
        // A renewal just before: the pause is what it was meant to be unless this machine stands still itself.
        let last_renewal = after_a_renewal(&two, "host1");
        one.pause();
        let until = Instant::now() + Duration::from_secs(5);
        let mut refused = true;
        while Instant::now() < until {
            refused &= try_open(&two.at("f")).is_none();
            thread::sleep(Duration::from_millis(100));
        }
        one.resume();
        if last_renewal.elapsed() > Duration::from_millis(LeaseTimes::FAST.lease_ms.into()) {
            round += 1;
            assert!(round < 20, "this machine cannot run a program for five seconds");
            continue;
        }
        assert!(refused, "a lock was given away within its lease");
        program.call(Call::Write(path.clone(), 0, 100_000, short + 2)).unwrap();
        program.call(Call::Sync(path.clone())).unwrap();
        short += 1;
    }
    program.call(Call::Close(path)).unwrap();
    drop(open_when_free(&two.at("f")));
    assert!(fs::read(two.at("f")).unwrap() == [4; 100_000]);
    assert!(!two.log().contains("is taken over"), "{}", two.log());
    one.unmount();
    two.unmount();
    luns.assert_recovered();
}

#[test]
fn a_stopped_vm_keeps_its_disk_after_its_mount_died_until_it_goes_on_and_then_writes_nothing() {
    let luns = Luns::formatted(1, 256, &["--lease", "fast"]);
    let (mut one, two) = (luns.mount(1), luns.mount(2));
    let path = disk(&one, "disk.vmdk", "64M", "thin");
    run(&mut vmm(&luns, &path, "job=write size=16M bs=64k depth=8 seed=6"));
    let mut guest = Guest::start(&luns, &path, "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000", "stopped");
    guest.wait_for_output("pass generation=2");
    signal(guest.child.id(), libc::SIGSTOP);
    one.crash();
    wait_for("the claim of the dead host's slot", || {
        assert!(try_open(&two.at("disk-flat.vmdk")).is_none(), "the disk was given away while a VM may write to it");
        two.slots_of("host1").iter().all(|slot| slot["state"] == "Breaking")
    });
    let said = refused(&mut vmm(&luns, &two.at("disk.vmdk"), "job=info"), 1);
    assert!(said.contains("host1") && said.contains("have ended"), "it does not say what the disk waits for: {said}");
    signal(guest.child.id(), libc::SIGCONT);
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    drop(open_when_free(&two.at("disk-flat.vmdk")));
    let said = run(&mut vmm(&luns, &two.at("disk.vmdk"), "job=verify size=16M bs=64k depth=8 seed=9"));
    assert!(said.contains(" 0 failed"), "{said}");
    assert_stamped(&two.at("disk-flat.vmdk"), 16 << 20, 9, |_| 1);
    two.wait_until_alone();
    drop(one);
    assert_all_space_is_freed(&luns, two);
}
