//! Owns: a set of numbers that costs memory only where it is not empty.
//! Promises: 512 bytes for each 4096 neighbouring numbers of which one is in it.
//! Must not know: what the numbers mean.

use std::collections::HashMap;

const PAGE_BITS: u64 = 4096;

/// A set of numbers.
#[derive(Default)]
pub(super) struct SparseBits {
    pages: HashMap<u64, Box<[u64; 64]>>,
}

fn split(number: u64) -> (u64, usize, u64) {
    let inside = number % PAGE_BITS;
    (number / PAGE_BITS, (inside / 64) as usize, 1 << (inside % 64))
}

impl SparseBits {
    /// Adds a number; false when it was there.
    pub fn insert(&mut self, number: u64) -> bool {
        let (page, word, bit) = split(number);
        let word = &mut self.pages.entry(page).or_insert_with(|| Box::new([0; 64]))[word];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether it is there.
    pub fn contains(&self, number: u64) -> bool {
        let (page, word, bit) = split(number);
        self.pages.get(&page).is_some_and(|words| words[word] & bit != 0)
    }

    /// The numbers that are here and not in `other`, ascending within each page.
    pub fn without(&self, other: &SparseBits) -> Vec<u64> {
        let mut left = Vec::new();
        for (page, words) in &self.pages {
            let others = other.pages.get(page);
            for (nth, word) in words.iter().enumerate() {
                let mut rest = word & !others.map_or(0, |o| o[nth]);
                while rest != 0 {
                    left.push(page * PAGE_BITS + nth as u64 * 64 + u64::from(rest.trailing_zeros()));
                    rest &= rest - 1;
                }
            }
        }
        left.sort_unstable();
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    proptest! {
        #[test]
        fn it_is_a_set(
            a in proptest::collection::btree_set(0u64..20_000, 0..200), b in proptest::collection::btree_set(0u64..20_000, 0..200),
        ) {
            let fill = |numbers: &BTreeSet<u64>| {
                let mut bits = SparseBits::default();
                for number in numbers {
                    assert!(bits.insert(*number));
                    assert!(!bits.insert(*number));
                }
                bits
            };
            let (left, right) = (fill(&a), fill(&b));
            prop_assert_eq!(left.without(&right), a.difference(&b).copied().collect::<Vec<_>>());
            prop_assert!((0..20_000).all(|n| left.contains(n) == a.contains(&n)));
        }
    }
}
