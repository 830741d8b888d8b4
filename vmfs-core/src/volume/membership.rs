//! Owns: what the member tables say, and making them say the same: finding members that came, finishing or taking back an addition that
//! another host left. Promises: what one table knows the others learn; a member goes forward only (reserved, joining, active, draining,
//! lost, removed); a LUN is known by its UUIDs. Must not know: where candidates come from, how a member is formatted.
//!
//! ```text
//! lowest member's table     the other tables     headers       new LUN's header
//! reserved (0 bytes)                                           joining (formatting ends with it)
//! joining                   joining, ascending   g -> g + 1    active: the commit
//! active                    active
//! ```
//!
//! A reservation of a host that is gone is taken back: its next step expects the reserved cell, so nothing of it can follow. What is
//! joining is finished by whoever sees the LUN, and never taken back.

use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;

use futures_util::future::{Either, select};

use super::{Inner, adopt, background, members};
use crate::cas::{CasOutcome, CellChange};
use crate::context::Member;
use crate::env::LocalFuture;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{DeviceIdentity, LunHeader, MemberState};
use crate::format::layout::{header_cell, header_copy_cell, member_cell};
use crate::format::{Cell, FormatError, member};
use crate::lease;
use crate::lun::Lun;
use crate::slot;
use crate::units::{CellAddress, LunIndex, SlotRef, Uuid};

/// Attempts at a cell that other hosts change too.
const TRIES: u32 = 16;

/// A member that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedLun {
    /// Index in the volume.
    pub index: LunIndex,
    /// Identity: the LUN's header has it.
    pub uuid: Uuid,
    /// Size when it was added.
    pub bytes: u64,
    /// What the device said of itself; of an image file the path that the adding host knew, if that is short.
    pub identity: DeviceIdentity,
    /// The LUNs that are there, by name.
    pub present: Vec<String>,
}

/// Finds LUNs that may be a member.
pub trait LunFinder {
    /// Candidates, each LUN once. They are believed by what is on them only.
    fn candidates<'a>(&'a self, wanted: &'a WantedLun) -> LocalFuture<'a, Vec<Rc<dyn Lun>>>;
}

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Free,
    /// Its index is taken, its LUN is being formatted.
    Reserved,
    /// Its LUN is formatted.
    Joining,
    Active,
    Draining,
    /// Its cells are in a window on another LUN.
    Carried,
    Lost,
    Removed,
}

pub(crate) fn stage(entry: &member::Member) -> Stage {
    match entry.state {
        MemberState::Free => Stage::Free,
        MemberState::Joining if entry.lun_bytes == 0 => Stage::Reserved,
        MemberState::Joining => Stage::Joining,
        MemberState::Active => Stage::Active,
        MemberState::Draining => Stage::Draining,
        MemberState::Carried => Stage::Carried,
        MemberState::Lost => Stage::Lost,
        MemberState::Removed => Stage::Removed,
    }
}

/// What goes forward only: how far a member is, and its size.
pub(crate) fn further(entry: &member::Member) -> (Stage, u64) {
    (stage(entry), entry.lun_bytes)
}

/// The member tables as they were read.
pub(super) struct Tables {
    pub each: Vec<(Rc<Member>, BTreeMap<LunIndex, member::Member>)>,
    /// The furthest stage of each member that any table has.
    pub merged: BTreeMap<LunIndex, member::Member>,
    /// The first error of a table that could not be read.
    pub error: Option<FsError>,
}

impl Tables {
    pub(super) async fn read(inner: &Inner) -> Tables {
        let mut tables = Tables { each: Vec::new(), merged: BTreeMap::new(), error: None };
        for present in inner.context.members() {
            match members::member_table(&inner.context.io, &present.lun, present.index).await {
                Ok(entries) => tables.put(present, entries),
                Err(error) => tables.error = tables.error.or(Some(error)),
            }
        }
        tables
    }

    fn put(&mut self, present: Rc<Member>, entries: Vec<member::Member>) {
        for entry in &entries {
            let known = self.merged.entry(entry.index).or_insert_with(|| member::Member::free(entry.index));
            if further(known) < further(entry) {
                *known = entry.clone();
            }
        }
        self.each.push((present, entries.into_iter().map(|entry| (entry.index, entry)).collect()));
    }

    /// Refuses unless every member in use is there: a change of membership is told to all of them.
    pub(super) fn check_all_there(&self, inner: &Inner) -> Result<(), FsError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        for entry in self.merged.values() {
            let in_use = matches!(stage(entry), Stage::Active | Stage::Draining | Stage::Carried);
            if in_use && inner.context.member(entry.index).is_err() {
                let message = format!(
                    "{} (UUID {}) is not there: members are added or taken out only while all others are; bring it back first",
                    entry.index, entry.lun_uuid
                );
                return Err(FsError::refused(FsErrorKind::Io, message));
            }
        }
        Ok(())
    }
}

/// Looks for members that came and for changes of membership that were left unfinished: when a header's generation changes, and every
/// H as long as not everything is settled.
pub(super) async fn run(inner: &Rc<Inner>) {
    let mut settled = false;
    loop {
        let pause = background::sleep(inner, lease::renew_after(&inner.info.lease, 0));
        let is_asked = match select(pin!(pause), pin!(inner.membership.notified())).await {
            Either::Left((false, _)) => return,
            Either::Left((true, _)) => false,
            Either::Right(_) => true,
        };
        if (settled && !is_asked) || inner.context.fenced().is_some() || inner.closing.get() {
            continue;
        }
        settled = match look(inner).await {
            Ok(settled) => settled,
            Err(error) => {
                if let Some(left_out) = inner.context.complain("members", None) {
                    tracing::warn!(%error, left_out, "the members of the volume could not be looked at; trying again");
                }
                false
            }
        };
    }
}

/// Compares a LUN's header with what is known of it, every H.
pub(super) async fn watch_header(inner: &Rc<Inner>, present: &Rc<Member>) {
    let mut known = window_of(present).is_some();
    while background::sleep(inner, lease::renew_after(&inner.info.lease, 0)).await
        && inner.context.member(present.index).is_ok()
    {
        // A LUN that does not answer is told by the renewals.
        let Ok((_, header)) = read_header(inner, present).await else { continue };
        if *present.header.borrow() != header {
            present.note_header(header);
            inner.membership.notify_one();
        }
        note_window(inner, present, &mut known);
    }
}

/// The window that carries a member's cells, once its own device is not used any more.
fn window_of(present: &Member) -> Option<CellAddress> {
    present.lun.as_member()?.window().map(|window| window.at)
}

/// The header was read: if it came from a window, everybody who has the LUN's device lets go of it.
fn note_window(inner: &Inner, present: &Member, known: &mut bool) {
    if let Some(at) = window_of(present)
        && !std::mem::replace(known, true)
    {
        inner.files.data_luns().insert(present.index, present.lun.data());
        inner.keeper.moved(present.index, at);
        inner.membership.notify_one();
    }
}

/// One look. True: all tables and headers agree and every member in use is there.
async fn look(inner: &Rc<Inner>) -> Result<bool, FsError> {
    let tables = Tables::read(inner).await;
    let mut settled = tables.error.is_none();
    let mut unfound = BTreeMap::new();
    for entry in tables.merged.values() {
        let is_there = inner.context.member(entry.index).is_ok();
        match stage(entry) {
            Stage::Reserved => {
                settled = false;
                take_back_of_gone(inner, entry).await?;
            }
            Stage::Joining | Stage::Active | Stage::Draining | Stage::Carried if !is_there => {
                settled = false;
                let found = match entry.window {
                    Some(at) => adopt::adopt_window(inner, at).await,
                    None => search(inner, entry).await,
                };
                if let Err(error) = found {
                    unfound.insert(entry.index, error.to_string());
                }
            }
            _ => {}
        }
    }
    *inner.unfound.borrow_mut() = unfound;
    if !inner.info.read_only && tables.error.is_none() {
        settled &= settle(inner).await?;
    }
    Ok(settled)
}

/// Looks for a member that is not there and takes it up; one whose addition was left by a host that is gone is finished first.
async fn search(inner: &Rc<Inner>, entry: &member::Member) -> Result<(), FsError> {
    let wanted = WantedLun {
        index: entry.index,
        uuid: entry.lun_uuid,
        bytes: entry.lun_bytes,
        identity: entry.identity.clone(),
        present: inner.context.members().iter().map(|present| present.lun.name().to_owned()).collect(),
    };
    let finder = inner.finder.borrow().clone();
    let candidates = match &finder {
        Some(finder) => finder.candidates(&wanted).await,
        None => Vec::new(),
    };
    let mut found = Vec::new();
    for lun in candidates {
        if let Ok(probed) = members::probe(lun).await
            && probed.volume() == inner.info.uuid
            && probed.header.lun_uuid == entry.lun_uuid
        {
            found.push(probed);
        }
    }
    let named = format!("{} of the volume (UUID {}, {} bytes)", entry.index, entry.lun_uuid, entry.lun_bytes);
    let refuse = |message: String| Err(FsError::refused(FsErrorKind::Io, message));
    let probed = match found.len() {
        1 => found.swap_remove(0),
        0 => {
            return refuse(format!(
                "{named} was not found here: attach it where -o watch looks, or mount again with it"
            ));
        }
        _ => {
            let names: Vec<&str> = found.iter().map(|probed| probed.lun.name()).collect();
            return refuse(format!("{named} was found more than once, as {}: leave the copies out", names.join(", ")));
        }
    };
    if probed.header.state == MemberState::Joining {
        if inner.info.read_only || !writer_is_gone(inner, entry.index).await? {
            return refuse(format!("{named} is being added by another host"));
        }
        finish(inner, &probed.lun, entry).await?;
    }
    adopt::adopt(inner, probed.lun).await.map(|_| ())
}

fn lowest(inner: &Inner) -> Result<Rc<Member>, FsError> {
    inner
        .context
        .members()
        .into_iter()
        .next()
        .ok_or_else(|| FsError::refused(FsErrorKind::Io, "no LUN of the volume is there".to_owned()))
}

/// The cell of a member on the lowest LUN, which decides how far it is.
pub(super) async fn deciding_cell(inner: &Inner, index: LunIndex) -> Result<(Cell, member::Member), FsError> {
    let cell = inner.context.read_cell(member_cell(lowest(inner)?.index, index)).await?;
    let entry = decode(&cell)?;
    Ok((cell, entry))
}

fn decode(cell: &Cell) -> Result<member::Member, FsError> {
    let corrupt = |cause: FormatError| FsError::Corrupt { structure: format!("member cell {}", cell.address()), cause };
    member::Member::decode(cell.payload()).map_err(corrupt)
}

/// Whether the host that wrote the deciding cell lives no more in its slot.
async fn writer_is_gone(inner: &Inner, index: LunIndex) -> Result<bool, FsError> {
    let (cell, _) = deciding_cell(inner, index).await?;
    let (writer, on) = (cell.header().writer, lowest(inner)?);
    if writer == SlotRef::NOBODY {
        return Ok(true);
    }
    let (_, heartbeat) = slot::read_slot(&inner.context.io, &on.lun, on.index, writer.slot).await?;
    if heartbeat.is_live(writer.generation) {
        inner.context.suspect(on.index, writer.slot);
        return Ok(false);
    }
    Ok(true)
}

async fn take_back_of_gone(inner: &Inner, entry: &member::Member) -> Result<(), FsError> {
    if inner.info.read_only || !writer_is_gone(inner, entry.index).await? {
        return Ok(());
    }
    let (cell, now) = deciding_cell(inner, entry.index).await?;
    if stage(&now) == Stage::Reserved {
        take_back(inner, &cell).await?;
        tracing::info!(index = %entry.index, "a member that a host began to add and that is gone was taken back");
    }
    Ok(())
}

/// Gives a reserved index back, from the image `reserved`: the next step of whoever reserved it mismatches.
pub(super) async fn take_back(inner: &Inner, reserved: &Cell) -> Result<(), FsError> {
    let free = member::Member::free(decode(reserved)?.index);
    match inner.context.cas(reserved, CellChange::payload(reserved, free.encode())).await? {
        CasOutcome::Applied(_) | CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => Ok(()),
        CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
    }
}

/// Makes all tables and headers that are there say the same. True: they did.
pub(super) async fn settle(inner: &Inner) -> Result<bool, FsError> {
    let tables = Tables::read(inner).await;
    if let Some(error) = tables.error {
        return Err(error);
    }
    let mut agreed = true;
    let mut said = BTreeMap::new();
    let mut generation = 0;
    for (present, _) in &tables.each {
        let (_, header) = read_header(inner, present).await?;
        generation = generation.max(header.volume_generation);
        said.insert(present.index, (header.lun_bytes, header.state, window_of(present)));
    }
    for (index, furthest) in &tables.merged {
        let mut furthest = furthest.clone();
        // A LUN that has grown, or is to be emptied, says so itself first.
        if let Some((bytes, state, window)) = said.get(index) {
            furthest.lun_bytes = furthest.lun_bytes.max(*bytes);
            let leaves = matches!(state, MemberState::Draining | MemberState::Carried);
            if leaves && stage(&furthest) == Stage::Active {
                furthest.state = MemberState::Draining;
            }
            // All of its cells have left: nothing is asked for at the LUN any more.
            if window.is_some() && stage(&furthest) < Stage::Carried {
                furthest = member::Member { state: MemberState::Carried, window: *window, ..furthest };
            }
        }
        if stage(&furthest) == Stage::Joining && inner.context.member(*index).is_ok() {
            // Its header said that it is in use when it was taken up.
            furthest.state = MemberState::Active;
        }
        if stage(&furthest) <= Stage::Reserved {
            continue;
        }
        for (present, table) in &tables.each {
            let known = table.get(index).map_or((Stage::Free, 0), further);
            if known < further(&furthest) {
                agreed = false;
                advance(inner, present.index, &furthest).await?;
            }
        }
    }
    for (present, _) in &tables.each {
        agreed &= raise(inner, present, generation).await?;
    }
    Ok(agreed)
}

/// Brings a member cell to a later stage, unless it is there by now.
async fn advance(inner: &Inner, on: LunIndex, to: &member::Member) -> Result<(), FsError> {
    let at = member_cell(on, to.index);
    for _ in 0..TRIES {
        let cell = inner.context.read_cell(at).await?;
        if further(&decode(&cell)?) >= further(to) {
            return Ok(());
        }
        match inner.context.cas(&cell, CellChange::payload(&cell, to.encode())).await? {
            CasOutcome::Applied(_) => return Ok(()),
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
        }
    }
    Err(contended(format!("member cell {at}")))
}

pub(super) fn contended(what: String) -> FsError {
    FsError::refused(FsErrorKind::Busy, format!("{what}: other hosts changed it {TRIES} times in a row; try again"))
}

pub(super) fn decode_header(inner: &Inner, cell: &Cell) -> Result<LunHeader, FsError> {
    let corrupt = |cause| FsError::Corrupt { structure: format!("header cell {}", cell.address()), cause };
    LunHeader::decode(inner.info.cell_size, cell.payload()).map_err(corrupt)
}

pub(super) async fn read_header(inner: &Inner, present: &Member) -> Result<(Cell, LunHeader), FsError> {
    let cell = inner.context.read_cell(header_cell(present.index)).await?;
    let header = decode_header(inner, &cell)?;
    Ok((cell, header))
}

/// Members that count in a header.
fn count(table: &[member::Member]) -> u16 {
    table.iter().filter(|entry| !matches!(stage(entry), Stage::Free | Stage::Reserved | Stage::Removed)).count() as u16
}

/// Brings a header and its copy to at least this generation, with the count of its own table, read after the header's image. True: they
/// were.
pub(super) async fn raise(inner: &Inner, present: &Member, generation: u64) -> Result<bool, FsError> {
    for attempt in 0..TRIES {
        let (cell, header) = read_header(inner, present).await?;
        let table = members::member_table(&inner.context.io, &present.lun, present.index).await?;
        let wanted = LunHeader {
            volume_generation: header.volume_generation.max(generation),
            member_count: count(&table),
            ..header.clone()
        };
        if put_header(inner, present, &cell, &header, wanted).await? {
            return Ok(attempt == 0);
        }
    }
    Err(contended(format!("the header of {}", present.lun.name())))
}

/// One attempt to make a header and its copy `wanted`, from the image `cell`, which says `header`. True: they were so already.
async fn put_header(
    inner: &Inner,
    present: &Member,
    cell: &Cell,
    header: &LunHeader,
    wanted: LunHeader,
) -> Result<bool, FsError> {
    let copy = inner.context.read_cell(header_copy_cell(present.index)).await?;
    let payload = wanted.encode();
    let copied = copy.payload().starts_with(&payload);
    if copied && wanted == *header {
        present.note_header(wanted);
        return Ok(true);
    }
    if !copied && !replaced(inner.context.cas(&copy, CellChange::payload(&copy, payload.clone())).await?)? {
        return Ok(false);
    }
    if wanted != *header {
        replaced(inner.context.cas(cell, CellChange::payload(cell, payload)).await?)?;
    }
    Ok(false)
}

/// Changes the header of a member and its copy: `edit` gives what it is to be of what it is, as often as others change it meanwhile.
pub(super) async fn change_header(
    inner: &Inner,
    present: &Member,
    edit: impl Fn(&LunHeader) -> Result<LunHeader, FsError>,
) -> Result<LunHeader, FsError> {
    for _ in 0..TRIES {
        let (cell, header) = read_header(inner, present).await?;
        let wanted = edit(&header)?;
        inner.context.prove_live([present.index]).await?;
        if put_header(inner, present, &cell, &header, wanted.clone()).await? {
            return Ok(wanted);
        }
    }
    Err(contended(format!("the header of {}", present.lun.name())))
}

fn replaced(outcome: CasOutcome) -> Result<bool, FsError> {
    match outcome {
        CasOutcome::Applied(_) => Ok(true),
        CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => Ok(false),
        CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
    }
}

/// Makes a LUN that is joining a member in use: told to all tables, then to all headers, then its own header says active.
pub(super) async fn finish(inner: &Inner, lun: &Rc<dyn Lun>, entry: &member::Member) -> Result<(), FsError> {
    Tables::read(inner).await.check_all_there(inner)?;
    settle(inner).await?;
    let present = inner.context.members();
    let mut generation = 0;
    for member in &present {
        generation = generation.max(read_header(inner, member).await?.1.volume_generation);
    }
    for member in &present {
        raise(inner, member, generation + 1).await?;
    }
    commit(inner, lun, entry, generation + 1).await
}

async fn commit(inner: &Inner, lun: &Rc<dyn Lun>, entry: &member::Member, generation: u64) -> Result<(), FsError> {
    let io = &inner.context.io;
    for _ in 0..TRIES {
        let cell = io.read(lun, header_cell(entry.index)).await?;
        let header = decode_header(inner, &cell)?;
        if header.lun_uuid != entry.lun_uuid || !matches!(header.state, MemberState::Joining | MemberState::Active) {
            let message = format!("{} is {:?} and no longer what was being added", lun.name(), header.state);
            return Err(FsError::refused(FsErrorKind::Stale, message));
        }
        if header.state == MemberState::Active {
            return Ok(());
        }
        // Read after the header's image (R1): the table that decides still has it.
        let (_, decided) = deciding_cell(inner, entry.index).await?;
        if decided.lun_uuid != entry.lun_uuid || !matches!(stage(&decided), Stage::Joining | Stage::Active) {
            let message = format!("{} was taken back while it was being added; add it again", lun.name());
            return Err(FsError::refused(FsErrorKind::Stale, message));
        }
        let member_count = count(&members::member_table(io, lun, entry.index).await?);
        let payload =
            LunHeader { state: MemberState::Active, volume_generation: generation, member_count, ..header }.encode();
        let copy = io.read(lun, header_copy_cell(entry.index)).await?;
        for expect in [copy, cell] {
            // This host has no slot on the LUN yet.
            let new = io.successor(&expect, CellChange::payload(&expect, payload.clone()), SlotRef::NOBODY);
            if !replaced(io.cas(lun, &expect, new).await?)? {
                break;
            }
        }
    }
    Err(contended(format!("the header of {}", lun.name())))
}
