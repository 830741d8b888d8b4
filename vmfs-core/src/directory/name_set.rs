//! Owns: a set of directory entries in the order of their names' hashes, and the cookies of readdir.
//! Promises: no name twice; order and cookies depend on the names alone, not on when they were added.
//! Must not know: where the entries are stored, which of them are believed.

use crate::format::FormatError;
use crate::format::dirent::{Dirent, name_hash};

/// Entries in the order of (hash, name).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameSet(Vec<Dirent>);

/// First cookie that an entry may have: smaller ones are the caller's ("." and "..").
const FIRST_ORDINAL: u64 = 4;
/// Names of one cookie group, that is with the same upper 55 bits of their hashes.
pub const MAX_GROUP: usize = 251;

fn key(entry: &Dirent) -> (u64, &[u8]) {
    (name_hash(&entry.name), &entry.name)
}

impl NameSet {
    /// The set of these entries, in any order. A name that is there twice is an error.
    pub fn new(mut entries: Vec<Dirent>) -> Result<NameSet, FormatError> {
        if !entries.is_sorted_by(|a, b| key(a) < key(b)) {
            entries.sort_by(|a, b| key(a).cmp(&key(b)));
        }
        if let Some(pair) = entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let value = name_hash(&pair[0].name);
            return Err(FormatError::Value {
                structure: "directory",
                field: "hash of a name that is there twice",
                value,
            });
        }
        Ok(NameSet(entries))
    }

    fn place(&self, name: &[u8]) -> Result<usize, usize> {
        let wanted = (name_hash(name), name);
        self.0.binary_search_by(|entry| key(entry).cmp(&wanted))
    }

    /// The entry of a name.
    pub fn get(&self, name: &[u8]) -> Option<&Dirent> {
        self.place(name).ok().map(|at| &self.0[at])
    }

    /// Adds an entry or replaces the one of the same name, and gives the latter.
    pub fn set(&mut self, entry: Dirent) -> Option<Dirent> {
        match self.place(&entry.name) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at], entry)),
            Err(at) => {
                self.0.insert(at, entry);
                None
            }
        }
    }

    /// Takes the entry of a name out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Dirent> {
        self.place(name).ok().map(|at| self.0.remove(at))
    }

    /// The entries in order.
    pub fn entries(&self) -> &[Dirent] {
        &self.0
    }

    /// The entries in order.
    pub fn into_entries(self) -> Vec<Dirent> {
        self.0
    }

    /// Bytes of the entries in a stream.
    pub fn encoded_len(&self) -> usize {
        self.0.iter().map(Dirent::encoded_len).sum()
    }

    /// Whether all hashes agree with `prefix` in their upper `bits` bits (0..=16), `prefix` being the upper 16 bits.
    pub fn lies_within(&self, prefix: u16, bits: u8) -> bool {
        let upper = |h: u64| if bits == 0 { 0 } else { (h >> 48) as u16 >> (16 - bits) };
        let wanted = if bits == 0 { 0 } else { prefix >> (16 - bits) };
        let fits = |entry: Option<&Dirent>| entry.is_none_or(|e| upper(name_hash(&e.name)) == wanted);
        // In order: when the ends lie within, so does everything between.
        fits(self.0.first()) && fits(self.0.last())
    }

    /// Cuts the set in two by bit `bit` of the hashes (0 is the top one): those with 0, those with 1. All bits above are equal.
    pub fn split(mut self, bit: u8) -> (NameSet, NameSet) {
        let at = self.0.partition_point(|entry| name_hash(&entry.name) >> (63 - bit) & 1 == 0);
        let upper = self.0.split_off(at);
        (self, NameSet(upper))
    }

    /// The entries behind `cookie`, each with its own cookie. The ordinal numbers the names of one group; with 55 bits of a hash in
    /// common a group has nearly always one name.
    pub fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &Dirent)> {
        let group = cookie >> 8;
        let start = self.0.partition_point(|entry| group_of(entry) < group);
        let mut last = None;
        self.0[start..].iter().filter_map(move |entry| {
            let group = group_of(entry);
            let ordinal = match last {
                Some((g, n)) if g == group => n + 1,
                _ => 0,
            };
            last = Some((group, ordinal));
            let own = group << 8 | (FIRST_ORDINAL + ordinal).min(255);
            (own > cookie).then_some((own, entry))
        })
    }

    /// Names that share the cookie group of `name`.
    pub fn group_len(&self, name: &[u8]) -> usize {
        let group = name_hash(name) >> 9;
        let start = self.0.partition_point(|entry| group_of(entry) < group);
        self.0[start..].iter().take_while(|entry| group_of(entry) == group).count()
    }
}

fn group_of(entry: &Dirent) -> u64 {
    name_hash(&entry.name) >> 9
}

/// Upper 16 bits of the hashes of the names that can come right behind `cookie`.
pub fn prefix_of_cookie(cookie: u64) -> u16 {
    // (hash >> 9) << 8: the hash's top bit is bit 62.
    ((cookie << 1) >> 48) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::dirent::ObjectRef;
    use crate::format::root_cell::ObjectType;
    use crate::units::{BlockAddress, BlockNo, FdId, Link, LunIndex};
    use proptest::prelude::*;

    fn entry(name: &[u8]) -> Dirent {
        let container = BlockAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(7).unwrap() };
        let child = ObjectRef { fd: FdId::new(container, 3).unwrap(), link: Link(1) };
        Dirent { name: name.to_vec(), object_type: ObjectType::File, child, pending: None, leaving: false }
    }

    #[test]
    fn a_name_that_is_there_twice_is_refused() {
        assert!(NameSet::new(vec![entry(b"a"), entry(b"b"), entry(b"a")]).is_err());
    }

    proptest! {
        #[test]
        fn going_on_behind_any_cookie_gives_each_other_name_once(
            names in prop::collection::btree_set(prop::collection::vec(1u8..=255, 1..6), 1..60), pick: prop::sample::Index,
        ) {
            let mut set = NameSet::default();
            names.iter().for_each(|n| { set.set(entry(n)); });
            let all: Vec<_> = set.after(0).map(|(c, e)| (c, e.name.clone())).collect();
            prop_assert_eq!(all.len(), names.len());
            prop_assert!(all.is_sorted_by(|a, b| a.0 < b.0));
            prop_assert!(all.iter().all(|(c, _)| *c >= FIRST_ORDINAL && i64::try_from(*c).is_ok()));
            let (cookie, gone) = pick.get(&all).clone();
            let rest: Vec<_> = all.iter().filter(|(c, _)| *c > cookie).cloned().collect();
            set.remove(&gone);
            let after: Vec<_> = set.after(cookie).map(|(c, e)| (c, e.name.clone())).collect();
            prop_assert_eq!(after, rest);
        }

        #[test]
        fn a_split_keeps_order_and_prefix(names in prop::collection::btree_set(prop::collection::vec(1u8..=255, 1..6), 1..60)) {
            let set = NameSet::new(names.iter().map(|n| entry(n)).collect()).unwrap();
            prop_assert!(set.lies_within(0x1234, 0));
            let (low, high) = set.clone().split(0);
            prop_assert!(low.lies_within(0, 1) && high.lies_within(0x8000, 1));
            prop_assert!(low.entries().is_empty() || !low.lies_within(0x8000, 1));
            let (mut both, tail) = (low.into_entries(), high.into_entries());
            both.extend(tail);
            prop_assert_eq!(both, set.into_entries());
        }

        #[test]
        fn a_cookie_knows_the_prefix_of_its_hash(hash: u64, ordinal in 0u64..256) {
            prop_assert_eq!(prefix_of_cookie((hash >> 9) << 8 | ordinal), (hash >> 48) as u16);
        }
    }
}
