//! Owns: why a call on an NFS server did not do what it was asked to do.
//! Promises: whether a call may have had an effect is told by the type, never by a text.
//! Must not know: what the caller makes of it.

use crate::xdr::XdrError;

/// Status of an NFSv3 reply (RFC 1813, 2.6), other than NFS3_OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// NFS3ERR_PERM.
    pub const PERM: Status = Status(1);
    /// NFS3ERR_NOENT.
    pub const NOENT: Status = Status(2);
    /// NFS3ERR_IO.
    pub const IO: Status = Status(5);
    /// NFS3ERR_ACCES.
    pub const ACCES: Status = Status(13);
    /// NFS3ERR_EXIST.
    pub const EXIST: Status = Status(17);
    /// NFS3ERR_NOTDIR.
    pub const NOTDIR: Status = Status(20);
    /// NFS3ERR_NOSPC.
    pub const NOSPC: Status = Status(28);
    /// NFS3ERR_ROFS.
    pub const ROFS: Status = Status(30);
    /// NFS3ERR_DQUOT.
    pub const DQUOT: Status = Status(69);
    /// NFS3ERR_STALE.
    pub const STALE: Status = Status(70);
    /// NFS3ERR_NOT_SYNC: a guard did not hold.
    pub const NOT_SYNC: Status = Status(10002);
    /// NFS3ERR_JUKEBOX: ask again later.
    pub const JUKEBOX: Status = Status(10008);

    /// Its name and meaning.
    pub fn describe(self) -> &'static str {
        match self.0 {
            1 => "PERM: not the owner",
            2 => "NOENT: there is no such file",
            5 => "IO: the server's disk failed",
            6 => "NXIO: no such device",
            13 => "ACCES: no permission",
            17 => "EXIST: the file is there already",
            18 => "XDEV: another file system",
            19 => "NODEV: no such device",
            20 => "NOTDIR: no directory",
            21 => "ISDIR: a directory",
            22 => "INVAL: the server does not take these arguments",
            27 => "FBIG: the file would be too large",
            28 => "NOSPC: the export is full",
            30 => "ROFS: the export is read-only",
            31 => "MLINK: too many links",
            63 => "NAMETOOLONG: the name is too long",
            66 => "NOTEMPTY: the directory is not empty",
            69 => "DQUOT: the quota is used up",
            70 => "STALE: the file is gone",
            71 => "REMOTE: too many levels of remote",
            10001 => "BADHANDLE: the server does not know the file handle",
            10002 => "NOT_SYNC: somebody changed the file meanwhile",
            10003 => "BAD_COOKIE: the directory changed meanwhile",
            10004 => "NOTSUPP: the server cannot do this",
            10005 => "TOOSMALL: buffer too small",
            10006 => "SERVERFAULT: the server failed",
            10007 => "BADTYPE: no such type",
            10008 => "JUKEBOX: not now",
            _ => "a status that NFSv3 does not know",
        }
    }

    /// The error number of the operating system that says the same.
    pub fn errno(self) -> i32 {
        match self.0 {
            status @ 1..=69 => status as i32,
            70 => 116,
            71 => 66,
            10004 => 95,
            10008 => 11,
            _ => 5,
        }
    }
}

/// Why a call was not done, or is not known to have been done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NfsError {
    /// The server's own no: nothing was done.
    #[error("{procedure}: the server says {} ({})", .status.describe(), .status.0)]
    Refused {
        /// Name of the procedure.
        procedure: &'static str,
        /// Its status.
        status: Status,
    },
    /// No byte of the call reached a connection: nothing was done.
    #[error("{procedure}: {server} cannot be reached: {cause}")]
    Unreachable {
        /// Name of the procedure.
        procedure: &'static str,
        /// The server.
        server: String,
        /// Why.
        cause: String,
    },
    /// The call was sent and no answer came: it may have been done, or may be done yet.
    #[error("{procedure}: no answer of {server} came in time ({cause}); whether it was done is not known")]
    Unknown {
        /// Name of the procedure.
        procedure: &'static str,
        /// The server.
        server: String,
        /// Why.
        cause: String,
    },
    /// The RPC layer of the server refused the call: nothing was done.
    #[error("{procedure}: the server refuses the call: {cause}")]
    Denied {
        /// Name of the procedure.
        procedure: &'static str,
        /// Why.
        cause: &'static str,
    },
    /// An answer that no honest server gives. What was done is not known.
    #[error("{procedure}: the server's answer makes no sense: {cause}")]
    Nonsense {
        /// Name of the procedure.
        procedure: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// The client was closed by its owner: the call was not sent, or its answer is not waited for.
    #[error("{procedure}: {cause}")]
    Closed {
        /// Name of the procedure.
        procedure: &'static str,
        /// Why it was closed.
        cause: String,
    },
}

impl NfsError {
    /// The server's status, if it gave one.
    pub fn status(&self) -> Option<Status> {
        match self {
            NfsError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Is it this status?
    pub fn is(&self, wanted: Status) -> bool {
        self.status() == Some(wanted)
    }

    /// An answer that cannot be read.
    pub(crate) fn nonsense(procedure: &'static str) -> impl FnOnce(XdrError) -> NfsError {
        move |error| NfsError::Nonsense { procedure, cause: error.to_string() }
    }
}
