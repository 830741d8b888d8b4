//! Owns: reading and changing single cells of a volume that no host uses (repair, resignature).
//! Promises: a cell is changed from the very image that was read, also a damaged one; no image comes a second time (rule R2).
//! Must not know: what is changed and why.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::cas::{CasOutcome, CellChange, CellIo};
use crate::container::FORMATTED_SEQ;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::LunHeader;
use crate::format::layout::LunLayout;
use crate::format::table_entry::{TableCell, TableEntry};
use crate::format::{Cell, CellContext, CellHeader, CellKind};
use crate::lun::{Compared, Lun};
use crate::units::{BlockAddress, BlockNo, CellAddress, LunIndex, SlotRef, UnitAddress};

/// One member LUN.
pub(crate) struct Member {
    pub lun: Rc<dyn Lun>,
    pub header: LunHeader,
    pub layout: LunLayout,
    /// An incarnation that used this LUN and that the storage does not keep out for certain: data blocks go to quarantine.
    pub unfenced: Option<SlotRef>,
}

/// All members of the volume under repair.
pub(crate) struct Ground {
    pub io: CellIo,
    /// What is to be done again when somebody else changed the volume meanwhile.
    pub again: &'static str,
    pub members: BTreeMap<LunIndex, Member>,
}

impl Ground {
    pub fn context(&self) -> &CellContext {
        self.io.context()
    }

    pub fn env(&self) -> &Rc<dyn Env> {
        self.io.env()
    }

    pub fn member(&self, lun: LunIndex) -> Result<&Member, FsError> {
        self.members.get(&lun).ok_or(FsError::MissingLun { lun })
    }

    /// Reads a cell; `None`: it fails its checks.
    pub async fn read(&self, at: CellAddress) -> Result<Option<Cell>, FsError> {
        let lun = &self.member(at.lun)?.lun;
        match self.io.read(lun, at).await {
            Ok(cell) => Ok(Some(cell)),
            Err(FsError::Corrupt { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a cell of this kind; `None`: it fails its checks or is of another kind.
    pub async fn read_kind(&self, at: CellAddress, kind: CellKind) -> Result<Option<Cell>, FsError> {
        Ok(self.read(at).await?.filter(|cell| cell.header().kind == kind))
    }

    /// Changes a cell from the image that it has now. One that fails its checks is begun anew, like a formatted one.
    pub async fn put(&self, at: CellAddress, change: CellChange) -> Result<Cell, FsError> {
        let lun = self.member(at.lun)?.lun.clone();
        if let Some(cell) = self.read(at).await? {
            return self.replace(&lun, &cell, change).await;
        }
        let raw = raw_cell(&lun, at.offset, self.context().cell_size.bytes()).await?;
        let header = CellHeader {
            kind: change.kind,
            address: at,
            seq: FORMATTED_SEQ,
            op_id: self.io.op_id(),
            writer: SlotRef::NOBODY,
            owner: change.owner,
            link: change.link,
            index: change.index,
            token: change.token,
        };
        let new = Cell::encode(self.context(), header, &change.payload);
        match lun.compare_and_write(at.offset, &raw, new.image()).await? {
            Compared::Written => Ok(new),
            Compared::Miscompare => Err(self.changed(&lun, at)),
        }
    }

    /// Changes a cell from exactly this image.
    pub async fn replace(&self, lun: &Rc<dyn Lun>, cell: &Cell, change: CellChange) -> Result<Cell, FsError> {
        let new = self.io.successor(cell, change, SlotRef::NOBODY);
        match self.io.cas(lun, cell, new).await? {
            CasOutcome::Applied(cell) => Ok(cell),
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => Err(self.changed(lun, cell.address())),
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
        }
    }

    fn changed(&self, lun: &Rc<dyn Lun>, at: CellAddress) -> FsError {
        let message = format!(
            "cell {at} of {} was changed by somebody else: a host uses the volume; unmount it everywhere and {}",
            lun.name(),
            self.again
        );
        FsError::refused(FsErrorKind::Busy, message)
    }

    /// Changes the payload of a sound cell.
    pub async fn put_payload(&self, cell: &Cell, payload: Vec<u8>) -> Result<Cell, FsError> {
        let lun = self.member(cell.address().lun)?.lun.clone();
        self.replace(&lun, cell, CellChange::payload(cell, payload)).await
    }

    /// The entry of a block; `None`: there is no such block or its table cell fails its checks.
    pub async fn block_entry(&self, at: BlockAddress) -> Result<Option<TableEntry>, FsError> {
        let Some(member) = self.members.get(&at.lun) else { return Ok(None) };
        let Some((cell, nth)) = member.layout.table_entry(at.block) else { return Ok(None) };
        self.entry(cell, CellKind::BlockTable, nth).await
    }

    /// The entry of a unit; `None` as with [`Ground::block_entry`], and when the block is no unit container.
    pub async fn unit_entry(&self, at: UnitAddress) -> Result<Option<TableEntry>, FsError> {
        let Some(member) = self.members.get(&at.lun) else { return Ok(None) };
        let Some((cell, nth)) = member.layout.unit_table_entry(at) else { return Ok(None) };
        self.entry(cell, CellKind::UnitTable, nth).await
    }

    async fn entry(&self, at: CellAddress, kind: CellKind, nth: usize) -> Result<Option<TableEntry>, FsError> {
        let Some(cell) = self.read_kind(at, kind).await? else { return Ok(None) };
        let table = TableCell::decode(self.context().cell_size, cell.payload()).ok();
        Ok(table.and_then(|table| table.entries.get(nth).copied()))
    }

    /// Changes the entry of a block. False: it is not what was expected (any more), or its cell is damaged.
    pub async fn set_block_entry(
        &self,
        at: BlockAddress,
        expect: Option<&TableEntry>,
        entry: TableEntry,
    ) -> Result<bool, FsError> {
        let place = self.member(at.lun)?.layout.table_entry(at.block);
        let Some((cell, nth)) = place else { return Ok(false) };
        self.set_entry(cell, CellKind::BlockTable, nth, expect, entry).await
    }

    /// As [`Ground::set_block_entry`], for a unit.
    pub async fn set_unit_entry(
        &self,
        at: UnitAddress,
        expect: Option<&TableEntry>,
        entry: TableEntry,
    ) -> Result<bool, FsError> {
        let place = self.member(at.lun)?.layout.unit_table_entry(at);
        let Some((cell, nth)) = place else { return Ok(false) };
        self.set_entry(cell, CellKind::UnitTable, nth, expect, entry).await
    }

    async fn set_entry(
        &self,
        at: CellAddress,
        kind: CellKind,
        nth: usize,
        expect: Option<&TableEntry>,
        entry: TableEntry,
    ) -> Result<bool, FsError> {
        let Some(cell) = self.read_kind(at, kind).await? else { return Ok(false) };
        let Ok(mut table) = TableCell::decode(self.context().cell_size, cell.payload()) else { return Ok(false) };
        let Some(place) = table.entries.get_mut(nth) else { return Ok(false) };
        if expect.is_some_and(|expect| place != expect) || *place == entry {
            return Ok(false);
        }
        *place = entry;
        self.put_payload(&cell, table.encode()).await?;
        Ok(true)
    }

    /// Every block that a table cell describes, with its number in the cell.
    pub fn blocks_of(&self, lun: LunIndex, number: u64) -> Vec<(usize, BlockAddress)> {
        let Some((_, first, used)) = self.members.get(&lun).and_then(|m| m.layout.table_cell(number)) else {
            return Vec::new();
        };
        let block = |nth: usize| BlockNo::new(first.get() + nth as u64).map(|block| (nth, BlockAddress { lun, block }));
        (0..used).filter_map(block).collect()
    }
}

/// The bytes of a cell as they are.
pub(super) async fn raw_cell(lun: &Rc<dyn Lun>, offset: u64, bytes: usize) -> Result<Vec<u8>, FsError> {
    let alignment = lun.alignment() as u64;
    let start = offset - offset % alignment;
    let end = (offset + bytes as u64).next_multiple_of(alignment);
    let buf = lun.read(start, (end - start) as usize).await?;
    let skip = (offset - start) as usize;
    Ok(buf[skip..skip + bytes].to_vec())
}
