//! Owns: what the target sends, and its encoding.
//! Promises: every field that the standard does not name is zero.
//! Must not know: when something is sent, or how numbers come about.

use super::{HEADER, Header, NO_TAG};

/// The numbers that every answer carries (RFC 7143, 4.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Status number; of PDUs that carry no status: the next one's.
    pub status: u32,
    /// The command number that is expected next.
    pub expected: u32,
    /// The highest command number that is taken.
    pub most: u32,
}

impl Sequence {
    /// The numbers in a header that came.
    pub fn decode(header: &Header) -> Self {
        Self { status: header.u32_at(24), expected: header.u32_at(28), most: header.u32_at(32) }
    }

    fn put(self, header: &mut [u8; HEADER]) {
        put(header, 24, self.status);
        put(header, 28, self.expected);
        put(header, 32, self.most);
    }
}

fn put(header: &mut [u8; HEADER], at: usize, value: u32) {
    header[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn header(opcode: u8, flags: u8, tag: u32, sequence: Sequence) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = opcode;
    header[1] = flags;
    put(&mut header, 16, tag);
    sequence.put(&mut header);
    header
}

/// NOP-In (11.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopIn {
    /// LUN, echoed or of the target's ping.
    pub lun: [u8; 8],
    /// Tag of the ping that it answers, or none.
    pub tag: u32,
    /// Tag of the target's own ping, or none.
    pub transfer_tag: u32,
}

impl NopIn {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x20, 0x80, self.tag, sequence);
        header[8..16].copy_from_slice(&self.lun);
        put(&mut header, 20, self.transfer_tag);
        header
    }
}

/// How a command's length compares with what the initiator expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residual {
    /// It fits.
    #[default]
    None,
    /// So many bytes were not moved.
    Underflow(u32),
    /// So many bytes more would have been moved.
    Overflow(u32),
}

impl Residual {
    /// Of `expected` bytes `moved` were moved, and `beyond` found no room.
    pub fn of(expected: u32, moved: u64, beyond: u64) -> Residual {
        let clamp = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        match (beyond, u64::from(expected).saturating_sub(moved)) {
            (0, 0) => Residual::None,
            (0, rest) => Residual::Underflow(clamp(rest)),
            (beyond, _) => Residual::Overflow(clamp(beyond)),
        }
    }

    fn flag(self) -> u8 {
        match self {
            Residual::None => 0,
            Residual::Underflow(_) => 0x02,
            Residual::Overflow(_) => 0x04,
        }
    }

    fn count(self) -> u32 {
        match self {
            Residual::None => 0,
            Residual::Underflow(count) | Residual::Overflow(count) => count,
        }
    }
}

/// SCSI Response (11.4). Sense data are its data: their length in two bytes, then they.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiResponse {
    /// Tag of the command.
    pub tag: u32,
    /// 0: completed at the target; 1: the target failed.
    pub response: u8,
    /// SCSI status.
    pub status: u8,
    /// Number of Data-In or R2T PDUs that were sent for it.
    pub data_count: u32,
    /// Residual.
    pub residual: Residual,
}

impl ScsiResponse {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x21, 0x80 | self.residual.flag(), self.tag, sequence);
        header[2] = self.response;
        header[3] = self.status;
        put(&mut header, 36, self.data_count);
        put(&mut header, 44, self.residual.count());
        header
    }
}

/// Task Management Function Response (11.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagementAnswer {
    /// Tag of the request.
    pub tag: u32,
    /// Response code.
    pub response: u8,
}

impl TaskManagementAnswer {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x22, 0x80, self.tag, sequence);
        header[2] = self.response;
        header
    }
}

/// Login Response (11.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginResponse {
    /// The next stage begins.
    pub transit: bool,
    /// The text goes on.
    pub continues: bool,
    /// Current stage.
    pub current: u8,
    /// Next stage, with `transit`.
    pub next: u8,
    /// The initiator's part of the session identifier, echoed.
    pub isid: [u8; 6],
    /// The target's part, with the last response.
    pub tsih: u16,
    /// Tag, echoed.
    pub tag: u32,
    /// Class and detail.
    pub status: (u8, u8),
}

impl LoginResponse {
    /// The header. Version 0 is the only one there is.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut flags = self.current << 2;
        if self.transit {
            flags |= 0x80 | self.next;
        }
        if self.continues {
            flags |= 0x40;
        }
        let mut header = header(0x23, flags, self.tag, sequence);
        header[8..14].copy_from_slice(&self.isid);
        header[14..16].copy_from_slice(&self.tsih.to_be_bytes());
        header[36] = self.status.0;
        header[37] = self.status.1;
        header
    }
}

/// Text Response (11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextResponse {
    /// The target has no more to say.
    pub is_final: bool,
    /// The text goes on.
    pub continues: bool,
    /// Tag, echoed.
    pub tag: u32,
    /// By which the initiator asks for the rest, or none.
    pub transfer_tag: u32,
}

impl TextResponse {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let flags = u8::from(self.is_final) << 7 | u8::from(self.continues) << 6;
        let mut header = header(0x24, flags, self.tag, sequence);
        put(&mut header, 20, self.transfer_tag);
        header
    }
}

/// Data-In (11.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataIn {
    /// The last one of its sequence.
    pub is_final: bool,
    /// Tag of the command.
    pub tag: u32,
    /// Its number among those of the command.
    pub number: u32,
    /// Place of its first byte in the command's data.
    pub offset: u32,
    /// The command has ended: SCSI status and residual. Only with `is_final`.
    pub status: Option<(u8, Residual)>,
}

impl DataIn {
    /// The header. Without a status the status number is none (11.7.6).
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut flags = u8::from(self.is_final) << 7;
        if let Some((_, residual)) = self.status {
            flags |= 0x01 | residual.flag();
        }
        let sequence = Sequence { status: if self.status.is_some() { sequence.status } else { 0 }, ..sequence };
        let mut header = header(0x25, flags, self.tag, sequence);
        put(&mut header, 20, NO_TAG);
        put(&mut header, 36, self.number);
        put(&mut header, 40, self.offset);
        if let Some((status, residual)) = self.status {
            header[3] = status;
            put(&mut header, 44, residual.count());
        }
        header
    }
}

/// Ready To Transfer (11.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyToTransfer {
    /// Logical unit.
    pub lun: [u8; 8],
    /// Tag of the command.
    pub tag: u32,
    /// Tag that the data shall carry.
    pub transfer_tag: u32,
    /// Its number among those of the command.
    pub number: u32,
    /// First byte that is wanted.
    pub offset: u32,
    /// How many.
    pub length: u32,
}

impl ReadyToTransfer {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x31, 0x80, self.tag, sequence);
        header[8..16].copy_from_slice(&self.lun);
        put(&mut header, 20, self.transfer_tag);
        put(&mut header, 36, self.number);
        put(&mut header, 40, self.offset);
        put(&mut header, 44, self.length);
        header
    }
}

/// Logout Response (11.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutResponse {
    /// Tag, echoed.
    pub tag: u32,
    /// 0 closed, 1 no such connection, 2 no recovery, 3 failed.
    pub response: u8,
}

impl LogoutResponse {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x26, 0x80, self.tag, sequence);
        header[2] = self.response;
        header
    }
}

/// Why a PDU is rejected (11.17.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// The data's digest is wrong.
    DataDigest = 0x02,
    /// There is no SNACK.
    Snack = 0x03,
    /// It does not belong here.
    Protocol = 0x04,
    /// There is no such PDU.
    NotSupported = 0x05,
    /// Too many immediate commands at once.
    ImmediateCommand = 0x06,
    /// The tag is in use.
    TaskInProgress = 0x07,
    /// A field has no sense.
    InvalidField = 0x09,
}

/// Reject (11.17). The header that is rejected is its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject(pub RejectReason);

impl Reject {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x3F, 0x80, NO_TAG, sequence);
        header[2] = self.0 as u8;
        header
    }
}

/// Asynchronous Message (11.9): the target asks for a logout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncMessage {
    /// 1: please log out, within `seconds`.
    pub event: u8,
    /// Time for it.
    pub seconds: u16,
}

impl AsyncMessage {
    /// The header.
    pub fn encode(&self, sequence: Sequence) -> [u8; HEADER] {
        let mut header = header(0x32, 0x80, NO_TAG, sequence);
        header[36] = self.event;
        header[42..44].copy_from_slice(&self.seconds.to_be_bytes());
        header
    }
}
