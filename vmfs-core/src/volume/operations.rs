//! Owns: operations that take names and file data together: open, create and open, truncate, and freeing what lost its name.
//! Promises: space is freed only after the last close; an operation begun after unmount is refused.
//! Must not know: how either half works.

use std::rc::Rc;
use std::sync::Arc;

use super::types::{NewFile, Stat};
use super::{AttributeChange, Inner};
use crate::context::Member;
use crate::directory::{Created, plain};
use crate::error::{FsError, FsErrorKind};
use crate::file::{OpenFile, OpenMode};
use crate::format::body::Content;
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{HoldMode, ObjectState, ObjectType};
use crate::object::Object;
use crate::recover::{self, Parts};
use crate::units::LunIndex;
use crate::volume::NewObjectSpec;

/// Objects that may wait to be freed before a removal frees some itself.
const MOST_WAITING: usize = 32;

impl Inner {
    /// The volume, unless it is being unmounted.
    pub(super) fn for_reading(&self) -> Result<&Inner, FsError> {
        if self.closing.get() {
            return Err(FsError::refused(FsErrorKind::Io, "the volume is being unmounted"));
        }
        Ok(self)
    }

    /// The volume, unless it is being unmounted, read-only or fenced.
    pub(super) fn for_writing(&self) -> Result<&Inner, FsError> {
        self.for_reading()?;
        if self.info.read_only {
            return Err(FsError::refused(FsErrorKind::ReadOnly, "the volume is mounted read-only"));
        }
        match self.context.fenced() {
            Some(lun) => Err(FsError::Fenced { lun }),
            None => Ok(self),
        }
    }

    /// Adds what an open file has not committed yet.
    pub(super) fn freshen(&self, mut stat: Stat) -> Stat {
        self.files.overlay(stat.object.fd, &mut stat.attributes);
        stat.blocks_bytes = stat.attributes.blocks.saturating_mul(self.info.block_size.bytes());
        stat
    }

    pub(super) async fn set_attributes(&self, what: ObjectRef, change: AttributeChange) -> Result<Stat, FsError> {
        if let Some(size) = change.size {
            self.set_size(what, size).await?;
        }
        let stat = self.names.set_attributes(what, &change).await?;
        if change.modified_ns.is_some() {
            self.files.times_set(what.fd);
        }
        Ok(self.freshen(stat))
    }

    async fn set_size(&self, what: ObjectRef, size: u64) -> Result<(), FsError> {
        let file = self.open_file(what, OpenMode { read: false, write: true, truncate: false }).await?;
        let changed = self.files.set_size(&file, size).await;
        let closed = self.close_file(file).await;
        changed.and(closed)
    }

    pub(super) async fn create_file(
        &self,
        directory: ObjectRef,
        name: &[u8],
        new: NewFile,
        open: Option<OpenMode>,
    ) -> Result<super::Created, FsError> {
        if new.object_type != ObjectType::File {
            let message = format!("a {:?} is not created this way; create a plain file", new.object_type);
            return Err(FsError::refused(FsErrorKind::Invalid, message));
        }
        let content = Content::Inline(Vec::new());
        // A file that is born locked needs no compare-and-write to be opened.
        let lock = open.filter(|mode| mode.write).map(|_| HoldMode::Exclusive);
        let spec = NewObjectSpec { lock, ..plain(ObjectType::File, (new.mode, new.uid, new.gid), content) };
        let (object, is_new) = match self.names.create_or_find(directory, name, spec).await? {
            Created::New(object) => (object, true),
            Created::Existing(object) => (object, false),
        };
        let object_type = object.image().root.object_type;
        if !is_new {
            let (kind, cause) = match object_type {
                _ if new.exclusive => (FsErrorKind::Exists, "the name is taken"),
                Some(ObjectType::Directory) => (FsErrorKind::IsDirectory, "it is a directory"),
                Some(ObjectType::Symlink) => (FsErrorKind::Exists, "it is a symbolic link"),
                _ => (FsErrorKind::Io, ""),
            };
            if kind != FsErrorKind::Io {
                return Err(FsError::refused(kind, format!("\"{}\": {cause}", name.escape_ascii())));
            }
        }
        let file = match open {
            None => None,
            Some(mode) => Some(self.open_created(&object, is_new, mode).await?),
        };
        Ok((self.freshen(self.names.stat_object(&object)), file))
    }

    async fn open_created(&self, object: &Rc<Object>, is_new: bool, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
        if !is_new {
            return self.open_file(object.reference(), mode).await;
        }
        match self.files.open(object, mode).await {
            Ok(file) => Ok(file),
            Err(error) => {
                if object.is_held() {
                    self.objects.unlock(object).await?;
                }
                Err(error)
            }
        }
    }

    pub(super) async fn open_file(&self, what: ObjectRef, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
        let object = self.names.usable(what, mode.write || mode.truncate).await?;
        match object.image().root.object_type {
            Some(ObjectType::Directory) => {
                Err(FsError::refused(FsErrorKind::IsDirectory, format!("{} is a directory", what.fd)))
            }
            Some(ObjectType::Symlink) => {
                Err(FsError::refused(FsErrorKind::Invalid, format!("{} is a symbolic link", what.fd)))
            }
            _ => self.files.open(&object, mode).await,
        }
    }

    pub(super) async fn close_file(&self, file: Arc<OpenFile>) -> Result<(), FsError> {
        let fd = file.fd();
        let closed = self.files.close(file).await;
        if self.names.is_removed(fd) && self.files.opened(fd).is_none() && !self.closing.get() {
            self.reap().await?;
        }
        closed
    }

    /// After a removal: what holds data is freed at once, so that its space can be used; what is small waits for the background,
    /// unless much waits already.
    pub(super) async fn after_removal(&self, removed: Option<ObjectRef>) {
        let Some(removed) = removed else {
            return;
        };
        let holds_data = self.names.removed_blocks(removed.fd) > 0 && self.files.opened(removed.fd).is_none();
        if !holds_data && self.names.removed_count() <= MOST_WAITING {
            self.wake.notify_waiters();
            return;
        }
        // The name is gone: what cannot be freed now is tried again, it is no error of the removal.
        if let Err(error) = self.reap().await
            && let Some(left_out) = self.context.complain("removed objects", None)
        {
            tracing::warn!(%error, left_out, "freeing removed objects is tried again");
        }
    }

    /// Frees the objects that have lost their names and are not open. What fails is kept for the next time.
    pub(super) async fn reap(&self) -> Result<(), FsError> {
        let _one = self.reaping.lock().await;
        let mut result = Ok(());
        for object in self.names.take_removed() {
            // One that lies on a lost LUN holds up none of the others.
            let is_open = self.files.opened(object.fd).is_some() && !self.left.get();
            if is_open || self.context.is_lost(object.lun()) {
                self.names.keep_removed(object);
                continue;
            }
            match self.free(&object).await {
                Ok(()) | Err(FsError::Stale { .. }) => {}
                Err(error) => {
                    self.names.keep_removed(object);
                    result = Err(error);
                }
            }
        }
        result
    }

    /// Decides what becomes of units that other hosts may have dropped, whose marks this host has.
    pub(super) async fn settle_contested(&self) -> Result<(), FsError> {
        recover::settle_contested(&Parts { context: &self.context, objects: &self.objects, names: &self.names }).await
    }

    async fn free(&self, object: &Rc<Object>) -> Result<(), FsError> {
        if !matches!(object.image().root.state, ObjectState::Unlinked(_)) {
            self.objects.mark_unlinked(object).await?;
        }
        self.files.erase(object).await?;
        self.objects.free(object).await?;
        self.files.forget_doubt(object.fd);
        Ok(())
    }

    /// The LUN at hand with the most free space.
    pub(super) fn roomiest_lun(&self) -> Option<LunIndex> {
        let blocks = &self.objects.space().blocks;
        let at_hand = self.context.luns_at_hand();
        let at_hand = at_hand.into_iter().filter(|lun| !self.context.is_draining(*lun));
        at_hand.max_by_key(|lun| (blocks.count(*lun).free, u8::MAX - lun.get()))
    }

    /// This host has lost its slot on a LUN: nothing is written any more, nothing that was remembered is believed.
    pub(super) fn fenced(&self, member: &Member, error: &FsError) {
        self.context.set_fenced(member.index, error);
        self.objects.forget();
        self.names.forget();
        self.warnings.borrow_mut().push(format!("{}: {error}", member.lun.name()));
    }
}
