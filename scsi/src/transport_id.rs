//! Owns: the names of initiator ports and of target ports.
//! Promises: any bytes give a TransportID or a refusal; what was encoded is decoded to the same.
//! Must not know: sessions, reservations.

/// What names an initiator port for ever (SPC-4, 7.6.4).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TransportId {
    /// iSCSI (RFC 7143): the initiator's name, and the ISID that makes it a port. Without an ISID it names the whole device.
    Iscsi {
        /// iSCSI name: at most 223 bytes.
        name: String,
        /// Initiator session identifier.
        isid: Option<[u8; 6]>,
    },
    /// A parallel bus: the form of adapters that are emulated inside of this host.
    ParallelScsi {
        /// SCSI address of the initiator.
        address: u16,
        /// Relative port identifier of the target port that it is seen through.
        port: u16,
    },
}

/// Longest iSCSI name (RFC 7143, 4.2.7.1).
const MAX_ISCSI_NAME: usize = 223;
/// Between name and ISID in the port form (SPC-4, 7.6.4.6).
const ISID_SEPARATOR: &str = ",i,0x";

impl TransportId {
    /// The encoded form: a multiple of 4 bytes, at least 24.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            TransportId::Iscsi { name, isid } => {
                let (format, text) = match isid {
                    None => (0x00, name.clone()),
                    Some(isid) => {
                        let digits: String = isid.iter().map(|byte| format!("{byte:02x}")).collect();
                        (0x40, format!("{name}{ISID_SEPARATOR}{digits}"))
                    }
                };
                // A null ends the text; zeros pad it to a multiple of 4.
                let padded = (text.len() + 1).next_multiple_of(4).max(20);
                let mut bytes = vec![format | 0x05, 0];
                bytes.extend_from_slice(&(padded as u16).to_be_bytes());
                bytes.extend_from_slice(text.as_bytes());
                bytes.resize(4 + padded, 0);
                bytes
            }
            TransportId::ParallelScsi { address, port } => {
                let mut bytes = vec![0; 24];
                bytes[0] = 0x01;
                bytes[2..4].copy_from_slice(&address.to_be_bytes());
                bytes[6..8].copy_from_slice(&port.to_be_bytes());
                bytes
            }
        }
    }

    /// Decodes the TransportID at the start of `bytes`; also returns its length. `None` for a form that is not known.
    pub fn decode(bytes: &[u8]) -> Option<(TransportId, usize)> {
        let &first = bytes.first()?;
        match (first & 0x0F, first >> 6) {
            (0x01, 0) => {
                let id = bytes.get(..24)?;
                let word = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
                Some((TransportId::ParallelScsi { address: word(2), port: word(6) }, 24))
            }
            (0x05, format @ (0 | 1)) => {
                let length = usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]));
                if length < 20 || !length.is_multiple_of(4) {
                    return None;
                }
                let field = bytes.get(4..4 + length)?;
                let text = &field[..field.iter().position(|&byte| byte == 0)?];
                let text = std::str::from_utf8(text).ok()?;
                Some((Self::from_text(text, format == 1)?, 4 + length))
            }
            _ => None,
        }
    }

    fn from_text(text: &str, with_isid: bool) -> Option<TransportId> {
        let (name, isid) = if with_isid {
            let (name, digits) = text.split_once(ISID_SEPARATOR)?;
            if digits.len() != 12 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return None;
            }
            let mut isid = [0; 6];
            isid.copy_from_slice(&u64::from_str_radix(digits, 16).ok()?.to_be_bytes()[2..]);
            (name, Some(isid))
        } else {
            (text, None)
        };
        let sane = !name.is_empty() && name.len() <= MAX_ISCSI_NAME;
        sane.then(|| TransportId::Iscsi { name: name.to_owned(), isid })
    }
}

/// A target port as initiators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPort {
    /// Relative target port identifier, from 1 on.
    pub relative_id: u16,
    /// Target port group (ALUA).
    pub group: u16,
    /// SCSI name string, for iSCSI `NAME,t,0xTAG`.
    pub name: Option<String>,
}

impl Default for TargetPort {
    fn default() -> Self {
        Self { relative_id: 1, group: 1, name: None }
    }
}

/// Asymmetric access state of a target port group (SPC-4, 5.15.2).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessState {
    /// Everything works, as fast as it can.
    ActiveOptimized = 0,
    /// Everything works.
    ActiveNonOptimized = 1,
    /// Only commands that do not touch the medium.
    Standby = 2,
    /// As standby; the port may be of no use for long.
    Unavailable = 3,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_iscsi_port_is_encoded_as_spc_4_table_532_says() {
        let id = TransportId::Iscsi { name: "iqn.x".into(), isid: Some([0, 2, 0x3D, 0, 0, 1]) };
        let mut expected = vec![0x45, 0, 0, 24];
        expected.extend_from_slice(b"iqn.x,i,0x00023d000001\0\0");
        assert_eq!(id.encode(), expected);
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(name in "[a-z.:]{1,60}", isid: Option<[u8; 6]>, address: u16, port: u16) {
            for id in [TransportId::Iscsi { name, isid }, TransportId::ParallelScsi { address, port }] {
                let mut bytes = id.encode();
                let length = bytes.len();
                prop_assert!(length >= 24 && length.is_multiple_of(4));
                bytes.push(0xFF);
                prop_assert_eq!(TransportId::decode(&bytes), Some((id, length)));
            }
        }

        #[test]
        fn any_bytes_decode_or_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..80), known: bool) {
            if known && bytes.len() > 3 {
                bytes[0] = 0x45;
                bytes[2] = 0;
            }
            if let Some((_, length)) = TransportId::decode(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
