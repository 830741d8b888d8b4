//! Owns: which programs know where bytes of open disks lie, and taking ranges back from them while blocks are moved.
//! Promises: a recall ends when every program that could know a place has said that it forgot it and has nothing in flight there; who
//!   comes later waits until it is over. Must not know: the socket's messages, how blocks are moved.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use lockd::protocol::Recall;
use lockd::server::ClientId;
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::Notify;
use vmfs_core::env::LocalFuture;
use vmfs_core::error::FsError;
use vmfs_core::file::{Borrowers, Recalled};
use vmfs_core::units::FdId;

use crate::handles::FileHandle;

/// The programs and what they are asked to let go of.
#[derive(Default)]
pub struct Recalls {
    table: Mutex<Table>,
    /// Somebody has let go or has gone: for the actor.
    let_go: Notify,
    /// A recall is over: for connections.
    over: Condvar,
}

#[derive(Default)]
struct Table {
    programs: HashMap<ClientId, Program>,
    last: u64,
    active: Option<Active>,
}

/// A program that has attached to an open disk.
struct Program {
    fd: FdId,
    handle: Weak<FileHandle>,
    event: OwnedFd,
    /// A range whose bytes are in doubt: it does not come back.
    kept: Option<Recall>,
}

/// The recall that goes on: there is one at a time.
struct Active {
    fd: FdId,
    recall: Recall,
    waiting: BTreeSet<ClientId>,
    /// It did not end well: the programs give the disk up and the range does not come back.
    given_up: bool,
}

impl Program {
    fn raise(&self) {
        // The counter is far from its end, so that the write cannot fail.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl Table {
    fn raise(&self, fd: FdId) {
        self.programs.values().filter(|program| program.fd == fd).for_each(Program::raise);
    }
}

impl Recalls {
    /// A program is about to learn where bytes of an open disk lie; gives the event that tells it of recalls. Waits while blocks of the
    /// disk are being moved, unless the program has attached before.
    pub fn attach(&self, client: ClientId, handle: &Arc<FileHandle>) -> io::Result<OwnedFd> {
        let fd = handle.file.fd();
        let mut table = self.table.lock();
        if let Some(program) = table.programs.get(&client) {
            return match program.handle.as_ptr() == Arc::as_ptr(handle) {
                true => program.event.try_clone(),
                false => Err(io::Error::other("one connection is for one open disk")),
            };
        }
        self.over.wait_while(&mut table, |table| table.active.as_ref().is_some_and(|active| active.fd == fd));
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let copy = event.try_clone()?;
        table.programs.insert(client, Program { fd, handle: Arc::downgrade(handle), event, kept: None });
        Ok(copy)
    }

    /// Whether a program that moves data of this open disk is told of recalls.
    pub fn has_attached(&self, client: ClientId, handle: &Arc<FileHandle>) -> bool {
        self.table.lock().programs.get(&client).is_some_and(|program| program.handle.as_ptr() == Arc::as_ptr(handle))
    }

    /// A program has let go of the range of a recall (0: of none); gives what is wanted of its disk now.
    pub fn answered(&self, client: ClientId, let_go: u64) -> Option<Recall> {
        let mut table = self.table.lock();
        let program = table.programs.get(&client)?;
        if program.kept.is_some() {
            return program.kept;
        }
        let fd = program.fd;
        let active = table.active.as_mut().filter(|active| active.fd == fd)?;
        if active.recall.number == let_go && active.waiting.remove(&client) {
            self.let_go.notify_waiters();
        }
        Some(active.recall)
    }

    /// A file was closed and nothing of the programs that used it is in flight.
    pub fn closed(&self, handle: &Arc<FileHandle>) {
        let mut table = self.table.lock();
        let here = Arc::as_ptr(handle);
        table.programs.retain(|_, program| program.handle.as_ptr() != here);
        let Table { programs, active, .. } = &mut *table;
        if let Some(active) = active {
            active.waiting.retain(|client| programs.contains_key(client));
        }
        self.let_go.notify_waiters();
    }

    fn begin(self: &Arc<Self>, fd: FdId, range: &Range<u64>) -> OneRecall {
        let mut table = self.table.lock();
        table.last += 1;
        let recall = Recall { number: table.last, offset: range.start, length: range.end - range.start };
        let waiting =
            table.programs.iter().filter(|(_, program)| program.fd == fd).map(|(client, _)| *client).collect();
        table.active = Some(Active { fd, recall, waiting, given_up: false });
        table.raise(fd);
        OneRecall { recalls: self.clone() }
    }

    fn is_let_go(&self) -> bool {
        self.table.lock().active.as_ref().is_none_or(|active| active.waiting.is_empty())
    }
}

/// The programs, as the volume asks for blocks.
pub struct Programs(pub Arc<Recalls>);

impl Borrowers for Programs {
    fn recall(&self, fd: FdId, range: Range<u64>) -> LocalFuture<'static, Result<Box<dyn Recalled>, FsError>> {
        let recalls = self.0.clone();
        Box::pin(async move {
            let one = recalls.begin(fd, &range);
            loop {
                let mut changed = std::pin::pin!(recalls.let_go.notified());
                changed.as_mut().enable();
                if recalls.is_let_go() {
                    return Ok(Box::new(one) as Box<dyn Recalled>);
                }
                changed.await;
            }
        })
    }
}

/// A recall that goes on; dropping it gives the range back.
struct OneRecall {
    recalls: Arc<Recalls>,
}

impl Recalled for OneRecall {
    fn give_up(self: Box<Self>) {
        if let Some(active) = &mut self.recalls.table.lock().active {
            active.given_up = true;
        }
    }
}

impl Drop for OneRecall {
    fn drop(&mut self) {
        let mut table = self.recalls.table.lock();
        let Some(active) = table.active.take() else { return };
        if active.given_up {
            // They keep the range as it is, unknown, and hear that they have to close the disk.
            for program in table.programs.values_mut().filter(|program| program.fd == active.fd) {
                program.kept = Some(active.recall);
                if let Some(handle) = program.handle.upgrade() {
                    handle.direct.raise_revoke();
                }
            }
        } else {
            table.raise(active.fd);
        }
        self.recalls.over.notify_all();
    }
}
