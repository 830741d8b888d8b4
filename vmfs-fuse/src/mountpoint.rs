//! Owns: what a mount point and this machine must be for a mount, and unmounting.
//! Promises: a refusal names the object, the cause and the next step; a mount point that is in use is never forced away.
//! Must not know: volumes.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, UnmountFlags};

/// Checks the mount point and gives its absolute path.
pub fn check(directory: &Path, nonempty: bool) -> Result<PathBuf, String> {
    let shown = directory.display();
    let metadata = fs::metadata(directory).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("the mount point {shown} does not exist: make it with mkdir"),
        io::ErrorKind::NotConnected => {
            format!("at {shown} lies a dead mount: unmount it first with umount -l {shown}")
        }
        _ => format!("the mount point {shown}: {error}"),
    })?;
    if !metadata.is_dir() {
        return Err(format!("the mount point {shown} is not a directory"));
    }
    let absolute = directory.canonicalize().map_err(|error| format!("the mount point {shown}: {error}"))?;
    if let Some(source) = vmfs_at(&absolute).filter(|_| !nonempty) {
        return Err(format!(
            "at the mount point {shown} {source} is mounted already: unmount it first, or choose another directory"
        ));
    }
    let mut entries = fs::read_dir(&absolute).map_err(|error| format!("the mount point {shown}: {error}"))?;
    if !nonempty && entries.next().is_some() {
        return Err(format!(
            "the mount point {shown} is not empty: choose an empty directory, or hide what is there with -o nonempty"
        ));
    }
    Ok(absolute)
}

/// The source of the VMFS volume that is mounted at `directory`, by the mount table.
fn vmfs_at(directory: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    source_at(&table, directory.to_str()?)
}

fn source_at(table: &str, directory: &str) -> Option<String> {
    // The last mount at a directory is the one that is seen.
    table.lines().rev().find_map(|line| {
        let mut words = line.split(' ').map(unescaped);
        let (source, point, kind) = (words.next()?, words.next()?, words.next()?);
        (point == directory && kind == TYPE).then_some(source)
    })
}

/// A word of the mount table: space, tab, newline and backslash are written there as octal numbers (proc(5)).
fn unescaped(word: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(word.to_owned(), |word, (code, character)| word.replace(code, character))
}

/// Checks that this process can use FUSE.
pub fn check_fuse() -> Result<(), String> {
    const DEVICE: &str = "/dev/fuse";
    match File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("{DEVICE} does not exist: load the kernel's module with modprobe fuse"))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "no permission for {DEVICE}: mount as root, or as a user who may open it (and has fusermount3)"
        )),
        Err(error) => Err(format!("{DEVICE} cannot be opened: {error}")),
    }
}

/// The type that the mount table shows.
const TYPE: &str = "fuse.vmfs";

/// What is to be mounted.
pub struct NewMount<'a> {
    /// As the mount table shows it.
    pub source: &'a str,
    /// Mount point.
    pub directory: &'a Path,
    /// Other users may use it.
    pub allow_other: bool,
    /// Flags of mount(2).
    pub flags: MountFlags,
}

/// Mounts by mount(2) and gives the descriptor of the FUSE connection; `None` when only root may do that.
pub fn mount(new: &NewMount<'_>) -> io::Result<Option<OwnedFd>> {
    let device = OwnedFd::from(File::options().read(true).write(true).open("/dev/fuse")?);
    let mode = fs::metadata(new.directory)?.mode() & rustix::fs::FileType::Directory.as_raw_mode();
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let other = if new.allow_other { ",allow_other" } else { "" };
    let data =
        format!("fd={},rootmode={mode:o},user_id={uid},group_id={gid},default_permissions{other}", device.as_raw_fd());
    let data = CString::new(data)?;
    match rustix::mount::mount(new.source, new.directory, TYPE, new.flags, data.as_c_str()) {
        Ok(()) => Ok(Some(device)),
        Err(rustix::io::Errno::PERM) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How an unmount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// The mount is gone.
    Gone,
    /// Programs still have files open: the mount has left the tree and ends with the last of them.
    Detached,
}

/// Unmounts; when it is busy, takes it out of the tree, so that it ends when the last file is closed.
pub fn unmount(directory: &Path) -> io::Result<Unmounted> {
    match rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(Unmounted::Gone),
        Err(rustix::io::Errno::BUSY) => {
            rustix::mount::unmount(directory, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
            Ok(Unmounted::Detached)
        }
        Err(rustix::io::Errno::PERM) => unmount_as_user(directory),
        // It is no mount point any more: somebody else unmounted it.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(Unmounted::Gone),
        Err(error) => Err(error.into()),
    }
}

/// Ends the connection of the mount of `source` at `directory`, if it is there: whoever waits for an answer gets ECONNABORTED, and it
/// leaves the tree, whatever is open on it.
pub fn abort(source: &str, directory: &Path) -> io::Result<()> {
    if vmfs_at(directory).as_deref() != Some(source) {
        return Ok(());
    }
    let flags = UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH;
    match rustix::mount::unmount(directory, flags) {
        Err(rustix::io::Errno::PERM) => unmount_as_user(directory).map(drop),
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn unmount_as_user(directory: &Path) -> io::Result<Unmounted> {
    for (arguments, outcome) in [(&["-u"][..], Unmounted::Gone), (&["-u", "-z"][..], Unmounted::Detached)] {
        let status = Command::new("fusermount3")
            .args(arguments)
            .arg("--")
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if status.success() {
            return Ok(outcome);
        }
    }
    Err(io::Error::other("fusermount3 -u refused it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_of_this_type_is_found_in_the_mount_table() {
        let table = "proc /proc proc rw 0 0\n/a,/b\\040c /m\\040n fuse.vmfs rw 0 0\ntmpfs /t tmpfs rw 0 0\n";
        assert_eq!(source_at(table, "/m n").as_deref(), Some("/a,/b c"));
        assert_eq!((source_at(table, "/t"), source_at(table, "/m")), (None, None));
    }

    #[test]
    fn a_mount_point_is_an_empty_directory() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(check(folder.path(), false).unwrap(), folder.path().canonicalize().unwrap());
        assert!(check(&folder.path().join("nowhere"), false).unwrap_err().contains("mkdir"));
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(check(&file, false).unwrap_err().contains("not a directory"));
        assert!(check(folder.path(), false).unwrap_err().contains("not empty"));
        assert!(check(folder.path(), true).is_ok());
    }
}
