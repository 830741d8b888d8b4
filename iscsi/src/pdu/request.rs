//! Owns: what initiators send.
//! Promises: reserved and inconsistent fields that matter are refused with the reason that a Reject gives.
//! Must not know: whether a request fits the session's state.

use super::{Header, RejectReason};

/// A request without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// NOP-Out (11.18).
    Nop(NopOut),
    /// SCSI Command (11.3).
    Command(ScsiCommand),
    /// Task Management Function Request (11.5).
    Task(TaskRequest),
    /// Login Request (11.12).
    Login(LoginRequest),
    /// Text Request (11.10).
    Text(TextRequest),
    /// Data-Out (11.7).
    Data(DataOut),
    /// Logout Request (11.14).
    Logout(LogoutRequest),
}

/// A ping, or the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopOut {
    /// LUN of the ping that it answers.
    pub lun: [u8; 8],
    /// Tag; none: no answer is wanted.
    pub tag: u32,
    /// Tag of the target's ping that it answers, or none.
    pub transfer_tag: u32,
    /// Command number.
    pub number: u32,
}

/// A SCSI command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScsiCommand {
    /// No unsolicited data PDUs follow.
    pub is_final: bool,
    /// It expects data from the target.
    pub reads: bool,
    /// It has data for the target.
    pub writes: bool,
    /// Task attribute, 0..=7.
    pub attribute: u8,
    /// Logical unit.
    pub lun: [u8; 8],
    /// Tag.
    pub tag: u32,
    /// Bytes that it expects to move.
    pub expected: u32,
    /// Command number.
    pub number: u32,
    /// Command descriptor block.
    pub cdb: [u8; 16],
}

/// A task management function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskRequest {
    /// Function, 1..=8 are known.
    pub function: u8,
    /// Logical unit.
    pub lun: [u8; 8],
    /// Tag of this request.
    pub tag: u32,
    /// Tag of the task that it is about.
    pub referenced: u32,
    /// Command number.
    pub number: u32,
    /// Command number of the task that it is about.
    pub referenced_number: u32,
}

/// A login request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoginRequest {
    /// It asks to go to the next stage.
    pub transit: bool,
    /// Its text goes on in the next request.
    pub continues: bool,
    /// Current stage, 0..=3.
    pub current: u8,
    /// Next stage, 0..=3.
    pub next: u8,
    /// Highest version that the initiator knows.
    pub version_max: u8,
    /// Lowest version that the initiator knows.
    pub version_min: u8,
    /// The initiator's part of the session identifier.
    pub isid: [u8; 6],
    /// The session that the connection is to join; 0: a new one.
    pub tsih: u16,
    /// Tag.
    pub tag: u32,
    /// Connection identifier.
    pub connection: u16,
    /// Command number.
    pub number: u32,
    /// Status number that the initiator expects.
    pub expected_status: u32,
}

/// A text request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextRequest {
    /// The initiator has no more to say.
    pub is_final: bool,
    /// Its text goes on in the next request.
    pub continues: bool,
    /// Tag.
    pub tag: u32,
    /// Tag of the target's answer that it goes on from, or none.
    pub transfer_tag: u32,
    /// Command number.
    pub number: u32,
}

/// Data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOut {
    /// The last one of its sequence.
    pub is_final: bool,
    /// Tag of the command.
    pub tag: u32,
    /// Tag of the R2T that it answers; none: unsolicited.
    pub transfer_tag: u32,
    /// Number in the sequence.
    pub number: u32,
    /// Place of its first byte in the command's data.
    pub offset: u32,
}

/// A request to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogoutRequest {
    /// 0: the session, 1: the connection, 2: the connection for recovery.
    pub reason: u8,
    /// Tag.
    pub tag: u32,
    /// The connection to be closed.
    pub connection: u16,
    /// Command number.
    pub number: u32,
}

impl Request {
    /// Decodes a header.
    ///
    /// # Errors
    /// The reason for the Reject that is to be sent.
    pub fn decode(header: &Header) -> Result<Request, RejectReason> {
        let bytes = &header.0;
        let flags = bytes[1];
        let tag = header.task_tag();
        let number = header.u32_at(24);
        Ok(match header.opcode() {
            0x00 => Request::Nop(NopOut { lun: header.lun(), tag, transfer_tag: header.u32_at(20), number }),
            0x01 => {
                let mut cdb = [0; 16];
                cdb.copy_from_slice(&bytes[32..48]);
                Request::Command(ScsiCommand {
                    is_final: flags & 0x80 != 0,
                    reads: flags & 0x40 != 0,
                    writes: flags & 0x20 != 0,
                    attribute: flags & 0x07,
                    lun: header.lun(),
                    tag,
                    expected: header.u32_at(20),
                    number,
                    cdb,
                })
            }
            0x02 => Request::Task(TaskRequest {
                function: flags & 0x7F,
                lun: header.lun(),
                tag,
                referenced: header.u32_at(20),
                number,
                referenced_number: header.u32_at(32),
            }),
            0x03 => {
                let mut isid = [0; 6];
                isid.copy_from_slice(&bytes[8..14]);
                Request::Login(LoginRequest {
                    transit: flags & 0x80 != 0,
                    continues: flags & 0x40 != 0,
                    current: flags >> 2 & 3,
                    next: flags & 3,
                    version_max: bytes[2],
                    version_min: bytes[3],
                    isid,
                    tsih: header.u16_at(14),
                    tag,
                    connection: header.u16_at(20),
                    number,
                    expected_status: header.u32_at(28),
                })
            }
            0x04 => {
                let (is_final, continues) = (flags & 0x80 != 0, flags & 0x40 != 0);
                // Both at once contradict each other (11.10.2).
                if is_final && continues {
                    return Err(RejectReason::InvalidField);
                }
                Request::Text(TextRequest { is_final, continues, tag, transfer_tag: header.u32_at(20), number })
            }
            0x05 => Request::Data(DataOut {
                is_final: flags & 0x80 != 0,
                tag,
                transfer_tag: header.u32_at(20),
                number: header.u32_at(36),
                offset: header.u32_at(40),
            }),
            0x06 => Request::Logout(LogoutRequest { reason: flags & 0x7F, tag, connection: header.u16_at(20), number }),
            // Error recovery level 0 has no SNACK (11.16).
            0x10 => return Err(RejectReason::Snack),
            _ => return Err(RejectReason::NotSupported),
        })
    }

    /// The command number, for requests that have one.
    pub fn number(&self) -> Option<u32> {
        match self {
            Request::Nop(nop) => Some(nop.number),
            Request::Command(command) => Some(command.number),
            Request::Task(task) => Some(task.number),
            Request::Text(text) => Some(text.number),
            Request::Logout(logout) => Some(logout.number),
            Request::Login(_) | Request::Data(_) => None,
        }
    }
}
