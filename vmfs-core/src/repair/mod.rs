//! Owns: repairing a volume that no host uses: the order of the steps, what needs consent, when it is done.
//! Promises: every step leaves a volume that a repair can begin with again; what is wrong for certain is changed only as far as a check
//! says so, and a check ends it. Must not know: command lines, where the undo log is kept.
//!
//! ```text
//! headers -> "being repaired" -> slots fenced -> members, heartbeats, arenas
//!   -> again and again { check -> objects -> tables -> leaks, marks -> names, lost+found } until nothing is left to do
//!   -> slots free -> no longer "being repaired" -> check
//! ```

mod bodies;
mod fixed;
pub(crate) mod ground;
pub(crate) mod guard;
mod mappings;
mod names;
mod objects;
mod reverse;
mod roots;
mod tables;
mod undo;
mod units;

pub use undo::UndoLog;

use std::collections::HashMap;
use std::rc::Rc;

use crate::check::remedy::Remedies;
use crate::check::{self, Finding, Observer, Progress, Report};
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::table_entry::EntryKind;
use crate::lun::Lun;
use crate::units::{FdId, Uuid};
use crate::window::{self, Carriers};
use ground::Ground;
use undo::UndoLun;

/// Checks and repairs that follow each other before a repair gives up: each makes visible what the one before has freed.
const ROUNDS: usize = 40;

/// How a repair is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairOptions {
    /// Granules of blocks that are found again by the reverse map read as zeros; else they show what the blocks hold.
    pub zero_unknown: bool,
}

/// Takes what a repair says, and decides what it may do.
pub trait Repairer: Observer {
    /// Something was put right.
    fn repaired(&mut self, what: &str);
    /// The check after the repair begins: findings from now on are what is left.
    fn checks_again(&mut self) {}
    /// Whether this may be done, which can lose something. Asked once for each question.
    fn consents(&mut self, question: &str) -> bool;
}

/// What a repair did and what the check after it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Things put right.
    pub repairs: u64,
    /// Things that were not allowed.
    pub refused: u64,
    /// The last check.
    pub report: Report,
}

/// One repair.
pub(crate) struct Work<'a> {
    repairer: &'a mut dyn Repairer,
    options: RepairOptions,
    answers: HashMap<String, bool>,
    repairs: u64,
    /// Exact names of entries that were saved out of a directory which had to be emptied.
    saved_names: HashMap<FdId, Vec<u8>>,
}

impl<'a> Work<'a> {
    fn new(repairer: &'a mut dyn Repairer, options: RepairOptions) -> Work<'a> {
        Work { repairer, options, answers: HashMap::new(), repairs: 0, saved_names: HashMap::new() }
    }

    fn repaired(&mut self, what: String) {
        if !what.is_empty() {
            self.repairs += 1;
            self.repairer.repaired(&what);
        }
    }

    fn allowed(&mut self, question: &str) -> bool {
        if let Some(answer) = self.answers.get(question) {
            return *answer;
        }
        let answer = self.repairer.consents(question);
        self.answers.insert(question.to_owned(), answer);
        answer
    }
}

/// Hears nothing and allows nothing.
struct Nobody;

impl Observer for Nobody {
    fn finding(&mut self, _: Finding) {}
}

impl Repairer for Nobody {
    fn repaired(&mut self, _: &str) {}

    fn consents(&mut self, _: &str) -> bool {
        false
    }
}

/// Shows progress of the checks within a repair, and none of their findings.
struct Quiet<'a, 'b>(&'a mut Work<'b>);

impl Observer for Quiet<'_, '_> {
    fn finding(&mut self, _: Finding) {}

    fn progress(&mut self, progress: Progress) {
        self.0.repairer.progress(progress);
    }
}

/// Repairs the volume whose LUNs these are. The findings before and after it go to `repairer`.
///
/// # Errors
/// `Busy`: a host uses the volume. `Invalid`: not all LUNs of one volume were given. Whatever the error, the
/// repair can be begun again; until it has ended no host mounts the volume.
pub async fn repair(
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    options: RepairOptions,
    undo: Option<Rc<dyn UndoLog>>,
    repairer: &mut dyn Repairer,
) -> Result<Repaired, FsError> {
    let luns: Vec<Rc<dyn Lun>> = luns.iter().enumerate().map(|(nth, lun)| logged(lun, nth, &undo)).collect();
    let untouched = fixed::ground(env, &luns).await?;
    let seen = guard::taken_slots(&untouched).await?;
    guard::refuse_users(env, &luns, "repair it").await?;
    let before = check::check(&luns, repairer).await?;
    if !before.missing.is_empty() {
        let missing: Vec<String> = before.missing.iter().map(|lun| lun.to_string()).collect();
        let message = format!(
            "{} of volume {} was not given or has no readable header; a repair needs every LUN, for they vouch for each other: \
             give it too",
            missing.join(", "),
            before.volume
        );
        return Err(FsError::refused(FsErrorKind::Invalid, message));
    }
    let mut work = Work::new(repairer, options);
    let members = window::members_of(&luns, &Carriers::default()).await?;
    fixed::mend_headers(env, &members, &mut work).await?;
    let mut ground = fixed::ground(env, &luns).await?;
    guard::close(&mut ground, &seen).await?;
    for lun in ground.members.keys().copied().collect::<Vec<_>>() {
        fixed::mend_slots(&ground, lun, &mut work).await?;
    }
    let mut incarnation = [0; 8];
    env.random(&mut incarnation);
    match guard::fence_all(&mut ground, u64::from_le_bytes(incarnation).max(1)).await {
        Ok(slots) => slots.into_iter().for_each(|slot| work.repaired(slot.to_string())),
        Err(error) => {
            // Nothing but slots was changed yet, and a host can take those up.
            guard::open(&mut ground).await?;
            return Err(error);
        }
    }
    fixed::mend_members(&mut ground, &mut work).await?;
    let left = rounds(&mut ground, &luns, &mut work).await?;
    if !left {
        guard::free_all(&ground).await?;
    }
    guard::open(&mut ground).await?;
    let (repairs, refused) = (work.repairs, work.answers.values().filter(|answer| !**answer).count() as u64);
    work.repairer.checks_again();
    let report = check::check(&luns, work.repairer).await?;
    Ok(Repaired { repairs, refused, report })
}

fn logged(lun: &Rc<dyn Lun>, nth: usize, undo: &Option<Rc<dyn UndoLog>>) -> Rc<dyn Lun> {
    match undo {
        Some(log) => Rc::new(UndoLun::new(lun.clone(), nth, log.clone())),
        None => lun.clone(),
    }
}

/// Checks and repairs until a check leaves nothing that may be done. True: marks of incarnations are left, so slots stay dirty.
async fn rounds(ground: &mut Ground, luns: &[Rc<dyn Lun>], work: &mut Work<'_>) -> Result<bool, FsError> {
    for _ in 0..ROUNDS {
        let (_, remedies) = check::check_for_repair(luns, &mut Quiet(work)).await?;
        let before = work.repairs;
        if !round(ground, luns, &remedies, work).await? || work.repairs == before {
            return Ok(!remedies.objects.is_empty());
        }
    }
    // The check that follows says what is left.
    Ok(true)
}

/// One round: the first kind of remedy that changes something ends it. False: nothing was done.
async fn round(
    ground: &mut Ground,
    luns: &[Rc<dyn Lun>],
    remedies: &Remedies,
    work: &mut Work<'_>,
) -> Result<bool, FsError> {
    let before = work.repairs;
    // What a cut-off operation left needs no consent, and goes first: it makes the rest smaller.
    for fd in &remedies.unfinished {
        work.repaired(roots::finish(ground, *fd).await?);
    }
    for fd in &remedies.settle {
        work.repaired(roots::settle(ground, *fd).await?);
    }
    for fd in &remedies.locked {
        work.repaired(roots::unlock(ground, *fd).await?);
    }
    for what in tables::free_and_keep(ground, remedies).await? {
        work.repaired(what);
    }
    mend_containers(ground, remedies, work).await?;
    if work.repairs > before {
        return Ok(true);
    }
    objects::mend(ground, remedies, work).await?;
    if work.repairs > before {
        return Ok(true);
    }
    if remedies.objects.is_empty() {
        mend_tables(ground, remedies, work).await?;
    }
    let ownerless = !remedies.ownerless_blocks.is_empty() || !remedies.ownerless_units.is_empty();
    if ownerless
        && remedies.block_cells.is_empty()
        && work.allowed("blocks and units belong to objects whose container is not there. Free them?")
    {
        for what in tables::free_ownerless(ground, remedies).await? {
            work.repaired(what);
        }
    }
    mend_images(ground, remedies, work).await?;
    if work.repairs > before {
        return Ok(true);
    }
    if remedies.objects.is_empty() {
        for (fd, blocks) in &remedies.counts {
            work.repaired(objects::count(ground, *fd, *blocks).await?);
        }
        if work.repairs == before {
            names::mend(ground, luns, remedies, work).await?;
        }
    }
    Ok(work.repairs > before)
}

/// Containers whose entry was lost: what they hold must be seen before anything else is judged.
async fn mend_containers(ground: &Ground, remedies: &Remedies, work: &mut Work<'_>) -> Result<(), FsError> {
    for at in remedies.lost_containers.iter().filter(|at| ground.members.contains_key(&at.lun)) {
        if work.allowed(&format!("block {at} ought to be a container. Say so again, if its cells are one's?")) {
            work.repaired(tables::container(ground, *at).await?);
        }
    }
    Ok(())
}

async fn mend_tables(ground: &Ground, remedies: &Remedies, work: &mut Work<'_>) -> Result<(), FsError> {
    for (lun, number) in &remedies.block_cells {
        let question =
            format!("cell {number} of the block table of {lun} is damaged. Make it anew from what the objects reach?");
        if work.allowed(&question) {
            work.repaired(tables::block_cell(ground, *lun, *number, remedies).await?);
        }
    }
    for (at, container) in &remedies.unit_cells {
        let question = format!("unit table cell {at} is damaged. Make it anew from what the objects reach?");
        if work.allowed(&question) {
            work.repaired(tables::unit_cell(ground, *at, *container, remedies).await?);
        }
    }
    for at in &remedies.block_entries {
        if work.allowed(&format!("the table entry of block {at} is impossible. Set it to what the objects say?")) {
            work.repaired(tables::block_entry(ground, *at, remedies).await?);
        }
    }
    for at in &remedies.unit_entries {
        if work.allowed(&format!("the table entry of unit {at} is impossible. Set it to what the objects say?")) {
            work.repaired(tables::unit_entry(ground, *at, remedies).await?);
        }
    }
    Ok(())
}

/// Damaged cells of units that hold nothing; those of units in use only when every object is sound without them.
async fn mend_images(ground: &Ground, remedies: &Remedies, work: &mut Work<'_>) -> Result<(), FsError> {
    for (at, entry) in &remedies.unit_images {
        let unused = matches!(entry.kind, EntryKind::Free | EntryKind::Pool);
        let question = format!("cell {at} of a unit is damaged, and no object reads it. Make it a blank one?");
        let known = remedies.unit_cells.is_empty();
        if (unused && known) || (remedies.objects.is_empty() && known && work.allowed(&question)) {
            work.repaired(tables::blank(ground, *at).await?);
        }
    }
    Ok(())
}

/// Checks before bytes of an undo log are written back, and writes them: `records` come in the order in which they are written.
pub async fn undo(
    env: &Rc<dyn Env>,
    luns: &[Rc<dyn Lun>],
    records: &mut dyn Iterator<Item = Result<(usize, u64, Vec<u8>), FsError>>,
) -> Result<u64, FsError> {
    guard::refuse_users(env, luns, "undo the repair").await?;
    let mut written = 0;
    for record in records {
        let (lun, offset, bytes) = record?;
        let mut buf = crate::buf::AlignedBuf::zeroed(bytes.len());
        buf.copy_from_slice(&bytes);
        luns[lun].write(offset, buf).await?;
        written += 1;
    }
    for lun in luns {
        lun.flush().await?;
    }
    Ok(written)
}

/// Volume UUID and LUN UUID of each LUN, by its header or its copy: how an undo log names them.
pub async fn identities(luns: &[Rc<dyn Lun>]) -> Result<Vec<(Uuid, Uuid)>, FsError> {
    let mut all = Vec::with_capacity(luns.len());
    for lun in luns {
        let probed = check::probe::probe_all(std::slice::from_ref(lun), &mut Vec::new()).await?;
        // What it carries in a window is no LUN of its own.
        let own = probed.iter().find(|member| member.lun.name() == lun.name()).unwrap_or(&probed[0]);
        all.push((own.volume(), own.header.lun_uuid));
    }
    Ok(all)
}
