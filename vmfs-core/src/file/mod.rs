//! Owns: open files: the part that threads share, grants, and the operations of the metadata actor.
//! Promises: what a flush reported is durable; bytes never written read as zeros; no bytes of another file show.
//! Must not know: names, FUSE.

mod grant;
mod mover;
mod open_file;

pub use grant::{Grant, GrantPiece};
pub use mover::{DataLuns, Moved, Mover, Stop};
pub use open_file::{Hold, Need, OpenFile, OpenMode, Permit, ReadSegment, Run, SharedFile, WriteSegment};
