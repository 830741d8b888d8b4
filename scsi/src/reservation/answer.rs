//! Owns: the parameter data of PERSISTENT RESERVE IN (SPC-4, 6.16).
//! Promises: lengths are those of the whole answer, also when the initiator takes less.
//! Must not know: transports, allocation lengths.

use super::{Persistent, Registration};
use crate::cdb::PersistentIn;

pub(super) fn encode(state: &Persistent, action: PersistentIn) -> Vec<u8> {
    match action {
        PersistentIn::ReadKeys => {
            let keys = state.registrations.iter().flat_map(|registration| registration.key.to_be_bytes());
            with_header(state, keys.collect())
        }
        PersistentIn::ReadReservation => with_header(state, reservation(state)),
        PersistentIn::ReportCapabilities => capabilities(state),
        PersistentIn::ReadFullStatus => {
            with_header(state, state.registrations.iter().flat_map(|one| full_status(state, one)).collect())
        }
    }
}

fn with_header(state: &Persistent, body: Vec<u8>) -> Vec<u8> {
    let mut data = state.generation.to_be_bytes().to_vec();
    data.extend_from_slice(&(body.len() as u32).to_be_bytes());
    data.extend_from_slice(&body);
    data
}

fn reservation(state: &Persistent) -> Vec<u8> {
    let Some(reservation) = &state.reservation else { return Vec::new() };
    let holder = reservation.holder.as_ref().and_then(|port| state.registration(port));
    let mut body = holder.map_or(0, |registration| registration.key).to_be_bytes().to_vec();
    body.extend_from_slice(&[0, 0, 0, 0, 0, reservation.kind as u8, 0, 0]);
    body
}

/// SIP_C, ATP_C, PTPL_C; TMV with all six types; PTPL_A.
fn capabilities(state: &Persistent) -> Vec<u8> {
    vec![0, 8, 0x08 | 0x04 | 0x01, 0x80 | u8::from(state.aptpl), 0xEA, 0x01, 0, 0]
}

fn full_status(state: &Persistent, registration: &Registration) -> Vec<u8> {
    let holds = state.holds(&registration.port);
    let kind = state.reservation.as_ref().filter(|_| holds).map_or(0, |reservation| reservation.kind as u8);
    let id = registration.port.initiator.encode();
    let mut data = registration.key.to_be_bytes().to_vec();
    data.extend_from_slice(&[0, 0, 0, 0, u8::from(registration.all_ports) << 1 | u8::from(holds), kind, 0, 0, 0, 0]);
    data.extend_from_slice(&registration.port.target_port.to_be_bytes());
    data.extend_from_slice(&(id.len() as u32).to_be_bytes());
    data.extend_from_slice(&id);
    data
}
