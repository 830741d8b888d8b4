//! Promises of the mapping tree, against a plain map, with inner units in memory.

use std::collections::HashMap;

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::units::{BlockNo, LunIndex};

#[derive(Default)]
struct Memory {
    units: RefCell<HashMap<UnitRef, (u32, Vec<u8>)>>,
    next: std::cell::Cell<u64>,
}

impl Memory {
    fn write(&self, index: u32, stream: Option<Vec<u8>>) -> Option<UnitRef> {
        let stream = stream?;
        let number = self.next.get() + 1;
        self.next.set(number);
        let reference = UnitRef { at: unit(number), used_cells: 1, crc: 0, birth: number as u32 };
        self.units.borrow_mut().insert(reference, (index, stream));
        Some(reference)
    }
}

impl InnerSource for Memory {
    async fn read_inner(&self, reference: &UnitRef, kind: CellKind, index: u32) -> Result<Vec<u8>, FsError> {
        assert_eq!(kind, CellKind::Inner);
        let units = self.units.borrow();
        let (stored_index, stream) = &units[reference];
        assert_eq!(*stored_index, index, "an inner unit is read under the index it was written with");
        Ok(stream.clone())
    }
}

fn unit(number: u64) -> UnitAddress {
    UnitAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(number).unwrap(), unit: (number % 127) as u16 }
}

fn commit(memory: &Memory, root: &MappingRoot, changes: &BTreeMap<u32, Option<UnitAddress>>) -> MappingRoot {
    let cache = InnerCache::default();
    let tree =
        Tree { shape: Shape::new(CellSize::B512), root, source: memory, cache: &cache, name: "a test".to_owned() };
    let mut rewrite = tree.rewrite(changes).now_or_never().unwrap().unwrap();
    let before: Vec<_> = tree.inner_units().now_or_never().unwrap().unwrap();
    assert!(rewrite.dropped().iter().all(|dropped| before.contains(dropped)));
    for (index, reference) in rewrite.dropped() {
        assert_eq!(memory.units.borrow_mut().remove(reference).unwrap().0, *index);
    }
    for (leaf, stream) in rewrite.leaves() {
        rewrite.set_leaf(leaf, memory.write(leaf, stream));
    }
    for (index, stream) in rewrite.uppers() {
        let at = memory.write(index, stream);
        rewrite.set_upper(index, at);
    }
    rewrite.root()
}

fn pb() -> impl Strategy<Value = u32> {
    let three = Shape::new(CellSize::B512).capacity(3) as u32;
    prop_oneof![4 => 0..700u32, 2 => 500..3000u32, 1 => 200_000..three, 1 => three - 5..three + 900_000]
}

proptest! {
    #[test]
    fn a_tree_of_any_height_says_what_a_map_says_and_leaks_no_unit(
        batches in prop::collection::vec(prop::collection::btree_map(pb(), prop::option::weighted(0.7, 1..1000u64), 1..12), 1..8),
    ) {
        let memory = Memory::default();
        let mut root = MappingRoot::PointerBlocks(Vec::new());
        let mut model = BTreeMap::new();
        for batch in batches {
            let changes: BTreeMap<_, _> = batch.into_iter().map(|(pb, at)| (pb, at.map(unit))).collect();
            root = commit(&memory, &root, &changes);
            for (pb, at) in changes {
                match at {
                    Some(at) => drop(model.insert(pb, at)),
                    None => drop(model.remove(&pb)),
                }
            }
        }
        let cache = InnerCache::default();
        let shape = Shape::new(CellSize::B512);
        let tree = Tree { shape, root: &root, source: &memory, cache: &cache, name: "a test".to_owned() };
        let mut found = BTreeMap::new();
        let mut from = 0;
        while let Some((pb, at)) = tree.next_attached(from).now_or_never().unwrap().unwrap() {
            found.insert(pb, at);
            from = pb + 1;
        }
        prop_assert_eq!(&found, &model);
        for pb in model.keys().copied().chain([0, 511, 512, 831, 832, 212_991, 212_992]) {
            prop_assert_eq!(tree.find(pb).now_or_never().unwrap().unwrap(), model.get(&pb).copied());
        }
        let reachable = tree.inner_units().now_or_never().unwrap().unwrap().len();
        prop_assert_eq!(memory.units.borrow().len(), reachable);
    }

    #[test]
    fn any_bytes_are_an_inner_unit_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let shape = Shape::new(CellSize::B512);
        let _ = (Inner::decode_leaf(shape, &bytes), Inner::decode_upper(shape, &bytes));
    }
}

#[test]
fn disks_of_any_size_have_their_height_from_the_start() {
    let (small, shape) = (BlockSize::from_shift(16).unwrap(), Shape::new(CellSize::B512));
    let disk = 62u64 << 40;
    assert_eq!(height(&shape.empty_root(1 << 30, BlockSize::DEFAULT)), 2);
    assert_eq!(height(&shape.empty_root(disk, BlockSize::DEFAULT)), 3);
    assert_eq!(height(&shape.empty_root(disk, small)), 4);
    assert_eq!(height(&Shape::new(CellSize::B4096).empty_root(disk, small)), 4);
    assert!(shape.capacity(4) * shape.per_pb() >= MAX_FILE_BLOCKS);
}

#[test]
fn a_pointer_has_one_place_and_places_are_dense() {
    for cell in [CellSize::B512, CellSize::B4096] {
        let shape = Shape::new(cell);
        let mut expected = PointerPlace { pb: 0, cell: 0, nth: 0 };
        for block in 0..3 * shape.per_pb() {
            assert_eq!(shape.place(block), expected);
            expected.nth += 1;
            if expected.nth as u64 == shape.per_cell() {
                (expected.nth, expected.cell) = (0, expected.cell + 1);
            }
            if expected.cell == cell.cells_per_unit() {
                (expected.cell, expected.pb) = (0, expected.pb + 1);
            }
        }
    }
}
