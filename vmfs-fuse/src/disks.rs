//! Owns: what the mount does with virtual disks for the `vmfs` command: create, info, extend, inflate, clone.
//! Promises: the work runs on the metadata actor; its progress reaches whoever asked.
//! Must not know: messages and sockets; what a disk consists of (`vmfs_core::disk`).

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use lockd::protocol::DiskKind;
use lockd::server::Refusal;
use serde_json::{Value, json};
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::disk::{self, DiskSpec, Progress};
use vmfs_core::error::FsError;
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::volume::Volume;

use crate::control::{invalid, refusal};
use crate::state::State;

/// A name in a directory.
type Place = (ObjectRef, Vec<u8>);

/// Told {bytes done, bytes in all}.
type Report<'a> = &'a mut dyn FnMut(u64, u64);

enum Told {
    Progress(Progress),
    Done(Result<(), FsError>),
}

fn format_of(kind: DiskKind) -> DiskFormat {
    match kind {
        DiskKind::Thin => DiskFormat::Thin,
        DiskKind::ZeroedThick => DiskFormat::ZeroedThick,
        DiskKind::EagerZeroedThick => DiskFormat::EagerZeroedThick,
    }
}

fn kind_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Thin => "thin",
        DiskFormat::ZeroedThick => "zeroedthick",
        DiskFormat::EagerZeroedThick => "eagerzeroedthick",
    }
}

/// Only root reaches the socket: disks belong to root and are private, as ESX makes them.
fn spec(size: u64, format: DiskFormat) -> DiskSpec {
    DiskSpec { size, format, adapter: AdapterType::default(), multi_writer: false, mode: 0o600, uid: 0, gid: 0 }
}

/// Runs a job on the actor and passes its progress on until it has ended.
fn long<F>(
    state: &State,
    report: Report<'_>,
    job: impl FnOnce(Volume, Sender<Told>) -> F + Send + 'static,
) -> Result<Value, Refusal>
where
    F: Future<Output = Result<(), FsError>> + 'static,
{
    let (sender, told) = channel();
    state.actor.send(move |volume| async move {
        let result = job(volume, sender.clone()).await;
        // Who asked may have gone; the work is done all the same.
        let _ = sender.send(Told::Done(result));
    });
    for message in told {
        match message {
            Told::Progress(Progress { done, total }) => report(done, total),
            Told::Done(result) => return result.map(|()| json!({})).map_err(|error| refusal(&error)),
        }
    }
    Err(Refusal { errno: libc::EIO, message: "the volume is being unmounted".to_owned() })
}

fn pass_on(sender: Sender<Told>) -> impl FnMut(Progress) {
    move |progress| {
        // Who asked may have gone.
        let _ = sender.send(Told::Progress(progress));
    }
}

/// Makes a disk and its descriptor.
pub fn create(
    state: &Arc<State>,
    (directory, name): Place,
    bytes: u64,
    kind: DiskKind,
    report: Report<'_>,
) -> Result<Value, Refusal> {
    long(state, report, move |volume, sender| async move {
        disk::create(&volume, directory, &name, spec(bytes, format_of(kind)), &mut pass_on(sender)).await
    })
}

/// What a disk is.
pub fn info(state: &Arc<State>, (directory, name): Place) -> Result<Value, Refusal> {
    let asked = state.actor.ask(move |volume| async move {
        let info = disk::info(&volume, directory, &name).await?;
        let flat = info.flat.object.fd.to_string();
        Ok(json!({
            "size_bytes": info.size,
            "allocated_bytes": info.allocated,
            "format": info.format.map_or("ordinary file", kind_name),
            "multi_writer": info.multi_writer,
            "data_file": info.flat_name,
            "data_object": flat,
            "adapter": info.descriptor.ddb_value("adapterType"),
        }))
    });
    asked.map_err(|error| refusal(&error))
}

/// Lets a disk grow.
pub fn extend(state: &Arc<State>, (directory, name): Place, bytes: u64, report: Report<'_>) -> Result<Value, Refusal> {
    long(state, report, move |volume, sender| async move {
        disk::extend(&volume, directory, &name, bytes, &mut pass_on(sender)).await
    })
}

/// Makes a disk eagerzeroedthick.
pub fn inflate(state: &Arc<State>, (directory, name): Place, report: Report<'_>) -> Result<Value, Refusal> {
    long(state, report, move |volume, sender| async move {
        disk::inflate(&volume, directory, &name, &mut pass_on(sender)).await
    })
}

/// Copies a disk, to the same kind unless another is asked for.
pub fn clone(
    state: &Arc<State>,
    source: Place,
    destination: Place,
    kind: Option<DiskKind>,
    report: Report<'_>,
) -> Result<Value, Refusal> {
    if source == destination {
        return Err(invalid("a disk cannot be copied onto itself"));
    }
    long(state, report, move |volume, sender| async move {
        let (from, to) = ((source.0, source.1.as_slice()), (destination.0, destination.1.as_slice()));
        let found = disk::info(&volume, from.0, from.1).await?;
        let format = kind.map(format_of).or(found.format).unwrap_or(DiskFormat::ZeroedThick);
        disk::clone(&volume, from, to, spec(found.size, format), &mut pass_on(sender)).await
    })
}
