//! Owns: a directory of an NFS datastore: finding it by a URL, and its files.
//! Promises: errors name the file, the cause and the next step. Must not know: descriptors, locks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{NfsError, Status};
use crate::file::{DataFile, MOST_BYTES};
use crate::mount::{self, MountError};
use crate::nfs3::{Attributes, FileHandle, FileKind, FsInfo, NewAttributes, Server, Stability};
use crate::remote::Remote;
use crate::rpc::{Client, Credential, Gate, Options};
use crate::url::{Url, Version};
use crate::v4;

/// How long a call of an administrator's command, or of the opening of a disk, may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why something of a datastore cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatastoreError {
    /// The name of the server leads nowhere.
    #[error("{url}: the name {host} leads to no address: {cause}; check the name")]
    Name {
        /// The URL.
        url: Url,
        /// The server.
        host: String,
        /// Why.
        cause: String,
    },
    /// The server does not give the directory.
    #[error("{url}: {cause}{}", mount_hint(.cause))]
    Mount {
        /// The URL.
        url: Url,
        /// Why.
        cause: MountError,
    },
    /// By NFSv4.1 there is no such directory.
    #[error(
        "{url}: the server's export has no directory '{name}' on this path, or does not give it to this host; by NFSv4.1 a path begins at the \
         server's root, which may have other names for exports than NFSv3"
    )]
    Path {
        /// The URL.
        url: Url,
        /// The name that was not found.
        name: String,
    },
    /// There is no such file.
    #[error("{url}: there is no such file; check the path")]
    Absent {
        /// The file.
        url: Url,
    },
    /// There is such a file already.
    #[error("{url}: this file is there already; choose another name, or remove it first")]
    Exists {
        /// The file.
        url: Url,
    },
    /// It is no regular file.
    #[error("{url}: this is no file; name the .vmdk file of a disk")]
    NotAFile {
        /// The file.
        url: Url,
    },
    /// A call failed.
    #[error("{url}: {cause}{}", .cause.hint())]
    Call {
        /// The file.
        url: Url,
        /// Why.
        cause: NfsError,
    },
}

fn mount_hint(error: &MountError) -> &'static str {
    match error {
        MountError::Call(cause @ (NfsError::Unreachable { .. } | NfsError::Unknown { .. })) => cause.hint(),
        _ => "; check the path, and that the server exports it to this host (showmount -e)",
    }
}

/// A directory on a server.
pub struct Directory {
    url: Url,
    address: SocketAddr,
    credential: Credential,
    server: Remote,
    handle: FileHandle,
    limits: FsInfo,
}

/// A file of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Its handle.
    pub handle: FileHandle,
    /// Its attributes.
    pub attributes: Attributes,
}

/// Longest reply of a server: the data of a READ and what comes with them.
const MOST_REPLY: usize = MOST_BYTES as usize + (64 << 10);

/// A client of the server at `address`.
fn client(
    address: SocketAddr,
    name: &str,
    credential: &Credential,
    flight: Duration,
    gate: Option<Arc<dyn Gate>>,
) -> Client {
    let options = Options {
        name: name.to_owned(),
        credential: credential.clone(),
        answer_within: Duration::from_secs(15),
        user_timeout: flight,
        most_reply: MOST_REPLY,
        gate,
    };
    Client::new(address, options)
}

impl Directory {
    /// The directory of a URL's file.
    ///
    /// # Errors
    /// [`DatastoreError`]
    pub async fn open(url: &Url) -> Result<Directory, DatastoreError> {
        let by_name = |cause: String| DatastoreError::Name { url: url.clone(), host: url.host.clone(), cause };
        let mut addresses =
            tokio::net::lookup_host((url.host.as_str(), url.port)).await.map_err(|error| by_name(error.to_string()))?;
        let address = addresses.next().ok_or_else(|| by_name("there is none".into()))?;
        let mut credential = Credential::of_this_process();
        credential.uid = url.uid.unwrap_or(credential.uid);
        credential.gid = url.gid.unwrap_or(credential.gid);
        let server = client(address, &url.host, &credential, PATIENCE, None);
        let (server, handle) = match url.version {
            Version::V3 => {
                let refused = |cause| DatastoreError::Mount { url: url.clone(), cause };
                let port = match url.mount_port {
                    Some(port) => port,
                    None => mount::find_port(address, &url.host, &credential, PATIENCE).await.map_err(refused)?,
                };
                let at = SocketAddr::new(address.ip(), port);
                let server = Server::new(server, Some(PATIENCE));
                let handle = Self::mount(url, at, &credential, &server).await?;
                (Remote::V3(server), handle)
            }
            Version::V41 => {
                let server = v4::Server::new(server, Some(PATIENCE));
                let handle = Self::walk(url, &server).await?;
                (Remote::V4(server), handle)
            }
        };
        let limits = server.limits(&handle).await.map_err(|cause| DatastoreError::Call { url: url.clone(), cause })?;
        Ok(Directory { url: url.clone(), address, credential, server, handle, limits })
    }

    /// A server may give the directory itself, or only one above it, from which names lead on.
    async fn mount(
        url: &Url,
        at: SocketAddr,
        credential: &Credential,
        server: &Server,
    ) -> Result<FileHandle, DatastoreError> {
        let mut path = url.directory.as_str();
        let mut first = None;
        let mut handle = loop {
            match mount::mount(at, &url.host, credential, path, PATIENCE).await {
                Ok(handle) => break handle,
                Err(cause) => {
                    let may_be_above = matches!(cause, MountError::Refused { .. });
                    let cause = first.get_or_insert(cause).clone();
                    match path.rsplit_once('/') {
                        Some((above, _)) if may_be_above && path != "/" => {
                            path = if above.is_empty() { "/" } else { above };
                        }
                        _ => return Err(DatastoreError::Mount { url: url.clone(), cause }),
                    }
                }
            }
        };
        for name in url.directory[path.len()..].split('/').filter(|name| !name.is_empty()) {
            let found = server.lookup(&handle, name.as_bytes()).await;
            let found = found.map_err(|cause| DatastoreError::Call { url: url.clone(), cause })?;
            handle = found.ok_or_else(|| DatastoreError::Absent { url: url.clone() })?.0;
        }
        Ok(handle)
    }

    /// By NFSv4.1 names lead from the server's root.
    async fn walk(url: &Url, server: &v4::Server) -> Result<FileHandle, DatastoreError> {
        let failed = |cause| DatastoreError::Call { url: url.clone(), cause };
        let mut handle = server.root().await.map_err(failed)?;
        for name in url.directory.split('/').filter(|name| !name.is_empty()) {
            let found = server.lookup(&handle, name.as_bytes()).await.map_err(failed)?;
            let (found, _) = found.ok_or_else(|| DatastoreError::Path { url: url.clone(), name: name.to_owned() })?;
            handle = found;
        }
        Ok(handle)
    }

    /// The URL that it was opened by.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Its handle.
    pub fn handle(&self) -> &FileHandle {
        &self.handle
    }

    /// Calls for an administrator.
    pub fn server(&self) -> &Remote {
        &self.server
    }

    /// Address and credential, for further clients of the same server.
    pub(crate) fn access(&self) -> (SocketAddr, &Credential) {
        (self.address, &self.credential)
    }

    /// The error of a call on the file `name`.
    pub fn failed(&self, name: &str) -> impl FnOnce(NfsError) -> DatastoreError + use<> {
        let url = self.url.beside(name);
        move |cause| match cause.status() {
            Some(Status::NOENT) => DatastoreError::Absent { url },
            Some(Status::EXIST) => DatastoreError::Exists { url },
            _ => DatastoreError::Call { url, cause },
        }
    }

    /// A regular file.
    ///
    /// # Errors
    /// [`DatastoreError`]
    pub async fn find(&self, name: &str) -> Result<Found, DatastoreError> {
        let url = || self.url.beside(name);
        let found = self.server.lookup(&self.handle, name.as_bytes()).await.map_err(self.failed(name))?;
        let (handle, attributes) = found.ok_or_else(|| DatastoreError::Absent { url: url() })?;
        let attributes = match attributes {
            Some(attributes) => attributes,
            None => self.server.attributes(&handle).await.map_err(self.failed(name))?,
        };
        match attributes.kind {
            FileKind::Regular => Ok(Found { handle, attributes }),
            _ => Err(DatastoreError::NotAFile { url: url() }),
        }
    }

    /// The first `most` bytes of a file.
    ///
    /// # Errors
    /// [`DatastoreError`]
    pub async fn read_small(&self, name: &str, most: usize) -> Result<Vec<u8>, DatastoreError> {
        let found = self.find(name).await?;
        let mut bytes = Vec::new();
        while bytes.len() < most {
            let wanted = (most - bytes.len()).min(self.limits.most_read.clamp(512, MOST_BYTES) as usize) as u32;
            let at = bytes.len() as u64;
            let read = self.server.read(&found.handle, at, wanted, |data| bytes.extend_from_slice(data)).await;
            let (_, is_end) = read.map_err(self.failed(name))?;
            if is_end {
                break;
            }
        }
        Ok(bytes)
    }

    /// Makes a file of `size` bytes without content.
    ///
    /// # Errors
    /// [`DatastoreError`]; `Exists` if there is such a file.
    pub async fn create(&self, name: &str, size: u64) -> Result<Found, DatastoreError> {
        let exists = || DatastoreError::Exists { url: self.url.beside(name) };
        let handle = match &self.server {
            Remote::V3(server) => self.create_v3(server, name, size).await?,
            Remote::V4(server) => server.create(&self.handle, name, size).await.map_err(self.failed(name))?,
        };
        let handle = handle.ok_or_else(exists)?;
        let attributes = self.server.attributes(&handle).await.map_err(self.failed(name))?;
        if attributes.size != size {
            let cause = format!("a file of {} bytes where {size} were asked for", attributes.size);
            let cause = NfsError::Nonsense { procedure: "SETATTR", cause };
            return Err(DatastoreError::Call { url: self.url.beside(name), cause });
        }
        Ok(Found { handle, attributes })
    }

    async fn create_v3(&self, server: &Server, name: &str, size: u64) -> Result<Option<FileHandle>, DatastoreError> {
        let mut verifier = [0; 8];
        getrandom::fill(&mut verifier).expect("the system gives random numbers");
        let made = server.create_exclusive(&self.handle, name.as_bytes(), verifier).await;
        let Some(handle) = made.map_err(self.failed(name))? else { return Ok(None) };
        // The verifier may sit in the times. Guarded by the file's ctime: nobody else has found the file yet.
        let before = server.attributes(&handle).await.map_err(self.failed(name))?;
        let new = NewAttributes { mode: Some(0o644), size: Some(size) };
        server.set_attributes(&handle, new, Some(before.changed)).await.map_err(self.failed(name))?;
        Ok(Some(handle))
    }

    /// Writes all of a small file, durably.
    ///
    /// # Errors
    /// [`DatastoreError`]
    pub async fn write_small(&self, name: &str, file: &FileHandle, bytes: &[u8]) -> Result<(), DatastoreError> {
        let mut done = 0;
        while done < bytes.len() {
            let length = (bytes.len() - done).min(self.limits.most_write.clamp(512, MOST_BYTES) as usize);
            let mut part = bytes[done..done + length].to_vec();
            let written = self.server.write(file, done as u64, &mut part, Stability::FileSync, (false, false)).await;
            done += written.map_err(self.failed(name))?.count as usize;
        }
        Ok(())
    }

    /// Replaces a small file by another one with these bytes, in the right that the writes of `data` have: whoever opens the name finds the old or
    /// the new one, whole.
    ///
    /// # Errors
    /// [`DatastoreError`]; after `Unknown` it may happen yet.
    pub async fn replace(&self, name: &str, bytes: &[u8], data: &DataFile) -> Result<(), DatastoreError> {
        let random = getrandom::u32().expect("the system gives random numbers");
        let temporary = format!("{name}.{random:08x}.new");
        let file = self.create(&temporary, bytes.len() as u64).await?;
        let replaced = match self.write_small(&temporary, &file.handle, bytes).await {
            Ok(()) => data.rename(&self.handle, &temporary, name).await.map_err(self.failed(name)),
            error => error,
        };
        if replaced.is_err() {
            let _ = self.remove(&temporary).await;
        }
        replaced
    }

    /// Removes a name; it may be absent.
    ///
    /// # Errors
    /// [`DatastoreError`]
    pub async fn remove(&self, name: &str) -> Result<(), DatastoreError> {
        self.server.remove(&self.handle, name.as_bytes(), false).await.map(drop).map_err(self.failed(name))
    }

    /// The data of a file over a connection of its own. With a gate its writes wait while that is closed, and calls take as long as they
    /// take; without one they fail after a while.
    pub fn data(&self, file: &FileHandle, gate: Option<Arc<dyn Gate>>, flight: Duration) -> DataFile {
        let gated = gate.is_some();
        let patience = (!gated).then_some(PATIENCE * 2);
        let client = client(self.address, &self.url.host, &self.credential, flight, gate);
        let server = match self.server {
            Remote::V3(_) => Remote::V3(Server::new(client, patience)),
            Remote::V4(_) => Remote::V4(v4::Server::new(client, patience)),
        };
        DataFile::new(server, *file, self.limits, gated)
    }

    /// The data of a file, by NFSv4.1, in the sessions of its lock.
    pub(crate) fn data_of(
        &self,
        file: &FileHandle,
        gate: Option<Arc<dyn Gate>>,
        flight: Duration,
        grants: Arc<v4::Grants>,
    ) -> DataFile {
        let client = client(self.address, &self.url.host, &self.credential, flight, gate);
        DataFile::new(Remote::V4(v4::Server::granted(client, grants)), *file, self.limits, true)
    }

    /// Another server object on a connection of its own, for a lock.
    pub(crate) fn lock_server(
        (address, credential, name): (SocketAddr, &Credential, &str),
        patience: Duration,
        flight: Duration,
        gate: Arc<dyn Gate>,
    ) -> Server {
        Server::new(client(address, name, credential, flight, Some(gate)), Some(patience))
    }
}
