//! Promises of takeover: the lock of a host that is gone is had after its lease and not before; what it left is recovered whole, wherever it
//! died; one that only slept finds that it has lost.

mod names_support;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use names_support::*;
use vmfs_core::check::Severity;
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::disk::{self, DiskSpec};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::format::heartbeat::SlotState;
use vmfs_core::format::layout::arena_cell;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::lease;
use vmfs_core::lun::Fencing;
use vmfs_core::sim::{FaultRates, HostNo, MemoryDisk, PathState, Sim};
use vmfs_core::slot;
use vmfs_core::units::CellSize;
use vmfs_core::volume::{AttributeChange, RenameFlags, Volume};

const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };

async fn write(volume: &Volume, file: ObjectRef, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let open = volume.open(file, WRITE).await?;
    write_open(volume, &open, at, bytes).await?;
    volume.close(open).await
}

async fn write_open(volume: &Volume, open: &std::sync::Arc<OpenFile>, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(open, at + done as u64, &bytes[done..]).await?;
    }
    volume.flush(open).await
}

async fn read(volume: &Volume, file: ObjectRef, at: u64, length: usize) -> Vec<u8> {
    let open = volume.open(file, OpenMode { read: true, write: false, truncate: false }).await.unwrap();
    let bytes = volume.files().read(&open, at, length).await.unwrap();
    volume.close(open).await.unwrap();
    bytes
}

/// Opens for writing again and again until that works; gives the virtual time that it took.
async fn open_when_taken_over(sim: &Sim, volume: &Volume, file: ObjectRef) -> Duration {
    let began = sim.now();
    loop {
        match volume.open(file, WRITE).await {
            Ok(open) => {
                volume.close(open).await.unwrap();
                return Duration::from_nanos(sim.now() - began);
            }
            Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
        }
        assert!(sim.now() - began < 300_000_000_000, "it is never taken over");
        sim.sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn the_lock_of_a_dead_host_is_had_when_its_lease_is_over_for_certain_and_its_data_is_there() {
    for seed in 0..6 {
        let (sim, disks) = world(seed, 1 + seed as usize % 3, CellSize::B512);
        // Where only time fences the slot that stood still is dirty at once too.
        let fencing = if seed < 3 { Fencing::Proven } else { Fencing::TimeOnly };
        disks.iter().for_each(|disk| disk.set_fencing(fencing));
        sim.block_on(async {
            let (dying, _) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let file = create(&dying, dying.root(), b"disk").await.unwrap().object;
            let open = dying.open(file, WRITE).await.unwrap();
            write_open(&dying, &open, 0, &[7; 100_000]).await.unwrap();
            sim.kill(HostNo(1));
            let took = open_when_taken_over(&sim, &other, file).await;
            let needed = lease::takeover_after(&LeaseTimes::DEFAULT);
            assert!(took >= needed - Duration::from_millis(2200), "seed {seed}: after {took:?}");
            assert!(took <= needed + Duration::from_secs(7), "seed {seed}: after {took:?}");
            assert_eq!(read(&other, file, 0, 100_000).await, [7; 100_000]);
            write(&other, file, 50_000, &[8; 100_000]).await.unwrap();
            sim.sleep(Duration::from_secs(120)).await;
            other.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "seed {seed}");
        });
        sim.end();
    }
}

#[test]
fn a_host_that_renews_is_never_taken_over_however_long_another_one_waits() {
    let (sim, disks) = world(1, 2, CellSize::B512);
    sim.block_on(async {
        let (holder, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&holder, holder.root(), b"disk").await.unwrap().object;
        let open = holder.open(file, WRITE).await.unwrap();
        for round in 0..100 {
            let refused = other.open(file, WRITE).await.err().map(|error| error.kind());
            assert_eq!(refused, Some(FsErrorKind::Busy), "round {round}");
            write_open(&holder, &open, round * 512, &[1; 512]).await.unwrap();
            sim.sleep(Duration::from_secs(3)).await;
        }
    });
    sim.end();
}

#[test]
fn a_storage_that_stalls_for_longer_than_a_lease_convicts_nobody() {
    let (sim, disks) = world(2, 1, CellSize::B512);
    sim.block_on(async {
        let (holder, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&holder, holder.root(), b"disk").await.unwrap().object;
        let open = holder.open(file, WRITE).await.unwrap();
        for _ in 0..3 {
            other.open(file, WRITE).await.unwrap_err();
            disks[0].set_stalled(true);
            sim.sleep(Duration::from_secs(100)).await;
            disks[0].set_stalled(false);
            sim.sleep(Duration::from_secs(10)).await;
        }
        write_open(&holder, &open, 0, &[1; 512]).await.unwrap();
        assert_eq!(holder.context().fenced(), None);
    });
    sim.end();
}

#[test]
fn a_host_that_slept_past_its_lease_is_fenced_and_changes_nothing_when_it_wakes() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let (sleeping, _) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let file = create(&sleeping, sleeping.root(), b"disk").await.unwrap().object;
            let open = sleeping.open(file, WRITE).await.unwrap();
            write_open(&sleeping, &open, 0, &[1; 4096]).await.unwrap();
            sim.pause(HostNo(1));
            open_when_taken_over(&sim, &other, file).await;
            write(&other, file, 0, &[2; 4096]).await.unwrap();
            sim.resume(HostNo(1));
            let refused = write_open(&sleeping, &open, 0, &[3; 4096]).await.unwrap_err();
            assert_eq!(refused.kind(), FsErrorKind::Fenced, "{refused}");
            assert_eq!(read(&other, file, 0, 4096).await, [2; 4096]);
            sim.kill(HostNo(1));
            sim.sleep(Duration::from_secs(60)).await;
            other.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "seed {seed}");
        });
        sim.end();
    }
}

#[test]
fn a_lock_waits_while_something_of_its_holder_may_still_be_on_its_way() {
    let (sim, disks) = world(5, 1, CellSize::B512);
    sim.block_on(async {
        let (dying, _) = mount(&sim, &disks, 1).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&dying, dying.root(), b"disk").await.unwrap().object;
        let _open = dying.open(file, WRITE).await.unwrap();
        disks[0].set_fencing(Fencing::NotYet);
        sim.kill(HostNo(1));
        for _ in 0..100 {
            assert_eq!(other.open(file, WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
            sim.sleep(Duration::from_secs(2)).await;
        }
        disks[0].set_fencing(Fencing::Proven);
        assert!(open_when_taken_over(&sim, &other, file).await < Duration::from_secs(5));
    });
    sim.end();
}

/// A claim does not say why it was made: whoever goes on with another one's waits until the owner's lease is over in any case.
#[test]
fn a_breaker_that_leaves_its_claim_to_another_one_leaves_the_owner_its_lease_too() {
    for fencing in [Fencing::TimeOnly, Fencing::Proven] {
        let (sim, disks) = world(8, 1, CellSize::B512);
        sim.block_on(async {
            let (dying, _) = mount(&sim, &disks, 1).await;
            let (breaker, _) = mount(&sim, &disks, 2).await;
            let (third, _) = mount(&sim, &disks, 3).await;
            let file = create(&dying, dying.root(), b"disk").await.unwrap().object;
            let _open = dying.open(file, WRITE).await.unwrap();
            let number = slots_of(&dying)[0].1.slot;
            let member = third.context().members().remove(0);
            let state =
                async || slot::read_slot(&third.context().io, &member.lun, member.index, number).await.unwrap().1;
            disks[0].set_fencing(Fencing::NotYet);
            sim.kill(HostNo(1));
            while state().await.state != SlotState::Breaking {
                breaker.open(file, WRITE).await.unwrap_err();
                sim.sleep(Duration::from_secs(1)).await;
            }
            breaker.unmount().await.unwrap();
            disks[0].set_fencing(fencing);
            let took = open_when_taken_over(&sim, &third, file).await;
            let needed = lease::takeover_after(&LeaseTimes::DEFAULT);
            match fencing {
                Fencing::TimeOnly => assert!(took >= needed - Duration::from_secs(3), "after {took:?}"),
                _ => assert!(took < Duration::from_secs(10), "after {took:?}"),
            }
            assert!(took <= needed + Duration::from_secs(7), "after {took:?}");
        });
        sim.end();
    }
}

#[test]
fn a_breaker_that_dies_is_broken_in_turn() {
    let (sim, disks) = world(6, 1, CellSize::B512);
    sim.block_on(async {
        let (dying, _) = mount(&sim, &disks, 1).await;
        let (breaker, _) = mount(&sim, &disks, 2).await;
        let (third, _) = mount(&sim, &disks, 3).await;
        let file = create(&dying, dying.root(), b"disk").await.unwrap().object;
        let _open = dying.open(file, WRITE).await.unwrap();
        disks[0].set_fencing(Fencing::NotYet);
        sim.kill(HostNo(1));
        // It claims the slot and cannot fence; then it dies too.
        for _ in 0..20 {
            breaker.open(file, WRITE).await.unwrap_err();
            sim.sleep(Duration::from_secs(2)).await;
        }
        sim.kill(HostNo(2));
        disks[0].set_fencing(Fencing::Proven);
        open_when_taken_over(&sim, &third, file).await;
        sim.sleep(Duration::from_secs(120)).await;
        third.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

/// A recovery that fails ended the round of looks, and the watches over all other slots began anew with the next one.
#[test]
fn a_slot_that_cannot_be_recovered_holds_up_no_other_one() {
    let (sim, disks) = world(7, 1, CellSize::B512);
    sim.block_on(async {
        let (first, _) = mount(&sim, &disks, 1).await;
        let (second, _) = mount(&sim, &disks, 2).await;
        let (other, _) = mount(&sim, &disks, 3).await;
        let file = create(&second, second.root(), b"disk").await.unwrap().object;
        let _open = second.open(file, WRITE).await.unwrap();
        let (damaged, behind) = (slots_of(&first)[0].1.slot, slots_of(&second)[0].1.slot);
        assert!(damaged < behind, "the damaged slot is looked at first");
        sim.kill(HostNo(1));
        sim.kill(HostNo(2));
        disks[0].damage(arena_cell(slots_of(&first)[0].0, damaged).offset, &[0xee; 512]);
        sim.sleep(Duration::from_secs(100)).await;
        let member = other.context().members().remove(0);
        let state =
            async |number| slot::read_slot(&other.context().io, &member.lun, member.index, number).await.unwrap();
        assert_eq!(state(damaged).await.1.state, SlotState::Dirty);
        assert_eq!(state(behind).await.1.state, SlotState::Free);
        other.open(file, WRITE).await.unwrap();
    });
    sim.end();
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Create,
    Append,
    Truncate,
    Unlink,
    Move,
    Replace,
    Mkdir,
    Rmdir,
    Many,
}

const OPS: [Op; 9] =
    [Op::Create, Op::Append, Op::Truncate, Op::Unlink, Op::Move, Op::Replace, Op::Mkdir, Op::Rmdir, Op::Many];

async fn carry_out(volume: &Volume, op: Op) -> Result<(), FsError> {
    let root = volume.root();
    let of = async |name: &[u8]| volume.lookup(root, name).await.map(|stat| stat.object);
    let flags = RenameFlags::default();
    match op {
        Op::Create => {
            let file = create(volume, root, b"new").await?.object;
            write(volume, file, 0, &[3; 30_000]).await
        }
        Op::Append => write(volume, of(b"file").await?, 40 << 20, &[2; 96 << 10]).await,
        Op::Truncate => {
            let change = AttributeChange { size: Some(0), ..AttributeChange::default() };
            volume.set_attributes(of(b"file").await?, change).await.map(drop)
        }
        Op::Unlink => volume.unlink(root, b"file").await.map(drop),
        Op::Move => volume.rename(root, b"file", of(b"folder").await?, b"moved", flags).await.map(drop),
        Op::Replace => volume.rename(root, b"other", root, b"file", flags).await.map(drop),
        Op::Mkdir => mkdir(volume, root, b"more").await.map(drop),
        Op::Rmdir => volume.remove_directory(root, b"empty").await.map(drop),
        Op::Many => {
            for n in 0..60 {
                create(volume, of(b"folder").await?, format!("a rather long name, number {n}").as_bytes()).await?;
            }
            Ok(())
        }
    }
}

async fn prepare(volume: &Volume) {
    let root = volume.root();
    let file = create(volume, root, b"file").await.unwrap().object;
    write(volume, file, 0, &[1; 200_000]).await.unwrap();
    let other = create(volume, root, b"other").await.unwrap().object;
    write(volume, other, 0, &[5; 100_000]).await.unwrap();
    mkdir(volume, root, b"folder").await.unwrap();
    mkdir(volume, root, b"empty").await.unwrap();
}

/// Opens every file for writing and changes every directory.
async fn use_everything(volume: &Volume, directory: ObjectRef) {
    for (_, (object, object_type)) in list(volume, directory, 100).await {
        match object_type {
            ObjectType::Directory => Box::pin(use_everything(volume, object)).await,
            _ => write(volume, object, 0, &[9; 512]).await.unwrap(),
        }
    }
    create(volume, directory, b"used").await.unwrap();
    volume.unlink(directory, b"used").await.unwrap();
}

/// Kills a host `micros` after it began; true when the operation had ended by then.
async fn dies_in(sim: &Sim, disks: &[MemoryDisk], op: Op, micros: u64) -> bool {
    let label = format!("{op:?} after {micros} us");
    let (maker, _) = mount(sim, disks, 3).await;
    prepare(&maker).await;
    maker.unmount().await.unwrap();
    let (other, _) = mount(sim, disks, 2).await;
    let (dying, paths) = mount(sim, disks, 1).await;
    create(&dying, dying.root(), b"warm").await.unwrap();
    paths.iter().for_each(|path| path.set_latency(Duration::from_micros(40), Duration::from_micros(60)));
    let done = Rc::new(Cell::new(false));
    let told = done.clone();
    sim.spawn(HostNo(1), async move {
        carry_out(&dying, op).await.unwrap();
        told.set(true);
    });
    sim.sleep(Duration::from_micros(micros)).await;
    let ended = done.get();
    sim.kill(HostNo(1));
    // Nobody asks for anything: the dead are found all the same.
    sim.sleep(Duration::from_secs(300)).await;
    // What is left is locks that the next open takes back, and entries that the next change of their directory drops.
    use_everything(&other, other.root()).await;
    sim.sleep(Duration::from_secs(5)).await;
    other.unmount().await.unwrap();
    let mut findings = fsck(sim, disks, false).await;
    findings.retain(|finding| finding.field != "blocks" || finding.severity == Severity::Error);
    assert_eq!(findings, Vec::new(), "{label}");
    ended
}

#[test]
fn whatever_a_host_was_doing_when_it_died_nothing_stays_behind() {
    for (number, op) in OPS.into_iter().enumerate() {
        let (mut micros, mut rest) = (0, 8);
        while rest > 0 {
            let (sim, disks) = world(micros, 1 + number % 2, CellSize::B512);
            rest -= i32::from(sim.block_on(dies_in(&sim, &disks, op, micros)));
            sim.end();
            micros += 90;
            assert!(micros < 60_000, "{op:?} never ends");
        }
    }
}

async fn make_disk(volume: &Volume) -> ObjectRef {
    let spec = DiskSpec {
        size: 1 << 20,
        format: DiskFormat::Thin,
        adapter: AdapterType::LsiLogic,
        multi_writer: false,
        mode: 0o600,
        uid: 0,
        gid: 0,
    };
    disk::create(volume, volume.root(), b"d.vmdk", spec, &mut |_| {}).await.unwrap();
    volume.lookup(volume.root(), b"d-flat.vmdk").await.unwrap().object
}

#[test]
fn a_lock_that_stays_for_a_write_in_doubt_goes_with_no_later_opening_and_not_before_the_lease_is_over() {
    for once_unknown in [false, true] {
        let (sim, disks) = world(11, 1, CellSize::B512);
        sim.block_on(async {
            let (writer, paths) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let disk = make_disk(&writer).await;
            let open = writer.open(disk, WRITE).await.unwrap();
            write_open(&writer, &open, 0, &[1; 4096]).await.unwrap();
            if once_unknown {
                // The mount has the lock among those that it may hold without knowing it, and takes it again.
                disks[0].set_path(HostNo(1), PathState::Cut);
                writer.close(open).await.unwrap_err();
                disks[0].set_path(HostNo(1), PathState::Up);
            } else {
                writer.close(open).await.unwrap();
            }
            let open = writer.open(disk, WRITE).await.unwrap();
            // Where it lies is known: what is late now is the write itself.
            write_open(&writer, &open, 0, &[1; 4096]).await.unwrap();
            paths[0].set_rates(FaultRates { late: 1000, ..FaultRates::default() });
            let in_doubt = writer.files().write(&open, 0, &[2; 4096]).await.unwrap_err();
            paths[0].set_rates(FaultRates::default());
            assert_eq!(in_doubt.kind(), FsErrorKind::Io, "{in_doubt}");
            writer.close(open).await.unwrap_err();
            for round in 0..4 {
                let reader = writer.open(disk, OpenMode::READ).await.unwrap();
                writer.close(reader).await.unwrap();
                let refused = other.open(disk, WRITE).await.err().map(|error| error.kind());
                assert_eq!(refused, Some(FsErrorKind::Busy), "round {round}");
                sim.sleep(Duration::from_secs(2)).await;
            }
            writer.unmount().await.unwrap();
            sim.kill(HostNo(1));
            let took = open_when_taken_over(&sim, &other, disk).await;
            let needed = lease::takeover_after(&LeaseTimes::DEFAULT);
            assert!(took >= needed - Duration::from_millis(2200), "after {took:?}");
            sim.sleep(Duration::from_secs(120)).await;
            other.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
        });
        sim.end();
    }
}

#[test]
fn a_host_that_slept_in_a_flush_until_another_one_wrote_the_file_is_fenced_and_calls_nothing_broken() {
    let mut fenced = 0;
    for slept_at in 0..12 {
        let (sim, disks) = world(slept_at, 1, CellSize::B512);
        sim.block_on(async {
            let (sleeping, paths) = mount(&sim, &disks, 1).await;
            let (other, _) = mount(&sim, &disks, 2).await;
            let disk = make_disk(&sleeping).await;
            write(&sleeping, disk, 0, &[1; 4096]).await.unwrap();
            let open = sleeping.open(disk, WRITE).await.unwrap();
            let block = open.granule_bytes() * 16;
            let mut done = 0;
            while done < 4096 {
                done += sleeping.files().write(&open, block + done as u64, &[2; 4096][done..]).await.unwrap();
            }
            paths[0].set_latency(Duration::from_micros(250), Duration::from_micros(250));
            let (volume, file) = (sleeping.clone(), open.clone());
            let flushing = sim.spawn(HostNo(1), async move { volume.flush(&file).await });
            sim.sleep(Duration::from_micros(slept_at * 250 + 100)).await;
            sim.pause(HostNo(1));
            open_when_taken_over(&sim, &other, disk).await;
            write(&other, disk, block, &[3; 4096]).await.unwrap();
            sim.resume(HostNo(1));
            if let Err(error) = flushing.join().await.unwrap() {
                assert_eq!(error.kind(), FsErrorKind::Fenced, "slept at {slept_at}: {error}");
                fenced += 1;
            }
            assert_eq!(read(&other, disk, block, 4096).await, [3; 4096]);
        });
        sim.end();
    }
    assert!(fenced > 0, "every flush had ended before");
}
