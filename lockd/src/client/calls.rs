//! Owns: what a program asks of a mount for one open disk, and the way to ask it: ioctls on the open file.
//! Promises: an open disk whose mount has gone, or wants it back, says so without blocking.
//! Must not know: what the answers are used for.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use parking_lot::Mutex;
use vmfs_core::units::LunIndex;

use super::Connection;
use super::direct::{Lun, SessionNumber, open_luns};
use crate::ioctl::{self, RunPage};
use crate::protocol::Ticket;

/// What a mount does for one open disk. Each call blocks until the mount has answered.
pub trait MountCalls: Send + Sync {
    /// The runs of a byte range ([`ioctl::EXTENTS`]).
    fn extents(&self, page: &mut RunPage) -> io::Result<()>;

    /// Space for a byte range ([`ioctl::ALLOCATE`]).
    fn allocate(&self, page: &mut RunPage) -> io::Result<()>;

    /// The granules of a grant are written, or given up ([`ioctl::FILLED`]).
    fn filled(&self, grant: u64, written: bool) -> io::Result<()>;

    /// Flushes the LUNs and publishes what was filled ([`ioctl::FLUSH`]).
    fn flush(&self) -> io::Result<()>;

    /// Makes a range read as zeros and gives its space back ([`ioctl::PUNCH`]).
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// The LUNs of the volume that are not among `present`, opened for this program. A mount whose LUNs never change has none.
    fn more_luns(&self, present: &[LunIndex]) -> io::Result<Vec<Lun>> {
        let _ = present;
        Ok(Vec::new())
    }

    /// Has the mount say that it lives, after the session with a LUN has been registered anew.
    fn confirm_session(&self, lun: LunIndex, session: SessionNumber, place: Option<String>) -> io::Result<()> {
        let _ = (lun, session, place);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The size in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Why the disk has to be closed, once it has to. Never blocks.
    fn withdrawn(&self) -> Option<Withdrawn>;
}

/// Why a program has to stop using a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Withdrawn {
    /// The mount wants it back.
    #[error("the mount asks for the disk back")]
    Revoked,
    /// The program that mounted the volume has ended or hung up: nobody vouches for the lock any more.
    #[error("the program that mounted the volume has ended, or closed its connection")]
    MountEnded,
}

/// A disk that is open on a mount.
pub(super) struct OpenDisk {
    // Dropped in this order: the file's end lets the mount release the lock.
    pub(super) revoke: OwnedFd,
    pub(super) connection: Arc<Mutex<Connection>>,
    pub(super) file: File,
    pub(super) ticket: Ticket,
    pub(super) path: PathBuf,
    pub(super) writable: bool,
}

impl MountCalls for OpenDisk {
    fn extents(&self, page: &mut RunPage) -> io::Result<()> {
        ioctl::extents(&self.file, page)
    }

    fn allocate(&self, page: &mut RunPage) -> io::Result<()> {
        ioctl::allocate(&self.file, page)
    }

    fn filled(&self, grant: u64, written: bool) -> io::Result<()> {
        ioctl::filled(&self.file, grant, written)
    }

    fn flush(&self) -> io::Result<()> {
        ioctl::flush(&self.file)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        ioctl::punch(&self.file, offset, length)
    }

    fn more_luns(&self, present: &[LunIndex]) -> io::Result<Vec<Lun>> {
        let mut connection = self.connection.lock();
        let (attachment, ..) = connection.attach(self.ticket).map_err(io::Error::other)?;
        let asked = (self.path.as_path(), self.ticket, self.writable);
        open_luns(asked, &mut connection, &attachment, present).map_err(io::Error::other)
    }

    fn confirm_session(&self, lun: LunIndex, session: SessionNumber, place: Option<String>) -> io::Result<()> {
        let mut connection = self.connection.lock();
        connection.confirm_session(self.ticket, lun.get(), session.0, place).map_err(io::Error::other)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn withdrawn(&self) -> Option<Withdrawn> {
        // While the connection is in use its user sees its end; the caller asks again soon.
        let connection = self.connection.try_lock()?;
        let mut events = [PollFd::new(&self.revoke, PollFlags::IN), PollFd::new(connection.socket(), PollFlags::RDHUP)];
        // A failure (no memory) is no answer: the caller asks again soon.
        poll(&mut events, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).ok()?;
        if events[0].revents().contains(PollFlags::IN) {
            return Some(Withdrawn::Revoked);
        }
        events[1]
            .revents()
            .intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR)
            .then_some(Withdrawn::MountEnded)
    }
}
