//! Owns: giving space back, making ranges zero, and what is told of a range's space.
//! Promises: whole granules go back to the mount, parts of them become zeros in place; what reads as zeros already costs nothing.
//! Must not know: SCSI commands, how the mount frees space.

use lockd::client::{Segment, block_on};
use scsi::{BlockStatus, ByteRange, DataBuffer, Provisioning, StorageError};

use super::moving::{OWN_ALIGNMENT, Work};
use super::stretch::{Stretch, stretch};
use super::{VmfsDisk, blocking};

/// The most bytes that one answer about a range's space covers.
const STATUS_AT_MOST: u64 = 1 << 30;

impl VmfsDisk {
    /// Makes a range read as zeros and gives back the space of its whole granules.
    pub(super) async fn discard(&self, range: ByteRange) -> Result<(), StorageError> {
        let granule = self.file.granule_bytes();
        let (first, end) = (range.start.next_multiple_of(granule), range.end() - range.end() % granule);
        if first >= end {
            return self.write_zeros(range).await;
        }
        self.write_zeros(ByteRange { start: range.start, length: first - range.start }).await?;
        self.punch(ByteRange { start: first, length: end - first }).await?;
        self.write_zeros(ByteRange { start: end, length: range.end() - end }).await
    }

    async fn punch(&self, range: ByteRange) -> Result<(), StorageError> {
        loop {
            if matches!(stretch(&self.file, range.start, range.length), Stretch::Zero(length) if length == range.length)
            {
                return Ok(());
            }
            self.keeper.pass(None).await?;
            let file = self.file.clone();
            match blocking(move || block_on(file.punch(range.start, range.length))).await {
                Ok(()) => return Ok(()),
                Err(error) => self.wait_or_fail(range.start, &error).await?,
            }
        }
    }

    /// Makes a range read as zeros where it lies.
    pub(super) async fn write_zeros(&self, range: ByteRange) -> Result<(), StorageError> {
        let block = self.alignment;
        let (first, end) = (range.start.next_multiple_of(block), range.end() - range.end() % block);
        if first >= end {
            return self.zero_in_part(range).await;
        }
        self.zero_in_part(ByteRange { start: range.start, length: first - range.start }).await?;
        self.zero_blocks(ByteRange { start: first, length: end - first }).await?;
        self.zero_in_part(ByteRange { start: end, length: range.end() - end }).await
    }

    async fn zero_blocks(&self, range: ByteRange) -> Result<(), StorageError> {
        let _beside = match range.length {
            0 => return Ok(()),
            _ => self.blocks.shared(range).await,
        };
        let mut done = 0;
        while done < range.length {
            let at = range.start + done;
            match stretch(&self.file, at, range.length - done) {
                Stretch::Data(batch) => done += self.carry_out(Work::Zero, batch, 0, at).await? as u64,
                Stretch::Zero(length) => {
                    self.keeper.pass(None).await?;
                    done += length;
                }
                Stretch::Unknown(length) => self.load(at, length).await?,
            }
        }
        Ok(())
    }

    /// A range smaller than a block of the LUNs.
    async fn zero_in_part(&self, range: ByteRange) -> Result<(), StorageError> {
        let zero = |length| length == range.length;
        if range.length == 0
            || matches!(stretch(&self.file, range.start, range.length), Stretch::Zero(length) if zero(length))
        {
            return Ok(());
        }
        self.put_in_part(range.start, &DataBuffer::zeroed(range.length as usize, OWN_ALIGNMENT), false).await
    }

    /// What a range begins with, and for how long.
    pub(super) async fn status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        let length = range.length.min(STATUS_AT_MOST);
        loop {
            let mut first = None;
            let mut covered = 0;
            let mut ended = false;
            self.file.resolve(range.start, length, &mut |segment| {
                let (kind, bytes) = match segment {
                    Segment::Data { length, .. } => (Some(Provisioning::Mapped), length),
                    Segment::Zero { length } if self.geometry.thin => (Some(Provisioning::Deallocated), length),
                    Segment::Zero { length } => (Some(Provisioning::Anchored), length),
                    Segment::Unknown { length } => (None, length),
                };
                ended |= *first.get_or_insert(kind) != kind;
                covered += if ended { 0 } else { bytes };
            });
            match first.flatten() {
                Some(provisioning) => return Ok(BlockStatus { length: covered, provisioning }),
                None => self.load(range.start, length).await?,
            }
        }
    }
}
