//! Owns: the MOUNT protocol version 3 (RFC 1813, appendix I), and the port mapper (RFC 1833, 3) that knows where it is.
//! Promises: one question, one answer, a deadline. Must not know: what is done with a file system.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::NfsError;
use crate::nfs3::{FileHandle, MAX_HANDLE};
use crate::rpc::{Client, Credential, Options, Procedure, Sending};
use crate::xdr::Writer;

/// Port of the port mapper.
pub const PORTMAPPER: u16 = 111;
/// Program number of MOUNT.
const MOUNT_PROGRAM: u32 = 100_005;
const GETPORT: Procedure = Procedure { program: 100_000, version: 2, number: 3, name: "GETPORT" };
const MNT: Procedure = Procedure { program: MOUNT_PROGRAM, version: 3, number: 1, name: "MNT" };
const TCP: u32 = 6;

/// Why a server gives no file system.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// The server's no (mountstat3).
    #[error("the server does not give {path}: {} ({status})", describe(*.status))]
    Refused {
        /// What was asked for.
        path: String,
        /// Its status.
        status: u32,
    },
    /// MOUNT is not registered with the port mapper.
    #[error("its port mapper knows no MOUNT version 3 over TCP; give its port by ?mountport=N")]
    NotRegistered,
    /// The call failed.
    #[error("{0}")]
    Call(NfsError),
}

fn describe(status: u32) -> &'static str {
    match status {
        1 => "not the owner",
        2 => "there is no such directory",
        5 => "an error of its disk",
        13 => "this host or user has no permission, or it is not exported",
        20 => "it is no directory",
        22 => "it does not take the path",
        63 => "the path is too long",
        10004 => "it does not support this",
        10006 => "an error of its own",
        _ => "a status that there is not",
    }
}

fn options(name: &str, credential: &Credential) -> Options {
    Options {
        name: name.to_owned(),
        credential: credential.clone(),
        answer_within: Duration::from_secs(10),
        user_timeout: Duration::from_secs(10),
        most_reply: 64 << 10,
        gate: None,
    }
}

fn how(patience: Duration) -> Sending {
    Sending { repeat: true, gated: false, recovery: false, deadline: Some(Instant::now() + patience) }
}

/// Asks the port mapper of the server at `address` (whose port does not count) for the port of MOUNT.
///
/// # Errors
/// [`MountError`]
pub async fn find_port(
    address: SocketAddr,
    name: &str,
    credential: &Credential,
    patience: Duration,
) -> Result<u16, MountError> {
    let address = SocketAddr::new(address.ip(), PORTMAPPER);
    let client = Client::new(address, options(&format!("the port mapper of {name}"), credential));
    let mut call = client.begin(GETPORT, false).await.map_err(MountError::Call)?;
    for word in [MOUNT_PROGRAM, MNT.version, TCP, 0] {
        call.arguments().put_u32(word);
    }
    let answer = call.send(how(patience)).await.map_err(MountError::Call)?;
    let port = answer.results().u32().map_err(NfsError::nonsense("GETPORT")).map_err(MountError::Call)?;
    match u16::try_from(port) {
        Ok(0) => Err(MountError::NotRegistered),
        Ok(port) => Ok(port),
        Err(_) => {
            let cause = format!("port {port}");
            Err(MountError::Call(NfsError::Nonsense { procedure: "GETPORT", cause }))
        }
    }
}

/// Asks MOUNT at `address` for the file handle of a directory.
///
/// # Errors
/// [`MountError`]
pub async fn mount(
    address: SocketAddr,
    name: &str,
    credential: &Credential,
    path: &str,
    patience: Duration,
) -> Result<FileHandle, MountError> {
    let client = Client::new(address, options(&format!("MOUNT of {name}"), credential));
    let mut call = client.begin(MNT, false).await.map_err(MountError::Call)?;
    call.arguments().put_opaque(path.as_bytes());
    let answer = call.send(how(patience)).await.map_err(MountError::Call)?;
    let mut reader = answer.results();
    let mut parse = || match reader.u32()? {
        0 => Ok(Ok(FileHandle::new(reader.opaque(MAX_HANDLE)?)?)),
        status => Ok(Err(status)),
    };
    match parse().map_err(NfsError::nonsense("MNT")).map_err(MountError::Call)? {
        Ok(handle) => Ok(handle),
        Err(status) => Err(MountError::Refused { path: path.to_owned(), status }),
    }
}
