//! Owns: one host's path to a simulated LUN, with latency and faults.
//! Promises: a command that was sent takes effect even if its host dies; `NotDone` and `OutOfRange` mean that nothing happened.
//! Must not know: what the bytes are.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{Answer, Effect, MemoryDisk};
use super::executor::{HostNo, STORAGE, Sim};
use super::fault::{Fault, FaultRates, Record};
use futures_util::future::join;

use crate::buf::AlignedBuf;
use crate::env::LocalFuture;
use crate::format::header::{DeviceIdentity, LockMode};
use crate::lun::{Compared, DataLun, Fencing, Lun, LunError, LunErrorKind, PathOwner};
use crate::units::{CellSize, SlotId};

/// A sender waits up to this long before it gives up a command whose answer does not come.
const LONGEST_TIMEOUT_MS: u64 = 200;
const LONGEST_LATE: Duration = Duration::from_secs(5);
const LATER_THAN_A_TAKEOVER: Duration = Duration::from_secs(25);

/// One host's path to a [`MemoryDisk`].
pub struct MemoryLun {
    sim: Sim,
    host: HostNo,
    disk: MemoryDisk,
    data: Arc<MemoryData>,
    latency_ns: Cell<(u64, u64)>,
    rates: Cell<FaultRates>,
    longest_late_write: Cell<Duration>,
    script: RefCell<VecDeque<Fault>>,
    when_late: RefCell<Option<Box<dyn Fn()>>>,
}

impl MemoryLun {
    pub(super) fn new(sim: Sim, host: HostNo, disk: MemoryDisk) -> MemoryLun {
        let alignment = disk.cell_size().unwrap_or(CellSize::B512).bytes();
        let data = Arc::new(MemoryData { disk: disk.clone(), host, alignment, path: disk.new_path() });
        MemoryLun {
            sim,
            host,
            disk,
            data,
            latency_ns: Cell::default(),
            rates: Cell::default(),
            longest_late_write: Cell::new(LONGEST_LATE),
            script: RefCell::default(),
            when_late: RefCell::default(),
        }
    }

    /// The storage behind the path.
    pub fn disk(&self) -> &MemoryDisk {
        &self.disk
    }

    /// Each command takes from `shortest` to `longest` to arrive, and as long to be answered.
    pub fn set_latency(&self, shortest: Duration, longest: Duration) {
        self.latency_ns.set((shortest.as_nanos() as u64, longest.as_nanos() as u64));
    }

    /// Faults by chance from now on.
    pub fn set_rates(&self, rates: FaultRates) {
        self.rates.set(rates);
    }

    /// Late commands that are no compare-and-write are late by up to `longest`: what the lease's margin is for.
    pub fn set_longest_late_write(&self, longest: Duration) {
        self.longest_late_write.set(longest.min(LONGEST_LATE));
    }

    /// The next compare-and-write of this path meets `fault`, the one after it the next fault given, and so on.
    pub fn script(&self, fault: Fault) {
        self.script.borrow_mut().push_back(fault);
    }

    /// `told` is called when a compare-and-write of this path begins to be late: the moment at which its sender should die.
    pub fn set_when_late(&self, told: Box<dyn Fn()>) {
        *self.when_late.borrow_mut() = Some(told);
    }

    fn alignment_bytes(&self) -> usize {
        self.disk.cell_size().unwrap_or(CellSize::B512).bytes()
    }

    fn error(&self, kind: LunErrorKind, effect: &Effect, cause: &str) -> LunError {
        error(&self.disk, kind, effect, cause)
    }

    fn some_latency(&self) -> Duration {
        let (low, high) = self.latency_ns.get();
        Duration::from_nanos(self.sim.with_rng(|rng| rng.between(low, high)))
    }

    fn next_fault(&self, effect: &Effect) -> Option<Fault> {
        if matches!(effect, Effect::CompareAndWrite { .. })
            && let Some(fault) = self.script.borrow_mut().pop_front()
        {
            return Some(fault);
        }
        let rates = self.rates.get();
        self.sim.with_rng(|rng| {
            if rng.chance(rates.answer_lost) {
                Some(Fault::AnswerLost)
            } else if rng.chance(rates.command_lost) {
                Some(Fault::CommandLost)
            } else if rng.chance(rates.late) {
                let longest = match effect {
                    // Nothing bounds how late metadata may come: some of it outlives a takeover.
                    Effect::CompareAndWrite { .. } if rng.chance(250) => LATER_THAN_A_TAKEOVER,
                    Effect::CompareAndWrite { .. } => LONGEST_LATE,
                    _ => self.longest_late_write.get(),
                };
                Some(Fault::Late(Duration::from_millis(rng.below(longest.as_millis() as u64))))
            } else if rng.chance(rates.repeated) {
                Some(Fault::Repeated)
            } else if rng.chance(rates.not_done) {
                Some(Fault::NotDone(LunErrorKind::NotDone))
            } else {
                None
            }
        })
    }

    /// Sends a command and waits for what comes back.
    async fn send(&self, effect: Effect) -> Result<Answer, LunError> {
        check_range(&self.disk, self.alignment_bytes(), &effect)?;
        match self.next_fault(&effect) {
            None => self.carry_out(effect, Duration::ZERO).await,
            Some(Fault::Repeated) => {
                self.carry_out(effect.clone(), Duration::ZERO).await?;
                self.carry_out(effect, Duration::ZERO).await
            }
            Some(Fault::NotDone(kind)) => {
                self.sim.sleep(self.some_latency()).await;
                Err(self.error(kind, &effect, "refused by the simulated storage"))
            }
            Some(Fault::AnswerLost) => {
                // The command itself goes its way; a refusal (cut, fenced) is an answer that gets lost too.
                drop(self.carry_out(effect.clone(), Duration::ZERO).await);
                self.give_up(&effect).await
            }
            Some(Fault::CommandLost) => self.give_up(&effect).await,
            Some(Fault::Late(by)) => {
                drop(self.launch(effect.clone(), by));
                if let (Effect::CompareAndWrite { .. }, Some(told)) = (&effect, &*self.when_late.borrow()) {
                    told();
                }
                self.give_up(&effect).await
            }
        }
    }

    async fn give_up(&self, effect: &Effect) -> Result<Answer, LunError> {
        let wait = self.sim.with_rng(|rng| rng.between(1, LONGEST_TIMEOUT_MS));
        self.sim.sleep(Duration::from_millis(wait)).await;
        Err(self.error(LunErrorKind::Unknown, effect, "no answer from the simulated storage"))
    }

    async fn carry_out(&self, effect: Effect, later: Duration) -> Result<Answer, LunError> {
        let answer = self.launch(effect, later).await.expect("the storage's tasks are never killed");
        self.sim.sleep(self.some_latency()).await;
        answer
    }

    /// Puts a command on its way; from here on it does not need its host.
    fn launch(&self, effect: Effect, later: Duration) -> tokio::sync::oneshot::Receiver<Result<Answer, LunError>> {
        let (answered, answer) = tokio::sync::oneshot::channel();
        let (sim, disk, host, path) = (self.sim.clone(), self.disk.clone(), self.host, self.data.path);
        let travel = self.some_latency() + later;
        self.sim.spawn(STORAGE, async move {
            sim.sleep(travel).await;
            while disk.is_stalled() {
                sim.sleep(Duration::from_millis(1)).await;
            }
            // Nobody may be left to hear the answer.
            let _ = answered.send(apply(&disk, host, path, &effect, sim.now()));
        });
        answer
    }

    /// Where a command of `length` bytes is torn, if it is.
    fn tear_at(&self, length: usize) -> Option<usize> {
        let pieces = (length / self.alignment_bytes()) as u64;
        self.sim.with_rng(|rng| {
            (pieces > 1 && rng.chance(self.rates.get().tear))
                .then(|| rng.between(1, pieces - 1) as usize * self.alignment_bytes())
        })
    }

    async fn read_part(&self, offset: u64, length: usize) -> Result<AlignedBuf, LunError> {
        self.read_effect(Effect::Read { offset, length, data: false }).await
    }

    async fn read_effect(&self, effect: Effect) -> Result<AlignedBuf, LunError> {
        match self.send(effect).await? {
            Answer::Bytes(bytes) => Ok(bytes),
            Answer::Done | Answer::Compared(_) => unreachable!("a read answers with bytes"),
        }
    }
}

fn apply(disk: &MemoryDisk, host: HostNo, path: u64, effect: &Effect, at: u64) -> Result<Answer, LunError> {
    let is_plain_change =
        matches!(effect, Effect::Write { .. } | Effect::DataWrite { .. } | Effect::Zero { .. } | Effect::Unmap { .. });
    if is_plain_change && disk.is_revoked(path) {
        return Err(error(disk, LunErrorKind::Fenced, effect, "this incarnation was fenced by a breaker"));
    }
    if let Some(kind) = disk.refusal(host, effect.changes()) {
        return Err(error(disk, kind, effect, "the simulated path of this host is cut or fenced"));
    }
    let (_, offset, length) = effect.describe();
    Ok(disk.apply(effect, |command| Record { at, host, command, offset, length }))
}

fn error(disk: &MemoryDisk, kind: LunErrorKind, effect: &Effect, cause: &str) -> LunError {
    let (command, offset, length) = effect.describe();
    LunError { kind, lun: disk.name().to_owned(), command, offset, length, cause: io::Error::other(cause.to_owned()) }
}

fn check_range(disk: &MemoryDisk, alignment: usize, effect: &Effect) -> Result<(), LunError> {
    let (_, offset, length) = effect.describe();
    let aligned = offset.is_multiple_of(alignment as u64) && length.is_multiple_of(alignment as u64);
    if aligned && offset.checked_add(length).is_some_and(|end| end <= disk.bytes()) {
        return Ok(());
    }
    Err(error(disk, LunErrorKind::OutOfRange, effect, "not aligned, or beyond the end of the simulated LUN"))
}

impl Lun for MemoryLun {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn bytes(&self) -> u64 {
        self.disk.bytes()
    }

    fn cell_size(&self) -> Option<CellSize> {
        self.disk.cell_size()
    }

    fn alignment(&self) -> usize {
        self.alignment_bytes()
    }

    fn identity(&self) -> DeviceIdentity {
        DeviceIdentity::new(self.disk.name().as_bytes())
    }

    fn lock_mode(&self) -> LockMode {
        if self.disk.cell_size().is_some() { LockMode::CompareAndWrite } else { LockMode::SingleMachine }
    }

    fn read(&self, offset: u64, length: usize) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        Box::pin(async move {
            let Some(first) = self.tear_at(length) else { return self.read_part(offset, length).await };
            let mut bytes = AlignedBuf::zeroed(length);
            bytes[..first].copy_from_slice(&self.read_part(offset, first).await?);
            bytes[first..].copy_from_slice(&self.read_part(offset + first as u64, length - first).await?);
            Ok(bytes)
        })
    }

    fn read_strided(
        &self,
        offset: u64,
        length: usize,
        stride: usize,
        count: usize,
    ) -> LocalFuture<'_, Result<AlignedBuf, LunError>> {
        Box::pin(async move {
            let part = |from: usize, to: usize| {
                let offset = offset + (from * stride) as u64;
                self.read_effect(Effect::ReadStrided { offset, length, stride, count: to - from })
            };
            let first = self.tear_at(count * self.alignment_bytes()).map(|at| at / self.alignment_bytes());
            let Some(first) = first else { return part(0, count).await };
            let mut bytes = AlignedBuf::zeroed(count * length);
            bytes[..first * length].copy_from_slice(&part(0, first).await?);
            bytes[first * length..].copy_from_slice(&part(first, count).await?);
            Ok(bytes)
        })
    }

    fn write(&self, offset: u64, data: AlignedBuf) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move {
            let (head, tail) = data.split_at(self.tear_at(data.len()).unwrap_or(data.len()));
            let first = self.send(Effect::Write { offset, bytes: head.to_vec() });
            if tail.is_empty() {
                return first.await.map(drop);
            }
            // Both parts are on their way at once: it was one command.
            let second = self.send(Effect::Write { offset: offset + head.len() as u64, bytes: tail.to_vec() });
            let (first, second) = join(first, second).await;
            first.and(second).map(drop)
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move { self.send(Effect::Flush { data: false }).await.map(drop) })
    }

    fn unmap(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move { self.send(Effect::Unmap { offset, length }).await.map(drop) })
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> LocalFuture<'_, Result<(), LunError>> {
        Box::pin(async move { self.send(Effect::Zero { offset, length }).await.map(drop) })
    }

    fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> LocalFuture<'_, Result<Compared, LunError>> {
        let effect = Effect::CompareAndWrite { offset, expect: expect.to_vec(), new: new.to_vec() };
        Box::pin(async move {
            match self.send(effect).await? {
                Answer::Compared(compared) => Ok(compared),
                Answer::Done | Answer::Bytes(_) => unreachable!("a compare-and-write answers with its comparison"),
            }
        })
    }

    fn data(&self) -> Arc<dyn DataLun> {
        self.data.clone()
    }

    fn fence(&self, victim: PathOwner) -> LocalFuture<'_, Result<Fencing, LunError>> {
        Box::pin(async move {
            self.sim.sleep(self.some_latency()).await;
            let effect = Effect::Flush { data: false };
            match self.disk.refusal(self.host, false) {
                Some(kind) => Err(self.error(kind, &effect, "the simulated path of this host is cut or fenced")),
                None => Ok(self.disk.fence(victim.slot)),
            }
        })
    }
}

/// The data path: no latency, no faults of its own; a cut or fenced path fails it.
struct MemoryData {
    disk: MemoryDisk,
    host: HostNo,
    alignment: usize,
    /// Number among all data paths to this disk.
    path: u64,
}

impl MemoryData {
    fn apply(&self, effect: &Effect) -> Result<Answer, LunError> {
        check_range(&self.disk, self.alignment, effect)?;
        apply(&self.disk, self.host, self.path, effect, 0)
    }
}

impl DataLun for MemoryData {
    fn alignment(&self) -> usize {
        self.alignment
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), LunError> {
        if let Answer::Bytes(bytes) = self.apply(&Effect::Read { offset, length: into.len(), data: true })? {
            into.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), LunError> {
        self.apply(&Effect::DataWrite { offset, bytes: from.to_vec() }).map(drop)
    }

    fn flush(&self) -> Result<(), LunError> {
        self.apply(&Effect::Flush { data: true }).map(drop)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.apply(&Effect::Zero { offset, length }).map(drop)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), LunError> {
        self.apply(&Effect::Unmap { offset, length }).map(drop)
    }

    fn open_descriptor(&self) -> Option<Result<OwnedFd, LunError>> {
        None
    }

    fn hold_drain_byte(&self, slot: SlotId) -> Result<(), LunError> {
        self.disk.mark_path(self.path, slot);
        Ok(())
    }
}
