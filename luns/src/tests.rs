//! Promises of SCSI LUNs over a target in this process.

use std::rc::Rc;
use std::sync::Arc;

use scsi::testing::{PathFault, TestPath, TestTarget, identity};
use scsi::{Geometry, PathAnswer, ScsiPath, UnitAttention};
use vmfs_core::buf::AlignedBuf;
use vmfs_core::lun::{Compared, Fencing, Lun, LunErrorKind, PathOwner};
use vmfs_core::units::SlotId;

use crate::device::Device;
use crate::scsi_lun::ScsiLun;

const READ: u8 = 0x88;
const WRITE: u8 = 0x8A;
const COMPARE: u8 = 0x89;
const RESERVE_OUT: u8 = 0x5F;

const GEOMETRY: Geometry = Geometry { blocks: 16 << 11, ..scsi::testing::GEOMETRY };

fn target() -> TestTarget {
    TestTarget::start(GEOMETRY, identity())
}

fn open(paths: &[Arc<TestPath>]) -> ScsiLun {
    let paths = paths.iter().map(|path| path.clone() as Arc<dyn ScsiPath>).collect();
    ScsiLun::new(Device::open("test".to_owned(), paths, false).unwrap()).unwrap()
}

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

fn owner(slot: u8, key: u64) -> PathOwner {
    PathOwner { slot: SlotId(slot), key }
}

#[test]
fn it_says_what_it_is_and_reads_what_was_written() {
    let lun = open(&[target().path()]);
    assert_eq!(lun.bytes(), 16 << 20);
    assert_eq!(lun.alignment(), 512);
    assert!(lun.identity().bytes().starts_with(b"wwid:naa.6000c29f"), "{:?}", lun.identity());
    on_runtime(async {
        lun.write(512, AlignedBuf::copy_of(&[7; 1024])).await.unwrap();
        assert_eq!(lun.read(0, 2048).await.unwrap()[..], [[0; 512], [7; 512], [7; 512], [0; 512]].concat());
        lun.write_zeroes(512, 512).await.unwrap();
        lun.unmap(4096, 4096).await.unwrap();
        let data = lun.data();
        data.write_at(8192, &[9; 512]).unwrap();
        data.flush().unwrap();
        let mut back = [0; 1024];
        data.read_at(7680, &mut back).unwrap();
        assert_eq!(back[..], [[0; 512], [9; 512]].concat());
        assert_eq!(lun.read(0, 2048).await.unwrap()[..], [[0; 512], [0; 512], [7; 512], [0; 512]].concat());
        let beyond = lun.read(16 << 20, 512).await.err().unwrap();
        assert_eq!(beyond.kind, LunErrorKind::OutOfRange);
        assert_eq!(lun.read(100, 512).await.err().unwrap().kind, LunErrorKind::OutOfRange);
    });
}

#[test]
fn compare_and_write_writes_what_was_expected_there_and_nothing_else() {
    let lun = open(&[target().path()]);
    on_runtime(async {
        assert_eq!(lun.compare_and_write(512, &[0; 512], &[1; 512]).await.unwrap(), Compared::Written);
        assert_eq!(lun.compare_and_write(512, &[0; 512], &[2; 512]).await.unwrap(), Compared::Miscompare);
        assert_eq!(lun.read(512, 512).await.unwrap()[..], [1; 512]);
    });
}

#[test]
fn a_compare_and_write_without_an_answer_is_unknown_and_not_sent_again() {
    let path = target().path();
    let lun = open(std::slice::from_ref(&path));
    on_runtime(async {
        for (fault, carried_out) in [(PathFault::AnswerLost, 1), (PathFault::CommandLost, 1), (PathFault::Late, 1)] {
            path.fail(COMPARE, fault);
            let error = lun.compare_and_write(0, &[0; 512], &[1; 512]).await.unwrap_err();
            assert_eq!(error.kind, LunErrorKind::Unknown, "{error}");
            assert_eq!(path.count(COMPARE), carried_out, "it was sent again");
        }
        assert_eq!(lun.read(0, 512).await.unwrap()[..], [1; 512]);
        // The late one finds another image.
        assert_eq!(path.deliver(), [2]);
        // One that was answered, but not with what became of it.
        let aborted = PathAnswer { status: 2, sense: vec![0x72, 0xB, 0x0E, 0], transferred: 0 };
        path.fail(COMPARE, PathFault::Answer(aborted));
        assert_eq!(lun.compare_and_write(0, &[1; 512], &[2; 512]).await.unwrap_err().kind, LunErrorKind::Unknown);
        path.fail(COMPARE, PathFault::NotSent);
        assert_eq!(lun.compare_and_write(0, &[1; 512], &[2; 512]).await.unwrap(), Compared::Written);
    });
}

#[test]
fn what_was_certainly_not_carried_out_is_sent_again() {
    let path = target().path();
    let lun = open(std::slice::from_ref(&path));
    let answer = |status, sense: &[u8]| PathFault::Answer(PathAnswer { status, sense: sense.to_vec(), transferred: 0 });
    let again = [
        answer(0x08, &[]),
        answer(0x28, &[]),
        answer(2, &[0x72, 6, 0x29, 0]),
        answer(2, &[0x72, 6, 0x2A, 9]),
        answer(2, &[0x72, 2, 0x04, 0x0A]),
        PathFault::NotSent,
    ];
    for operation in [READ, WRITE, COMPARE] {
        again.iter().for_each(|fault| path.fail(operation, fault.clone()));
        on_runtime(async {
            match operation {
                READ => drop(lun.read(0, 512).await.unwrap()),
                WRITE => lun.write(0, AlignedBuf::copy_of(&[1; 512])).await.unwrap(),
                _ => assert_eq!(lun.compare_and_write(512, &[0; 512], &[1; 512]).await.unwrap(), Compared::Written),
            }
        });
    }
    path.fail(WRITE, answer(2, &[0x72, 7, 0x27, 7]));
    let error = on_runtime(lun.write(0, AlignedBuf::copy_of(&[1; 512]))).unwrap_err();
    assert_eq!(error.kind, LunErrorKind::NoSpace);
    path.fail(WRITE, answer(2, &[0x72, 5, 0x21, 0]));
    let error = on_runtime(lun.write(0, AlignedBuf::copy_of(&[1; 512]))).unwrap_err();
    assert_eq!(error.kind, LunErrorKind::NotDone);
}

#[test]
fn a_plain_write_without_an_answer_is_repeated_only_by_a_host_that_the_storage_can_shut_out() {
    let path = target().path();
    let lun = open(std::slice::from_ref(&path));
    path.fail(WRITE, PathFault::Late);
    assert_eq!(lun.data().write_at(0, &[1; 512]).unwrap_err().kind, LunErrorKind::Unknown);
    path.deliver();
    on_runtime(lun.mark_paths(owner(1, 11))).unwrap();
    path.fail(WRITE, PathFault::Late);
    lun.data().write_at(0, &[2; 512]).unwrap();
    assert!(path.deliver().is_empty(), "the first try was ended before the second");
    assert_eq!(on_runtime(lun.read(0, 512)).unwrap()[..], [2; 512]);
}

#[test]
fn a_unit_that_forgets_its_reservations_is_reserved_all_the_same_and_no_write_is_repeated_for_that() {
    let path = TestTarget::forgetful(GEOMETRY, identity()).path();
    let lun = open(std::slice::from_ref(&path));
    on_runtime(async {
        lun.mark_paths(owner(1, 11)).await.unwrap();
        let seen = lun.reservation().unwrap();
        assert!(seen.keeps_out() && !seen.persists && seen.own == 11, "{seen:?}");
    });
    path.fail(WRITE, PathFault::AnswerLost);
    assert_eq!(lun.data().write_at(0, &[1; 512]).unwrap_err().kind, LunErrorKind::Unknown);
}

#[test]
fn who_formats_a_lun_shuts_out_everybody_who_used_it() {
    let target = target();
    let (old, maker) = (open(&[target.path()]), open(&[target.path()]));
    on_runtime(async {
        old.mark_paths(owner(1, 11)).await.unwrap();
        maker.evict().await.unwrap();
        assert_eq!(old.data().write_at(0, &[1; 512]).unwrap_err().kind, LunErrorKind::Fenced);
        maker.write(0, AlignedBuf::copy_of(&[2; 512])).await.unwrap();
        drop(maker);
        // Nobody is left: a new host finds the unit free.
        let new = open(&[target.path()]);
        new.write(0, AlignedBuf::copy_of(&[3; 512])).await.unwrap();
        new.mark_paths(owner(1, 21)).await.unwrap();
        assert_eq!(new.reservation().unwrap().keys, [21]);
    });
}

#[test]
fn a_size_that_has_changed_is_noticed() {
    let target = target();
    let path = target.path();
    let lun = open(std::slice::from_ref(&path));
    target.with(|target| target.notify(scsi::Lun(0), UnitAttention::CapacityChanged));
    on_runtime(async {
        lun.read(0, 512).await.unwrap();
        let before = path.count(0x9E);
        lun.tend().await.unwrap();
        assert_eq!(path.count(0x9E), before + 1, "it asks once it was told");
        lun.tend().await.unwrap();
        assert_eq!(path.count(0x9E), before + 1);
    });
}

#[test]
fn a_host_that_was_fenced_writes_nothing_more_and_the_others_go_on() {
    let target = target();
    let (dead, breaker) = (target.path(), target.path());
    let (dead_lun, breaker_lun) = (open(std::slice::from_ref(&dead)), open(std::slice::from_ref(&breaker)));
    on_runtime(async {
        dead_lun.mark_paths(owner(1, 11)).await.unwrap();
        // A host that joins changes a cell before it has a key: as a guest.
        let joined = breaker_lun.compare_and_write(0, &[0; 512], &[1; 512]).await.unwrap();
        assert_eq!(joined, Compared::Written);
        breaker_lun.mark_paths(owner(2, 22)).await.unwrap();
        let seen = breaker_lun.reservation().unwrap();
        assert_eq!((seen.kind, seen.keys.clone(), seen.own), (Some(7), vec![11, 22], 22));
        assert!(seen.keeps_out());
        dead_lun.write(1024, AlignedBuf::copy_of(&[3; 512])).await.unwrap();

        assert_eq!(breaker_lun.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        assert_eq!(breaker_lun.fence(owner(1, 11)).await.unwrap(), Fencing::Proven, "again is no harm");
        assert_eq!(breaker_lun.fence(owner(9, 99)).await.unwrap(), Fencing::Proven, "one that never had a path");
        for _ in 0..2 {
            let late = dead_lun.data().write_at(1024, &[4; 512]).unwrap_err();
            assert_eq!(late.kind, LunErrorKind::Fenced, "{late}");
            let late = dead_lun.compare_and_write(0, &[1; 512], &[4; 512]).await.unwrap_err();
            assert_eq!(late.kind, LunErrorKind::Fenced, "{late}");
        }
        assert_eq!(dead_lun.tend().await.unwrap_err().kind, LunErrorKind::Fenced);
        assert_eq!(breaker_lun.read(1024, 512).await.unwrap()[..], [3; 512]);
        breaker_lun.write(1024, AlignedBuf::copy_of(&[5; 512])).await.unwrap();
        breaker_lun.tend().await.unwrap();
        // The dead one's program ends, and a new one begins under a new key.
        let again = open(&[target.path()]);
        again.compare_and_write(512, &[0; 512], &[1; 512]).await.unwrap();
        again.mark_paths(owner(1, 12)).await.unwrap();
        again.unmark_paths().await;
        breaker_lun.unmark_paths().await;
        // Nobody is registered any more: the unit is anybody's.
        dead.fail(READ, PathFault::NotSent);
        let stranger = open(&[target.path()]);
        stranger.write(0, AlignedBuf::copy_of(&[0; 512])).await.unwrap();
        stranger.tend().await.unwrap();
    });
}

#[test]
fn a_host_hears_that_it_was_fenced_also_when_it_only_reads() {
    let target = target();
    let (dead_lun, breaker_lun) = (open(&[target.path()]), open(&[target.path()]));
    on_runtime(async {
        dead_lun.mark_paths(owner(1, 11)).await.unwrap();
        breaker_lun.mark_paths(owner(2, 22)).await.unwrap();
        assert_eq!(breaker_lun.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        // The unit attention says so; it is told at the first command.
        let told = dead_lun.read(0, 512).await.err().unwrap();
        assert_eq!(told.kind, LunErrorKind::Fenced);
    });
}

#[test]
fn a_daemon_fences_its_own_mount_and_goes_on_itself() {
    let target = target();
    let (mount, daemon) = (open(&[target.path()]), open(&[target.path()]));
    on_runtime(async {
        daemon.mark_paths(owner(1, 11)).await.unwrap();
        mount.mark_paths(owner(1, 11)).await.unwrap();
        mount.write(0, AlignedBuf::copy_of(&[1; 512])).await.unwrap();
        assert_eq!(daemon.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        assert_eq!(mount.data().write_at(0, &[2; 512]).unwrap_err().kind, LunErrorKind::Fenced);
        assert_eq!(daemon.compare_and_write(0, &[1; 512], &[3; 512]).await.unwrap(), Compared::Written);
        daemon.unmark_paths().await;
    });
}

#[test]
fn a_fence_whose_answer_is_lost_is_not_taken_for_proven_at_once() {
    let target = target();
    let (_victim, path) = (target.path(), target.path());
    let (victim, breaker) = (open(&[target.path()]), open(std::slice::from_ref(&path)));
    on_runtime(async {
        victim.mark_paths(owner(1, 11)).await.unwrap();
        breaker.mark_paths(owner(2, 22)).await.unwrap();
        path.fail(RESERVE_OUT, PathFault::AnswerLost);
        assert_eq!(breaker.fence(owner(1, 11)).await.unwrap(), Fencing::NotYet);
        assert_eq!(breaker.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
        path.fail(RESERVE_OUT, PathFault::CommandLost);
        assert_eq!(breaker.fence(owner(1, 11)).await.unwrap(), Fencing::Proven);
    });
}

#[test]
fn two_paths_of_one_unit_stand_in_for_each_other_and_paths_of_two_units_are_refused() {
    let target = target();
    let paths = [target.path(), target.path()];
    let lun = open(&paths);
    on_runtime(async {
        lun.mark_paths(owner(1, 11)).await.unwrap();
        assert_eq!(lun.reservation().unwrap().keys, [11, 11]);
        for operation in [READ, WRITE, COMPARE] {
            paths[0].fail(operation, PathFault::NotSent);
        }
        lun.write(0, AlignedBuf::copy_of(&[1; 512])).await.unwrap();
        assert_eq!(lun.compare_and_write(0, &[1; 512], &[2; 512]).await.unwrap(), Compared::Written);
        assert_eq!(lun.read(0, 512).await.unwrap()[..], [2; 512]);
        assert!(paths[1].count(WRITE) + paths[1].count(COMPARE) > 0);
        lun.unmark_paths().await;
    });
    let other = scsi::Identity { serial: "other".into(), naa: *b"\x60\x00\xC2\x9Fother-disk-0" };
    let stranger = TestTarget::start(GEOMETRY, other).path();
    let both: Vec<Arc<dyn ScsiPath>> = vec![paths[0].clone(), stranger];
    assert!(Device::open("both".to_owned(), both, false).is_err_and(|failure| failure.why.contains("one unit")));
}

#[test]
fn a_reservation_of_somebody_else_is_a_refusal_that_says_so() {
    let target = target();
    let (foreign, path) = (target.path(), target.path());
    let (cdb, list) = crate::commands::reserve_out(crate::commands::REGISTER_AND_IGNORE, 0, 0, 5, false);
    let send = |cdb: &[u8], list: &[u8]| {
        for _ in 0..3 {
            let answer = foreign.execute(cdb, scsi::PathData::Out(list), crate::device::COMMAND_TIME).unwrap();
            if answer.status == 0 {
                return;
            }
        }
        panic!("it is not carried out");
    };
    let lun: Rc<dyn Lun> = Rc::new(open(&[path]));
    send(&cdb, &list);
    let (cdb, list) = crate::commands::reserve_out(crate::commands::RESERVE, 1, 5, 0, false);
    send(&cdb, &list);
    let error = on_runtime(lun.mark_paths(owner(1, 11))).unwrap_err();
    assert!(error.to_string().contains("somebody who is no host"), "{error}");
    assert_eq!(error.kind, LunErrorKind::NotDone);
}

#[test]
fn a_probe_finds_what_a_unit_can_do_and_puts_the_scratch_block_back() {
    let target = target();
    let device = || Device::open("test".to_owned(), vec![target.path() as Arc<dyn ScsiPath>], false).unwrap();
    let (first, second) = (device(), device());
    let found = crate::probe::look(&first).unwrap();
    assert!(found.commands.iter().all(|command| command.told == Some(true)), "{:?}", found.commands);
    assert!(found.identity.starts_with("wwid:naa.") && found.reservations.is_some());
    first.compare(4096, &[0; 512], &[9; 512]).unwrap();
    let mut trials = crate::probe::try_compare_and_write(&first, &second, 4096).unwrap();
    trials.extend(crate::probe::try_reservations(&first, &second, 4096).unwrap().unwrap());
    assert!(trials.len() >= 7 && trials.iter().all(|trial| trial.result.is_ok()), "{trials:?}");
    let mut back = [0; 512];
    vmfs_core::lun::DataLun::read_at(&first, 4096, &mut back).unwrap();
    assert_eq!(back, [9; 512]);
}

#[test]
fn a_unit_whose_compare_and_write_writes_always_is_found_out() {
    let target = target();
    let paths = [target.path(), target.path()];
    let device =
        |path: &Arc<TestPath>| Device::open("test".to_owned(), vec![path.clone() as Arc<dyn ScsiPath>], false).unwrap();
    let (first, second) = (device(&paths[0]), device(&paths[1]));
    // It says that it wrote, and did not.
    paths[1].fail(COMPARE, PathFault::Answer(PathAnswer { status: 0, sense: Vec::new(), transferred: 1024 }));
    let trials = crate::probe::try_compare_and_write(&first, &second, 0).unwrap();
    assert!(trials.iter().any(|trial| trial.what.contains("other bytes") && trial.result.is_err()), "{trials:?}");
}
