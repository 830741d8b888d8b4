//! The client against a server that loses, delays and doubles replies, is started again, is full, forgets files and lies.

mod faulty;
mod server;
mod server_v41;
mod v41;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use faulty::Fault;
use nfs_backend::datastore::{DatastoreError, Directory, Found};
use nfs_backend::error::{NfsError, Status};
use nfs_backend::lock::{Keeper, KeeperOptions, LockError, LockFiles, MARK, Owner, State, Timing};
use nfs_backend::remote::Remote;
use nfs_backend::url::Url;
use proptest::prelude::*;
use scsi::DataBuffer;
use server::{COMMIT, CREATE, LOOKUP, READ, REMOVE, SYMLINK, TestServer, WRITE};

/// Nothing that a test waits for takes as long.
const PATIENCE: Duration = Duration::from_secs(120);
const FLIGHT: Duration = Duration::from_secs(20);
const BLOCK: usize = 4096;

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async { tokio::time::timeout(PATIENCE, work).await.expect("it ends") })
}

/// A server that a test tells what to do wrong.
trait Faulty {
    fn start() -> Self;
    fn put(&self, name: &str, content: &[u8]);
    fn url(&self, name: &str) -> String;
    fn plan(&self, plan: impl FnMut(u32, u64) -> Fault + Send + 'static);
    fn durable(&self, name: &str) -> Vec<u8>;
}

macro_rules! faulty {
    ($server:ty) => {
        impl Faulty for $server {
            fn start() -> Self {
                Self::start()
            }
            fn put(&self, name: &str, content: &[u8]) {
                self.put(name, content);
            }
            fn url(&self, name: &str) -> String {
                self.url(name)
            }
            fn plan(&self, plan: impl FnMut(u32, u64) -> Fault + Send + 'static) {
                self.plan(plan);
            }
            fn durable(&self, name: &str) -> Vec<u8> {
                self.durable(name)
            }
        }
    };
}

faulty!(TestServer);
faulty!(server_v41::TestServer);

async fn open(server: &impl Faulty, name: &str) -> (Directory, Found) {
    let directory =
        Directory::open(&server.url(name).parse::<Url>().expect("a URL")).await.expect("the export is there");
    let found = directory.find(name).await.expect("the file is there");
    (directory, found)
}

/// A small generator: the tests need no good one.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

fn faults(seed: u64, restarts: bool) -> impl FnMut(u32, u64) -> Fault + Send {
    let mut random = Random(seed);
    move |_, _| match random.below(120) {
        0 => Fault::CutBefore,
        1 => Fault::CutAfter,
        2 | 3 => Fault::Late(Duration::from_millis(30)),
        4 | 5 => Fault::Twice,
        6 | 7 => Fault::Status(Status::JUKEBOX.0),
        8 if restarts => Fault::Restart,
        _ => Fault::None,
    }
}

/// Many writers and readers of one file, whatever the server does. Every block is written by one task, which checks what it reads. Flushed
/// blocks are durable.
fn load<S: Faulty>(seed: u64, restarts: bool) {
    const TASKS: usize = 12;
    const BLOCKS: usize = 8;
    let server = S::start();
    server.put("disk", &vec![0; TASKS * BLOCKS * BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = Rc::new(directory.data(&found.handle, None, FLIGHT));
        server.plan(faults(seed, restarts));
        let content = Rc::new(RefCell::new(vec![0u8; TASKS * BLOCKS]));
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (file, content) = (file.clone(), content.clone());
                tokio::task::spawn_local(async move {
                    let mut random = Random(seed ^ (task as u64) << 40);
                    for round in 1..30u8 {
                        let block = task * BLOCKS + random.below(BLOCKS as u64) as usize;
                        let at = (block * BLOCK) as u64;
                        match random.below(8) {
                            0 => file.flush().await.expect("flushed"),
                            1 | 2 => {
                                let expected = content.borrow()[block];
                                let read = DataBuffer::from_bytes(&[0xEE; BLOCK]);
                                file.read(at, &read).await.expect("read");
                                assert!(read.to_vec().iter().all(|byte| *byte == expected), "block {block} is old");
                            }
                            kind => {
                                file.write(at, BLOCK, kind == 3, |_, to| to.fill(round)).await.expect("written");
                                content.borrow_mut()[block] = round;
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("no task fails");
        }
        file.flush().await.expect("flushed");
        assert_eq!(file.unsettled(), 0);
        let durable = server.durable("disk");
        for (block, expected) in content.borrow().iter().enumerate() {
            let found = &durable[block * BLOCK..(block + 1) * BLOCK];
            assert!(found.iter().all(|byte| byte == expected), "block {block} should hold {expected}: {}", found[0]);
        }
    });
}

#[test]
fn replies_that_are_lost_late_and_doubled_change_nothing() {
    (1..5).for_each(|seed| load::<TestServer>(seed, false));
}

#[test]
fn no_acknowledged_write_is_lost_or_read_old_over_restarts_of_the_server() {
    (11..16).for_each(|seed| load::<TestServer>(seed, true));
}

#[test]
fn a_restart_between_write_and_commit_makes_the_client_write_again() {
    let server = TestServer::start();
    server.put("disk", &[0; 4 * BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        for (nth, value) in [(0, 1), (1, 2), (0, 3)] {
            file.write(nth * BLOCK as u64, BLOCK, false, |_, to| to.fill(value)).await.expect("written");
        }
        // Durable, but it must not be covered by what comes before it.
        file.write(BLOCK as u64, BLOCK, true, |_, to| to.fill(4)).await.expect("written");
        assert_eq!(server.durable("disk")[0], 0, "the test is of no use if the server does not lose it");
        server.restart();
        file.flush().await.expect("flushed");
        let durable = server.durable("disk");
        assert_eq!((durable[0], durable[BLOCK - 1], durable[BLOCK]), (3, 3, 4));
        let before = server.seen(COMMIT);
        file.flush().await.expect("nothing to do");
        assert_eq!(server.seen(COMMIT), before);
    });
}

#[test]
fn a_commit_that_fails_is_not_made_good_by_the_next_one_that_does_not() {
    let server = TestServer::start();
    server.put("disk", &[0; 2 * BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        file.write(0, BLOCK, false, |_, to| to.fill(1)).await.expect("written");
        server.plan(|procedure, _| if procedure == COMMIT { Fault::Status(Status::IO.0) } else { Fault::None });
        let error = file.flush().await.expect_err("the server's disk failed");
        assert!(error.is(Status::IO), "{error}");
        server.plan(|_, _| Fault::None);
        let before = server.seen(WRITE);
        file.flush().await.expect("written again");
        assert_eq!((server.seen(WRITE), file.unsettled()), (before + 1, 0));
        assert_eq!(server.durable("disk")[0], 1);
    });
}

#[test]
fn long_reads_and_writes_arrive_whole_over_any_connection() {
    const LENGTH: usize = 1 << 20;
    let server = TestServer::start();
    let content: Vec<u8> = (0..3 * LENGTH).map(|at| (at * 7 + at / 4093) as u8).collect();
    server.put("disk", &content);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        server.plan(faults(21, false));
        for round in 0..4 {
            // A place that divides by nothing, and three at once.
            let starts = [0, LENGTH - 3 - round, 2 * LENGTH - 5];
            let parts = starts.map(|_| DataBuffer::zeroed(LENGTH - 1, 1));
            let reads = starts.iter().zip(&parts).map(|(start, part)| file.read(*start as u64, part));
            for read in futures_util::future::join_all(reads).await {
                read.expect("read");
            }
            for (start, part) in starts.iter().zip(&parts) {
                assert!(part.to_vec() == content[*start..start + LENGTH - 1], "read at {start}");
            }
            let fill = |offset: usize, to: &mut [u8]| to.copy_from_slice(&content[7 + offset..7 + offset + to.len()]);
            file.write(7, LENGTH + 1, round % 2 == 0, fill).await.expect("written");
        }
        file.flush().await.expect("flushed");
        assert!(server.durable("disk") == content);
    });
}

#[test]
fn a_full_export_is_told_and_hurts_nothing_else() {
    let server = TestServer::start();
    server.put("disk", &[7; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        server.allow(2 * BLOCK);
        file.write(BLOCK as u64, BLOCK, false, |_, to| to.fill(1)).await.expect("there is room");
        let error = file.write(2 * BLOCK as u64, BLOCK, false, |_, to| to.fill(2)).await.expect_err("there is none");
        assert!(error.is(Status::NOSPC), "{error}");
        file.write(0, BLOCK, true, |_, to| to.fill(3)).await.expect("no more room is needed");
        file.flush().await.expect("flushed");
        assert_eq!((server.durable("disk")[0], server.durable("disk")[BLOCK]), (3, 1));
    });
}

#[test]
fn data_that_cannot_be_written_again_stop_the_file() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        file.write(0, BLOCK, false, |_, to| to.fill(1)).await.expect("written");
        server.plan(|procedure, _| if procedure == WRITE { Fault::Status(Status::IO.0) } else { Fault::None });
        server.restart();
        let error = file.flush().await.expect_err("the write is lost");
        assert!(matches!(&error, NfsError::Closed { cause, .. } if cause.contains("acknowledged")), "{error}");
        assert!(file.read(0, &DataBuffer::zeroed(BLOCK, 1)).await.is_err(), "nothing may build on lost data");
    });
}

#[test]
fn a_file_that_is_gone_and_a_server_that_has_no_time_are_told_apart() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        let mut times = 3;
        server.plan(move |_, _| {
            times -= 1;
            if times >= 0 { Fault::Status(Status::JUKEBOX.0) } else { Fault::None }
        });
        file.write(0, BLOCK, true, |_, to| to.fill(1)).await.expect("asked again until it was done");
        assert_eq!(server.seen(WRITE), 4);
        server.remove("disk");
        let error = file.write(0, BLOCK, true, |_, to| to.fill(2)).await.expect_err("stale");
        assert!(error.is(Status::STALE), "{error}");
        assert!(matches!(directory.find("disk").await, Err(DatastoreError::Absent { .. })));
    });
}

#[test]
fn what_may_not_be_done_twice_is_sent_once_and_its_outcome_is_unknown() {
    let server = TestServer::start();
    server.put("one", b"1");
    run(async {
        let (directory, _) = open(&server, "one").await;
        server.plan(|procedure, _| if procedure == REMOVE { Fault::CutAfter } else { Fault::None });
        let error = directory.remove("one").await.expect_err("its reply was lost");
        assert!(matches!(&error, DatastoreError::Call { cause: NfsError::Unknown { .. }, .. }), "{error}");
        assert_eq!((server.seen(REMOVE), server.names().len()), (1, 0));
        // An exclusive creation can be repeated: the verifier says whose the file is.
        let mut first = true;
        server.plan(move |procedure, _| match procedure {
            CREATE if std::mem::take(&mut first) => Fault::CutAfter,
            _ => Fault::None,
        });
        directory.create("two", 100).await.expect("made once, and found to be ours");
        assert!(server.seen(CREATE) >= 2);
        assert!(matches!(directory.create("two", 5).await, Err(DatastoreError::Exists { .. })));
        let root = *directory.handle();
        let Remote::V3(v3) = directory.server() else { panic!("another version") };
        v3.rename((&root, b"two"), (&root, b"three"), false).await.expect("renamed");
        for name in ["a", "b", "c", "d", "e"] {
            server.put(name, b"");
        }
        let entries = v3.entries(&root, 100).await.expect("listed");
        let names: Vec<_> = entries.iter().map(|entry| String::from_utf8_lossy(&entry.name)).collect();
        assert_eq!(names, ["a", "b", "c", "d", "e", "three"]);
        let space = directory.server().space(&root).await.expect("told");
        assert_eq!((space.total, space.free, space.available), (100, 50, 40));
    });
}

#[test]
fn a_call_that_the_server_swallows_is_sent_again() {
    let server = TestServer::start();
    server.put("disk", &[9; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        let mut first = true;
        server.plan(move |procedure, _| match procedure {
            READ if std::mem::take(&mut first) => Fault::NoReply,
            _ => Fault::None,
        });
        let read = DataBuffer::zeroed(BLOCK, 1);
        file.read(0, &read).await.expect("read");
        assert!(read.to_vec().iter().all(|byte| *byte == 9));
        assert_eq!(server.seen(READ), 2);
    });
}

#[test]
fn a_wrong_export_and_a_server_that_is_not_there_are_named() {
    let server = TestServer::start();
    run(async {
        let wrong = server.url("x").replace("/export/", "/other/deep/");
        let Err(error) = Directory::open(&wrong.parse().expect("a URL")).await else { panic!("opened") };
        assert!(
            error.to_string().contains("/other/deep") && error.to_string().contains("no such directory"),
            "{error}"
        );
        let Err(error) =
            Directory::open(&server.url("x").replace("/export/", "/export/none/").parse().expect("a URL")).await
        else {
            panic!("opened")
        };
        assert!(matches!(error, DatastoreError::Absent { .. }), "{error}");
    });
}

#[test]
fn a_server_with_an_address_of_ipv6_is_reached_by_its_brackets() {
    let server = TestServer::start_at("[::1]:0");
    server.put("disk", &[3; BLOCK]);
    assert!(server.url("disk").contains("//[::1]:"), "{}", server.url("disk"));
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        let read = DataBuffer::zeroed(BLOCK, 1);
        file.read(0, &read).await.expect("read");
        assert_eq!(read.to_vec(), [3; BLOCK]);
        file.write(0, BLOCK, true, |_, to| to.fill(4)).await.expect("written");
        assert_eq!(server.durable("disk"), [4; BLOCK]);
    });
}

#[test]
fn a_file_is_replaced_as_a_whole_or_stays_and_gets_another_size() {
    let server = TestServer::start();
    server.put("x.vmdk", b"old");
    run(async {
        let (directory, found) = open(&server, "x.vmdk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        server.plan(|procedure, _| if procedure == WRITE { Fault::Status(Status::NOSPC.0) } else { Fault::None });
        directory.replace("x.vmdk", b"newer", &file).await.expect_err("there is no room");
        assert_eq!((server.durable("x.vmdk"), server.names().len()), (b"old".to_vec(), 1));
        server.plan(|_, _| Fault::None);
        directory.replace("x.vmdk", b"newer", &file).await.expect("replaced");
        assert_eq!((server.durable("x.vmdk"), server.names().len()), (b"newer".to_vec(), 1));
        let found_now = directory.find("x.vmdk").await.expect("found");
        assert_ne!(found_now.handle, found.handle);
        directory.data(&found_now.handle, None, FLIGHT).set_size(9).await.expect("larger");
        assert_eq!(directory.read_small("x.vmdk", 100).await.expect("read"), b"newer\0\0\0\0");
    });
}

#[test]
fn a_server_that_lies_about_sizes_is_not_believed() {
    let server = TestServer::start();
    server.put("disk", &[0; 2 * BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let file = directory.data(&found.handle, None, FLIGHT);
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
        for results in [
            [words(&[0, 0, 8192, 0, 8192]), vec![0; 8192]].concat(),
            words(&[0, 0, 4096, 0, 0xFFFF_FFF0]),
            [words(&[0, 0, 100, 0, 96]), vec![0; 96]].concat(),
            words(&[0, 0, 0, 0, 0]),
            words(&[0]),
        ] {
            server.plan(move |_, _| Fault::Results(results.clone()));
            let error = file.read(0, &DataBuffer::zeroed(BLOCK, 1)).await.expect_err("a lie");
            assert!(matches!(error, NfsError::Nonsense { .. }), "{error}");
        }
        // More written than was asked for, and less durable.
        for results in [words(&[0, 0, 0, 8192, 2, 0, 0]), words(&[0, 0, 0, 4096, 0, 0, 0])] {
            server.plan(move |_, _| Fault::Results(results.clone()));
            let error = file.write(0, BLOCK, true, |_, _| {}).await.expect_err("a lie");
            assert!(matches!(error, NfsError::Nonsense { .. }), "{error}");
        }
    });
}

#[test]
fn no_bytes_of_a_server_do_more_than_fail_a_call() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
    let server = TestServer::start();
    server.put("disk", &[5; BLOCK]);
    let bytes = prop::collection::vec(any::<u8>(), 0..200);
    runner
        .run(&(bytes, any::<bool>(), 0usize..3), |(bytes, as_results, of)| {
            run(async {
                server.plan(|_, _| Fault::None);
                let (directory, found) = open(&server, "disk").await;
                let file = directory.data(&found.handle, None, FLIGHT);
                let procedure = [READ, WRITE, LOOKUP][of];
                let mut first = true;
                server.plan(move |called, _| match (called == procedure && std::mem::take(&mut first), as_results) {
                    (true, true) => Fault::Results(bytes.clone()),
                    // Whatever it is, the connection is cut behind it in the end.
                    (true, false) => Fault::Bytes([&bytes[..], &[0x80, 0xFF, 0xFF, 0xFF]].concat()),
                    _ => Fault::None,
                });
                match procedure {
                    READ => drop(file.read(0, &DataBuffer::zeroed(BLOCK, 1)).await),
                    WRITE => drop(file.write(0, BLOCK, true, |_, to| to.fill(5)).await),
                    _ => drop(directory.find("disk").await),
                }
            });
            Ok(())
        })
        .expect("no case fails");
}

const FAST: Timing = Timing {
    renew: Duration::from_millis(300),
    gate: Duration::from_secs(2),
    flight: Duration::from_secs(1),
    stale: Duration::from_secs(5),
};

fn owner(host: &str) -> KeeperOptions {
    KeeperOptions { owner: Owner { host: host.into(), process: 1 }, timing: FAST }
}

#[test]
fn a_lock_has_one_holder_who_is_named_gives_it_back_and_freezes_when_the_server_is_silent() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let keeper = Keeper::start(&directory, &found, owner("esx-a")).await.expect("the disk is free");
        assert!(server.names().contains(&LockFiles::name_of(found.attributes.fileid)));
        let Err(LockError::Held(holder)) = Keeper::start(&directory, &found, owner("esx-b")).await else {
            panic!("taken")
        };
        assert_eq!(holder.record.map(|record| record.host).as_deref(), Some("esx-a"));

        // Silence: the gate closes by itself, held writes wait; then all goes on.
        let tenure = keeper.tenure();
        let file = Rc::new(directory.data(&found.handle, Some(tenure.clone()), FAST.flight));
        file.write(0, BLOCK, true, |_, to| to.fill(1)).await.expect("the gate is open");
        server.plan(|_, _| Fault::CutBefore);
        while tenure.state() == State::Open {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(tenure.state(), State::Frozen);
        let done = Rc::new(Cell::new(false));
        let (write, has_written) = (file.clone(), done.clone());
        let write = tokio::task::spawn_local(async move {
            write.write(0, BLOCK, true, |_, to| to.fill(2)).await.expect("it waited");
            has_written.set(true);
        });
        let silent = server.seen(WRITE);
        server.plan(move |procedure, _| if procedure == WRITE { Fault::CutBefore } else { Fault::None });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!done.get(), "nothing is written behind a closed gate");
        server.plan(|_, _| Fault::None);
        while tenure.state() != State::Open {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        file.server().client().gate_opened();
        write.await.expect("it goes on");
        assert!(server.seen(WRITE) > silent && server.durable("disk")[0] == 2);
        drop(keeper);
        assert_eq!(server.names(), ["disk"], "the lock was given back");
    });
}

#[test]
fn a_lock_whose_holder_is_silent_is_taken_and_the_holder_finds_that_it_is_lost() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let root = LockFiles::name_of(found.attributes.fileid);
        let keeper = Keeper::start(&directory, &found, owner("esx-a")).await.expect("the disk is free");
        // Only renewals fail: those of the first holder are cut off, new lock files can be written.
        let silent = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let is_silent = silent.clone();
        server.plan(move |procedure, _| {
            let is_renewal = procedure == WRITE && is_silent.load(std::sync::atomic::Ordering::SeqCst);
            if is_renewal { Fault::CutBefore } else { Fault::None }
        });
        while keeper.tenure().state() == State::Open {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let opened = silent.clone();
        let names = Arc::new(std::sync::Mutex::new(Vec::new()));
        let taker = {
            let (url, names) = (server.url("disk"), names.clone());
            std::thread::spawn(move || {
                run(async {
                    let directory = Directory::open(&url.parse().expect("a URL")).await.expect("opened");
                    let found = directory.find("disk").await.expect("found");
                    let taken = Keeper::start(&directory, &found, owner("esx-b")).await;
                    names.lock().expect("no panic").push(taken.is_ok());
                    taken.ok()
                })
            })
        };
        // Whoever breaks it makes a second file; from then on writes go through again.
        while server.names().len() < 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        opened.store(false, std::sync::atomic::Ordering::SeqCst);
        while keeper.tenure().state() != State::Lost {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let cause = keeper.tenure().cause().unwrap_or_default();
        assert!(cause.contains("taken by"), "{cause}");
        let second = tokio::task::spawn_blocking(move || taker.join()).await.expect("joined").expect("no panic");
        let second = second.expect("the lock was taken");
        assert_eq!(second.tenure().state(), State::Open);
        drop(keeper);
        assert!(server.names().contains(&root), "who lost a lock removes nothing");
        drop(second);
        assert_eq!(server.names(), ["disk"]);
    });
}

#[test]
fn a_lock_file_with_foreign_content_is_left_alone() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        server.put(&LockFiles::name_of(found.attributes.fileid), &[b'x'; 84]);
        let Err(error) = Keeper::start(&directory, &found, owner("esx-a")).await else { panic!("taken") };
        assert!(matches!(&error, LockError::Foreign(_)) && error.to_string().contains(".lck-"), "{error}");
        assert_eq!(server.names().len(), 2);
    });
}

#[test]
fn a_directory_is_locked_by_one_version_of_nfs_whatever_becomes_of_the_mark_s_reply() {
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let mut first = true;
        server.plan(move |procedure, _| match procedure {
            SYMLINK if std::mem::take(&mut first) => Fault::CutAfter,
            _ => Fault::None,
        });
        drop(Keeper::start(&directory, &found, owner("esx-a")).await.expect("the disk is free"));
        assert_eq!((server.seen(SYMLINK), server.links()), (2, vec!["nfs3".to_owned()]));
        drop(Keeper::start(&directory, &found, owner("esx-a")).await.expect("the same version"));
        assert_eq!(server.seen(SYMLINK), 2, "the mark is there");
    });
    let server = TestServer::start();
    server.put("disk", &[0; BLOCK]);
    server.link(MARK, "nfs4.1");
    run(async {
        let (directory, found) = open(&server, "disk").await;
        let Err(error) = Keeper::start(&directory, &found, owner("esx-a")).await else { panic!("taken") };
        let said = error.to_string();
        assert!(matches!(error, LockError::Version { .. }), "{said}");
        assert!(said.contains("NFSv4.1") && said.contains("NFSv3") && said.contains(MARK), "{said}");
        assert_eq!(server.names(), ["disk"], "nothing was changed");
    });
}
