//! Owns: the own pool of units, building the cells of a fresh unit, and reading a unit through its reference.
//! Promises: a fresh cell is compared with its remembered image only; a unit whose cells did not take that is given up; what is read
//! through a reference is what was committed under it, or an error.
//! Must not know: what the streams mean, when a commit is sent.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use tokio::sync::Mutex;

use super::all_done;
use super::blocks::Containers;
use super::roots::{LOOKED_THROUGH, format_container};
use super::table::{Reaches, TablePlace, Tables};
pub use super::unit_entries::{UnitEdit, UnitUse};
use super::unit_entries::{apply, is_marked, pooled, retiring};
use crate::cas::{CasOutcome, CellChange};
use crate::container::first_unit;
use crate::context::Context;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Place;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::unit::{UnitRef, cells_for};
use crate::format::{Cell, CellKind, FormatError};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, CellAddress, FdId, Link, LunIndex, Token, UnitAddress};

/// Units taken into the pool at a time, at most; those of one table cell.
const BATCH: usize = 32;
/// A pool in use that holds fewer is filled up in the background.
const LOW: usize = 16;
/// Units that stay in the pool for operations that free space.
const RESERVED: usize = 4;
/// Units of a LUN kept in the pool at most.
const POOLED: usize = 96;

/// What a unit is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Ordinary work: refused when only the reserve is left.
    Normal,
    /// An operation that frees space: may take the reserve.
    Freeing,
}

/// A unit of the own pool, with the images that its cells have.
#[derive(Debug)]
pub struct FreshUnit {
    /// The unit.
    pub at: UnitAddress,
    images: Vec<Cell>,
}

/// A unit whose cells are built and not yet written.
#[derive(Debug)]
pub struct PreparedUnit {
    /// What will reach it, once it is written and committed.
    pub reference: UnitRef,
    /// Its owner, index and kind.
    pub use_: UnitUse,
    writes: Vec<(Cell, Cell)>,
    rest: Vec<Cell>,
}

/// Edits of the entries of one table cell: {entry, unit, edit}.
type CellEdits = (TablePlace, Vec<(usize, UnitUse, UnitEdit)>);

/// The unit containers of a mounted volume.
pub struct Units {
    pub(super) context: Rc<Context>,
    tables: Rc<Tables>,
    containers: Rc<Containers>,
    pools: RefCell<BTreeMap<LunIndex, Rc<Mutex<Vec<FreshUnit>>>>>,
    full: RefCell<BTreeSet<CellAddress>>,
    looked: RefCell<BTreeSet<LunIndex>>,
    /// Table cells in which this host has taken units.
    taken_from: RefCell<BTreeMap<CellAddress, TablePlace>>,
}

/// The cell kind of a unit of this use.
fn cell_kind(kind: EntryKind) -> CellKind {
    match kind {
        EntryKind::PointerBlock => CellKind::PointerBlock,
        EntryKind::Inner => CellKind::Inner,
        EntryKind::Bucket => CellKind::Bucket,
        _ => CellKind::Body,
    }
}

impl Units {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, tables: Rc<Tables>, containers: Rc<Containers>) -> Units {
        Units {
            context,
            tables,
            containers,
            pools: RefCell::default(),
            full: RefCell::default(),
            looked: RefCell::default(),
            taken_from: RefCell::default(),
        }
    }

    fn pool(&self, lun: LunIndex) -> Rc<Mutex<Vec<FreshUnit>>> {
        self.pools.borrow_mut().entry(lun).or_default().clone()
    }

    /// Takes a unit of `lun` from the own pool, filling that first when it runs low. `NoSpace` when the LUN is full.
    pub async fn take(
        &self,
        blocks: &super::blocks::Blocks,
        lun: LunIndex,
        purpose: Purpose,
    ) -> Result<FreshUnit, FsError> {
        let pool = self.pool(lun);
        let mut pool = pool.lock().await;
        if pool.len() <= RESERVED {
            match self.refill(blocks, lun, purpose, &mut pool).await {
                Ok(()) => {}
                Err(error)
                    if error.kind() == FsErrorKind::NoSpace && !pool.is_empty() && purpose == Purpose::Freeing => {}
                Err(error) => return Err(error),
            }
        }
        if pool.is_empty() {
            return Err(full(lun));
        }
        Ok(pool.swap_remove(0))
    }

    /// Fills pools that are in use and run low, so that no change has to wait for that. A full LUN is no error: who needs a unit is told.
    pub async fn top_up(&self, blocks: &super::blocks::Blocks) -> Result<(), FsError> {
        let pools: Vec<_> = self.pools.borrow().iter().map(|(lun, pool)| (*lun, pool.clone())).collect();
        let mut result = Ok(());
        for (lun, pool) in pools {
            if self.context.is_lost(lun) {
                continue;
            }
            let mut pool = pool.lock().await;
            if self.context.is_draining(lun) {
                result = result.and(self.empty_pool(&mut pool).await);
                continue;
            }
            if pool.len() < LOW
                && let Err(error) = self.refill(blocks, lun, Purpose::Normal, &mut pool).await
                && error.kind() != FsErrorKind::NoSpace
            {
                result = result.and(Err(error));
            }
        }
        result
    }

    /// Gives the units of a pool back, one table cell after another.
    async fn empty_pool(&self, pool: &mut Vec<FreshUnit>) -> Result<(), FsError> {
        while let Some(last) = pool.last() {
            let (place, _) = self.place_of(last.at)?;
            let mine = pooled(self.context.own_slot(last.at.lun)?);
            let (given, kept): (Vec<FreshUnit>, Vec<FreshUnit>) = std::mem::take(pool)
                .into_iter()
                .partition(|unit| self.place_of(unit.at).is_ok_and(|(other, _)| other.at == place.at));
            *pool = kept;
            let numbers =
                given.iter().map(|unit| Ok(self.place_of(unit.at)?.1)).collect::<Result<Vec<_>, FsError>>()?;
            // After an error they stay `Pool` of this host until it leaves.
            let edited = self.tables.edit(place, |table| {
                for nth in &numbers {
                    if table.entries[*nth] == mine {
                        table.entries[*nth] = TableEntry::FREE;
                    }
                }
                Ok(())
            });
            edited.await?;
        }
        Ok(())
    }

    async fn refill(
        &self,
        blocks: &super::blocks::Blocks,
        lun: LunIndex,
        purpose: Purpose,
        pool: &mut Vec<FreshUnit>,
    ) -> Result<(), FsError> {
        if self.looked.borrow_mut().insert(lun) {
            blocks.scan(lun, 0, LOOKED_THROUGH).await?;
        }
        let mut looked_again = false;
        loop {
            let candidates: Vec<BlockAddress> =
                self.containers.units.borrow().iter().filter(|at| at.lun == lun).copied().collect();
            for container in candidates {
                if self.refill_from(container, pool).await? {
                    return Ok(());
                }
            }
            let Some(at) = blocks.take_for_container(lun, purpose).await? else {
                // Other hosts may have freed units since the tables were read.
                if looked_again {
                    return Err(full(lun));
                }
                looked_again = true;
                self.full.borrow_mut().retain(|at| at.lun != lun);
                continue;
            };
            format_container(&self.context, blocks, at, EntryKind::UnitContainer).await?;
        }
    }

    /// Takes a batch of free units of one container; `false` when it has none.
    async fn refill_from(&self, container: BlockAddress, pool: &mut Vec<FreshUnit>) -> Result<bool, FsError> {
        let member = self.context.member(container.lun)?;
        let by = self.context.own_slot(container.lun)?;
        let per = entries_per_cell(member.layout().cell_size);
        let units = member.layout().block_size.units() as usize;
        for cell in 0..units.div_ceil(per) {
            let first = (cell * per).max(usize::from(first_unit(&member.layout())));
            let end = ((cell + 1) * per).min(units);
            if first >= end {
                continue;
            }
            let probe = UnitAddress { lun: container.lun, block: container.block, unit: first as u16 };
            let (place, _) = self.place_of(probe)?;
            if self.full.borrow().contains(&place.at) {
                continue;
            }
            let mut chosen = Vec::new();
            self.taken_from.borrow_mut().insert(place.at, place);
            self.tables
                .edit(place, |table| {
                    chosen.clear();
                    for unit in first..end {
                        let entry = &mut table.entries[unit % per];
                        if chosen.len() < BATCH && entry.kind == EntryKind::Free {
                            *entry = pooled(by);
                            chosen.push(UnitAddress { unit: unit as u16, ..probe });
                        }
                    }
                    Ok(())
                })
                .await?;
            if chosen.is_empty() {
                self.full.borrow_mut().insert(place.at);
                continue;
            }
            pool.extend(self.remember(&chosen).await?);
            return Ok(true);
        }
        Ok(false)
    }

    /// Reads the images of units that are in the own pool since before this was called. A unit with a damaged cell is given up.
    async fn remember(&self, units: &[UnitAddress]) -> Result<Vec<FreshUnit>, FsError> {
        let count = self.context.cell_size().cells_per_unit();
        let reads = units.iter().map(async |at| {
            let member = self.context.member(at.lun)?;
            let first = self.cell_of(*at, 0)?;
            let cells = self.context.io.read_span(&member.lun, first, count).await?;
            Ok::<_, FsError>((*at, cells))
        });
        let read = futures_util::future::try_join_all(reads).await?;
        self.context.prove_live(units.first().map(|at| at.lun)).await?;
        let mut fresh = Vec::with_capacity(read.len());
        for (at, cells) in read {
            match cells.into_iter().collect::<Result<Vec<Cell>, FormatError>>() {
                Ok(images) => fresh.push(FreshUnit { at, images }),
                Err(error) => {
                    tracing::error!(%at, %error, "unit given up: a cell of it fails its checks; run fsck.vmfs");
                    self.context.member(at.lun)?.set_unresolved();
                }
            }
        }
        Ok(fresh)
    }

    /// Builds the cells that hold `stream` (a pointer block: all cells; others: as many as it needs). Nothing is written.
    ///
    /// # Errors
    /// `TooBig` when the stream fits no unit.
    #[expect(clippy::too_many_arguments, reason = "they are the fields of a cell's header")]
    pub fn prepare(
        &self,
        unit: FreshUnit,
        owner: FdId,
        link: Link,
        kind: EntryKind,
        index: u32,
        birth: u32,
        token: Token,
        stream: &[u8],
    ) -> Result<PreparedUnit, FsError> {
        let cell_size = self.context.cell_size();
        let needed = cells_for(cell_size, stream.len()).ok_or_else(|| {
            FsError::refused(FsErrorKind::TooBig, format!("{owner}: {} bytes fit no unit", stream.len()))
        })?;
        let used = if kind == EntryKind::PointerBlock { cell_size.cells_per_unit() as u8 } else { needed };
        let writer = self.context.own_slot(unit.at.lun)?;
        let mut images = unit.images.into_iter();
        let mut crc = 0;
        let mut writes = Vec::with_capacity(used.into());
        for (nth, expect) in images.by_ref().take(used.into()).enumerate() {
            let from = (nth * cell_size.payload()).min(stream.len());
            let end = (from + cell_size.payload()).min(stream.len());
            let payload = stream[from..end].to_vec();
            let change = CellChange { kind: cell_kind(kind), owner: Some(owner), link, index, token, payload };
            let new = self.context.io.successor(&expect, change, writer);
            crc = crc32c::crc32c_append(crc, new.image());
            writes.push((expect, new));
        }
        Ok(PreparedUnit {
            reference: UnitRef { at: unit.at, used_cells: used, crc, birth },
            use_: UnitUse { at: unit.at, owner, kind, index },
            writes,
            rest: images.collect(),
        })
    }

    /// Writes the cells of prepared units. `false`: some cell did not take it; the unit that it belongs to must be given up and
    /// the change begun again.
    pub async fn write(&self, units: &[PreparedUnit]) -> Result<bool, FsError> {
        let pairs = units.iter().flat_map(|unit| unit.writes.iter().cloned()).collect();
        let mut all = true;
        for outcome in self.context.cas_pairs(pairs).await {
            match outcome? {
                CasOutcome::Applied(_) => {}
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => all = false,
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        Ok(all)
    }

    /// A prepared unit that was written and will not be reached: back to a fresh one (its entry is the caller's to change).
    pub fn unprepare(&self, unit: PreparedUnit, written: bool) -> FreshUnit {
        let used = unit.writes.into_iter().map(|(expect, new)| if written { new } else { expect });
        FreshUnit { at: unit.reference.at, images: used.chain(unit.rest).collect() }
    }

    /// Puts fresh units into the pool.
    pub async fn pool_back(&self, units: Vec<FreshUnit>) {
        for unit in units {
            let pool = self.pool(unit.at.lun);
            pool.lock().await.push(unit);
        }
    }

    /// Changes the entries of units, one compare-and-write a table cell, cells in parallel. Entries that do not name the use given
    /// (or, for `Assign`, the own pool) are left as they are, but an `Assign` that finds no own unit is an error.
    ///
    /// Gives the units that somebody had marked before, where this host's mark took the place of that one: whose change comes to be is
    /// not known, so what becomes of them is this host's to find out (`recover::settle_contested`).
    ///
    /// `reaches`: the root cell that reaches what is marked, where other hosts change the object too. Cells with marks are changed only
    /// while it is the newest one; [`Reaches::is_over`] tells.
    pub async fn edit(
        &self,
        edits: &[(UnitUse, UnitEdit)],
        reaches: Option<&Reaches<'_>>,
    ) -> Result<Vec<UnitUse>, FsError> {
        let mut by_cell: BTreeMap<CellAddress, CellEdits> = BTreeMap::new();
        for (unit, edit) in edits {
            self.know(unit.at).await?;
            let (place, nth) = self.place_of(unit.at)?;
            by_cell.entry(place.at).or_insert_with(|| (place, Vec::new())).1.push((nth, *unit, *edit));
        }
        let each = by_cell.into_values().map(async |(place, edits)| {
            let by = self.context.own_slot(place.at.lun)?;
            if edits.iter().any(|(_, _, edit)| *edit == UnitEdit::Free) {
                self.full.borrow_mut().remove(&place.at);
            }
            let mut taken_over = vec![false; edits.len()];
            let reaches = reaches.filter(|_| edits.iter().any(|(_, _, edit)| *edit == UnitEdit::Retire));
            let edited = self.tables.edit_while(place, reaches, |table| {
                edits.iter().zip(&mut taken_over).try_for_each(|((nth, unit, edit), taken_over)| {
                    let entry = &mut table.entries[*nth];
                    // An edit may run again on what it has done itself: then this is said without need.
                    *taken_over |= *edit == UnitEdit::Retire && is_marked(entry, unit);
                    apply(entry, unit, *edit, by)
                })
            });
            if edited.await?.is_none() {
                return Ok(Vec::new());
            }
            let taken_over = edits.iter().zip(taken_over).filter(|(_, taken_over)| *taken_over);
            Ok(taken_over.map(|((_, unit, _), _)| *unit).collect::<Vec<_>>())
        });
        let taken_over: Vec<Vec<UnitUse>> = all_done(futures_util::future::join_all(each).await)?;
        Ok(taken_over.into_iter().flatten().collect())
    }

    /// Whether the entry of a unit still is as this host's `Assign` left it, by what is on the LUN now.
    pub async fn is_assigned(&self, unit: &UnitUse) -> Result<bool, FsError> {
        let (place, nth) = self.place_of(unit.at)?;
        let by = self.context.own_slot(unit.at.lun)?;
        let mut used = pooled(by);
        apply(&mut used, unit, UnitEdit::Assign, by)?;
        Ok(self.tables.read(place).await?.entries.get(nth) == Some(&used))
    }

    /// Dropped units go to the own pool, or are freed when that is full enough: those that carry this host's mark. One whose mark
    /// another host has taken over is that host's to decide.
    ///
    /// Gives those to call this with again, and the first error. One that may have become free is not among them: it could be in use
    /// again by then, even by the same owner. One that may be in the own pool is: nobody takes it from there but through
    /// this host's memory.
    pub async fn recycle(&self, units: &[UnitUse]) -> (Vec<UnitUse>, Result<(), FsError>) {
        let mut by_lun: BTreeMap<LunIndex, Vec<UnitUse>> = BTreeMap::new();
        units.iter().for_each(|unit| by_lun.entry(unit.at.lun).or_default().push(*unit));
        let (mut unchanged, mut result) = (Vec::new(), Ok(()));
        for (lun, units) in by_lun {
            let pooled = self.pool(lun).lock().await.len();
            let (kept, freed) = units.split_at(if self.context.is_draining(lun) {
                0
            } else {
                units.len().min(POOLED.saturating_sub(pooled))
            });
            let mut recycled = Vec::new();
            for (units, edit) in [(kept, UnitEdit::Recycle), (freed, UnitEdit::Free)] {
                let (done, again, outcome) = self.recycle_as(units, edit).await;
                unchanged.extend(again);
                result = result.and(outcome);
                if edit == UnitEdit::Recycle {
                    recycled = done;
                }
            }
            if !recycled.is_empty() {
                recycled.sort();
                match self.remember(&recycled).await {
                    Ok(fresh) => self.pool_back(fresh).await,
                    // They stay `Pool` of this host until it leaves.
                    Err(error) => result = result.and(Err(error)),
                }
            }
        }
        (unchanged, result)
    }

    /// One edit for all of these units, cell by cell: {changed, to be tried again, first error}.
    async fn recycle_as(
        &self,
        units: &[UnitUse],
        edit: UnitEdit,
    ) -> (Vec<UnitAddress>, Vec<UnitUse>, Result<(), FsError>) {
        let mut by_cell: BTreeMap<CellAddress, (TablePlace, Vec<(usize, UnitUse)>)> = BTreeMap::new();
        let mut result = Ok(());
        for unit in units {
            match self.place_of(unit.at) {
                Ok((place, nth)) => {
                    by_cell.entry(place.at).or_insert_with(|| (place, Vec::new())).1.push((nth, *unit));
                }
                Err(error) => result = Err(error),
            }
        }
        let each = by_cell.into_values().map(async |(place, units)| {
            let by = self.context.own_slot(place.at.lun).map_err(|error| (Vec::new(), error))?;
            self.full.borrow_mut().remove(&place.at);
            self.taken_from.borrow_mut().insert(place.at, place);
            let mut changed = Vec::new();
            let edited = self.tables.edit(place, |table| {
                changed.clear();
                for (nth, unit) in &units {
                    if table.entries[*nth] == retiring(unit, by) {
                        apply(&mut table.entries[*nth], unit, edit, by)?;
                        changed.push(unit.at);
                    }
                }
                Ok(())
            });
            let edited = edited.await;
            match edited {
                Ok(_) => Ok(changed),
                Err(failed) if failed.in_doubt && edit == UnitEdit::Free => Err((Vec::new(), failed.error)),
                Err(failed) => Err((units.into_iter().map(|(_, unit)| unit).collect::<Vec<_>>(), failed.error)),
            }
        });
        let (mut done, mut again) = (Vec::new(), Vec::new());
        for outcome in futures_util::future::join_all(each).await {
            match outcome {
                Ok(changed) => done.extend(changed),
                Err((unchanged, error)) => {
                    again.extend(unchanged);
                    result = result.and(Err(error));
                }
            }
        }
        (done, again, result)
    }

    /// Gives all units of the own pool back, also those that an error left outside it: the slot is about to be left, and nothing is
    /// being changed any more. What fails on one LUN holds up no other; on a lost one nothing is tried.
    pub async fn drain_pools(&self) -> Result<(), FsError> {
        let pools: Vec<_> = self.pools.borrow().values().cloned().collect();
        for pool in pools {
            pool.lock().await.clear();
        }
        if active(Sabotage::PoolKept) {
            return Ok(());
        }
        let places: Vec<TablePlace> = self.taken_from.borrow().values().copied().collect();
        let mut result = Ok(());
        for place in places {
            match self.drain(place).await {
                Ok(()) => drop(self.taken_from.borrow_mut().remove(&place.at)),
                Err(error) => {
                    if let Ok(member) = self.context.member(place.at.lun) {
                        member.set_unresolved();
                    }
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    async fn drain(&self, place: TablePlace) -> Result<(), FsError> {
        let lun = place.at.lun;
        if self.context.is_gone(place.at) {
            return Ok(());
        }
        if self.context.is_lost(lun) {
            return Err(FsError::MissingLun { lun });
        }
        let mine = pooled(self.context.own_slot(lun)?);
        let edited = self.tables.edit(place, |table| {
            table.entries.iter_mut().filter(|entry| **entry == mine).for_each(|entry| *entry = TableEntry::FREE);
            Ok(())
        });
        edited.await?;
        Ok(())
    }

    /// Units of a container have become free: its table cells are looked at again when units are needed.
    pub fn look_again(&self, container: BlockAddress) {
        let Ok(member) = self.context.member(container.lun) else { return };
        let (Some(start), bytes) = (member.layout().block_offset(container.block), member.layout().block_size.bytes())
        else {
            return;
        };
        let inside = start..start + bytes;
        self.full.borrow_mut().retain(|at| at.lun != container.lun || !inside.contains(&at.offset));
    }

    /// Forgets the pools: this host was fenced.
    pub fn forget(&self) {
        self.pools.borrow_mut().clear();
        self.tables.forget();
    }

    /// Makes sure that the geometry is known that a unit which is named somewhere needs.
    pub async fn know(&self, unit: UnitAddress) -> Result<(), FsError> {
        self.context.know_block(BlockAddress { lun: unit.lun, block: unit.block }).await
    }

    /// Address of a cell of a unit.
    pub fn cell_of(&self, unit: UnitAddress, cell: usize) -> Result<CellAddress, FsError> {
        let member = self.context.member(unit.lun)?;
        member.layout().unit_cell(unit, cell).ok_or_else(|| no_unit(unit))
    }

    pub(super) fn place_of(&self, unit: UnitAddress) -> Result<(TablePlace, usize), FsError> {
        let member = self.context.member(unit.lun)?;
        let (at, nth) = member.layout().unit_table_entry(unit).ok_or_else(|| no_unit(unit))?;
        Ok((TablePlace { at, kind: CellKind::UnitTable, place: Place::UnitContainer(unit.block.get()) }, nth))
    }
}

fn no_unit(unit: UnitAddress) -> FsError {
    FsError::refused(FsErrorKind::Corrupt, format!("there is no unit {unit}; run fsck.vmfs"))
}

fn full(lun: LunIndex) -> FsError {
    FsError::refused(FsErrorKind::NoSpace, format!("no room for metadata on {lun}; remove files or add an extent"))
}
