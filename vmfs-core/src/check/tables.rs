//! Owns: the two passes over the block tables: what the entries say by themselves, and which say that a block is in use that
//! nothing reaches.
//! Promises: a table is read in large pieces and never held; pieces without used entries are read once.
//! Must not know: what reaches a block.

use super::finding::{Finding, Phase, Severity, Structure};
use super::reader::Unread;
use super::state::{Checker, Judgement, expect_plain};
use crate::format::arena::Place;
use crate::format::header::MemberState;
use crate::format::table_entry::{EntryKind, TableCell, TableEntry};
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{BlockAddress, BlockNo, CellAddress, FdId, LunIndex, SlotRef};

/// Bytes of a table that are read with one command; the piece that the second pass reads again or not.
const PIECE: u64 = 1 << 20;

/// One table cell as it was read.
struct TableRead {
    at: CellAddress,
    number: u64,
    first: BlockNo,
    used: usize,
}

impl Checker<'_> {
    fn table_bytes(&self) -> u64 {
        let size = self.reader.context.cell_size.bytes() as u64;
        self.members.values().map(|member| member.layout.table_cell_count() * size).sum()
    }

    /// First pass: every entry by itself; finds the containers.
    pub(super) async fn scan_block_tables(&mut self) {
        let (total, mut done) = (self.table_bytes(), 0);
        let luns: Vec<LunIndex> = self.members.keys().copied().collect();
        for lun in luns {
            let pieces = self.pieces(lun);
            for piece in pieces {
                done += self.scan_piece(lun, piece, true).await;
                self.progress(Phase::BlockTables, done, total);
            }
        }
    }

    /// Second pass: data blocks that nothing reaches.
    pub(super) async fn find_unreached_blocks(&mut self) {
        let luns: Vec<LunIndex> = self.members.keys().copied().collect();
        let total: u64 = self.members.values().map(|member| member.table_pieces.len() as u64 * PIECE).sum();
        let mut done = 0;
        for lun in luns {
            let pieces: Vec<u64> = self.members[&lun].table_pieces.iter().copied().collect();
            for piece in pieces {
                self.scan_piece(lun, piece, false).await;
                done += PIECE;
                self.progress(Phase::Space, done, total);
            }
        }
    }

    fn cells_per_piece(&self) -> u64 {
        PIECE / self.reader.context.cell_size.bytes() as u64
    }

    fn pieces(&self, lun: LunIndex) -> std::ops::Range<u64> {
        0..self.members[&lun].layout.table_cell_count().div_ceil(self.cells_per_piece())
    }

    /// Reads the table cells of one piece; gives their bytes. A piece may go over the end of a segment: then it is two reads.
    async fn scan_piece(&mut self, lun: LunIndex, piece: u64, first_pass: bool) -> u64 {
        let per = self.cells_per_piece();
        let count = self.members[&lun].layout.table_cell_count();
        let (mut number, end) = (piece * per, ((piece + 1) * per).min(count));
        let size = self.reader.context.cell_size.bytes();
        let bytes = (end - number) * size as u64;
        while number < end {
            let layout = &self.members[&lun].layout;
            let (start, _, _) = layout.table_cell(number).expect("the number is below the count");
            let mut run = 1;
            while number + run < end
                && layout
                    .table_cell(number + run)
                    .is_some_and(|(at, _, _)| at.offset == start.offset + run * size as u64)
            {
                run += 1;
            }
            let span = self.reader.span(lun, start.offset, run as usize * size).await;
            for nth in 0..run {
                let (at, first, used) = self.members[&lun].layout.table_cell(number + nth).expect("below the count");
                let read = TableRead { at, number: number + nth, first, used };
                let image = match &span {
                    Ok(bytes) => bytes.get(nth as usize * size..(nth as usize + 1) * size),
                    Err(_) => None,
                };
                let cell = match (image, &span) {
                    (Some(image), _) => Cell::decode(&self.reader.context, at, image).map_err(Unread::Damaged),
                    (None, Err(Unread::Failed(error))) if nth == 0 => Err(Unread::Failed(error.clone())),
                    (None, Err(_)) => Err(Unread::Failed(None)),
                    (None, Ok(bytes)) => Err(Unread::Damaged(FormatError::Length {
                        structure: "LUN",
                        needed: size,
                        available: bytes.len(),
                    })),
                };
                self.scan_table_cell(lun, read, cell, first_pass).await;
            }
            number += run;
        }
        bytes
    }

    async fn scan_table_cell(&mut self, lun: LunIndex, read: TableRead, cell: Result<Cell, Unread>, first_pass: bool) {
        let size = self.reader.context.cell_size;
        let table = cell.and_then(|cell| {
            expect_plain(&cell, CellKind::BlockTable).map_err(Unread::Damaged)?;
            if cell.payload().iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            TableCell::decode(size, cell.payload()).map(Some).map_err(Unread::Damaged)
        });
        match table {
            Ok(None) if first_pass => {
                let counts = &mut self.members.get_mut(&lun).expect("a member").counts;
                counts.blocks += read.used as u64;
                counts.free += read.used as u64;
            }
            Ok(None) => {}
            Ok(Some(table)) => {
                for (nth, entry) in table.entries.iter().enumerate() {
                    let block = BlockNo::new(read.first.get() + nth as u64);
                    match block.filter(|_| nth < read.used) {
                        Some(block) if first_pass => self.check_block_entry(lun, block, entry, &read),
                        Some(block) => self.check_reached(lun, block, entry, &read),
                        None if *entry != TableEntry::FREE && first_pass => {
                            let found = format!("{:?} behind the last block", entry.kind);
                            self.error(Structure::BlockTable, read.at, None, "entry", found, "free");
                            self.remedies.block_cells.insert((lun, read.number));
                        }
                        None => {}
                    }
                }
            }
            Err(_) if !first_pass => {}
            Err(why) => {
                self.tell_unread(Structure::BlockTable, read.at, None, &why);
                self.remedies.block_cells.insert((lun, read.number));
                self.adopt_unknown(lun, &read).await;
            }
        }
    }

    /// The blocks of a table cell that cannot be read: containers among them are recognised by their first cell, so that what they
    /// hold is not taken for lost.
    async fn adopt_unknown(&mut self, lun: LunIndex, read: &TableRead) {
        for number in read.first.get()..read.first.get() + read.used as u64 {
            let Some(block) = BlockNo::new(number) else { continue };
            let offset = self.members[&lun].layout.block_offset(block);
            self.members.get_mut(&lun).expect("a member").unknown_blocks.insert(number);
            let Some(offset) = offset else { continue };
            let kind = match self.reader.cell(CellAddress { lun, offset }).await {
                Ok(cell) => cell.header().kind,
                Err(_) => continue,
            };
            let member = self.members.get_mut(&lun).expect("a member");
            member.counts.blocks += 1;
            let at = BlockAddress { lun, block };
            match kind {
                CellKind::Root => {
                    member.fd_containers.insert(block);
                    self.remedies.fd_containers.insert(at);
                }
                CellKind::UnitTable => {
                    member.unit_containers.insert(block);
                    self.remedies.unit_containers.insert(at);
                }
                _ => {}
            }
        }
    }

    fn check_block_entry(&mut self, lun: LunIndex, block: BlockNo, entry: &TableEntry, read: &TableRead) {
        let at = BlockAddress { lun, block };
        let piece = read.number / self.cells_per_piece();
        let member = self.members.get_mut(&lun).expect("a member");
        member.counts.blocks += 1;
        match entry.kind {
            EntryKind::Free => member.counts.free += 1,
            EntryKind::Data => {
                member.counts.data += 1;
                member.table_pieces.insert(piece);
            }
            EntryKind::Retiring => {
                member.counts.marked += 1;
                member.table_pieces.insert(piece);
            }
            EntryKind::Formatting => member.counts.marked += 1,
            EntryKind::FdContainer => {
                member.counts.fd_containers += 1;
                member.fd_containers.insert(block);
            }
            EntryKind::UnitContainer => {
                member.counts.unit_containers += 1;
                member.unit_containers.insert(block);
            }
            EntryKind::Quarantine => member.counts.quarantined += 1,
            _ => {}
        }
        let is_carried = member.header.state == MemberState::Carried;
        if let Some((field, found, expected)) = block_entry_fault(entry) {
            self.error(Structure::BlockTable, format!("{at} ({})", read.at), None, field, found, expected);
            self.remedies.block_entry(at);
            return;
        }
        match entry.kind {
            EntryKind::Formatting => {
                let judgement = self.judge_entry(lun, entry, Place::TableCell(read.number));
                self.remedies.free_block(at, entry);
                self.tell_mark(Structure::BlockTable, at, None, "formatting", judgement);
            }
            EntryKind::Quarantine => {
                let incarnation = SlotRef::unpack(entry.fd).map_or_else(String::new, |slot| slot.to_string());
                let finding = Finding {
                    severity: Severity::Info,
                    structure: Structure::BlockTable,
                    at: at.to_string(),
                    object: None,
                    field: "kind",
                    found: format!("quarantine, until {incarnation} is proven fenced"),
                    expected: String::new(),
                };
                self.tell(finding);
            }
            EntryKind::Gone if !is_carried => {
                let (found, expected) = ("gone", "a use, on a LUN in use");
                self.error(Structure::BlockTable, format!("{at} ({})", read.at), None, "kind", found, expected);
                self.remedies.block_entry(at);
            }
            EntryKind::Window if self.is_unused_window(at, entry) => {
                self.remedies.free_block(at, entry);
                let why = "freed: the removal of that LUN took another one, or none".to_owned();
                let judgement = Judgement { severity: Severity::Recoverable, why };
                let what = format!("window of lun{}, which is not there", entry.index);
                self.tell_mark(Structure::BlockTable, at, None, &what, judgement);
            }
            _ => {}
        }
    }

    /// Whether a LUN that was given says that its window is somewhere else. Of one that is missing nothing can be said.
    fn is_unused_window(&self, at: BlockAddress, entry: &TableEntry) -> bool {
        let Some(lun) = u8::try_from(entry.index).ok().and_then(LunIndex::new) else { return true };
        let offset = self.members.get(&at.lun).and_then(|member| member.layout.block_offset(at.block));
        match (self.windows.get(&lun), offset) {
            (Some((begin, end)), Some(offset)) => {
                begin.lun != at.lun || offset < begin.offset || end.is_some_and(|end| offset >= end)
            }
            (None, _) => self.members.contains_key(&lun),
            (_, None) => false,
        }
    }

    /// Tells a mark or a leftover with the weight that its incarnation gives it.
    pub(super) fn tell_mark(
        &mut self,
        structure: Structure,
        at: impl ToString,
        object: Option<FdId>,
        what: &str,
        judgement: Judgement,
    ) {
        self.tell(Finding {
            severity: judgement.severity,
            structure,
            at: at.to_string(),
            object,
            field: "kind",
            found: what.to_owned(),
            expected: judgement.why,
        });
    }

    fn check_reached(&mut self, lun: LunIndex, block: BlockNo, entry: &TableEntry, read: &TableRead) {
        if !matches!(entry.kind, EntryKind::Data | EntryKind::Retiring) || block_entry_fault(entry).is_some() {
            return;
        }
        let reached = self.members[&lun].reached.contains(block.get());
        let at = BlockAddress { lun, block };
        let owner = FdId::from_stored(entry.fd);
        let place = Place::TableCell(read.number);
        match (entry.kind, reached) {
            (EntryKind::Retiring, true) => {
                let judgement = self.judge_entry(lun, entry, place);
                self.remedies.keep_block(at, entry);
                self.tell_mark(Structure::BlockTable, at, owner, "retiring, and still in use", judgement);
            }
            (_, true) => {}
            (kind, false) => {
                let what = format!("{kind:?} for file block {}, which nothing reaches", entry.index).to_lowercase();
                let judgement = self.judge_leak(lun, owner, entry, place);
                match owner.and_then(|owner| self.container_gone(owner)) {
                    Some(container) => {
                        self.remedies.lost_containers.insert(container);
                        self.remedies.ownerless_block(at, entry);
                    }
                    None if judgement.severity != Severity::Info => self.remedies.free_block(at, entry),
                    None => {}
                }
                self.tell_mark(Structure::BlockTable, at, owner, &what, judgement);
            }
        }
    }

    /// What to make of space that names an owner which does not reach it.
    pub(super) fn judge_leak(&self, lun: LunIndex, owner: Option<FdId>, entry: &TableEntry, place: Place) -> Judgement {
        if owner.is_some_and(|owner| self.damaged.contains(&owner) || !self.members.contains_key(&owner.lun())) {
            let why = "nothing can be said: not everything of its owner could be read".to_owned();
            return Judgement { severity: Severity::Info, why };
        }
        if owner.is_some_and(|owner| self.unlinked.contains(&owner)) {
            let why = "freed together with its owner, which has lost its name".to_owned();
            return Judgement { severity: Severity::Recoverable, why };
        }
        self.judge_entry(lun, entry, place)
    }

    /// The container of an owner's root cell, if the block table does not say that it is one.
    pub(super) fn container_gone(&self, owner: FdId) -> Option<BlockAddress> {
        let container = owner.container();
        let member = self.members.get(&container.lun)?;
        (!member.fd_containers.contains(&container.block)).then_some(container)
    }
}

/// What is wrong with an entry of a block table by itself: field, found, expected.
pub(super) fn block_entry_fault(entry: &TableEntry) -> Option<(&'static str, String, String)> {
    let fault = |field, found: String, expected: &str| Some((field, found, expected.to_owned()));
    let no_owner = entry.fd == 0 && entry.index == 0;
    match entry.kind {
        EntryKind::Free if *entry != TableEntry::FREE => fault("kind", format!("free, with {entry:?}"), "zeros"),
        EntryKind::Data | EntryKind::Retiring if FdId::from_stored(entry.fd).is_none() => {
            fault("fd", format!("{:#x}", entry.fd), "an object")
        }
        EntryKind::Retiring if entry.was != EntryKind::Data => fault("was", format!("{:?}", entry.was), "data"),
        EntryKind::Quarantine if SlotRef::unpack(entry.fd).is_none() => {
            fault("fd", format!("{:#x}", entry.fd), "an incarnation")
        }
        EntryKind::Formatting if !no_owner => fault("fd", format!("{:#x} index {}", entry.fd, entry.index), "none"),
        EntryKind::FdContainer | EntryKind::UnitContainer
            if *entry != (TableEntry { kind: entry.kind, ..TableEntry::FREE }) =>
        {
            fault("kind", format!("{entry:?}"), "a container without owner and incarnation")
        }
        EntryKind::Gone if *entry != TableEntry::GONE => fault("kind", format!("gone, with {entry:?}"), "zeros"),
        EntryKind::Window if entry.fd != 0 || !(1..=254).contains(&entry.index) => {
            fault("index", format!("{:#x} index {}", entry.fd, entry.index), "a LUN")
        }
        EntryKind::Pool
        | EntryKind::Table
        | EntryKind::Body
        | EntryKind::PointerBlock
        | EntryKind::Inner
        | EntryKind::Bucket => fault("kind", format!("{:?}", entry.kind), "a kind that blocks have"),
        kind if kind != EntryKind::Retiring && entry.was != EntryKind::Free => {
            fault("was", format!("{:?}", entry.was), "0")
        }
        _ => None,
    }
}
