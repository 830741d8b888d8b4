//! Owns: the byte ranges far behind a LUN's end by which a descriptor says "I may still have I/O in flight".
//! Promises: whoever gets a slot's whole range through another open file knows that nothing of its descriptors is left.
//! Must not know: whose slot it is, what the I/O was.
//!
//! Slot s owns the bytes 2^62 + s 2^20 .. + 2^20 for open-file-description locks. A request in flight pins its open file, and with
//! it the lock, also when the process that sent it was killed. One byte behind all slots' ranges is the *raw byte*: who moves the data
//! of a raw device mapping holds it, alone to write, with others to read.

use std::io;
use std::os::fd::BorrowedFd;

use super::sys::{LockKind, ofd_lock};
use crate::units::{SLOTS, SlotId};

/// First byte of slot 0's range.
const FIRST: u64 = 1 << 62;
/// Bytes of a slot's range: as many descriptors may hold one.
const LENGTH: u64 = 1 << 20;

fn range(slot: SlotId) -> u64 {
    FIRST + u64::from(slot.0) * LENGTH
}

/// Locks one free byte of the slot's range for `descriptor`, before it carries data. An error of kind `WouldBlock`: a breaker holds
/// the range: this host was fenced.
pub fn hold_byte(descriptor: BorrowedFd<'_>, slot: SlotId) -> io::Result<()> {
    for byte in 0..LENGTH {
        if ofd_lock(descriptor, LockKind::Exclusive, range(slot) + byte, 1)? {
            return Ok(());
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Tries to lock the whole range of the slot through `descriptor`, which must not be one that holds a byte of it. True: every
/// descriptor that held one is closed and has no I/O in flight, and no new one can begin until [`release`].
pub fn take(descriptor: BorrowedFd<'_>, slot: SlotId) -> io::Result<bool> {
    ofd_lock(descriptor, LockKind::Exclusive, range(slot), LENGTH)
}

/// The raw byte.
const RAW_BYTE: u64 = FIRST + (SLOTS as u64) * LENGTH;

/// Tries to lock the raw byte for `descriptor`. False: another open file has it, or its I/O is still in flight.
pub fn take_raw(descriptor: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    ofd_lock(descriptor, if exclusive { LockKind::Exclusive } else { LockKind::Shared }, RAW_BYTE, 1)
}

/// Gives the raw byte back.
pub fn release_raw(descriptor: BorrowedFd<'_>) -> io::Result<()> {
    ofd_lock(descriptor, LockKind::Release, RAW_BYTE, 1).map(drop)
}

/// Gives back what `descriptor` holds of the slot's range.
pub fn release(descriptor: BorrowedFd<'_>, slot: SlotId) -> io::Result<()> {
    ofd_lock(descriptor, LockKind::Release, range(slot), LENGTH).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_raw_byte_is_one_writers_or_several_readers_and_no_slots() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second, breaker) = (open(), open(), open());
        assert!(take_raw(first.as_fd(), false).unwrap() && take_raw(second.as_fd(), false).unwrap());
        assert!(!take_raw(breaker.as_fd(), true).unwrap());
        assert!(take(breaker.as_fd(), SlotId(255)).unwrap());
        drop(second);
        assert!(take_raw(first.as_fd(), true).unwrap());
        assert!(!take_raw(breaker.as_fd(), false).unwrap());
        release_raw(first.as_fd()).unwrap();
        assert!(take_raw(breaker.as_fd(), true).unwrap());
    }

    #[test]
    fn the_range_is_had_only_when_every_holder_is_closed_and_then_keeps_new_ones_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second, breaker) = (open(), open(), open());
        hold_byte(first.as_fd(), SlotId(255)).unwrap();
        hold_byte(second.as_fd(), SlotId(255)).unwrap();
        assert!(take(breaker.as_fd(), SlotId(254)).unwrap());
        assert!(!take(breaker.as_fd(), SlotId(255)).unwrap());
        drop(first);
        assert!(!take(breaker.as_fd(), SlotId(255)).unwrap());
        drop(second);
        assert!(take(breaker.as_fd(), SlotId(255)).unwrap());
        let late = open();
        assert_eq!(hold_byte(late.as_fd(), SlotId(255)).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        release(breaker.as_fd(), SlotId(255)).unwrap();
        hold_byte(late.as_fd(), SlotId(255)).unwrap();
    }
}
