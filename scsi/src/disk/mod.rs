//! Owns: a disk: the commands of SBC and the mode state over one [`BlockDevice`].
//! Promises: storage sees only whole blocks inside the capacity; work per command is bounded by the announced limits.
//! Must not know: LUNs, nexuses, transports.

mod medium;
mod primary;
mod provisioning;
mod verify;

use std::cell::Cell;

use crate::block_device::{BlockDevice, ByteRange, Geometry, StorageError};
use crate::cdb::{Blocks, Cdb};
use crate::data_buffer::DataBuffer;
use crate::inquiry::{MAX_TRANSFER_BYTES, Personality, ProductName};
use crate::mode::ModeState;
use crate::range_lock::RangeLocks;
use crate::sense::{Activity, Failure, Sense, SenseFormat, failure_of};

/// How a disk shows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Which generation guests see.
    pub personality: Personality,
    /// Vendor, product and revision.
    pub name: ProductName,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { personality: Personality::Modern, name: ProductName::virtual_disk(Personality::Modern) }
    }
}

/// The data of one command, both ways.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data<'a> {
    pub(crate) out: &'a DataBuffer,
    pub(crate) into: &'a DataBuffer,
}

/// How a command on a disk ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Success {
    /// Bytes moved.
    pub(crate) transferred: u64,
    /// Other nexuses must be told that mode parameters have changed.
    pub(crate) mode_changed: bool,
}

impl Success {
    pub(crate) fn moved(transferred: u64) -> Self {
        Self { transferred, mode_changed: false }
    }
}

/// A disk over a block device.
#[derive(Debug)]
pub struct Disk<D> {
    device: D,
    options: DiskOptions,
    mode: ModeState,
    stopped: Cell<bool>,
    ranges: RangeLocks,
}

impl<D: BlockDevice> Disk<D> {
    /// A disk over `device`, started, with default mode parameters.
    pub fn new(device: D, options: DiskOptions) -> Self {
        let mode = ModeState::new(device.geometry().write_cache);
        Self { device, options, mode, stopped: Cell::new(false), ranges: RangeLocks::default() }
    }

    /// What stores its blocks.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Gives the device back.
    pub fn into_device(self) -> D {
        self.device
    }

    pub(crate) fn sense_format(&self) -> SenseFormat {
        self.mode.sense_format()
    }

    /// Logical unit reset: mode parameters and motor as after power on.
    pub(crate) fn reset(&self) {
        self.mode.reset();
        self.stopped.set(false);
    }

    /// Carries out a command, except those that concern the target as a whole.
    pub(crate) async fn execute(&self, cdb: &Cdb, data: Data<'_>) -> Result<Success, Failure> {
        match *cdb {
            Cdb::Read { blocks } => self.read(blocks, data.into).await.map(Success::moved),
            Cdb::Write { blocks, force_unit_access } => {
                self.write(blocks, force_unit_access, data.out).await.map(Success::moved)
            }
            // The rest is rare; in a box it does not make the state of reads and writes larger.
            _ => Box::pin(self.execute_rare(cdb, data)).await,
        }
    }

    async fn execute_rare(&self, cdb: &Cdb, data: Data<'_>) -> Result<Success, Failure> {
        if let Cdb::ModeSelect(request) = cdb {
            return self.mode_select(request, data.out);
        }
        let moved = match *cdb {
            Cdb::WriteAndVerify { blocks, check } => self.write_and_verify(blocks, check, data.out).await,
            Cdb::Verify { blocks, check } => self.verify(blocks, check, data.out).await,
            Cdb::CompareAndWrite { blocks, force_unit_access } => {
                self.compare_and_write(blocks, force_unit_access, data.out).await
            }
            Cdb::Prefetch { blocks } => self.check_range(blocks, &self.device.geometry()).map(|_| 0),
            Cdb::SynchronizeCache { blocks } => self.synchronize_cache(blocks).await,
            Cdb::WriteSame { blocks, unmap, anchor, no_data_out } => {
                let kind = provisioning::WriteSameKind { unmap, anchor, no_data_out };
                self.write_same(blocks, kind, data.out).await
            }
            Cdb::Unmap { anchor, length } => self.unmap(anchor, length, data.out).await,
            Cdb::GetLbaStatus { lba, allocation } => self.get_lba_status(lba, allocation, data.into).await,
            Cdb::StartStopUnit { start, load_eject, no_flush, power_condition } => {
                self.start_stop(start, load_eject, no_flush, power_condition).await
            }
            _ => self.execute_primary(cdb, data.into),
        };
        moved.map(Success::moved)
    }

    /// Makes everything durable: at the end of a session, or before the motor stops.
    pub async fn flush(&self) -> Result<(), StorageError> {
        self.device.flush().await
    }

    /// The bytes of `blocks`, if they are all on the disk and the command's length is within the announced limit.
    fn transfer_range(&self, blocks: Blocks, geometry: &Geometry) -> Result<ByteRange, Failure> {
        let range = self.check_range(blocks, geometry)?;
        if range.length > MAX_TRANSFER_BYTES {
            return Err(Sense::INVALID_FIELD_IN_CDB.into());
        }
        Ok(range)
    }

    /// The bytes of `blocks`, if they are all on the disk and the motor runs.
    fn check_range(&self, blocks: Blocks, geometry: &Geometry) -> Result<ByteRange, Failure> {
        if self.stopped.get() {
            return Err(Sense::STOPPED.into());
        }
        if blocks.lba > geometry.blocks || blocks.count > geometry.blocks - blocks.lba {
            return Err(Sense::LBA_OUT_OF_RANGE.with_information(blocks.lba.max(geometry.blocks)).into());
        }
        let logical = u64::from(geometry.logical_block);
        Ok(ByteRange { start: blocks.lba * logical, length: blocks.count * logical })
    }

    fn check_writable(&self, geometry: &Geometry) -> Result<(), Failure> {
        if geometry.read_only || self.mode.software_write_protect() {
            return Err(Sense::WRITE_PROTECTED.into());
        }
        Ok(())
    }
}

/// The first `length` bytes of `buffer`, or an overrun if it has fewer.
fn first_bytes(buffer: &DataBuffer, length: u64) -> Result<DataBuffer, Failure> {
    if length > buffer.len() as u64 {
        return Err(Failure::Overrun);
    }
    Ok(buffer.slice(0..length as usize))
}

fn read_failure(geometry: &Geometry) -> impl Fn(StorageError) -> Failure {
    let logical = geometry.logical_block;
    move |error| failure_of(error, Activity::Reading, logical)
}

fn write_failure(geometry: &Geometry) -> impl Fn(StorageError) -> Failure {
    let logical = geometry.logical_block;
    move |error| failure_of(error, Activity::Writing, logical)
}
