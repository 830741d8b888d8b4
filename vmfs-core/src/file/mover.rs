//! Owns: the data path of a thread: resolve, check the gate, move the bytes on the LUN; unaligned edges are bounced.
//! Promises: no allocation and no change of thread where the runs are known; a patched sector loses no neighbour's bytes.
//! Must not know: who sends requests, how the metadata actor is reached: it stops with a [`Need`] and is called again.
//!
//! A blocking data command that has returned has ended, also with an error (rule R3: the kernel's error handling has returned it).

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::RwLock;

use super::grant::Grant;
use super::open_file::{Device, Need, Permit, ReadSegment, Run, SharedFile, WriteSegment};
use crate::buf::{AlignedBuf, BUF_ALIGNMENT};
use crate::env::Instant;
use crate::gate::GateState;
use crate::lun::{DataLun, LunError};
use crate::sabotage::{Sabotage, active};
use crate::units::LunIndex;

/// The data paths of a volume's LUNs, for all threads. LUNs are only added while the volume is mounted.
#[derive(Default)]
pub struct DataLuns {
    luns: RwLock<BTreeMap<LunIndex, Arc<dyn DataLun>>>,
}

impl DataLuns {
    /// Adds a LUN.
    pub fn insert(&self, lun: LunIndex, data: Arc<dyn DataLun>) {
        self.luns.write().insert(lun, data);
    }

    /// The data path of a LUN, if it is there.
    pub fn get(&self, lun: LunIndex) -> Option<Arc<dyn DataLun>> {
        self.luns.read().get(&lun).cloned()
    }
}

/// Why a move ended before its end.
#[derive(Debug)]
pub enum Stop {
    /// The metadata actor must do this for the rest of the range; then call again.
    Need(Need),
    /// No lock is held: the rest is read through `Files::read`.
    Unlocked,
    /// `Frozen`: hold the request and call again. `Poisoned`: this host was fenced, fail it.
    Gate(GateState),
    /// The LUN refused; what it holds in the range of the failed command is not known.
    Failed(LunError),
    /// The LUN is not there.
    MissingLun(LunIndex),
}

/// Bytes moved, and why not all of them.
#[derive(Debug)]
pub struct Moved {
    /// Bytes from the start of the request.
    pub bytes: usize,
    /// `None`: all of them (a read: up to the end of the file).
    pub stop: Option<Stop>,
}

/// One thread's means to move data.
pub struct Mover {
    luns: Arc<DataLuns>,
    /// A path that was replaced meanwhile (its LUN was taken out) is not kept open by who moved data there once.
    known: Vec<Option<Weak<dyn DataLun>>>,
    bounce: AlignedBuf,
    now: Box<dyn Fn() -> Instant + Send>,
}

impl Mover {
    /// For one thread; `bounce_bytes` (a multiple of 4096, at least that) is the longest command for memory that is not aligned. `now` is
    /// CLOCK_BOOTTIME.
    pub fn new(luns: Arc<DataLuns>, bounce_bytes: usize, now: Box<dyn Fn() -> Instant + Send>) -> Mover {
        let bounce = AlignedBuf::zeroed(bounce_bytes.max(BUF_ALIGNMENT).next_multiple_of(BUF_ALIGNMENT));
        Mover { luns, known: vec![None; 256], bounce, now }
    }

    /// Reads up to the end of the file.
    pub fn read(&mut self, file: &SharedFile, offset: u64, into: &mut [u8]) -> Moved {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let step = match file.read_segment(at, (into.len() - done) as u64) {
                ReadSegment::Data(run) => {
                    let length = run.length as usize;
                    self.read_run(file, &run, &mut into[done..done + length]).map(|()| length)
                }
                ReadSegment::Zero(length) => {
                    into[done..done + length as usize].fill(0);
                    Ok(length as usize)
                }
                ReadSegment::Inline => match file.read_inline(at, &mut into[done..]) {
                    Some(count) => return Moved { bytes: done + count, stop: None },
                    None => Ok(0),
                },
                ReadSegment::Unknown => Err(Stop::Need(Need::Runs)),
                ReadSegment::Unlocked => Err(Stop::Unlocked),
                ReadSegment::Physical => Err(Stop::Need(Need::Physical)),
                ReadSegment::End => break,
            };
            match step {
                Ok(count) => done += count,
                Err(stop) => return Moved { bytes: done, stop: Some(stop) },
            }
        }
        Moved { bytes: done, stop: None }
    }

    /// Writes in place. Where granules were never written it stops with [`Need::Allocation`]: get a [`Grant`], [`Mover::fill`] it, and
    /// call again for the rest.
    pub fn write(&mut self, file: &SharedFile, offset: u64, from: &[u8]) -> Moved {
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let step = match file.write_segment(at, (from.len() - done) as u64) {
                WriteSegment::Data(run) => {
                    let length = run.length as usize;
                    let written = self.write_run(file, &run, &from[done..done + length]);
                    if written.is_ok() {
                        file.note_write(run.lun, at + run.length);
                    }
                    written.map(|()| length)
                }
                WriteSegment::Need(need) => Err(Stop::Need(need)),
            };
            match step {
                Ok(count) => done += count,
                Err(stop) => return Moved { bytes: done, stop: Some(stop) },
            }
        }
        Moved { bytes: done, stop: None }
    }

    /// Writes the granules of `grant` whole: `from`, which begins at file offset `offset`, and zeros around it. The count is of bytes
    /// of `from`; it is short when a command failed or the grant ends before `from`.
    pub fn fill(&mut self, grant: Grant, offset: u64, from: &[u8]) -> Moved {
        let end = offset + from.len() as u64;
        let mut filled = 0;
        let mut stop = None;
        for piece in grant.pieces() {
            let mut at = 0;
            while at < piece.length && stop.is_none() {
                let length = (piece.length - at).min(self.bounce.len() as u64);
                let file_range = piece.file_offset + at..piece.file_offset + at + length;
                stop = self.fill_chunk(grant.file(), piece, at, file_range, (offset, from)).err();
                at += length;
            }
            if stop.is_some() {
                break;
            }
            filled += 1;
        }
        let reached = match filled {
            0 => offset,
            count => {
                let last = &grant.pieces()[count - 1];
                (last.file_offset + last.length).min(end)
            }
        };
        grant.filled_in_part(filled, reached, false);
        Moved { bytes: reached.saturating_sub(offset) as usize, stop }
    }

    fn fill_chunk(
        &mut self,
        file: &SharedFile,
        piece: &super::grant::GrantPiece,
        at: u64,
        file_range: std::ops::Range<u64>,
        (offset, from): (u64, &[u8]),
    ) -> Result<(), Stop> {
        let lun = self.lun(piece.lun)?;
        let length = (file_range.end - file_range.start) as usize;
        let inside = file_range.start.wrapping_sub(offset) as usize;
        let whole = file_range.start >= offset && inside + length <= from.len();
        if whole && is_aligned(&from[inside..inside + length], lun.alignment()) {
            self.pass(file, &piece.permit)?;
            return lun.write_at(piece.offset + at, &from[inside..inside + length]).map_err(Stop::Failed);
        }
        let chunk = &mut self.bounce[..length];
        lay_over_zeros(chunk, file_range.start, offset, from);
        pass(file, &piece.permit, &*self.now)?;
        lun.write_at(piece.offset + at, &self.bounce[..length]).map_err(Stop::Failed)
    }

    fn read_run(&mut self, file: &SharedFile, run: &Run, into: &mut [u8]) -> Result<(), Stop> {
        let lun = self.lun_of(file, run.lun)?;
        let alignment = lun.alignment();
        self.pass(file, &run.permit)?;
        if is_aligned(into, alignment) && run.offset.is_multiple_of(alignment as u64) {
            lun.read_at(run.offset, into).map_err(Stop::Failed)?;
            return self.pass(file, &run.permit);
        }
        let mut done = 0;
        while done < into.len() {
            let at = run.offset + done as u64;
            let skip = (at % alignment as u64) as usize;
            let count = (into.len() - done).min(self.bounce.len() - skip);
            let span = (skip + count).next_multiple_of(alignment);
            lun.read_at(at - skip as u64, &mut self.bounce[..span]).map_err(Stop::Failed)?;
            into[done..done + count].copy_from_slice(&self.bounce[skip..skip + count]);
            done += count;
        }
        self.pass(file, &run.permit)
    }

    fn write_run(&mut self, file: &SharedFile, run: &Run, from: &[u8]) -> Result<(), Stop> {
        let lun = self.lun_of(file, run.lun)?;
        let alignment = lun.alignment();
        let edge = file.edge(run.file_offset);
        let mut done = 0;
        while done < from.len() {
            let at = run.offset + done as u64;
            let (skip, left) = ((at % alignment as u64) as usize, from.len() - done);
            if skip != 0 || left < alignment {
                let count = (alignment - skip).min(left);
                let _alone = edge.try_write().unwrap_or_else(|_| edge.blocking_write());
                self.pass(file, &run.permit)?;
                let sector = &mut self.bounce[..alignment];
                lun.read_at(at - skip as u64, sector).map_err(Stop::Failed)?;
                sector[skip..skip + count].copy_from_slice(&from[done..done + count]);
                pass(file, &run.permit, &*self.now)?;
                lun.write_at(at - skip as u64, &self.bounce[..alignment]).map_err(Stop::Failed)?;
                done += count;
                continue;
            }
            let whole = left - left % alignment;
            let _shared = edge.try_read().unwrap_or_else(|_| edge.blocking_read());
            if !active(Sabotage::GateAfterWrite) {
                self.pass(file, &run.permit)?;
            }
            if (from[done..].as_ptr() as usize).is_multiple_of(alignment) {
                lun.write_at(at, &from[done..done + whole]).map_err(Stop::Failed)?;
                done += whole;
            } else {
                let count = whole.min(self.bounce.len());
                self.bounce[..count].copy_from_slice(&from[done..done + count]);
                lun.write_at(at, &self.bounce[..count]).map_err(Stop::Failed)?;
                done += count;
            }
        }
        Ok(())
    }

    fn pass(&self, file: &SharedFile, permit: &Permit) -> Result<(), Stop> {
        pass(file, permit, &*self.now)
    }

    /// The device of a raw device mapping, else a member.
    fn lun_of(&mut self, file: &SharedFile, lun: LunIndex) -> Result<Arc<dyn DataLun>, Stop> {
        match file.device() {
            Some(Device::Virtual(device)) => Ok(device.clone()),
            Some(Device::Physical) | None => self.lun(lun),
        }
    }

    fn lun(&mut self, lun: LunIndex) -> Result<Arc<dyn DataLun>, Stop> {
        let known = &mut self.known[usize::from(lun.get())];
        if let Some(data) = known.as_ref().and_then(Weak::upgrade) {
            return Ok(data);
        }
        let data = self.luns.get(lun).ok_or(Stop::MissingLun(lun))?;
        *known = Some(Arc::downgrade(&data));
        Ok(data)
    }
}

fn pass(file: &SharedFile, permit: &Permit, now: &dyn Fn() -> Instant) -> Result<(), Stop> {
    match file.gate_state(permit, now()) {
        GateState::Open => Ok(()),
        closed => Err(Stop::Gate(closed)),
    }
}

fn is_aligned(bytes: &[u8], alignment: usize) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(alignment) && bytes.len().is_multiple_of(alignment)
}

/// Fills `chunk`, which begins at file offset `start`, with `from`, which begins at file offset `offset`, and zeros around it.
pub(crate) fn lay_over_zeros(chunk: &mut [u8], start: u64, offset: u64, from: &[u8]) {
    chunk.fill(0);
    let end = (offset + from.len() as u64).min(start + chunk.len() as u64);
    let begin = offset.max(start);
    if begin < end {
        chunk[(begin - start) as usize..(end - start) as usize]
            .copy_from_slice(&from[(begin - offset) as usize..(end - offset) as usize]);
    }
}
