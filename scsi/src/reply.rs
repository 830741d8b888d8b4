//! Owns: the way parameter data go to the initiator.
//! Promises: an answer is cut to the allocation length and to the buffer, never padded.
//! Must not know: what the bytes mean.

use crate::data_buffer::DataBuffer;

/// Copies as much of `answer` as both `allocation` and `data_in` take; returns how many bytes `allocation` alone would have taken.
pub(crate) fn send(answer: &[u8], allocation: usize, data_in: &DataBuffer) -> u64 {
    let wanted = answer.len().min(allocation);
    data_in.copy_from(0, &answer[..wanted.min(data_in.len())]);
    wanted as u64
}
