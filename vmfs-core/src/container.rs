//! Owns: the cells of a fresh FD container and of a fresh unit container.
//! Promises: every cell of the block is a valid image of its own (rule R2), and nothing in it is in use.
//! Must not know: how a block is taken for a container, who writes it.

use crate::buf::AlignedBuf;
use crate::format::layout::{LunLayout, entries_per_cell, table_units};
use crate::format::root_cell::RootCell;
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::{Cell, CellContext, CellHeader, CellKind};
use crate::units::{BlockAddress, BlockNo, CellAddress, FdId, Link, OpId, Seq, SlotId, SlotRef, Token, UNIT_BYTES};

/// `seq` of a cell that was formatted and never changed.
pub const FORMATTED_SEQ: Seq = Seq(1);

/// Who formats, with what.
pub struct Formatter<'a> {
    /// Volume and cell size.
    pub context: &'a CellContext,
    /// Geometry of the LUN.
    pub layout: &'a LunLayout,
    /// The incarnation that formats; `SlotRef::NOBODY` is mkfs.
    pub writer: SlotRef,
    /// Draws a new random `op_id`.
    pub op_id: &'a mut dyn FnMut() -> OpId,
}

impl Formatter<'_> {
    /// The bytes of block `block` as an FD container: every root cell is free, its owner is its own identity and its link 0.
    /// None when the LUN does not have the block.
    pub fn fd_container(&mut self, block: BlockNo) -> Option<AlignedBuf> {
        let container = BlockAddress { lun: self.layout.lun, block };
        let free = RootCell::free(Token(0)).encode();
        self.cells(block, |nth| {
            let owner = u16::try_from(nth).ok().and_then(|cell| FdId::new(container, cell));
            (CellKind::Root, owner, &free)
        })
    }

    /// The bytes of block `block` as a unit container: its table says `Table` of its own units and `Free` of the others; all
    /// cells behind the table are blank. None when the LUN does not have the block.
    pub fn unit_container(&mut self, block: BlockNo) -> Option<AlignedBuf> {
        let tables = unit_table(self.layout);
        let encoded: Vec<Vec<u8>> = tables.iter().map(TableCell::encode).collect();
        let nothing = Vec::new();
        self.cells(block, |nth| match encoded.get(nth) {
            Some(payload) => (CellKind::UnitTable, None, payload),
            None => (CellKind::Blank, None, &nothing),
        })
    }

    /// The bytes of block `block` as part of a window: the map cells with these payloads, then blank cells.
    pub fn window_block(&mut self, block: BlockNo, map: &[Vec<u8>]) -> Option<AlignedBuf> {
        let nothing = Vec::new();
        self.cells(block, |nth| match map.get(nth) {
            Some(payload) => (CellKind::WindowMap, None, payload),
            None => (CellKind::Blank, None, &nothing),
        })
    }

    fn cells<'p>(
        &mut self,
        block: BlockNo,
        content: impl Fn(usize) -> (CellKind, Option<FdId>, &'p Vec<u8>),
    ) -> Option<AlignedBuf> {
        let offset = self.layout.block_offset(block)?;
        let size = self.context.cell_size.bytes();
        let mut buf = AlignedBuf::zeroed(self.layout.block_size.bytes() as usize);
        for (nth, image) in buf.chunks_exact_mut(size).enumerate() {
            let (kind, owner, payload) = content(nth);
            let at = CellAddress { lun: self.layout.lun, offset: offset + (nth * size) as u64 };
            let header = self.header(at, kind, owner);
            Cell::encode_into(self.context, &header, payload, image);
        }
        Some(buf)
    }

    /// The header of a cell as formatting leaves it.
    pub fn header(&mut self, address: CellAddress, kind: CellKind, owner: Option<FdId>) -> CellHeader {
        CellHeader {
            kind,
            address,
            seq: FORMATTED_SEQ,
            op_id: (self.op_id)(),
            writer: self.writer,
            owner,
            link: Link(0),
            index: 0,
            token: Token(0),
        }
    }
}

/// The table of a fresh unit container, cell by cell. The last units of the table may end with blank cells behind it.
pub fn unit_table(layout: &LunLayout) -> Vec<TableCell> {
    let per = entries_per_cell(layout.cell_size);
    let units = layout.block_size.units() as usize;
    let mut tables = vec![TableCell::free(layout.cell_size); units.div_ceil(per)];
    for unit in 0..table_units(layout.cell_size, layout.block_size) as usize {
        tables[unit / per].entries[unit % per] = own_table_entry();
    }
    tables
}

fn own_table_entry() -> TableEntry {
    TableEntry { kind: EntryKind::Table, slot: SlotId(0), ..TableEntry::FREE }
}

/// Number of the first unit of a container that is not part of its table.
pub fn first_unit(layout: &LunLayout) -> u16 {
    table_units(layout.cell_size, layout.block_size) as u16
}

/// Byte offset of a unit in its container.
pub const fn unit_offset(unit: u16) -> u64 {
    unit as u64 * UNIT_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::layout::Segment;
    use crate::units::{BlockSize, CellSize, LunIndex, UnitAddress, Uuid};

    fn each_geometry(check: impl Fn(CellContext, LunLayout)) {
        for cell_size in [CellSize::B512, CellSize::B4096] {
            for block_size in [16, 20, 24].map(|shift| BlockSize::from_shift(shift).unwrap()) {
                let segment = Segment::whole_lun(1 << 30, cell_size, block_size).unwrap();
                let lun = LunIndex::new(3).unwrap();
                let layout = LunLayout { lun, cell_size, block_size, segments: vec![segment] };
                check(CellContext { volume: Uuid([1; 16]), cell_size }, layout);
            }
        }
    }

    fn counter() -> impl FnMut() -> OpId {
        let mut next = 0u128;
        move || {
            next += 1;
            OpId(next.to_le_bytes())
        }
    }

    #[test]
    fn every_cell_of_a_fresh_fd_container_is_a_free_root_cell_of_its_own_identity() {
        each_geometry(|context, layout| {
            let block = BlockNo::new(5).unwrap();
            let (mut op_id, container) = (counter(), BlockAddress { lun: layout.lun, block });
            let mut formatter =
                Formatter { context: &context, layout: &layout, writer: SlotRef::NOBODY, op_id: &mut op_id };
            let buf = formatter.fd_container(block).unwrap();
            for (nth, image) in buf.chunks(context.cell_size.bytes()).enumerate() {
                let fd = FdId::new(container, nth as u16).unwrap();
                let cell = Cell::decode(&context, layout.root_cell(fd).unwrap(), image).unwrap();
                assert_eq!((cell.header().kind, cell.header().owner), (CellKind::Root, Some(fd)));
                assert_eq!(RootCell::decode(context.cell_size, cell.payload()).unwrap(), RootCell::free(Token(0)));
            }
            assert!(formatter.fd_container(BlockNo::new(1 << 35).unwrap()).is_none());
        });
    }

    #[test]
    fn the_table_of_a_fresh_unit_container_marks_its_own_units_and_no_others() {
        each_geometry(|context, layout| {
            let block = BlockNo::new(0).unwrap();
            let mut op_id = counter();
            let mut formatter =
                Formatter { context: &context, layout: &layout, writer: SlotRef::NOBODY, op_id: &mut op_id };
            let buf = formatter.unit_container(block).unwrap();
            let start = layout.block_offset(block).unwrap();
            for unit in 0..layout.block_size.units() as u16 {
                let unit = UnitAddress { lun: layout.lun, block, unit };
                let (at, nth) = layout.unit_table_entry(unit).unwrap();
                let from = (at.offset - start) as usize;
                let cell = Cell::decode(&context, at, &buf[from..from + context.cell_size.bytes()]).unwrap();
                let entry = TableCell::decode(context.cell_size, cell.payload()).unwrap().entries[nth];
                let table = unit.unit < first_unit(&layout);
                assert_eq!(entry.kind, if table { EntryKind::Table } else { EntryKind::Free });
                if !table {
                    let at = layout.unit_cell(unit, 0).unwrap();
                    let from = (at.offset - start) as usize;
                    let cell = Cell::decode(&context, at, &buf[from..from + context.cell_size.bytes()]).unwrap();
                    assert_eq!(cell.header().kind, CellKind::Blank);
                }
            }
        });
    }
}
