//! Owns: which commands a reservation lets through (SPC-4, table 69; SBC-3, table 13; SPC-2, table 9).
//! Promises: a command that is not named here conflicts.
//! Must not know: who holds what.

use super::Kind;
use crate::cdb::{Cdb, PersistentOut};

/// Commands that somebody else's RESERVE(6) lets through.
pub(super) fn is_allowed_by_simple(cdb: &Cdb) -> bool {
    matches!(
        cdb,
        Cdb::Inquiry { .. }
            | Cdb::ReportLuns { .. }
            | Cdb::RequestSense { .. }
            | Cdb::Release
            | Cdb::PreventAllowMediumRemoval { prevent: 0 }
    )
}

/// Commands that a persistent reservation of type `kind` lets through for a nexus that neither holds it nor is admitted by it.
pub(super) fn is_allowed(cdb: &Cdb, kind: Kind, registered: bool) -> bool {
    match cdb {
        Cdb::Inquiry { .. }
        | Cdb::ReportLuns { .. }
        | Cdb::RequestSense { .. }
        | Cdb::TestUnitReady
        | Cdb::LogSense { .. }
        | Cdb::PersistentReserveIn { .. }
        | Cdb::ReadCapacity10
        | Cdb::ReadCapacity16 { .. }
        | Cdb::ReportSupportedOperationCodes { .. }
        | Cdb::ReportSupportedTaskManagementFunctions { .. }
        | Cdb::ReportTargetPortGroups { .. }
        | Cdb::ReceiveCopyResults { .. }
        | Cdb::PreventAllowMediumRemoval { prevent: 0 } => true,
        // These judge registration and key themselves.
        Cdb::PersistentReserveOut { action, .. } => match action {
            PersistentOut::Reserve => registered,
            _ => true,
        },
        // These answer with a conflict of their own, since there are registrations.
        Cdb::Reserve | Cdb::Release => true,
        Cdb::StartStopUnit { start: true, load_eject: false, power_condition: 0, .. } => true,
        Cdb::Read { .. }
        | Cdb::Verify { .. }
        | Cdb::Prefetch { .. }
        | Cdb::GetLbaStatus { .. }
        | Cdb::ModeSense(_)
        | Cdb::ReadDefectData { .. }
        | Cdb::ReceiveDiagnostic { .. }
        | Cdb::MultiMedia(_) => kind.admits_readers(),
        _ => false,
    }
}
