//! The file system: on-disk format, compare-and-write, leases, allocation and objects.
//!
//! A volume is one or more LUNs that many hosts open at once, with no network between the hosts. Metadata is changed in one
//! way only, by compare-and-write of one cell; `docs/DESIGN.md` says why that is enough, `docs/FORMAT.md` has every bit.
//!
//! This crate knows no FUSE, SCSI command, KVM, socket, environment or wall clock: a clock and a source of randomness are
//! handed in. Nothing in it spawns or sleeps by itself.

pub mod alloc;
pub mod breaker;
pub mod breaking;
pub mod buf;
pub mod cas;
pub mod check;
mod complaints;
pub mod container;
pub mod context;
pub mod directory;
pub mod disk;
pub mod env;
pub mod error;
pub mod file;
pub mod format;
pub mod gate;
pub mod keeper;
pub mod lease;
pub mod lun;
pub mod mapping;
pub mod mkfs;
pub mod object;
pub mod rdm;
pub mod real_env;
pub mod recover;
pub mod repair;
pub mod resignature;
pub mod sabotage;
#[cfg(feature = "sim")]
pub mod sim;
pub mod slot;
pub mod units;
pub mod volume;
pub mod window;
