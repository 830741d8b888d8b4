//! A world of simulated LUNs and hosts for tests of file data: mount, files, a thread's mover, a model of bytes, an account of space.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use vmfs_core::alloc::Space;
use vmfs_core::cas::{CasOutcome, CellChange, CellIo};
use vmfs_core::context::{Context, Member};
use vmfs_core::env::{Env, Instant};
use vmfs_core::error::FsError;
use vmfs_core::file::{Files, Mover, Need, OpenFile, OpenMode, Stop};
use vmfs_core::format::body::{Attributes, Body, Content, DiskFormat};
use vmfs_core::format::header::LunHeader;
use vmfs_core::format::layout::{self, LunLayout};
use vmfs_core::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectType, Unclean};
use vmfs_core::format::table_entry::{EntryKind, TableCell};
use vmfs_core::format::{Cell, CellContext};
use vmfs_core::gate::{GatePage, GateState};
use vmfs_core::lun::Lun;
use vmfs_core::mapping::tree::Shape;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::object::{NewObject, Object, Objects};
use vmfs_core::sim::{FaultRates, HostNo, MemoryDisk, MemoryLun, Sim, format_disks};
use vmfs_core::slot::{self, HostIdentity};
use vmfs_core::units::{BlockSize, CellSize, FdId, LunIndex, Uuid};

pub struct Host {
    pub context: Rc<Context>,
    pub space: Rc<Space>,
    pub objects: Rc<Objects>,
    pub files: Rc<Files>,
    pub root: FdId,
    pub env: Rc<dyn Env>,
    paths: Vec<Rc<MemoryLun>>,
}

pub struct World {
    pub sim: Sim,
    pub disks: Vec<MemoryDisk>,
    pub cell_size: CellSize,
    pub block_size: BlockSize,
}

impl World {
    pub fn new(seed: u64, disks: usize, bytes: u64, cell_size: CellSize, block_bytes: u64) -> World {
        let sim = Sim::new(seed);
        let disks: Vec<_> = (0..disks).map(|n| MemoryDisk::new(&format!("lun{n}"), bytes, Some(cell_size))).collect();
        let block_size = BlockSize::from_bytes(block_bytes).unwrap();
        let options =
            MkfsOptions { label: "test".into(), block_size, cell_size: Some(cell_size), ..MkfsOptions::default() };
        sim.block_on(format_disks(&sim, &disks, options)).unwrap();
        World { sim, disks, cell_size, block_size }
    }

    fn header_of(&self, disk: &MemoryDisk) -> (LunHeader, CellContext) {
        let bytes = disk.peek(layout::HEADER_OFFSET, 4096);
        let (context, lun) = vmfs_core::format::cell::probe(layout::HEADER_OFFSET, &bytes).unwrap();
        let cell = Cell::decode(&context, layout::header_cell(lun), &bytes[..self.cell_size.bytes()]).unwrap();
        (LunHeader::decode(self.cell_size, cell.payload()).unwrap(), context)
    }

    /// A host whose commands take time, so that others come between.
    pub async fn mount_slow(&self, number: u32) -> Host {
        self.mount_with(number, Duration::from_millis(2)).await
    }

    pub async fn mount(&self, number: u32) -> Host {
        self.mount_with(number, Duration::ZERO).await
    }

    async fn mount_with(&self, number: u32, latency: Duration) -> Host {
        let env: Rc<dyn Env> = self.sim.env(HostNo(number));
        let gate = GatePage::in_process();
        let (mut members, mut paths, mut root, mut io) = (Vec::new(), Vec::new(), None, None);
        let incarnation = u64::from(number) + 100;
        for disk in &self.disks {
            let (header, context) = self.header_of(disk);
            let path = disk.connect(&self.sim, HostNo(number));
            path.set_latency(latency / 20, latency);
            let lun: Rc<dyn Lun> = path.clone();
            paths.push(path);
            let cells = CellIo::new(context, env.clone());
            let layout = LunLayout {
                lun: header.lun_index,
                cell_size: self.cell_size,
                block_size: header.block_size,
                segments: header.segments.clone(),
            };
            let identity =
                HostIdentity { host: Uuid([number as u8; 16]), boot: Uuid([1; 16]), name: format!("host{number}") };
            let own =
                slot::join(&cells, &lun, header.lun_index, &identity, incarnation, header.lease, None).await.unwrap();
            gate.extend(header.lun_index, own.slot.generation, Instant(u64::MAX), 0);
            root = Some(header.root);
            members.push(Member::new(lun, layout, header, Some(own)));
            io = Some(cells);
        }
        let context = Rc::new(Context::new(io.unwrap(), members, gate, incarnation, false));
        let space = Space::new(&context);
        let objects = Objects::new(context.clone(), space.clone());
        let files = Rc::new(Files::new(context.clone(), space.clone(), objects.clone()));
        Host { context, space, objects, files, root: root.unwrap(), env, paths }
    }

    /// Entries of the block tables that say "data" or "retiring": {fd, file block} by place.
    pub fn owned_blocks(&self) -> BTreeMap<(u8, u64), (u64, u32, EntryKind)> {
        let mut owned = BTreeMap::new();
        for disk in &self.disks {
            let (header, context) = self.header_of(disk);
            let layout = LunLayout {
                lun: header.lun_index,
                cell_size: self.cell_size,
                block_size: header.block_size,
                segments: header.segments.clone(),
            };
            for nth in 0..layout.table_cell_count() {
                let (at, first, used) = layout.table_cell(nth).unwrap();
                let image = disk.peek(at.offset, self.cell_size.bytes());
                let cell = Cell::decode(&context, at, &image).unwrap();
                let table = TableCell::decode(self.cell_size, cell.payload()).unwrap();
                for (n, entry) in table.entries[..used].iter().enumerate() {
                    if matches!(entry.kind, EntryKind::Data | EntryKind::Retiring | EntryKind::Quarantine) {
                        let place = (header.lun_index.get(), first.get() + n as u64);
                        owned.insert(place, (entry.fd, entry.index, entry.kind));
                    }
                }
            }
        }
        owned
    }
}

impl Host {
    pub fn shape(&self) -> Shape {
        Shape::new(self.context.cell_size())
    }

    pub async fn create(&self, name: &str) -> Rc<Object> {
        self.create_object(name, ObjectType::File, None, 0, ObjectFlags::empty()).await
    }

    pub async fn create_object(
        &self,
        name: &str,
        object_type: ObjectType,
        disk: Option<DiskFormat>,
        size: u64,
        flags: ObjectFlags,
    ) -> Rc<Object> {
        let content = match object_type {
            ObjectType::Disk => Content::Mapped(self.shape().empty_root(size, self.context.block_size())),
            _ => Content::Inline(Vec::new()),
        };
        let attributes = Attributes {
            mode: 0o644,
            uid: 0,
            gid: 0,
            size,
            blocks: 0,
            accessed_ns: 0,
            modified_ns: 0,
            changed_ns: 0,
            born_ns: 0,
            disk,
            name: name.as_bytes().to_vec(),
        };
        let mut luns = LunSet::default();
        self.context.members().iter().for_each(|member| luns.insert(member.index));
        let new = NewObject {
            parent: self.root,
            object_type,
            flags,
            luns,
            body: Body { attributes, content },
            lock: None,
            lun: LunIndex::new(1).unwrap(),
        };
        self.objects.create(new).await.unwrap()
    }

    pub async fn load(&self, fd: FdId) -> Rc<Object> {
        self.objects.load_any(fd).await.unwrap()
    }

    pub async fn open(&self, object: &Rc<Object>, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
        self.files.open(object, mode).await
    }

    /// What a breaker leaves when the holder of a lock has died: nobody holds it, older pointer cells are not believed.
    pub async fn break_lock(&self, fd: FdId) {
        let (cell, mut root) = self.objects.read_root(fd).await.unwrap();
        root.unclean = Unclean { token: root.lock.token.next(), broken: root.lock.holders[0] };
        root.lock.holders.clear();
        root.lock.mode = HoldMode::Free;
        let broken = self.context.cas(&cell, CellChange::payload(&cell, root.encode())).await.unwrap();
        assert!(matches!(broken, CasOutcome::Applied(_)), "{broken:?}");
    }

    pub fn mover(&self) -> Mover {
        self.mover_at(Instant(0))
    }

    /// A thread whose clock stands still.
    pub fn mover_at(&self, now: Instant) -> Mover {
        Mover::new(self.files.data_luns(), 64 << 10, Box::new(move || now))
    }

    /// Faults of this host's commands, from now on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.paths.iter().for_each(|path| path.set_rates(rates));
    }

    /// Leaves: pools are given back, the slots become free.
    pub async fn unmount(self) {
        self.objects.tidy().await.unwrap();
        self.space.units.drain_pools().await.unwrap();
        for member in self.context.members() {
            let mut own = member.slot.borrow_mut().take().unwrap();
            slot::leave(&self.context.io, &member.lun, &mut own, !member.is_unresolved()).await.unwrap();
        }
    }

    /// What a thread does with a write: in place by itself, the rest through the actor.
    pub async fn write(&self, mover: &mut Mover, file: &OpenFile, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let mut done = 0;
        while done < bytes.len() {
            let (at, rest) = (offset + done as u64, &bytes[done..]);
            let end = at + rest.len() as u64;
            let moved = mover.write(file, at, rest);
            done += moved.bytes;
            let (at, rest) = (offset + done as u64, &bytes[done..]);
            let side = match moved.stop {
                None => Ok(0),
                Some(Stop::Need(Need::Runs)) => self.files.load_runs(file, at..end).await.map(|()| 0),
                Some(Stop::Need(Need::Allocation)) => match self.files.allocate(file, at..end).await {
                    Ok(grant) if grant.is_empty() => Ok(0),
                    Ok(grant) => {
                        let filled = mover.fill(grant, at, rest);
                        assert!(filled.stop.is_none(), "{:?}", filled.stop);
                        Ok(filled.bytes)
                    }
                    Err(error) => Err(error),
                },
                Some(Stop::Need(Need::Inline)) => self.files.write(file, at, rest).await,
                Some(Stop::Need(Need::Extension)) => self.files.extend(file, at).await.map(|()| 0),
                Some(Stop::Gate(GateState::Poisoned)) => Err(FsError::Fenced { lun: LunIndex::new(1).unwrap() }),
                Some(other) => panic!("write at {at} stopped: {other:?}"),
            };
            match side {
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// What a thread does with a read.
    pub async fn read(
        &self,
        mover: &mut Mover,
        file: &OpenFile,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, FsError> {
        let mut bytes = vec![0xa5; length];
        let mut done = 0;
        loop {
            let moved = mover.read(file, offset + done as u64, &mut bytes[done..]);
            done += moved.bytes;
            let at = offset + done as u64;
            match moved.stop {
                None => break,
                Some(Stop::Need(Need::Runs)) => self.files.load_runs(file, at..at + 1).await?,
                Some(Stop::Unlocked) => {
                    let rest = self.files.read(file, at, length - done).await?;
                    bytes[done..done + rest.len()].copy_from_slice(&rest);
                    done += rest.len();
                    break;
                }
                Some(other) => panic!("read at {at} stopped: {other:?}"),
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }
}

const PAGE: u64 = 4096;

/// Bytes of a sparse file.
#[derive(Clone, Default)]
pub struct Model {
    pages: BTreeMap<u64, Vec<u8>>,
    pub size: u64,
}

impl Model {
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.put(offset, bytes);
        self.size = self.size.max(offset + bytes.len() as u64);
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let at = offset + n as u64;
            self.pages.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize])[(at % PAGE) as usize] = *byte;
        }
    }

    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.size);
        let mut at = offset;
        while at < end {
            let stop = end.min((at / PAGE + 1) * PAGE);
            if let Some(page) = self.pages.get_mut(&(at / PAGE)) {
                page[(at % PAGE) as usize..((stop - 1) % PAGE) as usize + 1].fill(0);
            }
            at = stop;
        }
    }

    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = self.size.min(offset + length as u64);
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        let mut at = offset;
        while at < end {
            let stop = end.min((at / PAGE + 1) * PAGE);
            if let Some(page) = self.pages.get(&(at / PAGE)) {
                bytes[(at - offset) as usize..(stop - offset) as usize]
                    .copy_from_slice(&page[(at % PAGE) as usize..((stop - 1) % PAGE) as usize + 1]);
            }
            at = stop;
        }
        bytes
    }
}
