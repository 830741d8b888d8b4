//! Owns: reads, writes, flushes and allocation calls by the thread's io_uring, over data buffers, without a copy.
//! Promises: the file and the memory stay alive until the kernel has finished with them, even if nobody waits any more.
//! Must not know: disks, alignment, errors' meaning. No type of the ring's library leaves this file.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use io_uring::{cqueue, opcode, squeue, types};
use scsi::DataBuffer;
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

/// The most segments of one operation: UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;

/// What must outlive an operation: the file, the memory, and the list that the kernel reads it from.
struct Held {
    _file: Rc<File>,
    _memory: Option<DataBuffer>,
    vectors: Vec<libc::iovec>,
}

/// Gives back the operation's result and what was held.
struct Ended;

impl OneshotOutputTransform for Ended {
    type Output = (io::Result<u32>, Held);
    type StoredData = Held;

    fn transform_oneshot_output(self, held: Held, entry: cqueue::Entry) -> Self::Output {
        let result = u32::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        (result, held)
    }
}

/// Which way data moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    Read,
    Write,
    /// A write that is durable when it has ended (RWF_DSYNC).
    DurableWrite,
}

/// A file whose operations go through the io_uring of the thread that made it.
pub(super) struct RingFile {
    file: Rc<File>,
    /// Lists of former operations, to be used again: in the steady state nothing is allocated.
    spare: RefCell<Vec<Vec<libc::iovec>>>,
}

impl RingFile {
    pub(super) fn new(file: File) -> Self {
        Self { file: Rc::new(file), spare: RefCell::new(Vec::new()) }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Moves all of `buffer` from or to byte `position`.
    pub(super) async fn transfer(&self, way: Transfer, position: u64, buffer: &DataBuffer) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.transfer_once(way, position + done as u64, buffer.slice(done..buffer.len())).await {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One operation; returns the bytes moved, which may be fewer than all.
    async fn transfer_once(&self, way: Transfer, position: u64, buffer: DataBuffer) -> io::Result<u32> {
        let fd = types::Fd(self.file.as_raw_fd());
        let mut vectors = self.spare.borrow_mut().pop().unwrap_or_default();
        vectors.extend(
            buffer
                .segments()
                .take(MAX_SEGMENTS)
                .map(|segment| libc::iovec { iov_base: segment.pointer().as_ptr().cast(), iov_len: segment.length() }),
        );
        // The list's memory does not move with the vector, and `Held` keeps it and the segments until the operation ends.
        let (list, count) = (vectors.as_ptr(), vectors.len() as u32);
        let entry = match way {
            Transfer::Read => opcode::Readv::new(fd, list, count).offset(position).build(),
            Transfer::Write => opcode::Writev::new(fd, list, count).offset(position).build(),
            Transfer::DurableWrite => {
                opcode::Writev::new(fd, list, count).offset(position).rw_flags(libc::RWF_DSYNC).build()
            }
        };
        self.submit(entry, Some(buffer), vectors).await
    }

    /// Makes written data durable.
    pub(super) async fn sync_data(&self) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        self.submit(entry, None, Vec::new()).await.map(drop)
    }

    /// fallocate(2) with `mode`.
    pub(super) async fn allocate(&self, mode: i32, position: u64, length: u64) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::Fallocate::new(fd, length).offset(position).mode(mode).build();
        self.submit(entry, None, Vec::new()).await.map(drop)
    }

    async fn submit(
        &self,
        entry: squeue::Entry,
        memory: Option<DataBuffer>,
        vectors: Vec<libc::iovec>,
    ) -> io::Result<u32> {
        let held = Held { _file: self.file.clone(), _memory: memory, vectors };
        let (result, mut held) = UnsubmittedOneshot::new(held, Ended, entry).submit().await;
        if held.vectors.capacity() > 0 {
            held.vectors.clear();
            self.spare.borrow_mut().push(held.vectors);
        }
        result
    }
}
