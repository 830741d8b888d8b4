//! Owns: the body of an object: attributes, then inline data, a mapping root, directory entries or a raw device.
//! Promises: a decoded body is within the limits below; encoding gives the same bytes again.
//! Must not know: which cells carry it (`unit`), how it is committed.

use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dirent::{Dirent, decode_entries, encode_entries};
use super::header::DeviceIdentity;
use super::pointer::{pack_pb_reference, stored_at, unpack_pb_reference};
use super::unit::{UNIT_REF_BYTES, UnitRef};
use super::{FormatError, prefix, value};
use crate::units::{CellSize, UnitAddress};

/// Most bytes of a file that live in its body.
pub const MAX_INLINE: usize = 6144;
/// Most PB references of a root array (height 2).
pub const MAX_ROOT_POINTERS: usize = 512;
/// Most unit references of a root array (heights 3 and 4) or of a directory's body.
pub const MAX_ROOT_REFS: usize = 256;
/// Greatest height of a mapping.
pub const MAX_HEIGHT: u8 = 4;
/// Greatest depth of a directory: 2^16 buckets.
pub const MAX_DEPTH: u8 = 16;
/// Depth up to which the body itself holds the bucket references; beyond it holds references to inner units of 256.
pub const DIRECT_DEPTH: u8 = 8;

/// Allocation policy of a virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DiskFormat {
    /// Blocks are allocated at the first write.
    Thin = 1,
    /// Blocks are allocated at creation; granules are zeroed at the first write.
    ZeroedThick = 2,
    /// Blocks are allocated and zeroed at creation.
    EagerZeroedThick = 3,
}

impl DiskFormat {
    /// The format with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            1 => DiskFormat::Thin,
            2 => DiskFormat::ZeroedThick,
            3 => DiskFormat::EagerZeroedThick,
            _ => return None,
        })
    }
}

/// Attributes of an object. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-uid, set-gid and sticky (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of the file, of the disk, of the symlink's target; for a directory the number of its entries.
    pub size: u64,
    /// Data blocks held, at the time of this commit; a hint for du(1): a crash in the middle of a publish can leave it off.
    pub blocks: u64,
    /// Last read, as far as it was recorded.
    pub accessed_ns: i64,
    /// Last change of the content.
    pub modified_ns: i64,
    /// Last change of the attributes.
    pub changed_ns: i64,
    /// Creation.
    pub born_ns: i64,
    /// Policy of a virtual disk.
    pub disk: Option<DiskFormat>,
    /// Last known name: a hint, for rebuilding names of a lost directory. At most 255 bytes.
    pub name: Vec<u8>,
}

/// Root of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingRoot {
    /// Height 2: pointer block n covers file blocks n*P.. where P is `layout::pointers_per_block`.
    PointerBlocks(Vec<Option<UnitAddress>>),
    /// Height 3: each inner unit holds P references to pointer blocks. Height 4: one more level of inner units between.
    Inner {
        /// 3 or 4.
        height: u8,
        /// References to the first level of inner units.
        refs: Vec<Option<UnitRef>>,
    },
}

/// Raw device mapping: the LUN by identity, never by path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawDevice {
    /// What the device says of itself.
    pub identity: DeviceIdentity,
    /// Physical compatibility: commands reach the device; else only reads and writes do.
    pub physical: bool,
}

/// What follows the attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// File data, at most [`MAX_INLINE`] bytes; beyond its end the file reads as zeros.
    Inline(Vec<u8>),
    /// File or disk data in blocks.
    Mapped(MappingRoot),
    /// Target of a symlink, 1..=4095 bytes.
    Symlink(Vec<u8>),
    /// Raw device.
    Raw(RawDevice),
    /// Entries of a small directory.
    Entries(Vec<Dirent>),
    /// A directory of 2^depth buckets, indexed by the top bits of the name's hash. `refs` are the buckets when
    /// depth <= [`DIRECT_DEPTH`], else inner units of 256 bucket references each. Neighbours may share a bucket.
    Buckets {
        /// 0..=16.
        depth: u8,
        /// 2^depth bucket references, or 2^(depth-8) inner unit references. `None`: an empty bucket.
        refs: Vec<Option<UnitRef>>,
    },
}

/// A decoded body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Body {
    /// Attributes.
    pub attributes: Attributes,
    /// Content.
    pub content: Content,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawBody {
    content: u8,
    height_or_depth: u8,
    disk: u8,
    name_length: u8,
    mode: U32,
    uid: U32,
    gid: U32,
    size: U64,
    blocks: U64,
    accessed: I64,
    modified: I64,
    changed: I64,
    born: I64,
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawBody>() == 72);
const _: () = assert!(72 + 255 + MAX_INLINE <= super::layout::unit_payload(CellSize::B512));
const _: () = assert!(72 + 255 + MAX_ROOT_REFS * UNIT_REF_BYTES <= super::layout::unit_payload(CellSize::B512));

const NAME: &str = "body";
const INLINE: u8 = 1;
const MAPPED: u8 = 2;
const SYMLINK: u8 = 3;
const RAW: u8 = 4;
const ENTRIES: u8 = 5;
const BUCKETS: u8 = 6;

/// References of a directory's body at `depth`.
pub const fn bucket_refs(depth: u8) -> usize {
    if depth <= DIRECT_DEPTH { 1 << depth } else { 1 << (depth - DIRECT_DEPTH) }
}

impl Body {
    /// Decodes the stream of a body unit.
    pub fn decode(cell: CellSize, stream: &[u8]) -> Result<Body, FormatError> {
        let bad = |field, value: u64| FormatError::Value { structure: NAME, field, value };
        let (raw, rest) = prefix::<RawBody>(stream, NAME)?;
        let split = |bytes: &[u8], at: usize| {
            bytes.split_at_checked(at).map(|(a, b)| (a.to_vec(), b.to_vec())).ok_or(FormatError::Length {
                structure: NAME,
                needed: at,
                available: bytes.len(),
            })
        };
        let (name, rest) = split(rest, raw.name_length.into())?;
        let count = raw.count.get() as usize;
        let level = raw.height_or_depth;
        let bytes_of = |limit: usize| {
            if count > limit { Err(bad("count", count as u64)) } else { Ok(split(&rest, count)?.0) }
        };
        let refs_of = |limit: usize| {
            if count > limit {
                return Err(bad("count", count as u64));
            }
            (0..count)
                .map(|n| UnitRef::unpack(cell, rest.get(n * UNIT_REF_BYTES..).unwrap_or(&[])))
                .collect::<Result<Vec<_>, _>>()
        };
        let content = match (raw.content, level) {
            (INLINE, 0) => Content::Inline(bytes_of(MAX_INLINE)?),
            (MAPPED, 2) => {
                if count > MAX_ROOT_POINTERS {
                    return Err(bad("count", count as u64));
                }
                let refs = (0..count).map(|n| unpack_pb_reference(stored_at(&rest, n, NAME)?));
                Content::Mapped(MappingRoot::PointerBlocks(refs.collect::<Result<_, _>>()?))
            }
            (MAPPED, height @ 3..=MAX_HEIGHT) => {
                Content::Mapped(MappingRoot::Inner { height, refs: refs_of(MAX_ROOT_REFS)? })
            }
            (SYMLINK, 0) => Content::Symlink(bytes_of(4095)?),
            (RAW, physical @ 0..=1) => Content::Raw(RawDevice {
                identity: DeviceIdentity::new(&bytes_of(DeviceIdentity::MAX)?),
                physical: physical == 1,
            }),
            (ENTRIES, 0) => Content::Entries(decode_entries(&rest, count)?),
            (BUCKETS, depth @ 0..=MAX_DEPTH) if count == bucket_refs(depth) => {
                Content::Buckets { depth, refs: refs_of(MAX_ROOT_REFS)? }
            }
            (kind, _) => return Err(bad("content and height", u64::from(kind) << 8 | u64::from(level))),
        };
        if raw.mode.get() & !0o7777 != 0 {
            return Err(bad("mode", raw.mode.get().into()));
        }
        let disk = match raw.disk {
            0 => None,
            stored => Some(value(DiskFormat::from_stored(stored), NAME, "disk", stored.into())?),
        };
        let attributes = Attributes {
            mode: raw.mode.get(),
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            size: raw.size.get(),
            blocks: raw.blocks.get(),
            accessed_ns: raw.accessed.get(),
            modified_ns: raw.modified.get(),
            changed_ns: raw.changed.get(),
            born_ns: raw.born.get(),
            disk,
            name,
        };
        Ok(Body { attributes, content })
    }

    /// The stream. It fits a unit when the limits of this module are kept and entries were measured by the directory code.
    pub fn encode(&self) -> Vec<u8> {
        let (content, level, count, bytes) = match &self.content {
            Content::Inline(data) => (INLINE, 0, data.len(), data.clone()),
            Content::Mapped(MappingRoot::PointerBlocks(refs)) => {
                (MAPPED, 2, refs.len(), refs.iter().flat_map(|r| pack_pb_reference(*r).to_le_bytes()).collect())
            }
            Content::Mapped(MappingRoot::Inner { height, refs }) => (MAPPED, *height, refs.len(), pack_refs(refs)),
            Content::Symlink(target) => (SYMLINK, 0, target.len(), target.clone()),
            Content::Raw(raw) => (RAW, raw.physical.into(), raw.identity.bytes().len(), raw.identity.bytes().to_vec()),
            Content::Entries(entries) => (ENTRIES, 0, entries.len(), encode_entries(entries)),
            Content::Buckets { depth, refs } => (BUCKETS, *depth, refs.len(), pack_refs(refs)),
        };
        let a = &self.attributes;
        let raw = RawBody {
            content,
            height_or_depth: level,
            disk: a.disk.map_or(0, |d| d as u8),
            name_length: a.name.len() as u8,
            mode: a.mode.into(),
            uid: a.uid.into(),
            gid: a.gid.into(),
            size: a.size.into(),
            blocks: a.blocks.into(),
            accessed: a.accessed_ns.into(),
            modified: a.modified_ns.into(),
            changed: a.changed_ns.into(),
            born: a.born_ns.into(),
            count: (count as u32).into(),
            reserved: U32::ZERO,
        };
        let mut stream = raw.as_bytes().to_vec();
        stream.extend_from_slice(&a.name);
        stream.extend_from_slice(&bytes);
        stream
    }
}

/// The stream of an inner unit of unit references (or the tail of a body).
pub fn pack_refs(refs: &[Option<UnitRef>]) -> Vec<u8> {
    refs.iter().flat_map(|r| UnitRef::pack(*r)).collect()
}
