//! Owns: who keeps a mount's slots: this mount itself, or a daemon of the host that outlives it.
//! Promises: a lease is renewed by one process only, which shows it on the gate page; a renewal is evidence of life (R1) only where the
//! mount itself sent it. Must not know: sockets and messages of a daemon; what a mount does with its slots.
//!
//! ```text
//!              join            keep                                                     leave
//! Embedded     slot::join      renewals, here                                           slot::leave
//! elsewhere    asked for       looks at the own slot every H; the gate page is the      asked for
//!                              keeper's; fenced when the slot, the page or the keeper says so
//! ```

use std::rc::Rc;
use std::time::Duration;

use crate::cas::CellIo;
use crate::context::{Context, Member};
use crate::env::{Instant, LocalFuture};
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Arena;
use crate::format::header::LeaseTimes;
use crate::format::{CellKind, layout};
use crate::gate::GateState;
use crate::lease;
use crate::lun::Lun;
use crate::slot::{self, HostIdentity, OwnSlot};
use crate::units::{CellAddress, LunIndex, SlotId, SlotRef, Uuid};

/// A LUN on which a mount wants a slot.
#[derive(Clone, Copy)]
pub struct Joining<'a> {
    /// Reads and changes its cells.
    pub io: &'a CellIo,
    /// The LUN.
    pub lun: &'a Rc<dyn Lun>,
    /// Its index.
    pub index: LunIndex,
    /// Its UUID: whoever opens it by its name checks that it is the same.
    pub lun_uuid: Uuid,
    /// Who the host is.
    pub identity: &'a HostIdentity,
    /// The mount's incarnation, the same on all LUNs.
    pub incarnation: u64,
    /// Lease parameters.
    pub lease: LeaseTimes,
    /// Slot to take when it is free.
    pub prefer: Option<SlotId>,
}

/// A slot whose lease is to be kept.
pub struct Kept<'a> {
    /// The mount.
    pub context: &'a Context,
    /// The LUN.
    pub member: &'a Member,
    /// Sleeps; false when the slot was left meanwhile, and nothing is to be kept any more.
    pub sleep: &'a dyn Fn(Duration) -> LocalFuture<'a, bool>,
}

/// Who keeps a mount's slots.
pub trait SlotKeeper {
    /// Who that is, for people.
    fn describe(&self) -> String;

    /// Takes a slot ([`slot::join`]). Its lease is kept from now on, or from [`SlotKeeper::keep`] on.
    fn join<'a>(&'a self, joining: Joining<'a>) -> LocalFuture<'a, Result<OwnSlot, FsError>>;

    /// Sees to it that the lease is renewed and that the gate page shows it, until the slot is left (`None`) or the incarnation is
    /// over there: fenced, or kind `Stale`. Keeps the member's own slot at the latest image that is known.
    fn keep<'a>(&'a self, kept: Kept<'a>) -> LocalFuture<'a, Option<FsError>>;

    /// The cells of a LUN, the slots too, have moved to the window that begins at `window`: its former device is not needed any more.
    fn moved(&self, lun: LunIndex, window: CellAddress) {
        let _ = (lun, window);
    }

    /// Leaves the slot ([`slot::leave`]). The generation is poisoned on the gate page by now.
    fn leave<'a>(
        &'a self,
        io: &'a CellIo,
        lun: &'a Rc<dyn Lun>,
        own: &'a mut OwnSlot,
        clean: bool,
    ) -> LocalFuture<'a, Result<(), FsError>>;
}

/// The mount keeps its slots itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Embedded;

impl SlotKeeper for Embedded {
    fn describe(&self) -> String {
        "the mount itself".to_owned()
    }

    fn join<'a>(&'a self, joining: Joining<'a>) -> LocalFuture<'a, Result<OwnSlot, FsError>> {
        let Joining { io, lun, index, identity, incarnation, lease, prefer, .. } = joining;
        Box::pin(slot::join(io, lun, index, identity, incarnation, lease, prefer))
    }

    fn keep<'a>(&'a self, kept: Kept<'a>) -> LocalFuture<'a, Option<FsError>> {
        Box::pin(renewals(kept))
    }

    fn leave<'a>(
        &'a self,
        io: &'a CellIo,
        lun: &'a Rc<dyn Lun>,
        own: &'a mut OwnSlot,
        clean: bool,
    ) -> LocalFuture<'a, Result<(), FsError>> {
        Box::pin(slot::leave(io, lun, own, clean))
    }
}

/// Whether an error of the own slot is the end of the incarnation there: another host took it over, or the storage went back in time.
pub fn is_over(error: &FsError) -> bool {
    matches!(error.kind(), FsErrorKind::Fenced | FsErrorKind::Stale)
}

/// When the next renewal is sent: every H, and four times as often while renewals fail. Pure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    failed: bool,
}

impl Pace {
    /// Time until the next renewal; `chance` is random.
    pub fn wait(&self, times: &LeaseTimes, chance: u8) -> Duration {
        let wait = lease::renew_after(times, chance);
        if self.failed { wait / 4 } else { wait }
    }

    /// Notes how a renewal ended; true when that is news.
    pub fn ended(&mut self, applied: bool) -> bool {
        let failed = !applied;
        std::mem::replace(&mut self.failed, failed) != failed
    }
}

/// Renews the own slot on one LUN until the volume is left or this host is fenced there.
async fn renewals(kept: Kept<'_>) -> Option<FsError> {
    let Kept { context, member, sleep } = kept;
    let mut pace = Pace::default();
    loop {
        let mut chance = [0];
        context.env().random(&mut chance);
        let times = member.slot.borrow().as_ref()?.lease;
        if !sleep(pace.wait(&times, chance[0])).await || context.fenced().is_some() {
            return None;
        }
        let _one = member.renewal.lock().await;
        match renew(context, member).await {
            Ok(true) => {
                if pace.ended(true) {
                    tracing::info!(lun = member.lun.name(), "the lease is renewed again");
                }
                if let Err(error) = slot::tend_paths(&member.lun, member.index).await {
                    return Some(error);
                }
            }
            Ok(false) => return None,
            Err(error) if is_over(&error) => return Some(error),
            Err(error) => {
                if let Some(left_out) = context.complain("renewal", Some(member.index)) {
                    let lun = member.lun.name();
                    tracing::warn!(lun, %error, left_out, "the lease could not be renewed; trying again");
                }
                pace.ended(false);
            }
        }
    }
}

/// One renewal; false when the slot was left.
async fn renew(context: &Context, member: &Member) -> Result<bool, FsError> {
    let Some(mut mine) = member.slot.borrow().clone() else {
        return Ok(false);
    };
    let sent = context.before_renewal();
    slot::renew(&context.io, &member.lun, &mut mine).await?;
    context.renewal_applied(member.index, sent);
    let margin_ns = lease::margin(&mine.lease).as_nanos() as u64;
    context.gate().extend(member.index, mine.slot.generation, mine.lease_until, margin_ns);
    member.note_seen(mine.slot, mine.cell);
    if let Some(own) = &mut *member.slot.borrow_mut() {
        own.lease_until = mine.lease_until;
    }
    Ok(true)
}

/// The own slot that another process joined: read and checked. `lease_until` is what that process said. Fenced: it is not (any more)
/// this incarnation's.
pub async fn adopt_joined(joining: &Joining<'_>, slot: SlotRef, lease_until: Instant) -> Result<OwnSlot, FsError> {
    let (io, lun) = (joining.io, joining.lun);
    let (cell, heartbeat) = slot::read_slot(io, lun, joining.index, slot.slot).await?;
    if !heartbeat.is_live(slot.generation) || heartbeat.incarnation != joining.incarnation {
        return Err(FsError::Fenced { lun: joining.index });
    }
    let at = layout::arena_cell(joining.index, slot.slot);
    let arena = io.read(lun, at).await?;
    let corrupt = |cause| FsError::Corrupt { structure: format!("arena cell {at} of {}", lun.name()), cause };
    arena.expect_kind(CellKind::Arena).map_err(corrupt)?;
    let places = Arena::decode(io.context().cell_size, arena.payload()).map_err(corrupt)?;
    if places.generation != slot.generation {
        return Err(FsError::Fenced { lun: joining.index });
    }
    let (lun, lease) = (joining.index, heartbeat.lease);
    Ok(OwnSlot { lun, slot, incarnation: joining.incarnation, cell, arena, lease, lease_until })
}

/// Keeps watch over a slot that another process renews: looks at it every H, so that a fence is seen also when that process is gone,
/// the latest image is known here too, and the page is poisoned when the slot is lost.
pub async fn watch_renewed_elsewhere(kept: Kept<'_>) -> Option<FsError> {
    let Kept { context, member, sleep } = kept;
    loop {
        let mut chance = [0];
        context.env().random(&mut chance);
        let (times, generation) = {
            let own = member.slot.borrow();
            let own = own.as_ref()?;
            (own.lease, own.slot.generation)
        };
        if !sleep(lease::renew_after(&times, chance[0])).await || context.fenced().is_some() {
            return None;
        }
        match context.prove_live([member.index]).await {
            Ok(()) => {
                context.note_answer(member);
                if let Err(error) = slot::tend_paths(&member.lun, member.index).await {
                    return Some(error);
                }
            }
            Err(error) if is_over(&error) => return Some(error),
            Err(error) => {
                if let Some(left_out) = context.complain("own slot", Some(member.index)) {
                    let lun = member.lun.name();
                    tracing::warn!(lun, %error, left_out, "the own slot could not be looked at; trying again");
                }
            }
        }
        // The keeper sees every image, this mount only those it reads: a storage that went back in time is the keeper's finding.
        if context.gate_reader().state(member.index, generation, context.env().now()) == GateState::Poisoned {
            return member.slot.borrow().is_some().then_some(FsError::Fenced { lun: member.index });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_that_fail_are_repeated_four_times_as_often_until_one_is_applied() {
        let mut pace = Pace::default();
        let usual = pace.wait(&LeaseTimes::DEFAULT, 0);
        assert_eq!(usual, Duration::from_secs(2));
        assert!(pace.ended(false) && !pace.ended(false));
        assert_eq!(pace.wait(&LeaseTimes::DEFAULT, 0), usual / 4);
        assert!(pace.ended(true) && !pace.ended(true));
        assert_eq!(pace.wait(&LeaseTimes::DEFAULT, 0), usual);
    }
}
