//! Owns: walking the entries of a directory and comparing each with the root cell of its child; what has a name in the end.
//! Promises: a name is where its hash says, once; an object has one name in its parent; every directory leads to the root.
//! Must not know: the content of the children.

use std::collections::HashSet;

use super::finding::{Finding, Severity, Structure};
use super::objects::Found;
use super::probe::damaged;
use super::remedy::NamedBy;
use super::state::Checker;
use crate::format::body::{Body, Content, DIRECT_DEPTH, MAX_DEPTH};
use crate::format::dirent::{Dirent, ObjectRef, decode_bucket, name_hash};
use crate::format::root_cell::{ObjectState, ObjectType};
use crate::format::table_entry::EntryKind;
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::units::FdId;

/// Slots of an inner unit.
const GROUP: usize = 1 << DIRECT_DEPTH;

/// Where entries lie, for messages.
struct Shelf {
    structure: Structure,
    at: String,
}

/// What an entry is worth.
enum Worth {
    /// It counts: this is the child's type.
    Counts(ObjectType),
    /// A leftover.
    Leftover(&'static str),
    /// It contradicts the child: field, found, expected.
    Wrong(&'static str, String, String),
    /// The child could not be read, which has been told.
    Unknown,
}

impl Checker<'_> {
    pub(super) async fn check_directory(&mut self, found: &Found, body: &Body) {
        let at = found.root.body.map_or(String::new(), |body| body.at.to_string());
        let counted = match &body.content {
            Content::Entries(entries) => {
                let shelf = Shelf { structure: Structure::Body, at: at.clone() };
                self.check_entries(found, entries, &shelf).await;
                Some(entries.len() as u64)
            }
            Content::Buckets { depth, refs } => self.check_buckets(found, *depth, refs).await,
            _ => None,
        };
        if let Some(counted) = counted.filter(|counted| *counted != body.attributes.size) {
            let expected = format!("{counted}, the entries that are there");
            self.error(Structure::Body, at, Some(found.fd), "size", body.attributes.size, expected);
        }
    }

    /// The references of all slots. `None`: an inner unit could not be read.
    async fn slots(&mut self, found: &Found, depth: u8, refs: &[Option<UnitRef>]) -> (Vec<Option<UnitRef>>, bool) {
        if depth <= DIRECT_DEPTH {
            return (refs.to_vec(), true);
        }
        let (mut slots, mut complete) = (Vec::with_capacity(1 << depth), true);
        for (group, reference) in refs.iter().enumerate() {
            let index = (group << (MAX_DEPTH - depth)) as u32;
            let stream = match reference {
                Some(reference) => self.read_unit(found, EntryKind::Inner, index, reference).await,
                None => Some(Vec::new()),
            };
            complete &= stream.is_some();
            let stream = stream.unwrap_or_default();
            for nth in 0..GROUP {
                let bytes = stream.get(nth * UNIT_REF_BYTES..).filter(|bytes| bytes.len() >= UNIT_REF_BYTES);
                let slot = bytes.map_or(Ok(None), |bytes| UnitRef::unpack(self.reader.context.cell_size, bytes));
                slots.push(slot.unwrap_or_else(|error| {
                    let at = reference.map_or(String::new(), |reference| reference.at.to_string());
                    let finding = damaged(Structure::InnerUnit, at, &error);
                    self.tell(Finding { object: Some(found.fd), ..finding });
                    self.damaged.insert(found.fd);
                    complete = false;
                    None
                }));
            }
        }
        (slots, complete)
    }

    /// All buckets; gives the number of entries when everything could be read.
    async fn check_buckets(&mut self, found: &Found, depth: u8, refs: &[Option<UnitRef>]) -> Option<u64> {
        let (slots, mut complete) = self.slots(found, depth, refs).await;
        let (mut slot, mut entries) = (0, 0);
        while slot < slots.len() {
            let Some(reference) = slots[slot] else {
                slot += 1;
                continue;
            };
            let same = slots[slot..].iter().take_while(|other| **other == Some(reference)).count();
            let prefix = (slot << (MAX_DEPTH - depth)) as u16;
            match self.check_bucket(found, (slot, same, depth), prefix, &reference).await {
                Some(count) => entries += count,
                None => complete = false,
            }
            slot += same;
        }
        complete.then_some(entries)
    }

    async fn check_bucket(
        &mut self,
        found: &Found,
        (slot, same, depth): (usize, usize, u8),
        prefix: u16,
        reference: &UnitRef,
    ) -> Option<u64> {
        let object = Some(found.fd);
        let stream = self.read_unit(found, EntryKind::Bucket, prefix.into(), reference).await?;
        let (local_depth, entries) = match decode_bucket(&stream) {
            Ok(bucket) => bucket,
            Err(error) => {
                let finding = damaged(Structure::Bucket, reference.at.to_string(), &error);
                self.tell(Finding { object, ..finding });
                self.damaged.insert(found.fd);
                return None;
            }
        };
        let span = 1usize << depth.saturating_sub(local_depth);
        if local_depth > depth || span != same || !slot.is_multiple_of(span) {
            let what = format!("{local_depth}, in slots {slot}..{} of a tree of depth {depth}", slot + same);
            self.error(Structure::Bucket, reference.at, object, "local_depth", what, "the slots of that depth");
        }
        for entry in &entries {
            let hash = name_hash(&entry.name);
            let differs = ((hash >> 48) as u16 ^ prefix).leading_zeros() < u32::from(local_depth.min(MAX_DEPTH));
            if differs {
                let expected = format!("{prefix:#06x} in its upper {local_depth} bits");
                let what = format!("{hash:#018x} of the name {:?}", String::from_utf8_lossy(&entry.name));
                self.error(Structure::Bucket, reference.at, object, "hash", what, expected);
            }
        }
        let shelf = Shelf { structure: Structure::Bucket, at: reference.at.to_string() };
        self.check_entries(found, &entries, &shelf).await;
        Some(entries.len() as u64)
    }

    async fn check_entries(&mut self, found: &Found, entries: &[Dirent], shelf: &Shelf) {
        let mut names = HashSet::with_capacity(entries.len());
        for entry in entries {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            if !names.insert(&entry.name) {
                self.naming_error(
                    shelf.structure,
                    &shelf.at,
                    Some(found.fd),
                    "name",
                    format!("{name:?} twice"),
                    "once",
                );
                self.remedies.entry(found.fd, &entry.name);
            }
            match entry.pending {
                None => self.check_plain(found, entry, &name, shelf).await,
                Some(replaced) => self.check_pending(found, entry, replaced, &name, shelf).await,
            }
        }
    }

    async fn check_plain(&mut self, found: &Found, entry: &Dirent, name: &str, shelf: &Shelf) {
        match self.worth(found.fd, entry.child).await {
            Worth::Counts(object_type) => {
                if entry.leaving {
                    self.leftover(found, name, "leaving: a move out of this directory", shelf);
                }
                if object_type != entry.object_type {
                    let what = format!("{:?} for {name:?}", entry.object_type).to_lowercase();
                    let expected = format!("{object_type:?}, as in {}", entry.child.fd).to_lowercase();
                    self.naming_error(shelf.structure, &shelf.at, Some(found.fd), "type", what, expected);
                    self.remedies.entry(found.fd, &entry.name);
                }
                if !self.name(found, entry.child.fd, name, shelf) {
                    self.remedies.entry(found.fd, &entry.name);
                }
            }
            Worth::Leftover(why) => self.leftover(found, name, why, shelf),
            Worth::Wrong(field, what, expected) => {
                let what = format!("{what} for {name:?}");
                self.naming_error(shelf.structure, &shelf.at, Some(found.fd), field, what, expected);
                self.remedies.entry(found.fd, &entry.name);
            }
            Worth::Unknown => {
                let (directory, child, object_type) = (found.fd, entry.child, entry.object_type);
                let by = NamedBy { directory, child, object_type };
                let known = self.remedies.named_by.entry(child.fd).or_insert_with(|| by.clone());
                if known.child.link < child.link {
                    *known = by;
                }
            }
        }
    }

    async fn check_pending(
        &mut self,
        found: &Found,
        entry: &Dirent,
        replaced: Option<ObjectRef>,
        name: &str,
        shelf: &Shelf,
    ) {
        self.leftover(found, name, "pending: a move into this directory", shelf);
        if let Worth::Counts(_) = self.worth(found.fd, entry.child).await {
            self.name(found, entry.child.fd, name, shelf);
        } else if let Some(replaced) = replaced
            && let Worth::Counts(_) = self.worth(found.fd, replaced).await
        {
            self.name(found, replaced.fd, name, shelf);
        }
    }

    /// False: the child had a name before, or the directory itself has none.
    fn name(&mut self, found: &Found, child: FdId, name: &str, shelf: &Shelf) -> bool {
        let mut good = true;
        if matches!(found.root.state, ObjectState::Unlinked(_)) {
            let what = format!("{name:?} in a directory that has lost its own name");
            self.naming_error(shelf.structure, &shelf.at, Some(found.fd), "entries", what, "none");
            good = false;
        }
        if !self.named.insert(child.get()) {
            self.naming_error(
                shelf.structure,
                &shelf.at,
                Some(found.fd),
                "fd",
                format!("{child} a second time, as {name:?}"),
                "once",
            );
            good = false;
        }
        good
    }

    fn leftover(&mut self, found: &Found, name: &str, why: &str, shelf: &Shelf) {
        self.remedies.leftovers.insert(found.fd);
        self.tell(Finding {
            severity: Severity::Recoverable,
            structure: shelf.structure,
            at: shelf.at.clone(),
            object: Some(found.fd),
            field: "entry",
            found: format!("{name:?}: {why}"),
            expected: "that the next change of the directory drops or settles it".to_owned(),
        });
    }

    async fn worth(&mut self, directory: FdId, child: ObjectRef) -> Worth {
        let lun = child.fd.lun();
        let Some(member) = self.members.get(&lun) else {
            if self.report.missing.contains(&lun) {
                return Worth::Unknown;
            }
            return Worth::Wrong("fd", child.fd.to_string(), "an object on a member of the volume".to_owned());
        };
        let block = child.fd.container().block;
        let known = member.fd_containers.contains(&block);
        let (Some(at), true) = (member.layout.root_cell(child.fd), known) else {
            if member.unknown_blocks.contains(block.get()) {
                return Worth::Unknown;
            }
            self.remedies.lost_containers.insert(child.fd.container());
            return Worth::Wrong("fd", child.fd.to_string(), "a root cell of an FD container".to_owned());
        };
        let cell = self.reader.cell(at).await;
        let Some(found) = self.decode_root(child.fd, at, cell) else { return Worth::Unknown };
        let gone = matches!(found.root.state, ObjectState::Free | ObjectState::Unlinked(_));
        if found.link > child.link {
            return Worth::Leftover("its object has moved on or is another one");
        }
        if found.link < child.link {
            let expected = format!("at most {}, the object's", found.link);
            return Worth::Wrong("link", format!("{} of {}", child.link, child.fd), expected);
        }
        if gone {
            return Worth::Wrong("fd", format!("{}, which has no name any more", child.fd), "an object".to_owned());
        }
        match found.root.parent {
            Some(parent) if parent == directory => Worth::Counts(found.root.object_type.expect("it is not free")),
            parent => {
                let what = parent.map_or("none".to_owned(), |parent| parent.to_string());
                Worth::Wrong("parent", format!("{what} in {}", child.fd), directory.to_string())
            }
        }
    }

    /// Objects that nothing names, directories that do not lead to the root. After all directories were walked.
    pub(super) async fn check_names(&mut self) {
        for stored in self.unnamed.without(&self.named) {
            let Some(fd) = FdId::from_stored(stored) else { continue };
            self.check_unnamed(fd).await;
        }
        let reachable = self.reachable_directories();
        let mut lost: Vec<FdId> = self.parents.keys().copied().filter(|fd| !reachable.contains(fd)).collect();
        lost.sort();
        for fd in lost {
            if self.named.contains(fd.get()) {
                let parent = self.parents[&fd];
                let expected = "a way to the root directory";
                self.remedies.cut_off.insert(fd);
                self.naming_error(
                    Structure::RootCell,
                    fd,
                    Some(fd),
                    "parent",
                    format!("{parent}, which does not lead there"),
                    expected,
                );
            }
        }
    }

    async fn check_unnamed(&mut self, fd: FdId) {
        let Some(at) = self.members.get(&fd.lun()).and_then(|member| member.layout.root_cell(fd)) else { return };
        let cell = self.reader.cell(at).await;
        let Some(found) = self.decode_root(fd, at, cell) else { return };
        let parent = found.root.parent.unwrap_or(fd);
        let undecided = self.damaged.contains(&parent) || self.report.missing.contains(&parent.lun());
        if undecided {
            self.tell(Finding {
                severity: Severity::Info,
                structure: Structure::RootCell,
                at: at.to_string(),
                object: Some(fd),
                field: "parent",
                found: format!("{parent}, which could not be read"),
                expected: "an entry there".to_owned(),
            });
            return;
        }
        match found.root.state {
            ObjectState::Creating(mark) => self.tell_state(&found, "creating, and nothing names it", mark),
            ObjectState::Unlinking(mark) => self.tell_state(&found, "unlinking, and nothing names it", mark),
            _ => {
                self.remedies.orphans.insert(fd);
                let expected = format!("an entry in {parent}");
                self.naming_error(Structure::RootCell, at, Some(fd), "name", "none: an orphan", expected);
            }
        }
    }

    fn reachable_directories(&self) -> HashSet<FdId> {
        let mut reachable = HashSet::from([self.root]);
        let mut lost: HashSet<FdId> = HashSet::new();
        for start in self.parents.keys() {
            let (mut way, mut at) = (Vec::new(), *start);
            let good = loop {
                if reachable.contains(&at) {
                    break true;
                }
                if lost.contains(&at) || way.contains(&at) {
                    break false;
                }
                way.push(at);
                match self.parents.get(&at) {
                    Some(parent) => at = *parent,
                    // Its parent could not be read: that was told, and says nothing about this one.
                    None => break self.damaged.contains(&at) || self.report.missing.contains(&at.lun()),
                }
            };
            for fd in way {
                if good {
                    reachable.insert(fd);
                } else {
                    lost.insert(fd);
                }
            }
        }
        reachable
    }
}
