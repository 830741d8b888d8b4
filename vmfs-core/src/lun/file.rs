//! Owns: the LUN that is an image file or a block device of this machine, with compare-and-write by locks.
//! Promises: compare-and-write is atomic among all processes of this machine that open the LUN by this code; it never blocks the actor.
//! Must not know: cells' contents, hosts.
//!
//! Compare-and-write takes the range in this process (`RangeLocks`: an open file's own locks do not exclude its own threads), then
//! as an open-file-description lock (which excludes every other open file, also one of the same process), reads, compares and
//! writes with RWF_DSYNC. Ranges are widened to the I/O alignment, the same for all processes, so that neighbours that share an
//! aligned piece exclude each other.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, open};

use super::drain;
use super::range_lock::RangeLocks;
use super::raw_file::{Durability, RawFile};
use super::sys::{LockKind, ofd_lock};
use super::{CompareAndWrite, Compared, DataLun, Fencing, Lun, LunError, LunErrorKind, PathOwner};
use crate::buf::AlignedBuf;
use crate::env::LocalFuture;
use crate::format::header::{DeviceIdentity, LockMode};
use crate::units::{CellSize, SlotId};

const COMMAND: &str = "compare-and-write";
/// A lock that another process keeps longer than this is given up; nothing was done then.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Between two tries for a lock that another process has.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(2);
/// Most bytes of neighbours that are locked, read and written in one go.
const LONGEST_RUN: u64 = 1 << 20;

/// An image file or a block device, shared by the processes of this machine.
pub struct FileLun {
    shared: Arc<Shared>,
    data: Arc<FileData>,
    identity: DeviceIdentity,
    cell_size: Option<CellSize>,
    /// Slots whose drain ranges this process holds, each through its own open file.
    fenced: Mutex<BTreeMap<SlotId, OwnedFd>>,
}

struct Shared {
    raw: RawFile,
    threads: RangeLocks,
}

/// What `open` found out about a path.
pub(super) struct Opened {
    pub(super) actor: RawFile,
    pub(super) data: RawFile,
    pub(super) flags: OFlags,
    pub(super) identity: DeviceIdentity,
    pub(super) cell_size: Option<CellSize>,
}

/// One compare-and-write that owns its bytes, for another thread.
struct Job {
    nth: usize,
    offset: u64,
    expect: Vec<u8>,
    new: Vec<u8>,
}

type JobResult = (usize, Result<Compared, LunError>);

impl FileLun {
    pub(super) fn new(opened: Opened) -> FileLun {
        FileLun {
            shared: Arc::new(Shared { raw: opened.actor, threads: RangeLocks::default() }),
            data: Arc::new(FileData { raw: opened.data, flags: opened.flags }),
            identity: opened.identity,
            cell_size: opened.cell_size,
            fenced: Mutex::default(),
        }
    }

    /// Takes the whole drain range of a slot through an open file of its own, which keeps it until the fence ends.
    fn take_drain_range(&self, slot: SlotId) -> Result<Fencing, LunError> {
        let error = |cause| self.shared.raw.error(LunErrorKind::NotDone, "fence", (0, 0), cause);
        let mut fenced = self.fenced.lock();
        if fenced.contains_key(&slot) {
            return Ok(Fencing::Proven);
        }
        let file = reopen(&self.shared.raw.file, self.data.flags).map_err(error)?;
        if !drain::take(file.as_fd(), slot).map_err(error)? {
            return Ok(Fencing::NotYet);
        }
        fenced.insert(slot, file);
        Ok(Fencing::Proven)
    }

    /// Runs blocking work off the actor's thread.
    fn blocking<'a, T: Send + 'static>(
        &'a self,
        command: &'static str,
        range: (u64, u64),
        work: impl FnOnce(&Shared) -> Result<T, LunError> + Send + 'static,
    ) -> LocalFuture<'a, Result<T, LunError>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || work(&shared)).await {
                Ok(result) => result,
                Err(ended) => {
                    let cause = io::Error::other(ended.to_string());
                    Err(self.shared.raw.error(LunErrorKind::Unknown, command, range, cause))
                }
            }
        })
    }
}

impl Shared {
    /// The range of a compare-and-write, widened to whole aligned pieces.
    fn widened(&self, offset: u64, length: u64) -> (u64, u64) {
        let alignment = self.raw.alignment as u64;
        (offset - offset % alignment, offset.saturating_add(length).next_multiple_of(alignment))
    }

    /// Carries out compare-and-writes that lie side by side, with one read and at most one write.
    fn run(&self, jobs: &[Job]) -> Vec<JobResult> {
        let every = |error: &LunError| jobs.iter().map(|job| (job.nth, Err(error.clone()))).collect();
        let first = self.widened(jobs[0].offset, 0).0;
        let end = jobs.iter().map(|job| self.widened(job.offset, job.new.len() as u64).1).max().unwrap_or(first);
        match self.run_range(jobs, first, end) {
            Ok(compared) => jobs.iter().map(|job| job.nth).zip(compared.into_iter().map(Ok)).collect(),
            Err(error) => every(&error),
        }
    }

    fn run_range(&self, jobs: &[Job], first: u64, end: u64) -> Result<Vec<Compared>, LunError> {
        let (length, raw) = (end - first, &self.raw);
        raw.check(COMMAND, first, length, true)?;
        let _threads = self.threads.lock(first, end);
        let _processes = self.lock_file(first, length)?;
        let mut bytes = AlignedBuf::zeroed(length as usize);
        raw.read(first, &mut bytes).map_err(|error| LunError { command: COMMAND, ..error })?;
        let mut changed: Option<(u64, u64)> = None;
        let compared = jobs
            .iter()
            .map(|job| {
                let from = (job.offset - first) as usize;
                let found = &mut bytes[from..from + job.expect.len()];
                if found != job.expect {
                    return Compared::Miscompare;
                }
                found.copy_from_slice(&job.new);
                let (start, end) = self.widened(job.offset, job.new.len() as u64);
                changed = Some(changed.map_or((start, end), |(s, e)| (s.min(start), e.max(end))));
                Compared::Written
            })
            .collect();
        if let Some((start, end)) = changed {
            let from = &bytes[(start - first) as usize..(end - first) as usize];
            raw.write(start, from, Durability::Now).map_err(|error| LunError { command: COMMAND, ..error })?;
        }
        Ok(compared)
    }

    fn lock_file(&self, start: u64, length: u64) -> Result<FileLock<'_>, LunError> {
        let error = |cause: io::Error| self.raw.error(LunErrorKind::NotDone, COMMAND, (start, length), cause);
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        while !ofd_lock(self.raw.file.as_fd(), LockKind::Exclusive, start, length).map_err(error)? {
            if began.elapsed() > LONGEST_WAIT {
                return Err(error(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "another process holds the lock of this cell; is one stopped?",
                )));
            }
            std::thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
        }
        Ok(FileLock { file: &self.raw.file, start, length })
    }
}

struct FileLock<'a> {
    file: &'a OwnedFd,
    start: u64,
    length: u64,
}

impl Drop for FileLock<'_> {
    fn drop(&mut self) {
        // Giving a lock back fails only when the kernel has no memory to split one; closing the file gives it back then.
        if let Err(error) = ofd_lock(self.file.as_fd(), LockKind::Release, self.start, self.length) {
            tracing::warn!(%error, "a lock could not be given back");
        }
    }
}

impl Lun for FileLun {
    fn name(&self) -> &str {
        &self.shared.raw.name
    }

    fn bytes(&self) -> u64 {
        self.shared.raw.bytes()
    }

    fn cell_size(&self) -> Option<CellSize> {
        self.cell_size
    }

    fn alignment(&self) -> usize {
        self.shared.raw.alignment
    }

    fn identity(&self) -> DeviceIdentity {
        self.identity.clone()
    }

    fn lock_mode(&self) -> LockMode {
        LockMode::SingleMachine
    }

    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        self.blocking("read", (offset, length as u64), move |shared| {
            shared.raw.check("read", offset, length as u64, false)?;
            let mut buf = AlignedBuf::zeroed(length);
            shared.raw.read(offset, &mut buf)?;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("write", (offset, data.len() as u64), move |shared| {
            shared.raw.write(offset, &data, Durability::Now)
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("flush", (0, 0), |shared| shared.raw.flush())
    }

    fn unmap(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("unmap", (offset, length), move |shared| shared.raw.unmap(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("write zeroes", (offset, length), move |shared| {
            shared.raw.write_zeroes(offset, length)?;
            shared.raw.flush()
        })
    }

    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>> {
        let job = Job { nth: 0, offset, expect: expect.to_vec(), new: new.to_vec() };
        self.blocking(COMMAND, (offset, new.len() as u64), move |shared| {
            shared.run(&[job]).pop().expect("one job has one result").1
        })
    }

    fn compare_and_write_many<'a>(
        &'a self,
        cells: &'a [CompareAndWrite<'a>],
    ) -> LocalFuture<'a, Vec<Result<Compared, LunError>>> {
        let runs = runs_of(cells, self.shared.raw.alignment as u64);
        Box::pin(async move {
            let work = runs.into_iter().map(|jobs| {
                let (offset, length) = (jobs[0].offset, jobs.iter().map(|job| job.new.len() as u64).sum());
                let numbers: Vec<usize> = jobs.iter().map(|job| job.nth).collect();
                let ran = self.blocking(COMMAND, (offset, length), move |shared| Ok(shared.run(&jobs)));
                async move {
                    ran.await.unwrap_or_else(|error| numbers.iter().map(|nth| (*nth, Err(error.clone()))).collect())
                }
            });
            let mut results: Vec<JobResult> = join_all(work).await.into_iter().flatten().collect();
            results.sort_by_key(|(nth, _)| *nth);
            results.into_iter().map(|(_, result)| result).collect()
        })
    }

    fn data(&self) -> Arc<dyn DataLun> {
        self.data.clone()
    }

    fn mark_paths(&self, owner: PathOwner) -> LocalFuture<'_, Result<(), LunError>> {
        let marked = hold_drain_byte(&self.shared.raw, owner.slot).and_then(|()| self.data.hold_drain_byte(owner.slot));
        Box::pin(std::future::ready(marked))
    }

    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        Box::pin(std::future::ready(self.take_drain_range(victim.slot)))
    }

    fn end_fence(&self, slot: SlotId) {
        self.fenced.lock().remove(&slot);
    }
}

/// Sorts compare-and-writes by place and groups those whose aligned pieces touch.
fn runs_of(cells: &[CompareAndWrite<'_>], alignment: u64) -> Vec<Vec<Job>> {
    let mut jobs: Vec<Job> = cells
        .iter()
        .enumerate()
        .map(|(nth, c)| Job { nth, offset: c.offset, expect: c.expect.to_vec(), new: c.new.to_vec() })
        .collect();
    jobs.sort_by_key(|job| job.offset);
    let mut runs: Vec<Vec<Job>> = Vec::new();
    for job in jobs {
        let start = job.offset - job.offset % alignment;
        match runs.last_mut() {
            Some(run)
                if run
                    .last()
                    .is_some_and(|last| (last.offset + last.new.len() as u64).next_multiple_of(alignment) >= start)
                    && start - run[0].offset.min(start) < LONGEST_RUN =>
            {
                run.push(job);
            }
            _ => runs.push(vec![job]),
        }
    }
    runs
}

/// The data path: an open file of its own.
struct FileData {
    raw: RawFile,
    flags: OFlags,
}

impl DataLun for FileData {
    fn alignment(&self) -> usize {
        self.raw.alignment
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        self.raw.read(offset, into)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), LunError> {
        self.raw.write(offset, from, Durability::AtFlush)
    }

    fn flush(&self) -> Result<(), LunError> {
        self.raw.flush()
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.raw.write_zeroes(offset, length)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.raw.unmap(offset, length)
    }

    fn open_descriptor(&self) -> Option<Result<OwnedFd, LunError>> {
        let error = |cause| self.raw.error(LunErrorKind::NotDone, "open", (0, 0), cause);
        Some(reopen(&self.raw.file, self.flags).map_err(error))
    }

    fn hold_drain_byte(&self, slot: SlotId) -> Result<(), LunError> {
        hold_drain_byte(&self.raw, slot)
    }

    fn take_raw(&self, exclusive: bool) -> Result<bool, LunError> {
        drain::take_raw(self.raw.file.as_fd(), exclusive).map_err(|cause| self.raw_byte_error(cause))
    }

    fn release_raw(&self) -> Result<(), LunError> {
        drain::release_raw(self.raw.file.as_fd()).map_err(|cause| self.raw_byte_error(cause))
    }
}

impl FileData {
    fn raw_byte_error(&self, cause: io::Error) -> LunError {
        self.raw.error(LunErrorKind::NotDone, "lock of the raw byte", (0, 0), cause)
    }
}

fn hold_drain_byte(raw: &RawFile, slot: SlotId) -> Result<(), LunError> {
    drain::hold_byte(raw.file.as_fd(), slot).map_err(|cause| {
        let kind = if cause.kind() == io::ErrorKind::WouldBlock { LunErrorKind::Fenced } else { LunErrorKind::NotDone };
        raw.error(kind, "lock of the drain range", (0, 0), cause)
    })
}

/// A new open file of the same inode, also when its path leads elsewhere by now.
pub(super) fn reopen(file: &OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    Ok(open(format!("/proc/self/fd/{}", file.as_raw_fd()), flags, Mode::empty())?)
}
