//! Owns: the data of one file on a server: reads, writes, and what was written but is not durable yet.
//! Promises: what was acknowledged is there after any restart of the server: it is kept until a COMMIT proves it durable, and written again when the
//! write verifier says that it may be lost, before anything else reaches the new server. No allocation for a request in the steady state.
//! Must not know: locks, disks, guest memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use futures_util::future::{LocalBoxFuture, join_all};

use crate::error::NfsError;
use crate::nfs3::{FileHandle, FsInfo, Stability, Verifier};
use crate::remote::Remote;
use crate::xdr::padding;

/// Most bytes of one READ or WRITE, whatever the server takes.
pub const MOST_BYTES: u32 = 1 << 20;
/// Bytes that may be written and not durable; then a write first makes all of them durable.
const MOST_KEPT: usize = 64 << 20;
/// Writes that are sent again at once.
const BATCH: usize = 16;
/// Buffers of finished writes that are kept for the next ones.
const MOST_SPARE: usize = 256;
/// Bytes of buffers that are kept.
const LARGEST_SPARE: usize = 256 << 10;

/// A write that is acknowledged and perhaps not durable.
struct Kept {
    position: u64,
    length: u32,
    /// The whole call as it was sent; the written bytes are the first of those at its end.
    call: Vec<u8>,
    /// Where they begin in it.
    start: usize,
    verifier: Verifier,
}

impl Kept {
    fn data(&self) -> &[u8] {
        &self.call[self.start..self.start + self.length as usize]
    }

    fn overlaps(&self, other: &Kept) -> bool {
        self.position < other.position + u64::from(other.length)
            && other.position < self.position + u64::from(self.length)
    }
}

/// All such writes, in the order in which they were acknowledged.
#[derive(Default)]
struct Log {
    kept: VecDeque<Kept>,
    /// Number of the first.
    first: u64,
    bytes: usize,
    /// What the server said last.
    verifier: Option<Verifier>,
    spare: Vec<Vec<u8>>,
}

impl Log {
    fn push(&mut self, kept: Kept) {
        self.bytes += kept.call.len();
        self.kept.push_back(kept);
    }

    fn end(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    /// The first `count` are durable.
    fn settle(&mut self, count: usize) {
        for kept in self.kept.drain(..count) {
            self.bytes -= kept.call.len();
            if self.spare.len() < MOST_SPARE && kept.call.capacity() <= LARGEST_SPARE {
                self.spare.push(kept.call);
            }
        }
        self.first += count as u64;
    }
}

struct Inner {
    server: Remote,
    handle: FileHandle,
    most_read: u32,
    most_write: u32,
    gated: bool,
    log: RefCell<Log>,
}

/// The data of a file.
pub struct DataFile {
    inner: Rc<Inner>,
}

impl DataFile {
    /// Of the file `handle`; its writes are sent only while the gate is open, if they are `gated`. Nothing else may use the server's client for
    /// writes.
    pub fn new(server: Remote, handle: FileHandle, limits: FsInfo, gated: bool) -> Self {
        let most = |limit: u32| if limit == 0 { 4096 } else { limit.min(MOST_BYTES) };
        let (most_read, most_write) = (most(limits.most_read), most(limits.most_write));
        let inner = Rc::new(Inner { server, handle, most_read, most_write, gated, log: RefCell::default() });
        let weak = Rc::downgrade(&inner);
        inner.server.client().on_connect(Box::new(move || recovery(&weak)));
        Self { inner }
    }

    /// The server.
    pub fn server(&self) -> &Remote {
        &self.inner.server
    }

    /// Reads `length` bytes at `position`; `sink` gets them in pieces, each with its offset.
    ///
    /// # Errors
    /// [`NfsError`]; `Nonsense` if the file ends before.
    pub async fn read(&self, position: u64, length: usize, sink: impl Fn(usize, &[u8])) -> Result<(), NfsError> {
        let inner = &self.inner;
        let mut done = 0;
        while done < length {
            let wanted = (length - done).min(inner.most_read as usize) as u32;
            let at = position + done as u64;
            let (count, is_end) = inner.server.read(&inner.handle, at, wanted, |data| sink(done, data)).await?;
            done += count as usize;
            if is_end && done < length {
                let cause = format!("the file ends at byte {}, it was longer", position + done as u64);
                return Err(NfsError::Nonsense { procedure: "READ", cause });
            }
        }
        Ok(())
    }

    /// Writes `length` bytes at `position`, which `fill` gives in pieces by their offsets. With `durable` they are durable then.
    ///
    /// # Errors
    /// [`NfsError`]: what is written then is not defined.
    pub async fn write(
        &self,
        position: u64,
        length: usize,
        durable: bool,
        fill: impl Fn(usize, &mut [u8]),
    ) -> Result<(), NfsError> {
        let inner = &self.inner;
        let stability = if durable { Stability::FileSync } else { Stability::Unstable };
        let mut done = 0;
        while done < length {
            if inner.log.borrow().bytes > MOST_KEPT {
                self.flush().await?;
            }
            let wanted = (length - done).min(inner.most_write as usize) as u32;
            let at = position + done as u64;
            let mut call = inner.log.borrow_mut().spare.pop().unwrap_or_default();
            let sent = inner.server.write(
                &inner.handle,
                (at, wanted),
                stability,
                (inner.gated, false),
                |to| fill(done, to),
                Some(&mut call),
            );
            let written = sent.await?;
            done += written.count as usize;
            let is_new = {
                let mut log = inner.log.borrow_mut();
                // One that is durable stands behind older ones that are not: it has to come after them if they are written again.
                if written.is_durable && log.kept.is_empty() {
                    log.spare.push(call);
                    false
                } else {
                    let start = call.len() - wanted as usize - padding(wanted as usize);
                    let verifier = written.verifier;
                    log.push(Kept { position: at, length: written.count, call, start, verifier });
                    log.verifier.replace(verifier).is_some_and(|known| known != verifier)
                }
            };
            if is_new {
                inner.server.client().reconnect("the server was started again: it has a new write verifier").await;
            }
        }
        Ok(())
    }

    /// Makes all that was written before durable.
    ///
    /// # Errors
    /// [`NfsError`]: it may or may not be durable.
    pub async fn flush(&self) -> Result<(), NfsError> {
        let inner = &self.inner;
        let end = inner.log.borrow().end();
        while inner.log.borrow().first < end {
            let committed = inner.server.commit(&inner.handle, false).await?;
            let is_same = {
                let mut log = inner.log.borrow_mut();
                let count = end.saturating_sub(log.first) as usize;
                let is_same = log.kept.iter().take(count).all(|kept| kept.verifier == committed.verifier);
                if is_same {
                    log.settle(count);
                }
                is_same
            };
            if !is_same {
                inner.server.client().reconnect("a COMMIT came with a new write verifier").await;
            }
        }
        Ok(())
    }

    /// Writes that are acknowledged and not known to be durable.
    pub fn unsettled(&self) -> usize {
        self.inner.log.borrow().kept.len()
    }
}

/// What is done on each new connection before any other call.
fn recovery(file: &Weak<Inner>) -> LocalBoxFuture<'static, ()> {
    let file = file.upgrade();
    Box::pin(async move {
        if let Some(file) = file
            && let Err(error) = recover(&file).await
        {
            // Acknowledged data are lost: nothing may build on them.
            let cause =
                format!("writes that were acknowledged cannot be written again after the server was lost: {error}");
            tracing::error!(server = file.server.client().name(), "{cause}");
            file.server.client().close(&cause);
        }
    })
}

async fn recover(file: &Inner) -> Result<(), NfsError> {
    if file.log.borrow().kept.is_empty() {
        file.log.borrow_mut().verifier = None;
        return Ok(());
    }
    let verifier = file.server.commit(&file.handle, true).await?.verifier;
    {
        let mut log = file.log.borrow_mut();
        let same = log.kept.iter().take_while(|kept| kept.verifier == verifier).count();
        log.settle(same);
        log.verifier = Some(verifier);
        if !log.kept.is_empty() {
            tracing::warn!(
                server = file.server.client().name(),
                writes = log.kept.len(),
                "the server was started again: what it may have lost is written again"
            );
        }
    }
    loop {
        // In their order, side by side only as far as they do not overlap.
        let count = {
            let log = file.log.borrow();
            let overlaps = |nth: usize| (0..nth).any(|other| log.kept[other].overlaps(&log.kept[nth]));
            (0..log.kept.len().min(BATCH)).take_while(|nth| !overlaps(*nth)).count()
        };
        if count == 0 {
            return Ok(());
        }
        let again = join_all((0..count).map(|nth| write_again(file, nth))).await;
        again.into_iter().collect::<Result<Vec<()>, _>>()?;
        file.log.borrow_mut().settle(count);
    }
}

/// Writes one of the log's writes again, durably. It stays in the log.
async fn write_again(file: &Inner, nth: usize) -> Result<(), NfsError> {
    let (position, length) = {
        let log = file.log.borrow();
        (log.kept[nth].position, log.kept[nth].length)
    };
    let mut done = 0;
    while done < length {
        let fill = |to: &mut [u8]| {
            let log = file.log.borrow();
            to.copy_from_slice(&log.kept[nth].data()[done as usize..]);
        };
        let range = (position + u64::from(done), length - done);
        let how = (file.gated, true);
        let written = file.server.write(&file.handle, range, Stability::FileSync, how, fill, None).await?;
        done += written.count;
    }
    Ok(())
}
