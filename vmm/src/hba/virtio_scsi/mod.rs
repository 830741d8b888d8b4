//! Owns: the virtio-scsi adapter (virtio 1.2, PCI 1AF4:1048, modern only): configuration, virtqueues, commands, events.
//! Promises: after a reset or a stop, no request that it ended touches guest memory; garbage from a guest ends in an error
//! response or in a device that needs a reset, never in a panic or an endless loop.
//! Must not know: KVM, the PCI bus, what stores a disk's blocks.

mod control;
mod registers;
mod rings;
#[cfg(test)]
mod tests;
mod virtqueue;

use std::sync::Arc;

use parking_lot::Mutex;
use scsi::BlockDevice;

use self::control::{Call, VirtioModel};
use self::registers::{
    Action, Area, CAPABILITIES, Common, DEVICE, NEEDS_RESET, NOTIFY, WINDOW_SIZE, area_at, device_bytes,
};
use self::rings::{Notices, VECTORS};
use super::attachment::Attachment;
use super::interrupts::Interrupts;
use super::queue::{Engine, Model};
use super::{
    AdapterError, Bar, BarKind, Doorbell, GuestMemory, HostBusAdapter, InterruptLine, InterruptPin, Msix, PciIdentity,
};

/// One virtio-scsi adapter over storage of type `D`, which lives on the adapter's own thread.
pub struct VirtioScsi<D> {
    notices: Arc<Notices>,
    engine: Engine<VirtioModel, D>,
    /// Never locked while the queue's thread is waited for.
    common: Mutex<Common>,
}

impl<D: BlockDevice + 'static> VirtioScsi<D> {
    /// Starts an adapter with `disks`, at targets 0 to 64 without 7; they are opened on its thread. `name` names the thread.
    ///
    /// # Errors
    /// [`AdapterError`]: no thread or ring, or the first disk that could not be opened.
    pub fn start(
        name: &str,
        memory: Arc<GuestMemory>,
        line: Arc<dyn InterruptLine>,
        disks: Vec<Attachment<D>>,
    ) -> Result<Arc<Self>, AdapterError> {
        let notices = Arc::new(Notices::new(Interrupts::new(line)));
        let engine = Engine::start(name, memory, Arc::new(VirtioModel(notices.clone())), disks)?;
        Ok(Arc::new(Self { notices, engine, common: Mutex::new(Common::new()) }))
    }

    /// Plugs a disk in, also while the guest runs, which is told by an event.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        self.engine.attach(disk)
    }

    /// Pulls a disk out: its requests end, it is flushed and closed, and the guest is told by an event.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub fn detach(&self, target: u8) -> Result<(), AdapterError> {
        self.engine.detach(target)
    }

    fn act(&self, action: Action) {
        let call = match action {
            Action::Start(setups) => Call::Start(setups),
            Action::Reset => Call::Reset { bus: false },
        };
        // None: the queue has ended, and with it everything that could have been started or reset.
        let _ = self.engine.call(call);
    }
}

impl<D: BlockDevice + 'static> HostBusAdapter for VirtioScsi<D> {
    fn pci_identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x1AF4,
            device: 0x1048,
            revision: 0x01,
            // Mass storage, SCSI.
            class: [0x01, 0x00, 0x00],
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1100,
            bars: &[Bar { index: 0, kind: BarKind::Memory, size: WINDOW_SIZE }],
            pin: InterruptPin::A,
            msi_vectors: 0,
            msix: Some(Msix { vectors: VECTORS as u16, bar: 1 }),
            vendor_capabilities: CAPABILITIES,
            register_window: Some(CAPABILITIES.len() - 1),
        }
    }

    fn doorbells(&self) -> std::io::Result<Vec<Doorbell>> {
        Ok(vec![Doorbell { offset: NOTIFY.into(), width: 2, event: self.engine.doorbell()? }])
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let copy = |bytes: &[u8], start: u64, data: &mut [u8]| {
            for (at, byte) in (offset - start..).zip(data) {
                *byte = bytes.get(at as usize).copied().unwrap_or(0);
            }
        };
        match area_at(offset) {
            Area::Common => {
                let status = if self.notices.needs_reset() { NEEDS_RESET } else { 0 };
                let bytes = self.common.lock().bytes(status);
                copy(&bytes, 0, data);
            }
            // Reading takes the interrupt back.
            Area::InterruptStatus => {
                let status = self.notices.interrupts.take();
                copy(&[status as u8], registers::INTERRUPT_STATUS.into(), data);
            }
            Area::Device => copy(&device_bytes(VirtioModel::TARGETS), DEVICE.into(), data),
            Area::Notify | Area::Reserved => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.engine.is_stopped() {
            return;
        }
        match area_at(offset) {
            Area::Common => {
                let action = {
                    let mut common = self.common.lock();
                    let action = common.write(offset, data);
                    self.notices.use_vectors(common.vectors());
                    action
                };
                action.into_iter().for_each(|action| self.act(action));
            }
            Area::Notify => self.engine.ring(),
            Area::InterruptStatus | Area::Device | Area::Reserved => {}
        }
    }

    fn reset(&self) {
        *self.common.lock() = Common::new();
        self.notices.use_vectors(Common::new().vectors());
        let _ = self.engine.call(Call::Reset { bus: true });
    }

    fn stop(&self) -> Result<(), AdapterError> {
        self.engine.stop()
    }
}
