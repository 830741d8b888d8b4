//! Owns: what a repair does with names on a volume that it has mounted for itself.
//! Promises: as every name operation: one commit of one image.
//! Must not know: what was wrong.

use std::rc::Rc;

use super::{Volume, mount};
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{ObjectState, ObjectType};
use crate::gate::GatePage;
use crate::keeper::Embedded;
use crate::lun::Lun;
use crate::object::{Change, Committed};
use crate::slot::HostIdentity;
use crate::units::{FdId, Uuid};
use crate::volume::MountOptions;

/// Changes that lose against somebody else: nobody else is there.
const TRIES: u32 = 4;

/// An object as a repair sees it.
pub(crate) struct ObjectSeen {
    pub reference: ObjectRef,
    pub state: ObjectState,
    pub object_type: ObjectType,
    pub parent: Option<FdId>,
    /// The name hint of its body.
    pub name: Vec<u8>,
}

impl Volume {
    /// Mounts a volume that is being repaired, for the repair alone.
    pub(crate) async fn mount_for_repair(
        luns: Vec<Rc<dyn Lun>>,
        host: Uuid,
        env: Rc<dyn Env>,
    ) -> Result<Volume, FsError> {
        let host = HostIdentity { host, boot: host, name: "fsck.vmfs".to_owned() };
        let options = MountOptions { read_only: false, host, slot_hint: None, degraded: false };
        mount::mount_under_repair(luns, options, env, GatePage::in_process(), Rc::new(Embedded)).await
    }

    /// An object by its identity; `None`: there is none, or it cannot be read.
    pub(crate) async fn object_state(&self, fd: FdId) -> Result<Option<ObjectSeen>, FsError> {
        let object = match self.inner.objects.load_any(fd).await {
            Err(error) if matches!(error.kind(), FsErrorKind::Stale | FsErrorKind::Corrupt) => return Ok(None),
            other => other?,
        };
        let image = object.image();
        let Some(object_type) = image.root.object_type else { return Ok(None) };
        Ok(Some(ObjectSeen {
            reference: object.reference(),
            state: image.root.state,
            object_type,
            parent: image.root.parent,
            name: image.body.attributes.name.clone(),
        }))
    }

    /// A directory that can take names; `None`: it is none.
    pub(crate) async fn reference_of(&self, directory: FdId) -> Result<Option<ObjectRef>, FsError> {
        let found = self.object_state(directory).await?;
        let usable = |seen: &ObjectSeen| {
            seen.object_type == ObjectType::Directory
                && matches!(seen.state, ObjectState::Live | ObjectState::Creating(_))
        };
        Ok(found.filter(usable).map(|seen| seen.reference))
    }

    /// Whether a directory has no entry of a name.
    pub(crate) async fn name_is_free(&self, directory: ObjectRef, name: &[u8]) -> Result<bool, FsError> {
        match self.lookup(directory, name).await {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == FsErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Names an object that nothing names.
    pub(crate) async fn insert_entry(
        &self,
        directory: ObjectRef,
        name: &[u8],
        child: ObjectRef,
        object_type: ObjectType,
    ) -> Result<(), FsError> {
        self.inner.names.insert_entry(directory, name, child, object_type).await
    }

    /// Takes an entry out, whatever it names.
    pub(crate) async fn drop_entry(&self, directory: ObjectRef, name: &[u8]) -> Result<(), FsError> {
        self.inner.names.drop_entry(directory, name).await
    }

    /// Takes leftovers out of a directory.
    pub(crate) async fn tidy_directory(&self, directory: ObjectRef) -> Result<(), FsError> {
        self.inner.names.tidy_directory(directory).await
    }

    /// Gives an object that nothing names another parent; gives what it is called by from now on.
    pub(crate) async fn move_unnamed(&self, what: ObjectRef, parent: ObjectRef) -> Result<ObjectRef, FsError> {
        for _ in 0..TRIES {
            let object = self.inner.objects.load(what).await?;
            let image = object.image();
            let edit = Change {
                root: Some(Box::new(|root| root.parent = Some(parent.fd))),
                relink: true,
                ..Change::default()
            };
            if let Committed::Done = self.inner.objects.commit(&object, &image, edit).await? {
                return Ok(object.reference());
            }
        }
        Err(FsError::refused(FsErrorKind::Busy, format!("{} is changed by somebody else", what.fd)))
    }
}
