//! Owns the search for the processes of this host that have a file open, or hold a lock on it.
//! Promises bounded work, and names only processes that have that very file open.
//! Must not know why anybody asks.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Process id.
    pub process: u32,
    /// The name of its program.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "process {} ({})", self.process, self.name)
    }
}

/// The processes that hold a lock on the file at `path`, as far as this process may look (its own user's, or all for
/// the administrator): those with an open file of the same inode whose `fdinfo` tells a lock (proc(5)).
pub fn of(path: &Path) -> Vec<Holder> {
    search(path, has_lock)
}

/// As [`of`], with a lock or without.
pub fn openers_of(path: &Path) -> Vec<Holder> {
    search(path, |_| true)
}

/// `counts` judges what `fdinfo` says of an open file.
fn search(path: &Path, counts: impl Fn(&str) -> bool) -> Vec<Holder> {
    let Ok(wanted) = fs::metadata(path) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut holders = Vec::new();
    for entry in processes.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        let holds = descriptors.flatten().any(|descriptor| {
            let information = fs::read_to_string(entry.path().join("fdinfo").join(descriptor.file_name()));
            // Only files of the same number are looked at: to ask for one on a file system that hangs would hang too.
            information.is_ok_and(|text| may_be(&text, wanted.ino()) && counts(&text))
                && fs::metadata(descriptor.path())
                    .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
        });
        if holds {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            holders.push(Holder { process, name: name.trim_end().to_string() });
        }
    }
    holders
}

/// May it be the file of this inode number? Kernels before 5.14 do not tell.
fn may_be(information: &str, inode: u64) -> bool {
    let told = information.lines().find_map(|line| line.strip_prefix("ino:"));
    told.is_none_or(|number| number.trim().parse() == Ok(inode))
}

fn has_lock(information: &str) -> bool {
    information.lines().any(|line| line.starts_with("lock:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_holds_a_lock_is_named() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        assert_eq!(of(file.path()), [], "open, but not locked");
        assert_eq!(openers_of(file.path())[0].process, std::process::id());
        file.as_file().lock().expect("locked");
        let holders = of(file.path());
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].process, std::process::id());
        assert_eq!(of(Path::new("/nonexistent")), []);
    }
}
