//! Owns the way from a `--disk` to a target on an adapter.
//! Promises that a disk which cannot be had is refused by its name.
//! Must not know how disks are stored.

use crate::config::PlacedDisk;
use crate::error::{Error, Kind, Result};
use crate::hba::{Adapter, InterruptLine};
use crate::memory::GuestRam;
use std::sync::Arc;

/// Starts an adapter with `disks` on it.
///
/// # Errors
/// [`Kind::Unsupported`]: no storage back end is there yet.
pub fn start_adapter(disks: Vec<PlacedDisk>, _ram: Arc<GuestRam>, _line: Arc<dyn InterruptLine>) -> Result<Adapter> {
    let names: Vec<String> = disks.iter().map(|placed| placed.disk.path.display().to_string()).collect();
    let cause = "no storage back end is built in yet";
    Err(Error::new(Kind::Unsupported, format!("disk {}", names.join(", ")), cause, "Run without --disk"))
}
