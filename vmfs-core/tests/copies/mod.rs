//! Promises of making a volume of copies of LUNs: cut off after any command it is ended by the next call, nobody mounts half of it, the original
//! is not touched, and what hosts had under way when the copy was taken is recovered at the first mount without anybody's word.

use super::crash_support::*;
use super::names_support::{self, fsck, identity};
use super::{LEASE, Start, empty, mount, scale, sequences};

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::cas::CellIo;
use vmfs_core::check::{Finding, Severity};
use vmfs_core::env::Env;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::header::{BEING_RESIGNATURED, LunHeader};
use vmfs_core::format::heartbeat::SlotState;
use vmfs_core::format::layout::HEADER_OFFSET;
use vmfs_core::format::{Cell as FormatCell, CellContext, cell::probe};
use vmfs_core::lun::{Fencing, Lun};
use vmfs_core::resignature::{Progress, ResignatureOptions, Resignatured, resignature};
use vmfs_core::sim::{Allowance, HostNo, MemoryDisk, Rng, Sim, Snapshot};
use vmfs_core::slot;
use vmfs_core::units::{CellAddress, CellSize, LunIndex};
use vmfs_core::volume::{MountOptions, Volume};

const WORKER: HostNo = HostNo(1);
const CUT_OFF: HostNo = HostNo(5);
const SECOND: HostNo = HostNo(6);
const OF_COPY: HostNo = HostNo(7);
const OF_ORIGINAL: HostNo = HostNo(8);

fn copies_of(snapshots: &[Snapshot], cell_size: CellSize) -> Vec<MemoryDisk> {
    let each = snapshots.iter().enumerate().map(|(nth, snapshot)| {
        let copy = MemoryDisk::new(&format!("copy{nth}"), 64 << 20, Some(cell_size));
        copy.restore(snapshot);
        copy
    });
    each.collect()
}

fn paths(sim: &Sim, disks: &[MemoryDisk], host: HostNo) -> Vec<Rc<dyn Lun>> {
    disks.iter().map(|disk| disk.connect(sim, host) as Rc<dyn Lun>).collect()
}

async fn resign(sim: &Sim, disks: &[MemoryDisk], host: HostNo) -> Result<Resignatured, FsError> {
    resign_as(sim, disks, host, &ResignatureOptions::default()).await
}

async fn resign_as(
    sim: &Sim,
    disks: &[MemoryDisk],
    host: HostNo,
    options: &ResignatureOptions,
) -> Result<Resignatured, FsError> {
    let mut last = Progress { done: 0, total: 0 };
    let mut progress = |now: Progress| {
        assert!(now.done > last.done && now.done <= now.total, "{last:?} then {now:?}");
        last = now;
    };
    let env: Rc<dyn Env> = sim.env(host);
    let done = resignature(&env, &paths(sim, disks, host), options, &mut progress).await;
    assert!(done.is_err() || last.done == last.total, "it ended at {last:?}");
    done
}

async fn try_mount(sim: &Sim, disks: &[MemoryDisk], degraded: bool) -> Result<Volume, FsError> {
    let options = MountOptions { read_only: false, host: identity(9), slot_hint: None, degraded };
    Volume::mount(paths(sim, disks, HostNo(9)), options, sim.env(HostNo(9))).await
}

fn header_of(disk: &MemoryDisk) -> (CellContext, LunHeader) {
    let bytes = disk.peek(HEADER_OFFSET, 4096);
    let (context, lun) = probe(HEADER_OFFSET, &bytes).unwrap();
    let at = CellAddress { lun, offset: HEADER_OFFSET };
    let cell = FormatCell::decode(&context, at, &bytes[..context.cell_size.bytes()]).unwrap();
    (context, LunHeader::decode(context.cell_size, cell.payload()).unwrap())
}

/// Waits until no slot is left over, for less than a lease: what the copy holds of hosts is dirty and needs no watching.
async fn wait_for_recovery(sim: &Sim, volume: &Volume) {
    let began = sim.now();
    loop {
        let mut left = Vec::new();
        for member in volume.context().members() {
            let own = member.slot.borrow().as_ref().map(|own| own.slot.slot.0);
            let slots = slot::read_slots(&volume.context().io, &member.lun, member.index).await.unwrap();
            left.extend((0u8..=255).zip(slots).filter_map(|(nth, slot)| {
                let (_, heartbeat) = slot.unwrap();
                (heartbeat.state != SlotState::Free && Some(nth) != own).then_some((member.index, nth, heartbeat.state))
            }));
        }
        if left.is_empty() {
            return;
        }
        assert!(sim.now() - began < u64::from(LEASE.lease_ms) * 1_000_000, "{left:?} are not recovered");
        sim.sleep(Duration::from_millis(100)).await;
    }
}

async fn check_clean(sim: &Sim, disks: &[MemoryDisk], label: &str) {
    let mut findings: Vec<Finding> = fsck(sim, disks, false).await;
    findings.retain(|finding| finding.field != "blocks" || finding.severity == Severity::Error);
    assert_eq!(findings, Vec::new(), "{label}: {}", disks[0].name());
}

/// Both volumes on one machine, both written to, both clean.
async fn use_side_by_side(sim: &Sim, originals: &[MemoryDisk], copies: &[MemoryDisk], expected: &Look, label: &str) {
    let copy = mount(sim, copies, OF_COPY).await;
    let original = mount(sim, originals, OF_ORIGINAL).await;
    assert_ne!(copy.info().uuid, original.info().uuid, "{label}");
    let seen = look(&copy).await;
    assert!(seen == *expected, "{label}: {seen:?} in the copy, {expected:?} when it was taken");
    wait_for_recovery(sim, &copy).await;
    assert!(look(&copy).await == *expected, "{label}: the recovery changed what is there");
    use_everything(&copy).await;
    // What is written in the copy is not seen in the original.
    assert!(look(&original).await == *expected, "{label}: the original is changed");
    let root = original.root();
    names_support::create(&original, root, b"n2").await.unwrap();
    assert!(!names_support::exists(&copy, copy.root(), b"n2").await, "{label}");
    original.unlink(root, b"n2").await.unwrap();
    // The original's own dead host is watched for its lease there.
    sim.sleep(Duration::from_secs(20)).await;
    wait_for_recovery(sim, &original).await;
    use_everything(&original).await;
    for (volume, disks) in [(copy, copies), (original, originals)] {
        volume.unmount().await.unwrap();
        check_clean(sim, disks, label).await;
    }
}

/// Originals, on which a host works that has a file open, as they are at one moment, and what is to be seen on them.
fn taken(cell_size: CellSize) -> (Vec<Snapshot>, Look) {
    let start = Start::new(2, cell_size);
    let sim = Sim::new(3);
    let disks = start.disks();
    let seen = sim.block_on(async {
        let mut worker = Worker::new(mount(&sim, &disks, WORKER).await);
        for op in [Op::Lock, Op::Create, Op::Grow] {
            worker.carry_out(op).await.unwrap();
        }
        look(&worker.volume).await
    });
    let snapshots = disks.iter().map(MemoryDisk::snapshot).collect();
    sim.end();
    (snapshots, seen)
}

fn originals_of(snapshots: &[Snapshot], cell_size: CellSize) -> Vec<MemoryDisk> {
    let each = snapshots.iter().enumerate().map(|(nth, snapshot)| {
        let disk = empty(nth, cell_size);
        disk.restore(snapshot);
        disk
    });
    each.collect()
}

/// Of half a new volume nothing is mounted; a LUN that is whole may be, without the others.
async fn check_half(sim: &Sim, copies: &[MemoryDisk], label: &str) {
    let refusal = try_mount(sim, copies, false).await.err().unwrap_or_else(|| panic!("{label}: half of it is mounted"));
    assert_eq!(refusal.kind(), FsErrorKind::Invalid, "{label}: {refusal}");
    for one in copies {
        let (_, header) = header_of(one);
        let is_finished = header.volume.is_some() && header.incompatible & BEING_RESIGNATURED == 0;
        match try_mount(sim, std::slice::from_ref(one), true).await {
            Ok(volume) => {
                assert!(is_finished, "{label}: {} is mounted", one.name());
                volume.unmount().await.unwrap();
            }
            Err(error) => assert!(!is_finished, "{label}: {error}"),
        }
    }
    if copies.iter().any(|copy| header_of(copy).1.incompatible & BEING_RESIGNATURED != 0) {
        let mut findings: Vec<Finding> = Vec::new();
        let error = vmfs_core::check::check(&paths(sim, copies, SECOND), &mut findings).await.unwrap_err();
        assert!(error.to_string().contains("vmfs resignature"), "{label}: {error}");
    }
}

#[test]
fn cut_off_after_any_command_it_is_ended_by_the_next_call_and_both_volumes_are_used_side_by_side() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (snapshots, expected) = taken(cell_size);
        for after in 0.. {
            let label = format!("{cell_size:?}, cut off after {after} commands");
            let sim = Sim::new(11 + after);
            sim.limit_steps(5_000_000);
            let (originals, copies) = (originals_of(&snapshots, cell_size), copies_of(&snapshots, cell_size));
            let was_whole = sim.block_on(async {
                let allowance = Allowance::unlimited();
                copies.iter().for_each(|disk| disk.set_allowance(CUT_OFF, &allowance));
                allowance.end_after(after);
                let first = resign(&sim, &copies, CUT_OFF).await;
                let begun = copies.iter().find_map(|copy| header_of(copy).1.volume);
                let whole = match first {
                    Ok(done) => done,
                    Err(error) => {
                        assert!(allowance.is_used_up(), "{label}: {error}");
                        check_half(&sim, &copies, &label).await;
                        let second = resign(&sim, &copies, SECOND).await.unwrap_or_else(|e| panic!("{label}: {e}"));
                        assert_eq!(second.resumed, begun.is_some(), "{label}");
                        assert_eq!(begun.unwrap_or(second.volume), second.volume, "{label}");
                        second
                    }
                };
                let again = resign(&sim, &copies, SECOND).await.unwrap_err();
                assert!(again.to_string().contains("no copy"), "{label}: {again}");
                assert_eq!(whole.label, format!("snap-{}-names", &whole.volume.to_string()[..8]));
                for (copy, lun) in copies.iter().zip(&whole.luns) {
                    let (_, header) = header_of(copy);
                    assert_eq!((header.volume, header.lun_uuid), (Some(whole.volume), lun.uuid), "{label}");
                    assert_ne!(header.lun_uuid, header_of(&originals[usize::from(lun.index.get()) - 1]).1.lun_uuid);
                }
                use_side_by_side(&sim, &originals, &copies, &expected, &label).await;
                !allowance.is_used_up()
            });
            sim.end();
            if was_whole {
                assert!(after > 12, "{label}: so few commands were not all");
                break;
            }
        }
    }
}

/// A host does one operation after another; at some moment all LUNs are copied at once, some of what was not flushed is not in the copy.
fn copy_a_working_volume(start: &Start, seed: u64) {
    let sim = Sim::new(seed);
    sim.limit_steps(5_000_000);
    let disks = start.disks();
    let rng = &mut Rng::new(seed);
    let all = sequences(3);
    let sequence = all[rng.below(all.len() as u64) as usize].clone();
    let (at, power_loss, stops) = (rng.below(120), rng.chance(500), rng.chance(500));
    let label = format!("seed {seed}: {sequence:?}, copied after {at} commands");
    sim.block_on(async {
        let volume = names_support::mount_slow(&sim, &disks, WORKER.0).await;
        let allowance = Allowance::unlimited();
        disks.iter().for_each(|disk| disk.set_allowance(WORKER, &allowance));
        let done = Rc::new(Cell::new(0));
        let (told, ops, worked) = (done.clone(), sequence.clone(), volume.clone());
        let work = sim.spawn(WORKER, async move {
            let mut worker = Worker::new(worked);
            for op in ops {
                worker.carry_out(op).await.unwrap();
                told.set(told.get() + 1);
            }
            std::future::pending::<()>().await;
        });
        while allowance.used() < at && done.get() < sequence.len() {
            sim.sleep(Duration::from_micros(30)).await;
        }
        let (acknowledged, snapshots) = (done.get(), disks.iter().map(MemoryDisk::snapshot).collect::<Vec<_>>());
        let copies = copies_of(&snapshots, start.cell_size);
        if power_loss {
            copies.iter().for_each(|disk| disk.lose_power(&sim));
        }
        if stops {
            copies.iter().for_each(|disk| disk.set_fencing(Fencing::TimeOnly));
        }
        let whole = resign(&sim, &copies, SECOND).await.unwrap_or_else(|error| panic!("{label}: {error}"));
        assert_eq!(whole.left.len(), copies.len(), "{label}: {:?}", whole.left);
        let copy = mount(&sim, &copies, OF_COPY).await;
        let mut states = vec![Model::new()];
        for op in &sequence {
            states.push(states.last().unwrap().after(*op).unwrap());
        }
        let next = &states[(acknowledged + 1).min(sequence.len())].look;
        let seen = look(&copy).await;
        assert!(is_between(&seen, &states[acknowledged].look, next), "{label}: {seen:?} after {acknowledged}");
        wait_for_recovery(&sim, &copy).await;
        assert!(look(&copy).await == seen, "{label}: the recovery changed what is there");
        use_everything(&copy).await;
        sim.sleep(Duration::from_secs(3)).await;
        copy.unmount().await.unwrap();
        check_clean(&sim, &copies, &label).await;
        // The original has not noticed anything.
        while done.get() < sequence.len() {
            sim.sleep(Duration::from_millis(10)).await;
        }
        assert!(look(&volume).await == states[sequence.len()].look, "{label}: the original is changed");
        drop(work);
        sim.kill(WORKER);
    });
    sim.end();
}

#[test]
fn a_copy_of_a_working_volume_taken_at_any_moment_is_what_a_crash_at_that_moment_leaves() {
    let starts = [Start::new(2, CellSize::B512), Start::new(1, CellSize::B4096)];
    for seed in scale::seeds(0, 60) {
        copy_a_working_volume(&starts[(seed % 2) as usize], seed);
    }
}

async fn refused(sim: &Sim, disks: &[&MemoryDisk], words: &[&str]) {
    let disks: Vec<MemoryDisk> = disks.iter().map(|disk| (*disk).clone()).collect();
    let allowance = Allowance::unlimited();
    disks.iter().for_each(|disk| disk.set_allowance(SECOND, &allowance));
    let Err(error) = resign(sim, &disks, SECOND).await else { panic!("it was done, {words:?}") };
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert_eq!(allowance.used(), 0, "something was written, and then: {text}");
}

#[test]
fn what_is_not_a_complete_copy_is_refused_and_nothing_is_written() {
    let cell_size = CellSize::B512;
    let (snapshots, _) = taken(cell_size);
    let (originals, copies) = (originals_of(&snapshots, cell_size), copies_of(&snapshots, cell_size));
    let (world, foreign_disks) = names_support::world(9, 2, cell_size);
    world.end();
    let sim = Sim::new(1);
    sim.block_on(async {
        let (a, b) = (&copies[0], &copies[1]);
        refused(&sim, &[a], &["not complete", "missing lun2"]).await;
        refused(&sim, &[b], &["not complete", "missing lun1"]).await;
        refused(&sim, &[a, &originals[1]], &["lun1", "no copy", "nothing was written"]).await;
        refused(&sim, &[&originals[0], &originals[1]], &["lun0", "no copy"]).await;
        refused(&sim, &[a, b, a], &["copies"]).await;
        refused(&sim, &[a, &originals[0]], &["copies"]).await;
        let blank = MemoryDisk::new("blank", 64 << 20, Some(cell_size));
        refused(&sim, &[a, b, &blank], &["blank", "no LUN"]).await;
        let short = copies_of(&snapshots, cell_size).swap_remove(1);
        short.resize(63 << 20);
        refused(&sim, &[a, &short], &["copy1", "truncated"]).await;
        let foreign = MemoryDisk::new("foreign", 64 << 20, Some(cell_size));
        foreign.restore(&foreign_disks[1].snapshot());
        refused(&sim, &[a, &foreign], &["foreign", "copy0", "volume"]).await;
        let label = ResignatureOptions { label: Some("x".repeat(65)), is_copy: false };
        let error = resign_as(&sim, &copies, SECOND, &label).await.unwrap_err();
        assert!(error.to_string().contains("65 bytes"), "{error}");
    });
    sim.end();
}

#[test]
fn a_host_that_beats_on_the_copy_itself_keeps_it_from_being_made_a_volume() {
    let cell_size = CellSize::B512;
    let (snapshots, _) = taken(cell_size);
    let copies = copies_of(&snapshots, cell_size);
    let sim = Sim::new(4);
    sim.block_on(async {
        let (context, _) = header_of(&copies[1]);
        let lun: Rc<dyn Lun> = copies[1].connect(&sim, WORKER);
        let io = CellIo::new(context, sim.env(WORKER));
        let index = LunIndex::new(2).unwrap();
        let mut own = slot::join(&io, &lun, index, &identity(1), 77, LEASE, None).await.unwrap();
        let beating = lun.clone();
        let beats = Rc::new(Cell::new(true));
        let go_on = beats.clone();
        let clock = sim.clone();
        sim.spawn(WORKER, async move {
            while go_on.get() {
                slot::renew(&io, &beating, &mut own).await.unwrap();
                clock.sleep(Duration::from_millis(500)).await;
            }
        });
        refused(&sim, &[&copies[0], &copies[1]], &["in use by", "host1"]).await;
        beats.set(false);
        sim.sleep(Duration::from_secs(1)).await;
        let began = sim.now();
        resign(&sim, &copies, SECOND).await.unwrap();
        assert!(sim.now() - began >= u64::from(LEASE.lease_ms) * 1_000_000, "before the lease was over");
    });
    sim.end();
}

#[test]
fn a_copy_of_a_copy_is_a_volume_of_its_own_too_and_gets_further_luns() {
    let cell_size = CellSize::B512;
    let (snapshots, expected) = taken(cell_size);
    let copies = copies_of(&snapshots, cell_size);
    let sim = Sim::new(5);
    sim.block_on(async {
        let first = resign(&sim, &copies, SECOND).await.unwrap();
        let snapshots: Vec<Snapshot> = copies.iter().map(MemoryDisk::snapshot).collect();
        let seconds: Vec<MemoryDisk> = (0..2)
            .map(|nth| {
                let disk = MemoryDisk::new(&format!("second{nth}"), 64 << 20, Some(cell_size));
                disk.restore(&snapshots[nth]);
                disk
            })
            .collect();
        // LUNs of two volumes with the same cells are not taken for one volume.
        let mixed = [copies[0].clone(), seconds[1].clone()];
        let error = try_mount(&sim, &mixed, false).await.err().unwrap();
        assert!(error.to_string().contains("clone"), "{error}");
        let options = ResignatureOptions { label: Some("twice".to_owned()), is_copy: false };
        let second = resign_as(&sim, &seconds, SECOND, &options).await.unwrap();
        assert_eq!((second.from, second.label.as_str()), (Some(first.volume), "twice"));
        let error = try_mount(&sim, &mixed, false).await.err().unwrap();
        assert!(error.to_string().contains("belongs to volume"), "{error}");
        let volume = mount(&sim, &seconds, OF_COPY).await;
        assert_eq!((volume.info().uuid, volume.info().label.as_str()), (second.volume, "twice"));
        assert!(look(&volume).await == expected);
        let error = volume.adopt(copies[0].connect(&sim, OF_COPY)).await.unwrap_err();
        assert!(error.to_string().contains("belongs to volume"), "{error}");
        let third = MemoryDisk::new("third", 64 << 20, Some(cell_size));
        volume.add_extent(third.connect(&sim, OF_COPY), false, &mut |_| {}).await.unwrap();
        volume.unmount().await.unwrap();
        let all = [seconds[0].clone(), seconds[1].clone(), third.clone()];
        assert_eq!(header_of(&third).1.volume, Some(second.volume));
        let volume = mount(&sim, &all, OF_COPY).await;
        assert_eq!(volume.luns().len(), 3);
        wait_for_recovery(&sim, &volume).await;
        use_everything(&volume).await;
        volume.unmount().await.unwrap();
        check_clean(&sim, &all, "with a third LUN").await;
    });
    sim.end();
}
