//! Owns: what each service action of PERSISTENT RESERVE OUT does (SPC-4, 5.13 and 6.17), as a function of state and request.
//! Promises: a refused request gives no new state; the number of registrations is bounded.
//! Must not know: sessions, tasks, how the state is kept.

use super::{Kind, Persistent, Port, Registration, Reservation};
use crate::attention::UnitAttention;
use crate::cdb::PersistentOut;
use crate::sense::{Failure, Sense};
use crate::transport_id::TransportId;

/// The most registrations of one unit.
pub(crate) const MAX_REGISTRATIONS: usize = 1024;

/// A checked PERSISTENT RESERVE OUT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    action: PersistentOut,
    scope: u8,
    kind: u8,
    key: u64,
    action_key: u64,
    specified: Vec<TransportId>,
    all_ports: bool,
    aptpl: bool,
    /// REGISTER AND MOVE: where to.
    target: Option<Port>,
    unregister: bool,
}

/// What the server knows of its ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists<'a> {
    /// Relative identifiers of all target ports.
    pub(crate) target_ports: &'a [u16],
    /// APTPL can be kept.
    pub(crate) can_persist: bool,
}

/// What a change means for others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) attentions: Vec<(Port, UnitAttention)>,
    pub(super) abort: Vec<Port>,
}

impl Request {
    /// Checks the parameter list as far as it can be done without knowing the state.
    pub(crate) fn parse(
        action: PersistentOut,
        scope: u8,
        kind: u8,
        list: &[u8],
        lists: &Lists<'_>,
    ) -> Result<Request, Sense> {
        let head = list.first_chunk::<24>().ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        let long = |at: usize| u64::from_be_bytes(*head[at..].first_chunk().expect("8 bytes"));
        let mut request = Request {
            action,
            scope,
            kind,
            key: long(0),
            action_key: long(8),
            specified: Vec::new(),
            all_ports: false,
            aptpl: false,
            target: None,
            unregister: false,
        };
        if action == PersistentOut::RegisterAndMove {
            request.parse_move(list, lists)?;
            return Ok(request);
        }
        let registers = matches!(action, PersistentOut::Register | PersistentOut::RegisterAndIgnore);
        let flags = head[20];
        if flags & 0x08 != 0 {
            // SPEC_I_PT
            if action != PersistentOut::Register {
                return Err(Sense::parameter_field(20));
            }
            request.specified = parse_ids(&list[24..])?;
        } else if list.len() != 24 {
            return Err(Sense::PARAMETER_LIST_LENGTH);
        }
        if registers {
            request.all_ports = flags & 0x04 != 0;
            request.aptpl = flags & 0x01 != 0;
            if request.aptpl && !lists.can_persist {
                return Err(Sense::parameter_field(20));
            }
        }
        Ok(request)
    }

    fn parse_move(&mut self, list: &[u8], lists: &Lists<'_>) -> Result<(), Sense> {
        self.unregister = list[17] & 2 != 0;
        self.aptpl = list[17] & 1 != 0;
        if self.aptpl && !lists.can_persist {
            return Err(Sense::parameter_field(17));
        }
        let target_port = u16::from_be_bytes([list[18], list[19]]);
        if !lists.target_ports.contains(&target_port) {
            return Err(Sense::parameter_field(18));
        }
        let length = u32::from_be_bytes([list[20], list[21], list[22], list[23]]) as usize;
        if list.len() - 24 != length {
            return Err(Sense::PARAMETER_LIST_LENGTH);
        }
        let (initiator, used) = TransportId::decode(&list[24..]).ok_or(Sense::parameter_field(24))?;
        if used != length || !names_a_port(&initiator) {
            return Err(Sense::parameter_field(24));
        }
        self.target = Some(Port { initiator, target_port });
        Ok(())
    }

    fn kind(&self) -> Result<Kind, Sense> {
        if self.scope != 0 {
            return Err(Sense::cdb_field(2, Some(7)));
        }
        Kind::from_code(self.kind).ok_or(Sense::cdb_field(2, Some(3)))
    }
}

/// A TransportID of a whole iSCSI device does not say which of its ports is meant.
fn names_a_port(id: &TransportId) -> bool {
    !matches!(id, TransportId::Iscsi { isid: None, .. })
}

/// The TransportIDs of a REGISTER with SPEC_I_PT.
fn parse_ids(bytes: &[u8]) -> Result<Vec<TransportId>, Sense> {
    let (length, mut rest) = bytes.split_first_chunk::<4>().ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    if rest.len() != u32::from_be_bytes(*length) as usize {
        return Err(Sense::PARAMETER_LIST_LENGTH);
    }
    let mut ids = Vec::new();
    let mut at = 28;
    while !rest.is_empty() {
        let (id, used) = TransportId::decode(rest).ok_or(Sense::parameter_field(at))?;
        if !names_a_port(&id) || ids.contains(&id) {
            return Err(Sense::parameter_field(at));
        }
        if ids.len() == MAX_REGISTRATIONS {
            return Err(Sense::INSUFFICIENT_REGISTRATIONS);
        }
        ids.push(id);
        rest = &rest[used..];
        at += used as u16;
    }
    Ok(ids)
}

/// The state after `request` of `port`, and what it means for others.
pub(super) fn apply(
    now: &Persistent,
    port: &Port,
    request: &Request,
    lists: &Lists<'_>,
) -> Result<(Persistent, Outcome), Failure> {
    let own = now.registration(port).map(|registration| registration.key);
    let mut change = Change { next: now.clone(), outcome: Outcome::default() };
    let registers = matches!(request.action, PersistentOut::Register | PersistentOut::RegisterAndIgnore);
    match (own, request.action) {
        (_, PersistentOut::RegisterAndIgnore) => {}
        (None, PersistentOut::Register) if request.key == 0 => {}
        (Some(key), _) if key == request.key => {}
        _ => return Err(Failure::Conflict),
    }
    if registers {
        change.register(port, own.is_some(), request, lists)?;
    } else {
        match request.action {
            PersistentOut::Reserve => change.reserve(port, request.kind()?)?,
            PersistentOut::Release => change.release(port, request)?,
            PersistentOut::Clear => change.clear(port),
            PersistentOut::Preempt => change.preempt(port, request, false)?,
            PersistentOut::PreemptAndAbort => change.preempt(port, request, true)?,
            _ => change.move_to(port, request)?,
        }
    }
    if !matches!(request.action, PersistentOut::Reserve | PersistentOut::Release) {
        change.next.generation = change.next.generation.wrapping_add(1);
    }
    Ok((change.next, change.outcome))
}

struct Change {
    next: Persistent,
    outcome: Outcome,
}

impl Change {
    /// REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-4, 5.13.7).
    fn register(&mut self, port: &Port, known: bool, request: &Request, lists: &Lists<'_>) -> Result<(), Failure> {
        if known && !request.specified.is_empty() {
            return Err(Sense::parameter_field(20).into());
        }
        let target_ports = match request.all_ports {
            true => lists.target_ports,
            false => std::slice::from_ref(&port.target_port),
        };
        let initiators: Vec<&TransportId> = std::iter::once(&port.initiator).chain(&request.specified).collect();
        let ports = initiators.iter().flat_map(|initiator| {
            target_ports.iter().map(|&id| Port { initiator: (*initiator).clone(), target_port: id })
        });
        if request.action_key == 0 {
            for each in ports {
                self.unregister(&each);
            }
        } else {
            for each in ports {
                self.set_key(each, port, request)?;
            }
        }
        self.next.aptpl = request.aptpl;
        Ok(())
    }

    fn set_key(&mut self, each: Port, own: &Port, request: &Request) -> Result<(), Failure> {
        if let Some(known) = self.next.registrations.iter_mut().find(|known| known.port == each) {
            if each.initiator != own.initiator {
                // SPEC_I_PT names a port that has registered already.
                return Err(Sense::parameter_field(24).into());
            }
            known.key = request.action_key;
            known.all_ports = request.all_ports;
            return Ok(());
        }
        if self.next.registrations.len() == MAX_REGISTRATIONS {
            return Err(Sense::INSUFFICIENT_REGISTRATIONS.into());
        }
        let all_ports = request.all_ports;
        self.next.registrations.push(Registration { key: request.action_key, port: each, all_ports });
        Ok(())
    }

    /// Takes a registration away; a reservation that it held alone, or as the last one, ends (SPC-4, 5.13.11.2.3).
    fn unregister(&mut self, port: &Port) {
        let held = self.next.holds(port);
        self.next.registrations.retain(|registration| registration.port != *port);
        let alone = self.next.reservation.as_ref().is_some_and(|reservation| reservation.holder.is_some());
        if held && (alone || self.next.registrations.is_empty()) {
            self.end_reservation(port);
        }
    }

    /// Ends the reservation; the registrants that it admitted are told.
    fn end_reservation(&mut self, by: &Port) {
        let Some(reservation) = self.next.reservation.take() else { return };
        if reservation.kind.admits_registrants() {
            self.tell_others(by, UnitAttention::ReservationsReleased);
        }
    }

    fn tell_others(&mut self, by: &Port, attention: UnitAttention) {
        let others = self.next.registrations.iter().filter(|registration| registration.port != *by);
        self.outcome.attentions.extend(others.map(|registration| (registration.port.clone(), attention)));
    }

    /// RESERVE (SPC-4, 5.13.9).
    fn reserve(&mut self, port: &Port, kind: Kind) -> Result<(), Failure> {
        match &self.next.reservation {
            None => self.set_reservation(port, kind),
            Some(reservation) if reservation.kind == kind && self.next.holds(port) => {}
            Some(_) => return Err(Failure::Conflict),
        }
        Ok(())
    }

    fn set_reservation(&mut self, port: &Port, kind: Kind) {
        let holder = (!kind.is_for_all()).then(|| port.clone());
        self.next.reservation = Some(Reservation { kind, holder });
    }

    /// RELEASE (SPC-4, 5.13.11.2.2).
    fn release(&mut self, port: &Port, request: &Request) -> Result<(), Failure> {
        let Some(reservation) = self.next.reservation.as_ref().filter(|_| self.next.holds(port)) else { return Ok(()) };
        if request.scope != 0 || request.kind != reservation.kind as u8 {
            return Err(Sense::INVALID_RELEASE.into());
        }
        self.end_reservation(port);
        Ok(())
    }

    /// CLEAR (SPC-4, 5.13.11.2.6).
    fn clear(&mut self, port: &Port) {
        self.tell_others(port, UnitAttention::ReservationsPreempted);
        self.next.registrations.clear();
        self.next.reservation = None;
    }

    /// PREEMPT and PREEMPT AND ABORT (SPC-4, 5.13.11.2.4 and .5).
    fn preempt(&mut self, port: &Port, request: &Request, abort: bool) -> Result<(), Failure> {
        let key = request.action_key;
        let for_all = self.next.reservation.as_ref().is_some_and(|reservation| reservation.holder.is_none());
        let held_by_key = self.next.reservation.as_ref().is_some_and(|reservation| match &reservation.holder {
            Some(holder) => self.next.registration(holder).is_some_and(|registration| registration.key == key),
            None => key == 0,
        });
        if key == 0 && !for_all {
            return Err(Sense::parameter_field(8).into());
        }
        let all = key == 0;
        if !all && !self.next.registrations.iter().any(|registration| registration.key == key) {
            return Err(Failure::Conflict);
        }
        let new_kind = if held_by_key { Some(request.kind()?) } else { None };
        let (kept, removed): (Vec<_>, Vec<_>) = std::mem::take(&mut self.next.registrations)
            .into_iter()
            .partition(|registration| registration.port == *port || !(all || registration.key == key));
        self.next.registrations = kept;
        if let Some(kind) = new_kind {
            let old = self.next.reservation.replace(Reservation { kind, holder: None });
            self.set_reservation(port, kind);
            if old.is_some_and(|old| old.kind != kind) {
                self.tell_others(port, UnitAttention::ReservationsReleased);
            }
        }
        for registration in removed {
            self.outcome.attentions.push((registration.port.clone(), UnitAttention::RegistrationsPreempted));
            if abort {
                self.outcome.abort.push(registration.port);
            }
        }
        Ok(())
    }

    /// REGISTER AND MOVE (SPC-4, 5.13.8).
    fn move_to(&mut self, port: &Port, request: &Request) -> Result<(), Failure> {
        let Some(reservation) = &self.next.reservation else { return Err(Failure::Conflict) };
        let kind = reservation.kind;
        if kind.is_for_all() || !self.next.holds(port) {
            return Err(Failure::Conflict);
        }
        if request.action_key == 0 {
            return Err(Sense::parameter_field(8).into());
        }
        let Some(target) = request.target.clone().filter(|target| target != port) else {
            return Err(Sense::parameter_field(24).into());
        };
        let full = self.next.registrations.len() == MAX_REGISTRATIONS;
        match self.next.registrations.iter_mut().find(|known| known.port == target) {
            Some(known) => known.key = request.action_key,
            None if full => {
                return Err(Sense::INSUFFICIENT_REGISTRATIONS.into());
            }
            None => {
                let registration = Registration { key: request.action_key, port: target.clone(), all_ports: false };
                self.next.registrations.push(registration);
            }
        }
        self.next.reservation = Some(Reservation { kind, holder: Some(target) });
        if request.unregister {
            self.next.registrations.retain(|registration| registration.port != *port);
        }
        self.next.aptpl = request.aptpl;
        Ok(())
    }
}

#[cfg(test)]
#[path = "change_tests.rs"]
mod tests;
