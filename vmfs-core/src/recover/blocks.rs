//! Owns: recovery in one cell of the block table.
//! Promises: a data block is freed only when the incarnation is proven fenced; else it goes to quarantine.
//! Must not know: units, names.

use std::collections::BTreeMap;

use super::Recovery;
use crate::alloc::table::TablePlace;
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::arena::Place;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::lun::LunErrorKind;
use crate::units::{BlockAddress, BlockNo};

impl Recovery<'_> {
    pub(super) async fn table_cell(&mut self, number: u64) -> Result<(), FsError> {
        let missing = || {
            let message = format!("the arena of {} names table cell {number}, which is not there", self.dead);
            FsError::refused(FsErrorKind::Corrupt, message)
        };
        let (at, first, used) = self.member.layout().table_cell(number).ok_or_else(missing)?;
        let place = TablePlace { at, kind: CellKind::BlockTable, place: Place::TableCell(number) };
        let table = self.tables().restamp(place).await?;
        self.still_claimed().await?;
        let mut by_owner: BTreeMap<u64, Vec<(usize, TableEntry)>> = BTreeMap::new();
        for (nth, entry) in table.entries[..used].iter().enumerate().filter(|(_, entry)| self.is_its(entry)) {
            by_owner.entry(entry.fd).or_default().push((nth, *entry));
        }
        let mut verdicts: Vec<(usize, TableEntry, TableEntry)> = Vec::new();
        for (owner, entries) in by_owner {
            verdicts.extend(self.judge(owner, first, entries).await?);
        }
        if verdicts.is_empty() {
            return Ok(());
        }
        self.give_back(first, &mut verdicts).await?;
        let edited = self.tables().edit(place, |table| {
            for (nth, before, after) in &verdicts {
                if table.entries[*nth] == *before {
                    table.entries[*nth] = *after;
                }
            }
            Ok(())
        });
        edited.await?;
        for (_, _, after) in &verdicts {
            self.done.blocks += u64::from(after.kind == EntryKind::Free);
            self.done.quarantined += u64::from(after.kind == EntryKind::Quarantine);
        }
        Ok(())
    }

    /// What is to become of entries of one owner: {entry, before, after}. Those that stay as they are, are left out.
    async fn judge(
        &self,
        owner: u64,
        first: BlockNo,
        entries: Vec<(usize, TableEntry)>,
    ) -> Result<Vec<(usize, TableEntry, TableEntry)>, FsError> {
        let owned = |kind| matches!(kind, EntryKind::Data | EntryKind::Retiring);
        let object = match entries.iter().any(|(_, entry)| owned(entry.kind)) {
            false => None,
            true => match self.reach.owner(owner).await {
                // It cannot be told while the owner's LUN is away; it does not hold the slot.
                Err(FsError::MissingLun { .. }) => return Ok(Vec::new()),
                other => other?,
            },
        };
        let mut verdicts = Vec::with_capacity(entries.len());
        for (nth, entry) in entries {
            let block = BlockNo::new(first.get() + nth as u64).expect("the layout has the block");
            let at = BlockAddress { lun: self.member.index, block };
            let reached = match &object {
                Some(object) if owned(entry.kind) => self.reach.reaches_block(object, entry.index, at).await?,
                _ => false,
            };
            let after = match (entry.kind, reached) {
                (EntryKind::Retiring, true) => self.kept(&entry)?,
                (_, true) => continue,
                (EntryKind::Quarantine, false) if !self.fenced || entry.fd != self.dead.pack() => continue,
                (_, false) if self.fenced => TableEntry::FREE,
                (_, false) => {
                    TableEntry { fd: self.dead.pack(), kind: EntryKind::Quarantine, was: EntryKind::Free, ..entry }
                }
            };
            verdicts.push((nth, entry, after));
        }
        Ok(verdicts)
    }

    /// Gives blocks that are about to be free back to the storage, as far as it takes them. One whose UNMAP may still be on its way is
    /// kept from use: it would clear what its next owner has written (rule R3).
    async fn give_back(&self, first: BlockNo, verdicts: &mut [(usize, TableEntry, TableEntry)]) -> Result<(), FsError> {
        let bytes = self.context().block_size().bytes();
        for (nth, before, after) in verdicts {
            let block = BlockNo::new(first.get() + *nth as u64);
            let offset = block.and_then(|block| self.member.layout().block_offset(block));
            let (EntryKind::Free, Some(offset)) = (after.kind, offset) else { continue };
            let Err(error) = self.member.lun.unmap(offset, bytes).await else { continue };
            tracing::debug!(%error, "space was not given back to the storage");
            if error.kind == LunErrorKind::Unknown {
                let own = self.context().own_slot(self.member.index)?;
                self.member.set_unresolved();
                *after = TableEntry {
                    fd: own.pack(),
                    index: before.index,
                    kind: EntryKind::Quarantine,
                    slot: own.slot,
                    generation_low: own.generation.low(),
                    was: EntryKind::Free,
                };
            }
        }
        Ok(())
    }
}
