//! Owns: a disk as a LUN or a guest's adapter shows it: with the block size and the thinness that the administrator wants.
//! Promises: what the storage holds is not changed by how it is shown.
//! Must not know: targets, sessions, adapters.

use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, StorageError};

use crate::Storage;

/// Size of a CD-ROM's blocks in bytes (ISO/IEC 10149).
pub const CDROM_BLOCK: u32 = 2048;

/// A disk of the storage, as it is shown.
pub struct ShownDisk {
    storage: Storage,
    logical_block: Option<u32>,
    physical_block: Option<u32>,
    thin: bool,
}

impl ShownDisk {
    /// Shows `storage` in blocks of `logical_block` bytes (none: its own), as thin only if it is and `thin` says so.
    pub fn new(storage: Storage, logical_block: Option<u32>, thin: bool) -> Self {
        Self { storage, logical_block, physical_block: None, thin }
    }

    /// The same, and says that physical blocks have `bytes` (none: the storage's own), or a logical block if that is more.
    pub fn with_physical_block(self, bytes: Option<u32>) -> Self {
        Self { physical_block: bytes, ..self }
    }
}

impl BlockDevice for ShownDisk {
    fn geometry(&self) -> Geometry {
        let own = self.storage.geometry();
        let thin = own.thin && self.thin;
        let logical_block = self.logical_block.unwrap_or(0).max(own.logical_block);
        Geometry {
            logical_block,
            physical_block: self.physical_block.unwrap_or(own.physical_block).max(logical_block),
            transfer_granularity: own.transfer_granularity.max(logical_block),
            blocks: (own.bytes() / u64::from(logical_block)).max(1),
            thin,
            unmap_granularity: own.unmap_granularity.max(logical_block),
            ..own
        }
    }

    fn identity(&self) -> &Identity {
        self.storage.identity()
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.storage.read(position, buffer).await
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        self.storage.write(position, buffer, force_unit_access).await
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.storage.flush().await
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        self.storage.unmap(ranges).await
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.storage.write_zeroes(range, may_unmap && self.thin).await
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.storage.block_status(range).await
    }
}
