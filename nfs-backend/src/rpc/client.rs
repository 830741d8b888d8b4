//! Owns: a client of one RPC server: taking a slot, sending a call, waiting for its answer.
//! Promises: what an error says of a call's effect is true; a gated call is written to the socket only after a look at the gate.
//! Must not know: what calls mean; how connections come about.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use scsi::DataBuffer;
use tokio::net::TcpStream;
use tokio::sync::{Notify, Semaphore};

use super::calls::{Calls, Landing, Locate, MOST_PIECES, MOST_SLOTS, Memory, Phase, Sending};
use super::connection;
use super::message::{self, Credential, Procedure, Verdict};
use crate::error::NfsError;
use crate::xdr::Reader;

/// Slots that only a recovery takes.
const RECOVERY_SLOTS: usize = 32;
/// Most ordinary calls at once.
const ORDINARY_SLOTS: usize = MOST_SLOTS - RECOVERY_SLOTS;
/// Most calls that one system call writes.
const MOST_AT_ONCE: usize = 32;

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
    Recovering(Rc<TcpStream>),
    Up(Rc<TcpStream>),
}

/// A bell for the one task that looks after the connection. It rings until that has heard it.
#[derive(Default)]
pub(super) struct Bell {
    rings: Cell<bool>,
    listener: RefCell<Option<Waker>>,
}

impl Bell {
    pub fn ring(&self) {
        self.rings.set(true);
        if let Some(listener) = self.listener.borrow_mut().take() {
            listener.wake();
        }
    }

    /// Waits until it rings, and stops it.
    pub fn hear(&self, context: &Context<'_>) -> Poll<()> {
        if self.rings.take() {
            return Poll::Ready(());
        }
        match &mut *self.listener.borrow_mut() {
            Some(known) => known.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }
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
    pub attention: Bell,
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
        let (stream, recovering) = match &*self.link.borrow() {
            Link::Down => return,
            Link::Recovering(stream) => (stream.clone(), true),
            Link::Up(stream) => (stream.clone(), false),
        };
        let broken = loop {
            let mut calls = self.calls.borrow_mut();
            let is_open = self.is_open();
            if !is_open {
                calls.hold();
            }
            let mut slices = [IoSlice::new(&[]); MOST_AT_ONCE * MOST_PIECES];
            let Some(next) = calls.next(recovering, || is_open, &mut slices) else { return };
            if next.gated && !self.is_open() {
                if next.is_begun && !is_open {
                    break "the gate closed while a request was being sent".to_owned();
                }
                continue;
            }
            match stream.try_write_vectored(&slices[..next.pieces]) {
                Ok(count) => calls.wrote(count, self.tick.get()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if !self.is_full.replace(true) {
                        self.attention.ring();
                    }
                    return;
                }
                Err(error) => break error.to_string(),
            }
        };
        self.disconnect(&broken);
    }

    /// A call waits to be sent: it goes out now, or with the others that are made in this turn of the thread's tasks.
    fn flush_in_turn(&self) {
        if self.calls.borrow().is_urgent() { self.flush() } else { self.attention.ring() }
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
        self.attention.ring();
    }

    fn close(&self, cause: &str) {
        self.closed.borrow_mut().get_or_insert_with(|| cause.to_owned());
        self.disconnect(cause);
        self.calls.borrow_mut().wake_all();
        self.attention.ring();
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
            attention: Bell::default(),
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
        let (slot, xid, mut memory) = opened.expect("a permit stands for a free slot");
        message::begin_call(&mut memory.record, xid, procedure, &self.shared.credential);
        (memory.landing, memory.landed) = (None, 0);
        memory.payload.clear();
        Ok(Call { client: self, slot, recovery, procedure, memory, is_submitted: false })
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
    memory: Memory,
    is_submitted: bool,
}

impl<'a> Call<'a> {
    /// Where the arguments go, behind what is there.
    pub fn arguments(&mut self) -> &mut Vec<u8> {
        &mut self.memory.record
    }

    /// Data that end the arguments, behind all that [`Call::arguments`] holds: they are sent from where they are, with padding. Their
    /// length is among the arguments.
    pub fn attach(&mut self, data: Vec<u8>) {
        self.memory.payload = data;
    }

    /// Where data of the answer go: `locate` finds them by the first bytes of the reply. They stay in the reply if it finds none, or more
    /// than there is room for.
    pub fn land(&mut self, buffer: DataBuffer, locate: Locate) {
        self.memory.landing = Some(Landing { buffer, locate });
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
        message::finish_record(&mut self.memory.record, self.memory.payload.len());
        let how = Sending { recovery: self.recovery, ..how };
        shared.calls.borrow_mut().submit(self.slot, std::mem::take(&mut self.memory), &how);
        self.is_submitted = true;
        shared.flush_in_turn();
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
        match message::verdict(&self.memory.reply).map_err(NfsError::nonsense(name))? {
            Verdict::Accepted(at) => Ok(Answer { call: self, at, resent }),
            Verdict::Denied(cause) => Err(NfsError::Denied { procedure: name, cause }),
        }
    }

    fn take_back(&mut self) {
        if std::mem::take(&mut self.is_submitted) {
            let (memory, is_partial) = self.client.shared.calls.borrow_mut().withdraw(self.slot);
            self.memory = memory;
            if is_partial {
                self.client.shared.disconnect("a call was given up while it was being sent");
            }
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.take_back();
        let shared = &self.client.shared;
        shared.calls.borrow_mut().close(self.slot, std::mem::take(&mut self.memory));
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
    /// The results, without data that landed.
    pub fn results(&self) -> Reader<'_> {
        Reader::new(&self.call.memory.reply[self.at..])
    }

    /// Bytes that went to where [`Call::land`] said, from its beginning on.
    pub fn landed(&self) -> usize {
        self.call.memory.landed
    }

    /// The data that were attached to the call.
    pub fn take_attached(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.call.memory.payload)
    }
}
