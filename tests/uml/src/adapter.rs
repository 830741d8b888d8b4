//! Owns: the adapter behind the bridge, with disks that may be plugged, pulled and stalled while it runs.
//! Promises: disks are opened and locked as `vmm run` does it.
//! Must not know: how the guest reaches it.

use std::sync::Arc;

use vmm::config::{self, DiskConfig, HbaKind, PlacedDisk};
use vmm::disks;
use vmm::hba::buslogic::BusLogic;
use vmm::hba::lsilogic::LsiLogic;
use vmm::hba::pvscsi::PvScsi;
use vmm::hba::virtio_scsi::VirtioScsi;
use vmm::hba::{Adapter, AdapterError, Attachment, InterruptLine};
use vmm::memory::GuestRam;
use vmm::supervision::Supervision;

use crate::stall::{Stall, StallingDisk};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Why a disk cannot be plugged or pulled.
pub type PlugError = AdapterError;

enum Kind {
    Pvscsi(Arc<PvScsi<StallingDisk>>),
    LsiLogic(Arc<LsiLogic<StallingDisk>>),
    VirtioScsi(Arc<VirtioScsi<StallingDisk>>),
    BusLogic(Arc<BusLogic<StallingDisk>>),
}

/// See the module.
pub struct Pluggable {
    kind: Kind,
    stall: Arc<Stall>,
    supervision: Arc<Supervision>,
}

impl Pluggable {
    /// Starts the adapter that `disks` ask for, with them.
    pub fn start(ram: Arc<GuestRam>, line: Arc<dyn InterruptLine>, disks: &[DiskConfig]) -> Result<Pluggable, Failure> {
        let mut adapters = config::adapters(disks)?;
        let (Some(adapter), true) = (adapters.pop(), adapters.is_empty()) else {
            return Err("the disks are to be on one adapter: give them the same hba, and not too many".into());
        };
        let (stall, supervision) = (Arc::new(Stall::default()), Arc::new(Supervision::default()));
        let attach = |placed| attachment(placed, &stall, &supervision);
        let disks = adapter.disks.into_iter().map(attach).collect();
        let name = adapter.hba.name();
        let kind = match adapter.hba {
            HbaKind::Pvscsi => Kind::Pvscsi(PvScsi::start(name, ram, line, disks)?),
            HbaKind::LsiLogic => Kind::LsiLogic(LsiLogic::start(name, ram, line, disks)?),
            HbaKind::VirtioScsi => Kind::VirtioScsi(VirtioScsi::start(name, ram, line, disks)?),
            HbaKind::BusLogic => Kind::BusLogic(BusLogic::start(name, ram, line, disks)?),
        };
        Ok(Pluggable { kind, stall, supervision })
    }

    /// The adapter as the PCI bus has it.
    pub fn adapter(&self) -> Adapter {
        match &self.kind {
            Kind::Pvscsi(adapter) => adapter.clone(),
            Kind::LsiLogic(adapter) => adapter.clone(),
            Kind::VirtioScsi(adapter) => adapter.clone(),
            Kind::BusLogic(adapter) => adapter.clone(),
        }
    }

    /// Plugs `disk` in as `target`.
    pub fn plug(&self, target: u8, disk: DiskConfig) -> Result<(), PlugError> {
        let placed = PlacedDisk { target, number: 0, disk };
        let disk = attachment(placed, &self.stall, &self.supervision);
        match &self.kind {
            Kind::Pvscsi(adapter) => adapter.attach(disk),
            Kind::LsiLogic(adapter) => adapter.attach(disk),
            Kind::VirtioScsi(adapter) => adapter.attach(disk),
            Kind::BusLogic(adapter) => adapter.attach(disk),
        }
    }

    /// Pulls the disk of `target`.
    pub fn unplug(&self, target: u8) -> Result<(), PlugError> {
        match &self.kind {
            Kind::Pvscsi(adapter) => adapter.detach(target),
            Kind::LsiLogic(adapter) => adapter.detach(target),
            Kind::VirtioScsi(adapter) => adapter.detach(target),
            Kind::BusLogic(adapter) => adapter.detach(target),
        }
    }

    /// Lets all disks stand still, or go on.
    pub fn stall(&self, still: bool) {
        self.stall.set(still);
    }

    /// Ends all requests, flushes and closes the disks.
    pub fn stop(&self) -> Result<(), AdapterError> {
        self.stall(false);
        self.adapter().stop()
    }
}

fn attachment(placed: PlacedDisk, stall: &Arc<Stall>, supervision: &Arc<Supervision>) -> Attachment<StallingDisk> {
    let stall = Arc::clone(stall);
    disks::attachment(placed, supervision.clone(), move |disk| StallingDisk::new(disk, stall))
}
