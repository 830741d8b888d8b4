//! Owns: what is told to people: space, hosts, locks, what is wrong.
//! Promises: it changes nothing on a LUN; a LUN that does not answer is part of the answer.
//! Must not know: how the answer is printed.

use std::rc::Rc;

use super::types::{Affected, HostStatus, LockHolder, LunInfo, LunStatus, MissingLun, StatFs, VolumeStatus, WhyLocked};
use super::{Inner, explain};
use crate::context::Member;
use crate::error::FsError;
use crate::format::dirent::{MAX_NAME, ObjectRef};
use crate::format::header::MemberState;
use crate::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use crate::format::root_cell::{HoldMode, Holder};
use crate::object::HolderInfo;
use crate::slot;
use crate::units::{LunIndex, SlotId, SlotRef};

pub(super) fn statfs(inner: &Inner) -> StatFs {
    let blocks = &inner.objects.space().blocks;
    let mut all = StatFs {
        block_size: inner.info.block_size.bytes(),
        total_blocks: 0,
        free_blocks: 0,
        name_max: MAX_NAME as u32,
    };
    for member in inner.context.members() {
        let count = blocks.count(member.index);
        // Of a LUN that was taken out there is nothing but what stays of it, and that is in blocks of another one.
        let is_there = member.header.borrow().state != MemberState::Carried;
        all.total_blocks += if is_there { count.total } else { 0 };
        // What is being emptied takes nothing.
        all.free_blocks += if inner.context.is_draining(member.index) { 0 } else { count.free };
    }
    all
}

pub(super) fn luns(inner: &Inner) -> Vec<LunInfo> {
    inner.context.members().iter().map(|member| lun_info(member)).collect()
}

fn lun_info(member: &Member) -> LunInfo {
    let header = member.header.borrow();
    LunInfo {
        index: member.index,
        name: member.lun.name().to_owned(),
        uuid: header.lun_uuid,
        bytes: header.lun_bytes,
        state: header.state,
        slot: member.slot.borrow().as_ref().map(|own| own.slot),
    }
}

fn host_status(inner: &Inner, lun: LunIndex, slot: SlotId, heartbeat: Heartbeat) -> HostStatus {
    let beat_age = inner.context.beat_age(lun, slot, &heartbeat);
    let own = heartbeat.incarnation == inner.info.incarnation && inner.info.incarnation != 0;
    let seen = inner.context.member(lun).ok().and_then(|member| member.lun.reservation());
    let is_its = |key: &&u64| heartbeat.reservation_key != 0 && **key == heartbeat.reservation_key;
    let registered_paths = seen.as_ref().map_or(0, |seen| seen.keys.iter().filter(is_its).count() as u32);
    let can_be_shut_out =
        heartbeat.state == SlotState::Live && registered_paths > 0 && seen.is_some_and(|seen| seen.keeps_out());
    HostStatus {
        slot: SlotRef { slot, generation: heartbeat.generation },
        state: heartbeat.state,
        host: heartbeat.host,
        name: heartbeat.host_name,
        incarnation: heartbeat.incarnation,
        beat: heartbeat.beat,
        beat_age_ms: beat_age.as_millis() as u64,
        live_since_s: heartbeat.live_since_s,
        fence_grade: if can_be_shut_out { FenceGrade::A } else { heartbeat.fence_grade },
        reservation_key: heartbeat.reservation_key,
        registered_paths,
        lease: heartbeat.lease,
        own,
        former_self: heartbeat.host == inner.host.host && !own,
    }
}

pub(super) async fn why_locked(inner: &Rc<Inner>, what: ObjectRef) -> Result<WhyLocked, FsError> {
    let object = inner.objects.load(what).await?;
    let image = object.image();
    let infos = inner.objects.who_holds(&object).await?;
    let record = &image.root.lock;
    let unclean = image.root.unclean;
    let mut explanation = match record.mode {
        HoldMode::Free => "nobody holds it".to_owned(),
        HoldMode::Exclusive => "held by one host to write:".to_owned(),
        HoldMode::Shared => "held to read:".to_owned(),
        HoldMode::MultiWriter => "held by several writers:".to_owned(),
    };
    for info in &infos {
        explanation.push_str("\n  ");
        explanation.push_str(&explain::holder(inner, object.lun(), info));
    }
    if record.wanted {
        explanation.push_str("\nanother host asks to be let in");
    }
    if unclean.token.0 != 0 {
        let how = match unclean.broken == Holder::default() {
            true => "grade A: nothing of it can arrive any more".to_owned(),
            false => format!("grade C: {} is not proven fenced, what is freed goes to quarantine", unclean.broken.slot),
        };
        explanation.push_str(&format!("\nit was taken over from a host that was gone, {how}"));
    }
    for info in infos.iter().filter(|info| !info.is_self) {
        // Whoever asks waits for it: its slot is watched from now on, so that it is taken over if its host is gone.
        inner.context.suspect(object.lun(), info.holder.slot.slot);
    }
    let holder = |info: &HolderInfo| LockHolder {
        slot: info.holder.slot,
        incarnation: info.holder.incarnation,
        own: info.is_self,
        counts: info.is_live,
        host: (info.heartbeat.incarnation == info.holder.incarnation)
            .then(|| host_status(inner, object.fd.lun(), info.holder.slot.slot, info.heartbeat.clone())),
    };
    Ok(WhyLocked {
        object: object.reference(),
        mode: record.mode,
        holders: infos.iter().map(holder).collect(),
        wanted: record.wanted,
        explanation,
    })
}

pub(super) async fn status(inner: &Rc<Inner>) -> VolumeStatus {
    let mut warnings = inner.warnings.borrow().clone();
    warnings.extend(inner.unfound.borrow().values().cloned());
    let mut luns = Vec::new();
    for member in inner.context.members() {
        luns.push(lun_status(inner, &member, &mut warnings).await);
    }
    let affected = super::affected::affected(inner).await.unwrap_or_else(|error| {
        warnings.push(format!("what the lost LUNs hurt could not be found out: {error}"));
        Affected { luns: inner.context.lost_luns(), objects: Vec::new(), cut: true }
    });
    VolumeStatus {
        info: inner.info.clone(),
        luns,
        affected,
        missing: missing(inner),
        fenced: inner.context.over().map(|cause| cause.to_string()),
        keeper: (!inner.info.read_only).then(|| inner.keeper.describe()),
        unfinished: inner.names.unfinished() + inner.names.removed_count(),
        takeovers: inner.takeovers.borrow().clone(),
        warnings,
    }
}

/// The members that were missing at the mount and are still.
pub(super) fn missing(inner: &Inner) -> Vec<MissingLun> {
    inner.missing.iter().filter(|lun| inner.context.member(lun.index).is_err()).cloned().collect()
}

async fn lun_status(inner: &Inner, member: &Rc<Member>, warnings: &mut Vec<String>) -> LunStatus {
    let count = inner.objects.space().blocks.count(member.index);
    let now = inner.context.env().now();
    let own = member.slot.borrow().as_ref().map(|own| own.slot.generation);
    let (shown, lease_until) = inner.context.gate_reader().lease_until(member.index);
    let lease_left_ms = if own == Some(shown) { lease_until.0.saturating_sub(now.0) / 1_000_000 } else { 0 };
    let mut status = LunStatus {
        info: lun_info(member),
        total_blocks: count.total,
        free_blocks: count.free,
        hosts: Vec::new(),
        lease_left_ms,
        error: None,
        lost: inner.context.is_lost(member.index),
        reservation: member.lun.reservation(),
    };
    let slots = match slot::read_slots(&inner.context.io, &member.lun, member.index).await {
        Ok(slots) => slots,
        Err(error) => {
            status.error = Some(error.to_string());
            return status;
        }
    };
    for (number, slot) in slots.into_iter().enumerate() {
        match slot {
            Ok((_, heartbeat)) if heartbeat.state == SlotState::Free => {}
            Ok((_, heartbeat)) => {
                if let Some(warning) = explain::slot(inner, member, SlotId(number as u8), &heartbeat).await {
                    warnings.push(warning);
                }
                status.hosts.push(host_status(inner, member.index, SlotId(number as u8), heartbeat));
            }
            Err(error) => warnings.push(format!("slot {number} of {}: {error}", member.lun.name())),
        }
    }
    status
}
