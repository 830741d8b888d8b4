//! Owns: one request: its descriptor, its memory, its answer.
//! Promises: bounded work for any descriptor.
//! Must not know: rings, registers, threads.

use scsi::{BlockDevice, Lun, ShortBuffer, Target, TaskAttribute};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::entries::*;
use crate::hba::GuestMemory;
use crate::hba::command::{self, Direction, ScsiCommand, put_sense};
use crate::hba::guest_segments::{GuestSegments, OutsideRam};

/// The most scatter/gather elements of one request, chain elements and empty ones included.
const MAX_ELEMENTS: usize = 4096;

impl Descriptor {
    /// The unit it is for.
    pub(super) fn lun(&self) -> Option<Lun> {
        Lun::from_sam(self.lun)
    }

    fn cdb(&self) -> Option<&[u8]> {
        self.cdb.get(..usize::from(self.cdb_length))
    }
}

/// Carries a request out on its target (`None`: there is none) and returns the answer.
pub(super) async fn carry_out<D: BlockDevice + 'static>(
    descriptor: &Descriptor,
    target: Option<&Target<D>>,
    memory: &GuestMemory,
    segments: &mut GuestSegments,
) -> CompletionEntry {
    let failed = |status| CompletionEntry::failed(descriptor.context, status);
    let Some((target, lun)) = target.zip(descriptor.lun()).filter(|(target, lun)| target.has(*lun)) else {
        return failed(HostStatus::SelectionTimeout);
    };
    let flags = descriptor.flags.get();
    let Some(cdb) = descriptor.cdb().filter(|_| flags & FLAG_OUT_OF_BAND_CDB == 0) else {
        return failed(HostStatus::InvalidParameter);
    };
    segments.clear();
    if map_data(descriptor, memory, segments).is_err() {
        return failed(HostStatus::InvalidParameter);
    }
    let direction = match flags & (FLAG_TO_HOST | FLAG_TO_DEVICE) {
        FLAG_TO_HOST => Direction::In,
        FLAG_TO_DEVICE => Direction::Out,
        // Without a direction, or with both, the CDB decides.
        _ => Direction::Either,
    };
    let command = ScsiCommand {
        lun: Some(lun),
        tag: descriptor.context.get(),
        attribute: TaskAttribute::Simple,
        short_buffer: ShortBuffer::Refuse,
        cdb,
        direction,
    };
    let completion = command::execute(target, &command, segments).await;
    if completion.overrun {
        return failed(HostStatus::DataOverrun);
    }
    let mut entry = CompletionEntry {
        context: descriptor.context,
        data_length: U64::new(completion.transferred),
        sense_length: U32::ZERO,
        host_status: U16::new(HostStatus::Success as u16),
        scsi_status: U16::new(completion.status as u16),
        unused: [0; 8],
    };
    if let Some(sense) = completion.sense {
        let room = descriptor.sense_length.get() as usize;
        match put_sense(memory, descriptor.sense_address.get(), room, &sense) {
            Ok(length) => entry.sense_length = U32::new(length as u32),
            Err(OutsideRam) => return failed(HostStatus::SenseFailed),
        }
    }
    entry
}

/// Maps the request's data. Nothing but guest RAM, and no more elements than [`MAX_ELEMENTS`].
fn map_data(descriptor: &Descriptor, memory: &GuestMemory, segments: &mut GuestSegments) -> Result<(), OutsideRam> {
    let flags = descriptor.flags.get();
    let length = usize::try_from(descriptor.data_length.get()).map_err(|_| OutsideRam)?;
    if length == 0 || flags & FLAG_NO_DATA != 0 {
        return Ok(());
    }
    let mut address = descriptor.data_address.get();
    if flags & FLAG_SCATTER_GATHER == 0 {
        return segments.push(address, length);
    }
    for _ in 0..MAX_ELEMENTS {
        let mut bytes = [0; ELEMENT_SIZE];
        memory.read_slice(&mut bytes, GuestAddress(address)).map_err(|_| OutsideRam)?;
        let element = Element::read_from_bytes(&bytes).expect("an element's size");
        if element.flags.get() & ELEMENT_CHAIN != 0 {
            address = element.address.get();
            continue;
        }
        // What lies beyond the request's length is ignored.
        let part = (element.length.get() as usize).min(length - segments.len());
        segments.push(element.address.get(), part)?;
        if segments.len() == length {
            return Ok(());
        }
        address = address.checked_add(ELEMENT_SIZE as u64).ok_or(OutsideRam)?;
    }
    Err(OutsideRam)
}
