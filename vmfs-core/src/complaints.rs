//! Owns: how often one complaint is told: what goes wrong again and again, because a LUN is lost, say, must not fill the log.
//! Promises: the first one is told at once, later ones with how many were left out; after a quiet time the next one is a first one.
//! Must not know: what is complained about.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::context::Context;
use crate::env::Instant;
use crate::units::LunIndex;

/// Between the first two lines of one complaint; each time it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// Never longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// A complaint that was not made for so long is over.
const QUIET: Duration = Duration::from_secs(300);

struct Complaint {
    /// When it was made last, told or not.
    made: Instant,
    /// When it may be told again.
    due: Instant,
    pause: Duration,
    left_out: u64,
}

/// The complaints of one mount, each about one thing and at most one LUN.
#[derive(Default)]
pub(crate) struct Complaints(RefCell<BTreeMap<(&'static str, Option<LunIndex>), Complaint>>);

impl Complaints {
    /// Whether a complaint is to be told at `now`: then how many were left out since it was told last.
    pub fn make(&self, about: &'static str, lun: Option<LunIndex>, now: Instant) -> Option<u64> {
        let mut all = self.0.borrow_mut();
        let first = Complaint { made: now, due: now, pause: FIRST_PAUSE, left_out: 0 };
        let is_over = |known: &Complaint| known.made.after(QUIET) < now;
        let complaint = all.entry((about, lun)).or_insert(first);
        if is_over(complaint) {
            *complaint = Complaint { made: now, due: now, pause: FIRST_PAUSE, left_out: 0 };
        }
        complaint.made = now;
        if now < complaint.due {
            complaint.left_out += 1;
            return None;
        }
        complaint.due = now.after(complaint.pause);
        complaint.pause = (complaint.pause * 2).min(LONGEST_PAUSE);
        Some(std::mem::take(&mut complaint.left_out))
    }
}

impl Context {
    /// Whether a complaint is to be told now: then how many like it were left out since it was told last.
    pub(crate) fn complain(&self, about: &'static str, lun: Option<LunIndex>) -> Option<u64> {
        self.complaints.make(about, lun, self.env().now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LUN: Option<LunIndex> = LunIndex::new(3);

    fn at(seconds: u64) -> Instant {
        Instant(seconds * 1_000_000_000)
    }

    #[test]
    fn a_day_of_one_complaint_is_some_dozens_of_lines_that_count_the_others() {
        let complaints = Complaints::default();
        let told: Vec<u64> = (0..86_400).step_by(2).filter_map(|s| complaints.make("lost", LUN, at(s))).collect();
        assert!(told.len() < 40, "{} lines", told.len());
        assert_eq!(&told[..3], [0, 29, 59]);
        assert!(told.len() as u64 + told.iter().sum::<u64>() <= 43_200);
    }

    #[test]
    fn another_lun_another_matter_and_a_new_trouble_after_a_quiet_time_are_told_at_once() {
        let complaints = Complaints::default();
        assert_eq!(complaints.make("lost", LUN, at(0)), Some(0));
        assert_eq!(complaints.make("lost", LUN, at(1)), None);
        assert_eq!(complaints.make("lost", None, at(1)), Some(0));
        assert_eq!(complaints.make("full", LUN, at(1)), Some(0));
        assert_eq!(complaints.make("lost", LUN, at(302)), Some(0));
        assert_eq!(complaints.make("lost", LUN, at(303)), None);
    }
}
