//! Locks on virtual disks of an NFS datastore: lock files, in the manner of ESX. The protocol and its proof are in `docs/NFS.md`.

mod keeper;
mod on_server;
mod protocol;
mod record;
#[cfg(test)]
mod simulation;
mod tenure;

pub use keeper::{Keeper, KeeperOptions};
pub use on_server::LockFiles;
pub use protocol::{Held, Holder, LockError, Loss, Observed, Store, acquire, look, release, renew};
pub use record::{Content, Owner, RECORD, Record};
pub use tenure::{Moment, SharedTenure, State, Timing, boot_time};
