//! Owns: the pass over all root cells: state, lock, body, and what type and content say of each other.
//! Promises: every object is looked at once, whether it has a name or not.
//! Must not know: how names lead to it.

use super::finding::{Finding, Phase, Severity, Structure};
use super::reader::Unread;
use super::state::Checker;
use super::units::Claim;
use crate::format::arena::Place;
use crate::format::body::{Body, Content};
use crate::format::heartbeat::SlotState;
use crate::format::layout::roots_per_container;
use crate::format::root_cell::{HoldMode, ObjectFlags, ObjectState, ObjectType, RootCell};
use crate::format::table_entry::EntryKind;
use crate::format::unit::UnitRef;
use crate::format::{Cell, CellKind};
use crate::units::{BlockAddress, CellAddress, FdId, Link, LunIndex, SlotRef, Token};

/// Bytes of an FD container that are read with one command.
const PIECE: usize = 1 << 20;

/// An object as its root cell says.
pub(super) struct Found {
    pub fd: FdId,
    pub link: Link,
    pub root: RootCell,
    /// Place of the root cell, for messages.
    pub at: CellAddress,
}

impl Checker<'_> {
    /// Reads all root cells and everything that they reach.
    pub(super) async fn scan_objects(&mut self) {
        let each = self.members.iter();
        let containers: Vec<BlockAddress> = each
            .flat_map(|(lun, m)| m.fd_containers.iter().map(|block| BlockAddress { lun: *lun, block: *block }))
            .collect();
        let total = containers.len() as u64;
        for (nth, container) in containers.into_iter().enumerate() {
            self.scan_fd_container(container).await;
            self.progress(Phase::Objects, nth as u64 + 1, total);
        }
    }

    async fn scan_fd_container(&mut self, container: BlockAddress) {
        let layout = self.members[&container.lun].layout.clone();
        let Some(offset) = layout.block_offset(container.block) else { return };
        let size = layout.cell_size.bytes();
        let cells = roots_per_container(layout.cell_size, layout.block_size) as usize;
        let per = PIECE / size;
        for first in (0..cells).step_by(per) {
            let length = per.min(cells - first) * size;
            let span = self.reader.span(container.lun, offset + (first * size) as u64, length).await;
            let bytes = match span {
                Ok(bytes) => bytes,
                Err(why) => {
                    let at = CellAddress { lun: container.lun, offset: offset + (first * size) as u64 };
                    self.tell_unread(Structure::RootCell, at, None, &why);
                    continue;
                }
            };
            for (nth, image) in bytes.chunks(size).enumerate() {
                let nth = first + nth;
                let fd = FdId::new(container, nth as u16).expect("a container has at most 2^15 root cells");
                let at = CellAddress { lun: container.lun, offset: offset + (nth * size) as u64 };
                let cell = Cell::decode(&self.reader.context, at, image).map_err(Unread::Damaged);
                if let Some(found) = self.decode_root(fd, at, cell) {
                    self.check_object(&found).await;
                }
            }
        }
    }

    /// A root cell; `None` when it is damaged, which has been told.
    pub(super) fn decode_root(&mut self, fd: FdId, at: CellAddress, cell: Result<Cell, Unread>) -> Option<Found> {
        let size = self.reader.context.cell_size;
        let root = cell.and_then(|cell| {
            let decode = || {
                cell.expect_kind(CellKind::Root)?;
                cell.expect_owner(fd, Link(u64::MAX), 0)?;
                RootCell::decode(size, cell.payload())
            };
            decode().map(|root| (cell.header().link, root)).map_err(Unread::Damaged)
        });
        match root {
            Ok((link, root)) => Some(Found { fd, link, root, at }),
            Err(why) => {
                self.tell_unread(Structure::RootCell, at, Some(fd), &why);
                self.damaged.insert(fd);
                None
            }
        }
    }

    async fn check_object(&mut self, found: &Found) {
        let (fd, root) = (found.fd, &found.root);
        let mut creating = None;
        match root.state {
            ObjectState::Free => return self.check_free(found),
            ObjectState::Unlinked(mark) => {
                self.unlinked.insert(fd);
                self.tell_state(found, "unlinked: its space is being freed", mark);
            }
            ObjectState::Unlinking(mark) => {
                self.unnamed.insert(fd.get());
                self.tell_waiting(found, mark, "unlinking: it has its name or not");
                self.remedies.settle.insert(fd);
            }
            ObjectState::Creating(_) => {
                creating = Some(fd);
                self.unnamed.insert(fd.get());
            }
            ObjectState::Live => {
                self.unnamed.insert(fd.get());
            }
        }
        if fd == self.root {
            self.named.insert(fd.get());
        }
        self.check_root_fields(found);
        self.check_lock(found);
        let object_type = root.object_type.expect("an object that is not free has a type");
        if !matches!(root.state, ObjectState::Unlinked(_)) {
            self.count(object_type);
        }
        if object_type == ObjectType::Directory && !matches!(root.state, ObjectState::Unlinked(_)) {
            self.parents.insert(fd, root.parent.unwrap_or(fd));
        }
        self.being_created = creating;
        let body = self.read_body(found).await;
        self.being_created = None;
        if let Some(body) = body {
            self.check_body(found, object_type, &body).await;
        }
    }

    fn count(&mut self, object_type: ObjectType) {
        let objects = &mut self.report.objects;
        *match object_type {
            ObjectType::File => &mut objects.files,
            ObjectType::Disk => &mut objects.disks,
            ObjectType::Directory => &mut objects.directories,
            ObjectType::Symlink => &mut objects.symlinks,
            ObjectType::Rdm => &mut objects.raw_devices,
        } += 1;
    }

    fn check_free(&mut self, found: &Found) {
        if found.root != RootCell::free(found.root.lock.token) {
            self.error(
                Structure::RootCell,
                found.at,
                Some(found.fd),
                "state",
                "free, with fields of an object",
                "zeros",
            );
        }
        if found.fd == self.root {
            self.error(Structure::RootCell, found.at, Some(found.fd), "state", "free", "the root directory");
        }
    }

    /// A state that somebody has to bring to its end.
    pub(super) fn tell_state(&mut self, found: &Found, what: &str, mark: SlotRef) {
        let place = Place::FdContainer(found.fd.container().block.get());
        let judgement = self.judge_mark(found.fd.lun(), mark, place);
        let severity = judgement.severity;
        self.tell_mark(Structure::RootCell, found.at, Some(found.fd), what, judgement);
        self.remedies.settle.remove(&found.fd);
        // Whoever leaves in order has named what it made: this one has lost its name since.
        let was_named = matches!(found.root.state, ObjectState::Creating(_)) && severity == Severity::Error;
        match was_named {
            true => self.remedies.orphans.insert(found.fd),
            false => self.remedies.unfinished.insert(found.fd),
        };
    }

    fn tell_waiting(&mut self, found: &Found, mark: SlotRef, what: &str) {
        self.tell(Finding {
            severity: Severity::Recoverable,
            structure: Structure::RootCell,
            at: found.at.to_string(),
            object: Some(found.fd),
            field: "state",
            found: what.to_owned(),
            expected: format!("that {mark}, or whoever needs the name, brings it to its end"),
        });
    }

    fn check_root_fields(&mut self, found: &Found) {
        let (fd, at, root) = (found.fd, found.at, &found.root);
        let object = Some(fd);
        if found.link.0 == 0 {
            self.error(Structure::RootCell, at, object, "link", 0, "at least 1 in an object");
        }
        let parent = root.parent.unwrap_or(fd);
        let directory = root.object_type == Some(ObjectType::Directory);
        if fd == self.root && (parent != fd || !directory || root.state != ObjectState::Live) {
            let text = format!("{:?} {:?} in {parent}", root.state, root.object_type);
            self.error(Structure::RootCell, at, object, "parent", text, "the root directory, live, its own parent");
        }
        if fd != self.root && parent == fd {
            self.error(Structure::RootCell, at, object, "parent", parent, "another directory");
        }
        if !root.luns.contains(fd.lun()) {
            self.error(Structure::RootCell, at, object, "luns", "a set without the root cell's LUN", fd.lun());
        }
        let unknown: Vec<LunIndex> = root
            .luns
            .iter()
            .filter(|lun| !self.members.contains_key(lun) && !self.report.missing.contains(lun))
            .collect();
        for lun in unknown {
            self.error(Structure::RootCell, at, object, "luns", lun, "members of the volume only");
        }
        if root.unclean.token > root.lock.token {
            let expected = format!("at most {}, the lock's", root.lock.token);
            self.error(Structure::RootCell, at, object, "unclean_token", root.unclean.token, expected);
        }
        if root.body.is_none() && !matches!(root.state, ObjectState::Unlinked(_)) {
            self.error(Structure::RootCell, at, object, "body", "none", "a body");
        }
    }

    /// Lock holders against the slots of the root cell's LUN.
    fn check_lock(&mut self, found: &Found) {
        let (lock, object) = (&found.root.lock, Some(found.fd));
        if !lock.holders.is_empty() {
            self.remedies.locked.insert(found.fd);
        }
        if lock.mode == HoldMode::MultiWriter && !found.root.flags.contains(ObjectFlags::MULTI_WRITER) {
            let expected = "only where the object's flags allow it";
            self.error(Structure::RootCell, found.at, object, "lock_mode", "multi-writer", expected);
        }
        for (nth, holder) in lock.holders.iter().enumerate() {
            if lock.holders[..nth].contains(holder) {
                self.naming_error(
                    Structure::RootCell,
                    found.at,
                    object,
                    "holders",
                    format!("{} twice", holder.slot),
                    "once",
                );
            }
            let slot = self.members[&found.fd.lun()].slots[usize::from(holder.slot.slot.0)].clone();
            let Some(slot) = slot else { continue };
            let current = slot.state != SlotState::Free && slot.generation == holder.slot.generation;
            if current && slot.incarnation != holder.incarnation {
                let expected = format!("{:#x}, as in its slot", slot.incarnation);
                let what = format!("{} with incarnation {:#x}", holder.slot, holder.incarnation);
                self.naming_error(Structure::RootCell, found.at, object, "holders", what, expected);
                continue;
            }
            let (severity, why) = if current {
                (Severity::Recoverable, format!("that host {:?} unlocks it, or is recovered", slot.host_name))
            } else if slot.generation > holder.slot.generation
                || (slot.incarnation != 0 && slot.incarnation == holder.incarnation)
            {
                // Recovery leaves locks alone: whoever opens the object next takes this one back. A slot in use again does not tell.
                (Severity::Recoverable, "no lock: that host is gone; the next open takes it back".to_owned())
            } else if slot.generation == holder.slot.generation {
                (Severity::Error, "no lock: that host has left its slot".to_owned())
            } else {
                (Severity::Error, format!("at most generation {}, the slot's", slot.generation))
            };
            self.tell(Finding {
                severity,
                structure: Structure::RootCell,
                at: found.at.to_string(),
                object,
                field: "holders",
                found: format!("{:?} lock of {}", lock.mode, holder.slot).to_lowercase(),
                expected: why,
            });
        }
    }

    async fn read_body(&mut self, found: &Found) -> Option<Body> {
        let reference = found.root.body?;
        let stream = self.read_unit(found, EntryKind::Body, 0, &reference).await?;
        match Body::decode(self.reader.context.cell_size, &stream) {
            Ok(body) => Some(body),
            Err(error) => {
                let finding = super::probe::damaged(Structure::Body, reference.at.to_string(), &error);
                self.tell(Finding { object: Some(found.fd), ..finding });
                self.damaged.insert(found.fd);
                None
            }
        }
    }

    /// Claims an immutable unit and reads its stream. `None` when that is not possible; it has been told, and the object counts as
    /// damaged.
    pub(super) async fn read_unit(
        &mut self,
        found: &Found,
        kind: EntryKind,
        index: u32,
        reference: &UnitRef,
    ) -> Option<Vec<u8>> {
        let structure = super::units::structure_of(kind);
        let from = format!("the root cell {}", found.at);
        self.check_lun_set(found, structure, reference.at.lun, &reference.at.to_string());
        if !self.claim_unit(Claim { owner: found.fd, kind, index }, reference.at, &from).await {
            self.damaged.insert(found.fd);
            return None;
        }
        let layout = self.members[&reference.at.lun].layout.clone();
        let (mut crc, mut stream) = (0, Vec::new());
        for nth in 0..usize::from(reference.used_cells) {
            let at = layout.unit_cell(reference.at, nth).expect("the unit was claimed");
            let Some(cell) = self.owned_cell(found, kind, index, at).await else {
                self.damaged.insert(found.fd);
                return None;
            };
            crc = crc32c::crc32c_append(crc, cell.image());
            stream.extend_from_slice(cell.payload());
        }
        if crc != reference.crc {
            let expected = format!("{:#010x}, as in the reference to it", reference.crc);
            self.error(structure, reference.at, Some(found.fd), "crc of the unit", format!("{crc:#010x}"), expected);
            self.damaged.insert(found.fd);
            return None;
        }
        Some(stream)
    }

    /// Reads a cell of a unit of an object: kind, owner, link, index.
    pub(super) async fn owned_cell(
        &mut self,
        found: &Found,
        kind: EntryKind,
        index: u32,
        at: CellAddress,
    ) -> Option<Cell> {
        let (structure, cell_kind) = match kind {
            EntryKind::PointerBlock => (Structure::PointerBlock, CellKind::PointerBlock),
            EntryKind::Inner => (Structure::InnerUnit, CellKind::Inner),
            EntryKind::Bucket => (Structure::Bucket, CellKind::Bucket),
            _ => (Structure::Body, CellKind::Body),
        };
        let cell = self.cell(structure, at, cell_kind, Some(found.fd)).await?;
        if let Err(error) = cell.expect_owner(found.fd, found.link, index) {
            self.tell_unread(structure, at, Some(found.fd), &Unread::Damaged(error));
            return None;
        }
        if kind != EntryKind::PointerBlock && cell.header().token != Token(0) {
            self.error(structure, at, Some(found.fd), "token", cell.header().token, 0);
        }
        Some(cell)
    }

    /// What an object uses lies on the LUNs of its set.
    pub(super) fn check_lun_set(&mut self, found: &Found, structure: Structure, lun: LunIndex, at: &str) {
        if !found.root.luns.contains(lun) {
            self.error(structure, at, Some(found.fd), "lun", lun, "a LUN of the object's set");
        }
    }

    async fn check_body(&mut self, found: &Found, object_type: ObjectType, body: &Body) {
        let at = found.root.body.map_or(String::new(), |body| body.at.to_string());
        let (object, attributes) = (Some(found.fd), &body.attributes);
        let fits = match &body.content {
            Content::Inline(_) => object_type == ObjectType::File,
            Content::Mapped(_) => matches!(object_type, ObjectType::File | ObjectType::Disk),
            Content::Symlink(_) => object_type == ObjectType::Symlink,
            Content::Raw(_) => object_type == ObjectType::Rdm,
            Content::Entries(_) | Content::Buckets { .. } => object_type == ObjectType::Directory,
        };
        if !fits {
            let expected = format!("what a {object_type:?} has").to_lowercase();
            self.damaged.insert(found.fd);
            return self.error(Structure::Body, at, object, "content", content_name(&body.content), expected);
        }
        if attributes.disk.is_some() != (object_type == ObjectType::Disk) {
            let expected = "a format exactly in virtual disks";
            self.error(Structure::Body, &at, object, "disk", format!("{:?}", attributes.disk), expected);
        }
        let length = match &body.content {
            Content::Inline(data) => (data.len() as u64 > attributes.size).then_some(data.len()),
            Content::Symlink(target) => (target.len() as u64 != attributes.size).then_some(target.len()),
            _ => None,
        };
        if let Some(length) = length {
            self.error(
                Structure::Body,
                &at,
                object,
                "size",
                attributes.size,
                format!("{length}, the bytes that are there"),
            );
        }
        if let Content::Symlink(target) = &body.content
            && (target.is_empty() || target.contains(&0))
        {
            self.error(Structure::Body, &at, object, "count", target.len(), "a target of 1..4095 bytes without NUL");
        }
        match &body.content {
            Content::Mapped(root) => self.check_mapping(found, body, root).await,
            Content::Entries(_) | Content::Buckets { .. } => self.check_directory(found, body).await,
            _ => {}
        }
    }
}

fn content_name(content: &Content) -> &'static str {
    match content {
        Content::Inline(_) => "inline data",
        Content::Mapped(_) => "a mapping",
        Content::Symlink(_) => "a symbolic link's target",
        Content::Raw(_) => "a raw device",
        Content::Entries(_) | Content::Buckets { .. } => "directory entries",
    }
}
