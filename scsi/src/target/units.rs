//! Owns: which units and nexuses a target has.
//! Promises: every nexus is told when units come or go; a unit that is taken away has no command left.
//! Must not know: commands.

use std::rc::Rc;

use super::{LogicalUnit, Nexus, Target};
use crate::attention::UnitAttention;
use crate::block_device::BlockDevice;
use crate::disk::Disk;
use crate::reservation::{Port, ReservationStore, ReservationView, RestoreError};
use crate::task::{Lun, NexusId};
use crate::task_set::{Abortion, Selection};
use crate::transport_id::{TargetPort, TransportId};

impl<D: BlockDevice + 'static> Target<D> {
    /// A target without units, with one port.
    pub fn new() -> Self {
        Self::default()
    }

    /// The target's ports; at least one. Replaces what was there.
    pub fn set_ports(&self, ports: Vec<TargetPort>) {
        self.ports.replace(ports);
    }

    /// The SCSI name string of the target device (for iSCSI its name).
    pub fn set_device_name(&self, name: Option<String>) {
        self.device_name.replace(name);
    }

    /// Adds a disk; a disk that was at `lun` is given back, and the commands that it has are its own affair.
    ///
    /// # Panics
    /// When `lun` is beyond 16383: there is no room for it in the flat form.
    pub fn insert(&self, lun: Lun, disk: Disk<D>) -> Option<Rc<Disk<D>>> {
        assert!(lun.0 < 0x4000, "LUN {} is too large", lun.0);
        let unit = Rc::new(LogicalUnit::new(lun, disk));
        for nexus in self.nexuses.borrow().iter() {
            self.introduce(&unit, nexus);
        }
        let mut units = self.units.borrow_mut();
        let old = match units.binary_search_by_key(&lun, |unit| unit.lun) {
            Ok(index) => Some(std::mem::replace(&mut units[index], unit).disk.clone()),
            Err(index) => {
                units.insert(index, unit);
                None
            }
        };
        drop(units);
        self.post_everywhere(UnitAttention::LunsChanged);
        old
    }

    /// Takes a disk away: its commands are aborted and waited for.
    pub async fn remove(&self, lun: Lun) -> Option<Rc<Disk<D>>> {
        let unit = self.find(lun)?;
        self.units.borrow_mut().retain(|other| other.lun != lun);
        unit.tasks.abort(Selection::All, None, |_| Abortion::Silent);
        unit.tasks.drained(Selection::All).await;
        self.post_everywhere(UnitAttention::LunsChanged);
        Some(unit.disk.clone())
    }

    /// Lets the persistent reservations of a unit survive a restart: `saved` is what `store` has from the last time. Call it
    /// before sessions start. Nothing happens for a LUN that is not there.
    ///
    /// # Errors
    /// The record is none, or damaged: the unit then has no reservations, and must not go into service.
    pub fn keep_reservations(
        &self,
        lun: Lun,
        store: Rc<dyn ReservationStore>,
        saved: Option<&[u8]>,
    ) -> Result<(), RestoreError> {
        self.find(lun).map_or(Ok(()), |unit| unit.reservations.restore(store, saved))
    }

    /// The disks in the order of their LUNs.
    pub fn disks(&self) -> Vec<(Lun, Rc<Disk<D>>)> {
        self.units.borrow().iter().map(|unit| (unit.lun, unit.disk.clone())).collect()
    }

    /// Is there a unit at `lun`?
    pub fn has(&self, lun: Lun) -> bool {
        self.find(lun).is_some()
    }

    /// Is APTPL in force for the unit at `lun`?
    pub fn reservations_persist(&self, lun: Lun) -> bool {
        self.find(lun).is_some_and(|unit| unit.reservations.persists())
    }

    /// The persistent reservations of the unit at `lun`.
    pub fn reservations(&self, lun: Lun) -> Option<ReservationView> {
        self.find(lun).map(|unit| unit.reservations.view())
    }

    /// A new I_T nexus through the target port `port` (relative identifier): its first command to each unit reports that power
    /// is on.
    pub fn attach(&self, nexus: NexusId, initiator: TransportId, port: u16) {
        let nexus = Nexus { id: nexus, initiator, port };
        self.units.borrow().iter().for_each(|unit| self.introduce(unit, &nexus));
        let mut nexuses = self.nexuses.borrow_mut();
        nexuses.retain(|known| known.id != nexus.id);
        nexuses.push(nexus);
    }

    fn introduce(&self, unit: &LogicalUnit<D>, nexus: &Nexus) {
        unit.attentions.attach(nexus.id);
        unit.reservations.attach(nexus.id, Port { initiator: nexus.initiator.clone(), target_port: nexus.port });
    }

    /// The nexus is gone. The transport has ended its commands before; [`Target::nexus_loss`] ends them.
    pub fn detach(&self, nexus: NexusId) {
        for unit in self.units.borrow().iter() {
            unit.attentions.detach(nexus);
            unit.reservations.detach(nexus);
            unit.disk.forget_prevent(nexus);
            unit.copies.borrow_mut().retain(|copy| copy.nexus != nexus);
        }
        self.nexuses.borrow_mut().retain(|known| known.id != nexus);
    }

    /// Tells every nexus of a unit that something about it has changed.
    pub fn notify(&self, lun: Lun, attention: UnitAttention) {
        if let Some(unit) = self.find(lun) {
            unit.attentions.post(attention, None);
        }
    }

    pub(super) fn post_everywhere(&self, attention: UnitAttention) {
        self.units.borrow().iter().for_each(|unit| unit.attentions.post(attention, None));
    }

    pub(super) fn find(&self, lun: Lun) -> Option<Rc<LogicalUnit<D>>> {
        let units = self.units.borrow();
        let index = units.binary_search_by_key(&lun, |unit| unit.lun).ok()?;
        Some(units[index].clone())
    }

    /// The target port of a nexus; the first one if it is not known.
    pub(super) fn port_of(&self, nexus: NexusId) -> u16 {
        let nexuses = self.nexuses.borrow();
        nexuses.iter().find(|known| known.id == nexus).map_or(1, |known| known.port)
    }
}
