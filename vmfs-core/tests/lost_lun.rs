//! Promises of the loss of a LUN, the first one too: what lies wholly on others goes on, the rest is refused with an error that names the
//! LUN, nothing waits for ever, and with the LUN's return all of it can be used again.

mod names_support;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use names_support::*;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::body::Content;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::{ObjectFlags, ObjectType};
use vmfs_core::lun::Lun;
use vmfs_core::sim::{HostNo, MemoryDisk, PathState, Sim};
use vmfs_core::units::{CellSize, FdId, LunIndex};
use vmfs_core::volume::{Affected, LostPart, MountOptions, NewObjectSpec, Volume};

const LUNS: usize = 3;
/// Longer than a live slot is watched, and than a lease.
const A_WHILE: Duration = Duration::from_secs(60);
/// No operation takes longer, whatever is lost.
const LONGEST: Duration = Duration::from_secs(30);

/// A directory under the root whose LUN is known, with a file that has data in blocks.
#[derive(Clone)]
struct Home {
    lun: LunIndex,
    name: Vec<u8>,
    directory: ObjectRef,
    file: ObjectRef,
    bytes: Vec<u8>,
}

fn lun(number: usize) -> LunIndex {
    LunIndex::new(number as u8).unwrap()
}

fn directory_on(lun: LunIndex) -> NewObjectSpec {
    NewObjectSpec {
        object_type: ObjectType::Directory,
        flags: ObjectFlags::empty(),
        luns: None,
        prefer: Some(lun),
        mode: 0o755,
        uid: 7,
        gid: 8,
        size: 0,
        disk: None,
        content: Content::Entries(Vec::new()),
        lock: None,
    }
}

/// One home on each LUN.
async fn homes(volume: &Volume) -> Vec<Home> {
    let mut homes = Vec::new();
    for number in 1..=LUNS {
        let name = format!("home{number}").into_bytes();
        let made = volume.create_object(volume.root(), &name, directory_on(lun(number))).await.unwrap();
        assert_eq!(made.object.fd.lun(), lun(number));
        let file = create(volume, made.object, b"file").await.unwrap().object;
        assert_eq!(file.fd.lun(), lun(number));
        let bytes = vec![number as u8; 200_000];
        write(volume, file, 0, &bytes).await.unwrap();
        homes.push(Home { lun: lun(number), name, directory: made.object, file, bytes });
    }
    homes
}

async fn write_open(volume: &Volume, open: &Arc<OpenFile>, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(open, at + done as u64, &bytes[done..]).await?;
    }
    volume.flush(open).await
}

async fn write(volume: &Volume, file: ObjectRef, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let open = volume.open(file, OpenMode::WRITE).await?;
    let written = write_open(volume, &open, at, bytes).await;
    let closed = volume.close(open).await;
    written.and(closed)
}

async fn read(volume: &Volume, file: ObjectRef, length: usize) -> Result<Vec<u8>, FsError> {
    let open = volume.open(file, OpenMode::READ).await?;
    let bytes = volume.files().read(&open, 0, length).await;
    let closed = volume.close(open).await;
    closed.and(bytes)
}

fn reach(disk: &MemoryDisk, hosts: &[u32], state: PathState) {
    hosts.iter().for_each(|host| disk.set_path(HostNo(*host), state));
}

/// What `work` gives, within [`LONGEST`].
async fn in_time<T>(sim: &Sim, what: &str, work: impl Future<Output = T>) -> T {
    let began = sim.now();
    let given = work.await;
    let took = Duration::from_nanos(sim.now() - began);
    assert!(took <= LONGEST, "{what} took {took:?}");
    given
}

fn assert_names(error: &FsError, lost: &MemoryDisk, index: LunIndex, what: &str) {
    assert_eq!(error.kind(), FsErrorKind::Io, "{what}: {error}");
    let text = error.to_string();
    assert!(text.contains(lost.name()) || text.contains(&index.to_string()), "{what} does not name the LUN: {text}");
}

/// Everything that can be done in a home works.
async fn works_in(sim: &Sim, volume: &Volume, home: &mut Home, round: &str) {
    let (directory, label) = (home.directory, format!("{round}, {}", String::from_utf8_lossy(&home.name)));
    in_time(sim, &label, async {
        let found = volume.lookup(directory, b"file").await.unwrap_or_else(|error| panic!("{label}: {error}"));
        assert_eq!(found.object, home.file, "{label}");
        assert_eq!(read(volume, home.file, home.bytes.len()).await.unwrap(), home.bytes, "{label}");
        let more = vec![0x55; 150_000];
        write(volume, home.file, home.bytes.len() as u64, &more).await.unwrap_or_else(|e| panic!("{label}: {e}"));
        home.bytes.extend(more);
        let new = format!("new {round}");
        let made = create(volume, directory, new.as_bytes()).await.unwrap_or_else(|e| panic!("{label}: {e}")).object;
        write(volume, made, 0, &[9; 70_000]).await.unwrap_or_else(|error| panic!("{label}: {error}"));
        assert_eq!(read(volume, made, 70_000).await.unwrap(), [9; 70_000], "{label}");
        let deep = mkdir(volume, directory, b"deep").await.unwrap_or_else(|error| panic!("{label}: {error}")).object;
        volume.rename(directory, new.as_bytes(), deep, b"moved", Default::default()).await.unwrap();
        volume.unlink(deep, b"moved").await.unwrap();
        volume.remove_directory(directory, b"deep").await.unwrap();
        assert!(!exists(volume, directory, new.as_bytes()).await, "{label}");
    })
    .await;
}

/// Everything that is asked of a home on the lost LUN is refused, in bounded time, with an error that names the LUN.
async fn refused_in(sim: &Sim, volume: &Volume, home: &Home, lost: &MemoryDisk) {
    let directory = home.directory;
    let named = |error: FsError, what: &str| assert_names(&error, lost, home.lun, what);
    let refused = in_time(sim, "read", read(volume, home.file, 10)).await;
    named(refused.unwrap_err(), "read");
    let refused = in_time(sim, "write", write(volume, home.file, 0, &[1; 512])).await;
    named(refused.unwrap_err(), "write");
    let refused = in_time(sim, "create", create(volume, directory, b"x")).await;
    named(refused.unwrap_err(), "create");
    let refused = in_time(sim, "unlink", volume.unlink(directory, b"file")).await;
    named(refused.unwrap_err(), "unlink");
    let refused = in_time(sim, "lookup", volume.lookup(directory, b"file")).await;
    named(refused.unwrap_err(), "lookup of a file");
    let refused = in_time(sim, "lookup", volume.lookup(directory, b"never")).await;
    named(refused.unwrap_err(), "lookup of a name that may have been there");
}

async fn unmount_all(sim: &Sim, disks: &[MemoryDisk], volumes: &[Volume], label: &str) {
    for volume in volumes {
        volume.unmount().await.unwrap_or_else(|error| panic!("{label}: {error}"));
    }
    // What a failed command left behind is recovered by whoever mounts next.
    let (after, _) = mount(sim, disks, 9).await;
    sim.sleep(Duration::from_secs(120)).await;
    after.unmount().await.unwrap();
    assert_eq!(fsck(sim, disks, false).await, Vec::new(), "{label}");
}

#[test]
fn a_lun_that_all_hosts_lose_hurts_only_what_lies_on_it_and_is_used_again_when_it_is_back() {
    for gone in 1..=LUNS {
        let (sim, disks) = world(gone as u64, LUNS, CellSize::B512);
        sim.block_on(async {
            let label = format!("LUN {gone}");
            let (a, _) = mount(&sim, &disks, 1).await;
            let (b, _) = mount(&sim, &disks, 2).await;
            let mut homes = homes(&a).await;
            let lost = &disks[gone - 1];
            reach(lost, &[1, 2], PathState::Cut);
            for (round, wait) in ["at once", "after a while"].into_iter().zip([Duration::ZERO, A_WHILE]) {
                sim.sleep(wait).await;
                for volume in [&a, &b] {
                    for home in homes.iter_mut().filter(|home| home.lun != lun(gone)) {
                        works_in(&sim, volume, home, round).await;
                    }
                    refused_in(&sim, volume, &homes[gone - 1], lost).await;
                    assert_eq!(volume.context().fenced(), None, "{label}");
                }
            }
            reach(lost, &[1, 2], PathState::Up);
            sim.sleep(Duration::from_secs(10)).await;
            for volume in [&a, &b] {
                for home in &mut homes {
                    works_in(&sim, volume, home, "when it is back").await;
                }
            }
            unmount_all(&sim, &disks, &[a, b], &label).await;
        });
        sim.end();
    }
}

async fn mount_without(
    sim: &Sim,
    disks: &[MemoryDisk],
    gone: usize,
    number: u32,
    degraded: bool,
) -> Result<Volume, FsError> {
    let here = disks.iter().enumerate().filter(|(nth, _)| nth + 1 != gone);
    let luns = here.map(|(_, disk)| -> Rc<dyn Lun> { disk.connect(sim, HostNo(number)) }).collect();
    let options = MountOptions { degraded, ..mount_options(number) };
    let volume = Volume::mount(luns, options, sim.env(HostNo(number))).await?;
    let background = volume.clone();
    sim.spawn(HostNo(number), async move { background.background().await });
    Ok(volume)
}

/// Files of the home on the next LUN whose directory is this home's, and one below the root.
async fn scatter(volume: &Volume, homes: &[Home]) -> Vec<(usize, Vec<u8>, ObjectRef)> {
    let mut all = Vec::new();
    for (nth, home) in homes.iter().enumerate() {
        let elsewhere = homes[(nth + 1) % homes.len()].lun;
        let name = format!("scattered{nth}").into_bytes();
        let spec = NewObjectSpec {
            object_type: ObjectType::File,
            content: Content::Inline(Vec::new()),
            ..directory_on(elsewhere)
        };
        let file = volume.create_object(home.directory, &name, spec).await.unwrap().object;
        assert_eq!(file.fd.lun(), elsewhere);
        write(volume, file, 0, &name).await.unwrap();
        all.push((nth, name, file));
    }
    all
}

/// Every name below the root that can be had is there, and those of lost directories lead to their files.
async fn names_are_rebuilt(
    sim: &Sim,
    volume: &Volume,
    homes: &[Home],
    scattered: &[(usize, Vec<u8>, ObjectRef)],
    gone: usize,
) {
    let root = volume.root();
    let root_is_lost = gone == 1;
    for (nth, home) in homes.iter().enumerate() {
        let (_, name, file) = &scattered[nth];
        // A lost directory keeps its name where the root can be read.
        let shown = if nth + 1 == gone && root_is_lost {
            format!("lost-{}", home.directory.fd).into_bytes()
        } else {
            home.name.clone()
        };
        let listed = list(volume, root, 2).await;
        assert_eq!(listed.get(&shown).map(|(object, _)| object.fd), Some(home.directory.fd), "{listed:?}");
        let directory = volume.lookup(root, &shown).await.unwrap();
        assert_eq!((directory.object.fd, directory.object_type), (home.directory.fd, ObjectType::Directory));
        assert_eq!(volume.stat(directory.object).await.unwrap().object_type, ObjectType::Directory);
        if file.fd.lun() == lun(gone) {
            let refused = volume.lookup(directory.object, name).await.unwrap_err();
            assert_eq!(refused.kind(), FsErrorKind::Io, "{refused}");
            continue;
        }
        let found = volume.lookup(directory.object, name).await.unwrap();
        assert_eq!(found.object, *file);
        assert!(list(volume, directory.object, 3).await.contains_key(name));
        assert_eq!(read(volume, *file, name.len()).await.unwrap(), *name);
        write(volume, *file, 0, name).await.unwrap();
        if nth + 1 != gone {
            continue;
        }
        for refused in [
            create(volume, directory.object, b"new").await.err(),
            mkdir(volume, directory.object, b"new").await.err(),
            volume.unlink(directory.object, name).await.err(),
            volume.rename(directory.object, name, directory.object, b"new", Default::default()).await.err(),
            volume.lookup(directory.object, b"never").await.err(),
            volume.rename(directory.object, b"never", homes[nth % 2].directory, b"x", Default::default()).await.err(),
        ] {
            let refused = refused.expect("names of a lost directory do not change");
            assert_eq!(refused.kind(), FsErrorKind::Io, "{refused}");
        }
        let other = homes.iter().find(|other| other.lun != lun(gone)).unwrap();
        let into = volume.rename(other.directory, b"file", directory.object, b"x", Default::default()).await;
        assert_eq!(into.unwrap_err().kind(), FsErrorKind::Io);
    }
    assert_eq!(
        volume.lookup(root, b"lost-fd9.9.9").await.unwrap_err().kind(),
        if root_is_lost { FsErrorKind::Io } else { FsErrorKind::NotFound }
    );
    sim.sleep(Duration::from_millis(10)).await;
}

#[test]
fn names_of_lost_directories_are_rebuilt_and_files_leave_them_for_good() {
    for gone in 1..=LUNS {
        for degraded in [false, true] {
            let (sim, disks) = world(gone as u64 + 10, LUNS, CellSize::B4096);
            sim.block_on(async {
                let label = format!("LUN {gone}, degraded mount: {degraded}");
                let (a, _) = mount(&sim, &disks, 1).await;
                let homes = homes(&a).await;
                let scattered = scatter(&a, &homes).await;
                sim.sleep(Duration::from_secs(3)).await;
                let lost = &disks[gone - 1];
                let volume = if degraded {
                    a.unmount().await.unwrap();
                    let refused = mount_without(&sim, &disks, gone, 1, false).await.err().expect("members are missing");
                    let text = refused.to_string();
                    assert!(text.contains("-o degraded") && text.contains(&format!("missing lun{gone} ")), "{text}");
                    mount_without(&sim, &disks, gone, 1, true).await.unwrap()
                } else {
                    reach(lost, &[1], PathState::Cut);
                    sim.sleep(Duration::from_secs(10)).await;
                    a
                };
                assert_eq!(volume.root().link.0, 1, "{label}");
                names_are_rebuilt(&sim, &volume, &homes, &scattered, gone).await;
                // The file of the lost directory moves to one that is there.
                let (_, name, file) = &scattered[gone - 1];
                let other = homes.iter().find(|home| home.lun != lun(gone)).unwrap();
                let from = ObjectRef { ..homes[gone - 1].directory };
                let renamed = volume.rename(from, name, other.directory, b"saved", Default::default()).await.unwrap();
                assert_eq!(renamed.before, *file);
                assert_eq!(volume.lookup(other.directory, b"saved").await.unwrap().object, renamed.after);
                assert_eq!(read(&volume, renamed.after, name.len()).await.unwrap(), *name);
                let refused = volume.lookup(from, name).await.unwrap_err();
                assert_eq!(refused.kind(), FsErrorKind::Io, "{refused}");
                if !degraded {
                    reach(lost, &[1], PathState::Up);
                    sim.sleep(Duration::from_secs(10)).await;
                }
                volume.unmount().await.unwrap_or_else(|error| panic!("{label}: {error}"));
                let (whole, _) = mount(&sim, &disks, 2).await;
                assert!(exists(&whole, other.directory, b"saved").await, "{label}");
                assert!(!exists(&whole, homes[gone - 1].directory, name).await, "{label}");
                for home in &homes {
                    assert_eq!(whole.lookup(whole.root(), &home.name).await.unwrap().object, home.directory, "{label}");
                    assert_eq!(read(&whole, home.file, home.bytes.len()).await.unwrap(), home.bytes, "{label}");
                    // The next change of a directory takes out what a move left there.
                    create(&whole, home.directory, b"after").await.unwrap();
                }
                sim.sleep(Duration::from_secs(120)).await;
                whole.unmount().await.unwrap();
                let mut findings = fsck(&sim, &disks, false).await;
                // Whoever moved the file left its old entry behind, where nobody believes it, unless it was there when the LUN came back.
                findings.retain(|finding| !degraded || finding.field != "entry");
                assert_eq!(findings, Vec::new(), "{label}");
            });
            sim.end();
        }
    }
}

/// The first host says late what name it gave; the second one has given another one by then, and has said so.
#[test]
fn a_rebuilt_name_is_the_last_one_whichever_host_gave_it() {
    let (sim, disks) = world(31, LUNS, CellSize::B512);
    sim.block_on(async {
        let luns = disks.iter().map(|disk| -> Rc<dyn Lun> { disk.connect(&sim, HostNo(1)) }).collect();
        let late = Volume::mount(luns, MountOptions { ..mount_options(1) }, sim.env(HostNo(1))).await.unwrap();
        let (other, _) = mount(&sim, &disks, 2).await;
        let homes = homes(&other).await;
        let scattered = scatter(&other, &homes).await;
        let (_, name, file) = &scattered[0];
        let home = homes[0].directory;
        late.rename(home, name, home, b"second", Default::default()).await.unwrap();
        other.rename(home, b"second", home, b"third", Default::default()).await.unwrap();
        sim.sleep(Duration::from_secs(4)).await;
        let background = late.clone();
        sim.spawn(HostNo(1), async move { background.background().await });
        sim.sleep(Duration::from_secs(10)).await;
        reach(&disks[0], &[2], PathState::Cut);
        sim.sleep(Duration::from_secs(10)).await;
        assert_eq!(other.lookup(home, b"third").await.unwrap().object, *file);
        assert_eq!(other.lookup(home, b"second").await.unwrap_err().kind(), FsErrorKind::Io);
    });
    sim.end();
}

/// A file in the first home that fills its LUN and goes on elsewhere: a byte in each block.
async fn spilling_file(volume: &Volume, home: &Home, block: u64, blocks: u64) -> ObjectRef {
    let file = create(volume, home.directory, b"big").await.unwrap().object;
    let open = volume.open(file, OpenMode::WRITE).await.unwrap();
    for nth in 0..blocks {
        volume.files().write(&open, nth * block, &[7]).await.unwrap();
    }
    volume.flush(&open).await.unwrap();
    volume.close(open).await.unwrap();
    file
}

/// Whether every block of a file can be read.
async fn is_readable(volume: &Volume, file: ObjectRef, block: u64, blocks: u64) -> bool {
    let open = volume.open(file, OpenMode::READ).await.unwrap();
    let mut readable = true;
    for nth in 0..blocks {
        readable &= volume.files().read(&open, nth * block, 1).await.is_ok();
    }
    volume.close(open).await.unwrap();
    readable
}

#[test]
fn status_lists_exactly_what_lies_on_a_lost_lun_in_whole_or_in_part() {
    let (block, blocks) = (64 << 10, 1100);
    let mut spilled = 0;
    for gone in 1..=LUNS {
        let (sim, disks) = world(gone as u64 + 20, LUNS, CellSize::B512);
        sim.block_on(async {
            let (a, _) = mount(&sim, &disks, 1).await;
            let homes = homes(&a).await;
            let scattered = scatter(&a, &homes).await;
            let big = spilling_file(&a, &homes[0], block, blocks).await;
            assert_eq!(a.status().await.affected, Affected::default());
            a.unmount().await.unwrap();
            let volume = mount_without(&sim, &disks, gone, 1, true).await.unwrap();
            let status = volume.status().await;
            assert_eq!(status.missing.iter().map(|lun| lun.index).collect::<Vec<_>>(), [lun(gone)]);
            assert_eq!((status.affected.luns.as_slice(), status.affected.cut), ([lun(gone)].as_slice(), false));
            let found: BTreeMap<FdId, (LostPart, Option<String>)> = status
                .affected
                .objects
                .iter()
                .map(|object| {
                    let path = object.path.as_ref().map(|path| String::from_utf8(path.clone()).unwrap());
                    (object.fd, (object.part, path))
                })
                .collect();
            let mut expected = BTreeMap::new();
            if gone == 1 {
                expected.insert(volume.root().fd, (LostPart::RootCell, Some("/".to_owned())));
            } else {
                // The root names the home, whose own names nobody knows now.
                let home = format!("/home{gone}");
                expected.insert(homes[gone - 1].directory.fd, (LostPart::RootCell, Some(home)));
            }
            for (nth, name, file) in &scattered {
                if file.fd.lun() == lun(gone) && nth + 1 != gone {
                    // With the root its children's paths are lost.
                    let path = format!("/home{}/{}", nth + 1, String::from_utf8_lossy(name));
                    expected.insert(file.fd, (LostPart::RootCell, (gone != 1).then_some(path)));
                }
            }
            if gone != 1 && !is_readable(&volume, big, block, blocks).await {
                spilled += 1;
                expected.insert(big.fd, (LostPart::Blocks, Some("/home1/big".to_owned())));
            }
            assert_eq!(found, expected, "LUN {gone}");
            volume.unmount().await.unwrap();
        });
        sim.end();
    }
    assert!(spilled > 0, "the file never left its LUN: the test shows nothing");
}

#[test]
fn a_lun_that_was_missing_at_the_mount_is_taken_up_when_it_comes() {
    for gone in 1..=LUNS {
        let (sim, disks) = world(gone as u64 + 30, LUNS, CellSize::B512);
        sim.block_on(async {
            let label = format!("LUN {gone}");
            let (a, _) = mount(&sim, &disks, 1).await;
            let mut homes = homes(&a).await;
            let scattered = scatter(&a, &homes).await;
            a.unmount().await.unwrap();
            let volume = mount_without(&sim, &disks, gone, 1, true).await.unwrap();
            names_are_rebuilt(&sim, &volume, &homes, &scattered, gone).await;
            for home in homes.iter_mut().filter(|home| home.lun != lun(gone)) {
                works_in(&sim, &volume, home, "degraded").await;
            }
            let adopted = volume.adopt(disks[gone - 1].connect(&sim, HostNo(1))).await.unwrap();
            assert_eq!(adopted, lun(gone));
            let status = volume.status().await;
            assert_eq!((status.missing, status.affected), (Vec::new(), Affected::default()), "{label}");
            let root = list(&volume, volume.root(), 10).await;
            assert_eq!(root.len(), LUNS, "{label}: {root:?}");
            for home in &mut homes {
                assert_eq!(volume.lookup(volume.root(), &home.name).await.unwrap().object, home.directory);
                works_in(&sim, &volume, home, "taken up").await;
            }
            for (nth, name, file) in &scattered {
                assert_eq!(volume.lookup(homes[*nth].directory, name).await.unwrap().object, *file, "{label}");
            }
            sim.sleep(A_WHILE).await;
            volume.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "{label}");
        });
        sim.end();
    }
}

#[test]
fn an_unmount_without_a_lun_ends_and_what_it_left_there_is_recovered() {
    for gone in 1..=LUNS {
        let (sim, disks) = world(gone as u64 + 40, LUNS, CellSize::B512);
        sim.block_on(async {
            let (a, _) = mount(&sim, &disks, 1).await;
            let mut homes = homes(&a).await;
            a.unlink(homes[gone - 1].directory, b"file").await.unwrap();
            reach(&disks[gone - 1], &[1], PathState::Cut);
            sim.sleep(A_WHILE).await;
            for home in homes.iter_mut().filter(|home| home.lun != lun(gone)) {
                works_in(&sim, &a, home, "before the unmount").await;
            }
            // Not all of it was left in order, and that is said.
            let told = in_time(&sim, "unmount", a.unmount()).await.unwrap_err();
            assert_eq!(told.kind(), FsErrorKind::Io, "{told}");
            reach(&disks[gone - 1], &[1], PathState::Up);
            unmount_all(&sim, &disks, &[], &format!("LUN {gone}")).await;
        });
        sim.end();
    }
}

#[test]
fn a_host_that_alone_loses_a_lun_for_less_than_a_takeover_goes_on_as_if_nothing_had_been() {
    for gone in 1..=LUNS {
        let (sim, disks) = world(gone as u64 + 50, LUNS, CellSize::B512);
        sim.block_on(async {
            let (a, _) = mount(&sim, &disks, 1).await;
            let (b, _) = mount(&sim, &disks, 2).await;
            let mut homes = homes(&a).await;
            let held = a.open(homes[gone - 1].file, OpenMode::WRITE).await.unwrap();
            reach(&disks[gone - 1], &[1], PathState::Cut);
            sim.sleep(Duration::from_secs(18)).await;
            let refused = b.open(homes[gone - 1].file, OpenMode::WRITE).await.err().map(|error| error.kind());
            assert_eq!(refused, Some(FsErrorKind::Busy));
            reach(&disks[gone - 1], &[1], PathState::Up);
            sim.sleep(Duration::from_secs(5)).await;
            write_open(&a, &held, 0, &[0x77; 4096]).await.unwrap();
            a.close(held).await.unwrap();
            homes[gone - 1].bytes[..4096].fill(0x77);
            for volume in [&a, &b] {
                for home in &mut homes {
                    works_in(&sim, volume, home, "after a short loss").await;
                }
                assert_eq!(volume.context().fenced(), None);
            }
            unmount_all(&sim, &disks, &[a, b], &format!("LUN {gone}")).await;
        });
        sim.end();
    }
}

#[test]
fn a_lock_that_could_not_be_given_back_because_of_a_lost_lun_is_not_left_behind_as_nobodys() {
    let (sim, disks) = world(61, LUNS, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (b, _) = mount(&sim, &disks, 2).await;
        let home = homes(&a).await[0].clone();
        // Nothing else is left to do.
        sim.sleep(Duration::from_secs(10)).await;
        let held = a.open(home.file, OpenMode::WRITE).await.unwrap();
        reach(&disks[0], &[1], PathState::Cut);
        a.close(held).await.unwrap_err();
        sim.sleep(Duration::from_secs(10)).await;
        // It answers again, and nothing was asked of it yet.
        reach(&disks[0], &[1], PathState::Up);
        drop(a.unmount().await);
        sim.kill(HostNo(1));
        assert_eq!(fsck(&sim, &disks, true).await, Vec::new());
        let taken = b.open(home.file, OpenMode::WRITE).await.unwrap();
        b.close(taken).await.unwrap();
        unmount_all(&sim, &disks, &[b], "a lock").await;
    });
    sim.end();
}

#[test]
fn a_creation_that_failed_is_not_found_by_a_rebuilt_name_and_one_that_succeeded_is() {
    let (sim, disks) = world(62, 2, CellSize::B512);
    sim.block_on(async {
        let (a, _) = mount(&sim, &disks, 1).await;
        let (b, _) = mount(&sim, &disks, 2).await;
        let directory = a.create_object(a.root(), b"d", directory_on(lun(2))).await.unwrap().object;
        let spec = || NewObjectSpec {
            object_type: ObjectType::File,
            content: Content::Inline(Vec::new()),
            ..directory_on(lun(1))
        };
        let made = a.create_object(directory, b"made", spec()).await.unwrap().object;
        sim.sleep(Duration::from_secs(5)).await;
        disks[1].set_lost(true);
        a.create_object(directory, b"failed", spec()).await.unwrap_err();
        sim.sleep(Duration::from_secs(10)).await;
        for volume in [&a, &b] {
            assert_eq!(volume.lookup(directory, b"made").await.unwrap().object, made);
            let refused = volume.lookup(directory, b"failed").await.unwrap_err();
            assert_eq!(refused.kind(), FsErrorKind::Io, "{refused}");
            assert!(!list(volume, directory, 4).await.contains_key(b"failed".as_slice()));
        }
        disks[1].set_lost(false);
        sim.sleep(A_WHILE).await;
        for volume in [&a, &b] {
            assert!(exists(volume, directory, b"made").await);
            assert!(!exists(volume, directory, b"failed").await);
        }
        unmount_all(&sim, &disks, &[a, b], "a creation").await;
    });
    sim.end();
}
