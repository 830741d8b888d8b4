//! Owns: vmfs why-locked.
//! Promises: a virtual disk is asked for by its data, which is what is locked.
//! Must not know: how locks are taken.

use std::path::PathBuf;

use clap::Args;
use lockd::protocol::AdminRequest;

use super::{AdminError, mounted};
use crate::terminal::{say, say_json};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  vmfs why-locked /mnt/ds1/vm1/disk.vmdk")]
pub(super) struct LockArguments {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// File, or the descriptor of a disk, on a mounted volume
    #[arg(value_name = "FILE")]
    path: PathBuf,
}

pub(super) fn run(arguments: &LockArguments) -> Result<(), AdminError> {
    let path = mounted::data_file(&arguments.path);
    let file = mounted::name(&path)?;
    let value = mounted::ask(&file.directory, &path, AdminRequest::WhyLocked { file: file.name }, "asking")?;
    if arguments.json {
        say_json(&value);
        return Ok(());
    }
    let explanation = value.get("explanation").and_then(|text| text.as_str()).unwrap_or("the mount gave no answer");
    say(format!("{}: {explanation}", path.display()));
    Ok(())
}
