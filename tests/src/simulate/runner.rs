//! Owns: many runs on all cores, with or without a sabotage.
//! Promises: which seeds are run does not depend on the number of cores; the failing ones are given in ascending order.
//! Must not know: how results are shown.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine::sabotage::{self, Sabotage};
use parking_lot::Mutex;

use super::plan::Plan;
use super::run::{Verdict, carry_out};

/// A run that failed.
#[derive(Clone, Debug)]
pub struct Failed {
    /// Its seed.
    pub seed: u64,
    /// What broke.
    pub verdict: Verdict,
}

/// What came of some seeds.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Seeds that were run.
    pub run: u64,
    /// Those that failed, ascending.
    pub failed: Vec<Failed>,
}

/// Runs the plans of `count` seeds from `first` on. `until_one`: stops soon after the first failure.
pub fn run_seeds(first: u64, count: u64, sabotage: Option<Sabotage>, until_one: bool) -> Outcome {
    run_plans(&Plan::of, first, count, sabotage, until_one)
}

/// The same with the plans that `plan_of` gives.
pub fn run_plans(
    plan_of: &(dyn Fn(u64) -> Plan + Sync),
    first: u64,
    count: u64,
    sabotage: Option<Sabotage>,
    until_one: bool,
) -> Outcome {
    let (next, stop) = (AtomicU64::new(first), AtomicBool::new(false));
    let failed = Mutex::new(Vec::new());
    let run = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first.saturating_add(count) || (until_one && stop.load(Ordering::Relaxed)) {
                        return;
                    }
                    let verdict = run_one(&plan_of(seed), sabotage, false);
                    run.fetch_add(1, Ordering::Relaxed);
                    if !verdict.findings.is_empty() {
                        stop.store(true, Ordering::Relaxed);
                        failed.lock().push(Failed { seed, verdict });
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner();
    failed.sort_by_key(|failed| failed.seed);
    Outcome { run: run.into_inner(), failed }
}

/// One run on this thread.
pub fn run_one(plan: &Plan, sabotage: Option<Sabotage>, traced: bool) -> Verdict {
    // What runs begin with is made by sound code.
    super::run::prepare(plan);
    sabotage::set(sabotage);
    let verdict = carry_out(plan, traced);
    sabotage::set(None);
    verdict
}
