//! NFSv3 (RFC 1813): its values as types, and its procedures as calls of a [`Server`].

mod links;
mod procedures;
mod values;

pub use procedures::{Committed, Entry, Server, Stability, Written};
pub use values::{
    Attributes, FileHandle, FileKind, FsInfo, FsStat, MAX_HANDLE, MAX_HANDLE_V4, NewAttributes, Time, Verifier,
};
