//! Owns: values of NFSv3 (RFC 1813, 2.5 and 2.6) as types.
//! Promises: no foreign bytes make a value that is not one. Must not know: procedures.

use std::fmt;

use crate::xdr::{Reader, Writer, XdrError};

/// Longest file handle in bytes (RFC 1813, 2.4: NFS3_FHSIZE).
pub const MAX_HANDLE: usize = 64;
/// Longest file handle of NFSv4.1 in bytes (RFC 8881, 3.1: NFS4_FHSIZE).
pub const MAX_HANDLE_V4: usize = 128;

/// Write verifier, create verifier or cookie verifier.
pub type Verifier = [u8; 8];

/// What a server knows a file by. It never leads to another file, even if the file is removed.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHandle {
    length: u8,
    bytes: [u8; MAX_HANDLE_V4],
}

impl FileHandle {
    /// Of at most [`MAX_HANDLE_V4`] bytes.
    ///
    /// # Errors
    /// [`XdrError::TooLong`]
    pub fn new(handle: &[u8]) -> Result<Self, XdrError> {
        let mut bytes = [0; MAX_HANDLE_V4];
        let room = bytes.get_mut(..handle.len()).ok_or(XdrError::TooLong(handle.len() as u32, MAX_HANDLE_V4))?;
        room.copy_from_slice(handle);
        Ok(Self { length: handle.len() as u8, bytes })
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Self::new(reader.opaque(MAX_HANDLE)?)
    }
}

impl fmt::Debug for FileHandle {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

/// A time of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: u32,
    /// Nanoseconds.
    pub nanoseconds: u32,
}

impl Time {
    fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(Self { seconds: reader.u32()?, nanoseconds: reader.u32()? })
    }

    pub(super) fn write(self, to: &mut Vec<u8>) {
        to.put_u32(self.seconds);
        to.put_u32(self.nanoseconds);
    }
}

/// What a file is (ftype3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// NF3REG.
    Regular,
    /// NF3DIR.
    Directory,
    /// A link, device, socket or pipe.
    Other,
}

/// Attributes of a file (fattr3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Names that it has.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of disk space.
    pub used: u64,
    /// File system.
    pub fsid: u64,
    /// Number of the file within its file system.
    pub fileid: u64,
    /// Last access; of a file made by an exclusive CREATE a part of the verifier, until somebody sets it.
    pub accessed: Time,
    /// Last change of the content.
    pub modified: Time,
    /// Last change of attributes or content.
    pub changed: Time,
}

impl Attributes {
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let kind = match reader.u32()? {
            1 => FileKind::Regular,
            2 => FileKind::Directory,
            3..=7 => FileKind::Other,
            other => return Err(XdrError::Value(other)),
        };
        let (mode, links, uid, gid) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        let (size, used, _device) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let (fsid, fileid) = (reader.u64()?, reader.u64()?);
        let (accessed, modified) = (Time::read(reader)?, Time::read(reader)?);
        let changed = Time::read(reader)?;
        Ok(Self { kind, mode, links, uid, gid, size, used, fsid, fileid, accessed, modified, changed })
    }

    /// post_op_attr.
    pub(super) fn read_optional(reader: &mut Reader<'_>) -> Result<Option<Self>, XdrError> {
        if reader.bool()? { Self::read(reader).map(Some) } else { Ok(None) }
    }

    /// wcc_data: only what comes after.
    pub(super) fn read_after(reader: &mut Reader<'_>) -> Result<Option<Self>, XdrError> {
        if reader.bool()? {
            reader.u64()?;
            Time::read(reader)?;
            Time::read(reader)?;
        }
        Self::read_optional(reader)
    }
}

/// Attributes to be set (sattr3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
}

impl NewAttributes {
    pub(super) fn write(self, to: &mut Vec<u8>) {
        to.put_bool(self.mode.is_some());
        self.mode.iter().for_each(|mode| to.put_u32(*mode));
        // Neither owner nor group.
        to.put_bool(false);
        to.put_bool(false);
        to.put_bool(self.size.is_some());
        self.size.iter().for_each(|size| to.put_u64(*size));
        // Times stay (DONT_CHANGE).
        to.put_u32(0);
        to.put_u32(0);
    }
}

/// Limits of a server (FSINFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsInfo {
    /// Most bytes of a READ.
    pub most_read: u32,
    /// Most bytes of a WRITE.
    pub most_write: u32,
    /// Largest file in bytes.
    pub most_file: u64,
}

/// Space of a file system (FSSTAT), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsStat {
    /// In all.
    pub total: u64,
    /// Free.
    pub free: u64,
    /// Free for this user.
    pub available: u64,
}
