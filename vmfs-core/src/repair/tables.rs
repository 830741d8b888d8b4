//! Owns: putting right the block table and the tables of unit containers.
//! Promises: an entry is changed only while it says what the check saw; a data block to which a host that the storage does not keep
//! out may still write goes to quarantine. Must not know: objects.

use std::collections::BTreeMap;

use super::ground::Ground;
use crate::alloc::taking_out::window_entry;
use crate::cas::CellChange;
use crate::check::remedy::{Claimed, Remedies};
use crate::container::first_unit;
use crate::error::FsError;
use crate::format::CellKind;
use crate::format::header::MemberState;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::units::{BlockAddress, CellAddress, Link, LunIndex, SlotId, Token, UnitAddress};
use crate::window::MemberLun;

/// Changes of entries by table cell: {place, expected, new}.
type Edits = BTreeMap<CellAddress, (CellKind, Vec<(usize, TableEntry, TableEntry)>)>;

/// The entry of what an object claims.
pub(super) fn entry_of(claimed: &Claimed) -> TableEntry {
    TableEntry {
        fd: claimed.owner.get(),
        index: claimed.index,
        kind: claimed.kind,
        slot: SlotId(0),
        generation_low: 0,
        was: EntryKind::Free,
    }
}

/// What becomes of a data block that nobody owns any more.
fn freed(ground: &Ground, lun: LunIndex, entry: &TableEntry) -> TableEntry {
    match ground.members.get(&lun).and_then(|member| member.unfenced) {
        Some(incarnation) => TableEntry {
            fd: incarnation.pack(),
            index: entry.index,
            kind: EntryKind::Quarantine,
            slot: incarnation.slot,
            generation_low: incarnation.generation.low(),
            was: EntryKind::Free,
        },
        None => TableEntry::FREE,
    }
}

fn kept(entry: &TableEntry) -> TableEntry {
    TableEntry { kind: entry.was, slot: SlotId(0), generation_low: 0, was: EntryKind::Free, ..*entry }
}

/// Frees what nothing reaches, and takes marks off what is reached.
pub(super) async fn free_and_keep(ground: &Ground, remedies: &Remedies) -> Result<Vec<String>, FsError> {
    let mut edits = Edits::new();
    let mut done = Vec::new();
    let blocks = remedies.free_blocks.iter().map(|(at, entry)| (at, entry, freed(ground, at.lun, entry)));
    let blocks = blocks.chain(remedies.keep_blocks.iter().map(|(at, entry)| (at, entry, kept(entry))));
    for (at, before, after) in blocks {
        let Some((cell, nth)) = ground.member(at.lun)?.layout.table_entry(at.block) else { continue };
        edits.entry(cell).or_insert((CellKind::BlockTable, Vec::new())).1.push((nth, *before, after));
        done.push(format!("block {at}: {}", words(before, &after)));
    }
    let units = remedies.free_units.iter().map(|(at, entry)| (at, entry, TableEntry::FREE));
    let units = units.chain(remedies.keep_units.iter().map(|(at, entry)| (at, entry, kept(entry))));
    for (at, before, after) in units {
        let Some((cell, nth)) = ground.member(at.lun)?.layout.unit_table_entry(*at) else { continue };
        edits.entry(cell).or_insert((CellKind::UnitTable, Vec::new())).1.push((nth, *before, after));
        done.push(format!("unit {at}: {}", words(before, &after)));
    }
    let mut changed = false;
    for (at, (kind, edits)) in edits {
        let Some(cell) = ground.read_kind(at, kind).await? else { continue };
        let Ok(mut table) = TableCell::decode(ground.context().cell_size, cell.payload()) else { continue };
        let found = table.clone();
        for (nth, before, after) in edits {
            if table.entries[nth] == before {
                table.entries[nth] = after;
            }
        }
        if table != found {
            ground.put_payload(&cell, table.encode()).await?;
            changed = true;
        }
    }
    Ok(if changed { done } else { Vec::new() })
}

fn words(before: &TableEntry, after: &TableEntry) -> String {
    let what = match after.kind {
        EntryKind::Free => "freed",
        EntryKind::Quarantine => "put in quarantine",
        _ => "kept, and no longer marked",
    };
    format!("{what} (was {:?})", before.kind).to_lowercase()
}

/// Makes a damaged cell of the block table anew: what objects reach, the containers that were recognised, the rest free.
pub(super) async fn block_cell(
    ground: &Ground,
    lun: LunIndex,
    number: u64,
    remedies: &Remedies,
) -> Result<String, FsError> {
    let Some((at, _, used)) = ground.member(lun)?.layout.table_cell(number) else { return Ok(String::new()) };
    let size = ground.context().cell_size;
    let known = ground.read_kind(at, CellKind::BlockTable).await?;
    let known = known.and_then(|cell| TableCell::decode(size, cell.payload()).ok());
    let mut table = TableCell::free(size);
    let whole = known.is_some();
    match known {
        // Only what lies behind the last block is wrong.
        Some(known) => table.entries[..used].copy_from_slice(&known.entries[..used]),
        None => {
            for (nth, block) in ground.blocks_of(lun, number) {
                table.entries[nth] = found_entry(ground, block, remedies);
            }
        }
    }
    ground.put(at, plain(CellKind::BlockTable, table.encode())).await?;
    let how = if whole { "entries behind the last block cleared" } else { "made anew from what objects reach" };
    Ok(format!("block table cell {at}: {how}"))
}

/// What a block is whose entry is lost.
fn found_entry(ground: &Ground, at: BlockAddress, remedies: &Remedies) -> TableEntry {
    if let Some(claimed) = remedies.claimed_blocks.get(&at) {
        return entry_of(claimed);
    }
    let container = |kind| TableEntry { kind, ..TableEntry::FREE };
    if remedies.fd_containers.contains(&at) {
        container(EntryKind::FdContainer)
    } else if remedies.unit_containers.contains(&at) {
        container(EntryKind::UnitContainer)
    } else if ground.member(at.lun).is_ok_and(|member| member.header.state == MemberState::Carried) {
        TableEntry::GONE
    } else {
        window_entry_at(ground, at).unwrap_or_else(|| freed(ground, at.lun, &TableEntry::FREE))
    }
}

/// The entry of a block that is part of a window.
fn window_entry_at(ground: &Ground, at: BlockAddress) -> Option<TableEntry> {
    let offset = ground.member(at.lun).ok()?.layout.block_offset(at.block)?;
    let carried = ground.members.iter().find(|(_, member)| {
        let window = member.lun.as_member().and_then(MemberLun::window);
        window.is_some_and(|window| window.at.lun == at.lun && (window.at.offset..window.end()).contains(&offset))
    });
    carried.map(|(lun, _)| window_entry(*lun))
}

/// Makes a damaged cell of a unit container's table anew.
pub(super) async fn unit_cell(
    ground: &Ground,
    at: CellAddress,
    container: BlockAddress,
    remedies: &Remedies,
) -> Result<String, FsError> {
    let (size, layout) = (ground.context().cell_size, &ground.member(at.lun)?.layout);
    let Some(offset) = layout.block_offset(container.block) else { return Ok(String::new()) };
    let per = entries_per_cell(size);
    let first = (at.offset - offset) as usize / size.bytes() * per;
    let mut table = TableCell::free(size);
    for (nth, entry) in table.entries.iter_mut().enumerate() {
        let unit = first + nth;
        if unit < layout.block_size.units() as usize {
            *entry =
                found_unit(ground, UnitAddress { lun: at.lun, block: container.block, unit: unit as u16 }, remedies)?;
        }
    }
    ground.put(at, plain(CellKind::UnitTable, table.encode())).await?;
    Ok(format!("unit table cell {at}: made anew from what objects reach"))
}

fn found_unit(ground: &Ground, at: UnitAddress, remedies: &Remedies) -> Result<TableEntry, FsError> {
    if at.unit < first_unit(&ground.member(at.lun)?.layout) {
        return Ok(TableEntry { kind: EntryKind::Table, ..TableEntry::FREE });
    }
    Ok(remedies.claimed_units.get(&at).map_or(TableEntry::FREE, entry_of))
}

/// Replaces an entry that no block can have.
pub(super) async fn block_entry(ground: &Ground, at: BlockAddress, remedies: &Remedies) -> Result<String, FsError> {
    let found = ground.block_entry(at).await?;
    let entry = match found {
        Some(entry) if matches!(entry.kind, EntryKind::FdContainer | EntryKind::UnitContainer) => {
            TableEntry { kind: entry.kind, ..TableEntry::FREE }
        }
        _ => found_entry(ground, at, remedies),
    };
    let changed = ground.set_block_entry(at, found.as_ref(), entry).await?;
    Ok(if changed { format!("block {at}: entry set to {:?}", entry.kind).to_lowercase() } else { String::new() })
}

/// Replaces an entry that no unit can have.
pub(super) async fn unit_entry(ground: &Ground, at: UnitAddress, remedies: &Remedies) -> Result<String, FsError> {
    let entry = found_unit(ground, at, remedies)?;
    let changed = ground.set_unit_entry(at, None, entry).await?;
    Ok(if changed { format!("unit {at}: entry set to {:?}", entry.kind).to_lowercase() } else { String::new() })
}

/// Says again that a block is a container, if its cells are a container's. Empty: they are not.
pub(super) async fn container(ground: &Ground, at: BlockAddress) -> Result<String, FsError> {
    let Some(offset) = ground.member(at.lun)?.layout.block_offset(at.block) else { return Ok(String::new()) };
    let size = ground.context().cell_size.bytes() as u64;
    let mut found = None;
    for nth in 0..CONTAINER_CELLS {
        let cell = ground.read(CellAddress { lun: at.lun, offset: offset + nth * size }).await?;
        match cell.map(|cell| cell.header().kind) {
            Some(CellKind::Root) => found = Some(EntryKind::FdContainer),
            Some(CellKind::UnitTable) => found = Some(EntryKind::UnitContainer),
            _ => continue,
        }
        break;
    }
    let Some(kind) = found else { return Ok(String::new()) };
    let changed = ground.set_block_entry(at, None, TableEntry { kind, ..TableEntry::FREE }).await?;
    Ok(if changed {
        format!("block {at}: its cells are a container's, and its entry says so again")
    } else {
        String::new()
    })
}

/// Cells at the start of a block that are looked at to tell a container.
const CONTAINER_CELLS: u64 = 8;

/// Frees what belongs to objects whose container is not there.
pub(super) async fn free_ownerless(ground: &Ground, remedies: &Remedies) -> Result<Vec<String>, FsError> {
    let of_nobody = Remedies {
        free_blocks: remedies.ownerless_blocks.clone(),
        free_units: remedies.ownerless_units.clone(),
        ..Remedies::default()
    };
    free_and_keep(ground, &of_nobody).await
}

/// Makes a damaged cell of a unit, in which no object has anything, a blank one.
pub(super) async fn blank(ground: &Ground, at: CellAddress) -> Result<String, FsError> {
    let unit_kinds = [CellKind::Blank, CellKind::Body, CellKind::PointerBlock, CellKind::Inner, CellKind::Bucket];
    if ground.read(at).await?.is_some_and(|cell| unit_kinds.contains(&cell.header().kind)) {
        return Ok(String::new());
    }
    ground.put(at, plain(CellKind::Blank, Vec::new())).await?;
    Ok(format!("cell {at} of a unit: made a blank one"))
}

/// A change of a cell that belongs to no object.
pub(super) fn plain(kind: CellKind, payload: Vec<u8>) -> CellChange {
    CellChange { kind, owner: None, link: Link(0), index: 0, token: Token(0), payload }
}
