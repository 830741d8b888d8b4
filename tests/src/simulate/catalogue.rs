//! Owns: the sabotage catalogue: within how many seeds each deliberate fault is noticed.
//! Promises: a fault that is not noticed within its seeds is a miss, and a miss is a failure of the oracles.
//! Must not know: what a fault does.

pub use engine::sabotage::Sabotage;

use super::runner::{Outcome, run_seeds};

/// Seeds within which a fault has to be noticed, counted from the first one on.
pub const fn seeds(sabotage: Sabotage) -> u64 {
    let _ = sabotage;
    2000
}

/// Runs seeds with a fault until one fails or its seeds are used up.
pub fn try_out(sabotage: Sabotage, first_seed: u64) -> Outcome {
    run_seeds(first_seed, seeds(sabotage), Some(sabotage), true)
}
