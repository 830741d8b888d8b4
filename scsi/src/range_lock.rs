//! Owns: the order between what reads, then writes the same blocks of a disk (COMPARE AND WRITE) and every other write to them.
//! Promises: an exclusive holder overlaps no other holder; waiting is first come, first served; no allocation in the
//! steady state.
//! Must not know: commands, storage, executors.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::block_device::ByteRange;

/// One who holds or waits for a range.
#[derive(Debug)]
struct Entry {
    ticket: u64,
    range: ByteRange,
    exclusive: bool,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Inner {
    /// In the order of arrival.
    entries: Vec<Entry>,
    next_ticket: u64,
    exclusive: usize,
}

/// The ranges of one disk. Shared holders may overlap each other: SCSI does not order overlapping writes.
#[derive(Debug, Default)]
pub struct RangeLocks(RefCell<Inner>);

/// Holds a range until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    /// Waits until no exclusive holder that came before overlaps `range`.
    pub async fn shared(&self, range: ByteRange) -> RangeGuard<'_> {
        self.acquire(range, false).await
    }

    /// Waits until no holder that came before overlaps `range`.
    pub async fn exclusive(&self, range: ByteRange) -> RangeGuard<'_> {
        self.acquire(range, true).await
    }

    async fn acquire(&self, range: ByteRange, exclusive: bool) -> RangeGuard<'_> {
        let guard = {
            let mut inner = self.0.borrow_mut();
            let ticket = inner.next_ticket;
            inner.next_ticket += 1;
            inner.exclusive += usize::from(exclusive);
            inner.entries.push(Entry { ticket, range, exclusive, waker: None });
            RangeGuard { locks: self, ticket }
        };
        poll_fn(|context| {
            let mut inner = self.0.borrow_mut();
            if inner.may_proceed(guard.ticket) {
                return Poll::Ready(());
            }
            let index = inner.index_of(guard.ticket);
            inner.entries[index].waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        guard
    }
}

impl Inner {
    fn index_of(&self, ticket: u64) -> usize {
        self.entries.partition_point(|entry| entry.ticket < ticket)
    }

    fn may_proceed(&self, ticket: u64) -> bool {
        if self.exclusive == 0 {
            return true;
        }
        let (before, rest) = self.entries.split_at(self.index_of(ticket));
        let own = &rest[0];
        !before.iter().any(|entry| (entry.exclusive || own.exclusive) && entry.range.overlaps(&own.range))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut inner = self.locks.0.borrow_mut();
        let index = inner.index_of(self.ticket);
        let entry = inner.entries.remove(index);
        inner.exclusive -= usize::from(entry.exclusive);
        for later in &mut inner.entries[index..] {
            if let Some(waker) = later.waker.take() {
                waker.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::pin::pin;
    use std::task::Context;

    fn range(start: u64, length: u64) -> ByteRange {
        ByteRange { start, length }
    }

    #[test]
    fn shared_holders_overlap_and_an_exclusive_one_waits_for_them() {
        let locks = RangeLocks::default();
        let first = locks.shared(range(0, 10)).now_or_never().unwrap();
        let second = locks.shared(range(5, 10)).now_or_never().unwrap();
        let mut context = Context::from_waker(Waker::noop());
        let mut exclusive = pin!(locks.exclusive(range(8, 4)));
        assert!(exclusive.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(exclusive.as_mut().poll(&mut context).is_pending());
        drop(second);
        assert!(exclusive.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn who_comes_after_a_waiting_exclusive_holder_waits_too_but_only_for_the_same_blocks() {
        let locks = RangeLocks::default();
        let first = locks.shared(range(0, 10)).now_or_never().unwrap();
        let mut context = Context::from_waker(Waker::noop());
        let mut exclusive = Box::pin(locks.exclusive(range(0, 4)));
        assert!(exclusive.as_mut().poll(&mut context).is_pending());
        let mut late = pin!(locks.shared(range(2, 4)));
        assert!(late.as_mut().poll(&mut context).is_pending());
        assert!(locks.shared(range(4, 4)).now_or_never().is_some());
        // One who gives up waiting lets the next one pass.
        drop(exclusive);
        assert!(late.as_mut().poll(&mut context).is_ready());
        drop(first);
    }

    #[test]
    fn nothing_is_left_behind() {
        let locks = RangeLocks::default();
        drop(locks.exclusive(range(0, 1)).now_or_never());
        drop(locks.shared(range(0, 1)).now_or_never());
        assert!(locks.0.borrow().entries.is_empty());
        assert_eq!(locks.0.borrow().exclusive, 0);
    }
}
