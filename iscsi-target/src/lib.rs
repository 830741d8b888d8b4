//! The iSCSI target: disks of this machine as LUNs for others (RFC 7143).
//!
//! The protocol itself is the `iscsi` crate's. A [`connection`] reads PDUs and hands commands to the `scsi` crate's device server, over
//! disks of the `storage` crate, with the data in [`memory`] that all sessions share. All of it runs on one thread.
#![deny(unsafe_code)]

pub mod command;
pub mod config;
pub mod connection;
pub mod journal;
pub mod memory;
pub mod reload;
pub mod reservations;
pub mod server;
pub mod status;
