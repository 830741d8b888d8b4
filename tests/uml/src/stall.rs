//! Owns: a disk that stands still on demand, for a driver that is to lose its patience.
//! Promises: while it is closed no read or write begins; each begins soon after it is open.
//! Must not know: adapters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, StorageError};
use storage::ShownDisk;

/// Whether the disks stand still.
#[derive(Default)]
pub struct Stall(AtomicBool);

impl Stall {
    /// Lets them stand still, or go on.
    pub fn set(&self, still: bool) {
        self.0.store(still, Ordering::SeqCst);
    }

    async fn wait(&self) {
        const LOOK: Duration = Duration::from_millis(10);
        while self.0.load(Ordering::SeqCst) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// A disk that may stand still.
pub struct StallingDisk {
    disk: ShownDisk,
    stall: Arc<Stall>,
}

impl StallingDisk {
    /// `disk`, which stands still when `stall` says so.
    pub fn new(disk: ShownDisk, stall: Arc<Stall>) -> StallingDisk {
        StallingDisk { disk, stall }
    }
}

impl BlockDevice for StallingDisk {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn identity(&self) -> &Identity {
        self.disk.identity()
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.stall.wait().await;
        self.disk.read(position, buffer).await
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        self.stall.wait().await;
        self.disk.write(position, buffer, force_unit_access).await
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.disk.flush().await
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        self.disk.unmap(ranges).await
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.disk.write_zeroes(range, may_unmap).await
    }

    fn atomic_write_bytes(&self) -> u32 {
        self.disk.atomic_write_bytes()
    }

    fn space(&self) -> Option<scsi::Space> {
        self.disk.space()
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.disk.block_status(range).await
    }
}
