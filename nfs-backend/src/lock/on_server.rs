//! Owns: lock files in a directory of a server, as the protocol's store.
//! Promises: each answer is the server's own. Must not know: the protocol.

use super::protocol::{Observed, Store};
use super::tenure::{Moment, boot_time};
use crate::error::{NfsError, Status};
use crate::nfs3::{FileHandle, NewAttributes, Server, Stability, Verifier};

/// Bytes of a lock file that are looked at.
const LOOK: u32 = 128;

/// The lock files of a directory.
pub struct LockFiles<'a> {
    server: &'a Server,
    directory: FileHandle,
}

impl<'a> LockFiles<'a> {
    /// Of this directory.
    pub fn new(server: &'a Server, directory: FileHandle) -> Self {
        Self { server, directory }
    }

    /// The name of a disk's lock file.
    pub fn name_of(fileid: u64) -> String {
        format!(".lck-{fileid:x}")
    }
}

/// BADHANDLE: some servers say it of a file that was removed.
fn is_gone(error: &NfsError) -> bool {
    const BADHANDLE: Status = Status(10001);
    error.is(Status::STALE) || error.is(Status::NOENT) || error.is(BADHANDLE)
}

impl Store for LockFiles<'_> {
    async fn lookup(&self, name: &str) -> Result<Option<Observed>, NfsError> {
        let Some((handle, attributes)) = self.server.lookup(&self.directory, name.as_bytes()).await? else {
            return Ok(None);
        };
        let attributes = match attributes {
            Some(attributes) => attributes,
            None => match self.server.attributes(&handle).await {
                Err(error) if is_gone(&error) => return Ok(None),
                other => other?,
            },
        };
        Ok(Some(Observed { handle, fileid: attributes.fileid }))
    }

    async fn create(&self, name: &str, verifier: Verifier) -> Result<Option<Observed>, NfsError> {
        let Some(handle) = self.server.create_exclusive(&self.directory, name.as_bytes(), verifier).await? else {
            return Ok(None);
        };
        // Everybody may see who holds the lock. A server that does not allow this has given the file some mode.
        let mode = NewAttributes { mode: Some(0o644), size: None };
        let _ = self.server.set_attributes(&handle, mode, None).await;
        match self.server.attributes(&handle).await {
            Err(error) if is_gone(&error) => Ok(None),
            other => Ok(Some(Observed { handle, fileid: other?.fileid })),
        }
    }

    async fn read(&self, file: &FileHandle) -> Result<Option<Vec<u8>>, NfsError> {
        let mut bytes = Vec::new();
        match self.server.read(file, 0, LOOK, |data| bytes.extend_from_slice(data)).await {
            Err(error) if is_gone(&error) => Ok(None),
            other => other.map(|_| Some(bytes)),
        }
    }

    async fn write(&self, file: &FileHandle, bytes: &[u8]) -> Result<bool, NfsError> {
        match self.server.write(file, 0, &mut bytes.to_vec(), Stability::FileSync, (false, false)).await {
            Err(error) if is_gone(&error) => Ok(false),
            Ok(written) if (written.count as usize) < bytes.len() => {
                Err(NfsError::Nonsense { procedure: "WRITE", cause: "a lock record written in part".into() })
            }
            other => other.map(|_| true),
        }
    }

    async fn remove(&self, name: &str, gated: bool) -> Result<(), NfsError> {
        self.server.remove(&self.directory, name.as_bytes(), gated).await.map(drop)
    }

    fn now(&self) -> Moment {
        boot_time()
    }

    fn random(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system gives random numbers");
        bytes
    }

    fn wall_clock(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |now| now.as_secs())
    }
}
