//! Owns: the PB cells of a file that were read last, as expected images for the next change.
//! Promises: bounded; only the holder of the file's lock keeps them, and nobody else changes them but by re-stamp.
//! Must not know: what the pointers mean.

use crate::context::Moment;
use crate::format::Cell;
use crate::units::CellAddress;

/// Cells kept for one file.
const KEPT: usize = 16;

/// The last PB cells of one file.
#[derive(Debug, Default)]
pub(super) struct CellCache {
    kept: Vec<(Cell, Moment)>,
}

impl CellCache {
    pub(super) fn get(&self, at: CellAddress) -> Option<Cell> {
        self.kept.iter().find(|(cell, _)| cell.address() == at).map(|(cell, _)| cell.clone())
    }

    /// When this very image was read or written; evidence for its change must be newer (rule R1).
    pub(super) fn moment(&self, image: &Cell) -> Option<Moment> {
        self.kept.iter().find(|(cell, _)| cell == image).map(|(_, moment)| *moment)
    }

    /// Keeps a cell whose image was known at `moment` at the latest.
    pub(super) fn put(&mut self, cell: Cell, moment: Moment) {
        self.forget(cell.address());
        if self.kept.len() == KEPT {
            self.kept.remove(0);
        }
        self.kept.push((cell, moment));
    }

    pub(super) fn forget(&mut self, at: CellAddress) {
        self.kept.retain(|(kept, _)| kept.address() != at);
    }

    pub(super) fn clear(&mut self) {
        self.kept.clear();
    }
}
