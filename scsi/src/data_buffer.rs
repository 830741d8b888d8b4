//! Owns: the description of a command's data as pieces of somebody's memory (guest RAM, or a buffer of our own).
//! Promises: the memory stays mapped while any buffer or slice of it lives; a copy never leaves the buffer's bounds.
//! Must not know: who the memory belongs to, SCSI, files, rings.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock};

/// Whatever must stay alive for the memory to stay mapped, for example the guest's memory map.
pub type KeepAlive = Arc<dyn Any + Send + Sync>;

/// One contiguous piece of memory. It has the layout of POSIX `struct iovec`, so that a slice of segments can be handed
/// to the kernel as it is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pointer: NonNull<u8>,
    length: usize,
}

// SAFETY: a segment is only an address and a length. Every access goes through raw copies of bytes, never through a Rust
// reference, and the memory is shared with others (a guest's CPUs) by its nature.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// The first byte's address.
    pub fn pointer(&self) -> NonNull<u8> {
        self.pointer
    }

    /// Length in bytes, never 0 inside a [`SegmentList`].
    pub fn length(&self) -> usize {
        self.length
    }

    /// The part from `start`, at most `length` bytes long. Both are inside the segment (checked by the callers).
    fn part(&self, start: usize, length: usize) -> Segment {
        assert!(start <= self.length && length <= self.length - start, "part outside its segment");
        // SAFETY: start <= self.length, so the address stays inside the segment (or one past its end).
        Segment { pointer: unsafe { self.pointer.add(start) }, length }
    }
}

/// The pieces of memory of one command, in the order of its bytes, and what keeps them alive. A transport keeps one list
/// for each command slot, behind an [`Arc`], and fills it again for each command, so that no command allocates.
pub struct SegmentList {
    segments: Vec<Segment>,
    length: usize,
    _keep_alive: KeepAlive,
}

impl SegmentList {
    /// An empty list over memory that lives as long as `keep_alive`, with room for `capacity` segments.
    pub fn new(keep_alive: KeepAlive, capacity: usize) -> Self {
        Self { segments: Vec::with_capacity(capacity), length: 0, _keep_alive: keep_alive }
    }

    /// Forgets all segments; the room stays.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.length = 0;
    }

    /// Adds a piece at the end; a piece that continues the last one in memory is merged into it. Empty pieces are dropped.
    ///
    /// # Safety
    /// `length` bytes from `pointer` on must be mapped, readable and writable for as long as the list's `keep_alive` lives.
    /// Others may read and write them at any time, but no Rust reference to them may exist.
    pub unsafe fn push(&mut self, pointer: NonNull<u8>, length: usize) {
        if length == 0 {
            return;
        }
        self.length = self.length.checked_add(length).expect("a list's bytes fit the address space");
        if let Some(last) = self.segments.last_mut()
            && last.pointer.as_ptr().wrapping_add(last.length) == pointer.as_ptr()
        {
            last.length += length;
            return;
        }
        self.segments.push(Segment { pointer, length });
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No byte at all?
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The pieces in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

impl fmt::Debug for SegmentList {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SegmentList({} bytes in {} segments)", self.length, self.segments.len())
    }
}

/// A range of a [`SegmentList`]: the data of a command, or a slice of it. Cloning and slicing copy no data and allocate
/// nothing. Whoever holds one may read and write the memory; holding one is what keeps the memory mapped, so an
/// operation in the kernel must own a clone until it has ended for certain.
///
/// The memory may change under the reader (a guest is free to write into its own buffer): never parse it in place, copy
/// it out first.
#[derive(Clone)]
pub struct DataBuffer {
    list: Arc<SegmentList>,
    /// Index of the segment that holds the first byte.
    first: usize,
    /// Bytes of that segment that come before the first byte.
    skip: usize,
    length: usize,
}

impl DataBuffer {
    /// The whole of `list`.
    pub fn new(list: Arc<SegmentList>) -> Self {
        let length = list.length;
        Self { list, first: 0, skip: 0, length }
    }

    /// A buffer of no bytes, for commands without data.
    pub fn empty() -> Self {
        static EMPTY: LazyLock<Arc<SegmentList>> = LazyLock::new(|| Arc::new(SegmentList::new(Arc::new(()), 0)));
        Self::new(EMPTY.clone())
    }

    /// Memory of our own: `length` zero bytes that start at a multiple of `alignment` (a power of two).
    pub fn zeroed(length: usize, alignment: usize) -> Self {
        let memory = Arc::new(OwnedMemory::zeroed(length, alignment));
        let pointer = memory.pointer;
        let mut list = SegmentList::new(memory, 1);
        // SAFETY: the allocation has `length` bytes, lives as long as the list's keep_alive, and nobody refers to it.
        unsafe { list.push(pointer, length) };
        Self::new(Arc::new(list))
    }

    /// Memory of our own with a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buffer = Self::zeroed(bytes.len(), 8);
        buffer.copy_from(0, bytes);
        buffer
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No byte at all?
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Does nobody else hold this memory, or a slice of it? Then whoever asks may lend it to another command.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.list) == 1
    }

    /// The fast path: the one segment that holds all of it, if there is just one. `None` for an empty buffer.
    pub fn as_single(&self) -> Option<Segment> {
        let segment = self.list.segments.get(self.first)?;
        (self.length != 0 && self.length <= segment.length - self.skip).then(|| segment.part(self.skip, self.length))
    }

    /// All segments in order, the first and the last cut to this buffer's range.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let mut remaining = self.length;
        let mut skip = self.skip;
        self.list.segments[self.first.min(self.list.segments.len())..].iter().map_while(move |segment| {
            if remaining == 0 {
                return None;
            }
            let part = segment.part(skip, remaining.min(segment.length - skip));
            skip = 0;
            remaining -= part.length;
            Some(part)
        })
    }

    /// The bytes of `range` as a buffer of their own.
    ///
    /// # Panics
    /// When `range` is not inside the buffer.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.length, "slice {range:?} of {} bytes", self.length);
        let mut first = self.first;
        let mut skip = self.skip + range.start;
        while let Some(segment) = self.list.segments.get(first)
            && skip >= segment.length
        {
            skip -= segment.length;
            first += 1;
        }
        Self { list: self.list.clone(), first, skip, length: range.end - range.start }
    }

    /// Whether every segment's address and length is a multiple of `alignment` (a power of two): what O_DIRECT asks for.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.segments().all(|segment| (segment.pointer.as_ptr() as usize | segment.length) & mask == 0)
    }

    /// Copies the bytes at `offset` into `target`.
    ///
    /// # Panics
    /// When the bytes are not all inside the buffer.
    pub fn copy_to(&self, offset: usize, target: &mut [u8]) {
        let mut done = 0;
        for segment in self.slice(offset..offset + target.len()).segments() {
            let part = &mut target[done..done + segment.length];
            // SAFETY: the segment is mapped while `self.list` lives; `part` is ours and cannot overlap it, since no
            // reference to a list's memory exists (contract of `SegmentList::push`).
            unsafe { std::ptr::copy_nonoverlapping(segment.pointer.as_ptr(), part.as_mut_ptr(), segment.length) };
            done += segment.length;
        }
    }

    /// Copies `source` into the buffer at `offset`.
    ///
    /// # Panics
    /// When the bytes do not all fit inside the buffer.
    pub fn copy_from(&self, offset: usize, source: &[u8]) {
        let mut done = 0;
        for segment in self.slice(offset..offset + source.len()).segments() {
            let part = &source[done..done + segment.length];
            // SAFETY: as in `copy_to`, in the other direction.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), segment.pointer.as_ptr(), segment.length) };
            done += segment.length;
        }
    }

    /// Copies all of `source` into the start of this buffer. `source` may even be the same memory.
    ///
    /// # Panics
    /// When `source` is longer than this buffer.
    pub fn copy_from_buffer(&self, source: &DataBuffer) {
        let mut offset = 0;
        for from in source.segments() {
            let mut done = 0;
            for to in self.slice(offset..offset + from.length).segments() {
                // SAFETY: both sides are mapped while their lists live; `copy` allows overlap.
                unsafe { std::ptr::copy(from.pointer.as_ptr().add(done), to.pointer.as_ptr(), to.length) };
                done += to.length;
            }
            offset += from.length;
        }
    }

    /// Writes zeros over `range`.
    ///
    /// # Panics
    /// When `range` is not inside the buffer.
    pub fn fill_zero(&self, range: Range<usize>) {
        for segment in self.slice(range).segments() {
            // SAFETY: the segment is mapped while `self.list` lives.
            unsafe { std::ptr::write_bytes(segment.pointer.as_ptr(), 0, segment.length) };
        }
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.copy_to(0, &mut bytes);
        bytes
    }
}

impl fmt::Debug for DataBuffer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "DataBuffer({} bytes)", self.length)
    }
}

/// An aligned allocation that a [`SegmentList`] keeps alive.
struct OwnedMemory {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain bytes without an owner thread.
unsafe impl Send for OwnedMemory {}
// SAFETY: as above; access only by raw copies.
unsafe impl Sync for OwnedMemory {}

impl OwnedMemory {
    fn zeroed(length: usize, alignment: usize) -> Self {
        let layout =
            Layout::from_size_align(length.max(1), alignment).expect("a buffer's length and alignment are sane");
        // SAFETY: the layout's size is not 0.
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else { std::alloc::handle_alloc_error(layout) };
        Self { pointer, layout }
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { std::alloc::dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A list of pieces of one owned allocation, with a gap of one byte between neighbours.
    fn scattered(lengths: &[usize]) -> DataBuffer {
        let total: usize = lengths.iter().map(|length| length + 1).sum();
        let memory = Arc::new(OwnedMemory::zeroed(total, 8));
        let mut pointer = memory.pointer;
        let mut list = SegmentList::new(memory, lengths.len());
        for &length in lengths {
            // SAFETY: the pieces and gaps add up to the allocation.
            unsafe {
                list.push(pointer, length);
                pointer = pointer.add(length + 1);
            }
        }
        DataBuffer::new(Arc::new(list))
    }

    #[test]
    fn neighbours_in_memory_become_one_segment() {
        let memory = Arc::new(OwnedMemory::zeroed(24, 8));
        let pointer = memory.pointer;
        let mut list = SegmentList::new(memory, 2);
        // SAFETY: both pieces are inside the allocation.
        unsafe {
            list.push(pointer, 8);
            list.push(pointer.add(8), 16);
        }
        let buffer = DataBuffer::new(Arc::new(list));
        assert_eq!(buffer.as_single().map(|segment| segment.length()), Some(24));
        assert!(buffer.is_aligned(8));
    }

    #[test]
    fn an_empty_buffer_has_no_segment() {
        assert!(DataBuffer::empty().is_empty());
        assert!(DataBuffer::empty().as_single().is_none());
        assert_eq!(DataBuffer::empty().segments().count(), 0);
        assert_eq!(DataBuffer::zeroed(0, 512).slice(0..0).to_vec(), Vec::<u8>::new());
    }

    proptest! {
        #[test]
        fn slices_of_scattered_memory_behave_like_slices_of_bytes(
            lengths in prop::collection::vec(0usize..9, 0..8),
            cut in any::<(prop::sample::Index, prop::sample::Index)>(),
        ) {
            let buffer = scattered(&lengths);
            let bytes: Vec<u8> = (0..buffer.len()).map(|index| index as u8 + 1).collect();
            buffer.copy_from(0, &bytes);
            prop_assert_eq!(buffer.to_vec(), bytes.clone());

            let mut cuts = [cut.0.index(buffer.len() + 1), cut.1.index(buffer.len() + 1)];
            cuts.sort();
            let slice = buffer.slice(cuts[0]..cuts[1]);
            prop_assert_eq!(slice.to_vec(), &bytes[cuts[0]..cuts[1]]);
            prop_assert_eq!(slice.segments().map(|segment| segment.length()).sum::<usize>(), slice.len());
            if let Some(single) = slice.as_single() {
                prop_assert_eq!(single.length(), slice.len());
            }

            let copy = DataBuffer::zeroed(slice.len(), 512);
            copy.copy_from_buffer(&slice);
            prop_assert_eq!(copy.to_vec(), slice.to_vec());
            slice.fill_zero(0..slice.len());
            let mut expected = bytes;
            expected[cuts[0]..cuts[1]].fill(0);
            prop_assert_eq!(buffer.to_vec(), expected);
        }
    }
}
