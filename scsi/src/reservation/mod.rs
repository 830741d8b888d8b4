//! Owns: the reservations of one logical unit: SCSI-2 RESERVE/RELEASE and persistent reservations (SPC-4, 5.13).
//! Promises: a change is in force only after it was saved, if it has to persist; checking a command costs a scan of few
//! entries and no allocation.
//! Must not know: CDB layouts, how records are kept, what tasks run.

mod answer;
mod change;
mod conflict;
mod record;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

pub use record::RestoreError;

use crate::attention::UnitAttention;
use crate::cdb::Cdb;
use crate::sense::{Failure, Sense};
use crate::task::NexusId;
use crate::task_set::Task;
use crate::transport_id::TransportId;
pub(crate) use change::{Lists, MAX_REGISTRATIONS, Request};

/// Keeps the record of a unit's persistent reservations over a restart (APTPL).
pub trait ReservationStore {
    /// Replaces the record. It must be durable when the future is ready: the initiator is told so right after.
    fn save<'a>(&'a self, record: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>>;
}

/// A record could not be made durable; nothing has changed for the initiators.
#[derive(Debug, thiserror::Error)]
#[error("the record of the persistent reservations could not be saved: {source}")]
pub struct StoreError {
    /// Why.
    pub source: std::io::Error,
}

/// An initiator port as seen through a target port: what a registration belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) initiator: TransportId,
    pub(crate) target_port: u16,
}

/// Reservation types (SPC-4, table 70).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrants = 5,
    ExclusiveAccessRegistrants = 6,
    WriteExclusiveAll = 7,
    ExclusiveAccessAll = 8,
}

impl Kind {
    pub(crate) fn from_code(code: u8) -> Option<Kind> {
        [
            Kind::WriteExclusive,
            Kind::ExclusiveAccess,
            Kind::WriteExclusiveRegistrants,
            Kind::ExclusiveAccessRegistrants,
            Kind::WriteExclusiveAll,
            Kind::ExclusiveAccessAll,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
    }

    /// Every registered nexus holds it.
    fn is_for_all(self) -> bool {
        matches!(self, Kind::WriteExclusiveAll | Kind::ExclusiveAccessAll)
    }

    /// Registered nexuses have access.
    fn admits_registrants(self) -> bool {
        !matches!(self, Kind::WriteExclusive | Kind::ExclusiveAccess)
    }

    /// Everybody may read.
    fn admits_readers(self) -> bool {
        matches!(self, Kind::WriteExclusive | Kind::WriteExclusiveRegistrants | Kind::WriteExclusiveAll)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) key: u64,
    pub(crate) port: Port,
    /// Made for all target ports at once (ALL_TG_PT).
    pub(crate) all_ports: bool,
}

/// The one reservation. For the types of all registrants nobody in particular holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    pub(crate) kind: Kind,
    pub(crate) holder: Option<Port>,
}

/// A registered initiator port, as whoever looks after a target sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// Its key.
    pub key: u64,
    /// The initiator port.
    pub initiator: TransportId,
    /// Relative identifier of the target port.
    pub target_port: u16,
    /// It holds the reservation.
    pub holds: bool,
}

/// The persistent reservations of a unit at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReservationView {
    /// PRGENERATION (SPC-4, 6.16.2).
    pub generation: u32,
    /// The type of the reservation that is in force (SPC-4, table 70).
    pub kind: Option<u8>,
    /// Who is registered.
    pub registrants: Vec<Registrant>,
}

/// Whether a saved record of reservations can be restored.
///
/// # Errors
/// It is none, or damaged.
pub fn check_record(saved: &[u8]) -> Result<(), RestoreError> {
    record::decode(saved).map(drop)
}

/// Everything that persistent reservations are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Persistent {
    pub(crate) generation: u32,
    /// Survive a loss of power.
    pub(crate) aptpl: bool,
    pub(crate) registrations: Vec<Registration>,
    pub(crate) reservation: Option<Reservation>,
}

impl Persistent {
    pub(crate) fn registration(&self, port: &Port) -> Option<&Registration> {
        self.registrations.iter().find(|registration| registration.port == *port)
    }

    /// Does `port` hold the reservation?
    pub(crate) fn holds(&self, port: &Port) -> bool {
        self.reservation.as_ref().is_some_and(|reservation| match &reservation.holder {
            Some(holder) => holder == port,
            None => self.registration(port).is_some(),
        })
    }
}

/// A registered port that is there at present: what the check of a command needs.
#[derive(Clone, Copy, Debug)]
struct Member {
    nexus: NexusId,
    holder: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Reservations {
    /// RESERVE(6)'s holder.
    simple: Cell<Option<NexusId>>,
    persistent: RefCell<Persistent>,
    /// The type that is in force.
    kind: Cell<Option<Kind>>,
    members: RefCell<Vec<Member>>,
    attached: RefCell<Vec<(NexusId, Port)>>,
    store: RefCell<Option<Rc<dyn ReservationStore>>>,
    turn: Turn,
}

/// What a PERSISTENT RESERVE OUT did to others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    pub(crate) attentions: Vec<(NexusId, UnitAttention)>,
    /// Nexuses whose commands must be aborted.
    pub(crate) abort: Vec<NexusId>,
}

impl Reservations {
    /// Uses `store` from now on, and takes over what it had saved.
    pub(crate) fn restore(&self, store: Rc<dyn ReservationStore>, saved: Option<&[u8]>) -> Result<(), RestoreError> {
        if let Some(record) = saved {
            self.persistent.replace(record::decode(record)?);
            self.refresh();
        }
        self.store.replace(Some(store));
        Ok(())
    }

    pub(crate) fn attach(&self, nexus: NexusId, port: Port) {
        let mut attached = self.attached.borrow_mut();
        attached.retain(|(known, _)| *known != nexus);
        attached.push((nexus, port));
        drop(attached);
        self.refresh();
    }

    /// The nexus is gone: a SCSI-2 reservation goes with it, a registration stays.
    pub(crate) fn detach(&self, nexus: NexusId) {
        self.attached.borrow_mut().retain(|(known, _)| *known != nexus);
        self.release(nexus);
        self.refresh();
    }

    /// A reset ends SCSI-2 reservations only.
    pub(crate) fn reset(&self) {
        self.simple.set(None);
    }

    /// RESERVE(6) and RESERVE(10) (SPC-2, 7.21).
    pub(crate) fn reserve(&self, nexus: NexusId) -> Result<(), Failure> {
        if !self.persistent.borrow().registrations.is_empty() {
            return Err(Failure::Conflict);
        }
        self.simple.set(Some(nexus));
        Ok(())
    }

    /// RELEASE(6) and RELEASE(10): somebody else's reservation stays, and that is no error.
    pub(crate) fn release(&self, nexus: NexusId) {
        if self.simple.get() == Some(nexus) {
            self.simple.set(None);
        }
    }

    /// May `nexus` carry out `cdb`?
    pub(crate) fn check(&self, nexus: NexusId, cdb: &Cdb) -> Result<(), Failure> {
        if let Some(holder) = self.simple.get()
            && holder != nexus
            && !conflict::is_allowed_by_simple(cdb)
        {
            return Err(Failure::Conflict);
        }
        let Some(kind) = self.kind.get() else { return Ok(()) };
        let member = self.members.borrow().iter().find(|member| member.nexus == nexus).copied();
        let free = member.is_some_and(|member| member.holder || kind.admits_registrants());
        if free || conflict::is_allowed(cdb, kind, member.is_some()) { Ok(()) } else { Err(Failure::Conflict) }
    }

    /// PERSISTENT RESERVE IN: the answer to `action`.
    pub(crate) fn answer(&self, action: crate::cdb::PersistentIn) -> Vec<u8> {
        answer::encode(&self.persistent.borrow(), action)
    }

    /// Who is registered, and what is in force.
    pub(crate) fn view(&self) -> ReservationView {
        let state = self.persistent.borrow();
        let registrant = |one: &Registration| Registrant {
            key: one.key,
            initiator: one.port.initiator.clone(),
            target_port: one.port.target_port,
            holds: state.holds(&one.port),
        };
        ReservationView {
            generation: state.generation,
            kind: state.reservation.as_ref().map(|reservation| reservation.kind as u8),
            registrants: state.registrations.iter().map(registrant).collect(),
        }
    }

    /// PERSISTENT RESERVE OUT. One at a time; a task that is aborted while it waits for its turn changes nothing.
    pub(crate) async fn change(
        &self,
        nexus: NexusId,
        request: &Request,
        lists: &Lists<'_>,
        task: &Task,
    ) -> Result<Effects, Failure> {
        let _turn = self.turn.take(task).await?;
        let port = self.port_of(nexus).ok_or(Sense::INTERNAL_FAILURE)?;
        let (next, outcome) = {
            let now = self.persistent.borrow();
            change::apply(&now, &port, request, lists)?
        };
        self.save(&next).await?;
        self.persistent.replace(next);
        self.refresh();
        Ok(self.effects(nexus, &outcome))
    }

    /// Saves `next` if it has to survive, or if the record that is there must go.
    async fn save(&self, next: &Persistent) -> Result<(), Failure> {
        let was_kept = self.persistent.borrow().aptpl;
        let store = self.store.borrow().clone();
        let Some(store) = store else {
            return if next.aptpl { Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.into()) } else { Ok(()) };
        };
        if !next.aptpl && !was_kept {
            return Ok(());
        }
        let empty = Persistent::default();
        let record = record::encode(if next.aptpl { next } else { &empty });
        store.save(&record).await.map_err(|_| Failure::Check(Sense::INTERNAL_FAILURE))
    }

    pub(crate) fn can_persist(&self) -> bool {
        self.store.borrow().is_some()
    }

    /// Is APTPL in force?
    pub(crate) fn persists(&self) -> bool {
        self.persistent.borrow().aptpl
    }

    fn port_of(&self, nexus: NexusId) -> Option<Port> {
        self.attached.borrow().iter().find(|(known, _)| *known == nexus).map(|(_, port)| port.clone())
    }

    fn effects(&self, own: NexusId, outcome: &change::Outcome) -> Effects {
        let attached = self.attached.borrow();
        let nexuses = |port: &Port| {
            let port = port.clone();
            attached.iter().filter(move |(_, known)| *known == port).map(|(nexus, _)| *nexus)
        };
        let mut effects = Effects::default();
        for (port, attention) in &outcome.attentions {
            let others = nexuses(port).filter(|nexus| *nexus != own);
            effects.attentions.extend(others.map(|nexus| (nexus, *attention)));
        }
        for port in &outcome.abort {
            effects.abort.extend(nexuses(port));
        }
        effects
    }

    /// Works out again what the check of a command needs.
    fn refresh(&self) {
        let persistent = self.persistent.borrow();
        self.kind.set(persistent.reservation.as_ref().map(|reservation| reservation.kind));
        let mut members = self.members.borrow_mut();
        members.clear();
        for (nexus, port) in self.attached.borrow().iter() {
            if persistent.registration(port).is_some() {
                members.push(Member { nexus: *nexus, holder: persistent.holds(port) });
            }
        }
    }
}

impl std::fmt::Debug for Reservations {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Reservations").field("persistent", &self.persistent).finish_non_exhaustive()
    }
}

/// One change at a time.
#[derive(Debug, Default)]
struct Turn {
    taken: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

struct TurnGuard<'a>(&'a Turn);

impl Turn {
    async fn take(&self, task: &Task) -> Result<TurnGuard<'_>, Failure> {
        poll_fn(|context| {
            if !task.wake_on_abort(context.waker()) {
                return Poll::Ready(Err(Failure::Aborted));
            }
            if !self.taken.replace(true) {
                return Poll::Ready(Ok(TurnGuard(self)));
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.taken.set(false);
        self.0.waiting.borrow_mut().drain(..).for_each(Waker::wake);
    }
}
