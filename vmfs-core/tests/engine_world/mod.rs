//! Owns: hosts that use the engine without names or files, for its tests.
//! Promises: nothing is taken over from one mount to the next but what is on the disks.
//! Must not know: the tests.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::rc::Rc;
use std::time::Duration;

use vmfs_core::alloc::Space;
use vmfs_core::cas::CellIo;
use vmfs_core::context::{Context, Member};
use vmfs_core::env::Env;
use vmfs_core::format::body::{Attributes, Body, Content};
use vmfs_core::format::header::LunHeader;
use vmfs_core::format::layout::{self, LunLayout};
use vmfs_core::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectType};
use vmfs_core::format::{Cell, CellContext};
use vmfs_core::gate::GatePage;
use vmfs_core::lease;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::object::{Change, Committed, NewObject, Object, Objects};
use vmfs_core::sim::{HostNo, MemoryDisk, MemoryLun, Sim, format_disks};
use vmfs_core::slot::{self, HostIdentity};
use vmfs_core::units::{BlockSize, CellSize, FdId, LunIndex, Uuid};

pub struct Host {
    pub context: Rc<Context>,
    pub space: Rc<Space>,
    pub objects: Rc<Objects>,
    pub paths: Vec<Rc<MemoryLun>>,
    pub root: FdId,
}

pub async fn header_of(disk: &MemoryDisk, cell_size: CellSize) -> (LunHeader, CellContext) {
    let bytes = disk.peek(layout::HEADER_OFFSET, 4096);
    let (context, lun) = vmfs_core::format::cell::probe(layout::HEADER_OFFSET, &bytes).unwrap();
    let cell = Cell::decode(&context, layout::header_cell(lun), &bytes[..cell_size.bytes()]).unwrap();
    (LunHeader::decode(cell_size, cell.payload()).unwrap(), context)
}

pub async fn mount(sim: &Sim, disks: &[MemoryDisk], number: HostNo, cell_size: CellSize) -> Host {
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

pub fn options(cell_size: CellSize) -> MkfsOptions {
    MkfsOptions {
        label: "test".into(),
        block_size: BlockSize::from_bytes(64 << 10).unwrap(),
        cell_size: Some(cell_size),
        ..MkfsOptions::default()
    }
}

pub fn body(name: &str) -> Body {
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

pub fn lun1() -> LunIndex {
    LunIndex::new(1).unwrap()
}

impl Host {
    pub async fn create(&self, name: &str, lock: Option<HoldMode>) -> Rc<Object> {
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
    pub async fn set_size(&self, object: &Object, n: u64) -> Result<u32, vmfs_core::error::FsError> {
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

pub fn world(seed: u64, disks: usize, mib: u64, cell_size: CellSize) -> (Sim, Vec<MemoryDisk>) {
    let sim = Sim::new(seed);
    let disks: Vec<_> = (0..disks).map(|n| MemoryDisk::new(&format!("lun{n}"), mib << 20, Some(cell_size))).collect();
    sim.block_on(format_disks(&sim, &disks, options(cell_size))).unwrap();
    (sim, disks)
}
