//! Owns: the mount's side of the ioctls of [`lockd::ioctl`].
//! Promises: structures of the wrong size are refused; runs are given out only of virtual disks, whose lock keeps them in place.
//! Must not know: what the client does with runs.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{Errno, INodeNo, ReplyIoctl};
use lockd::ioctl::{
    ABI_VERSION, ALLOCATE, EXTENTS, FILLED, FLUSH, GET_VOLUME, GrantRequest, MAX_SOCKET_PATH, PUNCH, RangeRequest, Run,
    RunPage, VOLUME_MAGIC, VolumeAnswer, kind, state as run_state,
};
use vmfs_core::error::FsError;
use vmfs_core::file::{Grant, OpenFile, ReadSegment};
use vmfs_core::format::root_cell::ObjectType;
use vmfs_core::units::LunIndex;
use vmfs_core::volume::Volume;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::attributes::errno;
use crate::handles::{FileHandle, Handle};
use crate::state::State;

/// Answers one ioctl.
pub fn carry_out(
    state: &Arc<State>,
    node: INodeNo,
    number: u64,
    command: u32,
    bytes: &[u8],
    out_size: u32,
    reply: ReplyIoctl,
) {
    if command == GET_VOLUME {
        return match get_volume(state, node, number) {
            Ok(answer) if out_size as usize >= size_of::<VolumeAnswer>() => reply.ioctl(0, answer.as_bytes()),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(error) => reply.error(error),
        };
    }
    if ![EXTENTS, ALLOCATE, FILLED, FLUSH, PUNCH].contains(&command) {
        return reply.error(Errno::ENOTTY);
    }
    let handle = match state.handles.file(number) {
        Some(handle) if handle.file.object_type() == ObjectType::Disk => handle,
        Some(_) => return reply.error(Errno::EOPNOTSUPP),
        None => return reply.error(Errno::EBADF),
    };
    if command != EXTENTS && !handle.writable {
        return reply.error(Errno::EBADF);
    }
    match command {
        EXTENTS => with_page(bytes, reply, |page, reply| extents(state, handle, page, reply)),
        ALLOCATE => with_page(bytes, reply, |page, reply| allocate(state, handle, page, reply)),
        FILLED => match GrantRequest::read_from_bytes(bytes) {
            Ok(request) => filled(&handle, &request, reply),
            Err(_) => reply.error(Errno::EINVAL),
        },
        PUNCH => match RangeRequest::read_from_bytes(bytes) {
            Ok(request) => punch(state, handle, &request, reply),
            Err(_) => reply.error(Errno::EINVAL),
        },
        _ => flush(state, handle, reply),
    }
}

fn with_page(bytes: &[u8], reply: ReplyIoctl, carry_out: impl FnOnce(Box<RunPage>, ReplyIoctl)) {
    match RunPage::read_from_bytes(bytes) {
        Ok(page) => carry_out(Box::new(page), reply),
        Err(_) => reply.error(Errno::EINVAL),
    }
}

fn get_volume(state: &State, node: INodeNo, number: u64) -> Result<VolumeAnswer, Errno> {
    let object = state.object(node).ok_or(Errno::ESTALE)?;
    let mut answer = VolumeAnswer::new_zeroed();
    answer.magic = VOLUME_MAGIC.into();
    answer.version = ABI_VERSION.into();
    match state.handles.get(number).ok_or(Errno::EBADF)? {
        Handle::Directory(..) => answer.kind = kind::DIRECTORY,
        Handle::File(handle) => {
            answer.kind = match handle.file.object_type() {
                ObjectType::Disk => kind::DISK,
                ObjectType::Rdm => kind::RAW,
                _ => kind::FILE,
            };
            answer.writable = handle.writable.into();
            answer.size = handle.file.size().into();
        }
    }
    answer.volume = state.info.uuid.0;
    answer.host = state.host.0;
    answer.ticket = state.handles.ticket(number).ok_or(Errno::EIO)?.0;
    answer.fd = object.fd.get().into();
    answer.link = object.link.0.into();
    answer.block_bytes = (state.info.block_size.bytes() as u32).into();
    answer.granule_bytes = (state.info.block_size.granule_bytes() as u32).into();
    if let Some(path) = state.socket.get() {
        let path = path.as_os_str().as_bytes();
        let length = path.len().min(MAX_SOCKET_PATH);
        answer.socket_path[..length].copy_from_slice(&path[..length]);
        answer.socket_path_length = (length as u16).into();
    }
    Ok(answer)
}

fn run(offset: u64, length: u64, lun: Option<(LunIndex, u64)>, state: u32) -> Run {
    let (lun, lun_offset) = lun.map_or((0, 0), |(lun, offset)| (u32::from(lun.get()), offset));
    Run {
        offset: offset.into(),
        length: length.into(),
        lun_offset: lun_offset.into(),
        lun: lun.into(),
        state: state.into(),
    }
}

fn extents(state: &Arc<State>, handle: Arc<FileHandle>, mut page: Box<RunPage>, reply: ReplyIoctl) {
    // Where everything is in memory the answer comes from here; else the actor reads pointers, a page's worth at a time.
    if fill_page(&handle.file, &mut page) {
        return reply.ioctl(0, page.as_bytes());
    }
    state.actor.send(move |volume| async move {
        match load_page(&volume, &handle, &mut page).await {
            Ok(()) => reply.ioctl(0, page.as_bytes()),
            Err(error) => reply.error(errno("extents", &error)),
        }
    });
}

async fn load_page(volume: &Volume, handle: &FileHandle, page: &mut RunPage) -> Result<(), FsError> {
    /// As much is loaded ahead at a time.
    const AHEAD: u64 = 64 << 20;
    let end = page.offset.get().saturating_add(page.length.get()).min(handle.file.size());
    let mut at = page.offset.get();
    while at < end {
        let piece = at..end.min(at.saturating_add(AHEAD));
        volume.files().load_runs(&handle.file, piece.clone()).await?;
        at = piece.end;
        if fill_page(&handle.file, page) {
            return Ok(());
        }
    }
    // The last look: what is being taken away right now stays out of the answer, which ends there.
    if fill_page(&handle.file, page) {
        return Ok(());
    }
    page.length =
        page.answered().last().map_or(0, |last| last.offset.get() + last.length.get() - page.offset.get()).into();
    Ok(())
}

/// Fills a page from the run map. True: it covers the request or is full, and `length` is what it covers. False: something must be
/// loaded first; `length` is as it was.
fn fill_page(file: &OpenFile, page: &mut RunPage) -> bool {
    let start = page.offset.get();
    let end = start.saturating_add(page.length.get()).min(file.size());
    page.count = 0.into();
    page.size = file.size().into();
    page.epoch_or_grant = 0.into();
    let mut at = start;
    while at < end {
        let next = match file.read_segment(at, end - at) {
            ReadSegment::Data(data) => run(at, data.length, Some((data.lun, data.offset)), run_state::DATA),
            ReadSegment::Zero(length) => run(at, length, None, run_state::ZERO),
            ReadSegment::End => break,
            ReadSegment::Unknown | ReadSegment::Inline | ReadSegment::Unlocked | ReadSegment::Physical => return false,
        };
        if !page.push(next) {
            page.length = (at - start).into();
            return true;
        }
        at += next.length.get();
    }
    page.length = at.saturating_sub(start).into();
    true
}

fn allocate(state: &Arc<State>, handle: Arc<FileHandle>, mut page: Box<RunPage>, reply: ReplyIoctl) {
    let start = page.offset.get();
    let Some(end) = start.checked_add(page.length.get()).filter(|end| *end <= handle.file.size() && start < *end)
    else {
        return reply.error(Errno::EINVAL);
    };
    state.actor.send(move |volume| async move {
        match volume.files().allocate(&handle.file, start..end).await {
            Ok(grant) => match lend(&handle, grant, &mut page) {
                Ok(()) => reply.ioctl(0, page.as_bytes()),
                Err(error) => reply.error(error),
            },
            Err(error) => reply.error(errno("allocate", &error)),
        }
    });
}

/// Lends a grant to the client. One of more pieces than a page holds is given up: the client asks for less.
fn lend(handle: &FileHandle, grant: Grant, page: &mut RunPage) -> Result<(), Errno> {
    page.count = 0.into();
    page.size = handle.file.size().into();
    let fits = grant
        .pieces()
        .iter()
        .all(|piece| page.push(run(piece.file_offset, piece.length, Some((piece.lun, piece.offset)), run_state::FILL)));
    if !fits {
        return Err(Errno::E2BIG);
    }
    page.length = grant.range().end.saturating_sub(page.offset.get()).into();
    page.epoch_or_grant = if grant.is_empty() { 0 } else { handle.direct.keep(grant) }.into();
    Ok(())
}

fn filled(handle: &FileHandle, request: &GrantRequest, reply: ReplyIoctl) {
    let Some(grant) = handle.direct.grants.lock().remove(&request.grant.get()) else {
        return reply.error(Errno::EINVAL);
    };
    if request.written.get() == 1 {
        let end = grant.range().end;
        grant.filled(end, false);
        handle.written.store(true, Ordering::Release);
    }
    reply.ioctl(0, &[]);
}

fn punch(state: &Arc<State>, handle: Arc<FileHandle>, request: &RangeRequest, reply: ReplyIoctl) {
    let start = request.offset.get();
    let Some(end) = start.checked_add(request.length.get()).filter(|end| *end <= handle.file.size()) else {
        return reply.error(Errno::EINVAL);
    };
    state.actor.send(move |volume| async move {
        match volume.files().punch(&handle.file, start..end).await {
            Ok(()) => reply.ioctl(0, &[]),
            Err(error) => reply.error(errno("punch", &error)),
        }
    });
}

fn flush(state: &Arc<State>, handle: Arc<FileHandle>, reply: ReplyIoctl) {
    // What the client wrote in place the mount has not seen: every LUN that it has a descriptor of is flushed.
    for lent in handle.direct.lent.lock().iter() {
        handle.file.note_write(lent.lun, 0);
    }
    state.actor.send(move |volume| async move {
        match volume.flush(&handle.file).await {
            Ok(()) => reply.ioctl(0, &[]),
            Err(error) => reply.error(errno("flush", &error)),
        }
    });
}
