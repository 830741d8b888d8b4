//! Owns: where the fixed structures of a LUN lie.
//! Promises: areas never overlap; every address is a multiple of 4096 bytes except inside tables and containers.
//! Must not know: the contents of any cell.

use crate::units::{
    BlockNo, BlockSize, CellAddress, CellSize, FdId, Link, LunIndex, SLOTS, SlotId, UNIT_BYTES, UnitAddress,
};

/// `link` of the root directory: it is made once and never moves.
pub const ROOT_LINK: Link = Link(1);
/// The first MiB of a LUN is never written.
pub const UNTOUCHED_BYTES: u64 = 1 << 20;
/// Header cell.
pub const HEADER_OFFSET: u64 = 1 << 20;
/// Bytes from one fixed cell (header, member, heartbeat, arena) to the next, for both cell sizes.
pub const FIXED_STRIDE: u64 = 4096;
/// Copy of the header cell: the last stride of the header area.
pub const HEADER_COPY_OFFSET: u64 = (2 << 20) - FIXED_STRIDE;
/// First heartbeat cell.
pub const HEARTBEAT_OFFSET: u64 = 2 << 20;
/// First arena cell.
pub const ARENA_OFFSET: u64 = 3 << 20;
/// First cell of the first segment's block table.
pub const TABLE_OFFSET: u64 = 4 << 20;
/// Bytes of a table entry.
pub const ENTRY_BYTES: usize = 16;
/// Bytes of a block pointer.
pub const POINTER_BYTES: usize = 8;
/// Most segments of a LUN's block table: the first and four growths.
pub const MAX_SEGMENTS: usize = 5;

const _: () = assert!(HEARTBEAT_OFFSET + SLOTS as u64 * FIXED_STRIDE == ARENA_OFFSET);
const _: () = assert!(ARENA_OFFSET + SLOTS as u64 * FIXED_STRIDE == TABLE_OFFSET);
const _: () = assert!(HEADER_OFFSET + 255 * FIXED_STRIDE == HEADER_COPY_OFFSET);

/// Address of the cell of member `member` on LUN `lun`.
pub fn member_cell(lun: LunIndex, member: LunIndex) -> CellAddress {
    CellAddress { lun, offset: HEADER_OFFSET + u64::from(member.get()) * FIXED_STRIDE }
}

/// Address of the header cell of LUN `lun`.
pub fn header_cell(lun: LunIndex) -> CellAddress {
    CellAddress { lun, offset: HEADER_OFFSET }
}

/// Address of the header copy of LUN `lun`.
pub fn header_copy_cell(lun: LunIndex) -> CellAddress {
    CellAddress { lun, offset: HEADER_COPY_OFFSET }
}

/// Address of a heartbeat cell.
pub fn heartbeat_cell(lun: LunIndex, slot: SlotId) -> CellAddress {
    CellAddress { lun, offset: HEARTBEAT_OFFSET + u64::from(slot.0) * FIXED_STRIDE }
}

/// Address of an arena cell.
pub fn arena_cell(lun: LunIndex, slot: SlotId) -> CellAddress {
    CellAddress { lun, offset: ARENA_OFFSET + u64::from(slot.0) * FIXED_STRIDE }
}

/// Entries of one block or unit table cell: 26 or 250.
pub const fn entries_per_cell(cell: CellSize) -> usize {
    cell.payload() / ENTRY_BYTES
}

/// Pointers of one PB cell: 52 or 500.
pub const fn pointers_per_cell(cell: CellSize) -> usize {
    cell.payload() / POINTER_BYTES
}

/// Pointers of one pointer block: 832 or 1000.
pub const fn pointers_per_block(cell: CellSize) -> usize {
    pointers_per_cell(cell) * cell.cells_per_unit()
}

/// Payload bytes of one unit, all cells together: 6656 or 8000.
pub const fn unit_payload(cell: CellSize) -> usize {
    cell.payload() * cell.cells_per_unit()
}

/// Units at the start of a unit container that hold its table.
pub const fn table_units(cell: CellSize, block: BlockSize) -> u64 {
    let cells = (block.units() as usize).div_ceil(entries_per_cell(cell));
    cells.div_ceil(cell.cells_per_unit()) as u64
}

/// Root cells of one FD container.
pub const fn roots_per_container(cell: CellSize, block: BlockSize) -> u64 {
    let all = block.bytes() / cell.bytes() as u64;
    if all < 1 << 15 { all } else { 1 << 15 }
}

/// A run of blocks of a LUN and the part of the block table that describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Number of the first block.
    pub first_block: u64,
    /// Blocks.
    pub block_count: u64,
    /// Byte offset of the first table cell.
    pub table_offset: u64,
    /// Byte offset of the first block.
    pub data_offset: u64,
}

impl Segment {
    /// The segment that covers a new LUN of `lun_bytes`, or none when not even one block fits.
    pub fn whole_lun(lun_bytes: u64, cell: CellSize, block: BlockSize) -> Option<Segment> {
        Segment::covering(0, TABLE_OFFSET, lun_bytes, cell, block)
    }

    /// The segment whose table begins at `table_offset` and whose blocks end before `end`.
    pub fn covering(
        first_block: u64,
        table_offset: u64,
        end: u64,
        cell: CellSize,
        block: BlockSize,
    ) -> Option<Segment> {
        let room = end.checked_sub(table_offset)?;
        let mut block_count = (room / block.bytes()).min((1 << BlockNo::BITS) - first_block);
        loop {
            if block_count == 0 {
                return None;
            }
            let table_bytes = table_cells(block_count, cell) * cell.bytes() as u64;
            let data_offset = (table_offset + table_bytes).next_multiple_of(block.bytes());
            match end.checked_sub(data_offset).map(|left| left / block.bytes()) {
                Some(fits) if fits >= block_count => {
                    return Some(Segment { first_block, block_count, table_offset, data_offset });
                }
                Some(fits) => block_count = fits,
                None => block_count -= 1,
            }
        }
    }

    /// Cells of this segment's table.
    pub fn table_cells(&self, cell: CellSize) -> u64 {
        table_cells(self.block_count, cell)
    }

    /// End of the last block, in bytes from the LUN's start.
    pub fn end(&self, block: BlockSize) -> u64 {
        self.data_offset + self.block_count * block.bytes()
    }
}

fn table_cells(block_count: u64, cell: CellSize) -> u64 {
    block_count.div_ceil(entries_per_cell(cell) as u64)
}

/// The geometry of one LUN: turns blocks, units and descriptors into byte offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunLayout {
    /// Which LUN.
    pub lun: LunIndex,
    /// Cell size of the volume.
    pub cell_size: CellSize,
    /// Block size of the volume.
    pub block_size: BlockSize,
    /// Segments in ascending order of blocks; at least one.
    pub segments: Vec<Segment>,
}

impl LunLayout {
    /// Blocks of the LUN.
    pub fn block_count(&self) -> u64 {
        self.segments.iter().map(|s| s.block_count).sum()
    }

    fn segment_of(&self, block: BlockNo) -> Option<&Segment> {
        self.segments.iter().find(|s| block.get() >= s.first_block && block.get() - s.first_block < s.block_count)
    }

    /// Byte offset of a block; none when the LUN does not have it.
    pub fn block_offset(&self, block: BlockNo) -> Option<u64> {
        let segment = self.segment_of(block)?;
        Some(segment.data_offset + (block.get() - segment.first_block) * self.block_size.bytes())
    }

    /// The table cell of a block and the entry's place in it; none when the LUN does not have the block.
    pub fn table_entry(&self, block: BlockNo) -> Option<(CellAddress, usize)> {
        let segment = self.segment_of(block)?;
        let (nth, per) = (block.get() - segment.first_block, entries_per_cell(self.cell_size) as u64);
        let offset = segment.table_offset + nth / per * self.cell_size.bytes() as u64;
        Some((CellAddress { lun: self.lun, offset }, (nth % per) as usize))
    }

    /// Number of block table cells, all segments together.
    pub fn table_cell_count(&self) -> u64 {
        self.segments.iter().map(|s| s.table_cells(self.cell_size)).sum()
    }

    /// The `nth` block table cell of the LUN: its address, the first block it describes and how many entries it uses.
    pub fn table_cell(&self, nth: u64) -> Option<(CellAddress, BlockNo, usize)> {
        let per = entries_per_cell(self.cell_size) as u64;
        let mut left = nth;
        for segment in &self.segments {
            let cells = segment.table_cells(self.cell_size);
            if left < cells {
                let address =
                    CellAddress { lun: self.lun, offset: segment.table_offset + left * self.cell_size.bytes() as u64 };
                let used = (segment.block_count - left * per).min(per) as usize;
                return Some((address, BlockNo::new(segment.first_block + left * per)?, used));
            }
            left -= cells;
        }
        None
    }

    /// Address of an object's root cell; none when its container is not on this LUN.
    pub fn root_cell(&self, fd: FdId) -> Option<CellAddress> {
        if fd.lun() != self.lun || u64::from(fd.cell()) >= roots_per_container(self.cell_size, self.block_size) {
            return None;
        }
        let offset = self.block_offset(fd.container().block)? + u64::from(fd.cell()) * self.cell_size.bytes() as u64;
        Some(CellAddress { lun: self.lun, offset })
    }

    /// Address of cell `cell` of a unit; none when the unit is not on this LUN.
    pub fn unit_cell(&self, unit: UnitAddress, cell: usize) -> Option<CellAddress> {
        if unit.lun != self.lun
            || u64::from(unit.unit) >= self.block_size.units()
            || cell >= self.cell_size.cells_per_unit()
        {
            return None;
        }
        let offset = self.block_offset(unit.block)?
            + u64::from(unit.unit) * UNIT_BYTES
            + cell as u64 * self.cell_size.bytes() as u64;
        Some(CellAddress { lun: self.lun, offset })
    }

    /// The unit table cell that describes a unit and the entry's place in it.
    pub fn unit_table_entry(&self, unit: UnitAddress) -> Option<(CellAddress, usize)> {
        if unit.lun != self.lun || u64::from(unit.unit) >= self.block_size.units() {
            return None;
        }
        let per = entries_per_cell(self.cell_size);
        let nth = usize::from(unit.unit) / per;
        let offset = self.block_offset(unit.block)? + (nth * self.cell_size.bytes()) as u64;
        Some((CellAddress { lun: self.lun, offset }, usize::from(unit.unit) % per))
    }
}
