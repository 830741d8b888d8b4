//! Owns: the PVSCSI adapter (VMware 15AD:07C0): registers, rings, requests, and the thread that moves the data.
//! Promises: after a reset, an abort or a stop, no request that it ended touches guest memory; garbage from a guest ends in
//! an error status or a dead ring, never in a panic or an endless loop.
//! Must not know: KVM, the PCI bus, what stores a disk's blocks.

mod control;
mod entries;
mod registers;
mod request;
mod rings;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use scsi::BlockDevice;
use vm_memory::{Bytes, GuestAddress};

use self::control::{ALL_INTERRUPTS, PvModel};
use self::registers::{
    Action, Call, CommandPort, KICK_NON_RW_IO, KICK_RW_IO, Register, STATUS_FAILED, STATUS_OK,
    STATUS_THRESHOLD_ENABLED, WINDOW_SIZE, register_at,
};
use super::attachment::Attachment;
use super::interrupts::Interrupts;
use super::queue::{Engine, Model};
use super::window::{read_words, write_words};
use super::{
    AdapterError, Bar, BarKind, Doorbell, GuestMemory, HostBusAdapter, InterruptLine, InterruptPin, Msix, PciIdentity,
};

/// One PVSCSI adapter over storage of type `D`, which lives on the adapter's own thread.
pub struct PvScsi<D> {
    memory: Arc<GuestMemory>,
    engine: Engine<PvModel, D>,
    /// The command register; locked while a command is carried out.
    port: Mutex<CommandPort>,
    /// COMMAND_STATUS, readable while a command is carried out.
    command_status: AtomicU32,
}

impl<D: BlockDevice + 'static> PvScsi<D> {
    /// Starts an adapter with `disks`; they are opened on its thread. `name` names the thread.
    ///
    /// # Errors
    /// [`AdapterError`]: no thread or ring, or the first disk that could not be opened.
    pub fn start(
        name: &str,
        memory: Arc<GuestMemory>,
        line: Arc<dyn InterruptLine>,
        disks: Vec<Attachment<D>>,
    ) -> Result<Arc<Self>, AdapterError> {
        let model = Arc::new(PvModel { interrupts: Interrupts::new(line) });
        let engine = Engine::start(name, memory.clone(), model, disks)?;
        let (port, command_status) = (Mutex::new(CommandPort::new()), AtomicU32::new(STATUS_OK));
        Ok(Arc::new(Self { memory, engine, port, command_status }))
    }

    /// Plugs a disk in, also while the guest runs; a guest with a message ring is told.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        self.engine.attach(disk)
    }

    /// Pulls a disk out: its requests end, it is flushed and closed, and a guest with a message ring is told.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub fn detach(&self, target: u8) -> Result<(), AdapterError> {
        self.engine.detach(target)
    }

    fn interrupts(&self) -> &Interrupts {
        &self.engine.model().interrupts
    }

    fn read_register(&self, register: Register) -> u32 {
        match register {
            Register::CommandStatus => self.command_status.load(Ordering::Acquire),
            Register::InterruptStatus => self.interrupts().status(),
            Register::InterruptMask => self.interrupts().enabled(),
            _ => 0,
        }
    }

    fn write_register(&self, register: Register, value: u32) {
        match register {
            Register::Command => {
                let mut port = self.port.lock();
                let action = port.command(value);
                self.act(action);
            }
            Register::CommandData => {
                let mut port = self.port.lock();
                if let Some(action) = port.data(value) {
                    self.act(action);
                }
            }
            Register::InterruptStatus => self.interrupts().clear(value),
            Register::InterruptMask => self.interrupts().enable(value & ALL_INTERRUPTS),
            Register::Kick => self.engine.ring(),
            Register::CommandStatus | Register::LastStatus | Register::Debug | Register::Reserved => {}
        }
    }

    /// Carries an action out; the command register is locked by the caller.
    fn act(&self, action: Action) {
        let status = match action {
            Action::Status(status) => status,
            Action::Execute(Call::Config { completion_address, page_address, page }) => {
                self.config(completion_address, page_address, page)
            }
            // The threshold stays 0: every request is kicked for.
            Action::Execute(Call::SetupCallThreshold { enable }) => u32::from(enable) * STATUS_THRESHOLD_ENABLED,
            Action::Execute(call) => self.call(call),
        };
        self.command_status.store(status, Ordering::Release);
    }

    fn call(&self, call: Call) -> u32 {
        self.engine.call(call).unwrap_or(STATUS_FAILED)
    }

    /// CONFIG: writes a configuration page into guest memory.
    fn config(&self, completion_address: u64, page_address: u64, page: u32) -> u32 {
        let known = page == entries::CONTROLLER_PAGE && page_address == entries::CONTROLLER_ADDRESS;
        let address = GuestAddress(completion_address);
        let written = if known {
            self.memory.write_slice(&entries::controller_page(PvModel::TARGETS.into()), address)
        } else {
            self.memory.write_slice(&entries::unknown_page(page), address)
        };
        if written.is_ok() { STATUS_OK } else { STATUS_FAILED }
    }
}

impl<D: BlockDevice + 'static> HostBusAdapter for PvScsi<D> {
    fn pci_identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x15AD,
            device: 0x07C0,
            revision: 0x02,
            // Mass storage, SAS.
            class: [0x01, 0x07, 0x00],
            subsystem_vendor: 0x15AD,
            subsystem: 0x07C0,
            bars: &[Bar { index: 0, kind: BarKind::Memory, size: WINDOW_SIZE }],
            pin: InterruptPin::A,
            msi_vectors: 1,
            msix: Some(Msix { vectors: 1, bar: 1 }),
            vendor_capabilities: &[],
            register_window: None,
        }
    }

    fn doorbells(&self) -> std::io::Result<Vec<Doorbell>> {
        [KICK_NON_RW_IO, KICK_RW_IO]
            .into_iter()
            .map(|offset| Ok(Doorbell { offset, width: 4, event: self.engine.doorbell()? }))
            .collect()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        read_words(offset, data, |at| self.read_register(register_at(at)));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !self.engine.is_stopped() {
            write_words(offset, data, |at, value| self.write_register(register_at(at), value));
        }
    }

    fn reset(&self) {
        let mut port = self.port.lock();
        *port = CommandPort::new();
        self.act(Action::Execute(Call::AdapterReset));
    }

    fn stop(&self) -> Result<(), AdapterError> {
        // Waits for a command that is under way, and keeps later ones out.
        let _port = self.port.lock();
        self.engine.stop()
    }
}
