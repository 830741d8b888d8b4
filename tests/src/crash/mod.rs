//! Owns: programs that work on a mount while it is killed, and what must be there afterwards.
//! Promises: see [`content`] for bytes and [`tree`] for names.
//! Must not know: how a mount is killed.

pub mod content;
pub mod tree;
pub mod worker;
