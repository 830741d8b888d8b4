//! Owns: a window: the place on a carrier LUN where the cells of a LUN that was taken out lie, piece by piece.
//! Promises: an offset of the former LUN leads to one place in the window, or to none. Must not know: how cells got there.

use std::rc::Rc;

use crate::buf::AlignedBuf;
use crate::error::FsError;
use crate::format::moved::{MapCell, PIECE_ALIGNMENT, Piece};
use crate::format::{Cell, CellContext, CellKind, FormatError};
use crate::lun::{Lun, LunError};
use crate::units::{CellAddress, CellSize, LunIndex};

/// A piece and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// What it holds of the former LUN.
    pub piece: Piece,
    /// Byte offset on the carrier.
    pub to: u64,
}

/// Bytes of the map of so many pieces, at the beginning of a window.
pub fn map_bytes(cell: CellSize, pieces: usize) -> u64 {
    let cells = pieces.div_ceil(MapCell::most(cell)).max(1);
    ((cells * cell.bytes()) as u64).next_multiple_of(PIECE_ALIGNMENT)
}

/// Bytes of a window with these pieces.
pub fn window_bytes(cell: CellSize, pieces: &[Piece]) -> u64 {
    map_bytes(cell, pieces.len()) + pieces.iter().map(|piece| piece.length).sum::<u64>()
}

/// The pieces in their places: behind the map, one after another.
pub fn place(cell: CellSize, window: u64, pieces: &[Piece]) -> Vec<Placed> {
    let mut to = window + map_bytes(cell, pieces.len());
    let each = pieces.iter().map(|piece| {
        let placed = Placed { piece: *piece, to };
        to += piece.length;
        placed
    });
    each.collect()
}

/// Where byte `offset` of the former LUN is, and how many bytes from there on lie together.
pub fn find(pieces: &[Placed], offset: u64) -> Option<(u64, u64)> {
    let placed = pieces.iter().find(|p| offset >= p.piece.from && offset - p.piece.from < p.piece.length)?;
    let into = offset - placed.piece.from;
    Some((placed.to + into, placed.piece.length - into))
}

/// The payloads of a map's cells.
pub fn map_cells(cell: CellSize, lun: LunIndex, lun_bytes: u64, pieces: &[Piece]) -> Vec<Vec<u8>> {
    let total = pieces.len() as u32;
    let cells = pieces.chunks(MapCell::most(cell));
    cells.map(|pieces| MapCell { lun, lun_bytes, total, pieces: pieces.to_vec() }.encode()).collect()
}

/// A window that was opened.
pub struct Window {
    /// Where it begins.
    pub at: CellAddress,
    /// The LUN that it lies on.
    pub carrier: Rc<dyn Lun>,
    /// The LUN whose cells it holds.
    pub lun: LunIndex,
    /// Size of that LUN in bytes.
    pub lun_bytes: u64,
    /// Where what is.
    pub pieces: Vec<Placed>,
}

impl Window {
    /// Reads the map of the window at `at` of `carrier`.
    ///
    /// # Errors
    /// [`FsError::Corrupt`]: there is no sound map.
    pub async fn open(context: &CellContext, carrier: Rc<dyn Lun>, at: CellAddress) -> Result<Window, FsError> {
        let structure = || format!("window map {at} of {}", carrier.name());
        let corrupt = |cause| FsError::Corrupt { structure: structure(), cause };
        let bad = |field, value| FormatError::Value { structure: "window map", field, value };
        let size = context.cell_size.bytes();
        let decode = |nth: usize, bytes: &AlignedBuf| {
            let at = CellAddress { offset: at.offset + (nth * size) as u64, ..at };
            let image = bytes.get(nth * size..(nth + 1) * size).unwrap_or_default();
            let cell = Cell::decode(context, at, image)?;
            cell.expect_kind(CellKind::WindowMap)?;
            MapCell::decode(context.cell_size, cell.payload())
        };
        let first = carrier.read(at.offset, PIECE_ALIGNMENT as usize).await?;
        let head = decode(0, &first).map_err(corrupt)?;
        let total = head.total as usize;
        let bytes = map_bytes(context.cell_size, total);
        if bytes > carrier.bytes() {
            return Err(corrupt(bad("total", total as u64)));
        }
        let whole = carrier.read(at.offset, bytes as usize).await?;
        let mut pieces = Vec::new();
        for nth in 0..total.div_ceil(MapCell::most(context.cell_size)) {
            let cell = decode(nth, &whole).map_err(corrupt)?;
            if (cell.lun, cell.lun_bytes, cell.total) != (head.lun, head.lun_bytes, head.total) {
                return Err(corrupt(bad("lun", cell.lun.get().into())));
            }
            pieces.extend(cell.pieces);
        }
        let end = at.offset.checked_add(window_bytes(context.cell_size, &pieces));
        if pieces.len() != total || end.is_none_or(|end| end > carrier.bytes()) {
            return Err(corrupt(bad("total", total as u64)));
        }
        let pieces = place(context.cell_size, at.offset, &pieces);
        Ok(Window { at, carrier, lun: head.lun, lun_bytes: head.lun_bytes, pieces })
    }

    /// Whether it holds byte `offset` of the former LUN.
    pub fn holds(&self, offset: u64) -> bool {
        find(&self.pieces, offset).is_some()
    }

    /// End of the window, in bytes from the carrier's start.
    pub fn end(&self) -> u64 {
        self.pieces.last().map_or(self.at.offset, |last| last.to + last.piece.length)
    }

    /// Reads a range of the former LUN; what did not come along reads as zeros.
    pub async fn read(&self, offset: u64, length: usize) -> Result<AlignedBuf, LunError> {
        if let Some((to, together)) = find(&self.pieces, offset)
            && together >= length as u64
        {
            return self.carrier.read(to, length).await;
        }
        let mut buf = AlignedBuf::zeroed(length);
        let mut done = 0;
        while done < length {
            let left = length - done;
            let some = match find(&self.pieces, offset + done as u64) {
                Some((to, together)) => {
                    let some = left.min(together as usize);
                    buf[done..done + some].copy_from_slice(&self.carrier.read(to, some).await?);
                    some
                }
                None => left.min(PIECE_ALIGNMENT as usize - (offset as usize + done) % PIECE_ALIGNMENT as usize),
            };
            done += some;
        }
        Ok(buf)
    }
}
