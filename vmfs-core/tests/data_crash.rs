//! Promises of file data and its space when a host dies anywhere in an operation on what another host, which has left, made.

mod names_support;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use names_support::*;
use vmfs_core::file::OpenMode;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::sim::{Allowance, HostNo};
use vmfs_core::units::CellSize;
use vmfs_core::volume::{AttributeChange, Volume};

const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };

#[derive(Clone, Copy, Debug)]
enum Op {
    Append,
    Truncate,
    Unlink,
    Overwrite,
}

async fn carry_out(volume: &Volume, file: ObjectRef, op: Op) {
    match op {
        Op::Append | Op::Overwrite => {
            let open = volume.open(file, WRITE).await.unwrap();
            let at = if matches!(op, Op::Append) { 60 << 20 } else { 0 };
            volume.files().write(&open, at, &[2; 96 << 10]).await.unwrap();
            volume.flush(&open).await.unwrap();
            volume.close(open).await.unwrap();
        }
        Op::Truncate => {
            volume.set_attributes(file, AttributeChange { size: Some(0), ..AttributeChange::default() }).await.unwrap();
        }
        Op::Unlink => {
            volume.unlink(volume.root(), b"file").await.unwrap();
        }
    }
}

/// Stops a host `micros` after it began; true when the operation had ended by then.
fn dies_in(op: Op, micros: u64) -> bool {
    let (sim, disks) = world(micros, 1, CellSize::B512);
    let ended = sim.block_on(async {
        let (maker, _) = mount(&sim, &disks, 1).await;
        let file = create(&maker, maker.root(), b"file").await.unwrap().object;
        carry_out(&maker, file, Op::Append).await;
        maker.unmount().await.unwrap();
        // Another host's root cell, so that the dying one takes another slot than the maker had.
        let (other, _) = mount(&sim, &disks, 1).await;
        let (dying, paths) = mount(&sim, &disks, 2).await;
        create(&dying, dying.root(), b"warm").await.unwrap();
        paths[0].set_latency(Duration::from_micros(40), Duration::from_micros(60));
        let done = Rc::new(Cell::new(false));
        let told = done.clone();
        sim.spawn(HostNo(2), async move {
            carry_out(&dying, file, op).await;
            told.set(true);
        });
        sim.sleep(Duration::from_micros(micros)).await;
        let ended = done.get();
        sim.kill(HostNo(2));
        sim.sleep(Duration::from_secs(10)).await;
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, true).await, Vec::new(), "{op:?} after {micros} us");
        ended
    });
    sim.end();
    ended
}

#[test]
fn a_host_that_dies_anywhere_leaves_nothing_that_no_recovery_would_find() {
    for op in [Op::Append, Op::Truncate, Op::Unlink, Op::Overwrite] {
        let mut micros = 0;
        // What is put off until after the operation goes on for a while.
        let mut rest = 60;
        while rest > 0 {
            rest -= u32::from(dies_in(op, micros));
            micros += 50;
            assert!(micros < 30_000, "{op:?} never ends");
        }
    }
}

/// Punches a hole over two pointer cells while the path dies after `changes` changes of the LUN and comes back; true when the punch
/// had ended before.
fn is_cut_off_in_a_punch(changes: u64) -> bool {
    let (sim, disks) = world(changes, 1, CellSize::B512);
    let ended = sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let file = create(&volume, volume.root(), b"file").await.unwrap().object;
        let open = volume.open(file, WRITE).await.unwrap();
        for at in [1, 58] {
            volume.files().write(&open, at << 20, &[1; 4096]).await.unwrap();
        }
        volume.close(open).await.unwrap();
        // Opened anew, so that each pointer cell is read on the way.
        let open = volume.open(file, WRITE).await.unwrap();
        let allowance = Allowance::unlimited();
        disks[0].set_allowance(HostNo(1), &allowance);
        allowance.end_after(changes);
        let punched = volume.files().punch(&open, 0..60 << 20).await;
        disks[0].set_allowance(HostNo(1), &Allowance::unlimited());
        // What was taken away is free, or the slot is left for recovery: another host finds it all.
        let closed = volume.close(open).await;
        let left = volume.unmount().await;
        assert!(punched.is_err() || (closed.is_ok() && left.is_ok()), "{closed:?}, {left:?}");
        let (other, _) = mount(&sim, &disks, 2).await;
        sim.sleep(Duration::from_secs(60)).await;
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, true).await, Vec::new(), "after {changes} changes: {punched:?}");
        punched.is_ok()
    });
    sim.end();
    ended
}

#[test]
fn a_punch_that_fails_half_way_frees_what_it_has_taken_or_leaves_it_to_recovery() {
    let tried = (0..40).find(|changes| is_cut_off_in_a_punch(*changes));
    assert!(tried.is_some_and(|tried| tried > 3), "{tried:?}");
}

/// A file in its body of 6144 bytes grows to 17 KiB, is cut, and its host dies before it is published.
fn grown_cut_and_left(size: u64) {
    let (sim, disks) = world(size, 1, CellSize::B512);
    sim.block_on(async {
        let (other, _) = mount(&sim, &disks, 1).await;
        let (dying, _) = mount(&sim, &disks, 2).await;
        let file = create(&dying, dying.root(), b"small").await.unwrap().object;
        let open = dying.open(file, WRITE).await.unwrap();
        dying.files().write(&open, 0, &[1; 6144]).await.unwrap();
        dying.flush(&open).await.unwrap();
        dying.files().write(&open, 12_800, &[2; 4096]).await.unwrap();
        dying.files().set_size(&open, size).await.unwrap();
        sim.kill(HostNo(2));
        assert_eq!(fsck(&sim, &disks, true).await, Vec::new(), "cut to {size}");
        // Its lease ends.
        sim.sleep(Duration::from_secs(180)).await;
        let open = other.open(file, WRITE).await.unwrap();
        let left = size.min(6144);
        assert_eq!(open.size(), size, "cut to {size}");
        other.files().set_size(&open, 16_384).await.unwrap();
        let bytes = other.files().read(&open, 0, 16_384).await.unwrap();
        let shows = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        assert_eq!(shows, left, "cut to {size}: what was cut off is back");
        other.close(open).await.unwrap();
        other.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, true).await, Vec::new(), "cut to {size}");
    });
    sim.end();
}

#[test]
fn a_small_file_that_has_grown_and_is_cut_before_it_is_published_is_whole_after_a_death() {
    for size in [512, 5632, 6144, 9000] {
        grown_cut_and_left(size);
    }
}
