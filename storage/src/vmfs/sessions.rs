//! Owns: reads and writes on LUNs that this program reaches by a session of its own with the storage.
//! Promises: a command goes out only while the gate is open, asked last before it; what the storage refuses because another host has shut
//! this one out, and what nobody knows the end of, costs the disk; the disk stays open until whatever goes on for it has ended.
//! Must not know: transports, SCSI commands.
//!
//! In the steady state nothing is allocated and no thread is changed: the bytes go through memory that is used again and again, the session
//! receives on this thread. What does not end well at once goes on on a blocking thread.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use luns::{Leave, Session, Transfer as OnLun};
use scsi::DataBuffer;
use tokio::task::JoinHandle;
use vmfs_core::gate::GateState;
use vmfs_core::lun::{LunError, LunErrorKind};

use super::{VmfsDisk, blocking};
use crate::ring::Transfer;

/// Memory that is kept for further transfers: so many pieces, none longer than that.
const MOST_SPARE: usize = 64;
const LONGEST_SPARE: usize = 1 << 20;
/// How often a session is registered anew for one transfer.
const READMISSIONS: u32 = 3;

/// A LUN by a session.
pub(super) struct SessionLun {
    session: Arc<Session>,
    driver: JoinHandle<()>,
    spare: RefCell<Vec<Vec<u8>>>,
}

impl SessionLun {
    /// On the calling thread, which runs a tokio-uring runtime.
    pub(super) fn new(session: &Arc<Session>) -> Self {
        let driven = session.clone();
        let driver = tokio_uring::spawn(async move { driven.drive().await });
        Self { session: session.clone(), driver, spare: RefCell::default() }
    }

    /// Memory of this length; what is in it does not matter.
    fn memory(&self, length: usize) -> Vec<u8> {
        let mut memory = self.spare.borrow_mut().pop().unwrap_or_default();
        memory.resize(length, 0);
        memory
    }

    fn give_back(&self, memory: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < MOST_SPARE && memory.capacity() <= LONGEST_SPARE {
            spare.push(memory);
        }
    }
}

impl Drop for SessionLun {
    fn drop(&mut self) {
        // The disk is closed: the mount has the session ended, and what is left of it here is not to be heard of.
        self.session.leave();
        self.driver.abort();
    }
}

impl VmfsDisk {
    /// Moves all of `part` from or to byte `offset` of the LUN at position `lun`.
    pub(super) async fn move_by_session(
        &self,
        lun: usize,
        way: Transfer,
        offset: u64,
        part: &DataBuffer,
        by: &SessionLun,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < part.len() {
            let length = (part.len() - done).min(by.session.max_transfer());
            let (at, mut memory) = (offset + done as u64, by.memory(length));
            if way == Transfer::Read {
                memory = self.send(lun, by, memory, |memory| OnLun::read(at, memory)).await?;
                part.copy_from(done, &memory);
            } else {
                part.copy_to(done, &mut memory);
                let durable = way == Transfer::DurableWrite;
                memory = self.send(lun, by, memory, |memory| OnLun::write(at, memory, durable)).await?;
            }
            by.give_back(memory);
            done += length;
        }
        Ok(())
    }

    /// Writes `part` with `before` bytes of zeros before it and `after` behind it; the zeros begin at byte `offset` of the LUN.
    pub(super) async fn write_padded_by_session(
        &self,
        lun: usize,
        offset: u64,
        (before, part, after): (usize, &DataBuffer, usize),
        by: &SessionLun,
    ) -> io::Result<()> {
        let total = before + part.len() + after;
        let mut done = 0;
        while done < total {
            let length = (total - done).min(by.session.max_transfer());
            let (at, mut memory) = (offset + done as u64, by.memory(length));
            memory.fill(0);
            let (from, to) = (done.max(before), (done + length).min(before + part.len()));
            if from < to {
                part.copy_to(from - before, &mut memory[from - done..to - done]);
            }
            let memory = self.send(lun, by, memory, |memory| OnLun::write(at, memory, false)).await?;
            by.give_back(memory);
            done += length;
        }
        Ok(())
    }

    /// Carries out one transfer; gives its memory back. After an error the caller asks the gate: what it closed, or what became of the disk,
    /// is the cause then.
    async fn send(
        &self,
        lun: usize,
        by: &SessionLun,
        mut memory: Vec<u8>,
        transfer: impl Fn(Vec<u8>) -> OnLun,
    ) -> io::Result<Vec<u8>> {
        let permit = || self.keeper.state(lun) == GateState::Open;
        for _ in 0..=READMISSIONS {
            let rest = match by.session.attempt(transfer(memory), &permit).await {
                Ok(memory) => return Ok(memory),
                Err(rest) => rest,
            };
            let (session, file, supervisor) = (by.session.clone(), self.file.clone(), self.supervisor.clone());
            // It holds the file: the lock is not given back while this goes on.
            let (result, back, is_lost) = blocking(move || {
                let leave = Leave {
                    may_send: &|| file.gate(lun) == GateState::Open,
                    goes_on: &|| file.gate(lun) != GateState::Poisoned && !supervisor.is_ending(),
                };
                let (result, memory) = session.finish(rest, &leave);
                let is_unknown = matches!(&result, Err(error) if error.kind == LunErrorKind::Unknown);
                (result, memory, is_unknown && !session.is_settled())
            })
            .await;
            let error = match result {
                Ok(()) => return Ok(back),
                Err(error) => error,
            };
            if error.kind == LunErrorKind::Fenced {
                self.keeper.lose(&error.to_string());
            } else if is_lost && !self.supervisor.is_ending() {
                self.keeper.lose(&format!("nobody knows what became of a write: {error}"));
            } else if by.session.has_lost_its_registration() && permit() {
                let file = self.file.clone();
                if let Err(refused) = blocking(move || file.readmit(lun)).await {
                    tracing::warn!(%refused, "the storage has forgotten this program's registration");
                    return Err(as_io(&error));
                }
                memory = back;
                continue;
            }
            return Err(as_io(&error));
        }
        Err(io::Error::other("the storage forgets this program's registration again and again"))
    }
}

fn as_io(error: &LunError) -> io::Error {
    tracing::debug!(%error, "a transfer");
    match error.kind {
        LunErrorKind::NoSpace => io::Error::from_raw_os_error(libc::ENOSPC),
        _ => io::Error::from_raw_os_error(libc::EIO),
    }
}
