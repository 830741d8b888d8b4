//! Owns: what a living host does to an object on behalf of one that is gone: taking it out of the lock record, killing its changes.
//! Promises: a holder goes only when no LUN of the object has a slot of that incarnation that lives or is being claimed, read after the
//! image of the lock; or when it says itself, where it lives, that it has dropped this LUN's locks.
//! Must not know: how a slot is claimed and fenced (the patrol does that).

use std::rc::Rc;

use super::{Image, Object, Objects};
use crate::breaking;
use crate::cas::{CasOutcome, CellChange};
use crate::context::Member;
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::heartbeat::{FenceGrade, SlotState};
use crate::format::root_cell::{HoldMode, Holder, LunSet, ObjectState, Unclean};
use crate::sabotage::{Sabotage, active};
use crate::slot;
use crate::units::{FdId, LunIndex, SlotId, SlotRef};

/// Re-stamps of one cell that lose before that is given up: each time somebody else's change succeeded.
const TRIES: u32 = 64;

/// What the slots of an object's LUNs say of a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It lives somewhere, or may.
    MayLive,
    /// It is gone; `fenced`: every LUN has proven that nothing of it can arrive any more.
    Gone { fenced: bool },
}

impl Objects {
    /// Takes the holders that are gone out of the lock record, from `image`. True: the record has changed, look again. Those that may
    /// be gone are watched from now on.
    pub(crate) async fn drop_gone_holders(&self, object: &Object, image: &Rc<Image>) -> Result<bool, FsError> {
        let own = self.own_holder(object.fd)?;
        let mut luns = image.root.luns;
        luns.insert(object.fd.lun());
        let mut gone: Vec<Holder> = Vec::new();
        let mut unfenced = None;
        for holder in image.root.lock.holders.iter().filter(|holder| **holder != own) {
            if let Standing::Gone { fenced } = self.standing(object.fd.lun(), &luns, holder).await? {
                gone.push(*holder);
                if !fenced {
                    unfenced = Some(*holder);
                }
            }
        }
        if gone.is_empty() {
            return Ok(false);
        }
        let mut root = image.root.clone();
        let wrote = root.lock.mode != HoldMode::Shared;
        root.lock.holders.retain(|holder| !gone.contains(holder));
        root.lock.token = root.lock.token.next();
        if root.lock.holders.is_empty() {
            root.lock.mode = HoldMode::Free;
        }
        if wrote && !active(Sabotage::UncleanForgotten) {
            // One that is not proven fenced stays named: what is freed from the object may still be written to by it.
            let broken = unfenced.unwrap_or(root.unclean.broken);
            root.unclean = Unclean { token: root.lock.token, broken };
        }
        if let ObjectState::Creating(_) = root.state {
            root.state = ObjectState::Live;
        }
        for holder in &gone {
            tracing::info!(fd = %object.fd, slot = %holder.slot, "the lock of a host that is gone was taken back");
        }
        self.change_root(object, image, root).await?;
        Ok(true)
    }

    /// Reads all slots of the object's LUNs, now.
    async fn standing(&self, lock_lun: LunIndex, luns: &LunSet, holder: &Holder) -> Result<Standing, FsError> {
        let mut fenced = true;
        let mut may_live = false;
        let (mut on_lock_lun, mut unseen) = (false, false);
        let mut alive: Vec<(Rc<Member>, SlotId, Cell)> = Vec::new();
        let mut dropped = false;
        for lun in luns.iter().filter(|lun| *lun == lock_lun || !active(Sabotage::OneLunAsked)) {
            let member = match self.context.member(lun) {
                Ok(member) => member,
                // A LUN that this host does not see may carry the holder's writes: it is not proven gone there.
                Err(_) => {
                    unseen |= lun == lock_lun;
                    may_live = true;
                    fenced = false;
                    continue;
                }
            };
            let slots = match slot::read_slots(&self.context.io, &member.lun, lun).await {
                Ok(slots) => slots,
                // No more does it say anything of one that does not answer. On the lock's own LUN there is nothing to be had at all.
                Err(error) if lun == lock_lun => return Err(error.into()),
                Err(error) => {
                    if let Some(left_out) = self.context.complain("holders", Some(lun)) {
                        let what = "whether the holder of a lock is gone cannot be seen while the LUN is lost";
                        tracing::warn!(%lun, %error, left_out, "{what}");
                    }
                    may_live = true;
                    continue;
                }
            };
            let mut proven_here = false;
            for (number, found) in slots.into_iter().enumerate() {
                let number = SlotId(number as u8);
                let is_locks = lun == lock_lun && number == holder.slot.slot;
                let Ok((cell, heartbeat)) = found else {
                    // A damaged slot may be the holder's on any other LUN; on the lock's LUN only that one is.
                    may_live |= lun != lock_lun || is_locks;
                    unseen |= is_locks;
                    continue;
                };
                let is_its = heartbeat.incarnation == holder.incarnation
                    || (is_locks && heartbeat.generation == holder.slot.generation);
                if !is_its {
                    continue;
                }
                if matches!(heartbeat.state, SlotState::Live | SlotState::Breaking) {
                    self.context.suspect(lun, number);
                    may_live = true;
                    on_lock_lun |= lun == lock_lun;
                }
                if lun != lock_lun && heartbeat.state == SlotState::Live {
                    dropped |= heartbeat.drop_lun == lock_lun.get() && heartbeat.drop_acknowledged;
                    // A question changes the slot, and so looks like life to whoever watches it: one that stands still is not asked.
                    if self.context.renews(lun, number, &heartbeat) {
                        alive.push((member.clone(), number, cell));
                    }
                }
                proven_here |= heartbeat.fence_grade == FenceGrade::A && heartbeat.state != SlotState::Live;
            }
            fenced &= proven_here;
        }
        if on_lock_lun || unseen {
            return Ok(Standing::MayLive);
        }
        if dropped {
            // It says so itself: nothing that it sent under this LUN's locks is on its way, wherever it went.
            return Ok(Standing::Gone { fenced: true });
        }
        if let Some((member, number, cell)) = alive.first() {
            self.ask_to_drop(lock_lun, member, *number, cell).await?;
        }
        Ok(if may_live { Standing::MayLive } else { Standing::Gone { fenced } })
    }

    /// Asks a holder that is gone on the lock's LUN to say, in a slot where it lives, that it has dropped that LUN's locks.
    async fn ask_to_drop(
        &self,
        lock_lun: LunIndex,
        member: &Member,
        number: SlotId,
        cell: &Cell,
    ) -> Result<(), FsError> {
        if let Some(asked) = breaking::request_drop(&self.context, member, cell, lock_lun).await? {
            let slot = SlotRef { slot: number, generation: slot::decode(&asked)?.generation };
            self.context.note_drop_asked(member.index, slot, lock_lun);
        }
        Ok(())
    }

    /// Makes every older compare-and-write on its way to a root cell void, whatever its state. Gives the object as it is then; `None`:
    /// the cell is free.
    pub(crate) async fn restamp_root(&self, fd: FdId) -> Result<Option<Rc<Object>>, FsError> {
        for _ in 0..TRIES {
            let (cell, root) = self.read_root(fd).await?;
            self.context.prove_live([fd.lun()]).await?;
            if active(Sabotage::RecoveryWithoutRestamp) {
                return if root.state == ObjectState::Free { Ok(None) } else { self.load_any(fd).await.map(Some) };
            }
            match self.context.cas(&cell, CellChange::same(&cell)).await? {
                CasOutcome::Applied(_) if root.state == ObjectState::Free => return Ok(None),
                CasOutcome::Applied(_) => return self.load_any(fd).await.map(Some),
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
            }
        }
        let message = format!("{fd}: other hosts changed its root cell {TRIES} times in a row; try again");
        Err(FsError::refused(FsErrorKind::Busy, message))
    }
}
