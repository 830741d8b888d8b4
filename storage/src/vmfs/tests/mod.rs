//! Promises of a disk on a volume: bytes, space and durability.

mod gate;
mod world;

use std::rc::Rc;

use proptest::prelude::*;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Provisioning, StorageError};

use self::world::{GRANULE, GRANULES, How, SIZE, World};
use super::VmfsDisk;

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio_uring::start(future)
}

/// A buffer of `length` bytes `byte` that starts `skew` bytes off every alignment.
fn bytes(byte: u8, length: u64, skew: usize) -> DataBuffer {
    let buffer = DataBuffer::zeroed(length as usize + skew, 4096);
    buffer.copy_from(skew, &vec![byte; length as usize]);
    buffer.slice(skew..skew + length as usize)
}

async fn read(disk: &VmfsDisk, position: u64, length: u64) -> Vec<u8> {
    let buffer = bytes(0x99, length, 0);
    disk.read(position, &buffer).await.unwrap();
    buffer.to_vec()
}

fn range(start: u64, length: u64) -> ByteRange {
    ByteRange { start, length }
}

#[test]
fn a_first_write_shows_the_guests_bytes_and_zeros_around_them_and_nothing_older() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        assert_eq!(read(&disk, 0, SIZE).await, vec![0; SIZE as usize]);
        // Begins and ends inside granules, on both LUNs.
        let (start, length) = (GRANULE / 2 + 512, 3 * GRANULE + 1024);
        disk.write(start, &bytes(7, length, 0), false).await.unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[start as usize..(start + length) as usize].fill(7);
        assert!(read(&disk, 0, SIZE).await == expected);
        assert!(world.image(false) == expected);
        assert_eq!(world.used(), 4);
    });
}

#[test]
fn what_was_written_is_read_back_whatever_the_alignment_of_the_memory() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        for (round, skew) in [0, 1, 24, 512].into_iter().enumerate() {
            let (byte, position) = (round as u8 + 1, round as u64 * 5 * GRANULE + 1536);
            disk.write(position, &bytes(byte, 6 * GRANULE, skew), false).await.unwrap();
            disk.write(position, &bytes(byte + 16, 512, skew), round % 2 == 0).await.unwrap();
            let back = bytes(0, 6 * GRANULE, skew);
            disk.read(position, &back).await.unwrap();
            let back = back.to_vec();
            assert!(back[..512] == [byte + 16; 512] && back[512..].iter().all(|&got| got == byte), "skew {skew}");
        }
    });
}

#[test]
fn requests_to_one_unwritten_granule_take_space_once_and_all_of_them_are_there() {
    run(async {
        let world = World::new();
        let disk = Rc::new(world.open(&How::default()));
        let tasks: Vec<_> = (0..32u64)
            .map(|number| {
                let disk = disk.clone();
                tokio_uring::spawn(async move {
                    disk.write(number * 512, &bytes(number as u8 + 1, 512, 0), false).await.unwrap();
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!((world.counts().allocations, world.used()), (1, 1));
        let image = world.image(false);
        assert!((0..32).all(|number| image[number * 512..][..512] == [number as u8 + 1; 512]));
    });
}

#[test]
fn a_full_volume_refuses_first_writes_and_keeps_everything_else() {
    run(async {
        let world = World::new();
        world.set_room(2);
        let disk = world.open(&How::default());
        let refused = disk.write(0, &bytes(1, 3 * GRANULE, 0), false).await;
        assert_eq!(refused, Err(StorageError::OutOfSpace { position: 2 * GRANULE }));
        disk.write(GRANULE, &bytes(2, GRANULE, 0), false).await.unwrap();
        assert_eq!(read(&disk, GRANULE, 2 * GRANULE).await, [[2; GRANULE as usize], [0; GRANULE as usize]].concat());
        disk.unmap(&[range(0, GRANULE)]).await.unwrap();
        disk.write(5 * GRANULE, &bytes(3, 512, 0), false).await.unwrap();
        assert_eq!(world.used(), 2);
    });
}

#[test]
fn a_flush_makes_first_writes_survive_a_crash() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        disk.write(0, &bytes(1, 2 * GRANULE, 0), false).await.unwrap();
        disk.flush().await.unwrap();
        disk.write(4 * GRANULE, &bytes(2, GRANULE, 0), false).await.unwrap();
        let image = world.image(true);
        assert!(image[..2 * GRANULE as usize].iter().all(|&byte| byte == 1));
    });
}

#[test]
fn a_forced_write_survives_a_crash_and_flushes_only_if_something_is_unpublished() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        disk.write(0, &bytes(1, 512, 0), true).await.unwrap();
        assert_eq!((world.image(true)[0], world.counts().flushes), (1, 1));
        disk.write(512, &bytes(2, 512, 0), true).await.unwrap();
        assert_eq!((world.image(true)[512], world.counts().flushes), (2, 1));
        // In place, but in a granule whose first write is not published yet.
        disk.write(GRANULE, &bytes(3, 512, 0), false).await.unwrap();
        disk.write(GRANULE + 512, &bytes(4, 512, 0), true).await.unwrap();
        assert_eq!((world.image(true)[GRANULE as usize + 512], world.counts().flushes), (4, 2));
    });
}

#[test]
fn space_that_could_not_be_filled_goes_back() {
    run(async {
        let world = World::new();
        let disk = world.open(&How { read_only_luns: vec![1], ..How::default() });
        let failed = disk.write(0, &bytes(1, 2 * GRANULE, 0), false).await;
        assert!(matches!(failed, Err(StorageError::Medium { position: GRANULE, .. })), "{failed:?}");
        assert_eq!((world.used(), read(&disk, 0, SIZE).await), (0, vec![0; SIZE as usize]));
        disk.write(0, &bytes(2, GRANULE, 0), false).await.unwrap();
        assert_eq!(world.used(), 1);
    });
}

#[test]
fn an_error_of_the_mount_is_told_and_the_disk_goes_on_when_it_is_over() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        world.fail(Some(libc::EIO));
        let medium = |position| Err(StorageError::Medium { position, errno: libc::EIO });
        assert_eq!(disk.read(512, &bytes(0, 512, 0)).await, medium(512));
        assert_eq!(disk.flush().await, medium(0));
        world.fail(None);
        assert_eq!(read(&disk, 512, 512).await, [0; 512]);
        world.fail(Some(libc::EIO));
        assert_eq!(disk.write(1024, &bytes(1, 512, 0), false).await, medium(1024));
        world.fail(None);
        disk.write(1024, &bytes(1, 512, 0), false).await.unwrap();
        disk.flush().await.unwrap();
        assert!(world.told().is_empty());
    });
}

#[test]
fn discards_give_whole_granules_back_and_make_the_rest_zeros() {
    run(async {
        let world = World::new();
        let disk = world.open(&How::default());
        disk.write(0, &bytes(9, SIZE, 0), false).await.unwrap();
        disk.unmap(&[range(512, 2 * GRANULE), range(8 * GRANULE, GRANULE)]).await.unwrap();
        disk.write_zeroes(range(16 * GRANULE, 2 * GRANULE), true).await.unwrap();
        disk.write_zeroes(range(20 * GRANULE, 2 * GRANULE), false).await.unwrap();
        assert_eq!(world.used(), GRANULES - 1 - 1 - 2);
        let mut expected = vec![9; SIZE as usize];
        for (start, length) in
            [(512, 2 * GRANULE), (8 * GRANULE, GRANULE), (16 * GRANULE, 2 * GRANULE), (20 * GRANULE, 2 * GRANULE)]
        {
            expected[start as usize..(start + length) as usize].fill(0);
        }
        assert!(read(&disk, 0, SIZE).await == expected && world.image(false) == expected);
        let status = |start| disk.block_status(range(start, SIZE - start));
        let expect = |length, provisioning| Ok(BlockStatus { length, provisioning });
        assert_eq!(status(0).await, expect(GRANULE, Provisioning::Mapped));
        assert_eq!(status(GRANULE).await, expect(GRANULE, Provisioning::Deallocated));
        assert_eq!(status(18 * GRANULE).await, expect(SIZE - 18 * GRANULE, Provisioning::Mapped));
        // What is free already is not asked for again.
        let punches = world.counts().punches;
        disk.unmap(&[range(GRANULE, GRANULE)]).await.unwrap();
        assert_eq!(world.counts().punches, punches);
    });
}

#[test]
fn a_thick_disk_takes_no_unmap_and_says_that_its_space_is_there() {
    run(async {
        let world = World::new();
        let disk = world.open(&How { thin: false, ..How::default() });
        assert_eq!(disk.unmap(&[range(0, GRANULE)]).await, Err(StorageError::Unsupported));
        let anchored = BlockStatus { length: SIZE, provisioning: Provisioning::Anchored };
        assert_eq!(disk.block_status(range(0, SIZE)).await, Ok(anchored));
    });
}

#[test]
fn a_disk_open_for_reading_refuses_writes_before_they_reach_anything() {
    run(async {
        let world = World::new();
        let disk = world.open(&How { read_only: true, ..How::default() });
        assert!(disk.geometry().read_only && !disk.geometry().thin);
        assert_eq!(disk.write(0, &bytes(1, 512, 0), false).await, Err(StorageError::WriteProtected));
        assert_eq!(disk.write_zeroes(range(0, 512), false).await, Err(StorageError::WriteProtected));
        assert_eq!(disk.flush().await, Ok(()));
        assert_eq!((world.counts(), read(&disk, 0, 512).await), (Default::default(), vec![0; 512]));
    });
}

#[test]
fn nothing_outside_the_disk_is_touched() {
    run(async {
        let disk = World::new().open(&How::default());
        for position in [SIZE - 512, SIZE, u64::MAX - 511] {
            let refused = Err(StorageError::OutOfRange { start: position, length: 1024 });
            assert_eq!(disk.read(position, &bytes(0, 1024, 0)).await, refused);
            assert_eq!(disk.write(position, &bytes(0, 1024, 0), false).await, refused);
            assert_eq!(disk.write_zeroes(range(position, 1024), true).await, refused);
        }
    });
}

#[test]
fn sectors_that_share_a_block_of_the_lun_are_written_side_by_side_without_loss() {
    run(async {
        let world = World::new();
        let disk = Rc::new(world.open(&How { alignment: 4096, ..How::default() }));
        assert_eq!((disk.geometry().logical_block, disk.geometry().physical_block), (512, 4096));
        let tasks: Vec<_> = (0..128u64)
            .map(|number| {
                let disk = disk.clone();
                tokio_uring::spawn(async move {
                    // Every eighth sector is written with a whole block that begins there.
                    let sectors = if number % 16 == 8 { 8 } else { u64::from(number % 16 < 8) };
                    if sectors > 0 {
                        let buffer = bytes(number as u8 + 1, sectors * 512, 0);
                        disk.write(number * 512, &buffer, number % 5 == 0).await.unwrap();
                        let back = read(&disk, number * 512, 512).await;
                        assert_eq!(back, [number as u8 + 1; 512]);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let image = world.image(false);
        for number in 0..128 {
            let writer = if number % 16 < 8 { number } else { number - number % 8 };
            assert_eq!(image[number * 512..][..512], [writer as u8 + 1; 512], "sector {number}");
        }
    });
}

#[derive(Clone, Debug)]
enum Operation {
    Write(u8, bool),
    Read,
    Unmap,
    Zero(bool),
    Flush,
}

fn operation() -> impl Strategy<Value = (Operation, u64, u64, usize)> {
    let kind = prop_oneof![
        4 => (1u8.., any::<bool>()).prop_map(|(byte, durable)| Operation::Write(byte, durable)),
        2 => Just(Operation::Read),
        2 => Just(Operation::Unmap),
        1 => any::<bool>().prop_map(Operation::Zero),
        1 => Just(Operation::Flush),
    ];
    let sectors = SIZE / 512;
    (kind, 0..sectors, prop_oneof![1..9u64, 1..200u64], 0usize..3)
        .prop_map(move |(kind, first, count, skew)| (kind, first, count.min(sectors - first), skew * 24))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_gives_the_bytes_of_a_model(
        operations in prop::collection::vec(operation(), 1..40),
        wide in any::<bool>(),
    ) {
        let world = World::new();
        let mut model = vec![0u8; SIZE as usize];
        run(async {
            let disk = world.open(&How { alignment: if wide { 4096 } else { 512 }, ..How::default() });
            for (kind, first, count, skew) in operations {
                let touched = range(first * 512, count * 512);
                let at = touched.start as usize..touched.end() as usize;
                match kind {
                    Operation::Write(byte, durable) => {
                        disk.write(touched.start, &bytes(byte, touched.length, skew), durable).await.unwrap();
                        model[at.clone()].fill(byte);
                        assert!(!durable || world.image(true)[at.clone()] == model[at]);
                    }
                    Operation::Read => {
                        let back = bytes(0x99, touched.length, skew);
                        disk.read(touched.start, &back).await.unwrap();
                        assert!(back.to_vec() == model[at]);
                    }
                    Operation::Unmap => {
                        disk.unmap(&[touched]).await.unwrap();
                        model[at].fill(0);
                    }
                    Operation::Zero(may_unmap) => {
                        disk.write_zeroes(touched, may_unmap).await.unwrap();
                        model[at].fill(0);
                    }
                    Operation::Flush => {
                        disk.flush().await.unwrap();
                        assert!(world.image(true) == model);
                    }
                }
            }
            assert!(read(&disk, 0, SIZE).await == model);
        });
        prop_assert!(world.image(false) == model);
    }

    #[test]
    fn operations_side_by_side_on_parts_of_the_disk_give_the_bytes_of_a_model(
        parts in prop::collection::vec(prop::collection::vec((operation(), any::<bool>()), 1..12), 8),
    ) {
        // Each task has every eighth sector group to itself, so that all of them meet in every granule.
        const GROUP: u64 = 4096;
        let world = World::new();
        run(async {
            let disk = Rc::new(world.open(&How::default()));
            let tasks: Vec<_> = parts
                .into_iter()
                .enumerate()
                .map(|(task, operations)| {
                    let disk = disk.clone();
                    tokio_uring::spawn(async move {
                        let mut model = std::collections::HashMap::new();
                        for ((kind, first, _, skew), forget) in operations {
                            let group = first * 512 / (8 * GROUP) * 8 + task as u64;
                            let touched = range(group * GROUP, GROUP);
                            match kind {
                                Operation::Write(byte, _) => {
                                    disk.write(touched.start, &bytes(byte, GROUP, skew), false).await.unwrap();
                                    model.insert(group, byte);
                                }
                                Operation::Read | Operation::Flush => {
                                    let back = read(&disk, touched.start, GROUP).await;
                                    let expected = model.get(&group).copied().unwrap_or(0);
                                    assert!(back.iter().all(|&byte| byte == expected), "group {group}");
                                }
                                Operation::Unmap if forget => disk.flush().await.unwrap(),
                                Operation::Unmap | Operation::Zero(_) => {
                                    disk.write_zeroes(touched, true).await.unwrap();
                                    model.insert(group, 0);
                                }
                            }
                        }
                        for (group, byte) in model {
                            let back = read(&disk, group * GROUP, GROUP).await;
                            assert!(back.iter().all(|&got| got == byte), "group {group} at the end");
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
        });
    }
}
