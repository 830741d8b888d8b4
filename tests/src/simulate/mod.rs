//! Owns: the simulator: hosts on simulated LUNs whose runs a seed decides, and the oracles that judge them.
//! Promises: the same seed gives the same run; a failing run tells what broke, how to see it again, and a smaller schedule.
//! Must not know: real files, processes, clocks.
//!
//! ```text
//! plan     what happens in a run           names     oracle: names have one history
//! run      hosts, what befalls them        content   oracle: bytes are what was acknowledged
//! work     operations of a worker          witness   oracle at the LUNs: who writes where, takes and claims what
//!                                          slots     its part of slots and leases
//! data     a thread's reads and writes     verify    oracle: everything read back, and the checker
//! volume   the first bytes                 shrink    smaller failing plans
//! scenario runs that go for what is rare   aimed     runs that go for one rule only
//! runner   many seeds on all cores         catalogue deliberate faults
//! ```
//!
//! # The atlas of faults: what the world can do (`engine::sim`) and where a plan does it
//! | fault | in a plan |
//! | --- | --- |
//! | latency and reordering of all commands in flight | `latency_us`; the order of what is ready is the seed's |
//! | a command outlives its sender | `Blow::Death`: what is on its way lands |
//! | compare-and-write without an answer: landed, not landed, lands later, repeated by the path and miscompared against itself | `rates`: `answer_lost`, `command_lost`, `late`, `repeated` |
//! | a late change whose sender dies before it can supersede it | `Moment::WhenLate` |
//! | refused, provably | `rates.not_done` |
//! | plain writes and reads of several cells torn in two | `rates.tear` |
//! | loss of what was not flushed, all hosts dead | `power_loss` |
//! | death of a host, and its next incarnation | `Blow::Death` |
//! | pause and resume, the clock runs on | `Blow::Pause` |
//! | clocks of any offset, at rates within the bound | `HostPlan::clock` |
//! | a LUN lost for one host, and back | `Blow::Cut` |
//! | a LUN lost for all, and back | `Blow::Loss` |
//! | a storage that answers nobody for a while | `Blow::Stall` |
//! | reservations: preempt-and-abort of the slot's paths (grade A), or time only (grade C) | `fenced_by_time` |
//! | plain writes that are later than any lease, where the storage keeps a broken host out | `late_writes_ms` |
//! | a breaker dies over a takeover | `Moment::AfterTakeovers` |
//! | no space | `nearly_full` |

mod aimed;
pub mod catalogue;
mod content;
mod data;
mod names;
pub mod plan;
pub mod run;
pub mod runner;
mod scenario;
pub mod shrink;
mod slots;
mod stamp;
mod tell;
mod verify;
mod volume;
mod witness;
mod work;
