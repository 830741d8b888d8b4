//! Owns: a target: its logical units, REPORT LUNS, absent LUNs, unit attentions.
//! Promises: every command gets exactly one completion; `transferred` never exceeds the transport's buffer.
//! Must not know: transports; which commands a kind of unit has.

use crate::attention::{Attentions, UnitAttention};
use crate::block_device::BlockDevice;
use crate::cdb::Cdb;
use crate::data_buffer::DataBuffer;
use crate::disk::{Data, Disk, Success};
use crate::inquiry;
use crate::reply::send;
use crate::sense::{Failure, Sense, SenseFormat, Status};
use crate::task::{Command, Completion, Lun, NexusId};

/// One logical unit.
#[derive(Debug)]
struct LogicalUnit<D> {
    lun: Lun,
    disk: Disk<D>,
    attentions: Attentions,
}

/// A SCSI target device with its logical units, for one single-threaded executor.
#[derive(Debug)]
pub struct Target<D> {
    /// Sorted by LUN.
    units: Vec<LogicalUnit<D>>,
}

impl<D> Default for Target<D> {
    fn default() -> Self {
        Self { units: Vec::new() }
    }
}

impl<D: BlockDevice> Target<D> {
    /// A target without units.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk; a disk that was at `lun` is given back.
    pub fn insert(&mut self, lun: Lun, disk: Disk<D>) -> Option<Disk<D>> {
        let unit = LogicalUnit { lun, disk, attentions: Attentions::default() };
        match self.units.binary_search_by_key(&lun, |unit| unit.lun) {
            Ok(index) => Some(std::mem::replace(&mut self.units[index], unit).disk),
            Err(index) => {
                self.units.insert(index, unit);
                None
            }
        }
    }

    /// The disks in the order of their LUNs.
    pub fn disks(&self) -> impl Iterator<Item = (Lun, &Disk<D>)> {
        self.units.iter().map(|unit| (unit.lun, &unit.disk))
    }

    /// Is there a unit at `lun`?
    pub fn has(&self, lun: Lun) -> bool {
        self.find(lun).is_some()
    }

    /// A new I_T nexus: its first command to each unit reports that power is on.
    pub fn attach(&self, nexus: NexusId) {
        self.units.iter().for_each(|unit| unit.attentions.attach(nexus));
    }

    /// The nexus is gone.
    pub fn detach(&self, nexus: NexusId) {
        self.units.iter().for_each(|unit| unit.attentions.detach(nexus));
    }

    /// Resets all units. The transport has ended its commands before.
    pub fn reset(&self, attention: UnitAttention) {
        for unit in &self.units {
            unit.disk.reset();
            unit.attentions.post(attention, None);
        }
    }

    /// Resets one unit, if it is there. The transport has ended its commands before.
    pub fn reset_unit(&self, lun: Lun) {
        if let Some(unit) = self.find(lun) {
            unit.disk.reset();
            unit.attentions.post(UnitAttention::DeviceReset, None);
        }
    }

    /// Tells every nexus of a unit that something about it has changed.
    pub fn notify(&self, lun: Lun, attention: UnitAttention) {
        if let Some(unit) = self.find(lun) {
            unit.attentions.post(attention, None);
        }
    }

    fn find(&self, lun: Lun) -> Option<&LogicalUnit<D>> {
        let index = self.units.binary_search_by_key(&lun, |unit| unit.lun).ok()?;
        Some(&self.units[index])
    }

    /// Carries out one command. Poll it to its end (see [`BlockDevice`]).
    pub async fn execute(&self, command: &Command<'_>) -> Completion {
        let unit = command.lun.and_then(|lun| self.find(lun));
        let format = unit.map_or(SenseFormat::Fixed, |unit| unit.disk.sense_format());
        let result = match (Cdb::parse(command.cdb), unit) {
            (Ok(cdb), Some(unit)) => self.execute_on(unit, &cdb, command).await,
            (Err(sense), Some(unit)) => Err(unit.attentions.take(command.nexus).unwrap_or(sense).into()),
            (Ok(cdb), None) => self.execute_absent(&cdb, command.data_in).map(Success::moved),
            (Err(_), None) => Err(Sense::LUN_NOT_SUPPORTED.into()),
        };
        complete(result, format)
    }

    async fn execute_on(&self, unit: &LogicalUnit<D>, cdb: &Cdb, command: &Command<'_>) -> Result<Success, Failure> {
        match *cdb {
            // These three bypass unit attentions (SAM-5, 5.14).
            Cdb::Inquiry { .. } => {}
            Cdb::ReportLuns { select, allocation } => {
                unit.attentions.clear(command.nexus, UnitAttention::LunsChanged);
                return self.report_luns(select, allocation, command.data_in).map(Success::moved);
            }
            Cdb::RequestSense { descriptor, allocation } => {
                let sense = unit.attentions.take(command.nexus).unwrap_or_else(|| standing_sense(&unit.disk));
                return Ok(Success::moved(request_sense(sense, descriptor, allocation, command.data_in)));
            }
            _ => {
                if let Some(sense) = unit.attentions.take(command.nexus) {
                    return Err(sense.into());
                }
            }
        }
        let data = Data { out: command.data_out, into: command.data_in };
        let success = unit.disk.execute(cdb, data).await?;
        if success.mode_changed {
            unit.attentions.post(UnitAttention::ModeChanged, Some(command.nexus));
        }
        Ok(success)
    }

    /// A LUN where there is nothing (SPC-4, 4.5.5 and 6.6.2).
    fn execute_absent(&self, cdb: &Cdb, into: &DataBuffer) -> Result<u64, Failure> {
        match *cdb {
            Cdb::Inquiry { vital_page: None, allocation } => {
                Ok(send(&inquiry::standard_of_absent_unit(), allocation, into))
            }
            Cdb::RequestSense { descriptor, allocation } => {
                Ok(request_sense(Sense::LUN_NOT_SUPPORTED, descriptor, allocation, into))
            }
            Cdb::ReportLuns { select, allocation } => self.report_luns(select, allocation, into),
            _ => Err(Sense::LUN_NOT_SUPPORTED.into()),
        }
    }

    /// REPORT LUNS (SPC-4, 6.33).
    fn report_luns(&self, select: u8, allocation: usize, into: &DataBuffer) -> Result<u64, Failure> {
        if allocation < 16 {
            return Err(Sense::cdb_field(6, Some(7)).into());
        }
        let listed = match select {
            0 | 2 => self.units.as_slice(),
            // Well known logical units only: there are none.
            1 => &[],
            _ => return Err(Sense::cdb_field(2, Some(7)).into()),
        };
        let mut answer = vec![0; 8];
        answer[..4].copy_from_slice(&(8 * listed.len() as u32).to_be_bytes());
        for unit in listed {
            answer.extend_from_slice(&unit.lun.to_sam());
        }
        Ok(send(&answer, allocation, into))
    }
}

/// What REQUEST SENSE tells when no unit attention is pending.
fn standing_sense<D: BlockDevice>(disk: &Disk<D>) -> Sense {
    if disk.is_stopped() { Sense::STOPPED } else { Sense::NO_SENSE }
}

fn request_sense(sense: Sense, descriptor: bool, allocation: usize, into: &DataBuffer) -> u64 {
    let format = if descriptor { SenseFormat::Descriptor } else { SenseFormat::Fixed };
    send(sense.encode(format).as_bytes(), allocation, into)
}

fn complete(result: Result<Success, Failure>, format: SenseFormat) -> Completion {
    let none = Completion { status: Status::Good, sense: None, transferred: 0, overrun: false };
    match result {
        Ok(success) => Completion { transferred: success.transferred, ..none },
        Err(Failure::Check(sense)) => {
            Completion { status: Status::CheckCondition, sense: Some(sense.encode(format)), ..none }
        }
        Err(Failure::Busy) => Completion { status: Status::Busy, ..none },
        Err(Failure::Overrun) => Completion { overrun: true, ..none },
    }
}
