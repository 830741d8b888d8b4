//! Owns: what is told to people: space, hosts, locks, what is wrong.
//! Promises: it changes nothing; a LUN that does not answer is part of the answer.
//! Must not know: how the answer is printed.

use std::fmt;
use std::rc::Rc;

use super::Inner;
use super::types::{HostStatus, LockHolder, LunInfo, LunStatus, StatFs, VolumeStatus, WhyLocked};
use crate::context::Member;
use crate::error::FsError;
use crate::format::dirent::{MAX_NAME, ObjectRef};
use crate::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use crate::format::root_cell::{HoldMode, Holder};
use crate::lease;
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
        all.total_blocks += count.total;
        all.free_blocks += count.free;
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
    HostStatus {
        slot: SlotRef { slot, generation: heartbeat.generation },
        state: heartbeat.state,
        host: heartbeat.host,
        name: heartbeat.host_name,
        incarnation: heartbeat.incarnation,
        beat: heartbeat.beat,
        beat_age_ms: beat_age.as_millis() as u64,
        live_since_s: heartbeat.live_since_s,
        fence_grade: heartbeat.fence_grade,
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
        explanation.push_str(&explain(inner, object.lun(), info));
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

/// A time in seconds since 1970, shown as date and time in UTC (Gregorian calendar).
pub(super) struct Date(pub(super) u64);

impl fmt::Display for Date {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAY: u64 = 86_400;
        // A broken cell may hold any number: beyond the year 9999 it is shown as it is.
        if self.0 >= 253_402_300_800 {
            return write!(out, "{} seconds after 1970", self.0);
        }
        let (mut days, second) = (self.0 / DAY, self.0 % DAY);
        let (mut year, mut month) = (1970, 0);
        let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        while days >= 365 + u64::from(is_leap(year)) {
            days -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        while days >= lengths[month] {
            days -= lengths[month];
            month += 1;
        }
        let (month, day) = (month + 1, days + 1);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(out, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

/// One holder in a sentence or two.
fn explain(inner: &Inner, lun: LunIndex, info: &HolderInfo) -> String {
    let who = info.describe();
    if info.is_self {
        return who;
    }
    let h = &info.heartbeat;
    if !info.is_live {
        return format!(
            "{who}: its slot is {:?}, fence grade {}; {}",
            h.state,
            grade(h.fence_grade),
            when(inner, lun, info)
        );
    }
    let former = if h.host == inner.host.host { ", an earlier mount of this very host" } else { "" };
    format!(
        "{who}{former}: mounted since {}, last beat {}, fence grade {}; {}",
        Date(h.live_since_s),
        h.beat,
        grade(h.fence_grade),
        when(inner, lun, info)
    )
}

/// A fence grade in words.
pub(super) fn grade(grade: FenceGrade) -> &'static str {
    match grade {
        FenceGrade::Unknown => "unknown",
        FenceGrade::A => "A (the storage keeps it out)",
        FenceGrade::B => "B (a watchdog resets it)",
        FenceGrade::C => "C (time only)",
    }
}

/// When a holder's lock can be taken, by what its slot shows.
pub(super) fn when(inner: &Inner, lun: LunIndex, info: &HolderInfo) -> String {
    let needed = lease::takeover_after(&info.heartbeat.lease);
    if !info.is_live && info.heartbeat.state != SlotState::Breaking {
        return "the next open takes its lock, once no other LUN of the file shows it alive".to_owned();
    }
    if info.heartbeat.state == SlotState::Breaking {
        return "another host is fencing it; the lock can be taken when that is done".to_owned();
    }
    let still = inner.context.beat_age(lun, info.holder.slot.slot, &info.heartbeat);
    format!(
        "its beat has stood still for {} of {} s as far as this mount looked; if it stays so its lock can be taken in {} s",
        still.as_secs(),
        needed.as_secs(),
        needed.saturating_sub(still).as_secs() + 1
    )
}

pub(super) async fn status(inner: &Rc<Inner>) -> VolumeStatus {
    let mut warnings = inner.warnings.borrow().clone();
    warnings.extend(inner.unfound.borrow().values().cloned());
    let mut luns = Vec::new();
    for member in inner.context.members() {
        luns.push(lun_status(inner, &member, &mut warnings).await);
    }
    VolumeStatus {
        info: inner.info.clone(),
        luns,
        fenced: inner.context.fenced().map(|lun| FsError::Fenced { lun }.to_string()),
        keeper: (!inner.info.read_only).then(|| inner.keeper.describe()),
        unfinished: inner.names.unfinished() + inner.names.removed_count(),
        takeovers: inner.takeovers.borrow().clone(),
        warnings,
    }
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
            Ok((_, heartbeat)) => status.hosts.push(host_status(inner, member.index, SlotId(number as u8), heartbeat)),
            Err(error) => warnings.push(format!("slot {number} of {}: {error}", member.lun.name())),
        }
    }
    for host in &status.hosts {
        if matches!(host.state, SlotState::Dirty | SlotState::Breaking) {
            warnings.push(format!(
                "{} of {} ({}) is gone and is being recovered: fence grade {}",
                host.slot,
                member.lun.name(),
                if host.name.is_empty() { host.host.to_string() } else { host.name.clone() },
                grade(host.fence_grade)
            ));
        }
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_dates_whatever_a_cell_holds() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (978_220_800, "2000-12-31 00:00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (253_402_300_799, "9999-12-31 23:59:59 UTC"),
            (u64::MAX, "18446744073709551615 seconds after 1970"),
        ] {
            assert_eq!(Date(seconds).to_string(), shown);
        }
    }
}
