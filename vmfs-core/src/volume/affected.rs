//! Owns: which objects a lost LUN hurts: those with their root cell, body, units or blocks on it.
//! Promises: nothing else is listed; the work is bounded, and when it was cut the answer says so. Nothing is written.
//! Must not know: how the answer is printed.

use std::collections::{BTreeMap, BTreeSet};

use super::Inner;
use super::types::{Affected, AffectedObject, LostPart};
use crate::error::FsError;
use crate::format::CellKind;
use crate::format::body::Content;
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::ObjectType;
use crate::format::unit::UnitRef;
use crate::mapping::publish::pointers;
use crate::mapping::tree::{InnerCache, InnerSource, Shape, Tree};
use crate::object::{Image, Object, Objects, Surveyed};
use crate::units::{FdId, Link, LunIndex, UnitAddress};

/// Objects looked at, pointer blocks and directories read, before the answer is cut.
const MOST_WORK: u64 = 1_000_000;
/// Objects listed before the answer is cut.
const MOST_LISTED: usize = 10_000;

/// Where an object has its name: directory and name.
type Names = BTreeMap<FdId, (FdId, Vec<u8>)>;

struct Search<'a> {
    inner: &'a Inner,
    lost: Vec<LunIndex>,
    found: BTreeMap<FdId, (Option<ObjectType>, LostPart)>,
    names: Names,
    work: u64,
    cut: bool,
}

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

/// The objects that the lost LUNs hurt.
pub(super) async fn affected(inner: &Inner) -> Result<Affected, FsError> {
    let lost = inner.context.lost_luns();
    if lost.is_empty() {
        return Ok(Affected::default());
    }
    let mut search = Search { inner, lost, found: BTreeMap::new(), names: BTreeMap::new(), work: 0, cut: false };
    let mut all: Vec<Surveyed> = Vec::new();
    for lun in inner.context.luns_at_hand() {
        let room = MOST_WORK as usize;
        inner
            .objects
            .survey(lun, &mut |found| {
                all.push(found);
                all.len() < room
            })
            .await?;
    }
    search.cut |= all.len() as u64 >= MOST_WORK;
    for object in &all {
        if let Some(part) = search.lost_part(object).await? {
            search.found.insert(object.fd, (object.root.object_type, part));
        }
    }
    for object in all.iter().filter(|object| object.root.object_type == Some(ObjectType::Directory)) {
        search.read_directory(ObjectRef { fd: object.fd, link: object.link }).await?;
    }
    Ok(search.answer())
}

impl Search<'_> {
    fn is_lost(&self, lun: LunIndex) -> bool {
        self.lost.contains(&lun)
    }

    /// One step of work; false when there was enough.
    fn step(&mut self) -> bool {
        self.work += 1;
        self.cut |= self.work > MOST_WORK || self.found.len() >= MOST_LISTED;
        !self.cut
    }

    /// The part of an object, whose root cell is there, that is lost.
    async fn lost_part(&mut self, object: &Surveyed) -> Result<Option<LostPart>, FsError> {
        if object.root.body.is_some_and(|body| self.is_lost(body.at.lun)) {
            return Ok(Some(LostPart::Body));
        }
        // What it may not use it does not use.
        if !object.root.luns.iter().any(|lun| self.is_lost(lun)) || !self.step() {
            return Ok(None);
        }
        let loaded = self.inner.objects.load(ObjectRef { fd: object.fd, link: object.link }).await;
        // One that went away meanwhile, or is damaged, is another matter.
        let Ok(loaded) = loaded else { return Ok(None) };
        let image = loaded.image();
        match &image.body.content {
            Content::Mapped(_) => self.lost_in_mapping(&loaded, &image).await,
            Content::Buckets { .. } => {
                Ok(self.inner.names.has_lost_unit(&loaded, &image).await?.then_some(LostPart::Units))
            }
            _ => Ok(None),
        }
    }

    async fn lost_in_mapping(&mut self, object: &Object, image: &Image) -> Result<Option<LostPart>, FsError> {
        let Content::Mapped(root) = &image.body.content else { return Ok(None) };
        let context = &self.inner.context;
        let (cache, shape) = (InnerCache::default(), Shape::new(context.cell_size()));
        let source = Source { objects: &self.inner.objects, fd: object.fd, link: image.link() };
        let tree = Tree { shape, root, source: &source, cache: &cache, name: object.fd.to_string() };
        let mut from = 0;
        loop {
            let next = match tree.next_attached(from).await {
                Err(error) if context.is_loss(&error) => return Ok(Some(LostPart::Units)),
                Err(_) => return Ok(None),
                Ok(next) => next,
            };
            let Some((pb, unit)) = next else { return Ok(None) };
            if self.is_lost(unit.lun) {
                return Ok(Some(LostPart::Units));
            }
            if !self.step() {
                return Ok(None);
            }
            if self.names_lost_block(unit).await? {
                return Ok(Some(LostPart::Blocks));
            }
            from = pb + 1;
        }
    }

    async fn names_lost_block(&self, unit: UnitAddress) -> Result<bool, FsError> {
        let context = &self.inner.context;
        let member = context.member(unit.lun)?;
        let first = self.inner.objects.space().units.cell_of(unit, 0)?;
        let cells = context.io.read_span(&member.lun, first, context.cell_size().cells_per_unit()).await?;
        // A cell that is torn by a change or damaged names nothing for certain.
        let pointers =
            cells.into_iter().flatten().filter_map(|cell| pointers(context.cell_size(), cell.payload()).ok());
        Ok(pointers.flatten().flatten().any(|pointer| self.is_lost(pointer.at.lun)))
    }

    /// Notes the names of directories and of affected objects, and the objects with a name here whose root cell is lost.
    async fn read_directory(&mut self, directory: ObjectRef) -> Result<(), FsError> {
        if !self.step() {
            return Ok(());
        }
        let entries = match self.inner.names.entries_of(directory).await {
            Ok(entries) => entries,
            Err(error) if self.inner.context.is_loss(&error) => return Ok(()),
            // It went away meanwhile, or is damaged.
            Err(_) => return Ok(()),
        };
        for Dirent { name, object_type, child, pending, .. } in entries {
            let fd = child.fd;
            if pending.is_none() && self.is_lost(fd.lun()) && self.step() {
                self.found.insert(fd, (Some(object_type), LostPart::RootCell));
            }
            if object_type == ObjectType::Directory || self.found.contains_key(&fd) {
                self.names.insert(fd, (directory.fd, name));
            }
        }
        Ok(())
    }

    fn path_of(&self, fd: FdId) -> Option<Vec<u8>> {
        let root = self.inner.info.root.fd;
        let (mut at, mut parts, mut seen) = (fd, Vec::new(), BTreeSet::new());
        while at != root {
            let (parent, name) = self.names.get(&at).filter(|_| seen.insert(at))?;
            parts.push(name.as_slice());
            at = *parent;
        }
        parts.push(b"");
        parts.reverse();
        Some(if parts.len() == 1 { b"/".to_vec() } else { parts.join(&b'/') })
    }

    fn answer(mut self) -> Affected {
        let root = self.inner.info.root.fd;
        if self.is_lost(root.lun()) {
            self.found.insert(root, (Some(ObjectType::Directory), LostPart::RootCell));
        }
        let mut objects: Vec<AffectedObject> = self
            .found
            .iter()
            .map(|(fd, (object_type, part))| AffectedObject {
                fd: *fd,
                object_type: *object_type,
                part: *part,
                path: self.path_of(*fd),
            })
            .collect();
        objects.sort_by(|a, b| (&a.path, a.fd).cmp(&(&b.path, b.fd)));
        Affected { luns: self.lost, objects, cut: self.cut }
    }
}
