//! Promises of programs that move a disk's data by sessions of their own: they are the mount's paths, in what they may and in how they end.

use std::io::{Read, Seek, SeekFrom, Write};

use lockd::client::{Access, DirectFile, Segment};
use luns::{Leave, Session, Transfer};
use serde_json::Value;
use tests::harness::{run, wait_for};
use tests::machines::{Guest, disk, vmm};
use tests::targets::Storage;
use vmfs_core::lun::LunErrorKind;

use super::volumes::open_when_free;

const MIB: u64 = 1 << 20;

/// Of each LUN: the keys of its registrants, and bytes written by each session.
fn seen(storage: &Storage) -> Vec<(Vec<String>, Vec<u64>)> {
    let status = storage.status();
    let targets = status["targets"].as_array().unwrap().iter();
    let list = |value: &Value| value.as_array().unwrap().clone();
    targets
        .map(|target| {
            let keys = list(&target["luns"][0]["registrants"]).iter().map(|one| one["key"].to_string()).collect();
            let written = list(&target["sessions"]).iter().map(|one| one["bytes_written"].as_u64().unwrap()).collect();
            (keys, written)
        })
        .collect()
}

#[test]
fn a_guest_moves_its_data_by_sessions_of_its_own_and_the_mount_ends_what_is_left_of_them() {
    let (mut storage, luns) = Storage::with_volume(2);
    let mount = luns.mount_with(1, &["-o", "lockd=no"]);
    let path = disk(&mount, "disk.vmdk", "64M", "thin");
    let flat = mount.at("disk-flat.vmdk");
    let is_the_mounts = || {
        let alone = |(keys, written): &(Vec<String>, Vec<u64>)| keys.len() == 1 && written.len() == 1;
        seen(&storage).iter().all(alone)
    };
    assert!(is_the_mounts(), "{:?}", seen(&storage));
    let job = "job=verify size=16M bs=64k depth=8 seed=6 passes=1000000";
    let mut guest = Guest::start(&luns, &path, job, "guest");
    guest.wait_for_more_passes();
    for (keys, written) in seen(&storage) {
        assert!(keys.len() == 2 && keys[0] == keys[1] && written.len() == 2, "{keys:?} {written:?}");
    }
    let most = || seen(&storage).iter().flat_map(|(_, written)| written.clone()).max().unwrap();
    let sum = || seen(&storage).iter().flat_map(|(_, written)| written.clone()).sum::<u64>();
    let (most_before, sum_before) = (most(), sum());
    guest.wait_for_more_passes();
    let (by_one, by_all) = (most() - most_before, sum() - sum_before);
    assert!(by_one >= 32 * MIB && by_one * 10 > by_all * 9, "{by_one} of {by_all} bytes by the VM's session");

    // The storage fails and comes back: the guest sees none of it.
    storage.crash();
    storage.restart(&luns);
    guest.wait_for_more_passes();
    guest.end_verified(&flat, 16 * MIB, 6);
    let is_the_mounts = || seen(&storage).iter().all(|(keys, written)| keys.len() == 1 && written.len() == 1);
    wait_for("the mount to end the sessions of the VM that has ended", is_the_mounts);

    // A VM that is killed with writes under way.
    let mut guest = Guest::start(&luns, &path, job, "killed");
    guest.wait_for_more_passes();
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    wait_for("the mount to end the sessions of the VM that was killed", is_the_mounts);
    let said = run(&mut vmm(&luns, &path, "job=verify size=16M bs=64k depth=8 seed=9"));
    assert!(said.contains(" 0 failed"), "{said}");
    tests::machines::assert_stamped(&flat, 16 * MIB, 9, |_| 1);
    mount.unmount();
    luns.assert_clean();
}

/// Writes to the LUN as a program does that has asked the gate long ago.
fn write_late(session: &Session, offset: u64, byte: u8) -> Result<(), LunErrorKind> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let attempt = async {
        tokio::select! {
            () = session.drive() => unreachable!("it never ends"),
            ended = session.attempt(Transfer::write(offset, vec![byte; 4096], true), &|| true) => ended,
        }
    };
    match runtime.block_on(attempt) {
        Ok(_) => Ok(()),
        Err(rest) => {
            let leave = Leave { may_send: &|| true, goes_on: &|| false };
            session.finish(rest, &leave).0.map_err(|error| error.kind)
        }
    }
}

#[test]
fn who_is_late_is_refused_by_the_storage_once_its_host_was_fenced_and_a_vm_ends_and_says_so() {
    let (storage, luns) = Storage::with_volume(1);
    let (mut one, two) = (luns.mount_with(1, &["-o", "lockd=no"]), luns.mount_with(2, &["-o", "lockd=no"]));
    let (by_hand, for_guest) = (disk(&one, "hand.vmdk", "16M", "thin"), disk(&one, "guest.vmdk", "16M", "thin"));
    run(&mut vmm(&luns, &by_hand, "job=verify size=4M bs=64k depth=8 seed=5"));
    let file = DirectFile::open(&one.at("hand-flat.vmdk"), true).unwrap();
    file.load(0, MIB).unwrap();
    let mut place = None;
    file.resolve(0, 4096, &mut |segment| {
        if let Segment::Data { lun, offset, .. } = segment {
            place = Some((lun, offset));
        }
    });
    let (lun, offset) = place.unwrap();
    let Access::Session(session, _) = &file.lun(lun).access else { panic!("it has no session") };
    assert_eq!(write_late(session, offset, 7), Ok(()));
    let job = "job=verify size=4M bs=64k depth=8 seed=6 passes=1000000";
    let mut guest = Guest::start(&luns, &for_guest, job, "guest");
    guest.wait_for_more_passes();
    assert_eq!(seen(&storage)[0].0.len(), 4, "both mounts, this program, the VM");

    // No program is started while this host stands still: a new process closes its copies of this one's files, and would wait for the mount.
    one.pause();
    guest.wait_for_error("stands still");
    let mut bytes = [0; 4096];
    let (mut taken, _) = open_when_free(&two.at("hand-flat.vmdk"));
    taken.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    taken.seek(SeekFrom::Start(0)).unwrap();
    taken.write_all(&[8; 4096]).unwrap();
    taken.sync_all().unwrap();
    let (mut of_guest, _) = open_when_free(&two.at("guest-flat.vmdk"));
    let mut before = vec![0; 4 * MIB as usize];
    of_guest.read_exact(&mut before).unwrap();
    for _ in 0..2 {
        assert_eq!(write_late(session, offset, 9), Err(LunErrorKind::Fenced));
    }
    one.resume();
    assert_eq!(guest.wait_for_end(), Some(1), "{}", guest.errors());
    assert!(guest.errors().contains("guest-flat.vmdk"), "{}", guest.errors());
    assert!(!one.wait_for_end().success());
    drop(file);
    // The key of the host went with all of its paths.
    wait_for("the host to be gone", || seen(&storage)[0].0.len() == 1);
    taken.seek(SeekFrom::Start(0)).unwrap();
    taken.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [8; 4096]);
    let mut after = vec![0; before.len()];
    of_guest.seek(SeekFrom::Start(0)).unwrap();
    of_guest.read_exact(&mut after).unwrap();
    assert!(before == after, "the VM has written after its host was fenced");
    drop((taken, of_guest, one));
    let said = run(&mut vmm(&luns, &two.at("guest.vmdk"), "job=verify size=4M bs=64k depth=8 seed=9"));
    assert!(said.contains(" 0 failed"), "{said}");
    two.wait_until_alone();
    two.unmount();
    luns.assert_clean();
}
