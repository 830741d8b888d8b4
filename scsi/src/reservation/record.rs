//! Owns: the bytes in which persistent reservations survive a restart.
//! Promises: what was encoded is decoded to the same; anything else is refused by its cause.
//! Must not know: where the bytes are kept.
//!
//! All numbers are little-endian: magic (8 bytes), version (u32), body length (u32), CRC32C of the body (u32), body. The body:
//! generation (u32), number of registrations (u32), reservation type (u8, 0 for none), index of its holder (u32, FFFFFFFFh for all),
//! and for each registration its key (u64), target port (u16), all ports (u8) and TransportID in its SPC-4 form.

use super::{Kind, MAX_REGISTRATIONS, Persistent, Port, Registration, Reservation};
use crate::transport_id::TransportId;

const MAGIC: &[u8; 8] = b"SCSIRSV\n";
const VERSION: u32 = 1;
const HEADER: usize = 20;
const NOBODY: u32 = u32::MAX;

/// Why a saved record of persistent reservations cannot be used. The unit must not go into service without it: hosts that were
/// shut out could write again. To go on without the reservations, remove the record by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Not a record at all, or cut off.
    #[error("the record of persistent reservations is not one ({length} bytes); if no host relies on it, remove it")]
    NotARecord {
        /// Its length in bytes.
        length: usize,
    },
    /// Written by a later version.
    #[error(
        "the record of persistent reservations has version {found}, this program knows {VERSION}; use a later program"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// The checksum does not match.
    #[error("the record of persistent reservations is damaged (checksum); if no host relies on it, remove it")]
    Checksum,
    /// The checksum matches, but the content makes no sense.
    #[error("the record of persistent reservations contradicts itself; if no host relies on it, remove it")]
    Content,
}

pub(super) fn encode(state: &Persistent) -> Vec<u8> {
    let (kind, holder) = match &state.reservation {
        None => (0, NOBODY),
        Some(reservation) => {
            let index = reservation
                .holder
                .as_ref()
                .and_then(|port| state.registrations.iter().position(|registration| registration.port == *port));
            (reservation.kind as u8, index.map_or(NOBODY, |index| index as u32))
        }
    };
    let mut body = state.generation.to_le_bytes().to_vec();
    body.extend_from_slice(&(state.registrations.len() as u32).to_le_bytes());
    body.push(kind);
    body.extend_from_slice(&holder.to_le_bytes());
    for registration in &state.registrations {
        body.extend_from_slice(&registration.key.to_le_bytes());
        body.extend_from_slice(&registration.port.target_port.to_le_bytes());
        body.push(u8::from(registration.all_ports));
        body.extend_from_slice(&registration.port.initiator.encode());
    }
    let mut record = MAGIC.to_vec();
    record.extend_from_slice(&VERSION.to_le_bytes());
    record.extend_from_slice(&(body.len() as u32).to_le_bytes());
    record.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    record.extend_from_slice(&body);
    record
}

pub(super) fn decode(record: &[u8]) -> Result<Persistent, RestoreError> {
    let not_a_record = RestoreError::NotARecord { length: record.len() };
    let header = record.get(..HEADER).filter(|header| header.starts_with(MAGIC)).ok_or(not_a_record)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if word(8) != VERSION {
        return Err(RestoreError::Version { found: word(8) });
    }
    let body = &record[HEADER..];
    if body.len() != word(12) as usize {
        return Err(not_a_record);
    }
    if crc32c::crc32c(body) != word(16) {
        return Err(RestoreError::Checksum);
    }
    decode_body(body).ok_or(RestoreError::Content)
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (&bytes, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(bytes)
}

fn decode_body(mut rest: &[u8]) -> Option<Persistent> {
    let generation = u32::from_le_bytes(take(&mut rest)?);
    let count = u32::from_le_bytes(take(&mut rest)?) as usize;
    let [kind] = take(&mut rest)?;
    let holder = u32::from_le_bytes(take(&mut rest)?);
    if count > MAX_REGISTRATIONS {
        return None;
    }
    let mut registrations: Vec<Registration> = Vec::with_capacity(count);
    for _ in 0..count {
        let key = u64::from_le_bytes(take(&mut rest)?);
        let target_port = u16::from_le_bytes(take(&mut rest)?);
        let [all_ports] = take(&mut rest)?;
        let (initiator, length) = TransportId::decode(rest)?;
        rest = &rest[length..];
        let port = Port { initiator, target_port };
        if key == 0 || all_ports > 1 || registrations.iter().any(|known| known.port == port) {
            return None;
        }
        registrations.push(Registration { key, port, all_ports: all_ports == 1 });
    }
    let reservation = match kind {
        0 if holder == NOBODY => None,
        0 => return None,
        code => {
            let kind = Kind::from_code(code)?;
            let holder = match (kind.is_for_all(), holder) {
                (true, NOBODY) if count > 0 => None,
                (false, index) => Some(registrations.get(index as usize)?.port.clone()),
                _ => return None,
            };
            Some(Reservation { kind, holder })
        }
    };
    // Only what persists is ever saved; an empty record is what is left when nothing does any more.
    let aptpl = count > 0;
    rest.is_empty().then_some(Persistent { generation, aptpl, registrations, reservation })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> Persistent {
        let port = |byte: u8| Port {
            initiator: TransportId::Iscsi { name: "iqn.host".into(), isid: Some([byte; 6]) },
            target_port: 1,
        };
        Persistent {
            generation: 7,
            aptpl: true,
            registrations: (1..4)
                .map(|byte| Registration { key: u64::from(byte), port: port(byte), all_ports: false })
                .collect(),
            reservation: Some(Reservation { kind: Kind::WriteExclusive, holder: Some(port(2)) }),
        }
    }

    #[test]
    fn what_was_saved_is_restored() {
        let single = state();
        assert_eq!(decode(&encode(&single)), Ok(single.clone()));
        let all =
            Persistent { reservation: Some(Reservation { kind: Kind::WriteExclusiveAll, holder: None }), ..single };
        assert_eq!(decode(&encode(&all)), Ok(all));
        assert_eq!(decode(&encode(&Persistent::default())), Ok(Persistent::default()));
    }

    #[test]
    fn a_record_that_is_cut_or_of_another_version_is_refused_by_its_cause() {
        let record = encode(&state());
        assert_eq!(decode(&[]), Err(RestoreError::NotARecord { length: 0 }));
        assert_eq!(decode(&record[..30]), Err(RestoreError::NotARecord { length: 30 }));
        let mut later = record.clone();
        later[8] = 2;
        assert_eq!(decode(&later), Err(RestoreError::Version { found: 2 }));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_passes(at in any::<prop::sample::Index>(), by in 1u8..) {
            let mut record = encode(&state());
            let at = at.index(record.len());
            record[at] ^= by;
            prop_assert!(decode(&record).is_err());
        }

        #[test]
        fn a_body_of_any_bytes_is_taken_or_refused(body in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..90)) {
            let _ = decode_body(&body);
        }
    }
}
