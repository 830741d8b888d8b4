//! Owns: what the queue's thread knows: rings, requests that wait, requests that run, answers that wait for room.
//! Promises: bounded memory whatever the guest does; nothing here waits.
//! Must not know: executors, disks, registers.

use std::collections::VecDeque;
use std::task::Waker;

use tracing::warn;

use super::Rings;

/// The most requests taken from the rings ahead of time, to find one that is to be aborted: as many as the largest ring of
/// an adapter holds.
const BACKLOG_LIMIT: usize = 1024;
/// With so many answers that found no room with the guest, no more requests are begun.
const ANSWER_LIMIT: usize = BACKLOG_LIMIT;

/// How a running request must end instead of with its own result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending<F> {
    /// With this failure.
    Answer(F),
    /// Without any answer: the adapter is being reset.
    Forget,
}

/// A request that a worker has begun.
struct Running<R: Rings> {
    key: R::Key,
    ending: Option<Ending<R::Failure>>,
}

/// A worker's place.
struct Slot<R: Rings> {
    running: Option<Running<R>>,
    /// Set while the worker waits for a request.
    waker: Option<Waker>,
}

/// See the module.
pub(crate) struct State<R: Rings> {
    name: &'static str,
    rings: Option<R>,
    backlog: VecDeque<R::Descriptor>,
    answers: VecDeque<R::Answer>,
    slots: Vec<Slot<R>>,
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

impl<R: Rings> State<R> {
    pub(super) fn new(name: &'static str, rings: Option<R>, workers: usize) -> Self {
        Self {
            name,
            rings,
            backlog: VecDeque::with_capacity(BACKLOG_LIMIT),
            answers: VecDeque::with_capacity(ANSWER_LIMIT + BACKLOG_LIMIT),
            slots: (0..workers).map(|_| Slot { running: None, waker: None }).collect(),
            idle: Vec::with_capacity(workers),
            running: 0,
            held: false,
            drain_waker: None,
            post_waker: None,
        }
    }

    // --- Requests in ---

    /// Begins the next request in `slot`; without one, `waker` is kept to wake the worker.
    pub(super) fn begin(&mut self, slot: usize, waker: &Waker) -> Option<R::Descriptor> {
        if let Some(descriptor) = self.next() {
            self.running += 1;
            self.slots[slot].running = Some(Running { key: R::key(&descriptor), ending: None });
            return Some(descriptor);
        }
        if self.slots[slot].waker.replace(waker.clone()).is_none() {
            self.idle.push(slot);
        }
        None
    }

    fn next(&mut self) -> Option<R::Descriptor> {
        if self.held || self.is_full() {
            return None;
        }
        self.backlog.pop_front().or_else(|| self.fetch())
    }

    fn fetch(&mut self) -> Option<R::Descriptor> {
        let fetched = self.rings.as_mut()?.fetch();
        self.trust(fetched).flatten()
    }

    /// Rings whose indices lie are not used any more until the guest sets up new ones.
    fn trust<T>(&mut self, result: Result<T, R::Error>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                warn!(%error, "the {} rings are broken; the adapter does nothing until the guest resets it", self.name);
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
        let Some(pending) = self.rings.as_mut().map(R::pending) else { return };
        let pending = self.trust(pending).map_or(0, |pending| pending as usize);
        for _ in 0..(pending + self.backlog.len()).min(self.idle.len()) {
            let waker = self.idle.pop().and_then(|slot| self.slots[slot].waker.take());
            waker.expect("an idle worker has left its waker").wake();
        }
    }

    /// Takes what the guest has put into the ring so far, so that it can be ended.
    fn fill_backlog(&mut self) {
        let Some(pending) = self.rings.as_mut().map(R::pending) else { return };
        let pending = self.trust(pending).map_or(0, |pending| pending as usize);
        for _ in 0..pending.min(BACKLOG_LIMIT.saturating_sub(self.backlog.len())) {
            match self.fetch() {
                Some(descriptor) => self.backlog.push_back(descriptor),
                None => return,
            }
        }
    }

    // --- Answers out ---

    /// A worker's request has ended with `answer`; without one somebody else will answer it.
    pub(super) fn finish(&mut self, slot: usize, answer: Option<R::Answer>) {
        let Some(running) = self.slots[slot].running.take() else { return };
        self.running -= 1;
        match running.ending {
            None => answer.into_iter().for_each(|answer| self.answer(answer)),
            Some(Ending::Answer(failure)) => self.answer(R::failed(running.key, failure)),
            Some(Ending::Forget) => {}
        }
        if let Some(waker) = self.drain_waker.take() {
            waker.wake();
        }
    }

    /// Queues an answer, or anything else that the guest gets in its turn.
    pub(crate) fn answer(&mut self, answer: R::Answer) {
        self.answers.push_back(answer);
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

    /// Does something with the rings, if there are any that can be trusted.
    pub(crate) fn with_rings<T>(&mut self, work: impl FnOnce(&mut R) -> Result<T, R::Error>) -> Option<T> {
        let result = work(self.rings.as_mut()?);
        self.trust(result)
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

    /// Ends every request that `chosen` picks: those that wait, at once; those that run, when the storage has let go of
    /// them. Returns how many.
    pub(super) fn end(&mut self, ending: Ending<R::Failure>, chosen: impl Fn(&R::Key) -> bool) -> u32 {
        self.fill_backlog();
        let mut ended = 0;
        for _ in 0..self.backlog.len() {
            let Some(descriptor) = self.backlog.pop_front() else { break };
            let key = R::key(&descriptor);
            if !chosen(&key) {
                self.backlog.push_back(descriptor);
                continue;
            }
            ended += 1;
            if let Ending::Answer(failure) = ending {
                self.answer(R::failed(key, failure));
            }
        }
        for running in self.slots.iter_mut().filter_map(|slot| slot.running.as_mut()) {
            if chosen(&running.key) {
                ended += 1;
                running.ending = Some(ending);
            }
        }
        ended
    }

    /// Is there a request, waiting or running, that `chosen` picks?
    pub(crate) fn has(&mut self, chosen: impl Fn(&R::Key) -> bool) -> bool {
        self.fill_backlog();
        let runs = self.slots.iter().filter_map(|slot| slot.running.as_ref());
        self.backlog.iter().any(|waits| chosen(&R::key(waits))) || runs.into_iter().any(|runs| chosen(&runs.key))
    }

    /// Does no request run that `chosen` picks? If one does, `waker` is woken at the next end of any.
    pub(super) fn is_drained(&mut self, waker: &Waker, chosen: impl Fn(&R::Key) -> bool) -> bool {
        let runs = self.slots.iter().filter_map(|slot| slot.running.as_ref());
        let drained = self.running == 0 || !runs.into_iter().any(|running| chosen(&running.key));
        if !drained {
            self.drain_waker = Some(waker.clone());
        }
        drained
    }

    /// Uses new rings, or none. Nothing runs any more; what waits is forgotten.
    pub(crate) fn set_rings(&mut self, rings: Option<R>) {
        self.backlog.clear();
        self.answers.clear();
        self.rings = rings;
    }
}
