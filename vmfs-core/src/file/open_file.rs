//! Owns: the shared part of an open file, used by every thread that moves its data.
//! Promises: resolving a range takes one read lock, allocates nothing and changes no thread; what is resolved stays the file's until its
//! reference is dropped. Must not know: pointer blocks, commits, how bytes are moved.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use crate::env::Instant;
use crate::error::FsError;
use crate::format::body::DiskFormat;
use crate::format::root_cell::{LunSet, ObjectType};
use crate::gate::{Gate, GateState};
use crate::lun::DataLun;
use crate::mapping::epoch::{References, RunRef, STRIPE_BYTES, stripe_end};
use crate::mapping::runs::{Class, RunMap};
use crate::units::{FdId, Generation, LunIndex};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenMode {
    /// To read.
    pub read: bool,
    /// To write.
    pub write: bool,
    /// Cut to size 0; needs `write`.
    pub truncate: bool,
}

impl OpenMode {
    /// To read only.
    pub const READ: OpenMode = OpenMode { read: true, write: false, truncate: false };
    /// To read and write.
    pub const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };
}

/// What this host may do with the file by the lock it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// No lock: every read goes through `Files::read`, which looks whether anything changed meanwhile.
    Nothing,
    /// A lock to read.
    Reading,
    /// A lock to write.
    Writing,
}

/// The lock's evidence for the gate: generations under which the lock was taken.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) hold: Hold,
    /// LUN of the root cell, with the lock and the heartbeat that vouches for it.
    pub(crate) lock_lun: LunIndex,
    /// Own generation on each LUN that the file may use and that was joined before the lock was taken or last confirmed.
    pub(crate) generations: Vec<(LunIndex, Generation)>,
    /// When it was taken, and the file's size then.
    pub(crate) taken: (Instant, u64),
}

/// What a submission shows at the gate: it was resolved under these generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit {
    /// LUN of the lock.
    pub lock_lun: LunIndex,
    /// Own generation there.
    pub lock_generation: Generation,
    /// LUN of the data.
    pub lun: LunIndex,
    /// Own generation there.
    pub generation: Generation,
}

/// Content of a small file that lives in its body.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inline {
    pub(crate) bytes: Vec<u8>,
    /// Not committed yet.
    pub(crate) dirty: bool,
}

pub(crate) struct MapState {
    pub(crate) runs: RunMap,
    pub(crate) access: Access,
    /// `Some`: the content is here and `runs` is empty.
    pub(crate) inline: Option<Inline>,
}

/// A contiguous piece of a file on a LUN, to be read or written in place while the value lives.
#[derive(Debug)]
pub struct Run {
    /// Where in the file, in bytes.
    pub file_offset: u64,
    /// The LUN.
    pub lun: LunIndex,
    /// Bytes from the LUN's start.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What the gate is asked with, before the submission (and after the arrival of data that was read).
    pub permit: Permit,
    /// Dropped when the command has definitely ended.
    pub reference: RunRef,
}

/// First piece of a range to be read.
#[derive(Debug)]
pub enum ReadSegment {
    /// Read this; the bytes may be used if the gate is open afterwards.
    Data(Run),
    /// This many zeros.
    Zero(u64),
    /// The content is in memory: [`SharedFile::read_inline`].
    Inline,
    /// Not known here, or on a LUN that was joined after the lock was taken: `Files::load_runs` (it waits while the range is being
    /// taken away), then resolve again.
    Unknown,
    /// No lock is held: read through `Files::read`.
    Unlocked,
    /// The file ends before.
    End,
    /// A raw device mapping in physical compatibility: no data is moved here.
    Physical,
}

/// First piece of a range to be written.
#[derive(Debug)]
pub enum WriteSegment {
    /// Write this in place, then [`SharedFile::note_write`], then drop the run.
    Data(Run),
    /// Something must happen on the metadata actor first.
    Need(Need),
}

/// What a writer asks the metadata actor for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `Files::load_runs`: pointer blocks are not in memory, the range is being taken away, or it lies on a LUN that was joined after
    /// the lock was taken.
    Runs,
    /// `Files::allocate`: granules were never written (or another writer fills them).
    Allocation,
    /// `Files::write`: the content is (and stays) in the body.
    Inline,
    /// `Files::extend`: the write begins behind the end of the file.
    Extension,
    /// Not open for writing here, or behind the end of a disk: an error.
    Refused,
    /// A raw device mapping in physical compatibility: an error.
    Physical,
}

/// One open of a file: what [`Files::open`](super::Files::open) gives and `Files::close` takes back.
#[derive(Debug)]
pub struct OpenFile {
    pub(crate) shared: Arc<SharedFile>,
    pub(crate) mode: OpenMode,
    pub(crate) closed: AtomicBool,
}

impl std::ops::Deref for OpenFile {
    type Target = SharedFile;

    fn deref(&self) -> &SharedFile {
        &self.shared
    }
}

impl OpenFile {
    /// How it was opened.
    pub fn mode(&self) -> OpenMode {
        self.mode
    }

    /// What all opens of the object on this host share.
    pub fn shared(&self) -> &Arc<SharedFile> {
        &self.shared
    }
}

/// What is behind an open raw device mapping.
#[derive(Clone)]
pub enum Device {
    /// Virtual compatibility: the data path of the LUN.
    Virtual(Arc<dyn DataLun>),
    /// Physical compatibility: a VMM's business.
    Physical,
}

/// The part that all opens of one object on this host share.
pub struct SharedFile {
    pub(crate) fd: FdId,
    pub(crate) object_type: ObjectType,
    pub(crate) disk: Option<DiskFormat>,
    pub(crate) state: RwLock<MapState>,
    pub(crate) references: Arc<References>,
    pub(crate) size: AtomicU64,
    pub(crate) gate: Gate,
    /// One lock a stripe in turn: shared by writers of whole sectors, exclusive to who reads, patches and writes one.
    pub(crate) edges: [tokio::sync::RwLock<()>; 8],
    /// LUNs with completed plain writes that were not flushed.
    unflushed: [AtomicU64; 4],
    /// Content was written since the last commit of the modification time.
    pub(crate) touched: AtomicBool,
    /// A data command's end is not known: nothing of the file is freed or unlocked before a drain proof.
    pub(crate) doubt: AtomicBool,
    /// First error of a write-back that nobody was told of.
    pub(crate) error: Mutex<Option<FsError>>,
    /// A fill has ended.
    pub(crate) fill_ended: Notify,
    /// Of a raw device mapping, once it was found.
    pub(crate) device: OnceLock<Device>,
}

impl std::fmt::Debug for SharedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedFile").field("fd", &self.fd).field("size", &self.size()).finish_non_exhaustive()
    }
}

impl SharedFile {
    pub(crate) fn new(
        fd: FdId,
        object_type: ObjectType,
        disk: Option<DiskFormat>,
        runs: RunMap,
        access: Access,
        gate: Gate,
    ) -> SharedFile {
        SharedFile {
            fd,
            object_type,
            disk,
            state: RwLock::new(MapState { runs, access, inline: None }),
            references: Arc::default(),
            size: AtomicU64::new(0),
            gate,
            edges: Default::default(),
            unflushed: Default::default(),
            touched: AtomicBool::new(false),
            doubt: AtomicBool::new(false),
            error: Mutex::new(None),
            fill_ended: Notify::new(),
            device: OnceLock::new(),
        }
    }

    /// The object. (Its `link` changes when it moves to another directory; the open file stays.)
    pub fn fd(&self) -> FdId {
        self.fd
    }

    /// File or disk.
    pub fn object_type(&self) -> ObjectType {
        self.object_type
    }

    /// Policy of a virtual disk.
    pub fn disk_format(&self) -> Option<DiskFormat> {
        self.disk
    }

    /// A virtual disk or a raw device mapping: writing does not make it grow; it has one writer, or readers.
    pub fn is_disk(&self) -> bool {
        matches!(self.object_type, ObjectType::Disk | ObjectType::Rdm)
    }

    /// What is behind a raw device mapping.
    pub fn device(&self) -> Option<&Device> {
        self.device.get()
    }

    /// Size in bytes, with growth that is not committed yet.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The end of an earlier change is not known: its bytes may move yet, and it is not written to any more.
    pub fn is_in_doubt(&self) -> bool {
        self.doubt.load(Ordering::Acquire)
    }

    /// What this host may do by the lock it holds now.
    pub fn hold(&self) -> Hold {
        self.state.read().access.hold
    }

    /// Bytes of a granule: a first write fills whole ones.
    pub fn granule_bytes(&self) -> u64 {
        self.state.read().runs.block_size().granule_bytes()
    }

    /// References that data I/O holds now; for status and tests.
    pub fn references_held(&self) -> u64 {
        self.references.held()
    }

    /// Whether a submission with `permit` may be sent at `now` (CLOCK_BOOTTIME): the leases of the lock's LUN and of the target LUN.
    pub fn gate_state(&self, permit: &Permit, now: Instant) -> GateState {
        let lock = self.gate.state(permit.lock_lun, permit.lock_generation, now);
        if permit.lun == permit.lock_lun || lock == GateState::Poisoned {
            return lock;
        }
        match (lock, self.gate.state(permit.lun, permit.generation, now)) {
            (_, GateState::Poisoned) => GateState::Poisoned,
            (GateState::Open, target) => target,
            (lock, _) => lock,
        }
    }

    /// What is asked of the gate for data on `lun`; `None` when this host had no slot there when the lock was taken.
    pub(crate) fn permit(&self, lun: LunIndex) -> Option<Permit> {
        self.state.read().access.permit(lun)
    }

    /// First piece of `offset .. offset + length`. Call again behind it for the rest.
    pub fn read_segment(&self, offset: u64, length: u64) -> ReadSegment {
        let state = self.state.read();
        let size = self.size();
        if state.access.hold == Hold::Nothing {
            return ReadSegment::Unlocked;
        }
        if offset >= size || length == 0 {
            return ReadSegment::End;
        }
        if state.inline.is_some() {
            return ReadSegment::Inline;
        }
        let limit = offset.saturating_add(length).min(size).min(stripe_end(offset));
        if self.object_type == ObjectType::Rdm {
            return match self.device_run(&state, offset..limit) {
                Some(run) => ReadSegment::Data(run),
                None => ReadSegment::Physical,
            };
        }
        let stretch = state.runs.stretch(offset, limit);
        match stretch.class {
            Class::Data { lun, offset: at } => match self.run(&state, lun, at, offset..stretch.end) {
                Some(run) => ReadSegment::Data(run),
                None => ReadSegment::Unknown,
            },
            Class::Unwritten | Class::Filling | Class::Hole => ReadSegment::Zero(stretch.end - offset),
            Class::Unknown => ReadSegment::Unknown,
        }
    }

    /// Calls `each` with the pieces of a range in order until it returns false. Convenience over [`SharedFile::read_segment`]; stops
    /// by itself behind a piece that needs the metadata actor.
    pub fn resolve_read(&self, offset: u64, length: u64, each: &mut dyn FnMut(ReadSegment) -> bool) {
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let segment = self.read_segment(at, end - at);
            let advance = match &segment {
                ReadSegment::Data(run) => run.length,
                ReadSegment::Zero(length) => *length,
                _ => u64::MAX,
            };
            if !each(segment) || advance == u64::MAX {
                return;
            }
            at += advance;
        }
    }

    /// First piece of `offset .. offset + length` for a writer.
    pub fn write_segment(&self, offset: u64, length: u64) -> WriteSegment {
        let state = self.state.read();
        let size = self.size();
        let end = offset.saturating_add(length);
        let behind = self.is_disk() && end > size;
        if state.access.hold != Hold::Writing || behind || self.doubt.load(Ordering::Relaxed) {
            return WriteSegment::Need(Need::Refused);
        }
        if self.object_type == ObjectType::Rdm {
            return match self.device_run(&state, offset..end.min(stripe_end(offset))) {
                Some(run) => WriteSegment::Data(run),
                None => WriteSegment::Need(Need::Physical),
            };
        }
        if state.inline.is_some() {
            let fits = end <= crate::format::body::MAX_INLINE as u64;
            return WriteSegment::Need(if fits { Need::Inline } else { Need::Allocation });
        }
        if offset > size {
            return WriteSegment::Need(Need::Extension);
        }
        let stretch = state.runs.stretch(offset, end.min(stripe_end(offset)));
        match stretch.class {
            Class::Data { lun, offset: at } => match self.run(&state, lun, at, offset..stretch.end) {
                Some(run) => WriteSegment::Data(run),
                None => WriteSegment::Need(Need::Runs),
            },
            Class::Unknown => WriteSegment::Need(Need::Runs),
            Class::Unwritten | Class::Filling | Class::Hole => WriteSegment::Need(Need::Allocation),
        }
    }

    /// A raw device mapping is one run: byte n of the file is byte n of the device. The lease of the lock's LUN vouches for it.
    fn device_run(&self, state: &MapState, file: Range<u64>) -> Option<Run> {
        match self.device.get()? {
            Device::Virtual(_) => self.run(state, state.access.lock_lun, file.start, file),
            Device::Physical => None,
        }
    }

    fn run(&self, state: &MapState, lun: LunIndex, at: u64, file: Range<u64>) -> Option<Run> {
        let permit = state.access.permit(lun)?;
        Some(Run {
            file_offset: file.start,
            lun,
            offset: at,
            length: file.end - file.start,
            permit,
            reference: self.references.take(file.start),
        })
    }

    /// Copies bytes of a file that lives in its body; `None` when it does not (any more): resolve again. Bytes behind the content
    /// and before the end of the file are zeros; the count ends at the end of the file.
    pub fn read_inline(&self, offset: u64, into: &mut [u8]) -> Option<usize> {
        let state = self.state.read();
        let inline = state.inline.as_ref()?;
        let length = (self.size().saturating_sub(offset)).min(into.len() as u64) as usize;
        let into = &mut into[..length];
        into.fill(0);
        let from = inline.bytes.get(offset as usize..).unwrap_or(&[]);
        let count = from.len().min(length);
        into[..count].copy_from_slice(&from[..count]);
        Some(length)
    }

    /// A write to `lun` that ends at file offset `end` is complete (not yet durable). Called before its run is dropped.
    pub fn note_write(&self, lun: LunIndex, end: u64) {
        self.note_unflushed(lun);
        self.note_size(end);
    }

    /// The write that was noted needs no flush (it was durable by itself).
    pub(crate) fn note_size(&self, end: u64) {
        if !self.is_disk() && self.size.load(Ordering::Relaxed) < end {
            self.size.fetch_max(end, Ordering::AcqRel);
        }
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Release);
        }
    }

    pub(crate) fn note_unflushed(&self, lun: LunIndex) {
        let (word, bit) = (usize::from(lun.get()) / 64, 1u64 << (lun.get() % 64));
        if self.unflushed[word].load(Ordering::Acquire) & bit == 0 {
            self.unflushed[word].fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Takes the set of LUNs with unflushed writes: all of them are flushed now, or noted again.
    pub(crate) fn take_unflushed(&self) -> LunSet {
        let mut set = LunSet::default();
        for (word, bits) in self.unflushed.iter().enumerate() {
            let bits = bits.swap(0, Ordering::AcqRel);
            let members = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| (word * 64 + bit) as u8);
            members.filter_map(LunIndex::new).for_each(|lun| set.insert(lun));
        }
        set
    }

    /// Remembers an error of a write-back until it is reported once.
    pub(crate) fn remember_error(&self, error: &FsError) {
        self.error.lock().get_or_insert_with(|| error.clone());
    }

    /// When this host took the lock, and the file's size then.
    pub fn taken(&self) -> (Instant, u64) {
        self.state.read().access.taken
    }

    /// The lock of the sector edges around file offset `offset`.
    pub(crate) fn edge(&self, offset: u64) -> &tokio::sync::RwLock<()> {
        &self.edges[(offset / STRIPE_BYTES) as usize % self.edges.len()]
    }
}

impl Access {
    /// The permit for data on `lun`; `None` when this host had no slot there when the lock was taken or last confirmed.
    pub(crate) fn permit(&self, lun: LunIndex) -> Option<Permit> {
        let generation = |of: LunIndex| self.generations.iter().find(|(lun, _)| *lun == of).map(|(_, g)| *g);
        Some(Permit {
            lock_lun: self.lock_lun,
            lock_generation: generation(self.lock_lun)?,
            lun,
            generation: generation(lun)?,
        })
    }
}
