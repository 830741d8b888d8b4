//! Owns: EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (SPC-4, 6.4 and 6.20; SBC-3, 5.4): blocks to blocks, between units of this
//! target.
//! Promises: the whole parameter list is checked before a byte is copied; work is bounded by the announced limits; reservations of
//! source and destination are kept.
//! Must not know: how blocks are stored.

use std::rc::Rc;

use super::{LogicalUnit, Target};
use crate::block_device::{BlockDevice, ByteRange};
use crate::cdb::{Blocks, Cdb, CopyResults};
use crate::data_buffer::DataBuffer;
use crate::inquiry::{MAX_COPY_LIST, MAX_COPY_SEGMENT_BYTES, MAX_COPY_SEGMENTS, MAX_COPY_TARGETS};
use crate::sense::{Failure, Sense};
use crate::task::NexusId;
use crate::task_set::Task;

/// Bytes of header before the descriptors.
const HEADER: usize = 16;
/// Every target descriptor has this length.
const TARGET_LENGTH: usize = 32;
/// A block to block segment descriptor.
const SEGMENT_LENGTH: usize = 28;
/// Bytes that are copied at a time.
const CHUNK: u64 = 1 << 20;
/// Copies of which a unit keeps the result, the latest ones.
const MAX_RESULTS: usize = 64;

/// How a copy ended, for RECEIVE COPY RESULTS.
#[derive(Clone, Debug)]
pub(crate) struct CopyResult {
    pub(crate) nexus: NexusId,
    list: u8,
    failed: bool,
    segments: u16,
    bytes: u64,
}

/// Where blocks are copied from and to.
struct Segment<D> {
    source: (Rc<LogicalUnit<D>>, ByteRange),
    destination: (Rc<LogicalUnit<D>>, ByteRange),
}

impl<D: BlockDevice + 'static> Target<D> {
    pub(super) async fn extended_copy(
        &self,
        unit: &LogicalUnit<D>,
        task: &Task,
        length: usize,
        out: &DataBuffer,
        nexus: NexusId,
    ) -> Result<u64, Failure> {
        if length == 0 {
            return Ok(0);
        }
        if !(HEADER..=HEADER + MAX_COPY_LIST).contains(&length) {
            return Err(Sense::PARAMETER_LIST_LENGTH.into());
        }
        let list = crate::disk::first_bytes(out, length as u64)?.to_vec();
        let (targets, segments) = split(&list)?;
        let identifier = list[0];
        let units = self.copy_targets(targets)?;
        let segments = check_segments(segments, &units, HEADER + targets.len())?;
        for segment in &segments {
            let any = Blocks { lba: 0, count: 0 };
            segment.source.0.reservations.check(nexus, &Cdb::Read { blocks: any })?;
            segment.destination.0.reservations.check(nexus, &Cdb::Write { blocks: any, force_unit_access: false })?;
        }
        let mut result = CopyResult { nexus, list: identifier, failed: true, segments: 0, bytes: 0 };
        let mut outcome = Ok(length as u64);
        for segment in &segments {
            if let Err(failure) = copy_segment(segment, task, &mut result).await {
                outcome = Err(failure);
                break;
            }
            result.segments += 1;
        }
        result.failed = outcome.is_err();
        let mut results = unit.copies.borrow_mut();
        results.retain(|known| known.nexus != nexus || known.list != identifier);
        if results.len() == MAX_RESULTS {
            results.remove(0);
        }
        results.push(result);
        outcome
    }

    /// The units that the target descriptors name: identification descriptors (E4h) with a designator of VPD page 83h.
    fn copy_targets(&self, descriptors: &[u8]) -> Result<Vec<Rc<LogicalUnit<D>>>, Failure> {
        let mut found = Vec::new();
        for (index, descriptor) in descriptors.as_chunks::<TARGET_LENGTH>().0.iter().enumerate() {
            if descriptor[0] != 0xE4 {
                return Err(Sense::UNSUPPORTED_TARGET_DESCRIPTOR.into());
            }
            // The peripheral device type of a disk; LU ID TYPE and NUL are of no account since SPC-4.
            if descriptor[1] & 0x1F != 0 {
                let byte = HEADER + index * TARGET_LENGTH + 1;
                return Err(Sense::parameter_field(byte as u16).into());
            }
            let length = usize::from(descriptor[7]);
            let designator = descriptor.get(8..8 + length).filter(|_| length <= 20);
            let Some(designator) = designator else {
                return Err(Sense::parameter_field((HEADER + index * TARGET_LENGTH + 7) as u16).into());
            };
            let kind = descriptor[5] & 0x3F;
            let units = self.units.borrow();
            let unit =
                units.iter().find(|unit| unit.disk.is_named(kind, designator)).ok_or(Sense::COPY_TARGET_UNREACHABLE)?;
            found.push(unit.clone());
        }
        Ok(found)
    }

    /// RECEIVE COPY RESULTS.
    pub(super) fn copy_results(
        &self,
        unit: &LogicalUnit<D>,
        action: CopyResults,
        list: u8,
        nexus: NexusId,
    ) -> Result<Vec<u8>, Failure> {
        if action == CopyResults::OperatingParameters {
            return Ok(operating_parameters());
        }
        let copies = unit.copies.borrow();
        let result = copies.iter().find(|copy| copy.nexus == nexus && copy.list == list);
        let result = result.ok_or(Sense::cdb_field(2, Some(7)))?;
        if action == CopyResults::FailedSegment {
            // The sense data of the copy itself have told everything.
            return Ok(vec![0, 0, 0, 0]);
        }
        let status = if result.failed { 0x02 } else { 0x01 };
        let mut answer = vec![0, 0, 0, 8, status];
        answer.extend_from_slice(&result.segments.to_be_bytes());
        // Transfer count in bytes, or in larger units where it would not fit.
        let (shift, units) = (0..4)
            .map(|units| (units * 10, units as u8))
            .find(|(shift, _)| result.bytes >> shift <= u64::from(u32::MAX))
            .unwrap_or((30, 3));
        answer.push(units);
        answer.extend_from_slice(&((result.bytes >> shift) as u32).to_be_bytes());
        Ok(answer)
    }
}

/// Splits a parameter list into target and segment descriptors, and checks its lengths.
fn split(list: &[u8]) -> Result<(&[u8], &[u8]), Sense> {
    let targets = usize::from(u16::from_be_bytes([list[2], list[3]]));
    let segments = u32::from_be_bytes([list[8], list[9], list[10], list[11]]) as usize;
    let inline = u32::from_be_bytes([list[12], list[13], list[14], list[15]]);
    if inline != 0 {
        return Err(Sense::INLINE_DATA_EXCEEDED);
    }
    if !targets.is_multiple_of(TARGET_LENGTH) {
        return Err(Sense::parameter_field(2));
    }
    if targets / TARGET_LENGTH > MAX_COPY_TARGETS {
        return Err(Sense::TOO_MANY_TARGET_DESCRIPTORS);
    }
    let rest = &list[HEADER..];
    let (targets, rest) = rest.split_at_checked(targets).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    if segments > MAX_COPY_SEGMENTS * SEGMENT_LENGTH {
        return Err(Sense::TOO_MANY_SEGMENT_DESCRIPTORS);
    }
    if segments > rest.len() {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    Ok((targets, &rest[..segments]))
}

/// The segments of a list: block to block (02h) only. `start` is where they begin in the list.
fn check_segments<D: BlockDevice>(
    mut bytes: &[u8],
    units: &[Rc<LogicalUnit<D>>],
    start: usize,
) -> Result<Vec<Segment<D>>, Failure> {
    let mut segments = Vec::new();
    let total = bytes.len();
    while !bytes.is_empty() {
        let at = (start + total - bytes.len()) as u16;
        if bytes[0] != 0x02 {
            return Err(Sense::UNSUPPORTED_SEGMENT_DESCRIPTOR.into());
        }
        let Some((descriptor, rest)) = bytes.split_first_chunk::<SEGMENT_LENGTH>() else {
            return Err(Sense::PARAMETER_LIST_LENGTH.into());
        };
        bytes = rest;
        let word = |at: usize| u16::from_be_bytes([descriptor[at], descriptor[at + 1]]);
        let long = |at: usize| u64::from_be_bytes(*descriptor[at..].first_chunk().expect("8 bytes"));
        if usize::from(word(2)) != SEGMENT_LENGTH - 4 {
            return Err(Sense::parameter_field(at + 2).into());
        }
        let unit = |index: u16| units.get(usize::from(index)).cloned();
        let (Some(source), Some(destination)) = (unit(word(4)), unit(word(6))) else {
            return Err(Sense::COPY_TARGET_UNREACHABLE.into());
        };
        // DC: the number of blocks is counted in the destination's.
        let counts_destination = descriptor[1] & 2 != 0;
        let counted = if counts_destination { &destination } else { &source };
        let length = u64::from(word(10)) * u64::from(counted.disk.device().geometry().logical_block);
        let range = |unit: &LogicalUnit<D>, lba: u64, writes: bool| unit.disk.copy_range(lba, length, writes);
        // An error of a segment that the list itself is right about (SPC-4, 6.4.3.4).
        let aborted = |_: Failure| Failure::Check(Sense::COPY_ABORTED);
        let source_range = range(&source, long(12), false).map_err(aborted)?;
        let destination_range = range(&destination, long(20), true).map_err(aborted)?;
        segments.push(Segment { source: (source, source_range), destination: (destination, destination_range) });
    }
    Ok(segments)
}

async fn copy_segment<D: BlockDevice>(
    segment: &Segment<D>,
    task: &Task,
    result: &mut CopyResult,
) -> Result<(), Failure> {
    let (from, to) = (&segment.source.0.disk, &segment.destination.0.disk);
    let length = segment.source.1.length;
    if length == 0 {
        return Ok(());
    }
    let scratch = DataBuffer::zeroed(CHUNK.min(length) as usize, 4096);
    // Overlapping blocks of one unit are copied as if all had been read before the first is written.
    let backwards = Rc::ptr_eq(from, to) && segment.source.1.start < segment.destination.1.start;
    let chunks = length.div_ceil(CHUNK);
    for index in 0..chunks {
        if task.is_aborted() {
            return Err(Failure::Aborted);
        }
        let index = if backwards { chunks - 1 - index } else { index };
        let offset = index * CHUNK;
        let part = scratch.slice(0..CHUNK.min(length - offset) as usize);
        from.copy_out(segment.source.1.start + offset, &part).await?;
        to.copy_in(segment.destination.1.start + offset, &part).await?;
        result.bytes += part.len() as u64;
    }
    Ok(())
}

/// Operating parameters (SPC-4, 6.20.4): the limits, and the descriptor types that are known.
fn operating_parameters() -> Vec<u8> {
    let mut answer = vec![0; 44];
    // SNLID: a list identifier of 0 is fine.
    answer[4] = 0x01;
    answer[8..10].copy_from_slice(&(MAX_COPY_TARGETS as u16).to_be_bytes());
    answer[10..12].copy_from_slice(&(MAX_COPY_SEGMENTS as u16).to_be_bytes());
    answer[12..16].copy_from_slice(&(MAX_COPY_LIST as u32).to_be_bytes());
    answer[16..20].copy_from_slice(&(MAX_COPY_SEGMENT_BYTES as u32).to_be_bytes());
    // One copy at a time, for each command; granularities of 2^9 bytes.
    answer[34..36].copy_from_slice(&1u16.to_be_bytes());
    answer[36] = 1;
    answer[37] = 9;
    answer.extend_from_slice(&[0x02, 0xE4]);
    answer[43] = 2;
    let length = (answer.len() - 4) as u32;
    answer[..4].copy_from_slice(&length.to_be_bytes());
    answer
}
