//! Owns: asking a mounted volume.
//! Promises: a path that is on no mount is refused with a sentence that says so; long work shows a bar.
//! Must not know: what is asked.

use std::path::{Path, PathBuf};

use lockd::client::{DirectErrorKind, MountedDirectory};
use lockd::protocol::{AdminRequest, DiskKind, NameIn};
use serde_json::Value;
use vmfs_core::disk::descriptor::{Descriptor, MAX_DESCRIPTOR_BYTES};

use super::AdminError;
use crate::terminal::progress_bar;

/// A file named to the mount that it lies on.
pub(super) struct NamedFile {
    pub directory: MountedDirectory,
    pub name: NameIn,
}

fn not_mounted(path: &Path) -> AdminError {
    AdminError(format!(
        "{}: this is on no mounted VMFS volume; mount it with mount.vmfs, and give a path below the mount point",
        path.display()
    ))
}

/// The directory and the name of a file on a mount. The file need not exist.
pub(super) fn name(path: &Path) -> Result<NamedFile, AdminError> {
    match MountedDirectory::of_file(path) {
        Ok((directory, name)) => Ok(NamedFile { directory, name }),
        Err(error) if error.kind() == DirectErrorKind::NotVmfs && MountedDirectory::open(path).is_ok() => {
            Err(AdminError(format!("{}: this is the mount point itself; name a file below it", path.display())))
        }
        Err(error) if error.kind() == DirectErrorKind::NotVmfs => Err(not_mounted(path)),
        Err(error) => Err(error.into()),
    }
}

/// A directory on a mount.
pub(super) fn directory(path: &Path) -> Result<MountedDirectory, AdminError> {
    match MountedDirectory::open(path) {
        Ok(directory) => Ok(directory),
        Err(error) if error.kind() == DirectErrorKind::NotVmfs => Err(not_mounted(path)),
        Err(error) => Err(error.into()),
    }
}

/// Asks the mount of `directory` and waits for the answer; `doing` names long work.
pub(super) fn ask(
    directory: &MountedDirectory,
    path: &Path,
    what: AdminRequest,
    doing: &'static str,
) -> Result<Value, AdminError> {
    let takes_space = match &what {
        AdminRequest::DiskCreate { kind, .. } => *kind != DiskKind::Thin,
        AdminRequest::DiskInflate { .. } | AdminRequest::DiskClone { .. } => true,
        _ => false,
    };
    let mut connection = directory.connect()?;
    let mut bar = None;
    let answer = connection.administer(what, &mut |done, total| {
        let bar = bar.get_or_insert_with(|| progress_bar(doing, true));
        bar.set_length(total);
        bar.set_position(done);
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    answer.map_err(|error| {
        let absent = error.raw_os_error() == Some(rustix::io::Errno::NOENT.raw_os_error());
        if absent && path.symlink_metadata().is_err() {
            return AdminError(format!("{}: there is no such file; check the path with ls", path.display()));
        }
        let text = error.to_string();
        // The mount knows names only; the user typed a path.
        let name = path.file_name().map(|name| format!("{:?}: ", name.to_string_lossy())).unwrap_or_default();
        let text = text.strip_prefix(&name).unwrap_or(&text);
        let is_full = error.raw_os_error() == Some(rustix::io::Errno::NOSPC.raw_os_error());
        let hint = match is_full && takes_space {
            true => " (vmfs status shows what is free; a thin disk takes space only when it is written)",
            false => "",
        };
        AdminError(format!("{}: {text}{hint}", path.display()))
    })
}

/// The file that holds the data of `path`: for a disk's descriptor the file that it names, else `path` itself.
pub(super) fn data_file(path: &Path) -> PathBuf {
    let is_descriptor = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vmdk"));
    let small = |length: u64| length <= MAX_DESCRIPTOR_BYTES as u64;
    if !is_descriptor || !path.metadata().is_ok_and(|found| found.is_file() && small(found.len())) {
        return path.to_owned();
    }
    let descriptor = std::fs::read(path).ok().and_then(|bytes| Descriptor::parse(&bytes).ok());
    let flat = descriptor.as_ref().and_then(|descriptor| descriptor.flat_extent());
    flat.map_or_else(|| path.to_owned(), |(name, _)| path.with_file_name(name))
}
