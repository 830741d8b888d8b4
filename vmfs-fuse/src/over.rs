//! Owns: the end of a mount whose host was fenced.
//! Promises: it leaves the tree, whoever waits for it is answered, and the process ends whatever hangs: other hosts wait for that.
//! Must not know: how a host is fenced, requests.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::actor::OnOver;
use crate::mountpoint;

/// How long the orderly end may take. Nothing can be written any more, so that an end by force loses nothing.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the incarnation of this mount is over, once it is.
pub struct Over {
    source: String,
    directory: PathBuf,
    why: OnceLock<String>,
}

impl Over {
    /// Of the mount of `source` at `directory`.
    pub fn new(source: &str, directory: &Path) -> Arc<Over> {
        Arc::new(Over { source: source.to_owned(), directory: directory.to_owned(), why: OnceLock::new() })
    }

    /// What has happened and what to do, once the incarnation is over.
    pub fn message(&self) -> Option<String> {
        let (why, directory) = (self.why.get()?, self.directory.display());
        Some(format!(
            "{directory}: {why}. No data was written since, and the mount has ended; its VMs stop by themselves. Check that the storage \
             answers and this machine keeps up, then mount again: mount.vmfs {} {directory}",
            self.source
        ))
    }

    /// What the actor calls.
    pub fn on_over(self: &Arc<Over>) -> OnOver {
        let over = self.clone();
        Box::new(move |why| {
            // It is told once.
            let _ = over.why.set(why);
            let ending = over.clone();
            if let Err(error) = std::thread::Builder::new().name("vmfs-over".to_owned()).spawn(move || ending.end()) {
                tracing::error!("no thread to end the mount: {error}");
                over.end();
            }
        })
    }

    /// Takes the mount out of the tree, which ends the session; ends the process if that does not come to an end.
    fn end(&self) {
        self.leave_tree();
        std::thread::sleep(PATIENCE);
        let message = self.message().unwrap_or_default();
        tracing::error!("{message}");
        tracing::error!("the mount did not end within {PATIENCE:?}: the process ends now");
        eprintln!("mount.vmfs: {message}");
        std::process::exit(1);
    }

    /// Takes the mount out of the tree.
    pub fn leave_tree(&self) {
        if let Err(error) = mountpoint::abort(&self.source, &self.directory) {
            tracing::error!("{}: it cannot be taken out of the tree: {error}", self.directory.display());
        }
    }
}
