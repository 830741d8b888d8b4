//! Owns: the queue's thread: it takes doorbells, begins requests on a fixed pool of tasks, posts answers in batches.
//! Promises: no request changes threads or allocates here; one interrupt a batch; a guest that never stops kicking cannot
//! keep a reset waiting.
//! Must not know: what requests mean, what stores the blocks.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use scsi::{BlockDevice, Target};
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use super::Model;
use super::control::Control;
use super::request::Request;
use super::state::State;
use crate::hba::GuestMemory;
use crate::hba::event_file::into_file;
use crate::hba::guest_segments::GuestSegments;

/// Requests that run at once; more wait in the guest's rings. Linux sends at most 254 to a unit.
const WORKERS: usize = 256;
/// A worker lets the other tasks run after so many requests, even if none of them had to wait for anything.
const REQUESTS_IN_A_ROW: u32 = 32;
/// How soon a full completion ring is looked at again: its guest gives no sign when it has made room.
const CONGESTION_PAUSE: Duration = Duration::from_millis(5);

/// What the queue's thread shares with the threads that access registers.
pub(super) struct Shared<M: Model, D> {
    /// Signalled by kicks and by controls.
    pub(super) doorbell: EventFd,
    pub(super) model: Arc<M>,
    controls: Mutex<Controls<M, D>>,
    control_waits: AtomicBool,
}

struct Controls<M: Model, D> {
    waiting: VecDeque<Control<M, D>>,
    ended: bool,
}

impl<M: Model, D> Shared<M, D> {
    pub(super) fn new(doorbell: EventFd, model: Arc<M>) -> Self {
        let controls = Mutex::new(Controls { waiting: VecDeque::new(), ended: false });
        Self { doorbell, model, controls, control_waits: AtomicBool::new(false) }
    }

    /// Hands a control to the queue's thread. If that has ended, the control is dropped, and with it its way to reply.
    pub(super) fn send(&self, control: Control<M, D>) {
        let mut controls = self.controls.lock();
        if controls.ended {
            return;
        }
        controls.waiting.push_back(control);
        self.control_waits.store(true, Ordering::Release);
        drop(controls);
        self.ring();
    }

    /// Wakes the queue's thread.
    pub(super) fn ring(&self) {
        if let Err(error) = self.doorbell.write(1) {
            // The counter is at its limit, so the thread is about to wake anyway; or the descriptor is broken.
            error!(%error, "the {} doorbell cannot be rung", M::NAME);
        }
    }

    fn next_control(&self) -> Option<Control<M, D>> {
        if !self.control_waits.load(Ordering::Acquire) {
            return None;
        }
        let mut controls = self.controls.lock();
        let control = controls.waiting.pop_front();
        self.control_waits.store(!controls.waiting.is_empty(), Ordering::Release);
        control
    }

    /// The queue's thread ends, in whatever way: nobody may wait for it any more.
    pub(super) fn end(&self) {
        let mut controls = self.controls.lock();
        controls.ended = true;
        controls.waiting.clear();
    }
}

/// The queue as its own thread sees it.
pub(crate) struct Queue<M: Model, D> {
    pub(crate) memory: Arc<GuestMemory>,
    pub(super) shared: Arc<Shared<M, D>>,
    pub(crate) state: RefCell<State<M::Rings>>,
    targets: RefCell<Vec<Option<Rc<Target<D>>>>>,
}

impl<M: Model, D: BlockDevice + 'static> Queue<M, D> {
    pub(super) fn new(memory: Arc<GuestMemory>, shared: Arc<Shared<M, D>>) -> Self {
        let targets = RefCell::new((0..M::TARGETS).map(|_| None).collect());
        let state = RefCell::new(State::new(M::NAME, shared.model.initial_rings(), WORKERS));
        Self { memory, shared, state, targets }
    }

    /// What the adapter's threads share.
    pub(crate) fn model(&self) -> &M {
        &self.shared.model
    }

    /// Works until a control says stop; returns when nothing runs any more.
    pub(super) async fn run(self: Rc<Self>) -> std::io::Result<()> {
        for slot in 0..WORKERS {
            tokio_uring::spawn(self.clone().work(slot));
        }
        tokio_uring::spawn(self.clone().post_answers());
        let doorbell = tokio_uring::fs::File::from_std(into_file(self.shared.doorbell.try_clone()?));
        let mut counter = vec![0; 8];
        loop {
            while let Some(control) = self.shared.next_control() {
                if self.control(control).await.is_break() {
                    return Ok(());
                }
            }
            self.state.borrow_mut().wake_workers();
            let (result, buffer) = doorbell.read_at(counter, 0).await;
            counter = buffer;
            if let Err(error) = result
                && error.kind() != std::io::ErrorKind::Interrupted
                && error.kind() != std::io::ErrorKind::WouldBlock
            {
                return Err(error);
            }
        }
    }

    /// The target with this number.
    pub(crate) fn target(&self, number: u8) -> Option<Rc<Target<D>>> {
        self.targets.borrow().get(usize::from(number))?.clone()
    }

    /// Puts a target in its place, or takes it away; returns what was there.
    pub(super) fn set_target(&self, number: u8, target: Option<Rc<Target<D>>>) -> Option<Rc<Target<D>>> {
        std::mem::replace(self.targets.borrow_mut().get_mut(usize::from(number))?, target)
    }

    pub(super) fn targets(&self) -> Vec<(u8, Rc<Target<D>>)> {
        let targets = self.targets.borrow();
        targets.iter().enumerate().filter_map(|(number, target)| Some((number as u8, target.clone()?))).collect()
    }

    /// One worker: one request after the other, for ever.
    async fn work(self: Rc<Self>, slot: usize) {
        let mut segments = GuestSegments::new(self.memory.clone());
        let in_a_row = Cell::new(0);
        loop {
            let request = self.next_request(slot, &in_a_row).await;
            let answer = M::carry_out(&self, &request.descriptor, &mut segments).await;
            request.answer(answer);
        }
    }

    async fn next_request(&self, slot: usize, in_a_row: &Cell<u32>) -> Request<'_, M::Rings> {
        let descriptor = poll_fn(|context| {
            if in_a_row.get() >= REQUESTS_IN_A_ROW {
                in_a_row.set(0);
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.state.borrow_mut().begin(slot, context.waker()) {
                Some(descriptor) => {
                    in_a_row.set(in_a_row.get() + 1);
                    Poll::Ready(descriptor)
                }
                None => {
                    in_a_row.set(0);
                    Poll::Pending
                }
            }
        })
        .await;
        Request::new(&self.state, slot, descriptor)
    }

    /// Posts whatever the tasks that ran since the last time have answered: one batch, one interrupt.
    async fn post_answers(self: Rc<Self>) {
        loop {
            poll_fn(|context| match self.state.borrow_mut().has_answers(context.waker()) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            })
            .await;
            self.post_now();
            if self.state.borrow().is_congested() {
                tokio::time::sleep(CONGESTION_PAUSE).await;
                self.state.borrow_mut().wake_workers();
            }
        }
    }

    /// Posts all answers that find room.
    pub(super) fn post_now(&self) {
        if self.state.borrow_mut().post() {
            self.shared.model.posted();
        }
    }
}
