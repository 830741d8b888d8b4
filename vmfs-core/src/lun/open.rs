//! Owns: turning what an administrator typed into a LUN.
//! Promises: what can not be shared safely is refused with the reason; every process chooses the same I/O mode for a LUN.
//! Must not know: volumes, headers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatxFlags, fstat, fstatfs, open, statx};
use rustix::io::{Errno, pread};

use super::file::{FileLun, Opened, reopen};
use super::raw_file::{Backing, RawFile};
use super::{Lun, block, sys};
use crate::buf::AlignedBuf;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::DeviceIdentity;
use crate::units::CellSize;

/// How a LUN is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenLun {
    /// For reading only.
    pub read_only: bool,
    /// Refuse a block device that the kernel uses: mounted, part of a device-mapper target or RAID, swap. For mkfs.
    pub refuse_busy_device: bool,
}

/// File systems whose locks or caches do not reach all users of a file (statfs(2), `include/uapi/linux/magic.h`).
const NETWORK_FILE_SYSTEMS: &[(u32, &str)] = &[
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x6573_5546, "FUSE"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x7375_7245, "Coda"),
    (0x564c, "NCP"),
    (0x786f_4256, "VirtualBox shared folder"),
];

/// Opens the LUN that `path_or_url` names: an image file or a block device, shared by the processes of this machine. URLs are for whoever
/// has sockets.
pub fn open_lun(path_or_url: &str, how: OpenLun) -> Result<Rc<dyn Lun>, FsError> {
    if path_or_url.starts_with("iscsi://") {
        return Err(refuse(
            FsErrorKind::Unsupported,
            path_or_url,
            "an iSCSI unit can be a LUN of a volume, but not this; use an image file or a block device",
        ));
    }
    if let Some((scheme, _)) = path_or_url.split_once("://") {
        return Err(refuse(FsErrorKind::Invalid, path_or_url, &format!("{scheme:?} is no kind of LUN; give a path")));
    }
    let path = Path::new(path_or_url);
    let found = rustix::fs::stat(path).map_err(|cause| open_error(path_or_url, cause))?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => open_image(path_or_url, path, how),
        FileType::BlockDevice => open_block(path_or_url, path, &found, how),
        other => {
            let what = format!("is neither an image file nor a block device ({other:?})");
            Err(refuse(FsErrorKind::Invalid, path_or_url, &what))
        }
    }
}

fn refuse(kind: FsErrorKind, name: &str, why: &str) -> FsError {
    FsError::refused(kind, format!("{name}: {why}"))
}

fn open_error(name: &str, cause: Errno) -> FsError {
    let kind = match cause {
        Errno::NOENT | Errno::NOTDIR | Errno::NXIO | Errno::NODEV => FsErrorKind::NotFound,
        Errno::ACCESS | Errno::PERM => FsErrorKind::NotPermitted,
        Errno::ROFS => FsErrorKind::ReadOnly,
        Errno::BUSY => FsErrorKind::Busy,
        Errno::NAMETOOLONG => FsErrorKind::NameTooLong,
        _ => FsErrorKind::Io,
    };
    let next = match cause {
        Errno::BUSY => "; the kernel uses it: unmount it or release it first",
        Errno::NOENT | Errno::NOTDIR => "; check the path",
        Errno::ACCESS | Errno::PERM => "; run this as root, or as a user who may read and write it",
        _ => "",
    };
    refuse(kind, name, &format!("can not be opened: {}{next}", io::Error::from(cause)))
}

fn access(how: OpenLun) -> OFlags {
    (if how.read_only { OFlags::RDONLY } else { OFlags::RDWR }) | OFlags::CLOEXEC
}

fn open_image(name: &str, path: &Path, how: OpenLun) -> Result<Rc<dyn Lun>, FsError> {
    let plain = open(path, access(how), Mode::empty()).map_err(|cause| open_error(name, cause))?;
    let file_system = fstatfs(&plain).map_err(|cause| open_error(name, cause))?;
    let found = fstat(&plain).map_err(|cause| open_error(name, cause))?;
    if let Some((_, kind)) = NETWORK_FILE_SYSTEMS.iter().find(|(magic, _)| *magic == file_system.f_type as u32) {
        let why = format!(
            "lies on a network file system ({kind}), whose locks are not known to reach every user of the file; \
             put the image on a local file system"
        );
        return Err(refuse(FsErrorKind::Unsupported, name, &why));
    }
    let identity = image_identity(&plain, &found);
    finish(name, plain, how, Backing::Image, identity, None)
}

fn open_block(name: &str, path: &Path, found: &Stat, how: OpenLun) -> Result<Rc<dyn Lun>, FsError> {
    let node = block::canonical_node(found).unwrap_or_else(|| path.to_owned());
    if how.refuse_busy_device {
        open(&node, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty())
            .map_err(|cause| open_error(name, cause))?;
    }
    let plain = open(&node, access(how), Mode::empty()).map_err(|cause| open_error(name, cause))?;
    let cell_size = block::cell_size(&plain).map_err(|cause| refuse(FsErrorKind::Io, name, &cause.to_string()))?;
    let cell_size = cell_size.map_err(|bytes| {
        refuse(FsErrorKind::Unsupported, name, &format!("has blocks of {bytes} bytes; 512 and 4096 are possible"))
    })?;
    let name = node.to_string_lossy().into_owned();
    finish(&name, plain, how, Backing::Block, block::identity(found), Some(cell_size))
}

/// Chooses the I/O mode and opens the two files of a LUN: the actor's and the data path's.
fn finish(
    name: &str,
    plain: OwnedFd,
    how: OpenLun,
    backing: Backing,
    identity: DeviceIdentity,
    cell_size: Option<CellSize>,
) -> Result<Rc<dyn Lun>, FsError> {
    let io_error = |cause: io::Error| refuse(FsErrorKind::Io, name, &cause.to_string());
    let (flags, alignment) = io_mode(&plain, access(how)).map_err(io_error)?;
    let alignment = cell_size.map_or(alignment, |cell| alignment.max(cell.bytes()));
    let opened = || -> Result<RawFile, FsError> {
        let file = reopen(&plain, flags).map_err(io_error)?;
        Ok(RawFile::new(file, backing, name.to_owned(), alignment, how.read_only))
    };
    Ok(Rc::new(FileLun::new(Opened { actor: opened()?, data: opened()?, flags, identity, cell_size })))
}

/// Direct I/O where the file system does it, at the finest alignment that it takes; else the page cache. It depends on nothing but
/// the file, so every process comes to the same mode.
fn io_mode(plain: &OwnedFd, access: OFlags) -> io::Result<(OFlags, usize)> {
    let direct = access | OFlags::DIRECT;
    let file = match reopen(plain, direct) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok((access, CellSize::B512.bytes())),
        Err(error) => return Err(error),
    };
    for alignment in [CellSize::B512.bytes(), CellSize::B4096.bytes()] {
        let mut piece = AlignedBuf::zeroed(alignment);
        match pread(&file, &mut *piece, alignment as u64) {
            Ok(_) => return Ok((direct, alignment)),
            Err(Errno::INVAL) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
    Ok((access, CellSize::B512.bytes()))
}

/// File system (its UUID, else what stat calls it), inode and the moment when the inode was made, where the file system knows it: a copy of
/// an image has another identity, and so has a file that got the inode number of one that was removed.
pub(super) fn image_identity(file: &OwnedFd, found: &Stat) -> DeviceIdentity {
    let file_system = sys::file_system_uuid(file.as_fd())
        .map(|uuid| uuid.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
        .unwrap_or_else(|| format!("dev{:x}", found.st_dev));
    let born = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME)
        .ok()
        .filter(|known| known.stx_mask & StatxFlags::BTIME.bits() != 0)
        .map(|known| {
            let ns = known.stx_btime.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(known.stx_btime.tv_nsec.into());
            format!("-{:08x}", ns as u32)
        });
    DeviceIdentity::new(format!("file:{file_system}:{:x}{}", found.st_ino, born.unwrap_or_default()).as_bytes())
}
