//! Promises of cells that move to a window while hosts change them, and several movers die, pause and are late: no change is lost, no
//! reader sees an older one again. Each rule that is left out is noticed.

use std::cell::{Cell as StdCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use engine::cas::{CasOutcome, CellChange, CellIo};
use engine::env::Env;
use engine::format::layout::{HEADER_OFFSET, TABLE_OFFSET};
use engine::format::moved::Piece;
use engine::format::table_entry::{EntryKind, TableCell, TableEntry};
use engine::format::{Cell, CellContext, CellHeader, CellKind};
use engine::lun::Lun;
use engine::mkfs::MkfsOptions;
use engine::sabotage::{self, Sabotage};
use engine::sim::{FaultRates, HostNo, MemoryDisk, Sim, format_disks};
use engine::slot::HostIdentity;
use engine::units::{CellAddress, CellSize, Link, LunIndex, OpId, Seq, SlotRef, Token, Uuid};
use engine::volume::{MountOptions, Volume};
use engine::window::mover::{Batch, Way};
use engine::window::{Carriers, map};

const LUN: LunIndex = LunIndex::new(1).unwrap();
const CARRIER: LunIndex = LunIndex::new(2).unwrap();
const CONTEXT: CellContext = CellContext { volume: Uuid([7; 16]), cell_size: CellSize::B512 };
const WINDOW: CellAddress = CellAddress { lun: CARRIER, offset: 8 << 20 };
/// Where the counters lie.
const COUNTERS: u64 = 5 << 20;
const COUNT: usize = 128;
const MOVERS: u32 = 3;
const WORKERS: u32 = 3;
const CHANGES: u32 = 120;
/// Seeds that sound code passes, and within which each fault is noticed.
const SEEDS: u64 = 40;

fn image(at: CellAddress, kind: CellKind, nth: u64, payload: &[u8]) -> Cell {
    let mut op_id = [0; 16];
    op_id[..8].copy_from_slice(&at.pack().to_le_bytes());
    op_id[8..].copy_from_slice(&nth.to_le_bytes());
    let header = CellHeader {
        kind,
        address: at,
        seq: Seq(1),
        op_id: OpId(op_id),
        writer: SlotRef::NOBODY,
        owner: None,
        link: Link(0),
        index: 0,
        token: Token(0),
    };
    Cell::encode(&CONTEXT, header, payload)
}

fn pieces() -> [Piece; 2] {
    [Piece { from: HEADER_OFFSET, length: 4096 }, Piece { from: COUNTERS, length: COUNT as u64 * 512 }]
}

/// A LUN with counters, and its carrier with a blank window.
fn disks() -> [MemoryDisk; 2] {
    let disks = ["lun", "carrier"].map(|name| MemoryDisk::new(name, 64 << 20, Some(CellSize::B512)));
    for nth in 0..COUNT as u64 {
        let at = CellAddress { lun: LUN, offset: COUNTERS + nth * 512 };
        disks[0].damage(at.offset, image(at, CellKind::Blank, 0, &[0; 8]).image());
    }
    let header = CellAddress { lun: LUN, offset: HEADER_OFFSET };
    disks[0].damage(header.offset, image(header, CellKind::Header, 0, &[]).image());
    let map = map::map_cells(CellSize::B512, LUN, 64 << 20, &pieces());
    for nth in 0..map::window_bytes(CellSize::B512, &pieces()) / 512 {
        let at = CellAddress { lun: CARRIER, offset: WINDOW.offset + nth * 512 };
        let cell = match map.get(nth as usize) {
            Some(payload) => image(at, CellKind::WindowMap, nth, payload),
            None => image(at, CellKind::Blank, nth, &[]),
        };
        disks[1].damage(at.offset, cell.image());
    }
    disks
}

/// A host's paths, which are slow and fail.
fn paths(sim: &Sim, disks: &[MemoryDisk; 2], host: u32) -> [Rc<dyn Lun>; 2] {
    let rates =
        FaultRates { answer_lost: 20, command_lost: 20, late: 20, repeated: 20, not_done: 10, ..FaultRates::default() };
    [0, 1].map(|nth| {
        let path = disks[nth].connect(sim, HostNo(host));
        // Movers are slow: much happens between two of their commands.
        let (shortest, longest) = if host < 10 { (300, 3000) } else { (5000, 30_000) };
        path.set_latency(Duration::from_micros(shortest), Duration::from_micros(longest));
        path.set_rates(rates);
        path as Rc<dyn Lun>
    })
}

fn batches() -> [Batch; 2] {
    let placed = map::place(CellSize::B512, WINDOW.offset, &pieces());
    let place = |from| map::find(&placed, from).unwrap().0;
    [
        Batch { from: COUNTERS, to: place(COUNTERS), stride: 512, count: COUNT },
        Batch { from: HEADER_OFFSET, to: place(HEADER_OFFSET), stride: 4096, count: 1 },
    ]
}

async fn move_all(sim: Sim, host: u32, [own, carrier]: [Rc<dyn Lun>; 2]) {
    let env = sim.env(HostNo(host));
    let io = CellIo::new(CONTEXT, env.clone());
    let way = Way { io: &io, lun: LUN, own, carrier, window: WINDOW, writer: SlotRef::NOBODY };
    for batch in batches() {
        while way.move_batch(&batch).await.is_err() {
            env.sleep(Duration::from_millis(5)).await;
        }
    }
}

/// What is known of a counter: changes that were acknowledged, and such of which nobody knows.
#[derive(Clone, Copy, Default)]
struct Known {
    sure: u64,
    unsure: u64,
}

fn counter(cell: &Cell) -> u64 {
    u64::from_le_bytes(cell.payload()[..8].try_into().unwrap())
}

/// The LUN as a host uses it that knows nothing of the move.
fn member([own, carrier]: [Rc<dyn Lun>; 2]) -> Rc<dyn Lun> {
    let carriers = Carriers::default();
    drop(carriers.member(&CONTEXT, CARRIER, carrier));
    carriers.member(&CONTEXT, LUN, own)
}

async fn work(
    sim: Sim,
    host: u32,
    paths: [Rc<dyn Lun>; 2],
    known: Rc<RefCell<Vec<Known>>>,
    wrong: Rc<RefCell<Vec<String>>>,
) {
    let env = sim.env(HostNo(host));
    let io = CellIo::new(CONTEXT, env.clone());
    let lun = member(paths);
    let mut seen: BTreeMap<usize, u64> = BTreeMap::new();
    let mut left = CHANGES;
    while left > 0 {
        let nth = sim.with_rng(|rng| rng.below(COUNT as u64)) as usize;
        let at = CellAddress { lun: LUN, offset: COUNTERS + nth as u64 * 512 };
        let cell = match io.read(&lun, at).await {
            Ok(cell) => cell,
            Err(engine::error::FsError::Lun(_)) => continue,
            Err(error) => {
                wrong.borrow_mut().push(format!("host {host}: {error}"));
                return;
            }
        };
        let value = counter(&cell);
        if seen.insert(nth, value).is_some_and(|before| before > value) {
            wrong.borrow_mut().push(format!("host {host}: counter {nth} went back to {value}"));
        }
        let new = io.successor(&cell, CellChange::payload(&cell, (value + 1).to_le_bytes().to_vec()), SlotRef::NOBODY);
        let outcome = io.cas(&lun, &cell, new).await;
        let mut known = known.borrow_mut();
        match outcome {
            Ok(CasOutcome::Applied(_)) => known[nth].sure += 1,
            Ok(CasOutcome::Lost(_) | CasOutcome::NotDone(_)) => continue,
            Ok(CasOutcome::Overtaken(_) | CasOutcome::Unknown(_)) | Err(_) => known[nth].unsure += 1,
        }
        left -= 1;
    }
}

/// One run: what was wrong.
fn run(seed: u64, fault: Option<Sabotage>) -> Vec<String> {
    sabotage::set(fault);
    let sim = Sim::new(seed);
    let wrong = sim.block_on(story(&sim));
    sim.end();
    sabotage::set(None);
    wrong
}

async fn story(sim: &Sim) -> Vec<String> {
    let disks = disks();
    let (known, wrong) = (Rc::new(RefCell::new(vec![Known::default(); COUNT])), Rc::new(RefCell::new(Vec::new())));
    let working: Vec<_> = (1..=WORKERS)
        .map(|host| {
            let paths = paths(sim, &disks, host);
            sim.spawn(HostNo(host), work(sim.clone(), host, paths, known.clone(), wrong.clone()))
        })
        .collect();
    let moved = Rc::new(StdCell::new(0));
    for host in 10..10 + MOVERS {
        let (paths, env, moved) = (paths(sim, &disks, host), sim.clone(), moved.clone());
        let after = sim.with_rng(|rng| rng.below(60));
        sim.spawn(HostNo(host), async move {
            env.sleep(Duration::from_millis(after)).await;
            move_all(env, host, paths).await;
            moved.set(moved.get() + 1);
        });
    }
    // The first mover dies; the others, and the hosts that work, stand still now and then.
    let dies = sim.with_rng(|rng| 20 + rng.below(150));
    sim.sleep(Duration::from_millis(dies)).await;
    sim.kill(HostNo(10));
    while moved.get() + 1 < MOVERS {
        let (host, pause, go_on) = sim.with_rng(|rng| (rng.below(5), rng.below(40), rng.below(10)));
        let host = HostNo([1, 2, 3, 11, 12][host as usize]);
        sim.pause(host);
        sim.sleep(Duration::from_millis(pause)).await;
        sim.resume(host);
        sim.sleep(Duration::from_millis(go_on)).await;
    }
    for one in working {
        one.join().await;
    }
    // Commands without an answer land after 25 s at most.
    sim.sleep(Duration::from_secs(30)).await;
    let mut wrong = wrong.borrow().clone();
    let lun = member([0, 1].map(|nth| disks[nth].connect(sim, HostNo(99)) as Rc<dyn Lun>));
    let io = CellIo::new(CONTEXT, sim.env(HostNo(99)));
    if let Err(error) = io.read(&lun, CellAddress { lun: LUN, offset: HEADER_OFFSET }).await {
        wrong.push(error.to_string());
    }
    // All of it is in the window: the device is not needed any more.
    disks[0].set_lost(true);
    let known = known.borrow().clone();
    for (nth, known) in known.iter().enumerate() {
        match io.read(&lun, CellAddress { lun: LUN, offset: COUNTERS + nth as u64 * 512 }).await {
            Ok(cell) if (known.sure..=known.sure + known.unsure).contains(&counter(&cell)) => {}
            Ok(cell) => wrong.push(format!(
                "counter {nth} is {}: {} changes were acknowledged, {} are in doubt",
                counter(&cell),
                known.sure,
                known.unsure
            )),
            Err(error) => wrong.push(error.to_string()),
        }
    }
    wrong
}

#[test]
fn no_change_of_a_cell_is_lost_while_it_moves() {
    for seed in 0..tests::harness::scale(SEEDS) {
        assert_eq!(run(seed, None), Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn a_mover_that_leaves_out_a_rule_is_noticed() {
    for fault in [Sabotage::WindowReadLast, Sabotage::CopyUnproven] {
        let noticed = (0..SEEDS).find(|seed| !run(*seed, Some(fault)).is_empty());
        assert!(noticed.is_some(), "{fault:?} was not noticed");
        println!("{fault:?}: seed {noticed:?}");
    }
}

async fn mount(sim: &Sim, disks: &[MemoryDisk], host: u32) -> Volume {
    let luns = disks.iter().map(|disk| disk.connect(sim, HostNo(host)) as Rc<dyn Lun>).collect();
    let identity = HostIdentity { host: Uuid([host as u8; 16]), boot: Uuid([1; 16]), name: format!("host{host}") };
    let options = MountOptions { read_only: false, host: identity, slot_hint: None, degraded: false };
    let volume = Volume::mount(luns, options, sim.env(HostNo(host))).await.unwrap();
    let background = volume.clone();
    sim.spawn(HostNo(host), async move { background.background().await });
    volume
}

/// An allocation on the LUN that was decided before the LUN was taken out, and is sent afterwards: whether it lands.
fn a_late_allocation_lands(fault: Option<Sabotage>) -> bool {
    let sim = Sim::new(5);
    let disks = ["first", "second"].map(|name| MemoryDisk::new(name, 64 << 20, Some(CellSize::B512)));
    let landed = sim.block_on(async {
        let options = MkfsOptions { cell_size: Some(CellSize::B512), ..MkfsOptions::default() };
        format_disks(&sim, &disks, options).await.unwrap();
        let (one, two) = (mount(&sim, &disks, 1).await, mount(&sim, &disks, 2).await);
        assert!(one.drain_extent(LUN, &mut |_| ()).await.unwrap().is_moved());
        sim.sleep(Duration::from_secs(5)).await;
        // A table cell of free entries alone.
        let at = CellAddress { lun: LUN, offset: TABLE_OFFSET + 512 };
        let mut known = two.context().read_cell(at).await.unwrap();
        sabotage::set(fault);
        let removed = one.remove_extent(LUN, &mut |_| ()).await;
        sabotage::set(None);
        removed.unwrap();
        loop {
            let mut table = TableCell::decode(CellSize::B512, known.payload()).unwrap();
            let Some(free) = table.entries.iter_mut().find(|entry| entry.kind == EntryKind::Free) else { break false };
            *free = TableEntry { kind: EntryKind::Formatting, ..TableEntry::FREE };
            match two.context().cas(&known, CellChange::payload(&known, table.encode())).await.unwrap() {
                CasOutcome::Applied(_) => break true,
                // Who is told that another change was faster looks at that one.
                CasOutcome::Lost(now) | CasOutcome::Overtaken(now) => known = now,
                CasOutcome::NotDone(error) | CasOutcome::Unknown(error) => panic!("{error}"),
            }
        }
    });
    sim.end();
    landed
}

#[test]
fn an_allocation_that_comes_late_finds_no_free_block_on_a_lun_that_is_taken_out() {
    assert!(!a_late_allocation_lands(None));
    assert!(a_late_allocation_lands(Some(Sabotage::SealSkipped)), "the fault was not noticed");
}
