//! Owns: reads and writes in place, on runs whose references are held.
//! Promises: the gate is asked before each submission and again before what was read counts; unaligned memory is bounced.
//! Must not know: where runs come from, the mount.

use std::io;
use std::ops::Range;

use scsi::{DataBuffer, StorageError};
use vmfs_core::gate::GateState;

use super::stretch::{Batch, Piece};
use super::{VmfsDisk, Way};
use crate::file::failure;
use crate::ring::{Padding, Transfer};

/// Alignment of our own buffers: enough for every LUN.
pub(super) const OWN_ALIGNMENT: usize = 4096;

/// What is done with some bytes of a disk.
#[derive(Clone, Copy)]
pub(super) enum Work<'a> {
    /// Into this buffer.
    Read(&'a DataBuffer),
    /// From this buffer.
    Write { data: &'a DataBuffer, durable: bool },
    /// Zeros.
    Zero,
}

/// The gate of this LUN was closed before or while the bytes were moved: they do not count.
struct Stopped {
    lun: usize,
}

impl VmfsDisk {
    /// Does `work` on a batch that begins `done` bytes after byte `position` of the disk, where the work's buffer begins. Returns
    /// how many bytes are done: none if the gate was closed; it is open again then.
    pub(super) async fn carry_out(
        &self,
        work: Work<'_>,
        batch: Batch,
        done: usize,
        position: u64,
    ) -> Result<usize, StorageError> {
        let length = batch.length as usize;
        let one = |piece| self.move_piece(work, piece, done, position);
        let stopped = match (batch.count, batch.pieces) {
            (1, [piece, ..]) => one(piece).await?,
            (_, [first, second, third, fourth]) => {
                let (first, second, third, fourth) = tokio::join!(one(first), one(second), one(third), one(fourth));
                first?.or(second?).or(third?).or(fourth?)
            }
        };
        match stopped {
            None => Ok(length),
            Some(Stopped { lun }) => self.keeper.pass(Some(lun)).await.map(|()| 0),
        }
    }

    async fn move_piece(
        &self,
        work: Work<'_>,
        piece: Option<Piece>,
        done: usize,
        position: u64,
    ) -> Result<Option<Stopped>, StorageError> {
        let Some(piece) = piece else { return Ok(None) };
        let stopped = Some(Stopped { lun: piece.lun });
        if self.keeper.state(piece.lun) != GateState::Open {
            return Ok(stopped);
        }
        let start = done + piece.start;
        let result = self.move_bytes(work, piece.lun, piece.offset, start..start + piece.length).await;
        match result {
            // A write that was sent in time and has ended is done, whatever the gate says now.
            Ok(()) if !matches!(work, Work::Read(_)) => Ok(None),
            _ if self.keeper.state(piece.lun) != GateState::Open => Ok(stopped),
            Ok(()) => Ok(None),
            Err(error) if self.is_shut_out(&error) => Ok(stopped),
            Err(error) => Err(failure(position + start as u64)(error)),
        }
    }

    /// Moves the bytes `range` of the work's buffer from or to byte `offset` of a LUN.
    async fn move_bytes(&self, work: Work<'_>, lun: usize, offset: u64, range: Range<usize>) -> io::Result<()> {
        let position = lun;
        let lun = self.lun(position)?;
        let (way, part) = match work {
            Work::Read(buffer) => (Transfer::Read, buffer.slice(range)),
            Work::Write { data, durable: false } => (Transfer::Write, data.slice(range)),
            Work::Write { data, durable: true } => (Transfer::DurableWrite, data.slice(range)),
            Work::Zero => return self.write_padded(position, offset, (range.len(), &DataBuffer::empty(), 0)).await,
        };
        let ring = match &lun.way {
            Way::Ring(ring) => ring,
            Way::Session(session) => return self.move_by_session(position, way, offset, &part, session).await,
        };
        if part.is_aligned(lun.alignment) {
            return ring.transfer(way, offset, &part).await;
        }
        let bounce = DataBuffer::zeroed(part.len(), OWN_ALIGNMENT);
        if way != Transfer::Read {
            bounce.copy_from_buffer(&part);
        }
        ring.transfer(way, offset, &bounce).await?;
        if way == Transfer::Read {
            part.copy_from_buffer(&bounce);
        }
        Ok(())
    }

    /// Whether the storage refuses this host, which another one has fenced then: the disk is lost. So the kernel tells of a RESERVATION
    /// CONFLICT (EBADE).
    pub(super) fn is_shut_out(&self, error: &io::Error) -> bool {
        let is_shut_out = error.raw_os_error() == Some(libc::EBADE);
        if is_shut_out {
            self.keeper.lose("the storage refuses this host (RESERVATION CONFLICT): another host has fenced it");
        }
        is_shut_out
    }

    /// Writes `part`, which is aligned, to a LUN with `before` bytes of zeros before it and `after` behind it.
    pub(super) async fn write_padded(
        &self,
        lun: usize,
        offset: u64,
        (before, part, after): (usize, &DataBuffer, usize),
    ) -> io::Result<()> {
        match &self.lun(lun)?.way {
            Way::Ring(ring) => {
                let padding = Padding { zeros: &self.zeros, before, after };
                ring.write_padded(offset, part, padding).await
            }
            Way::Session(session) => self.write_padded_by_session(lun, offset, (before, part, after), session).await,
        }
    }
}
