//! What a repair promises: whatever is damaged, the volume is sound afterwards; what was not damaged is there byte for byte; what a dead
//! host left needs no consent; a repair that was cut off is begun again and ends.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::content::{file, fill, filled, mount, mount_slow};
use super::{MIB, World, listed, world};
use vmfs_core::check::{Finding, Observer, Severity};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::OpenMode;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::lun::Lun;
use vmfs_core::repair::{RepairOptions, Repaired, Repairer, UndoLog, repair, undo};
use vmfs_core::sim::HostNo;
use vmfs_core::units::CellSize;
use vmfs_core::volume::Volume;

/// Says yes or no to everything, and remembers what was done.
pub(crate) struct Says {
    pub(crate) yes: bool,
    pub(crate) done: Vec<String>,
    asked: Vec<String>,
}

impl Says {
    pub(crate) fn new(yes: bool) -> Says {
        Says { yes, done: Vec::new(), asked: Vec::new() }
    }
}

impl Observer for Says {
    fn finding(&mut self, _: Finding) {}
}

impl Repairer for Says {
    fn repaired(&mut self, what: &str) {
        self.done.push(what.to_owned());
    }

    fn consents(&mut self, question: &str) -> bool {
        self.asked.push(question.to_owned());
        self.yes
    }
}

fn paths(world: &World, host: u32) -> Vec<Rc<dyn Lun>> {
    world.disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&world.sim, HostNo(host)) }).collect()
}

async fn repair_of(world: &World, says: &mut Says) -> Result<Repaired, FsError> {
    let luns = paths(world, 77);
    repair(&world.env, &luns, RepairOptions::default(), None, says).await
}

/// Repairs, asserts that nothing whatever is found afterwards, and gives what was done.
#[track_caller]
pub(crate) fn repaired(world: &World, yes: bool, what: &str) -> Vec<String> {
    let mut says = Says::new(yes);
    let result = world.sim.block_on(repair_of(world, &mut says));
    let result = result.unwrap_or_else(|error| panic!("{what}: {error}; done: {:#?}", says.done));
    let (_, findings) = world.check();
    let findings: Vec<Finding> = findings.into_iter().filter(|finding| finding.severity != Severity::Info).collect();
    assert!(findings.is_empty(), "{what}: {}after {:#?}, asked {:#?}", listed(&findings), says.done, says.asked);
    assert!(result.report.is_clean());
    says.done
}

async fn read(volume: &Volume, object: ObjectRef, at: u64, length: usize) -> Vec<u8> {
    let open = volume.open(object, OpenMode { read: true, write: false, truncate: false }).await.unwrap();
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let more = volume.files().read(&open, at + bytes.len() as u64, length - bytes.len()).await.unwrap();
        if more.is_empty() {
            break;
        }
        bytes.extend(more);
    }
    volume.close(open).await.unwrap();
    bytes
}

/// Every path with its type and its bytes (of large disks, those around what was written).
pub(crate) fn everything(world: &World) -> BTreeMap<String, (ObjectType, Vec<u8>)> {
    world.sim.block_on(async {
        let volume = mount(world, 3).await;
        let mut all = BTreeMap::new();
        let mut open = vec![(String::new(), volume.root())];
        while let Some((path, directory)) = open.pop() {
            let mut cookie = 0;
            loop {
                let entries = volume.read_directory(directory, cookie, 50).await.unwrap();
                for entry in &entries {
                    cookie = entry.cookie;
                    let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                    let stat = volume.lookup(directory, &entry.name).await.unwrap();
                    let bytes = match entry.object_type {
                        ObjectType::Directory => {
                            open.push((path.clone(), entry.object));
                            Vec::new()
                        }
                        ObjectType::Symlink => volume.read_link(entry.object).await.unwrap(),
                        ObjectType::File => read(&volume, entry.object, 0, 400_000).await,
                        _ => {
                            let mut bytes = stat.attributes.size.to_le_bytes().to_vec();
                            for at in [0, stat.attributes.size / 2, stat.attributes.size.saturating_sub(4096)] {
                                bytes.extend(read(&volume, entry.object, at, 80_000).await);
                            }
                            bytes
                        }
                    };
                    all.insert(path, (entry.object_type, bytes));
                }
                if entries.len() < 50 {
                    break;
                }
            }
        }
        volume.unmount().await.unwrap();
        all
    })
}

/// Paths that are not there any more, or differ.
fn lost(
    before: &BTreeMap<String, (ObjectType, Vec<u8>)>,
    after: &BTreeMap<String, (ObjectType, Vec<u8>)>,
) -> Vec<String> {
    before.iter().filter(|(path, what)| after.get(*path) != Some(what)).map(|(path, _)| path.clone()).collect()
}

/// Cells of this kind on the first LUN.
fn cells(world: &World, kind: u8) -> Vec<u64> {
    let all = world.disks[0].peek(0, world.disks[0].bytes() as usize);
    let is = |cell: &[u8]| cell[..4] == *b"VMFc" && cell[4] == kind;
    all.chunks(512).enumerate().filter(|(_, cell)| is(cell)).map(|(nth, _)| nth as u64 * 512).collect()
}

#[test]
fn a_sound_volume_is_left_alone() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 60);
    assert_eq!(repaired(&world, false, "sound"), Vec::<String>::new());
}

#[test]
fn what_a_killed_host_leaves_is_put_right_without_consent() {
    for seed in 0..10 {
        let world = world(&[128 * MIB, 64 * MIB], CellSize::B512).make(16);
        world.sim.block_on(async {
            let volume = mount_slow(&world, 1, Duration::from_micros(400)).await;
            let large = volume.make_directory(volume.root(), b"large", 0o755, 0, 0).await.unwrap().object;
            let at_work = volume.clone();
            world.sim.spawn(HostNo(1), async move {
                fill(&at_work, 60).await;
                for nth in 0..1000 {
                    file(&at_work, large, &format!("{nth:0>100}"), 100_000).await;
                    let _ = at_work.unlink(large, format!("{nth:0>100}").as_bytes()).await;
                }
            });
            world.sim.sleep(Duration::from_millis(30) + Duration::from_micros(seed * 173_777)).await;
            world.sim.kill(HostNo(1));
        });
        let done = repaired(&world, false, &format!("seed {seed}"));
        assert!(done.iter().any(|what| what.contains("was gone")), "seed {seed}: {done:?}");
        everything(&world);
    }
}

#[test]
fn a_volume_that_a_host_uses_is_refused_and_stays_as_it_is() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 10);
    world.sim.block_on(async {
        let volume = mount(&world, 1).await;
        let refused = repair_of(&world, &mut Says::new(true)).await.unwrap_err();
        assert_eq!(refused.kind(), FsErrorKind::Busy, "{refused}");
        assert!(refused.to_string().contains("host1"), "{refused}");
        file(&volume, volume.root(), "after", 10_000).await;
        volume.unmount().await.unwrap();
    });
    world.assert_clean();
}

/// Damages one cell in several ways; gives the paths that a repair could not bring back.
fn after_damage(world: &World, offset: u64, how: u8, before: &BTreeMap<String, (ObjectType, Vec<u8>)>) -> Vec<String> {
    let image = world.disks[0].peek(offset, 512);
    match how {
        0 => world.disks[0].damage(offset + 120, &[image[120] ^ 0x20]),
        1 => world.disks[0].damage(offset, &[0; 512]),
        _ => {
            let other = world.disks[0].peek(offset ^ 0x200, 512);
            world.disks[0].damage(offset, &other);
        }
    }
    repaired(world, true, &format!("cell {offset:#x} of kind {}, damage {how}", image[4]));
    lost(before, &everything(world))
}

#[test]
fn each_damaged_structure_is_made_anew_and_nothing_else_is_lost() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 60);
    let (sound, before) = (world.disks[0].snapshot(), everything(&world));
    let sound_again = || world.disks[0].restore(&sound);
    for kind in 1..=12 {
        let all = cells(&world, kind);
        let step = (all.len() / 5).max(1);
        for (nth, offset) in all.iter().step_by(step).enumerate() {
            let gone = after_damage(&world, *offset, nth as u8 % 3, &before);
            // Only what a body holds has no second copy anywhere.
            let most = usize::from(kind == 9);
            assert!(gone.len() <= most, "cell {offset:#x} of kind {kind}: {gone:?}");
            sound_again();
        }
    }
}

/// Remembers what stood where something was overwritten.
#[derive(Default)]
struct Memory(std::cell::RefCell<Vec<(usize, u64, Vec<u8>)>>);

impl UndoLog for Memory {
    fn before(&self, lun: usize, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        self.0.borrow_mut().push((lun, offset, bytes.to_vec()));
        Ok(())
    }
}

/// Damages cells of several kinds at once, by a seed.
fn damage_several(world: &World, seed: u64, count: usize) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    let all: Vec<Vec<u64>> = (1..=12).map(|kind| cells(world, kind)).collect();
    for _ in 0..count {
        let of_kind = &all[draw(12)];
        if of_kind.is_empty() {
            continue;
        }
        let offset = of_kind[draw(of_kind.len())];
        match draw(3) {
            0 => world.disks[0].damage(offset + draw(512) as u64, &[draw(256) as u8]),
            1 => world.disks[0].damage(offset, &[0; 512]),
            _ => {
                let from = of_kind[draw(of_kind.len())];
                let image = world.disks[0].peek(from, 512);
                world.disks[0].damage(offset, &image);
            }
        }
    }
}

/// Header and copy damaged both: nothing can be said of the LUN.
fn has_header(world: &World) -> bool {
    [0x10_0000, 0x1f_f000].into_iter().any(|at| {
        let mut image = world.disks[0].peek(at, 512);
        let stored = image[8..12].to_vec();
        image[8..12].fill(0);
        image[..4] == *b"VMFc" && crc32c::crc32c(&image).to_le_bytes() == stored[..]
    })
}

#[test]
fn several_damages_at_once_end_in_a_sound_volume_that_mounts() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 40);
    let sound = world.disks[0].snapshot();
    for seed in 1..=12 {
        damage_several(&world, seed, 1 + seed as usize % 5);
        if has_header(&world) {
            repaired(&world, true, &format!("seed {seed}"));
            everything(&world);
        }
        world.disks[0].restore(&sound);
    }
}

#[test]
fn a_repair_that_is_taken_back_leaves_what_was_there_before() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 40);
    damage_several(&world, 3, 6);
    let before = world.disks[0].peek(0, 128 * MIB as usize);
    let memory = Rc::new(Memory::default());
    world.sim.block_on(async {
        let luns = paths(&world, 77);
        let log: Rc<dyn UndoLog> = memory.clone();
        repair(&world.env, &luns, RepairOptions::default(), Some(log), &mut Says::new(true)).await.unwrap();
        assert_ne!(world.disks[0].peek(0, 128 * MIB as usize), before);
        let records = memory.0.borrow().clone();
        assert!(!records.is_empty());
        undo(&world.env, &luns, &mut records.into_iter().rev().map(Ok)).await.unwrap();
    });
    assert!(world.disks[0].peek(0, 128 * MIB as usize) == before);
}

#[test]
fn a_repair_that_dies_anywhere_is_begun_again_and_no_host_mounts_before_it_has_ended() {
    let world = filled(&[128 * MIB], CellSize::B512, 16, 40);
    let before = everything(&world);
    // Kinds that have a second copy: the whole tree comes back.
    for kind in [5, 6, 7, 10, 12] {
        let all = cells(&world, kind);
        world.disks[0].damage(all[all.len() / 3], &[0; 512]);
    }
    let damaged = world.disks[0].snapshot();
    let (mut micros, mut ended, mut refused) = (2_000, false, 0);
    while !ended {
        ended = world.sim.block_on(async {
            let luns: Vec<Rc<dyn Lun>> = world
                .disks
                .iter()
                .map(|disk| -> Rc<dyn Lun> {
                    let path = disk.connect(&world.sim, HostNo(50));
                    path.set_latency(Duration::from_micros(5), Duration::from_micros(10));
                    path
                })
                .collect();
            let env = world.sim.env(HostNo(50));
            let done = Rc::new(std::cell::Cell::new(false));
            let told = done.clone();
            world.sim.spawn(HostNo(50), async move {
                let env: Rc<dyn vmfs_core::env::Env> = env;
                repair(&env, &luns, RepairOptions::default(), None, &mut Says::new(true)).await.unwrap();
                told.set(true);
            });
            world.sim.sleep(Duration::from_micros(micros)).await;
            world.sim.kill(HostNo(50));
            let options = super::content::mount_options(9);
            match Volume::mount(paths(&world, 9), options, world.sim.env(HostNo(9))).await {
                Ok(volume) => volume.unmount().await.unwrap(),
                Err(error) => refused += usize::from(error.to_string().contains("fsck.vmfs -p again")),
            }
            done.get()
        });
        repaired(&world, true, &format!("cut off after {micros} us"));
        let gone = lost(&before, &everything(&world));
        assert!(gone.is_empty(), "cut off after {micros} us: {gone:?}");
        world.disks[0].restore(&damaged);
        micros += 23_000;
        assert!(micros < 10_000_000, "it never ends");
    }
    assert!(refused > 0, "no mount met a repair that was cut off");
}
