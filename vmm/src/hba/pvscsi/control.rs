//! Owns: what other threads ask of the queue's thread: commands of the guest, disks that come and go, the end.
//! Promises: when a reset, an abort or a stop has replied, the requests that it ends can never touch guest memory again.
//! Must not know: register offsets, ring layouts.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::mpsc::SyncSender;
use std::task::Poll;

use scsi::{BlockDevice, Disk, DiskOptions, Lun, Target, TransportId, UnitAttention};
use tracing::{debug, warn};

use super::entries::{HostStatus, Message, MessageKind};
use super::interrupts::MESSAGE;
use super::queue::Queue;
use super::registers::{Call, RingSetup, STATUS_FAILED, STATUS_OK};
use super::request::NEXUS;
use super::rings::Rings;
use super::state::Ending;
use crate::hba::AdapterError;

/// Any error of a storage back end; it names the file and the next step.
pub type OpenError = Box<dyn std::error::Error + Send + Sync>;

/// Opens a disk's storage on the queue's thread, where it then stays.
pub type Opener<D> = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<D, OpenError>>>> + Send>;

/// A disk to be plugged in.
pub struct Attachment<D> {
    /// SCSI target number: 0 to 64, not 7 (the adapter's own).
    pub target: u8,
    /// How the disk shows itself.
    pub options: DiskOptions,
    /// Opens its storage.
    pub open: Opener<D>,
}

impl<D> Attachment<D> {
    /// A disk at `target` over the storage that the future of `open` gives.
    pub fn new<F>(target: u8, options: DiskOptions, open: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<D, OpenError>> + 'static,
    {
        Self { target, options, open: Box::new(move || Box::pin(open())) }
    }
}

/// The way back to who waits.
type Reply<T> = SyncSender<T>;

/// See the module.
pub(super) enum Control<D> {
    Call(Call, Reply<u32>),
    Attach(Attachment<D>, Reply<Result<(), AdapterError>>),
    Detach(u8, Reply<Result<(), AdapterError>>),
    Stop(Reply<Result<(), AdapterError>>),
}

/// Whoever asked may have given up; the work is done all the same.
fn reply<T>(to: &Reply<T>, value: T) {
    if to.try_send(value).is_err() {
        debug!("nobody waits for the reply of the PVSCSI queue");
    }
}

impl<D: BlockDevice + 'static> Queue<D> {
    /// Carries out one control; breaks when it was the last one.
    pub(super) async fn control(&self, control: Control<D>) -> ControlFlow<()> {
        match control {
            Control::Call(call, to) => reply(&to, self.call(call).await),
            Control::Attach(attachment, to) => reply(&to, self.attach(attachment).await),
            Control::Detach(target, to) => reply(&to, self.detach(target).await),
            Control::Stop(to) => {
                reply(&to, self.stop().await);
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    async fn call(&self, call: Call) -> u32 {
        match call {
            Call::AdapterReset => self.adapter_reset().await,
            Call::SetupRings(setup) => return self.setup_rings(&setup).await,
            Call::SetupMessageRing { pages } => return self.setup_message_ring(&pages),
            Call::ResetBus => {
                self.end_requests(
                    Ending::Answer(HostStatus::SentReset),
                    |_, _| true,
                    |queue| {
                        queue.reset_targets(UnitAttention::BusReset, |_| true);
                    },
                )
                .await;
            }
            Call::ResetDevice { target, lun } => {
                let chosen = move |_: u64, number: u8| u32::from(number) == target;
                self.end_requests(Ending::Answer(HostStatus::BusReset), chosen, |queue| {
                    let number = u8::try_from(target).ok();
                    let target = number.and_then(|number| queue.target(number));
                    if let Some((target, lun)) = target.zip(Lun::from_sam(lun)) {
                        target.reset_unit(lun);
                    }
                })
                .await;
            }
            Call::Abort { context, target } => {
                let chosen = move |one: u64, number: u8| one == context && u32::from(number) == target;
                self.end_requests(Ending::Answer(HostStatus::Aborted), chosen, |_| {}).await;
            }
            // Both are carried out where the register was written.
            Call::Config { .. } | Call::SetupCallThreshold { .. } => return STATUS_FAILED,
        }
        STATUS_OK
    }

    /// Ends the chosen requests, waits until the storage has let go of them, does `then`, and posts the answers.
    async fn end_requests(&self, ending: Ending, chosen: impl Fn(u64, u8) -> bool, then: impl FnOnce(&Self)) {
        self.state.borrow_mut().hold();
        self.state.borrow_mut().end(ending, &chosen);
        self.drained(&chosen).await;
        then(self);
        self.post_now();
        self.state.borrow_mut().release();
    }

    /// Waits until none of the chosen requests runs any more.
    async fn drained(&self, chosen: &impl Fn(u64, u8) -> bool) {
        poll_fn(|context| match self.state.borrow_mut().is_drained(context.waker(), chosen) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    async fn adapter_reset(&self) {
        self.end_requests(
            Ending::Forget,
            |_, _| true,
            |queue| {
                queue.state.borrow_mut().set_rings(None);
                queue.shared.interrupts.reset();
                queue.reset_targets(UnitAttention::BusReset, |_| true);
            },
        )
        .await;
    }

    /// New rings; what the old ones had is forgotten.
    async fn setup_rings(&self, setup: &RingSetup) -> u32 {
        let rings = Rings::new(self.memory.clone(), setup);
        let failed = rings.as_ref().err().copied();
        self.end_requests(Ending::Forget, |_, _| true, |queue| queue.state.borrow_mut().set_rings(rings.ok())).await;
        match failed {
            None => STATUS_OK,
            Some(error) => {
                warn!(%error, "PVSCSI rings refused");
                STATUS_FAILED
            }
        }
    }

    fn setup_message_ring(&self, pages: &[u64]) -> u32 {
        match self.state.borrow_mut().rings().map(|rings| rings.set_message_ring(pages)) {
            Some(Ok(())) => STATUS_OK,
            Some(Err(error)) => {
                warn!(%error, "PVSCSI message ring refused");
                STATUS_FAILED
            }
            None => STATUS_FAILED,
        }
    }

    fn reset_targets(&self, attention: UnitAttention, chosen: impl Fn(u8) -> bool) {
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
        // The adapter has address 7 on its bus.
        target.attach(NEXUS, TransportId::ParallelScsi { address: 7, port: 1 }, 1);
        self.set_target(number, Some(Rc::new(target)));
        self.announce(MessageKind::DeviceAdded, number);
        Ok(())
    }

    async fn detach(&self, number: u8) -> Result<(), AdapterError> {
        let target = self.set_target(number, None).ok_or(AdapterError::NoTarget { target: number })?;
        let chosen = move |_: u64, other: u8| other == number;
        self.end_requests(Ending::Answer(HostStatus::SelectionTimeout), chosen, |_| {}).await;
        self.announce(MessageKind::DeviceRemoved, number);
        flush(number, &target).await
    }

    /// Tells the guest that a device has come or gone, if it wants to know.
    fn announce(&self, kind: MessageKind, number: u8) {
        if self.state.borrow_mut().post_message(&Message::new(kind, number)) {
            self.shared.interrupts.post(MESSAGE);
        }
    }

    async fn stop(&self) -> Result<(), AdapterError> {
        self.state.borrow_mut().hold();
        self.state.borrow_mut().end(Ending::Forget, |_, _| true);
        self.drained(&|_, _| true).await;
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
