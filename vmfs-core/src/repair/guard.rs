//! Owns: keeping hosts out of a volume while it is repaired, and the slots that were not left.
//! Promises: the headers say that it is being repaired before anything else is changed, so no mount begins; a slot is claimed before
//! its owner is fenced, so one that only slept finds that it has lost. Must not know: what is repaired.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use super::fixed::change_headers;
use super::ground::Ground;
use crate::cas::CellChange;
use crate::check::hosts_in_use;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::BEING_REPAIRED;
use crate::format::heartbeat::{Breaker, FenceGrade, Heartbeat, SlotState};
use crate::lease;
use crate::lun::{Fencing, Lun, PathOwner};
use crate::slot;
use crate::units::{LunIndex, SLOTS, SlotId, SlotRef};

/// Who was in which slot, and how far its beat was.
pub(crate) type Seen = BTreeMap<(LunIndex, SlotId), (u64, u64)>;

/// The slots in which somebody is, or was when it died.
pub(crate) async fn taken_slots(ground: &Ground) -> Result<Seen, FsError> {
    let mut seen = Seen::new();
    for (lun, member) in &ground.members {
        for (nth, slot) in slot::read_slots(&ground.io, &member.lun, *lun).await?.into_iter().enumerate() {
            if let Ok((_, heartbeat)) = slot
                && heartbeat.state != SlotState::Free
            {
                seen.insert((*lun, SlotId(nth as u8)), (heartbeat.generation.0, heartbeat.beat));
            }
        }
    }
    Ok(seen)
}

/// Refuses while a host uses the volume.
pub(crate) async fn refuse_users(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>], what: &str) -> Result<(), FsError> {
    let users = hosts_in_use(env, luns).await?;
    if users.is_empty() {
        return Ok(());
    }
    let message = format!("the volume is in use by {}; unmount it there first, then {what}", users.join(", "));
    Err(FsError::refused(FsErrorKind::Busy, message))
}

/// Says in every header that the volume is being repaired, then looks whether somebody came in before that was read. `seen` are the
/// slots as they were before the hosts were watched.
pub(super) async fn close(ground: &mut Ground, seen: &Seen) -> Result<(), FsError> {
    change_headers(ground, |header| header.incompatible |= BEING_REPAIRED).await?;
    let now = taken_slots(ground).await?;
    if now.iter().all(|(slot, beat)| seen.get(slot) == Some(beat)) {
        return Ok(());
    }
    open(ground).await?;
    let message = "a host has begun to use the volume; unmount it there first, then repair";
    Err(FsError::refused(FsErrorKind::Busy, message))
}

/// The volume may be mounted again.
pub(super) async fn open(ground: &mut Ground) -> Result<(), FsError> {
    change_headers(ground, |header| header.incompatible &= !BEING_REPAIRED).await.map(|_| ())
}

/// A slot that was not left, claimed and fenced.
pub(crate) struct Fenced {
    pub lun: LunIndex,
    pub slot: SlotId,
    pub host_name: String,
    pub fence_grade: FenceGrade,
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fenced { lun, slot, host_name, fence_grade } = self;
        write!(f, "{slot} of {lun}: host {host_name:?} was gone, fence grade {fence_grade:?}")
    }
}

/// Claims and fences every slot that was not left, from images that stood still for as long as a takeover needs. A process that is only
/// stopped, with requests on their way, is a refusal.
pub(crate) async fn fence_all(ground: &mut Ground, incarnation: u64) -> Result<Vec<Fenced>, FsError> {
    let mut left = Vec::new();
    for (lun, member) in &ground.members {
        for (nth, slot) in slot::read_slots(&ground.io, &member.lun, *lun).await?.into_iter().enumerate() {
            let (cell, found) = slot?;
            if found.state != SlotState::Free {
                left.push((*lun, SlotId(nth as u8), cell, found));
            }
        }
    }
    let watches = left.iter().filter(|(.., found)| found.state != SlotState::Dirty);
    if let Some(watch) = watches.map(|(.., found)| lease::takeover_after(&found.lease)).max() {
        ground.env().sleep(watch).await;
    }
    let mut done = Vec::new();
    for (lun, number, cell, found) in left {
        let path = ground.member(lun)?.lun.clone();
        let breaker = Breaker { slot: SlotRef::NOBODY, incarnation, beat: 0 };
        let state = if found.state == SlotState::Live { SlotState::Breaking } else { found.state };
        let claimed = Heartbeat { state, breaker, ..found.clone() };
        let cell = ground.replace(&path, &cell, CellChange::payload(&cell, claimed.encode())).await?;
        let fence_grade = match path.fence(PathOwner { slot: number, key: found.reservation_key }).await? {
            Fencing::Proven => FenceGrade::A,
            Fencing::TimeOnly => FenceGrade::C,
            Fencing::NotYet => return Err(still_there(ground, lun, number, &found)?),
        };
        let dirty = Heartbeat { state: SlotState::Dirty, fence_grade, ..claimed };
        ground.put_payload(&cell, dirty.encode()).await?;
        if fence_grade != FenceGrade::A {
            let member = ground.members.get_mut(&lun).expect("it is a key");
            member.unfenced = Some(SlotRef { slot: number, generation: found.generation });
        }
        done.push(Fenced { lun, slot: number, host_name: found.host_name, fence_grade });
    }
    Ok(done)
}

fn still_there(ground: &Ground, lun: LunIndex, number: SlotId, found: &Heartbeat) -> Result<FsError, FsError> {
    let name = ground.member(lun)?.lun.name();
    let message = format!(
        "{number} of {name}: a process of host {:?} still has the LUN open for writing, though it renews nothing; end it (see \
         fuser(1)), then {}",
        found.host_name, ground.again
    );
    Ok(FsError::refused(FsErrorKind::Busy, message))
}

/// Gives back every slot, once nothing is left that its incarnation began.
pub(super) async fn free_all(ground: &Ground) -> Result<(), FsError> {
    for (lun, member) in &ground.members {
        for number in (0..SLOTS).map(|nth| SlotId(nth as u8)) {
            let (cell, found) = slot::read_slot(&ground.io, &member.lun, *lun, number).await?;
            if found.state == SlotState::Free {
                continue;
            }
            ground.put_payload(&cell, Heartbeat::recovered(&found).encode()).await?;
            member.lun.end_fence(number);
        }
    }
    Ok(())
}
