//! NFS datastores: an NFSv3 client, and locks on virtual disks by lock files, in the manner of ESX. See `docs/NFS.md`.
//!
//! Everything that talks to a server is `async`, belongs to the thread that made it, and needs a tokio runtime with a `LocalSet` there
//! (a tokio-uring runtime is one). There is no thread between a request and its socket.
#![forbid(unsafe_code)]

pub mod datastore;
pub mod error;
pub mod file;
pub mod lock;
pub mod mount;
pub mod nfs3;
pub mod rpc;
pub mod url;
pub mod xdr;
