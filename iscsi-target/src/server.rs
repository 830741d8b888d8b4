//! Owns: the targets and their disks, the sessions, and who may use what.
//! Promises: a session that logs in again takes the place of its former self only after that has ended.
//! Must not know: PDUs, CDBs.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use iscsi::login::chap::Credentials;
use iscsi::login::{Admission, Doorkeeper, FORBIDDEN, Login, NOT_FOUND, Status};
use iscsi::text;
use scsi::{BlockDevice, Disk, DiskOptions, Lun, NexusId, Target, TargetPort};
use serde::Serialize;
use storage::{DiskSource, OpenError, Supervisor};

use crate::config::{Config, LunConfig, TargetConfig};
use crate::connection::{Entrance, Session};
use crate::disk::ShownDisk;
use crate::memory::Pool;
use crate::reservations::{FileStore, RecordError};

/// Sessions that may be open at once.
pub const MOST_SESSIONS: usize = 1024;

/// A target.
pub struct TargetEntry {
    /// Its iSCSI name.
    pub name: String,
    /// Its logical units.
    pub units: Rc<Target<ShownDisk>>,
    initiators: BTreeSet<String>,
    credentials: Option<Credentials>,
    paths: Vec<LunConfig>,
}

/// Whether a session finds room.
pub enum Joined {
    /// Under this number.
    As(u16),
    /// There are too many.
    Full,
}

/// Why a target cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A disk cannot be had.
    #[error("{0}")]
    Disk(#[from] OpenError),
    /// The record of reservations cannot be read.
    #[error("{0}")]
    Record(#[from] RecordError),
}

/// Everything that connections share. It lives on one thread.
pub struct Server {
    targets: Vec<Rc<TargetEntry>>,
    sessions: RefCell<Vec<Rc<Session>>>,
    portals: Vec<std::net::SocketAddr>,
    memory: Rc<Pool>,
    last_tsih: Cell<u16>,
    last_nexus: Cell<u32>,
    since: Instant,
}

/// Nobody has to be told when a disk freezes: its commands wait.
struct Log;

impl Supervisor for Log {
    fn freeze(&self, disk: &Path) {
        tracing::warn!(disk = %disk.display(), "the lock of the disk cannot be renewed at the moment: its commands wait");
    }

    fn thaw(&self, disk: &Path) {
        tracing::warn!(disk = %disk.display(), "the disk goes on");
    }

    fn lost(&self, disk: &Path, cause: &str) {
        tracing::error!(disk = %disk.display(), cause, "the disk is lost");
    }

    fn is_ending(&self) -> bool {
        false
    }
}

impl Server {
    /// Opens all disks. It listens on `portals`, and the data of all commands are in `memory`.
    ///
    /// # Errors
    /// [`ServeError`] of the first disk that cannot be had.
    pub async fn open(
        config: &Config,
        portals: Vec<std::net::SocketAddr>,
        state: Option<&Path>,
        memory: Rc<Pool>,
    ) -> Result<Rc<Server>, ServeError> {
        let mut targets = Vec::new();
        for target in &config.targets {
            targets.push(Rc::new(open_target(target, portals.len() as u16, state).await?));
        }
        Ok(Rc::new(Server {
            targets,
            sessions: RefCell::default(),
            portals,
            memory,
            last_tsih: Cell::new(0),
            last_nexus: Cell::new(0),
            since: Instant::now(),
        }))
    }

    /// The memory that all sessions share.
    pub fn memory(&self) -> &Rc<Pool> {
        &self.memory
    }

    /// The target of this name.
    pub fn target(&self, name: &str) -> Option<Rc<TargetEntry>> {
        self.targets.iter().find(|target| target.name == name).cloned()
    }

    /// A nexus that nobody has.
    pub fn next_nexus(&self) -> NexusId {
        self.last_nexus.set(self.last_nexus.get().wrapping_add(1));
        NexusId(self.last_nexus.get())
    }

    /// Is there a session of this number?
    pub fn has_session(&self, tsih: u16) -> bool {
        self.sessions.borrow().iter().any(|session| session.tsih == tsih)
    }

    /// A number for a new session.
    pub fn reserve_session(&self) -> Joined {
        if self.sessions.borrow().len() >= MOST_SESSIONS {
            return Joined::Full;
        }
        loop {
            let next = self.last_tsih.get().wrapping_add(1).max(1);
            self.last_tsih.set(next);
            if !self.has_session(next) {
                return Joined::As(next);
            }
        }
    }

    /// Ends the session whose place a login takes: the same initiator port at the same portal group of the same target (RFC 7143, 6.3.5).
    /// When it returns there is none; the caller enters its own before it waits for anything.
    pub async fn reinstate(&self, login: &Login, isid: [u8; 6]) {
        let is_former = |session: &&Rc<Session>| {
            session.isid == isid
                && Some(&session.initiator) == login.initiator.as_ref()
                && session.target.as_ref().map(|target| target.name.as_str()) == login.target.as_deref()
                && session.entrance.portal == login.group()
        };
        // Looked for again after each wait: another login of the same port may have been faster.
        loop {
            let former = self.sessions.borrow().iter().find(is_former).cloned();
            let Some(session) = former else { return };
            tracing::info!(initiator = %session.initiator, tsih = session.tsih, "a session is reinstated");
            session.close().await;
        }
    }

    /// A session has begun.
    pub fn enter(&self, session: Rc<Session>) {
        self.sessions.borrow_mut().push(session);
    }

    /// A session has ended.
    pub fn leave(&self, session: &Session) {
        self.sessions.borrow_mut().retain(|known| !std::ptr::eq(&**known, session));
    }

    /// The sessions of the moment.
    pub fn sessions(&self) -> Vec<Rc<Session>> {
        self.sessions.borrow().clone()
    }

    /// Who decides about a connection that came in at `entrance`.
    pub fn doorkeeper(&self, entrance: Entrance) -> impl Doorkeeper + '_ {
        Door { server: self, entrance }
    }

    /// The answer to SendTargets: all targets that the initiator may see, or one of them, with the addresses of every portal.
    pub fn list(&self, initiator: &str, only: Option<&str>, entrance: Entrance, answer: &mut Vec<u8>) {
        for target in self.targets.iter().filter(|target| only.is_none_or(|name| name == target.name)) {
            if !target.lets_in(initiator) {
                continue;
            }
            text::push(answer, "TargetName", &target.name);
            for (nth, portal) in self.portals.iter().enumerate() {
                // Of a portal on every address the initiator knows the one that it has reached.
                let ip = if portal.ip().is_unspecified() { entrance.local.ip() } else { portal.ip() };
                let address = std::net::SocketAddr::new(ip, portal.port());
                text::push(answer, "TargetAddress", &format!("{address},{}", nth + 1));
            }
        }
    }

    /// Makes everything durable.
    pub async fn flush(&self) {
        for target in &self.targets {
            for (lun, disk) in target.units.disks() {
                if let Err(error) = disk.flush().await {
                    tracing::error!(target = %target.name, lun = lun.0, %error, "a disk cannot be flushed");
                }
            }
        }
    }

    /// What goes on.
    pub fn status(&self) -> Report {
        let sessions = self.sessions.borrow();
        let session = |session: &Rc<Session>| SessionReport {
            initiator: session.initiator.clone(),
            isid: text::hexadecimal(&session.isid),
            tsih: session.tsih,
            peer: session.entrance.peer.to_string(),
            portal: session.entrance.portal,
            seconds: session.since.elapsed().as_secs(),
            commands: session.commands.get(),
            bytes_read: session.bytes_read.get(),
            bytes_written: session.bytes_written.get(),
        };
        let target = |target: &Rc<TargetEntry>| TargetReport {
            name: target.name.clone(),
            luns: target.luns(),
            sessions: (sessions.iter())
                .filter(|session| session.target.as_ref().is_some_and(|its| Rc::ptr_eq(its, target)))
                .map(session)
                .collect(),
        };
        Report {
            seconds: self.since.elapsed().as_secs(),
            portals: self.portals.iter().map(ToString::to_string).collect(),
            targets: self.targets.iter().map(target).collect(),
        }
    }
}

impl TargetEntry {
    fn lets_in(&self, initiator: &str) -> bool {
        self.initiators.is_empty() || self.initiators.contains(initiator)
    }

    fn luns(&self) -> Vec<LunReport> {
        let lun = |((lun, disk), config): ((Lun, Rc<Disk<ShownDisk>>), &LunConfig)| {
            let geometry = disk.device().geometry();
            LunReport {
                lun: lun.0,
                path: config.path.display().to_string(),
                bytes: geometry.bytes(),
                block_size: geometry.logical_block,
                thin: geometry.thin,
                read_only: geometry.read_only,
                removable: disk.is_removable(),
                reservations_persist: self.units.reservations_persist(lun),
                serial: disk.device().identity().serial.clone(),
            }
        };
        self.units.disks().into_iter().zip(&self.paths).map(lun).collect()
    }
}

async fn open_target(config: &TargetConfig, ports: u16, state: Option<&Path>) -> Result<TargetEntry, ServeError> {
    let units = Rc::new(Target::new());
    // Each portal is a port of its own, in one group: all of them lead to the same disks alike.
    let port = |id| TargetPort { relative_id: id, group: 1, name: Some(format!("{},t,0x{id:04x}", config.name)) };
    units.set_ports((1..=ports).map(port).collect());
    units.set_device_name(Some(config.name.clone()));
    for (number, lun) in config.luns.iter().enumerate() {
        let source = DiskSource { path: lun.path.clone(), read_only: lun.readonly, cached: !lun.direct, serial: None };
        let storage = storage::open(source, Arc::new(Log)).await?;
        let shown = ShownDisk::new(storage, lun.blocksize, lun.thin);
        let options = DiskOptions { removable: lun.removable, ..DiskOptions::default() };
        let number = Lun(number as u16);
        units.insert(number, Disk::new(shown, options));
        if let Some(folder) = state {
            FileStore::open(folder, &config.name, number)?.keep_for(&units, number)?;
        }
    }
    tokio_uring::spawn(units.clone().background());
    Ok(TargetEntry {
        name: config.name.clone(),
        units,
        initiators: config.initiators.clone(),
        credentials: config.chap.as_ref().map(|chap| chap.credentials()),
        paths: config.luns.clone(),
    })
}

struct Door<'a> {
    server: &'a Server,
    entrance: Entrance,
}

impl Doorkeeper for Door<'_> {
    fn admit(&self, initiator: &str, target: Option<&str>) -> Result<Admission, Status> {
        let group = self.entrance.portal;
        let Some(name) = target else { return Ok(Admission { group, credentials: None }) };
        let target = self.server.target(name).ok_or(NOT_FOUND)?;
        if !target.lets_in(initiator) {
            return Err(FORBIDDEN);
        }
        Ok(Admission { group, credentials: target.credentials.clone() })
    }

    fn random(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel gives random bytes");
    }
}

/// The answer of `iscsi-target status`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Age of the daemon.
    pub seconds: u64,
    /// Where it listens.
    pub portals: Vec<String>,
    /// Targets.
    pub targets: Vec<TargetReport>,
}

/// A target in a report.
#[derive(Debug, Serialize)]
pub struct TargetReport {
    /// iSCSI name.
    pub name: String,
    /// LUNs.
    pub luns: Vec<LunReport>,
    /// Sessions.
    pub sessions: Vec<SessionReport>,
}

/// A LUN in a report.
#[derive(Debug, Serialize)]
pub struct LunReport {
    /// Number.
    pub lun: u16,
    /// What stores it.
    pub path: String,
    /// Capacity.
    pub bytes: u64,
    /// Logical block in bytes.
    pub block_size: u32,
    /// Space is given back.
    pub thin: bool,
    /// Nobody may write.
    pub read_only: bool,
    /// The medium can be taken out.
    pub removable: bool,
    /// Persistent reservations survive a restart, as long as initiators ask for it.
    pub reservations_persist: bool,
    /// Unit serial number.
    pub serial: String,
}

/// A session in a report.
#[derive(Debug, Serialize)]
pub struct SessionReport {
    /// The initiator's name.
    pub initiator: String,
    /// Its part of the session identifier.
    pub isid: String,
    /// The target's part.
    pub tsih: u16,
    /// The initiator's address.
    pub peer: String,
    /// Number of the portal.
    pub portal: u16,
    /// Age.
    pub seconds: u64,
    /// Commands so far.
    pub commands: u64,
    /// Bytes read so far.
    pub bytes_read: u64,
    /// Bytes written so far.
    pub bytes_written: u64,
}
