//! Owns: the initiator's side of a logical unit, as a trait: one command goes out, one answer comes back.
//! Promises: an answer is what the target said; an error says whether the command can have been carried out.
//! Must not know: transports, what commands mean, which of them may be repeated (who sends them decides that).

use std::time::Duration;

/// One path to a logical unit: a SCSI initiator port and a target port. Commands of several threads are in flight at once.
pub trait ScsiPath: Send + Sync {
    /// How messages name it (path or URL, without secrets).
    fn name(&self) -> &str;

    /// Runs one command and waits for its answer, at most `timeout`.
    ///
    /// Any status that the target gave is an answer, CHECK CONDITION too. No command is repeated here: after [`PathError::Unknown`]
    /// the caller decides.
    fn execute(&self, cdb: &[u8], data: PathData<'_>, timeout: Duration) -> Result<PathAnswer, PathError>;

    /// The largest data transfer of one command, in bytes.
    fn max_transfer(&self) -> usize;

    /// Whether every command of this path that ended as [`PathError::Unknown`] is proven dead by now: carried out or not, it will not be
    /// later. It asks the target where it takes that, and does not wait for commands that are still in flight. The default proves nothing.
    fn settled(&self) -> bool {
        false
    }

    /// Aborts what this path has in flight and proves that nothing more of it reaches the logical unit (iSCSI: task management, or a
    /// session that was ended and acknowledged; a kernel device: its last descriptor closed). False: not proven. A path that was ended may take no more commands.
    fn end(&self) -> bool;
}

/// The data of one command, by its direction as the initiator sees it.
#[derive(Debug)]
pub enum PathData<'a> {
    /// The command moves no data.
    None,
    /// The target sends at most so many bytes.
    In(&'a mut [u8]),
    /// The target takes these bytes.
    Out(&'a [u8]),
}

impl PathData<'_> {
    /// Bytes that the command may move.
    pub fn len(&self) -> usize {
        match self {
            PathData::None => 0,
            PathData::In(into) => into.len(),
            PathData::Out(from) => from.len(),
        }
    }

    /// Whether the command moves no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What the target answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathAnswer {
    /// SAM status, raw (SAM-5, 5.3.1).
    pub status: u8,
    /// Raw sense data (SPC-4, 4.5); empty when there is none.
    pub sense: Vec<u8>,
    /// Bytes that were moved: what was asked for less the residual.
    pub transferred: usize,
}

/// Why there is no answer; the text names the cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Certainly not carried out, now or later.
    #[error("{0}")]
    NotSent(String),
    /// It may have been carried out, or may still be (a timeout, a lost connection).
    #[error("{0}")]
    Unknown(String),
}
