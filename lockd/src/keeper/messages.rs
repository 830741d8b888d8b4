//! Owns: the messages between mounts (or tools) and vmfs-lockd: JSON, one message a packet, the gate page's descriptor beside `Attach`.
//! Promises: foreign bytes end in an error, never in a panic; every request has exactly one answer; only [`Tell::Over`] comes unasked.
//! Must not know: sockets, what becomes of a slot.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::units::{CellAddress, Uuid};

/// Version of these messages; both sides must have the same.
pub const VERSION: u32 = 2;

/// A UUID as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(pub Uuid);

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Uuid::parse(&text).map(Id).ok_or_else(|| serde::de::Error::custom("a UUID has 32 hexadecimal digits"))
    }
}

/// A mount, as the slots it has name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountIdentity {
    /// Volume.
    pub volume: Id,
    /// Bytes of the volume's cells.
    pub cell_bytes: u32,
    /// The mount's incarnation, the same on all LUNs.
    pub incarnation: u64,
    /// Host UUID.
    pub host: Id,
    /// Boot id.
    pub boot: Id,
    /// Host name, for people.
    pub host_name: String,
    /// What the mount calls itself, for people.
    pub program: String,
}

/// A LUN and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LunPlace {
    /// Index in the volume.
    pub index: u8,
    /// UUID of the LUN.
    pub uuid: Id,
    /// Absolute path or URL; of a LUN that was taken out of the volume what it is called.
    pub path: String,
    /// Where its cells are, if it was taken out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowPlace>,
}

/// A window: where the cells of a LUN are that was taken out of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowPlace {
    /// Index of the LUN that carries it; the mount has a slot there too.
    pub carrier: u8,
    /// Byte offset there.
    pub offset: u64,
}

impl From<CellAddress> for WindowPlace {
    fn from(at: CellAddress) -> WindowPlace {
        WindowPlace { carrier: at.lun.get(), offset: at.offset }
    }
}

/// Lease parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// L.
    pub lease_ms: u32,
    /// H.
    pub renew_ms: u32,
    /// M.
    pub margin_ms: u32,
    /// Bound on the rate of clocks.
    pub clock_ppm: u32,
}

impl From<LeaseTimes> for Times {
    fn from(t: LeaseTimes) -> Times {
        Times { lease_ms: t.lease_ms, renew_ms: t.renew_ms, margin_ms: t.margin_ms, clock_ppm: t.clock_ppm }
    }
}

impl From<Times> for LeaseTimes {
    fn from(t: Times) -> LeaseTimes {
        LeaseTimes { lease_ms: t.lease_ms, renew_ms: t.renew_ms, margin_ms: t.margin_ms, clock_ppm: t.clock_ppm }
    }
}

/// What is asked of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// First request of a connection.
    Hello {
        /// [`VERSION`] of the client.
        version: u32,
    },
    /// This connection speaks for a mount: its end is the mount's end. Carries one descriptor, the gate page to write.
    Attach {
        /// The mount.
        mount: MountIdentity,
    },
    /// Takes a slot.
    Join {
        /// Where.
        lun: LunPlace,
        /// Lease parameters.
        lease: Times,
        /// Slot to take when it is free.
        prefer: Option<u8>,
    },
    /// Goes on with a slot that the mount has: after the daemon was away.
    Resume {
        /// Where.
        lun: LunPlace,
        /// Lease parameters.
        lease: Times,
        /// The slot.
        slot: u8,
        /// Its generation.
        generation: u64,
    },
    /// Leaves a slot.
    Leave {
        /// Index of the LUN.
        lun: u8,
        /// Nothing is left behind: the slot becomes free, else dirty.
        clean: bool,
    },
    /// What is kept.
    Status,
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "kebab-case")]
pub enum Tell {
    /// To `Hello`.
    Welcome {
        /// [`VERSION`] of the daemon.
        version: u32,
    },
    /// To `Attach`.
    Attached,
    /// To `Join`.
    Joined {
        /// The slot.
        slot: u8,
        /// Its generation.
        generation: u64,
        /// End of the lease, CLOCK_BOOTTIME in nanoseconds.
        lease_until: u64,
    },
    /// To `Resume`: it is looked after; what the slot shows is told by the gate page, or `Over`.
    Resumed,
    /// To `Leave`.
    Left,
    /// To `Status`.
    Facts {
        /// A JSON value as `vmfs-lockd status --json` prints it.
        value: serde_json::Value,
    },
    /// The request was refused or failed.
    Refused {
        /// errno(3).
        errno: i32,
        /// Object, cause, next step.
        message: String,
    },
    /// Unasked: the incarnation is over on a LUN.
    Over {
        /// Index of the LUN.
        lun: u8,
        /// The storage went back in time; else another host took the slot over.
        rolled_back: bool,
        /// Object, cause, next step.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{decode, encode};

    fn place(path: String) -> LunPlace {
        LunPlace { index: 2, uuid: Id(Uuid([0xab; 16])), path, window: None }
    }

    #[test]
    fn a_message_has_the_form_that_is_documented() {
        let text = String::from_utf8(encode(&Ask::Leave { lun: 2, clean: true })).unwrap();
        assert_eq!(text, r#"{"ask":"leave","lun":2,"clean":true}"#);
        assert!(decode::<Ask>(br#"{"ask":"leave","lun":2,"clean":true,"more":1}"#).is_err());
        assert!(decode::<Ask>(br#"{"ask":"leave","lun":256,"clean":true}"#).is_err());
        let text = String::from_utf8(encode(&Id(Uuid([0xab; 16])))).unwrap();
        assert_eq!(text, r#""abababab-abab-abab-abab-abababababab""#);
        assert!(decode::<Id>(br#""abc""#).is_err());
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode::<Ask>(&bytes);
            let _ = decode::<Tell>(&bytes);
        }

        #[test]
        fn messages_survive(
            path: String, slot: u8, generation: u64, lease: (u32, u32, u32, u32), window: Option<(u8, u64)>,
        ) {
            let lease = Times { lease_ms: lease.0, renew_ms: lease.1, margin_ms: lease.2, clock_ppm: lease.3 };
            let window = window.map(|(carrier, offset)| WindowPlace { carrier, offset });
            let ask = Ask::Resume { lun: LunPlace { window, ..place(path) }, lease, slot, generation };
            prop_assert_eq!(decode::<Ask>(&encode(&ask)).unwrap(), ask);
            prop_assert_eq!(Times::from(LeaseTimes::from(lease)), lease);
        }
    }
}
