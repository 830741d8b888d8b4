//! Owns the driver of the PVSCSI adapter: registers, commands, rings, completions.
//! Promises that a request is read by the adapter only when it is whole, and that no wait is longer than its limit.
//! Must not know what a CDB means.

use crate::adapter::{self, AttachError, Direction};
use crate::cpu::{self, VECTOR_MSI};
use crate::job::Interrupt;
use crate::memory::Arena;
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
struct Completion {
    context: u64,
    data_length: u64,
    sense_length: u32,
    host_status: u16,
    scsi_status: u16,
    reserved: [u32; 2],
}

/// The adapter, with its rings.
pub struct Pvscsi {
    pub function: Function,
    pub interrupt: Interrupt,
    registers: u64,
    state: *mut u32,
    requests: *mut Request,
    completions: *mut Completion,
    completion_consumer: u32,
}

impl Pvscsi {
    /// The first adapter on the bus.
    pub fn find() -> Option<Function> {
        Function::find(VENDOR, DEVICE)
    }

    /// Sets the adapter's interrupt up, resets it and gives it rings.
    pub fn attach(function: Function, interrupt: Interrupt, arena: &mut Arena) -> Result<Pvscsi, AttachError> {
        let registers = function.memory_bar(0).ok_or(AttachError::NoRegisters)?;
        if interrupt == Interrupt::Intx {
            cpu::route_intx(function.interrupt_line(), registers + register::INTERRUPT_STATUS, COMPLETION_INTERRUPTS);
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
            (_, false) => Err(AttachError::Refused),
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
        self.reset();
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

    /// Resets the adapter, which then has no rings.
    pub fn reset(&mut self) {
        self.command(command::ADAPTER_RESET, &[]);
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
    pub fn submit(&mut self, request: &adapter::Request) -> bool {
        let mut lun = [0; 8];
        lun[1] = request.lun;
        let mut flags = match request.direction {
            Direction::None => flag::NO_DATA,
            Direction::In => flag::TO_HOST,
            Direction::Out => flag::TO_DEVICE,
        };
        let data_address = match request.data.parts() {
            [] => 0,
            [(address, _)] => *address,
            parts => {
                flags |= flag::SG_LIST;
                put_list(request.lists, parts);
                request.lists
            }
        };
        self.submit_raw(&Request {
            context: request.context,
            data_address,
            data_length: request.data.length().into(),
            sense_address: request.sense_address,
            sense_length: request.sense_length.into(),
            flags,
            cdb: request.cdb,
            cdb_length: request.cdb_length,
            lun,
            target: request.target,
            ..Request::EMPTY
        })
    }

    /// Puts a descriptor into the ring, sense or nonsense; false when the ring is full.
    pub fn submit_raw(&mut self, request: &Request) -> bool {
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
    pub fn poll(&mut self) -> Option<adapter::Completion> {
        if self.completion_consumer == self.state(state::COMPLETION_PRODUCER) {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = (self.completion_consumer % COMPLETIONS) as usize;
        // SAFETY: within the ring, and whole: the adapter moved the producer index on after it had written it.
        let completion = unsafe { self.completions.add(slot).read_volatile() };
        self.completion_consumer = self.completion_consumer.wrapping_add(1);
        self.set_state(state::COMPLETION_CONSUMER, self.completion_consumer);
        Some(adapter::Completion {
            context: completion.context,
            data_length: completion.data_length,
            sense_length: completion.sense_length,
            host_status: completion.host_status,
            scsi_status: completion.scsi_status,
        })
    }
}

/// Writes a list of `parts` with a chain behind the second one.
fn put_list(lists: u64, parts: &[(u64, u32)]) {
    const CHAIN: u32 = 1;
    const SECOND_LIST: u64 = 1024;
    let put = |place: u64, address: u64, length: u32, flags: u32| {
        let words = [address as u32, (address >> 32) as u32, length, flags];
        // SAFETY: the caller's room for lists, which nobody else uses until the completion.
        unsafe { (place as *mut [u32; 4]).write_volatile(words) };
    };
    for (part, (address, length)) in (0..).zip(parts) {
        let place = if part < 2 { lists + 16 * part } else { lists + SECOND_LIST + 16 * (part - 2) };
        put(place, *address, *length, 0);
    }
    put(lists + 32, lists + SECOND_LIST, 0, CHAIN);
}
