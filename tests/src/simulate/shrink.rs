//! Owns: making a failing plan smaller.
//! Promises: what it gives still fails, by the same kind of finding as the whole; no single part of it can be left out.
//! Must not know: why it fails.

use engine::sabotage::Sabotage;

use super::plan::Plan;
use super::runner::run_one;

/// Runs after which what is left is small enough.
const MOST_RUNS: u32 = 4000;

/// A finding without its numbers, so that the same one of another run is known again.
pub fn kind_of(finding: &str) -> String {
    finding.chars().filter(|c| c.is_alphabetic()).collect()
}

/// Leaves out operations and events, one at a time, while the run still fails by what it fails by first.
pub fn shrink(plan: &Plan, sabotage: Option<Sabotage>) -> Plan {
    let mut smallest = plan.clone();
    let mut runs = 0;
    let mut nth = 0;
    let mut since_success = 0;
    let Some(kind) = run_one(plan, sabotage, false).findings.first().map(|finding| kind_of(finding)) else {
        return smallest;
    };
    while smallest.parts() > 0 && since_success < smallest.parts() && runs < MOST_RUNS {
        nth %= smallest.parts();
        let less = smallest.without(nth);
        runs += 1;
        if !run_one(&less, sabotage, false).findings.iter().any(|finding| kind_of(finding) == kind) {
            nth += 1;
            since_success += 1;
        } else {
            smallest = less;
            since_success = 0;
        }
    }
    smallest
}
