//! Owns: what taking a LUN out asks of the tables: its free blocks and units cease to be, and another LUN gives a run of blocks for the
//! window. Promises: an allocation that a late host has on its way finds another image than it expects.
//! Must not know: how cells get into the window.

use futures_util::future::join_all;

use super::blocks::{entry, place_of_cell, reserve_of};
use super::{Space, all_done};
use crate::container::{Formatter, first_unit};
use crate::error::{FsError, FsErrorKind};
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, BlockNo, CellAddress, LunIndex, SlotRef, UnitAddress};

/// Table cells that are sealed at a time.
const AT_ONCE: u64 = 32;

/// What is left on a LUN whose free space has ceased to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Blocks of root cells, ascending.
    pub fd_containers: Vec<BlockNo>,
    /// Blocks and units that are in use, or were when they were looked at.
    pub in_use: u64,
}

/// The entry of a block that belongs to the window of `lun`.
pub(crate) fn window_entry(lun: LunIndex) -> TableEntry {
    entry(EntryKind::Window, 0, lun.get().into(), SlotRef::NOBODY)
}

impl Space {
    /// Makes every free block and unit of a LUN cease to be, and every unit container in which nothing is in use.
    pub(crate) async fn seal(&self, lun: LunIndex) -> Result<Sealed, FsError> {
        let member = self.blocks.context().member(lun)?;
        self.blocks.context().read_geometry(&member).await?;
        let count = member.layout().table_cell_count();
        let mut sealed = Sealed::default();
        for first in (0..count).step_by(AT_ONCE as usize) {
            let some = (first..count.min(first + AT_ONCE)).map(|number| self.seal_cell(lun, number));
            for one in all_done(join_all(some).await)? {
                sealed.fd_containers.extend(one.fd_containers);
                sealed.in_use += one.in_use;
            }
        }
        Ok(sealed)
    }

    async fn seal_cell(&self, lun: LunIndex, number: u64) -> Result<Sealed, FsError> {
        let member = self.blocks.context().member(lun)?;
        let layout = member.layout();
        let (Some(place), Some((_, first, used))) = (place_of_cell(&member, number), layout.table_cell(number)) else {
            return Ok(Sealed::default());
        };
        let block = |nth: usize| BlockNo::new(first.get() + nth as u64);
        let mut in_use = 0;
        let mut emptied = Vec::new();
        for (nth, entry) in self.tables.read(place).await?.entries[..used].iter().enumerate() {
            if entry.kind == EntryKind::UnitContainer
                && let Some(block) = block(nth)
            {
                match self.seal_units(BlockAddress { lun, block }).await? {
                    0 => emptied.push(nth),
                    units => in_use += units,
                }
            }
        }
        let keep_free = active(Sabotage::SealSkipped);
        let table = self.tables.edit(place, |table| {
            for (nth, entry) in table.entries[..used].iter_mut().enumerate() {
                let ends = entry.kind == EntryKind::Free && !keep_free;
                if ends || (entry.kind == EntryKind::UnitContainer && emptied.contains(&nth)) {
                    *entry = TableEntry::GONE;
                }
            }
            Ok(())
        });
        let table = table.await?;
        let mut sealed = Sealed { in_use, ..Sealed::default() };
        for (nth, entry) in table.entries[..used].iter().enumerate() {
            match entry.kind {
                EntryKind::FdContainer => sealed.fd_containers.extend(block(nth)),
                EntryKind::Gone => {}
                EntryKind::Free if keep_free => {}
                EntryKind::UnitContainer if !emptied.contains(&nth) => sealed.in_use += u64::from(in_use == 0),
                _ => sealed.in_use += 1,
            }
        }
        Ok(sealed)
    }

    /// The units of a container that are in use; the free ones cease to be.
    async fn seal_units(&self, container: BlockAddress) -> Result<u64, FsError> {
        let member = self.blocks.context().member(container.lun)?;
        let layout = member.layout();
        let (per, units) = (entries_per_cell(layout.cell_size), layout.block_size.units() as usize);
        let mut in_use = 0;
        for cell in 0..units.div_ceil(per) {
            let range = (cell * per).max(usize::from(first_unit(&layout)))..((cell + 1) * per).min(units);
            if range.is_empty() {
                continue;
            }
            let unit = UnitAddress { lun: container.lun, block: container.block, unit: range.start as u16 };
            let edited = self.tables.edit(self.units.place_of(unit)?.0, |table| {
                for nth in range.clone() {
                    let entry = &mut table.entries[nth % per];
                    if entry.kind == EntryKind::Free {
                        *entry = TableEntry::GONE;
                    }
                }
                Ok(())
            });
            let table = edited.await?;
            in_use += range.filter(|nth| table.entries[nth % per].kind != EntryKind::Gone).count() as u64;
        }
        Ok(in_use)
    }

    /// The runs of `count` neighbouring blocks of a LUN in which every entry satisfies `wanted`, from block `from` on: the first of them.
    async fn find_run(
        &self,
        lun: LunIndex,
        from: u64,
        count: u64,
        wanted: impl Fn(&TableEntry) -> bool,
    ) -> Result<Option<BlockNo>, FsError> {
        let member = self.blocks.context().member(lun)?;
        self.blocks.context().read_geometry(&member).await?;
        let layout = member.layout();
        let end = layout.block_count() - reserve_of(&member);
        let (mut begun, mut expected) = (None, None);
        for number in 0..layout.table_cell_count() {
            let (Some(place), Some((_, first, used))) = (place_of_cell(&member, number), layout.table_cell(number))
            else {
                continue;
            };
            if first.get() + (used as u64) <= from {
                continue;
            }
            let table = self.tables.read(place).await?;
            for (nth, entry) in table.entries[..used].iter().enumerate() {
                let block = first.get() + nth as u64;
                let offset = BlockNo::new(block).and_then(|block| layout.block_offset(block));
                // Blocks of two segments do not lie together.
                if block < from || block >= end || !wanted(entry) || offset.is_none() {
                    begun = None;
                    continue;
                }
                if begun.is_none() || offset != expected {
                    begun = Some(block);
                }
                expected = offset.map(|offset| offset + layout.block_size.bytes());
                if let Some(start) = begun
                    && block + 1 - start == count
                {
                    return Ok(BlockNo::new(start));
                }
            }
        }
        Ok(None)
    }

    /// The containers of root cells of a LUN, ascending.
    pub(crate) async fn fd_containers(&self, lun: LunIndex) -> Result<Vec<BlockNo>, FsError> {
        let member = self.blocks.context().member(lun)?;
        let layout = member.layout();
        let mut found = Vec::new();
        for number in 0..layout.table_cell_count() {
            let (Some(place), Some((_, first, used))) = (place_of_cell(&member, number), layout.table_cell(number))
            else {
                continue;
            };
            let table = self.tables.read(place).await?;
            let of = |(nth, entry): (usize, &TableEntry)| match entry.kind {
                EntryKind::FdContainer => BlockNo::new(first.get() + nth as u64),
                _ => None,
            };
            found.extend(table.entries[..used].iter().enumerate().filter_map(of));
        }
        Ok(found)
    }

    /// Whether a LUN has `count` free blocks together.
    pub(crate) async fn has_run(&self, lun: LunIndex, count: u64) -> Result<bool, FsError> {
        Ok(self.find_run(lun, 0, count, |entry| entry.kind == EntryKind::Free).await?.is_some())
    }

    /// A run of blocks on `carrier` for the window of `lun` whose map is `map`: one that was made before and never used, or a new one.
    /// `None`: there is no room for `count` blocks together.
    ///
    /// # Errors
    /// Kind `Fenced`, `Io`: what was taken stays until recovery.
    pub(crate) async fn take_window(
        &self,
        carrier: LunIndex,
        lun: LunIndex,
        count: u64,
        map: &[Vec<u8>],
    ) -> Result<Option<CellAddress>, FsError> {
        let member = self.blocks.context().member(carrier)?;
        let at = |first: BlockNo| {
            let missing = || FsError::refused(FsErrorKind::Corrupt, format!("{carrier} has no block {}", first.get()));
            let offset = member.layout().block_offset(first).ok_or_else(missing)?;
            Ok::<_, FsError>(CellAddress { lun: carrier, offset })
        };
        let ready = window_entry(lun);
        if let Some(first) = self.find_run(carrier, 0, count, |entry| *entry == ready).await? {
            return at(first).map(Some);
        }
        let by = self.blocks.context().own_slot(carrier)?;
        let mine = entry(EntryKind::Formatting, 0, 0, by);
        let mut from = 0;
        loop {
            let Some(first) = self.find_run(carrier, from, count, |entry| entry.kind == EntryKind::Free).await? else {
                return Ok(None);
            };
            let blocks: Vec<BlockNo> = (first.get()..first.get() + count).filter_map(BlockNo::new).collect();
            let edited = self.blocks.edit(carrier, &blocks, |_, entry| {
                if *entry == TableEntry::FREE {
                    *entry = mine;
                }
            });
            let entries = edited.await.inspect_err(|_| member.set_unresolved())?;
            if entries.iter().all(|(_, entry)| *entry == mine) {
                self.format_window(carrier, &blocks, map).await?;
                self.turn(carrier, &blocks, mine, ready).await?;
                return at(first).map(Some);
            }
            let got: Vec<BlockNo> =
                entries.iter().filter(|(_, entry)| *entry == mine).map(|(nth, _)| blocks[*nth]).collect();
            self.turn(carrier, &got, mine, TableEntry::FREE).await?;
            from = first.get() + 1;
        }
    }

    /// Gives back a run that was taken for a window that is another one by now. Nobody ever changed a cell of it.
    pub(crate) async fn give_window_back(&self, at: CellAddress, lun: LunIndex, count: u64) -> Result<(), FsError> {
        let member = self.blocks.context().member(at.lun)?;
        let layout = member.layout();
        let segment =
            layout.segments.iter().find(|s| at.offset >= s.data_offset && at.offset < s.end(layout.block_size));
        let Some(segment) = segment else { return Ok(()) };
        let first = segment.first_block + (at.offset - segment.data_offset) / layout.block_size.bytes();
        let blocks: Vec<BlockNo> = (first..first + count).filter_map(BlockNo::new).collect();
        self.turn(at.lun, &blocks, window_entry(lun), TableEntry::FREE).await
    }

    async fn turn(&self, lun: LunIndex, blocks: &[BlockNo], from: TableEntry, to: TableEntry) -> Result<(), FsError> {
        let edited = self.blocks.edit(lun, blocks, |_, entry| {
            if *entry == from {
                *entry = to;
            }
        });
        if let Err(error) = edited.await {
            self.blocks.context().member(lun)?.set_unresolved();
            return Err(error);
        }
        Ok(())
    }

    /// Writes all cells of a window, durably: its map, then blank ones.
    async fn format_window(&self, carrier: LunIndex, blocks: &[BlockNo], map: &[Vec<u8>]) -> Result<(), FsError> {
        let context = self.blocks.context();
        let (member, writer) = (context.member(carrier)?, context.own_slot(carrier)?);
        let layout = member.layout();
        let per_block = (layout.block_size.bytes() / layout.cell_size.bytes() as u64) as usize;
        for (nth, block) in blocks.iter().enumerate() {
            let mut op_id = || context.io.op_id();
            let mut formatter = Formatter { context: context.io.context(), layout: &layout, writer, op_id: &mut op_id };
            let here = map.chunks(per_block).nth(nth).unwrap_or_default();
            let (Some(image), Some(offset)) = (formatter.window_block(*block, here), layout.block_offset(*block))
            else {
                let message = format!("{carrier} has no block {}", block.get());
                return Err(FsError::refused(FsErrorKind::Corrupt, message));
            };
            if let Err(error) = context.gate_is_open(carrier, context.env().now()) {
                member.set_unresolved();
                return Err(error);
            }
            if let Err(error) = member.lun.write(offset, image).await {
                // It may be alive still: the blocks stay in state formatting until recovery (rule R3).
                member.set_unresolved();
                return Err(error.into());
            }
        }
        Ok(())
    }
}
