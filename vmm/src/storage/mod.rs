//! Owns: what is behind a guest's disks: the choice of a back end for a path, and the enum over them.
//! Promises: a disk is opened exclusively for writing; errors name the file, the cause and the next step.
//! Must not know: adapters, SCSI commands, guest memory.

mod file;
mod identity;
mod ring;

use std::path::{Path, PathBuf};

use scsi::{BlockDevice, BlockStatus, ByteRange, DataBuffer, Geometry, Identity, StorageError};

pub use file::FileDisk;

/// Which disk to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSource {
    /// A `.vmdk` descriptor, an image file or a block device.
    pub path: PathBuf,
    /// Refuse all writes.
    pub read_only: bool,
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
}

/// Opens a disk on the calling thread, which must run a tokio-uring runtime.
///
/// # Errors
/// [`OpenError`]
pub async fn open(source: DiskSource) -> Result<Storage, OpenError> {
    let path = source.path.canonicalize().map_err(OpenError::system("find", &source.path))?;
    let mut names = identity::from_path(&path);
    if let Some(serial) = source.serial {
        names.serial = serial;
    }
    Ok(Storage::File(FileDisk::open(&path, source.read_only)?.named(names)))
}

impl BlockDevice for Storage {
    fn geometry(&self) -> Geometry {
        match self {
            Storage::File(disk) => disk.geometry(),
        }
    }

    fn identity(&self) -> &Identity {
        match self {
            Storage::File(disk) => disk.identity(),
        }
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.read(position, buffer).await,
        }
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force_unit_access: bool) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.write(position, buffer, force_unit_access).await,
        }
    }

    async fn flush(&self) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.flush().await,
        }
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.unmap(ranges).await,
        }
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        match self {
            Storage::File(disk) => disk.write_zeroes(range, may_unmap).await,
        }
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        match self {
            Storage::File(disk) => disk.block_status(range).await,
        }
    }
}
