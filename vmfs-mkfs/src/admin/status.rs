//! Owns: vmfs status, heartbeat list and extent list.
//! Promises: a directory is asked of its mount, LUNs are read without taking part in the cluster; nothing is written.
//! Must not know: how the facts are printed.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clap::{Args, Subcommand};
use lockd::protocol::AdminRequest;
use vmfs_core::env::Env;
use vmfs_core::lun::OpenLun;
use vmfs_core::real_env::RealEnv;
use vmfs_core::slot::HostIdentity;
use vmfs_core::units::Uuid;
use vmfs_core::volume::{MountOptions, Volume as CoreVolume};

use super::report::{Host, Volume};
use super::{AdminError, mounted};
use crate::terminal::{block_on, open_luns, say, say_json};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  vmfs status                       every mounted volume\n  vmfs status --json /mnt/ds1\n  \
vmfs status lun0.img lun1.img     an unmounted one: name all its LUNs"
)]
pub(super) struct StatusArguments {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
    /// Mount point, or all LUNs of an unmounted volume [default: every mounted volume]
    #[arg(value_name = "MOUNT|LUN")]
    places: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum HeartbeatCommand {
    /// Hosts and their slots on each LUN
    #[command(after_help = "Example:\n  vmfs heartbeat list /mnt/ds1")]
    List(StatusArguments),
}

pub(super) fn run(arguments: &StatusArguments) -> Result<(), AdminError> {
    let volumes = volumes(&arguments.places)?;
    if arguments.json {
        say_json(&volumes);
        return Ok(());
    }
    for (nth, volume) in volumes.iter().enumerate() {
        if nth > 0 {
            say("");
        }
        volume.say();
    }
    Ok(())
}

pub(super) fn heartbeats(arguments: &StatusArguments) -> Result<(), AdminError> {
    let volumes = volumes(&arguments.places)?;
    if arguments.json {
        let luns = volumes.iter().flat_map(|volume| &volume.luns);
        let all: Vec<(&str, &[Host])> = luns.map(|lun| (lun.name.as_str(), lun.hosts.as_slice())).collect();
        let value = all.iter().map(|(lun, hosts)| serde_json::json!({ "lun": lun, "hosts": hosts }));
        say_json(&value.collect::<Vec<_>>());
        return Ok(());
    }
    for lun in volumes.iter().flat_map(|volume| &volume.luns) {
        say(format!("lun{} {}", lun.index, lun.name));
        if lun.hosts.is_empty() {
            say("  no host");
        }
        lun.hosts.iter().for_each(|host| host.say("  "));
    }
    Ok(())
}

pub(super) fn extents(arguments: &StatusArguments) -> Result<(), AdminError> {
    let volumes = volumes(&arguments.places)?;
    if arguments.json {
        let luns: Vec<_> = volumes.iter().flat_map(|volume| &volume.luns).collect();
        say_json(&luns);
        return Ok(());
    }
    for volume in &volumes {
        volume.luns.iter().for_each(|lun| lun.say(volume.block_bytes));
    }
    Ok(())
}

fn volumes(places: &[PathBuf]) -> Result<Vec<Volume>, AdminError> {
    if places.is_empty() {
        let points = mount_points()?;
        if points.is_empty() {
            return Err(AdminError("no VMFS volume is mounted here; name the LUNs of an unmounted one".to_owned()));
        }
        return points.iter().map(|point| of_mount(point)).collect();
    }
    let (directories, luns): (Vec<_>, Vec<_>) = places.iter().partition(|place| place.is_dir());
    let mut volumes = directories.into_iter().map(|point| of_mount(point)).collect::<Result<Vec<_>, _>>()?;
    if !luns.is_empty() {
        volumes.push(of_luns(&luns)?);
    }
    Ok(volumes)
}

fn of_mount(point: &Path) -> Result<Volume, AdminError> {
    let directory = mounted::directory(point)?;
    let value = mounted::ask(&directory, point, AdminRequest::Status, "asking")?;
    let volume: Volume = serde_json::from_value(value)
        .map_err(|error| format!("{}: the mount's answer makes no sense: {error}", point.display()))?;
    Ok(Volume { mount: Some(point.display().to_string()), ..volume })
}

fn of_luns(places: &[&PathBuf]) -> Result<Volume, AdminError> {
    let paths: Vec<String> = places.iter().map(|place| place.to_string_lossy().into_owned()).collect();
    let status = block_on(async {
        let luns = open_luns(&paths, OpenLun { read_only: true, refuse_busy_device: false })?;
        let env: Rc<dyn Env> = Rc::new(RealEnv);
        let host = HostIdentity { host: Uuid::default(), boot: Uuid::default(), name: String::new() };
        let options = MountOptions { read_only: true, host, slot_hint: None, degraded: true };
        let volume = CoreVolume::mount(luns, options, env).await?;
        let status = volume.status().await;
        volume.unmount().await?;
        Ok::<_, vmfs_core::error::FsError>(status)
    })?;
    Ok(Volume::from(&status))
}

/// Mount points of this file system, as the kernel lists them.
fn mount_points() -> Result<Vec<PathBuf>, AdminError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| format!("/proc/self/mounts: {error}"))?;
    let ours = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "fuse.vmfs").then(|| PathBuf::from(unescape(point)))
    });
    Ok(ours.collect())
}

/// Undoes the octal escapes of getmntent(3).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}
