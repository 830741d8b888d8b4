//! Owns: the question whether a block or a unit is reachable from the object that its table entry names.
//! Promises: asked after the owner's root cell was re-stamped, and re-stamps the pointer cell on the way: "no" holds from then on for
//! all that the dead incarnation has sent. Must not know: what becomes of the block or unit.

use std::rc::Rc;

use super::Parts;
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::body::Content;
use crate::format::table_entry::EntryKind;
use crate::format::unit::UnitRef;
use crate::mapping::publish::pointers;
use crate::mapping::tree::{InnerCache, InnerSource, Shape, Tree};
use crate::object::{Image, Object, Objects};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, FdId, Link, UnitAddress};

/// Re-stamps of one pointer cell that lose before that is given up.
const TRIES: u32 = 64;

/// Reads inner units of one image.
struct Source<'a> {
    objects: &'a Objects,
    fd: FdId,
    link: Link,
}

impl InnerSource for Source<'_> {
    async fn read_inner(&self, reference: &UnitRef, kind: CellKind, index: u32) -> Result<Vec<u8>, FsError> {
        self.objects.space().units.read(reference, kind, self.fd, self.link, index).await
    }
}

/// Looks at what objects reach.
pub(super) struct Reach<'a> {
    parts: &'a Parts<'a>,
    shape: Shape,
}

impl<'a> Reach<'a> {
    pub(super) fn new(parts: &'a Parts<'a>) -> Reach<'a> {
        Reach { parts, shape: Shape::new(parts.context.cell_size()) }
    }

    /// The object that an entry names, after its root cell was re-stamped. `None`: there is none.
    pub(super) async fn owner(&self, stored: u64) -> Result<Option<Rc<Object>>, FsError> {
        let Some(fd) = FdId::from_stored(stored) else { return Ok(None) };
        match self.parts.objects.restamp_root(fd).await {
            Err(error) if error.kind() == FsErrorKind::Stale => Ok(None),
            other => other,
        }
    }

    /// Whether the owner's mapping names the block at file block `index`.
    pub(super) async fn reaches_block(&self, owner: &Object, index: u32, at: BlockAddress) -> Result<bool, FsError> {
        let image = owner.image();
        let place = self.shape.place(index.into());
        let Some(unit) = self.pointer_block(owner, &image, place.pb).await? else { return Ok(false) };
        let address = self.parts.objects.space().units.cell_of(unit, place.cell)?;
        let corrupt =
            |cause| FsError::Corrupt { structure: format!("pointer block {} of {}", place.pb, owner.fd), cause };
        for _ in 0..TRIES {
            let cell = self.parts.context.read_cell(address).await?;
            cell.expect_kind(CellKind::PointerBlock).map_err(corrupt)?;
            cell.expect_owner(owner.fd, image.link(), place.pb).map_err(corrupt)?;
            let found = pointers(self.parts.context.cell_size(), cell.payload()).map_err(corrupt)?;
            self.parts.context.prove_live([address.lun]).await?;
            if active(Sabotage::RecoveryWithoutRestamp) {
                return Ok(found.get(place.nth).copied().flatten().is_some_and(|pointer| pointer.at == at));
            }
            match self.parts.context.cas(&cell, CellChange::same(&cell)).await? {
                CasOutcome::Applied(_) => {
                    return Ok(found.get(place.nth).copied().flatten().is_some_and(|pointer| pointer.at == at));
                }
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        let message = format!("pointer cell {address} of {} is changed by another host all the time", owner.fd);
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// Whether the owner reaches a unit of this kind and index at this place.
    pub(super) async fn reaches_unit(
        &self,
        owner: &Rc<Object>,
        (kind, index): (EntryKind, u32),
        at: UnitAddress,
    ) -> Result<bool, FsError> {
        let image = owner.image();
        let is_directory = matches!(image.body.content, Content::Entries(_) | Content::Buckets { .. });
        match kind {
            EntryKind::Body => Ok(image.root.body.is_some_and(|body| body.at == at)),
            EntryKind::PointerBlock => Ok(self.pointer_block(owner, &image, index).await? == Some(at)),
            EntryKind::Inner if !is_directory => {
                let Content::Mapped(root) = &image.body.content else { return Ok(false) };
                let (cache, source) = (InnerCache::default(), self.source(owner, &image));
                let tree = Tree { shape: self.shape, root, source: &source, cache: &cache, name: owner.fd.to_string() };
                Ok(tree.inner_units().await?.into_iter().any(|(of, reference)| of == index && reference.at == at))
            }
            EntryKind::Inner | EntryKind::Bucket => self.parts.names.has_unit(owner, &image, kind, index, at).await,
            _ => Ok(false),
        }
    }

    fn source(&self, owner: &Object, image: &Image) -> Source<'_> {
        Source { objects: self.parts.objects, fd: owner.fd, link: image.link() }
    }

    async fn pointer_block(&self, owner: &Object, image: &Image, pb: u32) -> Result<Option<UnitAddress>, FsError> {
        let Content::Mapped(root) = &image.body.content else { return Ok(None) };
        let (cache, source) = (InnerCache::default(), self.source(owner, image));
        let tree = Tree { shape: self.shape, root, source: &source, cache: &cache, name: owner.fd.to_string() };
        tree.find(pb).await
    }
}
