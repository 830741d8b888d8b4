//! Owns: the requests about a file's space: fallocate and lseek to data and holes.
//! Promises: a mode that is not supported is refused with EOPNOTSUPP and changes nothing.
//! Must not know: how space is found.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, ReplyEmpty, ReplyLseek};
use vmfs_core::error::FsError;

use crate::attributes::errno;
use crate::handles::FileHandle;
use crate::state::State;

/// What fallocate(2) is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Allocate { keep_size: bool },
    Punch,
    Zero { keep_size: bool },
}

fn mode_of(mode: i32) -> Option<Mode> {
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Some(Mode::Allocate { keep_size }),
        libc::FALLOC_FL_PUNCH_HOLE if keep_size => Some(Mode::Punch),
        libc::FALLOC_FL_ZERO_RANGE => Some(Mode::Zero { keep_size }),
        _ => None,
    }
}

/// FALLOCATE.
pub fn fallocate(state: &Arc<State>, handle: Arc<FileHandle>, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
    let Some(mode) = mode_of(mode) else { return reply.error(Errno::EOPNOTSUPP) };
    let Some(end) = offset.checked_add(length).filter(|end| *end <= i64::MAX as u64) else {
        return reply.error(Errno::EFBIG);
    };
    if !handle.writable {
        return reply.error(Errno::EBADF);
    }
    handle.written.store(true, Ordering::Release);
    state.actor.send(move |volume| async move {
        let (files, file, range) = (volume.files(), &handle.file, offset..end);
        let done: Result<(), FsError> = match mode {
            Mode::Allocate { keep_size } => files.allocate_range(file, range, keep_size).await,
            Mode::Punch => files.punch(file, range).await,
            Mode::Zero { keep_size } => files.zero_range(file, range, keep_size).await,
        };
        match done {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno("fallocate", &error)),
        }
    });
}

/// LSEEK: SEEK_DATA and SEEK_HOLE; the kernel does the others itself.
pub fn lseek(state: &Arc<State>, handle: Arc<FileHandle>, offset: i64, whence: i32, reply: ReplyLseek) {
    let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
    if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
        return reply.error(Errno::EINVAL);
    }
    state.actor.send(move |volume| async move {
        let found = match whence {
            libc::SEEK_DATA => volume.files().seek_data(&handle.file, offset).await,
            _ => volume.files().seek_hole(&handle.file, offset).await,
        };
        match found {
            Ok(Some(at)) => reply.offset(at as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(errno("lseek", &error)),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_modes_that_keep_the_promises_are_taken() {
        assert_eq!(mode_of(0), Some(Mode::Allocate { keep_size: false }));
        assert_eq!(mode_of(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE), Some(Mode::Punch));
        assert_eq!(mode_of(libc::FALLOC_FL_PUNCH_HOLE), None);
        assert_eq!(mode_of(libc::FALLOC_FL_ZERO_RANGE), Some(Mode::Zero { keep_size: false }));
        assert_eq!(mode_of(libc::FALLOC_FL_COLLAPSE_RANGE), None);
        assert_eq!(mode_of(libc::FALLOC_FL_INSERT_RANGE), None);
    }
}
