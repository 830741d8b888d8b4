//! Owns: sessions that another program of this host has with a unit for a mount: what it is given to make one, how it moves data by it, and
//! the proof that nothing of it is left.
//! Promises: the session is an initiator port of its own, registered under the mount's key, so that who shuts out the mount shuts it out;
//! commands are in flight from one thread without anybody waiting; whatever does not end well at once is dealt with by [`Device::run`]'s
//! rules. Must not know: who the program is, gates, how what it is given gets there.
//!
//! ```text
//! mount: lend_session -> pass (where, who, key)          program: Session::open(pass): log in, register the key
//! mount: reads its slot live, after that  <------------  program: asks for it, then moves data
//! mount: end_session: logs in as the same port, which ends the session that is there (RFC 7143, 6.3.5), takes the port's registration off
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use iscsi::initiator::{Data, DigestChoice, Initiator, Options, Url};
use scsi::{PathAnswer, PathData, PathError, ScsiPath};
use serde::{Deserialize, Serialize};
use vmfs_core::lun::{LentSession, LunError, LunErrorKind, PathOwner};
use vmfs_core::units::SlotId;

use crate::answer::{Verdict, verdict};
use crate::commands::{self, REGISTER};
use crate::device::{COMMAND_TIME, DATA_TIME, Device, Failure, Leave, Order, Outcome, Repeat};
use crate::iscsi_path::IscsiPath;
use crate::reservations::Standing;

/// Answers to the removal of a registration that tell of something else first.
const ATTENTIONS: u32 = 32;

/// Where a unit is and who asks for it, as text. It holds secrets.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pass {
    name: String,
    host: String,
    port: u16,
    target: String,
    lun: u16,
    account: Option<(String, String)>,
    target_account: Option<(String, String)>,
    header_digest: u8,
    data_digest: u8,
    initiator: String,
    isid: [u8; 6],
    /// 0: the unit has no reservations for registrants.
    key: u64,
}

/// By what a unit was opened.
pub(crate) struct Origin {
    pub url: Url,
    pub options: Options,
}

const DIGESTS: [DigestChoice; 3] = [DigestChoice::None, DigestChoice::Preferred, DigestChoice::Required];

fn digest_number(choice: DigestChoice) -> u8 {
    DIGESTS.iter().position(|one| *one == choice).unwrap_or(0) as u8
}

fn isid_of(port: u64) -> [u8; 6] {
    let bytes = port.to_be_bytes();
    std::array::from_fn(|at| bytes[at + 2])
}

fn not_done(why: impl Into<String>) -> Failure {
    Failure::new(LunErrorKind::NotDone, why)
}

impl Origin {
    pub(crate) fn of(url: Url) -> Origin {
        Origin { url, options: Options::default() }
    }

    fn pass(&self, name: &str, isid: [u8; 6], key: u64) -> Pass {
        let (url, options) = (&self.url, &self.options);
        let account = |account: &Option<iscsi::initiator::Account>| {
            account.as_ref().map(|account| (account.name.clone(), account.secret.reveal().to_owned()))
        };
        Pass {
            name: name.to_owned(),
            host: url.host.clone(),
            port: url.port,
            target: url.target.clone(),
            lun: url.lun,
            account: account(&url.account),
            target_account: account(&url.target_account),
            header_digest: digest_number(url.header_digest.unwrap_or(options.header_digest)),
            data_digest: digest_number(url.data_digest.unwrap_or(options.data_digest)),
            initiator: url.initiator.clone().unwrap_or_else(|| options.initiator.clone()),
            isid,
            key,
        }
    }
}

impl Pass {
    fn connect(&self) -> Result<Initiator, Failure> {
        let digest = |number: u8| DIGESTS.get(usize::from(number)).copied();
        let account = |pair: &Option<(String, String)>| {
            let (name, secret) = pair.clone()?;
            Some(iscsi::initiator::Account { name, secret: iscsi::initiator::Secret::new(secret) })
        };
        let url = Url {
            host: self.host.clone(),
            port: self.port,
            target: self.target.clone(),
            lun: self.lun,
            account: account(&self.account),
            target_account: account(&self.target_account),
            header_digest: digest(self.header_digest),
            data_digest: digest(self.data_digest),
            initiator: Some(self.initiator.clone()),
        };
        let options = Options { isid: Some(self.isid), ..Options::default() };
        Initiator::connect(&url, options).map_err(|error| not_done(error.to_string()))
    }
}

impl Device {
    /// The key of its slot under which this program's paths are registered; 0: none.
    pub(crate) fn own_key(&self) -> u64 {
        match *self.standing.lock() {
            Standing::Owner(key) => key,
            _ => 0,
        }
    }

    /// What another program needs for a session of its own; `None`: the unit is not reached by iSCSI.
    pub(crate) fn lend(&self) -> Option<Result<LentSession, Failure>> {
        let origin = self.origin.as_ref()?;
        let mut isid = [0; 6];
        if let Err(error) = getrandom::fill(&mut isid[1..]) {
            return Some(Err(not_done(format!("no random bytes: {error}"))));
        }
        // Type 2, "random" (RFC 7143, 11.12.5).
        isid[0] = 0x80;
        let port = isid.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        let pass = serde_json::to_string(&origin.pass(&self.name, isid, self.own_key()));
        Some(pass.map(|pass| LentSession { port, pass }).map_err(|error| not_done(error.to_string())))
    }

    /// Proves that nothing of the session that `port` has with the portal group `place` is left, and takes its registration off.
    pub(crate) fn end_lent(&self, port: u64, place: Option<&str>) -> Result<(), Failure> {
        let Some(origin) = &self.origin else { return Err(not_done("it has no sessions")) };
        let key = self.own_key();
        // By this login the target ends the session that the port has had, with everything in it.
        let path = IscsiPath::new(origin.pass(&self.name, isid_of(port), key).connect()?);
        if !path.settled() {
            return Err(not_done(
                "the unit does not answer on the session that has taken the place of the one to be ended",
            ));
        }
        if key != 0 {
            self.take_off(&path, key)?;
        }
        let there = path.initiator().portal_group();
        if there.as_deref() == place {
            return Ok(());
        }
        Err(not_done(format!(
            "the target's portal leads to its group {there:?} now, and the session was with {place:?}"
        )))
    }

    fn take_off(&self, path: &dyn ScsiPath, key: u64) -> Result<(), Failure> {
        let (cdb, list) = commands::reserve_out(REGISTER, 0, key, 0, self.persists.load(Ordering::Relaxed));
        for _ in 0..ATTENTIONS {
            let answer = path.execute(&cdb, PathData::Out(&list), COMMAND_TIME);
            match verdict(&answer.map_err(|error| not_done(error.to_string()))?) {
                // One that was not registered is a conflict.
                Verdict::Done | Verdict::Conflict => return Ok(()),
                Verdict::Attention(..) => {}
                Verdict::Later(_) => std::thread::sleep(Duration::from_millis(20)),
                other => return Err(not_done(format!("its registration stays: {other:?}"))),
            }
        }
        Err(not_done("it goes on telling of changes"))
    }
}

/// A session with a unit whose mount runs in another program.
pub struct Session {
    device: Device,
    initiator: Arc<Initiator>,
    key: u64,
}

/// Bytes on their way, with how far they are.
pub struct Transfer {
    offset: u64,
    writes: bool,
    durable: bool,
    memory: Vec<u8>,
    first: Option<Result<PathAnswer, PathError>>,
}

impl Transfer {
    /// Reads as many bytes as `memory` has, at most [`Session::max_transfer`].
    pub fn read(offset: u64, memory: Vec<u8>) -> Transfer {
        Transfer { offset, writes: false, durable: false, memory, first: None }
    }

    /// Writes these bytes, at most [`Session::max_transfer`].
    pub fn write(offset: u64, memory: Vec<u8>, durable: bool) -> Transfer {
        Transfer { offset, writes: true, durable, memory, first: None }
    }

    /// The memory, with what was read.
    pub fn into_memory(self) -> Vec<u8> {
        self.memory
    }

    fn cdb(&self, device: &Device) -> [u8; 16] {
        let (block, count) = device.blocks(self.offset, self.memory.len() as u64);
        match self.writes {
            true => commands::write(block, count, self.durable && device.facts.caching.force_unit_access),
            false => commands::read(block, count),
        }
    }
}

impl Session {
    /// Makes the session that a mount has given `pass` for, and registers it under the mount's key. Who writes waits for the mount's word,
    /// after that, that it still lives. Blocks.
    ///
    /// # Errors
    /// [`Failure`], without secrets.
    pub fn open(pass: &str, read_only: bool) -> Result<Session, Failure> {
        // A message of the parser could repeat what it has read.
        let pass: Pass =
            serde_json::from_str(pass).map_err(|_| not_done("what the mount says of its LUN makes no sense"))?;
        let initiator = Arc::new(pass.connect()?);
        let path: Arc<dyn ScsiPath> = Arc::new(IscsiPath::of(initiator.clone()));
        let device = Device::open(pass.name, vec![path], read_only)?;
        let session = Session { device, initiator, key: pass.key };
        session.register()?;
        Ok(session)
    }

    /// Registers the session under the mount's key, if it writes and the unit has reservations. Blocks.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn register(&self) -> Result<(), Failure> {
        if self.device.read_only || self.key == 0 {
            return Ok(());
        }
        self.device.lost_registration.store(false, Ordering::Relaxed);
        self.device.own(PathOwner { slot: SlotId(0), key: self.key })
    }

    /// The storage has forgotten this session's registration, and not the host: [`Session::register`], and ask the mount whether it lives.
    pub fn has_lost_its_registration(&self) -> bool {
        self.device.lost_registration.load(Ordering::Relaxed)
    }

    /// Takes the registration off: the mount does not live. Blocks.
    pub fn withdraw(&self) {
        self.device.disown();
    }

    /// The target's portal group that it is with, as the target names it.
    pub fn place(&self) -> Option<String> {
        self.initiator.portal_group()
    }

    /// Most bytes of one transfer, in whole blocks.
    pub fn max_transfer(&self) -> usize {
        self.device.max_transfer()
    }

    /// Alignment of offset and length, in bytes.
    pub fn block_bytes(&self) -> usize {
        self.device.block_bytes()
    }

    /// Receives for [`Session::attempt`]; runs beside it, on its thread, and never ends. It needs a tokio runtime.
    pub async fn drive(&self) {
        self.initiator.drive().await;
    }

    /// One try, which changes no threads. `permit` is asked last before it is sent. `Err`: it did not end well, see [`Session::finish`].
    pub async fn attempt(&self, transfer: Transfer, permit: &dyn Fn() -> bool) -> Result<Vec<u8>, Transfer> {
        if self.device.is_fenced() || transfer.durable && !self.device.facts.caching.force_unit_access {
            return Err(transfer);
        }
        let (cdb, length) = (transfer.cdb(&self.device), transfer.memory.len());
        let Transfer { offset, writes, durable, memory, .. } = transfer;
        let data = if writes { Data::Out(memory) } else { Data::In(memory) };
        match self.initiator.perform(&cdb, data, DATA_TIME, permit).await {
            (Ok(PathAnswer { status: 0, transferred, .. }), memory) if transferred == length => Ok(memory),
            (first, memory) => Err(Transfer { offset, writes, durable, memory, first: Some(first) }),
        }
    }

    /// Goes on with what did not end well: repeats it where that is allowed, as long as `leave` says. Gives the memory back. Blocks.
    pub fn finish(&self, transfer: Transfer, leave: &Leave<'_>) -> (Result<(), LunError>, Vec<u8>) {
        let (cdb, length, device) = (transfer.cdb(&self.device), transfer.memory.len(), &self.device);
        let Transfer { offset, writes, durable, mut memory, first } = transfer;
        let (data, repeat) = match writes {
            true => (PathData::Out(&memory), Repeat::Writes),
            false => (PathData::In(&mut memory), Repeat::Reads),
        };
        let order = Order { cdb: &cdb, data, repeat, time: DATA_TIME };
        let ended = device.run_from(order, first, Some(leave)).and_then(|outcome| match outcome {
            Outcome::Done(moved) if moved == length => Ok(()),
            _ if writes => Err(Failure::new(LunErrorKind::Unknown, "fewer bytes were taken than were sent")),
            _ => Err(not_done("fewer bytes came than were asked for")),
        });
        let what = if writes { "write" } else { "read" };
        let mut result = ended.map_err(|failure| device.error(what, (offset, length as u64), failure));
        if result.is_ok() && durable && !device.facts.caching.force_unit_access {
            result = device.synchronize();
        }
        (result, memory)
    }

    /// Logs out, without waiting for it: it moves no data any more.
    pub fn leave(&self) {
        self.initiator.leave();
    }

    /// Whether every command of this session whose end is not known has ended by now. Blocks.
    pub fn is_settled(&self) -> bool {
        self.device.path().settled()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        Origin::of(Url::parse_with(text, &|_| None).unwrap())
    }

    #[test]
    fn a_pass_says_all_that_the_url_said_and_the_port_is_its_own() {
        let from = origin(
            "iscsi://u%p%40@[fe80::1]:1/iqn.a/7?target_user=t&target_password=q&data_digest=crc32c&initiator=iqn.me",
        );
        let pass = serde_json::to_string(&from.pass("shown", isid_of(0x8001_0203_0405), 9)).unwrap();
        let back: Pass = serde_json::from_str(&pass).unwrap();
        assert_eq!((back.host.as_str(), back.port, back.lun, back.key), ("fe80::1", 1, 7, 9));
        assert_eq!(back.account, Some(("u".to_owned(), "p%40".to_owned())));
        assert_eq!(back.target_account, Some(("t".to_owned(), "q".to_owned())));
        assert_eq!((back.header_digest, back.data_digest, back.initiator.as_str()), (0, 2, "iqn.me"));
        assert_eq!((back.isid, back.name.as_str()), ([0x80, 1, 2, 3, 4, 5], "shown"));
    }

    #[test]
    fn a_pass_that_is_none_is_a_refusal_that_repeats_nothing_of_it() {
        for pass in ["", "{}", r#"{"name":"secret"}"#, r#"{"secret":1}"#] {
            let failure = Session::open(pass, true).err().unwrap();
            assert!(failure.why.contains("makes no sense") && !failure.why.contains("secret"), "{}", failure.why);
        }
    }
}
