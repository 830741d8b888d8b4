//! Owns: a disk: the commands of SBC and the mode state over one [`BlockDevice`].
//! Promises: storage sees only whole blocks inside the capacity; work per command is bounded by the announced limits.
//! Must not know: LUNs, nexuses, transports.

mod atomic;
mod copying;
mod logs;
mod medium;
mod multimedia;
mod primary;
mod provisioning;
mod sanitize;
mod verify;

use std::cell::{Cell, RefCell};

use crate::block_device::{BlockDevice, ByteRange, Geometry, StorageError};
use crate::cdb::{Blocks, Cdb, DeviceKind};
use crate::data_buffer::DataBuffer;
use crate::inquiry::{self, MAX_TRANSFER_BYTES, Personality, PortView, ProductName, UnitKind, UnitView};
use crate::mode::ModeState;
use crate::range_lock::RangeLocks;
use crate::sense::{Activity, Failure, Sense, SenseFormat, failure_of};
use crate::task::NexusId;
use crate::task_set::Task;

/// How a disk shows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Which generation guests see.
    pub personality: Personality,
    /// Vendor, product and revision.
    pub name: ProductName,
    /// What the unit is.
    pub kind: DeviceKind,
    /// The medium can be taken out. A CD-ROM's always can.
    pub removable: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            personality: Personality::Modern,
            name: ProductName::virtual_disk(Personality::Modern),
            kind: DeviceKind::Disk,
            removable: false,
        }
    }
}

/// The data of one command, both ways.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Data<'a> {
    pub(crate) out: &'a DataBuffer,
    pub(crate) into: &'a DataBuffer,
    /// Reads and writes do what the buffer allows, if it is too short.
    pub(crate) truncate: bool,
    /// The command's place in the task set: long work ends when it is aborted.
    pub(crate) task: &'a Task,
}

impl Data<'_> {
    /// The data of a command that cannot be done in part. A transport that knows how much the initiator meant to send gets a
    /// refusal too if that is more than the CDB says: one of the two is wrong, and data would be lost.
    pub(crate) fn exactly(&self, length: u64) -> Result<DataBuffer, Failure> {
        if self.truncate && self.out.len() as u64 != length {
            return Err(Sense::INVALID_FIELD_IN_CDB.into());
        }
        first_bytes(self.out, length)
    }
}

/// How a command on a disk ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Success {
    /// Bytes that were to be moved; as many as the buffer takes were.
    pub(crate) wanted: u64,
    /// Other nexuses must be told that mode parameters have changed.
    pub(crate) mode_changed: bool,
}

impl Success {
    pub(crate) fn moved(wanted: u64) -> Self {
        Self { wanted, mode_changed: false }
    }
}

/// A disk over a block device.
#[derive(Debug)]
pub struct Disk<D> {
    device: D,
    options: DiskOptions,
    mode: ModeState,
    stopped: Cell<bool>,
    /// The medium is in.
    loaded: Cell<bool>,
    /// Who has forbidden its removal.
    prevents: RefCell<Vec<NexusId>>,
    sanitize: Cell<sanitize::State>,
    ranges: RangeLocks,
}

impl<D: BlockDevice> Disk<D> {
    /// A disk over `device`, started, with default mode parameters.
    pub fn new(device: D, options: DiskOptions) -> Self {
        let mode = ModeState::new(device.geometry().write_cache);
        Self {
            device,
            options,
            mode,
            stopped: Cell::new(false),
            loaded: Cell::new(true),
            prevents: RefCell::default(),
            sanitize: Cell::default(),
            ranges: RangeLocks::default(),
        }
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
        self.prevents.borrow_mut().clear();
    }

    /// What the unit is.
    pub fn kind(&self) -> DeviceKind {
        self.options.kind
    }

    /// Can the medium be taken out?
    pub fn is_removable(&self) -> bool {
        self.options.removable || self.options.kind == DeviceKind::CdRom
    }

    /// Is the medium in?
    pub fn is_loaded(&self) -> bool {
        self.loaded.get()
    }

    /// The operator puts the medium in or takes it out, whatever the initiators have forbidden; tell them with
    /// [`crate::Target::notify`]. Nothing happens to a disk that is not removable.
    pub fn set_loaded(&self, loaded: bool) {
        if self.is_removable() {
            self.loaded.set(loaded);
        }
    }

    /// Control mode page, TAS: commands that others abort end with status TASK ABORTED.
    pub(crate) fn reports_aborted_tasks(&self) -> bool {
        self.mode.task_aborted_status()
    }

    /// The standard data, or a page, of INQUIRY.
    pub(crate) fn inquiry(&self, vital_page: Option<u8>, ports: &PortView<'_>) -> Result<Vec<u8>, Failure> {
        let kind = UnitKind { device: self.options.kind, removable: self.is_removable() };
        let name = &self.options.name;
        let Some(page) = vital_page else { return Ok(inquiry::standard(self.options.personality, name, kind, ports)) };
        let atomic_write_bytes = self.device.atomic_write_bytes();
        let view = UnitView { kind, ports: *ports, atomic_write_bytes };
        Ok(inquiry::vital_page(page, &self.device.geometry(), self.device.identity(), name, &view)?)
    }

    /// Does the state of medium, motor and sanitize operation let `cdb` through?
    pub(crate) fn check_ready(&self, cdb: &Cdb) -> Result<(), Failure> {
        self.check_sanitize(cdb)?;
        if self.loaded.get() {
            return Ok(());
        }
        let without_medium = matches!(
            cdb,
            Cdb::Inquiry { .. }
                | Cdb::StartStopUnit { .. }
                | Cdb::PreventAllowMediumRemoval { .. }
                | Cdb::ModeSense(_)
                | Cdb::ModeSelect(_)
                | Cdb::LogSense { .. }
                | Cdb::Reserve
                | Cdb::Release
                | Cdb::PersistentReserveIn { .. }
                | Cdb::PersistentReserveOut { .. }
                | Cdb::SendDiagnostic { .. }
                | Cdb::ReceiveDiagnostic { .. }
                | Cdb::ReportTargetPortGroups { .. }
                | Cdb::ReportSupportedOperationCodes { .. }
                | Cdb::ReportSupportedTaskManagementFunctions { .. }
                | Cdb::MultiMedia(crate::cdb::MultiMedia::GetConfiguration { .. })
                | Cdb::MultiMedia(crate::cdb::MultiMedia::GetEventStatus { .. })
        );
        if without_medium { Ok(()) } else { Err(Sense::NO_MEDIUM.into()) }
    }

    /// What REQUEST SENSE tells when no unit attention is pending.
    pub(crate) fn standing_sense(&self) -> Sense {
        match self.sanitize.get() {
            sanitize::State::Running => return Sense::SANITIZING,
            sanitize::State::Failed { .. } => return Sense::SANITIZE_FAILED,
            sanitize::State::Idle => {}
        }
        match (self.loaded.get(), self.stopped.get()) {
            (false, _) => Sense::NO_MEDIUM,
            (true, true) => Sense::STOPPED,
            (true, false) => Sense::NO_SENSE,
        }
    }

    /// Carries out a READ or a WRITE; `None` for any other command.
    pub(crate) async fn execute_hot(&self, cdb: &Cdb, data: Data<'_>) -> Option<Result<Success, Failure>> {
        match *cdb {
            Cdb::Read { blocks } => Some(self.read(blocks, data).await.map(Success::moved)),
            Cdb::Write { blocks, force_unit_access } => {
                Some(self.write(blocks, force_unit_access, data).await.map(Success::moved))
            }
            _ => None,
        }
    }

    /// Carries out any other command, except those that concern the target.
    pub(crate) async fn execute_rare(&self, cdb: &Cdb, data: Data<'_>) -> Result<Success, Failure> {
        let moved = match *cdb {
            Cdb::ModeSelect(request) => return self.mode_select(&request, data.out),
            Cdb::Prefetch { blocks } => self.check_range(blocks, &self.device.geometry()).map(|_| 0),
            Cdb::WriteAndVerify { blocks, check } => self.write_and_verify(blocks, check, data).await,
            Cdb::Verify { blocks, check } => self.verify(blocks, check, data.out).await,
            Cdb::CompareAndWrite { blocks, force_unit_access } => {
                self.compare_and_write(blocks, force_unit_access, data).await
            }
            Cdb::OrWrite { blocks, force_unit_access } => self.or_write(blocks, force_unit_access, data.out).await,
            Cdb::WriteAtomic { blocks, force_unit_access, boundary } => {
                self.write_atomic(blocks, force_unit_access, boundary, data.out).await
            }
            Cdb::SynchronizeCache { blocks } => self.synchronize_cache(blocks).await,
            Cdb::WriteSame { blocks, unmap, anchor, no_data_out } => {
                let kind = provisioning::WriteSameKind { unmap, anchor, no_data_out };
                self.write_same(blocks, kind, data).await
            }
            Cdb::Unmap { anchor, length } => self.unmap(anchor, length, data.out).await,
            Cdb::GetLbaStatus { lba, allocation } => self.get_lba_status(lba, allocation, data.into).await,
            Cdb::MultiMedia(command) => self.multi_media(command, data.into),
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
pub(crate) fn first_bytes(buffer: &DataBuffer, length: u64) -> Result<DataBuffer, Failure> {
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
