//! Promises of a disk on a file, and of opening one.

use std::fs;
use std::future::Future;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{DiskSource, OpenError, Storage};

const LENGTH: usize = 1 << 20;

/// For disks that nobody has to be told of.
struct Nobody;

impl crate::Supervisor for Nobody {
    fn freeze(&self, _: &Path) {}
    fn thaw(&self, _: &Path) {}
    fn lost(&self, _: &Path, _: &str) {}
    fn is_ending(&self) -> bool {
        false
    }
}

/// A folder with an image of 1 MiB.
fn image() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(LENGTH as u64).unwrap();
    (folder, path)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio_uring::start(future)
}

async fn open(source: DiskSource) -> Result<Storage, OpenError> {
    crate::open(source, std::sync::Arc::new(Nobody)).await
}

fn source(path: &Path) -> DiskSource {
    DiskSource { path: path.to_owned(), read_only: false, cached: false, serial: None }
}

/// A buffer that starts `skew` bytes off every alignment.
fn skewed(bytes: &[u8], skew: usize) -> DataBuffer {
    let buffer = DataBuffer::zeroed(bytes.len() + skew, 4096);
    buffer.copy_from(skew, bytes);
    buffer.slice(skew..skew + bytes.len())
}

#[test]
fn what_was_written_is_read_back_whatever_the_alignment_of_the_memory() {
    let (_folder, path) = image();
    run(async {
        let disk = FileDisk::open(&path, false, false).unwrap();
        for (round, skew) in [0, 1, 16, 512].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..3 * 512).map(|index| (index * 7 + round) as u8).collect();
            disk.write(512, &skewed(&bytes, skew), round % 2 == 0).await.unwrap();
            let back = skewed(&[0; 3 * 512], skew);
            disk.read(512, &back).await.unwrap();
            assert!(back.to_vec() == bytes, "skew {skew}");
        }
        disk.flush().await.unwrap();
    });
    assert_eq!(fs::read(&path).unwrap()[..512], [0; 512]);
}

#[test]
fn unmapped_and_zeroed_ranges_read_as_zeros_and_give_their_space_back() {
    let (_folder, path) = image();
    run(async {
        let disk = FileDisk::open(&path, false, false).unwrap();
        assert!(disk.geometry().thin, "the file system of the temporary folder makes no holes");
        disk.write(0, &DataBuffer::from_bytes(&[7; LENGTH]), false).await.unwrap();
        let range = |start, length| ByteRange { start, length };
        disk.unmap(&[range(65536, 65536), range(131072, 4096)]).await.unwrap();
        disk.write_zeroes(range(512, 512), false).await.unwrap();
        disk.write_zeroes(range(262144, 65536), true).await.unwrap();
        let status = disk.block_status(range(65536, 1 << 19)).await.unwrap();
        assert_eq!(status, BlockStatus { length: 65536 + 4096, provisioning: Provisioning::Deallocated });
        let status = disk.block_status(range(135168, 1 << 19)).await.unwrap();
        assert_eq!(status, BlockStatus { length: 262144 - 135168, provisioning: Provisioning::Mapped });
    });
    let bytes = fs::read(&path).unwrap();
    let zeros: Vec<usize> = (0..LENGTH).step_by(512).filter(|&at| bytes[at..at + 512] == [0; 512]).collect();
    assert_eq!(zeros.len(), 1 + 128 + 8 + 128);
}

#[test]
fn nothing_outside_the_disk_is_touched() {
    let (_folder, path) = image();
    fs::write(&path, vec![1; 2048 + 100]).unwrap();
    run(async {
        let disk = FileDisk::open(&path, false, false).unwrap();
        assert_eq!((disk.geometry().blocks, disk.hidden_bytes()), (4, 100));
        let buffer = DataBuffer::zeroed(1024, 512);
        for position in [1536, 2048, u64::MAX - 511] {
            let refused = Err(StorageError::OutOfRange { start: position, length: 1024 });
            assert_eq!(disk.read(position, &buffer).await, refused);
            assert_eq!(disk.write(position, &buffer, false).await, refused);
        }
        let range = ByteRange { start: 2048, length: 512 };
        assert!(matches!(disk.write_zeroes(range, false).await, Err(StorageError::OutOfRange { .. })));
    });
    assert_eq!(fs::read(&path).unwrap(), vec![1; 2148]);
}

#[test]
fn a_read_only_disk_refuses_writes_before_they_reach_the_file() {
    let (_folder, path) = image();
    run(async {
        let disk = FileDisk::open(&path, true, false).unwrap();
        let refused = Err(StorageError::WriteProtected);
        assert_eq!(disk.write(0, &DataBuffer::zeroed(512, 512), false).await, refused);
        assert_eq!(disk.write_zeroes(ByteRange { start: 0, length: 512 }, true).await, refused);
        assert!(disk.geometry().read_only && !disk.geometry().thin);
    });
}

#[test]
fn a_file_that_shrank_is_a_medium_error_and_not_a_panic() {
    let (_folder, path) = image();
    run(async {
        let disk = FileDisk::open(&path, false, false).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let error = disk.read(8192, &DataBuffer::zeroed(512, 512)).await;
        assert_eq!(error, Err(StorageError::Medium { position: 8192, errno: 0 }));
    });
}

#[test]
fn one_writer_keeps_everybody_else_out() {
    let (_folder, path) = image();
    run(async {
        let reader = FileDisk::open(&path, true, false).unwrap();
        assert!(FileDisk::open(&path, true, false).is_ok());
        assert!(matches!(FileDisk::open(&path, false, false), Err(OpenError::InUse { .. })));
        drop(reader);
        let _writer = FileDisk::open(&path, false, false).unwrap();
        assert!(matches!(FileDisk::open(&path, true, false), Err(OpenError::InUse { .. })));
        let error = FileDisk::open(&path, false, false).err().unwrap().to_string();
        assert!(error.contains("disk.img is in use by another process; stop"), "{error}");
    });
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let (folder, path) = image();
    run(async {
        assert!(matches!(FileDisk::open(folder.path(), true, false), Err(OpenError::NotADisk { .. })));
        let pipe = folder.path().join("pipe.vmdk");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(matches!(FileDisk::open(&pipe, true, false), Err(OpenError::NotADisk { .. })));
        assert!(matches!(open(source(&pipe)).await, Err(OpenError::NotADisk { .. })));
        File::create(&path).unwrap();
        assert!(matches!(FileDisk::open(&path, false, false), Err(OpenError::Empty { length: 0, .. })));
        let absent = open(source(&folder.path().join("absent"))).await.err().unwrap().to_string();
        assert!(absent.starts_with("cannot find ") && absent.contains("absent"), "{absent}");
    });
}

#[test]
fn a_descriptor_leads_to_its_flat_file() {
    let (folder, path) = image();
    let flat = folder.path().join("vm-flat.vmdk");
    fs::rename(&path, &flat).unwrap();
    let descriptor = folder.path().join("vm.vmdk");
    let text = |sectors: u64, kind: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\
             RW {sectors} {kind} \"vm-flat.vmdk\"\nddb.uuid = \"60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27\"\n"
        )
    };
    run(async {
        fs::write(&descriptor, text(1024, "VMFS")).unwrap();
        let Storage::File(disk) = open(source(&descriptor)).await.unwrap() else { panic!("it is on no volume") };
        assert_eq!((disk.geometry().blocks, &disk.identity().serial[..8]), (1024, "6000c293"));
        assert_eq!(disk.hidden_bytes(), LENGTH as u64 / 2);
        drop(disk);
        let named = DiskSource { serial: Some("S1".into()), ..source(&flat) };
        let storage = open(named).await.unwrap();
        assert_eq!((storage.geometry().blocks, storage.identity().serial.as_str()), (2048, "S1"));
        drop(storage);

        fs::write(&descriptor, text(4096, "VMFS")).unwrap();
        let short = open(source(&descriptor)).await.err().unwrap();
        assert!(matches!(short, OpenError::Short { length, expected: 2097152, .. } if length == LENGTH as u64));
        fs::write(&descriptor, text(1024, "SPARSE")).unwrap();
        assert!(matches!(open(source(&descriptor)).await, Err(OpenError::Kind { .. })));
        fs::write(&descriptor, b"\x00\xFF\x80 nonsense").unwrap();
        assert!(matches!(open(source(&descriptor)).await, Err(OpenError::Descriptor { .. })));
    });
}

#[test]
fn many_operations_in_flight_end_each_with_its_own_result() {
    let (_folder, path) = image();
    run(async {
        let disk = std::rc::Rc::new(FileDisk::open(&path, false, false).unwrap());
        let tasks: Vec<_> = (0..512u64)
            .map(|number| {
                let disk = disk.clone();
                tokio_uring::spawn(async move {
                    let buffer = skewed(&[number as u8; 1024], if number % 3 == 0 { 8 } else { 0 });
                    disk.write(number * 1024, &buffer, number % 64 == 0).await.unwrap();
                    let back = DataBuffer::zeroed(1024, 4096);
                    disk.read(number * 1024, &back).await.unwrap();
                    assert_eq!(back.to_vec(), [number as u8; 1024]);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[derive(Clone, Debug)]
enum Operation {
    Write(u8, bool),
    Read,
    Unmap,
    Zero(bool),
}

fn operation() -> impl Strategy<Value = (Operation, usize, usize, usize)> {
    let kind = prop_oneof![
        (any::<u8>(), any::<bool>()).prop_map(|(byte, durable)| Operation::Write(byte, durable)),
        Just(Operation::Read),
        Just(Operation::Unmap),
        any::<bool>().prop_map(Operation::Zero),
    ];
    (kind, 0usize..120, 1usize..9, 0usize..3)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_gives_the_bytes_of_a_model(
        operations in prop::collection::vec(operation(), 1..40),
        cached: bool,
    ) {
        let (_folder, path) = image();
        let mut model = vec![0u8; LENGTH];
        run(async {
            let disk = FileDisk::open(&path, false, cached).unwrap();
            for (kind, block, blocks, skew) in operations {
                let bytes = block * 512..(block + blocks) * 512;
                let range = ByteRange { start: bytes.start as u64, length: bytes.len() as u64 };
                match kind {
                    Operation::Write(byte, durable) => {
                        disk.write(range.start, &skewed(&vec![byte; bytes.len()], skew * 24), durable).await.unwrap();
                        model[bytes].fill(byte);
                    }
                    Operation::Read => {
                        let back = skewed(&vec![0xEE; bytes.len()], skew * 24);
                        disk.read(range.start, &back).await.unwrap();
                        assert!(back.to_vec() == model[bytes]);
                    }
                    Operation::Unmap => {
                        disk.unmap(&[range]).await.unwrap();
                        model[bytes].fill(0);
                    }
                    Operation::Zero(may_unmap) => {
                        disk.write_zeroes(range, may_unmap).await.unwrap();
                        model[bytes].fill(0);
                    }
                }
            }
        });
        prop_assert!(fs::read(&path).unwrap() == model);
    }
}
