//! Owns: the numbers of the format as types that cannot be mistaken for one another.
//! Promises: a value of these types is within the range that the format can store.
//! Must not know: bytes on disk, I/O, time.

use std::fmt;

/// Size of the unit of compare-and-write: one logical block of every LUN of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CellSize {
    /// 512-byte logical blocks.
    B512,
    /// 4096-byte logical blocks.
    B4096,
}

impl CellSize {
    /// Bytes of a cell: 512 or 4096.
    pub const fn bytes(self) -> usize {
        match self {
            CellSize::B512 => 512,
            CellSize::B4096 => 4096,
        }
    }

    /// Base-2 logarithm of [`CellSize::bytes`]: 9 or 12.
    pub const fn shift(self) -> u8 {
        match self {
            CellSize::B512 => 9,
            CellSize::B4096 => 12,
        }
    }

    /// The cell size with this base-2 logarithm, if the format has it.
    pub const fn from_shift(shift: u8) -> Option<Self> {
        match shift {
            9 => Some(CellSize::B512),
            12 => Some(CellSize::B4096),
            _ => None,
        }
    }

    /// Bytes of a cell behind its header.
    pub const fn payload(self) -> usize {
        self.bytes() - crate::format::HEADER_BYTES
    }

    /// Cells of one 8 KiB unit: 16 or 2.
    pub const fn cells_per_unit(self) -> usize {
        UNIT_BYTES as usize / self.bytes()
    }
}

/// Bytes of a unit, the piece of a unit container (8 KiB).
pub const UNIT_BYTES: u64 = 8192;
/// Granules of a block: the grain of "has this been written".
pub const GRANULES_PER_BLOCK: u64 = 16;
/// Most members of one volume.
pub const MAX_MEMBERS: usize = 254;
/// Slots (hosts) of each LUN.
pub const SLOTS: usize = 256;

/// File block size: a power of two, 64 KiB to 16 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSize(u8);

impl BlockSize {
    /// 1 MiB, what mkfs takes when nothing is asked for.
    pub const DEFAULT: BlockSize = BlockSize(20);

    /// The block size with this base-2 logarithm (16..=24).
    pub const fn from_shift(shift: u8) -> Option<Self> {
        if shift >= 16 && shift <= 24 { Some(BlockSize(shift)) } else { None }
    }

    /// The block size of this many bytes, if the format has it.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() { Self::from_shift(bytes.trailing_zeros() as u8) } else { None }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Base-2 logarithm of the bytes.
    pub const fn shift(self) -> u8 {
        self.0
    }

    /// Bytes of a granule (1/16 of a block).
    pub const fn granule_bytes(self) -> u64 {
        self.bytes() / GRANULES_PER_BLOCK
    }

    /// Units of a unit container.
    pub const fn units(self) -> u64 {
        self.bytes() / UNIT_BYTES
    }
}

/// Index of a member LUN in its volume: 1..=254; never used again after a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LunIndex(u8);

impl LunIndex {
    /// The index with this number, if it is 1..=254.
    pub const fn new(number: u8) -> Option<Self> {
        if number >= 1 && number as usize <= MAX_MEMBERS { Some(LunIndex(number)) } else { None }
    }

    /// 1..=254.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for LunIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lun{}", self.0)
    }
}

/// Number of a file block on its LUN (36 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockNo(u64);

impl BlockNo {
    /// Bits of a block number in every structure.
    pub const BITS: u32 = 36;

    /// The block with this number, if it fits in 36 bits.
    pub const fn new(number: u64) -> Option<Self> {
        if number < 1 << Self::BITS { Some(BlockNo(number)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A block of a LUN of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockAddress {
    /// The member LUN.
    pub lun: LunIndex,
    /// The block on it.
    pub block: BlockNo,
}

impl fmt::Display for BlockAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:b{}", self.lun, self.block.get())
    }
}

/// A unit of a unit container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitAddress {
    /// The member LUN.
    pub lun: LunIndex,
    /// The unit container.
    pub block: BlockNo,
    /// The unit in the container, 0..2048.
    pub unit: u16,
}

impl fmt::Display for UnitAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:b{}:u{}", self.lun, self.block.get(), self.unit)
    }
}

/// Where a cell lies: LUN and byte offset, a multiple of the cell size below 2^56.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CellAddress {
    /// The member LUN.
    pub lun: LunIndex,
    /// Bytes from the LUN's start.
    pub offset: u64,
}

impl CellAddress {
    /// Bits of a byte offset: LUNs end below 2^56.
    pub const OFFSET_BITS: u32 = 56;

    /// As stored: LUN index in the top 8 bits, offset below.
    pub const fn pack(self) -> u64 {
        ((self.lun.get() as u64) << 56) | self.offset
    }

    /// From its stored form; none when the LUN index is not 1..=254.
    pub const fn unpack(packed: u64) -> Option<Self> {
        match LunIndex::new((packed >> 56) as u8) {
            Some(lun) => Some(CellAddress { lun, offset: packed & ((1 << 56) - 1) }),
            None => None,
        }
    }
}

impl fmt::Display for CellAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.lun, self.offset)
    }
}

/// Identity of an object: the address of its root cell, {lun, block, cell in the block}.
///
/// Stored as a u64: cell in bits 0..15, block in bits 15..51, LUN index in bits 51..59, the rest 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdId(u64);

impl FdId {
    /// The identity of the root cell `cell` of the FD container `container`; none when `cell` needs more than 15 bits.
    pub const fn new(container: BlockAddress, cell: u16) -> Option<Self> {
        if cell < 1 << 15 {
            Some(FdId(((container.lun.get() as u64) << 51) | (container.block.get() << 15) | cell as u64))
        } else {
            None
        }
    }

    /// As stored.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// From its stored form; none when it is no identity (0 is "no object").
    pub const fn from_stored(stored: u64) -> Option<Self> {
        if stored >> 59 != 0 || LunIndex::new((stored >> 51) as u8).is_none() { None } else { Some(FdId(stored)) }
    }

    /// The LUN that holds the root cell.
    pub const fn lun(self) -> LunIndex {
        LunIndex((self.0 >> 51) as u8)
    }

    /// The FD container that holds the root cell.
    pub const fn container(self) -> BlockAddress {
        BlockAddress { lun: self.lun(), block: BlockNo((self.0 >> 15) & ((1 << 36) - 1)) }
    }

    /// The root cell's place in its container.
    pub const fn cell(self) -> u16 {
        (self.0 & 0x7fff) as u16
    }
}

impl fmt::Display for FdId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fd{}.{}.{}", self.lun().get(), self.container().block.get(), self.cell())
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);

        impl $name {
            /// The value that follows. A 64-bit counter that moves once a nanosecond lasts for centuries.
            #[must_use]
            pub const fn next(self) -> Self {
                $name(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(
    /// Change counter of one cell: +1 at each change.
    Seq
);
counter!(
    /// Creation and move counter of a root cell: +1 at each creation and each change of parent; never reset.
    Link
);
counter!(
    /// Lock token of an object: +1 at each change of ownership.
    Token
);
counter!(
    /// Incarnation counter of a slot (40 bits on disk): +1 at each join; never used again.
    Generation
);

impl Generation {
    /// Bits of a generation in every structure.
    pub const BITS: u32 = 40;

    /// The low 8 bits, as block and unit table entries keep them.
    pub const fn low(self) -> u8 {
        self.0 as u8
    }
}

/// Index of a host's slot on a LUN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u8);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot{}", self.0)
    }
}

/// One incarnation of a host on one LUN: {slot, generation}.
///
/// It always means the slot cell of the LUN on which the cell that names it lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotRef {
    /// The slot.
    pub slot: SlotId,
    /// Its generation; 0 is "nobody" (mkfs, free).
    pub generation: Generation,
}

impl SlotRef {
    /// Nobody: what mkfs writes.
    pub const NOBODY: SlotRef = SlotRef { slot: SlotId(0), generation: Generation(0) };

    /// As stored: slot in bits 40..48, generation in bits 0..40.
    pub const fn pack(self) -> u64 {
        ((self.slot.0 as u64) << 40) | (self.generation.0 & ((1 << 40) - 1))
    }

    /// From its stored form; none when bits above 48 are set.
    pub const fn unpack(packed: u64) -> Option<Self> {
        if packed >> 48 != 0 {
            return None;
        }
        Some(SlotRef { slot: SlotId((packed >> 40) as u8), generation: Generation(packed & ((1 << 40) - 1)) })
    }
}

impl fmt::Display for SlotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.slot, self.generation)
    }
}

/// 128 random bits that name one change of one cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OpId(pub [u8; 16]);

/// A 128-bit identity of a volume, LUN, host or boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Parses `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` (hyphens optional); none when it is not 32 hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0u8; 16];
        let mut digits = text.chars().filter(|c| *c != '-');
        for byte in &mut bytes {
            let high = digits.next()?.to_digit(16)?;
            let low = digits.next()?.to_digit(16)?;
            *byte = (high * 16 + low) as u8;
        }
        if digits.next().is_some() { None } else { Some(Uuid(bytes)) }
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_fd_id_keeps_its_three_parts() {
        let container = BlockAddress { lun: LunIndex::new(254).unwrap(), block: BlockNo::new((1 << 36) - 1).unwrap() };
        let fd = FdId::new(container, 0x7fff).unwrap();
        assert_eq!(fd.get(), 0x07f7_ffff_ffff_ffff);
        assert_eq!((fd.container(), fd.cell()), (container, 0x7fff));
        assert_eq!(FdId::from_stored(fd.get()), Some(fd));
        assert_eq!(FdId::from_stored(0), None);
        assert_eq!(FdId::from_stored(u64::MAX), None);
    }

    #[test]
    fn a_uuid_prints_as_it_is_parsed() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(Uuid::parse(text).unwrap().to_string(), text);
        assert_eq!(Uuid::parse("0123"), None);
        assert_eq!(Uuid::parse(&format!("{text}0")), None);
    }
}
