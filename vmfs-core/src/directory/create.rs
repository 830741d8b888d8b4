//! Owns: giving a new object a name.
//! Promises: one commit of the directory makes it appear; three round trips when nobody is in the way and the directory is known.
//! Must not know: what is in a file.

use std::rc::Rc;

use super::commit::expect_live;
use super::image::{Found, Meaning, Resolved};
use super::names::{Names, check_new_name, refused};
use super::tidy::Unfinished;
use super::tree::Edit;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Attributes, Body, Content};
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectState, ObjectType};
use crate::object::{Committed, NewObject, Object};
use crate::units::LunIndex;
use crate::volume::{NewObjectSpec, Stat};

/// What a creation that may find the name taken gives.
pub enum Created {
    /// A new object.
    New(Rc<Object>),
    /// The object that had the name already.
    Existing(Rc<Object>),
}

impl Names {
    /// Creates an object; `Exists` when the name is taken.
    pub async fn create(&self, directory: ObjectRef, name: &[u8], spec: NewObjectSpec) -> Result<Stat, FsError> {
        match self.create_or_find(directory, name, spec).await? {
            Created::New(object) => Ok(self.stat_object(&object)),
            Created::Existing(_) => Err(refused(FsErrorKind::Exists, name, "the name is taken")),
        }
    }

    /// Creates an object, or gives the one that has the name.
    pub async fn create_or_find(
        &self,
        directory: ObjectRef,
        name: &[u8],
        spec: NewObjectSpec,
    ) -> Result<Created, FsError> {
        check_new_name(name)?;
        let _guard = self.lock_directories(&[directory.fd]).await;
        let known = match self.objects.known(directory.fd) {
            // What is known of the directory is as good as a look: the commit goes from that image only.
            // But of one on a lost LUN: a child would be made in vain.
            Some(known)
                if known.reference() == directory
                    && is_live_directory(&known)
                    && !self.context.is_lost(directory.fd.lun()) =>
            {
                Found::new(known, directory)
            }
            _ => self.load_directory(directory).await?,
        };
        let mut child: Option<Rc<Object>> = None;
        let mut in_doubt = false;
        let result = self.create_loop(&known, name, &spec, &mut child, &mut in_doubt).await;
        if let Some(child) = child {
            match &result {
                Ok(Created::New(_)) if child.lun() == directory.fd.lun() => {}
                Ok(Created::New(_)) => self.settle_later(child.reference()),
                // The commit may have landed, or may yet: the child's space stays until that is known.
                Err(error) if in_doubt || error.kind() == FsErrorKind::Io => {
                    let child = child.reference();
                    self.leave_for_later(Unfinished::Created { parent: directory, child });
                }
                Ok(Created::Existing(_)) | Err(_) => self.finish_removal(&child),
            }
        }
        result
    }

    /// `in_doubt`: after an error, a commit may have given the child its name.
    async fn create_loop(
        &self,
        directory: &Found,
        name: &[u8],
        spec: &NewObjectSpec,
        child: &mut Option<Rc<Object>>,
        in_doubt: &mut bool,
    ) -> Result<Created, FsError> {
        let mut patience = self.patience();
        let mut fresh = false;
        loop {
            let resolved = self.resolve_for_creation(directory, name, &mut patience).await?;
            if let Meaning::Object { child: found, .. } = resolved.meaning {
                if child.as_ref().is_some_and(|mine| found.reference() == mine.reference()) {
                    return Ok(Created::New(found.object().clone()));
                }
                if fresh {
                    return Ok(Created::Existing(found.object().clone()));
                }
                self.objects.refresh(directory).await?;
                fresh = true;
                continue;
            }
            if let Err(error) = expect_live(&resolved.image) {
                if fresh {
                    return Err(error);
                }
                self.objects.refresh(directory).await?;
                fresh = true;
                continue;
            }
            let object = match child {
                Some(made) => made.clone(),
                None => child.insert(self.make(directory, name, spec).await?).clone(),
            };
            let reference = object.reference();
            let entry = Dirent {
                name: name.to_vec(),
                object_type: spec.object_type,
                child: reference,
                pending: None,
                leaving: false,
            };
            *in_doubt = true;
            match self.commit_edits(directory, &resolved.image, &[Edit::Set(entry)], &patience).await? {
                Committed::Done => return Ok(Created::New(object)),
                Committed::Lost => {}
                Committed::Overtaken => {
                    if self.is_named(directory, reference).await? || self.was_named(&object, reference).await? {
                        return Ok(Created::New(object));
                    }
                }
            }
            *in_doubt = false;
            patience.lost(name).await?;
            fresh = true;
        }
    }

    /// What the name means to one who wants to create it: a removal that is under way still has the name.
    async fn resolve_for_creation(
        &self,
        directory: &Found,
        name: &[u8],
        patience: &mut super::names::Patience,
    ) -> Result<Resolved, FsError> {
        loop {
            let resolved = self.resolve(directory, name).await?;
            match &resolved.meaning {
                Meaning::Dead(entry) if entry.pending.is_some() => {
                    let entry = entry.clone();
                    if patience.courtesy().await {
                        self.objects.refresh(directory).await?;
                    } else {
                        self.settle_pending(directory, &resolved.image, &entry, patience).await?;
                    }
                }
                _ => return Ok(resolved),
            }
        }
    }

    /// Whether a new object that the directory does not name has had its name: whoever moves or removes it changes its root cell first.
    async fn was_named(&self, object: &Rc<Object>, reference: ObjectRef) -> Result<bool, FsError> {
        let own = self.context.own_slot(object.fd.lun())?;
        match self.objects.refresh(object).await {
            Ok(()) if object.reference() == reference && object.image().root.state == ObjectState::Creating(own) => {
                return Ok(false);
            }
            Err(error) if error.kind() != FsErrorKind::Stale => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // It was not a recovery of this incarnation that changed it: this host lives.
        self.context.prove_live([object.fd.lun()]).await?;
        Ok(true)
    }

    /// Whether the directory names an object under any name.
    pub(super) async fn is_named(&self, directory: &Found, object: ObjectRef) -> Result<bool, FsError> {
        loop {
            let image = directory.image()?;
            match self.entry_naming(directory, &image, |entry| entry.child == object).await {
                Ok(entry) => return Ok(entry.is_some()),
                Err(error) => self.changed_since(directory, &image, error).await?,
            }
        }
    }

    async fn make(&self, directory: &Found, name: &[u8], spec: &NewObjectSpec) -> Result<Rc<Object>, FsError> {
        let now = self.context.env().wall_ns();
        let attributes = Attributes {
            mode: spec.mode & 0o7777,
            uid: spec.uid,
            gid: spec.gid,
            size: spec.size,
            blocks: 0,
            accessed_ns: now,
            modified_ns: now,
            changed_ns: now,
            born_ns: now,
            disk: spec.disk,
            name: name.to_vec(),
        };
        let luns = spec.luns.unwrap_or_else(|| self.all_luns());
        let mut refused = None;
        for lun in self.luns_to_try(spec.prefer.unwrap_or(directory.lun()), &luns) {
            let new = NewObject {
                parent: directory.fd,
                object_type: spec.object_type,
                flags: spec.flags,
                luns,
                body: Body { attributes: attributes.clone(), content: spec.content.clone() },
                lock: spec.lock,
                lun,
            };
            match self.objects.create(new).await {
                // Full, or it does not answer: then what the attempt made after all is recovery's.
                Err(error) if matches!(error.kind(), FsErrorKind::NoSpace | FsErrorKind::Io) => {
                    refused = refused.or(Some(error));
                }
                made => return made,
            }
        }
        Err(refused.unwrap_or(FsError::MissingLun { lun: directory.lun() }))
    }

    /// The LUNs on which a new object may be made: the preferred one, then the others, the one with the most free space first. Lost
    /// ones are none of them.
    fn luns_to_try(&self, prefer: LunIndex, allowed: &LunSet) -> Vec<LunIndex> {
        let mut others = self.context.luns_at_hand();
        others.retain(|lun| *lun != prefer && allowed.contains(*lun));
        others.sort_by_key(|lun| std::cmp::Reverse(self.objects.space().blocks.count(*lun).free));
        let prefer = (others.is_empty() || !self.context.is_lost(prefer)).then_some(prefer);
        prefer.into_iter().chain(others).collect()
    }

    /// The LUNs that a new object may use: those at hand. One that is lost now would hold up whoever takes the object's lock over.
    fn all_luns(&self) -> LunSet {
        let mut all = LunSet::default();
        self.context.luns_at_hand().into_iter().for_each(|lun| all.insert(lun));
        all
    }

    /// Creates a directory.
    pub async fn make_directory(
        &self,
        directory: ObjectRef,
        name: &[u8],
        (mode, uid, gid): (u32, u32, u32),
        prefer: Option<LunIndex>,
    ) -> Result<Stat, FsError> {
        let content = Content::Entries(Vec::new());
        self.create(
            directory,
            name,
            NewObjectSpec { prefer, ..plain(ObjectType::Directory, (mode, uid, gid), content) },
        )
        .await
    }

    /// Creates a symbolic link.
    pub async fn symlink(
        &self,
        directory: ObjectRef,
        name: &[u8],
        target: &[u8],
        (uid, gid): (u32, u32),
    ) -> Result<Stat, FsError> {
        if target.is_empty() {
            return Err(refused(FsErrorKind::NotFound, name, "the target of a symbolic link is not empty"));
        }
        if target.len() > MAX_TARGET {
            let cause = format!("the target of a symbolic link has at most {MAX_TARGET} bytes, not {}", target.len());
            return Err(refused(FsErrorKind::NameTooLong, name, &cause));
        }
        if target.contains(&0) {
            return Err(refused(FsErrorKind::Invalid, name, "the target of a symbolic link has no NUL"));
        }
        let size = target.len() as u64;
        let content = Content::Symlink(target.to_vec());
        let spec = NewObjectSpec { size, ..plain(ObjectType::Symlink, (0o777, uid, gid), content) };
        self.create(directory, name, spec).await
    }
}

fn is_live_directory(object: &Object) -> bool {
    let image = object.image();
    image.root.object_type == Some(ObjectType::Directory) && expect_live(&image).is_ok()
}

/// Longest target of a symbolic link (PATH_MAX without its NUL).
const MAX_TARGET: usize = 4095;

/// An object without anything special.
pub(crate) fn plain(object_type: ObjectType, (mode, uid, gid): (u32, u32, u32), content: Content) -> NewObjectSpec {
    NewObjectSpec {
        object_type,
        flags: ObjectFlags::empty(),
        luns: None,
        prefer: None,
        mode,
        uid,
        gid,
        size: 0,
        disk: None,
        content,
        lock: None::<HoldMode>,
    }
}
