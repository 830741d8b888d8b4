//! Owns: giving an exclusive lock from this host to another one with one compare-and-write.
//! Promises: the destination was live on every LUN of the object after the image that names this host; when the outcome is not known,
//! that is said, and found out later by making the attempt void. Must not know: what the lock protects, who runs what.

use super::lock::{TRIES, contended, settled};
use super::{Image, Object, Objects};
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::ObjectRef;
use crate::format::heartbeat::SlotState;
use crate::format::root_cell::{HoldMode, Holder};
use crate::slot;
use crate::units::{LunIndex, Token};

/// What became of the compare-and-write.
#[derive(Debug)]
pub(crate) enum Handed {
    /// The destination holds the lock; or it did, and whoever came after it does.
    Over,
    /// Not known. `token`: the lock's, before.
    Unknown {
        /// The lock's token before.
        token: Token,
        /// Why it is not known.
        cause: FsError,
    },
}

impl Objects {
    /// This host as the holder of an object's lock: what a source hands over to.
    pub fn holder_for(&self, object: ObjectRef) -> Result<Holder, FsError> {
        self.own_holder(object.fd)
    }

    /// Changes the holder of an exclusive lock from this host to `to`. The caller has resolved all data I/O and mapping changes. An error:
    /// this host holds the lock as before.
    pub(crate) async fn hand_over(&self, object: &Object, to: Holder) -> Result<Handed, FsError> {
        let _busy = object.busy.lock().await;
        if object.doubtful.get() {
            self.refresh(object).await?;
        }
        let token = object.image().root.lock.token;
        for _ in 0..TRIES {
            let image = object.image();
            if !self.still_holds(object, &image, token)? {
                object.held.set(false);
                return Ok(Handed::Over);
            }
            self.check_is_live(&image, object.lun(), &to).await?;
            let mut root = settled(&image.root);
            root.lock.holders = vec![to];
            root.lock.token = token.next();
            root.lock.wanted = false;
            match self.change_root(object, &image, root).await {
                Ok(true) => {
                    object.held.set(false);
                    return Ok(Handed::Over);
                }
                // Another host changed something else of the cell, or this attempt was there and is gone: the content says.
                Ok(false) => {}
                Err(cause) if object.doubtful.get() => return Ok(Handed::Unknown { token, cause }),
                Err(error) => return Err(error),
            }
        }
        Err(contended(object))
    }

    /// Finds out what became of a hand-over, and makes sure that it stays so. True: this host holds the lock as before. An error: it is
    /// still not known.
    pub(crate) async fn resolve_hand_over(&self, object: &Object, token: Token) -> Result<bool, FsError> {
        let _busy = object.busy.lock().await;
        for _ in 0..TRIES {
            self.refresh(object).await?;
            let image = object.image();
            if !self.still_holds(object, &image, token)? {
                object.held.set(false);
                return Ok(false);
            }
            // The attempt may be on its way: after any other change it finds another image.
            if self.change_root(object, &image, image.root.clone()).await? {
                return Ok(true);
            }
        }
        Err(contended(object))
    }

    /// Whether the lock is this host's and has never been anybody else's since it had `token`.
    fn still_holds(&self, object: &Object, image: &Image, token: Token) -> Result<bool, FsError> {
        let lock = &image.root.lock;
        let own = self.own_holder(object.fd)?;
        Ok(lock.mode == HoldMode::Exclusive && lock.holders == [own] && lock.token == token)
    }

    /// Whether the lock was handed to this host, which has not accepted it yet.
    pub(crate) fn is_handed_to_own(&self, object: &Object) -> Result<bool, FsError> {
        let lock = &object.image().root.lock;
        let own = self.own_holder(object.fd)?;
        Ok(!object.held.get() && lock.mode == HoldMode::Exclusive && lock.holders == [own])
    }

    /// Reads a holder's slots on all LUNs of an object, now: it has joined them, and lives.
    async fn check_is_live(&self, image: &Image, lock_lun: LunIndex, holder: &Holder) -> Result<(), FsError> {
        let mut luns = image.root.luns;
        luns.insert(lock_lun);
        for lun in luns.iter() {
            let member = self.context.member(lun)?;
            let is_live = if lun == lock_lun {
                let (_, found) = slot::read_slot(&self.context.io, &member.lun, lun, holder.slot.slot).await?;
                found.is_live(holder.slot.generation) && found.incarnation == holder.incarnation
            } else {
                let slots = slot::read_slots(&self.context.io, &member.lun, lun).await?;
                slots.iter().flatten().any(|(_, h)| h.state == SlotState::Live && h.incarnation == holder.incarnation)
            };
            if !is_live {
                let message = format!(
                    "the destination, {} of incarnation {:#x}, does not live on {lun}; mount the volume there with all of its LUNs",
                    holder.slot, holder.incarnation
                );
                return Err(FsError::refused(FsErrorKind::Busy, message));
            }
        }
        Ok(())
    }
}
