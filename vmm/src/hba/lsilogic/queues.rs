//! Owns: the adapter's FIFOs: request frames that the host has posted, reply frames that it has lent, replies for it.
//! Promises: bounded memory whatever the host posts; a reply is written into a lent frame once, never beyond the size that
//! the host has given; the reply interrupt is set exactly while there are replies.
//! Must not know: what messages mean, executors.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};
use scsi::Lun;
use vm_memory::{Bytes, GuestAddress};

use super::ioc::{FAULT_OVERFLOW, FAULT_REPLY, FAULT_REQUEST, Ioc};
use super::messages::{FRAME_SIZE, Frame, IocStatus, Message, Reply, function};
use super::registers::{FIFO_EMPTY, REPLY_INTERRUPT};
use crate::hba::GuestMemory;
use crate::hba::interrupts::Interrupts;
use crate::hba::queue::Rings;

/// Entries of each FIFO: far more than the credits that IOC FACTS gives.
const DEPTH: usize = 1024;
/// The request FIFO takes addresses whose lowest bits are a hint.
const FRAME_ADDRESS: u32 = !3;
/// A reply FIFO entry with this bit is half the address of a reply frame.
const ADDRESS_REPLY: u32 = 1 << 31;

/// What IOC INIT says about addresses and sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Setup {
    /// The upper half of all frames' addresses.
    pub(super) frames_high: u32,
    /// The upper half of sense buffers' addresses.
    pub(super) sense_high: u32,
    /// Size of a reply frame in bytes.
    pub(super) reply_frame_size: usize,
}

impl Setup {
    fn address(&self, low: u32) -> GuestAddress {
        GuestAddress(u64::from(self.frames_high) << 32 | u64::from(low))
    }
}

struct Fifos {
    setup: Setup,
    requests: VecDeque<u32>,
    free: VecDeque<u32>,
    replies: VecDeque<u32>,
}

/// What the queue's thread shares with the threads that access registers.
pub(super) struct Common {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) interrupts: Interrupts,
    pub(super) ioc: Mutex<Ioc>,
    fifos: Mutex<Fifos>,
    /// How often the message unit has been reset.
    resets: AtomicU32,
}

impl Common {
    pub(super) fn new(memory: Arc<GuestMemory>, interrupts: Interrupts) -> Self {
        let fifo = || VecDeque::with_capacity(DEPTH);
        let fifos = Fifos { setup: Setup::default(), requests: fifo(), free: fifo(), replies: fifo() };
        let resets = AtomicU32::new(0);
        Self { memory, interrupts, ioc: Mutex::new(Ioc::new()), fifos: Mutex::new(fifos), resets }
    }

    fn fifos(&self) -> MutexGuard<'_, Fifos> {
        self.fifos.lock()
    }

    /// The host posts a request frame.
    pub(super) fn post_request(&self, address: u32) {
        let mut fifos = self.fifos();
        if fifos.requests.len() < DEPTH {
            fifos.requests.push_back(address & FRAME_ADDRESS);
            return;
        }
        drop(fifos);
        self.ioc.lock().fault(FAULT_OVERFLOW);
    }

    /// The host lends a reply frame. One too many is not taken.
    pub(super) fn lend_reply_frame(&self, address: u32) {
        let mut fifos = self.fifos();
        if fifos.free.len() < DEPTH {
            fifos.free.push_back(address);
        }
    }

    /// The host takes a reply; all ones if there is none, which also ends the interrupt.
    pub(super) fn take_reply(&self) -> u32 {
        let mut fifos = self.fifos();
        let reply = fifos.replies.pop_front();
        if reply.is_none() {
            self.interrupts.clear(REPLY_INTERRUPT);
        }
        reply.unwrap_or(FIFO_EMPTY)
    }

    /// Replies have been posted.
    pub(super) fn interrupt(&self) {
        let fifos = self.fifos();
        if !fifos.replies.is_empty() {
            self.interrupts.post(REPLY_INTERRUPT);
        }
    }

    /// Answers a message that is neither SCSI I/O nor task management.
    pub(super) fn answer(&self, request: &Frame) -> Message {
        let (message, setup) = self.ioc.lock().answer(request, &self.memory);
        if let Some(setup) = setup {
            self.fifos().setup = setup;
        }
        message
    }

    /// How often the message unit has been reset so far.
    pub(super) fn resets(&self) -> u32 {
        self.resets.load(Ordering::Acquire)
    }

    /// Empties the FIFOs and puts the controller into its state after a reset of the message unit. Nothing runs any more.
    pub(super) fn reset(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
        let mut fifos = self.fifos();
        fifos.setup = Setup::default();
        fifos.requests.clear();
        fifos.free.clear();
        fifos.replies.clear();
        self.interrupts.clear(u32::MAX);
        drop(fifos);
        self.ioc.lock().reset();
    }
}

/// A request as it was read from its frame.
pub(super) struct Descriptor {
    pub(super) frame: Frame,
    /// The upper half of the sense buffer's address.
    pub(super) sense_high: u32,
}

/// What of a request is needed to choose it and to answer it without carrying it out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) function: u8,
    pub(super) flags: u8,
    pub(super) context: u32,
    pub(super) target: u8,
    pub(super) bus: u8,
    pub(super) lun: Option<Lun>,
    pub(super) cdb_length: u8,
    pub(super) sense_length: u8,
}

impl Key {
    pub(super) fn of(frame: &Frame) -> Self {
        let lun = frame.0[0x0C..0x14].try_into().expect("eight bytes");
        Self {
            function: frame.function(),
            flags: frame.byte(0x07),
            context: frame.context(),
            target: frame.byte(0x00),
            bus: frame.byte(0x01),
            lun: Lun::from_sam(lun),
            cdb_length: frame.byte(0x04),
            sense_length: frame.byte(0x05),
        }
    }

    /// Is it a SCSI command, which task management can end?
    pub(super) fn is_io(&self) -> bool {
        self.function == function::SCSI_IO
    }
}

/// SCSI state of a reply: bits that say what is known of the command.
pub(super) mod scsi_state {
    pub(in super::super) const AUTOSENSE_VALID: u8 = 0x01;
    pub(in super::super) const AUTOSENSE_FAILED: u8 = 0x02;
    pub(in super::super) const NO_STATUS: u8 = 0x04;
    pub(in super::super) const TERMINATED: u8 = 0x08;
}

/// A SCSI I/O reply that has no SCSI status yet.
pub(super) fn scsi_reply(key: &Key, status: IocStatus, state: u8) -> Message {
    const NO_TAG: u16 = 0xFFFF;
    let mut reply = Message::with(9, key.function, key.flags, key.context, status);
    reply
        .set_byte(0x00, key.target)
        .set_byte(0x01, key.bus)
        .set_byte(0x04, key.cdb_length)
        .set_byte(0x05, key.sense_length)
        .set_byte(0x0D, state)
        .set_half(0x20, NO_TAG);
    reply
}

/// Why the FIFOs cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueError {
    /// A request frame is not RAM.
    #[error("the request frame at {0:#x} is not guest RAM")]
    Request(u64),
    /// A reply frame is not RAM.
    #[error("the reply frame at {0:#x} is not guest RAM")]
    Reply(u64),
}

/// The FIFOs as the queue's thread uses them.
pub(super) struct LsiRings(pub(super) Arc<Common>);

impl Rings for LsiRings {
    type Descriptor = Descriptor;
    type Key = Key;
    type Answer = Reply;
    type Failure = IocStatus;
    type Error = QueueError;

    const LOST: IocStatus = IocStatus::InternalError;
    const TARGET_GONE: IocStatus = IocStatus::DeviceNotThere;

    fn key(descriptor: &Descriptor) -> Key {
        Key::of(&descriptor.frame)
    }

    fn target(key: &Key) -> u8 {
        key.target
    }

    fn failed(key: Key, failure: IocStatus) -> Reply {
        let terminated = failure == IocStatus::TaskTerminated;
        let state = if terminated { scsi_state::TERMINATED } else { scsi_state::NO_STATUS };
        Reply::Message(match key.is_io() {
            true => scsi_reply(&key, failure, state),
            false => Message::with(5, key.function, key.flags, key.context, failure),
        })
    }

    fn pending(&mut self) -> Result<u32, QueueError> {
        Ok(self.0.fifos().requests.len() as u32)
    }

    fn fetch(&mut self) -> Result<Option<Descriptor>, QueueError> {
        let (address, setup) = {
            let mut fifos = self.0.fifos();
            let Some(low) = fifos.requests.pop_front() else { return Ok(None) };
            (fifos.setup.address(low), fifos.setup)
        };
        let mut frame = [0; FRAME_SIZE];
        if self.0.memory.read_slice(&mut frame, address).is_err() {
            self.0.ioc.lock().fault(FAULT_REQUEST);
            return Err(QueueError::Request(address.0));
        }
        Ok(Some(Descriptor { frame: Frame(frame), sense_high: setup.sense_high }))
    }

    fn post(&mut self, answers: &mut VecDeque<Reply>) -> Result<usize, QueueError> {
        let mut count = 0;
        let mut fifos = self.0.fifos();
        while let Some(answer) = answers.front() {
            if fifos.replies.len() >= DEPTH {
                break;
            }
            let entry = match answer {
                Reply::Context(context) => context & !ADDRESS_REPLY,
                Reply::Message(message) => {
                    // Without a frame, this reply and those behind it wait until the host lends one.
                    let Some(frame) = fifos.free.pop_front() else { break };
                    let address = fifos.setup.address(frame);
                    let length = message.bytes().len().min(fifos.setup.reply_frame_size);
                    if self.0.memory.write_slice(&message.bytes()[..length], address).is_err() {
                        drop(fifos);
                        self.0.ioc.lock().fault(FAULT_REPLY);
                        return Err(QueueError::Reply(address.0));
                    }
                    ADDRESS_REPLY | frame >> 1
                }
            };
            fifos.replies.push_back(entry);
            answers.pop_front();
            count += 1;
        }
        Ok(count)
    }
}
