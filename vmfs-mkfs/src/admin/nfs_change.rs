//! Owns: vmfs disk extend and inflate for disks on NFS servers.
//! Promises: the disk is locked meanwhile; its descriptor is the old or the new one, whole, and the new one only when the data are as it says.
//! Must not know: calls, how locks work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nfs_backend::error::NfsError;
use nfs_backend::file::DataFile;
use nfs_backend::lock::{Keeper, KeeperOptions, LockError, Owner, SharedTenure, State, Timing};
use nfs_backend::url::{Url, Version};
use scsi::DataBuffer;

use super::AdminError;
use super::nfs::{CHUNK, Disk, call_failed, open, run};
use crate::size;
use crate::terminal::progress_bar;

/// How often the lock is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A lock that cannot be renewed for so long ends the work.
const PATIENCE: Duration = Duration::from_secs(60);
/// A server gives space in pieces of at least so many bytes.
const BLOCK: usize = 512;
/// Key of the descriptor that says that space comes with the first write.
const THIN: &str = "thinProvisioned";

/// A disk under its lock.
struct Locked {
    url: Url,
    disk: Disk,
    bytes: u64,
    // The data's connection ends before the lock goes back.
    data: DataFile,
    tenure: Arc<SharedTenure>,
    _lock: Keeper,
}

impl Locked {
    async fn of(url: &Url) -> Result<Locked, AdminError> {
        if url.version != Version::V3 {
            return Err(AdminError(format!(
                "{url}: by NFSv4.1 disks cannot be extended or inflated; clone it to an eagerzeroedthick one instead of inflating it"
            )));
        }
        let found = open(url).await?;
        let options = KeeperOptions { owner: Owner::this_process(), timing: Timing::ESX };
        let lock = Keeper::start(&found.directory, &found.flat, options).await.map_err(|error| {
            let hint = if matches!(error, LockError::Held(_)) { "; stop the machine that uses it" } else { "" };
            AdminError(format!("{url}: {error}{hint}"))
        })?;
        // The last holder may have changed it.
        let disk = open(url).await?;
        if disk.flat.handle != found.flat.handle {
            return Err(AdminError(format!("{url}: its data were exchanged just now; do it again")));
        }
        let bytes = disk.descriptor.disk_bytes().unwrap_or(disk.flat.attributes.size);
        let tenure = lock.tenure();
        let data = disk.directory.data(&disk.flat.handle, Some(tenure.clone()), Timing::ESX.flight);
        Ok(Locked { url: url.clone(), disk, bytes, data, tenure, _lock: lock })
    }

    fn is_thin(&self) -> bool {
        self.disk.descriptor.ddb_value(THIN) == Some("1")
    }

    /// Does something with the data, as long as the lock can be kept.
    async fn with_lock<T>(&self, work: impl Future<Output = Result<T, NfsError>>) -> Result<T, AdminError> {
        tokio::select! {
            done = work => done.map_err(call_failed(&self.url)),
            error = self.end_of_lock() => Err(error),
        }
    }

    async fn end_of_lock(&self) -> AdminError {
        let mut frozen = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let cause = match self.tenure.state() {
                State::Open => {
                    frozen = None;
                    continue;
                }
                State::Frozen if frozen.get_or_insert_with(Instant::now).elapsed() < PATIENCE => continue,
                State::Frozen => "its lock could not be renewed; check the server and the network".to_owned(),
                State::Lost => self.tenure.cause().unwrap_or_default(),
            };
            return AdminError(format!("{}: {cause}; do it again", self.url));
        }
    }

    /// Writes zeros over what is zero in `from..end`, or does not read it and writes zeros over all of it.
    async fn fill(&self, from: u64, is_new: bool, doing: &'static str) -> Result<(), AdminError> {
        let bar = progress_bar(doing, true);
        bar.set_length(self.bytes - from);
        let memory = DataBuffer::zeroed(CHUNK, 4096);
        let mut content = vec![0; CHUNK];
        let mut at = from;
        while at < self.bytes {
            let length = (self.bytes - at).min(CHUNK as u64) as usize;
            if !is_new {
                let part = memory.slice(0..length);
                self.with_lock(self.data.read(at, &part)).await?;
                part.copy_to(0, &mut content[..length]);
            }
            // What holds data has space already.
            if content[..length].chunks(BLOCK).any(|block| block.iter().all(|byte| *byte == 0)) {
                let fill = |offset: usize, to: &mut [u8]| to.copy_from_slice(&content[offset..offset + to.len()]);
                self.with_lock(self.data.write(at, length, false, fill)).await?;
            }
            at += length as u64;
            bar.set_position(at - from);
        }
        self.with_lock(self.data.flush()).await?;
        bar.finish_and_clear();
        Ok(())
    }

    /// The descriptor becomes what the disk is now.
    async fn describe(&self) -> Result<(), AdminError> {
        let text = self.disk.descriptor.to_string();
        let replaced = self.disk.directory.replace(&self.url.name, text.as_bytes(), &self.data);
        self.with_lock(async { Ok(replaced.await) }).await?.map_err(AdminError::from)
    }
}

/// Makes a disk larger.
pub(super) fn extend(url: &Url, bytes: u64) -> Result<(), AdminError> {
    run(async {
        let mut locked = Locked::of(url).await?;
        let before = locked.bytes;
        if bytes <= before {
            let has = size::show(before);
            return Err(AdminError(format!(
                "{url}: it has {has} already, and a disk never becomes smaller; give a larger size"
            )));
        }
        // Whatever lies behind the disk must not come to light.
        if locked.disk.flat.attributes.size > before {
            locked.with_lock(locked.data.set_size(before)).await?;
        }
        locked.with_lock(locked.data.set_size(bytes)).await?;
        locked.bytes = bytes;
        if !locked.is_thin() {
            locked.fill(before, true, "extending").await?;
        }
        let adapter = locked.disk.descriptor.adapter();
        locked.disk.descriptor.set_disk_bytes(bytes, adapter);
        locked.describe().await
    })
}

/// Gives all of a thin disk its space.
pub(super) fn inflate(url: &Url) -> Result<(), AdminError> {
    run(async {
        let mut locked = Locked::of(url).await?;
        if !locked.is_thin() {
            return Ok(());
        }
        locked.fill(0, false, "inflating").await?;
        locked.disk.descriptor.set_ddb(THIN, None);
        locked.describe().await
    })
}
