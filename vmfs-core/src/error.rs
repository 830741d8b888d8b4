//! Owns: the error of every file-system operation and its public kind.
//! Promises: the message names the object, the cause and, where there is one, the next step; one table turns kinds into errno.
//! Must not know: FUSE, exit codes.

use crate::format::FormatError;
use crate::lun::LunError;
use crate::units::{FdId, LunIndex};

/// Kind of a file-system error: what a caller decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FsErrorKind {
    /// ENOENT.
    NotFound,
    /// EEXIST.
    Exists,
    /// ENOTDIR.
    NotDirectory,
    /// EISDIR.
    IsDirectory,
    /// ENOTEMPTY.
    NotEmpty,
    /// ENAMETOOLONG.
    NameTooLong,
    /// EINVAL.
    Invalid,
    /// EBUSY: locked by another host or open in a way that excludes this.
    Busy,
    /// ENOSPC.
    NoSpace,
    /// EFBIG.
    TooBig,
    /// EROFS.
    ReadOnly,
    /// EXDEV: a directory moves only within its parent.
    CrossDirectory,
    /// ESTALE: the object is gone or has become another one.
    Stale,
    /// EPERM.
    NotPermitted,
    /// EOPNOTSUPP.
    Unsupported,
    /// EIO: a LUN failed or is missing.
    Io,
    /// EIO: a structure fails its checks.
    Corrupt,
    /// EIO: this host has lost its lease.
    Fenced,
}

/// Why a file-system operation was refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FsError {
    /// A plain refusal: kind and a sentence that names object and cause.
    #[error("{message}")]
    Refused {
        /// Kind.
        kind: FsErrorKind,
        /// Object, cause, next step.
        message: String,
    },
    /// A LUN command failed.
    #[error(transparent)]
    Lun(#[from] LunError),
    /// A member LUN is not there.
    #[error("{lun} of the volume is not there; give its path to mount, or see vmfs status")]
    MissingLun {
        /// Which.
        lun: LunIndex,
    },
    /// A structure fails its checks; it was left as it is.
    #[error("{structure}: {cause}; run fsck.vmfs")]
    Corrupt {
        /// What was being read.
        structure: String,
        /// What is wrong.
        cause: FormatError,
    },
    /// The own slot is no longer live at the own generation.
    #[error("this host was fenced on {lun}: another host took its slot over; stop its VMs and mount again")]
    Fenced {
        /// On which LUN.
        lun: LunIndex,
    },
    /// The object is gone or has become another one.
    #[error("{fd} is gone or has become another object")]
    Stale {
        /// Which.
        fd: FdId,
    },
}

impl FsError {
    /// A refusal of `kind` with a message.
    pub fn refused(kind: FsErrorKind, message: impl Into<String>) -> FsError {
        FsError::Refused { kind, message: message.into() }
    }

    /// What a caller decides by.
    pub fn kind(&self) -> FsErrorKind {
        match self {
            FsError::Refused { kind, .. } => *kind,
            FsError::Lun(error) => match error.kind {
                crate::lun::LunErrorKind::NoSpace => FsErrorKind::NoSpace,
                crate::lun::LunErrorKind::Fenced => FsErrorKind::Fenced,
                _ => FsErrorKind::Io,
            },
            FsError::MissingLun { .. } => FsErrorKind::Io,
            FsError::Corrupt { .. } => FsErrorKind::Corrupt,
            FsError::Fenced { .. } => FsErrorKind::Fenced,
            FsError::Stale { .. } => FsErrorKind::Stale,
        }
    }
}

impl FsErrorKind {
    /// The errno of this kind (errno(3), Linux).
    pub fn errno(self) -> i32 {
        match self {
            FsErrorKind::NotFound => libc::ENOENT,
            FsErrorKind::Exists => libc::EEXIST,
            FsErrorKind::NotDirectory => libc::ENOTDIR,
            FsErrorKind::IsDirectory => libc::EISDIR,
            FsErrorKind::NotEmpty => libc::ENOTEMPTY,
            FsErrorKind::NameTooLong => libc::ENAMETOOLONG,
            FsErrorKind::Invalid => libc::EINVAL,
            FsErrorKind::Busy => libc::EBUSY,
            FsErrorKind::NoSpace => libc::ENOSPC,
            FsErrorKind::TooBig => libc::EFBIG,
            FsErrorKind::ReadOnly => libc::EROFS,
            FsErrorKind::CrossDirectory => libc::EXDEV,
            FsErrorKind::Stale => libc::ESTALE,
            FsErrorKind::NotPermitted => libc::EPERM,
            FsErrorKind::Unsupported => libc::EOPNOTSUPP,
            FsErrorKind::Io | FsErrorKind::Corrupt | FsErrorKind::Fenced => libc::EIO,
        }
    }
}
