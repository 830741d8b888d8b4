//! Owns: plans that go for what the random ones reach seldom: a takeover in the middle of writing, names in dispute, changes that land
//! after their host's death, storage that stalls.
//! Promises: they differ by the seed like all others. Must not know: how plans are carried out.

use std::iter::repeat_with;

use engine::sim::{FaultRates, Rng};

use super::plan::{Blow, Event, Moment, Operation, Part, Place, Plan, Step, Target};

pub(super) fn step(rng: &mut Rng, operation: Operation) -> Step {
    Step { pause_us: rng.below(3000), operation }
}

pub(super) fn set_work(plan: &mut Plan, host: usize, steps: Vec<Step>) {
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
