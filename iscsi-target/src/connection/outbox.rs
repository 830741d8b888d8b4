//! Owns: what a connection has still to send, and the sending.
//! Promises: PDUs go out whole and in the order of their numbers; whoever has much to send waits for room.
//! Must not know: what PDUs mean.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use iscsi::pdu::{self, Digests, HEADER};
use tokio::sync::Notify;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::TcpStream;

/// Bytes that may wait before data have to: control PDUs are never held up.
const PLENTY: usize = 1 << 20;
/// A buffer that has become larger than this is not kept.
const KEPT: usize = 4 << 20;

/// PDUs on their way out.
#[derive(Default)]
pub struct Outbox {
    waiting: RefCell<Vec<u8>>,
    digests: Cell<Digests>,
    is_closed: Cell<bool>,
    something: Notify,
    room: Notify,
}

impl Outbox {
    /// From now on PDUs have these digests.
    pub fn set_digests(&self, digests: Digests) {
        self.digests.set(digests);
    }

    /// Adds a PDU.
    pub fn push(&self, header: [u8; HEADER], data: &[u8]) {
        pdu::append(&mut self.waiting.borrow_mut(), header, data, self.digests.get());
        self.something.notify_one();
    }

    /// Adds a PDU whose `length` bytes of data are put in by `fill`.
    pub fn push_with(&self, mut header: [u8; HEADER], length: usize, fill: impl FnOnce(&mut [u8])) {
        let mut waiting = self.waiting.borrow_mut();
        pdu::begin(&mut waiting, &mut header, length, self.digests.get());
        let start = waiting.len();
        waiting.resize(start + length, 0);
        fill(&mut waiting[start..]);
        pdu::finish(&mut waiting, start, self.digests.get());
        self.something.notify_one();
    }

    /// Waits until there is room for more data, or the connection is over.
    pub async fn room(&self) {
        while self.waiting.borrow().len() > PLENTY && !self.is_closed.get() {
            self.room.notified().await;
        }
    }

    /// Nothing more will come: what is there is sent, then [`Outbox::send`] ends.
    pub fn close(&self) {
        self.is_closed.set(true);
        self.something.notify_one();
        self.room.notify_waiters();
    }

    /// Sends until the outbox is closed and empty, or the connection breaks.
    pub async fn send(&self, stream: Rc<TcpStream>) {
        let mut sending = Vec::new();
        loop {
            if self.waiting.borrow().is_empty() {
                if self.is_closed.get() {
                    break;
                }
                self.something.notified().await;
                continue;
            }
            std::mem::swap(&mut sending, &mut self.waiting.borrow_mut());
            let length = sending.len();
            let (sent, slice) = stream.write_all(sending.slice(0..length)).await;
            sending = slice.into_inner();
            sending.clear();
            if sending.capacity() > KEPT {
                sending = Vec::new();
            }
            self.room.notify_waiters();
            if let Err(error) = sent {
                tracing::debug!(%error, "the connection broke while something was sent");
                self.is_closed.set(true);
                self.waiting.borrow_mut().clear();
                break;
            }
        }
        self.room.notify_waiters();
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}
