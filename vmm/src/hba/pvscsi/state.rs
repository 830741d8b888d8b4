//! Owns: what the queue's thread knows: rings, requests that wait, requests that run, answers that wait for room.
//! Promises: bounded memory whatever the guest does; nothing here waits.
//! Must not know: executors, disks, registers.

use std::collections::VecDeque;
use std::task::Waker;

use tracing::warn;

use super::entries::{CompletionEntry, Descriptor, HostStatus, Message};
use super::registers::MAX_RING_PAGES;
use super::rings::{RingError, Rings};

/// The most requests taken from the ring ahead of time, to find one that is to be aborted: as many as a ring holds.
const BACKLOG_LIMIT: usize = MAX_RING_PAGES * 32;
/// With so many answers that found no room in the completion ring, no more requests are begun.
const ANSWER_LIMIT: usize = BACKLOG_LIMIT;

/// How a running request must end instead of with its own result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With this host status.
    Answer(HostStatus),
    /// Without any answer: the adapter is being reset.
    Forget,
}

/// A request that a worker has begun.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) context: u64,
    pub(super) target: u8,
    ending: Option<Ending>,
}

/// A worker's place.
#[derive(Debug, Default)]
struct Slot {
    running: Option<Running>,
    /// Set while the worker waits for a request.
    waker: Option<Waker>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    rings: Option<Rings>,
    backlog: VecDeque<Descriptor>,
    answers: VecDeque<CompletionEntry>,
    slots: Vec<Slot>,
    /// Workers that wait for a request, the last one that went idle last: its stack is still in the cache.
    idle: Vec<usize>,
    running: usize,
    /// While a reset or an abort is under way, no request is begun.
    held: bool,
    /// Who waits for running requests to end.
    drain_waker: Option<Waker>,
    /// Who posts answers.
    post_waker: Option<Waker>,
}

impl State {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            rings: None,
            backlog: VecDeque::with_capacity(BACKLOG_LIMIT),
            answers: VecDeque::with_capacity(ANSWER_LIMIT + BACKLOG_LIMIT),
            slots: (0..workers).map(|_| Slot::default()).collect(),
            idle: Vec::with_capacity(workers),
            running: 0,
            held: false,
            drain_waker: None,
            post_waker: None,
        }
    }

    // --- Requests in ---

    /// Begins the next request in `slot`; without one, `waker` is kept to wake the worker.
    pub(super) fn begin(&mut self, slot: usize, waker: &Waker) -> Option<Descriptor> {
        if let Some(descriptor) = self.next() {
            self.running += 1;
            let (context, target) = (descriptor.context.get(), descriptor.target);
            self.slots[slot].running = Some(Running { context, target, ending: None });
            return Some(descriptor);
        }
        if self.slots[slot].waker.replace(waker.clone()).is_none() {
            self.idle.push(slot);
        }
        None
    }

    fn next(&mut self) -> Option<Descriptor> {
        if self.held || self.is_full() {
            return None;
        }
        self.backlog.pop_front().or_else(|| self.fetch())
    }

    fn fetch(&mut self) -> Option<Descriptor> {
        let fetched = self.rings.as_mut()?.fetch();
        self.trust(fetched).flatten()
    }

    /// Rings whose indices lie are not used any more until the guest sets up new ones.
    fn trust<T>(&mut self, result: Result<T, RingError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                warn!(%error, "PVSCSI rings are broken; the adapter does nothing until the guest resets it");
                self.rings = None;
                self.backlog.clear();
                None
            }
        }
    }

    /// Wakes as many workers as there are requests to begin.
    pub(super) fn wake_workers(&mut self) {
        if self.held || self.is_full() {
            return;
        }
        let Some(pending) = self.rings.as_mut().map(Rings::pending) else { return };
        let pending = self.trust(pending).map_or(0, |pending| pending as usize);
        for _ in 0..(pending + self.backlog.len()).min(self.idle.len()) {
            let waker = self.idle.pop().and_then(|slot| self.slots[slot].waker.take());
            waker.expect("an idle worker has left its waker").wake();
        }
    }

    /// Takes what the guest has put into the ring so far, so that it can be ended.
    fn fill_backlog(&mut self) {
        let Some(pending) = self.rings.as_mut().map(Rings::pending) else { return };
        let pending = self.trust(pending).map_or(0, |pending| pending as usize);
        for _ in 0..pending.min(BACKLOG_LIMIT.saturating_sub(self.backlog.len())) {
            match self.fetch() {
                Some(descriptor) => self.backlog.push_back(descriptor),
                None => return,
            }
        }
    }

    // --- Answers out ---

    /// A worker's request has ended with `entry`.
    pub(super) fn finish(&mut self, slot: usize, entry: CompletionEntry) {
        let Some(running) = self.slots[slot].running.take() else { return };
        self.running -= 1;
        match running.ending {
            None => self.answer(entry),
            Some(Ending::Answer(status)) => self.answer(CompletionEntry::failed(entry.context, status)),
            Some(Ending::Forget) => {}
        }
        if let Some(waker) = self.drain_waker.take() {
            waker.wake();
        }
    }

    fn answer(&mut self, entry: CompletionEntry) {
        self.answers.push_back(entry);
        if let Some(waker) = self.post_waker.take() {
            waker.wake();
        }
    }

    /// Moves answers to the guest; true if any was.
    pub(super) fn post(&mut self) -> bool {
        let was_full = self.is_full();
        let Some(posted) = self.rings.as_mut().map(|rings| rings.post(&mut self.answers)) else {
            self.answers.clear();
            return false;
        };
        let any = self.trust(posted).is_some_and(|count| count > 0);
        if was_full && !self.is_full() {
            self.wake_workers();
        }
        any
    }

    /// Do so many answers wait that no request may begin?
    fn is_full(&self) -> bool {
        self.answers.len() >= ANSWER_LIMIT
    }

    /// Are there answers to post? If not, `waker` is kept to wake the poster.
    pub(super) fn has_answers(&mut self, waker: &Waker) -> bool {
        if self.answers.is_empty() {
            self.post_waker = Some(waker.clone());
        }
        !self.answers.is_empty()
    }

    /// Are there answers that found no room?
    pub(super) fn is_congested(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Puts a message into the message ring, if there is one; true if it was put there.
    pub(super) fn post_message(&mut self, message: &Message) -> bool {
        let Some(posted) = self.rings.as_mut().map(|rings| rings.post_message(message)) else { return false };
        self.trust(posted).unwrap_or(false)
    }

    // --- Resets and aborts ---

    /// Stops beginning requests.
    pub(super) fn hold(&mut self) {
        self.held = true;
    }

    /// Goes on.
    pub(super) fn release(&mut self) {
        self.held = false;
        self.wake_workers();
    }

    /// Ends every request that `chosen` picks by context and target: those that wait, at once; those that run, when the
    /// storage has let go of them.
    pub(super) fn end(&mut self, ending: Ending, chosen: impl Fn(u64, u8) -> bool) {
        self.fill_backlog();
        for _ in 0..self.backlog.len() {
            let Some(descriptor) = self.backlog.pop_front() else { break };
            if !chosen(descriptor.context.get(), descriptor.target) {
                self.backlog.push_back(descriptor);
            } else if let Ending::Answer(status) = ending {
                self.answer(CompletionEntry::failed(descriptor.context, status));
            }
        }
        for running in self.slots.iter_mut().filter_map(|slot| slot.running.as_mut()) {
            if chosen(running.context, running.target) {
                running.ending = Some(ending);
            }
        }
    }

    /// Does no request run that `chosen` picks? If one does, `waker` is woken at the next end of any.
    pub(super) fn is_drained(&mut self, waker: &Waker, chosen: impl Fn(u64, u8) -> bool) -> bool {
        let runs = self.slots.iter().filter_map(|slot| slot.running.as_ref());
        let drained = self.running == 0 || !runs.into_iter().any(|running| chosen(running.context, running.target));
        if !drained {
            self.drain_waker = Some(waker.clone());
        }
        drained
    }

    /// Uses new rings, or none. Nothing runs any more; what waits is forgotten.
    pub(super) fn set_rings(&mut self, rings: Option<Rings>) {
        self.backlog.clear();
        self.answers.clear();
        self.rings = rings;
    }

    /// The rings in use.
    pub(super) fn rings(&mut self) -> Option<&mut Rings> {
        self.rings.as_mut()
    }
}
