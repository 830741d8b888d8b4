//! The iSCSI target: disks of this machine as LUNs for others (RFC 7143).
//!
//! The protocol is apart from input and output: [`pdu`] has the bytes, [`text`] and [`login`] the negotiation. A [`connection`]
//! reads PDUs and hands commands to the `scsi` crate's device server, over disks of the `storage` crate. All of it runs on one thread.
#![forbid(unsafe_code)]

pub mod command;
pub mod config;
pub mod connection;
pub mod disk;
pub mod login;
pub mod pdu;
pub mod reservations;
pub mod server;
pub mod text;
