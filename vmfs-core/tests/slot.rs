//! Promises of slots: who may join, renew and leave, and what stops a host for good.

mod scale;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use vmfs_core::cas::{CasOutcome, CellChange, CellIo};
use vmfs_core::env::Env;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::arena::{Arena, Place};
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::format::heartbeat::{Heartbeat, SlotState};
use vmfs_core::format::layout::{arena_cell, heartbeat_cell};
use vmfs_core::gate::{Gate, GatePage, GateState};
use vmfs_core::lease;
use vmfs_core::lun::Lun;
use vmfs_core::mkfs::MkfsOptions;
use vmfs_core::sim::{Fault, FaultRates, HostNo, MemoryDisk, MemoryLun, PathState, Sim, TaskHandle, format_disks};
use vmfs_core::slot::{self, HostIdentity, OwnSlot, check_live, join, leave, read_slot, renew};
use vmfs_core::units::{Generation, LunIndex, SlotId, SlotRef, Uuid};

const LUN: LunIndex = LunIndex::new(1).unwrap();
const LEASE: LeaseTimes = LeaseTimes::DEFAULT;

struct Host {
    io: CellIo,
    env: Rc<dyn Env>,
    path: Rc<MemoryLun>,
    lun: Rc<dyn Lun>,
    identity: HostIdentity,
    incarnation: u64,
}

struct World {
    sim: Sim,
    disk: MemoryDisk,
    context: vmfs_core::format::CellContext,
}

fn world(seed: u64) -> World {
    let sim = Sim::new(seed);
    let disk = MemoryDisk::new("lun", 64 << 20, None);
    let plan = sim.block_on(format_disks(&sim, std::slice::from_ref(&disk), MkfsOptions::default())).unwrap();
    World { sim, disk, context: plan.context() }
}

impl World {
    fn host(&self, number: u32) -> Host {
        let path = self.disk.connect(&self.sim, HostNo(number));
        path.set_latency(Duration::from_micros(50), Duration::from_millis(1));
        let env = self.sim.env(HostNo(number));
        Host {
            io: CellIo::new(self.context, env.clone()),
            env,
            lun: path.clone(),
            path,
            identity: HostIdentity {
                host: Uuid([number as u8; 16]),
                boot: Uuid([0xb0; 16]),
                name: format!("host-{number}"),
            },
            incarnation: 1000 + u64::from(number),
        }
    }
}

impl Host {
    async fn join(&self, prefer: u8) -> Result<OwnSlot, FsError> {
        join(&self.io, &self.lun, LUN, &self.identity, self.incarnation, LEASE, Some(SlotId(prefer))).await
    }

    async fn read(&self, slot: u8) -> Heartbeat {
        read_slot(&self.io, &self.lun, LUN, SlotId(slot)).await.unwrap().1
    }

    /// Changes a heartbeat cell as another host would.
    async fn meddle(&self, slot: u8, edit: impl Fn(&mut Heartbeat)) {
        let (cell, mut heartbeat) = read_slot(&self.io, &self.lun, LUN, SlotId(slot)).await.unwrap();
        edit(&mut heartbeat);
        let new = self.io.successor(&cell, CellChange::payload(&cell, heartbeat.encode()), SlotRef::NOBODY);
        assert!(matches!(self.io.cas(&self.lun, &cell, new).await.unwrap(), CasOutcome::Applied(_)));
    }
}

#[test]
fn a_host_joins_its_preferred_slot_at_the_next_generation_with_an_empty_arena() {
    let world = world(1);
    let host = world.host(1);
    world.sim.block_on(async {
        for generation in 1..=3 {
            let mut own = host.join(9).await.unwrap();
            assert_eq!(own.slot, SlotRef { slot: SlotId(9), generation: Generation(generation) });
            let live = host.read(9).await;
            assert!(live.is_live(Generation(generation)) && live.incarnation == 1001 && live.host_name == "host-1");
            assert_eq!(live.lease, LEASE);
            let arena = Arena::decode(world.context.cell_size, own.arena.payload()).unwrap();
            assert_eq!((arena.generation, arena.places.len()), (Generation(generation), 0));
            // What an incarnation listed is not what the next one starts with.
            let dirty = Arena { places: vec![Place::TableCell(3)], ..arena };
            let new = host.io.successor(&own.arena, CellChange::payload(&own.arena, dirty.encode()), own.slot);
            assert!(matches!(host.io.cas(&host.lun, &own.arena, new).await.unwrap(), CasOutcome::Applied(_)));
            leave(&host.io, &host.lun, &mut own, true).await.unwrap();
            let left = host.read(9).await;
            assert_eq!(
                (left.state, left.generation, left.host),
                (SlotState::Free, Generation(generation), Uuid::default())
            );
        }
    });
}

#[test]
fn hosts_that_join_at_once_get_slots_of_their_own_through_any_fault() {
    for seed in scale::seeds(0, 30) {
        let world = world(seed);
        let tasks: Vec<_> = (1..=6)
            .map(|number| {
                let host = world.host(number);
                host.path.set_rates(FaultRates { not_done: 0, tear: 0, ..FaultRates::MANY });
                world.sim.spawn(HostNo(number), async move { host.join(3).await })
            })
            .collect();
        world.sim.block_on(async {
            let mut slots = Vec::new();
            for task in tasks {
                if let Ok(own) = task.join().await.unwrap() {
                    slots.push(own.slot.slot);
                }
            }
            let joined = slots.len();
            slots.sort();
            slots.dedup();
            assert_eq!(slots.len(), joined, "seed {seed}");
            assert!(joined >= 2, "seed {seed}: hardly anybody joined");
        });
    }
}

#[test]
fn slots_in_use_dirty_or_unreadable_are_passed_over() {
    let world = world(2);
    let (a, b) = (world.host(1), world.host(2));
    world.sim.block_on(async {
        let mut first = a.join(255).await.unwrap();
        leave(&a.io, &a.lun, &mut first, false).await.unwrap();
        assert_eq!(a.read(255).await.state, SlotState::Dirty);
        b.meddle(0, |h| h.state = SlotState::Breaking).await;
        world.disk.damage(heartbeat_cell(LUN, SlotId(1)).offset + 8, &[0xff]);
        assert_eq!(b.join(255).await.unwrap().slot.slot, SlotId(2));
    });
}

#[test]
fn when_every_slot_is_taken_the_error_names_who_holds_them() {
    let world = world(3);
    let host = world.host(1);
    world.sim.block_on(async {
        for slot in 0..=255 {
            host.meddle(slot, |h| {
                h.state = if slot % 2 == 0 { SlotState::Live } else { SlotState::Dirty };
                h.host_name = if slot % 2 == 0 { format!("live-{}", slot % 20) } else { "gone".to_owned() };
            })
            .await;
        }
        let error = host.join(0).await.unwrap_err();
        assert_eq!(error.kind(), FsErrorKind::Busy);
        let message = error.to_string();
        assert!(message.contains("live-0") && message.contains("gone") && message.contains("2 more"), "{message}");
    });
}

#[test]
fn a_renewal_extends_the_lease_from_before_it_was_sent() {
    let world = world(4);
    let host = world.host(1);
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        host.env.sleep(Duration::from_secs(2)).await;
        host.path.set_latency(Duration::from_secs(1), Duration::from_secs(1));
        let t0 = host.env.now();
        renew(&host.io, &host.lun, &mut own).await.unwrap();
        assert!(host.env.now() >= t0.after(Duration::from_secs(2)));
        assert_eq!(own.lease_until, t0.after(Duration::from_secs(20)));
        assert_eq!(host.read(0).await.beat, 2);
        check_live(&host.io, &host.lun, &own).await.unwrap();
    });
}

#[test]
fn a_renewal_whose_answer_is_lost_for_long_is_picked_up_by_the_next_one() {
    let world = world(5);
    let host = world.host(1);
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        let before = own.lease_until;
        host.path.script(Fault::AnswerLost);
        world.disk.set_stalled(true);
        world.sim.spawn(HostNo(9), {
            let (sim, disk) = (world.sim.clone(), world.disk.clone());
            async move {
                sim.sleep(Duration::from_secs(1)).await;
                disk.set_path(HostNo(1), PathState::Cut);
                disk.set_stalled(false);
            }
        });
        assert!(renew(&host.io, &host.lun, &mut own).await.is_err());
        assert_eq!(own.lease_until, before);
        world.disk.set_path(HostNo(1), PathState::Up);
        renew(&host.io, &host.lun, &mut own).await.unwrap();
        assert!(own.lease_until > before);
    });
}

#[test]
fn a_request_to_drop_a_lun_does_not_stop_a_renewal_and_is_kept() {
    let world = world(6);
    let (host, other) = (world.host(1), world.host(2));
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        other.meddle(0, |h| h.drop_lun = 7).await;
        renew(&host.io, &host.lun, &mut own).await.unwrap();
        let now = host.read(0).await;
        assert_eq!((now.drop_lun, now.beat), (7, 2));
        slot::update(&host.io, &host.lun, &mut own, |h| h.drop_acknowledged = true).await.unwrap();
        assert!(host.read(0).await.drop_acknowledged);
    });
}

#[test]
fn a_slot_that_another_host_claimed_is_never_renewed_left_or_live_again() {
    for claim in [SlotState::Breaking, SlotState::Dirty, SlotState::Free] {
        let world = world(7);
        let (host, other) = (world.host(1), world.host(2));
        world.sim.block_on(async {
            let mut own = host.join(0).await.unwrap();
            other.meddle(0, |h| h.state = claim).await;
            for _ in 0..2 {
                assert_eq!(renew(&host.io, &host.lun, &mut own).await.unwrap_err().kind(), FsErrorKind::Fenced);
            }
            assert_eq!(check_live(&host.io, &host.lun, &own).await.unwrap_err().kind(), FsErrorKind::Fenced);
            assert_eq!(leave(&host.io, &host.lun, &mut own, true).await.unwrap_err().kind(), FsErrorKind::Fenced);
            assert_eq!(host.read(0).await.state, claim);
        });
    }
}

#[test]
fn a_slot_that_went_on_to_another_incarnation_is_not_the_old_ones() {
    let world = world(8);
    let (host, other) = (world.host(1), world.host(2));
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        other.meddle(0, |h| h.state = SlotState::Free).await;
        let theirs = other.join(0).await.unwrap();
        assert_eq!(theirs.slot.generation, Generation(2));
        assert_eq!(renew(&host.io, &host.lun, &mut own).await.unwrap_err().kind(), FsErrorKind::Fenced);
        check_live(&other.io, &other.lun, &theirs).await.unwrap();
    });
}

#[test]
fn a_host_whose_storage_was_rolled_back_stops_for_good() {
    let world = world(9);
    let host = world.host(1);
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        renew(&host.io, &host.lun, &mut own).await.unwrap();
        let snapshot = world.disk.snapshot();
        renew(&host.io, &host.lun, &mut own).await.unwrap();
        world.disk.restore(&snapshot);
        let error = renew(&host.io, &host.lun, &mut own).await.unwrap_err();
        assert!(error.kind() == FsErrorKind::Stale && error.to_string().contains("rolled back"), "{error}");
        assert_eq!(check_live(&host.io, &host.lun, &own).await.unwrap_err().kind(), FsErrorKind::Stale);
    });
}

#[test]
fn a_host_whose_lun_was_formatted_anew_stops_for_good() {
    let world = world(9);
    let host = world.host(1);
    world.sim.block_on(async {
        let mut own = host.join(0).await.unwrap();
        let anew = MkfsOptions { force: true, ..MkfsOptions::default() };
        format_disks(&world.sim, std::slice::from_ref(&world.disk), anew).await.unwrap();
        for _ in 0..2 {
            let error = renew(&host.io, &host.lun, &mut own).await.unwrap_err();
            assert!(error.kind() == FsErrorKind::Stale && error.to_string().contains("was formatted"), "{error}");
        }
        assert_eq!(check_live(&host.io, &host.lun, &own).await.unwrap_err().kind(), FsErrorKind::Stale);
    });
}

#[test]
fn only_hosts_that_still_renew_are_seen_as_using_a_lun() {
    let world = world(10);
    let (dead, alive, watcher) = (world.host(1), world.host(2), world.host(3));
    world.sim.block_on(async {
        assert!(slot::hosts_in_use(&watcher.io, &watcher.lun, LUN).await.unwrap().is_empty());
        assert_eq!(world.sim.now() / 1_000_000_000, 0, "without live slots nothing is waited for");
        dead.join(0).await.unwrap();
        let mut own = alive.join(1).await.unwrap();
        world.sim.spawn(HostNo(2), async move {
            loop {
                alive.env.sleep(Duration::from_secs(2)).await;
                renew(&alive.io, &alive.lun, &mut own).await.unwrap();
            }
        });
        assert_eq!(slot::live_hosts(&watcher.io, &watcher.lun, LUN).await.unwrap().len(), 2);
        let users = slot::hosts_in_use(&watcher.io, &watcher.lun, LUN).await.unwrap();
        assert_eq!(users.iter().map(|(slot, h)| (slot.0, h.host_name.as_str())).collect::<Vec<_>>(), [(1, "host-2")]);
    });
    world.sim.end();
}

#[test]
fn a_slot_whose_arena_is_damaged_is_given_back_and_another_one_taken() {
    let world = world(11);
    let host = world.host(1);
    world.disk.damage(arena_cell(LUN, SlotId(0)).offset + 8, &[0xff]);
    world.sim.block_on(async {
        assert_eq!(host.join(0).await.unwrap().slot.slot, SlotId(1));
        let left = host.read(0).await;
        assert_eq!((left.state, left.generation), (SlotState::Free, Generation(1)));
    });
}

/// A host that keeps its lease, and its gate as its data path sees it.
fn keeping(world: &World) -> (Rc<Host>, Gate, Rc<RefCell<OwnSlot>>, TaskHandle<FsError>) {
    let (host, page) = (Rc::new(world.host(1)), GatePage::in_process());
    let own = Rc::new(RefCell::new(world.sim.block_on(host.join(0)).unwrap()));
    let gate = page.gate();
    let task = world.sim.spawn(HostNo(1), {
        let (host, own) = (host.clone(), own.clone());
        async move { slot::keep(&host.io, &host.lun, &own, &page).await }
    });
    (host, gate, own, task)
}

#[test]
fn a_gate_stays_open_while_renewals_land_freezes_without_them_and_opens_again() {
    let world = world(12);
    let (host, gate, _, _) = keeping(&world);
    let state = || gate.state(LUN, Generation(1), host.env.now());
    let wait = |seconds| world.sim.block_on(world.sim.sleep(Duration::from_secs(seconds)));
    for _ in 0..20 {
        wait(3);
        assert_eq!(state(), GateState::Open);
    }
    world.disk.set_path(HostNo(1), PathState::Cut);
    wait(16);
    assert_eq!(state(), GateState::Frozen);
    wait(600);
    assert_eq!(state(), GateState::Frozen);
    world.disk.set_path(HostNo(1), PathState::Up);
    wait(10);
    assert_eq!(state(), GateState::Open);
    world.sim.end();
}

#[test]
fn a_gate_is_closed_before_anybody_may_take_the_lease_over_also_when_its_host_was_paused() {
    let world = world(13);
    let (host, gate, _, task) = keeping(&world);
    let other = world.host(2);
    let wait = |time| world.sim.block_on(world.sim.sleep(time));
    wait(Duration::from_secs(10));
    world.sim.pause(HostNo(1));
    wait(lease::takeover_after(&LEASE));
    assert_eq!(gate.state(LUN, Generation(1), host.env.now()), GateState::Frozen);
    world.sim.block_on(other.meddle(0, |h| h.state = SlotState::Breaking));
    world.sim.resume(HostNo(1));
    let ended = world.sim.block_on(task.join()).unwrap();
    assert_eq!(ended.kind(), FsErrorKind::Fenced);
    assert_eq!(gate.state(LUN, Generation(1), host.env.now()), GateState::Poisoned);
}
