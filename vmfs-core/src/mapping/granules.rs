//! Owns: the life of a granule (unwritten, filling, filled, valid) and of the block that it lies in.
//! Promises: only the transitions of [`GranuleState::after`] happen; a granule is in exactly one state.
//! Must not know: which file offset a block has, I/O.

use crate::format::pointer::Granules;
use crate::units::{BlockAddress, GRANULES_PER_BLOCK};

/// State of one granule in the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GranuleState {
    /// Never written: reads as zeros, whatever the LUN holds there.
    Unwritten,
    /// One owner writes the whole granule; others wait.
    Filling,
    /// Written whole, its bit not yet on the LUN; in-place I/O is allowed.
    Filled,
    /// Its bit is on the LUN.
    Valid,
}

/// What can happen to a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GranuleEvent {
    /// An owner begins to write it.
    BeginFill,
    /// The owner has written it whole.
    EndFill,
    /// The owner gave up.
    AbandonFill,
    /// Its bit is on the LUN.
    Publish,
    /// A discard covers it whole. Nobody fills it then: the discard has waited for every data reference.
    Discard,
}

impl GranuleState {
    /// The state after `event`; `None` when the event cannot happen in this state.
    pub const fn after(self, event: GranuleEvent) -> Option<GranuleState> {
        use GranuleEvent as E;
        use GranuleState as S;
        Some(match (self, event) {
            (S::Unwritten, E::BeginFill) => S::Filling,
            (S::Filling, E::EndFill) => S::Filled,
            (S::Filling, E::AbandonFill) => S::Unwritten,
            (S::Filled, E::Publish) => S::Valid,
            (S::Unwritten | S::Filled | S::Valid, E::Discard) => S::Unwritten,
            _ => return None,
        })
    }
}

/// Where a block lies: its address and its byte offset on that LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The block.
    pub at: BlockAddress,
    /// Bytes from the LUN's start to the block's first byte.
    pub offset: u64,
}

/// One block of a file in the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// Where it lies.
    pub place: Place,
    /// Granules whose bit is on the LUN.
    pub valid: Granules,
    /// Granules written whole and not yet published.
    pub filled: Granules,
    /// Granules that an owner is writing.
    pub filling: Granules,
    /// No pointer on the LUN names the block yet.
    pub fresh: bool,
    /// A fresh block whose pointer is published even if nothing of it was written (fallocate, thick disks).
    pub wanted: bool,
}

impl BlockState {
    /// A block just taken from the block table: no pointer names it, nothing was written.
    pub const fn fresh(place: Place) -> BlockState {
        BlockState {
            place,
            valid: Granules::NONE,
            filled: Granules::NONE,
            filling: Granules::NONE,
            fresh: true,
            wanted: false,
        }
    }

    /// A block as a pointer on the LUN describes it.
    pub const fn published(place: Place, valid: Granules) -> BlockState {
        BlockState { valid, fresh: false, ..BlockState::fresh(place) }
    }

    /// State of granule `g` (0..16).
    pub const fn state(&self, g: u32) -> GranuleState {
        if self.valid.has(g) {
            GranuleState::Valid
        } else if self.filled.has(g) {
            GranuleState::Filled
        } else if self.filling.has(g) {
            GranuleState::Filling
        } else {
            GranuleState::Unwritten
        }
    }

    /// Carries `event` out on each granule of `which` where it is legal and returns those.
    pub fn apply(&mut self, which: Granules, event: GranuleEvent) -> Granules {
        let mut done = Granules::NONE;
        for g in 0..GRANULES_PER_BLOCK as u32 {
            if !which.has(g) {
                continue;
            }
            let Some(next) = self.state(g).after(event) else { continue };
            let bit = Granules(1 << g);
            (self.valid, self.filled, self.filling) =
                (self.valid.without(bit), self.filled.without(bit), self.filling.without(bit));
            match next {
                GranuleState::Unwritten => {}
                GranuleState::Filling => self.filling = self.filling.union(bit),
                GranuleState::Filled => self.filled = self.filled.union(bit),
                GranuleState::Valid => self.valid = self.valid.union(bit),
            }
            done = done.union(bit);
        }
        done
    }

    /// Granules that a reader must read from the LUN and a writer may write in place.
    pub const fn readable(&self) -> Granules {
        self.valid.union(self.filled)
    }

    /// Whether the LUN says the same, so that the entry can be forgotten and read again.
    pub const fn is_clean(&self) -> bool {
        !self.fresh && self.filled.0 == 0 && self.filling.0 == 0
    }

    /// Whether a flush has something to publish here.
    pub const fn wants_publishing(&self) -> bool {
        self.filled.0 != 0 || (self.fresh && self.wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockNo, LunIndex};
    use proptest::prelude::*;

    const PLACE: Place =
        Place { at: BlockAddress { lun: LunIndex::new(1).unwrap(), block: BlockNo::new(7).unwrap() }, offset: 7 << 20 };

    #[test]
    fn a_granule_has_one_filler_and_is_published_only_after_it_was_filled() {
        let mut block = BlockState::fresh(PLACE);
        assert_eq!(block.apply(Granules(0b11), GranuleEvent::BeginFill), Granules(0b11));
        assert_eq!(block.apply(Granules(0b110), GranuleEvent::BeginFill), Granules(0b100));
        assert_eq!(block.apply(Granules(0b111), GranuleEvent::Publish), Granules::NONE);
        assert_eq!(block.apply(Granules(0b001), GranuleEvent::EndFill), Granules(1));
        assert_eq!(block.apply(Granules(0b010), GranuleEvent::AbandonFill), Granules(2));
        assert_eq!(block.readable(), Granules(1));
        assert_eq!(block.apply(Granules::ALL, GranuleEvent::Publish), Granules(1));
        assert_eq!((block.valid, block.filled, block.filling), (Granules(1), Granules::NONE, Granules(4)));
    }

    #[test]
    fn a_discard_between_fill_and_publish_cancels_the_publish() {
        let mut block = BlockState::fresh(PLACE);
        block.apply(Granules(1), GranuleEvent::BeginFill);
        block.apply(Granules(1), GranuleEvent::EndFill);
        block.apply(Granules(1), GranuleEvent::Discard);
        assert_eq!(block.apply(Granules(1), GranuleEvent::Publish), Granules::NONE);
        assert_eq!(block.state(0), GranuleState::Unwritten);
    }

    fn event() -> impl Strategy<Value = GranuleEvent> {
        prop::sample::select(vec![
            GranuleEvent::BeginFill,
            GranuleEvent::EndFill,
            GranuleEvent::AbandonFill,
            GranuleEvent::Publish,
            GranuleEvent::Discard,
        ])
    }

    proptest! {
        #[test]
        fn each_granule_is_always_in_exactly_one_state(steps in prop::collection::vec((any::<u16>(), event()), 0..40)) {
            let mut block = BlockState::fresh(PLACE);
            for (bits, event) in steps {
                block.apply(Granules(bits), event);
                prop_assert_eq!(block.valid.0 & block.filled.0, 0);
                prop_assert_eq!(block.valid.0 & block.filling.0, 0);
                prop_assert_eq!(block.filled.0 & block.filling.0, 0);
            }
        }
    }
}
