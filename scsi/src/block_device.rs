//! Owns: the contract between the device server and whatever stores a disk's blocks.
//! Promises: the server calls a device only with ranges inside its capacity that are whole logical blocks.
//! Must not know: CDBs, transports, files, LUNs.

use std::future::Future;

use crate::data_buffer::DataBuffer;

/// A range of a device's bytes; start and length are multiples of the logical block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// The first byte after the range.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Do the two ranges share a byte?
    pub fn overlaps(&self, other: &ByteRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Shape and abilities of a device. Asked for at each command, so it must be cheap; a device may grow while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block in bytes: 512 or 4096; 2048 for a CD-ROM.
    pub logical_block: u32,
    /// Physical block in bytes: a power of two, a multiple of the logical block.
    pub physical_block: u32,
    /// Transfers of whole pieces of this size cost least (VPD B0, optimal transfer length granularity), in bytes: a multiple of the
    /// logical block.
    pub transfer_granularity: u32,
    /// Capacity in logical blocks, at least 1.
    pub blocks: u64,
    /// Every write is refused.
    pub read_only: bool,
    /// Written data may be lost by a power failure until [`BlockDevice::flush`] has returned.
    pub write_cache: bool,
    /// Blocks can be given back by [`BlockDevice::unmap`]: the disk is thinly provisioned.
    pub thin: bool,
    /// Unmapped blocks read as zeros. (Otherwise what they read as is undefined.)
    pub unmapped_reads_zero: bool,
    /// Best unit for unmapping, in bytes: a multiple of the logical block.
    pub unmap_granularity: u32,
    /// Spinning medium (VPD B1): false for flash.
    pub rotational: bool,
}

impl Geometry {
    /// Capacity in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.logical_block)
    }

    /// Whether a range may be read: [`StorageError::OutOfRange`] if a part of it lies outside the device.
    pub fn check_read(&self, start: u64, length: u64) -> Result<(), StorageError> {
        let inside = start.checked_add(length).is_some_and(|end| end <= self.bytes());
        if inside { Ok(()) } else { Err(StorageError::OutOfRange { start, length }) }
    }

    /// Whether a range may be changed: as [`Geometry::check_read`], and [`StorageError::WriteProtected`] for a read-only device.
    pub fn check_write(&self, start: u64, length: u64) -> Result<(), StorageError> {
        if self.read_only { Err(StorageError::WriteProtected) } else { self.check_read(start, length) }
    }
}

/// What names a device for ever and everywhere: the same on each host that opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Unit serial number (VPD 80): printable ASCII. ESX shows the disk's UUID in hexadecimal.
    pub serial: String,
    /// NAA type 6 identifier (VPD 83): the first byte's upper four bits are 6.
    pub naa: [u8; 16],
}

/// How a run of blocks is provisioned (SBC-4, GET LBA STATUS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provisioning {
    /// Space is there and written.
    Mapped,
    /// No space is taken.
    Deallocated,
    /// Space is taken but not written.
    Anchored,
}

/// The answer of [`BlockDevice::block_status`]: the first bytes of the asked range are all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Length in bytes of the run, at least one logical block, at most the asked length.
    pub length: u64,
    /// How the run is provisioned.
    pub provisioning: Provisioning,
}

/// Space of a thin device's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this device uses.
    pub used: u64,
    /// Bytes that are still free for it.
    pub available: u64,
}

/// Why a device could not do what it was asked to do. [`crate::sense`] holds the table to status and sense data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// No space for a first write; the guest can go on when space was made.
    #[error("no space is left for the write at byte {position}")]
    OutOfSpace {
        /// First byte of the write.
        position: u64,
    },
    /// The medium did not give or take the data.
    #[error("the storage failed at byte {position} (errno {errno})")]
    Medium {
        /// First byte of the transfer.
        position: u64,
        /// The operating system's error number, 0 if there is none.
        errno: i32,
    },
    /// This host no longer holds the disk's lock: the device is gone for this guest.
    #[error("this host lost the lock of the disk")]
    LockLost,
    /// The storage is out of reach for the moment and nothing was done; the same command may be sent again.
    #[error("the storage is frozen for the moment")]
    Frozen,
    /// The device is being opened or repaired.
    #[error("the device is not ready yet")]
    NotReady,
    /// The device takes no writes.
    #[error("the device is write protected")]
    WriteProtected,
    /// The device has no such operation (for example unmap on a thick disk).
    #[error("the device does not support this operation")]
    Unsupported,
    /// The range is outside the device: it shrank, or the caller broke the contract.
    #[error("bytes {start}..+{length} lie outside the device")]
    OutOfRange {
        /// First byte.
        start: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// A disk's blocks. All futures run on the thread of the caller's single-threaded executor, so nothing here is `Send`,
/// and calls may overlap freely: several commands are in flight at once on one device.
///
/// Contract for the caller (the device server keeps it):
/// - positions and lengths are multiples of the logical block and lie inside the capacity;
/// - **a future is polled to its end and never dropped before**: an operation may hold guards that protect the storage
///   (space that is being published, references to a map) and memory that the kernel is writing to;
/// - overlapping writes are not ordered among each other.
///
/// Contract for the implementation:
/// - when a future is ready, nothing in the kernel touches the buffer's memory any more;
/// - an operation that moves data owns a clone of the buffer while the kernel may touch it;
/// - errors are exact: after an error of `write` the range's content is undefined, but nothing outside it has changed.
pub trait BlockDevice {
    /// Shape and abilities, as of now.
    fn geometry(&self) -> Geometry;

    /// The device's names. They never change while it is open.
    fn identity(&self) -> &Identity;

    /// Reads `buffer.len()` bytes at byte `position` into `buffer`.
    fn read(&self, position: u64, buffer: &DataBuffer) -> impl Future<Output = Result<(), StorageError>>;

    /// Writes all of `buffer` at byte `position`; with `force_unit_access` it is durable when the future is ready.
    fn write(
        &self,
        position: u64,
        buffer: &DataBuffer,
        force_unit_access: bool,
    ) -> impl Future<Output = Result<(), StorageError>>;

    /// Makes every write that was complete before the call durable.
    fn flush(&self) -> impl Future<Output = Result<(), StorageError>>;

    /// Gives back the space of `ranges`. A hint: parts smaller than the granularity may stay. If
    /// [`Geometry::unmapped_reads_zero`], all of the ranges read as zeros afterwards.
    fn unmap(&self, ranges: &[ByteRange]) -> impl Future<Output = Result<(), StorageError>>;

    /// Makes `range` read as zeros; with `may_unmap` space may be given back on the way.
    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> impl Future<Output = Result<(), StorageError>>;

    /// The most bytes that [`BlockDevice::write_atomic`] writes as a whole or not at all, even if power fails: a multiple of the
    /// logical block, or 0 if the device promises nothing: then there is no WRITE ATOMIC.
    fn atomic_write_bytes(&self) -> u32 {
        0
    }

    /// Writes as [`BlockDevice::write`] does, and after any failure, of power too, either all of it has been written or nothing.
    /// It is called with at most [`BlockDevice::atomic_write_bytes`] bytes, and while nobody else writes to them.
    fn write_atomic(
        &self,
        position: u64,
        buffer: &DataBuffer,
        force_unit_access: bool,
    ) -> impl Future<Output = Result<(), StorageError>> {
        self.write(position, buffer, force_unit_access)
    }

    /// Bytes in use and bytes free in the pool that a thin device takes its space from. `None`: not known.
    fn space(&self) -> Option<Space> {
        None
    }

    /// How the first bytes of `range` (not empty) are provisioned.
    fn block_status(&self, range: ByteRange) -> impl Future<Output = Result<BlockStatus, StorageError>>;
}
