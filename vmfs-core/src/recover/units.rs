//! Owns: recovery in one unit container.
//! Promises: a unit that nothing reaches is free at once: only compare-and-write reaches units, and one that arrives late mismatches.
//! Must not know: blocks, names.

use std::collections::BTreeMap;

use super::Recovery;
use crate::alloc::table::TablePlace;
use crate::container::first_unit;
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::arena::Place;
use crate::format::layout::entries_per_cell;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::units::{BlockAddress, CellAddress, UnitAddress};

impl Recovery<'_> {
    pub(super) async fn unit_container(&mut self, container: BlockAddress) -> Result<(), FsError> {
        let layout = &self.member.layout();
        let per = entries_per_cell(layout.cell_size);
        let units = layout.block_size.units() as usize;
        let first = usize::from(first_unit(layout));
        let begin = layout.block_offset(container.block);
        if begin.is_some_and(|offset| self.context().is_gone(CellAddress { lun: container.lun, offset })) {
            return Ok(());
        }
        for cell in 0..units.div_ceil(per) {
            let range = (cell * per).max(first)..((cell + 1) * per).min(units);
            if !range.is_empty() {
                self.unit_table_cell(container, range).await?;
            }
        }
        self.parts.objects.space().units.look_again(container);
        Ok(())
    }

    async fn unit_table_cell(&mut self, container: BlockAddress, units: std::ops::Range<usize>) -> Result<(), FsError> {
        let unit = |nth: usize| UnitAddress { lun: container.lun, block: container.block, unit: nth as u16 };
        let missing = || {
            let message = format!("the arena of {} names container {container}, which is not there", self.dead);
            FsError::refused(FsErrorKind::Corrupt, message)
        };
        let (at, first) = self.member.layout().unit_table_entry(unit(units.start)).ok_or_else(missing)?;
        let place = TablePlace { at, kind: CellKind::UnitTable, place: Place::UnitContainer(container.block.get()) };
        let table = self.tables().restamp(place).await?;
        self.still_claimed().await?;
        let mut by_owner: BTreeMap<u64, Vec<(usize, UnitAddress, TableEntry)>> = BTreeMap::new();
        for (step, nth) in units.enumerate() {
            let entry = table.entries[first + step];
            if self.is_its(&entry) {
                by_owner.entry(entry.fd).or_default().push((first + step, unit(nth), entry));
            }
        }
        let mut verdicts: Vec<(usize, TableEntry, TableEntry)> = Vec::new();
        for (owner, entries) in by_owner {
            verdicts.extend(self.judge_units(owner, entries).await?);
        }
        if verdicts.is_empty() {
            return Ok(());
        }
        let edited = self.tables().edit(place, |table| {
            for (nth, before, after) in &verdicts {
                if table.entries[*nth] == *before {
                    table.entries[*nth] = *after;
                }
            }
            Ok(())
        });
        edited.await?;
        self.done.units += verdicts.iter().filter(|(_, _, after)| after.kind == EntryKind::Free).count() as u64;
        Ok(())
    }

    async fn judge_units(
        &self,
        owner: u64,
        entries: Vec<(usize, UnitAddress, TableEntry)>,
    ) -> Result<Vec<(usize, TableEntry, TableEntry)>, FsError> {
        let object = match self.reach.owner(owner).await {
            Err(FsError::MissingLun { .. }) => return Ok(Vec::new()),
            other => other?,
        };
        let mut verdicts = Vec::with_capacity(entries.len());
        for (nth, at, entry) in entries {
            let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
            let reached = match &object {
                Some(object) => self.reach.reaches_unit(object, (kind, entry.index), at).await?,
                None => false,
            };
            match (entry.kind, reached) {
                (EntryKind::Retiring, true) => verdicts.push((nth, entry, self.kept(&entry)?)),
                (_, true) => {}
                (_, false) => verdicts.push((nth, entry, TableEntry::FREE)),
            }
        }
        Ok(verdicts)
    }
}
