//! Owns: the requests about names, attributes and directories: each becomes one job of the actor, which replies itself.
//! Promises: the kernel is told of an object exactly when the volume said so, with lifetimes of zero.
//! Must not know: file data.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{
    Errno, Generation, INodeNo, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyStatfs, Request,
};
use vmfs_core::error::FsError;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::volume::{AttributeChange, NewFile, RenameFlags, Stat, Volume};

use crate::attributes::{LIFETIME, errno, file_attr, file_type};
use crate::state::State;

/// Entries asked for at a time.
const PAGE: usize = 256;

/// Answers a request that makes or finds a name.
pub fn reply_entry(state: &State, doing: &str, found: Result<Stat, FsError>, reply: ReplyEntry) {
    match found {
        Ok(stat) => {
            let node = state.inodes.looked_up(&stat);
            let attr = file_attr(&stat, &node, state.io_bytes());
            reply.entry(&LIFETIME, &attr, Generation(node.generation));
        }
        Err(error) => reply.error(errno(doing, &error)),
    }
}

fn reply_attr(state: &State, doing: &str, found: Result<Stat, FsError>, reply: ReplyAttr) {
    match found {
        Ok(stat) => {
            let node = state.inodes.told(&stat);
            reply.attr(&LIFETIME, &file_attr(&stat, &node, state.io_bytes()));
        }
        Err(error) => reply.error(errno(doing, &error)),
    }
}

fn reply_empty(doing: &str, done: Result<(), FsError>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(doing, &error)),
    }
}

/// Who makes a name, and with what rights.
#[derive(Clone, Copy, Debug)]
pub struct Maker {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Maker {
    /// The owner and group of what `request` makes in `parent`; a directory with the set-group-id bit hands group and bit down.
    pub fn new(state: &State, request: &Request, parent: INodeNo, mode: u32, directory: bool) -> Maker {
        let inherited = state.inodes.inherited_group(parent.0);
        let bit = if directory && inherited.is_some() { libc::S_ISGID } else { 0 };
        Maker { mode: mode & 0o7777 | bit, uid: request.uid(), gid: inherited.unwrap_or(request.gid()) }
    }

    /// A plain file made by this maker.
    pub fn file(self, exclusive: bool) -> NewFile {
        let Maker { mode, uid, gid } = self;
        NewFile { object_type: ObjectType::File, mode, uid, gid, exclusive }
    }
}

/// A name in a directory, taken out of a request.
pub struct Place {
    /// The directory.
    pub directory: ObjectRef,
    /// The name.
    pub name: Vec<u8>,
}

impl Place {
    /// ESTALE when the directory is not known any more.
    pub fn new(state: &State, parent: INodeNo, name: &OsStr) -> Result<Place, Errno> {
        let directory = state.object(parent).ok_or(Errno::ESTALE)?;
        Ok(Place { directory, name: name.as_bytes().to_vec() })
    }
}

/// LOOKUP.
pub fn lookup(state: &Arc<State>, place: Place, reply: ReplyEntry) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let found = volume.lookup(place.directory, &place.name).await;
        reply_entry(&shared, "lookup", found, reply);
    });
}

/// GETATTR.
pub fn getattr(state: &Arc<State>, object: ObjectRef, reply: ReplyAttr) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let found = volume.stat(object).await;
        reply_attr(&shared, "getattr", found, reply);
    });
}

/// SETATTR.
pub fn setattr(state: &Arc<State>, object: ObjectRef, change: AttributeChange, reply: ReplyAttr) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let changed = volume.set_attributes(object, change).await;
        reply_attr(&shared, "setattr", changed, reply);
    });
}

/// READLINK.
pub fn readlink(state: &Arc<State>, object: ObjectRef, reply: ReplyData) {
    state.actor.send(move |volume| async move {
        match volume.read_link(object).await {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno("readlink", &error)),
        }
    });
}

/// MKNOD of a plain file.
pub fn make_file(state: &Arc<State>, place: Place, maker: Maker, reply: ReplyEntry) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let made = volume.create(place.directory, &place.name, maker.file(true), None).await;
        reply_entry(&shared, "mknod", made.map(|(stat, _)| stat), reply);
    });
}

/// MKDIR.
pub fn make_directory(state: &Arc<State>, place: Place, maker: Maker, reply: ReplyEntry) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let Maker { mode, uid, gid } = maker;
        let made = volume.make_directory(place.directory, &place.name, mode, uid, gid).await;
        reply_entry(&shared, "mkdir", made, reply);
    });
}

/// SYMLINK.
pub fn symlink(state: &Arc<State>, place: Place, target: Vec<u8>, maker: Maker, reply: ReplyEntry) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let made = volume.symlink(place.directory, &place.name, &target, maker.uid, maker.gid).await;
        reply_entry(&shared, "symlink", made, reply);
    });
}

/// UNLINK and RMDIR.
pub fn remove(state: &Arc<State>, place: Place, directory: bool, reply: ReplyEmpty) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let removed = if directory {
            volume.remove_directory(place.directory, &place.name).await
        } else {
            volume.unlink(place.directory, &place.name).await
        };
        let doing = if directory { "rmdir" } else { "unlink" };
        reply_empty(doing, removed.map(|object| shared.inodes.unlinked(object)), reply);
    });
}

/// RENAME and RENAME2.
pub fn rename(state: &Arc<State>, from: Place, to: Place, flags: RenameFlags, reply: ReplyEmpty) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        let renamed = volume.rename(from.directory, &from.name, to.directory, &to.name, flags).await;
        reply_empty("rename", renamed.map(|renamed| shared.inodes.renamed(&renamed)), reply);
    });
}

/// READDIR. Offsets 1 and 2 stand behind "." and "..", larger ones are the volume's cookies.
pub fn readdir(state: &Arc<State>, node: u64, directory: ObjectRef, offset: u64, mut reply: ReplyDirectory) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        for (dot, name) in [(1, "."), (2, "..")] {
            if offset < dot && reply.add(INodeNo(node), dot, fuser::FileType::Directory, name) {
                return reply.ok();
            }
        }
        let cookie = if offset <= 3 { 0 } else { offset };
        match fill(&shared, &volume, directory, cookie, &mut reply).await {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno("readdir", &error)),
        }
    });
}

async fn fill(
    state: &State,
    volume: &Volume,
    directory: ObjectRef,
    mut cookie: u64,
    reply: &mut ReplyDirectory,
) -> Result<(), FsError> {
    loop {
        let entries = volume.read_directory(directory, cookie, PAGE).await?;
        let last = entries.len() < PAGE;
        for entry in entries {
            let number = INodeNo(state.inodes.number(entry.object));
            cookie = entry.cookie;
            if reply.add(number, cookie, file_type(entry.object_type), OsStr::from_bytes(&entry.name)) {
                return Ok(());
            }
        }
        if last {
            return Ok(());
        }
    }
}

/// STATFS.
pub fn statfs(state: &Arc<State>, reply: ReplyStatfs) {
    state.actor.send(move |volume| async move {
        let space = volume.statfs().await;
        let block = space.block_size as u32;
        // The volume makes file descriptors out of free blocks: there is no number of them to tell (as on btrfs).
        reply.statfs(space.total_blocks, space.free_blocks, space.free_blocks, 0, 0, block, space.name_max, block);
    });
}
