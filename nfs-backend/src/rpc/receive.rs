//! Owns: receiving straight into the memory of a caller.
//! Promises: no more bytes than were asked for go there; it never waits. Must not know: records, calls.
//!
//! The one file of this crate with unsafe code: such memory (a guest's) may have no Rust reference, so it is handed to the kernel by address.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use scsi::DataBuffer;

/// Most pieces of memory of one call to the kernel; what is behind them comes with the next.
const MOST_PIECES: usize = 32;

/// Receives up to `length` bytes of a socket that does not block to `offset` in `buffer`, and what comes behind them to `behind`. Gives
/// how many came in all, and how many there was room for.
///
/// # Errors
/// Of readv(2).
///
/// # Panics
/// When `buffer` ends before.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &DataBuffer,
    (offset, length): (usize, usize),
    behind: &mut [u8],
) -> io::Result<(usize, usize)> {
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MOST_PIECES + 1];
    let (mut count, mut room) = (0, 0);
    for segment in buffer.slice(offset..offset + length).segments().take(MOST_PIECES) {
        pieces[count] = libc::iovec { iov_base: segment.pointer().as_ptr().cast(), iov_len: segment.length() };
        (count, room) = (count + 1, room + segment.length());
    }
    if room == length {
        pieces[count] = libc::iovec { iov_base: behind.as_mut_ptr().cast(), iov_len: behind.len() };
        (count, room) = (count + 1, room + behind.len());
    }
    // SAFETY: each piece is memory that `buffer`, alive until after the call, keeps mapped and writable for anybody, or that `behind` lends
    // exclusively; the kernel writes no more into it than its length, and nothing after the call.
    let came = unsafe { libc::readv(socket.as_raw_fd(), pieces.as_ptr(), count as libc::c_int) };
    usize::try_from(came).map(|came| (came, room)).map_err(|_| io::Error::last_os_error())
}
