//! Promises of the simulator: one seed is one run, sound code passes, and each deliberate fault that has a number is noticed within it.

#[path = "simulator/taken_out.rs"]
mod taken_out;

use std::path::Path;
use std::process::{Command, Output};

use tests::harness::scale;
use tests::simulate::catalogue::{self, Sabotage};
use tests::simulate::plan::{Aim, Plan};
use tests::simulate::runner::{run_one, run_plans, run_seeds};
use tests::simulate::shrink::{kind_of, shrink};

/// Seeds that sound code has to pass; `VMFS_TEST_SCALE` multiplies them.
const SEEDS: u64 = 2000;
/// The same for plans that are aimed at one rule.
const AIMED: u64 = 100;

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

#[test]
fn sound_code_passes_all_seeds() {
    let outcome = run_seeds(0, scale(SEEDS), None, false);
    let failed: Vec<_> = outcome.failed.iter().map(|failed| (failed.seed, &failed.verdict.findings)).collect();
    assert!(failed.is_empty(), "simulate --replay SEED shows what happened: {failed:#?}");
    assert_eq!(outcome.run, scale(SEEDS));
}

#[test]
fn sound_code_passes_what_is_aimed_at_one_rule() {
    for aim in Aim::ALL {
        // Changes of which nobody hears make long runs.
        let count = scale(if aim == Aim::Unheard { AIMED / 10 } else { AIMED });
        let outcome = run_plans(&|seed| Plan::aimed(aim, seed), 0, count, None, false);
        let failed: Vec<_> = outcome.failed.iter().map(|failed| (failed.seed, &failed.verdict.findings)).collect();
        assert!(failed.is_empty(), "simulate --aim {} --replay SEED shows what happened: {failed:#?}", aim.name());
        assert_eq!(outcome.run, count);
    }
}

/// Seeds that failed once, and why.
const ONCE_FAILED: [(u64, &str); 9] = [
    (50_652, "a lock that stayed for an UNMAP on its way was given back by a later reader"),
    (15_103, "a lock that stayed for a write on its way was taken for one that nobody knew of"),
    (21_207, "a fenced host called the pointers of the next holder corrupt"),
    (22_529, "of two hosts that gave a file one new name both had moved it"),
    (89_370, "the same"),
    (35_270, "a creation that failed was found by the rebuilt name of its directory"),
    (78_366, "a slot was left clean with a lock that could not be given back"),
    (64_386, "the same, and who opened the file then made it live"),
    (9002, "the slot of a root cell was left clean though its body on another LUN was never written"),
];

#[test]
fn seeds_that_failed_once_pass() {
    for (seed, cause) in ONCE_FAILED {
        let findings = run_one(&Plan::of(seed), None, false).findings;
        assert!(findings.is_empty(), "seed {seed} ({cause}): {findings:#?}");
    }
}

/// All source files below a folder, as one text.
fn source_below(folder: &Path) -> String {
    let entries =
        std::fs::read_dir(folder).expect("the sources are there").map(|entry| entry.expect("readable").path());
    let texts = entries.map(|path| match path.is_dir() {
        true => source_below(&path),
        false => std::fs::read_to_string(&path).expect("source is text"),
    });
    texts.collect()
}

#[test]
fn each_deliberate_fault_is_compiled_in() {
    let engine = source_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmfs-core/src"));
    let is_missing = |sabotage: &&Sabotage| !engine.contains(&format!("active(Sabotage::{sabotage:?})"));
    let missing: Vec<_> = Sabotage::ALL.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "nothing asks for {missing:?}");
}

#[test]
fn each_deliberate_fault_that_has_a_number_is_noticed_within_it() {
    let measured = Sabotage::ALL.iter().filter(|sabotage| catalogue::seeds(**sabotage).is_some());
    let missed: Vec<_> = measured.filter(|sabotage| catalogue::try_out(**sabotage, 0).failed.is_empty()).collect();
    assert!(missed.is_empty(), "missed: {missed:?}");
}

#[test]
fn a_failing_schedule_shrinks_to_a_smaller_one_that_fails() {
    let sabotage = Some(Sabotage::LockIgnored);
    let failed = run_seeds(0, 200, sabotage, true).failed;
    let plan = Plan::of(failed.first().expect("the fault is noticed").seed);
    let smallest = shrink(&plan, sabotage);
    assert!(smallest.parts() < plan.parts(), "{} of {} parts are left", smallest.parts(), plan.parts());
    let kinds = |plan: &Plan| -> Vec<String> {
        run_one(plan, sabotage, false).findings.iter().map(|finding| kind_of(finding)).collect()
    };
    let kind = kinds(&plan).first().expect("it fails").clone();
    assert!(kinds(&smallest).contains(&kind));
    for nth in 0..smallest.parts() {
        assert!(!kinds(&smallest.without(nth)).contains(&kind), "part {nth} is not needed");
    }
}

fn simulate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments).output().expect("the simulator can be started")
}

fn last_line(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn the_program_says_in_its_last_line_and_its_status_what_passed() {
    let passed = simulate(&["--seeds", "12", "--first-seed", "100"]);
    assert_eq!((last_line(&passed).as_str(), passed.status.code()), ("12 passed, 0 failed", Some(0)));
    let failed = run_seeds(0, 200, Some(Sabotage::LockIgnored), true).failed;
    let seed = failed.first().expect("the fault is noticed").seed.to_string();
    let replayed = simulate(&["--replay", &seed, "--sabotage", "lock-ignored"]);
    assert_eq!((last_line(&replayed).as_str(), replayed.status.code()), ("0 passed, 1 failed", Some(1)));
    assert_eq!(simulate(&["--sabotage", "no-such-fault"]).status.code(), Some(2));
}
