//! Owns: flush: making data durable, then pointers and bits visible, then (where it changed) the body.
//! Promises: a pointer never becomes visible to a granule that could show older bytes; the size is committed before pointers behind the old
//! end; an overwrite in place costs a flush of the LUNs and nothing else. Must not know: who asks for durability.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::files::{Files, Open, is_unlinked};
use super::load::unless_fenced;
use super::open_file::{Hold, SharedFile};
use crate::alloc::units::{PreparedUnit, Purpose, UnitUse};
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::body::{Body, Content, DiskFormat, MappingRoot};
use crate::format::table_entry::EntryKind;
use crate::mapping::publish::{Pending, Plan, PublishError, new_stream, plan, with_published};
use crate::object::{Change, Committed, Image};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, LunIndex, Token, UnitAddress};

/// Pointer blocks attached with one commit.
const ATTACHED_AT_ONCE: usize = 16;
/// Commits or cell changes that lose before that is an error: under a lock only recovery's re-stamps and renames come between.
const TRIES: u32 = 64;

/// What a commit changes in the body.
#[derive(Default)]
pub(super) struct BodyChange {
    /// New size.
    pub(super) size: Option<u64>,
    /// New content of a file that lives in its body; empties a mapped file whose pointer blocks are all detached.
    pub(super) inline: Option<Vec<u8>>,
    /// Streams of new pointer blocks by number.
    pub(super) attach: BTreeMap<u32, Vec<u8>>,
    /// Pointer blocks that go.
    pub(super) detach: BTreeMap<u32, UnitAddress>,
    /// Pointer blocks that stay where they are: the inner units above them are written again.
    pub(super) rewritten: BTreeMap<u32, UnitAddress>,
    /// New policy of a disk.
    pub(super) disk: Option<DiskFormat>,
    /// The content is mapped from now on, even if no pointer block is attached.
    pub(super) mapped: bool,
    /// Blocks that the detached pointer blocks name: marked before, for the caller to free.
    pub(super) drop_blocks: Vec<(u32, BlockAddress)>,
    /// The change frees space.
    pub(super) freeing: bool,
}

impl Files {
    /// Makes everything that was written before durable, with the pointers to it (fsync(2)). An error of an earlier write-back is reported
    /// here once.
    pub async fn flush(&self, file: &SharedFile) -> Result<(), FsError> {
        let open = self.find(file)?;
        let flushed = self.flush_open(&open, false).await;
        let earlier = open.shared.error.lock().take();
        earlier.map_or(flushed, Err)
    }

    /// `closing`: times are committed even if nothing else is.
    pub(super) async fn flush_open(&self, open: &Rc<Open>, closing: bool) -> Result<(), FsError> {
        if open.shared.hold() != Hold::Writing {
            return Ok(());
        }
        let _change = open.change.lock().await;
        self.flush_in_change(open, closing).await
    }

    /// The same for a caller that holds the change lock.
    pub(super) async fn flush_in_change(&self, open: &Rc<Open>, closing: bool) -> Result<(), FsError> {
        // First what is filled, then what is unflushed: whatever is filled here was noted as unflushed before.
        let size = open.shared.size();
        let (blocks, inline) = {
            let state = open.shared.state.read();
            let wanting = state.runs.unpublished(0).filter(|(_, block)| block.wants_publishing());
            let blocks: Vec<(u64, Pending)> = wanting.map(|(index, block)| (index, Pending::of(&block))).collect();
            let inline = state.inline.as_ref().filter(|inline| inline.dirty).map(|inline| inline.bytes.clone());
            (blocks, inline)
        };
        self.flush_luns(open, !blocks.is_empty()).await?;
        self.modified(open);
        let image = open.object.image();
        let resized = size != image.body.attributes.size;
        let inlined = inline.is_some();
        let change = BodyChange { size: resized.then_some(size), inline, ..BodyChange::default() };
        let grouped = plan(self.shape, blocks);
        let (attached, new) = self.sort_by_attachment(open, &image, grouped).await?;
        // The count of blocks goes with the first commit; what is then not published is taken off again.
        let fresh = fresh_blocks(&attached, &new);
        open.blocks_delta.set(open.blocks_delta.get() + fresh.len() as i64);
        let published = self.publish_sorted(open, change, closing, attached, new).await;
        if published.is_err() {
            let state = open.shared.state.read();
            let left =
                fresh.iter().filter(|index| state.runs.block(**index).flatten().is_some_and(|block| block.fresh));
            open.blocks_delta.set(open.blocks_delta.get() - left.count() as i64);
        } else if inlined {
            self.note_inline_committed(open);
        }
        published
    }

    async fn publish_sorted(
        &self,
        open: &Rc<Open>,
        mut change: BodyChange,
        closing: bool,
        attached: Vec<(u32, UnitAddress, Plan)>,
        new: Vec<(u32, Vec<(u64, Pending)>)>,
    ) -> Result<(), FsError> {
        let mut new = new.into_iter().peekable();
        while new.peek().is_some() {
            let mut published = Vec::new();
            for (pb, blocks) in new.by_ref().take(ATTACHED_AT_ONCE) {
                change.attach.insert(pb, new_stream(self.shape, blocks.iter().copied()));
                published.extend(blocks);
            }
            // What was written is there to stay: the units that lead to it may come out of the reserve.
            change.freeing = true;
            self.commit_body(open, std::mem::take(&mut change)).await?;
            self.note_published(open, &published);
        }
        let dated = closing && (open.modified.get().is_some() || open.blocks_delta.get() != 0);
        if change.size.is_some() || change.inline.is_some() || dated {
            self.commit_body(open, change).await?;
        }
        self.publish_cells(open, attached).await
    }

    /// The bytes are on the LUN; if this host is still who it was, pointers may follow.
    async fn flush_luns(&self, open: &Open, publishing: bool) -> Result<(), FsError> {
        let unflushed: Vec<LunIndex> = open.shared.take_unflushed().iter().collect();
        let flushes = unflushed.iter().map(async |lun| {
            let target = self.lun_of(open, *lun)?;
            if active(Sabotage::FlushForgotten) {
                return Ok(());
            }
            let flushed = target.flush().await.map_err(FsError::from);
            if flushed.is_err() {
                open.shared.note_unflushed(*lun);
            }
            flushed
        });
        let live = publishing.then_some(open.shared.fd.lun());
        let (flushed, live) =
            futures_util::join!(futures_util::future::join_all(flushes), self.context.prove_live(live));
        flushed.into_iter().collect::<Result<Vec<()>, FsError>>()?;
        live
    }

    /// Parts a plan into what goes into pointer blocks that are there, and the blocks of new ones.
    async fn sort_by_attachment(
        &self,
        open: &Open,
        image: &Rc<Image>,
        plan: Plan,
    ) -> Result<(Vec<(u32, UnitAddress, Plan)>, Vec<(u32, Vec<(u64, Pending)>)>), FsError> {
        let (mut attached, mut new) = (Vec::new(), Vec::new());
        let empty = MappingRoot::PointerBlocks(Vec::new());
        let root = match &image.body.content {
            Content::Mapped(root) => root,
            _ => &empty,
        };
        let source = self.source(open.shared.fd, image);
        let tree = self.tree(open, root, &source);
        for (pb, cells) in plan {
            match tree.find(pb).await? {
                Some(unit) => attached.push((pb, unit, Plan::from([(pb, cells)]))),
                None => new.push((pb, cells.into_values().flatten().collect())),
            }
        }
        Ok((attached, new))
    }

    /// Writes pointers into pointer blocks that are attached, cells in parallel.
    async fn publish_cells(&self, open: &Rc<Open>, attached: Vec<(u32, UnitAddress, Plan)>) -> Result<(), FsError> {
        let mut work = Vec::new();
        for (pb, unit, plan) in attached {
            for (cell, blocks) in plan.into_values().flatten() {
                work.push((pb, self.space.units.cell_of(unit, cell)?, blocks));
            }
        }
        for some in work.chunks(32) {
            let each = some.iter().map(async |(pb, at, blocks)| {
                self.publish_cell(open, *pb, *at, blocks).await?;
                self.note_published(open, blocks);
                Ok::<(), FsError>(())
            });
            futures_util::future::join_all(each).await.into_iter().collect::<Result<Vec<()>, FsError>>()?;
        }
        Ok(())
    }

    async fn publish_cell(
        &self,
        open: &Open,
        pb: u32,
        at: crate::units::CellAddress,
        blocks: &[(u64, Pending)],
    ) -> Result<(), FsError> {
        let image = open.object.image();
        let mut cell = self.pb_cell(open, &image, at, pb, true).await?;
        for _ in 0..TRIES {
            let payload = match with_published(self.shape, &cell, blocks) {
                Ok(payload) => payload,
                Err(error) => {
                    return Err(unless_fenced(&self.context, open.shared.fd, other_pointer(open, pb, error)).await);
                }
            };
            let Some(payload) = payload else {
                open.cells.borrow_mut().put(cell, self.context.now());
                return Ok(());
            };
            match self.change_pb_cell(open, &image, &cell, payload).await? {
                Ok(new) => {
                    open.cells.borrow_mut().put(new, self.context.now());
                    return Ok(());
                }
                Err(current) => cell = current,
            }
        }
        Err(contended(open))
    }

    /// One change of a PB cell; `Ok(Err(..))`: it was changed before, this is what it holds now.
    pub(super) async fn change_pb_cell(
        &self,
        open: &Open,
        image: &Image,
        cell: &Cell,
        payload: Vec<u8>,
    ) -> Result<Result<Cell, Cell>, FsError> {
        let token: Token = image.root.lock.token;
        let known = open.cells.borrow().moment(cell).unwrap_or_else(|| self.context.now());
        self.context.prove_live_since(cell.address().lun, known).await?;
        let change = CellChange { token, ..CellChange::payload(cell, payload) };
        let outcome = self.context.cas(cell, change).await;
        if !matches!(outcome, Ok(CasOutcome::Applied(_))) {
            open.cells.borrow_mut().forget(cell.address());
        }
        match outcome? {
            CasOutcome::Applied(new) => Ok(Ok(new)),
            CasOutcome::Lost(current) | CasOutcome::Overtaken(current) => {
                if current.header().token > token {
                    return Err(FsError::refused(
                        FsErrorKind::Fenced,
                        format!("{}: its lock was taken over by another host", open.shared.fd),
                    ));
                }
                Ok(Err(current))
            }
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
        }
    }

    /// The LUN says now what the map says of these blocks.
    fn note_published(&self, open: &Open, blocks: &[(u64, Pending)]) {
        let mut state = open.shared.state.write();
        for (index, pending) in blocks {
            state.runs.published(*index, pending.bits);
        }
    }

    fn note_inline_committed(&self, open: &Open) {
        let mut state = open.shared.state.write();
        if let Some(inline) = &mut state.inline {
            inline.dirty = false;
        }
    }

    /// Commits the body with `change`. The caller holds the change lock.
    pub(super) async fn commit_body(&self, open: &Open, change: BodyChange) -> Result<(), FsError> {
        for _ in 0..TRIES {
            let image = open.object.image();
            let purpose = if change.freeing { Purpose::Freeing } else { Purpose::Normal };
            let mut units = Vec::new();
            let built = match self.build(open, &image, &change, purpose, &mut units).await {
                Ok(built) => built,
                Err(error) => {
                    self.objects.discard(units).await;
                    return Err(error);
                }
            };
            let (body, drop_units) = built;
            let (delta, modified) = (open.blocks_delta.get(), open.modified.get());
            let drop_blocks = change.drop_blocks.clone();
            let freeing = change.freeing;
            let commit = Change { body: Some(body), units, drop_units, drop_blocks, freeing, ..Change::default() };
            match self.objects.commit(&open.object, &image, commit).await? {
                Committed::Done => {
                    open.blocks_delta.set(open.blocks_delta.get() - delta);
                    if open.modified.get() == modified {
                        open.modified.set(None);
                    }
                    return Ok(());
                }
                _ if is_unlinked(open) => return Err(FsError::Stale { fd: open.shared.fd }),
                // Overtaken: the engine has left what was named to recovery; what is there now decides anew.
                Committed::Lost | Committed::Overtaken => {}
            }
        }
        Err(contended(open))
    }

    /// The new body and the units that it drops; prepared units are added to `units`.
    async fn build(
        &self,
        open: &Open,
        image: &Rc<Image>,
        change: &BodyChange,
        purpose: Purpose,
        units: &mut Vec<PreparedUnit>,
    ) -> Result<(Body, Vec<UnitUse>), FsError> {
        let fd = open.shared.fd;
        let mut body = Body { attributes: image.body.attributes.clone(), content: image.body.content.clone() };
        let mut dropped = Vec::new();
        let attributes = &mut body.attributes;
        attributes.size = change.size.unwrap_or(attributes.size);
        attributes.disk = change.disk.or(attributes.disk);
        attributes.blocks = attributes.blocks.saturating_add_signed(open.blocks_delta.get());
        if let Some(modified) = open.modified.get() {
            attributes.modified_ns = modified;
            attributes.changed_ns = attributes.changed_ns.max(modified);
        }
        let new_mapping = || self.shape.empty_root(attributes.size, self.context.block_size());
        let is_remapped = !change.attach.is_empty() || !change.detach.is_empty() || !change.rewritten.is_empty();
        if is_remapped || change.mapped {
            let root = match &body.content {
                Content::Mapped(root) => root.clone(),
                _ => new_mapping(),
            };
            let source = self.source(fd, image);
            let tree = self.tree(open, &root, &source);
            let mut edits: BTreeMap<u32, Option<UnitAddress>> = change.detach.keys().map(|pb| (*pb, None)).collect();
            edits.extend(change.rewritten.iter().map(|(pb, at)| (*pb, Some(*at))));
            for (pb, stream) in &change.attach {
                let unit = self.objects.prepare(&open.object, EntryKind::PointerBlock, *pb, stream, purpose).await?;
                edits.insert(*pb, Some(unit.reference.at));
                units.push(unit);
            }
            let mut rewrite = tree.rewrite(&edits).await?;
            for (leaf, stream) in rewrite.leaves() {
                let at = self.prepare_inner(open, leaf, stream, purpose, units).await?;
                rewrite.set_leaf(leaf, at);
            }
            for (index, stream) in rewrite.uppers() {
                let at = self.prepare_inner(open, index, stream, purpose, units).await?;
                rewrite.set_upper(index, at);
            }
            let inner = |(index, reference): &(u32, crate::format::unit::UnitRef)| UnitUse {
                at: reference.at,
                owner: fd,
                kind: EntryKind::Inner,
                index: *index,
            };
            dropped.extend(rewrite.dropped().iter().map(inner));
            let pb = |(pb, at): (&u32, &UnitAddress)| UnitUse {
                at: *at,
                owner: fd,
                kind: EntryKind::PointerBlock,
                index: *pb,
            };
            dropped.extend(change.detach.iter().map(pb));
            body.content = Content::Mapped(rewrite.root());
        }
        if let Some(inline) = &change.inline {
            body.content = Content::Inline(inline.clone());
        }
        Ok((body, dropped))
    }

    async fn prepare_inner(
        &self,
        open: &Open,
        index: u32,
        stream: Option<Vec<u8>>,
        purpose: Purpose,
        units: &mut Vec<PreparedUnit>,
    ) -> Result<Option<crate::format::unit::UnitRef>, FsError> {
        let Some(stream) = stream else { return Ok(None) };
        let unit = self.objects.prepare(&open.object, EntryKind::Inner, index, &stream, purpose).await?;
        let reference = unit.reference;
        units.push(unit);
        Ok(Some(reference))
    }

    /// Remembers an error that nobody waits for, until the next flush or close.
    pub fn remember_error(&self, file: &SharedFile, error: &FsError) {
        file.remember_error(error);
    }
}

/// File blocks that get their first pointer.
fn fresh_blocks(attached: &[(u32, UnitAddress, Plan)], new: &[(u32, Vec<(u64, Pending)>)]) -> Vec<u64> {
    let attached = attached.iter().flat_map(|(_, _, plan)| plan.values()).flat_map(|cells| cells.values()).flatten();
    let new = new.iter().flat_map(|(_, blocks)| blocks);
    attached.chain(new).filter(|(_, pending)| pending.fresh).map(|(index, _)| *index).collect()
}

fn other_pointer(open: &Open, pb: u32, error: PublishError) -> FsError {
    let structure = format!("pointer block {pb} of {}", open.shared.fd);
    match error {
        PublishError::Format(cause) => FsError::Corrupt { structure, cause },
        other => FsError::refused(FsErrorKind::Corrupt, format!("{structure}: {other}; run fsck.vmfs")),
    }
}

pub(super) fn contended(open: &Open) -> FsError {
    let message = format!("{}: other hosts changed it {TRIES} times in a row; try again", open.shared.fd);
    FsError::refused(FsErrorKind::Busy, message)
}
