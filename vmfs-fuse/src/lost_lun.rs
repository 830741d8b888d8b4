//! Owns: the judgement that one LUN is lost while the others are not.
//! Promises: a host that has lost all of its storage, or is just getting it back, is never taken for one that has lost a LUN.
//! Must not know: the gate page, who waits for it.

use std::time::Duration;

use parking_lot::Mutex;
use vmfs_core::env::Instant;
use vmfs_core::units::LunIndex;

/// How long a gate that is closed on one LUN alone is waited for. When all are closed the host or its storage sleeps: that is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// Who waits for a gate looks more often than this: what was seen before a longer pause is forgotten.
const PAUSE: Duration = Duration::from_secs(1);

/// A lease that has run out while another one was in force.
#[derive(Clone, Copy, Debug)]
struct Suspicion {
    lun: LunIndex,
    since: Instant,
    seen: Instant,
    /// The latest end of any lease when this began: one that ends later was renewed after that.
    renewed: Instant,
}

/// What was seen of the leases since a gate is closed.
#[derive(Debug, Default)]
pub struct LostLun(Mutex<Option<Suspicion>>);

impl LostLun {
    /// The LUN that is lost alone, if there is one. Its lease was out for the whole patience, and meanwhile another LUN's was renewed: a link
    /// that is cut ends all leases, one after the other, and renews none.
    pub fn judge(&self, now: Instant, leases: &[(LunIndex, Instant)]) -> Option<LunIndex> {
        let mut suspicion = self.0.lock();
        let latest = leases.iter().map(|(_, until)| *until).max()?;
        let is_out = |lun: LunIndex| leases.iter().any(|(other, until)| *other == lun && *until <= now);
        let lives = latest > now;
        match &mut *suspicion {
            Some(known) if lives && is_out(known.lun) && known.seen.after(PAUSE) > now => {
                known.seen = now;
                (known.since.after(PATIENCE) <= now && latest > known.renewed).then_some(known.lun)
            }
            other => {
                let lun = leases.iter().find(|(_, until)| lives && *until <= now).map(|(lun, _)| *lun);
                *other = lun.map(|lun| Suspicion { lun, since: now, seen: now, renewed: latest });
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn lun(number: u8) -> LunIndex {
        LunIndex::new(number).expect("not zero")
    }

    /// Looks ten times a second from one moment (in seconds) to another, at leases whose ends `ends` gives; when it was first said.
    fn watch(lost: &LostLun, from: u64, to: u64, ends: impl Fn(u64) -> [u64; 2]) -> Option<(u64, LunIndex)> {
        (from * 10..to * 10).find_map(|tenth| {
            let [first, second] = ends(tenth / 10).map(|end| Instant(end * SECOND));
            let found = lost.judge(Instant(tenth * SECOND / 10), &[(lun(1), first), (lun(2), second)])?;
            Some((tenth / 10, found))
        })
    }

    #[test]
    fn a_lun_whose_lease_stays_out_while_the_other_is_renewed_is_lost() {
        let lost = LostLun::default();
        assert_eq!(watch(&lost, 20, 60, |now| [10, (now / 3 * 3) + 8]), Some((23, lun(1))));
    }

    #[test]
    fn leases_that_run_out_one_after_the_other_are_no_loss_of_a_lun() {
        let lost = LostLun::default();
        assert_eq!(watch(&lost, 5, 60, |_| [10, 17]), None);
    }

    #[test]
    fn a_lun_that_comes_back_a_little_later_than_the_other_is_not_lost() {
        let lost = LostLun::default();
        assert_eq!(watch(&lost, 5, 20, |_| [10, 12]), None);
        let back = |now: u64| [if now < 22 { 10 } else { now + 8 }, now + 8];
        assert_eq!(watch(&lost, 20, 60, back), None);
    }

    #[test]
    fn what_was_seen_before_a_pause_is_forgotten() {
        let lost = LostLun::default();
        let ends = |now: u64| [10, now + 8];
        assert_eq!(watch(&lost, 20, 22, ends), None);
        assert_eq!(watch(&lost, 30, 32, ends), None);
    }
}
