//! Owns: the adapter's virtqueues: requests in, responses out, events.
//! Promises: what says which command it is, and where its response goes, is read once; responses are written once.
//! Must not know: registers, what a command does. Source: virtio 1.2, 5.6.6.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use scsi::Lun;
use vm_memory::{Bytes, GuestAddress};

use super::virtqueue::{Buffer, QueueError, Setup, Virtqueue};
use crate::hba::GuestMemory;
use crate::hba::guest_segments::{GuestSegments, OutsideRam};
use crate::hba::interrupts::Interrupts;
use crate::hba::queue::Rings;

/// Interrupt status: a queue has something.
const QUEUE_INTERRUPT: u32 = 1;
/// Interrupt status: the configuration, or the device status, has changed.
const CONFIGURATION_INTERRUPT: u32 = 2;

/// MSI-X vectors: as many as a driver can use, one for each queue and one for the configuration.
pub(super) const VECTORS: usize = 1 + QUEUES;
/// No vector: nothing is sent.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

/// By which vectors a driver wants to be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vectors {
    /// When the configuration, or the device status, has changed.
    pub(super) configuration: u16,
    /// For each queue.
    pub(super) queues: [u16; QUEUES],
}

/// What the queue's thread shares with the threads that access registers.
pub(super) struct Notices {
    pub(super) interrupts: Interrupts,
    /// Queues that want an interrupt for something in the batch that was posted: a bit each.
    wanted: AtomicU32,
    /// Those of the queues, then that of the configuration.
    vectors: [AtomicU16; VECTORS],
    /// The queues cannot be used any more.
    broken: AtomicBool,
    /// How often the device has been reset.
    pub(super) resets: AtomicU32,
}

impl Notices {
    pub(super) fn new(interrupts: Interrupts) -> Self {
        interrupts.enable(QUEUE_INTERRUPT | CONFIGURATION_INTERRUPT);
        Self {
            interrupts,
            wanted: AtomicU32::new(0),
            vectors: [const { AtomicU16::new(NO_VECTOR) }; VECTORS],
            broken: AtomicBool::new(false),
            resets: AtomicU32::new(0),
        }
    }

    /// Must the driver reset the device?
    pub(super) fn needs_reset(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// The queues cannot be used any more; the driver is told.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
        self.interrupts.post_by(CONFIGURATION_INTERRUPT, self.vectors(1 << QUEUES));
    }

    /// A batch has been posted.
    pub(super) fn interrupt(&self) {
        let wanted = self.wanted.swap(0, Ordering::AcqRel);
        if wanted != 0 {
            self.interrupts.post_by(QUEUE_INTERRUPT, self.vectors(wanted));
        }
    }

    /// An event has been given.
    pub(super) fn interrupt_for_event(&self) {
        self.interrupts.post_by(QUEUE_INTERRUPT, self.vectors(1 << EVENT));
    }

    /// Interrupts come by these vectors from now on.
    pub(super) fn use_vectors(&self, vectors: Vectors) {
        let all = vectors.queues.into_iter().chain([vectors.configuration]);
        self.vectors.iter().zip(all).for_each(|(place, vector)| place.store(vector, Ordering::Release));
    }

    /// The vectors of those whose bits are set, each once.
    fn vectors(&self, of: u32) -> impl Iterator<Item = u16> {
        let bit = |number: usize| match self.vectors[number].load(Ordering::Acquire) {
            vector if of & 1 << number != 0 && usize::from(vector) < VECTORS => 1 << vector,
            _ => 0u32,
        };
        let chosen = (0..VECTORS).fold(0, |chosen, number| chosen | bit(number));
        (0..VECTORS as u16).filter(move |vector| chosen & 1 << vector != 0)
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
        self.wanted.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
        self.interrupts.clear(u32::MAX);
    }
}

/// The control queue.
pub(super) const CONTROL: usize = 0;
/// The event queue.
pub(super) const EVENT: usize = 1;
/// Request queues, from number 2 on.
pub(super) const REQUEST_QUEUES: usize = 4;
/// All queues.
pub(super) const QUEUES: usize = 2 + REQUEST_QUEUES;

/// Bytes of a command: unit, tag, attribute, priority, reference number, CDB.
pub(super) const COMMAND_SIZE: usize = 19 + CDB_SIZE;
/// Room for a CDB.
pub(super) const CDB_SIZE: usize = 32;
/// Room for sense data in a response.
pub(super) const SENSE_SIZE: usize = 96;
/// Bytes of a response to a command.
pub(super) const RESPONSE_SIZE: usize = 12 + SENSE_SIZE;
/// Bytes of an event.
const EVENT_SIZE: usize = 16;

/// The response byte.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Ok = 0,
    Overrun = 1,
    Aborted = 2,
    BadTarget = 3,
    Reset = 4,
    Failure = 9,
    FunctionSucceeded = 10,
    FunctionRejected = 11,
    IncorrectLun = 12,
}

/// The most pieces in which a chain may give the room for its response.
const PIECES: usize = 4;

/// Where the response of a chain goes.
#[derive(Clone, Copy, Debug, Default)]
struct Room {
    pieces: [(u64, u32); PIECES],
    count: usize,
    length: usize,
}

impl Room {
    /// Adds what is still missing to `wanted` bytes from the front of a buffer; returns how much that was.
    fn extend(&mut self, buffer: Buffer, wanted: usize) -> Result<u32, OutsideRam> {
        let part = (buffer.length as usize).min(wanted - self.length);
        if part > 0 {
            *self.pieces.get_mut(self.count).ok_or(OutsideRam)? = (buffer.address, part as u32);
            self.count += 1;
            self.length += part;
        }
        Ok(part as u32)
    }

    fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> Result<(), OutsideRam> {
        let mut rest = bytes;
        for &(address, length) in &self.pieces[..self.count] {
            let (part, later) = rest.split_at(rest.len().min(length as usize));
            memory.write_slice(part, GuestAddress(address)).map_err(|_| OutsideRam)?;
            rest = later;
        }
        Ok(())
    }
}

/// What of a request is needed to choose it and to answer it without carrying it out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) queue: usize,
    head: u16,
    room: Room,
    pub(super) target: Option<u8>,
    pub(super) lun: Option<Lun>,
    pub(super) tag: u64,
}

impl Key {
    /// Is it a SCSI command, which task management can end?
    pub(super) fn is_command(&self) -> bool {
        self.queue != CONTROL
    }
}

/// A request as it was read from its chain.
#[derive(Clone)]
pub(super) struct Descriptor {
    pub(super) key: Key,
    /// The command, or a control request and zeros.
    pub(super) header: [u8; COMMAND_SIZE],
}

/// What a request gets: its response, and how many data bytes were written behind it.
pub(super) struct Answer {
    key: Key,
    bytes: [u8; RESPONSE_SIZE],
    data_in: u32,
}

impl Answer {
    /// A response to a command.
    pub(super) fn command(key: Key, response: Response) -> Self {
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[11] = response as u8;
        Self { key, bytes, data_in: 0 }
    }

    /// A response to a command that its unit has answered.
    pub(super) fn completed(
        key: Key,
        response: Response,
        status: u8,
        sense: &[u8],
        residual: u32,
        data_in: u32,
    ) -> Self {
        let mut answer = Self::command(key, response);
        answer.bytes[0..4].copy_from_slice(&(sense.len() as u32).to_le_bytes());
        answer.bytes[4..8].copy_from_slice(&residual.to_le_bytes());
        answer.bytes[10] = status;
        answer.bytes[12..12 + sense.len()].copy_from_slice(sense);
        answer.data_in = data_in;
        answer
    }

    /// A response to a control request: one byte, behind the four of an asynchronous notification's answer.
    pub(super) fn control(key: Key, response: Response) -> Self {
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[key.room.length.saturating_sub(1).min(4)] = response as u8;
        Self { key, bytes, data_in: 0 }
    }
}

/// The queues that a driver has set up.
pub(super) struct VirtioRings {
    memory: Arc<GuestMemory>,
    notices: Arc<Notices>,
    queues: [Option<Virtqueue>; QUEUES],
    /// Where the search for the next request begins.
    turn: usize,
    /// An event found no buffer.
    missed: bool,
}

impl VirtioRings {
    /// Takes over the queues that the driver has enabled; all rings must be RAM.
    pub(super) fn new(
        memory: Arc<GuestMemory>,
        notices: Arc<Notices>,
        setups: &[Option<Setup>; QUEUES],
    ) -> Result<Self, QueueError> {
        let mut queues = [None; QUEUES];
        for (queue, setup) in queues.iter_mut().zip(setups) {
            *queue = setup.map(|setup| Virtqueue::new(setup, &memory)).transpose()?;
        }
        Ok(Self { memory, notices, queues, turn: 0, missed: false })
    }

    /// Maps the data of a command behind its header (`writable` false) or behind its response (true).
    pub(super) fn map_data(&self, key: &Key, writable: bool, segments: &mut GuestSegments) -> Result<(), QueueError> {
        let queue = self.queues[key.queue].as_ref().ok_or(QueueError::Chain(key.head))?;
        let mut skip = if writable { RESPONSE_SIZE } else { COMMAND_SIZE };
        queue.walk(&self.memory, key.head, |buffer| {
            if buffer.writable != writable {
                return Ok(());
            }
            let length = buffer.length as usize;
            let skipped = skip.min(length);
            skip -= skipped;
            if length == skipped {
                return Ok(());
            }
            segments.push(buffer.address.checked_add(skipped as u64).ok_or(OutsideRam)?, length - skipped)
        })
    }

    /// Puts an event into the event queue; true if the driver wants an interrupt for it. Without a buffer, the next event
    /// says that one was missed.
    pub(super) fn post_event(&mut self, event: u32, lun: [u8; 8], reason: u32) -> Result<bool, QueueError> {
        let posted = self.give_event(event, lun, reason);
        self.checked(posted)
    }

    fn give_event(&mut self, event: u32, lun: [u8; 8], reason: u32) -> Result<bool, QueueError> {
        const MISSED: u32 = 1 << 31;
        let memory = &self.memory;
        let Some(queue) = &mut self.queues[EVENT] else { return Ok(false) };
        let Some(head) = queue.take(memory)? else {
            self.missed = true;
            return Ok(false);
        };
        let mut room = Room::default();
        queue.walk(memory, head, |buffer| match buffer.writable {
            true => room.extend(buffer, EVENT_SIZE).map(|_| ()),
            false => Ok(()),
        })?;
        let mut bytes = [0; EVENT_SIZE];
        let event = if std::mem::take(&mut self.missed) { event | MISSED } else { event };
        bytes[..4].copy_from_slice(&event.to_le_bytes());
        bytes[4..12].copy_from_slice(&lun);
        bytes[12..].copy_from_slice(&reason.to_le_bytes());
        room.write(memory, &bytes).map_err(|_| QueueError::Chain(head))?;
        queue.give(memory, head, room.length as u32)?;
        Ok(queue.wants_interrupt(memory))
    }

    /// An error ends the use of the queues; the driver is told.
    fn checked<T>(&self, result: Result<T, QueueError>) -> Result<T, QueueError> {
        if result.is_err() {
            self.notices.give_up();
        }
        result
    }

    /// Requests that wait in all queues.
    fn count(&self) -> Result<u32, QueueError> {
        let taken_from = |(number, queue): (usize, &Option<Virtqueue>)| (number != EVENT).then_some(*queue).flatten();
        let queues = self.queues.iter().enumerate().filter_map(taken_from);
        queues.map(|queue| queue.pending(&self.memory).map(u32::from)).sum()
    }

    /// The next request of any queue, in turns.
    fn next(&mut self) -> Result<Option<Descriptor>, QueueError> {
        for _ in 0..QUEUES {
            let number = self.turn;
            self.turn = (self.turn + 1) % QUEUES;
            if number == EVENT {
                continue;
            }
            let Some(mut queue) = self.queues[number] else { continue };
            let taken = queue.take(&self.memory)?;
            self.queues[number] = Some(queue);
            if let Some(head) = taken {
                return self.read(number, &queue, head).map(Some);
            }
        }
        Ok(None)
    }

    /// Gives all answers back.
    fn give(&mut self, answers: &mut VecDeque<Answer>) -> Result<usize, QueueError> {
        let mut touched = [false; QUEUES];
        let count = answers.len();
        for Answer { key, bytes, data_in } in answers.drain(..) {
            let lost = QueueError::Chain(key.head);
            let length = if key.is_command() { RESPONSE_SIZE } else { key.room.length.min(5) };
            key.room.write(&self.memory, &bytes[..length]).map_err(|_| lost)?;
            let queue = self.queues[key.queue].as_mut().ok_or(lost)?;
            queue.give(&self.memory, key.head, length as u32 + data_in)?;
            touched[key.queue] = true;
        }
        let wanted = |number: usize| self.queues[number].is_some_and(|queue| queue.wants_interrupt(&self.memory));
        let interrupt = (0..QUEUES).filter(|&number| touched[number] && wanted(number));
        self.notices.wanted.fetch_or(interrupt.fold(0, |bits, number| bits | 1 << number), Ordering::AcqRel);
        Ok(count)
    }

    /// Reads the request at `head` of `queue`.
    fn read(&self, number: usize, queue: &Virtqueue, head: u16) -> Result<Descriptor, QueueError> {
        let mut header = [0; COMMAND_SIZE];
        let (mut filled, mut room) = (0, Room::default());
        queue.walk(&self.memory, head, |buffer| {
            if buffer.writable {
                return room.extend(buffer, RESPONSE_SIZE).map(|_| ());
            }
            let part = (buffer.length as usize).min(COMMAND_SIZE - filled);
            let place = &mut header[filled..filled + part];
            self.memory.read_slice(place, GuestAddress(buffer.address)).map_err(|_| OutsideRam)?;
            filled += part;
            Ok(())
        })?;
        let control = number == CONTROL;
        // Without room for the response there is nobody to answer to.
        let (least, needed) = if control { (8, 1) } else { (COMMAND_SIZE, RESPONSE_SIZE) };
        if filled < least || room.length < needed {
            return Err(QueueError::Chain(head));
        }
        let (lun, tag) = match control {
            // Task management has its tag behind the unit.
            true => (&header[8..16], &header[16..24]),
            false => (&header[0..8], &header[8..16]),
        };
        let (target, unit) = parse_lun(lun.try_into().expect("eight bytes"));
        let tag = u64::from_le_bytes(tag.try_into().expect("eight bytes"));
        Ok(Descriptor { key: Key { queue: number, head, room, target, lun: unit, tag }, header })
    }
}

/// Target and unit of a virtio-scsi address (virtio 1.2, 5.6.6.1): 1, target, and the unit in flat space form.
pub(super) fn parse_lun(bytes: [u8; 8]) -> (Option<u8>, Option<Lun>) {
    let [form, target, high, low, rest @ ..] = bytes;
    let unit = [high, low, rest[0], rest[1], rest[2], rest[3], 0, 0];
    match form {
        1 => (Some(target), Lun::from_sam(unit)),
        _ => (None, None),
    }
}

impl Rings for VirtioRings {
    type Descriptor = Descriptor;
    type Key = Key;
    type Answer = Answer;
    type Failure = Response;
    type Error = QueueError;

    const LOST: Response = Response::Failure;
    const TARGET_GONE: Response = Response::BadTarget;

    fn key(descriptor: &Descriptor) -> Key {
        descriptor.key
    }

    fn target(key: &Key) -> u8 {
        key.target.unwrap_or(u8::MAX)
    }

    fn failed(key: Key, failure: Response) -> Answer {
        match key.is_command() {
            true => Answer::command(key, failure),
            false => Answer::control(key, failure),
        }
    }

    fn pending(&mut self) -> Result<u32, QueueError> {
        let pending = self.count();
        self.checked(pending)
    }

    fn fetch(&mut self) -> Result<Option<Descriptor>, QueueError> {
        let fetched = self.next();
        self.checked(fetched)
    }

    fn post(&mut self, answers: &mut VecDeque<Answer>) -> Result<usize, QueueError> {
        let posted = self.give(answers);
        self.checked(posted)
    }
}
