//! Promises of virtual disks: what each kind owns and holds, and that what is cut off or refused leaves nothing behind.

use std::rc::Rc;

use vmfs_core::disk::descriptor::{AdapterType, Descriptor};
use vmfs_core::disk::{self, DiskSpec, Progress};
use vmfs_core::error::FsErrorKind;
use vmfs_core::file::OpenMode;
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::sim::{HostNo, MemoryDisk, Sim, format_disks};
use vmfs_core::slot::HostIdentity;
use vmfs_core::units::{BlockSize, CellSize, Uuid};
use vmfs_core::volume::{MountOptions, Volume};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn world(bytes: u64) -> (Sim, MemoryDisk) {
    let sim = Sim::new(5);
    let disk = MemoryDisk::new("lun0", bytes, Some(CellSize::B512));
    let options = MkfsOptions {
        block_size: BlockSize::from_bytes(64 << 10).unwrap(),
        cell_size: Some(CellSize::B512),
        ..MkfsOptions::default()
    };
    sim.block_on(format_disks(&sim, std::slice::from_ref(&disk), options)).unwrap();
    (sim, disk)
}

async fn mount(sim: &Sim, disk: &MemoryDisk, number: u32) -> Volume {
    let lun: Rc<dyn Lun> = disk.connect(sim, HostNo(number));
    let host = HostIdentity { host: Uuid([number as u8; 16]), boot: Uuid([1; 16]), name: format!("host{number}") };
    let options = MountOptions { read_only: false, host, slot_hint: None, degraded: false };
    let volume = Volume::mount(vec![lun], options, sim.env(HostNo(number))).await.unwrap();
    let background = volume.clone();
    sim.spawn(HostNo(number), async move { background.background().await });
    volume
}

fn spec(size: u64, format: DiskFormat) -> DiskSpec {
    DiskSpec { size, format, adapter: AdapterType::LsiLogic, multi_writer: false, mode: 0o600, uid: 1, gid: 2 }
}

async fn create(volume: &Volume, name: &str, size: u64, format: DiskFormat) {
    disk::create(volume, volume.root(), name.as_bytes(), spec(size, format), &mut |_| {}).await.unwrap();
}

async fn write(volume: &Volume, flat: &str, offset: u64, bytes: &[u8]) {
    let stat = volume.lookup(volume.root(), flat.as_bytes()).await.unwrap();
    let file = volume.open(stat.object, OpenMode::WRITE).await.unwrap();
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(&file, offset + done as u64, &bytes[done..]).await.unwrap();
    }
    volume.close(file).await.unwrap();
}

async fn read(volume: &Volume, name: &str, offset: u64, length: usize) -> Vec<u8> {
    let stat = volume.lookup(volume.root(), name.as_bytes()).await.unwrap();
    let file = volume.open(stat.object, OpenMode::READ).await.unwrap();
    let bytes = volume.files().read(&file, offset, length).await.unwrap();
    volume.close(file).await.unwrap();
    bytes
}

async fn data_end(volume: &Volume, flat: &str) -> Option<u64> {
    let stat = volume.lookup(volume.root(), flat.as_bytes()).await.unwrap();
    let file = volume.open(stat.object, OpenMode::READ).await.unwrap();
    let data = volume.files().seek_data(&file, 0).await.unwrap();
    let hole = match data {
        Some(at) => volume.files().seek_hole(&file, at).await.unwrap(),
        None => None,
    };
    volume.close(file).await.unwrap();
    hole
}

#[test]
fn each_kind_of_disk_owns_and_holds_what_its_name_says() {
    let (sim, disk) = world(256 * MIB);
    sim.block_on(async {
        let volume = mount(&sim, &disk, 1).await;
        for (name, format, allocated, written) in [
            ("thin", DiskFormat::Thin, 0, None),
            ("lazy", DiskFormat::ZeroedThick, 20 * MIB, None),
            ("eager", DiskFormat::EagerZeroedThick, 20 * MIB, Some(20 * MIB)),
        ] {
            create(&volume, &format!("{name}.vmdk"), 20 * MIB, format).await;
            let info = disk::info(&volume, volume.root(), format!("{name}.vmdk").as_bytes()).await.unwrap();
            assert_eq!((info.size, info.allocated, info.format), (20 * MIB, allocated, Some(format)), "{name}");
            assert_eq!(info.flat.object_type, ObjectType::Disk);
            assert_eq!((info.flat.attributes.mode, info.flat.attributes.uid, info.flat.attributes.gid), (0o600, 1, 2));
            assert_eq!(info.descriptor.ddb_value("thinProvisioned").is_some(), format == DiskFormat::Thin);
            let flat = format!("{name}-flat.vmdk");
            assert_eq!(data_end(&volume, &flat).await, written, "{name}");
            assert_eq!(read(&volume, &flat, 3 * MIB, 9000).await, vec![0; 9000]);
            write(&volume, &flat, 3 * MIB + 512, &[7; 512]).await;
            let found = read(&volume, &flat, 3 * MIB, 2048).await;
            assert_eq!(
                (&found[..512], &found[512..1024], &found[1024..]),
                (&[0; 512][..], &[7; 512][..], &[0; 1024][..])
            );
        }
        volume.unmount().await.unwrap();
    });
}

#[test]
fn a_thick_disk_never_runs_out_of_space_and_one_that_does_not_fit_leaves_nothing() {
    let (sim, disk) = world(64 * MIB);
    sim.block_on(async {
        let volume = mount(&sim, &disk, 1).await;
        create(&volume, "thick.vmdk", 30 * MIB, DiskFormat::ZeroedThick).await;
        create(&volume, "thin.vmdk", 60 * MIB, DiskFormat::Thin).await;
        let free = volume.statfs().await.free_blocks;
        for format in [DiskFormat::ZeroedThick, DiskFormat::EagerZeroedThick] {
            let error = disk::create(&volume, volume.root(), b"big.vmdk", spec(40 * MIB, format), &mut |_| {}).await;
            assert_eq!(error.unwrap_err().kind(), FsErrorKind::NoSpace);
            for name in [&b"big.vmdk"[..], b"big-flat.vmdk"] {
                assert_eq!(volume.lookup(volume.root(), name).await.unwrap_err().kind(), FsErrorKind::NotFound);
            }
        }
        assert!(volume.statfs().await.free_blocks >= free - 2, "{} of {free}", volume.statfs().await.free_blocks);
        // The thin one eats all that is left; the thick one can still be written everywhere.
        let thin = volume.lookup(volume.root(), b"thin-flat.vmdk").await.unwrap();
        let file = volume.open(thin.object, OpenMode::WRITE).await.unwrap();
        let mut at = 0;
        while let Ok(count) = volume.files().write(&file, at, &vec![1; 256 << 10]).await {
            at += count as u64;
        }
        assert!(at < 60 * MIB);
        volume.close(file).await.unwrap();
        write(&volume, "thick-flat.vmdk", 0, &vec![2; 30 << 20]).await;
        assert_eq!(read(&volume, "thick-flat.vmdk", 30 * MIB - 100, 200).await, vec![2; 100]);
        volume.unmount().await.unwrap();
    });
}

#[test]
fn a_disk_grows_is_inflated_and_keeps_its_bytes() {
    let (sim, disk) = world(256 * MIB);
    sim.block_on(async {
        let volume = mount(&sim, &disk, 1).await;
        for (name, format) in
            [("a", DiskFormat::Thin), ("b", DiskFormat::ZeroedThick), ("c", DiskFormat::EagerZeroedThick)]
        {
            let (vmdk, flat) = (format!("{name}.vmdk"), format!("{name}-flat.vmdk"));
            create(&volume, &vmdk, 5 * MIB, format).await;
            write(&volume, &flat, 5 * MIB - 4096, &[3; 4096]).await;
            let mut told = Vec::new();
            let mut tell = |progress: Progress| told.push(progress);
            disk::extend(&volume, volume.root(), vmdk.as_bytes(), 9 * MIB, &mut tell).await.unwrap();
            assert!(told.windows(2).all(|two| two[0].done <= two[1].done));
            let info = disk::info(&volume, volume.root(), vmdk.as_bytes()).await.unwrap();
            assert_eq!((info.size, info.descriptor.disk_bytes()), (9 * MIB, Some(9 * MIB)));
            assert_eq!(info.allocated, if format == DiskFormat::Thin { 64 * KIB } else { 9 * MIB }, "{name}");
            for size in [9 * MIB, 8 * MIB, 9 * MIB + 1] {
                let refused = disk::extend(&volume, volume.root(), vmdk.as_bytes(), size, &mut |_| {}).await;
                assert_eq!(refused.unwrap_err().kind(), FsErrorKind::Invalid);
            }
            disk::inflate(&volume, volume.root(), vmdk.as_bytes(), &mut |_| {}).await.unwrap();
            let info = disk::info(&volume, volume.root(), vmdk.as_bytes()).await.unwrap();
            assert_eq!((info.format, info.allocated), (Some(DiskFormat::EagerZeroedThick), 9 * MIB));
            assert_eq!(info.descriptor.ddb_value("thinProvisioned"), None);
            assert_eq!(data_end(&volume, &flat).await, Some(9 * MIB));
            let found = read(&volume, &flat, 0, 9 << 20).await;
            let nonzero: Vec<_> = found.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(at, _)| at).collect();
            assert_eq!((nonzero.len(), nonzero[0]), (4096, (5 << 20) - 4096));
        }
        volume.unmount().await.unwrap();
    });
}

#[test]
fn a_clone_has_the_bytes_of_its_source_and_the_kind_that_was_asked_for() {
    let (sim, disk) = world(256 * MIB);
    sim.block_on(async {
        let volume = mount(&sim, &disk, 1).await;
        create(&volume, "source.vmdk", 12 * MIB, DiskFormat::Thin).await;
        for n in 0..40u64 {
            write(&volume, "source-flat.vmdk", n * 300_032, &vec![n as u8 + 1; 9 * 512]).await;
        }
        let source = read(&volume, "source-flat.vmdk", 0, 12 << 20).await;
        let root = volume.root();
        for (name, format) in
            [("thin", DiskFormat::Thin), ("lazy", DiskFormat::ZeroedThick), ("eager", DiskFormat::EagerZeroedThick)]
        {
            let vmdk = format!("{name}.vmdk");
            let to = (root, vmdk.as_bytes());
            disk::clone(&volume, (root, b"source.vmdk"), to, spec(0, format), &mut |_| {}).await.unwrap();
            assert!(read(&volume, &format!("{name}-flat.vmdk"), 0, 12 << 20).await == source, "{name}");
            let info = disk::info(&volume, root, vmdk.as_bytes()).await.unwrap();
            assert_eq!((info.size, info.format), (12 * MIB, Some(format)));
            assert!(format == DiskFormat::Thin || info.allocated == 12 * MIB);
            let again = disk::clone(&volume, (root, b"source.vmdk"), to, spec(0, format), &mut |_| {}).await;
            assert_eq!(again.unwrap_err().kind(), FsErrorKind::Exists);
        }
        let stat = volume.lookup(root, b"source-flat.vmdk").await.unwrap();
        let writer = volume.open(stat.object, OpenMode::WRITE).await.unwrap();
        let thin = spec(0, DiskFormat::Thin);
        let busy = disk::clone(&volume, (root, b"source.vmdk"), (root, b"x.vmdk"), thin, &mut |_| {}).await;
        assert_eq!(busy.unwrap_err().kind(), FsErrorKind::Busy);
        volume.close(writer).await.unwrap();
        volume.unmount().await.unwrap();
    });
}

#[test]
fn a_disk_in_use_on_another_host_is_refused_with_its_holder() {
    let (sim, disk) = world(128 * MIB);
    sim.block_on(async {
        let (a, b) = (mount(&sim, &disk, 1).await, mount(&sim, &disk, 2).await);
        create(&a, "d.vmdk", 5 * MIB, DiskFormat::Thin).await;
        let stat = a.lookup(a.root(), b"d-flat.vmdk").await.unwrap();
        let file = a.open(stat.object, OpenMode::WRITE).await.unwrap();
        let error = b.open(stat.object, OpenMode::READ).await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Busy);
        assert!(error.to_string().contains("host1"), "{error}");
        let error = disk::extend(&b, b.root(), b"d.vmdk", 9 * MIB, &mut |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Busy);
        a.close(file).await.unwrap();
        disk::extend(&b, b.root(), b"d.vmdk", 9 * MIB, &mut |_| {}).await.unwrap();
        a.unmount().await.unwrap();
        b.unmount().await.unwrap();
    });
}

#[test]
fn names_and_sizes_that_no_disk_can_have_are_refused() {
    let (sim, disk) = world(64 * MIB);
    sim.block_on(async {
        let volume = mount(&sim, &disk, 1).await;
        let root = volume.root();
        for (name, size) in [
            (&b"d"[..], MIB),
            (b".vmdk", MIB),
            (b"d-flat.vmdk", MIB),
            (b"\xff.vmdk", MIB),
            (b"d.vmdk", 0),
            (b"d.vmdk", 100),
        ] {
            let refused = disk::create(&volume, root, name, spec(size, DiskFormat::Thin), &mut |_| {}).await;
            assert_eq!(refused.unwrap_err().kind(), FsErrorKind::Invalid, "{name:?} {size}");
        }
        let refused = disk::create(&volume, root, b"d.vmdk", spec(1 << 50, DiskFormat::Thin), &mut |_| {}).await;
        assert_eq!(refused.unwrap_err().kind(), FsErrorKind::TooBig);
        let several = DiskSpec { multi_writer: true, ..spec(MIB, DiskFormat::Thin) };
        let refused = disk::create(&volume, root, b"d.vmdk", several, &mut |_| {}).await;
        assert_eq!(refused.unwrap_err().kind(), FsErrorKind::Invalid);
        create(&volume, "d.vmdk", MIB, DiskFormat::Thin).await;
        let error = disk::info(&volume, root, b"d-flat.vmdk").await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Invalid, "{error}");
        assert_eq!(volume.read_directory(root, 0, 10).await.unwrap().len(), 2);
        volume.unmount().await.unwrap();
    });
}

#[test]
fn qemu_img_reads_the_descriptor_where_it_is_installed() {
    let Ok(version) = std::process::Command::new("qemu-img").arg("--version").output() else { return };
    assert!(version.status.success());
    let directory = tempfile::tempdir().unwrap();
    let flat = std::fs::File::create(directory.path().join("d-flat.vmdk")).unwrap();
    flat.set_len(5 * MIB).unwrap();
    let text =
        Descriptor::for_disk(5 * MIB, "d-flat.vmdk", DiskFormat::Thin, AdapterType::LsiLogic, 0x1234).to_string();
    let path = directory.path().join("d.vmdk");
    std::fs::write(&path, text).unwrap();
    let output = std::process::Command::new("qemu-img").args(["info", "-f", "vmdk"]).arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("5 MiB (5242880 bytes)") && said.contains("create type: vmfs"), "{said}");
    let probed = std::process::Command::new("qemu-img").arg("info").arg(&path).output().unwrap();
    assert!(String::from_utf8_lossy(&probed.stdout).contains("file format: vmdk"));
}
