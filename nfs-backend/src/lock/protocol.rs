//! Owns: how a lock is taken, renewed, watched, broken and given back (`docs/NFS.md`, with the proof).
//! Promises: what is said of a lock rests on answers of the server, never on a cache or on the server's clock; two breakers never both win.
//! Must not know: connections; which clock it is.
//!
//! The lock of a disk is a chain of files: `.lck-<fileid>`, and for each lock file that was broken one `.lck-<fileid>.<its own fileid>`, made by
//! exclusive CREATE. The last one is the lock. Only its holder removes the first one, and by that frees the disk.

use std::time::Duration;

use super::record::{Content, Owner, Record};
use super::tenure::{Moment, SharedTenure, Timing};
use crate::error::NfsError;
use crate::nfs3::{FileHandle, Verifier};
use crate::url::Version;

/// Longest chain that is followed: one file for each time that the lock was broken since it was last given back.
const MAX_CHAIN: usize = 1000;
/// How often a lock is looked at while it is watched.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often somebody else may be faster.
const MAX_ROUNDS: usize = 100;

/// A lock file as the server knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Its handle.
    pub handle: FileHandle,
    /// Number within its file system.
    pub fileid: u64,
}

/// The calls on a directory that locks are made of. Nothing may be answered from a cache.
pub trait Store {
    /// The file of a name.
    fn lookup(&self, name: &str) -> impl Future<Output = Result<Option<Observed>, NfsError>>;
    /// Makes a file by exclusive CREATE; `None` if there is one that was made with another verifier.
    fn create(&self, name: &str, verifier: Verifier) -> impl Future<Output = Result<Option<Observed>, NfsError>>;
    /// The first 128 bytes of a file; `None` if it is gone.
    fn read(&self, file: &FileHandle) -> impl Future<Output = Result<Option<Vec<u8>>, NfsError>>;
    /// Writes durably at the start of a file; `false` if it is gone.
    fn write(&self, file: &FileHandle, bytes: &[u8]) -> impl Future<Output = Result<bool, NfsError>>;
    /// Removes a name, sent once; if `gated` only while the tenure is open at the moment of sending.
    fn remove(&self, name: &str, gated: bool) -> impl Future<Output = Result<(), NfsError>>;
    /// The time of a clock that never stands still.
    fn now(&self) -> Moment;
    /// Random bytes.
    fn random(&self) -> [u8; 16];
    /// Seconds since 1970, for people.
    fn wall_clock(&self) -> u64;
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The lock file.
    pub file: String,
    /// His record, if he has written one.
    pub record: Option<Record>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.record {
            Some(record) => write!(out, "process {} on host {}", record.process, record.host),
            None => write!(out, "a host that has not written its name into {} yet", self.file),
        }
    }
}

/// Why a lock is not had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// Somebody alive holds it.
    #[error("it is locked by {0}, which renews its lock")]
    Held(Holder),
    /// The lock file is not one of this program.
    #[error(
        "its lock file {0} was not written by this program (ESX uses the same names): make sure that no other host uses the disk, then remove \
         the file"
    )]
    Foreign(String),
    /// The disks of the directory are locked by another version of NFS.
    #[error(
        "the disks of this directory are locked by {found}, which {wanted} does not see (the mark {} says so): give the URL the other version by \
         ?version=; or, when no machine uses any disk of the directory, remove the mark",
        super::mark::MARK
    )]
    Version {
        /// Which version, or what the mark says.
        found: String,
        /// The one that was to be used.
        wanted: Version,
    },
    /// A client of the server keeps others from writing, and the protocol does not tell which.
    #[error(
        "a client of the server has it open and lets nobody else write; NFSv4.1 does not tell who, and {0} names nobody: look for it among the \
         server's clients"
    )]
    Denied(String),
    /// Others were faster again and again.
    #[error("others are faster again and again; try again")]
    Contended,
    /// The lock was broken very often without being given back once.
    #[error("more than {MAX_CHAIN} lock files {0}.*: make sure that no host uses the disk, then remove them")]
    Chain(String),
    /// The server does not answer, or refuses.
    #[error("the lock {file} cannot be had: {cause}{}", .cause.hint())]
    Nfs {
        /// The lock file.
        file: String,
        /// Why.
        cause: NfsError,
    },
}

/// Why a lock that was held is not any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The server could not be asked: it may still be ours.
    Unsure(NfsError),
    /// It is somebody else's, or was removed.
    Gone(String),
}

/// A lock that is held.
#[derive(Clone, Debug)]
pub struct Held {
    /// The files of the chain, the own one last, by name and file.
    chain: Vec<(String, Observed)>,
    record: Record,
}

impl Held {
    /// The lock file.
    pub fn file(&self) -> &str {
        &self.own().0
    }

    /// The record in it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    fn own(&self) -> &(String, Observed) {
        self.chain.last().expect("a chain has a file")
    }
}

/// The chain of a lock, and what its last file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    files: Vec<(String, Observed)>,
    bytes: Vec<u8>,
}

impl Chain {
    fn holder(&self) -> Holder {
        let record = match Content::of(&self.bytes) {
            Content::Record(record) => Some(record),
            _ => None,
        };
        Holder { file: self.files.last().map(|(name, _)| name.clone()).unwrap_or_default(), record }
    }
}

/// The name of the file that breaks the lock file `file` of the lock `root`.
fn successor(root: &str, file: &Observed) -> String {
    format!("{root}.{:x}", file.fileid)
}

/// Follows the chain. `None`: the disk is not locked.
async fn walk(store: &impl Store, root: &str) -> Result<Option<Chain>, LockError> {
    let failed = |file: &str| {
        let file = file.to_owned();
        move |cause| LockError::Nfs { file, cause }
    };
    'again: for _ in 0..MAX_ROUNDS {
        let Some(first) = store.lookup(root).await.map_err(failed(root))? else { return Ok(None) };
        let mut files = vec![(root.to_owned(), first)];
        let mut last = first;
        loop {
            let next = successor(root, &last);
            let Some(found) = store.lookup(&next).await.map_err(failed(&next))? else { break };
            // A file that breaks itself: a number was used again after the chain was given back. It will be looked at anew.
            if files.len() >= MAX_CHAIN || files.iter().any(|(_, file)| *file == found) {
                return Err(LockError::Chain(root.to_owned()));
            }
            files.push((next, found));
            last = found;
        }
        match store.read(&last.handle).await.map_err(failed(root))? {
            Some(bytes) => return Ok(Some(Chain { files, bytes })),
            None => continue 'again,
        }
    }
    Err(LockError::Contended)
}

/// Judges by change: the same chain with the same bytes for so long.
#[derive(Debug, Default)]
struct Watch(Option<(Chain, Moment)>);

/// What a watch makes of a look.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Not long enough yet.
    Undecided,
    /// The last file has changed: its holder lives.
    Alive,
    /// It stood still.
    Stale,
}

impl Watch {
    /// A look that was begun at `begun` and ended at `ended` showed this.
    fn look(&mut self, chain: &Chain, begun: Moment, ended: Moment, timing: &Timing) -> Verdict {
        match &self.0 {
            Some((known, since)) if known == chain => {
                if begun.saturating_sub(*since) >= timing.stale {
                    Verdict::Stale
                } else {
                    Verdict::Undecided
                }
            }
            Some((known, _)) if known.files == chain.files => Verdict::Alive,
            _ => {
                self.0 = Some((chain.clone(), ended));
                Verdict::Undecided
            }
        }
    }
}

/// Takes the lock `root`: at once if it is free, after [`Timing::stale`] if its holder gives no sign of life. `waits` is told, once, for whom
/// it waits.
///
/// # Errors
/// [`LockError`]: `Held` as soon as the holder gave a sign of life.
pub async fn acquire(
    store: &impl Store,
    root: &str,
    owner: &Owner,
    (tenure, timing): (&SharedTenure, &Timing),
    mut waits: impl FnMut(&Holder),
) -> Result<Held, LockError> {
    let mut watch = Watch::default();
    let mut told = false;
    let mut rounds = 0;
    loop {
        let begun = store.now();
        let Some(chain) = walk(store, root).await? else {
            rounds += 1;
            if rounds > MAX_ROUNDS {
                return Err(LockError::Contended);
            }
            if let Some(file) = create(store, root).await? {
                let files = vec![(root.to_owned(), file)];
                if let Some(held) = claim(store, root, files, owner, (tenure, timing)).await? {
                    return Ok(held);
                }
            }
            continue;
        };
        if Content::of(&chain.bytes) == Content::Foreign {
            return Err(LockError::Foreign(chain.holder().file));
        }
        match watch.look(&chain, begun, store.now(), timing) {
            Verdict::Alive => return Err(LockError::Held(chain.holder())),
            Verdict::Undecided => {
                if !std::mem::replace(&mut told, true) {
                    waits(&chain.holder());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Verdict::Stale => {
                if let Some(files) = overtake(store, root, &chain).await?
                    && let Some(held) = claim(store, root, files, owner, (tenure, timing)).await?
                {
                    return Ok(held);
                }
            }
        }
    }
}

async fn create(store: &impl Store, name: &str) -> Result<Option<Observed>, LockError> {
    let random = store.random();
    let verifier = *random.first_chunk().expect("sixteen bytes are more than eight");
    store.create(name, verifier).await.map_err(|cause| LockError::Nfs { file: name.to_owned(), cause })
}

/// Makes the file that breaks the last one of a chain that stood still, and looks again at what it breaks. `None`: somebody was faster, or the
/// holder has come back; then the new file ends his tenure all the same, and is waited out like any other.
async fn overtake(store: &impl Store, root: &str, chain: &Chain) -> Result<Option<Vec<(String, Observed)>>, LockError> {
    let (name, last) = chain.files.last().expect("a chain has a file");
    let next = successor(root, last);
    let failed = |cause| LockError::Nfs { file: next.clone(), cause };
    let Some(own) = create(store, &next).await? else { return Ok(None) };
    // The bytes first, then the names: what they say is from after the file was made.
    if store.read(&last.handle).await.map_err(failed)?.as_ref() != Some(&chain.bytes) {
        return Ok(None);
    }
    for (name, file) in [(name, last), (&chain.files[0].0, &chain.files[0].1)] {
        if store.lookup(name).await.map_err(failed)? != Some(*file) {
            return Ok(None);
        }
    }
    let mut files = chain.files.clone();
    files.push((next, own));
    Ok(Some(files))
}

/// Writes the own record into the last file of a chain, which is ours, and makes sure that it still counts.
async fn claim(
    store: &impl Store,
    root: &str,
    chain: Vec<(String, Observed)>,
    owner: &Owner,
    (tenure, timing): (&SharedTenure, &Timing),
) -> Result<Option<Held>, LockError> {
    let record = Record {
        counter: 0,
        incarnation: store.random(),
        process: owner.process,
        since: store.wall_clock(),
        host: Record::fitting(&owner.host),
    };
    let mut held = Held { chain, record };
    match renew(store, root, &mut held, tenure, timing).await {
        Ok(()) => Ok(Some(held)),
        Err(Loss::Gone(_)) => Ok(None),
        Err(Loss::Unsure(cause)) => Err(LockError::Nfs { file: held.file().to_owned(), cause }),
    }
}

/// Gives a sign of life, and only then looks whether the lock was broken: whoever breaks it does the same two things in the other order, so one
/// of the two sees the other.
///
/// # Errors
/// [`Loss`]
pub async fn renew(
    store: &impl Store,
    root: &str,
    held: &mut Held,
    tenure: &SharedTenure,
    timing: &Timing,
) -> Result<(), Loss> {
    let sent = store.now();
    held.record.counter += 1;
    let (name, own) = held.own();
    if !store.write(&own.handle, &held.record.encode()).await.map_err(Loss::Unsure)? {
        return Err(Loss::Gone(format!("its lock file {name} was removed")));
    }
    let next = successor(root, own);
    if let Some(broken) = store.lookup(&next).await.map_err(Loss::Unsure)? {
        let bytes = store.read(&broken.handle).await.map_err(Loss::Unsure)?.unwrap_or_default();
        let holder = Chain { files: vec![(next, broken)], bytes }.holder();
        return Err(Loss::Gone(format!("the lock was not renewed in time and was taken by {holder}")));
    }
    let first = &held.chain[0];
    for (name, file) in [first, held.own()] {
        if store.lookup(name).await.map_err(Loss::Unsure)? != Some(*file) {
            return Err(Loss::Gone(format!("its lock file {name} was removed or replaced")));
        }
    }
    tenure.renewed(sent, timing);
    Ok(())
}

/// Gives the lock back: by one REMOVE of the chain's first file, which is sent once, and only while the tenure is open. If its outcome is not known
/// the lock is left to become stale.
///
/// # Errors
/// [`NfsError`] of that REMOVE.
pub async fn release(store: &impl Store, held: &Held) -> Result<(), NfsError> {
    store.remove(&held.chain[0].0, true).await?;
    // What is left breaks nothing that there is. It is in nobody's way for longer than any lock.
    for (name, _) in &held.chain[1..] {
        let _ = store.remove(name, false).await;
    }
    Ok(())
}

/// Who holds a lock now, as far as one look tells: whether he lives takes a second one.
///
/// # Errors
/// [`LockError`]
pub async fn look(store: &impl Store, root: &str) -> Result<Option<(Holder, Content)>, LockError> {
    Ok(walk(store, root).await?.map(|chain| (chain.holder(), Content::of(&chain.bytes))))
}
