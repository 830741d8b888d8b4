//! Owns: the client's side: direct access to a disk of a mount, and the way to its administrator's socket.
//! Promises: a path that is on no mount of this file system is told apart by kind, so that callers use plain file I/O.
//! Must not know: how the mount works; what io_uring or threads the caller moves its data with.

mod calls;
mod connection;
mod direct;
mod following;
mod lun_table;
mod mounted;
mod ranges;
mod runs;

pub use calls::{MountCalls, Withdrawn};
pub use connection::{Connection, ConnectionError};
pub use direct::{Access, DirectFile, DiskParts, Grant, GrantPiece, Lun, Segment, SessionNumber};
pub use mounted::MountedDirectory;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

/// What a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectErrorKind {
    /// The path is on no mount of this file system: use plain file I/O.
    NotVmfs,
    /// It is on a mount, but no virtual disk (or has LUNs without descriptors): use plain file I/O.
    NotDirect,
    /// Locked by another host, or open by another program of this host.
    Busy,
    /// No space for a first write.
    NoSpace,
    /// The disk is open for reading only.
    ReadOnly,
    /// This host has lost the lock; the disk must be opened again.
    LockLost,
    /// Everything else.
    Io,
}

/// Why direct access failed: which file, why, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct DirectError {
    kind: DirectErrorKind,
    path: PathBuf,
    message: String,
    errno: Option<i32>,
}

impl DirectError {
    /// What a caller decides by.
    pub fn kind(&self) -> DirectErrorKind {
        self.kind
    }

    /// errno(3), if the operating system or the mount gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.errno
    }
}

fn kind_of(errno: Option<i32>) -> DirectErrorKind {
    match errno {
        Some(libc::EBUSY) => DirectErrorKind::Busy,
        Some(libc::ENOSPC) => DirectErrorKind::NoSpace,
        Some(libc::EOPNOTSUPP) => DirectErrorKind::NotDirect,
        Some(libc::EROFS | libc::EBADF) => DirectErrorKind::ReadOnly,
        Some(libc::ESTALE) => DirectErrorKind::LockLost,
        _ => DirectErrorKind::Io,
    }
}

fn io_error(path: &std::path::Path, doing: &str, error: &io::Error) -> DirectError {
    let errno = error.raw_os_error();
    DirectError { kind: kind_of(errno), path: path.to_owned(), message: format!("{doing}: {error}"), errno }
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future of this module on a thread that has no executor.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::park();
    }
}
