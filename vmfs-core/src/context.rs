//! Owns: what all parts of one mounted volume share: members, own slots, the gate, and the way to read and change a cell.
//! Promises: every change is written under the own slot of the LUN it lies on; a fenced host changes nothing any more.
//! Must not know: what cells mean; who asks.

use std::cell::{Cell as StdCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};

use crate::cas::{CasOutcome, CellChange, CellIo};
use crate::complaints::Complaints;
use crate::env::{Env, Instant};
use crate::error::{FsError, FsErrorKind};
use crate::format::Cell;
use crate::format::header::{LunHeader, MemberState};
use crate::format::heartbeat::Heartbeat;
use crate::format::layout::{LunLayout, header_cell};
use crate::gate::{Gate, GatePage, GateState};
use crate::lease;
use crate::lun::{Lun, LunErrorKind};
use crate::sabotage::{Sabotage, active};
use crate::slot::{self, OwnSlot};
use crate::units::{BlockAddress, BlockSize, CellAddress, CellSize, Generation, LunIndex, SlotId, SlotRef};
use crate::window::Carriers;

/// Attempts at a command that the storage provably did not carry out (busy, queue full).
const NOT_DONE_TRIES: u32 = 7;
const NOT_DONE_PAUSE: Duration = Duration::from_millis(1);

/// A point in the order of this host's commands: evidence sent after a point was taken was read after what was known at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// A beat as this mount saw it in a slot.
#[derive(Clone, Copy, Debug)]
struct SeenBeat {
    generation: Generation,
    beat: u64,
    since: Instant,
    /// It was seen to change from an earlier beat of the same generation.
    renewed: bool,
}

/// What a cell is expected to hold, and what it holds afterwards.
type Pair = (Cell, Cell);

/// One member LUN of a mounted volume.
pub struct Member {
    /// Index in the volume.
    pub index: LunIndex,
    /// The LUN.
    pub lun: Rc<dyn Lun>,
    /// Geometry: it grows with the LUN.
    layout: RefCell<Rc<LunLayout>>,
    /// The header, as last read.
    pub header: RefCell<LunHeader>,
    /// The own slot; none on a read-only mount and after leaving.
    pub slot: RefCell<Option<OwnSlot>>,
    /// Latest moment before which evidence that the own slot is live was sent.
    proven: StdCell<Moment>,
    /// Something is left on this LUN that only recovery may clean: the slot must be left dirty.
    unresolved: StdCell<bool>,
    /// Held during a renewal, and while the slot is left.
    pub(crate) renewal: Mutex<()>,
    /// When the LUN last answered what is asked of it all the time: a renewal, on a read-only mount the count of free space.
    answered: StdCell<Instant>,
}

impl Member {
    /// A member with the slot that was joined on it.
    pub fn new(lun: Rc<dyn Lun>, layout: LunLayout, header: LunHeader, slot: Option<OwnSlot>) -> Member {
        Member {
            index: layout.lun,
            lun,
            layout: RefCell::new(Rc::new(layout)),
            header: RefCell::new(header),
            slot: RefCell::new(slot),
            proven: StdCell::default(),
            unresolved: StdCell::new(false),
            renewal: Mutex::default(),
            answered: StdCell::new(Instant(0)),
        }
    }

    /// Geometry, as far as it is known.
    pub fn layout(&self) -> Rc<LunLayout> {
        self.layout.borrow().clone()
    }

    /// Notes what the header says. The geometry only grows: an image that was read before and arrives later changes nothing.
    pub(crate) fn note_header(&self, header: LunHeader) {
        let known = self.layout();
        if header.segments.len() > known.segments.len() {
            let segments = header.segments.clone();
            *self.layout.borrow_mut() = Rc::new(LunLayout { segments, ..LunLayout::clone(&known) });
        }
        *self.header.borrow_mut() = header;
    }

    /// Notes an image of the own slot that was seen live, if it is later than the one that is known: the storage never shows an older
    /// one again.
    pub(crate) fn note_seen(&self, slot: SlotRef, cell: Cell) {
        if let Some(own) = &mut *self.slot.borrow_mut()
            && own.slot == slot
            && own.cell.header().seq < cell.header().seq
        {
            own.cell = cell;
        }
    }

    /// Notes that a command's end is not known, or that marks of this incarnation stay behind: the slot is left dirty.
    pub fn set_unresolved(&self) {
        self.unresolved.set(true);
    }

    /// Whether the slot must be left dirty.
    pub fn is_unresolved(&self) -> bool {
        self.unresolved.get()
    }
}

/// Shared by all parts of one mounted volume.
pub struct Context {
    /// Reads and changes cells.
    pub io: CellIo,
    members: RefCell<BTreeMap<LunIndex, Rc<Member>>>,
    gate: GatePage,
    incarnation: u64,
    read_only: bool,
    fenced: StdCell<Option<LunIndex>>,
    /// Why this incarnation is over.
    over: RefCell<Option<FsError>>,
    is_over: Notify,
    clock: StdCell<u64>,
    suspects: RefCell<BTreeSet<(LunIndex, SlotId)>>,
    /// Members came or went. One task waits for it: the one that works for each of them.
    members_changed: Notify,
    /// What each slot showed last.
    beats: RefCell<BTreeMap<(LunIndex, SlotId), SeenBeat>>,
    /// Owners that were asked to drop a LUN's locks, and when.
    drops: RefCell<BTreeMap<(LunIndex, SlotId), DropAsked>>,
    /// Members that were not there when the volume was mounted.
    missing: RefCell<BTreeSet<LunIndex>>,
    /// The LUNs by index, any of which may carry the cells of one that was taken out.
    carriers: Carriers,
    pub(crate) complaints: Complaints,
}

/// An owner that was asked to drop a LUN's locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropAsked {
    /// Generation of its slot.
    pub generation: Generation,
    /// The LUN whose locks it is to drop.
    pub lock_lun: LunIndex,
    /// When this host first saw the request.
    pub since: Instant,
}

impl Context {
    /// For these members; `incarnation` is the same on all LUNs.
    pub fn new(io: CellIo, members: Vec<Member>, gate: GatePage, incarnation: u64, read_only: bool) -> Context {
        members.iter().for_each(|member| member.answered.set(io.env().now()));
        Context {
            io,
            members: RefCell::new(members.into_iter().map(|m| (m.index, Rc::new(m))).collect()),
            gate,
            incarnation,
            read_only,
            fenced: StdCell::new(None),
            over: RefCell::new(None),
            is_over: Notify::new(),
            clock: StdCell::new(1),
            suspects: RefCell::default(),
            members_changed: Notify::new(),
            beats: RefCell::default(),
            drops: RefCell::default(),
            missing: RefCell::default(),
            carriers: Carriers::default(),
            complaints: Complaints::default(),
        }
    }

    /// With the LUNs among which cells move.
    pub fn with_carriers(self, carriers: Carriers) -> Context {
        Context { carriers, ..self }
    }

    /// The LUNs among which cells move.
    pub fn carriers(&self) -> &Carriers {
        &self.carriers
    }

    /// Clock, randomness and timer.
    pub fn env(&self) -> &Rc<dyn Env> {
        self.io.env()
    }

    /// Cell size of the volume.
    pub fn cell_size(&self) -> CellSize {
        self.io.context().cell_size
    }

    /// Block size of the volume.
    ///
    /// # Panics
    /// When there is no member: a mounted volume has at least one.
    pub fn block_size(&self) -> BlockSize {
        self.members.borrow().values().next().expect("a volume has a member").layout().block_size
    }

    /// A member; [`FsError::MissingLun`] when it is not there.
    pub fn member(&self, lun: LunIndex) -> Result<Rc<Member>, FsError> {
        self.members.borrow().get(&lun).cloned().ok_or(FsError::MissingLun { lun })
    }

    /// All members that are there, ascending.
    pub fn members(&self) -> Vec<Rc<Member>> {
        self.members.borrow().values().cloned().collect()
    }

    /// Adds a member: from now on it is found by everybody. The caller has joined its slot and opened the gate, if the volume is
    /// mounted for writing. False: there is one of that index already.
    pub fn add_member(&self, member: Member) -> bool {
        let mut members = self.members.borrow_mut();
        if members.contains_key(&member.index) {
            return false;
        }
        self.note_answer(&member);
        members.insert(member.index, Rc::new(member));
        self.members_changed.notify_one();
        true
    }

    /// Takes a member out: nobody finds it any more. The caller leaves its slot.
    pub fn remove_member(&self, lun: LunIndex) -> Option<Rc<Member>> {
        let removed = self.members.borrow_mut().remove(&lun);
        self.carriers.forget(lun);
        self.members_changed.notify_one();
        removed
    }

    /// Waits until members came or went since the last time.
    pub(crate) async fn members_changed(&self) {
        self.members_changed.notified().await;
    }

    /// Whether a LUN is being emptied: nothing new is put there.
    pub fn is_draining(&self, lun: LunIndex) -> bool {
        let leaves = |state| matches!(state, MemberState::Draining | MemberState::Carried);
        self.members.borrow().get(&lun).is_some_and(|member| leaves(member.header.borrow().state))
    }

    /// The LUN has answered a renewal, or on a read-only mount a count of its free space.
    pub fn note_answer(&self, member: &Member) {
        member.answered.set(self.env().now());
    }

    /// Whether a LUN is taken for lost: it is not there, or has answered nothing for as long as a live slot is watched for a sign of
    /// life, while another one does answer. It is asked all the same, and is there again with its first answer.
    pub fn is_lost(&self, lun: LunIndex) -> bool {
        !self.luns_at_hand().contains(&lun)
    }

    /// The LUNs that are there and not taken for lost, ascending. When none answers it is this host that slept: then none is lost.
    pub fn luns_at_hand(&self) -> Vec<LunIndex> {
        let now = self.env().now();
        let members = self.members.borrow();
        let answers =
            |member: &Member| member.answered.get().after(lease::liveness_watch(&member.header.borrow().lease)) >= now;
        let all_silent = !members.values().any(|member| answers(member));
        members.values().filter(|member| all_silent || answers(member)).map(|member| member.index).collect()
    }

    /// Notes members that were not there when the volume was mounted.
    pub fn set_missing(&self, luns: impl IntoIterator<Item = LunIndex>) {
        self.missing.borrow_mut().extend(luns);
    }

    /// The members that are not there or taken for lost, ascending.
    pub fn lost_luns(&self) -> Vec<LunIndex> {
        let at_hand = self.luns_at_hand();
        let all: BTreeSet<LunIndex> =
            self.missing.borrow().iter().chain(self.members.borrow().keys()).copied().collect();
        all.into_iter().filter(|lun| !at_hand.contains(lun)).collect()
    }

    /// Whether a member is not there or taken for lost.
    pub fn has_loss(&self) -> bool {
        !self.lost_luns().is_empty()
    }

    /// Whether an error comes from a LUN that is taken for lost, or is not there.
    pub fn is_loss(&self, error: &FsError) -> bool {
        match error {
            FsError::MissingLun { lun } => self.is_lost(*lun),
            FsError::Lun(failed) => {
                self.members().iter().any(|member| member.lun.name() == failed.lun && self.is_lost(member.index))
            }
            _ => false,
        }
    }

    /// Whether a place went with its LUN, which was taken out of the volume: nothing was in use there.
    pub fn is_gone(&self, at: CellAddress) -> bool {
        let went = |member: &Rc<Member>| member.lun.as_member().is_some_and(|lun| !lun.holds(at.offset));
        self.members.borrow().get(&at.lun).is_some_and(went)
    }

    /// The page that data submissions check.
    pub fn gate(&self) -> &GatePage {
        &self.gate
    }

    /// A reader of that page.
    pub fn gate_reader(&self) -> Gate {
        self.gate.gate()
    }

    /// The incarnation of this mount, the same on all LUNs.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Whether the mount only reads.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The LUN on which this host was fenced, if it was.
    pub fn fenced(&self) -> Option<LunIndex> {
        self.fenced.get()
    }

    /// Why this incarnation is over, if it is: it was fenced, or the storage went back in time.
    pub fn over(&self) -> Option<FsError> {
        self.over.borrow().clone()
    }

    /// Waits until this incarnation is over, and gives the reason.
    pub async fn until_over(&self) -> FsError {
        loop {
            let changed = self.is_over.notified();
            if let Some(cause) = self.over() {
                return cause;
            }
            changed.await;
        }
    }

    /// Ends this incarnation because of `cause`: nothing is changed any more, every gate is poisoned.
    pub fn set_fenced(&self, lun: LunIndex, cause: &FsError) {
        if self.fenced.replace(Some(lun)).is_some() {
            return;
        }
        tracing::error!(%lun, "{cause}");
        *self.over.borrow_mut() = Some(cause.clone());
        for member in self.members() {
            if let Some(own) = &*member.slot.borrow() {
                self.gate.poison(member.index, own.slot.generation);
            }
        }
        self.is_over.notify_waiters();
    }

    /// Asks for a watch over a slot: somebody waits for what its owner holds.
    pub fn suspect(&self, lun: LunIndex, slot: SlotId) {
        self.suspects.borrow_mut().insert((lun, slot));
    }

    /// For how long a slot has been showing this beat, as far as this mount looked. Nobody is broken by it.
    pub fn beat_age(&self, lun: LunIndex, slot: SlotId, shown: &Heartbeat) -> Duration {
        self.look_at_beat(lun, slot, shown).0
    }

    /// Whether this mount has seen the owner of a slot renew it within its lease: it is worth a question.
    pub fn renews(&self, lun: LunIndex, slot: SlotId, shown: &Heartbeat) -> bool {
        let (age, renewed) = self.look_at_beat(lun, slot, shown);
        renewed && age < Duration::from_millis(shown.lease.lease_ms.into())
    }

    fn look_at_beat(&self, lun: LunIndex, slot: SlotId, shown: &Heartbeat) -> (Duration, bool) {
        let (generation, beat, now) = (shown.generation, shown.beat, self.env().now());
        let mut beats = self.beats.borrow_mut();
        let seen = beats.entry((lun, slot)).or_insert(SeenBeat { generation, beat, since: now, renewed: false });
        if (seen.generation, seen.beat) != (generation, beat) {
            *seen = SeenBeat { generation, beat, since: now, renewed: seen.generation == generation };
        }
        (Duration::from_nanos(now.0.saturating_sub(seen.since.0)), seen.renewed)
    }

    /// Notes that the owner of a slot is asked to drop the locks of `lock_lun`; it is watched until it has answered.
    pub fn note_drop_asked(&self, lun: LunIndex, slot: SlotRef, lock_lun: LunIndex) {
        self.suspect(lun, slot.slot);
        let asked = DropAsked { generation: slot.generation, lock_lun, since: self.env().now() };
        let mut drops = self.drops.borrow_mut();
        let known = drops.entry((lun, slot.slot)).or_insert(asked);
        if (known.generation, known.lock_lun) != (asked.generation, asked.lock_lun) {
            *known = asked;
        }
    }

    /// The request to the owner of a slot that is not answered, as far as `heartbeat` says.
    pub fn drop_asked(&self, lun: LunIndex, slot: SlotId, heartbeat: &Heartbeat) -> Option<DropAsked> {
        let mut drops = self.drops.borrow_mut();
        let asked = *drops.get(&(lun, slot))?;
        let is_open = heartbeat.is_live(asked.generation)
            && heartbeat.drop_lun == asked.lock_lun.get()
            && !heartbeat.drop_acknowledged;
        if !is_open {
            drops.remove(&(lun, slot));
        }
        is_open.then_some(asked)
    }

    /// Takes the slots of a LUN that are to be watched.
    pub fn take_suspects(&self, lun: LunIndex) -> Vec<SlotId> {
        let mut suspects = self.suspects.borrow_mut();
        let of_lun = suspects.iter().filter(|(on, _)| *on == lun).map(|(_, slot)| *slot).collect();
        suspects.retain(|(on, _)| *on != lun);
        of_lun
    }

    /// The own slot on a LUN: whoever changes a cell there writes under it.
    pub fn own_slot(&self, lun: LunIndex) -> Result<SlotRef, FsError> {
        if let Some(lun) = self.fenced.get() {
            return Err(FsError::Fenced { lun });
        }
        let member = self.member(lun)?;
        let slot = member.slot.borrow().as_ref().map(|own| own.slot);
        slot.ok_or_else(|| FsError::refused(FsErrorKind::ReadOnly, "the volume is mounted read-only"))
    }

    /// This moment: commands sent from now on are later.
    pub fn now(&self) -> Moment {
        Moment(self.clock.get())
    }

    /// Before a command is sent: its answer shows something that is later than everything known so far.
    pub fn before_sending(&self) -> Moment {
        self.tick();
        self.now()
    }

    fn tick(&self) -> Moment {
        let before = self.clock.get();
        self.clock.set(before + 1);
        Moment(before)
    }

    /// Reads one cell.
    pub async fn read_cell(&self, at: CellAddress) -> Result<Cell, FsError> {
        let member = self.member(at.lun)?;
        self.io.read(&member.lun, at).await
    }

    /// Makes sure that the geometry of a LUN has a block, if it does: the LUN may have grown since its header was read. A LUN that is not
    /// there is left to whoever needs it.
    pub async fn know_block(&self, at: BlockAddress) -> Result<(), FsError> {
        let Ok(member) = self.member(at.lun) else { return Ok(()) };
        if member.layout().block_offset(at.block).is_none() {
            self.read_geometry(&member).await?;
        }
        Ok(())
    }

    /// Learns the geometry that a LUN has now.
    pub async fn read_geometry(&self, member: &Member) -> Result<(), FsError> {
        let cell = self.io.read(&member.lun, header_cell(member.index)).await?;
        let corrupt = |cause| FsError::Corrupt { structure: format!("header cell {}", cell.address()), cause };
        member.note_header(LunHeader::decode(self.cell_size(), cell.payload()).map_err(corrupt)?);
        Ok(())
    }

    /// Changes one cell under the own slot, if it holds `expect`.
    pub async fn cas(&self, expect: &Cell, change: CellChange) -> Result<CasOutcome, FsError> {
        let at = expect.address();
        let writer = self.own_slot(at.lun)?;
        let member = self.member(at.lun)?;
        let new = self.io.successor(expect, change, writer);
        self.send(&member, vec![(expect.clone(), new)]).await.pop().expect("each pair has one outcome")
    }

    /// Sends compare-and-writes of one LUN; those that were provably not carried out are sent again a few times.
    async fn send(&self, member: &Member, pairs: Vec<(Cell, Cell)>) -> Vec<Result<CasOutcome, FsError>> {
        let mut outcomes = self.io.cas_many(&member.lun, pairs.clone()).await;
        for attempt in 1..NOT_DONE_TRIES {
            let again: Vec<usize> = (0..pairs.len()).filter(|nth| was_busy(&outcomes[*nth])).collect();
            if again.is_empty() {
                break;
            }
            self.env().sleep(NOT_DONE_PAUSE * (1 << attempt)).await;
            let retried = self.io.cas_many(&member.lun, again.iter().map(|nth| pairs[*nth].clone()).collect()).await;
            again.into_iter().zip(retried).for_each(|(nth, outcome)| outcomes[nth] = outcome);
        }
        outcomes.into_iter().map(|outcome| self.note(member, outcome)).collect()
    }

    /// Changes several cells at once, each if it holds what is expected; in the order given.
    pub async fn cas_pairs(&self, pairs: Vec<Pair>) -> Vec<Result<CasOutcome, FsError>> {
        let mut by_lun: BTreeMap<LunIndex, Vec<(usize, Pair)>> = BTreeMap::new();
        let count = pairs.len();
        for (nth, pair) in pairs.into_iter().enumerate() {
            by_lun.entry(pair.0.address().lun).or_default().push((nth, pair));
        }
        let each = by_lun.into_iter().map(async |(lun, pairs)| {
            let (places, pairs): (Vec<usize>, Vec<_>) = pairs.into_iter().unzip();
            let outcomes = match (self.own_slot(lun), self.member(lun)) {
                (Ok(_), Ok(member)) => self.send(&member, pairs).await,
                (Err(error), _) | (_, Err(error)) => vec![Err(error); places.len()],
            };
            places.into_iter().zip(outcomes).collect::<Vec<_>>()
        });
        let mut all: Vec<Option<Result<CasOutcome, FsError>>> = vec![None; count];
        for (place, outcome) in futures_util::future::join_all(each).await.into_iter().flatten() {
            all[place] = Some(outcome);
        }
        all.into_iter().map(|outcome| outcome.expect("each pair has one outcome")).collect()
    }

    /// An unknown outcome leaves a possible change behind that only recovery can judge; a refusal by the storage is a fence.
    fn note(&self, member: &Member, outcome: Result<CasOutcome, FsError>) -> Result<CasOutcome, FsError> {
        if matches!(outcome, Ok(CasOutcome::Unknown(_)) | Err(_)) {
            member.set_unresolved();
        }
        if matches!(&outcome, Ok(CasOutcome::NotDone(error)) if error.kind == LunErrorKind::Fenced) {
            self.set_fenced(member.index, &FsError::Fenced { lun: member.index });
        }
        outcome
    }

    /// Evidence of rule R1: reads the own slot on each of these LUNs, now. [`FsError::Fenced`] ends this incarnation.
    pub async fn prove_live(&self, luns: impl IntoIterator<Item = LunIndex>) -> Result<(), FsError> {
        let checks = luns.into_iter().map(|lun| self.prove_one(lun));
        futures_util::future::try_join_all(checks).await.map(|_| ())
    }

    /// The same, unless evidence was sent since `known`. A host whose lease is over by its own clock looks again in any case: it may
    /// have slept, and another one may have claimed its slot meanwhile.
    pub async fn prove_live_since(&self, lun: LunIndex, known: Moment) -> Result<(), FsError> {
        let own = self.own_slot(lun)?;
        let slept = self.gate.gate().state(lun, own.generation, self.env().now()) != GateState::Open;
        if !slept && self.member(lun)?.proven.get() > known {
            return Ok(());
        }
        self.prove_one(lun).await
    }

    async fn prove_one(&self, lun: LunIndex) -> Result<(), FsError> {
        self.own_slot(lun)?;
        let member = self.member(lun)?;
        if active(Sabotage::SlotNotRead) {
            return Ok(());
        }
        let own = member.slot.borrow().clone().expect("own_slot found it");
        let sent = self.before_sending();
        match slot::check_live(&self.io, &member.lun, &own).await {
            Ok(seen) => {
                member.note_seen(own.slot, seen);
                member.proven.set(member.proven.get().max(sent));
                Ok(())
            }
            Err(error) => {
                // `Stale`: the storage was rolled back; this host stops for good.
                if matches!(error.kind(), FsErrorKind::Fenced | FsErrorKind::Stale) {
                    self.set_fenced(lun, &error);
                }
                Err(error)
            }
        }
    }

    /// A moment before a renewal is sent; give it to [`Context::renewal_applied`] when that renewal was Applied.
    pub fn before_renewal(&self) -> Moment {
        self.before_sending()
    }

    /// A renewal that was sent after `sent` was Applied: it is evidence of life.
    pub fn renewal_applied(&self, lun: LunIndex, sent: Moment) {
        if let Ok(member) = self.member(lun) {
            member.proven.set(member.proven.get().max(sent));
            self.note_answer(&member);
        }
    }

    /// Whether plain writes may be sent to a LUN now.
    pub fn gate_is_open(&self, lun: LunIndex, now: Instant) -> Result<(), FsError> {
        let own = self.own_slot(lun)?;
        match self.gate.gate().state(lun, own.generation, now) {
            GateState::Open => Ok(()),
            GateState::Poisoned => Err(FsError::Fenced { lun }),
            GateState::Frozen => Err(FsError::refused(
                FsErrorKind::Io,
                format!(
                    "the lease on {lun} has run out and is not renewed yet; writing waits until the LUN answers again"
                ),
            )),
        }
    }
}

fn was_busy(outcome: &Result<CasOutcome, FsError>) -> bool {
    matches!(outcome, Ok(CasOutcome::NotDone(error)) if error.kind == LunErrorKind::NotDone)
}
