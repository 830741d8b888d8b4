//! Owns: the daemon's books: mounts, their slots, and the one thread on which everything of them runs.
//! Promises: a mount's end poisons its gate at once, whatever is in flight; what is kept is in the state file before anybody is told so.
//! Must not know: cells; how sockets are listened on.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Mutex, Notify as Wake};
use vmfs_core::env::{Env, Instant};
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::format::header::LeaseTimes;
use vmfs_core::gate::GatePage;
use vmfs_core::keeper::is_over;
use vmfs_core::lease;
use vmfs_core::real_env::RealEnv;
use vmfs_core::units::{Generation, LunIndex, SlotId, SlotRef, Uuid};
use vmfs_core::window::Carriers;

use super::life::{Action, Event, Life};
use super::messages::{Ask, Id, LunPlace, MountIdentity, Tell, Times, VERSION, WindowPlace};
use super::notify::Notify;
use super::record::{self, KeptMount, KeptSlot, Record};
use super::slots::{self, Drain, Opened};
use super::socket::{Client, Heard, What};
use crate::gate_memory::SharedGateMemory;

/// Longest sleep: the clock of leases runs on while the machine is suspended, the timer's does not.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);

/// Names a mount.
type Key = (Uuid, u64);
/// The LUN and the slot there; shared with the command in flight. `None`: not looked at yet.
type Shared = Rc<Mutex<Option<Opened>>>;

struct Mount {
    identity: MountIdentity,
    page: Option<GatePage>,
    client: Option<Client>,
    slots: BTreeMap<LunIndex, Kept>,
    /// Its LUNs that are open here: one of them may carry the cells of another.
    carriers: Carriers,
}

impl Mount {
    fn of(identity: MountIdentity) -> Mount {
        Mount { identity, page: None, client: None, slots: BTreeMap::new(), carriers: Carriers::default() }
    }
}

struct Kept {
    place: LunPlace,
    times: LeaseTimes,
    slot: SlotRef,
    life: Life,
    opened: Shared,
}

/// What a command in flight needs to know.
#[derive(Clone)]
struct Job {
    key: Key,
    index: LunIndex,
    identity: MountIdentity,
    place: LunPlace,
    times: LeaseTimes,
    slot: SlotRef,
    opened: Shared,
    carriers: Carriers,
}

/// The daemon.
pub struct Daemon {
    env: RealEnv,
    boot: Id,
    state: PathBuf,
    socket: PathBuf,
    mounts: RefCell<BTreeMap<Key, Mount>>,
    wake: Wake,
    /// When a command at a slot last ended, however it did.
    last_ended: Cell<Instant>,
}

impl Daemon {
    /// With what the state file says was kept before.
    pub fn new(boot: Id, state: PathBuf, socket: PathBuf, before: Option<Record>) -> Rc<Daemon> {
        let env = RealEnv;
        let now = env.now();
        let resumed = before.into_iter().flat_map(|record| record.mounts).map(|kept| {
            let slots = kept.slots.into_iter().filter_map(|slot| resumed(slot, now)).collect();
            let key = (kept.mount.volume.0, kept.mount.incarnation);
            (key, Mount { page: None, client: None, slots, ..Mount::of(kept.mount) })
        });
        let mounts = RefCell::new(resumed.collect());
        Rc::new(Daemon { env, boot, state, socket, mounts, wake: Wake::new(), last_ended: Cell::new(now) })
    }

    /// Serves until the sockets' side hangs up.
    pub async fn run(self: &Rc<Self>, mut heard: UnboundedReceiver<Heard>, notify: &Notify) {
        let watchdog = notify.watchdog().map_or(LONGEST_SLEEP, |time| time / 3);
        let mut pings = tokio::time::interval(watchdog);
        loop {
            self.tick();
            tokio::select! {
                message = heard.recv() => match message {
                    Some(message) => self.hear(message),
                    None => return,
                },
                () = tokio::time::sleep(self.time_to_next()) => {}
                () = self.wake.notified() => {}
                _ = pings.tick() => if notify.watchdog().is_some() && self.makes_progress(watchdog) {
                    notify.alive();
                }
            }
        }
    }

    /// Whether commands at slots come to an end: at least one did in the time in which each of a living storage does.
    fn makes_progress(&self, watchdog: Duration) -> bool {
        let mounts = self.mounts.borrow();
        let slowest = mounts.values().flat_map(|mount| mount.slots.values()).map(|kept| kept.times.renew_ms).max();
        let Some(renew_ms) = slowest else { return true };
        let longest = Duration::from_millis(u64::from(renew_ms) * 2) + watchdog;
        self.env.now() < self.last_ended.get().after(longest)
    }

    fn time_to_next(&self) -> Duration {
        let now = self.env.now();
        let mounts = self.mounts.borrow();
        let due = mounts.values().flat_map(|mount| mount.slots.values()).filter_map(|kept| kept.life.due()).min();
        due.map_or(LONGEST_SLEEP, |due| Duration::from_nanos(due.0.saturating_sub(now.0)).min(LONGEST_SLEEP))
    }

    fn tick(self: &Rc<Self>) {
        let now = self.env.now();
        let mounts = self.mounts.borrow();
        let slots = mounts.iter().flat_map(|(key, mount)| mount.slots.iter().map(|(index, kept)| (*key, *index, kept)));
        let due: Vec<_> = slots
            .filter(|(_, _, kept)| kept.life.due().is_some_and(|due| due <= now))
            .map(|(key, index, kept)| (key, index, kept.slot.generation))
            .collect();
        drop(mounts);
        for (key, index, generation) in due {
            let mut chance = [0];
            self.env.random(&mut chance);
            self.happened(key, index, generation, Event::Tick { chance: chance[0] }, None);
        }
    }

    /// Something happened to a slot; `why` is the error of [`Event::Over`].
    fn happened(
        self: &Rc<Self>,
        key: Key,
        index: LunIndex,
        generation: Generation,
        event: Event,
        why: Option<&FsError>,
    ) {
        let mut mounts = self.mounts.borrow_mut();
        let Some(mount) = mounts.get_mut(&key) else { return };
        let Mount { identity, page, client, slots, carriers } = mount;
        let Some(kept) = slots.get_mut(&index).filter(|kept| kept.slot.generation == generation) else { return };
        let mut forget = false;
        for action in kept.life.step(self.env.now(), event) {
            let job = || Job {
                key,
                index,
                identity: identity.clone(),
                place: kept.place.clone(),
                times: kept.times,
                slot: kept.slot,
                opened: kept.opened.clone(),
                carriers: carriers.clone(),
            };
            match action {
                Action::Renew => drop(tokio::task::spawn_local(self.clone().renew(job()))),
                Action::MakeDirty => drop(tokio::task::spawn_local(self.clone().make_dirty(job()))),
                Action::Open { lease_until } => {
                    let margin_ns = lease::margin(&kept.times).as_nanos() as u64;
                    if let Some(page) = page {
                        page.extend(index, generation, lease_until, margin_ns);
                    }
                }
                Action::Poison => {
                    if let Some(page) = page {
                        page.poison(index, generation);
                    }
                }
                Action::TellOver => tell_over(client.as_ref(), &kept.place, why),
                Action::Forget => forget = true,
            }
        }
        // A mount that is fenced on one LUN changes nothing any more: its other slots are given up too.
        let others = |(other, kept): (&LunIndex, &Kept)| (*other != index).then_some((*other, kept.slot.generation));
        let others: Vec<_> = if event == Event::Over { slots.iter().filter_map(others).collect() } else { Vec::new() };
        if forget {
            slots.remove(&index);
            if slots.is_empty() && client.is_none() {
                mounts.remove(&key);
            }
            drop(mounts);
            self.save_or_log();
        } else {
            drop(mounts);
        }
        for (other, generation) in others {
            self.happened(key, other, generation, Event::MountGone, None);
        }
        self.wake.notify_one();
    }

    async fn renew(self: Rc<Self>, job: Job) {
        let mut window = None;
        let renewed = {
            let mut opened = job.opened.lock().await;
            match look(&mut opened, &job).await {
                Ok(opened) => {
                    let renewed = opened.renew().await;
                    window = opened.window();
                    renewed
                }
                Err(error) => Err(error),
            }
        };
        if let Some(at) = window.filter(|_| job.place.window.is_none()) {
            self.moved(job.key, job.index, at.into());
        }
        self.last_ended.set(self.env.now());
        let (event, why) = match renewed {
            Ok(lease_until) => (Event::Renewed { lease_until }, None),
            Err(error) => (self.failed(&job, &error), Some(error)),
        };
        self.happened(job.key, job.index, job.slot.generation, event, why.as_ref());
    }

    /// The cells of a LUN are in a window from now on.
    fn moved(&self, key: Key, index: LunIndex, window: WindowPlace) {
        if let Some(kept) = self.mounts.borrow_mut().get_mut(&key).and_then(|mount| mount.slots.get_mut(&index)) {
            tracing::info!(
                lun = kept.place.path,
                "the LUN was taken out of its volume: its slot is kept where its cells are"
            );
            kept.place.window = Some(window);
        }
        self.save_or_log();
    }

    async fn make_dirty(self: Rc<Self>, job: Job) {
        let drained = {
            let mut opened = job.opened.lock().await;
            match look(&mut opened, &job).await {
                Ok(opened) => opened.make_dirty().await,
                Err(error) => Err(error),
            }
        };
        self.last_ended.set(self.env.now());
        let event = match drained {
            Ok(Drain::Dirty) => {
                tracing::info!(lun = job.place.path, slot = %job.slot, "nothing of the mount is left: its slot is dirty, any host recovers it");
                Event::LeftBehind
            }
            Ok(Drain::TimeOnly) => Event::LeftBehind,
            Ok(Drain::NotYet) => Event::NotDrained,
            Err(error) => self.failed(&job, &error),
        };
        self.happened(job.key, job.index, job.slot.generation, event, None);
    }

    fn failed(&self, job: &Job, error: &FsError) -> Event {
        if is_over(error) {
            tracing::error!(lun = job.place.path, slot = %job.slot, %error, "a slot is lost");
            return Event::Over;
        }
        tracing::warn!(lun = job.place.path, slot = %job.slot, %error, "a slot could not be renewed; trying again");
        Event::Failed
    }

    fn hear(self: &Rc<Self>, heard: Heard) {
        let Heard { client, what } = heard;
        match what {
            What::Gone => self.gone(&client),
            What::Asked(ask, descriptors) => {
                let answered = match ask {
                    Ask::Hello { .. } => Ok(Tell::Welcome { version: VERSION }),
                    Ask::Status => Ok(Tell::Facts { value: self.facts() }),
                    Ask::Attach { mount } => self.attach(&client, mount, descriptors),
                    Ask::Resume { lun, lease, slot, generation } => {
                        let slot = SlotRef { slot: SlotId(slot), generation: Generation(generation) };
                        self.resume(&client, lun, lease, slot)
                    }
                    Ask::Join { lun, lease, prefer } => {
                        let daemon = self.clone();
                        tokio::task::spawn_local(async move {
                            let joined = daemon.join(&client, lun, lease, prefer.map(SlotId)).await;
                            client.answer(joined);
                        });
                        return;
                    }
                    Ask::Leave { lun, clean } => {
                        let daemon = self.clone();
                        tokio::task::spawn_local(async move {
                            let left = daemon.leave(&client, lun, clean).await;
                            client.answer(left);
                        });
                        return;
                    }
                };
                client.answer(answered);
            }
        }
    }

    fn attach(
        self: &Rc<Self>,
        client: &Client,
        identity: MountIdentity,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Tell, FsError> {
        let refuse = |why: String| FsError::refused(FsErrorKind::Invalid, format!("the gate page: {why}"));
        let [page] =
            <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| refuse("one descriptor is needed".to_owned()))?;
        let memory = SharedGateMemory::map(page).map_err(|error| refuse(error.to_string()))?;
        let page = GatePage::open(Arc::new(memory)).map_err(|error| refuse(error.to_string()))?;
        let key = (identity.volume.0, identity.incarnation);
        let slots: Vec<_> = {
            let mut mounts = self.mounts.borrow_mut();
            let new = || Mount::of(identity.clone());
            let mount = mounts.entry(key).or_insert_with(new);
            mount.identity = identity;
            mount.page = Some(page);
            mount.client = Some(client.clone());
            mount.slots.iter().map(|(index, kept)| (*index, kept.slot.generation)).collect()
        };
        for (index, generation) in slots {
            self.happened(key, index, generation, Event::MountBack, None);
        }
        Ok(Tell::Attached)
    }

    /// The mount that a connection speaks for.
    fn mount_of(&self, client: &Client) -> Result<Key, FsError> {
        let mounts = self.mounts.borrow();
        let found = mounts.iter().find(|(_, mount)| mount.client.as_ref().is_some_and(|c| c.id == client.id));
        found
            .map(|(key, _)| *key)
            .ok_or_else(|| FsError::refused(FsErrorKind::Invalid, "this connection speaks for no mount: attach first"))
    }

    async fn join(
        self: &Rc<Self>,
        client: &Client,
        place: LunPlace,
        lease: Times,
        prefer: Option<SlotId>,
    ) -> Result<Tell, FsError> {
        let (key, index) = (self.mount_of(client)?, slots::index_of(place.index)?);
        let (identity, carriers) = {
            let mounts = self.mounts.borrow();
            if mounts[&key].slots.contains_key(&index) {
                let message = format!("{}: this mount has a slot there already", place.path);
                return Err(FsError::refused(FsErrorKind::Invalid, message));
            }
            (mounts[&key].identity.clone(), mounts[&key].carriers.clone())
        };
        let times = lease.into();
        let mut opened = slots::join(&identity, &place, times, prefer, &carriers).await?;
        let (slot, lease_until) = (opened.slot(), opened.lease_until());
        // The mount may have gone meanwhile.
        if self.mount_of(client).ok() != Some(key) {
            opened.leave(true).await?;
            return Err(FsError::refused(FsErrorKind::Io, "the mount has gone"));
        }
        let life = Life::joined(times, self.env.now(), lease_until);
        let shared = Rc::new(Mutex::new(Some(opened)));
        self.keep(key, index, Kept { place, times, slot, life, opened: shared.clone() });
        if let Err(error) = self.save() {
            self.mounts.borrow_mut().get_mut(&key).and_then(|mount| mount.slots.remove(&index));
            if let Some(opened) = &mut *shared.lock().await {
                opened.leave(true).await?;
            }
            let message = format!("{}: {error}; nothing is kept that would be forgotten", self.state.display());
            return Err(FsError::refused(FsErrorKind::Io, message));
        }
        self.happened(key, index, slot.generation, Event::MountBack, None);
        Ok(Tell::Joined { slot: slot.slot.0, generation: slot.generation.0, lease_until: lease_until.0 })
    }

    fn keep(&self, key: Key, index: LunIndex, kept: Kept) {
        if let Some(mount) = self.mounts.borrow_mut().get_mut(&key) {
            mount.slots.insert(index, kept);
        }
        self.wake.notify_one();
    }

    fn resume(self: &Rc<Self>, client: &Client, place: LunPlace, lease: Times, slot: SlotRef) -> Result<Tell, FsError> {
        let (key, index) = (self.mount_of(client)?, slots::index_of(place.index)?);
        let known = self.mounts.borrow()[&key].slots.get(&index).is_some_and(|kept| kept.slot == slot);
        if !known {
            tracing::info!(lun = place.path, %slot, "a mount has a slot that the state file does not name: taken up");
            let life = Life::resumed(lease.into(), self.env.now());
            self.keep(key, index, Kept { place, times: lease.into(), slot, life, opened: Rc::default() });
            self.save_or_log();
            self.happened(key, index, slot.generation, Event::MountBack, None);
        } else if let Some(window) = place.window {
            // It may have moved while nobody looked at it here.
            self.moved(key, index, window);
        }
        Ok(Tell::Resumed)
    }

    async fn leave(self: &Rc<Self>, client: &Client, lun: u8, clean: bool) -> Result<Tell, FsError> {
        let (key, index) = (self.mount_of(client)?, slots::index_of(lun)?);
        let removed = self.mounts.borrow_mut().get_mut(&key).and_then(|mount| mount.slots.remove(&index));
        let Some(kept) = removed else {
            return Err(FsError::refused(FsErrorKind::NotFound, format!("this mount has no slot on {index}")));
        };
        self.save_or_log();
        let (identity, carriers) = {
            let mounts = self.mounts.borrow();
            (mounts[&key].identity.clone(), mounts[&key].carriers.clone())
        };
        let Kept { place, times, slot, opened, .. } = kept;
        let mut guard = opened.lock().await;
        let job = Job { key, index, identity, place, times, slot, opened: opened.clone(), carriers };
        look(&mut guard, &job).await?.leave(clean).await?;
        Ok(Tell::Left)
    }

    fn gone(self: &Rc<Self>, client: &Client) {
        let Ok(key) = self.mount_of(client) else { return };
        let slots: Vec<_> = {
            let mut mounts = self.mounts.borrow_mut();
            let Some(mount) = mounts.get_mut(&key) else { return };
            mount.client = None;
            if mount.slots.is_empty() {
                mounts.remove(&key);
                return;
            }
            tracing::error!(
                volume = %mount.identity.volume.0,
                program = mount.identity.program,
                "a mount has ended without leaving its slots: its gate is closed for good, its VMs end"
            );
            mount.slots.iter().map(|(index, kept)| (*index, kept.slot.generation)).collect()
        };
        for (index, generation) in slots {
            self.happened(key, index, generation, Event::MountGone, None);
        }
    }

    fn record(&self) -> Record {
        let kept = |kept: &Kept| KeptSlot {
            lun: kept.place.clone(),
            lease: kept.times.into(),
            slot: kept.slot.slot.0,
            generation: kept.slot.generation.0,
        };
        let mounts = self.mounts.borrow();
        let with_slots = mounts.values().filter(|mount| !mount.slots.is_empty());
        let mounts = with_slots
            .map(|mount| KeptMount { mount: mount.identity.clone(), slots: mount.slots.values().map(kept).collect() });
        Record { boot: self.boot, mounts: mounts.collect() }
    }

    fn save(&self) -> std::io::Result<()> {
        record::save(&self.state, &self.record())
    }

    /// For changes that a restart finds out by itself: the slots are looked at then.
    fn save_or_log(&self) {
        if let Err(error) = self.save() {
            tracing::warn!("{}: {error}", self.state.display());
        }
    }

    /// How many slots are kept.
    pub fn slots(&self) -> usize {
        self.mounts.borrow().values().map(|mount| mount.slots.len()).sum()
    }

    fn facts(&self) -> Value {
        let now = self.env.now();
        let slot = |(index, kept): (&LunIndex, &Kept)| {
            let left = kept.life.lease_until().map(|until| until.0.saturating_sub(now.0) / 1_000_000);
            json!({
                "lun": index.get(),
                "path": kept.place.path,
                "slot": kept.slot.slot.0,
                "generation": kept.slot.generation.0,
                "state": kept.life.describe(),
                "lease_left_ms": left,
            })
        };
        let mounts = self.mounts.borrow();
        let mount = |mount: &Mount| {
            json!({
                "volume": mount.identity.volume.0.to_string(),
                "host": mount.identity.host.0.to_string(),
                "host_name": mount.identity.host_name,
                "program": mount.identity.program,
                "connected": mount.client.is_some(),
                "slots": mount.slots.iter().map(slot).collect::<Vec<_>>(),
            })
        };
        json!({
            "process": std::process::id(),
            "socket": self.socket,
            "mounts": mounts.values().map(mount).collect::<Vec<_>>(),
        })
    }
}

fn resumed(kept: KeptSlot, now: Instant) -> Option<(LunIndex, Kept)> {
    let index = LunIndex::new(kept.lun.index)?;
    let (times, slot) =
        (kept.lease.into(), SlotRef { slot: SlotId(kept.slot), generation: Generation(kept.generation) });
    Some((index, Kept { place: kept.lun, times, slot, life: Life::resumed(times, now), opened: Rc::default() }))
}

/// The opened LUN of a job; a slot of before this daemon began is looked at first.
async fn look<'a>(opened: &'a mut Option<Opened>, job: &Job) -> Result<&'a mut Opened, FsError> {
    if opened.is_none() {
        *opened = Some(slots::resume(&job.identity, &job.place, job.times, job.slot, &job.carriers).await?);
    }
    Ok(opened.as_mut().expect("it was just opened"))
}

fn tell_over(client: Option<&Client>, place: &LunPlace, why: Option<&FsError>) {
    let Some(client) = client else { return };
    let rolled_back = why.is_some_and(|error| error.kind() == FsErrorKind::Stale);
    let message = match why {
        Some(error) => error.to_string(),
        None => format!("{}: the mount's connection had ended, so its slot was given up", place.path),
    };
    client.say(&Tell::Over { lun: place.index, rolled_back, message });
}
