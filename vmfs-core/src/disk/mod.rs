//! Owns: virtual disks: their kinds, creation, growth and copies, and the descriptor text beside the data.
//! Promises: a disk whose descriptor is there is whole: its blocks and zeros are there as its kind says.
//! Must not know: FUSE, how a guest reaches the disk.
//!
//! A disk `x.vmdk` is two files, as a VMware administrator expects: the descriptor `x.vmdk` and the data `x-flat.vmdk`.

mod copy;
mod create;
pub mod descriptor;

pub use copy::clone;
pub(crate) use create::{DescriptorFile, write_descriptor};
pub use create::{create, extend, inflate};

use crate::error::{FsError, FsErrorKind};
use crate::file::{OpenFile, OpenMode};
use crate::format::body::DiskFormat;
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{ObjectFlags, ObjectType};
use crate::volume::{Stat, Volume};
use descriptor::{AdapterType, Descriptor, MAX_DESCRIPTOR_BYTES};

/// A disk to be made.
#[derive(Clone, Copy, Debug)]
pub struct DiskSpec {
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// Policy.
    pub format: DiskFormat,
    /// Adapter that the descriptor names.
    pub adapter: AdapterType,
    /// Several hosts may open it for writing at once; eagerzeroedthick only.
    pub multi_writer: bool,
    /// Permission bits of both files.
    pub mode: u32,
    /// Owner of both files.
    pub uid: u32,
    /// Group of both files.
    pub gid: u32,
}

/// Progress of long work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What `vmfs disk info` tells.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// The descriptor.
    pub descriptor: Descriptor,
    /// The data file as it is.
    pub flat: Stat,
    /// Its name.
    pub flat_name: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of the blocks that it owns.
    pub allocated: u64,
    /// Policy; `None`: the data is an ordinary file.
    pub format: Option<DiskFormat>,
    /// Several hosts may write.
    pub multi_writer: bool,
}

/// Tells what a disk is. `name` is the descriptor's.
///
/// # Errors
/// `NotFound`; `Invalid` when it is no descriptor, or describes something else than one data file beside it.
pub async fn info(volume: &Volume, directory: ObjectRef, name: &[u8]) -> Result<DiskInfo, FsError> {
    let descriptor = read_descriptor(volume, directory, name).await?;
    let Some((flat_name, sectors)) = descriptor.flat_extent() else {
        let cause =
            "the disk has several extents, or its data is not in one file beside it; only such disks can be used here";
        return Err(refused(FsErrorKind::Invalid, name, cause));
    };
    let flat_name = flat_name.to_owned();
    let flat = volume.lookup(directory, flat_name.as_bytes()).await?;
    let described = sectors * descriptor::SECTOR_BYTES;
    if described > flat.attributes.size.next_multiple_of(descriptor::SECTOR_BYTES) {
        let cause = format!(
            "the descriptor says {described} bytes, \"{flat_name}\" has {}; an extension was cut off: extend the disk again",
            flat.attributes.size
        );
        return Err(refused(FsErrorKind::Invalid, name, &cause));
    }
    Ok(DiskInfo {
        size: flat.attributes.size,
        allocated: flat.blocks_bytes,
        format: flat.attributes.disk,
        multi_writer: flat.flags.contains(ObjectFlags::MULTI_WRITER),
        flat_name,
        descriptor,
        flat,
    })
}

pub(crate) async fn read_descriptor(volume: &Volume, directory: ObjectRef, name: &[u8]) -> Result<Descriptor, FsError> {
    let stat = volume.lookup(directory, name).await?;
    if stat.object_type != ObjectType::File {
        return Err(refused(
            FsErrorKind::Invalid,
            name,
            "it is no descriptor; give the .vmdk file, not the -flat.vmdk",
        ));
    }
    if stat.attributes.size > MAX_DESCRIPTOR_BYTES as u64 {
        return Err(refused(FsErrorKind::Invalid, name, &descriptor::DescriptorError::NotText.to_string()));
    }
    let file = volume.open(stat.object, OpenMode::READ).await?;
    let text = volume.files().read(&file, 0, MAX_DESCRIPTOR_BYTES).await;
    let closed = volume.close(file).await;
    let text = text?;
    closed?;
    Descriptor::parse(&text).map_err(|error| refused(FsErrorKind::Invalid, name, &error.to_string()))
}

/// Replaces the text of a descriptor file that is open for writing.
async fn write_text(volume: &Volume, file: &OpenFile, descriptor: &Descriptor) -> Result<(), FsError> {
    let text = descriptor.to_string();
    let mut done = 0;
    while done < text.len() {
        done += volume.files().write(file, done as u64, &text.as_bytes()[done..]).await?;
    }
    volume.files().set_size(file, text.len() as u64).await?;
    volume.files().flush(file).await
}

async fn rewrite_descriptor(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    descriptor: &Descriptor,
) -> Result<(), FsError> {
    let stat = volume.lookup(directory, name).await?;
    let file = volume.open(stat.object, OpenMode::WRITE).await?;
    let written = write_text(volume, &file, descriptor).await;
    written.and(volume.close(file).await)
}

/// `x.vmdk` to `x-flat.vmdk`.
fn flat_name(name: &[u8]) -> Result<String, FsError> {
    Ok(format!("{}-flat.vmdk", stem(name)?))
}

/// `x` of a descriptor's name `x.vmdk`.
pub(crate) fn stem(name: &[u8]) -> Result<&str, FsError> {
    let stem = std::str::from_utf8(name).ok().and_then(|name| name.strip_suffix(".vmdk"));
    let is_data = |stem: &str| ["-flat", "-rdm", "-rdmp"].iter().any(|ending| stem.ends_with(ending));
    stem.filter(|stem| !stem.is_empty() && !is_data(stem) && !stem.contains('"')).ok_or_else(|| {
        let cause = "the name of a disk ends in .vmdk, not in -flat.vmdk, -rdm.vmdk or -rdmp.vmdk";
        refused(FsErrorKind::Invalid, name, cause)
    })
}

pub(crate) fn refused(kind: FsErrorKind, name: &[u8], cause: &str) -> FsError {
    FsError::refused(kind, format!("\"{}\": {cause}", name.escape_ascii()))
}
