//! Owns: the move of an object to another directory.
//! Promises: the change of the child's root cell is the move; before it every host sees the old name, after it the new one.
//! Must not know: the checks of rename(2) beyond those of a move.
//!
//! First the child is read; second a pending entry is committed to the new directory, and to the old one that the child is leaving; third
//! the child's root cell gets the new parent and a new link, and its body the new name as a hint; fourth the old entry goes and the
//! pending one becomes plain. A loss at the third step begins again at the first, and the second is then done again too: a host that
//! cancels the pending entry relies on it (`marks`), and so does one that renames the child within the old directory.
//!
//! Out of a directory that is lost the same move goes without looking at the old entry. Whoever removes the child or moves it changes its
//! root cell first, so only a rename within that directory, by a host that still sees it, can be passed over; its entry is dead then.

use super::image::{Found, Meaning};
use super::names::{Names, Patience, refused};
use super::rename::{Ends, Outcome, Rename, not_known};
use super::tidy::Unfinished;
use super::tree::Edit;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Body;
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::{HoldMode, RootCell};
use crate::object::{Change, Committed, HolderInfo};
use crate::sabotage::{Sabotage, active};
use crate::volume::Renamed;

/// What a move has told the directories, certainly or perhaps, and has to take back when it fails.
#[derive(Default)]
struct Announced {
    /// The pending entry in the new directory.
    pending: Option<Dirent>,
    /// The old entry says that the child is leaving.
    leaving: bool,
}

impl Names {
    pub(super) async fn move_across(
        &self,
        rename: Rename<'_>,
        marked: &mut Option<ObjectRef>,
    ) -> Result<Outcome, FsError> {
        // Both directories are places where a death may leave an entry behind.
        self.objects.space().roots.note(rename.to.fd).await?;
        if let Some(from) = rename.from {
            self.objects.space().roots.note(from.fd).await?;
        }
        let mut patience = self.patience();
        let mut announced = Announced::default();
        let result = self.move_loop(rename, marked, &mut announced, &mut patience).await;
        if result.is_err() {
            if announced.pending.is_some() {
                self.cancel(rename.to, rename.new_name).await;
            }
            if let Some(from) = rename.from
                && announced.leaving
            {
                self.cancel(from, rename.name).await;
            }
        }
        result
    }

    async fn move_loop(
        &self,
        rename: Rename<'_>,
        marked: &mut Option<ObjectRef>,
        announced: &mut Announced,
        patience: &mut Patience,
    ) -> Result<Outcome, FsError> {
        loop {
            if announced.pending.is_some() && !self.own_pending(rename, announced.pending.as_ref()).await? {
                announced.pending = None;
            }
            let Some(ends) = self.ends_of_move(rename, *marked, announced.pending.as_ref(), patience).await? else {
                patience.lost(rename.name).await?;
                continue;
            };
            self.check_move(rename, &ends).await?;
            let target = ends.target.as_ref().map(|target| target.reference());
            if marked.is_some() && *marked != target {
                self.undo_mark(rename, marked, patience).await?;
                continue;
            }
            if let Some(target) = &ends.target
                && !self.mark_target(rename, target, marked, patience).await?
            {
                continue;
            }
            let known = ends.child.image()?;
            let before = ends.child.reference();
            let after = ObjectRef { fd: before.fd, link: known.link().next() };
            let entry = Dirent {
                name: rename.new_name.to_vec(),
                object_type: ends.entry.object_type,
                child: after,
                pending: Some(target),
                leaving: false,
            };
            if !self.insert_pending(rename, &ends, &entry, patience).await? {
                continue;
            }
            announced.pending = Some(entry.clone());
            // Both entries are written after the child was read, in each attempt anew.
            if let Some(from) = rename.from {
                announced.leaving = true;
                if !self.announce_leaving(from, rename.name, before, patience).await? {
                    continue;
                }
            }
            let to = rename.to.fd;
            let root: Box<dyn FnOnce(&mut RootCell)> = Box::new(move |root| root.parent = Some(to));
            let mut body = Body::clone(&known.body);
            body.attributes.name = rename.new_name.to_vec();
            let change = Change { body: Some(body), root: Some(root), relink: true, ..Change::default() };
            match self.objects.commit(&ends.child, &known, change).await? {
                Committed::Done => {}
                // Certain. That the child is where it was to go proves nothing: another host may have given it the same name.
                Committed::Lost => {
                    patience.lost(rename.name).await?;
                    continue;
                }
                Committed::Overtaken => return Err(not_known(rename.name)),
            }
            *marked = None;
            self.complete(rename, &ends, &entry, before, patience).await;
            return Ok(Outcome::Done(Renamed { before, after, replaced: target }));
        }
    }

    /// Both names, where the new one may be this operation's own pending entry.
    async fn ends_of_move(
        &self,
        rename: Rename<'_>,
        marked: Option<ObjectRef>,
        pending: Option<&Dirent>,
        patience: &mut Patience,
    ) -> Result<Option<Ends>, FsError> {
        let Some(own) = pending else {
            return self.ends(rename, marked, patience).await;
        };
        let new = self.resolve(rename.to, rename.new_name).await?;
        let (entry, child, _) = self.old_end(rename, marked, patience).await?;
        super::commit::expect_live(&new.image)?;
        let target = match new.meaning {
            Meaning::Object { entry, child } if entry == *own && own.pending == Some(Some(child.reference())) => {
                Some(child)
            }
            Meaning::Dead(entry) if entry == *own => None,
            _ => return Ok(None),
        };
        Ok(Some(Ends { to: new.image, entry, child, target }))
    }

    /// Whether the new directory still has this operation's pending entry, by its newest image.
    async fn own_pending(&self, rename: Rename<'_>, pending: Option<&Dirent>) -> Result<bool, FsError> {
        self.objects.refresh(rename.to).await?;
        let found = self.resolve(rename.to, rename.new_name).await?;
        Ok(match &found.meaning {
            Meaning::Object { entry, .. } | Meaning::Dead(entry) => Some(entry) == pending,
            Meaning::Nothing => false,
        })
    }

    async fn check_move(&self, rename: Rename<'_>, ends: &Ends) -> Result<(), FsError> {
        if ends.child.is_directory()? {
            let cause = "a directory moves only within its parent; copy it and remove it";
            return Err(refused(FsErrorKind::CrossDirectory, rename.name, cause));
        }
        self.check_target(rename, ends)?;
        let record = &ends.child.image()?.root.lock;
        if record.mode == HoldMode::Free || record.holders.contains(&self.objects.own_holder(ends.child.fd)?) {
            return Ok(());
        }
        let holders = self.objects.who_holds(&ends.child).await?;
        let who = holders.iter().map(HolderInfo::describe).collect::<Vec<_>>().join("; ");
        let cause = format!("it is locked by {who}: it cannot go to another directory now; see vmfs why-locked");
        Err(refused(FsErrorKind::Busy, rename.name, &cause))
    }

    /// Commits the pending entry. No other entry of the directory may name the child under its new link: one move at a time could
    /// be believed twice otherwise. False: look again.
    async fn insert_pending(
        &self,
        rename: Rename<'_>,
        ends: &Ends,
        entry: &Dirent,
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        let rival = |other: &Dirent| other.child == entry.child && other.name != entry.name;
        match self.entry_naming(rename.to, &ends.to, rival).await {
            Ok(None) => {}
            Ok(Some(other)) => {
                if patience.courtesy().await {
                    self.objects.refresh(rename.to).await?;
                } else {
                    self.settle_pending(rename.to, &ends.to, &other, patience).await?;
                }
                return Ok(false);
            }
            Err(error) => {
                self.changed_since(rename.to, &ends.to, error).await?;
                return Ok(false);
            }
        }
        let edits = [Edit::Set(entry.clone())];
        match self.commit_edits(rename.to, &ends.to, &edits, patience).await? {
            Committed::Done => Ok(true),
            Committed::Lost | Committed::Overtaken => {
                patience.lost(rename.new_name).await?;
                // It may have been there: it is looked for, and committed again before the child is changed.
                Ok(false)
            }
        }
    }

    /// Commits to the old directory that the child is about to leave it, by an image in which the old name still means the child.
    /// False: look again.
    async fn announce_leaving(
        &self,
        from: &Found,
        name: &[u8],
        child: ObjectRef,
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        self.objects.refresh(from).await?;
        let found = self.resolve(from, name).await?;
        let entry = match found.meaning {
            Meaning::Object { entry, child: named } if named.reference() == child && entry.pending.is_none() => entry,
            _ => return Ok(false),
        };
        if active(Sabotage::LeavingUnsaid) {
            return Ok(true);
        }
        let edits = [Edit::Set(Dirent { leaving: true, ..entry })];
        if let Committed::Done = self.commit_edits(from, &found.image, &edits, patience).await? {
            return Ok(true);
        }
        patience.lost(name).await?;
        Ok(false)
    }

    /// The object has moved: the old entry goes, the new one becomes plain, what it replaced is freed. Readers need none of it; what
    /// fails is left for later.
    async fn complete(
        &self,
        rename: Rename<'_>,
        ends: &Ends,
        entry: &Dirent,
        before: ObjectRef,
        patience: &mut Patience,
    ) {
        let taken = match rename.from {
            Some(from) => self.replace_entry(from, rename.name, before, None, patience).await,
            None => {
                self.forget_orphan(rename.old.fd, rename.name).await;
                false
            }
        };
        if !taken {
            self.leave_for_later(Unfinished::Entry { directory: rename.old, name: rename.name.to_vec() });
        }
        let plain = Dirent { pending: None, ..entry.clone() };
        let settled = self.replace_entry(rename.to, rename.new_name, entry.child, Some(plain), patience).await;
        if !settled {
            self.leave_for_later(Unfinished::Entry {
                directory: rename.to.reference(),
                name: rename.new_name.to_vec(),
            });
        }
        if let Some(target) = &ends.target {
            if settled {
                self.finish_removal(target.object());
            } else {
                let (parent, child) = (rename.to.reference(), target.reference());
                self.leave_for_later(Unfinished::Mark { parent, child });
            }
        }
    }

    /// Takes the entry that names `child` out, or puts another in its place. True when it is no longer there.
    async fn replace_entry(
        &self,
        directory: &Found,
        name: &[u8],
        child: ObjectRef,
        by: Option<Dirent>,
        patience: &mut Patience,
    ) -> bool {
        loop {
            let Ok(image) = directory.image() else { return true };
            let found = self.entry_naming(directory, &image, |e| e.name == name).await;
            match found {
                Ok(Some(entry)) if entry.child == child && Some(&entry) != by.as_ref() => {}
                Ok(_) => return true,
                Err(error) => {
                    if self.changed_since(directory, &image, error).await.is_err() {
                        return false;
                    }
                    continue;
                }
            }
            let edit = by.clone().map_or_else(|| Edit::Remove(name.to_vec()), Edit::Set);
            match self.commit_edits(directory, &image, &[edit], patience).await {
                Ok(Committed::Done) => return true,
                Ok(Committed::Lost | Committed::Overtaken) => {
                    if patience.lost(name).await.is_err() {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
    }

    /// Takes back what this operation has announced in a directory.
    async fn cancel(&self, directory: &Found, name: &[u8]) {
        if let Err(error) = self.finish_entry(directory, name).await {
            tracing::warn!(name = %super::names::shown(name), %error, "a move that failed is tidied up later");
            self.leave_for_later(Unfinished::Entry { directory: directory.reference(), name: name.to_vec() });
        }
    }
}
