//! NFSv4.1 (RFC 8881): COMPOUND procedures, sessions, and share reservations as the lock of a disk. See `docs/NFS.md`.
//!
//! Every request is the next of a slot of a session. What is sent again over a new connection is the same request of that slot, which the
//! server answers from memory if it has done it already.

mod attributes;
mod calls;
mod establish;
mod grants;
mod keeper;
mod operations;
mod server;
mod session;
mod states;
mod status;

pub(crate) use grants::Grants;
pub use keeper::look;
pub(crate) use keeper::{FileLock, owner_file, timing};
pub use operations::Server;
