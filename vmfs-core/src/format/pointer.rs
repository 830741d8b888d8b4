//! Owns: the 8-byte block pointer and the payload of a PB cell.
//! Promises: an absent pointer is all zeros; a present one names a LUN of the format.
//! Must not know: which blocks exist on a LUN, who holds the lock.

use super::{FormatError, value};
use crate::units::{BlockAddress, BlockNo, LunIndex, UnitAddress};

/// Bit set of written granules of a block: bit g is granule g.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Granules(pub u16);

impl Granules {
    /// No granule was written: the block reads as zeros.
    pub const NONE: Granules = Granules(0);
    /// Every granule was written.
    pub const ALL: Granules = Granules(u16::MAX);

    /// Whether granule `g` (0..16) was written.
    pub const fn has(self, g: u32) -> bool {
        self.0 >> g & 1 == 1
    }

    /// These and those.
    #[must_use]
    pub const fn union(self, other: Granules) -> Granules {
        Granules(self.0 | other.0)
    }

    /// These without those.
    #[must_use]
    pub const fn without(self, other: Granules) -> Granules {
        Granules(self.0 & !other.0)
    }

    /// Granules `first..end` (0..=16).
    #[must_use]
    pub const fn range(first: u32, end: u32) -> Granules {
        if end <= first { Granules(0) } else { Granules((((1u32 << (end - first)) - 1) << first) as u16) }
    }
}

/// Pointer to a data block.
///
/// Stored: bit 0 present, bit 1 shared, bits 2..4 zero, bits 4..40 block, bits 40..56 granules, bits 56..64 LUN index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockPointer {
    /// The block.
    pub at: BlockAddress,
    /// Granules that were written; the others read as zeros.
    pub valid: Granules,
    /// The block is shared with another object and is copied before it is written.
    pub shared: bool,
}

const PRESENT: u64 = 1;
const SHARED: u64 = 2;

fn pack(lun: LunIndex, block: BlockNo, sixteen: u16, flags: u64) -> u64 {
    (u64::from(lun.get()) << 56) | (u64::from(sixteen) << 40) | (block.get() << 4) | flags
}

fn unpack(stored: u64, structure: &'static str) -> Result<Option<(LunIndex, BlockNo, u16, u64)>, FormatError> {
    if stored == 0 {
        return Ok(None);
    }
    let flags = stored & 0xf;
    if flags & PRESENT == 0 || flags & !(PRESENT | SHARED) != 0 {
        return Err(FormatError::Value { structure, field: "flags", value: flags });
    }
    let lun = value(LunIndex::new((stored >> 56) as u8), structure, "lun", stored >> 56)?;
    let block = BlockNo::new((stored >> 4) & ((1 << BlockNo::BITS) - 1)).expect("36 bits were masked");
    Ok(Some((lun, block, (stored >> 40) as u16, flags)))
}

impl BlockPointer {
    /// As stored.
    pub fn pack(pointer: Option<BlockPointer>) -> u64 {
        pointer.map_or(0, |p| pack(p.at.lun, p.at.block, p.valid.0, PRESENT | if p.shared { SHARED } else { 0 }))
    }

    /// From its stored form; `None` is a hole.
    pub fn unpack(stored: u64) -> Result<Option<BlockPointer>, FormatError> {
        Ok(unpack(stored, "block pointer")?.map(|(lun, block, valid, flags)| BlockPointer {
            at: BlockAddress { lun, block },
            valid: Granules(valid),
            shared: flags & SHARED != 0,
        }))
    }
}

/// Reference to a pointer block: the same 8 bytes, with the unit number in place of the granules. Never shared.
pub fn pack_pb_reference(unit: Option<UnitAddress>) -> u64 {
    unit.map_or(0, |u| pack(u.lun, u.block, u.unit, PRESENT))
}

/// The pointer block that a stored reference names; `None`: all of its range is a hole.
pub fn unpack_pb_reference(stored: u64) -> Result<Option<UnitAddress>, FormatError> {
    match unpack(stored, "pointer block reference")? {
        Some((_, _, _, flags)) if flags & SHARED != 0 => {
            Err(FormatError::Value { structure: "pointer block reference", field: "flags", value: flags })
        }
        found => Ok(found.map(|(lun, block, unit, _)| UnitAddress { lun, block, unit })),
    }
}

/// Reads pointer `nth` of a PB cell's payload.
pub fn pointer_at(payload: &[u8], nth: usize) -> Result<Option<BlockPointer>, FormatError> {
    BlockPointer::unpack(stored_at(payload, nth, "PB cell")?)
}

/// Reads the `nth` stored 8-byte value of a payload.
pub fn stored_at(payload: &[u8], nth: usize, structure: &'static str) -> Result<u64, FormatError> {
    let end = (nth + 1) * 8;
    let bytes =
        payload.get(nth * 8..end).ok_or(FormatError::Length { structure, needed: end, available: payload.len() })?;
    Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
}
