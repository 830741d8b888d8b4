//! Owns: reading and writing open files on the thread that has the request.
//! Promises: where the runs are known nothing is allocated and no thread is changed; a closed gate holds the request, a poisoned
//!   one fails it; what the actor must do first it does while this thread waits.
//! Must not know: FUSE replies, the format.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmfs_core::buf::AlignedBuf;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{DataLuns, Mover, Need, Stop, physical_refusal};
use vmfs_core::gate::GateState;

use crate::handles::FileHandle;
use crate::state::State;

/// Longest request: what the kernel sends at most.
pub const MAX_REQUEST: usize = 1 << 20;
/// How often a closed gate is looked at.
const GATE_PAUSE: Duration = Duration::from_millis(20);
/// Rounds without progress before a request is given up: every round did what the data path asked for.
const MAX_ROUNDS: u32 = 1000;

/// A worker's buffers.
struct Worker {
    mover: Mover,
    luns: Arc<DataLuns>,
    buffer: AlignedBuf,
}

thread_local! {
    static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
}

/// Runs `work` with this thread's buffers; they are made at the thread's first request.
fn with_worker<T>(state: &State, work: impl FnOnce(&mut Worker) -> T) -> T {
    WORKER.with_borrow_mut(|slot| {
        let known = slot.take().filter(|worker| Arc::ptr_eq(&worker.luns, &state.luns));
        let worker = slot.insert(known.unwrap_or_else(|| Worker {
            mover: Mover::new(state.luns.clone(), MAX_REQUEST, Box::new(lockd::clock::now)),
            luns: state.luns.clone(),
            buffer: AlignedBuf::zeroed(MAX_REQUEST),
        }));
        work(worker)
    })
}

/// Reads up to `length` bytes and gives them to `reply`; fewer only at the end of the file.
pub fn read(
    state: &Arc<State>,
    handle: &Arc<FileHandle>,
    offset: u64,
    length: usize,
    reply: impl FnOnce(Result<&[u8], FsError>),
) {
    let length = length.min(MAX_REQUEST);
    with_worker(state, |worker| {
        let Worker { mover, buffer, .. } = worker;
        match read_into(state, handle, mover, offset, &mut buffer[..length]) {
            Ok(count) => reply(Ok(&buffer[..count])),
            Err(error) => reply(Err(error)),
        }
    });
}

fn read_into(
    state: &Arc<State>,
    handle: &Arc<FileHandle>,
    mover: &mut Mover,
    offset: u64,
    into: &mut [u8],
) -> Result<usize, FsError> {
    let mut done = 0;
    let mut rounds = Rounds::default();
    loop {
        let moved = mover.read(&handle.file, offset + done as u64, &mut into[done..]);
        done += moved.bytes;
        let Some(stop) = moved.stop else { return Ok(done) };
        rounds.count(moved.bytes, &stop)?;
        match stop {
            Stop::Unlocked => {
                let (at, length) = (offset + done as u64, into.len() - done);
                let file = handle.file.clone();
                let bytes =
                    state.actor.ask(move |volume| async move { volume.files().read(&file, at, length).await })?;
                into[done..done + bytes.len()].copy_from_slice(&bytes);
                return Ok(done + bytes.len());
            }
            other => resolve(state, handle, other, offset + done as u64, (into.len() - done) as u64)?,
        }
    }
}

/// Writes all of `from`.
pub fn write(state: &Arc<State>, handle: &Arc<FileHandle>, offset: u64, from: &[u8]) -> Result<(), FsError> {
    if !handle.written.load(Ordering::Relaxed) {
        handle.written.store(true, Ordering::Release);
    }
    with_worker(state, |worker| write_from(state, handle, &mut worker.mover, offset, from))
}

fn write_from(
    state: &Arc<State>,
    handle: &Arc<FileHandle>,
    mover: &mut Mover,
    offset: u64,
    from: &[u8],
) -> Result<(), FsError> {
    let mut done = 0;
    let mut rounds = Rounds::default();
    while done < from.len() {
        let at = offset + done as u64;
        let rest = &from[done..];
        let moved = mover.write(&handle.file, at, rest);
        done += moved.bytes;
        let Some(stop) = moved.stop else { continue };
        rounds.count(moved.bytes, &stop)?;
        let (at, rest) = (offset + done as u64, &from[done..]);
        match stop {
            Stop::Need(Need::Allocation) => {
                let file = handle.file.clone();
                let range = at..at + rest.len() as u64;
                let grant =
                    state.actor.ask(move |volume| async move { volume.files().allocate(&file, range).await })?;
                if !grant.is_empty() {
                    let filled = mover.fill(grant, at, rest);
                    done += filled.bytes;
                    if let Some(stop) = filled.stop {
                        rounds.count(filled.bytes, &stop)?;
                        resolve(state, handle, stop, at, rest.len() as u64)?;
                    }
                }
            }
            Stop::Need(Need::Inline) => {
                let (file, bytes) = (handle.file.clone(), rest.to_vec());
                done += state.actor.ask(move |volume| async move { volume.files().write(&file, at, &bytes).await })?;
            }
            other => resolve(state, handle, other, at, rest.len() as u64)?,
        }
    }
    Ok(())
}

/// Does what the data path asked for before it can go on, or says why it cannot.
fn resolve(state: &Arc<State>, handle: &Arc<FileHandle>, stop: Stop, offset: u64, length: u64) -> Result<(), FsError> {
    let file = handle.file.clone();
    let refuse = |kind, what: &str| Err(FsError::refused(kind, format!("{}: {what}", handle.file.fd())));
    match stop {
        Stop::Need(Need::Runs) => {
            state.actor.ask(move |volume| async move { volume.files().load_runs(&file, offset..offset + length).await })
        }
        Stop::Need(Need::Extension) => {
            state.actor.ask(move |volume| async move { volume.files().extend(&file, offset).await })
        }
        Stop::Need(Need::Refused) if offset.saturating_add(length) > handle.file.size() => refuse(
            FsErrorKind::TooBig,
            "it ends before: a virtual disk does not grow by writing (use vmfs disk extend)",
        ),
        Stop::Need(Need::Refused) => refuse(FsErrorKind::ReadOnly, "it is not open for writing on this host"),
        Stop::Need(Need::Physical) => Err(physical_refusal(&handle.file)),
        Stop::Gate(GateState::Poisoned) => {
            refuse(FsErrorKind::Fenced, "this host was fenced; unmount the volume and mount it again")
        }
        Stop::Gate(_) => {
            if state.is_ending() {
                return refuse(FsErrorKind::Io, "the lease has run out and the volume is being unmounted");
            }
            if let Some(lun) = state.lost_alone() {
                let what =
                    format!("{lun} does not answer any more, while other LUNs of the volume do; see vmfs status");
                return refuse(FsErrorKind::Io, &what);
            }
            std::thread::sleep(GATE_PAUSE);
            Ok(())
        }
        Stop::Failed(error) => Err(error.into()),
        Stop::MissingLun(lun) => Err(FsError::MissingLun { lun }),
        Stop::Unlocked | Stop::Need(Need::Allocation | Need::Inline) => {
            refuse(FsErrorKind::Stale, "its lock was given back while it was in use; open it again")
        }
    }
}

/// Counts rounds that moved nothing.
#[derive(Default)]
struct Rounds(u32);

impl Rounds {
    fn count(&mut self, moved: usize, stop: &Stop) -> Result<(), FsError> {
        self.0 = if moved > 0 || matches!(stop, Stop::Gate(_)) { 0 } else { self.0 + 1 };
        if self.0 <= MAX_ROUNDS {
            return Ok(());
        }
        Err(FsError::refused(FsErrorKind::Io, format!("a request made no progress in {MAX_ROUNDS} rounds: {stop:?}")))
    }
}
