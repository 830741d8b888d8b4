//! Owns: what the service manager is told: sd_notify(3), without its library.
//! Promises: without a service manager nothing is said; a message that cannot be delivered is dropped.
//! Must not know: when which word is due.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager.
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// As the environment of this process says: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID.
    pub fn from_environment() -> io::Result<Notify> {
        let variable = |name| std::env::var(name).ok();
        let socket = match variable("NOTIFY_SOCKET") {
            Some(path) => Some((UnixDatagram::unbound()?, address(&path)?)),
            None => None,
        };
        let own = std::process::id().to_string();
        let is_mine = variable("WATCHDOG_PID").is_none_or(|pid| pid == own);
        let micros = variable("WATCHDOG_USEC").and_then(|text| text.parse().ok()).filter(|_| is_mine);
        Ok(Notify { socket, watchdog: micros.map(Duration::from_micros) })
    }

    /// How often the service manager wants to hear [`Notify::alive`], at least; `None`: never.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Ready to serve.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// Still making progress.
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// About to end.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, word: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(word.as_bytes(), address)
        {
            tracing::warn!(%error, word, "the service manager could not be told");
        }
    }
}

/// A path, or a name in the abstract namespace (`@NAME`).
fn address(path: &str) -> io::Result<SocketAddr> {
    match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_hears_each_word_as_a_datagram() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let socket = (UnixDatagram::unbound().unwrap(), address(path.to_str().unwrap()).unwrap());
        let notify = Notify { socket: Some(socket), watchdog: None };
        notify.ready();
        notify.alive();
        notify.stopping();
        for word in ["READY=1", "WATCHDOG=1", "STOPPING=1"] {
            let mut bytes = [0; 64];
            let length = manager.recv(&mut bytes).unwrap();
            assert_eq!(std::str::from_utf8(&bytes[..length]), Ok(word));
        }
        assert!(address("@vmfs-test").unwrap().as_abstract_name().is_some());
    }
}
