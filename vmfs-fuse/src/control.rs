//! Owns: what the mount does for the clients of its Unix socket.
//! Promises: a program gets a data descriptor only with its drain lock held, or moves data by a session only once that is registered, and
//!   the slot is read live afterwards; a disk's lock is not
//!   released while such a program may still have I/O in flight.
//! Must not know: messages and sockets (`lockd::server`).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lockd::drain;
use lockd::protocol::{AdminRequest, Attachment, LunAccess, NameIn, Pass, Recall, Ticket};
use lockd::server::{ClientId, Refusal, Service};
use serde_json::{Value, json};
use vmfs_core::disk::Progress;
use vmfs_core::error::FsError;
use vmfs_core::file::Hold;
use vmfs_core::format::dirent::ObjectRef;
use vmfs_core::units::{LunIndex, Uuid};
use vmfs_core::volume::{LunInfo, ScrubOptions};

use crate::disks;
use crate::extents;
use crate::handles::{FileHandle, Handle, Lent, Means};
use crate::raw_devices;
use crate::reports;
use crate::state::State;

/// The service of one mount.
pub struct Control {
    state: Arc<State>,
    next_byte: AtomicU32,
}

/// A refusal with the errno of its kind.
pub fn refusal(error: &FsError) -> Refusal {
    Refusal { errno: error.kind().errno(), message: error.to_string() }
}

fn io_refusal(what: &str, error: &std::io::Error) -> Refusal {
    Refusal { errno: error.raw_os_error().unwrap_or(libc::EIO), message: format!("{what}: {error}") }
}

fn refuse<T>(errno: i32, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { errno, message: message.into() })
}

impl Control {
    /// For a mounted volume.
    pub fn new(state: Arc<State>) -> Control {
        Control { state, next_byte: AtomicU32::new(1) }
    }

    fn disk(&self, ticket: Ticket) -> Result<Arc<FileHandle>, Refusal> {
        match self.state.handles.by_ticket(ticket) {
            Some(Handle::File(handle)) => Ok(handle),
            Some(Handle::Directory(..)) => refuse(libc::EISDIR, "the ticket names a directory"),
            None => refuse(libc::ESTALE, "the ticket names no open file: it was closed"),
        }
    }

    /// The object of a name in an open directory.
    fn place(&self, file: &NameIn) -> Result<(ObjectRef, Vec<u8>), Refusal> {
        match self.state.handles.by_ticket(file.directory) {
            Some(Handle::Directory(node, _)) => match self.state.inodes.object(node) {
                Some(directory) => Ok((directory, file.name.clone())),
                None => refuse(libc::ESTALE, "the directory is gone"),
            },
            Some(Handle::File(_)) => refuse(libc::ENOTDIR, "the ticket names a file, not a directory"),
            None => refuse(libc::ESTALE, "the ticket names no open directory: it was closed"),
        }
    }

    /// The members as they are now: some may have been added since the mount.
    fn luns(&self) -> Result<Vec<LunInfo>, FsError> {
        self.state.actor.ask(|volume| async move { Ok(volume.luns()) })
    }

    fn access(&self, lun: &LunInfo) -> LunAccess {
        let data = self.state.luns.get(lun.index);
        LunAccess {
            index: lun.index.get(),
            generation: lun.slot.map_or(0, |slot| slot.generation.0),
            alignment: data.as_ref().map_or(0, |data| data.alignment() as u32),
            has_descriptor: data
                .as_ref()
                .is_some_and(|data| data.open_descriptor().is_some_and(|opened| opened.is_ok())),
            has_session: data.is_some_and(|data| data.lend_session().is_some_and(|lent| lent.is_ok())),
            name: lun.name.clone(),
        }
    }

    /// The open disk that a client has attached to, and a LUN.
    fn attached(&self, client: ClientId, ticket: Ticket, lun: u8) -> Result<(Arc<FileHandle>, LunIndex), Refusal> {
        let handle = self.disk(ticket)?;
        if !self.state.recalls.has_attached(client, &handle) {
            return refuse(libc::EPROTO, "a LUN is opened by who has attached to the disk over the same connection");
        }
        let Some(lun) = LunIndex::new(lun) else { return refuse(libc::EINVAL, format!("there is no LUN {lun}")) };
        if handle.file.hold() == Hold::Nothing {
            return refuse(libc::EOPNOTSUPP, "a read-only mount holds no locks: read the disk through the mount");
        }
        Ok((handle, lun))
    }

    /// Reads this host's slot on a LUN live.
    fn prove_live(&self, lun: LunIndex) -> Result<(), FsError> {
        self.state.actor.ask(move |volume| async move { volume.context().prove_live([lun]).await })
    }

    fn open_drained(&self, handle: &FileHandle, lun: LunIndex) -> Result<OwnedFd, Refusal> {
        let luns = self.luns().map_err(|error| refusal(&error))?;
        let Some(slot) = luns.iter().find(|info| info.index == lun).and_then(|info| info.slot) else {
            return refuse(libc::EROFS, format!("{lun}: this host has no slot there"));
        };
        let opened = self.state.luns.get(lun).and_then(|data| data.open_descriptor());
        let Some(opened) = opened else { return refuse(libc::EOPNOTSUPP, format!("{lun} has no descriptor")) };
        let descriptor = opened.map_err(|error| io_refusal("opening the LUN again", &error.cause))?;
        for _ in 0..drain::DRAIN_BYTES_PER_SLOT {
            let byte = drain::drain_byte(slot.slot, self.next_byte.fetch_add(1, Ordering::Relaxed));
            if drain::try_lock(&descriptor, byte).map_err(|error| io_refusal("the drain lock", &error))? {
                handle.direct.lent.lock().push(Lent { lun, means: Means::Descriptor { byte } });
                return Ok(descriptor);
            }
        }
        refuse(libc::EBUSY, format!("{lun}: every drain lock of {slot} is taken: a breaker claims this host's slot"))
    }
}

impl Service for Control {
    fn identity(&self) -> (Uuid, Uuid) {
        (self.state.info.uuid, self.state.host)
    }

    fn attach(&self, client: ClientId, ticket: Ticket) -> Result<(Attachment, [OwnedFd; 3]), Refusal> {
        let handle = self.disk(ticket)?;
        if handle.file.hold() == Hold::Nothing {
            return refuse(libc::EOPNOTSUPP, "a read-only mount holds no locks: read the disk through the mount");
        }
        let gate = self.state.gate.read_only_descriptor().map_err(|error| io_refusal("the gate page", &error))?;
        let revoke = handle.direct.revoke_event().map_err(|error| io_refusal("the revoke event", &error))?;
        let recalls = self.state.recalls.attach(client, &handle).map_err(|error| io_refusal("its recalls", &error))?;
        // Asked when no block of it is being moved: a move of which nobody knows whether it has happened goes on in the dark.
        if handle.file.is_in_doubt() {
            return refuse(
                libc::EIO,
                "the end of an earlier write to it is not known: close it, and mount the volume anew",
            );
        }
        let luns = self.luns().map_err(|error| refusal(&error))?.iter().map(|lun| self.access(lun)).collect();
        Ok((Attachment { lock_lun: handle.file.fd().lun().get(), luns }, [gate, revoke, recalls]))
    }

    fn recalled(&self, client: ClientId, ticket: Ticket, let_go: u64) -> Result<Option<Recall>, Refusal> {
        self.disk(ticket)?;
        Ok(self.state.recalls.answered(client, let_go))
    }

    fn open_lun(&self, client: ClientId, ticket: Ticket, lun: u8) -> Result<OwnedFd, Refusal> {
        let (handle, lun) = self.attached(client, ticket, lun)?;
        let descriptor = self.open_drained(&handle, lun)?;
        // The lock first, the slot second: a breaker that took the range before has claimed the slot by now.
        if let Err(error) = self.prove_live(lun) {
            let mut lent = handle.direct.lent.lock();
            if let Some(last) = lent.iter().rposition(|one| one.lun == lun) {
                lent.remove(last);
            }
            return Err(refusal(&error));
        }
        Ok(descriptor)
    }

    fn open_session(&self, client: ClientId, ticket: Ticket, lun: u8) -> Result<(u64, Pass), Refusal> {
        let (handle, lun) = self.attached(client, ticket, lun)?;
        let data = self.state.luns.get(lun);
        let lent = data.as_ref().and_then(|data| data.lend_session());
        let (Some(data), Some(lent)) = (data, lent) else {
            return refuse(libc::EOPNOTSUPP, format!("{lun} is not reached by sessions of other programs"));
        };
        let lent = lent.map_err(|error| Refusal { errno: libc::EIO, message: error.to_string() })?;
        // Known before the program can make it: whatever becomes of the program, it is ended.
        let means = Means::Session { data, port: lent.port, place: None };
        handle.direct.lent.lock().push(Lent { lun, means });
        Ok((lent.port, Pass(lent.pass)))
    }

    fn confirm_session(
        &self,
        client: ClientId,
        ticket: Ticket,
        lun: u8,
        session: u64,
        told: Option<String>,
    ) -> Result<(), Refusal> {
        let (handle, lun) = self.attached(client, ticket, lun)?;
        self.prove_live(lun).map_err(|error| refusal(&error))?;
        let mut lent = handle.direct.lent.lock();
        for one in lent.iter_mut().filter(|one| one.lun == lun) {
            if let Means::Session { port, place, .. } = &mut one.means
                && *port == session
            {
                *place = Some(told);
                return Ok(());
            }
        }
        refuse(libc::ESTALE, format!("{lun}: no such session was lent for this disk"))
    }

    fn administer(&self, what: AdminRequest, progress: &mut dyn FnMut(u64, u64)) -> Result<Value, Refusal> {
        let actor = &self.state.actor;
        match what {
            AdminRequest::Status => {
                let open = self.state.handles.files().len();
                actor
                    .ask(move |volume| async move { Ok(reports::status(&volume.status().await, open)) })
                    .map_err(|error| refusal(&error))
            }
            AdminRequest::WhyLocked { file } => {
                let (directory, name) = self.place(&file)?;
                let state = self.state.clone();
                let asked = actor.ask(move |volume| async move {
                    let stat = volume.lookup(directory, &name).await?;
                    let why = volume.why_locked(stat.object).await?;
                    let explanation = format!("{}{}", why.explanation, opened_here(&state, stat.object));
                    Ok(reports::why_locked(&why, &explanation))
                });
                asked.map_err(|error| refusal(&error))
            }
            AdminRequest::LockBreak { file, host_is_down } => {
                let (directory, name) = self.place(&file)?;
                let asked = actor.ask(move |volume| async move {
                    let stat = volume.lookup(directory, &name).await?;
                    let broken = volume.break_lock(stat.object, host_is_down.as_deref()).await?;
                    Ok(reports::broken_lock(&broken))
                });
                asked.map_err(|error| refusal(&error))
            }
            AdminRequest::Dump { file } => {
                let (directory, name) = self.place(&file)?;
                let asked = actor.ask(move |volume| async move {
                    let stat = volume.lookup(directory, &name).await?;
                    volume.dump(stat.object.into()).await
                });
                asked.map(|text| json!({ "text": text })).map_err(|error| refusal(&error))
            }
            AdminRequest::DiskCreate { file, bytes, kind } => {
                disks::create(&self.state, self.place(&file)?, bytes, kind, progress)
            }
            AdminRequest::ExtentAdd { lun, force } => extents::add(&self.state, lun, force, progress),
            AdminRequest::ExtentGrow { lun } => extents::grow(&self.state, lun, progress),
            AdminRequest::ExtentDrain { lun, cancel: false } => extents::drain(&self.state, lun, progress),
            AdminRequest::ExtentRemove { lun } => extents::remove(&self.state, lun, progress),
            AdminRequest::ExtentDrain { lun, cancel: true } => extents::cancel_drain(&self.state, lun),
            AdminRequest::Scrub { data, bytes_per_second } => {
                let options = ScrubOptions { data, bytes_per_second };
                disks::long(&self.state, progress, move |volume, teller| async move {
                    let report =
                        volume.scrub(options, &mut |done, total| teller.tell(Progress { done, total })).await?;
                    Ok(reports::scrub(&report))
                })
            }
            AdminRequest::DiskInfo { file } => disks::info(&self.state, self.place(&file)?),
            AdminRequest::DiskExtend { file, bytes } => disks::extend(&self.state, self.place(&file)?, bytes, progress),
            AdminRequest::DiskInflate { file } => disks::inflate(&self.state, self.place(&file)?, progress),
            AdminRequest::RdmCreate { file, device, physical } => {
                raw_devices::create(&self.state, self.place(&file)?, device, physical)
            }
            AdminRequest::RdmInfo { file } => raw_devices::info(&self.state, self.place(&file)?),
            AdminRequest::DiskClone { source, destination, kind } => {
                disks::clone(&self.state, self.place(&source)?, self.place(&destination)?, kind, progress)
            }
        }
    }

    fn gone(&self, client: ClientId) {
        // What it had belongs to its open files, whose end the kernel tells.
        tracing::debug!("client {} has gone", client.0);
    }
}

/// How often a file is open by this mount, as a line to append.
fn opened_here(state: &State, object: ObjectRef) -> String {
    let files = state.handles.files();
    let here: Vec<_> = files.iter().filter(|(_, handle)| handle.file.fd() == object.fd).collect();
    let writers = here.iter().filter(|(_, handle)| handle.writable).count();
    match here.len() {
        0 => String::new(),
        all => format!("\n  open on this mount {all} time(s), {writers} of them for writing"),
    }
}
