//! Owns: a SCSI logical unit as a LUN of the file system: the metadata path and the data path.
//! Promises: compare-and-write is the command COMPARE AND WRITE of one block; nothing of it blocks the actor's thread.
//! Must not know: transports, cells.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use scsi::PathData;
use vmfs_core::buf::AlignedBuf;
use vmfs_core::env::LocalFuture;
use vmfs_core::format::header::{DeviceIdentity, LockMode};
use vmfs_core::lun::{Compared, DataLun, Fencing, LentSession, Lun, LunError, LunErrorKind, PathOwner, Reservation};
use vmfs_core::units::{CellSize, SlotId};

use crate::commands;
use crate::device::{COMMAND_TIME, DATA_TIME, Device, Failure, Order, Outcome, Repeat};
use crate::facts;

const COMPARE_AND_WRITE: &str = "compare-and-write";
/// Most bytes that one WRITE SAME zeroes where the unit names no limit: it has to end within a command's time.
const ZEROES: u64 = 256 << 20;
/// Most bytes that one UNMAP gives back where the unit names no limit.
const UNMAPPED: u64 = 4 << 30;

/// A SCSI logical unit.
pub struct ScsiLun {
    device: Arc<Device>,
    cell_size: CellSize,
}

impl ScsiLun {
    /// The LUN behind an open device.
    ///
    /// # Errors
    /// The format has no cells of its block size.
    pub fn new(device: Device) -> Result<ScsiLun, String> {
        let cell_size = match device.block_bytes() {
            512 => CellSize::B512,
            4096 => CellSize::B4096,
            other => return Err(format!("has blocks of {other} bytes; 512 and 4096 are possible")),
        };
        Ok(ScsiLun { device: Arc::new(device), cell_size })
    }

    /// The unit itself.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Runs blocking work off the actor's thread.
    fn blocking<'a, T: Send + 'static>(
        &'a self,
        command: &'static str,
        range: (u64, u64),
        work: impl FnOnce(&Device) -> Result<T, LunError> + Send + 'static,
    ) -> LocalFuture<'a, Result<T, LunError>> {
        let device = self.device.clone();
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || work(&device)).await {
                Ok(result) => result,
                Err(ended) => {
                    Err(self.device.error(command, range, Failure::new(LunErrorKind::Unknown, ended.to_string())))
                }
            }
        })
    }
}

impl Device {
    pub(crate) fn error(&self, command: &'static str, (offset, length): (u64, u64), failure: Failure) -> LunError {
        let cause = io::Error::other(failure.why);
        LunError { kind: failure.kind, lun: self.name.clone(), command, offset, length, cause }
    }

    /// Refuses what the unit does not have before anything is sent.
    fn check(&self, command: &'static str, offset: u64, length: u64, writes: bool) -> Result<(), LunError> {
        let refuse = |kind, why: &str| Err(self.error(command, (offset, length), Failure::new(kind, why)));
        let block = self.block_bytes() as u64;
        if !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return refuse(LunErrorKind::OutOfRange, "not aligned to the LUN's blocks");
        }
        let fits = |bytes: u64| offset.checked_add(length).is_some_and(|end| end <= bytes);
        if !fits(self.bytes()) {
            self.refresh().map_err(|failure| self.error(command, (offset, length), failure))?;
            if !fits(self.bytes()) {
                return refuse(LunErrorKind::OutOfRange, "beyond the end of the LUN; has it become smaller?");
            }
        }
        if writes && self.read_only {
            return refuse(LunErrorKind::NotDone, "the LUN is open for reading only");
        }
        Ok(())
    }

    /// Block number and count of a range that was checked, and is at most as long as a command moves.
    pub(crate) fn blocks(&self, offset: u64, length: u64) -> (u64, u32) {
        let block = self.block_bytes() as u64;
        (offset / block, (length / block) as u32)
    }

    fn read_range(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        let range = (offset, into.len() as u64);
        self.check("read", range.0, range.1, false)?;
        let mut at = offset;
        for piece in into.chunks_mut(self.max_transfer()) {
            let (block, count) = self.blocks(at, piece.len() as u64);
            let (cdb, length) = (commands::read(block, count), piece.len());
            let order = Order { cdb: &cdb, data: PathData::In(piece), repeat: Repeat::Reads, time: DATA_TIME };
            match self.run(order) {
                Ok(Outcome::Done(moved)) if moved == length => {}
                Ok(_) => {
                    let failure = Failure::new(LunErrorKind::NotDone, "fewer bytes came than were asked for");
                    return Err(self.error("read", range, failure));
                }
                Err(failure) => return Err(self.error("read", range, failure)),
            }
            at += length as u64;
        }
        Ok(())
    }

    /// Reads the cell where a volume's header is.
    pub(crate) fn read_head(&self, into: &mut [u8]) -> Result<(), String> {
        if self.bytes() < vmfs_core::format::layout::HEADER_OFFSET + into.len() as u64 {
            // Too small for a volume: nothing is there.
            into.fill(0);
            return Ok(());
        }
        self.read_range(vmfs_core::format::layout::HEADER_OFFSET, into).map_err(|error| error.to_string())
    }

    fn write_range(&self, offset: u64, from: &[u8], durable: bool) -> Result<(), LunError> {
        let range = (offset, from.len() as u64);
        self.check("write", range.0, range.1, true)?;
        let force = durable && self.facts.caching.force_unit_access;
        let mut at = offset;
        for piece in from.chunks(self.max_transfer()) {
            let (block, count) = self.blocks(at, piece.len() as u64);
            let cdb = commands::write(block, count, force);
            let order = Order { cdb: &cdb, data: PathData::Out(piece), repeat: Repeat::Writes, time: DATA_TIME };
            match self.run(order) {
                Ok(Outcome::Done(moved)) if moved == piece.len() => {}
                Ok(_) => {
                    let failure = Failure::new(LunErrorKind::Unknown, "fewer bytes were taken than were sent");
                    return Err(self.error("write", range, failure));
                }
                // What was written before stays written.
                Err(failure) if at > offset => {
                    let kind = if failure.kind == LunErrorKind::Fenced { failure.kind } else { LunErrorKind::Unknown };
                    return Err(self.error("write", range, Failure { kind, ..failure }));
                }
                Err(failure) => return Err(self.error("write", range, failure)),
            }
            at += piece.len() as u64;
        }
        if durable && !force {
            self.synchronize()?;
        }
        Ok(())
    }

    pub(crate) fn synchronize(&self) -> Result<(), LunError> {
        let cdb = commands::synchronize_cache();
        let order = Order { cdb: &cdb, data: PathData::None, repeat: Repeat::Reads, time: DATA_TIME };
        match self.run(order) {
            Ok(_) => Ok(()),
            // Without a cache there is nothing to be written back.
            Err(failure) if failure.unsupported && !self.facts.caching.write_cache => Ok(()),
            Err(failure) => {
                let kind = if failure.kind == LunErrorKind::Fenced { failure.kind } else { LunErrorKind::Unknown };
                Err(self.error("flush", (0, 0), Failure { kind, ..failure }))
            }
        }
    }

    /// One compare-and-write.
    pub(crate) fn compare(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Compared, LunError> {
        let range = (offset, new.len() as u64);
        self.check(COMPARE_AND_WRITE, offset, range.1, true)?;
        if expect.len() != self.block_bytes() || new.len() != expect.len() {
            let failure = Failure::new(LunErrorKind::OutOfRange, "a compare-and-write is one block long");
            return Err(self.error(COMPARE_AND_WRITE, range, failure));
        }
        let force = self.facts.caching.force_unit_access;
        let cdb = commands::compare_and_write(self.blocks(offset, 0).0, force);
        let data = [expect, new].concat();
        let order = Order { cdb: &cdb, data: PathData::Out(&data), repeat: Repeat::Never, time: COMMAND_TIME };
        match self.run(order) {
            Ok(Outcome::Miscompare) => Ok(Compared::Miscompare),
            Ok(Outcome::Done(_)) => {
                if !force {
                    self.synchronize()?;
                }
                Ok(Compared::Written)
            }
            Err(failure) => Err(self.error(COMPARE_AND_WRITE, range, failure)),
        }
    }

    fn give_back(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.check("unmap", offset, length, true)?;
        if !self.facts.provisioning.unmap {
            // The range may read as anything anyway.
            return Ok(());
        }
        let block = self.block_bytes() as u64;
        let most = match self.facts.limits.unmap {
            0 | u32::MAX => UNMAPPED / block,
            blocks => u64::from(blocks),
        };
        let (mut at, end) = (offset / block, (offset + length) / block);
        while at < end {
            let count = (end - at).min(most) as u32;
            let (cdb, list) = commands::unmap(at, count);
            let order = Order { cdb: &cdb, data: PathData::Out(&list), repeat: Repeat::Writes, time: DATA_TIME };
            self.run(order).map_err(|failure| self.error("unmap", (offset, length), failure))?;
            at += u64::from(count);
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.check("write zeroes", offset, length, true)?;
        let block = self.block_bytes() as u64;
        let zeros = AlignedBuf::zeroed(self.max_transfer().min(1 << 20).max(block as usize));
        let told = self.facts.limits.write_same;
        let most = if told == 0 { ZEROES / block } else { told.min(ZEROES / block) };
        // Given back only where that reads as zeros.
        let unmap = self.facts.provisioning.write_same_unmap && self.facts.provisioning.reads_zeros;
        let (mut at, end) = (offset / block, (offset + length) / block);
        while at < end && !self.no_write_same.load(Ordering::Relaxed) {
            let count = (end - at).min(most) as u32;
            let (cdb, data) = (commands::write_same(at, count, unmap), &zeros[..block as usize]);
            let order = Order { cdb: &cdb, data: PathData::Out(data), repeat: Repeat::Writes, time: DATA_TIME };
            match self.run(order) {
                Ok(_) => at += u64::from(count),
                Err(failure) if failure.unsupported => self.no_write_same.store(true, Ordering::Relaxed),
                Err(failure) => return Err(self.error("write zeroes", (offset, length), failure)),
            }
        }
        let mut from = at * block;
        while from < end * block {
            let some = (end * block - from).min(zeros.len() as u64);
            self.write_range(from, &zeros[..some as usize], false)?;
            from += some;
        }
        Ok(())
    }

    fn reservation_error(&self, command: &'static str) -> impl Fn(Failure) -> LunError + '_ {
        move |failure| self.error(command, (0, 0), failure)
    }
}

impl Lun for ScsiLun {
    fn name(&self) -> &str {
        &self.device.name
    }

    fn bytes(&self) -> u64 {
        let bytes = self.device.bytes();
        bytes - bytes % 4096
    }

    fn cell_size(&self) -> Option<CellSize> {
        Some(self.cell_size)
    }

    fn alignment(&self) -> usize {
        self.cell_size.bytes()
    }

    fn identity(&self) -> DeviceIdentity {
        facts::identity(self.device.facts.wwid.as_deref(), self.device.facts.serial.as_deref())
    }

    fn lock_mode(&self) -> LockMode {
        LockMode::CompareAndWrite
    }

    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        self.blocking("read", (offset, length as u64), move |device| {
            let mut buf = AlignedBuf::zeroed(length);
            device.read_range(offset, &mut buf)?;
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("write", (offset, data.len() as u64), move |device| device.write_range(offset, &data, true))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("flush", (0, 0), |device| device.synchronize())
    }

    fn unmap(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("unmap", (offset, length), move |device| device.give_back(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("write zeroes", (offset, length), move |device| {
            device.zero(offset, length)?;
            device.synchronize()
        })
    }

    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>> {
        let (expect, new) = (expect.to_vec(), new.to_vec());
        self.blocking(COMPARE_AND_WRITE, (offset, new.len() as u64), move |device| {
            device.compare(offset, &expect, &new)
        })
    }

    fn data(&self) -> Arc<dyn DataLun> {
        self.device.clone()
    }

    fn mark_paths(&self, owner: PathOwner) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("register", (0, 0), move |device| {
            device.own(owner).map_err(device.reservation_error("registration of this host's paths"))
        })
    }

    fn evict(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("removal of registrations", (0, 0), |device| {
            device.evict().map_err(device.reservation_error("removal of registrations"))
        })
    }

    fn unmark_paths(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let left = self.blocking("unregister", (0, 0), |device| {
                device.disown();
                Ok(())
            });
            // It says itself what stays behind.
            let _ = left.await;
        })
    }

    fn tend(&self) -> LocalFuture<'_, Result<(), LunError>> {
        self.blocking("look at the reservation", (0, 0), |device| {
            device.tend().map_err(device.reservation_error("look at the reservation"))
        })
    }

    fn reservation(&self) -> Option<Reservation> {
        self.device.seen.lock().clone()
    }

    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        self.blocking("fence", (0, 0), move |device| {
            device.shut_out_victim(victim).map_err(device.reservation_error("fence"))
        })
    }
}

impl DataLun for Device {
    fn alignment(&self) -> usize {
        self.block_bytes()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        self.read_range(offset, into)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), LunError> {
        self.write_range(offset, from, false)
    }

    fn flush(&self) -> Result<(), LunError> {
        self.synchronize()
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.zero(offset, length)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.give_back(offset, length)
    }

    /// Of a disk of this machine: the kernel sends its commands by the same port, so who shuts out the port shuts them out.
    fn open_descriptor(&self) -> Option<Result<OwnedFd, LunError>> {
        let opened = self.tenancy.as_ref()?.another(self.own_key());
        Some(opened.map_err(|error| {
            self.error("descriptor for a program", (0, 0), Failure::new(LunErrorKind::NotDone, error.to_string()))
        }))
    }

    fn lend_session(&self) -> Option<Result<LentSession, LunError>> {
        self.lend().map(|lent| lent.map_err(|failure| self.error("session for a program", (0, 0), failure)))
    }

    fn end_session(&self, port: u64, place: Option<&str>) -> Result<(), LunError> {
        self.end_lent(port, place).map_err(|failure| self.error("end of a program's session", (0, 0), failure))
    }

    fn hold_drain_byte(&self, _: SlotId) -> Result<(), LunError> {
        // The end of this path's commands is proven by the storage: its registration is removed and they are aborted.
        Ok(())
    }
}
