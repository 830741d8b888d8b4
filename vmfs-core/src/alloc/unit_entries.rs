//! Owns: what the table entry of a unit says in each state of its life, and the steps between them.
//! Promises: a step is taken only from an entry that it fits; any other is left as it is.
//! Must not know: cells, pools, I/O.

use crate::error::{FsError, FsErrorKind};
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::units::{FdId, SlotRef, UnitAddress};

/// A unit in use: what its table entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitUse {
    /// The unit.
    pub at: UnitAddress,
    /// Owner.
    pub owner: FdId,
    /// Body, PointerBlock, Inner or Bucket.
    pub kind: EntryKind,
    /// Index in the owner.
    pub index: u32,
}

/// A change of the table entry of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitEdit {
    /// From the own pool to its use.
    Assign,
    /// About to be dropped.
    Retire,
    /// The mark is taken back.
    Keep,
    /// From its use, or from its mark, to the own pool.
    Recycle,
    /// From its use or its mark to free.
    Free,
}

pub(super) fn pooled(by: SlotRef) -> TableEntry {
    TableEntry { kind: EntryKind::Pool, slot: by.slot, generation_low: by.generation.low(), ..TableEntry::FREE }
}

fn used(unit: &UnitUse, by: SlotRef) -> TableEntry {
    TableEntry {
        fd: unit.owner.get(),
        index: unit.index,
        kind: unit.kind,
        slot: by.slot,
        generation_low: by.generation.low(),
        was: EntryKind::Free,
    }
}

pub(super) fn retiring(unit: &UnitUse, by: SlotRef) -> TableEntry {
    TableEntry { kind: EntryKind::Retiring, was: unit.kind, ..used(unit, by) }
}

fn names(entry: &TableEntry, unit: &UnitUse) -> bool {
    entry.fd == unit.owner.get() && entry.index == unit.index
}

/// Whether some host has marked this use of a unit.
pub(super) fn is_marked(entry: &TableEntry, unit: &UnitUse) -> bool {
    names(entry, unit) && entry.kind == EntryKind::Retiring && entry.was == unit.kind
}

pub(super) fn apply(entry: &mut TableEntry, unit: &UnitUse, edit: UnitEdit, by: SlotRef) -> Result<(), FsError> {
    let (used, retiring) = (used(unit, by), retiring(unit, by));
    let in_use = names(entry, unit) && entry.kind == unit.kind;
    let marked = is_marked(entry, unit);
    match edit {
        UnitEdit::Assign if *entry == pooled(by) => *entry = used,
        UnitEdit::Assign if in_use => {}
        UnitEdit::Assign => {
            let message = format!("unit {} is no longer in this host's pool: {entry:?}; run fsck.vmfs", unit.at);
            return Err(FsError::refused(FsErrorKind::Corrupt, message));
        }
        UnitEdit::Retire if in_use || marked => *entry = retiring,
        UnitEdit::Keep if *entry == retiring => *entry = used,
        UnitEdit::Recycle if in_use || marked => *entry = pooled(by),
        UnitEdit::Free if in_use || marked => *entry = TableEntry::FREE,
        UnitEdit::Retire | UnitEdit::Keep | UnitEdit::Recycle | UnitEdit::Free => {}
    }
    Ok(())
}
