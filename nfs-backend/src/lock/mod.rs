//! Locks on virtual disks of an NFS datastore: lock files, in the manner of ESX; by NFSv4.1 share reservations ([`crate::v4`]). The protocol and its proof are in `docs/NFS.md`.

mod keeper;
mod mark;
mod on_server;
mod protocol;
mod record;
#[cfg(test)]
mod simulation;
mod tenure;
mod who;

pub use keeper::{Keeper, KeeperOptions};
pub use mark::MARK;
pub use on_server::LockFiles;
pub use protocol::{Held, Holder, LockError, Loss, Observed, Store, acquire, look, release, renew};
pub use record::{Content, Owner, RECORD, Record};
pub use tenure::{Moment, SharedTenure, State, Timing, boot_time};
pub use who::{file_of, silence, who};
