//! Promises of a mount whose slots are kept elsewhere: it works, stands still while its keeper does, and finds by itself that it was fenced or
//! that the storage went back in time.

mod names_support;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use names_support::*;
use vmfs_core::cas::CellIo;
use vmfs_core::env::LocalFuture;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::OpenMode;
use vmfs_core::gate::{GATE_WORDS, GateMemory, GatePage, GateState};
use vmfs_core::keeper::{Joining, Kept, SlotKeeper, adopt_joined, watch_renewed_elsewhere};
use vmfs_core::lun::Lun;
use vmfs_core::sim::{HostNo, MemoryDisk, Sim};
use vmfs_core::slot::{self, OwnSlot};
use vmfs_core::units::{CellSize, LunIndex, SlotRef};
use vmfs_core::volume::Volume;

/// The keeper of host 1's slots is a host of the simulator by itself, so that it can die or stand still without the mount.
const KEEPER: HostNo = HostNo(101);
const FIRST: LunIndex = LunIndex::new(1).unwrap();
const WRITE: OpenMode = OpenMode { read: true, write: true, truncate: false };

struct Elsewhere {
    sim: Sim,
    disks: Vec<MemoryDisk>,
    page: Arc<dyn GateMemory>,
}

impl SlotKeeper for Elsewhere {
    fn describe(&self) -> String {
        "another process".to_owned()
    }

    fn join<'a>(&'a self, joining: Joining<'a>) -> LocalFuture<'a, Result<OwnSlot, FsError>> {
        Box::pin(async move {
            let lun: Rc<dyn Lun> = self.disks[usize::from(joining.index.get()) - 1].connect(&self.sim, KEEPER);
            let io = CellIo::new(*joining.io.context(), self.sim.env(KEEPER));
            let Joining { index, identity, incarnation, lease, prefer, .. } = joining;
            let own = slot::join(&io, &lun, index, identity, incarnation, lease, prefer).await?;
            let (slot, until) = (own.slot, own.lease_until);
            let page = GatePage::open(self.page.clone()).unwrap();
            self.sim.spawn(KEEPER, async move { slot::keep(&io, &lun, &RefCell::new(own), &page).await });
            adopt_joined(&joining, slot, until).await
        })
    }

    fn keep<'a>(&'a self, kept: Kept<'a>) -> LocalFuture<'a, Option<FsError>> {
        Box::pin(watch_renewed_elsewhere(kept))
    }

    fn leave<'a>(
        &'a self,
        io: &'a CellIo,
        lun: &'a Rc<dyn Lun>,
        own: &'a mut OwnSlot,
        clean: bool,
    ) -> LocalFuture<'a, Result<(), FsError>> {
        Box::pin(slot::leave(io, lun, own, clean))
    }
}

/// Host 1, whose slots are kept elsewhere.
async fn mount_kept(sim: &Sim, disks: &[MemoryDisk]) -> Volume {
    let words: Box<[AtomicU64]> = (0..GATE_WORDS).map(|_| AtomicU64::new(0)).collect();
    let page: Arc<dyn GateMemory> = Arc::new(words);
    let gate = GatePage::create(page.clone()).unwrap();
    let keeper = Rc::new(Elsewhere { sim: sim.clone(), disks: disks.to_vec(), page });
    let luns = disks.iter().map(|disk| disk.connect(sim, HostNo(1)) as Rc<dyn Lun>).collect();
    let volume = Volume::mount_kept(luns, mount_options(1), sim.env(HostNo(1)), gate, keeper).await.unwrap();
    let background = volume.clone();
    sim.spawn(HostNo(1), async move { background.background().await });
    volume
}

fn own(volume: &Volume) -> SlotRef {
    volume.context().own_slot(FIRST).unwrap()
}

fn gate(volume: &Volume) -> GateState {
    let context = volume.context();
    let generation = context.member(FIRST).unwrap().slot.borrow().as_ref().unwrap().slot.generation;
    context.gate_reader().state(FIRST, generation, context.env().now())
}

async fn seconds(sim: &Sim, seconds: u64) {
    sim.sleep(Duration::from_secs(seconds)).await;
}

#[test]
fn a_mount_stands_still_while_its_keeper_does_and_goes_on_under_the_same_generation() {
    for seed in 0..4 {
        let (sim, disks) = world(seed, 1 + seed as usize % 2, CellSize::B512);
        sim.block_on(async {
            let volume = mount_kept(&sim, &disks).await;
            let slot = own(&volume);
            seconds(&sim, 60).await;
            assert_eq!(gate(&volume), GateState::Open);
            sim.pause(KEEPER);
            seconds(&sim, 16).await;
            assert_eq!(gate(&volume), GateState::Frozen);
            // Names need no lease: the mount looks at its slot itself.
            create(&volume, volume.root(), b"meanwhile").await.unwrap();
            sim.resume(KEEPER);
            seconds(&sim, 3).await;
            assert_eq!((gate(&volume), own(&volume)), (GateState::Open, slot));
            volume.unmount().await.unwrap();
            assert_eq!(fsck(&sim, &disks, false).await, Vec::new(), "seed {seed}");
        });
        sim.end();
    }
}

#[test]
fn a_mount_that_is_idle_finds_that_it_was_fenced_although_its_keeper_is_dead() {
    let (sim, disks) = world(7, 1, CellSize::B512);
    sim.block_on(async {
        let volume = mount_kept(&sim, &disks).await;
        let (other, _) = mount(&sim, &disks, 2).await;
        let file = create(&volume, volume.root(), b"disk").await.unwrap().object;
        let _held = volume.open(file, WRITE).await.unwrap();
        sim.kill(KEEPER);
        let mut rounds = 0;
        while volume.context().fenced().is_none() {
            // Somebody who waits for the lock has the slot watched. Nothing is asked of the mount.
            match other.open(file, WRITE).await {
                Ok(open) => other.close(open).await.unwrap(),
                Err(error) => assert_eq!(error.kind(), FsErrorKind::Busy, "{error}"),
            }
            rounds += 1;
            assert!(rounds < 60, "it never notices");
            seconds(&sim, 1).await;
        }
        assert_eq!(gate(&volume), GateState::Poisoned);
    });
    sim.end();
}

#[test]
fn a_storage_that_goes_back_to_a_state_since_the_join_is_noticed_by_the_mount_while_its_keeper_stands_still() {
    let (sim, disks) = world(8, 1, CellSize::B512);
    sim.block_on(async {
        let volume = mount_kept(&sim, &disks).await;
        seconds(&sim, 10).await;
        let then = disks[0].snapshot();
        // Renewals that the mount only sees.
        seconds(&sim, 20).await;
        sim.pause(KEEPER);
        disks[0].restore(&then);
        let refused = create(&volume, volume.root(), b"on old ground").await.unwrap_err();
        assert_eq!(refused.kind(), FsErrorKind::Stale, "{refused}");
        assert_eq!((volume.context().fenced(), gate(&volume)), (Some(FIRST), GateState::Poisoned));
    });
    sim.end();
}
