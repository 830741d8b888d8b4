//! Owns: one SCSI I/O request: its command, its memory, its reply.
//! Promises: bounded work for any frame; a context reply only for full success.
//! Must not know: FIFOs, registers, threads.

use scsi::{BlockDevice, ShortBuffer, Status, Target, TaskAttribute};

use super::config_pages::TARGETS;
use super::messages::{Frame, IocStatus, Reply};
use super::queues::{Descriptor, Key, LsiRings, scsi_reply, scsi_state};
use super::scatter_gather;
use crate::hba::GuestMemory;
use crate::hba::command::{self, Direction, ScsiCommand, put_sense};
use crate::hba::guest_segments::GuestSegments;
use crate::hba::queue::{OWN_TARGET, Rings};

/// Offsets in a SCSI I/O request.
mod field {
    pub(super) const CHAIN_OFFSET: usize = 0x02;
    pub(super) const CONTROL: usize = 0x14;
    pub(super) const CDB: usize = 0x18;
    pub(super) const DATA_LENGTH: usize = 0x28;
    pub(super) const SENSE_LOW: usize = 0x2C;
    pub(super) const LIST: usize = 0x30;
}

/// MsgFlags: the sense buffer's address has 64 bits.
const SENSE_64_BIT: u8 = 0x01;

/// The command of a frame, or why it makes no sense.
fn command_of<'a>(frame: &'a Frame, key: &Key) -> Result<ScsiCommand<'a>, IocStatus> {
    let control = frame.word(field::CONTROL);
    let direction = match control >> 24 & 3 {
        0 => Direction::None,
        1 => Direction::Out,
        2 => Direction::In,
        _ => return Err(IocStatus::InvalidField),
    };
    let attribute = match control >> 8 & 7 {
        0 | 5 => TaskAttribute::Simple,
        1 => TaskAttribute::HeadOfQueue,
        2 => TaskAttribute::Ordered,
        4 => TaskAttribute::Aca,
        _ => return Err(IocStatus::InvalidField),
    };
    let cdb = field::CDB..field::CDB + usize::from(key.cdb_length);
    if key.cdb_length > 16 {
        return Err(IocStatus::InvalidField);
    }
    Ok(ScsiCommand {
        lun: key.lun,
        tag: key.context.into(),
        attribute,
        short_buffer: ShortBuffer::Truncate,
        cdb: &frame.0[cdb],
        direction,
    })
}

/// Carries a request out on its target (`None`: there is none) and returns the reply.
pub(super) async fn carry_out<D: BlockDevice + 'static>(
    descriptor: &Descriptor,
    target: Option<&Target<D>>,
    memory: &GuestMemory,
    segments: &mut GuestSegments,
) -> Reply {
    let frame = &descriptor.frame;
    let key = Key::of(frame);
    let failed = |status| LsiRings::failed(key, status);
    if key.bus != 0 {
        return failed(IocStatus::InvalidBus);
    }
    if key.target >= TARGETS {
        return failed(IocStatus::InvalidTarget);
    }
    let Some(target) = target.filter(|_| key.target != OWN_TARGET) else { return failed(IocStatus::DeviceNotThere) };
    let command = match command_of(frame, &key) {
        Ok(command) => command,
        Err(status) => return failed(status),
    };
    segments.clear();
    let wanted = if command.direction == Direction::None { 0 } else { frame.word(field::DATA_LENGTH) as usize };
    let chain = 4 * usize::from(frame.byte(field::CHAIN_OFFSET));
    let mapped = scatter_gather::map(frame, field::LIST, chain, wanted, memory, segments);
    if mapped.is_err() || segments.len() < wanted {
        return failed(IocStatus::InvalidScatterGather);
    }
    let completion = command::execute(target, &command, segments).await;
    if completion.aborted {
        return failed(IocStatus::TaskTerminated);
    }
    let full = completion.transferred == wanted as u64;
    let status = match full {
        _ if completion.overflow > 0 => IocStatus::DataOverrun,
        true => IocStatus::Success,
        false => IocStatus::DataUnderrun,
    };
    let quiet = status == IocStatus::Success && completion.status == Status::Good;
    if quiet && key.context >> 31 == 0 {
        return Reply::Context(key.context);
    }
    let mut sense_count = 0;
    let state = match completion.sense {
        None => 0,
        Some(sense) => {
            let high = if key.flags & SENSE_64_BIT != 0 { descriptor.sense_high } else { 0 };
            let address = u64::from(high) << 32 | u64::from(frame.word(field::SENSE_LOW));
            match put_sense(memory, address, key.sense_length.into(), &sense) {
                Ok(count) => {
                    sense_count = count as u32;
                    scsi_state::AUTOSENSE_VALID
                }
                Err(_) => scsi_state::AUTOSENSE_FAILED,
            }
        }
    };
    let mut reply = scsi_reply(&key, status, state);
    reply
        .set_byte(0x0C, completion.status as u8)
        .set_word(0x14, completion.transferred as u32)
        .set_word(0x18, sense_count);
    Reply::Message(reply)
}
