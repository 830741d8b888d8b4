//! Owns: one run: the world, the life of its hosts, what befalls them, and the verdict.
//! Promises: the same plan gives the same run; every oracle has its say; a run that never ends is a finding.
//! Must not know: how operations are carried out (`work`), which plans are run.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use engine::error::{FsError, FsErrorKind};
use engine::lun::{Fencing, Lun};
use engine::sim::{FaultRates, HostNo, MemoryDisk, MemoryLun, PathState, Sim, SimEnv};
use engine::volume::Volume;
use futures_util::future::{Either, select};
use tokio::sync::Notify;

use super::content::FileModel;
use super::names::{self, Done};
use super::plan::{Blow, Event, HostPlan, Moment, Operation, Plan};
use super::volume::{self, Fresh, Kind};
use super::witness::{self, Shared, Until};
use super::{verify, work};

/// The task of the run itself, which no host's death ends.
const CONDUCTOR: HostNo = HostNo(0);
/// Incarnations of host n have the numbers n * 100 + 1 and on.
pub(super) const INCARNATIONS: u32 = 100;
/// Virtual time after which an operation has taken too long, besides what events take.
const LONGEST_OPERATION: Duration = Duration::from_secs(60);
/// Steps after which a run goes round without end.
const MOST_STEPS: u64 = 3_000_000;
/// Mounts after which a host is taken for one that never lives.
const MOST_MOUNTS: u32 = 20;
/// Lines of a trace that are kept for each host.
const LINES: usize = 2000;

/// An object for the oracles: its identity and birth.
pub type FileId = (u64, i64);

/// What came out of a run.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What broke a promise; empty: nothing.
    pub findings: Vec<String>,
    /// Over everything that happened.
    pub hash: u64,
    /// The last things that happened, as lines.
    pub trace: Vec<String>,
    /// Commands of all LUNs that changed something, for figures.
    pub virtual_ns: u64,
}

/// A file of the run and what its bytes may be.
pub struct KnownFile {
    /// What its bytes may be.
    pub model: FileModel,
    /// Somebody on a host is at it: only one operation at a time, so that what is expected is certain.
    pub busy: Cell<bool>,
    /// Opens for writing, by incarnation.
    pub writers: BTreeMap<HostNo, u32>,
}

impl KnownFile {
    /// An incarnation has opened it for writing: any other one that had it open has lost it.
    pub fn opened(&mut self, by: HostNo) {
        let before = self.writers.len();
        self.writers.retain(|no, _| *no == by);
        if self.writers.len() < before {
            self.model.crashed();
            self.busy.set(false);
        }
        *self.writers.entry(by).or_default() += 1;
    }
}

/// Where a host is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Mounting, or not begun.
    Down,
    /// Mounted.
    Up,
    /// Lost its slot, or was killed; it comes back after so many milliseconds.
    Over(u32),
}

/// What a worker is at: since when, what, and what it may have done to names.
pub type UnderWay = (u64, Operation, Option<names::Event>);

/// One host of a run.
pub struct Host {
    /// Number, from 1 on.
    pub number: u32,
    /// Its part of the plan.
    pub plan: HostPlan,
    incarnations: Cell<u32>,
    /// Where it is in its life.
    pub life: Cell<Life>,
    /// The mounted volume.
    pub volume: RefCell<Option<Volume>>,
    /// Its clock and random numbers.
    pub env: RefCell<Option<Rc<SimEnv>>>,
    paths: RefCell<Vec<Rc<MemoryLun>>>,
    /// Next operation of each worker, and what it is at.
    pub next: Vec<Cell<usize>>,
    /// What each worker is at: when it began, and what it may have done to names.
    pub at: Vec<RefCell<Option<UnderWay>>>,
    ended: Cell<usize>,
    changed: Notify,
    /// Compare-and-writes of all incarnations that began to be late, and who waits for them.
    late: Rc<(Cell<u32>, Notify)>,
}

impl Host {
    fn new(number: u32, plan: HostPlan) -> Host {
        let workers = plan.workers.len();
        Host {
            number,
            plan,
            incarnations: Cell::new(0),
            life: Cell::new(Life::Down),
            volume: RefCell::new(None),
            env: RefCell::new(None),
            paths: RefCell::default(),
            next: (0..workers).map(|_| Cell::new(0)).collect(),
            at: (0..workers).map(|_| RefCell::new(None)).collect(),
            ended: Cell::new(0),
            changed: Notify::new(),
            late: Rc::new((Cell::new(0), Notify::new())),
        }
    }

    /// The present incarnation.
    pub fn no(&self) -> HostNo {
        HostNo(self.number * INCARNATIONS + self.incarnations.get())
    }

    /// It has lost its slot: this incarnation is over.
    pub fn is_fenced(&self) {
        if self.life.get() == Life::Up {
            self.life.set(Life::Over(20));
            self.changed.notify_one();
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.get() == self.plan.workers.len()
    }
}

/// One run.
pub struct Run {
    /// The world.
    pub sim: Sim,
    /// What happens.
    pub plan: Plan,
    /// The volume as it was at the start.
    pub fresh: Rc<Fresh>,
    /// The LUNs.
    pub disks: Vec<MemoryDisk>,
    /// Who looks at them.
    pub witness: Shared,
    /// The hosts.
    pub hosts: Vec<Rc<Host>>,
    /// Files and what they may hold.
    pub files: RefCell<BTreeMap<FileId, KnownFile>>,
    /// Operations on names.
    pub history: RefCell<Vec<Done>>,
    /// What broke a promise.
    pub findings: RefCell<Vec<String>>,
    /// Number of the last write.
    pub writes: Cell<u32>,
    lines: RefCell<VecDeque<(u64, HostNo, String)>>,
}

/// Makes the volume that a plan begins with, if this thread has not made it yet.
pub fn prepare(plan: &Plan) {
    volume::fresh(Kind { large_cells: plan.large_cells, luns: plan.luns, nearly_full: plan.nearly_full });
}

/// Carries a plan out. With `traced` the verdict has lines.
pub fn carry_out(plan: &Plan, traced: bool) -> Verdict {
    let fresh = volume::fresh(Kind { large_cells: plan.large_cells, luns: plan.luns, nearly_full: plan.nearly_full });
    let sim = Sim::new(plan.seed);
    sim.limit_steps(MOST_STEPS);
    let disks = fresh.disks();
    let fencing = if plan.fenced_by_time { Fencing::TimeOnly } else { Fencing::Proven };
    disks.iter().for_each(|disk| disk.set_fencing(fencing));
    let witness = witness::watch(fresh.start.clone(), sim.shared_clock(), &disks);
    let hosts = plan.hosts.iter().enumerate().map(|(n, host)| Rc::new(Host::new(n as u32 + 1, host.clone()))).collect();
    let run = Rc::new(Run {
        sim: sim.clone(),
        plan: plan.clone(),
        fresh,
        disks,
        witness,
        hosts,
        files: RefCell::default(),
        history: RefCell::default(),
        findings: RefCell::default(),
        writes: Cell::new(0),
        lines: RefCell::default(),
    });
    run.witness.lock().set_undisturbed(plan.undisturbed());
    run.witness.lock().set_clocks(plan.hosts.iter().map(|host| host.clock.fast_ppm).collect());
    if traced {
        run.witness.lock().set_traced();
    }
    run.know_disks();
    let ended = catch_unwind(AssertUnwindSafe(|| sim.block_on(run.conduct())));
    if let Err(panic) = ended {
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        run.find(format!("the run ended with a panic: {}", message.unwrap_or("without a message")));
    }
    // What hosts hold is dropped by their tasks, and that may panic again.
    drop(catch_unwind(AssertUnwindSafe(|| {
        run.hosts.iter().for_each(|host| drop(host.volume.take()));
        sim.end();
    })));
    run.verdict(traced)
}

impl Run {
    fn verdict(&self, traced: bool) -> Verdict {
        let witness = self.witness.lock();
        let mut findings = self.findings.borrow().clone();
        findings.extend(witness.findings.iter().cloned());
        let mut lines: Vec<(u64, HostNo, String)> = Vec::new();
        if traced {
            lines.extend(self.lines.borrow().iter().cloned());
            lines.extend(witness.effects.iter().map(|e| {
                let what = format!("    {} {} {} bytes at {} {}", e.what, e.lun, e.length, e.offset, e.detail);
                (e.at, e.host, what)
            }));
            lines.sort_by_key(|(at, _, _)| *at);
        }
        let line = |(at, host, what): (u64, HostNo, String)| format!("{:>12} us  {:>4}  {what}", at / 1000, host.0);
        Verdict {
            findings,
            hash: witness.hash,
            trace: lines.into_iter().map(line).collect(),
            virtual_ns: self.sim.now(),
        }
    }

    /// Notes a broken promise.
    pub fn find(&self, what: String) {
        let mut findings = self.findings.borrow_mut();
        if findings.len() < 8 {
            findings.push(format!("at {} us: {what}", self.sim.now() / 1000));
        }
    }

    /// A line for the trace.
    pub fn line(&self, host: HostNo, what: String) {
        let mut lines = self.lines.borrow_mut();
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back((self.sim.now(), host, what));
    }

    /// Nothing is done to this run but its operations.
    pub fn is_calm(&self) -> bool {
        self.plan.events.is_empty() && self.plan.rates == FaultRates::default() && !self.plan.power_loss
    }

    /// An error that must not come: told. Else whether the operation certainly did nothing.
    pub fn judge(&self, host: &Host, error: &FsError, what: &dyn Fn() -> String) {
        let wrong = match error.kind() {
            FsErrorKind::Corrupt => Some("a structure is said to be broken"),
            FsErrorKind::NoSpace if !self.plan.nearly_full => Some("there is room"),
            FsErrorKind::Io if self.is_calm() => Some("nothing has failed"),
            FsErrorKind::Fenced => {
                let lives = self.witness.lock().live_slots(host.no()).len() == self.plan.luns;
                lives.then_some("all its slots live")
            }
            _ => None,
        };
        if let Some(wrong) = wrong {
            self.find(format!("{:?}: {}: {wrong}: {error}", host.no(), what()));
        }
        if error.kind() == FsErrorKind::Fenced {
            host.is_fenced();
        }
    }

    fn know_disks(&self) {
        for stat in &self.fresh.disks {
            self.file_of((stat.object.fd.get(), stat.attributes.born_ns), stat.attributes.size);
        }
    }

    /// Makes a file known, of `size` bytes when it is new to the run.
    pub fn file_of(&self, id: FileId, size: u64) {
        let mut files = self.files.borrow_mut();
        let number = files.len() as u32 + 1;
        files.entry(id).or_insert_with(|| KnownFile {
            model: FileModel::new(number, size),
            busy: Cell::new(false),
            writers: BTreeMap::new(),
        });
    }

    async fn conduct(self: &Rc<Run>) {
        let lives: Vec<_> =
            self.hosts.iter().map(|host| self.sim.spawn(CONDUCTOR, self.clone().live(host.clone()))).collect();
        for event in &self.plan.events {
            drop(self.sim.spawn(CONDUCTOR, self.clone().befall(*event)));
        }
        let all = async {
            for life in lives {
                life.join().await;
            }
        };
        if !self.within(self.longest() * 4, all).await {
            self.tell_of_hung();
            return;
        }
        self.heal();
        if self.plan.power_loss {
            self.lose_power();
        } else {
            self.unmount_all().await;
        }
        // What is late arrives.
        self.sim.sleep(Duration::from_secs(6)).await;
        verify::verify(self).await;
        if !names::is_linearizable(&self.history.borrow()) {
            for done in self.history.borrow().iter() {
                let (from, to) = (done.from / 1000, done.to / 1000);
                self.line(
                    CONDUCTOR,
                    format!("names: {from} us .. {to} us, answered: {}, {:?}", done.certain, done.event),
                );
            }
            self.find("no order of the operations on names explains their answers".to_owned());
        }
    }

    /// The longest time that an operation may take in this run.
    pub fn longest(&self) -> Duration {
        let milliseconds = |event: &Event| match event.blow {
            Blow::Death(ms) | Blow::Pause(ms) => u64::from(ms),
            Blow::Cut(_, ms) | Blow::Loss(_, ms) | Blow::Stall(_, ms) => u64::from(ms),
        };
        LONGEST_OPERATION + Duration::from_millis(2 * self.plan.events.iter().map(milliseconds).sum::<u64>())
    }

    /// Whether `work` ends in this time.
    pub async fn within(&self, time: Duration, work: impl Future<Output = ()>) -> bool {
        matches!(select(pin!(work), pin!(self.sim.sleep(time))).await, Either::Left(_))
    }

    fn tell_of_hung(&self) {
        for host in &self.hosts {
            for at in host.at.iter().filter_map(|at| at.borrow().clone()) {
                let (since, operation, _) = at;
                self.find(format!("{:?}: {operation:?} has not ended since {} us", host.no(), since / 1000));
            }
        }
        self.find("the hosts have not come to an end".to_owned());
    }

    /// One host from its first mount to its last operation.
    async fn live(self: Rc<Run>, host: Rc<Host>) {
        loop {
            host.incarnations.set(host.incarnations.get() + 1);
            host.life.set(Life::Down);
            if self.mount(&host).await {
                for worker in 0..host.plan.workers.len() {
                    if host.next[worker].get() < host.plan.workers[worker].len() {
                        let work = work::work(self.clone(), host.clone(), worker);
                        let (of, told) = (host.clone(), host.no());
                        drop(self.sim.spawn(host.no(), async move {
                            work.await;
                            of.ended_one(told);
                        }));
                    }
                }
                host.count_ended();
                while host.life.get() == Life::Up && !host.has_ended() {
                    host.changed.notified().await;
                }
                if host.has_ended() {
                    return;
                }
            }
            // One that cannot mount, for a LUN is lost, tries again, each time a little later: for longer than any blow takes.
            let back = match host.life.get() {
                Life::Over(ms) => ms,
                _ => 300 * host.incarnations.get(),
            };
            self.end_incarnation(&host);
            self.sim.sleep(Duration::from_millis(back.into())).await;
            if host.incarnations.get() > MOST_MOUNTS {
                return self.find(format!("host {} has mounted {MOST_MOUNTS} times and never lives", host.number));
            }
        }
    }

    async fn mount(self: &Rc<Run>, host: &Rc<Host>) -> bool {
        let no = host.no();
        let env = self.sim.env_with_clock(no, host.plan.clock);
        let paths: Vec<_> = self.disks.iter().map(|disk| disk.connect(&self.sim, no)).collect();
        let latency = Duration::from_micros(self.plan.latency_us);
        for path in &paths {
            path.set_latency(latency / 20, latency);
            path.set_longest_late_write(Duration::from_millis(self.plan.late_writes_ms.into()));
            let late = host.late.clone();
            path.set_when_late(Box::new(move || {
                late.0.set(late.0.get() + 1);
                late.1.notify_one();
            }));
        }
        let luns = paths.iter().cloned().map(|path| path as Rc<dyn Lun>).collect();
        let mounting = Volume::mount(luns, volume::mount_options(host.number), env.clone());
        let mounted = self.sim.spawn(no, mounting).join().await;
        match mounted {
            Some(Ok(volume)) => {
                paths.iter().for_each(|path| path.set_rates(self.plan.rates));
                *host.paths.borrow_mut() = paths;
                *host.env.borrow_mut() = Some(env);
                *host.volume.borrow_mut() = Some(volume.clone());
                if host.life.get() != Life::Down {
                    return false;
                }
                host.life.set(Life::Up);
                self.line(no, "mounted".to_owned());
                drop(self.sim.spawn(no, async move { volume.background().await }));
                true
            }
            Some(Err(error)) => {
                if self.is_calm() || error.kind() == FsErrorKind::Corrupt {
                    self.find(format!("{no:?}: it cannot mount: {error}"));
                }
                self.line(no, format!("cannot mount: {error}"));
                false
            }
            None => false,
        }
    }

    /// The incarnation is gone: what it was at may have happened or not.
    fn end_incarnation(&self, host: &Host) {
        let no = host.no();
        self.sim.kill(no);
        self.witness.lock().note_over(no);
        drop(host.volume.take());
        for (worker, at) in host.at.iter().enumerate() {
            if let Some((from, operation, event)) = at.take() {
                self.line(no, format!("{operation:?}: cut off"));
                if let Some(event) = event {
                    self.history.borrow_mut().push(Done { from, to: u64::MAX, certain: false, event });
                }
                host.next[worker].set(host.next[worker].get() + 1);
            }
        }
        for file in self.files.borrow_mut().values_mut() {
            if file.writers.remove(&no).is_some() {
                file.model.crashed();
                file.busy.set(false);
            }
        }
        self.line(no, "gone".to_owned());
    }

    async fn befall(self: Rc<Run>, event: Event) {
        let host = self.hosts[event.host].clone();
        match event.moment {
            Moment::At(us) => self.sim.sleep(Duration::from_micros(us)).await,
            Moment::AfterChanges(count) => self.wait(&host, Until::Changes, count).await,
            Moment::AfterTakeovers(count) => self.wait(&host, Until::Takeovers, count).await,
            Moment::AfterRenewals(count) => self.wait(&host, Until::Renewals, count).await,
            Moment::WhenLate(count) => {
                while host.late.0.get() < count {
                    host.late.1.notified().await;
                }
            }
        }
        let no = host.no();
        if host.has_ended() {
            return;
        }
        self.line(no, format!("{:?}", event.blow));
        let ms = |ms: u32| Duration::from_millis(ms.into());
        match event.blow {
            Blow::Death(back) => {
                // What it has in flight goes on; the rest of it is gone at this instant.
                self.sim.kill(no);
                host.life.set(Life::Over(back));
                host.changed.notify_one();
            }
            Blow::Pause(time) => {
                self.sim.pause(no);
                self.sim.sleep(ms(time)).await;
                self.sim.resume(no);
            }
            Blow::Cut(lun, time) => {
                self.disks[usize::from(lun)].set_path(no, PathState::Cut);
                self.sim.sleep(ms(time)).await;
                self.disks[usize::from(lun)].set_path(no, PathState::Up);
            }
            Blow::Loss(lun, time) => {
                self.disks[usize::from(lun)].set_lost(true);
                self.sim.sleep(ms(time)).await;
                self.disks[usize::from(lun)].set_lost(false);
            }
            Blow::Stall(lun, time) => {
                self.disks[usize::from(lun)].set_stalled(true);
                self.sim.sleep(ms(time)).await;
                self.disks[usize::from(lun)].set_stalled(false);
            }
        }
    }

    async fn wait(&self, host: &Host, until: Until, count: u32) {
        let no = HostNo(host.number * INCARNATIONS + 1);
        let told = self.witness.lock().tell(no, until, count);
        told.notified().await;
    }

    fn heal(&self) {
        for host in &self.hosts {
            host.paths.borrow().iter().for_each(|path| path.set_rates(FaultRates::default()));
            self.sim.resume(host.no());
            self.disks.iter().for_each(|disk| disk.set_path(host.no(), PathState::Up));
        }
        self.disks.iter().for_each(|disk| {
            disk.set_stalled(false);
            disk.set_lost(false);
        });
    }

    fn lose_power(&self) {
        for host in &self.hosts {
            self.end_incarnation(host);
        }
        self.disks.iter().for_each(|disk| disk.lose_power(&self.sim));
        self.files.borrow_mut().values_mut().for_each(|file| file.model.crashed());
    }

    async fn unmount_all(self: &Rc<Run>) {
        for host in &self.hosts {
            let Some(volume) = host.volume.take() else { continue };
            let no = host.no();
            let mut result = None;
            let unmounting = self.sim.spawn(no, async move { volume.unmount().await });
            let ended = self.within(self.longest(), async { result = unmounting.join().await }).await;
            if !ended {
                self.find(format!("{no:?}: the unmount has not ended"));
            }
            if let Some(Err(error)) = &result
                && (self.is_calm() || error.kind() == FsErrorKind::Corrupt)
            {
                self.find(format!("{no:?}: it cannot unmount: {error}"));
            }
            self.line(no, format!("unmount: {result:?}"));
            self.sim.kill(no);
            // One with a command in doubt has left its slot to the end of the lease.
            self.witness.lock().note_over(no);
        }
    }
}

impl Host {
    fn ended_one(&self, no: HostNo) {
        if self.no() == no {
            self.count_ended();
            self.changed.notify_one();
        }
    }

    /// How many workers have nothing left to do.
    fn count_ended(&self) {
        let done = |n: &usize| self.next[*n].get() >= self.plan.workers[*n].len();
        self.ended.set((0..self.plan.workers.len()).filter(done).count());
    }
}
