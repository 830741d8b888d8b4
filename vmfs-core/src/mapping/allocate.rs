//! Owns: how many neighbours are taken beside a block that is needed.
//! Promises: a file written in order asks the block table seldom; one written here and there takes nothing it does not need.
//! Must not know: the block table, what becomes of blocks that stay unused.

use crate::units::BlockSize;

/// Most bytes that are taken ahead of a writer.
const MOST_AHEAD_BYTES: u64 = 64 << 20;

/// Follows the first writes of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    next: u64,
    ahead: u64,
}

impl Sequence {
    /// Blocks `first..end` are needed. Gives how many blocks behind `end` are to be taken as well.
    pub fn needs(&mut self, first: u64, end: u64, block: BlockSize) -> u64 {
        let in_order = self.next != 0 && (self.next..=self.next + self.ahead).contains(&first);
        let most = (MOST_AHEAD_BYTES / block.bytes()).max(1);
        self.ahead = if in_order { (2 * self.ahead.max(end - first)).min(most) } else { 0 };
        self.next = end;
        self.ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_in_order_is_given_more_and_more_ahead_and_a_random_one_nothing() {
        let mut sequence = Sequence::default();
        let mut taken = Vec::new();
        let mut at = 0;
        for _ in 0..8 {
            let ahead = sequence.needs(at, at + 1, BlockSize::DEFAULT);
            at += 1 + ahead;
            taken.push(ahead);
        }
        assert_eq!(taken, [0, 2, 4, 8, 16, 32, 64, 64]);
        assert_eq!(sequence.needs(5000, 5001, BlockSize::DEFAULT), 0);
        assert_eq!(sequence.needs(70, 71, BlockSize::DEFAULT), 0);
    }
}
