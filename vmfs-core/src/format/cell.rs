//! Owns: the 96-byte header of every cell and the cell image.
//! Promises: a `Cell` value passed magic, version, checksum and own-address checks; a changed cell never repeats an image.
//! Must not know: what the payload of a kind means, I/O.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, prefix};
use crate::units::{CellAddress, CellSize, FdId, Link, LunIndex, OpId, Seq, SlotRef, Token, Uuid};

/// Bytes of the header in front of each cell's payload.
pub const HEADER_BYTES: usize = 96;
/// First four bytes of every cell: "VMFc".
pub const CELL_MAGIC: [u8; 4] = *b"VMFc";
/// Version of the cell header and of the structures behind it.
pub const FORMAT_VERSION: u8 = 1;

/// What a cell holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CellKind {
    /// Header of a LUN, and its copy.
    Header = 1,
    /// A member of the volume.
    Member = 2,
    /// A slot: heartbeat of a host.
    Heartbeat = 3,
    /// Places a host allocates from or marks in.
    Arena = 4,
    /// Part of the block table.
    BlockTable = 5,
    /// Part of a unit container's table.
    UnitTable = 6,
    /// Root cell of an object.
    Root = 7,
    /// A formatted cell of a unit that holds nothing yet.
    Blank = 8,
    /// Part of a body.
    Body = 9,
    /// Block pointers, changed in place by the lock holder.
    PointerBlock = 10,
    /// Part of an inner mapping unit.
    Inner = 11,
    /// Part of a directory bucket.
    Bucket = 12,
    /// Stands in the place of a cell that has left its LUN.
    Moved = 13,
    /// Part of the map of a window, to which the cells of another LUN have moved.
    WindowMap = 14,
}

impl CellKind {
    /// The kind with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            1 => CellKind::Header,
            2 => CellKind::Member,
            3 => CellKind::Heartbeat,
            4 => CellKind::Arena,
            5 => CellKind::BlockTable,
            6 => CellKind::UnitTable,
            7 => CellKind::Root,
            8 => CellKind::Blank,
            9 => CellKind::Body,
            10 => CellKind::PointerBlock,
            11 => CellKind::Inner,
            12 => CellKind::Bucket,
            13 => CellKind::Moved,
            14 => CellKind::WindowMap,
            _ => return None,
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: u8,
    version: u8,
    cell_shift: u8,
    reserved: u8,
    crc: U32,
    index: U32,
    volume: [u8; 16],
    address: U64,
    seq: U64,
    op_id: [u8; 16],
    writer: U64,
    owner: U64,
    link: U64,
    token: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const CRC_OFFSET: usize = std::mem::offset_of!(RawHeader, crc);
const _: () = assert!(CRC_OFFSET == 8);

/// The decoded header of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellHeader {
    /// What the payload is.
    pub kind: CellKind,
    /// Where the cell lies.
    pub address: CellAddress,
    /// +1 at each change.
    pub seq: Seq,
    /// New random bits at each change.
    pub op_id: OpId,
    /// The incarnation that made this image; `SlotRef::NOBODY` for mkfs.
    pub writer: SlotRef,
    /// The object that the cell belongs to, if it belongs to one.
    pub owner: Option<FdId>,
    /// The object's link counter when the cell was written (a root cell: its own counter).
    pub link: Link,
    /// Index of the unit, pointer block or bucket in its object; 0 elsewhere.
    pub index: u32,
    /// Lock token under which a PB cell was last written; 0 elsewhere.
    pub token: Token,
}

/// What a reader knows about a cell before it reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellContext {
    /// The volume's UUID.
    pub volume: Uuid,
    /// The volume's cell size.
    pub cell_size: CellSize,
}

/// A cell image that passed its checks. Cheap to move, compares byte by byte.
#[derive(Clone, PartialEq, Eq)]
pub struct Cell {
    header: CellHeader,
    image: Box<[u8]>,
}

impl std::fmt::Debug for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cell").field("header", &self.header).finish_non_exhaustive()
    }
}

impl Cell {
    /// Checks `image`, read from `at`: length, magic, version, checksum, volume and own address. Kind and owner are the
    /// caller's to check ([`Cell::expect_kind`], [`Cell::expect_owner`]).
    pub fn decode(context: &CellContext, at: CellAddress, image: &[u8]) -> Result<Cell, FormatError> {
        let (raw, _) = prefix::<RawHeader>(image, "cell")?;
        if image.len() != context.cell_size.bytes() {
            return Err(FormatError::Length {
                structure: "cell",
                needed: context.cell_size.bytes(),
                available: image.len(),
            });
        }
        if raw.magic != CELL_MAGIC {
            return Err(FormatError::Magic { at, found: raw.magic });
        }
        let (stored, computed) = (raw.crc.get(), checksum(image));
        if stored != computed {
            return Err(FormatError::Checksum { at, stored, computed });
        }
        let mismatch = |field, found: String, expected: String| FormatError::Mismatch { at, field, found, expected };
        if raw.version != FORMAT_VERSION {
            return Err(mismatch("version", raw.version.to_string(), FORMAT_VERSION.to_string()));
        }
        if raw.cell_shift != context.cell_size.shift() {
            return Err(mismatch("cell_shift", raw.cell_shift.to_string(), context.cell_size.shift().to_string()));
        }
        if raw.volume != context.volume.0 {
            return Err(mismatch("volume", Uuid(raw.volume).to_string(), context.volume.to_string()));
        }
        if raw.address.get() != at.pack() {
            return Err(mismatch("address", format!("{:#x}", raw.address.get()), format!("{:#x}", at.pack())));
        }
        let kind = super::value(CellKind::from_stored(raw.kind), "cell", "kind", raw.kind.into())?;
        let writer = super::value(SlotRef::unpack(raw.writer.get()), "cell", "writer", raw.writer.get())?;
        let owner = match raw.owner.get() {
            0 => None,
            stored => Some(super::value(FdId::from_stored(stored), "cell", "owner", stored)?),
        };
        let header = CellHeader {
            kind,
            address: at,
            seq: Seq(raw.seq.get()),
            op_id: OpId(raw.op_id),
            writer,
            owner,
            link: Link(raw.link.get()),
            index: raw.index.get(),
            token: Token(raw.token.get()),
        };
        Ok(Cell { header, image: image.into() })
    }

    /// Builds an image from a header and a payload; bytes of the payload that are not given are zero.
    ///
    /// # Panics
    /// When `payload` is longer than a cell's payload: encoders size theirs by [`CellSize::payload`].
    pub fn encode(context: &CellContext, header: CellHeader, payload: &[u8]) -> Cell {
        let mut image = vec![0u8; context.cell_size.bytes()].into_boxed_slice();
        Cell::encode_into(context, &header, payload, &mut image);
        Cell { header, image }
    }

    /// As [`Cell::encode`], into `image`, which is one cell long; for writing many cells with one command.
    ///
    /// # Panics
    /// When `image` is not one cell long or `payload` is longer than a cell's payload.
    pub fn encode_into(context: &CellContext, header: &CellHeader, payload: &[u8], image: &mut [u8]) {
        assert!(payload.len() <= context.cell_size.payload(), "a payload of {} bytes fits no cell", payload.len());
        assert_eq!(image.len(), context.cell_size.bytes(), "an image is one cell long");
        let raw = RawHeader {
            magic: CELL_MAGIC,
            kind: header.kind as u8,
            version: FORMAT_VERSION,
            cell_shift: context.cell_size.shift(),
            reserved: 0,
            crc: U32::ZERO,
            index: header.index.into(),
            volume: context.volume.0,
            address: header.address.pack().into(),
            seq: header.seq.0.into(),
            op_id: header.op_id.0,
            writer: header.writer.pack().into(),
            owner: header.owner.map_or(0, FdId::get).into(),
            link: header.link.0.into(),
            token: header.token.0.into(),
        };
        let (head, tail) = image.split_at_mut(HEADER_BYTES);
        head.copy_from_slice(raw.as_bytes());
        tail[..payload.len()].copy_from_slice(payload);
        tail[payload.len()..].fill(0);
        let crc = checksum(image);
        image[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// The decoded header.
    pub fn header(&self) -> &CellHeader {
        &self.header
    }

    /// Where the cell lies.
    pub fn address(&self) -> CellAddress {
        self.header.address
    }

    /// The whole image, header included; one cell long.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    /// The bytes behind the header.
    pub fn payload(&self) -> &[u8] {
        &self.image[HEADER_BYTES..]
    }

    /// The error of a cell that is not of `kind`, if it is not.
    pub fn expect_kind(&self, kind: CellKind) -> Result<(), FormatError> {
        if self.header.kind == kind {
            return Ok(());
        }
        Err(FormatError::Mismatch {
            at: self.address(),
            field: "kind",
            found: format!("{:?}", self.header.kind),
            expected: format!("{kind:?}"),
        })
    }

    /// The error of a cell that is not unit or PB `index` of incarnation `link` of `owner`, if it is not.
    pub fn expect_owner(&self, owner: FdId, link: Link, index: u32) -> Result<(), FormatError> {
        let header = &self.header;
        let mismatch = |field, found: String, expected: String| FormatError::Mismatch {
            at: self.address(),
            field,
            found,
            expected,
        };
        if header.owner != Some(owner) {
            return Err(mismatch("owner", header.owner.map_or("none".into(), |fd| fd.to_string()), owner.to_string()));
        }
        if header.link > link {
            return Err(mismatch("link", header.link.to_string(), format!("{link} or older")));
        }
        if header.index != index {
            return Err(mismatch("index", header.index.to_string(), index.to_string()));
        }
        Ok(())
    }
}

/// crc32c of a cell with its crc field taken as zero.
fn checksum(image: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&image[..CRC_OFFSET]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &image[CRC_OFFSET + 4..])
}

/// What a probe of an unknown LUN can say about the cell at `at` without knowing the volume: volume UUID and cell size.
///
/// The checksum decides between the two cell sizes, so `bytes` holds at least 4096 bytes from `at`.
pub fn probe(lun_offset: u64, bytes: &[u8]) -> Result<(CellContext, LunIndex), FormatError> {
    let (raw, _) = prefix::<RawHeader>(bytes, "cell")?;
    let nowhere = LunIndex::new(1).expect("1 is a member index");
    let lun = LunIndex::new((raw.address.get() >> 56) as u8);
    let at = CellAddress { lun: lun.unwrap_or(nowhere), offset: lun_offset };
    if raw.magic != CELL_MAGIC {
        return Err(FormatError::Magic { at, found: raw.magic });
    }
    let lun = super::value(lun, "cell", "address", raw.address.get())?;
    let cell_size = super::value(CellSize::from_shift(raw.cell_shift), "cell", "cell_shift", raw.cell_shift.into())?;
    let context = CellContext { volume: Uuid(raw.volume), cell_size };
    let image = bytes.get(..cell_size.bytes()).ok_or(FormatError::Length {
        structure: "cell",
        needed: cell_size.bytes(),
        available: bytes.len(),
    })?;
    Cell::decode(&context, at, image)?;
    Ok((context, lun))
}
