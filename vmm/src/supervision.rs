//! Owns what a machine does when its host may not use one of its disks: stand still for a while, or end.
//! Promises that vCPUs stand still as long as any disk is frozen, over resets too, and that the first loss ends the machine.
//! Must not know locks, leases, or how disks are stored.

use crate::control::{Control, Outcome};
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use storage::Supervisor;

/// The link from a machine's disks to its vCPUs.
#[derive(Default)]
pub struct Supervision(Mutex<State>);

#[derive(Default)]
struct State {
    control: Option<Arc<Control>>,
    /// Disks that are frozen.
    frozen: usize,
    lost: Option<String>,
}

impl Supervision {
    /// From now on it is `control`'s vCPUs that stand still or end.
    pub fn govern(&self, control: &Arc<Control>) {
        let mut state = self.0.lock();
        if state.frozen > 0 {
            control.hold();
        }
        if let Some(cause) = &state.lost {
            control.finish(Outcome::Failed(cause.clone()));
        }
        state.control = Some(Arc::clone(control));
    }

    /// Does a disk keep the vCPUs from running?
    pub fn is_frozen(&self) -> bool {
        self.0.lock().frozen > 0
    }
}

impl Supervisor for Supervision {
    fn freeze(&self, disk: &Path) {
        tracing::warn!(disk = %disk.display(), "the lock of the disk cannot be renewed at the moment: the machine stands still");
        let mut state = self.0.lock();
        state.frozen += 1;
        if let (1, Some(control)) = (state.frozen, &state.control) {
            control.hold();
        }
    }

    fn thaw(&self, disk: &Path) {
        tracing::warn!(disk = %disk.display(), "the disk does not keep the machine from running any more");
        let mut state = self.0.lock();
        state.frozen = state.frozen.saturating_sub(1);
        if let (0, Some(control)) = (state.frozen, &state.control) {
            control.release();
        }
    }

    fn lost(&self, disk: &Path, cause: &str) {
        let next = "See vmfs why-locked, then start the machine where the disk can be had";
        let cause = format!("this host lost the disk {}: {cause}. {next}", disk.display());
        tracing::info!("{cause}");
        let mut state = self.0.lock();
        if let Some(control) = &state.control {
            control.finish(Outcome::Failed(cause.clone()));
        }
        state.lost.get_or_insert(cause);
    }

    fn is_ending(&self) -> bool {
        self.0.lock().control.as_ref().is_some_and(|control| control.has_ended())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    const DISK: &str = "/mnt/disk.vmdk";

    /// A thread that enters as a vCPU does, and says so each time.
    fn vcpu(control: &Arc<Control>) -> Receiver<()> {
        let control = Arc::clone(control);
        let (entered, has_entered) = channel();
        std::thread::spawn(move || {
            while control.enter(|| {}) {
                control.leave();
                if entered.send(()).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        has_entered
    }

    fn runs(vcpu: &Receiver<()>) -> bool {
        vcpu.recv_timeout(Duration::from_secs(120)).is_ok()
    }

    /// No sign of life for a while. One may still be on its way, however long a busy machine takes to deliver it.
    fn stands_still(vcpu: &Receiver<()>) -> bool {
        const WHILE: Duration = Duration::from_millis(50);
        while vcpu.try_recv().is_ok() {}
        vcpu.recv_timeout(WHILE).is_err() || vcpu.recv_timeout(WHILE).is_err()
    }

    #[test]
    fn vcpus_stand_still_until_the_last_disk_thaws() {
        let (supervision, control) = (Supervision::default(), Control::new(1));
        supervision.govern(&control);
        control.resume();
        let vcpu = vcpu(&control);
        assert!(runs(&vcpu));
        supervision.freeze(Path::new(DISK));
        supervision.freeze(Path::new("/mnt/other.vmdk"));
        supervision.thaw(Path::new(DISK));
        assert!(supervision.is_frozen() && stands_still(&vcpu));
        supervision.thaw(Path::new("/mnt/other.vmdk"));
        assert!(runs(&vcpu));
        control.finish(Outcome::Stopped);
    }

    #[test]
    fn a_paused_machine_stays_paused_when_its_disks_thaw_and_a_frozen_one_when_it_is_resumed() {
        let (supervision, control) = (Supervision::default(), Control::new(1));
        supervision.freeze(Path::new(DISK));
        supervision.govern(&control);
        control.resume();
        let vcpu = vcpu(&control);
        assert!(stands_still(&vcpu));
        control.pause();
        supervision.thaw(Path::new(DISK));
        assert!(stands_still(&vcpu));
        control.resume();
        assert!(runs(&vcpu));
        control.finish(Outcome::Stopped);
    }

    #[test]
    fn a_lost_disk_ends_the_machine_even_while_it_stands_still_and_after_a_reset() {
        let (supervision, control) = (Supervision::default(), Control::new(0));
        supervision.govern(&control);
        supervision.freeze(Path::new(DISK));
        assert!(!supervision.is_ending());
        supervision.lost(Path::new(DISK), "another host took it");
        assert!(supervision.is_ending());
        let Outcome::Failed(cause) = control.wait() else { panic!("not failed") };
        assert!(cause.contains(DISK) && cause.contains("another host took it"), "{cause}");
        let next = Control::new(0);
        supervision.govern(&next);
        assert_eq!(next.wait(), Outcome::Failed(cause));
    }
}
