//! Promises of PERSISTENT RESERVE OUT.

use super::*;
use proptest::prelude::*;

const PORTS: Lists<'static> = Lists { target_ports: &[1, 2], can_persist: true };

fn port(number: u8) -> Port {
    let initiator = TransportId::Iscsi { name: format!("iqn.host{number}"), isid: Some([number; 6]) };
    Port { initiator, target_port: 1 }
}

/// A parameter list with both keys and the flags of byte 20.
fn list(key: u64, action_key: u64, flags: u8) -> Vec<u8> {
    let mut list = [key.to_be_bytes(), action_key.to_be_bytes(), [0; 8]].concat();
    list[20] = flags;
    list
}

/// A unit whose state changes by requests.
#[derive(Default)]
struct Unit(Persistent);

impl Unit {
    fn try_out(&mut self, who: u8, action: PersistentOut, kind: u8, list: &[u8]) -> Result<Outcome, Failure> {
        let request = Request::parse(action, 0, kind, list, &PORTS)?;
        let (next, outcome) = apply(&self.0, &port(who), &request, &PORTS)?;
        self.0 = next;
        Ok(outcome)
    }

    fn out(&mut self, who: u8, action: PersistentOut, kind: u8, key: u64, action_key: u64) -> Outcome {
        self.try_out(who, action, kind, &list(key, action_key, 0)).expect("the request is right")
    }

    fn refused(&mut self, who: u8, action: PersistentOut, kind: u8, key: u64, action_key: u64) -> Failure {
        let before = self.0.clone();
        let failure = self.try_out(who, action, kind, &list(key, action_key, 0)).unwrap_err();
        assert_eq!(self.0, before);
        failure
    }

    /// Hosts 1 to 3, registered with keys 11, 12 and 13.
    fn with_three() -> Self {
        let mut unit = Unit::default();
        for who in 1..=3 {
            unit.out(who, PersistentOut::Register, 0, 0, 10 + u64::from(who));
        }
        unit
    }

    fn keys(&self) -> Vec<u64> {
        self.0.registrations.iter().map(|registration| registration.key).collect()
    }

    fn holder(&self) -> Option<(Kind, Option<Port>)> {
        self.0.reservation.clone().map(|reservation| (reservation.kind, reservation.holder))
    }
}

#[test]
fn a_key_is_registered_changed_and_given_up_by_who_knows_it() {
    let mut unit = Unit::default();
    assert_eq!(unit.refused(1, PersistentOut::Register, 0, 5, 6), Failure::Conflict);
    unit.out(1, PersistentOut::Register, 0, 0, 6);
    assert_eq!(unit.refused(1, PersistentOut::Register, 0, 0, 7), Failure::Conflict);
    unit.out(1, PersistentOut::Register, 0, 6, 7);
    assert_eq!((unit.keys(), unit.0.generation), (vec![7], 2));
    unit.out(1, PersistentOut::RegisterAndIgnore, 0, 99, 8);
    assert_eq!(unit.keys(), [8]);
    unit.out(1, PersistentOut::Register, 0, 8, 0);
    assert_eq!((unit.keys(), unit.0.generation), (vec![], 4));
}

#[test]
fn only_registrants_reserve_and_only_one_at_a_time() {
    let mut unit = Unit::with_three();
    assert_eq!(unit.refused(4, PersistentOut::Reserve, 1, 0, 0), Failure::Conflict);
    assert_eq!(unit.refused(1, PersistentOut::Reserve, 1, 99, 0), Failure::Conflict);
    assert_eq!(unit.refused(1, PersistentOut::Reserve, 2, 11, 0), Sense::cdb_field(2, Some(3)).into());
    unit.out(1, PersistentOut::Reserve, 1, 11, 0);
    unit.out(1, PersistentOut::Reserve, 1, 11, 0);
    assert_eq!(unit.refused(1, PersistentOut::Reserve, 3, 11, 0), Failure::Conflict);
    assert_eq!(unit.refused(2, PersistentOut::Reserve, 1, 12, 0), Failure::Conflict);
    assert_eq!(unit.holder(), Some((Kind::WriteExclusive, Some(port(1)))));
    assert_eq!(unit.0.generation, 3);
}

#[test]
fn release_needs_the_right_type_and_is_nothing_for_who_does_not_hold_it() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 5, 11, 0);
    assert_eq!(unit.out(2, PersistentOut::Release, 5, 12, 0), Outcome::default());
    assert!(unit.holder().is_some());
    assert_eq!(unit.refused(1, PersistentOut::Release, 1, 11, 0), Sense::INVALID_RELEASE.into());
    let told = unit.out(1, PersistentOut::Release, 5, 11, 0).attentions;
    let released = UnitAttention::ReservationsReleased;
    assert_eq!(told, [(port(2), released), (port(3), released)]);
    assert_eq!(unit.holder(), None);
}

#[test]
fn all_registrants_hold_a_reservation_of_their_type_until_the_last_one_goes() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 7, 11, 0);
    unit.out(2, PersistentOut::Reserve, 7, 12, 0);
    assert!(unit.0.holds(&port(3)));
    unit.out(1, PersistentOut::Register, 0, 11, 0);
    unit.out(2, PersistentOut::Register, 0, 12, 0);
    assert_eq!(unit.holder(), Some((Kind::WriteExclusiveAll, None)));
    unit.out(3, PersistentOut::Register, 0, 13, 0);
    assert_eq!(unit.holder(), None);
}

#[test]
fn the_holder_who_gives_up_its_key_ends_the_reservation() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 6, 11, 0);
    let told = unit.out(1, PersistentOut::Register, 0, 11, 0).attentions;
    assert_eq!(told.len(), 2);
    assert_eq!(unit.holder(), None);
}

#[test]
fn clear_removes_everything_and_tells_the_others() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 3, 11, 0);
    let preempted = UnitAttention::ReservationsPreempted;
    assert_eq!(unit.out(2, PersistentOut::Clear, 0, 12, 0).attentions, [(port(1), preempted), (port(3), preempted)]);
    assert_eq!((unit.keys(), unit.holder(), unit.0.generation), (vec![], None, 4));
}

#[test]
fn preempting_the_holder_takes_its_place_and_its_registration() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 1, 11, 0);
    let outcome = unit.out(2, PersistentOut::PreemptAndAbort, 3, 12, 11);
    assert_eq!(outcome.abort, [port(1)]);
    let expected = [(port(3), UnitAttention::ReservationsReleased), (port(1), UnitAttention::RegistrationsPreempted)];
    assert_eq!(outcome.attentions, expected);
    assert_eq!(unit.keys(), [12, 13]);
    assert_eq!(unit.holder(), Some((Kind::ExclusiveAccess, Some(port(2)))));
}

#[test]
fn preempting_somebody_else_removes_the_registration_only() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 1, 11, 0);
    unit.out(2, PersistentOut::Preempt, 1, 12, 13);
    assert_eq!(unit.keys(), [11, 12]);
    assert_eq!(unit.holder(), Some((Kind::WriteExclusive, Some(port(1)))));
    assert_eq!(unit.refused(2, PersistentOut::Preempt, 1, 12, 13), Failure::Conflict);
    assert_eq!(unit.refused(2, PersistentOut::Preempt, 1, 12, 0), Sense::parameter_field(8).into());
}

#[test]
fn a_reservation_of_all_registrants_is_preempted_by_the_key_zero() {
    let mut unit = Unit::with_three();
    unit.out(1, PersistentOut::Reserve, 7, 11, 0);
    unit.out(2, PersistentOut::Preempt, 7, 12, 13);
    assert_eq!((unit.keys(), unit.holder()), (vec![11, 12], Some((Kind::WriteExclusiveAll, None))));
    unit.out(2, PersistentOut::Preempt, 5, 12, 0);
    assert_eq!(unit.keys(), [12]);
    assert_eq!(unit.holder(), Some((Kind::WriteExclusiveRegistrants, Some(port(2)))));
}

#[test]
fn a_reservation_is_moved_to_a_port_that_the_holder_names() {
    let mut unit = Unit::with_three();
    let id = port(4).initiator.encode();
    let mut move_list = [11u64.to_be_bytes(), 44u64.to_be_bytes(), [0; 8]].concat();
    move_list[17] = 2;
    move_list[19] = 1;
    move_list[23] = id.len() as u8;
    move_list.extend_from_slice(&id);
    let action = PersistentOut::RegisterAndMove;
    assert_eq!(unit.try_out(1, action, 1, &move_list).unwrap_err(), Failure::Conflict);
    unit.out(1, PersistentOut::Reserve, 1, 11, 0);
    unit.try_out(1, action, 1, &move_list).unwrap();
    assert_eq!(unit.keys(), [12, 13, 44]);
    assert_eq!(unit.holder(), Some((Kind::WriteExclusive, Some(port(4)))));
    move_list[19] = 9;
    assert_eq!(unit.try_out(4, action, 1, &move_list).unwrap_err(), Sense::parameter_field(18).into());
}

#[test]
fn named_initiators_and_all_ports_are_registered_together_or_not_at_all() {
    let mut unit = Unit::default();
    let ids = [port(2).initiator.encode(), port(3).initiator.encode()].concat();
    let mut register = list(0, 7, 0x08 | 0x04);
    register.extend_from_slice(&(ids.len() as u32).to_be_bytes());
    register.extend_from_slice(&ids);
    unit.try_out(1, PersistentOut::Register, 0, &register).unwrap();
    assert_eq!(unit.keys(), [7; 6]);
    let before = unit.0.clone();
    assert_eq!(unit.try_out(4, PersistentOut::Register, 0, &register).unwrap_err(), Sense::parameter_field(24).into());
    assert_eq!(unit.0, before);
    let ignore = unit.try_out(4, PersistentOut::RegisterAndIgnore, 0, &register).unwrap_err();
    assert_eq!(ignore, Sense::parameter_field(20).into());
}

#[test]
fn a_list_of_another_length_is_refused() {
    let mut unit = Unit::default();
    for length in [0, 23, 25] {
        let failure = unit.try_out(1, PersistentOut::Register, 0, &vec![0; length]).unwrap_err();
        assert_eq!(failure, Sense::PARAMETER_LIST_LENGTH.into());
    }
}

fn any_action() -> impl Strategy<Value = PersistentOut> {
    prop::sample::select(vec![
        PersistentOut::Register,
        PersistentOut::Reserve,
        PersistentOut::Release,
        PersistentOut::Clear,
        PersistentOut::Preempt,
        PersistentOut::PreemptAndAbort,
        PersistentOut::RegisterAndIgnore,
        PersistentOut::RegisterAndMove,
    ])
}

proptest! {
    #[test]
    fn the_state_stays_whole_whatever_is_asked(
        steps in prop::collection::vec((1u8..4, any_action(), 0u8..10, 0u64..3, 0u64..3, any::<[bool; 3]>()), 1..40),
    ) {
        let mut unit = Unit::default();
        for (who, action, kind, key, action_key, flags) in steps {
            let mut list = list(key, action_key, u8::from(flags[0]) | u8::from(flags[1]) << 2);
            if action == PersistentOut::RegisterAndMove {
                let id = port(who % 3 + 1).initiator.encode();
                list[17] = u8::from(flags[2]) << 1;
                list[20..24].copy_from_slice(&(id.len() as u32).to_be_bytes());
                list[19] = 1;
                list.extend_from_slice(&id);
            }
            let generation = unit.0.generation;
            let done = unit.try_out(who, action, kind, &list).is_ok();
            let counted = !matches!(action, PersistentOut::Reserve | PersistentOut::Release);
            prop_assert_eq!(unit.0.generation - generation, u32::from(done && counted));
            prop_assert!(unit.0.registrations.iter().all(|registration| registration.key != 0));
            if let Some(reservation) = &unit.0.reservation {
                prop_assert_eq!(reservation.holder.is_none(), reservation.kind.is_for_all());
                let held = reservation.holder.as_ref().is_none_or(|holder| unit.0.registration(holder).is_some());
                prop_assert!(held && !unit.0.registrations.is_empty());
            }
            let record = super::super::record::encode(&unit.0);
            let restored = super::super::record::decode(&record).unwrap();
            prop_assert_eq!(&restored.registrations, &unit.0.registrations);
            prop_assert_eq!(&restored.reservation, &unit.0.reservation);
        }
    }

    #[test]
    fn any_parameter_list_is_taken_or_refused(
        action in any_action(),
        bytes in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => Just(0x45u8), 1 => any::<u8>()], 0..100),
    ) {
        let _ = Unit::with_three().try_out(1, action, 1, &bytes);
    }
}
