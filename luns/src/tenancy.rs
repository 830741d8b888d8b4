//! Owns: what tells the processes of a machine apart that are one initiator port to a unit.
//! Promises: nobody registers that port anew while a process of another incarnation may still send through it.
//! Must not know: how they tell each other.

use std::io;
use std::os::fd::OwnedFd;

/// The processes that share an initiator port.
pub trait Tenancy: Send + Sync {
    /// Says that this process uses the unit under `key`, alone or beside others of the same key. False: a process is there that does so
    /// under another key.
    fn take(&self, key: u64) -> io::Result<bool>;
    /// Whether no other process uses the unit under `key`; none can begin then until this one has released it.
    fn alone(&self, key: u64) -> io::Result<bool>;
    /// A descriptor of the unit for another process, which uses it under `key` as long as it is open or has anything in flight; 0: without
    /// saying so.
    fn another(&self, key: u64) -> io::Result<OwnedFd>;
    /// This process does not use the unit any more.
    fn release(&self);
}
