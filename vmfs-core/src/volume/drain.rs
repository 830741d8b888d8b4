//! Owns: emptying a member LUN while the volume is in use.
//! Promises: from its beginning on no host puts anything new there; what is moved is moved under its owner's lock; what has to stay is
//! said with its reason; it can be repeated until nothing is left. Must not know: how a file or a directory is moved.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use super::membership::{self, Tables};
use super::types::{DrainReport, Stayed};
use super::{Inner, background};
use crate::alloc::owners::Occupied;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{LunHeader, MemberState};
use crate::format::layout::table_units;
use crate::format::root_cell::ObjectType;
use crate::mkfs::Progress;
use crate::units::{FdId, LunIndex};

/// Times that the LUN is looked through again because something was moved.
const PASSES: u32 = 16;
/// Objects named in a report.
const MOST_NAMED: usize = 1000;
/// Blocks of each LUN that ordinary work leaves alone.
const RESERVE: u64 = 2;

pub(super) async fn drain(
    inner: &Rc<Inner>,
    lun: LunIndex,
    progress: &mut dyn FnMut(Progress),
) -> Result<DrainReport, FsError> {
    inner.for_writing()?;
    let _one = inner.draining.lock().await;
    Tables::read(inner).await.check_all_there(inner)?;
    let space = inner.objects.space();
    let found = space.occupied(lun).await?;
    check_room(inner, lun, &found).await?;
    if mark(inner, lun).await? {
        // Other hosts stop putting things there when they have read the header.
        let heard = 2 * Duration::from_millis(inner.info.lease.renew_ms.into());
        if !background::sleep(inner, heard).await {
            return Err(unmounting());
        }
    }
    let total = found.block_count() << inner.info.block_size.shift();
    let mut report = DrainReport::of(lun);
    for _ in 0..PASSES {
        go_on(inner, lun)?;
        space.units.top_up(&space.blocks).await?;
        let found = space.occupied(lun).await?;
        let before = report.moved_bytes;
        report.stayed = one_pass(inner, lun, &found, total, &mut report.moved_bytes, progress).await?;
        inner.objects.tidy().await?;
        let now = space.occupied(lun).await?;
        note_rest(inner, &now, &mut report).await;
        let is_less = now.unit_count() < found.unit_count() || now.block_count() < found.block_count();
        if report.is_moved() || (report.moved_bytes == before && !is_less) {
            break;
        }
    }
    Ok(report)
}

impl Inner {
    /// Long work goes on unless the volume is about to be unmounted.
    pub(super) fn go_on(&self) -> Result<(), FsError> {
        self.for_writing()?;
        if self.stopping.get() { Err(unmounting()) } else { Ok(()) }
    }
}

/// As [`Inner::go_on`], as long as the LUN is to be emptied: any host may have said that it is not.
fn go_on(inner: &Inner, lun: LunIndex) -> Result<(), FsError> {
    inner.go_on()?;
    if inner.context.is_draining(lun) { Ok(()) } else { Err(given_up(lun)) }
}

fn given_up(lun: LunIndex) -> FsError {
    let message =
        format!("emptying {lun} was given up by vmfs extent drain --cancel; what was moved stays where it is");
    FsError::refused(FsErrorKind::Io, message)
}

/// Gives the emptying of a LUN up: what was moved stays moved, and all hosts put things there again. Only the LUN's header says so: in the
/// member tables draining means no more than in use. A drain that goes on, on whatever host, ends with its next window.
pub(super) async fn cancel(inner: &Rc<Inner>, lun: LunIndex) -> Result<(), FsError> {
    inner.for_writing()?;
    let member = inner.context.member(lun)?;
    let name = member.lun.name().to_owned();
    let (_, before) = membership::read_header(inner, &member).await?;
    if before.state != MemberState::Draining {
        return Err(FsError::refused(
            FsErrorKind::Invalid,
            format!("{name} is {:?}: it is not being drained", before.state),
        ));
    }
    let edit = |header: &LunHeader| match header.state {
        MemberState::Active | MemberState::Draining => Ok(LunHeader { state: MemberState::Active, ..header.clone() }),
        state => Err(FsError::refused(FsErrorKind::Invalid, format!("{name} is {state:?}: it is not being drained"))),
    };
    membership::change_header(inner, &member, edit).await.map(|_| ())
}

fn unmounting() -> FsError {
    FsError::refused(FsErrorKind::Io, "the volume is being unmounted")
}

/// Refuses a LUN that cannot be emptied: it is the only one, or the others have no room.
async fn check_room(inner: &Inner, lun: LunIndex, found: &Occupied) -> Result<(), FsError> {
    let blocks = &inner.objects.space().blocks;
    let name = inner.context.member(lun)?.lun.name().to_owned();
    let others: Vec<LunIndex> = inner.context.members().iter().map(|member| member.index).collect();
    let others: Vec<LunIndex> =
        others.into_iter().filter(|other| *other != lun && !inner.context.is_draining(*other)).collect();
    if others.is_empty() {
        let message = format!("{name} is the only LUN in use: add another one first, with vmfs extent add");
        return Err(FsError::refused(FsErrorKind::Invalid, message));
    }
    let mut room = 0;
    for other in &others {
        let mut from = Some(0);
        while let Some(at) = from {
            from = blocks.scan(*other, at, 1 << 12).await?;
        }
        room += blocks.count(*other).free.saturating_sub(RESERVE);
    }
    let per_container = inner.info.block_size.units() - table_units(inner.info.cell_size, inner.info.block_size);
    let unit_blocks = found.unit_count().div_ceil(per_container);
    let needed = found.block_count() + unit_blocks;
    if needed > room {
        let mib = |blocks: u64| (blocks << inner.info.block_size.shift()) >> 20;
        let message = format!(
            "{name} holds {} MiB and the other LUNs have room for {} MiB: remove files or add an extent first",
            mib(needed),
            mib(room)
        );
        return Err(FsError::refused(FsErrorKind::NoSpace, message));
    }
    Ok(())
}

/// Marks the LUN as draining in its header, then in all member tables. False: it was marked before.
async fn mark(inner: &Inner, lun: LunIndex) -> Result<bool, FsError> {
    let member = inner.context.member(lun)?;
    let name = member.lun.name().to_owned();
    let (_, before) = membership::read_header(inner, &member).await?;
    let edit = |header: &LunHeader| match header.state {
        MemberState::Active | MemberState::Draining => Ok(LunHeader { state: MemberState::Draining, ..header.clone() }),
        // What a host put there before it had read that it is being taken out.
        MemberState::Carried if header.window.is_none() => Ok(header.clone()),
        state => {
            Err(FsError::refused(FsErrorKind::Invalid, format!("{name} is {state:?}: only a LUN in use is drained")))
        }
    };
    membership::change_header(inner, &member, edit).await?;
    membership::settle(inner).await?;
    Ok(before.state == MemberState::Active)
}

async fn one_pass(
    inner: &Rc<Inner>,
    lun: LunIndex,
    found: &Occupied,
    total: u64,
    moved: &mut u64,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Stayed>, FsError> {
    let owners: BTreeSet<FdId> = found.blocks.keys().chain(found.units.keys()).copied().collect();
    let mut stayed = Vec::new();
    for fd in owners {
        go_on(inner, lun)?;
        let mut tell = |bytes: u64| {
            *moved += bytes;
            progress(Progress { done_bytes: (*moved).min(total), total_bytes: total });
            go_on(inner, lun)
        };
        match move_object(inner, fd, lun, found, &mut tell).await {
            Ok(()) => {}
            // It has gone meanwhile.
            Err(FsError::Stale { .. }) => {}
            Err(error) if inner.context.fenced().is_some() => return Err(error),
            Err(_) if inner.stopping.get() => return Err(unmounting()),
            Err(_) if !inner.context.is_draining(lun) => return Err(given_up(lun)),
            Err(error) => {
                tracing::info!(%fd, %lun, %error, "what it has on the LUN stays there");
                let name = name_of(inner, fd).await;
                stayed.push(Stayed { object: fd, name, reason: error.to_string(), kind: error.kind() });
            }
        }
    }
    stayed.truncate(MOST_NAMED);
    Ok(stayed)
}

async fn name_of(inner: &Inner, fd: FdId) -> String {
    match inner.objects.load_any(fd).await {
        Ok(object) => String::from_utf8_lossy(&object.image().body.attributes.name).into_owned(),
        Err(_) => String::new(),
    }
}

async fn move_object(
    inner: &Rc<Inner>,
    fd: FdId,
    lun: LunIndex,
    found: &Occupied,
    tell: &mut dyn FnMut(u64) -> Result<(), FsError>,
) -> Result<(), FsError> {
    let object = inner.objects.load_any(fd).await?;
    let units = found.units.get(&fd).map_or(&[][..], Vec::as_slice);
    match object.image().root.object_type {
        Some(ObjectType::File | ObjectType::Disk) => inner.files.relocate(&object, lun, tell).await,
        _ => inner.names.relocate(&object, lun, units).await,
    }
}

/// What is left, for the report.
async fn note_rest(inner: &Inner, now: &Occupied, report: &mut DrainReport) {
    report.left_bytes = now.block_count() << inner.info.block_size.shift();
    report.left_units = now.unit_count();
    report.unsettled = now.unsettled;
    report.root_count = now.roots.len() as u64;
    report.roots = Vec::new();
    for fd in now.roots.iter().take(MOST_NAMED) {
        report.roots.push((*fd, name_of(inner, *fd).await));
    }
}
