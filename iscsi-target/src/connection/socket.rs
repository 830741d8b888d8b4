//! Owns: the TCP connection: reads and writes that never block, and the waits for what they need.
//! Promises: the thread is woken for bytes that have come, or for room that is waited for, and for nothing else; no call is made that is
//! known to find nothing.
//! Must not know: PDUs.
//! Unsafe: a descriptor is watched (`AsyncFd::register_with_interest`).

#![allow(unsafe_code)]

use std::cell::OnceCell;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::task::{Context, Poll, Waker};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A connection. It belongs to one thread.
pub struct Socket {
    readable: AsyncFd<TcpStream>,
    /// The same connection, watched for room from the first time on that there is none.
    writable: OnceCell<AsyncFd<TcpStream>>,
}

impl Socket {
    /// Takes a connection that does not block.
    ///
    /// # Errors
    /// Of the operating system.
    pub fn new(stream: TcpStream) -> io::Result<Socket> {
        Ok(Socket { readable: watch(stream, Interest::READABLE)?, writable: OnceCell::new() })
    }

    /// Reads what there is, into one slice after the other.
    ///
    /// # Errors
    /// `WouldBlock`: there is nothing; whatever the operating system reports.
    pub fn read(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let asked: usize = slices.iter().map(|slice| slice.len()).sum();
        let read = again(|| self.readable.get_ref().read_vectored(slices));
        match &read {
            // Less than asked for is all that there is: the next read waits for an event that comes after this one.
            Ok(count) if *count == asked => {}
            Err(error) if error.kind() != ErrorKind::WouldBlock => {}
            _ => {
                if let Poll::Ready(Ok(mut guard)) =
                    self.readable.poll_read_ready(&mut Context::from_waker(Waker::noop()))
                {
                    guard.clear_ready();
                }
            }
        }
        read
    }

    /// Waits until there is something to read, or the end.
    ///
    /// # Errors
    /// Of the operating system.
    pub async fn readable(&self) -> io::Result<()> {
        self.readable.readable().await?.retain_ready();
        Ok(())
    }

    /// Is there something to read, as far as the thread knows?
    pub fn is_readable(&self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        match self.readable.poll_read_ready(&mut context) {
            Poll::Ready(Ok(mut guard)) => {
                guard.retain_ready();
                true
            }
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock`: there is no room; whatever the operating system reports.
    pub fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = again(|| self.readable.get_ref().write_vectored(slices));
        if let (Err(error), Some(writable)) = (&written, self.writable.get())
            && error.kind() == ErrorKind::WouldBlock
            && let Poll::Ready(Ok(mut guard)) = writable.poll_write_ready(&mut Context::from_waker(Waker::noop()))
        {
            guard.clear_ready();
        }
        written
    }

    /// Waits until there is room to write, or nobody to read it.
    ///
    /// # Errors
    /// Of the operating system.
    pub async fn writable(&self) -> io::Result<()> {
        let writable = match self.writable.get() {
            Some(writable) => writable,
            None => {
                let watched = watch(self.readable.get_ref().try_clone()?, Interest::WRITABLE)?;
                self.writable.get_or_init(|| watched)
            }
        };
        writable.writable().await?.retain_ready();
        Ok(())
    }

    /// Ends the connection in both directions.
    pub fn hang_up(&self) {
        // Nothing to do for one that is broken already.
        let _ = self.readable.get_ref().shutdown(std::net::Shutdown::Both);
    }
}

/// Once more for as long as signals interrupt it.
fn again(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn watch(stream: TcpStream, interest: Interest) -> io::Result<AsyncFd<TcpStream>> {
    // SAFETY: a stream has one descriptor from its making to its end, it closes it itself, and it is not taken out of the `AsyncFd`.
    unsafe { AsyncFd::register_with_interest(stream, interest) }.map_err(|refused| refused.into_parts().1)
}
