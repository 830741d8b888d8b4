//! Owns: a disk on one file or block device.
//! Promises: O_DIRECT where the file allows it, if the page cache is not asked for; one mode for the whole life of the disk;
//! misaligned guest memory is bounced, never refused.
//! Must not know: descriptors, guests, the cluster.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, StatxFlags};
use rustix::io::Errno;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, Provisioning, StorageError};

use super::OpenError;
use super::identity;
use super::ring::{RingFile, Transfer};
use super::supervisor::Supervisor;

/// Alignment of our own buffers: enough for every device.
const OWN_ALIGNMENT: usize = 4096;
/// Bytes of zeros written at a time where the file has no better way.
const ZERO_CHUNK: usize = 1 << 20;
/// STATX_DIOALIGN (Linux 6.1): asks for the alignment of direct I/O.
const STATX_DIRECT_ALIGNMENT: u32 = 0x2000;

/// A disk on a file or block device.
pub struct FileDisk {
    ring: RingFile,
    identity: Identity,
    geometry: Geometry,
    /// Bytes of the file or device, of which the disk shows whole blocks.
    length: u64,
    /// What direct I/O asks of memory (address) and lengths; 1 for buffered I/O.
    alignment: usize,
    /// By way of the page cache, and at once where that needs no wait.
    cached: bool,
    regular: bool,
    owner: Option<Owner>,
}

/// Who hears that the file is gone for good.
struct Owner {
    path: PathBuf,
    supervisor: Arc<dyn Supervisor>,
    was_told: Cell<bool>,
}

impl FileDisk {
    /// Opens a file; the exclusive lock (flock) of a writer keeps every other opener out. `cached`: see [`crate::DiskSource`].
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(path: &Path, read_only: bool, cached: bool) -> Result<Self, OpenError> {
        // Looked at before it is opened: to open a pipe would wait for its other end.
        let metadata = path.metadata().map_err(OpenError::system("find", path))?;
        let regular = metadata.is_file();
        if !regular && !metadata.file_type().is_block_device() {
            return Err(OpenError::NotADisk { path: path.to_owned() });
        }
        let plain = open_with(path, read_only, 0).map_err(OpenError::system("open", path))?;
        let logical = if regular { 512 } else { device_block(&plain).map_err(OpenError::system("examine", path))? };
        let cached = cached && regular;
        let (file, alignment) = if cached { (plain, 1) } else { choose_mode(plain, path, read_only, logical) };
        lock(&file, path, read_only)?;
        let length = (&file).seek(SeekFrom::End(0)).map_err(OpenError::system("measure", path))?;
        let blocks = length / u64::from(logical);
        if blocks == 0 {
            return Err(OpenError::Empty { path: path.to_owned(), length, block: logical });
        }
        let thin = !read_only && if regular { punches_holes(&file, length) } else { device_discards(metadata.rdev()) };
        let preferred = u32::try_from(metadata.blksize()).unwrap_or(4096).clamp(4096, 1 << 20).next_power_of_two();
        let geometry = Geometry {
            logical_block: logical,
            // By way of the page cache any whole number of blocks is written alike: the page is a matter of speed, not of what is torn.
            physical_block: if cached { logical } else { 4096.max(logical) },
            transfer_granularity: 4096.max(logical),
            blocks,
            read_only,
            write_cache: true,
            thin,
            // Both a hole and a zeroed-out device range read as zeros.
            unmapped_reads_zero: true,
            unmap_granularity: preferred,
            rotational: false,
        };
        Ok(Self {
            ring: RingFile::new(file),
            identity: identity::from_path(path),
            geometry,
            length,
            alignment,
            cached,
            regular,
            owner: None,
        })
    }

    /// The same disk; `supervisor` hears of the end of the file system that it is on.
    pub(super) fn supervised(self, path: &Path, supervisor: Arc<dyn Supervisor>) -> Self {
        Self { owner: Some(Owner { path: path.to_owned(), supervisor, was_told: Cell::new(false) }), ..self }
    }

    /// The same disk with other names.
    pub(super) fn named(self, identity: Identity) -> Self {
        Self { identity, ..self }
    }

    /// The first `length` bytes of it, as its descriptor says.
    pub(super) fn limited_to(mut self, length: u64, path: &Path) -> Result<Self, OpenError> {
        let logical = u64::from(self.geometry.logical_block);
        if length > self.geometry.bytes() {
            let path = path.to_owned();
            return Err(OpenError::Short { path, length: self.geometry.bytes(), expected: length });
        }
        if length < logical {
            return Err(OpenError::Empty { path: path.to_owned(), length, block: self.geometry.logical_block });
        }
        self.geometry.blocks = length / logical;
        Ok(self)
    }

    /// Bytes at the end of the file that the guest does not see: less than a block, or what its descriptor leaves out.
    pub fn hidden_bytes(&self) -> u64 {
        self.length - self.geometry.bytes()
    }

    /// Does I/O pass by the page cache?
    pub fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// What an error of the operating system means to the disk. A mount that has ended in user space is no damage that a guest could deal
    /// with: its disk is gone.
    fn failure(&self, position: u64) -> impl FnOnce(std::io::Error) -> StorageError + '_ {
        move |error| {
            let is_gone = matches!(Errno::from_io_error(&error), Some(Errno::NOTCONN | Errno::CONNABORTED));
            if let Some(owner) = self.owner.as_ref().filter(|owner| is_gone && !owner.was_told.replace(true)) {
                owner.supervisor.lost(&owner.path, "the mount that it is on has ended");
            }
            failure(position)(error)
        }
    }

    fn fits_direct(&self, buffer: &DataBuffer) -> bool {
        self.alignment == 1 || buffer.is_aligned(self.alignment)
    }
}

impl BlockDevice for FileDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.geometry.check_read(position, buffer.len() as u64)?;
        if self.cached && self.ring.read_now(position, buffer) {
            return Ok(());
        }
        if self.fits_direct(buffer) {
            return self.ring.transfer(Transfer::Read, position, buffer).await.map_err(self.failure(position));
        }
        let bounce = DataBuffer::zeroed(buffer.len(), OWN_ALIGNMENT);
        self.ring.transfer(Transfer::Read, position, &bounce).await.map_err(self.failure(position))?;
        buffer.copy_from_buffer(&bounce);
        Ok(())
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        self.geometry.check_write(position, buffer.len() as u64)?;
        if self.cached && !force_unit_access && self.ring.write_now(position, buffer) {
            return Ok(());
        }
        let way = if force_unit_access { Transfer::DurableWrite } else { Transfer::Write };
        if self.fits_direct(buffer) {
            return self.ring.transfer(way, position, buffer).await.map_err(self.failure(position));
        }
        let bounce = DataBuffer::zeroed(buffer.len(), OWN_ALIGNMENT);
        bounce.copy_from_buffer(buffer);
        self.ring.transfer(way, position, &bounce).await.map_err(self.failure(position))
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.ring.sync_data().await.map_err(self.failure(0))
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        if !self.geometry.thin {
            return Err(StorageError::Unsupported);
        }
        for range in ranges {
            self.geometry.check_write(range.start, range.length)?;
        }
        for range in ranges {
            self.allocate(FallocateFlags::PUNCH_HOLE, *range).await.map_err(self.failure(range.start))?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.geometry.check_write(range.start, range.length)?;
        let punch = may_unmap && self.geometry.thin;
        let how = if punch { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(how, range).await {
            Ok(()) => Ok(()),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => self.write_zeros(range).await,
            Err(error) => Err(self.failure(range.start)(error)),
        }
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.geometry.check_read(range.start, range.length)?;
        let all = BlockStatus { length: range.length, provisioning: Provisioning::Mapped };
        if !self.regular || !self.geometry.thin {
            return Ok(all);
        }
        let seek = |whence| rustix::fs::seek(self.ring.file(), whence);
        let logical = u64::from(self.geometry.logical_block);
        let data = match seek(rustix::fs::SeekFrom::Data(range.start)) {
            Ok(data) => data,
            // No data up to the end of the file.
            Err(Errno::NXIO) => range.end(),
            Err(_) => return Ok(all),
        };
        // A block that holds some data is mapped as a whole.
        let data = data - data % logical;
        if data > range.start {
            let length = (data - range.start).min(range.length);
            return Ok(BlockStatus { length, provisioning: Provisioning::Deallocated });
        }
        let hole = seek(rustix::fs::SeekFrom::Hole(range.start)).unwrap_or(range.end());
        let hole = hole.next_multiple_of(logical);
        let length = hole.saturating_sub(range.start).clamp(logical, range.length);
        Ok(BlockStatus { length, provisioning: Provisioning::Mapped })
    }
}

impl FileDisk {
    async fn allocate(&self, how: FallocateFlags, range: ByteRange) -> std::io::Result<()> {
        let mode = (how | FallocateFlags::KEEP_SIZE).bits() as i32;
        self.ring.allocate(mode, range.start, range.length).await
    }

    /// Zeros the slow way.
    async fn write_zeros(&self, range: ByteRange) -> Result<(), StorageError> {
        let zeros = DataBuffer::zeroed(ZERO_CHUNK.min(range.length as usize), OWN_ALIGNMENT);
        let mut done = 0;
        while done < range.length {
            let length = (zeros.len() as u64).min(range.length - done);
            let position = range.start + done;
            let part = zeros.slice(0..length as usize);
            self.ring.transfer(Transfer::Write, position, &part).await.map_err(self.failure(position))?;
            done += length;
        }
        Ok(())
    }
}

/// What an error of the operating system means to a disk.
pub(super) fn failure(position: u64) -> impl FnOnce(std::io::Error) -> StorageError {
    move |error| {
        tracing::warn!(%error, position, "the disk's file failed");
        match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => StorageError::OutOfSpace { position },
            Some(Errno::ROFS | Errno::PERM) => StorageError::WriteProtected,
            errno => StorageError::Medium { position, errno: errno.map_or(0, Errno::raw_os_error) },
        }
    }
}

fn open_with(path: &Path, read_only: bool, flags: i32) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
}

/// Direct I/O if the file has it with an alignment that every block of the disk satisfies; otherwise the file as it is.
/// Returns the alignment that memory and lengths must have.
fn choose_mode(plain: File, path: &Path, read_only: bool, logical: u32) -> (File, usize) {
    let Ok(direct) = open_with(path, read_only, libc::O_DIRECT) else { return (plain, 1) };
    if !is_same_file(&plain, &direct) {
        return (plain, 1);
    }
    match direct_alignment(&direct, logical) {
        Some(alignment) => (direct, alignment),
        None => (plain, 1),
    }
}

/// Has nobody put another file in this one's place in between?
fn is_same_file(one: &File, other: &File) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

fn direct_alignment(file: &File, logical: u32) -> Option<usize> {
    let mask = StatxFlags::from_bits_retain(STATX_DIRECT_ALIGNMENT);
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, mask).ok();
    if let Some(told) = told.filter(|told| told.stx_mask & STATX_DIRECT_ALIGNMENT != 0) {
        let (memory, offset) = (told.stx_dio_mem_align, told.stx_dio_offset_align);
        // 0: no direct I/O at all. A larger grain than the disk's block would mean to read before each small write.
        let usable = offset != 0 && offset <= logical && memory.is_power_of_two() && offset.is_power_of_two();
        return usable.then_some(memory.max(offset) as usize);
    }
    // The file system does not tell (FUSE, NFS): try one block in the middle of nowhere special.
    let probe = ProbeBlock([0; 4096]);
    let mut probe = Box::new(probe);
    let block = &mut probe.0[..logical.min(4096) as usize];
    file.read_at(block, u64::from(logical)).ok().map(|_| OWN_ALIGNMENT.min(logical as usize))
}

/// A page that starts at a page boundary.
#[repr(align(4096))]
struct ProbeBlock([u8; 4096]);

/// Takes the lock of a writer or of a reader.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let how = if read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    match rustix::fs::flock(file, how) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(error) => Err(OpenError::system("lock", path)(error.into())),
    }
}

/// The logical block of a block device.
fn device_block(file: &File) -> std::io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(file)?)
}

/// Can holes be made in the file? Tried behind its end, where it changes nothing.
fn punches_holes(file: &File, length: u64) -> bool {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, how, length.next_multiple_of(4096), 4096).is_ok()
}

/// Does a block device take discards? A partition has its disk's queue one folder up.
fn device_discards(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    ["queue", "../queue"].iter().any(|queue| {
        let file = format!("/sys/dev/block/{major}:{minor}/{queue}/discard_max_bytes");
        std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
    })
}

#[cfg(test)]
mod tests;
