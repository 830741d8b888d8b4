//! Owns: the error of a LUN command.
//! Promises: `NotDone` only where it is proven that the command was not and will not be carried out.
//! Must not know: what the command was for.

use std::io;

/// What an error proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LunErrorKind {
    /// Proven: nothing was done and nothing will be.
    NotDone,
    /// Proven not done: the storage has no space left.
    NoSpace,
    /// The storage refuses this host: it has been fenced.
    Fenced,
    /// The command may have been, or may yet be, carried out.
    Unknown,
    /// A range or alignment that the LUN does not have: a bug or a lying structure. Nothing was sent.
    OutOfRange,
}

/// Error of a LUN command: which LUN, which command, why.
#[derive(Debug, thiserror::Error)]
#[error("{lun}: {command} of {length} bytes at {offset}: {cause}")]
pub struct LunError {
    /// What the error proves.
    pub kind: LunErrorKind,
    /// The LUN's name.
    pub lun: String,
    /// The command: "read", "write", "compare-and-write", ...
    pub command: &'static str,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Why.
    pub cause: io::Error,
}

impl Clone for LunError {
    fn clone(&self) -> Self {
        let cause = match self.cause.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(self.cause.kind(), self.cause.to_string()),
        };
        LunError {
            kind: self.kind,
            lun: self.lun.clone(),
            command: self.command,
            offset: self.offset,
            length: self.length,
            cause,
        }
    }
}
