//! Owns: the directory entry, the bucket stream and the hash of names.
//! Promises: a decoded name is 1..=255 bytes without '/' and NUL, and not "." or "..".
//! Must not know: which entries are believed; that takes the child's root cell.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::root_cell::ObjectType;
use super::{FormatError, prefix, value};
use crate::units::{FdId, Link};

/// Longest name, in bytes.
pub const MAX_NAME: usize = 255;

/// Whether these bytes may be a name: 1..=255 bytes, no '/', no NUL, not "." or "..".
pub fn is_name(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes.len() <= MAX_NAME
        && bytes != b"."
        && bytes != b".."
        && !bytes.iter().any(|b| matches!(b, 0 | b'/'))
}

/// Hash of a name: FNV-1a (64 bits), then the finalizer of MurmurHash3 (fmix64). The top bits choose the bucket.
pub fn name_hash(name: &[u8]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for byte in name {
        h = (h ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// An object and the link counter under which an entry or handle means it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectRef {
    /// The object.
    pub fd: FdId,
    /// Its link counter.
    pub link: Link,
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Name, see [`is_name`].
    pub name: Vec<u8>,
    /// Type of the child.
    pub object_type: ObjectType,
    /// The child. In a pending entry: as it will be once moved here.
    pub child: ObjectRef,
    /// Set in a pending entry: the entry that this one replaces once the child has moved (`Some(None)`: none).
    pub pending: Option<Option<ObjectRef>>,
    /// A move of the child to another directory has begun; never together with `pending`. The entry counts as before, but a rename
    /// within this directory changes the child's root cell first.
    pub leaving: bool,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawDirent {
    fd: U64,
    link: U64,
    object_type: u8,
    flags: u8,
    name_length: u8,
    reserved: u8,
}

const _: () = assert!(size_of::<RawDirent>() == 20);
const PENDING: u8 = 1;
const LEAVING: u8 = 2;
const NAME: &str = "directory entry";

impl Dirent {
    /// Bytes of the entry in a stream.
    pub fn encoded_len(&self) -> usize {
        size_of::<RawDirent>() + if self.pending.is_some() { 16 } else { 0 } + self.name.len()
    }

    fn encode_into(&self, stream: &mut Vec<u8>) {
        let raw = RawDirent {
            fd: self.child.fd.get().into(),
            link: self.child.link.0.into(),
            object_type: self.object_type as u8,
            flags: match (self.pending.is_some(), self.leaving) {
                (true, _) => PENDING,
                (false, true) => LEAVING,
                (false, false) => 0,
            },
            name_length: self.name.len() as u8,
            reserved: 0,
        };
        stream.extend_from_slice(raw.as_bytes());
        if let Some(replaced) = self.pending {
            stream.extend_from_slice(&replaced.map_or(0, |r| r.fd.get()).to_le_bytes());
            stream.extend_from_slice(&replaced.map_or(0, |r| r.link.0).to_le_bytes());
        }
        stream.extend_from_slice(&self.name);
    }

    fn decode(bytes: &[u8]) -> Result<(Dirent, &[u8]), FormatError> {
        let (raw, mut rest) = prefix::<RawDirent>(bytes, NAME)?;
        let fd_of = |stored: u64| value(FdId::from_stored(stored), NAME, "fd", stored);
        let child = ObjectRef { fd: fd_of(raw.fd.get())?, link: Link(raw.link.get()) };
        let object_type = value(ObjectType::from_stored(raw.object_type), NAME, "type", raw.object_type.into())?;
        let pending = match raw.flags {
            0 | LEAVING => None,
            PENDING => {
                let (replaced, tail) = prefix::<[U64; 2]>(rest, NAME)?;
                rest = tail;
                Some(match replaced[0].get() {
                    0 => None,
                    stored => Some(ObjectRef { fd: fd_of(stored)?, link: Link(replaced[1].get()) }),
                })
            }
            other => return Err(FormatError::Value { structure: NAME, field: "flags", value: other.into() }),
        };
        let length = usize::from(raw.name_length);
        let (name, rest) = rest.split_at_checked(length).ok_or(FormatError::Length {
            structure: NAME,
            needed: length,
            available: rest.len(),
        })?;
        if !is_name(name) {
            return Err(FormatError::Value { structure: NAME, field: "name", value: length as u64 });
        }
        let leaving = raw.flags == LEAVING;
        Ok((Dirent { name: name.to_vec(), object_type, child, pending, leaving }, rest))
    }
}

/// Entries one after another, as in a small directory's body.
pub fn encode_entries(entries: &[Dirent]) -> Vec<u8> {
    let mut stream = Vec::with_capacity(entries.iter().map(Dirent::encoded_len).sum());
    entries.iter().for_each(|entry| entry.encode_into(&mut stream));
    stream
}

/// Reads `count` entries.
pub fn decode_entries(mut bytes: &[u8], count: usize) -> Result<Vec<Dirent>, FormatError> {
    let mut entries = Vec::with_capacity(count.min(bytes.len() / size_of::<RawDirent>()));
    for _ in 0..count {
        let (entry, rest) = Dirent::decode(bytes)?;
        entries.push(entry);
        bytes = rest;
    }
    Ok(entries)
}

/// The stream of a bucket unit: u32 count, u8 local depth, 3 zero bytes, entries.
pub fn encode_bucket(local_depth: u8, entries: &[Dirent]) -> Vec<u8> {
    let mut stream = Vec::with_capacity(BUCKET_FIXED + entries.iter().map(Dirent::encoded_len).sum::<usize>());
    stream.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    stream.extend_from_slice(&[local_depth, 0, 0, 0]);
    entries.iter().for_each(|entry| entry.encode_into(&mut stream));
    stream
}

/// Bytes in front of a bucket's entries.
pub const BUCKET_FIXED: usize = 8;

/// Local depth and entries of a bucket stream.
pub fn decode_bucket(stream: &[u8]) -> Result<(u8, Vec<Dirent>), FormatError> {
    let (fixed, rest) = stream.split_at_checked(BUCKET_FIXED).ok_or(FormatError::Length {
        structure: "bucket",
        needed: BUCKET_FIXED,
        available: stream.len(),
    })?;
    let count = u32::from_le_bytes(fixed[..4].try_into().expect("four bytes")) as usize;
    if fixed[4] > super::body::MAX_DEPTH {
        return Err(FormatError::Value { structure: "bucket", field: "local_depth", value: fixed[4].into() });
    }
    Ok((fixed[4], decode_entries(rest, count)?))
}
