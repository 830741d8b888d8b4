//! Owns: the rings in guest memory: page lists, indices, reading requests, writing completions and messages.
//! Promises: each entry is read once; indices that lie are an error and never a loop; completions never overwrite ones that
//! the guest has not taken.
//! Must not know: what a request means, threads, interrupts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::{FromBytes, IntoBytes};

use super::entries::{COMPLETION_SIZE, CompletionEntry, Descriptor, HostStatus, MESSAGE_SIZE, Message, REQUEST_SIZE};
use super::registers::RingSetup;
use crate::hba::GuestMemory;
use crate::hba::queue::Rings;

const PAGE_SHIFT: u32 = 12;
const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

/// Offsets in the shared state page, u32 each. The guest writes the request producer and the consumers of what it gets.
mod state {
    pub(super) const REQUEST_PRODUCER: u64 = 0x00;
    pub(super) const REQUEST_CONSUMER: u64 = 0x04;
    pub(super) const REQUEST_LOG2: u64 = 0x08;
    pub(super) const COMPLETION_PRODUCER: u64 = 0x0C;
    pub(super) const COMPLETION_CONSUMER: u64 = 0x10;
    pub(super) const COMPLETION_LOG2: u64 = 0x14;
    pub(super) const CALL_THRESHOLD: u64 = 0x18;
    pub(super) const MESSAGE_PRODUCER: u64 = 0x80;
    pub(super) const MESSAGE_CONSUMER: u64 = 0x84;
    pub(super) const MESSAGE_LOG2: u64 = 0x88;
}

/// Why the rings cannot be used (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    /// A ring page or the state page is not RAM.
    #[error("ring page {page:#x} is not guest RAM")]
    Page { page: u64 },
    /// Producer minus consumer is more than the ring holds.
    #[error("the {ring} ring's producer {producer} and consumer {consumer} are more than its {entries} entries apart")]
    Index { ring: &'static str, producer: u32, consumer: u32, entries: u32 },
}

/// One ring's entries.
#[derive(Debug)]
struct Ring {
    name: &'static str,
    pages: Vec<u64>,
    entry_size: usize,
    entries: u32,
}

impl Ring {
    fn new(name: &'static str, memory: &GuestMemory, numbers: &[u64], entry_size: usize) -> Result<Self, RingError> {
        let pages = numbers.iter().map(|&number| page_address(memory, number)).collect::<Result<Vec<_>, _>>()?;
        let all = pages.len() * (PAGE_SIZE / entry_size);
        Ok(Self { name, pages, entry_size, entries: 1 << all.ilog2() })
    }

    fn log2(&self) -> u32 {
        self.entries.ilog2()
    }

    /// Where the entry of a free-running index lies.
    fn address(&self, index: u32) -> GuestAddress {
        let slot = (index & (self.entries - 1)) as usize;
        let per_page = PAGE_SIZE / self.entry_size;
        GuestAddress(self.pages[slot / per_page] + (slot % per_page * self.entry_size) as u64)
    }

    /// How many entries lie between consumer and producer.
    fn used(&self, producer: u32, consumer: u32) -> Result<u32, RingError> {
        let used = producer.wrapping_sub(consumer);
        if used > self.entries {
            return Err(RingError::Index { ring: self.name, producer, consumer, entries: self.entries });
        }
        Ok(used)
    }
}

/// The address of a page that is RAM as a whole.
fn page_address(memory: &GuestMemory, number: u64) -> Result<u64, RingError> {
    let error = RingError::Page { page: number };
    let address = number.checked_mul(PAGE_SIZE as u64).ok_or(error)?;
    memory.get_slice(GuestAddress(address), PAGE_SIZE).map_err(|_| error)?;
    Ok(address)
}

/// The rings of one adapter.
#[derive(Debug)]
pub(super) struct PvRings {
    memory: Arc<GuestMemory>,
    state: u64,
    request: Ring,
    /// Requests taken so far: the truth; the state page holds a copy.
    request_consumer: u32,
    /// The guest's producer when it was last looked at.
    request_producer: u32,
    completion: Ring,
    completion_producer: u32,
    message: Option<(Ring, u32)>,
}

impl PvRings {
    /// Takes over the rings that the guest has set up; all pages must be RAM.
    pub(super) fn new(memory: Arc<GuestMemory>, setup: &RingSetup) -> Result<Self, RingError> {
        let state = page_address(&memory, setup.state)?;
        let request = Ring::new("request", &memory, &setup.request, REQUEST_SIZE)?;
        let completion = Ring::new("completion", &memory, &setup.completion, COMPLETION_SIZE)?;
        let rings = Self {
            memory,
            state,
            request,
            request_consumer: 0,
            request_producer: 0,
            completion,
            completion_producer: 0,
            message: None,
        };
        rings.store(state::REQUEST_CONSUMER, 0);
        rings.store(state::REQUEST_LOG2, rings.request.log2());
        rings.store(state::COMPLETION_PRODUCER, 0);
        rings.store(state::COMPLETION_LOG2, rings.completion.log2());
        // Threshold 0: the guest kicks for each request; this device does not poll.
        rings.store(state::CALL_THRESHOLD, 0);
        Ok(rings)
    }

    /// Adds the message ring.
    pub(super) fn set_message_ring(&mut self, pages: &[u64]) -> Result<(), RingError> {
        let ring = Ring::new("message", &self.memory, pages, MESSAGE_SIZE)?;
        self.store(state::MESSAGE_PRODUCER, 0);
        self.store(state::MESSAGE_LOG2, ring.log2());
        self.message = Some((ring, 0));
        Ok(())
    }

    /// Puts a message into the message ring; `false` if there is no such ring or it is full.
    pub(super) fn post_message(&mut self, message: &Message) -> Result<bool, RingError> {
        let consumer = self.load(state::MESSAGE_CONSUMER);
        let Some((ring, producer)) = &self.message else { return Ok(false) };
        if ring.used(*producer, consumer)? == ring.entries {
            return Ok(false);
        }
        self.write(ring.address(*producer), message.as_bytes());
        let next = producer.wrapping_add(1);
        self.store(state::MESSAGE_PRODUCER, next);
        self.message.as_mut().expect("looked at above").1 = next;
        Ok(true)
    }

    fn load(&self, field: u64) -> u32 {
        let value = self.memory.load::<u32>(GuestAddress(self.state + field), Ordering::Acquire);
        u32::from_le(value.expect("the state page is RAM since setup"))
    }

    fn store(&self, field: u64, value: u32) {
        let address = GuestAddress(self.state + field);
        self.memory.store(value.to_le(), address, Ordering::Release).expect("the state page is RAM since setup");
    }

    fn read(&self, address: GuestAddress, bytes: &mut [u8]) {
        self.memory.read_slice(bytes, address).expect("ring pages are RAM since setup");
    }

    fn write(&self, address: GuestAddress, bytes: &[u8]) {
        self.memory.write_slice(bytes, address).expect("ring pages are RAM since setup");
    }
}

/// What of a request is needed to choose it and to answer it without carrying it out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) context: u64,
    pub(super) target: u8,
}

impl Rings for PvRings {
    type Descriptor = Descriptor;
    type Key = Key;
    type Answer = CompletionEntry;
    type Failure = HostStatus;
    type Error = RingError;

    const LOST: HostStatus = HostStatus::AdapterSoftware;
    const TARGET_GONE: HostStatus = HostStatus::SelectionTimeout;

    fn key(descriptor: &Descriptor) -> Key {
        Key { context: descriptor.context.get(), target: descriptor.target }
    }

    fn target(key: &Key) -> u8 {
        key.target
    }

    fn failed(key: Key, failure: HostStatus) -> CompletionEntry {
        CompletionEntry::failed(key.context.into(), failure)
    }

    fn pending(&mut self) -> Result<u32, RingError> {
        self.request_producer = self.load(state::REQUEST_PRODUCER);
        self.request.used(self.request_producer, self.request_consumer)
    }

    fn fetch(&mut self) -> Result<Option<Descriptor>, RingError> {
        if self.request_producer == self.request_consumer && self.pending()? == 0 {
            return Ok(None);
        }
        let mut bytes = [0; REQUEST_SIZE];
        self.read(self.request.address(self.request_consumer), &mut bytes);
        self.request_consumer = self.request_consumer.wrapping_add(1);
        self.store(state::REQUEST_CONSUMER, self.request_consumer);
        Ok(Some(Descriptor::read_from_bytes(&bytes).expect("a descriptor's size")))
    }

    fn post(&mut self, answers: &mut VecDeque<CompletionEntry>) -> Result<usize, RingError> {
        if answers.is_empty() {
            return Ok(0);
        }
        let consumer = self.load(state::COMPLETION_CONSUMER);
        let room = self.completion.entries - self.completion.used(self.completion_producer, consumer)?;
        let count = answers.len().min(room as usize);
        for answer in answers.drain(..count) {
            self.write(self.completion.address(self.completion_producer), answer.as_bytes());
            self.completion_producer = self.completion_producer.wrapping_add(1);
        }
        if count > 0 {
            self.store(state::COMPLETION_PRODUCER, self.completion_producer);
        }
        Ok(count)
    }
}
