//! Owns: the decoding of what the target sends, as an initiator sees it.
//! Promises: fields that contradict each other are refused; any bytes give an answer or a refusal.
//! Must not know: whether an answer fits what the initiator has asked.

use super::{
    DataIn, Header, LoginResponse, LogoutResponse, NopIn, ReadyToTransfer, Residual, ScsiResponse,
    TaskManagementAnswer, TextResponse,
};

/// What a target has sent, without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// NOP-In (11.19).
    Nop(NopIn),
    /// SCSI Response (11.4).
    Response(ScsiResponse),
    /// Task Management Function Response (11.6).
    Task(TaskManagementAnswer),
    /// Login Response (11.13).
    Login(LoginResponse),
    /// Text Response (11.11).
    Text(TextResponse),
    /// Data-In (11.7).
    Data(DataIn),
    /// Logout Response (11.15).
    Logout(LogoutResponse),
    /// Ready To Transfer (11.8).
    Ready(ReadyToTransfer),
    /// Asynchronous Message (11.9): event and its three parameters.
    Async {
        /// What has happened.
        event: u8,
        /// What they mean depends on the event.
        parameters: [u16; 3],
    },
    /// Reject (11.17): the reason. The header that is rejected is its data.
    Reject(u8),
}

/// Why a header is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No target sends this.
    #[error("operation {0:#04x} is none that a target sends")]
    Opcode(u8),
    /// Residual overflow and underflow at once (11.4.1).
    #[error("a residual that is too much and too little at once")]
    Residual,
    /// A status before the last of the data (11.7.1).
    #[error("a status with data that are not the last")]
    Status,
}

fn residual(flags: u8, count: u32) -> Result<Residual, Malformed> {
    match flags & 0x06 {
        0 => Ok(Residual::None),
        0x02 => Ok(Residual::Underflow(count)),
        0x04 => Ok(Residual::Overflow(count)),
        _ => Err(Malformed::Residual),
    }
}

impl Answer {
    /// Decodes a header.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn decode(header: &Header) -> Result<Answer, Malformed> {
        let bytes = &header.0;
        let (flags, tag) = (bytes[1], header.task_tag());
        Ok(match header.opcode() {
            0x20 => Answer::Nop(NopIn { lun: header.lun(), tag, transfer_tag: header.u32_at(20) }),
            0x21 => Answer::Response(ScsiResponse {
                tag,
                response: bytes[2],
                status: bytes[3],
                data_count: header.u32_at(36),
                residual: residual(flags, header.u32_at(44))?,
            }),
            0x22 => Answer::Task(TaskManagementAnswer { tag, response: bytes[2] }),
            0x23 => {
                let mut isid = [0; 6];
                isid.copy_from_slice(&bytes[8..14]);
                Answer::Login(LoginResponse {
                    transit: flags & 0x80 != 0,
                    continues: flags & 0x40 != 0,
                    current: flags >> 2 & 3,
                    next: if flags & 0x80 != 0 { flags & 3 } else { 0 },
                    isid,
                    tsih: header.u16_at(14),
                    tag,
                    status: (bytes[36], bytes[37]),
                })
            }
            0x24 => Answer::Text(TextResponse {
                is_final: flags & 0x80 != 0,
                continues: flags & 0x40 != 0,
                tag,
                transfer_tag: header.u32_at(20),
            }),
            0x25 => {
                let (is_final, has_status) = (flags & 0x80 != 0, flags & 0x01 != 0);
                if has_status && !is_final {
                    return Err(Malformed::Status);
                }
                let status = match has_status {
                    true => Some((bytes[3], residual(flags, header.u32_at(44))?)),
                    false => None,
                };
                Answer::Data(DataIn { is_final, tag, number: header.u32_at(36), offset: header.u32_at(40), status })
            }
            0x26 => Answer::Logout(LogoutResponse { tag, response: bytes[2] }),
            0x31 => Answer::Ready(ReadyToTransfer {
                lun: header.lun(),
                tag,
                transfer_tag: header.u32_at(20),
                number: header.u32_at(36),
                offset: header.u32_at(40),
                length: header.u32_at(44),
            }),
            0x32 => Answer::Async {
                event: bytes[36],
                parameters: [header.u16_at(38), header.u16_at(40), header.u16_at(42)],
            },
            0x3F => Answer::Reject(bytes[2]),
            opcode => return Err(Malformed::Opcode(opcode)),
        })
    }
}
