//! Owns: READ, WRITE, SYNCHRONIZE CACHE, START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL.
//! Promises: with the write cache turned off, every write is durable before GOOD.
//! Must not know: CDB layouts.

use super::{Data, Disk, first_bytes, read_failure, write_failure};
use crate::block_device::{BlockDevice, ByteRange, Geometry};
use crate::cdb::{Blocks, Cdb};
use crate::data_buffer::DataBuffer;
use crate::sense::{Failure, Sense};
use crate::task::NexusId;

impl<D: BlockDevice> Disk<D> {
    pub(super) async fn read(&self, blocks: Blocks, data: Data<'_>) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let range = self.transfer_range(blocks, &geometry)?;
        if range.length == 0 {
            return Ok(0);
        }
        let _held = self.ranges.shared(range).await;
        if data.truncate && range.length > data.into.len() as u64 {
            return Box::pin(self.read_in_part(range, data.into, &geometry)).await;
        }
        let buffer = first_bytes(data.into, range.length)?;
        self.device.read(range.start, &buffer).await.map_err(read_failure(&geometry))?;
        Ok(range.length)
    }

    /// Reads as much as `into` takes; its end may lie within a block.
    async fn read_in_part(&self, range: ByteRange, into: &DataBuffer, geometry: &Geometry) -> Result<u64, Failure> {
        let block = geometry.logical_block as usize;
        let whole = into.len() / block * block;
        if whole != 0 {
            let buffer = into.slice(0..whole);
            self.device.read(range.start, &buffer).await.map_err(read_failure(geometry))?;
        }
        if whole != into.len() {
            let last = DataBuffer::zeroed(block, 4096);
            self.device.read(range.start + whole as u64, &last).await.map_err(read_failure(geometry))?;
            into.slice(whole..into.len()).copy_from_buffer(&last.slice(0..into.len() - whole));
        }
        Ok(range.length)
    }

    pub(super) async fn write(&self, blocks: Blocks, force_unit_access: bool, data: Data<'_>) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let range = self.transfer_range(blocks, &geometry)?;
        self.check_writable(&geometry)?;
        let short = data.truncate && range.length > data.out.len() as u64;
        let length = match short {
            // Only whole blocks are written.
            true => data.out.len() as u64 / u64::from(geometry.logical_block) * u64::from(geometry.logical_block),
            false => range.length,
        };
        if length == 0 {
            return Ok(range.length);
        }
        let buffer = first_bytes(data.out, length)?;
        let _held = self.ranges.shared(range).await;
        let durable = force_unit_access || self.writes_through(&geometry);
        self.device.write(range.start, &buffer, durable).await.map_err(write_failure(&geometry))?;
        Ok(range.length)
    }

    /// Must each write be durable at once, because the initiator has turned the write cache off?
    pub(super) fn writes_through(&self, geometry: &Geometry) -> bool {
        geometry.write_cache && !self.mode.write_cache_enabled()
    }

    pub(super) async fn synchronize_cache(&self, blocks: Blocks) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        self.check_range(blocks, &geometry)?;
        self.device.flush().await.map_err(write_failure(&geometry))?;
        Ok(0)
    }

    /// START STOP UNIT (SBC-3, 5.20).
    pub(crate) async fn start_stop(&self, cdb: &Cdb) -> Result<u64, Failure> {
        let Cdb::StartStopUnit { start, load_eject, no_flush, power_condition } = *cdb else {
            return Err(Sense::INVALID_OPCODE.into());
        };
        if power_condition != 0 && self.is_removable() {
            // A virtual drive has no power to save; the medium stays where it is.
            return Ok(0);
        }
        if power_condition != 0 {
            return Err(Sense::cdb_field(4, Some(7)).into());
        }
        if load_eject && !self.is_removable() {
            return Err(Sense::cdb_field(4, Some(1)).into());
        }
        // Neither out nor, once it is out, in again.
        let moves = load_eject && !(start && self.loaded.get());
        if moves && !self.prevents.borrow().is_empty() {
            return Err(Sense::REMOVAL_PREVENTED.into());
        }
        if !load_eject && !self.loaded.get() {
            return if start { Err(Sense::NO_MEDIUM.into()) } else { Ok(0) };
        }
        let geometry = self.device.geometry();
        if !start && !no_flush && !self.stopped.get() && self.loaded.get() && !geometry.read_only {
            self.device.flush().await.map_err(write_failure(&geometry))?;
        }
        if load_eject {
            self.loaded.set(start);
        }
        // A drive that can be emptied starts by itself again when it is used.
        self.stopped.set(!start && !load_eject && !self.is_removable());
        Ok(0)
    }

    /// PREVENT ALLOW MEDIUM REMOVAL (SBC-3, 5.10).
    pub(crate) fn prevent(&self, nexus: NexusId, prevent: u8) -> Result<u64, Failure> {
        if prevent & 2 != 0 {
            return Err(Sense::cdb_field(4, Some(1)).into());
        }
        self.forget_prevent(nexus);
        if prevent == 1 && self.is_removable() {
            self.prevents.borrow_mut().push(nexus);
        }
        Ok(0)
    }

    /// The nexus no longer forbids the removal of the medium.
    pub(crate) fn forget_prevent(&self, nexus: NexusId) {
        self.prevents.borrow_mut().retain(|known| *known != nexus);
    }
}
