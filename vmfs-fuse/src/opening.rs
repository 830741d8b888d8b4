//! Owns: opening, creating, flushing and closing files.
//! Promises: the lock goes only when nothing of any program that had a descriptor is in flight; when close(2) has returned, other
//!   hosts see what was written.
//! Must not know: how data is moved.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuser::{
    Errno, FileHandle as FuseHandle, FopenFlags, Generation, INodeNo, OpenAccMode, OpenFlags, ReplyCreate, ReplyEmpty,
    ReplyOpen,
};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::file::{OpenFile, OpenMode};
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::lun::DataLun;
use vmfs_core::units::LunIndex;
use vmfs_core::volume::{AttributeChange, Stat, Volume};

use crate::attributes::{LIFETIME, errno, file_attr};
use crate::handles::{FileHandle, Handle, Means};
use crate::names::{Maker, Place};
use crate::state::State;

/// How long an open waits for a close of this host that is on its way: the kernel sends closes without waiting for them.
const CLOSING: Duration = Duration::from_millis(300);
const CLOSING_PAUSE: Duration = Duration::from_millis(5);
/// How often the end of another program's I/O is looked for.
const DRAIN_PAUSE: Duration = Duration::from_millis(20);

/// Every file is read and written past the page cache; mappings work by `FUSE_DIRECT_IO_ALLOW_MMAP`.
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

fn mode_of(flags: i32) -> OpenMode {
    let access = OpenFlags(flags).acc_mode();
    OpenMode {
        read: access != OpenAccMode::O_WRONLY,
        write: access != OpenAccMode::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0 && access != OpenAccMode::O_RDONLY,
    }
}

/// OPEN.
pub fn open(state: &Arc<State>, node: INodeNo, object: ObjectRef, flags: OpenFlags, reply: ReplyOpen) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        match open_file(&shared, &volume, node.0, object, flags.0).await {
            Ok(number) => reply.opened(FuseHandle(number), OPEN_FLAGS),
            Err(error) => reply.error(errno("open", &error)),
        }
    });
}

async fn open_file(state: &State, volume: &Volume, node: u64, object: ObjectRef, flags: i32) -> Result<u64, FsError> {
    let mode = mode_of(flags);
    if flags & libc::O_TRUNC != 0 && !mode.truncate {
        volume.set_attributes(object, AttributeChange { size: Some(0), ..AttributeChange::default() }).await?;
    }
    let file = open_when_closed(volume, object, mode).await?;
    // The kernel appends where it believes the end to be: it knows of writes that pass through it, and not of those that another host
    // made before this one took the lock. After ESTALE it looks the name up again.
    let (taken, size) = file.taken();
    let is_old = |(told, told_size)| told <= taken && told_size != size;
    if mode.write && flags & libc::O_APPEND != 0 && !mode.truncate && state.inodes.told_size(node).is_some_and(is_old) {
        volume.close(file).await?;
        return Err(FsError::Stale { fd: object.fd });
    }
    Ok(state.handles.add(Handle::File(Arc::new(FileHandle::new(file, mode.write)))))
}

/// Opens; when this host has the file open in a way that excludes it, waits for a close that may be on its way.
async fn open_when_closed(volume: &Volume, object: ObjectRef, mode: OpenMode) -> Result<Arc<OpenFile>, FsError> {
    let env = volume.context().env().clone();
    let until = env.now().after(CLOSING);
    loop {
        match volume.open(object, mode).await {
            Err(error)
                if error.kind() == FsErrorKind::Busy
                    && volume.files().opened(object.fd).is_some()
                    && env.now() < until =>
            {
                env.sleep(CLOSING_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// CREATE: makes a file, or opens the one that is there.
pub fn create(state: &Arc<State>, place: Place, maker: Maker, flags: i32, reply: ReplyCreate) {
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        match create_file(&volume, &place, maker, flags).await {
            Ok((stat, file)) => {
                let node = shared.inodes.looked_up(&stat);
                let handle = FileHandle::new(file, mode_of(flags).write);
                let number = shared.handles.add(Handle::File(Arc::new(handle)));
                let attr = file_attr(&stat, &node, shared.io_bytes());
                reply.created(&LIFETIME, &attr, Generation(node.generation), FuseHandle(number), OPEN_FLAGS);
            }
            Err(error) => reply.error(errno("create", &error)),
        }
    });
}

async fn create_file(
    volume: &Volume,
    place: &Place,
    maker: Maker,
    flags: i32,
) -> Result<(Stat, Arc<OpenFile>), FsError> {
    let mode = mode_of(flags);
    let exclusive = flags & libc::O_EXCL != 0;
    let new = maker.file(exclusive);
    let (stat, file) = volume.create(place.directory, &place.name, new, Some(mode)).await?;
    let Some(file) = file else {
        return Err(FsError::refused(FsErrorKind::Io, "a file was created and not opened"));
    };
    Ok((stat, file))
}

/// FLUSH (at each close(2)) and FSYNC: everything written is durable and visible to other hosts afterwards.
pub fn flush(state: &Arc<State>, handle: Arc<FileHandle>, always: bool, reply: ReplyEmpty) {
    let written = handle.written.swap(false, Ordering::AcqRel);
    if !handle.writable || !(written || always) {
        return reply.ok();
    }
    state.actor.send(move |volume| async move {
        match volume.flush(&handle.file).await {
            Ok(()) => reply.ok(),
            Err(error) => {
                handle.written.store(true, Ordering::Release);
                reply.error(errno("flush", &error));
            }
        }
    });
}

/// RELEASE: the last close of an open file.
pub fn release(state: &Arc<State>, number: u64, reply: ReplyEmpty) {
    let Some(Handle::File(handle)) = state.handles.remove(number) else { return reply.error(Errno::EBADF) };
    let shared = state.clone();
    state.actor.send(move |volume| async move {
        match close(&shared, &volume, &handle).await {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno("close", &error)),
        }
    });
}

/// Closes a file: what programs were lent is waited for, then the lock goes.
pub async fn close(state: &State, volume: &Volume, handle: &Arc<FileHandle>) -> Result<(), FsError> {
    handle.direct.raise_revoke();
    drained(state, volume, handle).await;
    state.recalls.closed(handle);
    handle.direct.grants.lock().clear();
    volume.close(handle.file.clone()).await
}

/// Tells the programs that move data of disks whose locks lie on `lun` to let go. True: nothing of them is in flight.
pub fn let_go(state: &State, lun: LunIndex) -> bool {
    let files = state.handles.files();
    let under = files.iter().filter(|(_, handle)| handle.file.fd().lun() == lun);
    under.fold(true, |gone, (_, handle)| {
        let mut lent = handle.direct.lent.lock();
        if !lent.is_empty() {
            handle.direct.raise_revoke();
        }
        // What cannot be found out is taken for still there.
        lent.retain(|one| match one.means {
            Means::Descriptor { byte } => !lockd_drained(state, one.lun, byte).unwrap_or(false),
            // Its program ends it, and with that the file: the close has the proof.
            Means::Session { .. } => true,
        });
        gone && lent.is_empty()
    })
}

/// Waits until no request of a program that had descriptors is in flight: their drain locks can be had again.
async fn drained(state: &State, volume: &Volume, handle: &FileHandle) {
    let mut waited = Duration::ZERO;
    loop {
        let Some(one) = handle.direct.lent.lock().first().cloned() else { return };
        let is_drained = match one.means.clone() {
            Means::Descriptor { byte } => lockd_drained(state, one.lun, byte),
            Means::Session { data, port, place } => ended(data, port, place).await.map(|()| true),
        };
        match is_drained {
            Ok(true) => handle.direct.lent.lock().retain(|other| !other.is(&one)),
            Ok(false) => {
                if waited.as_secs() != (waited + DRAIN_PAUSE).as_secs() {
                    tracing::warn!("{}: waiting for the I/O of a program that was closed or killed", handle.file.fd());
                }
                waited += DRAIN_PAUSE;
                volume.context().env().sleep(DRAIN_PAUSE).await;
            }
            Err(error) => {
                tracing::error!("{}: whether its I/O has ended cannot be found out: {error}", handle.file.fd());
                volume.context().env().sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Has the storage end a program's session. The program has ended or given it up, for its file was closed: it does not make it anew.
async fn ended(data: Arc<dyn DataLun>, port: u64, place: Option<Option<String>>) -> std::io::Result<()> {
    let told = place.clone().flatten();
    let end = tokio::task::spawn_blocking(move || data.end_session(port, told.as_deref())).await;
    match end.map_err(std::io::Error::other)? {
        // What never was confirmed has carried nothing.
        Err(error) if place.is_none() => {
            tracing::debug!("a session that was never used: {error}");
            Ok(())
        }
        other => other.map_err(std::io::Error::other),
    }
}

fn lockd_drained(state: &State, lun: LunIndex, byte: u64) -> std::io::Result<bool> {
    let missing = || std::io::Error::other(format!("{lun} has no descriptor"));
    let data = state.luns.get(lun).ok_or_else(missing)?;
    let probe = data.open_descriptor().ok_or_else(missing)?.map_err(|error| error.cause)?;
    lockd::drain::try_lock(&probe, byte)
}
