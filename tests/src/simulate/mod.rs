//! Owns: the simulator: hosts on simulated LUNs whose runs a seed decides, and the oracles that judge them.
//! Promises: the same seed gives the same run; a failing run tells what broke, how to see it again, and a smaller schedule.
//! Must not know: real files, processes, clocks.
//!
//! ```text
//! plan     what happens in a run           names     oracle: names have one history
//! run      hosts, what befalls them        content   oracle: bytes are what was acknowledged
//! work     operations of a worker          witness   oracle at the LUNs: who writes where, takes and claims what
//! data     a thread's reads and writes     verify    oracle: everything read back, and the checker
//! volume   the first bytes                 shrink    smaller failing plans
//! runner   many seeds on all cores         catalogue deliberate faults
//! ```

pub mod catalogue;
mod content;
mod data;
mod names;
pub mod plan;
pub mod run;
pub mod runner;
pub mod shrink;
mod stamp;
mod verify;
mod volume;
mod witness;
mod work;
