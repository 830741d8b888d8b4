//! Owns: asymmetric access of target port groups (SPC-4, 5.15), set by the server's operator only.
//! Promises: a port that is not active lets only commands through that do not touch the medium.
//! Must not know: transports, units.

use super::Target;
use crate::attention::UnitAttention;
use crate::block_device::BlockDevice;
use crate::cdb::Cdb;
use crate::sense::{Failure, Sense};
use crate::task::NexusId;
use crate::transport_id::AccessState;

impl<D: BlockDevice + 'static> Target<D> {
    /// Changes the state of a target port group; every nexus is told.
    pub fn set_access_state(&self, group: u16, state: AccessState) {
        let mut access = self.access.borrow_mut();
        access.retain(|(known, _)| *known != group);
        if state != AccessState::ActiveOptimized {
            access.push((group, state));
        }
        drop(access);
        self.post_everywhere(UnitAttention::AccessStateChanged);
    }

    fn access_state(&self, group: u16) -> AccessState {
        let access = self.access.borrow();
        access.iter().find(|(known, _)| *known == group).map_or(AccessState::ActiveOptimized, |(_, state)| *state)
    }

    /// Does the nexus' port let `cdb` through? (SPC-4, 5.15.2.4 and .5)
    pub(super) fn check_access(&self, nexus: NexusId, cdb: &Cdb) -> Result<(), Failure> {
        if self.access.borrow().is_empty() {
            return Ok(());
        }
        let port = self.port_of(nexus);
        let group = self.ports.borrow().iter().find(|one| one.relative_id == port).map_or(1, |one| one.group);
        let sense = match self.access_state(group) {
            AccessState::ActiveOptimized | AccessState::ActiveNonOptimized => return Ok(()),
            AccessState::Standby => Sense::PORT_STANDBY,
            AccessState::Unavailable => Sense::PORT_UNAVAILABLE,
        };
        let harmless = matches!(
            cdb,
            Cdb::Inquiry { .. }
                | Cdb::LogSense { .. }
                | Cdb::ModeSense(_)
                | Cdb::ModeSelect(_)
                | Cdb::ReportTargetPortGroups { .. }
                | Cdb::ReportSupportedOperationCodes { .. }
                | Cdb::ReportSupportedTaskManagementFunctions { .. }
                | Cdb::PersistentReserveIn { .. }
                | Cdb::PersistentReserveOut { .. }
        );
        if harmless { Ok(()) } else { Err(sense.into()) }
    }

    /// REPORT TARGET PORT GROUPS (SPC-4, 6.37): every group with its ports.
    pub(super) fn port_groups(&self, extended: bool) -> Vec<u8> {
        let ports = self.ports.borrow();
        let mut groups: Vec<u16> = ports.iter().map(|port| port.group).collect();
        groups.sort_unstable();
        groups.dedup();
        // The extended header: length format 1, no implicit transition time.
        let mut answer = if extended { vec![0, 0, 0, 0, 0x10, 0, 0, 0] } else { vec![0; 4] };
        for group in groups {
            let members = ports.iter().filter(|port| port.group == group);
            let [high, low] = group.to_be_bytes();
            // Active optimized, active non-optimized, standby and unavailable are supported.
            let state = self.access_state(group) as u8;
            answer.extend_from_slice(&[state, 0x0F, high, low, 0, 2, 0, members.clone().count() as u8]);
            for port in members {
                let [high, low] = port.relative_id.to_be_bytes();
                answer.extend_from_slice(&[0, 0, high, low]);
            }
        }
        let length = (answer.len() - 4) as u32;
        answer[..4].copy_from_slice(&length.to_be_bytes());
        answer
    }
}
