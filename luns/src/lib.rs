//! What an administrator names as a LUN: image files and block devices (the file system's own), and SCSI logical units.
//!
//! [`open_lun`] turns a path or URL into a LUN of the file system; every program opens its LUNs here. A SCSI unit is a [`ScsiLun`] over
//! [`scsi::ScsiPath`]s: compare-and-write is COMPARE AND WRITE, and a persistent reservation keeps out hosts that have lost their lease.
#![deny(unsafe_code)]

mod answer;
mod commands;
mod device;
mod facts;
mod iscsi_path;
mod open;
mod probe;
mod reservations;
mod scsi_lun;
mod session;
mod sg;
mod sg_sys;
mod tenancy;
#[cfg(test)]
mod tests;

pub use device::{Device, Facts, Failure, Leave};
pub use facts::{Caching, Capacity, Inquiry, Limits, Provisioning, ReservationCapabilities};
pub use open::{OpenLun, open_lun, open_lun_aside};
pub use probe::{Probe, Supported, Trial, probe};
pub use scsi_lun::ScsiLun;
pub use session::{Session, Transfer};
pub use sg::SgPath;
pub use tenancy::Tenancy;
