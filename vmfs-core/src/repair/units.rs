//! Owns: the units of objects under repair: reading one as a reference says, taking a free one, writing it.
//! Promises: nothing is believed of a unit whose cells are another object's; a unit that is written was free, and is named afterwards.
//! Must not know: what units mean.

use std::cell::RefCell;
use std::collections::HashSet;

use super::Work;
use super::ground::Ground;
use super::reverse::ReverseMap;
use super::tables::entry_of;
use crate::cas::CellChange;
use crate::check::remedy::{Claimed, Remedies};
use crate::container::first_unit;
use crate::error::{FsError, FsErrorKind};
use crate::format::root_cell::LunSet;
use crate::format::table_entry::{EntryKind, TableEntry};
use crate::format::unit::{UnitRef, cells_for};
use crate::format::{Cell, CellKind};
use crate::units::{BlockAddress, FdId, Link, Token, UnitAddress};

/// Everything that mending objects of one round shares.
pub(super) struct Shop<'a, 'w> {
    pub ground: &'a Ground,
    pub remedies: &'a Remedies,
    pub reverse: ReverseMap,
    pub work: RefCell<&'a mut Work<'w>>,
    /// Units taken in this round.
    pub taken: RefCell<HashSet<UnitAddress>>,
}

/// The cell kind of a unit with this entry.
pub(super) fn cell_kind(kind: EntryKind) -> CellKind {
    match kind {
        EntryKind::PointerBlock => CellKind::PointerBlock,
        EntryKind::Inner => CellKind::Inner,
        EntryKind::Bucket => CellKind::Bucket,
        _ => CellKind::Body,
    }
}

/// Whether an entry says that the unit is this, also when it is marked as being dropped.
pub(super) fn agrees(entry: &TableEntry, claimed: &Claimed) -> bool {
    let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
    kind == claimed.kind && entry.fd == claimed.owner.get() && entry.index == claimed.index
}

impl Shop<'_, '_> {
    pub fn repaired(&self, what: String) {
        self.work.borrow_mut().repaired(what);
    }

    /// Whether a unit lies where units lie.
    pub async fn is_unit(&self, at: UnitAddress) -> Result<bool, FsError> {
        let Some(member) = self.ground.members.get(&at.lun) else { return Ok(false) };
        let layout = &member.layout;
        if at.unit < first_unit(layout) || u64::from(at.unit) >= layout.block_size.units() {
            return Ok(false);
        }
        let block = BlockAddress { lun: at.lun, block: at.block };
        Ok(match self.ground.block_entry(block).await? {
            Some(entry) => entry.kind == EntryKind::UnitContainer,
            None => self.remedies.unit_containers.contains(&block),
        })
    }

    /// The cells of a unit that are this object's; `None` for each that is not, or fails its checks.
    pub async fn cells(
        &self,
        at: UnitAddress,
        count: usize,
        claimed: &Claimed,
        link: Link,
    ) -> Result<Vec<Option<Cell>>, FsError> {
        let mut cells = Vec::with_capacity(count);
        for nth in 0..count {
            let place = self.ground.member(at.lun)?.layout.unit_cell(at, nth);
            let cell = match place {
                Some(place) => self.ground.read_kind(place, cell_kind(claimed.kind)).await?,
                None => None,
            };
            cells.push(cell.filter(|cell| cell.expect_owner(claimed.owner, link, claimed.index).is_ok()));
        }
        Ok(cells)
    }

    /// The stream of a unit, exactly as a reference names it. Its table entry is put right when it says something else.
    pub async fn stream(&self, claimed: Claimed, link: Link, reference: &UnitRef) -> Result<Option<Vec<u8>>, FsError> {
        if !self.is_unit(reference.at).await? {
            return Ok(None);
        }
        let cells = self.cells(reference.at, usize::from(reference.used_cells), &claimed, link).await?;
        let Some(cells) = cells.into_iter().collect::<Option<Vec<Cell>>>() else { return Ok(None) };
        let crc = cells.iter().fold(0, |crc, cell| crc32c::crc32c_append(crc, cell.image()));
        if crc != reference.crc {
            return Ok(None);
        }
        self.claim(reference.at, &claimed).await?;
        Ok(Some(cells.iter().flat_map(|cell| cell.payload().to_vec()).collect()))
    }

    /// Makes the entry of a unit, whose cells prove whose it is, say so.
    pub async fn claim(&self, at: UnitAddress, claimed: &Claimed) -> Result<(), FsError> {
        let Some(found) = self.ground.unit_entry(at).await? else { return Ok(()) };
        if agrees(&found, claimed) {
            return Ok(());
        }
        if self.ground.set_unit_entry(at, Some(&found), entry_of(claimed)).await? {
            let what = format!("{:?} {} of {}", claimed.kind, claimed.index, claimed.owner).to_lowercase();
            self.repaired(format!("unit {at}: entry set to {what}, as its cells and that object say"));
        }
        Ok(())
    }

    /// Writes a stream to a free unit of one of these LUNs, the object's own first. Nothing names it yet.
    pub async fn write(
        &self,
        claimed: Claimed,
        link: Link,
        birth: u32,
        luns: &LunSet,
        stream: &[u8],
    ) -> Result<UnitRef, FsError> {
        let size = self.ground.context().cell_size;
        let used_cells = cells_for(size, stream.len()).expect("what is written was read from a unit, or is smaller");
        let at = self.take(&claimed, luns).await?;
        let mut crc = 0;
        for nth in 0..usize::from(used_cells) {
            let place = self.ground.member(at.lun)?.layout.unit_cell(at, nth).expect("the unit is in a container");
            let from = (nth * size.payload()).min(stream.len());
            let payload = stream[from..stream.len().min(from + size.payload())].to_vec();
            let change = CellChange {
                kind: cell_kind(claimed.kind),
                owner: Some(claimed.owner),
                link,
                index: claimed.index,
                token: Token(0),
                payload,
            };
            crc = crc32c::crc32c_append(crc, self.ground.put(place, change).await?.image());
        }
        Ok(UnitRef { at, used_cells, crc, birth })
    }

    /// Takes a free unit.
    async fn take(&self, claimed: &Claimed, luns: &LunSet) -> Result<UnitAddress, FsError> {
        let own = claimed.owner.lun();
        let order = std::iter::once(own).chain(luns.iter().filter(|lun| *lun != own));
        for lun in order {
            for container in self.reverse.containers.iter().filter(|at| at.lun == lun) {
                let layout = &self.ground.member(lun)?.layout;
                let units = first_unit(layout)..layout.block_size.units() as u16;
                for unit in units {
                    let at = UnitAddress { lun, block: container.block, unit };
                    if self.taken.borrow().contains(&at) || self.remedies.is_reached(at) {
                        continue;
                    }
                    let Some(entry) = self.ground.unit_entry(at).await? else { continue };
                    if entry == TableEntry::FREE
                        && self.ground.set_unit_entry(at, Some(&entry), entry_of(claimed)).await?
                    {
                        self.taken.borrow_mut().insert(at);
                        return Ok(at);
                    }
                }
            }
        }
        let message =
            format!("{}: no unit is free on its LUNs to write it anew; add space, then repair again", claimed.owner);
        Err(FsError::refused(FsErrorKind::NoSpace, message))
    }

    /// Where an owner's unit table says its bodies are, newest candidates first.
    pub fn body_units(&self, fd: FdId) -> Vec<UnitAddress> {
        let mut units: Vec<_> = self.reverse.of(fd).units_of(EntryKind::Body).collect();
        units.sort_by_key(|(at, entry)| (entry.kind == EntryKind::Retiring, *at));
        units.into_iter().map(|(at, _)| at).collect()
    }
}
