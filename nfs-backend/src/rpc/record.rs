//! Owns: cutting a stream of bytes into records (RFC 5531, 11, record marking).
//! Promises: a record never grows beyond its limit; fragments of no bytes lead nowhere; no allocation in the steady state.
//! Must not know: what records hold.

use std::ops::Range;

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

/// What the first bytes of a record say about data in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// They say it when there are so many of them.
    Later(usize),
    /// It stays as it is.
    Nowhere,
    /// These bytes of it go elsewhere.
    At(Range<usize>),
}

/// Takes data out of records.
pub trait Diversion {
    /// Looks at the first bytes of a record.
    fn locate(&mut self, head: &[u8]) -> Located;

    /// Takes the next data of the record that begins with `head`, which belong `offset` bytes behind the first of them.
    fn place(&mut self, head: &[u8], offset: usize, bytes: &[u8]);
}

/// So many bytes of a record are there when it is looked at for the first time.
const FIRST_LOOK: usize = 8;

/// A record that is being put together.
#[derive(Debug)]
pub struct Assembler {
    limit: usize,
    /// What stays in the record.
    record: Vec<u8>,
    /// Bytes of the record that came, those included that went elsewhere.
    came: usize,
    located: Located,
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
        let located = Located::Later(FIRST_LOOK);
        Self {
            limit,
            record: Vec::new(),
            came: 0,
            located,
            mark: [0; 4],
            marked: 0,
            missing: 0,
            is_last: false,
            fragments: 0,
        }
    }

    /// A new connection begins.
    pub fn reset(&mut self) {
        self.forget();
        (self.marked, self.missing, self.is_last, self.fragments) = (0, 0, false, 0);
    }

    /// Bytes of the fragment under way that are known to stay in the record, and have not come yet.
    pub fn missing(&self) -> usize {
        if self.located == Located::Nowhere { self.missing } else { 0 }
    }

    /// The next bytes go elsewhere: where to, and how many of them can come in one piece.
    pub fn diverted(&self) -> Option<(usize, usize)> {
        match &self.located {
            Located::At(range) if range.contains(&self.came) && self.missing > 0 => {
                Some((self.came - range.start, self.missing.min(range.end - self.came)))
            }
            _ => None,
        }
    }

    /// So many of the bytes that [`Assembler::diverted`] told of went there. True: the record is whole.
    pub fn passed(&mut self, bytes: usize) -> bool {
        self.came += bytes;
        self.missing -= bytes;
        self.missing == 0 && self.end_fragment()
    }

    /// Bytes of the record that went elsewhere.
    pub fn landed(&self) -> usize {
        self.came - self.record.len()
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
        self.passed(came)
    }

    /// Takes bytes off the front of `bytes`. True: a record is whole, to be taken with [`Assembler::take`].
    ///
    /// # Errors
    /// [`RecordError`]: the stream is of no use any more.
    pub fn feed(&mut self, bytes: &mut &[u8], diversion: &mut impl Diversion) -> Result<bool, RecordError> {
        loop {
            while self.missing > 0 {
                if bytes.is_empty() {
                    return Ok(false);
                }
                if self.append(bytes, diversion) {
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
            if self.came + self.missing > self.limit {
                return Err(RecordError::TooLong(self.limit));
            }
            if self.missing == 0 && self.end_fragment() {
                return Ok(true);
            }
        }
    }

    /// Takes bytes of the fragment under way to where they belong, as far as that is the same place. True: the record is whole.
    fn append(&mut self, bytes: &mut &[u8], diversion: &mut impl Diversion) -> bool {
        let most = self.missing.min(bytes.len());
        let is_diverted = self.diverted().is_some();
        let length = match &self.located {
            Located::Later(wanted) => wanted.saturating_sub(self.came).clamp(1, most),
            Located::At(range) if self.came < range.start => most.min(range.start - self.came),
            Located::At(range) if self.came < range.end => most.min(range.end - self.came),
            _ => most,
        };
        let (part, rest) = bytes.split_at(length);
        *bytes = rest;
        match &self.located {
            Located::At(range) if is_diverted => diversion.place(&self.record, self.came - range.start, part),
            _ => self.record.extend_from_slice(part),
        }
        let is_whole = self.passed(length);
        if let Located::Later(wanted) = self.located
            && self.came >= wanted
            && !is_whole
        {
            self.located = diversion.locate(&self.record);
            // What went into the record already goes on to where it belongs.
            if let Located::At(range) = &self.located
                && range.start < self.came
            {
                let there = range.start..range.end.min(self.came);
                if !there.is_empty() {
                    diversion.place(&self.record[..there.start], 0, &self.record[there.clone()]);
                    self.record.drain(there);
                }
            }
        }
        is_whole
    }

    fn end_fragment(&mut self) -> bool {
        if self.is_last {
            self.fragments = 0;
        }
        std::mem::take(&mut self.is_last)
    }

    /// The whole record, without what went elsewhere. Its memory is exchanged for `memory`.
    pub fn take(&mut self, memory: &mut Vec<u8>) {
        std::mem::swap(&mut self.record, memory);
        self.forget();
    }

    /// The record, to look at.
    pub fn record(&self) -> &[u8] {
        &self.record
    }

    /// Drops the whole record.
    pub fn forget(&mut self) {
        self.record.clear();
        (self.came, self.located) = (0, Located::Later(FIRST_LOOK));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Takes `range` out of each record, whose first two looks are answered with "later".
    struct Apart {
        range: Range<usize>,
        data: Vec<u8>,
    }

    impl Diversion for Apart {
        fn locate(&mut self, head: &[u8]) -> Located {
            match head.len() {
                ..10 => Located::Later(head.len() + 1),
                _ if self.range.is_empty() => Located::Nowhere,
                _ => Located::At(self.range.clone()),
            }
        }

        fn place(&mut self, _head: &[u8], offset: usize, bytes: &[u8]) {
            assert_eq!(offset, self.data.len(), "data come in their order");
            assert!(!bytes.is_empty() && offset + bytes.len() <= self.range.len());
            self.data.extend(bytes);
        }
    }

    /// Each record as it stays, and what was taken out of it.
    type Records = Vec<(Vec<u8>, Vec<u8>)>;

    fn all(
        assembler: &mut Assembler,
        stream: &[u8],
        pieces: &[usize],
        direct: bool,
        range: Range<usize>,
    ) -> Result<Records, RecordError> {
        let (mut records, mut at) = (Vec::new(), 0);
        let mut apart = Apart { range, data: Vec::new() };
        let mut take = |assembler: &mut Assembler, apart: &mut Apart| {
            let (mut record, landed) = (Vec::new(), assembler.landed());
            assembler.take(&mut record);
            assert_eq!(landed, apart.data.len());
            records.push((record, std::mem::take(&mut apart.data)));
        };
        let mut sizes = pieces.iter().cycle();
        while at < stream.len() {
            let size = (*sizes.next().unwrap_or(&1)).clamp(1, stream.len() - at);
            if direct && assembler.missing() > 0 {
                let room = assembler.room(size);
                let came = room.len();
                room.copy_from_slice(&stream[at..at + came]);
                at += came;
                if assembler.filled(size, came) {
                    take(assembler, &mut apart);
                }
                continue;
            }
            if direct && let Some((offset, most)) = assembler.diverted() {
                let part = &stream[at..at + size.min(most)];
                apart.place(&[], offset, part);
                at += part.len();
                if assembler.passed(part.len()) {
                    take(assembler, &mut apart);
                }
                continue;
            }
            let mut piece = &stream[at..at + size];
            at += size;
            while assembler.feed(&mut piece, &mut apart)? {
                take(assembler, &mut apart);
            }
        }
        Ok(records)
    }

    #[test]
    fn records_that_are_too_long_or_never_end_are_refused() {
        let mut assembler = Assembler::new(8);
        let mut apart = Apart { range: 0..0, data: Vec::new() };
        assert_eq!(assembler.feed(&mut &[0x80, 0, 0, 9][..], &mut apart), Err(RecordError::TooLong(8)));
        assembler.reset();
        assert_eq!(assembler.feed(&mut &[0; 4 * 1025][..], &mut apart), Err(RecordError::Fragments));
    }

    proptest! {
        #[test]
        fn records_come_whole_however_they_are_cut_and_data_are_taken_out_of_them(
            records in prop::collection::vec(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 1..6), 0..6),
            pieces in prop::collection::vec(1usize..12, 1..8),
            direct: bool,
            start in 0usize..30,
            length in 0usize..20,
        ) {
            let range = start..start + length;
            let mut stream = Vec::new();
            for record in &records {
                for (nth, fragment) in record.iter().enumerate() {
                    let last = if nth + 1 == record.len() { 0x8000_0000u32 } else { 0 };
                    stream.extend((fragment.len() as u32 | last).to_be_bytes());
                    stream.extend(fragment);
                }
            }
            let found = all(&mut Assembler::new(64), &stream, &pieces, direct, range.clone()).expect("they are not too long");
            prop_assert_eq!(found.len(), records.len());
            for ((kept, taken), record) in found.iter().zip(&records) {
                let record = record.concat();
                // One that ends before it can be looked at stays as it is; just then it depends on the fragments.
                match record.len() {
                    ..10 => prop_assert_eq!((kept, taken.len()), (&record, 0)),
                    10 => prop_assert_eq!(kept.len() + taken.len(), 10),
                    _ => {}
                }
                if record.len() <= 10 {
                    continue;
                }
                let cut = |at: usize| at.min(record.len());
                prop_assert_eq!(kept, &[&record[..cut(range.start)], &record[cut(range.end)..]].concat());
                prop_assert_eq!(taken, &record[cut(range.start)..cut(range.end)]);
            }
        }

        #[test]
        fn no_stream_makes_it_panic_or_grow(stream in prop::collection::vec(any::<u8>(), 0..200), pieces in prop::collection::vec(1usize..12, 1..8)) {
            let mut assembler = Assembler::new(64);
            if let Ok(records) = all(&mut assembler, &stream, &pieces, false, 12..20) {
                prop_assert!(records.iter().all(|(record, data)| record.len() + data.len() <= 64));
            }
        }
    }
}
