//! Owns: the thread that takes a disk's lock, renews it and gives it back, on a connection of its own.
//! Promises: a renewal waits for no data; the tenure says at each moment what is known for certain; the end of the keeper gives the lock back.
//! Must not know: how data are moved.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Notify;

use super::mark;
use super::on_server::LockFiles;
use super::protocol::{Held, LockError, Loss, acquire, release, renew};
use super::record::Owner;
use super::tenure::{SharedTenure, State, Timing};
use crate::datastore::{Directory, Found};
use crate::file::DataFile;
use crate::nfs3::{FileHandle, Server};
use crate::remote::Remote;
use crate::rpc::{Credential, Gate};
use crate::v4::{self, Grants};

/// How long a call may take. One that takes longer is made again with the next renewal.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after a renewal that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What a keeper keeps.
pub struct KeeperOptions {
    /// Who takes the lock.
    pub owner: Owner,
    /// The times of lock files; by NFSv4.1 those of the server's lease count instead.
    pub timing: Timing,
}

/// Keeps a lock until it is dropped.
pub struct Keeper {
    timing: Timing,
    tenure: Arc<SharedTenure>,
    /// Sessions for the data, by NFSv4.1.
    grants: Option<Arc<Grants>>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

struct Work {
    address: SocketAddr,
    credential: Credential,
    name: String,
    directory: FileHandle,
    data: FileHandle,
    root: String,
    options: KeeperOptions,
    tenure: Arc<SharedTenure>,
    stop: Arc<Notify>,
}

impl Keeper {
    /// Takes the lock of a file and keeps it. `done` is told on the keeper's thread when it has it, or not.
    async fn spawn(
        directory: &Directory,
        file: &Found,
        options: KeeperOptions,
        done: mpsc::Sender<Result<(), LockError>>,
    ) -> Result<Keeper, LockError> {
        let (address, credential) = directory.access();
        let (credential, name) = (credential.clone(), directory.url().host.clone());
        let (tenure, stop) = (Arc::new(SharedTenure::new()), Arc::new(Notify::new()));
        let fileid = file.attributes.fileid;
        let thread = std::thread::Builder::new().name("nfs-lock".into());
        let (thread, grants, timing) = match directory.server() {
            Remote::V3(_) => {
                let timing = options.timing;
                let work = Work {
                    address,
                    credential,
                    name,
                    directory: *directory.handle(),
                    data: file.handle,
                    root: LockFiles::name_of(fileid),
                    options,
                    tenure: tenure.clone(),
                    stop: stop.clone(),
                };
                (thread.spawn(move || work.run(&done)), None, timing)
            }
            Remote::V4(server) => {
                let failed = |cause| LockError::Nfs { file: v4::owner_file(fileid), cause };
                let lease = server.lease(directory.handle()).await.map_err(failed)?;
                let (timing, grants) = (v4::timing(lease).map_err(failed)?, Arc::new(Grants::new()));
                let lock = v4::FileLock {
                    address,
                    credential,
                    name,
                    directory: *directory.handle(),
                    data: file.handle,
                    fileid,
                    owner: options.owner,
                    timing,
                    tenure: tenure.clone(),
                    grants: grants.clone(),
                    stop: stop.clone(),
                };
                (thread.spawn(move || lock.run(&done)), Some(grants), timing)
            }
        };
        let thread = thread.map_err(|error| tracing::error!(%error, "no thread for a lock")).ok();
        Ok(Keeper { timing, tenure, grants, stop, thread })
    }

    /// Takes the lock of a file and keeps it, on a thread of its own. Waits if the last holder gives no sign of life: for [`Timing::stale`], by
    /// NFSv4.1 for the server's lease.
    ///
    /// # Errors
    /// [`LockError`]
    pub async fn start(directory: &Directory, file: &Found, options: KeeperOptions) -> Result<Keeper, LockError> {
        mark::claim(directory.server(), directory.handle()).await?;
        let (done, has_done) = mpsc::channel();
        let keeper = Self::spawn(directory, file, options, done).await?;
        let waited = tokio::task::spawn_blocking(move || has_done.recv());
        let gone = |_| LockError::Contended;
        waited.await.map_err(|_| LockError::Contended)?.map_err(gone)??;
        Ok(keeper)
    }

    /// The data of the file whose lock this is, over a connection of its own: what is written waits while the tenure is not open.
    pub fn data(&self, directory: &Directory, file: &Found) -> DataFile {
        let gate = Some(self.tenure() as Arc<dyn Gate>);
        match &self.grants {
            None => directory.data(&file.handle, gate, self.timing.flight),
            Some(grants) => directory.data_of(&file.handle, gate, self.timing.flight, grants.clone()),
        }
    }

    /// What may be done, and until when: also a gate.
    pub fn tenure(&self) -> Arc<SharedTenure> {
        self.tenure.clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.tenure.lose("the disk was closed");
    }
}

impl Work {
    fn run(self, done: &mpsc::Sender<Result<(), LockError>>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime needs only memory and an event descriptor");
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async {
            let gate = self.tenure.clone();
            let access = (self.address, &self.credential, self.name.as_str());
            let server = Directory::lock_server(access, PATIENCE, self.options.timing.flight, gate);
            let store = LockFiles::new(&server, self.directory);
            let times = (&*self.tenure, &self.options.timing);
            let waits = |holder: &super::Holder| {
                let longest = self.options.timing.stale;
                tracing::warn!("{}: waiting for {longest:?} at most whether {holder} gives a sign of life", self.root);
            };
            let taken = tokio::select! {
                taken = acquire(&store, &self.root, &self.options.owner, times, waits) => taken,
                () = self.stop.notified() => return,
            };
            match taken {
                Ok(held) => {
                    let _ = done.send(Ok(()));
                    self.keep(&store, &server, held).await;
                }
                Err(error) => {
                    let _ = done.send(Err(error));
                }
            }
        });
    }

    async fn keep(&self, store: &LockFiles<'_>, server: &Server, mut held: Held) {
        let timing = &self.options.timing;
        let mut pause = timing.renew;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stop.notified() => break,
            }
            pause = match renew(store, &self.root, &mut held, &self.tenure, timing).await {
                Ok(()) => timing.renew,
                Err(Loss::Unsure(error)) => {
                    tracing::debug!(%error, lock = self.root, "not renewed");
                    PAUSE
                }
                Err(Loss::Gone(cause)) => {
                    tracing::warn!(lock = self.root, cause, "the lock is lost");
                    self.tenure.lose(&cause);
                    return;
                }
            };
        }
        // Nobody writes any more. What was written and not flushed goes along as far as it can.
        if self.tenure.state() == State::Open {
            let _ = server.commit(&self.data, false).await;
            if let Err(error) = release(store, &held).await {
                let after = timing.stale;
                tracing::warn!(%error, lock = self.root, "the lock could not be given back; it is free after {after:?}");
            }
        }
    }
}
