//! Owns: an open disk whose data its caller moves straight on the LUNs.
//! Promises: resolving allocates nothing, makes no system call and waits for nobody; a segment is never taken away while its
//!   reference lives, neither by a discard nor by a mount that moves it; a grant that is dropped gives its space back.
//! Must not know: how the caller moves its data, the format.
//!
//! The order for every request: resolve, ask the gate, move the data, drop the references; after a read ask the gate again
//! before the data is used. `Unknown` segments need [`DirectFile::load`] first, writes to `Zero` segments [`DirectFile::allocate`],
//! then all granules of the grant are written whole, then [`Grant::filled`]. [`DirectFile::flush`] makes it durable.

use std::fs::OpenOptions;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use luns::Session;
use parking_lot::Mutex;
use vmfs_core::gate::{Gate, GateState};
use vmfs_core::mapping::epoch::{RunRef, stripe_end};
use vmfs_core::units::{Generation, LunIndex};

use super::calls::{MountCalls, OpenDisk, Withdrawn};
use super::following::Following;
use super::lun_table::LunTable;
use super::mounted::{MountedDirectory, ask, connect, connection_error};
use super::ranges::Ranges;
use super::runs::Known;
use super::{Connection, DirectError, DirectErrorKind, io_error};
use crate::clock;
use crate::gate_memory::ReadOnlyGateMemory;
use crate::ioctl::{Run, RunPage, kind, state};
use crate::protocol::{AdminRequest, Attachment, LunAccess, Ticket};

/// How a program moves data on a LUN.
pub enum Access {
    /// By this descriptor, opened for direct I/O.
    Descriptor(OwnedFd),
    /// By this session with the storage.
    Session(Arc<Session>, SessionNumber),
}

/// Names a session to the mount that has lent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionNumber(pub u64);

impl Access {
    /// The descriptor, if there is one.
    pub fn descriptor(&self) -> Option<&OwnedFd> {
        match self {
            Access::Descriptor(descriptor) => Some(descriptor),
            Access::Session(..) => None,
        }
    }
}

/// One LUN behind a disk.
pub struct Lun {
    /// How this program moves data.
    pub access: Access,
    /// Alignment of offset, length and memory, in bytes.
    pub alignment: u32,
    /// Path or URL as given to mount, for messages.
    pub name: String,
    /// Its index in the volume.
    pub index: LunIndex,
    /// The generation of this host's slot there when the disk was opened.
    pub generation: Generation,
}

/// A piece of a resolved range.
#[derive(Debug)]
pub enum Segment {
    /// Lies on a LUN: read and write in place, with the reference held until the I/O has definitely ended.
    Data {
        /// Position, see [`DirectFile::lun`].
        lun: usize,
        /// First byte on that LUN.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Keeps the bytes from being taken away. Holding one, never wait for a call of this module.
        reference: RunRef,
    },
    /// Reads as zeros; a write calls [`DirectFile::allocate`] first.
    Zero {
        /// Bytes.
        length: u64,
    },
    /// Call [`DirectFile::load`] and resolve again.
    Unknown {
        /// Bytes.
        length: u64,
    },
}

/// Granules to be written whole: the caller's bytes with zeros around them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantPiece {
    /// First byte in the file, a multiple of the granule.
    pub file_offset: u64,
    /// Bytes, a multiple of the granule.
    pub length: u64,
    /// Position, see [`DirectFile::lun`].
    pub lun: usize,
    /// First byte on that LUN.
    pub offset: u64,
}

/// Space for a first write. Dropping it gives the space back: do that only when nothing of it is being written any more.
pub struct Grant<F: Deref<Target = DirectFile>> {
    file: F,
    id: u64,
    pieces: Vec<GrantPiece>,
    range: Range<u64>,
    done: bool,
}

/// What a mount says about an open disk, and the way to ask it for more.
pub struct DiskParts {
    /// The LUNs behind it.
    pub luns: Vec<Lun>,
    /// The mount.
    pub mount: Box<dyn MountCalls>,
    /// The disk's data file, for messages.
    pub path: PathBuf,
    /// Opened for writing.
    pub writable: bool,
    /// Bytes.
    pub size: u64,
    /// Bytes of a granule, a power of two.
    pub granule: u64,
    /// Bytes of a block, a power of two.
    pub block: u64,
    /// The gate page.
    pub gate: Gate,
    /// The LUN, one of `luns`, that vouches for the lock.
    pub lock_lun: LunIndex,
}

/// An open disk of a mount.
pub struct DirectFile {
    // It ends first: nobody waits for what it was to let go of.
    following: Option<Following>,
    // The descriptors are dropped before the mount's calls, whose end lets the mount release the lock.
    luns: LunTable,
    mount: Box<dyn MountCalls>,
    path: PathBuf,
    writable: bool,
    size: AtomicU64,
    granule: u64,
    block: u64,
    gate: Gate,
    lock: (LunIndex, Generation),
    ranges: Arc<Ranges>,
}

/// As many bytes are asked for at least: their runs come with one call.
const LOAD_AHEAD: u64 = 256 << 20;

impl DirectFile {
    /// Opens a disk's data file and takes its lock. Kind `NotVmfs` or `NotDirect`: use plain file I/O. `Busy` says who holds it.
    pub fn open(path: &Path, write: bool) -> Result<DirectFile, DirectError> {
        let file = match OpenOptions::new().read(true).write(write).open(path) {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(busy(path)),
            Err(error) => return Err(io_error(path, "opening it", &error)),
        };
        let answer = ask(path, &file)?;
        if answer.kind != kind::DISK {
            return Err(not_direct(path, "it is no virtual disk: other files have no runs that stay".to_owned()));
        }
        let ticket = Ticket(answer.ticket);
        let mut connection = connect(path, &answer).map_err(|error| connection_error(path, &error))?;
        let (attachment, [gate, revoke, recalls]) =
            connection.attach(ticket).map_err(|error| connection_error(path, &error))?;
        let memory = ReadOnlyGateMemory::map(gate.as_fd()).map_err(|error| io_error(path, "its gate page", &error))?;
        let gate = Gate::open(Arc::new(memory)).map_err(|error| broken(path, error.to_string()))?;
        let luns = open_luns((path, ticket, write), &mut connection, &attachment, &[])?;
        let lock_lun = LunIndex::new(attachment.lock_lun)
            .ok_or_else(|| broken(path, format!("the mount says that LUN {} holds its lock", attachment.lock_lun)))?;
        let ended = connection.socket().try_clone().map_err(|error| io_error(path, "its socket", &error))?;
        let connection = Arc::new(Mutex::new(connection));
        let asking = connection.clone();
        let mut disk = DirectFile::from_parts(DiskParts {
            luns,
            mount: Box::new(OpenDisk { revoke, connection, file, ticket, path: path.to_owned(), writable: write }),
            path: path.to_owned(),
            writable: write,
            size: answer.size.get(),
            granule: answer.granule_bytes.get().into(),
            block: answer.block_bytes.get().into(),
            gate,
            lock_lun,
        })?;
        let ask = move |let_go| asking.lock().recalled(ticket, let_go).map_err(std::io::Error::other);
        let following = Following::start(disk.ranges.clone(), recalls, ended, Box::new(ask));
        disk.following = Some(following.map_err(|error| io_error(path, "the thread that follows its moves", &error))?);
        Ok(disk)
    }

    /// An open disk of anything that answers as a mount does.
    ///
    /// # Errors
    /// Kind `Io`: the parts contradict each other.
    pub fn from_parts(parts: DiskParts) -> Result<DirectFile, DirectError> {
        let DiskParts { luns, mount, path, writable, size, granule, block, gate, lock_lun } = parts;
        let luns = LunTable::new(luns).map_err(|twice| broken(&path, format!("the mount names {twice} twice")))?;
        let Some(lock) = luns.iter().find(|lun| lun.index == lock_lun).map(|lun| (lun.index, lun.generation)) else {
            return Err(broken(&path, "the mount does not say which LUN vouches for the lock".to_owned()));
        };
        if granule < 512 || !granule.is_power_of_two() || !block.is_power_of_two() || block < granule {
            return Err(broken(&path, format!("the mount says granules of {granule} and blocks of {block} bytes")));
        }
        Ok(DirectFile {
            following: None,
            luns,
            mount,
            path,
            writable,
            size: AtomicU64::new(size),
            granule,
            block,
            gate,
            lock,
            ranges: Arc::default(),
        })
    }

    /// The disk's data file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes, as of the open or the last [`DirectFile::refresh_size`].
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Asks the mount for the size: a disk may be extended while it is open.
    pub fn refresh_size(&self) -> Result<u64, DirectError> {
        let size = self.mount.size().map_err(|error| self.error("its size", &error))?;
        self.size.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Bytes of a granule: the unit of a first write.
    pub fn granule_bytes(&self) -> u64 {
        self.granule
    }

    /// Bytes of a block: the unit in which space is taken.
    pub fn block_bytes(&self) -> u64 {
        self.block
    }

    /// The LUNs behind the disk, by position. Some may come while it is open; none goes.
    pub fn luns(&self) -> impl Iterator<Item = &Lun> {
        self.luns.iter()
    }

    /// The LUN at a position that a segment or a piece of a grant named.
    ///
    /// # Panics
    /// When nothing named it.
    pub fn lun(&self, position: usize) -> &Lun {
        self.luns.get(position).expect("positions come from this table")
    }

    /// Why this program has to stop using the disk and close it, once it has to. One system call, never blocks.
    pub fn withdrawn(&self) -> Option<Withdrawn> {
        self.mount.withdrawn()
    }

    /// Whether the lock is vouched for. No lock, no system call.
    pub fn lock_gate(&self) -> GateState {
        self.gate.state(self.lock.0, self.lock.1, clock::now())
    }

    /// Whether a request on the LUN at position `lun` may be sent, or the data that a read brought may be used. No lock, no system call.
    pub fn gate(&self, lun: usize) -> GateState {
        let now = clock::now();
        let locked = self.gate.state(self.lock.0, self.lock.1, now);
        match self.lun(lun) {
            target if target.index == self.lock.0 => locked,
            target => worse(locked, self.gate.state(target.index, target.generation, now)),
        }
    }

    /// Registers a session with the storage anew, which has forgotten it, and has the mount say that it lives: no data may go over it before.
    /// Blocks.
    pub fn readmit(&self, lun: usize) -> Result<(), DirectError> {
        let lun = self.lun(lun);
        let Access::Session(session, number) = &lun.access else { return Ok(()) };
        session.register().map_err(|failure| broken(&self.path, failure.why))?;
        let confirmed = self.mount.confirm_session(lun.index, *number, session.place());
        confirmed.map_err(|error| {
            session.withdraw();
            self.error("asking whether this host still lives", &error)
        })
    }

    /// Calls `each` with the segments of a range, ascending; together they are as long as the range. A segment never crosses a
    /// multiple of 16 MiB of the file. `each` must not call this module.
    pub fn resolve(&self, offset: u64, length: u64, each: &mut dyn FnMut(Segment)) {
        let end = offset.saturating_add(length);
        let cache = self.ranges.cache.read();
        let mut at = offset;
        while at < end {
            let (known, known_end) = cache.at(at, end.min(stripe_end(at)));
            let length = known_end - at;
            each(match known {
                Known::Data { lun, offset } => match self.luns.position(lun) {
                    None => Segment::Unknown { length },
                    Some(lun) => {
                        let reference = self.ranges.references.take(at);
                        Segment::Data { lun, offset, length, reference }
                    }
                },
                Known::Zero => Segment::Zero { length },
                Known::Unknown => Segment::Unknown { length },
            });
            at = known_end;
        }
    }

    /// Asks the mount where a range lies. Blocks for the time of one call; the range may still be `Unknown` in parts when it is
    /// long or is being discarded: resolve again, and yield in between.
    pub fn load(&self, offset: u64, length: u64) -> Result<(), DirectError> {
        let version = self.ranges.cache.read().version();
        let mut page = RunPage::request(offset, length.max(LOAD_AHEAD));
        self.mount.extents(&mut page).map_err(|error| self.error("asking where it lies", &error))?;
        let mut found = Vec::new();
        for run in page.answered() {
            let range = run.offset.get()..run.offset.get().saturating_add(run.length.get());
            let known = match run.state.get() {
                state::ZERO => Known::Zero,
                state::DATA => self.data(run)?.1,
                other => return Err(broken(&self.path, format!("a run in the unknown state {other}"))),
            };
            found.push((range, known));
        }
        let mut cache = self.ranges.cache.write();
        if self.ranges.is_closed() {
            return Err(self.error("asking where it lies", &std::io::Error::other(Withdrawn::MountEnded)));
        }
        if cache.version() == version {
            found.into_iter().for_each(|(range, known)| cache.learn(range, known));
        }
        Ok(())
    }

    /// Space for a first write of a range. `None`: nothing has to be filled, resolve again. A grant may cover less than was asked
    /// for ([`Grant::range`]). Waits while another request of this program fills or discards a part of the range; it blocks
    /// for the time of one call.
    pub async fn allocate(&self, offset: u64, length: u64) -> Result<Option<Grant<&DirectFile>>, DirectError> {
        DirectFile::allocate_for(self, offset, length).await
    }

    /// As [`DirectFile::allocate`], with a grant that any thread can hold: `file` is for example an [`Arc`].
    pub async fn allocate_for<F>(file: F, offset: u64, length: u64) -> Result<Option<Grant<F>>, DirectError>
    where
        F: Deref<Target = DirectFile>,
    {
        let start = offset - offset % file.granule;
        let end = offset.saturating_add(length).next_multiple_of(file.granule);
        let range = start..end;
        file.ranges.begin(&range).await;
        let mut grant = Grant { file, id: 0, pieces: Vec::new(), range: range.clone(), done: false };
        let file = &*grant.file;
        let mut page = RunPage::request(offset, length);
        file.mount.allocate(&mut page).map_err(|error| file.error("taking space", &error))?;
        grant.id = page.epoch_or_grant.get();
        for run in page.answered() {
            if let (lun, Known::Data { offset, .. }) = file.data(run)? {
                let (file_offset, length) = (run.offset.get(), run.length.get());
                grant.pieces.push(GrantPiece { file_offset, length, lun, offset });
            }
        }
        if grant.id == 0 {
            file.ranges.cache.write().forget(range);
            return Ok(None);
        }
        Ok(Some(grant))
    }

    /// Makes everything written so far durable and publishes what was filled. Blocks.
    pub fn flush(&self) -> Result<(), DirectError> {
        self.mount.flush().map_err(|error| self.error("flushing it", &error))
    }

    /// Makes a range read as zeros and gives its space back. Waits until no reference overlaps it; then it blocks for one call.
    pub async fn punch(&self, offset: u64, length: u64) -> Result<(), DirectError> {
        let taken = self.ranges.take(offset..offset.saturating_add(length)).await;
        let result = self.mount.punch(offset, length);
        drop(taken);
        result.map_err(|error| self.error("discarding", &error))
    }

    /// Where a run lies: position of its LUN, and what to remember. A LUN that is not known yet is asked for.
    fn data(&self, run: &Run) -> Result<(usize, Known), DirectError> {
        let nowhere = || broken(&self.path, format!("the mount names LUN {}, which cannot be", run.lun));
        let lun = u8::try_from(run.lun.get()).map_err(|_| nowhere())?;
        let known = Known::Data { lun, offset: run.lun_offset.get() };
        if let Some(position) = self.luns.position(lun) {
            return Ok((position, known));
        }
        let _one = self.luns.growing.lock();
        if self.luns.position(lun).is_none() {
            let present: Vec<LunIndex> = self.luns.iter().map(|lun| lun.index).collect();
            for lun in self.mount.more_luns(&present).map_err(|error| self.error("its further LUNs", &error))? {
                self.luns.push(lun);
            }
        }
        let position = self.luns.position(lun).ok_or_else(nowhere)?;
        Ok((position, known))
    }

    fn error(&self, doing: &str, error: &std::io::Error) -> DirectError {
        io_error(&self.path, doing, error)
    }
}

impl<F: Deref<Target = DirectFile>> Grant<F> {
    /// What has to be written.
    pub fn pieces(&self) -> &[GrantPiece] {
        &self.pieces
    }

    /// The part of the file that was looked at, in whole granules.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Everything in [`Grant::pieces`] has been written: the granules are the disk's from now on.
    pub fn filled(mut self) -> Result<(), DirectError> {
        self.done = true;
        let result = self.file.mount.filled(self.id, true);
        if result.is_ok() {
            let mut cache = self.file.ranges.cache.write();
            for piece in &self.pieces {
                let known = Known::Data { lun: self.file.lun(piece.lun).index.get(), offset: piece.offset };
                cache.set(piece.file_offset..piece.file_offset + piece.length, known);
            }
        }
        result.map_err(|error| self.file.error("telling that a granule was written", &error))
    }
}

impl<F: Deref<Target = DirectFile>> Drop for Grant<F> {
    fn drop(&mut self) {
        if !self.done
            && self.id != 0
            && let Err(error) = self.file.mount.filled(self.id, false)
        {
            tracing::warn!("{}: space of a write that was given up: {error}", self.file.path.display());
        }
        self.file.ranges.end(&self.range);
    }
}

fn worse(one: GateState, other: GateState) -> GateState {
    match (one, other) {
        (GateState::Poisoned, _) | (_, GateState::Poisoned) => GateState::Poisoned,
        (GateState::Frozen, _) | (_, GateState::Frozen) => GateState::Frozen,
        (GateState::Open, GateState::Open) => GateState::Open,
    }
}

fn broken(path: &Path, message: String) -> DirectError {
    DirectError { kind: DirectErrorKind::Io, path: path.to_owned(), message, errno: None }
}

/// The error for a disk that could not be opened because it is open elsewhere: it says where.
fn busy(path: &Path) -> DirectError {
    let explained = MountedDirectory::of_file(path).and_then(|(directory, file)| {
        let answer = directory.connect()?.administer(AdminRequest::WhyLocked { file }, &mut |_, _| ());
        let value = answer.map_err(|error| connection_error(path, &error))?;
        Ok(value["explanation"].as_str().unwrap_or("it is in use").to_owned())
    });
    match explained {
        Ok(message) => {
            DirectError { kind: DirectErrorKind::Busy, path: path.to_owned(), message, errno: Some(libc::EBUSY) }
        }
        Err(error) => DirectError {
            kind: DirectErrorKind::Busy,
            message: format!("it is in use, and who has it could not be found out: {}", error.message),
            ..error
        },
    }
}

/// Opens the LUNs of an attachment that are not among `present`, of a disk at a path with its ticket, to be written or not.
pub(super) fn open_luns(
    (path, ticket, writable): (&Path, Ticket, bool),
    connection: &mut Connection,
    attachment: &Attachment,
    present: &[LunIndex],
) -> Result<Vec<Lun>, DirectError> {
    let mut luns: Vec<Lun> = Vec::with_capacity(attachment.luns.len());
    for access in &attachment.luns {
        let LunAccess { index, generation, alignment, has_descriptor, has_session, name } = access;
        let Some(lun) = LunIndex::new(*index) else {
            return Err(broken(path, format!("the mount names a LUN number {index}, which cannot be")));
        };
        if present.contains(&lun) {
            continue;
        }
        let access = if *has_descriptor {
            let descriptor = connection.open_lun(ticket, *index).map_err(|error| connection_error(path, &error))?;
            Access::Descriptor(descriptor)
        } else if *has_session {
            open_session((path, ticket, writable), connection, *index)?
        } else {
            return Err(not_direct(
                path,
                format!("{name} has neither a descriptor nor a session that a program could use"),
            ));
        };
        luns.push(Lun {
            access,
            alignment: *alignment,
            name: name.clone(),
            index: lun,
            generation: Generation(*generation),
        });
    }
    Ok(luns)
}

fn open_session(
    (path, ticket, writable): (&Path, Ticket, bool),
    connection: &mut Connection,
    lun: u8,
) -> Result<Access, DirectError> {
    let (number, pass) = connection.open_session(ticket, lun).map_err(|error| connection_error(path, &error))?;
    // A program that cannot reach the storage by itself goes through the mount, which can.
    let session = Session::open(&pass.0, !writable).map_err(|failure| not_direct(path, failure.why))?;
    // The registration first, the slot second: a breaker that came before has claimed the slot by now, one that comes later finds the key.
    connection.confirm_session(ticket, lun, number, session.place()).map_err(|error| {
        session.withdraw();
        connection_error(path, &error)
    })?;
    Ok(Access::Session(Arc::new(session), SessionNumber(number)))
}

fn not_direct(path: &Path, message: String) -> DirectError {
    DirectError { kind: DirectErrorKind::NotDirect, path: path.to_owned(), message, errno: None }
}
