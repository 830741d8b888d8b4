//! Owns: the arena cell: the places where an incarnation may have left unfinished work.
//! Promises: recovery that visits the listed places (or all, when `anywhere` is set) finds everything.
//! Must not know: what is in the places.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::FormatError;
use super::cell::HEADER_BYTES;
use crate::units::{CellSize, Generation};

/// A place: a block table cell, a unit container or an FD container of the same LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// The block table cell with this number (`LunLayout::table_cell`).
    TableCell(u64),
    /// The unit container in this block: its table.
    UnitContainer(u64),
    /// The FD container in this block: its root cells.
    FdContainer(u64),
}

impl Place {
    /// As stored: kind 1, 2 or 3 in the top 8 bits, number below.
    pub fn pack(self) -> u64 {
        match self {
            Place::TableCell(n) => (1 << 56) | n,
            Place::UnitContainer(n) => (2 << 56) | n,
            Place::FdContainer(n) => (3 << 56) | n,
        }
    }

    fn unpack(stored: u64) -> Option<Place> {
        let number = stored & ((1 << 56) - 1);
        match stored >> 56 {
            1 => Some(Place::TableCell(number)),
            2 => Some(Place::UnitContainer(number)),
            3 => Some(Place::FdContainer(number)),
            _ => None,
        }
    }
}

const FIXED: usize = 16;

/// The decoded payload of an arena cell: u64 generation, u16 count, u16 flags (bit 0 anywhere), u32 zero, then places of 8 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arena {
    /// Generation of the slot whose places these are.
    pub generation: Generation,
    /// The list overflowed: look everywhere.
    pub anywhere: bool,
    /// The places, at most [`Arena::capacity`].
    pub places: Vec<Place>,
}

impl Arena {
    /// Most places of one arena cell: 50 or 498.
    pub const fn capacity(cell: CellSize) -> usize {
        (cell.bytes() - HEADER_BYTES - FIXED) / 8
    }

    /// Decodes a payload.
    pub fn decode(cell: CellSize, payload: &[u8]) -> Result<Arena, FormatError> {
        const NAME: &str = "arena";
        if payload.len() < FIXED {
            return Err(FormatError::Length { structure: NAME, needed: FIXED, available: payload.len() });
        }
        let generation = u64::from_le_bytes(payload[..8].try_into().expect("eight bytes"));
        let count = usize::from(u16::from_le_bytes([payload[8], payload[9]]));
        let flags = u16::from_le_bytes([payload[10], payload[11]]);
        if count > Arena::capacity(cell) {
            return Err(FormatError::Value { structure: NAME, field: "count", value: count as u64 });
        }
        if flags > 1 {
            return Err(FormatError::Value { structure: NAME, field: "flags", value: flags.into() });
        }
        let places = (0..count)
            .map(|nth| {
                let stored = super::pointer::stored_at(&payload[FIXED..], nth, NAME)?;
                super::value(Place::unpack(stored), NAME, "place", stored)
            })
            .collect::<Result<_, _>>()?;
        Ok(Arena { generation: Generation(generation), anywhere: flags & 1 == 1, places })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(FIXED + self.places.len() * 8);
        payload.extend_from_slice(&self.generation.0.to_le_bytes());
        payload.extend_from_slice(&(self.places.len() as u16).to_le_bytes());
        payload.extend_from_slice(&u16::from(self.anywhere).to_le_bytes());
        payload.extend_from_slice(&[0; 4]);
        for place in &self.places {
            payload.extend_from_slice(U64::new(place.pack()).as_bytes());
        }
        payload
    }
}
