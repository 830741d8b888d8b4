//! Owns: a disk on a mounted VMFS volume, whose data moves straight between guest memory and the LUNs.
//! Promises: nothing is sent, and no data read is handed over, unless the host's lock is vouched for; a request that meets a
//! closed gate waits and loses nothing. Must not know: descriptors, guests, how the mount allocates.
//!
//! The order of every request: resolve (which takes references on the runs), ask the gate, move the data, drop the references.
//! Calls to the mount block, so they run on the executor's blocking threads; only first writes, discards, flushes and the
//! first look at a range make any.

mod discard;
mod filling;
mod fills;
mod moving;
mod sessions;
mod stretch;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use lockd::client::{Access, DirectError, DirectErrorKind, DirectFile, MountedDirectory, Withdrawn};
use scsi::range_lock::RangeLocks;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, StorageError};
use vmfs_core::gate::GateState;

use self::fills::Fills;
use self::moving::Work;
use self::sessions::SessionLun;
use self::stretch::{Stretch, stretch};
use super::OpenError;
use super::gatekeeper::{Gatekeeper, Guarded};
use super::ring::RingFile;
use super::supervisor::Supervisor;

/// Logical block that guests see, whatever the LUNs' blocks: the sector in which disks are measured.
const LOGICAL_BLOCK: u32 = 512;

/// What a disk shows of itself.
pub(super) struct Appearance {
    pub(super) identity: Identity,
    /// Bytes, if its descriptor says so.
    pub(super) length: Option<u64>,
    /// Space is taken at the first write and can be given back.
    pub(super) thin: bool,
}

/// A LUN behind the disk.
struct LunFile {
    way: Way,
    /// What offset, length and memory of each operation are multiples of.
    alignment: usize,
}

/// How its bytes are moved.
enum Way {
    Ring(RingFile),
    Session(SessionLun),
}

/// A disk on a mounted VMFS volume. It belongs to the thread that made it.
pub struct VmfsDisk {
    // The LUNs' descriptors go before the file, whose end releases the lock.
    luns: RefCell<Vec<Rc<LunFile>>>,
    keeper: Rc<Gatekeeper<DirectFile>>,
    file: Arc<DirectFile>,
    supervisor: Arc<dyn Supervisor>,
    fills: Fills,
    /// Writes that share a block of the LUNs, where that is larger than the logical block.
    blocks: RangeLocks,
    /// One granule of zeros.
    zeros: DataBuffer,
    /// The largest alignment of the LUNs.
    alignment: u64,
    identity: Identity,
    geometry: Geometry,
}

impl VmfsDisk {
    /// A disk over an open file, on the calling thread, which runs a tokio-uring runtime.
    pub(super) fn new(
        file: DirectFile,
        appearance: Appearance,
        supervisor: Arc<dyn Supervisor>,
    ) -> Result<Self, OpenError> {
        let path = file.path().to_owned();
        let Appearance { identity, length, thin } = appearance;
        let alignment = file.luns().map(|lun| u64::from(lun.alignment)).max().unwrap_or(0).max(512);
        let known = length.unwrap_or(file.size());
        if known > file.size() {
            return Err(OpenError::Short { path, length: file.size(), expected: known });
        }
        let bytes = known - known % alignment;
        if bytes == 0 {
            return Err(OpenError::Empty { path, length: known, block: alignment as u32 });
        }
        let luns = file.luns().map(|lun| Ok(Rc::new(LunFile::new(lun)?))).collect::<std::io::Result<_>>();
        let luns = luns.map_err(OpenError::system("use the LUNs of", &path))?;
        let geometry = Geometry {
            logical_block: LOGICAL_BLOCK,
            physical_block: alignment.max(4096) as u32,
            transfer_granularity: alignment.max(4096) as u32,
            blocks: bytes / u64::from(LOGICAL_BLOCK),
            read_only: !file.is_writable(),
            write_cache: true,
            thin: thin && file.is_writable(),
            unmapped_reads_zero: true,
            unmap_granularity: file.granule_bytes() as u32,
            rotational: false,
        };
        let file = Arc::new(file);
        Ok(Self {
            luns: RefCell::new(luns),
            keeper: Gatekeeper::start(file.clone(), supervisor.clone()),
            supervisor,
            zeros: DataBuffer::zeroed(file.granule_bytes() as usize, 4096),
            file,
            fills: Fills::default(),
            blocks: RangeLocks::default(),
            alignment,
            identity,
            geometry,
        })
    }

    /// The block of the LUNs in bytes: the unit of all I/O.
    pub(super) fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Bytes at the end of the file that the guest does not see: less than a block of the LUNs, or what its descriptor leaves out.
    pub(super) fn hidden_bytes(&self) -> u64 {
        self.file.size() - self.geometry.bytes()
    }

    /// The smallest range of whole blocks of the LUNs around a range.
    fn widened(&self, start: u64, length: u64) -> ByteRange {
        let first = start - start % self.alignment;
        ByteRange { start: first, length: (start + length).next_multiple_of(self.alignment) - first }
    }

    /// The LUN at a position. One that came while the disk was open is opened for this thread at its first use.
    fn lun(&self, position: usize) -> std::io::Result<Rc<LunFile>> {
        let mut luns = self.luns.borrow_mut();
        while luns.len() <= position {
            let lun = LunFile::new(self.file.lun(luns.len()))?;
            if lun.alignment as u64 > self.alignment {
                return Err(std::io::Error::other(format!(
                    "a LUN with blocks of {} bytes came to a disk that is used in blocks of {}: start the VM again",
                    lun.alignment, self.alignment
                )));
            }
            luns.push(Rc::new(lun));
        }
        Ok(luns[position].clone())
    }

    /// Reads whole blocks of the LUNs.
    async fn get(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        let mut done = 0;
        while done < buffer.len() {
            let (at, rest) = (position + done as u64, (buffer.len() - done) as u64);
            match stretch(&self.file, at, rest) {
                Stretch::Data(batch) => done += self.carry_out(Work::Read(buffer), batch, done, position).await?,
                Stretch::Zero(length) if self.keeper.lock_state() == GateState::Open => {
                    let end = done + length as usize;
                    buffer.fill_zero(done..end);
                    done = end;
                }
                Stretch::Zero(_) => self.keeper.pass(None).await?,
                Stretch::Unknown(length) => self.load(at, length).await?,
            }
        }
        Ok(())
    }

    /// Writes whole blocks of the LUNs.
    async fn put(&self, position: u64, buffer: &DataBuffer, durable: bool) -> Result<(), StorageError> {
        let work = Work::Write { data: buffer, durable };
        let mut done = 0;
        while done < buffer.len() {
            let (at, rest) = (position + done as u64, (buffer.len() - done) as u64);
            match stretch(&self.file, at, rest) {
                Stretch::Data(batch) => done += self.carry_out(work, batch, done, position).await?,
                Stretch::Zero(length) => done += self.fill(at, &buffer.slice(done..done + length as usize)).await?,
                Stretch::Unknown(length) => self.load(at, length).await?,
            }
        }
        // What a first write has put down is not reachable, so not durable, before it is published.
        if durable && self.fills.has_unpublished() {
            self.publish().await?;
        }
        Ok(())
    }

    /// Writes a range of which a block of the LUNs is a part only: those blocks are read, changed and written.
    async fn put_in_part(&self, position: u64, buffer: &DataBuffer, durable: bool) -> Result<(), StorageError> {
        let whole = self.widened(position, buffer.len() as u64);
        let _alone = self.blocks.exclusive(whole).await;
        let bounce = DataBuffer::zeroed(whole.length as usize, self.alignment as usize);
        let block = self.alignment as usize;
        self.get(whole.start, &bounce.slice(0..block)).await?;
        if bounce.len() > block {
            self.get(whole.end() - self.alignment, &bounce.slice(bounce.len() - block..bounce.len())).await?;
        }
        let skip = (position - whole.start) as usize;
        bounce.slice(skip..skip + buffer.len()).copy_from_buffer(buffer);
        self.put(whole.start, &bounce, durable).await
    }

    fn is_whole(&self, position: u64, length: u64) -> bool {
        (position | length) & (self.alignment - 1) == 0
    }

    /// Makes everything written so far durable and reachable.
    async fn publish(&self) -> Result<(), StorageError> {
        self.keeper.pass(None).await?;
        let settled = self.fills.settled();
        let file = self.file.clone();
        // Not repeated after an error: the mount tells each error once, and a second flush could hide it.
        blocking(move || file.flush()).await.map_err(|error| self.refused(0, &error))?;
        self.fills.publish(settled);
        Ok(())
    }

    /// Asks the mount where a range lies.
    async fn load(&self, position: u64, length: u64) -> Result<(), StorageError> {
        self.keeper.pass(None).await?;
        let file = self.file.clone();
        match blocking(move || file.load(position, length)).await {
            Ok(()) => Ok(()),
            Err(error) => self.wait_or_fail(position, &error).await,
        }
    }

    /// What to make of the mount's refusal of something that can be asked again: while the gate is closed it waits.
    async fn wait_or_fail(&self, position: u64, error: &DirectError) -> Result<(), StorageError> {
        match self.keeper.lock_state() {
            GateState::Open => Err(self.refused(position, error)),
            GateState::Frozen | GateState::Poisoned => self.keeper.pass(None).await,
        }
    }

    /// What the mount's refusal means to a guest.
    fn refused(&self, position: u64, error: &DirectError) -> StorageError {
        tracing::warn!(%error, position, "the mount refused");
        if self.keeper.is_withdrawn() {
            return StorageError::LockLost;
        }
        // The kernel can tell that the mount has ended before its socket does.
        if matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)) {
            self.keeper.lose(&Withdrawn::MountEnded.to_string());
            return StorageError::LockLost;
        }
        match error.kind() {
            DirectErrorKind::NoSpace => StorageError::OutOfSpace { position },
            DirectErrorKind::ReadOnly => StorageError::WriteProtected,
            DirectErrorKind::LockLost => {
                self.keeper.lose(&error.to_string());
                StorageError::LockLost
            }
            _ => StorageError::Medium { position, errno: error.raw_os_error().unwrap_or(0) },
        }
    }
}

impl LunFile {
    fn new(lun: &lockd::client::Lun) -> std::io::Result<Self> {
        let way = match &lun.access {
            Access::Descriptor(descriptor) => Way::Ring(RingFile::new(File::from(descriptor.try_clone()?))),
            Access::Session(session, _) => Way::Session(SessionLun::new(session)),
        };
        Ok(Self { way, alignment: (lun.alignment as usize).max(1) })
    }
}

impl BlockDevice for VmfsDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        let length = buffer.len() as u64;
        self.geometry.check_read(position, length)?;
        if self.is_whole(position, length) {
            return self.get(position, buffer).await;
        }
        let whole = self.widened(position, length);
        let bounce = DataBuffer::zeroed(whole.length as usize, self.alignment as usize);
        self.get(whole.start, &bounce).await?;
        let skip = (position - whole.start) as usize;
        buffer.copy_from_buffer(&bounce.slice(skip..skip + buffer.len()));
        Ok(())
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        let length = buffer.len() as u64;
        self.geometry.check_write(position, length)?;
        if self.alignment <= u64::from(LOGICAL_BLOCK) {
            return self.put(position, buffer, force_unit_access).await;
        }
        if !self.is_whole(position, length) {
            return self.put_in_part(position, buffer, force_unit_access).await;
        }
        let _beside = self.blocks.shared(ByteRange { start: position, length }).await;
        self.put(position, buffer, force_unit_access).await
    }

    async fn flush(&self) -> Result<(), StorageError> {
        if self.geometry.read_only { Ok(()) } else { self.publish().await }
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        if !self.geometry.thin {
            return Err(StorageError::Unsupported);
        }
        for range in ranges {
            self.geometry.check_write(range.start, range.length)?;
        }
        for range in ranges {
            self.discard(*range).await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.geometry.check_write(range.start, range.length)?;
        if may_unmap && self.geometry.thin { self.discard(range).await } else { self.write_zeros(range).await }
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.geometry.check_read(range.start, range.length)?;
        self.status(range).await
    }
}

impl Guarded for DirectFile {
    fn path(&self) -> &Path {
        DirectFile::path(self)
    }

    fn gate(&self, lun: Option<usize>) -> GateState {
        lun.map_or_else(|| self.lock_gate(), |lun| DirectFile::gate(self, lun))
    }

    fn withdrawn(&self) -> Option<String> {
        DirectFile::withdrawn(self).map(|cause| cause.to_string())
    }
}

/// Opens the file at `path` if it is a disk of a mounted VMFS volume; `None` if it is not, or has no runs to use.
pub(super) async fn open_direct(path: &Path, write: bool) -> Result<Option<DirectFile>, OpenError> {
    let wanted = path.to_owned();
    let opened = blocking(move || {
        // A file elsewhere is not even opened: its own errors are told by whoever opens it in the end.
        if let Some(Err(error)) = wanted.parent().map(MountedDirectory::open)
            && error.kind() == DirectErrorKind::NotVmfs
        {
            return Err(error);
        }
        DirectFile::open(&wanted, write)
    });
    match opened.await {
        Ok(file) => Ok(Some(file)),
        Err(error) => match error.kind() {
            DirectErrorKind::NotVmfs | DirectErrorKind::NotDirect => {
                tracing::debug!(%error, "no direct access");
                Ok(None)
            }
            DirectErrorKind::Busy => Err(OpenError::Locked { path: path.to_owned(), source: error }),
            _ => Err(OpenError::Direct { source: error }),
        },
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
