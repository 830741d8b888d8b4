//! The virtual machine monitor: KVM, PCI, SCSI HBAs and disks.
#![deny(unsafe_code)]

pub mod hba;
