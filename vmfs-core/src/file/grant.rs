//! Owns: the value that carries "map, move, publish" in this order: granules lent to one writer.
//! Promises: a grant that is dropped unfilled leaves its granules unwritten and frees whoever waits for them.
//! Must not know: where the space came from, when it is published.

use std::sync::Arc;

use super::open_file::{Permit, SharedFile};
use crate::mapping::epoch::{RunRef, stripe_end};
use crate::mapping::granules::GranuleEvent;
use crate::mapping::runs::FillPiece;
use crate::units::LunIndex;

/// One contiguous piece of a grant on a LUN, made of whole granules.
#[derive(Debug)]
pub struct GrantPiece {
    /// Where in the file, in bytes, a multiple of the granule.
    pub file_offset: u64,
    /// Bytes, a multiple of the granule.
    pub length: u64,
    /// The LUN.
    pub lun: LunIndex,
    /// Bytes from the LUN's start.
    pub offset: u64,
    /// What the gate is asked with before the submission.
    pub permit: Permit,
    _reference: RunRef,
}

/// Granules that only the owner of this value writes. It writes each piece whole, zeros around its own bytes, then
/// calls [`Grant::filled`]. An empty grant says: look again, the range is now writable in place.
#[derive(Debug)]
pub struct Grant {
    file: Arc<SharedFile>,
    pieces: Vec<GrantPiece>,
    settled: bool,
}

impl Grant {
    /// Takes references on `fills`, which the caller has just marked with the map locked for writing. `None`: a piece lies on a
    /// LUN where this host had no slot when it took the lock.
    pub(crate) fn new(file: &Arc<SharedFile>, fills: &[FillPiece], access: &super::open_file::Access) -> Option<Grant> {
        let mut pieces = Vec::with_capacity(fills.len());
        for fill in fills {
            let mut at = 0;
            while at < fill.length {
                let file_offset = fill.file_offset + at;
                let length = (fill.length - at).min(stripe_end(file_offset) - file_offset);
                pieces.push(GrantPiece {
                    file_offset,
                    length,
                    lun: fill.lun,
                    offset: fill.offset + at,
                    permit: access.permit(fill.lun)?,
                    _reference: file.references.take(file_offset),
                });
                at += length;
            }
        }
        Some(Grant { file: file.clone(), pieces, settled: false })
    }

    /// Nothing to fill.
    pub(crate) fn empty(file: &Arc<SharedFile>) -> Result<Grant, crate::error::FsError> {
        Ok(Grant { file: file.clone(), pieces: Vec::new(), settled: true })
    }

    /// The pieces, ascending and without gaps in the file.
    pub fn pieces(&self) -> &[GrantPiece] {
        &self.pieces
    }

    /// The file.
    pub fn file(&self) -> &Arc<SharedFile> {
        &self.file
    }

    /// Whether there is nothing to fill: resolve the range again.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// First and last byte (exclusive) of the granted range in the file.
    pub fn range(&self) -> std::ops::Range<u64> {
        let start = self.pieces.first().map_or(0, |p| p.file_offset);
        start..self.pieces.last().map_or(0, |p| p.file_offset + p.length)
    }

    /// Every piece was written whole; the owner's own bytes end at file offset `end`. `durable`: no flush is needed.
    pub fn filled(self, end: u64, durable: bool) {
        let all = self.pieces.len();
        self.filled_in_part(all, end, durable);
    }

    /// The first `count` pieces were written whole, the others are given up.
    pub fn filled_in_part(mut self, count: usize, end: u64, durable: bool) {
        let (done, rest) = self.pieces.split_at(count);
        if !durable {
            done.iter().for_each(|piece| self.file.note_unflushed(piece.lun));
        }
        if let Some(last) = done.last() {
            self.file.note_size(end.min(last.file_offset + last.length));
        }
        end_fill(&self.file, done, GranuleEvent::EndFill);
        end_fill(&self.file, rest, GranuleEvent::AbandonFill);
        self.settled = true;
    }
}

fn end_fill(file: &SharedFile, pieces: &[GrantPiece], event: GranuleEvent) {
    if pieces.is_empty() {
        return;
    }
    let mut state = file.state.write();
    for piece in pieces {
        state.runs.end_fill(piece.file_offset..piece.file_offset + piece.length, event);
    }
    drop(state);
    file.fill_ended.notify_waiters();
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.settled {
            end_fill(&self.file, &self.pieces, GranuleEvent::AbandonFill);
        }
    }
}
