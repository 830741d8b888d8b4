//! Owns: a host's slot on a LUN: joining, renewing, leaving, and seeing who else lives there.
//! Promises: a slot that another host has claimed is never renewed again; a slot that went back in time stops its owner for good.
//! Must not know: what is done with a lease (the gate), how a dead host is broken (the breaker).

use std::cell::RefCell;
use std::rc::Rc;

use crate::cas::{CasOutcome, CellChange, CellIo};
use crate::env::Instant;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Arena;
use crate::format::header::{LeaseTimes, LockMode};
use crate::format::heartbeat::{FOLLOWS_MOVED, FenceGrade, Heartbeat, SlotState, reservation_key};
use crate::format::layout::{self, FIXED_STRIDE};
use crate::format::{Cell, CellKind, FormatError};
use crate::gate::GatePage;
use crate::lease;
use crate::lun::{Lun, LunError, LunErrorKind, PathOwner};
use crate::sabotage::{Sabotage, active};
use crate::units::{Generation, LunIndex, SLOTS, SlotId, SlotRef, Uuid};

/// Attempts at a slot cell that others change too (a request to drop a LUN, a claim) before the host gives up.
const TRIES: u32 = 16;

/// Who a host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// Host UUID.
    pub host: Uuid,
    /// Boot id.
    pub boot: Uuid,
    /// Name, for people.
    pub name: String,
}

/// The own slot on one LUN.
#[derive(Clone, Debug)]
pub struct OwnSlot {
    /// Which LUN.
    pub lun: LunIndex,
    /// Slot and generation.
    pub slot: SlotRef,
    /// The incarnation's random number, the same on all LUNs.
    pub incarnation: u64,
    /// The heartbeat cell as it was last Applied or seen to be the own one.
    pub cell: Cell,
    /// The arena cell as it was last Applied.
    pub arena: Cell,
    /// The own lease parameters.
    pub lease: LeaseTimes,
    /// When the lease ends, counted from before the last Applied renewal was sent.
    pub lease_until: Instant,
}

/// What a heartbeat cell says about the incarnation that believes it owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Live at the own generation.
    Mine,
    /// Another host claimed the slot, or it went on to another generation.
    Fenced,
    /// The cell is older than the last image known to be durable: the storage was rolled back. Stop for good.
    RolledBack,
}

/// Judges the heartbeat that was read from the own slot's cell.
pub fn judge(own: &OwnSlot, cell: &Cell, found: &Heartbeat) -> Verdict {
    let (known, now) = (own.cell.header(), cell.header());
    if now.seq < known.seq || (now.seq == known.seq && now.op_id != known.op_id) {
        Verdict::RolledBack
    } else if (found.is_live(own.slot.generation) && found.incarnation == own.incarnation)
        || (active(Sabotage::GenerationIgnored) && found.state == SlotState::Live)
    {
        Verdict::Mine
    } else {
        Verdict::Fenced
    }
}

/// The slots of a LUN in the order in which a host tries them: the preferred one, then the others after it, round.
pub fn order_of_choice(prefer: SlotId) -> impl Iterator<Item = SlotId> {
    (0..SLOTS).map(move |step| SlotId(prefer.0.wrapping_add(step as u8)))
}

/// Joins: takes a free slot (`prefer` if it is free, else the next one after it), with the next generation, and empties its arena.
///
/// All slots taken: an error of kind `Busy` that names holders. The lease counts from before the join was sent.
pub async fn join(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    lun_index: LunIndex,
    identity: &HostIdentity,
    incarnation: u64,
    lease: LeaseTimes,
    prefer: Option<SlotId>,
) -> Result<OwnSlot, FsError> {
    lease::check(&lease)?;
    let prefer = prefer.unwrap_or(SlotId(identity.host.0.iter().fold(0, |sum, byte| sum ^ byte)));
    // Slots whose arena cell is damaged; fsck repairs them, until then others serve.
    let mut damaged = Vec::new();
    for _ in 0..TRIES {
        let slots = read_slots(io, lun, lun_index).await?;
        let free = order_of_choice(prefer).find_map(|slot| match &slots[usize::from(slot.0)] {
            Ok((cell, heartbeat)) if may_join(heartbeat) && !damaged.contains(&slot) => Some((slot, cell, heartbeat)),
            _ => None,
        });
        let Some((slot, cell, heartbeat)) = free else {
            return Err(all_taken(lun, &slots));
        };
        let generation = heartbeat.generation.next();
        let live = Heartbeat {
            state: SlotState::Live,
            fence_grade: FenceGrade::C,
            host: identity.host,
            boot: identity.boot,
            generation,
            incarnation,
            beat: 1,
            lease,
            reservation_key: path_key(io, lun, SlotRef { slot, generation }),
            abilities: FOLLOWS_MOVED,
            live_since_s: u64::try_from(io.env().wall_ns() / 1_000_000_000).unwrap_or(0),
            host_name: identity.name.clone(),
            ..Heartbeat::free()
        };
        let writer = SlotRef { slot, generation };
        let t0 = io.env().now();
        let new = io.successor(cell, CellChange::payload(cell, live.encode()), writer);
        let cell = match io.cas(lun, cell, new).await? {
            CasOutcome::Applied(cell) => cell,
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => continue,
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
        };
        let arena = match empty_arena(io, lun, lun_index, writer).await {
            Ok(arena) => arena,
            Err(error) => {
                // Nothing was done in this slot yet: it is free again, unless the LUN fails here too.
                let gone = Heartbeat { generation, ..Heartbeat::free() };
                let new = io.successor(&cell, CellChange::payload(&cell, gone.encode()), writer);
                io.cas(lun, &cell, new).await?;
                if error.kind() != FsErrorKind::Corrupt {
                    return Err(error);
                }
                damaged.push(slot);
                continue;
            }
        };
        let lease_until = lease::lease_until(t0, &lease);
        return Ok(OwnSlot { lun: lun_index, slot: writer, incarnation, cell, arena, lease, lease_until });
    }
    Err(FsError::refused(
        FsErrorKind::Busy,
        format!("{}: other hosts took every slot that was tried, {TRIES} times; try again", lun.name()),
    ))
}

/// The key of an incarnation's paths: a LUN that is shared by SCSI commands has reservations, a file has none.
fn path_key(io: &CellIo, lun: &Rc<dyn Lun>, owner: SlotRef) -> u64 {
    match lun.lock_mode() {
        LockMode::CompareAndWrite => reservation_key(io.context().volume, owner),
        LockMode::SingleMachine => 0,
    }
}

/// The own slot as the LUN's means of fencing know it.
pub fn path_owner(io: &CellIo, own: &OwnSlot) -> PathOwner {
    // Also of a slot that somebody else joined: the key follows from it.
    PathOwner { slot: own.slot.slot, key: reservation_key(io.context().volume, own.slot) }
}

/// Marks the paths of a LUN that carry plain writes as the own slot's, then reads the slot live: a breaker that claimed it meanwhile either
/// waits for the end of these paths or was faster, and then the mark is taken off again.
pub async fn mark_paths(io: &CellIo, lun: &Rc<dyn Lun>, own: &OwnSlot) -> Result<(), FsError> {
    lun.mark_paths(path_owner(io, own)).await?;
    let live = check_live(io, lun, own).await;
    if live.is_err() {
        lun.unmark_paths().await;
    }
    live.map(|_| ())
}

/// As [`Lun::tend`]. What could not be looked at is looked at the next time; an error is the end of this incarnation.
pub async fn tend_paths(lun: &Rc<dyn Lun>, index: LunIndex) -> Result<(), FsError> {
    match lun.tend().await {
        Err(error) if error.kind == LunErrorKind::Fenced => {
            tracing::error!(lun = lun.name(), %error, "the storage does not let this host write any more");
            Err(FsError::Fenced { lun: index })
        }
        Err(error) => {
            tracing::debug!(lun = lun.name(), %error, "the reservation could not be looked at; trying again");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn may_join(heartbeat: &Heartbeat) -> bool {
    let free =
        heartbeat.state == SlotState::Free || (active(Sabotage::DirtyJoined) && heartbeat.state == SlotState::Dirty);
    free && heartbeat.generation.next().0 >> Generation::BITS == 0
}

fn all_taken(lun: &Rc<dyn Lun>, slots: &[Result<(Cell, Heartbeat), FsError>]) -> FsError {
    let named = |state| {
        let mut names: Vec<_> = slots
            .iter()
            .flatten()
            .filter(|(_, h)| h.state == state)
            .map(|(_, h)| if h.host_name.is_empty() { h.host.to_string() } else { h.host_name.clone() })
            .collect();
        names.sort();
        names.dedup();
        let more = if names.len() > 8 { format!(" and {} more", names.len() - 8) } else { String::new() };
        format!("{}{more}", names[..names.len().min(8)].join(", "))
    };
    FsError::refused(
        FsErrorKind::Busy,
        format!(
            "{}: all {SLOTS} slots are taken (live: {}; waiting for recovery: {}); unmount on a host or recover a dead one",
            lun.name(),
            named(SlotState::Live),
            named(SlotState::Dirty)
        ),
    )
}

/// Gives the arena cell of a slot just joined to its new generation, with no places.
async fn empty_arena(io: &CellIo, lun: &Rc<dyn Lun>, lun_index: LunIndex, own: SlotRef) -> Result<Cell, FsError> {
    let at = layout::arena_cell(lun_index, own.slot);
    for _ in 0..TRIES {
        let cell = read_kind(io, lun, at, CellKind::Arena).await?;
        let arena = Arena { generation: own.generation, anywhere: false, places: Vec::new() };
        let new = io.successor(&cell, CellChange::payload(&cell, arena.encode()), own);
        match io.cas(lun, &cell, new).await? {
            CasOutcome::Applied(cell) => return Ok(cell),
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
        }
    }
    Err(FsError::refused(FsErrorKind::Busy, format!("arena cell {at} of {}: another host changes it", lun.name())))
}

/// Renews the lease: beat + 1 in the own slot. On success `own` has the new image and `lease_until`.
///
/// [`FsError::Fenced`]: another host took the slot over. Kind `Stale`: the storage went back in time, stop for good. Any LUN error:
/// it is not known whether the renewal landed; renew again, the lease runs on from the last one that was Applied.
pub async fn renew(io: &CellIo, lun: &Rc<dyn Lun>, own: &mut OwnSlot) -> Result<(), FsError> {
    for _ in 0..TRIES {
        let found = decode(&own.cell)?;
        let next = Heartbeat { beat: found.beat.wrapping_add(1), ..found };
        let t0 = io.env().now();
        if change(io, lun, own, next).await? {
            let t0 = if active(Sabotage::LeaseFromAnswer) { io.env().now() } else { t0 };
            own.lease_until = own.lease_until.max(lease::lease_until(t0, &own.lease));
            return Ok(());
        }
    }
    Err(contended(lun, own))
}

/// Renews until that is no longer possible, and tells the gate page: each renewal that was Applied opens the gate until its lease
/// ends; a LUN that does not answer lets the gate close by itself and is tried again four times as often (freeze, don't kill).
/// Returns why it ended, after it poisoned the generation: fenced, or rolled back. Dropping it stops the renewals.
pub async fn keep(io: &CellIo, lun: &Rc<dyn Lun>, own: &RefCell<OwnSlot>, page: &GatePage) -> FsError {
    let margin_ns = |own: &OwnSlot| lease::margin(&own.lease).as_nanos() as u64;
    let mut failed = false;
    loop {
        let mut mine = own.borrow().clone();
        if !failed {
            page.extend(mine.lun, mine.slot.generation, mine.lease_until, margin_ns(&mine));
        }
        let mut chance = [0];
        io.env().random(&mut chance);
        let wait = lease::renew_after(&mine.lease, chance[0]);
        io.env().sleep(if failed { wait / 4 } else { wait }).await;
        let renewed = renew(io, lun, &mut mine).await;
        failed = renewed.is_err();
        match renewed {
            Err(error) if matches!(error.kind(), FsErrorKind::Fenced | FsErrorKind::Stale) => {
                page.poison(mine.lun, mine.slot.generation);
                return error;
            }
            Err(error) => tracing::warn!(%error, "the lease could not be renewed; trying again"),
            Ok(()) => {}
        }
        *own.borrow_mut() = mine;
    }
}

/// Changes fields of the own slot that are not about its life (fence grade, reservation key, acknowledgement of a drop). `edit` may
/// be called several times.
pub async fn update(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    own: &mut OwnSlot,
    edit: impl Fn(&mut Heartbeat),
) -> Result<(), FsError> {
    for _ in 0..TRIES {
        let mut next = decode(&own.cell)?;
        edit(&mut next);
        if change(io, lun, own, next).await? {
            return Ok(());
        }
    }
    Err(contended(lun, own))
}

/// Leaves: the slot becomes free (`clean`: no lock, no pool, nothing retiring or unknown is left) or dirty. The generation stays.
pub async fn leave(io: &CellIo, lun: &Rc<dyn Lun>, own: &mut OwnSlot, clean: bool) -> Result<(), FsError> {
    for _ in 0..TRIES {
        let next = if clean {
            Heartbeat { generation: own.slot.generation, ..Heartbeat::free() }
        } else {
            Heartbeat { state: SlotState::Dirty, ..decode(&own.cell)? }
        };
        if change(io, lun, own, next).await? {
            return Ok(());
        }
    }
    Err(contended(lun, own))
}

/// Reads the own slot: the evidence of rule R1. It counts for images that were known before this was called. Gives what it saw.
pub async fn check_live(io: &CellIo, lun: &Rc<dyn Lun>, own: &OwnSlot) -> Result<Cell, FsError> {
    let read = io.read(lun, layout::heartbeat_cell(own.lun, own.slot.slot)).await;
    let cell = read.map_err(|error| formatted_anew(lun, own, error))?;
    accept(lun, own, &cell)?;
    Ok(cell)
}

/// A sound cell of another volume in the place of the own slot is the end, not a fault to wait for.
fn formatted_anew(lun: &Rc<dyn Lun>, own: &OwnSlot, error: FsError) -> FsError {
    match &error {
        FsError::Corrupt { cause: FormatError::Mismatch { field: "volume", found, .. }, .. } => FsError::refused(
            FsErrorKind::Stale,
            format!(
                "{}: the own slot {} belongs to volume {found} now: the LUN was formatted while it was mounted. This host stops using it",
                lun.name(),
                own.slot.slot
            ),
        ),
        _ => error,
    }
}

/// One attempt at the own slot: `true` when Applied, `false` when another host changed the cell and it is still the own one (a
/// request to drop a LUN): `own` then has the image to start from.
async fn change(io: &CellIo, lun: &Rc<dyn Lun>, own: &mut OwnSlot, next: Heartbeat) -> Result<bool, FsError> {
    let new = io.successor(&own.cell, CellChange::payload(&own.cell, next.encode()), own.slot);
    let outcome = io.cas(lun, &own.cell, new.clone()).await;
    match outcome.map_err(|error| formatted_anew(lun, own, error))? {
        CasOutcome::Applied(_) => {
            own.cell = new;
            Ok(true)
        }
        CasOutcome::Lost(current) | CasOutcome::Overtaken(current) => {
            accept(lun, own, &current)?;
            own.cell = current;
            Ok(false)
        }
        CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
    }
}

fn accept(lun: &Rc<dyn Lun>, own: &OwnSlot, cell: &Cell) -> Result<(), FsError> {
    match judge(own, cell, &decode(cell)?) {
        Verdict::Mine => Ok(()),
        Verdict::Fenced if active(Sabotage::ClaimIgnored) => Ok(()),
        Verdict::Fenced => Err(FsError::Fenced { lun: own.lun }),
        Verdict::RolledBack => Err(FsError::refused(
            FsErrorKind::Stale,
            format!(
                "{}: the own slot {} is older than what was written last (seq {}, now {}): the storage was rolled back to an \
                 earlier state. This host stops using the volume; run fsck.vmfs before it is mounted again",
                lun.name(),
                own.slot.slot,
                own.cell.header().seq,
                cell.header().seq
            ),
        )),
    }
}

fn contended(lun: &Rc<dyn Lun>, own: &OwnSlot) -> FsError {
    let message = format!("{}: other hosts changed the own slot {} {TRIES} times in a row", lun.name(), own.slot.slot);
    FsError::refused(FsErrorKind::Busy, message)
}

/// Decodes a heartbeat cell.
pub fn decode(cell: &Cell) -> Result<Heartbeat, FsError> {
    let corrupt = |cause| FsError::Corrupt { structure: format!("heartbeat cell {}", cell.address()), cause };
    cell.expect_kind(CellKind::Heartbeat).map_err(corrupt)?;
    Heartbeat::decode(cell.payload()).map_err(corrupt)
}

async fn read_kind(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    at: crate::units::CellAddress,
    kind: CellKind,
) -> Result<Cell, FsError> {
    let cell = io.read(lun, at).await?;
    cell.expect_kind(kind).map_err(|cause| FsError::Corrupt { structure: format!("{kind:?} cell {at}"), cause })?;
    Ok(cell)
}

/// Reads one slot.
pub async fn read_slot(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    lun_index: LunIndex,
    slot: SlotId,
) -> Result<(Cell, Heartbeat), FsError> {
    let cell = io.read(lun, layout::heartbeat_cell(lun_index, slot)).await?;
    let heartbeat = decode(&cell)?;
    Ok((cell, heartbeat))
}

/// Reads all slots of a LUN with one command; the element of a cell that fails its checks, also when read again, is its error.
pub async fn read_slots(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    lun_index: LunIndex,
) -> Result<Vec<Result<(Cell, Heartbeat), FsError>>, LunError> {
    let first = layout::heartbeat_cell(lun_index, SlotId(0));
    let cells = io.read_strided(lun, first, FIXED_STRIDE, SLOTS).await?;
    let mut slots = Vec::with_capacity(SLOTS);
    for (nth, cell) in cells.into_iter().enumerate() {
        slots.push(match cell {
            Ok(cell) => decode(&cell).map(|heartbeat| (cell, heartbeat)),
            Err(_) => read_slot(io, lun, lun_index, SlotId(nth as u8)).await,
        });
    }
    Ok(slots)
}

/// The slots in which a host lives (or says so: only watching tells whether it still does).
pub async fn live_hosts(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    lun_index: LunIndex,
) -> Result<Vec<(SlotId, Heartbeat)>, LunError> {
    let slots = read_slots(io, lun, lun_index).await?;
    let live = slots.into_iter().enumerate().filter_map(|(nth, slot)| match slot {
        Ok((_, heartbeat)) if heartbeat.state == SlotState::Live => Some((SlotId(nth as u8), heartbeat)),
        _ => None,
    });
    Ok(live.collect())
}

/// Of the slots that were live at two looks, those whose host renewed in between or joined: pure.
pub fn renewed_between(before: &[(SlotId, Heartbeat)], after: &[(SlotId, Heartbeat)]) -> Vec<(SlotId, Heartbeat)> {
    let unchanged = |slot: &SlotId, now: &Heartbeat| {
        before.iter().any(|(s, then)| s == slot && then.generation == now.generation && then.beat == now.beat)
    };
    after.iter().filter(|(slot, now)| !unchanged(slot, now)).cloned().collect()
}

/// Who uses this LUN: looks at the live slots, waits as long as two renewals of the slowest take, looks again. At once when no
/// slot is live. For mkfs, fsck and status; a lock is never taken on this evidence.
pub async fn hosts_in_use(
    io: &CellIo,
    lun: &Rc<dyn Lun>,
    lun_index: LunIndex,
) -> Result<Vec<(SlotId, Heartbeat)>, LunError> {
    let before = live_hosts(io, lun, lun_index).await?;
    let Some(watch) = before.iter().map(|(_, h)| lease::liveness_watch(&h.lease)).max() else {
        return Ok(Vec::new());
    };
    io.env().sleep(watch).await;
    Ok(renewed_between(&before, &live_hosts(io, lun, lun_index).await?))
}
