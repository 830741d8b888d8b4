//! Owns: the environment of a real host: CLOCK_BOOTTIME, the kernel's random numbers, tokio's timer.
//! Promises: random bits are never repeated, also not after a fork.
//! Must not know: anything of the file system. A program hands it in.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::env::{Env, Instant, LocalFuture};

/// The environment of this machine. Its timer needs a tokio runtime with time enabled.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealEnv;

impl Env for RealEnv {
    fn now(&self) -> Instant {
        let now = clock_gettime(ClockId::Boottime);
        Instant(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    fn wall_ns(&self) -> i64 {
        let now = clock_gettime(ClockId::Realtime);
        now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
    }

    /// # Panics
    /// When the kernel gives no random numbers: nothing can be written without them.
    fn random(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel gives random numbers");
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        Box::pin(tokio::time::sleep(time))
    }
}
