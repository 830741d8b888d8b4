//! Owns: status codes, sense data in both formats, and the one table from storage errors to what a guest is told.
//! Promises: sense data never outgrows [`SenseData::CAPACITY`]; each error kind maps in exactly one place.
//! Must not know: CDBs, transports, what the storage is made of.

use crate::block_device::StorageError;

/// SCSI status byte (SAM-5, 5.3.1).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Good = 0x00,
    /// Sense data says what happened.
    CheckCondition = 0x02,
    /// Nothing was done; send it again.
    Busy = 0x08,
    /// Another initiator's reservation forbids it.
    ReservationConflict = 0x18,
    /// No room for the command in the task set.
    TaskSetFull = 0x28,
    /// Another initiator has aborted the command.
    TaskAborted = 0x40,
}

/// Sense key (SPC-5, 4.4.8).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenseKey {
    /// Nothing to say.
    NoSense = 0x0,
    /// The unit cannot be accessed for now.
    NotReady = 0x2,
    /// The medium failed.
    MediumError = 0x3,
    /// The device failed.
    HardwareError = 0x4,
    /// The command is wrong.
    IllegalRequest = 0x5,
    /// The unit's state has changed.
    UnitAttention = 0x6,
    /// The medium takes no writes.
    DataProtect = 0x7,
    /// A copy ended before its time.
    CopyAborted = 0xA,
    /// The device aborted the command.
    AbortedCommand = 0xB,
    /// The data differ from the medium's.
    Miscompare = 0xE,
}

/// Where the device server found the field that it refuses (SPC-5, sense key specific data of ILLEGAL REQUEST).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldPointer {
    /// The field is in the CDB (otherwise in the parameter list).
    pub in_cdb: bool,
    /// Byte number of the field's first byte.
    pub byte: u16,
    /// Bit number of the field's most significant bit, where that says more.
    pub bit: Option<u8>,
}

/// What went wrong, before it is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: SenseKey,
    /// Additional sense code.
    pub code: u8,
    /// Additional sense code qualifier.
    pub qualifier: u8,
    /// Command specific number: the failing LBA, or the offset of the first byte that differs.
    pub information: Option<u64>,
    /// The refused field.
    pub field: Option<FieldPointer>,
}

impl Sense {
    const fn new(key: SenseKey, code: u8, qualifier: u8) -> Self {
        Self { key, code, qualifier, information: None, field: None }
    }

    /// No sense: the answer to REQUEST SENSE when nothing is pending.
    pub const NO_SENSE: Sense = Sense::new(SenseKey::NoSense, 0x00, 0x00);
    /// Start stop unit has stopped the unit: logical unit not ready, initializing command required.
    pub const STOPPED: Sense = Sense::new(SenseKey::NotReady, 0x04, 0x02);
    /// Logical unit is in process of becoming ready.
    pub const BECOMING_READY: Sense = Sense::new(SenseKey::NotReady, 0x04, 0x01);
    /// Unrecovered read error.
    pub const READ_ERROR: Sense = Sense::new(SenseKey::MediumError, 0x11, 0x00);
    /// Write error - auto reallocation failed.
    pub const WRITE_ERROR: Sense = Sense::new(SenseKey::MediumError, 0x0C, 0x02);
    /// Logical unit failure.
    pub const UNIT_FAILURE: Sense = Sense::new(SenseKey::HardwareError, 0x3E, 0x01);
    /// Internal target failure.
    pub const INTERNAL_FAILURE: Sense = Sense::new(SenseKey::HardwareError, 0x44, 0x00);
    /// Parameter list length error.
    pub const PARAMETER_LIST_LENGTH: Sense = Sense::new(SenseKey::IllegalRequest, 0x1A, 0x00);
    /// Invalid command operation code.
    pub const INVALID_OPCODE: Sense = Sense::new(SenseKey::IllegalRequest, 0x20, 0x00);
    /// Logical block address out of range.
    pub const LBA_OUT_OF_RANGE: Sense = Sense::new(SenseKey::IllegalRequest, 0x21, 0x00);
    /// Invalid field in CDB.
    pub const INVALID_FIELD_IN_CDB: Sense = Sense::new(SenseKey::IllegalRequest, 0x24, 0x00);
    /// Logical unit not supported.
    pub const LUN_NOT_SUPPORTED: Sense = Sense::new(SenseKey::IllegalRequest, 0x25, 0x00);
    /// Invalid field in parameter list.
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x00);
    /// Saving parameters not supported.
    pub const SAVING_NOT_SUPPORTED: Sense = Sense::new(SenseKey::IllegalRequest, 0x39, 0x00);
    /// Write protected.
    pub const WRITE_PROTECTED: Sense = Sense::new(SenseKey::DataProtect, 0x27, 0x00);
    /// Space allocation failed write protect.
    pub const OUT_OF_SPACE: Sense = Sense::new(SenseKey::DataProtect, 0x27, 0x07);
    /// Miscompare during verify operation.
    pub const MISCOMPARE: Sense = Sense::new(SenseKey::Miscompare, 0x1D, 0x00);

    /// Invalid message: the task attribute is not supported.
    pub const INVALID_MESSAGE: Sense = Sense::new(SenseKey::AbortedCommand, 0x49, 0x00);
    /// Sanitize in progress.
    pub const SANITIZING: Sense = Sense::new(SenseKey::NotReady, 0x04, 0x1B);
    /// Target port in standby state.
    pub const PORT_STANDBY: Sense = Sense::new(SenseKey::NotReady, 0x04, 0x0B);
    /// Target port in unavailable state.
    pub const PORT_UNAVAILABLE: Sense = Sense::new(SenseKey::NotReady, 0x04, 0x0C);
    /// Sanitize command failed.
    pub const SANITIZE_FAILED: Sense = Sense::new(SenseKey::MediumError, 0x31, 0x03);
    /// Medium not present - tray open.
    pub const NO_MEDIUM: Sense = Sense::new(SenseKey::NotReady, 0x3A, 0x02);
    /// Medium removal prevented.
    pub const REMOVAL_PREVENTED: Sense = Sense::new(SenseKey::IllegalRequest, 0x53, 0x02);
    /// Invalid release of persistent reservation.
    pub const INVALID_RELEASE: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x04);
    /// Insufficient registration resources.
    pub const INSUFFICIENT_REGISTRATIONS: Sense = Sense::new(SenseKey::IllegalRequest, 0x55, 0x04);
    /// EXTENDED COPY: unsupported target descriptor type code.
    pub const UNSUPPORTED_TARGET_DESCRIPTOR: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x07);
    /// EXTENDED COPY: too many target descriptors.
    pub const TOO_MANY_TARGET_DESCRIPTORS: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x06);
    /// EXTENDED COPY: too many segment descriptors.
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x08);
    /// EXTENDED COPY: unsupported segment descriptor type code.
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x09);
    /// EXTENDED COPY: inline data length exceeded.
    pub const INLINE_DATA_EXCEEDED: Sense = Sense::new(SenseKey::IllegalRequest, 0x26, 0x0B);
    /// EXTENDED COPY: the copy target device is not reachable.
    pub const COPY_TARGET_UNREACHABLE: Sense = Sense::new(SenseKey::CopyAborted, 0x0D, 0x02);
    /// EXTENDED COPY: a segment cannot be copied; no more to say.
    pub const COPY_ABORTED: Sense = Sense::new(SenseKey::CopyAborted, 0x00, 0x00);

    /// A unit attention with its code.
    pub const fn unit_attention(code: u8, qualifier: u8) -> Sense {
        Sense::new(SenseKey::UnitAttention, code, qualifier)
    }

    /// Invalid field in CDB, at `byte` (and its `bit`).
    pub const fn cdb_field(byte: u16, bit: Option<u8>) -> Sense {
        let mut sense = Self::INVALID_FIELD_IN_CDB;
        sense.field = Some(FieldPointer { in_cdb: true, byte, bit });
        sense
    }

    /// Invalid field in parameter list, at `byte`.
    pub const fn parameter_field(byte: u16) -> Sense {
        let mut sense = Self::INVALID_FIELD_IN_PARAMETER_LIST;
        sense.field = Some(FieldPointer { in_cdb: false, byte, bit: None });
        sense
    }

    /// The same with a command specific number.
    pub const fn with_information(mut self, information: u64) -> Sense {
        self.information = Some(information);
        self
    }

    /// Encodes it as current sense data.
    pub fn encode(&self, format: SenseFormat) -> SenseData {
        match format {
            SenseFormat::Fixed => self.encode_fixed(),
            SenseFormat::Descriptor => self.encode_descriptors(),
        }
    }

    /// Fixed format, response code 70h (SPC-5, 4.4.3).
    fn encode_fixed(&self) -> SenseData {
        let mut data = SenseData { bytes: [0; SenseData::CAPACITY], length: 18 };
        data.bytes[0] = 0x70;
        data.bytes[2] = self.key as u8;
        if let Some(information) = self.information.and_then(|information| u32::try_from(information).ok()) {
            data.bytes[0] |= 0x80;
            data.bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        data.bytes[7] = 10;
        data.bytes[12] = self.code;
        data.bytes[13] = self.qualifier;
        if let Some(field) = self.field {
            data.bytes[15..18].copy_from_slice(&field.encode());
        }
        data
    }

    /// Descriptor format, response code 72h (SPC-5, 4.4.2).
    fn encode_descriptors(&self) -> SenseData {
        let mut data = SenseData { bytes: [0; SenseData::CAPACITY], length: 8 };
        data.bytes[0] = 0x72;
        data.bytes[1] = self.key as u8;
        data.bytes[2] = self.code;
        data.bytes[3] = self.qualifier;
        if let Some(information) = self.information {
            let at = usize::from(data.length);
            data.bytes[at..at + 3].copy_from_slice(&[0x00, 0x0A, 0x80]);
            data.bytes[at + 4..at + 12].copy_from_slice(&information.to_be_bytes());
            data.length += 12;
        }
        if let Some(field) = self.field {
            let at = usize::from(data.length);
            data.bytes[at..at + 2].copy_from_slice(&[0x02, 0x06]);
            data.bytes[at + 4..at + 7].copy_from_slice(&field.encode());
            data.length += 8;
        }
        data.bytes[7] = data.length - 8;
        data
    }
}

impl FieldPointer {
    /// The three bytes of the sense key specific field: SKSV, C/D, BPV, bit pointer, field pointer.
    fn encode(&self) -> [u8; 3] {
        let place = if self.in_cdb { 0xC0 } else { 0x80 };
        let bit = self.bit.map_or(0, |bit| 0x08 | (bit & 7));
        let [high, low] = self.byte.to_be_bytes();
        [place | bit, high, low]
    }
}

/// Which format the unit's D_SENSE bit asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenseFormat {
    /// Response code 70h.
    Fixed,
    /// Response code 72h.
    Descriptor,
}

/// Encoded sense data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SenseData {
    bytes: [u8; Self::CAPACITY],
    length: u8,
}

impl SenseData {
    /// The most bytes that sense data of this server takes.
    pub const CAPACITY: usize = 28;

    /// The encoded bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl std::fmt::Debug for SenseData {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "SenseData({:02x?})", self.as_bytes())
    }
}

/// Why a command did not end GOOD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// CHECK CONDITION with this sense.
    Check(Sense),
    /// BUSY: nothing was done.
    Busy,
    /// The CDB moves more data than the transport has a buffer for; nothing was done.
    Overrun,
    /// RESERVATION CONFLICT.
    Conflict,
    /// The task was aborted while it waited.
    Aborted,
}

impl From<Sense> for Failure {
    fn from(sense: Sense) -> Self {
        Failure::Check(sense)
    }
}

/// What the storage was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    Reading,
    Writing,
}

/// The one table from storage errors to status and sense data. `logical_block` turns byte positions into LBAs.
pub(crate) fn failure_of(error: StorageError, activity: Activity, logical_block: u32) -> Failure {
    let lba = |position: u64| position / u64::from(logical_block);
    Failure::Check(match error {
        StorageError::OutOfSpace { position } => Sense::OUT_OF_SPACE.with_information(lba(position)),
        StorageError::Medium { position, .. } => match activity {
            Activity::Reading => Sense::READ_ERROR.with_information(lba(position)),
            Activity::Writing => Sense::WRITE_ERROR.with_information(lba(position)),
        },
        StorageError::LockLost => Sense::UNIT_FAILURE,
        StorageError::Frozen => return Failure::Busy,
        StorageError::NotReady => Sense::BECOMING_READY,
        StorageError::WriteProtected => Sense::WRITE_PROTECTED,
        StorageError::Unsupported => Sense::INTERNAL_FAILURE,
        StorageError::OutOfRange { start, .. } => Sense::LBA_OUT_OF_RANGE.with_information(lba(start)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_has_key_code_information_and_field_pointer() {
        let sense = Sense::cdb_field(2, Some(5)).with_information(0x0102_0304);
        let expected = [0xF0, 0, 5, 1, 2, 3, 4, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xCD, 0, 2];
        assert_eq!(sense.encode(SenseFormat::Fixed).as_bytes(), expected);
    }

    #[test]
    fn an_lba_beyond_32_bits_is_left_out_of_the_fixed_format_only() {
        let sense = Sense::READ_ERROR.with_information(0x1_0000_0000);
        assert_eq!(sense.encode(SenseFormat::Fixed).as_bytes()[0], 0x70);
        let descriptor = sense.encode(SenseFormat::Descriptor);
        let expected = [0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 0x0A, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(descriptor.as_bytes(), expected);
    }

    #[test]
    fn the_longest_sense_data_fits_its_capacity() {
        let sense = Sense::parameter_field(8).with_information(u64::MAX);
        assert_eq!(sense.encode(SenseFormat::Descriptor).as_bytes().len(), SenseData::CAPACITY);
    }
}
