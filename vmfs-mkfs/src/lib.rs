//! mkfs.vmfs, fsck.vmfs and vmfs, the administrator's command: what they say and how they end. The work is `vmfs-core`'s.
#![forbid(unsafe_code)]

pub mod admin;
pub mod fsck;
pub mod mkfs;
pub mod size;
pub mod terminal;
