//! Owns: every formula of the lease; the timeline below is all of them on one line.
//! Promises: a host that obeys its gate has ended its submissions before any other host may take its locks.
//! Must not know: cells, slots, how a renewal is sent.
//!
//! ```text
//! holder   t0 --renewal sent--> Applied        t0 + H: next renewal        t0 + L - M: gate closes   t0 + L: lease ends
//!          |                                                               | hold, pause, drain      |
//! breaker  |   t1 >= t0: end of a good read that shows that renewal        |                         |   t1 + D: claim
//! ```
//!
//! `t0` is taken before the renewal is sent, so the image that a breaker reads is never older than `t0`. The breaker waits D by
//! its own clock from the end of that read: D = L (1 + rho) / (1 - rho) + 2 s is at least L by the holder's clock even when the
//! holder's clock runs slow and the breaker's fast, each by rho. The holder counts from `t0`, the breaker from later.

use std::time::Duration;

use crate::env::Instant;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::LeaseTimes;
use crate::sabotage::{Sabotage, active};

/// Added to the time that a breaker watches, for what no formula knows.
pub const TAKEOVER_EXTRA: Duration = Duration::from_secs(2);
/// Longest lease that is believed from a cell; a longer one is a broken structure and is watched for this long.
pub const LONGEST_LEASE_MS: u32 = 600_000;

/// When a lease ends whose renewal was begun at `t0` (before it was sent) and Applied: t0 + L.
pub fn lease_until(t0: Instant, times: &LeaseTimes) -> Instant {
    t0.after(Duration::from_millis(times.lease_ms.into()) * if active(Sabotage::LeaseTooLong) { 4 } else { 1 })
}

/// M: submissions end this long before the lease does.
pub fn margin(times: &LeaseTimes) -> Duration {
    Duration::from_millis(times.margin_ms.into())
}

/// Whether data may be submitted at `now`: now < lease_until - M.
pub fn may_submit(now: Instant, lease_until: Instant, times: &LeaseTimes) -> bool {
    now.after(margin(times)) < lease_until
}

/// Time from one renewal to the next: H, shortened by up to a tenth so that hosts drift apart. `chance` is random.
pub fn renew_after(times: &LeaseTimes, chance: u8) -> Duration {
    let h = Duration::from_millis(times.renew_ms.into());
    h - h / 10 * u32::from(chance) / 255
}

/// D: how long a slot is watched without a change before it may be claimed, by the owner's L.
pub fn takeover_after(owner: &LeaseTimes) -> Duration {
    let lease_ns = u128::from(owner.lease_ms.min(LONGEST_LEASE_MS)) * 1_000_000;
    let ppm = u128::from(owner.clock_ppm.min(500_000));
    let stretched = (lease_ns * (1_000_000 + ppm)).div_ceil(1_000_000 - ppm);
    (Duration::from_nanos(stretched as u64) + TAKEOVER_EXTRA) / if active(Sabotage::WatchTooShort) { 2 } else { 1 }
}

/// How long a slot is watched to see whether anybody renews it: two renewals and what they may be late, never above `takeover_after`.
pub fn liveness_watch(owner: &LeaseTimes) -> Duration {
    (Duration::from_millis(owner.renew_ms.into()) * 2 + TAKEOVER_EXTRA).min(takeover_after(owner))
}

/// Refuses times under which the protocol does not work: the margin lies within the lease and at least two renewals fit
/// between a renewal and the closing of the gate.
pub fn check(times: &LeaseTimes) -> Result<(), FsError> {
    let refuse = |what: String| Err(FsError::refused(FsErrorKind::Invalid, format!("lease times {times:?}: {what}")));
    if times.lease_ms > LONGEST_LEASE_MS {
        return refuse(format!("a lease is at most {LONGEST_LEASE_MS} ms"));
    }
    if times.margin_ms >= times.lease_ms {
        return refuse("the margin must be shorter than the lease".to_owned());
    }
    if times.renew_ms == 0 || u64::from(times.renew_ms) * 2 > u64::from(times.lease_ms - times.margin_ms) {
        return refuse("two renewals must fit into the lease without its margin".to_owned());
    }
    if times.clock_ppm > 100_000 {
        return refuse("the bound on clock rates is at most 100000 ppm".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_profiles_are_legal_and_take_over_in_the_time_they_promise() {
        for (times, seconds) in [(LeaseTimes::DEFAULT, 23), (LeaseTimes::FAST, 13), (LeaseTimes::SLOW, 63)] {
            check(&times).unwrap();
            let d = takeover_after(&times);
            assert!(d.as_secs() < seconds && d.as_secs() + 2 > seconds, "{d:?}");
        }
    }

    proptest! {
        #[test]
        fn a_breaker_never_claims_before_the_holders_lease_has_ended(
            lease_ms in 1u32..LONGEST_LEASE_MS, clock_ppm in 0u32..100_000, t0 in 0u64..1 << 60,
        ) {
            let times = LeaseTimes { lease_ms, renew_ms: 1, margin_ms: 0, clock_ppm };
            let d = takeover_after(&times).as_nanos();
            // The breaker's clock runs fast by rho, the holder's slow: the holder's clock shows this much when the breaker claims.
            let by_holder = d * (1_000_000 - u128::from(clock_ppm)) / (1_000_000 + u128::from(clock_ppm));
            let lease_ns = u128::from(lease_until(Instant(t0), &times).0 - t0);
            prop_assert!(by_holder >= lease_ns);
        }

        #[test]
        fn times_from_a_broken_cell_never_make_a_formula_panic(l: u32, h: u32, m: u32, ppm: u32, chance: u8, now: u64) {
            let times = LeaseTimes { lease_ms: l, renew_ms: h, margin_ms: m, clock_ppm: ppm };
            prop_assert!(takeover_after(&times) <= Duration::from_secs(1802));
            prop_assert!(liveness_watch(&times) <= takeover_after(&times));
            prop_assert!(renew_after(&times, chance) <= Duration::from_millis(h.into()));
            let _ = (check(&times), may_submit(Instant(now), lease_until(Instant(now), &times), &times));
        }
    }
}
