//! Owns: what this host knows of the free blocks of each LUN: hints, counted while nobody waits.
//! Promises: a hint is never believed without reading the cell; own changes are counted at once, and a count that one of them met is read again.
//! Must not know: who takes blocks, and for what.

use std::cell::{Cell as StdCell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::blocks::{Blocks, place_of_cell};
use crate::context::Member;
use crate::env::Instant;
use crate::error::FsError;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableCell};
use crate::units::{BlockAddress, BlockNo, LunIndex};

/// A LUN with more table cells than this is counted again at most once in [`LOOK_AGAIN_AFTER`] because it seems full; a smaller one each
/// time, unless there is another LUN.
const SMALL_TABLE: u64 = 4096;
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Hint of a table cell whose free entries are not known.
pub(super) const UNKNOWN: u8 = u8::MAX;
/// Table cells read with one command while the free space is counted.
const SCAN_CELLS: usize = 1024;

/// What this host knows of the free blocks of one LUN: a hint a table cell, never believed without reading the cell.
pub(super) struct Hints {
    pub free: RefCell<Vec<u8>>,
    counted: StdCell<u64>,
    known_cells: StdCell<u64>,
    pub cursor: StdCell<u64>,
    /// Own changes so far: a count that was read while one was made is read again.
    pub changes: StdCell<u64>,
    looked_again: StdCell<Option<Instant>>,
}

impl Hints {
    fn is_complete(&self) -> bool {
        self.known_cells.get() == self.free.borrow().len() as u64
    }
}

/// Blocks of a LUN or of the volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCount {
    /// All.
    pub total: u64,
    /// Free, as far as is known.
    pub free: u64,
    /// Every table cell was looked at since the volume was mounted.
    pub complete: bool,
}

impl Blocks {
    pub(super) fn hints(&self, member: &Member) -> Rc<Hints> {
        let mut all = self.hints.borrow_mut();
        let make = || {
            let cells = member.layout().table_cell_count();
            let slot = self.context.own_slot(member.index).map_or(0, |own| u64::from(own.slot.0));
            Rc::new(Hints {
                free: RefCell::new(vec![UNKNOWN; cells as usize]),
                counted: StdCell::new(0),
                known_cells: StdCell::new(0),
                // Neighbouring slots start far apart: bit-reversed slot number as a fraction of the LUN.
                cursor: StdCell::new(u64::from((slot as u8).reverse_bits()) * cells / 256),
                changes: StdCell::new(0),
                looked_again: StdCell::new(None),
            })
        };
        let hints = all.entry(member.index).or_insert_with(make).clone();
        let cells = member.layout().table_cell_count() as usize;
        if hints.free.borrow().len() < cells {
            // The LUN has grown.
            hints.free.borrow_mut().resize(cells, UNKNOWN);
        }
        hints
    }

    pub(super) fn learn(&self, member: &Member, hints: &Hints, number: u64, table: &TableCell) {
        let Some((_, first, used)) = member.layout().table_cell(number) else { return };
        let free = table.entries[..used].iter().filter(|e| e.kind == EntryKind::Free).count() as u8;
        let old = std::mem::replace(&mut hints.free.borrow_mut()[number as usize], free);
        if old == UNKNOWN {
            hints.known_cells.set(hints.known_cells.get() + 1);
        }
        hints.counted.set(hints.counted.get() + u64::from(free) - if old == UNKNOWN { 0 } else { u64::from(old) });
        for (nth, entry) in table.entries[..used].iter().enumerate() {
            let set = match entry.kind {
                EntryKind::FdContainer => &self.containers.fds,
                EntryKind::UnitContainer => &self.containers.units,
                _ => continue,
            };
            if let Some(block) = BlockNo::new(first.get() + nth as u64) {
                set.borrow_mut().insert(BlockAddress { lun: member.index, block });
            }
        }
    }

    /// Free and all blocks of a LUN. Own changes are counted at once, other hosts' when their table cells are read again.
    pub fn count(&self, lun: LunIndex) -> BlockCount {
        let Ok(member) = self.context.member(lun) else { return BlockCount::default() };
        let hints = self.hints(&member);
        let total = member.layout().block_count();
        let complete = hints.is_complete();
        // What was not looked at yet is taken for free.
        let per = entries_per_cell(member.layout().cell_size) as u64;
        let unknown = (member.layout().table_cell_count() - hints.known_cells.get()) * per;
        BlockCount { total, free: (hints.counted.get() + unknown).min(total), complete }
    }

    /// Reads up to `cells` table cells of a LUN from cell `from` on and counts them; gives the next cell, `None` at the end.
    pub async fn scan(&self, lun: LunIndex, from: u64, cells: usize) -> Result<Option<u64>, FsError> {
        let member = self.context.member(lun)?;
        let hints = self.hints(&member);
        let total = member.layout().table_cell_count();
        let (mut number, end) = (from, (from + cells as u64).min(total));
        while number < end {
            let (at, _, _) = member.layout().table_cell(number).expect("the number is below the count");
            let size = member.layout().cell_size.bytes() as u64;
            let mut run = 1;
            while run < SCAN_CELLS as u64
                && number + run < end
                && member
                    .layout()
                    .table_cell(number + run)
                    .is_some_and(|(next, _, _)| next.offset == at.offset + run * size)
            {
                run += 1;
            }
            let changes = hints.changes.get();
            let cells = self.context.io.read_span(&member.lun, at, run as usize).await?;
            if changes != hints.changes.get() {
                // What was read may be older than what is known by now.
                continue;
            }
            for (nth, cell) in cells.into_iter().enumerate() {
                let number = number + nth as u64;
                let table = match cell.as_ref().map(|cell| TableCell::decode(member.layout().cell_size, cell.payload()))
                {
                    Ok(Ok(table)) => table,
                    _ => self.tables.read(place_of_cell(&member, number).expect("below the count")).await?,
                };
                self.learn(&member, &hints, number, &table);
            }
            number += run;
        }
        Ok((end < total).then_some(end))
    }

    /// Counts a LUN again that seems full: other hosts may have freed blocks. `false`: that was done a moment ago, and the table is large
    /// or there are other LUNs (`elsewhere`).
    pub(super) async fn look_again(&self, lun: LunIndex, elsewhere: bool) -> Result<bool, FsError> {
        let member = self.context.member(lun)?;
        let hints = self.hints(&member);
        let (cells, now) = (member.layout().table_cell_count(), self.context.env().now());
        let is_recent = hints.looked_again.get().is_some_and(|last| now < last.after(LOOK_AGAIN_AFTER));
        if (cells > SMALL_TABLE || elsewhere) && is_recent {
            return Ok(false);
        }
        hints.looked_again.set(Some(now));
        self.scan(lun, 0, cells as usize).await?;
        Ok(true)
    }
}
