//! A host that dies at any moment loses nothing that it acknowledged, and leaves a volume that others use.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tests::crash::worker::Worker;
use tests::harness::{Luns, Mount, command, output, refused, run, scale, signal, text};
use tests::random::Random;

/// Kills of one volume.
const KILLS: u64 = 8;
/// Programs on the mount that is killed.
const WORKERS: u64 = 2;
/// The host that lives through all of it.
const SURVIVOR: u8 = 200;

/// What fsck.vmfs said of a volume that is not mounted cleanly, or mounted by dead hosts only.
fn fsck(luns: &Luns, arguments: &[&str]) -> serde_json::Value {
    let out = output(command("fsck.vmfs").args(["-n", "--json"]).args(arguments).args(luns.images()));
    let report: serde_json::Value =
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&out)));
    let errors: Vec<_> = findings(&report).filter(|finding| finding["severity"] == "error").collect();
    assert!(errors.is_empty() && report["errors"] == 0, "fsck.vmfs found errors: {errors:#?}");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
    report
}

fn findings(report: &serde_json::Value) -> impl Iterator<Item = &serde_json::Value> {
    report["findings"].as_array().expect("a list").iter()
}

/// Slots that dead hosts left, as fsck.vmfs told them.
fn dead_slots(report: &serde_json::Value) -> usize {
    let slot = |f: &&serde_json::Value| f["structure"] == "heartbeat" && f["severity"] == "recoverable";
    findings(report).filter(slot).count()
}

fn of_a_dead_mount(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO))
}

/// Lets the workers work on the mount and kills it: while they work, or while it unmounts after they have ended.
fn work_and_kill(mut mount: Mount, workers: &mut [Worker], random: &mut Random) {
    let (stop, point) = (AtomicBool::new(false), mount.path().to_owned());
    let while_unmounting = random.below(6) == 0;
    // Short and long lives alike: from 1 ms to 1 s.
    let life = Duration::from_micros(1000 << random.below(10)).mul_f64(1.0 + random.below(1000) as f64 / 1000.0);
    thread::scope(|scope| {
        let all: Vec<_> = workers
            .iter_mut()
            .enumerate()
            .map(|(n, worker)| {
                let (folder, stop) = (point.join(format!("w{n}")), &stop);
                scope.spawn(move || worker.work(&folder, stop).map_err(|error| (error, worker.last.clone())))
            })
            .collect();
        thread::sleep(life);
        if !while_unmounting {
            mount.crash();
        }
        stop.store(true, Ordering::Relaxed);
        for worker in all {
            let ended = worker.join().expect("a worker does not panic");
            assert!(ended.as_ref().map_or_else(|(error, _)| of_a_dead_mount(error), |()| true), "{ended:?}");
        }
        if while_unmounting {
            signal(mount.pid(), libc::SIGTERM);
            thread::sleep(Duration::from_micros(random.below(30_000)));
            mount.crash();
        }
    });
    workers.iter_mut().for_each(Worker::killed);
}

fn compare(workers: &mut [Worker], point: &Path, when: &str) {
    for (n, worker) in workers.iter_mut().enumerate() {
        let root = point.join(format!("w{n}"));
        worker.tree.compare(&root).unwrap_or_else(|wrong| panic!("{when}: {wrong} (in {})", root.display()));
    }
}

/// One volume, killed again and again; each time the next mount carries on in what is there.
fn killed_again_and_again(seed: u64, arguments: &[&str], with_survivor: bool) {
    let luns = Luns::formatted(2, 1024, &[&["--lease", "fast"], arguments].concat());
    let mut random = Random::new(seed);
    let mut workers: Vec<_> = (0..WORKERS).map(|_| Worker::new(random.bits())).collect();
    let first = luns.mount(1);
    (0..WORKERS).for_each(|n| fs::create_dir(first.at(format!("w{n}"))).unwrap());
    first.unmount();
    let survivor = with_survivor.then(|| luns.mount(SURVIVOR));
    let (stop, mut living) = (AtomicBool::new(false), Worker::new(random.bits()));
    thread::scope(|scope| {
        let work = survivor.as_ref().map(|survivor| {
            fs::create_dir(survivor.at("living")).unwrap();
            let (folder, living, stop) = (survivor.at("living"), &mut living, &stop);
            scope.spawn(move || living.work(&folder, stop))
        });
        let _ends_with_this_thread = StopOnDrop(&stop);
        for kill in 0..KILLS {
            // The host that died comes back, or another one takes its place.
            let host = if random.below(2) == 0 { 1 } else { 2 + kill as u8 };
            let mount = luns.mount(host);
            compare(&mut workers, mount.path(), &format!("seed {seed}, mount {kill}"));
            work_and_kill(mount, &mut workers, &mut random);
            match &survivor {
                Some(survivor) => {
                    compare(&mut workers, survivor.path(), &format!("seed {seed}, kill {kill}, survivor"))
                }
                None => drop(fsck(&luns, &["--force"])),
            }
        }
        stop.store(true, Ordering::Relaxed);
        if let Some(work) = work {
            work.join().expect("it does not panic").expect("a host that lives is not disturbed by those that die");
        }
    });
    let last = luns.mount(100);
    compare(&mut workers, last.path(), &format!("seed {seed}, at the end"));
    if with_survivor {
        living.tree.compare(&last.at("living")).unwrap();
        assert!(living.operations > 0);
    }
    fs::write(last.at("new"), "the volume is in use again").unwrap();
    if let Some(survivor) = survivor {
        survivor.unmount();
        // It has recovered most of the dead meanwhile; the rest is quick.
        last.wait_until_alone();
    }
    last.unmount();
    let report = fsck(&luns, &[]);
    // A host that was killed while it unmounted may have left all its slots before, and others may be recovered already.
    assert!(dead_slots(&report) <= if with_survivor { 0 } else { 2 * KILLS as usize }, "{report:#}");
    let done: u64 = workers.iter().map(|worker| worker.operations).sum();
    assert!(done > 20, "only {done} operations were acknowledged");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn what_was_acknowledged_survives_sigkill_at_random_points() {
    for round in 0..scale(2) {
        killed_again_and_again(3 * round + 1, &[], false);
        killed_again_and_again(3 * round + 2, &["--block", "64K"], true);
        killed_again_and_again(3 * round + 3, &["--cell", "4096", "--block", "256K"], false);
    }
}

#[test]
fn a_dead_host_keeps_what_it_held_open_and_nothing_else() {
    // The slow profile: nobody takes the dead host over while this test looks.
    let luns = Luns::formatted(2, 256, &["--lease", "slow"]);
    let mut first = luns.mount(1);
    fs::write(first.at("closed"), "1").unwrap();
    fs::write(first.at("held"), "2").unwrap();
    let held = File::options().append(true).open(first.at("held")).unwrap();
    first.crash();
    drop(held);
    drop(first);
    // The same host again, and another one: to both, the dead mount is a host of its own.
    for host in [1, 2] {
        let mount = luns.mount(host);
        assert_eq!(fs::read_to_string(mount.at("held")).unwrap(), "2");
        let open = File::options().write(true).open(mount.at("held")).expect_err("the dead host holds it");
        assert_eq!(open.raw_os_error(), Some(libc::EBUSY), "{open}");
        assert_eq!(fs::remove_file(mount.at("held")).expect_err("held").raw_os_error(), Some(libc::EBUSY));
        fs::rename(mount.at("held"), mount.at("other")).expect("a name is not what a lock protects");
        fs::rename(mount.at("other"), mount.at("held")).unwrap();
        let why = run(command("vmfs").arg("why-locked").arg(mount.at("held")));
        assert!(why.contains("host1"), "{why}");
        fs::write(mount.at("closed"), "3").expect("what it had closed is free");
        fs::remove_file(mount.at("closed")).unwrap();
        fs::write(mount.at("closed"), "4").unwrap();
        let status = run(command("vmfs").arg("status").arg(mount.path()));
        assert_eq!(status.contains("an earlier mount of this very host"), host == 1, "{status}");
        mount.unmount();
    }
    let report = fsck(&luns, &[]);
    assert_eq!(dead_slots(&report), 2, "a slot on each LUN: {report:#}");
    let said = refused(command("mkfs.vmfs").args(luns.images()), 1);
    assert!(said.contains("--force"), "{said}");
}
