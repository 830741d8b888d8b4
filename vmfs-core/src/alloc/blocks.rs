//! Owns: allocation from the block table, and the count of free blocks.
//! Promises: a block is given to one owner; a freed block still named its owner; the last blocks of a LUN are kept for metadata.
//! Must not know: what is in the blocks, when a write to them has ended (the caller frees after that, rule R3).

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::all_done;
use super::free_space::{Hints, UNKNOWN};
use super::table::{TablePlace, Tables};
use super::units::Purpose;
use crate::context::{Context, Member};
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::arena::Place;
use crate::format::layout::entries_per_cell;
use crate::format::root_cell::LunSet;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, BlockNo, FdId, LunIndex, SlotRef};

/// Blocks at the end of a LUN that are kept for containers, so that removing works on a full volume.
const RESERVED: u64 = 2;
/// Table cells looked at together when a search comes to those that are not known.
const LOOK_CELLS: usize = 64;

/// Containers found on the LUNs.
#[derive(Default)]
pub struct Containers {
    /// FD containers.
    pub fds: RefCell<BTreeSet<BlockAddress>>,
    /// Unit containers.
    pub units: RefCell<BTreeSet<BlockAddress>>,
}

/// The block tables of a mounted volume.
pub struct Blocks {
    pub(super) context: Rc<Context>,
    pub(super) tables: Rc<Tables>,
    pub(super) hints: RefCell<BTreeMap<LunIndex, Rc<Hints>>>,
    pub(super) containers: Rc<Containers>,
}

/// The place of a block's entry.
fn place_of(member: &Member, block: BlockNo) -> Result<(TablePlace, u64, usize), FsError> {
    let missing = || FsError::refused(FsErrorKind::Corrupt, format!("{} has no block {}", member.index, block.get()));
    let (_, nth) = member.layout().table_entry(block).ok_or_else(missing)?;
    let number = cell_number(member, block).ok_or_else(missing)?;
    Ok((place_of_cell(member, number).ok_or_else(missing)?, number, nth))
}

/// How many of the last blocks of a LUN ordinary work leaves alone; a LUN of few blocks has none. Which blocks they are does not
/// depend on what a host knows of the others, so no race uses them up.
pub(super) fn reserve_of(member: &Member) -> u64 {
    RESERVED.min(member.layout().block_count() / 16)
}

fn cell_number(member: &Member, block: BlockNo) -> Option<u64> {
    let per = entries_per_cell(member.layout().cell_size) as u64;
    let mut cells = 0;
    for segment in &member.layout().segments {
        if block.get() >= segment.first_block && block.get() - segment.first_block < segment.block_count {
            return Some(cells + (block.get() - segment.first_block) / per);
        }
        cells += segment.table_cells(member.layout().cell_size);
    }
    None
}

pub(super) fn place_of_cell(member: &Member, number: u64) -> Option<TablePlace> {
    let (at, _, _) = member.layout().table_cell(number)?;
    Some(TablePlace { at, kind: CellKind::BlockTable, place: Place::TableCell(number) })
}

pub(super) fn entry(kind: EntryKind, fd: u64, index: u32, by: SlotRef) -> TableEntry {
    TableEntry { fd, index, kind, slot: by.slot, generation_low: by.generation.low(), was: EntryKind::Free }
}

impl Blocks {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, tables: Rc<Tables>) -> Blocks {
        Blocks { context, tables, hints: RefCell::default(), containers: Rc::default() }
    }

    /// What the volume's parts share.
    pub(super) fn context(&self) -> &Rc<Context> {
        &self.context
    }

    /// Containers known so far.
    pub fn containers(&self) -> &Rc<Containers> {
        &self.containers
    }

    /// Takes blocks for the file blocks `indexes` (ascending) of `owner`: neighbours where possible, next to `near`, on `prefer` until that
    /// is full for certain, then on the other LUNs of `allowed`. Gives the first of them when there is no room for all; `NoSpace` when
    /// there is none. When the owner's own LUN fails no other one stands in for it: a file lies on one LUN as long as that has room, so
    /// that the loss of another does not reach it, and without its own nothing of it can be published anyway.
    pub async fn take(
        &self,
        owner: FdId,
        indexes: &[u32],
        prefer: LunIndex,
        allowed: &LunSet,
        near: Option<BlockAddress>,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let mut others: Vec<LunIndex> = allowed.iter().filter(|lun| *lun != prefer).collect();
        others.sort_by_key(|lun| std::cmp::Reverse(self.count(*lun).free));
        others.retain(|lun| !self.context.is_draining(*lun));
        let mut taken = Vec::new();
        if !self.context.is_draining(prefer) {
            match self.take_at_home(owner, indexes, prefer, !others.is_empty(), near).await {
                Ok(found) => taken = found,
                Err(error) if prefer == owner.lun() || others.is_empty() || !may_be_elsewhere(&error) => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
        // A lost LUN is not waited for while there are others.
        if others.iter().any(|lun| !self.context.is_lost(*lun)) {
            others.retain(|lun| !self.context.is_lost(*lun));
        }
        let rest = &indexes[taken.len()..];
        let near = taken.last().map(|(_, at): &(u32, BlockAddress)| *at).or(near);
        let mut more = self.take_in_order(owner, rest, &others, near).await;
        if taken.is_empty() && !rest.is_empty() && more.as_ref().is_ok_and(Vec::is_empty) {
            for lun in &others {
                match self.look_again(*lun, false).await {
                    Ok(_) => {}
                    Err(error) if may_be_elsewhere(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            more = self.take_in_order(owner, rest, &others, near).await;
        }
        match more {
            Ok(more) => taken.extend(more),
            Err(error) if taken.is_empty() => return Err(error),
            // What was taken so far is the caller's; the next call meets the error again.
            Err(_) => {}
        }
        if taken.is_empty() && !indexes.is_empty() {
            let luns: Vec<String> = allowed.iter().map(|lun| lun.to_string()).collect();
            let message = format!("no free block for {owner} on {}; remove files or add an extent", luns.join(", "));
            return Err(FsError::refused(FsErrorKind::NoSpace, message));
        }
        Ok(taken)
    }

    /// As many as there are on one LUN; counts it again before it is called full.
    async fn take_at_home(
        &self,
        owner: FdId,
        indexes: &[u32],
        lun: LunIndex,
        elsewhere: bool,
        near: Option<BlockAddress>,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let near = near.filter(|at| at.lun == lun);
        let data = EntryKind::Data;
        let mut taken = self.take_on(lun, data, owner.get(), indexes, near, Purpose::Normal).await?;
        if taken.len() < indexes.len() && (taken.is_empty() || elsewhere) {
            let more = async {
                if !self.look_again(lun, elsewhere).await? {
                    return Ok(Vec::new());
                }
                let near = taken.last().map(|(_, at)| *at).or(near);
                self.take_on(lun, data, owner.get(), &indexes[taken.len()..], near, Purpose::Normal).await
            };
            match more.await {
                Ok(more) => taken.extend(more),
                Err(error) if taken.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        Ok(taken)
    }

    /// As many as there are, on these LUNs in this order.
    async fn take_in_order(
        &self,
        owner: FdId,
        indexes: &[u32],
        order: &[LunIndex],
        near: Option<BlockAddress>,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let mut taken: Vec<(u32, BlockAddress)> = Vec::with_capacity(indexes.len());
        let mut failed = None;
        for lun in order {
            let rest = &indexes[taken.len()..];
            if rest.is_empty() {
                break;
            }
            let near = taken.last().map(|(_, at)| *at).or(near).filter(|at| at.lun == *lun);
            match self.take_on(*lun, EntryKind::Data, owner.get(), rest, near, Purpose::Normal).await {
                Ok(found) => taken.extend(found),
                Err(FsError::MissingLun { .. }) => {}
                // Another LUN may serve. What the failed attempt took after all is recovery's.
                Err(error) if error.kind() == FsErrorKind::Io => failed = failed.or(Some(error)),
                Err(error) => {
                    self.give_back(owner, &taken).await;
                    return Err(error);
                }
            }
        }
        match failed {
            Some(error) if taken.is_empty() => Err(error),
            _ => Ok(taken),
        }
    }

    async fn give_back(&self, owner: FdId, taken: &[(u32, BlockAddress)]) {
        if let Err(error) = self.free_unpublished(owner, taken).await {
            tracing::warn!(%error, "blocks that were just taken could not be given back; recovery will");
        }
    }

    /// Takes one block for a container, in state formatting. `None`: the LUN is full; ordinary work leaves the reserve.
    pub async fn take_for_container(&self, lun: LunIndex, purpose: Purpose) -> Result<Option<BlockAddress>, FsError> {
        let mut found = self.take_on(lun, EntryKind::Formatting, 0, &[0], None, purpose).await?;
        if found.is_empty() && self.look_again(lun, false).await? {
            found = self.take_on(lun, EntryKind::Formatting, 0, &[0], None, purpose).await?;
        }
        Ok(found.first().map(|(_, at)| *at))
    }

    /// A formatted block becomes a container (step three of rule R2), or goes back when `kind` is free.
    pub async fn finish_container(&self, at: BlockAddress, kind: EntryKind) -> Result<(), FsError> {
        let by = self.context.own_slot(at.lun)?;
        let was = entry(EntryKind::Formatting, 0, 0, by);
        let now = if kind == EntryKind::Free { TableEntry::FREE } else { entry(kind, 0, 0, SlotRef::NOBODY) };
        self.edit(at.lun, &[at.block], |_, entry| {
            if *entry == was {
                *entry = now
            }
        })
        .await
        .map(|_| ())
    }

    /// Takes up to `indexes.len()` blocks of one LUN; fewer when it has no more.
    async fn take_on(
        &self,
        lun: LunIndex,
        kind: EntryKind,
        fd: u64,
        indexes: &[u32],
        near: Option<BlockAddress>,
        purpose: Purpose,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let member = self.context.member(lun)?;
        let by = self.context.own_slot(lun)?;
        let hints = self.hints(&member);
        let cells = member.layout().table_cell_count();
        let start = near.and_then(|at| cell_number(&member, at.block)).unwrap_or(hints.cursor.get()) % cells;
        let mut taken: Vec<(u32, BlockAddress)> = Vec::with_capacity(indexes.len());
        for step in 0..cells {
            let number = (start + step) % cells;
            if taken.len() == indexes.len() {
                break;
            }
            let found = async {
                if hints.free.borrow()[number as usize] == UNKNOWN {
                    self.scan(lun, number, LOOK_CELLS).await?;
                }
                if hints.free.borrow()[number as usize] == 0 {
                    return Ok(Vec::new());
                }
                let rest = &indexes[taken.len()..];
                let after = taken.last().map(|(_, at)| *at).or(near);
                self.take_from_cell(&member, number, rest, after, purpose, |index| entry(kind, fd, index, by)).await
            };
            match found.await {
                Ok(found) => taken.extend(found),
                Err(error) if taken.is_empty() => return Err(error),
                // What was taken so far is the caller's; the next call meets the error again.
                Err(_) => break,
            }
        }
        Ok(taken)
    }

    /// Takes free blocks of one table cell, from the one behind `after` on.
    async fn take_from_cell(
        &self,
        member: &Member,
        number: u64,
        indexes: &[u32],
        after: Option<BlockAddress>,
        purpose: Purpose,
        make: impl Fn(u32) -> TableEntry,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let hints = self.hints(member);
        let (_, first, used) = member.layout().table_cell(number).expect("the number is below the count");
        let reserve = if purpose == Purpose::Freeing { 0 } else { reserve_of(member) };
        let used = used.min((member.layout().block_count() - reserve).saturating_sub(first.get()) as usize);
        if used == 0 {
            return Ok(Vec::new());
        }
        let from = after.filter(|at| at.block >= first).map_or(0, |at| (at.block.get() - first.get() + 1) as usize);
        let mut chosen = Vec::new();
        let place = place_of_cell(member, number).expect("the number is below the count");
        let table = self
            .tables
            .edit(place, |table| {
                chosen = choose(&mut table.entries[..used], from, indexes, &make);
                Ok(())
            })
            .await?;
        hints.changes.set(hints.changes.get() + 1);
        self.learn(member, &hints, number, &table);
        hints.cursor.set(number);
        let place_of = |nth: usize| BlockNo::new(first.get() + nth as u64).expect("the layout has the block");
        let at = |nth| BlockAddress { lun: member.index, block: place_of(nth) };
        Ok(chosen.into_iter().map(|(index, nth)| (index, at(nth))).collect())
    }

    /// Marks blocks that `owner` is about to drop, before its pointers to them go. Gives those that carry this host's mark now: a block
    /// that is free or somebody else's by now is none of them.
    pub async fn retire(
        &self,
        owner: FdId,
        blocks: &[(u32, BlockAddress)],
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let after = self
            .for_each_owned(owner, blocks, |by, found| {
                if found.kind == EntryKind::Data {
                    *found =
                        TableEntry { was: EntryKind::Data, ..entry(EntryKind::Retiring, found.fd, found.index, by) };
                }
            })
            .await?;
        Ok(after.into_iter().filter(|(_, _, retired)| *retired).map(|(index, at, _)| (index, at)).collect())
    }

    /// Takes a retiring mark of this host back: the pointers stay.
    pub async fn keep(&self, owner: FdId, blocks: &[(u32, BlockAddress)]) -> Result<(), FsError> {
        self.for_each_owned(owner, blocks, |by, found| {
            if is_retired_by(by, found) {
                *found = entry(found.was, found.fd, found.index, by);
            }
        })
        .await
        .map(|_| ())
    }

    /// Frees blocks that this host has retired. No pointer reaches them any more, no write to them is on its way (rule R3), and they
    /// have been unmapped if they are to be. A block that was taken again meanwhile carries no such mark and is left alone.
    pub async fn free_retired(&self, owner: FdId, blocks: &[(u32, BlockAddress)]) -> Result<(), FsError> {
        self.for_each_owned(owner, blocks, |by, found| {
            if is_retired_by(by, found) {
                *found = TableEntry::FREE;
            }
        })
        .await
        .map(|_| ())
    }

    /// Frees blocks that `owner` took and no pointer ever named; otherwise as [`Blocks::free_retired`]. Call it once: another call could
    /// meet a block that was taken again for the same place.
    pub async fn free_unpublished(&self, owner: FdId, blocks: &[(u32, BlockAddress)]) -> Result<(), FsError> {
        self.for_each_owned(owner, blocks, |_, found| {
            if found.kind == EntryKind::Data {
                *found = TableEntry::FREE;
            }
        })
        .await
        .map(|_| ())
    }

    /// Keeps blocks from use until this incarnation is proven fenced: the end of a write to them is not known (rule R3).
    pub async fn quarantine(&self, owner: FdId, blocks: &[(u32, BlockAddress)]) -> Result<(), FsError> {
        for (_, at) in blocks {
            self.context.member(at.lun)?.set_unresolved();
        }
        self.keep_from_use(owner, blocks, None).await
    }

    /// Keeps blocks from use until `broken` is proven fenced, whose writes to them may still arrive.
    pub async fn quarantine_of(
        &self,
        broken: SlotRef,
        owner: FdId,
        blocks: &[(u32, BlockAddress)],
    ) -> Result<(), FsError> {
        self.keep_from_use(owner, blocks, Some(broken)).await
    }

    async fn keep_from_use(
        &self,
        owner: FdId,
        blocks: &[(u32, BlockAddress)],
        of: Option<SlotRef>,
    ) -> Result<(), FsError> {
        self.for_each_owned(owner, blocks, |by, found| {
            let of = of.unwrap_or(by);
            *found = entry(EntryKind::Quarantine, of.pack(), found.index, of);
        })
        .await
        .map(|_| ())
    }

    /// Runs `change` on the entries that still name `owner` and the index given, one compare-and-write a table cell, cells in
    /// parallel. Gives each block and whether it is retired by this host afterwards. After an error marks may stay behind: the slots
    /// of these LUNs are left dirty.
    async fn for_each_owned(
        &self,
        owner: FdId,
        blocks: &[(u32, BlockAddress)],
        change: impl Fn(SlotRef, &mut TableEntry),
    ) -> Result<Vec<(u32, BlockAddress, bool)>, FsError> {
        let mut by_lun: BTreeMap<LunIndex, Vec<(u32, BlockNo)>> = BTreeMap::new();
        for (index, at) in blocks {
            by_lun.entry(at.lun).or_default().push((*index, at.block));
        }
        let owns = |entry: &TableEntry, index| {
            entry.fd == owner.get()
                && entry.index == index
                && matches!(entry.kind, EntryKind::Data | EntryKind::Retiring)
        };
        let each = by_lun.into_iter().map(async |(lun, owned)| {
            let by = self.context.own_slot(lun)?;
            let numbers: Vec<BlockNo> = owned.iter().map(|(_, block)| *block).collect();
            let edited = self.edit(lun, &numbers, |nth, entry| {
                if owns(entry, owned[nth].0) {
                    change(by, entry);
                }
            });
            match edited.await {
                Ok(entries) => Ok(entries
                    .into_iter()
                    .map(|(nth, entry)| {
                        let (index, block) = owned[nth];
                        let retired = owns(&entry, index) && is_retired_by(by, &entry);
                        (index, BlockAddress { lun, block }, retired)
                    })
                    .collect::<Vec<_>>()),
                Err(error) => {
                    self.context.member(lun)?.set_unresolved();
                    Err(error)
                }
            }
        });
        Ok(all_done(futures_util::future::join_all(each).await)?.into_iter().flatten().collect())
    }

    /// Runs `change(nth, entry)` on the entries of these blocks of one LUN. Gives the entries as they are afterwards.
    pub(super) async fn edit(
        &self,
        lun: LunIndex,
        blocks: &[BlockNo],
        change: impl Fn(usize, &mut TableEntry),
    ) -> Result<Vec<(usize, TableEntry)>, FsError> {
        let member = self.context.member(lun)?;
        let mut by_cell: BTreeMap<u64, (TablePlace, Vec<(usize, usize)>)> = BTreeMap::new();
        for (nth, block) in blocks.iter().enumerate() {
            self.context.know_block(BlockAddress { lun, block: *block }).await?;
            let (place, number, in_cell) = place_of(&member, *block)?;
            by_cell.entry(number).or_insert_with(|| (place, Vec::new())).1.push((nth, in_cell));
        }
        let (change, hints) = (&change, &self.hints(&member));
        let each = by_cell.into_iter().map(async |(number, (place, entries))| {
            let edited = self.tables.edit(place, |table| {
                entries.iter().for_each(|(nth, in_cell)| change(*nth, &mut table.entries[*in_cell]));
                Ok(())
            });
            let table = edited.await?;
            hints.changes.set(hints.changes.get() + 1);
            self.learn(&member, hints, number, &table);
            Ok(entries.iter().map(|(nth, in_cell)| (*nth, table.entries[*in_cell])).collect::<Vec<_>>())
        });
        Ok(all_done(futures_util::future::join_all(each).await)?.into_iter().flatten().collect())
    }
}

/// Whether a failure of one LUN says nothing about another.
fn may_be_elsewhere(error: &FsError) -> bool {
    matches!(error, FsError::MissingLun { .. }) || error.kind() == FsErrorKind::Io
}

fn is_retired_by(by: SlotRef, entry: &TableEntry) -> bool {
    entry.kind == EntryKind::Retiring && (entry.slot, entry.generation_low) == (by.slot, by.generation.low())
}

/// Fills free entries for `indexes`, from entry `from` on and then round; entries that are filled so already count (an edit may run
/// twice). Gives {index, entry}.
fn choose(
    entries: &mut [TableEntry],
    from: usize,
    indexes: &[u32],
    make: impl Fn(u32) -> TableEntry,
) -> Vec<(u32, usize)> {
    let count = entries.len();
    let mut chosen = Vec::new();
    let mut places = (0..count)
        .map(|n| (from + n) % count)
        .filter(|n| {
            entries[*n].kind == EntryKind::Free
                || (active(Sabotage::BlockTakenTwice) && entries[*n].kind == EntryKind::Data)
        })
        .collect::<Vec<_>>()
        .into_iter();
    for index in indexes {
        let Some(place) = places.next() else { break };
        entries[place] = make(*index);
        chosen.push((*index, place));
    }
    chosen
}
