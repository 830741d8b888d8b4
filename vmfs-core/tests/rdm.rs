//! Promises of raw device mappings: the LUN that was mapped and no other, one writer over all hosts, the mapping's lock before the data.

mod names_support;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use names_support::*;
use vmfs_core::disk;
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::env::{Env, LocalFuture};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{Mover, Need, OpenFile, OpenMode, Stop};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::DeviceIdentity;
use vmfs_core::gate::GateState;
use vmfs_core::lun::{Lun, RawDevices};
use vmfs_core::rdm::{self, RdmSpec};
use vmfs_core::sim::{HostNo, MemoryDisk, Sim, format_disks};
use vmfs_core::units::CellSize;
use vmfs_core::volume::Volume;

const MIB: u64 = 1 << 20;

/// The paths under which one host sees LUNs.
struct Paths {
    sim: Sim,
    host: HostNo,
    seen: RefCell<BTreeMap<String, MemoryDisk>>,
}

impl RawDevices for Paths {
    fn open_path<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>> {
        let found = self.seen.borrow().get(path).cloned();
        Box::pin(async move {
            let disk = found.ok_or_else(|| FsError::refused(FsErrorKind::NotFound, format!("{path} is not there")))?;
            Ok(disk.connect(&self.sim, self.host) as Rc<dyn Lun>)
        })
    }

    fn find<'a>(&'a self, identity: &'a DeviceIdentity, _: bool) -> LocalFuture<'a, Result<Rc<dyn Lun>, FsError>> {
        let connect = |disk: &MemoryDisk| disk.connect(&self.sim, self.host) as Rc<dyn Lun>;
        let found = self.seen.borrow().values().map(connect).find(|lun| lun.identity() == *identity);
        Box::pin(async move { found.ok_or_else(|| FsError::refused(FsErrorKind::NotFound, "no such device here")) })
    }
}

/// Lets a mount see LUNs under these paths.
fn show(sim: &Sim, volume: &Volume, number: u32, seen: &[(&str, &MemoryDisk)]) -> Rc<Paths> {
    let seen = seen.iter().map(|(path, disk)| ((*path).to_owned(), (*disk).clone())).collect();
    let paths = Rc::new(Paths { sim: sim.clone(), host: HostNo(number), seen: RefCell::new(seen) });
    volume.files().set_raw_devices(paths.clone());
    paths
}

fn raw(name: &str) -> MemoryDisk {
    MemoryDisk::new(name, 8 * MIB, Some(CellSize::B512))
}

fn spec(physical: bool) -> RdmSpec {
    RdmSpec { physical, adapter: AdapterType::LsiLogic, mode: 0o600, uid: 1, gid: 2 }
}

async fn mapping(volume: &Volume, name: &str) -> ObjectRef {
    volume.lookup(volume.root(), name.as_bytes()).await.unwrap().object
}

async fn write(volume: &Volume, file: &Arc<OpenFile>, at: u64, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(file, at + done as u64, &bytes[done..]).await.unwrap();
    }
}

#[test]
fn a_virtual_mapping_reads_and_writes_its_lun_byte_for_byte() {
    let (sim, disks) = world(1, 1, CellSize::B512);
    let device = raw("naa.1");
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        show(&sim, &volume, 1, &[("/dev/sdx", &device)]);
        rdm::create(&volume, volume.root(), b"raw.vmdk", "/dev/sdx", spec(false)).await.unwrap();
        let object = mapping(&volume, "raw-rdm.vmdk").await;
        assert_eq!(volume.stat(object).await.unwrap().attributes.size, 8 * MIB);
        let file = volume.open(object, OpenMode::WRITE).await.unwrap();
        write(&volume, &file, 1000, &[7; 70_000]).await;
        // A thread's mover reaches the device too; what it wrote is durable after a flush.
        let clock = sim.env(HostNo(1));
        let now = clock.now();
        let mut mover = Mover::new(volume.files().data_luns(), 64 << 10, Box::new(move || now));
        let moved = mover.write(&file, 3 * MIB + 5, &[9; 10_000]);
        assert!(moved.stop.is_none() && moved.bytes == 10_000, "{:?}", moved.stop);
        let mut read = vec![0; 10_000];
        assert!(mover.read(&file, 3 * MIB + 5, &mut read).stop.is_none());
        assert_eq!(read, [9; 10_000]);
        volume.flush(&file).await.unwrap();
        let behind = mover.write(&file, 8 * MIB - 512, &[1; 1024]);
        assert!(matches!(behind.stop, Some(Stop::Need(Need::Refused))), "{:?}", behind.stop);
        assert_eq!(volume.files().seek_hole(&file, 5).await.unwrap(), Some(8 * MIB));
        for refused in [
            volume.files().punch(&file, 0..MIB).await,
            volume.files().allocate_range(&file, 0..MIB, true).await,
            volume.files().set_size(&file, MIB).await,
        ] {
            assert!(matches!(refused.unwrap_err().kind(), FsErrorKind::Unsupported | FsErrorKind::NotPermitted));
        }
        volume.close(file).await.unwrap();
        assert_eq!(device.peek(1000, 70_000), [7; 70_000]);
        assert_eq!(device.peek(999, 1), [0]);
        assert_eq!(device.peek(3 * MIB + 5, 10_000), [9; 10_000]);
        let info = rdm::info(&volume, volume.root(), b"raw.vmdk").await.unwrap();
        assert_eq!((info.size, info.found.unwrap().as_str()), (8 * MIB, "naa.1"));
        assert_eq!(
            disk::info(&volume, volume.root(), b"raw.vmdk").await.unwrap().descriptor.create_type,
            "vmfsRawDeviceMap"
        );
        volume.unlink(volume.root(), b"raw-rdm.vmdk").await.unwrap();
        volume.unlink(volume.root(), b"raw.vmdk").await.unwrap();
        assert_eq!(device.peek(1000, 70_000), [7; 70_000], "removing a mapping leaves the device as it is");
        volume.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn over_two_hosts_a_mapping_has_one_writer_or_readers_and_a_dead_writer_is_taken_over() {
    let (sim, disks) = world(2, 2, CellSize::B512);
    let device = raw("naa.2");
    sim.block_on(async {
        let (one, _) = mount(&sim, &disks, 1).await;
        let (two, _) = mount(&sim, &disks, 2).await;
        show(&sim, &one, 1, &[("/dev/sda", &device)]);
        show(&sim, &two, 2, &[("/dev/sdz", &device)]);
        rdm::create(&one, one.root(), b"raw.vmdk", "/dev/sda", spec(false)).await.unwrap();
        let object = mapping(&two, "raw-rdm.vmdk").await;
        let (first, second) =
            (one.open(object, OpenMode::READ).await.unwrap(), two.open(object, OpenMode::READ).await.unwrap());
        assert_eq!(one.open(object, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
        one.close(first).await.unwrap();
        two.close(second).await.unwrap();
        let held = one.open(object, OpenMode::WRITE).await.unwrap();
        write(&one, &held, 0, &[1; 4096]).await;
        let error = two.open(object, OpenMode::WRITE).await.unwrap_err();
        assert!(error.to_string().contains("host1"), "{error}");
        assert_eq!(two.open(object, OpenMode::READ).await.unwrap_err().kind(), FsErrorKind::Busy);
        assert!(two.why_locked(object).await.unwrap().explanation.contains("host1"));
        sim.kill(HostNo(1));
        let began = sim.now();
        let file = loop {
            match two.open(object, OpenMode::WRITE).await {
                Ok(file) => break file,
                Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
            }
            assert!(sim.now() - began < 60_000_000_000, "it is never taken over");
            sim.sleep(Duration::from_millis(500)).await;
        };
        assert!(sim.now() - began > 18_000_000_000, "before the lease was over");
        assert_eq!(two.files().read(&file, 0, 4096).await.unwrap(), [1; 4096]);
        write(&two, &file, 0, &[2; 4096]).await;
        two.close(file).await.unwrap();
        assert_eq!(device.peek(0, 4096), [2; 4096]);
        sim.sleep(Duration::from_secs(120)).await;
        two.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn a_device_is_found_under_another_path_and_another_device_under_its_path_is_refused() {
    let (sim, disks) = world(3, 1, CellSize::B512);
    let (device, other) = (raw("naa.3"), raw("naa.4"));
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        let paths = show(&sim, &volume, 1, &[("/dev/sda", &device)]);
        rdm::create(&volume, volume.root(), b"raw.vmdk", "/dev/sda", spec(false)).await.unwrap();
        let object = mapping(&volume, "raw-rdm.vmdk").await;
        *paths.seen.borrow_mut() =
            [("/dev/sda".to_owned(), other.clone()), ("/dev/sdq".to_owned(), device.clone())].into();
        let file = volume.open(object, OpenMode::WRITE).await.unwrap();
        write(&volume, &file, 0, &[5; 512]).await;
        volume.close(file).await.unwrap();
        assert_eq!((device.peek(0, 512), other.peek(0, 512)), (vec![5; 512], vec![0; 512]));
        paths.seen.borrow_mut().remove("/dev/sdq");
        assert_eq!(volume.open(object, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::NotFound);
        assert!(rdm::info(&volume, volume.root(), b"raw.vmdk").await.unwrap().found.is_err());
        // Nobody has the lock of what could not be opened.
        assert!(volume.why_locked(object).await.unwrap().holders.is_empty());
        paths.seen.borrow_mut().insert("/dev/sdb".to_owned(), device.clone());
        device.resize(4 * MIB);
        let error = volume.open(object, OpenMode::READ).await.unwrap_err();
        assert!(error.to_string().contains("was cut"), "{error}");
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn the_data_of_a_physical_mapping_is_refused_and_its_lock_is_had_also_without_the_device() {
    let (sim, disks) = world(4, 1, CellSize::B512);
    let device = raw("naa.5");
    sim.block_on(async {
        let (one, _) = mount(&sim, &disks, 1).await;
        let (two, _) = mount(&sim, &disks, 2).await;
        show(&sim, &one, 1, &[("/dev/sda", &device)]);
        rdm::create(&one, one.root(), b"raw.vmdk", "/dev/sda", spec(true)).await.unwrap();
        let object = mapping(&one, "raw-rdmp.vmdk").await;
        let file = two.open(object, OpenMode::WRITE).await.unwrap();
        assert_eq!(one.open(object, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
        let read = two.files().read(&file, 0, 512).await.unwrap_err();
        assert!(read.kind() == FsErrorKind::Unsupported && read.to_string().contains("--virtual"), "{read}");
        assert_eq!(two.files().write(&file, 0, &[1; 512]).await.unwrap_err().kind(), FsErrorKind::Unsupported);
        two.flush(&file).await.unwrap();
        two.close(file).await.unwrap();
        assert_eq!(device.peek(0, 512), [0; 512]);
        let info = disk::info(&one, one.root(), b"raw.vmdk").await.unwrap();
        assert_eq!(info.descriptor.create_type, "vmfsPassthroughRawDeviceMap");
        let grown = disk::extend(&one, one.root(), b"raw.vmdk", 16 * MIB, &mut |_| {}).await.unwrap_err();
        assert!(grown.to_string().contains("raw device"), "{grown}");
        one.unmount().await.unwrap();
        two.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn a_lun_of_a_volume_and_one_that_says_nothing_of_itself_are_not_mapped_and_nothing_is_left() {
    let (sim, disks) = world(5, 1, CellSize::B512);
    let other = MemoryDisk::new("naa.6", 64 << 20, Some(CellSize::B512));
    sim.block_on(format_disks(&sim, std::slice::from_ref(&other), options(CellSize::B512))).unwrap();
    let nameless = raw("");
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        show(&sim, &volume, 1, &[("/own", &disks[0]), ("/other", &other), ("/nameless", &nameless)]);
        for (path, why) in [("/own", "this very volume"), ("/other", "it is extent"), ("/nameless", "who it is")] {
            let error = rdm::create(&volume, volume.root(), b"raw.vmdk", path, spec(false)).await.unwrap_err();
            assert!(error.kind() == FsErrorKind::Invalid && error.to_string().contains(why), "{error}");
        }
        assert!(list(&volume, volume.root(), 10).await.is_empty());
        volume.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn when_the_lease_runs_out_no_thread_writes_to_the_device_any_more() {
    let (sim, disks) = world(6, 1, CellSize::B512);
    let device = raw("naa.7");
    sim.block_on(async {
        let (volume, _) = mount(&sim, &disks, 1).await;
        show(&sim, &volume, 1, &[("/dev/sda", &device)]);
        rdm::create(&volume, volume.root(), b"raw.vmdk", "/dev/sda", spec(false)).await.unwrap();
        let object = mapping(&volume, "raw-rdm.vmdk").await;
        let file = volume.open(object, OpenMode::WRITE).await.unwrap();
        let late = sim.env(HostNo(1)).now().after(Duration::from_secs(19));
        let mut mover = Mover::new(volume.files().data_luns(), 64 << 10, Box::new(move || late));
        let moved = mover.write(&file, 0, &[3; 4096]);
        assert!(matches!(moved.stop, Some(Stop::Gate(GateState::Frozen))), "{:?}", moved.stop);
        assert_eq!(device.peek(0, 4096), [0; 4096]);
        volume.close(file).await.unwrap();
        volume.unmount().await.unwrap();
    });
    sim.end();
}
