//! Owns: commands as futures: many of them are in flight from one thread, and none has a thread that waits for it.
//! Promises: nothing here waits but by giving way to other futures; what is true of commands of threads (`commands`) is true of these.
//! Must not know: what commands mean; which executor runs them.
//!
//! The thread that sends is the thread that receives, so it must never wait for the socket to take more: what it does not take at once is
//! kept with the sending half, and the driver goes on receiving until it has gone out.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use scsi::path::{PathAnswer, PathError};
use tokio::time::{Sleep, sleep, sleep_until};

use super::commands::{NO_PLACE, command_of, padded_command, unasked};
use super::error::Broken;
use super::outgoing::Unsent;
use super::readiness::{Watched, watch};
use super::session::{Link, Request, Shared};
use super::tasks::{ABORT, Wish, Work};
use crate::pdu::{DataOut, HEADER, NO_TAG, TaskRequest};

/// How soon it is looked again for what nobody tells.
const GLANCE: Duration = Duration::from_millis(5);
/// How soon patience is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The data of a command; their memory goes along and comes back with the answer.
#[derive(Debug)]
pub enum Data {
    /// It moves none.
    None,
    /// The target sends at most as many bytes as there are.
    In(Vec<u8>),
    /// The target takes these bytes.
    Out(Vec<u8>),
}

impl Data {
    fn len(&self) -> usize {
        match self {
            Data::None => 0,
            Data::In(memory) | Data::Out(memory) => memory.len(),
        }
    }

    fn into_memory(self) -> Vec<u8> {
        match self {
            Data::None => Vec::new(),
            Data::In(memory) | Data::Out(memory) => memory,
        }
    }
}

/// Whether a command may go out now; asked last before it does.
pub(super) type Permit<'a> = &'a dyn Fn() -> bool;

/// What became of an attempt to send.
enum Sent {
    Yes,
    /// There is no connection, or the target takes no more commands for now.
    NotYet,
    /// Something else is on its way out.
    Busy,
    Refused(String),
}

/// What a command does next.
enum Turn {
    Done,
    Give(Wish),
    Late,
}

/// A command that is given up before it is over takes the connection with it: an answer that comes would be nobody's.
struct Unfinished<'a>(&'a Shared, usize);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let (is_over, epoch) = {
            let core = self.0.core.lock();
            (core.tasks.is_over(self.1) || !core.tasks.is_sent(self.1), core.epoch)
        };
        if !is_over {
            self.0.fail(epoch, &Broken::GivenUp);
        }
    }
}

impl Shared {
    /// Runs a command as [`Shared::execute`] does.
    pub async fn perform(
        &self,
        cdb: &[u8],
        data: Data,
        timeout: Duration,
        permit: Permit<'_>,
    ) -> (Result<PathAnswer, PathError>, Vec<u8>) {
        let deadline = Instant::now() + timeout;
        let cdb = match padded_command(cdb, data.len(), self.options.max_transfer) {
            Ok(cdb) => cdb,
            Err(why) => return (Err(self.not_sent(why)), data.into_memory()),
        };
        let expected = data.len() as u32;
        let work = match &data {
            _ if expected == 0 => Work::Plain,
            Data::None => Work::Plain,
            Data::In(_) => Work::Read,
            Data::Out(_) => Work::Write,
        };
        // The semaphore is never closed.
        let _turn = self.turns.acquire().await;
        let (_slot, slot, tag) = loop {
            match self.open_unattended(work, expected) {
                Ok(Some(opened)) => break opened,
                Ok(None) if Instant::now() < deadline => sleep(GLANCE).await,
                Ok(None) => return (Err(self.not_sent(NO_PLACE)), data.into_memory()),
                Err(cause) => return (Err(self.not_sent(cause)), data.into_memory()),
            }
        };
        let request = Request { slot, tag, cdb, reads: work == Work::Read, out: None, expected, deadline };
        match data {
            Data::In(memory) => {
                self.landings[slot].put(tag, memory);
                let answer = self.carry_out_unattended(&request, permit).await;
                (answer, self.landings[slot].take())
            }
            Data::Out(memory) => {
                let out = (expected > 0).then_some(memory.as_slice());
                let answer = self.carry_out_unattended(&Request { out, ..request }, permit).await;
                (answer, memory)
            }
            Data::None => (self.carry_out_unattended(&request, permit).await, Vec::new()),
        }
    }

    async fn carry_out_unattended(&self, request: &Request<'_>, permit: Permit<'_>) -> Result<PathAnswer, PathError> {
        let unfinished = Unfinished(self, request.slot);
        let mut timer = pin!(sleep_until(request.deadline.into()));
        loop {
            match self.send_now(request, permit) {
                Sent::Yes => break,
                Sent::Refused(cause) => return Err(self.not_sent(cause)),
                _ if Instant::now() >= request.deadline => return Err(self.not_sent("it could not be sent in time")),
                Sent::Busy => self.until_clear(request.slot).await,
                Sent::NotYet => self.until_turn(request.slot).await,
            }
        }
        let (immediate, mut given) = unasked(&self.wire_agreed(), request.out.map_or(0, <[u8]>::len));
        if given > immediate {
            self.give_range(request, &[0; 8], NO_TAG, immediate..given).await;
        }
        let mut is_aborting = false;
        loop {
            match self.turn(request.slot, timer.as_mut()).await {
                Turn::Done => break,
                Turn::Give(wish) => {
                    let range = wish.offset as usize..(wish.offset + wish.length) as usize;
                    given = given.max(range.end);
                    self.give_range(request, &wish.lun, wish.transfer_tag, range).await;
                }
                Turn::Late if !is_aborting => {
                    is_aborting = true;
                    let deadline = Instant::now() + self.options.abort_time;
                    timer.as_mut().reset(deadline.into());
                    self.abort_unattended(request, deadline).await;
                }
                Turn::Late => {
                    let epoch = self.core.lock().epoch;
                    self.fail(epoch, &Broken::AbortUnanswered);
                }
            }
        }
        drop(unfinished);
        self.conclude(request, given as u32)
    }

    /// Sends the command itself, if it is its turn.
    fn send_now(&self, request: &Request<'_>, permit: Permit<'_>) -> Sent {
        let Some(mut wire) = self.wire.try_lock() else { return Sent::Busy };
        match wire.clear_now() {
            Ok(true) => {}
            Ok(false) => return Sent::Busy,
            Err(broken) => {
                let epoch = wire.epoch;
                drop(wire);
                self.fail(epoch, &broken);
                return Sent::NotYet;
            }
        }
        if !permit() {
            return Sent::Refused("it may not be sent any more".to_owned());
        }
        let (number, expected_status) = match self.take_number(request.slot) {
            Ok(Some(numbers)) => numbers,
            Ok(None) => return Sent::NotYet,
            Err(cause) => return Sent::Refused(cause),
        };
        let out = request.out.unwrap_or_default();
        let (immediate, unsolicited) = unasked(&wire.agreed, out.len());
        let command = command_of(request, self.lun, number, unsolicited == immediate);
        match wire.send_now(command.encode(expected_status), &out[..immediate]) {
            Ok(()) => {
                self.tell_driver(&wire);
                Sent::Yes
            }
            Err(Unsent { cause, .. }) => {
                let epoch = wire.epoch;
                self.core.lock().tasks.unsend(request.slot);
                drop(wire);
                self.fail(epoch, &cause);
                Sent::NotYet
            }
        }
    }

    fn wire_agreed(&self) -> super::login::Agreed {
        self.core.lock().tasks.agreed()
    }

    /// What was kept is the driver's to send.
    fn tell_driver(&self, wire: &super::outgoing::Outgoing) {
        if wire.is_clear() {
            return;
        }
        let mut core = self.core.lock();
        core.is_backed_up = true;
        if let Some(driver) = &core.driver {
            driver.wake_by_ref();
        }
    }

    /// Sends one PDU of a task as soon as the way is free; not if the task has ended, or its connection.
    async fn send_when_clear(&self, slot: usize, deadline: Instant, header: impl Fn(u32) -> [u8; HEADER], data: &[u8]) {
        loop {
            if let Some(mut wire) = self.wire.try_lock() {
                let epoch = wire.epoch;
                let sent = match wire.clear_now() {
                    Ok(true) => {
                        let expected_status = {
                            let core = self.core.lock();
                            if core.tasks.outcome(slot).is_some() || core.epoch != epoch {
                                return;
                            }
                            core.tasks.expected_status()
                        };
                        wire.send_now(header(expected_status), data).map(|()| true).map_err(|unsent| unsent.cause)
                    }
                    other => other,
                };
                match sent {
                    Ok(true) => return self.tell_driver(&wire),
                    Ok(false) => {}
                    Err(broken) => {
                        drop(wire);
                        return self.fail(epoch, &broken);
                    }
                }
            }
            if self.core.lock().tasks.outcome(slot).is_some() {
                return;
            }
            if Instant::now() >= deadline {
                let epoch = self.core.lock().epoch;
                return self.fail(epoch, &Broken::Stalled);
            }
            self.until_clear(slot).await;
        }
    }

    /// Sends one sequence of data.
    async fn give_range(&self, request: &Request<'_>, lun: &[u8; 8], transfer_tag: u32, range: std::ops::Range<usize>) {
        let out = request.out.unwrap_or_default();
        let segment = self.wire_agreed().segment as usize;
        // Given up only when the command's own abort would have been answered too.
        let deadline = request.deadline + self.options.abort_time;
        let (mut at, mut number) = (range.start, 0);
        while at < range.end {
            let length = (range.end - at).min(segment);
            let is_final = at + length == range.end;
            let data = DataOut { is_final, tag: request.tag, transfer_tag, number, offset: at as u32 };
            self.send_when_clear(request.slot, deadline, |status| data.encode(*lun, status), &out[at..at + length])
                .await;
            (at, number) = (at + length, number + 1);
        }
    }

    async fn abort_unattended(&self, request: &Request<'_>, deadline: Instant) {
        let header = |expected_status| {
            let mut core = self.core.lock();
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
            task.encode(expected_status)
        };
        self.send_when_clear(request.slot, deadline, header, &[]).await;
    }

    /// Waits for something to do for a command that was sent.
    async fn turn(&self, slot: usize, mut timer: Pin<&mut Sleep>) -> Turn {
        poll_fn(|context| {
            let mut core = self.core.lock();
            core.parked &= !(1 << slot);
            if core.tasks.is_over(slot) {
                return Poll::Ready(Turn::Done);
            }
            if let Some(wish) = core.tasks.wish(slot) {
                return Poll::Ready(Turn::Give(wish));
            }
            if timer.as_mut().poll(context).is_ready() {
                return Poll::Ready(Turn::Late);
            }
            core.park(slot, context.waker());
            Poll::Pending
        })
        .await
    }

    /// Waits until what was kept has gone out, or for a moment.
    async fn until_clear(&self, slot: usize) {
        self.roused(slot, GLANCE, |core| core.held_up |= 1 << slot).await;
        self.core.lock().held_up &= !(1 << slot);
    }

    /// Waits until there may be a connection and a turn.
    async fn until_turn(&self, slot: usize) {
        self.roused(slot, LOOK, |core| core.queued |= 1 << slot).await;
        self.core.lock().queued &= !(1 << slot);
    }

    /// Waits until somebody rouses this slot, at most so long.
    async fn roused(&self, slot: usize, longest: Duration, mark: impl Fn(&mut super::session::Core)) {
        let mut timer = pin!(sleep(longest));
        let mut is_parked = false;
        poll_fn(|context| {
            let mut core = self.core.lock();
            let was_roused = is_parked && core.parked & 1 << slot == 0;
            if was_roused || timer.as_mut().poll(context).is_ready() {
                core.parked &= !(1 << slot);
                return Poll::Ready(());
            }
            mark(&mut core);
            core.park(slot, context.waker());
            is_parked = true;
            Poll::Pending
        })
        .await;
    }

    /// Receives for all commands of futures, and sends what was kept, as long as somebody polls it.
    pub async fn drive(&self) {
        loop {
            let (stream, epoch) = poll_fn(|context| {
                let mut core = self.core.lock();
                core.driver = Some(context.waker().clone());
                match &core.link {
                    Link::Up(stream) => Poll::Ready((stream.clone(), core.epoch)),
                    Link::Down { .. } => Poll::Pending,
                }
            })
            .await;
            match watch(stream) {
                Ok(ready) => poll_fn(|context| self.poll_drive(context, &ready, epoch)).await,
                Err(error) => {
                    self.fail(epoch, &Broken::System(error));
                }
            }
        }
    }

    /// Ready when this connection is over.
    fn poll_drive(&self, context: &mut Context<'_>, ready: &Watched, epoch: u64) -> Poll<()> {
        let is_backed_up = {
            let mut core = self.core.lock();
            if core.epoch != epoch || !matches!(core.link, Link::Up(_)) {
                return Poll::Ready(());
            }
            if !core.driver.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                core.driver = Some(context.waker().clone());
            }
            core.is_backed_up
        };
        if is_backed_up && let Err(broken) = self.poll_clear(context, ready) {
            self.fail(epoch, &broken);
            return Poll::Ready(());
        }
        while let Poll::Ready(readiness) = ready.poll_read_ready(context) {
            let mut readiness = match readiness {
                Ok(readiness) => readiness,
                Err(error) => {
                    self.fail(epoch, &Broken::System(error));
                    return Poll::Ready(());
                }
            };
            // A thread that has the receiving half receives for all, and wakes this one when it puts it back.
            let Some(inbox) = self.core.lock().inbox.take() else { return Poll::Pending };
            self.receive_now(inbox);
            self.pass_on_to_threads();
            readiness.clear_ready();
        }
        let core = self.core.lock();
        if core.epoch == epoch && matches!(core.link, Link::Up(_)) { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Sends what was kept as far as it goes; whoever waits for that looks again when all of it has gone.
    fn poll_clear(&self, context: &mut Context<'_>, ready: &Watched) -> Result<(), Broken> {
        while let Poll::Ready(readiness) = ready.poll_write_ready(context) {
            let mut readiness = readiness?;
            // A thread that sends sends that first; those who wait look again in a moment.
            let Some(mut wire) = self.wire.try_lock() else { return Ok(()) };
            if wire.clear_now()? {
                let mut core = self.core.lock();
                core.is_backed_up = false;
                let held_up = core.held_up;
                core.rouse_all(held_up);
                return Ok(());
            }
            readiness.clear_ready();
        }
        Ok(())
    }

    fn pass_on_to_threads(&self) {
        let next = {
            let core = self.core.lock();
            if core.parked & !core.unattended == 0 { None } else { core.pass_on() }
        };
        if let Some(caller) = next {
            caller.wake();
        }
    }
}
