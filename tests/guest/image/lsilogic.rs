//! Owns the driver of the LSI Logic 53C1030: doorbell, FIFOs, messages.
//! Promises that a frame is the adapter's from its posting to its reply, and that no wait is longer than its limit.
//! Must not know what a CDB means.

use crate::adapter::{AttachError, Completion, Direction, Request, SELECTION_TIMEOUT};
use crate::cpu;
use crate::job::Interrupt;
use crate::memory::Arena;
use crate::pci::Function;
use core::sync::atomic::{Ordering, fence};

const VENDOR: u16 = 0x1000;
const DEVICE: u16 = 0x0030;

/// Register offsets (as Linux's mptbase uses them).
pub mod register {
    pub const DOORBELL: u64 = 0x00;
    pub const WRITE_SEQUENCE: u64 = 0x04;
    pub const HOST_DIAGNOSTIC: u64 = 0x08;
    pub const INTERRUPT_STATUS: u64 = 0x30;
    pub const INTERRUPT_MASK: u64 = 0x34;
    pub const REQUEST_FIFO: u64 = 0x40;
    pub const REPLY_FIFO: u64 = 0x44;
}

/// Requests in flight at most, as IOC FACTS must allow.
pub const FRAMES: usize = 256;
const FRAME_BYTES: usize = 128;
/// Replies that are lent to the adapter. Fewer than requests, so that it must sometimes wait for one.
const REPLIES: usize = 64;
const REPLY_BYTES: usize = 80;
const MASK_ALL: u32 = 9;
const MASK_DOORBELL: u32 = 1;

/// Words of a doorbell's reply, the longest one.
const REPLY_WORDS: usize = 64;
/// How often a register is looked at before a handshake is given up.
const LOOKS: u32 = 100_000;

/// The adapter with its frames.
pub struct LsiLogic {
    pub function: Function,
    pub interrupt: Interrupt,
    registers: u64,
    frames: *mut u8,
    replies: *mut u8,
    /// Context and data length of the request in each frame.
    flying: [Option<(u64, u32)>; FRAMES],
}

impl LsiLogic {
    /// The first adapter on the bus.
    pub fn find() -> Option<Function> {
        Function::find(VENDOR, DEVICE)
    }

    /// Sets the adapter's interrupt up and makes it operational.
    pub fn attach(function: Function, interrupt: Interrupt, arena: &mut Arena) -> Result<LsiLogic, AttachError> {
        let registers = function.memory_bar(1).ok_or(AttachError::NoRegisters)?;
        // The parallel adapter has no MSI; drivers use its pin.
        let interrupt = if interrupt == Interrupt::Poll { Interrupt::Poll } else { Interrupt::Intx };
        if interrupt == Interrupt::Intx {
            cpu::route_intx(function.interrupt_line(), registers + register::INTERRUPT_MASK, MASK_ALL);
        }
        let mut adapter = LsiLogic {
            function,
            interrupt,
            registers,
            frames: arena.take(FRAMES * FRAME_BYTES)?.as_mut_ptr(),
            replies: arena.take(REPLIES * REPLY_BYTES)?.as_mut_ptr(),
            flying: [None; FRAMES],
        };
        adapter.configure();
        if adapter.restart() { Ok(adapter) } else { Err(AttachError::Refused) }
    }

    /// Writes the configuration space as this driver needs it.
    pub fn configure(&self) -> bool {
        self.function.set_memory_bar(1, self.registers);
        self.function.enable(self.interrupt == Interrupt::Intx);
        true
    }

    /// Resets the adapter by the keys of its diagnostic register: the way out of any state.
    pub fn reset(&mut self) {
        for key in [0xF, 0x4, 0xB, 0x2, 0x7, 0xD] {
            self.write(register::WRITE_SEQUENCE, key);
        }
        self.write(register::HOST_DIAGNOSTIC, 0x04);
        self.flying = [None; FRAMES];
    }

    /// Resets the adapter, asks it what it can, lends it reply frames and initialises it; false if an answer is wrong.
    pub fn restart(&mut self) -> bool {
        self.reset();
        let mut reply = [0; REPLY_WORDS];
        let facts = self.handshake(&[0x0300_0000, 0, 1], &mut reply) && reply[7] == 0 && reply[0x24 / 2] >= 256;
        for number in 0..REPLIES {
            self.write(register::REPLY_FIFO, self.replies as u32 + (number * REPLY_BYTES) as u32);
        }
        let init = [0x0200_0004, 0x0001_1000, 2, REPLY_BYTES as u32, 0, 0];
        let initialised = self.handshake(&init, &mut reply) && reply[7] == 0;
        let enabled = self.handshake(&[0x0600_0000, 0, 3], &mut reply) && reply[7] == 0;
        self.write(register::INTERRUPT_MASK, MASK_ALL);
        facts && initialised && enabled && self.read(register::DOORBELL) >> 28 == 2
    }

    fn wait_for_status(&self, mask: u32, value: u32) -> bool {
        (0..LOOKS).any(|_| self.read(register::INTERRUPT_STATUS) & mask == value)
    }

    /// Sends a message by the doorbell and fetches its reply in words of 16 bits; false if the handshake stalls.
    pub fn handshake(&self, message: &[u32], reply: &mut [u16; REPLY_WORDS]) -> bool {
        const STATUS: u64 = register::INTERRUPT_STATUS;
        self.write(STATUS, 0);
        self.write(register::DOORBELL, 0x42 << 24 | (message.len() as u32) << 16);
        if !self.wait_for_status(1, 1) || self.read(register::DOORBELL) & 1 << 27 == 0 {
            return false;
        }
        self.write(STATUS, 0);
        for word in message {
            if !self.wait_for_status(1 << 31, 0) {
                return false;
            }
            self.write(register::DOORBELL, *word);
        }
        let mut length = 2;
        let mut index = 0;
        while index < length {
            if !self.wait_for_status(1, 1) {
                return false;
            }
            reply[index] = self.read(register::DOORBELL) as u16;
            self.write(STATUS, 0);
            if index == 1 {
                length = (2 * usize::from(reply[1] & 0xFF)).clamp(2, REPLY_WORDS);
            }
            index += 1;
        }
        let ended = self.wait_for_status(1, 1);
        self.write(STATUS, 0);
        ended
    }

    /// Reads the register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        cpu::mmio_read(self.registers + offset)
    }

    /// Writes the register at `offset`.
    pub fn write(&self, offset: u64, value: u32) {
        cpu::mmio_write(self.registers + offset, value);
    }

    /// Lets the reply interrupt through; the interrupt's stub masks it.
    pub fn unmask(&self) {
        self.write(register::INTERRUPT_MASK, MASK_DOORBELL);
    }

    /// Posts a frame; false when all are in use.
    pub fn submit(&mut self, request: &Request) -> bool {
        let Some(index) = self.flying.iter().position(Option::is_none) else { return false };
        self.flying[index] = Some((request.context, request.data.length()));
        let mut frame = Frame([0; FRAME_BYTES]);
        frame.0[0x00] = request.target;
        frame.0[0x04] = request.cdb_length;
        frame.0[0x05] = request.sense_length;
        frame.put(0x08, index as u32);
        frame.0[0x0D] = request.lun;
        let direction = match request.direction {
            Direction::None => 0,
            Direction::Out => 1,
            Direction::In => 2,
        };
        frame.put(0x14, direction << 24);
        frame.0[0x18..0x28].copy_from_slice(&request.cdb);
        frame.put(0x28, request.data.length());
        frame.put(0x2C, request.sense_address as u32);
        frame.put_list(request);
        self.post(index, &frame.0);
        true
    }

    /// Posts `bytes` as frame number `index`, sense or nonsense.
    pub fn post(&mut self, index: usize, bytes: &[u8; FRAME_BYTES]) {
        // SAFETY: within this driver's frames; the adapter reads it only after it is posted.
        let frame = unsafe { self.frames.add(index * FRAME_BYTES) };
        // SAFETY: as above.
        unsafe { frame.cast::<[u8; FRAME_BYTES]>().write_volatile(*bytes) };
        fence(Ordering::SeqCst);
        self.write(register::REQUEST_FIFO, frame as u32);
    }

    /// The next reply, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        let entry = self.read(register::REPLY_FIFO);
        if entry == u32::MAX {
            return None;
        }
        fence(Ordering::Acquire);
        if entry >> 31 == 0 {
            let (context, length) = self.land(entry)?;
            return Some(Completion {
                context,
                data_length: length.into(),
                sense_length: 0,
                host_status: 0,
                scsi_status: 0,
            });
        }
        // SAFETY: a reply frame of this driver, which the adapter gave back; if it lies, the address is one of RAM or of
        // a device, and this program reads nonsense.
        let reply = unsafe { ((entry << 1) as *const [u8; REPLY_BYTES]).read_volatile() };
        self.write(register::REPLY_FIFO, entry << 1);
        let word = |offset: usize| {
            u32::from_le_bytes([reply[offset], reply[offset + 1], reply[offset + 2], reply[offset + 3]])
        };
        let status = (word(0x0C) >> 16) as u16;
        let (context, _) = self.land(word(0x08))?;
        Some(Completion {
            context,
            data_length: word(0x14).into(),
            sense_length: word(0x18),
            host_status: match status {
                // Done, or done with less: the count says it.
                0x00 | 0x45 => 0,
                0x42 | 0x43 => SELECTION_TIMEOUT,
                other => 0x100 | other,
            },
            scsi_status: reply[0x0C].into(),
        })
    }

    /// The frame that a reply names is free again; `None` if none such was posted.
    fn land(&mut self, index: u32) -> Option<(u64, u32)> {
        self.flying.get_mut(index as usize)?.take()
    }
}

/// A frame under construction.
struct Frame([u8; FRAME_BYTES]);

impl Frame {
    fn put(&mut self, offset: usize, value: u32) {
        self.0[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Describes the data: one element; or two in the frame, the second one of 64 bits, and the rest behind a chain.
    fn put_list(&mut self, request: &Request) {
        const LIST: usize = 0x30;
        const LAST: u32 = 0xD1 << 24;
        const WIDE: u32 = 0x12 << 24;
        const LAST_OF_SEGMENT: u32 = 0x80 << 24;
        let write = if request.direction == Direction::Out { 0x04 << 24 } else { 0 };
        match request.data.parts() {
            [] => {
                self.put(LIST, LAST);
                self.put(LIST + 4, u32::MAX);
            }
            [(address, length)] => {
                self.put(LIST, LAST | write | length);
                self.put(LIST + 4, *address as u32);
            }
            [first, second, rest @ ..] => {
                self.put(LIST, 0x10 << 24 | write | first.1);
                self.put(LIST + 4, first.0 as u32);
                self.put(LIST + 8, WIDE | LAST_OF_SEGMENT | write | second.1);
                self.put(LIST + 12, second.0 as u32);
                self.put(LIST + 16, (second.0 >> 32) as u32);
                self.put(LIST + 20, 0x30 << 24 | 8 * rest.len() as u32);
                self.put(LIST + 24, request.lists as u32);
                self.0[0x02] = ((LIST + 20) / 4) as u8;
                for (index, (address, length)) in rest.iter().enumerate() {
                    let flags = if index == rest.len() - 1 { LAST } else { 0x10 << 24 };
                    let element = [flags | write | length, *address as u32];
                    // SAFETY: the caller's room for lists, which nobody else uses until the completion.
                    unsafe { (request.lists as *mut [u32; 2]).add(index).write_volatile(element) };
                }
            }
        }
    }
}
