//! Owns: changing entries of block and unit table cells.
//! Promises: an edit is one compare-and-write of one cell, with the place listed in the arena and the own slot read before; edits of
//! one cell by this host follow one another; a race with another host runs the edit again on what is there now.
//! Must not know: which entries to choose.

use std::cell::{Cell as StdCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use tokio::sync::Mutex;

use super::arena::Arenas;
use crate::cas::{CasOutcome, CellChange};
use crate::context::{Context, Moment};
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Place;
use crate::format::table_entry::TableCell;
use crate::format::{Cell, CellKind};
use crate::sabotage::{Sabotage, active};
use crate::units::CellAddress;

/// Races of one edit before it is given up: each round somebody else's change succeeded.
const TRIES: u32 = 64;
/// Cells kept in memory.
const CACHED: usize = 4096;

/// A cell of a block table or unit table, and what the arena calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TablePlace {
    /// Where the cell lies.
    pub at: CellAddress,
    /// Kind of the cell.
    pub kind: CellKind,
    /// Place for the arena.
    pub place: Place,
}

struct Known {
    cell: Cell,
    table: TableCell,
    /// When the image was read from the LUN that this one descends from by own changes alone.
    ///
    /// Evidence that was sent after that counts for this image too. Seen live at t1 after the first image E was known: whoever
    /// breaks this host claims its slot after t1 and re-stamps the cell after that. An own change E to E' that was Applied shows
    /// that the re-stamp was not in between, so it comes after E' and kills whatever builds on E'.
    moment: Moment,
}

/// An edit that failed.
#[derive(Debug)]
pub struct EditFailed {
    /// Why.
    pub error: FsError,
    /// The change may be there, or may yet land. Else certain: the cell was not changed.
    pub in_doubt: bool,
}

impl From<FsError> for EditFailed {
    fn from(error: FsError) -> EditFailed {
        EditFailed { error, in_doubt: false }
    }
}

impl From<EditFailed> for FsError {
    fn from(failed: EditFailed) -> FsError {
        failed.error
    }
}

/// What a mark rests on: the root cell that reaches what is marked. Who drops a unit changes its entry before and after that, so a root cell
/// that was the newest one when the entry was known already says that the entry still is of that very use: a host that was slow would else
/// mark what has got the same place in the same object again.
pub struct Reaches<'a> {
    root: &'a Cell,
    /// It was the newest one at some time after this.
    seen: Moment,
    over: StdCell<bool>,
}

impl<'a> Reaches<'a> {
    /// For a root cell that was the newest one at some time after `seen`.
    pub fn new(root: &'a Cell, seen: Moment) -> Reaches<'a> {
        Reaches { root, seen, over: StdCell::new(false) }
    }

    /// Whether an edit found that it is not the newest one any more: that edit changed nothing.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }
}

#[derive(Default)]
struct Entry {
    known: Mutex<Option<Known>>,
    used: StdCell<u64>,
}

/// The table cells of a mounted volume, as this host knows them.
pub struct Tables {
    context: Rc<Context>,
    arenas: Rc<Arenas>,
    entries: RefCell<HashMap<CellAddress, Rc<Entry>>>,
    uses: StdCell<u64>,
}

impl Tables {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, arenas: Rc<Arenas>) -> Tables {
        Tables { context, arenas, entries: RefCell::default(), uses: StdCell::new(0) }
    }

    fn entry(&self, at: CellAddress) -> Rc<Entry> {
        self.uses.set(self.uses.get() + 1);
        let mut entries = self.entries.borrow_mut();
        if entries.len() >= CACHED && !entries.contains_key(&at) {
            let mut ages: Vec<u64> = entries.values().map(|e| e.used.get()).collect();
            let middle = ages.len() / 2;
            let (_, cut, _) = ages.select_nth_unstable(middle);
            let cut = *cut;
            entries.retain(|_, e| e.used.get() > cut || Rc::strong_count(e) > 1);
        }
        let entry = entries.entry(at).or_default().clone();
        entry.used.set(self.uses.get());
        entry
    }

    /// The entries of a cell as they are on the LUN now.
    pub async fn read(&self, place: TablePlace) -> Result<TableCell, FsError> {
        let entry = self.entry(place.at);
        let mut known = entry.known.lock().await;
        *known = Some(self.load(place).await?);
        Ok(known.as_ref().expect("just read").table.clone())
    }

    async fn load(&self, place: TablePlace) -> Result<Known, FsError> {
        let cell = self.context.read_cell(place.at).await?;
        self.decode(place, cell)
    }

    fn decode(&self, place: TablePlace, cell: Cell) -> Result<Known, FsError> {
        let corrupt = |cause| FsError::Corrupt { structure: format!("{:?} cell {}", place.kind, place.at), cause };
        cell.expect_kind(place.kind).map_err(corrupt)?;
        let table = TableCell::decode(self.context.cell_size(), cell.payload()).map_err(corrupt)?;
        Ok(Known { cell, table, moment: self.context.now() })
    }

    /// Changes a cell's entries: `edit` works on a copy and may run several times, each time on what is there then; it must do
    /// nothing where what it wants is there already. Gives the entries after the change. An edit that changes nothing on a cell that
    /// was only remembered runs again on what is on the LUN.
    pub async fn edit(
        &self,
        place: TablePlace,
        edit: impl FnMut(&mut TableCell) -> Result<(), FsError>,
    ) -> Result<TableCell, EditFailed> {
        Ok(self.edit_while(place, None, edit).await?.expect("it rests on nothing else"))
    }

    /// As [`Tables::edit`], as long as a root cell is the newest one: read again (R1), unless the image of this cell was known before.
    /// `None`: it is not, nothing is changed, and [`Reaches::is_over`] says so.
    pub async fn edit_while(
        &self,
        place: TablePlace,
        reaches: Option<&Reaches<'_>>,
        mut edit: impl FnMut(&mut TableCell) -> Result<(), FsError>,
    ) -> Result<Option<TableCell>, EditFailed> {
        let entry = self.entry(place.at);
        let mut guard = entry.known.lock().await;
        let mut fresh = false;
        for _ in 0..TRIES {
            if guard.is_none() {
                *guard = Some(self.load(place).await?);
                fresh = true;
            }
            let known = guard.as_ref().expect("loaded");
            let mut wanted = known.table.clone();
            let edited = edit(&mut wanted);
            if edited.is_err() || wanted == known.table {
                if fresh {
                    if edited.is_err() {
                        // What was this host's may have been recovered from it by others: then it is fenced, and nothing is broken.
                        self.context.prove_live([place.at.lun]).await?;
                    }
                    edited?;
                    return Ok(Some(wanted));
                }
                *guard = None;
                continue;
            }
            self.arenas.note(place.at.lun, place.place).await?;
            let live = self.context.prove_live_since(place.at.lun, known.moment);
            let (live, still) = futures_util::join!(live, self.still_reaches(reaches, known.moment));
            live?;
            if !still? {
                return Ok(None);
            }
            let change = CellChange::payload(&known.cell, wanted.encode());
            let (before, moment) = (known.table.clone(), known.moment);
            let outcome = self.context.cas(&known.cell, change).await;
            match outcome {
                Ok(CasOutcome::Applied(cell)) => {
                    *guard = Some(Known { cell, table: wanted.clone(), moment });
                    return Ok(Some(wanted));
                }
                Ok(CasOutcome::Lost(current)) => *guard = Some(self.decode(place, current)?),
                Ok(CasOutcome::Overtaken(current)) => {
                    let now = self.decode(place, current)?;
                    // One compare-and-write changes all of the entries or none, and only this incarnation changes them back.
                    let mut mine = before.entries.iter().zip(&wanted.entries).enumerate().filter(|(_, (b, w))| b != w);
                    let landed = mine.all(|(nth, (_, wanted))| now.table.entries[nth] == *wanted);
                    let table = now.table.clone();
                    *guard = Some(now);
                    if landed {
                        return Ok(Some(table));
                    }
                }
                Ok(CasOutcome::NotDone(error)) => {
                    *guard = None;
                    return Err(FsError::from(error).into());
                }
                Ok(CasOutcome::Unknown(error)) => {
                    *guard = None;
                    return Err(EditFailed { error: error.into(), in_doubt: true });
                }
                Err(error) => {
                    *guard = None;
                    return Err(EditFailed { error, in_doubt: true });
                }
            }
            fresh = true;
        }
        Err(contended(place).into())
    }

    /// Whether the root cell was the newest one after a cell's image was known.
    async fn still_reaches(&self, reaches: Option<&Reaches<'_>>, known: Moment) -> Result<bool, FsError> {
        let Some(reaches) = reaches else { return Ok(true) };
        if active(Sabotage::MarkUnproven) || known < reaches.seen {
            return Ok(true);
        }
        let still = self.context.read_cell(reaches.root.address()).await?.image() == reaches.root.image();
        reaches.over.set(reaches.over.get() || !still);
        Ok(still)
    }

    /// Makes every older compare-and-write on its way to a cell void, and gives its entries as they are then.
    pub async fn restamp(&self, place: TablePlace) -> Result<TableCell, FsError> {
        let entry = self.entry(place.at);
        let mut guard = entry.known.lock().await;
        for _ in 0..TRIES {
            let known = self.load(place).await?;
            self.context.prove_live_since(place.at.lun, known.moment).await?;
            if active(Sabotage::RecoveryWithoutRestamp) {
                return Ok(known.table);
            }
            let outcome = self.context.cas(&known.cell, CellChange::same(&known.cell)).await;
            *guard = None;
            match outcome? {
                CasOutcome::Applied(cell) => {
                    let table = known.table.clone();
                    *guard = Some(Known { cell, ..known });
                    return Ok(table);
                }
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        Err(contended(place))
    }

    /// Forgets everything: this host was fenced.
    pub fn forget(&self) {
        self.entries.borrow_mut().clear();
    }
}

fn contended(place: TablePlace) -> FsError {
    let message =
        format!("{:?} cell {}: other hosts changed it {TRIES} times in a row; try again", place.kind, place.at);
    FsError::refused(FsErrorKind::Busy, message)
}
