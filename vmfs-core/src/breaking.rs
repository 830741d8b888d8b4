//! Owns: the steps by which a slot is taken from an incarnation that is gone: claim, fence, dirty, free.
//! Promises: the claim comes first, from the very image that stood still, so a live owner is never fenced; where only time fences, a slot
//! is dirty only when its owner's lease is over; a breaker that dies is broken in turn.
//! Must not know: how it was found out that an incarnation is gone, what it left behind.
//!
//! ```text
//! Live(owner) --claim--> Breaking(owner, breaker) --fenced--> Dirty(owner, breaker) --recovered--> Free
//!                         ^  breaker gone: another one's name   ^
//! ```
//!
//! An owner that is gone on one LUN may live on another: there it is asked to *drop* the first one's locks, and acknowledges when nothing
//! that it sent under them is on its way. One that does not answer for as long as a lease takes is claimed, though it renews: then its
//! lease has still to run out. So it may after a claim that another breaker made, who did not say why.

use crate::cas::{CasOutcome, CellChange};
use crate::context::{Context, Member};
use crate::error::FsError;
use crate::format::Cell;
use crate::format::heartbeat::{Breaker, FenceGrade, Heartbeat, SlotState};
use crate::lun::{Fencing, PathOwner};
use crate::sabotage::{Sabotage, active};
use crate::slot;
use crate::units::{LunIndex, SlotId};

/// What a breaker knows of the lease of an owner that can renew it no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnersLease {
    /// It is over by any clock within the bound, or an administrator vouches for it.
    Over,
    /// It may still run: the owner may not know of the claim, and its gate may be open.
    MayRun,
}

/// Changes a slot's cell from `cell`; `None`: somebody else was first, or it is not certain who was: look again.
async fn change(context: &Context, member: &Member, cell: &Cell, next: &Heartbeat) -> Result<Option<Cell>, FsError> {
    context.prove_live([member.index]).await?;
    match context.cas(cell, CellChange::payload(cell, next.encode())).await? {
        CasOutcome::Applied(cell) => Ok(Some(cell)),
        CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => Ok(None),
        CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
    }
}

/// This host as a breaker on a LUN.
fn own_breaker(context: &Context, member: &Member) -> Result<Breaker, FsError> {
    Ok(Breaker { slot: context.own_slot(member.index)?, incarnation: context.incarnation(), beat: 0 })
}

/// Whether the breaker named in a slot is this host.
pub fn is_own(context: &Context, heartbeat: &Heartbeat) -> bool {
    context.incarnation() != 0 && heartbeat.breaker.incarnation == context.incarnation()
}

/// Claims a slot from the image that stood still, or one whose breaker is gone: its owner's renewals mismatch for ever.
pub async fn claim(context: &Context, member: &Member, cell: &Cell) -> Result<Option<Cell>, FsError> {
    if active(Sabotage::ClaimSkipped) {
        return Ok(Some(cell.clone()));
    }
    let found = slot::decode(cell)?;
    let state = if found.state == SlotState::Live { SlotState::Breaking } else { found.state };
    let next = Heartbeat { state, breaker: own_breaker(context, member)?, ..found };
    change(context, member, cell, &next).await
}

/// Asks the owner of a live slot to drop its locks on `lock_lun`, where it is gone. `None`: another request is not answered yet, or the
/// cell has changed: look again.
pub async fn request_drop(
    context: &Context,
    member: &Member,
    cell: &Cell,
    lock_lun: LunIndex,
) -> Result<Option<Cell>, FsError> {
    let found = slot::decode(cell)?;
    if found.drop_lun == lock_lun.get() {
        // Asked once and no more: each request changes the cell, and a cell that stands still is how the owner's death shows.
        return Ok(Some(cell.clone()));
    }
    if found.drop_lun != 0 && !found.drop_acknowledged {
        return Ok(None);
    }
    change(context, member, cell, &Heartbeat { drop_lun: lock_lun.get(), drop_acknowledged: false, ..found }).await
}

/// Whether the breaker named in a slot still lives on this LUN, as far as its slot says. A breaker without a name does not.
pub async fn breaker_lives(context: &Context, member: &Member, heartbeat: &Heartbeat) -> Result<bool, FsError> {
    let breaker = heartbeat.breaker;
    if breaker.incarnation == 0 {
        return Ok(false);
    }
    let (_, its) = slot::read_slot(&context.io, &member.lun, member.index, breaker.slot.slot).await?;
    Ok(its.is_live(breaker.slot.generation) && its.incarnation == breaker.incarnation)
}

/// Fences the owner of a slot that this host has claimed, and makes the slot dirty. `None`: it is not fenced yet (where only time
/// fences: its lease may still run), or the claim was taken over: look again.
pub async fn fence(
    context: &Context,
    member: &Member,
    number: SlotId,
    cell: &Cell,
    lease: OwnersLease,
) -> Result<Option<Cell>, FsError> {
    let found = slot::decode(cell)?;
    let fence_grade = match member.lun.fence(PathOwner { slot: number, key: found.reservation_key }).await? {
        Fencing::Proven => FenceGrade::A,
        Fencing::TimeOnly => FenceGrade::C,
        Fencing::NotYet => return Ok(None),
    };
    let is_dirty = found.state == SlotState::Dirty;
    if fence_grade == FenceGrade::C && !is_dirty {
        if lease == OwnersLease::MayRun && !active(Sabotage::DirtyAtOnce) {
            return Ok(None);
        }
        tracing::warn!(
            lun = member.lun.name(),
            host = found.host_name,
            "fence grade C: that host is taken to obey its lease within its clock's bound; the storage does not keep it out"
        );
    }
    if is_dirty && found.fence_grade == fence_grade {
        return Ok(Some(cell.clone()));
    }
    let found = if active(Sabotage::ClaimSkipped) {
        Heartbeat { breaker: own_breaker(context, member)?, ..found }
    } else {
        found
    };
    change(context, member, cell, &Heartbeat { state: SlotState::Dirty, fence_grade, ..found }).await
}

/// A recovered slot may be joined again. Generation, incarnation and fence grade stay, as evidence for those who find its locks.
pub async fn free(context: &Context, member: &Member, number: SlotId, cell: &Cell) -> Result<Option<Cell>, FsError> {
    let found = slot::decode(cell)?;
    let freed = change(context, member, cell, &Heartbeat::recovered(&found)).await?;
    if freed.is_some() {
        member.lun.end_fence(number);
    }
    Ok(freed)
}
