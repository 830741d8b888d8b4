//! Owns: the root cell of an object: its state, parent, lock record and body reference.
//! Promises: one cell decides what an object is and who may write it.
//! Must not know: how a commit or a lock is carried out.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::unit::{UNIT_REF_BYTES, UnitRef};
use super::{FormatError, prefix, value};
use crate::units::{CellSize, FdId, LunIndex, SlotRef, Token};

/// Life of a root cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectState {
    /// No object.
    Free,
    /// Being created by an incarnation; reachable once its directory is committed. Lookups treat it as live.
    Creating(SlotRef),
    /// An object.
    Live,
    /// Its name is being removed by an incarnation.
    Unlinking(SlotRef),
    /// Its name is gone; its space is being freed by an incarnation.
    Unlinked(SlotRef),
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum ObjectType {
    /// Ordinary file.
    File = 1,
    /// Virtual disk: exclusive at open for write, shared at open for read.
    Disk = 2,
    /// Directory.
    Directory = 3,
    /// Symbolic link.
    Symlink = 4,
    /// Raw device mapping.
    Rdm = 5,
}

impl ObjectType {
    /// The type with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            1 => ObjectType::File,
            2 => ObjectType::Disk,
            3 => ObjectType::Directory,
            4 => ObjectType::Symlink,
            5 => ObjectType::Rdm,
            _ => return None,
        })
    }
}

/// Mode of a lock record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum HoldMode {
    /// Nobody holds it.
    Free = 0,
    /// One holder, who may write.
    Exclusive = 1,
    /// Holders that read.
    Shared = 2,
    /// Holders that all write in place.
    MultiWriter = 3,
}

impl HoldMode {
    /// The mode with this stored number.
    pub const fn from_stored(stored: u8) -> Option<Self> {
        Some(match stored {
            0 => HoldMode::Free,
            1 => HoldMode::Exclusive,
            2 => HoldMode::Shared,
            3 => HoldMode::MultiWriter,
            _ => return None,
        })
    }
}

/// One holder of a lock. It counts while its slot on the root cell's LUN is live at that generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// Slot and generation on the root cell's LUN.
    pub slot: SlotRef,
    /// Incarnation, the same on all LUNs.
    pub incarnation: u64,
}

/// Most holders of one lock.
pub const MAX_HOLDERS: usize = 16;

/// The lock record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockRecord {
    /// Mode.
    pub mode: HoldMode,
    /// +1 at each change of ownership.
    pub token: Token,
    /// Holders: 1 for exclusive, 1..=16 for shared and multi-writer, none when free.
    pub holders: Vec<Holder>,
    /// Another host asks to be let in.
    pub wanted: bool,
}

/// Set when a lock was taken by break, until the broken incarnation is proven fenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unclean {
    /// PB cells with an older token are re-stamped before they are believed; 0 when clean.
    pub token: Token,
    /// The incarnation that was broken.
    pub broken: Holder,
}

bitflags::bitflags! {
    /// Flags of an object.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ObjectFlags: u16 {
        /// May be opened for write by several holders at once.
        const MULTI_WRITER = 1;
        /// Base of snapshots: never written.
        const READ_ONLY_BASE = 2;
    }
}

/// Set of member LUNs: bit n of byte n/8 is LUN index n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LunSet(pub [u8; 32]);

impl LunSet {
    /// The set with one member.
    pub fn of(lun: LunIndex) -> LunSet {
        let mut set = LunSet::default();
        set.insert(lun);
        set
    }

    /// Adds a member.
    pub fn insert(&mut self, lun: LunIndex) {
        self.0[usize::from(lun.get()) / 8] |= 1 << (lun.get() % 8);
    }

    /// Whether it has a member.
    pub fn contains(&self, lun: LunIndex) -> bool {
        self.0[usize::from(lun.get()) / 8] >> (lun.get() % 8) & 1 == 1
    }

    /// Its members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = LunIndex> + '_ {
        (1..=254).filter_map(LunIndex::new).filter(|lun| self.contains(*lun))
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHolder {
    slot: U64,
    incarnation: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRoot {
    state: u8,
    object_type: u8,
    flags: [u8; 2],
    lock_mode: u8,
    holder_count: u8,
    wanted: u8,
    reserved: u8,
    mark: U64,
    parent: U64,
    lock_token: U64,
    unclean_token: U64,
    broken: RawHolder,
    luns: [u8; 32],
    body: [u8; UNIT_REF_BYTES],
    holders: [RawHolder; MAX_HOLDERS],
}

const _: () = assert!(size_of::<RawRoot>() == 360);
const _: () = assert!(size_of::<RawRoot>() <= CellSize::B512.payload());

/// The decoded payload of a root cell. `link` is in the cell header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootCell {
    /// Life.
    pub state: ObjectState,
    /// Type; `None` exactly when the state is `Free`.
    pub object_type: Option<ObjectType>,
    /// Flags.
    pub flags: ObjectFlags,
    /// Directory that names the object; the root directory is its own parent; `None` only when free.
    pub parent: Option<FdId>,
    /// Who may write.
    pub lock: LockRecord,
    /// State after a break.
    pub unclean: Unclean,
    /// LUNs that the object may use.
    pub luns: LunSet,
    /// The body; `None` only when free or while an unlinked object's space is freed.
    pub body: Option<UnitRef>,
}

impl RootCell {
    /// The payload's value for a root cell without an object; the token lives on.
    pub fn free(token: Token) -> RootCell {
        RootCell {
            state: ObjectState::Free,
            object_type: None,
            flags: ObjectFlags::empty(),
            parent: None,
            lock: LockRecord { mode: HoldMode::Free, token, holders: Vec::new(), wanted: false },
            unclean: Unclean::default(),
            luns: LunSet::default(),
            body: None,
        }
    }

    /// Decodes a payload.
    pub fn decode(cell: CellSize, payload: &[u8]) -> Result<RootCell, FormatError> {
        const NAME: &str = "root cell";
        let bad = |field, value| FormatError::Value { structure: NAME, field, value };
        let (raw, _) = prefix::<RawRoot>(payload, NAME)?;
        let mark = value(SlotRef::unpack(raw.mark.get()), NAME, "mark", raw.mark.get())?;
        let state = match raw.state {
            0 => ObjectState::Free,
            1 => ObjectState::Creating(mark),
            2 => ObjectState::Live,
            3 => ObjectState::Unlinking(mark),
            4 => ObjectState::Unlinked(mark),
            other => return Err(bad("state", other.into())),
        };
        let free = state == ObjectState::Free;
        let object_type = match (free, raw.object_type) {
            (true, 0) => None,
            (false, stored) => Some(value(ObjectType::from_stored(stored), NAME, "type", stored.into())?),
            (true, stored) => return Err(bad("type", stored.into())),
        };
        let parent = match (free, raw.parent.get()) {
            (true, 0) => None,
            (false, stored) => Some(value(FdId::from_stored(stored), NAME, "parent", stored)?),
            (true, stored) => return Err(bad("parent", stored)),
        };
        let bits = u16::from_le_bytes(raw.flags);
        let mode = value(HoldMode::from_stored(raw.lock_mode), NAME, "lock_mode", raw.lock_mode.into())?;
        let count = usize::from(raw.holder_count);
        let legal = match mode {
            HoldMode::Free => count == 0,
            HoldMode::Exclusive => count == 1,
            HoldMode::Shared | HoldMode::MultiWriter => (1..=MAX_HOLDERS).contains(&count),
        };
        if !legal {
            return Err(bad("holder_count", count as u64));
        }
        if raw.wanted > 1 {
            return Err(bad("wanted", raw.wanted.into()));
        }
        let holder = |raw: &RawHolder| -> Result<Holder, FormatError> {
            let slot = value(SlotRef::unpack(raw.slot.get()), NAME, "holder", raw.slot.get())?;
            Ok(Holder { slot, incarnation: raw.incarnation.get() })
        };
        Ok(RootCell {
            state,
            object_type,
            flags: value(ObjectFlags::from_bits(bits), NAME, "flags", bits.into())?,
            parent,
            lock: LockRecord {
                mode,
                token: Token(raw.lock_token.get()),
                holders: raw.holders[..count].iter().map(holder).collect::<Result<_, _>>()?,
                wanted: raw.wanted == 1,
            },
            unclean: Unclean { token: Token(raw.unclean_token.get()), broken: holder(&raw.broken)? },
            luns: LunSet(raw.luns),
            body: UnitRef::unpack(cell, &raw.body)?,
        })
    }

    /// The payload.
    ///
    /// # Panics
    /// When there are more than [`MAX_HOLDERS`] holders: the lock code refuses a 17th.
    pub fn encode(&self) -> Vec<u8> {
        let (state, mark) = match self.state {
            ObjectState::Free => (0, SlotRef::NOBODY),
            ObjectState::Creating(by) => (1, by),
            ObjectState::Live => (2, SlotRef::NOBODY),
            ObjectState::Unlinking(by) => (3, by),
            ObjectState::Unlinked(by) => (4, by),
        };
        let raw_holder = |h: &Holder| RawHolder { slot: h.slot.pack().into(), incarnation: h.incarnation.into() };
        let mut holders = [raw_holder(&Holder::default()); MAX_HOLDERS];
        for (nth, holder) in self.lock.holders.iter().enumerate() {
            holders[nth] = raw_holder(holder);
        }
        let raw = RawRoot {
            state,
            object_type: self.object_type.map_or(0, |t| t as u8),
            flags: self.flags.bits().to_le_bytes(),
            lock_mode: self.lock.mode as u8,
            holder_count: self.lock.holders.len() as u8,
            wanted: self.lock.wanted.into(),
            reserved: 0,
            mark: mark.pack().into(),
            parent: self.parent.map_or(0, FdId::get).into(),
            lock_token: self.lock.token.0.into(),
            unclean_token: self.unclean.token.0.into(),
            broken: raw_holder(&self.unclean.broken),
            luns: self.luns.0,
            body: UnitRef::pack(self.body),
            holders,
        };
        raw.as_bytes().to_vec()
    }
}
