//! Owns: what a check says to the repair: for each thing that is wrong, what would put it right.
//! Promises: a remedy names its place as a value, never as text; it is only a proposal: the repair reads the place again.
//! Must not know: how anything is changed.

use std::collections::{BTreeSet, HashMap};

use crate::format::dirent::ObjectRef;
use crate::format::root_cell::ObjectType;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::units::{BlockAddress, CellAddress, FdId, LunIndex, UnitAddress};

/// Remedies of one kind that are kept: the next check finds the others.
const KEPT: usize = 1 << 16;

/// What an object says of a unit or block whose table entry could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claimed {
    pub owner: FdId,
    pub kind: EntryKind,
    pub index: u32,
}

/// Who names an object whose root cell could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedBy {
    pub directory: FdId,
    pub child: ObjectRef,
    pub object_type: ObjectType,
}

/// Everything that a check proposes.
#[derive(Default)]
pub(crate) struct Remedies {
    /// Blocks and units that nothing reaches, with the entry that says so.
    pub free_blocks: Vec<(BlockAddress, TableEntry)>,
    pub free_units: Vec<(UnitAddress, TableEntry)>,
    /// Marked as being dropped, and still in use.
    pub keep_blocks: Vec<(BlockAddress, TableEntry)>,
    pub keep_units: Vec<(UnitAddress, TableEntry)>,
    /// Damaged cells of the block table, by their number.
    pub block_cells: BTreeSet<(LunIndex, u64)>,
    /// Damaged cells of unit tables, with their container.
    pub unit_cells: BTreeSet<(CellAddress, BlockAddress)>,
    /// Entries that no entry can be.
    pub block_entries: Vec<BlockAddress>,
    pub unit_entries: Vec<UnitAddress>,
    /// What objects say of blocks and units whose entries are unknown or impossible.
    pub claimed_blocks: HashMap<BlockAddress, Claimed>,
    pub claimed_units: HashMap<UnitAddress, Claimed>,
    /// Containers that were recognised by their first cell.
    pub fd_containers: BTreeSet<BlockAddress>,
    pub unit_containers: BTreeSet<BlockAddress>,
    /// Blocks that ought to be containers, as somebody names something in them.
    pub lost_containers: BTreeSet<BlockAddress>,
    /// Blocks and units whose owner's container is not there.
    pub ownerless_blocks: Vec<(BlockAddress, TableEntry)>,
    pub ownerless_units: Vec<(UnitAddress, TableEntry)>,
    /// Units that an object reaches: a bit each, by container.
    pub units_reached: HashMap<BlockAddress, Vec<u64>>,
    /// Damaged cells of units, used or not, with what the unit's entry says.
    pub unit_images: Vec<(CellAddress, TableEntry)>,
    /// Objects whose creation or removal was cut off before, or after, they had a name.
    pub unfinished: BTreeSet<FdId>,
    /// Objects about to lose their name that still have it.
    pub settle: BTreeSet<FdId>,
    /// Objects with lock holders.
    pub locked: BTreeSet<FdId>,
    /// Objects whose hint of used blocks is wrong: how many there are.
    pub counts: HashMap<FdId, u64>,
    /// Objects with something wrong in themselves.
    pub objects: BTreeSet<FdId>,
    pub named_by: HashMap<FdId, NamedBy>,
    /// Directories with entries that count for nothing.
    pub leftovers: BTreeSet<FdId>,
    /// Entries that contradict what they name.
    pub entries: Vec<(FdId, Vec<u8>)>,
    /// Objects that nothing names, and directories that do not lead to the root.
    pub orphans: BTreeSet<FdId>,
    pub cut_off: BTreeSet<FdId>,
}

impl Remedies {
    pub fn free_block(&mut self, at: BlockAddress, entry: &TableEntry) {
        keep(&mut self.free_blocks, (at, *entry));
    }

    pub fn free_unit(&mut self, at: UnitAddress, entry: &TableEntry) {
        keep(&mut self.free_units, (at, *entry));
    }

    pub fn ownerless_block(&mut self, at: BlockAddress, entry: &TableEntry) {
        keep(&mut self.ownerless_blocks, (at, *entry));
    }

    pub fn ownerless_unit(&mut self, at: UnitAddress, entry: &TableEntry) {
        keep(&mut self.ownerless_units, (at, *entry));
    }

    /// Whether an object reaches a unit.
    pub fn is_reached(&self, at: UnitAddress) -> bool {
        let words = self.units_reached.get(&BlockAddress { lun: at.lun, block: at.block });
        words.is_some_and(|words| words[usize::from(at.unit) / 64] >> (at.unit % 64) & 1 == 1)
    }

    pub fn keep_block(&mut self, at: BlockAddress, entry: &TableEntry) {
        keep(&mut self.keep_blocks, (at, *entry));
    }

    pub fn keep_unit(&mut self, at: UnitAddress, entry: &TableEntry) {
        keep(&mut self.keep_units, (at, *entry));
    }

    pub fn block_entry(&mut self, at: BlockAddress) {
        keep(&mut self.block_entries, at);
    }

    pub fn unit_entry(&mut self, at: UnitAddress) {
        keep(&mut self.unit_entries, at);
    }

    pub fn unit_image(&mut self, at: CellAddress, entry: TableEntry) {
        keep(&mut self.unit_images, (at, entry));
    }

    pub fn entry(&mut self, directory: FdId, name: &[u8]) {
        keep(&mut self.entries, (directory, name.to_vec()));
    }
}

fn keep<T>(list: &mut Vec<T>, what: T) {
    if list.len() < KEPT {
        list.push(what);
    }
}
