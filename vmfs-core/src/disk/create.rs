//! Owns: making a disk, letting it grow, turning it into an eagerzeroedthick one.
//! Promises: the descriptor is written last: what is cut off before leaves no disk that looks whole; what fails is removed again.
//! Must not know: how blocks are taken and zeroed.

use std::sync::Arc;

use super::descriptor::{Descriptor, SECTOR_BYTES};
use super::{DiskSpec, Progress, flat_name, info, refused, rewrite_descriptor, write_text};
use crate::error::{FsError, FsErrorKind};
use crate::file::{OpenFile, OpenMode};
use crate::format::body::{Content, DiskFormat};
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{HoldMode, ObjectFlags, ObjectType};
use crate::mapping::tree::{MAX_FILE_BLOCKS, Shape};
use crate::volume::{NewFile, NewObjectSpec, Volume};

/// Creates the disk `name` (ending in `.vmdk`) in a directory: the data file with its blocks, then the descriptor.
///
/// # Errors
/// `Exists`, `NoSpace`, `TooBig`, `Invalid` (a name without .vmdk, a size of 0 or no multiple of 512, multi-writer that is not
/// eagerzeroedthick). Nothing is left behind.
pub async fn create(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    spec: DiskSpec,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let (flat, file) = begin(volume, directory, name, spec).await?;
    let made = thicken(volume, &file, 0..spec.size, spec.format, progress).await;
    finish(volume, directory, name, &flat, spec, file, made).await
}

/// Creates the data file, open for writing and without any block.
pub(super) async fn begin(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    spec: DiskSpec,
) -> Result<(String, Arc<OpenFile>), FsError> {
    let flat = flat_name(name)?;
    if spec.size == 0 || !spec.size.is_multiple_of(SECTOR_BYTES) {
        return Err(refused(FsErrorKind::Invalid, name, "the size of a disk is a multiple of 512 bytes, and not 0"));
    }
    if spec.multi_writer && spec.format != DiskFormat::EagerZeroedThick {
        return Err(refused(FsErrorKind::Invalid, name, "a disk for several writers must be eagerzeroedthick"));
    }
    let block = volume.info().block_size;
    if spec.size.div_ceil(block.bytes()) > MAX_FILE_BLOCKS {
        let cause = format!("{} bytes are more than a disk of this volume can have", spec.size);
        return Err(refused(FsErrorKind::TooBig, name, &cause));
    }
    if volume.lookup(directory, name).await.is_ok() {
        return Err(refused(FsErrorKind::Exists, name, "there is such a name already"));
    }
    let flags = if spec.multi_writer { ObjectFlags::MULTI_WRITER } else { ObjectFlags::empty() };
    let stat = volume
        .create_object(
            directory,
            flat.as_bytes(),
            NewObjectSpec {
                object_type: ObjectType::Disk,
                flags,
                luns: None,
                prefer: None,
                mode: spec.mode,
                uid: spec.uid,
                gid: spec.gid,
                size: spec.size,
                disk: Some(spec.format),
                content: Content::Mapped(Shape::new(volume.info().cell_size).empty_root(spec.size, block)),
                lock: Some(if spec.multi_writer { HoldMode::MultiWriter } else { HoldMode::Exclusive }),
            },
        )
        .await?;
    match volume.open(stat.object, OpenMode::WRITE).await {
        Ok(file) => Ok((flat, file)),
        Err(error) => {
            remove(volume, directory, flat.as_bytes()).await;
            Err(error)
        }
    }
}

/// Closes the data file and writes the descriptor, or takes everything back.
pub(super) async fn finish(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    flat: &str,
    spec: DiskSpec,
    file: Arc<OpenFile>,
    made: Result<(), FsError>,
) -> Result<(), FsError> {
    let closed = volume.close(file).await;
    let described = match made.and(closed) {
        Ok(()) => describe(volume, directory, name, flat, spec).await,
        Err(error) => Err(error),
    };
    if described.is_err() {
        remove(volume, directory, flat.as_bytes()).await;
    }
    described
}

async fn describe(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    flat: &str,
    spec: DiskSpec,
) -> Result<(), FsError> {
    let mut cid = [0; 4];
    volume.context().env().random(&mut cid);
    // ffffffff says "no parent", fffffffe "never written": neither is drawn.
    let cid = u32::from_le_bytes(cid) & 0x7fff_ffff;
    let descriptor = Descriptor::for_disk(spec.size, flat, spec.format, spec.adapter, cid);
    let (mode, uid, gid) = (spec.mode, spec.uid, spec.gid);
    write_descriptor(volume, DescriptorFile { directory, name, mode, uid, gid }, &descriptor).await
}

/// A descriptor file to be made.
pub(crate) struct DescriptorFile<'a> {
    pub(crate) directory: ObjectRef,
    pub(crate) name: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Makes a descriptor file; one that could not be written is removed again.
pub(crate) async fn write_descriptor(
    volume: &Volume,
    file: DescriptorFile<'_>,
    descriptor: &Descriptor,
) -> Result<(), FsError> {
    let DescriptorFile { directory, name, mode, uid, gid } = file;
    let new = NewFile { object_type: ObjectType::File, mode, uid, gid, exclusive: true };
    let (_, file) = volume.create(directory, name, new, Some(OpenMode::WRITE)).await?;
    let Some(file) = file else {
        return Err(refused(FsErrorKind::Busy, name, "the descriptor could not be opened after it was created"));
    };
    let written = write_text(volume, &file, descriptor).await;
    let written = written.and(volume.close(file).await);
    if written.is_err() {
        remove(volume, directory, name).await;
    }
    written
}

async fn remove(volume: &Volume, directory: ObjectRef, name: &[u8]) {
    if let Err(error) = volume.unlink(directory, name).await {
        tracing::warn!(%error, "what an operation that failed had made is still there; remove it");
    }
}

/// Gives a range of a disk what its policy says: blocks, and zeros in them.
async fn thicken(
    volume: &Volume,
    file: &OpenFile,
    range: std::ops::Range<u64>,
    format: DiskFormat,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let total = range.end - range.start;
    let mut tell = |done| progress(Progress { done, total });
    match format {
        DiskFormat::Thin => {}
        DiskFormat::ZeroedThick => volume.files().allocate_with_progress(file, range, &mut tell).await?,
        DiskFormat::EagerZeroedThick => {
            // All blocks first: a disk that does not fit fails before hours of zeroing.
            volume.files().allocate_with_progress(file, range.clone(), &mut |_| {}).await?;
            volume.files().zero_fill(file, range, &mut tell).await?;
        }
    }
    Ok(())
}

/// Lets a disk grow to `size` bytes. A thick one owns its new blocks before it says so.
///
/// # Errors
/// `Invalid` when it would not grow; `Busy` while it is in use; `NoSpace`; `Unsupported` for a disk of several writers.
pub async fn extend(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    size: u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let mut disk = stale_info(volume, directory, name, size).await?;
    let format = disk.1.ok_or_else(|| ordinary(name))?;
    let file = volume.open(disk.2, OpenMode::WRITE).await?;
    let done = async {
        if size > file.size() {
            thicken(volume, &file, file.size()..size, format, progress).await?;
            volume.files().commit_disk(&file, size, format).await?;
        }
        Ok(())
    };
    let done: Result<(), FsError> = done.await;
    done.and(volume.close(file).await)?;
    let adapter = disk.0.adapter();
    disk.0.set_disk_bytes(size, adapter);
    rewrite_descriptor(volume, directory, name, &disk.0).await
}

/// The descriptor, policy and object of a disk that is to grow; one whose extension was cut off may be extended again.
async fn stale_info(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    size: u64,
) -> Result<(Descriptor, Option<DiskFormat>, ObjectRef), FsError> {
    let descriptor = super::read_descriptor(volume, directory, name).await?;
    let Some((flat, sectors)) = descriptor.flat_extent() else {
        return Err(refused(FsErrorKind::Invalid, name, "only a disk whose data is one file beside it can grow"));
    };
    let stat = volume.lookup(directory, flat.as_bytes()).await?;
    if size < stat.attributes.size || size <= sectors * SECTOR_BYTES || !size.is_multiple_of(SECTOR_BYTES) {
        let cause = format!("it has {} bytes; give a greater size that is a multiple of 512", stat.attributes.size);
        return Err(refused(FsErrorKind::Invalid, name, &cause));
    }
    if size.div_ceil(volume.info().block_size.bytes()) > MAX_FILE_BLOCKS {
        let cause = format!("{size} bytes are more than a disk of this volume can have");
        return Err(refused(FsErrorKind::TooBig, name, &cause));
    }
    if stat.flags.contains(ObjectFlags::MULTI_WRITER) {
        return Err(refused(FsErrorKind::Unsupported, name, "a disk of several writers does not grow"));
    }
    Ok((descriptor, stat.attributes.disk, stat.object))
}

/// Turns a disk into an eagerzeroedthick one: every block is owned, every granule that was never written holds zeros.
///
/// # Errors
/// `Busy` while it is in use; `NoSpace`: it stays what it was, with more blocks.
pub async fn inflate(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let disk = info(volume, directory, name).await?;
    if disk.format.is_none() {
        return Err(ordinary(name));
    }
    let eager = DiskFormat::EagerZeroedThick;
    let file = volume.open(disk.flat.object, OpenMode::WRITE).await?;
    let mut done = thicken(volume, &file, 0..disk.size, eager, progress).await;
    if done.is_ok() {
        done = volume.files().commit_disk(&file, disk.size, eager).await;
    }
    done.and(volume.close(file).await)?;
    let mut descriptor = disk.descriptor;
    descriptor.set_ddb("thinProvisioned", None);
    rewrite_descriptor(volume, directory, name, &descriptor).await
}

fn ordinary(name: &[u8]) -> FsError {
    let cause =
        "its data is an ordinary file or a raw device, not a virtual disk of this volume; clone it to make it one";
    refused(FsErrorKind::Invalid, name, cause)
}
