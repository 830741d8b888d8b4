//! Owns: unit attention conditions, pending for each nexus of a unit.
//! Promises: each condition is reported once to each nexus, the gravest first; memory is bounded by the nexus count.
//! Must not know: which commands report or bypass them.

use std::cell::RefCell;

use crate::sense::Sense;
use crate::task::NexusId;

/// A change that initiators must be told of, gravest first.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitAttention {
    /// Power on occurred.
    PowerOn,
    /// SCSI bus reset occurred.
    BusReset,
    /// Bus device reset function occurred.
    DeviceReset,
    /// I_T nexus loss occurred.
    NexusLoss,
    /// Not ready to ready change, medium may have changed.
    MediumChanged,
    /// Reported LUNs data has changed.
    LunsChanged,
    /// Inquiry data has changed.
    InquiryChanged,
    /// Capacity data has changed.
    CapacityChanged,
    /// Mode parameters changed.
    ModeChanged,
    /// Reservations preempted.
    ReservationsPreempted,
    /// Reservations released.
    ReservationsReleased,
    /// Registrations preempted.
    RegistrationsPreempted,
    /// Asymmetric access state changed.
    AccessStateChanged,
    /// Commands cleared by another initiator.
    CommandsCleared,
    /// Thin provisioning soft threshold reached.
    ProvisioningThreshold,
}

const BY_GRAVITY: [UnitAttention; 15] = [
    UnitAttention::PowerOn,
    UnitAttention::BusReset,
    UnitAttention::DeviceReset,
    UnitAttention::NexusLoss,
    UnitAttention::MediumChanged,
    UnitAttention::LunsChanged,
    UnitAttention::InquiryChanged,
    UnitAttention::CapacityChanged,
    UnitAttention::ModeChanged,
    UnitAttention::ReservationsPreempted,
    UnitAttention::ReservationsReleased,
    UnitAttention::RegistrationsPreempted,
    UnitAttention::AccessStateChanged,
    UnitAttention::CommandsCleared,
    UnitAttention::ProvisioningThreshold,
];

impl UnitAttention {
    fn sense(self) -> Sense {
        let (code, qualifier) = match self {
            UnitAttention::PowerOn => (0x29, 0x01),
            UnitAttention::BusReset => (0x29, 0x02),
            UnitAttention::DeviceReset => (0x29, 0x03),
            UnitAttention::NexusLoss => (0x29, 0x07),
            UnitAttention::MediumChanged => (0x28, 0x00),
            UnitAttention::LunsChanged => (0x3F, 0x0E),
            UnitAttention::InquiryChanged => (0x3F, 0x03),
            UnitAttention::CapacityChanged => (0x2A, 0x09),
            UnitAttention::ModeChanged => (0x2A, 0x01),
            UnitAttention::ReservationsPreempted => (0x2A, 0x03),
            UnitAttention::ReservationsReleased => (0x2A, 0x04),
            UnitAttention::RegistrationsPreempted => (0x2A, 0x05),
            UnitAttention::AccessStateChanged => (0x2A, 0x06),
            UnitAttention::CommandsCleared => (0x2F, 0x00),
            UnitAttention::ProvisioningThreshold => (0x38, 0x07),
        };
        Sense::unit_attention(code, qualifier)
    }

    fn bit(self) -> u16 {
        1 << self as u8
    }

    /// Makes it pending in `bits`. A reset or the loss of the nexus is told once: by the gravest of them (SAM-5, 5.14, precedence of
    /// unit attention conditions). Drivers of firmware forgive one condition, not two.
    fn add_to(self, bits: &mut u16) {
        const RESETS: u16 = (1 << UnitAttention::MediumChanged as u8) - 1;
        *bits |= self.bit();
        let resets = *bits & RESETS;
        *bits = *bits & !RESETS | resets & resets.wrapping_neg();
    }
}

/// What is pending, for each nexus that the unit has seen.
#[derive(Debug, Default)]
pub(crate) struct Attentions(RefCell<Vec<(NexusId, u16)>>);

impl Attentions {
    /// A new nexus: power on is pending for it. Nothing changes for one that is known.
    pub(crate) fn attach(&self, nexus: NexusId) {
        let mut pending = self.0.borrow_mut();
        if !pending.iter().any(|(known, _)| *known == nexus) {
            pending.push((nexus, UnitAttention::PowerOn.bit()));
        }
    }

    /// Forgets a nexus.
    pub(crate) fn detach(&self, nexus: NexusId) {
        self.0.borrow_mut().retain(|(known, _)| *known != nexus);
    }

    /// Makes `attention` pending for every nexus but `except`.
    pub(crate) fn post(&self, attention: UnitAttention, except: Option<NexusId>) {
        for (nexus, bits) in self.0.borrow_mut().iter_mut() {
            if Some(*nexus) != except {
                attention.add_to(bits);
            }
        }
    }

    /// Makes `attention` pending for one nexus, if it is known.
    pub(crate) fn post_to(&self, attention: UnitAttention, nexus: NexusId) {
        if let Some((_, bits)) = self.0.borrow_mut().iter_mut().find(|(known, _)| *known == nexus) {
            attention.add_to(bits);
        }
    }

    /// Takes the gravest pending condition of a nexus. A nexus that was never attached has none.
    pub(crate) fn take(&self, nexus: NexusId) -> Option<Sense> {
        let mut pending = self.0.borrow_mut();
        let (_, bits) = pending.iter_mut().find(|(known, _)| *known == nexus)?;
        if *bits == 0 {
            return None;
        }
        let attention = BY_GRAVITY.into_iter().find(|attention| *bits & attention.bit() != 0)?;
        *bits &= !attention.bit();
        Some(attention.sense())
    }

    /// Takes one condition only, if it is pending.
    pub(crate) fn clear(&self, nexus: NexusId, attention: UnitAttention) {
        if let Some((_, bits)) = self.0.borrow_mut().iter_mut().find(|(known, _)| *known == nexus) {
            *bits &= !attention.bit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nexus_is_told_each_condition_once_and_the_gravest_first() {
        let attentions = Attentions::default();
        let (one, two) = (NexusId(1), NexusId(2));
        attentions.attach(one);
        attentions.attach(two);
        attentions.post(UnitAttention::ModeChanged, Some(one));
        assert_eq!(attentions.take(one), Some(Sense::unit_attention(0x29, 0x01)));
        assert_eq!(attentions.take(one), None);
        assert_eq!(attentions.take(two), Some(Sense::unit_attention(0x29, 0x01)));
        assert_eq!(attentions.take(two), Some(Sense::unit_attention(0x2A, 0x01)));
        assert_eq!(attentions.take(two), None);
        for attention in
            [UnitAttention::DeviceReset, UnitAttention::LunsChanged, UnitAttention::BusReset, UnitAttention::NexusLoss]
        {
            attentions.post(attention, Some(one));
        }
        assert_eq!(attentions.take(two), Some(Sense::unit_attention(0x29, 0x02)), "one of all resets, the gravest");
        assert_eq!(attentions.take(two), Some(Sense::unit_attention(0x3F, 0x0E)));
        assert_eq!(attentions.take(two), None);
        attentions.detach(two);
        attentions.post(UnitAttention::BusReset, None);
        assert_eq!(attentions.take(two), None);
    }
}
