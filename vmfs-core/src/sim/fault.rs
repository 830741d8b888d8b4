//! Owns: the faults that can be asked for or left to the seed, and the record of commands.
//! Promises: a scripted fault hits exactly the next compare-and-write of its path.
//! Must not know: how a fault is carried out.

use std::time::Duration;

use super::executor::HostNo;
use crate::lun::LunErrorKind;

/// What goes wrong with one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Carried out; the sender gets `Unknown`.
    AnswerLost,
    /// Not carried out; the sender gets `Unknown`.
    CommandLost,
    /// The sender gets `Unknown` at once; carried out after this time.
    Late(Duration),
    /// Carried out twice; the answer is that of the second time.
    Repeated,
    /// Not carried out; the sender gets this kind.
    NotDone(LunErrorKind),
}

/// How often each fault hits a command of a path, in 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// [`Fault::AnswerLost`].
    pub answer_lost: u16,
    /// [`Fault::CommandLost`].
    pub command_lost: u16,
    /// [`Fault::Late`], by up to 5 s; one in four compare-and-writes by up to 25 s.
    pub late: u16,
    /// [`Fault::Repeated`].
    pub repeated: u16,
    /// [`Fault::NotDone`] with kind `NotDone`.
    pub not_done: u16,
    /// Reads and writes of several cells that are carried out in two parts.
    pub tear: u16,
}

impl FaultRates {
    /// Every fault in 2 of 100 commands.
    pub const MANY: FaultRates =
        FaultRates { answer_lost: 20, command_lost: 20, late: 20, repeated: 20, not_done: 20, tear: 20 };
}

/// What a command was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Read of metadata.
    Read,
    /// Durable write of metadata.
    Write,
    /// Flush by the actor.
    Flush,
    /// Compare-and-write; whether it wrote.
    CompareAndWrite {
        /// Whether the bytes were equal.
        wrote: bool,
    },
    /// Range given back.
    Unmap,
    /// Range zeroed.
    WriteZeroes,
    /// Read on the data path.
    DataRead,
    /// Write on the data path.
    DataWrite,
    /// Flush on the data path.
    DataFlush,
}

/// One command that took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Virtual nanoseconds when it took effect; 0 on the data path, which has no clock.
    pub at: u64,
    /// Whose.
    pub host: HostNo,
    /// What.
    pub command: Command,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}
