//! Promises of mkfs: every structure that it leaves is right, nothing is overwritten unasked, an interrupted run is no volume.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::cas::CellIo;
use vmfs_core::env::Env;
use vmfs_core::error::FsErrorKind;
use vmfs_core::format::arena::Arena;
use vmfs_core::format::body::{Body, Content};
use vmfs_core::format::cell::probe;
use vmfs_core::format::header::{LeaseTimes, LunHeader, MemberState};
use vmfs_core::format::heartbeat::Heartbeat;
use vmfs_core::format::layout::{
    HEADER_COPY_OFFSET, HEADER_OFFSET, arena_cell, header_cell, header_copy_cell, heartbeat_cell, member_cell,
};
use vmfs_core::format::member::Member;
use vmfs_core::format::root_cell::{HoldMode, ObjectState, ObjectType, RootCell};
use vmfs_core::format::table_entry::{EntryKind, TableCell, TableEntry};
use vmfs_core::format::{Cell, CellContext, CellKind};
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::{MkfsOptions, MkfsPlan, execute, plan};
use vmfs_core::sim::{HostNo, MemoryDisk, MemoryLun, Sim};
use vmfs_core::slot::{self, HostIdentity};
use vmfs_core::units::{
    BlockAddress, BlockNo, BlockSize, CellAddress, CellSize, FdId, LunIndex, OpId, SlotId, UnitAddress, Uuid,
};

const MIB: u64 = 1 << 20;

struct World {
    sim: Sim,
    env: Rc<dyn Env>,
    disks: Vec<MemoryDisk>,
    paths: Vec<Rc<MemoryLun>>,
    luns: Vec<Rc<dyn Lun>>,
}

fn world(sizes: &[u64], cell: Option<CellSize>) -> World {
    let sim = Sim::new(1);
    let env = sim.env(HostNo(1));
    let disks: Vec<_> =
        sizes.iter().enumerate().map(|(nth, bytes)| MemoryDisk::new(&format!("lun-{nth}"), *bytes, cell)).collect();
    let paths: Vec<_> = disks.iter().map(|disk| disk.connect(&sim, HostNo(1))).collect();
    let luns = paths.iter().map(|path| path.clone() as Rc<dyn Lun>).collect();
    World { sim, env, disks, paths, luns }
}

impl World {
    fn make(&self, options: MkfsOptions) -> MkfsPlan {
        self.sim.block_on(async {
            let plan = plan(&self.env, &self.luns, options).await.unwrap();
            let (mut last, mut total) = (0, 0);
            let summary = execute(&self.env, &self.luns, &plan, &mut |progress| {
                assert!(progress.done_bytes >= last && progress.done_bytes <= progress.total_bytes);
                (last, total) = (progress.done_bytes, progress.total_bytes);
            })
            .await
            .unwrap();
            assert_eq!((summary.written_bytes, last), (total, total));
            plan
        })
    }

    fn refusal(&self, options: MkfsOptions) -> (FsErrorKind, String) {
        let error = self.sim.block_on(plan(&self.env, &self.luns, options)).unwrap_err();
        (error.kind(), error.to_string())
    }
}

/// Reads cells and checks that no two of them have the same `op_id`.
struct Reader<'a> {
    world: &'a World,
    context: CellContext,
    seen: HashSet<OpId>,
}

impl Reader<'_> {
    fn cell(&mut self, at: CellAddress, kind: CellKind) -> Cell {
        let disk = &self.world.disks[usize::from(at.lun.get()) - 1];
        let cell = Cell::decode(&self.context, at, &disk.peek(at.offset, self.context.cell_size.bytes())).unwrap();
        cell.expect_kind(kind).unwrap();
        assert!(self.seen.insert(cell.header().op_id), "{at}: an image recurs");
        cell
    }
}

fn check_everything(world: &World, plan: &MkfsPlan) {
    let context = plan.context();
    let mut read = Reader { world, context, seen: HashSet::new() };
    let first = LunIndex::new(1).unwrap();
    let block = |n| BlockNo::new(n).unwrap();
    let root = FdId::new(BlockAddress { lun: first, block: block(0) }, 0).unwrap();
    for planned in &plan.luns {
        let (lun, layout) = (planned.index(), &planned.layout);
        for at in [header_cell(lun), header_copy_cell(lun)] {
            let header = LunHeader::decode(context.cell_size, read.cell(at, CellKind::Header).payload()).unwrap();
            assert_eq!((header.lun_uuid, header.lun_index, header.root), (planned.lun_uuid, lun, root));
            assert_eq!((header.lun_bytes, &header.segments), (planned.bytes, &layout.segments));
            assert_eq!((header.label.as_str(), header.lease), (plan.options.label.as_str(), plan.options.lease));
            assert_eq!(usize::from(header.member_count), plan.luns.len());
        }
        for index in (1..=254).map(|n| LunIndex::new(n).unwrap()) {
            let member = Member::decode(read.cell(member_cell(lun, index), CellKind::Member).payload()).unwrap();
            match plan.luns.get(usize::from(index.get()) - 1) {
                Some(other) => assert_eq!((member.lun_uuid, member.state), (other.lun_uuid, MemberState::Active)),
                None => assert_eq!(member, Member::free(index)),
            }
        }
        for slot in (0..=255).map(SlotId) {
            let cell = read.cell(heartbeat_cell(lun, slot), CellKind::Heartbeat);
            assert_eq!(Heartbeat::decode(cell.payload()).unwrap(), Heartbeat::free());
            let cell = read.cell(arena_cell(lun, slot), CellKind::Arena);
            assert_eq!(Arena::decode(context.cell_size, cell.payload()).unwrap(), Arena::default());
        }
        for nth in 0..layout.table_cell_count() {
            let (at, first_block, _) = layout.table_cell(nth).unwrap();
            let table = TableCell::decode(context.cell_size, read.cell(at, CellKind::BlockTable).payload()).unwrap();
            for (entry, number) in table.entries.iter().zip(first_block.get()..) {
                let kind = match (lun == first, number) {
                    (true, 0) => EntryKind::FdContainer,
                    (true, 1) => EntryKind::UnitContainer,
                    _ => EntryKind::Free,
                };
                assert_eq!(*entry, TableEntry { kind, ..TableEntry::FREE });
            }
        }
    }
    check_root(&mut read, plan, root);
}

fn check_root(read: &mut Reader<'_>, plan: &MkfsPlan, root: FdId) {
    let (layout, context) = (&plan.luns[0].layout, plan.context());
    let per_container = plan.options.block_size.bytes() / context.cell_size.bytes() as u64;
    let mut body = None;
    for cell in 0..per_container as u16 {
        let fd = FdId::new(root.container(), cell).unwrap();
        let image = read.cell(layout.root_cell(fd).unwrap(), CellKind::Root);
        let decoded = RootCell::decode(context.cell_size, image.payload()).unwrap();
        assert_eq!(image.header().owner, Some(fd));
        if fd == root {
            assert_eq!((decoded.state, decoded.object_type), (ObjectState::Live, Some(ObjectType::Directory)));
            assert_eq!((decoded.parent, decoded.lock.mode), (Some(root), HoldMode::Free));
            body = decoded.body;
        } else {
            assert_eq!((decoded.state, image.header().link.0), (ObjectState::Free, 0));
        }
    }
    let body = body.unwrap();
    let (mut stream, mut crc, mut tables) = (Vec::new(), 0, Vec::new());
    for unit in 0..plan.options.block_size.units() as u16 {
        let at = UnitAddress { lun: root.lun(), block: BlockNo::new(1).unwrap(), unit };
        let (table, nth) = layout.unit_table_entry(at).unwrap();
        let image = Cell::decode(&context, table, &read.world.disks[0].peek(table.offset, context.cell_size.bytes()));
        let entry = TableCell::decode(context.cell_size, image.unwrap().payload()).unwrap().entries[nth];
        tables.push(entry);
        let (kind, used) = match entry.kind {
            EntryKind::Body => (CellKind::Body, usize::from(body.used_cells)),
            EntryKind::Table => continue,
            _ => (CellKind::Blank, 0),
        };
        for cell in 0..context.cell_size.cells_per_unit() {
            let image =
                read.cell(layout.unit_cell(at, cell).unwrap(), if cell < used { kind } else { CellKind::Blank });
            if cell < used {
                image.expect_owner(root, image.header().link, 0).unwrap();
                stream.extend_from_slice(image.payload());
                crc = crc32c::crc32c_append(crc, image.image());
            }
        }
    }
    let expected = TableEntry { fd: root.get(), kind: EntryKind::Body, ..TableEntry::FREE };
    assert_eq!(tables[usize::from(body.at.unit)], expected);
    assert!(tables[..usize::from(body.at.unit)].iter().all(|entry| entry.kind == EntryKind::Table));
    assert!(tables[usize::from(body.at.unit) + 1..].iter().all(|entry| *entry == TableEntry::FREE));
    assert_eq!(crc, body.crc);
    let decoded = Body::decode(context.cell_size, &stream).unwrap();
    assert_eq!((decoded.content, decoded.attributes.mode), (Content::Entries(Vec::new()), plan.options.root_mode));
}

#[test]
fn every_structure_of_a_new_volume_is_right_at_every_geometry() {
    for cell in [CellSize::B512, CellSize::B4096] {
        for (sizes, shift) in [(vec![64 * MIB], 20), (vec![64 * MIB], 24), (vec![80 * MIB, 70 * MIB, 64 * MIB], 16)] {
            let world = world(&sizes, Some(cell));
            let options = MkfsOptions {
                label: "ds1".to_owned(),
                block_size: BlockSize::from_shift(shift).unwrap(),
                lease: LeaseTimes::FAST,
                ..MkfsOptions::default()
            };
            let plan = world.make(options);
            assert_eq!(plan.cell_size, cell);
            check_everything(&world, &plan);
        }
    }
}

#[test]
fn the_first_mib_is_never_written() {
    let world = world(&[64 * MIB], None);
    world.disks[0].damage(0, &[0xa5; 1 << 20]);
    world.make(MkfsOptions::default());
    assert!(world.disks[0].peek(0, 1 << 20) == vec![0xa5; 1 << 20]);
}

#[test]
fn a_known_signature_is_named_and_not_overwritten_unless_forced() {
    let world = world(&[64 * MIB, 64 * MIB], None);
    world.disks[1].damage(0x438, &[0x53, 0xef]);
    let (kind, message) = world.refusal(MkfsOptions::default());
    assert_eq!(kind, FsErrorKind::Exists);
    assert!(message.contains("lun-1") && message.contains("ext4") && message.contains("--force"), "{message}");
    let plan = world.make(MkfsOptions { force: true, ..MkfsOptions::default() });
    assert!(plan.to_string().contains("will be lost: an ext2"), "{plan}");
}

#[test]
fn a_volume_is_not_overwritten_unless_forced_and_never_looked_over_when_its_header_is_damaged() {
    let world = world(&[64 * MIB], None);
    world.make(MkfsOptions { label: "old".to_owned(), ..MkfsOptions::default() });
    let (kind, message) = world.refusal(MkfsOptions::default());
    assert!(kind == FsErrorKind::Exists && message.contains("VMFS volume") && message.contains("old"), "{message}");
    world.disks[0].damage(HEADER_OFFSET + 20, &[0xff]);
    assert_eq!(world.refusal(MkfsOptions::default()).0, FsErrorKind::Exists);
    let plan = world.make(MkfsOptions { force: true, ..MkfsOptions::default() });
    check_everything(&world, &plan);
}

#[test]
fn a_volume_that_a_host_renews_is_refused_with_the_hosts_name() {
    let world = world(&[64 * MIB], None);
    let made = world.make(MkfsOptions::default());
    let identity = HostIdentity { host: Uuid([1; 16]), boot: Uuid([2; 16]), name: "alpha".to_owned() };
    let (env, lun) = (world.sim.env(HostNo(2)), world.disks[0].connect(&world.sim, HostNo(2)));
    world.sim.spawn(HostNo(2), async move {
        let (io, lun): (_, Rc<dyn Lun>) = (CellIo::new(made.context(), env.clone()), lun);
        let index = LunIndex::new(1).unwrap();
        let mut own = slot::join(&io, &lun, index, &identity, 77, LeaseTimes::DEFAULT, None).await.unwrap();
        loop {
            env.sleep(Duration::from_secs(2)).await;
            slot::renew(&io, &lun, &mut own).await.unwrap();
        }
    });
    world.sim.block_on(world.sim.sleep(Duration::from_secs(1)));
    let (kind, message) = world.refusal(MkfsOptions::default());
    assert!(kind == FsErrorKind::Busy && message.contains("alpha"), "{message}");
    // A host that stopped renewing is not in use, but its volume is still a volume.
    world.sim.kill(HostNo(2));
    assert_eq!(world.refusal(MkfsOptions::default()).0, FsErrorKind::Exists);
    world.sim.end();
}

#[test]
fn an_mkfs_that_is_cut_off_at_any_write_leaves_no_volume() {
    let sizes = [64 * MIB, 64 * MIB];
    let whole = world(&sizes, None);
    whole.disks[0].start_recording();
    whole.disks[1].start_recording();
    whole.make(MkfsOptions::default());
    let writes = whole.disks.iter().map(|disk| disk.take_records().len()).sum::<usize>();
    for cut_after in 0..40u64 {
        let world = world(&sizes, None);
        world.make(MkfsOptions { label: "old".to_owned(), ..MkfsOptions::default() });
        for path in &world.paths {
            path.set_latency(Duration::from_millis(10), Duration::from_millis(10));
        }
        let (env, luns) = (world.env.clone(), world.luns.clone());
        let options = MkfsOptions { force: true, label: "new".to_owned(), ..MkfsOptions::default() };
        let plan = world.sim.block_on(plan(&env, &luns, options)).unwrap();
        let started = world.sim.now();
        let made = plan.clone();
        world.sim.spawn(HostNo(1), async move { execute(&env, &luns, &made, &mut |_| ()).await });
        world.sim.block_on(world.sim.sleep(Duration::from_millis(5 + 20 * cut_after)));
        world.sim.kill(HostNo(1));
        world.sim.block_on(world.sim.sleep(Duration::from_secs(1)));
        assert!(world.sim.now() > started);
        let header = world.disks[0].peek(HEADER_OFFSET, 4096);
        match probe(HEADER_OFFSET, &header) {
            Ok((context, _)) if context.volume == plan.volume => check_everything(&world, &plan),
            // Cut off before the first write landed.
            Ok(_) => assert!(cut_after == 0),
            Err(_) => {}
        }
        let copy = world.disks[0].peek(HEADER_COPY_OFFSET, 4096);
        if let Ok((context, _)) = probe(HEADER_COPY_OFFSET, &copy) {
            assert!(context.volume == plan.volume || cut_after == 0);
        }
    }
    assert!(writes < 40, "the loop above reaches the last of {writes} writes");
}

#[test]
fn what_cannot_be_made_is_refused_with_its_reason() {
    let small = world(&[63 * MIB], None);
    assert!(small.refusal(MkfsOptions::default()).1.contains("64 MiB"));
    let two = world(&[64 * MIB, 64 * MIB], None);
    let mut twice = world(&[64 * MIB], None);
    twice.luns.push(twice.luns[0].clone());
    assert!(twice.refusal(MkfsOptions::default()).1.contains("same LUN"));
    let label = MkfsOptions { label: "x".repeat(65), ..MkfsOptions::default() };
    assert!(two.refusal(label).1.contains("64"));
    let lease = LeaseTimes { margin_ms: 30_000, ..LeaseTimes::DEFAULT };
    assert!(two.refusal(MkfsOptions { lease, ..MkfsOptions::default() }).1.contains("margin"));
    let mut mixed = world(&[64 * MIB], Some(CellSize::B512));
    mixed.luns.push(world(&[64 * MIB], Some(CellSize::B4096)).disks[0].connect(&mixed.sim, HostNo(1)));
    let (kind, message) = mixed.refusal(MkfsOptions::default());
    assert!(kind == FsErrorKind::Invalid && (message.contains("same")), "{message}");
    assert!(world(&[], None).refusal(MkfsOptions::default()).1.contains("1 to 254"));
}
