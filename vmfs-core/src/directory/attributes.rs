//! Owns: lookup, attributes, targets of symbolic links.
//! Promises: what is given was true at a moment during the call.
//! Must not know: growth of open files that is not committed yet (`file` does).

use super::image::{Found, Meaning};
use super::names::{Names, check_new_name, not_found};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Body, Content};
use crate::format::dirent::ObjectRef;
use crate::object::{Change, Committed, Object};
use crate::volume::{AttributeChange, Stat};

fn stat_of(object: &Object) -> Stat {
    let image = object.image();
    Stat {
        object: object.reference(),
        object_type: image.root.object_type.unwrap_or(crate::format::root_cell::ObjectType::File),
        flags: image.root.flags,
        attributes: image.body.attributes.clone(),
        blocks_bytes: 0,
        parent: image.root.parent.unwrap_or(object.fd),
    }
}

impl Names {
    /// The object of a name.
    pub async fn lookup(&self, directory: ObjectRef, name: &[u8]) -> Result<Stat, FsError> {
        check_new_name(name)?;
        match self.lookup_in(directory, name).await {
            Ok(stat) => Ok(stat),
            Err(error) if error.kind() == FsErrorKind::NotFound => {
                self.lookup_unnamed(directory.fd, name).await?.ok_or(error)
            }
            Err(error) => self.lookup_rebuilt(directory, name, error).await,
        }
    }

    async fn lookup_in(&self, directory: ObjectRef, name: &[u8]) -> Result<Stat, FsError> {
        let parent = self.load_directory(directory).await?;
        match self.resolve(&parent, name).await?.meaning {
            Meaning::Object { child, .. } => Ok(self.stat_object(child.object())),
            _ => Err(not_found(name)),
        }
    }

    /// Attributes of an object.
    pub async fn stat(&self, object: ObjectRef) -> Result<Stat, FsError> {
        match self.objects.load(object).await {
            Ok(object) => Ok(self.stat_object(&object)),
            Err(error) => self.stat_rebuilt(object, error).await,
        }
    }

    /// What an object is, by its newest image known here.
    pub(crate) fn stat_object(&self, object: &Object) -> Stat {
        let mut stat = stat_of(object);
        stat.blocks_bytes = stat.attributes.blocks.saturating_mul(self.context.block_size().bytes());
        stat
    }

    /// Changes attributes other than the size. `Busy` while another host has the object locked.
    pub async fn set_attributes(&self, what: ObjectRef, change: &AttributeChange) -> Result<Stat, FsError> {
        let object = Found::new(self.objects.load(what).await?, what);
        let mut patience = self.patience();
        loop {
            let image = object.image()?;
            let mut attributes = image.body.attributes.clone();
            attributes.mode = change.mode.map_or(attributes.mode, |mode| mode & 0o7777);
            attributes.uid = change.uid.unwrap_or(attributes.uid);
            attributes.gid = change.gid.unwrap_or(attributes.gid);
            attributes.accessed_ns = change.accessed_ns.unwrap_or(attributes.accessed_ns);
            attributes.modified_ns = change.modified_ns.unwrap_or(attributes.modified_ns);
            if attributes == image.body.attributes {
                return Ok(self.stat_object(&object));
            }
            attributes.changed_ns = self.context.env().wall_ns();
            let body = Some(Body { attributes, content: image.body.content.clone() });
            match self.objects.commit(&object, &image, Change { body, ..Change::default() }).await? {
                Committed::Done => return Ok(self.stat_object(&object)),
                Committed::Lost | Committed::Overtaken => patience.lost(&[]).await?,
            }
        }
    }

    /// Target of a symbolic link.
    pub async fn read_link(&self, what: ObjectRef) -> Result<Vec<u8>, FsError> {
        match &self.objects.load(what).await?.image().body.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => Err(FsError::refused(FsErrorKind::Invalid, format!("{} is no symbolic link", what.fd))),
        }
    }
}
