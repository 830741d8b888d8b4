//! A volume on simulated LUNs, and hosts that mount it.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod history;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::check::{Finding, Severity, check};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::heartbeat::{Heartbeat, SlotState};
use vmfs_core::format::layout::heartbeat_cell;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::sim::{HostNo, MemoryDisk, MemoryLun, Sim, format_disks};
use vmfs_core::slot::HostIdentity;
use vmfs_core::units::{BlockSize, CellSize, LunIndex, SlotRef, Uuid};
use vmfs_core::volume::{MountOptions, NewFile, Stat, Volume};

pub fn options(cell_size: CellSize) -> MkfsOptions {
    MkfsOptions {
        label: "names".into(),
        block_size: BlockSize::from_bytes(64 << 10).unwrap(),
        cell_size: Some(cell_size),
        ..MkfsOptions::default()
    }
}

/// A world with a fresh volume.
pub fn world(seed: u64, disks: usize, cell_size: CellSize) -> (Sim, Vec<MemoryDisk>) {
    let sim = Sim::new(seed);
    let disks: Vec<_> = (0..disks).map(|n| MemoryDisk::new(&format!("lun{n}"), 64 << 20, Some(cell_size))).collect();
    sim.block_on(format_disks(&sim, &disks, options(cell_size))).unwrap();
    (sim, disks)
}

pub fn identity(number: u32) -> HostIdentity {
    HostIdentity { host: Uuid([number as u8; 16]), boot: Uuid([1; 16]), name: format!("host{number}") }
}

pub fn mount_options(number: u32) -> MountOptions {
    MountOptions { read_only: false, host: identity(number), slot_hint: None, degraded: false }
}

/// Mounts on a host and lets its background run. The paths come back for faults.
pub async fn mount(sim: &Sim, disks: &[MemoryDisk], number: u32) -> (Volume, Vec<Rc<MemoryLun>>) {
    let paths: Vec<_> = disks.iter().map(|disk| disk.connect(sim, HostNo(number))).collect();
    let luns = paths.iter().cloned().map(|path| path as Rc<dyn Lun>).collect();
    let volume = Volume::mount(luns, mount_options(number), sim.env(HostNo(number))).await.unwrap();
    let background = volume.clone();
    sim.spawn(HostNo(number), async move { background.background().await });
    (volume, paths)
}

/// As [`mount`], with latency on every command.
pub async fn mount_slow(sim: &Sim, disks: &[MemoryDisk], number: u32) -> Volume {
    let (volume, paths) = mount(sim, disks, number).await;
    paths.iter().for_each(|path| path.set_latency(Duration::from_micros(20), Duration::from_micros(400)));
    volume
}

pub fn new_file(exclusive: bool) -> NewFile {
    NewFile { object_type: ObjectType::File, mode: 0o644, uid: 7, gid: 8, exclusive }
}

pub async fn create(volume: &Volume, directory: ObjectRef, name: &[u8]) -> Result<Stat, FsError> {
    volume.create(directory, name, new_file(true), None).await.map(|(stat, _)| stat)
}

pub async fn mkdir(volume: &Volume, directory: ObjectRef, name: &[u8]) -> Result<Stat, FsError> {
    volume.make_directory(directory, name, 0o755, 7, 8).await
}

/// All names of a directory with their types, read `step` at a time; asserts that cookies ascend and no name comes twice.
pub async fn list(volume: &Volume, directory: ObjectRef, step: usize) -> BTreeMap<Vec<u8>, (ObjectRef, ObjectType)> {
    let (mut all, mut cookie) = (BTreeMap::new(), 0);
    loop {
        let entries = volume.read_directory(directory, cookie, step).await.unwrap();
        for entry in &entries {
            assert!(entry.cookie > cookie && i64::try_from(entry.cookie).is_ok());
            cookie = entry.cookie;
            let before = all.insert(entry.name.clone(), (entry.object, entry.object_type));
            assert!(before.is_none(), "{:?} twice", entry.name);
        }
        if entries.len() < step {
            return all;
        }
    }
}

/// Everything below a directory: paths with their types. What is listed is what is found.
pub async fn tree(volume: &Volume, directory: ObjectRef) -> BTreeMap<Vec<u8>, ObjectType> {
    let mut all = BTreeMap::new();
    let mut open = vec![(Vec::new(), directory)];
    while let Some((path, directory)) = open.pop() {
        for (name, (object, object_type)) in list(volume, directory, 7).await {
            let stat = volume.lookup(directory, &name).await.unwrap();
            assert_eq!((stat.object, stat.object_type, stat.parent), (object, object_type, directory.fd));
            let mut own = path.clone();
            own.push(b'/');
            own.extend(&name);
            if object_type == ObjectType::Directory {
                open.push((own.clone(), object));
            }
            all.insert(own, object_type);
        }
    }
    all
}

pub async fn exists(volume: &Volume, directory: ObjectRef, name: &[u8]) -> bool {
    match volume.lookup(directory, name).await {
        Ok(_) => true,
        Err(error) if error.kind() == FsErrorKind::NotFound => false,
        Err(error) => panic!("{error}"),
    }
}

/// The slots that a mount holds.
pub fn slots_of(volume: &Volume) -> Vec<(LunIndex, SlotRef)> {
    volume.luns().iter().filter_map(|lun| lun.slot.map(|slot| (lun.index, slot))).collect()
}

/// What a breaker does at its end: the slots of a dead host become dirty. Uses another host's mount.
pub async fn break_slots(by: &Volume, slots: &[(LunIndex, SlotRef)]) {
    for (lun, slot) in slots {
        let cell = by.context().read_cell(heartbeat_cell(*lun, slot.slot)).await.unwrap();
        let heartbeat = Heartbeat { state: SlotState::Dirty, ..Heartbeat::decode(cell.payload()).unwrap() };
        let change = vmfs_core::cas::CellChange::payload(&cell, heartbeat.encode());
        let outcome = by.context().cas(&cell, change).await.unwrap();
        assert!(matches!(outcome, vmfs_core::cas::CasOutcome::Applied(_)));
    }
}

/// What the checker finds on the unmounted volume; `lenient`: only what recovery would not repair.
pub async fn fsck(sim: &Sim, disks: &[MemoryDisk], lenient: bool) -> Vec<Finding> {
    let luns: Vec<Rc<dyn Lun>> = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(sim, HostNo(99)) }).collect();
    let mut findings: Vec<Finding> = Vec::new();
    check(&luns, &mut findings).await.unwrap();
    findings.retain(|finding| !lenient || finding.severity == Severity::Error);
    findings
}
