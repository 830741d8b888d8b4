//! Owns: the system calls that no safe wrapper offers: open-file-description locks and block device requests.
//! Promises: each call is one system call; errors are the kernel's.
//! Must not know: what the ranges mean.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Every other lock.
    Exclusive,
    /// Exclusive ones.
    Shared,
    /// Nothing: gives the range back.
    Release,
}

/// Sets or gives back an open-file-description lock without waiting (fcntl(2), F_OFD_SETLK). False: another open file has it.
pub fn ofd_lock(fd: BorrowedFd<'_>, kind: LockKind, start: u64, length: u64) -> io::Result<bool> {
    let l_type = match kind {
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Release => libc::F_UNLCK,
    };
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let lock = libc::flock {
        l_type: l_type as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: i64::try_from(start).map_err(too_large)?,
        l_len: i64::try_from(length).map_err(too_large)?,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open for as long as it is borrowed; `lock` is a valid flock that the kernel only reads.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

// include/uapi/linux/fs.h of the kernel; the numbers of _IO and _IOR as on every architecture with the generic encoding.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const FS_IOC_GETFSUUID: libc::c_ulong = 0x8011_1500;

/// Bytes of a block device.
pub(super) fn block_device_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the address given, which is a live u64.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) };
    if result == 0 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

fn block_range(fd: BorrowedFd<'_>, request: libc::c_ulong, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: both requests read two u64 from the address given, which are live.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a range of a block device back.
pub(super) fn block_discard(fd: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<()> {
    block_range(fd, BLKDISCARD, offset, length)
}

/// Zeroes a range of a block device.
pub(super) fn block_zero(fd: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<()> {
    block_range(fd, BLKZEROOUT, offset, length)
}

/// UUID of the file system that holds an open file, where the kernel can tell and there is one.
pub(super) fn file_system_uuid(fd: BorrowedFd<'_>) -> Option<[u8; 16]> {
    // struct fsuuid2: one byte length, sixteen bytes.
    let mut reply = [0u8; 17];
    // SAFETY: FS_IOC_GETFSUUID writes a struct fsuuid2 (17 bytes) to the address given, which has that room.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_GETFSUUID as _, reply.as_mut_ptr()) };
    let uuid: [u8; 16] = reply[1..].try_into().ok()?;
    (result == 0 && reply[0] == 16 && uuid != [0; 16]).then_some(uuid)
}
