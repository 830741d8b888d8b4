//! Owns: the administrator's requests about raw device mappings on a mounted volume.
//! Promises: the JSON below stays as it is.
//! Must not know: how a device is found.

use std::sync::Arc;

use lockd::server::Refusal;
use serde_json::{Value, json};
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::rdm::{self, RdmInfo, RdmSpec};

use crate::control::refusal;
use crate::disks::{MODE, Place};
use crate::state::State;

fn report(info: &RdmInfo) -> Value {
    let (device, problem) = match &info.found {
        Ok(name) => (Some(name), None),
        Err(error) => (None, Some(error.to_string())),
    };
    json!({
        "compatibility": if info.device.physical { "physical" } else { "virtual" },
        "size_bytes": info.size,
        "identity": info.device.identity.bytes().escape_ascii().to_string(),
        "device": device,
        "problem": problem,
        "data_file": info.mapping_name,
        "object": info.mapping.object.fd.to_string(),
    })
}

/// `vmfs rdm create`: a mapping that belongs to whom its directory belongs.
pub fn create(state: &Arc<State>, (directory, name): Place, device: String, physical: bool) -> Result<Value, Refusal> {
    let asked = state.actor.ask(move |volume| async move {
        let owner = volume.stat(directory).await?.attributes;
        let spec = RdmSpec { physical, adapter: AdapterType::LsiLogic, mode: MODE, uid: owner.uid, gid: owner.gid };
        rdm::create(&volume, directory, &name, &device, spec).await?;
        rdm::info(&volume, directory, &name).await
    });
    asked.map(|info| report(&info)).map_err(|error| refusal(&error))
}

/// `vmfs rdm info`.
pub fn info(state: &Arc<State>, (directory, name): Place) -> Result<Value, Refusal> {
    let asked = state.actor.ask(move |volume| async move { rdm::info(&volume, directory, &name).await });
    asked.map(|info| report(&info)).map_err(|error| refusal(&error))
}
