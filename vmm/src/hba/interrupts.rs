//! Owns: an adapter's interrupt status and enable bits and the way from them to the guest.
//! Promises: INTx is always the level of status and enabled bits; each batch sends a message of its own, whether or not the
//! guest has cleared the status.
//! Must not know: what is posted, how interrupts reach a vCPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::hba::InterruptLine;

/// See the module.
pub(crate) struct Interrupts {
    status: AtomicU32,
    enabled: AtomicU32,
    line: Arc<dyn InterruptLine>,
    /// Orders changes of the level, so that the last one tells the truth.
    level: Mutex<()>,
}

impl Interrupts {
    /// Nothing is pending, nothing enabled.
    pub(crate) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { status: AtomicU32::new(0), enabled: AtomicU32::new(0), line, level: Mutex::new(()) }
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn enabled(&self) -> u32 {
        self.enabled.load(Ordering::Acquire)
    }

    /// Something was posted: sets the bits, and sends a message each time.
    pub(crate) fn post(&self, bits: u32) {
        self.post_by(bits, std::iter::once(0));
    }

    /// As [`Self::post`], by these messages.
    pub(crate) fn post_by(&self, bits: u32, vectors: impl Iterator<Item = u16>) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        if !self.line.uses_messages() {
            self.update_level();
        } else if self.enabled() & bits != 0 {
            vectors.for_each(|vector| self.line.raise_message(vector));
        }
    }

    /// Takes the bits back.
    pub(crate) fn clear(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
        self.update_level();
    }

    /// Takes all bits back and returns those that were set.
    pub(crate) fn take(&self) -> u32 {
        let status = self.status.swap(0, Ordering::AcqRel);
        self.update_level();
        status
    }

    /// Lets exactly these bits of the status through to the guest.
    pub(crate) fn enable(&self, bits: u32) {
        let before = self.enabled.swap(bits, Ordering::AcqRel);
        if self.line.uses_messages() && self.status() & bits & !before != 0 {
            self.line.raise_message(0);
        }
        self.update_level();
    }

    /// As after power on.
    pub(crate) fn reset(&self) {
        self.enabled.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
        self.update_level();
    }

    fn update_level(&self) {
        let _ordered = self.level.lock();
        self.line.set_level(!self.line.uses_messages() && self.status() & self.enabled() != 0);
    }
}
