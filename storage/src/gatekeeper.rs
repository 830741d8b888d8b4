//! Owns: whether a disk may be used right now, the requests that wait until it may, and telling the machine's supervisor.
//! Promises: a request that waits goes on when the same incarnation's lease is renewed, and fails when it is over; the
//! supervisor hears each freeze, its end and the loss once. Must not know: where data lies, vCPUs.

use std::cell::Cell;
use std::path::Path;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use scsi::StorageError;
use tokio::sync::Notify;
use vmfs_core::gate::GateState;

use crate::supervisor::Supervisor;

/// How often the gate is looked at when no request does it. Leases are counted in seconds.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What is guarded: a disk whose use rests on a lock that has to be vouched for again and again.
pub(crate) trait Guarded: 'static {
    /// How the supervisor hears of it.
    fn path(&self) -> &Path;
    /// Whether it may be used right now; with a LUN: whether requests on that one may be sent.
    fn gate(&self, lun: Option<usize>) -> GateState;
    /// Why it has to be closed, if it has to.
    fn withdrawn(&self) -> Option<String>;
}

/// The guard of one disk; see the module.
pub(crate) struct Gatekeeper<G: Guarded> {
    file: Arc<G>,
    supervisor: Arc<dyn Supervisor>,
    lost: Cell<bool>,
    /// The supervisor has been told to stand still.
    frozen: Cell<bool>,
    /// Requests that wait.
    held: Cell<usize>,
    changed: Notify,
}

impl<G: Guarded> Gatekeeper<G> {
    /// Guards `file`, and looks at its gate from time to time on the calling thread's executor.
    pub(crate) fn start(file: Arc<G>, supervisor: Arc<dyn Supervisor>) -> Rc<Self> {
        let (lost, frozen, held) = (Cell::new(false), Cell::new(false), Cell::new(0));
        let keeper = Rc::new(Self { file, supervisor, lost, frozen, held, changed: Notify::new() });
        tokio_uring::spawn(watch(Rc::downgrade(&keeper)));
        keeper
    }

    /// Whether a request on this LUN of the disk may be sent, or what a read brought may be used.
    pub(crate) fn state(&self, lun: usize) -> GateState {
        if self.lost.get() { GateState::Poisoned } else { self.file.gate(Some(lun)) }
    }

    /// Whether the lock is vouched for, whatever becomes of other LUNs.
    pub(crate) fn lock_state(&self) -> GateState {
        if self.lost.get() { GateState::Poisoned } else { self.file.gate(None) }
    }

    /// Waits until a request on `lun` (`None`: one that touches none) may be sent. Whoever calls it holds no reference.
    pub(crate) async fn pass(&self, lun: Option<usize>) -> Result<(), StorageError> {
        let mut held = None;
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            match lun.map_or_else(|| self.lock_state(), |lun| self.state(lun)) {
                GateState::Open => return Ok(()),
                GateState::Poisoned => {
                    if !self.is_withdrawn() {
                        self.lose("another host may have it now, since the lock could not be renewed in time");
                    }
                    return Err(StorageError::LockLost);
                }
                GateState::Frozen if self.supervisor.is_ending() => return Err(StorageError::Frozen),
                GateState::Frozen => {}
            }
            held.get_or_insert_with(|| Held::new(self));
            changed.await;
        }
    }

    /// The disk is gone for this guest, because of `cause`.
    pub(crate) fn lose(&self, cause: &str) {
        if !self.lost.replace(true) {
            self.supervisor.lost(self.file.path(), cause);
        }
        self.look();
        self.changed.notify_waiters();
    }

    /// If the disk has to be closed, it is lost from now on.
    pub(crate) fn is_withdrawn(&self) -> bool {
        match self.file.withdrawn() {
            Some(cause) => {
                self.lose(&cause);
                true
            }
            None => false,
        }
    }

    /// Tells the supervisor what has changed. Other LUNs of the volume are of interest only while a request waits for one.
    fn look(&self) {
        let frozen = !self.lost.get() && (self.held.get() > 0 || self.lock_state() == GateState::Frozen);
        match (self.frozen.replace(frozen), frozen) {
            (false, true) => self.supervisor.freeze(self.file.path()),
            (true, false) => self.supervisor.thaw(self.file.path()),
            _ => {}
        }
    }

    fn look_again(&self) {
        if self.lost.get() || self.is_withdrawn() {
            return;
        }
        match self.lock_state() {
            GateState::Poisoned => {
                self.lose("another host may have it now, since the lock could not be renewed in time")
            }
            GateState::Open | GateState::Frozen => self.look(),
        }
        self.changed.notify_waiters();
    }
}

impl<G: Guarded> Drop for Gatekeeper<G> {
    fn drop(&mut self) {
        if self.frozen.get() {
            self.supervisor.thaw(self.file.path());
        }
    }
}

/// A request that waits.
struct Held<'a, G: Guarded>(&'a Gatekeeper<G>);

impl<'a, G: Guarded> Held<'a, G> {
    fn new(keeper: &'a Gatekeeper<G>) -> Self {
        keeper.held.set(keeper.held.get() + 1);
        keeper.look();
        Self(keeper)
    }
}

impl<G: Guarded> Drop for Held<'_, G> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
        self.0.look();
    }
}

async fn watch<G: Guarded>(keeper: Weak<Gatekeeper<G>>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match keeper.upgrade() {
            Some(keeper) => keeper.look_again(),
            None => return,
        }
    }
}
