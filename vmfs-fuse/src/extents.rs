//! Owns: the administrator's requests about the LUNs of a mounted volume.
//! Promises: long work tells how far it is; it goes on when its client has left.
//! Must not know: how a LUN becomes a member.

use std::path::Path;
use std::sync::Arc;

use lockd::server::Refusal;
use serde_json::{Value, json};
use vmfs_core::disk::Progress;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::lun::OpenLun;
use vmfs_core::units::FdId;
use vmfs_core::volume::{LunInfo, Stayed, Volume};

use crate::control::refusal;
use crate::disks::long;
use crate::finder::identity;
use crate::state::State;

/// `vmfs extent add` of one LUN.
pub fn add(state: &Arc<State>, lun: String, force: bool, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let opened = luns::open_lun_aside(&lun, OpenLun { read_only: false, refuse_busy_device: true }).await?;
        let bytes = opened.bytes();
        let mut tell = |step: vmfs_core::mkfs::Progress| {
            teller.tell(Progress { done: step.done_bytes, total: step.total_bytes });
        };
        let index = volume.add_extent(opened, force, &mut tell).await?;
        Ok(json!({ "index": index.get(), "name": lun, "bytes": bytes }))
    })
}

/// `vmfs extent grow`.
pub fn grow(state: &Arc<State>, lun: String, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let member = member(&volume, &lun)?;
        let mut tell = |step: vmfs_core::mkfs::Progress| {
            teller.tell(Progress { done: step.done_bytes, total: step.total_bytes });
        };
        let grown = volume.grow_extent(member.index, &mut tell).await?;
        Ok(json!({
            "index": member.index.get(),
            "name": member.name,
            "from_bytes": grown.from_bytes,
            "to_bytes": grown.to_bytes,
            "blocks": grown.blocks,
        }))
    })
}

/// `vmfs extent drain`.
pub fn drain(state: &Arc<State>, lun: String, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let member = member(&volume, &lun)?;
        let mut tell = |step: vmfs_core::mkfs::Progress| {
            teller.tell(Progress { done: step.done_bytes, total: step.total_bytes });
        };
        let report = volume.drain_extent(member.index, &mut tell).await?;
        let stayed = |one: &Stayed| json!({ "object": one.object.to_string(), "name": one.name, "reason": one.reason });
        let root = |(fd, name): &(FdId, String)| json!({ "object": fd.to_string(), "name": name });
        Ok(json!({
            "index": member.index.get(),
            "name": member.name,
            "moved_bytes": report.moved_bytes,
            "left_bytes": report.left_bytes,
            "left_units": report.left_units,
            "unsettled": report.unsettled,
            "empty": report.is_moved(),
            "stayed": report.stayed.iter().map(stayed).collect::<Vec<_>>(),
            "descriptor_count": report.root_count,
            "descriptors": report.roots.iter().map(root).collect::<Vec<_>>(),
        }))
    })
}

/// `vmfs extent remove`.
pub fn remove(state: &Arc<State>, lun: String, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let member = member(&volume, &lun)?;
        let mut tell = |step: vmfs_core::mkfs::Progress| {
            teller.tell(Progress { done: step.done_bytes, total: step.total_bytes });
        };
        let report = volume.remove_extent(member.index, &mut tell).await?;
        Ok(json!({
            "index": report.lun.get(),
            "name": report.name,
            "carrier": report.window.lun.get(),
            "window_offset": report.window.offset,
            "window_bytes": report.window_bytes,
        }))
    })
}

/// `vmfs extent drain --cancel`.
pub fn cancel_drain(state: &Arc<State>, lun: String) -> Result<Value, Refusal> {
    let asked = state.actor.ask(move |volume| async move {
        let member = member(&volume, &lun)?;
        volume.cancel_drain(member.index).await?;
        Ok(json!({ "index": member.index.get(), "name": member.name, "state": "Active" }))
    });
    asked.map_err(|error| refusal(&error))
}

/// The member that is meant by a path that leads to it, or by `lunN`.
fn member(volume: &Volume, said: &str) -> Result<LunInfo, FsError> {
    let wanted = Path::new(said).metadata().ok().map(|found| identity(&found));
    let is_meant = |lun: &LunInfo| {
        let found = Path::new(&lun.name).metadata().ok().map(|found| identity(&found));
        lun.index.to_string() == said || lun.name == said || (wanted.is_some() && found == wanted)
    };
    volume.luns().into_iter().find(is_meant).ok_or_else(|| {
        let message = format!("{said} is no LUN of this volume; vmfs extent list shows them");
        FsError::refused(FsErrorKind::NotFound, message)
    })
}
