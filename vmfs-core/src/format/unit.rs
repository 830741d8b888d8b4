//! Owns: the 16-byte reference to an immutable unit, and how a byte stream is cut into the unit's cells.
//! Promises: a stream that is read back through a reference is the stream that was written, or an error.
//! Must not know: what the stream means.

use super::{FormatError, value};
use crate::units::{BlockNo, CellSize, LunIndex, UnitAddress};

/// Bytes of a stored reference.
pub const UNIT_REF_BYTES: usize = 16;

/// Reference to a unit whose content never changes: body, inner mapping unit, directory bucket.
///
/// Stored: u64 {used cells in bits 0..5, zero 5..8, unit in bits 8..20, block in bits 20..56, LUN index in bits 56..64}, u32 crc32c
/// over the images of the used cells in order, u32 birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnitRef {
    /// The unit.
    pub at: UnitAddress,
    /// Cells in use, from the unit's first: 1..=16.
    pub used_cells: u8,
    /// crc32c over the images of the used cells, headers included, one after another.
    pub crc: u32,
    /// Low 32 bits of the root cell's `seq` in the image that the commit which made the unit reachable replaced.
    pub birth: u32,
}

impl UnitRef {
    /// As stored; `None` is 16 zero bytes.
    pub fn pack(reference: Option<UnitRef>) -> [u8; UNIT_REF_BYTES] {
        let mut bytes = [0; UNIT_REF_BYTES];
        if let Some(r) = reference {
            let place = (u64::from(r.at.lun.get()) << 56)
                | (r.at.block.get() << 20)
                | (u64::from(r.at.unit) << 8)
                | u64::from(r.used_cells);
            bytes[..8].copy_from_slice(&place.to_le_bytes());
            bytes[8..12].copy_from_slice(&r.crc.to_le_bytes());
            bytes[12..].copy_from_slice(&r.birth.to_le_bytes());
        }
        bytes
    }

    /// From its stored form.
    pub fn unpack(cell: CellSize, bytes: &[u8]) -> Result<Option<UnitRef>, FormatError> {
        let bytes: &[u8; UNIT_REF_BYTES] =
            bytes.get(..UNIT_REF_BYTES).and_then(|b| b.try_into().ok()).ok_or(FormatError::Length {
                structure: "unit reference",
                needed: UNIT_REF_BYTES,
                available: bytes.len(),
            })?;
        if *bytes == [0; UNIT_REF_BYTES] {
            return Ok(None);
        }
        let place = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let used = place & 0xff;
        if used == 0 || used > cell.cells_per_unit() as u64 {
            return Err(FormatError::Value { structure: "unit reference", field: "used_cells", value: used });
        }
        let lun = value(LunIndex::new((place >> 56) as u8), "unit reference", "lun", place >> 56)?;
        let block = BlockNo::new((place >> 20) & ((1 << BlockNo::BITS) - 1)).expect("36 bits were masked");
        Ok(Some(UnitRef {
            at: UnitAddress { lun, block, unit: ((place >> 8) & 0xfff) as u16 },
            used_cells: used as u8,
            crc: u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
            birth: u32::from_le_bytes(bytes[12..].try_into().expect("four bytes")),
        }))
    }
}

/// Cells that a stream of `bytes` bytes needs: at least one. None when it fits no unit.
pub fn cells_for(cell: CellSize, bytes: usize) -> Option<u8> {
    let cells = bytes.div_ceil(cell.payload()).max(1);
    if cells <= cell.cells_per_unit() { Some(cells as u8) } else { None }
}
