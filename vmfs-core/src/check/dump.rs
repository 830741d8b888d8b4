//! Owns: showing structures of LUNs that are not mounted, by the names that messages give them.
//! Promises: it only reads, and works on damaged volumes: what fails its checks is shown as that.
//! Must not know: how the text is printed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::rc::Rc;

use super::probe;
use crate::cas::CellIo;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Body;
use crate::format::layout::{LunLayout, arena_cell, header_cell, header_copy_cell, heartbeat_cell, member_cell};
use crate::format::root_cell::RootCell;
use crate::format::table_entry::TableCell;
use crate::format::{Cell, CellKind};
use crate::lun::Lun;
use crate::units::{BlockAddress, BlockNo, CellAddress, FdId, LunIndex, SlotId, UnitAddress};
use crate::volume::dump::show_cell;
use crate::volume::words;

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The header cell of each LUN.
    Header,
    /// The copy of it.
    Copy,
    /// The member cell of this index, on each LUN.
    Member(LunIndex),
    /// The heartbeat cell of this slot, on each LUN.
    Slot(SlotId),
    /// The arena cell of this slot, on each LUN.
    Arena(SlotId),
    /// The root directory.
    Root,
    /// An object: root cell and body.
    Object(FdId),
    /// One cell.
    Cell(CellAddress),
    /// The table entry of a block.
    Block(BlockAddress),
    /// A unit: its table entry and its cells.
    Unit(UnitAddress),
}

impl Place {
    /// Parses `header`, `copy`, `root`, `member 3`, `slot 7`, `arena 7`, `fd1.0.5`, `lun1+0x400000`, `lun1:b7`, `lun1:b7:u3`.
    pub fn parse(text: &str) -> Option<Place> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let slot = |number: &str| number.parse().ok().map(SlotId);
        match words.as_slice() {
            ["header"] => Some(Place::Header),
            ["copy"] => Some(Place::Copy),
            ["root"] => Some(Place::Root),
            ["member", number] => LunIndex::new(number.parse().ok()?).map(Place::Member),
            ["slot", number] => slot(number).map(Place::Slot),
            ["arena", number] => slot(number).map(Place::Arena),
            [word] => match word.strip_prefix("fd") {
                Some(rest) => parse_fd(rest).map(Place::Object),
                None => parse_address(word.strip_prefix("lun")?),
            },
            _ => None,
        }
    }
}

fn parse_fd(text: &str) -> Option<FdId> {
    let mut parts = text.split('.');
    let lun = LunIndex::new(parts.next()?.parse().ok()?)?;
    let block = BlockNo::new(parts.next()?.parse().ok()?)?;
    let cell = parts.next()?.parse().ok()?;
    FdId::new(BlockAddress { lun, block }, cell).filter(|_| parts.next().is_none())
}

/// What follows "lun": `1+0x400000`, `1:b7` or `1:b7:u3`.
fn parse_address(text: &str) -> Option<Place> {
    if let Some((lun, offset)) = text.split_once('+') {
        let lun = LunIndex::new(lun.parse().ok()?)?;
        let offset = match offset.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok()?,
            None => offset.parse().ok()?,
        };
        return (offset >> CellAddress::OFFSET_BITS == 0).then_some(Place::Cell(CellAddress { lun, offset }));
    }
    let mut parts = text.split(':');
    let lun = LunIndex::new(parts.next()?.parse().ok()?)?;
    let block = BlockNo::new(parts.next()?.strip_prefix('b')?.parse().ok()?)?;
    let place = match parts.next() {
        None => Place::Block(BlockAddress { lun, block }),
        Some(unit) => Place::Unit(UnitAddress { lun, block, unit: unit.strip_prefix('u')?.parse().ok()? }),
    };
    parts.next().is_none().then_some(place)
}

/// The LUNs that were given, with their geometry.
struct Shown {
    io: CellIo,
    luns: BTreeMap<LunIndex, (Rc<dyn Lun>, LunLayout)>,
    root: FdId,
    text: String,
}

/// Shows a place of the volume that these LUNs belong to. Not all of its LUNs need be given.
pub async fn dump(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>], place: Place) -> Result<String, FsError> {
    let members = probe::probe_all(luns, &mut Vec::new()).await?;
    let (context, root) = (members[0].context, members[0].header.root);
    let luns = members.iter().map(|m| (m.header.lun_index, (m.lun.clone(), m.layout()))).collect();
    let mut shown = Shown { io: CellIo::new(context, env.clone()), luns, root, text: String::new() };
    let each: Vec<LunIndex> = shown.luns.keys().copied().collect();
    match place {
        Place::Header => shown.cells(each.into_iter().map(header_cell)).await?,
        Place::Copy => shown.cells(each.into_iter().map(header_copy_cell)).await?,
        Place::Member(index) => shown.cells(each.into_iter().map(|lun| member_cell(lun, index))).await?,
        Place::Slot(slot) => shown.cells(each.into_iter().map(|lun| heartbeat_cell(lun, slot))).await?,
        Place::Arena(slot) => shown.cells(each.into_iter().map(|lun| arena_cell(lun, slot))).await?,
        Place::Root => shown.object(shown.root).await?,
        Place::Object(fd) => shown.object(fd).await?,
        Place::Cell(at) => shown.cells([at]).await?,
        Place::Block(at) => shown.block(at).await?,
        Place::Unit(at) => shown.unit(at).await?,
    }
    Ok(shown.text)
}

impl Shown {
    fn lun(&self, lun: LunIndex) -> Result<(Rc<dyn Lun>, LunLayout), FsError> {
        self.luns.get(&lun).cloned().ok_or_else(|| {
            FsError::refused(FsErrorKind::NotFound, format!("{lun} was not given; name its path with --lun too"))
        })
    }

    fn nowhere(what: impl std::fmt::Display) -> FsError {
        FsError::refused(FsErrorKind::NotFound, format!("there is no {what} on this volume"))
    }

    /// Reads one cell; what fails its checks is said in the text and gives none.
    async fn cell(&mut self, at: CellAddress) -> Result<Option<Cell>, FsError> {
        let (lun, _) = self.lun(at.lun)?;
        let size = self.io.context().cell_size.bytes() as u64;
        if !at.offset.is_multiple_of(size) || at.offset + size > lun.bytes() {
            return Err(Self::nowhere(format!("cell at {at}: cells lie every {size} bytes below {:#x}", lun.bytes())));
        }
        match self.io.read(&lun, at).await {
            Ok(cell) => Ok(Some(cell)),
            Err(FsError::Corrupt { cause, .. }) => {
                self.line(format!("{at}: {cause}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn line(&mut self, text: impl std::fmt::Display) {
        writeln!(self.text, "{text}").expect("a String takes everything");
    }

    async fn cells(&mut self, all: impl IntoIterator<Item = CellAddress>) -> Result<(), FsError> {
        for at in all {
            if let Some(cell) = self.cell(at).await? {
                let text = show_cell(self.io.context().cell_size, &cell);
                self.text.push_str(&text);
            }
        }
        Ok(())
    }

    async fn object(&mut self, fd: FdId) -> Result<(), FsError> {
        let (_, layout) = self.lun(fd.lun())?;
        let at = layout.root_cell(fd).ok_or_else(|| Self::nowhere(fd))?;
        let Some(cell) = self.cell(at).await? else { return Ok(()) };
        let size = self.io.context().cell_size;
        let text = show_cell(size, &cell);
        self.text.push_str(&text);
        if cell.header().kind != CellKind::Root {
            return Ok(());
        }
        let Some(body) = RootCell::decode(size, cell.payload()).ok().and_then(|root| root.body) else { return Ok(()) };
        let mut stream = Vec::new();
        for nth in 0..usize::from(body.used_cells) {
            let (_, layout) = self.lun(body.at.lun)?;
            let at = layout.unit_cell(body.at, nth).ok_or_else(|| Self::nowhere(body.at))?;
            let Some(cell) = self.cell(at).await? else { return Ok(()) };
            stream.extend_from_slice(cell.payload());
        }
        match Body::decode(size, &stream) {
            Ok(body) => {
                self.text.push_str(&words::attributes(&body.attributes));
                self.text.push_str(&words::content(&body.content));
            }
            Err(error) => self.line(format!("the body at {}: {error}", body.at)),
        }
        Ok(())
    }

    async fn entry(&mut self, at: CellAddress, nth: usize, what: String) -> Result<(), FsError> {
        let Some(cell) = self.cell(at).await? else { return Ok(()) };
        match TableCell::decode(self.io.context().cell_size, cell.payload()) {
            Ok(table) => {
                let entry = table.entries.get(nth).map_or_else(|| "none".to_owned(), words::table_entry);
                self.line(format!("{what} (entry {nth} of cell {at}): {entry}"));
            }
            Err(error) => self.line(format!("{at}: {error}")),
        }
        Ok(())
    }

    async fn block(&mut self, at: BlockAddress) -> Result<(), FsError> {
        let (_, layout) = self.lun(at.lun)?;
        let (cell, nth) = layout.table_entry(at.block).ok_or_else(|| Self::nowhere(at))?;
        let offset = layout.block_offset(at.block).unwrap_or(0);
        self.entry(cell, nth, format!("block {at} at byte {offset:#x}")).await
    }

    async fn unit(&mut self, at: UnitAddress) -> Result<(), FsError> {
        let (_, layout) = self.lun(at.lun)?;
        let (cell, nth) = layout.unit_table_entry(at).ok_or_else(|| Self::nowhere(at))?;
        self.entry(cell, nth, format!("unit {at}")).await?;
        for cell in 0..layout.cell_size.cells_per_unit() {
            if let Some(at) = layout.unit_cell(at, cell) {
                self.cells([at]).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_parsed_as_messages_print_them() {
        let lun = LunIndex::new(3).unwrap();
        let block = BlockAddress { lun, block: BlockNo::new(7).unwrap() };
        let unit = UnitAddress { lun, block: block.block, unit: 11 };
        let fd = FdId::new(block, 5).unwrap();
        let cell = CellAddress { lun, offset: 0x40_0000 };
        assert_eq!(Place::parse(&block.to_string()), Some(Place::Block(block)));
        assert_eq!(Place::parse(&unit.to_string()), Some(Place::Unit(unit)));
        assert_eq!(Place::parse(&fd.to_string()), Some(Place::Object(fd)));
        assert_eq!(Place::parse(&cell.to_string()), Some(Place::Cell(cell)));
        assert_eq!(Place::parse("slot 255"), Some(Place::Slot(SlotId(255))));
        assert_eq!(Place::parse(" member  3 "), Some(Place::Member(lun)));
        for wrong in [
            "",
            "slot",
            "slot 256",
            "member 0",
            "member 255",
            "fd1.2",
            "fd1.2.3.4",
            "lun1",
            "lun1:7",
            "lun1:b7:u",
            "lun0+1",
        ] {
            assert_eq!(Place::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_words_are_a_place_or_not(text in "[a-z0-9:+. ]{0,24}") {
            let _ = Place::parse(&text);
        }
    }
}
