//! Promises of names when a host dies anywhere in an operation: the others see all of it or nothing of it, and can go on with every name.

mod names_support;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use names_support::*;
use vmfs_core::cas::{CasOutcome, CellChange};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::{ObjectState, ObjectType, RootCell};
use vmfs_core::sim::{HostNo, MemoryDisk, Sim};
use vmfs_core::units::{CellSize, FdId, Link};
use vmfs_core::volume::{RenameFlags, Volume};

#[derive(Clone, Copy, Debug)]
enum Op {
    Create,
    Mkdir,
    Unlink,
    Rmdir,
    Rename,
    RenameOver,
    RenameDirectoryOver,
    Move,
    MoveOver,
}

const OPS: [Op; 9] = [
    Op::Create,
    Op::Mkdir,
    Op::Unlink,
    Op::Rmdir,
    Op::Rename,
    Op::RenameOver,
    Op::RenameDirectoryOver,
    Op::Move,
    Op::MoveOver,
];

/// Every name that an operation can touch, in directories 0 and 1.
const NAMES: [(usize, &[u8]); 9] =
    [(0, b"a"), (0, b"b"), (0, b"d"), (0, b"e"), (0, b"n"), (0, b"new"), (1, b"c"), (1, b"n"), (1, b"new")];

async fn carry_out(volume: &Volume, [x, y]: [ObjectRef; 2], op: Op) -> Result<(), FsError> {
    let flags = RenameFlags::default();
    match op {
        Op::Create => create(volume, x, b"new").await.map(drop),
        Op::Mkdir => mkdir(volume, x, b"new").await.map(drop),
        Op::Unlink => volume.unlink(x, b"a").await.map(drop),
        Op::Rmdir => volume.remove_directory(x, b"d").await.map(drop),
        Op::Rename => volume.rename(x, b"a", x, b"n", flags).await.map(drop),
        Op::RenameOver => volume.rename(x, b"a", x, b"b", flags).await.map(drop),
        Op::RenameDirectoryOver => volume.rename(x, b"d", x, b"e", flags).await.map(drop),
        Op::Move => volume.rename(x, b"a", y, b"n", flags).await.map(drop),
        Op::MoveOver => volume.rename(x, b"a", y, b"c", flags).await.map(drop),
    }
}

/// What each name means: an object of the start by its identity and birth, or 0 for a new one.
type Look = BTreeMap<(usize, &'static [u8]), (u64, i64)>;

async fn look(volume: &Volume, directories: [ObjectRef; 2]) -> Look {
    let mut all = Look::new();
    for (directory, name) in NAMES {
        match volume.lookup(directories[directory], name).await {
            Ok(stat) => {
                all.insert((directory, name), (stat.object.fd.get(), stat.attributes.born_ns));
            }
            Err(error) => assert_eq!(error.kind(), FsErrorKind::NotFound, "{error}"),
        }
    }
    all
}

/// Objects that were not there at the start become 0.
fn with_new_ones(look: Look, before: &Look) -> Look {
    let known = |id: &(u64, i64)| before.values().any(|b| b == id);
    look.into_iter().map(|(place, id)| (place, if known(&id) { id } else { (0, 0) })).collect()
}

struct World {
    sim: Sim,
    disks: Vec<MemoryDisk>,
    dying: Volume,
    other: Volume,
    directories: [ObjectRef; 2],
    before: Look,
}

async fn prepare(sim: &Sim, disks: Vec<MemoryDisk>) -> World {
    let (dying, paths) = mount(sim, &disks, 1).await;
    let (other, _) = mount(sim, &disks, 2).await;
    let x = mkdir(&other, other.root(), b"x").await.unwrap().object;
    let y = mkdir(&other, other.root(), b"y").await.unwrap().object;
    for (directory, name) in [(x, b"a".as_slice()), (x, b"b"), (y, b"c")] {
        create(&other, directory, name).await.unwrap();
    }
    mkdir(&other, x, b"d").await.unwrap();
    mkdir(&other, x, b"e").await.unwrap();
    // The dying host has its pools filled, so that the operation itself is what takes the time.
    create(&dying, y, b"warm").await.unwrap();
    dying.unlink(y, b"warm").await.unwrap();
    paths.iter().for_each(|path| path.set_latency(Duration::from_micros(40), Duration::from_micros(60)));
    let before = look(&other, [x, y]).await;
    World { sim: sim.clone(), disks, dying, other, directories: [x, y], before }
}

/// Names that the operation leaves when nobody dies.
async fn after_of(world: &World, op: Op) -> Look {
    carry_out(&world.dying, world.directories, op).await.unwrap();
    with_new_ones(look(&world.other, world.directories).await, &world.before)
}

/// What becomes of the host in the middle of its operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Dies,
    /// It stands still, is taken for dead and broken, and goes on after the others used every name.
    Sleeps,
}

/// Stops the host `micros` after it began; true when the operation had ended by then.
async fn crash(world: World, op: Op, after: &Look, micros: u64, fate: Fate) -> bool {
    let label = format!("{op:?}, {fate:?} after {micros} us");
    let World { sim, disks, dying, other, directories, before } = world;
    let done = Rc::new(Cell::new(false));
    let (told, host) = (done.clone(), dying.clone());
    sim.spawn(HostNo(1), async move {
        let result = carry_out(&host, directories, op).await;
        assert!(result.is_ok() || fate == Fate::Sleeps, "{result:?}");
        told.set(result.is_ok());
    });
    sim.sleep(Duration::from_micros(micros)).await;
    match fate {
        Fate::Dies => sim.kill(HostNo(1)),
        Fate::Sleeps => sim.pause(HostNo(1)),
    }
    let ended = done.get();
    let slots = slots_of(&dying);
    sim.sleep(Duration::from_secs(10)).await;
    let seen = with_new_ones(look(&other, directories).await, &before);
    assert!(seen == before || seen == *after, "{label}: {seen:?}");
    assert!(!ended || seen == *after, "{label}: it was acknowledged");
    break_slots(&other, &slots).await;
    assert_eq!(with_new_ones(look(&other, directories).await, &before), seen, "{label}");
    for (directory, name) in NAMES {
        use_name(&other, directories[directory], name, seen.contains_key(&(directory, name)), &label).await;
    }
    if fate == Fate::Sleeps {
        sim.resume(HostNo(1));
        sim.sleep(Duration::from_secs(30)).await;
        assert!(ended || !done.get() || seen == *after, "{label}: it went on as if it lived");
    }
    for (directory, name) in NAMES {
        let there = exists(&other, directories[directory], name).await;
        assert_eq!(there, !seen.contains_key(&(directory, name)), "{label}: {}", name.escape_ascii());
    }
    assert_eq!(tree(&other, other.root()).await.len(), 2 + NAMES.len() - seen.len(), "{label}");
    other.unmount().await.unwrap();
    assert_eq!(fsck(&sim, &disks, true).await, Vec::new(), "{label}");
    ended
}

/// Removes what is there, creates what is not.
async fn use_name(volume: &Volume, directory: ObjectRef, name: &[u8], there: bool, label: &str) {
    let result = match volume.lookup(directory, name).await {
        Ok(stat) if stat.object_type == ObjectType::Directory => {
            volume.remove_directory(directory, name).await.map(drop)
        }
        Ok(_) => volume.unlink(directory, name).await.map(drop),
        Err(_) => create(volume, directory, name).await.map(drop),
    };
    assert!(result.is_ok(), "{label}: {} ({there}): {result:?}", name.escape_ascii());
}

fn stop_everywhere(fate: Fate, step: u64) {
    for (number, op) in OPS.into_iter().enumerate() {
        let disks = 1 + number % 2;
        let (sim, luns) = world(number as u64, disks, CellSize::B512);
        let after = sim.block_on(async {
            let world = prepare(&sim, luns).await;
            after_of(&world, op).await
        });
        sim.end();
        let mut micros = 0;
        loop {
            let (sim, luns) = world(1000 + micros, disks, CellSize::B512);
            let ended = sim.block_on(async {
                let world = prepare(&sim, luns).await;
                // Identities differ from world to world: what stays is which name has which object of the start.
                let after = translate(&after, &world.before, op);
                crash(world, op, &after, micros, fate).await
            });
            sim.end();
            if ended {
                break;
            }
            micros += step;
            assert!(micros < 20_000, "{op:?} never ends");
        }
    }
}

#[test]
fn a_host_that_dies_anywhere_in_an_operation_leaves_all_of_it_or_nothing_and_every_name_usable() {
    stop_everywhere(Fate::Dies, 50);
}

#[test]
fn a_host_that_sleeps_anywhere_in_an_operation_and_was_broken_changes_nothing_when_it_wakes() {
    stop_everywhere(Fate::Sleeps, 70);
}

/// The names after the operation, with the objects of this world.
fn translate(after: &Look, before: &Look, op: Op) -> Look {
    let source = |place: (usize, &'static [u8])| match (op, place) {
        (Op::Rename, (0, b"n")) | (Op::RenameOver, (0, b"b")) => (0, b"a".as_slice()),
        (Op::RenameDirectoryOver, (0, b"e")) => (0, b"d".as_slice()),
        (Op::Move, (1, b"n")) | (Op::MoveOver, (1, b"c")) => (0, b"a".as_slice()),
        _ => place,
    };
    after.keys().map(|place| (*place, before.get(&source(*place)).copied().unwrap_or((0, 0)))).collect()
}

/// A host stops in a removal; true when what it was about to remove is refused to another one.
async fn stopped_in_a_removal(world: World, micros: u64) -> bool {
    let World { sim, dying, other, directories: [x, _], .. } = world;
    let host = dying.clone();
    sim.spawn(HostNo(1), async move {
        host.unlink(x, b"a").await.ok();
    });
    sim.sleep(Duration::from_micros(micros)).await;
    sim.kill(HostNo(1));
    let busy = match other.unlink(x, b"a").await {
        Ok(_) => false,
        Err(error) if error.kind() == FsErrorKind::NotFound => false,
        Err(error) => {
            assert_eq!(error.kind(), FsErrorKind::Busy, "{error}");
            assert!(exists(&other, x, b"a").await);
            let renamed = other.rename(x, b"b", x, b"a", RenameFlags::default()).await.unwrap_err();
            assert_eq!(renamed.kind(), FsErrorKind::Busy, "{renamed}");
            break_slots(&other, &slots_of(&dying)).await;
            other.rename(x, b"b", x, b"a", RenameFlags::default()).await.unwrap();
            let warnings = other.status().await.warnings;
            assert!(warnings.iter().any(|warning| warning.contains("host1")), "{warnings:?}");
            true
        }
    };
    other.unmount().await.unwrap();
    busy
}

#[test]
fn what_a_host_that_seems_to_live_is_about_to_remove_is_busy_until_its_slot_is_broken() {
    let mut times_busy = 0;
    for micros in (0..2000).step_by(100) {
        let (sim, disks) = world(micros, 1, CellSize::B512);
        let busy = sim.block_on(async { stopped_in_a_removal(prepare(&sim, disks).await, micros).await });
        times_busy += u32::from(busy);
        sim.end();
    }
    assert!(times_busy > 0, "no death fell between the mark and the removal of the name");
}

/// Changes an object's root cell behind everybody's back.
async fn change_root(by: &Volume, fd: FdId, change: impl FnOnce(&mut Link, &mut RootCell)) {
    let member = by.context().member(fd.lun()).unwrap();
    let cell = by.context().read_cell(member.layout().root_cell(fd).unwrap()).await.unwrap();
    let mut link = cell.header().link;
    let mut root = RootCell::decode(member.layout().cell_size, cell.payload()).unwrap();
    change(&mut link, &mut root);
    let changed = CellChange { link, ..CellChange::payload(&cell, root.encode()) };
    assert!(matches!(by.context().cas(&cell, changed).await, Ok(CasOutcome::Applied(_))));
}

#[test]
fn an_entry_is_dead_whose_root_cell_is_being_made_into_another_object_that_has_no_body_yet() {
    let (sim, disks) = world(3, 1, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (b, _) = mount(&sim, &disks, 2).await;
        let (own, root) = (slots_of(&a)[0].1, a.root());
        let file = create(&a, root, b"name").await.unwrap().object;
        assert_eq!(b.lookup(root, b"name").await.unwrap().object, file);
        let (mut before, mut state) = (file.link, ObjectState::Free);
        change_root(&a, file.fd, |link, root| {
            (before, state) = (*link, root.state);
            (*link, root.state) = (link.next().next(), ObjectState::Creating(own));
        })
        .await;
        for volume in [&a, &b] {
            assert_eq!(volume.lookup(root, b"name").await.unwrap_err().kind(), FsErrorKind::NotFound);
            assert_eq!(volume.stat(file).await.unwrap_err().kind(), FsErrorKind::Stale);
        }
        change_root(&a, file.fd, |link, root| (*link, root.state) = (before, state)).await;
        assert_eq!(b.lookup(root, b"name").await.unwrap().object, file);
    });
    sim.end();
}

#[test]
fn a_directory_that_is_being_created_stays_so_when_recovery_looks_for_a_name_in_it() {
    let (sim, disks) = world(4, 1, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (dying, _) = mount(&sim, &disks, 2).await;
        let directory = mkdir(&a, a.root(), b"directory").await.unwrap().object;
        let file = create(&dying, dying.root(), b"file").await.unwrap().object;
        // As if its maker had died before it was named there.
        change_root(&dying, file.fd, |_, root| root.parent = Some(directory.fd)).await;
        sim.kill(HostNo(2));
        sim.sleep(Duration::from_secs(200)).await;
        assert_eq!(a.stat(file).await.unwrap_err().kind(), FsErrorKind::Stale, "it was recovered");
        change_root(&a, directory.fd, |_, root| {
            assert!(
                matches!(root.state, ObjectState::Creating(_)),
                "whether it has a name its maker knows: {:?}",
                root.state
            );
        })
        .await;
        a.unmount().await.unwrap();
    });
    sim.end();
}
