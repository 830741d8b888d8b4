//! Owns: what a written sector holds.
//! Promises: a sector says of itself which write of which file put it where; torn or foreign ones are told apart.
//! Must not know: which of them should be there.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// One write of a run: its number, from 1 on; 0 is "never written".
pub type WriteNo = u32;

const MAGIC: u32 = 0x7374_616d;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Zeros.
    Zeros,
    /// The bytes of a write, at its place in its file.
    Write(WriteNo),
    /// The bytes of a write of another file or for another place of it.
    Foreign {
        /// The write.
        write: WriteNo,
        /// The file's number in the run.
        file: u32,
        /// Its sector.
        sector: u32,
    },
    /// Anything else.
    Garbage,
}

/// Fills a sector for `write` of the file with this number.
pub fn fill(into: &mut [u8], file: u32, sector: u32, write: WriteNo) {
    for piece in into.chunks_exact_mut(16) {
        piece.copy_from_slice(&words(file, sector, write));
    }
}

fn words(file: u32, sector: u32, write: WriteNo) -> [u8; 16] {
    let mut piece = [0; 16];
    for (at, word) in [MAGIC, file, sector, write].into_iter().enumerate() {
        piece[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
    piece
}

/// What a sector of a file holds.
pub fn read(bytes: &[u8], file: u32, sector: u32) -> Held {
    let first: &[u8; 16] = bytes[..16].try_into().expect("a sector has 512 bytes");
    if bytes.chunks_exact(16).any(|piece| piece != first) {
        return Held::Garbage;
    }
    if *first == [0; 16] {
        return Held::Zeros;
    }
    let word = |at: usize| u32::from_le_bytes(first[at * 4..at * 4 + 4].try_into().expect("four bytes"));
    match (word(0), word(1), word(2), word(3)) {
        (MAGIC, f, s, write) if f == file && s == sector => Held::Write(write),
        (MAGIC, file, sector, write) => Held::Foreign { write, file, sector },
        _ => Held::Garbage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_whose_it_is_and_a_torn_one_is_known() {
        let mut sector = [0; SECTOR];
        assert_eq!(read(&sector, 1, 2), Held::Zeros);
        fill(&mut sector, 1, 2, 3);
        assert_eq!(read(&sector, 1, 2), Held::Write(3));
        assert_eq!(read(&sector, 1, 3), Held::Foreign { write: 3, file: 1, sector: 2 });
        sector[256..].fill(0);
        assert_eq!(read(&sector, 1, 2), Held::Garbage);
    }
}
