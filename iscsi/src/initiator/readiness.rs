//! Owns: being told when a connection has something to read, or takes more.
//! Promises: the connection that is watched stays open as long as it is watched.
//! Must not know: what is read and sent.
//! Unsafe: the executor asks whoever has it watch a descriptor to promise that.
#![allow(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A connection whose readiness wakes futures.
pub(super) type Watched = AsyncFd<Arc<TcpStream>>;

/// Watches a connection.
pub(super) fn watch(stream: Arc<TcpStream>) -> io::Result<Watched> {
    // SAFETY: the stream owns its descriptor and closes it only when it is dropped; the handle that is kept with the registration prevents
    // that, and its descriptor never becomes another one.
    let registered = unsafe { AsyncFd::register_with_interest(stream, Interest::READABLE | Interest::WRITABLE) };
    registered.map_err(io::Error::from)
}
