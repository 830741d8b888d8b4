//! The virtual machine monitor: KVM, PCI, SCSI HBAs and disks.
#![forbid(unsafe_code)]
