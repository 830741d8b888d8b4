//! Owns: what a changed cell says, in words, for traces.
//! Promises: only what differs from the cell's image before, as far as that was seen.
//! Must not know: what is right or wrong.

use std::collections::BTreeMap;

use engine::format::heartbeat::Heartbeat;
use engine::format::pointer::pointer_at;
use engine::format::root_cell::RootCell;
use engine::format::table_entry::{EntryKind, TableCell, TableEntry};
use engine::format::{Cell, CellContext, CellKind};
use engine::mapping::tree::Shape;
use engine::units::CellAddress;

/// Remembers the payloads of the cells that it has told of.
#[derive(Default)]
pub struct Teller {
    before: BTreeMap<CellAddress, Vec<u8>>,
}

impl Teller {
    /// What `image` says in the cell at `at`; it is remembered when it is there now (`wrote`).
    pub fn tell(&mut self, context: &CellContext, at: CellAddress, image: &[u8], wrote: bool) -> String {
        let Ok(cell) = Cell::decode(context, at, image) else { return String::new() };
        let before = self.before.get(&at).map(Vec::as_slice);
        let says = match cell.header().kind {
            _ if before == Some(cell.payload()) => "(re-stamp)".to_owned(),
            CellKind::Heartbeat => heartbeat(&cell),
            CellKind::Root => root(context, &cell),
            CellKind::BlockTable | CellKind::UnitTable => table(context, &cell, before),
            CellKind::PointerBlock => pointers(context, &cell, before),
            _ => String::new(),
        };
        if wrote {
            self.before.insert(at, cell.payload().to_vec());
        }
        let header = cell.header();
        let owner = header.owner.map(|fd| format!(" of {fd}")).unwrap_or_default();
        format!("{:?}{owner} seq {} by {}: {says}", header.kind, header.seq.0, header.writer)
    }
}

fn heartbeat(cell: &Cell) -> String {
    let Ok(h) = Heartbeat::decode(cell.payload()) else { return String::new() };
    format!("{:?} generation {} beat {} breaker {}", h.state, h.generation.0, h.beat, h.breaker.slot)
}

fn root(context: &CellContext, cell: &Cell) -> String {
    let Ok(root) = RootCell::decode(context.cell_size, cell.payload()) else { return String::new() };
    let holders: Vec<String> = root.lock.holders.iter().map(|holder| holder.slot.to_string()).collect();
    format!(
        "{:?} {:?} link {} parent {:?} lock {:?} [{}] token {} unclean {} ({}) body {:?}",
        root.state,
        root.object_type,
        cell.header().link.0,
        root.parent.map(|fd| fd.to_string()),
        root.lock.mode,
        holders.join(", "),
        root.lock.token.0,
        root.unclean.token.0,
        root.unclean.broken.slot,
        root.body.map(|body| body.at.to_string()),
    )
}

fn table(context: &CellContext, cell: &Cell, before: Option<&[u8]>) -> String {
    let decode = |payload: &[u8]| TableCell::decode(context.cell_size, payload).ok();
    let Some(now) = decode(cell.payload()) else { return String::new() };
    let old = before.and_then(decode);
    let was = |nth: usize| old.as_ref().map_or(TableEntry::FREE, |table| table.entries[nth]);
    let changed = (now.entries.iter().enumerate()).filter(|(nth, entry)| was(*nth) != **entry);
    let told = changed.map(|(nth, entry)| format!("[{nth}] {} -> {}", of(&was(nth)), of(entry)));
    told.take(16).collect::<Vec<_>>().join("; ")
}

fn of(entry: &TableEntry) -> String {
    if entry.kind == EntryKind::Free {
        return "free".to_owned();
    }
    let TableEntry { kind, fd, index, slot, generation_low, .. } = entry;
    format!("{kind:?} {fd:#x}/{index} of slot{}.{generation_low}", slot.0)
}

fn pointers(context: &CellContext, cell: &Cell, before: Option<&[u8]>) -> String {
    let mut told = vec![format!("token {}", cell.header().token.0)];
    for nth in 0..Shape::new(context.cell_size).per_cell() as usize {
        let now = pointer_at(cell.payload(), nth).ok().flatten();
        let old = before.and_then(|payload| pointer_at(payload, nth).ok().flatten());
        if now != old {
            told.push(format!("[{nth}] {}", now.map_or("none".to_owned(), |p| format!("{} {:04x}", p.at, p.valid.0))));
        }
    }
    told.join(" ")
}
