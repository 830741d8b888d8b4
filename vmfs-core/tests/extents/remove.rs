//! Promises of taking a LUN out: everything is still there and is used all the while, the LUN is not needed any more, and whatever is cut
//! off at whatever command is gone through by another host.

use super::drain::{Put, check_put, content, drain, put, read_at};
use super::*;

use vmfs_core::format::heartbeat::Heartbeat;
use vmfs_core::volume::RemoveReport;

const FIRST: LunIndex = LunIndex::new(1).unwrap();

async fn remove(volume: &Volume) -> Result<RemoveReport, FsError> {
    volume.remove_extent(FIRST, &mut |_| ()).await
}

/// Emptied, and every host has heard so.
async fn emptied(sim: &Sim, volume: &Volume) {
    assert!(drain(volume).await.unwrap().is_moved());
    sim.sleep(Duration::from_secs(5)).await;
}

/// A host that goes on making, writing and removing files, until it is asked to stop. It gives the files that must be there.
async fn work(sim: Sim, volume: Volume, prefix: &'static str, stop: Rc<std::cell::Cell<bool>>) -> Vec<(ObjectRef, u8)> {
    let mut kept = Vec::new();
    let mut nth = 0u32;
    while !stop.get() {
        let name = format!("{prefix} {nth}");
        let made = create(&volume, volume.root(), name.as_bytes()).await.unwrap().object;
        let open = volume.open(made, WRITE).await.unwrap();
        write(&volume, &open, 0, &content(nth as u8, 70_000)).await.unwrap();
        volume.close(open).await.unwrap();
        if !nth.is_multiple_of(4) {
            volume.unlink(volume.root(), name.as_bytes()).await.unwrap();
        } else {
            kept.push((made, nth as u8));
        }
        nth += 1;
        sim.sleep(Duration::from_millis(300)).await;
    }
    kept
}

async fn check_kept(volume: &Volume, kept: &[(ObjectRef, u8)]) {
    for (file, seed) in kept {
        assert!(read_at(volume, *file, 0, 70_000).await == content(*seed, 70_000), "{file:?}");
    }
}

#[test]
fn the_first_lun_is_taken_out_while_hosts_work_and_is_not_needed_any_more() {
    for (seed, cell_size) in [(1, CellSize::B512), (2, CellSize::B4096)] {
        let (sim, disks) = world(seed, 2, cell_size);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let all = put(&one, 100).await;
            emptied(&sim, &one).await;
            let stop = Rc::new(std::cell::Cell::new(false));
            let working = [(1, &one, "one"), (2, &two, "two")].map(|(host, volume, prefix)| {
                sim.spawn(HostNo(host), work(sim.clone(), volume.clone(), prefix, stop.clone()))
            });
            let report = remove(&one).await.unwrap();
            assert_eq!((report.lun, report.window.lun), (FIRST, SECOND));
            // Two heartbeats.
            sim.sleep(Duration::from_secs(5)).await;
            disks[0].set_lost(true);
            sim.sleep(Duration::from_secs(40)).await;
            stop.set(true);
            let mut kept = Vec::new();
            for one in working {
                kept.extend(one.join().await.unwrap());
            }
            assert!(kept.len() > 20, "{}", kept.len());
            for volume in [&one, &two] {
                check_put(volume, &Put { names: all.names + kept.len(), ..all }).await;
                check_kept(volume, &kept).await;
                let lun = &volume.luns()[0];
                assert_eq!((lun.index, lun.state), (FIRST, MemberState::Carried));
                assert!(volume.status().await.luns.iter().all(|lun| lun.error.is_none()));
            }
            let again = remove(&two).await.unwrap_err();
            assert!(again.to_string().contains("taken out"), "{again}");
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
            let (later, _) = mount(&sim, &disks[1..], 3).await;
            check_put(&later, &Put { names: all.names + kept.len(), ..all }).await;
            check_kept(&later, &kept).await;
            mkdir(&later, later.root(), b"a directory").await.unwrap();
            later.unmount().await.unwrap();
            disks[0].set_lost(false);
            let luns = disks.iter().map(|disk| path(&sim, disk, 4)).collect();
            let refused = Volume::mount(luns, mount_options(4), sim.env(HostNo(4))).await.err().unwrap();
            assert!(refused.to_string().contains("taken out"), "{refused}");
        });
        assert_eq!(sim.block_on(fsck(&sim, &disks[1..], false)), [], "seed {seed}");
    }
}

/// Counts the changes of the first host on all LUNs down; the host dies at the last one.
fn killed_at(nth: usize) -> bool {
    let (sim, disks) = world(nth as u64, 2, CellSize::B512);
    let died = sim.block_on(async {
        let (remover, other) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
        let all = put(&remover, 10).await;
        emptied(&sim, &remover).await;
        let stop = Rc::new(std::cell::Cell::new(false));
        let working = sim.spawn(HostNo(2), work(sim.clone(), other.clone(), "other", stop.clone()));
        let reached = count_down(&disks, nth);
        let removing = sim.spawn(HostNo(1), async move { remove(&remover).await.map(|_| ()) });
        let died = std::pin::pin!(reached.notified());
        let died = match futures_util::future::select(died, std::pin::pin!(removing.join())).await {
            futures_util::future::Either::Left(_) => true,
            futures_util::future::Either::Right((removed, _)) => {
                assert!(matches!(removed, Some(Ok(()))), "{removed:?}");
                false
            }
        };
        sim.kill(HostNo(1));
        // A host that comes now, and the one that is there, have all of it, wherever it is.
        let third = match Volume::mount(paths_of(&sim, &disks, 3), mount_options(3), sim.env(HostNo(3))).await {
            Ok(third) => third,
            Err(error) => {
                assert!(error.to_string().contains("taken out"), "killed at change {nth}: {error}");
                mount(&sim, &disks[1..], 3).await.0
            }
        };
        check_put_some(&third, &all).await;
        third.unmount().await.unwrap();
        sim.sleep(Duration::from_secs(30)).await;
        stop.set(true);
        let kept = working.join().await.unwrap();
        check_put_some(&other, &all).await;
        match remove(&other).await {
            Ok(_) => {}
            Err(error) => assert!(error.to_string().contains("taken out"), "killed at change {nth}: {error}"),
        }
        check_put_some(&other, &all).await;
        check_kept(&other, &kept).await;
        sim.sleep(Duration::from_secs(3)).await;
        disks[0].set_lost(true);
        other.unmount().await.unwrap();
        let (later, _) = mount(&sim, &disks[1..], 4).await;
        check_put_some(&later, &all).await;
        check_kept(&later, &kept).await;
        later.unmount().await.unwrap();
        died
    });
    assert_eq!(errors(&sim, &disks[1..]), [], "killed at change {nth}");
    died
}

fn paths_of(sim: &Sim, disks: &[MemoryDisk], host: u32) -> Vec<Rc<dyn Lun>> {
    disks.iter().map(|disk| path(sim, disk, host)).collect()
}

/// What was put, beside what others make meanwhile.
async fn check_put_some(volume: &Volume, put: &Put) {
    assert!(read_at(volume, put.large, 0, 3 << 20).await == content(7, 3 << 20));
    assert!(read_at(volume, put.small, 0, 1000).await == content(9, 1000));
    assert!(read_at(volume, put.sparse, (900 << 16) + 4096, 30_000).await == content(2, 30_000));
    assert_eq!(volume.read_link(put.link).await.unwrap(), b"large");
    assert!(list(volume, volume.root(), 50).await.len() >= put.names + 4);
}

#[test]
fn a_removal_that_dies_at_any_change_is_gone_through_by_another_host_and_nothing_is_lost() {
    let mut nth = 1;
    while killed_at(nth) {
        nth = 2 * nth + 1;
        assert!(nth < 100_000, "a removal takes fewer changes");
    }
    assert!(nth > 1000, "it ended after {nth} changes: not every step was met");
}

#[test]
fn two_hosts_take_out_one_lun_at_once_and_both_end_well() {
    for seed in 0..3 {
        let (sim, disks) = world(seed, 3, CellSize::B512);
        sim.block_on(async {
            let (one, two) = (mount_slow(&sim, &disks, 1).await, mount_slow(&sim, &disks, 2).await);
            let all = put(&one, 20).await;
            emptied(&sim, &one).await;
            let free = |volume: Volume| async move {
                volume.status().await.luns.iter().map(|lun| lun.free_blocks).sum::<u64>()
            };
            let begun = [(1, one.clone()), (2, two.clone())].map(|(host, volume)| {
                let env = sim.clone();
                sim.spawn(HostNo(host), async move {
                    env.sleep(Duration::from_micros(700 * u64::from(host) * seed)).await;
                    remove(&volume).await
                })
            });
            let [first, second] = begun;
            let (first, second) = (first.join().await.unwrap(), second.join().await.unwrap());
            for ended in [&first, &second] {
                let is_told = ended.as_ref().is_err_and(|error| error.to_string().contains("taken out"));
                assert!(ended.is_ok() || is_told, "seed {seed}: {ended:?}");
            }
            if let (Ok(first), Ok(second)) = (&first, &second) {
                assert_eq!(first.window, second.window);
            }
            sim.sleep(Duration::from_secs(5)).await;
            disks[0].set_lost(true);
            check_put(&two, &all).await;
            assert!(free(one.clone()).await > 1000);
            one.unmount().await.unwrap();
            two.unmount().await.unwrap();
        });
        // A window that nobody uses would be a finding.
        assert_eq!(sim.block_on(fsck(&sim, &disks[1..], false)), [], "seed {seed}");
    }
}

#[test]
fn what_cannot_be_taken_out_is_refused_and_nothing_changes() {
    let (sim, disks) = world(4, 2, CellSize::B512);
    sim.block_on(async {
        let one = mount_slow(&sim, &disks, 1).await;
        let all = put(&one, 5).await;
        let why = |error: FsError| error.to_string();
        let refused = why(remove(&one).await.unwrap_err());
        assert!(refused.contains("vmfs extent drain"), "{refused}");
        // Something lies there: it is said to be drained, and is not.
        let held = mount_slow(&sim, &disks, 2).await;
        let open = held.open(all.small, WRITE).await.unwrap();
        assert!(!drain(&one).await.unwrap().is_moved());
        let refused = why(remove(&one).await.unwrap_err());
        assert!(refused.contains("is not empty"), "{refused}");
        held.close(open).await.unwrap();
        assert!(drain(&held).await.unwrap().is_moved());
        // A LUN that does not answer.
        disks[1].set_lost(true);
        sim.sleep(Duration::from_secs(60)).await;
        let refused = remove(&one).await.unwrap_err();
        assert_eq!(refused.kind(), FsErrorKind::Io, "{refused}");
        disks[1].set_lost(false);
        sim.sleep(Duration::from_secs(60)).await;
        // A host of a release that does not follow cells.
        let mine = held.context().own_slot(SECOND).unwrap();
        let at = vmfs_core::format::layout::heartbeat_cell(SECOND, mine.slot);
        let set = |abilities: u16| {
            let held = held.clone();
            async move {
                loop {
                    let cell = held.context().read_cell(at).await.unwrap();
                    let slot = Heartbeat { abilities, ..Heartbeat::decode(cell.payload()).unwrap() };
                    let changed = held.context().cas(&cell, CellChange::payload(&cell, slot.encode())).await.unwrap();
                    if matches!(changed, CasOutcome::Applied(_)) {
                        break;
                    }
                }
            }
        };
        set(0).await;
        let refused = why(remove(&one).await.unwrap_err());
        assert!(refused.contains("host2") && refused.contains("release"), "{refused}");
        set(1).await;
        for volume in [&one, &held] {
            assert_eq!(volume.luns()[0].state, MemberState::Draining);
        }
        check_put(&one, &all).await;
        remove(&one).await.unwrap();
        sim.sleep(Duration::from_secs(5)).await;
        // The LUN that carries what stays cannot go, and the last one cannot either.
        let refused = why(one.drain_extent(SECOND, &mut |_| ()).await.unwrap_err());
        assert!(refused.contains("only LUN"), "{refused}");
        let refused = why(one.remove_extent(SECOND, &mut |_| ()).await.unwrap_err());
        assert!(refused.contains("vmfs extent drain"), "{refused}");
        held.unmount().await.unwrap();
        one.unmount().await.unwrap();
    });
    assert_eq!(errors(&sim, &disks[1..]), []);
}

#[test]
fn a_check_of_a_lun_that_is_half_moved_finds_nothing_wrong() {
    let mut met = 0;
    for nth in [200, 500, 800, 1200] {
        let (sim, disks) = world(nth as u64, 2, CellSize::B512);
        let all = sim.block_on(async {
            let remover = mount_slow(&sim, &disks, 1).await;
            let all = put(&remover, 5).await;
            emptied(&sim, &remover).await;
            let reached = count_down(&disks, nth);
            let removing = sim.spawn(HostNo(1), async move { remove(&remover).await.map(|_| ()) });
            futures_util::future::select(std::pin::pin!(reached.notified()), std::pin::pin!(removing.join())).await;
            sim.kill(HostNo(1));
            all
        });
        // What is on its way lands.
        sim.block_on(sim.sleep(Duration::from_secs(1)));
        assert_eq!(errors(&sim, &disks), [], "killed at change {nth}");
        sim.block_on(async {
            let again = mount_slow(&sim, &disks, 2).await;
            met += u32::from(again.luns()[0].state == MemberState::Carried);
            check_put(&again, &all).await;
            sim.sleep(Duration::from_secs(60)).await;
            remove(&again).await.unwrap();
            again.unmount().await.unwrap();
        });
        assert_eq!(errors(&sim, &disks[1..]), [], "killed at change {nth}");
    }
    assert_eq!(met, 4, "not all of them were half moved");
}
