//! Owns: the objects of a mounted volume as this host knows them.
//! Promises: an `Image` is one consistent state of root cell and body; changes by this host follow one another; a change by
//! another host in between is found out by the compare-and-write and never overwritten.
//! Must not know: what a directory or a mapping means.

mod commit;
mod hand_over;
mod load;
mod lock;
mod survey;
mod takeover;
mod unlink;

pub use commit::{Change, Committed, NewObject, RootEdit};
pub(crate) use hand_over::Handed;
pub use lock::HolderInfo;
pub(crate) use survey::Surveyed;

use std::cell::{Cell as StdCell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::{Rc, Weak};

use tokio::sync::Mutex;

use crate::alloc::Space;
use crate::alloc::units::UnitUse;
use crate::context::{Context, Moment};
use crate::error::FsError;
use crate::format::Cell;
use crate::format::body::Body;
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::{Holder, RootCell};
use crate::units::{FdId, Link, LunIndex};

/// Root cell and body of an object at one moment.
#[derive(Debug)]
pub struct Image {
    /// The root cell.
    pub cell: Cell,
    /// The root cell, decoded.
    pub root: RootCell,
    /// The body.
    pub body: Rc<Body>,
    /// From then on it was seen to be the newest one, at the latest; the default: not noted.
    seen: StdCell<Moment>,
}

impl Image {
    /// One that was the newest one at some time after `seen`.
    fn new(cell: Cell, root: RootCell, body: Rc<Body>, seen: Moment) -> Rc<Image> {
        Rc::new(Image { cell, root, body, seen: StdCell::new(seen) })
    }

    /// Link counter of the object.
    pub fn link(&self) -> Link {
        self.cell.header().link
    }
}

/// An object as this host knows it. One `Object` for one identity: all users share it.
pub struct Object {
    /// Identity.
    pub fd: FdId,
    image: RefCell<Rc<Image>>,
    /// Changes of the root cell by this host follow one another.
    busy: Mutex<()>,
    /// This host knows that it holds the lock.
    held: StdCell<bool>,
    /// All that an object without a name owned, but its body, is freed or about to be.
    erased: StdCell<Option<Link>>,
    /// A compare-and-write of the root cell is in doubt: the image is read again before it is used.
    doubtful: StdCell<bool>,
}

impl Object {
    /// The state as last read or written by this host.
    pub fn image(&self) -> Rc<Image> {
        self.image.borrow().clone()
    }

    /// Identity and link counter, as entries and handles keep them.
    pub fn reference(&self) -> ObjectRef {
        ObjectRef { fd: self.fd, link: self.image.borrow().link() }
    }

    /// The LUN of the root cell, on which new units of the object lie.
    pub fn lun(&self) -> LunIndex {
        self.fd.lun()
    }

    /// Whether this host knows that it holds the lock.
    pub fn is_held(&self) -> bool {
        self.held.get()
    }

    /// Whether all that it owned, but its body, is freed or about to be.
    pub fn is_erased(&self) -> bool {
        self.erased.get() == Some(self.image.borrow().link())
    }

    /// Notes that all that it owned, but its body, is freed or about to be.
    pub(crate) fn set_erased(&self) {
        self.erased.set(Some(self.image.borrow().link()));
    }

    fn set_image(&self, image: Rc<Image>) {
        self.doubtful.set(false);
        *self.image.borrow_mut() = image;
    }
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").field("fd", &self.fd).finish_non_exhaustive()
    }
}

/// The objects of a mounted volume.
pub struct Objects {
    context: Rc<Context>,
    space: Rc<Space>,
    table: RefCell<HashMap<FdId, Weak<Object>>>,
    /// Units that commits dropped; given back in batches.
    dropped: RefCell<Vec<UnitUse>>,
    /// Units whose mark this host took over from another one's with a change that then was lost.
    contested: RefCell<Vec<UnitUse>>,
    /// Objects whose lock this host may hold without knowing it.
    doubtful_locks: RefCell<BTreeSet<FdId>>,
    /// Objects whose lock stays as it is until this incarnation is over.
    kept_locks: RefCell<BTreeSet<FdId>>,
    /// Held while they are given back: who leaves must not take a set in work for an empty one.
    releasing: Mutex<()>,
    tidying: Mutex<()>,
}

/// Dropped units from which on a change gives them back before it takes another one.
const TIDY_FROM: usize = 256;
/// Dropped units that are given back with one batch.
const TIDY_BATCH: usize = 64;

impl Objects {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, space: Rc<Space>) -> Rc<Objects> {
        Rc::new(Objects {
            context,
            space,
            table: RefCell::default(),
            dropped: RefCell::default(),
            contested: RefCell::default(),
            doubtful_locks: RefCell::default(),
            kept_locks: RefCell::default(),
            releasing: Mutex::new(()),
            tidying: Mutex::new(()),
        })
    }

    /// What the volume's parts share.
    pub fn context(&self) -> &Rc<Context> {
        &self.context
    }

    /// The space.
    pub fn space(&self) -> &Rc<Space> {
        &self.space
    }

    /// Units that wait to be given back, or for a decision whether they are.
    pub fn deferred(&self) -> usize {
        self.dropped.borrow().len() + self.contested.borrow().len()
    }

    /// Those of them that do not lie on a lost LUN.
    pub fn deferred_at_hand(&self) -> usize {
        let at_hand = self.context.luns_at_hand();
        self.dropped.borrow().iter().filter(|unit| at_hand.contains(&unit.at.lun)).count()
    }

    /// Gives back what commits dropped, but what lies on lost LUNs. Call it now and then, and before leaving. What certainly failed
    /// stays on the list, and holds up nothing else.
    pub async fn tidy(&self) -> Result<(), FsError> {
        let _one = self.tidying.lock().await;
        let at_hand = self.context.luns_at_hand();
        let (mut rest, kept): (Vec<UnitUse>, Vec<UnitUse>) =
            self.dropped.take().into_iter().partition(|unit| at_hand.contains(&unit.at.lun));
        self.dropped.borrow_mut().extend(kept);
        let mut result = Ok(());
        while !rest.is_empty() {
            let batch = rest.split_off(rest.len().saturating_sub(TIDY_BATCH));
            let (unchanged, outcome) = self.space.units.recycle(&batch).await;
            self.dropped.borrow_mut().extend(unchanged);
            result = result.and(outcome);
        }
        result
    }

    /// Notes units that nothing reaches any more.
    pub(crate) fn defer(&self, units: impl IntoIterator<Item = UnitUse>) {
        self.dropped.borrow_mut().extend(units);
    }

    /// Notes units that carry this host's mark, of which only a look can tell whether anything reaches them.
    pub(crate) fn contest(&self, units: impl IntoIterator<Item = UnitUse>) {
        self.contested.borrow_mut().extend(units);
    }

    /// Takes the units that [`Objects::contest`] has noted.
    pub(crate) fn take_contested(&self) -> Vec<UnitUse> {
        self.contested.take()
    }

    /// This incarnation as a lock holder on the LUN of an object.
    pub(crate) fn own_holder(&self, fd: FdId) -> Result<Holder, FsError> {
        Ok(Holder { slot: self.context.own_slot(fd.lun())?, incarnation: self.context.incarnation() })
    }

    /// Forgets every cache: this host was fenced.
    pub fn forget(&self) {
        self.table.borrow_mut().clear();
        self.dropped.borrow_mut().clear();
        self.contested.borrow_mut().clear();
        self.doubtful_locks.borrow_mut().clear();
        self.kept_locks.borrow_mut().clear();
        self.space.units.forget();
        self.space.roots.forget();
    }
}
