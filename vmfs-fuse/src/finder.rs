//! Owns: where a mount looks for LUNs that became members after it was mounted.
//! Promises: every candidate is given once, whatever paths lead to it; what the volume uses already is left out; listing blocks no
//! operation. Must not know: how a LUN is recognised.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use vmfs_core::env::LocalFuture;
use vmfs_core::lun::{Lun, OpenLun};
use vmfs_core::volume::{LunFinder, WantedLun};

/// Looks in the places that were named, in those where the volume's LUNs lie, and under the path that the adding host recorded.
pub struct Places {
    /// Mounted read-only.
    pub read_only: bool,
    /// Paths, directories and patterns of `-o watch`.
    pub watched: Vec<PathBuf>,
}

impl LunFinder for Places {
    fn candidates<'a>(&'a self, wanted: &'a WantedLun) -> LocalFuture<'a, Vec<Rc<dyn Lun>>> {
        Box::pin(async move {
            let own: Vec<PathBuf> = wanted.present.iter().map(PathBuf::from).collect();
            let (watched, hint, bytes) = (self.watched.clone(), hint(wanted), wanted.bytes);
            let listed = tokio::task::spawn_blocking(move || list(&watched, &own, hint, bytes)).await;
            let mut paths = listed.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            // A URL that was named is a place too.
            let urls = self.watched.iter().filter(|place| place.to_string_lossy().contains("://"));
            paths.extend(
                urls.filter(|url| !wanted.present.iter().any(|name| Path::new(name) == url.as_path())).cloned(),
            );
            let how = OpenLun { read_only: self.read_only, refuse_busy_device: false };
            let mut luns = Vec::new();
            for path in paths {
                match luns::open_lun_aside(&path.to_string_lossy(), how).await {
                    Ok(lun) => luns.push(lun),
                    Err(error) => tracing::debug!(%error, "no candidate"),
                }
            }
            luns
        })
    }
}

fn hint(wanted: &WantedLun) -> Option<PathBuf> {
    let path = PathBuf::from(String::from_utf8(wanted.identity.bytes().to_vec()).ok()?);
    path.is_absolute().then_some(path)
}

/// What could be a LUN of at least `bytes` bytes, each file or device once, without those that the volume has.
fn list(watched: &[PathBuf], own: &[PathBuf], hint: Option<PathBuf>, bytes: u64) -> Vec<PathBuf> {
    let mut known: BTreeSet<(bool, u64, u64)> =
        own.iter().filter_map(|path| path.metadata().ok()).map(|found| identity(&found)).collect();
    let folders = own.iter().filter_map(|path| path.canonicalize().ok()?.parent().map(Path::to_owned));
    let mut paths: Vec<PathBuf> = hint.into_iter().collect();
    watched.iter().cloned().chain(folders.collect::<BTreeSet<_>>()).for_each(|place| expand(&place, &mut paths));
    paths.retain(|path| {
        let Ok(found) = path.metadata() else { return false };
        let kind = found.file_type();
        let fits = kind.is_block_device() || (kind.is_file() && found.len() >= bytes);
        fits && known.insert(identity(&found))
    });
    paths
}

/// The same for all paths of one file, and for all nodes of one device.
pub fn identity(found: &Metadata) -> (bool, u64, u64) {
    if found.file_type().is_block_device() { (true, found.rdev(), 0) } else { (false, found.dev(), found.ino()) }
}

/// A path, the entries of a directory, or those that match a pattern in the last component.
pub fn expand(place: &Path, paths: &mut Vec<PathBuf>) {
    if place.is_dir() {
        return entries(place, "*", paths);
    }
    match place.file_name().map(|name| name.to_string_lossy()) {
        Some(pattern) if pattern.contains(['*', '?']) => {
            let folder = place.parent().filter(|parent| !parent.as_os_str().is_empty());
            entries(folder.unwrap_or(Path::new(".")), &pattern, paths);
        }
        _ => paths.push(place.to_owned()),
    }
}

fn entries(folder: &Path, pattern: &str, paths: &mut Vec<PathBuf>) {
    // A place that is not there (yet) has no candidates.
    let Ok(listed) = folder.read_dir() else { return };
    let mut found: Vec<PathBuf> = listed
        .filter_map(Result::ok)
        .filter(|entry| matches(pattern.as_bytes(), entry.file_name().as_encoded_bytes()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    paths.append(&mut found);
}

/// Whether a name matches a pattern of `*` (any bytes) and `?` (one byte).
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|skip| matches(rest, &name[skip..])),
        (Some((b'?', rest)), Some((_, left))) => matches(rest, left),
        (Some((one, rest)), Some((other, left))) => one == other && matches(rest, left),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("*", "lun0.img", true),
            ("lun?.img", "lun0.img", true),
            ("lun?.img", "lun10.img", false),
            ("lun*.img", "lun10.img", true),
            ("*.img", "lun0.img.old", false),
            ("lun0.img", "lun0.img", true),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn each_file_is_a_candidate_once_and_own_luns_and_small_files_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let make = |name: &str, bytes: u64| {
            let path = folder.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        };
        let (own, new, _small) = (make("own.img", 100), make("new.img", 100), make("small.img", 99));
        std::os::unix::fs::symlink(&new, folder.path().join("same.img")).unwrap();
        let watched = [folder.path().join("n*.img"), folder.path().to_owned()];
        assert_eq!(list(&watched, &[own], Some(new.clone()), 100), [new]);
    }
}
