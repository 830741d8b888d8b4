//! Owns: taking up a member LUN while the volume is mounted.
//! Promises: a LUN is believed by its UUIDs and by what the other members say of it, never by its path; nothing is written to it before
//! its slot is joined; a failure leaves no slot behind. Must not know: where the LUN was found, how a member comes to be.

use std::rc::Rc;

use super::Inner;
use super::members::{self, Probed};
use super::mount::{FIRST_SCAN_CELLS, former_selves};
use crate::context::Member;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::MemberState;
use crate::format::layout::member_cell;
use crate::format::member;
use crate::keeper::Joining;
use crate::lease;
use crate::lun::Lun;
use crate::slot::{self, OwnSlot};
use crate::units::{CellAddress, LunIndex};

pub(super) async fn adopt(inner: &Rc<Inner>, lun: Rc<dyn Lun>) -> Result<LunIndex, FsError> {
    let _one = inner.adopting.lock().await;
    inner.for_reading()?;
    let mut probed = members::probe(lun).await?;
    check_belongs(inner, &probed)?;
    probed.lun = inner.context.carriers().member(&probed.context, probed.header.lun_index, probed.lun);
    members::check_alone(&probed, inner.info.read_only, 0)?;
    check_listed(inner, &probed).await?;
    let index = probed.header.lun_index;
    let own = if inner.info.read_only { None } else { Some(join(inner, &probed).await?) };
    let margin_ns = lease::margin(&inner.info.lease).as_nanos() as u64;
    if let Some(own) = &own {
        inner.context.gate().extend(index, own.slot.generation, own.lease_until, margin_ns);
    }
    let member = Member::new(probed.lun.clone(), probed.layout(), probed.header.clone(), own);
    assert!(inner.context.add_member(member), "that it is not there was checked, and nobody else adds one meanwhile");
    inner.files.refresh_luns();
    tracing::info!(lun = probed.lun.name(), %index, "the volume has another LUN");
    // Only a count: the background goes on with it.
    if let Err(error) = inner.objects.space().blocks.scan(index, 0, FIRST_SCAN_CELLS).await {
        tracing::warn!(lun = probed.lun.name(), %error, "free space could not be counted");
    }
    Ok(index)
}

/// Takes up the member whose cells are in the window at `at`, if the LUN that carries it is there.
pub(super) async fn adopt_window(inner: &Rc<Inner>, at: CellAddress) -> Result<(), FsError> {
    let context = inner.context.io.context();
    match inner.context.carriers().window(context, at).await? {
        Some(lun) => adopt(inner, lun).await.map(|_| ()),
        None => refuse(FsErrorKind::Io, format!("its cells are on {}, which is not there; bring that back", at.lun)),
    }
}

fn refuse<T>(kind: FsErrorKind, message: String) -> Result<T, FsError> {
    Err(FsError::refused(kind, message))
}

/// The LUN is of this volume, made like the others, and not there yet.
fn check_belongs(inner: &Inner, probed: &Probed) -> Result<(), FsError> {
    let (name, info, header) = (probed.lun.name(), &inner.info, &probed.header);
    if probed.context.volume != inner.context.io.context().volume || probed.volume() != info.uuid {
        return refuse(
            FsErrorKind::Invalid,
            format!(
                "{name} belongs to volume {} (label {:?}), not to the mounted {}; check the path",
                probed.volume(),
                header.label,
                info.uuid
            ),
        );
    }
    for member in inner.context.members() {
        let other = member.header.borrow();
        if other.lun_uuid == header.lun_uuid && member.lun.name() == name {
            return refuse(FsErrorKind::Exists, format!("{name} is in use already as {}", member.index));
        }
        if other.lun_uuid == header.lun_uuid || member.index == header.lun_index {
            return refuse(
                FsErrorKind::Exists,
                format!(
                    "{name} says that it is {} ({}), which is in use as {}: it is another path to it, a clone or a snapshot; leave \
                     it out",
                    header.lun_index,
                    header.lun_uuid,
                    member.lun.name()
                ),
            );
        }
    }
    let differs = if probed.context.cell_size != info.cell_size {
        "cell size"
    } else if header.block_size != info.block_size {
        "block size"
    } else if header.root != info.root.fd {
        "root directory"
    } else if header.lock_mode != info.lock_mode {
        "lock mode"
    } else if header.lease != info.lease {
        "lease"
    } else {
        return Ok(());
    };
    refuse(FsErrorKind::Invalid, format!("{name} has another {differs} than the volume {}; run fsck.vmfs", info.uuid))
}

/// What the members that are there say of the LUN: all that answer know it, none calls it removed or lost.
async fn check_listed(inner: &Inner, probed: &Probed) -> Result<(), FsError> {
    let header = &probed.header;
    let mut unanswered = None;
    let mut listed = false;
    for present in inner.context.members() {
        let cell = match inner.context.read_cell(member_cell(present.index, header.lun_index)).await {
            Ok(cell) => cell,
            Err(error) => {
                unanswered = Some(error);
                continue;
            }
        };
        let corrupt = |cause| FsError::Corrupt { structure: format!("member cell {}", cell.address()), cause };
        let entry = member::Member::decode(cell.payload()).map_err(corrupt)?;
        let in_use = match entry.state {
            MemberState::Joining | MemberState::Active | MemberState::Draining => true,
            MemberState::Carried => probed.lun.as_member().is_some_and(|member| member.window().is_some()),
            _ => false,
        };
        if entry.lun_uuid != header.lun_uuid || !in_use {
            let says = match entry.state {
                MemberState::Free => "nobody".to_owned(),
                state => format!("{} and {state:?}", entry.lun_uuid),
            };
            return refuse(
                FsErrorKind::Invalid,
                format!(
                    "{} says that it is {} with UUID {}, but {} has {says} there; leave it out, or run fsck.vmfs",
                    probed.lun.name(),
                    header.lun_index,
                    header.lun_uuid,
                    present.lun.name()
                ),
            );
        }
        listed = true;
    }
    match unanswered {
        Some(error) if !listed => Err(error),
        _ => Ok(()),
    }
}

/// Joins a slot, marks the path as its, and reads it live.
async fn join(inner: &Inner, probed: &Probed) -> Result<OwnSlot, FsError> {
    let (io, lun, index) = (&inner.context.io, &probed.lun, probed.header.lun_index);
    let incarnation = inner.info.incarnation;
    let fenced = || inner.context.fenced().map_or(Ok(()), |lun| Err(FsError::Fenced { lun }));
    fenced()?;
    let elsewhere = inner.context.members().iter().find_map(|m| m.slot.borrow().as_ref().map(|own| own.slot.slot));
    let joining = Joining {
        io,
        lun,
        index,
        lun_uuid: probed.header.lun_uuid,
        identity: &inner.host,
        incarnation,
        lease: probed.header.lease,
        prefer: elsewhere,
    };
    let mut own = inner.keeper.join(joining).await?;
    let ready = async {
        slot::mark_paths(io, lun, &own).await?;
        let mut warnings = Vec::new();
        let former = former_selves(io, probed, &inner.host, incarnation, &mut warnings).await?;
        inner.warnings.borrow_mut().extend(warnings);
        former.into_iter().for_each(|(lun, slot)| inner.context.suspect(lun, slot));
        fenced()
    };
    match ready.await {
        Ok(()) => Ok(own),
        Err(error) => {
            // Nothing was done in it.
            inner.keeper.leave(io, lun, &mut own, true).await.ok();
            lun.unmark_paths().await;
            Err(error)
        }
    }
}
