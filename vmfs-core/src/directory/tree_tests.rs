//! The tree against a map, over units in memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::format::dirent::{ObjectRef, decode_bucket};
use crate::format::root_cell::ObjectType;
use crate::format::unit::UNIT_REF_BYTES;
use crate::units::{BlockAddress, BlockNo, FdId, Link, LunIndex, UnitAddress};

/// Units of one directory; refuses a unit that is read under another place than it was stored under.
#[derive(Default)]
struct Store {
    cells: RefCell<HashMap<UnitRef, (UnitPlace, Vec<u8>)>>,
    next: std::cell::Cell<u32>,
}

impl Store {
    fn put(&self, place: UnitPlace, stream: Vec<u8>) -> UnitRef {
        let nth = self.next.get();
        self.next.set(nth + 1);
        let at = UnitAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(nth.into()).unwrap(), unit: 5 };
        let reference = UnitRef { at, used_cells: 1, crc: nth, birth: 0 };
        self.cells.borrow_mut().insert(reference, (place, stream));
        reference
    }

    fn get(&self, reference: &UnitRef, place: UnitPlace) -> Vec<u8> {
        let (stored, stream) = self.cells.borrow()[reference].clone();
        assert_eq!(stored, place);
        stream
    }

    /// Applies edits and stores what is new.
    fn commit(&self, cell: CellSize, content: &Content, edits: &[Edit]) -> Result<(Content, i64), FsError> {
        let (content, dropped, growth) = match change(self, cell, content, edits).now_or_never().unwrap()? {
            Changed::Small { content, dropped, growth } => (content, dropped, growth),
            Changed::Large(mut plan) => {
                let store = |(index, stream): (u32, Vec<u8>), kind: fn(u32) -> UnitPlace| {
                    assert!(stream.len() <= unit_payload(cell));
                    self.put(kind(index), stream)
                };
                let buckets: Vec<_> = plan.buckets().into_iter().map(|b| store(b, UnitPlace::Bucket)).collect();
                let inners: Vec<_> = plan.inners(&buckets).into_iter().map(|i| store(i, UnitPlace::Inner)).collect();
                plan.content(&inners)
            }
        };
        for (place, reference) in dropped {
            assert_eq!(
                self.cells.borrow_mut().remove(&reference).map(|(p, _)| p),
                Some(place),
                "dropped twice or never stored"
            );
        }
        Ok((content, growth))
    }

    fn names(&self, content: &Content, from: u16) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        walk(self, content, from, |set| {
            names.extend(set.entries().iter().map(|e| e.name.clone()));
            true
        })
        .now_or_never()
        .unwrap()
        .unwrap();
        names
    }
}

impl Source for Store {
    async fn bucket(&self, reference: &UnitRef, index: u32) -> Result<Rc<Bucket>, FsError> {
        let (local_depth, entries) = decode_bucket(&self.get(reference, UnitPlace::Bucket(index))).unwrap();
        Ok(Rc::new(Bucket { local_depth, names: NameSet::new(entries).unwrap() }))
    }

    async fn inner(&self, reference: &UnitRef, index: u32) -> Result<Rc<Vec<Option<UnitRef>>>, FsError> {
        let stream = self.get(reference, UnitPlace::Inner(index));
        let refs = stream.chunks(UNIT_REF_BYTES).map(|b| UnitRef::unpack(CellSize::B512, b).unwrap());
        Ok(Rc::new(refs.collect()))
    }

    fn corrupt(&self, cause: FormatError) -> FsError {
        FsError::Corrupt { structure: "test".into(), cause }
    }
}

fn entry(name: &[u8], link: u64) -> Dirent {
    let container = BlockAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(7).unwrap() };
    let child = ObjectRef { fd: FdId::new(container, 3).unwrap(), link: Link(link) };
    Dirent { name: name.to_vec(), object_type: ObjectType::File, child, pending: None, leaving: false }
}

fn long_name(n: u32) -> Vec<u8> {
    let mut name = format!("{n:08x}").into_bytes();
    name.resize(250, b'x');
    name
}

fn check_all(store: &Store, content: &Content, model: &BTreeMap<Vec<u8>, u64>) {
    let listed = store.names(content, 0);
    assert!(listed.is_sorted_by_key(|n| (name_hash(n), n.clone())));
    assert_eq!(listed.iter().cloned().collect::<std::collections::BTreeSet<_>>(), model.keys().cloned().collect());
    assert_eq!(listed.len(), model.len());
    for (name, link) in model {
        let found = find(store, content, name).now_or_never().unwrap().unwrap();
        assert_eq!(found.map(|e| e.child.link.0), Some(*link));
    }
    assert_eq!(is_empty(content), model.is_empty());
}

#[test]
fn a_directory_that_grew_past_one_level_of_references_finds_every_name_and_empties_to_nothing() {
    let (store, cell) = (Store::default(), CellSize::B512);
    let (mut content, mut model) = (Content::Entries(Vec::new()), BTreeMap::new());
    for round in 0..200u32 {
        let edits: Vec<_> = (0..60).map(|n| Edit::Set(entry(&long_name(round * 60 + n), 9))).collect();
        model.extend(edits.iter().map(|e| (e.name().to_vec(), 9)));
        let (after, growth) = store.commit(cell, &content, &edits).unwrap();
        assert_eq!(growth, 60);
        content = after;
    }
    assert!(
        matches!(content, Content::Buckets { depth, .. } if depth > DIRECT_DEPTH),
        "this many names need inner units"
    );
    check_all(&store, &content, &model);
    let names: Vec<_> = model.keys().cloned().collect();
    for batch in names.chunks(700) {
        let edits: Vec<_> = batch.iter().map(|n| Edit::Remove(n.clone())).collect();
        let (after, growth) = store.commit(cell, &content, &edits).unwrap();
        assert_eq!(growth, -(batch.len() as i64));
        batch.iter().for_each(|n| assert!(model.remove(n).is_some()));
        content = after;
    }
    check_all(&store, &content, &model);
    assert_eq!(content, Content::Entries(Vec::new()));
    assert!(store.cells.borrow().is_empty(), "every unit was given back");
}

#[test]
fn a_slot_beyond_the_start_lists_only_what_can_come_behind_it() {
    let store = Store::default();
    let edits: Vec<_> = (0..400).map(|n| Edit::Set(entry(&long_name(n), 1))).collect();
    let (content, _) = store.commit(CellSize::B4096, &Content::Entries(Vec::new()), &edits).unwrap();
    let all = store.names(&content, 0);
    for from in [1u16, 0x7fff, 0x8000, 0xfffe] {
        let rest = store.names(&content, from);
        assert!(all.ends_with(&rest));
        let missing = &all[..all.len() - rest.len()];
        assert!(missing.iter().all(|n| (name_hash(n) >> 48) < u64::from(from)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_sequence_of_changes_gives_the_names_of_a_map(
        steps in prop::collection::vec(prop::collection::vec((0u32..300, 0u8..4, 1u64..100), 1..20), 1..60), large: bool,
    ) {
        let (store, cell) = (Store::default(), if large { CellSize::B4096 } else { CellSize::B512 });
        let (mut content, mut model) = (Content::Entries(Vec::new()), BTreeMap::new());
        for step in steps {
            let edits: Vec<_> = step.iter().map(|(n, what, link)| {
                let name = long_name(*n);
                if *what == 0 { Edit::Remove(name) } else { Edit::Set(entry(&name, *link)) }
            }).collect();
            let before = model.len() as i64;
            for (edit, (_, _, link)) in edits.iter().zip(&step) {
                match edit {
                    Edit::Set(e) => { model.insert(e.name.clone(), *link); }
                    Edit::Remove(name) => { model.remove(name); }
                }
            }
            let (after, growth) = store.commit(cell, &content, &edits).unwrap();
            prop_assert_eq!(growth, model.len() as i64 - before);
            content = after;
        }
        check_all(&store, &content, &model);
    }
}
