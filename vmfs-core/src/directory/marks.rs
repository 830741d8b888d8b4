//! Owns: what a removal or a move left half done: marks on objects, pending entries, and how they are finished or undone.
//! Promises: whatever was cut off is decided once and for all by one image; a host that only sleeps finds that it has lost.
//! Must not know: which operation needs the name.
//!
//! Two orders carry the proofs (rule R1):
//! - A mark is decided by: take it over, re-stamp the directory, look for the name in that image. A removal that was cut off
//!   cannot land in the directory afterwards.
//! - A pending entry is decided by: read the directory, re-stamp the moving child, look at it, change the directory from the image
//!   that was read. A mover reads the child, then changes the directory, then the child; after a loss it changes the directory again.
//!   So either its change of the child is dead, or the directory is no longer the image that was read.
//! - So is the entry that the mover leaves, when a rename takes it: the mover has changed that directory too, after it read the child.

use std::rc::Rc;

use super::image::{Found, Meaning, Resolved};
use super::names::{Names, Patience, refused};
use super::tidy::Unfinished;
use super::tree::Edit;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Content;
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::layout::heartbeat_cell;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::object::{Change, Committed, Image, Object};
use crate::sabotage::{Sabotage, active};
use crate::slot;
use crate::units::{FdId, LunIndex, SlotRef};

/// Whose mark it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarkOwner {
    /// This incarnation. Under the directory's lock: left by an operation that failed.
    Own,
    /// A host that lives, as far as its slot says.
    LivingHost,
    /// An incarnation that is over.
    Nobody,
}

/// What became of a marked object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decided {
    /// It has its name and is live again.
    Restored,
    /// Its name is gone; its space is being freed.
    Removed,
    /// It is no longer the object that was marked.
    Other,
}

impl Names {
    /// Whose mark `mark` on LUN `lun` is. Reads the slot.
    pub(super) async fn mark_owner(&self, lun: LunIndex, mark: SlotRef) -> Result<MarkOwner, FsError> {
        if self.context.own_slot(lun)? == mark {
            return Ok(MarkOwner::Own);
        }
        let cell = self.context.read_cell(heartbeat_cell(lun, mark.slot)).await?;
        let live = slot::decode(&cell)?.is_live(mark.generation);
        Ok(if live && !active(Sabotage::LivingMarkDecided) { MarkOwner::LivingHost } else { MarkOwner::Nobody })
    }

    /// A change of the root cell alone, from exactly `image`.
    pub(super) async fn change_root(
        &self,
        object: &Object,
        image: &Rc<Image>,
        change: impl FnOnce(&mut RootCell),
    ) -> Result<Committed, FsError> {
        self.objects.commit(object, image, Change { root: Some(Box::new(change)), ..Change::default() }).await
    }

    /// Makes every older compare-and-write on its way to the object's root cell void, and changes nothing: one that is being created
    /// stays so, since nothing tells here whether it has a name. False: somebody else changed it first, which does the same, and the
    /// object was refreshed.
    pub(super) async fn restamp(&self, object: &Object) -> Result<bool, FsError> {
        if active(Sabotage::RecoveryWithoutRestamp) {
            return self.objects.refresh(object).await.map(|()| true);
        }
        let image = object.image();
        let state = image.root.state;
        Ok(matches!(self.change_root(object, &image, |root| root.state = state).await?, Committed::Done))
    }

    /// The directory that a root cell gives as its object's parent, whatever its link is.
    pub(super) async fn parent_of(&self, image: &Image) -> Result<Option<Found>, FsError> {
        self.parent_at(image.root.parent).await
    }

    /// The directory of this identity, if it is one.
    pub(super) async fn parent_at(&self, parent: Option<FdId>) -> Result<Option<Found>, FsError> {
        match parent {
            None => Ok(None),
            Some(fd) => match self.objects.load_any(fd).await {
                Ok(parent) if is_directory(&parent) => {
                    let reference = parent.reference();
                    Ok(Some(Found::new(parent, reference)))
                }
                Ok(_) => Ok(None),
                Err(error) if error.kind() == FsErrorKind::Stale => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// Makes sure that `child` carries no removal's mark, so that it can be locked, moved or marked: decides the mark of an
    /// incarnation that is over, waits for a living host. Ok(false): something was decided or waited for, look again.
    pub(super) async fn unmarked(
        &self,
        directory: &Found,
        child: &Found,
        name: &[u8],
        patience: &mut Patience,
    ) -> Result<bool, FsError> {
        let ObjectState::Unlinking(mark) = child.image()?.root.state else {
            return Ok(true);
        };
        match self.mark_owner(child.fd.lun(), mark).await? {
            MarkOwner::Own | MarkOwner::Nobody => {
                self.decide_mark(directory, child, patience).await?;
            }
            MarkOwner::LivingHost => {
                if !patience.courtesy().await {
                    return Err(refused(FsErrorKind::Busy, name, "another host is about to remove it; try again"));
                }
            }
        }
        Ok(false)
    }

    /// Decides a mark `unlinking` that is this host's own or of an incarnation that is over.
    pub(super) async fn decide_mark(
        &self,
        directory: &Found,
        child: &Found,
        patience: &mut Patience,
    ) -> Result<Decided, FsError> {
        let what = child.reference();
        loop {
            let image = child.image()?;
            let ObjectState::Unlinking(mark) = image.root.state else {
                return Ok(Decided::Restored);
            };
            if image.root.parent != Some(directory.fd) {
                return Ok(Decided::Other);
            }
            let own = self.context.own_slot(child.fd.lun())?;
            if mark != own {
                if self.mark_owner(child.fd.lun(), mark).await? == MarkOwner::LivingHost {
                    return Ok(Decided::Other);
                }
                self.objects.space().roots.note(child.fd).await?;
                let taken = self.change_root(child, &image, |root| root.state = ObjectState::Unlinking(own)).await?;
                if !matches!(taken, Committed::Done) {
                    patience.lost(b"").await?;
                }
                continue;
            }
            if !self.restamp(directory).await? {
                patience.lost(b"").await?;
                continue;
            }
            let now = directory.image()?;
            match self.entry_naming(directory, &now, |entry| names_object(entry, what)).await {
                Err(error) => self.changed_since(directory, &now, error).await?,
                Ok(Some(entry)) if entry.pending.is_some() => {
                    self.settle_pending(directory, &now, &entry, patience).await?;
                }
                Ok(Some(_)) => {
                    let image = child.image()?;
                    let restored = self.change_root(child, &image, |root| root.state = ObjectState::Live).await?;
                    if !matches!(restored, Committed::Done) {
                        patience.lost(b"").await?;
                    }
                }
                Ok(None) => {
                    self.finish_removal(child.object());
                    return Ok(Decided::Removed);
                }
            }
        }
    }

    /// Settles a pending entry that was found in `image`: the child has moved, and the entry becomes plain; or it has not and never
    /// will by what is on its way now, and the entry goes, or becomes the one that it was to replace. Losing is no error: look again.
    pub(super) async fn settle_pending(
        &self,
        directory: &Found,
        image: &Rc<Image>,
        entry: &Dirent,
        patience: &mut Patience,
    ) -> Result<(), FsError> {
        let Some(replaced) = entry.pending else {
            return Ok(());
        };
        let child = match self.objects.load_any(entry.child.fd).await {
            Ok(child) => Some(child),
            Err(error) if error.kind() == FsErrorKind::Stale => None,
            Err(error) => return Err(error),
        };
        let moved = match child {
            None => false,
            Some(child) => {
                if child.image().link() < entry.child.link {
                    while !self.restamp(&child).await? {
                        patience.lost(&entry.name).await?;
                    }
                }
                has_moved(&child, entry, directory.fd)
            }
        };
        let edit = if moved {
            Edit::Set(Dirent { pending: None, ..entry.clone() })
        } else {
            match replaced {
                None => Edit::Remove(entry.name.clone()),
                Some(replaced) => match self.believed(replaced, directory.fd).await? {
                    None => Edit::Remove(entry.name.clone()),
                    Some(object) => Edit::Set(Dirent {
                        name: entry.name.clone(),
                        object_type: object.image()?.root.object_type.unwrap_or(entry.object_type),
                        child: replaced,
                        pending: None,
                        leaving: false,
                    }),
                },
            }
        };
        let committed = self.commit_edits(directory, image, &[edit], patience).await?;
        if matches!(committed, Committed::Done)
            && let Some(replaced) = replaced
        {
            // Its mark, if it is ours to decide, is decided by whoever needs it or by the tidying: it has lost or kept its name now.
            self.leave_for_later(Unfinished::Mark { parent: directory.reference(), child: replaced });
        }
        Ok(())
    }

    /// Makes void every move of `child` that began before its directory was read last. False: its root cell has changed since it was
    /// found; it may have moved.
    pub(super) async fn hold_here(&self, child: &Found) -> Result<bool, FsError> {
        child.image()?;
        self.restamp(child).await
    }

    /// Takes the announcement of a move off an entry that was found in `image`, if the child is still there. Losing is no error: look
    /// again.
    pub(super) async fn settle_leaving(
        &self,
        directory: &Found,
        image: &Rc<Image>,
        entry: &Dirent,
        child: &Found,
        patience: &Patience,
    ) -> Result<(), FsError> {
        if self.hold_here(child).await? {
            let edits = [Edit::Set(Dirent { leaving: false, ..entry.clone() })];
            let _ = self.commit_edits(directory, image, &edits, patience).await?;
        }
        Ok(())
    }

    /// Resolves a name for a change of it: pending entries are settled first (other living hosts' after waiting for them), so that
    /// the entry is plain, and the object carries no mark but `marked`, this operation's own.
    pub(super) async fn resolve_settled(
        &self,
        directory: &Found,
        name: &[u8],
        marked: Option<ObjectRef>,
        patience: &mut Patience,
    ) -> Result<Resolved, FsError> {
        loop {
            let resolved = self.resolve(directory, name).await?;
            let pending = match &resolved.meaning {
                Meaning::Object { entry, .. } | Meaning::Dead(entry) if entry.pending.is_some() => Some(entry.clone()),
                _ => None,
            };
            if let Some(entry) = pending {
                if patience.courtesy().await {
                    self.objects.refresh(directory).await?;
                } else {
                    expect_not_removed(&resolved.image)?;
                    self.settle_pending(directory, &resolved.image, &entry, patience).await?;
                }
                continue;
            }
            if let Meaning::Object { child, .. } = &resolved.meaning
                && Some(child.reference()) != marked
                && !self.unmarked(directory, child, name, patience).await?
            {
                self.objects.refresh(directory).await?;
                continue;
            }
            return Ok(resolved);
        }
    }

    /// The name is gone for certain, or never was: the object's space is to be freed at its last close.
    pub(super) fn finish_removal(&self, object: &Rc<Object>) {
        let mut removed = self.removed.borrow_mut();
        if !removed.iter().any(|known| known.fd == object.fd) {
            removed.push(object.clone());
        }
    }

    /// Takes the objects that have lost their names: the caller frees their space, each at its last close, or gives it back to
    /// [`Names::keep_removed`].
    pub fn take_removed(&self) -> Vec<Rc<Object>> {
        std::mem::take(&mut *self.removed.borrow_mut())
    }

    /// An object of [`Names::take_removed`] that could not be freed yet.
    pub fn keep_removed(&self, object: Rc<Object>) {
        self.finish_removal(&object);
    }

    /// Objects that wait to be freed.
    pub fn removed_count(&self) -> usize {
        self.removed.borrow().len()
    }

    /// Whether an object has lost its name and waits to be freed.
    pub fn is_removed(&self, fd: FdId) -> bool {
        self.removed.borrow().iter().any(|object| object.fd == fd)
    }

    /// Data blocks of an object that waits to be freed.
    pub fn removed_blocks(&self, fd: FdId) -> u64 {
        let removed = self.removed.borrow();
        removed.iter().find(|object| object.fd == fd).map_or(0, |object| object.image().body.attributes.blocks)
    }

    /// An object that can be opened: it has a name, as far as living hosts say. A mark of an incarnation that is over is decided
    /// here. One that another host is about to remove, or died removing, can be read until its name is gone; to write, `Busy`.
    /// `Stale` when it is gone.
    pub async fn usable(&self, what: ObjectRef, write: bool) -> Result<Rc<Object>, FsError> {
        let mut patience = self.patience();
        loop {
            let object = self.objects.load(what).await?;
            let image = object.image();
            let ObjectState::Unlinking(mark) = image.root.state else {
                return Ok(object);
            };
            if self.context.is_read_only() {
                return Ok(object);
            }
            match self.mark_owner(what.fd.lun(), mark).await? {
                MarkOwner::Own => return Err(FsError::Stale { fd: what.fd }),
                MarkOwner::LivingHost if !write => return Ok(object),
                MarkOwner::LivingHost => {
                    if !patience.courtesy().await {
                        let message =
                            format!("{}: another host is about to remove it; try again, or see vmfs status", what.fd);
                        return Err(FsError::refused(FsErrorKind::Busy, message));
                    }
                }
                MarkOwner::Nobody => {
                    let Some(parent) = self.parent_of(&image).await? else {
                        return Err(FsError::Stale { fd: what.fd });
                    };
                    let _guard = self.lock_directories(&[parent.fd]).await;
                    self.decide_mark(&parent, &Found::new(object, what), &mut patience).await?;
                }
            }
        }
    }

    /// Forgets everything: this host was fenced.
    pub fn forget(&self) {
        self.cache.borrow_mut().clear();
        self.unfinished.borrow_mut().clear();
        self.removed.borrow_mut().clear();
        self.recent.borrow_mut().clear();
    }
}

/// Whether the child of a pending entry is where the entry says.
fn has_moved(child: &Object, entry: &Dirent, directory: FdId) -> bool {
    let image = child.image();
    image.link() == entry.child.link
        && image.root.parent == Some(directory)
        && !matches!(image.root.state, ObjectState::Free | ObjectState::Unlinked(_))
}

/// Whether an entry names this very object, also as the one that it replaces.
pub(super) fn names_object(entry: &Dirent, object: ObjectRef) -> bool {
    entry.child == object || entry.pending == Some(Some(object))
}

fn is_directory(object: &Object) -> bool {
    matches!(object.image().body.content, Content::Entries(_) | Content::Buckets { .. })
}

/// The directory itself must not be on its way out.
pub(super) fn expect_not_removed(image: &Image) -> Result<(), FsError> {
    super::commit::expect_live(image)
}
