//! Owns: blocking reads, writes and space requests on one open file that is an image or a block device.
//! Promises: whole transfers or an error that says what it proves; the same calls for the actor's and the data path.
//! Must not know: cells, locks, threads.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate, fdatasync, fstat};
use rustix::io::{Errno, ReadWriteFlags, pread, pwritev2};

use super::sys;
use super::{LunError, LunErrorKind};
use crate::buf::AlignedBuf;

/// What the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Image,
    Block,
}

/// When a write is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// When it is answered.
    Now,
    /// After a flush.
    AtFlush,
}

/// Zeros are written in pieces of this size where nothing better is supported.
const ZERO_PIECE: usize = 1 << 20;

pub(super) struct RawFile {
    pub(super) file: OwnedFd,
    pub(super) backing: Backing,
    pub(super) name: String,
    pub(super) alignment: usize,
    pub(super) read_only: bool,
    /// Size when it was last asked for; a command beyond it asks again.
    known_bytes: AtomicU64,
}

impl RawFile {
    pub(super) fn new(file: OwnedFd, backing: Backing, name: String, alignment: usize, read_only: bool) -> RawFile {
        RawFile { file, backing, name, alignment, read_only, known_bytes: AtomicU64::new(0) }
    }

    /// Bytes now, cut to whole 4 KiB; 0 when the file does not tell.
    pub(super) fn bytes(&self) -> u64 {
        let bytes = match self.backing {
            Backing::Image => fstat(&self.file).map_or(0, |stat| stat.st_size as u64),
            Backing::Block => sys::block_device_bytes(self.file.as_fd()).unwrap_or(0),
        };
        let whole = bytes - bytes % 4096;
        self.known_bytes.store(whole, Ordering::Relaxed);
        whole
    }

    pub(super) fn error(
        &self,
        kind: LunErrorKind,
        command: &'static str,
        (offset, length): (u64, u64),
        cause: impl Into<io::Error>,
    ) -> LunError {
        LunError { kind, lun: self.name.clone(), command, offset, length, cause: cause.into() }
    }

    /// Refuses what the LUN does not have before anything is sent.
    pub(super) fn check(&self, command: &'static str, offset: u64, length: u64, writes: bool) -> Result<(), LunError> {
        let refuse =
            |kind, why: &str| Err(self.error(kind, command, (offset, length), io::Error::other(why.to_owned())));
        let alignment = self.alignment as u64;
        if !offset.is_multiple_of(alignment) || !length.is_multiple_of(alignment) {
            return refuse(LunErrorKind::OutOfRange, "not aligned to the LUN's blocks");
        }
        let fits = |bytes| offset.checked_add(length).is_some_and(|end| end <= bytes);
        if !fits(self.known_bytes.load(Ordering::Relaxed)) && !fits(self.bytes()) {
            return refuse(LunErrorKind::OutOfRange, "beyond the end of the LUN; is it truncated?");
        }
        if writes && self.read_only {
            return refuse(LunErrorKind::NotDone, "the LUN is open for reading only");
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        let range = (offset, into.len() as u64);
        self.check("read", offset, range.1, false)?;
        let mut done = 0;
        while done < into.len() {
            match pread(&self.file, &mut into[done..], offset + done as u64) {
                Ok(0) => {
                    let cause = io::Error::new(io::ErrorKind::UnexpectedEof, "the LUN ends here; it was truncated");
                    return Err(self.error(LunErrorKind::NotDone, "read", range, cause));
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(cause) => return Err(self.error(LunErrorKind::NotDone, "read", range, cause)),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, from: &[u8], durability: Durability) -> Result<(), LunError> {
        let range = (offset, from.len() as u64);
        self.check("write", offset, range.1, true)?;
        let flags = match durability {
            Durability::Now => ReadWriteFlags::DSYNC,
            Durability::AtFlush => ReadWriteFlags::empty(),
        };
        let mut done = 0;
        while done < from.len() {
            match pwritev2(&self.file, &[io::IoSlice::new(&from[done..])], offset + done as u64, flags) {
                Ok(0) => {
                    let cause = io::Error::from(io::ErrorKind::WriteZero);
                    return Err(self.error(LunErrorKind::Unknown, "write", range, cause));
                }
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // What was written before the space ran out stays written.
                Err(cause) if done == 0 => return Err(self.error(write_error_kind(cause), "write", range, cause)),
                Err(cause) => return Err(self.error(LunErrorKind::Unknown, "write", range, cause)),
            }
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), LunError> {
        fdatasync(&self.file).map_err(|cause| self.error(LunErrorKind::Unknown, "flush", (0, 0), cause))
    }

    pub(super) fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.check("unmap", offset, length, true)?;
        let result = match self.backing {
            Backing::Image => self.allocate(FallocateFlags::PUNCH_HOLE, offset, length),
            Backing::Block => sys::block_discard(self.file.as_fd(), offset, length),
        };
        match result {
            // A LUN that can not give space back keeps it: the range may read as anything anyway.
            Err(cause) if !is_unsupported(&cause) => {
                Err(self.error(LunErrorKind::Unknown, "unmap", (offset, length), cause))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.check("write zeroes", offset, length, true)?;
        let attempts: &[&dyn Fn() -> io::Result<()>] = match self.backing {
            Backing::Image => &[&|| self.allocate(FallocateFlags::ZERO_RANGE, offset, length), &|| {
                self.allocate(FallocateFlags::PUNCH_HOLE, offset, length)
            }],
            Backing::Block => &[&|| sys::block_zero(self.file.as_fd(), offset, length)],
        };
        for attempt in attempts {
            match attempt() {
                Ok(()) => return Ok(()),
                Err(cause) if is_unsupported(&cause) => {}
                Err(cause) => {
                    let kind = if cause.raw_os_error() == Some(libc::ENOSPC) {
                        LunErrorKind::NoSpace
                    } else {
                        LunErrorKind::Unknown
                    };
                    return Err(self.error(kind, "write zeroes", (offset, length), cause));
                }
            }
        }
        let zeros = AlignedBuf::zeroed(length.min(ZERO_PIECE as u64) as usize);
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(zeros.len() as u64);
            self.write(offset + done, &zeros[..piece as usize], Durability::AtFlush)?;
            done += piece;
        }
        Ok(())
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        loop {
            match fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, length) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

/// What an error of a write proves when nothing of it was written before.
pub(super) fn write_error_kind(cause: Errno) -> LunErrorKind {
    match cause {
        Errno::NOSPC | Errno::DQUOT => LunErrorKind::NoSpace,
        Errno::INVAL | Errno::FBIG | Errno::BADF | Errno::PERM | Errno::ROFS => LunErrorKind::NotDone,
        _ => LunErrorKind::Unknown,
    }
}

fn is_unsupported(cause: &io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}
