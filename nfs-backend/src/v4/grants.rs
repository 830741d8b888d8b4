//! Owns: how the keeper of a lock hands a session and the open file's state to the thread that moves the data.
//! Promises: what was handed out and has ended is never used again. Must not know: calls.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

use super::session::{Channel, SessionId};
use super::states::StateId;

/// What data are moved by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Grows with each grant, from 1.
    pub epoch: u64,
    pub session: SessionId,
    pub channel: Channel,
    pub state: StateId,
}

/// The latest grant, and complaints about it.
#[derive(Debug)]
pub(crate) struct Grants {
    latest: watch::Sender<Option<Grant>>,
    /// The latest grant that is of no use.
    of_no_use: AtomicU64,
    complained: Notify,
}

impl Grants {
    pub fn new() -> Self {
        Self { latest: watch::Sender::new(None), of_no_use: AtomicU64::new(0), complained: Notify::new() }
    }

    /// Hands out another session.
    pub fn grant(&self, session: SessionId, channel: Channel, state: StateId) {
        self.latest.send_modify(|latest| {
            let epoch = latest.map_or(0, |grant| grant.epoch) + 1;
            *latest = Some(Grant { epoch, session, channel, state });
        });
    }

    /// The latest grant.
    pub fn latest(&self) -> Option<Grant> {
        *self.latest.borrow()
    }

    /// A grant is of no use any more.
    pub fn complain(&self, epoch: u64) {
        self.of_no_use.fetch_max(epoch, Ordering::SeqCst);
        self.complained.notify_one();
    }

    /// Whether another grant is waited for.
    pub fn is_wanting(&self) -> bool {
        self.latest().is_none_or(|grant| grant.epoch <= self.of_no_use.load(Ordering::SeqCst))
    }

    /// Waits for a complaint.
    pub async fn complaint(&self) {
        self.complained.notified().await;
    }

    /// Waits for a grant that is of use.
    pub async fn usable(&self) -> Grant {
        let mut receiver = self.latest.subscribe();
        loop {
            let latest = *receiver.borrow_and_update();
            match latest {
                Some(grant) if grant.epoch > self.of_no_use.load(Ordering::SeqCst) => return grant,
                // The sender lives as long as this.
                _ => _ = receiver.changed().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_grant_that_was_complained_of_is_not_given_again() {
        let grants = Grants::new();
        assert!(grants.is_wanting() && grants.usable().now_or_never().is_none());
        let channel = Channel { most_request: 1, most_response: 1, slots: 2 };
        grants.grant([1; 16], channel, StateId::ANONYMOUS);
        assert_eq!(grants.usable().now_or_never().map(|grant| grant.session), Some([1; 16]));
        grants.complain(1);
        assert!(grants.is_wanting() && grants.usable().now_or_never().is_none());
        grants.grant([2; 16], channel, StateId::ANONYMOUS);
        grants.complain(1);
        assert_eq!(grants.usable().now_or_never().map(|grant| grant.session), Some([2; 16]));
        assert!(!grants.is_wanting());
    }
}
