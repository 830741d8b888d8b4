//! Owns: what is seen at the LUNs: whose data writes take effect on whose blocks, who takes which lock from whom, who claims which slot.
//! Promises: everything it says comes from the bytes of the LUNs alone; the code under test is never asked.
//! Must not know: what hosts were told to do.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use engine::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use engine::format::layout::{ARENA_OFFSET, HEARTBEAT_OFFSET, LunLayout};
use engine::format::root_cell::{HoldMode, Holder, LunSet, ObjectState, RootCell};
use engine::format::table_entry::{EntryKind, TableCell, TableEntry};
use engine::format::{Cell, CellContext, CellKind};
use engine::sim::{HostNo, MemoryDisk, Seen, Watcher};
use engine::units::{CellAddress, Generation, LunIndex, SlotId, SlotRef};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::run::INCARNATIONS;
use super::slots::{Slot, asked_since, illegal, says_the_same};
use super::tell::Teller;

/// Commands kept for a trace.
const KEPT: usize = 4000;

/// What a watched host is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Commands that changed a LUN.
    Changes,
    /// Renewals that landed.
    Renewals,
    /// Slots of others that it has made dirty.
    Takeovers,
}

struct Wait {
    host: HostNo,
    until: Until,
    left: u32,
    told: Arc<Notify>,
}

/// A command that took effect, for traces.
#[derive(Clone, Debug)]
pub struct Effect {
    /// Virtual nanoseconds.
    pub at: u64,
    /// Whose.
    pub host: HostNo,
    /// LUN.
    pub lun: LunIndex,
    /// What, for people.
    pub what: &'static str,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What a changed cell says, in a traced run.
    pub detail: String,
}

#[derive(Clone, Debug, Default)]
struct Lock {
    /// Token of the lock, token of the last break, link of the object, as last seen; none at the first sight.
    seen: Option<Counters>,
    holders: Vec<Holder>,
    /// Hosts that took it at last.
    takers: Vec<HostNo>,
}

/// What grows in a root cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    token: u64,
    unclean: u64,
    link: u64,
    is_free: bool,
    is_shared: bool,
}

/// What is known of one LUN.
#[derive(Clone)]
struct LunView {
    layout: LunLayout,
    blocks: Vec<TableEntry>,
    first_block: u64,
}

/// What is known at the start of a run; made once for each kind of volume.
#[derive(Clone)]
pub struct Start {
    context: CellContext,
    luns: BTreeMap<LunIndex, LunView>,
}

impl Start {
    /// From LUNs that no host uses.
    pub fn of(context: CellContext, layouts: Vec<LunLayout>, disks: &[MemoryDisk]) -> Start {
        let mut luns = BTreeMap::new();
        for (layout, disk) in layouts.into_iter().zip(disks) {
            let mut blocks = Vec::new();
            for nth in 0..layout.table_cell_count() {
                let (at, _, used) = layout.table_cell(nth).expect("below the count");
                let image = disk.peek(at.offset, context.cell_size.bytes());
                let cell = Cell::decode(&context, at, &image).expect("a fresh volume is sound");
                let table = TableCell::decode(context.cell_size, cell.payload()).expect("a fresh volume is sound");
                blocks.extend(table.entries[..used].iter().copied());
            }
            let first_block = layout.table_cell(0).expect("a LUN has blocks").1.get();
            luns.insert(layout.lun, LunView { layout, blocks, first_block });
        }
        Start { context, luns }
    }
}

/// All that was seen in one run.
pub struct Witness {
    clock: Arc<std::sync::atomic::AtomicU64>,
    context: CellContext,
    luns: BTreeMap<LunIndex, LunView>,
    slots: BTreeMap<(LunIndex, SlotId), Slot>,
    locks: BTreeMap<u64, Lock>,
    incarnations: BTreeMap<u64, HostNo>,
    waits: Vec<Wait>,
    /// Names of all changes so far, by cell.
    names: HashSet<(CellAddress, [u8; 16])>,
    /// Pointer cells: whose they are, and what they say besides the names of their changes.
    pointers: BTreeMap<CellAddress, (u64, u32)>,
    /// Numbers of hosts that nothing keeps from renewing.
    undisturbed: BTreeSet<u32>,
    /// How much faster than true the clock of each host runs, in parts per million.
    clocks: Vec<i32>,
    /// In a traced run: tells what cells say.
    teller: Option<Teller>,
    /// Incarnations that are over, of whatever host: one that could not mount may leave a slot behind on a LUN that was lost meanwhile.
    over: BTreeSet<HostNo>,
    /// What broke a promise.
    pub findings: Vec<String>,
    /// The last commands.
    pub effects: VecDeque<Effect>,
    /// Over all commands and their order.
    pub hash: u64,
}

/// The witness, shared by the LUNs of a run.
pub type Shared = Arc<Mutex<Witness>>;

/// Puts a witness beside these LUNs.
pub fn watch(start: Start, clock: Arc<std::sync::atomic::AtomicU64>, disks: &[MemoryDisk]) -> Shared {
    let indexes: Vec<LunIndex> = start.luns.keys().copied().collect();
    let witness = Arc::new(Mutex::new(Witness {
        clock,
        context: start.context,
        luns: start.luns,
        slots: BTreeMap::new(),
        locks: BTreeMap::new(),
        incarnations: BTreeMap::new(),
        waits: Vec::new(),
        names: HashSet::new(),
        pointers: BTreeMap::new(),
        undisturbed: BTreeSet::new(),
        clocks: Vec::new(),
        teller: None,
        over: BTreeSet::new(),
        findings: Vec::new(),
        effects: VecDeque::new(),
        hash: 0,
    }));
    for (lun, disk) in indexes.into_iter().zip(disks) {
        disk.set_watcher(Box::new(OnLun { lun, witness: witness.clone() }));
    }
    witness
}

struct OnLun {
    lun: LunIndex,
    witness: Shared,
}

impl Watcher for OnLun {
    fn seen(&mut self, host: HostNo, seen: Seen<'_>) {
        self.witness.lock().seen(self.lun, host, seen);
    }
}

impl Witness {
    /// Is told when `host` has done so much.
    pub fn tell(&mut self, host: HostNo, until: Until, count: u32) -> Arc<Notify> {
        let told = Arc::new(Notify::new());
        self.waits.push(Wait { host, until, left: count, told: told.clone() });
        told
    }

    /// The effects will say what changed cells hold: for traces.
    pub fn set_traced(&mut self) {
        self.teller = Some(Teller::default());
    }

    /// Nothing happens to these hosts that keeps them from renewing for as long as a lease: nobody may claim their slots.
    pub fn set_undisturbed(&mut self, hosts: BTreeSet<u32>) {
        self.undisturbed = hosts;
    }

    /// How much faster than true the clocks of the hosts run, from number 1 on, in parts per million.
    pub fn set_clocks(&mut self, fast_ppm: Vec<i32>) {
        self.clocks = fast_ppm;
    }

    /// This incarnation renews nothing from now on: its slots may be claimed, each after its lease.
    pub fn note_over(&mut self, host: HostNo) {
        self.over.insert(host);
    }

    /// Mixes a value into the run's hash.
    pub fn mix(&mut self, value: u64) {
        self.hash = (self.hash.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn now(&self) -> u64 {
        self.clock.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn find(&mut self, what: String) {
        if self.findings.len() < 8 {
            let at = self.now() / 1000;
            self.findings.push(format!("at {at} us: {what}"));
        }
    }

    fn count(&mut self, host: HostNo, of: Until) {
        for wait in self.waits.iter_mut().filter(|w| w.host == host && w.until == of && w.left > 0) {
            wait.left -= 1;
            if wait.left == 0 {
                wait.told.notify_one();
            }
        }
        self.waits.retain(|wait| wait.left > 0);
    }

    fn seen(&mut self, lun: LunIndex, host: HostNo, seen: Seen<'_>) {
        let at = self.now();
        let (what, offset, length) = match seen {
            Seen::Read { offset, length, data: false } => ("read", offset, length),
            Seen::Read { offset, length, data: true } => ("read data", offset, length),
            Seen::Write { offset, bytes, data: false } => ("write", offset, bytes.len() as u64),
            Seen::Write { offset, bytes, data: true } => ("write data", offset, bytes.len() as u64),
            Seen::CompareAndWrite { offset, new, wrote: true } => ("change", offset, new.len() as u64),
            Seen::CompareAndWrite { offset, new, wrote: false } => ("miscompare", offset, new.len() as u64),
            Seen::Clear { offset, length } => ("clear", offset, length),
            Seen::Flush => ("flush", 0, 0),
        };
        self.mix(at ^ u64::from(host.0) << 40 ^ (what.len() as u64) << 56);
        self.mix(offset ^ length << 44 ^ u64::from(lun.get()));
        if !matches!(seen, Seen::Read { .. }) {
            if self.effects.len() == KEPT {
                self.effects.pop_front();
            }
            let detail = match (&mut self.teller, &seen) {
                (Some(teller), Seen::CompareAndWrite { offset, new, .. }) => {
                    teller.tell(&self.context, CellAddress { lun, offset: *offset }, new, what == "change")
                }
                _ => String::new(),
            };
            self.effects.push_back(Effect { at, host, lun, what, offset, length, detail });
        }
        match seen {
            Seen::Write { offset, bytes, data } => {
                if !data {
                    self.formatted(lun, host, offset, bytes);
                }
                self.data(lun, host, offset, bytes.len() as u64, false);
                self.count(host, Until::Changes);
            }
            Seen::Clear { offset, length } => {
                self.data(lun, host, offset, length, true);
                self.count(host, Until::Changes);
            }
            Seen::CompareAndWrite { offset, new, wrote: true } => {
                self.changed(CellAddress { lun, offset }, host, new);
                self.count(host, Until::Changes);
            }
            _ => {}
        }
    }

    /// Cells that are written for the first time: from then on compare-and-write changes them, so each needs an image of its own.
    fn formatted(&mut self, lun: LunIndex, host: HostNo, offset: u64, bytes: &[u8]) {
        let size = self.context.cell_size.bytes();
        let at = |nth: usize| CellAddress { lun, offset: offset + (nth * size) as u64 };
        let mut alike = None;
        let mut seen = HashSet::new();
        for (nth, image) in bytes.chunks_exact(size).enumerate() {
            if Cell::decode(&self.context, at(nth), image).is_ok() && !seen.insert(name_of(image)) {
                alike = Some(at(nth));
            }
        }
        if let Some(cell) = alike {
            self.find(format!("{host:?} formats cell {cell} with the name that another cell has"));
        }
    }

    /// Plain bytes change: may this host do that there?
    fn data(&mut self, lun: LunIndex, host: HostNo, offset: u64, length: u64, clears: bool) {
        let verb = if clears { "clears" } else { "writes" };
        let Some(view) = self.luns.get(&lun) else { return };
        let (size, first) = (view.layout.block_size.bytes(), view.first_block);
        let base = engine::units::BlockNo::new(first).and_then(|block| view.layout.block_offset(block)).unwrap_or(0);
        let mut wrong = Vec::new();
        if offset < base {
            wrong.push(format!("{host:?} {verb} {length} bytes at {offset} of {lun}, outside of all blocks"));
        } else {
            for nth in (offset - base) / size..(offset - base + length).div_ceil(size) {
                if let Some(cause) = self.may_not(lun, host, nth as usize, clears) {
                    let block = first + nth;
                    wrong.push(format!("{host:?} {verb} {length} bytes at {offset} of {lun}, block {block}: {cause}"));
                }
            }
        }
        wrong.into_iter().for_each(|cause| self.find(cause));
    }

    fn may_not(&self, lun: LunIndex, host: HostNo, nth: usize, clears: bool) -> Option<String> {
        let entry = self.luns.get(&lun)?.blocks.get(nth)?;
        // Recovery of an incarnation that is gone.
        if clears && entry.kind != EntryKind::Free && self.is_of_the_dead(lun, entry) {
            return None;
        }
        match entry.kind {
            EntryKind::Data | EntryKind::Retiring => {
                let marked = entry.kind == EntryKind::Retiring && self.is_of(lun, entry, host);
                if self.is_shut_out(lun, host) {
                    return Some("its slot was claimed before, and its lease is over".to_owned());
                }
                match self.locks.get(&entry.fd) {
                    _ if marked => None,
                    Some(lock) if lock.takers.contains(&host) => None,
                    Some(lock) => Some(format!(
                        "it belongs to object {:#x}, whose lock was taken by {:?} since",
                        entry.fd, lock.takers
                    )),
                    None => Some(format!("it belongs to object {:#x}, whose lock nobody took", entry.fd)),
                }
            }
            EntryKind::Formatting if self.is_of(lun, entry, host) => None,
            EntryKind::Quarantine => None,
            other => Some(format!("its entry says {other:?}")),
        }
    }

    fn is_of(&self, lun: LunIndex, entry: &TableEntry, host: HostNo) -> bool {
        let slot = self.slots.get(&(lun, entry.slot));
        slot.is_some_and(|slot| slot.owner == host && slot.heartbeat.generation.low() == entry.generation_low)
    }

    fn is_of_the_dead(&self, lun: LunIndex, entry: &TableEntry) -> bool {
        let slot = self.slots.get(&(lun, entry.slot));
        slot.is_some_and(|slot| {
            slot.heartbeat.generation.low() == entry.generation_low && slot.heartbeat.state == SlotState::Dirty
        })
    }

    /// Whether somebody else has claimed the slot of a host on a LUN, and it cannot have a lease there any more. One that is claimed while it
    /// renews, for it does not answer, has its lease until then.
    fn is_shut_out(&self, lun: LunIndex, host: HostNo) -> bool {
        let over = |slot: &Slot| slot.lease_left(&self.clocks, self.now()).is_none();
        let is_over = |slot: &Slot| slot.heartbeat.state != SlotState::Breaking || over(slot);
        let mut slots = self.slots.range((lun, SlotId(0))..=(lun, SlotId(255)));
        slots.any(|(_, slot)| slot.owner == host && slot.claimed && is_over(slot))
    }

    fn changed(&mut self, at: CellAddress, host: HostNo, image: &[u8]) {
        if !self.names.insert((at, name_of(image))) {
            self.find(format!("{host:?} makes an image of cell {at} recur"));
        }
        if at.offset >= ARENA_OFFSET && at.offset < ARENA_OFFSET + (1 << 20) {
            return;
        }
        let Some(kind) = image.get(4).copied().and_then(CellKind::from_stored) else { return };
        if !matches!(kind, CellKind::Heartbeat | CellKind::BlockTable | CellKind::Root | CellKind::PointerBlock) {
            return;
        }
        let cell = match Cell::decode(&self.context, at, image) {
            Ok(cell) => cell,
            Err(cause) => return self.find(format!("{host:?} changes cell {at} to what is no sound cell: {cause}")),
        };
        match kind {
            CellKind::Heartbeat => self.heartbeat(at, host, &cell),
            CellKind::BlockTable => self.table(at, host, &cell),
            CellKind::PointerBlock => self.pointer_cell(at, host, &cell),
            _ => self.root(host, &cell),
        }
    }

    fn heartbeat(&mut self, at: CellAddress, host: HostNo, cell: &Cell) {
        let Ok(heartbeat) = Heartbeat::decode(cell.payload()) else { return };
        let id = (at.lun, SlotId(((at.offset - HEARTBEAT_OFFSET) / 4096) as u8));
        let now = self.now();
        let before = self.slots.get(&id).cloned();
        if let Some(slot) = self.slots.get_mut(&id)
            && slot.owner != host
            && says_the_same(&slot.heartbeat, &heartbeat)
        {
            // A claim in doubt was superseded, or the owner is asked to drop a LUN: no sign of life, no change of it.
            slot.asked = asked_since(slot, &heartbeat, now);
            slot.heartbeat = heartbeat;
            return;
        }
        let joins = heartbeat.state == SlotState::Live
            && before.as_ref().is_none_or(|old| old.heartbeat.generation != heartbeat.generation);
        if joins {
            self.incarnations.insert(heartbeat.incarnation, host);
        }
        if let Some(old) = &before
            && let Some(cause) = illegal(old, host, &heartbeat)
        {
            self.find(format!("{host:?} changes the slot {} of {:?} on {}: {cause}", id.1, old.owner, at.lun));
        }
        if let Some(old) = &before
            && old.heartbeat.state == SlotState::Live
            && old.owner != host
            && self.undisturbed.contains(&(old.owner.0 / INCARNATIONS))
            && !self.over.contains(&old.owner)
        {
            self.find(format!("{host:?} convicts {:?} on {}, to which nothing happened", old.owner, at.lun));
        }
        if let Some(old) = before.as_ref().filter(|old| old.owner != host)
            && let Some(cause) = old.too_early(&heartbeat, &self.clocks, now)
        {
            self.find(format!("{host:?} {cause}: {} of {:?} on {}", id.1, old.owner, at.lun));
        }
        if heartbeat.state == SlotState::Live && before.as_ref().is_some_and(|old| old.owner == host) {
            self.count(host, Until::Renewals);
        }
        if heartbeat.state == SlotState::Dirty && before.as_ref().is_some_and(|old| old.owner != host) {
            self.count(host, Until::Takeovers);
        }
        let owner = if joins { host } else { before.as_ref().map_or(host, |old| old.owner) };
        let claimed = !joins && (owner != host || before.as_ref().is_some_and(|old| old.claimed));
        let renewed_at = before.as_ref().filter(|_| owner != host).map_or(now, |old| old.renewed_at);
        let asked = before.as_ref().and_then(|old| asked_since(old, &heartbeat, now));
        self.slots.insert(id, Slot { heartbeat, owner, claimed, renewed_at, asked });
    }

    fn table(&mut self, at: CellAddress, host: HostNo, cell: &Cell) {
        let Some(view) = self.luns.get_mut(&at.lun) else { return };
        let Ok(table) = TableCell::decode(self.context.cell_size, cell.payload()) else { return };
        let Some(offset) = at.offset.checked_sub(engine::format::layout::TABLE_OFFSET) else { return };
        let nth = offset / self.context.cell_size.bytes() as u64;
        let Some((place, first, used)) = view.layout.table_cell(nth) else { return };
        if place != at {
            return;
        }
        let from = (first.get() - view.first_block) as usize;
        let mut wrong = Vec::new();
        for (old, new) in view.blocks[from..from + used].iter_mut().zip(&table.entries) {
            let may_be_written = matches!(old.kind, EntryKind::Data | EntryKind::Retiring | EntryKind::Formatting);
            if may_be_written && new.kind == EntryKind::Free && is_of_the_unfenced(&self.slots, at.lun, old) {
                wrong.push(format!("{host:?} frees a block of {} on {}, which is not proven fenced", old.slot, at.lun));
            }
            if old.kind == EntryKind::Data && new.kind == EntryKind::Data && (old.fd, old.index) != (new.fd, new.index)
            {
                wrong.push(format!("{host:?} gives a block of object {:#x} to object {:#x}", old.fd, new.fd));
            }
            *old = *new;
        }
        wrong.into_iter().for_each(|cause| self.find(cause));
    }

    fn root(&mut self, host: HostNo, cell: &Cell) {
        let Ok(root) = RootCell::decode(self.context.cell_size, cell.payload()) else { return };
        let Some(fd) = cell.header().owner else { return };
        let (fd, lock_lun) = (fd.get(), fd.lun().get());
        let old = self.locks.remove(&fd).unwrap_or_default();
        let counters = Counters {
            token: root.lock.token.0,
            unclean: root.unclean.token.0,
            link: cell.header().link.0,
            is_free: root.state == ObjectState::Free,
            is_shared: root.lock.mode == HoldMode::Shared,
        };
        self.grow(fd, host, &old, &root, counters);
        let gone: Vec<Holder> = old.holders.iter().filter(|h| !root.lock.holders.contains(h)).copied().collect();
        for holder in gone {
            if self.incarnations.get(&holder.incarnation) == Some(&host) {
                continue;
            }
            if let Some(lun) = self.lives_on(&holder, lock_lun, &root.luns) {
                let victim = self.incarnations.get(&holder.incarnation);
                let cause = format!("{host:?} takes the lock of {fd:#x} from {victim:?}, which lives on {lun}");
                self.find(cause);
            }
        }
        let new: Vec<Holder> = root.lock.holders.iter().filter(|h| !old.holders.contains(h)).copied().collect();
        let mut takers = old.takers;
        if matches!(root.state, ObjectState::Free) {
            takers.clear();
        }
        if !new.is_empty() {
            // Those that held it before still do, in a mode for several.
            takers
                .retain(|taker| root.lock.holders.iter().any(|h| self.incarnations.get(&h.incarnation) == Some(taker)));
            takers.extend(new.iter().filter_map(|h| self.incarnations.get(&h.incarnation)));
        }
        self.locks.insert(fd, Lock { seen: Some(counters), holders: root.lock.holders, takers });
    }

    /// A LUN on which the holder of a lock may still live, if there is one among those that the object may use. One that is over on the
    /// lock's own LUN and has said on any other that it dropped that LUN's locks holds none of them, wherever else it lives.
    fn lives_on(&self, holder: &Holder, lock_lun: u8, luns: &LunSet) -> Option<LunIndex> {
        let may_live: Vec<(LunIndex, &Heartbeat)> = (self.slots.iter())
            .filter(|((lun, _), _)| lun.get() == lock_lun || luns.contains(*lun))
            .filter(|(_, slot)| slot.heartbeat.incarnation == holder.incarnation)
            .filter(|(_, slot)| matches!(slot.heartbeat.state, SlotState::Live | SlotState::Breaking))
            .map(|((lun, _), slot)| (*lun, &slot.heartbeat))
            .collect();
        let has_dropped = |heartbeat: &Heartbeat| {
            heartbeat.state == SlotState::Live && heartbeat.drop_acknowledged && heartbeat.drop_lun == lock_lun
        };
        let excused = may_live.iter().any(|(_, heartbeat)| has_dropped(heartbeat));
        may_live.into_iter().map(|(lun, _)| lun).find(|lun| lun.get() == lock_lun || !excused)
    }

    /// Pointers are changed by the holder of the lock only; others may re-stamp their cells.
    fn pointer_cell(&mut self, at: CellAddress, host: HostNo, cell: &Cell) {
        let Some(fd) = cell.header().owner.map(|fd| fd.get()) else { return };
        let says = checksum(cell.payload());
        let before = self.pointers.insert(at, (fd, says));
        let changes = before.is_some_and(|(of, said)| of == fd && said != says);
        let Some(lock) = self.locks.get(&fd).filter(|_| changes) else { return };
        if !lock.holders.iter().any(|holder| self.incarnations.get(&holder.incarnation) == Some(&host)) {
            self.find(format!("{host:?} changes pointers of {fd:#x}, whose lock it does not hold"));
        }
    }

    /// Tokens and links grow when they have to.
    fn grow(&mut self, fd: u64, host: HostNo, old: &Lock, root: &RootCell, now: Counters) {
        let Some(seen) = old.seen else { return };
        let changes_hands = root.lock.holders.iter().any(|holder| !old.holders.contains(holder));
        if changes_hands && now.token <= seen.token {
            self.find(format!("{host:?} takes the lock of {fd:#x} and leaves its token at {}", now.token));
        }
        let taken_away = !seen.is_shared
            && !now.is_free
            && old.holders.iter().any(|holder| {
                !root.lock.holders.contains(holder) && self.incarnations.get(&holder.incarnation) != Some(&host)
            });
        if taken_away && now.unclean <= seen.unclean {
            self.find(format!("{host:?} takes the lock of {fd:#x} by break and does not mark it unclean"));
        }
        if seen.is_free && !now.is_free && now.link <= seen.link {
            self.find(format!("{host:?} makes a new object of {fd:#x} under link {} of an older one", now.link));
        }
    }

    /// The slots of an incarnation that still say that it lives.
    pub fn live_slots(&self, host: HostNo) -> Vec<(LunIndex, SlotRef)> {
        let live = |(id, slot): (&(LunIndex, SlotId), &Slot)| {
            let generation: Generation = slot.heartbeat.generation;
            (slot.owner == host && slot.heartbeat.state == SlotState::Live)
                .then_some((id.0, SlotRef { slot: id.1, generation }))
        };
        self.slots.iter().filter_map(live).collect()
    }
}

/// The name that a cell's image has of its change (FORMAT.md, section 3: `op_id`).
fn name_of(image: &[u8]) -> [u8; 16] {
    image[0x30..0x40].try_into().expect("a cell's header has 96 bytes")
}

/// FNV-1a: enough to tell a re-stamp from a change.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Whether an entry is of an incarnation that is gone and whose writes may still arrive.
fn is_of_the_unfenced(slots: &BTreeMap<(LunIndex, SlotId), Slot>, lun: LunIndex, entry: &TableEntry) -> bool {
    slots.get(&(lun, entry.slot)).is_some_and(|slot| {
        slot.heartbeat.generation.low() == entry.generation_low
            && slot.heartbeat.state == SlotState::Dirty
            && slot.heartbeat.fence_grade != FenceGrade::A
            && slot.claimed
    })
}
