//! Promises of file data between writers, hosts and crashes.

mod data_world;
mod scale;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use data_world::{Host, World};
use vmfs_core::env::Instant;
use vmfs_core::error::FsErrorKind;
use vmfs_core::file::{OpenFile, OpenMode, ReadSegment, Stop};
use vmfs_core::format::body::{Content, DiskFormat};
use vmfs_core::format::root_cell::{ObjectFlags, ObjectType};
use vmfs_core::gate::GateState;
use vmfs_core::object::Object;
use vmfs_core::sim::{Command, FaultRates, HostNo, Rng};
use vmfs_core::units::{CellSize, LunIndex};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

async fn write_all(host: &Host, file: &OpenFile, offset: u64, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        done += host.write(&mut host.mover(), file, offset + done as u64, &bytes[done..]).await.unwrap();
    }
}

async fn written_file(host: &Host, name: &str, bytes: &[u8]) -> (Rc<Object>, Arc<OpenFile>) {
    let object = host.create(name).await;
    let file = host.open(&object, OpenMode::WRITE).await.unwrap();
    write_all(host, &file, 0, bytes).await;
    (object, file)
}

async fn disk(host: &Host, format: DiskFormat, size: u64, flags: ObjectFlags) -> Rc<Object> {
    host.create_object("d", ObjectType::Disk, Some(format), size, flags).await
}

#[test]
fn two_writers_of_one_unwritten_granule_both_keep_their_bytes() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, MIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (_, file) = written_file(&host, "f", &[1; 8192]).await;
        host.files.set_size(&file, 4 * MIB).await.unwrap();
        for granule in 2..20u64 {
            let at = granule * 64 * KIB;
            let writes = (0..16u64).map(|n| {
                let (host, file) = (&host, &file);
                async move { host.files.write(file, at + n * 4096, &[n as u8 + 1; 4096]).await.unwrap() }
            });
            futures_util::future::join_all(writes).await;
            let found = host.files.read(&file, at, 64 << 10).await.unwrap();
            for n in 0..16 {
                assert!(found[n * 4096..(n + 1) * 4096].iter().all(|byte| *byte == n as u8 + 1), "piece {n}");
            }
        }
    });
}

#[test]
fn the_first_small_write_of_a_hole_writes_one_granule() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, MIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let object = disk(&host, DiskFormat::Thin, 64 * MIB, ObjectFlags::empty()).await;
        let file = host.open(&object, OpenMode::WRITE).await.unwrap();
        world.disks[0].start_recording();
        write_all(&host, &file, 5 * MIB + 4096, &[7; 4096]).await;
        let data: u64 = world.disks[0]
            .take_records()
            .iter()
            .filter(|record| record.length > 4096 && record.command == Command::DataWrite)
            .map(|record| record.length)
            .sum();
        assert_eq!(data, 64 * KIB);
        host.files.flush(&file).await.unwrap();
        assert_eq!(host.files.seek_data(&file, 0).await.unwrap(), Some(5 * MIB));
        assert_eq!(host.files.seek_hole(&file, 5 * MIB).await.unwrap(), Some(5 * MIB + 64 * KIB));
    });
}

#[test]
fn a_flush_after_an_overwrite_in_place_changes_no_metadata_and_an_open_is_one_compare_and_write() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, MIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (object, file) = written_file(&host, "f", &vec![1; 3 << 20]).await;
        host.files.close(file).await.unwrap();
        world.disks[0].start_recording();
        let changes = |records: Vec<vmfs_core::sim::Record>| {
            records.into_iter().filter(|record| matches!(record.command, Command::CompareAndWrite { .. })).count()
        };
        let file = host.open(&object, OpenMode::WRITE).await.unwrap();
        assert_eq!(changes(world.disks[0].take_records()), 1);
        write_all(&host, &file, 4096, &[2; 8192]).await;
        host.files.flush(&file).await.unwrap();
        let records = world.disks[0].take_records();
        assert!(records.iter().any(|record| record.command == Command::Flush));
        assert_eq!(changes(records), 0);
        // The time of the last write is committed at close, and the lock released.
        host.files.close(file).await.unwrap();
        assert!(object.image().body.attributes.modified_ns > 0 || host.env.wall_ns() == 0);
        assert!(!object.is_held());
    });
}

#[test]
fn a_discard_between_fill_and_publish_cancels_the_publish_and_frees_the_block() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, 64 * KIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (object, file) = written_file(&host, "f", &vec![1; 256 << 10]).await;
        host.files.punch(&file, 64 * KIB..192 * KIB).await.unwrap();
        host.files.flush(&file).await.unwrap();
        assert_eq!(host.files.seek_hole(&file, 0).await.unwrap(), Some(64 * KIB));
        assert_eq!(host.files.seek_data(&file, 64 * KIB).await.unwrap(), Some(192 * KIB));
        host.files.close(file).await.unwrap();
        assert_eq!(object.image().body.attributes.blocks, 2);
        let owned: Vec<u32> = world.owned_blocks().values().map(|(_, index, _)| *index).collect();
        assert_eq!(owned.len(), 2, "{owned:?}");
    });
}

#[test]
fn a_full_volume_reports_what_was_written_and_loses_nothing() {
    let world = World::new(3, 1, 64 * MIB, CellSize::B4096, 64 * KIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (kept_object, kept) = written_file(&host, "kept", &vec![9; 300 << 10]).await;
        let object = host.create("big").await;
        let file = host.open(&object, OpenMode::WRITE).await.unwrap();
        let mut mover = host.mover();
        let mut at = 0u64;
        let error = loop {
            match host.write(&mut mover, &file, at, &vec![(at / MIB) as u8 | 1; 1 << 20]).await {
                Ok(count) => at += count as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), FsErrorKind::NoSpace, "{error}");
        assert!(at > 55 * MIB && at.is_multiple_of(64 * KIB), "{at}");
        assert_eq!(file.size(), at);
        // What is there can be overwritten, flushed, and read.
        write_all(&host, &file, MIB, &[0xee; 4096]).await;
        host.files.flush(&file).await.unwrap();
        let found = host.files.read(&file, at - 64 * KIB, 64 << 10).await.unwrap();
        assert!(found.iter().all(|byte| *byte == ((at - 1) / MIB) as u8 | 1));
        // Removing works on a full volume, and gives everything back.
        host.files.set_size(&file, 64 * KIB).await.unwrap();
        write_all(&host, &file, 64 * KIB, &vec![3; 1 << 20]).await;
        host.files.close(file).await.unwrap();
        host.objects.begin_unlink(&object, None).await.unwrap();
        host.objects.mark_unlinked(&object).await.unwrap();
        host.files.erase(&object).await.unwrap();
        host.objects.free(&object).await.unwrap();
        host.files.close(kept).await.unwrap();
        assert_eq!(world.owned_blocks().values().filter(|(fd, ..)| *fd != kept_object.fd.get()).count(), 0);
        let kept = host.open(&kept_object, OpenMode::READ).await.unwrap();
        assert!(host.files.read(&kept, 0, MIB as usize).await.unwrap().iter().all(|byte| *byte == 9));
    });
}

#[test]
fn a_disk_has_one_writer_or_many_readers_on_one_host_and_among_hosts() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, MIB);
    world.sim.block_on(async {
        let (a, b) = (world.mount(1).await, world.mount(2).await);
        let object = disk(&a, DiskFormat::Thin, 8 * MIB, ObjectFlags::empty()).await;
        let other = b.load(object.fd).await;
        let writer = a.open(&object, OpenMode::WRITE).await.unwrap();
        for (host, object) in [(&a, &object), (&b, &other)] {
            for mode in [OpenMode::READ, OpenMode::WRITE] {
                let error = host.open(object, mode).await.unwrap_err();
                assert_eq!(error.kind(), FsErrorKind::Busy, "{error}");
            }
        }
        write_all(&a, &writer, 0, &[5; 4096]).await;
        a.files.close(writer).await.unwrap();
        let readers = [a.open(&object, OpenMode::READ).await.unwrap(), a.open(&object, OpenMode::READ).await.unwrap()];
        let remote = b.open(&other, OpenMode::READ).await.unwrap();
        assert_eq!(b.files.read(&remote, 0, 4096).await.unwrap(), [5; 4096]);
        assert_eq!(a.open(&object, OpenMode::WRITE).await.unwrap_err().kind(), FsErrorKind::Busy);
        b.files.close(remote).await.unwrap();
        for reader in readers {
            a.files.close(reader).await.unwrap();
        }
        let writer = b.open(&other, OpenMode::WRITE).await.unwrap();
        assert_eq!(b.files.set_size(&writer, MIB).await.unwrap_err().kind(), FsErrorKind::NotPermitted);
        b.files.close(writer).await.unwrap();
    });
}

#[test]
fn a_multi_writer_disk_takes_writes_of_several_hosts_and_no_discard() {
    let world = World::new(3, 1, 128 * MIB, CellSize::B512, 64 * KIB);
    world.sim.block_on(async {
        let (a, b) = (world.mount(1).await, world.mount(2).await);
        let object = disk(&a, DiskFormat::EagerZeroedThick, MIB, ObjectFlags::MULTI_WRITER).await;
        let first = a.open(&object, OpenMode::WRITE).await.unwrap();
        a.files.allocate_range(&first, 0..MIB, false).await.unwrap();
        a.files.write(&first, 0, &vec![0; MIB as usize]).await.unwrap();
        a.files.flush(&first).await.unwrap();
        let second = b.open(&b.load(object.fd).await, OpenMode::WRITE).await.unwrap();
        write_all(&b, &second, 4096, &[2; 4096]).await;
        write_all(&a, &first, 8192, &[1; 4096]).await;
        assert_eq!(a.files.read(&first, 4096, 4096).await.unwrap(), [2; 4096]);
        assert_eq!(b.files.read(&second, 8192, 4096).await.unwrap(), [1; 4096]);
        assert_eq!(a.files.punch(&first, 0..MIB).await.unwrap_err().kind(), FsErrorKind::Unsupported);
        a.files.close(first).await.unwrap();
        b.files.close(second).await.unwrap();
    });
}

#[test]
fn disks_of_62_tebibytes_and_more_are_written_at_any_place_and_freed_whole() {
    for (cell_size, block, size) in
        [(CellSize::B512, MIB, 62 * TIB), (CellSize::B512, 64 * KIB, 62 * TIB), (CellSize::B4096, 64 * KIB, 250 * TIB)]
    {
        let world = World::new(3, 1, 256 * MIB, cell_size, block);
        world.sim.block_on(async {
            let host = world.mount(1).await;
            let object = disk(&host, DiskFormat::Thin, size, ObjectFlags::empty()).await;
            let places = [0, 512, 3 * TIB + 4096, size / 2 - 4096, size - 8192];
            let file = host.open(&object, OpenMode::WRITE).await.unwrap();
            for (n, place) in places.iter().enumerate() {
                write_all(&host, &file, *place, &[n as u8 + 1; 512]).await;
                if n % 2 == 1 {
                    host.files.flush(&file).await.unwrap();
                }
            }
            host.files.close(file).await.unwrap();
            let fd = object.fd;
            drop(object);
            host.unmount().await;
            let host = world.mount(1).await;
            let object = host.load(fd).await;
            let file = host.open(&object, OpenMode::READ).await.unwrap();
            for (n, place) in places.iter().enumerate() {
                assert_eq!(host.files.read(&file, *place, 512).await.unwrap(), [n as u8 + 1; 512], "at {place}");
            }
            assert_eq!(host.files.read(&file, TIB, 4096).await.unwrap(), [0; 4096]);
            let granule = block / 16;
            assert_eq!(host.files.seek_data(&file, MIB).await.unwrap(), Some((3 * TIB + 4096) / granule * granule));
            host.files.close(file).await.unwrap();
            host.objects.begin_unlink(&object, None).await.unwrap();
            host.objects.mark_unlinked(&object).await.unwrap();
            host.files.erase(&object).await.unwrap();
            host.objects.free(&object).await.unwrap();
            assert!(world.owned_blocks().is_empty());
            host.unmount().await;
        });
    }
}

#[test]
fn a_reader_without_a_lock_never_sees_bytes_of_another_file() {
    for seed in scale::seeds(0, 12) {
        let world = World::new(seed, 1, 64 * MIB, CellSize::B512, 64 * KIB);
        let sim = world.sim.clone();
        sim.block_on(async {
            let writer = world.mount_slow(1).await;
            let reader = world.mount_slow(2).await;
            let object = writer.create("f").await;
            let other = writer.create("g").await;
            let fd = object.fd;
            let done = Rc::new(std::cell::Cell::new(false));
            let writes = async {
                for round in 0..25u64 {
                    let f = writer.open(&object, OpenMode::WRITE).await.unwrap();
                    let length = 64 * KIB * (1 + round % 5);
                    write_all(&writer, &f, 0, &vec![0x11; length as usize]).await;
                    writer.files.flush(&f).await.unwrap();
                    writer.files.set_size(&f, if round % 3 == 0 { 0 } else { 40 * KIB }).await.unwrap();
                    writer.files.close(f).await.unwrap();
                    let g = writer.open(&other, OpenMode::WRITE).await.unwrap();
                    write_all(&writer, &g, 0, &vec![0x22; length as usize]).await;
                    writer.files.flush(&g).await.unwrap();
                    writer.files.set_size(&g, 0).await.unwrap();
                    writer.files.close(g).await.unwrap();
                }
                done.set(true);
            };
            let reads = async {
                let mut seen = 0;
                let object = reader.load(fd).await;
                let file = reader.open(&object, OpenMode::READ).await.unwrap();
                while !done.get() {
                    match reader.files.read(&file, 0, 320 << 10).await {
                        Ok(bytes) => {
                            assert!(bytes.iter().all(|byte| *byte == 0x11 || *byte == 0), "seed {seed}");
                            seen += bytes.len();
                        }
                        Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "seed {seed}: {error}"),
                    }
                }
                assert!(seen > 0, "seed {seed}");
            };
            futures_util::join!(writes, reads);
        });
    }
}

#[test]
fn after_a_crash_what_was_flushed_is_there_and_no_bytes_of_another_file() {
    for seed in scale::seeds(0, 40) {
        let world = World::new(seed, 2, 64 * MIB, CellSize::B512, 64 * KIB);
        let sim = world.sim.clone();
        let mut rng = Rng::new(seed ^ 0xc0ffee);
        sim.block_on(async {
            let host = world.mount(1).await;
            // Blocks that held another file's bytes are free now.
            let (old, file) = written_file(&host, "old", &vec![0xee; 20 << 20]).await;
            host.files.set_size(&file, 0).await.unwrap();
            host.files.close(file).await.unwrap();
            drop(old);
            let object = host.create("f").await;
            let file = host.open(&object, OpenMode::WRITE).await.unwrap();
            let mut flushed = data_world::Model::default();
            let mut now = data_world::Model::default();
            let mut allowed: Vec<(u64, u64, u8)> = Vec::new();
            for step in 0..rng.between(1, 40) {
                let (offset, length) = (rng.below(600 * KIB), rng.between(1, 150 * KIB));
                let value = 1 + (step % 200) as u8;
                write_all(&host, &file, offset, &vec![value; length as usize]).await;
                now.write(offset, &vec![value; length as usize]);
                allowed.push((offset, offset + length, value));
                if rng.chance(250) {
                    host.files.flush(&file).await.unwrap();
                    (flushed, allowed) = (now.clone(), Vec::new());
                }
            }
            // The host and the storage's cache die together.
            std::mem::forget(file);
            drop(host);
            world.disks.iter().for_each(|disk| disk.lose_power(&world.sim));
            let second = world.mount(2).await;
            let object = second.load(object.fd).await;
            let file = second.open(&object, OpenMode::READ).await.unwrap();
            let found = second.files.read(&file, 0, MIB as usize).await.unwrap();
            let durable = flushed.read(0, MIB as usize);
            assert!(found.len() >= durable.len(), "seed {seed}: {} of {} bytes", found.len(), durable.len());
            for (at, byte) in found.iter().enumerate() {
                let before = durable.get(at).copied().unwrap_or(0);
                let later =
                    allowed.iter().any(|(from, to, value)| (*from..*to).contains(&(at as u64)) && value == byte);
                assert!(
                    *byte == before || later,
                    "seed {seed}: byte {at} is {byte:#x}, it was {before:#x} when flushed"
                );
            }
        });
    }
}

#[test]
fn a_file_grows_over_what_a_crash_left_behind_its_end_with_zeros() {
    for seed in scale::seeds(0, 20) {
        let world = World::new(seed, 1, 64 * MIB, CellSize::B512, 64 * KIB);
        world.sim.block_on(async {
            let host = world.mount(1).await;
            let (object, file) = written_file(&host, "f", &vec![1; 100 << 10]).await;
            host.files.flush(&file).await.unwrap();
            // Written in place behind the end, and its size never committed.
            write_all(&host, &file, 100 * KIB, &[0x77; 1000]).await;
            let fd = object.fd;
            std::mem::forget(file);
            drop((object, host));
            world.disks[0].lose_power(&world.sim);
            let second = world.mount(2).await;
            second.break_lock(fd).await;
            let object = second.load(fd).await;
            let file = second.open(&object, OpenMode::WRITE).await.unwrap();
            assert_eq!(file.size(), 100 * KIB);
            second.files.set_size(&file, 300 * KIB).await.unwrap();
            let found = second.files.read(&file, 100 * KIB, 200 << 10).await.unwrap();
            assert!(found.iter().all(|byte| *byte == 0), "seed {seed}");
        });
    }
}

#[test]
fn data_in_flight_is_never_taken_away_from_under_a_thread() {
    let world = World::new(3, 1, 64 * MIB, CellSize::B512, 64 * KIB);
    let sim = world.sim.clone();
    let ticking = sim.clone();
    // Threads are not part of the world: keep its time moving while the actor waits for them.
    sim.spawn(HostNo(9), async move {
        loop {
            ticking.sleep(Duration::from_millis(1)).await;
            std::thread::yield_now();
        }
    });
    sim.block_on(async {
        let host = world.mount(1).await;
        let (_, file) = written_file(&host, "f", &vec![0x11; 2 << 20]).await;
        let (_, other) = written_file(&host, "g", &[0x22; 9000]).await;
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..3u64)
            .map(|worker| {
                let (file, stop, mut mover) = (file.clone(), stop.clone(), host.mover());
                std::thread::spawn(move || {
                    let mut rng = Rng::new(worker);
                    let mut buf = vec![0; 64 << 10];
                    let mut moved = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let at = rng.below(2 * MIB / 4096) * 4096;
                        moved += mover.write(&file, at, &[0x11; 4096]).bytes;
                        let count = mover.read(&file, at, &mut buf).bytes;
                        assert!(buf[..count].iter().all(|byte| *byte == 0x11 || *byte == 0));
                    }
                    moved
                })
            })
            .collect();
        for round in 0..150u64 {
            let at = round % 7 * 256 * KIB;
            if round % 10 == 9 {
                host.files.set_size(&file, 512 * KIB).await.unwrap();
            } else {
                host.files.punch(&file, at..at + 300 * KIB).await.unwrap();
            }
            // The other file takes the blocks that were freed.
            write_all(&host, &other, 0, &vec![0x22; 512 << 10]).await;
            host.files.flush(&other).await.unwrap();
            let found = host.files.read(&other, 0, 512 << 10).await.unwrap();
            assert!(found.iter().all(|byte| *byte == 0x22), "round {round}");
            host.files.set_size(&other, 9000).await.unwrap();
            write_all(&host, &file, at, &vec![0x11; 300 << 10]).await;
        }
        stop.store(true, Ordering::Relaxed);
        let moved: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert!(moved > 0);
        assert_eq!(file.references_held(), 0);
        host.files.close(file).await.unwrap();
        host.files.close(other).await.unwrap();
    });
}

#[test]
fn a_small_file_lives_in_its_body_until_it_outgrows_it() {
    let world = World::new(3, 1, 64 * MIB, CellSize::B512, 64 * KIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (object, file) = written_file(&host, "f", &[4; 6144]).await;
        assert!(matches!(file.read_segment(0, 1), ReadSegment::Inline));
        host.files.flush(&file).await.unwrap();
        assert_eq!(object.image().body.content, Content::Inline(vec![4; 6144]));
        assert!(world.owned_blocks().is_empty());
        write_all(&host, &file, 6144, &[5]).await;
        host.files.flush(&file).await.unwrap();
        assert!(matches!(object.image().body.content, Content::Mapped(_)));
        host.files.set_size(&file, 0).await.unwrap();
        host.files.close(file).await.unwrap();
        assert_eq!(object.image().body.content, Content::Inline(Vec::new()));
        assert!(world.owned_blocks().is_empty());
    });
}

#[test]
fn a_write_that_lands_late_hits_no_other_file() {
    for seed in scale::seeds(0, 40) {
        let world = World::new(seed, 1, 64 * MIB, CellSize::B512, 64 * KIB);
        let sim = world.sim.clone();
        let mut rng = Rng::new(seed);
        sim.block_on(async {
            let host = world.mount(1).await;
            let (object, _) = written_file(&host, "f", &[1; 8000]).await;
            let (_, other) = written_file(&host, "g", &[0x22; 8000]).await;
            host.files.flush(&other).await.unwrap();
            let mut refused = 0;
            for round in 0..30u64 {
                let file = match host.open(&object, OpenMode::WRITE).await {
                    Ok(file) => file,
                    Err(error) => {
                        assert_eq!(error.kind(), FsErrorKind::Io, "seed {seed}: {error}");
                        refused += 1;
                        break;
                    }
                };
                host.set_rates(FaultRates { late: if rng.chance(300) { 400 } else { 0 }, ..FaultRates::default() });
                // Only what is written through the actor meets faults: data writes here, not the pointers after them.
                let wrote = host.files.write(&file, 0, &vec![0x11; 192 << 10]).await;
                host.set_rates(FaultRates::default());
                assert!(wrote.is_ok() || wrote.is_err_and(|e| e.kind() == FsErrorKind::Io), "seed {seed}");
                let _ = host.files.set_size(&file, 0).await;
                let closed = host.files.close(file).await;
                assert!(closed.is_ok() || closed.is_err_and(|e| e.kind() == FsErrorKind::Io), "seed {seed}");
                write_all(&host, &other, 0, &vec![0x22; 256 << 10]).await;
                host.env.sleep(Duration::from_secs(round % 3)).await;
                let found = host.files.read(&other, 0, 256 << 10).await.unwrap();
                assert!(found.iter().all(|byte| *byte == 0x22), "seed {seed} round {round}");
                host.files.set_size(&other, 8000).await.unwrap();
            }
            host.env.sleep(Duration::from_secs(10)).await;
            assert!(refused <= 1);
        });
    }
}

#[test]
fn an_erase_that_is_begun_again_touches_no_block_that_another_host_has_taken_by_then() {
    let mut begun_again = 0;
    for seed in scale::seeds(0, 20) {
        let world = World::new(seed, 1, 64 * MIB, CellSize::B512, 64 * KIB);
        world.sim.block_on(async {
            let (a, b) = (world.mount(1).await, world.mount(2).await);
            let (object, file) = written_file(&a, "f", &[1; 256 << 10]).await;
            // Each of these lies below a pointer block of its own.
            for far in 1..4 {
                write_all(&a, &file, far * 128 * MIB, &[1; 256 << 10]).await;
            }
            a.files.close(file).await.unwrap();
            let (_, other) = written_file(&b, "g", &[0x22; 64 << 10]).await;
            a.objects.mark_unlinked(&object).await.unwrap();
            let mut length = 64 << 10;
            loop {
                a.set_rates(FaultRates { not_done: 80, ..FaultRates::default() });
                let erased = a.files.erase(&object).await;
                a.set_rates(FaultRates::default());
                begun_again += u32::from(erased.is_err());
                // The other host takes everything that is free.
                loop {
                    match b.files.write(&other, length, &[0x22; 64 << 10]).await {
                        Ok(count) => length += count as u64,
                        Err(error) if error.kind() == FsErrorKind::NoSpace => break,
                        Err(error) => panic!("seed {seed}: {error}"),
                    }
                }
                if erased.is_ok() {
                    break;
                }
            }
            for at in (0..length).step_by(64 << 10) {
                let found = b.files.read(&other, at, 64 << 10).await.unwrap();
                assert!(found.iter().all(|byte| *byte == 0x22), "seed {seed}: byte {at} is not what was written");
            }
        });
    }
    assert!(begun_again > 0);
}

#[test]
fn a_closed_gate_holds_data_back_and_a_poisoned_one_refuses_it() {
    let world = World::new(3, 1, 64 * MIB, CellSize::B512, 64 * KIB);
    world.sim.block_on(async {
        let host = world.mount(1).await;
        let (_, file) = written_file(&host, "f", &vec![1; 200 << 10]).await;
        let member = host.context.member(LunIndex::new(1).unwrap()).unwrap();
        let generation = member.slot.borrow().as_ref().unwrap().slot.generation;
        let closed = |host: &Host| host.context.gate().extend(member.index, generation, Instant(1), 0);
        assert!(closed(&host));
        let mut mover = host.mover_at(Instant(5));
        assert!(matches!(mover.write(&file, 0, &[2; 4096]).stop, Some(Stop::Gate(GateState::Frozen))));
        assert!(matches!(mover.read(&file, 0, &mut [0; 4096]).stop, Some(Stop::Gate(GateState::Frozen))));
        host.env.sleep(Duration::from_secs(1)).await;
        let reopen = async {
            host.env.sleep(Duration::from_secs(3)).await;
            assert!(host.context.gate().extend(member.index, generation, Instant(u64::MAX), 0));
        };
        let (written, ()) = futures_util::join!(host.files.write(&file, 0, &[3; 4096]), reopen);
        assert_eq!(written.unwrap(), 4096);
        assert!(host.env.now() >= Instant(4_000_000_000));
        assert_eq!(host.files.read(&file, 0, 4096).await.unwrap(), [3; 4096]);
        host.context.gate().poison(member.index, generation);
        assert!(matches!(mover.write(&file, 0, &[2; 4096]).stop, Some(Stop::Gate(GateState::Poisoned))));
        let error = host.files.write(&file, 0, &[4; 4096]).await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Fenced);
        assert_eq!(host.files.read(&file, 0, 4096).await.unwrap_err().kind(), FsErrorKind::Fenced);
    });
}
