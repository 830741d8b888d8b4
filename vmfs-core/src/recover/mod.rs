//! Owns: cleaning up after an incarnation that is gone: everything that it allocated, marked or began and that nothing reaches.
//! Promises: what is freed can be reached by nobody and by no command that is still on its way; what is interrupted can be begun
//! again, also by another host. Must not know: who found out that the incarnation is gone, how it was fenced.
//!
//! The order is the proof (rule R1): the slot was claimed before; then the cell in which a change may still land is re-stamped, which
//! makes every older compare-and-write to it void; then it is looked whether the thing is reachable; then it is freed or kept.

mod blocks;
mod contested;
mod reach;
mod roots;
mod units;

use std::rc::Rc;

pub use contested::settle_contested;

use self::reach::Reach;
use crate::alloc::table::Tables;
use crate::breaking;
use crate::cas::{CasOutcome, CellChange};
use crate::context::{Context, Member};
use crate::directory::Names;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::{Arena, Place};
use crate::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use crate::format::layout::arena_cell;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::{Cell, CellKind};
use crate::object::Objects;
use crate::sabotage::{Sabotage, active};
use crate::slot;
use crate::units::{BlockAddress, BlockNo, SlotRef};

/// Re-stamps of the arena cell that lose before that is given up.
const TRIES: u32 = 16;
/// Table cells looked through for containers in one step, when the arena says "anywhere".
const SCAN_CELLS: usize = 1024;

/// What a recovery did on one LUN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Units freed.
    pub units: u64,
    /// Blocks freed.
    pub blocks: u64,
    /// Blocks kept from use: a write of the incarnation may still arrive.
    pub quarantined: u64,
    /// Marks on objects decided.
    pub marks: u64,
}

/// The parts of a mounted volume that recovery works with.
pub struct Parts<'a> {
    /// What they share.
    pub context: &'a Rc<Context>,
    /// Objects.
    pub objects: &'a Rc<Objects>,
    /// Names.
    pub names: &'a Rc<Names>,
}

/// One recovery.
struct Recovery<'a> {
    parts: &'a Parts<'a>,
    member: Rc<Member>,
    dead: SlotRef,
    /// The storage has proven that no write of the incarnation can arrive any more.
    fenced: bool,
    reach: Reach<'a>,
    done: Recovered,
}

/// Recovers the incarnation in a dirty slot that this host has claimed; `dirty` is the slot's heartbeat. The caller frees the objects
/// that have lost their names ([`Names::take_removed`]) and then the slot.
///
/// # Errors
/// Kind `Busy`: another host recovers it by now. After any error it can be begun again.
pub async fn recover(
    parts: &Parts<'_>,
    member: &Rc<Member>,
    dead: SlotRef,
    dirty: &Heartbeat,
) -> Result<Recovered, FsError> {
    let mut recovery = Recovery {
        parts,
        member: member.clone(),
        dead,
        fenced: dirty.fence_grade == FenceGrade::A || active(Sabotage::QuarantineSkipped),
        reach: Reach::new(parts),
        done: Recovered::default(),
    };
    recovery.run().await?;
    Ok(recovery.done)
}

impl Recovery<'_> {
    async fn run(&mut self) -> Result<(), FsError> {
        let mut places = self.places().await?;
        // Objects first: what they lose their names with goes by the ordinary way.
        places.sort_by_key(|place| match place {
            Place::FdContainer(block) => (0, *block),
            Place::TableCell(number) => (1, *number),
            Place::UnitContainer(block) => (2, *block),
        });
        for place in places {
            match place {
                Place::FdContainer(block) => self.fd_container(self.block(block)?).await?,
                Place::TableCell(number) => self.table_cell(number).await?,
                Place::UnitContainer(block) => self.unit_container(self.block(block)?).await?,
            }
        }
        Ok(())
    }

    fn context(&self) -> &Rc<Context> {
        self.parts.context
    }

    fn tables(&self) -> &Rc<Tables> {
        &self.parts.objects.space().tables
    }

    fn block(&self, number: u64) -> Result<BlockAddress, FsError> {
        let block = BlockNo::new(number).filter(|block| self.member.layout().block_offset(*block).is_some());
        let block = block.ok_or_else(|| {
            let message =
                format!("the arena of {} names block {number}, which {} does not have", self.dead, self.member.index);
            FsError::refused(FsErrorKind::Corrupt, message)
        })?;
        Ok(BlockAddress { lun: self.member.index, block })
    }

    /// The slot is still this host's to recover: read after what is to be changed was known.
    async fn still_claimed(&self) -> Result<(), FsError> {
        let lun = self.member.index;
        let (_, found) = slot::read_slot(&self.context().io, &self.member.lun, lun, self.dead.slot).await?;
        let is_ours = found.state == SlotState::Dirty
            && found.generation == self.dead.generation
            && breaking::is_own(self.context(), &found);
        if is_ours {
            return Ok(());
        }
        let message = format!("{} of {} is recovered by another host by now", self.dead, self.member.lun.name());
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// Where the incarnation may have left something. No place is listed afterwards: its arena cell is re-stamped first.
    async fn places(&self) -> Result<Vec<Place>, FsError> {
        let arena = self.arena().await?;
        // It may have worked in a part of the LUN that came later.
        self.context().read_geometry(&self.member).await?;
        if arena.generation != self.dead.generation {
            // It died before its arena was emptied: before it did anything.
            return Ok(Vec::new());
        }
        if arena.anywhere { self.everywhere().await } else { Ok(arena.places) }
    }

    async fn arena(&self) -> Result<Arena, FsError> {
        let at = arena_cell(self.member.index, self.dead.slot);
        let corrupt = |cause| FsError::Corrupt { structure: format!("arena cell {at}"), cause };
        for _ in 0..TRIES {
            let cell: Cell = self.context().read_cell(at).await?;
            cell.expect_kind(CellKind::Arena).map_err(corrupt)?;
            let arena = Arena::decode(self.context().cell_size(), cell.payload()).map_err(corrupt)?;
            self.still_claimed().await?;
            self.context().prove_live([self.member.index]).await?;
            match self.context().cas(&cell, CellChange::same(&cell)).await? {
                CasOutcome::Applied(_) => return Ok(arena),
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        Err(FsError::refused(FsErrorKind::Busy, format!("arena cell {at} is changed by another host all the time")))
    }

    /// Every table cell and every container of the LUN.
    async fn everywhere(&self) -> Result<Vec<Place>, FsError> {
        let (blocks, lun) = (&self.parts.objects.space().blocks, self.member.index);
        let mut from = Some(0);
        while let Some(at) = from {
            from = blocks.scan(lun, at, SCAN_CELLS).await?;
        }
        let cells = (0..self.member.layout().table_cell_count()).map(Place::TableCell);
        let of_lun = |set: &std::collections::BTreeSet<BlockAddress>| -> Vec<u64> {
            set.iter().filter(|at| at.lun == lun).map(|at| at.block.get()).collect()
        };
        let (fds, units) = (of_lun(&blocks.containers().fds.borrow()), of_lun(&blocks.containers().units.borrow()));
        Ok(cells
            .chain(fds.into_iter().map(Place::FdContainer))
            .chain(units.into_iter().map(Place::UnitContainer))
            .collect())
    }

    /// Whether an entry was made or marked by the incarnation.
    fn is_its(&self, entry: &TableEntry) -> bool {
        let kinds = !matches!(
            entry.kind,
            EntryKind::Free
                | EntryKind::FdContainer
                | EntryKind::UnitContainer
                | EntryKind::Table
                | EntryKind::Gone
                | EntryKind::Window
        );
        kinds && (entry.slot, entry.generation_low) == (self.dead.slot, self.dead.generation.low())
    }

    /// What stays reachable after a mark of the incarnation is taken off it.
    fn kept(&self, entry: &TableEntry) -> Result<TableEntry, FsError> {
        let by = self.context().own_slot(self.member.index)?;
        Ok(TableEntry {
            kind: entry.was,
            slot: by.slot,
            generation_low: by.generation.low(),
            was: EntryKind::Free,
            ..*entry
        })
    }
}
