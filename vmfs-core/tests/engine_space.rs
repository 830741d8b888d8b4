//! Promises of the engine: space has one owner, also when hosts race and a LUN is full.

mod engine_world;
mod scale;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::alloc::units::Purpose;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::layout::{self, LunLayout};
use vmfs_core::format::root_cell::{LunSet, ObjectFlags, ObjectType};
use vmfs_core::format::table_entry::{EntryKind, TableCell, TableEntry};
use vmfs_core::format::{Cell, CellContext};
use vmfs_core::object::{Change, Committed, NewObject};
use vmfs_core::sim::{FaultRates, HostNo, MemoryDisk, PathState};
use vmfs_core::units::{BlockAddress, BlockNo, CellAddress, CellSize, FdId, LunIndex};

use engine_world::*;

/// Every data entry of the block tables, by block.
fn owners(disk: &MemoryDisk, layout: &LunLayout, context: &CellContext) -> BTreeMap<u64, (EntryKind, u64, u32)> {
    let mut all = BTreeMap::new();
    for number in 0..layout.table_cell_count() {
        let (at, first, used) = layout.table_cell(number).unwrap();
        let cell = Cell::decode(context, at, &disk.peek(at.offset, context.cell_size.bytes())).unwrap();
        let table = TableCell::decode(context.cell_size, cell.payload()).unwrap();
        for (nth, entry) in table.entries[..used].iter().enumerate() {
            if entry.kind != EntryKind::Free {
                all.insert(first.get() + nth as u64, (entry.kind, entry.fd, entry.index));
            }
        }
    }
    all
}

#[test]
fn hosts_that_allocate_at_once_never_get_one_block_twice_and_a_freed_volume_is_empty_again() {
    for seed in scale::seeds(0, 20) {
        let (sim, disks) = world(seed, 2, 64, CellSize::B512);
        sim.block_on(async {
            let mut luns = LunSet::of(lun1());
            luns.insert(LunIndex::new(2).unwrap());
            let hosts = [
                Rc::new(mount(&sim, &disks, HostNo(1), CellSize::B512).await),
                Rc::new(mount(&sim, &disks, HostNo(2), CellSize::B512).await),
            ];
            let mut tasks = Vec::new();
            for (nth, host) in hosts.iter().cloned().enumerate() {
                let fd = host.create("owner", None).await.fd;
                tasks.push(sim.spawn(HostNo(nth as u32 + 1), async move {
                    let mut mine = Vec::new();
                    let mut near = None;
                    for first in (0..60u32).step_by(6) {
                        let indexes: Vec<u32> = (first..first + 6).collect();
                        let taken = host.space.blocks.take(fd, &indexes, lun1(), &luns, near).await.unwrap();
                        near = taken.last().map(|(_, at)| *at);
                        mine.extend(taken);
                    }
                    (fd, mine)
                }));
            }
            let mut all = Vec::new();
            for task in tasks {
                all.push(task.join().await.unwrap());
            }
            let mut seen = std::collections::BTreeSet::new();
            for (_, blocks) in &all {
                assert_eq!(blocks.iter().map(|(index, _)| *index).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
                assert!(blocks.iter().all(|(_, at)| seen.insert(*at)), "seed {seed}: a block was given out twice");
            }
            let before: u64 = [1, 2].map(|n| hosts[0].space.blocks.count(LunIndex::new(n).unwrap()).free).iter().sum();
            for ((fd, blocks), host) in all.iter().zip(&hosts) {
                host.space.blocks.retire(*fd, blocks).await.unwrap();
                host.space.blocks.free_retired(*fd, blocks).await.unwrap();
            }
            let after: u64 = [1, 2].map(|n| hosts[0].space.blocks.count(LunIndex::new(n).unwrap()).free).iter().sum();
            assert!(after >= before + 60);
            for (nth, member) in hosts[0].context.members().iter().enumerate() {
                let left = owners(&disks[nth], &member.layout(), hosts[0].context.io.context());
                assert!(left.values().all(|(kind, ..)| *kind != EntryKind::Data), "seed {seed}: {left:?}");
            }
        });
    }
}

#[test]
fn a_full_lun_gives_what_it_has_then_says_so_and_still_lets_objects_go() {
    let (sim, disks) = world(5, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("big", None).await;
        let luns = LunSet::of(lun1());
        let many: Vec<u32> = (0..10_000).collect();
        let taken = a.space.blocks.take(object.fd, &many, lun1(), &luns, None).await.unwrap();
        let free = taken.len() as u32;
        assert!(free > 500 && free < 1024, "{free} of 64 MiB");
        let error = a.space.blocks.take(object.fd, &[free], lun1(), &luns, None).await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::NoSpace);
        a.objects.begin_unlink(&object, None).await.unwrap();
        a.objects.mark_unlinked(&object).await.unwrap();
        a.space.blocks.retire(object.fd, &taken).await.unwrap();
        a.space.blocks.free_retired(object.fd, &taken).await.unwrap();
        a.objects.free(&object).await.unwrap();
        a.objects.tidy().await.unwrap();
        let gone = a.objects.load(ObjectRef { fd: object.fd, link: object.image().link() }).await;
        assert_eq!(gone.unwrap_err().kind(), FsErrorKind::Stale);
        a.create("next", None).await;
    });
}

async fn take(host: &Host, fd: FdId, first: u32, count: u32) -> Result<Vec<(u32, BlockAddress)>, FsErrorKind> {
    let indexes: Vec<u32> = (first..first + count).collect();
    host.space.blocks.take(fd, &indexes, lun1(), &LunSet::of(lun1()), None).await.map_err(|error| error.kind())
}

/// Takes data blocks until there are none.
async fn fill(host: &Host, fd: FdId) -> Vec<(u32, BlockAddress)> {
    let mut all = Vec::new();
    loop {
        match take(host, fd, all.len() as u32, 16).await {
            Ok(taken) => all.extend(taken),
            Err(kind) => {
                assert_eq!(kind, FsErrorKind::NoSpace);
                return all;
            }
        }
    }
}

fn free_blocks(disk: &MemoryDisk, host: &Host) -> u64 {
    let layout = &host.context.member(lun1()).unwrap().layout();
    layout.block_count() - owners(disk, layout, host.context.io.context()).len() as u64
}

#[test]
fn blocks_that_another_host_freed_are_found_before_a_lun_is_called_full() {
    let (sim, disks) = world(20, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let (fd, mine) = (a.create("theirs", None).await.fd, b.create("mine", None).await.fd);
        let taken = fill(&a, fd).await;
        assert_eq!(take(&b, mine, 0, 1).await, Err(FsErrorKind::NoSpace));
        a.space.blocks.retire(fd, &taken).await.unwrap();
        a.space.blocks.free_retired(fd, &taken).await.unwrap();
        assert_eq!(take(&b, mine, 0, 8).await.map(|taken| taken.len()), Ok(8));
    });
}

/// A block elsewhere made the loss of another LUN reach the file, though its own had room: after a failure of its own LUN, or when this
/// host only thought that it was full.
#[test]
fn a_file_lies_on_its_own_lun_until_that_is_full_for_certain() {
    let (sim, disks) = world(21, 2, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let (fd, other) = (a.create("file", None).await.fd, b.create("other", None).await.fd);
        assert_eq!(fd.lun(), lun1());
        let lun2 = LunIndex::new(2).unwrap();
        let mut both = LunSet::of(lun1());
        both.insert(lun2);
        let luns_of = async |first: u32| {
            let indexes: Vec<u32> = (first..first + 4).collect();
            let taken = a.space.blocks.take(fd, &indexes, lun1(), &both, None).await?;
            assert_eq!(taken.iter().map(|(index, _)| *index).collect::<Vec<_>>(), indexes);
            Ok::<_, FsError>(taken.iter().map(|(_, at)| at.lun).collect::<Vec<_>>())
        };
        disks[0].set_path(HostNo(1), PathState::Cut);
        assert_eq!(luns_of(0).await.unwrap_err().kind(), FsErrorKind::Io);
        disks[0].set_path(HostNo(1), PathState::Up);
        assert_eq!(luns_of(0).await.unwrap(), [lun1(); 4]);
        let filled = fill(&b, other).await;
        assert_eq!(luns_of(10).await.unwrap(), [lun2; 4]);
        b.space.blocks.retire(other, &filled).await.unwrap();
        b.space.blocks.free_retired(other, &filled).await.unwrap();
        sim.sleep(Duration::from_secs(2)).await;
        assert_eq!(luns_of(20).await.unwrap(), [lun1(); 4]);
        // When the LUN of the neighbour is gone, the file's own may serve.
        disks[1].set_path(HostNo(1), PathState::Cut);
        let taken = a.space.blocks.take(fd, &[30], lun2, &both, None).await.unwrap();
        assert_eq!(taken[0].1.lun, lun1());
    });
}

#[test]
fn a_host_that_has_just_mounted_leaves_the_reserve_too() {
    let (sim, disks) = world(21, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let fd = a.create("file", None).await.fd;
        let taken = fill(&a, fd).await;
        let back = &taken[taken.len() - 5..];
        a.space.blocks.retire(fd, back).await.unwrap();
        a.space.blocks.free_retired(fd, back).await.unwrap();
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        fill(&b, fd).await;
        assert!(free_blocks(&disks[0], &b) >= 2);
    });
}

#[test]
fn a_host_that_mounts_a_full_volume_can_still_commit_what_frees_space() {
    let (sim, disks) = world(22, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        fill(&a, object.fd).await;
        let new = || NewObject {
            parent: a.root,
            object_type: ObjectType::File,
            flags: ObjectFlags::empty(),
            luns: LunSet::default(),
            body: body("more"),
            lock: None,
            lun: lun1(),
        };
        for _ in 0..5000 {
            match a.objects.create(new()).await {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), FsErrorKind::NoSpace);
                    break;
                }
            }
        }
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let seen = b.objects.load(object.reference()).await.unwrap();
        let body = Some((*seen.image().body).clone());
        let change = Change { body, freeing: true, ..Change::default() };
        assert!(matches!(b.objects.commit(&seen, &seen.image(), change).await.unwrap(), Committed::Done));
    });
}

#[test]
fn changes_of_one_object_on_a_full_lun_live_on_the_units_that_they_drop() {
    let (sim, disks) = world(23, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        fill(&a, object.fd).await;
        for n in 0..500 {
            a.set_size(&object, n).await.unwrap();
        }
    });
}

#[test]
fn units_and_root_cells_that_another_host_freed_are_used_again() {
    let (sim, disks) = world(24, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let owner = a.create("owner", None).await.fd;
        fill(&a, owner).await;
        let new = |root| NewObject {
            parent: root,
            object_type: ObjectType::File,
            flags: ObjectFlags::empty(),
            luns: LunSet::default(),
            body: body("more"),
            lock: None,
            lun: lun1(),
        };
        let mut made = Vec::new();
        while let Ok(object) = a.objects.create(new(a.root)).await {
            made.push(object);
        }
        while b.objects.create(new(b.root)).await.is_ok() {}
        for object in &made {
            a.objects.mark_unlinked(object).await.unwrap();
            a.objects.free(object).await.unwrap();
        }
        a.objects.tidy().await.unwrap();
        a.space.units.drain_pools().await.unwrap();
        for _ in 0..made.len() / 2 {
            b.objects.create(new(b.root)).await.unwrap();
        }
    });
}

/// Entries of all unit containers of a LUN.
fn unit_entries(disk: &MemoryDisk, host: &Host) -> Vec<TableEntry> {
    let member = host.context.member(lun1()).unwrap();
    let (layout, context) = (&member.layout(), host.context.io.context());
    let mut all = Vec::new();
    for (block, (kind, ..)) in owners(disk, layout, context) {
        if kind != EntryKind::UnitContainer {
            continue;
        }
        let start = layout.block_offset(BlockNo::new(block).unwrap()).unwrap();
        let cells = (layout.block_size.units() as usize).div_ceil(layout::entries_per_cell(context.cell_size));
        for nth in 0..cells as u64 {
            let at = CellAddress { lun: lun1(), offset: start + nth * context.cell_size.bytes() as u64 };
            let cell = Cell::decode(context, at, &disk.peek(at.offset, context.cell_size.bytes())).unwrap();
            all.extend(TableCell::decode(context.cell_size, cell.payload()).unwrap().entries);
        }
    }
    all
}

#[test]
fn a_host_that_leaves_leaves_no_unit_in_a_pool_whatever_got_lost_on_the_way() {
    for seed in scale::seeds(0, 40) {
        let (sim, disks) = world(seed, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
            let object = a.create("file", None).await;
            a.paths[0].set_rates(FaultRates { not_done: 60, command_lost: 10, ..FaultRates::default() });
            for n in 0..40 {
                let image = object.image();
                let mut body = (*image.body).clone();
                body.attributes.size = n;
                // Errors are expected here; what matters is what they leave behind.
                let _ = a.objects.commit(&object, &image, Change { body: Some(body), ..Change::default() }).await;
                if let Ok(unit) = a.objects.prepare(&object, EntryKind::Bucket, 0, b"x", Purpose::Normal).await {
                    drop(unit);
                }
                let _ = a.objects.refresh(&object).await;
            }
            a.paths[0].set_rates(FaultRates::default());
            a.objects.tidy().await.unwrap();
            a.space.units.drain_pools().await.unwrap();
            let pooled = unit_entries(&disks[0], &a).iter().filter(|e| e.kind == EntryKind::Pool).count();
            assert_eq!(pooled, 0, "seed {seed}");
        });
    }
}
