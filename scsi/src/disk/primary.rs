//! Owns: the commands that move no blocks: INQUIRY, capacity, mode, diagnostics, supported operation codes.
//! Promises: answers agree with what the other commands do.
//! Must not know: storage beyond its geometry and identity.

use super::{Disk, Success, first_bytes};
use crate::block_device::{BlockDevice, Geometry};
use crate::cdb::{Cdb, ModeSelect, OPERATIONS, OpcodeQuery, Operation};
use crate::data_buffer::DataBuffer;
use crate::reply::send;
use crate::sense::{Failure, Sense};

impl<D: BlockDevice> Disk<D> {
    pub(super) fn execute_primary(&self, cdb: &Cdb, into: &DataBuffer) -> Result<u64, Failure> {
        let geometry = self.device.geometry();
        match *cdb {
            Cdb::TestUnitReady if self.stopped.get() => Err(Sense::STOPPED.into()),
            Cdb::TestUnitReady => Ok(0),
            Cdb::LogSense { control, page, subpage, parameter, allocation } => {
                Ok(send(&self.log_page(control, page, subpage, parameter)?, allocation, into))
            }
            Cdb::ReadDefectData { long, lists, allocation } => {
                Ok(send(&self.defect_data(long, lists), allocation, into))
            }
            Cdb::ReceiveDiagnostic { page, allocation } => Ok(send(&self.diagnostic_page(page)?, allocation, into)),
            Cdb::ModeSense(request) => {
                let answer = self.mode.sense(&request, &geometry)?;
                Ok(send(&answer, request.allocation, into))
            }
            Cdb::ReadCapacity10 => Ok(send(&read_capacity_10(&geometry), 8, into)),
            Cdb::ReadCapacity16 { allocation } => Ok(send(&read_capacity_16(&geometry), allocation, into)),
            Cdb::SendDiagnostic { self_test, self_test_code, length } => {
                send_diagnostic(self_test, self_test_code, length)
            }
            Cdb::ReportSupportedOperationCodes { query, timeouts, allocation } => {
                let answer = report_operations(query, timeouts, |one| self.supports(one))?;
                Ok(send(&answer, allocation, into))
            }
            Cdb::ReportSupportedTaskManagementFunctions { extended, allocation } => {
                Ok(send(report_task_management(extended), allocation, into))
            }
            _ => Err(Sense::INVALID_OPCODE.into()),
        }
    }

    pub(super) fn mode_select(&self, request: &ModeSelect, out: &DataBuffer) -> Result<Success, Failure> {
        let list = first_bytes(out, request.length as u64)?.to_vec();
        let mode_changed = self.mode.select(request, &list, &self.device.geometry())?;
        Ok(Success { mode_changed, ..Success::moved(list.len() as u64) })
    }

    /// Does this unit have the command?
    fn supports(&self, operation: &Operation) -> bool {
        let geometry = self.device.geometry();
        let given = match operation.opcode() {
            0x42 => geometry.thin,
            0x9C => self.device.atomic_write_bytes() != 0,
            _ => true,
        };
        given && operation.is_for(self.options.kind)
    }
}

/// READ CAPACITY(10) data (SBC-3, 5.15.2): FFFFFFFFh says that the 16-byte form must be used.
fn read_capacity_10(geometry: &Geometry) -> Vec<u8> {
    let last = u32::try_from(geometry.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
    [last.to_be_bytes(), geometry.logical_block.to_be_bytes()].concat()
}

/// READ CAPACITY(16) data (SBC-3, 5.16.2).
fn read_capacity_16(geometry: &Geometry) -> Vec<u8> {
    let mut answer = vec![0; 32];
    answer[..8].copy_from_slice(&geometry.blocks.saturating_sub(1).to_be_bytes());
    answer[8..12].copy_from_slice(&geometry.logical_block.to_be_bytes());
    let per_physical = (geometry.physical_block / geometry.logical_block).max(1);
    answer[13] = per_physical.ilog2() as u8;
    if geometry.thin {
        answer[14] |= 0x80;
        answer[14] |= u8::from(geometry.unmapped_reads_zero) << 6;
    }
    answer
}

/// SEND DIAGNOSTIC: the default self-test passes; there is nothing else to test.
fn send_diagnostic(self_test: bool, self_test_code: u8, length: usize) -> Result<u64, Failure> {
    if length != 0 {
        return Err(Sense::cdb_field(3, Some(7)).into());
    }
    if self_test_code != 0 || !self_test {
        return Err(Sense::cdb_field(1, Some(7)).into());
    }
    Ok(0)
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4, 6.35).
fn report_operations(
    query: OpcodeQuery,
    timeouts: bool,
    supports: impl Fn(&Operation) -> bool,
) -> Result<Vec<u8>, Sense> {
    let supported = |operation: &&Operation| supports(operation);
    let has_actions = |opcode: u8| OPERATIONS.iter().any(|one| one.opcode() == opcode && one.service_action.is_some());
    let (opcode, action) = match query {
        OpcodeQuery::All => {
            let mut answer = vec![0; 4];
            for operation in OPERATIONS.iter().filter(supported) {
                push_operation(&mut answer, operation, timeouts);
            }
            let length = (answer.len() - 4) as u32;
            answer[..4].copy_from_slice(&length.to_be_bytes());
            return Ok(answer);
        }
        OpcodeQuery::Opcode(opcode) if has_actions(opcode) => return Err(Sense::cdb_field(2, Some(2))),
        OpcodeQuery::Opcode(opcode) => (opcode, None),
        OpcodeQuery::ServiceAction(opcode, _) if !has_actions(opcode) => return Err(Sense::cdb_field(2, Some(2))),
        OpcodeQuery::ServiceAction(opcode, action) => (opcode, Some(action)),
        OpcodeQuery::Either(opcode, action) => (opcode, has_actions(opcode).then_some(action)),
    };
    let found = OPERATIONS
        .iter()
        .filter(supported)
        .find(|one| one.opcode() == opcode && one.service_action.map(u16::from) == action);
    let Some(operation) = found else {
        // Support 1: not supported.
        return Ok(vec![0, 1, 0, 0]);
    };
    let descriptor = if timeouts { 0x80 } else { 0 };
    let mut answer = vec![0, descriptor | 3];
    answer.extend_from_slice(&(operation.usage.len() as u16).to_be_bytes());
    answer.extend_from_slice(operation.usage);
    if timeouts {
        answer.extend_from_slice(&NO_TIMEOUTS);
    }
    Ok(answer)
}

/// A command timeouts descriptor that gives no timeouts.
const NO_TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn push_operation(answer: &mut Vec<u8>, operation: &Operation, timeouts: bool) {
    let action = operation.service_action.map_or(0, u16::from).to_be_bytes();
    let length = (operation.usage.len() as u16).to_be_bytes();
    let flags = u8::from(timeouts) << 1 | u8::from(operation.service_action.is_some());
    answer.extend_from_slice(&[operation.opcode(), 0, action[0], action[1], 0, flags, length[0], length[1]]);
    if timeouts {
        answer.extend_from_slice(&NO_TIMEOUTS);
    }
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4, 6.36): abort task, abort task set, clear ACA, clear task set,
/// logical unit reset, query task, target reset; in the second byte query task set.
fn report_task_management(extended: bool) -> &'static [u8] {
    const FUNCTIONS: u8 = 0x80 | 0x40 | 0x20 | 0x10 | 0x08 | 0x04 | 0x02;
    const MORE: u8 = 0x01;
    if extended { &[FUNCTIONS, MORE, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] } else { &[FUNCTIONS, MORE, 0, 0] }
}
