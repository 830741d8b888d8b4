//! Owns: UNMAP, WRITE SAME and GET LBA STATUS.
//! Promises: a parameter list is checked as a whole before anything is given back; limits are those of VPD B0.
//! Must not know: CDB layouts, how the storage gives space back.

use super::{Data, Disk, first_bytes, read_failure, write_failure};
use crate::block_device::{BlockDevice, ByteRange, Geometry, Provisioning};
use crate::cdb::Blocks;
use crate::data_buffer::DataBuffer;
use crate::inquiry::{MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BYTES};
use crate::reply::send;
use crate::sense::{Failure, Sense};
use crate::task_set::Task;

/// The most runs that one GET LBA STATUS reports.
const MAX_STATUS_DESCRIPTORS: usize = 64;
/// Bytes of repeated pattern that WRITE SAME writes at a time.
const PATTERN_CHUNK: u64 = 256 << 10;
/// Bytes that WRITE SAME zeroes at a time.
const ZERO_CHUNK: u64 = 32 << 20;

/// The bits of a WRITE SAME command.
#[derive(Clone, Copy, Debug)]
pub(super) struct WriteSameKind {
    pub(super) unmap: bool,
    pub(super) anchor: bool,
    pub(super) no_data_out: bool,
}

impl<D: BlockDevice> Disk<D> {
    pub(super) async fn unmap(&self, anchor: bool, length: usize, out: &DataBuffer) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        if !geometry.thin {
            return Err(Sense::INVALID_OPCODE.into());
        }
        if anchor {
            return Err(Sense::cdb_field(1, Some(0)).into());
        }
        self.check_writable(&geometry)?;
        if length == 0 {
            return Ok(0);
        }
        let list = first_bytes(out, length as u64)?.to_vec();
        let ranges = self.parse_unmap_list(&list, &geometry)?;
        if let Some(hull) = hull(&ranges) {
            let _held = self.ranges.shared(hull).await;
            self.device.unmap(&ranges).await.map_err(write_failure(&geometry))?;
        }
        Ok(length as u64)
    }

    /// The ranges of an UNMAP parameter list (SBC-3, 5.28.2), empty ones left out.
    fn parse_unmap_list(&self, list: &[u8], geometry: &Geometry) -> Result<Vec<ByteRange>, Failure> {
        let header = list.first_chunk::<8>().ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        let announced = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let descriptors = &list[8..];
        let descriptors = &descriptors[..announced.min(descriptors.len())];
        if descriptors.len() / 16 > MAX_UNMAP_DESCRIPTORS {
            return Err(Sense::parameter_field(2).into());
        }
        let mut ranges = Vec::with_capacity(descriptors.len() / 16);
        let mut total = 0;
        for descriptor in descriptors.as_chunks::<16>().0 {
            let (lba, rest) = descriptor.split_first_chunk::<8>().expect("16 bytes");
            let count = rest.first_chunk::<4>().expect("8 bytes");
            let blocks = Blocks { lba: u64::from_be_bytes(*lba), count: u64::from(u32::from_be_bytes(*count)) };
            let range = self.check_range(blocks, geometry)?;
            total += blocks.count;
            if range.length != 0 {
                ranges.push(range);
            }
        }
        if total > MAX_UNMAP_BLOCKS {
            return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.into());
        }
        Ok(ranges)
    }

    pub(super) async fn write_same(&self, blocks: Blocks, kind: WriteSameKind, data: Data<'_>) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        self.check_writable(&geometry)?;
        if kind.anchor {
            return Err(Sense::cdb_field(1, Some(4)).into());
        }
        if kind.unmap && !geometry.thin {
            return Err(Sense::cdb_field(1, Some(3)).into());
        }
        let range = self.check_range(blocks, &geometry)?;
        // No count at all: WSNZ in VPD B0.
        if blocks.count == 0 || range.length > MAX_WRITE_SAME_BYTES {
            return Err(Sense::INVALID_FIELD_IN_CDB.into());
        }
        let taken = if kind.no_data_out { 0 } else { u64::from(geometry.logical_block) };
        let pattern = data.exactly(taken)?.to_vec();
        let _held = self.ranges.shared(range).await;
        if pattern.iter().all(|&byte| byte == 0) {
            self.zero(range, kind.unmap, data.task, &geometry).await?;
        } else {
            self.write_pattern(range, &pattern, Some(data.task), &geometry).await?;
        }
        if self.writes_through(&geometry) {
            self.device.flush().await.map_err(write_failure(&geometry))?;
        }
        Ok(taken)
    }

    /// Makes a range read as zeros, a part at a time.
    async fn zero(&self, range: ByteRange, may_unmap: bool, task: &Task, geometry: &Geometry) -> Result<(), Failure> {
        let mut start = range.start;
        while start < range.end() {
            if task.is_aborted() {
                return Err(Failure::Aborted);
            }
            let part = ByteRange { start, length: ZERO_CHUNK.min(range.end() - start) };
            self.device.write_zeroes(part, may_unmap).await.map_err(write_failure(geometry))?;
            start = part.end();
        }
        Ok(())
    }

    /// Writes one block over and over; `task` can be aborted on the way.
    pub(super) async fn write_pattern(
        &self,
        range: ByteRange,
        pattern: &[u8],
        task: Option<&Task>,
        geometry: &Geometry,
    ) -> Result<(), Failure> {
        let chunk = PATTERN_CHUNK.min(range.length);
        let scratch = DataBuffer::zeroed(chunk as usize, 4096);
        for offset in (0..scratch.len()).step_by(pattern.len()) {
            scratch.copy_from(offset, pattern);
        }
        let mut done = 0;
        while done < range.length {
            if task.is_some_and(Task::is_aborted) {
                return Err(Failure::Aborted);
            }
            let length = chunk.min(range.length - done);
            let part = scratch.slice(0..length as usize);
            self.device.write(range.start + done, &part, false).await.map_err(write_failure(geometry))?;
            done += length;
        }
        Ok(())
    }

    pub(super) async fn get_lba_status(&self, lba: u64, allocation: usize, into: &DataBuffer) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        if lba >= geometry.blocks {
            return Err(Sense::LBA_OUT_OF_RANGE.with_information(lba).into());
        }
        let logical = u64::from(geometry.logical_block);
        let room = (allocation.saturating_sub(8) / 16).clamp(1, MAX_STATUS_DESCRIPTORS);
        let mut answer = vec![0; 8];
        let mut position = lba * logical;
        for _ in 0..room {
            let rest = ByteRange { start: position, length: geometry.bytes() - position };
            if rest.length == 0 {
                break;
            }
            let status = self.device.block_status(rest).await.map_err(read_failure(&geometry))?;
            // A run longer than the field is told in part: the initiator asks on from its end.
            let count = (status.length / logical).min(u64::from(u32::MAX));
            answer.extend_from_slice(&(position / logical).to_be_bytes());
            answer.extend_from_slice(&(count as u32).to_be_bytes());
            answer.extend_from_slice(&[provisioning_code(status.provisioning), 0, 0, 0]);
            position += count * logical;
        }
        let length = (answer.len() - 4) as u32;
        answer[..4].copy_from_slice(&length.to_be_bytes());
        Ok(send(&answer, allocation, into))
    }
}

/// Provisioning status (SBC-3, table 40).
fn provisioning_code(provisioning: Provisioning) -> u8 {
    match provisioning {
        Provisioning::Mapped => 0,
        Provisioning::Deallocated => 1,
        Provisioning::Anchored => 2,
    }
}

/// The smallest range that covers all of `ranges`.
fn hull(ranges: &[ByteRange]) -> Option<ByteRange> {
    let start = ranges.iter().map(|range| range.start).min()?;
    let end = ranges.iter().map(ByteRange::end).max()?;
    Some(ByteRange { start, length: end - start })
}
