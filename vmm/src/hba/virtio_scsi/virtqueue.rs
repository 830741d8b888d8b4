//! Owns: one split virtqueue (virtio 1.2, 2.7): taking chains of descriptors, walking them, giving them back.
//! Promises: bounded work for any chain, direct or indirect; indices that lie are an error; nothing but guest RAM is used.
//! Must not know: what a chain means.
//!
//! The crate virtio-queue does this too. Here a chain is walked into [`GuestSegments`], and a lying guest is an error that
//! ends the rings as with the other adapters; that is the most of the code, and what is left is short.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::hba::GuestMemory;
use crate::hba::guest_segments::OutsideRam;

/// Most entries of a queue.
pub(super) const MAX_SIZE: u16 = 256;
/// The most buffers of a chain: a queue's size, or that of an indirect table.
const MAX_BUFFERS: usize = 1024;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
const DESCRIPTOR_SIZE: u64 = 16;
/// Available ring, flags: the driver wants no interrupt.
const NO_INTERRUPT: u16 = 1;

/// What the driver has set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// Why a queue cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueError {
    /// A ring is not RAM, or not aligned.
    #[error("the ring at {0:#x} is not aligned guest RAM")]
    Ring(u64),
    /// The available index is more than the queue's size ahead.
    #[error("the available index {index} is more than {size} ahead of {taken}")]
    Index { index: u16, taken: u16, size: u16 },
    /// A chain leads out of the table or memory, or is endless.
    #[error("the chain from descriptor {0} leads nowhere")]
    Chain(u16),
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: u64,
    pub(super) length: u32,
    /// The device writes it.
    pub(super) writable: bool,
}

/// A queue in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Virtqueue {
    setup: Setup,
    taken: u16,
    given: u16,
}

impl Virtqueue {
    /// A queue whose rings are RAM.
    pub(super) fn new(setup: Setup, memory: &GuestMemory) -> Result<Self, QueueError> {
        let size = u64::from(setup.size);
        let rings =
            [(setup.descriptors, 16, 16 * size), (setup.available, 2, 6 + 2 * size), (setup.used, 4, 6 + 8 * size)];
        for (address, alignment, length) in rings {
            let whole = memory.get_slice(GuestAddress(address), length as usize).is_ok();
            if !whole || !address.is_multiple_of(alignment) {
                return Err(QueueError::Ring(address));
            }
        }
        Ok(Self { setup, taken: 0, given: 0 })
    }

    fn load(&self, memory: &GuestMemory, address: u64) -> Result<u16, QueueError> {
        let value = memory.load::<u16>(GuestAddress(address), Ordering::Acquire);
        value.map(u16::from_le).map_err(|_| QueueError::Ring(address))
    }

    /// How many chains wait to be taken.
    pub(super) fn pending(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let index = self.load(memory, self.setup.available + 2)?;
        let pending = index.wrapping_sub(self.taken);
        if pending > self.setup.size {
            return Err(QueueError::Index { index, taken: self.taken, size: self.setup.size });
        }
        Ok(pending)
    }

    /// Takes the next chain: the number of its first descriptor.
    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Option<u16>, QueueError> {
        if self.pending(memory)? == 0 {
            return Ok(None);
        }
        let slot = u64::from(self.taken % self.setup.size);
        let head = self.load(memory, self.setup.available + 4 + 2 * slot)?;
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(head))
    }

    /// Gives a chain back, of which `written` bytes were written.
    pub(super) fn give(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        let lost = |_| QueueError::Ring(self.setup.used);
        let slot = u64::from(self.given % self.setup.size);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        memory.write_slice(&element, GuestAddress(self.setup.used + 4 + 8 * slot)).map_err(lost)?;
        self.given = self.given.wrapping_add(1);
        memory.store(self.given.to_le(), GuestAddress(self.setup.used + 2), Ordering::Release).map_err(lost)
    }

    /// Does the driver want to be interrupted?
    pub(super) fn wants_interrupt(&self, memory: &GuestMemory) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        self.load(memory, self.setup.available).is_ok_and(|flags| flags & NO_INTERRUPT == 0)
    }

    /// Shows `see` each buffer of the chain from `head` on; it ends the walk by an error.
    pub(super) fn walk(
        &self,
        memory: &GuestMemory,
        head: u16,
        mut see: impl FnMut(Buffer) -> Result<(), OutsideRam>,
    ) -> Result<(), QueueError> {
        let broken = QueueError::Chain(head);
        let (mut table, mut entries, mut index) = (self.setup.descriptors, u32::from(self.setup.size), u32::from(head));
        let mut indirect = false;
        for _ in 0..MAX_BUFFERS {
            if index >= entries {
                return Err(broken);
            }
            let mut bytes = [0u8; DESCRIPTOR_SIZE as usize];
            let place = table.checked_add(DESCRIPTOR_SIZE * u64::from(index)).ok_or(broken)?;
            memory.read_slice(&mut bytes, GuestAddress(place)).map_err(|_| broken)?;
            let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            let address = u64::from(word(4)) << 32 | u64::from(word(0));
            let (length, flags, next) = (word(8), word(12) as u16, word(12) >> 16);
            if flags & FLAG_INDIRECT != 0 {
                if indirect || flags & FLAG_NEXT != 0 {
                    return Err(broken);
                }
                (table, entries, index, indirect) = (address, length / DESCRIPTOR_SIZE as u32, 0, true);
                continue;
            }
            see(Buffer { address, length, writable: flags & FLAG_WRITE != 0 }).map_err(|_| broken)?;
            if flags & FLAG_NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
        Err(broken)
    }
}
