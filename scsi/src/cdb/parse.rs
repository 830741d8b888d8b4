//! Owns: where each field of each CDB is.
//! Promises: it is called only with CDBs whose length and reserved bits were checked against the table.
//! Must not know: what a command does, capacities, transports.

use super::*;

/// A CDB whose length and reserved bits are checked.
pub(super) struct Fields(pub(super) [u8; 16]);

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

/// What a CDB of the table asks for.
pub(super) fn parse_checked(cdb: &Fields) -> Result<Cdb, Sense> {
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
        0x8B => Cdb::OrWrite { blocks: cdb.blocks(), force_unit_access: cdb.bit(1, 3) },
        0x9C => Cdb::WriteAtomic {
            blocks: Blocks { lba: cdb.u64(2), count: u64::from(cdb.u16(12)) },
            force_unit_access: cdb.bit(1, 3),
            boundary: u64::from(cdb.u16(10)),
        },
        0x37 => Cdb::ReadDefectData { long: false, lists: cdb.0[2], allocation: usize::from(cdb.u16(7)) },
        0xB7 => Cdb::ReadDefectData { long: true, lists: cdb.0[1], allocation: cdb.allocation(6) },
        0x48 => parse_sanitize(cdb),
        0x4D => Cdb::LogSense {
            control: cdb.0[2] >> 6,
            page: cdb.0[2] & 0x3F,
            subpage: cdb.0[3],
            parameter: cdb.u16(5),
            allocation: usize::from(cdb.u16(7)),
        },
        0x5E => parse_persistent_in(cdb),
        0x5F => parse_persistent_out(cdb),
        0x83 => Cdb::ExtendedCopy { length: cdb.allocation(10) },
        0x84 => Cdb::ReceiveCopyResults {
            action: match cdb.0[1] & 0x1F {
                0 => CopyResults::Status,
                3 => CopyResults::OperatingParameters,
                _ => CopyResults::FailedSegment,
            },
            list: cdb.0[2],
            allocation: cdb.allocation(10),
        },
        0x43 | 0x46 | 0x4A | 0x51 => Cdb::MultiMedia(parse_multi_media(cdb)?),
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
        0x1C => Cdb::ReceiveDiagnostic { page: cdb.bit(1, 0).then_some(cdb.0[2]), allocation: usize::from(cdb.u16(3)) },
        0x1E => Cdb::PreventAllowMediumRemoval { prevent: cdb.0[4] & 3 },
        0x16 | 0x56 => Cdb::Reserve,
        0x17 | 0x57 => Cdb::Release,
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
    if cdb.0[1] & 0x1F == 0x0A {
        return match cdb.0[1] >> 5 {
            format @ (0 | 1) => Ok(Cdb::ReportTargetPortGroups { extended: format == 1, allocation }),
            _ => Err(Sense::cdb_field(1, Some(7))),
        };
    }
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

fn parse_sanitize(cdb: &Fields) -> Cdb {
    Cdb::Sanitize {
        action: match cdb.0[1] & 0x1F {
            1 => SanitizeAction::Overwrite,
            2 => SanitizeAction::BlockErase,
            _ => SanitizeAction::ExitFailureMode,
        },
        immediate: cdb.bit(1, 7),
        unrestricted_exit: cdb.bit(1, 5),
        length: usize::from(cdb.u16(7)),
    }
}

fn parse_persistent_in(cdb: &Fields) -> Cdb {
    let action = match cdb.0[1] & 0x1F {
        0 => PersistentIn::ReadKeys,
        1 => PersistentIn::ReadReservation,
        2 => PersistentIn::ReportCapabilities,
        _ => PersistentIn::ReadFullStatus,
    };
    Cdb::PersistentReserveIn { action, allocation: usize::from(cdb.u16(7)) }
}

fn parse_persistent_out(cdb: &Fields) -> Cdb {
    let action = match cdb.0[1] & 0x1F {
        0 => PersistentOut::Register,
        1 => PersistentOut::Reserve,
        2 => PersistentOut::Release,
        3 => PersistentOut::Clear,
        4 => PersistentOut::Preempt,
        5 => PersistentOut::PreemptAndAbort,
        6 => PersistentOut::RegisterAndIgnore,
        _ => PersistentOut::RegisterAndMove,
    };
    Cdb::PersistentReserveOut { action, scope: cdb.0[2] >> 4, kind: cdb.0[2] & 0x0F, length: cdb.allocation(5) }
}

fn parse_multi_media(cdb: &Fields) -> Result<MultiMedia, Sense> {
    let allocation = usize::from(cdb.u16(7));
    Ok(match cdb.0[0] {
        0x43 => {
            // Old systems put the format into the upper bits of the control byte.
            let format = if cdb.0[2] & 0x0F != 0 { cdb.0[2] & 0x0F } else { cdb.0[9] >> 6 };
            if format > 2 {
                return Err(Sense::cdb_field(2, Some(3)));
            }
            MultiMedia::ReadToc { msf: cdb.bit(1, 1), format, track: cdb.0[6], allocation }
        }
        0x46 => MultiMedia::GetConfiguration { requested: cdb.0[1] & 3, start: cdb.u16(2), allocation },
        0x4A => MultiMedia::GetEventStatus { polled: cdb.bit(1, 0), classes: cdb.0[4], allocation },
        _ => MultiMedia::ReadDiscInformation { allocation },
    })
}
