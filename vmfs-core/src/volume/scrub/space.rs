//! Owns: the passes over block tables and unit containers.
//! Promises: a container is looked at only while the block table says that it is one.
//! Must not know: objects.

use super::{Legal, Scrub, Suspect, is_legal};
use crate::check::{Structure, structure_of};
use crate::container::first_unit;
use crate::context::Member;
use crate::error::FsError;
use crate::format::layout::{LunLayout, entries_per_cell};
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{BlockAddress, BlockNo, CellAddress, CellSize, FdId};

/// Bytes that are read with one command.
const PIECE: usize = 256 << 10;

/// Bytes of a LUN's block table.
pub(super) fn table_bytes(member: &Member) -> u64 {
    let layout = member.layout();
    layout.table_cell_count() * layout.cell_size.bytes() as u64
}

/// A table cell of a LUN: where it lies, the first block and how many of its entries are in use.
type TableCellAt = (CellAddress, BlockNo, usize);

/// The neighbours that can be read with the cell `number`, at most a piece of them.
fn neighbours(layout: &LunLayout, number: u64) -> Vec<TableCellAt> {
    let size = layout.cell_size.bytes();
    let mut run: Vec<TableCellAt> = Vec::new();
    while run.len() < PIECE / size
        && let Some(next) = layout.table_cell(number + run.len() as u64)
        && run.last().is_none_or(|(last, ..)| last.offset + size as u64 == next.0.offset)
    {
        run.push(next);
    }
    run
}

impl Scrub<'_> {
    /// Every cell of a block table; notes the containers.
    pub(super) async fn block_table(&mut self, member: &Member) -> Result<(), FsError> {
        let (layout, size) = (member.layout(), self.inner.context.cell_size());
        let mut number = 0;
        loop {
            let run = neighbours(&layout, number);
            let Some((first, ..)) = run.first().copied() else { return Ok(()) };
            let bytes = (run.len() * size.bytes()) as u64;
            let legal = |cell: &Cell| {
                let used = run.iter().find(|(at, ..)| *at == cell.address()).map_or(0, |(.., used)| *used);
                table_of(size, cell, CellKind::BlockTable, used).map(drop)
            };
            match self.inner.context.io.read_span(&member.lun, first, run.len()).await {
                Ok(cells) => {
                    let mut suspects: Vec<Suspect<'_>> = Vec::new();
                    for (cell, (at, first, used)) in cells.into_iter().zip(&run) {
                        match cell.and_then(|cell| table_of(size, &cell, CellKind::BlockTable, *used)) {
                            Ok(table) => self.note_entries(*first, at, &table),
                            Err(_) => suspects.push((*at, &legal)),
                        }
                    }
                    for (at, wrong) in self.confirm(suspects).await? {
                        self.problem(Structure::BlockTable, at, None, wrong);
                    }
                }
                Err(error) => self.unread(member, first, None, error),
            }
            number += run.len() as u64;
            self.paced(bytes).await?;
            self.advance(bytes);
        }
    }

    fn note_entries(&mut self, first: BlockNo, at: &CellAddress, table: &TableCell) {
        for (nth, entry) in table.entries.iter().enumerate() {
            let Some(block) = BlockNo::new(first.get() + nth as u64) else { continue };
            let container = BlockAddress { lun: at.lun, block };
            match entry.kind {
                EntryKind::FdContainer => drop(self.fd_containers.insert(container)),
                EntryKind::UnitContainer => drop(self.unit_containers.insert(container)),
                EntryKind::Data => self.data_blocks += 1,
                _ => {}
            }
        }
    }

    /// Whether a block still is a container of this kind.
    pub(super) async fn is_container(&self, container: BlockAddress, kind: EntryKind) -> bool {
        self.block_entry(container).await.is_some_and(|entry| entry.kind == kind)
    }

    /// The table entry of a block, as it is now.
    pub(super) async fn block_entry(&self, block: BlockAddress) -> Option<TableEntry> {
        let member = self.inner.context.member(block.lun).ok()?;
        let (at, nth) = member.layout().table_entry(block.block)?;
        let cell = self.inner.context.read_cell(at).await.ok()?;
        let table = TableCell::decode(self.inner.context.cell_size(), cell.payload()).ok()?;
        table.entries.get(nth).copied()
    }

    /// Every cell of a unit container.
    pub(super) async fn unit_container(&mut self, container: BlockAddress) -> Result<(), FsError> {
        let block = self.inner.info.block_size.bytes();
        let Ok(member) = self.inner.context.member(container.lun) else { return Ok(()) };
        let layout = member.layout();
        let Some(offset) = layout.block_offset(container.block) else { return Ok(()) };
        let size = layout.cell_size;
        let per = PIECE.min(block as usize) / size.bytes();
        let table_cells = (layout.block_size.units() as usize).div_ceil(entries_per_cell(size));
        let table = |cell: &Cell| table_of(size, cell, CellKind::UnitTable, entries_per_cell(size)).map(drop);
        let place = |nth: usize| CellAddress { lun: container.lun, offset: offset + (nth * size.bytes()) as u64 };
        let mut entries: Vec<TableEntry> = Vec::new();
        for piece in 0..block as usize / size.bytes() / per {
            let at = place(piece * per);
            match self.inner.context.io.read_span(&member.lun, at, per).await {
                Ok(cells) => {
                    let mut suspects: Vec<Suspect<'_>> = Vec::new();
                    for (nth, cell) in cells.into_iter().enumerate() {
                        let (nth, at) = (piece * per + nth, place(piece * per + nth));
                        let is_table = nth < table_cells;
                        let legal: Legal<'_> = if is_table { &table } else { &unit_cell };
                        if is_table {
                            let decoded =
                                cell.as_ref().ok().and_then(|cell| TableCell::decode(size, cell.payload()).ok());
                            entries.extend(decoded.unwrap_or_else(|| TableCell::free(size)).entries);
                        }
                        if !is_legal(&cell, legal) {
                            suspects.push((at, legal));
                        }
                    }
                    for (at, wrong) in self.confirm(suspects).await? {
                        if !self.is_container(container, EntryKind::UnitContainer).await {
                            break;
                        }
                        let nth = (at.offset - offset) as usize / size.bytes();
                        let unit = nth / size.cells_per_unit();
                        let in_table = nth < table_cells || unit < usize::from(first_unit(&layout));
                        let (structure, object) = of_entry(in_table, entries.get(unit));
                        self.problem(structure, at, object, wrong);
                    }
                }
                Err(error) => self.unread(&member, at, None, error),
            }
            self.paced((per * size.bytes()) as u64).await?;
            self.advance((per * size.bytes()) as u64);
        }
        Ok(())
    }
}

/// The table in a cell, whose entries behind the first `used` ones are free.
fn table_of(size: CellSize, cell: &Cell, kind: CellKind, used: usize) -> Result<TableCell, FormatError> {
    cell.expect_kind(kind)?;
    let table = TableCell::decode(size, cell.payload())?;
    match table.entries.iter().skip(used).find(|entry| **entry != TableEntry::FREE) {
        None => Ok(table),
        Some(entry) => {
            let value = entry.kind as u64;
            Err(FormatError::Value { structure: "table cell", field: "entry behind the last block", value })
        }
    }
}

/// A cell that may be in a unit.
fn unit_cell(cell: &Cell) -> Result<(), FormatError> {
    match cell.header().kind {
        CellKind::Blank | CellKind::Body | CellKind::PointerBlock | CellKind::Inner | CellKind::Bucket => Ok(()),
        _ => cell.expect_kind(CellKind::Blank),
    }
}

/// What a cell is part of, by the entry of its unit.
fn of_entry(in_table: bool, entry: Option<&TableEntry>) -> (Structure, Option<FdId>) {
    if in_table {
        return (Structure::UnitTable, None);
    }
    let entry = entry.copied().unwrap_or(TableEntry::FREE);
    let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
    let structure = structure_of(kind);
    (structure, FdId::from_stored(entry.fd).filter(|_| structure != Structure::FreeUnit))
}
