//! Owns the way from the disks of a command line to targets on an adapter.
//! Promises that a disk which cannot be had is refused with its target, its file and, where knowable, who holds it.
//! Must not know how disks are stored, or how an adapter works.

use crate::config::{DiskConfig, HbaKind, PlacedAdapter, PlacedDisk};
use crate::error::{Error, Kind, Result};
use crate::hba::buslogic::BusLogic;
use crate::hba::lsilogic::LsiLogic;
use crate::hba::pvscsi::PvScsi;
use crate::hba::virtio_scsi::VirtioScsi;
use crate::hba::{Adapter, AdapterError, Attachment, InterruptLine, OpenError};
use crate::holders;
use crate::memory::GuestRam;
use crate::supervision::Supervision;
use scsi::{DeviceKind, DiskOptions, ProductName};
use std::sync::Arc;
use storage::{CDROM_BLOCK, DiskSource, ShownDisk, Supervisor};

/// Starts an adapter with its disks; `supervision` hears of disks that this host may not use. `index` is its number.
///
/// # Errors
/// [`Kind::Disk`] for the first disk that cannot be opened; [`Kind::Host`] when the adapter cannot be started.
pub fn start_adapter(
    index: usize,
    adapter: PlacedAdapter,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn InterruptLine>,
    supervision: &Arc<Supervision>,
) -> Result<Adapter> {
    let kind = adapter.hba;
    let disks = adapter
        .disks
        .into_iter()
        .map(|placed| attachment(placed, Arc::clone(supervision) as Arc<dyn Supervisor>, |disk| disk))
        .collect();
    let name = format!("{}{index}", kind.name());
    let started: std::result::Result<Adapter, AdapterError> = match kind {
        HbaKind::Pvscsi => PvScsi::<ShownDisk>::start(&name, ram, interrupt, disks).map(|adapter| adapter as Adapter),
        HbaKind::LsiLogic => {
            LsiLogic::<ShownDisk>::start(&name, ram, interrupt, disks).map(|adapter| adapter as Adapter)
        }
        HbaKind::VirtioScsi => {
            VirtioScsi::<ShownDisk>::start(&name, ram, interrupt, disks).map(|adapter| adapter as Adapter)
        }
        HbaKind::BusLogic => {
            BusLogic::<ShownDisk>::start(&name, ram, interrupt, disks).map(|adapter| adapter as Adapter)
        }
    };
    started.map_err(|cause| refusal(&name, &cause))
}

/// Refuses disks that are given twice: they would be refused as in use by this very machine.
///
/// # Errors
/// [`Kind::Disk`] with the first such disk.
pub fn refuse_doubles(disks: &[DiskConfig]) -> Result<()> {
    let clash = |one: &DiskConfig, other: &DiskConfig| {
        // A URL names no file of this host; two different ones of the same disk are found out by its lock.
        let path = |disk: &DiskConfig| match disk.path.starts_with("nfs:") {
            true => Some(disk.path.clone()),
            false => disk.path.canonicalize().ok(),
        };
        !(one.readonly && other.readonly) && path(one).is_some() && path(one) == path(other)
    };
    for (index, disk) in disks.iter().enumerate() {
        if let Some(first) = disks[..index].iter().position(|other| clash(other, disk)) {
            let object = format!("disk {}", disk.path.display());
            let cause = format!("it is given twice, as disk {} and disk {}", first + 1, index + 1);
            return Err(Error::new(Kind::Disk, object, cause, "Give each disk once, or readonly each time"));
        }
    }
    Ok(())
}

/// A disk on its way to an adapter that `show` may put something in front of.
pub fn attachment<D: 'static>(
    placed: PlacedDisk,
    supervisor: Arc<dyn Supervisor>,
    show: impl FnOnce(ShownDisk) -> D + Send + 'static,
) -> Attachment<D> {
    let PlacedDisk { target, disk, .. } = placed;
    let source = DiskSource { path: disk.path, read_only: disk.readonly, cached: false, serial: disk.serial };
    let mut options = DiskOptions::default();
    let mut block = None;
    if disk.cdrom {
        (options.kind, options.name, block) = (DeviceKind::CdRom, ProductName::virtual_cdrom(), Some(CDROM_BLOCK));
    }
    let open = move || async move {
        let storage = storage::open(source, supervisor).await.map_err(|cause| Box::new(cause) as OpenError)?;
        Ok(show(ShownDisk::new(storage, block, true)))
    };
    Attachment::new(target, options, open)
}

fn refusal(adapter: &str, cause: &AdapterError) -> Error {
    let AdapterError::Open { target, source } = cause else {
        return Error::host(format!("adapter {adapter}"), cause);
    };
    let object = format!("disk of target {target} on {adapter}");
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
