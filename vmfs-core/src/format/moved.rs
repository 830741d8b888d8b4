//! Owns: what stands in the place of a cell that has left its LUN, and the map of the window to which it went.
//! Promises: a cell that has left says where it is; a decoded map has pieces in order that fit its window.
//! Must not know: how cells are moved, which LUNs are there.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, prefix, value};
use crate::units::{CellAddress, CellSize, LunIndex};

/// Offsets and lengths of pieces, and the place of the first one in a window, are multiples of this.
pub const PIECE_ALIGNMENT: u64 = 4096;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawMoved {
    carrier: u8,
    reserved: [u8; 7],
    offset: U64,
    window: U64,
}

const _: () = assert!(size_of::<RawMoved>() == 24);

/// Where a cell is that has left its LUN: the payload of what stands in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The LUN that carries it.
    pub carrier: LunIndex,
    /// Byte offset of the cell there.
    pub offset: u64,
    /// Byte offset there of the window that it is in.
    pub window: u64,
}

impl Moved {
    /// Decodes a payload.
    pub fn decode(payload: &[u8]) -> Result<Moved, FormatError> {
        const NAME: &str = "moved cell";
        let (raw, _) = prefix::<RawMoved>(payload, NAME)?;
        let moved = Moved {
            carrier: value(LunIndex::new(raw.carrier), NAME, "carrier", raw.carrier.into())?,
            offset: raw.offset.get(),
            window: raw.window.get(),
        };
        if moved.window >= moved.offset || moved.offset >> CellAddress::OFFSET_BITS != 0 {
            return Err(FormatError::Value { structure: NAME, field: "offset", value: moved.offset });
        }
        Ok(moved)
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawMoved {
            carrier: self.carrier.get(),
            reserved: [0; 7],
            offset: self.offset.into(),
            window: self.window.into(),
        };
        raw.as_bytes().to_vec()
    }
}

/// A range of a LUN that a window holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Byte offset on the LUN.
    pub from: u64,
    /// Bytes.
    pub length: u64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawMap {
    lun: u8,
    reserved: u8,
    here: U16,
    total: U32,
    lun_bytes: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPiece {
    from: U64,
    length: U64,
}

const _: () = assert!(size_of::<RawMap>() == 16 && size_of::<RawPiece>() == 16);

/// One cell of a window's map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapCell {
    /// The LUN whose cells the window holds.
    pub lun: LunIndex,
    /// Size that this LUN had, in bytes.
    pub lun_bytes: u64,
    /// Pieces of the whole map, in all its cells.
    pub total: u32,
    /// Pieces that this cell names.
    pub pieces: Vec<Piece>,
}

impl MapCell {
    /// Pieces that one cell names at most: 25 or 249.
    pub const fn most(cell: CellSize) -> usize {
        (cell.payload() - size_of::<RawMap>()) / size_of::<RawPiece>()
    }

    /// Decodes a payload.
    pub fn decode(cell: CellSize, payload: &[u8]) -> Result<MapCell, FormatError> {
        const NAME: &str = "window map";
        let (raw, mut rest) = prefix::<RawMap>(payload, NAME)?;
        let bad = |field, value| FormatError::Value { structure: NAME, field, value };
        let here = usize::from(raw.here.get());
        if here > MapCell::most(cell) {
            return Err(bad("here", here as u64));
        }
        let lun_bytes = raw.lun_bytes.get();
        if lun_bytes >> CellAddress::OFFSET_BITS != 0 {
            return Err(bad("lun_bytes", lun_bytes));
        }
        let mut pieces = Vec::with_capacity(here);
        for _ in 0..here {
            let (piece, tail) = prefix::<RawPiece>(rest, NAME)?;
            let (from, length) = (piece.from.get(), piece.length.get());
            let fits = from.checked_add(length).is_some_and(|end| end <= lun_bytes);
            if from % PIECE_ALIGNMENT != 0 || length % PIECE_ALIGNMENT != 0 || length == 0 || !fits {
                return Err(bad("piece", from));
            }
            pieces.push(Piece { from, length });
            rest = tail;
        }
        let lun = value(LunIndex::new(raw.lun), NAME, "lun", raw.lun.into())?;
        Ok(MapCell { lun, lun_bytes, total: raw.total.get(), pieces })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawMap {
            lun: self.lun.get(),
            reserved: 0,
            here: (self.pieces.len() as u16).into(),
            total: self.total.into(),
            lun_bytes: self.lun_bytes.into(),
        };
        let mut payload = raw.as_bytes().to_vec();
        for piece in &self.pieces {
            let raw = RawPiece { from: piece.from.into(), length: piece.length.into() };
            payload.extend_from_slice(raw.as_bytes());
        }
        payload
    }
}
