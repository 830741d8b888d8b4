//! Promises of the engine: space has one owner, a commit is atomic, a lock has one holder, also when hosts race and commands get lost.

mod scale;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::alloc::Space;
use vmfs_core::alloc::units::Purpose;
use vmfs_core::cas::CellIo;
use vmfs_core::context::{Context, Member};
use vmfs_core::env::Env;
use vmfs_core::error::FsErrorKind;
use vmfs_core::format::arena::{Arena, Place};
use vmfs_core::format::body::{Attributes, Body, Content};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::LunHeader;
use vmfs_core::format::layout::{self, LunLayout};
use vmfs_core::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectState, ObjectType};
use vmfs_core::format::table_entry::{EntryKind, TableCell, TableEntry};
use vmfs_core::format::{Cell, CellContext};
use vmfs_core::gate::GatePage;
use vmfs_core::lease;
use vmfs_core::lun::{Lun, LunErrorKind};
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::object::{Change, Committed, NewObject, Object, Objects};
use vmfs_core::sim::{Command, Fault, FaultRates, HostNo, MemoryDisk, MemoryLun, Sim, format_disks};
use vmfs_core::slot::{self, HostIdentity};
use vmfs_core::units::{BlockAddress, BlockNo, BlockSize, CellAddress, CellSize, FdId, LunIndex, Uuid};

struct Host {
    context: Rc<Context>,
    space: Rc<Space>,
    objects: Rc<Objects>,
    paths: Vec<Rc<MemoryLun>>,
    root: FdId,
}

async fn header_of(disk: &MemoryDisk, cell_size: CellSize) -> (LunHeader, CellContext) {
    let bytes = disk.peek(layout::HEADER_OFFSET, 4096);
    let (context, lun) = vmfs_core::format::cell::probe(layout::HEADER_OFFSET, &bytes).unwrap();
    let cell = Cell::decode(&context, layout::header_cell(lun), &bytes[..cell_size.bytes()]).unwrap();
    (LunHeader::decode(cell_size, cell.payload()).unwrap(), context)
}

async fn mount(sim: &Sim, disks: &[MemoryDisk], number: HostNo, cell_size: CellSize) -> Host {
    let env: Rc<dyn Env> = sim.env(number);
    let (mut members, mut paths, mut root, mut io) = (Vec::new(), Vec::new(), None, None);
    let gate = GatePage::in_process();
    for disk in disks {
        let (header, context) = header_of(disk, cell_size).await;
        let path = disk.connect(sim, number);
        path.set_latency(Duration::from_micros(50), Duration::from_millis(1));
        let lun: Rc<dyn Lun> = path.clone();
        paths.push(path);
        let cells = CellIo::new(context, env.clone());
        let layout = LunLayout {
            lun: header.lun_index,
            cell_size,
            block_size: header.block_size,
            segments: header.segments.clone(),
        };
        let identity =
            HostIdentity { host: Uuid([number.0 as u8; 16]), boot: Uuid([1; 16]), name: format!("host{}", number.0) };
        let own = slot::join(&cells, &lun, header.lun_index, &identity, u64::from(number.0) + 100, header.lease, None)
            .await
            .unwrap();
        let margin = lease::margin(&own.lease).as_nanos() as u64;
        gate.extend(header.lun_index, own.slot.generation, own.lease_until, margin);
        root = Some(header.root);
        members.push(Member::new(lun, layout, header, Some(own)));
        io = Some(cells);
    }
    let context = Rc::new(Context::new(io.unwrap(), members, gate, u64::from(number.0) + 100, false));
    let space = Space::new(&context);
    let objects = Objects::new(context.clone(), space.clone());
    Host { context, space, objects, paths, root: root.unwrap() }
}

fn options(cell_size: CellSize) -> MkfsOptions {
    MkfsOptions {
        label: "test".into(),
        block_size: BlockSize::from_bytes(64 << 10).unwrap(),
        cell_size: Some(cell_size),
        ..MkfsOptions::default()
    }
}

fn body(name: &str) -> Body {
    let attributes = Attributes {
        mode: 0o644,
        uid: 0,
        gid: 0,
        size: 0,
        blocks: 0,
        accessed_ns: 0,
        modified_ns: 0,
        changed_ns: 0,
        born_ns: 0,
        disk: None,
        name: name.as_bytes().to_vec(),
    };
    Body { attributes, content: Content::Inline(Vec::new()) }
}

fn lun1() -> LunIndex {
    LunIndex::new(1).unwrap()
}

impl Host {
    async fn create(&self, name: &str, lock: Option<HoldMode>) -> Rc<Object> {
        let new = NewObject {
            parent: self.root,
            object_type: ObjectType::File,
            flags: ObjectFlags::empty(),
            luns: LunSet::default(),
            body: body(name),
            lock,
            lun: lun1(),
        };
        self.objects.create(new).await.unwrap()
    }

    /// Writes `n` into the object's size, starting again when another host was first.
    async fn set_size(&self, object: &Object, n: u64) -> Result<u32, vmfs_core::error::FsError> {
        for lost in 0.. {
            let image = object.image();
            let mut body = (*image.body).clone();
            body.attributes.size = n;
            let change = Change { body: Some(body), ..Change::default() };
            match self.objects.commit(object, &image, change).await? {
                Committed::Done => return Ok(lost),
                Committed::Lost | Committed::Overtaken => {}
            }
        }
        unreachable!()
    }
}

fn world(seed: u64, disks: usize, mib: u64, cell_size: CellSize) -> (Sim, Vec<MemoryDisk>) {
    let sim = Sim::new(seed);
    let disks: Vec<_> = (0..disks).map(|n| MemoryDisk::new(&format!("lun{n}"), mib << 20, Some(cell_size))).collect();
    sim.block_on(format_disks(&sim, &disks, options(cell_size))).unwrap();
    (sim, disks)
}

#[test]
fn a_new_object_is_read_back_by_another_host_and_settles_with_its_first_change() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (sim, disks) = world(1, 2, 64, cell_size);
        sim.block_on(async {
            let a = mount(&sim, &disks, HostNo(1), cell_size).await;
            let b = mount(&sim, &disks, HostNo(2), cell_size).await;
            let object = a.create("file", None).await;
            let seen = b.objects.load(object.reference()).await.unwrap();
            assert!(matches!(seen.image().root.state, ObjectState::Creating(_)));
            assert_eq!(seen.image().body.attributes.name, b"file");
            a.set_size(&object, 77).await.unwrap();
            b.objects.refresh(&seen).await.unwrap();
            assert_eq!(seen.image().root.state, ObjectState::Live);
            assert_eq!(seen.image().body.attributes.size, 77);
        });
    }
}

#[test]
fn a_commit_takes_two_rounds_and_an_uncontended_lock_one_compare_and_write() {
    let sim = Sim::new(2);
    let disks = [MemoryDisk::new("lun0", 64 << 20, Some(CellSize::B512))];
    let large = MkfsOptions { block_size: BlockSize::DEFAULT, ..options(CellSize::B512) };
    sim.block_on(format_disks(&sim, &disks, large)).unwrap();
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        disks[0].start_recording();
        a.objects.lock(&object, HoldMode::Exclusive).await.unwrap();
        let wrote = |records: &[vmfs_core::sim::Record]| {
            records.iter().filter(|r| r.command == Command::CompareAndWrite { wrote: true }).count()
        };
        assert_eq!(wrote(&disks[0].take_records()), 1);
        disks[0].start_recording();
        a.set_size(&object, 1).await.unwrap();
        // The new body's cell, its unit's entry with the old one's mark, and the root cell.
        let records = disks[0].take_records();
        assert!(wrote(&records) <= 3, "{records:?}");
    });
}

#[test]
fn of_two_hosts_that_commit_one_object_each_change_wins_once() {
    for seed in scale::seeds(0, 30) {
        let (sim, disks) = world(seed, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = Rc::new(mount(&sim, &disks, HostNo(1), CellSize::B512).await);
            let b = Rc::new(mount(&sim, &disks, HostNo(2), CellSize::B512).await);
            let object = a.create("counter", None).await;
            let what = object.reference();
            let count = move |host: Rc<Host>| async move {
                let object = host.objects.load(what).await.unwrap();
                let mut done = 0;
                while done < 10 {
                    let image = object.image();
                    let mut body = (*image.body).clone();
                    body.attributes.size += 1;
                    let change = Change { body: Some(body), ..Change::default() };
                    if let Committed::Done = host.objects.commit(&object, &image, change).await.unwrap() {
                        done += 1;
                    }
                }
                host.objects.tidy().await.unwrap();
            };
            let one = sim.spawn(HostNo(1), count(a.clone()));
            let two = sim.spawn(HostNo(2), count(b.clone()));
            one.join().await.unwrap();
            two.join().await.unwrap();
            a.objects.refresh(&object).await.unwrap();
            assert_eq!(object.image().body.attributes.size, 20, "seed {seed}");
        });
    }
}

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
                let left = owners(&disks[nth], &member.layout, hosts[0].context.io.context());
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

#[test]
fn a_lock_is_refused_with_the_holders_name_and_taken_after_its_release() {
    let (sim, disks) = world(6, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let mine = a.create("disk", Some(HoldMode::Exclusive)).await;
        let theirs = b.objects.load(mine.reference()).await.unwrap();
        for mode in [HoldMode::Exclusive, HoldMode::Shared] {
            let error = b.objects.lock(&theirs, mode).await.unwrap_err();
            assert_eq!(error.kind(), FsErrorKind::Busy);
            assert!(error.to_string().contains("host1"), "{error}");
        }
        assert_eq!(b.set_size(&theirs, 9).await.unwrap_err().kind(), FsErrorKind::Busy);
        a.objects.unlock(&mine).await.unwrap();
        b.objects.lock(&theirs, HoldMode::Shared).await.unwrap();
        a.objects.lock(&mine, HoldMode::Shared).await.unwrap();
        assert_eq!(a.objects.who_holds(&mine).await.unwrap().len(), 2);
        assert_eq!(a.objects.lock(&mine, HoldMode::Exclusive).await.unwrap_err().kind(), FsErrorKind::Busy);
        b.objects.unlock(&theirs).await.unwrap();
        a.objects.lock(&mine, HoldMode::Exclusive).await.unwrap();
    });
}

#[test]
fn a_lock_taken_by_racing_hosts_has_one_holder_whatever_gets_lost_on_the_way() {
    for seed in scale::seeds(0, 60) {
        let (sim, disks) = world(seed, 1, 64, CellSize::B512);
        sim.block_on(async {
            let maker = mount(&sim, &disks, HostNo(9), CellSize::B512).await;
            let what = maker.create("disk", None).await.reference();
            let mut tasks = Vec::new();
            for n in 1..=3 {
                let host = mount(&sim, &disks, HostNo(n), CellSize::B512).await;
                host.paths[0].set_rates(FaultRates::MANY);
                tasks.push(sim.spawn(HostNo(n), async move {
                    let locked = match host.objects.load(what).await {
                        Ok(object) => host.objects.lock(&object, HoldMode::Exclusive).await.is_ok().then_some(object),
                        Err(_) => None,
                    };
                    (host, locked)
                }));
            }
            let (mut hosts, mut winners) = (Vec::new(), Vec::new());
            for task in tasks {
                let (host, locked) = task.join().await.unwrap();
                host.paths[0].set_rates(FaultRates::default());
                winners.extend(locked);
                hosts.push(host);
            }
            assert!(winners.len() <= 1, "seed {seed}: {} hosts hold one exclusive lock", winners.len());
            sim.sleep(Duration::from_secs(30)).await;
            for host in &hosts {
                host.objects.release_doubtful_locks().await.unwrap();
            }
            let (_, root) = maker.objects.read_root(what.fd).await.unwrap();
            assert_eq!(root.lock.holders.len(), winners.len(), "seed {seed}: a lock without a user stays behind");
        });
    }
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_out() {
    for fault in [Fault::AnswerLost, Fault::CommandLost, Fault::Repeated] {
        let (sim, disks) = world(8, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
            let object = a.create("file", None).await;
            for n in 0..12u64 {
                a.paths[0].script(fault);
                // A read may have hit the fault: that is an error, and the next try finds the state as it is.
                if a.set_size(&object, n + 1).await.is_err() {
                    a.objects.refresh(&object).await.unwrap();
                    a.set_size(&object, n + 1).await.unwrap();
                }
                assert_eq!(object.image().body.attributes.size, n + 1);
                a.objects.refresh(&object).await.unwrap();
                assert_eq!(object.image().body.attributes.size, n + 1);
            }
        });
    }
}

#[test]
fn a_host_that_dies_anywhere_in_a_commit_leaves_the_object_before_or_after_it() {
    for die_after in 0..14 {
        let (sim, disks) = world(9, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = Rc::new(mount(&sim, &disks, HostNo(1), CellSize::B512).await);
            let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
            let object = a.create("file", None).await;
            let what = object.reference();
            a.set_size(&object, 1).await.unwrap();
            a.set_size(&object, 2).await.unwrap();
            let task = sim.spawn(HostNo(1), {
                let a = a.clone();
                async move { a.set_size(&object, 3).await.map(|_| ()) }
            });
            sim.sleep(Duration::from_micros(150 * die_after)).await;
            sim.kill(HostNo(1));
            drop(task);
            sim.sleep(Duration::from_secs(10)).await;
            let seen = b.objects.load(what).await.unwrap();
            assert!([2, 3].contains(&seen.image().body.attributes.size));
            b.set_size(&seen, 4).await.unwrap();
            let prepared = b.objects.prepare(&seen, EntryKind::Bucket, 0, b"stream", Purpose::Normal).await.unwrap();
            b.objects.discard(vec![prepared]).await;
        });
    }
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
    let layout = &host.context.member(lun1()).unwrap().layout;
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

#[test]
fn a_commit_takes_two_round_trips_and_a_creation_one() {
    let sim = Sim::new(25);
    let disks = vec![MemoryDisk::new("lun", 64 << 20, Some(CellSize::B512))];
    let large = MkfsOptions { block_size: BlockSize::DEFAULT, ..options(CellSize::B512) };
    sim.block_on(format_disks(&sim, &disks, large)).unwrap();
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        a.set_size(&object, 1).await.unwrap();
        a.paths[0].set_latency(Duration::from_millis(1), Duration::from_millis(1));
        // Now and then the pool is filled too; what counts is a change that finds a unit there.
        let (mut commit, mut create) = (u64::MAX, u64::MAX);
        for n in 0..8 {
            let start = sim.now();
            a.set_size(&object, n).await.unwrap();
            commit = commit.min((sim.now() - start) / 2_000_000);
            let start = sim.now();
            a.create("next", None).await;
            create = create.min((sim.now() - start) / 2_000_000);
        }
        assert_eq!((commit, create), (2, 1));
    });
}

#[test]
fn a_busy_storage_is_asked_again() {
    let (sim, disks) = world(26, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        a.paths[0].script(Fault::NotDone(LunErrorKind::NotDone));
        a.set_size(&object, 1).await.unwrap();
    });
}

#[test]
fn what_a_removal_marks_is_listed_in_the_arena() {
    let (sim, disks) = world(27, 1, 64, CellSize::B512);
    sim.block_on(async {
        let maker = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let what = maker.create("file", None).await.reference();
        let a = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let object = a.objects.load(what).await.unwrap();
        a.objects.begin_unlink(&object, None).await.unwrap();
        let member = a.context.member(lun1()).unwrap();
        let own = a.context.own_slot(lun1()).unwrap();
        let cell = a.context.read_cell(layout::arena_cell(lun1(), own.slot)).await.unwrap();
        let arena = Arena::decode(member.layout.cell_size, cell.payload()).unwrap();
        assert!(arena.places.contains(&Place::FdContainer(what.fd.container().block.get())));
    });
}

/// Entries of all unit containers of a LUN.
fn unit_entries(disk: &MemoryDisk, host: &Host) -> Vec<TableEntry> {
    let member = host.context.member(lun1()).unwrap();
    let (layout, context) = (&member.layout, host.context.io.context());
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
