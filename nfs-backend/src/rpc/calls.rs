//! Owns: the calls of one client: which wait, which were sent, which have ended, and what the end of a connection makes of each.
//! Promises: a reply reaches the call that it is for or nobody; a call that may not be repeated is sent once; no allocation in the
//! steady state.
//! Must not know: sockets, time, what calls mean.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

/// Most calls at once, those of a recovery included: their numbers fit into [`SLOT_BITS`].
pub(super) const MOST_SLOTS: usize = 1 << SLOT_BITS;
/// Bits of a transaction id that tell the slot; the others count.
const SLOT_BITS: u32 = 7;

/// How a call is to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Sending {
    /// It is sent again when its connection broke: it does the same again, or the caller can tell.
    pub repeat: bool,
    /// It is sent only while the gate is open.
    pub gated: bool,
    /// It belongs to what restores the state after a new connection, before other calls go out.
    pub recovery: bool,
    /// The latest moment to wait for an answer. `None`: as long as the client lives.
    pub deadline: Option<tokio::time::Instant>,
}

/// How far a call is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    #[default]
    Free,
    /// Its arguments are being written.
    Filling,
    /// It waits to be sent.
    Queued,
    /// It was sent as a whole; when is counted in ticks.
    Sent(u64),
    /// Its answer is there.
    Answered,
    /// It was sent, its connection has ended, and it may not be repeated.
    Lost(Arc<str>),
}

#[derive(Debug, Default)]
struct Slot {
    phase: Phase,
    count: u32,
    record: Vec<u8>,
    reply: Vec<u8>,
    waker: Option<Waker>,
    repeat: bool,
    gated: bool,
    recovery: bool,
    /// It was sent on a connection that has ended.
    resent: bool,
    /// In which order calls came.
    order: u64,
}

/// A call that is being written to the socket.
#[derive(Clone, Copy, Debug)]
struct Partial {
    slot: usize,
    written: usize,
}

/// All calls of a client.
#[derive(Debug)]
pub(super) struct Calls {
    slots: Vec<Slot>,
    free: Vec<usize>,
    free_for_recovery: Vec<usize>,
    ordinary: usize,
    queue: VecDeque<usize>,
    partial: Option<Partial>,
    next_order: u64,
}

/// What the socket has to carry next.
pub(super) struct Next<'a> {
    /// Bytes that have not been written yet.
    pub bytes: &'a [u8],
    /// Some of it has been written already.
    pub is_begun: bool,
    /// It may be sent only while the gate is open.
    pub gated: bool,
}

impl Calls {
    /// Room for `ordinary` calls and `recovery` more, with transaction ids that begin at chance.
    pub fn new(ordinary: usize, recovery: usize, random: u32) -> Self {
        assert!(ordinary + recovery <= MOST_SLOTS, "more calls than transaction ids tell apart");
        let slots = (0..ordinary + recovery).map(|_| Slot { count: random, ..Slot::default() }).collect();
        Self {
            slots,
            free: (0..ordinary).rev().collect(),
            free_for_recovery: (ordinary..ordinary + recovery).rev().collect(),
            ordinary,
            queue: VecDeque::with_capacity(ordinary + recovery),
            partial: None,
            next_order: 0,
        }
    }

    /// Takes a slot, if there is one: its number, its transaction id and its memory for the call and the reply.
    pub fn open(&mut self, recovery: bool) -> Option<(usize, u32, Vec<u8>, Vec<u8>)> {
        let free = if recovery { &mut self.free_for_recovery } else { &mut self.free };
        let number = free.pop()?;
        let slot = &mut self.slots[number];
        slot.count = slot.count.wrapping_add(1);
        (slot.phase, slot.resent, slot.waker) = (Phase::Filling, false, None);
        let xid = slot.count << SLOT_BITS | number as u32;
        Some((number, xid, std::mem::take(&mut slot.record), std::mem::take(&mut slot.reply)))
    }

    /// Gives a slot back with its memory.
    pub fn close(&mut self, number: usize, record: Vec<u8>, reply: Vec<u8>) {
        let slot = &mut self.slots[number];
        (slot.record, slot.reply, slot.phase) = (record, reply, Phase::Free);
        if number < self.ordinary { self.free.push(number) } else { self.free_for_recovery.push(number) }
    }

    /// A call is ready to be sent.
    pub fn submit(&mut self, number: usize, record: Vec<u8>, reply: Vec<u8>, how: &Sending) {
        let slot = &mut self.slots[number];
        (slot.record, slot.reply, slot.phase) = (record, reply, Phase::Queued);
        (slot.repeat, slot.gated, slot.recovery) = (how.repeat, how.gated, how.recovery);
        slot.order = self.next_order;
        self.next_order += 1;
        self.queue.push_back(number);
    }

    /// Takes a call's memory back, whatever became of it. True: a part of it is on the connection, which is of no use any more.
    pub fn withdraw(&mut self, number: usize) -> (Vec<u8>, Vec<u8>, bool) {
        self.queue.retain(|queued| *queued != number);
        let is_partial = self.partial.is_some_and(|partial| partial.slot == number);
        if is_partial {
            self.partial = None;
        }
        let slot = &mut self.slots[number];
        slot.phase = Phase::Filling;
        (std::mem::take(&mut slot.record), std::mem::take(&mut slot.reply), is_partial)
    }

    /// How far a call is; `waker` is woken when that changes.
    pub fn look(&mut self, number: usize, waker: &Waker) -> Phase {
        let slot = &mut self.slots[number];
        if matches!(slot.phase, Phase::Queued | Phase::Sent(_)) {
            match &mut slot.waker {
                Some(known) => known.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
        slot.phase.clone()
    }

    /// Whether all of it was sent at some time.
    pub fn was_sent(&self, number: usize) -> bool {
        self.slots[number].resent || matches!(self.slots[number].phase, Phase::Sent(_) | Phase::Answered)
    }

    /// Whether it was sent more than once.
    pub fn was_resent(&self, number: usize) -> bool {
        self.slots[number].resent
    }

    /// What to write next: the rest of what was begun, else the first call that may go out.
    pub fn next(&mut self, recovering: bool, gate: impl FnOnce() -> bool) -> Option<Next<'_>> {
        if self.partial.is_none() {
            let mut gate = Some(gate);
            let mut is_open = None;
            let slots = &self.slots;
            let at = self.queue.iter().position(|number| {
                let slot = &slots[*number];
                (!recovering || slot.recovery)
                    && (!slot.gated || *is_open.get_or_insert_with(|| gate.take().is_some_and(|gate| gate())))
            })?;
            let slot = self.queue.remove(at)?;
            self.partial = Some(Partial { slot, written: 0 });
        }
        let Partial { slot, written } = self.partial?;
        let slot = &self.slots[slot];
        Some(Next { bytes: &slot.record[written..], is_begun: written > 0, gated: slot.gated })
    }

    /// So many bytes of what [`Calls::next`] gave were written at `tick`.
    pub fn wrote(&mut self, bytes: usize, tick: u64) {
        let Some(partial) = &mut self.partial else { return };
        partial.written += bytes;
        let slot = &mut self.slots[partial.slot];
        if partial.written == slot.record.len() {
            slot.phase = Phase::Sent(tick);
            self.partial = None;
        }
    }

    /// Nothing of what [`Calls::next`] gave goes out now: it is the first again.
    pub fn hold(&mut self) {
        if let Some(Partial { slot, written: 0 }) = self.partial {
            self.partial = None;
            self.queue.push_front(slot);
        }
    }

    /// The call of a reply, if it waits for one.
    pub fn find(&self, xid: u32) -> Option<usize> {
        let number = (xid & (MOST_SLOTS as u32 - 1)) as usize;
        let slot = self.slots.get(number)?;
        (matches!(slot.phase, Phase::Sent(_)) && slot.count << SLOT_BITS | number as u32 == xid).then_some(number)
    }

    /// Its reply came; `memory` is exchanged for the slot's.
    pub fn answer(&mut self, number: usize, exchange: impl FnOnce(&mut Vec<u8>)) {
        let slot = &mut self.slots[number];
        exchange(&mut slot.reply);
        slot.phase = Phase::Answered;
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
    }

    /// Whether a call was sent before `tick` and has no answer.
    pub fn waits_since_before(&self, tick: u64) -> bool {
        self.slots.iter().any(|slot| matches!(slot.phase, Phase::Sent(sent) if sent < tick))
    }

    /// Whether a gated call was begun or sent, and has no answer.
    pub fn waits_for_gated(&self) -> bool {
        self.partial.is_some_and(|partial| self.slots[partial.slot].gated)
            || self.slots.iter().any(|slot| slot.gated && matches!(slot.phase, Phase::Sent(_)))
    }

    /// The connection has ended: what was sent is sent again, or lost. What was not sent as a whole was not done.
    pub fn disconnect(&mut self, cause: &Arc<str>) {
        if let Some(Partial { slot, .. }) = self.partial.take() {
            self.queue.push_back(slot);
        }
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if !matches!(slot.phase, Phase::Sent(_)) {
                continue;
            }
            if slot.repeat {
                (slot.phase, slot.resent) = (Phase::Queued, true);
                self.queue.push_back(number);
            } else {
                slot.phase = Phase::Lost(cause.clone());
                if let Some(waker) = slot.waker.take() {
                    waker.wake();
                }
            }
        }
        let slots = &self.slots;
        self.queue.make_contiguous().sort_unstable_by_key(|number| slots[*number].order);
    }

    /// Wakes every call: the client was closed.
    pub fn wake_all(&mut self) {
        self.slots.iter_mut().filter_map(|slot| slot.waker.take()).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: Sending = Sending { repeat: true, gated: false, recovery: false, deadline: None };

    fn submit(calls: &mut Calls, how: Sending) -> (usize, u32) {
        let (slot, xid, mut record, reply) = calls.open(how.recovery).expect("a slot is free");
        record.clear();
        record.extend([slot as u8; 8]);
        calls.submit(slot, record, reply, &how);
        (slot, xid)
    }

    fn send(calls: &mut Calls) -> Option<u8> {
        let first = calls.next(false, || true)?.bytes[0];
        calls.wrote(8, 0);
        Some(first)
    }

    #[test]
    fn a_reply_counts_once_and_only_for_the_call_that_was_sent() {
        let mut calls = Calls::new(2, 0, u32::MAX);
        let (slot, xid) = submit(&mut calls, HOW);
        assert_eq!(calls.find(xid), None, "it was not sent yet");
        assert_eq!(send(&mut calls), Some(slot as u8));
        assert_eq!(calls.find(xid ^ 1 << 7), None, "a reply to another call of that slot");
        assert_eq!(calls.find(xid), Some(slot));
        calls.answer(slot, |_| {});
        assert_eq!(calls.find(xid), None, "the same reply a second time");
        calls.close(slot, Vec::new(), Vec::new());
        let (again, other) = submit(&mut calls, HOW);
        assert_eq!(again, slot);
        assert_ne!(other, xid);
    }

    #[test]
    fn the_end_of_a_connection_sends_again_what_may_be_repeated_in_its_order_and_loses_the_rest() {
        let mut calls = Calls::new(4, 0, 0);
        let (first, _) = submit(&mut calls, HOW);
        let (once, _) = submit(&mut calls, Sending { repeat: false, ..HOW });
        let (half, _) = submit(&mut calls, Sending { repeat: false, ..HOW });
        let (waiting, _) = submit(&mut calls, HOW);
        assert_eq!((send(&mut calls), send(&mut calls)), (Some(first as u8), Some(once as u8)));
        assert!(calls.next(false, || true).is_some());
        calls.wrote(3, 0);
        calls.disconnect(&"gone".into());
        assert_eq!(calls.look(once, Waker::noop()), Phase::Lost("gone".into()));
        assert!(calls.was_resent(first) && !calls.was_sent(half), "what was sent in part was not done");
        let order: Vec<_> = std::iter::from_fn(|| send(&mut calls)).collect();
        assert_eq!(order, [first, half, waiting].map(|slot| slot as u8));
    }

    #[test]
    fn a_closed_gate_holds_only_what_is_gated_and_a_recovery_everything_else() {
        let mut calls = Calls::new(4, 1, 0);
        let (gated, _) = submit(&mut calls, Sending { gated: true, ..HOW });
        let (free, _) = submit(&mut calls, HOW);
        let (recovery, _) = submit(&mut calls, Sending { recovery: true, ..HOW });
        assert_eq!(calls.next(true, || true).map(|next| next.bytes[0]), Some(recovery as u8));
        calls.wrote(8, 0);
        assert!(calls.next(true, || true).is_none());
        assert_eq!(calls.next(false, || false).map(|next| next.bytes[0]), Some(free as u8));
        calls.wrote(8, 0);
        assert!(calls.next(false, || false).is_none());
        assert_eq!(calls.next(false, || true).map(|next| next.bytes[0]), Some(gated as u8));
        calls.hold();
        assert!(calls.next(false, || true).is_some_and(|next| next.gated && !next.is_begun));
    }
}
