//! Owns: a simulated LUN that all hosts share: bytes, who may reach them, and the record of what was done.
//! Promises: a command takes effect as a whole at one instant.
//! Must not know: latency and lost answers; those belong to a host's path (`MemoryLun`).

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use parking_lot::Mutex;

use super::allowance::Allowance;
use super::executor::{HostNo, Sim};
use super::fault::{Command, Record};
use super::lun::MemoryLun;
use super::store::Store;
use super::watch::{Seen, Watcher};
use crate::buf::AlignedBuf;
use crate::lun::{Compared, Fencing, LunErrorKind};
use crate::units::{CellSize, SlotId};

/// Whether a host reaches the storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathState {
    /// It does.
    #[default]
    Up,
    /// Nothing gets through; the host cannot tell what became of its commands.
    Cut,
    /// The storage refuses the host's commands.
    Fenced,
}

/// The content of a LUN at one time.
pub struct Snapshot(Store);

struct State {
    store: Store,
    bytes: u64,
    paths: BTreeMap<HostNo, PathState>,
    allowances: BTreeMap<HostNo, Allowance>,
    stalled: bool,
    lost: bool,
    records: Option<Vec<Record>>,
    watcher: Option<Box<dyn Watcher>>,
    /// How it fences.
    fencing: Fencing,
    /// Data paths that are marked as a slot's, by their number; revoked ones are refused.
    marked: BTreeMap<u64, SlotId>,
    revoked: BTreeSet<u64>,
    next_path: u64,
}

/// A simulated LUN. Cheap to clone; all clones are the same LUN.
#[derive(Clone)]
pub struct MemoryDisk {
    name: Arc<str>,
    cell_size: Option<CellSize>,
    state: Arc<Mutex<State>>,
}

impl MemoryDisk {
    /// `bytes` of zeros. `cell_size`: the logical block size of a device, or `None` for what behaves like an image file.
    pub fn new(name: &str, bytes: u64, cell_size: Option<CellSize>) -> MemoryDisk {
        let state = State {
            store: Store::default(),
            bytes,
            paths: BTreeMap::new(),
            allowances: BTreeMap::new(),
            stalled: false,
            lost: false,
            records: None,
            watcher: None,
            fencing: Fencing::Proven,
            marked: BTreeMap::new(),
            revoked: BTreeSet::new(),
            next_path: 0,
        };
        MemoryDisk { name: name.into(), cell_size, state: Arc::new(Mutex::new(state)) }
    }

    /// A path of `host` to this LUN, without faults and latency.
    pub fn connect(&self, sim: &Sim, host: HostNo) -> Rc<MemoryLun> {
        Rc::new(MemoryLun::new(sim.clone(), host, self.clone()))
    }

    /// Name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Logical block size, if it behaves like a device.
    pub fn cell_size(&self) -> Option<CellSize> {
        self.cell_size
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.state.lock().bytes
    }

    /// The LUN grows (or shrinks: what was beyond its end comes back when it grows).
    pub fn resize(&self, bytes: u64) {
        self.state.lock().bytes = bytes;
    }

    /// Cuts, fences or restores the path of a host.
    pub fn set_path(&self, host: HostNo, path: PathState) {
        self.state.lock().paths.insert(host, path);
    }

    /// The commands of `host` count against `allowance`; once it is used up nothing of this host gets through.
    pub fn set_allowance(&self, host: HostNo, allowance: &Allowance) {
        self.state.lock().allowances.insert(host, allowance.clone());
    }

    /// What an attempt to fence finds: `Proven` (at first), `NotYet` or `TimeOnly`.
    pub fn set_fencing(&self, fencing: Fencing) {
        self.state.lock().fencing = fencing;
    }

    /// A number for a new data path.
    pub(super) fn new_path(&self) -> u64 {
        let mut state = self.state.lock();
        state.next_path += 1;
        state.next_path
    }

    /// Marks a data path as a slot's.
    pub(super) fn mark_path(&self, path: u64, slot: SlotId) {
        let mut state = self.state.lock();
        state.marked.insert(path, slot);
        state.revoked.remove(&path);
    }

    /// Whether the storage refuses a data path.
    pub(super) fn is_revoked(&self, path: u64) -> bool {
        self.state.lock().revoked.contains(&path)
    }

    /// Refuses all data paths that are marked as this slot's now.
    pub(super) fn fence(&self, slot: SlotId) -> Fencing {
        let mut state = self.state.lock();
        if state.fencing == Fencing::Proven {
            let paths: Vec<u64> = state.marked.iter().filter(|(_, of)| **of == slot).map(|(path, _)| *path).collect();
            state.revoked.extend(paths);
        }
        state.fencing
    }

    /// The LUN is gone for all hosts, or back with what it held.
    pub fn set_lost(&self, lost: bool) {
        self.state.lock().lost = lost;
    }

    /// Commands of all hosts wait while the storage is stalled.
    pub fn set_stalled(&self, stalled: bool) {
        self.state.lock().stalled = stalled;
    }

    /// Whether commands wait.
    pub fn is_stalled(&self) -> bool {
        self.state.lock().stalled
    }

    /// The storage loses power: what was not flushed is kept or lost, cell by cell, by the world's seed.
    pub fn lose_power(&self, sim: &Sim) {
        sim.with_rng(|rng| self.state.lock().store.lose_power(rng));
    }

    /// The content as it is now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.state.lock().store.clone())
    }

    /// Goes back to an earlier content.
    pub fn restore(&self, snapshot: &Snapshot) {
        self.state.lock().store = snapshot.0.clone();
    }

    /// Reads without any host, for assertions.
    pub fn peek(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.state.lock().store.read(offset, &mut bytes);
        bytes
    }

    /// Changes bytes behind everybody's back.
    pub fn damage(&self, offset: u64, bytes: &[u8]) {
        self.state.lock().store.write_through(offset, bytes);
    }

    /// Begins to record commands; what was recorded so far is dropped.
    pub fn start_recording(&self) {
        self.state.lock().records = Some(Vec::new());
    }

    /// The commands that took effect since the last call, and goes on recording.
    pub fn take_records(&self) -> Vec<Record> {
        self.state.lock().records.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Tells `watcher` of every command from now on.
    pub fn set_watcher(&self, watcher: Box<dyn Watcher>) {
        self.state.lock().watcher = Some(watcher);
    }

    /// The error that a command of `host` gets now, if any. One that `changes` something counts against the host's allowance.
    pub(super) fn refusal(&self, host: HostNo, changes: bool) -> Option<LunErrorKind> {
        let state = self.state.lock();
        if state.lost {
            return Some(LunErrorKind::Unknown);
        }
        match state.paths.get(&host).copied().unwrap_or_default() {
            PathState::Up => match state.allowances.get(&host) {
                Some(allowance) if !allowance.spend(changes) => Some(LunErrorKind::Unknown),
                _ => None,
            },
            PathState::Cut => Some(LunErrorKind::Unknown),
            PathState::Fenced => Some(LunErrorKind::Fenced),
        }
    }

    /// Carries out one command. Bytes that are read go to `into`; bytes that are written or compared come from the command.
    pub(super) fn apply(&self, effect: &Effect, record: impl FnOnce(Command) -> Record) -> Answer {
        let mut state = self.state.lock();
        let store = &mut state.store;
        let (command, answer) = match effect {
            Effect::Read { offset, length, data } => {
                let mut bytes = AlignedBuf::zeroed(*length);
                store.read_over_zeros(*offset, &mut bytes);
                (if *data { Command::DataRead } else { Command::Read }, Answer::Bytes(bytes))
            }
            Effect::ReadStrided { offset, length, stride, count } => {
                let mut bytes = AlignedBuf::zeroed(length * count);
                for (nth, piece) in bytes.chunks_exact_mut(*length).enumerate() {
                    store.read_over_zeros(offset + (nth * stride) as u64, piece);
                }
                (Command::Read, Answer::Bytes(bytes))
            }
            Effect::Write { offset, bytes } => {
                store.write_through(*offset, bytes);
                (Command::Write, Answer::Done)
            }
            Effect::DataWrite { offset, bytes } => {
                store.write_back(*offset, bytes);
                (Command::DataWrite, Answer::Done)
            }
            Effect::Flush { data } => {
                store.flush();
                (if *data { Command::DataFlush } else { Command::Flush }, Answer::Done)
            }
            Effect::Zero { offset, length } => {
                store.zero(*offset, *length);
                (Command::WriteZeroes, Answer::Done)
            }
            Effect::Unmap { offset, length } => {
                store.zero(*offset, *length);
                (Command::Unmap, Answer::Done)
            }
            Effect::CompareAndWrite { offset, expect, new } => {
                let mut now = vec![0; expect.len()];
                store.read(*offset, &mut now);
                let wrote = now == *expect;
                if wrote {
                    store.write_through(*offset, new);
                }
                let compared = if wrote { Compared::Written } else { Compared::Miscompare };
                (Command::CompareAndWrite { wrote }, Answer::Compared(compared))
            }
        };
        let record = record(command);
        if let Some(watcher) = &mut state.watcher {
            watcher.seen(record.host, effect.seen(command));
        }
        if let Some(records) = &mut state.records {
            records.push(record);
        }
        answer
    }
}

/// What a command does to the LUN.
#[derive(Clone)]
pub(super) enum Effect {
    Read { offset: u64, length: usize, data: bool },
    ReadStrided { offset: u64, length: usize, stride: usize, count: usize },
    Write { offset: u64, bytes: Vec<u8> },
    DataWrite { offset: u64, bytes: Vec<u8> },
    Flush { data: bool },
    Zero { offset: u64, length: u64 },
    Unmap { offset: u64, length: u64 },
    CompareAndWrite { offset: u64, expect: Vec<u8>, new: Vec<u8> },
}

impl Effect {
    /// Whether it leaves anything on the LUN or makes it durable.
    pub(super) fn changes(&self) -> bool {
        !matches!(self, Effect::Read { .. } | Effect::ReadStrided { .. })
    }

    /// What an observer is told of it.
    fn seen(&self, command: Command) -> Seen<'_> {
        let wrote = command == Command::CompareAndWrite { wrote: true };
        match self {
            Effect::Read { offset, length, data } => {
                Seen::Read { offset: *offset, length: *length as u64, data: *data }
            }
            Effect::ReadStrided { .. } => {
                let (_, offset, length) = self.describe();
                Seen::Read { offset, length, data: false }
            }
            Effect::Write { offset, bytes } => Seen::Write { offset: *offset, bytes, data: false },
            Effect::DataWrite { offset, bytes } => Seen::Write { offset: *offset, bytes, data: true },
            Effect::Flush { .. } => Seen::Flush,
            Effect::Zero { offset, length } | Effect::Unmap { offset, length } => {
                Seen::Clear { offset: *offset, length: *length }
            }
            Effect::CompareAndWrite { offset, new, .. } => Seen::CompareAndWrite { offset: *offset, new, wrote },
        }
    }

    /// Name, offset and length, for errors and records.
    pub(super) fn describe(&self) -> (&'static str, u64, u64) {
        match self {
            Effect::Read { offset, length, .. } => ("read", *offset, *length as u64),
            Effect::ReadStrided { offset, length, stride, count } => {
                ("read", *offset, (count.saturating_sub(1) * stride + length) as u64)
            }
            Effect::Write { offset, bytes } | Effect::DataWrite { offset, bytes } => {
                ("write", *offset, bytes.len() as u64)
            }
            Effect::Flush { .. } => ("flush", 0, 0),
            Effect::Zero { offset, length } => ("write zeroes", *offset, *length),
            Effect::Unmap { offset, length } => ("unmap", *offset, *length),
            Effect::CompareAndWrite { offset, new, .. } => ("compare-and-write", *offset, new.len() as u64),
        }
    }
}

/// What a command answers.
pub(super) enum Answer {
    Done,
    Bytes(AlignedBuf),
    Compared(Compared),
}
