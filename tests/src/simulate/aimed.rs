//! Owns: plans that go for one rule only, which plans of all kinds reach too seldom to be counted on.
//! Promises: they differ by the seed like all others. Must not know: how plans are carried out, which fault they are to show.

use std::iter::repeat_with;

use engine::sim::{FaultRates, Rng};

use super::plan::{Blow, Event, Moment, Operation, Part, Place, Plan, Step, Target};
use super::scenario::{self, set_work, step};

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

/// All hosts rename within one directory. The first one does not hear what became of many of its changes, and stands still after some.
pub fn unheard(rng: &mut Rng, plan: &mut Plan) {
    scenario::names_in_dispute(rng, plan);
    plan.rates = FaultRates { answer_lost: 200, ..FaultRates::default() };
    plan.power_loss = false;
    while plan.hosts.len() < 3 {
        let another = plan.hosts[0].clone();
        plan.hosts.push(another);
    }
    for host in 0..plan.hosts.len() {
        let steps = repeat_with(|| {
            let place = |rng: &mut Rng| 2 * rng.below(3) as Place;
            let operation = match rng.below(10) {
                0..4 => Operation::Create(place(rng)),
                4..6 => Operation::Unlink(place(rng)),
                _ => Operation::Rename(place(rng), place(rng)),
            };
            Step { pause_us: rng.below(500), operation }
        });
        let steps = steps.take(14).collect();
        set_work(plan, host, steps);
    }
    let pause = |rng: &mut Rng| Event {
        host: 0,
        moment: Moment::AfterChanges(rng.between(5, 80) as u32),
        blow: Blow::Pause(rng.between(5, 60) as u32),
    };
    plan.events = repeat_with(|| pause(rng)).take(6).collect();
}

/// A volume with few free blocks. One host fills a file and cuts it off, then fills another one with its blocks; another host reads the
/// first file all the while and stands still now and then.
pub fn reads_over_pauses(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates::default();
    plan.power_loss = false;
    plan.nearly_full = true;
    plan.hosts.truncate(2);
    plan.latency_us = [400, 1000, 3000][rng.below(3) as usize];
    let mut steps = vec![Step { pause_us: 0, operation: Operation::Create(0) }];
    steps.push(Step { pause_us: 0, operation: Operation::Create(2) });
    for nth in 0..10 {
        let parts = vec![
            Part::Write { sector: 0, count: 150, by_thread: false },
            Part::Flush,
            Part::Rest(rng.between(1, 30) as u32),
            Part::Resize(0),
        ];
        let operation = Operation::Use { target: Target::File(nth % 2 * 2), write: true, parts };
        steps.push(step(rng, operation));
    }
    set_work(plan, 0, steps);
    let looks = repeat_with(|| {
        let parts = vec![Part::Read { sector: 0, count: 150, by_thread: false }; 6];
        let operation = Operation::Use { target: Target::File(0), write: false, parts };
        Step { pause_us: rng.below(2000), operation }
    });
    let looks = looks.take(25).collect();
    set_work(plan, 1, looks);
    let pause = |rng: &mut Rng| Event {
        host: 1,
        moment: Moment::At(rng.between(10_000, 1_000_000)),
        blow: Blow::Pause(rng.between(10, 200) as u32),
    };
    plan.events = repeat_with(|| pause(rng)).take(8).collect();
}

/// A host dies while its publication of new granules is late. The one that breaks it dies as soon as that is done, so that nothing is
/// recovered for a while; a third one takes the disk, believes what it reads, and looks again later.
pub fn breaker_dies(rng: &mut Rng, plan: &mut Plan) {
    plan.rates = FaultRates { late: rng.between(60, 250) as u16, ..FaultRates::default() };
    plan.power_loss = false;
    plan.nearly_full = false;
    plan.luns = 1;
    while plan.hosts.len() < 3 {
        let another = plan.hosts[0].clone();
        plan.hosts.push(another);
    }
    plan.hosts.truncate(3);
    let (target, sector) = (Target::Disk(1), rng.below(40) as u32);
    let written =
        (0..3).flat_map(|nth| [Part::Write { sector: sector + nth * 64, count: 8, by_thread: true }, Part::Flush]);
    let writes = Operation::Use { target, write: true, parts: written.collect() };
    set_work(plan, 0, vec![step(rng, writes)]);
    let looks = |rest: u32| {
        let looked = (0..3).map(|nth| Part::Read { sector: sector + nth * 64, count: 8, by_thread: false });
        Operation::Use { target, write: true, parts: looked.chain([Part::Rest(rest)]).collect() }
    };
    // The second host watches the first one for longer, and so it breaks it.
    set_work(plan, 1, vec![Step { pause_us: 300_000, operation: looks(1) }; 3]);
    let mut steps = vec![Step { pause_us: 3_000_000, operation: looks(500) }];
    steps.extend([2000, 3000, 4000, 5000].map(|rest| Step { pause_us: 0, operation: looks(rest) }));
    set_work(plan, 2, steps);
    let dies = |host, moment, back| Event { host, moment, blow: Blow::Death(back) };
    plan.events =
        vec![dies(0, Moment::WhenLate(rng.between(1, 3) as u32), 60_000), dies(1, Moment::AfterTakeovers(1), 60_000)];
}

/// Many changes come late, and those that were believed to be lost are what others build on.
pub fn late(plan: &mut Plan) {
    plan.rates = FaultRates { late: 60, ..FaultRates::default() };
    plan.power_loss = false;
    plan.events.clear();
}
