//! Volumes with something on them, made by real operations.

use std::rc::Rc;
use std::time::Duration;

use super::{MIB, World, listed, world};
use vmfs_core::check::Severity;
use vmfs_core::file::OpenMode;
use vmfs_core::format::body::{Content, DiskFormat};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::{ObjectFlags, ObjectType};
use vmfs_core::lun::Lun;
use vmfs_core::mapping::tree::Shape;
use vmfs_core::sim::{HostNo, MemoryDisk};
use vmfs_core::slot::HostIdentity;
use vmfs_core::units::{BlockSize, CellSize, Uuid};
use vmfs_core::volume::{MountOptions, NewFile, NewObjectSpec, RenameFlags, Volume};

const TIB: u64 = 1 << 40;
/// Names of 250 bytes in the large directory: enough for inner units with 512-byte cells.
pub(crate) const MANY: usize = 6000;

pub(crate) async fn mount(world: &World, number: u32) -> Volume {
    mount_slow(world, number, Duration::ZERO).await
}

pub(crate) fn mount_options(number: u32) -> MountOptions {
    let host = HostIdentity { host: Uuid([number as u8; 16]), boot: Uuid([1; 16]), name: format!("host{number}") };
    MountOptions { read_only: false, host, slot_hint: None, degraded: false }
}

/// As [`mount`], with up to `latency` for each command.
pub(crate) async fn mount_slow(world: &World, number: u32, latency: Duration) -> Volume {
    let connect = |disk: &MemoryDisk| -> Rc<dyn Lun> {
        let path = disk.connect(&world.sim, HostNo(number));
        path.set_latency(latency / 20, latency);
        path
    };
    let luns = world.disks.iter().map(connect).collect();
    let volume = Volume::mount(luns, mount_options(number), world.sim.env(HostNo(number))).await.unwrap();
    let background = volume.clone();
    world.sim.spawn(HostNo(number), async move { background.background().await });
    volume
}

fn new_file() -> NewFile {
    NewFile { object_type: ObjectType::File, mode: 0o644, uid: 1, gid: 2, exclusive: true }
}

pub(crate) async fn write(volume: &Volume, object: ObjectRef, pieces: &[(u64, usize)]) {
    let file = volume.open(object, OpenMode::WRITE).await.unwrap();
    for (offset, length) in pieces {
        let mut done = 0;
        while done < *length {
            done += volume.files().write(&file, offset + done as u64, &vec![7; length - done]).await.unwrap();
        }
    }
    volume.close(file).await.unwrap();
}

pub(crate) async fn file(volume: &Volume, directory: ObjectRef, name: &str, bytes: usize) -> ObjectRef {
    let (stat, _) = volume.create(directory, name.as_bytes(), new_file(), None).await.unwrap();
    if bytes > 0 {
        write(volume, stat.object, &[(0, bytes)]).await;
    }
    stat.object
}

pub(crate) async fn disk(volume: &Volume, directory: ObjectRef, name: &str, size: u64) -> ObjectRef {
    let shape = Shape::new(volume.info().cell_size);
    let spec = NewObjectSpec {
        object_type: ObjectType::Disk,
        flags: ObjectFlags::empty(),
        luns: None,
        prefer: None,
        mode: 0o600,
        uid: 0,
        gid: 0,
        size,
        disk: Some(DiskFormat::Thin),
        content: Content::Mapped(shape.empty_root(size, volume.info().block_size)),
        lock: None,
    };
    volume.create_object(directory, name.as_bytes(), spec).await.unwrap().object
}

/// Files, disks of every height, links, directories small and large; some of it renamed and removed again.
pub(crate) async fn fill(volume: &Volume, many: usize) {
    let root = volume.root();
    let vm = volume.make_directory(root, b"vm", 0o755, 0, 0).await.unwrap().object;
    let other = volume.make_directory(root, b"other", 0o755, 0, 0).await.unwrap().object;
    let large = volume.make_directory(vm, b"large", 0o755, 0, 0).await.unwrap().object;
    file(volume, root, "empty", 0).await;
    file(volume, vm, "inline", 3000).await;
    file(volume, vm, "mapped", 300_000).await;
    file(volume, vm, "removed", 200_000).await;
    file(volume, vm, "moved", 100_000).await;
    volume.symlink(vm, b"link", b"../other/target", 0, 0).await.unwrap();
    for (name, size) in [("two", 1 << 30), ("three", TIB), ("four", 100 * TIB)] {
        let object = disk(volume, vm, name, size).await;
        write(volume, object, &[(0, 70_000), (size / 2, 4096), (size - 4096, 4096)]).await;
    }
    for nth in 0..many {
        file(volume, large, &format!("{nth:0>250}"), 0).await;
    }
    for nth in 0..many / 10 {
        volume.unlink(large, format!("{nth:0>250}").as_bytes()).await.unwrap();
    }
    volume.unlink(vm, b"removed").await.unwrap();
    volume.rename(vm, b"moved", other, b"target", RenameFlags::default()).await.unwrap();
    volume.rename(vm, b"link", vm, b"link2", RenameFlags::default()).await.unwrap();
    volume.make_directory(other, b"gone", 0o755, 0, 0).await.unwrap();
    volume.remove_directory(other, b"gone").await.unwrap();
}

pub(crate) fn filled(sizes: &[u64], cell: CellSize, shift: u8, many: usize) -> World {
    let world = world(sizes, cell).make(shift);
    world.sim.block_on(async {
        let volume = mount(&world, 1).await;
        fill(&volume, many).await;
        volume.unmount().await.unwrap();
    });
    world
}

#[test]
fn a_volume_is_clean_after_real_operations_and_its_totals_are_right() {
    for (sizes, cell, shift) in [
        (vec![256 * MIB], CellSize::B512, 16),
        (vec![128 * MIB, 128 * MIB], CellSize::B4096, 16),
        (vec![192 * MIB], CellSize::B512, 20),
    ] {
        let world = filled(&sizes, cell, shift, 100);
        let report = world.assert_clean();
        let objects = report.objects;
        assert_eq!((objects.files, objects.disks, objects.directories, objects.symlinks), (94, 3, 4, 1));
        let block = BlockSize::from_shift(shift).unwrap().bytes();
        let of_files = 300_000u64.div_ceil(block) + 100_000u64.div_ceil(block);
        let of_disks = 3 * (70_000u64.div_ceil(block) + 2);
        let data: u64 = report.luns.iter().map(|(_, lun)| lun.data).sum();
        assert_eq!(data, of_files + of_disks);
    }
}

#[test]
fn a_large_directory_with_inner_units_is_clean() {
    let world = filled(&[256 * MIB], CellSize::B512, 16, MANY);
    let report = world.assert_clean();
    assert_eq!(report.objects.files, (MANY - MANY / 10 + 4) as u64);
    // Some body is one of a directory (content 6) of a depth beyond 8.
    let deep = |cell: &[u8]| cell[..5] == *b"VMFc\x09" && cell[96] == 6 && cell[97] > 8;
    assert!(world.disks[0].peek(0, 256 * MIB as usize).chunks(512).any(deep));
}

#[test]
fn what_a_killed_host_leaves_is_recoverable_and_no_error() {
    for seed in 0..24 {
        let world = world(&[256 * MIB], CellSize::B512).make(16);
        world.sim.block_on(async {
            let volume = mount_slow(&world, 1, Duration::from_micros(400)).await;
            let large = volume.make_directory(volume.root(), b"large", 0o755, 0, 0).await.unwrap().object;
            let at_work = volume.clone();
            world.sim.spawn(HostNo(1), async move {
                fill(&at_work, 60).await;
                for nth in 0..1000 {
                    file(&at_work, large, &format!("{nth:0>100}"), 100_000).await;
                    if nth % 3 == 0 {
                        let _ = at_work.unlink(large, format!("{nth:0>100}").as_bytes()).await;
                    }
                }
            });
            world.sim.sleep(Duration::from_millis(30) + Duration::from_micros(seed * 173_777)).await;
            world.sim.kill(HostNo(1));
        });
        let (report, findings) = world.check();
        assert!(report.is_clean(), "seed {seed}: {}", listed(&findings));
        assert!(findings.iter().any(|f| f.severity == Severity::Recoverable), "its slot is told");
    }
}
