//! Owns: the administrator's requests about the LUNs of a mounted volume.
//! Promises: long work tells how far it is; it goes on when its client has left.
//! Must not know: how a LUN becomes a member.

use std::sync::Arc;

use lockd::server::Refusal;
use serde_json::{Value, json};
use vmfs_core::disk::Progress;
use vmfs_core::lun::{OpenLun, open_lun};

use crate::disks::long;
use crate::state::State;

/// `vmfs extent add` of one LUN.
pub fn add(state: &Arc<State>, lun: String, force: bool, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let opened = open_lun(&lun, OpenLun { read_only: false, refuse_busy_device: true })?;
        let bytes = opened.bytes();
        let mut tell = |step: vmfs_core::mkfs::Progress| {
            teller.tell(Progress { done: step.done_bytes, total: step.total_bytes });
        };
        let index = volume.add_extent(opened, force, &mut tell).await?;
        Ok(json!({ "index": index.get(), "name": lun, "bytes": bytes }))
    })
}
