//! Owns: freeing the space of an object that has lost its name.
//! Promises: blocks and units are freed only while their table entry still names the object; what is interrupted can be begun again.
//! Must not know: names; who may still have the object open (the caller waits for that).

use std::rc::Rc;

use super::allocate::may_still_run;
use super::files::Files;
use super::load::UnitSource;
use crate::alloc::units::{UnitEdit, UnitUse};
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::body::{Content, MappingRoot};
use crate::format::root_cell::{Holder, ObjectState};
use crate::format::table_entry::EntryKind;
use crate::mapping::publish::pointers;
use crate::mapping::tree::{InnerCache, Tree};
use crate::object::{Image, Object};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, LunIndex, SlotRef, UnitAddress};

/// The incarnation whose writes to the object's blocks may still arrive: its lock was broken and it is not proven fenced.
pub(super) fn broken(image: &Image) -> Option<SlotRef> {
    let broken = image.root.unclean.broken;
    (broken != Holder::default()).then_some(broken.slot)
}

impl Files {
    /// Frees the blocks, pointer blocks and inner units of an unlinked object that nobody has open on this host. Its body and root cell
    /// are left to [`crate::object::Objects::free`].
    ///
    /// # Errors
    /// `Invalid` while the object has a name. After any other error it can be called again; once it is done, it does nothing.
    pub async fn erase(&self, object: &Rc<Object>) -> Result<(), FsError> {
        if object.is_erased() || active(Sabotage::BlocksForgotten) {
            return Ok(());
        }
        let image = object.image();
        if !matches!(image.root.state, ObjectState::Unlinked(_)) {
            let message = format!("{} still has a name; this is a bug, nothing was freed", object.fd);
            return Err(FsError::refused(FsErrorKind::Invalid, message));
        }
        let Content::Mapped(root) = &image.body.content else { return Ok(()) };
        let (cache, source) = (InnerCache::default(), self.source(object.fd, &image));
        let tree = Tree { shape: self.shape, root, source: &source, cache: &cache, name: object.fd.to_string() };
        let mut units = Vec::new();
        let mut from = Some(0);
        while let Some(at) = from {
            let Some((pb, unit)) = tree.next_attached(at).await? else { break };
            self.erase_pb(object, &image, pb, unit).await?;
            units.push(UnitUse { at: unit, owner: object.fd, kind: EntryKind::PointerBlock, index: pb });
            from = pb.checked_add(1);
        }
        units.extend(self.inner_uses(object, &tree, root).await?);
        // Once the root cell is free nothing tells any more whose they were: recovery of this host finds them by its marks.
        let marks: Vec<(UnitUse, UnitEdit)> = units.iter().map(|unit| (*unit, UnitEdit::Retire)).collect();
        self.space.units.edit(&marks, None).await?;
        self.objects.defer(units);
        object.set_erased();
        Ok(())
    }

    async fn inner_uses(
        &self,
        object: &Object,
        tree: &Tree<'_, UnitSource<'_>>,
        root: &MappingRoot,
    ) -> Result<Vec<UnitUse>, FsError> {
        if matches!(root, MappingRoot::PointerBlocks(_)) {
            return Ok(Vec::new());
        }
        let inner = tree.inner_units().await?.into_iter();
        Ok(inner
            .map(|(index, reference)| UnitUse { at: reference.at, owner: object.fd, kind: EntryKind::Inner, index })
            .collect())
    }

    async fn erase_pb(&self, object: &Object, image: &Image, pb: u32, unit: UnitAddress) -> Result<(), FsError> {
        let corrupt = |cause| FsError::Corrupt { structure: format!("pointer block {pb} of {}", object.fd), cause };
        let member = self.context.member(unit.lun)?;
        let first = self.space.units.cell_of(unit, 0)?;
        let count = self.context.cell_size().cells_per_unit();
        let mut blocks = Vec::new();
        for (nth, cell) in self.context.io.read_span(&member.lun, first, count).await?.into_iter().enumerate() {
            let cell = match cell {
                Ok(cell) => cell,
                Err(_) => self.context.read_cell(self.space.units.cell_of(unit, nth)?).await?,
            };
            cell.expect_kind(CellKind::PointerBlock).map_err(corrupt)?;
            cell.expect_owner(object.fd, image.link(), pb).map_err(corrupt)?;
            let base = self.shape.first_block(pb) + nth as u64 * self.shape.per_cell();
            let found = pointers(self.context.cell_size(), cell.payload()).map_err(corrupt)?;
            blocks
                .extend(found.into_iter().enumerate().filter_map(|(n, p)| p.map(|p| ((base + n as u64) as u32, p.at))));
        }
        // After an error this is done again: blocks that were freed by then may be somebody else's, so nothing is done to a block that
        // does not carry this host's mark.
        if active(Sabotage::UnmapBeforeMark) {
            self.trim(&blocks).await?;
        }
        let blocks = self.space.blocks.retire(object.fd, &blocks).await?;
        let certain = self.trim(&blocks).await? && !self.is_doubtful(object.fd);
        if !certain {
            return self.space.blocks.quarantine(object.fd, &blocks).await;
        }
        match broken(image) {
            Some(broken) => self.space.blocks.quarantine_of(broken, object.fd, &blocks).await,
            None => {
                self.space.blocks.free_retired(object.fd, &blocks).await?;
                if active(Sabotage::UnmapAfterFree) {
                    self.trim(&blocks).await?;
                }
                Ok(())
            }
        }
    }

    /// Gives blocks back to the storage, as far as that works. False: a command may still be on its way.
    async fn trim(&self, blocks: &[(u32, BlockAddress)]) -> Result<bool, FsError> {
        let mut places: Vec<(LunIndex, u64)> = Vec::with_capacity(blocks.len());
        for (_, at) in blocks {
            if let Some(place) = self.place(*at)? {
                places.push((at.lun, place.offset));
            }
        }
        places.sort_unstable();
        let bytes = self.context.block_size().bytes();
        let mut certain = true;
        for run in places.chunk_by(|a, b| a.0 == b.0 && a.1 + bytes == b.1) {
            let member = self.context.member(run[0].0)?;
            if let Err(error) = member.lun.unmap(run[0].1, run.len() as u64 * bytes).await {
                tracing::debug!(%error, "space was not given back to the storage");
                certain &= !may_still_run(&error);
            }
        }
        Ok(certain)
    }
}
