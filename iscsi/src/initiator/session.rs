//! Owns: what the threads of one session share: its connection, its tasks, who sleeps and who receives.
//! Promises: the receiving half is always with somebody who waits, if anybody does; what was sent on a lost connection ends as lost.
//! Must not know: how connections come about; what commands mean.
//!
//! A command may also be a future, which belongs to no thread (`asynchronous`): then a future that drives the session receives, if no
//! thread does.
//!
//! There is no receiving thread: whoever waits for an answer and finds the receiving half free takes it, serves others along with itself,
//! and passes it on when its own answer is there. Who receives never sends, so that a target that first wants its own data taken
//! cannot bring the session to a standstill.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::task::Waker;
use std::thread::Thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::Semaphore;

use super::connect::Connection;
use super::error::Broken;
use super::inbox::Inbox;
use super::landing::Landing;
use super::options::Options;
use super::outgoing::Outgoing;
use super::tasks::{Tasks, Work};

/// Pings of the target that wait for an answer; one that sends more is not in its right mind.
const MOST_PINGS: usize = 16;

/// Slots that futures leave to threads, if there are so many.
const LEFT_TO_THREADS: usize = 4;

/// Whether there is a connection.
pub(super) enum Link {
    Up(Arc<TcpStream>),
    /// Since when, why, and whether trying again makes sense before somebody changes something.
    Down {
        since: Instant,
        cause: Arc<str>,
        is_lasting: bool,
    },
}

/// How far the end of the session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Running,
    /// Its end was asked for, to be proven by then.
    Ending(Instant),
    Ended {
        is_proven: bool,
    },
    /// Its owner is gone.
    Dropped,
}

/// Whoever waits for a command.
#[derive(Clone)]
pub(super) enum Caller {
    Thread(Thread),
    Future(Waker),
}

impl Caller {
    /// Lets it look.
    pub fn wake(&self) {
        match self {
            Caller::Thread(thread) => thread.unpark(),
            Caller::Future(waker) => waker.wake_by_ref(),
        }
    }
}

/// A ping of the target.
#[derive(Clone, Copy)]
pub(super) struct Ping {
    pub lun: [u8; 8],
    pub transfer_tag: u32,
}

/// Under one lock, which is never held while anything is waited for.
pub(super) struct Core {
    pub life: Life,
    pub link: Link,
    pub epoch: u64,
    pub tasks: Tasks,
    /// The receiving half, while nobody receives.
    pub inbox: Option<Box<Inbox>>,
    /// Slots whose callers sleep.
    pub parked: u128,
    /// Slots whose callers wait for a connection, or for the target to take one more command.
    pub queued: u128,
    /// Slots that belong to futures: they never receive.
    pub unattended: u128,
    /// Slots of futures that wait until what was kept of a PDU has gone out.
    pub held_up: u128,
    /// A part of a PDU was kept.
    pub is_backed_up: bool,
    /// The future that drives the session.
    pub driver: Option<Waker>,
    /// Which of the target's portal groups the session is with, if it says so.
    pub group: Option<String>,
    callers: Vec<Option<Caller>>,
    /// When the target was last heard.
    pub heard: Instant,
    /// When it was pinged, if it has not answered.
    pub pinged: Option<Instant>,
    /// Its pings.
    pub pings: Vec<Ping>,
    /// It asks for a logout, by then.
    pub leave_by: Option<Instant>,
    /// It asks to stay away so long.
    pub stay_away: Duration,
    /// The answer to a logout.
    pub logged_out: Option<u8>,
}

/// What all threads of a session share.
pub(super) struct Shared {
    /// How messages name it.
    pub name: String,
    pub options: Options,
    pub lun: [u8; 8],
    pub core: Mutex<Core>,
    pub wire: Mutex<Outgoing>,
    pub landings: Vec<Landing>,
    /// Tells the keeper that there is something for it, and others that it has done it.
    pub changed: Condvar,
    /// Tells that a slot is free.
    room: Condvar,
    /// Futures that may have a slot: a few are left to threads.
    pub turns: Semaphore,
}

/// A request of a caller.
pub(super) struct Request<'a> {
    pub slot: usize,
    pub tag: u32,
    pub cdb: [u8; 16],
    pub reads: bool,
    pub out: Option<&'a [u8]>,
    pub expected: u32,
    pub deadline: Instant,
}

/// Gives a slot back.
pub(super) struct Slot<'a> {
    shared: &'a Shared,
    slot: usize,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut core = self.shared.core.lock();
        core.parked &= !(1 << self.slot);
        core.queued &= !(1 << self.slot);
        core.unattended &= !(1 << self.slot);
        core.held_up &= !(1 << self.slot);
        core.callers[self.slot] = None;
        core.tasks.close(self.slot);
        let next = core.pass_on();
        drop(core);
        self.shared.room.notify_one();
        if let Some(caller) = next {
            caller.wake();
        }
    }
}

impl Core {
    fn new(options: &Options) -> Self {
        let cause: Arc<str> = "there was no connection yet".into();
        Self {
            life: Life::Running,
            link: Link::Down { since: Instant::now(), cause, is_lasting: false },
            epoch: 0,
            tasks: Tasks::new(options.commands),
            inbox: None,
            parked: 0,
            queued: 0,
            unattended: 0,
            held_up: 0,
            is_backed_up: false,
            driver: None,
            group: None,
            callers: vec![None; options.commands],
            heard: Instant::now(),
            pinged: None,
            pings: Vec::with_capacity(MOST_PINGS),
            leave_by: None,
            stay_away: Duration::ZERO,
            logged_out: None,
        }
    }

    /// If nobody receives: somebody who sleeps, to be woken for it.
    pub fn pass_on(&self) -> Option<Caller> {
        let threads = self.parked & !self.unattended;
        match (&self.inbox, threads) {
            (None, _) => None,
            (Some(_), 0) if self.unattended == 0 => None,
            (Some(_), 0) => self.driver.clone().map(Caller::Future),
            (Some(_), _) => self.callers[threads.trailing_zeros() as usize].clone(),
        }
    }

    /// A future waits for something to change in its slot.
    pub fn park(&mut self, slot: usize, waker: &Waker) {
        self.callers[slot] = Some(Caller::Future(waker.clone()));
        self.parked |= 1 << slot;
    }

    /// The caller of a slot is to look: who it is, if it sleeps.
    pub fn rouse(&mut self, slot: usize) -> Option<Caller> {
        let bit = 1 << slot;
        let sleeps = self.parked & bit != 0;
        self.parked &= !bit;
        if sleeps { self.callers[slot].clone() } else { None }
    }

    /// Wakes the callers of these slots.
    pub fn rouse_all(&mut self, slots: u128) {
        let mut left = self.parked & slots;
        self.parked &= !slots;
        while left != 0 {
            if let Some(caller) = &self.callers[left.trailing_zeros() as usize] {
                caller.wake();
            }
            left &= left - 1;
        }
    }

    /// A ping of the target is to be answered.
    pub fn take_ping(&mut self, ping: Ping) -> Result<(), Broken> {
        if self.pings.len() == MOST_PINGS {
            return Err(Broken::Protocol("more pings than anybody needs"));
        }
        self.pings.push(ping);
        Ok(())
    }

    /// Why nothing can be sent for so long that commands do not wait for it.
    pub fn hopeless(&self, patience: Duration) -> Option<String> {
        match (&self.life, &self.link) {
            (Life::Running, Link::Up(_)) => None,
            (Life::Running, Link::Down { since, cause, is_lasting }) => {
                (*is_lasting || since.elapsed() >= patience).then(|| format!("there is no connection: {cause}"))
            }
            _ => Some("the session was ended".to_owned()),
        }
    }
}

impl Shared {
    pub fn new(name: String, lun: [u8; 8], options: Options) -> Self {
        Self {
            name,
            lun,
            core: Mutex::new(Core::new(&options)),
            wire: Mutex::new(Outgoing::new()),
            landings: (0..options.commands).map(|_| Landing::default()).collect(),
            changed: Condvar::new(),
            room: Condvar::new(),
            turns: Semaphore::new(options.commands.saturating_sub(LEFT_TO_THREADS).max(1)),
            options,
        }
    }

    /// The connection of this epoch cannot go on: what was sent on it and has no answer will have none.
    pub fn fail(&self, epoch: u64, broken: &Broken) {
        let mut core = self.core.lock();
        let Link::Up(stream) = &core.link else { return };
        if core.epoch != epoch {
            return;
        }
        let _ = stream.shutdown(Shutdown::Both);
        if matches!(broken, Broken::LoggedOut) || core.life == Life::Dropped {
            tracing::debug!(path = %self.name, cause = %broken, "the session has ended");
        } else {
            tracing::warn!(path = %self.name, cause = %broken, "the connection is lost");
        }
        let cause: Arc<str> = broken.to_string().into();
        core.link = Link::Down { since: Instant::now(), cause: cause.clone(), is_lasting: false };
        core.inbox = None;
        core.pinged = None;
        core.pings.clear();
        core.leave_by = None;
        core.tasks.lose_all(&cause);
        core.rouse_all(!0);
        if let Some(driver) = &core.driver {
            driver.wake_by_ref();
        }
        drop(core);
        self.changed.notify_all();
    }

    /// Passes the receiving half on, if nobody has it and anybody waits.
    pub fn pass_on(&self) {
        let next = self.core.lock().pass_on();
        if let Some(caller) = next {
            caller.wake();
        }
    }

    /// A slot for a task, waiting for one if there is none; with the task's tag.
    pub fn open(&self, work: Work, expected: u32, deadline: Instant) -> Result<(Slot<'_>, usize, u32), String> {
        let mut core = self.core.lock();
        loop {
            if let Some(cause) = core.hopeless(self.options.patience) {
                return Err(cause);
            }
            if let Some((slot, tag)) = core.tasks.open(work, expected) {
                core.callers[slot] = Some(Caller::Thread(std::thread::current()));
                return Ok((Slot { shared: self, slot }, slot, tag));
            }
            if self.room.wait_until(&mut core, deadline).timed_out() {
                return Err(super::commands::NO_PLACE.to_owned());
            }
        }
    }

    /// A slot for a future, if one is free.
    pub fn open_unattended(&self, work: Work, expected: u32) -> Result<Option<(Slot<'_>, usize, u32)>, String> {
        let mut core = self.core.lock();
        if let Some(cause) = core.hopeless(self.options.patience) {
            return Err(cause);
        }
        let Some((slot, tag)) = core.tasks.open(work, expected) else { return Ok(None) };
        core.unattended |= 1 << slot;
        Ok(Some((Slot { shared: self, slot }, slot, tag)))
    }

    /// A connection is there: commands go out over it.
    pub fn install(&self, connection: Connection) {
        let mut wire = self.wire.lock();
        let mut core = self.core.lock();
        core.epoch += 1;
        let mut inbox = connection.inbox;
        inbox.epoch = core.epoch;
        core.inbox = Some(inbox);
        core.link = Link::Up(connection.stream.clone());
        core.tasks.begin(connection.agreed, connection.sequence);
        core.heard = Instant::now();
        (core.pinged, core.leave_by, core.logged_out) = (None, None, None);
        core.stay_away = Duration::ZERO;
        (wire.epoch, wire.agreed) = (core.epoch, connection.agreed);
        wire.stream = Some(connection.stream);
        wire.forget_rest();
        core.is_backed_up = false;
        core.group = connection.group;
        core.rouse_all(!0);
        if let Some(driver) = &core.driver {
            driver.wake_by_ref();
        }
        tracing::info!(path = %self.name, "connected");
    }
}
