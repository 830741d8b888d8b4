//! Owns: the encoding of what initiators send.
//! Promises: every field that the standard does not name is zero; what is encoded here is decoded to the same by a target.
//! Must not know: when something is sent, or how numbers come about.

use super::request::{DataOut, LoginRequest, LogoutRequest, NopOut, ScsiCommand, TaskRequest, TextRequest};
use super::{HEADER, NO_TAG};

/// Not to wait for its turn (RFC 7143, 11.2.1.1).
const IMMEDIATE: u8 = 0x40;
const FINAL: u8 = 0x80;

fn put(header: &mut [u8; HEADER], at: usize, value: u32) {
    header[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn header(opcode: u8, flags: u8, tag: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = opcode;
    header[1] = flags;
    put(&mut header, 16, tag);
    header
}

fn numbers(header: &mut [u8; HEADER], command: u32, expected_status: u32) {
    put(header, 24, command);
    put(header, 28, expected_status);
}

impl NopOut {
    /// The header, to be dealt with at once.
    pub fn encode(&self, expected_status: u32) -> [u8; HEADER] {
        let mut header = header(IMMEDIATE, FINAL, self.tag);
        header[8..16].copy_from_slice(&self.lun);
        put(&mut header, 20, self.transfer_tag);
        numbers(&mut header, self.number, expected_status);
        header
    }
}

impl ScsiCommand {
    /// The header.
    pub fn encode(&self, expected_status: u32) -> [u8; HEADER] {
        let flags = u8::from(self.is_final) << 7
            | u8::from(self.reads) << 6
            | u8::from(self.writes) << 5
            | self.attribute & 0x07;
        let mut header = header(0x01, flags, self.tag);
        header[8..16].copy_from_slice(&self.lun);
        put(&mut header, 20, self.expected);
        numbers(&mut header, self.number, expected_status);
        header[32..48].copy_from_slice(&self.cdb);
        header
    }
}

impl TaskRequest {
    /// The header, to be dealt with at once.
    pub fn encode(&self, expected_status: u32) -> [u8; HEADER] {
        let mut header = header(0x02 | IMMEDIATE, FINAL | self.function & 0x7F, self.tag);
        header[8..16].copy_from_slice(&self.lun);
        put(&mut header, 20, self.referenced);
        numbers(&mut header, self.number, expected_status);
        put(&mut header, 32, self.referenced_number);
        header
    }
}

impl LoginRequest {
    /// The header.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut flags = u8::from(self.transit) << 7 | u8::from(self.continues) << 6 | (self.current & 3) << 2;
        if self.transit {
            flags |= self.next & 3;
        }
        let mut header = header(0x03 | IMMEDIATE, flags, self.tag);
        header[2] = self.version_max;
        header[3] = self.version_min;
        header[8..14].copy_from_slice(&self.isid);
        header[14..16].copy_from_slice(&self.tsih.to_be_bytes());
        header[20..22].copy_from_slice(&self.connection.to_be_bytes());
        numbers(&mut header, self.number, self.expected_status);
        header
    }
}

impl TextRequest {
    /// The header, to be dealt with at once.
    pub fn encode(&self, expected_status: u32) -> [u8; HEADER] {
        let flags = u8::from(self.is_final) << 7 | u8::from(self.continues) << 6;
        let mut header = header(0x04 | IMMEDIATE, flags, self.tag);
        put(&mut header, 20, self.transfer_tag);
        numbers(&mut header, self.number, expected_status);
        header
    }
}

impl DataOut {
    /// The header. `lun` is that of the R2T, if it answers one.
    pub fn encode(&self, lun: [u8; 8], expected_status: u32) -> [u8; HEADER] {
        let mut header = header(0x05, u8::from(self.is_final) << 7, self.tag);
        if self.transfer_tag != NO_TAG {
            header[8..16].copy_from_slice(&lun);
        }
        put(&mut header, 20, self.transfer_tag);
        put(&mut header, 28, expected_status);
        put(&mut header, 36, self.number);
        put(&mut header, 40, self.offset);
        header
    }
}

impl LogoutRequest {
    /// The header, to be dealt with at once.
    pub fn encode(&self, expected_status: u32) -> [u8; HEADER] {
        let mut header = header(0x06 | IMMEDIATE, FINAL | self.reason & 0x7F, self.tag);
        header[20..22].copy_from_slice(&self.connection.to_be_bytes());
        numbers(&mut header, self.number, expected_status);
        header
    }
}
