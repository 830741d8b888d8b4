//! Every structure of the format decodes to what was encoded, and no bytes make a decoder panic.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use vmfs_core::format::arena::{Arena, Place};
use vmfs_core::format::body::{Attributes, Body, Content, DiskFormat, MappingRoot, RawDevice, bucket_refs};
use vmfs_core::format::cell::probe;
use vmfs_core::format::dirent::{
    Dirent, ObjectRef, decode_bucket, decode_entries, encode_bucket, encode_entries, is_name,
};
use vmfs_core::format::header::{DeviceIdentity, LeaseTimes, LockMode, LunHeader, MemberState};
use vmfs_core::format::heartbeat::{Breaker, FenceGrade, Heartbeat, SlotState};
use vmfs_core::format::layout::{LunLayout, Segment, roots_per_container};
use vmfs_core::format::member::Member;
use vmfs_core::format::moved::{MapCell, Moved, Piece};
use vmfs_core::format::pointer::{
    BlockPointer, Granules, pack_pb_reference, pointer_at, stored_at, unpack_pb_reference,
};
use vmfs_core::format::root_cell::{
    HoldMode, Holder, LockRecord, LunSet, MAX_HOLDERS, ObjectFlags, ObjectState, ObjectType, RootCell, Unclean,
};
use vmfs_core::format::table_entry::{EntryKind, TableCell, TableEntry};
use vmfs_core::format::unit::UnitRef;
use vmfs_core::format::{Cell, CellContext, CellHeader, CellKind, HEADER_BYTES};
use vmfs_core::units::{
    BlockAddress, BlockNo, BlockSize, CellAddress, CellSize, FdId, Generation, Link, LunIndex, OpId, Seq, SlotId,
    SlotRef, Token, UnitAddress, Uuid,
};

fn cell_size() -> impl Strategy<Value = CellSize> {
    prop_oneof![Just(CellSize::B512), Just(CellSize::B4096)]
}

fn block_size() -> impl Strategy<Value = BlockSize> {
    (16u8..=24).prop_map(|shift| BlockSize::from_shift(shift).unwrap())
}

fn lun() -> impl Strategy<Value = LunIndex> {
    (1u8..=254).prop_map(|n| LunIndex::new(n).unwrap())
}

fn block() -> impl Strategy<Value = BlockNo> {
    (0u64..1 << BlockNo::BITS).prop_map(|n| BlockNo::new(n).unwrap())
}

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<[u8; 16]>().prop_map(Uuid)
}

fn slot_ref() -> impl Strategy<Value = SlotRef> {
    (any::<u8>(), 0u64..1 << Generation::BITS)
        .prop_map(|(slot, generation)| SlotRef { slot: SlotId(slot), generation: Generation(generation) })
}

fn fd() -> impl Strategy<Value = FdId> {
    (lun(), block(), 0u16..1 << 15).prop_map(|(lun, block, cell)| FdId::new(BlockAddress { lun, block }, cell).unwrap())
}

fn unit() -> impl Strategy<Value = UnitAddress> {
    (lun(), block(), 0u16..2048).prop_map(|(lun, block, unit)| UnitAddress { lun, block, unit })
}

fn unit_ref(cell: CellSize) -> impl Strategy<Value = UnitRef> {
    (unit(), 1..=cell.cells_per_unit() as u8, any::<u32>(), any::<u32>())
        .prop_map(|(at, used_cells, crc, birth)| UnitRef { at, used_cells, crc, birth })
}

fn identity() -> impl Strategy<Value = DeviceIdentity> {
    vec(any::<u8>(), 0..=DeviceIdentity::MAX).prop_map(|bytes| DeviceIdentity::new(&bytes))
}

fn lease() -> impl Strategy<Value = LeaseTimes> {
    any::<[u32; 4]>().prop_map(|[lease_ms, renew_ms, margin_ms, clock_ppm]| LeaseTimes {
        lease_ms,
        renew_ms,
        margin_ms,
        clock_ppm,
    })
}

fn stored<T: Copy + std::fmt::Debug>(
    range: std::ops::RangeInclusive<u8>,
    from: fn(u8) -> Option<T>,
) -> impl Strategy<Value = T> {
    range.prop_map(move |number| from(number).unwrap())
}

fn member_state() -> impl Strategy<Value = MemberState> {
    stored(0..=6, MemberState::from_stored)
}

fn object_type() -> impl Strategy<Value = ObjectType> {
    stored(1..=5, ObjectType::from_stored)
}

fn cell_header() -> impl Strategy<Value = CellHeader> {
    (
        (stored(1..=12, CellKind::from_stored), lun(), 0u64..1 << 44, any::<u64>(), any::<[u8; 16]>()),
        (slot_ref(), option::of(fd()), any::<u64>(), any::<u32>(), any::<u64>()),
    )
        .prop_map(|((kind, lun, cell, seq, op_id), (writer, owner, link, index, token))| CellHeader {
            kind,
            address: CellAddress { lun, offset: cell << 12 },
            seq: Seq(seq),
            op_id: OpId(op_id),
            writer,
            owner,
            link: Link(link),
            index,
            token: Token(token),
        })
}

/// Of half of all seeds none.
fn window_at(seed: u64) -> Option<CellAddress> {
    let offset = seed >> 8 & ((1 << 56) - 4096) & !4095;
    LunIndex::new(seed as u8).filter(|_| seed & 256 != 0 && offset != 0).map(|lun| CellAddress { lun, offset })
}

fn pieces(seeds: &[(u32, u16)]) -> Vec<Piece> {
    let each = seeds
        .iter()
        .map(|(from, length)| Piece { from: u64::from(*from) * 4096, length: (u64::from(*length) + 1) * 4096 });
    each.collect()
}

fn lun_header() -> impl Strategy<Value = (CellSize, LunHeader)> {
    (
        (cell_size(), block_size(), uuid(), lun(), member_state(), stored(1..=2, LockMode::from_stored)),
        (64u64 << 20..64 << 40, any::<u16>(), lease(), any::<u64>(), any::<u64>(), fd(), any::<[u64; 3]>()),
        ("\\PC{0,16}", identity(), 0u64..1 << 40, slot_ref(), uuid()),
    )
        .prop_map(
            |(
                (cell, block_size, lun_uuid, lun_index, state, lock_mode),
                numbers,
                (label, identity, grown, growing, volume),
            )| {
                let (bytes, member_count, lease, volume_generation, created_s, root, features) = numbers;
                let bytes = bytes - bytes % 4096;
                let first = Segment::whole_lun(bytes, cell, block_size).unwrap();
                let table = first.end(block_size).next_multiple_of(4096);
                let lun_bytes = bytes + grown - grown % 4096;
                let second = Segment::covering(first.block_count, table, lun_bytes, cell, block_size);
                let header = LunHeader {
                    lun_uuid,
                    lun_index,
                    state,
                    block_size,
                    lock_mode,
                    member_count,
                    lease,
                    volume_generation,
                    lun_bytes,
                    created_s,
                    root,
                    compatible: features[0],
                    read_only_compatible: features[1],
                    incompatible: features[2],
                    label,
                    identity,
                    segments: [Some(first), second].into_iter().flatten().collect(),
                    growing,
                    volume: Some(volume).filter(|volume| *volume != Uuid::default()),
                    window: window_at(features[0]),
                };
                (cell, header)
            },
        )
}

fn heartbeat() -> impl Strategy<Value = Heartbeat> {
    (
        (stored(0..=3, SlotState::from_stored), stored(0..=3, FenceGrade::from_stored), any::<u8>(), any::<bool>()),
        (uuid(), uuid(), slot_ref(), any::<[u64; 5]>(), lease(), slot_ref(), "[a-z0-9.]{0,72}"),
    )
        .prop_map(|((state, fence_grade, drop_lun, drop_acknowledged), rest)| {
            let (host, boot, own, numbers, lease, breaker, host_name) = rest;
            Heartbeat {
                state,
                fence_grade,
                drop_lun,
                drop_acknowledged,
                host,
                boot,
                generation: own.generation,
                incarnation: numbers[0],
                beat: numbers[1],
                lease,
                reservation_key: numbers[2],
                breaker: Breaker { slot: breaker, incarnation: numbers[3], beat: numbers[4] },
                abilities: numbers[1] as u16,
                live_since_s: numbers[0] >> 3,
                host_name,
            }
        })
}

fn place() -> impl Strategy<Value = Place> {
    (0u8..3, 0u64..1 << 56).prop_map(|(kind, number)| match kind {
        0 => Place::TableCell(number),
        1 => Place::UnitContainer(number),
        _ => Place::FdContainer(number),
    })
}

fn table_entry() -> impl Strategy<Value = TableEntry> {
    let kind = || stored(0..=14, EntryKind::from_stored);
    (any::<u64>(), any::<u32>(), kind(), any::<u8>(), any::<u8>(), kind()).prop_map(
        |(fd, index, kind, slot, generation_low, was)| TableEntry {
            fd,
            index,
            kind,
            slot: SlotId(slot),
            generation_low,
            was,
        },
    )
}

fn holder() -> impl Strategy<Value = Holder> {
    (slot_ref(), any::<u64>()).prop_map(|(slot, incarnation)| Holder { slot, incarnation })
}

fn lock_record() -> impl Strategy<Value = LockRecord> {
    (stored(0..=3, HoldMode::from_stored), vec(holder(), 1..=MAX_HOLDERS), any::<u64>(), any::<bool>()).prop_map(
        |(mode, mut holders, token, wanted)| {
            match mode {
                HoldMode::Free => holders.clear(),
                HoldMode::Exclusive => holders.truncate(1),
                HoldMode::Shared | HoldMode::MultiWriter => {}
            }
            LockRecord { mode, token: Token(token), holders, wanted }
        },
    )
}

fn root_cell(cell: CellSize) -> impl Strategy<Value = RootCell> {
    let state = (0u8..5, slot_ref()).prop_map(|(state, by)| match state {
        0 => ObjectState::Free,
        1 => ObjectState::Creating(by),
        2 => ObjectState::Live,
        3 => ObjectState::Unlinking(by),
        _ => ObjectState::Unlinked(by),
    });
    (
        (state, object_type(), 0u16..4, fd(), lock_record()),
        (any::<u64>(), holder(), any::<[u8; 32]>(), option::of(unit_ref(cell))),
    )
        .prop_map(|((state, object_type, flags, parent, lock), (unclean, broken, luns, body))| {
            let object = state != ObjectState::Free;
            RootCell {
                state,
                object_type: object.then_some(object_type),
                flags: ObjectFlags::from_bits(flags).unwrap(),
                parent: object.then_some(parent),
                lock,
                unclean: Unclean { token: Token(unclean), broken },
                luns: LunSet(luns),
                body,
            }
        })
}

fn object_ref() -> impl Strategy<Value = ObjectRef> {
    (fd(), any::<u64>()).prop_map(|(fd, link)| ObjectRef { fd, link: Link(link) })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_map(|byte| if matches!(byte, 0 | b'/') { 0xff } else { byte });
    vec(byte, 1..=255).prop_filter("neither . nor ..", |bytes| is_name(bytes))
}

fn short_name() -> impl Strategy<Value = Vec<u8>> {
    vec(b'a'..=b'z', 1..=20)
}

fn dirent(name: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Dirent> {
    (name, object_type(), object_ref(), option::of(option::of(object_ref())), any::<bool>()).prop_map(
        |(name, object_type, child, pending, leaving)| {
            let leaving = leaving && pending.is_none();
            Dirent { name, object_type, child, pending, leaving }
        },
    )
}

fn attributes() -> impl Strategy<Value = Attributes> {
    (
        (0u32..0o10000, any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<[i64; 4]>()),
        option::of(stored(1..=3, DiskFormat::from_stored)),
        vec(any::<u8>(), 0..=255),
    )
        .prop_map(|((mode, uid, gid, size, blocks, times), disk, name)| Attributes {
            mode,
            uid,
            gid,
            size,
            blocks,
            accessed_ns: times[0],
            modified_ns: times[1],
            changed_ns: times[2],
            born_ns: times[3],
            disk,
            name,
        })
}

fn content(cell: CellSize) -> impl Strategy<Value = Content> {
    prop_oneof![
        vec(any::<u8>(), 0..=300).prop_map(Content::Inline),
        vec(option::of(unit()), 0..=512).prop_map(|refs| Content::Mapped(MappingRoot::PointerBlocks(refs))),
        (3u8..=4, vec(option::of(unit_ref(cell)), 0..=256))
            .prop_map(|(height, refs)| Content::Mapped(MappingRoot::Inner { height, refs })),
        vec(any::<u8>(), 1..=4095).prop_map(Content::Symlink),
        (identity(), any::<bool>()).prop_map(|(identity, physical)| Content::Raw(RawDevice { identity, physical })),
        vec(dirent(short_name()), 0..=20).prop_map(Content::Entries),
        (0u8..=16, vec(option::of(unit_ref(cell)), 256)).prop_map(|(depth, mut refs)| {
            refs.truncate(bucket_refs(depth));
            Content::Buckets { depth, refs }
        }),
    ]
}

fn sized_root_cell() -> impl Strategy<Value = (CellSize, RootCell)> {
    cell_size().prop_flat_map(|cell| (Just(cell), root_cell(cell)))
}

fn body() -> impl Strategy<Value = (CellSize, Body)> {
    cell_size().prop_flat_map(|cell| {
        (Just(cell), attributes(), content(cell))
            .prop_map(|(cell, attributes, content)| (cell, Body { attributes, content }))
    })
}

/// Numbers near the powers of two, where sums overflow.
fn edge() -> impl Strategy<Value = u64> {
    (0u32..64, -4096i64..=4096).prop_map(|(shift, by)| (1u64 << shift).wrapping_add_signed(by))
}

/// A payload as a cell gives it back: with zeros behind what was encoded.
fn padded(cell: CellSize, mut payload: Vec<u8>) -> Vec<u8> {
    assert!(payload.len() <= cell.payload(), "a payload of {} bytes fits no cell", payload.len());
    payload.resize(cell.payload(), 0);
    payload
}

proptest! {
    #[test]
    fn a_cell_decodes_to_what_was_encoded_and_only_where_it_belongs(
        header in cell_header(), cell_size in cell_size(), volume in uuid(), payload in vec(any::<u8>(), 0..=416),
        flip in any::<usize>(), bit in 0u8..8,
    ) {
        let context = CellContext { volume, cell_size };
        let cell = Cell::encode(&context, header, &payload);
        let back = Cell::decode(&context, header.address, cell.image()).unwrap();
        prop_assert_eq!(back.header(), &header);
        prop_assert_eq!(&back.payload()[..payload.len()], &payload[..]);
        prop_assert_eq!(&back, &cell);
        let mut bytes = cell.image().to_vec();
        bytes.resize(4096, 0);
        prop_assert_eq!(probe(header.address.offset, &bytes).unwrap(), (context, header.address.lun));

        let elsewhere = CellAddress { offset: header.address.offset ^ 4096, ..header.address };
        prop_assert!(Cell::decode(&context, elsewhere, cell.image()).is_err());
        let other = CellContext { volume: Uuid([volume.0[0] ^ 1; 16]), cell_size };
        prop_assert!(other.volume == volume || Cell::decode(&other, header.address, cell.image()).is_err());
        let mut flipped = cell.image().to_vec();
        let at = flip % flipped.len();
        flipped[at] ^= 1 << bit;
        prop_assert!(Cell::decode(&context, header.address, &flipped).is_err());
    }

    #[test]
    fn a_lun_header_decodes_to_what_was_encoded((cell, header) in lun_header()) {
        let payload = padded(cell, header.encode());
        prop_assert_eq!(LunHeader::decode(cell, &payload).unwrap(), header);
    }

    #[test]
    fn a_member_decodes_to_what_was_encoded(
        lun_uuid in uuid(), lun_bytes: u64, index in lun(), state in member_state(), identity in identity(), seed: u64,
    ) {
        let member = Member { lun_uuid, lun_bytes, index, state, identity, window: window_at(seed) };
        prop_assert_eq!(Member::decode(&padded(CellSize::B512, member.encode())).unwrap(), member);
    }

    #[test]
    fn a_moved_cell_and_a_window_map_decode_to_what_was_encoded(
        lun in lun(), cell in cell_size(), window in 1u64..1 << 40, beyond in 1u64..1 << 40, total: u32,
        seeds in vec(any::<(u32, u16)>(), 0..=25),
    ) {
        let moved = Moved { carrier: lun, offset: window + beyond, window };
        prop_assert_eq!(Moved::decode(&padded(cell, moved.encode())).unwrap(), moved);
        let map = MapCell { lun, lun_bytes: 1 << 45, total, pieces: pieces(&seeds) };
        prop_assert_eq!(MapCell::decode(cell, &padded(cell, map.encode())).unwrap(), map);
    }

    #[test]
    fn a_heartbeat_decodes_to_what_was_encoded(heartbeat in heartbeat()) {
        prop_assert_eq!(Heartbeat::decode(&padded(CellSize::B512, heartbeat.encode())).unwrap(), heartbeat);
    }

    #[test]
    fn a_host_name_of_any_length_is_cut_at_a_character(host_name in "\\PC{0,80}") {
        let beat = Heartbeat { host_name: host_name.clone(), ..Heartbeat::free() };
        let back = Heartbeat::decode(&padded(CellSize::B512, beat.encode())).unwrap();
        prop_assert!(host_name.starts_with(&back.host_name));
        prop_assert!(back.host_name.len() + 4 > host_name.len().min(72));
    }

    #[test]
    fn an_arena_decodes_to_what_was_encoded(
        cell in cell_size(), slot in slot_ref(), anywhere: bool, mut places in vec(place(), 0..=498),
    ) {
        places.truncate(Arena::capacity(cell));
        let arena = Arena { generation: slot.generation, anywhere, places };
        prop_assert_eq!(Arena::decode(cell, &padded(cell, arena.encode())).unwrap(), arena);
    }

    #[test]
    fn a_table_cell_decodes_to_what_was_encoded(cell in cell_size(), entries in vec(table_entry(), 250)) {
        let mut table = TableCell { entries };
        table.entries.truncate(TableCell::free(cell).entries.len());
        prop_assert_eq!(TableCell::decode(cell, &padded(cell, table.encode())).unwrap(), table);
    }

    #[test]
    fn a_root_cell_decodes_to_what_was_encoded((cell, root) in sized_root_cell()) {
        prop_assert_eq!(RootCell::decode(cell, &padded(cell, root.encode())).unwrap(), root);
    }

    #[test]
    fn a_body_decodes_to_what_was_encoded_also_with_zeros_behind_it((cell, body) in body(), zeros in 0usize..500) {
        let mut stream = body.encode();
        stream.resize(stream.len() + zeros, 0);
        prop_assert_eq!(Body::decode(cell, &stream).unwrap(), body);
    }

    #[test]
    fn directory_entries_decode_to_what_was_encoded(entries in vec(dirent(name()), 0..40), depth in 0u8..=16) {
        let lengths: usize = entries.iter().map(Dirent::encoded_len).sum();
        let mut stream = encode_entries(&entries);
        prop_assert_eq!(stream.len(), lengths);
        stream.resize(lengths + 100, 0);
        prop_assert_eq!(&decode_entries(&stream, entries.len()).unwrap(), &entries);
        prop_assert_eq!(decode_bucket(&encode_bucket(depth, &entries)).unwrap(), (depth, entries));
    }

    #[test]
    fn references_decode_to_what_was_encoded(
        (cell, reference) in cell_size().prop_flat_map(|cell| (Just(cell), unit_ref(cell))),
        lun in lun(), block in block(), granules: u16, shared: bool, unit in option::of(unit()),
    ) {
        prop_assert_eq!(UnitRef::unpack(cell, &UnitRef::pack(Some(reference))).unwrap(), Some(reference));
        prop_assert_eq!(UnitRef::unpack(cell, &UnitRef::pack(None)).unwrap(), None);
        let pointer = BlockPointer { at: BlockAddress { lun, block }, valid: Granules(granules), shared };
        prop_assert_eq!(BlockPointer::unpack(BlockPointer::pack(Some(pointer))).unwrap(), Some(pointer));
        prop_assert_eq!(unpack_pb_reference(pack_pb_reference(unit)).unwrap(), unit);
    }

    #[test]
    fn stored_numbers_decode_to_what_was_encoded(slot in slot_ref(), fd in fd(), lun in lun(), offset in 0u64..1 << 56) {
        prop_assert_eq!(SlotRef::unpack(slot.pack()), Some(slot));
        prop_assert_eq!(FdId::from_stored(fd.get()), Some(fd));
        prop_assert_eq!(FdId::new(fd.container(), fd.cell()), Some(fd));
        let at = CellAddress { lun, offset };
        prop_assert_eq!(CellAddress::unpack(at.pack()), Some(at));
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in vec(any::<u8>(), 0..700), cell in cell_size(), nth in 0usize..600) {
        let context = CellContext { volume: Uuid([0; 16]), cell_size: cell };
        let at = CellAddress { lun: LunIndex::new(1).unwrap(), offset: 0 };
        let _ = (Cell::decode(&context, at, &bytes), probe(0, &bytes));
        let _ = (LunHeader::decode(cell, &bytes), Member::decode(&bytes), Heartbeat::decode(&bytes));
        let _ = (Arena::decode(cell, &bytes), TableCell::decode(cell, &bytes), RootCell::decode(cell, &bytes));
        let _ = (Body::decode(cell, &bytes), decode_bucket(&bytes), decode_entries(&bytes, nth));
        let _ = (UnitRef::unpack(cell, &bytes), pointer_at(&bytes, nth), stored_at(&bytes, nth, "bytes"));
        let _ = (DeviceIdentity::new(&bytes), is_name(&bytes));
        let _ = (Moved::decode(&bytes), MapCell::decode(cell, &bytes));
    }

    /// Bytes that get past the first checks: a good structure with a few bytes replaced.
    #[test]
    fn no_damage_to_a_structure_makes_its_decoder_panic(
        (cell, header) in lun_header(), beat in heartbeat(), (size, root) in sized_root_cell(),
        (body_size, body) in body(), entries in vec(dirent(short_name()), 0..10),
        damage in vec((any::<usize>(), any::<u8>()), 1..6),
    ) {
        let damaged = |mut bytes: Vec<u8>| {
            for (at, value) in &damage {
                let length = bytes.len();
                bytes[at % length] = *value;
            }
            bytes
        };
        let _ = LunHeader::decode(cell, &damaged(padded(cell, header.encode())));
        let _ = Heartbeat::decode(&damaged(padded(CellSize::B512, beat.encode())));
        let _ = RootCell::decode(size, &damaged(padded(size, root.encode())));
        let _ = Body::decode(body_size, &damaged(body.encode()));
        let _ = decode_bucket(&damaged(encode_bucket(3, &entries)));
    }

    /// Geometry is the one structure whose fields are added up: whatever they are, decoding refuses it or every address fits.
    #[test]
    fn no_geometry_makes_a_header_or_its_layout_panic(
        (cell, mut header) in lun_header(), lun_bytes in edge(), segments in vec((edge(), edge(), edge(), edge()), 1..=5),
        keep in 0usize..3, block: u64,
    ) {
        if keep != 0 {
            header.lun_bytes = lun_bytes;
        }
        let wild = segments.into_iter().map(|(first_block, block_count, table_offset, data_offset)| Segment {
            first_block,
            block_count,
            table_offset,
            data_offset,
        });
        header.segments.truncate(keep);
        header.segments.extend(wild);
        header.segments.truncate(5);
        if let Ok(back) = LunHeader::decode(cell, &padded(cell, header.encode())) {
            let layout =
                LunLayout { lun: back.lun_index, cell_size: cell, block_size: back.block_size, segments: back.segments };
            let count = layout.block_count();
            prop_assert!(count <= 1 << 36);
            let end = layout.block_offset(BlockNo::new(block % count).unwrap()).unwrap() + layout.block_size.bytes();
            prop_assert!(end <= back.lun_bytes);
            prop_assert!(layout.table_cell(layout.table_cell_count()).is_none());
        }
    }

    #[test]
    fn any_stored_number_decodes_or_is_refused(number: u64) {
        let _ = (BlockPointer::unpack(number), unpack_pb_reference(number), CellAddress::unpack(number));
        let _ = (SlotRef::unpack(number), FdId::from_stored(number));
    }

    /// A layout made from any header that decodes gives addresses within the LUN, and its tables and blocks never overlap.
    #[test]
    fn a_layout_never_leaves_its_lun(
        bytes in 64u64 << 20..64 << 40, cell_size in cell_size(), block_size in block_size(), lun in lun(),
        pick in any::<[u64; 2]>(),
    ) {
        let Some(segment) = Segment::whole_lun(bytes, cell_size, block_size) else { return Ok(()) };
        let layout = LunLayout { lun, cell_size, block_size, segments: vec![segment] };
        prop_assert!(segment.end(block_size) <= bytes);
        let block = BlockNo::new(pick[0] % layout.block_count()).unwrap();
        let offset = layout.block_offset(block).unwrap();
        prop_assert!(offset.is_multiple_of(block_size.bytes()) && offset + block_size.bytes() <= bytes);
        let (table, nth) = layout.table_entry(block).unwrap();
        prop_assert!(table.offset + cell_size.bytes() as u64 <= segment.data_offset);
        prop_assert!((nth + 1) * 16 + HEADER_BYTES <= cell_size.bytes());
        let cell = pick[1] % roots_per_container(cell_size, block_size);
        let fd = FdId::new(BlockAddress { lun, block }, cell as u16).unwrap();
        let root = layout.root_cell(fd).unwrap().offset;
        prop_assert!(root >= offset && root + cell_size.bytes() as u64 <= offset + block_size.bytes());
        let beyond = BlockNo::new(layout.block_count()).unwrap();
        prop_assert!(layout.block_offset(beyond).is_none() && layout.table_entry(beyond).is_none());
    }
}
