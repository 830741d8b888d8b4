//! Promises of mounting: LUNs in any order; whatever is not one whole volume is refused with its name, the cause and what to do.

mod names_support;

use std::rc::Rc;
use std::time::Duration;

use names_support::*;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::layout::HEADER_OFFSET;
use vmfs_core::gate::GateState;
use vmfs_core::lun::Lun;
use vmfs_core::sim::{HostNo, MemoryDisk, PathState, Sim, format_disks};
use vmfs_core::units::{CellSize, LunIndex};
use vmfs_core::volume::{MountOptions, Volume};

async fn try_mount(sim: &Sim, disks: &[&MemoryDisk], number: u32) -> Result<Volume, FsError> {
    let luns = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(sim, HostNo(number)) }).collect();
    Volume::mount(luns, mount_options(number), sim.env(HostNo(number))).await
}

/// A refusal that names all of `words`.
async fn refused(sim: &Sim, disks: &[&MemoryDisk], words: &[&str]) -> FsErrorKind {
    let Err(error) = try_mount(sim, disks, 9).await else { panic!("it was mounted, {words:?}") };
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    error.kind()
}

/// The same bytes under another name.
fn copy(disk: &MemoryDisk, name: &str) -> MemoryDisk {
    let copy = MemoryDisk::new(name, disk.bytes(), disk.cell_size());
    copy.restore(&disk.snapshot());
    copy
}

#[test]
fn luns_are_taken_in_any_order_and_the_same_volume_comes_of_it() {
    let (sim, disks) = world(1, 3, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        create(&volume, volume.root(), b"file").await.unwrap();
        volume.unmount().await.unwrap();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let volume = try_mount(&sim, &order.map(|n| &disks[n]), 1).await.unwrap();
            assert!(exists(&volume, volume.root(), b"file").await);
            let luns = volume.luns();
            assert_eq!(luns.iter().map(|lun| lun.index.get()).collect::<Vec<_>>(), [1, 2, 3]);
            assert!(luns.windows(2).all(|pair| pair[0].slot.unwrap().slot == pair[1].slot.unwrap().slot));
            volume.unmount().await.unwrap();
        }
    });
    sim.end();
}

#[test]
fn what_is_not_one_whole_volume_is_refused_and_leaves_no_slot_behind() {
    let (sim, disks) = world(2, 2, CellSize::B512);
    let (a, b) = (&disks[0], &disks[1]);
    sim.block_on(async {
        let foreign = MemoryDisk::new("foreign", 64 << 20, Some(CellSize::B512));
        format_disks(&sim, std::slice::from_ref(&foreign), options(CellSize::B512)).await.unwrap();
        let empty = MemoryDisk::new("empty", 64 << 20, Some(CellSize::B512));
        let tiny = MemoryDisk::new("tiny", 1 << 20, Some(CellSize::B512));
        let invalid = FsErrorKind::Invalid;
        assert_eq!(refused(&sim, &[], &["no LUN"]).await, invalid);
        assert_eq!(refused(&sim, &[a], &["missing", "lun2"]).await, invalid);
        assert_eq!(refused(&sim, &[b], &["missing", "lun1"]).await, invalid);
        assert_eq!(refused(&sim, &[a, b, a], &["lun0", "twice"]).await, invalid);
        assert_eq!(refused(&sim, &[a, &copy(a, "copy"), b], &["lun0", "copy", "clone"]).await, invalid);
        assert_eq!(refused(&sim, &[a, &foreign], &["foreign", "lun0", "belongs to"]).await, invalid);
        assert_eq!(refused(&sim, &[a, &empty], &["empty", "no LUN of a VMFS volume"]).await, invalid);
        assert_eq!(refused(&sim, &[a, &tiny], &["tiny", "check the path"]).await, invalid);
        assert_eq!(refused(&sim, &[&copy(a, "snapshot"), b], &["snapshot", "clone"]).await, invalid);
        let short = copy(b, "lun1");
        short.resize(b.bytes() - (1 << 20));
        assert_eq!(refused(&sim, &[a, &short], &["lun1", "truncated"]).await, invalid);
        let damaged = copy(b, "lun1");
        damaged.damage(HEADER_OFFSET + 200, &[0x55]);
        assert_eq!(refused(&sim, &[a, &damaged], &["lun1", "header", "fsck"]).await, FsErrorKind::Corrupt);
        let large = MemoryDisk::new("lun1", b.bytes(), Some(CellSize::B4096));
        large.restore(&b.snapshot());
        assert_eq!(refused(&sim, &[a, &large], &["lun1", "512", "4096"]).await, invalid);
        let file = MemoryDisk::new("lun1", b.bytes(), None);
        file.restore(&b.snapshot());
        assert_eq!(refused(&sim, &[a, &file], &["lun1", "file locks"]).await, invalid);

        let (volume, _) = mount(&sim, &disks, 1).await;
        let status = volume.status().await;
        assert!(status.luns.iter().all(|lun| lun.hosts.len() == 1), "{status:?}");
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn a_read_only_mount_joins_nothing_writes_nothing_and_refuses_changes() {
    let (sim, disks) = world(3, 2, CellSize::B4096);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        create(&volume, volume.root(), b"file").await.unwrap();
        volume.unmount().await.unwrap();
        let before: Vec<_> = disks.iter().map(|disk| disk.peek(0, disk.bytes() as usize)).collect();
        let luns = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&sim, HostNo(2)) }).collect();
        let options = MountOptions { read_only: true, ..mount_options(2) };
        let reader = Volume::mount(luns, options, sim.env(HostNo(2))).await.unwrap();
        let root = reader.root();
        assert!(exists(&reader, root, b"file").await);
        assert_eq!(create(&reader, root, b"x").await.unwrap_err().kind(), FsErrorKind::ReadOnly);
        assert_eq!(reader.unlink(root, b"file").await.unwrap_err().kind(), FsErrorKind::ReadOnly);
        reader.unmount().await.unwrap();
        let after: Vec<_> = disks.iter().map(|disk| disk.peek(0, disk.bytes() as usize)).collect();
        assert!(before == after);
    });
    sim.end();
}

#[test]
fn renewals_keep_the_gate_open_a_cut_path_freezes_it_and_its_return_opens_it_again() {
    let (sim, disks) = world(4, 1, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let lun = LunIndex::new(1).unwrap();
        let generation = volume.luns()[0].slot.unwrap().generation;
        let state = || volume.gate().gate().state(lun, generation, volume.context().env().now());
        for _ in 0..20 {
            sim.sleep(Duration::from_secs(5)).await;
            assert_eq!(state(), GateState::Open);
        }
        disks[0].set_path(HostNo(1), PathState::Cut);
        sim.sleep(Duration::from_secs(40)).await;
        assert_eq!(state(), GateState::Frozen);
        disks[0].set_path(HostNo(1), PathState::Up);
        sim.sleep(Duration::from_secs(10)).await;
        assert_eq!(state(), GateState::Open);
        create(&volume, volume.root(), b"file").await.unwrap();
        volume.unmount().await.unwrap();
        assert_eq!(state(), GateState::Poisoned);
    });
    sim.end();
}

#[test]
fn a_host_whose_slot_was_taken_over_changes_nothing_any_more_and_says_so() {
    let (sim, disks) = world(5, 1, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (b, _) = mount(&sim, &disks, 2).await;
        create(&a, a.root(), b"before").await.unwrap();
        break_slots(&b, &slots_of(&a)).await;
        assert_eq!(create(&a, a.root(), b"after").await.unwrap_err().kind(), FsErrorKind::Fenced);
        sim.sleep(Duration::from_secs(5)).await;
        let status = a.status().await;
        assert!(status.fenced.is_some_and(|text| text.contains("fenced")));
        assert!(!exists(&b, b.root(), b"after").await);
        assert!(exists(&b, b.root(), b"before").await);
        assert_eq!(a.unmount().await.unwrap_err().kind(), FsErrorKind::Fenced);
        b.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn a_host_that_comes_back_is_told_of_the_slots_it_left_behind() {
    let (sim, disks) = world(6, 1, CellSize::B512);
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        sim.kill(HostNo(1));
        drop(volume);
        let (volume, _) = mount(&sim, &disks, 1).await;
        let status = volume.status().await;
        assert!(status.luns[0].hosts.iter().any(|host| host.former_self));
        assert!(status.warnings.iter().any(|warning| warning.contains("this very host")), "{status:?}");
        volume.unmount().await.unwrap();
    });
    sim.end();
}
