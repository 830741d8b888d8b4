//! Owns: who has a disk, for those who ask, whichever version of NFS its locks are of. Must not know: how locks work.

use std::time::Duration;

use super::mark;
use super::on_server::LockFiles;
use super::protocol::{Holder, LockError, look};
use super::record::Content;
use super::tenure::Timing;
use crate::datastore::{Directory, Found};
use crate::remote::Remote;
use crate::v4;

/// Name of the file that says who has the disk.
pub fn file_of(directory: &Directory, file: &Found) -> String {
    match directory.server() {
        Remote::V3(_) => LockFiles::name_of(file.attributes.fileid),
        Remote::V4(_) => v4::owner_file(file.attributes.fileid),
    }
}

/// Who has the disk now, as far as one look tells: whether he lives takes a second one. `None`: nobody.
///
/// # Errors
/// [`LockError`]: `Version` if the locks of the directory are of another version.
pub async fn who(directory: &Directory, file: &Found) -> Result<Option<(Holder, Content)>, LockError> {
    mark::check(directory.server(), directory.handle()).await?;
    match directory.server() {
        Remote::V3(server) => look(&LockFiles::new(server, *directory.handle()), &file_of(directory, file)).await,
        Remote::V4(server) => v4::look(server, directory.handle(), &file.handle, file.attributes.fileid).await,
    }
}

/// How long a holder is silent before somebody else has the disk.
///
/// # Errors
/// [`LockError::Nfs`]
pub async fn silence(directory: &Directory, file: &Found) -> Result<Duration, LockError> {
    match directory.server() {
        Remote::V3(_) => Ok(Timing::ESX.stale),
        Remote::V4(server) => {
            let failed = |cause| LockError::Nfs { file: file_of(directory, file), cause };
            server.lease(directory.handle()).await.map_err(failed)
        }
    }
}
