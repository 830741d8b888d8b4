//! Owns: the way from what an administrator typed to a LUN.
//! Promises: the same words give the same kind of LUN in every program; a refusal names object, cause and next step.
//! Must not know: volumes; what a LUN is used for.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use rustix::fs::{FileType, Stat, stat};
use scsi::ScsiPath;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::header::LockMode;
use vmfs_core::format::layout::HEADER_OFFSET;
use vmfs_core::lun::Lun;
pub use vmfs_core::lun::OpenLun;

use crate::device::Device;
use crate::iscsi_path;
use crate::scsi_lun::ScsiLun;
use crate::sg::{self, BlockKind, SgPath};

/// Opens the LUN that `path_or_url` names: an image file, a block device, or `iscsi://host[:port]/iqn/lun`. It blocks while the storage
/// is looked at.
///
/// A whole SCSI disk that has COMPARE AND WRITE is used by SCSI commands, so that several machines can share it, unless it carries a
/// volume that was made for one machine.
pub fn open_lun(path_or_url: &str, how: OpenLun) -> Result<Rc<dyn Lun>, FsError> {
    finish(path_or_url, how, find(path_or_url, how)?)
}

/// The same beside other work of this thread. Needs a tokio runtime.
pub async fn open_lun_aside(path_or_url: &str, how: OpenLun) -> Result<Rc<dyn Lun>, FsError> {
    let owned = path_or_url.to_owned();
    let found = tokio::task::spawn_blocking(move || find(&owned, how)).await;
    let found = found.map_err(|ended| refuse(FsErrorKind::Io, path_or_url, &ended.to_string()))??;
    finish(path_or_url, how, found)
}

fn finish(name: &str, how: OpenLun, found: Option<Box<Device>>) -> Result<Rc<dyn Lun>, FsError> {
    match found {
        None => vmfs_core::lun::open_lun(name, how),
        Some(device) => ScsiLun::new(*device)
            .map(|lun| Rc::new(lun) as Rc<dyn Lun>)
            .map_err(|why| refuse(FsErrorKind::Unsupported, name, &why)),
    }
}

/// The SCSI unit that is meant; `None`: a file, or a device without the commands that are needed. It may be found on another thread than it
/// is used.
fn find(name: &str, how: OpenLun) -> Result<Option<Box<Device>>, FsError> {
    if name.starts_with("iscsi://") {
        let device = device_of_url(name, how.read_only)?;
        return with_compare_and_write(device, name).map(|device| Some(Box::new(device)));
    }
    let Some((node, found)) = scsi_disk(name)? else { return Ok(None) };
    if how.refuse_busy_device {
        // The kernel says whether it uses it; the LUN that does is dropped again.
        vmfs_core::lun::open_lun(name, OpenLun { read_only: true, ..how })?;
    }
    let device = device_of_node(name, &node, &found, how.read_only)?;
    if device.facts.limits.compare_and_write == 0 {
        return Ok(None);
    }
    // A volume for one machine goes on as what it was made.
    let is_for_one = lock_mode_there(&device, name)? == Some(LockMode::SingleMachine);
    Ok((!is_for_one).then(|| Box::new(device)))
}

/// The unit behind a URL.
pub(crate) fn device_of_url(url: &str, read_only: bool) -> Result<Device, FsError> {
    let shown = iscsi_path::without_secrets(url);
    let (path, origin) = iscsi_path::connect(url).map_err(|why| refuse(FsErrorKind::Io, &shown, &why))?;
    Ok(open_device(&shown, path, read_only)?.reached_by(origin))
}

fn open_device(name: &str, path: Arc<dyn ScsiPath>, read_only: bool) -> Result<Device, FsError> {
    Device::open(name.to_owned(), vec![path], read_only).map_err(|failure| refuse(FsErrorKind::Io, name, &failure.why))
}

fn with_compare_and_write(device: Device, name: &str) -> Result<Device, FsError> {
    if device.facts.limits.compare_and_write > 0 {
        return Ok(device);
    }
    let why = "the storage has no COMPARE AND WRITE (page B0h), which hosts need to share a LUN; use a target that has it, or export \
               the LUN to one host as a block device of its own";
    Err(refuse(FsErrorKind::Unsupported, &iscsi_path::without_secrets(name), why))
}

/// The node and what stat says of a path that leads to a whole SCSI disk.
pub(crate) fn scsi_disk(name: &str) -> Result<Option<(PathBuf, Stat)>, FsError> {
    // What cannot be looked at is refused by who opens it.
    let Ok(found) = stat(name) else { return Ok(None) };
    if FileType::from_raw_mode(found.st_mode) != FileType::BlockDevice {
        return Ok(None);
    }
    Ok((sg::kind_of(&found) == BlockKind::ScsiDisk).then(|| (PathBuf::from(name), found)))
}

/// The unit behind a block device, which was read by SCSI commands and by the kernel, and is the same.
pub(crate) fn device_of_node(name: &str, node: &PathBuf, found: &Stat, read_only: bool) -> Result<Device, FsError> {
    let io = |error: std::io::Error| refuse(FsErrorKind::Io, name, &format!("SG_IO: {error}"));
    let path = SgPath::open(node, found).map_err(io)?;
    let tenancy = Box::new(path.tenancy());
    let device = open_device(name, Arc::new(path), read_only)?.shared_by(tenancy);
    let mut by_kernel = vmfs_core::buf::AlignedBuf::zeroed(4096);
    let file = rustix::fs::open(
        node,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .map_err(|error| io(error.into()))?;
    // Another host may change the header between the two.
    for _ in 0..TRIES {
        let mut by_commands = vec![0; 4096];
        device.read_head(&mut by_commands).map_err(|why| refuse(FsErrorKind::Io, name, &why))?;
        rustix::io::pread(&file, &mut *by_kernel, HEADER_OFFSET).map_err(|error| io(error.into()))?;
        if by_commands[..] == by_kernel[..] {
            return Ok(device);
        }
    }
    let why = "what SCSI commands read there is not what the kernel reads: it is a part of a disk, or a mapping; name the whole disk";
    Err(refuse(FsErrorKind::Unsupported, name, why))
}

/// Looks at the header in both ways.
const TRIES: u32 = 5;

/// How the volume on a unit, if there is one, does compare-and-write.
fn lock_mode_there(device: &Device, name: &str) -> Result<Option<LockMode>, FsError> {
    let mut head = vec![0; 4096];
    device.read_head(&mut head).map_err(|why| refuse(FsErrorKind::Io, name, &why))?;
    Ok(vmfs_core::volume::lock_mode_of(&head))
}

fn refuse(kind: FsErrorKind, name: &str, why: &str) -> FsError {
    FsError::refused(kind, format!("{name}: {why}"))
}
