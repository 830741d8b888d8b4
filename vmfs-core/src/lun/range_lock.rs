//! Owns: exclusion of the threads of one process that work through one open file, which its locks do not tell apart.
//! Promises: two guards of overlapping ranges never exist at once.
//! Must not know: other processes (the open-file-description lock is for those).

use parking_lot::{Condvar, Mutex};

/// Ranges that are locked now. There are never more than there are threads at work.
#[derive(Default)]
pub(super) struct RangeLocks {
    held: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// A locked range; dropping it unlocks.
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: (u64, u64),
}

impl RangeLocks {
    /// Waits until nothing of `start..end` is locked and locks it.
    pub(super) fn lock(&self, start: u64, end: u64) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|(s, e)| start < *e && *s < end) {
            self.freed.wait(&mut held);
        }
        held.push((start, end));
        RangeGuard { locks: self, range: (start, end) }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        if let Some(nth) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(nth);
        }
        self.locks.freed.notify_all();
    }
}
