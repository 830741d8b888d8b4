//! Owns: watching the slots of other hosts, breaking those that are gone, and recovering what they left.
//! Promises: one that lives is never broken by it: the claim expects the very image that stood still for longer than the lease; a LUN
//! that does not answer convicts nobody; one that is claimed while it renews has its whole lease to find that out.
//! Must not know: what a lock protects; how recovery frees things.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::types::Takeover;
use super::{Inner, drops};
use crate::breaker::{Judgement, Look, Watch};
use crate::breaking::{self, OwnersLease};
use crate::context::{Context, Member};
use crate::env::Instant;
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::lease;
use crate::recover::{self, Parts};
use crate::slot;
use crate::units::{Generation, OpId, SlotId, SlotRef};

/// All slots are looked through once in this many leases: the dead are found also when nobody waits for what they held.
const LEASES_BETWEEN_SCANS: u32 = 2;
/// A watched slot that changes this often in a row is watched no more.
const LIVES: u32 = 3;

/// A slot under watch.
struct Watched {
    /// The looks at a slot that is live by its state.
    watch: Option<Watch>,
    /// Looks in a row that found it changed.
    changed: u32,
    /// Of a slot that is claimed: whose it was, and a time by which the owner's last renewal had landed.
    shut_out: Option<(Generation, Instant)>,
}

impl Watched {
    fn new() -> Watched {
        Watched { watch: None, changed: 0, shut_out: None }
    }
}

/// The patrol on one LUN.
struct Patrol<'a> {
    inner: &'a Rc<Inner>,
    member: &'a Rc<Member>,
    watched: BTreeMap<SlotId, Watched>,
    /// What each slot showed at the last scan.
    seen: BTreeMap<SlotId, OpId>,
    next_scan: Instant,
}

/// Patrols the slots of one LUN until the volume is left.
pub(super) async fn run(inner: &Rc<Inner>, member: &Rc<Member>) {
    let mut patrol =
        Patrol { inner, member, watched: BTreeMap::new(), seen: BTreeMap::new(), next_scan: inner.context.env().now() };
    loop {
        let mut chance = [0];
        inner.context.env().random(&mut chance);
        if !super::background::sleep(inner, lease::renew_after(&inner.info.lease, chance[0])).await
            || inner.context.member(member.index).is_err()
        {
            return;
        }
        let _round = inner.rounds.read().await;
        if inner.context.fenced().is_some() || inner.closing.get() {
            continue;
        }
        if let Err(error) = patrol.round().await {
            patrol.interrupted();
            told(&inner.context, member, &error);
        }
    }
}

fn told(context: &Context, member: &Member, error: &FsError) {
    if error.kind() != FsErrorKind::Fenced
        && let Some(left_out) = context.complain("other slots", Some(member.index))
    {
        let lun = member.lun.name();
        tracing::warn!(lun, %error, left_out, "slots of other hosts could not be watched or recovered; trying again");
    }
}

impl Patrol<'_> {
    /// A look failed: what stood still may have done so for the storage's sake.
    fn interrupted(&mut self) {
        self.watched.values_mut().for_each(|watched| watched.watch = None);
    }

    async fn round(&mut self) -> Result<(), FsError> {
        let context = &self.inner.context;
        let now = context.env().now();
        // Who cannot renew its own lease here judges nobody.
        context.gate_is_open(self.member.index, now)?;
        for slot in context.take_suspects(self.member.index) {
            self.watched.entry(slot).or_insert_with(Watched::new);
        }
        if now >= self.next_scan {
            self.scan().await?;
            let lease = Duration::from_millis(self.inner.info.lease.lease_ms.into());
            self.next_scan = now.after(lease * LEASES_BETWEEN_SCANS);
        }
        drops::serve(self.inner, self.member).await?;
        let slots: Vec<SlotId> = self.watched.keys().copied().collect();
        for number in slots {
            let began = context.env().now();
            let (cell, heartbeat) = slot::read_slot(&context.io, &self.member.lun, self.member.index, number).await?;
            let look = Look { cell: &cell, began, ended: context.env().now() };
            match self.follow(number, look, &heartbeat).await {
                Ok(true) => {}
                Ok(false) => {
                    self.watched.remove(&number);
                }
                // One that cannot be broken or recovered now holds up no other one.
                Err(error) => told(&self.inner.context, self.member, &error),
            }
        }
        Ok(())
    }

    /// Looks through all slots: those that stood still since the last time, and those that are not live, are watched.
    async fn scan(&mut self) -> Result<(), FsError> {
        let own = self.inner.context.own_slot(self.member.index)?;
        let slots = slot::read_slots(&self.inner.context.io, &self.member.lun, self.member.index).await?;
        for (number, found) in slots.into_iter().enumerate() {
            let number = SlotId(number as u8);
            let Ok((cell, heartbeat)) = found else { continue };
            self.inner.context.beat_age(self.member.index, number, &heartbeat);
            let stood_still = self.seen.insert(number, cell.header().op_id) == Some(cell.header().op_id);
            let is_wanted = match heartbeat.state {
                SlotState::Free => false,
                SlotState::Live => stood_still && number != own.slot,
                SlotState::Breaking | SlotState::Dirty => true,
            };
            if is_wanted {
                self.watched.entry(number).or_insert_with(Watched::new);
            }
        }
        Ok(())
    }

    /// What follows from a look at a watched slot. False: it needs no watch any more.
    async fn follow(&mut self, number: SlotId, look: Look<'_>, heartbeat: &Heartbeat) -> Result<bool, FsError> {
        if number == self.inner.context.own_slot(self.member.index)?.slot {
            return Ok(false);
        }
        match heartbeat.state {
            SlotState::Free => Ok(false),
            SlotState::Live => self.judge(number, look, heartbeat).await,
            SlotState::Breaking | SlotState::Dirty => {
                self.note_shut_out(number, heartbeat, look.ended);
                self.take_up(number, look.cell.clone(), heartbeat).await
            }
        }
    }

    /// Notes that the owner of a claimed slot had begun its last renewal by `since`, unless that is known already.
    fn note_shut_out(&mut self, number: SlotId, heartbeat: &Heartbeat, since: Instant) {
        let watched = self.watched.entry(number).or_insert_with(Watched::new);
        if watched.shut_out.is_none_or(|(generation, _)| generation != heartbeat.generation) {
            watched.shut_out = Some((heartbeat.generation, since));
        }
    }

    /// What the looks so far say of the lease of a claimed slot's owner.
    fn lease_of(&self, number: SlotId, heartbeat: &Heartbeat) -> OwnersLease {
        let shut_out = self.watched.get(&number).and_then(|watched| watched.shut_out);
        let since = shut_out.filter(|(generation, _)| *generation == heartbeat.generation).map(|(_, since)| since);
        let over = since.map(|since| since.after(lease::takeover_after(&heartbeat.lease)));
        if over.is_some_and(|over| over <= self.inner.context.env().now()) {
            OwnersLease::Over
        } else {
            OwnersLease::MayRun
        }
    }

    async fn judge(&mut self, number: SlotId, look: Look<'_>, heartbeat: &Heartbeat) -> Result<bool, FsError> {
        let watched = self.watched.get_mut(&number).expect("it is looked at because it is watched");
        self.inner.context.beat_age(self.member.index, number, heartbeat);
        watched.shut_out = None;
        let Some(watch) = &mut watched.watch else {
            watched.watch = Some(Watch::begin(look));
            return Ok(true);
        };
        let longest_gap = lease::liveness_watch(&self.inner.info.lease);
        let mut judgement = watch.look(look, &heartbeat.lease, longest_gap);
        let since = watch.since();
        let asked = self.inner.context.drop_asked(self.member.index, number, heartbeat);
        let mut cause = "a host that has not renewed its lease is taken over";
        if let Some(asked) = asked {
            // It renews, but says nothing of what it was asked: what it still sends under that LUN's locks nobody knows.
            let waited = look.began.0.saturating_sub(asked.since.0);
            if Duration::from_nanos(waited) >= lease::takeover_after(&heartbeat.lease) {
                if judgement != Judgement::Gone {
                    cause = "a host that was asked to let go of another LUN and has not answered for as long as a lease is taken over";
                }
                judgement = Judgement::Gone;
            }
        }
        match judgement {
            Judgement::Lives => {
                watched.changed += 1;
                Ok(watched.changed < LIVES || asked.is_some())
            }
            Judgement::StandsStill(_) => {
                watched.changed = 0;
                Ok(true)
            }
            Judgement::Gone => {
                let claimed = breaking::claim(&self.inner.context, self.member, look.cell).await?;
                watched.watch = None;
                let Some(cell) = claimed else { return Ok(true) };
                tracing::warn!(
                    lun = self.member.lun.name(),
                    slot = %number,
                    host = heartbeat.host_name,
                    "{cause}"
                );
                let heartbeat = slot::decode(&cell)?;
                self.note_shut_out(number, &heartbeat, since);
                self.take_up(number, cell, &heartbeat).await
            }
        }
    }

    /// Goes on with a slot that is claimed or dirty: fence, then recover, unless another host that lives is at it.
    async fn take_up(&mut self, number: SlotId, cell: Cell, heartbeat: &Heartbeat) -> Result<bool, FsError> {
        let context = &self.inner.context;
        let mut cell = cell;
        if !breaking::is_own(context, heartbeat) {
            if breaking::breaker_lives(context, self.member, heartbeat).await? {
                // It is at it, or it is gone too: then its own slot stands still.
                context.suspect(self.member.index, heartbeat.breaker.slot.slot);
                return Ok(true);
            }
            match breaking::claim(context, self.member, &cell).await? {
                Some(claimed) => cell = claimed,
                None => return Ok(true),
            }
        }
        let lease = self.lease_of(number, heartbeat);
        let fenced = breaking::fence(context, self.member, number, &cell, lease).await?;
        let Some(dirty) = fenced else { return Ok(true) };
        let (lun, grade) = (self.member.index, slot::decode(&dirty)?.fence_grade);
        let slot = SlotRef { slot: number, generation: heartbeat.generation };
        let (host, name) = (heartbeat.host, heartbeat.host_name.clone());
        self.inner.note_takeover(Takeover { lun, slot, host, name, grade, attested: false });
        self.recover(number, &dirty).await
    }

    /// Recovers what the incarnation in a dirty slot left, and frees the slot.
    async fn recover(&mut self, number: SlotId, dirty: &Cell) -> Result<bool, FsError> {
        let heartbeat = slot::decode(dirty)?;
        let dead = SlotRef { slot: number, generation: heartbeat.generation };
        let inner = self.inner;
        let parts = Parts { context: &inner.context, objects: &inner.objects, names: &inner.names };
        let recovered = recover::recover(&parts, self.member, dead, &heartbeat).await?;
        inner.reap().await?;
        let freed = breaking::free(&inner.context, self.member, number, dirty).await?;
        if freed.is_some() {
            tracing::info!(
                lun = self.member.lun.name(),
                slot = %dead,
                host = heartbeat.host_name,
                units = recovered.units,
                blocks = recovered.blocks,
                quarantined = recovered.quarantined,
                marks = recovered.marks,
                "what a host left behind was recovered"
            );
        }
        Ok(freed.is_none())
    }
}
