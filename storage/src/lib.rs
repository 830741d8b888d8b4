//! What is behind a SCSI disk: the choice of a back end for a path, and the enum over them.
//!
//! A guest's adapters and the iSCSI target use it alike. A disk is opened exclusively for writing; errors name the file, the cause and the
//! next step. Nothing here knows adapters, SCSI commands or guest memory.
#![deny(unsafe_code)]

mod file;
mod gatekeeper;
mod identity;
mod nfs;
mod ring;
mod shown;
mod supervisor;
mod vmfs;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lockd::client::DirectError;
use nfs_backend::datastore::DatastoreError;
use nfs_backend::lock::LockError;
use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, StorageError};
use vmfs_core::disk::descriptor::{Access, Descriptor, DescriptorError, MAX_DESCRIPTOR_BYTES};

pub use file::FileDisk;
pub use nfs::NfsDisk;
pub use ring::transfers_under_way;
pub use shown::{CDROM_BLOCK, ShownDisk};
pub use supervisor::Supervisor;
pub use vmfs::VmfsDisk;

/// Which disk to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSource {
    /// A `.vmdk` descriptor, an image file or a block device; or an `nfs://` URL of a descriptor or a flat file.
    pub path: PathBuf,
    /// Refuse all writes.
    pub read_only: bool,
    /// An image file is read and written by way of the page cache: written data are durable after a flush, as on a disk with a write
    /// cache. Nothing happens to block devices and disks of a volume.
    pub cached: bool,
    /// The serial number that the guest sees, if not the disk's own.
    pub serial: Option<String>,
}

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The operating system refuses.
    #[error("cannot {what} {}: {source}; check that it exists and that its permissions allow it", path.display())]
    System {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another process has it open for writing, or has it open while this one wants to write.
    #[error("{} is in use by another process; stop the machine that uses it, or open it read-only everywhere", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It lies on a mounted VMFS volume, and another host or program holds its lock. The cause says which.
    #[error("{source}\n  stop the machine that uses it, or wait until its host has given it up")]
    Locked {
        /// The file.
        path: PathBuf,
        /// What the mount says.
        source: DirectError,
    },
    /// It lies on a mounted VMFS volume, which does not give it.
    #[error("{source}; check the volume (vmfs status) and the log of its mount")]
    Direct {
        /// What the mount says.
        source: DirectError,
    },
    /// It is an `nfs://` URL that cannot be understood.
    #[error("{}: {source}", path.display())]
    Url {
        /// The URL as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: nfs_backend::url::UrlError,
    },
    /// It lies on an NFS server, which does not give it.
    #[error("{0}")]
    Datastore(Box<DatastoreError>),
    /// It lies on an NFS server, and its lock cannot be had. The cause says who holds it.
    #[error("{}: {source}{}", path.display(), nfs::hint(source))]
    NfsLock {
        /// The URL of its data.
        path: PathBuf,
        /// Why not.
        source: Box<LockError>,
    },
    /// It holds less than one block.
    #[error("{} has {length} bytes: less than one block of {block}; create the disk with its size first", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The logical block in bytes.
        block: u32,
    },
    /// It is a directory, a pipe or the like.
    #[error("{} is neither a file nor a block device; give a .vmdk file, an image or a device", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
    },
    /// The descriptor cannot be read.
    #[error("{} is no usable descriptor: {source}; give the .vmdk file of a disk", path.display())]
    Descriptor {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: DescriptorError,
    },
    /// The descriptor is of a kind of disk that is made of more than one flat file.
    #[error("{} describes a disk of type {kind}, not one flat file; clone it to a flat disk first", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// createType of the descriptor.
        kind: String,
    },
    /// The flat file is shorter than its descriptor says.
    #[error(
        "{} has {length} bytes where its descriptor says {expected}; restore the file or correct the descriptor",
        path.display()
    )]
    Short {
        /// The flat file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// What the descriptor says.
        expected: u64,
    },
}

impl From<DatastoreError> for OpenError {
    fn from(error: DatastoreError) -> Self {
        Self::Datastore(Box::new(error))
    }
}

impl OpenError {
    fn system(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::System { what, path, source }
    }
}

/// What stores a guest disk's blocks. It belongs to the thread that opened it.
pub enum Storage {
    /// A file or a block device.
    File(FileDisk),
    /// A disk on a mounted VMFS volume, whose data does not pass through the mount.
    Vmfs(VmfsDisk),
    /// A disk on an NFS server.
    Nfs(NfsDisk),
}

/// Opens a disk on the calling thread, which must run a tokio-uring runtime. `supervisor` is told when it freezes or is lost.
///
/// # Errors
/// [`OpenError`]
pub async fn open(source: DiskSource, supervisor: Arc<dyn Supervisor>) -> Result<Storage, OpenError> {
    if let Some(url) = nfs::url_of(&source.path)? {
        return Ok(Storage::Nfs(nfs::open(source, url, supervisor).await?));
    }
    let flat = find_flat_file(&source)?;
    let read_only = source.read_only || flat.read_only;
    let mut identity = flat.names;
    if let Some(serial) = source.serial {
        identity.serial = serial;
    }
    // A pipe or device is not even tried: to open it could wait or disturb.
    if flat.path.is_file()
        && let Some(file) = vmfs::open_direct(&flat.path, !read_only).await?
    {
        let appearance = vmfs::Appearance { identity, length: flat.length, thin: flat.thin };
        let disk = VmfsDisk::new(file, appearance, supervisor)?;
        warn_of_hidden(&flat.path, disk.hidden_bytes(), disk.geometry().bytes(), disk.alignment());
        return Ok(Storage::Vmfs(disk));
    }
    let disk = FileDisk::open(&flat.path, read_only, source.cached)?.supervised(&flat.path, supervisor);
    let disk = match flat.length {
        Some(length) => disk.limited_to(length, &flat.path)?,
        None => disk,
    };
    let geometry = disk.geometry();
    warn_of_hidden(&flat.path, disk.hidden_bytes(), geometry.bytes(), geometry.logical_block.into());
    Ok(Storage::File(disk.named(identity)))
}

/// Says that the guest does not see the last `hidden` bytes of a file; the disk works all the same.
fn warn_of_hidden(path: &Path, hidden: u64, visible: u64, block: u64) {
    if hidden > 0 {
        tracing::warn!(
            "{}: the guest sees its first {visible} bytes and not the last {hidden}: a disk is whole blocks of {block} bytes, as far \
             as its descriptor goes. To show them too, extend the file to whole blocks and correct its descriptor",
            path.display(),
        );
    }
}

/// The file that holds a disk's blocks.
struct FlatFile {
    path: PathBuf,
    read_only: bool,
    /// Its length in bytes if a descriptor says so.
    length: Option<u64>,
    /// A descriptor says that space is taken at the first write.
    thin: bool,
    names: Identity,
}

/// Follows a descriptor to its flat file; a file that is no descriptor is the disk itself.
fn find_flat_file(source: &DiskSource) -> Result<FlatFile, OpenError> {
    let path = source.path.canonicalize().map_err(OpenError::system("find", &source.path))?;
    let names = identity::from_path(&path);
    if let Some(descriptor) = descriptor_of_flat(&path) {
        // Only what the guest may do with it; its size is what the file itself says.
        let thin = read_descriptor(&descriptor).is_ok_and(|descriptor| is_thin(&descriptor));
        return Ok(FlatFile { path, read_only: false, length: None, thin, names });
    }
    if path.extension().is_none_or(|extension| extension != "vmdk") {
        return Ok(FlatFile { path, read_only: false, length: None, thin: false, names });
    }
    let descriptor = read_descriptor(&path)?;
    let Some((name, sectors)) = descriptor.flat_extent() else {
        return Err(OpenError::Kind { path, kind: descriptor.create_type });
    };
    let flat = path.with_file_name(name);
    let names = descriptor.ddb_value("uuid").and_then(identity::from_uuid).unwrap_or(names);
    let read_only = descriptor.extents.iter().any(|extent| extent.access != Access::ReadWrite);
    let (length, thin) = (Some(sectors.saturating_mul(512)), is_thin(&descriptor));
    Ok(FlatFile { path: flat, read_only, length, thin, names })
}

fn read_descriptor(path: &Path) -> Result<Descriptor, OpenError> {
    if !path.is_file() {
        return Err(OpenError::NotADisk { path: path.to_owned() });
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(OpenError::system("open", path))?;
    file.take(MAX_DESCRIPTOR_BYTES as u64 + 1).read_to_end(&mut text).map_err(OpenError::system("read", path))?;
    Descriptor::parse(&text).map_err(|source| OpenError::Descriptor { path: path.to_owned(), source })
}

/// Where the descriptor of a flat file would be; `None` if its name is none of a flat file.
fn descriptor_of_flat(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?.strip_suffix("-flat.vmdk")?;
    Some(path.with_file_name(format!("{name}.vmdk")))
}

fn is_thin(descriptor: &Descriptor) -> bool {
    descriptor.ddb_value("thinProvisioned") == Some("1")
}

impl BlockDevice for Storage {
    fn geometry(&self) -> Geometry {
        match self {
            Storage::File(disk) => disk.geometry(),
            Storage::Vmfs(disk) => disk.geometry(),
            Storage::Nfs(disk) => disk.geometry(),
        }
    }

    fn identity(&self) -> &Identity {
        match self {
            Storage::File(disk) => disk.identity(),
            Storage::Vmfs(disk) => disk.identity(),
            Storage::Nfs(disk) => disk.identity(),
        }
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.read(position, buffer).await,
            Storage::Vmfs(disk) => disk.read(position, buffer).await,
            Storage::Nfs(disk) => disk.read(position, buffer).await,
        }
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.write(position, buffer, force_unit_access).await,
            Storage::Vmfs(disk) => disk.write(position, buffer, force_unit_access).await,
            Storage::Nfs(disk) => disk.write(position, buffer, force_unit_access).await,
        }
    }

    async fn flush(&self) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.flush().await,
            Storage::Vmfs(disk) => disk.flush().await,
            Storage::Nfs(disk) => disk.flush().await,
        }
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.unmap(ranges).await,
            Storage::Vmfs(disk) => disk.unmap(ranges).await,
            Storage::Nfs(disk) => disk.unmap(ranges).await,
        }
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.write_zeroes(range, may_unmap).await,
            Storage::Vmfs(disk) => disk.write_zeroes(range, may_unmap).await,
            Storage::Nfs(disk) => disk.write_zeroes(range, may_unmap).await,
        }
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        match self {
            Storage::File(disk) => disk.block_status(range).await,
            Storage::Vmfs(disk) => disk.block_status(range).await,
            Storage::Nfs(disk) => disk.block_status(range).await,
        }
    }
}
