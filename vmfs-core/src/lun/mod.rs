//! Owns: the `Lun` trait, what the file system asks of a piece of shared storage, and its errors.
//! Promises: an error says whether the command was certainly not carried out; everything else is "unknown".
//! Must not know: cells, objects, which host is who.

mod block;
pub mod drain;
mod error;
mod file;
mod find;
mod open;
mod range_lock;
mod raw_file;
mod sys;

pub use file::FileLun;
pub use find::{DeviceFinder, RawDevices};
pub use open::{OpenLun, open_lun};
pub use sys::{LockKind, ofd_lock};

pub use error::{LunError, LunErrorKind};

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::buf::AlignedBuf;
use crate::env::LocalFuture;
use crate::format::header::{DeviceIdentity, LockMode};
use crate::units::{CellSize, SlotId};
use crate::window::MemberLun;

/// Result of one compare-and-write that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The bytes were equal; the new ones are durable.
    Written,
    /// The bytes differed; this command wrote nothing. (A path that repeats commands may have written before: `cas` decides.)
    Miscompare,
}

/// A LUN as the metadata actor uses it. All offsets and lengths are multiples of [`Lun::alignment`].
pub trait Lun {
    /// How messages name it: path or URL.
    fn name(&self) -> &str;
    /// Size in bytes now.
    fn bytes(&self) -> u64;
    /// Logical block size of a device, and with it the only cell size it can carry; `None`: any (image files).
    fn cell_size(&self) -> Option<CellSize>;
    /// Alignment of offset, length and memory that every command needs, in bytes.
    fn alignment(&self) -> usize;
    /// What the device says of itself.
    fn identity(&self) -> DeviceIdentity;
    /// How compare-and-write is done here.
    fn lock_mode(&self) -> LockMode;

    /// Reads `length` bytes.
    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>>;
    /// Reads `count` pieces of `length` bytes that lie `stride` bytes apart, with one command; gives them one behind another.
    fn read_strided(
        &self,
        offset: u64,
        length: usize,
        stride: usize,
        count: usize,
    ) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        Box::pin(async move {
            let mut buf = self.read(offset, count.saturating_sub(1) * stride + length).await?;
            (1..count).for_each(|nth| buf.copy_within(nth * stride..nth * stride + length, nth * length));
            buf.truncate(count * length);
            Ok(buf)
        })
    }
    /// Writes durably (FUA). May tear at cell boundaries, never within a cell.
    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>>;
    /// Makes all completed plain data writes durable.
    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>>;
    /// Gives the range back to the storage; it may read as anything afterwards.
    fn unmap(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>>;
    /// Makes the range read as zeros, durably.
    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>>;
    /// Atomically: if the cell at `offset` holds `expect`, writes `new` durably. Both are one cell long.
    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>>;
    /// Several compare-and-writes of different cells, each atomic by itself, in no order. The default sends them in parallel; a
    /// LUN that can do neighbours in one go overrides it.
    fn compare_and_write_many<'a>(
        &'a self,
        cells: &'a [CompareAndWrite<'a>],
    ) -> LocalFuture<'a, Vec<Result<Compared, LunError>>> {
        let all = cells.iter().map(|c| self.compare_and_write(c.offset, c.expect, c.new));
        Box::pin(futures_util::future::join_all(all))
    }

    /// The data path, for threads that move file data without the actor.
    fn data(&self) -> Arc<dyn DataLun>;

    /// Marks every path of this LUN that carries plain writes as one of `owner`'s, before it carries any. An error of kind `Fenced`: a
    /// breaker was faster. The caller reads the slot live afterwards.
    fn mark_paths(&self, owner: PathOwner) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(std::future::ready(self.data().hold_drain_byte(owner.slot)))
    }

    /// Shuts out everybody who has marked paths to this LUN: it is going to be formatted, and what they hold there ends. The default has
    /// nobody to shut out.
    fn evict(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Takes the mark off: the slot was left, nothing is in flight, nothing follows. The default has nothing that would stay behind.
    fn unmark_paths(&self) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Looks whether what [`Lun::mark_paths`] left with the LUN still stands, and mends what the LUN has forgotten; called every H. An
    /// error of kind `Fenced`: a breaker took it away. The default keeps nothing there.
    fn tend(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The LUN's reservation as it was last seen; `None`: this kind of LUN has none.
    fn reservation(&self) -> Option<Reservation> {
        None
    }

    /// Keeps an incarnation from writing to this LUN, by the LUN's own means, until [`Lun::end_fence`]. Its slot has been claimed
    /// before. The default has no means: time has to do.
    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        let _ = victim;
        Box::pin(std::future::ready(Ok(Fencing::TimeOnly)))
    }

    /// This LUN as a member's, whose cells may move to another one; `None`: it is a bare LUN.
    fn as_member(&self) -> Option<&MemberLun> {
        None
    }

    /// The slot may be joined again: gives back what [`Lun::fence`] holds.
    fn end_fence(&self, slot: SlotId) {
        let _ = slot;
    }
}

/// An incarnation's place on a LUN, as the LUN's own means of fencing know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathOwner {
    /// Its slot.
    pub slot: SlotId,
    /// The reservation key under which its paths are registered (SPC-4, 5.13); 0: none.
    pub key: u64,
}

/// A session with a LUN for another process of this host.
pub struct LentSession {
    /// Names it among those of this LUN.
    pub port: u64,
    /// What the process opens it by. It can hold secrets: it is not for messages.
    pub pass: String,
}

/// A LUN's persistent reservation (SPC-4, 5.13).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservation {
    /// Type of the reservation in force (SPC-4, table 70); `None`: there is none.
    pub kind: Option<u8>,
    /// Keys of all registrations, one for each path.
    pub keys: Vec<u64>,
    /// The key of this host's paths; 0 when they are not registered.
    pub own: u64,
    /// It survives a loss of power of the storage.
    pub persists: bool,
}

impl Reservation {
    /// Whether the storage refuses the writes of everybody who is not registered: types 5 to 8 (write exclusive or exclusive access, for
    /// registrants).
    pub fn keeps_out(&self) -> bool {
        matches!(self.kind, Some(5..=8))
    }
}

/// What became of the attempt to fence an incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fencing {
    /// Nothing of it is on its way and nothing new can begin.
    Proven,
    /// Something of it may still be on its way (its process is stopped, or a request hangs): ask again.
    NotYet,
    /// The LUN cannot tell; its lease is over by any clock within the bound.
    TimeOnly,
}

/// One element of [`Lun::compare_and_write_many`].
#[derive(Clone, Copy, Debug)]
pub struct CompareAndWrite<'a> {
    /// Where the cell lies.
    pub offset: u64,
    /// What it must hold.
    pub expect: &'a [u8],
    /// What it holds afterwards.
    pub new: &'a [u8],
}

/// The data path of a LUN: blocking calls for whichever thread has the request. Offsets, lengths and memory are aligned to
/// [`DataLun::alignment`].
pub trait DataLun: Send + Sync {
    /// Alignment of offset, length and memory, in bytes.
    fn alignment(&self) -> usize;
    /// Reads exactly `into.len()` bytes.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError>;
    /// Writes all of `from`; durable after [`DataLun::flush`].
    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), LunError>;
    /// Makes completed writes durable.
    fn flush(&self) -> Result<(), LunError>;
    /// Makes the range read as zeros; durable after [`DataLun::flush`].
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError>;
    /// Gives the range back to the storage.
    fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError>;
    /// A new open file of the LUN for another process (a VMM) or an io_uring; `None`: this LUN has no descriptor.
    fn open_descriptor(&self) -> Option<Result<OwnedFd, LunError>>;
    /// What another process (a VMM) needs to reach this LUN by a session of its own, which whoever fences this one fences too; `None`: that
    /// cannot be. This process reads its slot live after that session has been made, and before it carries data.
    fn lend_session(&self) -> Option<Result<LentSession, LunError>> {
        None
    }
    /// Proves that nothing of a lent session is on its way and that nothing new can begin. `place` is what the session itself has said of
    /// where it leads. It waits for the storage.
    fn end_session(&self, port: u64, place: Option<&str>) -> Result<(), LunError> {
        let _ = place;
        let cause = std::io::Error::other(format!("it has lent no session, and {port} is none"));
        let (kind, lun, command) = (LunErrorKind::NotDone, String::new(), "end of a program's session");
        Err(LunError { kind, lun, command, offset: 0, length: 0, cause })
    }
    /// Marks this data path as one of `slot`'s, before it carries data, so that a breaker can wait for its end (`drain`). An error
    /// of kind `Fenced`: a breaker was faster. LUNs whose initiator proves the end of its commands itself need nothing.
    fn hold_drain_byte(&self, slot: SlotId) -> Result<(), LunError> {
        let _ = slot;
        Ok(())
    }

    /// Takes the LUN for the data of a raw device mapping: alone to write (`exclusive`), with others to read. False: somebody else has
    /// it, or had it and what it sent is still on its way. It lasts until [`DataLun::release_raw`], or until the process has ended
    /// and every command of this path with it. The default has no means: the mapping's lock has to do, and time.
    fn take_raw(&self, exclusive: bool) -> Result<bool, LunError> {
        let _ = exclusive;
        Ok(true)
    }

    /// Gives back what [`DataLun::take_raw`] took; every command of the path has ended.
    fn release_raw(&self) -> Result<(), LunError> {
        Ok(())
    }
}
