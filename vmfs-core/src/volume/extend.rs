//! Owns: adding a LUN to a mounted volume.
//! Promises: what mkfs refuses is refused; the index is claimed before the LUN is looked at, so that two hosts never format one LUN; an
//! addition that ends anywhere is finished or taken back by another host. Must not know: who asks.

use std::rc::Rc;

use super::membership::{self, Stage, Tables, stage};
use super::{Inner, adopt, members};
use crate::cas::{CasOutcome, CellChange};
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{DeviceIdentity, LockMode, MemberState};
use crate::format::layout::member_cell;
use crate::format::{Cell, member};
use crate::lun::Lun;
use crate::mkfs::{self, NewExtent, Progress};
use crate::units::{LunIndex, MAX_MEMBERS, Uuid};

pub(super) async fn add(
    inner: &Rc<Inner>,
    lun: Rc<dyn Lun>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<LunIndex, FsError> {
    inner.for_writing()?;
    let _one = inner.extending.lock().await;
    let tables = Tables::read(inner).await;
    tables.check_all_there(inner)?;
    let entry = match left_unfinished(inner, &lun, &tables).await? {
        Found::Prepared(entry) => entry,
        found => make(inner, &lun, force || matches!(found, Found::Abandoned), progress).await?,
    };
    membership::finish(inner, &lun, &entry).await?;
    match adopt::adopt(inner, lun).await {
        // This host's own look at the members may have been faster.
        Err(_) if inner.context.member(entry.index).is_ok() => {}
        adopted => drop(adopted?),
    }
    membership::settle(inner).await?;
    Ok(entry.index)
}

/// What a LUN is before it is added.
enum Found {
    /// Formatted for this volume, and its tables wait for it.
    Prepared(member::Member),
    /// Formatted for this volume, but never told to its tables.
    Abandoned,
    Other,
}

async fn left_unfinished(inner: &Inner, lun: &Rc<dyn Lun>, tables: &Tables) -> Result<Found, FsError> {
    let (context, header, is_whole) = match members::probe(lun.clone()).await {
        Ok(probed) => (probed.context, probed.header, true),
        // Formatting ends with the copy, then the header.
        Err(_) => match members::header_copy(lun).await {
            Some((context, header)) => (context, header, false),
            None => return Ok(Found::Other),
        },
    };
    if header.volume_of(context.volume) != inner.info.uuid {
        return Ok(Found::Other);
    }
    let listed = tables.merged.get(&header.lun_index).filter(|entry| entry.lun_uuid == header.lun_uuid);
    match listed.map(|entry| (entry, stage(entry))) {
        Some((entry, Stage::Joining)) if is_whole => Ok(Found::Prepared(entry.clone())),
        Some((_, Stage::Active | Stage::Draining)) => {
            let message = format!("{} is {} of this volume already", lun.name(), header.lun_index);
            Err(FsError::refused(FsErrorKind::Exists, message))
        }
        None | Some((_, Stage::Reserved)) if header.state == MemberState::Joining => Ok(Found::Abandoned),
        _ => Ok(Found::Other),
    }
}

/// Claims an index and formats the LUN for it; then the table that decides says that it is joining.
async fn make(
    inner: &Inner,
    lun: &Rc<dyn Lun>,
    force: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<member::Member, FsError> {
    let like = inner.context.members()[0].header.borrow().clone();
    let (env, cell_size) = (inner.context.env(), inner.info.cell_size);
    mkfs::check_extent(env, lun, &like, cell_size, force).await?;
    let (reserved, entry) = reserve(inner, lun).await?;
    let made = async {
        check_alone(inner, &entry).await?;
        // The claim first, the look second: whoever claimed it before has formatted it by now or is seen above.
        mkfs::check_extent(env, lun, &like, cell_size, force).await?;
        let joining = member::Member { lun_bytes: lun.bytes(), ..entry.clone() };
        let mut listed: Vec<_> = Tables::read(inner).await.merged.into_values().collect();
        listed.retain(|other| other.index != entry.index && stage(other) != Stage::Reserved);
        listed.push(joining.clone());
        let new = NewExtent {
            volume: inner.context.io.context().volume,
            cell_size,
            like: &like,
            index: entry.index,
            lun_uuid: entry.lun_uuid,
            members: &listed,
        };
        mkfs::format_extent(env, lun, &new, progress).await?;
        match inner.context.cas(&reserved, CellChange::payload(&reserved, joining.encode())).await? {
            CasOutcome::Applied(_) => Ok(joining),
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {
                let message = format!("{}: its index was taken back while it was formatted; add it again", lun.name());
                Err(FsError::refused(FsErrorKind::Stale, message))
            }
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => Err(error.into()),
        }
    };
    let made = made.await;
    if made.is_err()
        && let Err(error) = membership::take_back(inner, &reserved).await
    {
        tracing::warn!(%error, index = %entry.index, "an index that is not used stays reserved until this host leaves");
    }
    made
}

/// What is recorded to find the LUN again: what the device says of itself, of an image file its path.
fn identity_of(lun: &Rc<dyn Lun>) -> DeviceIdentity {
    let name = lun.name().as_bytes();
    if lun.lock_mode() == LockMode::SingleMachine && name.len() <= DeviceIdentity::MAX {
        DeviceIdentity::new(name)
    } else {
        lun.identity()
    }
}

/// Takes the lowest index that was never used.
async fn reserve(inner: &Inner, lun: &Rc<dyn Lun>) -> Result<(Cell, member::Member), FsError> {
    let mut uuid = [0; 16];
    inner.context.env().random(&mut uuid);
    // RFC 9562, section 5.4: version 4, variant 10.
    uuid[6] = (uuid[6] & 0x0f) | 0x40;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    let used = Tables::read(inner).await;
    let lowest = inner.context.members()[0].index;
    for index in (1..=MAX_MEMBERS as u8).filter_map(LunIndex::new) {
        if used.merged.contains_key(&index) {
            continue;
        }
        let entry = member::Member {
            lun_uuid: Uuid(uuid),
            lun_bytes: 0,
            index,
            state: MemberState::Joining,
            identity: identity_of(lun),
            window: None,
        };
        let cell = inner.context.read_cell(member_cell(lowest, index)).await?;
        let is_free = member::Member::decode(cell.payload()).is_ok_and(|found| stage(&found) == Stage::Free);
        if !is_free {
            continue;
        }
        inner.context.prove_live([lowest]).await?;
        match inner.context.cas(&cell, CellChange::payload(&cell, entry.encode())).await? {
            CasOutcome::Applied(cell) => return Ok((cell, entry)),
            CasOutcome::Lost(_) | CasOutcome::Overtaken(_) => {}
            CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => return Err(error.into()),
        }
    }
    let message = format!("the volume has had {MAX_MEMBERS} members, and an index is never used again");
    Err(FsError::refused(FsErrorKind::NoSpace, message))
}

/// Nobody else adds the same LUN: of two that do, each sees the other or was there first.
async fn check_alone(inner: &Inner, own: &member::Member) -> Result<(), FsError> {
    let tables = Tables::read(inner).await;
    let same = |other: &&member::Member| {
        other.index != own.index
            && matches!(stage(other), Stage::Reserved | Stage::Joining)
            && !own.identity.bytes().is_empty()
            && other.identity == own.identity
    };
    match tables.merged.values().find(same) {
        None => Ok(()),
        Some(other) => {
            let name = String::from_utf8_lossy(own.identity.bytes());
            let message = format!("{name} is being added as {} already; see vmfs extent list", other.index);
            Err(FsError::refused(FsErrorKind::Busy, message))
        }
    }
}
