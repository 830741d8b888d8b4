//! Owns: the member cell; every LUN carries one for each index of the volume.
//! Promises: any one LUN tells which members the volume has.
//! Must not know: which of them can be reached.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{DeviceIdentity, MemberState, RawIdentity, decode_window, encode_window};
use super::{FormatError, prefix, value};
use crate::units::{CellAddress, LunIndex, Uuid};

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawMember {
    lun_uuid: [u8; 16],
    lun_bytes: U64,
    index: u8,
    state: u8,
    reserved: [u8; 6],
    identity: RawIdentity,
    window: U64,
}

const _: () = assert!(size_of::<RawMember>() == 104);

/// The decoded payload of a member cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Identity of the LUN; zero when the index was never used.
    pub lun_uuid: Uuid,
    /// Bytes of the LUN.
    pub lun_bytes: u64,
    /// The index that this cell describes.
    pub index: LunIndex,
    /// State of the member.
    pub state: MemberState,
    /// What the device said of itself when it was added.
    pub identity: DeviceIdentity,
    /// State [`MemberState::Carried`]: where the window begins that holds the LUN's cells.
    pub window: Option<CellAddress>,
}

impl Member {
    /// The cell of an index that was never used.
    pub fn free(index: LunIndex) -> Member {
        Member {
            lun_uuid: Uuid::default(),
            lun_bytes: 0,
            index,
            state: MemberState::Free,
            identity: DeviceIdentity::default(),
            window: None,
        }
    }

    /// Decodes a payload.
    pub fn decode(payload: &[u8]) -> Result<Member, FormatError> {
        const NAME: &str = "member";
        let (raw, _) = prefix::<RawMember>(payload, NAME)?;
        Ok(Member {
            lun_uuid: Uuid(raw.lun_uuid),
            lun_bytes: raw.lun_bytes.get(),
            index: value(LunIndex::new(raw.index), NAME, "index", raw.index.into())?,
            state: value(MemberState::from_stored(raw.state), NAME, "state", raw.state.into())?,
            identity: raw.identity.decode(NAME)?,
            window: decode_window(raw.window, NAME)?,
        })
    }

    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawMember {
            lun_uuid: self.lun_uuid.0,
            lun_bytes: self.lun_bytes.into(),
            index: self.index.get(),
            state: self.state as u8,
            reserved: [0; 6],
            identity: RawIdentity::encode(&self.identity),
            window: encode_window(self.window),
        };
        raw.as_bytes().to_vec()
    }
}
