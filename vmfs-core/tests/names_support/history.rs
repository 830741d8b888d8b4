//! Whether a concurrent history of name operations could have happened one after another (Wing and Gong's search).

use std::collections::{BTreeMap, HashSet};

/// A place: directory and name, numbered by the test.
pub type Place = u8;
/// An object, numbered by the test.
pub type Id = u64;

/// What an operation did, by its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Made a new object. `None`: the answer never came, and what was made is not known.
    Created(Place, Option<Id>),
    /// The name was taken.
    Taken(Place),
    /// Removed a name; which object it had.
    Removed(Place, Option<Id>),
    /// There was no such name.
    Missing(Place),
    /// Found an object.
    Found(Place, Id),
    /// Renamed from one place to another, replacing what was there.
    Renamed(Place, Place),
    /// Refused without any effect.
    Nothing,
}

/// One operation: from call to answer. An operation without an answer ends never and may have happened or not.
#[derive(Clone, Debug)]
pub struct Operation {
    pub who: u32,
    pub from: u64,
    pub to: u64,
    pub certain: bool,
    pub event: Event,
}

type State = BTreeMap<Place, Id>;

/// The state after an event, if the event can happen in this state. Objects whose identity is not known get one from `fresh`.
fn step(state: &State, event: &Event, fresh: Id) -> Option<State> {
    let mut next = state.clone();
    let possible = match event {
        Event::Created(place, id) => next.insert(*place, id.unwrap_or(fresh)).is_none(),
        Event::Taken(place) => state.contains_key(place),
        Event::Removed(place, id) => {
            next.remove(place).is_some_and(|had| id.is_none_or(|id| id == had || is_unknown(had)))
        }
        Event::Missing(place) => !state.contains_key(place),
        Event::Found(place, id) => {
            let had = next.insert(*place, *id);
            had.is_some_and(|had| had == *id || is_unknown(had))
        }
        Event::Renamed(from, to) => match next.remove(from) {
            None => false,
            Some(id) => {
                next.insert(*to, id);
                true
            }
        },
        Event::Nothing => true,
    };
    possible.then_some(next)
}

const UNKNOWN: Id = 1 << 60;

fn is_unknown(id: Id) -> bool {
    id >= UNKNOWN
}

/// Panics with the history when no order explains it. `last` is what the names were found to be at the end.
pub fn check(mut history: Vec<Operation>, label: &str) {
    history.sort_by_key(|op| op.from);
    assert!(history.len() <= 128);
    let mut seen = HashSet::new();
    let mut open = vec![(0u128, State::new())];
    while let Some((done, state)) = open.pop() {
        if !seen.insert((done, state.clone())) {
            continue;
        }
        let left = |n: usize| done >> n & 1 == 0;
        if (0..history.len()).all(|n| !left(n) || !history[n].certain) {
            return;
        }
        let first_end = (0..history.len()).filter(|n| left(*n) && history[*n].certain).map(|n| history[n].to).min();
        for (n, op) in history.iter().enumerate() {
            if left(n)
                && first_end.is_none_or(|end| op.from <= end)
                && let Some(next) = step(&state, &op.event, UNKNOWN + n as u64)
            {
                open.push((done | 1 << n, next));
            }
        }
    }
    for op in &history {
        eprintln!("host {} {:>12}..{:<12} {} {:?}", op.who, op.from, op.to, op.certain, op.event);
    }
    panic!("{label}: no order of these operations explains their answers");
}

#[test]
fn a_history_that_no_order_explains_is_found() {
    let op = |from, to, event| Operation { who: 1, from, to, certain: true, event };
    let good = vec![op(0, 9, Event::Created(1, Some(5))), op(1, 3, Event::Missing(1)), op(2, 8, Event::Found(1, 5))];
    check(good, "good");
    let bad = vec![op(0, 1, Event::Created(1, Some(5))), op(2, 3, Event::Missing(1))];
    assert!(std::panic::catch_unwind(|| check(bad, "bad")).is_err());
}
