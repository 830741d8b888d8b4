//! Owns: vmfs why-locked, vmfs lock break.
//! Promises: a virtual disk is asked for by its data, which is what is locked.
//! Must not know: how locks are taken and broken.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lockd::protocol::AdminRequest;
use serde_json::Value;

use super::{AdminError, mounted, nfs};
use crate::terminal::{say, say_json};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  vmfs why-locked /mnt/ds1/vm1/disk.vmdk")]
pub(super) struct LockArguments {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// File, or the descriptor of a disk, on a mounted volume; or an nfs:// URL of a disk (it is watched for up to 15 s)
    #[arg(value_name = "FILE")]
    path: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(super) enum LockCommand {
    /// Take the lock of a file out of the hands of a host that is gone
    #[command(after_help = "Examples:\n  vmfs lock break /mnt/ds1/vm1/disk.vmdk\n  \
        vmfs lock break --host-is-down esx-b /mnt/ds1/vm1/disk.vmdk\n\n\
        Without --host-is-down the lock is taken only when the holder's lease is over for certain, as the next open would do.")]
    Break(Break),
}

#[derive(Debug, Args)]
pub(super) struct Break {
    /// You have made sure that this host, which must be the holder, is powered off: its lease is not waited for. What the storage
    /// can do to keep it out is done all the same
    #[arg(long, value_name = "HOSTNAME|UUID")]
    host_is_down: Option<String>,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
    /// File, or the descriptor of a disk, on a mounted volume
    #[arg(value_name = "FILE")]
    path: PathBuf,
}

pub(super) fn break_lock(arguments: Break) -> Result<(), AdminError> {
    let path = mounted::data_file(&arguments.path);
    let file = mounted::name(&path)?;
    let what = AdminRequest::LockBreak { file: file.name, host_is_down: arguments.host_is_down };
    let value = mounted::ask(&file.directory, &path, what, "breaking")?;
    if arguments.json {
        say_json(&value);
        return Ok(());
    }
    let each = |key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let holders: Vec<_> = each("holders").iter().filter_map(|holder| holder.as_str().map(str::to_owned)).collect();
    say(format!("{}: the lock is free; it was held by {}", path.display(), holders.join(", ")));
    for takeover in each("takeovers") {
        say(format!("  {}", show_takeover(&takeover)));
    }
    Ok(())
}

/// A takeover in one line.
pub(super) fn show_takeover(takeover: &Value) -> String {
    let text = |key: &str| takeover.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    let why = match takeover.get("attested").and_then(Value::as_bool) {
        Some(true) => "administrator attested that it is down",
        _ => "its lease was over",
    };
    let lun = takeover.get("lun").and_then(Value::as_u64).unwrap_or(0);
    format!(
        "host {} ({}) on lun{lun}, {}: fence grade {}, {why}",
        text("name"),
        text("host"),
        text("slot"),
        text("fence_grade")
    )
}

pub(super) fn run(arguments: &LockArguments) -> Result<(), AdminError> {
    let (path, value) = match nfs::url_of(&arguments.path)? {
        Some(url) => (arguments.path.clone(), nfs::why_locked(&url)?),
        None => {
            let path = mounted::data_file(&arguments.path);
            let file = mounted::name(&path)?;
            let value = mounted::ask(&file.directory, &path, AdminRequest::WhyLocked { file: file.name }, "asking")?;
            (path, value)
        }
    };
    if arguments.json {
        say_json(&value);
        return Ok(());
    }
    let explanation = value.get("explanation").and_then(|text| text.as_str()).unwrap_or("the mount gave no answer");
    say(format!("{}: {explanation}", path.display()));
    Ok(())
}
