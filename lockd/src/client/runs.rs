//! Owns: what a client remembers of where a disk's bytes lie, and which ranges are being changed.
//! Promises: a lookup allocates nothing; memory is bounded; a range that is being taken away is unknown.
//! Must not know: ioctls, LUN descriptors, I/O.

use std::collections::BTreeMap;
use std::ops::Range;

/// Most runs remembered; beyond it everything is forgotten and asked for again.
const LIMIT: usize = 65_536;

/// What is known of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Bytes on a LUN: its index in the volume and the first byte there.
    Data { lun: u8, offset: u64 },
    /// Reads as zeros; a write needs space first.
    Zero,
    /// Not remembered.
    Unknown,
}

#[derive(Default)]
pub(super) struct RunCache {
    /// First byte -> (end, what); never `Unknown`.
    runs: BTreeMap<u64, (u64, Known)>,
    taken: Option<Range<u64>>,
    allocating: Vec<Range<u64>>,
    version: u64,
}

impl RunCache {
    /// What is known from `offset` on, and up to where (at most `limit`).
    pub(super) fn at(&self, offset: u64, limit: u64) -> (Known, u64) {
        let mut limit = limit;
        if let Some(taken) = &self.taken {
            if taken.contains(&offset) {
                return (Known::Unknown, taken.end.min(limit));
            }
            if offset < taken.start {
                limit = limit.min(taken.start);
            }
        }
        if let Some((start, (end, known))) = self.runs.range(..=offset).next_back()
            && offset < *end
        {
            return (advanced(*known, offset - start), (*end).min(limit));
        }
        let next = self.runs.range(offset..).next().map_or(limit, |(start, _)| *start);
        (Known::Unknown, next.min(limit))
    }

    /// Changes whenever something was forgotten: an answer that was asked for before is then not believed.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Remembers `known` where nothing is known yet.
    pub(super) fn learn(&mut self, range: Range<u64>, known: Known) {
        let mut at = range.start;
        while at < range.end {
            let (present, end) = self.at(at, range.end);
            if present == Known::Unknown {
                self.set(at..end, advanced(known, at - range.start));
            }
            at = end;
        }
    }

    /// Remembers `known` for a range, instead of what was there.
    pub(super) fn set(&mut self, range: Range<u64>, known: Known) {
        if range.is_empty() || known == Known::Unknown {
            return;
        }
        if self.runs.len() >= LIMIT {
            self.runs.clear();
            self.version += 1;
        }
        self.remove(range.clone());
        let before = self.runs.range(..range.start).next_back().map(|(start, run)| (*start, *run));
        match before {
            Some((left, (end, joined))) if end == range.start && continues(joined, end - left, known) => {
                self.runs.insert(left, (range.end, joined));
            }
            _ => {
                self.runs.insert(range.start, (range.end, known));
            }
        }
    }

    /// Forgets a range.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        self.remove(range);
        self.version += 1;
    }

    fn remove(&mut self, range: Range<u64>) {
        self.split(range.start);
        self.split(range.end);
        while let Some((start, _)) = self.runs.range(range.clone()).next() {
            let start = *start;
            self.runs.remove(&start);
        }
    }

    /// Forgets a range and keeps it unknown until [`RunCache::give_back`].
    pub(super) fn take_away(&mut self, range: Range<u64>) {
        self.forget(range.clone());
        self.taken = Some(range);
    }

    /// Ends [`RunCache::take_away`]. What was learned of the range meanwhile may be from before its change: it is forgotten too.
    pub(super) fn give_back(&mut self) {
        if let Some(range) = self.taken.take() {
            self.forget(range);
        }
    }

    /// Marks a range as being allocated and filled by one owner.
    pub(super) fn begin(&mut self, range: Range<u64>) {
        self.allocating.push(range);
    }

    /// Ends [`RunCache::begin`] of the same range.
    pub(super) fn end(&mut self, range: &Range<u64>) {
        if let Some(at) = self.allocating.iter().position(|other| other == range) {
            self.allocating.swap_remove(at);
        }
    }

    /// Whether a range overlaps what is being taken away or filled.
    pub(super) fn is_changing(&self, range: &Range<u64>) -> bool {
        self.allocating.iter().chain(&self.taken).any(|other| other.start < range.end && range.start < other.end)
    }

    fn split(&mut self, at: u64) {
        let Some((start, (end, known))) = self.runs.range(..at).next_back().map(|(start, run)| (*start, *run)) else {
            return;
        };
        if at < end {
            self.runs.insert(start, (at, known));
            self.runs.insert(at, (end, advanced(known, at - start)));
        }
    }
}

fn advanced(known: Known, bytes: u64) -> Known {
    match known {
        Known::Data { lun, offset } => Known::Data { lun, offset: offset + bytes },
        other => other,
    }
}

fn continues(left: Known, length: u64, right: Known) -> bool {
    advanced(left, length) == right
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_that_follow_one_another_are_one_and_lookups_are_cut_at_the_limit() {
        let mut cache = RunCache::default();
        cache.set(0..100, Known::Data { lun: 1, offset: 1000 });
        cache.set(100..200, Known::Data { lun: 1, offset: 1100 });
        assert_eq!(cache.at(50, 150), (Known::Data { lun: 1, offset: 1050 }, 150));
        assert_eq!(cache.runs.len(), 1);
        cache.set(150..160, Known::Zero);
        assert_eq!(cache.at(140, 1000), (Known::Data { lun: 1, offset: 1140 }, 150));
        assert_eq!(cache.at(160, 1000), (Known::Data { lun: 1, offset: 1160 }, 200));
        assert_eq!(cache.at(200, 1000), (Known::Unknown, 1000));
    }

    #[test]
    fn what_is_being_taken_away_is_unknown_until_it_is_given_back() {
        let mut cache = RunCache::default();
        cache.set(0..300, Known::Data { lun: 1, offset: 0 });
        let version = cache.version();
        cache.take_away(100..200);
        assert_ne!(cache.version(), version);
        assert_eq!(cache.at(50, 300), (Known::Data { lun: 1, offset: 50 }, 100));
        assert_eq!(cache.at(150, 300), (Known::Unknown, 200));
        assert!(cache.is_changing(&(199..250)) && !cache.is_changing(&(200..250)));
        cache.learn(100..200, Known::Data { lun: 1, offset: 100 });
        cache.give_back();
        assert_eq!(cache.at(150, 300), (Known::Unknown, 200));
        assert!(!cache.is_changing(&(0..300)));
    }

    #[test]
    fn an_answer_of_the_mount_never_replaces_what_is_known_better() {
        let mut cache = RunCache::default();
        cache.begin(0..64);
        assert!(cache.is_changing(&(60..70)));
        cache.set(0..64, Known::Data { lun: 2, offset: 4096 });
        cache.end(&(0..64));
        cache.learn(0..128, Known::Zero);
        assert_eq!(cache.at(0, 128), (Known::Data { lun: 2, offset: 4096 }, 64));
        assert_eq!(cache.at(64, 128), (Known::Zero, 128));
    }

    proptest! {
        #[test]
        fn the_cache_says_what_a_table_of_bytes_says(
            steps in prop::collection::vec((0u64..64, 1u64..32, 0u8..6), 0..60),
        ) {
            let mut cache = RunCache::default();
            let mut table = [Known::Unknown; 96];
            for (start, length, what) in steps {
                let range = start..start + length;
                let known = match what {
                    0 => Known::Unknown,
                    1 => Known::Zero,
                    lun => Known::Data { lun, offset: 1000 + start },
                };
                match what {
                    0 => cache.forget(range.clone()),
                    5 => cache.learn(range.clone(), known),
                    _ => cache.set(range.clone(), known),
                }
                for at in range {
                    if what != 5 || table[at as usize] == Known::Unknown {
                        table[at as usize] = advanced(known, at - start);
                    }
                }
            }
            for at in 0..96 {
                let (known, end) = cache.at(at, 96);
                prop_assert!(end > at && end <= 96);
                for byte in at..end {
                    prop_assert_eq!(table[byte as usize], advanced(known, byte - at));
                }
            }
        }
    }
}
