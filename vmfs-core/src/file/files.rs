//! Owns: the table of files open on this host, opening and closing, and with them the lock by kind.
//! Promises: one shared part per object; the lock is held as long as somebody needs it and released only when all data I/O has ended.
//! Must not know: names, how bytes are moved by other threads.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;

use super::allocate::in_doubt;
use super::cells::CellCache;
use super::mover::DataLuns;
use super::open_file::{Access, Hold, Inline, OpenFile, OpenMode, SharedFile};
use super::recall::BorrowersCell;
use crate::alloc::Space;
use crate::context::Context;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Attributes, Content};
use crate::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectState, ObjectType};
use crate::lun::{Lun, RawDevices};
use crate::mapping::allocate::Sequence;
use crate::mapping::runs::{DEFAULT_CLEAN_EXTENTS, RunMap};
use crate::mapping::tree::{InnerCache, Shape};
use crate::object::{Object, Objects};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, FdId, Generation, LunIndex};

/// The files open on this host, on the metadata actor.
pub struct Files {
    pub(super) context: Rc<Context>,
    pub(super) space: Rc<Space>,
    pub(super) objects: Rc<Objects>,
    pub(super) shape: Shape,
    luns: Arc<DataLuns>,
    table: RefCell<HashMap<FdId, Rc<Open>>>,
    /// Objects with a data command whose end is not known: they are not written, freed or unlocked by this mount any more.
    doubtful: RefCell<HashSet<FdId>>,
    pub(super) devices: RefCell<Option<Rc<dyn RawDevices>>>,
    pub(super) borrowers: BorrowersCell,
}

/// The actor's half of an open file.
pub(super) struct Open {
    pub(super) shared: Arc<SharedFile>,
    pub(super) object: Rc<Object>,
    /// Opens and closes go one after another.
    pub(super) turn: Mutex<()>,
    /// Held by whoever changes pointers, the size or the body.
    pub(super) change: Mutex<()>,
    /// Held by whoever takes blocks for the file.
    pub(super) taking: Mutex<Taking>,
    pub(super) cells: RefCell<CellCache>,
    pub(super) inner: InnerCache,
    readers: Cell<u32>,
    writers: Cell<u32>,
    /// Data blocks gained or lost since the body was committed.
    pub(super) blocks_delta: Cell<i64>,
    /// Time of the last write that is not committed.
    pub(super) modified: Cell<Option<i64>>,
    /// Nothing that was ever written lies in whole granules behind the end of the file.
    pub(super) clean_beyond: Cell<bool>,
    /// The LUN of a raw device mapping, once it was found.
    pub(super) device: RefCell<Option<Rc<dyn Lun>>>,
}

/// Blocks taken ahead of a writer: in the block table they name their place in the file, no pointer names them.
#[derive(Default)]
pub(super) struct Taking {
    pub(super) sequence: Sequence,
    pub(super) spares: BTreeMap<u64, BlockAddress>,
}

/// The object has no name any more and lives only for those who have it open on this host: nobody else changes it.
pub(super) fn is_unlinked(open: &Open) -> bool {
    matches!(open.object.image().root.state, ObjectState::Unlinked(_))
}

/// The content is written now: its time of change is taken when somebody asks.
pub(super) fn touch(open: &Open) {
    open.shared.touched.store(true, Ordering::Release);
}

impl Open {
    /// Whether it is open once, for writing.
    pub(super) fn is_only_writer(&self) -> bool {
        (self.readers.get(), self.writers.get()) == (0, 1)
    }
}

impl Files {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, space: Rc<Space>, objects: Rc<Objects>) -> Files {
        let luns = Arc::new(DataLuns::default());
        let shape = Shape::new(context.cell_size());
        let files = Files {
            context,
            space,
            objects,
            shape,
            luns,
            table: RefCell::default(),
            doubtful: RefCell::default(),
            devices: RefCell::default(),
            borrowers: RefCell::default(),
        };
        files.refresh_luns();
        files
    }

    /// The data paths of the volume's LUNs, for [`super::Mover`].
    pub fn data_luns(&self) -> Arc<DataLuns> {
        self.luns.clone()
    }

    /// Members were added: their data paths become known to all threads.
    pub fn refresh_luns(&self) {
        for member in self.context.members() {
            if self.luns.get(member.index).is_none() {
                self.luns.insert(member.index, member.lun.data());
            }
        }
    }

    /// The shared part of a file that is open on this host.
    pub fn opened(&self, fd: FdId) -> Option<Arc<SharedFile>> {
        self.table.borrow().get(&fd).map(|open| open.shared.clone())
    }

    /// All files that are open on this host.
    pub fn all_open(&self) -> Vec<Arc<SharedFile>> {
        self.table.borrow().values().map(|open| open.shared.clone()).collect()
    }

    /// Whether no data under the locks that lie on `lun` is on its way, of files that are closed by now too. The gate of that LUN is
    /// poisoned for good: none begins any more.
    pub(crate) fn is_drained(&self, lun: LunIndex) -> bool {
        if self.is_in_doubt_on(lun) && !active(Sabotage::ClosedForgotten) {
            return false;
        }
        let under = |open: &&Rc<Open>| open.shared.state.read().access.lock_lun == lun;
        self.table
            .borrow()
            .values()
            .filter(under)
            .all(|open| open.shared.references.held() == 0 && !open.shared.doubt.load(Ordering::Acquire))
    }

    pub(super) fn all(&self) -> Vec<Rc<Open>> {
        let mut all: Vec<Rc<Open>> = self.table.borrow().values().cloned().collect();
        all.sort_by_key(|open| open.shared.fd);
        all
    }

    /// The open file of an object that this host holds for writing.
    pub(super) fn held_for_writing(&self, object: &Object) -> Option<Rc<Open>> {
        self.table.borrow().get(&object.fd).filter(|open| open.shared.hold() == Hold::Writing).cloned()
    }

    pub(super) fn find(&self, file: &SharedFile) -> Result<Rc<Open>, FsError> {
        let found = self.table.borrow().get(&file.fd).cloned();
        found
            .filter(|open| std::ptr::eq(&*open.shared, file))
            .ok_or_else(|| FsError::refused(FsErrorKind::Invalid, format!("{} is not open any more", file.fd)))
    }

    /// Opens a file or disk and takes the lock that its kind needs (format and protocol, section 6, "Locks by kind"): disks exclusive
    /// to write and shared to read, other files exclusive between hosts to write. `Busy` says who holds it.
    pub async fn open(&self, object: &Rc<Object>, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
        loop {
            let open = self.entry(object)?;
            let _turn = open.turn.lock().await;
            if !self.is_listed(&open) {
                // It was closed for the last time while this waited for its turn.
                continue;
            }
            let opened = self.open_in_turn(&open, mode).await;
            if opened.is_err() {
                self.forget_if_closed(&open);
            }
            return opened;
        }
    }

    fn is_listed(&self, open: &Rc<Open>) -> bool {
        self.table.borrow().get(&open.shared.fd).is_some_and(|listed| Rc::ptr_eq(listed, open))
    }

    async fn open_in_turn(&self, open: &Rc<Open>, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
        let write = mode.write || mode.truncate;
        if write && (self.is_doubtful(open.shared.fd) || open.shared.doubt.load(Ordering::Acquire)) {
            return Err(in_doubt(open));
        }
        self.check_same_host(open, write)?;
        self.find_device(open, write).await?;
        match (self.needed(open, write), open.shared.hold()) {
            (None, _) | (Some(_), Hold::Writing) => {}
            (Some(HoldMode::Shared), Hold::Reading) => {}
            (Some(wanted), _) => self.lock(open, wanted).await?,
        }
        if self.needed(open, write).is_none() && open.shared.hold() == Hold::Nothing {
            self.refresh(open).await?;
            self.take_over_body(open);
        }
        let count = if write { &open.writers } else { &open.readers };
        count.set(count.get() + 1);
        let file = Arc::new(OpenFile { shared: open.shared.clone(), mode, closed: AtomicBool::new(false) });
        if mode.truncate
            && let Err(error) = self.set_size(&file, 0).await
        {
            let closed = self.close_in_turn(open, write).await;
            closed.and(Err(error))?;
        }
        Ok(file)
    }

    fn entry(&self, object: &Rc<Object>) -> Result<Rc<Open>, FsError> {
        if let Some(open) = self.table.borrow().get(&object.fd) {
            return Ok(open.clone());
        }
        let image = object.image();
        let object_type = match image.root.object_type {
            Some(kind @ (ObjectType::File | ObjectType::Disk | ObjectType::Rdm)) => kind,
            Some(ObjectType::Directory) => {
                return Err(FsError::refused(FsErrorKind::IsDirectory, format!("{} is a directory", object.fd)));
            }
            _ => return Err(FsError::refused(FsErrorKind::Invalid, format!("{} has no file data", object.fd))),
        };
        let runs = RunMap::new(self.context.block_size(), DEFAULT_CLEAN_EXTENTS);
        let taken = (self.context.env().now(), image.body.attributes.size);
        let access = Access { hold: Hold::Nothing, lock_lun: object.fd.lun(), generations: Vec::new(), taken };
        let disk = image.body.attributes.disk;
        let gate = self.context.gate_reader();
        let open = Rc::new(Open {
            shared: Arc::new(SharedFile::new(object.fd, object_type, disk, runs, access, gate)),
            object: object.clone(),
            turn: Mutex::default(),
            change: Mutex::default(),
            taking: Mutex::default(),
            cells: RefCell::default(),
            inner: InnerCache::default(),
            readers: Cell::new(0),
            writers: Cell::new(0),
            blocks_delta: Cell::new(0),
            modified: Cell::new(None),
            clean_beyond: Cell::new(false),
            device: RefCell::default(),
        });
        self.take_over_body(&open);
        self.table.borrow_mut().insert(object.fd, open.clone());
        Ok(open)
    }

    /// A disk is open for writing once on this host too, unless it has the multi-writer flag.
    fn check_same_host(&self, open: &Open, write: bool) -> Result<(), FsError> {
        let shared = &open.shared;
        let several = open.object.image().root.flags.contains(ObjectFlags::MULTI_WRITER);
        if !shared.is_disk() || several {
            return Ok(());
        }
        let (readers, writers) = (open.readers.get(), open.writers.get());
        if writers > 0 || (write && readers > 0) {
            let how = if writers > 0 { "writing" } else { "reading" };
            let message = format!("disk {} is open for {how} on this host; close it there first", shared.fd);
            return Err(FsError::refused(FsErrorKind::Busy, message));
        }
        Ok(())
    }

    /// Reads the object again, unless it has lost its name on this host.
    pub(super) async fn refresh(&self, open: &Open) -> Result<(), FsError> {
        if is_unlinked(open) { Ok(()) } else { self.objects.refresh(&open.object).await }
    }

    pub(super) fn is_doubtful(&self, fd: FdId) -> bool {
        self.doubtful.borrow().contains(&fd)
    }

    /// Whether a data command under a lock that lies on `lun` may still be on its way, though the file is closed by now.
    pub(crate) fn is_in_doubt_on(&self, lun: LunIndex) -> bool {
        self.doubtful.borrow().iter().any(|fd| fd.lun() == lun)
    }

    /// The object is free, and what it had is kept from use: its identity may become another one's.
    pub(crate) fn forget_doubt(&self, fd: FdId) {
        self.doubtful.borrow_mut().remove(&fd);
    }

    fn needed(&self, open: &Open, write: bool) -> Option<HoldMode> {
        let flags = open.object.image().root.flags;
        match (open.shared.object_type, write) {
            (ObjectType::Disk, _) if flags.contains(ObjectFlags::MULTI_WRITER) => Some(HoldMode::MultiWriter),
            (_, true) => Some(HoldMode::Exclusive),
            (ObjectType::Disk, false) if self.context.is_read_only() => None,
            (ObjectType::Disk | ObjectType::Rdm, false) => Some(HoldMode::Shared),
            (_, false) => None,
        }
    }

    async fn lock(&self, open: &Rc<Open>, wanted: HoldMode) -> Result<(), FsError> {
        if wanted != HoldMode::Shared && open.object.image().root.flags.contains(ObjectFlags::READ_ONLY_BASE) {
            let message = format!("{} is the base of snapshots and is never written", open.shared.fd);
            return Err(FsError::refused(FsErrorKind::ReadOnly, message));
        }
        // What was joined before the lock is taken counts, of the LUNs that the object may use: whoever breaks the lock looks there.
        let joined = self.joined();
        self.objects.lock(&open.object, wanted).await?;
        if let Err(error) = self.take_device(open, wanted != HoldMode::Shared).await {
            self.objects.unlock(&open.object).await?;
            return Err(error);
        }
        let luns = open.object.image().root.luns;
        let is_used = |lun: LunIndex| lun == open.shared.fd.lun() || luns.contains(lun);
        let generations = joined.into_iter().filter(|(lun, _)| is_used(*lun)).collect();
        self.take_over_body(open);
        let hold = if wanted == HoldMode::Shared { Hold::Reading } else { Hold::Writing };
        let taken = (self.context.env().now(), open.shared.size());
        let mut state = open.shared.state.write();
        state.access = Access { hold, lock_lun: open.shared.fd.lun(), generations, taken };
        Ok(())
    }

    /// The LUNs on which this host has a slot, with its generation there.
    fn joined(&self) -> Vec<(LunIndex, Generation)> {
        let members = self.context.members();
        members.iter().filter_map(|m| Some((m.index, self.context.own_slot(m.index).ok()?.generation))).collect()
    }

    /// Lets an open file use LUNs that were joined after its lock was taken: the lock is confirmed first. Nothing of the file is on them
    /// before, so whoever breaks the lock from the image before looks at all that has to be looked at.
    pub(super) async fn admit(&self, open: &Open, luns: &LunSet) -> Result<(), FsError> {
        let mut generations = Vec::new();
        for lun in luns.iter() {
            generations.push((lun, self.context.own_slot(lun)?.generation));
        }
        self.objects.confirm_lock(&open.object, luns).await?;
        let mut state = open.shared.state.write();
        let access = &mut state.access;
        generations.retain(|(lun, _)| access.permit(*lun).is_none());
        access.generations.extend(generations);
        Ok(())
    }

    /// Starts from the committed body: no run is known, nothing is pending.
    fn take_over_body(&self, open: &Open) {
        let image = open.object.image();
        let mut state = open.shared.state.write();
        state.runs.clear();
        state.inline = match &image.body.content {
            Content::Inline(bytes) => Some(Inline { bytes: bytes.clone(), dirty: false }),
            _ => None,
        };
        open.shared.size.store(image.body.attributes.size, Ordering::Release);
        open.shared.touched.store(false, Ordering::Release);
        open.cells.borrow_mut().clear();
        open.clean_beyond.set(state.inline.is_some());
        open.modified.set(None);
        open.blocks_delta.set(0);
    }

    /// Waits until no data is in flight, then releases the lock. Nothing may be unpublished any more.
    async fn unlock(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let shared = &open.shared;
        let _change = open.change.lock().await;
        let frozen = self.freeze(open, &(0..u64::MAX)).await;
        {
            let mut state = shared.state.write();
            state.access.hold = Hold::Nothing;
            state.runs.clear();
        }
        drop(frozen);
        open.cells.borrow_mut().clear();
        if shared.doubt.load(Ordering::Acquire) {
            self.doubtful.borrow_mut().insert(shared.fd);
            self.objects.keep_lock(shared.fd);
            self.context.member(shared.fd.lun())?.set_unresolved();
            return Err(in_doubt(open));
        }
        if self.is_doubtful(shared.fd) {
            // It was opened again, to read: the lock stays for what an earlier opening left on its way.
            return Ok(());
        }
        self.release_device(shared)?;
        self.objects.unlock(&open.object).await
    }

    /// Closes one open of a file. The last writer publishes, commits size and times, gives back what was taken ahead and (with the last
    /// reader, for a disk) the lock. The file is closed in any case; an error says what could not be written.
    pub async fn close(&self, file: Arc<OpenFile>) -> Result<(), FsError> {
        if file.closed.swap(true, Ordering::AcqRel) {
            return Err(FsError::refused(FsErrorKind::Invalid, format!("{} was closed before", file.fd)));
        }
        let open = self.find(&file)?;
        let _turn = open.turn.lock().await;
        self.close_in_turn(&open, file.mode.write || file.mode.truncate).await
    }

    async fn close_in_turn(&self, open: &Rc<Open>, write: bool) -> Result<(), FsError> {
        let count = if write { &open.writers } else { &open.readers };
        count.set(count.get() - 1);
        let (readers, writers) = (open.readers.get(), open.writers.get());
        let mut result = Ok(());
        if write && writers == 0 {
            let early = if active(Sabotage::UnlockFirst) { self.objects.unlock(&open.object).await } else { Ok(()) };
            result = early.and(self.finish_writing(open).await);
        }
        let held = open.shared.hold();
        let unneeded = match held {
            // A hand-over whose outcome nobody asked for.
            Hold::Nothing => readers + writers == 0 && open.object.is_held() && open.shared.is_disk(),
            Hold::Reading => readers == 0,
            Hold::Writing => writers == 0 && (readers == 0 || open.shared.object_type == ObjectType::File),
        };
        if unneeded {
            let unlocked = self.unlock(open).await;
            result = result.and(unlocked);
            self.take_over_body(open);
        }
        self.forget_if_closed(open);
        result
    }

    /// Closes everything that is still open: the volume is being unmounted. All are closed; the first error is given.
    pub async fn close_all(&self) -> Result<(), FsError> {
        let mut result = Ok(());
        for open in self.all() {
            let _turn = open.turn.lock().await;
            while open.readers.get() + open.writers.get() > 0 {
                let closed = self.close_in_turn(&open, open.writers.get() > 0).await;
                result = result.and(closed);
            }
        }
        result
    }

    /// The one writer is gone, without a close. The caller has the turn.
    pub(super) fn forget_writer(&self, open: &Rc<Open>) {
        open.writers.set(0);
        self.forget_if_closed(open);
    }

    /// The caller has the turn: nobody is about to open it through this entry.
    fn forget_if_closed(&self, open: &Rc<Open>) {
        if open.readers.get() == 0 && open.writers.get() == 0 && self.is_listed(open) {
            self.table.borrow_mut().remove(&open.shared.fd);
        }
    }

    /// Publishes what was written and commits the body; what could not be published is given up and its space freed.
    async fn finish_writing(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let mut result = if is_unlinked(open) || active(Sabotage::PublishForgotten) {
            Ok(())
        } else {
            self.flush_open(open, true).await
        };
        let _change = open.change.lock().await;
        let given_back = self.give_back_unpublished(open).await;
        result = result.and(given_back);
        if let Some(error) = open.shared.error.lock().take() {
            result = result.and(Err(error));
        }
        result
    }

    /// What is not committed yet of an open file's attributes: size, times and blocks.
    pub fn overlay(&self, fd: FdId, attributes: &mut Attributes) {
        let Some(open) = self.table.borrow().get(&fd).cloned() else { return };
        if open.shared.hold() != Hold::Writing {
            return;
        }
        attributes.size = open.shared.size();
        if let Some(modified) = self.modified(&open) {
            attributes.modified_ns = modified;
            attributes.changed_ns = attributes.changed_ns.max(modified);
        }
        let unpublished = open.shared.state.read().runs.unpublished(0).filter(|(_, state)| state.fresh).count();
        attributes.blocks =
            attributes.blocks.saturating_add_signed(open.blocks_delta.get()).saturating_add(unpublished as u64);
    }

    /// When the content was last written, if that is not committed. Writes are dated when somebody asks.
    pub(super) fn modified(&self, open: &Open) -> Option<i64> {
        if open.shared.touched.swap(false, Ordering::AcqRel) {
            open.modified.set(Some(self.context.env().wall_ns()));
        }
        open.modified.get()
    }

    /// The modification time was set by hand: writes before this moment change it no more.
    pub fn times_set(&self, fd: FdId) {
        if let Some(open) = self.table.borrow().get(&fd) {
            open.shared.touched.store(false, Ordering::Release);
            open.modified.set(None);
        }
    }
}
