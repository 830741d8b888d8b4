//! Owns: command descriptor blocks; each is parsed once, here, into [`Cdb`].
//! Promises: any bytes give a [`Cdb`] or the sense to refuse them with; reserved bits that are set are refused by name.
//! Must not know: what a command does, capacities, transports.

use crate::sense::Sense;

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
    /// 2Eh, AEh, 8Eh
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
    PreventAllowMediumRemoval,
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

/// One supported command: its CDB usage data (SPC-5, 6.35) says which bits of each byte are evaluated or ignored; every
/// other bit must be 0. The first byte is the operation code.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// The service action, in bits 0 to 4 of byte 1.
    pub service_action: Option<u8>,
    /// The usage data, as long as the CDB.
    pub usage: &'static [u8],
}

impl Operation {
    /// The operation code.
    pub fn opcode(&self) -> u8 {
        self.usage[0]
    }
}

const fn plain(usage: &'static [u8]) -> Operation {
    Operation { service_action: None, usage }
}

const fn action(usage: &'static [u8]) -> Operation {
    Operation { service_action: Some(usage[1] & 0x1F), usage }
}

/// CONTROL byte: the vendor specific bits are ignored; NACA and LINK are not supported.
const CONTROL: u8 = 0xC0;

/// Every command of the disk's device server, sorted.
#[rustfmt::skip]
pub const OPERATIONS: &[Operation] = &[
    plain(&[0x00, 0, 0, 0, 0, CONTROL]),
    plain(&[0x03, 0x01, 0, 0, 0xFF, CONTROL]),
    plain(&[0x08, 0x1F, 0xFF, 0xFF, 0xFF, CONTROL]),
    plain(&[0x0A, 0x1F, 0xFF, 0xFF, 0xFF, CONTROL]),
    plain(&[0x12, 0x01, 0xFF, 0xFF, 0xFF, CONTROL]),
    plain(&[0x15, 0x11, 0, 0, 0xFF, CONTROL]),
    plain(&[0x1A, 0x08, 0xFF, 0xFF, 0xFF, CONTROL]),
    plain(&[0x1B, 0x01, 0, 0x0F, 0xF7, CONTROL]),
    plain(&[0x1D, 0xF7, 0, 0xFF, 0xFF, CONTROL]),
    plain(&[0x1E, 0, 0, 0, 0x03, CONTROL]),
    plain(&[0x25, 0x01, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0x01, CONTROL]),
    plain(&[0x28, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x2A, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x2E, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x2F, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x34, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x35, 0x06, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x41, 0x18, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x42, 0x01, 0, 0, 0, 0, 0x3F, 0xFF, 0xFF, CONTROL]),
    plain(&[0x55, 0x11, 0, 0, 0, 0, 0, 0xFF, 0xFF, CONTROL]),
    plain(&[0x5A, 0x18, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0xFF, CONTROL]),
    plain(&[0x88, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x89, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0x3F, CONTROL]),
    plain(&[0x8A, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x8E, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x8F, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x90, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x91, 0x06, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0x93, 0x19, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    action(&[0x9E, 0x10, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01, CONTROL]),
    action(&[0x9E, 0x12, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, CONTROL]),
    plain(&[0xA0, 0, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, CONTROL]),
    action(&[0xA3, 0x0C, 0x87, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, CONTROL]),
    action(&[0xA3, 0x0D, 0x80, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, CONTROL]),
    plain(&[0xA8, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0xAA, 0x1A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0xAE, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
    plain(&[0xAF, 0x16, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x3F, CONTROL]),
];

impl Cdb {
    /// Parses a CDB of any length.
    ///
    /// # Errors
    /// The sense to refuse it with: unknown operation code, unknown service action, too few bytes, or a reserved bit
    /// that is set (with a pointer to it).
    pub fn parse(bytes: &[u8]) -> Result<Cdb, Sense> {
        let operation = find_operation(bytes)?;
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
        parse_checked(&Fields(cdb))
    }
}

/// The row of [`OPERATIONS`] for a CDB.
fn find_operation(bytes: &[u8]) -> Result<&'static Operation, Sense> {
    let &opcode = bytes.first().ok_or(Sense::INVALID_OPCODE)?;
    let start = OPERATIONS.partition_point(|operation| operation.opcode() < opcode);
    let mut candidates = OPERATIONS[start..].iter().take_while(|operation| operation.opcode() == opcode).peekable();
    let first = candidates.peek().copied().ok_or(Sense::INVALID_OPCODE)?;
    if first.service_action.is_none() {
        return Ok(first);
    }
    let wanted = bytes.get(1).map(|byte| byte & 0x1F);
    candidates.find(|operation| operation.service_action == wanted).ok_or(Sense::cdb_field(1, Some(4)))
}

/// A CDB whose length and reserved bits are checked.
struct Fields([u8; 16]);

impl Fields {
    fn bit(&self, byte: usize, bit: u8) -> bool {
        self.0[byte] >> bit & 1 == 1
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn allocation(&self, at: usize) -> usize {
        self.u32(at) as usize
    }

    /// The block range, whose place depends on the CDB's length only (operation code groups 0, 1, 4 and 5).
    fn blocks(&self) -> Blocks {
        match self.0[0] >> 5 {
            0 => Blocks {
                lba: u64::from(self.u32(0) & 0x1F_FFFF),
                // A count of 0 means 256, in the 6-byte forms only.
                count: if self.0[4] == 0 { 256 } else { u64::from(self.0[4]) },
            },
            1 | 2 => Blocks { lba: u64::from(self.u32(2)), count: u64::from(self.u16(7)) },
            5 => Blocks { lba: u64::from(self.u32(2)), count: u64::from(self.u32(6)) },
            _ => Blocks { lba: self.u64(2), count: u64::from(self.u32(10)) },
        }
    }

    fn byte_check(&self) -> Result<ByteCheck, Sense> {
        match self.0[1] >> 1 & 3 {
            0 => Ok(ByteCheck::Medium),
            1 => Ok(ByteCheck::Compare),
            3 => Ok(ByteCheck::CompareSame),
            _ => Err(Sense::cdb_field(1, Some(2))),
        }
    }
}

fn parse_checked(cdb: &Fields) -> Result<Cdb, Sense> {
    Ok(match cdb.0[0] {
        0x08 | 0x28 | 0x88 | 0xA8 => Cdb::Read { blocks: cdb.blocks() },
        0x0A => Cdb::Write { blocks: cdb.blocks(), force_unit_access: false },
        0x2A | 0x8A | 0xAA => Cdb::Write { blocks: cdb.blocks(), force_unit_access: cdb.bit(1, 3) },
        0x2E | 0x8E | 0xAE => Cdb::WriteAndVerify { blocks: cdb.blocks(), check: cdb.byte_check()? },
        0x2F | 0x8F | 0xAF => Cdb::Verify { blocks: cdb.blocks(), check: cdb.byte_check()? },
        0x34 | 0x90 => Cdb::Prefetch { blocks: cdb.blocks() },
        0x35 | 0x91 => Cdb::SynchronizeCache { blocks: cdb.blocks() },
        0x41 | 0x93 => Cdb::WriteSame {
            blocks: cdb.blocks(),
            unmap: cdb.bit(1, 3),
            anchor: cdb.bit(1, 4),
            no_data_out: cdb.bit(1, 0),
        },
        0x42 => Cdb::Unmap { anchor: cdb.bit(1, 0), length: usize::from(cdb.u16(7)) },
        0x89 => Cdb::CompareAndWrite {
            blocks: Blocks { lba: cdb.u64(2), count: u64::from(cdb.0[13]) },
            force_unit_access: cdb.bit(1, 3),
        },
        0x15 | 0x55 => Cdb::ModeSelect(parse_mode_select(cdb)),
        0x1A | 0x5A => Cdb::ModeSense(parse_mode_sense(cdb)),
        0x9E => parse_service_action_in(cdb),
        0xA3 => parse_maintenance_in(cdb)?,
        _ => parse_primary(cdb)?,
    })
}

/// The commands that every kind of device has (SPC), and the small ones of disks.
fn parse_primary(cdb: &Fields) -> Result<Cdb, Sense> {
    Ok(match cdb.0[0] {
        0x00 => Cdb::TestUnitReady,
        0x03 => Cdb::RequestSense { descriptor: cdb.bit(1, 0), allocation: usize::from(cdb.0[4]) },
        0x12 => {
            let vital = cdb.bit(1, 0);
            if !vital && cdb.0[2] != 0 {
                return Err(Sense::cdb_field(2, Some(7)));
            }
            Cdb::Inquiry { vital_page: vital.then_some(cdb.0[2]), allocation: usize::from(cdb.u16(3)) }
        }
        0x1B => Cdb::StartStopUnit {
            start: cdb.bit(4, 0),
            load_eject: cdb.bit(4, 1),
            no_flush: cdb.bit(4, 2),
            power_condition: cdb.0[4] >> 4,
        },
        0x1D => Cdb::SendDiagnostic {
            self_test: cdb.bit(1, 2),
            self_test_code: cdb.0[1] >> 5,
            length: usize::from(cdb.u16(3)),
        },
        0x1E => Cdb::PreventAllowMediumRemoval,
        0x25 => {
            // Partial medium indicator is obsolete; without it the LBA must be 0.
            if cdb.u32(2) != 0 && !cdb.bit(8, 0) {
                return Err(Sense::cdb_field(2, Some(7)));
            }
            Cdb::ReadCapacity10
        }
        0xA0 => Cdb::ReportLuns { select: cdb.0[2], allocation: cdb.allocation(6) },
        _ => return Err(Sense::INVALID_OPCODE),
    })
}

fn parse_mode_sense(cdb: &Fields) -> ModeSense {
    let ten = cdb.0[0] == 0x5A;
    ModeSense {
        form: if ten { ModeForm::Ten } else { ModeForm::Six },
        disable_block_descriptors: cdb.bit(1, 3),
        long_lba_accepted: cdb.bit(1, 4),
        control: match cdb.0[2] >> 6 {
            0 => PageControl::Current,
            1 => PageControl::Changeable,
            2 => PageControl::Default,
            _ => PageControl::Saved,
        },
        page: cdb.0[2] & 0x3F,
        subpage: cdb.0[3],
        allocation: if ten { usize::from(cdb.u16(7)) } else { usize::from(cdb.0[4]) },
    }
}

fn parse_mode_select(cdb: &Fields) -> ModeSelect {
    let ten = cdb.0[0] == 0x55;
    ModeSelect {
        form: if ten { ModeForm::Ten } else { ModeForm::Six },
        page_format: cdb.bit(1, 4),
        save: cdb.bit(1, 0),
        length: if ten { usize::from(cdb.u16(7)) } else { usize::from(cdb.0[4]) },
    }
}

fn parse_service_action_in(cdb: &Fields) -> Cdb {
    let allocation = cdb.allocation(10);
    match cdb.0[1] & 0x1F {
        0x10 => Cdb::ReadCapacity16 { allocation },
        _ => Cdb::GetLbaStatus { lba: cdb.u64(2), allocation },
    }
}

fn parse_maintenance_in(cdb: &Fields) -> Result<Cdb, Sense> {
    let allocation = cdb.allocation(6);
    if cdb.0[1] & 0x1F == 0x0D {
        return Ok(Cdb::ReportSupportedTaskManagementFunctions { extended: cdb.bit(2, 7), allocation });
    }
    let (opcode, service_action) = (cdb.0[3], cdb.u16(4));
    let query = match cdb.0[2] & 7 {
        0 => OpcodeQuery::All,
        1 => OpcodeQuery::Opcode(opcode),
        2 => OpcodeQuery::ServiceAction(opcode, service_action),
        3 => OpcodeQuery::Either(opcode, service_action),
        _ => return Err(Sense::cdb_field(2, Some(2))),
    };
    Ok(Cdb::ReportSupportedOperationCodes { query, timeouts: cdb.bit(2, 7), allocation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_sorted_and_its_lengths_follow_the_operation_code_group() {
        for pair in OPERATIONS.windows(2) {
            let order = |operation: &Operation| (operation.opcode(), operation.service_action);
            assert!(order(&pair[0]) < order(&pair[1]));
        }
        for operation in OPERATIONS {
            let length = match operation.opcode() >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                5 => 12,
                group => panic!("no length for group {group}"),
            };
            assert_eq!(operation.usage.len(), length, "operation {:02x}", operation.opcode());
        }
    }

    #[test]
    fn every_operation_of_the_table_parses() {
        for operation in OPERATIONS {
            let mut cdb = vec![0; operation.usage.len()];
            cdb[0] = operation.opcode();
            cdb[1] = operation.service_action.unwrap_or(0);
            Cdb::parse(&cdb).unwrap_or_else(|sense| panic!("{cdb:02x?}: {sense:?}"));
        }
    }

    #[test]
    fn block_ranges_are_where_each_form_has_them() {
        let read = |cdb: &[u8]| match Cdb::parse(cdb) {
            Ok(Cdb::Read { blocks }) => (blocks.lba, blocks.count),
            other => panic!("{other:?}"),
        };
        assert_eq!(read(&[0x08, 0x1F, 0xFF, 0xFE, 7, 0]), (0x1F_FFFE, 7));
        assert_eq!(read(&[0x08, 0, 0, 1, 0, 0]), (1, 256));
        assert_eq!(read(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6, 0]), (0x0102_0304, 0x0506));
        assert_eq!(read(&[0x28, 0, 0, 0, 0, 4, 0, 0, 0, 0]), (4, 0));
        assert_eq!(read(&[0xA8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]), (0x0102_0304, 0x0506_0708));
        let sixteen = [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0];
        assert_eq!(read(&sixteen), (0x0102_0304_0506_0708, 0x090A_0B0C));
    }

    #[test]
    fn a_reserved_bit_is_refused_with_a_pointer_to_it() {
        // RDPROTECT: protection information is not supported.
        let cdb = [0x28, 0x20, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(Cdb::parse(&cdb), Err(Sense::cdb_field(1, Some(5))));
        // NACA
        assert_eq!(Cdb::parse(&[0, 0, 0, 0, 0, 4]), Err(Sense::cdb_field(5, Some(2))));
    }

    #[test]
    fn unknown_commands_and_short_ones_are_told_apart() {
        assert_eq!(Cdb::parse(&[]), Err(Sense::INVALID_OPCODE));
        assert_eq!(Cdb::parse(&[0xFF; 16]), Err(Sense::INVALID_OPCODE));
        assert_eq!(Cdb::parse(&[0x28, 0, 0]), Err(Sense::cdb_field(3, None)));
        assert_eq!(Cdb::parse(&[0x9E, 0x1F]), Err(Sense::cdb_field(1, Some(4))));
        assert_eq!(Cdb::parse(&[0x12, 0, 0x80, 0, 36, 0]), Err(Sense::cdb_field(2, Some(7))));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            let _ = Cdb::parse(&bytes);
        }

        #[test]
        fn what_parses_is_in_the_table(bytes in prop::collection::vec(any::<u8>(), 16)) {
            if Cdb::parse(&bytes).is_ok() {
                prop_assert!(OPERATIONS.iter().any(|operation| operation.opcode() == bytes[0]));
            }
        }
    }
}
