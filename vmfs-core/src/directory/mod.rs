//! Owns: names: lookup, create, remove, rename, readdir, and the marks that these leave on objects.
//! Promises: each operation is one atomic change that every host sees before or after; what is cut off is finished by whoever needs it.
//! Must not know: file data, FUSE, who calls.
//!
//! ```text
//! name_set   entries in the order of their hashes, cookies          (pure)
//! tree       extendible hash of a large directory                   (pure)
//! image      reads entries of one directory image, believes them by the child's root cell
//! commit     applies edits to a directory in one commit
//! marks      finishes or undoes what a removal or a move left half done
//! rebuilt    names of directories that are lost, from what their children say
//! create remove rename moving list attributes                       the operations
//! ```

mod attributes;
mod commit;
mod create;
mod image;
mod list;
mod marks;
mod mend;
mod moving;
mod name_set;
mod names;
mod rebuilt;
mod recover;
mod relocate;
mod remove;
mod rename;
mod tidy;
mod tree;

pub use create::Created;
pub(crate) use create::plain;
pub use names::Names;
