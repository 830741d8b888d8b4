//! Owns: a mount's side of vmfs-lockd: the connection that comes back by itself, and a [`SlotKeeper`] on top of it.
//! Promises: nothing here blocks the metadata actor; while the daemon is away nothing is renewed and the gate closes by itself; when it
//! is back it is told what this mount has. Must not know: how slots are renewed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant as Moment};

use parking_lot::{Condvar, Mutex};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown, socket_with, sockopt,
};
use vmfs_core::cas::CellIo;
use vmfs_core::env::{Instant, LocalFuture};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::heartbeat::SlotState;
use vmfs_core::keeper::{Joining, Kept, SlotKeeper, adopt_joined, watch_renewed_elsewhere};
use vmfs_core::lun::Lun;
use vmfs_core::slot::{self, OwnSlot};
use vmfs_core::units::{CellAddress, Generation, LunIndex, SlotId, SlotRef};
use vmfs_core::window::MemberLun;

use super::messages::{Ask, Id, LunPlace, MountIdentity, Tell, Times, VERSION};
use crate::gate_memory::SharedGateMemory;
use crate::protocol::{decode, encode};
use crate::rights;

/// How long the daemon may take for the first word, and for an answer that needs the storage.
const GREETING: Duration = Duration::from_secs(3);
const ANSWER: Duration = Duration::from_secs(60);
/// Between two attempts to find the daemon again.
const RECONNECT_EVERY: Duration = Duration::from_millis(100);

/// The connection of one mount to the daemon; it ends when this is dropped.
pub struct Link(Arc<Shared>);

struct Shared {
    path: PathBuf,
    gate: Arc<SharedGateMemory>,
    program: String,
    state: Mutex<State>,
    changed: Condvar,
    /// An incarnation is over on some LUN.
    news: tokio::sync::Notify,
    /// One request at a time.
    asking: Mutex<()>,
}

#[derive(Default)]
struct State {
    socket: Option<Arc<OwnedFd>>,
    away_since: Option<Moment>,
    mount: Option<MountIdentity>,
    /// What to take up again after the daemon was away: the requests that say so.
    slots: BTreeMap<u8, Ask>,
    answer: Option<Tell>,
    over: BTreeMap<u8, (bool, String)>,
    ended: bool,
}

/// Why a request has no answer.
enum NoAnswer {
    /// The daemon is away, or went away before it answered.
    Away(String),
    /// It refused.
    Refused(FsError),
}

impl Link {
    /// Connects to the daemon at `path`. `program` is what the mount is called in its reports.
    pub fn start(path: &Path, gate: Arc<SharedGateMemory>, program: String) -> io::Result<Link> {
        let socket = greet(path)?;
        let state = Mutex::new(State { socket: Some(Arc::new(socket)), ..State::default() });
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            gate,
            program,
            state,
            changed: Condvar::new(),
            news: tokio::sync::Notify::new(),
            asking: Mutex::new(()),
        });
        let listening = shared.clone();
        std::thread::Builder::new().name("vmfs-keeper".to_owned()).spawn(move || listening.listen())?;
        Ok(Link(shared))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ended = true;
        if let Some(socket) = state.socket.take() {
            // Both ends know already when it fails.
            let _ = shutdown(&*socket, Shutdown::Both);
        }
    }
}

/// Facts of the daemon at `path`, for its command.
pub fn status(path: &Path) -> io::Result<serde_json::Value> {
    let socket = greet(path)?;
    match ask_on(&socket, &Ask::Status)? {
        Tell::Facts { value } => Ok(value),
        other => Err(io::Error::other(format!("an answer to another question: {other:?}"))),
    }
}

fn greet(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(GREETING))?;
    match ask_on(&socket, &Ask::Hello { version: VERSION })? {
        Tell::Welcome { version: VERSION } => {}
        Tell::Refused { message, .. } => return Err(io::Error::other(message)),
        other => return Err(io::Error::other(format!("an answer to another question: {other:?}"))),
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, None)?;
    Ok(socket)
}

/// Asks on a connection on which nothing comes unasked yet.
fn ask_on(socket: &OwnedFd, ask: &Ask) -> io::Result<Tell> {
    rights::send(socket, &encode(ask), &[])?;
    let mut buffer = Vec::new();
    match rights::receive(socket, &mut buffer)? {
        Some(_) => decode(&buffer).map_err(io::Error::other),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "vmfs-lockd has closed the connection")),
    }
}

impl Shared {
    /// Hears what the daemon says, and looks for it when it is away, until the mount ends.
    fn listen(&self) {
        let mut buffer = Vec::new();
        loop {
            let socket = self.state.lock().socket.clone();
            if let Some(socket) = socket {
                while let Ok(Some(_)) = rights::receive(&*socket, &mut buffer) {
                    match decode(&buffer) {
                        Ok(tell) => self.heard(tell),
                        Err(error) => tracing::warn!("vmfs-lockd: {error}"),
                    }
                }
                let mut state = self.state.lock();
                if state.ended {
                    return;
                }
                tracing::error!(
                    "vmfs-lockd at {} is away: leases are not renewed, writing stops before they end, until it is back",
                    self.path.display()
                );
                state.socket = None;
                state.away_since = Some(Moment::now());
                self.changed.notify_all();
            }
            std::thread::sleep(RECONNECT_EVERY);
            if self.state.lock().ended {
                return;
            }
            match self.reconnect() {
                Ok(()) => tracing::warn!("vmfs-lockd at {} is back", self.path.display()),
                Err(error) => tracing::debug!("vmfs-lockd at {}: {error}", self.path.display()),
            }
        }
    }

    fn heard(&self, tell: Tell) {
        let mut state = self.state.lock();
        match tell {
            Tell::Over { lun, rolled_back, message } => {
                state.slots.remove(&lun);
                state.over.insert(lun, (rolled_back, message));
                self.news.notify_waiters();
            }
            answer => state.answer = Some(answer),
        }
        self.changed.notify_all();
    }

    /// Finds the daemon and tells it what this mount has.
    fn reconnect(&self) -> io::Result<()> {
        let socket = greet(&self.path)?;
        let (mount, slots): (_, Vec<Ask>) = {
            let state = self.state.lock();
            (state.mount.clone(), state.slots.values().cloned().collect())
        };
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(GREETING))?;
        if let Some(mount) = mount {
            self.expect(&socket, &Ask::Attach { mount }, &[self.gate.descriptor()], &Tell::Attached)?;
            for resume in slots {
                self.expect(&socket, &resume, &[], &Tell::Resumed)?;
            }
        }
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, None)?;
        let mut state = self.state.lock();
        state.away_since = None;
        if !state.ended {
            state.socket = Some(Arc::new(socket));
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Asks, and hears what comes unasked before the answer.
    fn expect(&self, socket: &OwnedFd, ask: &Ask, gate: &[BorrowedFd<'_>], expected: &Tell) -> io::Result<()> {
        rights::send(socket, &encode(ask), gate)?;
        let mut buffer = Vec::new();
        loop {
            if rights::receive(socket, &mut buffer)?.is_none() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "vmfs-lockd has closed the connection"));
            }
            match decode(&buffer).map_err(io::Error::other)? {
                over @ Tell::Over { .. } => self.heard(over),
                answer if answer == *expected => return Ok(()),
                other => return Err(io::Error::other(format!("an answer to another question: {other:?}"))),
            }
        }
    }

    /// Asks the daemon and waits for its answer. Blocks: never called on the actor's thread.
    fn ask(&self, ask: &Ask, gate: &[BorrowedFd<'_>]) -> Result<Tell, NoAnswer> {
        let _one = self.asking.lock();
        let away = |why: &str| NoAnswer::Away(format!("vmfs-lockd at {} {why}", self.path.display()));
        let mut state = self.state.lock();
        let Some(socket) = state.socket.clone() else { return Err(away("is away")) };
        state.answer = None;
        drop(state);
        rights::send(&*socket, &encode(ask), gate).map_err(|error| away(&format!("cannot be asked: {error}")))?;
        let deadline = Moment::now() + ANSWER;
        let mut state = self.state.lock();
        loop {
            match state.answer.take() {
                Some(Tell::Refused { errno, message }) => {
                    return Err(NoAnswer::Refused(FsError::refused(kind_of(errno), message)));
                }
                Some(answer) => return Ok(answer),
                None => {}
            }
            if !state.socket.as_ref().is_some_and(|now| Arc::ptr_eq(now, &socket)) {
                return Err(away("went away before it answered"));
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                // An answer that comes later must not be taken for another one's.
                let _ = shutdown(&*socket, Shutdown::Both);
                return Err(away(&format!("did not answer within {ANSWER:?}")));
            }
        }
    }

    /// Attaches at the first join, then joins.
    fn join(&self, mount: MountIdentity, place: LunPlace, lease: Times, prefer: Option<u8>) -> Result<Tell, NoAnswer> {
        let attached = self.state.lock().mount.is_some();
        if !attached {
            self.ask(&Ask::Attach { mount: mount.clone() }, &[self.gate.descriptor()])?;
            self.state.lock().mount = Some(mount);
        }
        let is_file = place.window.is_none() && !place.path.contains("://");
        let path = if is_file { absolute(&place.path) } else { place.path };
        let lun = LunPlace { path, ..place };
        let told = self.ask(&Ask::Join { lun: lun.clone(), lease, prefer }, &[])?;
        if let Tell::Joined { slot, generation, .. } = told {
            let index = lun.index;
            self.state.lock().slots.insert(index, Ask::Resume { lun, lease, slot, generation });
        }
        Ok(told)
    }

    fn is_over(&self, lun: LunIndex) -> Option<FsError> {
        let (rolled_back, message) = self.state.lock().over.get(&lun.get()).cloned()?;
        tracing::error!("{message}");
        Some(if rolled_back { FsError::refused(FsErrorKind::Stale, message) } else { FsError::Fenced { lun } })
    }
}

/// The same file from any working directory.
fn absolute(path: &str) -> String {
    match std::fs::canonicalize(path) {
        Ok(path) => path.to_string_lossy().into_owned(),
        // The daemon says what is wrong with it.
        Err(_) => path.to_owned(),
    }
}

fn kind_of(errno: i32) -> FsErrorKind {
    match errno {
        libc::EBUSY => FsErrorKind::Busy,
        libc::EINVAL => FsErrorKind::Invalid,
        libc::ENOENT => FsErrorKind::NotFound,
        libc::EPERM => FsErrorKind::NotPermitted,
        libc::EOPNOTSUPP => FsErrorKind::Unsupported,
        libc::EROFS => FsErrorKind::ReadOnly,
        _ => FsErrorKind::Io,
    }
}

impl NoAnswer {
    fn into_error(self) -> FsError {
        match self {
            NoAnswer::Refused(error) => error,
            NoAnswer::Away(why) => {
                FsError::refused(FsErrorKind::Io, format!("{why}; start it, or mount with -o lockd=no"))
            }
        }
    }
}

/// Runs what blocks off the actor's thread.
async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NoAnswer> + Send + 'static,
) -> Result<T, NoAnswer> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| Err(NoAnswer::Refused(FsError::refused(FsErrorKind::Io, error.to_string()))))
}

impl SlotKeeper for Link {
    fn describe(&self) -> String {
        let path = self.0.path.display();
        match self.0.state.lock().away_since {
            None => format!("vmfs-lockd at {path}"),
            Some(since) => {
                let seconds = since.elapsed().as_secs();
                format!("vmfs-lockd at {path}, which is away since {seconds} s: no lease is renewed until it is back")
            }
        }
    }

    fn join<'a>(&'a self, joining: Joining<'a>) -> LocalFuture<'a, Result<OwnSlot, FsError>> {
        Box::pin(async move {
            let context = joining.io.context();
            let mount = MountIdentity {
                volume: Id(context.volume),
                cell_bytes: context.cell_size.bytes() as u32,
                incarnation: joining.incarnation,
                host: Id(joining.identity.host),
                boot: Id(joining.identity.boot),
                host_name: joining.identity.name.clone(),
                program: self.0.program.clone(),
            };
            let path = joining.lun.name().to_owned();
            let window = joining.lun.as_member().and_then(MemberLun::window).map(|window| window.at.into());
            let place = LunPlace { index: joining.index.get(), uuid: Id(joining.lun_uuid), path, window };
            let (shared, lease, prefer) = (self.0.clone(), joining.lease.into(), joining.prefer.map(|slot| slot.0));
            let told = off_thread(move || shared.join(mount, place, lease, prefer)).await;
            match told.map_err(NoAnswer::into_error)? {
                Tell::Joined { slot, generation, lease_until } => {
                    let slot = SlotRef { slot: SlotId(slot), generation: Generation(generation) };
                    adopt_joined(&joining, slot, Instant(lease_until)).await
                }
                other => Err(FsError::refused(FsErrorKind::Io, format!("vmfs-lockd answered {other:?}"))),
            }
        })
    }

    fn keep<'a>(&'a self, kept: Kept<'a>) -> LocalFuture<'a, Option<FsError>> {
        let lun = kept.member.index;
        Box::pin(async move {
            let mut watched = pin!(watch_renewed_elsewhere(kept));
            loop {
                let mut news = pin!(self.0.news.notified());
                news.as_mut().enable();
                if let Some(error) = self.0.is_over(lun) {
                    return Some(error);
                }
                tokio::select! {
                    ended = &mut watched => {
                        // Nothing is to be taken up again.
                        self.0.state.lock().slots.remove(&lun.get());
                        return ended;
                    }
                    () = news => {}
                }
            }
        })
    }

    fn moved(&self, lun: LunIndex, window: CellAddress) {
        if let Some(Ask::Resume { lun: place, .. }) = self.0.state.lock().slots.get_mut(&lun.get()) {
            place.window = Some(window.into());
        }
    }

    fn leave<'a>(
        &'a self,
        io: &'a CellIo,
        lun: &'a Rc<dyn Lun>,
        own: &'a mut OwnSlot,
        clean: bool,
    ) -> LocalFuture<'a, Result<(), FsError>> {
        Box::pin(async move {
            let index = own.lun.get();
            self.0.state.lock().slots.remove(&index);
            let shared = self.0.clone();
            match off_thread(move || shared.ask(&Ask::Leave { lun: index, clean }, &[])).await {
                Ok(_) => Ok(()),
                Err(NoAnswer::Refused(error)) => Err(error),
                Err(NoAnswer::Away(why)) => {
                    tracing::warn!(lun = lun.name(), "{why}: the mount leaves its slot by itself");
                    leave_alone(io, lun, own, clean).await
                }
            }
        })
    }
}

/// Leaves a slot that the daemon may have left already before it went away.
async fn leave_alone(io: &CellIo, lun: &Rc<dyn Lun>, own: &mut OwnSlot, clean: bool) -> Result<(), FsError> {
    let left = slot::leave(io, lun, own, clean).await;
    if !matches!(&left, Err(error) if error.kind() == FsErrorKind::Fenced) {
        return left;
    }
    let (_, found) = slot::read_slot(io, lun, own.lun, own.slot.slot).await?;
    let as_asked = if clean { SlotState::Free } else { SlotState::Dirty };
    if found.generation == own.slot.generation && found.state == as_asked { Ok(()) } else { left }
}
