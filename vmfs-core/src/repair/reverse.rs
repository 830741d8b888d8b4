//! Owns: the reverse map of some objects: which units and blocks say that they are theirs.
//! Promises: one pass over the tables; memory grows with what the asked objects hold, not with the volume.
//! Must not know: what is done with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::ground::Ground;
use crate::error::FsError;
use crate::format::CellKind;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::units::{BlockAddress, BlockNo, CellAddress, FdId, LunIndex, UnitAddress};

/// Table cells that are read with one command.
const SPAN: u64 = 512;

/// What the tables say of one object.
#[derive(Default)]
pub(super) struct Holdings {
    /// Units, with their entries.
    pub units: Vec<(UnitAddress, TableEntry)>,
    /// Blocks by file block; one that is not marked as being dropped goes before one that is.
    pub blocks: BTreeMap<u32, BlockAddress>,
    retiring: BTreeSet<u32>,
}

impl Holdings {
    fn block(&mut self, at: BlockAddress, entry: &TableEntry) {
        let retiring = entry.kind == EntryKind::Retiring;
        if self.blocks.contains_key(&entry.index) && (retiring || !self.retiring.contains(&entry.index)) {
            return;
        }
        self.blocks.insert(entry.index, at);
        match retiring {
            true => self.retiring.insert(entry.index),
            false => self.retiring.remove(&entry.index),
        };
    }

    /// Units that hold, or held until they were marked, this.
    pub fn units_of(&self, kind: EntryKind) -> impl Iterator<Item = (UnitAddress, &TableEntry)> {
        let is =
            move |entry: &TableEntry| entry.kind == kind || (entry.kind == EntryKind::Retiring && entry.was == kind);
        self.units.iter().filter(move |(_, entry)| is(entry)).map(|(at, entry)| (*at, entry))
    }

    /// LUNs on which it holds anything.
    pub fn luns(&self) -> BTreeSet<LunIndex> {
        self.units.iter().map(|(at, _)| at.lun).chain(self.blocks.values().map(|at| at.lun)).collect()
    }
}

/// The reverse map of the asked objects.
#[derive(Default)]
pub(super) struct ReverseMap {
    holdings: HashMap<FdId, Holdings>,
    /// Unit containers by LUN: where free units are looked for.
    pub containers: BTreeSet<BlockAddress>,
    /// FD containers.
    pub fd_containers: BTreeSet<BlockAddress>,
}

static NOTHING: std::sync::LazyLock<Holdings> = std::sync::LazyLock::new(Holdings::default);

impl ReverseMap {
    /// Reads all tables. Cells that fail their checks say nothing.
    pub async fn read(ground: &Ground, wanted: &BTreeSet<FdId>) -> Result<ReverseMap, FsError> {
        let mut map = ReverseMap::default();
        for (lun, member) in &ground.members {
            let count = member.layout.table_cell_count();
            let mut number = 0;
            while number < count {
                number += map.read_blocks(ground, *lun, wanted, number..count).await?;
            }
        }
        for container in map.containers.clone() {
            map.read_units(ground, container, wanted).await?;
        }
        Ok(map)
    }

    /// What the tables say of an object.
    pub fn of(&self, fd: FdId) -> &Holdings {
        self.holdings.get(&fd).unwrap_or(&NOTHING)
    }

    /// Reads neighbouring table cells; gives how many.
    async fn read_blocks(
        &mut self,
        ground: &Ground,
        lun: LunIndex,
        wanted: &BTreeSet<FdId>,
        numbers: std::ops::Range<u64>,
    ) -> Result<u64, FsError> {
        let member = ground.member(lun)?;
        let size = ground.context().cell_size;
        let (first, _, _) = member.layout.table_cell(numbers.start).expect("the number is below the count");
        let mut run = 1;
        let follows = |run: u64| {
            let next = member.layout.table_cell(numbers.start + run);
            next.is_some_and(|(at, _, _)| at.offset == first.offset + run * size.bytes() as u64)
        };
        while run < SPAN && numbers.start + run < numbers.end && follows(run) {
            run += 1;
        }
        for (nth, cell) in ground.io.read_span(&member.lun, first, run as usize).await?.into_iter().enumerate() {
            let Ok(table) = cell.and_then(|cell| {
                cell.expect_kind(CellKind::BlockTable)?;
                TableCell::decode(size, cell.payload())
            }) else {
                continue;
            };
            let (_, block, used) = member.layout.table_cell(numbers.start + nth as u64).expect("below the count");
            for (nth, entry) in table.entries[..used].iter().enumerate() {
                let Some(block) = BlockNo::new(block.get() + nth as u64) else { continue };
                let at = BlockAddress { lun, block };
                match entry.kind {
                    EntryKind::FdContainer => {
                        self.fd_containers.insert(at);
                    }
                    EntryKind::UnitContainer => {
                        self.containers.insert(at);
                    }
                    EntryKind::Data | EntryKind::Retiring => {
                        if let Some(fd) = FdId::from_stored(entry.fd).filter(|fd| wanted.contains(fd)) {
                            self.holdings.entry(fd).or_default().block(at, entry);
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(run)
    }

    async fn read_units(
        &mut self,
        ground: &Ground,
        container: BlockAddress,
        wanted: &BTreeSet<FdId>,
    ) -> Result<(), FsError> {
        let member = ground.member(container.lun)?;
        let Some(offset) = member.layout.block_offset(container.block) else { return Ok(()) };
        let (size, units) = (ground.context().cell_size, member.layout.block_size.units() as usize);
        let first = CellAddress { lun: container.lun, offset };
        let cells = ground.io.read_span(&member.lun, first, units.div_ceil(entries_per_cell(size))).await?;
        for (nth, cell) in cells.into_iter().enumerate() {
            let table = cell.and_then(|cell| {
                cell.expect_kind(CellKind::UnitTable)?;
                TableCell::decode(size, cell.payload())
            });
            for (place, entry) in table.iter().flat_map(|table| table.entries.iter().enumerate()) {
                let unit = nth * entries_per_cell(size) + place;
                let owned = !matches!(entry.kind, EntryKind::Free | EntryKind::Pool | EntryKind::Table);
                if let Some(fd) = FdId::from_stored(entry.fd).filter(|fd| owned && unit < units && wanted.contains(fd))
                {
                    let at = UnitAddress { lun: container.lun, block: container.block, unit: unit as u16 };
                    self.holdings.entry(fd).or_default().units.push((at, *entry));
                }
            }
        }
        Ok(())
    }
}
