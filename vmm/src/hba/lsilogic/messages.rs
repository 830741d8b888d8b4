//! Owns: the layout of requests and replies that are no SCSI I/O, and of what all messages have in common.
//! Promises: a message shorter than its structure reads as zeros behind its end; replies never outgrow their room.
//! Must not know: what a message makes the adapter do. Source: Linux, drivers/message/fusion/lsi/mpi*.h.

/// Size of a request frame in bytes, as IOC FACTS tells it.
pub(super) const FRAME_SIZE: usize = 128;
/// Size of the longest reply in bytes: that of IOC FACTS.
pub(super) const REPLY_SIZE: usize = 80;

/// Functions of messages.
pub(super) mod function {
    pub(in super::super) const SCSI_IO: u8 = 0x00;
    pub(in super::super) const TASK_MANAGEMENT: u8 = 0x01;
    pub(in super::super) const IOC_INIT: u8 = 0x02;
    pub(in super::super) const IOC_FACTS: u8 = 0x03;
    pub(in super::super) const CONFIG: u8 = 0x04;
    pub(in super::super) const PORT_FACTS: u8 = 0x05;
    pub(in super::super) const PORT_ENABLE: u8 = 0x06;
    pub(in super::super) const EVENT_NOTIFICATION: u8 = 0x07;
    pub(in super::super) const EVENT_ACK: u8 = 0x08;
    pub(in super::super) const FIRMWARE_DOWNLOAD: u8 = 0x09;
    pub(in super::super) const FIRMWARE_UPLOAD: u8 = 0x12;
}

/// IOCStatus: what became of a message.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IocStatus {
    Success = 0x00,
    InvalidFunction = 0x01,
    InvalidScatterGather = 0x03,
    InternalError = 0x04,
    InvalidField = 0x07,
    InvalidState = 0x08,
    ConfigInvalidAction = 0x20,
    ConfigInvalidType = 0x21,
    ConfigInvalidPage = 0x22,
    ConfigInvalidData = 0x23,
    ConfigCannotCommit = 0x25,
    InvalidBus = 0x41,
    InvalidTarget = 0x42,
    DeviceNotThere = 0x43,
    DataOverrun = 0x44,
    DataUnderrun = 0x45,
    TaskTerminated = 0x48,
}

/// A message as it came, padded with zeros to a whole frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame(pub(super) [u8; FRAME_SIZE]);

impl Frame {
    /// A message of at most a frame's length.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let mut frame = [0; FRAME_SIZE];
        let length = bytes.len().min(FRAME_SIZE);
        frame[..length].copy_from_slice(&bytes[..length]);
        Self(frame)
    }

    pub(super) fn byte(&self, offset: usize) -> u8 {
        self.0[offset]
    }

    pub(super) fn half(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.0[offset], self.0[offset + 1]])
    }

    pub(super) fn word(&self, offset: usize) -> u32 {
        u32::from(self.half(offset)) | u32::from(self.half(offset + 2)) << 16
    }

    pub(super) fn function(&self) -> u8 {
        self.byte(0x03)
    }

    /// MsgContext: the host's name for the message.
    pub(super) fn context(&self) -> u32 {
        self.word(0x08)
    }
}

/// A reply under construction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    bytes: [u8; REPLY_SIZE],
    length: usize,
}

impl Message {
    /// A reply of `words` double words to `request`, with the common header and a status.
    pub(super) fn to(request: &Frame, words: u8, status: IocStatus) -> Self {
        Self::with(words, request.function(), request.byte(0x07), request.context(), status)
    }

    /// A reply of `words` double words from the parts of its header.
    pub(super) fn with(words: u8, function: u8, flags: u8, context: u32, status: IocStatus) -> Self {
        let mut message = Self { bytes: [0; REPLY_SIZE], length: (4 * usize::from(words)).min(REPLY_SIZE) };
        message.set_byte(0x02, words).set_byte(0x03, function).set_byte(0x07, flags);
        message.set_word(0x08, context).set_half(0x0E, status as u16);
        message
    }

    pub(super) fn set_byte(&mut self, offset: usize, value: u8) -> &mut Self {
        self.bytes[offset] = value;
        self
    }

    pub(super) fn set_half(&mut self, offset: usize, value: u16) -> &mut Self {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn set_word(&mut self, offset: usize, value: u32) -> &mut Self {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn set_bytes(&mut self, offset: usize, value: &[u8]) -> &mut Self {
        self.bytes[offset..offset + value.len()].copy_from_slice(value);
        self
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// What the reply FIFO gives the host.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reply {
    /// The context of a request that has succeeded, with nothing more to say.
    Context(u32),
    /// A message, in one of the host's reply frames.
    Message(Message),
}
