//! Owns: vmfs disk create, info, clone and vmfs why-locked for disks on NFS servers, by `nfs://` URLs.
//! Promises: a disk whose descriptor is there is whole; nothing is left of one that could not be made; the source of a copy is locked meanwhile.
//! Must not know: calls, how locks work.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lockd::protocol::{AdminRequest, DiskKind};
use nfs_backend::datastore::{DatastoreError, Directory, Found};
use nfs_backend::error::NfsError;
use nfs_backend::file::{DataFile, MOST_BYTES};
use nfs_backend::lock::{self, Content, Keeper, KeeperOptions, LockError, Owner, SharedTenure, State, Timing};
use nfs_backend::rpc::Gate;
use nfs_backend::url::Url;
use scsi::DataBuffer;
use serde_json::{Value, json};
use vmfs_core::disk::descriptor::{AdapterType, Descriptor, MAX_DESCRIPTOR_BYTES};
use vmfs_core::format::body::DiskFormat;

use super::{AdminError, mounted};
use crate::terminal::progress_bar;

/// Bytes copied at a time.
pub(super) const CHUNK: usize = MOST_BYTES as usize;
/// How often a lock is looked at while its holder's sign of life is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl From<DatastoreError> for AdminError {
    fn from(error: DatastoreError) -> AdminError {
        AdminError(error.to_string())
    }
}

/// The URL that a path is, if it is one.
pub(super) fn url_of(path: &Path) -> Result<Option<Url>, AdminError> {
    match path.to_str() {
        Some(text) if Url::is_url(text) => {
            text.parse().map(Some).map_err(|error| AdminError(format!("{}: {error}", path.display())))
        }
        _ => Ok(None),
    }
}

/// Runs work that talks to servers.
pub(super) fn run<T>(work: impl Future<Output = T>) -> T {
    crate::terminal::block_on(tokio::task::LocalSet::new().run_until(work))
}

fn flat_name(url: &Url) -> String {
    format!("{}-flat.vmdk", url.name.strip_suffix(".vmdk").unwrap_or(&url.name))
}

/// The kind of a disk on NFS as its descriptor has it.
fn format_of(url: &Url, kind: Option<DiskKind>) -> Result<DiskFormat, AdminError> {
    match kind {
        None | Some(DiskKind::Thin) => Ok(DiskFormat::Thin),
        Some(DiskKind::EagerZeroedThick) => Ok(DiskFormat::EagerZeroedThick),
        Some(DiskKind::ZeroedThick) => Err(AdminError(format!(
            "{url}: NFS cannot reserve space without writing it; make the disk thin or eagerzeroedthick"
        ))),
    }
}

/// A disk that is there.
pub(super) struct Disk {
    pub directory: Directory,
    pub descriptor: Descriptor,
    pub flat_name: String,
    pub flat: Found,
}

pub(super) async fn open(url: &Url) -> Result<Disk, AdminError> {
    let directory = Directory::open(url).await?;
    let text = directory.read_small(&url.name, MAX_DESCRIPTOR_BYTES + 1).await?;
    let descriptor = Descriptor::parse(&text).map_err(|error| {
        AdminError(format!("{url} is no usable descriptor: {error}; give the .vmdk file of a disk"))
    })?;
    let Some((flat, sectors)) = descriptor.flat_extent() else {
        return Err(AdminError(format!(
            "{url} describes a disk that is not one flat file; clone it to a flat disk first"
        )));
    };
    let (flat_name, described) = (flat.to_owned(), sectors.saturating_mul(512));
    let flat = directory.find(&flat_name).await?;
    if described > flat.attributes.size {
        return Err(AdminError(format!(
            "{url}: the descriptor says {described} bytes, {flat_name} has {}; restore the file or correct the descriptor",
            flat.attributes.size
        )));
    }
    Ok(Disk { directory, descriptor, flat_name, flat })
}

/// A disk in the making: its data file is there, its descriptor is not.
struct Making {
    directory: Directory,
    url: Url,
    flat_name: String,
    flat: Found,
    format: DiskFormat,
    size: u64,
}

async fn begin(url: &Url, size: u64, format: DiskFormat) -> Result<Making, AdminError> {
    let directory = Directory::open(url).await?;
    match directory.find(&url.name).await {
        Err(DatastoreError::Absent { .. }) => {}
        Ok(_) => return Err(DatastoreError::Exists { url: url.clone() }.into()),
        Err(error) => return Err(error.into()),
    }
    let flat_name = flat_name(url);
    let made = directory.create(&flat_name, size).await;
    let flat = match made {
        Ok(flat) => flat,
        Err(error @ DatastoreError::Exists { .. }) => return Err(error.into()),
        Err(error) => {
            // The file was made, and its size is refused.
            let _ = directory.remove(&flat_name).await;
            return Err(error.into());
        }
    };
    Ok(Making { directory, url: url.clone(), flat_name, flat, format, size })
}

impl Making {
    /// A lock of it is not needed: nobody uses a disk without a descriptor.
    fn data(&self) -> DataFile {
        self.directory.data(&self.flat.handle, None, Timing::ESX.flight)
    }

    async fn describe(&self) -> Result<(), AdminError> {
        let mut cid = [0; 4];
        getrandom::fill(&mut cid).map_err(|error| AdminError(error.to_string()))?;
        // ffffffff says "no parent", fffffffe "never written": neither is drawn.
        let cid = u32::from_le_bytes(cid) & 0x7fff_ffff;
        let text =
            Descriptor::for_disk(self.size, &self.flat_name, self.format, AdapterType::LsiLogic, cid).to_string();
        let file = self.directory.create(&self.url.name, text.len() as u64).await?;
        let written = self.directory.write_small(&self.url.name, &file.handle, text.as_bytes()).await;
        if written.is_err() {
            let _ = self.directory.remove(&self.url.name).await;
        }
        Ok(written?)
    }

    /// Makes it a disk if its data are there; else nothing is left of it.
    async fn finish(self, filled: Result<(), AdminError>) -> Result<(), AdminError> {
        let finished = match filled {
            Ok(()) => self.describe().await,
            error => error,
        };
        if finished.is_err() {
            let _ = self.directory.remove(&self.flat_name).await;
        }
        finished
    }
}

pub(super) fn call_failed(url: &Url) -> impl Fn(NfsError) -> AdminError {
    let url = url.clone();
    move |cause| DatastoreError::Call { url: url.clone(), cause }.into()
}

/// Makes a disk.
pub(super) fn create(url: &Url, size: u64, kind: Option<DiskKind>) -> Result<(), AdminError> {
    let format = format_of(url, kind)?;
    run(async {
        let making = begin(url, size, format).await?;
        let filled = if format == DiskFormat::EagerZeroedThick { zero(&making).await } else { Ok(()) };
        making.finish(filled).await
    })
}

async fn zero(making: &Making) -> Result<(), AdminError> {
    let failed = call_failed(&making.url);
    let data = making.data();
    let bar = progress_bar("creating", true);
    bar.set_length(making.size);
    let mut at = 0;
    while at < making.size {
        let length = (making.size - at).min(CHUNK as u64);
        data.write(at, length as usize, false, |_, to| to.fill(0)).await.map_err(&failed)?;
        at += length;
        bar.set_position(at);
    }
    data.flush().await.map_err(&failed)?;
    bar.finish_and_clear();
    Ok(())
}

/// What a disk is.
pub(super) fn info(url: &Url) -> Result<Value, AdminError> {
    run(async {
        let disk = open(url).await?;
        let space = disk.directory.server().space(disk.directory.handle()).await.map_err(call_failed(url))?;
        let thin = disk.descriptor.ddb_value("thinProvisioned") == Some("1");
        Ok(json!({
            "create_type": disk.descriptor.create_type,
            "data_file": disk.flat_name,
            "format": if thin { "thin" } else { "eagerzeroedthick" },
            "size_bytes": disk.descriptor.disk_bytes(),
            "allocated_bytes": disk.flat.attributes.used,
            "available_bytes": space.available,
            "lock_file": lock::file_of(&disk.directory, &disk.flat),
        }))
    })
}

/// Who holds a disk's lock, and whether he lives.
pub(super) fn why_locked(url: &Url) -> Result<Value, AdminError> {
    run(async {
        let directory = Directory::open(url).await?;
        let is_descriptor = url.name.ends_with(".vmdk") && !url.name.ends_with("-flat.vmdk");
        let flat = if is_descriptor { open(url).await?.flat } else { directory.find(&url.name).await? };
        let root = lock::file_of(&directory, &flat);
        let failed = |error: LockError| AdminError(format!("{url}: {error}"));
        let seen = async || lock::who(&directory, &flat).await.map_err(failed);
        let timing = Timing::ESX;
        let Some((holder, content)) = seen().await? else {
            return Ok(json!({ "locked": false, "lock_file": root, "explanation": "it is not locked" }));
        };
        // A sign of life comes with each renewal; somewhat more than one is waited for.
        let begun = Instant::now();
        let mut alive = false;
        while !alive && begun.elapsed() < timing.renew + timing.renew / 2 {
            tokio::time::sleep(LOOK_EVERY).await;
            match seen().await? {
                Some(now) => alive = now != (holder.clone(), content.clone()),
                None => {
                    let explanation = format!("it was locked by {holder}, and has been given back just now");
                    return Ok(json!({ "locked": false, "lock_file": root, "explanation": explanation }));
                }
            }
        }
        let stale = lock::silence(&directory, &flat).await.map_err(failed)?.as_secs();
        let explanation = match (&content, alive) {
            (Content::Foreign, _) => {
                let file = &holder.file;
                format!(
                    "its lock file {file} was not written by this program; make sure that no other host uses the disk, then remove it"
                )
            }
            (_, true) => format!("it is locked by {holder}, which renews its lock"),
            (_, false) => format!(
                "it is locked by {holder}, which has given no sign of life for {} s; whoever opens the disk has it after {stale} s of silence",
                begun.elapsed().as_secs()
            ),
        };
        let record = holder.record.as_ref();
        Ok(json!({
            "locked": true,
            "lock_file": holder.file,
            "host": record.map(|record| &record.host),
            "process": record.map(|record| record.process),
            "since_unix_s": record.map(|record| record.since),
            "renewals": record.map(|record| record.counter),
            "alive": alive,
            "explanation": explanation,
        }))
    })
}

/// Where a copy comes from.
enum Source {
    /// Its lock is held as long as the copy lasts.
    Nfs {
        url: Url,
        data: DataFile,
        tenure: std::sync::Arc<SharedTenure>,
        _lock: Keeper,
    },
    Local {
        path: PathBuf,
        file: File,
    },
}

impl Source {
    async fn open(path: &Path) -> Result<(Source, u64), AdminError> {
        if let Some(url) = url_of(path)? {
            let disk = open(&url).await?;
            let options = KeeperOptions { owner: Owner::this_process(), timing: Timing::ESX };
            let locked = Keeper::start(&disk.directory, &disk.flat, options).await;
            let lock = locked.map_err(|error: LockError| AdminError(format!("{url}: {error}")))?;
            let data = disk.directory.data(&disk.flat.handle, None, Timing::ESX.flight);
            let size = disk.descriptor.disk_bytes().unwrap_or(disk.flat.attributes.size);
            return Ok((Source::Nfs { url, data, tenure: lock.tenure(), _lock: lock }, size));
        }
        let failed = |path: &Path, error: std::io::Error| AdminError(format!("{}: {error}", path.display()));
        let path = mounted::data_file(path);
        let mut file = File::open(&path).map_err(|error| failed(&path, error))?;
        let size = file.seek(SeekFrom::End(0)).map_err(|error| failed(&path, error))?;
        Ok((Source::Local { path, file }, size - size % 512))
    }

    async fn read(&self, at: u64, to: &mut [u8], memory: &DataBuffer) -> Result<(), AdminError> {
        match self {
            Source::Nfs { url, data, tenure, .. } => {
                let memory = memory.slice(0..to.len());
                data.read(at, &memory).await.map_err(call_failed(url))?;
                memory.copy_to(0, to);
                // What was read counts only under the lock.
                match tenure.is_open() {
                    true => Ok(()),
                    false => {
                        let cause = match tenure.state() {
                            State::Lost => tenure.cause().unwrap_or_default(),
                            _ => "its lock could not be renewed in time".to_owned(),
                        };
                        Err(AdminError(format!("{url}: {cause}; copy it again")))
                    }
                }
            }
            Source::Local { path, file } => {
                file.read_exact_at(to, at).map_err(|error| AdminError(format!("{}: {error}", path.display())))
            }
        }
    }
}

/// Copies a disk from or to an NFS server, or both.
pub(super) fn clone(source: &Path, destination: &Path, kind: Option<DiskKind>) -> Result<(), AdminError> {
    run(async {
        let (from, size) = Source::open(source).await?;
        if let Some(url) = url_of(destination)? {
            let format = format_of(&url, kind)?;
            let making = begin(&url, size, format).await?;
            let failed = call_failed(&url);
            let data = making.data();
            let all = format == DiskFormat::EagerZeroedThick;
            let copied = copy(&from, size, all, async |at, bytes: &[u8]| {
                let fill = |offset: usize, to: &mut [u8]| to.copy_from_slice(&bytes[offset..offset + to.len()]);
                data.write(at, bytes.len(), false, fill).await.map_err(&failed)
            });
            let copied = match copied.await {
                Ok(()) => data.flush().await.map_err(&failed),
                error => error,
            };
            return making.finish(copied).await;
        }
        let file = mounted::name(destination)?;
        let kind = kind.unwrap_or(DiskKind::Thin);
        let what = AdminRequest::DiskCreate { file: file.name, bytes: size, kind };
        mounted::ask(&file.directory, destination, what, "creating")?;
        let copied = copy_to_mount(&from, size, destination).await;
        if copied.is_err() {
            // The new disk only; whoever was there before would have been refused.
            let _ = std::fs::remove_file(mounted::data_file(destination));
            let _ = std::fs::remove_file(destination);
        }
        copied
    })
}

async fn copy_to_mount(from: &Source, size: u64, destination: &Path) -> Result<(), AdminError> {
    let flat = mounted::data_file(destination);
    let failed = |error: std::io::Error| AdminError(format!("{}: {error}", flat.display()));
    let to = File::options().write(true).open(&flat).map_err(failed)?;
    copy(from, size, false, async |at, bytes: &[u8]| to.write_all_at(bytes, at).map_err(failed)).await?;
    to.sync_all().map_err(failed)
}

/// Reads all of a disk and hands what is not zero (or `all`) to `put`.
async fn copy(
    from: &Source,
    size: u64,
    all: bool,
    put: impl AsyncFn(u64, &[u8]) -> Result<(), AdminError>,
) -> Result<(), AdminError> {
    let bar = progress_bar("copying", true);
    bar.set_length(size);
    let (mut buffer, memory) = (vec![0; CHUNK], DataBuffer::zeroed(CHUNK, 4096));
    let mut at = 0;
    while at < size {
        let length = (size - at).min(CHUNK as u64) as usize;
        from.read(at, &mut buffer[..length], &memory).await?;
        if all || buffer[..length].iter().any(|byte| *byte != 0) {
            put(at, &buffer[..length]).await?;
        }
        at += length as u64;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(())
}
