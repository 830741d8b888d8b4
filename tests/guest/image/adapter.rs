//! Owns what the drivers of all adapters have in common: a request, a completion, and the adapter that was found.
//! Promises the same answers whichever adapter carries a request.
//! Must not know registers or what a CDB means.

use crate::buslogic::{self, BusLogic};
use crate::cpu;
use crate::job::Interrupt;
use crate::lsilogic::LsiLogic;
use crate::memory::{Arena, OutOfMemory};
use crate::pci::Function;
use crate::pvscsi::Pvscsi;
use crate::virtio_scsi::VirtioScsi;

/// Which way a command's data goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    None,
    In,
    Out,
}

/// Most parts that a request's data have.
pub const PARTS_MAX: usize = 5;

/// Where a request's data are: one part, or several that make a scatter-gather list.
#[derive(Clone, Copy)]
pub struct Data {
    parts: [(u64, u32); PARTS_MAX],
    count: usize,
}

impl Data {
    pub const NONE: Data = Data { parts: [(0, 0); PARTS_MAX], count: 0 };

    /// All in one piece.
    pub fn whole(address: u64, length: u32) -> Data {
        let mut data = Data::NONE;
        data.push(address, length);
        data
    }

    /// Adds a part; at most [`PARTS_MAX`].
    pub fn push(&mut self, address: u64, length: u32) {
        self.parts[self.count] = (address, length);
        self.count += 1;
    }

    pub fn parts(&self) -> &[(u64, u32)] {
        &self.parts[..self.count]
    }

    pub fn length(&self) -> u32 {
        self.parts().iter().map(|part| part.1).sum()
    }
}

/// A SCSI command for any adapter.
#[derive(Clone, Copy)]
pub struct Request {
    /// The caller's name for it.
    pub context: u64,
    pub target: u8,
    pub lun: u8,
    pub cdb: [u8; 16],
    pub cdb_length: u8,
    pub direction: Direction,
    pub data: Data,
    /// Where the driver may build a scatter-gather list: [`LIST_BYTES`] bytes.
    pub lists: u64,
    pub sense_address: u64,
    pub sense_length: u8,
}

/// Room for the lists of one request.
pub const LIST_BYTES: usize = 2048;

/// How a command ended.
#[derive(Clone, Copy)]
pub struct Completion {
    pub context: u64,
    /// Bytes moved.
    pub data_length: u64,
    pub sense_length: u32,
    /// 0, or what the adapter says of a command that has no SCSI status: [`SELECTION_TIMEOUT`], or a number of its own.
    pub host_status: u16,
    pub scsi_status: u16,
}

/// [`Completion::host_status`]: the target is not there.
pub const SELECTION_TIMEOUT: u16 = 0x11;

/// Why the adapter cannot be used.
#[derive(Debug)]
pub enum AttachError {
    NotFound,
    NoRegisters,
    NoMsi,
    OutOfMemory,
    /// It does not do what its driver needs.
    Refused,
}

impl From<OutOfMemory> for AttachError {
    fn from(_: OutOfMemory) -> AttachError {
        AttachError::OutOfMemory
    }
}

/// The adapter of the disk that a job is about.
pub enum Adapter {
    Pvscsi(Pvscsi),
    LsiLogic(LsiLogic),
    BusLogic(BusLogic),
    VirtioScsi(VirtioScsi),
}

/// Does the same with whichever adapter it is.
macro_rules! each {
    ($adapter:expr, $driver:ident => $do:expr) => {
        match $adapter {
            Adapter::Pvscsi($driver) => $do,
            Adapter::LsiLogic($driver) => $do,
            Adapter::BusLogic($driver) => $do,
            Adapter::VirtioScsi($driver) => $do,
        }
    };
}

impl Adapter {
    /// Finds the first adapter that there is a driver for, and makes it ready.
    pub fn attach(interrupt: Interrupt, arena: &mut Arena) -> Result<Adapter, AttachError> {
        if let Some(function) = Pvscsi::find() {
            return Pvscsi::attach(function, interrupt, arena).map(Adapter::Pvscsi);
        }
        if let Some(function) = LsiLogic::find() {
            return LsiLogic::attach(function, interrupt, arena).map(Adapter::LsiLogic);
        }
        if let Some(function) = BusLogic::find() {
            return BusLogic::attach(function, interrupt, arena).map(Adapter::BusLogic);
        }
        let function = VirtioScsi::find().ok_or(AttachError::NotFound)?;
        VirtioScsi::attach(function, interrupt, arena).map(Adapter::VirtioScsi)
    }

    pub fn name(&self) -> &'static str {
        match self {
            Adapter::Pvscsi(_) => "pvscsi",
            Adapter::LsiLogic(_) => "lsilogic",
            Adapter::BusLogic(_) => "buslogic",
            Adapter::VirtioScsi(_) => "virtio-scsi",
        }
    }

    pub fn function(&self) -> Function {
        each!(self, driver => driver.function)
    }

    /// The memory BAR that shows the registers.
    pub fn memory_bar(&self) -> u8 {
        match self {
            Adapter::Pvscsi(_) | Adapter::VirtioScsi(_) => 0,
            Adapter::LsiLogic(_) | Adapter::BusLogic(_) => 1,
        }
    }

    /// The longest CDB that the adapter takes.
    pub fn longest_cdb(&self) -> u8 {
        if matches!(self, Adapter::BusLogic(_)) { buslogic::LONGEST_CDB } else { 16 }
    }

    /// How the driver learns of completions.
    pub fn interrupt(&self) -> Interrupt {
        each!(self, driver => driver.interrupt)
    }

    /// Writes the configuration space as the driver needs it.
    pub fn configure(&self) -> bool {
        each!(self, driver => driver.configure())
    }

    /// Resets the adapter and makes it ready again; false if it refuses.
    pub fn restart(&mut self) -> bool {
        each!(self, driver => driver.restart())
    }

    /// Resets the adapter and leaves it at that.
    pub fn reset(&mut self) {
        each!(self, driver => drop(driver.reset()));
    }

    /// Hands a request over; false when there is no room for it. The adapter need not look before the next kick.
    pub fn submit(&mut self, request: &Request) -> bool {
        each!(self, driver => driver.submit(request))
    }

    /// Has the adapter look at what was submitted.
    pub fn kick(&self, read_or_write: bool) {
        match self {
            Adapter::Pvscsi(driver) => driver.kick(read_or_write),
            // A request that is posted is seen.
            Adapter::LsiLogic(_) => {}
            Adapter::BusLogic(driver) => driver.kick(),
            Adapter::VirtioScsi(driver) => driver.kick(),
        }
    }

    /// The next completion, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        each!(self, driver => driver.poll())
    }

    /// The next completion, waiting for it until the time stamp counter passes `deadline`.
    pub fn wait(&mut self, deadline: u64) -> Option<Completion> {
        let vector = match self.interrupt() {
            Interrupt::Msi => Some(cpu::VECTOR_MSI),
            Interrupt::Intx => Some(cpu::VECTOR_INTX),
            Interrupt::Poll => None,
        };
        loop {
            let seen = vector.map(cpu::interrupts);
            if let Some(completion) = self.poll() {
                return Some(completion);
            }
            if cpu::ticks() > deadline {
                return None;
            }
            match (vector, seen) {
                (Some(vector), Some(seen)) => {
                    match self {
                        Adapter::Pvscsi(_) => {}
                        Adapter::LsiLogic(driver) => driver.unmask(),
                        Adapter::BusLogic(driver) => {
                            driver.unmask();
                            // What came before the acknowledgement interrupts no more.
                            if let Some(completion) = driver.poll() {
                                return Some(completion);
                            }
                        }
                        Adapter::VirtioScsi(driver) => {
                            driver.unmask();
                            // What came before the status was read interrupts no more.
                            if let Some(completion) = driver.poll() {
                                return Some(completion);
                            }
                        }
                    }
                    cpu::wait_for_interrupt(vector, seen);
                }
                _ => core::hint::spin_loop(),
            }
        }
    }

    /// Interrupts of the adapter so far.
    pub fn interrupts(&self) -> u64 {
        cpu::interrupts(cpu::VECTOR_MSI) + cpu::interrupts(cpu::VECTOR_INTX)
    }

    /// Requests that can be handed over although no completion is taken: what the rings hold and some more, or what the
    /// adapter gives credit for.
    pub fn patience(&self) -> u32 {
        match self {
            Adapter::Pvscsi(_) => crate::pvscsi::REQUESTS + 16,
            Adapter::LsiLogic(_) => crate::lsilogic::FRAMES as u32,
            Adapter::BusLogic(_) => buslogic::CCBS as u32,
            Adapter::VirtioScsi(_) => crate::virtio_scsi::REQUESTS as u32,
        }
    }
}
