//! Owns: what the adapter's queue does: mailboxes' requests, aborts, resets of targets, the bus and the adapter.
//! Promises: when an abort or a reset is answered, the CCBs that it ends can never touch guest memory again.
//! Must not know: registers, the layout of mailboxes and CCBs, executors.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use scsi::{BlockDevice, Status, UnitAttention};

use super::ccb::{HostStatus, Operation};
use super::commands::TARGETS;
use super::mailboxes::{Answer, Asked, Common, Completion, Descriptor, Key, Mailboxes, Setup};
use super::request;
use crate::hba::guest_segments::GuestSegments;
use crate::hba::queue::{Change, Ending, Model, OWN_TARGET, Queue, Rings};

/// What register accesses, and mailboxes that are no commands, ask of the queue's thread.
pub(super) enum Call {
    /// Forget everything; with the bus, its devices are reset too.
    Reset {
        /// Reset the bus.
        bus: bool,
    },
    /// Use these mailboxes, and forget what was under way.
    Mailboxes(Setup),
    /// End everything that is under way, and reset the devices.
    BusReset,
    /// Abort the CCB that the key names.
    Abort {
        /// The mailbox that asks for it.
        key: Key,
        /// [`Common::resets`] when it came.
        resets: u32,
    },
    /// Reset the target of the CCB that the key names.
    DeviceReset {
        /// The mailbox that started the CCB.
        key: Key,
        /// [`Common::resets`] when it came.
        resets: u32,
    },
}

/// What the adapter's threads share.
pub(super) struct BusLogicModel(pub(super) Arc<Common>);

impl BusLogicModel {
    fn mailboxes(&self, setup: Option<Setup>) -> Option<Mailboxes> {
        Some(Mailboxes::new(Arc::clone(&self.0), setup))
    }
}

impl Model for BusLogicModel {
    type Rings = Mailboxes;
    type Call = Call;
    type Reply = ();

    const NAME: &'static str = "BusLogic";
    const TARGETS: u8 = TARGETS;

    fn initial_rings(&self) -> Option<Mailboxes> {
        self.mailboxes(None)
    }

    async fn carry_out<D: BlockDevice + 'static>(
        queue: &Queue<Self, D>,
        descriptor: &Descriptor,
        segments: &mut GuestSegments,
    ) -> Option<Answer> {
        let key = Mailboxes::key(descriptor);
        let resets = queue.model().0.resets();
        let ccb = match &descriptor.asked {
            Asked::Nowhere => return Some(Mailboxes::failed(key, HostStatus::InvalidParameter)),
            Asked::Abort => {
                queue.post_call(Call::Abort { key, resets });
                return None;
            }
            Asked::Start(ccb) => ccb,
        };
        let target = queue.target(ccb.target).filter(|_| ccb.target != OWN_TARGET);
        if ccb.operation == Operation::DeviceReset && target.is_some() {
            queue.post_call(Call::DeviceReset { key, resets });
            return None;
        }
        if ccb.operation == Operation::DeviceReset {
            return Some(Mailboxes::failed(key, HostStatus::SelectionTimeout));
        }
        Some(request::carry_out(ccb, key, target.as_deref(), &queue.memory, segments).await)
    }

    async fn call<D: BlockDevice + 'static>(queue: &Queue<Self, D>, call: Call) {
        let common = &queue.model().0;
        match call {
            Call::Reset { bus } => {
                let forget = |queue: &Queue<Self, D>| {
                    common.reset();
                    queue.state.borrow_mut().set_rings(queue.model().mailboxes(None));
                    if bus {
                        queue.reset_targets(UnitAttention::BusReset, |_| true);
                    }
                };
                queue.end_requests(Ending::Forget, |_| true, forget).await;
            }
            Call::Mailboxes(setup) => {
                let renew = |queue: &Queue<Self, D>| {
                    common.forget();
                    queue.state.borrow_mut().set_rings(queue.model().mailboxes(Some(setup)));
                };
                queue.end_requests(Ending::Forget, |_| true, renew).await;
            }
            Call::BusReset => {
                let reset = |queue: &Queue<Self, D>| queue.reset_targets(UnitAttention::BusReset, |_| true);
                queue.end_requests(Ending::Answer(HostStatus::BusReset), |_| true, reset).await;
            }
            Call::Abort { key, resets } if resets == common.resets() => {
                let address = key.address;
                let chosen = move |key: &Key| key.starts(address);
                if queue.end_requests(Ending::Answer(HostStatus::Aborted), chosen, |_| {}).await == 0 {
                    queue.state.borrow_mut().answer(Answer::not_found(key));
                }
            }
            Call::DeviceReset { key, resets } if resets == common.resets() => {
                let target = Mailboxes::target(&key);
                let reset =
                    |queue: &Queue<Self, D>| queue.reset_targets(UnitAttention::DeviceReset, |one| one == target);
                // Drivers end the target's CCBs by themselves when this one has ended.
                queue.end_requests(Ending::Forget, move |key| key.is_for(target), reset).await;
                let (completion, host) = (Completion::Success, HostStatus::Success);
                let done = Answer { key, completion, host, scsi: Status::Good, residual: None };
                queue.state.borrow_mut().answer(done);
            }
            // A reset has forgotten who asked.
            Call::Abort { .. } | Call::DeviceReset { .. } => {}
        }
    }

    fn posted(&self) {
        self.0.interrupts.inbox_loaded();
    }

    fn announce<D: BlockDevice + 'static>(queue: &Queue<Self, D>, change: Change, target: u8) {
        // The adapter has no way to tell the guest; its next scan finds it.
        let present = &queue.model().0.present;
        match change {
            Change::Added => present.fetch_or(1 << target, Ordering::AcqRel),
            Change::Removed => present.fetch_and(!(1 << target), Ordering::AcqRel),
        };
    }
}
