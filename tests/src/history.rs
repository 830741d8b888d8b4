//! Owns: the check that a concurrent history of name operations could have happened one after another.
//! Promises: a history is accepted exactly if some order that respects real time explains every answer (linearizability, Herlihy and
//! Wing 1990; search as in Wing and Gong 1993, with remembered dead ends).
//! Must not know: how the operations were carried out.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

/// The names of a directory: name to identity of the file.
pub type Names = BTreeMap<u8, u64>;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Create exclusively.
    Create(u8),
    /// Remove.
    Unlink(u8),
    /// Rename the first to the second, replacing it.
    Rename(u8, u8),
    /// Look up.
    Stat(u8),
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; for create and look-up with the identity of the file.
    Done(u64),
    /// ENOENT.
    NotFound,
    /// EEXIST.
    Exists,
    /// A rename that succeeded while another host's same rename did. The kernel looks both names up before it asks the file system, one after
    /// the other; if the other rename happened in between, both lead to one file, and rename(2) then does nothing and succeeds.
    DoneOrSame,
    /// EBUSY: refused, nothing was done. Explains nothing about names; leave such events out of a history.
    Busy,
}

/// One operation of a history.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Before it was called.
    pub called: Instant,
    /// After it was answered.
    pub answered: Instant,
    /// What was asked.
    pub operation: Operation,
    /// What was answered.
    pub answer: Answer,
}

/// The names after `event` took place at `names`, or none when it would have been answered otherwise.
fn apply(names: &Names, event: &Event) -> Option<Names> {
    let mut after = names.clone();
    let explained = match (event.operation, event.answer) {
        (Operation::Create(name), Answer::Done(id)) => {
            !names.values().any(|v| *v == id) && after.insert(name, id).is_none()
        }
        (Operation::Create(name), Answer::Exists) => names.contains_key(&name),
        (Operation::Unlink(name), Answer::Done(_)) => after.remove(&name).is_some(),
        (Operation::Rename(from, to), Answer::Done(_)) => match after.remove(&from) {
            Some(id) => {
                after.insert(to, id);
                true
            }
            None => false,
        },
        (Operation::Rename(from, to), Answer::DoneOrSame) => match after.remove(&from) {
            Some(id) => {
                after.insert(to, id);
                true
            }
            None => names.contains_key(&to),
        },
        (Operation::Stat(name), Answer::Done(id)) => names.get(&name) == Some(&id),
        (Operation::Unlink(name) | Operation::Rename(name, _) | Operation::Stat(name), Answer::NotFound) => {
            !names.contains_key(&name)
        }
        _ => false,
    };
    explained.then_some(after)
}

/// Whether some order of at most 63 events leads from `before` to `after`.
///
/// # Panics
/// When there are more than 63 events.
pub fn is_linearizable(before: &Names, after: &Names, events: &[Event]) -> bool {
    assert!(events.len() < 64, "a round has at most 63 events");
    let mut dead_ends = HashSet::new();
    search(before, after, events, 0, &mut dead_ends)
}

fn search(names: &Names, after: &Names, events: &[Event], done: u64, dead_ends: &mut HashSet<(u64, Names)>) -> bool {
    if done == (1u64 << events.len()) - 1 {
        return names == after;
    }
    if !dead_ends.insert((done, names.clone())) {
        return false;
    }
    let open = |n: &usize| done >> n & 1 == 0;
    let first_answer = (0..events.len()).filter(open).map(|n| events[n].answered).min().expect("one is open");
    (0..events.len())
        .filter(open)
        .filter(|n| events[*n].called <= first_answer)
        .any(|n| apply(names, &events[n]).is_some_and(|next| search(&next, after, events, done | 1 << n, dead_ends)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn event(from_ms: u64, to_ms: u64, operation: Operation, answer: Answer) -> Event {
        let start = Instant::now();
        Event {
            called: start + Duration::from_millis(1000 + from_ms),
            answered: start + Duration::from_millis(1000 + to_ms),
            operation,
            answer,
        }
    }

    #[test]
    fn two_creates_of_one_name_that_both_succeed_are_rejected() {
        let events = [
            event(0, 100, Operation::Create(1), Answer::Done(7)),
            event(0, 100, Operation::Create(1), Answer::Done(8)),
        ];
        for last in [7, 8] {
            assert!(!is_linearizable(&Names::new(), &Names::from([(1, last)]), &events));
        }
    }

    #[test]
    fn overlapping_operations_may_be_ordered_either_way_and_others_may_not() {
        let create = event(0, 100, Operation::Create(1), Answer::Done(7));
        let after = Names::from([(1, 7)]);
        let early = event(50, 150, Operation::Stat(1), Answer::NotFound);
        assert!(is_linearizable(&Names::new(), &after, &[create, early]));
        let late = event(500, 600, Operation::Stat(1), Answer::NotFound);
        assert!(!is_linearizable(&Names::new(), &after, &[create, late]));
    }

    #[test]
    fn a_rename_is_never_seen_half_done() {
        let before = Names::from([(1, 7)]);
        let after = Names::from([(2, 7)]);
        let rename = event(0, 1000, Operation::Rename(1, 2), Answer::Done(0));
        let gone = event(100, 200, Operation::Stat(1), Answer::NotFound);
        let not_there = event(300, 400, Operation::Stat(2), Answer::NotFound);
        assert!(is_linearizable(&before, &after, &[rename, gone]));
        assert!(!is_linearizable(&before, &after, &[rename, gone, not_there]));
    }
}
