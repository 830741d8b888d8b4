//! Owns: what a status and its sense data say about a command.
//! Promises: any bytes give a verdict; "not carried out" is said only where the standard says so.
//! Must not know: who sent the command, whether it is repeated.

use scsi::PathAnswer;

/// What became of a command that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was carried out.
    Done,
    /// COMPARE AND WRITE: the bytes differ, nothing was written.
    Miscompare,
    /// Not carried out: a reservation forbids it.
    Conflict,
    /// Not carried out: the unit tells of a change first (additional sense code and qualifier).
    Attention(u8, u8),
    /// Not carried out: send it again, on any path.
    Later(String),
    /// Not carried out: this path does not lead to the unit for now.
    OtherPath(String),
    /// Not carried out: the storage has no space left.
    NoSpace(String),
    /// Not carried out, and sending it again helps nothing.
    Refused(String),
    /// The device does not have the command, or a field of it.
    Unsupported(String),
    /// It has ended; what of it was carried out is not known.
    Ended(String),
}

/// Sense key, additional sense code and qualifier of raw sense data in either format (SPC-5, 4.4.2 and 4.4.3). `None`: too short, or no
/// such data.
pub fn sense_of(sense: &[u8]) -> Option<(u8, u8, u8)> {
    match sense.first()? & 0x7F {
        0x70 | 0x71 => {
            let key = sense.get(2)? & 0x0F;
            Some((key, sense.get(12).copied().unwrap_or(0), sense.get(13).copied().unwrap_or(0)))
        }
        0x72 | 0x73 => Some((sense.get(1)? & 0x0F, *sense.get(2)?, *sense.get(3)?)),
        _ => None,
    }
}

/// Judges an answer (SAM-5, 5.3.1; SPC-5, 4.4.8).
pub fn verdict(answer: &PathAnswer) -> Verdict {
    let said = |what: &str| what.to_owned();
    match answer.status {
        // GOOD, CONDITION MET.
        0x00 | 0x04 => Verdict::Done,
        0x02 => check_condition(&answer.sense),
        0x08 => Verdict::Later(said("the storage is busy")),
        0x18 => Verdict::Conflict,
        0x28 => Verdict::Later(said("the storage's queue is full")),
        0x30 => Verdict::Later(said("an auto contingent allegiance is in force")),
        0x40 => Verdict::Ended(said("another host aborted the command")),
        other => Verdict::Ended(format!("status {other:#04x}, which no standard knows")),
    }
}

fn check_condition(sense: &[u8]) -> Verdict {
    let Some((key, code, qualifier)) = sense_of(sense) else {
        return Verdict::Ended(format!("CHECK CONDITION without sense data ({} bytes)", sense.len()));
    };
    let text = format!("{} ({key:x}/{code:02x}/{qualifier:02x})", meaning(key, code, qualifier));
    match (key, code, qualifier) {
        // NO SENSE, RECOVERED ERROR.
        (0x0 | 0x1, ..) => Verdict::Done,
        // Target port in transition, standby or unavailable.
        (0x2, 0x04, 0x0A..=0x0C) => Verdict::OtherPath(text),
        // Becoming ready; an operation is in progress.
        (0x2, 0x04, 0x01 | 0x04 | 0x07 | 0x14) => Verdict::Later(text),
        (0x2, ..) => Verdict::Refused(text),
        (0x5, 0x20, 0x00) | (0x5, 0x24, 0x00) => Verdict::Unsupported(text),
        (0x5, ..) => Verdict::Refused(text),
        (0x6, ..) => Verdict::Attention(code, qualifier),
        // Space allocation failed write protect.
        (0x7, 0x27, 0x07) => Verdict::NoSpace(text),
        (0x7, ..) => Verdict::Refused(text),
        (0xE, ..) => Verdict::Miscompare,
        _ => Verdict::Ended(text),
    }
}

/// The commonest in words (SPC-5, annex F).
fn meaning(key: u8, code: u8, qualifier: u8) -> &'static str {
    match (key, code, qualifier) {
        (_, 0x20, 0x00) => "the device does not have this command",
        (_, 0x21, 0x00) => "block address out of range",
        (_, 0x24, 0x00) => "the device does not have a field of this command",
        (_, 0x25, 0x00) => "there is no such logical unit",
        (_, 0x27, 0x07) => "the storage has no space left",
        (_, 0x27, _) => "write protected",
        (_, 0x3A, _) => "no medium",
        (0x2, ..) => "not ready",
        (0x3, ..) => "medium error",
        (0x4, ..) => "hardware error",
        (0x5, ..) => "illegal request",
        (0x7, ..) => "data protected",
        (0xB, ..) => "the device aborted the command",
        _ => "check condition",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn checked(sense: &[u8]) -> Verdict {
        verdict(&PathAnswer { status: 2, sense: sense.to_vec(), transferred: 0 })
    }

    fn fixed(key: u8, code: u8, qualifier: u8) -> Vec<u8> {
        let mut sense = vec![0; 18];
        (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, code, qualifier);
        sense
    }

    #[test]
    fn both_formats_say_the_same() {
        for (key, code, qualifier) in
            [(6, 0x2A, 9), (0xE, 0x1D, 0), (7, 0x27, 7), (5, 0x20, 0), (2, 4, 0xB), (3, 0x11, 0)]
        {
            assert_eq!(checked(&fixed(key, code, qualifier)), checked(&[0x72, key, code, qualifier, 0, 0, 0, 0]));
        }
        assert_eq!(checked(&fixed(0xE, 0x1D, 0)), Verdict::Miscompare);
        assert_eq!(checked(&fixed(6, 0x2A, 9)), Verdict::Attention(0x2A, 9));
        assert!(matches!(checked(&fixed(3, 0x0C, 0)), Verdict::Ended(_)));
        assert!(matches!(checked(&fixed(2, 4, 0x0A)), Verdict::OtherPath(_)));
        assert!(matches!(checked(&[]), Verdict::Ended(_)));
    }

    proptest! {
        #[test]
        fn any_answer_has_a_verdict_and_only_good_ones_are_done(status: u8, sense in prop::collection::vec(any::<u8>(), 0..40)) {
            let said = verdict(&PathAnswer { status, sense: sense.clone(), transferred: 0 });
            if said == Verdict::Done {
                prop_assert!(matches!(status, 0 | 4) || sense_of(&sense).is_some_and(|(key, ..)| key < 2));
            }
        }
    }
}
