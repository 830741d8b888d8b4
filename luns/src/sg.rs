//! Owns: a path to a SCSI disk of this machine: its block device, by the ioctl SG_IO.
//! Promises: the whole disk or nothing (SG_IO ignores the offset of a partition); a command that has returned is dead.
//! Must not know: what commands mean.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, Stat, major, minor, open};
use scsi::{PathAnswer, PathData, PathError, ScsiPath};
use vmfs_core::lun::{LockKind, ofd_lock};

use crate::sg_sys::{self, DRIVER_SENSE, Direction, Header};
use crate::tenancy::Tenancy;

/// Most bytes of a command, whatever the kernel's queue takes: more would have to be scattered over too many pieces.
const LARGEST: usize = 512 << 10;
/// Bytes of sense data that are asked for.
const SENSE: usize = 96;

/// Sends a filled header down; the kernel's ioctl, or a test's stand-in.
pub(crate) type Send = Box<dyn Fn(&OwnedFd, &mut Header<'_>) -> io::Result<()> + std::marker::Send + Sync>;

/// A SCSI disk of this machine.
pub struct SgPath {
    file: Arc<OwnedFd>,
    name: String,
    max_transfer: usize,
    send: Send,
    in_flight: AtomicUsize,
}

/// What a block device is, seen from its folder in sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// A whole SCSI disk.
    ScsiDisk,
    /// A part of a disk, or a mapping onto others, of which at least one is a SCSI disk below.
    Stacked,
    /// Something without SCSI commands.
    Other,
}

fn folder(found: &Stat) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(found.st_rdev), minor(found.st_rdev)))
}

/// What the block device is.
pub fn kind_of(found: &Stat) -> BlockKind {
    kind_in(&folder(found))
}

fn kind_in(folder: &Path) -> BlockKind {
    if folder.join("partition").exists() {
        return BlockKind::Stacked;
    }
    if folder.join("device/scsi_level").exists() {
        return BlockKind::ScsiDisk;
    }
    match fs::read_dir(folder.join("slaves")).map(|mut entries| entries.next().is_some()) {
        Ok(true) => BlockKind::Stacked,
        _ => BlockKind::Other,
    }
}

impl SgPath {
    /// Opens the device at `node`.
    pub fn open(node: &Path, found: &Stat) -> io::Result<SgPath> {
        let file = open(node, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let told = fs::read_to_string(folder(found).join("queue/max_sectors_kb")).ok();
        let kib = told.and_then(|text| text.trim().parse::<usize>().ok()).unwrap_or(128);
        let send: Send = Box::new(|file, header| sg_sys::send(file.as_fd(), header));
        Ok(SgPath::with(file, node.display().to_string(), kib << 10, send))
    }

    pub(crate) fn with(file: OwnedFd, name: String, max_transfer: usize, send: Send) -> SgPath {
        let max_transfer = max_transfer.clamp(4096, LARGEST);
        SgPath { file: Arc::new(file), name, max_transfer, send, in_flight: AtomicUsize::new(0) }
    }

    /// Who of this machine uses the disk: all its processes are one initiator port.
    pub(crate) fn tenancy(&self) -> NodeTenancy {
        NodeTenancy { file: self.file.clone() }
    }
}

impl ScsiPath for SgPath {
    fn name(&self) -> &str {
        &self.name
    }

    fn execute(&self, cdb: &[u8], data: PathData<'_>, timeout: Duration) -> Result<PathAnswer, PathError> {
        let length = data.len();
        let (direction, memory) = match data {
            PathData::None => (Direction::None, std::ptr::null_mut()),
            PathData::In(into) => (Direction::FromDevice, into.as_mut_ptr()),
            PathData::Out(from) => (Direction::ToDevice, from.as_ptr().cast_mut()),
        };
        let mut sense = [0; SENSE];
        let mut header = Header::new(cdb, direction, (memory, length), &mut sense, timeout);
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        let sent = (self.send)(&self.file, &mut header);
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        if let Err(error) = sent {
            return Err(match error.raw_os_error() {
                // Refused before anything was queued.
                Some(
                    libc::EINVAL
                    | libc::ENOTTY
                    | libc::EPERM
                    | libc::EACCES
                    | libc::ENOMEM
                    | libc::EMSGSIZE
                    | libc::EBADF,
                ) => PathError::NotSent(format!("SG_IO: {error}")),
                _ => PathError::Unknown(format!("SG_IO: {error}")),
            });
        }
        // Sense data may come with another driver byte than that; every other sign of the adapter leaves the end open.
        if header.host_status != 0 || header.driver_status & 0x0F & !DRIVER_SENSE != 0 {
            let why = format!("the adapter says {:#x}, its driver {:#x}", header.host_status, header.driver_status);
            return Err(PathError::Unknown(why));
        }
        let residual = usize::try_from(header.residual).unwrap_or(0).min(length);
        let written = usize::from(header.sense_written).min(SENSE);
        Ok(PathAnswer { status: header.status, sense: sense[..written].to_vec(), transferred: length - residual })
    }

    fn max_transfer(&self) -> usize {
        self.max_transfer
    }

    /// The kernel's error handling has a command back before SG_IO returns.
    fn settled(&self) -> bool {
        true
    }

    /// What other threads have in flight is not aborted.
    fn end(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) == 0
    }
}

/// First byte of the range by whose locks the processes of this machine say under which key they use the disk.
const FIRST: u64 = 1 << 61;
/// Bytes of that range, one for each key.
const KEYS: u64 = 1 << 60;

/// All processes of this machine are one initiator port to the disk: one registration is all of theirs. So each holds a lock on the
/// byte of its key, through the open file of its commands, which keep it open while they are in flight.
pub(crate) struct NodeTenancy {
    file: Arc<OwnedFd>,
}

impl NodeTenancy {
    fn lock(&self, kind: LockKind, start: u64, length: u64) -> io::Result<bool> {
        if length == 0 { Ok(true) } else { ofd_lock(self.file.as_fd(), kind, FIRST + start, length) }
    }
}

impl Tenancy for NodeTenancy {
    fn take(&self, key: u64) -> io::Result<bool> {
        let byte = key % KEYS;
        let others = [(0, byte), (byte + 1, KEYS - byte - 1)];
        let mut free = true;
        for (start, length) in others {
            free = free && self.lock(LockKind::Exclusive, start, length)?;
        }
        let taken = free && self.lock(LockKind::Shared, byte, 1)?;
        for (start, length) in others {
            self.lock(LockKind::Release, start, length)?;
        }
        Ok(taken)
    }

    fn alone(&self, key: u64) -> io::Result<bool> {
        self.lock(LockKind::Exclusive, key % KEYS, 1)
    }

    fn another(&self, key: u64) -> io::Result<OwnedFd> {
        // The same node, whatever its name leads to by now; past the page cache, as the commands go.
        let node = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = Arc::new(open(node, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?);
        let of_other = NodeTenancy { file };
        if key != 0 && !of_other.take(key)? {
            return Err(io::Error::other("a process of another incarnation still uses the disk"));
        }
        Arc::into_inner(of_other.file).ok_or_else(|| io::Error::other("its descriptor is in use"))
    }

    fn release(&self) {
        // It fails only when the kernel has no memory to split a lock; closing the file gives it back then.
        let _ = self.lock(LockKind::Release, 0, KEYS);
    }
}

#[cfg(test)]
#[path = "sg_tests.rs"]
mod tests;
