//! NFS datastores: a client of NFSv3 with locks on virtual disks by lock files, in the manner of ESX, and of NFSv4.1 with share reservations as
//! locks. See `docs/NFS.md`.
//!
//! Everything that talks to a server is `async`, belongs to the thread that made it, and needs a tokio runtime with a `LocalSet` there
//! (a tokio-uring runtime is one). There is no thread between a request and its socket.
#![deny(unsafe_code)]

pub mod datastore;
pub mod error;
pub mod file;
pub mod lock;
pub mod mount;
pub mod nfs3;
pub mod remote;
pub mod rpc;
pub mod url;
pub mod v4;
pub mod xdr;
