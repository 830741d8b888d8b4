//! Owns the way from the disks of a command line to targets on an adapter.
//! Promises that a disk which cannot be had is refused with its target, its file and, where knowable, who holds it.
//! Must not know how disks are stored, or how an adapter works.

use crate::config::{DiskConfig, PlacedDisk};
use crate::error::{Error, Kind, Result};
use crate::hba::pvscsi::{Attachment, OpenError, PvScsi};
use crate::hba::{Adapter, AdapterError, InterruptLine};
use crate::holders;
use crate::memory::GuestRam;
use crate::supervision::Supervision;
use scsi::DiskOptions;
use std::sync::Arc;
use storage::{DiskSource, Storage, Supervisor};

/// Starts an adapter with `disks` on it; `supervision` hears of disks that this host may not use.
///
/// # Errors
/// [`Kind::Disk`] for the first disk that cannot be opened; [`Kind::Host`] when the adapter cannot be started.
pub fn start_adapter(
    disks: Vec<PlacedDisk>,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn InterruptLine>,
    supervision: &Arc<Supervision>,
) -> Result<Adapter> {
    refuse_doubles(&disks)?;
    let attachments =
        disks.into_iter().map(|placed| attachment(placed, Arc::clone(supervision) as Arc<dyn Supervisor>)).collect();
    let adapter: Arc<PvScsi<Storage>> =
        PvScsi::start("pvscsi0", ram, interrupt, attachments).map_err(|cause| refusal(&cause))?;
    Ok(adapter)
}

/// A disk that is given twice would be refused as in use by this very machine.
fn refuse_doubles(disks: &[PlacedDisk]) -> Result<()> {
    let clash = |one: &DiskConfig, other: &DiskConfig| {
        let path = |disk: &DiskConfig| disk.path.canonicalize().ok();
        !(one.readonly && other.readonly) && path(one).is_some() && path(one) == path(other)
    };
    for (index, placed) in disks.iter().enumerate() {
        if let Some(other) = disks[..index].iter().find(|other| clash(&other.disk, &placed.disk)) {
            let object = format!("disk {}", placed.disk.path.display());
            let cause = format!("it is given twice, for the targets {} and {}", other.target, placed.target);
            return Err(Error::new(Kind::Disk, object, cause, "Give each disk once, or readonly each time"));
        }
    }
    Ok(())
}

fn attachment(placed: PlacedDisk, supervisor: Arc<dyn Supervisor>) -> Attachment<Storage> {
    let PlacedDisk { target, disk } = placed;
    let source = DiskSource { path: disk.path, read_only: disk.readonly, cached: false, serial: disk.serial };
    let open =
        move || async move { storage::open(source, supervisor).await.map_err(|cause| Box::new(cause) as OpenError) };
    Attachment::new(target, DiskOptions::default(), open)
}

fn refusal(cause: &AdapterError) -> Error {
    let AdapterError::Open { target, source } = cause else {
        return Error::host("PVSCSI adapter", cause);
    };
    let object = format!("disk of target {target}");
    let holders = match source.downcast_ref::<storage::OpenError>() {
        Some(storage::OpenError::InUse { path }) => Some(holders::of(path)),
        // A mount shows no locks, only who has the file open. Holders on other hosts are in its own words.
        Some(storage::OpenError::Locked { path, .. }) => Some(holders::openers_of(path)).filter(|all| !all.is_empty()),
        _ => None,
    };
    let Some(holders) = holders else { return Error::complete(Kind::Disk, object, source) };
    let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
    let who = if holders.is_empty() { "by whom cannot be seen here".into() } else { holders.join(", ") };
    Error::complete(Kind::Disk, object, format!("{source} (held: {who})"))
}
