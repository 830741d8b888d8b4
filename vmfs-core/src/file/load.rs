//! Owns: reading pointer blocks into run maps.
//! Promises: after a lock was taken by break, a cell is re-stamped before it is believed; what was read before a change of the mapping is
//! not believed after it. Must not know: who asks, what becomes of the runs.

use std::ops::Range;
use std::rc::Rc;

use super::files::{Files, Open};
use super::open_file::{Hold, SharedFile};
use crate::cas::{CasOutcome, CellChange};
use crate::context::Context;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Content, MappingRoot};
use crate::format::root_cell::LunSet;
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind};
use crate::mapping::granules::Place;
use crate::mapping::publish::pointers;
use crate::mapping::runs::{Class, Known, RunMap};
use crate::mapping::tree::{InnerSource, MAX_FILE_BLOCKS, Tree};
use crate::object::{Image, Objects};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, CellAddress, FdId, Link, UnitAddress};

/// Times that a load is begun again because the mapping changed, before it waits for its turn to change it.
const TRIES: u32 = 4;
/// Re-stamps of one cell that lose before that is an error.
const STAMP_TRIES: u32 = 16;

/// Reads inner units of one image.
pub(super) struct UnitSource<'a> {
    objects: &'a Objects,
    fd: FdId,
    link: Link,
    /// This host holds the lock, as far as it knows.
    held: bool,
}

impl InnerSource for UnitSource<'_> {
    async fn read_inner(&self, reference: &UnitRef, kind: CellKind, index: u32) -> Result<Vec<u8>, FsError> {
        let read = self.objects.space().units.read(reference, kind, self.fd, self.link, index).await;
        match read {
            Err(error) if self.held => Err(unless_fenced(self.objects.context(), self.fd, error).await),
            read => read,
        }
    }
}

/// What another host has made of a file whose lock it has taken is not broken: that this host still lives where the lock is, is read
/// after what looks so.
pub(super) async fn unless_fenced(context: &Context, fd: FdId, error: FsError) -> FsError {
    if error.kind() != FsErrorKind::Corrupt {
        return error;
    }
    context.prove_live([fd.lun()]).await.err().unwrap_or(error)
}

/// What pointer cells said, in the order read.
pub(super) struct Learnt {
    pub(super) known: Vec<(u64, u64, Known)>,
    /// Cells that were read.
    pub(super) cells: Vec<Cell>,
}

impl Files {
    pub(super) fn source<'a>(&'a self, fd: FdId, image: &Image) -> UnitSource<'a> {
        let held = self.opened(fd).is_some_and(|shared| shared.hold() != Hold::Nothing);
        UnitSource { objects: &self.objects, fd, link: image.link(), held }
    }

    pub(super) fn tree<'a>(
        &self,
        open: &'a Open,
        root: &'a MappingRoot,
        source: &'a UnitSource<'a>,
    ) -> Tree<'a, UnitSource<'a>> {
        Tree { shape: self.shape, root, source, cache: &open.inner, name: open.shared.fd.to_string() }
    }

    /// Makes the runs of a byte range known, as far as the file goes. Waits while the range is being taken away. Does nothing for a file
    /// without a lock: it is read through [`Files::read`].
    pub async fn load_runs(&self, file: &SharedFile, range: Range<u64>) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.load(&open, range).await
    }

    pub(super) async fn load(&self, open: &Rc<Open>, range: Range<u64>) -> Result<(), FsError> {
        for attempt in 0.. {
            let turn = if attempt < TRIES && !open.shared.state.read().runs.is_frozen(&range) {
                None
            } else {
                Some(open.change.lock().await)
            };
            let loaded = self.load_once(open, &range).await?;
            drop(turn);
            if loaded {
                break;
            }
        }
        let later = self.joined_later(open, &range);
        if later.iter().next().is_some() { self.admit(open, &later).await } else { Ok(()) }
    }

    /// The LUNs under a byte range that the file's lock was taken without.
    fn joined_later(&self, open: &Open, range: &Range<u64>) -> LunSet {
        let (state, mut later) = (open.shared.state.read(), LunSet::default());
        let end = range.end.min(open.shared.size());
        let mut at = range.start;
        while at < end && state.access.hold != Hold::Nothing && state.inline.is_none() {
            let stretch = state.runs.stretch(at, end);
            if let Class::Data { lun, .. } = stretch.class
                && state.access.permit(lun).is_none()
            {
                later.insert(lun);
            }
            at = stretch.end;
        }
        later
    }

    /// The same for a caller that holds the change lock.
    pub(super) async fn load_in_change(&self, open: &Rc<Open>, range: Range<u64>) -> Result<(), FsError> {
        while !self.load_once(open, &range).await? {}
        Ok(())
    }

    /// One pass; false when the mapping changed meanwhile.
    async fn load_once(&self, open: &Rc<Open>, range: &Range<u64>) -> Result<bool, FsError> {
        let shift = self.context.block_size().shift();
        let end = (range.end.saturating_sub(1) >> shift).min(MAX_FILE_BLOCKS - 1) + 1;
        let mut from = range.start >> shift;
        loop {
            let (next, version) = {
                let state = open.shared.state.read();
                if state.access.hold == Hold::Nothing || state.inline.is_some() {
                    return Ok(true);
                }
                (state.runs.first_unknown(from, end), state.runs.version())
            };
            let Some(block) = next else { return Ok(true) };
            let learnt = self.read_pointers(open, &open.object.image(), block, true).await?;
            let mut state = open.shared.state.write();
            if state.runs.version() != version {
                return Ok(false);
            }
            let mut covered = block;
            for (first, blocks, known) in learnt.known {
                state.runs.learn(first, blocks, known);
                covered = covered.max(first + blocks);
            }
            if state.runs.first_unknown(block, block + 1).is_some() {
                return Err(self.missing_block(open, block));
            }
            from = covered;
        }
    }

    fn missing_block(&self, open: &Open, block: u64) -> FsError {
        let message =
            format!("file block {block} of {} lies on a LUN that is not there; see vmfs status", open.shared.fd);
        FsError::refused(FsErrorKind::Io, message)
    }

    /// Reads the pointers around file block `block`: those of its PB cell, or the hole that it lies in. Blocks on a LUN that is not
    /// there are left out. `held`: this host holds the lock.
    pub(super) async fn read_pointers(
        &self,
        open: &Open,
        image: &Rc<Image>,
        block: u64,
        held: bool,
    ) -> Result<Learnt, FsError> {
        let Content::Mapped(root) = &image.body.content else {
            return Ok(Learnt { known: vec![(0, MAX_FILE_BLOCKS, Known::Hole)], cells: Vec::new() });
        };
        let source = self.source(open.shared.fd, image);
        let tree = self.tree(open, root, &source);
        let place = self.shape.place(block);
        let (pb, unit) = match tree.next_attached(place.pb).await? {
            Some(found) => found,
            None => {
                let hole = (block, MAX_FILE_BLOCKS - block, Known::Hole);
                return Ok(Learnt { known: vec![hole], cells: Vec::new() });
            }
        };
        if pb != place.pb {
            let hole = (block, self.shape.first_block(pb) - block, Known::Hole);
            return Ok(Learnt { known: vec![hole], cells: Vec::new() });
        }
        self.space.units.know(unit).await?;
        let at = self.space.units.cell_of(unit, place.cell)?;
        let cell = self.pb_cell(open, image, at, pb, held).await?;
        let first = self.shape.first_block(pb) + place.cell as u64 * self.shape.per_cell();
        let found = pointers(self.context.cell_size(), cell.payload()).map_err(|cause| FsError::Corrupt {
            structure: format!("pointer cell {at} of {}", open.shared.fd),
            cause,
        })?;
        let mut known = Vec::with_capacity(found.len());
        for (nth, pointer) in found.into_iter().enumerate() {
            let block = first + nth as u64;
            match pointer {
                None => known.push((block, 1, Known::Hole)),
                Some(pointer) => {
                    self.context.know_block(pointer.at).await?;
                    if let Some(place) = self.place(pointer.at)? {
                        known.push((block, 1, Known::Block(place, pointer.valid)));
                    }
                }
            }
        }
        Ok(Learnt { known, cells: vec![cell] })
    }

    /// Where a block lies; `None`: its LUN is not there.
    pub(super) fn place(&self, at: BlockAddress) -> Result<Option<Place>, FsError> {
        let Ok(member) = self.context.member(at.lun) else { return Ok(None) };
        match member.layout().block_offset(at.block) {
            Some(offset) => Ok(Some(Place { at, offset })),
            None => {
                let message = format!("a pointer names block {at}, which the LUN does not have; run fsck.vmfs");
                Err(FsError::refused(FsErrorKind::Corrupt, message))
            }
        }
    }

    /// Reads a PB cell, from memory while this host holds the lock.
    pub(super) async fn pb_cell(
        &self,
        open: &Open,
        image: &Image,
        at: CellAddress,
        pb: u32,
        held: bool,
    ) -> Result<Cell, FsError> {
        if held && let Some(cell) = open.cells.borrow().get(at) {
            return Ok(cell);
        }
        let mut cell = self.context.read_cell(at).await?;
        match self.check_pb_cell(open, image, &cell, pb) {
            Err(error) if held => return Err(unless_fenced(&self.context, open.shared.fd, error).await),
            checked => checked?,
        }
        if held {
            cell = self.believe(open, image, cell).await?;
            open.cells.borrow_mut().put(cell.clone(), self.context.now());
        }
        Ok(cell)
    }

    /// All cells of a pointer block, with one command where they are not in memory.
    pub(super) async fn pb_cells(
        &self,
        open: &Open,
        image: &Image,
        pb: u32,
        unit: UnitAddress,
    ) -> Result<Vec<Cell>, FsError> {
        self.space.units.know(unit).await?;
        let member = self.context.member(unit.lun)?;
        let first = self.space.units.cell_of(unit, 0)?;
        let count = self.context.cell_size().cells_per_unit();
        let mut cells = Vec::with_capacity(count);
        for (nth, cell) in self.context.io.read_span(&member.lun, first, count).await?.into_iter().enumerate() {
            let cell = match cell {
                Ok(cell) => cell,
                Err(_) => self.context.read_cell(self.space.units.cell_of(unit, nth)?).await?,
            };
            if let Err(error) = self.check_pb_cell(open, image, &cell, pb) {
                return Err(unless_fenced(&self.context, open.shared.fd, error).await);
            }
            cells.push(self.believe(open, image, cell).await?);
        }
        Ok(cells)
    }

    fn check_pb_cell(&self, open: &Open, image: &Image, cell: &Cell, pb: u32) -> Result<(), FsError> {
        cell.expect_kind(CellKind::PointerBlock)
            .and_then(|()| cell.expect_owner(open.shared.fd, image.link(), pb))
            .map_err(|cause| FsError::Corrupt { structure: format!("pointer block {pb} of {}", open.shared.fd), cause })
    }

    /// After a break: a cell older than the break gets this holder's token before it is believed, so that nothing that the broken host
    /// still has on its way changes it any more.
    async fn believe(&self, open: &Open, image: &Image, cell: Cell) -> Result<Cell, FsError> {
        let mut cell = cell;
        for _ in 0..STAMP_TRIES {
            let trusted = cell.header().token >= image.root.unclean.token || active(Sabotage::OldPointersTrusted);
            if trusted || self.context.is_read_only() {
                return Ok(cell);
            }
            let change = CellChange { token: image.root.lock.token, ..CellChange::same(&cell) };
            match self.context.cas(&cell, change).await? {
                CasOutcome::Applied(stamped) => return Ok(stamped),
                CasOutcome::Lost(current) | CasOutcome::Overtaken(current) => cell = current,
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        let message =
            format!("a pointer cell of {} is changed by another host all the time; see vmfs status", open.shared.fd);
        Err(FsError::refused(FsErrorKind::Io, message))
    }

    /// Reads the pointers of a byte range of a file without a lock into a map of their own. Gives the cells as evidence.
    pub(super) async fn view(
        &self,
        open: &Open,
        image: &Rc<Image>,
        range: Range<u64>,
    ) -> Result<(RunMap, Vec<Cell>), FsError> {
        let shift = self.context.block_size().shift();
        let mut runs = RunMap::new(self.context.block_size(), usize::MAX);
        let mut cells = Vec::new();
        let end = (range.end.saturating_sub(1) >> shift).min(MAX_FILE_BLOCKS - 1) + 1;
        let mut from = range.start >> shift;
        while let Some(block) = runs.first_unknown(from, end) {
            let learnt = self.read_pointers(open, image, block, false).await?;
            learnt.known.into_iter().for_each(|(first, blocks, known)| runs.learn(first, blocks, known));
            cells.extend(learnt.cells);
            if runs.first_unknown(block, block + 1).is_some() {
                return Err(self.missing_block(open, block));
            }
            from = block;
        }
        Ok((runs, cells))
    }

    /// Whether what [`Files::view`] read is still so: the object, its body and the cells.
    pub(super) async fn is_unchanged(&self, open: &Open, image: &Image, cells: &[Cell]) -> Result<bool, FsError> {
        self.refresh(open).await?;
        let now = open.object.image();
        if now.root.body != image.root.body || now.link() != image.link() {
            return Ok(false);
        }
        for cell in cells {
            match self.context.read_cell(cell.address()).await {
                Ok(current) if current.image() == cell.image() => {}
                Ok(_) | Err(FsError::Corrupt { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
