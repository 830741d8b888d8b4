//! Owns: reading the clock that leases are measured by.
//! Promises: CLOCK_BOOTTIME, which runs on during suspend and is never set.
//! Must not know: what is measured.

use rustix::time::{ClockId, clock_gettime};
use vmfs_core::env::Instant;

/// Now, by CLOCK_BOOTTIME. No system call on kernels whose vDSO has that clock.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    Instant((time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_clock_does_not_run_backwards() {
        let first = super::now();
        assert!(super::now() >= first && first.0 > 0);
    }
}
