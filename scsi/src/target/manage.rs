//! Owns: task management (SAM-5, 7) and the loss of a nexus.
//! Promises: the answer comes when no command that it ends can touch its buffers any more.
//! Must not know: how transports carry these functions.

use std::rc::Rc;

use super::{LogicalUnit, Target};
use crate::attention::UnitAttention;
use crate::block_device::BlockDevice;
use crate::task::{Lun, NexusId, TaskManagement, TaskManagementResponse};
use crate::task_set::{Abortion, Selection};

impl<D: BlockDevice + 'static> Target<D> {
    /// Carries out a task management function of `nexus`. The `run` futures of the commands that it ends must be polled on
    /// meanwhile.
    pub async fn manage(&self, nexus: NexusId, function: TaskManagement) -> TaskManagementResponse {
        let unit_of = |lun: Option<Lun>| lun.and_then(|lun| self.find(lun));
        let (lun, selection) = match function {
            TaskManagement::TargetReset => {
                let units: Vec<_> = self.units.borrow().clone();
                for unit in &units {
                    unit.tasks.abort(Selection::All, None, self.abortion(unit, Some(nexus)));
                }
                for unit in &units {
                    unit.tasks.drained(Selection::All).await;
                }
                self.reset(UnitAttention::DeviceReset);
                return TaskManagementResponse::Complete;
            }
            TaskManagement::AbortTask { lun, tag } | TaskManagement::QueryTask { lun, tag } => {
                (lun, Selection::Tag(nexus, tag))
            }
            TaskManagement::AbortTaskSet { lun }
            | TaskManagement::QueryTaskSet { lun }
            | TaskManagement::ClearAca { lun } => (lun, Selection::Nexus(nexus)),
            TaskManagement::ClearTaskSet { lun } | TaskManagement::LogicalUnitReset { lun } => (lun, Selection::All),
        };
        let Some(unit) = unit_of(lun) else { return TaskManagementResponse::IncorrectLun };
        match function {
            TaskManagement::QueryTask { .. } | TaskManagement::QueryTaskSet { .. } => {
                return match unit.tasks.has(selection) {
                    true => TaskManagementResponse::Succeeded,
                    false => TaskManagementResponse::Complete,
                };
            }
            TaskManagement::AbortTask { .. } if !unit.tasks.has(selection) => {
                return TaskManagementResponse::TaskDoesNotExist;
            }
            TaskManagement::ClearAca { .. } => return TaskManagementResponse::Complete,
            _ => {}
        }
        let losers = unit.tasks.abort(selection, None, self.abortion(&unit, Some(nexus)));
        unit.tasks.drained(selection).await;
        match function {
            TaskManagement::LogicalUnitReset { .. } => reset(&unit, UnitAttention::DeviceReset),
            TaskManagement::ClearTaskSet { .. } => {
                for other in losers.into_iter().filter(|&other| other != nexus && !unit.disk.reports_aborted_tasks()) {
                    unit.attentions.post_to(UnitAttention::CommandsCleared, other);
                }
            }
            _ => {}
        }
        TaskManagementResponse::Complete
    }

    /// The nexus is lost: ends its commands, waits for them, and forgets everything but its registrations.
    pub async fn nexus_loss(&self, nexus: NexusId) {
        let units: Vec<_> = self.units.borrow().clone();
        for unit in &units {
            unit.tasks.abort(Selection::Nexus(nexus), None, |_| Abortion::Silent);
        }
        for unit in &units {
            unit.tasks.drained(Selection::Nexus(nexus)).await;
        }
        self.detach(nexus);
    }

    /// Resets all units. The transport has ended its commands before; [`Target::manage`] ends them.
    pub fn reset(&self, attention: UnitAttention) {
        self.units.borrow().iter().for_each(|unit| reset(unit, attention));
    }

    /// Resets one unit, if it is there. The transport has ended its commands before; [`Target::manage`] ends them.
    pub fn reset_unit(&self, lun: Lun) {
        if let Some(unit) = self.find(lun) {
            reset(&unit, UnitAttention::DeviceReset);
        }
    }

    /// Works in the background for ever: a transport that wants commands with IMMED answered at once spawns this once.
    pub async fn background(self: Rc<Self>) {
        self.background.serve().await;
    }

    /// How commands end that `by` aborts (SAM-5, 5.3.1: with the control mode page's TAS, others are sent a status).
    pub(super) fn abortion(&self, unit: &LogicalUnit<D>, by: Option<NexusId>) -> impl Fn(NexusId) -> Abortion {
        let with_status = unit.disk.reports_aborted_tasks();
        move |nexus| if with_status && Some(nexus) != by { Abortion::WithStatus } else { Abortion::Silent }
    }
}

fn reset<D: BlockDevice>(unit: &LogicalUnit<D>, attention: UnitAttention) {
    unit.disk.reset();
    unit.reservations.reset();
    unit.attentions.post(attention, None);
}
