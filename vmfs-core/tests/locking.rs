//! A property of locking under random interleavings: whatever hosts, pauses, deaths, breaks and hand-overs come together, a disk has one
//! writer at a time, and what it was told is written is there for the next one.
//!
//! The oracle is a register in the disk's first sector. A write counts from the moment it was called until it was answered; one that was
//! refused or whose host died meanwhile may have happened or not. Reads and writes under the lock must then be linearizable (checked by
//! search, as Wing and Gong 1993 describe), and no two hosts may ever believe that they have the disk open for writing with an open gate.

mod names_support;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use names_support::*;
use proptest::prelude::*;
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::disk::{self, DiskSpec};
use vmfs_core::error::FsErrorKind;
use vmfs_core::file::{HandOver, OpenFile, OpenMode, Resolved, WriteSegment};
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::gate::GateState;
use vmfs_core::sim::{HostNo, MemoryDisk, Sim};
use vmfs_core::units::CellSize;
use vmfs_core::volume::Volume;

const SECTOR: usize = 512;

/// What a host does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Opens for writing.
    Acquire,
    /// Opens for reading: a shared lock.
    Share,
    /// Closes what it has open.
    Release,
    /// From a shared lock to the exclusive one (a disk is closed in between: its lock has no other way).
    Upgrade,
    /// Writes a new value and flushes it.
    Write,
    /// Reads the value.
    Read,
    /// Asks for the lock to be broken, as the lease allows.
    Break,
    /// Breaks it on the word that the holder is down: it is killed first, so that the word is true.
    Attest,
    /// Hands the disk over to the next host.
    HandOver,
    /// Stands still for so many seconds.
    Pause(u8),
    /// Dies.
    Crash,
    /// Lets so many tenths of a second go by.
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Acquire),
        2 => Just(Step::Share),
        4 => Just(Step::Release),
        2 => Just(Step::Upgrade),
        10 => Just(Step::Write),
        5 => Just(Step::Read),
        2 => Just(Step::Break),
        1 => Just(Step::Attest),
        3 => Just(Step::HandOver),
        2 => (1u8..40).prop_map(Step::Pause),
        1 => Just(Step::Crash),
        5 => (1u8..80).prop_map(Step::Wait),
    ]
}

/// One operation on the register: a value written (`write`) or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    write: bool,
    value: u64,
    called: u64,
    /// `None`: it may have happened, before `latest`.
    answered: Option<u64>,
    /// When another host had the lock: nothing of this one comes after that.
    latest: u64,
}

/// Whether some order of the events, each between its call and its answer, explains every value that was read.
fn is_linearizable(events: &[Event]) -> bool {
    assert!(events.len() <= 128, "the search remembers sets of events as bits");
    let must: u128 = (0..events.len()).filter(|n| events[*n].answered.is_some()).map(|n| 1u128 << n).sum();
    let mut seen: HashSet<(u128, u64)> = HashSet::new();
    let mut open = vec![(0u128, 0u64)];
    while let Some((done, value)) = open.pop() {
        if done & must == must {
            return true;
        }
        // The next one was called before every event that is not placed yet was answered.
        let pending = || (0..events.len()).filter(|n| done >> n & 1 == 0);
        let first_answer = pending().filter_map(|n| events[n].answered).min().unwrap_or(u64::MAX);
        let reached = (0..events.len()).filter(|n| done >> n & 1 == 1).map(|n| events[n].called).max().unwrap_or(0);
        let may_be_next = |n: &usize| events[*n].called <= first_answer && reached <= events[*n].latest;
        for n in pending().filter(may_be_next) {
            let event = events[n];
            let next = match event.write {
                true => (done | 1 << n, event.value),
                false if event.value == value => (done | 1 << n, value),
                false => continue,
            };
            if seen.insert(next) {
                open.push(next);
            }
        }
    }
    false
}

#[test]
fn the_oracle_knows_a_lost_write_and_a_stale_read() {
    let write = |value, called, answered| Event { write: true, value, called, answered, latest: u64::MAX };
    let read = |value, called, answered| Event { write: false, answered: Some(answered), ..write(value, called, None) };
    assert!(is_linearizable(&[write(1, 0, Some(5)), read(1, 6, 7), write(2, 8, Some(9)), read(2, 10, 11)]));
    assert!(!is_linearizable(&[write(1, 0, Some(5)), write(2, 6, Some(7)), read(1, 8, 9)]), "a lost write");
    assert!(!is_linearizable(&[write(1, 0, Some(5)), read(0, 6, 7)]), "a stale read");
    assert!(is_linearizable(&[write(1, 0, None), read(0, 6, 7), read(1, 8, 9)]), "one without an answer comes late");
    assert!(!is_linearizable(&[write(1, 0, None), read(1, 6, 7), read(0, 8, 9)]), "and does not go away again");
    let late = Event { latest: 5, ..write(1, 0, None) };
    assert!(is_linearizable(&[late, read(1, 6, 7)]), "in time");
    assert!(!is_linearizable(&[late, write(2, 6, Some(7)), read(1, 8, 9)]), "after the lock was another's");
    assert!(
        is_linearizable(&[write(1, 0, Some(9)), write(2, 1, Some(8)), read(1, 10, 11)]),
        "side by side: either order"
    );
}

struct Host {
    number: u32,
    volume: Volume,
    open: RefCell<Option<(Arc<OpenFile>, bool)>>,
}

struct World {
    sim: Sim,
    disk: ObjectRef,
    hosts: Vec<Rc<Host>>,
    dead: RefCell<BTreeSet<u32>>,
    events: RefCell<Vec<Event>>,
    next_value: RefCell<u64>,
    outcomes: RefCell<BTreeMap<&'static str, u32>>,
}

impl World {
    fn count(&self, what: &'static str) {
        *self.outcomes.borrow_mut().entry(what).or_default() += 1;
    }

    fn is_dead(&self, number: u32) -> bool {
        self.dead.borrow().contains(&number)
    }

    fn kill(&self, number: u32) {
        if self.dead.borrow_mut().insert(number) {
            self.sim.kill(HostNo(number));
            self.count("crash");
        }
    }

    /// No two hosts that could submit a write now: they have the lock by their own knowledge, and their gate is open.
    fn check_one_writer(&self) {
        let can_write = |host: &&Rc<Host>| {
            let open = host.open.borrow();
            let Some((file, true)) = open.as_ref() else { return false };
            let now = self.sim.now();
            match file.write_segment(0, SECTOR as u64) {
                WriteSegment::Data(run) => {
                    file.gate_state(&run.permit, vmfs_core::env::Instant(now)) == GateState::Open
                }
                WriteSegment::Need(_) => false,
            }
        };
        let writers: Vec<u32> = self
            .hosts
            .iter()
            .filter(|host| !self.is_dead(host.number))
            .filter(can_write)
            .map(|host| host.number)
            .collect();
        assert!(writers.len() <= 1, "hosts {writers:?} can write at once");
    }

    async fn write(&self, host: &Host) {
        let Some(file) = host.open.borrow().as_ref().filter(|(_, writes)| *writes).map(|(file, _)| file.clone()) else {
            return;
        };
        let value = {
            let mut next = self.next_value.borrow_mut();
            *next += 1;
            *next
        };
        let place = {
            let mut events = self.events.borrow_mut();
            events.push(Event { write: true, value, called: self.sim.now(), answered: None, latest: u64::MAX });
            events.len() - 1
        };
        let mut sector = vec![value as u8; SECTOR];
        sector[..8].copy_from_slice(&value.to_le_bytes());
        let written = host.volume.files().write(&file, 0, &sector).await;
        if matches!(written, Ok(SECTOR)) && host.volume.flush(&file).await.is_ok() {
            self.events.borrow_mut()[place].answered = Some(self.sim.now());
            self.count("write");
        }
    }

    async fn read(&self, host: &Host) {
        let Some(file) = host.open.borrow().as_ref().map(|(file, _)| file.clone()) else { return };
        let called = self.sim.now();
        let Ok(bytes) = host.volume.files().read(&file, 0, SECTOR).await else { return };
        assert_eq!(bytes.len(), SECTOR);
        let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(bytes[8..].iter().all(|byte| *byte == value as u8), "a torn sector: {bytes:?}");
        let answered = Some(self.sim.now());
        self.events.borrow_mut().push(Event { write: false, value, called, answered, latest: u64::MAX });
        self.count("read");
    }

    async fn acquire(&self, host: &Host, mode: OpenMode) {
        if host.open.borrow().is_some() {
            return;
        }
        match host.volume.open(self.disk, mode).await {
            Ok(file) => {
                self.has_the_lock();
                *host.open.borrow_mut() = Some((file, mode.write));
                self.count(if mode.write { "acquired" } else { "shared" });
            }
            Err(error) => {
                assert!(matches!(error.kind(), FsErrorKind::Busy | FsErrorKind::Fenced | FsErrorKind::Io), "{error}")
            }
        }
    }

    /// A host has just got the lock, with nobody beside it who may write: what others sent and was not answered has happened or never will.
    fn has_the_lock(&self) {
        let now = self.sim.now();
        let mut events = self.events.borrow_mut();
        events
            .iter_mut()
            .filter(|event| event.answered.is_none())
            .for_each(|event| event.latest = event.latest.min(now));
    }

    async fn release(&self, host: &Host) {
        let open = host.open.borrow_mut().take();
        if let Some((file, _)) = open
            && host.volume.close(file).await.is_ok()
        {
            self.count("released");
        }
    }

    async fn hand_over(&self, host: &Host) {
        let Some((file, true)) = host.open.borrow().clone() else { return };
        let to = &self.hosts[host.number as usize % self.hosts.len()];
        let Ok(holder) = to.volume.holder_for(self.disk) else { return };
        match host.volume.hand_over(&file, holder).await {
            Err(_) => return,
            Ok(HandOver::Done) => {}
            Ok(HandOver::Unresolved(mut unresolved)) => loop {
                match host.volume.files().resolve_hand_over(unresolved).await {
                    Ok(Resolved::Source(_)) => return,
                    Ok(Resolved::Destination) => break,
                    Err((_, error)) if error.kind() == FsErrorKind::Fenced => return,
                    Err((again, _)) => unresolved = again,
                }
                self.sim.sleep(Duration::from_millis(500)).await;
            },
        }
        *host.open.borrow_mut() = None;
        self.count("handed over");
        if self.is_dead(to.number) || to.open.borrow().is_some() {
            return;
        }
        // The destination's part runs on the destination.
        let (accepting, disk) = (to.clone(), self.disk);
        self.has_the_lock();
        let accepted = self.sim.spawn(HostNo(to.number), async move {
            if let Ok(file) = accepting.volume.accept(disk).await {
                *accepting.open.borrow_mut() = Some((file, true));
            }
        });
        accepted.join().await;
    }

    async fn carry_out(&self, host: &Host, step: Step) {
        match step {
            Step::Acquire => self.acquire(host, OpenMode::WRITE).await,
            Step::Share => self.acquire(host, OpenMode::READ).await,
            Step::Release => self.release(host).await,
            Step::Upgrade => {
                if matches!(&*host.open.borrow(), Some((_, false))) {
                    self.release(host).await;
                    self.acquire(host, OpenMode::WRITE).await;
                }
            }
            Step::Write => self.write(host).await,
            Step::Read => self.read(host).await,
            Step::Break => {
                if host.volume.break_lock(self.disk, None).await.is_ok() {
                    self.count("broken");
                }
            }
            Step::Attest => {
                let Ok(why) = host.volume.why_locked(self.disk).await else { return };
                let Some(holder) = why.holders.iter().find(|holder| !holder.own) else { return };
                let Some(owner) = holder.host.as_ref().map(|owner| owner.name.clone()) else { return };
                // The slot of one that has gone in good order has no name any more: there is nobody to vouch for.
                let Ok(number) = owner.trim_start_matches("host").parse() else { return };
                self.kill(number);
                if host.volume.break_lock(self.disk, Some(&owner)).await.is_ok() {
                    self.count("attested");
                }
            }
            Step::HandOver => self.hand_over(host).await,
            Step::Wait(tenths) => self.sim.sleep(Duration::from_millis(u64::from(tenths) * 100)).await,
            Step::Pause(_) | Step::Crash => unreachable!("they are done to a host, not by it"),
        }
    }
}

async fn make_disk(volume: &Volume) -> ObjectRef {
    let spec = DiskSpec {
        size: 1 << 20,
        format: DiskFormat::EagerZeroedThick,
        adapter: AdapterType::LsiLogic,
        multi_writer: false,
        mode: 0o600,
        uid: 0,
        gid: 0,
    };
    disk::create(volume, volume.root(), b"d.vmdk", spec, &mut |_| {}).await.unwrap();
    volume.lookup(volume.root(), b"d-flat.vmdk").await.unwrap().object
}

/// Runs the hosts' steps side by side; gives how often what happened.
fn run(seed: u64, luns: usize, plans: &[Vec<Step>]) -> BTreeMap<&'static str, u32> {
    let (sim, disks) = world(seed, luns, CellSize::B512);
    let outcomes = sim.block_on(async {
        let mut hosts = Vec::new();
        for number in 1..=plans.len() as u32 {
            let volume = mount_slow(&sim, &disks, number).await;
            hosts.push(Rc::new(Host { number, volume, open: RefCell::default() }));
        }
        let disk = make_disk(&hosts[0].volume).await;
        let world = Rc::new(World {
            sim: sim.clone(),
            disk,
            hosts,
            dead: RefCell::default(),
            events: RefCell::default(),
            next_value: RefCell::default(),
            outcomes: RefCell::default(),
        });
        let mut drivers = Vec::new();
        for (host, plan) in world.hosts.iter().zip(plans) {
            drivers.push(drive(world.clone(), host.clone(), plan.clone()));
        }
        let watch = async {
            loop {
                world.check_one_writer();
                sim.sleep(Duration::from_millis(37)).await;
            }
        };
        let all = std::pin::pin!(futures_util::future::join_all(drivers));
        futures_util::future::select(all, std::pin::pin!(watch)).await;
        finish(&sim, &disks, &world).await;
        let events = world.events.borrow();
        assert!(is_linearizable(&events), "seed {seed}: no order explains {events:#?}");
        world.outcomes.borrow().clone()
    });
    sim.end();
    outcomes
}

/// A host's steps, each as a task of that host; pauses and deaths are done from outside.
async fn drive(world: Rc<World>, host: Rc<Host>, plan: Vec<Step>) {
    let sim = world.sim.clone();
    for step in plan {
        if world.is_dead(host.number) {
            return;
        }
        match step {
            Step::Crash => return world.kill(host.number),
            Step::Pause(seconds) => {
                sim.pause(HostNo(host.number));
                sim.sleep(Duration::from_secs(seconds.into())).await;
                sim.resume(HostNo(host.number));
                world.count("pause");
            }
            _ => {
                let (at_work, by) = (world.clone(), host.clone());
                sim.spawn(HostNo(host.number), async move { at_work.carry_out(&by, step).await }).join().await;
            }
        }
        sim.sleep(Duration::from_millis(3)).await;
    }
}

/// A new host takes the disk from whoever still has it, and reads what is there: nothing that was told durable is lost.
async fn finish(sim: &Sim, disks: &[MemoryDisk], world: &World) {
    for host in &world.hosts {
        world.kill(host.number);
    }
    let (volume, _) = mount(sim, disks, 50).await;
    let last = Host { number: 50, volume, open: RefCell::default() };
    let began = sim.now();
    while last.open.borrow().is_none() {
        world.acquire(&last, OpenMode::WRITE).await;
        assert!(sim.now() - began < 200_000_000_000, "the lock of dead hosts is never had");
        sim.sleep(Duration::from_secs(1)).await;
    }
    world.read(&last).await;
    world.release(&last).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_has_one_writer_and_loses_nothing_whatever_comes_together(
        seed in 0u64..1 << 40,
        luns in 1usize..3,
        plans in proptest::collection::vec(proptest::collection::vec(step(), 4..20), 2..=5),
    ) {
        run(seed, luns, &plans);
    }
}

#[test]
fn the_random_steps_reach_everything_that_they_are_to_try() {
    let mut all: BTreeMap<&'static str, u32> = BTreeMap::new();
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let plans = proptest::collection::vec(proptest::collection::vec(step(), 10..20), 3..=4);
    for seed in 0..14 {
        let drawn = proptest::strategy::ValueTree::current(&plans.new_tree(&mut runner).unwrap());
        for (what, count) in run(seed, 1 + seed as usize % 2, &drawn) {
            *all.entry(what).or_default() += count;
        }
    }
    for what in ["acquired", "shared", "released", "write", "read", "handed over", "pause", "crash", "attested"] {
        assert!(all.get(what).is_some_and(|count| *count > 0), "{what} never happened: {all:?}");
    }
}
