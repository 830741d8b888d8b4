//! Owns: a server of either version, as datastores use it: the same calls, the same answers.
//! Promises: nothing of its own. Must not know: how a call is made.

use scsi::DataBuffer;

use crate::error::NfsError;
use crate::nfs3::{Attributes, Committed, FileHandle, FsInfo, FsStat, Stability, Written};
use crate::rpc::Client;
use crate::url::Version;
use crate::{nfs3, v4};

/// A server.
pub enum Remote {
    /// By NFSv3.
    V3(nfs3::Server),
    /// By NFSv4.1.
    V4(v4::Server),
}

macro_rules! either {
    ($remote:expr, $server:ident => $call:expr) => {
        match $remote {
            Remote::V3($server) => $call,
            Remote::V4($server) => $call,
        }
    };
}

impl Remote {
    /// The version.
    pub fn version(&self) -> Version {
        match self {
            Remote::V3(_) => Version::V3,
            Remote::V4(_) => Version::V41,
        }
    }

    /// The client.
    pub fn client(&self) -> &Client {
        either!(self, server => server.client())
    }

    /// Attributes of a file.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn attributes(&self, file: &FileHandle) -> Result<Attributes, NfsError> {
        either!(self, server => server.attributes(file).await)
    }

    /// The file of a name; `None` if there is none.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn lookup(
        &self,
        directory: &FileHandle,
        name: &[u8],
    ) -> Result<Option<(FileHandle, Option<Attributes>)>, NfsError> {
        either!(self, server => server.lookup(directory, name).await)
    }

    /// Reads at most `length` bytes at `position` and hands them to `sink`. Gives their number, and whether the file ends there.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn read(
        &self,
        file: &FileHandle,
        position: u64,
        length: u32,
        sink: impl FnOnce(&[u8]),
    ) -> Result<(u32, bool), NfsError> {
        either!(self, server => server.read(file, position, length, sink).await)
    }

    /// Reads at most as many bytes at `position` as `buffer` holds, into it: by NFSv3 straight, by NFSv4.1 with a copy. Gives their number, and
    /// whether the file ends there.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn read_to(
        &self,
        file: &FileHandle,
        position: u64,
        buffer: &DataBuffer,
    ) -> Result<(u32, bool), NfsError> {
        match self {
            Remote::V3(server) => server.read_to(file, position, buffer).await,
            Remote::V4(server) => {
                let sink = |data: &[u8]| buffer.copy_from(0, data);
                server.read(file, position, buffer.len() as u32, sink).await
            }
        }
    }

    /// Writes `data` at `position`: `gated`, or as part of a `recovery`. The vector is the same afterwards, or empty after an error.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn write(
        &self,
        file: &FileHandle,
        position: u64,
        data: &mut Vec<u8>,
        stability: Stability,
        how: (bool, bool),
    ) -> Result<Written, NfsError> {
        either!(self, server => server.write(file, position, data, stability, how).await)
    }

    /// The server by NFSv3.
    ///
    /// # Errors
    /// [`NfsError::Denied`] if it is used by another version, in which `procedure` is not built.
    pub fn by_v3(&self, procedure: &'static str) -> Result<&nfs3::Server, NfsError> {
        match self {
            Remote::V3(server) => Ok(server),
            Remote::V4(_) => Err(NfsError::Denied { procedure, cause: "this is done by NFSv3 only" }),
        }
    }

    /// Makes what was written to a file durable.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn commit(&self, file: &FileHandle, recovery: bool) -> Result<Committed, NfsError> {
        either!(self, server => server.commit(file, recovery).await)
    }

    /// Removes a name; `false`: there was none.
    ///
    /// # Errors
    /// [`NfsError`]; after `Unknown` the name may go yet.
    pub async fn remove(&self, directory: &FileHandle, name: &[u8], gated: bool) -> Result<bool, NfsError> {
        either!(self, server => server.remove(directory, name, gated).await)
    }

    /// Limits of the server.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn limits(&self, root: &FileHandle) -> Result<FsInfo, NfsError> {
        either!(self, server => server.limits(root).await)
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn space(&self, root: &FileHandle) -> Result<FsStat, NfsError> {
        either!(self, server => server.space(root).await)
    }

    /// Makes a symbolic link; `false`: the name is there already.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn make_link(&self, directory: &FileHandle, name: &str, target: &str) -> Result<bool, NfsError> {
        either!(self, server => server.make_link(directory, name, target).await)
    }

    /// The target of a symbolic link; `None`: there is no such name.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn link_target(&self, directory: &FileHandle, name: &str) -> Result<Option<Vec<u8>>, NfsError> {
        either!(self, server => server.link_target(directory, name).await)
    }
}
