//! Promises of compare-and-write: what each answer of a path turns into, for every way in which an answer can be in doubt.

mod scale;

use std::rc::Rc;
use std::time::Duration;

use vmfs_core::cas::{CasOutcome, CellChange, CellIo};
use vmfs_core::error::FsErrorKind;
use vmfs_core::format::{Cell, CellContext, CellHeader, CellKind};
use vmfs_core::lun::{Lun, LunErrorKind};
use vmfs_core::sim::{Command, Fault, FaultRates, HostNo, MemoryDisk, MemoryLun, PathState, Sim};
use vmfs_core::units::{CellAddress, CellSize, Generation, Link, LunIndex, OpId, Seq, SlotId, SlotRef, Token, Uuid};

const A: HostNo = HostNo(1);
const B: HostNo = HostNo(2);
const CONTEXT: CellContext = CellContext { volume: Uuid([7; 16]), cell_size: CellSize::B512 };
const AT: CellAddress = CellAddress { lun: LunIndex::new(1).unwrap(), offset: 8192 };
const ME: SlotRef = SlotRef { slot: SlotId(3), generation: Generation(1) };

struct Host {
    io: CellIo,
    path: Rc<MemoryLun>,
    lun: Rc<dyn Lun>,
}

fn host(sim: &Sim, disk: &MemoryDisk, number: HostNo) -> Host {
    let path = disk.connect(sim, number);
    path.set_latency(Duration::from_micros(100), Duration::from_millis(2));
    Host { io: CellIo::new(CONTEXT, sim.env(number)), lun: path.clone(), path }
}

fn first_image() -> Cell {
    let header = CellHeader {
        kind: CellKind::Blank,
        address: AT,
        seq: Seq(5),
        op_id: OpId([9; 16]),
        writer: SlotRef::NOBODY,
        owner: None,
        link: Link(0),
        index: 0,
        token: Token(0),
    };
    Cell::encode(&CONTEXT, header, b"first")
}

/// Two hosts that see one LUN with one cell in it.
fn world(seed: u64) -> (Sim, MemoryDisk, Host, Host) {
    let sim = Sim::new(seed);
    let disk = MemoryDisk::new("lun", 1 << 20, Some(CellSize::B512));
    disk.damage(AT.offset, first_image().image());
    let (a, b) = (host(&sim, &disk, A), host(&sim, &disk, B));
    (sim, disk, a, b)
}

impl Host {
    async fn change(&self, payload: &[u8]) -> CasOutcome {
        let expect = self.io.read(&self.lun, AT).await.unwrap();
        self.change_from(&expect, payload).await
    }

    async fn change_from(&self, expect: &Cell, payload: &[u8]) -> CasOutcome {
        let new = self.io.successor(expect, CellChange::payload(expect, payload.to_vec()), ME);
        self.io.cas(&self.lun, expect, new).await.unwrap()
    }
}

fn payload_now(disk: &MemoryDisk) -> Vec<u8> {
    let cell = Cell::decode(&CONTEXT, AT, &disk.peek(AT.offset, 512)).unwrap();
    cell.payload()[..5].to_vec()
}

#[test]
fn a_change_from_the_current_image_is_applied_with_one_command() {
    let (sim, disk, a, _) = world(1);
    sim.block_on(async {
        let expect = a.io.read(&a.lun, AT).await.unwrap();
        disk.start_recording();
        assert!(matches!(a.change_from(&expect, b"mine!").await, CasOutcome::Applied(c) if c.header().seq == Seq(6)));
    });
    let commands: Vec<_> = disk.take_records().into_iter().map(|r| r.command).collect();
    assert_eq!(commands, [Command::CompareAndWrite { wrote: true }]);
    assert_eq!(payload_now(&disk), b"mine!");
}

#[test]
fn a_lost_answer_to_a_change_that_landed_is_applied_and_flushed() {
    let (sim, disk, a, _) = world(2);
    a.path.script(Fault::AnswerLost);
    disk.start_recording();
    assert!(matches!(sim.block_on(a.change(b"mine!")), CasOutcome::Applied(_)));
    assert_eq!(disk.take_records().last().unwrap().command, Command::Flush);
    assert_eq!(payload_now(&disk), b"mine!");
}

#[test]
fn a_command_that_got_lost_is_superseded_by_a_restamp_and_lost() {
    let (sim, disk, a, _) = world(3);
    a.path.script(Fault::CommandLost);
    let CasOutcome::Lost(current) = sim.block_on(a.change(b"mine!")) else { panic!("not lost") };
    assert_eq!(current.header().seq, Seq(6));
    assert_eq!(payload_now(&disk), b"first");
}

#[test]
fn a_command_that_would_land_late_lands_never_once_it_was_declared_lost() {
    for seed in scale::seeds(0, 50) {
        let (sim, disk, a, _) = world(seed);
        a.path.script(Fault::Late(Duration::from_millis(seed * 10)));
        let outcome = sim.block_on(a.change(b"mine!"));
        sim.block_on(sim.sleep(Duration::from_secs(60)));
        match outcome {
            CasOutcome::Applied(_) => assert_eq!(payload_now(&disk), b"mine!"),
            CasOutcome::Lost(_) => assert_eq!(payload_now(&disk), b"first"),
            other => panic!("seed {seed}: {other:?}"),
        }
    }
}

#[test]
fn a_command_that_its_path_repeated_and_that_miscompared_against_itself_is_applied() {
    let (sim, disk, a, _) = world(4);
    a.path.script(Fault::Repeated);
    assert!(matches!(sim.block_on(a.change(b"mine!")), CasOutcome::Applied(_)));
    assert_eq!(payload_now(&disk), b"mine!");
}

#[test]
fn a_change_from_an_image_that_another_host_replaced_is_lost_for_certain() {
    let (sim, disk, a, b) = world(5);
    sim.block_on(async {
        let old = a.io.read(&a.lun, AT).await.unwrap();
        assert!(matches!(b.change(b"their").await, CasOutcome::Applied(_)));
        let CasOutcome::Lost(current) = a.change_from(&old, b"mine!").await else { panic!("not lost") };
        assert_eq!(&current.payload()[..5], b"their");
    });
    assert_eq!(payload_now(&disk), b"their");
}

#[test]
fn a_change_that_landed_unanswered_and_was_changed_by_two_others_is_overtaken_not_lost() {
    let (sim, disk, a, b) = world(6);
    sim.block_on(async {
        let old = a.io.read(&a.lun, AT).await.unwrap();
        let new = a.io.successor(&old, CellChange::payload(&old, b"mine!".to_vec()), ME);
        a.lun.compare_and_write(AT.offset, old.image(), new.image()).await.unwrap();
        b.change(b"their").await;
        b.change(b"again").await;
        let CasOutcome::Overtaken(current) = a.io.cas(&a.lun, &old, new).await.unwrap() else {
            panic!("not overtaken")
        };
        assert_eq!(&current.payload()[..5], b"again");
    });
    assert_eq!(payload_now(&disk), b"again");
}

#[test]
fn a_refused_command_is_not_done() {
    let (sim, disk, a, _) = world(7);
    for kind in [LunErrorKind::NotDone, LunErrorKind::NoSpace, LunErrorKind::Fenced] {
        a.path.script(Fault::NotDone(kind));
        assert!(matches!(sim.block_on(a.change(b"mine!")), CasOutcome::NotDone(error) if error.kind == kind));
    }
    assert_eq!(payload_now(&disk), b"first");
}

#[test]
fn without_a_path_the_result_is_unknown_after_bounded_time() {
    let (sim, disk, a, _) = world(8);
    let expect = sim.block_on(a.io.read(&a.lun, AT)).unwrap();
    disk.set_path(A, PathState::Cut);
    assert!(matches!(sim.block_on(a.change_from(&expect, b"mine!")), CasOutcome::Unknown(_)));
    assert!(sim.now() < 20_000_000_000, "{}", sim.now());
    assert_eq!(payload_now(&disk), b"first");
}

#[test]
fn a_broken_cell_is_reported_and_stays_as_it_is() {
    let (sim, disk, a, _) = world(9);
    disk.damage(AT.offset + 200, &[0xff]);
    let before = disk.peek(AT.offset, 512);
    let error = sim.block_on(a.io.read(&a.lun, AT)).unwrap_err();
    assert_eq!(error.kind(), FsErrorKind::Corrupt);
    assert!(error.to_string().contains("checksum"), "{error}");
    let outcome = sim.block_on(a.io.cas(
        &a.lun,
        &first_image(),
        a.io.successor(&first_image(), CellChange::same(&first_image()), ME),
    ));
    assert_eq!(outcome.unwrap_err().kind(), FsErrorKind::Corrupt);
    assert_eq!(disk.peek(AT.offset, 512), before);
}

#[test]
fn an_image_that_does_not_follow_the_expected_one_is_never_sent() {
    let (sim, disk, a, _) = world(10);
    disk.start_recording();
    let first = first_image();
    let second = a.io.successor(&first, CellChange::same(&first), ME);
    let third = a.io.successor(&second, CellChange::same(&second), ME);
    assert_eq!(sim.block_on(a.io.cas(&a.lun, &first, third)).unwrap_err().kind(), FsErrorKind::Invalid);
    assert!(disk.take_records().is_empty());
}

#[test]
fn many_changes_at_once_each_have_their_own_result() {
    let (sim, disk, a, b) = world(11);
    let cells: Vec<Cell> = (0..4)
        .map(|nth| {
            let address = CellAddress { offset: AT.offset + nth * 512, ..AT };
            let cell = Cell::encode(&CONTEXT, CellHeader { address, ..*first_image().header() }, b"first");
            disk.damage(address.offset, cell.image());
            cell
        })
        .collect();
    sim.block_on(async {
        assert!(matches!(b.io.restamp(&b.lun, &cells[1], ME).await.unwrap(), CasOutcome::Applied(_)));
        a.path.script(Fault::AnswerLost);
        let pairs = cells.iter().map(|c| (c.clone(), a.io.successor(c, CellChange::same(c), ME))).collect();
        let outcomes = a.io.cas_many(&a.lun, pairs).await;
        let applied: Vec<_> = outcomes.iter().map(|o| matches!(o, Ok(CasOutcome::Applied(_)))).collect();
        assert_eq!(applied, [true, false, true, true]);
        assert!(matches!(outcomes[1], Ok(CasOutcome::Lost(_))));
        let read = a.io.read_span(&a.lun, AT, 4).await.unwrap();
        assert!(read.iter().all(|cell| cell.as_ref().is_ok_and(|c| c.header().seq == Seq(6))));
    });
}

/// Hosts count up in one cell through every fault: each Applied counts once, each Lost and NotDone never, so the cell tells
/// whether any result was wrong. Overtaken and Unknown may have counted.
#[test]
fn under_every_fault_results_agree_with_what_is_in_the_cell() {
    for seed in scale::seeds(0, 200) {
        let sim = Sim::new(seed);
        let disk = MemoryDisk::new("lun", 1 << 20, Some(CellSize::B512));
        disk.damage(AT.offset, first_image().image());
        let tasks: Vec<_> = (1..=3)
            .map(|number| {
                let host = host(&sim, &disk, HostNo(number));
                host.path.set_rates(FaultRates::MANY);
                sim.spawn(HostNo(number), async move {
                    let (mut applied, mut doubtful) = (0u32, 0u32);
                    for _ in 0..20 {
                        let Ok(expect) = host.io.read(&host.lun, AT).await else { continue };
                        let count = u32::from_le_bytes(expect.payload()[16..20].try_into().unwrap());
                        let mut payload = expect.payload().to_vec();
                        payload[16..20].copy_from_slice(&(count + 1).to_le_bytes());
                        match host.change_from(&expect, &payload).await {
                            CasOutcome::Applied(_) => applied += 1,
                            CasOutcome::Lost(_) | CasOutcome::NotDone(_) => {}
                            CasOutcome::Overtaken(_) | CasOutcome::Unknown(_) => doubtful += 1,
                        }
                    }
                    (applied, doubtful)
                })
            })
            .collect();
        let (mut applied, mut doubtful) = (0, 0);
        sim.block_on(async {
            for task in tasks {
                let (a, d) = task.join().await.unwrap();
                (applied, doubtful) = (applied + a, doubtful + d);
            }
            sim.sleep(Duration::from_secs(60)).await;
        });
        let cell = Cell::decode(&CONTEXT, AT, &disk.peek(AT.offset, 512)).unwrap();
        let counted = u32::from_le_bytes(cell.payload()[16..20].try_into().unwrap());
        assert!(counted >= applied && counted <= applied + doubtful, "seed {seed}: {applied} {doubtful} {counted}");
        assert!(applied > 10, "seed {seed}: hardly anything was applied");
    }
}
