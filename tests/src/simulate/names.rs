//! Owns: the check that the names that all hosts saw and made have one history.
//! Promises: accepted exactly if some order that respects real time explains every answer; an operation that was cut off may have
//! happened at any time after its call, or never (Herlihy and Wing 1990; search as in Wing and Gong 1993 with remembered dead ends).
//! Must not know: how the operations were carried out.

use std::collections::{BTreeMap, HashSet};

use super::plan::Place;

/// An object: its identity and birth.
pub type Id = u64;

/// What an operation did, by its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Made an object; `None`: which one is not known.
    Created(Place, Option<Id>),
    /// The name was taken.
    Taken(Place),
    /// Removed a name.
    Removed(Place),
    /// There was no such name.
    Missing(Place),
    /// Found an object.
    Found(Place, Id),
    /// Renamed, replacing what was there.
    Renamed(Place, Place),
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Done {
    /// Virtual time of the call.
    pub from: u64,
    /// Virtual time of the answer.
    pub to: u64,
    /// It was answered. Else it may have happened or not.
    pub certain: bool,
    /// What it did, or would have done.
    pub event: Event,
}

type State = BTreeMap<Place, Id>;

/// Identities that nobody was told begin here.
const UNKNOWN: Id = 1 << 62;
/// States after which a search is given up as undecided: the history is then taken for good.
const MOST_STATES: usize = 200_000;

fn step(state: &State, event: &Event, fresh: Id) -> Option<State> {
    let mut next = state.clone();
    let possible = match event {
        Event::Created(place, id) => next.insert(*place, id.unwrap_or(fresh)).is_none(),
        Event::Taken(place) => state.contains_key(place),
        Event::Removed(place) => next.remove(place).is_some(),
        Event::Missing(place) => !state.contains_key(place),
        Event::Found(place, id) => next.insert(*place, *id).is_some_and(|had| had == *id || had >= UNKNOWN),
        Event::Renamed(from, to) => match next.remove(from) {
            None => false,
            Some(id) => {
                next.insert(*to, id);
                true
            }
        },
    };
    possible.then_some(next)
}

/// Whether some order of at most 128 operations explains all answers, from no names on.
pub fn is_linearizable(history: &[Done]) -> bool {
    assert!(history.len() <= 128, "a run has at most 128 operations on names");
    let mut history = history.to_vec();
    history.sort_by_key(|op| op.from);
    let mut seen = HashSet::new();
    let mut open = vec![(0u128, State::new())];
    while let Some((done, state)) = open.pop() {
        if seen.len() > MOST_STATES {
            return true;
        }
        if !seen.insert((done, state.clone())) {
            continue;
        }
        let left = |n: usize| done >> n & 1 == 0;
        if (0..history.len()).all(|n| !left(n) || !history[n].certain) {
            return true;
        }
        let first_end = (0..history.len()).filter(|n| left(*n) && history[*n].certain).map(|n| history[n].to).min();
        for (n, op) in history.iter().enumerate().rev() {
            if left(n)
                && first_end.is_none_or(|end| op.from <= end)
                && let Some(next) = step(&state, &op.event, UNKNOWN + n as u64)
            {
                open.push((done | 1 << n, next));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(from: u64, to: u64, certain: bool, event: Event) -> Done {
        Done { from, to, certain, event }
    }

    #[test]
    fn a_history_that_no_order_explains_is_refused_and_one_cut_off_may_happen_late() {
        let created = op(0, 1, true, Event::Created(1, Some(5)));
        let missing = op(2, 3, true, Event::Missing(1));
        assert!(!is_linearizable(&[created.clone(), missing.clone()]));
        let cut_off = op(0, 1, false, Event::Created(1, None));
        let found = op(8, 9, true, Event::Found(1, 7));
        assert!(is_linearizable(&[cut_off.clone(), missing, found.clone()]));
        assert!(!is_linearizable(&[found, cut_off, op(10, 11, true, Event::Found(1, 8))]));
    }

    #[test]
    fn two_that_create_one_name_at_once_cannot_both_have_done_it() {
        let both = [op(0, 9, true, Event::Created(1, Some(5))), op(0, 9, true, Event::Created(1, Some(6)))];
        assert!(!is_linearizable(&both));
    }
}
