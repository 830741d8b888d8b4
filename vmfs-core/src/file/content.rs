//! Owns: reading and writing file data on the metadata actor, for tools, small files and files without a lock.
//! Promises: a write is durable when it returns; a read without a lock returns bytes that were the file's at one moment of it.
//! Must not know: how other threads move data.

use std::rc::Rc;
use std::time::Duration;

use super::files::{Files, Open, touch};
use super::grant::Grant;
use super::mover::lay_over_zeros;
use super::open_file::{Inline, Need, Permit, ReadSegment, Run, SharedFile, WriteSegment};
use super::raw::physical_refusal;
use crate::buf::AlignedBuf;
use crate::error::{FsError, FsErrorKind};
use crate::format::body::{Content, MAX_INLINE};
use crate::format::root_cell::ObjectType;
use crate::gate::GateState;
use crate::lun::{Lun, LunError};
use crate::mapping::runs::{Class, RunMap};
use crate::sabotage::{Sabotage, active};
use crate::units::LunIndex;

/// Reads of a file that other hosts change all the time before that is an error.
const TRIES: u32 = 100;
/// How often a closed gate is looked at.
const GATE_PAUSE: Duration = Duration::from_millis(50);
/// Bytes moved with one command.
const COMMAND_BYTES: u64 = 4 << 20;

impl Files {
    /// Reads up to `length` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// `Stale` when the file is gone; `Busy` when other hosts change it faster than it can be read.
    pub async fn read(&self, file: &SharedFile, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        let open = self.find(file)?;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let at = offset + bytes.len() as u64;
            let left = length - bytes.len();
            match file.read_segment(at, (left as u64).min(COMMAND_BYTES)) {
                ReadSegment::Data(run) => {
                    if let Some(read) = self.read_run(&open, run).await? {
                        bytes.extend_from_slice(&read);
                    }
                }
                ReadSegment::Zero(zeros) => bytes.resize(bytes.len() + zeros as usize, 0),
                ReadSegment::Inline => {
                    let mut some = vec![0; left.min(MAX_INLINE)];
                    let Some(count) = file.read_inline(at, &mut some) else { continue };
                    bytes.extend_from_slice(&some[..count]);
                    if count == 0 {
                        break;
                    }
                }
                ReadSegment::Unknown => self.load(&open, at..at + 1).await?,
                ReadSegment::Unlocked if file.object_type() == ObjectType::Rdm => return Err(not_held(file)),
                ReadSegment::Unlocked => {
                    let some = self.read_unlocked(&open, at, left).await?;
                    bytes.extend_from_slice(&some);
                    break;
                }
                ReadSegment::End => break,
                ReadSegment::Physical => return Err(physical_refusal(file)),
            }
        }
        Ok(bytes)
    }

    /// `None`: the gate was closed, resolve again.
    async fn read_run(&self, open: &Open, run: Run) -> Result<Option<Vec<u8>>, FsError> {
        if !self.pass_gate(open, &run.permit, run.lun)? {
            drop(run.reference);
            self.context.env().sleep(GATE_PAUSE).await;
            return Ok(None);
        }
        let bytes = read_lun(&*self.lun_of(open, run.lun)?, run.offset, run.length as usize).await?;
        Ok(self.pass_gate(open, &run.permit, run.lun)?.then_some(bytes))
    }

    /// Whether a submission may go; an error when this host was fenced.
    fn pass_gate(&self, open: &Open, permit: &Permit, lun: LunIndex) -> Result<bool, FsError> {
        match open.shared.gate_state(permit, self.context.env().now()) {
            GateState::Open => Ok(true),
            _ if active(Sabotage::GateIgnored) => Ok(true),
            GateState::Frozen => Ok(false),
            GateState::Poisoned => Err(FsError::Fenced { lun }),
        }
    }

    /// Waits while the gate is closed; an error when this host was fenced.
    pub(super) async fn wait_for_gate(&self, open: &Open, permit: &Permit) -> Result<(), FsError> {
        while !self.pass_gate(open, permit, permit.lun)? {
            self.context.env().sleep(GATE_PAUSE).await;
        }
        Ok(())
    }

    /// Reads a file that this host has no lock of: the object and its pointer cells are read again after the data has arrived; only if
    /// nothing changed the bytes were the file's.
    async fn read_unlocked(&self, open: &Rc<Open>, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        for attempt in 0..TRIES {
            let image = open.object.image();
            let size = image.body.attributes.size;
            open.shared.size.store(size, std::sync::atomic::Ordering::Release);
            let end = size.min(offset.saturating_add(length as u64));
            let mut bytes = Vec::new();
            let mut cells = Vec::new();
            let read = match &image.body.content {
                _ if offset >= end => Ok(()),
                Content::Inline(content) => {
                    bytes.resize((end - offset) as usize, 0);
                    let from = content.get(offset as usize..).unwrap_or(&[]);
                    let count = from.len().min(bytes.len());
                    bytes[..count].copy_from_slice(&from[..count]);
                    Ok(())
                }
                _ => match self.view(open, &image, offset..end).await {
                    Ok((runs, evidence)) => {
                        cells = evidence;
                        self.read_view(&runs, offset, end, &mut bytes).await
                    }
                    Err(error) => Err(error),
                },
            };
            // An error counts only if what it came from is still so.
            if active(Sabotage::ReadOnce) || self.is_unchanged(open, &image, &cells).await? {
                return read.map(|()| bytes);
            }
            if attempt > 3 {
                self.context.env().sleep(Duration::from_millis(1)).await;
            }
        }
        let message = format!("{}: another host changes it faster than it can be read; try again", open.shared.fd);
        Err(FsError::refused(FsErrorKind::Busy, message))
    }

    async fn read_view(&self, runs: &RunMap, offset: u64, end: u64, bytes: &mut Vec<u8>) -> Result<(), FsError> {
        let mut at = offset;
        while at < end {
            let stretch = runs.stretch(at, end.min(at + COMMAND_BYTES));
            match stretch.class {
                Class::Data { lun, offset } => {
                    let member = self.context.member(lun)?;
                    bytes.extend_from_slice(&read_lun(&*member.lun, offset, (stretch.end - at) as usize).await?);
                }
                _ => bytes.resize(bytes.len() + (stretch.end - at) as usize, 0),
            }
            at = stretch.end;
        }
        Ok(())
    }

    /// Writes, durably (the pointers to new blocks become durable with the next flush). Gives the bytes written: fewer than asked only
    /// when an error, which the next call reports, came after some of them.
    pub async fn write(&self, file: &SharedFile, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let open = self.find(file)?;
        self.check_writable(&open, &(offset..offset.saturating_add(bytes.len() as u64)))?;
        let mut done = 0;
        while done < bytes.len() {
            match self.write_some(&open, offset + done as u64, &bytes[done..]).await {
                Ok(count) => done += count,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    async fn write_some(&self, open: &Rc<Open>, at: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let length = (bytes.len() as u64).min(COMMAND_BYTES);
        let need = match open.shared.write_segment(at, length) {
            WriteSegment::Data(run) => {
                if !self.pass_gate(open, &run.permit, run.lun)? {
                    drop(run);
                    self.context.env().sleep(GATE_PAUSE).await;
                    return Ok(0);
                }
                let count = run.length as usize;
                let _edge = open.shared.edge(at).write().await;
                self.patch(open, &run.permit, run.offset, &bytes[..count]).await?;
                open.shared.note_size(at + count as u64);
                return Ok(count);
            }
            WriteSegment::Need(need) => need,
        };
        match need {
            Need::Runs => self.load(open, at..at + 1).await.map(|()| 0),
            Need::Extension => self.extend(&open.shared, at).await.map(|()| 0),
            Need::Inline => self.write_inline(open, at, bytes).await,
            Need::Refused => Err(not_writable(&open.shared, at)),
            Need::Physical => Err(physical_refusal(&open.shared)),
            Need::Allocation => {
                let grant = self.allocate(&open.shared, at..at + length).await?;
                if grant.is_empty() { Ok(0) } else { self.fill(open, grant, at, &bytes[..length as usize]).await }
            }
        }
    }

    /// Writes the granules of a grant whole, durably; gives the bytes of `bytes` that are in them.
    async fn fill(&self, open: &Rc<Open>, grant: Grant, at: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let mut count = 0;
        let mut failed = None;
        'pieces: for piece in grant.pieces() {
            let mut done = 0;
            while done < piece.length {
                let length = (piece.length - done).min(COMMAND_BYTES);
                self.wait_for_gate(open, &piece.permit).await?;
                let mut chunk = AlignedBuf::zeroed(length as usize);
                lay_over_zeros(&mut chunk, piece.file_offset + done, at, bytes);
                let written = match self.context.member(piece.lun) {
                    Ok(member) => member.lun.write(piece.offset + done, chunk).await.map_err(|e| self.doubted(open, e)),
                    Err(error) => Err(error),
                };
                if let Err(error) = written {
                    failed = Some(error);
                    break 'pieces;
                }
                done += length;
            }
            count += 1;
        }
        let end = at + bytes.len() as u64;
        let reached = match count {
            0 => at,
            count => {
                let last = &grant.pieces()[count - 1];
                (last.file_offset + last.length).min(end)
            }
        };
        grant.filled_in_part(count, reached, true);
        match failed {
            Some(error) if reached <= at => Err(error),
            _ => Ok((reached - at) as usize),
        }
    }

    fn doubted(&self, open: &Open, error: LunError) -> FsError {
        self.note_doubt(open, &error);
        error.into()
    }

    /// Writes bytes at any offset of a LUN, durably; sectors that are covered in part are read first. The caller has the range to itself.
    /// The gate is looked at last: this host may have stood still since its caller did.
    pub(super) async fn patch(&self, open: &Open, permit: &Permit, at: u64, bytes: &[u8]) -> Result<(), FsError> {
        let lun = self.lun_of(open, permit.lun)?;
        let alignment = lun.alignment() as u64;
        let start = at - at % alignment;
        let end = (at + bytes.len() as u64).next_multiple_of(alignment);
        let skip = (at - start) as usize;
        let mut whole = if skip == 0 && end - start == bytes.len() as u64 {
            AlignedBuf::zeroed(bytes.len())
        } else {
            self.read_edges(&*lun, start, end).await?
        };
        whole[skip..skip + bytes.len()].copy_from_slice(bytes);
        self.wait_for_gate(open, permit).await?;
        lun.write(start, whole).await.map_err(|error| self.doubted(open, error))
    }

    /// A buffer for `start..end` with its first and last sector as they are.
    async fn read_edges(&self, lun: &dyn Lun, start: u64, end: u64) -> Result<AlignedBuf, FsError> {
        let alignment = lun.alignment();
        let mut whole = AlignedBuf::zeroed((end - start) as usize);
        let first = lun.read(start, alignment).await?;
        whole[..alignment].copy_from_slice(&first);
        if end - start > alignment as u64 {
            let last = lun.read(end - alignment as u64, alignment).await?;
            let place = whole.len() - alignment;
            whole[place..].copy_from_slice(&last);
        }
        Ok(whole)
    }

    async fn write_inline(&self, open: &Rc<Open>, at: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let _change = open.change.lock().await;
        let mut state = open.shared.state.write();
        let end = at as usize + bytes.len();
        let Some(Inline { bytes: content, dirty }) = &mut state.inline else { return Ok(0) };
        if content.len() < end {
            content.resize(end, 0);
        }
        content[at as usize..end].copy_from_slice(bytes);
        *dirty = true;
        drop(state);
        open.shared.note_size(end as u64);
        touch(open);
        Ok(bytes.len())
    }

    /// Writes zeros in place from file offset `at` up to at most `end`; gives how many.
    pub(super) async fn zero_data(&self, open: &Rc<Open>, at: u64, end: u64) -> Result<u64, FsError> {
        let length = (end - at).min(COMMAND_BYTES);
        let run = match open.shared.write_segment(at, length) {
            WriteSegment::Data(run) => run,
            // It stays so: nothing is written any more after a write whose end is not known.
            WriteSegment::Need(Need::Refused) => return Err(not_writable(&open.shared, at)),
            WriteSegment::Need(_) => {
                self.load(open, at..at + 1).await?;
                return Ok(0);
            }
        };
        if !self.pass_gate(open, &run.permit, run.lun)? {
            drop(run);
            self.context.env().sleep(GATE_PAUSE).await;
            return Ok(0);
        }
        let _edge = open.shared.edge(at).write().await;
        self.patch(open, &run.permit, run.offset, &vec![0; run.length as usize]).await?;
        touch(open);
        Ok(run.length)
    }
}

/// The data of a raw device mapping is nobody's to read without its lock.
fn not_held(file: &SharedFile) -> FsError {
    let message = format!("{}: this host has not its lock (any more); open it again", file.fd());
    FsError::refused(FsErrorKind::Stale, message)
}

/// A byte that nobody may write through this opening (any more).
fn not_writable(file: &SharedFile, at: u64) -> FsError {
    let message =
        format!("{}: byte {at} cannot be written: not open for writing, or behind the end of the disk", file.fd());
    FsError::refused(FsErrorKind::Invalid, message)
}

/// Reads bytes at any offset of a LUN.
async fn read_lun(lun: &dyn Lun, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
    let alignment = lun.alignment() as u64;
    let start = offset - offset % alignment;
    let end = (offset + length as u64).next_multiple_of(alignment);
    let read = lun.read(start, (end - start) as usize).await?;
    let skip = (offset - start) as usize;
    Ok(read[skip..skip + length].to_vec())
}
