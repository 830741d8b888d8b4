//! Owns: what the daemon does at a slot's cells: open the LUN, join, look again after a restart, renew, leave.
//! Promises: a LUN is used only when its header shows the volume, index and UUID that the mount named; a slot is made dirty only when
//! nothing of its mount is left. Must not know: sockets, when anything is due.

use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::cas::CellIo;
use vmfs_core::env::{Env, Instant};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::CellContext;
use vmfs_core::format::header::{LeaseTimes, LockMode, LunHeader};
use vmfs_core::format::layout;
use vmfs_core::keeper::{Joining, adopt_joined};
use vmfs_core::lun::{Fencing, Lun, OpenLun};
use vmfs_core::real_env::RealEnv;
use vmfs_core::slot::{self, HostIdentity, OwnSlot};
use vmfs_core::units::{CellAddress, CellSize, LunIndex, SlotId, SlotRef};
use vmfs_core::window::{Carriers, MemberLun};

use super::messages::{LunPlace, MountIdentity};

/// How long a LUN may take to answer its first read; the thread of all slots waits for nothing that did not answer before.
const FIRST_READ: Duration = Duration::from_secs(10);

/// A LUN that is open, and the slot on it.
pub struct Opened {
    io: CellIo,
    lun: Rc<dyn Lun>,
    own: OwnSlot,
}

/// What became of the attempt to make a slot dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// It is dirty.
    Dirty,
    /// Something may still be in flight.
    NotYet,
    /// This LUN cannot tell: takeover waits for the lease.
    TimeOnly,
}

fn refuse<T>(kind: FsErrorKind, message: String) -> Result<T, FsError> {
    Err(FsError::refused(kind, message))
}

/// The identity of a mount's host as slots carry it.
fn host_of(mount: &MountIdentity) -> HostIdentity {
    HostIdentity { host: mount.host.0, boot: mount.boot.0, name: mount.host_name.clone() }
}

/// The index of a place.
pub fn index_of(lun: u8) -> Result<LunIndex, FsError> {
    LunIndex::new(lun).map_or_else(|| refuse(FsErrorKind::Invalid, format!("there is no LUN {lun}")), Ok)
}

/// Opens a LUN by its path and checks that it is the one that is meant.
async fn open(
    mount: &MountIdentity,
    place: &LunPlace,
    carriers: &Carriers,
) -> Result<(CellIo, Rc<dyn Lun>, LunIndex), FsError> {
    let index = index_of(place.index)?;
    let cell_size =
        [CellSize::B512, CellSize::B4096].into_iter().find(|size| size.bytes() == mount.cell_bytes as usize);
    let Some(cell_size) = cell_size else {
        return refuse(FsErrorKind::Invalid, format!("a cell has no {} bytes", mount.cell_bytes));
    };
    let context = CellContext { volume: mount.volume.0, cell_size };
    let lun = match place.window {
        Some(window) => {
            let at = CellAddress { lun: index_of(window.carrier)?, offset: window.offset };
            let found = carriers.window(&context, at).await?;
            match found.filter(|lun| lun.as_member().and_then(MemberLun::window).is_some_and(|w| w.lun == index)) {
                Some(lun) => lun,
                None => {
                    let message = format!("{index} is carried by {}, which is not kept for this mount (yet)", at.lun);
                    return refuse(FsErrorKind::Io, message);
                }
            }
        }
        None => {
            if !place.path.contains("://") {
                answers(&place.path).await?;
            }
            let lun = luns::open_lun_aside(&place.path, OpenLun::default()).await?;
            carriers.member(&context, index, lun)
        }
    };
    let opened = check(place, context, lun, index).await;
    if opened.is_err() && place.window.is_none() {
        carriers.forget(index);
    }
    opened
}

async fn check(
    place: &LunPlace,
    context: CellContext,
    lun: Rc<dyn Lun>,
    index: LunIndex,
) -> Result<(CellIo, Rc<dyn Lun>, LunIndex), FsError> {
    let cell_size = context.cell_size;
    let env: Rc<dyn Env> = Rc::new(RealEnv);
    let io = CellIo::new(context, env);
    let cell = io.read(&lun, layout::header_cell(index)).await?;
    let corrupt = |cause| FsError::Corrupt { structure: format!("header of {}", place.path), cause };
    let header = LunHeader::decode(cell_size, cell.payload()).map_err(corrupt)?;
    if header.lun_uuid != place.uuid.0 {
        let message = format!(
            "{} is another LUN here (UUID {}) than for the mount ({}): give the mount a path that means the same everywhere",
            place.path, header.lun_uuid, place.uuid.0
        );
        return refuse(FsErrorKind::Invalid, message);
    }
    Ok((io, lun, index))
}

/// Reads the first bytes of a path on another thread, so that a LUN that hangs stops nothing else.
async fn answers(path: &str) -> Result<(), FsError> {
    let owned = path.to_owned();
    let read = tokio::task::spawn_blocking(move || std::fs::File::open(owned)?.read_at(&mut [0; 512], 0));
    match tokio::time::timeout(FIRST_READ, read).await {
        Ok(Ok(Ok(_))) => Ok(()),
        Ok(Ok(Err(error))) => refuse(FsErrorKind::Io, format!("{path} cannot be read: {error}; check the path")),
        Ok(Err(error)) => refuse(FsErrorKind::Io, format!("{path} cannot be read: {error}")),
        Err(_) => refuse(FsErrorKind::Io, format!("{path} does not answer for {FIRST_READ:?}; check the storage")),
    }
}

/// Takes a slot for a mount.
pub async fn join(
    mount: &MountIdentity,
    place: &LunPlace,
    lease: LeaseTimes,
    prefer: Option<SlotId>,
    carriers: &Carriers,
) -> Result<Opened, FsError> {
    let (io, lun, index) = open(mount, place, carriers).await?;
    let own = slot::join(&io, &lun, index, &host_of(mount), mount.incarnation, lease, prefer).await?;
    let mut opened = Opened { io, lun, own };
    if let Err(error) = opened.register().await {
        // Nothing was done in it.
        opened.leave(true).await.ok();
        return Err(error);
    }
    Ok(opened)
}

/// Looks at a slot that was joined before this daemon began. Fenced: it is not the mount's any more.
pub async fn resume(
    mount: &MountIdentity,
    place: &LunPlace,
    lease: LeaseTimes,
    slot: SlotRef,
    carriers: &Carriers,
) -> Result<Opened, FsError> {
    let (io, lun, index) = open(mount, place, carriers).await?;
    let identity = host_of(mount);
    let joining = Joining {
        io: &io,
        lun: &lun,
        index,
        lun_uuid: place.uuid.0,
        identity: &identity,
        incarnation: mount.incarnation,
        lease,
        prefer: None,
    };
    let own = adopt_joined(&joining, slot, Instant(0)).await?;
    let opened = Opened { io, lun, own };
    opened.register().await?;
    Ok(opened)
}

impl Opened {
    /// Registers this daemon's paths to a LUN that refuses who is not. It sends no plain writes, so there is nothing to be drained on others.
    async fn register(&self) -> Result<(), FsError> {
        match self.lun.lock_mode() {
            LockMode::CompareAndWrite => slot::mark_paths(&self.io, &self.lun, &self.own).await,
            LockMode::SingleMachine => Ok(()),
        }
    }

    /// Slot and generation.
    pub fn slot(&self) -> SlotRef {
        self.own.slot
    }

    /// End of the lease.
    pub fn lease_until(&self) -> Instant {
        self.own.lease_until
    }

    /// Renews; gives the end of the lease.
    pub async fn renew(&mut self) -> Result<Instant, FsError> {
        slot::renew(&self.io, &self.lun, &mut self.own).await?;
        slot::tend_paths(&self.lun, self.own.lun).await?;
        if self.lun.as_member().is_some_and(MemberLun::is_moving)
            && let Err(error) = self.io.read(&self.lun, layout::header_cell(self.own.lun)).await
        {
            // Cells of the LUN move; when the header has moved, the LUN is not needed any more.
            tracing::debug!(%error, "a LUN that is being taken out could not be looked at; trying again");
        }
        Ok(self.own.lease_until)
    }

    /// Where the LUN's cells are, once all of them have moved.
    pub fn window(&self) -> Option<CellAddress> {
        self.lun.as_member()?.window().map(|window| window.at)
    }

    /// Leaves the slot, free or dirty.
    pub async fn leave(&mut self, clean: bool) -> Result<(), FsError> {
        slot::leave(&self.io, &self.lun, &mut self.own, clean).await?;
        self.lun.unmark_paths().await;
        Ok(())
    }

    /// Makes the slot of a mount that is gone dirty, if it is proven that nothing of it, or of its VMMs, is in flight.
    pub async fn make_dirty(&mut self) -> Result<Drain, FsError> {
        let slot = self.own.slot.slot;
        match self.lun.fence(slot::path_owner(&self.io, &self.own)).await? {
            Fencing::NotYet => return Ok(Drain::NotYet),
            Fencing::TimeOnly => return Ok(Drain::TimeOnly),
            Fencing::Proven => {}
        }
        let left = self.leave(false).await;
        self.lun.end_fence(slot);
        left.map(|()| Drain::Dirty)
    }
}
