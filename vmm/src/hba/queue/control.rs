//! Owns: what other threads ask of the queue's thread: calls of the adapter, disks that come and go, the end.
//! Promises: when a reset, an abort or a stop has replied, the requests that it ends can never touch guest memory again.
//! Must not know: register offsets, ring layouts.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::mpsc::SyncSender;
use std::task::Poll;

use scsi::{BlockDevice, Disk, Lun, Target, TransportId, UnitAttention};
use tracing::debug;

use super::tasks::Queue;
use super::{Change, Ending, Model, NEXUS, OWN_TARGET, Rings};
use crate::hba::AdapterError;
use crate::hba::attachment::Attachment;

/// The way back to who waits.
type Reply<T> = SyncSender<T>;

/// The key by which requests of an adapter are chosen.
type Key<M> = <<M as Model>::Rings as Rings>::Key;
/// How a request of an adapter fails.
type Failure<M> = <<M as Model>::Rings as Rings>::Failure;

/// See the module.
pub(super) enum Control<M: Model, D> {
    Call(M::Call, Option<Reply<M::Reply>>),
    Attach(Attachment<D>, Reply<Result<(), AdapterError>>),
    Detach(u8, Reply<Result<(), AdapterError>>),
    Stop(Reply<Result<(), AdapterError>>),
}

/// Whoever asked may have given up; the work is done all the same.
fn reply<T>(to: &Reply<T>, value: T) {
    if to.try_send(value).is_err() {
        debug!("nobody waits for the reply of the adapter's queue");
    }
}

impl<M: Model, D: BlockDevice + 'static> Queue<M, D> {
    /// Carries out one control; breaks when it was the last one.
    pub(super) async fn control(&self, control: Control<M, D>) -> ControlFlow<()> {
        match control {
            Control::Call(call, to) => {
                let replied = M::call(self, call).await;
                if let Some(to) = to {
                    reply(&to, replied);
                }
            }
            Control::Attach(attachment, to) => reply(&to, self.attach(attachment).await),
            Control::Detach(target, to) => reply(&to, self.detach(target).await),
            Control::Stop(to) => {
                reply(&to, self.stop().await);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// Has this thread carry out a call when it comes to it.
    pub(crate) fn post_call(&self, call: M::Call) {
        self.shared.send(Control::Call(call, None));
    }

    /// Ends the chosen requests, waits until the storage has let go of them, does `then`, and posts the answers. Returns how
    /// many requests it ended.
    pub(crate) async fn end_requests(
        &self,
        ending: Ending<Failure<M>>,
        chosen: impl Fn(&Key<M>) -> bool,
        then: impl FnOnce(&Self),
    ) -> u32 {
        self.state.borrow_mut().hold();
        let ended = self.state.borrow_mut().end(ending, &chosen);
        self.drained(&chosen).await;
        then(self);
        self.post_now();
        self.state.borrow_mut().release();
        ended
    }

    /// Waits until none of the chosen requests runs any more.
    async fn drained(&self, chosen: &impl Fn(&Key<M>) -> bool) {
        poll_fn(|context| match self.state.borrow_mut().is_drained(context.waker(), chosen) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Resets the chosen targets, whose requests have ended.
    pub(crate) fn reset_targets(&self, attention: UnitAttention, chosen: impl Fn(u8) -> bool) {
        for (number, target) in self.targets() {
            if chosen(number) {
                target.reset(attention);
            }
        }
    }

    async fn attach(&self, attachment: Attachment<D>) -> Result<(), AdapterError> {
        let number = attachment.target;
        if self.target(number).is_some() {
            return Err(AdapterError::TargetTaken { target: number });
        }
        let device = (attachment.open)().await.map_err(|source| AdapterError::Open { target: number, source })?;
        let target = Target::new();
        target.insert(Lun(0), Disk::new(device, attachment.options));
        target.attach(NEXUS, TransportId::ParallelScsi { address: u16::from(OWN_TARGET), port: 1 }, 1);
        self.set_target(number, Some(Rc::new(target)));
        M::announce(self, Change::Added, number);
        Ok(())
    }

    async fn detach(&self, number: u8) -> Result<(), AdapterError> {
        let missing = AdapterError::NoTarget { target: number, last: M::TARGETS - 1 };
        let target = self.set_target(number, None).ok_or(missing)?;
        let chosen = move |key: &Key<M>| M::Rings::target(key) == number;
        self.end_requests(Ending::Answer(M::Rings::TARGET_GONE), chosen, |_| {}).await;
        M::announce(self, Change::Removed, number);
        flush(number, &target).await
    }

    async fn stop(&self) -> Result<(), AdapterError> {
        self.state.borrow_mut().hold();
        self.state.borrow_mut().end(Ending::Forget, |_| true);
        self.drained(&|_: &Key<M>| true).await;
        self.state.borrow_mut().set_rings(None);
        let mut result = Ok(());
        for (number, target) in self.targets() {
            self.set_target(number, None);
            result = result.and(flush(number, &target).await);
        }
        result
    }
}

/// Makes everything that a target has taken durable.
async fn flush<D: BlockDevice + 'static>(number: u8, target: &Target<D>) -> Result<(), AdapterError> {
    for (_, disk) in target.disks() {
        if !disk.device().geometry().read_only {
            disk.flush().await.map_err(|source| AdapterError::Flush { target: number, source })?;
        }
    }
    Ok(())
}
