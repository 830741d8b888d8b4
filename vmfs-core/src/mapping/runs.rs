//! Owns: the run map of an open file: which range of the file lies where on which LUN, and in which granule state.
//! Promises: lookups allocate nothing; memory is bounded, and what is not yet published is never forgotten.
//! Must not know: pointer blocks, locks, I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::granules::{BlockState, GranuleEvent, GranuleState, Place};
use crate::format::pointer::Granules;
use crate::units::{BlockNo, BlockSize, GRANULES_PER_BLOCK, LunIndex};

/// Extents that can be read again and are kept all the same, when nothing else is said (about 5 MiB of memory).
pub const DEFAULT_CLEAN_EXTENTS: usize = 65_536;

/// What is known of a range of file blocks.
#[derive(Clone, Copy, Debug)]
enum State {
    /// No pointer: reads as zeros.
    Hole,
    /// Blocks that follow one another on one LUN, all granules valid (`written`) or none.
    Run { place: Place, written: bool },
    /// One block by itself.
    Block(BlockState),
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    blocks: u64,
    state: State,
}

/// What a pointer block says of one block, or of a range of holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// No pointer.
    Hole,
    /// A pointer to this place with these granules.
    Block(Place, Granules),
}

/// What a byte range is to data I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Lies at this byte offset of a LUN: read and written in place.
    Data {
        /// The LUN.
        lun: LunIndex,
        /// Bytes from the LUN's start.
        offset: u64,
    },
    /// A block is there, the granules were never written: reads as zeros, a writer fills whole granules.
    Unwritten,
    /// Another writer fills it: reads as zeros, a writer waits.
    Filling,
    /// No block: reads as zeros, a writer needs one.
    Hole,
    /// Not in the map (or being taken away): the pointer blocks must be read first.
    Unknown,
}

/// A stretch of a file of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Class; `Data` gives the place of the first byte.
    pub class: Class,
    /// End in the file, exclusive, in bytes.
    pub end: u64,
}

/// Granules handed to one writer: it writes them whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillPiece {
    /// Where in the file, a multiple of the granule.
    pub file_offset: u64,
    /// Bytes, a multiple of the granule.
    pub length: u64,
    /// The LUN.
    pub lun: LunIndex,
    /// Bytes from the LUN's start.
    pub offset: u64,
}

/// The map of one open file. All keys are file blocks.
#[derive(Debug)]
pub struct RunMap {
    block: BlockSize,
    extents: BTreeMap<u64, Extent>,
    /// Blocks that differ from what the LUN says: never forgotten.
    dirty: BTreeSet<u64>,
    clean_limit: usize,
    hand: u64,
    frozen: Option<Range<u64>>,
    version: u64,
}

impl RunMap {
    /// An empty map that keeps at most `clean_limit` extents (at least 16) that could be read again.
    pub fn new(block: BlockSize, clean_limit: usize) -> RunMap {
        RunMap {
            block,
            extents: BTreeMap::new(),
            dirty: BTreeSet::new(),
            clean_limit: clean_limit.max(16),
            hand: 0,
            frozen: None,
            version: 0,
        }
    }

    /// The volume's block size.
    pub fn block_size(&self) -> BlockSize {
        self.block
    }

    /// Changes whenever something is published or taken away: what was read from pointer blocks before is then not believed.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Extents in memory.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The stretch that begins at byte `offset`, at most up to `limit`. Neighbours on the LUN are joined across extents.
    pub fn stretch(&self, offset: u64, limit: u64) -> Stretch {
        let mut found = self.uniform(offset);
        while found.end < limit {
            let next = self.uniform(found.end);
            let joins = match (found.class, next.class) {
                (Class::Data { lun, offset: at }, Class::Data { lun: next_lun, offset: next_at }) => {
                    lun == next_lun && at + (found.end - offset) == next_at
                }
                (class, next_class) => class == next_class,
            };
            if !joins {
                break;
            }
            found.end = next.end;
        }
        found.end = found.end.min(limit);
        found
    }

    /// The stretch of one extent (a single block: of equal granules) that begins at `offset`.
    fn uniform(&self, offset: u64) -> Stretch {
        let mut stretch = self.uniform_unfrozen(offset);
        if let Some(frozen) = &self.frozen {
            if frozen.contains(&offset) {
                return Stretch { class: Class::Unknown, end: frozen.end };
            }
            if offset < frozen.start {
                stretch.end = stretch.end.min(frozen.start);
            }
        }
        stretch
    }

    fn uniform_unfrozen(&self, offset: u64) -> Stretch {
        let shift = self.block.shift();
        let block = offset >> shift;
        let bytes_at = |end_block: u64| end_block.saturating_mul(self.block.bytes());
        let Some((start, extent)) = self.extent_at(block) else {
            let next = self.extents.range(block..).next().map_or(u64::MAX, |(start, _)| bytes_at(*start));
            return Stretch { class: Class::Unknown, end: next };
        };
        let end = bytes_at(start + extent.blocks);
        let class = match extent.state {
            State::Hole => Class::Hole,
            State::Run { written: false, .. } => Class::Unwritten,
            State::Run { place, written: true } => {
                Class::Data { lun: place.at.lun, offset: place.offset + (offset - (start << shift)) }
            }
            State::Block(state) => return self.within_block(&state, offset),
        };
        Stretch { class, end }
    }

    fn within_block(&self, state: &BlockState, offset: u64) -> Stretch {
        let granule = self.block.granule_bytes();
        let inside = offset & (self.block.bytes() - 1);
        let class_of = |g: u64| match state.state(g as u32) {
            GranuleState::Unwritten => Class::Unwritten,
            GranuleState::Filling => Class::Filling,
            GranuleState::Filled | GranuleState::Valid => {
                Class::Data { lun: state.place.at.lun, offset: state.place.offset + inside }
            }
        };
        let first = inside / granule;
        let class = class_of(first);
        let end = (first + 1..GRANULES_PER_BLOCK).find(|g| class_of(*g) != class).unwrap_or(GRANULES_PER_BLOCK);
        Stretch { class, end: offset - inside + end * granule }
    }

    fn extent_at(&self, block: u64) -> Option<(u64, &Extent)> {
        let (start, extent) = self.extents.range(..=block).next_back()?;
        if block - start < extent.blocks { Some((*start, extent)) } else { None }
    }

    /// The state of one block: `None` unknown, `Some(None)` a hole.
    pub fn block(&self, block: u64) -> Option<Option<BlockState>> {
        let (start, extent) = self.extent_at(block)?;
        Some(match extent.state {
            State::Hole => None,
            State::Run { place, written } => {
                let valid = if written { Granules::ALL } else { Granules::NONE };
                Some(BlockState::published(self.advanced(place, block - start), valid))
            }
            State::Block(state) => Some(state),
        })
    }

    fn advanced(&self, place: Place, blocks: u64) -> Place {
        let block = BlockNo::new(place.at.block.get() + blocks).expect("a run ends within its LUN");
        let mut at = place.at;
        at.block = block;
        Place { at, offset: place.offset + (blocks << self.block.shift()) }
    }

    /// Records what pointer blocks say of `blocks` blocks from `first` (one block, unless it is a hole). What the map already knows
    /// stays as it is.
    pub fn learn(&mut self, first: u64, blocks: u64, known: Known) {
        let end = first.saturating_add(blocks);
        let mut at = first;
        while at < end {
            if let Some((start, extent)) = self.extent_at(at) {
                at = start + extent.blocks;
                continue;
            }
            let gap_end = self.extents.range(at..end).next().map_or(end, |(start, _)| *start);
            match known {
                Known::Hole => self.insert(at, Extent { blocks: gap_end - at, state: State::Hole }),
                Known::Block(place, valid) => self.insert_block(at, BlockState::published(place, valid)),
            }
            at = gap_end;
        }
        self.evict();
    }

    /// Replaces what is known of one block.
    pub fn set_block(&mut self, block: u64, state: Option<BlockState>) {
        self.remove(block..block + 1);
        match state {
            None => self.insert(block, Extent { blocks: 1, state: State::Hole }),
            Some(state) => self.insert_block(block, state),
        }
        self.evict();
    }

    fn insert_block(&mut self, block: u64, state: BlockState) {
        let state = match (state.is_clean(), state.valid) {
            (true, Granules::ALL) => State::Run { place: state.place, written: true },
            (true, Granules::NONE) => State::Run { place: state.place, written: false },
            (true, _) => State::Block(state),
            (false, _) => {
                self.dirty.insert(block);
                State::Block(state)
            }
        };
        self.insert(block, Extent { blocks: 1, state });
    }

    /// Inserts into a gap and joins with equal neighbours.
    fn insert(&mut self, start: u64, extent: Extent) {
        let (mut start, mut extent) = (start, extent);
        if let Some((before, left)) = self.extents.range(..start).next_back().map(|(s, e)| (*s, *e))
            && before + left.blocks == start
            && self.joins(&left, &extent)
        {
            self.extents.remove(&before);
            extent = Extent { blocks: left.blocks + extent.blocks, state: left.state };
            start = before;
        }
        if let Some(right) = self.extents.get(&(start + extent.blocks)).copied()
            && self.joins(&extent, &right)
        {
            self.extents.remove(&(start + extent.blocks));
            extent.blocks += right.blocks;
        }
        self.extents.insert(start, extent);
    }

    fn joins(&self, left: &Extent, right: &Extent) -> bool {
        match (left.state, right.state) {
            (State::Hole, State::Hole) => true,
            (State::Run { place, written }, State::Run { place: next, written: next_written }) => {
                let follows = next.at.block.get() == place.at.block.get() + left.blocks
                    && next.offset == place.offset + (left.blocks << self.block.shift());
                written == next_written && place.at.lun == next.at.lun && follows
            }
            _ => false,
        }
    }

    /// Forgets a range of blocks, unpublished ones too.
    pub fn remove(&mut self, blocks: Range<u64>) {
        self.split_at(blocks.start);
        self.split_at(blocks.end);
        while let Some((start, _)) = self.extents.range(blocks.clone()).next() {
            let start = *start;
            self.extents.remove(&start);
            self.dirty.remove(&start);
        }
    }

    fn split_at(&mut self, block: u64) {
        let Some((start, extent)) = self.extent_at(block).map(|(s, e)| (s, *e)) else { return };
        if start == block {
            return;
        }
        let left = block - start;
        let state = match extent.state {
            State::Run { place, written } => State::Run { place: self.advanced(place, left), written },
            other => other,
        };
        self.extents.insert(start, Extent { blocks: left, ..extent });
        self.extents.insert(block, Extent { blocks: extent.blocks - left, state });
    }

    /// Forgets extents that can be read again, until an eighth of the allowed ones is free.
    fn evict(&mut self) {
        if self.extents.len() - self.dirty.len() <= self.clean_limit {
            return;
        }
        let target = self.clean_limit - self.clean_limit / 8;
        let mut turns = 0;
        while self.extents.len() - self.dirty.len() > target && turns < 2 {
            let victims: Vec<u64> = self
                .extents
                .range(self.hand..)
                .map(|(start, _)| *start)
                .filter(|start| !self.dirty.contains(start))
                .take(self.extents.len() - self.dirty.len() - target)
                .collect();
            match victims.last() {
                Some(last) => self.hand = last + 1,
                None => {
                    self.hand = 0;
                    turns += 1;
                }
            }
            for start in victims {
                self.extents.remove(&start);
            }
        }
    }

    /// Holes among the blocks of `blocks`, ascending, at most `limit`; ends at the first block that is unknown.
    pub fn holes(&self, blocks: Range<u64>, limit: usize) -> Vec<u64> {
        let mut holes = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end && holes.len() < limit {
            let Some((start, extent)) = self.extent_at(at) else { break };
            let end = (start + extent.blocks).min(blocks.end);
            if matches!(extent.state, State::Hole) {
                holes.extend((at..end).take(limit - holes.len()));
            }
            at = end;
        }
        holes
    }

    /// First block at or after `from` and before `end` of which nothing is known.
    pub fn first_unknown(&self, from: u64, end: u64) -> Option<u64> {
        let mut at = from;
        while at < end {
            match self.extent_at(at) {
                Some((start, extent)) => at = start + extent.blocks,
                None => return Some(at),
            }
        }
        None
    }

    /// Hands the unwritten granules from the one that holds `range.start` up to the first that is not unwritten, or the end of
    /// `range`, to one writer. Empty when the first one is not unwritten or has no block.
    pub fn begin_fill(&mut self, range: Range<u64>) -> Vec<FillPiece> {
        let granule = self.block.granule_bytes();
        let mut pieces: Vec<FillPiece> = Vec::new();
        let mut at = range.start - range.start % granule;
        while at < range.end && self.frozen.as_ref().is_none_or(|frozen| !frozen.contains(&at)) {
            let block = at >> self.block.shift();
            let Some(Some(mut state)) = self.block(block) else { break };
            let first = (at - (block << self.block.shift())) / granule;
            let last = (range.end - (block << self.block.shift())).div_ceil(granule).min(GRANULES_PER_BLOCK);
            let count = (first..last).take_while(|g| state.state(*g as u32) == GranuleState::Unwritten).count() as u64;
            if count == 0 {
                break;
            }
            state.apply(Granules::range(first as u32, (first + count) as u32), GranuleEvent::BeginFill);
            self.set_block(block, Some(state));
            let (lun, offset) = (state.place.at.lun, state.place.offset + first * granule);
            match pieces.last_mut() {
                Some(last) if last.lun == lun && last.offset + last.length == offset => last.length += count * granule,
                _ => pieces.push(FillPiece { file_offset: at, length: count * granule, lun, offset }),
            }
            at += count * granule;
            if first + count < GRANULES_PER_BLOCK {
                break;
            }
        }
        pieces
    }

    /// Ends what [`RunMap::begin_fill`] began, granule by granule: written whole (`EndFill`) or given up (`AbandonFill`).
    pub fn end_fill(&mut self, range: Range<u64>, event: GranuleEvent) {
        self.for_each_block(range, |map, block, which| {
            if let Some(Some(mut state)) = map.block(block) {
                state.apply(which, event);
                map.set_block(block, Some(state));
            }
        });
    }

    /// Calls `each` with every block of a byte range and those of its granules that the range touches.
    fn for_each_block(&mut self, range: Range<u64>, mut each: impl FnMut(&mut RunMap, u64, Granules)) {
        let (shift, granule) = (self.block.shift(), self.block.granule_bytes());
        let mut at = range.start;
        while at < range.end {
            let block = at >> shift;
            let start = block << shift;
            let end = range.end.min(start + self.block.bytes());
            each(self, block, Granules::range(((at - start) / granule) as u32, (end - start).div_ceil(granule) as u32));
            at = end;
        }
    }

    /// Blocks that differ from what the LUN says, from `from` on, ascending.
    pub fn unpublished(&self, from: u64) -> impl Iterator<Item = (u64, BlockState)> + '_ {
        self.dirty.range(from..).filter_map(|block| match self.extents.get(block)?.state {
            State::Block(state) => Some((*block, state)),
            _ => None,
        })
    }

    /// How many blocks differ from what the LUN says.
    pub fn unpublished_count(&self) -> usize {
        self.dirty.len()
    }

    /// The pointer of `block` with the bits `bits` is on the LUN.
    pub fn published(&mut self, block: u64, bits: Granules) {
        if let Some(Some(mut state)) = self.block(block) {
            state.apply(bits, GranuleEvent::Publish);
            state.fresh = false;
            state.wanted = false;
            self.set_block(block, Some(state));
        }
        self.version += 1;
    }

    /// Makes a byte range unknown to data I/O while it is taken away; what is known of it stays in the map.
    pub fn freeze(&mut self, range: Range<u64>) {
        self.frozen = Some(range);
        self.version += 1;
    }

    /// Ends [`RunMap::freeze`].
    pub fn thaw(&mut self) {
        self.frozen = None;
        self.version += 1;
    }

    /// Whether `range` overlaps what is being taken away.
    pub fn is_frozen(&self, range: &Range<u64>) -> bool {
        self.frozen.as_ref().is_some_and(|frozen| frozen.start < range.end && range.start < frozen.end)
    }

    /// Forgets everything, unpublished blocks too.
    pub fn clear(&mut self) {
        self.extents.clear();
        self.dirty.clear();
        self.version += 1;
    }
}

#[cfg(test)]
#[path = "runs_tests.rs"]
mod tests;
