//! Owns: formatting a LUN as a further member of a volume that exists.
//! Promises: what mkfs refuses is refused; the header, in state joining, is the last write: before it the LUN is nobody's.
//! Must not know: how the volume learns of the member, that it is mounted.

use std::rc::Rc;

use super::execute::execute_member;
use super::{MkfsOptions, MkfsPlan, PlannedLun, Progress, inspect, invalid, layout_of};
use crate::env::Env;
use crate::error::FsError;
use crate::format::header::{LunHeader, MemberState};
use crate::format::member::Member;
use crate::lun::Lun;
use crate::units::{CellSize, LunIndex, SlotRef, Uuid};

/// What a LUN becomes.
pub struct NewExtent<'a> {
    /// UUID in the volume's cells.
    pub volume: Uuid,
    /// Cell size of the volume.
    pub cell_size: CellSize,
    /// The header of a member: volume UUID, lease, lock mode, label and root directory are the volume's.
    pub like: &'a LunHeader,
    /// Index that is reserved for it.
    pub index: LunIndex,
    /// Its identity.
    pub lun_uuid: Uuid,
    /// What its member cells say.
    pub members: &'a [Member],
}

/// Refuses a LUN that cannot be a member of this volume, or that holds something (not when `force`). Reads only; takes some seconds when
/// the LUN holds a volume that looks in use. Gives what will be lost.
pub async fn check_extent(
    env: &Rc<dyn Env>,
    lun: &Rc<dyn Lun>,
    like: &LunHeader,
    cell_size: CellSize,
    force: bool,
) -> Result<Option<String>, FsError> {
    let name = lun.name();
    if lun.lock_mode() != like.lock_mode {
        return Err(invalid(format!(
            "{name} can not be shared in the same way as the LUNs of the volume; take a LUN of the same kind"
        )));
    }
    let fits = match lun.cell_size() {
        Some(size) => size == cell_size,
        None => lun.alignment() <= cell_size.bytes(),
    };
    if !fits {
        return Err(invalid(format!(
            "{name} has other blocks than the volume's cells of {} bytes; take a LUN with the same block size",
            cell_size.bytes()
        )));
    }
    let any = LunIndex::new(2).expect("2 is a LUN index");
    layout_of(lun, any, cell_size, like.block_size)?;
    inspect(env, lun, force).await
}

/// Formats the LUN; its header says joining.
pub async fn format_extent(
    env: &Rc<dyn Env>,
    lun: &Rc<dyn Lun>,
    new: &NewExtent<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let like = new.like;
    let layout = layout_of(lun, new.index, new.cell_size, like.block_size)?;
    let header = LunHeader {
        lun_uuid: new.lun_uuid,
        lun_index: new.index,
        state: MemberState::Joining,
        lun_bytes: lun.bytes(),
        created_s: u64::try_from(env.wall_ns() / 1_000_000_000).unwrap_or(0),
        identity: lun.identity(),
        segments: layout.segments.clone(),
        growing: SlotRef::NOBODY,
        window: None,
        ..like.clone()
    };
    let planned = PlannedLun {
        name: lun.name().to_owned(),
        bytes: lun.bytes(),
        lun_uuid: new.lun_uuid,
        identity: lun.identity(),
        layout,
        overwrites: None,
    };
    let options = MkfsOptions { block_size: like.block_size, lease: like.lease, ..MkfsOptions::default() };
    let plan = MkfsPlan {
        volume: new.volume,
        options,
        cell_size: new.cell_size,
        lock_mode: like.lock_mode,
        luns: vec![planned],
    };
    execute_member(env, lun, &plan, new.members, &header, progress).await
}
