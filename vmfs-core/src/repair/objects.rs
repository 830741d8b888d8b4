//! Owns: mending one object: root cell, body, what the body reaches; each made from what is proven of it.
//! Promises: what is sound stays byte for byte; what is made anew is complete before the root cell names it; what cannot be saved is
//! said. Must not know: names.

use std::cell::RefCell;
use std::collections::HashSet;

use super::Work;
use super::ground::Ground;
use super::mappings::Mended;
use super::reverse::ReverseMap;
use super::roots::{self, Proof, Root};
use super::units::Shop;
use crate::check::remedy::{Claimed, Remedies};
use crate::error::FsError;
use crate::format::body::{Attributes, Body, Content};
use crate::format::root_cell::{HoldMode, ObjectFlags, ObjectState, ObjectType, RootCell};
use crate::format::table_entry::EntryKind;
use crate::format::unit::{UnitRef, cells_for};
use crate::units::{FdId, Link, Token};

/// Mends every object with something wrong in itself, as far as that is allowed.
pub(super) async fn mend(ground: &Ground, remedies: &Remedies, work: &mut Work<'_>) -> Result<(), FsError> {
    let mut wanted = remedies.objects.clone();
    let allowed = |fd: &FdId, work: &mut Work<'_>| {
        work.allowed(&format!(
            "{fd} is damaged. Make it anew from what its other structures and the tables prove of it?"
        ))
    };
    wanted.retain(|fd| ground.members.contains_key(&fd.lun()) && allowed(fd, work));
    if wanted.is_empty() {
        return Ok(());
    }
    let reverse = ReverseMap::read(ground, &wanted).await?;
    let shop = Shop { ground, remedies, reverse, work: RefCell::new(work), taken: RefCell::new(HashSet::new()) };
    for fd in wanted {
        shop.object(fd).await?;
    }
    Ok(())
}

/// Writes the number of blocks that an object holds into its body.
pub(super) async fn count(ground: &Ground, fd: FdId, blocks: u64) -> Result<String, FsError> {
    let Some(root) = roots::read(ground, fd).await? else { return Ok(String::new()) };
    let remedies = Remedies::default();
    let reverse = ReverseMap::read(ground, &std::collections::BTreeSet::new()).await?;
    let mut nobody = super::Nobody;
    let mut work = super::Work::new(&mut nobody, super::RepairOptions::default());
    let shop = Shop { ground, remedies: &remedies, reverse, work: RefCell::new(&mut work), taken: RefCell::default() };
    let Some(mut body) = shop.body(fd, &root).await? else { return Ok(String::new()) };
    if body.attributes.blocks == blocks {
        return Ok(String::new());
    }
    body.attributes.blocks = blocks;
    shop.commit(fd, root, &body).await?;
    Ok(format!("{fd}: holds {blocks} blocks, and its body says so again"))
}

impl Shop<'_, '_> {
    async fn object(&self, fd: FdId) -> Result<(), FsError> {
        let Some(at) = roots::place(self.ground, fd)? else { return Ok(()) };
        let (root, was_lost) = match roots::read(self.ground, fd).await? {
            Some(root) => (root, false),
            None => {
                let proof = self.proof(fd).await?;
                match proof.anew(self.ground, fd, at) {
                    Some(root) => (root, true),
                    None => {
                        roots::write(self.ground, fd, &proof.free(at)).await?;
                        self.repaired(format!("root cell {fd}: made a free one; nothing says that it was in use"));
                        return Ok(());
                    }
                }
            }
        };
        if root.root.state == ObjectState::Free {
            return self.free_root(fd, root).await;
        }
        let before = root.root.clone();
        let link = root.link;
        let mut root = self.normal(fd, root);
        let body = self.body(fd, &root).await?;
        let was_readable = body.is_some();
        let (mut body, mut mended) = match body {
            Some(body) => (body, Mended::default()),
            None => match self.body_anew(fd, &root).await? {
                Some(body) => (body, Mended::whole()),
                None => return self.give_up(fd, root).await,
            },
        };
        self.fit_type(&mut root, &mut body, &mut mended);
        self.content(fd, &mut root, &mut body, was_readable, &mut mended).await?;
        if mended.changed {
            self.commit(fd, root, &body).await?;
            self.repaired(format!("{fd}: body written anew{}", mended.words()));
        } else if was_lost || root.root != before || root.link != link {
            roots::write(self.ground, fd, &root).await?;
            let what = if was_lost { "made anew from its body and who names it" } else { "set right" };
            self.repaired(format!("root cell {fd}: {what}"));
        }
        Ok(())
    }

    async fn free_root(&self, fd: FdId, mut root: Root) -> Result<(), FsError> {
        let free = RootCell::free(root.root.lock.token);
        let is_root = self.ground.members.values().any(|member| member.header.root == fd);
        if is_root {
            let proof = self.proof(fd).await?;
            let Some(mut anew) = proof.anew(self.ground, fd, root.at) else { return Ok(()) };
            anew.link = root.link.max(anew.link);
            let body = self.body_anew(fd, &anew).await?.expect("a directory can be made anew");
            self.commit(fd, anew, &body).await?;
            self.repaired(format!("root directory {fd}: made anew"));
        } else if root.root != free {
            root.root = free;
            roots::write(self.ground, fd, &root).await?;
            self.repaired(format!("root cell {fd}: fields of an object cleared in a free one"));
        }
        Ok(())
    }

    /// The object is removed: nothing of its content is left.
    async fn give_up(&self, fd: FdId, root: Root) -> Result<(), FsError> {
        let link = Link(root.link.0 + 2);
        let token = root.root.lock.token.next();
        roots::write(self.ground, fd, &Root { link, root: RootCell::free(token), ..root }).await?;
        self.repaired(format!("{fd}: could not be saved, for nothing of its content is left; removed"));
        Ok(())
    }

    /// What the tables and the object's units prove of it.
    async fn proof(&self, fd: FdId) -> Result<Proof<'_>, FsError> {
        let holdings = self.reverse.of(fd);
        let mut proof =
            Proof { named: self.remedies.named_by.get(&fd), holdings, link: Link(0), token: Token(0), body: None };
        let count = self.ground.context().cell_size.cells_per_unit();
        for (at, entry) in &holdings.units {
            let kind = if entry.kind == EntryKind::Retiring { entry.was } else { entry.kind };
            let claimed = Claimed { owner: fd, kind, index: entry.index };
            for cell in self.cells(*at, count, &claimed, Link(u64::MAX)).await?.into_iter().flatten() {
                proof.link = proof.link.max(cell.header().link);
                proof.token = proof.token.max(cell.header().token);
            }
        }
        for at in self.body_units(fd) {
            if let Some((body, cells)) = self.readable_body(fd, at).await? {
                let used = usize::from(cells_for(self.ground.context().cell_size, body.encode().len()).unwrap_or(1));
                let crc = cells[..used].iter().fold(0, |crc, cell| crc32c::crc32c_append(crc, cell.image()));
                let reference = UnitRef { at, used_cells: used as u8, crc, birth: 0 };
                proof.body = Some((reference, type_of(&body)));
                break;
            }
        }
        Ok(proof)
    }

    /// A body by itself: the unit's leading cells that are a body of this object.
    async fn readable_body(
        &self,
        fd: FdId,
        at: crate::units::UnitAddress,
    ) -> Result<Option<(Body, Vec<crate::format::Cell>)>, FsError> {
        let size = self.ground.context().cell_size;
        let claimed = Claimed { owner: fd, kind: EntryKind::Body, index: 0 };
        let cells = self.cells(at, size.cells_per_unit(), &claimed, Link(u64::MAX)).await?;
        let cells: Vec<_> = cells.into_iter().map_while(|cell| cell).collect();
        let stream: Vec<u8> = cells.iter().flat_map(|cell| cell.payload().to_vec()).collect();
        let body = Body::decode(size, &stream).ok();
        let whole =
            |body: &Body| cells_for(size, body.encode().len()).is_some_and(|used| usize::from(used) <= cells.len());
        Ok(body.filter(whole).map(|body| (body, cells)))
    }

    /// Fields of a root cell that contradict each other or the volume.
    fn normal(&self, fd: FdId, mut found: Root) -> Root {
        let root = &mut found.root;
        let volume_root = self.ground.members.values().next().map_or(fd, |member| member.header.root);
        if fd == volume_root {
            (root.parent, root.state, root.object_type) = (Some(fd), ObjectState::Live, Some(ObjectType::Directory));
        } else if root.parent.is_none_or(|parent| parent == fd) {
            root.parent = Some(volume_root);
        }
        let mut luns = crate::format::root_cell::LunSet::of(fd.lun());
        let known = root.luns.iter().chain(self.reverse.of(fd).luns());
        known.filter(|lun| self.ground.members.contains_key(lun)).for_each(|lun| luns.insert(lun));
        root.luns = luns;
        if root.lock.mode == HoldMode::MultiWriter && !root.flags.contains(ObjectFlags::MULTI_WRITER) {
            root.lock.mode = HoldMode::Free;
            root.lock.holders.clear();
        }
        root.unclean.token = root.unclean.token.min(root.lock.token);
        found.link = found.link.max(Link(1));
        found
    }

    /// The body as the root cell names it; `None`: it cannot be had.
    pub(super) async fn body(&self, fd: FdId, root: &Root) -> Result<Option<Body>, FsError> {
        let Some(reference) = root.root.body else { return Ok(None) };
        let claimed = Claimed { owner: fd, kind: EntryKind::Body, index: 0 };
        let stream = self.stream(claimed, root.link, &reference).await?;
        Ok(stream.and_then(|stream| Body::decode(self.ground.context().cell_size, &stream).ok()))
    }

    /// A body for an object that has lost its own; `None`: nothing of it can be had back.
    async fn body_anew(&self, fd: FdId, root: &Root) -> Result<Option<Body>, FsError> {
        let object_type = root.root.object_type.unwrap_or(ObjectType::File);
        let mut older: Option<Attributes> = None;
        for at in self.body_units(fd) {
            let Some((body, _)) = self.readable_body(fd, at).await? else { continue };
            let retiring = self.ground.unit_entry(at).await?.is_none_or(|entry| entry.kind == EntryKind::Retiring);
            let fits = Some(type_of(&body)) == root.root.object_type;
            if fits && !retiring {
                return Ok(Some(body));
            }
            older = older.or(Some(body.attributes).filter(|_| fits));
        }
        let attributes = older.unwrap_or_else(|| self.bare(object_type));
        let content = match object_type {
            ObjectType::Directory => Content::Entries(Vec::new()),
            ObjectType::File | ObjectType::Disk => self.mapping_anew(fd, root, &attributes).await?,
            ObjectType::Symlink | ObjectType::Rdm => return Ok(None),
        };
        Ok(Some(Body { attributes, content }))
    }

    fn bare(&self, object_type: ObjectType) -> Attributes {
        let now = self.ground.env().wall_ns();
        Attributes {
            mode: if object_type == ObjectType::Directory { 0o700 } else { 0o600 },
            uid: 0,
            gid: 0,
            size: 0,
            blocks: 0,
            accessed_ns: now,
            modified_ns: now,
            changed_ns: now,
            born_ns: now,
            disk: None,
            name: Vec::new(),
        }
    }

    /// Makes type, disk format, size and content fit each other: the content decides.
    fn fit_type(&self, root: &mut Root, body: &mut Body, mended: &mut Mended) {
        let before = body.attributes.clone();
        let object_type = match (&body.content, root.root.object_type) {
            (Content::Mapped(_), Some(kept @ (ObjectType::File | ObjectType::Disk))) => kept,
            _ => type_of(body),
        };
        root.root.object_type = Some(object_type);
        let attributes = &mut body.attributes;
        attributes.disk = match object_type {
            ObjectType::Disk => Some(attributes.disk.unwrap_or(crate::format::body::DiskFormat::Thin)),
            _ => None,
        };
        match &body.content {
            Content::Inline(data) => attributes.size = attributes.size.max(data.len() as u64),
            Content::Symlink(target) => attributes.size = target.len() as u64,
            _ => {}
        }
        mended.changed |= *attributes != before;
    }

    async fn content(
        &self,
        fd: FdId,
        root: &mut Root,
        body: &mut Body,
        was_readable: bool,
        mended: &mut Mended,
    ) -> Result<(), FsError> {
        match body.content.clone() {
            Content::Mapped(mapping) => self.mapping(fd, root, body, &mapping, mended).await,
            Content::Entries(_) | Content::Buckets { .. } => {
                if !was_readable {
                    self.keep_children(fd).await?;
                }
                self.directory(fd, root, body, mended).await?;
                if !was_readable {
                    mended.say("; its entries are found again by their objects");
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Writes a body to a free unit and makes the root cell name it.
    pub(super) async fn commit(&self, fd: FdId, mut root: Root, body: &Body) -> Result<(), FsError> {
        let claimed = Claimed { owner: fd, kind: EntryKind::Body, index: 0 };
        let reference = self.write(claimed, root.link, root.seq as u32, &root.root.luns, &body.encode()).await?;
        root.root.luns.insert(reference.at.lun);
        root.root.body = Some(reference);
        roots::write(self.ground, fd, &root).await.map(|_| ())
    }
}

/// The type that a content makes an object.
fn type_of(body: &Body) -> ObjectType {
    match &body.content {
        Content::Inline(_) => ObjectType::File,
        Content::Mapped(_) if body.attributes.disk.is_some() => ObjectType::Disk,
        Content::Mapped(_) => ObjectType::File,
        Content::Symlink(_) => ObjectType::Symlink,
        Content::Raw(_) => ObjectType::Rdm,
        Content::Entries(_) | Content::Buckets { .. } => ObjectType::Directory,
    }
}
