//! Owns: one logical unit behind one or several paths: commands that are sent, sent again where that is allowed, and answered.
//! Promises: a command that may have been carried out is repeated only if it reads, or if it writes the same bytes and the first try is
//! proven dead on a path that the storage shuts out when this host is fenced; a COMPARE AND WRITE is never repeated then.
//! Must not know: cells, hosts' slots.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use scsi::{PathAnswer, PathData, PathError, ScsiPath};
use vmfs_core::lun::{LunErrorKind, Reservation};

use crate::answer::{Verdict, verdict};
use crate::commands;
use crate::facts::{self, Caching, Capacity, Inquiry, Limits, Provisioning};
use crate::reservations::{Shut, Standing};
use crate::session::Origin;
use crate::tenancy::Tenancy;

/// How long one command may take: far more than a storage that lives, less than a lease by default.
pub const COMMAND_TIME: Duration = Duration::from_secs(10);
/// The same for data, which may be many bytes.
pub const DATA_TIME: Duration = Duration::from_secs(30);
/// How long a command that was certainly not carried out is sent again.
const PATIENCE: Duration = Duration::from_secs(15);
/// The same for data of a host that the storage can shut out: it waits for the storage, or for its fence.
const DATA_PATIENCE: Duration = Duration::from_secs(120);
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// Unit attentions in a row that are taken note of: a unit has fewer to tell.
const ATTENTIONS: u32 = 32;
/// Conflicts in a row after which registering anew helped nothing.
const CONFLICTS: u32 = 4;
/// Room for a page of vital product data.
const PAGE: usize = 1024;

/// When a command may be sent again although it may have been carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Always: it changes nothing.
    Reads,
    /// When the first try is proven dead: it writes the same bytes.
    Writes,
    /// Never.
    Never,
}

/// A command on its way.
pub struct Order<'a, 'b> {
    /// The command.
    pub cdb: &'a [u8],
    /// Its data.
    pub data: PathData<'b>,
    /// When it may be repeated.
    pub repeat: Repeat,
    /// How long one try may take.
    pub time: Duration,
}

/// How long somebody goes on with a command whose end is not known, or that was certainly not carried out.
#[derive(Clone, Copy)]
pub struct Leave<'a> {
    /// Whether a command may go out now.
    pub may_send: &'a dyn Fn() -> bool,
    /// Whether it makes sense to wait for the storage.
    pub goes_on: &'a dyn Fn() -> bool,
}

/// How a command that ended well ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was carried out, and moved so many bytes.
    Done(usize),
    /// COMPARE AND WRITE: the bytes differ.
    Miscompare,
}

/// Why a command did not end well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What that proves.
    pub kind: LunErrorKind,
    /// The device does not have the command.
    pub unsupported: bool,
    /// Cause.
    pub why: String,
}

impl Failure {
    pub(crate) fn new(kind: LunErrorKind, why: impl Into<String>) -> Failure {
        Failure { kind, unsupported: false, why: why.into() }
    }
}

/// What a unit was found to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Who made it.
    pub inquiry: Inquiry,
    /// Its name (page 83h).
    pub wwid: Option<String>,
    /// Its serial number (page 80h).
    pub serial: Option<String>,
    /// Limits of commands.
    pub limits: Limits,
    /// How space is given back.
    pub provisioning: Provisioning,
    /// Caching.
    pub caching: Caching,
    /// Size at the open.
    pub capacity: Capacity,
}

/// A logical unit.
pub struct Device {
    pub(crate) name: String,
    pub(crate) paths: Vec<Arc<dyn ScsiPath>>,
    current: AtomicUsize,
    pub(crate) facts: Facts,
    bytes: AtomicU64,
    /// The unit said that its size has changed.
    pub(crate) resized: AtomicBool,
    /// WRITE SAME is not there.
    pub(crate) no_write_same: AtomicBool,
    pub(crate) read_only: bool,
    /// One change of registrations at a time.
    pub(crate) turn: Mutex<()>,
    pub(crate) standing: Mutex<Standing>,
    /// It is [`Standing::Fenced`], for whoever has no time to lock.
    pub(crate) fenced: AtomicBool,
    pub(crate) seen: Mutex<Option<Reservation>>,
    /// The registration was made to survive a loss of the storage's power.
    pub(crate) persists: AtomicBool,
    /// The processes of this machine that are the same initiator port, if there can be several.
    pub(crate) tenancy: Option<Box<dyn Tenancy>>,
    /// By what another program reaches the unit too, if it can.
    pub(crate) origin: Option<Origin>,
    /// This host is registered, and this path is not.
    pub(crate) lost_registration: AtomicBool,
}

impl Device {
    /// Looks at a unit through its paths, at least one.
    ///
    /// # Errors
    /// It does not answer, is no disk, or two paths lead to different units.
    pub fn open(name: String, paths: Vec<Arc<dyn ScsiPath>>, read_only: bool) -> Result<Device, Failure> {
        let mut device = Device {
            name,
            paths,
            current: AtomicUsize::new(0),
            facts: Facts::default(),
            bytes: AtomicU64::new(0),
            resized: AtomicBool::new(false),
            no_write_same: AtomicBool::new(false),
            read_only,
            turn: Mutex::default(),
            standing: Mutex::new(Standing::Stranger),
            fenced: AtomicBool::new(false),
            seen: Mutex::default(),
            persists: AtomicBool::new(false),
            tenancy: None,
            origin: None,
            lost_registration: AtomicBool::new(false),
        };
        let mut names = Vec::with_capacity(device.paths.len());
        for nth in 0..device.paths.len() {
            device.current.store(nth, Ordering::Relaxed);
            names.push((device.paths[nth].name().to_owned(), device.page(0x83)?.as_deref().and_then(facts::wwid)));
        }
        if let Some((other, _)) =
            names.iter().find(|(_, wwid)| names.len() > 1 && (wwid.is_none() || *wwid != names[0].1))
        {
            let why =
                format!("{} and {other} are not known to lead to one unit (page 83h); name paths of one", names[0].0);
            return Err(Failure::new(LunErrorKind::NotDone, why));
        }
        device.current.store(0, Ordering::Relaxed);
        device.facts = device.look()?;
        device.bytes.store(device.facts.capacity.bytes(), Ordering::Relaxed);
        Ok(device)
    }

    /// The same of a unit whose port the processes of this machine share.
    #[must_use]
    pub fn shared_by(self, tenancy: Box<dyn Tenancy>) -> Device {
        // What has a Drop can not be taken apart.
        let mut device = self;
        device.tenancy = Some(tenancy);
        device
    }

    /// The same of a unit that other programs reach by sessions of their own.
    #[must_use]
    pub(crate) fn reached_by(self, origin: Origin) -> Device {
        let mut device = self;
        device.origin = Some(origin);
        device
    }

    fn look(&self) -> Result<Facts, Failure> {
        let refused = |why: String| Failure::new(LunErrorKind::NotDone, why);
        let standard = self.read_in(&commands::inquiry(None, 96), 96)?;
        let inquiry =
            Inquiry::decode(&standard).ok_or_else(|| refused("it answers INQUIRY with nothing".to_owned()))?;
        if inquiry.peripheral != 0 {
            let why = format!(
                "there is no disk (peripheral device type {:#04x}); check the number of the LUN",
                inquiry.peripheral
            );
            return Err(refused(why));
        }
        self.plain(&commands::test_unit_ready())?;
        let capacity = self.capacity()?;
        let page = |number| self.page(number).map(|body| body.unwrap_or_default());
        let serial = self.page(0x80)?.map(|body| facts::serial(&body)).filter(|serial| !serial.is_empty());
        let caching = match self.read_in(&commands::mode_sense_caching(192), 192) {
            Ok(bytes) => Caching::decode(&bytes),
            // Some reservations keep this from who is not registered; whoever only reads needs none of it.
            Err(failure) if failure.unsupported || self.read_only => Caching::default(),
            Err(failure) => return Err(failure),
        };
        Ok(Facts {
            inquiry,
            wwid: self.page(0x83)?.as_deref().and_then(facts::wwid),
            serial,
            limits: Limits::decode(&page(0xB0)?),
            provisioning: Provisioning::decode(&page(0xB2)?),
            caching,
            capacity,
        })
    }

    /// A page of vital product data; `None`: it does not have it.
    pub(crate) fn page(&self, number: u8) -> Result<Option<Vec<u8>>, Failure> {
        match self.read_in(&commands::inquiry(Some(number), PAGE as u16), PAGE) {
            Ok(bytes) => Ok(facts::page_body(number, &bytes).map(<[u8]>::to_vec)),
            Err(failure) if failure.unsupported => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    pub(crate) fn capacity(&self) -> Result<Capacity, Failure> {
        let bytes = self.read_in(&commands::read_capacity(), 32)?;
        Capacity::decode(&bytes).map_err(|why| Failure::new(LunErrorKind::NotDone, why))
    }

    /// Size in bytes as it was last told.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Asks for the size.
    pub(crate) fn refresh(&self) -> Result<(), Failure> {
        let capacity = self.capacity()?;
        if capacity.block_bytes != self.facts.capacity.block_bytes {
            let why =
                format!("its blocks have {} bytes now, not {}", capacity.block_bytes, self.facts.capacity.block_bytes);
            return Err(Failure::new(LunErrorKind::NotDone, why));
        }
        self.bytes.store(capacity.bytes(), Ordering::Relaxed);
        self.resized.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes of a logical block.
    pub fn block_bytes(&self) -> usize {
        self.facts.capacity.block_bytes as usize
    }

    /// Most bytes of one transfer: what all paths and the unit take, in whole blocks.
    pub fn max_transfer(&self) -> usize {
        let block = self.block_bytes();
        let unit = match self.facts.limits.transfer {
            0 => usize::MAX,
            blocks => (blocks as usize).saturating_mul(block),
        };
        let most = self.paths.iter().map(|path| path.max_transfer()).min().unwrap_or(block).min(unit);
        (most - most % block).max(block)
    }

    /// A command that only answers, with `room` bytes for that.
    pub(crate) fn read_in(&self, cdb: &[u8], room: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; room];
        let order = Order { cdb, data: PathData::In(&mut bytes), repeat: Repeat::Reads, time: COMMAND_TIME };
        match self.run(order)? {
            Outcome::Done(transferred) => bytes.truncate(transferred.min(room)),
            Outcome::Miscompare => {
                return Err(Failure::new(LunErrorKind::NotDone, "a miscompare of a command that compares nothing"));
            }
        }
        Ok(bytes)
    }

    /// A command without data that may be repeated.
    pub(crate) fn plain(&self, cdb: &[u8]) -> Result<(), Failure> {
        self.run(Order { cdb, data: PathData::None, repeat: Repeat::Reads, time: COMMAND_TIME }).map(drop)
    }

    /// The path in use.
    pub(crate) fn path(&self) -> &Arc<dyn ScsiPath> {
        &self.paths[self.current.load(Ordering::Relaxed) % self.paths.len()]
    }

    fn next_path(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    /// Sends a command until it has an end, or patience has.
    pub fn run(&self, order: Order<'_, '_>) -> Result<Outcome, Failure> {
        self.run_from(order, None, None)
    }

    /// The same after a first try, which ended so; with `leave` for as long as it says.
    pub(crate) fn run_from(
        &self,
        order: Order<'_, '_>,
        mut first: Option<Result<PathAnswer, PathError>>,
        leave: Option<&Leave<'_>>,
    ) -> Result<Outcome, Failure> {
        let Order { cdb, mut data, repeat, time } = order;
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        let (mut attentions, mut conflicts) = (0, 0);
        // A try that may have been carried out, and is dead: whatever the next ones prove, they prove of themselves only.
        let mut doubt = None;
        loop {
            if repeat != Repeat::Reads && self.is_fenced() {
                return Err(fenced());
            }
            let path = self.path();
            let lent = match &mut data {
                PathData::None => PathData::None,
                PathData::In(into) => PathData::In(into),
                PathData::Out(from) => PathData::Out(from),
            };
            let answer = match first.take() {
                Some(first) => first,
                None if leave.is_some_and(|leave| !(leave.may_send)()) => {
                    let failure = Failure::new(LunErrorKind::NotDone, "it may not be sent any more");
                    return Err(doubted(doubt, failure));
                }
                None => path.execute(cdb, lent, time),
            };
            let (kind, why) = match answer {
                Err(PathError::NotSent(why)) => {
                    self.next_path();
                    (LunErrorKind::NotDone, why)
                }
                Err(PathError::Unknown(why)) => match repeat {
                    Repeat::Reads => {
                        self.next_path();
                        (LunErrorKind::NotDone, why)
                    }
                    Repeat::Writes if self.can_be_shut_out() && self.is_dead(path, leave) => {
                        doubt = Some(why.clone());
                        (LunErrorKind::Unknown, why)
                    }
                    _ => return Err(Failure::new(LunErrorKind::Unknown, why)),
                },
                Ok(answer) => match verdict(&answer) {
                    Verdict::Done => return Ok(Outcome::Done(answer.transferred)),
                    Verdict::Miscompare => return Ok(Outcome::Miscompare),
                    Verdict::Attention(code, qualifier) => {
                        attentions += 1;
                        self.attend(code, qualifier)?;
                        if attentions <= ATTENTIONS {
                            continue;
                        }
                        (LunErrorKind::NotDone, format!("it goes on telling of changes ({code:02x}/{qualifier:02x})"))
                    }
                    Verdict::Conflict => {
                        conflicts += 1;
                        match self.shut_out() {
                            Ok(Shut::Registered) if conflicts <= CONFLICTS => continue,
                            Ok(Shut::Registered) => {
                                let why = "a reservation of somebody else keeps this host out, though it is registered";
                                return Err(doubted(doubt, Failure::new(LunErrorKind::NotDone, why)));
                            }
                            Ok(Shut::Fenced) => return Err(fenced()),
                            Err(failure) => return Err(doubted(doubt, failure)),
                        }
                    }
                    Verdict::Later(why) => (LunErrorKind::NotDone, why),
                    Verdict::OtherPath(why) => {
                        self.next_path();
                        (LunErrorKind::NotDone, why)
                    }
                    Verdict::NoSpace(why) => return Err(doubted(doubt, Failure::new(LunErrorKind::NoSpace, why))),
                    Verdict::Refused(why) => return Err(doubted(doubt, Failure::new(LunErrorKind::NotDone, why))),
                    Verdict::Unsupported(why) => {
                        let failure = Failure { unsupported: true, ..Failure::new(LunErrorKind::NotDone, why) };
                        return Err(doubted(doubt, failure));
                    }
                    // It was answered, so it is dead: the same bytes may be written again.
                    Verdict::Ended(why) => match repeat {
                        Repeat::Reads => (LunErrorKind::NotDone, why),
                        Repeat::Writes => {
                            doubt = Some(why.clone());
                            (LunErrorKind::Unknown, why)
                        }
                        Repeat::Never => return Err(Failure::new(LunErrorKind::Unknown, why)),
                    },
                },
            };
            let patience = if repeat == Repeat::Writes && self.can_be_shut_out() { DATA_PATIENCE } else { PATIENCE };
            if began.elapsed() + pause > patience && !leave.is_some_and(|leave| (leave.goes_on)()) {
                return Err(doubted(doubt, Failure::new(kind, why)));
            }
            std::thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }

    /// Whether what ended as unknown on this path is proven dead; with `leave`, as soon as the storage can be asked.
    fn is_dead(&self, path: &Arc<dyn ScsiPath>, leave: Option<&Leave<'_>>) -> bool {
        loop {
            if path.settled() {
                return true;
            }
            if self.is_fenced() || !leave.is_some_and(|leave| (leave.goes_on)()) {
                return false;
            }
            std::thread::sleep(LONGEST_PAUSE);
        }
    }

    /// The unit told of a change; the command that it told so to was not carried out.
    fn attend(&self, code: u8, qualifier: u8) -> Result<(), Failure> {
        match (code, qualifier) {
            // Capacity data has changed; parameters of all kinds may have.
            (0x2A, 0x09 | 0x00 | 0x01) => self.resized.store(true, Ordering::Relaxed),
            // Reservations or registrations preempted: whoever did it may have meant this host.
            (0x2A, 0x03 | 0x05) => self.was_preempted()?,
            _ => {}
        }
        tracing::debug!(lun = self.name, "the unit tells of a change ({code:02x}/{qualifier:02x})");
        Ok(())
    }
}

/// The failure of somebody whom the storage refuses.
pub(crate) fn fenced() -> Failure {
    Failure::new(LunErrorKind::Fenced, "the storage refuses this host: another host has removed its registration")
}

/// A failure proves nothing of an earlier try.
fn doubted(doubt: Option<String>, failure: Failure) -> Failure {
    match doubt {
        Some(earlier) if failure.kind != LunErrorKind::Fenced => {
            let why = format!("{}; before that: {earlier}", failure.why);
            Failure { kind: LunErrorKind::Unknown, ..Failure::new(LunErrorKind::Unknown, why) }
        }
        _ => failure,
    }
}
