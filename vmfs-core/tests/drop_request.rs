//! Promises of the request to drop a LUN: a host that is gone on the LUN of a lock and lives on another one gives the lock up itself, and
//! keeps what it holds elsewhere; one that does not answer is broken there too.

mod names_support;

use std::sync::Arc;
use std::time::Duration;

use names_support::*;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode, WriteSegment};
use vmfs_core::format::body::Content;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::format::heartbeat::{Heartbeat, SlotState};
use vmfs_core::format::layout::heartbeat_cell;
use vmfs_core::format::root_cell::{ObjectFlags, ObjectType};
use vmfs_core::lease;
use vmfs_core::lun::Fencing;
use vmfs_core::sim::{FaultRates, HostNo, PathState, Sim};
use vmfs_core::units::{CellSize, LunIndex};
use vmfs_core::volume::{NewObjectSpec, Volume};

fn lun(number: u8) -> LunIndex {
    LunIndex::new(number).unwrap()
}

/// A file whose lock lies on LUN `on`.
async fn file_on(volume: &Volume, name: &[u8], on: u8) -> ObjectRef {
    let spec = NewObjectSpec {
        object_type: ObjectType::File,
        flags: ObjectFlags::empty(),
        luns: None,
        prefer: Some(lun(on)),
        mode: 0o600,
        uid: 0,
        gid: 0,
        size: 0,
        disk: None,
        content: Content::Inline(Vec::new()),
        lock: None,
    };
    let made = volume.create_object(volume.root(), name, spec).await.unwrap().object;
    assert_eq!(made.fd.lun(), lun(on));
    made
}

async fn write_all(volume: &Volume, file: &OpenFile, byte: u8) -> Result<(), FsError> {
    let mut done = 0;
    while done < 50_000 {
        done += volume.files().write(file, done as u64, &vec![byte; 50_000 - done]).await?;
    }
    Ok(())
}

/// A file whose lock lies on LUN `on`, open and with durable data.
async fn written_on(volume: &Volume, name: &[u8], on: u8) -> (ObjectRef, Arc<OpenFile>) {
    let file = file_on(volume, name, on).await;
    let open = volume.open(file, OpenMode::WRITE).await.unwrap();
    write_all(volume, &open, 1).await.unwrap();
    volume.flush(&open).await.unwrap();
    (file, open)
}

/// Tries to open for writing until that works; gives the virtual time that it took.
async fn taken_after(sim: &Sim, volume: &Volume, file: ObjectRef) -> Duration {
    let began = sim.now();
    loop {
        match volume.open(file, OpenMode::WRITE).await {
            Ok(open) => {
                volume.close(open).await.unwrap();
                return Duration::from_nanos(sim.now() - began);
            }
            Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
        }
        assert!(sim.now() - began < 200_000_000_000, "it is never had");
        sim.sleep(Duration::from_millis(200)).await;
    }
}

/// The owner's slot on a LUN, as the other host reads it.
async fn slot_of(owner: &Volume, reader: &Volume, on: u8) -> Heartbeat {
    let own = owner.luns().into_iter().find(|info| info.index == lun(on)).and_then(|info| info.slot).unwrap();
    let cell = reader.context().read_cell(heartbeat_cell(lun(on), own.slot)).await.unwrap();
    Heartbeat::decode(cell.payload()).unwrap()
}

#[test]
fn a_host_that_has_lost_the_locks_lun_gives_the_lock_up_itself_and_keeps_what_it_holds_elsewhere() {
    for seed in 0..5 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let (owner, _) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let (lost, lost_open) = written_on(&owner, b"lost", 1).await;
            let (kept, kept_open) = written_on(&owner, b"kept", 2).await;
            disks[0].set_path(HostNo(1), PathState::Cut);
            let took = taken_after(&sim, &other, lost).await;
            // One lease on the lock's LUN and an answer; not a second lease.
            assert!(took > Duration::from_secs(18) && took < Duration::from_secs(35), "seed {seed}: {took:?}");
            let slot = slot_of(&owner, &other, 2).await;
            assert!((slot.drop_lun, slot.drop_acknowledged) == (1, true), "{slot:?}");
            assert_eq!(owner.context().fenced(), None, "it lives on where it lives");
            // What lies on the other LUN is still its own.
            owner.files().write(&kept_open, 0, &[2; 512]).await.unwrap();
            assert_eq!(other.open(kept, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
            assert!(write_all(&owner, &lost_open, 3).await.is_err());
            let reader = other.open(lost, OpenMode::WRITE).await.unwrap();
            assert!(other.files().read(&reader, 0, 50_000).await.unwrap() == [1; 50_000]);
            other.close(reader).await.unwrap();
            sim.kill(HostNo(1));
            taken_after(&sim, &other, kept).await;
            sim.sleep(Duration::from_secs(120)).await;
            other.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "seed {seed}");
        });
        sim.end();
    }
}

#[test]
fn while_a_command_under_the_lost_locks_is_on_its_way_nothing_is_acknowledged_and_then_the_owner_is_broken() {
    let (sim, disks) = world(7, 2, CellSize::B512);
    sim.block_on(async {
        let (owner, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let (lost, open) = written_on(&owner, b"lost", 1).await;
        let WriteSegment::Data(in_flight) = open.write_segment(0, 512) else { panic!("it is written in place") };
        disks[0].set_path(HostNo(1), PathState::Cut);
        let began = sim.now();
        while sim.now() - began < 38_000_000_000 {
            assert_eq!(other.open(lost, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
            sim.sleep(Duration::from_secs(1)).await;
        }
        let slot = slot_of(&owner, &other, 2).await;
        assert_eq!((slot.drop_lun, slot.drop_acknowledged), (1, false));
        taken_after(&sim, &other, lost).await;
        assert!(sim.now() - began > 40_000_000_000, "a second lease was not waited for");
        sim.sleep(Duration::from_secs(5)).await;
        assert!(owner.context().fenced().is_some(), "it was broken on the LUN where it lived");
        drop(in_flight);
        sim.kill(HostNo(1));
        sim.sleep(Duration::from_secs(120)).await;
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn a_command_that_ends_in_time_saves_its_host_and_a_program_that_does_not_let_go_does_not() {
    let (sim, disks) = world(8, 2, CellSize::B512);
    sim.block_on(async {
        let (owner, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let (lost, _open) = written_on(&owner, b"lost", 1).await;
        let lets_go = std::rc::Rc::new(std::cell::Cell::new(false));
        let asked = std::rc::Rc::new(std::cell::Cell::new(None));
        let (answer, question) = (lets_go.clone(), asked.clone());
        owner.set_let_go(Box::new(move |lun| {
            question.set(Some(lun));
            answer.get()
        }));
        disks[0].set_path(HostNo(1), PathState::Cut);
        let began = sim.now();
        while sim.now() - began < 32_000_000_000 {
            assert_eq!(other.open(lost, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
            sim.sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(asked.get(), Some(lun(1)));
        lets_go.set(true);
        assert!(taken_after(&sim, &other, lost).await < Duration::from_secs(6));
        assert_eq!(owner.context().fenced(), None);
    });
    sim.end();
}

#[test]
fn where_only_time_fences_an_owner_that_is_claimed_while_it_renews_has_its_lease_before_its_locks_are_had() {
    let (sim, disks) = world(9, 2, CellSize::B512);
    disks.iter().for_each(|disk| disk.set_fencing(Fencing::TimeOnly));
    sim.block_on(async {
        let (owner, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let (lost, lost_open) = written_on(&owner, b"lost", 1).await;
        let (kept, _kept_open) = written_on(&owner, b"kept", 2).await;
        let WriteSegment::Data(in_flight) = lost_open.write_segment(0, 512) else { panic!("it is written in place") };
        let own = slots_of(&owner).into_iter().find(|(on, _)| *on == lun(2)).unwrap().1.slot;
        disks[0].set_path(HostNo(1), PathState::Cut);
        let state = async || {
            let cell = other.context().read_cell(heartbeat_cell(lun(2), own)).await.unwrap();
            Heartbeat::decode(cell.payload()).unwrap().state
        };
        let (began, mut claimed) = (sim.now(), None);
        let dirty = loop {
            match state().await {
                SlotState::Live => {}
                SlotState::Breaking => drop(claimed.get_or_insert(sim.now())),
                SlotState::Dirty | SlotState::Free => break sim.now(),
            }
            for file in [lost, kept] {
                match other.open(file, OpenMode::WRITE).await {
                    Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
                    Ok(open) => {
                        other.close(open).await.unwrap();
                        let now = state().await;
                        assert!(
                            matches!(now, SlotState::Dirty | SlotState::Free),
                            "a lock was had of a slot that is {now:?}"
                        );
                    }
                }
            }
            assert!(sim.now() - began < 200_000_000_000, "it is never broken");
            sim.sleep(Duration::from_millis(500)).await;
        };
        let waited = Duration::from_nanos(dirty - claimed.expect("a slot is claimed before it is dirty"));
        let needed = lease::takeover_after(&LeaseTimes::DEFAULT);
        // The lease counts from the last renewal that was seen, up to H and a look before the claim.
        assert!(waited >= needed - Duration::from_secs(5), "dirty {waited:?} after the claim");
        assert!(waited <= needed + Duration::from_secs(5), "dirty {waited:?} after the claim");
        assert!(owner.context().fenced().is_some(), "it has read by then that it was claimed");
        drop(in_flight);
        taken_after(&sim, &other, kept).await;
    });
    sim.end();
}

#[test]
fn a_write_of_unknown_end_holds_the_answer_back_though_its_file_is_closed() {
    let (sim, disks) = world(10, 2, CellSize::B512);
    sim.block_on(async {
        let (owner, paths) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let (lost, open) = written_on(&owner, b"lost", 1).await;
        paths.iter().for_each(|path| path.set_rates(FaultRates { late: 1000, ..FaultRates::default() }));
        assert_eq!(owner.files().write(&open, 0, &[2; 512]).await.unwrap_err().kind(), FsErrorKind::Io);
        paths.iter().for_each(|path| path.set_rates(FaultRates::default()));
        owner.close(open).await.unwrap_err();
        disks[0].set_path(HostNo(1), PathState::Cut);
        let began = sim.now();
        loop {
            match other.open(lost, OpenMode::WRITE).await {
                Ok(taken) => break other.close(taken).await.unwrap(),
                Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
            }
            assert!(!slot_of(&owner, &other, 2).await.drop_acknowledged);
            assert!(sim.now() - began < 200_000_000_000, "it is never broken");
            sim.sleep(Duration::from_millis(500)).await;
        }
        let slot = slot_of(&owner, &other, 2).await;
        assert!(slot.state != SlotState::Live && !slot.drop_acknowledged, "{slot:?}");
    });
    sim.end();
}
