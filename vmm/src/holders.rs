//! Owns the search for the processes of this host that hold a lock on a file.
//! Promises bounded work, and names only processes that have the file open with a lock on it.
//! Must not know why anybody asks.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A process that holds a lock.
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
    let Ok(wanted) = fs::metadata(path) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut holders = Vec::new();
    for entry in processes.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        let holds = descriptors.flatten().any(|descriptor| {
            let same = fs::metadata(descriptor.path())
                .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()));
            same && has_lock(&entry.path().join("fdinfo").join(descriptor.file_name()))
        });
        if holds {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            holders.push(Holder { process, name: name.trim_end().to_string() });
        }
    }
    holders
}

fn has_lock(information: &Path) -> bool {
    fs::read_to_string(information).is_ok_and(|text| text.lines().any(|line| line.starts_with("lock:")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_holds_a_lock_is_named() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        assert_eq!(of(file.path()), [], "open, but not locked");
        file.as_file().lock().expect("locked");
        let holders = of(file.path());
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].process, std::process::id());
        assert_eq!(of(Path::new("/nonexistent")), []);
    }
}
