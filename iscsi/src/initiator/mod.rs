//! The initiator (RFC 7143): a session with one target, by one connection, as a [`ScsiPath`].
//!
//! Many threads call [`ScsiPath::execute`] at once; their commands are in flight together. A thread that must not wait uses
//! [`Initiator::perform`], by which many commands of one thread are in flight. A caller that waits receives for all if nobody
//! else does, so that a command alone changes no threads. Data go between the socket and the caller's memory; what arrives
//! together with its header, up to 16 KiB, is copied once. A lost connection is had again in the background, by the same initiator
//! port; a command that was in flight then is [`PathError::Unknown`] and never sent again here.
//!
//! Limits: error recovery level 0, commands of at most 16 bytes, no data both ways at once. Memory of a session: 16 KiB for what is
//! received ahead, and less than half a KiB for each of [`Options::commands`], whatever the target does.
//!
//! [`PathError::Unknown`]: scsi::path::PathError::Unknown

mod asynchronous;
mod chap;
mod commands;
mod connect;
mod discovery;
mod error;
mod inbox;
mod keeper;
mod landing;
mod login;
mod options;
mod outgoing;
mod readiness;
mod receiving;
mod secret;
mod session;
mod tasks;
#[cfg(test)]
mod tests;
mod url;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use scsi::path::{PathAnswer, PathData, PathError, ScsiPath};

pub use asynchronous::Data;
use connect::Connector;
pub use discovery::{DiscoveredTarget, discover};
pub use error::{Broken, ConnectCause, ConnectError};
use keeper::Keeper;
pub use options::{MOST_COMMANDS, Options, initiator_name};
pub use secret::{Account, Secret};
use session::{Life, Link, Shared};
pub use url::{DigestChoice, PORT, Url, UrlError};

/// A reset of more than one task (RFC 7143, 11.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Of the logical unit: the commands of all initiators there end.
    LogicalUnit = 5,
    /// Of all logical units of the target.
    TargetWarm = 6,
    /// The same, and all sessions are ended.
    TargetCold = 7,
}

/// A session with a target. Dropped, it logs out.
pub struct Initiator {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

impl Initiator {
    /// Logs in.
    ///
    /// # Errors
    /// [`ConnectError`] of the first attempt; later ones are made in the background.
    pub fn connect(url: &Url, options: Options) -> Result<Initiator, ConnectError> {
        let connector = Connector::new(url, &options)?;
        let connection = connector.connect()?;
        let shared = Arc::new(Shared::new(url.to_string(), sam_lun(url.lun), connector.options.clone()));
        let group = connection.group.clone();
        shared.install(connection);
        Self::keep(shared, connector, group)
    }

    /// The same without waiting for the first connection: commands do, for [`Options::patience`].
    ///
    /// # Errors
    /// [`ConnectCause::Option`]
    pub fn start(url: &Url, options: Options) -> Result<Initiator, ConnectError> {
        let connector = Connector::new(url, &options)?;
        let shared = Arc::new(Shared::new(url.to_string(), sam_lun(url.lun), connector.options.clone()));
        Self::keep(shared, connector, None)
    }

    fn keep(shared: Arc<Shared>, connector: Connector, group: Option<String>) -> Result<Initiator, ConnectError> {
        let keeper = Keeper { shared: shared.clone(), connector, group };
        let spawned = std::thread::Builder::new().name("iscsi-session".to_owned()).spawn(move || keeper.run());
        match spawned {
            Ok(thread) => Ok(Initiator { shared, keeper: Some(thread) }),
            Err(error) => {
                let cause = ConnectCause::Option(format!("a thread cannot be had: {error}"));
                Err(ConnectError { portal: shared.name.clone(), cause })
            }
        }
    }

    /// Whether there is a connection; else why not.
    pub fn state(&self) -> Result<(), String> {
        match &self.shared.core.lock().link {
            Link::Up(_) => Ok(()),
            Link::Down { cause, .. } => Err(cause.to_string()),
        }
    }

    /// Runs one command as a future, as [`ScsiPath::execute`] does; gives the answer, and the memory of `data` back. Many may be in flight
    /// from one thread, with nobody waiting for them; [`Initiator::drive`] has to run beside them. `permit` is asked last before the
    /// command goes out: if it says no the command ends as not sent.
    ///
    /// Dropped before it has ended, it takes the connection with it, since nobody would know what became of it. Needs the timers of a tokio
    /// runtime.
    pub async fn perform(
        &self,
        cdb: &[u8],
        data: Data,
        timeout: Duration,
        permit: &dyn Fn() -> bool,
    ) -> (Result<PathAnswer, PathError>, Vec<u8>) {
        self.shared.perform(cdb, data, timeout, permit).await
    }

    /// Receives for the commands of [`Initiator::perform`], over all connections. It never ends; one at a time, on the thread of those
    /// commands, which needs a tokio runtime with input and output.
    pub async fn drive(&self) {
        self.shared.drive().await;
    }

    /// Logs out for good, without waiting for it: the session is not needed any more, and no command is taken from here on.
    pub fn leave(&self) {
        let mut core = self.shared.core.lock();
        core.life = Life::Dropped;
        core.rouse_all(!0);
        drop(core);
        self.shared.changed.notify_all();
    }

    /// The tag of the target's portal group that the session is with, if the target has told it: initiator port and portal group name a
    /// session (RFC 7143, 4.4.2).
    pub fn portal_group(&self) -> Option<String> {
        self.shared.core.lock().group.clone()
    }

    /// Resets more than one task. The commands of this session end as unknown.
    ///
    /// # Errors
    /// [`PathError`]; `NotSent` too where the target refuses it.
    pub fn reset(&self, reset: Reset, timeout: Duration) -> Result<(), PathError> {
        let refused =
            |why: &str| Err(PathError::NotSent(format!("{}: the target does not reset: {why}", self.shared.name)));
        match self.shared.manage(reset as u8, timeout)? {
            0 => Ok(()),
            2 => refused("there is no such logical unit"),
            5 => refused("it does not have this function"),
            6 => refused("this initiator may not do so"),
            _ => refused("it rejects the function"),
        }
    }
}

impl ScsiPath for Initiator {
    fn name(&self) -> &str {
        &self.shared.name
    }

    /// It returns at most [`Options::abort_time`] after `timeout`: a command that has no answer then is aborted first.
    fn execute(&self, cdb: &[u8], data: PathData<'_>, timeout: Duration) -> Result<PathAnswer, PathError> {
        self.shared.execute(cdb, data, timeout)
    }

    fn max_transfer(&self) -> usize {
        self.shared.options.max_transfer
    }

    /// Takes at most [`Options::end_time`] and the time of one attempt to log in. No command is taken from here on.
    fn end(&self) -> bool {
        let shared = &self.shared;
        let mut core = shared.core.lock();
        match core.life {
            Life::Ended { is_proven: true } | Life::Dropped => {}
            Life::Ending(_) => {}
            Life::Running | Life::Ended { is_proven: false } => {
                core.life = Life::Ending(Instant::now() + shared.options.end_time);
                core.rouse_all(!0);
                shared.changed.notify_all();
            }
        }
        loop {
            match core.life {
                Life::Ended { is_proven } => return is_proven,
                Life::Dropped => return false,
                _ => shared.changed.wait(&mut core),
            }
        }
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        self.leave();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

/// The eight bytes of a LUN: peripheral addressing up to 255, flat space addressing beyond (SAM-5, 4.7.7).
fn sam_lun(lun: u16) -> [u8; 8] {
    let [high, low] = lun.to_be_bytes();
    let high = if lun > 255 { 0x40 | high } else { 0 };
    [high, low, 0, 0, 0, 0, 0, 0]
}
