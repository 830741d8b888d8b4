//! Owns: the life of one slot that the daemon keeps: (state, now, event) -> (state, actions).
//! Promises: one renewal in flight; the gate is opened by an Applied renewal only, and never for a mount that is gone; a slot that was
//! lost is never touched again. Must not know: sockets, cells, how a renewal is sent.
//!
//! ```text
//!            joined                    mount gone (or not back within a lease)          drain proof
//!  ────────> Kept ─────────────────────────────────> Abandoned ─────────────────────> dirty, forgotten
//!  resumed     │  renewed every H                        │ none within D: left to takeover, forgotten
//!  ────────>   └── fenced, rolled back ──> forgotten <───┘
//! ```

use std::time::Duration;

use vmfs_core::env::Instant;
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::keeper::Pace;
use vmfs_core::lease;

/// Between two looks whether an abandoned mount's I/O has ended.
const DRAIN_LOOKS_EVERY: Duration = Duration::from_millis(200);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed. `chance` is random.
    Tick {
        /// For the jitter.
        chance: u8,
    },
    /// A renewal was Applied.
    Renewed {
        /// End of the lease.
        lease_until: Instant,
    },
    /// A renewal, or a look for drained I/O, failed: nothing is known.
    Failed,
    /// The slot is not this incarnation's any more.
    Over,
    /// The mount's connection has ended.
    MountGone,
    /// The mount has connected (again).
    MountBack,
    /// Something of the mount may still be in flight.
    NotDrained,
    /// The slot was made dirty, or nothing can be proven here: takeover has to do.
    LeftBehind,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Renew; ends in `Renewed`, `Failed` or `Over`.
    Renew,
    /// Make the slot dirty if nothing of the mount is left; ends in `LeftBehind`, `NotDrained`, `Failed` or `Over`.
    MakeDirty,
    /// Open the gate until the lease ends.
    Open {
        /// End of the lease.
        lease_until: Instant,
    },
    /// Close the gate of this generation for good.
    Poison,
    /// Tell the mount that it is over.
    TellOver,
    /// Drop the slot from the books.
    Forget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Kept,
    Abandoned { give_up: Instant },
    Forgotten,
}

/// One slot's life.
#[derive(Clone, Debug)]
pub struct Life {
    phase: Phase,
    times: LeaseTimes,
    pace: Pace,
    /// The mount is connected.
    attached: bool,
    /// A mount that is not connected by then is gone.
    expected_until: Instant,
    lease_until: Option<Instant>,
    in_flight: bool,
    due: Instant,
}

impl Life {
    /// A slot that was just joined for a connected mount.
    pub fn joined(times: LeaseTimes, now: Instant, lease_until: Instant) -> Life {
        let due = now.after(Pace::default().wait(&times, 0));
        Life { attached: true, lease_until: Some(lease_until), due, ..Life::resumed(times, now) }
    }

    /// A slot that was kept before this daemon began: it is looked at and renewed at once, and its mount has one lease to come back.
    pub fn resumed(times: LeaseTimes, now: Instant) -> Life {
        let lease = Duration::from_millis(times.lease_ms.min(lease::LONGEST_LEASE_MS).into());
        Life {
            phase: Phase::Kept,
            times,
            pace: Pace::default(),
            attached: false,
            expected_until: now.after(lease),
            lease_until: None,
            in_flight: false,
            due: now,
        }
    }

    /// When the next [`Event::Tick`] has something to do; `None` while a command is in flight.
    pub fn due(&self) -> Option<Instant> {
        (!self.in_flight && self.phase != Phase::Forgotten).then_some(self.due)
    }

    /// In a word, for people.
    pub fn describe(&self) -> &'static str {
        match self.phase {
            Phase::Kept if self.attached => "kept",
            Phase::Kept => "waits for its mount",
            Phase::Abandoned { .. } => "abandoned",
            Phase::Forgotten => "over",
        }
    }

    /// End of the last lease that is known.
    pub fn lease_until(&self) -> Option<Instant> {
        self.lease_until
    }

    /// The only way on.
    pub fn step(&mut self, now: Instant, event: Event) -> Vec<Action> {
        if matches!(event, Event::Renewed { .. } | Event::Failed | Event::Over | Event::NotDrained | Event::LeftBehind)
        {
            self.in_flight = false;
        }
        match (self.phase, event) {
            (Phase::Forgotten, _) => Vec::new(),
            (_, Event::Over) => {
                self.phase = Phase::Forgotten;
                vec![Action::Poison, Action::TellOver, Action::Forget]
            }
            (Phase::Kept, Event::Tick { chance }) => self.tick(now, chance),
            (Phase::Kept, Event::Renewed { lease_until }) => {
                self.pace.ended(true);
                self.lease_until = Some(lease_until);
                if self.attached { vec![Action::Open { lease_until }] } else { Vec::new() }
            }
            (Phase::Kept, Event::Failed) => {
                if self.pace.ended(false) {
                    self.due = self.due.min(now.after(self.pace.wait(&self.times, 0)));
                }
                Vec::new()
            }
            (Phase::Kept, Event::MountGone) => self.abandon(now),
            (Phase::Kept, Event::MountBack) => {
                self.attached = true;
                // A lease that has ended meanwhile opens nothing: the gate looks at the clock.
                self.lease_until.map(|lease_until| Action::Open { lease_until }).into_iter().collect()
            }
            (Phase::Kept, Event::NotDrained | Event::LeftBehind) => Vec::new(),
            (Phase::Abandoned { give_up }, Event::Tick { .. }) => {
                if self.in_flight || now < self.due {
                    return Vec::new();
                }
                if now >= give_up {
                    self.phase = Phase::Forgotten;
                    return vec![Action::Forget];
                }
                self.in_flight = true;
                self.due = now.after(DRAIN_LOOKS_EVERY);
                vec![Action::MakeDirty]
            }
            (Phase::Abandoned { .. }, Event::LeftBehind) => {
                self.phase = Phase::Forgotten;
                vec![Action::Forget]
            }
            // A mount that was given up does not come back: its gate is poisoned.
            (Phase::Abandoned { .. }, Event::MountBack) => vec![Action::Poison, Action::TellOver],
            (Phase::Abandoned { .. }, Event::Renewed { .. } | Event::Failed | Event::NotDrained | Event::MountGone) => {
                Vec::new()
            }
        }
    }

    fn tick(&mut self, now: Instant, chance: u8) -> Vec<Action> {
        if self.in_flight || now < self.due {
            return Vec::new();
        }
        if !self.attached && now >= self.expected_until {
            return self.abandon(now);
        }
        self.in_flight = true;
        self.due = now.after(self.pace.wait(&self.times, chance));
        vec![Action::Renew]
    }

    fn abandon(&mut self, now: Instant) -> Vec<Action> {
        self.attached = false;
        self.phase = Phase::Abandoned { give_up: now.after(lease::takeover_after(&self.times)) };
        self.due = now;
        vec![Action::Poison]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIMES: LeaseTimes = LeaseTimes::FAST;
    const SECOND: u64 = 1_000_000_000;
    const TICK: Event = Event::Tick { chance: 0 };

    fn at(seconds: u64) -> Instant {
        Instant(seconds * SECOND)
    }

    #[test]
    fn a_slot_is_renewed_every_h_with_one_renewal_in_flight() {
        let mut life = Life::joined(TIMES, at(0), at(10));
        assert_eq!(life.step(at(0), TICK), []);
        assert_eq!(life.step(at(1), TICK), [Action::Renew]);
        assert_eq!(life.step(at(5), TICK), []);
        assert_eq!(life.step(at(5), Event::Renewed { lease_until: at(11) }), [Action::Open { lease_until: at(11) }]);
        assert_eq!(life.step(at(5), TICK), [Action::Renew]);
        assert_eq!(life.step(at(5), Event::Failed), []);
        assert_eq!(life.step(Instant(5 * SECOND + SECOND / 4), TICK), [Action::Renew]);
    }

    #[test]
    fn a_daemon_that_comes_back_renews_at_once_and_opens_the_gate_when_the_mount_is_back() {
        let mut life = Life::resumed(TIMES, at(100));
        assert_eq!(life.step(at(100), TICK), [Action::Renew]);
        assert_eq!(life.step(at(100), Event::Renewed { lease_until: at(110) }), []);
        assert_eq!(life.step(at(101), Event::MountBack), [Action::Open { lease_until: at(110) }]);
    }

    #[test]
    fn a_mount_that_does_not_come_back_within_a_lease_is_given_up() {
        let mut life = Life::resumed(TIMES, at(100));
        for second in 100..110 {
            assert_eq!(life.step(at(second), TICK), [Action::Renew]);
            life.step(at(second), Event::Renewed { lease_until: at(second + 10) });
        }
        assert_eq!(life.step(at(110), TICK), [Action::Poison]);
        assert_eq!(life.step(at(110), TICK), [Action::MakeDirty]);
        assert_eq!(life.step(at(110), Event::NotDrained), []);
        assert_eq!(life.step(at(111), TICK), [Action::MakeDirty]);
        assert_eq!(life.step(at(111), Event::LeftBehind), [Action::Forget]);
    }

    #[test]
    fn a_dead_mounts_gate_is_poisoned_at_once_and_a_renewal_that_was_on_its_way_opens_nothing() {
        let mut life = Life::joined(TIMES, at(0), at(10));
        assert_eq!(life.step(at(1), TICK), [Action::Renew]);
        assert_eq!(life.step(at(1), Event::MountGone), [Action::Poison]);
        assert_eq!(life.step(at(1), TICK), []);
        assert_eq!(life.step(at(2), Event::Renewed { lease_until: at(11) }), []);
        assert_eq!(life.step(at(2), TICK), [Action::MakeDirty]);
        assert_eq!(life.step(at(2), Event::NotDrained), []);
        assert_eq!(life.step(at(14), TICK), [Action::Forget]);
        assert_eq!(life.due(), None);
    }

    #[test]
    fn a_lost_slot_is_told_once_and_never_touched_again() {
        let mut life = Life::joined(TIMES, at(0), at(10));
        life.step(at(1), TICK);
        assert_eq!(life.step(at(1), Event::Over), [Action::Poison, Action::TellOver, Action::Forget]);
        assert_eq!(life.step(at(9), TICK), []);
        assert_eq!(life.step(at(9), Event::MountBack), []);
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            6 => any::<u8>().prop_map(|chance| Event::Tick { chance }),
            3 => Just(Event::Failed),
            3 => Just(Event::NotDrained),
            1 => Just(Event::Over),
            2 => Just(Event::MountGone),
            2 => Just(Event::MountBack),
            4 => Just(Event::Renewed { lease_until: Instant(0) }),
            1 => Just(Event::LeftBehind),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order: two commands are never in flight, and after a poisoning the gate is never opened.
        #[test]
        fn one_command_at_a_time_and_no_gate_opens_after_it_was_poisoned(
            steps in prop::collection::vec((0u64..3000, event()), 1..80), resumed: bool,
        ) {
            let mut life = if resumed { Life::resumed(TIMES, at(1)) } else { Life::joined(TIMES, at(1), at(11)) };
            let (mut now, mut in_flight, mut poisoned, mut forgotten) = (at(1), false, false, false);
            for (ms, event) in steps {
                now = now.after(Duration::from_millis(ms));
                let ends = !matches!(event, Event::Tick { .. } | Event::MountGone | Event::MountBack);
                if ends && !in_flight {
                    continue;
                }
                in_flight &= !ends;
                for action in life.step(now, event) {
                    match action {
                        Action::Renew | Action::MakeDirty => {
                            prop_assert!(!in_flight && !forgotten);
                            prop_assert!(action == Action::MakeDirty || !poisoned);
                            in_flight = true;
                        }
                        Action::Open { .. } => prop_assert!(!poisoned),
                        Action::Poison => poisoned = true,
                        Action::Forget => {
                            prop_assert!(!forgotten && poisoned);
                            forgotten = true;
                        }
                        Action::TellOver => prop_assert!(poisoned),
                    }
                }
            }
        }
    }
}
