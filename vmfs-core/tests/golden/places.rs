//! Where everything lies, for both cell sizes.

use super::{block, fd, lun};
use vmfs_core::format::layout::{
    LunLayout, Segment, arena_cell, header_cell, header_copy_cell, heartbeat_cell, member_cell, pointers_per_block,
    roots_per_container, table_units, unit_payload,
};
use vmfs_core::units::{BlockSize, CellSize, SlotId, UnitAddress};

#[test]
fn fixed_cells_lie_every_four_kib_in_their_areas() {
    assert_eq!(header_cell(lun(1)).offset, 0x10_0000);
    assert_eq!(member_cell(lun(1), lun(1)).offset, 0x10_1000);
    assert_eq!(member_cell(lun(1), lun(254)).offset, 0x1f_e000);
    assert_eq!(header_copy_cell(lun(1)).offset, 0x1f_f000);
    assert_eq!(heartbeat_cell(lun(1), SlotId(0)).offset, 0x20_0000);
    assert_eq!(heartbeat_cell(lun(1), SlotId(255)).offset, 0x2f_f000);
    assert_eq!(arena_cell(lun(1), SlotId(0)).offset, 0x30_0000);
    assert_eq!(arena_cell(lun(1), SlotId(255)).offset, 0x3f_f000);
    assert_eq!(header_cell(lun(3)).pack(), 0x0300_0000_0010_0000);
}

#[test]
fn a_new_lun_has_one_segment_whose_blocks_begin_behind_the_table() {
    let mib = BlockSize::from_bytes(1 << 20).unwrap();
    // 64 MiB: 59 blocks need 3 cells of 26 entries (1 of 250); 4 MiB + table rounds up to 5 MiB.
    for cell in [CellSize::B512, CellSize::B4096] {
        let segment = Segment::whole_lun(64 << 20, cell, mib).unwrap();
        let expected = Segment { first_block: 0, block_count: 59, table_offset: 0x40_0000, data_offset: 0x50_0000 };
        assert_eq!(segment, expected);
    }
    // 64 TiB with 1 MiB blocks: 2,581,062 cells of 26 entries end below 1,265 MiB, where the blocks begin.
    let large = Segment::whole_lun(64 << 40, CellSize::B512, mib).unwrap();
    assert_eq!((large.block_count, large.data_offset), (67_107_599, 0x4f100000));
}

#[test]
fn counts_per_structure_are_those_of_the_text() {
    let (small, large) = (CellSize::B512, CellSize::B4096);
    let size = |shift| BlockSize::from_shift(shift).unwrap();
    assert_eq!((pointers_per_block(small), pointers_per_block(large)), (832, 1000));
    assert_eq!((unit_payload(small), unit_payload(large)), (6656, 8000));
    let table = |cell| [16, 20, 24].map(|shift| table_units(cell, size(shift)));
    assert_eq!((table(small), table(large)), ([1, 1, 5], [1, 1, 5]));
    let roots = |cell| [16, 20, 24].map(|shift| roots_per_container(cell, size(shift)));
    assert_eq!((roots(small), roots(large)), ([128, 2048, 32768], [16, 256, 4096]));
}

#[test]
fn blocks_units_and_descriptors_lie_where_the_text_says() {
    let segments = vec![
        Segment { first_block: 0, block_count: 100, table_offset: 4 << 20, data_offset: 5 << 20 },
        Segment { first_block: 100, block_count: 50, table_offset: 105 << 20, data_offset: 106 << 20 },
    ];
    let layout = |cell_size| LunLayout {
        lun: lun(2),
        cell_size,
        block_size: BlockSize::from_bytes(1 << 20).unwrap(),
        segments: segments.clone(),
    };
    let (small, large) = (layout(CellSize::B512), layout(CellSize::B4096));
    assert_eq!(small.block_offset(block(0)), Some(0x50_0000));
    assert_eq!(small.block_offset(block(99)), Some(0x680_0000));
    assert_eq!(small.block_offset(block(100)), Some(0x6a0_0000));
    assert_eq!(small.block_offset(block(150)), None);
    let entry = |layout: &LunLayout, number| layout.table_entry(block(number)).map(|(at, nth)| (at.offset, nth));
    assert_eq!(entry(&small, 27), Some((0x40_0200, 1)));
    assert_eq!(entry(&large, 27), Some((0x40_0000, 27)));
    assert_eq!(entry(&small, 126), Some((0x690_0200, 0)), "a segment begins with a cell of its own");
    // Block table cells are numbered through all segments: 4 of the first (100 / 26), 2 of the second.
    assert_eq!(small.table_cell_count(), 6);
    assert_eq!(
        small.table_cell(4).map(|(at, first, used)| (at.offset, first.get(), used)),
        Some((0x690_0000, 100, 26))
    );
    assert_eq!(small.table_cell(5).map(|(_, first, used)| (first.get(), used)), Some((126, 24)));
    assert_eq!(small.root_cell(fd(2, 1, 3)).map(|at| at.offset), Some(0x60_0600));
    assert_eq!(large.root_cell(fd(2, 1, 3)).map(|at| at.offset), Some(0x60_3000));
    assert_eq!(large.root_cell(fd(2, 1, 256)), None);
    let unit = UnitAddress { lun: lun(2), block: block(1), unit: 3 };
    assert_eq!(small.unit_cell(unit, 2).map(|at| at.offset), Some(0x60_6400));
    assert_eq!(large.unit_cell(unit, 1).map(|at| at.offset), Some(0x60_7000));
    let unit = UnitAddress { unit: 30, ..unit };
    assert_eq!(small.unit_table_entry(unit).map(|(at, nth)| (at.offset, nth)), Some((0x60_0200, 4)));
    assert_eq!(large.unit_table_entry(unit).map(|(at, nth)| (at.offset, nth)), Some((0x60_0000, 30)));
}
