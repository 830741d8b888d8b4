//! Owns: moving cells from a LUN into a window.
//! Promises: whatever dies or hangs at whatever command, each cell is valid in one place; several movers at once do no harm; nothing
//! rests on a lease. Must not know: which cells there are, why they move.
//!
//! ```text
//! read the window's image W ──> read the cell E ──> W = E durably ──> the cell E becomes "moved"
//! ```
//!
//! W is known before E is read (R1): once the cell has left, no W that a mover knows is in the window any more, for the window held the
//! last E then, and images do not come back (R2). So a mover that is late changes nothing there.

use std::rc::Rc;
use std::time::Duration;

use super::member_lun::widened;
use crate::cas::{CellChange, CellIo};
use crate::error::{FsError, FsErrorKind};
use crate::format::moved::Moved;
use crate::format::{Cell, CellKind};
use crate::lun::{CompareAndWrite, Compared, Lun, LunError};
use crate::sabotage::{Sabotage, active};
use crate::units::{CellAddress, Link, LunIndex, SlotRef, Token};

/// Rounds in which cells that are changed all the time are tried.
const ROUNDS: u32 = 200;
/// Rounds in which a cell that fails its checks is read again.
const READ_TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(2);

/// Cells that lie in the same distances on the LUN and in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Byte offset of the first on the LUN.
    pub from: u64,
    /// Byte offset of the first on the carrier.
    pub to: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// Cells.
    pub count: usize,
}

/// From where to where.
pub struct Way<'a> {
    /// Reads and changes cells of the volume.
    pub io: &'a CellIo,
    /// The LUN whose cells move.
    pub lun: LunIndex,
    /// The bare LUN.
    pub own: Rc<dyn Lun>,
    /// The bare carrier.
    pub carrier: Rc<dyn Lun>,
    /// Where the window begins.
    pub window: CellAddress,
    /// Who writes.
    pub writer: SlotRef,
}

impl Way<'_> {
    /// Moves the cells of a batch; those that have left already are passed over.
    ///
    /// # Errors
    /// [`FsError::Corrupt`]: a cell fails its checks, it stays. Kind `Busy`: other hosts change a cell all the time. After any error it can
    /// be begun again.
    pub async fn move_batch(&self, batch: &Batch) -> Result<(), FsError> {
        for round in 0..ROUNDS {
            if round > 0 {
                self.io.env().sleep(PAUSE).await;
            }
            if self.round(batch, round).await? {
                return Ok(());
            }
        }
        let at = CellAddress { lun: self.lun, offset: batch.from };
        let message = format!("cells from {at} on: other hosts changed them {ROUNDS} times in a row; try again");
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// True: all cells of the batch have left.
    async fn round(&self, batch: &Batch, round: u32) -> Result<bool, FsError> {
        let late = active(Sabotage::WindowReadLast);
        let early = if late { Some(self.images(&self.own, batch.from, batch).await?) } else { None };
        let there = self.images(&self.carrier, batch.to, batch).await?;
        let here = match early {
            Some(here) => here,
            None => self.images(&self.own, batch.from, batch).await?,
        };
        let (mut copies, mut ready, mut all_left) = (Vec::new(), Vec::new(), true);
        for (nth, (image, copy)) in here.iter().zip(&there).enumerate() {
            let at = CellAddress { lun: self.lun, offset: batch.from + nth as u64 * batch.stride };
            let to = batch.to + nth as u64 * batch.stride;
            let cell = match Cell::decode(self.io.context(), at, image) {
                Ok(cell) => cell,
                Err(_) if round < READ_TRIES => {
                    all_left = false;
                    continue;
                }
                Err(cause) => {
                    let structure = format!("cell {at} of {} (run fsck.vmfs)", self.own.name());
                    return Err(FsError::Corrupt { structure, cause });
                }
            };
            if cell.header().kind == CellKind::Moved {
                self.check_moved(&cell, to)?;
                continue;
            }
            all_left = false;
            match cell.image() == &copy[..] {
                true => ready.push((cell, to)),
                false => copies.push((copy, cell, to)),
            }
        }
        if all_left {
            return Ok(true);
        }
        if !ready.is_empty() {
            // Another mover, or a command whose end was not known, wrote these.
            self.carrier.flush().await?;
        }
        let commands: Vec<_> = copies
            .iter()
            .map(|(copy, cell, to)| CompareAndWrite { offset: *to, expect: copy, new: cell.image() })
            .collect();
        let answers = self.carrier.compare_and_write_many(&commands).await;
        let mut failed = None;
        for ((_, cell, to), answer) in copies.iter().zip(answers) {
            match answer {
                Ok(Compared::Written) => ready.push((cell.clone(), *to)),
                _ if active(Sabotage::CopyUnproven) => ready.push((cell.clone(), *to)),
                Ok(Compared::Miscompare) => {}
                Err(error) => failed = Some(error),
            }
        }
        let stones: Vec<Cell> = ready.iter().map(|(cell, to)| self.moved(cell, *to)).collect();
        let commands: Vec<_> = ready
            .iter()
            .zip(&stones)
            .map(|((cell, _), stone)| CompareAndWrite {
                offset: cell.address().offset,
                expect: cell.image(),
                new: stone.image(),
            })
            .collect();
        for answer in self.own.compare_and_write_many(&commands).await {
            failed = answer.err().or(failed);
        }
        match failed {
            // What it did is seen in the next round.
            Some(error) if round + 1 == ROUNDS => Err(error.into()),
            _ => Ok(false),
        }
    }

    /// What stands in the place of a cell from then on.
    fn moved(&self, cell: &Cell, to: u64) -> Cell {
        let payload = Moved { carrier: self.window.lun, offset: to, window: self.window.offset }.encode();
        let change =
            CellChange { kind: CellKind::Moved, owner: None, link: Link(0), index: 0, token: Token(0), payload };
        self.io.successor(cell, change, self.writer)
    }

    fn check_moved(&self, cell: &Cell, to: u64) -> Result<(), FsError> {
        let corrupt = |cause| FsError::Corrupt { structure: format!("moved cell {}", cell.address()), cause };
        let moved = Moved::decode(cell.payload()).map_err(corrupt)?;
        if moved == (Moved { carrier: self.window.lun, offset: to, window: self.window.offset }) {
            return Ok(());
        }
        let message = format!(
            "cell {} has moved to {}+{:#x}, and not to the window {}; run fsck.vmfs",
            cell.address(),
            moved.carrier,
            moved.offset,
            self.window
        );
        Err(FsError::refused(FsErrorKind::Corrupt, message))
    }

    /// The images of a batch's cells, from `first` on of one of the LUNs.
    async fn images(&self, lun: &Rc<dyn Lun>, first: u64, batch: &Batch) -> Result<Vec<Box<[u8]>>, LunError> {
        let (size, stride) = (self.io.context().cell_size.bytes(), batch.stride as usize);
        let (start, skip, end) = widened(lun, first, (batch.count - 1) * stride + size);
        let bytes = lun.read(start, (end - start) as usize).await?;
        Ok((0..batch.count).map(|nth| bytes[skip + nth * stride..][..size].into()).collect())
    }
}
