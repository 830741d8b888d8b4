//! Owns: taking a name away: unlink and rmdir.
//! Promises: the commit of the directory takes the name; an object is marked before and freed after, never while it has its name.
//! Must not know: how space is freed.

use std::rc::Rc;

use super::commit::expect_live;
use super::image::{Found, Meaning, expect_directory};
use super::marks::Decided;
use super::names::{Names, Patience, check_new_name, not_found, refused};
use super::tidy::Unfinished;
use super::tree::{self, Edit};
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::ObjectType;
use crate::object::{Committed, Image};

/// What may be removed or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removal {
    /// Anything but a directory.
    File,
    /// An empty directory.
    Directory,
}

impl Names {
    /// Removes the name of an object that is no directory.
    pub async fn unlink(&self, directory: ObjectRef, name: &[u8]) -> Result<ObjectRef, FsError> {
        self.remove(directory, name, Removal::File).await
    }

    /// Removes an empty directory.
    pub async fn remove_directory(&self, directory: ObjectRef, name: &[u8]) -> Result<ObjectRef, FsError> {
        self.remove(directory, name, Removal::Directory).await
    }

    async fn remove(&self, directory: ObjectRef, name: &[u8], removal: Removal) -> Result<ObjectRef, FsError> {
        check_new_name(name)?;
        loop {
            let inner = match removal {
                Removal::File => None,
                Removal::Directory => Some(self.directory_named(directory, name).await?.fd),
            };
            let locked: Vec<_> = [directory.fd].into_iter().chain(inner).collect();
            let _guards = self.lock_directories(&locked).await;
            let parent = self.load_directory(directory).await?;
            let mut marked = None;
            let result = self.remove_loop(&parent, name, removal, inner, &mut marked).await;
            if let (Err(_), Some(child)) = (&result, marked) {
                self.take_mark_back(&parent, child).await;
            }
            if let Some(removed) = result? {
                return Ok(removed);
            }
        }
    }

    /// The directory that a name means, for its lock.
    pub(super) async fn directory_named(&self, directory: ObjectRef, name: &[u8]) -> Result<ObjectRef, FsError> {
        let parent = self.load_directory(directory).await?;
        match self.resolve(&parent, name).await?.meaning {
            Meaning::Object { child, .. } => {
                expect_directory(&child.image()?.body.content, name)?;
                Ok(child.reference())
            }
            _ => Err(not_found(name)),
        }
    }

    /// Gives the object removed; none when the name means a directory now whose lock is not held.
    async fn remove_loop(
        &self,
        parent: &Found,
        name: &[u8],
        removal: Removal,
        locked: Option<crate::units::FdId>,
        marked: &mut Option<ObjectRef>,
    ) -> Result<Option<ObjectRef>, FsError> {
        let mut patience = self.patience();
        loop {
            let resolved = self.resolve_settled(parent, name, *marked, &mut patience).await?;
            let found = match resolved.meaning {
                Meaning::Object { child, .. } => Some(child),
                _ => None,
            };
            if let Some(mine) = *marked
                && found.as_ref().map(|child| child.reference()) != Some(mine)
            {
                // The name no longer means what was marked: somebody renamed it, or the commit landed after all.
                *marked = None;
                if self.decide(parent, mine, &mut patience).await? == Decided::Removed {
                    return Ok(Some(mine));
                }
                continue;
            }
            let child = found.ok_or_else(|| not_found(name))?;
            if locked.is_some_and(|fd| fd != child.fd) {
                return Ok(None);
            }
            expect_live(&resolved.image)?;
            if marked.is_none() {
                if !self.mark(&child, name, removal, &mut patience).await? {
                    continue;
                }
                *marked = Some(child.reference());
                // The entry must be found again in an image that is not older than it was: the mark was set after that image was
                // read, which is what the commit rests on.
            }
            let edits = [Edit::Remove(name.to_vec())];
            match self.commit_edits(parent, &resolved.image, &edits, &patience).await? {
                Committed::Done => {
                    let reference = child.reference();
                    *marked = None;
                    self.finish_removal(child.object());
                    return Ok(Some(reference));
                }
                Committed::Lost | Committed::Overtaken => patience.lost(name).await?,
            }
        }
    }

    /// Marks what is to be removed. False: it changed meanwhile, look again.
    pub(super) async fn mark(
        &self,
        child: &Found,
        name: &[u8],
        removal: Removal,
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        let image = child.image()?;
        let is_directory = image.root.object_type == Some(ObjectType::Directory);
        match (removal, is_directory) {
            (Removal::File, true) => return Err(refused(FsErrorKind::IsDirectory, name, "it is a directory")),
            (Removal::Directory, false) => {
                return Err(refused(FsErrorKind::NotDirectory, name, "it is no directory"));
            }
            (Removal::File, false) => {}
            (Removal::Directory, true) => return self.mark_empty(child, name, patience).await,
        }
        self.mark_from(child, &image, name, patience).await
    }

    async fn mark_from(
        &self,
        child: &Found,
        image: &Rc<Image>,
        name: &[u8],
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        let marked = self.objects.begin_unlink(child, Some(image)).await?;
        if !marked {
            patience.lost(name).await?;
        }
        Ok(marked)
    }

    /// Marks a directory from the very image that is empty, after what is left of moves was taken out of it. Its lock is held.
    async fn mark_empty(&self, child: &Found, name: &[u8], patience: &mut Patience) -> Result<bool, FsError> {
        loop {
            let image = child.image()?;
            expect_live(&image)?;
            if tree::is_empty(&image.body.content) {
                return self.mark_from(child, &image, name, patience).await;
            }
            let entry = match self.entry_naming(child, &image, |_| true).await {
                Ok(entry) => entry,
                Err(error) => {
                    self.changed_since(child, &image, error).await?;
                    continue;
                }
            };
            let Some(entry) = entry else { continue };
            self.take_out_leftover(child, &entry, name, patience).await?;
        }
    }

    /// Takes an entry of a directory that is to be removed out of it, if nothing stands behind it; `NotEmpty` if something does.
    async fn take_out_leftover(
        &self,
        directory: &Found,
        entry: &Dirent,
        name: &[u8],
        patience: &mut Patience,
    ) -> Result<(), FsError> {
        let resolved = self.resolve(directory, &entry.name).await?;
        match resolved.meaning {
            Meaning::Nothing => Ok(()),
            Meaning::Object { .. } => Err(refused(FsErrorKind::NotEmpty, name, "the directory is not empty")),
            Meaning::Dead(entry) if entry.pending.is_some() => {
                self.settle_pending(directory, &resolved.image, &entry, patience).await
            }
            Meaning::Dead(entry) => {
                let edits = [Edit::Remove(entry.name)];
                if !matches!(self.commit_edits(directory, &resolved.image, &edits, patience).await?, Committed::Done) {
                    patience.lost(name).await?;
                }
                Ok(())
            }
        }
    }

    /// Decides the mark of an operation that failed; later, if that fails too.
    pub(super) async fn take_mark_back(&self, directory: &Found, child: ObjectRef) {
        if let Err(error) = self.decide(directory, child, &mut self.patience()).await {
            tracing::warn!(object = %child.fd, %error, "the mark of a removal that failed is taken back later");
            self.leave_for_later(Unfinished::Mark { parent: directory.reference(), child });
        }
    }

    /// Decides this operation's own mark after the name turned out to mean something else.
    pub(super) async fn decide(
        &self,
        directory: &Found,
        marked: ObjectRef,
        patience: &mut Patience,
    ) -> Result<Decided, FsError> {
        match self.objects.load(marked).await {
            Ok(child) => self.decide_mark(directory, &Found::new(child, marked), patience).await,
            Err(error) if error.kind() == FsErrorKind::Stale => {
                // Nobody takes over the mark of a host that lives: this removal was the one.
                self.context.prove_live([marked.fd.lun()]).await?;
                Ok(Decided::Removed)
            }
            Err(error) => Err(error),
        }
    }
}
