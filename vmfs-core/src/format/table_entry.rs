//! Owns: the 16-byte entry of the block table and of unit tables: the reverse map.
//! Promises: an entry names its owner, its place in the owner and the incarnation that allocated or is dropping it.
//! Must not know: how entries are found or changed.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{ENTRY_BYTES, entries_per_cell};
use super::{FormatError, prefix, value};
use crate::units::{CellSize, SlotId};

/// What a block or a unit is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryKind {
    /// Nothing.
    Free = 0,
    /// Block: file data of `fd` at file block `index`.
    Data = 1,
    /// Unit: taken by a host, used by no object yet.
    Pool = 2,
    /// Block: being written with free cells by a host.
    Formatting = 3,
    /// Block: root cells.
    FdContainer = 4,
    /// Block: units.
    UnitContainer = 5,
    /// Being dropped by the incarnation named; `flags` keeps the kind it had.
    Retiring = 6,
    /// Kept from use until an incarnation is proven fenced; `fd` holds that incarnation.
    Quarantine = 7,
    /// Unit: part of its container's own table.
    Table = 8,
    /// Unit: body of `fd`.
    Body = 9,
    /// Unit: pointer block `index` of `fd`.
    PointerBlock = 10,
    /// Unit: inner mapping unit of `fd`.
    Inner = 11,
    /// Unit: bucket of the directory `fd`.
    Bucket = 12,
    /// Block or unit: there is none any more, its LUN was taken out of the volume.
    Gone = 13,
    /// Block: part of the window to which the cells of LUN `index` have moved.
    Window = 14,
}

impl EntryKind {
    /// The kind with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            0 => EntryKind::Free,
            1 => EntryKind::Data,
            2 => EntryKind::Pool,
            3 => EntryKind::Formatting,
            4 => EntryKind::FdContainer,
            5 => EntryKind::UnitContainer,
            6 => EntryKind::Retiring,
            7 => EntryKind::Quarantine,
            8 => EntryKind::Table,
            9 => EntryKind::Body,
            10 => EntryKind::PointerBlock,
            11 => EntryKind::Inner,
            12 => EntryKind::Bucket,
            13 => EntryKind::Gone,
            14 => EntryKind::Window,
            _ => return None,
        })
    }
}

/// One entry, as code sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Owner: an `FdId` as stored, 0 for none; in quarantine a packed `SlotRef`.
    pub fd: u64,
    /// Place in the owner: file block, PB number, bucket number.
    pub index: u32,
    /// Use.
    pub kind: EntryKind,
    /// Slot of the incarnation that allocated, formats or drops it.
    pub slot: SlotId,
    /// Low 8 bits of that incarnation's generation.
    pub generation_low: u8,
    /// Kind before `Retiring`; 0 (`Free`) otherwise.
    pub was: EntryKind,
}

impl TableEntry {
    /// A free entry: all zeros.
    pub const FREE: TableEntry =
        TableEntry { fd: 0, index: 0, kind: EntryKind::Free, slot: SlotId(0), generation_low: 0, was: EntryKind::Free };
    /// The entry of a block or unit that went with its LUN.
    pub const GONE: TableEntry = TableEntry { kind: EntryKind::Gone, ..TableEntry::FREE };
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    fd: U64,
    index: U32,
    kind: u8,
    slot: u8,
    generation_low: u8,
    was: u8,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_BYTES);

/// The decoded payload of a block table or unit table cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableCell {
    /// All entries of the cell; those beyond the end of the LUN or container are `FREE` and never used.
    pub entries: Vec<TableEntry>,
}

impl TableCell {
    /// A cell of free entries.
    pub fn free(cell: CellSize) -> TableCell {
        TableCell { entries: vec![TableEntry::FREE; entries_per_cell(cell)] }
    }

    /// Decodes a payload.
    pub fn decode(cell: CellSize, payload: &[u8]) -> Result<TableCell, FormatError> {
        let mut entries = Vec::with_capacity(entries_per_cell(cell));
        let mut rest = payload;
        for _ in 0..entries_per_cell(cell) {
            let (raw, tail) = prefix::<RawEntry>(rest, "table entry")?;
            entries.push(TableEntry {
                fd: raw.fd.get(),
                index: raw.index.get(),
                kind: value(EntryKind::from_stored(raw.kind), "table entry", "kind", raw.kind.into())?,
                slot: SlotId(raw.slot),
                generation_low: raw.generation_low,
                was: value(EntryKind::from_stored(raw.was), "table entry", "was", raw.was.into())?,
            });
            rest = tail;
        }
        Ok(TableCell { entries })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(self.entries.len() * ENTRY_BYTES);
        for entry in &self.entries {
            let raw = RawEntry {
                fd: entry.fd.into(),
                index: entry.index.into(),
                kind: entry.kind as u8,
                slot: entry.slot.0,
                generation_low: entry.generation_low,
                was: entry.was as u8,
            };
            payload.extend_from_slice(raw.as_bytes());
        }
        payload
    }
}
