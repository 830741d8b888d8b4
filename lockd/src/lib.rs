//! The mount's services for whoever moves the data of its files, and their client library.
//!
//! A program that wants a disk's data at the speed of its LUNs opens the disk file on the mount (that takes the lock), asks by
//! ioctl for the runs behind it, gets the LUNs' descriptors and the gate page over a Unix socket, and then does its I/O straight
//! on the LUNs. [`client::DirectFile`] is that program's side; [`server::Server`] with a [`server::Service`] is the mount's.
//!
//! | module | what |
//! | --- | --- |
//! | [`ioctl`] | the ioctls on files of a mount: numbers, structures and calls |
//! | [`protocol`] | the messages of the Unix socket |
//! | [`server`] | the socket's listener, embedded in the mount |
//! | [`client`] | direct access to a disk file, and administrative requests |
//! | [`gate_memory`] | the gate page as shared memory |
//! | [`drain`] | the locks that prove that a process's I/O has ended |
//! | [`rights`] | a message with descriptors |
//! | [`keeper`] | the daemon `vmfs-lockd`, which keeps the slots of all mounts of a host, and the mount's side of it |
//! | [`clock`] | the clock of the leases |

pub mod client;
pub mod clock;
pub mod drain;
pub mod gate_memory;
pub mod ioctl;
pub mod keeper;
pub mod protocol;
pub mod rights;
pub mod server;
