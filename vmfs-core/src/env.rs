//! Owns: what the file system is given instead of a clock, a random source and a timer.
//! Promises: with a deterministic `Env` and deterministic LUNs, a run is deterministic.
//! Must not know: which executor drives it.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// A future of the metadata actor's thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Nanoseconds of the host's monotonic clock that runs on during suspend (CLOCK_BOOTTIME).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// The instant `later` after this one.
    #[must_use]
    pub const fn after(self, later: Duration) -> Instant {
        Instant(self.0.saturating_add(later.as_nanos() as u64))
    }
}

/// Clock, randomness and timer, handed in.
pub trait Env {
    /// Now, by CLOCK_BOOTTIME.
    fn now(&self) -> Instant;
    /// Nanoseconds since 1970, for time stamps only; never for a lease.
    fn wall_ns(&self) -> i64;
    /// Fills `bytes` with random bits fit for identities.
    fn random(&self, bytes: &mut [u8]);
    /// Completes after `time`.
    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()>;
}
