//! Owns: deciding the marks that an incarnation which is over has left on objects, when nobody needs the name.
//! Promises: as whoever needs the name would decide it: by the parent's image after a re-stamp.
//! Must not know: how the marks were found.

use std::rc::Rc;

use super::image::Found;
use super::marks::names_object;
use super::names::{Names, Patience};
use super::tree::{self, UnitPlace};
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::ObjectState;
use crate::format::table_entry::EntryKind;
use crate::object::{Committed, Image, Object};
use crate::units::{SlotRef, UnitAddress};

impl Names {
    /// Decides the mark of `dead` on an object: it is live, or its space is to be freed ([`Names::take_removed`]). False: it carried
    /// no such mark any more, or its directory's LUN is away.
    pub async fn settle_mark_of(&self, what: ObjectRef, dead: SlotRef) -> Result<bool, FsError> {
        let mut patience = self.patience();
        match self.settle_loop(what, dead, &mut patience).await {
            Err(error) if error.kind() == FsErrorKind::Stale => Ok(false),
            Err(FsError::MissingLun { .. }) => Ok(false),
            Err(error) if error.kind() == FsErrorKind::Corrupt => self.take_back_creation(what, dead, error).await,
            other => other,
        }
    }

    /// Frees a root cell whose body never came to be: root cell and body of a new object are written at once, and its maker died in
    /// between. `unreadable` stays an error when the object is anything else: one that has a name had its body before.
    async fn take_back_creation(&self, what: ObjectRef, dead: SlotRef, unreadable: FsError) -> Result<bool, FsError> {
        let mut patience = self.patience();
        loop {
            let (cell, root) = self.objects.read_root(what.fd).await?;
            if root.state != ObjectState::Creating(dead) || cell.header().link != what.link {
                return Err(unreadable);
            }
            if let Some(parent) = self.parent_at(root.parent).await? {
                let _guard = self.lock_directories(&[parent.fd]).await;
                if self.names_it(&parent, what, &mut patience).await? {
                    return Err(unreadable);
                }
            }
            if self.objects.free_unnamed(what.fd, &cell, &root).await? {
                return Ok(true);
            }
            patience.lost(b"").await?;
        }
    }

    /// Takes what a move left half done out of a directory: what was announced is settled, entries that nothing stands behind go.
    pub async fn tidy_directory(&self, what: ObjectRef) -> Result<(), FsError> {
        let _guard = self.lock_directories(&[what.fd]).await;
        let directory = match self.load_directory(what).await {
            Err(error) if matches!(error.kind(), FsErrorKind::Stale | FsErrorKind::NotDirectory) => return Ok(()),
            // Its maker has not written its body yet, or died before: nothing was ever moved there.
            Err(error) if error.kind() == FsErrorKind::Corrupt && self.is_unfinished(what).await? => return Ok(()),
            other => other?,
        };
        let entries = loop {
            let image = directory.image()?;
            let source = self.units_of(directory.fd, &image);
            let mut entries = Vec::new();
            let walked = tree::walk(&source, &image.body.content, 0, |names| {
                entries.extend(names.entries().iter().cloned());
                true
            });
            match walked.await {
                Ok(()) => break entries,
                Err(error) => self.changed_since(&directory, &image, error).await?,
            }
        };
        for entry in entries {
            let is_sound = match entry.pending {
                Some(_) => false,
                None => match self.believed(entry.child, directory.fd).await {
                    // What cannot be read now is left as it is.
                    Err(FsError::MissingLun { .. }) => true,
                    other => other?.is_some() && !entry.leaving,
                },
            };
            if !is_sound {
                self.finish_entry(&directory, &entry.name).await?;
            }
        }
        Ok(())
    }

    /// Whether an object is still being created.
    async fn is_unfinished(&self, what: ObjectRef) -> Result<bool, FsError> {
        let (cell, root) = self.objects.read_root(what.fd).await?;
        Ok(cell.header().link == what.link && matches!(root.state, ObjectState::Creating(_)))
    }

    async fn settle_loop(&self, what: ObjectRef, dead: SlotRef, patience: &mut Patience) -> Result<bool, FsError> {
        let mut settled = false;
        loop {
            let object = self.objects.load(what).await?;
            let image = object.image();
            let parent = self.parent_of(&image).await?;
            let _guard = match &parent {
                Some(parent) => self.lock_directories(&[parent.fd]).await,
                None => Vec::new(),
            };
            let named = match (image.root.state, &parent) {
                (ObjectState::Creating(mark), Some(parent)) if mark == dead => {
                    self.names_it(parent, what, patience).await?
                }
                (ObjectState::Unlinking(mark), Some(parent)) if mark == dead => {
                    self.decide_mark(parent, &Found::new(object, what), patience).await?;
                    settled = true;
                    continue;
                }
                (ObjectState::Creating(mark) | ObjectState::Unlinking(mark), None) if mark == dead => false,
                (ObjectState::Unlinked(mark), _) if mark == dead => false,
                _ => return Ok(settled),
            };
            let own = self.context.own_slot(what.fd.lun())?;
            let state = if named { ObjectState::Live } else { ObjectState::Unlinked(own) };
            match self.change_root(&object, &image, |root| root.state = state).await? {
                Committed::Done if named => return Ok(true),
                Committed::Done => {
                    self.finish_removal(&object);
                    return Ok(true);
                }
                Committed::Lost | Committed::Overtaken => patience.lost(b"").await?,
            }
        }
    }

    /// Whether a directory names an object, once nothing older can change that any more.
    async fn names_it(&self, directory: &Found, what: ObjectRef, patience: &mut Patience) -> Result<bool, FsError> {
        while !self.restamp(directory).await? {
            patience.lost(b"").await?;
        }
        loop {
            let image = directory.image()?;
            match self.entry_naming(directory, &image, |entry| names_object(entry, what)).await {
                Ok(entry) => return Ok(entry.is_some()),
                Err(error) => self.changed_since(directory, &image, error).await?,
            }
        }
    }

    /// Whether a directory's image has a unit of this kind and index at this place.
    pub(crate) async fn has_unit(
        &self,
        directory: &Rc<Object>,
        image: &Image,
        kind: EntryKind,
        index: u32,
        at: UnitAddress,
    ) -> Result<bool, FsError> {
        let place = if kind == EntryKind::Bucket { UnitPlace::Bucket(index) } else { UnitPlace::Inner(index) };
        let source = self.units_of(directory.fd, image);
        let found = tree::unit_at(&source, &image.body.content, place).await?;
        Ok(found.is_some_and(|reference| reference.at == at))
    }
}
