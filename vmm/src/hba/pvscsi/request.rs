//! Owns: one request: its descriptor, its memory, its answer.
//! Promises: a request is answered exactly once; dropping one answers with an error. Bounded work for any descriptor.
//! Must not know: rings, registers, threads.

use std::cell::RefCell;

use scsi::{BlockDevice, Command, Lun, NexusId, ShortBuffer, Target, TaskAttribute};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::entries::*;
use super::state::State;
use crate::hba::GuestMemory;
use crate::hba::guest_segments::{GuestSegments, OutsideRam};

/// The one initiator of this bus.
pub(super) const NEXUS: NexusId = NexusId(0);

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

/// A request that somebody works on.
pub(super) struct Request<'a> {
    state: &'a RefCell<State>,
    slot: usize,
    pub(super) descriptor: Descriptor,
    answered: bool,
}

impl<'a> Request<'a> {
    /// A request that now occupies `slot`.
    pub(super) fn new(state: &'a RefCell<State>, slot: usize, descriptor: Descriptor) -> Self {
        Self { state, slot, descriptor, answered: false }
    }

    /// Answers it. The guest's memory is not touched for it any more.
    pub(super) fn answer(mut self, entry: CompletionEntry) {
        self.answered = true;
        self.state.borrow_mut().finish(self.slot, entry);
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let entry = CompletionEntry::failed(self.descriptor.context, HostStatus::AdapterSoftware);
            self.state.borrow_mut().finish(self.slot, entry);
        }
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
    let data = segments.buffer();
    // Without a direction the CDB decides.
    let either = flags & (FLAG_TO_HOST | FLAG_TO_DEVICE) == 0;
    let data_in = if either || flags & FLAG_TO_HOST != 0 { &data } else { segments.none() };
    let data_out = if either || flags & FLAG_TO_DEVICE != 0 { &data } else { segments.none() };
    let command = Command {
        nexus: NEXUS,
        lun: Some(lun),
        tag: descriptor.context.get(),
        attribute: TaskAttribute::Simple,
        short_buffer: ShortBuffer::Refuse,
        cdb,
        data_out,
        data_in,
    };
    let completion = target.execute(&command).await;
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
        let sense = &sense.as_bytes()[..sense.as_bytes().len().min(room)];
        if memory.write_slice(sense, GuestAddress(descriptor.sense_address.get())).is_err() && !sense.is_empty() {
            return failed(HostStatus::SenseFailed);
        }
        entry.sense_length = U32::new(sense.len() as u32);
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
