//! Promises of the run map, against a model that knows every granule by itself.

use proptest::prelude::*;

use super::*;
use crate::units::BlockAddress;

const BLOCK: BlockSize = BlockSize::from_shift(16).unwrap();
const GRANULE: u64 = BLOCK.granule_bytes();

fn place(block: u64) -> Place {
    let at = BlockAddress { lun: LunIndex::new(3).unwrap(), block: BlockNo::new(block).unwrap() };
    Place { at, offset: (1 << 30) + block * BLOCK.bytes() }
}

fn data(block: u64, inside: u64) -> Class {
    Class::Data { lun: LunIndex::new(3).unwrap(), offset: place(block).offset + inside }
}

#[test]
fn neighbours_that_are_all_valid_become_one_run_however_they_are_learnt() {
    let mut map = RunMap::new(BLOCK, 1000);
    for block in [4, 0, 2, 1, 3] {
        map.learn(block, 1, Known::Block(place(100 + block), Granules::ALL));
    }
    assert_eq!(map.len(), 1);
    let found = map.stretch(5, u64::MAX);
    assert_eq!(found, Stretch { class: data(100, 5), end: 5 * BLOCK.bytes() });
    assert_eq!(map.block(3), Some(Some(BlockState::published(place(103), Granules::ALL))));
    assert_eq!(map.block(5), None);
}

#[test]
fn a_fully_written_disk_of_ten_tebibytes_is_one_extent() {
    let block = BlockSize::DEFAULT;
    let mut map = RunMap::new(block, 1000);
    let at = |n: u64| Place {
        at: BlockAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(n).unwrap() },
        offset: n << 20,
    };
    for n in 0..(10 << 20) / 64 {
        map.learn(n, 1, Known::Block(at(n), Granules::ALL));
    }
    assert_eq!(map.len(), 1);
}

#[test]
fn a_scattered_disk_stays_within_its_memory_and_keeps_what_is_unpublished() {
    let mut map = RunMap::new(BLOCK, 64);
    let fresh = BlockState::fresh(place(9));
    map.set_block(1, Some(fresh));
    for n in 2..10_000 {
        map.learn(n, 1, Known::Block(place(20_000 - 2 * n), Granules::ALL));
        assert!(map.len() <= 65, "{} extents", map.len());
    }
    assert_eq!(map.block(1), Some(Some(fresh)));
    assert_eq!(map.unpublished_count(), 1);
}

#[test]
fn a_fill_takes_whole_granules_up_to_the_first_that_is_not_unwritten() {
    let mut map = RunMap::new(BLOCK, 64);
    map.learn(0, 1, Known::Block(place(7), Granules(1 << 5)));
    map.learn(1, 9, Known::Hole);
    let pieces = map.begin_fill(GRANULE + 1..BLOCK.bytes());
    let lun = LunIndex::new(3).unwrap();
    let piece = FillPiece { file_offset: GRANULE, length: 4 * GRANULE, lun, offset: place(7).offset + GRANULE };
    assert_eq!(pieces, [piece]);
    assert_eq!(map.stretch(GRANULE, u64::MAX), Stretch { class: Class::Filling, end: 5 * GRANULE });
    assert!(map.begin_fill(GRANULE..2 * GRANULE).is_empty(), "a granule has one filler");
    map.end_fill(GRANULE..5 * GRANULE, GranuleEvent::EndFill);
    assert_eq!(map.stretch(GRANULE, u64::MAX), Stretch { class: data(7, GRANULE), end: 6 * GRANULE });
    map.published(0, Granules::range(1, 5));
    assert_eq!(map.block(0).unwrap().unwrap().valid, Granules::range(1, 6));
    assert_eq!(map.unpublished_count(), 0);
}

#[test]
fn a_fill_runs_on_through_blocks_that_follow_one_another() {
    let mut map = RunMap::new(BLOCK, 64);
    map.set_block(0, Some(BlockState::fresh(place(7))));
    map.set_block(1, Some(BlockState::fresh(place(8))));
    map.set_block(2, Some(BlockState::fresh(place(30))));
    let pieces = map.begin_fill(0..3 * BLOCK.bytes());
    assert_eq!(pieces.iter().map(|p| p.length).collect::<Vec<_>>(), [2 * BLOCK.bytes(), BLOCK.bytes()]);
}

#[test]
fn a_frozen_range_is_unknown_to_data_io_and_comes_back_when_it_thaws() {
    let mut map = RunMap::new(BLOCK, 64);
    map.learn(0, 1, Known::Block(place(7), Granules::ALL));
    map.freeze(GRANULE..2 * GRANULE);
    assert_eq!(map.stretch(0, u64::MAX), Stretch { class: data(7, 0), end: GRANULE });
    assert_eq!(map.stretch(GRANULE, u64::MAX).class, Class::Unknown);
    map.thaw();
    assert_eq!(map.stretch(0, u64::MAX), Stretch { class: data(7, 0), end: BLOCK.bytes() });
}

#[derive(Clone, Debug)]
enum Step {
    Learn(u64, Option<(u64, u16)>),
    LearnHoles(u64, u64),
    Fresh(u64, u64),
    Fill(u64, u64, bool),
    Publish(u64, u16),
    Discard(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let block = 0..24u64;
    prop_oneof![
        (block.clone(), prop::option::of((0..40u64, prop::sample::select(vec![0, 0xffff, 0x00f0]))))
            .prop_map(|(b, p)| Step::Learn(b, p)),
        (block.clone(), 1..9u64).prop_map(|(b, n)| Step::LearnHoles(b, n)),
        (block.clone(), 0..40u64).prop_map(|(b, p)| Step::Fresh(b, p)),
        (0..24 * 16u64, 1..40u64, any::<bool>()).prop_map(|(g, n, done)| Step::Fill(g, n, done)),
        (block.clone(), any::<u16>()).prop_map(|(b, bits)| Step::Publish(b, bits)),
        block.prop_map(Step::Discard),
    ]
}

fn carry_out(map: &mut RunMap, model: &mut [Option<Option<BlockState>>], step: &Step) {
    match *step {
        Step::Learn(b, pointer) => {
            let known = pointer.map_or(Known::Hole, |(p, valid)| Known::Block(place(p), Granules(valid)));
            map.learn(b, 1, known);
            let state = pointer.map(|(p, valid)| BlockState::published(place(p), Granules(valid)));
            model[b as usize].get_or_insert(state);
        }
        Step::LearnHoles(b, n) => {
            map.learn(b, n, Known::Hole);
            for known in &mut model[b as usize..(b + n) as usize] {
                known.get_or_insert(None);
            }
        }
        Step::Fresh(b, p) => {
            if model[b as usize] == Some(None) {
                map.set_block(b, Some(BlockState::fresh(place(p))));
                model[b as usize] = Some(Some(BlockState::fresh(place(p))));
            }
        }
        Step::Fill(g, n, done) => {
            let event = if done { GranuleEvent::EndFill } else { GranuleEvent::AbandonFill };
            for piece in map.begin_fill(g * GRANULE..(g + n) * GRANULE) {
                map.end_fill(piece.file_offset..piece.file_offset + piece.length, event);
                for granule in piece.file_offset / GRANULE..(piece.file_offset + piece.length) / GRANULE {
                    let state = model[granule as usize / 16].as_mut().unwrap().as_mut().unwrap();
                    let bit = Granules(1 << (granule % 16));
                    assert_eq!(state.apply(bit, GranuleEvent::BeginFill), bit);
                    state.apply(bit, event);
                }
            }
        }
        Step::Publish(b, bits) => {
            map.published(b, Granules(bits));
            if let Some(Some(state)) = &mut model[b as usize] {
                state.apply(Granules(bits), GranuleEvent::Publish);
                (state.fresh, state.wanted) = (false, false);
            }
        }
        Step::Discard(b) => {
            map.set_block(b, None);
            model[b as usize] = Some(None);
        }
    }
}

fn agrees(map: &RunMap, model: &[Option<Option<BlockState>>]) {
    for (b, known) in model.iter().enumerate() {
        assert_eq!(&map.block(b as u64), known, "block {b}");
    }
    let mut at = 0;
    while at < model.len() as u64 * BLOCK.bytes() {
        let found = map.stretch(at, model.len() as u64 * BLOCK.bytes());
        assert!(found.end > at && found.end.is_multiple_of(GRANULE));
        for granule in at / GRANULE..found.end / GRANULE {
            let expected = match model[granule as usize / 16] {
                None => Class::Unknown,
                Some(None) => Class::Hole,
                Some(Some(state)) => match state.state((granule % 16) as u32) {
                    GranuleState::Unwritten => Class::Unwritten,
                    GranuleState::Filling => Class::Filling,
                    _ => Class::Data {
                        lun: state.place.at.lun,
                        offset: state.place.offset + granule % 16 * GRANULE - (granule * GRANULE - at),
                    },
                },
            };
            assert_eq!(found.class, expected, "granule {granule}");
        }
        at = found.end;
    }
    let dirty = model.iter().flatten().flatten().filter(|state| !state.is_clean()).count();
    assert_eq!(map.unpublished_count(), dirty);
    assert_eq!(map.unpublished(0).count(), dirty);
}

proptest! {
    #[test]
    fn the_map_says_what_a_model_of_single_granules_says(steps in prop::collection::vec(step(), 1..120)) {
        let mut map = RunMap::new(BLOCK, 1000);
        let mut model = vec![None; 33];
        for step in &steps {
            carry_out(&mut map, &mut model, step);
        }
        agrees(&map, &model);
    }
}
