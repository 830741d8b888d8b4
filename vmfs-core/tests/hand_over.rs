//! Promises of handing a disk over to another host: one writer at every moment, nothing lost, whatever breaks at whichever command.

mod names_support;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use names_support::*;
use vmfs_core::disk::descriptor::AdapterType;
use vmfs_core::disk::{self, DiskSpec};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{HandOver, OpenFile, OpenMode, Resolved};
use vmfs_core::format::body::DiskFormat;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::sim::{Fault, FaultRates, HostNo, MemoryDisk, MemoryLun, PathState, Sim};
use vmfs_core::units::CellSize;
use vmfs_core::volume::Volume;

const SIZE: u64 = 4 << 20;

struct Pair {
    source: Volume,
    paths: Vec<Rc<MemoryLun>>,
    destination: Volume,
    disk: ObjectRef,
    file: Arc<OpenFile>,
}

/// Two hosts, and a thin disk that the first one has open and has written to without a flush.
async fn pair(sim: &Sim, disks: &[MemoryDisk]) -> Pair {
    let (source, paths) = mount(sim, disks, 1).await;
    let (destination, _) = mount(sim, disks, 2).await;
    let spec = DiskSpec {
        size: SIZE,
        format: DiskFormat::Thin,
        adapter: AdapterType::LsiLogic,
        multi_writer: false,
        mode: 0o600,
        uid: 0,
        gid: 0,
    };
    disk::create(&source, source.root(), b"d.vmdk", spec, &mut |_| {}).await.unwrap();
    let disk = source.lookup(source.root(), b"d-flat.vmdk").await.unwrap().object;
    let file = source.open(disk, OpenMode::WRITE).await.unwrap();
    for nth in 0..4 {
        write(&source, &file, nth * 900_000, nth as u8 + 1).await.unwrap();
    }
    Pair { source, paths, destination, disk, file }
}

/// Everything is published and dated: the next compare-and-write is the hand-over's.
async fn reopen(pair: &mut Pair) {
    pair.source.close(pair.file.clone()).await.unwrap();
    pair.file = pair.source.open(pair.disk, OpenMode::WRITE).await.unwrap();
}

async fn write(volume: &Volume, file: &Arc<OpenFile>, at: u64, byte: u8) -> Result<(), FsError> {
    let mut done = 0;
    while done < 5000 {
        done += volume.files().write(file, at + done as u64, &vec![byte; 5000 - done]).await?;
    }
    Ok(())
}

async fn expect_bytes(volume: &Volume, file: &Arc<OpenFile>, context: &str) {
    for nth in 0..4 {
        let read = volume.files().read(file, nth * 900_000, 5000).await.unwrap();
        assert!(read == vec![nth as u8 + 1; 5000], "{context}: piece {nth} is lost");
    }
}

/// Opens for writing as soon as that is possible.
async fn open_in_time(sim: &Sim, volume: &Volume, disk: ObjectRef) -> Arc<OpenFile> {
    let began = sim.now();
    loop {
        match volume.open(disk, OpenMode::WRITE).await {
            Ok(file) => return file,
            Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
        }
        assert!(sim.now() - began < 120_000_000_000, "nobody ever gets it");
        sim.sleep(Duration::from_millis(500)).await;
    }
}

#[test]
fn the_destination_goes_on_where_the_source_ended_and_can_hand_it_back() {
    let (sim, disks) = world(1, 2, CellSize::B512);
    sim.block_on(async {
        let Pair { source, destination, disk, file, .. } = pair(&sim, &disks).await;
        let early = destination.accept(disk).await.unwrap_err();
        assert!(early.kind() == FsErrorKind::Busy && early.to_string().contains("not handed over"), "{early}");
        let to = destination.holder_for(disk).unwrap();
        assert!(matches!(source.hand_over(&file, to).await.unwrap(), HandOver::Done));
        // No moment without a holder: nobody comes between, and the source is out.
        assert!(source.open(disk, OpenMode::WRITE).await.unwrap_err().to_string().contains("host2"));
        write(&source, &file, 0, 9).await.unwrap_err();
        let taken = destination.accept(disk).await.unwrap();
        expect_bytes(&destination, &taken, "destination").await;
        write(&destination, &taken, 500_000, 7).await.unwrap();
        let back = source.holder_for(disk).unwrap();
        assert!(matches!(destination.hand_over(&taken, back).await.unwrap(), HandOver::Done));
        let file = source.accept(disk).await.unwrap();
        expect_bytes(&source, &file, "source again").await;
        assert_eq!(source.files().read(&file, 500_000, 5000).await.unwrap(), [7; 5000]);
        source.close(file).await.unwrap();
        source.unmount().await.unwrap();
        destination.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

#[test]
fn what_is_refused_leaves_the_source_as_it_was() {
    let (sim, disks) = world(2, 2, CellSize::B512);
    sim.block_on(async {
        let Pair { source, destination, disk, file, .. } = pair(&sim, &disks).await;
        let mut nobody = destination.holder_for(disk).unwrap();
        nobody.incarnation ^= 1;
        assert_eq!(source.hand_over(&file, nobody).await.unwrap_err().kind(), FsErrorKind::Busy);
        expect_bytes(&source, &file, "after a refusal").await;
        let to = destination.holder_for(disk).unwrap();
        destination.unmount().await.unwrap();
        assert!(source.hand_over(&file, to).await.unwrap_err().to_string().contains("does not live"));
        write(&source, &file, 1_500_000, 5).await.unwrap();
        source.close(file).await.unwrap();
        let file = source.open(disk, OpenMode::READ).await.unwrap();
        expect_bytes(&source, &file, "later").await;
        assert_eq!(source.hand_over(&file, to).await.unwrap_err().kind(), FsErrorKind::Invalid);
        source.close(file).await.unwrap();
        source.unmount().await.unwrap();
        assert_eq!(fsck(&sim, &disks, false).await, Vec::new());
    });
    sim.end();
}

/// What is known at the end of a hand-over with faults: exactly one side may write.
async fn settle(sim: &Sim, pair: &Pair, handed: Result<HandOver, FsError>, context: &str) {
    let Pair { source, destination, disk, file, .. } = pair;
    let unresolved = match handed {
        Ok(HandOver::Done) => None,
        Ok(HandOver::Unresolved(unresolved)) => {
            // Until it is known the source moves nothing.
            write(source, file, 0, 9).await.unwrap_err();
            Some(unresolved)
        }
        Err(_) => {
            assert!(destination.accept(*disk).await.is_err(), "{context}: both have it");
            expect_bytes(source, file, context).await;
            return source.close(file.clone()).await.unwrap();
        }
    };
    let mut resolved = unresolved.is_none();
    let accepted = destination.accept(*disk).await;
    if let Some(mut unresolved) = unresolved {
        for _ in 0..50 {
            match source.files().resolve_hand_over(unresolved).await {
                Ok(Resolved::Destination) => {
                    resolved = true;
                    break;
                }
                Ok(Resolved::Source(file)) => {
                    assert!(accepted.is_err(), "{context}: both have it");
                    assert!(destination.accept(*disk).await.is_err(), "{context}: both have it, later");
                    expect_bytes(source, &file, context).await;
                    write(source, &file, 500_000, 6).await.unwrap();
                    return source.close(file).await.unwrap();
                }
                Err((again, _)) => unresolved = again,
            }
            sim.sleep(Duration::from_millis(300)).await;
        }
    }
    assert!(resolved, "{context}: it never becomes known");
    let taken = match accepted {
        Ok(taken) => taken,
        Err(_) => destination.accept(*disk).await.unwrap(),
    };
    write(source, file, 0, 9).await.unwrap_err();
    expect_bytes(destination, &taken, context).await;
    write(destination, &taken, 500_000, 6).await.unwrap();
    destination.close(taken).await.unwrap();
}

#[test]
fn whichever_commands_have_no_answer_exactly_one_side_goes_on_and_nothing_is_lost() {
    for seed in 0..25u64 {
        let (sim, disks) = world(seed, 2, CellSize::B512);
        sim.block_on(async {
            let pair = pair(&sim, &disks).await;
            let rates =
                FaultRates { answer_lost: 120, command_lost: 120, late: 60, not_done: 40, ..FaultRates::default() };
            pair.paths.iter().for_each(|path| path.set_rates(rates));
            let to = pair.destination.holder_for(pair.disk).unwrap();
            let handed = pair.source.hand_over(&pair.file, to).await;
            pair.paths.iter().for_each(|path| path.set_rates(FaultRates::default()));
            settle(&sim, &pair, handed, &format!("seed {seed}")).await;
            sim.sleep(Duration::from_secs(10)).await;
            for host in [&pair.source, &pair.destination] {
                host.unmount().await.unwrap();
            }
        });
        sim.end();
    }
}

/// Hands over with a path that is cut `at` microseconds after the beginning; gives what came of it. The path is up again afterwards.
async fn cut_off(sim: &Sim, disks: &[MemoryDisk], pair: &Pair, at: u64) -> Result<HandOver, FsError> {
    pair.paths.iter().for_each(|path| path.set_latency(Duration::from_millis(1), Duration::from_millis(1)));
    let to = pair.destination.holder_for(pair.disk).unwrap();
    let (going, held) = (pair.source.clone(), pair.file.clone());
    let handing = sim.spawn(HostNo(1), async move { going.hand_over(&held, to).await });
    sim.sleep(Duration::from_micros(at)).await;
    disks.iter().for_each(|disk| disk.set_path(HostNo(1), PathState::Cut));
    let handed = handing.join().await.expect("the host lives");
    disks.iter().for_each(|disk| disk.set_path(HostNo(1), PathState::Up));
    pair.paths.iter().for_each(|path| path.set_latency(Duration::ZERO, Duration::ZERO));
    handed
}

#[test]
fn wherever_the_source_is_cut_off_it_says_what_it_does_not_know_and_finds_it_out_later() {
    let (mut unresolved, mut done) = (0, 0);
    for step in 0..40 {
        let (sim, disks) = world(step, 1, CellSize::B512);
        sim.block_on(async {
            let mut pair = pair(&sim, &disks).await;
            reopen(&mut pair).await;
            let handed = cut_off(&sim, &disks, &pair, 250 * step).await;
            unresolved += u32::from(matches!(handed, Ok(HandOver::Unresolved(_))));
            done += u32::from(matches!(handed, Ok(HandOver::Done)));
            settle(&sim, &pair, handed, &format!("step {step}")).await;
            sim.sleep(Duration::from_secs(10)).await;
            for host in [&pair.source, &pair.destination] {
                host.unmount().await.unwrap();
            }
        });
        sim.end();
    }
    assert!(unresolved > 2 && done > 2, "of 40 cuts {unresolved} left it open and {done} came too late");
}

#[test]
fn a_hand_over_that_lands_after_it_was_given_up_is_void() {
    for fault in [Fault::Late(Duration::from_millis(900)), Fault::AnswerLost, Fault::CommandLost] {
        let (sim, disks) = world(3, 1, CellSize::B512);
        sim.block_on(async {
            let mut pair = pair(&sim, &disks).await;
            reopen(&mut pair).await;
            let to = pair.destination.holder_for(pair.disk).unwrap();
            pair.paths[0].script(fault);
            let handed = pair.source.hand_over(&pair.file, to).await;
            settle(&sim, &pair, handed, &format!("{fault:?}")).await;
            sim.sleep(Duration::from_secs(10)).await;
            for host in [&pair.source, &pair.destination] {
                host.unmount().await.unwrap();
            }
        });
        sim.end();
    }
}

#[test]
fn wherever_the_source_dies_the_disk_is_whole_and_goes_to_one_host() {
    let mut handed = 0;
    for step in 0..40 {
        let (sim, disks) = world(step, 1, CellSize::B512);
        sim.block_on(async {
            let Pair { source, paths, destination, disk, file } = pair(&sim, &disks).await;
            source.flush(&file).await.unwrap();
            paths.iter().for_each(|path| path.set_latency(Duration::from_millis(1), Duration::from_millis(1)));
            let to = destination.holder_for(disk).unwrap();
            let going = source.clone();
            let held = file.clone();
            sim.spawn(HostNo(1), async move { drop(going.hand_over(&held, to).await) });
            sim.sleep(Duration::from_micros(500 * step)).await;
            sim.kill(HostNo(1));
            sim.sleep(Duration::from_millis(50)).await;
            let file = match destination.accept(disk).await {
                Ok(file) => {
                    handed += 1;
                    file
                }
                Err(error) => {
                    assert_eq!(error.kind(), FsErrorKind::Busy, "{error}");
                    open_in_time(&sim, &destination, disk).await
                }
            };
            expect_bytes(&destination, &file, &format!("step {step}")).await;
            write(&destination, &file, 500_000, 6).await.unwrap();
            destination.close(file).await.unwrap();
            sim.sleep(Duration::from_secs(120)).await;
            destination.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "step {step}");
        });
        sim.end();
    }
    assert!((1..40).contains(&handed), "{handed} of 40: the deaths are not spread over the hand-over");
}

#[test]
fn when_the_destination_dies_before_it_accepts_or_the_source_is_cut_off_the_disk_comes_back() {
    let (sim, disks) = world(5, 1, CellSize::B512);
    sim.block_on(async {
        let Pair { source, destination, disk, file, .. } = pair(&sim, &disks).await;
        let to = destination.holder_for(disk).unwrap();
        sim.kill(HostNo(2));
        // It is dead, and nobody knows yet.
        assert!(matches!(source.hand_over(&file, to).await.unwrap(), HandOver::Done));
        let file = open_in_time(&sim, &source, disk).await;
        expect_bytes(&source, &file, "after the destination's death").await;
        let (third, _) = mount(&sim, &disks, 3).await;
        let to = third.holder_for(disk).unwrap();
        disks[0].set_path(HostNo(1), PathState::Cut);
        let handed = source.hand_over(&file, to).await;
        assert!(!matches!(handed, Ok(HandOver::Done)));
        let taken = open_in_time(&sim, &third, disk).await;
        disks[0].set_path(HostNo(1), PathState::Up);
        if let Ok(HandOver::Unresolved(unresolved)) = handed {
            let answer = source.files().resolve_hand_over(unresolved).await;
            assert!(!matches!(answer, Ok(Resolved::Source(_))), "{answer:?}");
        }
        write(&source, &file, 0, 9).await.unwrap_err();
        expect_bytes(&third, &taken, "third").await;
        third.close(taken).await.unwrap();
    });
    sim.end();
}

#[test]
fn a_hand_over_that_nobody_resolves_leaves_no_lock_behind_when_its_file_is_closed() {
    let mut unresolved = 0;
    for step in 0..40 {
        let (sim, disks) = world(step, 1, CellSize::B512);
        sim.block_on(async {
            let mut pair = pair(&sim, &disks).await;
            reopen(&mut pair).await;
            let handed = cut_off(&sim, &disks, &pair, 250 * step).await;
            if let Ok(HandOver::Unresolved(_)) = handed {
                unresolved += 1;
                pair.source.close(pair.file.clone()).await.unwrap();
                let file = match pair.destination.accept(pair.disk).await {
                    Ok(file) => file,
                    Err(_) => pair.destination.open(pair.disk, OpenMode::WRITE).await.unwrap(),
                };
                expect_bytes(&pair.destination, &file, "after the close").await;
                pair.destination.close(file).await.unwrap();
            }
        });
        sim.end();
    }
    assert!(unresolved > 2, "{unresolved} of 40");
}
