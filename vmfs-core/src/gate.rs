//! Owns: the gate page: what every data submission checks before it may touch a LUN.
//! Promises: a check is three loads, takes no lock and allocates nothing; a generation that was poisoned or replaced never opens again.
//! Must not know: who renews leases, how the page is shared (lockd maps it).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::env::Instant;
use crate::units::{Generation, LunIndex};

/// Words of a gate page: 4 for the page itself, then 4 for each LUN index (index 255 is not used).
pub const GATE_WORDS: usize = 256 * 4;
/// Bytes of a gate page.
pub const GATE_BYTES: usize = GATE_WORDS * 8;
/// First word of a gate page: "VMFSGATE", little-endian.
pub const GATE_MAGIC: u64 = u64::from_le_bytes(*b"VMFSGATE");
/// Second word of a gate page.
pub const GATE_VERSION: u64 = 1;

const WORD_GENERATION: usize = 0;
const WORD_LEASE_UNTIL: usize = 1;
const WORD_OPEN_UNTIL: usize = 2;
const WORD_FLAGS: usize = 3;
const POISONED: u64 = 1;

/// Memory of [`GATE_WORDS`] words that the writer and all readers see: a shared mapping, or plain memory within one process.
pub trait GateMemory: Send + Sync {
    /// The words, at least [`GATE_WORDS`].
    fn words(&self) -> &[AtomicU64];
}

impl GateMemory for Box<[AtomicU64]> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// What a submission may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateState {
    /// Go.
    Open,
    /// The lease is about to run out or has: hold the request, nothing is lost yet.
    Frozen,
    /// That incarnation is over for good: fail the request.
    Poisoned,
}

/// Why memory is no gate page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// Too few words.
    #[error("a gate page has {GATE_WORDS} words, this memory has {0}")]
    Size(usize),
    /// Not the magic of a gate page.
    #[error("the memory is no gate page (first word {0:#018x})")]
    Magic(u64),
    /// Another version.
    #[error(
        "the gate page has version {0}, this program knows version {GATE_VERSION}: run the same release for all commands"
    )]
    Version(u64),
}

/// The writer's side: one per host and volume.
pub struct GatePage {
    memory: Arc<dyn GateMemory>,
}

/// The reader's side.
#[derive(Clone)]
pub struct Gate {
    memory: Arc<dyn GateMemory>,
}

impl GatePage {
    /// A page in plain memory, for readers of this process.
    pub fn in_process() -> GatePage {
        let words: Box<[AtomicU64]> = (0..GATE_WORDS).map(|_| AtomicU64::new(0)).collect();
        GatePage::create(Arc::new(words)).expect("the memory has the right size")
    }

    /// Makes `memory`, all zero, a gate page. No LUN is open.
    pub fn create(memory: Arc<dyn GateMemory>) -> Result<GatePage, GateError> {
        if memory.words().len() < GATE_WORDS {
            return Err(GateError::Size(memory.words().len()));
        }
        memory.words()[1].store(GATE_VERSION, Ordering::Relaxed);
        memory.words()[0].store(GATE_MAGIC, Ordering::Release);
        Ok(GatePage { memory })
    }

    /// Goes on writing a page that somebody made.
    pub fn open(memory: Arc<dyn GateMemory>) -> Result<GatePage, GateError> {
        Gate::open(memory).map(|gate| GatePage { memory: gate.memory })
    }

    /// A reader of this page.
    pub fn gate(&self) -> Gate {
        Gate { memory: self.memory.clone() }
    }

    /// Tells that the lease of `generation` on `lun` runs until `lease_until` and that submissions end `margin_ns` before. A newer
    /// generation than the page has replaces it; an older or a poisoned one is ignored and `false` is returned.
    pub fn extend(&self, lun: LunIndex, generation: Generation, lease_until: Instant, margin_ns: u64) -> bool {
        let words = entry(&*self.memory, lun);
        let current = words[WORD_GENERATION].load(Ordering::Relaxed);
        if generation.0 < current
            || (generation.0 == current && words[WORD_FLAGS].load(Ordering::Relaxed) & POISONED != 0)
        {
            return false;
        }
        if generation.0 > current {
            // Readers load `open_until` first: whoever sees the new lease below also sees the new generation.
            words[WORD_OPEN_UNTIL].store(0, Ordering::Release);
            words[WORD_LEASE_UNTIL].store(0, Ordering::Release);
            words[WORD_FLAGS].store(0, Ordering::Release);
            words[WORD_GENERATION].store(generation.0, Ordering::Release);
        }
        words[WORD_LEASE_UNTIL].store(lease_until.0, Ordering::Release);
        words[WORD_OPEN_UNTIL].store(lease_until.0.saturating_sub(margin_ns), Ordering::Release);
        true
    }

    /// Ends `generation` on `lun` for good. One that the page has not seen yet is ended before it begins.
    pub fn poison(&self, lun: LunIndex, generation: Generation) {
        let words = entry(&*self.memory, lun);
        if generation.0 < words[WORD_GENERATION].load(Ordering::Relaxed) {
            return;
        }
        words[WORD_FLAGS].store(POISONED, Ordering::SeqCst);
        words[WORD_OPEN_UNTIL].store(0, Ordering::SeqCst);
        words[WORD_LEASE_UNTIL].store(0, Ordering::SeqCst);
        words[WORD_GENERATION].store(generation.0, Ordering::SeqCst);
    }
}

impl Gate {
    /// A reader of memory that another process writes.
    pub fn open(memory: Arc<dyn GateMemory>) -> Result<Gate, GateError> {
        let words = memory.words();
        if words.len() < GATE_WORDS {
            return Err(GateError::Size(words.len()));
        }
        match (words[0].load(Ordering::Acquire), words[1].load(Ordering::Relaxed)) {
            (GATE_MAGIC, GATE_VERSION) => {}
            (GATE_MAGIC, version) => return Err(GateError::Version(version)),
            (magic, _) => return Err(GateError::Magic(magic)),
        }
        Ok(Gate { memory })
    }

    /// Whether a request under `generation` of `lun` may be sent at `now` (CLOCK_BOOTTIME).
    pub fn state(&self, lun: LunIndex, generation: Generation, now: Instant) -> GateState {
        let words = entry(&*self.memory, lun);
        let open_until = words[WORD_OPEN_UNTIL].load(Ordering::Acquire);
        let current = words[WORD_GENERATION].load(Ordering::Acquire);
        let flags = words[WORD_FLAGS].load(Ordering::Acquire);
        if current > generation.0 || (current == generation.0 && flags & POISONED != 0) {
            GateState::Poisoned
        } else if current == generation.0 && now.0 < open_until {
            GateState::Open
        } else {
            GateState::Frozen
        }
    }

    /// When the lease on `lun` ends and of which generation it is; for people.
    pub fn lease_until(&self, lun: LunIndex) -> (Generation, Instant) {
        let words = entry(&*self.memory, lun);
        let until = words[WORD_LEASE_UNTIL].load(Ordering::Acquire);
        (Generation(words[WORD_GENERATION].load(Ordering::Acquire)), Instant(until))
    }
}

fn entry(memory: &dyn GateMemory, lun: LunIndex) -> &[AtomicU64] {
    let first = usize::from(lun.get()) * 4;
    &memory.words()[first..first + 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LUN: LunIndex = LunIndex::new(254).unwrap();
    const G1: Generation = Generation(1);
    const G2: Generation = Generation(2);

    #[test]
    fn a_gate_is_open_until_the_margin_before_the_end_of_the_lease() {
        let page = GatePage::in_process();
        let gate = page.gate();
        assert_eq!(gate.state(LUN, G1, Instant(0)), GateState::Frozen);
        assert!(page.extend(LUN, G1, Instant(100), 30));
        assert_eq!(gate.state(LUN, G1, Instant(69)), GateState::Open);
        assert_eq!(gate.state(LUN, G1, Instant(70)), GateState::Frozen);
        assert!(page.extend(LUN, G1, Instant(200), 30));
        assert_eq!(gate.state(LUN, G1, Instant(70)), GateState::Open);
        assert_eq!(gate.lease_until(LUN), (G1, Instant(200)));
    }

    #[test]
    fn a_poisoned_or_replaced_generation_never_opens_again() {
        let page = GatePage::in_process();
        let gate = page.gate();
        page.extend(LUN, G1, Instant(100), 0);
        page.poison(LUN, G1);
        assert_eq!(gate.state(LUN, G1, Instant(0)), GateState::Poisoned);
        assert!(!page.extend(LUN, G1, Instant(1000), 0));
        assert_eq!(gate.state(LUN, G1, Instant(0)), GateState::Poisoned);
        assert!(page.extend(LUN, G2, Instant(1000), 0));
        assert_eq!(gate.state(LUN, G1, Instant(0)), GateState::Poisoned);
        assert_eq!(gate.state(LUN, G2, Instant(0)), GateState::Open);
        page.poison(LUN, G1);
        assert_eq!(gate.state(LUN, G2, Instant(0)), GateState::Open);
        assert!(!page.extend(LUN, G1, Instant(9999), 0));
    }

    #[test]
    fn memory_that_is_no_gate_page_is_refused() {
        let zero: Box<[AtomicU64]> = (0..GATE_WORDS).map(|_| AtomicU64::new(0)).collect();
        assert_eq!(Gate::open(Arc::new(zero)).err(), Some(GateError::Magic(0)));
        let small: Box<[AtomicU64]> = Box::new([]);
        assert_eq!(Gate::open(Arc::new(small)).err(), Some(GateError::Size(0)));
    }
}
