//! Owns: work that goes on after its command was answered (IMMED).
//! Promises: what was added is carried out to its end while somebody serves it.
//! Must not know: what the work is, executors.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Poll, Waker};

use crate::sense::Failure;
use crate::task_set::Task;

type Job = Pin<Box<dyn Future<Output = ()>>>;

/// See the module.
#[derive(Default)]
pub(crate) struct Background {
    new: RefCell<Vec<Job>>,
    waker: RefCell<Option<Waker>>,
    served: Cell<bool>,
}

impl Background {
    /// Does anybody carry out what is added?
    pub(crate) fn is_served(&self) -> bool {
        self.served.get()
    }

    /// Adds work.
    pub(crate) fn add(&self, job: impl Future<Output = ()> + 'static) {
        self.new.borrow_mut().push(Box::pin(job));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Carries out whatever is added, for ever.
    pub(crate) async fn serve(&self) {
        self.served.set(true);
        let mut jobs: Vec<Job> = Vec::new();
        poll_fn(|context| {
            self.waker.replace(Some(context.waker().clone()));
            jobs.append(&mut self.new.borrow_mut());
            jobs.retain_mut(|job| job.as_mut().poll(context).is_pending());
            Poll::Pending
        })
        .await
    }
}

/// The end of a job, for the command that began it.
#[derive(Default)]
pub(crate) struct Done {
    result: Cell<Option<Result<(), Failure>>>,
    waker: RefCell<Option<Waker>>,
}

impl Done {
    /// The job has ended.
    pub(crate) fn set(&self, result: Result<(), Failure>) {
        self.result.set(Some(result));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Waits until the job has ended, or the command was aborted.
    pub(crate) async fn wait(&self, task: &Task) -> Result<(), Failure> {
        poll_fn(|context| {
            if !task.wake_on_abort(context.waker()) {
                return Poll::Ready(Err(Failure::Aborted));
            }
            self.waker.replace(Some(context.waker().clone()));
            self.result.take().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Background").field("served", &self.served).finish_non_exhaustive()
    }
}
