//! Owns: making a failing plan smaller.
//! Promises: what it gives still fails; no single part of it can be left out.
//! Must not know: why it fails.

use engine::sabotage::Sabotage;

use super::plan::Plan;
use super::runner::run_one;

/// Runs after which what is left is small enough.
const MOST_RUNS: u32 = 4000;

/// Leaves out operations and events, one at a time, while the run still fails.
pub fn shrink(plan: &Plan, sabotage: Option<Sabotage>) -> Plan {
    let mut smallest = plan.clone();
    let mut runs = 0;
    let mut nth = 0;
    let mut since_success = 0;
    while smallest.parts() > 0 && since_success < smallest.parts() && runs < MOST_RUNS {
        nth %= smallest.parts();
        let less = smallest.without(nth);
        runs += 1;
        if run_one(&less, sabotage, false).findings.is_empty() {
            nth += 1;
            since_success += 1;
        } else {
            smallest = less;
            since_success = 0;
        }
    }
    smallest
}
