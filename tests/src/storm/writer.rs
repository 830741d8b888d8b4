//! Owns: a writer: it opens files of a mount, looks what is in them, writes records, makes them durable, and notes all of it.
//! Promises: it stops using a file at the first error; it ends when the mount is gone.
//! Must not know: other writers, the judge.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::notes::{Note, Notes, Value};
use crate::random::Random;

/// Records of a file.
pub const RECORDS: u64 = 24;
/// Bytes of a record: written whole, so that a cut-off write leaves the old or the new one.
const RECORD: usize = 4096;
/// From one record to the next: more than a granule, so that first writes take space again and again.
const STRIDE: u64 = 192 << 10;
/// Bytes that a file needs.
pub const FILE_BYTES: u64 = RECORDS * STRIDE;
/// Files that all writers share.
pub const FILES: u64 = 3;
/// The disk that all writers share.
pub const DISK: &str = "shared-flat.vmdk";
const MAGIC: u64 = u64::from_le_bytes(*b"vmfstorm");

/// All files that writers share.
pub fn targets() -> Vec<String> {
    (0..FILES).map(|n| format!("f{n}")).chain([DISK.to_owned()]).collect()
}

fn record(session: u64, number: u64, place: u64) -> Vec<u8> {
    let mut random = Random::new(session ^ number << 20 ^ place << 52);
    let head = [MAGIC, session, number, place];
    let words = head.into_iter().chain(std::iter::repeat_with(move || random.bits()));
    words.take(RECORD / 8).flat_map(u64::to_le_bytes).collect()
}

fn value_of(bytes: &[u8], place: u64) -> Result<Value, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let word = |n: usize| u64::from_le_bytes(bytes[n * 8..][..8].try_into().expect("eight bytes"));
    let (session, number) = (word(1), word(2));
    if bytes == record(session, number, place) {
        return Ok(Some((session, number)));
    }
    Err(format!("foreign bytes, beginning with {:016x} {session:016x} {number} at {}", word(0), word(3)))
}

/// What a record of an open file holds.
pub fn look(file: &File, place: u64) -> io::Result<Result<Value, String>> {
    let mut bytes = vec![0; RECORD];
    let mut done = 0;
    while done < RECORD {
        match file.read_at(&mut bytes[done..], place * STRIDE + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(value_of(&bytes, place))
}

/// A writer on one mount.
pub struct Writer {
    /// The mount, by a descriptor of its root: where the mount was is nobody's folder.
    mount: PathBuf,
    _root: File,
    notes: Notes,
    random: Random,
    name: String,
    published: u64,
}

fn now() -> u64 {
    lockd::clock::now().0
}

/// Errors after which the mount is of no use any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ENOENT))
}

impl Writer {
    /// A writer of the host `name`; `run` tells its lives apart.
    pub fn new(mount: &Path, notes: &Path, name: &str, seed: u64, run: u64) -> io::Result<Writer> {
        let random = Random::new(seed ^ run << 32);
        let notes = Notes::append(notes)?;
        let root = File::open(mount)?;
        if root.metadata()?.dev() == fs::metadata(mount.join(".."))?.dev() {
            return Err(io::Error::other(format!("{}: nothing is mounted there", mount.display())));
        }
        let mount = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
        Ok(Writer { mount, _root: root, notes, random, name: name.to_owned(), published: run << 32 })
    }

    /// Works until the mount is gone.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let worked = match self.random.below(4) {
                0 => self.publish(),
                _ => self.session(),
            };
            match worked {
                Err(error) if is_gone(&error) => return Ok(()),
                _ => thread::sleep(Duration::from_millis(self.random.below(150))),
            }
        }
    }

    fn session(&mut self) -> io::Result<()> {
        let targets = targets();
        let target = targets[self.random.below(targets.len() as u64) as usize].clone();
        let file = match File::options().read(true).write(true).open(self.mount.join(&target)) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
            other => other?,
        };
        let session = self.random.bits();
        self.notes.note(&Note::Opened { session, target, at: now() })?;
        let worked = self.work(file, session);
        let end = worked.as_ref().map_or_else(ToString::to_string, |()| "closed".to_owned());
        self.notes.note(&Note::Ended(end))?;
        worked
    }

    fn work(&mut self, file: File, session: u64) -> io::Result<()> {
        for place in 0..RECORDS {
            self.look(&file, place)?;
        }
        for number in 1..=1 + self.random.below(60) {
            let place = self.random.below(RECORDS);
            self.notes.note(&Note::Write { record: place, number })?;
            let at = now();
            file.write_all_at(&record(session, number, place), place * STRIDE)?;
            self.notes.note(&Note::Wrote { number, at })?;
            match self.random.below(8) {
                0 | 1 => {
                    let at = now();
                    file.sync_all()?;
                    self.notes.note(&Note::Synced { at })?;
                }
                2 | 3 => self.look(&file, place)?,
                4 => thread::sleep(Duration::from_millis(self.random.below(80))),
                _ => {}
            }
        }
        let at = now();
        // SAFETY: the descriptor was owned by `file` alone, which has given it up.
        if unsafe { libc::close(file.into_raw_fd()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.notes.note(&Note::Synced { at })
    }

    fn look(&mut self, file: &File, record: u64) -> io::Result<()> {
        let at = now();
        let value = look(file, record)?;
        self.notes.note(&Note::Found { record, value, at })
    }

    /// As editors save: a new file, made durable, takes the name of the old one.
    fn publish(&mut self) -> io::Result<()> {
        let number = self.published + 1;
        self.published = number;
        let new = self.mount.join(format!("{}.{number}", self.name));
        fs::write(&new, number.to_string())?;
        self.notes.note(&Note::Publish(number))?;
        match fs::rename(&new, self.mount.join(published(&self.name))) {
            Ok(()) => self.notes.note(&Note::Published(number)),
            // The file that it replaces may be held by a host that died.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.notes.note(&Note::Withheld(number))?;
                fs::remove_file(&new)
            }
            Err(error) => Err(error),
        }
    }
}

/// The name under which the writer of a host publishes.
pub fn published(name: &str) -> String {
    format!("published-{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_known_in_its_place_only_and_whole_only() {
        let bytes = record(7, 3, 5);
        assert_eq!(value_of(&bytes, 5), Ok(Some((7, 3))));
        assert!(value_of(&bytes, 6).is_err());
        assert_eq!(value_of(&vec![0; RECORD], 5), Ok(None));
        let mut torn = bytes;
        torn[4000] ^= 1;
        assert!(value_of(&torn, 5).is_err());
    }
}
