//! Owns: raw device mappings: an object that stands for a LUN outside of the volume, and the descriptor beside it.
//! Promises: a mapping names its LUN by identity, never by path; a LUN that is an extent of a volume is not mapped.
//! Must not know: how a LUN is searched for (whoever mounts brings [`crate::lun::RawDevices`]), FUSE.
//!
//! A mapping `x.vmdk` is two files, as a VMware administrator expects: the descriptor `x.vmdk` and the mapping itself, `x-rdm.vmdk`
//! (virtual compatibility) or `x-rdmp.vmdk` (physical). Its lock is what makes a guest the only writer of the LUN.

use std::rc::Rc;

use crate::disk::descriptor::{AdapterType, Descriptor, SECTOR_BYTES};
use crate::disk::{DescriptorFile, read_descriptor, refused, stem, write_descriptor};
use crate::error::{FsError, FsErrorKind};
use crate::file::Files;
use crate::format::body::{Content, RawDevice};
use crate::format::cell::probe;
use crate::format::dirent::ObjectRef;
use crate::format::layout::HEADER_OFFSET;
use crate::format::root_cell::{ObjectFlags, ObjectType};
use crate::lun::Lun;
use crate::volume::{NewObjectSpec, Stat, Volume};

/// Bytes that are looked at where a LUN's header would be.
const HEADER_BYTES: usize = 4096;

/// A mapping to be made.
#[derive(Clone, Copy, Debug)]
pub struct RdmSpec {
    /// Physical compatibility: a guest's commands reach the LUN, the mount moves no data of it. Else virtual: a disk like any other.
    pub physical: bool,
    /// Adapter that the descriptor names.
    pub adapter: AdapterType,
    /// Permission bits of both files.
    pub mode: u32,
    /// Owner of both files.
    pub uid: u32,
    /// Group of both files.
    pub gid: u32,
}

/// What a mapping is, and where its LUN is now.
#[derive(Clone, Debug)]
pub struct RdmInfo {
    /// The LUN, as the mapping names it.
    pub device: RawDevice,
    /// Size of the mapping in bytes.
    pub size: u64,
    /// The mapping itself.
    pub mapping: Stat,
    /// Its name.
    pub mapping_name: String,
    /// How this host names the LUN, or why it cannot be had.
    pub found: Result<String, FsError>,
}

/// Maps the LUN at `device` as `name` (ending in `.vmdk`) in a directory.
///
/// # Errors
/// `Exists`; `Invalid`: a name without .vmdk, a LUN that says nothing of itself or is an extent of a volume. Nothing is left behind.
pub async fn create(
    volume: &Volume,
    directory: ObjectRef,
    name: &[u8],
    device: &str,
    spec: RdmSpec,
) -> Result<(), FsError> {
    let ending = if spec.physical { "rdmp" } else { "rdm" };
    let mapping = format!("{}-{ending}.vmdk", stem(name)?);
    let lun = volume.files().raw_devices()?.open_path(device).await?;
    check_device(volume.files(), &lun).await?;
    if volume.lookup(directory, name).await.is_ok() {
        return Err(refused(FsErrorKind::Exists, name, "there is such a name already"));
    }
    let size = lun.bytes();
    let (mode, uid, gid) = (spec.mode, spec.uid, spec.gid);
    let object = NewObjectSpec {
        object_type: ObjectType::Rdm,
        flags: ObjectFlags::empty(),
        luns: None,
        prefer: None,
        mode,
        uid,
        gid,
        size,
        disk: None,
        content: Content::Raw(RawDevice { identity: lun.identity(), physical: spec.physical }),
        lock: None,
    };
    volume.create_object(directory, mapping.as_bytes(), object).await?;
    let text = Descriptor::for_raw_device(size, &mapping, spec.physical, spec.adapter, content_id(volume));
    let written = write_descriptor(volume, DescriptorFile { directory, name, mode, uid, gid }, &text).await;
    if written.is_err()
        && let Err(error) = volume.unlink(directory, mapping.as_bytes()).await
    {
        tracing::warn!(%error, mapping, "the mapping whose descriptor could not be written is still there; remove it");
    }
    written
}

fn content_id(volume: &Volume) -> u32 {
    let mut cid = [0; 4];
    volume.context().env().random(&mut cid);
    // As a disk's: ffffffff says "no parent", fffffffe "never written".
    u32::from_le_bytes(cid) & 0x7fff_ffff
}

/// Refuses a LUN that must not, or cannot, be mapped.
async fn check_device(files: &Files, lun: &Rc<dyn Lun>) -> Result<(), FsError> {
    let refuse = |why: &str| Err(FsError::refused(FsErrorKind::Invalid, format!("{}: {why}", lun.name())));
    if lun.identity().bytes().is_empty() {
        return refuse(
            "the device does not say who it is (no world-wide name and no serial number), so that no host could tell it \
             from another one; map a device with an identity",
        );
    }
    if lun.bytes() == 0 {
        return refuse("it has no bytes");
    }
    files.check_is_no_member(&**lun)?;
    if lun.bytes() >= HEADER_OFFSET + HEADER_BYTES as u64 {
        let header = lun.read(HEADER_OFFSET, HEADER_BYTES).await?;
        if let Ok((context, index)) = probe(HEADER_OFFSET, &header) {
            return refuse(&format!(
                "it is extent {index} of the VMFS volume {}; a guest would destroy the volume. If that volume is given up, \
                 overwrite the LUN's first 4 MiB",
                context.volume
            ));
        }
    }
    Ok(())
}

/// Tells what a mapping is. `name` is the descriptor's.
///
/// # Errors
/// `NotFound`; `Invalid` when it describes no raw device mapping.
pub async fn info(volume: &Volume, directory: ObjectRef, name: &[u8]) -> Result<RdmInfo, FsError> {
    let descriptor = read_descriptor(volume, directory, name).await?;
    let no_mapping = || refused(FsErrorKind::Invalid, name, "it describes no raw device mapping; see vmfs disk info");
    let (mapping_name, sectors) = descriptor.flat_extent().ok_or_else(no_mapping)?;
    let mapping = volume.lookup(directory, mapping_name.as_bytes()).await?;
    let device = volume.raw_device(mapping.object).await?.ok_or_else(no_mapping)?;
    let size = mapping.attributes.size;
    if sectors * SECTOR_BYTES != size {
        let cause = format!("the descriptor says {} bytes, the mapping {size}; make it anew", sectors * SECTOR_BYTES);
        return Err(refused(FsErrorKind::Invalid, name, &cause));
    }
    let found = match volume.files().raw_devices() {
        Ok(devices) => devices.find(&device.identity, true).await.map(|lun| lun.name().to_owned()),
        Err(error) => Err(error),
    };
    Ok(RdmInfo { device, size, mapping, mapping_name: mapping_name.to_owned(), found })
}
