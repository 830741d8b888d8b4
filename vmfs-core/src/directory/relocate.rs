//! Owns: moving the units of a directory, a symbolic link or a mapping from one LUN to others.
//! Promises: the entries and the attributes stay as they are; each step is one commit, as any change is.
//! Must not know: why the LUN is to be empty.

use std::rc::Rc;

use super::image::Found;
use super::names::Names;
use super::tree::{self, Edit, Source, UnitPlace};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Body, Content};
use crate::format::dirent::Dirent;
use crate::format::root_cell::ObjectType;
use crate::format::table_entry::EntryKind;
use crate::object::{Change, Committed, Image, Object};
use crate::units::{LunIndex, UnitAddress};

/// Commits that are lost to other hosts before that is an error.
const TRIES: u32 = 64;
/// Buckets that are written again with one commit.
const AT_ONCE: usize = 16;

impl Names {
    /// Moves what such an object has on `from`, but its root cell; `units` are those that were found there.
    ///
    /// # Errors
    /// `NoSpace`: the other LUNs are full. `Busy`: another host has it locked.
    pub(crate) async fn relocate(
        &self,
        object: &Rc<Object>,
        from: LunIndex,
        units: &[(UnitAddress, EntryKind, u32)],
    ) -> Result<(), FsError> {
        let places: Vec<(UnitPlace, UnitAddress)> = units
            .iter()
            .filter_map(|(at, kind, index)| match kind {
                EntryKind::Bucket => Some((UnitPlace::Bucket(*index), *at)),
                EntryKind::Inner => Some((UnitPlace::Inner(*index), *at)),
                _ => None,
            })
            .collect();
        for some in places.chunks(AT_ONCE) {
            self.rewrite(object, from, some).await?;
        }
        self.rewrite(object, from, &[]).await
    }

    /// Writes the body again, and the units at these places, if they are still there.
    async fn rewrite(
        &self,
        object: &Rc<Object>,
        from: LunIndex,
        places: &[(UnitPlace, UnitAddress)],
    ) -> Result<(), FsError> {
        let mut full = false;
        for _ in 0..TRIES {
            self.objects.refresh(object).await?;
            let found = Found::new(object.clone(), object.reference());
            let image = found.image()?;
            let edits = match self.entries_there(&found, &image, places).await {
                Ok(edits) => edits,
                Err(error) => {
                    self.changed_since(&found, &image, error).await?;
                    continue;
                }
            };
            if edits.is_empty() && image.root.body.is_none_or(|body| body.at.lun != from) {
                return Ok(());
            }
            if full {
                let message = format!("no room for the metadata of {} on the other LUNs; add an extent", object.fd);
                return Err(FsError::refused(FsErrorKind::NoSpace, message));
            }
            let committed = if image.root.object_type == Some(ObjectType::Directory) && !edits.is_empty() {
                self.commit_same(&found, &image, &edits).await?
            } else {
                let body = Body { attributes: image.body.attributes.clone(), content: image.body.content.clone() };
                self.objects.commit(object, &image, Change { body: Some(body), ..Change::default() }).await?
            };
            full = matches!(committed, Committed::Done) && places.is_empty();
            if matches!(committed, Committed::Done) && !places.is_empty() {
                return Ok(());
            }
        }
        Err(FsError::refused(
            FsErrorKind::Busy,
            format!("{} is changed by other hosts all the time; repeat", object.fd),
        ))
    }

    /// An entry of each unit that is still where it was found: writing that again writes the unit again.
    async fn entries_there(
        &self,
        directory: &Found,
        image: &Rc<Image>,
        places: &[(UnitPlace, UnitAddress)],
    ) -> Result<Vec<Edit>, FsError> {
        let Content::Buckets { .. } = &image.body.content else { return Ok(Vec::new()) };
        let source = self.units_of(directory.fd, image);
        let mut edits: Vec<Edit> = Vec::new();
        for (place, at) in places {
            let Some(reference) = tree::unit_at(&source, &image.body.content, *place).await? else { continue };
            if reference.at != *at {
                continue;
            }
            let entry: Option<Dirent> = match place {
                UnitPlace::Bucket(index) => source.bucket(&reference, *index).await?.names.entries().first().cloned(),
                UnitPlace::Inner(index) => {
                    let mut first = None;
                    tree::walk(&source, &image.body.content, *index as u16, |names| {
                        first = names.entries().first().cloned();
                        first.is_none()
                    })
                    .await?;
                    first
                }
            };
            edits.extend(entry.map(Edit::Set));
        }
        Ok(edits)
    }
}
