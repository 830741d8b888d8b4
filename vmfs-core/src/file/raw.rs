//! Owns: the LUN behind an open raw device mapping: found, checked, taken and given back.
//! Promises: data goes only to the LUN whose identity the mapping has, of the size that it says, and only while this host has the
//! mapping's lock and the LUN to itself. Must not know: how a LUN is searched for.

use std::rc::Rc;
use std::time::Duration;

use super::files::{Files, Open};
use super::open_file::{Device, SharedFile};
use crate::error::{FsError, FsErrorKind};
use crate::format::body::Content;
use crate::format::root_cell::ObjectType;
use crate::lun::{Lun, RawDevices};
use crate::units::LunIndex;

/// How often, and for how long, the LUN of a mapping whose lock was just taken is waited for: its last holder's commands end.
const TAKE_PAUSE: Duration = Duration::from_millis(50);
const TAKE_TRIES: u32 = 20;

impl Files {
    /// Brings the means to find LUNs outside of the volume.
    pub fn set_raw_devices(&self, devices: Rc<dyn RawDevices>) {
        *self.devices.borrow_mut() = Some(devices);
    }

    /// The means to find LUNs outside of the volume.
    pub fn raw_devices(&self) -> Result<Rc<dyn RawDevices>, FsError> {
        self.devices.borrow().clone().ok_or_else(|| {
            FsError::refused(FsErrorKind::Unsupported, "this mount looks for no raw devices; use mount.vmfs")
        })
    }

    /// Refuses a LUN that belongs to this volume.
    pub(crate) fn check_is_no_member(&self, lun: &dyn Lun) -> Result<(), FsError> {
        let identity = lun.identity();
        let is_it = |member: &dyn Lun| {
            member.name() == lun.name() || (!identity.bytes().is_empty() && member.identity() == identity)
        };
        match self.context.members().iter().find(|member| is_it(&*member.lun)) {
            None => Ok(()),
            Some(member) => Err(FsError::refused(
                FsErrorKind::Invalid,
                format!("{}: it is {} of this very volume; its data would be destroyed", lun.name(), member.index),
            )),
        }
    }

    /// Before the lock is taken: finds the LUN of a mapping in virtual compatibility. The data of a physical one is not this host's
    /// to move, so that only its lock is needed here.
    pub(super) async fn find_device(&self, open: &Open, write: bool) -> Result<(), FsError> {
        if open.shared.object_type != ObjectType::Rdm {
            return Ok(());
        }
        let fd = open.shared.fd;
        if self.context.is_read_only() {
            let message =
                format!("{fd} is a raw device mapping: it is used under its lock, which a read-only mount cannot take");
            return Err(FsError::refused(FsErrorKind::Unsupported, message));
        }
        let image = open.object.image();
        let Content::Raw(raw) = &image.body.content else {
            let message = format!("{fd} is a raw device mapping that names no device; run fsck.vmfs");
            return Err(FsError::refused(FsErrorKind::Corrupt, message));
        };
        if raw.physical {
            open.shared.device.get_or_init(|| Device::Physical);
            return Ok(());
        }
        if open.device.borrow().is_some() {
            return Ok(());
        }
        let lun = self.raw_devices()?.find(&raw.identity, !write).await?;
        self.check_is_no_member(&*lun)?;
        let size = image.body.attributes.size;
        if lun.bytes() < size {
            let message = format!(
                "{fd} maps {size} bytes, but its device {} has {} now: it was cut, or is another one of the same name; \
                 look at the storage before it is used",
                lun.name(),
                lun.bytes()
            );
            return Err(FsError::refused(FsErrorKind::Io, message));
        }
        open.shared.device.get_or_init(|| Device::Virtual(lun.data()));
        *open.device.borrow_mut() = Some(lun);
        Ok(())
    }

    /// After the lock was taken: takes the LUN, which its last holder's commands may still be on their way to.
    pub(super) async fn take_device(&self, open: &Open, write: bool) -> Result<(), FsError> {
        let Some(Device::Virtual(data)) = open.shared.device.get() else { return Ok(()) };
        for _ in 0..TAKE_TRIES {
            if data.take_raw(write)? {
                return Ok(());
            }
            self.context.env().sleep(TAKE_PAUSE).await;
        }
        let name = open.device.borrow().as_ref().map(|lun| lun.name().to_owned()).unwrap_or_default();
        let message = format!(
            "{}: the device {name} is in use through another mapping or volume, or what its last holder sent is not at its end; \
             close it there, or try again",
            open.shared.fd
        );
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    /// Before the lock is given back; every command has ended.
    pub(super) fn release_device(&self, shared: &SharedFile) -> Result<(), FsError> {
        match shared.device.get() {
            Some(Device::Virtual(data)) => data.release_raw().map_err(FsError::from),
            Some(Device::Physical) | None => Ok(()),
        }
    }

    /// The LUN that a run of an open file lies on: a member, or for a raw device mapping its device.
    pub(super) fn lun_of(&self, open: &Open, lun: LunIndex) -> Result<Rc<dyn Lun>, FsError> {
        match &*open.device.borrow() {
            Some(device) => Ok(device.clone()),
            None => self.context.member(lun).map(|member| member.lun.clone()),
        }
    }

    /// Space is not this file system's to give or take where the data is a device's.
    pub(super) fn check_has_blocks(&self, file: &SharedFile) -> Result<(), FsError> {
        if file.object_type != ObjectType::Rdm {
            return Ok(());
        }
        let message = format!("{}: a raw device mapping has no blocks of the volume to allocate or free", file.fd);
        Err(FsError::refused(FsErrorKind::Unsupported, message))
    }
}

/// Why the data of a mapping in physical compatibility is not read or written here.
pub fn physical_refusal(file: &SharedFile) -> FsError {
    FsError::refused(
        FsErrorKind::Unsupported,
        format!(
            "{}: a raw device mapping in physical compatibility: a VMM sends its commands to the device itself, the file system moves \
             no data of it; make a mapping with vmfs rdm create --virtual to read and write it as a file",
            file.fd
        ),
    )
}
