//! Owns: the full feature phase of a session (RFC 7143, 4.2, 11.3 to 11.19).
//! Promises: each command gets one response, or none if it was aborted; the answer to a task management function comes when the
//! commands that it ended no longer touch the initiator's data.
//! Must not know: which targets there are; what CDBs mean.

mod asking;
mod work;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use iscsi::login::Login;
use iscsi::login::parameters::Parameters;
use iscsi::pdu::{
    AsyncMessage, DataOut, Header, LoginRequest, LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, ReadyToTransfer,
    Reject, RejectReason, Request, Residual, ScsiCommand, ScsiResponse, TaskManagementAnswer, TaskRequest,
};
use iscsi::text;
use scsi::{Lun, NexusId, Task, TaskAttribute, TaskManagement, TaskManagementResponse, TransportId};
use tokio::sync::Notify;
use work::{Job, Worker};

use super::Entrance;
use super::collecting::{Collecting, Flaw};
use super::inbox::{Arrived, Broken, Data, Inbox, LARGE};
use super::numbers::{DEPTH, Numbers, Turn};
use super::outbox::Outbox;
use super::socket::Socket;
use crate::memory::{LONGEST_TRANSFER, Landing, Memory, Share};
use crate::server::{Server, TargetEntry};
use crate::status::{Rates, SessionReport};

/// Silence after which the initiator is pinged.
const QUIET: Duration = Duration::from_secs(20);
/// Bytes of commands, and a page for each, that are begun before their answers go out: so the initiator has something to do meanwhile.
const TURN: u32 = 128 << 10;
/// Silence after which it is given up.
const DEAD: Duration = Duration::from_secs(60);

/// What the next PDU means for the connection.
enum Next {
    GoOn,
    Close,
    /// After this answer, which is given when nothing of the session is under way any more.
    LogOut(LogoutResponse),
}

/// A session, which has one connection.
pub struct Session {
    /// The initiator's name.
    pub initiator: String,
    /// Its part of the session identifier.
    pub isid: [u8; 6],
    /// The target's part.
    pub tsih: u16,
    connection: u16,
    /// Where it came in.
    pub entrance: Entrance,
    /// What it uses; none: it only asks what there is.
    pub target: Option<Rc<TargetEntry>>,
    /// When it began.
    since: Instant,
    /// Commands so far.
    commands: Cell<u64>,
    /// Bytes read so far.
    bytes_read: Cell<u64>,
    /// Bytes written so far.
    bytes_written: Cell<u64>,
    /// The three of them when the last second was over.
    counted: Cell<[u64; 3]>,
    rates: Cell<Rates>,
    server: Rc<Server>,
    nexus: NexusId,
    agreed: Parameters,
    socket: Rc<Socket>,
    outbox: Rc<Outbox>,
    numbers: Numbers,
    /// Writes whose data are still coming, with their places in the task set.
    collecting: RefCell<HashMap<u32, (Collecting, Task, Memory)>>,
    /// Tags of the commands that the device server works on.
    running: RefCell<HashSet<u32>>,
    /// Workers without a job.
    idle: RefCell<Vec<Rc<Worker>>>,
    /// The memory that this session may have.
    share: Share,
    /// Tells that one of them is over.
    over: Notify,
    /// Work that was begun since others had their turn, as [`TURN`] counts it.
    begun: Cell<u32>,
    next_transfer_tag: Cell<u32>,
    /// The rest of a text answer, and the tag by which it is asked for.
    rest: RefCell<Option<(u32, Vec<u8>)>>,
    heard: Cell<Instant>,
    is_gone: Cell<bool>,
    gone: Notify,
}

impl Session {
    /// Begins after a login.
    pub(super) async fn begin(
        server: &Rc<Server>,
        socket: Rc<Socket>,
        outbox: Rc<Outbox>,
        login: &Login,
        first: &LoginRequest,
        numbers: Numbers,
        entrance: Entrance,
    ) -> Rc<Session> {
        let session = Rc::new(Session {
            initiator: login.initiator.clone().unwrap_or_default(),
            isid: first.isid,
            tsih: first.tsih,
            connection: first.connection,
            entrance,
            target: login.target.as_deref().and_then(|name| server.target(name)),
            since: Instant::now(),
            commands: Cell::new(0),
            bytes_read: Cell::new(0),
            bytes_written: Cell::new(0),
            counted: Cell::default(),
            rates: Cell::default(),
            server: server.clone(),
            nexus: server.next_nexus(),
            agreed: login.parameters.clone(),
            socket,
            outbox,
            numbers,
            collecting: RefCell::default(),
            running: RefCell::default(),
            idle: RefCell::default(),
            share: server.memory().share(),
            over: Notify::new(),
            begun: Cell::new(0),
            next_transfer_tag: Cell::new(0),
            rest: RefCell::default(),
            heard: Cell::new(Instant::now()),
            is_gone: Cell::new(false),
            gone: Notify::new(),
        });
        if let Some(target) = &session.target {
            let port = TransportId::Iscsi { name: session.initiator.clone(), isid: Some(first.isid) };
            target.units.attach(session.nexus, port, entrance.portal);
        }
        server.enter(session.clone());
        let target = session.target.as_ref().map_or("discovery", |target| &target.name);
        tracing::info!(peer = %entrance.peer, initiator = %session.initiator, target, tsih = first.tsih, "a session begins");
        tokio_uring::spawn(session.clone().watch());
        session
    }

    /// Serves requests until the connection ends, or is to end with this answer to a logout.
    pub(super) async fn run(self: &Rc<Self>, inbox: &mut Inbox) -> Option<LogoutResponse> {
        loop {
            match self.serve_next(inbox).await {
                Ok(Next::GoOn) => {}
                Ok(Next::Close) => return None,
                Ok(Next::LogOut(answer)) => return Some(answer),
                Err(error) => {
                    if !matches!(error, Broken::Closed) {
                        tracing::warn!(peer = %self.entrance.peer, initiator = %self.initiator, %error, "a connection is dropped");
                    }
                    return None;
                }
            }
            self.outbox.room().await;
            if self.begun.get() >= TURN {
                self.begun.set(0);
                others_first().await;
            }
        }
    }

    async fn serve_next(self: &Rc<Self>, inbox: &mut Inbox) -> Result<Next, Broken> {
        let header = inbox.header().await?;
        let memory = self.memory_for(&header).await;
        let landing = if inbox.lands() { self.landing(&header, memory.as_ref()) } else { None };
        let arrived = inbox.data(&header, landing).await?;
        self.heard.set(Instant::now());
        Ok(self.take(&header, &arrived, memory))
    }

    /// The place of the data behind `header`, if they are many and as they should be.
    fn landing(&self, header: &Header, memory: Option<&Memory>) -> Option<Landing> {
        let length = header.data_length();
        if length < LARGE {
            return None;
        }
        match Request::decode(header).ok()? {
            Request::Command(_) => memory?.landing(length),
            Request::Data(out) => self.collecting.borrow().get(&out.tag)?.0.landing(&out, length),
            _ => None,
        }
    }

    /// Ends: commands under way are waited for, their answers are not sent. Only then a logout is answered: for the initiator that
    /// proves that nothing of the session reaches the disks any more (11.14).
    pub(super) async fn end(&self, farewell: Option<LogoutResponse>) {
        if farewell.is_none() {
            // What is to be sent still goes out, and nobody waits for room any more.
            self.outbox.close();
        }
        if let Some(target) = &self.target {
            target.units.nexus_loss(self.nexus).await;
        }
        self.collecting.borrow_mut().clear();
        while !self.running.borrow().is_empty() {
            self.over.notified().await;
        }
        if let Some(answer) = farewell {
            self.outbox.push(answer.encode(self.numbers.with_status()), &[]);
            self.outbox.close();
        }
        self.server.leave(self);
        self.is_gone.set(true);
        self.gone.notify_waiters();
        self.idle.borrow_mut().drain(..).for_each(|worker| worker.called.notify_one());
        tracing::info!(peer = %self.entrance.peer, initiator = %self.initiator, tsih = self.tsih, "a session ends");
    }

    /// Closes the connection from outside and waits until the session is over.
    pub async fn close(&self) {
        self.socket.hang_up();
        while !self.is_gone.get() {
            let gone = self.gone.notified();
            if self.is_gone.get() {
                break;
            }
            gone.await;
        }
    }

    /// Asks the initiator to log out (11.9, event 1).
    pub fn ask_to_leave(&self, seconds: u16) {
        let message = AsyncMessage { event: 1, seconds };
        self.outbox.push(message.encode(self.numbers.with_status()), &[]);
    }

    /// Does it use `target`?
    pub fn uses(&self, target: &Rc<TargetEntry>) -> bool {
        self.target.as_ref().is_some_and(|its| Rc::ptr_eq(its, target))
    }

    fn counts(&self) -> [u64; 3] {
        [self.commands.get(), self.bytes_read.get(), self.bytes_written.get()]
    }

    /// A second is over: what it did in that second is told until the next one is over.
    pub fn tick(&self) {
        let now = self.counts();
        let before = self.counted.replace(now);
        let rate = |at: usize| now[at] - before[at];
        let rates = Rates { iops: rate(0), read_bytes_per_second: rate(1), write_bytes_per_second: rate(2) };
        self.rates.set(rates);
    }

    /// What it does.
    pub fn report(&self) -> SessionReport {
        let [commands, bytes_read, bytes_written] = self.counts();
        SessionReport {
            initiator: self.initiator.clone(),
            isid: text::hexadecimal(&self.isid),
            tsih: self.tsih,
            peer: self.entrance.peer.to_string(),
            portal: self.entrance.portal,
            seconds: self.since.elapsed().as_secs(),
            commands,
            bytes_read,
            bytes_written,
            queue_depth: self.numbers.active(),
            rates: self.rates.get(),
        }
    }

    /// Pings an initiator that is silent, and gives one up that stays so.
    async fn watch(self: Rc<Self>) {
        while !self.is_gone.get() {
            tokio::time::sleep(QUIET / 2).await;
            self.purge();
            let silent = self.heard.get().elapsed();
            if silent > DEAD {
                tracing::warn!(peer = %self.entrance.peer, initiator = %self.initiator, "no answer to pings: the connection is dropped");
                self.socket.hang_up();
                return;
            }
            if silent > QUIET && !self.is_gone.get() {
                let ping = NopIn { lun: [0; 8], tag: NO_TAG, transfer_tag: self.transfer_tag() };
                self.outbox.push(ping.encode(self.numbers.without_status()), &[]);
            }
        }
    }

    fn transfer_tag(&self) -> u32 {
        let tag = self.next_transfer_tag.get();
        self.next_transfer_tag.set(if tag == NO_TAG - 1 { 0 } else { tag + 1 });
        tag
    }

    /// The memory for a write that begins, if it is one and there is some. Nothing more is read from the connection until then; but a
    /// session whose other writes wait for data has to read on.
    async fn memory_for(&self, header: &Header) -> Option<Memory> {
        let Ok(Request::Command(command)) = Request::decode(header) else { return None };
        let length = (command.expected as usize).min(LONGEST_TRANSFER);
        if !command.writes || length == 0 {
            return None;
        }
        let at_once = self.share.try_take(length);
        if at_once.is_some() || !self.collecting.borrow().is_empty() {
            return at_once;
        }
        Some(self.share.take(length).await)
    }

    fn take(self: &Rc<Self>, header: &Header, arrived: &Arrived<'_>, memory: Option<Memory>) -> Next {
        let request = match Request::decode(header) {
            Ok(request) => request,
            Err(reason) => return self.reject(header, reason),
        };
        if let Some(number) = request.number()
            && !header.is_immediate()
        {
            match self.numbers.take(number) {
                Turn::Now => {}
                Turn::Outside => return Next::GoOn,
                Turn::Gap => {
                    tracing::warn!(peer = %self.entrance.peer, number, "a command number was left out: the connection is dropped");
                    return Next::Close;
                }
            }
        }
        if !arrived.is_sound {
            return self.unsound(header, &request);
        }
        let is_discovery = self.target.is_none();
        match request {
            Request::Nop(nop) => self.nop(&nop, arrived.data.here()),
            Request::Text(text) => return self.text(header, &text, arrived.data.here()),
            Request::Logout(logout) => return self.log_out(&logout),
            Request::Login(_) => return self.reject(header, RejectReason::Protocol),
            _ if is_discovery => return self.reject(header, RejectReason::Protocol),
            Request::Command(command) => return self.command(header, command, arrived.data, memory),
            Request::Data(out) => self.data(&out, arrived.data),
            Request::Task(task) => {
                tokio_uring::spawn(self.clone().manage(task));
            }
        }
        Next::GoOn
    }

    fn reject(&self, header: &Header, reason: RejectReason) -> Next {
        tracing::debug!(peer = %self.entrance.peer, opcode = header.opcode(), ?reason, "a PDU is rejected");
        self.outbox.push(Reject(reason).encode(self.numbers.with_status()), &header.0);
        Next::GoOn
    }

    /// The data's digest is wrong: the PDU is rejected, and the command that they belong to ends (7.8, at error recovery level 0).
    fn unsound(&self, header: &Header, request: &Request) -> Next {
        let next = self.reject(header, RejectReason::DataDigest);
        match request {
            Request::Command(command) => self.fail(command.tag, command.expected, 0, Flaw::Digest),
            Request::Data(out) => {
                let collecting = self.collecting.borrow_mut().remove(&out.tag);
                if let Some((write, ..)) = collecting {
                    self.numbers.end();
                    self.fail(out.tag, write.command.expected, write.wishes(), Flaw::Digest);
                }
            }
            _ => {}
        }
        next
    }

    /// A command whose data are flawed.
    fn fail(&self, tag: u32, expected: u32, data_count: u32, flaw: Flaw) {
        let (code, qualifier) = flaw.sense();
        // Fixed format, current error, ABORTED COMMAND (SPC-4, 4.5.3).
        let sense = [0x70, 0, 0x0B, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0];
        let residual = Residual::of(expected, 0, 0);
        self.respond(ScsiResponse { tag, response: 0, status: 0x02, data_count, residual }, &sense);
    }

    fn respond(&self, response: ScsiResponse, sense: &[u8]) {
        let header = response.encode(self.numbers.with_status());
        if sense.is_empty() {
            return self.outbox.push(header, &[]);
        }
        let mut data = Vec::with_capacity(2 + sense.len());
        data.extend_from_slice(&(sense.len() as u16).to_be_bytes());
        data.extend_from_slice(sense);
        self.outbox.push(header, &data);
    }

    fn nop(&self, nop: &NopOut, data: &[u8]) {
        if nop.tag == NO_TAG {
            return;
        }
        let most = data.len().min(self.agreed.initiator_segment as usize);
        let answer = NopIn { lun: nop.lun, tag: nop.tag, transfer_tag: NO_TAG };
        self.outbox.push(answer.encode(self.numbers.with_status()), &data[..most]);
    }

    fn log_out(&self, logout: &LogoutRequest) -> Next {
        let response = match logout.reason {
            0 => 0,
            1 if logout.connection == self.connection => 0,
            1 => 1,
            _ => 2,
        };
        let answer = LogoutResponse { tag: logout.tag, response };
        if response == 0 {
            return Next::LogOut(answer);
        }
        self.outbox.push(answer.encode(self.numbers.with_status()), &[]);
        Next::GoOn
    }

    /// There is no memory for the command: the initiator may try again (SAM-5, 5.3.1).
    fn refuse(&self, command: &ScsiCommand) {
        /// Status TASK SET FULL.
        const FULL: u8 = 0x28;
        let residual = Residual::of(command.expected, 0, 0);
        self.respond(ScsiResponse { tag: command.tag, response: 0, status: FULL, data_count: 0, residual }, &[]);
    }

    fn command(self: &Rc<Self>, header: &Header, command: ScsiCommand, data: Data<'_>, memory: Option<Memory>) -> Next {
        let is_known =
            self.collecting.borrow().contains_key(&command.tag) || self.running.borrow().contains(&command.tag);
        if is_known || command.tag == NO_TAG {
            return self.reject(header, RejectReason::TaskInProgress);
        }
        // Immediate commands are outside of the window, but not beyond what this target takes (4.2.2.1).
        if header.is_immediate() && self.numbers.active() >= DEPTH {
            return self.reject(header, RejectReason::ImmediateCommand);
        }
        self.commands.set(self.commands.get() + 1);
        if command.reads && command.writes && command.expected > 0 {
            // Data both ways at once: no command of ours has them.
            let residual = Residual::of(command.expected, 0, 0);
            self.respond(ScsiResponse { tag: command.tag, response: 1, status: 0, data_count: 0, residual }, &[]);
            return Next::GoOn;
        }
        if !command.writes {
            if data.len() > 0 {
                self.fail(command.tag, command.expected, 0, Flaw::Unexpected);
                return Next::GoOn;
            }
            self.numbers.begin();
            self.start(Job { command, task: self.enter(&command), memory: None, wishes: 0 });
            return Next::GoOn;
        }
        let length = (command.expected as usize).min(LONGEST_TRANSFER);
        let memory = match memory {
            Some(memory) => memory,
            None if length == 0 => Memory::nothing(),
            None => {
                self.refuse(&command);
                return Next::GoOn;
            }
        };
        match Collecting::begin(command, data, &self.agreed, memory.first(length)) {
            Err(flaw) => self.fail(command.tag, command.expected, 0, flaw),
            Ok(write) => {
                self.numbers.begin();
                self.go_on(write, self.enter(&command), memory);
            }
        }
        Next::GoOn
    }

    /// Takes a command's place in the task set of its unit.
    fn enter(&self, command: &ScsiCommand) -> Task {
        let attribute = match command.attribute {
            2 => TaskAttribute::Ordered,
            3 => TaskAttribute::HeadOfQueue,
            4 => TaskAttribute::Aca,
            // Untagged (0), simple (1); 5 to 7 are reserved.
            _ => TaskAttribute::Simple,
        };
        let target = self.target.as_ref().expect("a discovery session has no commands");
        target.units.enter(self.nexus, Lun::from_sam(command.lun), command.tag.into(), attribute)
    }

    fn data(self: &Rc<Self>, out: &DataOut, data: Data<'_>) {
        // Data of a command that has ended meanwhile are taken and forgotten.
        let found = self.collecting.borrow_mut().remove(&out.tag);
        let Some((mut write, task, memory)) = found else { return };
        match write.take(out, data) {
            Ok(()) => self.go_on(write, task, memory),
            Err(flaw) => {
                tracing::info!(peer = %self.entrance.peer, ?flaw, "the data of a write are flawed");
                self.numbers.end();
                self.fail(out.tag, write.command.expected, write.wishes(), flaw);
            }
        }
    }

    /// Asks for more data, or starts a command whose data are complete.
    fn go_on(self: &Rc<Self>, mut write: Collecting, task: Task, memory: Memory) {
        // One that was aborted meanwhile ends at once, with an answer if there is to be one.
        if write.is_complete() || task.is_aborted() {
            return self.start(Job { command: write.command, task, memory: Some(memory), wishes: write.wishes() });
        }
        while let Some(wish) = write.wish(self.transfer_tag()) {
            let ready = ReadyToTransfer {
                lun: write.command.lun,
                tag: write.command.tag,
                transfer_tag: wish.transfer_tag,
                number: wish.number,
                offset: wish.offset,
                length: wish.length,
            };
            self.outbox.push(ready.encode(self.numbers.without_status()), &[]);
        }
        self.collecting.borrow_mut().insert(write.command.tag, (write, task, memory));
    }

    /// Ends writes that were aborted while their data were awaited.
    fn purge(self: &Rc<Self>) {
        let aborted: Vec<u32> = self
            .collecting
            .borrow()
            .iter()
            .filter(|(_, (_, task, _))| task.is_aborted())
            .map(|(tag, _)| *tag)
            .collect();
        for tag in aborted {
            let found = self.collecting.borrow_mut().remove(&tag);
            if let Some((write, task, memory)) = found {
                self.go_on(write, task, memory);
            }
        }
    }

    async fn manage(self: Rc<Self>, request: TaskRequest) {
        /// Response codes (11.6.1).
        const COMPLETE: u8 = 0;
        const NO_TASK: u8 = 1;
        const NO_LUN: u8 = 2;
        const NO_REASSIGNMENT: u8 = 4;
        const NOT_SUPPORTED: u8 = 5;
        let Some(target) = &self.target else { return };
        let lun = Lun::from_sam(request.lun);
        let function = match request.function {
            1 => Ok(TaskManagement::AbortTask { lun, tag: request.referenced.into() }),
            2 => Ok(TaskManagement::AbortTaskSet { lun }),
            3 => Ok(TaskManagement::ClearAca { lun }),
            4 => Ok(TaskManagement::ClearTaskSet { lun }),
            5 => Ok(TaskManagement::LogicalUnitReset { lun }),
            6 | 7 => Ok(TaskManagement::TargetReset),
            8 => Err(NO_REASSIGNMENT),
            _ => Err(NOT_SUPPORTED),
        };
        let response = match function {
            Err(refusal) => refusal,
            Ok(function) => match target.units.manage(self.nexus, function).await {
                TaskManagementResponse::Complete | TaskManagementResponse::Succeeded => COMPLETE,
                TaskManagementResponse::TaskDoesNotExist => NO_TASK,
                TaskManagementResponse::IncorrectLun => NO_LUN,
            },
        };
        self.purge();
        let answer = TaskManagementAnswer { tag: request.tag, response };
        self.outbox.push(answer.encode(self.numbers.with_status()), &[]);
        // A cold reset takes all sessions of the target along (11.5.1).
        if request.function == 7 && response == COMPLETE {
            for session in self.server.sessions() {
                if session.uses(target) {
                    session.hang_up();
                }
            }
        }
    }

    /// Closes the connection once everything was sent.
    fn hang_up(&self) {
        self.outbox.close();
    }
}

/// Lets the other tasks of the thread go first, without a look at the sockets.
async fn others_first() {
    let mut went = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut went, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
