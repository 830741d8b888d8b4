//! Owns: why a call on an NFS server did not do what it was asked to do.
//! Promises: whether a call may have had an effect is told by the type, never by a text.
//! Must not know: what the caller makes of it.

use crate::xdr::XdrError;

/// Status of a reply of NFSv3 (RFC 1813, 2.6) or NFSv4.1 (RFC 8881, 15.1), other than OK. What both have is the same number.
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
            10009..=10096 => describe_v4(self.0),
            _ => "a status that NFS does not know",
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

fn describe_v4(status: u32) -> &'static str {
    match status {
        10011 => "EXPIRED: the lease was over",
        10012 => "LOCKED: somebody has it open and denies this",
        10013 => "GRACE: the server was started again, and waits for those who had files open",
        10014 => "FHEXPIRED: the file handle is over",
        10015 => "SHARE_DENIED: somebody has it open and denies this",
        10016 => "WRONGSEC: it wants another authentication than AUTH_SYS",
        10017 => "CLID_INUSE: the name of this client is somebody else's",
        10018 => "RESOURCE: the server has no room for it",
        10021 => "MINOR_VERS_MISMATCH: the server does not have NFSv4.1",
        10022 => "STALE_CLIENTID: the server has forgotten this client",
        10023 => "STALE_STATEID: the server was started again",
        10024 => "OLD_STATEID: the file was opened again since",
        10025 => "BAD_STATEID: the file is not open",
        10029 => "SYMLINK: it is a symbolic link",
        10033 => "NO_GRACE: the time to claim open files is over",
        10034 => "RECLAIM_BAD: the server does not believe that it was open",
        10035 => "RECLAIM_CONFLICT: somebody else has it open",
        10036 => "BADXDR: the server cannot read the arguments",
        10038 => "OPENMODE: it is not open for this",
        10047 => "ADMIN_REVOKED: the server's administrator took it away",
        10052 => "BADSESSION: the server does not know the session",
        10055 => "CONN_NOT_BOUND_TO_SESSION",
        10063 => "SEQ_MISORDERED: a request of a slot is missing",
        10065 => "REQ_TOO_BIG: the request is too long",
        10066 => "REP_TOO_BIG: the reply would be too long",
        10068 => "RETRY_UNCACHED_REP: it was done, and the reply was not kept",
        10070 => "TOO_MANY_OPS: too many operations",
        10074 => "CLIENTID_BUSY: the client has files open",
        10078 => "DEADSESSION: the session has ended",
        10083 => "WRONG_TYPE: not for this kind of file",
        _ => "a status of NFSv4.1",
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
    /// What to do about it, behind a semicolon; empty if there is no advice.
    pub fn hint(&self) -> &'static str {
        match self {
            NfsError::Refused { status: Status::ACCES | Status::PERM, .. } => {
                "; check the permissions, and that the server does not squash this user (uid=N in the URL names another)"
            }
            NfsError::Refused { status: Status::NOSPC | Status::DQUOT, .. } => "; make room on the export",
            NfsError::Refused { status: Status::ROFS, .. } => "; export it for writing, or open the disk read-only",
            NfsError::Unreachable { .. } | NfsError::Unknown { .. } => "; check the server and the network",
            _ => "",
        }
    }

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
