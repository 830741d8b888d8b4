//! Owns: reading one image of a directory, and believing an entry only as far as the child's root cell agrees.
//! Promises: an answer was true at a moment between the call and the return, whatever other hosts did meanwhile.
//! Must not know: how a directory is changed.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

use super::name_set::NameSet;
use super::names::{Names, refused};
use super::tree::{self, Bucket, Source};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Content;
use crate::format::dirent::{Dirent, ObjectRef, decode_bucket};
use crate::format::root_cell::{ObjectState, ObjectType};
use crate::format::table_entry::EntryKind;
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::format::{CellKind, FormatError};
use crate::object::{Image, Object};
use crate::sabotage::{Sabotage, active};
use crate::units::{FdId, Link, UnitAddress};

/// Units kept: buckets of about 8 KiB, references of 4 KiB.
const CACHED_UNITS: usize = 2048;

/// A unit that was read. It never changes, and its reference (with birth version) never means another one of the same directory.
#[derive(Clone)]
enum CachedUnit {
    Bucket(Rc<Bucket>),
    Inner(Rc<Vec<Option<UnitRef>>>),
}

/// Directory units of the volume, the oldest thrown out first.
#[derive(Default)]
pub struct UnitCache {
    units: HashMap<(FdId, UnitRef), CachedUnit>,
    order: VecDeque<(FdId, UnitRef)>,
}

impl UnitCache {
    fn put(&mut self, key: (FdId, UnitRef), unit: CachedUnit) {
        if self.units.insert(key, unit).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > CACHED_UNITS
            && let Some(oldest) = self.order.pop_front()
        {
            self.units.remove(&oldest);
        }
    }

    /// A bucket that this host has just committed.
    pub(super) fn put_bucket(&mut self, fd: FdId, reference: UnitRef, bucket: Rc<Bucket>) {
        self.put((fd, reference), CachedUnit::Bucket(bucket));
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = UnitCache::default();
    }
}

/// The units of one directory image.
pub(super) struct DirectoryUnits<'a> {
    pub names: &'a Names,
    pub fd: FdId,
    pub link: Link,
}

impl DirectoryUnits<'_> {
    fn cached(&self, reference: &UnitRef) -> Option<CachedUnit> {
        self.names.cache.borrow().units.get(&(self.fd, *reference)).cloned()
    }

    async fn read(&self, reference: &UnitRef, kind: CellKind, index: u32) -> Result<Vec<u8>, FsError> {
        self.names.objects.space().units.read(reference, kind, self.fd, self.link, index).await
    }
}

impl DirectoryUnits<'_> {
    async fn read_bucket(&self, reference: &UnitRef, index: u32) -> Result<Rc<Bucket>, FsError> {
        let stream = self.read(reference, CellKind::Bucket, index).await?;
        let (local_depth, entries) = decode_bucket(&stream).map_err(|cause| self.corrupt(cause))?;
        let names = NameSet::new(entries).map_err(|cause| self.corrupt(cause))?;
        Ok(Rc::new(Bucket { local_depth, names }))
    }

    async fn read_inner(&self, reference: &UnitRef, index: u32) -> Result<Rc<Vec<Option<UnitRef>>>, FsError> {
        let stream = self.read(reference, CellKind::Inner, index).await?;
        let cell = self.names.context.cell_size();
        let refs = (0..1 << crate::format::body::DIRECT_DEPTH)
            .map(|nth| UnitRef::unpack(cell, stream.get(nth * UNIT_REF_BYTES..).unwrap_or(&[])))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|cause| self.corrupt(cause))?;
        Ok(Rc::new(refs))
    }
}

impl Source for DirectoryUnits<'_> {
    async fn bucket(&self, reference: &UnitRef, index: u32) -> Result<Rc<Bucket>, FsError> {
        if let Some(CachedUnit::Bucket(bucket)) = self.cached(reference) {
            return Ok(bucket);
        }
        let bucket = self.read_bucket(reference, index).await?;
        self.names.cache.borrow_mut().put((self.fd, *reference), CachedUnit::Bucket(bucket.clone()));
        Ok(bucket)
    }

    async fn inner(&self, reference: &UnitRef, index: u32) -> Result<Rc<Vec<Option<UnitRef>>>, FsError> {
        if let Some(CachedUnit::Inner(refs)) = self.cached(reference) {
            return Ok(refs);
        }
        let refs = self.read_inner(reference, index).await?;
        self.names.cache.borrow_mut().put((self.fd, *reference), CachedUnit::Inner(refs.clone()));
        Ok(refs)
    }

    fn corrupt(&self, cause: FormatError) -> FsError {
        FsError::Corrupt { structure: format!("directory {}", self.fd), cause }
    }
}

/// The units of one directory image as they are on the LUNs, and which they are.
pub(super) struct UncachedUnits<'a> {
    pub units: DirectoryUnits<'a>,
    pub read: RefCell<HashSet<(UnitAddress, EntryKind, u32)>>,
}

impl UncachedUnits<'_> {
    fn note(&self, reference: &UnitRef, kind: EntryKind, index: u32) -> bool {
        self.read.borrow_mut().insert((reference.at, kind, index))
    }
}

impl Source for UncachedUnits<'_> {
    async fn bucket(&self, reference: &UnitRef, index: u32) -> Result<Rc<Bucket>, FsError> {
        self.note(reference, EntryKind::Bucket, index);
        self.units.read_bucket(reference, index).await
    }

    async fn inner(&self, reference: &UnitRef, index: u32) -> Result<Rc<Vec<Option<UnitRef>>>, FsError> {
        // It is asked for at each bucket below it: read once, then the cache does.
        match self.note(reference, EntryKind::Inner, index) {
            true => self.units.read_inner(reference, index).await,
            false => self.units.inner(reference, index).await,
        }
    }

    fn corrupt(&self, cause: FormatError) -> FsError {
        self.units.corrupt(cause)
    }
}

/// An object under the link by which it was found: it is never taken for another one that gets its identity later.
#[derive(Clone)]
pub(super) struct Found {
    object: Rc<Object>,
    reference: ObjectRef,
}

impl Found {
    /// `object` as `reference`; its image may have moved on already.
    pub fn new(object: Rc<Object>, reference: ObjectRef) -> Found {
        Found { object, reference }
    }

    /// What it was found as.
    pub fn reference(&self) -> ObjectRef {
        self.reference
    }

    /// Its newest image known here; `Stale` when it is gone, has moved or is another object by now.
    pub fn image(&self) -> Result<Rc<Image>, FsError> {
        let image = self.object.image();
        if image.link() == self.reference.link { Ok(image) } else { Err(FsError::Stale { fd: self.reference.fd }) }
    }

    /// Its type, which never changes.
    pub fn is_directory(&self) -> Result<bool, FsError> {
        Ok(self.image()?.root.object_type == Some(ObjectType::Directory))
    }

    /// The object, whatever it is by now.
    pub fn object(&self) -> &Rc<Object> {
        &self.object
    }
}

impl std::ops::Deref for Found {
    type Target = Object;

    fn deref(&self) -> &Object {
        &self.object
    }
}

/// A name as one directory image has it.
pub(super) enum Meaning {
    /// There is no entry.
    Nothing,
    /// An entry that nothing stands behind: a leftover.
    Dead(Dirent),
    /// An object. `entry` may be pending; then the object is either the one that moved here or the one to be replaced.
    Object { entry: Dirent, child: Found },
}

/// What a name meant, and in which image of the directory.
pub(super) struct Resolved {
    pub image: Rc<Image>,
    pub meaning: Meaning,
}

impl Names {
    /// Reads a directory. `NotDirectory`; `Stale` when it is gone.
    pub(super) async fn load_directory(&self, directory: ObjectRef) -> Result<Found, FsError> {
        let object = self.objects.load(directory).await?;
        self.recent.borrow_mut().keep(&object);
        let image = object.image();
        if image.root.object_type != Some(ObjectType::Directory) {
            let message = format!("{} is no directory", directory.fd);
            return Err(FsError::refused(FsErrorKind::NotDirectory, message));
        }
        if matches!(image.root.state, ObjectState::Free | ObjectState::Unlinked(_)) {
            return Err(FsError::Stale { fd: directory.fd });
        }
        Ok(Found::new(object, directory))
    }

    pub(super) fn units_of(&self, fd: FdId, image: &Image) -> DirectoryUnits<'_> {
        DirectoryUnits { names: self, fd, link: image.link() }
    }

    /// The entry of a name in the newest image of the directory, and that image. A unit that fails its checks is believed to be
    /// damaged only if the directory has not changed meanwhile.
    async fn entry_of(&self, directory: &Found, name: &[u8]) -> Result<(Rc<Image>, Option<Dirent>), FsError> {
        loop {
            let image = directory.image()?;
            let units = self.units_of(directory.fd, &image);
            match tree::find(&units, &image.body.content, name).await {
                Ok(entry) => return Ok((image, entry)),
                Err(error) => self.changed_since(directory, &image, error).await?,
            }
        }
    }

    /// The entry of a name in a directory, whatever stands behind it.
    pub(super) async fn entry_in(&self, directory: &Found, name: &[u8]) -> Result<Option<Dirent>, FsError> {
        Ok(self.entry_of(directory, name).await?.1)
    }

    /// After `error` at an image: refreshes; Ok when the directory has changed, so that it is to be read again.
    pub(super) async fn changed_since(&self, directory: &Found, image: &Image, error: FsError) -> Result<(), FsError> {
        if error.kind() != FsErrorKind::Corrupt {
            return Err(error);
        }
        self.objects.refresh(directory).await?;
        if same(&*directory.image()?, image) { Err(error) } else { Ok(()) }
    }

    /// The object that an entry names, if its root cell agrees in parent and link. Reads the root cell.
    pub(super) async fn believed(&self, child: ObjectRef, parent: FdId) -> Result<Option<Found>, FsError> {
        let object = match self.objects.load(child).await {
            Ok(object) => object,
            Err(error) if error.kind() == FsErrorKind::Stale => return Ok(None),
            Err(error) => return Err(error),
        };
        self.recent.borrow_mut().keep(&object);
        let image = object.image();
        let named = image.root.parent == Some(parent)
            && (image.link() == child.link || active(Sabotage::LinkIgnored))
            && !matches!(image.root.state, ObjectState::Free | ObjectState::Unlinked(_));
        Ok(named.then(|| Found::new(object, child)))
    }

    /// What `name` means. `directory` was read by the caller.
    ///
    /// An object is believed from one read of the directory and one of the child. That there is none takes more: neither the
    /// directory nor, for a pending entry, the moving child may have changed between two looks.
    pub(super) async fn resolve(&self, directory: &Found, name: &[u8]) -> Result<Resolved, FsError> {
        loop {
            let (image, entry) = self.entry_of(directory, name).await?;
            let Some(entry) = entry else {
                return Ok(Resolved { image, meaning: Meaning::Nothing });
            };
            if let Some(child) = self.believed(entry.child, directory.fd).await? {
                return Ok(Resolved { image, meaning: Meaning::Object { entry, child } });
            }
            if let Some(Some(replaced)) = entry.pending
                && let Some(child) = self.believed(replaced, directory.fd).await?
            {
                return Ok(Resolved { image, meaning: Meaning::Object { entry, child } });
            }
            let moved = match entry.pending {
                Some(_) => self.believed(entry.child, directory.fd).await?,
                None => None,
            };
            if active(Sabotage::AbsenceBelieved) {
                return Ok(Resolved { image, meaning: Meaning::Dead(entry) });
            }
            self.objects.refresh(directory).await?;
            if !same(&*directory.image()?, &image) {
                continue;
            }
            let meaning = match moved {
                Some(child) => Meaning::Object { entry, child },
                None => Meaning::Dead(entry),
            };
            return Ok(Resolved { image, meaning });
        }
    }

    /// Whether an image of the directory names `child`, and how: its entry.
    pub(super) async fn entry_naming(
        &self,
        directory: &Object,
        image: &Image,
        wanted: impl Fn(&Dirent) -> bool,
    ) -> Result<Option<Dirent>, FsError> {
        let mut found = None;
        let units = self.units_of(directory.fd, image);
        tree::walk(&units, &image.body.content, 0, |names| {
            found = names.entries().iter().find(|entry| wanted(entry)).cloned();
            found.is_none()
        })
        .await?;
        Ok(found)
    }
}

/// Whether two images are of one moment.
pub(super) fn same(a: &Image, b: &Image) -> bool {
    a.cell == b.cell
}

/// The refusal of an operation on an object whose body is no directory's.
pub(super) fn expect_directory(content: &Content, name: &[u8]) -> Result<(), FsError> {
    match content {
        Content::Entries(_) | Content::Buckets { .. } => Ok(()),
        _ => Err(refused(FsErrorKind::NotDirectory, name, "it is no directory")),
    }
}
