//! Owns: an event file descriptor as a file, so that a ring can wait for it.
//! Promises: exactly one owner of the descriptor.
//! Must not know: who signals it.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// Gives the descriptor to a file.
pub(crate) fn into_file(event: EventFd) -> File {
    // SAFETY: `into_raw_fd` has given up ownership of an open descriptor, which now belongs to the file alone.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}
