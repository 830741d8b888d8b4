//! Owns: what the kernel sees of an object's attributes, and errno values.
//! Promises: the one table from core's kinds to FUSE's errors; allocated size in 512-byte units, so that `du` is right.
//! Must not know: how attributes are found or changed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use vmfs_core::error::FsError;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::volume::Stat;

use crate::inodes::Node;

/// Lifetime of names and attributes in the kernel: none, since other hosts change them without a word.
pub const LIFETIME: Duration = Duration::ZERO;

/// Type as readdir and stat give it.
pub fn file_type(object_type: ObjectType) -> FileType {
    match object_type {
        ObjectType::Directory => FileType::Directory,
        ObjectType::Symlink => FileType::Symlink,
        ObjectType::File | ObjectType::Disk | ObjectType::Rdm => FileType::RegularFile,
    }
}

/// Attributes as the kernel wants them. `io_bytes` is what programs are told to read and write at a time.
pub fn file_attr(stat: &Stat, node: &Node, io_bytes: u32) -> FileAttr {
    let attributes = &stat.attributes;
    let directory = stat.object_type == ObjectType::Directory;
    FileAttr {
        ino: INodeNo(node.number),
        size: attributes.size,
        blocks: stat.blocks_bytes.div_ceil(512),
        atime: system_time(attributes.accessed_ns),
        mtime: system_time(attributes.modified_ns),
        ctime: system_time(attributes.changed_ns),
        crtime: system_time(attributes.born_ns),
        kind: file_type(stat.object_type),
        perm: (attributes.mode & 0o7777) as u16,
        // 1 on a directory says that the subdirectories are not counted (find(1), "-noleaf").
        nlink: u32::from(!node.unlinked || directory),
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: io_bytes,
        flags: 0,
    }
}

fn system_time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

/// Nanoseconds since 1970 of a time; what does not fit is the nearest that does.
pub fn nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
    }
}

/// The same of what setattr carries.
pub fn nanoseconds_of(time: TimeOrNow) -> i64 {
    match time {
        TimeOrNow::SpecificTime(time) => nanoseconds(time),
        TimeOrNow::Now => nanoseconds(SystemTime::now()),
    }
}

/// The errno of an error; errors that an administrator must see are logged.
pub fn errno(doing: &str, error: &FsError) -> Errno {
    let number = error.kind().errno();
    match number {
        libc::EIO => tracing::error!("{doing}: {error}"),
        _ => tracing::debug!("{doing}: {error}"),
    }
    Errno::from_i32(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_1970_survive() {
        for ns in [0, 1, -1, i64::MAX, i64::MIN + 1, 1_700_000_000_123_456_789] {
            assert_eq!(nanoseconds(system_time(ns)), ns);
        }
    }
}
