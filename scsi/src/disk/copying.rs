//! Owns: a disk as source and destination of EXTENDED COPY.
//! Promises: a copy keeps to the same rules as reads and writes.
//! Must not know: parameter lists, other units.

use super::{Disk, read_failure, write_failure};
use crate::block_device::{BlockDevice, ByteRange};
use crate::cdb::Blocks;
use crate::data_buffer::DataBuffer;
use crate::inquiry::{MAX_COPY_SEGMENT_BYTES, t10_designator};
use crate::sense::{Failure, Sense};

impl<D: BlockDevice> Disk<D> {
    /// Is `designator` of type `kind` (VPD page 83h: 1 T10 vendor, 3 NAA) a name of this disk?
    pub(crate) fn is_named(&self, kind: u8, designator: &[u8]) -> bool {
        let identity = self.device.identity();
        match kind & 0x0F {
            1 => t10_designator(identity, &self.options.name) == designator,
            3 => identity.naa == designator,
            _ => false,
        }
    }

    /// The bytes of a copy's end on this disk, if it may take part.
    pub(crate) fn copy_range(&self, lba: u64, length: u64, writes: bool) -> Result<ByteRange, Failure> {
        let geometry = self.device.geometry();
        let block = u64::from(geometry.logical_block);
        if !length.is_multiple_of(block) || length > MAX_COPY_SEGMENT_BYTES {
            return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.into());
        }
        self.check_medium()?;
        if writes {
            self.check_writable(&geometry)?;
        }
        self.check_range(Blocks { lba, count: length / block }, &geometry)
    }

    pub(crate) async fn copy_out(&self, position: u64, into: &DataBuffer) -> Result<(), Failure> {
        let range = ByteRange { start: position, length: into.len() as u64 };
        let _held = self.ranges.shared(range).await;
        self.device.read(position, into).await.map_err(read_failure(&self.device.geometry()))
    }

    pub(crate) async fn copy_in(&self, position: u64, from: &DataBuffer) -> Result<(), Failure> {
        let geometry = self.device.geometry();
        let range = ByteRange { start: position, length: from.len() as u64 };
        let _held = self.ranges.shared(range).await;
        self.device.write(position, from, self.writes_through(&geometry)).await.map_err(write_failure(&geometry))
    }

    fn check_medium(&self) -> Result<(), Failure> {
        if !self.loaded.get() {
            return Err(Sense::NO_MEDIUM.into());
        }
        match self.sanitize.get() {
            super::sanitize::State::Idle => Ok(()),
            super::sanitize::State::Running => Err(Sense::SANITIZING.into()),
            super::sanitize::State::Failed { .. } => Err(Sense::SANITIZE_FAILED.into()),
        }
    }
}
