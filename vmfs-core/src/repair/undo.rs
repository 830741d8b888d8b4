//! Owns: telling an undo log what stands where a repair is about to write.
//! Promises: nothing is written before the log has said that the old bytes are safe.
//! Must not know: where the log is kept.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use crate::buf::AlignedBuf;
use crate::env::LocalFuture;
use crate::error::FsError;
use crate::format::header::{DeviceIdentity, LockMode};
use crate::lun::{CompareAndWrite, Compared, DataLun, Fencing, Lun, LunError, LunErrorKind, PathOwner, Reservation};
use crate::units::{CellSize, SlotId};

/// Keeps what a repair overwrites.
pub trait UndoLog {
    /// These bytes stand at `offset` of the `lun`-th LUN, as they were given, and are about to be overwritten. Returns when they are
    /// durable in the log.
    fn before(&self, lun: usize, offset: u64, bytes: &[u8]) -> Result<(), FsError>;
}

/// A LUN whose every overwritten range goes to an undo log first.
pub(super) struct UndoLun {
    inner: Rc<dyn Lun>,
    nth: usize,
    log: Rc<dyn UndoLog>,
}

/// Bytes that are logged with one record.
const PIECE: u64 = 1 << 20;

impl UndoLun {
    pub fn new(inner: Rc<dyn Lun>, nth: usize, log: Rc<dyn UndoLog>) -> UndoLun {
        UndoLun { inner, nth, log }
    }

    async fn log(&self, command: &'static str, offset: u64, length: u64) -> Result<(), LunError> {
        let alignment = self.inner.alignment() as u64;
        let mut at = offset - offset % alignment;
        let end = (offset + length).next_multiple_of(alignment);
        while at < end {
            let piece = PIECE.min(end - at);
            let bytes = self.inner.read(at, piece as usize).await?;
            self.log.before(self.nth, at, &bytes).map_err(|error| LunError {
                kind: LunErrorKind::OutOfRange,
                lun: self.inner.name().to_owned(),
                command,
                offset,
                length,
                cause: io::Error::other(format!("not sent, for the undo log could not be written: {error}")),
            })?;
            at += piece;
        }
        Ok(())
    }
}

impl Lun for UndoLun {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn cell_size(&self) -> Option<CellSize> {
        self.inner.cell_size()
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn identity(&self) -> DeviceIdentity {
        self.inner.identity()
    }

    fn lock_mode(&self) -> LockMode {
        self.inner.lock_mode()
    }

    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        self.inner.read(offset, length)
    }

    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            self.log("write", offset, data.len() as u64).await?;
            self.inner.write(offset, data).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.inner.flush()
    }

    /// Blocks that a repair frees keep their bytes: what was given back could not be put back.
    fn unmap(&self, _: u64, _: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            self.log("write of zeros", offset, length).await?;
            self.inner.write_zeroes(offset, length).await
        })
    }

    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>> {
        let (expect, new) = (expect.to_vec(), new.to_vec());
        Box::pin(async move {
            self.log("compare-and-write", offset, new.len() as u64).await?;
            self.inner.compare_and_write(offset, &expect, &new).await
        })
    }

    /// One after another: the order of the records is the order of the changes.
    fn compare_and_write_many<'a>(
        &'a self,
        cells: &'a [CompareAndWrite<'a>],
    ) -> LocalFuture<'a, Vec<Result<Compared, LunError>>> {
        Box::pin(async move {
            let mut answers = Vec::with_capacity(cells.len());
            for cell in cells {
                answers.push(self.compare_and_write(cell.offset, cell.expect, cell.new).await);
            }
            answers
        })
    }

    fn data(&self) -> Arc<dyn DataLun> {
        self.inner.data()
    }

    fn mark_paths(&self, owner: PathOwner) -> LocalFuture<'_, Result<(), LunError>> {
        self.inner.mark_paths(owner)
    }

    fn evict(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.inner.evict()
    }

    fn unmark_paths(&self) -> LocalFuture<'_, ()> {
        self.inner.unmark_paths()
    }

    fn tend(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.inner.tend()
    }

    fn reservation(&self) -> Option<Reservation> {
        self.inner.reservation()
    }

    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        self.inner.fence(victim)
    }

    fn end_fence(&self, slot: SlotId) {
        self.inner.end_fence(slot);
    }
}
