//! Owns: what the adapter's queue does: messages from the request FIFO, task management, resets, events.
//! Promises: commands that task management ends are answered before it is; a reset leaves nothing that could touch guest
//! memory or reply.
//! Must not know: registers, frames' layouts, executors.

use std::sync::Arc;

use scsi::{BlockDevice, UnitAttention};

use super::config_pages::TARGETS;
use super::ioc::Event;
use super::messages::{Frame, IocStatus, Message, Reply, function};
use super::queues::{Common, Descriptor, Key, LsiRings};
use super::request;
use crate::hba::guest_segments::GuestSegments;
use crate::hba::queue::{Change, Ending, Model, Queue};

/// What register accesses ask of the queue's thread.
pub(super) enum Call {
    /// Forget everything; with the bus, its devices are reset too.
    Reset {
        /// Reset the bus.
        bus: bool,
    },
    /// A task management request, which gets its reply through the reply FIFO.
    TaskManagement {
        /// The request.
        frame: Frame,
        /// How often the message unit had been reset when it came.
        resets: u32,
    },
}

/// What the adapter's threads share.
pub(super) struct LsiModel(pub(super) Arc<Common>);

impl Model for LsiModel {
    type Rings = LsiRings;
    type Call = Call;
    type Reply = ();

    const NAME: &'static str = "LSI Logic";
    const TARGETS: u8 = TARGETS;

    fn initial_rings(&self) -> Option<LsiRings> {
        Some(LsiRings(Arc::clone(&self.0)))
    }

    async fn carry_out<D: BlockDevice + 'static>(
        queue: &Queue<Self, D>,
        descriptor: &Descriptor,
        segments: &mut GuestSegments,
    ) -> Option<Reply> {
        let frame = descriptor.frame;
        let common = &queue.model().0;
        match frame.function() {
            function::SCSI_IO if common.ioc.lock().is_operational() => {
                let target = queue.target(frame.byte(0x00));
                Some(request::carry_out(descriptor, target.as_deref(), &queue.memory, segments).await)
            }
            function::TASK_MANAGEMENT if common.ioc.lock().is_operational() => {
                queue.post_call(Call::TaskManagement { frame, resets: common.resets() });
                None
            }
            _ => Some(Reply::Message(common.answer(&frame))),
        }
    }

    async fn call<D: BlockDevice + 'static>(queue: &Queue<Self, D>, call: Call) {
        match call {
            Call::Reset { bus } => reset(queue, bus).await,
            Call::TaskManagement { frame, resets } if resets == queue.model().0.resets() => {
                let reply = manage(queue, &frame).await;
                queue.state.borrow_mut().answer(Reply::Message(reply));
            }
            // The reset has answered it.
            Call::TaskManagement { .. } => {}
        }
    }

    fn posted(&self) {
        self.0.interrupt();
    }

    fn announce<D: BlockDevice + 'static>(queue: &Queue<Self, D>, _change: Change, _target: u8) {
        tell(queue, Event::Rescan);
    }
}

/// Tells the host of an event, if it wants to know.
fn tell<D: BlockDevice + 'static>(queue: &Queue<LsiModel, D>, event: Event) {
    let message = queue.model().0.ioc.lock().event(event);
    if let Some(message) = message {
        queue.state.borrow_mut().answer(Reply::Message(message));
    }
}

async fn reset<D: BlockDevice + 'static>(queue: &Queue<LsiModel, D>, bus: bool) {
    let forget = |queue: &Queue<LsiModel, D>| {
        let common = &queue.model().0;
        common.reset();
        queue.state.borrow_mut().set_rings(Some(LsiRings(Arc::clone(common))));
        if bus {
            queue.reset_targets(UnitAttention::BusReset, |_| true);
        }
    };
    queue.end_requests(Ending::Forget, |_| true, forget).await;
}

/// Carries out task management (MPI, SCSI Task Management Request) and returns its reply.
async fn manage<D: BlockDevice + 'static>(queue: &Queue<LsiModel, D>, frame: &Frame) -> Message {
    const COMPLETE: u8 = 0x00;
    const NOT_SUPPORTED: u8 = 0x04;
    const SUCCEEDED: u8 = 0x08;
    let Key { target, lun, .. } = Key::of(frame);
    let (kind, task) = (frame.byte(0x05), frame.word(0x30));
    let terminated = Ending::Answer(IocStatus::TaskTerminated);
    let in_set = move |key: &Key| key.is_io() && key.target == target && key.lun == lun;
    let in_target = move |key: &Key| key.is_io() && key.target == target;
    let is_task = move |key: &Key| in_target(key) && key.context == task;
    let mut response = COMPLETE;
    let ended = match kind {
        1 => queue.end_requests(terminated, is_task, |_| {}).await,
        2 | 6 => queue.end_requests(terminated, in_set, |_| {}).await,
        3 => {
            let reset = |queue: &Queue<_, _>| queue.reset_targets(UnitAttention::DeviceReset, |one| one == target);
            queue.end_requests(terminated, in_target, reset).await
        }
        4 => {
            let reset = |queue: &Queue<_, _>| queue.reset_targets(UnitAttention::BusReset, |_| true);
            let ended = queue.end_requests(terminated, |key| key.is_io(), reset).await;
            tell(queue, Event::BusReset);
            ended
        }
        5 => {
            let reset = |queue: &Queue<LsiModel, D>| {
                if let Some((target, lun)) = queue.target(target).zip(lun) {
                    target.reset_unit(lun);
                }
            };
            queue.end_requests(terminated, in_set, reset).await
        }
        7 => {
            if queue.state.borrow_mut().has(is_task) {
                response = SUCCEEDED;
            }
            0
        }
        // There is no auto contingent allegiance to be cleared.
        8 => 0,
        _ => {
            response = NOT_SUPPORTED;
            0
        }
    };
    let mut reply = Message::to(frame, 6, IocStatus::Success);
    reply.set_byte(0x00, target).set_byte(0x01, frame.byte(0x01));
    reply.set_byte(0x04, response).set_byte(0x05, kind).set_word(0x14, ended);
    reply
}
