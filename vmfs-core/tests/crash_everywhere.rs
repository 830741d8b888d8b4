//! Promises when a host dies after any single command that it sent, in any sequence of up to three operations: what was acknowledged is
//! there, what was cut off is there or not there for everybody, another host recovers all of it, and the checker finds nothing.
//!
//! A sequence dies in its last operation only: deaths in the ones before are those of the shorter sequences. `VMFS_TEST_EVERY_CRASH=1`
//! runs all of them; else a sample, `VMFS_TEST_SCALE` times as large.

mod copies;
mod crash_support;
mod names_support;
mod scale;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use crash_support::*;
use names_support::{fsck, identity, options, slots_of};
use vmfs_core::check::Severity;
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::format::heartbeat::SlotState;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::sim::{Allowance, HostNo, MemoryDisk, Rng, Sim, Snapshot, format_disks};
use vmfs_core::slot;
use vmfs_core::units::CellSize;
use vmfs_core::volume::{MountOptions, Volume};

const DYING: HostNo = HostNo(1);
const OTHER: HostNo = HostNo(2);
/// Commands after the answer of the last operation that a death may fall between: what is put off.
const AFTERWARDS: u64 = 12;
/// Short, so that a takeover takes little virtual time.
const LEASE: LeaseTimes = LeaseTimes { lease_ms: 3000, renew_ms: 500, margin_ms: 1000, clock_ppm: 1000 };

/// The bytes that every run begins with.
struct Start {
    disks: Vec<Snapshot>,
    cell_size: CellSize,
}

fn empty(nth: usize, cell_size: CellSize) -> MemoryDisk {
    MemoryDisk::new(&format!("lun{nth}"), 64 << 20, Some(cell_size))
}

impl Start {
    fn new(disks: usize, cell_size: CellSize) -> Start {
        let sim = Sim::new(1);
        let disks: Vec<_> = (0..disks).map(|nth| empty(nth, cell_size)).collect();
        sim.block_on(async {
            let options = MkfsOptions { lease: LEASE, ..options(cell_size) };
            format_disks(&sim, &disks, options).await.unwrap();
            let maker = mount(&sim, &disks, HostNo(3)).await;
            furnish(&maker).await;
            maker.unmount().await.unwrap();
        });
        sim.end();
        Start { disks: disks.iter().map(MemoryDisk::snapshot).collect(), cell_size }
    }

    fn disks(&self) -> Vec<MemoryDisk> {
        let each = self.disks.iter().enumerate().map(|(nth, snapshot)| {
            let disk = empty(nth, self.cell_size);
            disk.restore(snapshot);
            disk
        });
        each.collect()
    }
}

async fn mount(sim: &Sim, disks: &[MemoryDisk], host: HostNo) -> Volume {
    let luns = disks.iter().map(|disk| disk.connect(sim, host) as Rc<dyn Lun>).collect();
    let options = MountOptions { read_only: false, host: identity(host.0), slot_hint: None, degraded: false };
    let volume = Volume::mount(luns, options, sim.env(host)).await.unwrap();
    let background = volume.clone();
    sim.spawn(host, async move { background.background().await });
    volume
}

/// Where a run dies: in the last operation, after so many commands.
struct Death<'a> {
    start: &'a Start,
    sequence: &'a [Op],
    after: u64,
    power_loss: bool,
}

impl Death<'_> {
    /// Carries out the sequence, dies, recovers, judges. Gives the commands that the last operation took when it was not cut off.
    fn run(&self) -> Option<u64> {
        let sim = Sim::new(7);
        sim.limit_steps(2_000_000);
        let disks = self.start.disks();
        let took = sim.block_on(self.steps(&sim, &disks));
        sim.end();
        took
    }

    async fn steps(&self, sim: &Sim, disks: &[MemoryDisk]) -> Option<u64> {
        let label = format!("{:?} dies after {} commands of the last one", self.sequence, self.after);
        let other = mount(sim, disks, OTHER).await;
        let dying = mount(sim, disks, DYING).await;
        let slots = slots_of(&dying);
        let allowance = Allowance::unlimited();
        disks.iter().for_each(|disk| disk.set_allowance(DYING, &allowance));
        let acknowledged = Rc::new(Cell::new(0));
        let took = Rc::new(Cell::new(None));
        let (told, count, limit, after) = (acknowledged.clone(), took.clone(), allowance.clone(), self.after);
        let sequence = self.sequence.to_vec();
        sim.spawn(DYING, async move {
            let mut worker = Worker::new(dying);
            for (nth, op) in sequence.iter().enumerate() {
                let is_last = nth + 1 == sequence.len();
                if is_last {
                    limit.end_after(after);
                }
                let before = limit.used();
                if worker.carry_out(*op).await.is_err() {
                    assert!(limit.is_used_up(), "{op:?} failed though its host lived");
                    return;
                }
                told.set(nth + 1);
                if is_last {
                    count.set(Some(limit.used() - before));
                }
            }
            // What it has open stays open.
            std::future::pending::<()>().await;
        });
        for _ in 0..5000 {
            if allowance.is_used_up() {
                break;
            }
            sim.sleep(Duration::from_millis(1)).await;
        }
        sim.sleep(Duration::from_millis(1)).await;
        sim.kill(DYING);
        if self.power_loss {
            disks.iter().for_each(|disk| disk.lose_power(sim));
        }
        self.judge(sim, disks, other, &slots, acknowledged.get(), &label).await;
        took.get()
    }

    async fn judge(
        &self,
        sim: &Sim,
        disks: &[MemoryDisk],
        other: Volume,
        slots: &[(vmfs_core::units::LunIndex, vmfs_core::units::SlotRef)],
        acknowledged: usize,
        label: &str,
    ) {
        let mut states = vec![Model::new()];
        for op in self.sequence {
            states.push(states.last().unwrap().after(*op).expect("only sequences that can be done are run"));
        }
        let (before, after) = (&states[acknowledged].look, &states[(acknowledged + 1).min(self.sequence.len())].look);
        let seen = look(&other).await;
        assert!(is_between(&seen, before, after), "{label}: {seen:?} is neither {before:?} nor {after:?}");
        slots.iter().for_each(|(lun, slot)| other.context().suspect(*lun, slot.slot));
        wait_for_recovery(sim, &other, slots, label).await;
        let recovered = look(&other).await;
        assert!(recovered == seen, "{label}: {recovered:?} after the recovery, {seen:?} before it");
        use_everything(&other).await;
        sim.sleep(Duration::from_secs(3)).await;
        other.unmount().await.unwrap();
        let mut findings = fsck(sim, disks, false).await;
        // The count of blocks in a body is a hint.
        findings.retain(|finding| finding.field != "blocks" || finding.severity == Severity::Error);
        assert_eq!(findings, Vec::new(), "{label}");
    }
}

async fn wait_for_recovery(
    sim: &Sim,
    other: &Volume,
    slots: &[(vmfs_core::units::LunIndex, vmfs_core::units::SlotRef)],
    label: &str,
) {
    for (lun, dead) in slots {
        let member = other.context().member(*lun).unwrap();
        let mut tries = 0;
        loop {
            let (_, found) = slot::read_slot(&other.context().io, &member.lun, *lun, dead.slot).await.unwrap();
            if found.state == SlotState::Free || found.generation != dead.generation {
                break;
            }
            tries += 1;
            assert!(tries < 120, "{label}: {dead} of {lun} is {:?} and is never recovered", found.state);
            sim.sleep(Duration::from_millis(500)).await;
        }
    }
}

/// All sequences of this length whose operations can be done one after another.
fn sequences(length: usize) -> Vec<Vec<Op>> {
    let mut all = vec![(Vec::new(), Model::new())];
    for _ in 0..length {
        let longer = all.iter().flat_map(|(sequence, model)| {
            OPS.into_iter().filter_map(move |op| {
                let next: Vec<Op> = sequence.iter().copied().chain([op]).collect();
                Some((next, model.after(op)?))
            })
        });
        all = longer.collect();
    }
    all.into_iter().map(|(sequence, _)| sequence).collect()
}

/// Dies after every command of the last operation, and after some behind its end; only every `step`-th, from a `first` on.
fn die_everywhere(start: &Start, sequence: &[Op], first: u64, step: u64) -> u64 {
    let (mut after, mut runs) = (first, 0);
    let mut end = None;
    while end.is_none_or(|end| after <= end) {
        let took = Death { start, sequence, after, power_loss: after % 2 == 1 }.run();
        end = took.map(|took| took + AFTERWARDS);
        runs += 1;
        after += step;
    }
    runs
}

fn is_every_one() -> bool {
    std::env::var_os("VMFS_TEST_EVERY_CRASH").is_some_and(|value| value == "1")
}

/// Root cell and body of a new object are written at once. A root cell without its body was taken for damage by the recovery, which
/// stopped there for ever, and with it the host's slot, its locks and all that it had left on the LUN.
#[test]
fn a_creation_whose_body_never_came_to_be_is_taken_back() {
    let start = Start::new(1, CellSize::B512);
    for after in 0..12 {
        for sequence in [[Op::Create], [Op::MakeDirectory]] {
            Death { start: &start, sequence: &sequence, after, power_loss: false }.run();
        }
    }
}

#[test]
fn a_host_that_dies_after_any_command_of_any_operation_leaves_all_of_it_or_nothing() {
    let start = Start::new(1, CellSize::B512);
    for sequence in sequences(1) {
        die_everywhere(&start, &sequence, 0, 1);
    }
}

#[test]
fn a_host_that_dies_after_any_command_of_up_to_three_operations_leaves_what_was_acknowledged() {
    let starts = [Start::new(1, CellSize::B512), Start::new(2, CellSize::B512), Start::new(1, CellSize::B4096)];
    let mut runs = 0;
    if is_every_one() {
        for sequence in sequences(2).into_iter().chain(sequences(3)) {
            runs += die_everywhere(&starts[0], &sequence, 0, 1);
        }
    } else {
        let all = [sequences(2), sequences(3)].concat();
        for seed in scale::seeds(0, 60) {
            let rng = &mut Rng::new(seed);
            let sequence = &all[rng.below(all.len() as u64) as usize];
            runs += die_everywhere(&starts[rng.below(3) as usize], sequence, rng.below(10), 10);
        }
    }
    println!("{runs} deaths");
}
