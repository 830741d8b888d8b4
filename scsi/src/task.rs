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
    /// Decodes the 8-byte form: peripheral device (bus 0) or flat space addressing. `None` for anything else.
    pub fn from_sam(bytes: [u8; 8]) -> Option<Lun> {
        if bytes[2..] != [0; 6] {
            return None;
        }
        match bytes[0] >> 6 {
            0 if bytes[0] == 0 => Some(Lun(u16::from(bytes[1]))),
            1 => Some(Lun(u16::from_be_bytes([bytes[0] & 0x3F, bytes[1]]))),
            _ => None,
        }
    }

    /// Encodes it in 8 bytes: peripheral device addressing below 256, flat space addressing above.
    pub fn to_sam(self) -> [u8; 8] {
        let [high, low] = self.0.to_be_bytes();
        let method = if self.0 < 256 { 0 } else { 0x40 };
        [method | (high & 0x3F), low, 0, 0, 0, 0, 0, 0]
    }
}

/// One SCSI command, as the transport received it.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// Who sends it.
    pub nexus: NexusId,
    /// The unit it is for; `None` if the 8-byte LUN has a form that this target does not know.
    pub lun: Option<Lun>,
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
    /// The CDB wanted to move more than the buffer holds; nothing was done. The transport reports it in its own way.
    pub overrun: bool,
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
        assert_eq!(Lun::from_sam([0xC1, 1, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Lun::from_sam([0, 1, 0, 1, 0, 0, 0, 0]), None);
        assert_eq!(Lun::from_sam([1, 1, 0, 0, 0, 0, 0, 0]), None);
    }
}
