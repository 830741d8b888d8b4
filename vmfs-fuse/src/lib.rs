//! `mount.vmfs`: a VMFS volume as a mount of this machine, by FUSE.
//!
//! ```text
//! kernel ── /dev/fuse ──> workers (fuser threads)            filesystem: one callback a request
//!                           │ names, attributes: a job ────> actor (one thread): the Volume; replies from there
//!                           │ reads and writes: here ──────> data: run map, gate, pread/pwrite on the LUN
//!                           └ ioctls: here or a job ───────> ioctl
//! other programs ── Unix socket ──> control (lockd::server)  descriptors, gate page, administration
//! ```

pub mod command;

mod actor;
mod allocator;
mod attributes;
mod control;
mod daemon;
mod data;
mod disks;
mod extents;
mod filesystem;
mod finder;
mod handles;
mod host;
mod inodes;
mod ioctl;
mod logging;
mod lost_lun;
mod mountpoint;
mod names;
mod opening;
mod options;
mod over;
mod policy;
mod raw_devices;
mod recalls;
mod reports;
mod session;
mod space;
mod state;
