//! Owns: how many commands of a host still take effect: what puts a death after exactly the n-th change of the storage.
//! Promises: the first n commands that change something are carried out in their order, nothing of the host after them.
//! Must not know: what the commands are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Commands of a host over all LUNs that were told of it. Cheap to clone; all clones are the same one.
#[derive(Clone, Debug)]
pub struct Allowance {
    used: Arc<AtomicU64>,
    limit: Arc<AtomicU64>,
}

impl Allowance {
    /// No limit: it only counts.
    pub fn unlimited() -> Allowance {
        Allowance { used: Arc::default(), limit: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// From now on only `more` commands that change something are carried out.
    pub fn end_after(&self, more: u64) {
        self.limit.store(self.used().saturating_add(more), Ordering::Relaxed);
    }

    /// Commands so far that changed something.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether nothing more gets through.
    pub fn is_used_up(&self) -> bool {
        self.used() >= self.limit.load(Ordering::Relaxed)
    }

    /// Whether one more command gets through.
    pub(super) fn spend(&self, changes: bool) -> bool {
        if self.is_used_up() {
            return false;
        }
        if changes {
            self.used.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}
