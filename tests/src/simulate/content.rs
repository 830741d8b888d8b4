//! Owns: what the bytes of every file may be, by what was asked and acknowledged: the oracle of promises about data.
//! Promises: a read that no order of what was asked explains is told; what a flush acknowledged is not allowed to go.
//! Must not know: blocks, pointers, how hosts do it.
//!
//! A sector has candidates. One is *present* while reading may find it now, and *kept* while a crash may leave it. A write makes
//! itself the only present one and adds itself to the kept ones; an acknowledged flush keeps only what is present; a crash of the
//! holder makes everything that was kept present again. A reader that holds no lock may find what was possible at any time of
//! its reading.

use std::collections::BTreeMap;

use super::stamp::{Held, SECTOR, WriteNo};

/// A value of something, and when it was possible.
#[derive(Clone, Copy, Debug)]
struct Candidate<T> {
    value: T,
    present: bool,
    kept: bool,
    /// Virtual time when it was possible for the last time, unless it is.
    ended: u64,
}

/// All values that something may have.
#[derive(Clone, Debug)]
struct Possible<T> {
    candidates: Vec<Candidate<T>>,
    /// Left by a crash: a flush by somebody else does not make it durable.
    left_over: bool,
}

impl<T: Copy + PartialEq> Possible<T> {
    fn only(value: T) -> Possible<T> {
        Possible { candidates: vec![Candidate { value, present: true, kept: true, ended: 0 }], left_over: false }
    }

    fn update(&mut self, now: u64, change: impl Fn(&mut Candidate<T>)) {
        for candidate in &mut self.candidates {
            let was = candidate.present || candidate.kept;
            change(candidate);
            if was && !candidate.present && !candidate.kept {
                candidate.ended = now;
            }
        }
    }

    fn allow(&mut self, value: T) {
        match self.candidates.iter_mut().find(|candidate| candidate.value == value) {
            Some(candidate) => (candidate.present, candidate.kept) = (true, true),
            None => self.candidates.push(Candidate { value, present: true, kept: true, ended: 0 }),
        }
    }

    /// It was certainly changed; a crash may take that back.
    fn set(&mut self, value: T, now: u64) {
        self.update(now, |candidate| candidate.present = false);
        self.allow(value);
        self.left_over = false;
    }

    fn flushed(&mut self, now: u64) {
        if !self.left_over {
            self.update(now, |candidate| candidate.kept = candidate.present);
        }
    }

    fn crashed(&mut self) {
        self.left_over = true;
        self.candidates.iter_mut().for_each(|candidate| candidate.present |= candidate.kept);
    }

    /// Somebody who excludes all others found `value`.
    fn found(&mut self, value: T, now: u64, settled: bool) -> bool {
        if !self.candidates.iter().any(|candidate| candidate.value == value && candidate.present) {
            return false;
        }
        if settled {
            self.update(now, |candidate| candidate.present = candidate.value == value);
        }
        true
    }

    fn was_possible(&self, value: T, since: u64) -> bool {
        let possible = |c: &Candidate<T>| c.value == value && (c.present || c.kept || c.ended >= since);
        self.candidates.iter().any(possible)
    }

    fn values(&self) -> Vec<T> {
        self.candidates.iter().filter(|c| c.present).map(|c| c.value).collect()
    }
}

/// One file of a run.
#[derive(Clone, Debug)]
pub struct FileModel {
    /// Its number in the run: what its sectors say.
    pub number: u32,
    sectors: BTreeMap<u32, Possible<WriteNo>>,
    size: Possible<u64>,
    /// The end of a change is not known: what is found now may be something else a moment later.
    unsettled: bool,
}

impl FileModel {
    /// A file of `size` bytes in which nothing was written.
    pub fn new(number: u32, size: u64) -> FileModel {
        FileModel { number, sectors: BTreeMap::new(), size: Possible::only(size), unsettled: false }
    }

    fn sector(&mut self, sector: u32) -> &mut Possible<WriteNo> {
        self.sectors.entry(sector).or_insert_with(|| Possible::only(0))
    }

    /// A write is about to begin: from now on it may be there, for who looks without a lock.
    pub fn begin_write(&mut self, sectors: std::ops::Range<u32>, write: WriteNo) {
        sectors.clone().for_each(|sector| self.sector(sector).allow(write));
        // A write behind the end lets the file grow up to its begin first.
        for bytes in [sectors.start, sectors.end].map(|sector| u64::from(sector) * SECTOR as u64) {
            for size in self.size.values() {
                self.size.allow(size.max(bytes));
            }
        }
    }

    /// The write was acknowledged.
    pub fn written(&mut self, sectors: std::ops::Range<u32>, write: WriteNo, grows: bool, now: u64) {
        sectors.clone().for_each(|sector| self.sector(sector).set(write, now));
        if grows {
            let end = u64::from(sectors.end) * SECTOR as u64;
            self.size.update(now, |candidate| candidate.present &= candidate.value >= end);
            self.size.left_over = false;
        }
    }

    /// A change failed: it may have been carried out, or may yet be.
    pub fn in_doubt(&mut self) {
        self.unsettled = true;
    }

    /// A range may read as zeros from now on (`certain`: it does).
    pub fn cleared(&mut self, sectors: std::ops::Range<u32>, certain: bool, now: u64) {
        for (_, possible) in self.sectors.range_mut(sectors) {
            if certain { possible.set(0, now) } else { possible.allow(0) }
        }
    }

    /// A change of the size begins or (`certain`) was acknowledged.
    pub fn resized(&mut self, bytes: u64, certain: bool, now: u64) {
        let first = bytes.div_ceil(SECTOR as u64) as u32;
        self.cleared(first..u32::MAX, certain, now);
        if certain { self.size.set(bytes, now) } else { self.size.allow(bytes) }
    }

    /// Everything that was acknowledged before is durable.
    pub fn flushed(&mut self, now: u64) {
        self.sectors.values_mut().for_each(|possible| possible.flushed(now));
        self.size.flushed(now);
    }

    /// Who had it open died, or its end is not known.
    pub fn crashed(&mut self) {
        self.sectors.values_mut().for_each(Possible::crashed);
        self.size.crashed();
    }

    /// The size as the holder of the lock found it.
    pub fn check_size(&mut self, bytes: u64, now: u64) -> Result<(), String> {
        let expected = self.size.values();
        let between = expected.iter().any(|size| *size <= bytes) && expected.iter().any(|size| *size >= bytes);
        if self.unsettled && between {
            return Ok(());
        }
        if self.size.found(bytes, now, !self.unsettled) {
            return Ok(());
        }
        Err(format!("file {}: its size is {bytes}, it can be one of {expected:?}", self.number))
    }

    /// A size that somebody without a lock saw at some time since `since`.
    pub fn check_size_seen(&self, bytes: u64, since: u64) -> Result<(), String> {
        if self.size.was_possible(bytes, since) {
            return Ok(());
        }
        Err(format!("file {}: its size was seen as {bytes}, it can be one of {:?}", self.number, self.size.values()))
    }

    /// A sector as it was read: `since` is the begin of a reading without a lock.
    pub fn check(&mut self, sector: u32, held: Held, since: Option<u64>, now: u64) -> Result<(), String> {
        let number = self.number;
        let value = match held {
            Held::Zeros => 0,
            Held::Write(write) => write,
            other => return Err(format!("file {number}, sector {sector}: {other:?} shows")),
        };
        let settled = !self.unsettled;
        let possible = self.sector(sector);
        let fits = match since {
            Some(since) => possible.was_possible(value, since),
            None => possible.found(value, now, settled),
        };
        if fits {
            return Ok(());
        }
        let expected = possible.candidates.iter().filter(|c| c.present).map(|c| c.value).collect::<Vec<_>>();
        Err(format!("file {number}, sector {sector}: holds write {value}, it can be one of {expected:?} (0: zeros)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_flushed_may_not_go_and_what_was_not_may() {
        let mut file = FileModel::new(1, 0);
        file.begin_write(0..1, 1);
        file.written(0..1, 1, true, 10);
        file.flushed(11);
        file.begin_write(0..1, 2);
        file.written(0..1, 2, true, 12);
        let mut before = file.clone();
        assert!(before.check(0, Held::Write(1), None, 13).is_err());
        assert!(before.check(0, Held::Write(2), None, 13).is_ok());
        file.crashed();
        for (held, fits) in [(Held::Write(1), true), (Held::Write(2), true), (Held::Zeros, false)] {
            assert_eq!(file.clone().check(0, held, None, 14).is_ok(), fits, "{held:?}");
        }
        assert!(file.check(0, Held::Write(1), None, 15).is_ok());
        assert!(file.check(0, Held::Write(2), None, 16).is_err());
    }

    #[test]
    fn a_reader_without_a_lock_may_see_what_was_there_while_it_read() {
        let mut file = FileModel::new(1, 1024);
        file.begin_write(0..1, 1);
        file.written(0..1, 1, true, 10);
        file.flushed(10);
        file.begin_write(0..1, 2);
        file.written(0..1, 2, true, 20);
        file.flushed(20);
        assert!(file.check(0, Held::Write(1), Some(15), 25).is_ok());
        assert!(file.check(0, Held::Write(1), Some(21), 25).is_err());
    }
}
