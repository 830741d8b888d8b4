//! Owns: the commands that nobody sees half done: COMPARE AND WRITE, ORWRITE, WRITE ATOMIC.
//! Promises: each is atomic against every other command to the same blocks of this disk.
//! Must not know: CDB layouts.

use super::{Data, Disk, first_bytes, read_failure, write_failure};
use crate::block_device::BlockDevice;
use crate::cdb::Blocks;
use crate::data_buffer::DataBuffer;
use crate::inquiry::MAX_COMPARE_AND_WRITE_BLOCKS;
use crate::sense::{Failure, Sense};

/// Bytes that ORWRITE reads and writes at a time.
const CHUNK: usize = 256 << 10;

impl<D: BlockDevice> Disk<D> {
    pub(super) async fn compare_and_write(
        &self,
        blocks: Blocks,
        force_unit_access: bool,
        data: Data<'_>,
    ) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        if blocks.count > MAX_COMPARE_AND_WRITE_BLOCKS {
            return Err(Sense::cdb_field(13, Some(7)).into());
        }
        let range = self.transfer_range(blocks, &geometry)?;
        self.check_writable(&geometry)?;
        let both = data.exactly(2 * range.length)?;
        if range.length == 0 {
            return Ok(0);
        }
        let half = range.length as usize;
        let _held = self.ranges.exclusive(range).await;
        self.compare(range, &both.slice(0..half), &geometry).await?;
        let durable = force_unit_access || self.writes_through(&geometry);
        let new = both.slice(half..2 * half);
        self.device.write(range.start, &new, durable).await.map_err(write_failure(&geometry))?;
        Ok(2 * range.length)
    }

    /// ORWRITE(16) (SBC-3, 5.9): what is there OR the data, byte by byte.
    pub(super) async fn or_write(
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
        let data = first_bytes(out, range.length)?;
        let durable = force_unit_access || self.writes_through(&geometry);
        let _held = self.ranges.exclusive(range).await;
        let scratch = DataBuffer::zeroed(CHUNK.min(data.len()), 4096);
        let (mut old, mut new) = (vec![0; scratch.len()], vec![0; scratch.len()]);
        let mut done = 0;
        while done < data.len() {
            let length = scratch.len().min(data.len() - done);
            let position = range.start + done as u64;
            let part = scratch.slice(0..length);
            self.device.read(position, &part).await.map_err(read_failure(&geometry))?;
            part.copy_to(0, &mut old[..length]);
            data.copy_to(done, &mut new[..length]);
            old[..length].iter_mut().zip(&new[..length]).for_each(|(old, new)| *old |= new);
            part.copy_from(0, &old[..length]);
            self.device.write(position, &part, durable).await.map_err(write_failure(&geometry))?;
            done += length;
        }
        Ok(range.length)
    }

    /// WRITE ATOMIC(16) (SBC-4, 5.48), without boundaries.
    pub(super) async fn write_atomic(
        &self,
        blocks: Blocks,
        force_unit_access: bool,
        boundary: u64,
        out: &DataBuffer,
    ) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        let largest = u64::from(self.device.atomic_write_bytes());
        if largest == 0 {
            return Err(Sense::INVALID_OPCODE.into());
        }
        if boundary != 0 {
            return Err(Sense::cdb_field(10, Some(7)).into());
        }
        let range = self.transfer_range(blocks, &geometry)?;
        if range.length > largest {
            return Err(Sense::cdb_field(12, Some(7)).into());
        }
        self.check_writable(&geometry)?;
        if range.length == 0 {
            return Ok(0);
        }
        let buffer = first_bytes(out, range.length)?;
        let _held = self.ranges.exclusive(range).await;
        let durable = force_unit_access || self.writes_through(&geometry);
        self.device.write_atomic(range.start, &buffer, durable).await.map_err(write_failure(&geometry))?;
        Ok(range.length)
    }
}
