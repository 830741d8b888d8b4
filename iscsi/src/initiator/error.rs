//! Owns: why an initiator cannot connect, and why a connection cannot go on.
//! Promises: each message names the cause and what to do; none has a secret in it.
//! Must not know: how any of it is found out.

use std::io;
use std::time::Duration;

use super::url::UrlError;
use crate::login::Status;
use crate::pdu::Malformed;

/// Why there is no session. The portal and target are named by who reports it.
#[derive(Debug, thiserror::Error)]
#[error("{portal}: {cause}")]
pub struct ConnectError {
    /// Where it was tried, without secrets.
    pub portal: String,
    /// What went wrong.
    pub cause: ConnectCause,
}

/// What went wrong at a connect or login.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectCause {
    /// An option makes no sense.
    #[error("{0}")]
    Option(String),
    /// The host has no address.
    #[error("the host's address cannot be had ({0}): check its name, or give its address")]
    Resolve(String),
    /// No TCP connection.
    #[error("no connection ({0}): is the target running, and is this its address and port?")]
    Connect(io::Error),
    /// The connection ended during the login.
    #[error("the login broke off: {0}")]
    Broken(Broken),
    /// It took too long.
    #[error("no answer to the login within {} s: is this an iSCSI target?", .0.as_secs())]
    Time(Duration),
    /// The target refuses, by its status class and detail (RFC 7143, 11.13.5).
    #[error("the target refuses the login ({:02x}{:02x}): {}", .0.0, .0.1, meaning(*.0))]
    Refused(Status),
    /// The target cannot prove itself.
    #[error("the target does not prove who it is: {0}; its user and password are wrong, or it is another one")]
    Unproven(&'static str),
    /// It wants a proof and none was given.
    #[error("the target asks for {0}: give a user and password (iscsi://user@host/target/lun?password_file=FILE)")]
    Method(String),
    /// It does not have what was asked for.
    #[error("the target does not take {key}={offer} (it says {answer}): choose another value")]
    Key {
        /// The key.
        key: String,
        /// What was offered.
        offer: String,
        /// What the target answered.
        answer: String,
    },
    /// It refers to other portals for ever.
    #[error("the target refers to other portals again and again (last: {0}): ask its administrator")]
    Moved(String),
    /// An address that it refers to is none.
    #[error("the target refers to an address that is none: {0}")]
    Address(UrlError),
    /// What it sends is no login of RFC 7143.
    #[error("the target's login makes no sense: {0}; is this an iSCSI target?")]
    Protocol(&'static str),
    /// The answer to SendTargets is refused.
    #[error("the target does not list what it has: {0}")]
    Discovery(String),
}

impl ConnectCause {
    /// Whether trying again soon makes no sense: somebody has to change something first.
    pub fn is_lasting(&self) -> bool {
        match self {
            ConnectCause::Refused((class, _)) => *class == 2,
            ConnectCause::Unproven(_) | ConnectCause::Method(_) | ConnectCause::Key { .. } => true,
            ConnectCause::Option(_) | ConnectCause::Address(_) => true,
            _ => false,
        }
    }
}

fn meaning(status: Status) -> &'static str {
    match status {
        (2, 0) => "it finds something wrong with the request",
        (2, 1) => "it does not believe the user and password; check them",
        (2, 2) => "this initiator may not use it; let its name be added to the target's access list",
        (2, 3) => "there is no such target there; check its name",
        (2, 4) => "the target was removed",
        (2, 5) => "it speaks no version of iSCSI that is known here",
        (2, 6) => "it has too many connections",
        (2, 7) => "it misses a parameter",
        (2, 8) => "it cannot be in a session of several portals",
        (2, 9) => "it does not have this type of session",
        (2, 10) => "it does not know the session",
        (2, 11) => "it did not expect this request",
        (3, 1) => "it does not serve at the moment; try again later",
        (3, 2) => "it has no room for another session at the moment; try again later",
        (3, _) => "it has failed; look into its log",
        _ => "for a reason that RFC 7143 does not know",
    }
}

/// Why a connection that was there cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// The target closed it, or the network did.
    #[error("the connection was closed")]
    Closed,
    /// The operating system reports an error.
    #[error("the connection failed ({0})")]
    System(io::Error),
    /// Nothing was heard.
    #[error("the target is silent")]
    Silent,
    /// The target takes nothing more.
    #[error("the target takes no data any more")]
    Stalled,
    /// No answer to the abort of a command.
    #[error("the target does not answer the abort of a command")]
    AbortUnanswered,
    /// A digest is wrong (RFC 7143, 7.8).
    #[error("the digest of {0} is wrong: bytes were changed on the way")]
    Digest(&'static str),
    /// More data than was declared to be possible.
    #[error("the target sends a data segment of {0} bytes, more than it may")]
    TooLong(usize),
    /// A header that makes no sense.
    #[error("the target sends what makes no sense: {0}")]
    Malformed(Malformed),
    /// A PDU that does not belong here.
    #[error("the target breaks the protocol: {0}")]
    Protocol(&'static str),
    /// It rejected something that was in order.
    #[error("the target rejects a PDU (reason {0:#04x})")]
    Rejected(u8),
    /// Its own user forgot a command that was under way.
    #[error("a command was given up")]
    GivenUp,
    /// The session was logged out.
    #[error("the session was logged out")]
    LoggedOut,
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => Broken::Closed,
            _ => Broken::System(error),
        }
    }
}

impl From<Malformed> for Broken {
    fn from(error: Malformed) -> Self {
        Broken::Malformed(error)
    }
}
