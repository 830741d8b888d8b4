//! Owns: the PDUs of iSCSI (RFC 7143, 11): 48 bytes of header, additional headers, data, digests, and their padding.
//! Promises: any bytes give a header or a refusal; what is encoded here is decoded to the same by any initiator.
//! Must not know: sessions, negotiation, SCSI.

mod answer;
mod received;
mod request;
mod sent;

pub use answer::{
    AsyncMessage, DataIn, LoginResponse, LogoutResponse, NopIn, ReadyToTransfer, Reject, RejectReason, Residual,
    ScsiResponse, Sequence, TaskManagementAnswer, TextResponse,
};
pub use received::{Answer, Malformed};
pub use request::{DataOut, LoginRequest, LogoutRequest, NopOut, Request, ScsiCommand, TaskRequest, TextRequest};

/// Bytes of a basic header segment.
pub const HEADER: usize = 48;
/// The tag that means "none" (RFC 7143, 11.2.1.8).
pub const NO_TAG: u32 = 0xFFFF_FFFF;
/// Bytes of a digest.
pub const DIGEST: usize = 4;

/// A basic header segment as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header(pub [u8; HEADER]);

impl Header {
    /// The operation, without the immediate bit.
    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3F
    }

    /// To be carried out at once, whatever its command number.
    pub fn is_immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    /// Length of the additional header segments in bytes.
    pub fn additional_length(&self) -> usize {
        usize::from(self.0[4]) * 4
    }

    /// Length of the data segment in bytes, without its padding.
    pub fn data_length(&self) -> usize {
        self.u32_at(4) as usize & 0x00FF_FFFF
    }

    /// The initiator's tag of the task.
    pub fn task_tag(&self) -> u32 {
        self.u32_at(16)
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    fn lun(&self) -> [u8; 8] {
        let mut lun = [0; 8];
        lun.copy_from_slice(&self.0[8..16]);
        lun
    }
}

/// A data segment's length with its padding to whole words.
pub fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// The digest of a header or of data with its padding, as it goes over the wire: CRC32C, least significant byte first (RFC 7143, 13.1).
pub fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    crc32c::crc32c(bytes).to_le_bytes()
}

/// Which digests a connection uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// Over headers.
    pub header: bool,
    /// Over data.
    pub data: bool,
}

/// Adds a PDU to a stream: header with the data's length, data, padding, digests.
pub fn append(stream: &mut Vec<u8>, mut header: [u8; HEADER], data: &[u8], digests: Digests) {
    begin(stream, &mut header, data.len(), digests);
    let start = stream.len();
    stream.extend_from_slice(data);
    finish(stream, start, digests);
}

/// Adds a header that `length` bytes of data will follow; then the caller adds just these and calls [`finish`].
pub fn begin(stream: &mut Vec<u8>, header: &mut [u8; HEADER], length: usize, digests: Digests) {
    header[5..8].copy_from_slice(&(length as u32).to_be_bytes()[1..]);
    stream.extend_from_slice(header);
    if digests.header {
        stream.extend_from_slice(&digest(header));
    }
}

/// Pads the data from `start` on and adds its digest.
pub fn finish(stream: &mut Vec<u8>, start: usize, digests: Digests) {
    let length = stream.len() - start;
    stream.resize(start + padded(length), 0);
    if digests.data && length > 0 {
        let digest = digest(&stream[start..]);
        stream.extend_from_slice(&digest);
    }
}

/// Adds the padding and the digest of `data` that a stream carries in front of them, but not in `stream`.
pub fn finish_after(stream: &mut Vec<u8>, data: &[u8], digests: Digests) {
    let padding = &[0; 3][..padded(data.len()) - data.len()];
    stream.extend_from_slice(padding);
    if digests.data && !data.is_empty() {
        stream.extend_from_slice(&crc32c::crc32c_append(crc32c::crc32c(data), padding).to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
