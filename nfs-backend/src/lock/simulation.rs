//! The lock protocol with many clients, a server whose messages are lost, late and doubled, clients that stand still, are cut off and die, in
//! simulated time. The oracle sees what arrives at the server: no write of one holder after another one has the lock.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::time::{Instant, sleep};

use super::protocol::{Loss, Observed, Store, acquire, release, renew};
use super::record::Owner;
use super::tenure::{Moment, SharedTenure, State, Timing};
use crate::error::NfsError;
use crate::nfs3::{FileHandle, Verifier};

/// How long one run lasts.
const LASTS: Duration = Duration::from_secs(2000);
/// How long a call is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// The latest arrival of a message for whose time nothing is promised.
const VERY_LATE: u64 = 100_000;

struct Random(u64);

impl Random {
    /// splitmix64 (Steele, Lea, Flood).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

struct File {
    fileid: u64,
    bytes: Vec<u8>,
    verifier: Option<Verifier>,
}

struct World {
    random: Random,
    /// By the number that is their handle and never comes again.
    files: BTreeMap<u64, File>,
    names: BTreeMap<String, u64>,
    next: u64,
    /// Who got the lock, in order.
    holders: Vec<u64>,
    tenures: BTreeMap<u64, Rc<SharedTenure>>,
    broken: Vec<String>,
    takeovers: usize,
    writes: usize,
}

#[derive(Clone)]
enum Operation {
    Lookup(String),
    Create(String, Verifier),
    Read(u64),
    Write(u64, Vec<u8>),
    Remove(String),
    Data(u64),
}

enum Reply {
    File(Option<Observed>),
    Bytes(Option<Vec<u8>>),
    Done(bool),
}

fn handle(number: u64) -> FileHandle {
    FileHandle::new(&number.to_be_bytes()).expect("eight bytes are a handle")
}

fn number(handle: &FileHandle) -> u64 {
    u64::from_be_bytes(handle.as_bytes().try_into().expect("a handle of this server"))
}

impl World {
    fn apply(&mut self, operation: &Operation, at: Moment) -> Reply {
        let observed = |number: u64, file: &File| Observed { handle: handle(number), fileid: file.fileid };
        match operation {
            Operation::Lookup(name) => Reply::File(self.names.get(name).map(|n| observed(*n, &self.files[n]))),
            Operation::Create(name, verifier) => {
                if let Some(known) = self.names.get(name) {
                    let file = &self.files[known];
                    return Reply::File((file.verifier == Some(*verifier)).then(|| observed(*known, file)));
                }
                // The lowest number that is free: numbers come again as soon as they can.
                let fileid = (1..).find(|id| self.files.values().all(|file| file.fileid != *id)).unwrap_or(0);
                self.next += 1;
                self.names.insert(name.clone(), self.next);
                let file = File { fileid, bytes: Vec::new(), verifier: Some(*verifier) };
                let reply = observed(self.next, &file);
                self.files.insert(self.next, file);
                Reply::File(Some(reply))
            }
            Operation::Read(number) => Reply::Bytes(self.files.get(number).map(|file| file.bytes.clone())),
            Operation::Write(number, bytes) => Reply::Done(self.files.get_mut(number).is_some_and(|file| {
                (file.bytes, file.verifier) = (bytes.clone(), None);
                true
            })),
            Operation::Remove(name) => {
                if let Some(number) = self.names.remove(name) {
                    self.files.remove(&number);
                }
                Reply::Done(true)
            }
            Operation::Data(holder) => {
                self.writes += 1;
                if self.holders.last() != Some(holder) {
                    self.broken.push(format!(
                        "{at:?}: a write of holder {holder} arrives, the lock is {:?}'s",
                        self.holders.last()
                    ));
                }
                Reply::Done(true)
            }
        }
    }
}

#[derive(Clone)]
struct Client {
    world: Rc<RefCell<World>>,
    begin: Instant,
    cut_until: Rc<Cell<Moment>>,
    tenure: Rc<SharedTenure>,
    timing: Timing,
}

impl Client {
    fn chance<T>(&self, of: impl FnOnce(&mut Random) -> T) -> T {
        of(&mut self.world.borrow_mut().random)
    }

    async fn later(&self, most_ms: u64) {
        let wait = self.chance(|random| random.below(most_ms.max(1)));
        sleep(Duration::from_millis(wait)).await;
    }

    fn apply(&self, operation: &Operation) -> Reply {
        self.world.borrow_mut().apply(operation, self.begin.elapsed())
    }

    /// Applies it some time later, whatever becomes of the client.
    fn apply_later(&self, operation: Operation, most_ms: u64) {
        let client = self.clone();
        tokio::task::spawn_local(async move {
            client.later(most_ms).await;
            client.apply(&operation);
        });
    }

    /// `bound`: the latest arrival after it was sent, in milliseconds.
    async fn call(&self, operation: Operation, repeat: bool, gated: bool, bound: u64) -> Result<Reply, NfsError> {
        let (procedure, server) = ("CALL", String::new());
        if self.chance(|random| random.one_in(60)) {
            // The process stands still, just before it sends.
            self.later(90_000).await;
        }
        let unreachable = || NfsError::Unreachable { procedure, server: String::new(), cause: "cut off".into() };
        if gated && self.tenure.state_at(self.now()) != State::Open {
            sleep(PATIENCE).await;
            return Err(unreachable());
        }
        if self.now() < self.cut_until.get() {
            sleep(PATIENCE).await;
            return Err(unreachable());
        }
        let unknown = Err(NfsError::Unknown { procedure, server, cause: "lost".into() });
        match self.chance(|random| random.below(40)) {
            0 => {
                sleep(PATIENCE).await;
                return unknown;
            }
            1 => {
                self.apply_later(operation, bound);
                sleep(PATIENCE).await;
                return unknown;
            }
            // Sent again over a new connection, while the first one is still on its way.
            2 if repeat => self.apply_later(operation.clone(), bound),
            _ => {}
        }
        self.later(200).await;
        let reply = self.apply(&operation);
        if self.chance(|random| random.one_in(60)) {
            self.later(90_000).await;
        }
        self.later(200).await;
        Ok(reply)
    }

    fn bounded(&self) -> u64 {
        (self.timing.flight + self.timing.margin()).as_millis() as u64 - 1000
    }

    /// Takes the lock, writes, renews, gives it back, for as long as the run lasts.
    async fn live(self, name: u64) {
        let owner = Owner { host: format!("host{name}"), process: name as u32 };
        while self.begin.elapsed() < LASTS {
            self.later(30_000).await;
            let me = Client { tenure: Rc::new(SharedTenure::new()), ..self.clone() };
            let Ok(mut held) = acquire(&me, ".lck-7", &owner, (&me.tenure, &me.timing), |_| {}).await else { continue };
            if me.tenure.state_at(me.now()) != State::Open {
                // It stood still until its right was over, before it used it once.
                continue;
            }
            let id = u64::from_be_bytes(*held.record().incarnation.first_chunk().expect("sixteen are more than eight"));
            {
                let mut world = me.world.borrow_mut();
                let now = me.now();
                if let Some((other, _)) = world.tenures.iter().find(|(_, other)| other.state_at(now) == State::Open) {
                    let text = format!("{now:?}: {id} got the lock while {other} may still write");
                    world.broken.push(text);
                }
                world.takeovers += usize::from(held.file() != ".lck-7");
                world.holders.push(id);
                world.tenures.insert(id, me.tenure.clone());
            }
            let lost = me.hold(&mut held, id).await;
            // From here on it writes nothing, whatever its tenure says.
            me.world.borrow_mut().tenures.remove(&id);
            if !lost {
                let _ = release(&me, &held).await;
            }
            me.tenure.lose("the end");
        }
    }

    /// True: the lock is lost, or the client died.
    async fn hold(&self, held: &mut super::protocol::Held, id: u64) -> bool {
        let until = self.now() + Duration::from_secs(self.chance(|random| random.below(200)));
        let mut next = self.now() + self.timing.renew;
        while self.now() < until {
            sleep(Duration::from_secs(1)).await;
            if self.chance(|random| random.one_in(300)) {
                let length = self.chance(|random| random.below(120));
                self.cut_until.set(self.now() + Duration::from_secs(length));
            }
            if self.chance(|random| random.one_in(300)) {
                return true;
            }
            if self.tenure.state_at(self.now()) == State::Open {
                self.apply_later(Operation::Data(id), self.bounded());
            }
            if self.now() >= next {
                match renew(self, ".lck-7", held, &self.tenure, &self.timing).await {
                    Ok(()) => next = self.now() + self.timing.renew,
                    Err(Loss::Unsure(_)) => {}
                    Err(Loss::Gone(_)) => {
                        self.tenure.lose("gone");
                        return true;
                    }
                }
            }
        }
        // A holder waits for the end of its requests before it gives the lock back.
        sleep(Duration::from_millis(self.bounded())).await;
        false
    }
}

impl Store for Client {
    async fn lookup(&self, name: &str) -> Result<Option<Observed>, NfsError> {
        match self.call(Operation::Lookup(name.into()), true, false, VERY_LATE).await? {
            Reply::File(file) => Ok(file),
            _ => unreachable!("a lookup gives a file"),
        }
    }

    async fn create(&self, name: &str, verifier: Verifier) -> Result<Option<Observed>, NfsError> {
        match self.call(Operation::Create(name.into(), verifier), true, false, VERY_LATE).await? {
            Reply::File(file) => Ok(file),
            _ => unreachable!("a creation gives a file"),
        }
    }

    async fn read(&self, file: &FileHandle) -> Result<Option<Vec<u8>>, NfsError> {
        match self.call(Operation::Read(number(file)), true, false, VERY_LATE).await? {
            Reply::Bytes(bytes) => Ok(bytes),
            _ => unreachable!("a read gives bytes"),
        }
    }

    async fn write(&self, file: &FileHandle, bytes: &[u8]) -> Result<bool, NfsError> {
        match self.call(Operation::Write(number(file), bytes.into()), true, false, VERY_LATE).await? {
            Reply::Done(done) => Ok(done),
            _ => unreachable!("a write is done or not"),
        }
    }

    async fn remove(&self, name: &str, gated: bool) -> Result<(), NfsError> {
        let bound = if gated { self.bounded() } else { VERY_LATE };
        self.call(Operation::Remove(name.into()), false, gated, bound).await.map(drop)
    }

    fn now(&self) -> Moment {
        self.begin.elapsed()
    }

    fn random(&self) -> [u8; 16] {
        self.chance(|random| {
            let halves = [random.next().to_be_bytes(), random.next().to_be_bytes()];
            halves.concat().try_into().expect("two halves")
        })
    }

    fn wall_clock(&self) -> u64 {
        0
    }
}

/// What a run showed: broken rules, times that the lock was had, taken over, and writes.
fn simulate(seed: u64, clients: u64, timing: Timing) -> (Vec<String>, [usize; 3]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime.expect("a runtime needs only memory"), async {
        let world = Rc::new(RefCell::new(World {
            random: Random(seed),
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            next: 0,
            holders: Vec::new(),
            tenures: BTreeMap::new(),
            broken: Vec::new(),
            takeovers: 0,
            writes: 0,
        }));
        let begin = Instant::now();
        let clients: Vec<_> = (0..clients)
            .map(|name| {
                let (cut_until, tenure) = (Rc::new(Cell::new(Duration::ZERO)), Rc::new(SharedTenure::new()));
                let client = Client { world: world.clone(), begin, cut_until, tenure, timing };
                tokio::task::spawn_local(client.live(name))
            })
            .collect();
        for client in clients {
            client.await.expect("a client ends by itself");
        }
        let world = world.borrow();
        (world.broken.clone(), [world.holders.len(), world.takeovers, world.writes])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_disk_never_has_two_writers(seed: u64, clients in 2u64..6) {
        let (broken, _) = simulate(seed, clients, Timing::ESX);
        prop_assert!(broken.is_empty(), "seed {seed}, {clients} clients: {broken:#?}");
    }
}

#[test]
fn locks_are_had_taken_over_and_used_and_the_same_seed_shows_the_same() {
    let runs: Vec<_> = (0..12).map(|seed| simulate(seed, 3, Timing::ESX).1).collect();
    let sum = |of: usize| runs.iter().map(|run| run[of]).sum::<usize>();
    assert!(sum(0) > 60 && sum(1) > 30 && sum(2) > 1000, "{runs:?}");
    assert_eq!(simulate(5, 3, Timing::ESX).1, runs[5]);
}

#[test]
fn the_oracle_notices_a_lock_that_is_broken_too_early() {
    let hasty = Timing { stale: Duration::from_secs(14), ..Timing::ESX };
    let noticed = (0..40).filter(|seed| !simulate(*seed, 3, hasty).0.is_empty()).count();
    assert!(noticed > 0, "no seed shows it");
}
