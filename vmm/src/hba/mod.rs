//! Owns: the SCSI host bus adapters that guests see, and the contract between them and the machine.
//! Promises: after [`HostBusAdapter::stop`] no request can touch guest memory any more.
//! Must not know: KVM, how the PCI bus and its interrupts are built, what stores a disk's blocks.

mod attachment;
pub mod buslogic;
mod command;
mod event_file;
mod guest_segments;
mod interrupts;
pub mod lsilogic;
pub mod pvscsi;
mod queue;
#[cfg(test)]
mod testing;
pub mod virtio_scsi;
mod window;

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

pub use attachment::{Attachment, OpenError, Opener};

/// The guest's RAM, as all adapters see it. Cloning the [`Arc`] keeps it mapped.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The way from one PCI function to the guest's interrupt controller. Implemented by the machine; called from vCPU threads
/// and from queue threads, so implementations must not block on a vCPU.
pub trait InterruptLine: Send + Sync {
    /// Has the guest enabled MSI or MSI-X in the function's configuration space? While it has, the adapter calls
    /// [`Self::raise_message`] for each batch of completions; otherwise it keeps [`Self::set_level`] up to date.
    fn uses_messages(&self) -> bool;

    /// Sends message `vector` of the MSI-X table once, or with MSI the function's only one. Does nothing if both are disabled, the
    /// vector is not there, or the function may not master the bus; a vector that the guest has masked is sent when it unmasks it.
    fn raise_message(&self, vector: u16);

    /// Sets the level of the function's INTx pin: `true` is asserted. The adapter calls it at every change of its interrupt
    /// status or mask (and may repeat a level); command register bit 10 (interrupt disable) is the machine's business.
    fn set_level(&self, asserted: bool);

    /// The input of the interrupt controllers that the pin is wired to, as the interrupt line register says at power-on.
    fn number(&self) -> u8;
}

/// A PCI INTx pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptPin {
    /// INTA#.
    A,
}

/// The address space of a base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory: 32-bit, not prefetchable.
    Memory,
    /// I/O ports.
    Io,
}

/// A base address register. All of a function's registers of this kind show the same window, from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// BAR number, 0 to 5.
    pub index: u8,
    /// Its address space.
    pub kind: BarKind,
    /// Size in bytes, a power of two.
    pub size: u32,
}

/// An MSI-X table, which the machine keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// Vectors, 1 to [`crate::pci::msix::MOST_VECTORS`].
    pub vectors: u16,
    /// The memory BAR that shows it, none of the function's own.
    pub bar: u8,
}

/// What a function's PCI configuration space says about it. The PCI code builds the space from this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor ID, register 00h.
    pub vendor: u16,
    /// Device ID, register 02h.
    pub device: u16,
    /// Revision ID, register 08h.
    pub revision: u8,
    /// Base class, subclass, programming interface (registers 0Bh, 0Ah, 09h).
    pub class: [u8; 3],
    /// Subsystem vendor ID, register 2Ch.
    pub subsystem_vendor: u16,
    /// Subsystem ID, register 2Eh.
    pub subsystem: u16,
    /// Where the register window shows that [`HostBusAdapter::read`] and [`HostBusAdapter::write`] serve.
    pub bars: &'static [Bar],
    /// The INTx pin.
    pub pin: InterruptPin,
    /// The number of MSI vectors to offer in a 64-bit MSI capability, 0 or 1; 0 for no capability.
    pub msi_vectors: u8,
    /// An MSI-X capability, if it offers one.
    pub msix: Option<Msix>,
    /// Vendor-specific capabilities (PCI 3.0, appendix H), each from its length byte on.
    pub vendor_capabilities: &'static [&'static [u8]],
    /// Which of them is a window to the registers through the configuration space (virtio 1.2, 4.1.4.9).
    pub register_window: Option<usize>,
}

/// A register whose writes only wake a queue: the machine registers `event` as KVM ioeventfd on guest-physical address
/// BAR + `offset` of each memory BAR, without data match, so that a kick does not leave the kernel; again whenever the guest moves the BAR.
#[derive(Debug)]
pub struct Doorbell {
    /// Offset in the register window.
    pub offset: u64,
    /// Width of the guest's write in bytes.
    pub width: u8,
    /// Signalled by each write.
    pub event: EventFd,
}

/// One adapter on the PCI bus. Called from any thread.
pub trait HostBusAdapter: Send + Sync {
    /// How it shows itself in PCI configuration space.
    fn pci_identity(&self) -> PciIdentity;

    /// The doorbells to register. A kick that arrives by [`Self::write`] all the same works too.
    fn doorbells(&self) -> std::io::Result<Vec<Doorbell>>;

    /// A guest's read of `data.len()` bytes at `offset` in the register window. Never blocks. Unknown registers read as 0.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A guest's write. A reset or an abort returns only when the requests that it ends can no longer touch guest memory,
    /// so it may take as long as the storage takes for what is in flight.
    fn write(&self, offset: u64, data: &[u8]);

    /// The function's or platform's reset: as after power-on, rings forgotten, interrupts off.
    fn reset(&self);

    /// Ends all work: returns when no request can touch guest memory any more and the disks are flushed and closed. Later
    /// register accesses are ignored. Calling it again does nothing. An error says that a disk could not be flushed; all
    /// the rest is done even so.
    fn stop(&self) -> Result<(), AdapterError>;
}

/// Why an adapter could not be started or stopped cleanly.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// An event file descriptor or the queue's thread or ring could not be made.
    #[error("cannot set up {what} of the adapter: {source}; check the limits of the process (ulimit -n, -l)")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// The operating system's cause.
        source: std::io::Error,
    },
    /// A disk could not be opened.
    #[error("cannot open the disk of target {target}: {source}")]
    Open {
        /// SCSI target number.
        target: u8,
        /// The storage's cause, which names the file and the next step.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no such target, or the number cannot be used.
    #[error("there is no target {target}; disks have the numbers 0 to {last} without 7, the adapter's own")]
    NoTarget {
        /// SCSI target number.
        target: u8,
        /// The adapter's last target number.
        last: u8,
    },
    /// Another disk is there.
    #[error("target {target} has a disk already; choose another number")]
    TargetTaken {
        /// SCSI target number.
        target: u8,
    },
    /// A disk could not be flushed at the end.
    #[error("data of the disk at target {target} may be lost: its last flush failed: {source}")]
    Flush {
        /// SCSI target number.
        target: u8,
        /// The storage's cause.
        source: scsi::StorageError,
    },
    /// The queue's thread has ended unexpectedly; its requests are lost.
    #[error("the adapter's queue thread has ended unexpectedly; the log says why")]
    ThreadLost,
}

/// An adapter as the machine holds it.
pub type Adapter = Arc<dyn HostBusAdapter>;
