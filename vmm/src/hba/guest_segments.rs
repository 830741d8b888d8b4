//! Owns: turning ranges of guest-physical memory into the data buffer of one command, without a copy.
//! Promises: only bytes of guest RAM get into a buffer, and the RAM stays mapped while any buffer of it lives.
//! Must not know: adapters, descriptors, commands.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use scsi::{DataBuffer, SegmentList};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::GuestMemory;

/// A range that is not RAM as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutsideRam;

/// Room for one command's segments, used again for command after command.
pub(crate) struct GuestSegments {
    memory: Arc<GuestMemory>,
    list: Arc<SegmentList>,
    none: DataBuffer,
}

/// Segments that most commands do with: Linux sends up to 128.
const ROOM: usize = 130;

impl GuestSegments {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        let list = Arc::new(SegmentList::new(memory.clone(), ROOM));
        let none = DataBuffer::new(Arc::new(SegmentList::new(Arc::new(()), 0)));
        Self { memory, list, none }
    }

    /// Starts an empty list. The room is used again unless somebody still holds a buffer of it.
    pub(crate) fn clear(&mut self) {
        match Arc::get_mut(&mut self.list) {
            Some(list) => list.clear(),
            None => self.list = Arc::new(SegmentList::new(self.memory.clone(), ROOM)),
        }
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Adds `length` bytes of guest memory from `address` on. Call [`Self::clear`] before the first one.
    pub(crate) fn push(&mut self, address: u64, length: usize) -> Result<(), OutsideRam> {
        let list = Arc::get_mut(&mut self.list).ok_or(OutsideRam)?;
        for slice in self.memory.get_slices(GuestAddress(address), length) {
            let slice = slice.map_err(|_| OutsideRam)?;
            let pointer = NonNull::new(slice.ptr_guard_mut().as_ptr()).ok_or(OutsideRam)?;
            // SAFETY: `get_slices` has checked that these bytes are inside a mapped region. The list keeps the memory map
            // alive, so they stay mapped. Guest RAM is only ever accessed through raw copies, never by reference.
            unsafe { list.push(pointer, slice.len()) };
        }
        Ok(())
    }

    /// A buffer of no bytes.
    pub(crate) fn none(&self) -> &DataBuffer {
        &self.none
    }

    /// The buffer of all bytes pushed.
    pub(crate) fn buffer(&self) -> DataBuffer {
        DataBuffer::new(self.list.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Arc<GuestMemory> {
        // Two regions that are neighbours for the guest, and a hole after them.
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 8192), (GuestAddress(8192), 8192)]).unwrap())
    }

    #[test]
    fn a_range_over_two_regions_is_one_buffer() {
        let mut segments = GuestSegments::new(memory());
        segments.clear();
        segments.push(8000, 400).unwrap();
        let buffer = segments.buffer();
        buffer.copy_from(0, &[7; 400]);
        assert_eq!((segments.len(), buffer.to_vec()), (400, vec![7; 400]));
    }

    #[test]
    fn ranges_outside_ram_are_refused() {
        for (address, length) in [(16384, 1), (16000, 400), (u64::MAX, 16), (0, usize::MAX), (1 << 40, 512)] {
            let mut segments = GuestSegments::new(memory());
            segments.clear();
            assert_eq!(segments.push(address, length), Err(OutsideRam), "{address:x}+{length:x}");
        }
    }

    #[test]
    fn room_that_a_buffer_still_uses_is_not_overwritten() {
        let mut segments = GuestSegments::new(memory());
        segments.clear();
        segments.push(0, 100).unwrap();
        let held = segments.buffer();
        segments.clear();
        segments.push(4096, 200).unwrap();
        assert_eq!((held.len(), segments.buffer().len()), (100, 200));
    }
}
