//! Owns: what happens in one run: the world, what each host does, and what befalls them.
//! Promises: a seed decides all of it; a plan is plain data, so that a failing one can be made smaller and run again.
//! Must not know: how anything of it is carried out.

use std::collections::BTreeSet;

use engine::sim::{FaultRates, HostClock, Rng};

use super::{aimed, scenario};

/// A name that hosts work on: even ones lie in the first directory, odd ones in the second.
pub type Place = u8;

/// Names for files and small directories.
pub const PLACES: u8 = 6;
/// Virtual disks, made when the volume is.
pub const DISKS: u8 = 2;
/// Sectors of a virtual disk, and the most that a file grows to: three blocks.
pub const SECTORS: u32 = 384;
/// Bound on the rate of clocks that the volume is made for, in parts per million.
pub const CLOCK_PPM: u32 = 20_000;
/// Longest time that a plain write may be late, in milliseconds: less than the margin of the lease.
const LATE_WRITES_MS: u32 = 700;

/// One thing done with an open file. Sectors have 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Write `count` sectors from `sector` on: `by_thread` through a thread's mover, else on the actor.
    Write {
        /// First sector.
        sector: u32,
        /// Sectors.
        count: u32,
        /// By a thread's mover.
        by_thread: bool,
    },
    /// Read and compare.
    Read {
        /// First sector.
        sector: u32,
        /// Sectors.
        count: u32,
        /// By a thread's mover.
        by_thread: bool,
    },
    /// Make durable.
    Flush,
    /// Cut or grow to this many sectors.
    Resize(u32),
    /// Write on the actor and punch the same sectors at the same time.
    Race {
        /// First sector.
        sector: u32,
        /// Sectors.
        count: u32,
    },
    /// Punch a hole.
    Punch {
        /// First sector.
        sector: u32,
        /// Sectors.
        count: u32,
    },
    /// Keep it open for this time, in milliseconds.
    Rest(u32),
}

/// What is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file by its name.
    File(Place),
    /// A virtual disk.
    Disk(u8),
}

/// One operation of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Create a file exclusively.
    Create(Place),
    /// Make a directory.
    MakeDirectory(Place),
    /// Remove a file.
    Unlink(Place),
    /// Remove a directory.
    RemoveDirectory(Place),
    /// Rename, replacing.
    Rename(Place, Place),
    /// Look up.
    Look(Place),
    /// Open, use and close.
    Use {
        /// What.
        target: Target,
        /// To write too.
        write: bool,
        /// What is done while it is open.
        parts: Vec<Part>,
    },
}

/// An operation and the pause before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Microseconds of virtual time before it.
    pub pause_us: u64,
    /// What.
    pub operation: Operation,
}

/// One host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    /// Its clock.
    pub clock: HostClock,
    /// Lists of operations that go on beside each other.
    pub workers: Vec<Vec<Step>>,
}

/// When something befalls a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Microseconds of virtual time since the start.
    At(u64),
    /// When this many commands of the host have changed a LUN.
    AfterChanges(u32),
    /// When this many of its renewals have landed: their answers are on their way.
    AfterRenewals(u32),
    /// When it has made this many slots of others dirty.
    AfterTakeovers(u32),
    /// When this many of its compare-and-writes have begun to be late: nobody will supersede the last one.
    WhenLate(u32),
}

/// What befalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// The host dies; another incarnation mounts after so many milliseconds.
    Death(u32),
    /// It stands still for so many milliseconds.
    Pause(u32),
    /// Its path to LUN number `.0` is cut for `.1` milliseconds.
    Cut(u8, u32),
    /// LUN number `.0` is lost for all hosts, and back after `.1` milliseconds.
    Loss(u8, u32),
    /// LUN number `.0` does not answer anybody for `.1` milliseconds.
    Stall(u8, u32),
}

/// Something that happens to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the host.
    pub host: usize,
    /// When.
    pub moment: Moment,
    /// What.
    pub blow: Blow,
}

/// What a plan can be aimed at: what plans of all kinds reach too seldom to be counted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A host stands still between the two reads of a look-up, while another one puts a new file over the old name.
    LooksOverPauses,
    /// A host dies over a change that lands when it was recovered and nobody has touched the object.
    LateAndAlone,
    /// A host that renews is asked to let go of a LUN that it has lost, and cannot say so: a write under those locks has no end.
    Unanswered,
    /// All hosts rename and move the same few names.
    Disputes,
    /// The same, and one of them often does not hear what became of a change, and stands still then.
    Unheard,
    /// A host reads without a lock and stands still in it, while what it reads is cut off and its blocks are used for another file.
    ReadsOverPauses,
    /// A host dies over its publication, and so does the one that broke it, before it has recovered anything.
    BreakerDies,
    /// Many changes are late and nothing else happens.
    Late,
    /// As `Unanswered`, but the file is closed by then, and the write arrives after all, where the storage itself keeps nobody out yet.
    ClosedAndLate,
}

impl Aim {
    /// All of them.
    pub const ALL: [Aim; 9] = [
        Aim::LooksOverPauses,
        Aim::LateAndAlone,
        Aim::Unanswered,
        Aim::ClosedAndLate,
        Aim::Disputes,
        Aim::Unheard,
        Aim::ReadsOverPauses,
        Aim::BreakerDies,
        Aim::Late,
    ];

    /// Its name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Aim::LooksOverPauses => "looks-over-pauses",
            Aim::LateAndAlone => "late-and-alone",
            Aim::Unanswered => "unanswered",
            Aim::ClosedAndLate => "closed-and-late",
            Aim::Disputes => "disputes",
            Aim::Unheard => "unheard",
            Aim::ReadsOverPauses => "reads-over-pauses",
            Aim::BreakerDies => "breaker-dies",
            Aim::Late => "late",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Aim> {
        Aim::ALL.into_iter().find(|aim| aim.name() == name)
    }
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What decided it.
    pub seed: u64,
    /// Cells of 4096 bytes instead of 512.
    pub large_cells: bool,
    /// LUNs.
    pub luns: usize,
    /// Only some blocks are free.
    pub nearly_full: bool,
    /// The storage cannot keep a broken host out: only its lease does.
    pub fenced_by_time: bool,
    /// Hosts.
    pub hosts: Vec<HostPlan>,
    /// What befalls them.
    pub events: Vec<Event>,
    /// Faults of commands.
    pub rates: FaultRates,
    /// Longest time of a command in one direction, in microseconds.
    pub latency_us: u64,
    /// Longest time that a plain write may be late, in milliseconds: less than the lease's margin where only time fences.
    pub late_writes_ms: u32,
    /// At the end all hosts die at once and the storage loses power.
    pub power_loss: bool,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Plan {
        let rng = &mut Rng::new(seed ^ 0x5eed);
        let hosts = if rng.chance(700) { 2 } else { rng.between(3, 4) as usize };
        let luns = if rng.chance(700) { 1 } else { rng.between(2, 3) as usize };
        let violent = rng.chance(600);
        let few = rng.between(2, 8) as u16;
        let rates = match rng.below(4) {
            0 | 1 => FaultRates::default(),
            2 => FaultRates { answer_lost: few, command_lost: few, late: few, repeated: few, not_done: few, tear: few },
            _ => FaultRates::MANY,
        };
        let length = rng.between(4, 10) as usize;
        let mut plan = Plan {
            seed,
            large_cells: rng.chance(150),
            luns,
            nearly_full: rng.chance(80),
            fenced_by_time: rng.chance(500),
            hosts: (0..hosts).map(|_| host(rng, length)).collect(),
            events: Vec::new(),
            rates,
            latency_us: [50, 400, 400, 3000][rng.below(4) as usize],
            late_writes_ms: LATE_WRITES_MS,
            power_loss: rng.chance(250),
        };
        if violent {
            plan.events = (0..rng.between(1, 3)).map(|_| event(rng, hosts, luns)).collect();
        }
        match rng.below(10) {
            0 => scenario::duel(rng, &mut plan),
            1 => scenario::names_in_dispute(rng, &mut plan),
            2 => scenario::late_death(rng, &mut plan),
            3 => scenario::stall(rng, &mut plan),
            4 => scenario::late_publication(rng, &mut plan),
            5 => scenario::dispute_and_death(rng, &mut plan),
            6 => scenario::sleeper(rng, &mut plan),
            _ => {}
        }
        plan
    }

    /// The plan of a seed that goes for one rule only.
    pub fn aimed(aim: Aim, seed: u64) -> Plan {
        let mut plan = Plan::of(seed);
        let rng = &mut Rng::new(seed ^ 0x00a1_3ed0);
        match aim {
            Aim::LooksOverPauses => aimed::looks_over_pauses(rng, &mut plan),
            Aim::LateAndAlone => aimed::late_and_alone(rng, &mut plan),
            Aim::Unanswered => aimed::unanswered(rng, &mut plan),
            Aim::ClosedAndLate => aimed::closed_and_late(rng, &mut plan),
            Aim::Disputes => scenario::names_in_dispute(rng, &mut plan),
            Aim::Unheard => aimed::unheard(rng, &mut plan),
            Aim::ReadsOverPauses => aimed::reads_over_pauses(rng, &mut plan),
            Aim::BreakerDies => aimed::breaker_dies(rng, &mut plan),
            Aim::Late => aimed::late(&mut plan),
        }
        plan
    }

    /// Numbers of the hosts, from 1 on, that nothing keeps from renewing: a storage that stalls or is lost for all convicts nobody.
    pub fn undisturbed(&self) -> BTreeSet<u32> {
        if self.rates != FaultRates::default() || self.power_loss {
            return BTreeSet::new();
        }
        let is_hit = |number: usize| {
            self.events.iter().any(|event| {
                event.host == number && matches!(event.blow, Blow::Death(_) | Blow::Pause(_) | Blow::Cut(_, _))
            })
        };
        (0..self.hosts.len()).filter(|number| !is_hit(*number)).map(|number| number as u32 + 1).collect()
    }

    /// How many operations and events it has: what can be left out.
    pub fn parts(&self) -> usize {
        self.operations() + self.events.len()
    }

    fn operations(&self) -> usize {
        self.hosts.iter().flat_map(|host| &host.workers).map(Vec::len).sum()
    }

    /// The plan without its `nth` part.
    pub fn without(&self, nth: usize) -> Plan {
        let mut less = self.clone();
        let mut left = nth;
        for worker in less.hosts.iter_mut().flat_map(|host| &mut host.workers) {
            if left < worker.len() {
                worker.remove(left);
                return less;
            }
            left -= worker.len();
        }
        less.events.remove(left);
        less
    }
}

fn host(rng: &mut Rng, length: usize) -> HostPlan {
    let ppm = CLOCK_PPM as i32;
    let fast_ppm = match rng.below(4) {
        0 => ppm,
        1 => -ppm,
        _ => rng.below(2 * CLOCK_PPM as u64 + 1) as i32 - ppm,
    };
    let workers = if rng.chance(300) { 2 } else { 1 };
    HostPlan {
        clock: HostClock { starts_at: rng.below(1 << 45), fast_ppm },
        workers: (0..workers).map(|_| (0..length / workers).map(|_| step(rng)).collect()).collect(),
    }
}

fn step(rng: &mut Rng) -> Step {
    let pause_us = if rng.chance(200) { rng.below(400_000) } else { rng.below(2000) };
    let place = rng.below(PLACES.into()) as Place;
    let operation = match rng.below(100) {
        0..16 => Operation::Create(place),
        16..20 => Operation::MakeDirectory(place),
        20..30 => Operation::Unlink(place),
        30..33 => Operation::RemoveDirectory(place),
        33..45 => Operation::Rename(place, rng.below(PLACES.into()) as Place),
        45..51 => Operation::Look(place),
        51..85 => Operation::Use { target: Target::File(place), write: rng.chance(750), parts: parts(rng, true) },
        _ => {
            let target = Target::Disk(rng.below(DISKS.into()) as u8);
            Operation::Use { target, write: rng.chance(800), parts: parts(rng, false) }
        }
    };
    Step { pause_us, operation }
}

fn parts(rng: &mut Rng, resizable: bool) -> Vec<Part> {
    (0..rng.between(1, 6)).map(|_| part(rng, resizable)).collect()
}

fn part(rng: &mut Rng, resizable: bool) -> Part {
    let sector = if rng.chance(500) { rng.below(24) } else { rng.below(u64::from(SECTORS) - 1) } as u32;
    let longest = u64::from(SECTORS - sector).min(if rng.chance(850) { 12 } else { 150 });
    let count = rng.between(1, longest) as u32;
    let by_thread = rng.chance(700);
    match rng.below(100) {
        0..48 => Part::Write { sector, count, by_thread },
        48..63 => Part::Read { sector, count, by_thread },
        63..80 => Part::Flush,
        80..86 if resizable => Part::Resize(if rng.chance(300) { 0 } else { sector }),
        86..90 => Part::Race { sector, count: count.min(40) },
        80..91 => Part::Punch { sector, count },
        _ => Part::Rest(if rng.chance(300) { rng.between(500, 8000) } else { rng.below(300) } as u32),
    }
}

fn event(rng: &mut Rng, hosts: usize, luns: usize) -> Event {
    let moment = match rng.below(10) {
        0..2 => Moment::At(rng.below(2_000_000)),
        2..7 => Moment::AfterChanges(rng.between(1, 120) as u32),
        7 => Moment::WhenLate(rng.between(1, 2) as u32),
        _ => Moment::AfterRenewals(rng.between(1, 4) as u32),
    };
    let lun = rng.below(luns as u64) as u8;
    let long = rng.between(4000, 12_000) as u32;
    let length = if rng.chance(700) { long } else { rng.between(50, 3000) as u32 };
    let blow = match rng.below(10) {
        0..4 => Blow::Death(rng.between(10, 8000) as u32),
        4..7 => Blow::Pause(length),
        7..9 => Blow::Cut(lun, length),
        _ if rng.chance(300) => Blow::Loss(lun, length),
        _ => Blow::Stall(lun, length),
    };
    Event { host: rng.below(hosts as u64) as usize, moment, blow }
}
