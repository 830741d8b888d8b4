//! Owns: the heartbeat cell: a host's slot on a LUN.
//! Promises: a decoded slot says whose it is, at which generation, and by which lease it lives.
//! Must not know: clocks; whether the lease has run out is `lease`'s to say.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::LeaseTimes;
use super::{FormatError, prefix, value};
use crate::units::{Generation, SlotRef, Uuid};

/// State of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SlotState {
    /// Nobody's; may be joined.
    Free = 0,
    /// A host lives here.
    Live = 1,
    /// A breaker has claimed it; its owner can never renew again.
    Breaking = 2,
    /// Its owner is gone and fenced; what it left behind is not recovered yet.
    Dirty = 3,
}

impl SlotState {
    /// The state with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            0 => SlotState::Free,
            1 => SlotState::Live,
            2 => SlotState::Breaking,
            3 => SlotState::Dirty,
            _ => return None,
        })
    }
}

/// How surely a host that lost its lease is kept from writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FenceGrade {
    /// Not known.
    Unknown = 0,
    /// The storage itself refuses it.
    A = 1,
    /// A hardware watchdog resets it within a known bound.
    B = 2,
    /// Time only.
    C = 3,
}

impl FenceGrade {
    /// The grade with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            0 => FenceGrade::Unknown,
            1 => FenceGrade::A,
            2 => FenceGrade::B,
            3 => FenceGrade::C,
            _ => return None,
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeartbeat {
    state: u8,
    fence_grade: u8,
    drop_lun: u8,
    drop_acknowledged: u8,
    host_name_length: U16,
    abilities: U16,
    host: [u8; 16],
    boot: [u8; 16],
    generation: U64,
    incarnation: U64,
    beat: U64,
    lease_ms: U32,
    renew_ms: U32,
    margin_ms: U32,
    clock_ppm: U32,
    reservation_key: U64,
    breaker: U64,
    breaker_incarnation: U64,
    breaker_beat: U64,
    live_since_s: U64,
    host_name: [u8; MAX_HOST_NAME],
}

const _: () = assert!(size_of::<RawHeartbeat>() == 192);

/// Bit of `abilities`: the owner follows cells that have left their LUN to the window that carries them.
pub const FOLLOWS_MOVED: u16 = 1;

/// Longest host name kept, in bytes; longer ones are cut at a character.
pub const MAX_HOST_NAME: usize = 72;

/// Claim of a breaker on a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breaker {
    /// The breaker's slot on this LUN; `NOBODY` when there is none or it has no slot here.
    pub slot: SlotRef,
    /// The breaker's incarnation; 0 when there is none.
    pub incarnation: u64,
    /// Renewed by a breaker that has no slot of its own.
    pub beat: u64,
}

/// The reservation key of an incarnation's paths (SPC-4, 5.13): slot and generation below, above them 16 bits of the volume's UUID (its
/// eight pairs of bytes, exclusive or), so that registrations of an earlier volume on the LUN are told apart.
pub fn reservation_key(volume: Uuid, owner: SlotRef) -> u64 {
    let folded = volume.0.chunks_exact(2).fold(0, |folded, pair| folded ^ u16::from_be_bytes([pair[0], pair[1]]));
    u64::from(folded) << 48 | owner.pack()
}

/// The decoded payload of a heartbeat cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// State.
    pub state: SlotState,
    /// Fence grade of the owner on this LUN.
    pub fence_grade: FenceGrade,
    /// Index of a LUN whose locks the owner is asked to drop; 0 for none.
    pub drop_lun: u8,
    /// The owner has drained its I/O under the locks of `drop_lun`.
    pub drop_acknowledged: bool,
    /// Host UUID.
    pub host: Uuid,
    /// Boot id of that host.
    pub boot: Uuid,
    /// Incarnation counter of this slot, never used again.
    pub generation: Generation,
    /// Random number of the incarnation, the same on all LUNs.
    pub incarnation: u64,
    /// +1 at each renewal.
    pub beat: u64,
    /// The owner's lease parameters.
    pub lease: LeaseTimes,
    /// Persistent reservation key; 0 for none.
    pub reservation_key: u64,
    /// Who is breaking or recovering the slot.
    pub breaker: Breaker,
    /// What the owner can do that releases before it could not.
    pub abilities: u16,
    /// Seconds since 1970 at the join, by the owner's clock; for people.
    pub live_since_s: u64,
    /// Host name; for people.
    pub host_name: String,
}

impl Heartbeat {
    /// A slot that nobody ever joined.
    pub fn free() -> Heartbeat {
        Heartbeat {
            state: SlotState::Free,
            fence_grade: FenceGrade::Unknown,
            drop_lun: 0,
            drop_acknowledged: false,
            host: Uuid::default(),
            boot: Uuid::default(),
            generation: Generation(0),
            incarnation: 0,
            beat: 0,
            lease: LeaseTimes { lease_ms: 0, renew_ms: 0, margin_ms: 0, clock_ppm: 0 },
            reservation_key: 0,
            breaker: Breaker::default(),
            abilities: 0,
            live_since_s: 0,
            host_name: String::new(),
        }
    }

    /// What is left in a slot after the recovery of the incarnation that `of` shows: enough to tell that it is gone, and how surely.
    pub fn recovered(of: &Heartbeat) -> Heartbeat {
        Heartbeat {
            generation: of.generation,
            incarnation: of.incarnation,
            fence_grade: of.fence_grade,
            ..Heartbeat::free()
        }
    }

    /// Whether the incarnation at `generation` lives here.
    pub fn is_live(&self, generation: Generation) -> bool {
        self.state == SlotState::Live && self.generation == generation
    }

    /// Decodes a payload.
    pub fn decode(payload: &[u8]) -> Result<Heartbeat, FormatError> {
        const NAME: &str = "heartbeat";
        let (raw, _) = prefix::<RawHeartbeat>(payload, NAME)?;
        let length = raw.host_name_length.get();
        let name = raw.host_name.get(..length.into()).and_then(|b| std::str::from_utf8(b).ok());
        if raw.generation.get() >> Generation::BITS != 0 {
            return Err(FormatError::Value { structure: NAME, field: "generation", value: raw.generation.get() });
        }
        if raw.drop_acknowledged > 1 {
            let value = raw.drop_acknowledged.into();
            return Err(FormatError::Value { structure: NAME, field: "drop_acknowledged", value });
        }
        Ok(Heartbeat {
            state: value(SlotState::from_stored(raw.state), NAME, "state", raw.state.into())?,
            fence_grade: value(FenceGrade::from_stored(raw.fence_grade), NAME, "fence_grade", raw.fence_grade.into())?,
            drop_lun: raw.drop_lun,
            drop_acknowledged: raw.drop_acknowledged == 1,
            host: Uuid(raw.host),
            boot: Uuid(raw.boot),
            generation: Generation(raw.generation.get()),
            incarnation: raw.incarnation.get(),
            beat: raw.beat.get(),
            lease: LeaseTimes {
                lease_ms: raw.lease_ms.get(),
                renew_ms: raw.renew_ms.get(),
                margin_ms: raw.margin_ms.get(),
                clock_ppm: raw.clock_ppm.get(),
            },
            reservation_key: raw.reservation_key.get(),
            breaker: Breaker {
                slot: value(SlotRef::unpack(raw.breaker.get()), NAME, "breaker", raw.breaker.get())?,
                incarnation: raw.breaker_incarnation.get(),
                beat: raw.breaker_beat.get(),
            },
            abilities: raw.abilities.get(),
            live_since_s: raw.live_since_s.get(),
            host_name: value(name, NAME, "host_name_length", length.into())?.to_owned(),
        })
    }

    /// The payload. A host name longer than [`MAX_HOST_NAME`] is cut at a character.
    pub fn encode(&self) -> Vec<u8> {
        let mut length = self.host_name.len().min(MAX_HOST_NAME);
        while !self.host_name.is_char_boundary(length) {
            length -= 1;
        }
        let mut host_name = [0; MAX_HOST_NAME];
        host_name[..length].copy_from_slice(&self.host_name.as_bytes()[..length]);
        let raw = RawHeartbeat {
            state: self.state as u8,
            fence_grade: self.fence_grade as u8,
            drop_lun: self.drop_lun,
            drop_acknowledged: self.drop_acknowledged.into(),
            host_name_length: (length as u16).into(),
            abilities: self.abilities.into(),
            host: self.host.0,
            boot: self.boot.0,
            generation: self.generation.0.into(),
            incarnation: self.incarnation.into(),
            beat: self.beat.into(),
            lease_ms: self.lease.lease_ms.into(),
            renew_ms: self.lease.renew_ms.into(),
            margin_ms: self.lease.margin_ms.into(),
            clock_ppm: self.lease.clock_ppm.into(),
            reservation_key: self.reservation_key.into(),
            breaker: self.breaker.slot.pack().into(),
            breaker_incarnation: self.breaker.incarnation.into(),
            breaker_beat: self.breaker.beat.into(),
            live_since_s: self.live_since_s.into(),
            host_name,
        };
        raw.as_bytes().to_vec()
    }
}
