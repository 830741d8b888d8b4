//! Owns: giving writers granules to fill, and taking blocks for them.
//! Promises: one owner for each granule; blocks that nobody fills are given back at close; a full volume first gets back what was taken
//! ahead. Must not know: how granules are filled.

use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::files::{Files, Open, Taking};
use super::grant::Grant;
use super::open_file::{Hold, SharedFile};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::MAX_INLINE;
use crate::format::root_cell::LunSet;
use crate::lun::{LunError, LunErrorKind};
use crate::mapping::granules::{BlockState, GranuleEvent};
use crate::mapping::runs::{Class, Known};
use crate::mapping::tree::MAX_FILE_BLOCKS;
use crate::units::BlockAddress;

/// Blocks that one grant covers at most.
const GRANT_BLOCKS: u64 = 64;
/// Unpublished blocks after which a writer waits for a flush, so that memory stays bounded.
const MOST_UNPUBLISHED: usize = 16_384;

/// What became of unwritten granules that a writer asked for.
enum Fill {
    /// They are lent.
    Granted(Grant),
    /// Another writer was first: look again.
    Changed,
    /// They lie on LUNs, these among them, that the file's lock may have been taken without.
    JoinedLater(LunSet),
}

impl Files {
    /// Gives the caller the granules at the start of `range` that were never written, whole. Takes blocks where there are none and waits
    /// where another writer fills. An empty grant: the start of the range can be written in place now.
    ///
    /// # Errors
    /// `NoSpace`, `TooBig` (more than 2^32 blocks, or behind the end of a disk), `Invalid` (not open for writing).
    pub async fn allocate(&self, file: &SharedFile, range: Range<u64>) -> Result<Grant, FsError> {
        let open = self.find(file)?;
        self.check_has_blocks(file)?;
        self.check_writable(&open, &range)?;
        self.grant(&open, range).await
    }

    /// The same without a look at the size.
    pub(super) async fn grant(&self, open: &Rc<Open>, range: Range<u64>) -> Result<Grant, FsError> {
        if open.shared.state.read().runs.unpublished_count() >= MOST_UNPUBLISHED {
            self.flush_open(open, false).await?;
        }
        loop {
            // Each wait below may end with a file that was cut to nothing, and lives in its body again, or that was closed.
            if open.shared.state.read().inline.is_some() {
                self.leave_inline(open).await?;
            }
            if open.shared.hold() != Hold::Writing {
                return Err(not_for_writing(&open.shared));
            }
            let mut ended = std::pin::pin!(open.shared.fill_ended.notified());
            ended.as_mut().enable();
            let class = open.shared.state.read().runs.stretch(range.start, range.end).class;
            match class {
                Class::Data { .. } => return Grant::empty(&open.shared),
                Class::Unknown => self.load(open, range.start..range.start + 1).await?,
                Class::Filling => ended.await,
                Class::Hole => self.take_blocks(open, &range).await?,
                Class::Unwritten => match self.begin_fill(open, &range) {
                    Fill::Granted(grant) => return Ok(grant),
                    Fill::Changed => {}
                    Fill::JoinedLater(luns) => self.admit(open, &luns).await?,
                },
            }
        }
    }

    /// Hands out the unwritten granules at the start of `range`.
    fn begin_fill(&self, open: &Open, range: &Range<u64>) -> Fill {
        let mut state = open.shared.state.write();
        let limit = range.start.saturating_add(GRANT_BLOCKS << self.context.block_size().shift());
        let fills = state.runs.begin_fill(range.start..range.end.min(limit));
        if fills.is_empty() {
            return Fill::Changed;
        }
        if let Some(grant) = Grant::new(&open.shared, &fills, &state.access) {
            return Fill::Granted(grant);
        }
        let mut luns = LunSet::default();
        for fill in &fills {
            let range = fill.file_offset..fill.file_offset + fill.length;
            state.runs.end_fill(range, GranuleEvent::AbandonFill);
            luns.insert(fill.lun);
        }
        Fill::JoinedLater(luns)
    }

    pub(super) fn check_writable(&self, open: &Open, range: &Range<u64>) -> Result<(), FsError> {
        let shared = &open.shared;
        if shared.doubt.load(Ordering::Acquire) {
            return Err(in_doubt(open));
        }
        if shared.hold() != Hold::Writing {
            return Err(not_for_writing(shared));
        }
        let blocks = range.end.div_ceil(self.context.block_size().bytes());
        if (blocks > MAX_FILE_BLOCKS && shared.device().is_none()) || (shared.is_disk() && range.end > shared.size()) {
            let message = format!("{}: byte {} is behind the greatest size it can have", shared.fd, range.end);
            return Err(FsError::refused(FsErrorKind::TooBig, message));
        }
        Ok(())
    }

    /// A small file outgrows its body: its bytes go to a block, durably, before anything says so.
    pub(super) async fn leave_inline(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let _change = open.change.lock().await;
        let mut taking = open.taking.lock().await;
        let Some(inline) = open.shared.state.read().inline.clone() else { return Ok(()) };
        let mut block = None;
        if inline.bytes.iter().any(|byte| *byte != 0) {
            let taken = self.take_or_reclaim(open, &[0], None, Some(&mut taking)).await?;
            let (_, at) = taken[0];
            let place = self.place(at)?.ok_or(FsError::MissingLun { lun: at.lun })?;
            let granule = self.context.block_size().granule_bytes();
            let length = (MAX_INLINE as u64).next_multiple_of(granule);
            let mut bytes = crate::buf::AlignedBuf::zeroed(length as usize);
            bytes[..inline.bytes.len()].copy_from_slice(&inline.bytes);
            let member = self.context.member(at.lun)?;
            if let Err(error) = member.lun.write(place.offset, bytes).await {
                self.note_doubt(open, &error);
                self.free_unpublished(open, &taken).await?;
                return Err(error.into());
            }
            let mut state = BlockState::fresh(place);
            let which = crate::format::pointer::Granules::range(0, (length / granule) as u32);
            state.apply(which, GranuleEvent::BeginFill);
            state.apply(which, GranuleEvent::EndFill);
            block = Some(state);
        }
        let mut state = open.shared.state.write();
        // What was written to the body meanwhile (nobody can: writers of inline files hold the change lock).
        state.inline = None;
        state.runs.clear();
        if let Some(block) = block {
            state.runs.set_block(0, Some(block));
        }
        state.runs.learn(0, MAX_FILE_BLOCKS, Known::Hole);
        open.shared.touched.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes blocks for the holes at the start of `range`, and some ahead for a writer in order.
    async fn take_blocks(&self, open: &Rc<Open>, range: &Range<u64>) -> Result<(), FsError> {
        let block = self.context.block_size();
        let (first, end) = (range.start >> block.shift(), range.end.div_ceil(block.bytes()));
        let end = end.min(first + GRANT_BLOCKS);
        self.load(open, range.start..end << block.shift()).await?;
        let mut taking = open.taking.lock().await;
        let needed = {
            let state = open.shared.state.read();
            if state.runs.is_frozen(range) {
                return Ok(());
            }
            state.runs.holes(first..end, GRANT_BLOCKS as usize)
        };
        if needed.first() != Some(&first) {
            return Ok(());
        }
        let end = needed.last().map_or(end, |last| last + 1);
        let spare = self.use_spares(open, &mut taking, &needed)?;
        if spare {
            taking.sequence.needs(first, end, block);
            return Ok(());
        }
        let mut ahead = self.ahead(open, taking.sequence.needs(first, end, block), end);
        ahead.retain(|index| !taking.spares.contains_key(index));
        let asked: Vec<u32> = needed.iter().chain(&ahead).map(|index| *index as u32).collect();
        let near = self.near(open, first);
        let short =
            |taken: &Result<Vec<_>, FsError>| taken.as_ref().is_err_and(|error| error.kind() == FsErrorKind::NoSpace);
        let mut taken = self.take_or_reclaim(open, &asked, near, None).await;
        if short(&taken) && !ahead.is_empty() {
            taken = self.take_or_reclaim(open, &asked[..needed.len()], near, None).await;
        }
        if short(&taken) {
            // The start of the range alone, with the space of what was taken ahead.
            taken = self.take_or_reclaim(open, &asked[..1], near, Some(&mut taking)).await;
        }
        let mut state = open.shared.state.write();
        for (index, at) in taken? {
            let index = u64::from(index);
            if !needed.contains(&index) {
                taking.spares.insert(index, at);
            } else if let Some(place) = self.place(at)? {
                state.runs.set_block(index, Some(BlockState::fresh(place)));
            }
        }
        Ok(())
    }

    /// Puts spare blocks into the map for those of `needed` that have one; true when the first one did.
    fn use_spares(&self, open: &Open, taking: &mut Taking, needed: &[u64]) -> Result<bool, FsError> {
        let mut state = open.shared.state.write();
        let mut used = false;
        for index in needed.iter() {
            let Some(at) = taking.spares.remove(index) else { break };
            if let Some(place) = self.place(at)? {
                state.runs.set_block(*index, Some(BlockState::fresh(place)));
                used = true;
            }
        }
        Ok(used)
    }

    /// Up to `count` holes behind `end` that may be taken ahead: those that are known, within a disk.
    fn ahead(&self, open: &Open, count: u64, end: u64) -> Vec<u64> {
        let limit = match open.shared.object_type {
            crate::format::root_cell::ObjectType::Disk => {
                open.shared.size().div_ceil(self.context.block_size().bytes())
            }
            _ => MAX_FILE_BLOCKS,
        };
        let mut found = open.shared.state.read().runs.holes(end..limit.min(end + count), count as usize);
        let unbroken = found.iter().zip(end..).take_while(|(found, expected)| *found == expected).count();
        found.truncate(unbroken);
        found
    }

    /// The block before, so that neighbours in the file are neighbours on the LUN.
    fn near(&self, open: &Open, first: u64) -> Option<BlockAddress> {
        let before = first.checked_sub(1)?;
        open.shared.state.read().runs.block(before).flatten().map(|state| state.place.at)
    }

    /// Takes blocks. When the volume is full and `reclaim` is given, what was taken ahead (for any file of this host) is freed first.
    pub(super) async fn take_or_reclaim(
        &self,
        open: &Rc<Open>,
        indexes: &[u32],
        near: Option<BlockAddress>,
        reclaim: Option<&mut Taking>,
    ) -> Result<Vec<(u32, BlockAddress)>, FsError> {
        let fd = open.shared.fd;
        let prefer = near.map_or(fd.lun(), |at| at.lun);
        let is_short =
            |taken: &Result<Vec<_>, FsError>| taken.as_ref().is_err_and(|error| error.kind() == FsErrorKind::NoSpace);
        let mut taken = self.space.blocks.take(fd, indexes, prefer, &self.usable(open), near).await;
        if is_short(&taken) && self.spread(open).await? {
            taken = self.space.blocks.take(fd, indexes, prefer, &self.usable(open), near).await;
        }
        let Some(own) = reclaim.filter(|_| is_short(&taken)) else { return taken };
        self.free_spares(open, own).await?;
        for other in self.all() {
            if !Rc::ptr_eq(&other, open)
                && let Ok(mut spares) = other.taking.try_lock()
            {
                self.free_spares(&other, &mut spares).await?;
            }
        }
        self.space.blocks.take(fd, indexes, prefer, &self.usable(open), near).await
    }

    /// The LUNs that the file may use and that its lock was taken with.
    fn usable(&self, open: &Open) -> LunSet {
        let (state, mut usable) = (open.shared.state.read(), LunSet::default());
        let allowed = open.object.image().root.luns;
        allowed.iter().filter(|lun| state.access.permit(*lun).is_some()).for_each(|lun| usable.insert(lun));
        usable
    }

    /// Lets a file that finds no space use the members that came after it. False: there is none.
    pub(super) async fn spread(&self, open: &Open) -> Result<bool, FsError> {
        let (usable, mut more) = (self.usable(open), LunSet::default());
        let members = self.context.members();
        let joined = members.iter().map(|member| member.index).filter(|lun| self.context.own_slot(*lun).is_ok());
        joined.filter(|lun| !usable.contains(*lun)).for_each(|lun| more.insert(lun));
        if more.iter().next().is_none() {
            return Ok(false);
        }
        self.admit(open, &more).await?;
        Ok(true)
    }

    pub(super) async fn free_spares(&self, open: &Rc<Open>, taking: &mut Taking) -> Result<(), FsError> {
        let spares: Vec<(u32, BlockAddress)> =
            std::mem::take(&mut taking.spares).into_iter().map(|(index, at)| (index as u32, at)).collect();
        self.free_unpublished(open, &spares).await
    }

    /// Frees blocks that no pointer ever named and no command can reach any more; where that is in doubt they go to quarantine.
    pub(super) async fn free_unpublished(&self, open: &Open, blocks: &[(u32, BlockAddress)]) -> Result<(), FsError> {
        if blocks.is_empty() {
            return Ok(());
        }
        if open.shared.doubt.load(Ordering::Acquire) {
            return self.space.blocks.quarantine(open.shared.fd, blocks).await;
        }
        self.space.blocks.free_unpublished(open.shared.fd, blocks).await
    }

    /// A data command of the actor failed: if it may still be carried out, nothing of the file is freed or unlocked any more.
    pub(super) fn note_doubt(&self, open: &Open, error: &LunError) {
        if may_still_run(error) {
            open.shared.doubt.store(true, Ordering::Release);
        }
    }

    /// Frees what was taken and never published: at close. The caller holds the change lock; nobody writes any more.
    pub(super) async fn give_back_unpublished(&self, open: &Rc<Open>) -> Result<(), FsError> {
        let mut taking = open.taking.lock().await;
        self.free_spares(open, &mut taking).await?;
        taking.sequence = Default::default();
        let frozen = self.freeze(open, &(0..u64::MAX)).await;
        let fresh: Vec<(u32, BlockAddress)> = {
            let mut state = open.shared.state.write();
            let fresh: Vec<_> = state.runs.unpublished(0).filter(|(_, block)| block.fresh).collect();
            for (index, _) in &fresh {
                state.runs.set_block(*index, None);
            }
            fresh.into_iter().map(|(index, block)| (index as u32, block.place.at)).collect()
        };
        drop(frozen);
        self.free_unpublished(open, &fresh).await
    }
}

/// Whether a data command that failed may still be carried out (rule R3). An error that the operating system gave is the command's
/// definite end: its error handling has returned it.
pub(super) fn may_still_run(error: &LunError) -> bool {
    error.kind == LunErrorKind::Unknown && error.cause.raw_os_error().is_none()
}

fn not_for_writing(shared: &SharedFile) -> FsError {
    FsError::refused(FsErrorKind::Invalid, format!("{} is not open for writing", shared.fd))
}

/// No write may follow one whose end is not known.
pub(super) fn in_doubt(open: &Open) -> FsError {
    let message = format!(
        "the end of an earlier write to {} is not known: it is not written to, and its lock stays, until this mount ends",
        open.shared.fd
    );
    FsError::refused(FsErrorKind::Io, message)
}
