//! Promises of the simulated storage: each fault does what it says, and the same seed gives the same run.

use std::rc::Rc;
use std::time::Duration;

use vmfs_core::buf::AlignedBuf;
use vmfs_core::lun::{Compared, Lun, LunErrorKind};
use vmfs_core::sim::{Command, Fault, FaultRates, HostNo, MemoryDisk, MemoryLun, PathState, Record, Sim};
use vmfs_core::units::CellSize;

const A: HostNo = HostNo(1);
const B: HostNo = HostNo(2);

fn world(seed: u64) -> (Sim, MemoryDisk, Rc<MemoryLun>, Rc<MemoryLun>) {
    let sim = Sim::new(seed);
    let disk = MemoryDisk::new("lun", 1 << 20, Some(CellSize::B512));
    let (a, b) = (disk.connect(&sim, A), disk.connect(&sim, B));
    for path in [&a, &b] {
        path.set_latency(Duration::from_millis(1), Duration::from_millis(5));
    }
    (sim, disk, a, b)
}

fn bytes(value: u8, length: usize) -> AlignedBuf {
    AlignedBuf::copy_of(&vec![value; length])
}

#[test]
fn a_command_that_was_sent_takes_effect_without_its_host() {
    let (sim, disk, a, _) = world(1);
    sim.spawn(A, async move { a.write(0, bytes(7, 512)).await });
    sim.block_on(sim.sleep(Duration::from_micros(1)));
    sim.kill(A);
    sim.block_on(sim.sleep(Duration::from_secs(1)));
    assert_eq!(disk.peek(0, 512), [7; 512]);
}

#[test]
fn a_late_command_lands_after_newer_ones() {
    let (sim, disk, a, _) = world(2);
    let zero = [0; 512];
    a.script(Fault::Late(Duration::from_secs(5)));
    sim.block_on(async {
        let late = a.compare_and_write(0, &zero, &[1; 512]).await.unwrap_err();
        assert_eq!(late.kind, LunErrorKind::Unknown);
        assert_eq!(disk.peek(0, 512), zero);
        sim.sleep(Duration::from_secs(6)).await;
        assert_eq!(disk.peek(0, 512), [1; 512]);
    });
}

#[test]
fn a_torn_write_is_seen_in_parts_and_never_within_a_cell() {
    let (sim, disk, a, b) = world(3);
    a.set_rates(FaultRates { tear: 1000, ..FaultRates::default() });
    let mut torn = 0;
    for round in 1..=50u8 {
        sim.block_on(async {
            let read = async {
                sim.sleep(Duration::from_millis(1)).await;
                b.read(0, 4096).await.unwrap()
            };
            let (seen, written) = futures_util::future::join(read, a.write(0, bytes(round, 4096))).await;
            written.unwrap();
            assert!(seen.chunks(512).all(|cell| cell.iter().all(|byte| *byte == cell[0])));
            torn += usize::from(seen[0] != seen[4095]);
        });
        assert_eq!(disk.peek(0, 4096), vec![round; 4096]);
    }
    assert!(torn > 0);
}

#[test]
fn a_cut_path_tells_nothing_and_a_fenced_one_refuses_on_both_paths_of_a_host() {
    let (sim, disk, a, b) = world(4);
    for (state, kind) in [(PathState::Cut, LunErrorKind::Unknown), (PathState::Fenced, LunErrorKind::Fenced)] {
        disk.set_path(A, state);
        sim.block_on(async {
            assert_eq!(a.write(0, bytes(1, 512)).await.unwrap_err().kind, kind);
            assert_eq!(a.read(0, 512).await.err().unwrap().kind, kind);
            assert_eq!(a.data().write_at(0, &[1; 512]).unwrap_err().kind, kind);
            assert_eq!(b.compare_and_write(512, &[0; 512], &[0; 512]).await.unwrap(), Compared::Written);
        });
        assert_eq!(disk.peek(0, 512), [0; 512]);
    }
}

#[test]
fn a_stalled_storage_answers_nobody_until_it_goes_on() {
    let (sim, disk, a, _) = world(5);
    disk.set_stalled(true);
    let task = sim.spawn(A, async move { a.write(0, bytes(1, 512)).await });
    sim.block_on(sim.sleep(Duration::from_secs(30)));
    assert_eq!(disk.peek(0, 1), [0]);
    disk.set_stalled(false);
    sim.block_on(task.join()).unwrap().unwrap();
    assert_eq!(disk.peek(0, 1), [1]);
}

#[test]
fn a_power_loss_takes_only_data_that_was_not_flushed() {
    for seed in 0..20 {
        let (sim, disk, a, _) = world(seed);
        let data = a.data();
        data.write_at(0, &[1; 4096]).unwrap();
        data.flush().unwrap();
        data.write_at(0, &[2; 4096]).unwrap();
        sim.block_on(a.write(4096, bytes(3, 512))).unwrap();
        disk.lose_power(&sim);
        assert!(disk.peek(0, 4096).chunks(512).all(|cell| cell == [1; 512] || cell == [2; 512]));
        assert_eq!(disk.peek(4096, 512), [3; 512]);
    }
}

#[test]
fn a_lun_of_64_tib_takes_no_memory_for_what_was_never_written() {
    let sim = Sim::new(6);
    let disk = MemoryDisk::new("lun", 64 << 40, None);
    let lun = disk.connect(&sim, A);
    sim.block_on(async {
        lun.write((64 << 40) - 4096, bytes(9, 4096)).await.unwrap();
        assert_eq!(lun.read((64 << 40) - 8192, 8192).await.unwrap()[4096..], [9; 4096]);
        assert_eq!(lun.read(64 << 40, 512).await.err().unwrap().kind, LunErrorKind::OutOfRange);
        lun.write_zeroes(0, 64 << 40).await.unwrap();
        assert_eq!(disk.peek((64 << 40) - 1, 1), [0]);
    });
}

fn run(seed: u64) -> Vec<Record> {
    let (sim, disk, a, b) = world(seed);
    disk.start_recording();
    let tasks: Vec<_> = [(A, a), (B, b)]
        .into_iter()
        .map(|(host, path)| {
            path.set_rates(FaultRates::MANY);
            sim.spawn(host, async move {
                for round in 0..50u64 {
                    let at = round % 7 * 512;
                    let Ok(now) = path.read(at, 512).await else { continue };
                    // The record says what became of it.
                    let _ = path.compare_and_write(at, &now, &[round as u8; 512]).await;
                }
            })
        })
        .collect();
    sim.block_on(async {
        for task in tasks {
            task.join().await;
        }
        sim.sleep(Duration::from_secs(10)).await;
    });
    disk.take_records()
}

#[test]
fn the_same_seed_gives_the_same_commands_at_the_same_times() {
    let first = run(42);
    assert_eq!(first, run(42));
    assert_ne!(first, run(43));
    assert!(first.iter().any(|r| r.command == Command::CompareAndWrite { wrote: false }));
    assert!(first.iter().any(|r| r.host == B && r.command == Command::CompareAndWrite { wrote: true }));
}
