//! Owns: the interrupt status and mask registers and the way from them to the guest.
//! Promises: INTx is always the level of status and mask; each batch sends a message of its own, whether or not the guest
//! has cleared the status.
//! Must not know: what is posted, how interrupts reach a vCPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::hba::InterruptLine;

/// INTR_STATUS: the completion ring has new entries.
pub(super) const COMPLETION: u32 = 0x1;
/// INTR_STATUS: the message ring has new entries.
pub(super) const MESSAGE: u32 = 0x4;
/// The bits that exist: two for each ring.
const ALL: u32 = 0xF;

/// See the module.
pub(super) struct Interrupts {
    status: AtomicU32,
    mask: AtomicU32,
    line: Arc<dyn InterruptLine>,
    /// Orders changes of the level, so that the last one tells the truth.
    level: Mutex<()>,
}

impl Interrupts {
    pub(super) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { status: AtomicU32::new(0), mask: AtomicU32::new(0), line, level: Mutex::new(()) }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn mask(&self) -> u32 {
        self.mask.load(Ordering::Acquire)
    }

    /// Something was posted. Linux's message handler never reads or clears the status, FreeBSD's wants it set: set it and
    /// send a message each time.
    pub(super) fn post(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        if !self.line.msi_enabled() {
            self.update_level();
        } else if self.mask() & bits != 0 {
            self.line.raise_msi();
        }
    }

    /// The guest writes ones to clear.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
        self.update_level();
    }

    /// The guest writes the mask: 1 lets a status bit through.
    pub(super) fn set_mask(&self, mask: u32) {
        let mask = mask & ALL;
        let before = self.mask.swap(mask, Ordering::AcqRel);
        if self.line.msi_enabled() && self.status() & mask & !before != 0 {
            self.line.raise_msi();
        }
        self.update_level();
    }

    /// As after power on.
    pub(super) fn reset(&self) {
        self.mask.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
        self.update_level();
    }

    fn update_level(&self) {
        let _ordered = self.level.lock();
        self.line.set_level(!self.line.msi_enabled() && self.status() & self.mask() != 0);
    }
}
