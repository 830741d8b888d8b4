//! Owns: open files: the part that threads share, grants, and the operations of the metadata actor.
//! Promises: what a flush reported is durable; bytes never written read as zeros; no bytes of another file show.
//! Must not know: names, FUSE.
//!
//! ```text
//! open_file  resolve a range, gate, references      (any thread)     files     open, close, the lock by kind   (actor)
//! grant      granules lent to one writer            (any thread)     load      pointer blocks into runs
//! mover      the data path of a thread                               allocate  blocks and granules for writers
//! content    read and write on the actor                             publish   flush: data, pointers, body
//! seek erase size                                                    discard   punch, cut, zero
//! hand_over  an open disk to another host                            raw       the LUN of a raw device mapping
//! relocate   what lies on a LUN to others                            recall    blocks from programs that move data themselves
//! ```

mod allocate;
mod cells;
mod content;
mod discard;
mod erase;
mod files;
mod grant;
mod hand_over;
mod load;
mod mover;
mod open_file;
mod publish;
mod raw;
mod recall;
mod relocate;
mod seek;
mod size;

pub use files::Files;
pub use grant::{Grant, GrantPiece};
pub use hand_over::{HandOver, Resolved, Unresolved};
pub use mover::{DataLuns, Moved, Mover, Stop};
pub use open_file::{Device, Hold, Need, OpenFile, OpenMode, Permit, ReadSegment, Run, SharedFile, WriteSegment};
pub use raw::physical_refusal;
pub use recall::{Borrowers, Recalled};
