//! Owns: the sentences about hosts and their slots: who holds a lock, what becomes of it, why this incarnation is over.
//! Promises: what is said is what the slots say now; each sentence names what happens next by itself, or what has to be done.
//! Must not know: how a slot is taken over, how the sentences are printed.

use std::fmt;
use std::rc::Rc;

use super::Inner;
use crate::breaking;
use crate::context::Member;
use crate::error::FsErrorKind;
use crate::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use crate::lease;
use crate::object::HolderInfo;
use crate::slot;
use crate::units::{LunIndex, SlotId};

/// What a slot that is being taken waits for.
const WAITS_FOR_ITS_IO: &str = "its locks are free as soon as its lease is over and it is certain that nothing of it is in flight: \
                                on LUNs of this machine, when its programs (mount.vmfs, vmm) have ended; end or continue any that is \
                                stopped";

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

/// One holder of a lock on `lun`, in a sentence or two.
pub(super) fn holder(inner: &Inner, lun: LunIndex, info: &HolderInfo) -> String {
    let who = info.describe();
    if info.is_self {
        return who;
    }
    let h = &info.heartbeat;
    if !info.is_live {
        let grade = grade(h.fence_grade);
        return format!("{who}: its slot is {:?}, fence grade {grade}; {}", h.state, when(inner, lun, info));
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
        return format!("another host is fencing it: {WAITS_FOR_ITS_IO}");
    }
    let still = inner.context.beat_age(lun, info.holder.slot.slot, &info.heartbeat);
    format!(
        "its beat has stood still for {} of {} s as far as this mount looked; if it stays so its lock can be taken in {} s",
        still.as_secs(),
        needed.as_secs(),
        needed.saturating_sub(still).as_secs() + 1
    )
}

/// What an administrator should know of another host's slot, if there is anything.
pub(super) async fn slot(inner: &Inner, member: &Member, number: SlotId, heartbeat: &Heartbeat) -> Option<String> {
    let name = if heartbeat.host_name.is_empty() { heartbeat.host.to_string() } else { heartbeat.host_name.clone() };
    let of = format!("{number} of {} ({name})", member.lun.name());
    let by = breaker(inner, member, heartbeat).await;
    match heartbeat.state {
        SlotState::Breaking => Some(format!("{of} is being taken over{by}: {WAITS_FOR_ITS_IO}")),
        SlotState::Dirty if by.is_empty() => Some(format!(
            "{of} was left with something behind: what it held is free, and a host that has the volume mounted recovers the rest"
        )),
        SlotState::Dirty => {
            Some(format!("{of} is gone: what it held is free, and what it left behind is recovered{by}"))
        }
        SlotState::Free | SlotState::Live => None,
    }
}

/// Who takes a slot over, as the end of a sentence.
async fn breaker(inner: &Inner, member: &Member, heartbeat: &Heartbeat) -> String {
    let breaker = heartbeat.breaker;
    if breaking::is_own(&inner.context, heartbeat) {
        return " by this host".to_owned();
    }
    if breaker.incarnation == 0 {
        return String::new();
    }
    match slot::read_slot(&inner.context.io, &member.lun, member.index, breaker.slot.slot).await {
        Ok((_, its)) if its.incarnation == breaker.incarnation && !its.host_name.is_empty() => {
            format!(" by {}", its.host_name)
        }
        _ => format!(" by a host that has left ({})", breaker.slot),
    }
}

/// Waits until this incarnation is over, and says why: on which LUN, who took the slot over, as far as that can still be read.
pub(super) async fn why_over(inner: &Rc<Inner>) -> String {
    let cause = inner.context.until_over().await;
    let on = inner.context.fenced().and_then(|lun| inner.context.member(lun).ok());
    let (FsErrorKind::Fenced, Some(member)) = (cause.kind(), on) else { return cause.to_string() };
    let own = member.slot.borrow().as_ref().map(|own| own.slot.slot);
    let mut by = String::new();
    if let Some(own) = own
        && let Ok((_, heartbeat)) = slot::read_slot(&inner.context.io, &member.lun, member.index, own).await
        && heartbeat.incarnation == inner.context.incarnation()
    {
        by = breaker(inner, &member, &heartbeat).await;
    }
    let taken = if by.is_empty() { " by another host".to_owned() } else { by };
    let host = &inner.host.name;
    format!(
        "this host ({host}) was fenced: its slot on {} ({}) was taken over{taken}, because its lease was not renewed in time",
        member.index,
        member.lun.name()
    )
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
