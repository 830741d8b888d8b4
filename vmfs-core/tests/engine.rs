//! Promises of the engine: a commit is atomic, a lock has one holder, also when hosts race and commands get lost.

mod engine_world;
mod scale;

use std::rc::Rc;
use std::time::Duration;

use vmfs_core::alloc::units::Purpose;
use vmfs_core::error::FsErrorKind;
use vmfs_core::format::arena::{Arena, Place};
use vmfs_core::format::layout;
use vmfs_core::format::root_cell::{HoldMode, LunSet, ObjectFlags, ObjectState, ObjectType};
use vmfs_core::format::table_entry::{EntryKind, TableCell};
use vmfs_core::lun::LunErrorKind;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::object::{Change, Committed, NewObject};
use vmfs_core::sim::{Command, Fault, FaultRates, HostNo, MemoryDisk, Sim, format_disks};
use vmfs_core::units::{BlockSize, CellSize, LunIndex};

use engine_world::*;

#[test]
fn a_new_object_is_read_back_by_another_host_and_settles_with_its_first_change() {
    for cell_size in [CellSize::B512, CellSize::B4096] {
        let (sim, disks) = world(1, 2, 64, cell_size);
        sim.block_on(async {
            let a = mount(&sim, &disks, HostNo(1), cell_size).await;
            let b = mount(&sim, &disks, HostNo(2), cell_size).await;
            let object = a.create("file", None).await;
            let seen = b.objects.load(object.reference()).await.unwrap();
            assert!(matches!(seen.image().root.state, ObjectState::Creating(_)));
            assert_eq!(seen.image().body.attributes.name, b"file");
            a.set_size(&object, 77).await.unwrap();
            b.objects.refresh(&seen).await.unwrap();
            assert_eq!(seen.image().root.state, ObjectState::Live);
            assert_eq!(seen.image().body.attributes.size, 77);
        });
    }
}

#[test]
fn a_commit_takes_two_rounds_and_an_uncontended_lock_one_compare_and_write() {
    let sim = Sim::new(2);
    let disks = [MemoryDisk::new("lun0", 64 << 20, Some(CellSize::B512))];
    let large = MkfsOptions { block_size: BlockSize::DEFAULT, ..options(CellSize::B512) };
    sim.block_on(format_disks(&sim, &disks, large)).unwrap();
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        disks[0].start_recording();
        a.objects.lock(&object, HoldMode::Exclusive).await.unwrap();
        let wrote = |records: &[vmfs_core::sim::Record]| {
            records.iter().filter(|r| r.command == Command::CompareAndWrite { wrote: true }).count()
        };
        assert_eq!(wrote(&disks[0].take_records()), 1);
        disks[0].start_recording();
        a.set_size(&object, 1).await.unwrap();
        // The new body's cell, its unit's entry with the old one's mark, and the root cell.
        let records = disks[0].take_records();
        assert!(wrote(&records) <= 3, "{records:?}");
    });
}

#[test]
fn of_two_hosts_that_commit_one_object_each_change_wins_once() {
    for seed in scale::seeds(0, 30) {
        let (sim, disks) = world(seed, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = Rc::new(mount(&sim, &disks, HostNo(1), CellSize::B512).await);
            let b = Rc::new(mount(&sim, &disks, HostNo(2), CellSize::B512).await);
            let object = a.create("counter", None).await;
            let what = object.reference();
            let count = move |host: Rc<Host>| async move {
                let object = host.objects.load(what).await.unwrap();
                let mut done = 0;
                while done < 10 {
                    let image = object.image();
                    let mut body = (*image.body).clone();
                    body.attributes.size += 1;
                    let change = Change { body: Some(body), ..Change::default() };
                    if let Committed::Done = host.objects.commit(&object, &image, change).await.unwrap() {
                        done += 1;
                    }
                }
                host.objects.tidy().await.unwrap();
            };
            let one = sim.spawn(HostNo(1), count(a.clone()));
            let two = sim.spawn(HostNo(2), count(b.clone()));
            one.join().await.unwrap();
            two.join().await.unwrap();
            a.objects.refresh(&object).await.unwrap();
            assert_eq!(object.image().body.attributes.size, 20, "seed {seed}");
        });
    }
}

#[test]
fn a_lock_is_refused_with_the_holders_name_and_taken_after_its_release() {
    let (sim, disks) = world(6, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let mine = a.create("disk", Some(HoldMode::Exclusive)).await;
        let theirs = b.objects.load(mine.reference()).await.unwrap();
        for mode in [HoldMode::Exclusive, HoldMode::Shared] {
            let error = b.objects.lock(&theirs, mode).await.unwrap_err();
            assert_eq!(error.kind(), FsErrorKind::Busy);
            assert!(error.to_string().contains("host1"), "{error}");
        }
        assert_eq!(b.set_size(&theirs, 9).await.unwrap_err().kind(), FsErrorKind::Busy);
        a.objects.unlock(&mine).await.unwrap();
        b.objects.lock(&theirs, HoldMode::Shared).await.unwrap();
        a.objects.lock(&mine, HoldMode::Shared).await.unwrap();
        assert_eq!(a.objects.who_holds(&mine).await.unwrap().len(), 2);
        assert_eq!(a.objects.lock(&mine, HoldMode::Exclusive).await.unwrap_err().kind(), FsErrorKind::Busy);
        b.objects.unlock(&theirs).await.unwrap();
        a.objects.lock(&mine, HoldMode::Exclusive).await.unwrap();
    });
}

#[test]
fn a_lock_taken_by_racing_hosts_has_one_holder_whatever_gets_lost_on_the_way() {
    for seed in scale::seeds(0, 60) {
        let (sim, disks) = world(seed, 1, 64, CellSize::B512);
        sim.block_on(async {
            let maker = mount(&sim, &disks, HostNo(9), CellSize::B512).await;
            let what = maker.create("disk", None).await.reference();
            let mut tasks = Vec::new();
            for n in 1..=3 {
                let host = mount(&sim, &disks, HostNo(n), CellSize::B512).await;
                host.paths[0].set_rates(FaultRates::MANY);
                tasks.push(sim.spawn(HostNo(n), async move {
                    let locked = match host.objects.load(what).await {
                        Ok(object) => host.objects.lock(&object, HoldMode::Exclusive).await.is_ok().then_some(object),
                        Err(_) => None,
                    };
                    (host, locked)
                }));
            }
            let (mut hosts, mut winners) = (Vec::new(), Vec::new());
            for task in tasks {
                let (host, locked) = task.join().await.unwrap();
                host.paths[0].set_rates(FaultRates::default());
                winners.extend(locked);
                hosts.push(host);
            }
            assert!(winners.len() <= 1, "seed {seed}: {} hosts hold one exclusive lock", winners.len());
            sim.sleep(Duration::from_secs(30)).await;
            for host in &hosts {
                host.objects.release_doubtful_locks().await.unwrap();
            }
            let (_, root) = maker.objects.read_root(what.fd).await.unwrap();
            assert_eq!(root.lock.holders.len(), winners.len(), "seed {seed}: a lock without a user stays behind");
        });
    }
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_out() {
    for fault in [Fault::AnswerLost, Fault::CommandLost, Fault::Repeated] {
        let (sim, disks) = world(8, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
            let object = a.create("file", None).await;
            for n in 0..12u64 {
                a.paths[0].script(fault);
                // A read may have hit the fault: that is an error, and the next try finds the state as it is.
                if a.set_size(&object, n + 1).await.is_err() {
                    a.objects.refresh(&object).await.unwrap();
                    a.set_size(&object, n + 1).await.unwrap();
                }
                assert_eq!(object.image().body.attributes.size, n + 1);
                a.objects.refresh(&object).await.unwrap();
                assert_eq!(object.image().body.attributes.size, n + 1);
            }
        });
    }
}

#[test]
fn a_host_that_dies_anywhere_in_a_commit_leaves_the_object_before_or_after_it() {
    for die_after in 0..14 {
        let (sim, disks) = world(9, 1, 64, CellSize::B512);
        sim.block_on(async {
            let a = Rc::new(mount(&sim, &disks, HostNo(1), CellSize::B512).await);
            let b = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
            let object = a.create("file", None).await;
            let what = object.reference();
            a.set_size(&object, 1).await.unwrap();
            a.set_size(&object, 2).await.unwrap();
            let task = sim.spawn(HostNo(1), {
                let a = a.clone();
                async move { a.set_size(&object, 3).await.map(|_| ()) }
            });
            sim.sleep(Duration::from_micros(150 * die_after)).await;
            sim.kill(HostNo(1));
            drop(task);
            sim.sleep(Duration::from_secs(10)).await;
            let seen = b.objects.load(what).await.unwrap();
            assert!([2, 3].contains(&seen.image().body.attributes.size));
            b.set_size(&seen, 4).await.unwrap();
            let prepared = b.objects.prepare(&seen, EntryKind::Bucket, 0, b"stream", Purpose::Normal).await.unwrap();
            b.objects.discard(vec![prepared]).await;
        });
    }
}

#[test]
fn a_commit_takes_two_round_trips_and_a_creation_one() {
    let sim = Sim::new(25);
    let disks = vec![MemoryDisk::new("lun", 64 << 20, Some(CellSize::B512))];
    let large = MkfsOptions { block_size: BlockSize::DEFAULT, ..options(CellSize::B512) };
    sim.block_on(format_disks(&sim, &disks, large)).unwrap();
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        a.set_size(&object, 1).await.unwrap();
        a.paths[0].set_latency(Duration::from_millis(1), Duration::from_millis(1));
        // Now and then the pool is filled too; what counts is a change that finds a unit there.
        let (mut commit, mut create) = (u64::MAX, u64::MAX);
        for n in 0..8 {
            let start = sim.now();
            a.set_size(&object, n).await.unwrap();
            commit = commit.min((sim.now() - start) / 2_000_000);
            let start = sim.now();
            a.create("next", None).await;
            create = create.min((sim.now() - start) / 2_000_000);
        }
        assert_eq!((commit, create), (2, 1));
    });
}

#[test]
fn a_busy_storage_is_asked_again() {
    let (sim, disks) = world(26, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let object = a.create("file", None).await;
        a.paths[0].script(Fault::NotDone(LunErrorKind::NotDone));
        a.set_size(&object, 1).await.unwrap();
    });
}

#[test]
fn what_a_removal_marks_is_listed_in_the_arena() {
    let (sim, disks) = world(27, 1, 64, CellSize::B512);
    sim.block_on(async {
        let maker = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let what = maker.create("file", None).await.reference();
        let a = mount(&sim, &disks, HostNo(2), CellSize::B512).await;
        let object = a.objects.load(what).await.unwrap();
        a.objects.begin_unlink(&object, None).await.unwrap();
        let member = a.context.member(lun1()).unwrap();
        let own = a.context.own_slot(lun1()).unwrap();
        let cell = a.context.read_cell(layout::arena_cell(lun1(), own.slot)).await.unwrap();
        let arena = Arena::decode(member.layout().cell_size, cell.payload()).unwrap();
        assert!(arena.places.contains(&Place::FdContainer(what.fd.container().block.get())));
    });
}

#[test]
fn an_object_in_a_used_root_cell_leaves_out_the_link_that_a_move_may_have_announced() {
    let (sim, disks) = world(1, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let first = a.create("first", None).await;
        let before = first.reference();
        a.objects.mark_unlinked(&first).await.unwrap();
        a.objects.free(&first).await.unwrap();
        drop(first);
        let second = a.create("second", None).await.reference();
        assert_eq!(second.fd, before.fd, "the cell that was freed last is used first");
        assert_eq!(second.link, before.link.next().next());
    });
}

#[test]
fn a_creation_whose_body_cannot_be_written_leaves_the_slot_of_its_root_cell_to_recovery_too() {
    let (sim, disks) = world(28, 2, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let lun2 = LunIndex::new(2).unwrap();
        let new = |luns: LunSet| NewObject {
            parent: a.root,
            object_type: ObjectType::File,
            flags: ObjectFlags::empty(),
            luns,
            body: body("file"),
            lock: None,
            lun: lun1(),
        };
        // No unit is left on the first LUN: bodies go to the second one, root cells do not.
        a.objects.create(new(LunSet::default())).await.unwrap();
        while a.space.blocks.take_for_container(lun1(), Purpose::Normal).await.unwrap().is_some() {}
        while a.objects.create(new(LunSet::default())).await.is_ok() {}
        let mut both = LunSet::default();
        both.insert(lun2);
        let beside = a.objects.create(new(both)).await.unwrap();
        assert_eq!(beside.image().root.body.unwrap().at.lun, lun2);
        let is_unresolved = |lun| a.context.member(lun).unwrap().is_unresolved();
        assert!(!is_unresolved(lun1()) && !is_unresolved(lun2));
        a.paths[1].script(Fault::NotDone(LunErrorKind::NoSpace));
        let error = a.objects.create(new(both)).await.expect_err("the body is not there");
        assert!(is_unresolved(lun1()) && is_unresolved(lun2), "{error}");
    });
}

#[test]
fn a_host_with_an_old_image_marks_no_unit_that_the_object_has_got_again() {
    let (sim, disks) = world(31, 1, 64, CellSize::B512);
    sim.block_on(async {
        let a = mount(&sim, &disks, HostNo(1), CellSize::B512).await;
        let b = Rc::new(mount(&sim, &disks, HostNo(2), CellSize::B512).await);
        let slow = mount(&sim, &disks, HostNo(3), CellSize::B512).await;
        let object = b.create("file", None).await;
        b.set_size(&object, 1).await.unwrap();
        let old = slow.objects.load(object.reference()).await.unwrap();
        let image = old.image();
        let unit = image.root.body.unwrap().at;
        let newest = a.objects.load(object.reference()).await.unwrap();
        // The unit is dropped, and comes to the head of the pool.
        b.set_size(&object, 2).await.unwrap();
        b.objects.tidy().await.unwrap();
        b.set_size(&object, 3).await.unwrap();
        a.objects.refresh(&newest).await.unwrap();
        // A change that takes it again: its root cell is half a second away while others change that cell twice.
        let (at, nth) = b.context.member(lun1()).unwrap().layout().unit_table_entry(unit).unwrap();
        let far = Duration::from_millis(500);
        b.paths[0].set_latency(far, far);
        let (of, its) = (b.clone(), object.clone());
        let change = sim.spawn(HostNo(2), async move { of.set_size(&its, 4).await.unwrap() });
        let entry = async || {
            let cell = a.context.read_cell(at).await.unwrap();
            TableCell::decode(CellSize::B512, cell.payload()).unwrap().entries[nth]
        };
        while entry().await.kind != EntryKind::Body {
            sim.sleep(Duration::from_millis(5)).await;
        }
        let taken = entry().await;
        let mut larger = (*image.body).clone();
        larger.attributes.size = 99;
        let lost = slow.objects.commit(&old, &image, Change { body: Some(larger), ..Change::default() }).await;
        assert!(matches!(lost, Ok(Committed::Lost)), "{lost:?}");
        assert_eq!(entry().await, taken, "nobody but who took it has touched it");
        for _ in 0..2 {
            let stamped = a.objects.commit(&newest, &newest.image(), Change::default()).await;
            assert!(matches!(stamped, Ok(Committed::Done)), "{stamped:?}");
        }
        assert!(change.join().await.unwrap() > 0, "it was overtaken, and made again");
        a.objects.refresh(&newest).await.unwrap();
        assert_eq!(newest.image().body.attributes.size, 4, "what was called done is there");
    });
}
