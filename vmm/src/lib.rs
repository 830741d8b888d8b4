//! The virtual machine monitor: KVM, PCI, SCSI HBAs and disks.
//!
//! A [`machine::Machine`] is built from a [`machine::MachineConfig`], started, waited for and stopped; the binary `vmm`
//! adds a command line and signals to that.
#![deny(unsafe_code)]

pub mod board;
pub mod bus;
pub mod cmos;
pub mod config;
pub mod console;
pub mod control;
pub mod disks;
pub mod error;
pub mod firmware;
pub mod fw_cfg;
pub mod hba;
pub mod holders;
pub mod irq;
#[allow(unsafe_code)]
pub mod kvm;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod serial;
pub mod supervision;
pub mod vcpu;
