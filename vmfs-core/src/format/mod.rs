//! Owns: the on-disk format, one structure a file; `docs/FORMAT.md` is its text.
//! Promises: decoding foreign bytes never panics and yields a typed error; what is encoded decodes to the same value.
//! Must not know: I/O, time, other hosts. It only knows `units`.

pub mod arena;
pub mod body;
pub mod cell;
pub mod dirent;
pub mod header;
pub mod heartbeat;
pub mod layout;
pub mod member;
pub mod moved;
pub mod pointer;
pub mod root_cell;
pub mod table_entry;
pub mod unit;

pub use cell::{Cell, CellContext, CellHeader, CellKind, HEADER_BYTES};

use crate::units::CellAddress;

/// Why bytes are not the structure that was expected. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The cell does not begin with the format's magic.
    #[error("cell {at}: no cell of this format (magic {found:02x?})")]
    Magic {
        /// Where it was read.
        at: CellAddress,
        /// The first four bytes.
        found: [u8; 4],
    },
    /// The checksum over the cell does not match.
    #[error("cell {at}: checksum is {stored:#010x}, computed {computed:#010x}")]
    Checksum {
        /// Where it was read.
        at: CellAddress,
        /// What the cell says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// A header field differs from what the reader knows must be there.
    #[error("cell {at}: {field} is {found}, expected {expected}")]
    Mismatch {
        /// Where it was read.
        at: CellAddress,
        /// The field's name in FORMAT.md.
        field: &'static str,
        /// What was read.
        found: String,
        /// What must be there.
        expected: String,
    },
    /// A field holds a value that the format does not have.
    #[error("{structure}: {field} has the value {value}, which the format does not have")]
    Value {
        /// The structure's name in FORMAT.md.
        structure: &'static str,
        /// The field's name in FORMAT.md.
        field: &'static str,
        /// The value, as read.
        value: u64,
    },
    /// A structure ends before its last field, or a count exceeds its container.
    #[error("{structure}: {needed} bytes are needed, {available} are there")]
    Length {
        /// The structure's name in FORMAT.md.
        structure: &'static str,
        /// What the fields say.
        needed: usize,
        /// What there is.
        available: usize,
    },
}

pub(crate) fn value<T>(
    found: Option<T>,
    structure: &'static str,
    field: &'static str,
    raw: u64,
) -> Result<T, FormatError> {
    found.ok_or(FormatError::Value { structure, field, value: raw })
}

pub(crate) fn prefix<'a, T>(bytes: &'a [u8], structure: &'static str) -> Result<(&'a T, &'a [u8]), FormatError>
where
    T: zerocopy::FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    T::ref_from_prefix(bytes).map_err(|_| FormatError::Length {
        structure,
        needed: size_of::<T>(),
        available: bytes.len(),
    })
}
