//! Owns: the way of one command: out, its data, its answer, and its abort when its time is over.
//! Promises: an error says truly whether a command can have been carried out; nothing is sent twice; each wait ends; data go straight
//! between the socket and the caller's memory.
//! Must not know: how connections come about and end.

use std::time::{Duration, Instant};

use scsi::path::{PathAnswer, PathData, PathError};

use super::error::Broken;
use super::inbox::Inbox;
use super::login::Agreed;
use super::outgoing::{Outgoing, Unsent};
use super::session::{Link, Request, Shared};
use super::tasks::{ABORT, Outcome, Wish, Work};
use crate::pdu::{DataOut, HEADER, NO_TAG, Residual, ScsiCommand, TaskRequest};

/// Response codes of task management (RFC 7143, 11.6.1).
const COMPLETE: u8 = 0;
const NO_TASK: u8 = 1;

/// What a caller does next.
enum Turn {
    /// There is an answer, to the command or to its abort.
    Done,
    /// The target wants data.
    Give(Wish),
    /// The receiving half is free.
    Receive(Box<Inbox>),
    Sleep,
    /// The time is over.
    Late,
}

/// What became of an attempt to send.
enum Sent {
    /// With so many bytes of data.
    Yes(u32),
    /// There is no connection, or the target takes no more commands for now.
    NotYet,
    Refused(String),
}

impl Shared {
    pub fn not_sent(&self, cause: impl std::fmt::Display) -> PathError {
        PathError::NotSent(format!("{}: {cause}", self.name))
    }

    pub fn unknown(&self, cause: impl std::fmt::Display) -> PathError {
        PathError::Unknown(format!("{}: {cause}", self.name))
    }

    /// Runs a command.
    pub fn execute(&self, cdb: &[u8], data: PathData<'_>, timeout: Duration) -> Result<PathAnswer, PathError> {
        let deadline = Instant::now() + timeout;
        let cdb = padded_command(cdb, data.len(), self.options.max_transfer).map_err(|why| self.not_sent(why))?;
        let expected = data.len() as u32;
        let work = match &data {
            _ if expected == 0 => Work::Plain,
            PathData::None => Work::Plain,
            PathData::In(_) => Work::Read,
            PathData::Out(_) => Work::Write,
        };
        let (_slot, slot, tag) = self.open(work, expected, deadline).map_err(|cause| self.not_sent(cause))?;
        let request = Request { slot, tag, cdb, reads: work == Work::Read, out: None, expected, deadline };
        match data {
            PathData::In(into) => self.landings[slot].lend(tag, into, || self.carry_out(&request)),
            PathData::Out(from) if expected > 0 => self.carry_out(&Request { out: Some(from), ..request }),
            _ => self.carry_out(&request),
        }
    }

    /// Runs a task management function that concerns more than one task: its response code (RFC 7143, 11.6.1).
    pub fn manage(&self, function: u8, timeout: Duration) -> Result<u8, PathError> {
        let deadline = Instant::now() + timeout;
        let (_slot, slot, tag) = self.open(Work::Manage, 0, deadline).map_err(|cause| self.not_sent(cause))?;
        let request = Request { slot, tag, cdb: [0; 16], reads: false, out: None, expected: 0, deadline };
        self.dispatch(&request, |_, number, expected_status| {
            let (lun, referenced) = (self.lun, NO_TAG);
            let task = TaskRequest { function, lun, tag, referenced, number, referenced_number: 0 };
            (task.encode(expected_status), 0)
        })?;
        while !matches!(self.wait(&request, deadline), Turn::Done) {
            if Instant::now() >= deadline {
                return Err(self.unknown("no answer to a task management function in time"));
            }
        }
        match self.core.lock().tasks.outcome(slot) {
            Some(Outcome::Managed(response)) => Ok(*response),
            Some(Outcome::Lost(cause)) => Err(self.unknown(cause)),
            _ => Err(self.unknown("the target gives a task management function an answer that makes no sense")),
        }
    }

    fn carry_out(&self, request: &Request<'_>) -> Result<PathAnswer, PathError> {
        let length = request.out.map_or(0, <[u8]>::len);
        let given = self.dispatch(request, |agreed, number, expected_status| {
            let (immediate, unsolicited) = unasked(agreed, length);
            let command = command_of(request, self.lun, number, unsolicited == immediate);
            (command.encode(expected_status), immediate)
        })?;
        self.finish(request, given)
    }

    /// Sends a request as soon as there is a connection and the target takes it; gives how much data went along.
    fn dispatch(
        &self,
        request: &Request<'_>,
        encode: impl Fn(&Agreed, u32, u32) -> ([u8; HEADER], usize),
    ) -> Result<u32, PathError> {
        loop {
            match self.try_send(request, &encode) {
                Sent::Yes(given) => return Ok(given),
                Sent::Refused(cause) => return Err(self.not_sent(cause)),
                Sent::NotYet => self.queue(request).map_err(|cause| self.not_sent(cause))?,
            }
        }
    }

    /// Numbers of a request that goes out now, CmdSN and ExpStatSN; `None`: there is no connection, or the target takes no more for now. The
    /// caller has the sending half. An error says why it is not worth waiting for.
    pub(super) fn take_number(&self, slot: usize) -> Result<Option<(u32, u32)>, String> {
        let mut core = self.core.lock();
        if let Some(cause) = core.hopeless(self.options.patience) {
            return Err(cause);
        }
        if !matches!(core.link, Link::Up(_)) || core.leave_by.is_some() {
            return Ok(None);
        }
        let number = core.tasks.send(slot);
        Ok(number.map(|number| (number, core.tasks.expected_status())))
    }

    fn try_send(&self, request: &Request<'_>, encode: impl Fn(&Agreed, u32, u32) -> ([u8; HEADER], usize)) -> Sent {
        let Some(mut wire) = self.wire.try_lock_until(request.deadline) else {
            return Sent::Refused("the target takes nothing: not sent in time".to_owned());
        };
        let (number, expected_status) = match self.take_number(request.slot) {
            Ok(Some(numbers)) => numbers,
            Ok(None) => return Sent::NotYet,
            Err(cause) => return Sent::Refused(cause),
        };
        let out = request.out.unwrap_or_default();
        let (header, immediate) = encode(&wire.agreed, number, expected_status);
        if let Err(Unsent { cause, is_partial }) = wire.send(header, &out[..immediate], request.deadline) {
            let epoch = wire.epoch;
            if is_partial {
                drop(wire);
                self.fail(epoch, &cause);
                return Sent::Yes(immediate as u32);
            }
            // Nobody else has taken a number: the sending half is held.
            self.core.lock().tasks.unsend(request.slot);
            drop(wire);
            return match cause {
                Broken::Stalled => Sent::Refused("the target takes nothing: not sent in time".to_owned()),
                cause => {
                    self.fail(epoch, &cause);
                    Sent::NotYet
                }
            };
        }
        let (_, unsolicited) = unasked(&wire.agreed, out.len());
        if unsolicited > immediate {
            self.send_data(wire, request, &[0; 8], NO_TAG, immediate..unsolicited);
        }
        Sent::Yes(unsolicited as u32)
    }

    /// Sends one sequence of data. When it fails, so does the connection.
    fn send_data(
        &self,
        mut wire: parking_lot::MutexGuard<'_, Outgoing>,
        request: &Request<'_>,
        lun: &[u8; 8],
        transfer_tag: u32,
        range: std::ops::Range<usize>,
    ) {
        let out = request.out.unwrap_or_default();
        let expected_status = self.core.lock().tasks.expected_status();
        // Given up only when the command's own abort would have been answered too.
        let deadline = request.deadline + self.options.abort_time;
        let (mut at, mut number) = (range.start, 0);
        while at < range.end {
            let length = (range.end - at).min(wire.agreed.segment as usize);
            let is_final = at + length == range.end;
            let data = DataOut { is_final, tag: request.tag, transfer_tag, number, offset: at as u32 };
            if let Err(unsent) = wire.send(data.encode(*lun, expected_status), &out[at..at + length], deadline) {
                let epoch = wire.epoch;
                drop(wire);
                return self.fail(epoch, &unsent.cause);
            }
            (at, number) = (at + length, number + 1);
        }
    }

    /// Waits until there may be a connection and a turn; serves others meanwhile.
    fn queue(&self, request: &Request<'_>) -> Result<(), String> {
        let (slot, deadline) = (request.slot, request.deadline);
        let mut core = self.core.lock();
        core.parked &= !(1 << slot);
        if let Some(cause) = core.hopeless(self.options.patience) {
            return Err(cause);
        }
        if Instant::now() >= deadline {
            return Err("it could not be sent in time".to_owned());
        }
        let is_up = matches!(core.link, Link::Up(_)) && core.leave_by.is_none();
        if is_up && core.tasks.has_turn() {
            core.queued &= !(1 << slot);
            let next = core.pass_on();
            drop(core);
            if let Some(caller) = next {
                caller.wake();
            }
            return Ok(());
        }
        core.queued |= 1 << slot;
        if let Some(inbox) = core.inbox.take() {
            drop(core);
            self.receive(inbox, slot, deadline);
            return Ok(());
        }
        core.parked |= 1 << slot;
        drop(core);
        // Patience may end before the deadline.
        let left = deadline.saturating_duration_since(Instant::now());
        std::thread::park_timeout(left.min(Duration::from_millis(500)));
        Ok(())
    }

    /// Waits for the answer, giving the target what it asks for; aborts the command when its time is over.
    fn finish(&self, request: &Request<'_>, mut given: u32) -> Result<PathAnswer, PathError> {
        let mut deadline = request.deadline;
        let mut is_aborting = false;
        loop {
            match self.wait(request, deadline) {
                Turn::Done => break,
                Turn::Give(wish) => {
                    given = given.max(wish.offset + wish.length);
                    self.give(request, &wish);
                }
                Turn::Late if !is_aborting => {
                    is_aborting = true;
                    deadline = Instant::now() + self.options.abort_time;
                    self.abort(request, deadline);
                }
                Turn::Late => {
                    let epoch = self.core.lock().epoch;
                    self.fail(epoch, &Broken::AbortUnanswered);
                }
                Turn::Receive(_) | Turn::Sleep => {}
            }
        }
        self.conclude(request, given)
    }

    /// What the caller of a task that is over is told.
    pub fn conclude(&self, request: &Request<'_>, given: u32) -> Result<PathAnswer, PathError> {
        let (epoch, answer) = self.answer(request, given);
        if let Some(broken) = epoch {
            let epoch = self.core.lock().epoch;
            self.fail(epoch, &broken);
        }
        answer
    }

    /// What the caller of a task does now; receiving and sleeping are done here.
    fn wait(&self, request: &Request<'_>, deadline: Instant) -> Turn {
        let slot = request.slot;
        let turn = {
            let mut core = self.core.lock();
            core.parked &= !(1 << slot);
            if core.tasks.is_over(slot) {
                Turn::Done
            } else if let Some(wish) = core.tasks.wish(slot) {
                Turn::Give(wish)
            } else if Instant::now() >= deadline {
                Turn::Late
            } else if let Some(inbox) = core.inbox.take() {
                Turn::Receive(inbox)
            } else {
                core.parked |= 1 << slot;
                Turn::Sleep
            }
        };
        match turn {
            Turn::Receive(inbox) => {
                self.receive(inbox, slot, deadline);
                Turn::Sleep
            }
            Turn::Sleep => {
                std::thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
                Turn::Sleep
            }
            Turn::Give(_) | Turn::Late => {
                // Who sends does not receive.
                self.pass_on();
                turn
            }
            Turn::Done => turn,
        }
    }

    /// Sends what an R2T asks for.
    fn give(&self, request: &Request<'_>, wish: &Wish) {
        let patient = request.deadline + self.options.abort_time;
        let Some(wire) = self.wire.try_lock_until(patient) else { return };
        // One that has ended meanwhile, or whose connection is lost, is not served.
        if self.core.lock().tasks.outcome(request.slot).is_some() {
            return;
        }
        let start = wish.offset as usize;
        self.send_data(wire, request, &wish.lun, wish.transfer_tag, start..start + wish.length as usize);
    }

    fn abort(&self, request: &Request<'_>, deadline: Instant) {
        let Some(mut wire) = self.wire.try_lock_until(deadline) else { return };
        let (header, epoch) = {
            let mut core = self.core.lock();
            if core.tasks.outcome(request.slot).is_some() {
                return;
            }
            core.tasks.begin_abort(request.slot);
            let task = TaskRequest {
                function: 1,
                lun: self.lun,
                tag: request.tag | ABORT,
                referenced: request.tag,
                number: core.tasks.next_number(),
                referenced_number: core.tasks.number(request.slot),
            };
            tracing::warn!(path = %self.name, operation = request.cdb[0], "a command is not answered in time: it is aborted");
            (task.encode(core.tasks.expected_status()), wire.epoch)
        };
        if let Err(unsent) = wire.send(header, &[], deadline) {
            drop(wire);
            self.fail(epoch, &unsent.cause);
        }
    }

    /// What the caller is told, and whether the connection cannot go on after that.
    fn answer(&self, request: &Request<'_>, given: u32) -> (Option<Broken>, Result<PathAnswer, PathError>) {
        let core = self.core.lock();
        let slot = request.slot;
        let told = match core.tasks.outcome(slot) {
            Some(Outcome::Answered { status, residual, received }) => {
                let rest = if let Residual::Underflow(rest) = residual { *rest } else { 0 };
                let moved = if request.reads { *received } else { given };
                let transferred = request.expected.saturating_sub(rest).min(moved) as usize;
                Ok(PathAnswer { status: *status, sense: core.tasks.sense(slot).to_vec(), transferred })
            }
            Some(Outcome::Failed(code)) => {
                Err(self.unknown(format_args!("the target failed at the command (response {code:#04x})")))
            }
            Some(Outcome::Rejected(reason)) => {
                Err(self.not_sent(format_args!("the target does not take the command (reject {reason:#04x})")))
            }
            Some(Outcome::Managed(_)) => Err(self.unknown("the target's answer makes no sense")),
            Some(Outcome::Lost(cause)) => Err(self.unknown(cause)),
            None => {
                let late = "no answer in time";
                return match core.tasks.abort_answer(slot) {
                    // Without its data no write has begun.
                    Some(COMPLETE) if request.out.is_some() && given == 0 => {
                        (None, Err(self.not_sent(format_args!("{late}; aborted before any of its data went out"))))
                    }
                    Some(COMPLETE | NO_TASK) => (None, Err(self.unknown(format_args!("{late}; aborted")))),
                    _ => (
                        Some(Broken::AbortUnanswered),
                        Err(self.unknown(format_args!("{late}, and the target does not abort it"))),
                    ),
                };
            }
        };
        (None, told)
    }
}

/// How much of `length` bytes goes along with a command itself, and how much goes out before the target asks (RFC 7143, 4.2.5.2).
pub(super) fn unasked(agreed: &Agreed, length: usize) -> (usize, usize) {
    let (segment, first) = (agreed.segment as usize, agreed.first_burst as usize);
    let immediate = if agreed.immediate_data { length.min(segment).min(first) } else { 0 };
    let unsolicited = if agreed.initial_ready { immediate } else { length.min(first) };
    (immediate, unsolicited)
}

/// A command as it goes into a PDU, with `length` bytes of data; or why it cannot.
pub(super) fn padded_command(cdb: &[u8], length: usize, most: usize) -> Result<[u8; 16], String> {
    let mut padded = [0; 16];
    let Some(room) = padded.get_mut(..cdb.len()).filter(|room| !room.is_empty()) else {
        return Err(format!("a command of {} bytes cannot be sent; one of 1 to 16 can", cdb.len()));
    };
    room.copy_from_slice(cdb);
    if length > most {
        return Err(format!("{length} bytes are more than one command moves ({most})"));
    }
    Ok(padded)
}

/// The PDU of a command.
pub(super) fn command_of(request: &Request<'_>, lun: [u8; 8], number: u32, is_final: bool) -> ScsiCommand {
    ScsiCommand {
        is_final,
        reads: request.reads,
        writes: request.out.is_some(),
        attribute: 1,
        lun,
        tag: request.tag,
        expected: request.expected,
        number,
        cdb: request.cdb,
    }
}

/// Why a command has no slot.
pub(super) const NO_PLACE: &str = "too many commands are under way, and none has ended in time";
