//! Owns: the slots of a session (RFC 8881, 2.10.6): which are free, and the sequence number of each.
//! Promises: a slot whose last request has no answer is never used for another one; some slots are kept for what restores the state after
//! a new connection.
//! Must not know: connections, what requests mean.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Semaphore;

use super::states::StateId;

/// What a session is known by.
pub type SessionId = [u8; 16];

/// Most slots that are asked for.
pub const MOST_SLOTS: u32 = 64;
/// Fewest: one for ordinary requests, one for a recovery.
pub const FEWEST_SLOTS: u32 = 2;

/// What a session's fore channel allows (channel_attrs4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Longest request in bytes.
    pub most_request: u32,
    /// Longest reply in bytes.
    pub most_response: u32,
    /// Requests at once, from [`FEWEST_SLOTS`] to [`MOST_SLOTS`].
    pub slots: u32,
}

#[derive(Debug)]
struct Table {
    /// Number of the last request that each slot has an answer to.
    answered: Vec<u32>,
    free: Vec<u32>,
    free_for_recovery: Vec<u32>,
    /// Ordinary slots that cannot be used any more, and such for a recovery.
    spoilt: [u32; 2],
}

/// A session, as requests of one thread use it.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    /// Counts the sessions of one owner.
    epoch: u64,
    /// The open file that data belong to.
    state: StateId,
    channel: Channel,
    table: RefCell<Table>,
    ordinary: Semaphore,
    for_recovery: Semaphore,
    is_ended: Cell<bool>,
}

/// Slots of so many that only a recovery takes.
fn kept(slots: u32) -> u32 {
    (slots / 4).max(1)
}

impl Session {
    /// A session that was made just now, or that nobody else has sent requests in.
    pub fn new(id: SessionId, epoch: u64, channel: Channel, state: StateId) -> Rc<Session> {
        let kept = kept(channel.slots);
        let ordinary = channel.slots - kept;
        let table = Table {
            answered: vec![0; channel.slots as usize],
            free: (0..ordinary).rev().collect(),
            free_for_recovery: (ordinary..channel.slots).rev().collect(),
            spoilt: [0, 0],
        };
        Rc::new(Session {
            id,
            epoch,
            state,
            channel,
            table: RefCell::new(table),
            ordinary: Semaphore::new(ordinary as usize),
            for_recovery: Semaphore::new(kept as usize),
            is_ended: Cell::new(false),
        })
    }

    /// Its name.
    pub fn id(&self) -> &SessionId {
        &self.id
    }

    /// Its number.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What reads and writes are sent under.
    pub fn state(&self) -> &StateId {
        &self.state
    }

    /// Its limits.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// No request is begun in it any more.
    pub fn end(&self) {
        self.is_ended.set(true);
        self.ordinary.close();
        self.for_recovery.close();
    }

    /// Whether it has ended.
    pub fn is_ended(&self) -> bool {
        self.is_ended.get()
    }

    /// Takes a slot, waiting for one. `None`: the session has ended.
    pub(super) async fn take(&self, recovery: bool) -> Option<Slot<'_>> {
        let slots = if recovery { &self.for_recovery } else { &self.ordinary };
        slots.acquire().await.ok()?.forget();
        let mut table = self.table.borrow_mut();
        let free = if recovery { &mut table.free_for_recovery } else { &mut table.free };
        let number = free.pop().expect("a permit stands for a free slot");
        let sequence = table.answered[number as usize].wrapping_add(1);
        Some(Slot { session: self, number, sequence, recovery, fate: Fate::Unused })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// No request was sent, or the server has not counted it.
    Unused,
    /// A request was sent, and what became of it is not known.
    Open,
    /// The server has answered the request.
    Answered,
}

/// A slot, for one request.
#[derive(Debug)]
pub(super) struct Slot<'a> {
    session: &'a Session,
    pub number: u32,
    pub sequence: u32,
    recovery: bool,
    fate: Fate,
}

impl Slot<'_> {
    /// A request is on its way, until [`Slot::answered`] or [`Slot::unused`].
    pub fn sent(&mut self) {
        self.fate = Fate::Open;
    }

    /// The server has counted the request.
    pub fn answered(&mut self) {
        self.fate = Fate::Answered;
    }

    /// The server has not counted the request, and never will.
    pub fn unused(&mut self) {
        self.fate = Fate::Unused;
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let session = self.session;
        let mut table = session.table.borrow_mut();
        match self.fate {
            Fate::Open => {
                table.spoilt[usize::from(self.recovery)] += 1;
                let kept = kept(session.channel.slots);
                let is_of_use = table.spoilt[0] * 2 < session.channel.slots - kept && table.spoilt[1] < kept;
                drop(table);
                if !is_of_use {
                    session.end();
                }
                return;
            }
            Fate::Answered => table.answered[self.number as usize] = self.sequence,
            Fate::Unused => {}
        }
        let (free, slots) = match self.recovery {
            true => (&mut table.free_for_recovery, &session.for_recovery),
            false => (&mut table.free, &session.ordinary),
        };
        free.push(self.number);
        slots.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn session(slots: u32) -> Rc<Session> {
        let channel = Channel { most_request: 1 << 20, most_response: 1 << 20, slots };
        Session::new([1; 16], 1, channel, StateId::ANONYMOUS)
    }

    fn take(session: &Session, recovery: bool) -> Option<Slot<'_>> {
        session.take(recovery).now_or_never().flatten()
    }

    #[test]
    fn a_slot_counts_only_what_the_server_has_counted() {
        let session = session(2);
        let mut slot = take(&session, false).expect("free");
        assert_eq!((slot.number, slot.sequence), (0, 1));
        slot.sent();
        slot.unused();
        drop(slot);
        let mut slot = take(&session, false).expect("free");
        assert_eq!(slot.sequence, 1, "the server never saw the first");
        slot.sent();
        slot.answered();
        assert!(take(&session, false).is_none(), "one request for each slot");
        drop(slot);
        assert_eq!(take(&session, false).expect("free").sequence, 2);
    }

    #[test]
    fn a_slot_without_an_answer_is_never_used_again_and_too_many_of_them_end_the_session() {
        let session = session(8);
        for left in (0..3).rev() {
            let mut slot = take(&session, false).expect("free");
            let number = slot.number;
            slot.sent();
            drop(slot);
            assert!(session.table.borrow().free.iter().all(|free| *free != number));
            assert_eq!(session.is_ended(), left == 0);
        }
        assert!(take(&session, false).is_none() && take(&session, true).is_none());

        // Those for a recovery are few: without any of them it would wait for ever.
        let session = self::session(8);
        for left in (0..2).rev() {
            let mut slot = take(&session, true).expect("free");
            slot.sent();
            drop(slot);
            assert_eq!(session.is_ended(), left == 0);
        }
    }

    #[test]
    fn ordinary_requests_leave_slots_for_a_recovery() {
        let session = session(4);
        let ordinary: Vec<_> = std::iter::from_fn(|| take(&session, false)).collect();
        assert_eq!(ordinary.len(), 3);
        assert_eq!(take(&session, true).map(|slot| slot.number), Some(3));
    }
}
