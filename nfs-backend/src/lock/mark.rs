//! Owns: the mark of a directory that says by which version of NFS its disks are locked.
//! Promises: of two hosts that come at once with different versions one is refused, whatever is lost or doubled. Must not know: locks.
//!
//! It is a symbolic link: one call makes it together with what it says, and does nothing if there is one.

use super::protocol::LockError;
use crate::error::NfsError;
use crate::nfs3::FileHandle;
use crate::remote::Remote;
use crate::url::Version;

/// Its name.
pub const MARK: &str = ".vmfs-locks";

/// What it says.
const fn target(version: Version) -> &'static str {
    match version {
        Version::V3 => "nfs3",
        Version::V41 => "nfs4.1",
    }
}

fn failed(cause: NfsError) -> LockError {
    LockError::Nfs { file: MARK.to_owned(), cause }
}

/// Whether there is a mark. Another version's is an error.
///
/// # Errors
/// [`LockError`]: `Version` if the other version is in use.
pub(super) async fn check(remote: &Remote, directory: &FileHandle) -> Result<bool, LockError> {
    let wanted = remote.version();
    match remote.link_target(directory, MARK).await.map_err(failed)? {
        None => Ok(false),
        Some(found) if found == target(wanted).as_bytes() => Ok(true),
        Some(found) => {
            let known = [Version::V3, Version::V41].into_iter().find(|known| found == target(*known).as_bytes());
            let found = known.map_or_else(|| String::from_utf8_lossy(&found).into_owned(), |known| known.to_string());
            Err(LockError::Version { found, wanted })
        }
    }
}

/// Makes sure that the directory is marked with the version of `remote`.
///
/// # Errors
/// [`LockError`]: `Version` if the other version is in use.
pub(super) async fn claim(remote: &Remote, directory: &FileHandle) -> Result<(), LockError> {
    const ATTEMPTS: usize = 3;
    for _ in 0..ATTEMPTS {
        if check(remote, directory).await? {
            return Ok(());
        }
        // Whoever's it is now: what counts is what is read.
        remote.make_link(directory, MARK, target(remote.version())).await.map_err(failed)?;
    }
    Err(LockError::Contended)
}
