//! Promises of vmfs-lockd with real processes: mounts and guests stand still while it is away and go on with nothing lost; it outlives its own
//! death; who was taken over stays out.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tests::harness::{Luns, Mount, command, refused, run, signal, wait_for};
use tests::lockd::Lockd;
use tests::machines::{Guest, disk};

/// The mount's slots with their generations, one a LUN.
fn own_slots(mount: &Mount) -> Vec<String> {
    let status = mount.status();
    status["luns"].as_array().unwrap().iter().map(|lun| lun["slot"].as_str().unwrap().to_owned()).collect()
}

/// The shortest time for which the mount's leases are still good, in milliseconds.
fn lease_left(mount: &Mount) -> u64 {
    let status = mount.status();
    status["luns"].as_array().unwrap().iter().map(|lun| lun["lease_left_ms"].as_u64().unwrap()).min().unwrap()
}

/// Writes stamps to a file one after another, each durable before the next, until it is told to end.
struct Writer {
    done: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<()>>,
}

/// The place of a stamp in the file.
fn place(stamp: u64) -> u64 {
    stamp % 64 * 4096
}

impl Writer {
    fn start(path: &Path) -> Writer {
        let (done, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        let (count, ended) = (done.clone(), end.clone());
        let thread = thread::spawn(move || {
            for stamp in 1u64.. {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                file.write_all_at(&stamp.to_le_bytes(), place(stamp))?;
                file.sync_data()?;
                count.store(stamp, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        Writer { done, end, thread }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    #[track_caller]
    fn wait_for_progress(&self) {
        let before = self.done();
        wait_for("the writer goes on", || self.done() > before + 3);
    }

    #[track_caller]
    fn wait_until_it_stands_still(&self) {
        wait_for("the writer stands still", || {
            let before = self.done();
            thread::sleep(Duration::from_millis(700));
            self.done() == before
        });
    }

    /// Ends it; every stamp that was acknowledged last in its place is there.
    #[track_caller]
    fn end_and_verify(self, path: &Path) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap();
        let (last, bytes) = (self.done.load(Ordering::Relaxed), fs::read(path).unwrap());
        for stamp in last.saturating_sub(63).max(1)..=last {
            let at = place(stamp) as usize;
            assert_eq!(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()), stamp, "stamp {stamp} of {last}");
        }
    }
}

#[test]
fn a_lockd_that_is_killed_and_started_again_within_the_lease_goes_on_with_the_same_slots_and_nobody_notices() {
    let luns = Luns::formatted(2, 128, &["--lease", "fast"]);
    let mut lockd = Lockd::start(&luns);
    let mount = luns.mount_with(1, &["-o", &lockd.option()]);
    let kept_by = |mount: &Mount| mount.status()["slots_kept_by"].as_str().unwrap().to_owned();
    assert!(kept_by(&mount).starts_with("vmfs-lockd at "), "{}", kept_by(&mount));
    let slots = own_slots(&mount);
    let writer = Writer::start(&mount.at("file"));
    for _ in 0..2 {
        lockd.kill();
        wait_for("the mount says so", || kept_by(&mount).contains("which is away"));
        writer.wait_for_progress();
        lockd.start_again();
        wait_for("the mount is back", || !kept_by(&mount).contains("which is away"));
        wait_for("the lease is renewed", || lease_left(&mount) > 8500);
        assert_eq!((own_slots(&mount), lockd.slots()), (slots.clone(), 2));
    }
    writer.wait_for_progress();
    writer.end_and_verify(&mount.at("file"));
    mount.unmount();
    assert_eq!(lockd.slots(), 0);
    luns.assert_clean();
}

#[test]
fn a_lun_that_is_added_has_its_slot_kept_by_lockd_as_well_across_its_restart() {
    let luns = Luns::formatted(1, 64, &["--lease", "fast"]);
    let mut lockd = Lockd::start(&luns);
    let mount = luns.mount_with(1, &["-o", &lockd.option()]);
    let new = luns.beside("added.img");
    fs::File::create(&new).unwrap().set_len(64 << 20).unwrap();
    run(command("vmfs").args(["extent", "add"]).arg(&new).arg(mount.path()));
    wait_for("it keeps both slots", || lockd.slots() == 2);
    let slots = own_slots(&mount);
    assert_eq!(slots.len(), 2);
    fs::create_dir(mount.at("on the new one")).unwrap();
    let writer = Writer::start(&mount.at("on the new one/file"));
    lockd.kill();
    lockd.start_again();
    wait_for("the leases are renewed", || lockd.slots() == 2 && lease_left(&mount) > 8500);
    assert_eq!(own_slots(&mount), slots);
    writer.wait_for_progress();
    writer.end_and_verify(&mount.at("on the new one/file"));
    mount.unmount();
    wait_for("it keeps no slot", || lockd.slots() == 0);
    run(command("fsck.vmfs").arg("-n").args(luns.images()).arg(&new));
}

/// A VM that writes, reads back and compares a disk of the mount in passes, for ever.
fn verifying_guest(luns: &Luns, mount: &Mount) -> Guest {
    let job = "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000";
    let guest = Guest::start(luns, &disk(mount, "disk.vmdk", "64M", "thin"), job, "guest");
    guest.wait_for_more_passes();
    guest
}

#[test]
fn a_guest_stands_still_while_lockd_is_stopped_and_goes_on_with_nothing_lost() {
    let luns = Luns::formatted(2, 512, &["--lease", "fast"]);
    let lockd = Lockd::start(&luns);
    let mount = luns.mount_with(1, &["-o", &lockd.option()]);
    let mut guest = verifying_guest(&luns, &mount);
    let slots = own_slots(&mount);
    for round in 1..=2 {
        lockd.stop();
        guest.wait_until("the machine stands still", |guest| guest.errors().matches("stands still").count() == round);
        guest.wait_until_nothing_changes(&luns);
        lockd.go_on();
        guest.wait_until("it goes on", |guest| guest.errors().matches("not keep the machine").count() == round);
        guest.wait_for_more_passes();
    }
    assert_eq!(own_slots(&mount), slots);
    guest.end_verified(&mount.at("disk-flat.vmdk"), 16 << 20, 6);
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_lockd_that_is_away_for_longer_than_the_lease_resumes_when_nobody_took_over() {
    let luns = Luns::formatted(2, 128, &["--lease", "fast"]);
    let mut lockd = Lockd::start(&luns);
    let mount = luns.mount_with(1, &["-o", &lockd.option()]);
    let slots = own_slots(&mount);
    let writer = Writer::start(&mount.at("file"));
    writer.wait_for_progress();
    lockd.kill();
    writer.wait_until_it_stands_still();
    wait_for("the lease is over", || lease_left(&mount) == 0);
    lockd.start_again();
    writer.wait_for_progress();
    assert_eq!(own_slots(&mount), slots);
    writer.end_and_verify(&mount.at("file"));
    mount.unmount();
    luns.assert_clean();
}

#[test]
fn a_lockd_that_comes_back_after_another_host_took_over_leaves_its_mount_and_its_guest_fenced() {
    let luns = Luns::formatted(1, 256, &["--lease", "fast"]);
    let mut lockd = Lockd::start(&luns);
    let first = luns.mount_with(1, &["-o", &lockd.option()]);
    let second = luns.mount_with(2, &["-o", "lockd=no"]);
    let mut guest = verifying_guest(&luns, &first);
    fs::write(first.at("file"), "first").unwrap();
    let mut held = File::options().write(true).open(first.at("file")).unwrap();
    let busy = File::options().write(true).open(second.at("file")).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    lockd.kill();
    // The second host claims the slot; the first one sees it without its daemon.
    wait_for("the first mount says that it is fenced", || first.log().contains("fenced"));
    assert_eq!(guest.wait_for_end(), Some(1));
    let told = guest.errors();
    assert_eq!(
        (told.matches("stands still").count(), told.matches("this host lost the disk").count()),
        (1, 1),
        "{told}"
    );
    lockd.start_again();
    wait_for("lockd finds the slot lost", || lockd.log().contains("a slot is lost"));
    wait_for("lockd keeps nothing any more", || lockd.slots() == 0);
    assert!(held.write_all(b"late").and_then(|()| held.sync_all()).is_err(), "a fenced host wrote");
    drop(held);
    // What the first host could still have in flight ends with its process: then the second one is let in.
    first.kill();
    wait_for("the second host has the file", || {
        File::options().write(true).open(second.at("file")).and_then(|mut file| file.write_all(b"other")).is_ok()
    });
    assert_eq!(fs::read(second.at("file")).unwrap(), b"other");
    second.unmount();
    luns.assert_clean();
}

#[test]
fn the_slots_of_a_mount_that_was_killed_are_given_up_by_lockd_as_soon_as_nothing_of_it_is_left() {
    let luns = Luns::formatted(2, 128, &["--lease", "slow"]);
    let lockd = Lockd::start(&luns);
    let first = luns.mount_with(1, &["-o", &lockd.option()]);
    let second = luns.mount_with(2, &["-o", &lockd.option()]);
    fs::write(first.at("file"), "first").unwrap();
    let held = File::options().write(true).open(first.at("file")).unwrap();
    assert_eq!(lockd.slots(), 4);
    let killed = Instant::now();
    first.kill();
    drop(held);
    wait_for("the second host has the file", || File::options().write(true).open(second.at("file")).is_ok());
    // The lease of this volume is 60 seconds: who waited for its end would not be here yet.
    assert!(killed.elapsed() < Duration::from_secs(60), "it took {:?}", killed.elapsed());
    assert_eq!(lockd.slots(), 2);
    second.unmount();
    luns.assert_clean();
}

#[test]
fn a_daemon_that_is_asked_for_by_name_must_be_there_and_one_folder_has_one_daemon() {
    let luns = Luns::formatted(1, 128, &[]);
    let point = luns.beside("mnt");
    fs::create_dir(&point).unwrap();
    let socket = luns.beside("none.sock");
    let option = format!("lockd={}", socket.display());
    let said = refused(command("mount.vmfs").arg(luns.spec()).arg(&point).args(["-o", &option]), 1);
    assert!(said.contains("none.sock") && said.contains("lockd=no"), "{said}");
    let lockd = Lockd::start(&luns);
    let said = refused(command("vmfs-lockd").arg("--folder").arg(&lockd.folder), 1);
    assert!(said.contains("runs already"), "{said}");
    refused(command("vmfs-lockd").arg("--no-such-flag"), 2);
    refused(command("vmfs-lockd").args(["status", "--folder"]).arg(luns.beside("elsewhere")), 1);
}

/// Takes or gives back the lock under which the heartbeats of an image are changed, through one open file.
fn lock_heartbeats(image: &File, take: bool) {
    let kind = if take { libc::F_WRLCK } else { libc::F_UNLCK };
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 2 << 20,
        l_len: 1 << 20,
        l_pid: 0,
    };
    wait_for("the lock", || {
        // SAFETY: the descriptor is open and the structure is a valid flock that the kernel only reads.
        unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_SETLK, &range) == 0 }
    });
}

#[test]
fn the_service_manager_hears_that_lockd_is_ready_lives_while_its_renewals_come_to_an_end_and_stops() {
    let luns = Luns::formatted(1, 128, &["--lease", "fast"]);
    let path = luns.beside("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_millis(1500))).unwrap();
    let heard = || {
        let mut bytes = [0; 64];
        manager.recv(&mut bytes).ok().map(|length| String::from_utf8(bytes[..length].to_vec()).unwrap())
    };
    let folder = luns.beside("run");
    let mut lockd = command("vmfs-lockd");
    lockd.arg("--folder").arg(&folder).env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "900000");
    let child = lockd.stdin(Stdio::null()).stderr(File::create(luns.beside("lockd.log")).unwrap()).spawn().unwrap();
    let mut lockd = Lockd { child, folder };
    let alive = Some("WATCHDOG=1".to_owned());
    wait_for("it is ready", || heard().as_deref() == Some("READY=1"));
    wait_for("it lives without a slot", || heard() == alive);
    let mount = luns.mount_with(1, &["-o", &lockd.option()]);
    // Renewals wait for this lock for ten seconds each.
    let image = File::options().read(true).write(true).open(&luns.images()[0]).unwrap();
    lock_heartbeats(&image, true);
    wait_for("it does not say that it lives", || heard().is_none());
    lock_heartbeats(&image, false);
    wait_for("it lives again", || heard() == alive);
    mount.unmount();
    signal(lockd.child.id(), libc::SIGTERM);
    wait_for("it stops", || heard().as_deref() == Some("STOPPING=1"));
    assert_eq!(lockd.child.wait().unwrap().code(), Some(0));
}
