//! Owns: the paths under which damage is told.
//! Promises: a path is what directories say now; where they cannot be read, the hint that an object carries.
//! Must not know: what is damaged.

use std::collections::{BTreeMap, BTreeSet};

use super::{Problem, Scrub, ScrubFinding, ScrubReport};
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::ObjectType;
use crate::object::Surveyed;
use crate::units::FdId;

/// Directories above an object.
const DEEPEST: usize = 256;

/// Where objects have their name: directory and name.
type Named = BTreeMap<FdId, (FdId, Vec<u8>)>;

impl Scrub<'_> {
    /// The report, with a path for each finding.
    pub(super) async fn answer(mut self) -> ScrubReport {
        let named = self.names_of_unrooted().await;
        let problems = std::mem::take(&mut self.problems);
        for Problem { structure, at, object, what } in problems {
            let path = match object {
                Some(fd) => self.path_of(fd, &named).await,
                None => None,
            };
            self.report.findings.push(ScrubFinding { structure, at, object, path, what });
        }
        self.report
    }

    /// Objects that cannot say where they are: whoever names them does.
    async fn names_of_unrooted(&self) -> Named {
        let mut named = Named::new();
        if self.unrooted.is_empty() {
            return named;
        }
        let mut directories = Vec::new();
        for lun in self.inner.context.luns_at_hand() {
            let mut note = |found: Surveyed| {
                if found.root.object_type == Some(ObjectType::Directory) {
                    directories.push(ObjectRef { fd: found.fd, link: found.link });
                }
                true
            };
            if let Err(error) = self.inner.objects.survey(lun, &mut note).await {
                tracing::debug!(%lun, %error, "its directories are not looked through for names");
            }
        }
        for directory in directories {
            let Ok(entries) = self.inner.names.entries_of(directory).await else { continue };
            for entry in entries.into_iter().filter(|entry| self.unrooted.contains(&entry.child.fd)) {
                named.insert(entry.child.fd, (directory.fd, entry.name));
            }
        }
        named
    }

    async fn path_of(&self, fd: FdId, named: &Named) -> Option<Vec<u8>> {
        let root = self.inner.info.root.fd;
        let (mut at, mut parts, mut seen) = (fd, Vec::new(), BTreeSet::new());
        while at != root {
            if !seen.insert(at) || parts.len() == DEEPEST {
                return None;
            }
            let (parent, name) = match named.get(&at) {
                Some(named) => named.clone(),
                None => self.name_of(at).await?,
            };
            parts.push(name);
            at = parent;
        }
        parts.push(Vec::new());
        parts.reverse();
        Some(if parts.len() == 1 { b"/".to_vec() } else { parts.join(&b'/') })
    }

    /// An object's directory and its name there.
    async fn name_of(&self, fd: FdId) -> Option<(FdId, Vec<u8>)> {
        let objects = &self.inner.objects;
        let (_, root) = objects.read_root(fd).await.ok()?;
        let parent = root.parent?;
        if let Ok((directory, _)) = objects.read_root(parent).await
            && let Ok(entries) =
                self.inner.names.entries_of(ObjectRef { fd: parent, link: directory.header().link }).await
            && let Some(entry) = entries.into_iter().find(|entry| entry.child.fd == fd)
        {
            return Some((parent, entry.name));
        }
        let hint = objects.load_any(fd).await.ok()?.image().body.attributes.name.clone();
        (!hint.is_empty()).then_some((parent, hint))
    }
}
