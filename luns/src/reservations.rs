//! Owns: this host's registration with a unit's persistent reservation, and the removal of somebody else's (SPC-4, 5.13).
//! Promises: who has lost its registration to a breaker sends nothing more; a victim counts as fenced only when its key is gone while the
//! reservation refuses everybody who is not registered, and its commands were aborted before.
//! Must not know: slots, leases; whose key it is.
//!
//! ```text
//! Stranger --conflict--> Guest(random key) --mark_paths--> Owner(key of its slot) --key gone, reservation there--> Fenced, for good
//!     ^---------------------- unmark_paths --------------------'
//! ```
//!
//! A *guest* changes cells before it has a slot (whose number is part of the key), and to format or repair: it sends no data.

use std::sync::atomic::Ordering;

use scsi::{PathAnswer, PathData};
use vmfs_core::lun::{Fencing, LunErrorKind, PathOwner, Reservation};
use vmfs_core::units::SlotId;

use crate::answer::{Verdict, verdict};
use crate::commands::{self, PREEMPT_AND_ABORT, REGISTER, REGISTER_AND_IGNORE, RESERVE};
use crate::device::{COMMAND_TIME, Device, Failure, fenced};
use crate::facts::{self, ReservationCapabilities};

/// Write exclusive, all registrants: it stands while anybody is registered.
pub const ALL_REGISTRANTS: u8 = 7;
/// Write exclusive, registrants only: it goes with its holder.
pub const REGISTRANTS_ONLY: u8 = 5;
/// Rounds of an attempt to fence.
const ROUNDS: u32 = 4;
/// Unit attentions in a row at one command.
const ATTENTIONS: u32 = 32;
/// Room for keys at first.
const KEYS: usize = 1024;

/// How this host stands with the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Not registered.
    Stranger,
    /// Registered under a key that means nothing to anybody.
    Guest(u64),
    /// Registered under the key of its slot.
    Owner(u64),
    /// A breaker has removed its registration.
    Fenced,
}

/// What a RESERVATION CONFLICT turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shut {
    /// It was not registered, and is now: send it again.
    Registered,
    /// It has been fenced.
    Fenced,
}

/// How an order to the reservation ended.
enum Ordered {
    Done,
    /// RESERVATION CONFLICT.
    Conflict,
    /// The device has no such reservations, or does not take a field of the order.
    Unsupported(String),
}

fn not_done(why: impl Into<String>) -> Failure {
    Failure::new(LunErrorKind::NotDone, why)
}

impl Device {
    /// Whether the storage has removed this host.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }

    /// Whether a breaker can keep this host's late writes out for ever: it is registered, the reservation is in force and is not forgotten.
    pub(crate) fn can_be_shut_out(&self) -> bool {
        matches!(*self.standing.lock(), Standing::Owner(_))
            && self.seen.lock().as_ref().is_some_and(|seen| seen.keeps_out() && seen.persists)
    }

    fn set_fenced(&self) {
        *self.standing.lock() = Standing::Fenced;
        self.fenced.store(true, Ordering::Relaxed);
        tracing::error!(lun = self.name, "another host has removed this host's registration: nothing more is written");
    }

    /// What the device says that it can do; `None`: it has no persistent reservations.
    pub(crate) fn capabilities(&self) -> Result<Option<ReservationCapabilities>, Failure> {
        match self.read_in(&commands::reserve_in(commands::REPORT_CAPABILITIES, 8), 8) {
            Ok(bytes) => Ok(Some(ReservationCapabilities::decode(&bytes))),
            Err(failure) if failure.unsupported => match self.read_keys() {
                // Devices of the first days have reservations, and not this question.
                Ok(_) => Ok(Some(ReservationCapabilities::default())),
                Err(failure) if failure.unsupported => Ok(None),
                Err(failure) => Err(failure),
            },
            Err(failure) => Err(failure),
        }
    }

    fn read_keys(&self) -> Result<Vec<u64>, Failure> {
        let mut room = KEYS;
        loop {
            let bytes = self.read_in(&commands::reserve_in(commands::READ_KEYS, room as u16), room)?;
            let (keys, all) = facts::keys(&bytes);
            if all <= room || room == usize::from(u16::MAX) {
                return Ok(keys);
            }
            room = all.min(u16::MAX.into());
        }
    }

    /// The reservation as it is now.
    pub(crate) fn read_reservation(&self) -> Result<Reservation, Failure> {
        let keys = self.read_keys()?;
        let bytes = self.read_in(&commands::reserve_in(commands::READ_RESERVATION, 24), 24)?;
        let own = match *self.standing.lock() {
            Standing::Owner(key) | Standing::Guest(key) if keys.contains(&key) => key,
            _ => 0,
        };
        let persists = self.persists.load(Ordering::Relaxed);
        let now = Reservation { kind: facts::reservation(&bytes).map(|(_, kind)| kind), keys, own, persists };
        *self.seen.lock() = Some(now.clone());
        Ok(now)
    }

    /// Sends PERSISTENT RESERVE OUT on one path. It is not repeated when its end is not known: the caller looks.
    fn order(&self, path: usize, (cdb, list): ([u8; 10], [u8; 24])) -> Result<Ordered, Failure> {
        for _ in 0..ATTENTIONS {
            let answer: PathAnswer = self.paths[path]
                .execute(&cdb, PathData::Out(&list), COMMAND_TIME)
                .map_err(|error| Failure::new(LunErrorKind::Unknown, error.to_string()))?;
            match verdict(&answer) {
                Verdict::Done => return Ok(Ordered::Done),
                Verdict::Conflict => return Ok(Ordered::Conflict),
                Verdict::Unsupported(why) | Verdict::Refused(why) => return Ok(Ordered::Unsupported(why)),
                Verdict::Attention(..) => {}
                Verdict::Later(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
                other => return Err(Failure::new(LunErrorKind::Unknown, format!("PERSISTENT RESERVE OUT: {other:?}"))),
            }
        }
        Err(not_done("PERSISTENT RESERVE OUT: it goes on telling of changes"))
    }

    /// Registers every path under `key`, whatever it was registered under before; over a loss of power where the device keeps that.
    fn register(&self, key: u64, capabilities: ReservationCapabilities) -> Result<(), Failure> {
        match self.register_so(key, capabilities.can_persist) {
            // It could, and does not do it now.
            Err(failure) if failure.unsupported && capabilities.can_persist => {
                tracing::warn!(lun = self.name, "its reservations do not survive a loss of its power: {}", failure.why);
                self.register_so(key, false)
            }
            registered => registered,
        }
    }

    fn register_so(&self, key: u64, persist: bool) -> Result<(), Failure> {
        let mut failed = None;
        let mut registered = 0;
        for path in 0..self.paths.len() {
            match self.order(path, commands::reserve_out(REGISTER_AND_IGNORE, 0, 0, key, persist)) {
                Ok(Ordered::Done) => registered += 1,
                Ok(Ordered::Conflict) => failed = Some(not_done("its registration is refused")),
                Ok(Ordered::Unsupported(why)) => failed = Some(Failure { unsupported: true, ..not_done(why) }),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            // A path that is down carries nothing; where it comes back unregistered the storage refuses its writes.
            Some(failure) if registered == 0 => Err(failure),
            Some(failure) => {
                tracing::warn!(lun = self.name, "a path could not be registered: {}", failure.why);
                self.persists.store(persist, Ordering::Relaxed);
                Ok(())
            }
            None => {
                self.persists.store(persist, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Makes sure that a reservation is in force that refuses who is not registered. False: somebody holds one of another kind.
    fn reserve(&self, own: u64, capabilities: ReservationCapabilities) -> Result<bool, Failure> {
        for _ in 0..ROUNDS {
            let now = self.read_reservation()?;
            match now.kind {
                Some(_) => return Ok(now.keeps_out()),
                None => {
                    let kinds = [ALL_REGISTRANTS, REGISTRANTS_ONLY].into_iter().filter(|kind| capabilities.has(*kind));
                    for kind in kinds {
                        if let Ordered::Done =
                            self.order(self.path_number(), commands::reserve_out(RESERVE, kind, own, 0, false))?
                        {
                            break;
                        }
                    }
                }
            }
        }
        Ok(self.read_reservation()?.keeps_out())
    }

    fn path_number(&self) -> usize {
        self.paths.iter().position(|path| std::sync::Arc::ptr_eq(path, self.path())).unwrap_or(0)
    }

    /// A key that no slot has and nobody else draws.
    fn guest_key(&self) -> u64 {
        let mut bytes = [0; 8];
        // A key that is not random would only be somebody else's too, and do no harm: guests send no data.
        let _ = getrandom::fill(&mut bytes);
        u64::from_le_bytes(bytes).max(1)
    }

    /// Finds out why a command met a RESERVATION CONFLICT.
    pub(crate) fn shut_out(&self) -> Result<Shut, Failure> {
        let _turn = self.turn.lock();
        let standing = *self.standing.lock();
        match standing {
            Standing::Fenced => Ok(Shut::Fenced),
            Standing::Owner(key) => {
                if self.read_keys()?.contains(&key) {
                    self.lost_registration.store(true, Ordering::Relaxed);
                    let why = "this path has lost its registration, though the host has others: mount again to use it";
                    return Err(not_done(why));
                }
                self.set_fenced();
                Ok(Shut::Fenced)
            }
            Standing::Stranger | Standing::Guest(_) if self.read_only => {
                Err(not_done("a reservation keeps out who is not registered, and this program only reads"))
            }
            Standing::Stranger | Standing::Guest(_) => {
                self.become_guest()?;
                Ok(Shut::Registered)
            }
        }
    }

    fn become_guest(&self) -> Result<u64, Failure> {
        let key = self.guest_key();
        self.take_port(key)?;
        self.register(key, self.capabilities()?.unwrap_or_default())?;
        *self.standing.lock() = Standing::Guest(key);
        Ok(key)
    }

    /// Where the processes of this machine are one port: makes sure that none of another incarnation is left, for which the port would be
    /// registered too.
    fn take_port(&self, key: u64) -> Result<(), Failure> {
        let Some(tenancy) = &self.tenancy else { return Ok(()) };
        match tenancy.take(key) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let why = "a process of another incarnation on this machine still uses this disk, and they are one port to it; end it \
                           (see fuser(1)), then try again";
                Err(not_done(why))
            }
            Err(error) => Err(not_done(format!("the lock of the device node: {error}"))),
        }
    }

    /// Removes everybody's registration but the own one, and aborts what they have sent.
    pub(crate) fn evict(&self) -> Result<(), Failure> {
        if self.capabilities()?.is_none() {
            return Ok(());
        }
        for key in self.read_keys()? {
            let is_own = matches!(*self.standing.lock(), Standing::Owner(own) | Standing::Guest(own) if own == key);
            let victim = PathOwner { slot: SlotId(0), key };
            if !is_own && self.shut_out_victim(victim)? != Fencing::Proven {
                return Err(not_done(format!(
                    "the registration under the key {key:#018x} cannot be removed; try again"
                )));
            }
        }
        Ok(())
    }

    /// The unit said that registrations were removed.
    pub(crate) fn was_preempted(&self) -> Result<(), Failure> {
        let standing = *self.standing.lock();
        if let Standing::Owner(key) = standing
            && !self.read_keys()?.contains(&key)
        {
            self.set_fenced();
            return Err(fenced());
        }
        Ok(())
    }

    /// Registers this host's paths under the key of its slot, and reserves the unit. A device without reservations is left as it is.
    pub(crate) fn own(&self, owner: PathOwner) -> Result<(), Failure> {
        let _turn = self.turn.lock();
        if self.is_fenced() {
            return Err(fenced());
        }
        let Some(capabilities) =
            self.capabilities()?.filter(|can| can.has(ALL_REGISTRANTS) || can.has(REGISTRANTS_ONLY))
        else {
            tracing::warn!(
                lun = self.name,
                "it has no persistent reservations for registrants: fence grade C, only time keeps a host out that has lost its lease"
            );
            return Ok(());
        };
        self.take_port(owner.key)?;
        self.register(owner.key, capabilities)?;
        *self.standing.lock() = Standing::Owner(owner.key);
        if !self.reserve(owner.key, capabilities)? {
            let kind = self.read_reservation()?.kind;
            self.leave();
            let why = format!(
                "somebody who is no host of this volume holds a reservation of type {kind:?} on it; remove that first (sg_persist)"
            );
            return Err(not_done(why));
        }
        Ok(())
    }

    /// Takes this host's registrations off. What fails is left: a breaker removes it.
    pub(crate) fn disown(&self) {
        let _turn = self.turn.lock();
        self.leave();
    }

    fn leave(&self) {
        let standing = *self.standing.lock();
        let persists = self.persists.load(Ordering::Relaxed);
        if let Standing::Owner(key) | Standing::Guest(key) = standing {
            for path in 0..self.paths.len() {
                if let Err(failure) = self.order(path, commands::reserve_out(REGISTER, 0, key, 0, persists)) {
                    tracing::warn!(lun = self.name, "a registration stays behind: {}", failure.why);
                }
            }
            *self.standing.lock() = Standing::Stranger;
        }
        if let Some(tenancy) = &self.tenancy {
            tenancy.release();
        }
    }

    /// Looks whether the registration stands, and makes good what the device has forgotten.
    pub(crate) fn tend(&self) -> Result<(), Failure> {
        if self.resized.load(Ordering::Relaxed) {
            self.refresh()?;
        }
        let _turn = self.turn.lock();
        let standing = *self.standing.lock();
        let Standing::Owner(key) = standing else {
            return if standing == Standing::Fenced { Err(fenced()) } else { Ok(()) };
        };
        let now = self.read_reservation()?;
        if !now.keys.contains(&key) {
            // A breaker is registered itself, and leaves the reservation. Where nothing at all is left the device has lost its memory.
            if !now.keys.is_empty() || now.kind.is_some() {
                self.set_fenced();
                return Err(fenced());
            }
            tracing::warn!(lun = self.name, "the storage has forgotten all registrations; registering again");
        } else if now.kind.is_some() {
            return Ok(());
        }
        let capabilities = self.capabilities()?.unwrap_or_default();
        self.register(key, capabilities)?;
        self.reserve(key, capabilities).map(drop)
    }

    /// Removes the registrations of `victim` and aborts its commands.
    pub(crate) fn shut_out_victim(&self, victim: PathOwner) -> Result<Fencing, Failure> {
        let _turn = self.turn.lock();
        let Some(capabilities) = self.capabilities()?.filter(|_| victim.key != 0) else {
            return Ok(Fencing::TimeOnly);
        };
        let standing = *self.standing.lock();
        if standing == Standing::Owner(victim.key)
            && let Some(tenancy) = &self.tenancy
        {
            // The victim's commands go through this very port: that it is gone is for the machine to say.
            let alone =
                tenancy.alone(victim.key).map_err(|error| not_done(format!("the lock of the device node: {error}")))?;
            if !alone {
                return Ok(Fencing::NotYet);
            }
        }
        let own = match standing {
            Standing::Fenced => return Err(fenced()),
            // An own mount that is gone: this process goes on under another key, to say so in the slot.
            Standing::Owner(key) if key != victim.key => key,
            Standing::Guest(key) => key,
            Standing::Owner(_) | Standing::Stranger => self.become_guest()?,
        };
        if !self.reserve(own, capabilities)? {
            return Ok(Fencing::TimeOnly);
        }
        let mut doubt = false;
        for _ in 0..ROUNDS {
            let now = self.read_reservation()?;
            if now.own != own {
                // Somebody has removed this host meanwhile.
                if matches!(*self.standing.lock(), Standing::Owner(_)) {
                    self.set_fenced();
                }
                return Err(fenced());
            }
            let Some(kind) = now.kind.filter(|_| now.keeps_out()) else {
                // It went with its holder: what the victim has sent meanwhile is not aborted yet.
                doubt |= !now.keys.contains(&victim.key);
                self.reserve(own, capabilities)?;
                continue;
            };
            if !now.keys.contains(&victim.key) {
                return Ok(if doubt { Fencing::NotYet } else { Fencing::Proven });
            }
            let preempted =
                self.order(self.path_number(), commands::reserve_out(PREEMPT_AND_ABORT, kind, own, victim.key, false));
            match preempted {
                Ok(Ordered::Done) => tracing::warn!(
                    lun = self.name,
                    "the key {:#018x} was preempted, its commands are aborted",
                    victim.key
                ),
                Ok(Ordered::Conflict) => {}
                Ok(Ordered::Unsupported(why)) => {
                    tracing::warn!(lun = self.name, "PREEMPT AND ABORT: {why}");
                    return Ok(Fencing::TimeOnly);
                }
                // It may have removed the key and not have aborted yet: look again later.
                Err(failure) => {
                    tracing::warn!(lun = self.name, "PREEMPT AND ABORT: {}", failure.why);
                    doubt = true;
                }
            }
        }
        Ok(Fencing::NotYet)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A guest's registration is nobody's, and nobody would remove it.
        if matches!(*self.standing.get_mut(), Standing::Guest(_)) {
            self.leave();
        }
    }
}
