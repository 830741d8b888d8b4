//! Owns: the extendible hash of a directory: which unit holds a name, how a change splits buckets and doubles the tree.
//! Promises: what it gives out is a whole new tree that shares every unit that did not change; a name is where its hash says.
//! Must not know: cells, commits; units come and go through [`Source`] and the references that it is handed.
//!
//! A tree of depth d has 2^d slots, chosen by the upper d bits of a name's hash. A bucket of local depth l <= d fills 2^(d-l)
//! neighbouring slots. Up to depth 8 the slots are the body's references; deeper, they lie in groups of 256, each an inner unit.
//! The index of a unit in its object does not change when the tree doubles: a bucket has the upper 16 bits of the first hash it
//! can hold, an inner unit the upper 8 bits of the first hash it leads to.

use std::rc::Rc;

use super::name_set::{MAX_GROUP, NameSet};
use crate::error::{FsError, FsErrorKind};
use crate::format::FormatError;
use crate::format::body::{Content, DIRECT_DEPTH, MAX_DEPTH, bucket_refs, pack_refs};
use crate::format::dirent::{BUCKET_FIXED, Dirent, encode_bucket, name_hash};
use crate::format::layout::unit_payload;
use crate::format::unit::UnitRef;
use crate::units::CellSize;

/// Slots of a group.
const GROUP: usize = 1 << DIRECT_DEPTH;
/// Bytes of a directory's body that are not entries, whatever its name hint is.
const BODY_FIXED: usize = 72 + 255;

/// A bucket as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Upper bits that the hashes of its names have in common.
    pub local_depth: u8,
    /// Its entries.
    pub names: NameSet,
}

/// Reads the units of one directory. An implementation checks the unit's owner, index and checksum.
pub trait Source {
    /// The bucket with this index.
    async fn bucket(&self, reference: &UnitRef, index: u32) -> Result<Rc<Bucket>, FsError>;
    /// The inner unit with this index: 256 references.
    async fn inner(&self, reference: &UnitRef, index: u32) -> Result<Rc<Vec<Option<UnitRef>>>, FsError>;
    /// The error of a structure that contradicts itself.
    fn corrupt(&self, cause: FormatError) -> FsError;
}

/// One change of a directory's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Adds an entry or replaces the one of that name.
    Set(Dirent),
    /// Takes a name out, if it is there.
    Remove(Vec<u8>),
}

impl Edit {
    /// The name that it concerns.
    pub fn name(&self) -> &[u8] {
        match self {
            Edit::Set(entry) => &entry.name,
            Edit::Remove(name) => name,
        }
    }
}

/// Which unit of a directory: its kind follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnitPlace {
    /// A bucket, with its index.
    Bucket(u32),
    /// An inner unit, with its index.
    Inner(u32),
}

/// Slot of a hash in a tree of `depth`.
pub fn slot_of(hash: u64, depth: u8) -> usize {
    if depth == 0 { 0 } else { (hash >> (64 - depth)) as usize }
}

/// Index of the bucket of `local_depth` that holds `slot` of a tree of `depth`.
fn bucket_index(slot: usize, depth: u8, local_depth: u8) -> u32 {
    let first = slot >> (depth - local_depth) << (depth - local_depth);
    (first << (MAX_DEPTH - depth)) as u32
}

/// Index of the inner unit of group `group` in a tree of `depth` (above 8).
fn inner_index(group: usize, depth: u8) -> u32 {
    (group << (MAX_DEPTH - depth)) as u32
}

/// Bytes of entries that one bucket takes.
fn bucket_room(cell: CellSize) -> usize {
    unit_payload(cell) - BUCKET_FIXED
}

/// The reference in `slot`.
async fn reference_at<S: Source>(
    source: &S,
    depth: u8,
    refs: &[Option<UnitRef>],
    slot: usize,
) -> Result<Option<UnitRef>, FsError> {
    if depth <= DIRECT_DEPTH {
        return Ok(refs.get(slot).copied().flatten());
    }
    match refs.get(slot / GROUP).copied().flatten() {
        None => Ok(None),
        Some(inner) => {
            let inner = source.inner(&inner, inner_index(slot / GROUP, depth)).await?;
            Ok(inner.get(slot % GROUP).copied().flatten())
        }
    }
}

/// The bucket that fills `slot`: its local depth shows in how many neighbours have the same reference.
async fn bucket_at<S: Source>(
    source: &S,
    depth: u8,
    refs: &[Option<UnitRef>],
    slot: usize,
) -> Result<Option<Rc<Bucket>>, FsError> {
    let Some(reference) = reference_at(source, depth, refs, slot).await? else {
        return Ok(None);
    };
    let mut local_depth = depth;
    while local_depth > 0 {
        let sibling = sibling_of(slot, depth, local_depth);
        if reference_at(source, depth, refs, sibling).await? != Some(reference) {
            break;
        }
        local_depth -= 1;
    }
    load_bucket(source, depth, slot, local_depth, &reference).await.map(Some)
}

/// First slot of the other half of the bucket of `local_depth - 1` around `slot`.
fn sibling_of(slot: usize, depth: u8, local_depth: u8) -> usize {
    let shift = depth - local_depth;
    ((slot >> shift) ^ 1) << shift
}

/// Reads the bucket that fills `slot` and checks that it says the same of itself.
async fn load_bucket<S: Source>(
    source: &S,
    depth: u8,
    slot: usize,
    local_depth: u8,
    reference: &UnitRef,
) -> Result<Rc<Bucket>, FsError> {
    let index = bucket_index(slot, depth, local_depth);
    let bucket = source.bucket(reference, index).await?;
    if bucket.local_depth != local_depth || !bucket.names.lies_within(index as u16, local_depth) {
        let value = bucket.local_depth.into();
        return Err(source.corrupt(FormatError::Value { structure: "bucket", field: "local_depth", value }));
    }
    Ok(bucket)
}

/// The entry of `name` in a directory whose body is `content`.
pub async fn find<S: Source>(source: &S, content: &Content, name: &[u8]) -> Result<Option<Dirent>, FsError> {
    match content {
        Content::Entries(entries) => Ok(entries.iter().find(|entry| entry.name == name).cloned()),
        Content::Buckets { depth, refs } => {
            let slot = slot_of(name_hash(name), *depth);
            Ok(bucket_at(source, *depth, refs, slot).await?.and_then(|bucket| bucket.names.get(name).cloned()))
        }
        _ => Err(not_a_directory(source)),
    }
}

fn not_a_directory<S: Source>(source: &S) -> FsError {
    source.corrupt(FormatError::Value { structure: "body of a directory", field: "content", value: 0 })
}

/// Gives all buckets whose names can come at or behind the hash prefix `from`, in order, until `each` says false.
pub async fn walk<S: Source>(
    source: &S,
    content: &Content,
    from: u16,
    mut each: impl FnMut(&NameSet) -> bool,
) -> Result<(), FsError> {
    match content {
        Content::Entries(entries) => {
            let names = NameSet::new(entries.clone()).map_err(|cause| source.corrupt(cause))?;
            each(&names);
            Ok(())
        }
        Content::Buckets { depth, refs } => {
            let mut slot = usize::from(from) >> (MAX_DEPTH - depth);
            while slot < 1 << depth {
                if *depth > DIRECT_DEPTH && refs.get(slot / GROUP).copied().flatten().is_none() {
                    slot = (slot / GROUP + 1) * GROUP;
                    continue;
                }
                let Some(bucket) = bucket_at(source, *depth, refs, slot).await? else {
                    slot += 1;
                    continue;
                };
                if !each(&bucket.names) {
                    return Ok(());
                }
                let span = 1usize << (depth - bucket.local_depth);
                slot = slot / span * span + span;
            }
            Ok(())
        }
        _ => Err(not_a_directory(source)),
    }
}

/// The unit that a directory has at a place, if it has one there.
pub async fn unit_at<S: Source>(source: &S, content: &Content, place: UnitPlace) -> Result<Option<UnitRef>, FsError> {
    let Content::Buckets { depth, refs } = content else { return Ok(None) };
    match place {
        UnitPlace::Bucket(index) => {
            let slot = index as usize >> (MAX_DEPTH - depth);
            if slot >= 1 << depth { Ok(None) } else { reference_at(source, *depth, refs, slot).await }
        }
        UnitPlace::Inner(index) if *depth > DIRECT_DEPTH => {
            Ok(refs.get(index as usize >> (MAX_DEPTH - depth)).copied().flatten())
        }
        UnitPlace::Inner(_) => Ok(None),
    }
}

/// Whether a directory holds no entry at all, whatever they may be worth.
pub fn is_empty(content: &Content) -> bool {
    match content {
        Content::Entries(entries) => entries.is_empty(),
        Content::Buckets { refs, .. } => refs.iter().all(Option::is_none),
        _ => false,
    }
}

/// A bucket under change.
struct Working {
    /// Upper 16 bits of the first hash it can hold.
    prefix: u16,
    local_depth: u8,
    names: NameSet,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Stored(Option<UnitRef>),
    Working(usize),
}

/// Slots that lie in one unit: the body, or an inner unit.
struct Group {
    stored: Option<UnitRef>,
    slots: Option<Vec<Slot>>,
    changed: bool,
}

/// A change of a bucketed directory, from loading to the new references.
///
/// `Plan::begin` -> [`Plan::buckets`] -> units are prepared -> [`Plan::inners`] -> units are prepared -> [`Plan::content`].
pub struct Plan {
    cell: CellSize,
    depth: u8,
    groups: Vec<Group>,
    working: Vec<Working>,
    dropped: Vec<(UnitPlace, UnitRef)>,
    /// Entries more than before.
    growth: i64,
}

/// The outcome of a change.
pub enum Changed {
    /// The entries fit into the body.
    Small {
        /// The new content.
        content: Content,
        /// Units that the old tree had and the new one has not.
        dropped: Vec<(UnitPlace, UnitRef)>,
        /// Entries more than before.
        growth: i64,
    },
    /// New units are needed.
    Large(Plan),
}

/// Applies `edits` to a directory whose body is `content`.
///
/// `NoSpace`: more names share a hash than one bucket takes.
pub async fn change<S: Source>(
    source: &S,
    cell: CellSize,
    content: &Content,
    edits: &[Edit],
) -> Result<Changed, FsError> {
    let mut plan = match content {
        Content::Entries(entries) => {
            let mut names = NameSet::new(entries.clone()).map_err(|cause| source.corrupt(cause))?;
            let growth = edits.iter().map(|edit| apply(&mut names, edit)).sum::<Result<i64, _>>()?;
            if names.encoded_len() + BODY_FIXED <= unit_payload(cell) {
                let content = Content::Entries(names.into_entries());
                return Ok(Changed::Small { content, dropped: Vec::new(), growth });
            }
            Plan::of_one_bucket(cell, names, growth)
        }
        Content::Buckets { depth, refs } => {
            let mut plan = Plan::begin(source, cell, *depth, refs)?;
            for edit in edits {
                let at = plan.working_bucket(source, slot_of(name_hash(edit.name()), plan.depth)).await?;
                plan.growth += apply(&mut plan.working[at].names, edit)?;
            }
            plan
        }
        _ => return Err(not_a_directory(source)),
    };
    plan.settle_sizes(source).await?;
    if plan.is_empty() {
        let (dropped, growth) = (plan.dropped_with_groups(), plan.growth);
        return Ok(Changed::Small { content: Content::Entries(Vec::new()), dropped, growth });
    }
    Ok(Changed::Large(plan))
}

/// One edit; gives the growth in entries.
fn apply(names: &mut NameSet, edit: &Edit) -> Result<i64, FsError> {
    match edit {
        Edit::Remove(name) => Ok(-i64::from(names.remove(name).is_some())),
        Edit::Set(entry) => {
            if names.get(&entry.name).is_none() && names.group_len(&entry.name) >= MAX_GROUP {
                return Err(full());
            }
            Ok(i64::from(names.set(entry.clone()).is_none()))
        }
    }
}

fn full() -> FsError {
    let message = "the directory has no room for this name: too many names have nearly the same hash; use another name";
    FsError::refused(FsErrorKind::NoSpace, message)
}

impl Plan {
    fn of_one_bucket(cell: CellSize, names: NameSet, growth: i64) -> Plan {
        let group = Group { stored: None, slots: Some(vec![Slot::Working(0)]), changed: true };
        let working = vec![Working { prefix: 0, local_depth: 0, names }];
        Plan { cell, depth: 0, groups: vec![group], working, dropped: Vec::new(), growth }
    }

    fn begin<S: Source>(source: &S, cell: CellSize, depth: u8, refs: &[Option<UnitRef>]) -> Result<Plan, FsError> {
        if refs.len() != bucket_refs(depth) {
            let value = refs.len() as u64;
            return Err(source.corrupt(FormatError::Value { structure: "body of a directory", field: "count", value }));
        }
        let groups = if depth <= DIRECT_DEPTH {
            let slots = refs.iter().map(|r| Slot::Stored(*r)).collect();
            vec![Group { stored: None, slots: Some(slots), changed: false }]
        } else {
            refs.iter().map(|r| Group { stored: *r, slots: None, changed: false }).collect()
        };
        Ok(Plan { cell, depth, groups, working: Vec::new(), dropped: Vec::new(), growth: 0 })
    }

    /// The slots of the group that holds slot `slot`, loaded.
    async fn group<S: Source>(&mut self, source: &S, nth: usize) -> Result<&mut Group, FsError> {
        let depth = self.depth;
        let group = &mut self.groups[nth];
        if group.slots.is_none() {
            group.slots = Some(match &group.stored {
                None => vec![Slot::Stored(None); GROUP],
                Some(reference) => {
                    let refs = source.inner(reference, inner_index(nth, depth)).await?;
                    refs.iter().map(|r| Slot::Stored(*r)).collect()
                }
            });
        }
        Ok(group)
    }

    async fn slot<S: Source>(&mut self, source: &S, slot: usize) -> Result<Slot, FsError> {
        let group = self.group(source, slot / GROUP).await?;
        Ok(group.slots.as_ref().expect("was loaded")[slot % GROUP])
    }

    async fn set_slots<S: Source>(
        &mut self,
        source: &S,
        slots: std::ops::Range<usize>,
        to: Slot,
    ) -> Result<(), FsError> {
        for slot in slots {
            let group = self.group(source, slot / GROUP).await?;
            group.changed = true;
            group.slots.as_mut().expect("was loaded")[slot % GROUP] = to;
        }
        Ok(())
    }

    /// The slots that a bucket fills.
    fn slots_of(&self, prefix: u16, local_depth: u8) -> std::ops::Range<usize> {
        let first = usize::from(prefix) >> (MAX_DEPTH - self.depth);
        first..first + (1 << (self.depth - local_depth))
    }

    /// Takes the bucket of `slot` into work, if it is not yet; an empty slot becomes an empty bucket of its own.
    async fn working_bucket<S: Source>(&mut self, source: &S, slot: usize) -> Result<usize, FsError> {
        let working = match self.slot(source, slot).await? {
            Slot::Working(at) => return Ok(at),
            Slot::Stored(None) => {
                let prefix = bucket_index(slot, self.depth, self.depth) as u16;
                Working { prefix, local_depth: self.depth, names: NameSet::default() }
            }
            Slot::Stored(Some(reference)) => {
                let mut local_depth = self.depth;
                while local_depth > 0 {
                    let sibling = sibling_of(slot, self.depth, local_depth);
                    if self.slot(source, sibling).await? != Slot::Stored(Some(reference)) {
                        break;
                    }
                    local_depth -= 1;
                }
                let bucket = load_bucket(source, self.depth, slot, local_depth, &reference).await?;
                let prefix = bucket_index(slot, self.depth, local_depth) as u16;
                self.dropped.push((UnitPlace::Bucket(prefix.into()), reference));
                Working { prefix, local_depth: bucket.local_depth, names: bucket.names.clone() }
            }
        };
        let at = self.working.len();
        let slots = self.slots_of(working.prefix, working.local_depth);
        self.working.push(working);
        self.set_slots(source, slots, Slot::Working(at)).await?;
        Ok(at)
    }

    /// Splits what is too large, takes out what is empty.
    async fn settle_sizes<S: Source>(&mut self, source: &S) -> Result<(), FsError> {
        let mut at = 0;
        while at < self.working.len() {
            if self.working[at].names.encoded_len() > bucket_room(self.cell) {
                self.split(source, at).await?;
                continue;
            }
            if self.working[at].names.entries().is_empty() {
                let slots = self.slots_of(self.working[at].prefix, self.working[at].local_depth);
                self.set_slots(source, slots, Slot::Stored(None)).await?;
            }
            at += 1;
        }
        Ok(())
    }

    async fn split<S: Source>(&mut self, source: &S, at: usize) -> Result<(), FsError> {
        let local_depth = self.working[at].local_depth;
        if local_depth == MAX_DEPTH {
            return Err(full());
        }
        if local_depth == self.depth {
            self.double(source).await?;
        }
        let (low, high) = std::mem::take(&mut self.working[at].names).split(local_depth);
        let prefix = self.working[at].prefix | 1 << (MAX_DEPTH - 1 - local_depth);
        self.working[at].names = low;
        self.working[at].local_depth = local_depth + 1;
        let upper = self.working.len();
        self.working.push(Working { prefix, local_depth: local_depth + 1, names: high });
        let slots = self.slots_of(prefix, local_depth + 1);
        self.set_slots(source, slots, Slot::Working(upper)).await
    }

    /// Doubles the tree: every slot becomes two.
    async fn double<S: Source>(&mut self, source: &S) -> Result<(), FsError> {
        let mut doubled = Vec::with_capacity(2 << self.depth);
        for nth in 0..self.groups.len() {
            let group = self.group(source, nth).await?;
            doubled.extend(group.slots.take().expect("was loaded").into_iter().flat_map(|slot| [slot, slot]));
        }
        self.drop_groups();
        self.depth += 1;
        let per_group = doubled.len().min(GROUP);
        let group = |slots: &[Slot]| Group { stored: None, slots: Some(slots.to_vec()), changed: true };
        self.groups = doubled.chunks(per_group).map(group).collect();
        Ok(())
    }

    /// Lists the stored inner units as dropped, as far as they are still this tree's.
    fn drop_groups(&mut self) {
        let depth = self.depth;
        for (nth, group) in self.groups.iter_mut().enumerate() {
            if let Some(reference) = group.stored.take() {
                self.dropped.push((UnitPlace::Inner(inner_index(nth, depth)), reference));
            }
        }
    }

    fn dropped_with_groups(&mut self) -> Vec<(UnitPlace, UnitRef)> {
        self.drop_groups();
        std::mem::take(&mut self.dropped)
    }

    fn is_empty(&self) -> bool {
        self.groups.iter().all(|group| match &group.slots {
            Some(slots) => slots.iter().all(|slot| *slot == Slot::Stored(None)),
            None => group.stored.is_none(),
        })
    }

    /// The buckets to be stored: index and stream of each, in the order in which [`Plan::inners`] takes their references.
    pub fn buckets(&self) -> Vec<(u32, Vec<u8>)> {
        let stored = self.working.iter().filter(|w| !w.names.entries().is_empty());
        stored.map(|w| (w.prefix.into(), encode_bucket(w.local_depth, w.names.entries()))).collect()
    }

    /// The buckets of [`Plan::buckets`] as they will be read back, for the cache.
    pub fn cached_buckets(&self) -> Vec<Rc<Bucket>> {
        let stored = self.working.iter().filter(|w| !w.names.entries().is_empty());
        stored.map(|w| Rc::new(Bucket { local_depth: w.local_depth, names: w.names.clone() })).collect()
    }

    /// Takes the references of the buckets; gives the inner units to be stored: index and stream of each.
    pub fn inners(&mut self, buckets: &[UnitRef]) -> Vec<(u32, Vec<u8>)> {
        let mut given = buckets.iter();
        let references: Vec<Option<UnitRef>> = self
            .working
            .iter()
            .map(|w| if w.names.entries().is_empty() { None } else { given.next().copied() })
            .collect();
        for slot in self.groups.iter_mut().filter_map(|g| g.slots.as_mut()).flatten() {
            if let Slot::Working(at) = *slot {
                *slot = Slot::Stored(references[at]);
            }
        }
        if self.depth <= DIRECT_DEPTH {
            return Vec::new();
        }
        let depth = self.depth;
        let mut streams = Vec::new();
        for (nth, group) in self.groups.iter_mut().enumerate().filter(|(_, group)| group.changed) {
            if let Some(reference) = group.stored.take() {
                self.dropped.push((UnitPlace::Inner(inner_index(nth, depth)), reference));
            }
            let refs = stored_refs(group);
            if refs.iter().any(Option::is_some) {
                streams.push((inner_index(nth, depth), pack_refs(&refs)));
            }
        }
        streams
    }

    /// Takes the references of the inner units; gives the new content, the units that it no longer has, the growth in entries.
    pub fn content(mut self, inners: &[UnitRef]) -> (Content, Vec<(UnitPlace, UnitRef)>, i64) {
        let refs = if self.depth <= DIRECT_DEPTH {
            stored_refs(&self.groups[0])
        } else {
            let mut given = inners.iter();
            let mut reference = |group: &Group| {
                if !group.changed {
                    return group.stored;
                }
                if stored_refs(group).iter().any(Option::is_some) { given.next().copied() } else { None }
            };
            self.groups.iter().map(&mut reference).collect()
        };
        (Content::Buckets { depth: self.depth, refs }, std::mem::take(&mut self.dropped), self.growth)
    }
}

/// The references of a loaded group, after its working buckets were stored.
fn stored_refs(group: &Group) -> Vec<Option<UnitRef>> {
    let slots = group.slots.iter().flatten();
    slots.map(|slot| if let Slot::Stored(reference) = slot { *reference } else { None }).collect()
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
