//! Owns: memory that direct I/O accepts.
//! Promises: address and length are multiples of 4096; fresh memory is zero.
//! Must not know: what is in it.

use std::ops::{Deref, DerefMut};

use zerocopy::IntoBytes;

/// Alignment of every buffer: the strictest that direct I/O asks for.
pub const BUF_ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; BUF_ALIGNMENT]);

/// A buffer whose address is a multiple of [`BUF_ALIGNMENT`]; its length is what was asked for.
pub struct AlignedBuf {
    pages: Vec<Page>,
    length: usize,
}

impl AlignedBuf {
    /// `length` zero bytes.
    pub fn zeroed(length: usize) -> AlignedBuf {
        AlignedBuf { pages: vec![Page([0; BUF_ALIGNMENT]); length.div_ceil(BUF_ALIGNMENT)], length }
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Cuts the buffer to its first `length` bytes; a longer `length` changes nothing.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages.as_slice().as_bytes()[..self.length]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_slice().as_mut_bytes()[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zeroed_and_as_long_as_asked() {
        for length in [0, 1, 512, 4096, 4097, 1 << 20] {
            let buf = AlignedBuf::zeroed(length);
            assert_eq!(buf.len(), length);
            assert_eq!(buf.as_ptr() as usize % BUF_ALIGNMENT, 0);
            assert!(buf.iter().all(|b| *b == 0));
        }
    }
}
