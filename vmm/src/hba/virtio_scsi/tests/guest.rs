//! A guest in plain memory: it drives registers and virtqueues the way drivers do, without KVM.

use std::cell::{Cell, RefCell};

use super::super::VirtioScsi;
use crate::hba::HostBusAdapter;
pub(super) use crate::hba::testing::{
    Bench, GatedDisk, MEMORY, disk, eventually, read_10, returns_before_the_gate_opens, write_10,
};

/// Rings of queue number n: at this address and 64 KiB further each.
pub(super) const QUEUES: u64 = 0x1_0000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
/// Headers and responses: 256 bytes for each descriptor chain of each queue.
const AREAS: u64 = 0x4000;
pub(super) const DATA: u64 = 0x10_0000;
pub(super) const SIZE: u16 = 128;
const DESCRIPTORS_EACH: u16 = 8;

/// A buffer: address, length, whether the device writes it.
pub(super) type Buffer = (u64, u32, bool);

/// How a command ended: response, status, residual, sense data, bytes written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) tag: u64,
    pub(super) response: u8,
    pub(super) status: u8,
    pub(super) residual: u32,
    pub(super) sense: Vec<u8>,
    pub(super) written: u32,
}

/// A command as a test writes it down.
#[derive(Clone)]
pub(super) struct Io {
    pub(super) tag: u64,
    pub(super) lun: [u8; 8],
    pub(super) cdb: Vec<u8>,
    pub(super) data: Vec<Buffer>,
    pub(super) queue: u16,
}

impl Io {
    pub(super) fn new(tag: u64, cdb: &[u8]) -> Self {
        Self { tag, lun: address(0, 0), cdb: cdb.to_vec(), data: Vec::new(), queue: 2 }
    }

    pub(super) fn data(mut self, address: u64, length: u32, writable: bool) -> Self {
        self.data.push((address, length, writable));
        self
    }

    pub(super) fn for_target(mut self, target: u8) -> Self {
        self.lun = address(target, 0);
        self
    }
}

pub(super) fn address(target: u8, lun: u8) -> [u8; 8] {
    [1, target, 0x40, lun, 0, 0, 0, 0]
}

/// The guest with its adapter.
pub(super) struct Guest {
    bench: Bench<VirtioScsi<GatedDisk>>,
    /// Available and used indices of each queue.
    indices: RefCell<[(u16, u16); 6]>,
    /// Splits header and response into single bytes at their edges, and uses indirect tables.
    pub(super) indirect: Cell<bool>,
}

impl Guest {
    /// An adapter with one disk of 256 blocks at target 0, in its state after power-on.
    pub(super) fn new() -> Self {
        Self { bench: Bench::new(VirtioScsi::start), indices: Default::default(), indirect: Cell::new(false) }
    }

    /// The same, running, with the power-on attention taken.
    pub(super) fn ready() -> Self {
        let guest = Self::new();
        guest.bring_up();
        let told = guest.run(&Io::new(0, &[0; 6]));
        assert_eq!((told.response, told.status, told.sense[12]), (0, 2, 0x29));
        guest
    }

    /// What a driver does after a reset.
    pub(super) fn bring_up(&self) {
        self.write(0x14, &[0]);
        eventually("the reset", || self.read(0x14, 1) == 0);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for (select, features) in [(0u32, 1 << 28 | 6u32), (1, 1)] {
            self.write(0x08, &select.to_le_bytes());
            self.write(0x0C, &features.to_le_bytes());
        }
        self.write(0x14, &[11]);
        assert_eq!(self.read(0x14, 1), 11);
        for queue in 0..6u16 {
            let base = QUEUES + u64::from(queue) * 0x1_0000;
            self.set_bytes(base, &[0; 0x4000]);
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x18, &SIZE.to_le_bytes());
            for (field, offset) in [(0x20, 0), (0x28, AVAILABLE), (0x30, USED)] {
                self.write(field, &(base as u32 + offset as u32).to_le_bytes());
                self.write(field + 4, &0u32.to_le_bytes());
            }
            self.write(0x1C, &1u16.to_le_bytes());
        }
        *self.indices.borrow_mut() = Default::default();
        self.write(0x14, &[15]);
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        self.adapter.write(offset, data);
    }

    pub(super) fn read(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.adapter.read(offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn notify(&self, queue: u16) {
        self.write(0x3000, &queue.to_le_bytes());
    }

    /// Puts a chain of `buffers` into a queue without notifying; returns its number.
    pub(super) fn put(&self, queue: u16, buffers: &[Buffer]) -> u16 {
        let base = QUEUES + u64::from(queue) * 0x1_0000;
        let available = self.indices.borrow()[usize::from(queue)].0;
        let chain = available % (SIZE / DESCRIPTORS_EACH);
        let descriptor = |buffer: &Buffer, next: Option<u16>| {
            let flags = u16::from(next.is_some()) | u16::from(buffer.2) << 1;
            let next = next.unwrap_or(0);
            [&buffer.0.to_le_bytes()[..], &buffer.1.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
        };
        let head = chain * DESCRIPTORS_EACH;
        let (table, first) = match self.indirect.get() {
            true => (base + 0x8000 + u64::from(chain) * 0x400, 0),
            false => (base, head),
        };
        for (index, buffer) in (0..).zip(buffers) {
            let next = (usize::from(index) + 1 < buffers.len()).then_some(first + index + 1);
            self.set_bytes(table + 16 * u64::from(first + index), &descriptor(buffer, next));
        }
        if self.indirect.get() {
            let mut indirect = descriptor(&(table, 16 * buffers.len() as u32, false), None);
            indirect[12] = 4;
            self.set_bytes(base + 16 * u64::from(head), &indirect);
        }
        let slot = u64::from(available % SIZE);
        self.set_bytes(base + AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.indices.borrow_mut()[usize::from(queue)].0 = available.wrapping_add(1);
        self.set_bytes(base + AVAILABLE + 2, &available.wrapping_add(1).to_le_bytes());
        chain
    }

    /// Where the header (and 128 bytes on, the response) of the next chain of a queue goes.
    pub(super) fn area(&self, queue: u16) -> u64 {
        let chain = self.indices.borrow()[usize::from(queue)].0 % (SIZE / DESCRIPTORS_EACH);
        self.area_of(queue, chain)
    }

    fn area_of(&self, queue: u16, chain: u16) -> u64 {
        QUEUES + u64::from(queue) * 0x1_0000 + AREAS + u64::from(chain) * 256
    }

    /// Takes the next used chain of a queue: its number and the bytes written.
    pub(super) fn take(&self, queue: u16) -> Option<(u16, u32)> {
        let base = QUEUES + u64::from(queue) * 0x1_0000;
        let used = self.indices.borrow()[usize::from(queue)].1;
        if self.bytes(base + USED + 2, 2) == used.to_le_bytes() {
            return None;
        }
        self.indices.borrow_mut()[usize::from(queue)].1 = used.wrapping_add(1);
        let element = self.bytes(base + USED + 4 + 8 * u64::from(used % SIZE), 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0) as u16 / DESCRIPTORS_EACH, word(4)))
    }

    /// Puts a command into its queue.
    pub(super) fn submit(&self, io: &Io) {
        let area = self.area(io.queue);
        let mut header = [0; 51];
        header[..8].copy_from_slice(&io.lun);
        header[8..16].copy_from_slice(&io.tag.to_le_bytes());
        header[19..19 + io.cdb.len()].copy_from_slice(&io.cdb);
        self.set_bytes(area, &header);
        self.set_bytes(area + 128, &[0xEE; 108]);
        let out = io.data.iter().filter(|buffer| !buffer.2).copied();
        let into = io.data.iter().filter(|buffer| buffer.2).copied();
        let buffers: Vec<Buffer> = match self.indirect.get() {
            // Header and response in odd pieces.
            true => [(area, 1, false), (area + 1, 49, false), (area + 50, 1, false)]
                .into_iter()
                .chain(out)
                .chain([(area + 128, 5, true), (area + 133, 102, true), (area + 235, 1, true)])
                .chain(into)
                .collect(),
            false => [(area, 51, false)].into_iter().chain(out).chain([(area + 128, 108, true)]).chain(into).collect(),
        };
        self.put(io.queue, &buffers);
    }

    /// The next command of a queue that has ended.
    pub(super) fn done(&self, queue: u16) -> Option<Done> {
        let (chain, written) = self.take(queue)?;
        let area = self.area_of(queue, chain);
        let response = self.bytes(area + 128, 108);
        let word = |at: usize| u32::from_le_bytes(response[at..at + 4].try_into().unwrap());
        Some(Done {
            tag: u64::from_le_bytes(self.bytes(area + 8, 8).try_into().unwrap()),
            response: response[11],
            status: response[10],
            residual: word(4),
            sense: response[12..].iter().copied().take(word(0).min(96) as usize).collect(),
            written,
        })
    }

    pub(super) fn wait(&self, queue: u16) -> Done {
        let mut done = None;
        eventually("an answer", || {
            done = self.done(queue);
            done.is_some()
        });
        done.unwrap()
    }

    /// One command from its notification to its end.
    pub(super) fn run(&self, io: &Io) -> Done {
        self.submit(io);
        self.notify(io.queue);
        let done = self.wait(io.queue);
        assert_eq!(done.tag, io.tag);
        done
    }

    /// Puts a task management request into the control queue.
    pub(super) fn manage(&self, kind: u32, lun: [u8; 8], tag: u64) {
        let area = self.area(0);
        let request = [&[0; 4][..], &kind.to_le_bytes(), &lun, &tag.to_le_bytes()].concat();
        self.set_bytes(area, &request);
        self.set_bytes(area + 128, &[0xEE]);
        self.put(0, &[(area, 24, false), (area + 128, 1, true)]);
        self.notify(0);
    }

    /// The response of the next control request that has ended.
    pub(super) fn managed(&self) -> u8 {
        let mut taken = None;
        eventually("the end of task management", || {
            taken = self.take(0);
            taken.is_some()
        });
        self.bytes(self.area_of(0, taken.unwrap().0) + 128, 1)[0]
    }
}

impl std::ops::Deref for Guest {
    type Target = Bench<VirtioScsi<GatedDisk>>;

    fn deref(&self) -> &Self::Target {
        &self.bench
    }
}
