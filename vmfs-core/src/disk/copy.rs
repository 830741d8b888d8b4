//! Owns: copying a disk into a new one of any kind.
//! Promises: the copy has the source's bytes as they were while it was open; holes stay holes where the new kind allows it.
//! Must not know: who uses the source (its lock says).

use super::create::{begin, finish};
use super::{DiskSpec, Progress, info};
use crate::error::FsError;
use crate::file::{OpenFile, OpenMode};
use crate::format::body::DiskFormat;
use crate::format::dirent::ObjectRef;
use crate::volume::Volume;

/// Bytes copied at a time.
const CHUNK: u64 = 4 << 20;

/// Copies the disk `name` to a new disk `new_name` of the kind that `spec` says; `spec.size` is ignored, the copy has the source's.
///
/// # Errors
/// As [`super::create`] and [`super::info`]; `Busy` while the source is open for writing anywhere.
pub async fn clone(
    volume: &Volume,
    (directory, name): (ObjectRef, &[u8]),
    (new_directory, new_name): (ObjectRef, &[u8]),
    spec: DiskSpec,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let source = info(volume, directory, name).await?;
    let spec = DiskSpec { size: source.size.next_multiple_of(super::descriptor::SECTOR_BYTES), ..spec };
    let from = volume.open(source.flat.object, OpenMode::READ).await?;
    let copied = match begin(volume, new_directory, new_name, spec).await {
        Ok((flat, to)) => {
            let copied = copy(volume, &from, &to, spec, progress).await;
            finish(volume, new_directory, new_name, &flat, spec, to, copied).await
        }
        Err(error) => Err(error),
    };
    copied.and(volume.close(from).await)
}

async fn copy(
    volume: &Volume,
    from: &OpenFile,
    to: &OpenFile,
    spec: DiskSpec,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    let files = volume.files();
    if spec.format != DiskFormat::Thin {
        files.allocate_with_progress(to, 0..spec.size, &mut |_| {}).await?;
    }
    let mut at = 0;
    while let Some(data) = files.seek_data(from, at).await? {
        let end = files.seek_hole(from, data).await?.unwrap_or(spec.size);
        at = data;
        while at < end {
            let bytes = files.read(from, at, (end - at).min(CHUNK) as usize).await?;
            if bytes.is_empty() {
                return Ok(());
            }
            if bytes.iter().any(|byte| *byte != 0) {
                let mut done = 0;
                while done < bytes.len() {
                    done += files.write(to, at + done as u64, &bytes[done..]).await?;
                }
            }
            at += bytes.len() as u64;
            progress(Progress { done: at, total: spec.size });
        }
    }
    if spec.format == DiskFormat::EagerZeroedThick {
        files.zero_fill(to, 0..spec.size, &mut |done| progress(Progress { done, total: spec.size })).await?;
    }
    files.flush(to).await
}
