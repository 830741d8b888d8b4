//! Owns: the tasks of one logical unit: their order by task attribute, and their end before their time.
//! Promises: who waits for aborted tasks goes on only when none of them can touch its buffers; no allocation in the steady
//! state; at most [`MAX_TASKS`] tasks.
//! Must not know: commands, storage, executors.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use crate::task::{NexusId, TaskAttribute};

/// The most tasks of one unit; more are answered with TASK SET FULL.
pub const MAX_TASKS: usize = 8192;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is in the set, but touches nothing: it waits for its data or for its turn.
    Waiting,
    /// The device server works on it.
    Running,
    /// The device server is done with it.
    Ended,
}

/// How an aborted task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Abortion {
    /// Nothing is sent for it.
    Silent,
    /// Status TASK ABORTED.
    WithStatus,
}

#[derive(Debug)]
struct Slot {
    /// Order of arrival; `None` for a free slot.
    sequence: Option<u64>,
    nexus: NexusId,
    tag: u64,
    attribute: TaskAttribute,
    state: State,
    abortion: Option<Abortion>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Inner {
    slots: Vec<Slot>,
    free: Vec<u32>,
    next_sequence: u64,
    /// Tasks that others have to wait for: ordered ones and heads of queue that have not ended.
    barriers: usize,
    /// Those who wait until aborted tasks have ended.
    drains: Vec<Waker>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct TaskSet(RefCell<Inner>);

/// A command's place in its unit's task set, from its arrival on. Dropping it takes it out of the set.
#[derive(Debug)]
pub struct Task {
    /// `None` for a command that no unit has to order, or that did not get in.
    place: Option<(Rc<TaskSet>, u32)>,
    full: bool,
}

/// Which tasks a task management function is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    All,
    Nexus(NexusId),
    Tag(NexusId, u64),
}

impl Selection {
    fn takes(&self, slot: &Slot) -> bool {
        match *self {
            Selection::All => true,
            Selection::Nexus(nexus) => slot.nexus == nexus,
            Selection::Tag(nexus, tag) => slot.nexus == nexus && slot.tag == tag,
        }
    }
}

impl TaskSet {
    /// A new task at the end of the set.
    pub(crate) fn enter(self: &Rc<Self>, nexus: NexusId, tag: u64, attribute: TaskAttribute) -> Task {
        let mut inner = self.0.borrow_mut();
        let sequence = inner.next_sequence;
        let slot = Slot {
            sequence: Some(sequence),
            nexus,
            tag,
            attribute,
            state: State::Waiting,
            abortion: None,
            waker: None,
        };
        let index = match inner.free.pop() {
            Some(index) => index,
            None if inner.slots.len() == MAX_TASKS => return Task { place: None, full: true },
            None => inner.slots.len() as u32,
        };
        inner.next_sequence += 1;
        inner.barriers += usize::from(is_barrier(attribute));
        match inner.slots.get_mut(index as usize) {
            Some(place) => *place = slot,
            None => inner.slots.push(slot),
        }
        drop(inner);
        Task { place: Some((self.clone(), index)), full: false }
    }

    /// Is one of the chosen tasks in the set?
    pub(crate) fn has(&self, chosen: Selection) -> bool {
        self.0
            .borrow()
            .slots
            .iter()
            .any(|slot| slot.sequence.is_some() && slot.state != State::Ended && chosen.takes(slot))
    }

    /// Marks the chosen tasks (but not `except`) as aborted; `how` says for each nexus how its tasks end. Returns the nexuses
    /// that have lost a task. A later [`TaskSet::drained`] waits for those that run.
    pub(crate) fn abort(
        &self,
        chosen: Selection,
        except: Option<&Task>,
        how: impl Fn(NexusId) -> Abortion,
    ) -> Vec<NexusId> {
        let except = except.and_then(|task| task.place.as_ref()).map(|(_, index)| *index as usize);
        let mut losers = Vec::new();
        let mut inner = self.0.borrow_mut();
        for (index, slot) in inner.slots.iter_mut().enumerate() {
            let alive = slot.sequence.is_some() && slot.state != State::Ended && slot.abortion.is_none();
            if alive && chosen.takes(slot) && Some(index) != except {
                slot.abortion = Some(how(slot.nexus));
                if !losers.contains(&slot.nexus) {
                    losers.push(slot.nexus);
                }
            }
        }
        if !losers.is_empty() {
            // The aborted ones must notice, and their turn may have come for others.
            inner.wake_waiters();
        }
        losers
    }

    /// Waits until none of the chosen tasks that are aborted by now runs any more.
    pub(crate) async fn drained(&self, chosen: Selection) {
        self.drained_but(chosen, None).await;
    }

    /// The same, but for the task that waits itself.
    pub(crate) async fn drained_but(&self, chosen: Selection, except: Option<&Task>) {
        let except = except.and_then(|task| task.place.as_ref()).map(|(_, index)| *index as usize);
        let limit = self.0.borrow().next_sequence;
        poll_fn(|context| {
            let mut inner = self.0.borrow_mut();
            let runs = |slot: &Slot| {
                let old = slot.sequence.is_some_and(|sequence| sequence < limit);
                old && slot.state == State::Running && slot.abortion.is_some() && chosen.takes(slot)
            };
            if !inner.slots.iter().enumerate().any(|(index, slot)| Some(index) != except && runs(slot)) {
                return Poll::Ready(());
            }
            inner.drains.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Do other tasks wait for tasks with this attribute?
fn is_barrier(attribute: TaskAttribute) -> bool {
    matches!(attribute, TaskAttribute::Ordered | TaskAttribute::HeadOfQueue)
}

impl Inner {
    /// May the task at `index` run? (SAM-5, 8.7: simple tasks wait for older ordered ones and for heads of queue, ordered
    /// tasks for everything older and for heads of queue, heads of queue for nothing.)
    fn may_start(&self, index: usize) -> bool {
        let own = &self.slots[index];
        if self.barriers == 0 || own.attribute == TaskAttribute::HeadOfQueue {
            return true;
        }
        let ordered = own.attribute == TaskAttribute::Ordered;
        !self.slots.iter().enumerate().any(|(other, slot)| {
            // An aborted task counts as long as it runs.
            let gone = slot.state == State::Ended || (slot.state == State::Waiting && slot.abortion.is_some());
            let alive = slot.sequence.is_some() && !gone;
            let older = slot.sequence < own.sequence;
            let head = slot.attribute == TaskAttribute::HeadOfQueue;
            other != index && alive && (head || (older && (ordered || slot.attribute == TaskAttribute::Ordered)))
        })
    }

    fn wake_waiters(&mut self) {
        for waker in self.slots.iter_mut().filter_map(|slot| slot.waker.take()) {
            waker.wake();
        }
    }

    /// The task at `index` no longer holds up others.
    fn end(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.state == State::Ended {
            return;
        }
        slot.state = State::Ended;
        slot.waker = None;
        let barrier = is_barrier(slot.attribute);
        let had_barriers = self.barriers > 0;
        self.barriers -= usize::from(barrier);
        if had_barriers {
            self.wake_waiters();
        }
        for waker in self.drains.drain(..) {
            waker.wake();
        }
    }
}

/// A task was aborted before its turn came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Aborted;

impl Task {
    /// A task of no unit.
    pub(crate) fn outside() -> Self {
        Self { place: None, full: false }
    }

    /// The set had no room for it.
    pub(crate) fn is_refused(&self) -> bool {
        self.full
    }

    fn with<T>(&self, look: impl FnOnce(&mut Inner, usize) -> T) -> Option<T> {
        let (set, index) = self.place.as_ref()?;
        Some(look(&mut set.0.borrow_mut(), *index as usize))
    }

    /// Has a task management function, or PREEMPT AND ABORT, taken it?
    pub fn is_aborted(&self) -> bool {
        self.with(|inner, index| inner.slots[index].abortion.is_some()).unwrap_or(false)
    }

    /// Waits until somebody aborts it; for ever if nobody does. For a transport that still waits for the command's data.
    pub async fn aborted(&self) {
        self.wait(|_, _| false).await.expect_err("only an abort ends this wait");
    }

    /// Waits until `ready`, which is asked whenever the set changes or the task's own waker is woken.
    async fn wait(&self, ready: impl Fn(&mut Inner, usize) -> bool) -> Result<(), Aborted> {
        poll_fn(|context| {
            let state = self.with(|inner, index| {
                if inner.slots[index].abortion.is_some() {
                    return Poll::Ready(Err(Aborted));
                }
                if ready(inner, index) {
                    return Poll::Ready(Ok(()));
                }
                inner.slots[index].waker = Some(context.waker().clone());
                Poll::Pending
            });
            state.unwrap_or(Poll::Pending)
        })
        .await
    }

    /// Waits for the task's turn; from then on it runs.
    pub(crate) async fn start(&self) -> Result<(), Aborted> {
        if self.place.is_none() {
            return Ok(());
        }
        self.wait(|inner, index| {
            let turn = inner.may_start(index);
            if turn {
                inner.slots[index].state = State::Running;
            }
            turn
        })
        .await
    }

    /// The device server touches nothing for it any more. Says whether it was aborted meanwhile.
    pub(crate) fn end(&self) -> Option<Abortion> {
        self.with(|inner, index| {
            inner.end(index);
            inner.slots[index].abortion
        })
        .flatten()
    }

    /// Registers a waker that an abort wakes; `false` if it is aborted already.
    pub(crate) fn wake_on_abort(&self, waker: &Waker) -> bool {
        self.with(|inner, index| {
            inner.slots[index].waker = Some(waker.clone());
            inner.slots[index].abortion.is_none()
        })
        .unwrap_or(true)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.with(|inner, index| {
            inner.end(index);
            inner.slots[index].sequence = None;
            inner.free.push(index as u32);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::pin::pin;
    use std::task::Context;

    const ONE: NexusId = NexusId(1);
    const TWO: NexusId = NexusId(2);

    fn silent(_: NexusId) -> Abortion {
        Abortion::Silent
    }

    #[test]
    fn ordered_tasks_wait_for_all_older_ones_and_hold_up_all_later_ones() {
        let set = Rc::new(TaskSet::default());
        let old = set.enter(ONE, 1, TaskAttribute::Simple);
        let ordered = set.enter(TWO, 2, TaskAttribute::Ordered);
        let young = set.enter(ONE, 3, TaskAttribute::Simple);
        assert_eq!(old.start().now_or_never(), Some(Ok(())));
        assert_eq!(ordered.start().now_or_never(), None);
        assert_eq!(young.start().now_or_never(), None);
        assert_eq!(old.end(), None);
        assert_eq!(ordered.start().now_or_never(), Some(Ok(())));
        assert_eq!(young.start().now_or_never(), None);
        drop(ordered);
        assert_eq!(young.start().now_or_never(), Some(Ok(())));
    }

    #[test]
    fn a_head_of_queue_starts_at_once_and_the_rest_waits_for_it() {
        let set = Rc::new(TaskSet::default());
        let simple = set.enter(ONE, 1, TaskAttribute::Simple);
        let head = set.enter(ONE, 2, TaskAttribute::HeadOfQueue);
        assert_eq!(simple.start().now_or_never(), None);
        assert_eq!(head.start().now_or_never(), Some(Ok(())));
        drop(head);
        assert_eq!(simple.start().now_or_never(), Some(Ok(())));
    }

    #[test]
    fn a_waiter_is_woken_when_its_turn_comes() {
        let set = Rc::new(TaskSet::default());
        let ordered = set.enter(ONE, 1, TaskAttribute::Ordered);
        let simple = set.enter(ONE, 2, TaskAttribute::Simple);
        let (waker, count) = counting_waker();
        let mut wait = pin!(simple.start());
        assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(ordered);
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 1);
    }

    #[test]
    fn an_abort_waits_for_what_runs_and_for_nothing_else() {
        let set = Rc::new(TaskSet::default());
        let running = set.enter(ONE, 1, TaskAttribute::Simple);
        let waiting = set.enter(ONE, 2, TaskAttribute::Simple);
        let other = set.enter(TWO, 1, TaskAttribute::Simple);
        running.start().now_or_never();
        other.start().now_or_never();
        assert_eq!(set.abort(Selection::Nexus(ONE), None, silent), [ONE]);
        assert_eq!(waiting.start().now_or_never(), Some(Err(Aborted)));
        assert_eq!(waiting.aborted().now_or_never(), Some(()));
        let mut drained = pin!(set.drained(Selection::Nexus(ONE)));
        let mut context = Context::from_waker(Waker::noop());
        assert!(drained.as_mut().poll(&mut context).is_pending());
        assert_eq!(running.end(), Some(Abortion::Silent));
        assert!(drained.as_mut().poll(&mut context).is_ready());
        assert!(!other.is_aborted());
        assert!(!set.has(Selection::Tag(ONE, 1)));
        assert!(set.has(Selection::Tag(TWO, 1)));
    }

    #[test]
    fn the_set_is_bounded_and_leaves_nothing_behind() {
        let set = Rc::new(TaskSet::default());
        let tasks: Vec<_> = (0..MAX_TASKS as u64).map(|tag| set.enter(ONE, tag, TaskAttribute::Ordered)).collect();
        assert!(set.enter(ONE, 0, TaskAttribute::Simple).is_refused());
        drop(tasks);
        assert_eq!(set.0.borrow().barriers, 0);
        assert!(!set.has(Selection::All));
        assert!(!set.enter(ONE, 0, TaskAttribute::Simple).is_refused());
    }

    fn counting_waker() -> (Waker, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
        struct Counter(std::sync::Arc<std::sync::atomic::AtomicUsize>);
        impl std::task::Wake for Counter {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        (Waker::from(std::sync::Arc::new(Counter(count.clone()))), count)
    }
}
