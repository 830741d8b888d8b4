//! Owns: reading the reverse map of a LUN: what lies on it, and whose it is.
//! Promises: every entry of every table is looked at as it is on the LUN; nothing is changed.
//! Must not know: what becomes of what it finds.

use std::collections::BTreeMap;

use super::Space;
use super::blocks::place_of_cell;
use crate::container::first_unit;
use crate::error::{FsError, FsErrorKind};
use crate::format::layout::{entries_per_cell, roots_per_container};
use crate::format::root_cell::{ObjectState, RootCell};
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{BlockAddress, BlockNo, FdId, LunIndex, UnitAddress};

/// Table cells and root cells read with one command.
const AT_ONCE: u64 = 1024;

/// What lies on a LUN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Occupied {
    /// Data blocks by owner.
    pub blocks: BTreeMap<FdId, u64>,
    /// Units by owner: their kinds and indexes in it.
    pub units: BTreeMap<FdId, Vec<(UnitAddress, EntryKind, u32)>>,
    /// Objects whose root cell lies there.
    pub roots: Vec<FdId>,
    /// Blocks and units that are on their way from one state to another, or are kept from use: freed or settled by others.
    pub unsettled: u64,
    /// Units in the pools of hosts.
    pub pooled: u64,
    /// Blocks of windows, which carry the cells of LUNs that were taken out.
    pub windows: u64,
}

impl Occupied {
    /// Data blocks.
    pub fn block_count(&self) -> u64 {
        self.blocks.values().sum()
    }

    /// Units in use.
    pub fn unit_count(&self) -> u64 {
        self.units.values().map(|units| units.len() as u64).sum()
    }

    fn note_block(&mut self, entry: &TableEntry) {
        match (entry.kind, FdId::from_stored(entry.fd)) {
            (EntryKind::Data, Some(fd)) => *self.blocks.entry(fd).or_default() += 1,
            (EntryKind::Free | EntryKind::FdContainer | EntryKind::UnitContainer | EntryKind::Gone, _) => {}
            (EntryKind::Window, _) => self.windows += 1,
            _ => self.unsettled += 1,
        }
    }

    fn note_unit(&mut self, at: UnitAddress, entry: &TableEntry) {
        match (entry.kind, FdId::from_stored(entry.fd)) {
            (EntryKind::Free | EntryKind::Table | EntryKind::Gone, _) => {}
            (EntryKind::Pool, _) => self.pooled += 1,
            (kind @ (EntryKind::Body | EntryKind::PointerBlock | EntryKind::Inner | EntryKind::Bucket), Some(fd)) => {
                self.units.entry(fd).or_default().push((at, kind, entry.index));
            }
            _ => self.unsettled += 1,
        }
    }
}

impl Space {
    /// Looks at everything on a LUN.
    pub async fn occupied(&self, lun: LunIndex) -> Result<Occupied, FsError> {
        let context = self.blocks.context();
        let member = context.member(lun)?;
        context.read_geometry(&member).await?;
        let layout = member.layout();
        let mut found = Occupied::default();
        let (mut units, mut roots) = (Vec::new(), Vec::new());
        for number in 0..layout.table_cell_count() {
            let Some((_, first, used)) = layout.table_cell(number) else { continue };
            let place = place_of_cell(&member, number).expect("the number is below the count");
            let table = self.tables.read(place).await?;
            for (nth, entry) in table.entries[..used].iter().enumerate() {
                found.note_block(entry);
                let list = match entry.kind {
                    EntryKind::UnitContainer => &mut units,
                    EntryKind::FdContainer => &mut roots,
                    _ => continue,
                };
                list.extend(BlockNo::new(first.get() + nth as u64).map(|block| BlockAddress { lun, block }));
            }
        }
        for container in units {
            self.occupied_units(container, &mut found).await?;
        }
        for container in roots {
            self.occupied_roots(container, &mut found).await?;
        }
        Ok(found)
    }

    async fn occupied_units(&self, container: BlockAddress, found: &mut Occupied) -> Result<(), FsError> {
        let member = self.blocks.context().member(container.lun)?;
        let layout = member.layout();
        let (per, units) = (entries_per_cell(layout.cell_size), layout.block_size.units() as usize);
        for cell in 0..units.div_ceil(per) {
            let range = (cell * per).max(usize::from(first_unit(&layout)))..((cell + 1) * per).min(units);
            if range.is_empty() {
                continue;
            }
            let unit = |nth: usize| UnitAddress { lun: container.lun, block: container.block, unit: nth as u16 };
            let table = self.tables.read(self.units.place_of(unit(range.start))?.0).await?;
            range.for_each(|nth| found.note_unit(unit(nth), &table.entries[nth % per]));
        }
        Ok(())
    }

    async fn occupied_roots(&self, container: BlockAddress, found: &mut Occupied) -> Result<(), FsError> {
        let context = self.blocks.context();
        let member = context.member(container.lun)?;
        let layout = member.layout();
        let corrupt = |cause: FormatError| FsError::Corrupt { structure: format!("FD container {container}"), cause };
        let missing = || FsError::refused(FsErrorKind::Corrupt, format!("there is no FD container {container}"));
        let count = roots_per_container(layout.cell_size, layout.block_size);
        let mut nth = 0;
        while nth < count {
            let fd = |nth: u64| FdId::new(container, nth as u16);
            let at = fd(nth).and_then(|fd| layout.root_cell(fd)).ok_or_else(missing)?;
            let some = AT_ONCE.min(count - nth);
            let cells = context.io.read_span(&member.lun, at, some as usize).await?;
            for (step, cell) in cells.into_iter().enumerate() {
                let fd = fd(nth + step as u64).ok_or_else(missing)?;
                let cell: Cell = match cell {
                    Ok(cell) => cell,
                    Err(_) => context.read_cell(layout.root_cell(fd).ok_or_else(missing)?).await?,
                };
                cell.expect_kind(CellKind::Root).map_err(corrupt)?;
                let root = RootCell::decode(layout.cell_size, cell.payload()).map_err(corrupt)?;
                if root.state != ObjectState::Free {
                    found.roots.push(fd);
                }
            }
            nth += some;
        }
        Ok(())
    }
}
