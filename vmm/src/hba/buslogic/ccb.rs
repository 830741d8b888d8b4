//! Owns: command control blocks (CCBs) of both formats, read once and checked.
//! Promises: pure; whatever the bytes are, the result is a CCB or the status that says what is wrong with it.
//! Must not know: mailboxes, threads. Source: Linux, drivers/scsi/BusLogic.h; FreeBSD, sys/dev/buslogic/btreg.h.

use scsi::{Lun, TaskAttribute};
use vm_memory::{Bytes, GuestAddress};

use super::mailboxes::Format;
use crate::hba::GuestMemory;
use crate::hba::command::Direction;
use crate::hba::guest_segments::{GuestSegments, OutsideRam};

/// Host adapter status of a CCB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum HostStatus {
    Success = 0x00,
    SelectionTimeout = 0x11,
    InvalidOpcode = 0x16,
    InvalidParameter = 0x1A,
    AutosenseFailed = 0x1B,
    Hardware = 0x20,
    /// The adapter has reset the bus.
    BusReset = 0x22,
    /// The host has aborted it.
    Aborted = 0x26,
}

/// What a CCB asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Carry the CDB out.
    Command {
        /// The data are described by a list.
        scattered: bool,
        /// Say in the CCB how many bytes were not moved.
        residual: bool,
    },
    /// Reset the target.
    DeviceReset,
    /// Something that this adapter does not know.
    Unknown,
}

/// Bytes of the longest CCB that is looked at.
const CCB_SIZE: usize = 40;
/// The most bytes of a CDB.
const CDB_SIZE: usize = 12;

/// A command control block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ccb {
    pub(super) format: Format,
    pub(super) operation: Operation,
    pub(super) target: u8,
    lun: u8,
    direction: u8,
    /// Kind of the command's tag, if it has one.
    tag: Option<u8>,
    cdb_length: u8,
    cdb: [u8; CDB_SIZE],
    data_length: u32,
    data: u32,
    sense_length: u8,
    sense: u32,
}

impl Ccb {
    /// Reads the CCB at `address`; `extended` says where its logical unit and its tag are.
    pub(super) fn read(memory: &GuestMemory, address: u32, format: Format, extended: bool) -> Result<Self, OutsideRam> {
        let mut bytes = [0; CCB_SIZE];
        let length = match format {
            Format::Bits32 => CCB_SIZE,
            Format::Bits24 => Self::CDB + CDB_SIZE,
        };
        memory.read_slice(&mut bytes[..length], GuestAddress(address.into())).map_err(|_| OutsideRam)?;
        Ok(Self::parse(&bytes, address, format, extended))
    }

    /// Offset of the CDB in both formats.
    const CDB: usize = 0x12;

    fn parse(bytes: &[u8; CCB_SIZE], address: u32, format: Format, extended: bool) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let three = |at: usize| u32::from_be_bytes([0, bytes[at], bytes[at + 1], bytes[at + 2]]);
        let operation = match bytes[0x00] {
            0x00 => Operation::Command { scattered: false, residual: false },
            0x02 => Operation::Command { scattered: true, residual: false },
            0x03 => Operation::Command { scattered: false, residual: true },
            0x04 => Operation::Command { scattered: true, residual: true },
            0x81 => Operation::DeviceReset,
            _ => Operation::Unknown,
        };
        let mut cdb = [0; CDB_SIZE];
        cdb.copy_from_slice(&bytes[Self::CDB..Self::CDB + CDB_SIZE]);
        let common = Self {
            format,
            operation,
            target: bytes[0x10],
            lun: 0,
            direction: bytes[0x01] >> 3 & 3,
            tag: None,
            cdb_length: bytes[0x02],
            cdb,
            data_length: 0,
            data: 0,
            sense_length: bytes[0x03],
            sense: 0,
        };
        /// The command has a tag, of the kind in the two bits above.
        const TAGGED: u8 = 1 << 5;
        match format {
            Format::Bits32 => {
                let tag = if extended { bytes[0x01] } else { bytes[0x11] };
                Self {
                    lun: bytes[0x11] & if extended { 0x3F } else { 0x1F },
                    tag: (tag & TAGGED != 0).then_some(tag >> 6),
                    data_length: word(0x04),
                    data: word(0x08),
                    sense: word(0x24),
                    ..common
                }
            }
            Format::Bits24 => Self {
                target: bytes[0x01] >> 5,
                lun: bytes[0x01] & 7,
                data_length: three(0x04),
                data: three(0x07),
                // Sense data follow the CDB.
                sense: address.wrapping_add((Self::CDB + usize::from(bytes[0x02])) as u32),
                ..common
            },
        }
    }

    pub(super) fn lun(&self) -> Lun {
        Lun(self.lun.into())
    }

    /// The CDB.
    pub(super) fn cdb(&self) -> Result<&[u8], HostStatus> {
        self.cdb.get(..usize::from(self.cdb_length)).filter(|cdb| !cdb.is_empty()).ok_or(HostStatus::InvalidParameter)
    }

    /// Which way the data go. Linux leaves it to the CDB for all but reads and writes.
    pub(super) fn direction(&self) -> Direction {
        match self.direction {
            0 => Direction::Either,
            1 => Direction::In,
            2 => Direction::Out,
            _ => Direction::None,
        }
    }

    pub(super) fn attribute(&self) -> Result<TaskAttribute, HostStatus> {
        match self.tag {
            None | Some(0) => Ok(TaskAttribute::Simple),
            Some(1) => Ok(TaskAttribute::HeadOfQueue),
            Some(2) => Ok(TaskAttribute::Ordered),
            Some(_) => Err(HostStatus::InvalidParameter),
        }
    }

    /// Where sense data go, and how many bytes of them.
    pub(super) fn sense(&self) -> (u64, usize) {
        const AS_EVER: u8 = 0;
        const NONE: u8 = 1;
        let room = match self.sense_length {
            AS_EVER => 14,
            NONE => 0,
            length => length.into(),
        };
        (self.sense.into(), room)
    }

    /// Maps the data: nothing but guest RAM, by a list of at most [`MAX_ELEMENTS`](super::commands::MAX_ELEMENTS).
    pub(super) fn map(&self, memory: &GuestMemory, segments: &mut GuestSegments) -> Result<(), OutsideRam> {
        let Operation::Command { scattered, .. } = self.operation else { return Ok(()) };
        if self.direction() == Direction::None || self.data_length == 0 {
            return Ok(());
        }
        if !scattered {
            return segments.push(self.data.into(), self.data_length as usize);
        }
        let size = match self.format {
            Format::Bits32 => 8,
            Format::Bits24 => 6,
        };
        if !self.data_length.is_multiple_of(size) || self.data_length / size > super::commands::MAX_ELEMENTS.into() {
            return Err(OutsideRam);
        }
        for index in 0..self.data_length / size {
            let mut element = [0; 8];
            let at = u64::from(self.data) + u64::from(index * size);
            memory.read_slice(&mut element[..size as usize], GuestAddress(at)).map_err(|_| OutsideRam)?;
            let [a, b, c, d, e, f, g, h] = element;
            let (length, address) = match self.format {
                Format::Bits32 => (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])),
                Format::Bits24 => (u32::from_be_bytes([0, a, b, c]), u32::from_be_bytes([0, d, e, f])),
            };
            if length > 0 {
                segments.push(address.into(), length as usize)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ccb(format: Format, extended: bool, changes: &[(usize, &[u8])]) -> Ccb {
        let mut bytes = [0; CCB_SIZE];
        changes.iter().for_each(|(at, change)| bytes[*at..at + change.len()].copy_from_slice(change));
        Ccb::parse(&bytes, 0x1000, format, extended)
    }

    #[test]
    fn units_and_tags_are_where_the_format_has_them() {
        let unit = |extended, changes: &[(usize, &[u8])]| {
            let ccb = ccb(Format::Bits32, extended, changes);
            (ccb.lun().0, ccb.attribute())
        };
        assert_eq!(unit(false, &[(0x11, &[0x7F])]), (31, Ok(TaskAttribute::HeadOfQueue)));
        assert_eq!(unit(false, &[(0x01, &[0xA8]), (0x11, &[0x85])]), (5, Ok(TaskAttribute::Simple)));
        assert_eq!(unit(true, &[(0x01, &[0xA8]), (0x11, &[0x85])]), (5, Ok(TaskAttribute::Ordered)));
        assert_eq!(unit(true, &[(0x01, &[0xE8]), (0x11, &[63])]), (63, Err(HostStatus::InvalidParameter)));
    }

    #[test]
    fn the_old_format_is_read_with_its_addresses_of_24_bits() {
        let ccb = ccb(Format::Bits24, false, &[(0x01, &[0xB2, 6, 1, 0x01, 0x02, 0x03, 0x0A, 0x0B, 0x0C])]);
        assert_eq!((ccb.target, ccb.lun().0, ccb.direction), (5, 2, 2));
        assert_eq!((ccb.data_length, ccb.data, ccb.sense()), (0x01_0203, 0x0A_0B0C, (0x1018, 0)));
    }

    #[test]
    fn sense_lengths_zero_and_one_mean_fourteen_and_none() {
        for (length, room) in [(0, 14), (1, 0), (2, 2), (255, 255)] {
            assert_eq!(ccb(Format::Bits32, true, &[(0x03, &[length])]).sense(), (0, room));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_ccb(bytes in prop::array::uniform32(any::<u8>()), rest in any::<u64>(), old: bool, extended: bool) {
            let mut all = [0; CCB_SIZE];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest.to_le_bytes());
            let ccb = Ccb::parse(&all, u32::MAX, if old { Format::Bits24 } else { Format::Bits32 }, extended);
            prop_assert_eq!(ccb.cdb().is_ok(), (1..=12).contains(&all[2]));
            let _ = (ccb.attribute(), ccb.sense(), ccb.direction());
        }
    }
}
