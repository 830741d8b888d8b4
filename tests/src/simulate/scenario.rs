//! Owns: plans that go for what the random ones reach seldom: a takeover in the middle of writing, names in dispute, changes that land
//! after their host's death, storage that stalls.
//! Promises: they differ by the seed like all others. Must not know: how plans are carried out.

use std::iter::repeat_with;

use engine::sim::{FaultRates, Rng};

use super::plan::{Blow, Event, Moment, Operation, Part, Place, Plan, Step, Target};

fn step(rng: &mut Rng, operation: Operation) -> Step {
    Step { pause_us: rng.below(3000), operation }
}

fn set_work(plan: &mut Plan, host: usize, steps: Vec<Step>) {
    plan.hosts[host].workers = vec![steps];
}

fn writing(rng: &mut Rng, target: Target, parts: usize) -> Operation {
    let part = |rng: &mut Rng| {
        let (sector, by_thread) = (rng.below(300) as u32, rng.chance(500));
        match rng.below(10) {
            0..5 => Part::Write { sector, count: rng.between(1, 30) as u32, by_thread },
            5..7 => Part::Flush,
            7 => Part::Punch { sector, count: rng.between(1, 80) as u32 },
            8 => Part::Read { sector, count: 8, by_thread },
            _ => Part::Rest(rng.between(100, 900) as u32),
        }
    };
    let mut parts: Vec<Part> = repeat_with(|| part(rng)).take(parts).collect();
    parts.extend([Part::Write { sector: 1, count: 9, by_thread: false }, Part::Flush]);
    Operation::Use { target, write: true, parts }
}

/// Two hosts want one disk; the first one stands still, or loses one LUN, while it writes, and goes on when the second one has it.
pub fn duel(rng: &mut Rng, plan: &mut Plan) {
    let target = Target::Disk(rng.below(2) as u8);
    plan.hosts.truncate(2);
    plan.rates = FaultRates::default();
    for host in 0..2 {
        let mut steps = vec![Step { pause_us: host as u64 * 300_000, operation: writing(rng, target, 6) }];
        steps.extend([0, 1].map(|_| {
            let operation = writing(rng, target, 6);
            step(rng, operation)
        }));
        set_work(plan, host, steps);
    }
    let (length, lun) = (rng.between(7000, 14_000) as u32, rng.below(plan.luns as u64) as u8);
    let blow = if rng.chance(500) { Blow::Pause(length) } else { Blow::Cut(lun, length) };
    plan.events = vec![Event { host: 0, moment: Moment::AfterChanges(rng.between(10, 70) as u32), blow }];
    if rng.chance(300) {
        // Another incarnation of the second host takes a slot while the first one stands still.
        let blow = Blow::Death(rng.between(10, 3000) as u32);
        plan.events.push(Event { host: 1, moment: Moment::At(rng.between(5_000_000, 12_000_000)), blow });
    }
}

/// All hosts make, rename and look up three names, two of one directory and one of another: renames meet moves of the same object.
pub fn names_in_dispute(rng: &mut Rng, plan: &mut Plan) {
    let place = |rng: &mut Rng| rng.below(3) as Place;
    for host in 0..plan.hosts.len() {
        let steps = repeat_with(|| {
            let operation = match rng.below(10) {
                0..2 => Operation::Create(place(rng)),
                2 => Operation::Unlink(place(rng)),
                3..6 => {
                    let from = place(rng);
                    Operation::Rename(from, (from + rng.between(1, 2) as Place) % 3)
                }
                _ => Operation::Look(place(rng)),
            };
            step(rng, operation)
        });
        set_work(plan, host, steps.take(10).collect());
    }
    if rng.chance(500) {
        plan.rates = FaultRates::default();
        plan.events.clear();
    }
}

/// A host dies when one of its changes is late: it lands when others have recovered what the host left.
pub fn late_death(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates { late: rng.between(5, 40) as u16, ..FaultRates::default() };
    plan.power_loss = false;
    plan.events = vec![Event {
        host: rng.below(plan.hosts.len() as u64) as usize,
        moment: Moment::WhenLate(rng.between(1, 4) as u32),
        blow: Blow::Death(rng.between(8000, 20_000) as u32),
    }];
    let target = if rng.chance(700) { Target::Disk(0) } else { Target::File(0) };
    for host in 0..plan.hosts.len() {
        let mut steps = std::mem::take(&mut plan.hosts[host].workers[0]);
        let operation = writing(rng, target, 5);
        steps.insert(0, step(rng, operation));
        let operation = writing(rng, target, 5);
        steps.push(Step { pause_us: rng.below(9_000_000), operation });
        set_work(plan, host, steps);
    }
}

/// A host dies while its publication of new granules is late; another one takes the disk, believes what it reads, and looks again later.
pub fn late_publication(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates { late: rng.between(60, 250) as u16, ..FaultRates::default() };
    plan.power_loss = false;
    plan.hosts.truncate(2);
    let (target, sector) = (Target::Disk(1), rng.below(40) as u32);
    let written =
        (0..3).flat_map(|nth| [Part::Write { sector: sector + nth * 64, count: 8, by_thread: true }, Part::Flush]);
    let writes = Operation::Use { target, write: true, parts: written.collect() };
    set_work(plan, 0, vec![step(rng, writes)]);
    let looks = |rest: u32| {
        let looked = (0..3).map(|nth| Part::Read { sector: sector + nth * 64, count: 8, by_thread: false });
        Operation::Use { target, write: true, parts: looked.chain([Part::Rest(rest)]).collect() }
    };
    let first = Step { pause_us: rng.between(3_000_000, 8_000_000), operation: looks(rng.below(6000) as u32) };
    let operation = looks(1);
    set_work(plan, 1, vec![first, step(rng, operation)]);
    let moment = Moment::WhenLate(rng.between(1, 3) as u32);
    plan.events = vec![Event { host: 0, moment, blow: Blow::Death(25_000) }];
}

/// A host stands still between two writes in place, for longer than its lease, and writes on before it has looked at anything: only its
/// gate keeps it from what another host has taken meanwhile.
pub fn sleeper(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    plan.fenced_by_time = true;
    plan.hosts.truncate(2);
    let (target, by_thread) = (Target::Disk(rng.below(2) as u8), rng.chance(600));
    let place = Part::Write { sector: 16, count: 8, by_thread };
    let mut parts = vec![place, Part::Flush];
    parts.extend((0..20).flat_map(|_| [Part::Rest(rng.between(50, 500) as u32), place]));
    set_work(plan, 0, vec![Step { pause_us: 0, operation: Operation::Use { target, write: true, parts } }]);
    let parts = vec![place, Part::Flush, Part::Rest(4000), Part::Read { sector: 16, count: 8, by_thread }];
    set_work(plan, 1, vec![Step { pause_us: 400_000, operation: Operation::Use { target, write: true, parts } }]);
    let moment = if rng.chance(500) {
        Moment::AfterRenewals(rng.between(2, 6) as u32)
    } else {
        Moment::At(rng.between(500_000, 3_000_000))
    };
    plan.events = vec![Event { host: 0, moment, blow: Blow::Pause(rng.between(5300, 9500) as u32) }];
}

/// All hosts make and remove names in one directory, and one of them dies: what it had dropped others may have marked too.
pub fn dispute_and_death(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    for host in 0..plan.hosts.len() {
        let steps = repeat_with(|| {
            let place = 2 * rng.below(3) as Place;
            let operation = if rng.chance(600) { Operation::Create(place) } else { Operation::Unlink(place) };
            Step { pause_us: rng.below(300), operation }
        });
        set_work(plan, host, steps.take(8).collect());
    }
    let moment = Moment::AfterChanges(rng.between(5, 60) as u32);
    plan.events = vec![Event { host: 0, moment, blow: Blow::Death(rng.between(10, 8000) as u32) }];
}

/// Nothing but a storage that does not answer, for longer than a lease, while all want the same.
pub fn stall(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    let (lun, time) = (rng.below(plan.luns as u64) as u8, rng.between(4000, 15_000) as u32);
    let blow = if rng.chance(500) { Blow::Stall(lun, time) } else { Blow::Loss(lun, time) };
    plan.events = vec![Event { host: 0, moment: Moment::At(rng.between(200_000, 3_000_000)), blow }];
    for host in 0..plan.hosts.len() {
        let operation = writing(rng, Target::Disk(0), 4);
        let first = step(rng, operation);
        let operation = writing(rng, Target::Disk(0), 4);
        set_work(plan, host, vec![first, Step { pause_us: rng.below(2_000_000), operation }]);
    }
}

/// One host puts file after file over one name, which is never missing; another one looks it up all the while and stands still now and
/// then: between its reads of the directory and of the file the one that it found may be gone, and its root cell another file's.
pub fn looks_over_pauses(rng: &mut Rng, plan: &mut Plan) {
    const ROUNDS: u64 = 6;
    const LOOKS: usize = 40;
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    plan.nearly_full = false;
    plan.hosts.truncate(2);
    plan.latency_us = [200, 1000, 3000][rng.below(3) as usize];
    // About the time that one round takes: some twenty times to the LUN and back.
    let round_us = 20 * plan.latency_us;
    let mut steps = vec![Step { pause_us: 0, operation: Operation::Create(0) }];
    for _ in 0..ROUNDS {
        steps.extend([Operation::Create(2), Operation::Rename(2, 0)].map(|operation| step(rng, operation)));
    }
    set_work(plan, 0, steps);
    let looks = repeat_with(|| Step { pause_us: rng.below(plan.latency_us), operation: Operation::Look(0) });
    let looks = looks.take(LOOKS).collect();
    set_work(plan, 1, looks);
    let pause = |rng: &mut Rng| Event {
        host: 1,
        moment: Moment::At(rng.between(round_us / 2, ROUNDS * round_us)),
        blow: Blow::Pause((rng.between(round_us / 4, 2 * round_us) / 1000).max(1) as u32),
    };
    plan.events = repeat_with(|| pause(rng)).take(5).collect();
}

/// A host dies while one of its changes of a disk is late. Another one recovers it and leaves the disk alone; then the change lands.
pub fn late_and_alone(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates { late: rng.between(60, 250) as u16, ..FaultRates::default() };
    plan.power_loss = false;
    plan.nearly_full = false;
    plan.fenced_by_time = false;
    plan.hosts.truncate(2);
    let block = rng.below(3) as u32;
    let written = (0..3).flat_map(|nth| {
        let sector = (block + nth) % 3 * 128 + rng.below(100) as u32;
        [Part::Write { sector, count: 8, by_thread: true }, Part::Flush]
    });
    let parts = written.collect();
    let operation = Operation::Use { target: Target::Disk(0), write: true, parts };
    set_work(plan, 0, vec![step(rng, operation)]);
    let operation = Operation::Use { target: Target::Disk(1), write: true, parts: vec![Part::Rest(8000); 4] };
    set_work(plan, 1, vec![step(rng, operation)]);
    let moment = Moment::WhenLate(rng.between(1, 3) as u32);
    plan.events = vec![Event { host: 0, moment, blow: Blow::Death(40_000) }];
}

/// Two LUNs. A host loses its path to the one where the lock of a disk lies while it writes there, so that a write has no known end, and
/// goes on writing a file whose lock lies on the other one. Another host wants both.
pub fn unanswered(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    plan.nearly_full = false;
    plan.fenced_by_time = true;
    plan.luns = 2;
    plan.hosts.truncate(2);
    let steadily = |rng: &mut Rng, target| {
        let place = |rng: &mut Rng| Part::Write { sector: rng.below(300) as u32, count: 4, by_thread: rng.chance(500) };
        let place = place(rng);
        let mut parts = vec![place, Part::Flush];
        parts.extend((0..60).flat_map(|_| [Part::Rest(rng.between(100, 500) as u32), place]));
        Operation::Use { target, write: true, parts }
    };
    let create = Step { pause_us: 0, operation: Operation::Create(0) };
    let of_file = steadily(rng, Target::File(0));
    let of_disk = steadily(rng, Target::Disk(0));
    plan.hosts[0].workers =
        vec![vec![Step { pause_us: 0, operation: of_disk }], vec![create, Step { pause_us: 0, operation: of_file }]];
    let wants = |target| {
        let parts = vec![Part::Write { sector: 16, count: 8, by_thread: false }, Part::Flush];
        let operation = Operation::Use { target, write: true, parts };
        vec![Step { pause_us: 600_000, operation }; 4]
    };
    plan.hosts[1].workers = vec![wants(Target::Disk(0)), wants(Target::File(0))];
    let moment = Moment::At(rng.between(700_000, 2_500_000));
    plan.events =
        vec![Event { host: 0, moment, blow: Blow::Cut(rng.below(2) as u8, rng.between(9_000, 25_000) as u32) }];
}

/// Two LUNs of which the first one is full: what is written to a disk lies on the second one, its lock on the first one. A host loses the first
/// one when a write is late, for longer than a lease, and closes the disk; another host wants it.
pub fn closed_and_late(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates { late: rng.between(40, 150) as u16, ..FaultRates::default() };
    plan.power_loss = false;
    plan.nearly_full = true;
    plan.fenced_by_time = false;
    plan.late_writes_ms = 20_000;
    plan.luns = 2;
    plan.hosts.truncate(2);
    let place = Part::Write { sector: 16, count: 8, by_thread: rng.chance(500) };
    let mut parts = vec![place, Part::Flush];
    parts.extend((0..10).flat_map(|_| [Part::Rest(rng.between(50, 300) as u32), place]));
    let operation = Operation::Use { target: Target::Disk(0), write: true, parts };
    let rests = Operation::Use { target: Target::Disk(1), write: true, parts: vec![Part::Rest(10_000); 3] };
    set_work(plan, 0, vec![Step { pause_us: 0, operation }, step(rng, rests)]);
    let parts = vec![place, Part::Flush, Part::Rest(5000)];
    let wants = Operation::Use { target: Target::Disk(0), write: true, parts };
    set_work(plan, 1, vec![Step { pause_us: 400_000, operation: wants }; 4]);
    let moment = Moment::At(rng.between(500_000, 2_500_000));
    plan.events = vec![Event { host: 0, moment, blow: Blow::Cut(0, rng.between(12_000, 30_000) as u32) }];
}
