//! Owns: simulated hosts, clocks and shared storage: one seed decides everything that happens.
//! Promises: the same seed gives the same run; every fault below can happen and no other.
//! Must not know: the file system. It is a world to run it in.
//!
//! # The world
//! A [`Sim`] runs the futures of any number of hosts on one thread. Whenever several could go on, the seed chooses. Virtual time
//! moves only when nobody can go on, to the next timer. A [`MemoryDisk`] is the storage; a [`MemoryLun`] is one host's path to
//! it. A command takes effect at one instant between being sent and being answered, and in any order with others in flight; once
//! sent it lives on without its host.
//!
//! # Faults of the storage and the paths
//! | fault | what happens | how |
//! | --- | --- | --- |
//! | answer lost | the command is carried out, the sender gets `Unknown` | [`Fault::AnswerLost`] |
//! | command lost | nothing is carried out, the sender gets `Unknown` | [`Fault::CommandLost`] |
//! | late | the sender gets `Unknown` at once; the command is carried out later, also after its host's death | [`Fault::Late`] |
//! | repeated | the path sends the command a second time by itself; a compare-and-write then miscompares against itself | [`Fault::Repeated`] |
//! | not done | the storage refuses the command, provably | [`Fault::NotDone`] |
//! | latency | each command takes a random time | [`MemoryLun::set_latency`] |
//! | tear | a write or read of several cells is carried out in two parts with time in between | [`FaultRates::tear`] |
//! | cut | a host's path is dead: `Unknown`, nothing carried out | [`MemoryDisk::set_path`] |
//! | used up | a host's commands land in their order up to the n-th, and nothing of it after that | [`MemoryDisk::set_allowance`] |
//! | lost, and back | the LUN is gone for all hosts: `Unknown`, nothing carried out | [`MemoryDisk::set_lost`] |
//! | fenced | the storage refuses a host: `Fenced` | [`MemoryDisk::set_path`] |
//! | reservation | paths are registered for a slot; a breaker's preempt-and-abort refuses their plain writes from then on (grade A), finds that some may still be on their way, or can do nothing (grade C) | [`MemoryDisk::set_fencing`] |
//! | full | a block table without free entries | the plan of a run |
//! | stall | commands of all hosts wait | [`MemoryDisk::set_stalled`] |
//! | power loss | each cell written by plain data writes since the last flush keeps its new or gets its old content | [`MemoryDisk::lose_power`] |
//! | rollback | the storage goes back to an earlier state | [`MemoryDisk::snapshot`], [`MemoryDisk::restore`] |
//! | damage | bytes change by themselves | [`MemoryDisk::damage`] |
//!
//! # Faults of hosts
//! Death ([`Sim::kill`]): its futures are dropped where they stand. Pause ([`Sim::pause`]): its futures do not run, its clock does.
//! A clock that starts anywhere and runs fast or slow ([`HostClock`]).
//!
//! # What cannot happen
//! A cell that is torn within itself, a compare-and-write that is not atomic, a flush that lies.

mod allowance;
mod disk;
mod executor;
mod fault;
mod format;
mod lun;
mod rng;
mod store;
mod watch;

pub use allowance::Allowance;
pub use disk::{MemoryDisk, PathState, Snapshot};
pub use executor::{HostClock, HostNo, STORAGE, Sim, SimEnv, TaskHandle};
pub use fault::{Command, Fault, FaultRates, Record};
pub use format::format_disks;
pub use lun::MemoryLun;
pub use rng::Rng;
pub use watch::{Seen, Watcher};
