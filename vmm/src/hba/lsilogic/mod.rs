//! Owns: the LSI Logic 53C1030 adapter (Fusion-MPT 1.2, PCI 1000:0030): registers, FIFOs, messages.
//! Promises: after a reset or a stop, no request that it ended touches guest memory; garbage from a guest ends in an error
//! reply or the fault state, never in a panic or an endless loop.
//! Must not know: KVM, the PCI bus, what stores a disk's blocks.

mod config_pages;
mod control;
mod ioc;
mod messages;
mod queues;
mod registers;
mod request;
mod scatter_gather;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use parking_lot::Mutex;
use scsi::BlockDevice;

use self::control::{Call, LsiModel};
use self::messages::{Frame, function};
use self::queues::Common;
use self::registers::{
    DOORBELL_INTERRUPT, Diagnostic, Doorbell, DoorbellEvent, INTERRUPTS, IO_WINDOW_SIZE, Register, WINDOW_SIZE,
    register_at,
};
use super::attachment::Attachment;
use super::interrupts::Interrupts;
use super::queue::Engine;
use super::window::{read_words, write_words};
use super::{AdapterError, Bar, BarKind, GuestMemory, HostBusAdapter, InterruptLine, InterruptPin, PciIdentity};

/// The registers that only register accesses use.
#[derive(Default)]
struct Port {
    doorbell: Doorbell,
    diagnostic: Diagnostic,
}

/// One 53C1030 over storage of type `D`, which lives on the adapter's own thread.
pub struct LsiLogic<D> {
    common: Arc<Common>,
    engine: Engine<LsiModel, D>,
    /// Never locked while the queue's thread is waited for.
    port: Mutex<Port>,
}

impl<D: BlockDevice + 'static> LsiLogic<D> {
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
        let engine = Engine::start(name, memory, Arc::new(LsiModel(common.clone())), disks)?;
        Ok(Arc::new(Self { common, engine, port: Mutex::default() }))
    }

    /// Plugs a disk in, also while the guest runs; a guest that wants events is told.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        self.engine.attach(disk)
    }

    /// Pulls a disk out: its requests end, it is flushed and closed, and a guest that wants events is told.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub fn detach(&self, target: u8) -> Result<(), AdapterError> {
        self.engine.detach(target)
    }

    fn read_register(&self, register: Register) -> u32 {
        let common = &self.common;
        match register {
            Register::Doorbell => {
                let mut port = self.port.lock();
                let word = port.doorbell.is_active().then(|| port.doorbell.read());
                common.ioc.lock().doorbell(word)
            }
            Register::HostDiagnostic => self.port.lock().diagnostic.value(),
            Register::InterruptStatus => common.interrupts.status(),
            Register::InterruptMask => !common.interrupts.enabled() & INTERRUPTS,
            Register::ReplyFifo => common.take_reply(),
            Register::WriteSequence | Register::RequestFifo | Register::Reserved => 0,
        }
    }

    fn write_register(&self, register: Register, value: u32) {
        let common = &self.common;
        match register {
            Register::Doorbell => {
                let event = {
                    let ring = || common.interrupts.post(DOORBELL_INTERRUPT);
                    self.port.lock().doorbell.write(value, ring)
                };
                match event {
                    Some(DoorbellEvent::MessageUnitReset) => self.reset_unit(false),
                    Some(DoorbellEvent::IoUnitReset) => self.reset_unit(true),
                    Some(DoorbellEvent::Message(bytes)) => self.message(&Frame::new(&bytes)),
                    None => {}
                }
            }
            Register::WriteSequence => self.port.lock().diagnostic.key(value),
            Register::HostDiagnostic => {
                let resets = self.port.lock().diagnostic.write(value);
                if resets {
                    self.reset_adapter();
                }
            }
            Register::InterruptStatus => {
                if self.port.lock().doorbell.acknowledge() {
                    common.interrupts.clear(DOORBELL_INTERRUPT);
                }
            }
            Register::InterruptMask => common.interrupts.enable(!value & INTERRUPTS),
            Register::RequestFifo => {
                common.post_request(value);
                self.engine.ring();
            }
            Register::ReplyFifo => common.lend_reply_frame(value),
            Register::Reserved => {}
        }
    }

    /// A message has come by the doorbell.
    fn message(&self, frame: &Frame) {
        let managed = frame.function() == function::TASK_MANAGEMENT && self.common.ioc.lock().is_operational();
        if managed {
            // Its reply comes through the reply FIFO; the doorbell only says that it has been taken.
            let resets = self.common.resets();
            self.engine.post_call(Call::TaskManagement { frame: *frame, resets });
        } else {
            let reply = self.common.answer(frame);
            self.port.lock().doorbell.reply(reply.bytes());
        }
        self.common.interrupts.post(DOORBELL_INTERRUPT);
    }

    /// Resets the message unit, and the bus with the whole I/O unit.
    fn reset_unit(&self, bus: bool) {
        // None: the queue has ended, and with it everything that could have been reset.
        let _ = self.engine.call(Call::Reset { bus });
    }

    fn reset_adapter(&self) {
        self.port.lock().doorbell = Doorbell::default();
        self.reset_unit(true);
        self.common.interrupts.reset();
    }
}

impl<D: BlockDevice + 'static> HostBusAdapter for LsiLogic<D> {
    fn pci_identity(&self) -> PciIdentity {
        PciIdentity {
            vendor: 0x1000,
            device: 0x0030,
            revision: 0x01,
            // Mass storage, SCSI.
            class: [0x01, 0x00, 0x00],
            subsystem_vendor: 0x15AD,
            subsystem: 0x1976,
            bars: &[
                Bar { index: 0, kind: BarKind::Io, size: IO_WINDOW_SIZE },
                Bar { index: 1, kind: BarKind::Memory, size: WINDOW_SIZE },
            ],
            pin: InterruptPin::A,
            msi_vectors: 1,
            msix: None,
            vendor_capabilities: &[],
            register_window: None,
        }
    }

    fn doorbells(&self) -> std::io::Result<Vec<super::Doorbell>> {
        // What is written to the request FIFO matters, so no write can only ring.
        Ok(Vec::new())
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
        self.port.lock().diagnostic = Diagnostic::default();
        self.reset_adapter();
        self.common.ioc.lock().power_on();
    }

    fn stop(&self) -> Result<(), AdapterError> {
        self.engine.stop()
    }
}
