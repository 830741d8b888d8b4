//! Owns: the targets and their disks, the sessions, and who may use what.
//! Promises: a session that logs in again takes the place of its former self only after that has ended.
//! Must not know: PDUs, CDBs.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::login::chap::Credentials;
use iscsi::login::{Admission, Doorkeeper, FORBIDDEN, Login, NOT_FOUND, Status};
use iscsi::text;
use scsi::{BlockDevice, DeviceKind, Disk, DiskOptions, Lun, NexusId, ProductName, Target, TargetPort};
use storage::{CDROM_BLOCK, DiskSource, OpenError, ShownDisk, Storage, Supervisor};

use crate::config::{Config, LunConfig, TargetConfig};
use crate::connection::{Entrance, Session, Socket};
use crate::journal::{JournalError, Journaled};
use crate::memory::Pool;
use crate::reservations::{FileStore, RecordError};
use crate::status::{LunReport, RegistrantReport, Report, TargetReport};

/// Sessions that may be open at once.
pub const MOST_SESSIONS: usize = 1024;
/// Connections that have not logged in that may be open at once.
pub const MOST_ARRIVALS: usize = 64;

/// What stores the blocks of a LUN.
pub type LunDisk = Journaled<ShownDisk>;

/// A target.
pub struct TargetEntry {
    /// Its iSCSI name.
    pub name: String,
    /// Its logical units.
    pub units: Rc<Target<LunDisk>>,
    pub(crate) initiators: RefCell<BTreeSet<String>>,
    pub(crate) credentials: RefCell<Option<Credentials>>,
    /// What its LUNs are made of.
    pub(crate) luns: RefCell<BTreeMap<u16, LunConfig>>,
    background: tokio::task::JoinHandle<()>,
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
    /// An atomic write cannot be finished.
    #[error("{0}")]
    Journal(#[from] JournalError),
}

/// Everything that connections share. It lives on one thread.
pub struct Server {
    pub(crate) targets: RefCell<Vec<Rc<TargetEntry>>>,
    sessions: RefCell<Vec<Rc<Session>>>,
    /// Connections that have not logged in, the oldest first.
    arrivals: RefCell<VecDeque<Rc<Socket>>>,
    pub(crate) portals: Vec<SocketAddr>,
    /// The same as they were asked for.
    pub(crate) configured_portals: Vec<SocketAddr>,
    pub(crate) state: Option<PathBuf>,
    /// A reload is under way.
    pub(crate) reloads: Cell<bool>,
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
        portals: Vec<SocketAddr>,
        state: Option<&Path>,
        memory: Rc<Pool>,
    ) -> Result<Rc<Server>, ServeError> {
        let mut targets = Vec::new();
        for target in &config.targets {
            targets.push(Rc::new(open_target(target, portals.len() as u16, state).await?));
        }
        Ok(Rc::new(Server {
            targets: RefCell::new(targets),
            sessions: RefCell::default(),
            arrivals: RefCell::default(),
            portals,
            configured_portals: config.portals.clone(),
            state: state.map(Path::to_owned),
            reloads: Cell::new(false),
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
        self.targets.borrow().iter().find(|target| target.name == name).cloned()
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

    /// A connection is there and has not logged in; it is counted until what this returns is dropped. If there are too many, the oldest
    /// one is closed: a login takes a moment, and who needs longer has less need of the place than who has just come.
    pub fn arrive(&self, socket: &Rc<Socket>, peer: SocketAddr) -> Arrival<'_> {
        let mut arrivals = self.arrivals.borrow_mut();
        if arrivals.len() >= MOST_ARRIVALS
            && let Some(oldest) = arrivals.pop_front()
        {
            tracing::warn!(%peer, "there are {MOST_ARRIVALS} connections that have not logged in: the oldest one is closed");
            oldest.hang_up();
        }
        arrivals.push_back(socket.clone());
        Arrival { server: self, socket: socket.clone() }
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
        for target in self.targets.borrow().iter().filter(|target| only.is_none_or(|name| name == target.name)) {
            if !target.lets_in(initiator) {
                continue;
            }
            text::push(answer, "TargetName", &target.name);
            for (nth, portal) in self.portals.iter().enumerate() {
                // Of a portal on every address the initiator knows the one that it has reached.
                let ip = if portal.ip().is_unspecified() { entrance.local.ip() } else { portal.ip() };
                let address = SocketAddr::new(ip, portal.port());
                text::push(answer, "TargetAddress", &format!("{address},{}", nth + 1));
            }
        }
    }

    /// Makes everything durable.
    pub async fn flush(&self) {
        let targets = self.targets.borrow().clone();
        for target in targets {
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
        let target = |target: &Rc<TargetEntry>| TargetReport {
            name: target.name.clone(),
            luns: target.report(),
            sessions: sessions.iter().filter(|session| session.uses(target)).map(|session| session.report()).collect(),
        };
        Report {
            seconds: self.since.elapsed().as_secs(),
            portals: self.portals.iter().map(ToString::to_string).collect(),
            memory: [self.memory.limit(), self.memory.used()].map(|bytes| bytes as u64),
            sessions: [MOST_SESSIONS, sessions.len()].map(|count| count as u64),
            arrivals: [MOST_ARRIVALS, self.arrivals.borrow().len()].map(|count| count as u64),
            targets: self.targets.borrow().iter().map(target).collect(),
        }
    }

    /// A second is over.
    pub fn tick(&self) {
        self.sessions.borrow().iter().for_each(|session| session.tick());
    }
}

/// A connection that has not logged in.
pub struct Arrival<'a> {
    server: &'a Server,
    socket: Rc<Socket>,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.server.arrivals.borrow_mut().retain(|socket| !Rc::ptr_eq(socket, &self.socket));
    }
}

impl TargetEntry {
    fn lets_in(&self, initiator: &str) -> bool {
        let initiators = self.initiators.borrow();
        initiators.is_empty() || initiators.contains(initiator)
    }

    /// Its work in the background ends.
    pub(crate) fn end(&self) {
        self.background.abort();
    }

    fn report(&self) -> Vec<LunReport> {
        let luns = self.luns.borrow();
        let lun = |(lun, disk): (Lun, Rc<Disk<LunDisk>>)| {
            let geometry = disk.device().geometry();
            let view = self.units.reservations(lun).unwrap_or_default();
            LunReport {
                lun: lun.0,
                path: luns.get(&lun.0).map_or_else(String::new, |config| config.path.display().to_string()),
                bytes: geometry.bytes(),
                block_size: geometry.logical_block,
                thin: geometry.thin,
                read_only: geometry.read_only,
                removable: disk.is_removable(),
                cdrom: disk.kind() == DeviceKind::CdRom,
                reservations_persist: self.units.reservations_persist(lun),
                reservation: view.kind,
                reservation_generation: view.generation,
                registrants: RegistrantReport::all(&view),
                serial: disk.device().identity().serial.clone(),
            }
        };
        self.units.disks().into_iter().map(lun).collect()
    }
}

/// How long a file may still be in use by a daemon that has just died.
const PATIENCE: Duration = Duration::from_secs(10);

/// A LUN that has been opened and is not shown yet.
pub(crate) struct OpenLun {
    pub(crate) number: u16,
    pub(crate) config: LunConfig,
    pub(crate) disk: Disk<LunDisk>,
    /// Its reservations.
    pub(crate) store: Option<FileStore>,
}

pub(crate) async fn open_lun(
    target: &str,
    number: u16,
    config: &LunConfig,
    state: Option<&Path>,
) -> Result<OpenLun, ServeError> {
    let read_only = config.readonly || config.cdrom;
    let source = DiskSource { path: config.path.clone(), read_only, cached: !config.direct, serial: None };
    let storage = open_patiently(source).await?;
    let mut options = DiskOptions { removable: config.removable, ..DiskOptions::default() };
    let mut logical_block = config.blocksize;
    if config.cdrom {
        options.kind = DeviceKind::CdRom;
        options.name = ProductName::virtual_cdrom();
        logical_block = Some(CDROM_BLOCK);
    }
    let shown = ShownDisk::new(storage, logical_block, config.thin).with_physical_block(config.physical);
    let store = state.map(|folder| FileStore::open(folder, target, Lun(number))).transpose()?;
    store.as_ref().map_or(Ok(()), FileStore::check)?;
    let disk = match state.filter(|_| !shown.geometry().read_only) {
        Some(folder) => Journaled::open(shown, folder).await?,
        None => Journaled::without(shown),
    };
    Ok(OpenLun { number, config: config.clone(), disk: Disk::new(disk, options), store })
}

/// Opens a file that somebody may just be letting go: what a killed daemon's ring had in flight keeps its files open, and with them
/// their locks, until the kernel has ended it.
async fn open_patiently(source: DiskSource) -> Result<Storage, OpenError> {
    let began = Instant::now();
    loop {
        match storage::open(source.clone(), Arc::new(Log)).await {
            Err(OpenError::InUse { path }) if began.elapsed() < PATIENCE => {
                tracing::debug!(path = %path.display(), "in use; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            opened => return opened,
        }
    }
}

pub(crate) async fn open_target(
    config: &TargetConfig,
    ports: u16,
    state: Option<&Path>,
) -> Result<TargetEntry, ServeError> {
    let units = Rc::new(Target::new());
    // Each portal is a port of its own, in one group: all of them lead to the same disks alike.
    let port = |id| TargetPort { relative_id: id, group: 1, name: Some(format!("{},t,0x{id:04x}", config.name)) };
    units.set_ports((1..=ports).map(port).collect());
    units.set_device_name(Some(config.name.clone()));
    let mut opened = Vec::new();
    for (number, lun) in config.numbered() {
        opened.push(open_lun(&config.name, number, lun, state).await?);
    }
    let entry = TargetEntry {
        name: config.name.clone(),
        background: tokio_uring::spawn(units.clone().background()),
        units,
        initiators: RefCell::new(config.initiators.clone()),
        credentials: RefCell::new(config.chap.as_ref().map(|chap| chap.credentials())),
        luns: RefCell::default(),
    };
    opened.into_iter().for_each(|lun| entry.put_in(lun));
    Ok(entry)
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
        Ok(Admission { group, credentials: target.credentials.borrow().clone() })
    }

    fn random(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel gives random bytes");
    }
}
