//! Owns: a disk in memory for tests of this crate and of transports, and paths to it for tests of initiators ([`TestTarget`]).
//! Promises: it panics when the device server breaks the contract of [`BlockDevice`].
//! Must not know: CDBs.

mod paths;

pub use paths::{PathFault, TestPath, TestTarget};

use std::cell::{Cell, RefCell};

use crate::block_device::{BlockDevice, BlockStatus, ByteRange, Geometry, Identity, Provisioning, Space, StorageError};
use crate::data_buffer::DataBuffer;

/// A thin disk of 256 blocks of 512 bytes.
pub const GEOMETRY: Geometry = Geometry {
    logical_block: 512,
    physical_block: 4096,
    transfer_granularity: 4096,
    blocks: 256,
    read_only: false,
    write_cache: true,
    thin: true,
    unmapped_reads_zero: true,
    unmap_granularity: 4096,
    rotational: false,
};

/// Names for a test disk.
pub fn identity() -> Identity {
    Identity { serial: "6000c29f0123456789abcdef01234567".into(), naa: *b"\x60\x00\xC2\x9Ftest-disk-00" }
}

/// A disk in memory whose every call is checked.
#[derive(Debug)]
pub struct MemoryDisk {
    geometry: Cell<Geometry>,
    identity: Identity,
    bytes: RefCell<Vec<u8>>,
    mapped: RefCell<Vec<bool>>,
    failure: Cell<Option<StorageError>>,
    failing_writes: Cell<usize>,
    flushes: Cell<usize>,
    forced_writes: Cell<usize>,
    atomic_write_bytes: Cell<u32>,
    space: Cell<Option<Space>>,
}

impl MemoryDisk {
    /// A disk full of zeros.
    pub fn new(geometry: Geometry) -> Self {
        Self::with_identity(geometry, identity())
    }

    /// A disk full of zeros with names of its own.
    pub fn with_identity(geometry: Geometry, identity: Identity) -> Self {
        Self {
            geometry: Cell::new(geometry),
            identity,
            bytes: RefCell::new(vec![0; geometry.bytes() as usize]),
            mapped: RefCell::new(vec![!geometry.thin; geometry.blocks as usize]),
            failure: Cell::new(None),
            failing_writes: Cell::new(0),
            flushes: Cell::new(0),
            forced_writes: Cell::new(0),
            atomic_write_bytes: Cell::new(0),
            space: Cell::new(None),
        }
    }

    /// Promises that writes of so many bytes are done as a whole.
    pub fn promise_atomic_writes(&self, bytes: u32) {
        self.atomic_write_bytes.set(bytes);
    }

    /// What it says about the space in its pool.
    pub fn set_space(&self, space: Option<Space>) {
        self.space.set(space);
    }

    /// Lets every later operation fail, or none.
    pub fn fail_with(&self, failure: Option<StorageError>) {
        self.failure.set(failure);
    }

    /// Lets the next `count` writes fail in their middle: the first half of their data arrives.
    pub fn tear_writes(&self, count: usize) {
        self.failing_writes.set(count);
    }

    /// A copy of the content.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// Number of flushes so far.
    pub fn flushes(&self) -> usize {
        self.flushes.get()
    }

    /// Number of writes with forced unit access so far.
    pub fn forced_writes(&self) -> usize {
        self.forced_writes.get()
    }

    /// Changes the geometry; the capacity must stay.
    pub fn set_geometry(&self, geometry: Geometry) {
        assert_eq!(geometry.bytes(), self.geometry.get().bytes());
        self.geometry.set(geometry);
    }

    fn check(&self, range: ByteRange) -> Result<(), StorageError> {
        let block = u64::from(self.geometry.get().logical_block);
        assert!(range.start.is_multiple_of(block) && range.length.is_multiple_of(block), "{range:?} is not aligned");
        assert!(range.end() <= self.geometry.get().bytes(), "{range:?} is outside the disk");
        self.failure.get().map_or(Ok(()), Err)
    }

    fn set_mapped(&self, range: ByteRange, mapped: bool) {
        let block = u64::from(self.geometry.get().logical_block);
        let blocks = (range.start / block) as usize..(range.end() / block) as usize;
        self.mapped.borrow_mut()[blocks].fill(mapped);
    }

    fn zero(&self, range: ByteRange) {
        self.bytes.borrow_mut()[range.start as usize..range.end() as usize].fill(0);
    }
}

impl BlockDevice for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.check(ByteRange { start: position, length: buffer.len() as u64 })?;
        let start = position as usize;
        buffer.copy_from(0, &self.bytes.borrow()[start..start + buffer.len()]);
        Ok(())
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        let range = ByteRange { start: position, length: buffer.len() as u64 };
        self.check(range)?;
        assert!(!self.geometry.get().read_only, "write to a read-only disk");
        let start = position as usize;
        if let Some(left) = self.failing_writes.get().checked_sub(1) {
            self.failing_writes.set(left);
            buffer.copy_to(0, &mut self.bytes.borrow_mut()[start..start + buffer.len() / 2]);
            return Err(StorageError::Medium { position, errno: 5 });
        }
        buffer.copy_to(0, &mut self.bytes.borrow_mut()[start..start + buffer.len()]);
        self.set_mapped(range, true);
        self.forced_writes.set(self.forced_writes.get() + usize::from(force_unit_access));
        Ok(())
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.flushes.set(self.flushes.get() + 1);
        self.failure.get().map_or(Ok(()), Err)
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        assert!(self.geometry.get().thin, "unmap of a thick disk");
        for &range in ranges {
            self.check(range)?;
            self.set_mapped(range, false);
            self.zero(range);
        }
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.check(range)?;
        assert!(!self.geometry.get().read_only, "write to a read-only disk");
        self.set_mapped(range, !may_unmap);
        self.zero(range);
        Ok(())
    }

    fn atomic_write_bytes(&self) -> u32 {
        self.atomic_write_bytes.get()
    }

    fn space(&self) -> Option<Space> {
        self.space.get()
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.check(range)?;
        assert!(range.length > 0, "status of an empty range");
        let block = u64::from(self.geometry.get().logical_block);
        let mapped = self.mapped.borrow();
        let blocks = &mapped[(range.start / block) as usize..(range.end() / block) as usize];
        let run = blocks.iter().take_while(|&&status| status == blocks[0]).count() as u64;
        let provisioning = if blocks[0] { Provisioning::Mapped } else { Provisioning::Deallocated };
        Ok(BlockStatus { length: run * block, provisioning })
    }
}
