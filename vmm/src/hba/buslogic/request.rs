//! Owns: one CCB that carries a SCSI command: its memory, its execution, its answer.
//! Promises: bounded work for any CCB; sense data and data go only where the CCB has room for them.
//! Must not know: mailboxes, registers, threads.

use scsi::{BlockDevice, ShortBuffer, Status, Target};

use super::ccb::{Ccb, HostStatus, Operation};
use super::mailboxes::{Answer, Completion, Key, Mailboxes};
use crate::hba::GuestMemory;
use crate::hba::command::{self, ScsiCommand, put_sense};
use crate::hba::guest_segments::{GuestSegments, OutsideRam};
use crate::hba::queue::Rings;

/// Carries a CCB out on its target (`None`: there is none) and returns the answer.
pub(super) async fn carry_out<D: BlockDevice + 'static>(
    ccb: &Ccb,
    key: Key,
    target: Option<&Target<D>>,
    memory: &GuestMemory,
    segments: &mut GuestSegments,
) -> Answer {
    let failed = |status| Mailboxes::failed(key, status);
    let Operation::Command { residual, .. } = ccb.operation else { return failed(HostStatus::InvalidOpcode) };
    let Some(target) = target else { return failed(HostStatus::SelectionTimeout) };
    let (cdb, attribute) = match ccb.cdb().and_then(|cdb| Ok((cdb, ccb.attribute()?))) {
        Ok(both) => both,
        Err(status) => return failed(status),
    };
    segments.clear();
    if let Err(OutsideRam) = ccb.map(memory, segments) {
        return failed(HostStatus::InvalidParameter);
    }
    let command = ScsiCommand {
        lun: Some(ccb.lun()),
        tag: key.address.into(),
        attribute,
        // An overrun is an error to Linux, which leaves it to the adapter to move what there is room for.
        short_buffer: ShortBuffer::Truncate,
        cdb,
        direction: ccb.direction(),
    };
    let completion = command::execute(target, &command, segments).await;
    if completion.aborted {
        return failed(HostStatus::Aborted);
    }
    let mut host = HostStatus::Success;
    if let Some(sense) = completion.sense {
        let (address, room) = ccb.sense();
        if let Err(OutsideRam) = put_sense(memory, address, room, &sense) {
            host = HostStatus::AutosenseFailed;
        }
    }
    let rest = (segments.len() as u64).saturating_sub(completion.transferred);
    Answer {
        key,
        // A short transfer is none: only who asked for the residual hears of it.
        completion: if completion.status == Status::Good { Completion::Success } else { Completion::Error },
        host,
        scsi: completion.status,
        residual: residual.then(|| u32::try_from(rest).unwrap_or(u32::MAX)),
    }
}
