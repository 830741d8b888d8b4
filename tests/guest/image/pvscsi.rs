//! Owns the driver of the PVSCSI adapter: registers, commands, rings, completions.
//! Promises that a request is read by the adapter only when it is whole, and that no wait is longer than its limit.
//! Must not know what a CDB means.

use crate::cpu::{self, VECTOR_INTX, VECTOR_MSI};
use crate::job::Interrupt;
use crate::memory::{Arena, OutOfMemory};
use crate::pci::Function;
use core::sync::atomic::{Ordering, fence};

const VENDOR: u16 = 0x15AD;
const DEVICE: u16 = 0x07C0;

/// Register offsets in BAR 0 (as the drivers of Linux and FreeBSD use them).
mod register {
    pub const COMMAND: u64 = 0x0000;
    pub const COMMAND_DATA: u64 = 0x0004;
    pub const COMMAND_STATUS: u64 = 0x0008;
    pub const INTERRUPT_STATUS: u64 = 0x100C;
    pub const INTERRUPT_MASK: u64 = 0x2010;
    pub const KICK_NON_RW_IO: u64 = 0x3014;
    pub const KICK_RW_IO: u64 = 0x4018;
}

/// Commands for [`Pvscsi::command`].
pub mod command {
    pub const ADAPTER_RESET: u32 = 1;
    pub const SETUP_RINGS: u32 = 3;
    pub const RESET_BUS: u32 = 4;
    pub const RESET_DEVICE: u32 = 5;
    pub const ABORT: u32 = 6;
}

/// What COMMAND_STATUS holds after a command that is unknown or failed.
pub const COMMAND_FAILED: u32 = u32::MAX;
const COMPLETION_INTERRUPTS: u32 = 0b11;

const PAGE: usize = 4096;
const REQUEST_PAGES: usize = 8;
const COMPLETION_PAGES: usize = 2;
const REQUEST_BYTES: usize = 128;
const COMPLETION_BYTES: usize = 32;
/// Entries of the request ring.
pub const REQUESTS: u32 = (REQUEST_PAGES * PAGE / REQUEST_BYTES) as u32;
const COMPLETIONS: u32 = (COMPLETION_PAGES * PAGE / COMPLETION_BYTES) as u32;

/// Request flags.
pub mod flag {
    pub const SG_LIST: u32 = 1;
    pub const OUT_OF_BAND_CDB: u32 = 2;
    pub const NO_DATA: u32 = 4;
    pub const TO_HOST: u32 = 8;
    pub const TO_DEVICE: u32 = 0x10;
}

/// Fields of the rings' state page, as u32 indices.
mod state {
    pub const REQUEST_PRODUCER: usize = 0;
    pub const REQUEST_CONSUMER: usize = 1;
    pub const COMPLETION_PRODUCER: usize = 3;
    pub const COMPLETION_CONSUMER: usize = 4;
}

/// A request descriptor, as it lies in the ring.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Request {
    pub context: u64,
    pub data_address: u64,
    pub data_length: u64,
    pub sense_address: u64,
    pub sense_length: u32,
    pub flags: u32,
    pub cdb: [u8; 16],
    pub cdb_length: u8,
    pub lun: [u8; 8],
    pub tag: u8,
    pub bus: u8,
    pub target: u8,
    pub vcpu_hint: u16,
    pub reserved: [u8; 58],
}

const _: () = assert!(size_of::<Request>() == 128 && core::mem::offset_of!(Request, tag) == 0x41);

impl Request {
    pub const EMPTY: Request = Request {
        context: 0,
        data_address: 0,
        data_length: 0,
        sense_address: 0,
        sense_length: 0,
        flags: flag::NO_DATA,
        cdb: [0; 16],
        cdb_length: 6,
        lun: [0; 8],
        tag: 0x20,
        bus: 0,
        target: 0,
        vcpu_hint: 0,
        reserved: [0; 58],
    };
}

/// A completion, as it lies in the ring.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Completion {
    pub context: u64,
    pub data_length: u64,
    pub sense_length: u32,
    pub host_status: u16,
    pub scsi_status: u16,
    reserved: [u32; 2],
}

/// Why the adapter cannot be used.
#[derive(Debug)]
pub enum AttachError {
    NotFound,
    NoRegisters,
    NoMsi,
    OutOfMemory,
    RingsRefused,
}

impl From<OutOfMemory> for AttachError {
    fn from(_: OutOfMemory) -> AttachError {
        AttachError::OutOfMemory
    }
}

/// The adapter, with its rings.
pub struct Pvscsi {
    pub function: Function,
    registers: u64,
    interrupt: Interrupt,
    state: *mut u32,
    requests: *mut Request,
    completions: *mut Completion,
    completion_consumer: u32,
}

impl Pvscsi {
    /// Finds the adapter, sets its interrupt up, resets it and gives it rings.
    pub fn attach(interrupt: Interrupt, arena: &mut Arena) -> Result<Pvscsi, AttachError> {
        let function = Function::find(VENDOR, DEVICE).ok_or(AttachError::NotFound)?;
        let registers = function.memory_bar(0).ok_or(AttachError::NoRegisters)?;
        if interrupt == Interrupt::Intx {
            cpu::route_intx(function.interrupt_line(), registers + register::INTERRUPT_STATUS);
        }
        let mut adapter = Pvscsi {
            function,
            registers,
            interrupt,
            state: arena.take(PAGE)?.as_mut_ptr().cast(),
            requests: arena.take(REQUEST_PAGES * PAGE)?.as_mut_ptr().cast(),
            completions: arena.take(COMPLETION_PAGES * PAGE)?.as_mut_ptr().cast(),
            completion_consumer: 0,
        };
        match (adapter.configure(), adapter.restart()) {
            (false, _) => Err(AttachError::NoMsi),
            (_, false) => Err(AttachError::RingsRefused),
            _ => Ok(adapter),
        }
    }

    /// Writes the configuration space as this driver needs it; false if there is no MSI but it is wanted.
    pub fn configure(&self) -> bool {
        self.function.set_memory_bar(0, self.registers);
        self.function.enable(self.interrupt == Interrupt::Intx);
        self.interrupt != Interrupt::Msi || self.function.enable_msi(VECTOR_MSI)
    }

    /// Resets the adapter and gives it fresh rings; false if it refuses them.
    pub fn restart(&mut self) -> bool {
        self.command(command::ADAPTER_RESET, &[]);
        // SAFETY: the state page is this driver's, and after the reset the adapter does not know it.
        unsafe { self.state.write_bytes(0, PAGE / 4) };
        self.completion_consumer = 0;
        let mut data = [0; 132];
        data[0] = REQUEST_PAGES as u32;
        data[1] = COMPLETION_PAGES as u32;
        let mut put_page = |index: usize, address: u64| {
            let number = address >> 12;
            (data[index], data[index + 1]) = (number as u32, (number >> 32) as u32);
        };
        put_page(2, self.state as u64);
        for page in 0..REQUEST_PAGES {
            put_page(4 + 2 * page, self.requests as u64 + (page * PAGE) as u64);
        }
        for page in 0..COMPLETION_PAGES {
            put_page(4 + 64 + 2 * page, self.completions as u64 + (page * PAGE) as u64);
        }
        let accepted = self.command(command::SETUP_RINGS, &data) == 0;
        let mask = if self.interrupt == Interrupt::Poll { 0 } else { COMPLETION_INTERRUPTS };
        self.write(register::INTERRUPT_MASK, mask);
        accepted
    }

    /// Gives the adapter a command with its data and returns its status.
    pub fn command(&self, number: u32, data: &[u32]) -> u32 {
        self.begin_command(number, data);
        self.read(register::COMMAND_STATUS)
    }

    /// Gives the adapter a command with its data, perhaps not all of it.
    pub fn begin_command(&self, number: u32, data: &[u32]) {
        self.write(register::COMMAND, number);
        data.iter().for_each(|word| self.write(register::COMMAND_DATA, *word));
    }

    /// Reads the register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        cpu::mmio_read(self.registers + offset)
    }

    /// Writes the register at `offset`.
    pub fn write(&self, offset: u64, value: u32) {
        cpu::mmio_write(self.registers + offset, value);
    }

    fn state(&self, index: usize) -> u32 {
        // SAFETY: within the state page, which the adapter changes too: volatile.
        unsafe { self.state.add(index).read_volatile() }
    }

    fn set_state(&self, index: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.state.add(index).write_volatile(value) }
    }

    /// Puts a request into the ring; false when the ring is full. The adapter looks at the next kick.
    pub fn submit(&mut self, request: &Request) -> bool {
        let producer = self.state(state::REQUEST_PRODUCER);
        if producer.wrapping_sub(self.state(state::REQUEST_CONSUMER)) >= REQUESTS {
            return false;
        }
        // SAFETY: within the ring; the adapter reads this entry only after the producer index has moved on.
        unsafe { self.requests.add((producer % REQUESTS) as usize).write_volatile(*request) };
        fence(Ordering::Release);
        self.set_state(state::REQUEST_PRODUCER, producer.wrapping_add(1));
        true
    }

    /// Sets the producer index of the request ring, true or not.
    pub fn claim_producer(&mut self, ahead: u32) {
        let producer = self.state(state::REQUEST_PRODUCER);
        self.set_state(state::REQUEST_PRODUCER, producer.wrapping_add(ahead));
    }

    /// Sets the consumer index of the completion ring, true or not.
    pub fn claim_consumer(&mut self, index: u32) {
        self.set_state(state::COMPLETION_CONSUMER, index);
    }

    /// Overwrites the whole state page with `word`.
    pub fn scribble_state(&mut self, word: u32) {
        for index in 0..PAGE / 4 {
            self.set_state(index, word);
        }
    }

    /// Has the adapter look at the request ring; reads and writes have a register of their own.
    pub fn kick(&self, read_or_write: bool) {
        fence(Ordering::SeqCst);
        self.write(if read_or_write { register::KICK_RW_IO } else { register::KICK_NON_RW_IO }, 0);
    }

    /// The next completion, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        if self.completion_consumer == self.state(state::COMPLETION_PRODUCER) {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = (self.completion_consumer % COMPLETIONS) as usize;
        // SAFETY: within the ring, and whole: the adapter moved the producer index on after it had written it.
        let completion = unsafe { self.completions.add(slot).read_volatile() };
        self.completion_consumer = self.completion_consumer.wrapping_add(1);
        self.set_state(state::COMPLETION_CONSUMER, self.completion_consumer);
        Some(completion)
    }

    /// The next completion, waiting for it until the time stamp counter passes `deadline`.
    pub fn wait(&mut self, deadline: u64) -> Option<Completion> {
        let vector = match self.interrupt {
            Interrupt::Msi => Some(VECTOR_MSI),
            Interrupt::Intx => Some(VECTOR_INTX),
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
                (Some(vector), Some(seen)) => cpu::wait_for_interrupt(vector, seen),
                _ => core::hint::spin_loop(),
            }
        }
    }

    /// Interrupts of the adapter so far.
    pub fn interrupts(&self) -> u64 {
        cpu::interrupts(VECTOR_MSI) + cpu::interrupts(VECTOR_INTX)
    }
}
