//! Owns: what an observer of a simulated LUN is told.
//! Promises: every command that takes effect is told, at its instant, in the order in which they take effect.
//! Must not know: what the observer makes of it.

use super::executor::HostNo;

/// A command at the instant of its effect.
#[derive(Clone, Copy, Debug)]
pub enum Seen<'a> {
    /// Bytes were read.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
        /// On the data path.
        data: bool,
    },
    /// Bytes were written.
    Write {
        /// Byte offset.
        offset: u64,
        /// What.
        bytes: &'a [u8],
        /// On the data path: not durable before the next flush.
        data: bool,
    },
    /// A compare-and-write.
    CompareAndWrite {
        /// Byte offset.
        offset: u64,
        /// The new image.
        new: &'a [u8],
        /// Whether the bytes were as expected.
        wrote: bool,
    },
    /// A range was given back or made zero.
    Clear {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// What was written before is durable.
    Flush,
}

/// Observes a [`super::MemoryDisk`]. Called while the disk is busy: it must not use the disk.
pub trait Watcher: Send {
    /// A command of `host` takes effect now.
    fn seen(&mut self, host: HostNo, seen: Seen<'_>);
}
