//! Bodies, directory entries, buckets, references and pointers.

use super::{BOTH, block, counted_uuid, fd, lun, object, typed};
use vmfs_core::format::body::{Attributes, Body, Content, DiskFormat, MappingRoot, RawDevice, pack_refs};
use vmfs_core::format::dirent::{Dirent, decode_bucket, encode_bucket, name_hash};
use vmfs_core::format::header::DeviceIdentity;
use vmfs_core::format::pointer::{BlockPointer, Granules, pack_pb_reference, pointer_at, unpack_pb_reference};
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::format::unit::UnitRef;
use vmfs_core::units::{BlockAddress, CellSize, UnitAddress};

/// Mode 0640, uid 1000, gid 100, size 5, two blocks, times 1..4, name "ab"; bytes 0, 1, 2 and 64..68 are the content's.
const ATTRIBUTES: &str = "
    03: 02
    04: a0 01 00 00
    08: e8 03 00 00
    0c: 64 00 00 00
    10: 05 00 00 00 00 00 00 00
    18: 02 00 00 00 00 00 00 00
    20: 01 00 00 00 00 00 00 00
    28: 02 00 00 00 00 00 00 00
    30: 03 00 00 00 00 00 00 00
    38: fc ff ff ff ff ff ff ff
    48: 61 62";

fn attributes(disk: Option<DiskFormat>) -> Attributes {
    Attributes {
        mode: 0o640,
        uid: 1000,
        gid: 100,
        size: 5,
        blocks: 2,
        accessed_ns: 1,
        modified_ns: 2,
        changed_ns: 3,
        born_ns: -4,
        disk,
        name: b"ab".to_vec(),
    }
}

fn check(length: usize, lines: &str, disk: Option<DiskFormat>, content: Content) {
    let image = typed(length, &format!("{ATTRIBUTES}\n{lines}"));
    let body = Body { attributes: attributes(disk), content };
    for cell in BOTH {
        assert_eq!(Body::decode(cell, &image).unwrap(), body);
    }
    assert_eq!(body.encode(), image);
}

fn unit_ref(unit: u16) -> UnitRef {
    UnitRef { at: UnitAddress { lun: lun(2), block: block(5), unit }, used_cells: 2, crc: 0x1234_5678, birth: 0x10 }
}

#[test]
fn a_body_has_its_attributes_and_inline_data_where_the_text_says() {
    check(79, "00: 01\n 40: 05\n 4a: 68 65 6c 6c 6f", None, Content::Inline(b"hello".to_vec()));
}

#[test]
fn a_body_of_height_two_holds_references_to_pointer_blocks() {
    // Present, block 5, unit 0x3a, LUN 2; then a hole.
    let refs = "00: 02 02 01\n 40: 02\n 4a: 51 00 00 00 00 3a 00 02";
    let unit = UnitAddress { lun: lun(2), block: block(5), unit: 0x3a };
    let root = MappingRoot::PointerBlocks(vec![Some(unit), None]);
    check(90, refs, Some(DiskFormat::Thin), Content::Mapped(root));
    assert_eq!(DiskFormat::from_stored(2), Some(DiskFormat::ZeroedThick));
    assert_eq!(DiskFormat::from_stored(3), Some(DiskFormat::EagerZeroedThick));
    assert_eq!(pack_pb_reference(Some(unit)), 0x0200_3a00_0000_0051);
    assert_eq!(unpack_pb_reference(0x0200_3a00_0000_0051).unwrap(), Some(unit));
    assert!(unpack_pb_reference(0x0200_3a00_0000_0053).is_err(), "a pointer block is never shared");
}

#[test]
fn a_body_of_height_three_or_four_holds_references_to_inner_units() {
    for height in [3u8, 4] {
        let lines = format!("00: 02 0{height} 03\n 40: 02\n 5a: 02 3b 50 00 00 00 00 02 78 56 34 12 10 00 00 00");
        let root = MappingRoot::Inner { height, refs: vec![None, Some(unit_ref(0x3b))] };
        check(106, &lines, Some(DiskFormat::EagerZeroedThick), Content::Mapped(root));
    }
}

#[test]
fn a_symlink_and_a_raw_device_have_their_bytes_where_the_text_says() {
    check(77, "00: 03\n 40: 03\n 4a: 61 2f 62", None, Content::Symlink(b"a/b".to_vec()));
    let raw = RawDevice { identity: DeviceIdentity::new(b"naa"), physical: true };
    check(77, "00: 04 01\n 40: 03\n 4a: 6e 61 61", None, Content::Raw(raw));
}

/// A file entry `x` for FD 2:5:7 link 3, a pending directory entry `yz` for FD 1:0:9 link 4 that replaces FD 1:0:8 link 6, and a link's entry
/// `l` for FD 1:0:8 link 2 that is about to leave.
const ENTRIES: &str = "
    07 80 02 00 00 00 10 00 03 00 00 00 00 00 00 00 01 00 01 00 78
    09 00 00 00 00 00 08 00 04 00 00 00 00 00 00 00 03 01 02 00
       08 00 00 00 00 00 08 00 06 00 00 00 00 00 00 00 79 7a
    08 00 00 00 00 00 08 00 02 00 00 00 00 00 00 00 04 02 01 00 6c";

fn entries() -> Vec<Dirent> {
    let plain = Dirent {
        name: b"x".to_vec(),
        object_type: ObjectType::File,
        child: object(2, 5, 7, 3),
        pending: None,
        leaving: false,
    };
    let pending = Dirent {
        name: b"yz".to_vec(),
        object_type: ObjectType::Directory,
        child: object(1, 0, 9, 4),
        pending: Some(Some(object(1, 0, 8, 6))),
        leaving: false,
    };
    let child = object(1, 0, 8, 2);
    let leaving = Dirent { name: b"l".to_vec(), object_type: ObjectType::Symlink, child, pending: None, leaving: true };
    vec![plain, pending, leaving]
}

fn one_line(lines: &str) -> String {
    lines.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_small_directory_holds_its_entries_in_the_body() {
    let lines = format!("00: 05\n 40: 03\n 4a: {}", one_line(ENTRIES));
    check(154, &lines, None, Content::Entries(entries()));
}

#[test]
fn a_large_directory_holds_references_to_buckets() {
    let lines = "00: 06 01\n 40: 02\n 4a: 02 3b 50 00 00 00 00 02 78 56 34 12 10 00 00 00";
    check(106, lines, None, Content::Buckets { depth: 1, refs: vec![Some(unit_ref(0x3b)), None] });
    // Beyond depth 8 the body has 2^(depth - 8) references to inner units.
    check(106, "00: 06 09\n 40: 02", None, Content::Buckets { depth: 9, refs: vec![None, None] });
}

#[test]
fn a_bucket_and_an_inner_unit_have_their_bytes_where_the_text_says() {
    let image = typed(88, &format!("00: 03 00 00 00 05\n 08: {}", one_line(ENTRIES)));
    assert_eq!(decode_bucket(&image).unwrap(), (5, entries()));
    assert_eq!(encode_bucket(5, &entries()), image);
    let image = typed(32, "10: 02 3b 50 00 00 00 00 02 78 56 34 12 10 00 00 00");
    assert_eq!(pack_refs(&[None, Some(unit_ref(0x3b))]), image);
    for cell in BOTH {
        assert_eq!(UnitRef::unpack(cell, &image).unwrap(), None);
        assert_eq!(UnitRef::unpack(cell, &image[16..]).unwrap(), Some(unit_ref(0x3b)));
    }
}

#[test]
fn a_pointer_has_its_bits_where_the_text_says() {
    // Pointer 1: LUN 0x21, granules 0x8001, block 0x9_8765_4321, present. Pointer 2: shared as well.
    let payload = typed(416, "08: 11 32 54 76 98 01 80 21 03 00 00 00 00 ff ff fe");
    assert_eq!(pointer_at(&payload, 0).unwrap(), None);
    let pointer = BlockPointer {
        at: BlockAddress { lun: lun(0x21), block: block(0x9_8765_4321) },
        valid: Granules(0x8001),
        shared: false,
    };
    assert_eq!(pointer_at(&payload, 1).unwrap(), Some(pointer));
    assert_eq!(BlockPointer::pack(Some(pointer)), 0x2180_0198_7654_3211);
    let shared =
        BlockPointer { at: BlockAddress { lun: lun(254), block: block(0) }, valid: Granules::ALL, shared: true };
    assert_eq!(pointer_at(&payload, 2).unwrap(), Some(shared));
    assert_eq!(BlockPointer::pack(Some(shared)), 0xfeff_ff00_0000_0003);
    assert_eq!(BlockPointer::pack(None), 0);
    assert!(BlockPointer::unpack(0x0100_0000_0000_0005).is_err(), "bits 2 and 3 are reserved");
    assert!(Granules(0x8001).has(0) && Granules(0x8001).has(15) && !Granules(0x8001).has(1));
}

/// FNV-1a as published (isthe.com/chongo/tech/comp/fnv), then fmix64 of MurmurHash3 (smhasher): computed by hand-written code
/// outside this project.
#[test]
fn names_have_the_hashes_of_the_text() {
    for (name, hash) in [(&b"a"[..], HASH_A), (b"disk-flat.vmdk", HASH_FLAT), (&[0xff; 255], HASH_LONGEST)] {
        assert_eq!(name_hash(name), hash, "{name:?}");
    }
}

const HASH_A: u64 = 0x82a2_a958_a9be_ce5b;
const HASH_FLAT: u64 = 0x5ea7_cb37_451f_23a1;
const HASH_LONGEST: u64 = 0x1c8f_8a4b_6780_b269;

#[test]
fn numbers_are_stored_as_the_text_says() {
    assert_eq!(fd(2, 5, 7).get(), 0x0010_0000_0002_8007);
    assert_eq!(fd(254, 0xf_ffff_ffff, 0x7fff).get(), 0x07f7_ffff_ffff_ffff);
    assert_eq!(counted_uuid(0x10).to_string(), "10111213-1415-1617-1819-1a1b1c1d1e1f");
    assert!(UnitRef::unpack(CellSize::B4096, &typed(16, "00: 03 00 00 00 00 00 00 01")).is_err(), "a unit has 2 cells");
}
