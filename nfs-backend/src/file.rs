//! Owns: the data of one file on a server: reads, writes, and what was written but is not durable yet.
//! Promises: what was acknowledged is there after any restart of the server: it is kept until a COMMIT proves it durable, and written again when the
//! write verifier says that it may be lost, before anything else reaches the new server. No allocation for a request in the steady state.
//! Must not know: locks, disks, guest memory.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use futures_util::future::{LocalBoxFuture, join_all};
use scsi::DataBuffer;
use tokio::sync::Mutex;

use crate::error::NfsError;
use crate::nfs3::{FileHandle, FsInfo, Stability, Verifier};
use crate::remote::Remote;

/// Most bytes of one READ or WRITE, whatever the server takes.
pub const MOST_BYTES: u32 = 1 << 20;
/// Bytes that may be written and not durable before a COMMIT is sent beside the writes that follow. Their memory goes round: this much stays
/// in a processor's caches, and a server has enough to write at once.
const COMMIT_FROM: usize = 4 << 20;
/// Bytes that may be written and not durable; then a write first makes all of them durable.
const MOST_KEPT: usize = 64 << 20;
/// Writes that are sent again at once.
const BATCH: usize = 16;

/// Memory of finished writes for the next ones, by the powers of two of its size.
#[derive(Default)]
struct Spare {
    by_size: [Vec<Vec<u8>>; SIZES],
    bytes: usize,
}

/// Smallest power of two that is kept apart: smaller memory is together.
const SMALLEST: u32 = 12;
/// From 4 KiB to [`MOST_BYTES`].
const SIZES: usize = (MOST_BYTES.ilog2() - SMALLEST + 1) as usize;
/// Bytes that are kept: as many as steady writing needs while a COMMIT takes its time.
const MOST_SPARE: usize = 4 * COMMIT_FROM;

impl Spare {
    fn class(length: usize) -> usize {
        (length.max(1).next_power_of_two().ilog2().saturating_sub(SMALLEST) as usize).min(SIZES - 1)
    }

    /// Memory of `length` bytes, whatever they are.
    fn take(&mut self, length: usize) -> Vec<u8> {
        let mut memory = self.by_size[Self::class(length)].pop().unwrap_or_default();
        self.bytes -= memory.capacity();
        if memory.capacity() < length {
            memory = Vec::with_capacity(length.next_power_of_two());
        }
        // What is there already is not written again.
        memory.resize(length, 0);
        memory
    }

    fn give(&mut self, memory: Vec<u8>) {
        if self.bytes + memory.capacity() <= MOST_SPARE && memory.capacity() > 0 {
            self.bytes += memory.capacity();
            self.by_size[Self::class(memory.len())].push(memory);
        }
    }
}

/// A write that is acknowledged and perhaps not durable.
struct Kept {
    position: u64,
    length: u32,
    /// The written bytes are its first.
    data: Vec<u8>,
    verifier: Verifier,
}

impl Kept {
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
    /// A COMMIT has failed: the server may have dropped some of it, and a later COMMIT may not say so.
    in_doubt: bool,
    spare: Spare,
}

impl Log {
    fn push(&mut self, kept: Kept) {
        self.bytes += kept.data.capacity();
        self.kept.push_back(kept);
    }

    fn end(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    /// The first `count` are durable.
    fn settle(&mut self, count: usize) {
        for kept in self.kept.drain(..count) {
            self.bytes -= kept.data.capacity();
            self.spare.give(kept.data);
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
    /// A COMMIT is under way beside the writes.
    is_committing: Cell<bool>,
    /// Held by the one write that makes room.
    making_room: Mutex<()>,
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
        let inner = Rc::new(Inner {
            server,
            handle,
            most_read,
            most_write,
            gated,
            log: RefCell::default(),
            is_committing: Cell::new(false),
            making_room: Mutex::new(()),
        });
        let weak = Rc::downgrade(&inner);
        inner.server.client().on_connect(Box::new(move || recovery(&weak)));
        Self { inner }
    }

    /// The server.
    pub fn server(&self) -> &Remote {
        &self.inner.server
    }

    /// Reads as many bytes at `position` as `buffer` holds, straight into it. After an error what it holds is not defined.
    ///
    /// # Errors
    /// [`NfsError`]; `Nonsense` if the file ends before.
    pub async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), NfsError> {
        let inner = &self.inner;
        let (mut done, length) = (0, buffer.len());
        while done < length {
            let wanted = (length - done).min(inner.most_read as usize);
            let at = position + done as u64;
            let part = buffer.slice(done..done + wanted);
            let (count, is_end) = inner.server.read_to(&inner.handle, at, &part).await?;
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
                let _turn = inner.making_room.lock().await;
                if inner.log.borrow().bytes > MOST_KEPT {
                    inner.flush().await?;
                }
            }
            let wanted = (length - done).min(inner.most_write as usize);
            let at = position + done as u64;
            let mut data = inner.log.borrow_mut().spare.take(wanted);
            fill(done, &mut data);
            let written = inner.server.write(&inner.handle, at, &mut data, stability, (inner.gated, false)).await?;
            done += written.count as usize;
            let (is_new, is_much) = {
                let mut log = inner.log.borrow_mut();
                // One that is durable stands behind older ones that are not: it has to come after them if they are written again.
                if written.is_durable && log.kept.is_empty() {
                    log.spare.give(data);
                    (false, false)
                } else {
                    let verifier = written.verifier;
                    log.push(Kept { position: at, length: written.count, data, verifier });
                    let is_new = log.verifier.replace(verifier).is_some_and(|known| known != verifier);
                    (is_new, log.bytes >= COMMIT_FROM && !log.in_doubt)
                }
            };
            if is_new {
                inner.server.client().reconnect("the server was started again: it has a new write verifier").await;
            } else if is_much && !inner.is_committing.replace(true) {
                tokio::task::spawn_local(commit_beside(inner.clone()));
            }
        }
        Ok(())
    }

    /// Makes all that was written before durable.
    ///
    /// # Errors
    /// [`NfsError`]: it may or may not be durable.
    pub async fn flush(&self) -> Result<(), NfsError> {
        self.inner.flush().await
    }

    /// Gives the file another size, after all that was written is durable; what comes in addition reads as zeros.
    ///
    /// # Errors
    /// [`NfsError`]: it may have the old or the new size.
    pub async fn set_size(&self, size: u64) -> Result<(), NfsError> {
        self.flush().await?;
        let inner = &self.inner;
        inner.server.by_v3("SETATTR")?.set_size(&inner.handle, size, inner.gated).await?;
        match inner.server.attributes(&inner.handle).await?.size {
            found if found == size => Ok(()),
            found => {
                let cause = format!("a file of {found} bytes where {size} were asked for");
                Err(NfsError::Nonsense { procedure: "SETATTR", cause })
            }
        }
    }

    /// Gives a file another name, and takes that from any other file, in the right that this file's writes have.
    pub(crate) async fn rename(&self, directory: &FileHandle, from: &str, to: &str) -> Result<(), NfsError> {
        let (from, to) = ((directory, from.as_bytes()), (directory, to.as_bytes()));
        self.inner.server.by_v3("RENAME")?.rename(from, to, self.inner.gated).await
    }

    /// Writes that are acknowledged and not known to be durable.
    pub fn unsettled(&self) -> usize {
        self.inner.log.borrow().kept.len()
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        // A COMMIT or a recovery that is under way does not outlive it.
        self.inner.server.client().close("the file was closed");
    }
}

impl Inner {
    async fn flush(&self) -> Result<(), NfsError> {
        let end = self.log.borrow().end();
        while self.log.borrow().first < end {
            if self.log.borrow().in_doubt {
                self.server.client().reconnect("a COMMIT has failed: what it was for is written again").await;
                if self.log.borrow().in_doubt {
                    // The client was closed: a call says why.
                    self.server.commit(&self.handle, false).await?;
                }
                continue;
            }
            let committed = match self.server.commit(&self.handle, false).await {
                Err(error @ NfsError::Refused { .. }) => {
                    self.log.borrow_mut().in_doubt = true;
                    return Err(error);
                }
                other => other?,
            };
            let is_same = {
                let mut log = self.log.borrow_mut();
                let count = end.saturating_sub(log.first) as usize;
                let is_same = log.kept.iter().take(count).all(|kept| kept.verifier == committed.verifier);
                if is_same && !log.in_doubt {
                    log.settle(count);
                }
                is_same
            };
            if !is_same {
                self.server.client().reconnect("a COMMIT came with a new write verifier").await;
            }
        }
        Ok(())
    }
}

/// Makes room before it is needed. If it fails, the next flush says so, or mends it.
async fn commit_beside(file: Rc<Inner>) {
    if let Err(error) = file.flush().await {
        tracing::debug!(server = file.server.client().name(), "{error}");
    }
    file.is_committing.set(false);
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
        let mut log = file.log.borrow_mut();
        (log.verifier, log.in_doubt) = (None, false);
        return Ok(());
    }
    let verifier = match file.server.commit(&file.handle, true).await {
        // Whatever it could not make durable is written again.
        Err(NfsError::Refused { .. }) => None,
        other => Some(other?.verifier),
    };
    {
        let mut log = file.log.borrow_mut();
        let is_known = |kept: &&Kept| Some(kept.verifier) == verifier && !log.in_doubt;
        let same = log.kept.iter().take_while(is_known).count();
        log.settle(same);
        log.verifier = verifier;
        if !log.kept.is_empty() {
            tracing::warn!(
                server = file.server.client().name(),
                writes = log.kept.len(),
                "what the server may have lost is written again"
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
            file.log.borrow_mut().in_doubt = false;
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
        let mut data = {
            let mut log = file.log.borrow_mut();
            let mut data = log.spare.take((length - done) as usize);
            data.copy_from_slice(&log.kept[nth].data[done as usize..length as usize]);
            data
        };
        let at = position + u64::from(done);
        let written = file.server.write(&file.handle, at, &mut data, Stability::FileSync, (file.gated, true)).await?;
        done += written.count;
        file.log.borrow_mut().spare.give(data);
    }
    Ok(())
}
