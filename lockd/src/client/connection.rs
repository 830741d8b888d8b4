//! Owns: one connection to a mount's Unix socket.
//! Promises: one request at a time, one final answer each; a refusal is an error whose text is the mount's.
//! Must not know: what the answers are used for.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::protocol::{
    AdminRequest, Answer, Attachment, PROTOCOL_VERSION, Pass, Recall, Request, Ticket, decode, encode,
};
use crate::rights;

/// A request that was refused or failed.
#[derive(Debug)]
pub enum ConnectionError {
    /// The mount's answer: errno(3) and its message (object, cause, next step).
    Refused {
        /// errno(3).
        errno: i32,
        /// The message.
        message: String,
    },
    /// The socket.
    Socket(io::Error),
    /// The other side broke the protocol.
    Protocol(String),
}

impl ConnectionError {
    /// errno(3) of the mount's refusal or of the socket's error.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            ConnectionError::Refused { errno, .. } => Some(*errno),
            ConnectionError::Socket(error) => error.raw_os_error(),
            ConnectionError::Protocol(_) => None,
        }
    }
}

impl fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectionError::Refused { message, .. } => f.write_str(message),
            ConnectionError::Socket(error) => write!(f, "the mount's socket: {error}"),
            ConnectionError::Protocol(what) => write!(f, "the mount's socket: {what}"),
        }
    }
}

impl std::error::Error for ConnectionError {}

impl From<io::Error> for ConnectionError {
    fn from(error: io::Error) -> Self {
        ConnectionError::Socket(error)
    }
}

/// A connection; the mount forgets what it did for this client when it is dropped.
pub struct Connection {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects and greets.
    pub fn open(path: &Path) -> Result<Connection, ConnectionError> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)?;
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        connect(&socket, &address).map_err(|errno| {
            let error = io::Error::from(errno);
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        let mut connection = Connection { socket, buffer: Vec::new() };
        match connection.ask(&Request::Hello { version: PROTOCOL_VERSION }, &mut |_, _| ())? {
            (Answer::Welcome { version: PROTOCOL_VERSION, .. }, _) => Ok(connection),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Hangs up when the mount's end is closed.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// What is needed for direct access to an open disk; the gate page, the revoke eventfd and the recall eventfd.
    pub fn attach(&mut self, ticket: Ticket) -> Result<(Attachment, [OwnedFd; 3]), ConnectionError> {
        let (answer, descriptors) = self.ask(&Request::Attach { ticket }, &mut |_, _| ())?;
        match (answer, <[OwnedFd; 3]>::try_from(descriptors)) {
            (Answer::Attached { attachment }, Ok(descriptors)) => Ok((attachment, descriptors)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Which range of the disk the mount wants back now, if any. `let_go`: number of the one that this client has let go of, 0: none.
    pub fn recalled(&mut self, ticket: Ticket, let_go: u64) -> Result<Option<Recall>, ConnectionError> {
        match self.ask(&Request::Recalled { ticket, let_go }, &mut |_, _| ())? {
            (Answer::Recalled { recall }, _) => Ok(recall),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// A data descriptor of a LUN.
    pub fn open_lun(&mut self, ticket: Ticket, lun: u8) -> Result<OwnedFd, ConnectionError> {
        let (answer, descriptors) = self.ask(&Request::OpenLun { ticket, lun }, &mut |_, _| ())?;
        match (answer, <[OwnedFd; 1]>::try_from(descriptors)) {
            (Answer::LunOpened, Ok([descriptor])) => Ok(descriptor),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// What a session with a LUN is opened by, and its number.
    pub fn open_session(&mut self, ticket: Ticket, lun: u8) -> Result<(u64, Pass), ConnectionError> {
        match self.ask(&Request::OpenSession { ticket, lun }, &mut |_, _| ())? {
            (Answer::SessionOpened { session, pass }, _) => Ok((session, pass)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Has the mount say that it lived after a session was registered.
    pub fn confirm_session(
        &mut self,
        ticket: Ticket,
        lun: u8,
        session: u64,
        place: Option<String>,
    ) -> Result<(), ConnectionError> {
        match self.ask(&Request::ConfirmSession { ticket, lun, session, place }, &mut |_, _| ())? {
            (Answer::SessionConfirmed, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Carries out an administrative request; `progress` is called with bytes done and bytes in all.
    pub fn administer(
        &mut self,
        what: AdminRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<serde_json::Value, ConnectionError> {
        match self.ask(&Request::Administer { what }, progress)? {
            (Answer::Done { value }, _) => Ok(value),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn ask(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Answer, Vec<OwnedFd>), ConnectionError> {
        rights::send(&self.socket, &encode(request), &[])?;
        loop {
            let Some(descriptors) = rights::receive(&self.socket, &mut self.buffer)? else {
                return Err(ConnectionError::Protocol("the mount closed the connection".to_owned()));
            };
            match decode::<Answer>(&self.buffer).map_err(ConnectionError::Protocol)? {
                Answer::Progress { done, total } => progress(done, total),
                Answer::Refused { errno, message } => return Err(ConnectionError::Refused { errno, message }),
                answer => return Ok((answer, descriptors)),
            }
        }
    }
}

fn unexpected(answer: &Answer) -> ConnectionError {
    ConnectionError::Protocol(format!("an answer to another request: {answer:?}"))
}
