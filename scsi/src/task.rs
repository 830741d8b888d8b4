//! Owns: what a transport hands to the device server and what it gets back.
//! Promises: a completion says exactly how many bytes of the transport's buffers were used.
//! Must not know: rings, frames, PDUs; how a command is carried out.

use crate::data_buffer::DataBuffer;
use crate::sense::{SenseData, Status};

/// An I_T nexus: one initiator port as seen through one target port. The transport numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NexusId(pub u32);

/// A logical unit number in the single level forms of SAM-5, 4.7.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lun(pub u16);

impl Lun {
    /// The well known logical unit REPORT LUNS (SPC-4, 8.2), in the extended form of its first two bytes.
    pub const REPORT_LUNS: Lun = Lun(0xC101);

    /// Decodes the 8-byte form: peripheral device (bus 0) or flat space addressing, or the well known
    /// unit REPORT LUNS. `None` for anything else.
    pub fn from_sam(bytes: [u8; 8]) -> Option<Lun> {
        if bytes[2..] != [0; 6] {
            return None;
        }
        match bytes[0] >> 6 {
            0 if bytes[0] == 0 => Some(Lun(u16::from(bytes[1]))),
            1 => Some(Lun(u16::from_be_bytes([bytes[0] & 0x3F, bytes[1]]))),
            _ if bytes[..2] == Lun::REPORT_LUNS.0.to_be_bytes() => Some(Lun::REPORT_LUNS),
            _ => None,
        }
    }

    /// Encodes it in 8 bytes: peripheral device addressing below 256, flat space addressing above.
    pub fn to_sam(self) -> [u8; 8] {
        let [high, low] = self.0.to_be_bytes();
        if self == Lun::REPORT_LUNS {
            return [high, low, 0, 0, 0, 0, 0, 0];
        }
        let method = if self.0 < 256 { 0 } else { 0x40 };
        [method | (high & 0x3F), low, 0, 0, 0, 0, 0, 0]
    }
}

/// Task attribute (SAM-5, 8.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskAttribute {
    /// In any order; commands without a tag too.
    #[default]
    Simple,
    /// After everything that came before, and before everything that comes later.
    Ordered,
    /// At once.
    HeadOfQueue,
    /// Only during an auto contingent allegiance, which this server does not have: refused.
    Aca,
}

/// What to do when the CDB wants to move more bytes than the transport has a buffer for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShortBuffer {
    /// Nothing; the completion says that it was an overrun.
    #[default]
    Refuse,
    /// As much as the buffer allows: whole blocks of a write, all bytes of a read; the completion counts the rest.
    Truncate,
}

/// A task management function (SAM-5, 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskManagement {
    /// One command of the nexus.
    AbortTask {
        /// Its unit.
        lun: Option<Lun>,
        /// Its tag.
        tag: u64,
    },
    /// All commands of the nexus to one unit.
    AbortTaskSet {
        /// The unit.
        lun: Option<Lun>,
    },
    /// All commands of all nexuses to one unit.
    ClearTaskSet {
        /// The unit.
        lun: Option<Lun>,
    },
    /// Ends an auto contingent allegiance: there are none, so nothing is done.
    ClearAca {
        /// The unit.
        lun: Option<Lun>,
    },
    /// Everything about one unit as after power on, except what persists.
    LogicalUnitReset {
        /// The unit.
        lun: Option<Lun>,
    },
    /// All units.
    TargetReset,
    /// Is a command of the nexus in the task set?
    QueryTask {
        /// Its unit.
        lun: Option<Lun>,
        /// Its tag.
        tag: u64,
    },
    /// Is any command of the nexus in the task set?
    QueryTaskSet {
        /// The unit.
        lun: Option<Lun>,
    },
}

/// The service response of a task management function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskManagementResponse {
    /// Done.
    Complete,
    /// A query found what was asked for.
    Succeeded,
    /// ABORT TASK: the unit has no such command (any more).
    TaskDoesNotExist,
    /// There is no such unit.
    IncorrectLun,
}

/// One SCSI command, as the transport received it.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// Who sends it.
    pub nexus: NexusId,
    /// The unit it is for; `None` if the 8-byte LUN has a form that this target does not know.
    pub lun: Option<Lun>,
    /// The transport's tag of it.
    pub tag: u64,
    /// Its place in the unit's task set.
    pub attribute: TaskAttribute,
    /// What to do if a buffer is too short.
    pub short_buffer: ShortBuffer,
    /// The command descriptor block, 6 to 16 bytes; anything else is answered with CHECK CONDITION.
    pub cdb: &'a [u8],
    /// Data from the initiator; empty if the transport says that there are none.
    pub data_out: &'a DataBuffer,
    /// Room for data to the initiator; empty if there is none. A transport that does not know the direction gives the
    /// same buffer for both.
    pub data_in: &'a DataBuffer,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Status byte.
    pub status: Status,
    /// Sense data, with CHECK CONDITION only.
    pub sense: Option<SenseData>,
    /// Bytes taken from `data_out` or put into `data_in`: never more than the buffer has. Buffer length minus this is the
    /// residual.
    pub transferred: u64,
    /// With [`ShortBuffer::Truncate`]: bytes that the CDB wanted to move and that found no room in the buffer.
    pub overflow: u64,
    /// The CDB wanted to move more than the buffer holds; nothing was done. The transport reports it in its own way.
    pub overrun: bool,
    /// A task management function has ended the command: nothing is to be sent for it.
    pub aborted: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lun_survives_its_eight_byte_form() {
        for number in [0, 1, 255, 256, 16383] {
            assert_eq!(Lun::from_sam(Lun(number).to_sam()), Some(Lun(number)));
        }
    }

    #[test]
    fn multi_level_and_well_known_luns_are_not_taken_for_simple_ones() {
        assert_eq!(Lun::from_sam([0xC1, 1, 0, 0, 0, 0, 0, 0]), Some(Lun::REPORT_LUNS));
        assert_eq!(Lun::REPORT_LUNS.to_sam(), [0xC1, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Lun::from_sam([0xC1, 2, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Lun::from_sam([0, 1, 0, 1, 0, 0, 0, 0]), None);
        assert_eq!(Lun::from_sam([1, 1, 0, 0, 0, 0, 0, 0]), None);
    }
}
