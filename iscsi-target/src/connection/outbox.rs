//! Owns: what a connection has still to send, and the sending.
//! Promises: PDUs go out whole and in the order of their numbers, as many in one call as there are; data go out from where they were
//! read, without a copy; whoever has much to send waits for room.
//! Must not know: what PDUs mean.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use iscsi::pdu::{self, Digests, HEADER};

use super::socket::Socket;
use crate::memory::Memory;

/// Bytes that may wait before data have to: control PDUs are never held up.
const PLENTY: usize = 1 << 20;
/// So much goes out at once, while the rest is still worked on; less waits for what comes along with it.
const ENOUGH: usize = 64 << 10;
/// A buffer that has become larger than this is not kept.
const KEPT: usize = 4 << 20;
/// Pieces that go out in one call.
const PIECES: usize = 64;
/// Time for the rest to go out when the connection is closed.
const FAREWELL: Duration = Duration::from_secs(10);

/// A piece of the stream.
enum Piece {
    /// So many of the queue's own bytes.
    Own(usize),
    /// Bytes of a command's memory.
    Data { memory: Memory, start: usize, length: usize },
}

/// The stream from its first byte that was not sent yet.
#[derive(Default)]
struct Queue {
    own: Vec<u8>,
    /// Bytes of `own` that have been sent.
    own_sent: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of all pieces.
    length: usize,
}

/// PDUs on their way out.
pub struct Outbox {
    socket: Rc<Socket>,
    queue: RefCell<Queue>,
    digests: Cell<Digests>,
    is_closed: Cell<bool>,
    something: Notify,
    room: Notify,
}

impl Queue {
    /// Adds what `add` puts into the own bytes.
    fn own(&mut self, add: impl FnOnce(&mut Vec<u8>)) {
        let before = self.own.len();
        add(&mut self.own);
        let added = self.own.len() - before;
        self.length += added;
        match self.pieces.back_mut() {
            Some(Piece::Own(length)) => *length += added,
            _ => self.pieces.push_back(Piece::Own(added)),
        }
    }

    /// The next bytes, in as many slices as `into` takes.
    fn slices<'a>(&'a self, into: &mut [IoSlice<'a>; PIECES]) -> usize {
        let mut own = self.own_sent;
        let mut count = 0;
        for (piece, slice) in self.pieces.iter().zip(into.iter_mut()) {
            *slice = IoSlice::new(match piece {
                Piece::Own(length) => {
                    own += length;
                    &self.own[own - length..own]
                }
                Piece::Data { memory, start, length } => memory.bytes(*start, *length),
            });
            count += 1;
        }
        count
    }

    /// `sent` bytes have gone out.
    fn advance(&mut self, mut sent: usize) {
        self.length -= sent;
        while let Some(piece) = self.pieces.front_mut() {
            let (Piece::Own(length) | Piece::Data { length, .. }) = piece;
            let part = sent.min(*length);
            *length -= part;
            sent -= part;
            let is_over = *length == 0;
            match piece {
                Piece::Own(_) => self.own_sent += part,
                Piece::Data { start, .. } => *start += part,
            }
            if !is_over {
                break;
            }
            self.pieces.pop_front();
        }
        if self.pieces.is_empty() {
            self.own_sent = 0;
            self.own.clear();
            if self.own.capacity() > KEPT {
                self.own = Vec::new();
            }
        }
    }
}

impl Outbox {
    /// An empty one.
    pub fn new(socket: Rc<Socket>) -> Self {
        Self {
            socket,
            queue: RefCell::default(),
            digests: Cell::default(),
            is_closed: Cell::new(false),
            something: Notify::new(),
            room: Notify::new(),
        }
    }

    /// From now on PDUs have these digests.
    pub fn set_digests(&self, digests: Digests) {
        self.digests.set(digests);
    }

    /// Adds a PDU.
    pub fn push(&self, header: [u8; HEADER], data: &[u8]) {
        self.queue.borrow_mut().own(|own| pdu::append(own, header, data, self.digests.get()));
        self.something.notify_one();
    }

    /// Adds a PDU whose data are `length` bytes of `memory`.
    pub fn push_data(&self, mut header: [u8; HEADER], memory: &Memory, start: usize, length: usize) {
        let digests = self.digests.get();
        let mut queue = self.queue.borrow_mut();
        queue.own(|own| pdu::begin(own, &mut header, length, digests));
        queue.pieces.push_back(Piece::Data { memory: memory.clone(), start, length });
        queue.length += length;
        if digests.data || pdu::padded(length) != length {
            let data = memory.bytes(start, length);
            queue.own(|own| pdu::finish_after(own, data, digests));
        }
        self.something.notify_one();
    }

    /// Waits until there is room for more data, or the connection is over.
    pub async fn room(&self) {
        while self.queue.borrow().length > PLENTY && !self.is_closed.get() {
            self.room.notified().await;
        }
    }

    /// Is there enough to be sent at once?
    pub fn is_worth_a_call(&self) -> bool {
        self.queue.borrow().length >= ENOUGH
    }

    /// Nothing more will come: what is there is sent, then [`Outbox::send`] ends.
    pub fn close(&self) {
        self.is_closed.set(true);
        self.something.notify_one();
        self.room.notify_waiters();
    }

    /// Sends what the socket takes at once. `false`: it takes no more at the moment, or nothing any more.
    pub fn flush(&self) -> bool {
        let mut queue = self.queue.borrow_mut();
        // Wakes others, which run later.
        self.room.notify_waiters();
        while queue.length > 0 {
            let mut slices = [IoSlice::new(&[]); PIECES];
            let count = queue.slices(&mut slices);
            match self.socket.write(&slices[..count]) {
                Ok(sent) => queue.advance(sent),
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        tracing::debug!(%error, "the connection broke while something was sent");
                        self.is_closed.set(true);
                        *queue = Queue::default();
                        self.something.notify_one();
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Sends until the outbox is closed and empty, or the connection breaks.
    pub async fn send(&self) {
        loop {
            if self.flush() && !self.is_closed.get() {
                self.something.notified().await;
                continue;
            }
            if self.queue.borrow().length == 0 && self.is_closed.get() {
                break;
            }
            let writable = self.socket.writable();
            if !self.is_closed.get() {
                tokio::select! {
                    _ = writable => {}
                    () = self.closing() => {}
                }
            } else if tokio::time::timeout(FAREWELL, writable).await.is_err() {
                tracing::debug!("the other side takes nothing any more");
                *self.queue.borrow_mut() = Queue::default();
            }
        }
        self.room.notify_waiters();
        self.socket.hang_up();
    }

    async fn closing(&self) {
        while !self.is_closed.get() {
            self.something.notified().await;
        }
    }
}
