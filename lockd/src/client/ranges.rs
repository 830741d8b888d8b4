//! Owns: which ranges of an open disk are known, in use, being filled or taken away.
//! Promises: a range is taken away only when no reference on it is left and nobody fills it; one at a time; nothing that was learned
//!   meanwhile outlives that. Must not know: the mount, LUNs, why a range is taken away.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use tokio::sync::{Mutex, Notify, OwnedMutexGuard};
use vmfs_core::mapping::epoch::References;

use super::runs::RunCache;

#[derive(Default)]
pub(super) struct Ranges {
    pub(super) cache: RwLock<RunCache>,
    pub(super) references: Arc<References>,
    changed: Notify,
    taking: Arc<Mutex<()>>,
    closed: AtomicBool,
}

impl Ranges {
    /// Takes a range away: waits until nobody fills a part of it and no reference overlaps it. It is unknown until the result is
    /// dropped.
    pub(super) async fn take(self: &Arc<Self>, range: Range<u64>) -> Taken {
        let one = self.taking.clone().lock_owned().await;
        // The counters of the epoch before must be empty before a new one begins.
        self.references.settled(&range).await;
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.take_away(&range) {
                break;
            }
            changed.await;
        }
        let taken = Taken { ranges: self.clone(), _one: one };
        self.references.settled(&range).await;
        taken
    }

    /// Makes a range unknown to new requests, unless a part of it is being filled.
    fn take_away(&self, range: &Range<u64>) -> bool {
        let mut cache = self.cache.write();
        let free = !cache.is_changing(range);
        if free {
            cache.take_away(range.clone());
            self.references.advance(range);
        }
        free
    }

    /// Nothing is learned from now on: nobody is there any more who would say that what is learned has changed.
    pub(super) fn close(&self) {
        let _cache = self.cache.write();
        self.closed.store(true, Ordering::Release);
    }

    /// Whether nothing is learned any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Keeps a range for one who fills it, once nobody else fills it or takes it away.
    pub(super) async fn begin(&self, range: &Range<u64>) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let mut cache = self.cache.write();
                if !cache.is_changing(range) {
                    cache.begin(range.clone());
                    return;
                }
            }
            changed.await;
        }
    }

    /// Ends [`Ranges::begin`] of the same range.
    pub(super) fn end(&self, range: &Range<u64>) {
        self.cache.write().end(range);
        self.changed.notify_waiters();
    }
}

/// A range that is being taken away; dropping it lets requests have it again.
pub(super) struct Taken {
    ranges: Arc<Ranges>,
    _one: OwnedMutexGuard<()>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.ranges.cache.write().give_back();
        self.ranges.changed.notify_waiters();
    }
}
