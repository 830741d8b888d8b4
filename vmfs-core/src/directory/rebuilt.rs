//! Owns: the names of directories that cannot be read because a LUN is lost, rebuilt from what their children say of themselves.
//! Promises: what is found by a rebuilt name is an object whose root cell names that very directory as its parent, read now; a name that
//! is not found is no proof that there is none: it may lie on the lost LUN. Must not know: where the answers are shown.
//!
//! A root cell names its object's parent, a body the last known name. A child without a name, or whose name an older sibling has, is
//! told apart by a number. One that is being created or removed is left out: whether it has its name only the directory could tell, and its
//! maker or remover may take it away. A lost directory keeps its name where a directory that can be read names it; else nothing says how it was
//! called, and it appears in the root as `lost-FD`.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use super::image::Found;
use super::name_set::NameSet;
use super::names::Names;
use super::tree;
use crate::env::Instant;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Attributes;
use crate::format::dirent::{Dirent, MAX_NAME, ObjectRef, is_name};
use crate::format::root_cell::{ObjectFlags, ObjectState, ObjectType};
use crate::object::Surveyed;
use crate::units::{FdId, Link, LunIndex};
use crate::volume::{DirEntry, Stat};

/// How long an index is believed at least before it is made anew, and at least this many times what making it took.
const FRESH: Duration = Duration::from_secs(5);
const FRESH_TIMES: u32 = 20;
/// Objects looked at for one index. What lies behind is not found by a rebuilt name.
const MOST_OBJECTS: usize = 4_000_000;

/// What the children of lost directories say.
pub(super) struct Rebuilt {
    /// The LUNs that were at hand.
    luns: Vec<LunIndex>,
    began: Instant,
    ended: Instant,
    directories: BTreeMap<FdId, NameSet>,
    /// In the root, beside what it names: lost directories of which nothing that can be read has the name.
    unnamed: NameSet,
}

impl Rebuilt {
    fn is_fresh(&self, luns: &[LunIndex], now: Instant) -> bool {
        let took = Duration::from_nanos(self.ended.0.saturating_sub(self.began.0));
        self.luns == luns && now < self.ended.after(FRESH.max(took * FRESH_TIMES))
    }
}

/// One child of a lost directory.
struct Orphan {
    object: ObjectRef,
    object_type: ObjectType,
    hint: Vec<u8>,
}

/// Objects that a survey found.
#[derive(Default)]
struct Survey {
    directories: Vec<ObjectRef>,
    children: Vec<(ObjectRef, ObjectType, FdId)>,
}

impl Survey {
    /// False: enough.
    fn add(&mut self, found: Surveyed) -> bool {
        let object = ObjectRef { fd: found.fd, link: found.link };
        let object_type = found.root.object_type.unwrap_or(ObjectType::File);
        if object_type == ObjectType::Directory {
            self.directories.push(object);
        }
        let parent = found.root.parent.filter(|parent| *parent != found.fd && found.root.state == ObjectState::Live);
        if let Some(parent) = parent {
            self.children.push((object, object_type, parent));
        }
        self.children.len() < MOST_OBJECTS
    }
}

impl Names {
    /// The index, made anew when it is old or other LUNs are at hand by now.
    async fn rebuilt(&self) -> Result<Rc<Rebuilt>, FsError> {
        let mut index = self.rebuilt.lock().await;
        let luns = self.context.luns_at_hand();
        if let Some(known) = index.as_ref().filter(|known| known.is_fresh(&luns, self.context.env().now())) {
            return Ok(known.clone());
        }
        let made = Rc::new(self.rebuild(luns).await?);
        *index = Some(made.clone());
        Ok(made)
    }

    async fn rebuild(&self, luns: Vec<LunIndex>) -> Result<Rebuilt, FsError> {
        let began = self.context.env().now();
        let mut survey = Survey::default();
        for lun in &luns {
            self.objects.survey(*lun, &mut |found| survey.add(found)).await?;
        }
        let mut named: BTreeSet<FdId> = BTreeSet::from([self.root]);
        let mut lost: BTreeSet<FdId> = BTreeSet::new();
        for directory in &survey.directories {
            if !self.note_named_directories(*directory, &mut named).await? {
                lost.insert(directory.fd);
            }
        }
        let mut orphans: BTreeMap<FdId, Vec<Orphan>> = BTreeMap::new();
        for (object, object_type, parent) in survey.children {
            if lost.contains(&parent) || !luns.contains(&parent.lun()) {
                let hint = self.hint_of(object).await;
                if object_type == ObjectType::Directory {
                    named.insert(object.fd);
                }
                orphans.entry(parent).or_default().push(Orphan { object, object_type, hint });
            }
        }
        let unnamed = orphans.keys().filter(|fd| !named.contains(fd)).map(|fd| Dirent {
            name: unnamed(*fd),
            object_type: ObjectType::Directory,
            // What its counter was only its root cell knows.
            child: ObjectRef { fd: *fd, link: Link(0) },
            pending: None,
            leaving: false,
        });
        let unnamed = name_set(unnamed.collect())?;
        let directories = orphans.into_iter().map(|(fd, children)| Ok((fd, names_of(children)?)));
        let directories = directories.collect::<Result<_, FsError>>()?;
        Ok(Rebuilt { luns, began, ended: self.context.env().now(), directories, unnamed })
    }

    /// Notes the directories that a directory names; false when it cannot be read because a LUN is lost.
    async fn note_named_directories(&self, directory: ObjectRef, named: &mut BTreeSet<FdId>) -> Result<bool, FsError> {
        let read = async {
            let object = self.load_directory(directory).await?;
            let image = object.image()?;
            let units = self.units_of(object.fd, &image);
            tree::walk(&units, &image.body.content, 0, |names| {
                let directories = names.entries().iter().filter(|entry| entry.object_type == ObjectType::Directory);
                named.extend(directories.map(|entry| entry.child.fd));
                true
            })
            .await
        };
        match read.await {
            Ok(()) => Ok(true),
            Err(error) if self.context.is_loss(&error) => Ok(false),
            // It went away meanwhile, or is damaged: that is no loss.
            Err(error) if matches!(error.kind(), FsErrorKind::Stale | FsErrorKind::Corrupt) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The last known name of an object; empty when its body cannot be read either.
    async fn hint_of(&self, object: ObjectRef) -> Vec<u8> {
        match self.objects.load(object).await {
            Ok(object) => object.image().body.attributes.name.clone(),
            Err(_) => Vec::new(),
        }
    }

    /// After `error` at a lookup: the object by its rebuilt name, if a loss is the cause. Else, and when it is not found, the error.
    pub(super) async fn lookup_rebuilt(
        &self,
        directory: ObjectRef,
        name: &[u8],
        error: FsError,
    ) -> Result<Stat, FsError> {
        if !self.context.is_loss(&error) {
            return Err(error);
        }
        let index = self.rebuilt().await?;
        if let Some(stat) = self.named_lost_directory(&index, directory, name).await? {
            return Ok(stat);
        }
        let entry = index.directories.get(&directory.fd).and_then(|names| names.get(name));
        if let Some(entry) = entry.filter(|entry| index.directories.contains_key(&entry.child.fd)) {
            return Ok(self.stat_of_lost(entry.child, directory.fd));
        }
        match self.find_rebuilt(&index, directory.fd, name).await? {
            Some((_, child)) => Ok(self.stat_object(child.object())),
            None => self.unnamed_directory(&index, directory.fd, name).ok_or(error),
        }
    }

    /// The child of a lost directory that has this rebuilt name, as its root cell is now.
    pub(super) async fn find_orphan(&self, directory: FdId, name: &[u8]) -> Result<Option<(Dirent, Found)>, FsError> {
        let index = self.rebuilt().await?;
        self.find_rebuilt(&index, directory, name).await
    }

    async fn find_rebuilt(
        &self,
        index: &Rebuilt,
        directory: FdId,
        name: &[u8],
    ) -> Result<Option<(Dirent, Found)>, FsError> {
        let entry = index.directories.get(&directory).and_then(|names| names.get(name)).cloned();
        let Some(entry) = entry else { return Ok(None) };
        let Some(child) = self.believed(entry.child, directory).await? else { return Ok(None) };
        let is_named = child.image()?.root.state == ObjectState::Live;
        Ok(is_named.then_some((entry, child)))
    }

    /// A directory that is lost and that `directory`, which can be read, names.
    async fn named_lost_directory(
        &self,
        index: &Rebuilt,
        directory: ObjectRef,
        name: &[u8],
    ) -> Result<Option<Stat>, FsError> {
        let entry = match self.load_directory(directory).await {
            Ok(found) => self.entry_in(&found, name).await,
            Err(error) => Err(error),
        };
        match entry {
            Ok(Some(entry)) if entry.pending.is_none() && index.directories.contains_key(&entry.child.fd) => {
                Ok(Some(self.stat_of_lost(entry.child, directory.fd)))
            }
            Ok(_) => Ok(None),
            Err(error) if self.context.is_loss(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn unnamed_directory(&self, index: &Rebuilt, directory: FdId, name: &[u8]) -> Option<Stat> {
        let entry = index.unnamed.get(name).filter(|_| directory == self.root)?;
        Some(self.stat_of_lost(entry.child, directory))
    }

    /// A name that the root, which can be read, does not have: it may be that of a lost directory without a name.
    pub(super) async fn lookup_unnamed(&self, directory: FdId, name: &[u8]) -> Result<Option<Stat>, FsError> {
        if directory != self.root || !name.starts_with(UNNAMED) || !self.context.has_loss() {
            return Ok(None);
        }
        Ok(self.unnamed_directory(&*self.rebuilt().await?, directory, name))
    }

    /// After `error` at reading a directory: its entries by rebuilt names, if a loss is the cause.
    pub(super) async fn list_rebuilt(
        &self,
        directory: FdId,
        cookie: u64,
        limit: usize,
        error: FsError,
    ) -> Result<Vec<DirEntry>, FsError> {
        if !self.context.is_loss(&error) {
            return Err(error);
        }
        let index = self.rebuilt().await?;
        let Some(names) = index.directories.get(&directory) else { return Err(error) };
        let mut all: Vec<DirEntry> = names.after(cookie).take(limit).map(shown).collect();
        if directory == self.root {
            merge(&mut all, index.unnamed.after(cookie).take(limit).map(shown).collect(), limit);
        }
        Ok(all)
    }

    /// Adds to entries of the root, which can be read, the lost directories of which nothing has the name.
    pub(super) async fn add_unnamed(
        &self,
        directory: FdId,
        cookie: u64,
        limit: usize,
        listed: &mut Vec<DirEntry>,
    ) -> Result<(), FsError> {
        if directory == self.root && self.context.has_loss() {
            let index = self.rebuilt().await?;
            merge(listed, index.unnamed.after(cookie).take(limit).map(shown).collect(), limit);
        }
        Ok(())
    }

    /// After `error` at reading an object: what is told of a directory that is lost and has children left.
    pub(super) async fn stat_rebuilt(&self, object: ObjectRef, error: FsError) -> Result<Stat, FsError> {
        if !self.context.is_loss(&error) {
            return Err(error);
        }
        if object.fd == self.root || self.rebuilt().await?.directories.contains_key(&object.fd) {
            return Ok(self.stat_of_lost(object, self.root));
        }
        Err(error)
    }

    /// Attributes of a lost directory: those last seen here, or else such that everybody may look into it.
    fn stat_of_lost(&self, object: ObjectRef, parent: FdId) -> Stat {
        if let Some(known) = self.objects.known(object.fd).filter(|known| known.reference().link == object.link) {
            return self.stat_object(&known);
        }
        let attributes = Attributes {
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            blocks: 0,
            accessed_ns: 0,
            modified_ns: 0,
            changed_ns: 0,
            born_ns: 0,
            disk: None,
            name: Vec::new(),
        };
        let flags = ObjectFlags::empty();
        Stat { object, object_type: ObjectType::Directory, flags, attributes, blocks_bytes: 0, parent }
    }

    /// A child of a lost directory has gone elsewhere.
    pub(super) async fn forget_orphan(&self, directory: FdId, name: &[u8]) {
        let mut index = self.rebuilt.lock().await;
        let Some(known) = index.take() else { return };
        let mut directories = known.directories.clone();
        if let Some(names) = directories.get_mut(&directory) {
            names.remove(name);
        }
        let (luns, unnamed) = (known.luns.clone(), known.unnamed.clone());
        *index = Some(Rc::new(Rebuilt { luns, began: known.began, ended: known.ended, directories, unnamed }));
    }
}

/// First bytes of the name of a lost directory that nothing names.
const UNNAMED: &[u8] = b"lost-";

fn unnamed(fd: FdId) -> Vec<u8> {
    [UNNAMED, fd.to_string().as_bytes()].concat()
}

fn shown((cookie, entry): (u64, &Dirent)) -> DirEntry {
    DirEntry { name: entry.name.clone(), object: entry.child, object_type: entry.object_type, cookie }
}

/// Puts `more` in between by their cookies and cuts the list at `limit`. Of two with one cookie the first one stays.
fn merge(listed: &mut Vec<DirEntry>, more: Vec<DirEntry>, limit: usize) {
    listed.extend(more);
    listed.sort_by_key(|entry| entry.cookie);
    listed.dedup_by_key(|entry| entry.cookie);
    listed.truncate(limit);
}

fn name_set(entries: Vec<Dirent>) -> Result<NameSet, FsError> {
    NameSet::new(entries).map_err(|cause| FsError::Corrupt { structure: "rebuilt names".to_owned(), cause })
}

/// The children of one directory under names of which none comes twice.
fn names_of(mut children: Vec<Orphan>) -> Result<NameSet, FsError> {
    children.sort_by_key(|child| child.object.fd);
    let mut taken: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut entries = Vec::with_capacity(children.len());
    for child in children {
        let name = if is_name(&child.hint) { child.hint } else { child.object.fd.to_string().into_bytes() };
        let mut own = name.clone();
        let mut number = 2u32;
        while !taken.insert(own.clone()) {
            let suffix = format!("~{number}").into_bytes();
            own = [&name[..name.len().min(MAX_NAME - suffix.len())], &suffix].concat();
            number += 1;
        }
        entries.push(Dirent {
            name: own,
            object_type: child.object_type,
            child: child.object,
            pending: None,
            leaving: false,
        });
    }
    name_set(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockAddress, BlockNo};

    fn orphan(cell: u16, hint: &[u8]) -> Orphan {
        let container = BlockAddress { lun: LunIndex::new(2).unwrap(), block: BlockNo::new(0).unwrap() };
        let object = ObjectRef { fd: FdId::new(container, cell).unwrap(), link: Link(2) };
        Orphan { object, object_type: ObjectType::File, hint: hint.to_vec() }
    }

    #[test]
    fn children_whose_names_clash_are_numbered_and_those_without_one_have_their_fd() {
        let long = [b'x'; MAX_NAME];
        let hints: [&[u8]; 7] = [b"a", b"a", b"a~2", b"a", b"", &long, &long];
        let children = hints.iter().enumerate().rev().map(|(cell, hint)| orphan(cell as u16, hint)).collect();
        let names = names_of(children).unwrap();
        let mut by_object: Vec<_> =
            names.entries().iter().map(|entry| (entry.child.fd, entry.name.escape_ascii().to_string())).collect();
        by_object.sort();
        let found: Vec<String> = by_object.into_iter().map(|(_, name)| name).collect();
        let cut = format!("{}~2", "x".repeat(MAX_NAME - 2));
        let whole = "x".repeat(MAX_NAME);
        assert_eq!(found, ["a", "a~2", "a~2~2", "a~3", "fd2.0.4", &whole, &cut]);
    }
}
