//! Owns: vmfs extent.
//! Promises: LUNs are added one after another in the order given; the first refusal ends it and says what was done before.
//! Must not know: how a LUN becomes a member.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use lockd::protocol::AdminRequest;
use serde_json::Value;

use super::status::{self, StatusArguments};
use super::{AdminError, mounted};
use crate::size;
use crate::terminal::{say, say_json};

#[derive(Debug, Subcommand)]
pub(super) enum ExtentCommand {
    /// Member LUNs of a volume
    #[command(after_help = "Example:\n  vmfs extent list /mnt/ds1")]
    List(StatusArguments),
    /// Format LUNs and add them to a mounted volume; all hosts that find them use them at once
    #[command(after_help = "Example:\n  vmfs extent add /dev/sdc /dev/sdd /mnt/ds1\n\n\
Other hosts look where the volume's LUNs lie and where mount.vmfs -o watch=... says. An addition that was cut off goes on when\n\
the command is given again. From then on the new LUNs are named at each mount.")]
    Add(Add),
    /// Take the space that a member LUN has gained into the volume
    #[command(after_help = "Example:\n  truncate -s 20G lun1.img && vmfs extent grow lun1.img /mnt/ds1\n\n\
Make the LUN larger first, on all hosts. A LUN can grow four times; all hosts use the space within two heartbeats.")]
    Grow(Grow),
    /// Move what lies on a member LUN to the others; nothing new is put there any more
    #[command(after_help = "Example:\n  vmfs extent drain /dev/sdc /mnt/ds1\n\n\
Data and metadata blocks move while the volume is in use, also those of running VMs of this host. What stays is listed with its\n\
reason: files that another host has locked. Give the command again, also on that host, until nothing is left. An object's\n\
descriptor, which is its identity, stays where it was made: copy the object and remove the original to free it. Exit status 1: something stayed.\n\
A LUN that is not to be emptied after all is used again with --cancel.")]
    Drain(Drain),
    /// Take an emptied member LUN out of the volume, the first one too, while all hosts work
    #[command(
        after_help = "Example:\n  vmfs extent drain /dev/sdc /mnt/ds1 && vmfs extent remove /dev/sdc /mnt/ds1\n\n\
What has to stay of the LUN (the descriptors of its objects, some MiB) moves to another LUN, and every host goes on there. All other\n\
LUNs have to be there. What was cut off goes on when the command is given again, on any host; once begun it cannot be taken back.\n\
Afterwards the LUN is left out at each mount; detach it when no host has it open any more (two heartbeats, and the end of programs\n\
that were attached to disks)."
    )]
    Remove(Remove),
}

#[derive(Debug, Args)]
pub(super) struct Remove {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Path of the LUN, or lunN as vmfs extent list shows it
    lun: PathBuf,
    /// Mount point
    mount: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Grow {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Path of the LUN, or lunN as vmfs extent list shows it
    lun: PathBuf,
    /// Mount point
    mount: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Drain {
    /// Give it up: use the LUN again, and end a drain that goes on, on whatever host
    #[arg(long)]
    cancel: bool,
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Path of the LUN, or lunN as vmfs extent list shows it
    lun: PathBuf,
    /// Mount point
    mount: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// Overwrite what a LUN holds, also a volume
    #[arg(short, long)]
    force: bool,
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// LUNs to add, then the mount point
    #[arg(value_name = "LUN... MOUNT", num_args = 2.., required = true)]
    places: Vec<PathBuf>,
}

pub(super) fn run(command: &ExtentCommand) -> Result<(), AdminError> {
    match command {
        ExtentCommand::List(arguments) => status::extents(arguments),
        ExtentCommand::Add(arguments) => add(arguments),
        ExtentCommand::Grow(arguments) => grow(arguments),
        ExtentCommand::Drain(arguments) => drain(arguments),
        ExtentCommand::Remove(arguments) => remove(arguments),
    }
}

fn grow(arguments: &Grow) -> Result<(), AdminError> {
    let directory = mounted::directory(&arguments.mount)?;
    let what = AdminRequest::ExtentGrow { lun: member(&arguments.lun)? };
    let answer = mounted::ask(&directory, &arguments.mount, what, "growing")?;
    if arguments.json {
        say_json(&answer);
        return Ok(());
    }
    let bytes = |name: &str| size::show(answer[name].as_u64().unwrap_or(0));
    say(format!(
        "{}: lun{}, {} became {}",
        arguments.lun.display(),
        answer["index"],
        bytes("from_bytes"),
        bytes("to_bytes")
    ));
    Ok(())
}

fn remove(arguments: &Remove) -> Result<(), AdminError> {
    let directory = mounted::directory(&arguments.mount)?;
    let what = AdminRequest::ExtentRemove { lun: member(&arguments.lun)? };
    let answer = mounted::ask(&directory, &arguments.mount, what, "moving")?;
    if arguments.json {
        say_json(&answer);
        return Ok(());
    }
    let bytes = size::show(answer["window_bytes"].as_u64().unwrap_or(0));
    say(format!(
        "{}: lun{} was taken out of the volume; {bytes} of it are on lun{} now. Leave it out at the next mount",
        arguments.lun.display(),
        answer["index"],
        answer["carrier"]
    ));
    Ok(())
}

/// Objects that are named in a report for people.
const NAMED: usize = 20;

fn drain(arguments: &Drain) -> Result<(), AdminError> {
    let directory = mounted::directory(&arguments.mount)?;
    let what = AdminRequest::ExtentDrain { lun: member(&arguments.lun)?, cancel: arguments.cancel };
    let answer = mounted::ask(&directory, &arguments.mount, what, "draining")?;
    if arguments.cancel {
        if arguments.json {
            say_json(&answer);
        } else {
            say(format!(
                "{}: lun{} is not drained any more and is used again",
                arguments.lun.display(),
                answer["index"]
            ));
        }
        return Ok(());
    }
    let number = |name: &str| answer[name].as_u64().unwrap_or(0);
    if arguments.json {
        say_json(&answer);
    } else {
        say(format!(
            "{}: lun{}, {} moved",
            arguments.lun.display(),
            answer["index"],
            size::show(number("moved_bytes"))
        ));
        for one in answer["stayed"].as_array().into_iter().flatten().take(NAMED) {
            say(format!("  stays: {}: {}", text(&one["name"]), text(&one["reason"])));
        }
        if number("unsettled") > 0 {
            say(format!("  {} blocks are kept from use until a host that died is proven gone", number("unsettled")));
        }
        if number("descriptor_count") > 0 {
            let names = answer["descriptors"].as_array().into_iter().flatten().take(NAMED);
            let names: Vec<String> = names.map(|one| text(&one["name"])).filter(|name| !name.is_empty()).collect();
            say(format!("  descriptors of {} objects stay: {}", number("descriptor_count"), names.join(", ")));
        }
    }
    if answer["empty"] == Value::Bool(true) {
        return Ok(());
    }
    let left = number("left_bytes");
    Err(AdminError(format!(
        "{}: {} of data and {} units of metadata stay on it; see to what is listed, and give the command again",
        arguments.lun.display(),
        size::show(left),
        number("left_units")
    )))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A member as the mount can find it: its path, or lunN when there is no such path.
fn member(lun: &Path) -> Result<String, AdminError> {
    match lun.to_str() {
        Some(text) if text.starts_with("lun") && !lun.exists() => Ok(text.to_owned()),
        _ => absolute(lun),
    }
}

fn add(arguments: &Add) -> Result<(), AdminError> {
    let Some((mount, luns)) = arguments.places.split_last() else { return Ok(()) };
    let directory = mounted::directory(mount)?;
    let mut added: Vec<Value> = Vec::new();
    for lun in luns {
        let what = AdminRequest::ExtentAdd { lun: absolute(lun)?, force: arguments.force };
        let answer = mounted::ask(&directory, mount, what, "formatting").map_err(|error| match added.len() {
            0 => error,
            before => AdminError(format!("{error} (LUNs added before: {before})")),
        })?;
        if !arguments.json {
            let bytes = answer["bytes"].as_u64().unwrap_or(0);
            say(format!("{}: added as lun{}, {}", lun.display(), answer["index"], size::show(bytes)));
        }
        added.push(answer);
    }
    if arguments.json {
        say_json(&added);
    }
    Ok(())
}

/// The path as the mount can use it, which works in another directory; a URL means the same everywhere.
fn absolute(lun: &Path) -> Result<String, AdminError> {
    if let Some(url) = lun.to_str().filter(|text| text.contains("://")) {
        return Ok(url.to_owned());
    }
    let path = lun.canonicalize().map_err(|error| AdminError(format!("{}: {error}; check the path", lun.display())))?;
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| AdminError(format!("{}: its path is no UTF-8; rename it", lun.display())))
}
