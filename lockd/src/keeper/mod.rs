//! The daemon `vmfs-lockd`: it keeps the slots of every mount of this host, and outlives a restart of itself.
//!
//! ```text
//! mount.vmfs A ──┐  Unix socket: join, resume, leave; "it is over"      ┌── renewals ──> slot cells of the LUNs
//! mount.vmfs B ──┼──────────────────────────────────────────> vmfs-lockd┤
//!    gate page <─┴── written by the daemon, read by the mount and VMMs ─┘── lockd.state: what is kept, for its next start
//! ```
//!
//! The gate page belongs to the mount, which passes its descriptor: the memory outlives the daemon, ends with those who use it, and
//! its size is sealed, so that nobody's mapping can be made to fault.
//!
//! | module | what |
//! | --- | --- |
//! | [`life`] | a slot's life: pure |
//! | [`messages`] | what is said over the socket |
//! | [`record`] | the state file |
//! | [`client`] | the mount's side |
//! | [`command`] | the command `vmfs-lockd` |

pub mod client;
pub mod command;
mod daemon;
pub mod life;
pub mod messages;
mod notify;
pub mod record;
mod slots;
mod socket;

use std::path::PathBuf;

/// The socket's path when nobody says otherwise: `/run/vmfs/lockd.sock` for root.
pub fn default_socket() -> PathBuf {
    crate::server::base_folder().join(SOCKET)
}

const SOCKET: &str = "lockd.sock";
