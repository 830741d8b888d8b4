//! Owns: the mailboxes: outgoing ones in the guest's memory that name CCBs to start or to abort, incoming ones that name those that
//! have ended.
//! Promises: an outgoing mailbox is free again once its CCB has been read; an incoming one is filled only when the guest has
//! emptied it; a CCB's status is there before its mailbox is.
//! Must not know: what a CCB asks for, executors.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use scsi::Status;
use vm_memory::{Bytes, GuestAddress};

use super::ccb::{Ccb, HostStatus};
use super::interrupts::Interrupts;
use crate::hba::GuestMemory;
use crate::hba::guest_segments::OutsideRam;
use crate::hba::queue::Rings;

/// The width of addresses in mailboxes and CCBs, which comes with the command that announces the mailboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Of the AHA-154x.
    Bits24,
    Bits32,
}

impl Format {
    /// Size of a mailbox in bytes.
    fn size(self) -> u64 {
        match self {
            Format::Bits24 => 4,
            Format::Bits32 => 8,
        }
    }

    /// Where a mailbox has the byte that says what it holds; 0 is nothing.
    fn code_offset(self) -> u64 {
        match self {
            Format::Bits24 => 0,
            Format::Bits32 => 7,
        }
    }
}

/// What the guest says of its mailboxes: `count` outgoing ones at `base`, and behind them as many incoming ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) format: Format,
    pub(super) base: u32,
    pub(super) count: u8,
}

/// What the queue's thread shares with the threads that access registers.
pub(super) struct Common {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) interrupts: Interrupts,
    /// A bit for each target that is there.
    pub(super) present: AtomicU16,
    /// Outgoing mailboxes are used one after the other; otherwise the guest may use any.
    pub(super) strict_order: AtomicBool,
    /// CCBs have extended logical unit numbers.
    pub(super) extended_units: AtomicBool,
    /// The guest wants to know when an outgoing mailbox is free again.
    pub(super) outbox_interrupt: AtomicBool,
    resets: AtomicU32,
}

impl Common {
    pub(super) fn new(memory: Arc<GuestMemory>, interrupts: Interrupts) -> Self {
        let off = || AtomicBool::new(false);
        Self {
            memory,
            interrupts,
            present: AtomicU16::new(0),
            strict_order: off(),
            extended_units: off(),
            outbox_interrupt: off(),
            resets: AtomicU32::new(0),
        }
    }

    /// How often everything has been forgotten so far.
    pub(super) fn resets(&self) -> u32 {
        self.resets.load(Ordering::Acquire)
    }

    /// Requests that have been handed on are not to be answered any more.
    pub(super) fn forget(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// As after power on. Nothing runs any more.
    pub(super) fn reset(&self) {
        self.forget();
        for flag in [&self.strict_order, &self.extended_units, &self.outbox_interrupt] {
            flag.store(false, Ordering::Release);
        }
        self.interrupts.reset();
    }
}

/// What an outgoing mailbox asks for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asked {
    /// Start this CCB.
    Start(Ccb),
    /// Start a CCB that is not in RAM.
    Nowhere,
    /// Abort the CCB.
    Abort,
}

/// A mailbox as it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// The CCB's address.
    pub(super) address: u32,
    pub(super) asked: Asked,
}

/// What of a mailbox is needed to choose it and to answer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) address: u32,
    /// The format and the target of its CCB, if it starts one.
    pub(super) ccb: Option<(Format, u8)>,
    /// Is it an abort?
    abort: bool,
}

impl Key {
    /// Does it start the CCB at `address`?
    pub(super) fn starts(&self, address: u32) -> bool {
        self.ccb.is_some() && self.address == address
    }

    /// Does it start a CCB for `target`?
    pub(super) fn is_for(&self, target: u8) -> bool {
        self.ccb.is_some_and(|(_, of)| of == target)
    }
}

/// What an incoming mailbox says of its CCB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Completion {
    Success = 1,
    Aborted = 2,
    /// The CCB that was to be aborted is not under way.
    NotFound = 3,
    Error = 4,
}

/// What the guest gets: an incoming mailbox, and what goes into the CCB before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) key: Key,
    pub(super) completion: Completion,
    pub(super) host: HostStatus,
    pub(super) scsi: Status,
    /// Bytes that were not moved, if the CCB has a place for that.
    pub(super) residual: Option<u32>,
}

impl Answer {
    /// The answer to an abort that found nothing.
    pub(super) fn not_found(key: Key) -> Self {
        let (completion, host) = (Completion::NotFound, HostStatus::Success);
        Self { key, completion, host, scsi: Status::Good, residual: None }
    }
}

/// A mailbox or a CCB that is being answered is not RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mailbox or CCB at {0:#x} is not guest RAM")]
pub(super) struct Lost(u64);

/// The mailboxes as the queue's thread uses them.
pub(super) struct Mailboxes {
    common: Arc<Common>,
    setup: Option<Setup>,
    next_outgoing: u8,
    next_incoming: u8,
}

impl Mailboxes {
    /// Mailboxes as the guest has announced them; none before that.
    pub(super) fn new(common: Arc<Common>, setup: Option<Setup>) -> Self {
        Self { common, setup, next_outgoing: 0, next_incoming: 0 }
    }

    fn strict(&self) -> bool {
        self.common.strict_order.load(Ordering::Acquire)
    }

    fn code(&self, setup: &Setup, mailbox: u64) -> Result<u8, Lost> {
        let address = mailbox + setup.format.code_offset();
        // The guest writes the code last: what is read after it is what belongs to it.
        self.common.memory.load(GuestAddress(address), Ordering::Acquire).map_err(|_| Lost(address))
    }

    fn set_code(&self, setup: &Setup, mailbox: u64, code: u8) -> Result<(), Lost> {
        let address = mailbox + setup.format.code_offset();
        self.common.memory.store(code, GuestAddress(address), Ordering::Release).map_err(|_| Lost(address))
    }

    /// Takes what an outgoing mailbox holds and frees it; `None` for a code that asks for nothing.
    fn take(&self, setup: &Setup, mailbox: u64, code: u8) -> Result<Option<Descriptor>, Lost> {
        const START: u8 = 1;
        const ABORT: u8 = 2;
        let mut bytes = [0; 4];
        self.common.memory.read_slice(&mut bytes, GuestAddress(mailbox)).map_err(|_| Lost(mailbox))?;
        let address = match setup.format {
            Format::Bits24 => u32::from_be_bytes(bytes) & 0x00FF_FFFF,
            Format::Bits32 => u32::from_le_bytes(bytes),
        };
        let extended = self.common.extended_units.load(Ordering::Acquire);
        let asked = match code {
            START => match Ccb::read(&self.common.memory, address, setup.format, extended) {
                Ok(ccb) => Some(Asked::Start(ccb)),
                Err(OutsideRam) => Some(Asked::Nowhere),
            },
            ABORT => Some(Asked::Abort),
            _ => None,
        };
        self.set_code(setup, mailbox, 0)?;
        if self.common.outbox_interrupt.load(Ordering::Acquire) {
            self.common.interrupts.outbox_free();
        }
        Ok(asked.map(|asked| Descriptor { address, asked }))
    }

    /// Fills the incoming mailbox at `mailbox`, which is empty.
    fn fill(&self, setup: &Setup, mailbox: u64, answer: &Answer) -> Result<(), Lost> {
        let put = |bytes: &[u8], address: u64| {
            self.common.memory.write_slice(bytes, GuestAddress(address)).map_err(|_| Lost(address))
        };
        let Answer { key, completion, host, scsi, residual } = *answer;
        if let Some((format, _)) = key.ccb {
            let ccb = u64::from(key.address);
            match (residual, format) {
                (None, _) => {}
                (Some(residual), Format::Bits24) => put(&residual.to_be_bytes()[1..], ccb + 0x04)?,
                (Some(residual), Format::Bits32) => put(&residual.to_le_bytes(), ccb + 0x04)?,
            }
            put(&[host as u8, scsi as u8], ccb + 0x0E)?;
        }
        match setup.format {
            Format::Bits24 => put(&key.address.to_be_bytes()[1..], mailbox + 1)?,
            Format::Bits32 => {
                let [a, b, c, d] = key.address.to_le_bytes();
                put(&[a, b, c, d, host as u8, scsi as u8, 0], mailbox)?;
            }
        }
        self.set_code(setup, mailbox, completion as u8)
    }
}

/// The mailbox behind number `number` of `count`.
fn next(number: u8, count: u8) -> u8 {
    if number.saturating_add(1) >= count { 0 } else { number + 1 }
}

impl Setup {
    fn outgoing(&self, number: u8) -> u64 {
        u64::from(self.base) + self.format.size() * u64::from(number)
    }

    fn incoming(&self, number: u8) -> u64 {
        self.outgoing(number) + self.format.size() * u64::from(self.count)
    }
}

impl Rings for Mailboxes {
    type Descriptor = Descriptor;
    type Key = Key;
    type Answer = Answer;
    type Failure = HostStatus;
    type Error = Lost;

    const LOST: HostStatus = HostStatus::Hardware;
    const TARGET_GONE: HostStatus = HostStatus::SelectionTimeout;

    fn key(descriptor: &Descriptor) -> Key {
        let ccb = match descriptor.asked {
            Asked::Start(ccb) => Some((ccb.format, ccb.target)),
            Asked::Nowhere | Asked::Abort => None,
        };
        Key { address: descriptor.address, ccb, abort: matches!(descriptor.asked, Asked::Abort) }
    }

    fn target(key: &Key) -> u8 {
        key.ccb.map_or(u8::MAX, |(_, target)| target)
    }

    fn failed(key: Key, failure: HostStatus) -> Answer {
        if key.abort {
            return Answer::not_found(key);
        }
        let completion = if failure == HostStatus::Aborted { Completion::Aborted } else { Completion::Error };
        Answer { key, completion, host: failure, scsi: Status::Good, residual: None }
    }

    fn pending(&mut self) -> Result<u32, Lost> {
        let Some(setup) = self.setup else { return Ok(0) };
        let (strict, mut number, mut count) = (self.strict(), self.next_outgoing, 0);
        for _ in 0..setup.count {
            match self.code(&setup, setup.outgoing(number))? {
                0 if strict => break,
                0 => {}
                _ => count += 1,
            }
            number = next(number, setup.count);
        }
        Ok(count)
    }

    fn fetch(&mut self) -> Result<Option<Descriptor>, Lost> {
        let Some(setup) = self.setup else { return Ok(None) };
        let strict = self.strict();
        for _ in 0..setup.count {
            let mailbox = setup.outgoing(self.next_outgoing);
            let code = self.code(&setup, mailbox)?;
            if code == 0 && strict {
                break;
            }
            self.next_outgoing = next(self.next_outgoing, setup.count);
            if code != 0
                && let Some(descriptor) = self.take(&setup, mailbox, code)?
            {
                return Ok(Some(descriptor));
            }
        }
        Ok(None)
    }

    fn post(&mut self, answers: &mut VecDeque<Answer>) -> Result<usize, Lost> {
        let Some(setup) = self.setup else {
            answers.clear();
            return Ok(0);
        };
        let mut count = 0;
        while let Some(answer) = answers.front() {
            let mailbox = setup.incoming(self.next_incoming);
            if self.code(&setup, mailbox)? != 0 {
                break;
            }
            self.fill(&setup, mailbox, answer)?;
            self.next_incoming = next(self.next_incoming, setup.count);
            answers.pop_front();
            count += 1;
        }
        Ok(count)
    }
}
