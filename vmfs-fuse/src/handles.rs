//! Owns: what the kernel has open: files and directories by handle number, and their tickets.
//! Promises: a handle number is found without a global lock; a ticket is good until its handle is closed.
//! Must not know: FUSE replies, how data is moved.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lockd::protocol::Ticket;
use parking_lot::{Mutex, RwLock};
use rustix::event::{EventfdFlags, eventfd};
use vmfs_core::file::{Grant, OpenFile};
use vmfs_core::lun::DataLun;
use vmfs_core::units::LunIndex;

const SHARDS: usize = 32;

/// What was given to another program to reach a LUN by.
#[derive(Clone)]
pub struct Lent {
    /// The LUN.
    pub lun: LunIndex,
    /// What it is.
    pub means: Means,
}

impl Lent {
    /// Whether both are the same.
    pub fn is(&self, other: &Lent) -> bool {
        let means = match (&self.means, &other.means) {
            (Means::Descriptor { byte }, Means::Descriptor { byte: of_other }) => byte == of_other,
            (Means::Session { port, .. }, Means::Session { port: of_other, .. }) => port == of_other,
            _ => false,
        };
        self.lun == other.lun && means
    }
}

/// How the end of what a program does on a LUN is proven.
#[derive(Clone)]
pub enum Means {
    /// A data descriptor: by the lock of this byte of the drain range, which it holds.
    Descriptor {
        /// The locked byte.
        byte: u64,
    },
    /// A session: by the storage.
    Session {
        /// Who has lent it.
        data: Arc<dyn DataLun>,
        /// Its number.
        port: u64,
        /// Where it leads, as the storage says; `None`: it never was confirmed, so no data have gone over it.
        place: Option<Option<String>>,
    },
}

/// What another program that moves the file's data itself has of this mount.
#[derive(Default)]
pub struct Direct {
    /// Space lent for first writes.
    pub grants: Mutex<HashMap<u64, Grant>>,
    /// Descriptors and sessions lent.
    pub lent: Mutex<Vec<Lent>>,
    /// Raised when the program should let go.
    pub revoke: Mutex<Option<OwnedFd>>,
    next_grant: AtomicU64,
}

impl Direct {
    /// Keeps a grant for the program; gives its number, never 0.
    pub fn keep(&self, grant: Grant) -> u64 {
        let number = self.next_grant.fetch_add(1, Ordering::Relaxed) + 1;
        self.grants.lock().insert(number, grant);
        number
    }

    /// The event that tells the program to let go.
    pub fn revoke_event(&self) -> io::Result<OwnedFd> {
        let mut event = self.revoke.lock();
        match &*event {
            Some(event) => event.try_clone(),
            None => {
                let new = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let copy = new.try_clone()?;
                *event = Some(new);
                Ok(copy)
            }
        }
    }

    /// Tells the program to let go.
    pub fn raise_revoke(&self) {
        if let Some(event) = &*self.revoke.lock() {
            // The counter is far from its end, so that the write cannot fail.
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
    }
}

/// One open file.
pub struct FileHandle {
    /// The open file.
    pub file: Arc<OpenFile>,
    /// Opened for writing.
    pub writable: bool,
    /// Something was written since the last flush.
    pub written: AtomicBool,
    /// Clients of the extent ioctl.
    pub direct: Direct,
    ticket: Mutex<Option<Ticket>>,
}

impl FileHandle {
    /// A handle on an open file.
    pub fn new(file: Arc<OpenFile>, writable: bool) -> FileHandle {
        let written = AtomicBool::new(false);
        FileHandle { file, writable, written, direct: Direct::default(), ticket: Mutex::new(None) }
    }
}

/// What a handle number means.
#[derive(Clone)]
pub enum Handle {
    /// An open file.
    File(Arc<FileHandle>),
    /// An open directory: its node number, and its ticket once it has one.
    Directory(u64, Arc<Mutex<Option<Ticket>>>),
}

#[derive(Default)]
struct Shard(RwLock<HashMap<u64, Handle>>);

/// All handles.
#[derive(Default)]
pub struct Handles {
    shards: [Shard; SHARDS],
    next: AtomicU64,
    tickets: Mutex<HashMap<[u8; 16], u64>>,
}

impl Handles {
    fn shard(&self, number: u64) -> &RwLock<HashMap<u64, Handle>> {
        &self.shards[number as usize % SHARDS].0
    }

    /// Adds a handle and gives its number.
    pub fn add(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.shard(number).write().insert(number, handle);
        number
    }

    /// The open file of a handle number.
    pub fn file(&self, number: u64) -> Option<Arc<FileHandle>> {
        match self.shard(number).read().get(&number) {
            Some(Handle::File(file)) => Some(file.clone()),
            _ => None,
        }
    }

    /// What a handle number means.
    pub fn get(&self, number: u64) -> Option<Handle> {
        self.shard(number).read().get(&number).cloned()
    }

    /// Takes a handle out, with its ticket.
    pub fn remove(&self, number: u64) -> Option<Handle> {
        let handle = self.shard(number).write().remove(&number)?;
        let ticket = match &handle {
            Handle::File(file) => file.ticket.lock().take(),
            Handle::Directory(_, ticket) => ticket.lock().take(),
        };
        if let Some(ticket) = ticket {
            self.tickets.lock().remove(&ticket.0);
        }
        Some(handle)
    }

    /// The ticket of a handle: random, so that it names an open file to the socket only for who has that file open.
    pub fn ticket(&self, number: u64) -> Option<Ticket> {
        let handle = self.get(number)?;
        let place = match &handle {
            Handle::File(file) => &file.ticket,
            Handle::Directory(_, ticket) => ticket,
        };
        let mut place = place.lock();
        if place.is_none() {
            let mut bytes = [0; 16];
            getrandom::fill(&mut bytes).ok()?;
            self.tickets.lock().insert(bytes, number);
            *place = Some(Ticket(bytes));
        }
        *place
    }

    /// What a ticket names.
    pub fn by_ticket(&self, ticket: Ticket) -> Option<Handle> {
        let number = *self.tickets.lock().get(&ticket.0)?;
        self.get(number)
    }

    /// All open files.
    pub fn files(&self) -> Vec<(u64, Arc<FileHandle>)> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(shard.0.read().iter().filter_map(|(number, handle)| match handle {
                Handle::File(file) => Some((*number, file.clone())),
                Handle::Directory(..) => None,
            }));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_name_open_handles_until_they_are_closed() {
        let handles = Handles::default();
        let numbers: Vec<u64> = (0..200).map(|n| handles.add(Handle::Directory(n, Arc::default()))).collect();
        let ticket = handles.ticket(numbers[77]).unwrap();
        assert_eq!(handles.ticket(numbers[77]), Some(ticket));
        assert!(matches!(handles.by_ticket(ticket), Some(Handle::Directory(77, _))));
        assert!(handles.file(numbers[77]).is_none());
        assert!(handles.remove(numbers[77]).is_some() && handles.get(numbers[77]).is_none());
        assert!(handles.by_ticket(ticket).is_none());
        assert!(handles.get(numbers[76]).is_some());
    }
}
