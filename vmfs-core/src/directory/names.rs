//! Owns: what all name operations share: the directory locks of this host, patience with other hosts, sentences of refusals.
//! Promises: one change of a directory at a time on this host, taken in one order; a loser waits by chance and gives up at last.
//! Must not know: what an operation does.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};

use super::image::UnitCache;
use super::rebuilt::Rebuilt;
use super::tidy::Unfinished;
use crate::context::Context;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::dirent::{MAX_NAME, ObjectRef, is_name};
use crate::object::{Object, Objects};
use crate::units::FdId;

/// Losses against other hosts after which the directory's `wanted` is set, so that the others pause.
pub(super) const LOSSES_UNTIL_WANTED: u32 = 8;
/// Attempts of one operation before it is given up.
const MOST_LOSSES: u32 = 200;
/// Rounds of waiting for another live host to finish what it has begun with an entry, before that is undone or refused.
const COURTESY_ROUNDS: u32 = 10;
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Name operations of one mounted volume.
pub struct Names {
    pub(super) context: Rc<Context>,
    pub(super) objects: Rc<Objects>,
    pub(super) cache: RefCell<UnitCache>,
    pub(super) unfinished: RefCell<Vec<Unfinished>>,
    /// Held while what is unfinished is taken up: who leaves must not take a list in work for an empty one.
    pub(super) tidying: Mutex<()>,
    /// Objects that have lost their names; their space is the caller's to free, at their last close.
    pub(super) removed: RefCell<Vec<Rc<Object>>>,
    /// Objects used lately, which the table of objects would forget: a directory is not read anew for each name.
    pub(super) recent: RefCell<Recent>,
    /// The root directory.
    pub(super) root: FdId,
    /// Names of lost directories, made when one is asked for.
    pub(super) rebuilt: Mutex<Option<Rc<Rebuilt>>>,
    /// Last known names that the bodies of renamed objects are still to be given.
    pub(super) hints: RefCell<BTreeMap<FdId, (ObjectRef, Vec<u8>)>>,
    /// Objects that were made and are not live yet, though they have their names.
    pub(super) unsettled: RefCell<BTreeMap<FdId, ObjectRef>>,
    locks: RefCell<HashMap<FdId, Weak<Mutex<()>>>>,
}

/// Held while this host changes a directory.
pub(super) type DirectoryGuard = OwnedMutexGuard<()>;

impl Names {
    /// Names over these objects, below this root directory.
    pub fn new(objects: Rc<Objects>, root: FdId) -> Names {
        Names {
            context: objects.context().clone(),
            objects,
            cache: RefCell::default(),
            unfinished: RefCell::default(),
            tidying: Mutex::default(),
            removed: RefCell::default(),
            recent: RefCell::default(),
            root,
            rebuilt: Mutex::default(),
            hints: RefCell::default(),
            unsettled: RefCell::default(),
            locks: RefCell::default(),
        }
    }

    /// Excludes other changes of these directories by this host. Always in the order of their identities, so that two operations
    /// never wait for each other.
    pub(super) async fn lock_directories(&self, directories: &[FdId]) -> Vec<DirectoryGuard> {
        let mut ordered = directories.to_vec();
        ordered.sort();
        ordered.dedup();
        let mut guards = Vec::with_capacity(ordered.len());
        for fd in ordered {
            let mutex = self.directory_mutex(fd);
            guards.push(mutex.lock_owned().await);
        }
        guards
    }

    fn directory_mutex(&self, fd: FdId) -> Arc<Mutex<()>> {
        let mut locks = self.locks.borrow_mut();
        if let Some(mutex) = locks.get(&fd).and_then(Weak::upgrade) {
            return mutex;
        }
        if locks.len() >= 64 && locks.len().is_power_of_two() {
            locks.retain(|_, mutex| mutex.strong_count() > 0);
        }
        let mutex = Arc::new(Mutex::new(()));
        locks.insert(fd, Arc::downgrade(&mutex));
        mutex
    }

    pub(super) fn patience(&self) -> Patience {
        Patience { env: self.context.env().clone(), losses: 0, waits: 0 }
    }
}

/// Objects kept, each at a place that follows from its identity.
const RECENT: usize = 1024;

/// Objects used lately.
pub(super) struct Recent(Vec<Option<Rc<Object>>>);

impl Default for Recent {
    fn default() -> Recent {
        Recent(vec![None; RECENT])
    }
}

impl Recent {
    pub fn keep(&mut self, object: &Rc<Object>) {
        self.0[(object.fd.get() % RECENT as u64) as usize] = Some(object.clone());
    }

    pub fn clear(&mut self) {
        *self = Recent::default();
    }
}

/// How long one operation puts up with other hosts.
pub(super) struct Patience {
    env: Rc<dyn Env>,
    losses: u32,
    waits: u32,
}

impl Patience {
    /// Another host changed something first: waits a random while. `Busy` when that happened too often.
    pub async fn lost(&mut self, name: &[u8]) -> Result<(), FsError> {
        self.losses += 1;
        if self.losses > MOST_LOSSES {
            return Err(refused(
                FsErrorKind::Busy,
                name,
                &format!("other hosts changed its directory first, {MOST_LOSSES} times; try again"),
            ));
        }
        self.pause(self.losses).await;
        Ok(())
    }

    /// Whether the directory's `wanted` is to be set.
    pub fn wants(&self) -> bool {
        self.losses >= LOSSES_UNTIL_WANTED
    }

    /// Waits for another host to finish what it has begun; false when that has been granted often enough.
    pub async fn courtesy(&mut self) -> bool {
        self.waits += 1;
        if self.waits > COURTESY_ROUNDS {
            return false;
        }
        self.pause(self.waits + 2).await;
        true
    }

    /// A random time of up to 0.5 ms, doubled with each round up to 50 ms.
    async fn pause(&self, round: u32) {
        pause(&self.env, LONGEST_PAUSE.min(FIRST_PAUSE * (1 << (round - 1).min(10)))).await;
    }
}

/// Waits between nothing and `longest`, by chance.
pub(super) async fn pause(env: &Rc<dyn Env>, longest: Duration) {
    let mut chance = [0; 2];
    env.random(&mut chance);
    env.sleep(longest * u32::from(u16::from_le_bytes(chance)) / u32::from(u16::MAX)).await;
}

/// A name for people.
pub(super) fn shown(name: &[u8]) -> String {
    format!("\"{}\"", name.escape_ascii())
}

/// A refusal that is about a name.
pub(super) fn refused(kind: FsErrorKind, name: &[u8], cause: &str) -> FsError {
    FsError::refused(kind, format!("{}: {cause}", shown(name)))
}

/// No such name.
pub(super) fn not_found(name: &[u8]) -> FsError {
    refused(FsErrorKind::NotFound, name, "there is no such name")
}

/// Whether these bytes may become a name.
pub(super) fn check_new_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > MAX_NAME {
        let cause = format!("a name has at most {MAX_NAME} bytes, this one has {}", name.len());
        return Err(refused(FsErrorKind::NameTooLong, &name[..32], &cause));
    }
    if name.is_empty() {
        return Err(FsError::refused(FsErrorKind::NotFound, "an empty name names nothing"));
    }
    if !is_name(name) {
        let cause = "a name has no '/' and no NUL and is not \".\" or \"..\"";
        return Err(refused(FsErrorKind::Invalid, name, cause));
    }
    Ok(())
}
