//! Owns: vmfs scrub.
//! Promises: what was found goes to standard output, an object with its path; the bar shows rate and time left; nothing is changed.
//! Must not know: how damage is found.

use std::path::PathBuf;

use clap::Args;
use lockd::protocol::AdminRequest;
use serde::{Deserialize, Serialize};

use super::{AdminError, mounted};
use crate::size;
use crate::terminal::{say, say_json};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  vmfs scrub /mnt/ds1\n  vmfs scrub --data --rate 20M /mnt/ds1\n\n\
Reads every structure of every LUN and compares what names each other; with --data also all that was written to files. Hosts work on\n\
meanwhile, and what they change is no damage. Nothing is changed: fsck.vmfs repairs. A new scrub of a mount ends the one before.\n\n\
Exit status: 0 nothing is wrong, 1 damage was found, a LUN is lost or the scrub failed, 2 usage.")]
pub(super) struct ScrubArguments {
    /// Read the data of files too
    #[arg(long)]
    data: bool,
    /// Most bytes to read in a second; 0: no bound
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    rate: u64,
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Mount point
    #[arg(value_name = "MOUNT")]
    mount: PathBuf,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Finding {
    structure: String,
    at: String,
    object: Option<String>,
    path: Option<String>,
    what: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Report {
    clean: bool,
    found: u64,
    findings: Vec<Finding>,
    objects: u64,
    unsettled: u64,
    bytes: u64,
    lost: Vec<u8>,
}

/// True: nothing is wrong.
pub(super) fn run(arguments: &ScrubArguments) -> Result<bool, AdminError> {
    let directory = mounted::directory(&arguments.mount)?;
    let bytes_per_second = (arguments.rate > 0).then_some(arguments.rate);
    let what = AdminRequest::Scrub { data: arguments.data, bytes_per_second };
    let answer = mounted::ask(&directory, &arguments.mount, what, "looking")?;
    let report: Report = serde_json::from_value(answer)
        .map_err(|error| format!("{}: the mount's answer makes no sense: {error}", arguments.mount.display()))?;
    match arguments.json {
        true => say_json(&report),
        false => report.say(),
    }
    Ok(report.clean)
}

impl Report {
    fn say(&self) {
        for finding in &self.findings {
            let of = match (&finding.path, &finding.object) {
                (Some(path), Some(object)) => format!("{path} ({object}): "),
                (None, Some(object)) => format!("{object}: "),
                _ => String::new(),
            };
            say(format!("damaged  {of}{} {}: {}", finding.structure, finding.at, finding.what));
        }
        let unlisted = self.found.saturating_sub(self.findings.len() as u64);
        if unlisted > 0 {
            say(format!("         and {unlisted} more"));
        }
        for lun in &self.lost {
            say(format!("lost     lun{lun}: what lies there was not looked at (vmfs status shows what that hurts)"));
        }
        if self.unsettled > 0 {
            say(format!("changing {} objects changed all the time: not all of them was looked at", self.unsettled));
        }
        let (objects, bytes) = (self.objects, size::show(self.bytes));
        match self.found {
            0 if self.lost.is_empty() => say(format!("clean    {objects} objects, {bytes} read")),
            0 => say(format!("looked   {objects} objects, {bytes} read; nothing else is wrong")),
            found => say(format!(
                "found    {found} in {objects} objects, {bytes} read; unmount the volume on all hosts and run fsck.vmfs"
            )),
        }
    }
}
