//! Owns: what can be chosen about an initiator beside where it connects to.
//! Promises: every wait has an end.
//! Must not know: sockets.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::url::DigestChoice;

/// The most commands in flight on one session.
pub const MOST_COMMANDS: usize = 128;

/// How an initiator behaves. All durations are upper bounds of waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Name of the initiator (RFC 7143, 4.2.7.1).
    pub initiator: String,
    /// The initiator's part of the session identifier (RFC 7143, 11.12.5). With the name it is the SCSI initiator port, which persistent
    /// reservations are bound to. None: a random one, kept as long as the [`Initiator`](super::Initiator) lives.
    pub isid: Option<[u8; 6]>,
    /// Digests of headers, unless the URL says.
    pub header_digest: DigestChoice,
    /// Digests of data, unless the URL says.
    pub data_digest: DigestChoice,
    /// Commands in flight at once, 1..=[`MOST_COMMANDS`]; more callers wait.
    pub commands: usize,
    /// The largest data transfer of one command, in bytes.
    pub max_transfer: usize,
    /// For a TCP connection.
    pub connect_time: Duration,
    /// For a login.
    pub login_time: Duration,
    /// For the answer to the abort of a command that timed out. A command ends at most this much after its own time.
    pub abort_time: Duration,
    /// How long commands wait for a lost connection to be had again before they fail as not sent.
    pub patience: Duration,
    /// Silence after which the target is pinged.
    pub ping_after: Duration,
    /// Silence after a ping after which the connection is given up.
    pub ping_time: Duration,
    /// The longest pause between attempts to connect again.
    pub longest_pause: Duration,
    /// For [`scsi::path::ScsiPath::end`].
    pub end_time: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            initiator: initiator_name(),
            isid: None,
            header_digest: DigestChoice::None,
            data_digest: DigestChoice::None,
            commands: 64,
            max_transfer: 4 << 20,
            connect_time: Duration::from_secs(5),
            login_time: Duration::from_secs(10),
            abort_time: Duration::from_secs(3),
            patience: Duration::from_secs(10),
            ping_after: Duration::from_secs(5),
            ping_time: Duration::from_secs(5),
            longest_pause: Duration::from_secs(4),
            end_time: Duration::from_secs(15),
        }
    }
}

/// The name that this machine's initiators have: that of `/etc/iscsi/initiatorname.iscsi` where there is one, else one made of
/// `/etc/machine-id`.
pub fn initiator_name() -> String {
    let file = std::fs::read_to_string("/etc/iscsi/initiatorname.iscsi").unwrap_or_default();
    let named = file.lines().find_map(|line| line.trim().strip_prefix("InitiatorName=").map(str::trim));
    if let Some(name) = named.filter(|name| !name.is_empty()) {
        return name.to_owned();
    }
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    machine.trim().hash(&mut hasher);
    format!("iqn.2026-01.net.vmfs:host-{:012x}", hasher.finish() & 0xFFFF_FFFF_FFFF)
}
