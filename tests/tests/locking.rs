//! Locks of disks by real processes, whatever the order of opening, closing, standing still and dying of three hosts: a disk has one host at
//! a time, and whoever wants it gets it as soon as nobody else can have it.

use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::harness::{Luns, Mount, PATIENCE, scale};
use tests::machines::disk;
use tests::program::{Call, Program, text};
use tests::random::Random;

const HOSTS: usize = 3;
const DISKS: usize = 2;
/// Operations of one case. Each takeover takes some 13 seconds.
const STEPS: u64 = 14;

/// What may be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Acquire(usize, usize),
    Release(usize, usize),
    Pause(usize),
    Resume(usize),
    Crash(usize),
}

/// What the oracle knows of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Runs,
    /// Stopped since then.
    Paused(Instant),
    /// Its mount was killed; a new one is made when it acquires again.
    Dead,
}

/// A host: its mount, and the program that opens its disks.
struct Host {
    mount: Option<Mount>,
    program: Program,
    state: State,
    holds: [bool; DISKS],
}

struct World {
    luns: Luns,
    hosts: Vec<Host>,
    trace: Vec<String>,
}

fn flat(disk: usize) -> String {
    format!("d{disk}-flat.vmdk")
}

impl World {
    fn new() -> World {
        let luns = Luns::formatted(1, 256, &["--lease", "fast"]);
        let hosts: Vec<_> = (0..HOSTS)
            .map(|n| Host {
                mount: Some(luns.mount(n as u8 + 1)),
                program: Program::start(),
                state: State::Runs,
                holds: [false; DISKS],
            })
            .collect();
        for number in 0..DISKS {
            disk(hosts[0].mount.as_ref().unwrap(), &format!("d{number}.vmdk"), "8M", "thin");
        }
        World { luns, hosts, trace: Vec::new() }
    }

    fn path(&self, host: usize, disk: usize) -> PathBuf {
        self.luns.beside(format!("mnt{}", host + 1)).join(flat(disk))
    }

    /// Steps that make sense now.
    fn possible(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (n, host) in self.hosts.iter().enumerate() {
            match host.state {
                State::Paused(_) => steps.extend([Step::Resume(n), Step::Resume(n), Step::Crash(n)]),
                State::Dead => steps.extend((0..DISKS).map(|disk| Step::Acquire(n, disk))),
                State::Runs => {
                    for disk in 0..DISKS {
                        steps.push(if host.holds[disk] { Step::Release(n, disk) } else { Step::Acquire(n, disk) });
                        steps.push(if host.holds[disk] { Step::Pause(n) } else { Step::Acquire(n, disk) });
                    }
                    steps.push(Step::Crash(n));
                }
            }
        }
        steps
    }

    fn holder(&self, disk: usize) -> Option<usize> {
        self.hosts.iter().position(|host| host.holds[disk])
    }

    fn carry_out(&mut self, step: Step, random: &mut Random) {
        self.trace.push(format!("{step:?}"));
        match step {
            Step::Acquire(host, disk) => self.acquire(host, disk),
            Step::Release(host, disk) => {
                let path = text(&self.path(host, disk));
                self.hosts[host]
                    .program
                    .call(Call::Close(path))
                    .unwrap_or_else(|error| panic!("{error}: {:#?}", self.trace));
                self.hosts[host].holds[disk] = false;
            }
            Step::Pause(host) => {
                self.hosts[host].mount.as_ref().expect("it runs").pause();
                self.hosts[host].state = State::Paused(Instant::now());
                self.wait_beside(host, Duration::from_secs([0, 2, 16][random.below(3) as usize]));
            }
            Step::Resume(host) => self.resume(host),
            Step::Crash(host) => {
                let host = &mut self.hosts[host];
                host.mount.as_mut().expect("it has a mount").crash();
                // What it had open is of no use any more.
                host.program = Program::start();
                (host.state, host.holds) = (State::Dead, [false; DISKS]);
                host.mount = None;
            }
        }
    }

    /// Others want what a host that stands still holds.
    fn wait_beside(&mut self, stopped: usize, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            for (disk, other) in (0..DISKS).flat_map(|disk| (0..HOSTS).map(move |other| (disk, other))) {
                if self.hosts[stopped].holds[disk] && self.hosts[other].state == State::Runs {
                    self.acquire(other, disk);
                }
            }
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Exclusivity: while another host can have the disk it is refused. Progress: else it is had, after a takeover if need be.
    fn acquire(&mut self, host: usize, disk: usize) {
        if self.hosts[host].state == State::Dead {
            self.hosts[host].mount = Some(self.luns.mount(host as u8 + 1));
            self.hosts[host].state = State::Runs;
        }
        let path = text(&self.path(host, disk));
        if let Some(other) = self.holder(disk) {
            let refused = self.hosts[host].program.call(Call::Open(path));
            match refused {
                Ok(()) => panic!("host {host} got the disk {disk} of host {other}: {:#?}", self.trace),
                Err(error) => self.expect_busy(&error),
            }
            return;
        }
        let start = Instant::now();
        loop {
            match self.hosts[host].program.call(Call::Open(path.clone())) {
                Ok(()) => break,
                Err(error) => self.expect_busy(&error),
            }
            assert!(start.elapsed() < PATIENCE, "host {host} never gets the disk {disk}: {:#?}", self.trace);
            thread::sleep(Duration::from_millis(100));
        }
        self.hosts[host].holds[disk] = true;
        for call in [Call::Write(path.clone(), 0, 4096, host as u8 + 1), Call::Sync(path)] {
            self.hosts[host].program.call(call).unwrap_or_else(|error| panic!("{error}: {:#?}", self.trace));
        }
    }

    #[track_caller]
    fn expect_busy(&self, error: &io::Error) {
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY), "{error}: {:#?}", self.trace);
    }

    /// A host that goes on still has its disks, or it was taken over, which it may be only after its lease.
    fn resume(&mut self, host: usize) {
        let State::Paused(since) = self.hosts[host].state else { return };
        self.hosts[host].mount.as_ref().expect("it is there").resume();
        let lease = Duration::from_secs(10);
        let held: Vec<usize> = (0..DISKS).filter(|disk| self.hosts[host].holds[*disk]).collect();
        let path = |world: &World, disk: usize| text(&world.path(host, disk));
        let mut lost = false;
        for disk in held {
            let call = Call::Write(path(self, disk), 8192, 4096, host as u8 + 1);
            lost |= self.hosts[host].program.call(call).is_err();
            let call = Call::Sync(path(self, disk));
            lost |= self.hosts[host].program.call(call).is_err();
        }
        self.hosts[host].state = State::Runs;
        let slept_long = since.elapsed() > lease;
        assert!(!lost || slept_long, "host {host} lost a disk within its lease: {:#?}", self.trace);
        let mount = self.hosts[host].mount.as_mut().expect("it is there");
        if !(lost || slept_long && ends(mount)) {
            return;
        }
        let status = mount.wait_for_end();
        assert!(status.code() == Some(1) && mount.log().contains("was fenced"), "{status}: {}", mount.log());
        let host = &mut self.hosts[host];
        host.program = Program::start();
        (host.state, host.holds, host.mount) = (State::Dead, [false; DISKS], None);
    }
}

/// Whether a mount that slept for longer than its lease ends: it does, or it renews its lease and lives.
fn ends(mount: &mut Mount) -> bool {
    let start = Instant::now();
    loop {
        let lives = |status: Value| status["luns"][0]["lease_left_ms"].as_u64().is_some_and(|left| left > 1000);
        if mount.has_ended() {
            return true;
        }
        if mount.try_status().is_some_and(lives) {
            return false;
        }
        assert!(start.elapsed() < PATIENCE, "a host that woke up neither lives nor ends: {}", mount.log());
        thread::sleep(Duration::from_millis(100));
    }
}

fn interleaving(seed: u64) {
    let (mut world, mut random) = (World::new(), Random::new(seed));
    world.trace.push(format!("seed {seed}"));
    for _ in 0..STEPS {
        let steps = world.possible();
        let step = steps[random.below(steps.len() as u64) as usize];
        world.carry_out(step, &mut random);
    }
    for host in 0..HOSTS {
        world.resume(host);
        world.hosts[host].program = Program::start();
    }
    // In the end every host gets every disk, one after the other.
    for disk in 0..DISKS {
        for host in 0..HOSTS {
            world.hosts.iter_mut().for_each(|host| host.holds = [false; DISKS]);
            world.acquire(host, disk);
            world.hosts[host].program = Program::start();
        }
    }
    let alone = world.luns.mount(9);
    world.hosts.iter_mut().filter_map(|host| host.mount.take()).for_each(Mount::unmount);
    alone.wait_until_alone();
    alone.unmount();
    world.luns.assert_recovered();
}

#[test]
fn a_disk_has_one_host_at_a_time_and_whoever_wants_it_gets_it_in_the_end() {
    let first = std::env::var("VMFS_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let seeds = first..first + scale(3);
    // They mostly wait for leases: side by side.
    thread::scope(|scope| seeds.map(|seed| scope.spawn(move || interleaving(seed))).for_each(drop));
}
