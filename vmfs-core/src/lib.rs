//! The file system: on-disk format, compare-and-write, leases, allocation and objects.
#![forbid(unsafe_code)]
