//! Promises of the simulator: one seed is one run.

use tests::simulate::plan::Plan;
use tests::simulate::runner::run_one;

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in (0..40).chain([4711, 99_991]) {
        let plan = Plan::of(seed);
        let (first, second) = (run_one(&plan, None, true), run_one(&plan, None, true));
        assert_eq!((first.hash, first.virtual_ns), (second.hash, second.virtual_ns), "seed {seed}");
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
    assert_ne!(run_one(&Plan::of(1), None, false).hash, run_one(&Plan::of(2), None, false).hash);
}
