//! Owns: register windows as tables, and accesses to them in words of 32 bits.
//! Promises: each register is read once an access, whatever part of it is asked for.
//! Must not know: what any register does.

/// The sum of a table's pieces in bytes; each adapter asserts at compile time that it is its window's size.
pub(crate) const fn size<R: Copy>(window: &[(R, u32)]) -> u32 {
    let mut sum = 0;
    let mut index = 0;
    while index < window.len() {
        sum += window[index].1;
        index += 1;
    }
    sum
}

/// The register that holds the byte at `offset`; `None` beyond the window.
pub(crate) fn register_at<R: Copy>(window: &[(R, u32)], offset: u64) -> Option<R> {
    let mut end = 0;
    for &(register, size) in window {
        end += u64::from(size);
        if offset < end {
            return Some(register);
        }
    }
    None
}

/// Answers a read of `data.len()` bytes at `offset` from the words that `read` gives for their offsets.
pub(crate) fn read_words(offset: u64, data: &mut [u8], read: impl Fn(u64) -> u32) {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let skip = (at % 4) as usize;
        let length = rest.len().min(4 - skip);
        let value = read(at).to_le_bytes();
        let (part, later) = rest.split_at_mut(length);
        part.copy_from_slice(&value[skip..skip + length]);
        at = at.wrapping_add(length as u64);
        rest = later;
    }
}

/// Hands a write at `offset` to `write` word by word; what is no whole aligned word is ignored.
pub(crate) fn write_words(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32)) {
    if !offset.is_multiple_of(4) {
        return;
    }
    for (index, word) in data.as_chunks::<4>().0.iter().enumerate() {
        write(offset.wrapping_add(4 * index as u64), u32::from_le_bytes(*word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_accesses_see_the_bytes_of_the_words_and_odd_writes_nothing() {
        let mut data = [0; 7];
        read_words(2, &mut data, |offset| 0x0101_0101 * (offset as u32 & !3));
        assert_eq!(data, [0, 0, 4, 4, 4, 4, 8]);
        let mut seen = Vec::new();
        write_words(8, &[1, 0, 0, 0, 2, 0, 0, 0, 3], |offset, word| seen.push((offset, word)));
        write_words(2, &[1, 0, 0, 0], |offset, word| seen.push((offset, word)));
        assert_eq!(seen, [(8, 1), (12, 2)]);
    }

    #[test]
    fn a_table_is_looked_up_to_its_end() {
        let window = [('a', 4), ('b', 8)];
        assert_eq!((size(&window), register_at(&window, 11), register_at(&window, 12)), (12, Some('b'), None));
    }
}
