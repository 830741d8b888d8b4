//! Owns: what a mount does by itself, where it was told to: `-o format-blank` adds blank LUNs that appear where it watches, `-o grow` takes
//! the space that its LUNs gain into the volume.
//! Promises: only what `-o watch` names is formatted, and only if it is all zeros wherever a volume, a partition table or a file system
//! would show, in two looks; what was refused is left alone until it changes. Must not know: how a LUN becomes a member.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmfs_core::error::FsErrorKind;
use vmfs_core::lun::OpenLun;

use crate::finder::{expand, identity};
use crate::state::State;

/// Between two rounds.
const PAUSE: Duration = Duration::from_secs(2);
/// Bytes at the start and at the end of a LUN that must be zeros: more than the fixed area of a volume, and any other's signatures.
const HEAD: u64 = 8 << 20;
const TAIL: u64 = 2 << 20;

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Where to look: paths, directories, patterns.
    pub watched: Vec<PathBuf>,
    /// Format and add blank LUNs.
    pub format_blank: bool,
    /// Grow with the LUNs.
    pub grow: bool,
}

/// The thread that follows a policy, until it is dropped.
pub struct Follower {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Starts it; `None`: there is nothing to do.
    pub fn start(policy: Policy, state: &Arc<State>) -> std::io::Result<Option<Follower>> {
        if !policy.format_blank && !policy.grow {
            return Ok(None);
        }
        let ended = Arc::new(AtomicBool::new(false));
        let (state, end) = (state.clone(), ended.clone());
        let thread = std::thread::Builder::new().name("vmfs-policy".to_owned()).spawn(move || {
            let mut seen = BTreeMap::new();
            while !end.load(Ordering::Acquire) {
                if policy.format_blank {
                    add_blank(&state, &policy.watched, &mut seen);
                }
                if policy.grow {
                    grow(&state);
                }
                std::thread::park_timeout(PAUSE);
            }
        })?;
        Ok(Some(Follower { ended, thread: Some(thread) }))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the thread that watches for LUNs panicked");
            }
        }
    }
}

/// What was seen of a candidate: whatever changes it changes one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    bytes: u64,
    modified: (i64, i64),
    done: bool,
}

fn add_blank(state: &Arc<State>, watched: &[PathBuf], seen: &mut BTreeMap<PathBuf, Look>) {
    let Ok(luns) = state.actor.ask(|volume| async move { Ok(volume.luns()) }) else { return };
    let own: Vec<_> =
        luns.iter().filter_map(|lun| Path::new(&lun.name).metadata().ok()).map(|found| identity(&found)).collect();
    let mut paths = Vec::new();
    watched.iter().for_each(|place| expand(place, &mut paths));
    for path in paths {
        let Ok(found) = path.metadata() else { continue };
        let kind = found.file_type();
        if own.contains(&identity(&found)) || !(kind.is_file() || kind.is_block_device()) {
            continue;
        }
        let look = Look { bytes: found.len(), modified: (found.mtime(), found.mtime_nsec()), done: false };
        match seen.get(&path) {
            // The second look at the same: what is being written by somebody has changed by then.
            Some(before) if (before.bytes, before.modified) == (look.bytes, look.modified) => {
                if before.done {
                    continue;
                }
                seen.insert(path.clone(), Look { done: true, ..look });
                match is_blank(&path) {
                    Ok(true) => add(state, &path),
                    Ok(false) => tracing::info!("{}: it holds something, so it is not added by itself", path.display()),
                    Err(error) => tracing::warn!("{}: {error}", path.display()),
                }
            }
            _ => drop(seen.insert(path, look)),
        }
    }
}

/// Whether a LUN is all zeros at its start and its end.
fn is_blank(path: &Path) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    for (from, length) in [(0, HEAD.min(bytes)), (bytes.saturating_sub(TAIL), TAIL.min(bytes))] {
        file.seek(SeekFrom::Start(from))?;
        let mut left = length;
        let mut piece = vec![0; 64 << 10];
        while left > 0 {
            let some = (piece.len() as u64).min(left) as usize;
            file.read_exact(&mut piece[..some])?;
            if piece[..some].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            left -= some as u64;
        }
    }
    Ok(true)
}

fn add(state: &Arc<State>, path: &Path) {
    let name = path.to_string_lossy().into_owned();
    let added = state.actor.ask(move |volume| async move {
        let lun = luns::open_lun_aside(&name, OpenLun { read_only: false, refuse_busy_device: true }).await?;
        volume.add_extent(lun, false, &mut |_| ()).await
    });
    match added {
        Ok(index) => tracing::info!("{}: it was blank and is {index} of the volume now", path.display()),
        Err(error) => tracing::warn!("a blank LUN was not added: {error}"),
    }
}

fn grow(state: &Arc<State>) {
    let Ok(luns) = state.actor.ask(|volume| async move { Ok(volume.luns()) }) else { return };
    for lun in luns {
        match state.actor.ask(move |volume| async move { volume.grow_extent(lun.index, &mut |_| ()).await }) {
            Ok(grown) => tracing::info!("{}: {} bytes became {}", lun.name, grown.from_bytes, grown.to_bytes),
            // It has not become larger, or has grown as often as it can.
            Err(error) if matches!(error.kind(), FsErrorKind::Invalid | FsErrorKind::NoSpace) => {}
            Err(error) => tracing::debug!("{}: {error}", lun.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zeros_at_both_ends_are_blank() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lun.img");
        let with = |at: Option<u64>| {
            use std::os::unix::fs::FileExt;
            let file = File::create(&path).unwrap();
            file.set_len(64 << 20).unwrap();
            if let Some(at) = at {
                file.write_all_at(&[1], at).unwrap();
            }
            is_blank(&path).unwrap()
        };
        assert!(with(None));
        for at in [0, 511, (1 << 20) + 3, (8 << 20) - 1, (64 << 20) - 1, 62 << 20] {
            assert!(!with(Some(at)), "{at}");
        }
        File::create(&path).unwrap().set_len(100).unwrap();
        assert!(is_blank(&path).unwrap());
    }
}
