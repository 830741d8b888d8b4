//! Owns: READ, WRITE, SYNCHRONIZE CACHE and START STOP UNIT.
//! Promises: with the write cache turned off, every write is durable before GOOD.
//! Must not know: CDB layouts.

use super::{Disk, first_bytes, read_failure, write_failure};
use crate::block_device::BlockDevice;
use crate::cdb::Blocks;
use crate::data_buffer::DataBuffer;
use crate::sense::{Failure, Sense};

impl<D: BlockDevice> Disk<D> {
    pub(super) async fn read(&self, blocks: Blocks, into: &DataBuffer) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let range = self.transfer_range(blocks, &geometry)?;
        if range.length == 0 {
            return Ok(0);
        }
        let buffer = first_bytes(into, range.length)?;
        self.device.read(range.start, &buffer).await.map_err(read_failure(&geometry))?;
        Ok(range.length)
    }

    pub(super) async fn write(
        &self,
        blocks: Blocks,
        force_unit_access: bool,
        out: &DataBuffer,
    ) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let range = self.transfer_range(blocks, &geometry)?;
        self.check_writable(&geometry)?;
        if range.length == 0 {
            return Ok(0);
        }
        let buffer = first_bytes(out, range.length)?;
        let _held = self.ranges.shared(range).await;
        let durable = force_unit_access || self.writes_through(&geometry);
        self.device.write(range.start, &buffer, durable).await.map_err(write_failure(&geometry))?;
        Ok(range.length)
    }

    /// Must each write be durable at once, because the initiator has turned the write cache off?
    pub(super) fn writes_through(&self, geometry: &crate::Geometry) -> bool {
        geometry.write_cache && !self.mode.write_cache_enabled()
    }

    pub(super) async fn synchronize_cache(&self, blocks: Blocks) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        self.check_range(blocks, &geometry)?;
        self.device.flush().await.map_err(write_failure(&geometry))?;
        Ok(0)
    }

    pub(super) async fn start_stop(
        &self,
        start: bool,
        load_eject: bool,
        no_flush: bool,
        power_condition: u8,
    ) -> Result<u64, Failure> {
        if load_eject {
            return Err(Sense::cdb_field(4, Some(1)).into());
        }
        if power_condition != 0 {
            return Err(Sense::cdb_field(4, Some(7)).into());
        }
        if !start && !no_flush && !self.stopped.get() {
            self.device.flush().await.map_err(write_failure(&self.device.geometry()))?;
        }
        self.stopped.set(!start);
        Ok(0)
    }
}
