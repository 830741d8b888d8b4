//! Owns: what a writer notes of its work, in a file outside the volume.
//! Promises: a call is noted before it is made, its answer after it; what was noted survives SIGKILL of the writer.
//! Must not know: what follows from it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A record's content: which session of which writer wrote it, and as its how many-th write. `None`: zeros.
pub type Value = Option<(u64, u64)>;

/// One line of the notes. Times are CLOCK_BOOTTIME in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Note {
    /// open(2) has succeeded: a session begins.
    Opened {
        /// Unique number of the session.
        session: u64,
        /// The file.
        target: String,
        /// After the answer.
        at: u64,
    },
    /// A record was read.
    Found {
        /// Its number.
        record: u64,
        /// What it holds; an error text: bytes that no writer makes.
        value: Result<Value, String>,
        /// Before the call.
        at: u64,
    },
    /// A record is going to be written.
    Write {
        /// Its number.
        record: u64,
        /// The how many-th write of the session.
        number: u64,
    },
    /// That write has succeeded.
    Wrote {
        /// As in [`Note::Write`].
        number: u64,
        /// Before the call.
        at: u64,
    },
    /// fsync(2) or close(2) has succeeded: all writes before are durable.
    Synced {
        /// Before the call.
        at: u64,
    },
    /// The session is over, for this reason.
    Ended(String),
    /// A file with this number is going to take the name of the one before.
    Publish(u64),
    /// It has.
    Published(u64),
    /// It was refused, so that nothing has happened.
    Withheld(u64),
}

/// Notes that are being written.
pub struct Notes(File);

impl Notes {
    /// Appends to `path`.
    pub fn append(path: &Path) -> io::Result<Notes> {
        Ok(Notes(File::options().create(true).append(true).open(path)?))
    }

    /// Notes one thing, with one write(2): whole or not at all.
    pub fn note(&mut self, note: &Note) -> io::Result<()> {
        let mut line = serde_json::to_string(note)?;
        line.push('\n');
        self.0.write_all(line.as_bytes())
    }
}

/// All notes of a file.
///
/// # Panics
/// When a line is not a note.
pub fn read(path: &Path) -> Vec<Note> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
    text.lines().map(parse).collect()
}
