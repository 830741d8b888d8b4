//! Owns: which ranges are having their first write, and whether all first writes so far are published.
//! Promises: ranges of fills never overlap; what may be unpublished counts as unpublished.
//! Must not know: how space is had or written.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::pin::pin;

use tokio::sync::Notify;

/// First writes of one disk; see the module.
#[derive(Default)]
pub(super) struct Fills {
    active: RefCell<Vec<(u64, Range<u64>)>>,
    /// Number of the next fill.
    next: Cell<u64>,
    /// All fills with lower numbers are published.
    published: Cell<u64>,
    ended: Notify,
}

/// A first write that is under way.
pub(super) struct Fill<'a> {
    fills: &'a Fills,
    number: u64,
}

impl Fills {
    /// Begins a first write of a range. `None`: another one overlapped it, and has ended meanwhile.
    pub(super) async fn begin(&self, range: Range<u64>) -> Option<Fill<'_>> {
        let mut ended = pin!(self.ended.notified());
        ended.as_mut().enable();
        let overlaps = self.active.borrow().iter().any(|(_, other)| other.start < range.end && range.start < other.end);
        if overlaps {
            ended.await;
            return None;
        }
        let number = self.next.get();
        self.next.set(number + 1);
        self.active.borrow_mut().push((number, range));
        Some(Fill { fills: self, number })
    }

    /// The number below which every fill has ended: a flush that begins now publishes all of those.
    pub(super) fn settled(&self) -> u64 {
        self.active.borrow().iter().map(|(number, _)| *number).min().unwrap_or(self.next.get())
    }

    /// A flush that began when [`Fills::settled`] was `number` has ended well.
    pub(super) fn publish(&self, number: u64) {
        self.published.set(self.published.get().max(number));
    }

    /// May anything that was written for the first time still be unpublished?
    pub(super) fn has_unpublished(&self) -> bool {
        self.published.get() < self.next.get()
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        self.fills.active.borrow_mut().retain(|(number, _)| *number != self.number);
        self.fills.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::task::{Context, Waker};

    use super::*;

    fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }

    #[test]
    fn a_range_has_one_filler_and_others_look_again() {
        let fills = Fills::default();
        let first = ready(fills.begin(0..64)).flatten().unwrap();
        let beside = ready(fills.begin(64..128)).flatten();
        assert!(beside.is_some());
        let mut second = pin!(fills.begin(32..96));
        let mut context = Context::from_waker(Waker::noop());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(first);
        assert!(second.as_mut().poll(&mut context).map(|fill| fill.is_none()).is_ready());
    }

    #[test]
    fn a_flush_publishes_only_fills_that_ended_before_it_began() {
        let fills = Fills::default();
        assert!(!fills.has_unpublished());
        let early = ready(fills.begin(0..64)).flatten().unwrap();
        let late = ready(fills.begin(64..128)).flatten().unwrap();
        drop(early);
        let number = fills.settled();
        drop(late);
        fills.publish(number);
        assert!(fills.has_unpublished());
        fills.publish(fills.settled());
        assert!(!fills.has_unpublished());
    }
}
