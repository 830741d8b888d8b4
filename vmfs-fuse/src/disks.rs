//! Owns: the administrator's requests about virtual disks on a mounted volume.
//! Promises: long work tells how far it is; it goes on when its client has left.
//! Must not know: how a disk is made.

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use lockd::protocol::DiskKind;
use lockd::server::Refusal;
use serde_json::{Value, json};
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::disk::{self, DiskInfo, DiskSpec, Progress};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::volume::Volume;

use crate::control::refusal;
use crate::state::State;

/// Permission bits of a new disk's two files.
pub const MODE: u32 = 0o600;

/// A name in a directory.
pub type Place = (ObjectRef, Vec<u8>);

enum Step {
    Progress(Progress),
    Done(Result<Value, FsError>),
}

/// Runs a job on the actor and hands its progress on.
pub fn long<F>(
    state: &Arc<State>,
    progress: &mut dyn FnMut(u64, u64),
    job: impl FnOnce(Volume, Teller) -> F + Send + 'static,
) -> Result<Value, Refusal>
where
    F: Future<Output = Result<Value, FsError>> + 'static,
{
    let (sender, steps) = channel();
    state.actor.send(move |volume| async move {
        let done = job(volume, Teller(sender.clone())).await;
        // The client's thread may have ended with the mount.
        let _ = sender.send(Step::Done(done));
    });
    loop {
        match steps.recv() {
            Ok(Step::Progress(step)) => progress(step.done, step.total),
            Ok(Step::Done(done)) => return done.map_err(|error| refusal(&error)),
            Err(_) => return Err(refusal(&FsError::refused(FsErrorKind::Io, "the volume is being unmounted"))),
        }
    }
}

/// Tells a client's thread how far a job is.
pub struct Teller(Sender<Step>);

impl Teller {
    /// Tells one step.
    pub fn tell(&self, progress: Progress) {
        // The client's thread may have ended with the mount.
        let _ = self.0.send(Step::Progress(progress));
    }
}

fn format_of(kind: DiskKind) -> DiskFormat {
    match kind {
        DiskKind::Thin => DiskFormat::Thin,
        DiskKind::ZeroedThick => DiskFormat::ZeroedThick,
        DiskKind::EagerZeroedThick => DiskFormat::EagerZeroedThick,
    }
}

fn format_name(format: Option<DiskFormat>) -> &'static str {
    match format {
        Some(DiskFormat::Thin) => "thin",
        Some(DiskFormat::ZeroedThick) => "zeroedthick",
        Some(DiskFormat::EagerZeroedThick) => "eagerzeroedthick",
        None => "ordinary file",
    }
}

/// A disk that belongs to whom its directory belongs.
async fn spec(volume: &Volume, directory: ObjectRef, size: u64, format: DiskFormat) -> Result<DiskSpec, FsError> {
    let owner = volume.stat(directory).await?.attributes;
    let (uid, gid) = (owner.uid, owner.gid);
    Ok(DiskSpec { size, format, adapter: AdapterType::LsiLogic, multi_writer: false, mode: MODE, uid, gid })
}

fn report(info: &DiskInfo) -> Value {
    json!({
        "format": match info.flat.object_type {
            ObjectType::Rdm => "raw device mapping",
            _ => format_name(info.format),
        },
        "size_bytes": info.size,
        "allocated_bytes": info.allocated,
        "data_file": info.flat_name,
        "object": info.flat.object.fd.to_string(),
        "create_type": info.descriptor.create_type,
        "content_id": format!("{:08x}", info.descriptor.cid),
        "multi_writer": info.multi_writer,
    })
}

/// `vmfs disk create`.
pub fn create(
    state: &Arc<State>,
    (directory, name): Place,
    bytes: u64,
    kind: DiskKind,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let spec = spec(&volume, directory, bytes, format_of(kind)).await?;
        disk::create(&volume, directory, &name, spec, &mut |step| teller.tell(step)).await?;
        Ok(report(&disk::info(&volume, directory, &name).await?))
    })
}

/// `vmfs disk info`.
pub fn info(state: &Arc<State>, (directory, name): Place) -> Result<Value, Refusal> {
    let asked = state.actor.ask(move |volume| async move { disk::info(&volume, directory, &name).await });
    asked.map(|info| report(&info)).map_err(|error| refusal(&error))
}

/// `vmfs disk extend`.
pub fn extend(
    state: &Arc<State>,
    (directory, name): Place,
    bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        disk::extend(&volume, directory, &name, bytes, &mut |step| teller.tell(step)).await?;
        Ok(report(&disk::info(&volume, directory, &name).await?))
    })
}

/// `vmfs disk inflate`.
pub fn inflate(
    state: &Arc<State>,
    (directory, name): Place,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        disk::inflate(&volume, directory, &name, &mut |step| teller.tell(step)).await?;
        Ok(report(&disk::info(&volume, directory, &name).await?))
    })
}

/// `vmfs disk clone`.
pub fn clone(
    state: &Arc<State>,
    (directory, name): Place,
    (new_directory, new_name): Place,
    kind: Option<DiskKind>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Value, Refusal> {
    long(state, progress, move |volume, teller| async move {
        let source = disk::info(&volume, directory, &name).await?;
        let format = kind.map(format_of).or(source.format).unwrap_or(DiskFormat::Thin);
        let spec = spec(&volume, new_directory, source.size, format).await?;
        let (from, to) = ((directory, name.as_slice()), (new_directory, new_name.as_slice()));
        disk::clone(&volume, from, to, spec, &mut |step| teller.tell(step)).await?;
        Ok(report(&disk::info(&volume, new_directory, &new_name).await?))
    })
}
