//! Owns: vmfs rdm.
//! Promises: the device is named to the mount by an absolute path; what was done is said in one line.
//! Must not know: how a device is found again.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use lockd::protocol::AdminRequest;

use super::disk::{parse_descriptor, say_facts};
use super::{AdminError, mounted};
use crate::size;
use crate::terminal::{say, say_json};

#[derive(Debug, Subcommand)]
pub(super) enum RdmCommand {
    /// Map a LUN into a volume: the descriptor X.vmdk and the mapping X-rdm.vmdk (virtual) or X-rdmp.vmdk (physical)
    #[command(after_help = "Examples:\n  vmfs rdm create --virtual /dev/sdx /mnt/ds1/vm1/raw.vmdk\n  \
        vmfs rdm create --physical /dev/disk/by-id/wwn-0x5000c500a0b1c2d3 /mnt/ds1/vm1/raw.vmdk\n\n\
        The mapping keeps who the LUN is, not where it was: it is found under whatever path it has later.")]
    Create(Create),
    /// What a raw device mapping is, and where its device is now
    #[command(after_help = "Example:\n  vmfs rdm info --json /mnt/ds1/vm1/raw.vmdk")]
    Info(Info),
}

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    compatibility: Compatibility,
    /// Device, or image file
    #[arg(value_name = "DEVICE")]
    device: PathBuf,
    /// Descriptor, on a mounted volume
    #[arg(value_name = "PATH.vmdk", value_parser = parse_descriptor)]
    path: PathBuf,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Compatibility {
    /// Virtual compatibility: a disk like any other, read and written through the mount too
    #[arg(long = "virtual")]
    virtual_: bool,
    /// Physical compatibility: a guest's SCSI commands reach the device; the mount moves no data of it
    #[arg(long)]
    physical: bool,
}

#[derive(Debug, Args)]
pub(super) struct Info {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Descriptor, on a mounted volume
    #[arg(value_name = "PATH.vmdk")]
    path: PathBuf,
}

pub(super) fn run(command: RdmCommand) -> Result<(), AdminError> {
    match command {
        RdmCommand::Create(create) => {
            let shown = create.device.display();
            let device = std::path::absolute(&create.device).map_err(|error| format!("{shown}: {error}"))?;
            let device =
                device.into_os_string().into_string().map_err(|_| format!("{shown}: the path is no UTF-8 text"))?;
            let file = mounted::name(&create.path)?;
            let physical = create.compatibility.physical;
            let what = AdminRequest::RdmCreate { file: file.name, device, physical };
            let made = mounted::ask(&file.directory, &create.path, what, "mapping")?;
            let bytes = made.get("size_bytes").and_then(|bytes| bytes.as_u64()).unwrap_or(0);
            let how = if physical { "physical" } else { "virtual" };
            say(format!("{}: maps {shown}, {}, {how} compatibility", create.path.display(), size::show(bytes)));
            Ok(())
        }
        RdmCommand::Info(info) => {
            let file = mounted::name(&info.path)?;
            let what = AdminRequest::RdmInfo { file: file.name };
            let value = mounted::ask(&file.directory, &info.path, what, "looking")?;
            if info.json {
                say_json(&value);
            } else {
                say_facts(&value);
            }
            Ok(())
        }
    }
}
