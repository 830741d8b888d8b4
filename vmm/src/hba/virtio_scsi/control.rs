//! Owns: what the adapter's queue does: commands, control requests, events, starts and resets.
//! Promises: commands that task management ends are answered before it is; a reset leaves nothing that could touch guest
//! memory.
//! Must not know: registers, virtqueues' layouts, executors.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use scsi::{BlockDevice, Lun, ShortBuffer, TaskAttribute, UnitAttention};
use tracing::warn;

use super::rings::{Answer, Descriptor, Key, Notices, QUEUES, Response, SENSE_SIZE, VirtioRings};
use super::virtqueue::Setup;
use crate::hba::command::{self, Direction, ScsiCommand};
use crate::hba::guest_segments::GuestSegments;
use crate::hba::queue::{Change, Ending, Model, Queue};

/// What register accesses ask of the queue's thread.
pub(super) enum Call {
    /// Use these queues.
    Start(Box<[Option<Setup>; QUEUES]>),
    /// Forget everything; with the bus, the devices are reset too.
    Reset {
        /// Reset the devices.
        bus: bool,
    },
    /// A control request, and how often the device had been reset when it came.
    Control(Box<Descriptor>, u32),
}

/// What the adapter's threads share.
pub(super) struct VirtioModel(pub(super) Arc<Notices>);

impl Model for VirtioModel {
    type Rings = VirtioRings;
    type Call = Call;
    type Reply = ();

    const NAME: &'static str = "virtio-scsi";
    /// As many as PVSCSI has, so that disks keep their numbers from one to the other.
    const TARGETS: u8 = 65;

    fn initial_rings(&self) -> Option<VirtioRings> {
        None
    }

    async fn carry_out<D: BlockDevice + 'static>(
        queue: &Queue<Self, D>,
        descriptor: &Descriptor,
        segments: &mut GuestSegments,
    ) -> Option<Answer> {
        if descriptor.key.is_command() {
            return Some(carry_out(queue, descriptor, segments).await);
        }
        let resets = queue.model().0.resets.load(Ordering::Acquire);
        queue.post_call(Call::Control(Box::new(descriptor.clone()), resets));
        None
    }

    async fn call<D: BlockDevice + 'static>(queue: &Queue<Self, D>, call: Call) {
        let notices = &queue.model().0;
        match call {
            Call::Start(setups) => {
                let rings = VirtioRings::new(Arc::clone(&queue.memory), Arc::clone(notices), &setups);
                if let Err(error) = &rings {
                    warn!(%error, "virtio-scsi queues refused");
                    notices.give_up();
                }
                queue.state.borrow_mut().set_rings(rings.ok());
            }
            Call::Reset { bus } => {
                let forget = |queue: &Queue<Self, D>| {
                    notices.reset();
                    queue.state.borrow_mut().set_rings(None);
                    if bus {
                        queue.reset_targets(UnitAttention::BusReset, |_| true);
                    }
                };
                queue.end_requests(Ending::Forget, |_| true, forget).await;
            }
            Call::Control(descriptor, resets) if resets == notices.resets.load(Ordering::Acquire) => {
                let response = control(queue, &descriptor).await;
                queue.state.borrow_mut().answer(Answer::control(descriptor.key, response));
            }
            // The reset has answered it.
            Call::Control(..) => {}
        }
    }

    fn posted(&self) {
        self.0.interrupt();
    }

    fn announce<D: BlockDevice + 'static>(queue: &Queue<Self, D>, change: Change, target: u8) {
        const TRANSPORT_RESET: u32 = 1;
        let reason = match change {
            Change::Added => 1,
            Change::Removed => 2,
        };
        // In events drivers take the two bytes of the unit as a plain number, as REPORT LUNS gives small ones, and not in flat space form.
        let lun = [1, target, 0, 0, 0, 0, 0, 0];
        let posted = queue.state.borrow_mut().with_rings(|rings| rings.post_event(TRANSPORT_RESET, lun, reason));
        if posted == Some(true) {
            queue.model().0.interrupt_for_event();
        }
    }
}

/// Carries out a command (virtio 1.2, 5.6.6.1).
async fn carry_out<D: BlockDevice + 'static>(
    queue: &Queue<VirtioModel, D>,
    descriptor: &Descriptor,
    segments: &mut GuestSegments,
) -> Answer {
    let (key, header) = (descriptor.key, &descriptor.header);
    let Some(target) = key.target.and_then(|number| queue.target(number)) else {
        return Answer::command(key, Response::BadTarget);
    };
    segments.clear();
    let mapped = queue.state.borrow_mut().with_rings(|rings| {
        let out = rings.map_data(&key, false, segments).map(|()| segments.len());
        let both = out.and_then(|out| rings.map_data(&key, true, segments).map(|()| (out, segments.len() - out)));
        // Data outside of memory are this command's trouble, not the queue's.
        Ok(both.ok())
    });
    let direction = match mapped.flatten() {
        Some((0, 0)) => Direction::None,
        Some((_, 0)) => Direction::Out,
        Some((0, _)) => Direction::In,
        // Both at once was not agreed on.
        Some(_) | None => return Answer::command(key, Response::Failure),
    };
    let attribute = match header[16] {
        1 => TaskAttribute::Ordered,
        2 => TaskAttribute::HeadOfQueue,
        3 => TaskAttribute::Aca,
        _ => TaskAttribute::Simple,
    };
    // The field has room for more than any command that a disk knows.
    let command = ScsiCommand {
        lun: key.lun,
        tag: key.tag,
        attribute,
        short_buffer: ShortBuffer::Truncate,
        cdb: &header[19..35],
        direction,
    };
    let completion = command::execute(&target, &command, segments).await;
    if completion.aborted {
        return Answer::command(key, Response::Aborted);
    }
    let response = if completion.overflow > 0 { Response::Overrun } else { Response::Ok };
    let residual = segments.len() as u64 - completion.transferred;
    let data_in = if direction == Direction::In { completion.transferred as u32 } else { 0 };
    let sense = completion.sense.as_ref().map_or(&[][..], |sense| sense.as_bytes());
    let sense = &sense[..sense.len().min(SENSE_SIZE)];
    Answer::completed(key, response, completion.status as u8, sense, residual as u32, data_in)
}

/// Carries out a control request (virtio 1.2, 5.6.6.2) and returns its response.
async fn control<D: BlockDevice + 'static>(queue: &Queue<VirtioModel, D>, descriptor: &Descriptor) -> Response {
    const TASK_MANAGEMENT: u32 = 0;
    const NOTIFICATION_QUERY: u32 = 1;
    const NOTIFICATION_SUBSCRIBE: u32 = 2;
    let word = |at: usize| u32::from_le_bytes(descriptor.header[at..at + 4].try_into().expect("four bytes"));
    match word(0) {
        TASK_MANAGEMENT => {}
        // No asynchronous notification of a disk exists: the answer is that none of those asked for does.
        NOTIFICATION_QUERY | NOTIFICATION_SUBSCRIBE => return Response::Ok,
        _ => return Response::FunctionRejected,
    }
    let Key { target, lun, tag, .. } = descriptor.key;
    let Some((number, unit)) = target.and_then(|number| Some((number, queue.target(number)?))) else {
        return Response::BadTarget;
    };
    let in_target = move |key: &Key| key.is_command() && key.target == target;
    let in_set = move |key: &Key| in_target(key) && key.lun == lun;
    let is_task = move |key: &Key| in_set(key) && key.tag == tag;
    let (aborted, reset) = (Ending::Answer(Response::Aborted), Ending::Answer(Response::Reset));
    let kind = word(4);
    // All but the reset of the nexus are about a unit that must be there.
    if kind != 4 && !lun.is_some_and(|lun| unit.has(lun)) {
        return Response::IncorrectLun;
    }
    match kind {
        0 => queue.end_requests(aborted, is_task, |_| {}).await,
        1 | 3 => queue.end_requests(aborted, in_set, |_| {}).await,
        // There is no auto contingent allegiance to be cleared.
        2 => 0,
        4 => {
            let then = |queue: &Queue<_, _>| queue.reset_targets(UnitAttention::DeviceReset, |one| one == number);
            queue.end_requests(reset, in_target, then).await
        }
        5 => queue.end_requests(reset, in_set, |_| lun.into_iter().for_each(|lun: Lun| unit.reset_unit(lun))).await,
        6 if queue.state.borrow_mut().has(is_task) => return Response::FunctionSucceeded,
        7 if queue.state.borrow_mut().has(in_set) => return Response::FunctionSucceeded,
        6 | 7 => 0,
        _ => return Response::FunctionRejected,
    };
    Response::Ok
}
