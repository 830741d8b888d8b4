//! Owns: the PVSCSI adapter (VMware 15AD:07C0): registers, rings, requests, and the thread that moves the data.
//! Promises: after a reset, an abort or a stop, no request that it ended touches guest memory; garbage from a guest ends in
//! an error status or a dead ring, never in a panic or an endless loop.
//! Must not know: KVM, the PCI bus, what stores a disk's blocks.

mod control;
mod entries;
mod interrupts;
mod queue;
mod registers;
mod request;
mod rings;
mod state;
#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use scsi::BlockDevice;
use tracing::error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

pub use control::{Attachment, OpenError, Opener};

use self::control::Control;
use self::interrupts::Interrupts;
use self::queue::{Queue, Shared, TARGETS};
use self::registers::{
    Action, Call, CommandPort, KICK_NON_RW_IO, KICK_RW_IO, Register, STATUS_FAILED, STATUS_OK,
    STATUS_THRESHOLD_ENABLED, WINDOW_SIZE, register_at,
};
use super::{AdapterError, Doorbell, GuestMemory, HostBusAdapter, InterruptLine, InterruptPin, MemoryBar, PciIdentity};

/// The adapter's own target number on its bus.
const OWN_TARGET: u8 = 7;
/// Entries of the io_uring submission queue: one for each request that runs, and some.
const URING_ENTRIES: u32 = 512;

/// One PVSCSI adapter over storage of type `D`, which lives on the adapter's own thread.
pub struct PvScsi<D> {
    memory: Arc<GuestMemory>,
    shared: Arc<Shared<D>>,
    /// The command register; locked while a command is carried out.
    port: Mutex<CommandPort>,
    /// COMMAND_STATUS, readable while a command is carried out.
    command_status: AtomicU32,
    thread: Mutex<Option<JoinHandle<()>>>,
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
        let setup = |what| move |source| AdapterError::Setup { what, source };
        let doorbell = EventFd::new(0).map_err(setup("the doorbell"))?;
        let shared = Arc::new(Shared::new(doorbell, Interrupts::new(line)));
        let (ready, is_ready) = sync_channel(1);
        let for_thread = (memory.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run_thread(for_thread.0, for_thread.1, ready))
            .map_err(setup("the queue's thread"))?;
        let adapter = Arc::new(Self {
            memory,
            shared,
            port: Mutex::new(CommandPort::new()),
            command_status: AtomicU32::new(STATUS_OK),
            thread: Mutex::new(Some(thread)),
        });
        is_ready.recv().map_err(|_| AdapterError::ThreadLost)?.map_err(setup("the io_uring"))?;
        for disk in disks {
            adapter.attach(disk)?;
        }
        Ok(adapter)
    }

    /// Plugs a disk in, also while the guest runs; a guest with a message ring is told.
    ///
    /// # Errors
    /// [`AdapterError`]: no such target number, it is taken, or the storage could not be opened.
    pub fn attach(&self, disk: Attachment<D>) -> Result<(), AdapterError> {
        let target = disk.target;
        if usize::from(target) >= TARGETS || target == OWN_TARGET {
            return Err(AdapterError::NoTarget { target });
        }
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Attach(disk, reply));
        replied.recv().map_err(|_| AdapterError::ThreadLost)?
    }

    /// Pulls a disk out: its requests end, it is flushed and closed, and a guest with a message ring is told.
    ///
    /// # Errors
    /// [`AdapterError`]: there is none, or its last flush failed (it is gone all the same).
    pub fn detach(&self, target: u8) -> Result<(), AdapterError> {
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Detach(target, reply));
        replied.recv().map_err(|_| AdapterError::ThreadLost)?
    }

    fn read_register(&self, register: Register) -> u32 {
        match register {
            Register::CommandStatus => self.command_status.load(Ordering::Acquire),
            Register::InterruptStatus => self.shared.interrupts.status(),
            Register::InterruptMask => self.shared.interrupts.mask(),
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
            Register::InterruptStatus => self.shared.interrupts.acknowledge(value),
            Register::InterruptMask => self.shared.interrupts.set_mask(value),
            Register::Kick => self.shared.ring(),
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
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Call(call, reply));
        replied.recv().unwrap_or(STATUS_FAILED)
    }

    /// CONFIG: writes a configuration page into guest memory.
    fn config(&self, completion_address: u64, page_address: u64, page: u32) -> u32 {
        let known = page == entries::CONTROLLER_PAGE && page_address == entries::CONTROLLER_ADDRESS;
        let address = GuestAddress(completion_address);
        let written = if known {
            self.memory.write_slice(&entries::controller_page(TARGETS as u32), address)
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
            memory_bar: MemoryBar { index: 0, size: WINDOW_SIZE },
            pin: InterruptPin::A,
            msi_vectors: 1,
        }
    }

    fn doorbells(&self) -> std::io::Result<Vec<Doorbell>> {
        [KICK_NON_RW_IO, KICK_RW_IO]
            .into_iter()
            .map(|offset| Ok(Doorbell { offset, width: 4, event: self.shared.doorbell.try_clone()? }))
            .collect()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        // Each register is read once, whatever part of it is asked for.
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let length = rest.len().min(4 - skip);
            let value = self.read_register(register_at(at)).to_le_bytes();
            let (part, later) = rest.split_at_mut(length);
            part.copy_from_slice(&value[skip..skip + length]);
            at = at.wrapping_add(length as u64);
            rest = later;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || self.thread.lock().is_none() {
            return;
        }
        for (index, word) in data.as_chunks::<4>().0.iter().enumerate() {
            let at = offset.wrapping_add(4 * index as u64);
            self.write_register(register_at(at), u32::from_le_bytes(*word));
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
        let Some(thread) = self.thread.lock().take() else { return Ok(()) };
        let (reply, replied) = sync_channel(1);
        self.shared.send(Control::Stop(reply));
        let result = replied.recv().map_err(|_| AdapterError::ThreadLost).and_then(|result| result);
        thread.join().map_err(|_| AdapterError::ThreadLost).and(result)
    }
}

impl<D> Drop for PvScsi<D> {
    fn drop(&mut self) {
        if self.thread.get_mut().take().is_some() {
            let (reply, _) = sync_channel(1);
            self.shared.send(Control::Stop(reply));
        }
    }
}

/// The queue's thread.
fn run_thread<D: BlockDevice + 'static>(
    memory: Arc<GuestMemory>,
    shared: Arc<Shared<D>>,
    ready: std::sync::mpsc::SyncSender<std::io::Result<()>>,
) {
    struct End<D>(Arc<Shared<D>>);
    impl<D> Drop for End<D> {
        fn drop(&mut self) {
            self.0.end();
        }
    }
    let _end = End(shared.clone());
    let runtime = match tokio_uring::Runtime::new(tokio_uring::builder().entries(URING_ENTRIES)) {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let queue = Rc::new(Queue::new(memory, shared));
    if let Err(error) = runtime.block_on(queue.run()) {
        error!(%error, "the PVSCSI queue cannot read its doorbell; the adapter is dead");
    }
}
