//! Owns the driver of the BusLogic BT-958: registers in ports, mailboxes, CCBs.
//! Promises that a CCB is the adapter's from its start to its end, and that no wait is longer than its limit.
//! Must not know what a CDB means.

use crate::adapter::{AttachError, Completion, Direction, Request, SELECTION_TIMEOUT};
use crate::cpu;
use crate::job::Interrupt;
use crate::memory::Arena;
use crate::pci::Function;
use core::sync::atomic::{Ordering, fence};

const VENDOR: u16 = 0x104B;
const DEVICE: u16 = 0x1040;

/// Registers behind the first port (as Linux's BusLogic uses them).
pub mod register {
    pub const CONTROL: u16 = 0;
    pub const COMMAND: u16 = 1;
    pub const INTERRUPT: u16 = 2;
    pub const GEOMETRY: u16 = 3;
}

/// CCBs in flight at most: as many as Linux has.
pub const CCBS: usize = 192;
pub const CCB_BYTES: usize = 64;
/// Outgoing mailboxes, and incoming ones. Fewer than CCBs, so that completions must sometimes wait.
pub const MAILBOXES: usize = 64;
pub const MAILBOX_BYTES: usize = 8;
/// The longest CDB that a CCB has room for.
pub const LONGEST_CDB: u8 = 12;

const HARD_RESET: u8 = 0x80;
const ACKNOWLEDGE: u8 = 0x20;
const READY: u8 = 0x10;
const DATA_IN: u8 = 0x04;
const INVALID: u8 = 0x01;
const START_MAILBOXES: u8 = 0x02;

/// How often a register is looked at before a wait is given up.
const LOOKS: u32 = 100_000;
const REPLY_BYTES: usize = 256;

/// The adapter with its mailboxes.
pub struct BusLogic {
    pub function: Function,
    pub interrupt: Interrupt,
    port: u16,
    memory_window: u64,
    mailboxes: *mut u8,
    ccbs: *mut u8,
    outgoing: usize,
    incoming: usize,
    /// Context and data length of the request in each CCB.
    flying: [Option<(u64, u32, u8)>; CCBS],
}

impl BusLogic {
    /// The first adapter on the bus.
    pub fn find() -> Option<Function> {
        Function::find(VENDOR, DEVICE)
    }

    /// Sets the adapter's interrupt up and makes it ready.
    pub fn attach(function: Function, interrupt: Interrupt, arena: &mut Arena) -> Result<BusLogic, AttachError> {
        let port = function.port_bar(0).ok_or(AttachError::NoRegisters)?;
        let memory_window = function.memory_bar(1).ok_or(AttachError::NoRegisters)?;
        // It has no MSI; drivers use its pin.
        let interrupt = if interrupt == Interrupt::Poll { Interrupt::Poll } else { Interrupt::Intx };
        if interrupt == Interrupt::Intx {
            cpu::route_intx_masked(function.interrupt_line());
        }
        let mut adapter = BusLogic {
            function,
            interrupt,
            port,
            memory_window,
            mailboxes: arena.take(2 * MAILBOXES * MAILBOX_BYTES)?.as_mut_ptr(),
            ccbs: arena.take(CCBS * CCB_BYTES)?.as_mut_ptr(),
            outgoing: 0,
            incoming: 0,
            flying: [None; CCBS],
        };
        adapter.configure();
        if adapter.restart() { Ok(adapter) } else { Err(AttachError::Refused) }
    }

    /// Writes the configuration space as this driver needs it.
    pub fn configure(&self) -> bool {
        self.function.set_port_bar(0, self.port);
        self.function.set_memory_bar(1, self.memory_window);
        self.function.enable(self.interrupt == Interrupt::Intx);
        true
    }

    /// Reads the register at `offset`.
    pub fn read(&self, offset: u16) -> u8 {
        cpu::in8(self.port + offset)
    }

    /// Writes the register at `offset`.
    pub fn write(&self, offset: u16, value: u8) {
        cpu::out8(self.port + offset, value);
    }

    /// Reads a register by the window in memory.
    pub fn read_memory(&self, offset: u16) -> u8 {
        cpu::mmio_read8(self.memory_window + u64::from(offset))
    }

    fn wait_for_status(&self, mask: u8, value: u8) -> bool {
        (0..LOOKS).any(|_| self.read(register::CONTROL) & mask == value)
    }

    /// Resets adapter and bus, and waits for the diagnosis to begin and to end; false if it does not.
    pub fn reset(&mut self) -> bool {
        const DIAGNOSING: u8 = 0x80;
        self.write(register::CONTROL, HARD_RESET);
        self.flying = [None; CCBS];
        self.wait_for_status(DIAGNOSING, DIAGNOSING)
            && self.wait_for_status(DIAGNOSING, 0)
            && self.wait_for_status(READY, READY)
    }

    /// Resets the adapter, asks it what it is, and gives it mailboxes; false if an answer is wrong.
    pub fn restart(&mut self) -> bool {
        const IDLE: u8 = 0x30;
        if !self.reset() || self.read(register::CONTROL) != IDLE || self.read(register::GEOMETRY) == u8::MAX {
            return false;
        }
        let mut reply = [0; REPLY_BYTES];
        let mut says = |command: &[u8], expected: &[u8]| {
            self.command(command, &mut reply) == Some(expected.len()) && reply.starts_with(expected)
        };
        let known = says(&[0x04], b"AA50") && says(&[0x84], b"7") && says(&[0x8B, 5], b"958 \0");
        // SAFETY: this driver's mailboxes, which the adapter does not know after the reset.
        unsafe { self.mailboxes.write_bytes(0, 2 * MAILBOXES * MAILBOX_BYTES) };
        (self.outgoing, self.incoming) = (0, 0);
        let [a, b, c, d] = (self.mailboxes as u32).to_le_bytes();
        let ready = self.command(&[0x81, MAILBOXES as u8, a, b, c, d], &mut reply).is_some()
            && self.command(&[0x8F, 1], &mut reply).is_some()
            && self.command(&[0x96, 1], &mut reply).is_some();
        known && ready && self.read(register::CONTROL) == READY
    }

    /// Sends a command and fetches its reply; how many bytes that has, or `None` if it is invalid or stalls.
    pub fn command(&self, bytes: &[u8], reply: &mut [u8; REPLY_BYTES]) -> Option<usize> {
        if !self.wait_for_status(READY, READY) {
            return None;
        }
        bytes.iter().for_each(|byte| self.write(register::COMMAND, *byte));
        let mut length = 0;
        for _ in 0..LOOKS {
            let status = self.read(register::CONTROL);
            if status & DATA_IN != 0 {
                *reply.get_mut(length)? = self.read(register::COMMAND);
                length += 1;
            } else if status & READY != 0 {
                self.write(register::CONTROL, ACKNOWLEDGE);
                return (status & INVALID == 0).then_some(length);
            }
        }
        None
    }

    /// Lets the adapter go of its pin, and the pin through again, which the interrupt's stub has masked.
    pub fn unmask(&self) {
        self.write(register::CONTROL, ACKNOWLEDGE);
        cpu::unmask_intx();
    }

    /// The CCB with this number.
    pub fn ccb(&self, index: usize) -> u64 {
        self.ccbs as u64 + (index * CCB_BYTES) as u64
    }

    fn mailbox(&self, index: usize) -> *mut [u32; 2] {
        // SAFETY: within this driver's mailboxes.
        unsafe { self.mailboxes.cast::<[u32; 2]>().add(index) }
    }

    /// Puts a CCB's address, true or not, into the next outgoing mailbox; false when that is not free yet. The adapter looks at the
    /// next kick.
    pub fn send(&mut self, address: u32, action: u8) -> bool {
        let mailbox = self.mailbox(self.outgoing);
        // SAFETY: this driver's mailbox; volatile, since the adapter frees it.
        if unsafe { mailbox.read_volatile() }[1] >> 24 != 0 {
            return false;
        }
        self.outgoing = (self.outgoing + 1) % MAILBOXES;
        // SAFETY: as above. The action comes last: it is what makes the mailbox the adapter's.
        unsafe { mailbox.cast::<u32>().write_volatile(address) };
        fence(Ordering::Release);
        // SAFETY: as above.
        unsafe { mailbox.cast::<u32>().add(1).write_volatile(u32::from(action) << 24) };
        true
    }

    /// Has the adapter look at the outgoing mailboxes.
    pub fn kick(&self) {
        self.write(register::COMMAND, START_MAILBOXES);
    }

    /// Starts a request; false when no CCB or no mailbox is free, or no CCB has room for it.
    pub fn submit(&mut self, request: &Request) -> bool {
        let Some(index) = self.flying.iter().position(Option::is_none) else { return false };
        let mut ccb = Ccb([0; CCB_BYTES]);
        ccb.0[0x01] = match request.direction {
            Direction::None => 3 << 3,
            Direction::Out => 2 << 3,
            Direction::In => 1 << 3,
        };
        ccb.0[0x02] = request.cdb_length;
        ccb.0[0x03] = request.sense_length;
        (ccb.0[0x10], ccb.0[0x11]) = (request.target, request.lun);
        ccb.0[0x12..0x12 + usize::from(LONGEST_CDB)].copy_from_slice(&request.cdb[..LONGEST_CDB.into()]);
        ccb.put(0x24, request.sense_address as u32);
        // Both operations leave what was not moved in the length.
        match request.data.parts() {
            [] => ccb.0[0x00] = 3,
            [(address, length)] => {
                ccb.0[0x00] = 3;
                ccb.put(0x04, *length);
                ccb.put(0x08, *address as u32);
            }
            parts => {
                ccb.0[0x00] = 4;
                ccb.put(0x04, 8 * parts.len() as u32);
                ccb.put(0x08, request.lists as u32);
                for (index, (address, length)) in parts.iter().enumerate() {
                    let element = [*length, *address as u32];
                    // SAFETY: the caller's room for lists, which nobody else uses until the completion.
                    unsafe { (request.lists as *mut [u32; 2]).add(index).write_volatile(element) };
                }
            }
        }
        self.put_ccb(index, &ccb.0);
        if request.cdb_length > LONGEST_CDB || !self.send(self.ccb(index) as u32, 1) {
            return false;
        }
        self.flying[index] = Some((request.context, request.data.length(), request.sense_length));
        true
    }

    /// Writes a CCB, sense or nonsense.
    pub fn put_ccb(&self, index: usize, bytes: &[u8; CCB_BYTES]) {
        // SAFETY: this driver's CCBs; the adapter reads one only after it is started.
        unsafe { (self.ccb(index) as *mut [u8; CCB_BYTES]).write_volatile(*bytes) };
        fence(Ordering::Release);
    }

    /// Takes the next incoming mailbox if it is filled: the CCB's address, and what became of it.
    pub fn take(&mut self) -> Option<(u32, u8)> {
        let mailbox = self.mailbox(MAILBOXES + self.incoming);
        // SAFETY: this driver's mailbox; volatile, since the adapter fills it.
        let code = unsafe { mailbox.read_volatile() }[1] >> 24;
        if code == 0 {
            return None;
        }
        fence(Ordering::Acquire);
        // SAFETY: as above.
        let [address, _] = unsafe { mailbox.read_volatile() };
        // SAFETY: as above; the adapter does not touch it before it is empty.
        unsafe { mailbox.write_volatile([0, 0]) };
        self.incoming = (self.incoming + 1) % MAILBOXES;
        Some((address, code as u8))
    }

    /// The next request that has ended, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        let (address, _) = self.take()?;
        let index = (u64::from(address).checked_sub(self.ccbs as u64)? / CCB_BYTES as u64) as usize;
        let (context, length, sense_length) = self.flying.get_mut(index)?.take()?;
        // SAFETY: this driver's CCB, which the adapter has given back.
        let ccb = unsafe { (self.ccb(index) as *const [u8; CCB_BYTES]).read_volatile() };
        let (host, scsi) = (ccb[0x0E], ccb[0x0F]);
        let left = u32::from_le_bytes([ccb[0x04], ccb[0x05], ccb[0x06], ccb[0x07]]);
        let moved = if host == 0 { length.saturating_sub(left) } else { 0 };
        const CHECK_CONDITION: u8 = 2;
        Some(Completion {
            context,
            data_length: moved.into(),
            sense_length: if scsi == CHECK_CONDITION { sense_length.into() } else { 0 },
            host_status: match host {
                0 => 0,
                0x11 => SELECTION_TIMEOUT,
                other => 0x100 | u16::from(other),
            },
            scsi_status: scsi.into(),
        })
    }
}

/// A CCB under construction.
struct Ccb([u8; CCB_BYTES]);

impl Ccb {
    fn put(&mut self, offset: usize, value: u32) {
        self.0[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
}
