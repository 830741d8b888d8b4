//! Owns: the judgement whether a slot's owner is gone, from looks at its heartbeat cell: pure, fed with times.
//! Promises: nobody is judged gone before the owner's lease has run out by any clock within the bound, nor by looks through a storage
//! that did not answer all the while. Must not know: how a cell is read, what is done to an owner that is gone.
//!
//! ```text
//! look      [began----ended]      [began--ended]   ...   [began--ended]
//!                     |<------------- at least D -------->|
//!                     since                               the same bytes: gone
//! ```
//!
//! The time counts from the *end* of the first look that showed these bytes to the *beginning* of the last one, so it is shorter than
//! the time for which the cell really stood still.

use std::time::Duration;

use crate::env::Instant;
use crate::format::Cell;
use crate::format::header::LeaseTimes;
use crate::lease;
use crate::sabotage::{Sabotage, active};

/// One look at a slot's cell.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// What it showed.
    pub cell: &'a Cell,
    /// Before the read was sent.
    pub began: Instant,
    /// After it was answered.
    pub ended: Instant,
}

/// What looks say of the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The cell has changed since the last look, or this is the first one, or the looks were interrupted.
    Lives,
    /// It stands still for this long.
    StandsStill(Duration),
    /// It stood still for longer than any clock within the bound allows: the lease is over.
    Gone,
}

/// A slot that is watched.
#[derive(Clone, Debug)]
pub struct Watch {
    cell: Cell,
    since: Instant,
    last_ended: Instant,
}

impl Watch {
    /// Begins with a first look.
    pub fn begin(look: Look<'_>) -> Watch {
        Watch { cell: look.cell.clone(), since: look.ended, last_ended: look.ended }
    }

    /// The image that stands still: a claim expects exactly this one.
    pub fn cell(&self) -> &Cell {
        &self.cell
    }

    /// The end of the first look that showed that image: the owner began its last renewal before.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// For how long it has been standing still by the looks so far.
    pub fn stood_still(&self) -> Duration {
        Duration::from_nanos(self.last_ended.0.saturating_sub(self.since.0))
    }

    /// Another look. `owner` are the lease parameters in the cell, `longest_gap` is the time without an answered look after which the
    /// storage is taken for disturbed: its owner could not renew either, and the watch begins anew.
    pub fn look(&mut self, look: Look<'_>, owner: &LeaseTimes, longest_gap: Duration) -> Judgement {
        let disturbed = look.ended.0.saturating_sub(self.last_ended.0) > longest_gap.as_nanos() as u64;
        if (disturbed && !active(Sabotage::GapIgnored)) || look.cell.image() != self.cell.image() {
            *self = Watch::begin(look);
            return Judgement::Lives;
        }
        self.last_ended = look.ended;
        let still = Duration::from_nanos(look.began.0.saturating_sub(self.since.0));
        if still >= lease::takeover_after(owner) { Judgement::Gone } else { Judgement::StandsStill(still) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::heartbeat::Heartbeat;
    use crate::format::layout;
    use crate::format::{CellContext, CellHeader, CellKind};
    use crate::units::{CellSize, Link, LunIndex, OpId, Seq, SlotId, SlotRef, Token, Uuid};

    const MS: u64 = 1_000_000;

    fn cell(beat: u64) -> Cell {
        let context = CellContext { volume: Uuid([1; 16]), cell_size: CellSize::B512 };
        let header = CellHeader {
            kind: CellKind::Heartbeat,
            address: layout::heartbeat_cell(LunIndex::new(1).unwrap(), SlotId(3)),
            seq: Seq(beat),
            op_id: OpId([beat as u8; 16]),
            writer: SlotRef::NOBODY,
            owner: None,
            link: Link(0),
            index: 0,
            token: Token(0),
        };
        Cell::encode(&context, header, &Heartbeat { beat, ..Heartbeat::free() }.encode())
    }

    fn look(cell: &Cell, at_ms: u64) -> Look<'_> {
        Look { cell, began: Instant(at_ms * MS), ended: Instant((at_ms + 10) * MS) }
    }

    #[test]
    fn an_owner_that_stands_still_is_gone_after_its_lease_and_not_before() {
        let (owner, gap) = (LeaseTimes::FAST, Duration::from_secs(3));
        let cell = cell(1);
        let mut watch = Watch::begin(look(&cell, 0));
        let needed = lease::takeover_after(&owner).as_millis() as u64;
        let mut at = 1000;
        while at < needed + 10 {
            assert_ne!(watch.look(look(&cell, at), &owner, gap), Judgement::Gone, "after {at} ms");
            at += 1000;
        }
        assert_eq!(watch.look(look(&cell, at), &owner, gap), Judgement::Gone);
    }

    #[test]
    fn a_renewal_or_a_gap_between_the_looks_begins_anew() {
        let (owner, gap) = (LeaseTimes::FAST, Duration::from_secs(3));
        let (one, two) = (cell(1), cell(2));
        let mut watch = Watch::begin(look(&one, 0));
        assert!(matches!(watch.look(look(&one, 2000), &owner, gap), Judgement::StandsStill(_)));
        assert_eq!(watch.look(look(&two, 4000), &owner, gap), Judgement::Lives);
        assert_eq!(watch.stood_still(), Duration::ZERO);
        assert_eq!(watch.look(look(&two, 40_000), &owner, gap), Judgement::Lives);
        assert_eq!(watch.cell().image(), two.image());
    }

    proptest! {
        /// Whatever the times of the looks: who is judged gone has shown one image for D, and no gap was longer than allowed.
        #[test]
        fn gone_means_that_one_image_was_seen_all_the_while(
            steps in proptest::collection::vec((0u64..6000, 0u64..500, proptest::bool::weighted(0.1)), 1..60),
        ) {
            let (owner, gap) = (LeaseTimes::FAST, Duration::from_secs(3));
            let (mut beat, mut now) = (1, 0);
            let mut shown = cell(beat);
            let mut watch = Watch::begin(look(&shown, now));
            let (mut first_ended, mut last_ended) = (10, 10);
            for (wait, took, renews) in steps {
                now += wait;
                if renews {
                    beat += 1;
                    shown = cell(beat);
                }
                let ended = now + took;
                let seen = Look { cell: &shown, began: Instant(now * MS), ended: Instant(ended * MS) };
                let judged = watch.look(seen, &owner, gap);
                if renews || ended.saturating_sub(last_ended) > 3000 {
                    first_ended = ended;
                    prop_assert_eq!(judged, Judgement::Lives);
                }
                last_ended = ended;
                let long_enough = now.saturating_sub(first_ended) >= lease::takeover_after(&owner).as_millis() as u64;
                prop_assert_eq!(judged == Judgement::Gone, long_enough && !renews);
                now = ended;
            }
        }
    }
}
