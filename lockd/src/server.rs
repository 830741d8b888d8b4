//! Owns: the listener of the mount's Unix socket, its connections and the path of the socket.
//! Promises: only root and the daemon's own user are answered; a stale socket is replaced, a live one never; at most
//!   [`MAX_CONNECTIONS`] connections, each with one request at a time.
//! Must not know: what a volume does with a request ([`Service`]).
//!
//! The socket lies at `BASE/VOLUME/HOST.sock`, with `BASE` = `/run/vmfs` for root, else `$XDG_RUNTIME_DIR/vmfs`, else
//! `TMPDIR/vmfs-UID`. A second mount of one volume under the same host UUID takes `HOST.2.sock` and so on. Clients need not know:
//! they learn the path by ioctl.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, shutdown,
    socket_with, sockopt::socket_peercred,
};
use vmfs_core::units::Uuid;

use crate::protocol::{
    AdminRequest, Answer, Attachment, PROTOCOL_VERSION, Pass, Recall, Request, Ticket, decode, encode,
};
use crate::rights;

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 512;
/// Most mounts of one volume under one host UUID whose sockets are looked for.
const MAX_NUMBER: u32 = 64;

/// Names a connection for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// Why a request is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// errno(3).
    pub errno: i32,
    /// Object, cause, next step.
    pub message: String,
}

/// What the mount does for its clients. Called on the connection's thread, so it may block.
pub trait Service: Send + Sync + 'static {
    /// Volume and host.
    fn identity(&self) -> (Uuid, Uuid);
    /// Lets `client` use the open disk; gives the gate page (read only), the revoke eventfd and the client's recall eventfd.
    fn attach(&self, client: ClientId, ticket: Ticket) -> Result<(Attachment, [OwnedFd; 3]), Refusal>;
    /// Hears that `client` has let go of a recalled range (0: of none); gives the range that is wanted now.
    fn recalled(&self, client: ClientId, ticket: Ticket, let_go: u64) -> Result<Option<Recall>, Refusal>;
    /// A data descriptor for `client`, with its drain lock held and the slot read live afterwards.
    fn open_lun(&self, client: ClientId, ticket: Ticket, lun: u8) -> Result<OwnedFd, Refusal>;
    /// Lends `client` a session with a LUN: its number, and what it is opened by.
    fn open_session(&self, client: ClientId, ticket: Ticket, lun: u8) -> Result<(u64, Pass), Refusal>;
    /// The session is made, leads to `place`, and is registered: the slot is read live afterwards.
    fn confirm_session(
        &self,
        client: ClientId,
        ticket: Ticket,
        lun: u8,
        session: u64,
        place: Option<String>,
    ) -> Result<(), Refusal>;
    /// Carries out an administrative request and tells how far it is, in bytes.
    fn administer(&self, what: AdminRequest, progress: &mut dyn FnMut(u64, u64)) -> Result<serde_json::Value, Refusal>;
    /// The connection has ended.
    fn gone(&self, client: ClientId);
}

/// A listening socket; dropping it closes every connection and removes the socket's file.
pub struct Server {
    path: PathBuf,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

struct Shared {
    listener: OwnedFd,
    service: Arc<dyn Service>,
    connections: Mutex<Vec<(ClientId, Arc<OwnedFd>)>>,
}

impl Server {
    /// Listens for the clients of `service` at the volume's and host's path.
    pub fn start(service: Arc<dyn Service>) -> io::Result<Server> {
        Server::start_below(&base_folder(), service)
    }

    /// Listens at `base`/VOLUME/HOST.sock.
    pub fn start_below(base: &Path, service: Arc<dyn Service>) -> io::Result<Server> {
        let (volume, host) = service.identity();
        let folder = base.join(volume.to_string());
        make_private(base)?;
        make_private(&folder)?;
        let (path, listener) = bind_in(&folder, host)?;
        let shared = Arc::new(Shared { listener, service, connections: Mutex::new(Vec::new()) });
        let accepting = shared.clone();
        let listening =
            std::thread::Builder::new().name("vmfs-socket".to_owned()).spawn(move || accept_all(&accepting))?;
        Ok(Server { path, shared, listening: Some(listening) })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The file goes first: from here on nobody finds a socket that does not answer.
        let _ = fs::remove_file(&self.path);
        let _ = shutdown(&self.shared.listener, Shutdown::Both);
        for (_, socket) in self.shared.connections.lock().iter() {
            let _ = shutdown(socket, Shutdown::Both);
        }
        if let Some(thread) = self.listening.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the socket {} panicked", self.path.display());
        }
    }
}

pub(crate) fn base_folder() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/vmfs");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder).join("vmfs"),
        None => std::env::temp_dir().join(format!("vmfs-{}", rustix::process::geteuid().as_raw())),
    }
}

/// Makes a folder that only this user can use, or checks that it is one.
pub(crate) fn make_private(folder: &Path) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other.map_err(named),
    }
    let metadata = fs::symlink_metadata(folder).map_err(named)?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    if metadata.is_dir() && own && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    let text = format!("{} is not a folder that only this user can write: remove it", folder.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

fn bind_in(folder: &Path, host: Uuid) -> io::Result<(PathBuf, OwnedFd)> {
    // One process at a time looks for stale sockets and binds.
    let lock = File::options().create(true).truncate(false).write(true).open(folder.join("lock"))?;
    lock_for_a_while(&lock)?;
    for number in 1..=MAX_NUMBER {
        let name = if number == 1 { format!("{host}.sock") } else { format!("{host}.{number}.sock") };
        let path = folder.join(name);
        let address = SocketAddrUnix::new(&path)?;
        if path.exists() {
            let probe = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            match connect(&probe, &address) {
                Err(rustix::io::Errno::CONNREFUSED) => fs::remove_file(&path)?,
                _ => continue,
            }
        }
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        bind(&listener, &address)?;
        listen(&listener, 64)?;
        return Ok((path, listener));
    }
    let text = format!("{}: {MAX_NUMBER} mounts of this host listen there already", folder.display());
    Err(io::Error::new(io::ErrorKind::AddrInUse, text))
}

fn lock_for_a_while(lock: &File) -> io::Result<()> {
    for _ in 0..500 {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(std::time::Duration::from_millis(10)),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "another mount has held the lock of the socket's folder for 5 seconds"))
}

fn accept_all(shared: &Arc<Shared>) {
    let mut next = 1;
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let socket = match accept_with(&shared.listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM) => {
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
            Err(_) => break,
        };
        threads.retain(|thread| !thread.is_finished());
        if !is_allowed(&socket) || threads.len() >= MAX_CONNECTIONS {
            let answer =
                refused(libc::EACCES, "the socket is for root and the user that mounted, with few connections");
            let _ = rights::send(&socket, &encode(&answer), &[]);
            continue;
        }
        let client = ClientId(next);
        next += 1;
        let socket = Arc::new(socket);
        shared.connections.lock().push((client, socket.clone()));
        let serving = shared.clone();
        let spawned = std::thread::Builder::new().name(format!("vmfs-client-{next}")).spawn(move || {
            serve(&*serving.service, client, &socket);
            serving.service.gone(client);
            serving.connections.lock().retain(|(id, _)| *id != client);
        });
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                tracing::warn!("no thread for a client: {error}");
                shared.connections.lock().retain(|(id, _)| *id != client);
            }
        }
    }
    for (_, socket) in shared.connections.lock().iter() {
        let _ = shutdown(socket, Shutdown::Both);
    }
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("the thread of a client panicked");
        }
    }
}

pub(crate) fn is_allowed(socket: &OwnedFd) -> bool {
    let own = rustix::process::geteuid();
    socket_peercred(socket).is_ok_and(|peer| peer.uid.is_root() || peer.uid == own)
}

fn refused(errno: i32, message: impl Into<String>) -> Answer {
    Answer::Refused { errno, message: message.into() }
}

/// Answers the requests of one connection until it ends.
fn serve(service: &dyn Service, client: ClientId, socket: &OwnedFd) {
    let mut buffer = Vec::new();
    let mut greeted = false;
    // An error of the socket ends the connection, as its end does.
    while let Ok(Some(_)) = rights::receive(socket, &mut buffer) {
        let (answer, descriptors) = match decode::<Request>(&buffer) {
            Err(message) => (refused(libc::EPROTO, message), vec![]),
            Ok(Request::Hello { version }) => {
                greeted = version == PROTOCOL_VERSION;
                (welcome(service, version), vec![])
            }
            Ok(_) if !greeted => (refused(libc::EPROTO, "the first request must be hello"), vec![]),
            Ok(request) => carry_out(service, client, socket, request),
        };
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let bytes = encode(&answer);
        let sent = if bytes.len() > rights::MAX_MESSAGE {
            let answer = refused(libc::EMSGSIZE, "the answer is too long for one message; ask for less");
            rights::send(socket, &encode(&answer), &[])
        } else {
            rights::send(socket, &bytes, &borrowed)
        };
        if sent.is_err() {
            return;
        }
    }
}

fn welcome(service: &dyn Service, version: u32) -> Answer {
    if version != PROTOCOL_VERSION {
        let text = format!(
            "the mount speaks version {PROTOCOL_VERSION}, the client version {version}: use one release for both"
        );
        return refused(libc::EPROTO, text);
    }
    let (volume, host) = service.identity();
    Answer::Welcome { version: PROTOCOL_VERSION, volume: volume.to_string(), host: host.to_string() }
}

fn carry_out(service: &dyn Service, client: ClientId, socket: &OwnedFd, request: Request) -> (Answer, Vec<OwnedFd>) {
    let done = match request {
        Request::Hello { .. } => return (refused(libc::EPROTO, "hello was said"), vec![]),
        Request::Attach { ticket } => service
            .attach(client, ticket)
            .map(|(attachment, descriptors)| (Answer::Attached { attachment }, descriptors.into())),
        Request::Recalled { ticket, let_go } => {
            service.recalled(client, ticket, let_go).map(|recall| (Answer::Recalled { recall }, vec![]))
        }
        Request::OpenLun { ticket, lun } => {
            service.open_lun(client, ticket, lun).map(|descriptor| (Answer::LunOpened, vec![descriptor]))
        }
        Request::OpenSession { ticket, lun } => service
            .open_session(client, ticket, lun)
            .map(|(session, pass)| (Answer::SessionOpened { session, pass }, vec![])),
        Request::ConfirmSession { ticket, lun, session, place } => {
            service.confirm_session(client, ticket, lun, session, place).map(|()| (Answer::SessionConfirmed, vec![]))
        }
        Request::Administer { what } => {
            let mut tell = |done, total| {
                // A client that does not listen any more is noticed at the final answer.
                let _ = rights::send(socket, &encode(&Answer::Progress { done, total }), &[]);
            };
            service.administer(what, &mut tell).map(|value| (Answer::Done { value }, vec![]))
        }
    };
    done.unwrap_or_else(|refusal| (refused(refusal.errno, refusal.message), vec![]))
}

#[cfg(test)]
mod tests;
