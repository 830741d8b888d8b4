//! Owns: the daemon's Unix socket and its connections.
//! Promises: only root and the daemon's own user are heard; one connection that says nonsense or nothing stops no other one; the end of a
//! connection is heard too. Must not know: what is done with what was heard.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};
use tokio::sync::mpsc::UnboundedSender;
use vmfs_core::error::{FsError, FsErrorKind};

use super::messages::{Ask, Tell, VERSION};
use crate::protocol::{decode, encode};
use crate::rights;
use crate::server::is_allowed;

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 256;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Client {
    /// Names the connection for as long as the daemon lives.
    pub id: u64,
    socket: Arc<OwnedFd>,
}

/// What was heard.
pub enum What {
    /// A request, with descriptors.
    Asked(Ask, Vec<OwnedFd>),
    /// The connection has ended.
    Gone,
}

/// Something that was heard.
pub struct Heard {
    /// From whom.
    pub client: Client,
    /// What.
    pub what: What,
}

impl Client {
    /// Sends a message; one that cannot be sent is dropped: the end of the connection is heard by itself.
    pub fn say(&self, tell: &Tell) {
        if let Err(error) = rights::send(&*self.socket, &encode(tell), &[]) {
            tracing::debug!(%error, "a client could not be told");
        }
    }

    /// Answers a request.
    pub fn answer(&self, answer: Result<Tell, FsError>) {
        let refused = |error: FsError| Tell::Refused { errno: error.kind().errno(), message: error.to_string() };
        self.say(&answer.unwrap_or_else(refused));
    }
}

/// Makes the socket's file in place of a stale one. The caller holds the lock of the folder: nobody else listens there.
pub fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, 64)?;
    Ok(listener)
}

/// Accepts connections for ever, each with a thread that passes on what it hears.
pub fn accept_all(listener: &OwnedFd, heard: &UnboundedSender<Heard>) {
    let connections = Arc::new(AtomicUsize::new(0));
    for id in 1.. {
        let socket = loop {
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => break Arc::new(socket),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!("the socket: {}; trying again", io::Error::from(error));
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        };
        let client = Client { id, socket };
        let refuse = |message: &str| {
            client.answer(Err(FsError::refused(FsErrorKind::NotPermitted, message)));
        };
        if !is_allowed(&client.socket) {
            refuse("the socket is for root and the user of vmfs-lockd");
            continue;
        }
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            refuse("vmfs-lockd has too many connections");
            continue;
        }
        let (heard, counted, client) = (heard.clone(), connections.clone(), client);
        let spawned = std::thread::Builder::new().name(format!("lockd-{id}")).spawn(move || {
            listen_to(&client, &heard);
            counted.fetch_sub(1, Ordering::Relaxed);
            // The daemon ends when nobody receives any more.
            let _ = heard.send(Heard { client, what: What::Gone });
        });
        if let Err(error) = spawned {
            connections.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("no thread for a connection: {error}");
        }
    }
}

/// Passes on the requests of one connection until it ends.
fn listen_to(client: &Client, heard: &UnboundedSender<Heard>) {
    let mut buffer = Vec::new();
    let mut greeted = false;
    let refuse = |message: String| client.answer(Err(FsError::refused(FsErrorKind::Invalid, message)));
    // An error of the socket ends the connection, as its end does.
    while let Ok(Some(descriptors)) = rights::receive(&*client.socket, &mut buffer) {
        match decode::<Ask>(&buffer) {
            Err(message) => refuse(message),
            Ok(Ask::Hello { version }) if version != VERSION => refuse(format!(
                "vmfs-lockd speaks version {VERSION}, the client version {version}: use one release for both"
            )),
            Ok(Ask::Hello { .. }) if greeted => refuse("hello was said".to_owned()),
            Ok(ask @ Ask::Hello { .. }) => {
                greeted = true;
                if heard.send(Heard { client: client.clone(), what: What::Asked(ask, Vec::new()) }).is_err() {
                    return;
                }
            }
            Ok(_) if !greeted => refuse("the first request must be hello".to_owned()),
            Ok(ask) => {
                if heard.send(Heard { client: client.clone(), what: What::Asked(ask, descriptors) }).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::connect;

    use super::*;

    #[test]
    fn nonsense_and_requests_before_hello_are_refused_and_the_end_of_a_connection_is_heard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lockd.sock");
        std::fs::write(&path, "stale").unwrap();
        let listener = bind_at(&path).unwrap();
        let (heard, mut hearing) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || accept_all(&listener, &heard));
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let mut buffer = Vec::new();
        let mut refused = |bytes: &[u8]| -> String {
            rights::send(&socket, bytes, &[]).unwrap();
            rights::receive(&socket, &mut buffer).unwrap().unwrap();
            match decode(&buffer).unwrap() {
                Tell::Refused { message, .. } => message,
                other => panic!("{other:?}"),
            }
        };
        assert!(refused(b"\xff\x00nonsense").contains("makes no sense"));
        assert!(refused(&encode(&Ask::Status)).contains("hello"));
        assert!(refused(&encode(&Ask::Hello { version: VERSION + 1 })).contains("version"));
        rights::send(&socket, &encode(&Ask::Hello { version: VERSION }), &[]).unwrap();
        let hello = hearing.blocking_recv().unwrap();
        assert!(matches!(hello.what, What::Asked(Ask::Hello { .. }, _)));
        drop(socket);
        assert!(matches!(hearing.blocking_recv().unwrap().what, What::Gone));
    }
}
