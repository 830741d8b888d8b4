//! Owns the life of a machine's vCPUs: run, pause, stop, and why the machine ended.
//! Promises that after `pause` returns no vCPU is in the guest, and that the first reason to end wins.
//! Must not know KVM's exits or any device.

use crate::kvm::Kick;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The guest wrote this status to the exit port.
    Exited(u8),
    /// The guest asked for a reset.
    Reset,
    /// Somebody outside asked the machine to stop.
    Stopped,
    /// The machine cannot go on; the text says where the guest was.
    Failed(String),
}

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct State {
    wanted: Wanted,
    /// No vCPU enters the guest whatever is wanted, except to end.
    held: bool,
    /// vCPU threads that exist and are not parked: only these may be in the guest.
    in_guest: usize,
    outcome: Option<Outcome>,
}

/// The shared control of one machine's vCPU threads.
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
    kicks: Vec<Kick>,
}

impl Control {
    /// A control for `vcpus` vCPUs, paused.
    pub fn new(vcpus: usize) -> Arc<Control> {
        let state = State { wanted: Wanted::Pause, held: false, in_guest: 0, outcome: None };
        let kicks = (0..vcpus).map(|_| Kick::default()).collect();
        Arc::new(Control { state: Mutex::new(state), changed: Condvar::new(), kicks })
    }

    /// The handle by which vCPU `index` is kicked out of the guest.
    pub(crate) fn kick_of(&self, index: usize) -> &Kick {
        &self.kicks[index]
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.change(Wanted::Run);
    }

    /// Makes all vCPUs leave the guest and waits until they have. Must not be called by a vCPU's own thread.
    pub fn pause(&self) {
        self.change(Wanted::Pause);
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.in_guest > 0);
    }

    /// Makes all vCPUs leave the guest and keeps them out until [`Self::release`], paused or not. Returns at once; safe on
    /// any thread.
    pub fn hold(&self) {
        let mut state = self.state.lock();
        state.held = true;
        self.kicks.iter().for_each(Kick::kick);
    }

    /// Ends [`Self::hold`].
    pub fn release(&self) {
        self.state.lock().held = false;
        self.changed.notify_all();
    }

    /// Has the machine been told to end?
    pub fn has_ended(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    /// Ends the machine for `outcome`, unless it has ended already. Returns at once; safe on any thread.
    pub fn finish(&self, outcome: Outcome) {
        self.state.lock().outcome.get_or_insert(outcome);
        self.change(Wanted::Stop);
    }

    /// Waits until the machine has ended and says why.
    pub fn wait(&self) -> Outcome {
        let mut state = self.state.lock();
        loop {
            match (&state.outcome, state.in_guest) {
                (Some(outcome), 0) => return outcome.clone(),
                _ => self.changed.wait(&mut state),
            }
        }
    }

    fn change(&self, wanted: Wanted) {
        let mut state = self.state.lock();
        if state.wanted != Wanted::Stop {
            state.wanted = wanted;
        }
        if state.wanted != Wanted::Run {
            self.kicks.iter().for_each(Kick::kick);
        }
        self.changed.notify_all();
    }

    /// Called by a vCPU's thread before it enters the guest: waits while paused. False means: end. `admit` undoes an
    /// earlier kick; it runs under the same lock as the next kick, so that none is lost.
    pub(crate) fn enter(&self, admit: impl FnOnce()) -> bool {
        let mut state = self.state.lock();
        let out = |state: &mut State| state.wanted == Wanted::Pause || state.held && state.wanted == Wanted::Run;
        self.changed.wait_while(&mut state, out);
        if state.wanted == Wanted::Stop {
            return false;
        }
        admit();
        state.in_guest += 1;
        true
    }

    /// Called by a vCPU's thread that has left the guest after a kick, or for good.
    pub(crate) fn leave(&self) {
        self.state.lock().in_guest -= 1;
        self.changed.notify_all();
    }
}
