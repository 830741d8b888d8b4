//! Owns: what the PVSCSI adapter's queue does: requests, resets, aborts, rings, messages.
//! Promises: when a reset or an abort has replied, the requests that it ends can never touch guest memory again.
//! Must not know: register offsets, ring layouts, executors.

use std::sync::Arc;

use scsi::{BlockDevice, Lun, UnitAttention};
use tracing::warn;

use super::entries::{CompletionEntry, Descriptor, HostStatus, Message, MessageKind};
use super::registers::{Call, RingSetup, STATUS_FAILED, STATUS_OK};
use super::request::carry_out;
use super::rings::{Key, PvRings};
use crate::hba::guest_segments::GuestSegments;
use crate::hba::interrupts::Interrupts;
use crate::hba::queue::{Change, Ending, Model, Queue};

/// INTR_STATUS: the completion ring has new entries.
pub(super) const COMPLETION: u32 = 0x1;
/// INTR_STATUS: the message ring has new entries.
pub(super) const MESSAGE: u32 = 0x4;
/// The bits of INTR_STATUS that exist: two for each ring.
pub(super) const ALL_INTERRUPTS: u32 = 0xF;

/// What the adapter's threads share.
pub(super) struct PvModel {
    /// Linux's message handler never reads or clears the status, FreeBSD's wants it set.
    pub(super) interrupts: Interrupts,
}

impl Model for PvModel {
    type Rings = PvRings;
    type Call = Call;
    type Reply = u32;

    const NAME: &'static str = "PVSCSI";
    /// As on ESX since hardware version 14.
    const TARGETS: u8 = 65;

    fn initial_rings(&self) -> Option<PvRings> {
        None
    }

    async fn carry_out<D: BlockDevice + 'static>(
        queue: &Queue<Self, D>,
        descriptor: &Descriptor,
        segments: &mut GuestSegments,
    ) -> Option<CompletionEntry> {
        let target = queue.target(descriptor.target);
        Some(carry_out(descriptor, target.as_deref(), &queue.memory, segments).await)
    }

    async fn call<D: BlockDevice + 'static>(queue: &Queue<Self, D>, call: Call) -> u32 {
        match call {
            Call::AdapterReset => adapter_reset(queue).await,
            Call::SetupRings(setup) => return setup_rings(queue, &setup).await,
            Call::SetupMessageRing { pages } => return setup_message_ring(queue, &pages),
            Call::ResetBus => {
                let reset = |queue: &Queue<_, _>| queue.reset_targets(UnitAttention::BusReset, |_| true);
                queue.end_requests(Ending::Answer(HostStatus::SentReset), |_| true, reset).await;
            }
            Call::ResetDevice { target, lun } => {
                let chosen = move |key: &Key| u32::from(key.target) == target;
                let reset = |queue: &Queue<Self, D>| {
                    let target = u8::try_from(target).ok().and_then(|number| queue.target(number));
                    if let Some((target, lun)) = target.zip(Lun::from_sam(lun)) {
                        target.reset_unit(lun);
                    }
                };
                queue.end_requests(Ending::Answer(HostStatus::BusReset), chosen, reset).await;
            }
            Call::Abort { context, target } => {
                let chosen = move |key: &Key| key.context == context && u32::from(key.target) == target;
                queue.end_requests(Ending::Answer(HostStatus::Aborted), chosen, |_| {}).await;
            }
            // Both are carried out where the register was written.
            Call::Config { .. } | Call::SetupCallThreshold { .. } => return STATUS_FAILED,
        }
        STATUS_OK
    }

    fn posted(&self) {
        self.interrupts.post(COMPLETION);
    }

    fn announce<D: BlockDevice + 'static>(queue: &Queue<Self, D>, change: Change, target: u8) {
        let kind = match change {
            Change::Added => MessageKind::DeviceAdded,
            Change::Removed => MessageKind::DeviceRemoved,
        };
        let message = Message::new(kind, target);
        if queue.state.borrow_mut().with_rings(|rings| rings.post_message(&message)) == Some(true) {
            queue.model().interrupts.post(MESSAGE);
        }
    }
}

async fn adapter_reset<D: BlockDevice + 'static>(queue: &Queue<PvModel, D>) {
    let forget = |queue: &Queue<PvModel, D>| {
        queue.state.borrow_mut().set_rings(None);
        queue.model().interrupts.reset();
        queue.reset_targets(UnitAttention::BusReset, |_| true);
    };
    queue.end_requests(Ending::Forget, |_| true, forget).await;
}

/// New rings; what the old ones had is forgotten.
async fn setup_rings<D: BlockDevice + 'static>(queue: &Queue<PvModel, D>, setup: &RingSetup) -> u32 {
    let rings = PvRings::new(Arc::clone(&queue.memory), setup);
    let failed = rings.as_ref().err().copied();
    let replace = |queue: &Queue<PvModel, D>| queue.state.borrow_mut().set_rings(rings.ok());
    queue.end_requests(Ending::Forget, |_| true, replace).await;
    match failed {
        None => STATUS_OK,
        Some(error) => {
            warn!(%error, "PVSCSI rings refused");
            STATUS_FAILED
        }
    }
}

fn setup_message_ring<D: BlockDevice + 'static>(queue: &Queue<PvModel, D>, pages: &[u64]) -> u32 {
    // A message ring that is refused leaves the others as they are.
    match queue.state.borrow_mut().with_rings(|rings| Ok(rings.set_message_ring(pages))) {
        Some(Ok(())) => STATUS_OK,
        Some(Err(error)) => {
            warn!(%error, "PVSCSI message ring refused");
            STATUS_FAILED
        }
        None => STATUS_FAILED,
    }
}
