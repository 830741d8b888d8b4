//! Owns: the open-file-description locks by which one process proves that another one's I/O on a LUN has ended.
//! Promises: a byte that was locked through one open file can be locked through another one only when no request of the first
//!   is left in the kernel, since requests in flight pin their open file and with it its locks.
//! Must not know: who the processes are, what they wrote.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{OFlags, fcntl_getfl};
use vmfs_core::units::SlotId;

/// First byte of the range that all slots own for these locks, far beyond any LUN's end.
pub const DRAIN_BASE: u64 = 1 << 62;
/// Bytes that a slot owns: the number of data descriptors that can be told apart.
pub const DRAIN_BYTES_PER_SLOT: u64 = 1 << 20;

/// The byte that data descriptor number `index` of `slot` locks. Number 0 is the host's own daemon.
pub fn drain_byte(slot: SlotId, index: u32) -> u64 {
    DRAIN_BASE + u64::from(slot.0) * DRAIN_BYTES_PER_SLOT + u64::from(index) % DRAIN_BYTES_PER_SLOT
}

/// Locks `byte` for the open file behind `file`; false when another open file has it. The lock lives until the last
/// descriptor of that open file is closed and its last request has ended.
pub fn try_lock(file: impl AsFd, byte: u64) -> io::Result<bool> {
    let file = file.as_fd();
    let read_only = fcntl_getfl(file)? & OFlags::RWMODE == OFlags::RDONLY;
    set(file, byte, if read_only { libc::F_RDLCK } else { libc::F_WRLCK })
}

/// Gives `byte` up.
pub fn unlock(file: impl AsFd, byte: u64) -> io::Result<()> {
    set(file.as_fd(), byte, libc::F_UNLCK).map(drop)
}

fn set(file: std::os::fd::BorrowedFd<'_>, byte: u64, kind: i32) -> io::Result<bool> {
    let request = libc::flock64 {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte as i64,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for the duration of the call and the structure is a valid flock64 that the kernel reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_had_by_one_open_file_until_its_last_descriptor_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        let (first, second) = (open(), open());
        let copy = first.try_clone().unwrap();
        let byte = drain_byte(SlotId(7), 3);
        assert!(try_lock(&first, byte).unwrap());
        assert!(!try_lock(&second, byte).unwrap());
        drop(first);
        assert!(!try_lock(&second, byte).unwrap());
        drop(copy);
        assert!(try_lock(&second, byte).unwrap());
        unlock(&second, byte).unwrap();
        assert!(try_lock(open(), byte).unwrap());
    }

    #[test]
    fn slots_have_ranges_that_do_not_touch() {
        assert_eq!(drain_byte(SlotId(1), 0), (1 << 62) + (1 << 20));
        assert_eq!(drain_byte(SlotId(0), (1 << 20) - 1) + 1, drain_byte(SlotId(1), 0));
        assert!(drain_byte(SlotId(255), u32::MAX) < i64::MAX as u64);
    }
}
