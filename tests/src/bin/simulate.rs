//! The simulator: hosts on simulated LUNs, many seeds on all cores, oracles, and the sabotage catalogue that proves the oracles.

use std::process::ExitCode;

use clap::Parser;
use tests::simulate::catalogue::{self, Sabotage};
use tests::simulate::plan::Aim;
use tests::simulate::runner::{Failed, run_one, run_plans};
use tests::simulate::shrink::shrink;

/// Failing seeds that are told in full.
const TOLD: usize = 5;
/// Lines of a trace that are shown with a failing seed, and with a replayed one.
const FEW_LINES: usize = 25;
const MANY_LINES: usize = 4000;

/// Runs hosts on simulated LUNs and judges what they do
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  simulate --seeds 2000\n  simulate --sabotage all\n  simulate --replay 4711\n\nThe last line \
                  is \"N passed, N failed\"; the exit status is 1 when any failed."
)]
struct Arguments {
    /// How many seeds to run
    #[arg(long, value_name = "N", default_value_t = 1000)]
    seeds: u64,
    /// The first of them
    #[arg(long, value_name = "K", default_value_t = 0)]
    first_seed: u64,
    /// Turn a deliberate fault on that the oracles must notice; all: the whole catalogue; list: show it
    #[arg(long, value_name = "NAME|all|list")]
    sabotage: Option<String>,
    /// Plans that go for one rule instead of plans of all kinds
    #[arg(long, value_name = "NAME", value_parser = aim_named)]
    aim: Option<Aim>,
    /// Run one seed; when it fails, make it smaller and show what happens
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
}

fn aim_named(name: &str) -> Result<Aim, String> {
    let known = || Aim::ALL.map(Aim::name).join(", ");
    Aim::from_name(name).ok_or_else(|| format!("plans are aimed at one of {}", known()))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A panic is a finding and is told as one.
    std::panic::set_hook(Box::new(|_| ()));
    let chosen = match arguments.sabotage.as_deref() {
        None => Vec::new(),
        Some("list") => {
            for sabotage in Sabotage::ALL {
                let within = match catalogue::seeds(*sabotage) {
                    Some(seeds) => format!("within {seeds:>4} seeds"),
                    None => "not measured     ".to_owned(),
                };
                let aim = catalogue::aim(*sabotage).map_or_else(String::new, |aim| format!(" of --aim {}", aim.name()));
                println!("{:<24} {within}{aim}: breaks \"{}\"", sabotage.name(), sabotage.breaks());
            }
            return ExitCode::SUCCESS;
        }
        Some("all") => Sabotage::ALL.to_vec(),
        Some(name) => match Sabotage::from_name(name) {
            Some(sabotage) => vec![sabotage],
            None => {
                eprintln!("simulate: there is no sabotage \"{name}\"; --sabotage list shows them");
                return ExitCode::from(2);
            }
        },
    };
    let (passed, failed) = match (arguments.replay, chosen.is_empty()) {
        (Some(seed), _) => replay(seed, arguments.aim, chosen.first().copied()),
        (None, true) => seeds(&arguments),
        (None, false) => sabotages(&chosen, arguments.first_seed),
    };
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn seeds(arguments: &Arguments) -> (u64, u64) {
    let start = std::time::Instant::now();
    let plan_of = |seed| catalogue::plan_of(arguments.aim, seed);
    let outcome = run_plans(&plan_of, arguments.first_seed, arguments.seeds, None, false);
    for Failed { seed, verdict } in outcome.failed.iter().take(TOLD) {
        println!("seed {seed} failed:");
        verdict.findings.iter().for_each(|finding| println!("  {finding}"));
        let trace = run_one(&plan_of(*seed), None, true).trace;
        trace[trace.len().saturating_sub(FEW_LINES)..].iter().for_each(|line| println!("    {line}"));
        let aim = arguments.aim.map_or_else(String::new, |aim| format!(" --aim {}", aim.name()));
        println!("  replay: cargo run --release -p tests --bin simulate -- --replay {seed}{aim}");
    }
    if outcome.failed.len() > TOLD {
        let more: Vec<String> = outcome.failed[TOLD..].iter().map(|failed| failed.seed.to_string()).collect();
        println!("and seeds {}", more.join(", "));
    }
    let (seconds, failed) = (start.elapsed().as_secs_f64(), outcome.failed.len() as u64);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let rate = outcome.run as f64 / seconds;
    println!("{rate:.0} seeds a second, {:.0} a second and core", rate / cores as f64);
    (outcome.run - failed, failed)
}

fn sabotages(chosen: &[Sabotage], first_seed: u64) -> (u64, u64) {
    let (mut caught, mut missed) = (0, 0);
    for sabotage in chosen {
        let outcome = catalogue::try_out(*sabotage, first_seed);
        match outcome.failed.first() {
            Some(failed) => {
                caught += 1;
                let finding = failed.verdict.findings.first().map_or("", String::as_str);
                println!("{:<22} caught by seed {}: {finding}", sabotage.name(), failed.seed);
            }
            None => {
                missed += 1;
                println!("{:<22} MISSED in {} seeds: breaks \"{}\"", sabotage.name(), outcome.run, sabotage.breaks());
            }
        }
    }
    (caught, missed)
}

fn replay(seed: u64, aim: Option<Aim>, sabotage: Option<Sabotage>) -> (u64, u64) {
    let plan = catalogue::plan_of(aim.or_else(|| sabotage.and_then(catalogue::aim)), seed);
    let verdict = run_one(&plan, sabotage, true);
    if verdict.findings.is_empty() {
        println!("seed {seed}: nothing is wrong; {} operations and events, hash {:016x}", plan.parts(), verdict.hash);
        return (1, 0);
    }
    let smallest = shrink(&plan, sabotage);
    let verdict = run_one(&smallest, sabotage, true);
    println!(
        "seed {seed} failed; the smallest schedule that fails has {} of {} parts:",
        smallest.parts(),
        plan.parts()
    );
    println!("{smallest:#?}");
    let trace = &verdict.trace;
    trace[trace.len().saturating_sub(MANY_LINES)..].iter().for_each(|line| println!("    {line}"));
    verdict.findings.iter().for_each(|finding| println!("  {finding}"));
    (0, 1)
}
