//! Owns: the header cell of a LUN: which volume, which member, which geometry.
//! Promises: a decoded header has a geometry that lies within the LUN size it states.
//! Must not know: how many LUNs are there, which of them answer.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{MAX_SEGMENTS, Segment, TABLE_OFFSET};
use super::moved::PIECE_ALIGNMENT;
use super::{FormatError, prefix, value};
use crate::units::{BlockNo, BlockSize, CellAddress, CellSize, FdId, LunIndex, SlotRef, Uuid};

/// State of a member LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MemberState {
    /// Index never used.
    Free = 0,
    /// Being added; nobody allocates on it.
    Joining = 1,
    /// In use.
    Active = 2,
    /// In use; its blocks are being moved away.
    Draining = 3,
    /// Taken out; its index is never used again.
    Removed = 4,
    /// Declared lost by the administrator.
    Lost = 5,
    /// Being taken out, or taken out: its cells move, or have moved, to a window on another LUN.
    Carried = 6,
}

impl MemberState {
    /// The state with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            0 => MemberState::Free,
            1 => MemberState::Joining,
            2 => MemberState::Active,
            3 => MemberState::Draining,
            4 => MemberState::Removed,
            5 => MemberState::Lost,
            6 => MemberState::Carried,
            _ => return None,
        })
    }
}

/// How compare-and-write is done on every LUN of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum LockMode {
    /// OFD locks on image files: the processes of one machine.
    SingleMachine = 1,
    /// SCSI COMPARE AND WRITE: any host that sees the LUN.
    CompareAndWrite = 2,
}

impl LockMode {
    /// The mode with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            1 => LockMode::SingleMachine,
            2 => LockMode::CompareAndWrite,
            _ => return None,
        })
    }
}

/// Lease parameters, in milliseconds and parts per million.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTimes {
    /// L: how long a renewal lasts, counted from before it was sent.
    pub lease_ms: u32,
    /// H: time between renewals.
    pub renew_ms: u32,
    /// M: the gate closes this long before the lease ends.
    pub margin_ms: u32,
    /// rho: bound on the difference of two hosts' clock rates.
    pub clock_ppm: u32,
}

impl LeaseTimes {
    /// H 2 s, L 20 s, M 5 s: takeover in about 23 s.
    pub const DEFAULT: LeaseTimes =
        LeaseTimes { lease_ms: 20_000, renew_ms: 2_000, margin_ms: 5_000, clock_ppm: 1_000 };
    /// H 1 s, L 10 s, M 3 s: takeover in about 13 s.
    pub const FAST: LeaseTimes = LeaseTimes { lease_ms: 10_000, renew_ms: 1_000, margin_ms: 3_000, clock_ppm: 1_000 };
    /// H 5 s, L 60 s, M 15 s.
    pub const SLOW: LeaseTimes = LeaseTimes { lease_ms: 60_000, renew_ms: 5_000, margin_ms: 15_000, clock_ppm: 1_000 };
}

/// What a device says of itself (VPD 83 name, serial, file identity), to recognise clones and snapshots. At most 62 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceIdentity(Vec<u8>);

impl DeviceIdentity {
    /// Most bytes of an identity.
    pub const MAX: usize = 62;

    /// The identity of these bytes; longer ones are cut.
    pub fn new(bytes: &[u8]) -> Self {
        DeviceIdentity(bytes[..bytes.len().min(Self::MAX)].to_vec())
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawIdentity {
    length: u8,
    reserved: u8,
    bytes: [u8; DeviceIdentity::MAX],
}

impl RawIdentity {
    pub(super) fn encode(identity: &DeviceIdentity) -> RawIdentity {
        let mut bytes = [0; DeviceIdentity::MAX];
        bytes[..identity.0.len()].copy_from_slice(&identity.0);
        RawIdentity { length: identity.0.len() as u8, reserved: 0, bytes }
    }

    pub(super) fn decode(&self, structure: &'static str) -> Result<DeviceIdentity, FormatError> {
        let bytes = self.bytes.get(..self.length.into()).ok_or(FormatError::Value {
            structure,
            field: "identity length",
            value: self.length.into(),
        })?;
        Ok(DeviceIdentity(bytes.to_vec()))
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSegment {
    first_block: U64,
    block_count: U64,
    table_offset: U64,
    data_offset: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawLunHeader {
    lun_uuid: [u8; 16],
    lun_index: u8,
    state: u8,
    block_shift: u8,
    lock_mode: u8,
    segment_count: u8,
    label_length: u8,
    member_count: U16,
    lease_ms: U32,
    renew_ms: U32,
    margin_ms: U32,
    clock_ppm: U32,
    volume_generation: U64,
    lun_bytes: U64,
    created_s: U64,
    root: U64,
    compatible: U64,
    read_only_compatible: U64,
    incompatible: U64,
    label: [u8; 64],
    identity: RawIdentity,
    segments: [RawSegment; MAX_SEGMENTS],
    growing: U64,
    volume: [u8; 16],
    window: U64,
}

/// A window as it is stored: the carrier in bits 56..63, the byte offset there below, as a cell address; 0: none.
pub(super) fn encode_window(window: Option<CellAddress>) -> U64 {
    window.map_or(0, CellAddress::pack).into()
}

/// As [`encode_window`], the other way.
pub(super) fn decode_window(raw: U64, structure: &'static str) -> Result<Option<CellAddress>, FormatError> {
    match raw.get() {
        0 => Ok(None),
        stored => {
            let window = CellAddress::unpack(stored).filter(|at| at.offset % PIECE_ALIGNMENT == 0 && at.offset != 0);
            value(window, structure, "window", stored).map(Some)
        }
    }
}

const _: () = assert!(size_of::<RawLunHeader>() == 416);
const _: () = assert!(size_of::<RawLunHeader>() <= CellSize::B512.payload());

/// Longest label, in bytes of UTF-8.
pub const MAX_LABEL: usize = 64;

/// Bit of `incompatible`: fsck.vmfs repairs the volume, or was cut off while it did. No mount.
pub const BEING_REPAIRED: u64 = 1;
/// Bit of `incompatible`: the volume's UUID is the one in the header and not the one in the cells: it was made of a copy of the volume
/// that has that one.
pub const OWN_VOLUME: u64 = 2;
/// Bit of `incompatible`: a copy is being made a volume of its own, or that was cut off. No mount, neither as the old nor as the new one.
pub const BEING_RESIGNATURED: u64 = 4;
/// Bit of `incompatible`: cells of a LUN move, or have moved, to a window on another one.
pub const HAS_WINDOW: u64 = 8;

/// The decoded payload of a header cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunHeader {
    /// Identity of this LUN, unique among all LUNs ever made.
    pub lun_uuid: Uuid,
    /// Index in the volume.
    pub lun_index: LunIndex,
    /// Own state.
    pub state: MemberState,
    /// Block size of the volume.
    pub block_size: BlockSize,
    /// How compare-and-write is done.
    pub lock_mode: LockMode,
    /// Members of the volume that are not free or removed.
    pub member_count: u16,
    /// Lease parameters of every host.
    pub lease: LeaseTimes,
    /// +1 at each change of membership.
    pub volume_generation: u64,
    /// Bytes of the LUN that the geometry was made for.
    pub lun_bytes: u64,
    /// Seconds since 1970 when mkfs ran.
    pub created_s: u64,
    /// Root directory.
    pub root: FdId,
    /// Features that old code may ignore.
    pub compatible: u64,
    /// Features that old code may ignore when it only reads.
    pub read_only_compatible: u64,
    /// Features that old code must refuse.
    pub incompatible: u64,
    /// Label, UTF-8.
    pub label: String,
    /// What the device said of itself at mkfs.
    pub identity: DeviceIdentity,
    /// Segments of the block table.
    pub segments: Vec<Segment>,
    /// Who writes the table of the next segment; nobody: the LUN is not being grown.
    pub growing: SlotRef,
    /// UUID of the volume, when it is not the one in the cells ([`OWN_VOLUME`]).
    pub volume: Option<Uuid>,
    /// State [`MemberState::Carried`]: where the window begins to which the LUN's cells move; none as long as that is not decided.
    pub window: Option<CellAddress>,
}

impl LunHeader {
    /// Decodes the payload of a header cell.
    pub fn decode(cell: CellSize, payload: &[u8]) -> Result<LunHeader, FormatError> {
        const NAME: &str = "LUN header";
        let (raw, _) = prefix::<RawLunHeader>(payload, NAME)?;
        let block_size = value(BlockSize::from_shift(raw.block_shift), NAME, "block_shift", raw.block_shift.into())?;
        let count = usize::from(raw.segment_count);
        if count == 0 || count > MAX_SEGMENTS {
            return Err(FormatError::Value { structure: NAME, field: "segment_count", value: count as u64 });
        }
        let label = raw.label.get(..raw.label_length.into()).and_then(|b| std::str::from_utf8(b).ok());
        let header = LunHeader {
            lun_uuid: Uuid(raw.lun_uuid),
            lun_index: value(LunIndex::new(raw.lun_index), NAME, "lun_index", raw.lun_index.into())?,
            state: value(MemberState::from_stored(raw.state), NAME, "state", raw.state.into())?,
            block_size,
            lock_mode: value(LockMode::from_stored(raw.lock_mode), NAME, "lock_mode", raw.lock_mode.into())?,
            member_count: raw.member_count.get(),
            lease: LeaseTimes {
                lease_ms: raw.lease_ms.get(),
                renew_ms: raw.renew_ms.get(),
                margin_ms: raw.margin_ms.get(),
                clock_ppm: raw.clock_ppm.get(),
            },
            volume_generation: raw.volume_generation.get(),
            lun_bytes: raw.lun_bytes.get(),
            created_s: raw.created_s.get(),
            root: value(FdId::from_stored(raw.root.get()), NAME, "root", raw.root.get())?,
            compatible: raw.compatible.get(),
            read_only_compatible: raw.read_only_compatible.get(),
            incompatible: raw.incompatible.get(),
            label: value(label, NAME, "label_length", raw.label_length.into())?.to_owned(),
            identity: raw.identity.decode(NAME)?,
            segments: raw.segments[..count]
                .iter()
                .map(|s| Segment {
                    first_block: s.first_block.get(),
                    block_count: s.block_count.get(),
                    table_offset: s.table_offset.get(),
                    data_offset: s.data_offset.get(),
                })
                .collect(),
            growing: value(SlotRef::unpack(raw.growing.get()), NAME, "growing", raw.growing.get())?,
            volume: Some(Uuid(raw.volume)).filter(|volume| *volume != Uuid::default()),
            window: decode_window(raw.window, NAME)?,
        };
        header.check_geometry(cell)?;
        Ok(header)
    }

    /// UUID of the volume whose cells have `cells`.
    pub fn volume_of(&self, cells: Uuid) -> Uuid {
        self.volume.unwrap_or(cells)
    }

    /// Segments follow one another in block numbers, tables and blocks lie in order within the LUN.
    fn check_geometry(&self, cell: CellSize) -> Result<(), FormatError> {
        let bad = |field, value| FormatError::Value { structure: "LUN header", field, value };
        let (mut block, mut from) = (0u64, TABLE_OFFSET);
        if self.lun_bytes >> CellAddress::OFFSET_BITS != 0 {
            return Err(bad("lun_bytes", self.lun_bytes));
        }
        for segment in &self.segments {
            let max = self.lun_bytes / self.block_size.bytes();
            let past = (1 << BlockNo::BITS) - block;
            if segment.first_block != block || segment.block_count == 0 || segment.block_count > max.min(past) {
                return Err(bad("segment block_count", segment.block_count));
            }
            if segment.table_offset < from || segment.table_offset >= self.lun_bytes || segment.table_offset % 4096 != 0
            {
                return Err(bad("segment table_offset", segment.table_offset));
            }
            let table_end = segment.table_offset + segment.table_cells(cell) * cell.bytes() as u64;
            if segment.data_offset < table_end
                || segment.data_offset >= self.lun_bytes
                || segment.data_offset % 4096 != 0
            {
                return Err(bad("segment data_offset", segment.data_offset));
            }
            if segment.end(self.block_size) > self.lun_bytes {
                return Err(bad("segment end", segment.end(self.block_size)));
            }
            block += segment.block_count;
            from = segment.end(self.block_size);
        }
        Ok(())
    }

    /// The payload. A label longer than [`MAX_LABEL`] was refused before.
    pub fn encode(&self) -> Vec<u8> {
        let mut label = [0; MAX_LABEL];
        label[..self.label.len()].copy_from_slice(self.label.as_bytes());
        let mut segments = [RawSegment {
            first_block: U64::ZERO,
            block_count: U64::ZERO,
            table_offset: U64::ZERO,
            data_offset: U64::ZERO,
        }; MAX_SEGMENTS];
        for (raw, segment) in segments.iter_mut().zip(&self.segments) {
            raw.first_block = segment.first_block.into();
            raw.block_count = segment.block_count.into();
            raw.table_offset = segment.table_offset.into();
            raw.data_offset = segment.data_offset.into();
        }
        let raw = RawLunHeader {
            lun_uuid: self.lun_uuid.0,
            lun_index: self.lun_index.get(),
            state: self.state as u8,
            block_shift: self.block_size.shift(),
            lock_mode: self.lock_mode as u8,
            segment_count: self.segments.len() as u8,
            label_length: self.label.len() as u8,
            member_count: self.member_count.into(),
            lease_ms: self.lease.lease_ms.into(),
            renew_ms: self.lease.renew_ms.into(),
            margin_ms: self.lease.margin_ms.into(),
            clock_ppm: self.lease.clock_ppm.into(),
            volume_generation: self.volume_generation.into(),
            lun_bytes: self.lun_bytes.into(),
            created_s: self.created_s.into(),
            root: self.root.get().into(),
            compatible: self.compatible.into(),
            read_only_compatible: self.read_only_compatible.into(),
            incompatible: self.incompatible.into(),
            label,
            identity: RawIdentity::encode(&self.identity),
            segments,
            growing: self.growing.pack().into(),
            volume: self.volume.unwrap_or_default().0,
            window: encode_window(self.window),
        };
        raw.as_bytes().to_vec()
    }
}
