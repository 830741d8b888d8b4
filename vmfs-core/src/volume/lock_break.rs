//! Owns: breaking a lock because an administrator asks for it.
//! Promises: without the administrator's word nobody is broken whose lease may still run; with it only the host that was named, and
//! fenced as surely as each LUN can. Must not know: how people are asked.

use std::rc::Rc;

use super::types::{BrokenLock, Takeover};
use super::{Inner, explain};
use crate::breaking::{self, OwnersLease};
use crate::context::Member;
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::ObjectRef;
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::format::root_cell::Holder;
use crate::object::{HolderInfo, Object};
use crate::slot;
use crate::units::{SlotId, SlotRef, Uuid};

/// Looks at a lock whose record other hosts change all the time.
const TRIES: u32 = 16;
/// Claims of one slot that lose to other breakers before that is an error.
const CLAIMS: u32 = 3;

pub(super) async fn break_lock(
    inner: &Inner,
    what: ObjectRef,
    host_is_down: Option<&str>,
) -> Result<BrokenLock, FsError> {
    let object = inner.objects.load(what).await?;
    let mut done = BrokenLock::default();
    for _ in 0..TRIES {
        let image = object.image();
        let own = inner.objects.own_holder(object.fd)?;
        let others: Vec<Holder> = image.root.lock.holders.iter().filter(|holder| **holder != own).copied().collect();
        if others.is_empty() {
            return nothing_left(&object, image.root.lock.holders.contains(&own), done);
        }
        if inner.objects.drop_gone_holders(&object, &image).await? {
            inner.objects.refresh(&object).await?;
            let now = object.image();
            let is_out = |holder: &&Holder| !now.root.lock.holders.contains(holder);
            done.holders.extend(others.iter().filter(is_out).map(|holder| holder.slot));
            continue;
        }
        let infos = inner.objects.who_holds(&object).await?;
        let alive: Vec<&HolderInfo> = infos.iter().filter(|info| !info.is_self).collect();
        let Some(host) = host_is_down else { return Err(too_early(inner, &object, &alive)) };
        for info in &alive {
            if !is_named(&info.heartbeat, host) {
                return Err(other_host(&object, info, host));
            }
            done.takeovers.extend(claim_all(inner, &object, &info.holder).await?);
        }
        inner.objects.refresh(&object).await?;
    }
    Err(FsError::refused(
        FsErrorKind::Busy,
        format!("{}: other hosts change its lock all the time; try again", object.fd),
    ))
}

/// Whether the word is about the owner of a slot.
fn is_named(heartbeat: &Heartbeat, host: &str) -> bool {
    heartbeat.host_name == host || Uuid::parse(host) == Some(heartbeat.host)
}

fn nothing_left(object: &Object, is_own: bool, done: BrokenLock) -> Result<BrokenLock, FsError> {
    if !done.holders.is_empty() {
        return Ok(done);
    }
    let why = if is_own { "this mount holds it itself: close the file here" } else { "nobody holds it" };
    Err(FsError::refused(FsErrorKind::Invalid, format!("{}: there is no lock to break: {why}", object.fd)))
}

fn too_early(inner: &Inner, object: &Object, alive: &[&HolderInfo]) -> FsError {
    let each = alive.iter().map(|info| {
        let beat = info.heartbeat.beat;
        format!("{}, last beat {beat}: {}", info.describe(), explain::when(inner, object.lun(), info))
    });
    let message = format!(
        "the lock is held by a host that may live: {}. Ask again then; or, only if you have made sure that the host is down, \
         say --host-is-down with its name",
        each.collect::<Vec<_>>().join("; ")
    );
    FsError::refused(FsErrorKind::Busy, message)
}

fn other_host(object: &Object, info: &HolderInfo, host: &str) -> FsError {
    let message = format!("{} is not held by {host:?} but by {}; nothing was broken", object.fd, info.describe());
    FsError::refused(FsErrorKind::Invalid, message)
}

/// Claims and fences every slot of a holder on the object's LUNs. The patrol recovers them.
async fn claim_all(inner: &Inner, object: &Object, holder: &Holder) -> Result<Vec<Takeover>, FsError> {
    let mut luns = object.image().root.luns;
    luns.insert(object.lun());
    let mut takeovers = Vec::new();
    for lun in luns.iter() {
        let member = inner.context.member(lun)?;
        let slots = slot::read_slots(&inner.context.io, &member.lun, lun).await?;
        for (number, found) in slots.into_iter().enumerate() {
            let number = SlotId(number as u8);
            let is_its = |h: &Heartbeat| {
                h.incarnation == holder.incarnation && matches!(h.state, SlotState::Live | SlotState::Breaking)
            };
            if matches!(&found, Ok((_, heartbeat)) if is_its(heartbeat)) {
                takeovers.push(claim_one(inner, &member, number, holder).await?);
            }
        }
    }
    Ok(takeovers)
}

async fn claim_one(inner: &Inner, member: &Rc<Member>, number: SlotId, holder: &Holder) -> Result<Takeover, FsError> {
    let context = &inner.context;
    let mut beat = None;
    for _ in 0..CLAIMS {
        let (cell, found) = slot::read_slot(&context.io, &member.lun, member.index, number).await?;
        if found.state == SlotState::Live && beat.replace(found.beat).is_some_and(|before| before != found.beat) {
            return Err(not_down(member, &found));
        }
        let mut claimed = Some(cell.clone());
        if found.incarnation == holder.incarnation && !breaking::is_own(context, &found) {
            if breaking::breaker_lives(context, member, &found).await? {
                let message = format!("{}: another host is fencing {number} already; try again", member.lun.name());
                return Err(FsError::refused(FsErrorKind::Busy, message));
            }
            claimed = breaking::claim(context, member, &cell).await?;
        }
        let Some(claimed) = claimed else { continue };
        context.suspect(member.index, number);
        // That is what the administrator's word is for.
        let Some(dirty) = breaking::fence(context, member, number, &claimed, OwnersLease::Over).await? else {
            return Err(not_down(member, &found));
        };
        let grade = slot::decode(&dirty)?.fence_grade;
        let slot = SlotRef { slot: number, generation: found.generation };
        tracing::warn!(
            lun = member.lun.name(), %slot, host = found.host_name, grade = explain::grade(grade),
            "taken over on an administrator's word that the host is down"
        );
        let (host, name) = (found.host, found.host_name);
        let takeover = Takeover { lun: member.index, slot, host, name, grade, attested: true };
        inner.note_takeover(takeover.clone());
        return Ok(takeover);
    }
    let message = format!("{}: other hosts claim {number} too; look again with vmfs why-locked", member.lun.name());
    Err(FsError::refused(FsErrorKind::Busy, message))
}

impl Inner {
    /// Remembers who was taken over from, for people.
    pub(super) fn note_takeover(&self, new: Takeover) {
        let mut all = self.takeovers.borrow_mut();
        match all.iter_mut().find(|known| (known.lun, known.slot) == (new.lun, new.slot)) {
            Some(known) => known.attested |= new.attested,
            None => all.push(new),
        }
    }
}

fn not_down(member: &Member, found: &Heartbeat) -> FsError {
    let message = format!(
        "{}: host {} is not down: it renews its lease, or a process of it is stopped or has commands on their way. Its slot is \
         claimed as soon as that is over; end the process there",
        member.lun.name(),
        if found.host_name.is_empty() { found.host.to_string() } else { found.host_name.clone() }
    );
    FsError::refused(FsErrorKind::Busy, message)
}
