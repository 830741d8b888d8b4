//! Owns: cutting a stream of bytes into records (RFC 5531, 11, record marking).
//! Promises: a record never grows beyond its limit; fragments of no bytes lead nowhere; no allocation in the steady state.
//! Must not know: what records hold.

/// Most fragments of a record that are looked at.
const MAX_FRAGMENTS: u32 = 1024;

/// Why a stream is no stream of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A record would be longer than any answer that was asked for.
    #[error("a record of more than {0} bytes")]
    TooLong(usize),
    /// A record of very many fragments.
    #[error("a record of more than {MAX_FRAGMENTS} fragments")]
    Fragments,
}

/// A record that is being put together.
#[derive(Debug)]
pub struct Assembler {
    limit: usize,
    record: Vec<u8>,
    mark: [u8; 4],
    marked: usize,
    /// Bytes of the fragment that have not come yet.
    missing: usize,
    is_last: bool,
    fragments: u32,
}

impl Assembler {
    /// For records of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, record: Vec::new(), mark: [0; 4], marked: 0, missing: 0, is_last: false, fragments: 0 }
    }

    /// A new connection begins.
    pub fn reset(&mut self) {
        self.record.clear();
        (self.marked, self.missing, self.is_last, self.fragments) = (0, 0, false, 0);
    }

    /// Bytes of the fragment under way that have not come yet.
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// The record's own memory, where the next `length` missing bytes go to: for a read that goes past any other buffer.
    /// [`Assembler::filled`] says how many came.
    pub fn room(&mut self, length: usize) -> &mut [u8] {
        let start = self.record.len();
        self.record.resize(start + length.min(self.missing), 0);
        &mut self.record[start..]
    }

    /// Of `length` bytes of room `came` have been filled. True: the record is whole.
    pub fn filled(&mut self, length: usize, came: usize) -> bool {
        let unused = length.min(self.missing) - came;
        self.record.truncate(self.record.len() - unused);
        self.missing -= came;
        self.missing == 0 && self.end_fragment()
    }

    /// Takes bytes off the front of `bytes`. True: a record is whole, to be taken with [`Assembler::take`].
    ///
    /// # Errors
    /// [`RecordError`]: the stream is of no use any more.
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<bool, RecordError> {
        loop {
            if self.missing > 0 {
                let (part, rest) = bytes.split_at(self.missing.min(bytes.len()));
                self.record.extend_from_slice(part);
                self.missing -= part.len();
                *bytes = rest;
                if self.missing > 0 {
                    return Ok(false);
                }
                if self.end_fragment() {
                    return Ok(true);
                }
            }
            let (part, rest) = bytes.split_at((4 - self.marked).min(bytes.len()));
            self.mark[self.marked..self.marked + part.len()].copy_from_slice(part);
            self.marked += part.len();
            *bytes = rest;
            if self.marked < 4 {
                return Ok(false);
            }
            let mark = u32::from_be_bytes(self.mark);
            (self.marked, self.is_last) = (0, mark & 0x8000_0000 != 0);
            self.missing = (mark & 0x7FFF_FFFF) as usize;
            self.fragments += 1;
            if self.fragments > MAX_FRAGMENTS {
                return Err(RecordError::Fragments);
            }
            if self.record.len() + self.missing > self.limit {
                return Err(RecordError::TooLong(self.limit));
            }
            if self.missing == 0 && self.end_fragment() {
                return Ok(true);
            }
        }
    }

    fn end_fragment(&mut self) -> bool {
        if self.is_last {
            self.fragments = 0;
        }
        std::mem::take(&mut self.is_last)
    }

    /// The whole record. Its memory is exchanged for `memory`.
    pub fn take(&mut self, memory: &mut Vec<u8>) {
        memory.clear();
        std::mem::swap(&mut self.record, memory);
    }

    /// The whole record, to look at.
    pub fn record(&self) -> &[u8] {
        &self.record
    }

    /// Drops the whole record.
    pub fn forget(&mut self) {
        self.record.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(
        assembler: &mut Assembler,
        stream: &[u8],
        pieces: &[usize],
        direct: bool,
    ) -> Result<Vec<Vec<u8>>, RecordError> {
        let (mut records, mut at) = (Vec::new(), 0);
        let mut sizes = pieces.iter().cycle();
        while at < stream.len() {
            let size = (*sizes.next().unwrap_or(&1)).clamp(1, stream.len() - at);
            if direct && assembler.missing() > 0 {
                let room = assembler.room(size);
                let came = room.len();
                room.copy_from_slice(&stream[at..at + came]);
                at += came;
                if assembler.filled(size, came) {
                    let mut record = Vec::new();
                    assembler.take(&mut record);
                    records.push(record);
                }
                continue;
            }
            let mut piece = &stream[at..at + size];
            at += size;
            while assembler.feed(&mut piece)? {
                let mut record = Vec::new();
                assembler.take(&mut record);
                records.push(record);
            }
        }
        Ok(records)
    }

    #[test]
    fn records_that_are_too_long_or_never_end_are_refused() {
        let mut assembler = Assembler::new(8);
        assert_eq!(assembler.feed(&mut &[0x80, 0, 0, 9][..]), Err(RecordError::TooLong(8)));
        assembler.reset();
        assert_eq!(assembler.feed(&mut &[0; 4 * 1025][..]), Err(RecordError::Fragments));
    }

    proptest! {
        #[test]
        fn records_come_whole_however_they_are_cut(
            records in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 1..4), 0..6),
            pieces in prop::collection::vec(1usize..12, 1..8),
            direct: bool,
        ) {
            let mut stream = Vec::new();
            for record in &records {
                for (nth, fragment) in record.iter().enumerate() {
                    let last = if nth + 1 == record.len() { 0x8000_0000u32 } else { 0 };
                    stream.extend((fragment.len() as u32 | last).to_be_bytes());
                    stream.extend(fragment);
                }
            }
            let expected: Vec<Vec<u8>> = records.iter().map(|record| record.concat()).collect();
            prop_assert_eq!(all(&mut Assembler::new(64), &stream, &pieces, direct), Ok(expected));
        }

        #[test]
        fn no_stream_makes_it_panic_or_grow(stream in prop::collection::vec(any::<u8>(), 0..200), pieces in prop::collection::vec(1usize..12, 1..8)) {
            let mut assembler = Assembler::new(64);
            if let Ok(records) = all(&mut assembler, &stream, &pieces, false) {
                prop_assert!(records.iter().all(|record| record.len() <= 64));
            }
        }
    }
}
