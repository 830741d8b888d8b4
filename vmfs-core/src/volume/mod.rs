//! Owns: a mounted volume: the public face that mount.vmfs, the tools and the tests use.
//! Promises: every name operation is one atomic change, whatever other hosts do meanwhile; errors name object, cause, next step.
//! Must not know: FUSE, sockets, threads. Everything runs on the thread that mounted.
//!
//! ```text
//! mount ──> Volume (cheap clone) ──> lookup, create, rename, open ...      any number at once, on one thread
//!              ├─ background()       polled beside them until unmount: renewals, deferred frees, tidying, free space
//!              └─ unmount()          closes, tidies, leaves the slots
//! ```

mod adopt;
mod affected;
mod background;
mod drain;
mod drops;
pub(crate) mod dump;
mod explain;
mod extend;
mod grow;
mod lock_break;
pub(crate) mod members;
pub(crate) mod membership;
pub(crate) mod mend;
mod mount;
mod operations;
mod patrol;
mod remove;
mod scrub;
mod status;
mod types;
pub(crate) mod words;

pub use dump::DumpTarget;
pub use members::lock_mode_of;
pub use membership::{LunFinder, WantedLun};
pub use scrub::{ScrubFinding, ScrubOptions, ScrubReport};
pub use types::{
    Affected, AffectedObject, AttributeChange, BrokenLock, DirEntry, DrainReport, Grown, HostStatus, LockHolder,
    LostPart, LunInfo, LunStatus, MissingLun, MountOptions, NewFile, NewObjectSpec, RemoveReport, RenameFlags, Renamed,
    Stat, StatFs, Stayed, Takeover, VolumeInfo, VolumeStatus, WhyLocked,
};

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{Mutex, Notify, RwLock};

use crate::context::Context;
use crate::directory::Names;
use crate::env::{Env, LocalFuture};
use crate::error::FsError;
use crate::file::{Files, HandOver, OpenFile, OpenMode};
use crate::format::body::{Content, RawDevice};
use crate::format::dirent::ObjectRef;
use crate::format::root_cell::Holder;
use crate::gate::GatePage;
use crate::keeper::{Embedded, SlotKeeper};
use crate::lun::Lun;
use crate::mkfs::Progress;
use crate::object::Objects;
use crate::slot::HostIdentity;
use crate::units::LunIndex;

/// Tells programs that move data themselves to let go of the disks whose locks lie on a LUN; true: nothing of them is on its way.
pub type LetGo = Box<dyn Fn(LunIndex) -> bool>;

/// A file that was created or found, and open if that was asked for.
pub type Created = (Stat, Option<Arc<OpenFile>>);

/// A mounted volume. Clones are the same mount.
#[derive(Clone)]
pub struct Volume {
    inner: Rc<Inner>,
}

struct Inner {
    context: Rc<Context>,
    names: Rc<Names>,
    objects: Rc<Objects>,
    files: Rc<Files>,
    info: VolumeInfo,
    host: HostIdentity,
    /// Unmount has begun: operations are refused.
    closing: Cell<bool>,
    /// The slots were left: background work ends.
    left: Cell<bool>,
    /// The background is to look around: there is something to tidy, or the volume was left.
    wake: Notify,
    /// Joins, renews and leaves the slots.
    keeper: Rc<dyn SlotKeeper>,
    /// Held while a LUN is taken up as a member, and from the beginning of the unmount on.
    adopting: Mutex<()>,
    /// Held while this host adds a LUN.
    extending: Mutex<()>,
    /// Held while this host empties a LUN.
    draining: Mutex<()>,
    /// The volume is about to be unmounted: long work ends where it stands.
    stopping: Cell<bool>,
    /// A header shows that the membership has changed.
    membership: Notify,
    /// Finds members that are not there.
    finder: RefCell<Option<Rc<dyn LunFinder>>>,
    /// Why members that are not there were not found.
    unfound: RefCell<BTreeMap<LunIndex, String>>,
    /// Members that were missing at the mount.
    missing: Vec<MissingLun>,
    /// Held while removed objects are freed.
    reaping: Mutex<()>,
    /// Scrubs that have begun: the last one goes on.
    scrubs: Cell<u64>,
    /// Shared by whatever in the background takes units or gives some back. Who leaves waits for it: nothing is to come to the pool
    /// after that was emptied.
    rounds: RwLock<()>,
    warnings: RefCell<Vec<String>>,
    /// Hosts that were taken over from.
    takeovers: RefCell<Vec<Takeover>>,
    /// Whether programs beside this one have let go of the disks whose locks lie on a LUN.
    others_let_go: RefCell<Option<LetGo>>,
}

impl Volume {
    /// Mounts the volume whose LUNs these are, in any order, and takes a slot on each (not when read-only).
    ///
    /// Refused with kind `Invalid`, naming the LUN, the cause and what to do: no LUN of this format, a LUN of another volume, a LUN
    /// given twice, two LUNs with one UUID (a clone or array snapshot), members that are missing, a LUN smaller than its header
    /// says, features or a lock mode or a cell size that do not fit. `Busy`: no slot is free. `Corrupt`: a damaged header.
    /// The caller polls [`Volume::background`] from now on.
    pub fn mount(
        luns: Vec<Rc<dyn Lun>>,
        options: MountOptions,
        env: Rc<dyn Env>,
    ) -> LocalFuture<'static, Result<Volume, FsError>> {
        Box::pin(async move { mount::mount(luns, options, env, GatePage::in_process(), Rc::new(Embedded)).await })
    }

    /// As [`Volume::mount`], with a gate page that other processes see too.
    pub fn mount_with_gate(
        luns: Vec<Rc<dyn Lun>>,
        options: MountOptions,
        env: Rc<dyn Env>,
        gate: GatePage,
    ) -> LocalFuture<'static, Result<Volume, FsError>> {
        Box::pin(async move { mount::mount(luns, options, env, gate, Rc::new(Embedded)).await })
    }

    /// As [`Volume::mount_with_gate`], with slots that `keeper` joins, renews and leaves. It writes the same gate page.
    pub fn mount_kept(
        luns: Vec<Rc<dyn Lun>>,
        options: MountOptions,
        env: Rc<dyn Env>,
        gate: GatePage,
        keeper: Rc<dyn SlotKeeper>,
    ) -> LocalFuture<'static, Result<Volume, FsError>> {
        Box::pin(async move { mount::mount(luns, options, env, gate, keeper).await })
    }

    /// Renews the slots, keeps the gate page, frees and tidies what operations left behind, refreshes the free space. Ends after
    /// [`Volume::unmount`]. Poll it on the mount's thread beside all operations; without it the lease runs out.
    pub fn background(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            background::run(&self.inner).await;
        })
    }

    /// Waits until this incarnation is over, and says why: another host took a slot over, or a LUN went back in time. Nothing was
    /// written since and nothing will be: the volume has to be mounted again. Never ends while all is well.
    pub fn until_over(&self) -> LocalFuture<'_, String> {
        Box::pin(async move { explain::why_over(&self.inner).await })
    }

    /// Whether this incarnation is over.
    pub fn is_over(&self) -> bool {
        self.inner.context.over().is_some()
    }

    /// Closes what is still open, writes what is not yet committed, finishes deferred work and leaves the slots: free when nothing
    /// is left behind, dirty otherwise. The volume refuses everything afterwards. An error says what could not be written or
    /// finished; the slots are left all the same. A host that was fenced has none to leave: `Fenced`.
    pub fn unmount(&self) -> LocalFuture<'_, Result<(), FsError>> {
        Box::pin(async move { mount::unmount(&self.inner).await })
    }

    /// The root directory.
    pub fn root(&self) -> ObjectRef {
        self.inner.info.root
    }

    /// What does not change while the volume is mounted.
    pub fn info(&self) -> &VolumeInfo {
        &self.inner.info
    }

    /// The members that were missing at the mount and are still, ascending.
    pub fn missing(&self) -> Vec<MissingLun> {
        status::missing(&self.inner)
    }

    /// The members that are there, ascending.
    pub fn luns(&self) -> Vec<LunInfo> {
        status::luns(&self.inner)
    }

    /// Takes up a LUN that became a member of the volume after it was mounted, or that was not there then: joins a slot on it and uses
    /// it from now on, for new files and those that are open. Nothing else stops meanwhile.
    ///
    /// Refused with kind `Invalid`, naming the LUN, the cause and what to do: no LUN of this volume, no member in use, a clone. `Exists`:
    /// it is there already. `Busy`: no slot is free on it.
    pub fn adopt(&self, lun: Rc<dyn Lun>) -> LocalFuture<'_, Result<LunIndex, FsError>> {
        Box::pin(async move { adopt::adopt(&self.inner, lun).await })
    }

    /// Tells how members that come later are found. Without it they are not: [`Volume::status`] says so.
    pub fn set_finder(&self, finder: Rc<dyn LunFinder>) {
        *self.inner.finder.borrow_mut() = Some(finder);
    }

    /// Formats a LUN and makes it a member. Every host takes it up within two heartbeats, if it finds it. An addition that another
    /// host left unfinished goes on where it stands.
    ///
    /// Refused as mkfs refuses (kinds `Exists`, `Busy`, `Invalid`; `force` overrides the first two); `Busy` too while another host adds
    /// the same LUN; `Io` while a member is not there.
    pub fn add_extent<'a>(
        &'a self,
        lun: Rc<dyn Lun>,
        force: bool,
        progress: &'a mut dyn FnMut(Progress),
    ) -> LocalFuture<'a, Result<LunIndex, FsError>> {
        Box::pin(async move { extend::add(&self.inner, lun, force, progress).await })
    }

    /// Takes the space that a member LUN has gained into the volume. Every host uses it within two heartbeats; one that died while it
    /// did this is followed by the next one.
    ///
    /// Refused with kind `Invalid`: it has not become larger by one block, or is not in use; `NoSpace`: it has grown as often as its
    /// header can say; `Busy`: another host is at it, or its end is not known yet.
    pub fn grow_extent<'a>(
        &'a self,
        lun: LunIndex,
        progress: &'a mut dyn FnMut(Progress),
    ) -> LocalFuture<'a, Result<Grown, FsError>> {
        Box::pin(async move { grow::grow(&self.inner, lun, progress).await })
    }

    /// Moves what lies on a member LUN to the others while the volume is in use; nothing new is put there from now on, by any host. What
    /// stays is in the report, with reasons; it can be repeated. Root cells stay: an object's identity is the place of its root cell.
    ///
    /// Refused with kind `NoSpace` or `Invalid`, before anything is changed: the others have no room, or there are none.
    pub fn drain_extent<'a>(
        &'a self,
        lun: LunIndex,
        progress: &'a mut dyn FnMut(Progress),
    ) -> LocalFuture<'a, Result<DrainReport, FsError>> {
        Box::pin(async move { drain::drain(&self.inner, lun, progress).await })
    }

    /// Gives the emptying of a LUN up: all hosts put things there again, and a drain that goes on ends. `Invalid`: it is not being drained.
    pub fn cancel_drain(&self, lun: LunIndex) -> LocalFuture<'_, Result<(), FsError>> {
        Box::pin(async move { drain::cancel(&self.inner, lun).await })
    }

    /// Takes a LUN that was emptied out of the volume, the first one too, while all hosts go on: what has to stay of it (its root cells,
    /// slots and tables) moves to a window on another LUN, and its device is not used any more. `progress` hears bytes of cells moved. Cut
    /// off anywhere it can be repeated, by any host.
    ///
    /// Refused, before anything is changed: it is not empty or not being drained, it is the only one in use, a LUN is not there, no other
    /// LUN has room for the window, it carries a window itself, a host runs a release that does not follow cells.
    pub fn remove_extent<'a>(
        &'a self,
        lun: LunIndex,
        progress: &'a mut dyn FnMut(Progress),
    ) -> LocalFuture<'a, Result<RemoveReport, FsError>> {
        Box::pin(async move { remove::remove(&self.inner, lun, progress).await })
    }

    /// Ends the growing and emptying of LUNs where it stands, for the volume is about to be unmounted: each can be repeated.
    pub fn end_long_work(&self) {
        self.inner.stopping.set(true);
    }

    /// Looks through everything that is on the LUNs for damage, while this host and others work; `tell` hears bytes done and to do.
    /// Nothing is written. `Busy`: another scrub of this mount has begun, or it is being unmounted.
    pub fn scrub<'a>(
        &'a self,
        options: ScrubOptions,
        tell: &'a mut dyn FnMut(u64, u64),
    ) -> LocalFuture<'a, Result<ScrubReport, FsError>> {
        Box::pin(async move { scrub::scrub(self.inner.for_reading()?, options, tell).await })
    }

    /// Space.
    pub fn statfs(&self) -> LocalFuture<'_, StatFs> {
        Box::pin(async move { status::statfs(&self.inner) })
    }

    /// The object of a name. `NotFound`, `NotDirectory`, `Stale` (the directory is gone).
    pub fn lookup<'a>(&'a self, directory: ObjectRef, name: &'a [u8]) -> LocalFuture<'a, Result<Stat, FsError>> {
        Box::pin(async move {
            let found = self.inner.for_reading()?.names.lookup(directory, name).await?;
            Ok(self.inner.freshen(found))
        })
    }

    /// Attributes of an object. `Stale` when it is gone (not while it is open here).
    pub fn stat(&self, object: ObjectRef) -> LocalFuture<'_, Result<Stat, FsError>> {
        Box::pin(async move {
            let found = self.inner.for_reading()?.names.stat(object).await?;
            Ok(self.inner.freshen(found))
        })
    }

    /// Changes attributes. `Busy` while another host has the object locked.
    pub fn set_attributes(&self, object: ObjectRef, change: AttributeChange) -> LocalFuture<'_, Result<Stat, FsError>> {
        Box::pin(async move { self.inner.for_writing()?.set_attributes(object, change).await })
    }

    /// Creates a file, and opens it if `open` is given. An existing file is given (and opened) unless `new.exclusive`; an existing
    /// directory is `IsDirectory` then. A file that could not be opened has been created all the same.
    pub fn create<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
        new: NewFile,
        open: Option<OpenMode>,
    ) -> LocalFuture<'a, Result<Created, FsError>> {
        Box::pin(async move { self.inner.for_writing()?.create_file(directory, name, new, open).await })
    }

    /// Creates an object in every detail (virtual disks, raw device mappings). `Exists` when the name is taken.
    pub fn create_object<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
        spec: NewObjectSpec,
    ) -> LocalFuture<'a, Result<Stat, FsError>> {
        Box::pin(async move { self.inner.for_writing()?.names.create(directory, name, spec).await })
    }

    /// Creates a directory. Under the root it goes to the LUN with the most free space, elsewhere to its parent's.
    pub fn make_directory<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
        mode: u32,
        uid: u32,
        gid: u32,
    ) -> LocalFuture<'a, Result<Stat, FsError>> {
        Box::pin(async move {
            let inner = self.inner.for_writing()?;
            let prefer = if directory == inner.info.root { inner.roomiest_lun() } else { None };
            inner.names.make_directory(directory, name, (mode, uid, gid), prefer).await
        })
    }

    /// Creates a symbolic link. A target is 1..=4095 bytes, else `Invalid` or `NameTooLong`.
    pub fn symlink<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
        target: &'a [u8],
        uid: u32,
        gid: u32,
    ) -> LocalFuture<'a, Result<Stat, FsError>> {
        Box::pin(async move { self.inner.for_writing()?.names.symlink(directory, name, target, (uid, gid)).await })
    }

    /// Target of a symbolic link; `Invalid` for other objects.
    pub fn read_link(&self, object: ObjectRef) -> LocalFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move { self.inner.for_reading()?.names.read_link(object).await })
    }

    /// Removes the name of an object that is no directory. `Busy` while another host has it locked; a file open on this host lives
    /// on until its last close. Gives the object that lost its name.
    pub fn unlink<'a>(&'a self, directory: ObjectRef, name: &'a [u8]) -> LocalFuture<'a, Result<ObjectRef, FsError>> {
        Box::pin(async move {
            let inner = self.inner.for_writing()?;
            let removed = inner.names.unlink(directory, name).await?;
            inner.after_removal(Some(removed)).await;
            Ok(removed)
        })
    }

    /// Removes an empty directory. `NotEmpty`, `NotDirectory`. Gives the object that lost its name.
    pub fn remove_directory<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
    ) -> LocalFuture<'a, Result<ObjectRef, FsError>> {
        Box::pin(async move {
            let inner = self.inner.for_writing()?;
            let removed = inner.names.remove_directory(directory, name).await?;
            inner.after_removal(Some(removed)).await;
            Ok(removed)
        })
    }

    /// Renames, replacing an existing name atomically (rename(2)): a directory replaces an empty directory only, anything else no
    /// directory. `CrossDirectory`: a directory moves only within its parent. `Busy`: the object goes to another directory, or is
    /// replaced, while another host has it locked.
    pub fn rename<'a>(
        &'a self,
        directory: ObjectRef,
        name: &'a [u8],
        new_directory: ObjectRef,
        new_name: &'a [u8],
        flags: RenameFlags,
    ) -> LocalFuture<'a, Result<Renamed, FsError>> {
        Box::pin(async move {
            let inner = self.inner.for_writing()?;
            let renamed = inner.names.rename(directory, name, new_directory, new_name, flags).await?;
            inner.after_removal(renamed.replaced).await;
            Ok(renamed)
        })
    }

    /// Up to `limit` entries that come after `cookie` (0: from the start), in the order of cookies. Fewer only at the end. A name
    /// that is neither created nor removed between two calls is given exactly once, whatever happens to others.
    pub fn read_directory(
        &self,
        directory: ObjectRef,
        cookie: u64,
        limit: usize,
    ) -> LocalFuture<'_, Result<Vec<DirEntry>, FsError>> {
        Box::pin(async move { self.inner.for_reading()?.names.read_directory(directory, cookie, limit).await })
    }

    /// Opens a file, disk or raw device mapping, taking the lock its kind needs. `Busy` says who holds it.
    pub fn open(&self, object: ObjectRef, mode: OpenMode) -> LocalFuture<'_, Result<Arc<OpenFile>, FsError>> {
        Box::pin(async move {
            let inner =
                if mode.write || mode.truncate { self.inner.for_writing()? } else { self.inner.for_reading()? };
            inner.open_file(object, mode).await
        })
    }

    /// What a raw device mapping stands for; `None`: the object is none.
    pub fn raw_device(&self, object: ObjectRef) -> LocalFuture<'_, Result<Option<RawDevice>, FsError>> {
        Box::pin(async move {
            let found = self.inner.for_reading()?.objects.load(object).await?;
            Ok(match &found.image().body.content {
                Content::Raw(device) => Some(device.clone()),
                _ => None,
            })
        })
    }

    /// Closes: commits what is not committed yet and gives the lock back at the last close on this host.
    pub fn close(&self, file: Arc<OpenFile>) -> LocalFuture<'_, Result<(), FsError>> {
        Box::pin(async move { self.inner.close_file(file).await })
    }

    /// This host as a holder of the object's lock: what the source of a live migration hands it over to.
    pub fn holder_for(&self, object: ObjectRef) -> Result<Holder, FsError> {
        self.inner.for_writing()?.objects.holder_for(object)
    }

    /// Gives the lock of a disk that is open for writing here to another host, as [`Files::hand_over`].
    pub fn hand_over<'a>(&'a self, file: &'a Arc<OpenFile>, to: Holder) -> LocalFuture<'a, Result<HandOver, FsError>> {
        Box::pin(async move { self.inner.for_writing()?.files.hand_over(file, to).await })
    }

    /// Opens a disk for writing whose lock was handed over to this host, as [`Files::accept`].
    pub fn accept(&self, object: ObjectRef) -> LocalFuture<'_, Result<Arc<OpenFile>, FsError>> {
        Box::pin(async move {
            let inner = self.inner.for_writing()?;
            let found = inner.objects.load(object).await?;
            inner.files.accept(&found).await
        })
    }

    /// Makes everything that was written to the file durable (fsync(2)).
    pub fn flush<'a>(&'a self, file: &'a Arc<OpenFile>) -> LocalFuture<'a, Result<(), FsError>> {
        Box::pin(async move { self.inner.files.flush(file).await })
    }

    /// File data.
    pub fn files(&self) -> &Rc<Files> {
        &self.inner.files
    }

    /// Brings the means to have other programs let go of disks (those that were given data descriptors).
    pub fn set_let_go(&self, let_go: LetGo) {
        *self.inner.others_let_go.borrow_mut() = Some(let_go);
    }

    /// The page that every data submission checks.
    pub fn gate(&self) -> &GatePage {
        self.inner.context.gate()
    }

    /// The volume's LUNs, slots and cells, for the layers beside this one.
    pub fn context(&self) -> &Rc<Context> {
        &self.inner.context
    }

    /// Who holds the lock of an object, since when, and when it could be taken.
    pub fn why_locked(&self, object: ObjectRef) -> LocalFuture<'_, Result<WhyLocked, FsError>> {
        Box::pin(async move { status::why_locked(&self.inner, object).await })
    }

    /// Takes the lock of an object out of the hands of hosts that are gone, now. Refused with kind `Busy`, with who, last beat and when it
    /// could be taken, while the holder's lease may still run, unless `host_is_down` names the holder (host name or UUID): then
    /// its slots on the object's LUNs are claimed at once, and fenced as well as each LUN can.
    pub fn break_lock<'a>(
        &'a self,
        object: ObjectRef,
        host_is_down: Option<&'a str>,
    ) -> LocalFuture<'a, Result<BrokenLock, FsError>> {
        Box::pin(async move { lock_break::break_lock(self.inner.for_writing()?, object, host_is_down).await })
    }

    /// State of the volume: LUNs, hosts, what is wrong. Reads all heartbeat cells; never fails: a LUN that does not answer is
    /// reported as that.
    pub fn status(&self) -> LocalFuture<'_, VolumeStatus> {
        Box::pin(async move { status::status(&self.inner).await })
    }

    /// The structures of an object, or of the cell at an address, as text for people.
    pub fn dump(&self, what: DumpTarget) -> LocalFuture<'_, Result<String, FsError>> {
        Box::pin(async move { dump::dump(&self.inner, what).await })
    }
}
