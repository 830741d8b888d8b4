//! Owns: the two passes over unit containers, and claiming units and blocks for the objects that reach them.
//! Promises: a unit or block that is reached twice, or whose entry says something else, is told once with both sides.
//! Must not know: what is in a unit.

use super::finding::{Phase, Severity, Structure};
use super::reader::Unread;
use super::remedy::Claimed;
use super::state::{Checker, expect_plain};
use super::tables::block_entry_fault;
use crate::container::first_unit;
use crate::format::arena::Place;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::{Cell, CellKind};
use crate::units::{BlockAddress, CellAddress, FdId, LunIndex, UnitAddress};

/// The structure that a unit with this entry holds.
pub(crate) fn structure_of(kind: EntryKind) -> Structure {
    match kind {
        EntryKind::Body => Structure::Body,
        EntryKind::PointerBlock => Structure::PointerBlock,
        EntryKind::Inner => Structure::InnerUnit,
        EntryKind::Bucket => Structure::Bucket,
        EntryKind::Table => Structure::UnitTable,
        _ => Structure::FreeUnit,
    }
}

/// What an object says of a unit or block that it reaches.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub owner: FdId,
    pub kind: EntryKind,
    pub index: u32,
}

impl Claim {
    fn text(&self) -> String {
        format!("{:?} {} of {}", self.kind, self.index, self.owner)
    }

    fn claimed(&self) -> Claimed {
        Claimed { owner: self.owner, kind: self.kind, index: self.index }
    }

    fn agrees(&self, entry: &TableEntry) -> bool {
        let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
        kind == self.kind && entry.fd == self.owner.get() && entry.index == self.index
    }
}

fn entry_text(entry: &TableEntry) -> String {
    match FdId::from_stored(entry.fd) {
        Some(fd) => format!("{:?} {} of {fd}", entry.kind, entry.index),
        None => format!("{:?}", entry.kind),
    }
}

impl Checker<'_> {
    fn containers(&self) -> Vec<BlockAddress> {
        let each = self.members.iter();
        each.flat_map(|(lun, m)| m.unit_containers.iter().map(|block| BlockAddress { lun: *lun, block: *block }))
            .collect()
    }

    /// First pass: every cell of every unit container is valid; the tables by themselves.
    pub(super) async fn scan_unit_containers(&mut self) {
        let containers = self.containers();
        let bytes = self.members.values().next().map_or(0, |member| member.header.block_size.bytes());
        let total = containers.len() as u64 * bytes;
        for (nth, container) in containers.into_iter().enumerate() {
            self.scan_container(container).await;
            self.progress(Phase::Units, (nth as u64 + 1) * bytes, total);
        }
    }

    async fn scan_container(&mut self, container: BlockAddress) {
        let layout = self.members[&container.lun].layout.clone();
        let Some(offset) = layout.block_offset(container.block) else { return };
        let size = layout.cell_size.bytes();
        let bytes = match self.reader.span(container.lun, offset, layout.block_size.bytes() as usize).await {
            Ok(bytes) => bytes,
            Err(why) => {
                let at = CellAddress { lun: container.lun, offset };
                return self.tell_unread(Structure::FreeUnit, at, None, &why);
            }
        };
        let table_cells = (layout.block_size.units() as usize).div_ceil(entries_per_cell(layout.cell_size));
        let mut entries: Vec<Option<TableEntry>> = Vec::with_capacity(layout.block_size.units() as usize);
        for (nth, image) in bytes.chunks(size).enumerate() {
            let at = CellAddress { lun: container.lun, offset: offset + (nth * size) as u64 };
            let cell = Cell::decode(&self.reader.context, at, image).map_err(Unread::Damaged);
            if nth < table_cells {
                entries.extend(self.table_entries(at, container, cell));
                continue;
            }
            let unit = nth / layout.cell_size.cells_per_unit();
            let entry = entries.get(unit).copied().flatten().unwrap_or(TableEntry::FREE);
            let kind = if unit < usize::from(first_unit(&layout)) { EntryKind::Free } else { entry.kind };
            let structure = structure_of(if kind == EntryKind::Retiring { entry.was } else { kind });
            let legal = |cell: &Cell| match cell.header().kind {
                CellKind::Blank | CellKind::Body | CellKind::PointerBlock | CellKind::Inner | CellKind::Bucket => {
                    Ok(())
                }
                _ => cell.expect_kind(CellKind::Blank),
            };
            if let Err(why) = cell.and_then(|cell| legal(&cell).map_err(Unread::Damaged)) {
                let owner = FdId::from_stored(entry.fd).filter(|_| structure != Structure::FreeUnit);
                self.tell_unread(structure, at, owner, &why);
                self.remedies.unit_image(at, entry);
            }
        }
        for (unit, entry) in entries.into_iter().enumerate().take(layout.block_size.units() as usize) {
            let at = UnitAddress { lun: container.lun, block: container.block, unit: unit as u16 };
            if let Some(entry) = entry {
                self.check_unit_entry(at, &entry, unit < usize::from(first_unit(&layout)));
            }
        }
    }

    /// The entries of one unit table cell; `None` for each when it cannot be read.
    fn table_entries(
        &mut self,
        at: CellAddress,
        container: BlockAddress,
        cell: Result<Cell, Unread>,
    ) -> Vec<Option<TableEntry>> {
        let size = self.reader.context.cell_size;
        let table = cell.and_then(|cell| {
            expect_plain(&cell, CellKind::UnitTable).map_err(Unread::Damaged)?;
            TableCell::decode(size, cell.payload()).map_err(Unread::Damaged)
        });
        match table {
            Ok(table) => table.entries.into_iter().map(Some).collect(),
            Err(why) => {
                self.tell_unread(Structure::UnitTable, at, None, &why);
                self.remedies.unit_cells.insert((at, container));
                vec![None; entries_per_cell(size)]
            }
        }
    }

    fn check_unit_entry(&mut self, at: UnitAddress, entry: &TableEntry, own_table: bool) {
        let counts = &mut self.members.get_mut(&at.lun).expect("a member").counts;
        if !own_table {
            counts.units += 1;
            counts.free_units += u64::from(entry.kind == EntryKind::Free);
        }
        if let Some((field, found, expected)) = unit_entry_fault(entry, own_table) {
            self.error(Structure::UnitTable, at, None, field, found, expected);
            self.remedies.unit_entry(at);
        }
    }

    /// Second pass: units in use that nothing reaches, and marks.
    pub(super) async fn find_unreached_units(&mut self) {
        let containers = self.containers();
        let total = containers.len() as u64;
        for (nth, container) in containers.into_iter().enumerate() {
            let layout = self.members[&container.lun].layout.clone();
            for unit in first_unit(&layout)..layout.block_size.units() as u16 {
                let at = UnitAddress { lun: container.lun, block: container.block, unit };
                let Some(entry) = self.unit_entry(at).await else { continue };
                self.check_unit_reached(at, &entry);
            }
            self.progress(Phase::Space, nth as u64 + 1, total);
        }
    }

    fn check_unit_reached(&mut self, at: UnitAddress, entry: &TableEntry) {
        if unit_entry_fault(entry, false).is_some() {
            return;
        }
        let container = BlockAddress { lun: at.lun, block: at.block };
        let words = self.units_reached.get(&container);
        let reached = words.is_some_and(|words| words[usize::from(at.unit) / 64] >> (at.unit % 64) & 1 == 1);
        let place = Place::UnitContainer(at.block.get());
        let owner = FdId::from_stored(entry.fd);
        let (what, judgement) = match (entry.kind, reached) {
            (EntryKind::Free, _) => return,
            (EntryKind::Pool, _) => {
                self.remedies.free_unit(at, entry);
                ("in the pool of a host".to_owned(), self.judge_entry(at.lun, entry, place))
            }
            (EntryKind::Retiring, true) => {
                self.remedies.keep_unit(at, entry);
                ("retiring, and still in use".to_owned(), self.judge_entry(at.lun, entry, place))
            }
            (_, true) => return,
            (_, false) => {
                let what = format!("{}, which nothing reaches", entry_text(entry));
                let judgement = self.judge_leak(at.lun, owner, entry, place);
                match owner.and_then(|owner| self.container_gone(owner)) {
                    Some(container) => {
                        self.remedies.lost_containers.insert(container);
                        self.remedies.ownerless_unit(at, entry);
                    }
                    None if judgement.severity != Severity::Info => self.remedies.free_unit(at, entry),
                    None => {}
                }
                (what, judgement)
            }
        };
        self.tell_mark(Structure::UnitTable, at, owner, &what, judgement);
    }

    /// The table entry of a unit; `None` when its table cell cannot be read, which has been told.
    async fn unit_entry(&mut self, at: UnitAddress) -> Option<TableEntry> {
        let (cell, nth) = self.members.get(&at.lun)?.layout.unit_table_entry(at)?;
        self.entry(Structure::UnitTable, cell, CellKind::UnitTable, nth).await
    }

    async fn entry(&mut self, structure: Structure, at: CellAddress, kind: CellKind, nth: usize) -> Option<TableEntry> {
        let cell = self.cell(structure, at, kind, None).await?;
        let table = TableCell::decode(self.reader.context.cell_size, cell.payload()).ok()?;
        table.entries.get(nth).copied()
    }

    /// Says that an object reaches a unit. False when the unit cannot be what the object says; that has been told.
    pub(super) async fn claim_unit(&mut self, claim: Claim, at: UnitAddress, from: &str) -> bool {
        let structure = structure_of(claim.kind);
        let owner = Some(claim.owner);
        let Some(member) = self.members.get(&at.lun) else { return self.elsewhere(structure, claim, at.lun, from) };
        let container = BlockAddress { lun: at.lun, block: at.block };
        let inside = at.unit >= first_unit(&member.layout) && u64::from(at.unit) < member.layout.block_size.units();
        if !member.unit_containers.contains(&at.block) || !inside {
            if !member.unknown_blocks.contains(at.block.get()) {
                self.error(
                    structure,
                    from,
                    owner,
                    "unit",
                    format!("{at}, which is no unit"),
                    "a unit of a unit container",
                );
            }
            if inside {
                self.remedies.lost_containers.insert(container);
            }
            self.damaged.insert(claim.owner);
            return false;
        }
        let units = member.layout.block_size.units() as usize;
        let entry = self.unit_entry(at).await;
        if entry.is_none_or(|entry| unit_entry_fault(&entry, false).is_some()) {
            self.remedies.claimed_units.entry(at).or_insert(claim.claimed());
        }
        let words = self.units_reached.entry(container).or_insert_with(|| vec![0; units.div_ceil(64)]);
        let word = &mut words[usize::from(at.unit) / 64];
        let again = *word >> (at.unit % 64) & 1 == 1;
        *word |= 1 << (at.unit % 64);
        match entry {
            Some(entry) if !claim.agrees(&entry) && self.unlinked.contains(&claim.owner) => {
                // It was freed already and may be somebody else's by now.
                self.units_reached.get_mut(&container).expect("just entered")[usize::from(at.unit) / 64] &=
                    if again { u64::MAX } else { !(1 << (at.unit % 64)) };
                return false;
            }
            Some(entry) if !claim.agrees(&entry) => {
                let expected = format!("{}, named by {from}", claim.text());
                if self.being_created == owner && !again {
                    self.units_reached.get_mut(&container).expect("just entered")[usize::from(at.unit) / 64] &=
                        !(1 << (at.unit % 64));
                    self.error(Structure::UnitTable, at, owner, "entry", entry_text(&entry), expected);
                    return false;
                }
                self.error(Structure::UnitTable, at, owner, "entry", entry_text(&entry), expected);
                self.remedies.objects.insert(claim.owner);
            }
            _ => {}
        }
        if again {
            self.error(structure, at, owner, "reached", format!("a second time, by {from}"), "one place");
        }
        !again
    }

    /// Says that an object reaches a data block.
    pub(super) async fn claim_block(&mut self, claim: Claim, at: BlockAddress, from: &str) {
        let owner = Some(claim.owner);
        let Some(member) = self.members.get(&at.lun) else {
            self.elsewhere(Structure::PointerBlock, claim, at.lun, from);
            return;
        };
        let Some((cell, nth)) = member.layout.table_entry(at.block) else {
            let expected = format!("a block below {}", member.layout.block_count());
            return self.error(Structure::PointerBlock, from, owner, "block", at, expected);
        };
        let known = !member.unknown_blocks.contains(at.block.get());
        let entry = match known {
            true => self.entry(Structure::BlockTable, cell, CellKind::BlockTable, nth).await,
            false => None,
        };
        if entry.is_none_or(|entry| block_entry_fault(&entry).is_some()) {
            self.remedies.claimed_blocks.entry(at).or_insert(claim.claimed());
        }
        if let Some(entry) = entry.filter(|entry| !claim.agrees(entry)) {
            if self.unlinked.contains(&claim.owner) {
                return;
            }
            let expected = format!("{}, named by {from}", claim.text());
            self.error(Structure::BlockTable, format!("{at} ({cell})"), owner, "entry", entry_text(&entry), expected);
            self.remedies.objects.insert(claim.owner);
        }
        if !self.members.get_mut(&at.lun).expect("a member").reached.insert(at.block.get()) {
            self.error(Structure::PointerBlock, at, owner, "reached", format!("a second time, by {from}"), "one place");
        }
    }

    /// Something on a LUN that was not given: nothing to say if the volume has such a member.
    fn elsewhere(&mut self, structure: Structure, claim: Claim, lun: LunIndex, from: &str) -> bool {
        if !self.report.missing.contains(&lun) {
            self.error(structure, from, Some(claim.owner), "lun", lun, "a member of the volume");
        }
        self.damaged.insert(claim.owner);
        false
    }
}

/// What is wrong with an entry of a unit table by itself.
fn unit_entry_fault(entry: &TableEntry, own_table: bool) -> Option<(&'static str, String, String)> {
    let fault = |field, found: String, expected: &str| Some((field, found, expected.to_owned()));
    let used = |kind| matches!(kind, EntryKind::Body | EntryKind::PointerBlock | EntryKind::Inner | EntryKind::Bucket);
    if own_table || entry.kind == EntryKind::Table {
        let table = TableEntry { kind: EntryKind::Table, ..TableEntry::FREE };
        return match (own_table, *entry == table) {
            (true, true) => None,
            (true, false) => fault("kind", entry_text(entry), "the container's own table"),
            (false, _) => fault("kind", entry_text(entry), "no table: the unit is behind it"),
        };
    }
    match entry.kind {
        EntryKind::Free if *entry != TableEntry::FREE => fault("kind", format!("free, with {entry:?}"), "zeros"),
        EntryKind::Pool if entry.fd != 0 || entry.index != 0 => fault("fd", entry_text(entry), "none"),
        EntryKind::Retiring if !used(entry.was) => fault("was", format!("{:?}", entry.was), "a use of a unit"),
        kind if kind != EntryKind::Retiring && entry.was != EntryKind::Free => {
            fault("was", format!("{:?}", entry.was), "0")
        }
        kind if (used(kind) || kind == EntryKind::Retiring) && FdId::from_stored(entry.fd).is_none() => {
            fault("fd", format!("{:#x}", entry.fd), "an object")
        }
        kind if used(kind) || matches!(kind, EntryKind::Free | EntryKind::Pool | EntryKind::Retiring) => None,
        kind => fault("kind", format!("{kind:?}"), "a kind that units have"),
    }
}
