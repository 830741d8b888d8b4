//! A guest in plain memory: it drives registers and FIFOs the way drivers do, without KVM.

use super::super::LsiLogic;
use crate::hba::HostBusAdapter;
pub(super) use crate::hba::testing::{
    Bench, GatedDisk, MEMORY, disk, eventually, read_10, returns_before_the_gate_opens, write_10,
};

pub(super) const FRAMES: u64 = 0x1_0000;
pub(super) const REPLIES: u64 = 0x4_0000;
pub(super) const REPLY_FRAMES: u32 = 32;
pub(super) const REPLY_SIZE: u64 = 128;
pub(super) const SENSE: u64 = 0x8_0000;
pub(super) const LISTS: u64 = 0x9_0000;
pub(super) const DATA: u64 = 0x10_0000;

/// What the reply FIFO gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Context(u32),
    Message(Vec<u8>),
}

impl Answer {
    pub(super) fn message(self) -> Vec<u8> {
        match self {
            Answer::Message(bytes) => bytes,
            Answer::Context(context) => panic!("a context reply for {context:#x}"),
        }
    }

    pub(super) fn context(&self) -> u32 {
        match self {
            Answer::Context(context) => *context,
            Answer::Message(bytes) => word(bytes, 0x08),
        }
    }
}

pub(super) fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// IOCStatus, SCSI status, SCSI state and transfer count of a SCSI I/O reply.
pub(super) fn outcome(answer: Answer) -> (u32, u8, u8, u32) {
    let bytes = answer.message();
    (word(&bytes, 0x0C) >> 16, bytes[0x0C], bytes[0x0D], word(&bytes, 0x14))
}

/// A SCSI I/O request as a test writes it down.
#[derive(Clone)]
pub(super) struct Io {
    pub(super) context: u32,
    pub(super) target: u8,
    pub(super) bus: u8,
    pub(super) lun: u8,
    pub(super) cdb: Vec<u8>,
    pub(super) control: u32,
    pub(super) length: u32,
    pub(super) chain: u8,
    pub(super) list: Vec<u8>,
    pub(super) sense: u32,
}

pub(super) const IN: u32 = 2 << 24;
pub(super) const OUT: u32 = 1 << 24;

impl Io {
    /// A command without data to target 0, with the empty element that drivers send.
    pub(super) fn new(context: u32, cdb: &[u8]) -> Self {
        Self {
            context,
            target: 0,
            bus: 0,
            lun: 0,
            cdb: cdb.to_vec(),
            control: 0,
            length: 0,
            chain: 0,
            list: simple32(0xD1, u32::MAX, 0),
            sense: SENSE as u32,
        }
    }

    pub(super) fn data(mut self, control: u32, address: u64, length: u32) -> Self {
        (self.control, self.length, self.list) = (control, length, simple32(0xD1, address as u32, length));
        self
    }

    pub(super) fn list(mut self, control: u32, length: u32, chain: u8, list: Vec<u8>) -> Self {
        (self.control, self.length, self.chain, self.list) = (control, length, chain, list);
        self
    }

    pub(super) fn for_target(mut self, target: u8) -> Self {
        self.target = target;
        self
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let mut frame = vec![0; 0x30];
        (frame[0], frame[1], frame[2], frame[4], frame[5]) =
            (self.target, self.bus, self.chain, self.cdb.len() as u8, 64);
        frame[0x08..0x0C].copy_from_slice(&self.context.to_le_bytes());
        frame[0x0D] = self.lun;
        frame[0x14..0x18].copy_from_slice(&self.control.to_le_bytes());
        let cdb = self.cdb.len().min(16);
        frame[0x18..0x18 + cdb].copy_from_slice(&self.cdb[..cdb]);
        frame[0x28..0x2C].copy_from_slice(&self.length.to_le_bytes());
        frame[0x2C..0x30].copy_from_slice(&self.sense.to_le_bytes());
        frame.extend_from_slice(&self.list);
        frame
    }
}

pub(super) fn simple32(flags: u8, address: u32, length: u32) -> Vec<u8> {
    [(u32::from(flags) << 24 | length).to_le_bytes(), address.to_le_bytes()].concat()
}

pub(super) fn simple64(flags: u8, address: u64, length: u32) -> Vec<u8> {
    [&(u32::from(flags) << 24 | length).to_le_bytes()[..], &address.to_le_bytes()].concat()
}

/// A chain element to a segment of `length` bytes, whose own chain element is `next` double words into it.
pub(super) fn chain32(address: u32, length: u16, next: u8) -> Vec<u8> {
    simple32(0x30, address, u32::from(next) << 16 | u32::from(length))
}

/// A task management request.
pub(super) fn management(context: u32, kind: u8, target: u8, task: u32) -> Vec<u8> {
    let mut frame = vec![0; 0x34];
    (frame[0], frame[3], frame[5]) = (target, 1, kind);
    frame[0x08..0x0C].copy_from_slice(&context.to_le_bytes());
    frame[0x30..0x34].copy_from_slice(&task.to_le_bytes());
    frame
}

/// The guest with its adapter.
pub(super) struct Guest {
    bench: Bench<LsiLogic<GatedDisk>>,
    next_frame: std::cell::Cell<u64>,
}

impl Guest {
    /// An adapter with one disk of 256 blocks at target 0, in its state after power-on.
    pub(super) fn new() -> Self {
        Self { bench: Bench::new(LsiLogic::start), next_frame: Default::default() }
    }

    /// The same, operational, with reply frames and the reply interrupt, and the power-on attention taken.
    pub(super) fn ready() -> Self {
        let guest = Self::new();
        guest.bring_up();
        assert_eq!(outcome(guest.run(Io::new(0, &[0; 6]))).1, 2);
        guest
    }

    /// What a driver does after a reset.
    pub(super) fn bring_up(&self) {
        (0..REPLY_FRAMES).for_each(|number| self.lend(number));
        let reply = self.handshake(&[0x0200_0004, 0x0001_1000, 0, REPLY_SIZE as u32, 0, 0]);
        assert_eq!(reply.len(), 20);
        assert_eq!(self.read(0x00) >> 24, 0x24, "operational, initialised by the driver");
        self.write(0x34, 1);
    }

    pub(super) fn lend(&self, number: u32) {
        self.write(0x44, REPLIES as u32 + number * REPLY_SIZE as u32);
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.adapter.write(offset, &value.to_le_bytes());
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.adapter.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// A message by the doorbell and its reply, as Linux does it.
    pub(super) fn handshake(&self, words: &[u32]) -> Vec<u8> {
        self.send_by_doorbell(words);
        let mut reply = Vec::new();
        let mut length = 4;
        while reply.len() < length {
            assert_eq!(self.read(0x30) & 1, 1);
            reply.extend_from_slice(&(self.read(0x00) as u16).to_le_bytes());
            self.write(0x30, 0);
            if reply.len() == 4 {
                length = 4 * usize::from(reply[2]);
            }
        }
        assert_eq!(self.read(0x30) & 1, 1, "one more interrupt at the end");
        self.write(0x30, 0);
        assert_eq!(self.read(0x30) & 1, 0);
        reply
    }

    /// A message by the doorbell without fetching a reply.
    pub(super) fn send_by_doorbell(&self, words: &[u32]) {
        self.write(0x30, 0);
        self.write(0x00, 0x4200_0000 | (words.len() as u32) << 16);
        assert_eq!(self.read(0x30) & 1, 1);
        assert_ne!(self.read(0x00) & 1 << 27, 0, "active");
        self.write(0x30, 0);
        for &word in words {
            assert_eq!(self.read(0x30) >> 31, 0);
            self.write(0x00, word);
        }
    }

    /// Posts a request frame.
    pub(super) fn post(&self, frame: &[u8]) {
        let address = FRAMES + self.next_frame.get() * 128;
        self.next_frame.set((self.next_frame.get() + 1) % 512);
        self.set_bytes(address, &[frame, &vec![0; 128 - frame.len()]].concat());
        // Linux puts a hint into the lowest bits.
        self.write(0x40, address as u32 | 3);
    }

    /// Takes the next reply if there is one, and lends its frame again.
    pub(super) fn take(&self) -> Option<Answer> {
        match self.read(0x44) {
            u32::MAX => None,
            context if context >> 31 == 0 => Some(Answer::Context(context)),
            address => {
                let address = u64::from(address << 1);
                let length = 4 * u64::from(self.bytes(address, 4)[2]);
                let message = self.bytes(address, length.min(REPLY_SIZE) as usize);
                self.write(0x44, address as u32);
                Some(Answer::Message(message))
            }
        }
    }

    /// Waits for the next reply.
    pub(super) fn wait(&self) -> Answer {
        let mut taken = None;
        eventually("a reply", || {
            taken = self.take();
            taken.is_some()
        });
        taken.unwrap()
    }

    /// One request from its posting to its reply.
    pub(super) fn run(&self, io: Io) -> Answer {
        self.post(&io.frame());
        let answer = self.wait();
        assert_eq!(answer.context(), io.context);
        answer
    }

    /// A CONFIG request and its reply: IOCStatus and the page's header.
    pub(super) fn config(&self, action: u8, header: [u8; 4], address: u32, list: &[u8]) -> (u32, [u8; 4]) {
        let mut frame = vec![0; 0x1C];
        (frame[0], frame[3], frame[8]) = (action, 4, 0x77);
        frame[0x14..0x18].copy_from_slice(&header);
        frame[0x18..0x1C].copy_from_slice(&address.to_le_bytes());
        frame.extend_from_slice(list);
        self.post(&frame);
        let reply = self.wait().message();
        assert_eq!((reply[2], reply[3], word(&reply, 8)), (6, 4, 0x77));
        (word(&reply, 0x0C) >> 16, reply[0x14..0x18].try_into().unwrap())
    }
}

impl std::ops::Deref for Guest {
    type Target = Bench<LsiLogic<GatedDisk>>;

    fn deref(&self) -> &Self::Target {
        &self.bench
    }
}
