//! Owns: command descriptor blocks; each is parsed once, here, into [`Cdb`].
//! Promises: any bytes give a [`Cdb`] or the sense to refuse them with; reserved bits that are set are refused by name.
//! Must not know: what a command does, capacities, transports.

mod operations;
mod parse;
#[cfg(test)]
mod tests;

use crate::sense::Sense;
use operations::find_operation;
pub use operations::{DeviceKind, DeviceKinds, OPERATIONS, Operation};

/// A run of logical blocks as a CDB names it; not checked against any capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// First logical block address.
    pub lba: u64,
    /// Number of logical blocks.
    pub count: u64,
}

/// What VERIFY and WRITE AND VERIFY compare (SBC-4, BYTCHK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteCheck {
    /// Read the medium only.
    Medium,
    /// Compare with the data-out buffer.
    Compare,
    /// Compare each block with the one block in the data-out buffer.
    CompareSame,
}

/// The two forms of the mode commands: 4-byte and 8-byte header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModeForm {
    /// MODE SENSE(6), MODE SELECT(6).
    Six,
    /// MODE SENSE(10), MODE SELECT(10).
    Ten,
}

/// Which values MODE SENSE asks for (SPC-5, page control).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageControl {
    /// What is in force.
    Current,
    /// A mask of what MODE SELECT can change.
    Changeable,
    /// The defaults.
    Default,
    /// Saved values.
    Saved,
}

/// MODE SENSE, both forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeSense {
    /// Header form.
    pub form: ModeForm,
    /// Leave the block descriptor out.
    pub disable_block_descriptors: bool,
    /// A 16-byte block descriptor may be used.
    pub long_lba_accepted: bool,
    /// Which values.
    pub control: PageControl,
    /// Page code, 3Fh for all.
    pub page: u8,
    /// Subpage code, FFh for all.
    pub subpage: u8,
    /// Room for the answer.
    pub allocation: usize,
}

/// MODE SELECT, both forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeSelect {
    /// Header form.
    pub form: ModeForm,
    /// The pages have the standard's format.
    pub page_format: bool,
    /// Keep them over a power cycle.
    pub save: bool,
    /// Length of the parameter list.
    pub length: usize,
}

/// REPORT SUPPORTED OPERATION CODES: what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpcodeQuery {
    /// Every command.
    All,
    /// One command without service action.
    Opcode(u8),
    /// One command with service action.
    ServiceAction(u8, u16),
    /// One command, with service action if it has any.
    Either(u8, u16),
}

/// PERSISTENT RESERVE IN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PersistentIn {
    /// Keys of all registrations.
    ReadKeys,
    /// The reservation.
    ReadReservation,
    /// What the server can do.
    ReportCapabilities,
    /// Everything.
    ReadFullStatus,
}

/// PERSISTENT RESERVE OUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PersistentOut {
    /// Register, change or give up a key.
    Register,
    /// Reserve.
    Reserve,
    /// Give up the reservation.
    Release,
    /// Remove everything.
    Clear,
    /// Remove others, take over.
    Preempt,
    /// The same, and end what they have sent.
    PreemptAndAbort,
    /// Register whatever was there.
    RegisterAndIgnore,
    /// Hand the reservation over.
    RegisterAndMove,
}

/// SANITIZE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SanitizeAction {
    /// Write a pattern over everything.
    Overwrite,
    /// Erase everything.
    BlockErase,
    /// Leave the state after a failure.
    ExitFailureMode,
}

/// RECEIVE COPY RESULTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyResults {
    /// How far a copy is.
    Status,
    /// The server's limits.
    OperatingParameters,
    /// Why a copy failed.
    FailedSegment,
}

/// Commands of CD-ROM drives (MMC-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MultiMedia {
    /// 43h
    ReadToc {
        /// Addresses as minutes, seconds, frames.
        msf: bool,
        /// Format 0 to 2.
        format: u8,
        /// First track of interest.
        track: u8,
        /// Room for the answer.
        allocation: usize,
    },
    /// 46h
    GetConfiguration {
        /// Which features: 0 all, 1 current, 2 one.
        requested: u8,
        /// First feature of interest.
        start: u16,
        /// Room for the answer.
        allocation: usize,
    },
    /// 4Ah
    GetEventStatus {
        /// Polled operation.
        polled: bool,
        /// Classes of interest.
        classes: u8,
        /// Room for the answer.
        allocation: usize,
    },
    /// 51h
    ReadDiscInformation {
        /// Room for the answer.
        allocation: usize,
    },
}

/// A parsed command. Lengths named `allocation` are room for the answer, others are what the initiator sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cdb {
    /// 00h
    TestUnitReady,
    /// 03h
    RequestSense {
        /// Answer in descriptor format.
        descriptor: bool,
        /// Room for the answer.
        allocation: usize,
    },
    /// 12h
    Inquiry {
        /// A vital product data page instead of the standard data.
        vital_page: Option<u8>,
        /// Room for the answer.
        allocation: usize,
    },
    /// 08h, 28h, A8h, 88h. Disable-page-out and force-unit-access change nothing about reads here.
    Read {
        /// What to read.
        blocks: Blocks,
    },
    /// 0Ah, 2Ah, AAh, 8Ah
    Write {
        /// Where to write.
        blocks: Blocks,
        /// Durable before GOOD.
        force_unit_access: bool,
    },
    /// 2Eh, AEh, 8Eh. What was written is verified on the medium, so it is durable.
    WriteAndVerify {
        /// Where to write.
        blocks: Blocks,
        /// How to verify.
        check: ByteCheck,
    },
    /// 2Fh, AFh, 8Fh
    Verify {
        /// What to verify.
        blocks: Blocks,
        /// How to verify.
        check: ByteCheck,
    },
    /// 89h
    CompareAndWrite {
        /// The blocks; the data are twice as long.
        blocks: Blocks,
        /// Durable before GOOD.
        force_unit_access: bool,
    },
    /// 34h, 90h
    Prefetch {
        /// What may be needed soon.
        blocks: Blocks,
    },
    /// 35h, 91h. Count 0 means to the end.
    SynchronizeCache {
        /// What to make durable.
        blocks: Blocks,
    },
    /// 41h, 93h. Count 0 means to the end.
    WriteSame {
        /// Where to write.
        blocks: Blocks,
        /// Space may be given back.
        unmap: bool,
        /// Keep space allocated.
        anchor: bool,
        /// There is no block in the data-out buffer: write zeros.
        no_data_out: bool,
    },
    /// 42h
    Unmap {
        /// Keep space allocated.
        anchor: bool,
        /// Length of the parameter list.
        length: usize,
    },
    /// 1Ah, 5Ah
    ModeSense(ModeSense),
    /// 15h, 55h
    ModeSelect(ModeSelect),
    /// 1Bh
    StartStopUnit {
        /// Start or stop.
        start: bool,
        /// Load or eject the medium.
        load_eject: bool,
        /// Do not flush before stopping.
        no_flush: bool,
        /// A power condition to go to, 0 for none.
        power_condition: u8,
    },
    /// 1Dh
    SendDiagnostic {
        /// Run the default self-test.
        self_test: bool,
        /// Another self-test, 0 for none.
        self_test_code: u8,
        /// Length of the parameter list.
        length: usize,
    },
    /// 1Eh
    PreventAllowMediumRemoval {
        /// The two bits of the field; 0 allows.
        prevent: u8,
    },
    /// 16h, 56h
    Reserve,
    /// 17h, 57h
    Release,
    /// 1Ch
    ReceiveDiagnostic {
        /// The page, if one is asked for.
        page: Option<u8>,
        /// Room for the answer.
        allocation: usize,
    },
    /// 37h, B7h
    ReadDefectData {
        /// The 12-byte form.
        long: bool,
        /// Which lists, and in which format: PLIST, GLIST and DEFECT LIST FORMAT as the CDB has them.
        lists: u8,
        /// Room for the answer.
        allocation: usize,
    },
    /// 48h
    Sanitize {
        /// What to do.
        action: SanitizeAction,
        /// Answer before it is done.
        immediate: bool,
        /// Let EXIT FAILURE MODE end a failure.
        unrestricted_exit: bool,
        /// Length of the parameter list.
        length: usize,
    },
    /// 4Dh
    LogSense {
        /// Page control.
        control: u8,
        /// Page code.
        page: u8,
        /// Subpage code.
        subpage: u8,
        /// First parameter of interest.
        parameter: u16,
        /// Room for the answer.
        allocation: usize,
    },
    /// 5Eh
    PersistentReserveIn {
        /// What is asked.
        action: PersistentIn,
        /// Room for the answer.
        allocation: usize,
    },
    /// 5Fh
    PersistentReserveOut {
        /// What to do.
        action: PersistentOut,
        /// SCOPE.
        scope: u8,
        /// TYPE.
        kind: u8,
        /// Length of the parameter list.
        length: usize,
    },
    /// 83h/00h
    ExtendedCopy {
        /// Length of the parameter list.
        length: usize,
    },
    /// 84h
    ReceiveCopyResults {
        /// What is asked.
        action: CopyResults,
        /// LIST IDENTIFIER.
        list: u8,
        /// Room for the answer.
        allocation: usize,
    },
    /// 8Bh
    OrWrite {
        /// What to change.
        blocks: Blocks,
        /// Durable before GOOD.
        force_unit_access: bool,
    },
    /// 9Ch
    WriteAtomic {
        /// Where to write.
        blocks: Blocks,
        /// Durable before GOOD.
        force_unit_access: bool,
        /// ATOMIC BOUNDARY, in blocks; 0 for one piece.
        boundary: u64,
    },
    /// A3h/0Ah
    ReportTargetPortGroups {
        /// With the extended header.
        extended: bool,
        /// Room for the answer.
        allocation: usize,
    },
    /// Commands of CD-ROM drives only.
    MultiMedia(MultiMedia),
    /// 25h
    ReadCapacity10,
    /// 9Eh/10h
    ReadCapacity16 {
        /// Room for the answer.
        allocation: usize,
    },
    /// 9Eh/12h
    GetLbaStatus {
        /// First block of interest.
        lba: u64,
        /// Room for the answer.
        allocation: usize,
    },
    /// A0h
    ReportLuns {
        /// SELECT REPORT.
        select: u8,
        /// Room for the answer.
        allocation: usize,
    },
    /// A3h/0Ch
    ReportSupportedOperationCodes {
        /// What is asked.
        query: OpcodeQuery,
        /// With command timeouts descriptors.
        timeouts: bool,
        /// Room for the answer.
        allocation: usize,
    },
    /// A3h/0Dh
    ReportSupportedTaskManagementFunctions {
        /// With the extended data.
        extended: bool,
        /// Room for the answer.
        allocation: usize,
    },
}

impl Cdb {
    /// Parses a CDB of any length.
    ///
    /// # Errors
    /// The sense to refuse it with: unknown operation code, unknown service action, too few bytes, or a reserved bit
    /// that is set (with a pointer to it).
    pub fn parse(bytes: &[u8]) -> Result<Cdb, Sense> {
        Self::parse_operation(find_operation(bytes)?, bytes)
    }

    /// Parses a CDB for a unit of one kind, which has not every command.
    ///
    /// # Errors
    /// As [`Cdb::parse`].
    pub fn parse_for(bytes: &[u8], kind: DeviceKind) -> Result<Cdb, Sense> {
        let operation = find_operation(bytes)?;
        if !operation.is_for(kind) {
            return Err(Sense::INVALID_OPCODE);
        }
        Self::parse_operation(operation, bytes)
    }

    fn parse_operation(operation: &Operation, bytes: &[u8]) -> Result<Cdb, Sense> {
        let Some(given) = bytes.get(..operation.usage.len()) else {
            return Err(Sense::cdb_field(bytes.len() as u16, None));
        };
        for (index, (&byte, &usage)) in given.iter().zip(operation.usage).enumerate().skip(1) {
            let reserved = byte & !usage;
            if reserved != 0 {
                return Err(Sense::cdb_field(index as u16, Some(reserved.ilog2() as u8)));
            }
        }
        let mut cdb = [0; 16];
        cdb[..given.len()].copy_from_slice(given);
        parse::parse_checked(&parse::Fields(cdb))
    }
}
