//! Promises checked across crates: cluster, crash, conformance, guests and benchmarks.
//!
//! The tests run the programs as a user does: they make LUN image files, `mkfs.vmfs` and `mount.vmfs` them, and look from
//! outside. They need root, FUSE, KVM and loop devices, and fail when one is missing.

pub mod bench;
pub mod crash;
pub mod faults;
pub mod harness;
pub mod history;
pub mod lockd;
pub mod machines;
pub mod networks;
pub mod nfs;
pub mod program;
pub mod random;
pub mod raw_initiator;
pub mod simulate;
pub mod storm;
pub mod targets;
