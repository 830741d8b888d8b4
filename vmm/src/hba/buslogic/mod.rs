//! Owns: the BusLogic BT-958 adapter (MultiMaster, PCI 104B:1040): registers, commands, mailboxes, CCBs.
//! Promises: after a reset, an abort or a stop, no request that it ended touches guest memory; garbage from a guest ends in an
//! error status or in mailboxes that are not used any more, never in a panic or an endless loop.
//! Must not know: KVM, the PCI bus, what stores a disk's blocks.

mod ccb;
mod commands;
mod control;
mod interrupts;
mod local_ram;
mod mailboxes;
mod registers;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use scsi::BlockDevice;

use self::commands::{Command, Deed, Facts, Settings};
use self::control::{BusLogicModel, Call};
use self::interrupts::Interrupts;
use self::mailboxes::Common;
use self::registers::{
    ACKNOWLEDGE, BUS_RESET, Event, GEOMETRY, HARD_RESET, Port, Register, SOFT_RESET, WINDOW_SIZE, register_at,
};
use super::attachment::Attachment;
use super::queue::Engine;
use super::{AdapterError, Bar, BarKind, GuestMemory, HostBusAdapter, InterruptLine, InterruptPin, PciIdentity};

/// One BT-958 over storage of type `D`, which lives on the adapter's own thread.
pub struct BusLogic<D> {
    common: Arc<Common>,
    engine: Engine<BusLogicModel, D>,
    /// Neither is locked while the queue's thread is waited for.
    port: Mutex<Port>,
    settings: Mutex<Settings>,
}

impl<D: BlockDevice + 'static> BusLogic<D> {
    /// Starts an adapter with `disks`, at targets 0 to 15 without 7; they are opened on its thread. `name` names the thread.
    ///
    /// # Errors
    /// [`AdapterError`]: no thread or ring, or the first disk that could not be opened.
    pub fn start(
        name: &str,
        memory: Arc<GuestMemory>,
        line: Arc<dyn InterruptLine>,
        disks: Vec<Attachment<D>>,
    ) -> Result<Arc<Self>, AdapterError> {
        let common = Arc::new(Common::new(memory.clone(), Interrupts::new(line)));
        let engine = Engine::start(name, memory, Arc::new(BusLogicModel(common.clone())), disks)?;
        Ok(Arc::new(Self { common, engine, port: Mutex::default(), settings: Mutex::default() }))
    }

    /// Plugs a disk in, also while the guest runs; the guest finds it when it scans.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        self.engine.attach(disk)
    }

    /// Pulls a disk out: its requests end, it is flushed and closed.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub fn detach(&self, target: u8) -> Result<(), AdapterError> {
        self.engine.detach(target)
    }

    fn read_register(&self, register: Register) -> u8 {
        match register {
            Register::Control => self.port.lock().status(),
            Register::Command => {
                let (byte, told) = self.port.lock().data();
                if let Some(told) = told {
                    self.common.interrupts.command_complete(told);
                }
                byte
            }
            Register::Interrupt => self.common.interrupts.shown(),
            Register::Geometry => GEOMETRY,
            Register::Reserved => 0,
        }
    }

    fn write_register(&self, register: Register, value: u8) {
        match register {
            Register::Control => self.control(value),
            Register::Command => {
                let event = self.port.lock().write(value);
                match event {
                    Some(Event::Mailboxes) => self.engine.ring(),
                    Some(Event::Run(command)) => self.run(&command),
                    None => {}
                }
            }
            Register::Interrupt | Register::Geometry | Register::Reserved => {}
        }
    }

    fn control(&self, value: u8) {
        if value & (HARD_RESET | SOFT_RESET) != 0 {
            self.port.lock().begin_reset();
            self.forget_all(value & HARD_RESET != 0);
            self.port.lock().end_reset();
            return;
        }
        if value & ACKNOWLEDGE != 0 {
            self.port.lock().acknowledge();
            self.common.interrupts.acknowledge();
        }
        if value & BUS_RESET != 0 {
            self.call(Call::BusReset);
        }
    }

    fn call(&self, call: Call) {
        // None: the queue has ended, and with it everything that could have been asked of it.
        let _ = self.engine.call(call);
    }

    fn forget_all(&self, bus: bool) {
        self.call(Call::Reset { bus });
        *self.settings.lock() = Settings::default();
    }

    fn run(&self, command: &Command) {
        let common = &self.common;
        let facts = Facts { line: common.interrupts.number(), present: common.present.load(Ordering::Acquire) };
        let (finish, deed) = commands::carry_out(command, &mut self.settings.lock(), facts, &common.memory);
        match deed {
            Some(Deed::Mailboxes(setup)) => {
                self.call(Call::Mailboxes(setup));
                self.port.lock().has_mailboxes();
            }
            Some(Deed::StrictOrder(strict)) => common.strict_order.store(strict, Ordering::Release),
            Some(Deed::ExtendedUnits(extended)) => common.extended_units.store(extended, Ordering::Release),
            Some(Deed::OutboxInterrupt(on)) => common.outbox_interrupt.store(on, Ordering::Release),
            Some(Deed::Line(on)) => common.interrupts.enable(on),
            None => {}
        }
        let told = self.port.lock().finish(finish);
        if let Some(told) = told {
            common.interrupts.command_complete(told);
        }
    }
}

impl<D: BlockDevice + 'static> HostBusAdapter for BusLogic<D> {
    fn pci_identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x104B,
            device: 0x1040,
            revision: 0x01,
            // Mass storage, SCSI.
            class: [0x01, 0x00, 0x00],
            subsystem_vendor: 0x104B,
            subsystem: 0x1040,
            bars: &[
                Bar { index: 0, kind: BarKind::Io, size: WINDOW_SIZE },
                Bar { index: 1, kind: BarKind::Memory, size: WINDOW_SIZE },
            ],
            pin: InterruptPin::A,
            msi_vectors: 0,
            msix: None,
            vendor_capabilities: &[],
            register_window: None,
        }
    }

    fn doorbells(&self) -> std::io::Result<Vec<super::Doorbell>> {
        // What is written to the command register matters, so no write can only ring.
        Ok(Vec::new())
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.read_register(register_at(at));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !self.engine.is_stopped() {
            (offset..).zip(data).for_each(|(at, byte)| self.write_register(register_at(at), *byte));
        }
    }

    fn reset(&self) {
        self.forget_all(true);
        *self.port.lock() = Port::default();
    }

    fn stop(&self) -> Result<(), AdapterError> {
        self.engine.stop()
    }
}
