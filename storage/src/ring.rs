//! Owns: reads, writes, flushes and allocation calls by the thread's io_uring, over data buffers, without a copy.
//! Promises: the file and the memory stay alive until the kernel has finished with them, even if nobody waits any more.
//! Must not know: disks, alignment, errors' meaning. No type of the ring's library leaves this file.
//! Unsafe: the kernel is handed addresses of data buffers (`preadv2`, `pwritev2`), and of a structure that it fills (`getrusage`).

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, squeue, types};
use scsi::DataBuffer;
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

/// The most segments of one operation: UIO_MAXIOV.
const MAX_SEGMENTS: usize = 1024;
/// The most bytes of a transfer that is done at once: copying more takes the thread longer than passing it on.
const MOST_AT_ONCE: usize = 512 << 10;
/// A write into the page cache that took this long, and slept, was made to wait by the disk or for memory.
const LONG: Duration = Duration::from_millis(30);
/// Time after one for which writes go by the ring, so that they hold up nobody else of this thread.
const PATIENCE: Duration = Duration::from_millis(500);

thread_local! {
    /// Operations of this thread's ring that have not ended.
    static UNDER_WAY: Cell<usize> = const { Cell::new(0) };
}

/// Operations of this thread's ring that have not ended. The ring is only looked at when the thread's runtime has nothing else to do: who
/// keeps it busy for the sake of speed waits while there are some.
pub fn transfers_under_way() -> usize {
    UNDER_WAY.get()
}

/// One of them.
struct UnderWay;

impl UnderWay {
    fn begin() -> UnderWay {
        UNDER_WAY.set(UNDER_WAY.get() + 1);
        UnderWay
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.set(UNDER_WAY.get() - 1);
    }
}

/// What must outlive an operation: the file, the memory, and the list that the kernel reads it from.
struct Held {
    _file: Rc<File>,
    _memory: [Option<DataBuffer>; 2],
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

/// Zeros around the bytes of a write.
#[derive(Clone, Copy)]
pub(super) struct Padding<'a> {
    /// Zeros, as often as needed; not empty, and as aligned as the file wants its memory.
    pub(super) zeros: &'a DataBuffer,
    /// Bytes of zeros before the others.
    pub(super) before: usize,
    /// Bytes of zeros behind them.
    pub(super) after: usize,
}

/// A file whose operations go through the io_uring of the thread that made it.
pub(super) struct RingFile {
    file: Rc<File>,
    /// Lists of former operations, to be used again: in the steady state nothing is allocated.
    spare: RefCell<Vec<Vec<libc::iovec>>>,
    /// Until then no write is done at once.
    busy_until: Cell<Option<Instant>>,
    /// Until then it is looked at whether writes sleep.
    watched_until: Cell<Option<Instant>>,
}

impl RingFile {
    pub(super) fn new(file: File) -> Self {
        Self {
            file: Rc::new(file),
            spare: RefCell::new(Vec::new()),
            busy_until: Cell::new(None),
            watched_until: Cell::new(None),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Reads all of `buffer` if all of it is in the page cache. `false`: it is not, and the buffer's content is undefined.
    pub(super) fn read_now(&self, position: u64, buffer: &DataBuffer) -> bool {
        buffer.len() <= MOST_AT_ONCE && self.now(Transfer::Read, position, buffer)
    }

    /// Writes all of `buffer` into the page cache, as long as such writes do not have to wait. `false`: it has to be written by
    /// [`RingFile::transfer`]; a part of it may have been written already.
    pub(super) fn write_now(&self, position: u64, buffer: &DataBuffer) -> bool {
        if buffer.len() > MOST_AT_ONCE {
            return false;
        }
        let start = Instant::now();
        if self.busy_until.get().is_some_and(|end| start < end) {
            return false;
        }
        // A thread that was not let onto a processor for long has not waited for the disk: only what sleeps counts. To look at that
        // takes two calls more, so it is done when something took long not long ago.
        let slept_before = self.watched_until.get().is_some_and(|end| start < end).then(sleeps);
        let is_done = self.now(Transfer::Write, position, buffer);
        let took = start.elapsed();
        if took > LONG {
            let until = Some(start + took + PATIENCE);
            self.watched_until.set(until);
            self.busy_until.set(until.filter(|_| slept_before.is_some_and(|before| sleeps() > before)));
        }
        is_done
    }

    fn now(&self, way: Transfer, position: u64, buffer: &DataBuffer) -> bool {
        let Ok(position) = libc::off64_t::try_from(position) else { return false };
        let mut vectors = self.spare.borrow_mut().pop().unwrap_or_default();
        extend(&mut vectors, buffer);
        let (fd, list, count) = (self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int);
        // SAFETY: the list and the segments that it names live until the call has returned, and no Rust reference to them exists
        // (contract of `SegmentList::push`).
        let moved = unsafe {
            match way {
                Transfer::Read => libc::preadv2(fd, list, count, position, libc::RWF_NOWAIT),
                _ => libc::pwritev2(fd, list, count, position, 0),
            }
        };
        vectors.clear();
        self.spare.borrow_mut().push(vectors);
        usize::try_from(moved).is_ok_and(|moved| moved == buffer.len())
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
        extend(&mut vectors, &buffer);
        // The list's memory does not move with the vector, and `Held` keeps it and the segments until the operation ends.
        let (list, count) = (vectors.as_ptr(), vectors.len() as u32);
        let entry = match way {
            Transfer::Read => opcode::Readv::new(fd, list, count).offset(position).build(),
            Transfer::Write => opcode::Writev::new(fd, list, count).offset(position).build(),
            Transfer::DurableWrite => {
                opcode::Writev::new(fd, list, count).offset(position).rw_flags(libc::RWF_DSYNC).build()
            }
        };
        self.submit(entry, [Some(buffer), None], vectors).await
    }

    /// Writes `buffer` with zeros around it; the zeros begin at byte `position`.
    pub(super) async fn write_padded(
        &self,
        position: u64,
        buffer: &DataBuffer,
        padding: Padding<'_>,
    ) -> io::Result<()> {
        let Padding { zeros, before, after } = padding;
        let total = before + buffer.len() + after;
        let mut done = 0;
        while done < total {
            let skipped = done.saturating_sub(before).min(buffer.len());
            let rest = buffer.slice(skipped..buffer.len());
            let behind = after - done.saturating_sub(before + buffer.len());
            let mut vectors = self.spare.borrow_mut().pop().unwrap_or_default();
            extend_zeros(&mut vectors, zeros, before.saturating_sub(done));
            extend(&mut vectors, &rest);
            extend_zeros(&mut vectors, zeros, behind);
            let (list, count) = (vectors.as_ptr(), vectors.len() as u32);
            let fd = types::Fd(self.file.as_raw_fd());
            let entry = opcode::Writev::new(fd, list, count).offset(position + done as u64).build();
            match self.submit(entry, [Some(rest), Some(zeros.clone())], vectors).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count as usize,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes written data durable.
    pub(super) async fn sync_data(&self) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        self.submit(entry, [None, None], Vec::new()).await.map(drop)
    }

    /// fallocate(2) with `mode`.
    pub(super) async fn allocate(&self, mode: i32, position: u64, length: u64) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = opcode::Fallocate::new(fd, length).offset(position).mode(mode).build();
        self.submit(entry, [None, None], Vec::new()).await.map(drop)
    }

    async fn submit(
        &self,
        entry: squeue::Entry,
        memory: [Option<DataBuffer>; 2],
        vectors: Vec<libc::iovec>,
    ) -> io::Result<u32> {
        let held = Held { _file: self.file.clone(), _memory: memory, vectors };
        let _under_way = UnderWay::begin();
        let (result, mut held) = UnsubmittedOneshot::new(held, Ended, entry).submit().await;
        if held.vectors.capacity() > 0 {
            held.vectors.clear();
            self.spare.borrow_mut().push(held.vectors);
        }
        result
    }
}

/// How often this thread has slept.
fn sleeps() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage(2) writes into the structure that it is given, which is valid as zeros too.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

/// Adds the memory of `buffer`, as far as one operation takes it.
fn extend(vectors: &mut Vec<libc::iovec>, buffer: &DataBuffer) {
    let room = MAX_SEGMENTS - vectors.len();
    let parts = buffer.segments().take(room);
    vectors.extend(parts.map(|part| libc::iovec { iov_base: part.pointer().as_ptr().cast(), iov_len: part.length() }));
}

/// Adds `length` zeros, as far as one operation takes them.
fn extend_zeros(vectors: &mut Vec<libc::iovec>, zeros: &DataBuffer, mut length: usize) {
    while length > 0 && vectors.len() < MAX_SEGMENTS {
        let part = zeros.slice(0..length.min(zeros.len()));
        extend(vectors, &part);
        length -= part.len();
    }
}
