//! Owns: readdir.
//! Promises: cookies survive changes of the directory: a name that stays is given once, in whatever pieces the caller reads.
//! Must not know: "." and "..", FUSE buffers.

use std::cell::RefCell;
use std::collections::HashSet;

use super::image::{DirectoryUnits, Found, Meaning, UncachedUnits};
use super::name_set::prefix_of_cookie;
use super::names::Names;
use super::tree;
use crate::error::FsError;
use crate::format::body::Content;
use crate::format::dirent::{Dirent, ObjectRef};
use crate::format::table_entry::EntryKind;
use crate::object::{Image, Object};
use crate::units::{FdId, Link, UnitAddress};
use crate::volume::DirEntry;

/// Entries taken from a directory at a time.
const ENTRIES: usize = 1024;

impl Names {
    /// Up to `limit` entries behind `cookie`; fewer only at the end.
    pub async fn read_directory(
        &self,
        directory: ObjectRef,
        cookie: u64,
        limit: usize,
    ) -> Result<Vec<DirEntry>, FsError> {
        match self.list(directory, cookie, limit).await {
            Ok(mut listed) => {
                self.add_unnamed(directory.fd, cookie, limit, &mut listed).await?;
                Ok(listed)
            }
            Err(error) => self.list_rebuilt(directory.fd, cookie, limit, error).await,
        }
    }

    /// All entries of a directory that can be read, whatever stands behind them.
    pub(crate) async fn entries_of(&self, directory: ObjectRef) -> Result<Vec<Dirent>, FsError> {
        let object = self.load_directory(directory).await?;
        let (mut all, mut cookie) = (Vec::new(), 0);
        loop {
            let entries = self.entries_behind(&object, cookie, ENTRIES).await?;
            let ended = entries.len() < ENTRIES;
            for (own, entry) in entries {
                cookie = own;
                all.push(entry);
            }
            if ended {
                return Ok(all);
            }
        }
    }

    /// Whether a directory, whose body can be read, has units on a lost LUN.
    pub(crate) async fn has_lost_unit(&self, directory: &Object, image: &Image) -> Result<bool, FsError> {
        // What was read before the loss says nothing.
        self.cache.borrow_mut().clear();
        let units = self.units_of(directory.fd, image);
        match tree::walk(&units, &image.body.content, 0, |_| true).await {
            Err(error) if self.context.is_loss(&error) => Ok(true),
            // Damage is no loss, and what has changed meanwhile is not known to be one.
            Ok(()) | Err(_) => Ok(false),
        }
    }

    /// Reads every unit of a directory's image anew from its LUNs; gives them, with what they are to it.
    pub(crate) async fn read_past_cache(
        &self,
        fd: FdId,
        link: Link,
        content: &Content,
    ) -> Result<HashSet<(UnitAddress, EntryKind, u32)>, FsError> {
        let units = UncachedUnits { units: DirectoryUnits { names: self, fd, link }, read: RefCell::default() };
        tree::walk(&units, content, 0, |_| true).await?;
        Ok(units.read.into_inner())
    }

    async fn list(&self, directory: ObjectRef, cookie: u64, limit: usize) -> Result<Vec<DirEntry>, FsError> {
        let object = self.load_directory(directory).await?;
        let mut listed = Vec::new();
        let mut cookie = cookie;
        while listed.len() < limit {
            let wanted = limit - listed.len();
            let entries = self.entries_behind(&object, cookie, wanted).await?;
            let ended = entries.len() < wanted;
            for (own, entry) in entries {
                cookie = own;
                listed.extend(self.shown_entry(&object, own, entry).await?);
            }
            if ended {
                break;
            }
        }
        Ok(listed)
    }

    async fn entries_behind(
        &self,
        directory: &Found,
        cookie: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Dirent)>, FsError> {
        loop {
            let image = directory.image()?;
            let units = self.units_of(directory.fd, &image);
            let mut found = Vec::new();
            let walked = tree::walk(&units, &image.body.content, prefix_of_cookie(cookie), |names| {
                let room = limit - found.len();
                found.extend(names.after(cookie).take(room).map(|(own, entry)| (own, entry.clone())));
                found.len() < limit
            })
            .await;
            match walked {
                Ok(()) => return Ok(found),
                Err(error) => self.changed_since(directory, &image, error).await?,
            }
        }
    }

    /// An entry for the caller. Children are not read, but for a pending entry: only the moving child tells whether it is there.
    async fn shown_entry(&self, directory: &Found, cookie: u64, entry: Dirent) -> Result<Option<DirEntry>, FsError> {
        let Dirent { name, object_type, child, pending, .. } = entry;
        if pending.is_none() {
            return Ok(Some(DirEntry { name, object: child, object_type, cookie }));
        }
        Ok(match self.resolve(directory, &name).await?.meaning {
            Meaning::Object { child, .. } => {
                let object_type = child.image()?.root.object_type.unwrap_or(object_type);
                Some(DirEntry { name, object: child.reference(), object_type, cookie })
            }
            _ => None,
        })
    }
}
