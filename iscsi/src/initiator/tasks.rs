//! Owns: the commands of a session: numbers and tags, how far each one is, and what the target may say about it.
//! Promises: an answer is for the command that it names, in order, and never more than that asked for; everything else ends the connection.
//! Must not know: sockets, threads, time, memory of callers.

use std::sync::Arc;

use super::error::Broken;
use super::login::{Agreed, FIRST_NUMBER, OUTSTANDING};
use crate::pdu::{DataIn, NO_TAG, ReadyToTransfer, Residual, ScsiResponse, Sequence};

/// Sense data that are kept, in bytes (SPC-4, 4.5.1: at most 252).
pub(super) const SENSE: usize = 252;

/// What a tag stands for: bits 8 and 9. Tags with both set are not given out, so that none is [`NO_TAG`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The task of a slot.
    Task,
    /// The abort of the task of a slot.
    Abort,
    /// A ping (slot 0) or a logout (slot 1).
    Control,
}

/// What makes the tag of a task that of its abort.
pub(super) const ABORT: u32 = 1 << 8;
/// Tag of our pings.
pub(super) const PING: u32 = 2 << 8;
/// Tag of our logout.
pub(super) const LOGOUT: u32 = 2 << 8 | 1;

/// Parts of a tag: generation, kind, slot.
pub(super) fn parts(tag: u32) -> Option<(u32, Kind, usize)> {
    let kind = match tag >> 8 & 3 {
        0 => Kind::Task,
        1 => Kind::Abort,
        2 => Kind::Control,
        _ => return None,
    };
    Some((tag >> 10, kind, (tag & 0xFF) as usize))
}

/// Where a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Free,
    /// Not sent: it waits for a connection or for its turn.
    Queued,
    Sent,
}

/// What a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A command without data.
    Plain,
    /// One that reads.
    Read,
    /// One that writes.
    Write,
    /// A task management function that ends all tasks of the session.
    Manage,
}

/// How a task has ended.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The target has answered. `received`: bytes that it has sent.
    Answered { status: u8, residual: Residual, received: u32 },
    /// The target says that it failed, by this response code (RFC 7143, 11.4.3).
    Failed(u8),
    /// The target did not take the request, for this reason (RFC 7143, 11.17.1).
    Rejected(u8),
    /// The answer to a task management function.
    Managed(u8),
    /// There will be no answer, for this reason.
    Lost(Arc<str>),
}

/// Data that the target asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    pub lun: [u8; 8],
    pub transfer_tag: u32,
    pub offset: u32,
    pub length: u32,
}

struct Task {
    generation: u32,
    phase: Phase,
    work: Work,
    number: u32,
    expected: u32,
    /// Data that have come, or were asked for.
    moved: u32,
    /// Number of the next Data-In or R2T.
    next: u32,
    wishes: [Option<Wish>; OUTSTANDING as usize],
    wish_at: usize,
    outcome: Option<Outcome>,
    sense: [u8; SENSE],
    sense_length: usize,
    abort: Abort,
}

/// How far the abort of a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abort {
    None,
    /// Its answer will come, or the connection will end.
    Sent,
    Answered(u8),
}

impl Task {
    fn new() -> Self {
        Self {
            generation: 0,
            phase: Phase::Free,
            work: Work::Plain,
            number: 0,
            expected: 0,
            moved: 0,
            next: 0,
            wishes: [None; OUTSTANDING as usize],
            wish_at: 0,
            outcome: None,
            sense: [0; SENSE],
            sense_length: 0,
            abort: Abort::None,
        }
    }

    fn is_open(&self) -> bool {
        self.phase == Phase::Sent && self.outcome.is_none()
    }
}

/// The tasks of one session, over all of its connections.
pub(super) struct Tasks {
    slots: Vec<Task>,
    free: Vec<u8>,
    agreed: Agreed,
    /// Number of the next status.
    status: u32,
    next_number: u32,
    most: u32,
    expected: u32,
}

impl Tasks {
    /// Room for so many at once, at most 128.
    pub fn new(count: usize) -> Self {
        Self {
            slots: (0..count).map(|_| Task::new()).collect(),
            free: (0..count as u8).rev().collect(),
            agreed: Agreed::default(),
            status: 0,
            next_number: FIRST_NUMBER,
            most: 0,
            expected: 0,
        }
    }

    /// A connection begins: with these agreements and the numbers of the last login response.
    pub fn begin(&mut self, agreed: Agreed, sequence: Sequence) {
        self.agreed = agreed;
        self.status = sequence.status.wrapping_add(1);
        (self.next_number, self.most, self.expected) = (FIRST_NUMBER, FIRST_NUMBER - 1, FIRST_NUMBER);
        self.take_window(sequence);
    }

    /// Takes a slot, if there is one: its number and the tag of its task.
    pub fn open(&mut self, work: Work, expected: u32) -> Option<(usize, u32)> {
        let slot = self.free.pop()?;
        let task = &mut self.slots[usize::from(slot)];
        // 22 bits: a tag comes again after four million commands of its slot.
        task.generation = (task.generation + 1) & 0x003F_FFFF;
        (task.phase, task.work, task.expected) = (Phase::Queued, work, expected);
        (task.moved, task.next, task.wishes, task.wish_at) = (0, 0, [None; OUTSTANDING as usize], 0);
        (task.outcome, task.sense_length, task.abort) = (None, 0, Abort::None);
        Some((usize::from(slot), task.generation << 10 | u32::from(slot)))
    }

    /// Gives a slot back.
    pub fn close(&mut self, slot: usize) {
        self.slots[slot].phase = Phase::Free;
        self.free.push(slot as u8);
    }

    /// The next command number, for a request that does not wait for its turn.
    pub fn next_number(&self) -> u32 {
        self.next_number
    }

    /// What was agreed on for this connection.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Whether it was sent.
    pub fn is_sent(&self, slot: usize) -> bool {
        self.slots[slot].phase == Phase::Sent
    }

    /// Status number that is expected next.
    pub fn expected_status(&self) -> u32 {
        self.status
    }

    /// A task is about to be sent: its command number, if the target takes one more. Management does not wait for its turn.
    pub fn send(&mut self, slot: usize) -> Option<u32> {
        let (number, has_turn) = (self.next_number, self.has_turn());
        let task = &mut self.slots[slot];
        if task.work != Work::Manage {
            if !has_turn {
                return None;
            }
            self.next_number = number.wrapping_add(1);
        }
        (task.phase, task.number) = (Phase::Sent, number);
        Some(number)
    }

    /// Nothing of it was sent after all: it waits again, and its number is the next one's.
    pub fn unsend(&mut self, slot: usize) {
        let task = &mut self.slots[slot];
        (task.phase, task.outcome) = (Phase::Queued, None);
        if task.work != Work::Manage {
            self.next_number = task.number;
        }
    }

    /// Whether the target takes one more command.
    pub fn has_turn(&self) -> bool {
        (self.most.wrapping_sub(self.next_number) as i32) >= 0
    }

    /// Its command number.
    pub fn number(&self, slot: usize) -> u32 {
        self.slots[slot].number
    }

    /// How it ended, if it has.
    pub fn outcome(&self, slot: usize) -> Option<&Outcome> {
        self.slots[slot].outcome.as_ref()
    }

    /// Sense data that came with its end.
    pub fn sense(&self, slot: usize) -> &[u8] {
        &self.slots[slot].sense[..self.slots[slot].sense_length]
    }

    /// Its abort is about to be sent.
    pub fn begin_abort(&mut self, slot: usize) {
        self.slots[slot].abort = Abort::Sent;
    }

    /// The answer to its abort, if there is one.
    pub fn abort_answer(&self, slot: usize) -> Option<u8> {
        match self.slots[slot].abort {
            Abort::Answered(response) => Some(response),
            Abort::None | Abort::Sent => None,
        }
    }

    /// Whether nothing more will come for it: after that its slot may be another's. One that ends while it is being aborted is
    /// answered twice (RFC 7143, 11.6.1: the abort of a task that is over has its answer too).
    pub fn is_over(&self, slot: usize) -> bool {
        let task = &self.slots[slot];
        match task.abort {
            Abort::None => task.outcome.is_some(),
            Abort::Sent => false,
            Abort::Answered(_) => true,
        }
    }

    /// The next data that the target wants of it, while it is not over.
    pub fn wish(&mut self, slot: usize) -> Option<Wish> {
        let task = &mut self.slots[slot];
        if task.outcome.is_some() {
            return None;
        }
        let wish = task.wishes[task.wish_at].take();
        if wish.is_some() {
            task.wish_at = (task.wish_at + 1) % task.wishes.len();
        }
        wish
    }

    /// Takes the window of commands that came with an answer (RFC 7143, 4.2.2.1). True: it has grown.
    pub fn take_window(&mut self, sequence: Sequence) -> bool {
        // Nonsense is ignored, and so is what is older than what is known.
        if (sequence.most.wrapping_sub(sequence.expected.wrapping_sub(1)) as i32) < 0 {
            return false;
        }
        if (sequence.expected.wrapping_sub(self.expected) as i32) > 0 {
            self.expected = sequence.expected;
        }
        let grows = (sequence.most.wrapping_sub(self.most) as i32) > 0;
        if grows {
            self.most = sequence.most;
        }
        grows
    }

    /// Takes the number of a status.
    pub fn take_status(&mut self, number: u32) -> Result<(), Broken> {
        if number != self.status {
            return Err(Broken::Protocol("a status was left out, or came twice"));
        }
        self.status = number.wrapping_add(1);
        Ok(())
    }

    /// The task that a tag is for.
    fn find(&mut self, tag: u32) -> Result<usize, Broken> {
        const STRANGE: Broken = Broken::Protocol("an answer to a command that there is not");
        let Some((generation, Kind::Task, slot)) = parts(tag) else { return Err(STRANGE) };
        match self.slots.get(slot) {
            Some(task) if task.generation == generation && task.is_open() => Ok(slot),
            _ => Err(STRANGE),
        }
    }

    /// The header of data came: `length` bytes will follow, which have their place at its offset.
    pub fn take_data(&mut self, data: &DataIn, length: u32) -> Result<usize, Broken> {
        let slot = self.find(data.tag)?;
        let task = &mut self.slots[slot];
        if task.work != Work::Read {
            return Err(Broken::Protocol("data for a command that reads nothing"));
        }
        let after = u64::from(data.offset) + u64::from(length);
        if data.number != task.next || data.offset != task.moved || after > u64::from(task.expected) {
            return Err(Broken::Protocol("data out of order, or more than were asked for"));
        }
        task.next = task.next.wrapping_add(1);
        Ok(slot)
    }

    /// Data are in their place; with a status the task ends.
    pub fn end_data(&mut self, slot: usize, data: &DataIn, length: u32) {
        let task = &mut self.slots[slot];
        task.moved += length;
        if let Some((status, residual)) = data.status
            && task.outcome.is_none()
        {
            task.outcome = Some(Outcome::Answered { status, residual, received: task.moved });
        }
    }

    /// The target asks for data.
    pub fn take_ready(&mut self, ready: &ReadyToTransfer) -> Result<usize, Broken> {
        let (slot, most) = (self.find(ready.tag)?, self.agreed.burst);
        let outstanding = self.agreed.outstanding as usize;
        let task = &mut self.slots[slot];
        let after = u64::from(ready.offset) + u64::from(ready.length);
        let fits = ready.length > 0 && ready.length <= most && after <= u64::from(task.expected);
        if task.work != Work::Write || ready.transfer_tag == NO_TAG || ready.number != task.next || !fits {
            return Err(Broken::Protocol("data are asked for that there are not"));
        }
        let waiting = task.wishes.iter().flatten().count();
        if waiting >= outstanding.min(task.wishes.len()) {
            return Err(Broken::Protocol("more data are asked for at once than was agreed on"));
        }
        let at = (task.wish_at + waiting) % task.wishes.len();
        let ReadyToTransfer { lun, transfer_tag, offset, length, .. } = *ready;
        task.wishes[at] = Some(Wish { lun, transfer_tag, offset, length });
        task.next = task.next.wrapping_add(1);
        Ok(slot)
    }

    /// The response to a command.
    pub fn take_response(&mut self, response: &ScsiResponse, data: &[u8]) -> Result<usize, Broken> {
        let slot = self.find(response.tag)?;
        let task = &mut self.slots[slot];
        if task.work == Work::Manage {
            return Err(Broken::Protocol("a command's answer to a task management function"));
        }
        if response.response != 0 {
            task.outcome = Some(Outcome::Failed(response.response));
            return Ok(slot);
        }
        // Length of the sense data in two bytes, then they (RFC 7143, 11.4.7.2).
        if let Some((length, sense)) = data.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length)).min(sense.len()).min(SENSE);
            task.sense[..length].copy_from_slice(&sense[..length]);
            task.sense_length = length;
        }
        let (status, residual) = (response.status, response.residual);
        task.outcome = Some(Outcome::Answered { status, residual, received: task.moved });
        Ok(slot)
    }

    /// The answer to a task management function.
    pub fn take_managed(&mut self, tag: u32, response: u8) -> Result<usize, Broken> {
        const STRANGE: Broken = Broken::Protocol("an answer to a task management function that there is not");
        let Some((generation, kind, slot)) = parts(tag) else { return Err(STRANGE) };
        let known = |task: &Task| task.generation == generation && task.phase == Phase::Sent;
        if !self.slots.get(slot).is_some_and(known) {
            return Err(STRANGE);
        }
        match (kind, self.slots[slot].work) {
            (Kind::Abort, _) if self.slots[slot].abort == Abort::Sent => {
                self.slots[slot].abort = Abort::Answered(response)
            }
            (Kind::Task, Work::Manage) if self.slots[slot].outcome.is_none() => {
                let number = self.slots[slot].number;
                self.slots[slot].outcome = Some(Outcome::Managed(response));
                if response == 0 {
                    let before = |task: &Task| (task.number.wrapping_sub(number) as i32) < 0;
                    self.lose(&"the logical unit or the target was reset".into(), |task| before(task));
                }
            }
            _ => return Err(STRANGE),
        }
        Ok(slot)
    }

    /// A PDU was rejected; `header` is it.
    pub fn take_reject(&mut self, reason: u8, header: &[u8]) -> Result<Option<usize>, Broken> {
        let Some(header) = header.first_chunk::<48>() else {
            return Err(Broken::Protocol("a reject without what is rejected"));
        };
        let tag = u32::from_be_bytes([header[16], header[17], header[18], header[19]]);
        match (header[0] & 0x3F, reason) {
            // Wrong digests of data: the command's own answer comes too (RFC 7143, 7.8).
            (0x01 | 0x05, 0x02) => Ok(None),
            // A command, unless its tag is in use: then which of the two goes on nobody knows.
            (0x01, reason) if reason != 0x07 => {
                let slot = self.find(tag)?;
                self.slots[slot].outcome = Some(Outcome::Rejected(reason));
                Ok(Some(slot))
            }
            // An abort, or another function.
            (0x02, _) => self.take_managed(tag, 0xFF).map(Some),
            // A ping or its answer.
            (0x00, _) => Ok(None),
            _ => Err(Broken::Rejected(reason)),
        }
    }

    /// Ends every task that was sent and has no answer: there will be none.
    pub fn lose_all(&mut self, cause: &Arc<str>) {
        self.lose(cause, |_| true);
        for task in self.slots.iter_mut().filter(|task| task.abort == Abort::Sent) {
            task.abort = Abort::None;
        }
    }

    fn lose(&mut self, cause: &Arc<str>, which: impl Fn(&Task) -> bool) {
        for task in self.slots.iter_mut().filter(|task| task.is_open() && which(task)) {
            task.outcome = Some(Outcome::Lost(cause.clone()));
        }
    }

    /// Whether any task is under way.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

#[cfg(test)]
#[path = "tasks_tests.rs"]
mod tests;
