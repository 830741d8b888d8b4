//! Owns: references of whoever moves data on the range that it moves, and the wait until older ones are gone.
//! Promises: taking and dropping a reference is one atomic addition each, without lock or allocation; no wake-up is lost.
//! Must not know: what is mapped where, what the waiter does afterwards.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counters of a file: ranges of [`STRIPE_BYTES`] are dealt out over them in turn.
const SHARDS: usize = 16;
/// Log2 of the bytes of a stripe: a reference covers bytes of one stripe only (16 MiB, the largest block).
const STRIPE_SHIFT: u32 = 24;
/// Bytes of a stripe. A piece of data I/O never crosses a multiple of it.
pub const STRIPE_BYTES: u64 = 1 << STRIPE_SHIFT;

/// One stripe's counters, alone on its cache line: references of the present epoch are counted in `counts[epoch & 1]`.
#[derive(Default)]
#[repr(align(64))]
struct Shard {
    epoch: AtomicU64,
    counts: [AtomicU64; 2],
}

/// All references on one open file.
///
/// [`References::take`] is called with the file's map locked for reading and [`References::advance`] with it locked for writing, so
/// that nobody takes a reference of an epoch that has ended. One epoch is ended at a time: the file's change lock sees to that.
#[derive(Default)]
pub struct References {
    shards: [Shard; SHARDS],
    waiting: AtomicUsize,
    gone: Notify,
}

/// A reference on (epoch, range): while it lives, the bytes behind the range are neither given to another file nor trimmed.
///
/// It is dropped when the data command has definitely ended. Holding one, never wait for the metadata actor.
pub struct RunRef {
    references: Arc<References>,
    shard: u8,
    parity: u8,
}

impl std::fmt::Debug for RunRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunRef").field("shard", &self.shard).field("parity", &self.parity).finish()
    }
}

fn shard_of(offset: u64) -> usize {
    (offset >> STRIPE_SHIFT) as usize % SHARDS
}

/// The end of the stripe that holds `offset`.
pub fn stripe_end(offset: u64) -> u64 {
    (offset | (STRIPE_BYTES - 1)).saturating_add(1)
}

impl References {
    /// A reference on a range that begins at `offset` and ends before [`stripe_end`]. The caller has the map locked.
    pub fn take(self: &Arc<Self>, offset: u64) -> RunRef {
        let shard = shard_of(offset);
        let counters = &self.shards[shard];
        let parity = (counters.epoch.load(Ordering::Relaxed) & 1) as usize;
        counters.counts[parity].fetch_add(1, Ordering::Relaxed);
        RunRef { references: self.clone(), shard: shard as u8, parity: parity as u8 }
    }

    /// Begins a new epoch for `range`. The caller has the map locked for writing and has awaited [`References::settled`].
    pub fn advance(&self, range: &Range<u64>) {
        for shard in self.shards_of(range) {
            shard.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until no reference from before the last [`References::advance`] overlaps `range`.
    pub async fn settled(&self, range: &Range<u64>) {
        let _waiting = Waiting::new(&self.waiting);
        loop {
            // From here on a drop of a last reference is heard, also one before the first poll.
            let mut gone = pin!(self.gone.notified());
            gone.as_mut().enable();
            if self.shards_of(range).all(|shard| shard.older() == 0) {
                return;
            }
            gone.await;
        }
    }

    /// References held now, all epochs; for status and tests.
    pub fn held(&self) -> u64 {
        self.shards.iter().flat_map(|s| &s.counts).map(|c| c.load(Ordering::Relaxed)).sum()
    }

    fn shards_of(&self, range: &Range<u64>) -> impl Iterator<Item = &Shard> {
        let first = range.start >> STRIPE_SHIFT;
        let last = range.end.saturating_sub(1).max(range.start) >> STRIPE_SHIFT;
        let stripes = (last - first).min(SHARDS as u64 - 1);
        (first..=first + stripes).map(|stripe| &self.shards[stripe as usize % SHARDS])
    }
}

/// Counts a waiter while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Waiting<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shard {
    fn older(&self) -> u64 {
        let present = self.epoch.load(Ordering::SeqCst) & 1;
        self.counts[1 - present as usize].load(Ordering::SeqCst)
    }
}

impl Drop for RunRef {
    fn drop(&mut self) {
        let references = &self.references;
        let count = &references.shards[usize::from(self.shard)].counts[usize::from(self.parity)];
        if count.fetch_sub(1, Ordering::SeqCst) == 1 && references.waiting.load(Ordering::SeqCst) > 0 {
            references.gone.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn taking_away_waits_for_older_references_that_overlap_and_for_no_others() {
        let references = Arc::new(References::default());
        let (near, far) = (0..4096, 5 * STRIPE_BYTES..6 * STRIPE_BYTES);
        let held = references.take(100);
        references.advance(&near);
        let newer = references.take(100);
        assert!(references.settled(&far).now_or_never().is_some());
        assert!(references.settled(&near).now_or_never().is_none());
        drop(held);
        assert!(references.settled(&near).now_or_never().is_some());
        assert_eq!(references.held(), 1);
        drop(newer);
        assert_eq!(references.held(), 0);
    }

    #[test]
    fn a_range_longer_than_all_stripes_waits_for_every_reference() {
        let references = Arc::new(References::default());
        let held = references.take(77 * STRIPE_BYTES);
        let all = 0..u64::MAX;
        references.advance(&all);
        assert!(references.settled(&all).now_or_never().is_none());
        drop(held);
        assert!(references.settled(&all).now_or_never().is_some());
    }

    #[test]
    fn every_waiter_is_woken() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let references = Arc::new(References::default());
        let held = references.take(0);
        references.advance(&(0..10));
        let thread = std::thread::spawn(move || drop(held));
        runtime.block_on(async { futures_util::join!(references.settled(&(0..1)), references.settled(&(0..10))) });
        thread.join().unwrap();
        assert_eq!(references.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_drop_of_the_last_reference_on_another_thread_wakes_the_waiter() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for _ in 0..200 {
            let references = Arc::new(References::default());
            let held: Vec<_> = (0..4).map(|n| references.take(n * STRIPE_BYTES)).collect();
            references.advance(&(0..u64::MAX));
            let threads: Vec<_> = held.into_iter().map(|r| std::thread::spawn(move || drop(r))).collect();
            runtime.block_on(references.settled(&(0..u64::MAX)));
            threads.into_iter().for_each(|t| t.join().unwrap());
        }
    }
}
