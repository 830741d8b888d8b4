//! Owns: one SCSI command of any adapter on its way to a target and back.
//! Promises: data is moved in guest memory as it is mapped, without a copy; sense data goes only where it has room.
//! Must not know: how adapters describe commands and answers.

use scsi::{BlockDevice, Command, Completion, Lun, SenseData, ShortBuffer, Target, TaskAttribute};
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;
use super::guest_segments::{GuestSegments, OutsideRam};
use super::queue::NEXUS;

/// Which way the data of a command may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Nowhere.
    None,
    /// To the guest.
    In,
    /// From the guest.
    Out,
    /// As the CDB says.
    Either,
}

/// A command whose data are mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScsiCommand<'a> {
    pub(crate) lun: Option<Lun>,
    pub(crate) tag: u64,
    pub(crate) attribute: TaskAttribute,
    pub(crate) short_buffer: ShortBuffer,
    pub(crate) cdb: &'a [u8],
    pub(crate) direction: Direction,
}

/// Carries out `command` on `target` with the memory that `segments` lists.
pub(crate) async fn execute<D: BlockDevice + 'static>(
    target: &Target<D>,
    command: &ScsiCommand<'_>,
    segments: &GuestSegments,
) -> Completion {
    let data = segments.buffer();
    let data_in = if matches!(command.direction, Direction::In | Direction::Either) { &data } else { segments.none() };
    let data_out =
        if matches!(command.direction, Direction::Out | Direction::Either) { &data } else { segments.none() };
    let command = Command {
        nexus: NEXUS,
        lun: command.lun,
        tag: command.tag,
        attribute: command.attribute,
        short_buffer: command.short_buffer,
        cdb: command.cdb,
        data_out,
        data_in,
    };
    target.execute(&command).await
}

/// Puts sense data into the guest's buffer of `room` bytes at `address`; returns how many there were put.
pub(crate) fn put_sense(
    memory: &GuestMemory,
    address: u64,
    room: usize,
    sense: &SenseData,
) -> Result<usize, OutsideRam> {
    let sense = sense.as_bytes();
    let sense = &sense[..sense.len().min(room)];
    if !sense.is_empty() {
        memory.write_slice(sense, GuestAddress(address)).map_err(|_| OutsideRam)?;
    }
    Ok(sense.len())
}
