//! NFS datastores: an NFSv3 client and the lock files that ESX uses. Nothing is implemented yet.
#![forbid(unsafe_code)]
