//! Owns: the calls of one client: which wait, which were sent, which have ended, and what the end of a connection makes of each.
//! Promises: a reply reaches the call that it is for or nobody; a call that may not be repeated is sent once; no allocation in the
//! steady state.
//! Must not know: sockets, time, what calls mean.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::task::Waker;

use scsi::DataBuffer;

use super::record::Located;
use crate::xdr::padding;

/// Most calls at once, those of a recovery included: their numbers fit into [`SLOT_BITS`].
pub(super) const MOST_SLOTS: usize = 1 << SLOT_BITS;
/// Bits of a transaction id that tell the slot; the others count.
const SLOT_BITS: u32 = 7;

/// Most pieces of a call on the wire.
pub(super) const MOST_PIECES: usize = 3;
/// Bytes of a call or an answer from which on it is worth a system call of its own.
const MUCH: usize = 32 << 10;

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

/// Finds data in the first bytes of a reply.
pub type Locate = fn(head: &[u8]) -> Located;

/// Memory that the data of a reply go to, past the reply.
#[derive(Clone, Debug)]
pub(super) struct Landing {
    pub buffer: DataBuffer,
    pub locate: Locate,
}

/// What a call takes along. The vectors' memory goes from call to call.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The call: mark, header, arguments.
    pub record: Vec<u8>,
    /// Data at its end, with padding behind them; empty: none.
    pub payload: Vec<u8>,
    /// The reply, without what landed.
    pub reply: Vec<u8>,
    /// Where the reply's data go.
    pub landing: Option<Landing>,
    /// So many bytes are there.
    pub landed: usize,
}

impl Memory {
    /// Bytes of the call on the wire.
    fn length(&self) -> usize {
        self.record.len() + self.payload.len() + padding(self.payload.len())
    }

    /// Its bytes without the first `skip`, in at most three pieces.
    fn pieces(&self, mut skip: usize) -> impl Iterator<Item = &[u8]> {
        let pieces = [&self.record[..], &self.payload[..], &[0; 3][..padding(self.payload.len())]];
        pieces.into_iter().filter_map(move |piece| {
            let rest = &piece[skip.min(piece.len())..];
            skip -= piece.len() - rest.len();
            (!rest.is_empty()).then_some(rest)
        })
    }
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
    memory: Memory,
    waker: Option<Waker>,
    repeat: bool,
    gated: bool,
    recovery: bool,
    /// It was sent on a connection that has ended.
    resent: bool,
    /// In which order calls came.
    order: u64,
}

impl Slot {
    fn has_much(&self) -> bool {
        self.memory.landing.as_ref().is_some_and(|landing| landing.buffer.len() >= MUCH)
    }
}

/// All calls of a client.
#[derive(Debug)]
pub(super) struct Calls {
    slots: Vec<Slot>,
    free: Vec<usize>,
    free_for_recovery: Vec<usize>,
    ordinary: usize,
    queue: VecDeque<usize>,
    /// Those that go to the socket next, in their order.
    sending: VecDeque<usize>,
    /// So many bytes of the first of them are written.
    written: usize,
    /// Calls that were sent and have no answer.
    in_flight: usize,
    /// Those of them whose answer has many data.
    with_much: usize,
    /// Bytes of the calls that are not sent as a whole.
    waiting_bytes: usize,
    next_order: u64,
}

/// What the socket has to carry next.
pub(super) struct Next {
    /// Pieces of it.
    pub pieces: usize,
    /// A part of the first call has been written already.
    pub is_begun: bool,
    /// Some of it may be sent only while the gate is open.
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
            sending: VecDeque::with_capacity(ordinary + recovery),
            written: 0,
            in_flight: 0,
            with_much: 0,
            waiting_bytes: 0,
            next_order: 0,
        }
    }

    /// Takes a slot, if there is one: its number, its transaction id and its memory.
    pub fn open(&mut self, recovery: bool) -> Option<(usize, u32, Memory)> {
        let free = if recovery { &mut self.free_for_recovery } else { &mut self.free };
        let number = free.pop()?;
        let slot = &mut self.slots[number];
        slot.count = slot.count.wrapping_add(1);
        (slot.phase, slot.resent, slot.waker) = (Phase::Filling, false, None);
        let xid = slot.count << SLOT_BITS | number as u32;
        Some((number, xid, std::mem::take(&mut slot.memory)))
    }

    /// Gives a slot back with its memory.
    pub fn close(&mut self, number: usize, memory: Memory) {
        let slot = &mut self.slots[number];
        (slot.memory, slot.phase) = (Memory { landing: None, ..memory }, Phase::Free);
        if number < self.ordinary { self.free.push(number) } else { self.free_for_recovery.push(number) }
    }

    /// A call is ready to be sent.
    pub fn submit(&mut self, number: usize, memory: Memory, how: &Sending) {
        let slot = &mut self.slots[number];
        self.waiting_bytes += memory.length();
        (slot.memory, slot.phase) = (memory, Phase::Queued);
        (slot.repeat, slot.gated, slot.recovery) = (how.repeat, how.gated, how.recovery);
        slot.order = self.next_order;
        self.next_order += 1;
        self.queue.push_back(number);
    }

    /// Whether to write now: nothing is on the way whose answer would bring more to write with it, or it is much already.
    pub fn is_urgent(&self) -> bool {
        self.in_flight == 0 || self.waiting_bytes >= MUCH
    }

    /// Whether answers with many data are on the way.
    pub fn expects_much(&self) -> bool {
        self.with_much > 0
    }

    /// Takes a call's memory back, whatever became of it. True: a part of it is on the connection, which is of no use any more.
    pub fn withdraw(&mut self, number: usize) -> (Memory, bool) {
        self.queue.retain(|queued| *queued != number);
        let is_partial = self.written > 0 && self.sending.front() == Some(&number);
        if is_partial {
            self.written = 0;
        }
        self.sending.retain(|sending| *sending != number);
        if self.slots[number].phase == Phase::Queued {
            self.waiting_bytes -= self.slots[number].memory.length();
        }
        self.no_longer_waits(number);
        let slot = &mut self.slots[number];
        slot.phase = Phase::Filling;
        (std::mem::take(&mut slot.memory), is_partial)
    }

    /// Counts a call that waits for an answer no more.
    fn no_longer_waits(&mut self, number: usize) {
        let slot = &self.slots[number];
        if matches!(slot.phase, Phase::Sent(_)) {
            self.in_flight -= 1;
            self.with_much -= usize::from(slot.has_much());
        }
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

    /// What to write next: the rest of what was begun, and the calls that may go out, as far as there are slices for them.
    pub fn next<'a>(
        &'a mut self,
        recovering: bool,
        gate: impl FnOnce() -> bool,
        slices: &mut [IoSlice<'a>],
    ) -> Option<Next> {
        let mut gate = Some(gate);
        let mut is_open = None;
        let mut nth = 0;
        while nth < self.queue.len() && self.sending.len() < slices.len() / MOST_PIECES {
            let slot = &self.slots[self.queue[nth]];
            let may_go = (!recovering || slot.recovery)
                && (!slot.gated || *is_open.get_or_insert_with(|| gate.take().is_some_and(|gate| gate())));
            if may_go {
                self.sending.extend(self.queue.remove(nth));
            } else {
                nth += 1;
            }
        }
        self.sending.front()?;
        let mut next = Next { pieces: 0, is_begun: self.written > 0, gated: false };
        let mut skip = self.written;
        for number in &self.sending {
            let slot = &self.slots[*number];
            next.gated |= slot.gated;
            for piece in slot.memory.pieces(std::mem::take(&mut skip)) {
                slices[next.pieces] = IoSlice::new(piece);
                next.pieces += 1;
            }
        }
        Some(next)
    }

    /// So many bytes of what [`Calls::next`] gave were written at `tick`.
    pub fn wrote(&mut self, bytes: usize, tick: u64) {
        self.written += bytes;
        while let Some(number) = self.sending.front() {
            let slot = &mut self.slots[*number];
            let length = slot.memory.length();
            if self.written < length {
                return;
            }
            self.written -= length;
            self.waiting_bytes -= length;
            slot.phase = Phase::Sent(tick);
            self.in_flight += 1;
            self.with_much += usize::from(slot.has_much());
            self.sending.pop_front();
        }
    }

    /// Nothing of what [`Calls::next`] gave goes out now, but for the rest of what was begun: it is the first again.
    pub fn hold(&mut self) {
        let begun = usize::from(self.written > 0);
        while self.sending.len() > begun
            && let Some(number) = self.sending.pop_back()
        {
            self.queue.push_front(number);
        }
    }

    /// The call of a reply, if it waits for one.
    pub fn find(&self, xid: u32) -> Option<usize> {
        let number = (xid & (MOST_SLOTS as u32 - 1)) as usize;
        let slot = self.slots.get(number)?;
        (matches!(slot.phase, Phase::Sent(_)) && slot.count << SLOT_BITS | number as u32 == xid).then_some(number)
    }

    /// Where data of its answer go to.
    pub fn landing(&self, number: usize) -> Option<&Landing> {
        self.slots[number].memory.landing.as_ref()
    }

    /// Its reply came, and so many data have landed; `exchange` exchanges memory for the slot's.
    pub fn answer(&mut self, number: usize, landed: usize, exchange: impl FnOnce(&mut Vec<u8>)) {
        self.no_longer_waits(number);
        let slot = &mut self.slots[number];
        exchange(&mut slot.memory.reply);
        (slot.memory.landed, slot.phase) = (landed, Phase::Answered);
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
        self.sending.front().is_some_and(|number| self.written > 0 && self.slots[*number].gated)
            || self.slots.iter().any(|slot| slot.gated && matches!(slot.phase, Phase::Sent(_)))
    }

    /// The connection has ended: what was sent is sent again, or lost. What was not sent as a whole was not done.
    pub fn disconnect(&mut self, cause: &Arc<str>) {
        self.queue.extend(self.sending.drain(..));
        (self.written, self.in_flight, self.with_much) = (0, 0, 0);
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
        self.waiting_bytes = self.queue.iter().map(|number| slots[*number].memory.length()).sum();
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
        let (slot, xid, mut memory) = calls.open(how.recovery).expect("a slot is free");
        memory.record.clear();
        memory.record.extend([slot as u8; 8]);
        calls.submit(slot, memory, &how);
        (slot, xid)
    }

    /// The bytes that go to the socket next.
    fn bytes(calls: &mut Calls, recovering: bool, is_open: bool) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 4 * MOST_PIECES];
        let next = calls.next(recovering, || is_open, &mut slices);
        slices[..next.map_or(0, |next| next.pieces)].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    /// All of that is written: the calls that it was of.
    fn send(calls: &mut Calls, recovering: bool, is_open: bool) -> Vec<usize> {
        let bytes = bytes(calls, recovering, is_open);
        calls.wrote(bytes.len(), 0);
        bytes.chunks(8).map(|call| call[0].into()).collect()
    }

    #[test]
    fn a_reply_counts_once_and_only_for_the_call_that_was_sent() {
        let mut calls = Calls::new(2, 0, u32::MAX);
        let (slot, xid) = submit(&mut calls, HOW);
        assert_eq!(calls.find(xid), None, "it was not sent yet");
        assert_eq!(send(&mut calls, false, true), [slot]);
        assert_eq!(calls.find(xid ^ 1 << 7), None, "a reply to another call of that slot");
        assert_eq!(calls.find(xid), Some(slot));
        assert!(!calls.is_urgent(), "an answer is on the way");
        calls.answer(slot, 0, |_| {});
        assert_eq!(calls.find(xid), None, "the same reply a second time");
        let (memory, _) = calls.withdraw(slot);
        calls.close(slot, memory);
        assert!(calls.is_urgent());
        let (again, other) = submit(&mut calls, HOW);
        assert_eq!(again, slot);
        assert_ne!(other, xid);
    }

    #[test]
    fn the_end_of_a_connection_sends_again_what_may_be_repeated_in_its_order_and_loses_the_rest() {
        let mut calls = Calls::new(4, 0, 0);
        let (first, _) = submit(&mut calls, HOW);
        let (once, _) = submit(&mut calls, Sending { repeat: false, ..HOW });
        assert_eq!(send(&mut calls, false, true), [first, once]);
        let (half, _) = submit(&mut calls, Sending { repeat: false, ..HOW });
        let (waiting, _) = submit(&mut calls, HOW);
        assert_eq!(bytes(&mut calls, false, true).len(), 16);
        calls.wrote(3, 0);
        calls.disconnect(&"gone".into());
        assert_eq!(calls.look(once, Waker::noop()), Phase::Lost("gone".into()));
        assert!(calls.was_resent(first) && !calls.was_sent(half), "what was sent in part was not done");
        assert_eq!(send(&mut calls, false, true), [first, half, waiting]);
    }

    #[test]
    fn a_closed_gate_holds_only_what_is_gated_and_a_recovery_everything_else() {
        let mut calls = Calls::new(4, 1, 0);
        let (gated, _) = submit(&mut calls, Sending { gated: true, ..HOW });
        let (free, _) = submit(&mut calls, HOW);
        let (recovery, _) = submit(&mut calls, Sending { recovery: true, ..HOW });
        assert_eq!(send(&mut calls, true, true), [recovery]);
        assert_eq!(send(&mut calls, true, true), []);
        assert_eq!(send(&mut calls, false, false), [free]);
        assert_eq!(send(&mut calls, false, false), []);
        assert_eq!(bytes(&mut calls, false, true), [gated as u8; 8]);
        calls.hold();
        assert_eq!(bytes(&mut calls, false, false), [], "it was taken back before a byte of it was written");
        assert_eq!(bytes(&mut calls, false, true).len(), 8);
        calls.wrote(1, 0);
        calls.hold();
        assert!(calls.waits_for_gated());
        assert_eq!(bytes(&mut calls, false, false).len(), 7, "what was begun is not forgotten");
    }

    #[test]
    fn a_call_is_written_in_pieces_wherever_the_socket_is_full_with_its_padding() {
        let call = |calls: &mut Calls, payload: &[u8]| {
            let (slot, _, memory) = calls.open(false).expect("a slot is free");
            let memory = Memory { record: vec![slot as u8; 4], payload: payload.to_vec(), ..memory };
            calls.submit(slot, memory, &HOW);
        };
        for step in 1..30 {
            let mut calls = Calls::new(3, 0, 0);
            call(&mut calls, b"abcde");
            call(&mut calls, b"");
            call(&mut calls, b"wxyz");
            let mut all: Vec<u8> = Vec::new();
            loop {
                let next = bytes(&mut calls, false, true);
                if next.is_empty() {
                    break;
                }
                let part = &next[..step.min(next.len())];
                all.extend(part);
                calls.wrote(part.len(), 0);
            }
            assert_eq!(all, b"\0\0\0\0abcde\0\0\0\x01\x01\x01\x01\x02\x02\x02\x02wxyz");
        }
    }
}
