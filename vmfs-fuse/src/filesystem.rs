//! Owns: the FUSE callbacks: each takes a request apart and hands it on.
//! Promises: every request is answered exactly once; reads and writes are done on the thread that received them.
//! Must not know: how anything is done.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::volume::{AttributeChange, RenameFlags};

use crate::attributes::{errno, nanoseconds_of};
use crate::data::{self, MAX_REQUEST};
use crate::handles::{FileHandle as OpenHandle, Handle};
use crate::names::{Maker, Place};
use crate::state::State;
use crate::{ioctl, names, opening, space};

/// Requests that the kernel may have on their way without a waiter (readahead, asynchronous I/O).
const MAX_BACKGROUND: u16 = 256;

/// The file system as fuser calls it.
pub struct Vmfs {
    /// Shared with the actor's jobs and the socket.
    pub state: Arc<State>,
}

impl Vmfs {
    fn object(&self, node: INodeNo) -> Result<ObjectRef, Errno> {
        self.state.object(node).ok_or(Errno::ESTALE)
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<OpenHandle>, Errno> {
        self.state.handles.file(handle.0).ok_or(Errno::EBADF)
    }
}

/// The value, or the request is answered with its errno.
macro_rules! or_answer {
    ($result:expr, $reply:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return $reply.error(error),
        }
    };
}

impl Filesystem for Vmfs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_AUTO_INVAL_DATA
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HAS_IOCTL_DIR
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        if let Err(missing) = config.add_capabilities(wanted) {
            tracing::warn!("this kernel's FUSE lacks {missing:?}: what needs it is slower or refused");
            // What is left is there: the call before said so.
            let _ = config.add_capabilities(wanted & !missing);
        }
        // A number that does not fit gives the nearest that does.
        let _ = config.set_max_write(MAX_REQUEST as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        names::lookup(&self.state, or_answer!(Place::new(&self.state, parent, name), reply), reply);
    }

    fn forget(&self, _: &Request, node: INodeNo, count: u64) {
        self.state.inodes.forget(node.0, count);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        names::getattr(&self.state, or_answer!(self.object(node), reply), reply);
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let object = or_answer!(self.object(node), reply);
        let change = AttributeChange {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            accessed_ns: accessed.map(nanoseconds_of),
            modified_ns: modified.map(nanoseconds_of),
        };
        names::setattr(&self.state, object, change, reply);
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        names::readlink(&self.state, or_answer!(self.object(node), reply), reply);
    }

    fn mknod(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: u32, reply: ReplyEntry) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            // Devices, pipes and sockets mean nothing to other hosts.
            return reply.error(Errno::EPERM);
        }
        let place = or_answer!(Place::new(&self.state, parent, name), reply);
        names::make_file(&self.state, place, Maker::new(&self.state, request, parent, mode, false), reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let place = or_answer!(Place::new(&self.state, parent, name), reply);
        names::make_directory(&self.state, place, Maker::new(&self.state, request, parent, mode, true), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        names::remove(&self.state, or_answer!(Place::new(&self.state, parent, name), reply), false, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        names::remove(&self.state, or_answer!(Place::new(&self.state, parent, name), reply), true, reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let place = or_answer!(Place::new(&self.state, parent, name), reply);
        let maker = Maker::new(&self.state, request, parent, 0o777, false);
        names::symlink(&self.state, place, target.as_os_str().as_bytes().to_vec(), maker, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let known = fuser::RenameFlags::RENAME_NOREPLACE | fuser::RenameFlags::RENAME_EXCHANGE;
        if !known.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let from = or_answer!(Place::new(&self.state, parent, name), reply);
        let to = or_answer!(Place::new(&self.state, new_parent, new_name), reply);
        let flags = RenameFlags {
            no_replace: flags.contains(fuser::RenameFlags::RENAME_NOREPLACE),
            exchange: flags.contains(fuser::RenameFlags::RENAME_EXCHANGE),
        };
        names::rename(&self.state, from, to, flags, reply);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        // A virtual machine's file has one name.
        reply.error(Errno::EPERM);
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let object = or_answer!(self.object(node), reply);
        opening::open(&self.state, node, object, flags, reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let place = or_answer!(Place::new(&self.state, parent, name), reply);
        let maker = Maker::new(&self.state, request, parent, mode, false);
        opening::create(&self.state, place, maker, flags, reply);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let handle = or_answer!(self.file(handle), reply);
        data::read(&self.state, &handle, offset, size as usize, |result| match result {
            Ok(bytes) => reply.data(bytes),
            Err(error) => reply.error(errno("read", &error)),
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let handle = or_answer!(self.file(handle), reply);
        match data::write(&self.state, &handle, offset, bytes) {
            Ok(()) => reply.written(bytes.len() as u32),
            Err(error) => reply.error(errno("write", &error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        opening::flush(&self.state, or_answer!(self.file(handle), reply), false, reply);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        opening::release(&self.state, handle.0, reply);
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        opening::flush(&self.state, or_answer!(self.file(handle), reply), true, reply);
    }

    fn opendir(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        or_answer!(self.object(node), reply);
        let number = self.state.handles.add(Handle::Directory(node.0, Arc::default()));
        reply.opened(FileHandle(number), FopenFlags::empty());
    }

    fn readdir(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectory) {
        let directory = or_answer!(self.object(node), reply);
        names::readdir(&self.state, node.0, directory, offset, reply);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.state.handles.remove(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Every change of a name is durable when it is answered.
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        names::statfs(&self.state, reply);
    }

    // ENOSYS makes the kernel answer EOPNOTSUPP by itself from then on: no request a write to look for capabilities.
    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        flags: IoctlFlags,
        command: u32,
        bytes: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        if flags.intersects(IoctlFlags::FUSE_IOCTL_COMPAT | IoctlFlags::FUSE_IOCTL_UNRESTRICTED) {
            return reply.error(Errno::ENOTTY);
        }
        ioctl::carry_out(&self.state, node, handle.0, command, bytes, out_size, reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        space::fallocate(&self.state, or_answer!(self.file(handle), reply), offset, length, mode, reply);
    }

    fn lseek(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        space::lseek(&self.state, or_answer!(self.file(handle), reply), offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies by reading and writing, and does not ask again.
        reply.error(Errno::ENOSYS);
    }
}
