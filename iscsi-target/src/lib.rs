//! The iSCSI target daemon, and the initiator that vmfs-core uses as a LUN. Nothing is implemented yet.
#![forbid(unsafe_code)]
