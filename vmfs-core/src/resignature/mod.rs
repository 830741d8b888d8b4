//! Owns: making copies of the LUNs of a volume (clones, array snapshots) a volume of its own.
//! Promises: the original is never written to; a copy that is half a new volume is mounted neither as the old nor as the new one; one that was
//! cut off is ended by the same call again, with the same UUIDs. Must not know: command lines, how the copy was made.
//!
//! ```text
//! look at all, watch slots      nothing is written; everything that is refused is refused here
//! announce, LUN by LUN          header: new volume UUID, label and device, "being resignatured"; LUN UUID as before
//! slots                         who lived when the copy was taken is claimed, fenced, and left dirty for the first mount to recover
//! member cells, LUN by LUN      new LUN UUIDs and devices
//! finish, LUN by LUN            header: new LUN UUID, no longer "being resignatured"
//! ```
//!
//! The UUID in the cells stays, for what names a unit carries a checksum over its cells; the header has the volume's own beside it.

mod plan;

use std::rc::Rc;

use crate::cas::CellChange;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{BEING_RESIGNATURED, LunHeader, OWN_VOLUME};
use crate::format::heartbeat::FenceGrade;
use crate::format::layout::{header_cell, header_copy_cell, member_cell};
use crate::format::member::Member;
use crate::format::{Cell, CellKind};
use crate::lun::Lun;
use crate::repair::ground::Ground;
use crate::repair::guard::{self, Seen};
use crate::units::{Link, LunIndex, Token, Uuid};
use plan::{Given, Plan, Stage};

/// How a copy is made a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResignatureOptions {
    /// Label of the new volume; `None`: `snap-`, the first eight digits of its UUID, `-`, and the label of the original.
    pub label: Option<String>,
    /// Whoever calls vouches that LUNs which do not say who they are are copies. One that says that it is the original is refused
    /// all the same.
    pub is_copy: bool,
}

/// How far it is, in cells written; what is not counted is the watching of slots before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Cells written, or found to be right already.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// A LUN of the new volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewLun {
    /// Index, as in the original.
    pub index: LunIndex,
    /// How messages name the LUN.
    pub name: String,
    /// New LUN UUID.
    pub uuid: Uuid,
}

/// A host that used the volume when the copy was taken. What it left is recovered at the first mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftSlot {
    /// On which LUN.
    pub lun: LunIndex,
    /// Which slot.
    pub slot: u8,
    /// Host name, for people.
    pub host_name: String,
    /// How well it is kept from writing to the copy.
    pub fence_grade: FenceGrade,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resignatured {
    /// UUID of the original; `None`: an earlier call had written over it everywhere.
    pub from: Option<Uuid>,
    /// UUID of the new volume.
    pub volume: Uuid,
    /// Its label.
    pub label: String,
    /// This ended what an earlier call began.
    pub resumed: bool,
    /// Its LUNs, ascending.
    pub luns: Vec<NewLun>,
    /// Slots that were not left when the copy was taken.
    pub left: Vec<LeftSlot>,
}

/// Makes the copies `luns` of all LUNs of one volume, in any order, a volume of its own.
///
/// # Errors
/// Before anything is written: `Invalid`: a LUN that is no copy or does not say so, one that is missing, is not a member, was cut short, or
/// waits for a repair. `Busy`: a host uses these very LUNs. Any error after that leaves LUNs that nobody mounts until the same call has ended.
pub async fn resignature(
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    options: &ResignatureOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Resignatured, FsError> {
    let (plan, mut ground) = plan::decide(env, luns, options).await?;
    let seen = guard::taken_slots(&ground).await?;
    guard::refuse_users(env, luns, "make a volume of the copy").await?;
    let steps = (4 * plan.given.len() + plan.given.len() * plan.members.len()) as u64;
    let mut steps = Steps { progress, done: 0, total: steps };
    announce(&plan, &ground, &seen, &mut steps).await?;
    let mut incarnation = [0; 8];
    env.random(&mut incarnation);
    let fenced = guard::fence_all(&mut ground, u64::from_le_bytes(incarnation).max(1)).await?;
    for slot in &fenced {
        // Its slot is dirty: nothing is done in it until it was recovered.
        ground.member(slot.lun)?.lun.end_fence(slot.slot);
    }
    for given in &plan.given {
        list_members(&plan, &ground, given.index(), &mut steps).await?;
    }
    for given in &plan.given {
        let header = LunHeader {
            lun_uuid: plan.lun_uuid(given.index()),
            incompatible: given.header.incompatible & !BEING_RESIGNATURED | OWN_VOLUME,
            ..announced(&plan, given)
        };
        let cell = ground.read_kind(header_cell(given.index()), CellKind::Header).await?;
        put_header(&ground, cell.as_ref(), &header, &mut steps).await?;
    }
    let left = fenced.into_iter().map(|slot| LeftSlot {
        lun: slot.lun,
        slot: slot.slot.0,
        host_name: slot.host_name,
        fence_grade: slot.fence_grade,
    });
    Ok(Resignatured {
        from: plan.from,
        volume: plan.volume,
        label: plan.label.clone(),
        resumed: plan.resumed,
        luns: plan.given.iter().map(|given| plan.new_lun(given)).collect(),
        left: left.collect(),
    })
}

/// Counts cells.
struct Steps<'a> {
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
    total: u64,
}

impl Steps<'_> {
    fn one(&mut self) {
        self.done = (self.done + 1).min(self.total);
        (self.progress)(Progress { done: self.done, total: self.total });
    }
}

/// The header of a LUN from the first change on.
fn announced(plan: &Plan, given: &Given) -> LunHeader {
    LunHeader {
        volume: Some(plan.volume),
        label: plan.label.clone(),
        identity: given.lun.identity(),
        lock_mode: plan.lock_mode,
        incompatible: given.header.incompatible | BEING_RESIGNATURED | OWN_VOLUME,
        ..given.header.clone()
    }
}

/// Says in every header what is being done, in ascending order: of two calls at once one fails at its first LUN. Then looks whether a host
/// came in before that was read.
async fn announce(plan: &Plan, ground: &Ground, seen: &Seen, steps: &mut Steps<'_>) -> Result<(), FsError> {
    let mut begun: Vec<&Given> = Vec::new();
    for given in &plan.given {
        if given.stage != Stage::Untouched {
            steps.one();
            steps.one();
            continue;
        }
        put_header(ground, given.cell.as_ref(), &announced(plan, given), steps).await?;
        begun.push(given);
    }
    let now = guard::taken_slots(ground).await?;
    if now.iter().all(|(slot, beat)| seen.get(slot) == Some(beat)) {
        return Ok(());
    }
    for given in begun {
        let cell = ground.read_kind(header_cell(given.index()), CellKind::Header).await?;
        put_header(ground, cell.as_ref(), &given.header, steps).await?;
    }
    let message = "a host has begun to use the copy; unmount it there first, then make a volume of it";
    Err(FsError::refused(FsErrorKind::Busy, message))
}

/// Makes the copy of a header and then the header, from the image `cell` (none: what is there fails its checks), say `wanted`.
async fn put_header(
    ground: &Ground,
    cell: Option<&Cell>,
    wanted: &LunHeader,
    steps: &mut Steps<'_>,
) -> Result<(), FsError> {
    let index = wanted.lun_index;
    let payload = wanted.encode();
    let at = header_copy_cell(index);
    let copy = ground.read_kind(at, CellKind::Header).await?;
    if copy.is_none_or(|copy| !copy.payload().starts_with(&payload)) {
        ground.put(at, header_change(payload.clone())).await?;
    }
    steps.one();
    match cell {
        Some(cell) if cell.payload().starts_with(&payload) => {}
        Some(cell) => drop(ground.put_payload(cell, payload).await?),
        None => drop(ground.put(header_cell(index), header_change(payload)).await?),
    }
    steps.one();
    Ok(())
}

fn header_change(payload: Vec<u8>) -> CellChange {
    CellChange { kind: CellKind::Header, owner: None, link: Link(0), index: 0, token: Token(0), payload }
}

/// Gives the members in use their new names in the table of one LUN. How far a member was, each table says as before.
async fn list_members(plan: &Plan, ground: &Ground, on: LunIndex, steps: &mut Steps<'_>) -> Result<(), FsError> {
    for given in plan.given.iter().filter(|given| plan.members.contains(&given.index())) {
        let at = member_cell(on, given.index());
        let lun = &ground.member(on)?.lun;
        let cell = ground.io.read(lun, at).await?;
        let corrupt = |cause| FsError::Corrupt { structure: format!("member cell {at} of {}", lun.name()), cause };
        let entry = Member::decode(cell.payload()).map_err(corrupt)?;
        let wanted = Member { lun_uuid: plan.lun_uuid(given.index()), identity: given.lun.identity(), ..entry.clone() };
        // A table that has not heard of an addition yet hears of it as always.
        let is_listed = plan::is_needed(&entry);
        if is_listed && wanted != entry {
            ground.put_payload(&cell, wanted.encode()).await?;
        }
        steps.one();
    }
    Ok(())
}
