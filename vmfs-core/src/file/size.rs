//! Owns: the size of a file: growing with zeros, cutting, and owning blocks ahead of writes.
//! Promises: what lies behind the end never shows when the file grows again; a thick disk owns every block it says.
//! Must not know: who asks.

use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::files::{Files, Open, touch};
use super::grant::GrantPiece;
use super::open_file::SharedFile;
use super::publish::BodyChange;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{DiskFormat, MAX_INLINE};
use crate::format::root_cell::ObjectType;
use crate::mapping::granules::BlockState;
use crate::mapping::runs::Class;
use crate::mapping::tree::MAX_FILE_BLOCKS;

/// Blocks taken at a time for a range.
const TAKEN_AT_ONCE: usize = 1024;

impl Files {
    /// Sets the size of a file (ftruncate(2)). A disk only grows, and only while it is thin or by [`crate::disk`].
    pub async fn set_size(&self, file: &SharedFile, size: u64) -> Result<(), FsError> {
        let open = self.find(file)?;
        let now = open.shared.size();
        if size == now {
            return Ok(());
        }
        if file.is_disk() {
            let growth = size > now && file.disk == Some(DiskFormat::Thin);
            return match file.disk {
                Some(format) if growth => self.commit_disk(file, size, format).await,
                _ => Err(disk_size(file)),
            };
        }
        self.check_writable(&open, &(0..size.max(1)))?;
        if size > now {
            return self.extend(file, size).await;
        }
        let _change = open.change.lock().await;
        if self.cut_inline(&open, size) {
            return Ok(());
        }
        self.cut(&open, size).await
    }

    fn cut_inline(&self, open: &Open, size: u64) -> bool {
        let mut state = open.shared.state.write();
        let Some(inline) = &mut state.inline else { return false };
        inline.dirty |= inline.bytes.len() as u64 > size;
        inline.bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        open.shared.size.store(size, Ordering::Release);
        touch(open);
        true
    }

    /// Grows a file to at least `size`; what is added reads as zeros. The size is committed with the next flush or at close.
    pub async fn extend(&self, file: &SharedFile, size: u64) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.check_writable(&open, &(0..size.max(1)))?;
        let _change = open.change.lock().await;
        if open.shared.state.read().inline.is_none() {
            self.clean_behind_end(&open).await?;
        }
        // Writers may have grown it further meanwhile.
        open.shared.size.fetch_max(size, Ordering::AcqRel);
        touch(&open);
        Ok(())
    }

    /// Commits the new size of a disk, and its policy if that changes. What a thick disk has to own is there before.
    pub(crate) async fn commit_disk(&self, file: &SharedFile, size: u64, format: DiskFormat) -> Result<(), FsError> {
        let open = self.find(file)?;
        if file.object_type != ObjectType::Disk || size < open.shared.size() {
            return Err(disk_size(file));
        }
        self.check_disk_size(file, size)?;
        let _change = open.change.lock().await;
        let change = BodyChange { size: Some(size), disk: Some(format), mapped: true, ..BodyChange::default() };
        self.commit_body(&open, change).await?;
        open.shared.size.fetch_max(size, Ordering::AcqRel);
        Ok(())
    }

    fn check_disk_size(&self, file: &SharedFile, size: u64) -> Result<(), FsError> {
        if size.div_ceil(self.context.block_size().bytes()) <= MAX_FILE_BLOCKS {
            return Ok(());
        }
        let message = format!("{}: {size} bytes are more than a disk of this volume can have", file.fd);
        Err(FsError::refused(FsErrorKind::TooBig, message))
    }

    /// Writes zeros to every granule of a range that was never written, and says so: an eagerzeroedthick disk. Durable when it returns.
    /// `progress` is told how many bytes of the range are done.
    pub(crate) async fn zero_fill(
        &self,
        file: &SharedFile,
        range: Range<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FsError> {
        let open = self.find(file)?;
        let mut at = range.start;
        while at < range.end {
            let stretch = open.shared.state.read().runs.stretch(at, range.end);
            if let Class::Data { .. } = stretch.class {
                at = stretch.end;
                progress(at - range.start);
                continue;
            }
            let grant = self.grant(&open, at..range.end).await?;
            for piece in grant.pieces() {
                self.zero_piece(&open, piece).await?;
            }
            if !grant.is_empty() {
                at = grant.range().end.min(range.end);
                grant.filled(at, true);
                progress(at - range.start);
            }
        }
        self.flush_open(&open, false).await
    }

    async fn zero_piece(&self, open: &Open, piece: &GrantPiece) -> Result<(), FsError> {
        self.wait_for_gate(open, &piece.permit).await?;
        let member = self.context.member(piece.lun)?;
        let zeroed = member.lun.write_zeroes(piece.offset, piece.length).await;
        if let Err(error) = &zeroed {
            self.note_doubt(open, error);
        }
        Ok(zeroed?)
    }

    /// Takes blocks for every hole of a range and publishes their pointers without granules: they read as zeros and writes to them
    /// never run out of space (fallocate(2)).
    ///
    /// # Errors
    /// `NoSpace`: what was taken until then stays taken.
    pub async fn allocate_range(&self, file: &SharedFile, range: Range<u64>, keep_size: bool) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.check_has_blocks(file)?;
        self.check_writable(&open, &range)?;
        let inline = open.shared.state.read().inline.is_some();
        if inline && range.end > MAX_INLINE as u64 {
            self.leave_inline(&open).await?;
        }
        if !inline || range.end > MAX_INLINE as u64 {
            self.allocate_blocks(&open, range.clone(), &mut |_| {}).await?;
        }
        if !keep_size && range.end > open.shared.size() {
            self.extend(file, range.end).await?;
        }
        Ok(())
    }

    /// The same, telling how many bytes of the range are done.
    pub(crate) async fn allocate_with_progress(
        &self,
        file: &SharedFile,
        range: Range<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FsError> {
        let open = self.find(file)?;
        self.allocate_blocks(&open, range, progress).await
    }

    async fn allocate_blocks(
        &self,
        open: &Rc<Open>,
        range: Range<u64>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FsError> {
        let block = self.context.block_size();
        let (first, end) = (range.start >> block.shift(), range.end.div_ceil(block.bytes()));
        let mut at = first;
        while at < end {
            self.load(open, at << block.shift()..(at << block.shift()) + 1).await?;
            let stop = end.min(at + TAKEN_AT_ONCE as u64);
            self.load(open, at << block.shift()..stop << block.shift()).await?;
            self.take_wanted(open, at..stop).await?;
            if open.shared.state.read().runs.holes(at..stop, 1).is_empty() {
                self.flush_open(open, false).await?;
                at = stop;
                progress((at << block.shift()).min(range.end) - range.start);
            }
        }
        Ok(())
    }

    async fn take_wanted(&self, open: &Rc<Open>, blocks: Range<u64>) -> Result<(), FsError> {
        let shift = self.context.block_size().shift();
        let mut taking = open.taking.lock().await;
        let holes = {
            let state = open.shared.state.read();
            if state.runs.is_frozen(&(blocks.start << shift..blocks.end << shift)) {
                return Ok(());
            }
            state.runs.holes(blocks.clone(), TAKEN_AT_ONCE)
        };
        let mut missing = Vec::with_capacity(holes.len());
        let mut taken = Vec::with_capacity(holes.len());
        for index in holes {
            match taking.spares.remove(&index) {
                Some(at) => taken.push((index as u32, at)),
                None => missing.push(index as u32),
            }
        }
        let near = missing.first().and_then(|first| {
            let before = u64::from(*first).checked_sub(1)?;
            open.shared.state.read().runs.block(before).flatten().map(|state| state.place.at)
        });
        let found = match missing.is_empty() {
            true => Ok(Vec::new()),
            false => self.take_or_reclaim(open, &missing, near, Some(&mut taking)).await,
        };
        let failed = found.as_ref().err().cloned();
        taken.extend(found.unwrap_or_default());
        let mut state = open.shared.state.write();
        for (index, at) in taken {
            if let Some(place) = self.place(at)? {
                state.runs.set_block(index.into(), Some(BlockState { wanted: true, ..BlockState::fresh(place) }));
            }
        }
        // Blocks that were there before without a pointer are wanted now, too.
        let fresh: Vec<_> = state.runs.unpublished(blocks.start).take_while(|(index, _)| *index < blocks.end).collect();
        for (index, known) in fresh {
            state.runs.set_block(index, Some(BlockState { wanted: known.fresh, ..known }));
        }
        failed.map_or(Ok(()), Err)
    }
}

fn disk_size(file: &SharedFile) -> FsError {
    let message = match file.object_type {
        ObjectType::Rdm => format!("{}: a raw device mapping has the size of its device", file.fd),
        _ => format!("{}: a virtual disk is not cut; it grows by \"vmfs disk extend\"", file.fd),
    };
    FsError::refused(FsErrorKind::NotPermitted, message)
}
