//! Owns: a target: its logical units, ports and nexuses; the order of checks that a command passes before it is carried out.
//! Promises: every command gets exactly one completion; `transferred` never exceeds the transport's buffer.
//! Must not know: transports; how a unit carries out its commands.

mod access;
mod copy;
mod manage;
mod units;

use std::cell::RefCell;
use std::rc::Rc;

use crate::attention::{Attentions, UnitAttention};
use crate::background::{Background, Done};
use crate::block_device::BlockDevice;
use crate::cdb::{Cdb, DeviceKind};
use crate::data_buffer::DataBuffer;
use crate::disk::{Data, Disk, Success};
use crate::inquiry::{self, PortView};
use crate::reply::send;
use crate::reservation::{Lists, Request, Reservations};
use crate::sense::{Failure, Sense, SenseFormat, Status};
use crate::task::{Command, Completion, Lun, NexusId, ShortBuffer, TaskAttribute};
use crate::task_set::{Abortion, Selection, Task, TaskSet};
use crate::transport_id::{AccessState, TargetPort, TransportId};
pub(crate) use copy::CopyResult;

/// One logical unit.
#[derive(Debug)]
struct LogicalUnit<D> {
    lun: Lun,
    disk: Rc<Disk<D>>,
    attentions: Attentions,
    tasks: Rc<TaskSet>,
    reservations: Reservations,
    /// What RECEIVE COPY RESULTS tells: the last copy of each list identifier and nexus.
    copies: RefCell<Vec<CopyResult>>,
}

impl<D: BlockDevice> LogicalUnit<D> {
    fn new(lun: Lun, disk: Disk<D>) -> Self {
        Self {
            lun,
            disk: Rc::new(disk),
            attentions: Attentions::default(),
            tasks: Rc::default(),
            reservations: Reservations::default(),
            copies: RefCell::default(),
        }
    }
}

/// An initiator port that is connected through a target port.
#[derive(Clone, Debug)]
struct Nexus {
    id: NexusId,
    initiator: TransportId,
    port: u16,
}

/// A SCSI target device with its logical units, for one single-threaded executor.
#[derive(Debug)]
pub struct Target<D> {
    /// Sorted by LUN.
    units: RefCell<Vec<Rc<LogicalUnit<D>>>>,
    nexuses: RefCell<Vec<Nexus>>,
    ports: RefCell<Vec<TargetPort>>,
    /// State of each target port group that is not active and optimized.
    access: RefCell<Vec<(u16, AccessState)>>,
    device_name: RefCell<Option<String>>,
    background: Background,
}

impl<D> Default for Target<D> {
    fn default() -> Self {
        Self {
            units: RefCell::default(),
            nexuses: RefCell::default(),
            ports: RefCell::new(vec![TargetPort::default()]),
            access: RefCell::default(),
            device_name: RefCell::default(),
            background: Background::default(),
        }
    }
}

impl<D: BlockDevice + 'static> Target<D> {
    /// Takes a command into its unit's task set. Call it in the order of arrival; the data may follow later.
    pub fn enter(&self, nexus: NexusId, lun: Option<Lun>, tag: u64, attribute: TaskAttribute) -> Task {
        match lun.and_then(|lun| self.find(lun)) {
            Some(unit) => unit.tasks.enter(nexus, tag, attribute),
            None => Task::outside(),
        }
    }

    /// Carries out one command whose data are all at hand. Poll it to its end (see [`BlockDevice`]).
    pub async fn execute(&self, command: &Command<'_>) -> Completion {
        let task = self.enter(command.nexus, command.lun, command.tag, command.attribute);
        self.run(&task, command).await
    }

    /// Carries out a command that has entered as `task`, when its turn comes. Poll it to its end (see [`BlockDevice`]).
    pub async fn run(&self, task: &Task, command: &Command<'_>) -> Completion {
        let Some(unit) = command.lun.and_then(|lun| self.find(lun)) else {
            return complete(self.execute_elsewhere(command), SenseFormat::Fixed, command);
        };
        if task.is_refused() {
            return Completion { status: Status::TaskSetFull, ..GOOD };
        }
        let result = match task.start().await {
            Ok(()) => self.execute_on(&unit, task, command).await,
            Err(_) => Err(Failure::Aborted),
        };
        match task.end() {
            None => complete(result, unit.disk.sense_format(), command),
            Some(Abortion::Silent) => Completion { aborted: true, ..GOOD },
            Some(Abortion::WithStatus) => Completion { status: Status::TaskAborted, ..GOOD },
        }
    }

    async fn execute_on(
        &self,
        unit: &Rc<LogicalUnit<D>>,
        task: &Task,
        command: &Command<'_>,
    ) -> Result<Success, Failure> {
        let cdb = match Cdb::parse_for(command.cdb, unit.disk.kind()) {
            Ok(cdb) if command.attribute != TaskAttribute::Aca => cdb,
            Ok(_) => return Err(Sense::INVALID_MESSAGE.into()),
            Err(sense) => return Err(unit.attentions.take(command.nexus).unwrap_or(sense).into()),
        };
        match cdb {
            // These three bypass unit attentions (SAM-5, 5.14).
            Cdb::Inquiry { .. } => {}
            Cdb::ReportLuns { select, allocation } => {
                unit.attentions.clear(command.nexus, UnitAttention::LunsChanged);
                return self.report_luns(select, allocation, command.data_in).map(Success::moved);
            }
            Cdb::RequestSense { descriptor, allocation } => {
                let sense = unit.attentions.take(command.nexus).unwrap_or_else(|| unit.disk.standing_sense());
                return Ok(Success::moved(request_sense(sense, descriptor, allocation, command.data_in)));
            }
            _ => {
                if let Some(sense) = unit.attentions.take(command.nexus) {
                    return Err(sense.into());
                }
            }
        }
        unit.reservations.check(command.nexus, &cdb)?;
        self.check_access(command.nexus, &cdb)?;
        unit.disk.check_ready(&cdb)?;
        let data = Data {
            out: command.data_out,
            into: command.data_in,
            truncate: command.short_buffer == ShortBuffer::Truncate,
            task,
        };
        let success = match unit.disk.execute_hot(&cdb, data).await {
            Some(result) => result?,
            // The rest is rare; in a box it does not make the state of reads and writes larger.
            None => Box::pin(self.execute_rare(unit, task, &cdb, data, command.nexus)).await?,
        };
        if success.mode_changed {
            unit.attentions.post(UnitAttention::ModeChanged, Some(command.nexus));
        }
        Ok(success)
    }

    /// The commands that concern more than the unit's own blocks; the rest is the disk's.
    async fn execute_rare(
        &self,
        unit: &Rc<LogicalUnit<D>>,
        task: &Task,
        cdb: &Cdb,
        data: Data<'_>,
        nexus: NexusId,
    ) -> Result<Success, Failure> {
        let moved = match *cdb {
            Cdb::Inquiry { vital_page, allocation } => {
                let name = self.device_name.borrow();
                let ports = self.ports.borrow();
                let view = PortView { ports: &ports, own: self.port_of(nexus), device_name: name.as_deref() };
                unit.disk.inquiry(vital_page, &view).map(|answer| send(&answer, allocation, data.into))
            }
            Cdb::Reserve => unit.reservations.reserve(nexus).map(|()| 0),
            Cdb::Release => {
                unit.reservations.release(nexus);
                Ok(0)
            }
            Cdb::PersistentReserveIn { action, allocation } => {
                Ok(send(&unit.reservations.answer(action), allocation, data.into))
            }
            Cdb::PersistentReserveOut { .. } => self.persistent_out(unit, task, cdb, data, nexus).await,
            Cdb::ReportTargetPortGroups { extended, allocation } => {
                Ok(send(&self.port_groups(extended), allocation, data.into))
            }
            Cdb::ExtendedCopy { length } => self.extended_copy(unit, task, length, data.out, nexus).await,
            Cdb::ReceiveCopyResults { action, list, allocation } => {
                self.copy_results(unit, action, list, nexus).map(|answer| send(&answer, allocation, data.into))
            }
            Cdb::StartStopUnit { start, load_eject, .. } => {
                let moved = unit.disk.start_stop(cdb).await;
                if moved.is_ok() && start && load_eject {
                    unit.attentions.post(UnitAttention::MediumChanged, Some(nexus));
                }
                moved
            }
            Cdb::PreventAllowMediumRemoval { prevent } => unit.disk.prevent(nexus, prevent),
            Cdb::Sanitize { .. } => self.sanitize(unit, task, cdb, data.out).await,
            _ => return unit.disk.execute_rare(cdb, data).await,
        };
        moved.map(Success::moved)
    }

    async fn persistent_out(
        &self,
        unit: &LogicalUnit<D>,
        task: &Task,
        cdb: &Cdb,
        data: Data<'_>,
        nexus: NexusId,
    ) -> Result<u64, Failure> {
        let Cdb::PersistentReserveOut { action, scope, kind, length } = *cdb else {
            return Err(Sense::INVALID_OPCODE.into());
        };
        if length > MAX_PARAMETER_LIST {
            return Err(Sense::PARAMETER_LIST_LENGTH.into());
        }
        let list = crate::disk::first_bytes(data.out, length as u64)?.to_vec();
        let target_ports: Vec<u16> = self.ports.borrow().iter().map(|port| port.relative_id).collect();
        let lists = Lists { target_ports: &target_ports, can_persist: unit.reservations.can_persist() };
        let request = Request::parse(action, scope, kind, &list, &lists)?;
        let effects = unit.reservations.change(nexus, &request, &lists, task).await?;
        for (other, attention) in effects.attentions {
            unit.attentions.post_to(attention, other);
        }
        for other in effects.abort {
            let how = self.abortion(unit, Some(nexus));
            let lost = !unit.tasks.abort(Selection::Nexus(other), Some(task), how).is_empty();
            if lost && other != nexus && !unit.disk.reports_aborted_tasks() {
                unit.attentions.post_to(UnitAttention::CommandsCleared, other);
            }
            unit.tasks.drained_but(Selection::Nexus(other), Some(task)).await;
        }
        Ok(length as u64)
    }

    /// SANITIZE, here or in the background.
    async fn sanitize(
        &self,
        unit: &Rc<LogicalUnit<D>>,
        task: &Task,
        cdb: &Cdb,
        out: &DataBuffer,
    ) -> Result<u64, Failure> {
        let Cdb::Sanitize { action, immediate, unrestricted_exit, length } = *cdb else {
            return Err(Sense::INVALID_OPCODE.into());
        };
        let taken = length as u64;
        let Some(work) = unit.disk.prepare_sanitize(action, unrestricted_exit, length, out)? else { return Ok(taken) };
        if !self.background.is_served() {
            unit.disk.sanitize(work).await?;
            return Ok(taken);
        }
        let (disk, done) = (unit.disk.clone(), Rc::new(Done::default()));
        let tell = done.clone();
        // Neither an abort nor a reset ends it (SBC-4, 4.11.2), so it does not depend on the command.
        self.background.add(async move { tell.set(disk.sanitize(work).await) });
        if immediate {
            // What goes wrong stays as the unit's state: later commands tell it.
            return Ok(taken);
        }
        done.wait(task).await.map(|()| taken)
    }

    /// Commands to the well known unit, and to LUNs where there is nothing (SPC-4, 4.5.5 and 6.6.2).
    fn execute_elsewhere(&self, command: &Command<'_>) -> Result<Success, Failure> {
        let into = command.data_in;
        let well_known = command.lun == Some(Lun::REPORT_LUNS);
        let nothing = || Failure::Check(Sense::LUN_NOT_SUPPORTED);
        let cdb = Cdb::parse_for(command.cdb, DeviceKind::Disk)
            .map_err(|sense| if well_known { sense.into() } else { nothing() })?;
        let moved = match cdb {
            Cdb::Inquiry { vital_page: None, allocation } => {
                let answer = match well_known {
                    true => inquiry::standard_of_well_known_unit(),
                    false => inquiry::standard_of_absent_unit(),
                };
                send(&answer, allocation, into)
            }
            Cdb::Inquiry { vital_page: Some(0), allocation } if well_known => {
                send(&[0x1E, 0, 0, 1, 0], allocation, into)
            }
            Cdb::TestUnitReady if well_known => 0,
            Cdb::RequestSense { descriptor, allocation } => {
                let sense = if well_known { Sense::NO_SENSE } else { Sense::LUN_NOT_SUPPORTED };
                request_sense(sense, descriptor, allocation, into)
            }
            Cdb::ReportLuns { select, allocation } => self.report_luns(select, allocation, into)?,
            _ if well_known => return Err(Sense::INVALID_OPCODE.into()),
            _ => return Err(nothing()),
        };
        Ok(Success::moved(moved))
    }

    /// REPORT LUNS (SPC-4, 6.33).
    fn report_luns(&self, select: u8, allocation: usize, into: &DataBuffer) -> Result<u64, Failure> {
        if allocation < 16 {
            return Err(Sense::cdb_field(6, Some(7)).into());
        }
        let units = self.units.borrow();
        let mut luns: Vec<Lun> = match select {
            0 | 2 => units.iter().map(|unit| unit.lun).collect(),
            1 => Vec::new(),
            _ => return Err(Sense::cdb_field(2, Some(7)).into()),
        };
        if select != 0 {
            luns.push(Lun::REPORT_LUNS);
        }
        let mut answer = vec![0; 8];
        answer[..4].copy_from_slice(&(8 * luns.len() as u32).to_be_bytes());
        for lun in luns {
            answer.extend_from_slice(&lun.to_sam());
        }
        Ok(send(&answer, allocation, into))
    }
}

/// The longest parameter list of PERSISTENT RESERVE OUT and EXTENDED COPY that is read, in bytes.
const MAX_PARAMETER_LIST: usize = 64 << 10;

fn request_sense(sense: Sense, descriptor: bool, allocation: usize, into: &DataBuffer) -> u64 {
    let format = if descriptor { SenseFormat::Descriptor } else { SenseFormat::Fixed };
    send(sense.encode(format).as_bytes(), allocation, into)
}

const GOOD: Completion =
    Completion { status: Status::Good, sense: None, transferred: 0, overflow: 0, overrun: false, aborted: false };

fn complete(result: Result<Success, Failure>, format: SenseFormat, command: &Command<'_>) -> Completion {
    let truncate = command.short_buffer == ShortBuffer::Truncate;
    match result {
        Ok(success) => {
            let room = command.data_out.len().max(command.data_in.len()) as u64;
            let transferred = success.wanted.min(room);
            let overflow = if truncate { success.wanted - transferred } else { 0 };
            Completion { transferred, overflow, ..GOOD }
        }
        Err(Failure::Check(sense)) => {
            Completion { status: Status::CheckCondition, sense: Some(sense.encode(format)), ..GOOD }
        }
        // Only what cannot be done in part comes here.
        Err(Failure::Overrun) if truncate => {
            let sense = Sense::PARAMETER_LIST_LENGTH.encode(format);
            Completion { status: Status::CheckCondition, sense: Some(sense), ..GOOD }
        }
        Err(Failure::Overrun) => Completion { overrun: true, ..GOOD },
        Err(Failure::Busy) => Completion { status: Status::Busy, ..GOOD },
        Err(Failure::Conflict) => Completion { status: Status::ReservationConflict, ..GOOD },
        Err(Failure::Aborted) => Completion { aborted: true, ..GOOD },
    }
}
