//! Owns garbage for the virtio-scsi adapter: indices, chains, tables and registers that no driver would write.
//! Promises that each piece is answered, breaks the device, or is forgotten by a reset.
//! Must not know why the adapter survives.

use super::{NOWHERE, Ordeal};
use crate::adapter::Adapter;
use crate::cpu;
use crate::pattern;
use crate::virtio_scsi::VirtioScsi;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Device status: it must be reset.
const NEEDS_RESET: u8 = 64;
/// The first request queue.
const QUEUE: usize = 2;

/// All of it.
pub fn garbage(ordeal: &mut Ordeal<'_>, lists: &mut [u8]) {
    ordeal.lying_indices();
    ordeal.broken_chains(lists.as_ptr() as u64);
    ordeal.random_chains(lists.as_ptr() as u64);
    ordeal.lost_queues();
    ordeal.registers_of_the_device();
}

impl Ordeal<'_> {
    fn virtio(&mut self) -> &mut VirtioScsi {
        match &mut self.disk.adapter {
            Adapter::VirtioScsi(adapter) => adapter,
            _ => panic!("garbage for virtio-scsi with another adapter"),
        }
    }

    /// The device must say that it needs a reset, and work after it.
    fn breaks(&mut self, name: &str) {
        const LOOKS: u32 = 300_000;
        self.virtio().notify(QUEUE as u16);
        let adapter = self.virtio();
        let broken = (0..LOOKS).any(|_| adapter.status() & NEEDS_RESET != 0);
        self.tally.check(name, broken);
        self.alive(name);
    }

    fn lying_indices(&mut self) {
        for ahead in [0x1000, 0x7FFF, 0x8000, 0xFFF0] {
            self.virtio().claim_available(QUEUE, ahead);
            self.breaks("available index that lies");
        }
    }

    fn broken_chains(&mut self, place: u64) {
        let queue = self.virtio().queue(QUEUE);
        let mut chain = |name: &str, head: u16, descriptors: &[(u64, u16, u64, u32, u16, u16)]| {
            let adapter = self.virtio();
            for &(table, index, address, length, flags, next) in descriptors {
                adapter.put_descriptor(table, index, address, length, flags, next);
            }
            adapter.make_available(QUEUE, head);
            self.breaks(name);
        };
        chain("head outside of the table", 0xFFFF, &[]);
        chain("chain to itself", 0, &[(queue, 0, place, 16, NEXT, 0)]);
        chain("chain out of the table", 0, &[(queue, 0, place, 51, NEXT, 999)]);
        chain("nothing to write a response to", 0, &[(queue, 0, place, 51, 0, 0)]);
        chain("header nowhere", 0, &[(queue, 0, NOWHERE, 51, NEXT, 1), (queue, 1, place, 108, WRITE, 0)]);
        chain("response nowhere", 0, &[(queue, 0, place, 51, NEXT, 1), (queue, 1, NOWHERE, 108, WRITE, 0)]);
        chain("table nowhere", 0, &[(queue, 0, NOWHERE, 64, INDIRECT, 0)]);
        chain("empty table", 0, &[(queue, 0, place, 15, INDIRECT, 0)]);
        chain("table in itself", 0, &[(queue, 0, place, 64, INDIRECT, 0), (place, 0, place, 64, INDIRECT, 0)]);
        chain("table that goes on", 0, &[(queue, 0, place, 64, INDIRECT | NEXT, 1)]);
    }

    /// Chains of random descriptors; what they point to is the lists' memory, or nothing.
    fn random_chains(&mut self, place: u64) {
        let mut random = self.job.seed;
        for _ in 0..40 {
            let adapter = self.virtio();
            let queue = adapter.queue(QUEUE);
            for index in 0..64 {
                random = pattern::mix(random);
                let address = if random & 3 == 0 { NOWHERE } else { place + (random >> 8 & 0xFFF) };
                let (length, flags, next) = ((random >> 20 & 0x3FF) as u32, (random >> 32) as u16 & 7, random >> 48);
                adapter.put_descriptor(queue, index, address, length, flags, next as u16 & 63);
            }
            (0..16).for_each(|head| adapter.make_available(QUEUE, 4 * head));
            adapter.notify(QUEUE as u16);
            self.alive("random chains");
        }
    }

    /// Queues that are no memory.
    fn lost_queues(&mut self) {
        for address in [NOWHERE, u64::MAX - 15, 0xFEE0_0000, 0xC000_0000, 8] {
            let adapter = self.virtio();
            adapter.reset();
            adapter.begin();
            adapter.enable_queue(QUEUE as u16, [address; 3]);
            adapter.set_status(15);
            self.breaks("queue that is no memory");
        }
    }

    fn registers_of_the_device(&mut self) {
        const WINDOW: u64 = 0x4000;
        let base = self.virtio().function.memory_bar(0).unwrap_or(0);
        for value in [u32::MAX, 0, 0x0001_0001] {
            for offset in (0..WINDOW).step_by(4) {
                if offset < 0x80 || offset % 0x400 < 0x40 {
                    cpu::mmio_write(base + offset, value);
                    cpu::mmio_read(base + offset);
                }
            }
            self.alive("registers overwritten");
        }
        let size = self.virtio().function.memory_bar_size(0);
        self.tally.check("BAR is sized and put back", u64::from(size) == WINDOW);
        self.alive("BAR sized");
    }
}
