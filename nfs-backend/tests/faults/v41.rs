//! NFSv4.1: sessions, and share reservations as the lock, against a server that does all of that wrong.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nfs_backend::datastore::{Directory, Found};
use nfs_backend::error::{NfsError, Status};
use nfs_backend::file::DataFile;
use nfs_backend::lock::{Content, Keeper, KeeperOptions, LockError, MARK, Owner, SharedTenure, State, Timing, who};
use proptest::prelude::*;
use scsi::DataBuffer;

use super::faulty::Fault;
use super::server_v41::{CLOSE, OPEN, READ, REMOVE, TEST_STATEID, TestServer, WRITE};
use super::{BLOCK, FLIGHT, load, open, run};

fn owner(host: &str) -> KeeperOptions {
    KeeperOptions { owner: Owner { host: host.into(), process: 7 }, timing: Timing::ESX }
}

async fn until(tenure: &SharedTenure, state: State) {
    while tenure.state() != state {
        assert!(state == State::Lost || tenure.state() != State::Lost, "lost: {:?}", tenure.cause());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A disk with its lock.
struct Locked {
    file: Rc<DataFile>,
    keeper: Keeper,
}

impl Locked {
    async fn new(server: &TestServer, host: &str) -> Result<Locked, LockError> {
        let (directory, found) = open(server, "disk").await;
        Self::of(&directory, &found, host).await
    }

    async fn of(directory: &Directory, found: &Found, host: &str) -> Result<Locked, LockError> {
        let keeper = Keeper::start(directory, found, owner(host)).await?;
        Ok(Locked { file: Rc::new(keeper.data(directory, found)), keeper })
    }

    async fn write(&self, block: u64, value: u8, durable: bool) -> Result<(), NfsError> {
        self.file.write(block * BLOCK as u64, BLOCK, durable, |_, to| to.fill(value)).await
    }

    async fn give_back(self) {
        let Locked { file, keeper } = self;
        drop(file);
        tokio::task::spawn_blocking(move || drop(keeper)).await.expect("it ends");
    }
}

fn disk() -> TestServer {
    let server = TestServer::start();
    server.put("disk", &[0; 64 * BLOCK]);
    server
}

#[test]
fn replies_that_are_lost_late_and_doubled_change_nothing_by_nfsv41() {
    (21..24).for_each(|seed| load::<TestServer>(seed, false));
}

#[test]
fn no_acknowledged_write_is_lost_or_read_old_over_restarts_of_the_server_by_nfsv41() {
    (31..35).for_each(|seed| load::<TestServer>(seed, true));
}

#[test]
fn a_request_whose_reply_was_lost_is_answered_from_memory_and_not_done_a_second_time() {
    const WRITES: u64 = 40;
    let server = disk();
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        server.plan(|operation, number| match operation {
            WRITE | OPEN | CLOSE | REMOVE if number % 3 == 0 => Fault::CutAfter,
            _ => Fault::None,
        });
        for nth in 0..WRITES {
            file.write(nth * BLOCK as u64, BLOCK, true, |_, to| to.fill(nth as u8)).await.expect("written");
        }
        assert_eq!(server.done(WRITE), WRITES, "each was done once");
        assert!(server.replayed() >= WRITES / 4, "the test is of no use without lost replies");
        // Also what NFSv3 cannot repeat.
        let before = (server.done(OPEN), server.done(REMOVE));
        for nth in 0..6 {
            let name = format!("new{nth}");
            directory.create(&name, 100).await.expect("made once");
            directory.remove(&name).await.expect("removed once");
        }
        assert_eq!((server.done(OPEN) - before.0, server.done(REMOVE) - before.1), (6, 6));
        assert_eq!(server.names(), ["disk"]);
        directory.create("disk", 5).await.expect_err("it is there");
    });
}

#[test]
fn a_share_has_one_holder_who_is_named_and_nothing_is_left_of_it() {
    let server = disk();
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let first = Locked::of(&directory, &found, "esx-a").await.expect("the disk is free");
        first.write(0, 1, false).await.expect("the gate is open");
        let Err(LockError::Held(holder)) = Locked::new(&server, "esx-b").await else { panic!("taken") };
        assert_eq!(holder.record.map(|record| record.host).as_deref(), Some("esx-a"));
        let (holder, content) = who(&directory, &found).await.expect("asked").expect("locked");
        assert!(matches!(content, Content::Record(_)) && holder.to_string().contains("esx-a"));
        // Nobody writes past it: the server does not allow that.
        let file = directory.data(&found.handle, None, FLIGHT);
        let error = file.write(0, BLOCK, true, |_, to| to.fill(9)).await.expect_err("denied");
        assert!(error.is(Status(10012)), "{error}");
        first.give_back().await;
        assert_eq!(server.durable("disk")[0], 1, "what was written went along");
        assert_eq!(server.names(), ["disk"], "no file is left");
        assert_eq!(server.known().1, 0, "nothing is open");
        assert!(who(&directory, &found).await.expect("asked").is_none());
    });
}

#[test]
fn a_lock_outlives_the_server_and_so_does_what_was_acknowledged() {
    let server = disk();
    run(async {
        let locked = Locked::new(&server, "esx-a").await.expect("the disk is free");
        let tenure = locked.keeper.tenure();
        let mut lost = 0;
        for (round, grace) in [(1, true), (2, false), (3, true)] {
            locked.write(0, round, false).await.expect("written");
            lost += u32::from(server.durable("disk")[0] != round);
            server.restart(grace);
            locked.write(1, round, true).await.expect("it waited for the lock");
            locked.file.flush().await.expect("flushed");
            let durable = server.durable("disk");
            assert_eq!((durable[0], durable[BLOCK]), (round, round));
            until(&tenure, State::Open).await;
        }
        assert!(lost > 0, "the test is of no use if the server does not lose anything");
        let Err(LockError::Held(_)) = Locked::new(&server, "esx-b").await else { panic!("taken") };
        locked.give_back().await;
        assert_eq!((server.names(), server.known().1), (vec!["disk".to_owned()], 0));
    });
}

#[test]
fn a_lease_that_ended_is_no_loss_unless_somebody_else_has_had_the_disk() {
    let server = disk();
    run(async {
        let first = Locked::new(&server, "esx-a").await.expect("the disk is free");
        let tenure = first.keeper.tenure();
        first.write(0, 1, true).await.expect("written");
        server.expire(Duration::ZERO);
        first.write(0, 2, true).await.expect("it waited, and nobody was there meanwhile");
        until(&tenure, State::Open).await;

        // Now somebody is, while the holder hears nothing.
        let alone = Arc::new(AtomicU64::new(0));
        let is_alone = alone.clone();
        server.plan(move |operation, _| match operation {
            // Only holders ask for states and write by them before the other has it.
            TEST_STATEID if is_alone.load(Ordering::SeqCst) == 0 => Fault::CutBefore,
            _ => Fault::None,
        });
        until(&tenure, State::Frozen).await;
        server.expire(Duration::ZERO);
        alone.store(1, Ordering::SeqCst);
        // Whoever is first has it; the other one finds that out.
        let second = Locked::new(&server, "esx-b").await;
        match second {
            Ok(second) => {
                second.write(0, 3, true).await.expect("written");
                until(&tenure, State::Lost).await;
                assert!(tenure.cause().unwrap_or_default().contains("esx-b"), "{:?}", tenure.cause());
                second.write(0, 4, true).await.expect("nobody is in the way");
                second.give_back().await;
                assert_eq!(server.durable("disk")[0], 4);
            }
            Err(error) => {
                assert!(matches!(error, LockError::Held(_)), "{error}");
                until(&tenure, State::Open).await;
            }
        }
    });
}

#[test]
fn a_holder_whose_disk_somebody_had_and_gave_back_has_lost_it() {
    let server = disk();
    run(async {
        let first = Locked::new(&server, "esx-a").await.expect("the disk is free");
        let tenure = first.keeper.tenure();
        // The first one's keeper hears nothing at all: its process id tells its requests apart by what they are about.
        server.plan(|operation, _| if operation == TEST_STATEID { Fault::CutBefore } else { Fault::None });
        until(&tenure, State::Frozen).await;
        server.expire(Duration::ZERO);
        // The owner file says what a host that came and went leaves.
        let (directory, _) = open(&server, "disk").await;
        let names: Vec<_> = server.names().into_iter().filter(|name| name.starts_with(".own-")).collect();
        assert_eq!(names.len(), 1);
        directory.remove(&names[0]).await.expect("removed");
        server.plan(|_, _| Fault::None);
        until(&tenure, State::Lost).await;
        assert!(tenure.cause().unwrap_or_default().contains("somebody else has had the disk"));
        let (file, before) = (first.file.clone(), server.done(WRITE));
        let write = tokio::task::spawn_local(async move { file.write(0, BLOCK, true, |_, to| to.fill(9)).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        first.file.server().client().close("the lock is lost");
        assert!(write.await.expect("no panic").is_err());
        assert_eq!((server.done(WRITE), server.durable("disk")[0]), (before, 0), "nothing is written");
    });
}

/// A number in the first block of a disk, which several hosts count up in turns.
struct Count {
    /// The highest that was acknowledged to anybody.
    acknowledged: AtomicU64,
    /// How often some host has had the disk.
    turns: AtomicU64,
    losses: AtomicU64,
}

const GOAL: u64 = 120;
const STEPS_OF_A_TURN: u64 = 12;

/// One turn: takes the disk, counts up, and gives it back or loses it.
async fn take_a_turn(server: &TestServer, host: &str, count: &Count) {
    let locked = match Locked::new(server, host).await {
        Ok(locked) => locked,
        // Somebody has it, or the server was started again or has lost the lease just then.
        Err(error) => {
            assert!(matches!(error, LockError::Held(_) | LockError::Denied(_) | LockError::Nfs { .. }), "{error}");
            return tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    count.turns.fetch_add(1, Ordering::SeqCst);
    let (tenure, file) = (locked.keeper.tenure(), locked.file.clone());
    let ends = tokio::task::spawn_local(async move {
        until(&tenure, State::Lost).await;
        file.server().client().close("the lock is lost");
    });
    let mut own = None;
    for _ in 0..STEPS_OF_A_TURN {
        let least = count.acknowledged.load(Ordering::SeqCst);
        let buffer = DataBuffer::zeroed(8, 1);
        let read = locked.file.read(0, &buffer).await;
        let number = u64::from_be_bytes(*buffer.to_vec().first_chunk().expect("8 bytes"));
        // What was read counts only under the lock; another host may have had the disk, and more, before the read began.
        let is_open = locked.keeper.tenure().state() == State::Open;
        if read.is_err() || locked.keeper.tenure().state() == State::Lost {
            break;
        }
        if !is_open {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        assert!(number >= least, "{host} reads {}, and {least} was acknowledged", number);
        // Whoever has the disk is alone with it, whatever became of his lease meanwhile.
        assert!(own.is_none_or(|own| own == number), "{host} wrote {own:?}, and reads {}", number);
        let next = number + 1;
        let durable = next.is_multiple_of(3);
        let fill = |_: usize, to: &mut [u8]| to.copy_from_slice(&next.to_be_bytes());
        let mut written = locked.file.write(0, 8, durable, fill).await;
        if written.is_ok() && !durable {
            written = locked.file.flush().await;
        }
        if written.is_err() {
            break;
        }
        own = Some(next);
        count.acknowledged.fetch_max(next, Ordering::SeqCst);
    }
    if locked.keeper.tenure().state() == State::Lost {
        count.losses.fetch_add(1, Ordering::SeqCst);
    }
    ends.abort();
    locked.give_back().await;
}

#[test]
fn hosts_that_take_turns_never_undo_what_was_acknowledged_to_another() {
    for seed in [51, 52] {
        let server = disk();
        let count = Count { acknowledged: AtomicU64::new(0), turns: AtomicU64::new(0), losses: AtomicU64::new(0) };
        let mut random = super::Random(seed);
        let last = AtomicU64::new(0);
        let mut faults = super::faults(seed, false);
        server.plan(move |operation, number| match random.below(400) {
            // Now and then it is started again, and some hold their breath for longer than their lease.
            0 if number > last.load(Ordering::SeqCst) + 100 => {
                last.store(number, Ordering::SeqCst);
                Fault::Restart
            }
            1 => Fault::Late(Duration::from_millis(200)),
            _ => faults(operation, number),
        });
        std::thread::scope(|scope| {
            for host in ["esx-a", "esx-b", "esx-c"] {
                let (server, count) = (&server, &count);
                scope.spawn(move || {
                    run(async {
                        while count.acknowledged.load(Ordering::SeqCst) < GOAL {
                            take_a_turn(server, host, count).await;
                        }
                    });
                });
            }
            let (server, count) = (&server, &count);
            scope.spawn(move || {
                let mut seen = 0;
                while count.acknowledged.load(Ordering::SeqCst) < GOAL {
                    std::thread::sleep(Duration::from_millis(100));
                    let now = count.acknowledged.load(Ordering::SeqCst);
                    if now >= seen + 20 {
                        seen = now;
                        server.expire(Duration::from_millis(900 * (now % 2)));
                    }
                }
            });
        });
        let acknowledged = count.acknowledged.load(Ordering::SeqCst);
        let number = u64::from_be_bytes(*server.durable("disk").first_chunk().expect("8 bytes"));
        assert!(number >= acknowledged, "seed {seed}: {number} is there, {acknowledged} was acknowledged");
        let (turns, losses) = (count.turns.load(Ordering::SeqCst), count.losses.load(Ordering::SeqCst));
        println!("seed {seed}: {turns} turns, {losses} losses");
    }
}

#[test]
fn a_request_that_waits_for_the_lock_to_come_back_ends_with_its_disk() {
    let server = disk();
    run(async {
        let locked = Locked::new(&server, "esx-a").await.expect("the disk is free");
        // The keeper hears nothing of the lease's end; the data do.
        server.plan(|operation, _| if operation == TEST_STATEID { Fault::CutBefore } else { Fault::None });
        let file = locked.file.clone();
        server.expire(Duration::ZERO);
        let read = tokio::task::spawn_local(async move { file.read(0, &DataBuffer::zeroed(BLOCK, 1)).await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!read.is_finished(), "it waits for another session");
        locked.file.server().client().close("the machine has ended");
        let error = read.await.expect("no panic").expect_err("it ends");
        assert!(matches!(error, NfsError::Closed { .. }), "{error}");
    });
}

#[test]
fn locks_of_nfsv3_are_not_mixed_with_these() {
    let server = disk();
    run(async {
        let (directory, found) = open(&server, "disk").await;
        directory.server().make_link(directory.handle(), MARK, "nfs3").await.expect("made");
        let Err(error) = Locked::of(&directory, &found, "esx-a").await else { panic!("taken") };
        assert!(matches!(&error, LockError::Version { .. }) && error.to_string().contains("NFSv3"), "{error}");
        assert!(matches!(who(&directory, &found).await, Err(LockError::Version { .. })));
        assert_eq!(server.names(), ["disk"], "nothing was changed");
    });
}

#[test]
fn no_bytes_of_a_server_do_more_than_fail_a_call_by_nfsv41() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
    let server = disk();
    let bytes = prop::collection::vec(any::<u8>(), 0..200);
    runner
        .run(&(bytes, 0usize..3, 0usize..3), |(bytes, kind, of)| {
            run(async {
                server.plan(|_, _| Fault::None);
                let (directory, found) = open(&server, "disk").await;
                let file = directory.data(&found.handle, None, FLIGHT);
                let about = [READ, WRITE, 15][of];
                let mut first = true;
                // A head that is right as far as anybody can say, then anything.
                let words = [0u32, 0, 3, 53, 0].iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
                server.plan(move |called, _| match (called == about && std::mem::take(&mut first), kind) {
                    (true, 0) => Fault::Results(bytes.clone()),
                    (true, 1) => Fault::Results([&words[..], &bytes].concat()),
                    // Whatever it is, the connection is cut behind it in the end.
                    (true, _) => Fault::Bytes([&bytes[..], &[0x80, 0xFF, 0xFF, 0xFF]].concat()),
                    _ => Fault::None,
                });
                match about {
                    READ => drop(file.read(0, &DataBuffer::zeroed(BLOCK, 1)).await),
                    WRITE => drop(file.write(0, BLOCK, true, |_, to| to.fill(5)).await),
                    _ => drop(directory.find("disk").await),
                }
            });
            Ok(())
        })
        .expect("no case fails");
}
