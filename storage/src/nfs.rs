//! Owns: a disk on an NFS server, with its lock there.
//! Promises: nothing is sent, and no data read is handed over, unless the lock is vouched for; a request that meets a closed gate waits and
//! loses nothing; the lock goes back after the last byte.
//! Must not know: how a lock or a call works.

use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use nfs_backend::datastore::Directory;
use nfs_backend::error::{NfsError, Status};
use nfs_backend::file::{DataFile, MOST_BYTES};
use nfs_backend::lock::{Keeper, KeeperOptions, LockError, Owner, SharedTenure, State, Timing};
use nfs_backend::url::Url;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, Provisioning, StorageError};
use vmfs_core::disk::descriptor::{Access, Descriptor, MAX_DESCRIPTOR_BYTES};
use vmfs_core::gate::GateState;

use super::gatekeeper::{Gatekeeper, Guarded};
use super::supervisor::Supervisor;
use super::{DiskSource, OpenError, identity, is_thin, warn_of_hidden};

const LOGICAL_BLOCK: u32 = 512;
/// How often the end of a tenure is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// ETIMEDOUT.
const TIMED_OUT: i32 = libc::ETIMEDOUT;

/// The disk's right to be used.
struct Right {
    path: PathBuf,
    tenure: Arc<SharedTenure>,
}

impl Guarded for Right {
    fn path(&self) -> &Path {
        &self.path
    }

    fn gate(&self, _lun: Option<usize>) -> GateState {
        match self.tenure.state() {
            State::Open => GateState::Open,
            State::Frozen => GateState::Frozen,
            State::Lost => GateState::Poisoned,
        }
    }

    fn withdrawn(&self) -> Option<String> {
        self.tenure.cause()
    }
}

/// A disk on an NFS server. It belongs to the thread that made it.
pub struct NfsDisk {
    path: PathBuf,
    // The connection of the data ends, with all that it carries, before the lock goes back.
    file: Rc<DataFile>,
    /// None: it is read-only, and takes no lock.
    keeper: Option<Rc<Gatekeeper<Right>>>,
    _lock: Option<Keeper>,
    identity: Identity,
    geometry: Geometry,
}

/// The URL that a path is, if it is one.
pub(super) fn url_of(path: &Path) -> Result<Option<Url>, OpenError> {
    match path.to_str() {
        Some(text) if Url::is_url(text) => {
            text.parse().map(Some).map_err(|source| OpenError::Url { path: path.to_owned(), source })
        }
        _ => Ok(None),
    }
}

/// What to do about a lock.
pub(super) fn hint(error: &LockError) -> &'static str {
    match error {
        LockError::Held(_) | LockError::Denied(_) => "\n  stop the machine that uses it, or open the disk read-only",
        _ => "",
    }
}

/// The file of a disk's data, and what its descriptor says.
struct Described {
    flat: String,
    length: Option<u64>,
    read_only: bool,
    thin: bool,
    names: Option<Identity>,
}

async fn describe(directory: &Directory, name: &str) -> Result<Described, OpenError> {
    if !name.ends_with(".vmdk") || name.ends_with("-flat.vmdk") {
        return Ok(Described { flat: name.to_owned(), length: None, read_only: false, thin: true, names: None });
    }
    let path = || PathBuf::from(directory.url().beside(name).to_string());
    let text = directory.read_small(name, MAX_DESCRIPTOR_BYTES + 1).await?;
    let descriptor = Descriptor::parse(&text).map_err(|source| OpenError::Descriptor { path: path(), source })?;
    let Some((flat, sectors)) = descriptor.flat_extent() else {
        return Err(OpenError::Kind { path: path(), kind: descriptor.create_type });
    };
    Ok(Described {
        flat: flat.to_owned(),
        length: Some(sectors.saturating_mul(512)),
        read_only: descriptor.extents.iter().any(|extent| extent.access != Access::ReadWrite),
        thin: is_thin(&descriptor),
        names: descriptor.ddb_value("uuid").and_then(identity::from_uuid),
    })
}

/// Opens a disk on the calling thread, which runs a tokio-uring runtime. A lock whose holder gives no sign of life is waited for.
pub(super) async fn open(source: DiskSource, url: Url, supervisor: Arc<dyn Supervisor>) -> Result<NfsDisk, OpenError> {
    let directory = Directory::open(&url).await?;
    let described = describe(&directory, &url.name).await?;
    let path = PathBuf::from(url.beside(&described.flat).to_string());
    let read_only = source.read_only || described.read_only;
    let found = directory.find(&described.flat).await?;
    let timing = Timing::ESX;
    let lock = match read_only {
        true => None,
        false => {
            let options = KeeperOptions { owner: Owner::this_process(), timing };
            let taken = Keeper::start(&directory, &found, options).await;
            Some(taken.map_err(|source| OpenError::NfsLock { path: path.clone(), source: Box::new(source) })?)
        }
    };
    // Looked at under the lock: the last holder may have made it larger.
    let size = directory.find(&described.flat).await?.attributes.size;
    let length = described.length.unwrap_or(size);
    if length > size {
        return Err(OpenError::Short { path, length: size, expected: length });
    }
    let blocks = length / u64::from(LOGICAL_BLOCK);
    if blocks == 0 {
        return Err(OpenError::Empty { path, length, block: LOGICAL_BLOCK });
    }
    let mut names = described.names.unwrap_or_else(|| identity::from_path(&path));
    if let Some(serial) = source.serial {
        names.serial = serial;
    }
    let geometry = Geometry {
        logical_block: LOGICAL_BLOCK,
        physical_block: 4096,
        transfer_granularity: 4096,
        blocks,
        read_only,
        write_cache: true,
        // The server takes space at the first write, but gives it back only by calls that NFSv3 does not have.
        thin: false,
        unmapped_reads_zero: described.thin,
        unmap_granularity: 4096,
        rotational: false,
    };
    warn_of_hidden(&path, size - geometry.bytes(), geometry.bytes(), LOGICAL_BLOCK.into());
    let file = match &lock {
        Some(lock) => lock.data(&directory, &found),
        None => directory.data(&found.handle, None, timing.flight),
    };
    let file = Rc::new(file);
    let keeper = lock.as_ref().map(|lock| {
        let right = Arc::new(Right { path: path.clone(), tenure: lock.tenure() });
        tokio_uring::spawn(end_with(Rc::downgrade(&file), lock.tenure(), supervisor.clone()));
        Gatekeeper::start(right, supervisor)
    });
    Ok(NfsDisk { path, file, keeper, _lock: lock, identity: names, geometry })
}

/// Ends the calls of a file that would wait for ever: its lock is lost, or its machine ends while it stands still.
async fn end_with(file: Weak<DataFile>, tenure: Arc<SharedTenure>, supervisor: Arc<dyn Supervisor>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(file) = file.upgrade() else { return };
        let cause = match tenure.state() {
            State::Open => continue,
            State::Frozen if supervisor.is_ending() => "the machine has ended".to_owned(),
            State::Frozen => continue,
            State::Lost => tenure.cause().unwrap_or_default(),
        };
        file.server().client().close(&cause);
        return;
    }
}

impl NfsDisk {
    async fn pass(&self) -> Result<(), StorageError> {
        match &self.keeper {
            Some(keeper) => keeper.pass(None).await,
            None => Ok(()),
        }
    }

    fn is_open(&self) -> bool {
        self.keeper.as_ref().is_none_or(|keeper| keeper.lock_state() == GateState::Open)
    }

    /// What a failure means to a guest.
    fn failed(&self, position: u64, error: &NfsError) -> StorageError {
        let state = self.keeper.as_ref().map_or(GateState::Open, |keeper| keeper.lock_state());
        match state {
            GateState::Poisoned => return StorageError::LockLost,
            GateState::Frozen if matches!(error, NfsError::Closed { .. }) => return StorageError::Frozen,
            _ => tracing::warn!(disk = %self.path.display(), position, "{error}"),
        }
        match error {
            NfsError::Refused { status: Status::NOSPC | Status::DQUOT, .. } => StorageError::OutOfSpace { position },
            NfsError::Refused { status: Status::ROFS, .. } => StorageError::WriteProtected,
            NfsError::Refused { status, .. } => StorageError::Medium { position, errno: status.errno() },
            NfsError::Unreachable { .. } | NfsError::Unknown { .. } => {
                StorageError::Medium { position, errno: TIMED_OUT }
            }
            _ => StorageError::Medium { position, errno: libc::EIO },
        }
    }
}

impl BlockDevice for NfsDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.geometry.check_read(position, buffer.len() as u64)?;
        loop {
            self.pass().await?;
            let read = self.file.read(position, buffer).await;
            read.map_err(|error| self.failed(position, &error))?;
            if self.is_open() {
                return Ok(());
            }
        }
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        self.geometry.check_write(position, buffer.len() as u64)?;
        self.pass().await?;
        let fill = |offset: usize, to: &mut [u8]| buffer.copy_to(offset, to);
        let written = self.file.write(position, buffer.len(), force_unit_access, fill).await;
        written.map_err(|error| self.failed(position, &error))
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.pass().await?;
        self.file.flush().await.map_err(|error| self.failed(0, &error))
    }

    async fn unmap(&self, _ranges: &[ByteRange]) -> Result<(), StorageError> {
        Err(StorageError::Unsupported)
    }

    async fn write_zeroes(&self, range: ByteRange, _may_unmap: bool) -> Result<(), StorageError> {
        self.geometry.check_write(range.start, range.length)?;
        let mut at = range.start;
        while at < range.end() {
            self.pass().await?;
            let length = (range.end() - at).min(MOST_BYTES.into());
            let written = self.file.write(at, length as usize, false, |_, to| to.fill(0)).await;
            written.map_err(|error| self.failed(at, &error))?;
            at += length;
        }
        Ok(())
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.geometry.check_read(range.start, range.length)?;
        Ok(BlockStatus { length: range.length, provisioning: Provisioning::Mapped })
    }
}
