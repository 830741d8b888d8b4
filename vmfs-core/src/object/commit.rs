//! Owns: the atomic change of one object, and its creation.
//! Promises: everything that the new image reaches is durable before the one compare-and-write that makes it reachable; a change
//! that lost leaves nothing behind; one whose end is unknown gives nothing back.
//! Must not know: what bodies mean.

use std::rc::Rc;

use super::{Image, Object, Objects, TIDY_FROM};
use crate::alloc::table::Reaches;
use crate::alloc::units::{FreshUnit, PreparedUnit, Purpose, UnitEdit, UnitUse};
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::CellKind;
use crate::format::body::Body;
use crate::format::root_cell::{HoldMode, LockRecord, LunSet, ObjectFlags, ObjectState, ObjectType, RootCell, Unclean};
use crate::format::table_entry::EntryKind;
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, FdId, Link, LunIndex, Token};

/// Root cells tried by one creation before it is given up.
const CREATE_TRIES: u32 = 64;

/// A change of a root cell.
pub type RootEdit<'a> = Box<dyn FnOnce(&mut RootCell) + 'a>;

/// A change of an object: what becomes of it, and what it drops.
#[derive(Default)]
pub struct Change<'a> {
    /// The new body; `None`: only the root cell changes.
    pub body: Option<Body>,
    /// Units that the new body reaches, made by [`Objects::prepare`].
    pub units: Vec<PreparedUnit>,
    /// Units that it no longer reaches (besides the old body, which is dropped by itself).
    pub drop_units: Vec<UnitUse>,
    /// Blocks that it no longer reaches: marked before, for the caller to free after their last user is gone.
    pub drop_blocks: Vec<(u32, BlockAddress)>,
    /// Further changes of the root cell. It runs once.
    pub root: Option<RootEdit<'a>>,
    /// The object gets a new link counter: it moves.
    pub relink: bool,
    /// The change frees space: it may use the reserve.
    pub freeing: bool,
}

/// What a commit has marked before it was sent.
#[derive(Default)]
struct Marks<'a> {
    /// Units that it drops.
    drops: &'a [UnitUse],
    /// Those of them that another host may have marked before.
    taken_over: &'a [UnitUse],
    /// Blocks that it drops.
    blocks: &'a [(u32, BlockAddress)],
}

/// What became of a change.
#[derive(Debug)]
#[must_use]
pub enum Committed {
    /// It is the object's state, durably, or was until others went on from it; then the object was read again.
    Done,
    /// Certain: the change never was there, somebody was first. The object was read again; everything that was prepared went back to
    /// the pool. Start again.
    Lost,
    /// The change may have been there for a moment, before others changed the object. It was read again: decide by its content.
    /// What was prepared is left to recovery.
    Overtaken,
}

/// An object to be created.
pub struct NewObject {
    /// The directory that will name it.
    pub parent: FdId,
    /// Type.
    pub object_type: ObjectType,
    /// Flags.
    pub flags: ObjectFlags,
    /// LUNs that it may use, besides the one of its root cell.
    pub luns: LunSet,
    /// Body, without any block or unit.
    pub body: Body,
    /// Lock that the creator holds from the start.
    pub lock: Option<HoldMode>,
    /// LUN of root cell and body.
    pub lun: LunIndex,
}

impl Objects {
    /// Builds a unit for a change of `object`, on the LUN of its root cell, or when that is full on another one that it may use.
    /// Nothing is written yet.
    pub async fn prepare(
        &self,
        object: &Object,
        kind: EntryKind,
        index: u32,
        stream: &[u8],
        purpose: Purpose,
    ) -> Result<PreparedUnit, FsError> {
        let image = object.image();
        let header = image.cell.header();
        let token = image.root.lock.token;
        let birth = header.seq.0 as u32;
        self.prepare_for(object.fd, header.link, birth, token, (kind, index), stream, purpose, &image.root.luns).await
    }

    #[expect(clippy::too_many_arguments, reason = "they are the fields of a cell's header")]
    async fn prepare_for(
        &self,
        fd: FdId,
        link: Link,
        birth: u32,
        token: Token,
        (kind, index): (EntryKind, u32),
        stream: &[u8],
        purpose: Purpose,
        luns: &LunSet,
    ) -> Result<PreparedUnit, FsError> {
        let token = if kind == EntryKind::PointerBlock { token } else { Token(0) };
        let unit = self.take_unit(fd.lun(), luns, purpose).await?;
        self.space.units.prepare(unit, fd, link, kind, index, birth, token, stream)
    }

    /// A unit on `prefer`, else on another LUN of the set. Before there is none, what commits have dropped is given back.
    async fn take_unit(&self, prefer: LunIndex, luns: &LunSet, purpose: Purpose) -> Result<FreshUnit, FsError> {
        if self.deferred_at_hand() >= TIDY_FROM {
            self.tidy_aside().await;
        }
        let mut refused = None;
        for tidied in [false, true] {
            if tidied {
                self.tidy_aside().await;
            }
            for lun in self.luns_for_units(prefer, luns, purpose) {
                match self.space.units.take(&self.space.blocks, lun, purpose).await {
                    Err(error) if error.kind() == FsErrorKind::NoSpace => refused = refused.or(Some(error)),
                    // A LUN that is not there cannot help; the preferred one has to be.
                    Err(error @ FsError::MissingLun { .. }) if lun != prefer => refused = refused.or(Some(error)),
                    Err(error) if lun != prefer && error.kind() == FsErrorKind::Io => refused = refused.or(Some(error)),
                    other => return other,
                }
            }
        }
        Err(refused.expect("each LUN that was tried was refused"))
    }

    /// Where units of an object are taken: the LUN of its root cell, then the others of its set. What is being emptied gets none while
    /// another LUN has room, one that is not in the set too: the commit that names the unit takes it in.
    fn luns_for_units(&self, prefer: LunIndex, luns: &LunSet, purpose: Purpose) -> Vec<LunIndex> {
        let own = std::iter::once(prefer).chain(luns.iter().filter(|lun| *lun != prefer));
        let (emptied, mut order): (Vec<LunIndex>, Vec<LunIndex>) = own.partition(|lun| self.context.is_draining(*lun));
        if emptied.is_empty() {
            return order;
        }
        let further = self.context.luns_at_hand().into_iter().filter(|lun| !self.context.is_draining(*lun));
        for lun in further {
            if !order.contains(&lun) {
                order.push(lun);
            }
        }
        if purpose == Purpose::Freeing || order.is_empty() {
            order.extend(emptied);
        }
        order
    }

    /// Gives back what commits dropped; that this fails on some LUN is no matter to a change on another.
    async fn tidy_aside(&self) {
        if let Err(error) = self.tidy().await
            && let Some(left_out) = self.context.complain("drops", None)
        {
            tracing::warn!(%error, left_out, "what commits dropped is given back later");
        }
    }

    /// Gives prepared units back that were not committed and not written.
    pub async fn discard(&self, units: Vec<PreparedUnit>) {
        let fresh = units.into_iter().map(|unit| self.space.units.unprepare(unit, false)).collect();
        self.space.units.pool_back(fresh).await;
    }

    /// Changes an object from the image `expected` on. While another host holds its lock only that one commits: `Busy`.
    pub async fn commit(
        &self,
        object: &Object,
        expected: &Rc<Image>,
        mut change: Change<'_>,
    ) -> Result<Committed, FsError> {
        let _busy = object.busy.lock().await;
        // A body alone gives back as many units as it takes, so a full volume never keeps what was written from being committed.
        let within_reserve = change.freeing || change.units.is_empty();
        let purpose = if within_reserve { Purpose::Freeing } else { Purpose::Normal };
        if object.doubtful.get() || !Rc::ptr_eq(&object.image(), expected) {
            let refreshed = self.refresh(object).await;
            self.discard(change.units).await;
            return refreshed.map(|()| Committed::Lost);
        }
        if change.body.is_some() {
            let may = self.check_may_write(object, expected).await;
            if !matches!(may, Ok(true)) {
                self.discard(change.units).await;
                return may.map(|_| Committed::Lost);
            }
        }
        let mut root = expected.root.clone();
        if let ObjectState::Creating(_) = root.state {
            root.state = ObjectState::Live;
        }
        let link = if change.relink { expected.link().next() } else { expected.link() };
        let mut drops = std::mem::take(&mut change.drop_units);
        let mut body = expected.body.clone();
        if let Some(new) = change.body.take() {
            let birth = expected.cell.header().seq.0 as u32;
            let place = (EntryKind::Body, 0);
            let (stream, luns) = (new.encode(), &root.luns);
            match self.prepare_for(object.fd, link, birth, Token(0), place, &stream, purpose, luns).await {
                Ok(unit) => {
                    if let Some(old) = root.body.replace(unit.reference) {
                        drops.push(UnitUse { at: old.at, owner: object.fd, kind: EntryKind::Body, index: 0 });
                    }
                    change.units.push(unit);
                }
                Err(error) => {
                    self.discard(change.units).await;
                    return Err(error);
                }
            }
            body = Rc::new(new);
        }
        if let Some(edit) = change.root.take() {
            edit(&mut root);
        }
        change.units.iter().for_each(|unit| root.luns.insert(unit.reference.at.lun));
        if !matches!(root.state, ObjectState::Live)
            && let Err(error) = self.space.roots.note(object.fd).await
        {
            self.discard(change.units).await;
            return Err(error);
        }
        self.carry_out(object, expected, root, link, body, change.units, drops, &change.drop_blocks).await
    }

    /// Fresh cells, marks and evidence at once; then the root cell; then what was dropped goes on the list.
    #[expect(clippy::too_many_arguments, reason = "the parts of one commit, used once")]
    async fn carry_out(
        &self,
        object: &Object,
        expected: &Rc<Image>,
        root: RootCell,
        link: Link,
        body: Rc<Body>,
        units: Vec<PreparedUnit>,
        drops: Vec<UnitUse>,
        drop_blocks: &[(u32, BlockAddress)],
    ) -> Result<Committed, FsError> {
        let edits: Vec<(UnitUse, UnitEdit)> = units
            .iter()
            .filter(|_| !active(Sabotage::UnitNotAssigned))
            .map(|unit| (unit.use_, UnitEdit::Assign))
            .chain(drops.iter().map(|unit| (*unit, UnitEdit::Retire)))
            .collect();
        let luns = units.iter().map(|unit| unit.reference.at.lun).chain([object.fd.lun()]);
        let mut luns: Vec<LunIndex> = luns.collect();
        luns.sort();
        luns.dedup();
        let reaches = Reaches::new(&expected.cell, expected.seen.get());
        let (written, edited, retired, live) = futures_util::join!(
            self.space.units.write(&units),
            self.space.units.edit(&edits, Some(&reaches)),
            self.space.blocks.retire(object.fd, drop_blocks),
            self.context.prove_live(luns)
        );
        let written = if active(Sabotage::CellsInDoubt) { Ok(true) } else { written };
        // After an error nobody can tell whose marks were there before.
        let taken_over = edited.as_ref().map_or_else(|_| drops.clone(), Vec::clone);
        let marks = Marks { drops: &drops, taken_over: &taken_over, blocks: drop_blocks };
        let ready = edited.map(|_| ()).and(retired.map(|_| ())).and(live).and(written);
        match ready {
            Ok(true) if reaches.is_over() => {
                // Somebody was first: what it was to drop may be anything by now, and carries no mark of this change.
                self.lost(object, units, &marks).await?;
                return Ok(Committed::Lost);
            }
            Ok(true) => {}
            Ok(false) => {
                // Some cell was not as remembered: all of them are given up.
                self.give_up(&units).await;
                self.undo(object.fd, Vec::new(), &marks).await;
                self.refresh(object).await?;
                return Ok(Committed::Lost);
            }
            Err(error) => {
                self.give_up(&units).await;
                self.undo(object.fd, Vec::new(), &marks).await;
                return Err(error);
            }
        }
        let change = CellChange {
            kind: CellKind::Root,
            owner: Some(object.fd),
            link,
            index: 0,
            token: Token(0),
            payload: root.encode(),
        };
        let sent = self.context.before_sending();
        match self.context.cas(&expected.cell, change).await {
            Ok(CasOutcome::Applied(cell)) => {
                self.applied(object, Image::new(cell, root, body, sent), drops);
                Ok(Committed::Done)
            }
            Ok(CasOutcome::Lost(_)) => {
                self.lost(object, units, &marks).await?;
                Ok(Committed::Lost)
            }
            Ok(CasOutcome::Overtaken(current)) => {
                let now = match self.decode_root(object.fd, &current) {
                    Ok(now) => now,
                    Err(error) => {
                        self.leave_to_recovery(&units, &drops, drop_blocks);
                        object.doubtful.set(true);
                        return Err(error);
                    }
                };
                let mine = !units.is_empty() && now.body == root.body && current.header().link == link;
                if mine || (units.is_empty() && now == root) {
                    self.applied(object, Image::new(current, now, body, sent), drops);
                    return Ok(Committed::Done);
                }
                // Whoever commits a body marks the one before it first: a new body without a mark was never the object's, and one
                // that is not as this host left it was, and has been replaced since.
                let body_unit = units.iter().find(|unit| unit.use_.kind == EntryKind::Body).map(|unit| unit.use_);
                let never_was = match body_unit {
                    Some(unit) if now.body != root.body => self.is_as_assigned(&unit).await.ok(),
                    _ => None,
                };
                match never_was {
                    Some(true) => {
                        self.lost(object, units, &marks).await?;
                        Ok(Committed::Lost)
                    }
                    // It was there. What it dropped is this host's to free; its own units are whoever's who replaced them.
                    Some(false) => {
                        self.defer(drops);
                        object.doubtful.set(true);
                        if let Err(error) = self.refresh(object).await {
                            tracing::debug!(fd = %object.fd, %error, "read again before it is used");
                        }
                        Ok(Committed::Done)
                    }
                    // What it named and dropped is left to recovery, which re-stamps before it frees.
                    None => {
                        self.leave_to_recovery(&units, &drops, drop_blocks);
                        object.doubtful.set(true);
                        self.refresh(object).await?;
                        Ok(Committed::Overtaken)
                    }
                }
            }
            Ok(CasOutcome::NotDone(error)) => {
                self.undo(object.fd, units, &marks).await;
                Err(error.into())
            }
            Ok(CasOutcome::Unknown(error)) => {
                self.leave_to_recovery(&units, &drops, drop_blocks);
                object.doubtful.set(true);
                Err(error.into())
            }
            Err(error) => {
                self.leave_to_recovery(&units, &drops, drop_blocks);
                object.doubtful.set(true);
                Err(error)
            }
        }
    }

    /// Whether nobody has touched a unit since this host assigned it. If somebody has, it was not a recovery of this incarnation:
    /// this host lived afterwards.
    async fn is_as_assigned(&self, unit: &UnitUse) -> Result<bool, FsError> {
        let assigned = self.space.units.is_assigned(unit).await?;
        if !assigned {
            self.context.prove_live([unit.at.lun]).await?;
        }
        Ok(assigned)
    }

    fn applied(&self, object: &Object, image: Rc<Image>, drops: Vec<UnitUse>) {
        object.set_image(image);
        self.defer(drops);
    }

    async fn lost(&self, object: &Object, units: Vec<PreparedUnit>, marks: &Marks<'_>) -> Result<(), FsError> {
        if active(Sabotage::DropsOfTheLost) {
            self.defer(marks.drops.to_vec());
        } else {
            self.undo(object.fd, units, marks).await;
        }
        match self.refresh(object).await {
            // The object is gone: the caller finds that out by itself.
            Err(FsError::Stale { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Frees units that no commit was sent for, though their cells are in doubt: only compare-and-write reaches cells of units, and
    /// one that lands late makes the next taker's remembered images mismatch, no more.
    async fn give_up(&self, units: &[PreparedUnit]) {
        let edits: Vec<(UnitUse, UnitEdit)> = units.iter().map(|unit| (unit.use_, UnitEdit::Free)).collect();
        if let Err(error) = self.space.units.edit(&edits, None).await {
            tracing::warn!(%error, "units of a change that did not happen stay behind; recovery frees them");
            self.leave_to_recovery(units, &[], &[]);
        }
    }

    /// Takes a commit back that certainly did not and will not happen: its units, all written, go back to the pool, marks are
    /// taken off. One that took the place of another host's mark stays until it was looked whether that host's change has dropped the
    /// unit: without a mark nobody would find it, if that host died.
    async fn undo(&self, fd: FdId, units: Vec<PreparedUnit>, marks: &Marks<'_>) {
        let taken_over = if active(Sabotage::StolenMarkKept) { &[] } else { marks.taken_over };
        let own = marks.drops.iter().filter(|unit| !taken_over.contains(unit));
        let edits: Vec<(UnitUse, UnitEdit)> = units
            .iter()
            .map(|unit| (unit.use_, UnitEdit::Recycle))
            .chain(own.map(|unit| (*unit, UnitEdit::Keep)))
            .collect();
        let (edited, kept) =
            futures_util::join!(self.space.units.edit(&edits, None), self.space.blocks.keep(fd, marks.blocks));
        self.contest(taken_over.iter().copied());
        if let Err(error) = edited.map(|_| ()).and(kept) {
            tracing::warn!(%fd, %error, "marks of a change that did not happen stay behind; recovery takes them off");
            self.leave_to_recovery(&units, marks.drops, marks.blocks);
            return;
        }
        let fresh = units.into_iter().map(|unit| self.space.units.unprepare(unit, true)).collect();
        self.space.units.pool_back(fresh).await;
    }

    /// What these units hold, and whether these drops happened, only recovery can judge: the slots are left dirty.
    fn leave_to_recovery(&self, units: &[PreparedUnit], drops: &[UnitUse], blocks: &[(u32, BlockAddress)]) {
        let units = units.iter().map(|unit| unit.reference.at.lun);
        let drops = drops.iter().map(|unit| unit.at.lun);
        for lun in units.chain(drops).chain(blocks.iter().map(|(_, at)| at.lun)) {
            if let Ok(member) = self.context.member(lun) {
                member.set_unresolved();
            }
        }
    }

    /// Creates an object in state `creating`, not named by any directory yet. It settles to live with its next change. If the
    /// name never comes to be, [`Objects::mark_unlinked`] and [`Objects::free`] take it back.
    pub async fn create(&self, new: NewObject) -> Result<Rc<Object>, FsError> {
        let stream = new.body.encode();
        let mut luns = new.luns;
        luns.insert(new.lun);
        for _ in 0..CREATE_TRIES {
            let (fd, free, moment) = self.space.roots.take(&self.space.blocks, new.lun).await?;
            let old = self.decode_root(fd, &free)?;
            // One counter is left out: a move of the object that had this cell before may have announced it.
            let link = if active(Sabotage::LinkReused) { free.header().link } else { free.header().link.next().next() };
            let place = (EntryKind::Body, 0);
            let birth = free.header().seq.0 as u32;
            let unit = self.prepare_for(fd, link, birth, Token(0), place, &stream, Purpose::Normal, &luns).await?;
            luns.insert(unit.reference.at.lun);
            let by = self.context.own_slot(new.lun)?;
            let lock = match new.lock {
                None => LockRecord { mode: HoldMode::Free, token: old.lock.token, holders: Vec::new(), wanted: false },
                Some(mode) => LockRecord {
                    mode,
                    token: old.lock.token.next(),
                    holders: vec![self.own_holder(fd)?],
                    wanted: false,
                },
            };
            let root = RootCell {
                state: ObjectState::Creating(by),
                object_type: Some(new.object_type),
                flags: new.flags,
                parent: Some(new.parent),
                lock,
                unclean: Unclean::default(),
                luns,
                body: Some(unit.reference),
            };
            let change = CellChange {
                kind: CellKind::Root,
                owner: Some(fd),
                link,
                index: 0,
                token: Token(0),
                payload: root.encode(),
            };
            let units = [unit];
            let edits = [(units[0].use_, UnitEdit::Assign)];
            // The evidence goes first, unless some was sent since the free cell was read; then everything else at once. That the
            // root cell may be there before its body does not show: no directory names the object before all of it is there.
            let live = futures_util::future::try_join(
                self.context.prove_live_since(new.lun, moment),
                self.context.prove_live_since(units[0].reference.at.lun, moment),
            );
            if let Err(error) = live.await {
                self.discard(Vec::from(units)).await;
                return Err(error);
            }
            let sent = self.context.before_sending();
            let (written, edited, taken) = futures_util::join!(
                self.space.units.write(&units),
                self.space.units.edit(&edits, None),
                self.context.cas(&free, change)
            );
            let sound = matches!(written, Ok(true)) && edited.is_ok();
            if taken.is_err() {
                self.leave_to_recovery(&units, &[], &[]);
            }
            match taken? {
                CasOutcome::Applied(cell) if sound => {
                    let object = self.adopt(fd, Image::new(cell, root, Rc::new(new.body), sent));
                    object.held.set(new.lock.is_some());
                    return Ok(object);
                }
                CasOutcome::Applied(_) => {
                    // The root cell stays `creating`, also where its body was to lie on another LUN: that slot is left dirty too.
                    self.context.member(fd.lun())?.set_unresolved();
                    self.leave_to_recovery(&units, &[], &[]);
                    edited?;
                    written?;
                }
                // Nobody but this incarnation changes a cell that it is creating: overtaken means that another host had it first.
                CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {
                    self.space.roots.forget_container(fd.container()).await;
                    if sound {
                        self.undo(fd, Vec::from(units), &Marks::default()).await;
                    } else {
                        self.leave_to_recovery(&units, &[], &[]);
                        edited?;
                        written?;
                    }
                }
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => {
                    self.leave_to_recovery(&units, &[], &[]);
                    return Err(error.into());
                }
            }
        }
        let message = format!("other hosts took every free root cell of {} first; try again", new.lun);
        Err(FsError::refused(FsErrorKind::Busy, message))
    }
}
