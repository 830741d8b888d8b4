//! Owns: what disks tell the machine about their host's right to use them.
//! Promises: a contract only.
//! Must not know: machines, vCPUs, locks.

use std::path::Path;

/// Whoever runs the guest of some disks. Called on the disks' threads; no call may block.
pub trait Supervisor: Send + Sync {
    /// This host cannot vouch for the lock of `disk` at the moment. Its requests are held, and the guest must stand still.
    /// One [`Supervisor::thaw`] of the same disk follows.
    fn freeze(&self, disk: &Path);

    /// The lock was ours all the time: held requests go on, nothing was lost.
    fn thaw(&self, disk: &Path);

    /// The disk is gone for this guest, for good: `cause` says why. The guest must not run on.
    fn lost(&self, disk: &Path, cause: &str);

    /// The guest will never run again: requests that are held fail instead of waiting.
    fn is_ending(&self) -> bool;
}
