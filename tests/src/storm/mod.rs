//! The kill storm: hosts, their VMs and programs are killed and stopped at random while they work; each program notes what it did.
//!
//! ```text
//! conductor ── SIGKILL, SIGSTOP, SIGCONT ──> host: mount.vmfs, a VM, a writer      (host)
//!                                              writer ── notes, outside the volume   (notes, writer)
//!                                                          └──> judge, afterwards    (judge)
//! ```

pub mod host;
pub mod judge;
pub mod notes;
pub mod writer;
