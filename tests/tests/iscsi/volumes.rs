//! Promises of volumes on iSCSI LUNs: hosts share them by COMPARE AND WRITE, and the storage shuts out who has lost its lease.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::harness::{Mount, command, run, text, wait_for};
use tests::lockd::Lockd;
use tests::machines::{Guest, disk};
use tests::networks::Network;
use tests::targets::Storage;

/// The reservation of each LUN, as a mount sees it.
fn reservations(mount: &Mount) -> Vec<Value> {
    mount.status()["luns"].as_array().unwrap().iter().map(|lun| lun["reservation"].clone()).collect()
}

/// Opens a file for writing as soon as its lock can be had.
pub fn open_when_free(path: &std::path::Path) -> (File, Duration) {
    let began = Instant::now();
    let mut opened = None;
    wait_for("the lock to be taken over", || {
        opened = File::options().read(true).write(true).open(path).ok();
        opened.is_some()
    });
    (opened.unwrap(), began.elapsed())
}

#[test]
fn a_host_that_is_cut_off_loses_its_lock_at_grade_a_and_its_late_writes_are_refused_by_the_storage() {
    let (_storage, luns) = Storage::in_network(Network::new(3), 2);
    let network = luns.network().unwrap();
    let mount = |host: u8| luns.mount_with(host, &["-o", "lockd=no"]);
    let mounts: Vec<Mount> = (1..=3).map(mount).collect();
    let [cut, taker, other] = <[Mount; 3]>::try_from(mounts).ok().unwrap();
    for (writer, text) in [(&cut, "one"), (&taker, "two"), (&other, "three")] {
        fs::write(writer.at(text), text).unwrap();
    }
    for reader in [&cut, &taker, &other] {
        assert_eq!(
            ["one", "two", "three"].map(|text| fs::read_to_string(reader.at(text)).unwrap()),
            ["one", "two", "three"]
        );
    }
    for seen in reservations(&taker) {
        assert_eq!((&seen["type"], &seen["keeps_out"], &seen["persists"]), (&7.into(), &true.into(), &true.into()));
    }
    wait_for("each host to see three keys and grade A", || {
        let keys = |seen: &Value| seen["keys"].as_array().map_or(0, Vec::len);
        reservations(&taker).iter().all(|seen| keys(seen) == 3)
            && taker.slots_of("host1").iter().all(|slot| slot["fence_grade"] == "A" && slot["registered_paths"] == 1)
    });

    // The host writes all the time, and goes on when its link is gone.
    let held = cut.at("held");
    fs::write(&held, vec![1; 1 << 20]).unwrap();
    let file = File::options().write(true).open(&held).unwrap();
    file.write_all_at(&[2; 4096], 0).unwrap();
    file.sync_all().unwrap();
    network.set_link(1, false);
    let late = thread::spawn(move || {
        for _ in 0.. {
            if let Err(error) = file.write_all_at(&[3; 4096], 0).and_then(|()| file.sync_all()) {
                return error;
            }
        }
        unreachable!("the loop ends with an error");
    });
    let began = Instant::now();
    let (mut taken, _) = open_when_free(&taker.at("held"));
    // 13 s by design with this lease; nothing here may hang for longer than a slow machine does.
    let took = began.elapsed();
    assert!(took > Duration::from_secs(9), "after {took:?} the lease was not over");
    taken.seek(SeekFrom::Start(0)).unwrap();
    taken.write_all(&[4; 4096]).unwrap();
    taken.sync_all().unwrap();
    let takeovers = taker.status()["takeovers"].as_array().unwrap().clone();
    let others = other.status()["takeovers"].as_array().unwrap().clone();
    assert!(!takeovers.is_empty() || !others.is_empty());
    for takeover in takeovers.iter().chain(&others) {
        assert_eq!((&takeover["name"], &takeover["fence_grade"]), (&"host1".into(), &"A".into()), "{takeover}");
    }
    assert!(!late.is_finished(), "freeze, don't kill: nobody has told the host yet");

    // The link returns: what was on its way is refused, the host notices and ends.
    network.set_link(1, true);
    let error = late.join().unwrap();
    assert!(error.raw_os_error().is_some(), "{error}");
    let mut cut = cut;
    assert!(!cut.wait_for_end().success());
    assert!(cut.log().contains("another host has removed this host's registration"), "{}", cut.log());
    let mut bytes = vec![0; 8192];
    for reader in [&taker, &other] {
        File::open(reader.at("held")).unwrap().read_exact(&mut bytes).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 4) && bytes[4096..].iter().all(|byte| *byte == 1));
    }
    drop((cut, taken));

    // It comes back as a new incarnation, with a new key.
    let again = mount(1);
    File::open(again.at("held")).unwrap().read_exact(&mut bytes).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 4));
    fs::write(again.at("again"), "again").unwrap();
    for host in [again, taker, other] {
        host.unmount();
    }
    let mut probe = command("vmfs");
    probe.args(["probe-lun", "--json", "--scratch-offset", "0"]).arg(&luns.images()[0]);
    let told: Value = serde_json::from_str(&run(&mut luns.at_storage(probe))).unwrap();
    assert_eq!(
        (&told["shared"], &told["fence_grade"]),
        (&true.into(), &"A".into()),
        "no registration is left: {told:#}"
    );
    luns.assert_clean();
}

#[test]
fn a_target_that_crashes_under_load_costs_no_acknowledged_write_and_no_reservation() {
    let (mut storage, luns) = Storage::with_volume(2);
    let mounts = [luns.mount_with(1, &["-o", "lockd=no"]), luns.mount_with(2, &["-o", "lockd=no"])];
    let both_are_seen =
        |seen: &[Value]| seen.iter().all(|lun| lun["keys"].as_array().is_some_and(|keys| keys.len() == 2));
    wait_for("the first host to see both keys", || both_are_seen(&reservations(&mounts[0])));
    let before = reservations(&mounts[0]);
    let end = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = mounts
        .iter()
        .map(|mount| {
            let (folder, end, done) =
                (mount.at(format!("of{}", mount.pid())), end.clone(), Arc::new(AtomicU64::new(0)));
            fs::create_dir(&folder).unwrap();
            let counted = done.clone();
            let thread = thread::spawn(move || {
                // Metadata and data: a new file, and the last one replaced.
                let mut acknowledged = 0u64;
                while !end.load(Ordering::Relaxed) {
                    let next = acknowledged + 1;
                    let write = || -> std::io::Result<()> {
                        let new = folder.join("new");
                        let mut file = File::create(&new)?;
                        file.write_all(&[next as u8; 20_000])?;
                        file.sync_all()?;
                        fs::rename(&new, folder.join(format!("f{}", next % 8)))
                    };
                    // While the storage is away calls may fail: then they are made again, and were carried out or not.
                    if write().is_ok() {
                        acknowledged = next;
                        counted.fetch_add(1, Ordering::Relaxed);
                    } else {
                        thread::sleep(Duration::from_millis(50));
                    }
                }
                (folder, acknowledged)
            });
            (thread, done)
        })
        .collect();
    let progress = |least: u64| {
        let from: Vec<u64> = writers.iter().map(|(_, done)| done.load(Ordering::Relaxed)).collect();
        wait_for("both hosts to go on writing", || {
            writers.iter().zip(&from).all(|((_, done), from)| done.load(Ordering::Relaxed) >= from + least)
        });
    };
    for _ in 0..2 {
        progress(5);
        storage.crash();
        storage.restart(&luns);
        progress(5);
    }
    // Each look is later than the restarts: a key that was lost would stay so.
    thread::sleep(Duration::from_secs(3));
    assert_eq!(reservations(&mounts[0]), before, "reservations survive the daemon");
    end.store(true, Ordering::Relaxed);
    for (thread, _) in writers {
        let (folder, acknowledged) = thread.join().unwrap();
        for number in acknowledged.saturating_sub(6).max(1)..=acknowledged {
            let bytes = fs::read(folder.join(format!("f{}", number % 8))).unwrap();
            // The call after the last acknowledged one may have been carried out too.
            let fine = bytes.len() == 20_000 && bytes.iter().all(|byte| *byte == number as u8);
            assert!(fine, "file {number} of {acknowledged}: {} bytes of {:?}", bytes.len(), bytes.first());
        }
    }
    for mount in mounts {
        mount.unmount();
    }
    luns.assert_clean();
}

#[test]
fn a_killed_mount_is_shut_out_by_its_hosts_daemon_at_once() {
    let (_storage, luns) = Storage::with_volume(1);
    let lockd = Lockd::start(&luns);
    let option = lockd.option();
    let mut killed = luns.mount_with(1, &["-o", &option]);
    let other = luns.mount_with(2, &["-o", "lockd=no"]);
    // The mount's own paths and the daemon's are registered under one key.
    wait_for("the daemon's path to be registered too", || {
        other.slots_of("host1").iter().all(|slot| slot["registered_paths"] == 2)
    });
    fs::write(killed.at("held"), "before").unwrap();
    let file = File::options().write(true).open(killed.at("held")).unwrap();
    killed.crash();
    let (mut taken, took) = open_when_free(&other.at("held"));
    taken.write_all(b"after!").unwrap();
    taken.sync_all().unwrap();
    assert!(took < Duration::from_secs(60), "it took {took:?}");
    assert!(lockd.log().contains("preempted"));
    drop((file, taken));
    assert_eq!(fs::read_to_string(other.at("held")).unwrap(), "after!");
    other.unmount();
    drop(killed);
    luns.assert_clean();
}

#[test]
fn a_vm_ends_with_the_mount_that_its_disk_is_on() {
    let (_storage, luns) = Storage::with_volume(1);
    let mount = luns.mount_with(1, &["-o", "lockd=no"]);
    let path = disk(&mount, "disk.vmdk", "64M", "thin");
    let mut guest = Guest::start(&luns, &path, "job=verify size=4M bs=64k depth=8 seed=6 passes=1000000", "guest");
    guest.wait_for_more_passes();
    mount.kill();
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    assert!(guest.errors().contains("mounted the volume has ended"), "{}", guest.errors());
}

#[test]
fn probe_lun_says_what_a_lun_can_do_and_writes_nothing_without_being_told_where() {
    let (storage, luns) = Storage::with_volume(1);
    let url = luns.images()[0].to_str().unwrap();
    let image = storage.image(0);
    let before = fs::read(&image).unwrap();
    let ask = |arguments: &[&str]| {
        Command::new(tests::harness::program("vmfs")).arg("probe-lun").args(arguments).output().unwrap()
    };
    let told: Value = serde_json::from_slice(&ask(&["--json", url]).stdout).unwrap();
    assert!(told["identity"].as_str().unwrap().starts_with("wwid:naa."), "{told:#}");
    assert_eq!((&told["bytes"], &told["block_bytes"]), (&(300u64 << 20).into(), &512.into()));
    assert_eq!((&told["lock_mode"], &told["fence_grade"]), (&"CompareAndWrite".into(), &"A".into()));
    assert!(told["trials"].as_array().unwrap().is_empty());
    let tried = ask(&["--scratch-offset", "0", url]);
    assert!(tried.status.success(), "{}", text(&tried));
    let said = String::from_utf8_lossy(&tried.stdout).into_owned();
    assert!(said.contains("ok         of two initiators") && !said.contains("FAILED"), "{said}");
    assert!(fs::read(&image).unwrap() == before, "the scratch block has its bytes back");
    for (arguments, why) in
        [(["--scratch-offset", "2M", url], "carries a volume"), (["--scratch-offset", "100", url], "no whole block")]
    {
        let refused = ask(&arguments);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused).contains(why), "{}", text(&refused));
    }
    let file: Value = serde_json::from_slice(&ask(&["--json", image.to_str().unwrap()]).stdout).unwrap();
    assert_eq!((&file["scsi"], &file["shared"]), (&false.into(), &false.into()));
    let nobody = ask(&["iscsi://127.0.0.1:1/iqn.2026-01.test:none/0"]);
    assert_eq!(nobody.status.code(), Some(1), "{}", text(&nobody));
}
