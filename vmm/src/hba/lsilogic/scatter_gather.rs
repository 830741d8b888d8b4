//! Owns: the walk along a scatter/gather list of the MPI: simple and chain elements, with 32 or 64 bits of address.
//! Promises: bounded work for any list; each element is read once; nothing but guest RAM gets mapped.
//! Must not know: what the data are for. Source: Linux, drivers/message/fusion/lsi/mpi.h, and hba.md of the design notes.

use vm_memory::{Bytes, GuestAddress};

use super::messages::{FRAME_SIZE, Frame};
use crate::hba::GuestMemory;
use crate::hba::guest_segments::{GuestSegments, OutsideRam};

/// The most elements of one list, chains and empty ones included.
const MAX_ELEMENTS: usize = 4096;

const FLAG_END_OF_LIST: u8 = 0x01;
const FLAG_64_BIT: u8 = 0x02;
const FLAG_LAST_ELEMENT: u8 = 0x80;
const TYPE_MASK: u8 = 0x30;
const TYPE_SIMPLE: u8 = 0x10;
const TYPE_CHAIN: u8 = 0x30;

/// Where elements are read from: the frame itself, or a segment of the list elsewhere in memory.
#[derive(Clone, Copy)]
enum Segment<'a> {
    Frame(&'a Frame),
    Memory(&'a GuestMemory, u64),
}

impl Segment<'_> {
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], OutsideRam> {
        let mut bytes = [0; N];
        match *self {
            Segment::Frame(frame) => {
                let range = offset..offset.checked_add(N).ok_or(OutsideRam)?;
                bytes.copy_from_slice(frame.0.get(range).ok_or(OutsideRam)?);
            }
            Segment::Memory(memory, start) => {
                let address = start.checked_add(offset as u64).ok_or(OutsideRam)?;
                memory.read_slice(&mut bytes, GuestAddress(address)).map_err(|_| OutsideRam)?;
            }
        }
        Ok(bytes)
    }

    /// The address behind an element's first double word.
    fn address(&self, offset: usize, wide: bool) -> Result<u64, OutsideRam> {
        let address = offset.checked_add(4).ok_or(OutsideRam)?;
        match wide {
            true => Ok(u64::from_le_bytes(self.read(address)?)),
            false => Ok(u32::from_le_bytes(self.read(address)?).into()),
        }
    }
}

/// Maps up to `wanted` bytes of the list that starts at `offset` in `frame`, whose chain element is at `chain` (in bytes; 0:
/// none). Returns with fewer bytes if the list is shorter.
pub(super) fn map(
    frame: &Frame,
    offset: usize,
    chain: usize,
    wanted: usize,
    memory: &GuestMemory,
    segments: &mut GuestSegments,
) -> Result<(), OutsideRam> {
    let mut segment = Segment::Frame(frame);
    let (mut at, mut chain) = (offset, chain);
    debug_assert!(offset < FRAME_SIZE);
    for _ in 0..MAX_ELEMENTS {
        if segments.len() >= wanted {
            return Ok(());
        }
        let head = u32::from_le_bytes(segment.read(at)?);
        let flags = (head >> 24) as u8;
        let wide = flags & FLAG_64_BIT != 0;
        let size = if wide { 12 } else { 8 };
        match flags & TYPE_MASK {
            TYPE_SIMPLE => {
                let length = ((head & 0x00FF_FFFF) as usize).min(wanted - segments.len());
                if length > 0 {
                    segments.push(segment.address(at, wide)?, length)?;
                }
                if flags & FLAG_END_OF_LIST != 0 {
                    return Ok(());
                }
                at = at.checked_add(size).ok_or(OutsideRam)?;
                // Behind the last element of a segment the chain element goes on, wherever it is.
                if flags & FLAG_LAST_ELEMENT != 0 {
                    if chain == 0 {
                        return Ok(());
                    }
                    at = chain;
                }
            }
            TYPE_CHAIN => {
                let next = 4 * usize::from((head >> 16) as u8);
                segment = Segment::Memory(memory, segment.address(at, wide)?);
                (at, chain) = (0, next);
            }
            // A transaction element is only for targets.
            _ => return Err(OutsideRam),
        }
    }
    Err(OutsideRam)
}
