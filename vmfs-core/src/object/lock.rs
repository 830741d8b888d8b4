//! Owns: the lock record of an object: taking it, giving it back, saying who holds it.
//! Promises: an uncontended lock costs one compare-and-write; a lock held by a host that is not proven gone is never taken.
//! Must not know: what the lock protects, leases (the gate closes the holder's I/O).

use std::rc::Rc;

use super::{Image, Object, Objects};
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::format::root_cell::{HoldMode, Holder, LunSet, MAX_HOLDERS, ObjectState, RootCell};
use crate::sabotage::{Sabotage, active};
use crate::slot;
use crate::units::FdId;

pub(super) const TRIES: u32 = 64;

/// Who holds a lock.
#[derive(Clone, Debug)]
pub struct HolderInfo {
    /// As the lock record has it.
    pub holder: Holder,
    /// The slot that it names, as it is now.
    pub heartbeat: Heartbeat,
    /// The holder is this mount.
    pub is_self: bool,
    /// The slot is live at the holder's generation.
    pub is_live: bool,
}

impl HolderInfo {
    /// For messages: host name, slot, and whether it lives.
    pub fn describe(&self) -> String {
        let name = &self.heartbeat.host_name;
        let host = if self.is_live || self.heartbeat.incarnation == self.holder.incarnation {
            format!("host {} ({})", if name.is_empty() { "without a name" } else { name }, self.heartbeat.host)
        } else {
            "a host that has left".to_owned()
        };
        format!("{host}, {}{}", self.holder.slot, if self.is_self { ", this mount" } else { "" })
    }
}

impl Objects {
    /// Takes the lock in `mode` for this host. `Busy` says who holds it; another mode that this host already holds is changed.
    pub async fn lock(&self, object: &Object, mode: HoldMode) -> Result<(), FsError> {
        let _busy = object.busy.lock().await;
        let own = self.own_holder(object.fd)?;
        if object.doubtful.get() {
            self.refresh(object).await?;
        }
        if self.is_kept(object.fd) {
            return self.lock_kept(object, own).await;
        }
        for _ in 0..TRIES {
            let image = object.image();
            match image.root.state {
                ObjectState::Unlinked(_) | ObjectState::Free => return Err(FsError::Stale { fd: object.fd }),
                ObjectState::Unlinking(by) if by == own.slot => return Err(FsError::Stale { fd: object.fd }),
                ObjectState::Unlinking(by) => {
                    let message = format!("{} is about to be removed by the host in {by}; see vmfs status", object.fd);
                    return Err(FsError::refused(FsErrorKind::Busy, message));
                }
                ObjectState::Live | ObjectState::Creating(_) => {}
            }
            let record = &image.root.lock;
            let others: Vec<Holder> = record.holders.iter().filter(|h| **h != own).copied().collect();
            let joins = record.mode == mode && mode != HoldMode::Exclusive;
            if !others.is_empty() && !joins && !active(Sabotage::LockIgnored) {
                // The image may be old: look again before refusing.
                self.refresh(object).await?;
                if Rc::ptr_eq(&object.image(), &image) && !self.drop_gone_holders(object, &image).await? {
                    return Err(self.busy(object, &image).await);
                }
                continue;
            }
            if others.len() >= MAX_HOLDERS && self.drop_gone_holders(object, &image).await? {
                continue;
            }
            if others.len() >= MAX_HOLDERS {
                let message = format!("{}: {MAX_HOLDERS} hosts hold it already, no more fit its lock", object.fd);
                return Err(FsError::refused(FsErrorKind::Busy, message));
            }
            if object.held.get() && record.mode == mode && record.holders.contains(&own) {
                return Ok(());
            }
            let mut root = settled(&image.root);
            root.lock.mode = mode;
            if !active(Sabotage::TokenKept) {
                root.lock.token = root.lock.token.next();
            }
            root.lock.holders = if active(Sabotage::LockIgnored) { Vec::new() } else { others };
            root.lock.holders.push(own);
            match self.change_root(object, &image, root).await {
                Ok(true) => {
                    object.held.set(true);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => {
                    // It may be there all the same: nobody would ever give it back.
                    self.doubtful_locks.borrow_mut().insert(object.fd);
                    return Err(error);
                }
            }
        }
        Err(contended(object))
    }

    /// The lock of an object that this host holds stays as it is until this incarnation is over or the object is freed: a data command
    /// under it may still be on its way (rule R3). Nothing gives it back or makes it weaker any more.
    pub(crate) fn keep_lock(&self, fd: FdId) {
        self.kept_locks.borrow_mut().insert(fd);
    }

    fn is_kept(&self, fd: FdId) -> bool {
        self.kept_locks.borrow().contains(&fd)
    }

    /// A lock that stays vouches for whoever opens the object on this host again, in whatever mode it is.
    async fn lock_kept(&self, object: &Object, own: Holder) -> Result<(), FsError> {
        self.refresh(object).await?;
        if object.image().root.lock.holders.contains(&own) {
            object.held.set(true);
            return Ok(());
        }
        self.context.prove_live([object.fd.lun()]).await?;
        let message = format!("{}: the lock that this mount had to keep was taken away; mount again", object.fd);
        Err(FsError::refused(FsErrorKind::Stale, message))
    }

    /// Locks that this host may have taken without knowing it and that are not given back yet.
    pub fn doubtful_locks(&self) -> usize {
        self.doubtful_locks.borrow().len()
    }

    /// Makes a lock that this host holds vouch for data on `luns`, where it has joined a slot by now: the object's set of LUNs has them
    /// afterwards, and whoever breaks the lock has to go by an image that is newer than those slots. `Stale`: it is not held.
    pub async fn confirm_lock(&self, object: &Object, luns: &LunSet) -> Result<(), FsError> {
        let _busy = object.busy.lock().await;
        let own = self.own_holder(object.fd)?;
        if object.doubtful.get() {
            self.refresh(object).await?;
        }
        for _ in 0..TRIES {
            let image = object.image();
            if !object.held.get() || !image.root.lock.holders.contains(&own) {
                let message = format!("{}: its lock was given back while it was in use; open it again", object.fd);
                return Err(FsError::refused(FsErrorKind::Stale, message));
            }
            let mut root = settled(&image.root);
            luns.iter().for_each(|lun| root.luns.insert(lun));
            self.context.prove_live(luns.iter()).await?;
            if self.change_root(object, &image, root).await? {
                return Ok(());
            }
        }
        Err(contended(object))
    }

    /// Gives back locks that this host may have taken without knowing it. What fails is tried again with the next call.
    pub async fn release_doubtful_locks(&self) -> Result<(), FsError> {
        let _one = self.releasing.lock().await;
        let doubtful = std::mem::take(&mut *self.doubtful_locks.borrow_mut());
        let mut result = Ok(());
        for fd in doubtful {
            if self.context.is_lost(fd.lun()) {
                self.doubtful_locks.borrow_mut().insert(fd);
                continue;
            }
            let released = match self.load_any(fd).await {
                Ok(object) => self.unlock_unless_held(&object).await,
                Err(error) => Err(error),
            };
            if let Err(error) = released
                && error.kind() != FsErrorKind::Stale
            {
                self.doubtful_locks.borrow_mut().insert(fd);
                result = Err(error);
            }
        }
        result
    }

    /// Gives the lock back, unless it has to stay. The caller has resolved all of its data I/O and mapping changes.
    pub async fn unlock(&self, object: &Object) -> Result<(), FsError> {
        let _busy = object.busy.lock().await;
        let unlocked = self.unlock_busy(object).await;
        if unlocked.is_err() {
            // Nobody holds it here any more, and nobody else would ever give it back.
            object.held.set(false);
            self.doubtful_locks.borrow_mut().insert(object.fd);
        }
        unlocked
    }

    async fn unlock_unless_held(&self, object: &Object) -> Result<(), FsError> {
        let _busy = object.busy.lock().await;
        if object.held.get() {
            return Ok(());
        }
        self.refresh(object).await?;
        // A change of any kind makes the one in doubt void, if it is still on its way; losing to another host's does the same.
        let image = object.image();
        self.change_root(object, &image, image.root.clone()).await?;
        self.unlock_busy(object).await
    }

    async fn unlock_busy(&self, object: &Object) -> Result<(), FsError> {
        if self.is_kept(object.fd) {
            return Ok(());
        }
        let own = self.own_holder(object.fd)?;
        if object.doubtful.get() {
            self.refresh(object).await?;
        }
        for _ in 0..TRIES {
            let image = object.image();
            if !image.root.lock.holders.contains(&own) || active(Sabotage::LockKept) {
                object.held.set(false);
                return Ok(());
            }
            let mut root = settled(&image.root);
            Objects::release(&mut root, own);
            if self.change_root(object, &image, root).await? {
                object.held.set(false);
                return Ok(());
            }
        }
        Err(contended(object))
    }

    /// Takes `own` out of a lock record; for a commit that also unlocks. Call [`Objects::unlocked`] when it is done.
    pub fn release(root: &mut RootCell, own: Holder) {
        root.lock.holders.retain(|holder| *holder != own);
        if root.lock.holders.is_empty() {
            root.lock.mode = HoldMode::Free;
        }
        root.lock.wanted = false;
    }

    /// Notes that a commit has given the lock back.
    pub fn unlocked(&self, object: &Object) {
        object.held.set(false);
    }

    /// One compare-and-write of the root cell alone; `false`: it was lost and the object was read again.
    pub(super) async fn change_root(
        &self,
        object: &Object,
        image: &Rc<Image>,
        root: RootCell,
    ) -> Result<bool, FsError> {
        self.context.prove_live([object.fd.lun()]).await?;
        let change = CellChange::payload(&image.cell, root.encode());
        let sent = self.context.before_sending();
        let settle = |cell: Cell, root: RootCell| {
            object.set_image(Image::new(cell, root, image.body.clone(), sent));
        };
        match self.context.cas(&image.cell, change).await {
            Ok(CasOutcome::Applied(cell)) => {
                settle(cell, root);
                Ok(true)
            }
            Ok(CasOutcome::Lost(_) | CasOutcome::Overtaken(_)) => {
                // Whether the change was there for a moment does not matter: the callers decide by the content that is there now.
                self.refresh(object).await?;
                Ok(false)
            }
            Ok(CasOutcome::NotDone(error)) => Err(error.into()),
            Ok(CasOutcome::Unknown(error)) => {
                object.doubtful.set(true);
                Err(error.into())
            }
            Err(error) => {
                object.doubtful.set(true);
                Err(error)
            }
        }
    }

    /// Only a holder commits the body: `Busy` when other hosts hold the lock. False: one that is gone was taken out, look again.
    pub(super) async fn check_may_write(&self, object: &Object, image: &Rc<Image>) -> Result<bool, FsError> {
        let own = self.own_holder(object.fd)?;
        let record = &image.root.lock;
        if record.mode == HoldMode::Free || record.holders.contains(&own) {
            return Ok(true);
        }
        if self.drop_gone_holders(object, image).await? {
            return Ok(false);
        }
        Err(self.busy(object, image).await)
    }

    async fn busy(&self, object: &Object, image: &Rc<Image>) -> FsError {
        let name = String::from_utf8_lossy(&image.body.attributes.name).into_owned();
        let name = if name.is_empty() { object.fd.to_string() } else { name };
        let holders = match self.who_holds(object).await {
            Ok(holders) => holders.iter().map(HolderInfo::describe).collect::<Vec<_>>().join("; "),
            Err(error) => format!("a host whose slot cannot be read: {error}"),
        };
        let message = format!("{name} is locked by {holders}; see vmfs why-locked");
        FsError::refused(FsErrorKind::Busy, message)
    }

    /// Who holds the lock, as its image has it, with their slots as they are now.
    pub async fn who_holds(&self, object: &Object) -> Result<Vec<HolderInfo>, FsError> {
        let member = self.context.member(object.fd.lun())?;
        let own = self.own_holder(object.fd).ok();
        let image = object.image();
        let mut all = Vec::with_capacity(image.root.lock.holders.len());
        for holder in &image.root.lock.holders {
            let (_, heartbeat) =
                slot::read_slot(&self.context.io, &member.lun, object.fd.lun(), holder.slot.slot).await?;
            all.push(HolderInfo {
                holder: *holder,
                is_self: own == Some(*holder),
                is_live: heartbeat.state == SlotState::Live && heartbeat.is_live(holder.slot.generation),
                heartbeat,
            });
        }
        Ok(all)
    }
}

/// The root as a change leaves it: `creating` has settled.
pub(super) fn settled(root: &RootCell) -> RootCell {
    let mut root = root.clone();
    if let ObjectState::Creating(_) = root.state {
        root.state = ObjectState::Live;
    }
    root
}

pub(super) fn contended(object: &Object) -> FsError {
    FsError::refused(
        FsErrorKind::Busy,
        format!("{}: other hosts changed it {TRIES} times in a row; try again", object.fd),
    )
}
