//! Owns: virtual time and the order in which the futures of all hosts run.
//! Promises: one thread, one seed, one order; time moves only when nobody can go on.
//! Must not know: storage.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use super::rng::Rng;
use crate::env::{Env, Instant, LocalFuture};

/// A simulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostNo(pub u32);

/// The storage's own tasks (commands on their way), which no death or pause of a host stops.
pub const STORAGE: HostNo = HostNo(u32::MAX);
/// The task that [`Sim::block_on`] runs.
const MAIN: u64 = 0;
/// A run that takes longer than this by its own clock is taken for one that never ends.
const LONGEST_RUN: Duration = Duration::from_secs(30 * 24 * 3600);

/// A host's clock: where it starts and by how many parts per million it runs fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostClock {
    /// Nanoseconds that it shows at the simulation's start.
    pub starts_at: u64,
    /// Parts per million; negative is slow.
    pub fast_ppm: i32,
}

type TaskFuture = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    host: HostNo,
    future: TaskFuture,
}

struct Inner {
    seed: u64,
    now: Arc<AtomicU64>,
    steps_left: Cell<u64>,
    rng: RefCell<Rng>,
    tasks: RefCell<BTreeMap<u64, Task>>,
    /// Host of every task that has not ended, also of the one that is running.
    hosts: RefCell<BTreeMap<u64, HostNo>>,
    paused: RefCell<BTreeSet<HostNo>>,
    timers: RefCell<BTreeMap<(u64, u64), Waker>>,
    next_id: Cell<u64>,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

struct TaskWaker {
    id: u64,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.lock().insert(self.id);
    }
}

/// A simulation. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Sim(Rc<Inner>);

/// The result of a spawned task, once it has ended.
pub struct TaskHandle<T> {
    result: tokio::sync::oneshot::Receiver<T>,
}

impl<T> TaskHandle<T> {
    /// Waits for the end of the task; `None` when its host was killed.
    pub async fn join(self) -> Option<T> {
        self.result.await.ok()
    }
}

impl Sim {
    /// A world that `seed` decides.
    pub fn new(seed: u64) -> Sim {
        Sim(Rc::new(Inner {
            seed,
            now: Arc::default(),
            steps_left: Cell::new(u64::MAX),
            rng: RefCell::new(Rng::new(seed)),
            tasks: RefCell::default(),
            hosts: RefCell::default(),
            paused: RefCell::default(),
            timers: RefCell::default(),
            next_id: Cell::new(MAIN + 1),
            ready: Arc::default(),
        }))
    }

    /// A run of more than `steps` steps from now on panics: something goes round without end.
    pub fn limit_steps(&self, steps: u64) {
        self.0.steps_left.set(steps);
    }

    /// The world's clock for other threads' eyes: virtual nanoseconds since the start.
    pub fn shared_clock(&self) -> Arc<AtomicU64> {
        self.0.now.clone()
    }

    /// The seed, for messages.
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Virtual nanoseconds since the start.
    pub fn now(&self) -> u64 {
        self.0.now.load(Ordering::Relaxed)
    }

    /// Draws from the world's random numbers.
    pub fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.0.rng.borrow_mut())
    }

    /// A host's environment, with a true clock. Each environment draws random numbers of its own.
    pub fn env(&self, host: HostNo) -> Rc<SimEnv> {
        self.env_with_clock(host, HostClock::default())
    }

    /// A host's environment with a clock of its own.
    pub fn env_with_clock(&self, host: HostNo, clock: HostClock) -> Rc<SimEnv> {
        let rng = RefCell::new(Rng::new(self.with_rng(Rng::draw)));
        Rc::new(SimEnv { sim: self.clone(), host, clock, rng })
    }

    /// Runs `future` as a task of `host` from now on.
    pub fn spawn<T: 'static>(&self, host: HostNo, future: impl Future<Output = T> + 'static) -> TaskHandle<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        let future = Box::pin(async move {
            // Nobody may wait for the result.
            let _ = done.send(future.await);
        });
        let id = self.new_id();
        self.0.hosts.borrow_mut().insert(id, host);
        self.0.tasks.borrow_mut().insert(id, Task { host, future });
        self.0.ready.lock().insert(id);
        TaskHandle { result }
    }

    /// The host is dead: its futures are dropped where they stand. Commands that it sent live on.
    pub fn kill(&self, host: HostNo) {
        self.0.hosts.borrow_mut().retain(|_, h| *h != host);
        let mut dead = Vec::new();
        self.0.tasks.borrow_mut().retain(|_, task| {
            let keep = task.host != host;
            if !keep {
                dead.push(std::mem::replace(&mut task.future, Box::pin(std::future::ready(()))));
            }
            keep
        });
        drop(dead);
    }

    /// Drops the futures of all hosts, and with them what they hold. A simulation whose tasks never end is freed by this only.
    pub fn end(&self) {
        let hosts: BTreeSet<HostNo> = self.0.hosts.borrow().values().copied().collect();
        hosts.into_iter().for_each(|host| self.kill(host));
    }

    /// The host stands still; its clock runs on.
    pub fn pause(&self, host: HostNo) {
        self.0.paused.borrow_mut().insert(host);
    }

    /// The host goes on.
    pub fn resume(&self, host: HostNo) {
        self.0.paused.borrow_mut().remove(&host);
    }

    /// Runs everything until `future` has ended.
    ///
    /// # Panics
    /// When nothing can go on any more, or the run takes 30 days of virtual time.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let waker = self.waker(MAIN);
        self.0.ready.lock().insert(MAIN);
        loop {
            let left = self.0.steps_left.get();
            assert!(left > 0, "seed {}: the steps are used up, something goes round without end", self.0.seed);
            self.0.steps_left.set(left - 1);
            match self.choose() {
                Some(MAIN) => {
                    if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return output;
                    }
                }
                Some(id) => self.run(id),
                None => assert!(self.advance(), "seed {}: nobody can go on and no timer runs", self.0.seed),
            }
        }
    }

    /// Completes after `time` of virtual time.
    pub fn sleep(&self, time: Duration) -> impl Future<Output = ()> + use<> {
        let at = self.now().saturating_add(time.as_nanos() as u64);
        Sleep { sim: self.clone(), key: (at, self.new_id()) }
    }

    fn new_id(&self) -> u64 {
        self.0.next_id.replace(self.0.next_id.get() + 1)
    }

    fn waker(&self, id: u64) -> Waker {
        Waker::from(Arc::new(TaskWaker { id, ready: self.0.ready.clone() }))
    }

    /// Takes one of the tasks that can go on, by the seed.
    fn choose(&self) -> Option<u64> {
        let (hosts, paused) = (self.0.hosts.borrow(), self.0.paused.borrow());
        let mut ready = self.0.ready.lock();
        ready.retain(|id| *id == MAIN || hosts.contains_key(id));
        let can_run = |id: &&u64| hosts.get(id).is_none_or(|host| !paused.contains(host));
        let count = ready.iter().filter(can_run).count() as u64;
        let nth = self.with_rng(|rng| rng.below(count)) as usize;
        let chosen = *ready.iter().filter(can_run).nth(nth)?;
        ready.remove(&chosen);
        Some(chosen)
    }

    fn run(&self, id: u64) {
        let Some(mut task) = self.0.tasks.borrow_mut().remove(&id) else { return };
        let ended = task.future.as_mut().poll(&mut Context::from_waker(&self.waker(id))).is_ready();
        if ended {
            self.0.hosts.borrow_mut().remove(&id);
        } else if self.0.hosts.borrow().contains_key(&id) {
            self.0.tasks.borrow_mut().insert(id, task);
        }
    }

    /// Moves time to the next timer; false when there is none.
    fn advance(&self) -> bool {
        let mut timers = self.0.timers.borrow_mut();
        let Some((&(at, _), _)) = timers.first_key_value() else { return false };
        assert!(at < LONGEST_RUN.as_nanos() as u64, "seed {}: the run never ends", self.0.seed);
        self.0.now.store(self.now().max(at), Ordering::Relaxed);
        let later = timers.split_off(&(at + 1, 0));
        let due = std::mem::replace(&mut *timers, later);
        due.into_values().for_each(Waker::wake);
        true
    }
}

struct Sleep {
    sim: Sim,
    key: (u64, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.sim.now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.sim.0.timers.borrow_mut().insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.sim.0.timers.borrow_mut().remove(&self.key);
    }
}

/// One host's clock, random numbers and timers.
pub struct SimEnv {
    sim: Sim,
    host: HostNo,
    clock: HostClock,
    rng: RefCell<Rng>,
}

impl SimEnv {
    /// The world.
    pub fn sim(&self) -> &Sim {
        &self.sim
    }

    /// Whose environment this is.
    pub fn host(&self) -> HostNo {
        self.host
    }

    fn rate(&self) -> i128 {
        1_000_000 + i128::from(self.clock.fast_ppm)
    }

    /// This host's clock, for a thread that moves data.
    pub fn thread_clock(&self) -> Box<dyn Fn() -> Instant + Send> {
        let (world, clock) = (self.sim.shared_clock(), self.clock);
        Box::new(move || clock.shows(world.load(Ordering::Relaxed)))
    }
}

impl HostClock {
    /// What it shows after `world` nanoseconds of virtual time.
    fn shows(&self, world: u64) -> Instant {
        let ran = i128::from(world) * (1_000_000 + i128::from(self.fast_ppm)) / 1_000_000;
        Instant(self.starts_at.saturating_add(ran as u64))
    }
}

impl Env for SimEnv {
    fn now(&self) -> Instant {
        self.clock.shows(self.sim.now())
    }

    fn wall_ns(&self) -> i64 {
        // 2026-01-01, as good as any day.
        1_767_225_600_000_000_000 + self.now().0 as i64
    }

    fn random(&self, bytes: &mut [u8]) {
        self.rng.borrow_mut().fill(bytes);
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        let by_world = time.as_nanos() as i128 * 1_000_000 / self.rate();
        Box::pin(self.sim.sleep(Duration::from_nanos(by_world as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(seed: u64) -> Vec<(u32, u64)> {
        let sim = Sim::new(seed);
        let log = Rc::new(RefCell::new(Vec::new()));
        let tasks: Vec<_> = (1..=3)
            .map(|host| {
                let (env, log) = (sim.env(HostNo(host)), log.clone());
                sim.spawn(HostNo(host), async move {
                    for _ in 0..5 {
                        let mut wait = [0];
                        env.random(&mut wait);
                        env.sleep(Duration::from_millis((wait[0] % 4).into())).await;
                        log.borrow_mut().push((host, env.now().0));
                    }
                })
            })
            .collect();
        sim.block_on(async {
            for task in tasks {
                task.join().await.unwrap();
            }
        });
        Rc::try_unwrap(log).unwrap().into_inner()
    }

    #[test]
    fn the_same_seed_gives_the_same_run_and_another_seed_another_one() {
        assert_eq!(trace(7), trace(7));
        assert_ne!(trace(7), trace(8));
    }

    #[test]
    fn a_killed_host_never_runs_again_and_a_paused_one_only_after_its_resume() {
        let sim = Sim::new(1);
        let ran = Rc::new(RefCell::new(Vec::new()));
        for host in [1, 2] {
            let (env, ran) = (sim.env(HostNo(host)), ran.clone());
            sim.spawn(HostNo(host), async move {
                env.sleep(Duration::from_secs(1)).await;
                ran.borrow_mut().push(host);
            });
        }
        sim.pause(HostNo(1));
        sim.kill(HostNo(2));
        sim.block_on(sim.sleep(Duration::from_secs(5)));
        assert!(ran.borrow().is_empty());
        sim.resume(HostNo(1));
        sim.block_on(sim.sleep(Duration::from_secs(1)));
        assert_eq!(*ran.borrow(), [1]);
    }

    #[test]
    fn a_fast_clock_shows_more_and_wakes_earlier() {
        let sim = Sim::new(1);
        let env = sim.env_with_clock(HostNo(1), HostClock { starts_at: 1000, fast_ppm: 100_000 });
        sim.block_on(env.sleep(Duration::from_secs(11)));
        assert_eq!(sim.now(), 10_000_000_000);
        assert_eq!(env.now(), Instant(11_000_001_000));
    }
}
