//! A program that moves a disk's data itself sees and leaves the same bytes as one that goes through the mount.

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use common::{Images, Mount, Random, wait_for};
use lockd::client::{DirectErrorKind, DirectFile, MountedDirectory, Segment, block_on};
use lockd::protocol::{AdminRequest, DiskKind};
use serde_json::Value;
use vmfs_core::buf::AlignedBuf;
use vmfs_core::gate::GateState;

fn ask(path: &Path, what: impl FnOnce(lockd::protocol::NameIn) -> AdminRequest) -> Result<Value, String> {
    let (directory, name) = MountedDirectory::of_file(path).unwrap();
    let mut connection = directory.connect().unwrap();
    connection.administer(what(name), &mut |_, _| ()).map_err(|error| error.to_string())
}

fn make_disk(mount: &Mount, name: &str, mib: u64, kind: DiskKind) {
    ask(&mount.at(name), |file| AdminRequest::DiskCreate { file, bytes: mib << 20, kind }).unwrap();
}

fn transfer(file: &DirectFile, lun: usize, offset: u64, buf: &mut [u8], write: bool) {
    assert_eq!(file.gate(lun), GateState::Open);
    let lun = file.lun(lun);
    let copy = File::from(lun.access.descriptor().unwrap().try_clone().unwrap());
    if write { copy.write_all_at(buf, offset).unwrap() } else { copy.read_exact_at(buf, offset).unwrap() }
}

/// Reads a range of whole 4 KiB pieces.
fn read(file: &DirectFile, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = AlignedBuf::zeroed(length as usize);
    let mut at = 0;
    while at < length {
        let mut first = None;
        file.resolve(offset + at, length - at, &mut |segment| {
            first.get_or_insert(segment);
        });
        at += match first.unwrap() {
            Segment::Data { lun, offset: on_lun, length, reference: _reference } => {
                let range = at as usize..(at + length) as usize;
                transfer(file, lun, on_lun, &mut bytes[range], false);
                length
            }
            Segment::Zero { length } => length,
            Segment::Unknown { .. } => {
                file.load(offset + at, length - at).unwrap();
                0
            }
        };
    }
    bytes.to_vec()
}

/// Writes whole 4 KiB pieces.
fn write(file: &DirectFile, offset: u64, from: &[u8]) {
    let mut at = 0u64;
    while at < from.len() as u64 {
        let left = from.len() as u64 - at;
        let mut first = None;
        file.resolve(offset + at, left, &mut |segment| {
            first.get_or_insert(segment);
        });
        match first.unwrap() {
            Segment::Data { lun, offset: on_lun, length, reference: _reference } => {
                let mut buf = AlignedBuf::copy_of(&from[at as usize..(at + length) as usize]);
                transfer(file, lun, on_lun, &mut buf, true);
                at += length;
            }
            Segment::Unknown { .. } => file.load(offset + at, left).unwrap(),
            Segment::Zero { length } => {
                let Some(grant) = block_on(file.allocate(offset + at, length)).unwrap() else { continue };
                let granted = grant.pieces().last().map(|piece| piece.file_offset + piece.length).unwrap();
                for piece in grant.pieces() {
                    let mut buf = AlignedBuf::zeroed(piece.length as usize);
                    let (start, end) = (
                        piece.file_offset.max(offset),
                        (piece.file_offset + piece.length).min(offset + from.len() as u64),
                    );
                    if start < end {
                        buf[(start - piece.file_offset) as usize..(end - piece.file_offset) as usize]
                            .copy_from_slice(&from[(start - offset) as usize..(end - offset) as usize]);
                    }
                    transfer(file, piece.lun, piece.offset, &mut buf, true);
                }
                grant.filled().unwrap();
                at = granted.min(offset + from.len() as u64) - offset;
            }
        }
    }
}

#[test]
fn what_a_program_writes_straight_to_the_luns_is_read_back_through_the_mount() {
    let images = Images::new(2, 512);
    let mount = images.mount(1);
    for kind in [DiskKind::Thin, DiskKind::ZeroedThick, DiskKind::EagerZeroedThick] {
        let name = format!("{kind:?}");
        make_disk(&mount, &format!("{name}.vmdk"), 32, kind);
        let flat = mount.at(&format!("{name}-flat.vmdk"));
        let mut model = vec![0u8; 32 << 20];
        let mut random = Random(3);
        let file = DirectFile::open(&flat, true).unwrap();
        assert_eq!((file.size(), file.granule_bytes(), file.block_bytes()), (32 << 20, 65536, 1 << 20));
        for step in 0..120 {
            let offset = random.below(32 << 8) * 4096;
            let length = ((random.below(64) + 1) * 4096).min((32 << 20) - offset);
            let range = offset as usize..(offset + length) as usize;
            match random.below(10) {
                0..6 => {
                    let bytes = random.bytes(length as usize);
                    write(&file, offset, &bytes);
                    model[range].copy_from_slice(&bytes);
                }
                6 if kind == DiskKind::Thin => {
                    block_on(file.punch(offset, length)).unwrap();
                    model[range].fill(0);
                }
                7 => file.flush().unwrap(),
                _ => assert!(read(&file, offset, length) == model[range], "step {step}"),
            }
        }
        file.flush().unwrap();
        assert!(read(&file, 0, 32 << 20) == model);
        drop(file);
        assert!(fs::read(&flat).unwrap() == model, "through the mount the bytes of {name} are others");
    }
    mount.unmount();
    let mount = images.mount(1);
    let first = fs::read(mount.at("Thin-flat.vmdk")).unwrap();
    assert_eq!(first.len(), 32 << 20);
    assert!(first == fs::read(mount.at("ZeroedThick-flat.vmdk")).unwrap() || first.iter().any(|byte| *byte != 0));
    mount.unmount();
}

#[test]
fn a_first_write_of_4_kib_takes_one_granule_and_a_thin_disk_little_space() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    make_disk(&mount, "thin.vmdk", 10 << 20, DiskKind::Thin);
    let flat = mount.at("thin-flat.vmdk");
    let file = DirectFile::open(&flat, true).unwrap();
    let grant = block_on(file.allocate((5 << 40) + 8192, 4096)).unwrap().unwrap();
    let pieces = grant.pieces().to_vec();
    assert_eq!((pieces.len(), pieces[0].file_offset, pieces[0].length), (1, 5 << 40, 65536));
    drop(grant);
    write(&file, (5 << 40) + 8192, &[7; 4096]);
    file.flush().unwrap();
    drop(file);
    let metadata = fs::metadata(&flat).unwrap();
    assert!(metadata.len() == 10 << 40 && metadata.blocks() * 512 <= 4 << 20, "{} blocks", metadata.blocks());
    let mut bytes = [1; 4096];
    File::open(&flat).unwrap().read_exact_at(&mut bytes, (5 << 40) + 8192).unwrap();
    assert_eq!(bytes, [7; 4096]);
    mount.unmount();
}

#[test]
fn a_disk_in_use_is_refused_with_who_has_it() {
    let images = Images::new(1, 256);
    let (one, two) = (images.mount(1), images.mount(2));
    make_disk(&one, "disk.vmdk", 16, DiskKind::Thin);
    let held = DirectFile::open(&one.at("disk-flat.vmdk"), true).unwrap();
    let error = DirectFile::open(&one.at("disk-flat.vmdk"), true).err().unwrap();
    assert_eq!(error.kind(), DirectErrorKind::Busy);
    assert!(error.to_string().contains("open"), "{error}");
    let error = DirectFile::open(&two.at("disk-flat.vmdk"), true).err().unwrap();
    assert_eq!(error.kind(), DirectErrorKind::Busy);
    assert!(error.to_string().contains("host1"), "{error}");
    let why = ask(&two.at("disk-flat.vmdk"), |file| AdminRequest::WhyLocked { file }).unwrap();
    assert!(why["explanation"].as_str().unwrap().contains("host1"), "{why}");
    drop(held);
    wait_for("the lock to go", || DirectFile::open(&two.at("disk-flat.vmdk"), true).is_ok());
    let first = DirectFile::open(&two.at("disk-flat.vmdk"), false).unwrap();
    let second = DirectFile::open(&two.at("disk-flat.vmdk"), false).unwrap();
    let third = DirectFile::open(&one.at("disk-flat.vmdk"), false).unwrap();
    assert!(DirectFile::open(&two.at("disk-flat.vmdk"), true).is_err());
    drop((first, second, third));
    one.unmount();
    two.unmount();
}

#[test]
fn files_that_are_no_disks_are_told_apart() {
    let images = Images::new(1, 256);
    let mount = images.mount(1);
    fs::write(mount.at("plain"), b"x").unwrap();
    let kind = |path: &Path| DirectFile::open(path, true).err().unwrap().kind();
    assert_eq!(kind(&mount.at("plain")), DirectErrorKind::NotDirect);
    let outside = images.folder.path().join("outside");
    fs::write(&outside, b"x").unwrap();
    assert_eq!(kind(&outside), DirectErrorKind::NotVmfs);
    mount.unmount();
}

#[test]
fn a_lock_stays_while_a_program_that_was_closed_may_have_io_in_flight() {
    let images = Images::new(1, 256);
    let (one, two) = (images.mount(1), images.mount(2));
    make_disk(&one, "disk.vmdk", 16, DiskKind::Thin);
    let file = DirectFile::open(&one.at("disk-flat.vmdk"), true).unwrap();
    // A descriptor that lives on stands for requests in flight: both pin the open file and its drain lock.
    let pinned = file.lun(0).access.descriptor().unwrap().as_fd().try_clone_to_owned().unwrap();
    drop(file);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(DirectFile::open(&two.at("disk-flat.vmdk"), true).is_err(), "the lock was released under I/O in flight");
    drop(pinned);
    wait_for("the lock to go", || DirectFile::open(&two.at("disk-flat.vmdk"), true).is_ok());
    one.unmount();
    two.unmount();
}

#[test]
fn disks_are_made_grown_copied_and_told_about_on_a_mounted_volume() {
    let images = Images::new(2, 512);
    let mount = images.mount(1);
    make_disk(&mount, "a.vmdk", 8, DiskKind::Thin);
    let bytes = Random(9).bytes(3 << 20);
    File::options().write(true).open(mount.at("a-flat.vmdk")).unwrap().write_all_at(&bytes, 1 << 20).unwrap();
    wait_for("the close", || {
        ask(&mount.at("a.vmdk"), |file| AdminRequest::DiskExtend { file, bytes: 16 << 20 }).is_ok()
    });
    let info = ask(&mount.at("a.vmdk"), |file| AdminRequest::DiskInfo { file }).unwrap();
    assert_eq!((info["size_bytes"].as_u64(), info["format"].as_str()), (Some(16 << 20), Some("thin")));
    let (directory, source) = MountedDirectory::of_file(&mount.at("a.vmdk")).unwrap();
    let destination = lockd::protocol::NameIn { directory: directory.ticket(), name: b"b.vmdk".to_vec() };
    let kind = Some(DiskKind::EagerZeroedThick);
    let mut told = 0;
    let clone = AdminRequest::DiskClone { source, destination, kind };
    directory.connect().unwrap().administer(clone, &mut |_, _| told += 1).unwrap();
    assert!(told > 0, "a copy tells how far it is");
    assert!(fs::read(mount.at("b-flat.vmdk")).unwrap()[1 << 20..4 << 20] == bytes);
    ask(&mount.at("a.vmdk"), |file| AdminRequest::DiskInflate { file }).unwrap();
    let dump = ask(&mount.at("a.vmdk"), |file| AdminRequest::Dump { file }).unwrap();
    assert!(!dump["text"].as_str().unwrap().is_empty());
    let status = ask(&mount.at("a.vmdk"), |_| AdminRequest::Status).unwrap();
    assert_eq!(status["luns"].as_array().unwrap().len(), 2);
    let error = ask(&mount.at("none.vmdk"), |file| AdminRequest::DiskInfo { file }).unwrap_err();
    assert!(error.contains("none.vmdk"), "{error}");
    drop(directory);
    mount.unmount();
}
