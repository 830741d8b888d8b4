//! Owns: the command fsck.vmfs: what it prints and its exit status, as fsck(8) has them.
//! Promises: nothing is written unless a repair is asked for; a volume that a host uses is not judged unless asked, and never repaired.
//! Must not know: what is checked and repaired.

mod repair;
mod undo;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use clap::Parser;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use vmfs_core::check::{Finding, Observer, Phase, Progress, Report, Severity, Structure, check, hosts_in_use};
use vmfs_core::env::Env;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::lun::OpenLun;
use vmfs_core::real_env::RealEnv;

use crate::terminal::{block_on, fail, open_luns, progress_bar, say, say_json, usage, watching};

/// fsck(8): errors corrected.
const CORRECTED: u8 = 1;
/// fsck(8): errors left uncorrected.
const UNCORRECTED: u8 = 4;
/// fsck(8): operational error.
const OPERATIONAL: u8 = 8;
/// fsck(8): usage or syntax error.
const USAGE: u8 = 16;
/// fsck(8): ended by the user.
const CANCELLED: u8 = 32;
/// Findings of one kind that are printed.
const PRINTED: u64 = 200;
/// Findings that a JSON report holds.
const REPORTED: usize = 10_000;

const AFTER_HELP: &str = "\
Examples:
  fsck.vmfs -n /dev/sdb /dev/sdc          checks; all LUNs of the volume, in any order
  fsck.vmfs -p /dev/sdb /dev/sdc          and puts right what a host that died left behind
  fsck.vmfs -y -u undo /dev/sdb           repairs everything; what is overwritten goes to the file undo first
  fsck.vmfs --undo undo /dev/sdb          takes that repair back

The volume must not be mounted anywhere. \"recoverable\" is what a host that died leaves behind by right; it is no fault.
Exit status: 0 no rule is broken, 1 errors were corrected, 4 errors are left, 8 it could not be carried out, 16 usage,
32 ended by the user; several are added up.";

/// Checks every rule of the format on an unmounted VMFS volume, and repairs it.
#[derive(Debug, Parser)]
#[command(name = "fsck.vmfs", version, after_help = AFTER_HELP)]
struct Arguments {
    /// LUNs of the volume, all of them
    #[arg(value_name = "LUN", required = true)]
    luns: Vec<String>,
    /// Check only, change nothing (as without any of -p, -r, -y)
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes", "interactive"])]
    no: bool,
    /// Repair what needs no consent: leaks, stale marks, slots that were not left, what has a sound copy
    #[arg(short = 'p', visible_short_alias = 'a')]
    preen: bool,
    /// Repair, and ask before anything that can lose something
    #[arg(short = 'r', conflicts_with_all = ["preen", "yes"])]
    interactive: bool,
    /// Repair everything; lost names go to /lost+found, what cannot be saved is removed
    #[arg(short = 'y', conflicts_with = "preen")]
    yes: bool,
    /// Write what a repair overwrites to this new file first
    #[arg(short = 'u', value_name = "FILE")]
    undo_file: Option<PathBuf>,
    /// Put back what is in this file, written by -u
    #[arg(long, value_name = "FILE", conflicts_with_all = ["no", "preen", "yes", "interactive", "undo_file", "force"])]
    undo: Option<PathBuf>,
    /// Parts of blocks of which a repair cannot tell whether they were ever written read as zeros
    #[arg(long)]
    zero_unknown: bool,
    /// Check also when a host uses the volume: changes under way look like errors
    #[arg(short = 'f', long, conflicts_with_all = ["preen", "yes", "interactive"])]
    force: bool,
    /// Print every finding, however many of a kind there are
    #[arg(short, long)]
    verbose: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn repairs(&self) -> bool {
        self.preen || self.yes || self.interactive
    }
}

/// Runs the command and gives its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error, USAGE),
    };
    if arguments.undo_file.is_some() && !arguments.repairs() {
        return fail("fsck.vmfs", "-u is for a repair: give -p, -r or -y too", USAGE);
    }
    let done = match &arguments.undo {
        Some(path) => block_on(run_undo(&arguments, path)),
        None if arguments.repairs() => block_on(run_repair(&arguments)),
        None => block_on(run_check(&arguments)),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail("fsck.vmfs", error, OPERATIONAL),
    }
}

async fn run_undo(arguments: &Arguments, path: &std::path::Path) -> Result<u8, FsError> {
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let luns = open_luns(&arguments.luns, OpenLun::default())?;
    let count = repair::put_back(path, &env, &luns).await?;
    match arguments.json {
        true => say_json(&json!({ "ranges": count })),
        false => say(format!("{count} ranges were put back from {}", path.display())),
    }
    Ok(0)
}

async fn run_repair(arguments: &Arguments) -> Result<u8, FsError> {
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let luns = open_luns(&arguments.luns, OpenLun::default())?;
    let mut printer = Printer::new(arguments);
    let outcome = repair::run(arguments, &env, &luns, &mut printer).await;
    printer.end();
    let outcome = outcome?;
    let report = &outcome.repaired.report;
    if arguments.json {
        let mut facts = facts(report, &printer);
        for (name, value) in outcome.facts.as_object().into_iter().flatten() {
            facts[name] = value.clone();
        }
        say_json(&facts);
    } else {
        printer.say_omitted();
        summarise(report);
        say(format!("{} repairs, {} not allowed", outcome.repaired.repairs, outcome.repaired.refused));
    }
    let corrected = if outcome.repaired.repairs > 0 { CORRECTED } else { 0 };
    let left = if report.is_clean() { 0 } else { UNCORRECTED };
    Ok(corrected | left | if outcome.ended { CANCELLED } else { 0 })
}

async fn run_check(arguments: &Arguments) -> Result<u8, FsError> {
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let luns = open_luns(&arguments.luns, OpenLun { read_only: true, refuse_busy_device: false })?;
    if !arguments.force {
        let users = watching("fsck.vmfs", hosts_in_use(&env, &luns)).await?;
        if !users.is_empty() {
            let message = format!(
                "the volume is in use by {}; unmount it there first, or look all the same with --force",
                users.join(", ")
            );
            return Err(FsError::refused(FsErrorKind::Busy, message));
        }
    }
    let mut printer = Printer::new(arguments);
    let report = check(&luns, &mut printer).await;
    printer.end();
    let report = report?;
    if arguments.json {
        say_json(&facts(&report, &printer));
    } else {
        printer.say_omitted();
        summarise(&report);
    }
    Ok(if report.is_clean() { 0 } else { UNCORRECTED })
}

/// Prints findings as they come, and the bar.
struct Printer {
    json: bool,
    verbose: bool,
    bar: Option<(Phase, u64, ProgressBar)>,
    kinds: BTreeMap<(Severity, Structure, &'static str), u64>,
    kept: Vec<Finding>,
    omitted: u64,
}

impl Printer {
    fn new(arguments: &Arguments) -> Printer {
        let (json, verbose) = (arguments.json, arguments.verbose);
        Printer { json, verbose, bar: None, kinds: BTreeMap::new(), kept: Vec::new(), omitted: 0 }
    }

    fn end(&mut self) {
        if let Some((_, _, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say_omitted(&self) {
        for ((severity, structure, field), count) in &self.kinds {
            if *count > PRINTED && !self.verbose {
                say(format!("{severity}: {} more of {} {field} (-v prints all)", count - PRINTED, structure.name()));
            }
        }
    }
}

impl Observer for Printer {
    fn finding(&mut self, finding: Finding) {
        if self.json {
            match self.kept.len() < REPORTED {
                true => self.kept.push(finding),
                false => self.omitted += 1,
            }
            return;
        }
        let count = self.kinds.entry((finding.severity, finding.structure, finding.field)).or_default();
        *count += 1;
        if *count > PRINTED && !self.verbose {
            return;
        }
        match &self.bar {
            Some((_, _, bar)) => bar.suspend(|| say(&finding)),
            None => say(&finding),
        }
    }

    fn progress(&mut self, progress: Progress) {
        let current =
            matches!(&self.bar, Some((phase, total, _)) if (*phase, *total) == (progress.phase, progress.total));
        if !current {
            self.end();
            let (what, bytes) = match progress.phase {
                Phase::BlockTables => ("block tables", true),
                Phase::Units => ("unit containers", true),
                Phase::Objects => ("objects, by FD container", false),
                Phase::Space => ("unreached space", false),
            };
            let bar = progress_bar(what, bytes);
            bar.set_length(progress.total);
            self.bar = Some((progress.phase, progress.total, bar));
        }
        if let Some((_, _, bar)) = &self.bar {
            bar.set_position(progress.done);
        }
    }
}

fn summarise(report: &Report) {
    let objects = &report.objects;
    say(format!(
        "objects: {} files, {} disks, {} directories, {} symbolic links, {} raw device mappings",
        objects.files, objects.disks, objects.directories, objects.symlinks, objects.raw_devices
    ));
    for (index, lun) in &report.luns {
        say(format!(
            "{index} {}: {} of {} blocks free, {} data, {} FD containers, {} unit containers ({} of {} units free), {} marked, {} in quarantine",
            lun.name,
            lun.free,
            lun.blocks,
            lun.data,
            lun.fd_containers,
            lun.unit_containers,
            lun.free_units,
            lun.units,
            lun.marked,
            lun.quarantined
        ));
    }
    for lun in &report.missing {
        say(format!("{lun} was not checked: it was not given or cannot be read"));
    }
    let label = if report.label.is_empty() { String::new() } else { format!("{} ", report.label) };
    let verdict = match (report.errors, report.recoverable) {
        (0, 0) => "clean".to_owned(),
        (0, left) => format!("clean; {left} recoverable leftovers"),
        (errors, left) => format!("{errors} errors, {left} recoverable leftovers"),
    };
    say(format!("volume {label}{}: {verdict}", report.volume));
}

/// A finding as facts.
fn finding_facts(finding: &Finding) -> Value {
    json!({
        "severity": finding.severity.to_string(),
        "structure": finding.structure.name(),
        "at": finding.at,
        "object": finding.object.map(|fd| fd.to_string()),
        "field": finding.field,
        "found": finding.found,
        "expected": finding.expected,
    })
}

fn facts(report: &Report, printer: &Printer) -> Value {
    let findings = printer.kept.iter().map(finding_facts);
    let luns = report.luns.iter().map(|(index, lun)| {
        json!({
            "index": index.get(),
            "name": lun.name,
            "blocks": lun.blocks,
            "free": lun.free,
            "data": lun.data,
            "fd_containers": lun.fd_containers,
            "unit_containers": lun.unit_containers,
            "marked": lun.marked,
            "quarantined": lun.quarantined,
            "units": lun.units,
            "free_units": lun.free_units,
        })
    });
    json!({
        "volume": report.volume.to_string(),
        "label": report.label,
        "clean": report.is_clean(),
        "errors": report.errors,
        "recoverable": report.recoverable,
        "infos": report.infos,
        "objects": {
            "files": report.objects.files,
            "disks": report.objects.disks,
            "directories": report.objects.directories,
            "symlinks": report.objects.symlinks,
            "raw_devices": report.objects.raw_devices,
        },
        "luns": luns.collect::<Vec<_>>(),
        "missing": report.missing.iter().map(|lun| lun.get()).collect::<Vec<_>>(),
        "findings": findings.collect::<Vec<_>>(),
        "findings_omitted": printer.omitted,
    })
}
