//! Owns: what is asked of a block device before it is used as a LUN: its one node, its block size, its identity.
//! Promises: all processes lock the same inode, however they name the device.
//! Must not know: how it is read and written (`raw_file`), compare-and-write (`file`).
//!
//! Locks on a device node exclude the processes of this machine, so that is all a block device is good for here: lock mode
//! `SingleMachine`. Sharing it among machines takes SCSI COMPARE AND WRITE.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Stat, ioctl_blksszget, major, minor, stat};

use crate::format::header::DeviceIdentity;
use crate::units::CellSize;

/// The node under /dev that the kernel made for this device; a lock belongs to the inode of the node, and a device may have others.
/// None when it can not be found: then there is only the node that was given.
pub(super) fn canonical_node(found: &Stat) -> Option<PathBuf> {
    let uevent = fs::read_to_string(sysfs(found).join("uevent")).ok()?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    let node = Path::new("/dev").join(name);
    (stat(&node).ok()?.st_rdev == found.st_rdev).then_some(node)
}

/// What the device says of itself: its world-wide name, serial number or device-mapper identity; empty when it says nothing.
pub(super) fn identity(found: &Stat) -> DeviceIdentity {
    identity_in(&sysfs(found))
}

/// The same of the device whose folder in sysfs this is.
pub(super) fn identity_in(base: &Path) -> DeviceIdentity {
    let said = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid"].iter().find_map(|file| {
        let text = fs::read_to_string(base.join(file)).ok()?;
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        (!text.is_empty()).then(|| format!("{}:{text}", file.rsplit('/').next().unwrap_or(file)))
    });
    DeviceIdentity::new(said.unwrap_or_default().as_bytes())
}

/// The nodes of all block devices that say this of themselves.
pub(super) fn nodes_of(identity: &DeviceIdentity) -> std::io::Result<Vec<PathBuf>> {
    let mut nodes = Vec::new();
    for device in fs::read_dir("/sys/class/block")? {
        let base = device?.path();
        if identity_in(&base) != *identity {
            continue;
        }
        let uevent = fs::read_to_string(base.join("uevent"))?;
        nodes.extend(
            uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).map(|name| Path::new("/dev").join(name)),
        );
    }
    Ok(nodes)
}

/// The logical block size as a cell size; the number of bytes when the format has no such cell.
pub(super) fn cell_size(file: &OwnedFd) -> std::io::Result<Result<CellSize, u32>> {
    let bytes = ioctl_blksszget(file.as_fd())?;
    Ok(match bytes {
        512 => Ok(CellSize::B512),
        4096 => Ok(CellSize::B4096),
        other => Err(other),
    })
}

fn sysfs(found: &Stat) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(found.st_rdev), minor(found.st_rdev)))
}
