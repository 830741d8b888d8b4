//! Owns: moving what a file has on one LUN to others while it is used.
//! Promises: the bytes are on the other LUN, durably, before a pointer says so; nothing is in flight to a block that is given up; what is
//! cut off at any moment is begun again. Must not know: why the LUN is to be empty, whose idea it was.
//!
//! ```text
//! recall     programs forget the places         a VM's I/O to these blocks has ended and waits
//! window     freeze, publish what is filled     data I/O to these blocks waits
//! copy       take blocks elsewhere, read, write durably
//! mark       old blocks: retiring
//! commit     the pointer cell names the new blocks
//! free       UNMAP, free the old ones
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::discard::{Loot, is_unknown};
use super::files::{Files, Open, is_unlinked};
use super::open_file::{Hold, OpenMode};
use super::publish::{BodyChange, contended};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Content;
use crate::format::pointer::{BlockPointer, Granules};
use crate::format::root_cell::ObjectFlags;
use crate::mapping::publish::{pointers, with_moved};
use crate::mapping::tree::{UPPER_INDEX, UPPER_REFS};
use crate::object::Object;
use crate::units::{BlockAddress, GRANULES_PER_BLOCK, LunIndex};

/// Bytes of a file that are moved with one change: data I/O to them waits meanwhile.
const AT_ONCE_BYTES: u64 = 8 << 20;
/// Pointer blocks that are moved with one commit.
const UNITS_AT_ONCE: usize = 8;
/// Changes of one cell that lose before that is an error.
const TRIES: u32 = 64;

/// A block that is moved: its number in the file, where it lies, what is written of it.
type Leaving = (u32, BlockPointer);

impl Files {
    /// Moves everything of a file but its root cell from `from` to other LUNs, under its lock, which this host takes unless it has it.
    /// `tell` hears of bytes moved, and ends it by an error.
    ///
    /// # Errors
    /// `Busy`: another host has the lock, or a disk is open here for reading only. `NoSpace`: the other LUNs are full. What was moved
    /// before an error stays moved.
    pub(crate) async fn relocate(
        &self,
        object: &Rc<Object>,
        from: LunIndex,
        tell: &mut dyn FnMut(u64) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        if let Some(open) = self.held_for_writing(object) {
            return self.relocate_open(&open, from, tell).await;
        }
        let file = self.open(object, OpenMode { read: true, write: true, truncate: false }).await?;
        let open = self.find(&file)?;
        let moved = self.relocate_open(&open, from, tell).await;
        let closed = self.close(file).await;
        moved.and(closed)
    }

    async fn relocate_open(
        &self,
        open: &Rc<Open>,
        from: LunIndex,
        tell: &mut dyn FnMut(u64) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        let fd = open.shared.fd;
        if open.object.image().root.flags.contains(ObjectFlags::MULTI_WRITER) {
            let message =
                format!("{fd} is open for several writers; close it on all hosts, take the flag off, and repeat");
            return Err(FsError::refused(FsErrorKind::Unsupported, message));
        }
        if is_unlinked(open) {
            let message = format!("{fd} was removed and is still open here; it goes with its last close");
            return Err(FsError::refused(FsErrorKind::Busy, message));
        }
        // What is not published may lie there; what was taken ahead certainly is not needed there.
        self.flush_open(open, false).await?;
        {
            let mut taking = open.taking.lock().await;
            self.free_spares(open, &mut taking).await?;
        }
        self.spread(open).await?;
        let step = (AT_ONCE_BYTES >> self.context.block_size().shift()).max(1);
        let (mut next, mut near) = (self.attached_at(open, 0).await?, None);
        while let Some(pb) = next {
            let (first, end) = (self.shape.first_block(pb), self.shape.first_block(pb + 1));
            for cell in (first..end).step_by(self.shape.per_cell() as usize) {
                let mut at = cell;
                let cell_end = (cell + self.shape.per_cell()).min(end);
                // Most cells have nothing there: one look at each.
                while let Some(first) = self.first_there(open, at..cell_end, from).await? {
                    let window = first..cell_end.min(first + step);
                    let shift = self.context.block_size().shift();
                    // Before the change lock is taken: a program ends its requests first, and they may need that.
                    let back = self.recall(open, window.start << shift..window.end << shift).await?;
                    let moved = self.relocate_window(open, window.clone(), from, &mut near).await;
                    back.finish(open);
                    tell(moved? << shift)?;
                    at = window.end;
                }
            }
            next = match pb.checked_add(1) {
                Some(after) => self.attached_at(open, after).await?,
                None => None,
            };
        }
        self.relocate_units(open, from).await
    }

    async fn attached_at(&self, open: &Open, from: u32) -> Result<Option<u32>, FsError> {
        let _change = open.change.lock().await;
        let image = open.object.image();
        let Content::Mapped(root) = &image.body.content else { return Ok(None) };
        let source = self.source(open.shared.fd, &image);
        Ok(self.tree(open, root, &source).next_attached(from).await?.map(|(pb, _)| pb))
    }

    /// The first block of a range (of one pointer cell) that lies on `from`, by pointers or by what is not published.
    async fn first_there(&self, open: &Rc<Open>, blocks: Range<u64>, from: LunIndex) -> Result<Option<u64>, FsError> {
        if blocks.is_empty() {
            return Ok(None);
        }
        let _change = open.change.lock().await;
        check_held(open)?;
        let pointed = self.leaving(open, &blocks, from).await?.first().map(|(index, _)| u64::from(*index));
        Ok(pointed.into_iter().chain(self.unpublished_on(open, &blocks, from)).min())
    }

    /// The first block of a range that lies on `from` and differs from what the pointers say.
    fn unpublished_on(&self, open: &Open, blocks: &Range<u64>, from: LunIndex) -> Option<u64> {
        let state = open.shared.state.read();
        let inside = state.runs.unpublished(blocks.start).take_while(|(block, _)| *block < blocks.end);
        inside.filter(|(_, state)| state.place.at.lun == from).map(|(block, _)| block).next()
    }

    /// The pointers of a range of one cell that name blocks on `from`. The caller holds the change lock.
    async fn leaving(&self, open: &Open, blocks: &Range<u64>, from: LunIndex) -> Result<Vec<Leaving>, FsError> {
        let place = self.shape.place(blocks.start);
        let Some(cell) = self.pointer_cell(open, place.pb, place.cell).await? else { return Ok(Vec::new()) };
        let first = self.shape.first_block(place.pb) + place.cell as u64 * self.shape.per_cell();
        let found = pointers(self.context.cell_size(), cell.payload()).map_err(|cause| FsError::Corrupt {
            structure: format!("pointer block {} of {}", place.pb, open.shared.fd),
            cause,
        })?;
        let numbered = (first..).zip(found).filter(|(block, _)| blocks.contains(block));
        Ok(numbered
            .filter_map(|(block, pointer)| Some((block as u32, pointer?)))
            .filter(|(_, pointer)| pointer.at.lun == from)
            .collect())
    }

    async fn pointer_cell(&self, open: &Open, pb: u32, nth: usize) -> Result<Option<crate::format::Cell>, FsError> {
        let image = open.object.image();
        let Content::Mapped(root) = &image.body.content else { return Ok(None) };
        let source = self.source(open.shared.fd, &image);
        let Some(unit) = self.tree(open, root, &source).find(pb).await? else { return Ok(None) };
        self.space.units.know(unit).await?;
        let at = self.space.units.cell_of(unit, nth)?;
        self.pb_cell(open, &image, at, pb, true).await.map(Some)
    }

    /// Moves the blocks of a range of one pointer cell that lie on `from`; gives how many.
    async fn relocate_window(
        &self,
        open: &Rc<Open>,
        blocks: Range<u64>,
        from: LunIndex,
        near: &mut Option<BlockAddress>,
    ) -> Result<u64, FsError> {
        let _change = open.change.lock().await;
        check_held(open)?;
        let (fd, shift) = (open.shared.fd, self.context.block_size().shift());
        let frozen = self.freeze(open, &(blocks.start << shift..blocks.end << shift)).await;
        if self.unpublished_on(open, &blocks, from).is_some() {
            self.flush_in_change(open, false).await?;
            let unfilled = self.take_unfilled(open, &blocks, from);
            self.free_unpublished(open, &unfilled).await?;
        }
        let mut leaving = self.leaving(open, &blocks, from).await?;
        let mut moved = 0;
        while !leaving.is_empty() {
            let indexes: Vec<u32> = leaving.iter().map(|(index, _)| *index).collect();
            let taken = self.take_or_reclaim(open, &indexes, *near, None).await?;
            *near = taken.last().map(|(_, at)| *at);
            let rest = leaving.split_off(taken.len());
            let moves: Vec<(Leaving, BlockAddress)> =
                leaving.iter().copied().zip(taken.iter().map(|(_, at)| *at)).collect();
            if let Err(error) = self.copy_all(open, &moves).await {
                self.free_unpublished(open, &taken).await?;
                return Err(error);
            }
            let dropped: Vec<(u32, BlockAddress)> = leaving.iter().map(|(index, old)| (*index, old.at)).collect();
            if let Err(error) = self.space.blocks.retire(fd, &dropped).await {
                self.free_unpublished(open, &taken).await?;
                return Err(error);
            }
            match self.repoint(open, &blocks, &moves).await {
                Ok(()) => {}
                Err(error) if is_unknown(&error) => {
                    // The pointers may change at any time: what is written in place from now on could be lost.
                    open.shared.doubt.store(true, Ordering::Release);
                    return Err(error);
                }
                Err(error) => {
                    self.space.blocks.keep(fd, &dropped).await?;
                    self.free_unpublished(open, &taken).await?;
                    return Err(error);
                }
            }
            {
                let mut state = open.shared.state.write();
                dropped.iter().for_each(|(index, _)| state.runs.remove(u64::from(*index)..u64::from(*index) + 1));
            }
            moved += dropped.len() as u64;
            let loot = Loot::of(dropped);
            let certain = self.unmap(open, &loot).await;
            self.free_loot(open, loot, certain).await?;
            leaving = rest;
        }
        drop(frozen);
        Ok(moved)
    }

    /// Takes blocks of a frozen range that nobody has filled out of the map.
    fn take_unfilled(&self, open: &Open, blocks: &Range<u64>, from: LunIndex) -> Vec<(u32, BlockAddress)> {
        let mut state = open.shared.state.write();
        let unpublished = state.runs.unpublished(blocks.start).take_while(|(block, _)| *block < blocks.end);
        let unfilled: Vec<(u64, BlockAddress)> = unpublished
            .filter(|(_, known)| known.fresh && known.place.at.lun == from)
            .map(|(block, known)| (block, known.place.at))
            .collect();
        unfilled.iter().for_each(|(block, _)| state.runs.set_block(*block, None));
        unfilled.into_iter().map(|(block, at)| (block as u32, at)).collect()
    }

    /// Copies what was written of each block, durably.
    async fn copy_all(&self, open: &Open, moves: &[(Leaving, BlockAddress)]) -> Result<(), FsError> {
        for ((_, old), new) in moves {
            let (source, target) = (self.place(old.at)?, self.place(*new)?);
            let source = source.ok_or(FsError::MissingLun { lun: old.at.lun })?.offset;
            let target = target.ok_or(FsError::MissingLun { lun: new.lun })?.offset;
            for (skip, length) in stretches(old.valid, self.context.block_size().granule_bytes()) {
                let bytes = self.context.member(old.at.lun)?.lun.read(source + skip, length as usize).await?;
                let permit = open.shared.permit(new.lun).ok_or(FsError::Fenced { lun: new.lun })?;
                self.wait_for_gate(open, &permit).await?;
                if let Err(error) = self.context.member(new.lun)?.lun.write(target + skip, bytes).await {
                    self.note_doubt(open, &error);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// The pointer cell names the new blocks from now on.
    async fn repoint(
        &self,
        open: &Open,
        blocks: &Range<u64>,
        moves: &[(Leaving, BlockAddress)],
    ) -> Result<(), FsError> {
        let place = self.shape.place(blocks.start);
        let pairs: Vec<(u64, BlockAddress, BlockAddress)> =
            moves.iter().map(|((index, old), new)| (u64::from(*index), old.at, *new)).collect();
        for _ in 0..TRIES {
            let Some(cell) = self.pointer_cell(open, place.pb, place.cell).await? else { return Err(contended(open)) };
            let payload = with_moved(self.shape, &cell, &pairs).map_err(|cause| FsError::Corrupt {
                structure: format!("pointer block {} of {}", place.pb, open.shared.fd),
                cause,
            })?;
            let Some(payload) = payload else { return Err(contended(open)) };
            let image = open.object.image();
            if let Ok(new) = self.change_pb_cell(open, &image, &cell, payload).await? {
                open.cells.borrow_mut().put(new, self.context.now());
                return Ok(());
            }
        }
        Err(contended(open))
    }

    /// Moves pointer blocks, inner units and the body.
    async fn relocate_units(&self, open: &Rc<Open>, from: LunIndex) -> Result<(), FsError> {
        loop {
            let _change = open.change.lock().await;
            check_held(open)?;
            let image = open.object.image();
            let mut change = BodyChange::default();
            if let Content::Mapped(root) = &image.body.content {
                let source = self.source(open.shared.fd, &image);
                let tree = self.tree(open, root, &source);
                let mut next = Some(0);
                while let Some(at) = next
                    && let Some((pb, unit)) = tree.next_attached(at).await?
                    && change.attach.len() < UNITS_AT_ONCE
                {
                    if unit.lun == from {
                        let cells = self.pb_cells(open, &image, pb, unit).await?;
                        let used = self.shape.per_cell() as usize * 8;
                        let stream = cells.iter().flat_map(|cell| cell.payload()[..used].iter().copied()).collect();
                        change.attach.insert(pb, stream);
                        change.detach.insert(pb, unit);
                    }
                    next = pb.checked_add(1);
                }
                if change.attach.is_empty() {
                    let per_leaf = self.shape.per_pb() as u32;
                    for (index, reference) in tree.inner_units().await? {
                        if reference.at.lun == from && change.rewritten.len() < UNITS_AT_ONCE {
                            let leaf = if index & UPPER_INDEX == 0 {
                                index
                            } else {
                                (index & !UPPER_INDEX) * UPPER_REFS as u32
                            };
                            change.rewritten.extend(tree.next_attached(leaf * per_leaf).await?);
                        }
                    }
                }
            }
            let only_body = change.attach.is_empty() && change.rewritten.is_empty();
            if only_body && image.root.body.is_none_or(|body| body.at.lun != from) {
                return Ok(());
            }
            self.commit_body(open, change).await?;
            open.cells.borrow_mut().clear();
            if only_body && open.object.image().root.body.is_some_and(|body| body.at.lun == from) {
                let message =
                    format!("no room for the metadata of {} on the other LUNs; add an extent", open.shared.fd);
                return Err(FsError::refused(FsErrorKind::NoSpace, message));
            }
        }
    }
}

fn check_held(open: &Open) -> Result<(), FsError> {
    if open.shared.hold() == Hold::Writing {
        return Ok(());
    }
    let message = format!("{} was closed while it was moved; repeat", open.shared.fd);
    Err(FsError::refused(FsErrorKind::Busy, message))
}

/// The written parts of a block: bytes from its start, and length.
fn stretches(valid: Granules, granule: u64) -> Vec<(u64, u64)> {
    let mut parts: BTreeMap<u64, u64> = BTreeMap::new();
    let mut open: Option<u64> = None;
    for nth in 0..GRANULES_PER_BLOCK {
        match (valid.has(nth as u32), open) {
            (true, None) => {
                parts.insert(nth * granule, granule);
                open = Some(nth * granule);
            }
            (true, Some(start)) => *parts.entry(start).or_default() += granule,
            (false, _) => open = None,
        }
    }
    parts.into_iter().collect()
}
