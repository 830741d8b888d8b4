//! Promises of emptying a LUN: everything is still there, byte for byte, nothing of it on that LUN; whatever is cut off is begun again.

use super::*;

use vmfs_core::volume::DrainReport;

const FIRST: LunIndex = LunIndex::new(1).unwrap();

pub(super) async fn drain(volume: &Volume) -> Result<DrainReport, FsError> {
    volume.drain_extent(FIRST, &mut |_| ()).await
}

pub(super) fn content(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| seed ^ (at >> 3) as u8 ^ (at >> 11) as u8).collect()
}

/// What the tests put on a volume of two LUNs: files of all sorts, and a directory with buckets.
pub(super) struct Put {
    pub(super) sparse: ObjectRef,
    pub(super) large: ObjectRef,
    pub(super) small: ObjectRef,
    pub(super) link: ObjectRef,
    pub(super) names: usize,
}

const SPARSE_AT: u64 = 3 << 40;

pub(super) async fn put(volume: &Volume, names: usize) -> Put {
    let root = volume.root();
    let [sparse, large, small] = [b"sparse".as_slice(), b"large", b"small"];
    let mut made = Vec::new();
    for name in [sparse, large, small] {
        made.push(create(volume, root, name).await.unwrap().object);
    }
    let open = volume.open(made[0], WRITE).await.unwrap();
    // Pointer blocks far apart: inner units of two levels.
    for (nth, at) in [(1, 0), (2, 900 << 16), (3, 70 << 30), (4, SPARSE_AT)] {
        write(volume, &open, at + 4096, &content(nth, 30_000)).await.unwrap();
    }
    volume.close(open).await.unwrap();
    let open = volume.open(made[1], WRITE).await.unwrap();
    write(volume, &open, 0, &content(7, 3 << 20)).await.unwrap();
    volume.close(open).await.unwrap();
    let open = volume.open(made[2], WRITE).await.unwrap();
    write(volume, &open, 0, &content(9, 1000)).await.unwrap();
    volume.close(open).await.unwrap();
    let link = volume.symlink(root, b"link", b"large", 0, 0).await.unwrap().object;
    for nth in 0..names {
        create(volume, root, format!("a name that takes its room, number {nth}").as_bytes()).await.unwrap();
    }
    Put { sparse: made[0], large: made[1], small: made[2], link, names }
}

pub(super) async fn read_at(volume: &Volume, file: ObjectRef, at: u64, bytes: usize) -> Vec<u8> {
    let open = volume.open(file, OpenMode::READ).await.unwrap();
    let mut found = Vec::new();
    while found.len() < bytes {
        let more = volume.files().read(&open, at + found.len() as u64, bytes - found.len()).await.unwrap();
        assert!(!more.is_empty());
        found.extend(more);
    }
    volume.close(open).await.unwrap();
    found
}

pub(super) async fn check_put(volume: &Volume, put: &Put) {
    for (nth, at) in [(1, 0), (2, 900 << 16), (3, 70 << 30), (4, SPARSE_AT)] {
        assert!(read_at(volume, put.sparse, at + 4096, 30_000).await == content(nth, 30_000), "at {at}");
    }
    assert!(read_at(volume, put.sparse, 40 << 16, 65_536).await.iter().all(|byte| *byte == 0));
    assert!(read_at(volume, put.large, 0, 3 << 20).await == content(7, 3 << 20));
    assert!(read_at(volume, put.small, 0, 1000).await == content(9, 1000));
    assert_eq!(volume.read_link(put.link).await.unwrap(), b"large");
    assert_eq!(list(volume, volume.root(), 50).await.len(), put.names + 4);
}

/// Nothing but root cells is left on the first LUN.
async fn check_empty(volume: &Volume) {
    let found = vmfs_core::alloc::Space::new(volume.context()).occupied(FIRST).await.unwrap();
    assert_eq!((found.block_count(), found.unit_count()), (0, 0), "{found:?}");
}

async fn free_blocks(volume: &Volume) -> u64 {
    volume.status().await.luns.iter().map(|lun| lun.free_blocks).sum()
}

#[test]
fn what_lies_on_a_lun_is_moved_to_the_others_and_is_the_same_for_every_host() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (sim, disks) = world(1, 2, cell_size);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let all = put(&one, 600).await;
            let before = free_blocks(&one).await;
            let report = drain(&one).await.unwrap();
            assert!(report.is_moved() && report.stayed.is_empty(), "{report:?}");
            assert!(report.moved_bytes >= 3 << 20, "{report:?}");
            assert_eq!(report.root_count, 605);
            check_empty(&one).await;
            check_put(&one, &all).await;
            check_put(&two, &all).await;
            // Containers for some 605 units, seven in each, were made on the other LUN, and that is all that was taken.
            let after = free_blocks(&one).await;
            assert!(after <= before && before - after < 605 / 7 + 16, "{before} became {after}");
            assert_eq!(report.unsettled, 0, "{report:?}");
            // Nobody puts anything new there.
            let state = two.luns()[0].state;
            assert_eq!(state, MemberState::Draining);
            let directory = mkdir(&two, two.root(), b"new").await.unwrap().object;
            assert_eq!(directory.fd.lun(), SECOND);
            let file = create(&two, two.root(), b"more").await.unwrap().object;
            assert_eq!(file.fd.lun(), SECOND);
            let open = two.open(all.large, WRITE).await.unwrap();
            write(&two, &open, 3 << 20, &content(3, 2 << 20)).await.unwrap();
            two.close(open).await.unwrap();
            sim.sleep(Duration::from_secs(3)).await;
            check_empty(&one).await;
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
            let (later, _) = mount(&sim, &disks, 3).await;
            assert_eq!(later.luns()[0].state, MemberState::Draining);
            assert!(read_at(&later, all.large, 3 << 20, 2 << 20).await == content(3, 2 << 20));
            later.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), []);
    }
}

#[test]
fn a_lun_that_cannot_be_emptied_is_refused_before_anything_changes() {
    let (sim, disks) = world(2, 1, CellSize::B512);
    let new = blank("new");
    sim.block_on(async {
        let one = mount_slow(&sim, &disks, 1).await;
        let refused = drain(&one).await.unwrap_err();
        assert!(refused.to_string().contains("only LUN in use"), "{refused}");
        let file = create(&one, one.root(), b"large").await.unwrap().object;
        let open = one.open(file, WRITE).await.unwrap();
        for piece in 0..20u64 {
            write(&one, &open, piece << 20, &vec![1; 1 << 20]).await.unwrap();
        }
        one.close(open).await.unwrap();
        one.add_extent(path(&sim, &new, 1), false, &mut |_| ()).await.unwrap();
        // The second LUN is filled.
        let luns = one.luns();
        let directory = mkdir(&one, one.root(), b"d").await.unwrap().object;
        assert_eq!(directory.fd.lun(), luns[1].index);
        let filler = create(&one, directory, b"filler").await.unwrap().object;
        let open = one.open(filler, WRITE).await.unwrap();
        for piece in 0..50u64 {
            write(&one, &open, piece << 20, &vec![1; 1 << 20]).await.unwrap();
        }
        one.close(open).await.unwrap();
        let refused = drain(&one).await.unwrap_err();
        assert_eq!(refused.kind(), FsErrorKind::NoSpace, "{refused}");
        assert!(refused.to_string().contains("have room for"), "{refused}");
        assert_eq!(one.luns()[0].state, MemberState::Active);
        one.unmount().await.unwrap();
    });
    assert_eq!(errors(&sim, &[disks, vec![new]].concat()), []);
}

#[test]
fn files_are_written_while_they_are_moved_and_what_another_host_holds_is_moved_by_that_one() {
    for seed in 0..3 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let all = put(&one, 3).await;
            let held = two.open(all.small, WRITE).await.unwrap();
            let busy = create(&one, one.root(), b"busy").await.unwrap().object;
            let open = one.open(busy, WRITE).await.unwrap();
            write(&one, &open, 0, &vec![0; 2 << 20]).await.unwrap();
            // A writer that goes over the file again and again, and remembers what it wrote last.
            let (writer, file, env) = (one.clone(), open.clone(), sim.clone());
            let stop = Rc::new(std::cell::Cell::new(false));
            let asked = stop.clone();
            let writing = sim.spawn(HostNo(1), async move {
                let mut model = vec![0u8; 6 << 20];
                let mut round = 0u64;
                while !asked.get() {
                    let at = (round * 7_919 * 512 % (5 << 20)) as usize;
                    let length = 512 + (round as usize * 1_237 % 90_000);
                    let bytes = content(round as u8, length);
                    let mut done = 0;
                    while done < length {
                        done += writer.files().write(&file, (at + done) as u64, &bytes[done..]).await.unwrap();
                    }
                    model[at..at + length].copy_from_slice(&bytes);
                    if round.is_multiple_of(5) {
                        writer.flush(&file).await.unwrap();
                    }
                    round += 1;
                    env.sleep(Duration::from_millis(1)).await;
                }
                (model, round)
            });
            let report = drain(&one).await.unwrap();
            assert!(!report.is_moved(), "{report:?}");
            let names: Vec<&str> = report.stayed.iter().map(|stayed| stayed.name.as_str()).collect();
            assert_eq!(names, ["small"], "{report:?}");
            assert!(report.stayed[0].reason.contains("locked by"), "{report:?}");
            // The host that holds it moves it.
            let report = drain(&two).await.unwrap();
            let stayed: Vec<&str> = report.stayed.iter().map(|stayed| stayed.name.as_str()).collect();
            assert!(!stayed.contains(&"small"), "{report:?}");
            two.close(held).await.unwrap();
            stop.set(true);
            let (model, rounds) = writing.join().await.unwrap();
            assert!(rounds > 50, "{rounds}");
            one.flush(&open).await.unwrap();
            assert!(drain(&one).await.unwrap().is_moved());
            check_empty(&one).await;
            one.close(open).await.unwrap();
            let size = one.stat(busy).await.unwrap().attributes.size as usize;
            assert!(read_at(&two, busy, 0, size).await == model[..size], "seed {seed}");
            assert!(read_at(&two, all.large, 0, 3 << 20).await == content(7, 3 << 20));
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

#[test]
fn an_unmount_ends_a_drain_where_it_stands_and_leaves_nothing_behind() {
    for seed in 0..6 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let one = mount_slow(&sim, &disks, 1).await;
            let all = put(&one, 60).await;
            let drainer = one.clone();
            let draining = sim.spawn(HostNo(1), async move { drain(&drainer).await });
            // Two heartbeats pass before anything is moved.
            sim.sleep(Duration::from_millis(4000 + 60 * seed)).await;
            one.unmount().await.unwrap();
            match draining.join().await.unwrap() {
                Ok(report) => assert!(report.is_moved(), "{report:?}"),
                Err(error) => assert!(error.to_string().contains("unmounted"), "{error}"),
            }
            let (again, _) = mount(&sim, &disks, 2).await;
            check_put(&again, &all).await;
            let report = drain(&again).await.unwrap();
            assert!(report.is_moved() && report.unsettled == 0, "seed {seed}: {report:?}");
            check_put(&again, &all).await;
            again.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

#[test]
fn a_drain_that_is_given_up_by_another_host_ends_and_the_lun_is_used_again() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let refused = one.cancel_drain(FIRST).await.unwrap_err();
            assert!(refused.to_string().contains("not being drained"), "{refused}");
            let all = put(&one, 60).await;
            let drainer = one.clone();
            let draining = sim.spawn(HostNo(1), async move { drain(&drainer).await });
            // Two heartbeats pass before anything is moved, and what is moved takes some time.
            sim.sleep(Duration::from_millis(3000 + 400 * seed)).await;
            two.cancel_drain(FIRST).await.unwrap();
            match draining.join().await.unwrap() {
                Ok(report) => assert!(report.is_moved(), "{report:?}"),
                Err(error) => assert!(error.to_string().contains("given up"), "{error}"),
            }
            sim.sleep(Duration::from_secs(10)).await;
            for volume in [&one, &two] {
                assert_eq!(volume.luns()[0].state, MemberState::Active, "seed {seed}");
            }
            let mut made = Vec::new();
            for nth in 0..8 {
                made.push(create(&two, two.root(), format!("after {nth}").as_bytes()).await.unwrap().object);
            }
            assert!(made.iter().any(|object| object.fd.lun() == FIRST), "nothing new lies on the LUN: {made:?}");
            check_put(&two, &Put { names: all.names + 8, ..all }).await;
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
            let (later, _) = mount(&sim, &disks, 3).await;
            assert_eq!(later.luns()[0].state, MemberState::Active);
            let report = drain(&later).await.unwrap();
            assert!(report.is_moved(), "seed {seed}: {report:?}");
            assert_eq!(later.luns()[0].state, MemberState::Draining);
            later.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), [], "seed {seed}");
    }
}

/// Programs that move data themselves: they let go after a while, or never. What was asked of them is written down.
struct Programs {
    sim: Sim,
    let_go: bool,
    out: Rc<std::cell::Cell<u32>>,
    asked: std::cell::RefCell<Vec<(vmfs_core::units::FdId, std::ops::Range<u64>)>>,
}

/// A range that came back.
struct Back(Rc<std::cell::Cell<u32>>);

impl vmfs_core::file::Recalled for Back {
    fn give_up(self: Box<Self>) {
        panic!("nothing is in doubt");
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl vmfs_core::file::Borrowers for Programs {
    fn recall(
        &self,
        fd: vmfs_core::units::FdId,
        range: std::ops::Range<u64>,
    ) -> LocalFuture<'static, Result<Box<dyn vmfs_core::file::Recalled>, FsError>> {
        self.asked.borrow_mut().push((fd, range));
        let (sim, let_go, out) = (self.sim.clone(), self.let_go, self.out.clone());
        Box::pin(async move {
            if !let_go {
                std::future::pending::<()>().await;
            }
            sim.sleep(Duration::from_millis(20)).await;
            out.set(out.get() + 1);
            Ok(Box::new(Back(out)) as Box<dyn vmfs_core::file::Recalled>)
        })
    }
}

#[test]
fn a_block_is_moved_when_the_programs_have_let_go_of_it_and_stays_while_one_does_not() {
    for let_go in [true, false] {
        let (sim, disks) = world(5, 2, CellSize::B512);
        sim.block_on(async {
            let one = mount_slow(&sim, &disks, 1).await;
            let all = put(&one, 3).await;
            let out = Rc::new(std::cell::Cell::new(0));
            let programs = Rc::new(Programs { sim: sim.clone(), let_go, out: out.clone(), asked: Default::default() });
            one.files().set_borrowers(programs.clone());
            let report = drain(&one).await.unwrap();
            assert_eq!(out.get(), 0, "every range has come back");
            let large: Vec<_> = programs.asked.borrow().iter().filter(|(fd, _)| *fd == all.large.fd).cloned().collect();
            if let_go {
                assert!(report.is_moved() && report.stayed.is_empty(), "{report:?}");
                // Each byte of it once.
                let mut ranges: Vec<_> = large.into_iter().map(|(_, range)| range).collect();
                ranges.sort_by_key(|range| range.start);
                assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
                assert!(ranges[0].start == 0 && ranges.last().unwrap().end >= 3 << 20, "{ranges:?}");
                check_empty(&one).await;
            } else {
                assert!(!report.is_moved(), "{report:?}");
                let large = report.stayed.iter().find(|stayed| stayed.object == all.large.fd).unwrap();
                assert!(large.kind == FsErrorKind::Busy && large.reason.contains("stands still"), "{large:?}");
            }
            check_put(&one, &all).await;
            one.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks), []);
    }
}

/// Kills the draining host at its `nth` change. False: the LUN was empty before.
fn killed_at(nth: usize) -> bool {
    let (sim, disks) = world(nth as u64, 2, CellSize::B512);
    let died = sim.block_on(async {
        let (drainer, other) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
        let all = put(&drainer, 120).await;
        sim.sleep(Duration::from_secs(3)).await;
        let reached = count_down(&disks, nth);
        let draining = sim.spawn(HostNo(1), async move { drain(&drainer).await.is_ok() });
        let died = std::pin::pin!(reached.notified());
        let died = match futures_util::future::select(died, std::pin::pin!(draining.join())).await {
            futures_util::future::Either::Left(_) => true,
            futures_util::future::Either::Right((drained, _)) => {
                assert_eq!(drained, Some(true));
                false
            }
        };
        sim.kill(HostNo(1));
        sim.sleep(Duration::from_secs(60)).await;
        // Another host goes on, also with what the dead one had locked.
        let mut report = drain(&other).await.unwrap();
        if !report.is_moved() {
            // The question for its lock had it watched: by now it is taken over.
            assert!(report.stayed.iter().all(|stayed| stayed.kind == FsErrorKind::Busy), "{report:?}");
            sim.sleep(Duration::from_secs(60)).await;
            report = drain(&other).await.unwrap();
        }
        assert!(report.is_moved() && report.stayed.is_empty(), "killed at change {nth}: {report:?}");
        check_put(&other, &all).await;
        sim.sleep(Duration::from_secs(5)).await;
        check_empty(&other).await;
        other.unmount().await.unwrap();
        died
    });
    assert_eq!(errors(&sim, &disks), [], "killed at change {nth}");
    died
}

#[test]
fn a_drain_that_dies_at_any_change_loses_nothing_and_is_ended_by_another_host() {
    let mut nth = 1;
    while killed_at(nth) {
        nth += 1 + nth / 5;
        assert!(nth < 2000, "a drain takes fewer changes");
    }
    assert!(nth > 40, "it ended after {nth} changes: not every step was met");
}
