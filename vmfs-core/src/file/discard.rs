//! Owns: taking away: punching holes, making ranges zero, cutting a file.
//! Promises: nothing is taken from data in flight; the order is epoch, wait, pointers, UNMAP, free; a discard between fill and publish
//! cancels the publish; a granule that is covered in part is zeroed and its bit stays. Must not know: who discards.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::allocate::{in_doubt, may_still_run};
use super::erase::broken;
use super::files::{Files, Open, touch};
use super::open_file::{Hold, SharedFile};
use super::publish::{BodyChange, contended};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Content, DiskFormat};
use crate::format::pointer::Granules;
use crate::format::root_cell::ObjectFlags;
use crate::gate::GateState;
use crate::lun::LunErrorKind;
use crate::mapping::granules::{BlockState, GranuleEvent};
use crate::mapping::publish::{Taken, Taking, without};
use crate::mapping::runs::{Class, Known};
use crate::mapping::tree::MAX_FILE_BLOCKS;
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, GRANULES_PER_BLOCK, UnitAddress};

/// Changes of one cell that lose before that is an error.
const TRIES: u32 = 64;
/// Pointer blocks that are cut off with one commit.
const CUT_AT_ONCE: usize = 8;

/// Makes a range unknown to data I/O until it is dropped.
pub(super) struct Frozen<'a> {
    shared: &'a Arc<SharedFile>,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.shared.state.write().runs.thaw();
    }
}

/// What was taken from the file and is not free yet.
#[derive(Default)]
pub(super) struct Loot {
    /// Blocks that a pointer named.
    dropped: Vec<(u32, BlockAddress)>,
    /// Blocks that no pointer named yet.
    fresh: Vec<(u32, BlockAddress)>,
    /// Granules of blocks that stay.
    cleared: Vec<(u32, BlockAddress, Granules)>,
}

impl Loot {
    /// Blocks that no pointer names any more.
    pub(super) fn of(dropped: Vec<(u32, BlockAddress)>) -> Loot {
        Loot { dropped, ..Loot::default() }
    }
}

impl Files {
    /// Makes a byte range read as zeros and frees the blocks that lie wholly in it (fallocate(2), FALLOC_FL_PUNCH_HOLE). Thick disks keep
    /// their blocks. The size stays.
    pub async fn punch(&self, file: &SharedFile, range: Range<u64>) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.check_has_blocks(file)?;
        self.check_discard(&open)?;
        let keep = file.disk.is_some_and(|format| format != DiskFormat::Thin);
        self.clear(&open, range, keep).await
    }

    /// Makes a byte range read as zeros and owns blocks for all of it (FALLOC_FL_ZERO_RANGE).
    pub async fn zero_range(&self, file: &SharedFile, range: Range<u64>, keep_size: bool) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.check_has_blocks(file)?;
        self.check_writable(&open, &range)?;
        self.clear(&open, range.clone(), true).await?;
        self.allocate_range(file, range, keep_size).await
    }

    fn check_discard(&self, open: &Open) -> Result<(), FsError> {
        if open.shared.doubt.load(Ordering::Acquire) {
            return Err(in_doubt(open));
        }
        if open.shared.hold() != Hold::Writing {
            return Err(FsError::refused(FsErrorKind::Invalid, format!("{} is not open for writing", open.shared.fd)));
        }
        if open.object.image().root.flags.contains(ObjectFlags::MULTI_WRITER) {
            let message = format!("{} is open for several writers: nothing of it can be discarded", open.shared.fd);
            return Err(FsError::refused(FsErrorKind::Unsupported, message));
        }
        Ok(())
    }

    async fn clear(&self, open: &Rc<Open>, range: Range<u64>, keep_blocks: bool) -> Result<(), FsError> {
        let most = MAX_FILE_BLOCKS << self.context.block_size().shift();
        let range = range.start.min(most)..range.end.min(most);
        if range.is_empty() {
            return Ok(());
        }
        if open.shared.state.read().inline.is_some() {
            return self.clear_inline(open, range).await;
        }
        touch(open);
        let size = open.shared.size();
        if open.shared.disk == Some(DiskFormat::EagerZeroedThick) {
            return self.zero_in_place(open, range.start..range.end.min(size)).await;
        }
        let granule = self.context.block_size().granule_bytes();
        // What lies behind the end of the file belongs to the last granule.
        let to_the_end = range.end >= size;
        let start = range.start.next_multiple_of(granule);
        let end = if to_the_end { range.end.next_multiple_of(granule) } else { range.end - range.end % granule };
        if start >= end {
            return self.zero_in_place(open, range).await;
        }
        self.zero_in_place(open, range.start..start).await?;
        if !to_the_end {
            self.zero_in_place(open, end..range.end).await?;
        }
        let _change = open.change.lock().await;
        self.take_away(open, start..end, keep_blocks, false).await
    }

    async fn clear_inline(&self, open: &Rc<Open>, range: Range<u64>) -> Result<(), FsError> {
        let _change = open.change.lock().await;
        let mut state = open.shared.state.write();
        if let Some(inline) = &mut state.inline {
            let end = (range.end as usize).min(inline.bytes.len());
            if (range.start as usize) < end {
                inline.bytes[range.start as usize..end].fill(0);
                inline.dirty = true;
            }
            touch(open);
        }
        Ok(())
    }

    /// Writes zeros over those parts of a range that hold something. Parts that were never written are left as they are; what lies behind
    /// the end of the file is seen to when the file grows.
    pub(super) async fn zero_in_place(&self, open: &Rc<Open>, range: Range<u64>) -> Result<(), FsError> {
        let mut at = range.start;
        loop {
            let end = range.end.min(open.shared.size());
            if at >= end {
                break;
            }
            let stretch = open.shared.state.read().runs.stretch(at, end);
            match stretch.class {
                Class::Unknown => self.load(open, at..stretch.end).await?,
                Class::Hole | Class::Unwritten => at = stretch.end,
                Class::Filling => self.wait_for_fill(open, at).await,
                Class::Data { .. } => at += self.zero_data(open, at, stretch.end).await?,
            }
        }
        Ok(())
    }

    pub(super) async fn wait_for_fill(&self, open: &Open, at: u64) {
        let mut ended = std::pin::pin!(open.shared.fill_ended.notified());
        ended.as_mut().enable();
        if open.shared.state.read().runs.stretch(at, at + 1).class == Class::Filling {
            ended.await;
        }
    }

    /// Takes whole granules (`range` is aligned to them) away, pointer block by pointer block. The caller holds the change lock.
    /// `frozen`: it has made the range unknown to data I/O already.
    pub(super) async fn take_away(
        &self,
        open: &Rc<Open>,
        range: Range<u64>,
        keep_blocks: bool,
        frozen: bool,
    ) -> Result<(), FsError> {
        let shift = self.context.block_size().shift();
        let last = ((range.end - 1) >> shift).min(MAX_FILE_BLOCKS - 1);
        let mut block = range.start >> shift;
        while block <= last {
            let pb = self.shape.place(block).pb;
            let next = self.next_occupied(open, pb, last).await?;
            let Some((pb, unit)) = next else { break };
            let first = self.shape.first_block(pb).max(block);
            let end = self.shape.first_block(pb + 1).min(last + 1);
            let part = range.start.max(first << shift)..range.end.min(end << shift);
            let guard = if frozen { None } else { Some(self.freeze(open, &part).await) };
            self.take_from_pb(open, part, keep_blocks, (pb, unit), guard).await?;
            block = end;
        }
        if !keep_blocks {
            // Only what is unknown becomes a hole: a writer may have come since.
            let (first, end) = (range.start.div_ceil(1 << shift), range.end >> shift);
            open.shared.state.write().runs.learn(first, end.saturating_sub(first), Known::Hole);
        }
        Ok(())
    }

    /// The first pointer block at or after `pb` that is attached or would hold a block that is not published yet.
    async fn next_occupied(
        &self,
        open: &Open,
        pb: u32,
        last_block: u64,
    ) -> Result<Option<(u32, Option<UnitAddress>)>, FsError> {
        let image = open.object.image();
        let attached = match &image.body.content {
            Content::Mapped(root) => {
                let source = self.source(open.shared.fd, &image);
                self.tree(open, root, &source).next_attached(pb).await?
            }
            _ => None,
        };
        let from = self.shape.first_block(pb);
        let unpublished =
            open.shared.state.read().runs.unpublished(from).next().map(|(block, _)| self.shape.place(block).pb);
        let found = match (attached, unpublished) {
            (Some((pb, unit)), Some(other)) if pb <= other => Some((pb, Some(unit))),
            (Some((pb, unit)), None) => Some((pb, Some(unit))),
            (_, Some(other)) => Some((other, None)),
            (None, None) => None,
        };
        Ok(found.filter(|(pb, _)| self.shape.first_block(*pb) <= last_block))
    }

    /// Makes a range unknown to data I/O and waits until none of it is in flight. The caller holds the change lock.
    pub(super) async fn freeze<'a>(&self, open: &'a Open, range: &Range<u64>) -> Frozen<'a> {
        let shared = &open.shared;
        shared.references.settled(range).await;
        {
            let mut state = shared.state.write();
            state.runs.freeze(range.clone());
            shared.references.advance(range);
        }
        let frozen = Frozen { shared };
        if !active(Sabotage::EpochNotAwaited) {
            shared.references.settled(range).await;
        }
        frozen
    }

    async fn take_from_pb(
        &self,
        open: &Rc<Open>,
        range: Range<u64>,
        keep_blocks: bool,
        (pb, unit): (u32, Option<UnitAddress>),
        frozen: Option<Frozen<'_>>,
    ) -> Result<(), FsError> {
        let mut loot = Loot::default();
        let (mut range, mut failed) = (range, Ok(()));
        if let Some(unit) = unit
            && let Err((error, from)) = self.take_from_cells(open, &range, keep_blocks, (pb, unit), &mut loot).await
        {
            // What was taken until then is marked and nothing names it: it goes all the way, or nobody would ever free it.
            range.end = range.end.min(from << self.context.block_size().shift());
            failed = Err(error);
        }
        if range.start < range.end {
            self.take_from_map(open, &range, keep_blocks, &mut loot);
        }
        let certain = self.unmap(open, &loot).await;
        drop(frozen);
        open.blocks_delta.set(open.blocks_delta.get() - loot.dropped.len() as i64);
        let freed = self.free_loot(open, loot, certain).await;
        failed.and(freed)
    }

    /// What a discard of `range` takes of a block.
    fn taking(&self, range: &Range<u64>, keep_blocks: bool, block: u64) -> Taking {
        let size = self.context.block_size();
        let start = block << size.shift();
        let from = range.start.saturating_sub(start) / size.granule_bytes();
        let to = (range.end.saturating_sub(start) / size.granule_bytes()).min(GRANULES_PER_BLOCK);
        let granules = Granules::range(from as u32, to as u32);
        Taking { granules, drop_block: granules == Granules::ALL && !keep_blocks }
    }

    /// Takes the pointers of a range, cell by cell. An error comes with the first block whose pointer may be there yet: those before
    /// it are in `loot`.
    async fn take_from_cells(
        &self,
        open: &Rc<Open>,
        range: &Range<u64>,
        keep_blocks: bool,
        (pb, unit): (u32, UnitAddress),
        loot: &mut Loot,
    ) -> Result<(), (FsError, u64)> {
        let shift = self.context.block_size().shift();
        let blocks = range.start >> shift..((range.end - 1) >> shift) + 1;
        let (first_cell, last_cell) = (self.shape.place(blocks.start).cell, self.shape.place(blocks.end - 1).cell);
        for nth in first_cell..=last_cell {
            let first = self.shape.first_block(pb) + nth as u64 * self.shape.per_cell();
            let taken = self.take_from_cell(open, range, keep_blocks, (pb, unit, nth), loot).await;
            taken.map_err(|error| (error, first))?;
        }
        Ok(())
    }

    async fn take_from_cell(
        &self,
        open: &Rc<Open>,
        range: &Range<u64>,
        keep_blocks: bool,
        (pb, unit, nth): (u32, UnitAddress, usize),
        loot: &mut Loot,
    ) -> Result<(), FsError> {
        let shift = self.context.block_size().shift();
        let blocks = range.start >> shift..((range.end - 1) >> shift) + 1;
        let first = self.shape.first_block(pb) + nth as u64 * self.shape.per_cell();
        let (fd, image) = (open.shared.fd, open.object.image());
        let at = self.space.units.cell_of(unit, nth)?;
        let mut cell = self.pb_cell(open, &image, at, pb, true).await?;
        for attempt in 0.. {
            let taking = |block| self.taking(range, keep_blocks, block);
            let corrupt = |cause| FsError::Corrupt { structure: format!("pointer block {pb} of {fd}"), cause };
            let Taken { payload, dropped, cleared } =
                without(self.shape, &cell, first, blocks.clone(), taking).map_err(corrupt)?;
            let Some(payload) = payload else { break };
            self.space.blocks.retire(fd, &dropped).await?;
            let changed = self.change_pb_cell(open, &image, &cell, payload).await;
            let stays = match &changed {
                Ok(Ok(_)) => false,
                Ok(Err(_)) => attempt == TRIES,
                Err(error) => !is_unknown(error),
            };
            if stays {
                // The pointers stay: so do their blocks.
                self.space.blocks.keep(fd, &dropped).await?;
            } else if changed.is_err() {
                // Whether they stay only recovery finds out.
                for (_, at) in &dropped {
                    self.context.member(at.lun)?.set_unresolved();
                }
            }
            match changed? {
                Ok(new) => {
                    open.cells.borrow_mut().put(new, self.context.now());
                    loot.dropped.extend(dropped);
                    loot.cleared.extend(cleared);
                    break;
                }
                Err(_) if attempt == TRIES => return Err(contended(open)),
                Err(current) => cell = current,
            }
        }
        Ok(())
    }

    /// The map follows: what was filled and not published goes too.
    fn take_from_map(&self, open: &Open, range: &Range<u64>, keep_blocks: bool, loot: &mut Loot) {
        let shift = self.context.block_size().shift();
        let mut state = open.shared.state.write();
        for (index, at) in &loot.dropped {
            let fresh = state.runs.block(u64::from(*index)).flatten().is_some_and(|b| b.fresh && b.place.at != *at);
            debug_assert!(!fresh, "a published block has one place");
            state.runs.set_block(u64::from(*index), None);
        }
        for block in range.start >> shift..((range.end - 1) >> shift) + 1 {
            let taking = self.taking(range, keep_blocks, block);
            let Some(Some(known)) = state.runs.block(block) else { continue };
            let mut known: BlockState = known;
            if taking.drop_block {
                loot.fresh.push((block as u32, known.place.at));
                state.runs.set_block(block, None);
            } else {
                let filled = Granules(known.filled.0 & taking.granules.0);
                known.apply(taking.granules, GranuleEvent::Discard);
                if filled != Granules::NONE {
                    loot.cleared.push((block as u32, known.place.at, filled));
                }
                state.runs.set_block(block, Some(known));
            }
        }
    }

    /// Gives the space back to the storage, as far as that works. False: a command may still be on its way.
    pub(super) async fn unmap(&self, open: &Open, loot: &Loot) -> bool {
        let size = self.context.block_size();
        let mut ranges: BTreeMap<(u8, u64), u64> = BTreeMap::new();
        for (_, at) in loot.dropped.iter().chain(&loot.fresh) {
            if let Ok(Some(place)) = self.place(*at) {
                ranges.insert((at.lun.get(), place.offset), size.bytes());
            }
        }
        for (_, at, granules) in &loot.cleared {
            let Ok(Some(place)) = self.place(*at) else { continue };
            for g in (0..GRANULES_PER_BLOCK).filter(|g| granules.has(*g as u32)) {
                ranges.insert((at.lun.get(), place.offset + g * size.granule_bytes()), size.granule_bytes());
            }
        }
        let mut certain = true;
        let mut joined: Vec<((u8, u64), u64)> = Vec::new();
        for ((lun, offset), length) in ranges {
            match joined.last_mut() {
                Some(((last_lun, start), total)) if *last_lun == lun && *start + *total == offset => *total += length,
                _ => joined.push(((lun, offset), length)),
            }
        }
        for ((lun, offset), length) in joined {
            let Some(Ok(member)) = crate::units::LunIndex::new(lun).map(|lun| self.context.member(lun)) else {
                continue;
            };
            // Space that is not given back costs nothing but space; a late UNMAP could hit what the next holder of the lock wrote.
            let open_here = open
                .shared
                .permit(member.index)
                .map(|permit| open.shared.gate_state(&permit, self.context.env().now()));
            if open_here != Some(GateState::Open) {
                continue;
            }
            if let Err(error) = member.lun.unmap(offset, length).await {
                tracing::debug!(%error, "space was not given back to the storage");
                certain &= !may_still_run(&error);
                self.note_doubt(open, &error);
            }
        }
        certain
    }

    pub(super) async fn free_loot(&self, open: &Open, loot: Loot, certain: bool) -> Result<(), FsError> {
        let fd = open.shared.fd;
        if !certain || open.shared.doubt.load(Ordering::Acquire) {
            let all: Vec<(u32, BlockAddress)> = loot.dropped.into_iter().chain(loot.fresh).collect();
            return self.space.blocks.quarantine(fd, &all).await;
        }
        if let Some(broken) = broken(&open.object.image()) {
            let all: Vec<(u32, BlockAddress)> = loot.dropped.into_iter().chain(loot.fresh).collect();
            return self.space.blocks.quarantine_of(broken, fd, &all).await;
        }
        let (dropped, fresh) = futures_util::join!(
            self.space.blocks.free_retired(fd, &loot.dropped),
            self.space.blocks.free_unpublished(fd, &loot.fresh)
        );
        dropped.and(fresh)
    }

    /// Cuts a mapped file to `size`: first no data is in flight behind it, then the body with the new size is committed without the
    /// pointer blocks that are not needed any more, then the pointers behind it in the last one go. The caller holds the change lock.
    pub(super) async fn cut(&self, open: &Rc<Open>, size: u64) -> Result<(), FsError> {
        let shift = self.context.block_size().shift();
        let granule = self.context.block_size().granule_bytes();
        let frozen = self.freeze(open, &(size..u64::MAX)).await;
        open.shared.size.store(size, Ordering::Release);
        touch(open);
        self.modified(open);
        // Pointer blocks with nothing before the new end.
        let first_gone = if size == 0 { 0 } else { self.shape.place((size - 1) >> shift).pb + 1 };
        let gone = self.attached_from(open, first_gone).await?;
        let mut left = gone.len();
        let mut first = true;
        while first || left > 0 {
            let batch = &gone[left.saturating_sub(CUT_AT_ONCE)..left];
            left -= batch.len();
            let empties = size == 0 && left == 0 && open.shared.disk.is_none();
            let inline = if empties { Some(Vec::new()) } else { left_in_body(open, size) };
            let mut change = BodyChange { size: Some(size), inline, freeing: true, ..BodyChange::default() };
            let mut loot = Loot::default();
            for (pb, unit) in batch {
                let image = open.object.image();
                for (nth, cell) in self.pb_cells(open, &image, *pb, *unit).await?.into_iter().enumerate() {
                    let from = self.shape.first_block(*pb) + nth as u64 * self.shape.per_cell();
                    let all = |_| Taking { granules: Granules::ALL, drop_block: true };
                    let taken = without(self.shape, &cell, from, from..from + self.shape.per_cell(), all);
                    let taken = taken.map_err(|cause| FsError::Corrupt {
                        structure: format!("pointer block {pb} of {}", open.shared.fd),
                        cause,
                    })?;
                    loot.dropped.extend(taken.dropped);
                }
                change.detach.insert(*pb, *unit);
            }
            change.drop_blocks.clone_from(&loot.dropped);
            let delta = open.blocks_delta.get();
            open.blocks_delta.set(delta - loot.dropped.len() as i64);
            if let Err(error) = self.commit_body(open, change).await {
                open.blocks_delta.set(delta);
                return Err(error);
            }
            open.cells.borrow_mut().clear();
            {
                let mut state = open.shared.state.write();
                let from = batch.first().map_or(MAX_FILE_BLOCKS, |(pb, _)| self.shape.first_block(*pb));
                let fresh: Vec<_> = state.runs.unpublished(from).filter(|(_, block)| block.fresh).collect();
                loot.fresh.extend(fresh.iter().map(|(index, block)| (*index as u32, block.place.at)));
                if from < MAX_FILE_BLOCKS {
                    state.runs.remove(from..MAX_FILE_BLOCKS);
                    state.runs.learn(from, MAX_FILE_BLOCKS - from, Known::Hole);
                }
            }
            let certain = self.unmap(open, &loot).await;
            self.free_loot(open, loot, certain).await?;
            first = false;
        }
        // What the last pointer block holds behind the end, and what was never published.
        self.take_away(open, size.next_multiple_of(granule)..MAX_FILE_BLOCKS << shift, false, true).await?;
        drop(frozen);
        open.clean_beyond.set(true);
        Ok(())
    }

    /// Makes everything behind the end of the file read as zeros, for the file is about to grow over it: what a write that failed, or
    /// was not acknowledged before a crash, left there. Data in flight is waited for. The caller holds the change lock.
    pub(super) async fn clean_behind_end(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let (block, clean) = (self.context.block_size(), open.clean_beyond.get());
        let granule = block.granule_bytes();
        let before = open.shared.size();
        if (clean && before.is_multiple_of(granule)) || active(Sabotage::GrowthUncleaned) {
            return Ok(());
        }
        let most = MAX_FILE_BLOCKS << block.shift();
        let start = before - before % granule;
        let frozen = self.freeze(open, &(start..if clean { start + granule } else { most })).await;
        // Who was in flight may have moved the end.
        let end = open.shared.size();
        if !clean {
            self.take_away(open, end.next_multiple_of(granule)..most, false, true).await?;
            open.clean_beyond.set(true);
        }
        if !end.is_multiple_of(granule) && end < start + granule {
            self.load_in_change(open, end..end + 1).await?;
            let inside = (end & (block.bytes() - 1)) / granule;
            let known = open.shared.state.read().runs.block(end >> block.shift()).flatten();
            if let Some(known) = known.filter(|known| known.readable().has(inside as u32)) {
                let at = known.place.offset + (end & (block.bytes() - 1));
                let length = end.next_multiple_of(granule) - end;
                let lun = known.place.at.lun;
                let permit = open.shared.permit(lun).ok_or(FsError::Fenced { lun })?;
                self.patch(open, &permit, at, &vec![0; length as usize]).await?;
            }
        }
        drop(frozen);
        Ok(())
    }

    async fn attached_from(&self, open: &Open, first: u32) -> Result<Vec<(u32, UnitAddress)>, FsError> {
        let image = open.object.image();
        let Content::Mapped(root) = &image.body.content else { return Ok(Vec::new()) };
        let source = self.source(open.shared.fd, &image);
        let tree = self.tree(open, root, &source);
        let mut found = Vec::new();
        let mut from = first;
        while let Some((pb, unit)) = tree.next_attached(from).await? {
            found.push((pb, unit));
            match pb.checked_add(1) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(found)
    }
}

/// What a cut to `size` leaves of the bytes in the body of a file that has outgrown it, while nothing of that is published. `None`: the
/// body holds no bytes behind the new end.
fn left_in_body(open: &Open, size: u64) -> Option<Vec<u8>> {
    let image = open.object.image();
    let Content::Inline(bytes) = &image.body.content else { return None };
    bytes.get(..usize::try_from(size).ok()?).filter(|left| left.len() < bytes.len()).map(<[u8]>::to_vec)
}

/// Whether the command behind an error may have been, or may yet be, carried out.
pub(super) fn is_unknown(error: &FsError) -> bool {
    matches!(error, FsError::Lun(error) if error.kind == LunErrorKind::Unknown)
}
