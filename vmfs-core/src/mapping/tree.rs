//! Owns: the way from a file block to its pointer: heights, pointer blocks, inner units, and how a root array is rewritten.
//! Promises: a mapping of any height the format has is walked without reading what is not there.
//! Must not know: locks, runs, who publishes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::error::FsError;
use crate::format::body::{MAX_ROOT_POINTERS, MAX_ROOT_REFS, MappingRoot, pack_refs};
use crate::format::layout::{pointers_per_block, pointers_per_cell};
use crate::format::pointer::{pack_pb_reference, stored_at, unpack_pb_reference};
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::format::{CellKind, FormatError};
use crate::units::{BlockSize, CellSize, UnitAddress};

/// References of an upper inner unit (height 4): each names a leaf.
pub const UPPER_REFS: usize = 256;
/// Bit of the index of an upper inner unit, so that it differs from every leaf's.
pub const UPPER_INDEX: u32 = 1 << 31;
/// File blocks that a file can have: the reverse map keeps 32 bits.
pub const MAX_FILE_BLOCKS: u64 = 1 << 32;
/// Decoded inner units that are kept for one file.
const KEPT_INNER: usize = 8;

/// Where the pointer of a file block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointerPlace {
    /// Number of the pointer block in the file.
    pub pb: u32,
    /// Cell in the pointer block.
    pub cell: usize,
    /// Pointer in the cell.
    pub nth: usize,
}

/// The numbers of a mapping, which follow from the cell size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    cell: CellSize,
}

impl Shape {
    /// For volumes of this cell size.
    pub const fn new(cell: CellSize) -> Shape {
        Shape { cell }
    }

    /// File blocks of one pointer block: 832 or 1000.
    pub const fn per_pb(self) -> u64 {
        pointers_per_block(self.cell) as u64
    }

    /// File blocks of one PB cell: 52 or 500.
    pub const fn per_cell(self) -> u64 {
        pointers_per_cell(self.cell) as u64
    }

    /// Place of the pointer of a file block below [`MAX_FILE_BLOCKS`].
    pub const fn place(self, block: u64) -> PointerPlace {
        let inside = block % self.per_pb();
        PointerPlace {
            pb: (block / self.per_pb()) as u32,
            cell: (inside / self.per_cell()) as usize,
            nth: (inside % self.per_cell()) as usize,
        }
    }

    /// First file block of a pointer block.
    pub const fn first_block(self, pb: u32) -> u64 {
        pb as u64 * self.per_pb()
    }

    /// Pointer blocks that a mapping of this height can hold.
    pub const fn capacity(self, height: u8) -> u64 {
        match height {
            2 => MAX_ROOT_POINTERS as u64,
            3 => MAX_ROOT_REFS as u64 * self.per_pb(),
            _ => MAX_ROOT_REFS as u64 * UPPER_REFS as u64 * self.per_pb(),
        }
    }

    /// Smallest height for pointer block `pb`.
    pub const fn height_for(self, pb: u32) -> u8 {
        let mut height = 2;
        while self.capacity(height) <= pb as u64 && height < crate::format::body::MAX_HEIGHT {
            height += 1;
        }
        height
    }

    /// The empty mapping of a disk or file of `bytes` bytes: of its final height, so that it never grows another level.
    pub const fn empty_root(self, bytes: u64, block: BlockSize) -> MappingRoot {
        let blocks = bytes.div_ceil(block.bytes());
        let last = if blocks == 0 { 0 } else { (blocks - 1) / self.per_pb() };
        match self.height_for(if last > u32::MAX as u64 { u32::MAX } else { last as u32 }) {
            2 => MappingRoot::PointerBlocks(Vec::new()),
            height => MappingRoot::Inner { height, refs: Vec::new() },
        }
    }
}

/// Height of a mapping: 2, 3 or 4.
pub fn height(root: &MappingRoot) -> u8 {
    match root {
        MappingRoot::PointerBlocks(_) => 2,
        MappingRoot::Inner { height, .. } => *height,
    }
}

/// A decoded inner unit.
#[derive(Clone, Debug)]
pub enum Inner {
    /// References to pointer blocks.
    Leaf(Vec<Option<UnitAddress>>),
    /// References to leaves.
    Upper(Vec<Option<UnitRef>>),
}

impl Inner {
    /// Decodes the stream of a leaf. A short stream has no references behind its end.
    pub fn decode_leaf(shape: Shape, stream: &[u8]) -> Result<Inner, FormatError> {
        let count = (stream.len() / 8).min(shape.per_pb() as usize);
        let refs = (0..count).map(|n| unpack_pb_reference(stored_at(stream, n, "inner unit")?));
        Ok(Inner::Leaf(refs.collect::<Result<_, _>>()?))
    }

    /// Decodes the stream of an upper inner unit.
    pub fn decode_upper(shape: Shape, stream: &[u8]) -> Result<Inner, FormatError> {
        let count = (stream.len() / UNIT_REF_BYTES).min(UPPER_REFS);
        let refs = (0..count).map(|n| UnitRef::unpack(shape.cell, &stream[n * UNIT_REF_BYTES..]));
        Ok(Inner::Upper(refs.collect::<Result<_, _>>()?))
    }
}

/// Reads inner units; the engine's unit reader behind it checks owner, link, index and checksum.
pub trait InnerSource {
    /// The stream of the inner unit with this reference and index.
    fn read_inner(
        &self,
        reference: &UnitRef,
        kind: CellKind,
        index: u32,
    ) -> impl Future<Output = Result<Vec<u8>, FsError>>;
}

/// Decoded inner units of one file. They are immutable: a reference always means the same content.
#[derive(Debug, Default)]
pub struct InnerCache {
    kept: RefCell<Vec<(UnitRef, Rc<Inner>)>>,
}

/// One image of a mapping.
pub struct Tree<'a, S> {
    /// Numbers.
    pub shape: Shape,
    /// Root array of the body.
    pub root: &'a MappingRoot,
    /// Reader of inner units.
    pub source: &'a S,
    /// Decoded inner units.
    pub cache: &'a InnerCache,
    /// How messages name the object.
    pub name: String,
}

impl<S: InnerSource> Tree<'_, S> {
    /// The pointer block with this number, if it is attached.
    pub async fn find(&self, pb: u32) -> Result<Option<UnitAddress>, FsError> {
        Ok(self.next_attached(pb).await?.filter(|(found, _)| *found == pb).map(|(_, at)| at))
    }

    /// The first attached pointer block at or after `from`.
    pub async fn next_attached(&self, from: u32) -> Result<Option<(u32, UnitAddress)>, FsError> {
        let refs = match self.root {
            MappingRoot::PointerBlocks(refs) => return Ok(first_set(refs, from as usize).map(|(n, at)| (n as u32, at))),
            MappingRoot::Inner { refs, .. } => refs,
        };
        let per_leaf = self.shape.per_pb();
        let per_root = if height(self.root) == 3 { 1 } else { UPPER_REFS as u64 };
        let mut from = u64::from(from);
        let mut slot = from / per_leaf / per_root;
        while let Some((found, reference)) = first_set(refs, slot as usize) {
            from = from.max(found as u64 * per_root * per_leaf);
            if let Some(hit) = self.next_below(&reference, found as u64, from).await? {
                return Ok(Some(hit));
            }
            slot = found as u64 + 1;
        }
        Ok(None)
    }

    /// The first attached pointer block at or after `from` below slot `slot` of the root array.
    async fn next_below(&self, at: &UnitRef, slot: u64, from: u64) -> Result<Option<(u32, UnitAddress)>, FsError> {
        if height(self.root) == 3 {
            return self.next_in_leaf(at, slot, from).await;
        }
        let upper = self.inner(at, UPPER_INDEX | slot as u32, false).await?;
        let Inner::Upper(leaves) = &*upper else { return Ok(None) };
        let per_leaf = self.shape.per_pb();
        let first_leaf = slot * UPPER_REFS as u64;
        let mut nth = (from / per_leaf).saturating_sub(first_leaf);
        while let Some((found, reference)) = first_set(leaves, nth as usize) {
            let leaf = first_leaf + found as u64;
            if let Some(hit) = self.next_in_leaf(&reference, leaf, from.max(leaf * per_leaf)).await? {
                return Ok(Some(hit));
            }
            nth = found as u64 + 1;
        }
        Ok(None)
    }

    async fn next_in_leaf(&self, at: &UnitRef, leaf: u64, from: u64) -> Result<Option<(u32, UnitAddress)>, FsError> {
        let inner = self.inner(at, leaf as u32, true).await?;
        let Inner::Leaf(refs) = &*inner else { return Ok(None) };
        let first = leaf * self.shape.per_pb();
        Ok(first_set(refs, (from - first) as usize).map(|(n, unit)| ((first + n as u64) as u32, unit)))
    }

    /// Every inner unit of the mapping with its index; for freeing and checking.
    pub async fn inner_units(&self) -> Result<Vec<(u32, UnitRef)>, FsError> {
        let MappingRoot::Inner { height, refs } = self.root else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for (slot, reference) in refs.iter().enumerate().filter_map(|(n, r)| r.map(|r| (n as u32, r))) {
            if *height == 3 {
                all.push((slot, reference));
                continue;
            }
            all.push((UPPER_INDEX | slot, reference));
            let upper = self.inner(&reference, UPPER_INDEX | slot, false).await?;
            let Inner::Upper(leaves) = &*upper else { continue };
            let first = slot * UPPER_REFS as u32;
            all.extend(leaves.iter().enumerate().filter_map(|(n, r)| r.map(|r| (first + n as u32, r))));
        }
        Ok(all)
    }

    async fn inner(&self, at: &UnitRef, index: u32, leaf: bool) -> Result<Rc<Inner>, FsError> {
        if let Some((_, found)) = self.cache.kept.borrow().iter().find(|(kept, _)| kept == at) {
            return Ok(found.clone());
        }
        let stream = self.source.read_inner(at, CellKind::Inner, index).await?;
        let decoded =
            if leaf { Inner::decode_leaf(self.shape, &stream) } else { Inner::decode_upper(self.shape, &stream) };
        let decoded = Rc::new(decoded.map_err(|cause| FsError::Corrupt {
            structure: format!("inner mapping unit {} of {}", at.at, self.name),
            cause,
        })?);
        let mut kept = self.cache.kept.borrow_mut();
        if kept.len() == KEPT_INNER {
            kept.remove(0);
        }
        kept.push((*at, decoded.clone()));
        Ok(decoded)
    }

    /// What has to be written so that the mapping says `changes` (a pointer block number: attached there, or no longer).
    pub async fn rewrite(&self, changes: &BTreeMap<u32, Option<UnitAddress>>) -> Result<Rewrite, FsError> {
        let Some(last) =
            changes.iter().rev().find(|(_, at)| at.is_some()).map(|(pb, _)| *pb).or(changes.keys().last().copied())
        else {
            return Ok(Rewrite::unchanged(self.root));
        };
        let target = height(self.root).max(self.shape.height_for(last));
        if target == 2 {
            let MappingRoot::PointerBlocks(refs) = self.root else { unreachable!("the height is 2") };
            let mut refs = refs.clone();
            changes.iter().for_each(|(pb, at)| set(&mut refs, *pb as usize, *at));
            return Ok(Rewrite { height: 2, pointer_blocks: refs, ..Rewrite::unchanged(self.root) });
        }
        self.rewrite_leaves(changes, target).await
    }

    async fn rewrite_leaves(
        &self,
        changes: &BTreeMap<u32, Option<UnitAddress>>,
        target: u8,
    ) -> Result<Rewrite, FsError> {
        let per_leaf = self.shape.per_pb();
        let mut rewrite = Rewrite { height: target, ..Rewrite::unchanged(self.root) };
        let mut by_leaf: BTreeMap<u32, BTreeMap<usize, Option<UnitAddress>>> = BTreeMap::new();
        if let MappingRoot::PointerBlocks(refs) = self.root {
            for (pb, at) in refs.iter().enumerate().filter(|(_, at)| at.is_some()) {
                by_leaf.entry((pb as u64 / per_leaf) as u32).or_default().insert((pb as u64 % per_leaf) as usize, *at);
            }
        }
        for (pb, at) in changes {
            let (leaf, nth) = (u64::from(*pb) / per_leaf, (u64::from(*pb) % per_leaf) as usize);
            by_leaf.entry(leaf as u32).or_default().insert(nth, *at);
        }
        for (leaf, edits) in by_leaf {
            let old = self.leaf_reference(leaf).await?;
            let mut refs = match &old {
                Some(reference) => match &*self.inner(reference, leaf, true).await? {
                    Inner::Leaf(refs) => refs.clone(),
                    Inner::Upper(_) => Vec::new(),
                },
                None => Vec::new(),
            };
            edits.into_iter().for_each(|(nth, at)| set(&mut refs, nth, at));
            rewrite.dropped.extend(old.map(|reference| (leaf, reference)));
            rewrite.leaves.insert(leaf, refs);
        }
        rewrite.keep_uppers(self, target).await?;
        Ok(rewrite)
    }

    async fn leaf_reference(&self, leaf: u32) -> Result<Option<UnitRef>, FsError> {
        let MappingRoot::Inner { height, refs } = self.root else { return Ok(None) };
        if *height == 3 {
            return Ok(refs.get(leaf as usize).copied().flatten());
        }
        let (slot, nth) = (leaf / UPPER_REFS as u32, leaf as usize % UPPER_REFS);
        let Some(upper) = refs.get(slot as usize).copied().flatten() else { return Ok(None) };
        match &*self.inner(&upper, UPPER_INDEX | slot, false).await? {
            Inner::Upper(leaves) => Ok(leaves.get(nth).copied().flatten()),
            Inner::Leaf(_) => Ok(None),
        }
    }
}

/// New inner units and what they replace. The leaves are written first, then [`Rewrite::uppers`] with their references, then
/// [`Rewrite::root`] is the root array of the new body.
#[derive(Debug)]
pub struct Rewrite {
    height: u8,
    pointer_blocks: Vec<Option<UnitAddress>>,
    refs: Vec<Option<UnitRef>>,
    leaves: BTreeMap<u32, Vec<Option<UnitAddress>>>,
    uppers: BTreeMap<u32, Vec<Option<UnitRef>>>,
    dropped: Vec<(u32, UnitRef)>,
}

impl Rewrite {
    fn unchanged(root: &MappingRoot) -> Rewrite {
        let (pointer_blocks, refs) = match root {
            MappingRoot::PointerBlocks(refs) => (refs.clone(), Vec::new()),
            MappingRoot::Inner { refs, .. } => (Vec::new(), refs.clone()),
        };
        let (leaves, uppers) = (BTreeMap::new(), BTreeMap::new());
        Rewrite { height: height(root), pointer_blocks, refs, leaves, uppers, dropped: Vec::new() }
    }

    /// Gathers the upper units above the changed leaves; a mapping of height 3 that grows to 4 gets its first one.
    async fn keep_uppers<S: InnerSource>(&mut self, tree: &Tree<'_, S>, target: u8) -> Result<(), FsError> {
        let old = height(tree.root);
        if target == 3 {
            if old == 2 {
                self.refs = Vec::new();
            }
            return Ok(());
        }
        if old < 4 {
            let leaves = std::mem::take(&mut self.refs);
            if leaves.iter().any(Option::is_some) {
                self.uppers.insert(0, leaves);
            }
        }
        let slots: Vec<u32> = self.leaves.keys().map(|leaf| leaf / UPPER_REFS as u32).collect();
        for slot in slots {
            if self.uppers.contains_key(&slot) {
                continue;
            }
            let reference = if old == 4 { self.refs.get(slot as usize).copied().flatten() } else { None };
            let leaves = match &reference {
                Some(at) => match &*tree.inner(at, UPPER_INDEX | slot, false).await? {
                    Inner::Upper(leaves) => leaves.clone(),
                    Inner::Leaf(_) => Vec::new(),
                },
                None => Vec::new(),
            };
            self.dropped.extend(reference.map(|at| (UPPER_INDEX | slot, at)));
            self.uppers.insert(slot, leaves);
        }
        Ok(())
    }

    /// Inner units that the new mapping does not name any more, with their indexes.
    pub fn dropped(&self) -> &[(u32, UnitRef)] {
        &self.dropped
    }

    /// Leaves to write, with their index; `None`: the leaf has become empty and is not written.
    pub fn leaves(&self) -> Vec<(u32, Option<Vec<u8>>)> {
        let stream = |refs: &Vec<Option<UnitAddress>>| -> Option<Vec<u8>> {
            let used = refs.iter().rposition(Option::is_some)? + 1;
            Some(refs[..used].iter().flat_map(|at| pack_pb_reference(*at).to_le_bytes()).collect())
        };
        self.leaves.iter().map(|(leaf, refs)| (*leaf, stream(refs))).collect()
    }

    /// Says where a leaf of [`Rewrite::leaves`] is written (`None`: not at all).
    pub fn set_leaf(&mut self, leaf: u32, at: Option<UnitRef>) {
        if self.height == 3 {
            set(&mut self.refs, leaf as usize, at);
            return;
        }
        let (slot, nth) = (leaf / UPPER_REFS as u32, leaf as usize % UPPER_REFS);
        set(self.uppers.entry(slot).or_default(), nth, at);
    }

    /// Upper units to write, with their index, once all leaves are set.
    pub fn uppers(&self) -> Vec<(u32, Option<Vec<u8>>)> {
        let stream = |refs: &Vec<Option<UnitRef>>| refs.iter().any(Option::is_some).then(|| pack_refs(refs));
        self.uppers.iter().map(|(slot, refs)| (UPPER_INDEX | *slot, stream(refs))).collect()
    }

    /// Says where an upper unit of [`Rewrite::uppers`] is written.
    pub fn set_upper(&mut self, index: u32, at: Option<UnitRef>) {
        set(&mut self.refs, (index & !UPPER_INDEX) as usize, at);
    }

    /// The new root array.
    pub fn root(self) -> MappingRoot {
        match self.height {
            2 => MappingRoot::PointerBlocks(self.pointer_blocks),
            height => MappingRoot::Inner { height, refs: self.refs },
        }
    }
}

fn first_set<T: Copy>(refs: &[Option<T>], from: usize) -> Option<(usize, T)> {
    let (nth, found) = refs.iter().enumerate().skip(from).find(|(_, r)| r.is_some())?;
    found.map(|value| (nth, value))
}

/// Sets an element, growing the array as needed and cutting empty ones off its end.
fn set<T: Copy>(refs: &mut Vec<Option<T>>, nth: usize, value: Option<T>) {
    if nth >= refs.len() {
        refs.resize(nth + 1, None);
    }
    refs[nth] = value;
    while refs.last().is_some_and(Option::is_none) {
        refs.pop();
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
