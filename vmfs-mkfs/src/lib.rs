//! mkfs.vmfs, fsck.vmfs and vmfs, the administrator's command.
#![forbid(unsafe_code)]
