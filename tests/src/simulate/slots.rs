//! Owns: what may become of a slot: whose step it may be, and not before which moment.
//! Promises: a lease is counted from when its renewal landed, by its owner's own clock: nobody obeys a shorter one.
//! Must not know: where slots lie, who looks at them.

use engine::format::heartbeat::{FenceGrade, Heartbeat, SlotState};
use engine::sim::HostNo;

use super::plan::CLOCK_PPM;
use super::run::INCARNATIONS;

/// A slot as it was last seen.
#[derive(Clone, Debug)]
pub struct Slot {
    /// What it says.
    pub heartbeat: Heartbeat,
    /// Who lives there.
    pub owner: HostNo,
    /// Somebody else has said that it does not.
    pub claimed: bool,
    /// When the last renewal of its owner landed.
    pub renewed_at: u64,
    /// Since when its owner has not answered that it is to let go of another LUN, and of which one.
    pub asked: Option<(u8, u64)>,
}

impl Slot {
    /// The longest real time that a lease takes by its owner's clock, in nanoseconds.
    pub fn lease_ns(&self, clocks: &[i32]) -> u64 {
        let fast_ppm = (self.owner.0 / INCARNATIONS).checked_sub(1).and_then(|nth| clocks.get(nth as usize));
        let rate = 1_000_000 + i64::from(fast_ppm.copied().unwrap_or(-(CLOCK_PPM as i32)));
        (u128::from(self.heartbeat.lease.lease_ms) * 1_000_000 * 1_000_000 / rate as u128) as u64
    }

    /// What is left at most of a lease that was renewed when its slot last said so, in milliseconds; nothing: it is over.
    pub fn lease_left(&self, clocks: &[i32], now: u64) -> Option<u64> {
        let left = (self.renewed_at + self.lease_ns(clocks)).checked_sub(now)?;
        (left > 0).then_some(left / 1_000_000)
    }

    /// Why another host may not change a slot like this now: its owner may still be in its lease.
    pub fn too_early(&self, new: &Heartbeat, clocks: &[i32], now: u64) -> Option<String> {
        use SlotState::{Breaking, Dirty, Live};
        let left = self.lease_left(clocks, now);
        match (self.heartbeat.state, new.state) {
            (Live, Live) => Some("changes the slot of another one".to_owned()),
            (Live, _) => {
                let is_silent = self.asked.is_some_and(|(_, since)| now - since >= self.lease_ns(clocks));
                let ms = left.filter(|_| !is_silent)?;
                Some(format!(
                    "claims a slot whose owner may be in its lease for {ms} ms more and answers what it is asked"
                ))
            }
            (Breaking, Dirty) if new.fence_grade != FenceGrade::A => {
                let ms = left?;
                Some(format!(
                    "makes a slot dirty whose owner may be in its lease for {ms} ms more, and nothing else keeps it out"
                ))
            }
            _ => None,
        }
    }
}

/// Since when the owner of a slot has been asked for what it has not answered: by what the slot says from now on.
pub fn asked_since(before: &Slot, says: &Heartbeat, now: u64) -> Option<(u8, u64)> {
    let lun = (says.drop_lun != 0 && !says.drop_acknowledged).then_some(says.drop_lun)?;
    Some(before.asked.filter(|(of, _)| *of == lun).unwrap_or((lun, now)))
}

/// Whether two heartbeats differ in nothing but a request to drop a LUN.
pub fn says_the_same(old: &Heartbeat, new: &Heartbeat) -> bool {
    let request = (old.drop_lun, old.drop_acknowledged);
    let new = Heartbeat { drop_lun: request.0, drop_acknowledged: request.1, ..new.clone() };
    *old == new
}

/// Why a slot may not be changed like this.
pub fn illegal(old: &Slot, host: HostNo, new: &Heartbeat) -> Option<&'static str> {
    use SlotState::{Breaking, Dirty, Free, Live};
    let (was, same) = (old.heartbeat.state, new.generation == old.heartbeat.generation);
    if new.state == Live && !same {
        let next = new.generation.0 == old.heartbeat.generation.0 + 1;
        return (was != Free || !next).then_some("only a free slot is joined, with the next generation");
    }
    if !same {
        return Some("the generation changes without a join");
    }
    match (was, new.state) {
        (Live, Live | Free | Dirty) if old.owner == host => None,
        (Live, Live) => Some("a slot is its owner's"),
        (Live, Breaking) | (Breaking, Breaking | Dirty) | (Dirty, Dirty | Free) => None,
        (Live, Dirty) => Some("it was not claimed before"),
        _ => Some("there is no such step in the life of a slot"),
    }
}
