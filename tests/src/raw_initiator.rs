//! Owns: a minimal iSCSI initiator, written from RFC 7143 alone: one command at a time, data immediate or asked for.
//! Promises: nothing of the target's own code is in it, so that both do not share a mistake; it can also do what is wrong.
//! Must not know: what is tested.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Bytes that a command carries itself, and those of each Data-Out.
const IMMEDIATE: usize = 512;
const PIECE: usize = 1000;

/// The connection, and how PDUs go over it.
pub struct Wire {
    stream: TcpStream,
    digests: bool,
    /// Headers are sent with a wrong digest.
    pub spoil_header: bool,
    /// Data are sent with a wrong digest.
    pub spoil_data: bool,
}

/// A session in its full feature phase.
pub struct RawInitiator {
    /// Its connection.
    pub wire: Wire,
    /// The reason of the last Reject.
    pub rejected: Option<u8>,
    /// The sense data of the last command, if it had some.
    pub sense: Vec<u8>,
    /// The LUN that commands go to.
    pub lun: u8,
    number: u32,
    tag: u32,
}

/// Logs in, always as the same initiator port; gives the connection and the response. `keys` are pairs, each ended by a null.
pub fn open(portal: &str, target: &str, keys: &str) -> io::Result<(Wire, [u8; 48])> {
    open_port(portal, target, keys, 0)
}

/// The same as one of several initiator ports.
fn open_port(portal: &str, target: &str, keys: &str, port: u8) -> io::Result<(Wire, [u8; 48])> {
    let stream = TcpStream::connect(portal)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut wire = Wire { stream, digests: false, spoil_header: false, spoil_data: false };
    let names =
        format!("InitiatorName=iqn.2026-01.test:raw\0TargetName={target}\0InitialR2T=Yes\0ImmediateData=Yes\0{keys}");
    let mut header = [0; 48];
    header[0] = 0x43;
    header[1] = 0x87;
    header[8] = 0x40;
    header[13] = port;
    header[27] = 1;
    wire.send(header, names.as_bytes())?;
    let (answer, _) = wire.receive()?;
    wire.digests = keys.contains("CRC32C");
    Ok((wire, answer))
}

impl RawInitiator {
    /// Logs in and hears that power is on.
    pub fn log_in(portal: &str, target: &str, keys: &str) -> RawInitiator {
        Self::log_in_port(portal, target, keys, 0)
    }

    /// The same as one of several initiator ports.
    pub fn log_in_port(portal: &str, target: &str, keys: &str, port: u8) -> RawInitiator {
        let (wire, answer) = open_port(portal, target, keys, port).expect("a login");
        assert_eq!((answer[0], answer[1] & 0x83, answer[36]), (0x23, 0x83, 0), "{answer:?}");
        let mut session = RawInitiator { wire, rejected: None, sense: Vec::new(), lun: 0, number: 1, tag: 0 };
        session.command(&[0; 6], 0, &[], 0);
        session
    }

    /// Sends a command and serves it to its end: status and data. `flags` is 0x40 to read, 0x20 to write.
    pub fn command(&mut self, cdb: &[u8], flags: u8, out: &[u8], expected: u32) -> (u8, Vec<u8>) {
        self.try_command(cdb, flags, out, expected).expect("the target answers")
    }

    /// The same; an error when the connection ends.
    pub fn try_command(&mut self, cdb: &[u8], flags: u8, out: &[u8], expected: u32) -> io::Result<(u8, Vec<u8>)> {
        self.tag += 1;
        let mut header = [0; 48];
        header[0] = 0x01;
        header[1] = 0x81 | flags;
        header[9] = self.lun;
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        header[32..32 + cdb.len()].copy_from_slice(cdb);
        self.number += 1;
        self.wire.send(header, &out[..out.len().min(IMMEDIATE)])?;
        self.sense.clear();
        let mut data = vec![0; if flags & 0x40 != 0 { expected as usize } else { 0 }];
        let mut most = 0;
        loop {
            let (answer, bytes) = self.wire.receive()?;
            let word = |at: usize| u32::from_be_bytes(answer[at..at + 4].try_into().expect("four bytes"));
            match answer[0] & 0x3F {
                0x31 => self.data_out(word(20), word(40), &out[word(40) as usize..(word(40) + word(44)) as usize])?,
                0x25 => {
                    let at = word(40) as usize;
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                    most = most.max(at + bytes.len());
                    if answer[1] & 1 != 0 {
                        data.truncate(most);
                        return Ok((answer[3], data));
                    }
                }
                0x3F => self.rejected = Some(answer[2]),
                0x21 => {
                    self.sense = bytes.get(2..).unwrap_or_default().to_vec();
                    return Ok((answer[3], data));
                }
                other => panic!("an answer of kind {other:#x}"),
            }
        }
    }

    fn data_out(&mut self, transfer_tag: u32, offset: u32, data: &[u8]) -> io::Result<()> {
        let pieces = data.chunks(PIECE).count();
        for (nth, piece) in data.chunks(PIECE).enumerate() {
            let mut header = [0; 48];
            header[0] = 0x05;
            header[1] = if nth + 1 == pieces { 0x80 } else { 0 };
            header[16..20].copy_from_slice(&self.tag.to_be_bytes());
            header[20..24].copy_from_slice(&transfer_tag.to_be_bytes());
            header[36..40].copy_from_slice(&(nth as u32).to_be_bytes());
            header[40..44].copy_from_slice(&(offset + (nth * PIECE) as u32).to_be_bytes());
            self.wire.send(header, piece)?;
        }
        Ok(())
    }

    /// Writes; the command must end well.
    #[track_caller]
    pub fn check_write(&mut self, cdb: &[u8], data: &[u8]) {
        assert_eq!(self.command(cdb, 0x20, data, data.len() as u32).0, 0, "status of {cdb:02x?}");
    }

    /// Reads; the command must end well.
    #[track_caller]
    pub fn check_read(&mut self, cdb: &[u8], expected: u32) -> Vec<u8> {
        let (status, data) = self.command(cdb, 0x40, &[], expected);
        assert_eq!(status, 0, "status of {cdb:02x?}");
        data
    }

    /// A header with a tag of its own and, unless it is immediate, the next command number.
    pub fn header(&mut self, operation: u8, flags: u8) -> [u8; 48] {
        self.tag += 1;
        let mut header = [0; 48];
        header[0] = operation;
        header[1] = flags;
        header[9] = self.lun;
        header[16..20].copy_from_slice(&self.tag.to_be_bytes());
        header[20..24].fill(0xFF);
        header[24..28].copy_from_slice(&self.number.to_be_bytes());
        if operation & 0x40 == 0 {
            self.number += 1;
        }
        header
    }

    /// Sends a ping: does the target close the connection instead of answering?
    pub fn is_hung_up_on(&mut self) -> bool {
        let mut header = [0; 48];
        header[0] = 0x40;
        header[1] = 0x80;
        header[20..24].fill(0xFF);
        self.wire.send(header, &[]).expect("the target listens");
        self.wire.stream.read(&mut [0; 48]).expect("an answer or an end") == 0
    }
}

impl Wire {
    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of the connection.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Does nothing come any more? Whatever still comes is read.
    pub fn has_ended(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends a PDU; the length of its data is put in.
    ///
    /// # Errors
    /// Of the connection.
    pub fn send(&mut self, mut header: [u8; 48], data: &[u8]) -> io::Result<()> {
        header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        let mut bytes = header.to_vec();
        if self.digests {
            bytes.extend_from_slice(&(crc32c(&header) ^ u32::from(self.spoil_header)).to_le_bytes());
        }
        let start = bytes.len();
        bytes.extend_from_slice(data);
        bytes.resize(start + data.len().next_multiple_of(4), 0);
        if self.digests && !data.is_empty() {
            let digest = crc32c(&bytes[start..]) ^ u32::from(self.spoil_data);
            bytes.extend_from_slice(&digest.to_le_bytes());
        }
        self.stream.write_all(&bytes)
    }

    /// Receives a PDU: header and data.
    ///
    /// # Errors
    /// Of the connection.
    pub fn receive(&mut self) -> io::Result<([u8; 48], Vec<u8>)> {
        let mut header = [0; 48];
        self.stream.read_exact(&mut header)?;
        self.check_digest(&header)?;
        let length = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        let mut data = vec![0; length.next_multiple_of(4)];
        self.stream.read_exact(&mut data)?;
        if length > 0 {
            self.check_digest(&data)?;
        }
        data.truncate(length);
        Ok((header, data))
    }

    fn check_digest(&mut self, of: &[u8]) -> io::Result<()> {
        if self.digests {
            let mut digest = [0; 4];
            self.stream.read_exact(&mut digest)?;
            assert_eq!(u32::from_le_bytes(digest), crc32c(of), "the target's digest");
        }
        Ok(())
    }
}

/// CRC32C bit by bit (RFC 7143, 13.1).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| crc >> 1 ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 })
    })
}
