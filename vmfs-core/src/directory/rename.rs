//! Owns: rename: the checks of rename(2), and the rename within one directory.
//! Promises: within a directory one commit takes the old name and gives the new one; a replaced object loses its name in the same commit.
//! Must not know: how a move to another directory is done (`moving`).

use std::rc::Rc;

use super::commit::expect_live;
use super::image::{Found, Meaning};
use super::names::{Names, Patience, check_new_name, not_found, refused};
use super::remove::Removal;
use super::tree::Edit;
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::ObjectState;
use crate::object::{Committed, Image};
use crate::sabotage::{Sabotage, active};
use crate::units::FdId;
use crate::volume::{RenameFlags, Renamed};

/// The two names of a rename as they are in one attempt.
pub(super) struct Ends {
    /// Image of the new name's directory.
    pub to: Rc<Image>,
    /// The old entry.
    pub entry: Dirent,
    /// The object that is renamed.
    pub child: Found,
    /// The object that has the new name.
    pub target: Option<Found>,
}

/// Names and directories of a rename.
#[derive(Clone, Copy)]
pub(super) struct Rename<'a> {
    /// The old directory; none: it is lost, and its names are the rebuilt ones.
    pub from: Option<&'a Found>,
    /// What the old directory is called by.
    pub old: ObjectRef,
    pub name: &'a [u8],
    pub to: &'a Found,
    pub new_name: &'a [u8],
    pub no_replace: bool,
    /// The directory to be replaced whose lock is held.
    pub locked: Option<FdId>,
}

/// How an attempt ended.
pub(super) enum Outcome {
    Done(Renamed),
    /// The new name means a directory whose lock is not held.
    LockFirst,
}

impl Names {
    /// Renames an object, to another directory too, replacing what has the new name.
    pub async fn rename(
        &self,
        directory: ObjectRef,
        name: &[u8],
        new_directory: ObjectRef,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<Renamed, FsError> {
        check_new_name(name)?;
        check_new_name(new_name)?;
        if flags.exchange {
            return Err(refused(
                FsErrorKind::Invalid,
                name,
                "two names cannot be exchanged; rename one after the other",
            ));
        }
        loop {
            let replaced = match self.directory_named(new_directory, new_name).await {
                Ok(found) => Some(found.fd),
                Err(error) if matches!(error.kind(), FsErrorKind::NotFound | FsErrorKind::NotDirectory) => None,
                Err(error) => return Err(error),
            };
            let locked: Vec<_> = [directory.fd, new_directory.fd].into_iter().chain(replaced).collect();
            let _guards = self.lock_directories(&locked).await;
            let from = match self.load_directory(directory).await {
                Err(error) if new_directory != directory && self.context.is_loss(&error) => None,
                found => Some(found?),
            };
            let to = match &from {
                Some(from) if new_directory == directory => from.clone(),
                _ => self.load_directory(new_directory).await?,
            };
            let (from, no_replace) = (from.as_ref(), flags.no_replace);
            let rename = Rename { from, old: directory, name, to: &to, new_name, no_replace, locked: replaced };
            let mut marked = None;
            let result = if directory.fd == to.fd {
                self.rename_within(rename, &mut marked).await
            } else {
                self.move_across(rename, &mut marked).await
            };
            if let (Err(_), Some(child)) = (&result, marked) {
                self.take_mark_back(&to, child).await;
            }
            if let Outcome::Done(renamed) = result? {
                return Ok(renamed);
            }
        }
    }

    /// Reads both names. None: something changed in between, look again.
    pub(super) async fn ends(
        &self,
        rename: Rename<'_>,
        marked: Option<ObjectRef>,
        patience: &mut Patience,
    ) -> Result<Option<Ends>, FsError> {
        let new = self.resolve_settled(rename.to, rename.new_name, marked, patience).await?;
        let (entry, child, image) = self.old_end(rename, marked, patience).await?;
        if rename.old.fd == rename.to.fd && !image.is_some_and(|image| Rc::ptr_eq(&image, &new.image)) {
            return Ok(None);
        }
        expect_live(&new.image)?;
        let target = match new.meaning {
            Meaning::Object { child, .. } => Some(child),
            _ => None,
        };
        Ok(Some(Ends { to: new.image, entry, child, target }))
    }

    /// The object that has the old name, and the image of the old directory, if that can be read.
    pub(super) async fn old_end(
        &self,
        rename: Rename<'_>,
        marked: Option<ObjectRef>,
        patience: &mut Patience,
    ) -> Result<(Dirent, Found, Option<Rc<Image>>), FsError> {
        let Some(from) = rename.from else {
            let (entry, child) = self.old_end_of_lost(rename).await?;
            return Ok((entry, child, None));
        };
        let old = self.resolve_settled(from, rename.name, marked, patience).await?;
        let Meaning::Object { entry, child } = old.meaning else {
            return Err(not_found(rename.name));
        };
        expect_live(&old.image)?;
        Ok((entry, child, Some(old.image)))
    }

    /// The same in a lost directory. Whether a removal that was begun there took the name nobody can tell.
    async fn old_end_of_lost(&self, rename: Rename<'_>) -> Result<(Dirent, Found), FsError> {
        let lun = rename.old.fd.lun();
        let Some((entry, child)) = self.find_orphan(rename.old.fd, rename.name).await? else {
            return Err(FsError::MissingLun { lun });
        };
        match child.image()?.root.state {
            ObjectState::Live | ObjectState::Creating(_) => Ok((entry, child)),
            _ => {
                let cause = format!("it was about to be removed, and its directory is lost with {lun}");
                Err(refused(FsErrorKind::Io, rename.name, &cause))
            }
        }
    }

    /// The checks of rename(2) on an object that has the new name.
    pub(super) fn check_target(&self, rename: Rename<'_>, ends: &Ends) -> Result<(), FsError> {
        let Some(target) = &ends.target else {
            return Ok(());
        };
        if rename.no_replace {
            return Err(refused(FsErrorKind::Exists, rename.new_name, "the name is taken"));
        }
        match (ends.child.is_directory()?, target.is_directory()?) {
            (true, false) => {
                let cause = "a directory cannot replace something that is no directory";
                Err(refused(FsErrorKind::NotDirectory, rename.new_name, cause))
            }
            (false, true) => Err(refused(FsErrorKind::IsDirectory, rename.new_name, "it is a directory")),
            _ => Ok(()),
        }
    }

    /// Marks the object that has the new name, unless it is marked. False: look again.
    pub(super) async fn mark_target(
        &self,
        rename: Rename<'_>,
        target: &Found,
        marked: &mut Option<ObjectRef>,
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        if *marked == Some(target.reference()) {
            return Ok(true);
        }
        let removal = if target.is_directory()? { Removal::Directory } else { Removal::File };
        if !self.mark(target, rename.new_name, removal, patience).await? {
            return Ok(false);
        }
        *marked = Some(target.reference());
        Ok(true)
    }

    async fn rename_within(&self, rename: Rename<'_>, marked: &mut Option<ObjectRef>) -> Result<Outcome, FsError> {
        let mut patience = self.patience();
        // What the last attempt wanted to put under the new name, when it is not certain that it was not there.
        let mut doubtful: Option<ObjectRef> = None;
        loop {
            let looked = self.ends(rename, *marked, &mut patience).await;
            if let Some(child) = doubtful.take()
                && let Some(renamed) = self.landed(rename, child, marked).await?
            {
                return Ok(Outcome::Done(renamed));
            }
            let ends = match looked {
                Ok(Some(ends)) => ends,
                Ok(None) => {
                    patience.lost(rename.name).await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let target = ends.target.as_ref().map(|target| target.reference());
            if target == Some(ends.child.reference()) {
                let reference = ends.child.reference();
                return Ok(Outcome::Done(Renamed { before: reference, after: reference, replaced: None }));
            }
            if marked.is_some() && *marked != target {
                self.undo_mark(rename, marked, &mut patience).await?;
                continue;
            }
            self.check_target(rename, &ends)?;
            if let Some(target) = &ends.target {
                if target.is_directory()? && rename.locked != Some(target.fd) {
                    return Ok(Outcome::LockFirst);
                }
                if !self.mark_target(rename, target, marked, &mut patience).await? {
                    continue;
                }
            }
            if !self.stays(rename.to, &ends, &mut patience).await? {
                continue;
            }
            let entry = Dirent { name: rename.new_name.to_vec(), leaving: false, ..ends.entry.clone() };
            let edits = [Edit::Remove(rename.name.to_vec()), Edit::Set(entry)];
            match self.commit_edits(rename.to, &ends.to, &edits, &patience).await? {
                Committed::Done => {
                    let reference = ends.child.reference();
                    self.hint_later(reference, rename.new_name);
                    *marked = None;
                    if let Some(target) = ends.target {
                        self.finish_removal(target.object());
                    }
                    return Ok(Outcome::Done(Renamed { before: reference, after: reference, replaced: target }));
                }
                Committed::Lost => {}
                Committed::Overtaken => doubtful = Some(ends.child.reference()),
            }
            patience.lost(rename.name).await?;
        }
    }

    /// Makes sure that no move which is under way takes the child out of the directory behind this rename's back: a host that moves it is
    /// given time, then its change of the child is made void. The directory was read before. False: look again.
    async fn stays(&self, directory: &Found, ends: &Ends, patience: &mut Patience) -> Result<bool, FsError> {
        if !ends.entry.leaving || active(Sabotage::LeavingIgnored) {
            return Ok(true);
        }
        if patience.courtesy().await {
            self.objects.refresh(directory).await?;
            return Ok(false);
        }
        self.hold_here(&ends.child).await
    }

    /// After a commit that may have been there and is not the newest: whether it was, as far as the names tell.
    async fn landed(
        &self,
        rename: Rename<'_>,
        child: ObjectRef,
        marked: &mut Option<ObjectRef>,
    ) -> Result<Option<Renamed>, FsError> {
        // Where the child is now proves nothing: another host may have given it the same name, or the old one again.
        let Some(mine) = *marked else { return Err(not_known(rename.name)) };
        // Only this commit takes the name of what this operation has marked.
        if self.is_named(rename.to, mine).await? {
            return Ok(None);
        }
        self.decide(rename.to, mine, &mut self.patience()).await?;
        *marked = None;
        self.hint_later(child, rename.new_name);
        Ok(Some(Renamed { before: child, after: child, replaced: Some(mine) }))
    }

    /// Decides the mark on an object that will not be replaced after all.
    pub(super) async fn undo_mark(
        &self,
        rename: Rename<'_>,
        marked: &mut Option<ObjectRef>,
        patience: &mut Patience,
    ) -> Result<(), FsError> {
        if let Some(mine) = *marked {
            self.decide(rename.to, mine, patience).await?;
            *marked = None;
        }
        Ok(())
    }
}

/// After a commit that may have been there and is not the newest, when nothing else tells whether it was.
pub(super) fn not_known(name: &[u8]) -> FsError {
    let cause = "other hosts renamed or removed it at the same time; whether this rename came first is not known";
    refused(FsErrorKind::Io, name, cause)
}
