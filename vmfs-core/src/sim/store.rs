//! Owns: the bytes of a simulated LUN: sparse, with what a power loss would take back.
//! Promises: what was never written reads as zeros; a copy costs a pointer a page.
//! Must not know: hosts, time, faults.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::rng::Rng;

/// The smallest cell: of the 4096 bytes that a slot has most are never written.
const PAGE: usize = 512;
/// A power loss takes or keeps whole pieces of this size: the smallest cell.
const PIECE: usize = 512;

type Page = [u8; PAGE];

/// Sparse bytes.
#[derive(Clone, Default)]
pub(super) struct Store {
    pages: BTreeMap<u64, Arc<Page>>,
    /// Durable content of the pieces that plain writes changed since the last flush.
    unflushed: BTreeMap<u64, [u8; PIECE]>,
}

impl Store {
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        self.read_over_zeros(offset, into);
    }

    /// As [`Store::read`], into bytes that are zero: what was never written costs nothing.
    pub(super) fn read_over_zeros(&self, offset: u64, into: &mut [u8]) {
        let end = offset + into.len() as u64;
        let page = PAGE as u64;
        for (number, bytes) in self.pages.range(offset / page..end.div_ceil(page)) {
            let start = number * page;
            let (from, to) = (start.max(offset), (start + page).min(end));
            let within = (from - start) as usize..(to - start) as usize;
            into[(from - offset) as usize..(to - offset) as usize].copy_from_slice(&bytes[within]);
        }
    }

    /// Changes bytes; what they were is durable or not as before.
    fn put(&mut self, offset: u64, from: &[u8]) {
        for_each_page(offset, from.len(), |page, within, at, length| {
            let piece = &from[at..at + length];
            if piece.iter().all(|byte| *byte == 0) && (length == PAGE || !self.pages.contains_key(&page)) {
                self.pages.remove(&page);
                return;
            }
            let bytes = Arc::make_mut(self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE])));
            bytes[within..within + length].copy_from_slice(piece);
        });
    }

    /// A write that is durable at once.
    pub(super) fn write_through(&mut self, offset: u64, from: &[u8]) {
        self.put(offset, from);
        let end = offset + from.len() as u64;
        let covered: Vec<u64> = self.unflushed.range(offset - offset % PIECE as u64..end).map(|(at, _)| *at).collect();
        for at in covered {
            let mut now = [0; PIECE];
            self.read(at, &mut now);
            self.unflushed.insert(at, now);
            if at >= offset && at + PIECE as u64 <= end {
                self.unflushed.remove(&at);
            }
        }
    }

    /// A write that a power loss may take back until the next flush.
    pub(super) fn write_back(&mut self, offset: u64, from: &[u8]) {
        let end = offset + from.len() as u64;
        let mut at = offset - offset % PIECE as u64;
        while at < end {
            if !self.unflushed.contains_key(&at) {
                let mut old = [0; PIECE];
                self.read(at, &mut old);
                self.unflushed.insert(at, old);
            }
            at += PIECE as u64;
        }
        self.put(offset, from);
    }

    pub(super) fn flush(&mut self) {
        self.unflushed.clear();
    }

    /// Each piece that was not flushed keeps its new content or gets its old one back.
    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        for (at, old) in std::mem::take(&mut self.unflushed) {
            if rng.chance(500) {
                self.put(at, &old);
            }
        }
    }

    pub(super) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let covered: Vec<u64> = self.unflushed.range(offset..end).map(|(at, _)| *at).collect();
        for at in covered {
            self.unflushed.remove(&at);
        }
        let (first, last) = (offset.next_multiple_of(PAGE as u64), end - end % PAGE as u64);
        if first >= last {
            return self.put(offset, &vec![0; length as usize]);
        }
        self.put(offset, &vec![0; (first - offset) as usize]);
        self.put(last, &vec![0; (end - last) as usize]);
        let whole: Vec<u64> =
            self.pages.range(first / PAGE as u64..last / PAGE as u64).map(|(page, _)| *page).collect();
        for page in whole {
            self.pages.remove(&page);
        }
    }
}

/// Calls `each` with {page, offset in the page, offset in the buffer, bytes}.
fn for_each_page(offset: u64, length: usize, mut each: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let within = (at % PAGE as u64) as usize;
        let piece = (PAGE - within).min(length - done);
        each(at / PAGE as u64, within, done, piece);
        done += piece;
    }
}

#[cfg(test)]
mod tests {
    use super::super::rng::Rng;
    use super::*;
    use proptest::prelude::{any, prop_assert, proptest};

    #[test]
    fn a_power_loss_takes_back_only_what_was_not_flushed() {
        let (mut lost, mut kept) = (0, 0);
        for seed in 0..64 {
            let mut store = Store::default();
            store.write_back(0, &[1; 512]);
            store.flush();
            store.write_back(0, &[2; 512]);
            store.write_through(512, &[3; 512]);
            store.lose_power(&mut Rng::new(seed));
            let mut now = [0; 1024];
            store.read(0, &mut now);
            assert!(now[..512] == [1; 512] || now[..512] == [2; 512]);
            assert_eq!(now[512..], [3; 512]);
            if now[0] == 1 { lost += 1 } else { kept += 1 }
        }
        assert!(lost > 0 && kept > 0);
    }

    proptest! {
        #[test]
        fn a_store_reads_back_like_plain_memory(
            steps in proptest::collection::vec((0usize..4, 0u64..40, 1u64..30, any::<u8>()), 1..40)
        ) {
            let (mut store, mut model) = (Store::default(), vec![0u8; 70 * 512]);
            for (kind, first, count, byte) in steps {
                let (offset, length) = (first * 512, (count * 512) as usize);
                let bytes = vec![if kind == 2 { 0 } else { byte }; length];
                match kind {
                    0 => store.write_through(offset, &bytes),
                    1 => store.write_back(offset, &bytes),
                    2 => store.zero(offset, length as u64),
                    _ => { store.flush(); continue; }
                }
                model[offset as usize..offset as usize + length].copy_from_slice(&bytes);
                let mut now = vec![0; model.len()];
                store.read(0, &mut now);
                prop_assert!(now == model);
            }
        }
    }
}
