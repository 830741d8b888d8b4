//! Owns: every time and formula of a lock on NFS, and the state that the holder's I/O goes by.
//! Promises: the gate closes by itself when nobody renews; what is lost stays lost. Must not know: servers.
//!
//! ```text
//! holder   renewal sent (t)       gate closes (t + GATE)   last byte dies (+ FLIGHT)
//!          |----------------------|------------------------|
//! watcher      change seen (s > t)                               breaks (s + STALE)
//!              |-------------------------------------------------|
//! ```

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::rpc::Gate;

/// A moment of a clock that also runs while the machine sleeps, as time since some beginning.
pub type Moment = Duration;

/// Times of a lock. All hosts of a datastore have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// The holder renews so often.
    pub renew: Duration,
    /// The holder sends nothing so long after its last renewal was sent.
    pub gate: Duration,
    /// What was sent dies so long after, wherever it is: the kernel gives up with the connection (TCP_USER_TIMEOUT).
    pub flight: Duration,
    /// A lock that did not change for so long is broken.
    pub stale: Duration,
}

impl Timing {
    /// As ESX has it: renewed every 10 s, stale after 3 x 10 + 5 s.
    pub const ESX: Timing = Timing {
        renew: Duration::from_secs(10),
        gate: Duration::from_secs(20),
        flight: Duration::from_secs(8),
        stale: Duration::from_secs(35),
    };

    /// Time that is left for a server to do what it has already received, and for clocks that differ.
    pub const fn margin(&self) -> Duration {
        self.stale.saturating_sub(self.gate).saturating_sub(self.flight)
    }
}

const _: () = assert!(Timing::ESX.margin().as_secs() >= 5);
const _: () = assert!(Timing::ESX.renew.as_secs() * 2 <= Timing::ESX.gate.as_secs());

/// CLOCK_BOOTTIME.
pub fn boot_time() -> Moment {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// What a holder may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Send requests.
    Open,
    /// Wait: the lock may still be ours.
    Frozen,
    /// Nothing any more.
    Lost,
}

/// A holder's right, shared by who renews and who sends. Loads of one number where requests go.
#[derive(Debug, Default)]
pub struct SharedTenure {
    /// Nanoseconds; 0: closed.
    open_until: AtomicU64,
    lost: Mutex<Option<String>>,
}

const LOST: u64 = u64::MAX;

impl SharedTenure {
    /// Closed, until it is renewed for the first time.
    pub fn new() -> Self {
        Self::default()
    }

    /// A renewal that was sent at `sent` is confirmed.
    pub fn renewed(&self, sent: Moment, timing: &Timing) {
        let until = (sent + timing.gate).as_nanos() as u64;
        let later = |known: u64| (known != LOST && known < until).then_some(until);
        let _ = self.open_until.fetch_update(Ordering::SeqCst, Ordering::SeqCst, later);
    }

    /// It is closed until the next renewal.
    pub fn close(&self) {
        let _ = self.open_until.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |known| (known != LOST).then_some(0));
    }

    /// It is over, for good.
    pub fn lose(&self, cause: &str) {
        self.lost.lock().get_or_insert_with(|| cause.to_owned());
        self.open_until.store(LOST, Ordering::SeqCst);
    }

    /// What may be done at `now`.
    pub fn state_at(&self, now: Moment) -> State {
        match self.open_until.load(Ordering::SeqCst) {
            LOST => State::Lost,
            until if u128::from(until) > now.as_nanos() => State::Open,
            _ => State::Frozen,
        }
    }

    /// What may be done now.
    pub fn state(&self) -> State {
        self.state_at(boot_time())
    }

    /// Why it was lost.
    pub fn cause(&self) -> Option<String> {
        self.lost.lock().clone()
    }
}

impl Gate for SharedTenure {
    fn is_open(&self) -> bool {
        self.state() == State::Open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenure_closes_by_itself_opens_with_a_renewal_and_is_lost_for_good() {
        let (tenure, timing) = (SharedTenure::new(), Timing::ESX);
        let at = Duration::from_secs;
        assert_eq!(tenure.state_at(at(1)), State::Frozen);
        tenure.renewed(at(1), &timing);
        assert_eq!((tenure.state_at(at(20)), tenure.state_at(at(21))), (State::Open, State::Frozen));
        tenure.renewed(at(60), &timing);
        tenure.renewed(at(2), &timing);
        assert_eq!(tenure.state_at(at(79)), State::Open, "an older renewal takes nothing away");
        tenure.close();
        assert_eq!(tenure.state_at(at(61)), State::Frozen);
        tenure.lose("taken");
        tenure.renewed(at(100), &timing);
        tenure.close();
        assert_eq!((tenure.state_at(at(101)), tenure.cause()), (State::Lost, Some("taken".into())));
    }
}
