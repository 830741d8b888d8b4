//! Promises of members that come while the volume is mounted: files that are open use them, nothing else is taken for one, and what is
//! open under a lock that was taken before is safe there.

#[path = "extents/drain.rs"]
mod drain;
#[path = "extents/growth.rs"]
mod growth;
mod names_support;
#[path = "extents/remove.rs"]
mod remove;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use names_support::*;
use vmfs_core::cas::{CasOutcome, CellChange};
use vmfs_core::check::Severity;
use vmfs_core::env::LocalFuture;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::header::MemberState;
use vmfs_core::format::layout::member_cell;
use vmfs_core::format::member::Member;
use vmfs_core::lun::Lun;
use vmfs_core::sim::{HostNo, MemoryDisk, Seen, Sim, Watcher, format_disks};
use vmfs_core::units::{CellSize, LunIndex, Seq};
use vmfs_core::volume::{LunFinder, Volume, WantedLun};

const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };
const SECOND: LunIndex = LunIndex::new(2).unwrap();

async fn write(volume: &Volume, open: &Arc<OpenFile>, at: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += volume.files().write(open, at + done as u64, &bytes[done..]).await?;
    }
    volume.flush(open).await
}

fn path(sim: &Sim, disk: &MemoryDisk, host: u32) -> Rc<dyn Lun> {
    disk.connect(sim, HostNo(host))
}

/// Finds every disk of a world, whatever is wanted.
struct Shelf {
    sim: Sim,
    disks: Vec<MemoryDisk>,
    host: u32,
}

impl LunFinder for Shelf {
    fn candidates<'a>(&'a self, _: &'a WantedLun) -> LocalFuture<'a, Vec<Rc<dyn Lun>>> {
        let luns = self.disks.iter().map(|disk| path(&self.sim, disk, self.host)).collect();
        Box::pin(std::future::ready(luns))
    }
}

/// A host that mounts `disks` and finds those of `shelf` later.
async fn mount_finding(sim: &Sim, disks: &[MemoryDisk], shelf: &[MemoryDisk], host: u32) -> Volume {
    let volume = mount_slow(sim, disks, host).await;
    volume.set_finder(Rc::new(Shelf { sim: sim.clone(), disks: shelf.to_vec(), host }));
    volume
}

fn blank(name: &str) -> MemoryDisk {
    MemoryDisk::new(name, 64 << 20, Some(CellSize::B512))
}

fn indexes(volume: &Volume) -> Vec<u8> {
    volume.luns().iter().map(|lun| lun.index.get()).collect()
}

/// Waits until a host has this many members.
async fn has(sim: &Sim, volume: &Volume, count: usize, longest: Duration) {
    let began = sim.now();
    while volume.luns().len() != count {
        let waited = Duration::from_nanos(sim.now() - began);
        assert!(
            waited < longest,
            "after {waited:?} it has {:?}; {:?}",
            indexes(volume),
            volume.status().await.warnings
        );
        sim.sleep(Duration::from_millis(50)).await;
    }
}

fn errors(sim: &Sim, disks: &[MemoryDisk]) -> Vec<vmfs_core::check::Finding> {
    sim.block_on(fsck(sim, disks, true)).into_iter().filter(|found| found.severity == Severity::Error).collect()
}

/// What the first LUN says of the second one.
async fn set_state(volume: &Volume, state: MemberState) {
    let cell = volume.context().read_cell(member_cell(LunIndex::new(1).unwrap(), SECOND)).await.unwrap();
    let member = Member { state, ..Member::decode(cell.payload()).unwrap() };
    let outcome = volume.context().cas(&cell, CellChange::payload(&cell, member.encode())).await.unwrap();
    assert!(matches!(outcome, CasOutcome::Applied(_)));
}

/// How often the root cell of an object has changed.
async fn root_seq(volume: &Volume, object: ObjectRef) -> Seq {
    let at = volume.context().member(object.fd.lun()).unwrap().layout().root_cell(object.fd).unwrap();
    volume.context().read_cell(at).await.unwrap().header().seq
}

/// A volume of two LUNs of which the first one calls the second one removed: it mounts alone.
async fn without_second(sim: &Sim, disks: &[MemoryDisk]) {
    let (volume, _) = mount(sim, disks, 9).await;
    set_state(&volume, MemberState::Removed).await;
    volume.unmount().await.unwrap();
}

#[test]
fn a_file_that_is_open_and_finds_no_space_goes_on_a_member_that_came_later() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            without_second(&sim, &disks).await;
            let (volume, _) = mount(&sim, &disks[..1], 1).await;
            let file = create(&volume, volume.root(), b"grows").await.unwrap().object;
            let open = volume.open(file, WRITE).await.unwrap();
            let mut size = 0;
            let full = loop {
                match write(&volume, &open, size, &[1; 1 << 20]).await {
                    Ok(()) => size += 1 << 20,
                    Err(error) => break error,
                }
            };
            assert_eq!(full.kind(), FsErrorKind::NoSpace, "{full}");
            set_state(&volume, MemberState::Active).await;
            assert_eq!(volume.adopt(path(&sim, &disks[1], 1)).await.unwrap(), SECOND);
            write(&volume, &open, size, &[2; 5 << 20]).await.unwrap();
            assert_eq!(volume.files().read(&open, size, 5 << 20).await.unwrap(), [2; 5 << 20]);
            let used = volume.status().await.luns.into_iter().find(|lun| lun.info.index == SECOND).unwrap();
            assert!(used.total_blocks - used.free_blocks >= 80, "{used:?}");
            volume.close(open).await.unwrap();
            volume.unmount().await.unwrap();
            // What is on it is there for everybody, and nothing contradicts.
            let (other, _) = mount(&sim, &disks, 2).await;
            let open = other.open(file, OpenMode::READ).await.unwrap();
            assert_eq!(other.files().read(&open, size, 5 << 20).await.unwrap(), [2; 5 << 20]);
            other.close(open).await.unwrap();
            other.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

#[test]
fn a_lock_that_was_taken_before_a_member_came_is_confirmed_before_its_data_there_is_touched() {
    let (sim, disks) = world(1, 2, CellSize::B512);
    sim.block_on(async {
        without_second(&sim, &disks).await;
        let (early, _) = mount(&sim, &disks[..1], 1).await;
        let (late, _) = mount(&sim, &disks[..1], 2).await;
        let file = create(&early, early.root(), b"shared").await.unwrap().object;
        set_state(&early, MemberState::Active).await;
        early.adopt(path(&sim, &disks[1], 1)).await.unwrap();
        // The first host puts the file on both LUNs; the second one takes its lock without knowing the new LUN.
        let open = early.open(file, WRITE).await.unwrap();
        let size = 80 << 20;
        write(&early, &open, 0, &vec![5; size]).await.unwrap();
        early.close(open).await.unwrap();
        let open = late.open(file, WRITE).await.unwrap();
        let end = size as u64 - 4096;
        let missing = write(&late, &open, end, &[6; 4096]).await.unwrap_err();
        assert!(missing.to_string().contains("LUN that is not there"), "{missing}");
        let before = root_seq(&late, file).await;
        late.adopt(path(&sim, &disks[1], 2)).await.unwrap();
        write(&late, &open, end, &[6; 4096]).await.unwrap();
        assert_ne!(root_seq(&late, file).await, before, "the lock was not confirmed");
        late.close(open).await.unwrap();
        early.unmount().await.unwrap();
        late.unmount().await.unwrap();
    });
    assert_eq!(errors(&sim, &disks), []);
}

#[test]
fn what_is_no_member_in_use_of_this_volume_is_not_taken_up() {
    let (sim, disks) = world(2, 2, CellSize::B512);
    let foreign = [MemoryDisk::new("foreign", 64 << 20, Some(CellSize::B512))];
    let blank = MemoryDisk::new("blank", 64 << 20, Some(CellSize::B512));
    sim.block_on(async {
        format_disks(&sim, &foreign, options(CellSize::B512)).await.unwrap();
        without_second(&sim, &disks).await;
        let (volume, _) = mount(&sim, &disks[..1], 1).await;
        for (disk, kind, words) in [
            (&disks[0], FsErrorKind::Exists, "in use already"),
            (&disks[1], FsErrorKind::Invalid, "Removed"),
            (&foreign[0], FsErrorKind::Invalid, "belongs to volume"),
            (&blank, FsErrorKind::Invalid, "no LUN of a VMFS volume"),
        ] {
            let refused = volume.adopt(path(&sim, disk, 1)).await.unwrap_err();
            assert_eq!(refused.kind(), kind, "{refused}");
            assert!(refused.to_string().contains(words), "{refused}");
        }
        assert_eq!(volume.luns().len(), 1);
        volume.unmount().await.unwrap();
        assert_eq!(volume.adopt(path(&sim, &disks[1], 1)).await.unwrap_err().kind(), FsErrorKind::Io);
    });
}

#[test]
fn a_lun_that_one_host_adds_is_used_by_all_others_within_two_heartbeats() {
    let (sim, mut disks) = world(3, 2, CellSize::B512);
    let new = blank("new");
    sim.block_on(async {
        let shelf = std::slice::from_ref(&new);
        let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_finding(&sim, &disks, shelf, 2).await);
        let three = mount_finding(&sim, &disks, shelf, 3).await;
        let blind = mount_slow(&sim, &disks, 4).await;
        mkdir(&one, one.root(), b"on the second one").await.unwrap();
        sim.sleep(Duration::from_secs(5)).await;
        let added = one.add_extent(path(&sim, &new, 1), false, &mut |_| ()).await.unwrap();
        assert_eq!(added.get(), 3);
        let two_heartbeats = 2 * Duration::from_millis(2000);
        has(&sim, &two, 3, two_heartbeats).await;
        has(&sim, &three, 3, two_heartbeats).await;
        // Everybody allocates there, and a host that does not find it says so.
        let directory = mkdir(&two, two.root(), b"on the new one").await.unwrap().object;
        assert_eq!(directory.fd.lun(), added);
        let file = create(&two, directory, b"file").await.unwrap().object;
        let open = three.open(file, WRITE).await.unwrap();
        write(&three, &open, 0, &[3; 200_000]).await.unwrap();
        three.close(open).await.unwrap();
        sim.sleep(Duration::from_secs(3)).await;
        let told = blind.status().await.warnings;
        assert!(told.iter().any(|warning| warning.contains("lun3") && warning.contains("not found here")), "{told:?}");
        let missing = blind.open(file, WRITE).await.unwrap_err();
        assert!(matches!(missing, FsError::MissingLun { lun } if lun == added), "{missing}");
        for volume in [one, two, three, blind] {
            volume.unmount().await.unwrap();
        }
    });
    disks.push(new);
    assert_eq!(errors(&sim, &disks), []);
}

#[test]
fn two_hosts_that_add_at_once_add_both_luns_and_of_one_lun_only_one_member() {
    for seed in 0..4 {
        let (sim, mut disks) = world(seed, 1, CellSize::B512);
        let new = [blank("new1"), blank("new2")];
        sim.block_on(async {
            let (one, two) = (mount_finding(&sim, &disks, &new, 1).await, mount_finding(&sim, &disks, &new, 2).await);
            let (first, second) = (one.clone(), two.clone());
            let (left, right) = (path(&sim, &new[0], 1), path(&sim, &new[1], 2));
            let first = sim.spawn(HostNo(1), async move { first.add_extent(left, false, &mut |_| ()).await });
            let second = sim.spawn(HostNo(2), async move { second.add_extent(right, false, &mut |_| ()).await });
            let mut added = [first.join().await.unwrap().unwrap().get(), second.join().await.unwrap().unwrap().get()];
            added.sort();
            assert_eq!(added, [2, 3], "seed {seed}");
            has(&sim, &one, 3, Duration::from_secs(6)).await;
            has(&sim, &two, 3, Duration::from_secs(6)).await;
            let again = one.add_extent(path(&sim, &new[1], 1), true, &mut |_| ()).await.unwrap_err();
            assert_eq!(again.kind(), FsErrorKind::Exists, "{again}");
            sim.sleep(Duration::from_secs(5)).await;
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
        });
        disks.extend(new);
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

/// Counts the changes that one host makes and says when there were so many.
struct Countdown {
    host: HostNo,
    left: Arc<AtomicUsize>,
    reached: Arc<tokio::sync::Notify>,
}

impl Watcher for Countdown {
    fn seen(&mut self, host: HostNo, seen: Seen<'_>) {
        let changes = matches!(seen, Seen::Write { .. } | Seen::CompareAndWrite { wrote: true, .. });
        if host == self.host && changes && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.reached.notify_one();
        }
    }
}

/// Tells when host 1 has made its `nth` change of these disks from now on.
fn count_down<'a>(disks: impl IntoIterator<Item = &'a MemoryDisk>, nth: usize) -> Arc<tokio::sync::Notify> {
    let (left, reached) = (Arc::new(AtomicUsize::new(nth)), Arc::new(tokio::sync::Notify::new()));
    for disk in disks {
        disk.set_watcher(Box::new(Countdown { host: HostNo(1), left: left.clone(), reached: reached.clone() }));
    }
    reached
}

/// Kills the adding host at its `nth` change. False: it had added the LUN before.
fn killed_at(nth: usize) -> bool {
    let (sim, mut disks) = world(nth as u64, 2, CellSize::B512);
    let new = blank("new");
    let died = sim.block_on(async {
        let shelf = std::slice::from_ref(&new);
        let adder = mount_finding(&sim, &disks, shelf, 1).await;
        let other = mount_finding(&sim, &disks, shelf, 2).await;
        mkdir(&other, other.root(), b"on the second one").await.unwrap();
        let reached = count_down(disks.iter().chain([&new]), nth);
        let lun = path(&sim, &new, 1);
        let adding = sim.spawn(HostNo(1), async move { adder.add_extent(lun, false, &mut |_| ()).await.is_ok() });
        let died = std::pin::pin!(reached.notified());
        let died = match futures_util::future::select(died, std::pin::pin!(adding.join())).await {
            futures_util::future::Either::Left(_) => true,
            futures_util::future::Either::Right((added, _)) => {
                assert_eq!(added, Some(true));
                false
            }
        };
        sim.kill(HostNo(1));
        // It is taken over, and what it began is finished or taken back; then the LUN can be added all the same.
        sim.sleep(Duration::from_secs(60)).await;
        if other.luns().len() == 2 {
            other.add_extent(path(&sim, &new, 2), false, &mut |_| ()).await.unwrap();
        }
        assert_eq!(indexes(&other), [1, 2, 3], "killed at change {nth}");
        let directory = mkdir(&other, other.root(), b"on the new one").await.unwrap().object;
        assert_eq!(directory.fd.lun().get(), 3);
        sim.sleep(Duration::from_secs(5)).await;
        other.unmount().await.unwrap();
        died
    });
    disks.push(new);
    assert_eq!(errors(&sim, &disks), [], "killed at change {nth}");
    died
}

#[test]
fn an_addition_that_dies_at_any_change_is_finished_or_taken_back_by_another_host() {
    let ended = (1..100).find(|nth| !killed_at(*nth)).expect("an addition takes fewer changes");
    assert!(ended > 20, "it ended after {ended} changes: not every step was met");
}
