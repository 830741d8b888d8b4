//! Owns the driver of the virtio-scsi adapter: its configuration, four request queues, chains direct and indirect.
//! Promises that a chain is the adapter's from its being made available to its being used.
//! Must not know what a CDB means.

use crate::adapter::{AttachError, Completion, Direction, PARTS_MAX, Request, SELECTION_TIMEOUT};
use crate::cpu;
use crate::job::Interrupt;
use crate::memory::Arena;
use crate::pci::Function;
use core::cell::Cell;
use core::sync::atomic::{Ordering, fence};

const VENDOR: u16 = 0x1AF4;
const DEVICE: u16 = 0x1048;

/// Fields of the common configuration (virtio 1.2, 4.1.4.3).
mod field {
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0C;
    pub const QUEUE_COUNT: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_ENABLE: u64 = 0x1C;
    pub const QUEUE_ADDRESSES: [u64; 3] = [0x20, 0x28, 0x30];
}

/// Queues that this driver uses: control, event, and four for requests.
const QUEUES: usize = 6;
const REQUEST_QUEUES: usize = 4;
/// Requests in flight at most.
pub const REQUESTS: usize = 256;
/// Requests of one queue.
const EACH: usize = REQUESTS / REQUEST_QUEUES;
/// Entries of a queue: four for each request.
const SIZE: u16 = 4 * EACH as u16;
const PAGE: usize = 4096;
/// Bytes of a queue: descriptors, available ring, used ring, a page each.
const QUEUE_BYTES: usize = 3 * PAGE;
/// Bytes of a request: header, response from 64 on, indirect table from 256 on.
const AREA_BYTES: usize = 512;
const RESPONSE: u64 = 64;
const TABLE: u64 = 256;
const HEADER_BYTES: u32 = 51;
const RESPONSE_BYTES: u32 = 108;

const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// A request in flight.
#[derive(Clone, Copy)]
struct Flying {
    context: u64,
    length: u32,
    sense_address: u64,
    sense_length: u8,
}

/// The adapter with its queues.
pub struct VirtioScsi {
    pub function: Function,
    pub interrupt: Interrupt,
    common: u64,
    notify: u64,
    interrupt_status: u64,
    queues: *mut u8,
    areas: *mut u8,
    available: [u16; QUEUES],
    used: [u16; QUEUES],
    /// Queues with chains that the adapter has not been told of.
    unkicked: Cell<[bool; QUEUES]>,
    flying: [Option<Flying>; REQUESTS],
}

impl VirtioScsi {
    /// The first adapter on the bus.
    pub fn find() -> Option<Function> {
        Function::find(VENDOR, DEVICE)
    }

    /// Finds the adapter's areas by its capabilities, sets its interrupt up and gives it queues.
    pub fn attach(function: Function, interrupt: Interrupt, arena: &mut Arena) -> Result<VirtioScsi, AttachError> {
        let registers = function.memory_bar(0).ok_or(AttachError::NoRegisters)?;
        let area = |kind| function.vendor_area(kind).map(|offset| registers + u64::from(offset));
        let areas = (area(1), area(2), area(3));
        let (Some(common), Some(notify), Some(interrupt_status)) = areas else { return Err(AttachError::NoRegisters) };
        // The adapter has no MSI-X, so its pin is used.
        let interrupt = if interrupt == Interrupt::Poll { Interrupt::Poll } else { Interrupt::Intx };
        if interrupt == Interrupt::Intx {
            cpu::route_intx_masked(function.interrupt_line());
        }
        let mut adapter = VirtioScsi {
            function,
            interrupt,
            common,
            notify,
            interrupt_status,
            queues: arena.take(QUEUES * QUEUE_BYTES)?.as_mut_ptr(),
            areas: arena.take(REQUESTS * AREA_BYTES)?.as_mut_ptr(),
            available: [0; QUEUES],
            used: [0; QUEUES],
            unkicked: Cell::new([false; QUEUES]),
            flying: [None; REQUESTS],
        };
        adapter.configure();
        if adapter.restart() && adapter.has_window() { Ok(adapter) } else { Err(AttachError::Refused) }
    }

    /// Writes the configuration space as this driver needs it.
    pub fn configure(&self) -> bool {
        self.function.set_memory_bar(0, self.common & !0xFFF);
        self.function.enable(self.interrupt == Interrupt::Intx);
        true
    }

    /// Does the window in the configuration space show the same registers, and change them?
    fn has_window(&self) -> bool {
        let offset = |field| (self.common & 0xFFF) as u32 + field as u32;
        let Some(data) = self.function.point_window(offset(field::QUEUE_COUNT), 2) else { return false };
        let count = self.function.read(data) as u16;
        self.function.point_window(offset(field::QUEUE_SELECT), 2);
        self.function.write(data, 3);
        let selected = cpu::mmio_read16(self.common + field::QUEUE_SELECT);
        (count, selected) == (cpu::mmio_read16(self.common + field::QUEUE_COUNT), 3)
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        const LOOKS: u32 = 100_000;
        self.set_status(0);
        let _ = (0..LOOKS).any(|_| self.status() == 0);
        self.flying = [None; REQUESTS];
    }

    pub fn status(&self) -> u8 {
        cpu::mmio_read8(self.common + field::STATUS)
    }

    pub fn set_status(&self, status: u8) {
        cpu::mmio_write8(self.common + field::STATUS, status);
    }

    /// Resets the device, agrees on features and gives it fresh queues; false if it refuses.
    pub fn restart(&mut self) -> bool {
        self.reset();
        if !self.begin() || cpu::mmio_read16(self.common + field::QUEUE_COUNT) < QUEUES as u16 {
            return false;
        }
        // SAFETY: this driver's queues, which the adapter does not know after the reset.
        unsafe { self.queues.write_bytes(0, QUEUES * QUEUE_BYTES) };
        (self.available, self.used) = ([0; QUEUES], [0; QUEUES]);
        self.unkicked.set([false; QUEUES]);
        for queue in 0..QUEUES {
            let place = self.queue(queue);
            self.enable_queue(queue as u16, [place, place + PAGE as u64, place + 2 * PAGE as u64]);
        }
        self.set_status(15);
        self.status() == 15
    }

    /// Agrees on features with a device that was reset; false if it refuses.
    pub fn begin(&self) -> bool {
        self.set_status(1);
        self.set_status(3);
        for (select, features) in [(0, 1 << 28), (1, 1)] {
            cpu::mmio_write(self.common + field::DRIVER_FEATURE_SELECT, select);
            cpu::mmio_write(self.common + field::DRIVER_FEATURE, features);
        }
        self.set_status(11);
        self.status() == 11
    }

    /// Gives the device a queue: descriptors, available ring, used ring.
    pub fn enable_queue(&self, queue: u16, addresses: [u64; 3]) {
        cpu::mmio_write16(self.common + field::QUEUE_SELECT, queue);
        cpu::mmio_write16(self.common + field::QUEUE_SIZE, SIZE);
        for (place, address) in field::QUEUE_ADDRESSES.into_iter().zip(addresses) {
            cpu::mmio_write(self.common + place, address as u32);
            cpu::mmio_write(self.common + place + 4, (address >> 32) as u32);
        }
        cpu::mmio_write16(self.common + field::QUEUE_ENABLE, 1);
    }

    /// Where a queue's memory is.
    pub fn queue(&self, number: usize) -> u64 {
        self.queues as u64 + (number * QUEUE_BYTES) as u64
    }

    fn area(&self, index: usize) -> u64 {
        self.areas as u64 + (index * AREA_BYTES) as u64
    }

    /// Writes a descriptor, sense or nonsense, into a table.
    pub fn put_descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let words = [address as u32, (address >> 32) as u32, length, u32::from(flags) | u32::from(next) << 16];
        // SAFETY: a table within this driver's queues and areas; the adapter reads it only when it is made available.
        unsafe { ((table + 16 * u64::from(index)) as *mut [u32; 4]).write_volatile(words) };
    }

    /// Makes the chain from `head` on available in `queue`.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = self.queue(queue) + PAGE as u64;
        let slot = u64::from(self.available[queue] % SIZE);
        self.available[queue] = self.available[queue].wrapping_add(1);
        fence(Ordering::Release);
        // SAFETY: within the available ring; volatile, since the adapter reads it.
        unsafe { ((ring + 4 + 2 * slot) as *mut u16).write_volatile(head) };
        fence(Ordering::Release);
        self.claim_available(queue, self.available[queue]);
        let mut unkicked = self.unkicked.get();
        unkicked[queue] = true;
        self.unkicked.set(unkicked);
    }

    /// Sets the index of an available ring, true or not.
    pub fn claim_available(&self, queue: usize, index: u16) {
        // SAFETY: the available ring's index; volatile, since the adapter reads it.
        unsafe { ((self.queue(queue) + PAGE as u64 + 2) as *mut u16).write_volatile(index) };
    }

    /// Makes a request available; false when there is no room for it. The adapter looks at the next kick.
    pub fn submit(&mut self, request: &Request) -> bool {
        let Some(index) = self.flying.iter().position(Option::is_none) else { return false };
        let (queue, head) = (2 + index / EACH, 4 * (index % EACH) as u16);
        self.flying[index] = Some(Flying {
            context: request.context,
            length: request.data.length(),
            sense_address: request.sense_address,
            sense_length: request.sense_length,
        });
        let area = self.area(index);
        let mut header = [0u8; HEADER_BYTES as usize];
        header[..4].copy_from_slice(&[1, request.target, 0x40, request.lun]);
        header[8..16].copy_from_slice(&(index as u64).to_le_bytes());
        header[19..35].copy_from_slice(&request.cdb);
        // SAFETY: the request's own area, which the adapter does not use at the moment.
        unsafe { (area as *mut [u8; HEADER_BYTES as usize]).write_volatile(header) };
        let parts = request.data.parts();
        let mut buffers = [(0, 0, 0); PARTS_MAX + 2];
        buffers[0] = (area, HEADER_BYTES, 0);
        let response = (area + RESPONSE, RESPONSE_BYTES, WRITE);
        let data_flags = if request.direction == Direction::In { WRITE } else { 0 };
        let first = if request.direction == Direction::In { 2 } else { 1 };
        buffers[if first == 2 { 1 } else { 1 + parts.len() }] = response;
        for (buffer, (address, length)) in buffers[first..].iter_mut().zip(parts) {
            *buffer = (*address, *length, data_flags);
        }
        let buffers = &buffers[..2 + parts.len()];
        // The first request queue has its short chains in the queue itself.
        let direct = queue == 2 && buffers.len() <= 4;
        let (table, start) = if direct { (self.queue(queue), head) } else { (area + TABLE, 0) };
        for (place, (address, length, flags)) in (start..).zip(buffers) {
            let last = usize::from(place - start) == buffers.len() - 1;
            let (flags, next) = if last { (*flags, 0) } else { (*flags | NEXT, place + 1) };
            self.put_descriptor(table, place, *address, *length, flags, next);
        }
        if !direct {
            self.put_descriptor(self.queue(queue), head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        }
        self.make_available(queue, head);
        true
    }

    /// Has the adapter look at all queues that got something.
    pub fn kick(&self) {
        fence(Ordering::SeqCst);
        for (queue, unkicked) in self.unkicked.take().into_iter().enumerate() {
            if unkicked {
                self.notify(queue as u16);
            }
        }
    }

    /// Notifies the adapter of a queue.
    pub fn notify(&self, queue: u16) {
        cpu::mmio_write16(self.notify, queue);
    }

    /// The next completion of any queue, if there is one.
    pub fn poll(&mut self) -> Option<Completion> {
        (2..QUEUES).find_map(|queue| self.poll_queue(queue))
    }

    fn poll_queue(&mut self, queue: usize) -> Option<Completion> {
        let ring = self.queue(queue) + 2 * PAGE as u64;
        // SAFETY: the used ring's index; volatile, since the adapter writes it.
        if unsafe { ((ring + 2) as *const u16).read_volatile() } == self.used[queue] {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = u64::from(self.used[queue] % SIZE);
        // SAFETY: within the used ring, and whole: the adapter moved the index on after it had written it.
        let head = unsafe { ((ring + 4 + 8 * slot) as *const u32).read_volatile() };
        self.used[queue] = self.used[queue].wrapping_add(1);
        let index = (queue - 2) * EACH + head as usize / 4;
        let flying = self.flying.get_mut(index)?.take()?;
        let place = (self.area(index) + RESPONSE) as *const [u8; RESPONSE_BYTES as usize];
        // SAFETY: the request's own area, which the adapter has given back.
        let response = unsafe { place.read_volatile() };
        let word = |at: usize| u32::from_le_bytes([response[at], response[at + 1], response[at + 2], response[at + 3]]);
        let sense = &response[12..12 + word(0).min(flying.sense_length.into()).min(96) as usize];
        // SAFETY: the caller's room for sense data, of at least that length.
        unsafe { core::ptr::copy_nonoverlapping(sense.as_ptr(), flying.sense_address as *mut u8, sense.len()) };
        Some(Completion {
            context: flying.context,
            data_length: flying.length.saturating_sub(word(4)).into(),
            sense_length: sense.len() as u32,
            host_status: match response[11] {
                0 => 0,
                3 => SELECTION_TIMEOUT,
                other => 0x200 | u16::from(other),
            },
            scsi_status: response[10].into(),
        })
    }

    /// Takes the interrupt back and lets the next one through; the interrupt's stub masks the pin.
    pub fn unmask(&self) {
        cpu::mmio_read8(self.interrupt_status);
        cpu::unmask_intx();
    }
}
