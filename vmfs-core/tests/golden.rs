//! Every structure of the format against bytes that were typed by hand from docs/FORMAT.md.
//!
//! Nothing here is built from the constants under test: offsets and values are literals, checksums come from the small bitwise
//! crc32c below. A change of the format changes FORMAT.md and this file together.

use vmfs_core::format::arena::{Arena, Place};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::{DeviceIdentity, LeaseTimes, LockMode, LunHeader, MemberState};
use vmfs_core::format::heartbeat::{Breaker, FenceGrade, Heartbeat, SlotState};
use vmfs_core::format::layout::Segment;
use vmfs_core::format::member::Member;
use vmfs_core::format::moved::{MapCell, Moved, Piece};
use vmfs_core::format::root_cell::{
    HoldMode, Holder, LockRecord, LunSet, ObjectFlags, ObjectState, ObjectType, RootCell, Unclean,
};
use vmfs_core::format::table_entry::{EntryKind, TableCell, TableEntry};
use vmfs_core::format::unit::UnitRef;
use vmfs_core::format::{Cell, CellContext, CellHeader, CellKind};
use vmfs_core::units::{
    BlockAddress, BlockNo, BlockSize, CellAddress, CellSize, FdId, Generation, Link, LunIndex, OpId, Seq, SlotId,
    SlotRef, Token, UnitAddress, Uuid,
};

#[path = "golden/bodies.rs"]
mod bodies;
#[path = "golden/places.rs"]
mod places;

/// Bytes typed by hand: lines of "offset: bytes", both hexadecimal; what is not typed is zero.
fn typed(length: usize, lines: &str) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (offset, values) = line.split_once(':').expect("a line is `offset: bytes`");
        let first = usize::from_str_radix(offset.trim(), 16).expect("a hexadecimal offset");
        for (at, value) in (first..).zip(values.split_whitespace()) {
            bytes[at] = u8::from_str_radix(value, 16).expect("a hexadecimal byte");
        }
    }
    bytes
}

/// crc32c (Castagnoli), bit by bit: reflected polynomial 0x82f63b78, all ones before and after.
fn crc32c_bitwise(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// Enters the checksum of a cell at bytes 8..12, where the typed image has zeros.
fn sealed(mut image: Vec<u8>) -> Vec<u8> {
    assert_eq!(image[8..12], [0; 4]);
    let crc = crc32c_bitwise(&image);
    image[8..12].copy_from_slice(&crc.to_le_bytes());
    image
}

fn lun(number: u8) -> LunIndex {
    LunIndex::new(number).unwrap()
}

fn block(number: u64) -> BlockNo {
    BlockNo::new(number).unwrap()
}

fn fd(lun_number: u8, container: u64, cell: u16) -> FdId {
    FdId::new(BlockAddress { lun: lun(lun_number), block: block(container) }, cell).unwrap()
}

fn counted_uuid(first: u8) -> Uuid {
    Uuid(std::array::from_fn(|nth| first + nth as u8))
}

const BOTH: [CellSize; 2] = [CellSize::B512, CellSize::B4096];

#[test]
fn the_bitwise_checksum_is_crc32c() {
    // RFC 3720, B.4: 32 bytes of zeros; and the check value of "123456789".
    assert_eq!(crc32c_bitwise(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c_bitwise(b"123456789"), 0xe306_9283);
}

/// The cell of a pointer block: every field of the header is in use.
fn check_cell(context: CellContext, image: Vec<u8>) {
    let at = CellAddress { lun: lun(3), offset: 0x1234_5600_0000 };
    let cell = Cell::decode(&context, at, &image).unwrap();
    let header = CellHeader {
        kind: CellKind::PointerBlock,
        address: at,
        seq: Seq(0x0102_0304_0506_0708),
        op_id: OpId(std::array::from_fn(|nth| 0xe0 + nth as u8)),
        writer: SlotRef { slot: SlotId(0xab), generation: Generation(0x11_2233_4455) },
        owner: Some(fd(2, 5, 7)),
        link: Link(0x55),
        index: 0x0a0b_0c0d,
        token: Token(0x99),
    };
    assert_eq!(*cell.header(), header);
    assert_eq!(cell.payload()[..4], [0xde, 0xad, 0xbe, 0xef]);
    assert!(cell.payload()[4..].iter().all(|byte| *byte == 0));
    assert_eq!(Cell::encode(&context, header, &[0xde, 0xad, 0xbe, 0xef]).image(), image);
}

#[test]
fn the_cell_header_has_its_fields_where_the_text_says() {
    // FD 2:5:7 is lun 2 << 51 | block 5 << 15 | cell 7.
    let fields = "
        00: 56 4d 46 63
        04: 0a 01
        07: 00
        0c: 0d 0c 0b 0a
        10: 10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f
        20: 00 00 00 56 34 12 00 03
        28: 08 07 06 05 04 03 02 01
        30: e0 e1 e2 e3 e4 e5 e6 e7 e8 e9 ea eb ec ed ee ef
        40: 55 44 33 22 11 ab 00 00
        48: 07 80 02 00 00 00 10 00
        50: 55 00 00 00 00 00 00 00
        58: 99 00 00 00 00 00 00 00
        60: de ad be ef";
    let context = |cell_size| CellContext { volume: counted_uuid(0x10), cell_size };
    let small = sealed(typed(512, &format!("{fields}\n 06: 09")));
    check_cell(context(CellSize::B512), small);
    let large = sealed(typed(4096, &format!("{fields}\n 06: 0c")));
    check_cell(context(CellSize::B4096), large);
}

#[test]
fn every_cell_kind_has_its_number() {
    let kinds = [
        (1, CellKind::Header),
        (2, CellKind::Member),
        (3, CellKind::Heartbeat),
        (4, CellKind::Arena),
        (5, CellKind::BlockTable),
        (6, CellKind::UnitTable),
        (7, CellKind::Root),
        (8, CellKind::Blank),
        (9, CellKind::Body),
        (10, CellKind::PointerBlock),
        (11, CellKind::Inner),
        (12, CellKind::Bucket),
        (13, CellKind::Moved),
        (14, CellKind::WindowMap),
    ];
    for (stored, kind) in kinds {
        assert_eq!((CellKind::from_stored(stored), kind as u8), (Some(kind), stored));
    }
    assert_eq!((CellKind::from_stored(0), CellKind::from_stored(15)), (None, None));
}

#[test]
fn the_lun_header_has_its_fields_where_the_text_says() {
    let image = typed(
        416,
        "
        00: 20 21 22 23 24 25 26 27 28 29 2a 2b 2c 2d 2e 2f
        10: 03 02 14 01 02 03 04 00
        18: 20 4e 00 00
        1c: d0 07 00 00
        20: 88 13 00 00
        24: e8 03 00 00
        28: 09 00 00 00 00 00 00 00
        30: 00 00 00 10 00 00 00 00
        38: 00 f1 53 65 00 00 00 00
        40: 00 00 00 00 00 00 08 00
        48: 01 00 00 00 00 00 00 00
        50: 02 00 00 00 00 00 00 00
        58: 04 00 00 00 00 00 00 00
        60: 64 73 31
        a0: 04 00 6e 61 61 2e
        e0: 00 00 00 00 00 00 00 00
        e8: 64 00 00 00 00 00 00 00
        f0: 00 00 40 00 00 00 00 00
        f8: 00 00 50 00 00 00 00 00
        100: 64 00 00 00 00 00 00 00
        108: 32 00 00 00 00 00 00 00
        110: 00 00 90 06 00 00 00 00
        118: 00 00 a0 06 00 00 00 00
        180: 07 00 00 00 00 03 00 00
        188: 40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f
        198: 00 00 90 00 00 00 00 02",
    );
    let header = LunHeader {
        lun_uuid: counted_uuid(0x20),
        lun_index: lun(3),
        state: MemberState::Active,
        block_size: BlockSize::from_bytes(1 << 20).unwrap(),
        lock_mode: LockMode::SingleMachine,
        member_count: 4,
        lease: LeaseTimes { lease_ms: 20_000, renew_ms: 2_000, margin_ms: 5_000, clock_ppm: 1_000 },
        volume_generation: 9,
        lun_bytes: 256 << 20,
        created_s: 1_700_000_000,
        root: fd(1, 0, 0),
        compatible: 1,
        read_only_compatible: 2,
        incompatible: 4,
        label: "ds1".to_owned(),
        identity: DeviceIdentity::new(b"naa."),
        segments: vec![
            Segment { first_block: 0, block_count: 100, table_offset: 4 << 20, data_offset: 5 << 20 },
            Segment { first_block: 100, block_count: 50, table_offset: 105 << 20, data_offset: 106 << 20 },
        ],
        growing: SlotRef { slot: SlotId(3), generation: Generation(7) },
        volume: Some(counted_uuid(0x40)),
        window: Some(CellAddress { lun: lun(2), offset: 9 << 20 }),
    };
    for cell in BOTH {
        assert_eq!(LunHeader::decode(cell, &image).unwrap(), header);
    }
    assert_eq!(header.encode(), image);
    let states = [
        (0, MemberState::Free),
        (1, MemberState::Joining),
        (2, MemberState::Active),
        (3, MemberState::Draining),
        (4, MemberState::Removed),
        (5, MemberState::Lost),
        (6, MemberState::Carried),
    ];
    assert!(states.iter().all(|(stored, state)| MemberState::from_stored(*stored) == Some(*state)));
    assert_eq!(MemberState::from_stored(7), None);
    assert_eq!(LockMode::from_stored(2), Some(LockMode::CompareAndWrite));
}

#[test]
fn a_member_cell_has_its_fields_where_the_text_says() {
    let image = typed(
        104,
        "
        00: 30 31 32 33 34 35 36 37 38 39 3a 3b 3c 3d 3e 3f
        10: 00 00 00 00 02 00 00 00
        18: fe 06
        20: 03 00 61 62 63
        60: 00 00 90 00 00 00 00 02",
    );
    let member = Member {
        lun_uuid: counted_uuid(0x30),
        lun_bytes: 8 << 30,
        index: lun(254),
        state: MemberState::Carried,
        identity: DeviceIdentity::new(b"abc"),
        window: Some(CellAddress { lun: lun(2), offset: 9 << 20 }),
    };
    assert_eq!(Member::decode(&image).unwrap(), member);
    assert_eq!(member.encode(), image);
}

#[test]
fn a_heartbeat_has_its_fields_where_the_text_says() {
    let image = typed(
        192,
        "
        00: 02 01 07 01 05 00 01 00
        08: 40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f
        18: 50 51 52 53 54 55 56 57 58 59 5a 5b 5c 5d 5e 5f
        28: 0a 00 00 00 80 00 00 00
        30: 88 77 66 55 44 33 22 11
        38: 2a 00 00 00 00 00 00 00
        40: 10 27 00 00
        44: e8 03 00 00
        48: b8 0b 00 00
        4c: f4 01 00 00
        50: ef be ad de 00 00 00 00
        58: 05 00 00 00 00 11 00 00
        60: 0d 00 00 00 00 00 00 00
        68: 0e 00 00 00 00 00 00 00
        70: 00 f1 53 65 00 00 00 00
        78: 61 6c 70 68 61",
    );
    let heartbeat = Heartbeat {
        state: SlotState::Breaking,
        fence_grade: FenceGrade::A,
        drop_lun: 7,
        drop_acknowledged: true,
        host: counted_uuid(0x40),
        boot: counted_uuid(0x50),
        generation: Generation(0x80_0000_000a),
        incarnation: 0x1122_3344_5566_7788,
        beat: 42,
        lease: LeaseTimes { lease_ms: 10_000, renew_ms: 1_000, margin_ms: 3_000, clock_ppm: 500 },
        reservation_key: 0xdead_beef,
        breaker: Breaker { slot: SlotRef { slot: SlotId(0x11), generation: Generation(5) }, incarnation: 13, beat: 14 },
        abilities: 1,
        live_since_s: 1_700_000_000,
        host_name: "alpha".to_owned(),
    };
    assert_eq!(Heartbeat::decode(&image).unwrap(), heartbeat);
    assert_eq!(heartbeat.encode(), image);
    let states = [SlotState::Free, SlotState::Live, SlotState::Breaking, SlotState::Dirty];
    let grades = [FenceGrade::Unknown, FenceGrade::A, FenceGrade::B, FenceGrade::C];
    for stored in 0..4u8 {
        assert_eq!(SlotState::from_stored(stored), Some(states[usize::from(stored)]));
        assert_eq!(FenceGrade::from_stored(stored), Some(grades[usize::from(stored)]));
    }
    assert_eq!((SlotState::from_stored(4), FenceGrade::from_stored(4)), (None, None));
}

#[test]
fn a_moved_cell_and_a_window_map_have_their_fields_where_the_text_says() {
    let image = typed(
        24,
        "
        00: 02 00 00 00 00 00 00 00
        08: 00 12 91 00 00 00 00 00
        10: 00 00 90 00 00 00 00 00",
    );
    let moved = Moved { carrier: lun(2), offset: 0x91_1200, window: 9 << 20 };
    assert_eq!((Moved::decode(&image).unwrap(), moved.encode()), (moved, image));
    let image = typed(
        48,
        "
        00: 01 00 02 00 03 00 00 00
        08: 00 00 00 04 00 00 00 00
        10: 00 00 10 00 00 00 00 00
        18: 00 10 30 00 00 00 00 00
        20: 00 00 50 00 00 00 00 00
        28: 00 00 10 00 00 00 00 00",
    );
    let pieces = vec![Piece { from: 1 << 20, length: 0x30_1000 }, Piece { from: 5 << 20, length: 1 << 20 }];
    let map = MapCell { lun: lun(1), lun_bytes: 64 << 20, total: 3, pieces };
    assert_eq!((MapCell::most(CellSize::B512), MapCell::most(CellSize::B4096)), (25, 249));
    for cell in BOTH {
        assert_eq!(MapCell::decode(cell, &image).unwrap(), map);
    }
    assert_eq!(map.encode(), image);
}

#[test]
fn an_arena_has_its_fields_where_the_text_says() {
    let image = typed(
        40,
        "
        00: 07 00 00 00 00 00 00 00
        08: 03 00 01 00 00 00 00 00
        10: 0c 00 00 00 00 00 00 01
        18: 0d 00 00 00 00 00 00 02
        20: 0e 00 00 00 01 00 00 03",
    );
    let arena = Arena {
        generation: Generation(7),
        anywhere: true,
        places: vec![Place::TableCell(12), Place::UnitContainer(13), Place::FdContainer(0x1_0000_000e)],
    };
    for cell in BOTH {
        assert_eq!(Arena::decode(cell, &image).unwrap(), arena);
    }
    assert_eq!(arena.encode(), image);
}

#[test]
fn a_table_cell_has_its_entries_where_the_text_says() {
    // Entry 0: file block 9 of FD 2:5:7, allocated by slot 3 at generation ..0x81. Entry 1 is being dropped and was data.
    let entries = "
        00: 07 80 02 00 00 00 10 00 09 00 00 00 01 03 81 00
        10: 07 80 02 00 00 00 10 00 0a 00 00 00 06 04 82 01
        20: 05 00 00 00 00 11 00 00 00 00 00 00 07 11 05 00";
    for (cell, count, bytes) in [(CellSize::B512, 26, 416), (CellSize::B4096, 250, 4000)] {
        let image = typed(bytes, entries);
        let table = TableCell::decode(cell, &image).unwrap();
        assert_eq!(table.entries.len(), count);
        let data = TableEntry {
            fd: 0x0010_0000_0002_8007,
            index: 9,
            kind: EntryKind::Data,
            slot: SlotId(3),
            generation_low: 0x81,
            was: EntryKind::Free,
        };
        assert_eq!(table.entries[0], data);
        let retiring = TableEntry {
            index: 10,
            kind: EntryKind::Retiring,
            slot: SlotId(4),
            generation_low: 0x82,
            was: EntryKind::Data,
            ..data
        };
        assert_eq!(table.entries[1], retiring);
        assert_eq!((table.entries[2].kind, table.entries[2].fd), (EntryKind::Quarantine, 0x1100_0000_0005));
        assert!(table.entries[3..].iter().all(|entry| *entry == TableEntry::FREE));
        assert_eq!(table.encode(), image);
    }
    let kinds = [
        EntryKind::Free,
        EntryKind::Data,
        EntryKind::Pool,
        EntryKind::Formatting,
        EntryKind::FdContainer,
        EntryKind::UnitContainer,
        EntryKind::Retiring,
        EntryKind::Quarantine,
        EntryKind::Table,
        EntryKind::Body,
        EntryKind::PointerBlock,
        EntryKind::Inner,
        EntryKind::Bucket,
        EntryKind::Gone,
        EntryKind::Window,
    ];
    for (stored, kind) in (0u8..).zip(kinds) {
        assert_eq!((EntryKind::from_stored(stored), kind as u8), (Some(kind), stored));
    }
    assert_eq!(EntryKind::from_stored(15), None);
}

#[test]
fn a_root_cell_has_its_fields_where_the_text_says() {
    // The set holds LUNs 1, 2 and 9; the body is unit 0x3a of block 5 of LUN 2, three cells.
    let image = typed(
        360,
        "
        00: 03 02 03 00 02 02 01 00
        08: 05 00 00 00 00 11 00 00
        10: 00 00 00 00 00 00 08 00
        18: 21 00 00 00 00 00 00 00
        20: 1f 00 00 00 00 00 00 00
        28: 06 00 00 00 00 12 00 00 aa 00 00 00 00 00 00 00
        38: 06 02
        58: 03 3a 50 00 00 00 00 02 78 56 34 12 44 33 22 11
        68: 07 00 00 00 00 13 00 00 bb 00 00 00 00 00 00 00
        78: 08 00 00 00 00 14 00 00 cc 00 00 00 00 00 00 00",
    );
    let holder = |slot, generation, incarnation| Holder {
        slot: SlotRef { slot: SlotId(slot), generation: Generation(generation) },
        incarnation,
    };
    let mut luns = LunSet::of(lun(1));
    luns.insert(lun(2));
    luns.insert(lun(9));
    let root = RootCell {
        state: ObjectState::Unlinking(SlotRef { slot: SlotId(0x11), generation: Generation(5) }),
        object_type: Some(ObjectType::Disk),
        flags: ObjectFlags::MULTI_WRITER | ObjectFlags::READ_ONLY_BASE,
        parent: Some(fd(1, 0, 0)),
        lock: LockRecord {
            mode: HoldMode::Shared,
            token: Token(0x21),
            holders: vec![holder(0x13, 7, 0xbb), holder(0x14, 8, 0xcc)],
            wanted: true,
        },
        unclean: Unclean { token: Token(0x1f), broken: holder(0x12, 6, 0xaa) },
        luns,
        body: Some(UnitRef {
            at: UnitAddress { lun: lun(2), block: block(5), unit: 0x3a },
            used_cells: 3,
            crc: 0x1234_5678,
            birth: 0x1122_3344,
        }),
    };
    assert_eq!(RootCell::decode(CellSize::B512, &image).unwrap(), root);
    assert_eq!(root.encode(), image);
    // Three cells are more than a unit has with 4096-byte cells.
    assert!(RootCell::decode(CellSize::B4096, &image).is_err());
    let nobody = SlotRef::NOBODY;
    let states = [
        (0, ObjectState::Free),
        (1, ObjectState::Creating(nobody)),
        (2, ObjectState::Live),
        (3, ObjectState::Unlinking(nobody)),
        (4, ObjectState::Unlinked(nobody)),
    ];
    for (stored, state) in states {
        let mut image = typed(360, "00: 00 01\n 10: 00 00 00 00 00 00 08 00");
        image[0] = stored;
        if state == ObjectState::Free {
            image = vec![0; 360];
        }
        assert_eq!(RootCell::decode(CellSize::B512, &image).unwrap().state, state);
    }
    let types = [ObjectType::File, ObjectType::Disk, ObjectType::Directory, ObjectType::Symlink, ObjectType::Rdm];
    assert!((1u8..).zip(types).all(|(stored, object_type)| ObjectType::from_stored(stored) == Some(object_type)));
    let modes = [HoldMode::Free, HoldMode::Exclusive, HoldMode::Shared, HoldMode::MultiWriter];
    assert!((0u8..).zip(modes).all(|(stored, mode)| HoldMode::from_stored(stored) == Some(mode)));
}

#[test]
fn a_free_root_cell_is_all_zeros_but_for_its_token() {
    let image = typed(360, "18: 05 00 00 00 00 00 00 00");
    assert_eq!(RootCell::decode(CellSize::B512, &image).unwrap(), RootCell::free(Token(5)));
    assert_eq!(RootCell::free(Token(5)).encode(), image);
}

fn object(lun_number: u8, container: u64, cell: u16, link: u64) -> ObjectRef {
    ObjectRef { fd: fd(lun_number, container, cell), link: Link(link) }
}
