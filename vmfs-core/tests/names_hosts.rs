//! Promises of names among hosts: whatever hosts do to the same names at the same time could have been done one after another.

mod names_support;
mod scale;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use names_support::history::{Event, Operation, Place, check};
use names_support::*;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::sim::{FaultRates, HostNo, Sim};
use vmfs_core::units::CellSize;
use vmfs_core::volume::{RenameFlags, Stat, Volume};

/// Operations of one task.
const OPERATIONS: u64 = 10;

/// How a hammering goes.
#[derive(Clone, Copy)]
struct Plan {
    seed: u64,
    cell_size: CellSize,
    /// Renames may go to the other directory too.
    across: bool,
    faults: bool,
}

/// An object for the history: its identity and the moment of its birth (an identity is used again).
fn id_of(stat: &Stat) -> u64 {
    (stat.object.fd.get() << 36 ^ stat.attributes.born_ns as u64) & ((1 << 59) - 1)
}

struct Hammer {
    sim: Sim,
    plan: Plan,
    history: Rc<RefCell<Vec<Operation>>>,
}

/// What is refused without effect, and what ends unknown.
fn failed(error: &FsError, plan: Plan) -> Option<Event> {
    match error.kind() {
        FsErrorKind::Busy | FsErrorKind::Stale => Some(Event::Nothing),
        FsErrorKind::Io if plan.faults => None,
        _ => panic!("seed {}: {error}", plan.seed),
    }
}

impl Hammer {
    async fn run(self: Rc<Self>, who: u32, volume: Volume, directories: [ObjectRef; 2]) {
        let places: u64 = if self.plan.across { 4 } else { 3 };
        let at = |place: Place| (directories[usize::from(place) % 2 * usize::from(self.plan.across)], [b'a' + place]);
        for _ in 0..OPERATIONS {
            let (what, place, other) =
                self.sim.with_rng(|rng| (rng.below(10), rng.below(places) as Place, rng.below(places) as Place));
            let (directory, name) = at(place);
            let from = self.sim.now();
            let kind = |error: &FsError| error.kind();
            let (event, certain) = match what {
                0..=2 => match create(&volume, directory, &name).await {
                    Ok(stat) => (Event::Created(place, Some(id_of(&stat))), true),
                    Err(error) if kind(&error) == FsErrorKind::Exists => (Event::Taken(place), true),
                    Err(error) => match failed(&error, self.plan) {
                        Some(event) => (event, true),
                        None => (Event::Created(place, None), false),
                    },
                },
                3..=4 => match volume.unlink(directory, &name).await {
                    Ok(_) => (Event::Removed(place, None), true),
                    Err(error) if kind(&error) == FsErrorKind::NotFound => (Event::Missing(place), true),
                    Err(error) => match failed(&error, self.plan) {
                        Some(event) => (event, true),
                        None => (Event::Removed(place, None), false),
                    },
                },
                5..=7 => {
                    let (to, new_name) = at(other);
                    match volume.rename(directory, &name, to, &new_name, RenameFlags::default()).await {
                        Ok(_) => (Event::Renamed(place, other), true),
                        Err(error) if kind(&error) == FsErrorKind::NotFound => (Event::Missing(place), true),
                        Err(error) => match failed(&error, self.plan) {
                            Some(event) => (event, true),
                            None => (Event::Renamed(place, other), false),
                        },
                    }
                }
                _ => self.look(&volume, directory, place, &name).await,
            };
            let to = self.sim.now();
            self.history.borrow_mut().push(Operation { who, from, to, certain, event });
        }
    }

    async fn look(&self, volume: &Volume, directory: ObjectRef, place: Place, name: &[u8]) -> (Event, bool) {
        match volume.lookup(directory, name).await {
            Ok(stat) => (Event::Found(place, id_of(&stat)), true),
            Err(error) if error.kind() == FsErrorKind::NotFound => (Event::Missing(place), true),
            Err(error) => (failed(&error, self.plan).unwrap_or(Event::Nothing), true),
        }
    }
}

/// Two hosts, each with two tasks at once; at the end both see the same names, and the history has an order.
fn hammer(plan: Plan) {
    let (sim, disks) = world(plan.seed, 1 + (plan.seed % 2) as usize, plan.cell_size);
    let history = Rc::new(RefCell::new(Vec::new()));
    sim.block_on(async {
        let (mut volumes, mut paths) = (Vec::new(), Vec::new());
        for number in 1..=2 {
            let (volume, own) = mount(&sim, &disks, number).await;
            own.iter().for_each(|path| path.set_latency(Duration::from_micros(20), Duration::from_micros(400)));
            volumes.push(volume);
            paths.extend(own);
        }
        let one = mkdir(&volumes[0], volumes[0].root(), b"one").await.unwrap().object;
        let two = mkdir(&volumes[0], volumes[0].root(), b"two").await.unwrap().object;
        if plan.faults {
            paths.iter().for_each(|path| path.set_rates(FaultRates { late: 0, ..FaultRates::MANY }));
        }
        let mut tasks = Vec::new();
        for number in [1u32, 1, 2, 2] {
            let hammer = Rc::new(Hammer { sim: sim.clone(), plan, history: history.clone() });
            let volume = volumes[number as usize - 1].clone();
            tasks.push(sim.spawn(HostNo(number), hammer.run(number, volume, [one, two])));
        }
        for task in tasks {
            task.join().await.expect("no host dies");
        }
        paths.iter().for_each(|path| path.set_rates(FaultRates::default()));
        sim.sleep(Duration::from_secs(30)).await;
        let last = Hammer { sim: sim.clone(), plan, history: history.clone() };
        for (number, volume) in volumes.iter().enumerate() {
            for place in 0..4u8 {
                let directory = [one, two][usize::from(place) % 2 * usize::from(plan.across)];
                let from = sim.now();
                let (event, certain) = last.look(volume, directory, place, &[b'a' + place]).await;
                let (who, to) = (number as u32 + 10, sim.now() + 1);
                history.borrow_mut().push(Operation { who, from, to, certain, event });
                sim.sleep(Duration::from_micros(1)).await;
            }
        }
        assert_eq!(
            tree(&volumes[0], volumes[0].root()).await,
            tree(&volumes[1], volumes[1].root()).await,
            "seed {}",
            plan.seed
        );
        for volume in &volumes {
            let unmounted = volume.unmount().await;
            assert!(plan.faults || unmounted.is_ok(), "seed {}: {unmounted:?}", plan.seed);
        }
        assert_eq!(fsck(&sim, &disks, plan.faults).await, Vec::new(), "seed {}", plan.seed);
    });
    sim.end();
    check(history.take(), &format!("seed {}", plan.seed));
}

#[test]
fn names_of_one_directory_that_two_hosts_create_rename_and_remove_have_one_history() {
    for seed in scale::seeds(0, 100) {
        let cell_size = if seed % 2 == 0 { CellSize::B512 } else { CellSize::B4096 };
        hammer(Plan { seed, cell_size, across: false, faults: false });
    }
}

#[test]
fn names_that_two_hosts_rename_and_move_between_two_directories_have_one_history() {
    for seed in scale::seeds(100_000, 100) {
        hammer(Plan { seed, cell_size: CellSize::B512, across: true, faults: false });
    }
}

#[test]
fn names_have_one_history_when_commands_and_answers_get_lost() {
    for seed in scale::seeds(200, 400) {
        hammer(Plan { seed, cell_size: CellSize::B512, across: seed % 2 == 0, faults: true });
    }
}

#[test]
fn two_hosts_that_fill_one_directory_lose_nothing() {
    let (sim, disks) = world(7, 1, CellSize::B512);
    sim.block_on(async {
        let volumes = [mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await];
        let directory = mkdir(&volumes[0], volumes[0].root(), b"d").await.unwrap().object;
        let mut tasks = Vec::new();
        for (number, volume) in volumes.iter().cloned().enumerate() {
            tasks.push(sim.spawn(HostNo(number as u32 + 1), async move {
                for n in 0..150 {
                    let name = format!("a-rather-long-name-of-host-{number}-with-number-{n}");
                    create(&volume, directory, name.as_bytes()).await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.join().await.unwrap();
        }
        for volume in &volumes {
            assert_eq!(list(volume, directory, 16).await.len(), 300);
            volume.unmount().await.unwrap();
        }
    });
    sim.end();
}

#[test]
fn a_file_that_another_host_writes_cannot_be_removed_replaced_or_moved_away_and_can_be_renamed() {
    use vmfs_core::file::OpenMode;
    let (sim, disks) = world(8, 2, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (b, _) = mount(&sim, &disks, 2).await;
        let root = a.root();
        let other = mkdir(&a, root, b"other").await.unwrap().object;
        let (stat, file) = a.create(root, b"held", new_file(true), Some(OpenMode::WRITE)).await.unwrap();
        create(&b, root, b"mine").await.unwrap();
        let busy = |result: Result<_, FsError>| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), FsErrorKind::Busy);
            assert!(error.to_string().contains("host1"), "{error}");
        };
        busy(b.unlink(root, b"held").await.map(drop));
        busy(b.rename(root, b"mine", root, b"held", RenameFlags::default()).await.map(drop));
        busy(b.rename(root, b"held", other, b"held", RenameFlags::default()).await.map(drop));
        b.rename(root, b"held", root, b"renamed", RenameFlags::default()).await.unwrap();
        assert_eq!(a.lookup(root, b"renamed").await.unwrap().object, stat.object);
        let why = b.why_locked(stat.object).await.unwrap();
        assert!(why.explanation.contains("host1") && why.holders.len() == 1 && why.holders[0].counts, "{why:?}");
        a.close(file.unwrap()).await.unwrap();
        b.unlink(root, b"renamed").await.unwrap();
        a.unmount().await.unwrap();
        b.unmount().await.unwrap();
    });
    sim.end();
}

#[test]
fn of_two_hosts_that_give_one_file_the_same_new_name_in_another_directory_one_has_moved_it() {
    for slept_at in 0..30 {
        let (sim, disks) = world(slept_at, 1, CellSize::B512);
        sim.block_on(async {
            let (one, _) = mount(&sim, &disks, 1).await;
            let (two, paths) = mount(&sim, &disks, 2).await;
            let (root, name, new) = (one.root(), b"here", b"there");
            let other = mkdir(&one, root, b"other").await.unwrap().object;
            let file = create(&one, root, name).await.unwrap().object;
            paths[0].set_latency(Duration::from_micros(500), Duration::from_micros(500));
            let moving =
                sim.spawn(HostNo(2), async move { two.rename(root, name, other, new, RenameFlags::default()).await });
            // The second host stands still somewhere in its move, and the first one does the same in the meantime.
            sim.sleep(Duration::from_millis(slept_at)).await;
            sim.pause(HostNo(2));
            let first = one.rename(root, name, other, new, RenameFlags::default()).await;
            sim.resume(HostNo(2));
            let second = moving.join().await.unwrap();
            let (done, refused): (Vec<_>, Vec<_>) = [first, second].into_iter().partition(Result::is_ok);
            assert_eq!(done.len(), 1, "slept at {slept_at} ms");
            assert_eq!(refused[0].as_ref().unwrap_err().kind(), FsErrorKind::NotFound);
            assert_eq!(one.lookup(other, new).await.unwrap().object.fd, file.fd);
            assert!(!exists(&one, root, name).await);
        });
        sim.end();
    }
}
