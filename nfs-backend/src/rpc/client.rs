//! Owns: a client of one RPC server: taking a slot, sending a call, waiting for its answer.
//! Promises: what an error says of a call's effect is true; a gated call is written to the socket only after a look at the gate.
//! Must not know: what calls mean; how connections come about.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::{Notify, Semaphore};

use super::calls::{Calls, MOST_SLOTS, Phase, Sending};
use super::connection;
use super::message::{self, Credential, Procedure, Verdict};
use crate::error::NfsError;
use crate::xdr::Reader;

/// Slots that only a recovery takes.
const RECOVERY_SLOTS: usize = 32;
/// Most ordinary calls at once.
const ORDINARY_SLOTS: usize = MOST_SLOTS - RECOVERY_SLOTS;

/// Whether requests that change what a lock guards may be sent right now.
pub trait Gate: Send + Sync {
    /// Looked at immediately before each write to a socket.
    fn is_open(&self) -> bool;
}

/// What a client wants of its server.
#[derive(Clone)]
pub struct Options {
    /// How messages name the server.
    pub name: String,
    /// Who calls.
    pub credential: Credential,
    /// A call without an answer for so long makes a new connection.
    pub answer_within: Duration,
    /// What was written to the socket and is not acknowledged after so long is given up with the connection: by the kernel, even when this
    /// process stands still (TCP_USER_TIMEOUT).
    pub user_timeout: Duration,
    /// Longest reply in bytes.
    pub most_reply: usize,
    /// The gate of gated calls; none: they are sent always.
    pub gate: Option<Arc<dyn Gate>>,
}

/// What has to be done on each new connection, before anything else is sent there.
pub type Recovery = Box<dyn Fn() -> LocalBoxFuture<'static, ()>>;

/// Whether there is a connection.
pub(super) enum Link {
    Down,
    /// Only calls of the recovery are sent.
    Recovering(Rc<OwnedWriteHalf>),
    Up(Rc<OwnedWriteHalf>),
}

pub(super) struct Shared {
    pub address: SocketAddr,
    pub options: Options,
    pub calls: RefCell<Calls>,
    pub link: RefCell<Link>,
    /// Counts connections that have ended.
    pub epoch: Cell<u64>,
    /// Counts seconds.
    pub tick: Cell<u64>,
    /// The socket takes no more at the moment.
    pub is_full: Cell<bool>,
    pub closed: RefCell<Option<String>>,
    /// Why there is no connection.
    pub trouble: RefCell<String>,
    /// Wakes the task that looks after the connection.
    pub attention: Notify,
    /// Told when a recovery was done.
    pub recovered: Notify,
    pub recovery: RefCell<Option<Recovery>>,
    ordinary: Semaphore,
    for_recovery: Semaphore,
    credential: Vec<u8>,
}

impl Shared {
    /// Writes what the socket takes.
    pub fn flush(&self) {
        let (writer, recovering) = match &*self.link.borrow() {
            Link::Down => return,
            Link::Recovering(writer) => (writer.clone(), true),
            Link::Up(writer) => (writer.clone(), false),
        };
        let broken = loop {
            let mut calls = self.calls.borrow_mut();
            let Some(next) = calls.next(recovering, || self.is_open()) else { return };
            if next.gated && !self.is_open() {
                if next.is_begun {
                    break "the gate closed while a request was being sent".to_owned();
                }
                calls.hold();
                return;
            }
            match writer.try_write(next.bytes) {
                Ok(count) => calls.wrote(count, self.tick.get()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if !self.is_full.replace(true) {
                        self.attention.notify_one();
                    }
                    return;
                }
                Err(error) => break error.to_string(),
            }
        };
        self.disconnect(&broken);
    }

    fn is_open(&self) -> bool {
        self.options.gate.as_ref().is_none_or(|gate| gate.is_open())
    }

    /// Ends the connection; the socket's unsent bytes go with it.
    pub fn disconnect(&self, cause: &str) {
        if matches!(self.link.replace(Link::Down), Link::Down) {
            return;
        }
        tracing::debug!(server = self.options.name, cause, "the connection has ended");
        cause.clone_into(&mut self.trouble.borrow_mut());
        self.epoch.set(self.epoch.get() + 1);
        self.is_full.set(false);
        self.calls.borrow_mut().disconnect(&cause.into());
        self.attention.notify_one();
    }

    fn close(&self, cause: &str) {
        self.closed.borrow_mut().get_or_insert_with(|| cause.to_owned());
        self.disconnect(cause);
        self.calls.borrow_mut().wake_all();
        self.attention.notify_one();
        self.recovered.notify_waiters();
        self.ordinary.close();
        self.for_recovery.close();
    }
}

/// A client. It ends with its last owner.
pub struct Client {
    shared: Rc<Shared>,
}

impl Client {
    /// Of the server at `address`; connects in the background.
    ///
    /// # Panics
    /// Outside of a `LocalSet`, or when the system has no random numbers.
    pub fn new(address: SocketAddr, options: Options) -> Client {
        let random = getrandom::u32().expect("the system gives random numbers");
        let credential = options.credential.encoded();
        let shared = Rc::new(Shared {
            address,
            options,
            calls: RefCell::new(Calls::new(ORDINARY_SLOTS, RECOVERY_SLOTS, random)),
            link: RefCell::new(Link::Down),
            epoch: Cell::new(0),
            tick: Cell::new(0),
            is_full: Cell::new(false),
            closed: RefCell::new(None),
            trouble: RefCell::new("no connection was made yet".to_owned()),
            attention: Notify::new(),
            recovered: Notify::new(),
            recovery: RefCell::new(None),
            ordinary: Semaphore::new(ORDINARY_SLOTS),
            for_recovery: Semaphore::new(RECOVERY_SLOTS),
            credential,
        });
        tokio::task::spawn_local(connection::keep(shared.clone()));
        Client { shared }
    }

    /// The server's name.
    pub fn name(&self) -> &str {
        &self.shared.options.name
    }

    /// The server's address.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// What has to be done on each new connection from now on.
    pub fn on_connect(&self, recovery: Recovery) {
        *self.shared.recovery.borrow_mut() = Some(recovery);
    }

    /// Calls that were held by the gate go out.
    pub fn gate_opened(&self) {
        self.shared.flush();
    }

    /// Ends the connection, so that nothing that was written to it and did not arrive yet ever will. A new one is made.
    pub fn disconnect(&self, cause: &str) {
        self.shared.disconnect(cause);
    }

    /// Ends the connection, and waits until a new one is there and its recovery done.
    pub async fn reconnect(&self, cause: &str) {
        let mut recovered = std::pin::pin!(self.shared.recovered.notified());
        recovered.as_mut().enable();
        self.shared.disconnect(cause);
        if self.shared.closed.borrow().is_none() {
            recovered.await;
        }
    }

    /// Ends every call, now and later.
    pub fn close(&self, cause: &str) {
        self.shared.close(cause);
    }

    /// What calls of `procedure` come to, if the client was closed.
    pub fn ended(&self, procedure: &'static str) -> Option<NfsError> {
        let is_closed = self.shared.closed.borrow().is_some();
        is_closed.then(|| self.closed(procedure))
    }

    fn closed(&self, procedure: &'static str) -> NfsError {
        let cause = self.shared.closed.borrow().clone().unwrap_or_default();
        NfsError::Closed { procedure, cause }
    }

    /// Begins a call: waits for a slot, and writes the header. `recovery`: see [`Sending::recovery`].
    ///
    /// # Errors
    /// [`NfsError::Closed`]
    pub async fn begin(&self, procedure: Procedure, recovery: bool) -> Result<Call<'_>, NfsError> {
        let slots = if recovery { &self.shared.for_recovery } else { &self.shared.ordinary };
        match slots.acquire().await {
            Ok(permit) => permit.forget(),
            Err(_) => return Err(self.closed(procedure.name)),
        }
        let opened = self.shared.calls.borrow_mut().open(recovery);
        let (slot, xid, mut record, reply) = opened.expect("a permit stands for a free slot");
        message::begin_call(&mut record, xid, procedure, &self.shared.credential);
        Ok(Call { client: self, slot, recovery, procedure, record, reply, is_submitted: false })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.close("the client has ended");
    }
}

/// A call whose arguments are being written.
pub struct Call<'a> {
    client: &'a Client,
    slot: usize,
    recovery: bool,
    procedure: Procedure,
    record: Vec<u8>,
    reply: Vec<u8>,
    is_submitted: bool,
}

impl<'a> Call<'a> {
    /// Where the arguments go, behind what is there.
    pub fn arguments(&mut self) -> &mut Vec<u8> {
        &mut self.record
    }

    /// Sends it and waits for its answer.
    ///
    /// # Errors
    /// [`NfsError`], but never the status of a program.
    pub async fn send(mut self, how: Sending) -> Result<Answer<'a>, NfsError> {
        let (shared, name) = (&self.client.shared, self.procedure.name);
        if shared.closed.borrow().is_some() {
            return Err(self.client.closed(name));
        }
        message::finish_record(&mut self.record);
        let (record, reply) = (std::mem::take(&mut self.record), std::mem::take(&mut self.reply));
        let how = Sending { recovery: self.recovery, ..how };
        shared.calls.borrow_mut().submit(self.slot, record, reply, &how);
        self.is_submitted = true;
        shared.flush();
        let slot = self.slot;
        let ended = poll_fn(|context| {
            if shared.closed.borrow().is_some() {
                return Poll::Ready(None);
            }
            match shared.calls.borrow_mut().look(slot, context.waker()) {
                Phase::Queued | Phase::Sent(_) => Poll::Pending,
                phase => Poll::Ready(Some(phase)),
            }
        });
        let ended = match how.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, ended).await,
            None => Ok(ended.await),
        };
        let server = || shared.options.name.clone();
        let resent = match ended {
            Ok(Some(Phase::Answered)) => shared.calls.borrow().was_resent(slot),
            Ok(Some(Phase::Lost(cause))) => {
                return Err(NfsError::Unknown { procedure: name, server: server(), cause: cause.to_string() });
            }
            Ok(_) => return Err(self.client.closed(name)),
            Err(_) => {
                let was_sent = shared.calls.borrow().was_sent(slot);
                let trouble = shared.trouble.borrow().clone();
                return Err(match was_sent {
                    true => NfsError::Unknown { procedure: name, server: server(), cause: "the time is over".into() },
                    false => NfsError::Unreachable { procedure: name, server: server(), cause: trouble },
                });
            }
        };
        self.take_back();
        match message::verdict(&self.reply).map_err(NfsError::nonsense(name))? {
            Verdict::Accepted(at) => Ok(Answer { call: self, at, resent }),
            Verdict::Denied(cause) => Err(NfsError::Denied { procedure: name, cause }),
        }
    }

    fn take_back(&mut self) {
        if std::mem::take(&mut self.is_submitted) {
            let (record, reply, is_partial) = self.client.shared.calls.borrow_mut().withdraw(self.slot);
            (self.record, self.reply) = (record, reply);
            if is_partial {
                self.client.shared.disconnect("a call was given up while it was being sent");
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.take_back();
        let (record, reply) = (std::mem::take(&mut self.record), std::mem::take(&mut self.reply));
        let shared = &self.client.shared;
        shared.calls.borrow_mut().close(self.slot, record, reply);
        let slots = if self.recovery { &shared.for_recovery } else { &shared.ordinary };
        slots.add_permits(1);
    }
}

/// The answer to a call that was accepted.
pub struct Answer<'a> {
    call: Call<'a>,
    at: usize,
    /// The call was sent on more than one connection: it may have been done twice.
    pub resent: bool,
}

impl Answer<'_> {
    /// The results.
    pub fn results(&self) -> Reader<'_> {
        Reader::new(&self.call.reply[self.at..])
    }

    /// The whole call as it was sent, exchanged for `memory`.
    pub fn exchange_call(&mut self, memory: &mut Vec<u8>) {
        std::mem::swap(&mut self.call.record, memory);
    }
}
