//! Promises to several initiators that share a unit.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::*;

const ONE: NexusId = NexusId(1);
const TWO: NexusId = NexusId(2);
const LUN: Option<Lun> = Some(Lun(0));

/// A memory disk whose reads and writes end only while the gate is open.
struct GatedDisk {
    disk: MemoryDisk,
    open: Cell<bool>,
    running: Cell<u32>,
}

impl GatedDisk {
    async fn pass(&self) {
        self.running.set(self.running.get() + 1);
        poll_fn(|_| if self.open.get() { Poll::Ready(()) } else { Poll::Pending }).await;
        self.running.set(self.running.get() - 1);
    }
}

impl BlockDevice for GatedDisk {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn identity(&self) -> &Identity {
        self.disk.identity()
    }

    async fn read(&self, position: u64, buffer: &DataBuffer) -> Result<(), StorageError> {
        self.pass().await;
        self.disk.read(position, buffer).await
    }

    async fn write(&self, position: u64, buffer: &DataBuffer, force: bool) -> Result<(), StorageError> {
        self.pass().await;
        self.disk.write(position, buffer, force).await
    }

    async fn flush(&self) -> Result<(), StorageError> {
        self.disk.flush().await
    }

    async fn unmap(&self, ranges: &[ByteRange]) -> Result<(), StorageError> {
        self.disk.unmap(ranges).await
    }

    async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), StorageError> {
        self.disk.write_zeroes(range, may_unmap).await
    }

    async fn block_status(&self, range: ByteRange) -> Result<BlockStatus, StorageError> {
        self.disk.block_status(range).await
    }
}

/// A target with one gated disk (its gate open) and two initiators, whose power on is told.
struct Shared(Target<GatedDisk>);

impl Shared {
    fn new() -> Self {
        let target = Target::new();
        let disk = GatedDisk { disk: MemoryDisk::new(GEOMETRY), open: Cell::new(true), running: Cell::new(0) };
        target.insert(Lun(0), Disk::new(disk, DiskOptions::default()));
        let shared = Self(target);
        for nexus in [ONE, TWO] {
            shared.0.attach(nexus, initiator(nexus.0 as u8), 1);
            assert_eq!(shared.sense(nexus), Some((6, 0x29, 1)));
        }
        shared
    }

    fn disk(&self) -> Rc<Disk<GatedDisk>> {
        self.0.disks().remove(0).1
    }

    fn gate(&self, open: bool) {
        self.disk().device().open.set(open);
    }

    fn run(&self, nexus: NexusId, cdb: &[u8], data: &[u8]) -> Completion {
        let data = DataBuffer::from_bytes(data);
        self.0.execute(&command(nexus, LUN, cdb, &data, &data)).now_or_never().expect("the gate is open")
    }

    fn good(&self, nexus: NexusId, cdb: &[u8], data: &[u8]) {
        let completion = self.run(nexus, cdb, data);
        assert_eq!(completion.status, Status::Good, "{cdb:02x?}: {completion:?}");
    }

    fn conflict(&self, nexus: NexusId, cdb: &[u8], data: &[u8]) {
        assert_eq!(self.run(nexus, cdb, data).status, Status::ReservationConflict, "{cdb:02x?}");
    }

    /// What TEST UNIT READY says.
    fn sense(&self, nexus: NexusId) -> Option<(u8, u8, u8)> {
        let sense = self.run(nexus, &[0; 6], &[]).sense?;
        let bytes = sense.as_bytes();
        Some((bytes[2], bytes[12], bytes[13]))
    }

    fn reserve_out(&self, nexus: NexusId, action: u8, kind: u8, keys: [u64; 2], flags: u8) -> Completion {
        self.run(nexus, &reserve_out_cdb(action, kind), &reserve_out_list(keys, flags))
    }

    fn answer(&self, nexus: NexusId, action: u8) -> Vec<u8> {
        let into = DataBuffer::zeroed(512, 8);
        let cdb = [0x5E, action, 0, 0, 0, 0, 0, 2, 0, 0];
        let none = DataBuffer::empty();
        let completion = self.0.execute(&command(nexus, LUN, &cdb, &none, &into)).now_or_never().unwrap();
        into.slice(0..completion.transferred as usize).to_vec()
    }
}

fn reserve_out_cdb(action: u8, kind: u8) -> [u8; 10] {
    [0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]
}

fn reserve_out_list(keys: [u64; 2], flags: u8) -> Vec<u8> {
    let mut list = [keys[0].to_be_bytes(), keys[1].to_be_bytes(), [0; 8]].concat();
    list[20] = flags;
    list
}

fn poll<F: Future>(future: &mut Pin<&mut F>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn an_abort_is_answered_when_the_storage_has_let_go_of_the_buffer() {
    let shared = Shared::new();
    shared.gate(false);
    let data = DataBuffer::from_bytes(&[9; 512]);
    let cdb = write_10(0, 1);
    let request = Command { tag: 77, ..command(ONE, LUN, &cdb, &data, &data) };
    let mut write = pin!(shared.0.execute(&request));
    assert!(poll(&mut write).is_pending());
    let mut abort = pin!(shared.0.manage(ONE, TaskManagement::AbortTask { lun: LUN, tag: 77 }));
    assert!(poll(&mut abort).is_pending());
    shared.gate(true);
    let Poll::Ready(completion) = poll(&mut write) else { panic!("the gate is open") };
    assert!(completion.aborted);
    assert_eq!(poll(&mut abort), Poll::Ready(TaskManagementResponse::Complete));
    let again = shared.0.manage(ONE, TaskManagement::AbortTask { lun: LUN, tag: 77 }).now_or_never();
    assert_eq!(again, Some(TaskManagementResponse::TaskDoesNotExist));
    let nowhere = shared.0.manage(ONE, TaskManagement::AbortTaskSet { lun: Some(Lun(9)) }).now_or_never();
    assert_eq!(nowhere, Some(TaskManagementResponse::IncorrectLun));
}

#[test]
fn a_command_that_is_aborted_while_it_waits_for_its_data_does_nothing() {
    let shared = Shared::new();
    let task = shared.0.enter(ONE, LUN, 5, TaskAttribute::Simple);
    let query = TaskManagement::QueryTask { lun: LUN, tag: 5 };
    assert_eq!(shared.0.manage(ONE, query).now_or_never(), Some(TaskManagementResponse::Succeeded));
    assert_eq!(task.aborted().now_or_never(), None);
    let abort = TaskManagement::AbortTaskSet { lun: LUN };
    assert_eq!(shared.0.manage(ONE, abort).now_or_never(), Some(TaskManagementResponse::Complete));
    assert!(task.is_aborted());
    let data = DataBuffer::from_bytes(&[9; 512]);
    let completion = shared.0.run(&task, &command(ONE, LUN, &write_10(0, 1), &data, &data)).now_or_never().unwrap();
    assert!(completion.aborted);
    assert_eq!(shared.disk().device().disk.bytes()[..512], [0; 512]);
}

#[test]
fn who_loses_commands_to_another_initiator_is_told_by_attention_or_by_status() {
    for with_status in [false, true] {
        let shared = Shared::new();
        if with_status {
            // MODE SELECT(6), control page with TAS.
            let mut list = vec![0, 0, 0, 0, 0x0A, 0x0A, 0, 0x10, 0, 0x40];
            list.resize(16, 0);
            shared.good(ONE, &[0x15, 0x10, 0, 0, 16, 0], &list);
            assert_eq!(shared.sense(TWO), Some((6, 0x2A, 1)));
        }
        shared.gate(false);
        let data = DataBuffer::from_bytes(&[9; 512]);
        let cdb = read_10(0, 1);
        let request = command(ONE, LUN, &cdb, &data, &data);
        let mut read = pin!(shared.0.execute(&request));
        assert!(poll(&mut read).is_pending());
        let mut clear = pin!(shared.0.manage(TWO, TaskManagement::ClearTaskSet { lun: LUN }));
        assert!(poll(&mut clear).is_pending());
        shared.gate(true);
        let Poll::Ready(completion) = poll(&mut read) else { panic!("the gate is open") };
        assert!(poll(&mut clear).is_ready());
        assert_eq!(completion.aborted, !with_status);
        assert_eq!(completion.status == Status::TaskAborted, with_status);
        assert_eq!(shared.sense(ONE), (!with_status).then_some((6, 0x2F, 0)));
        assert_eq!(shared.sense(TWO), None);
    }
}

#[test]
fn a_unit_reset_ends_simple_reservations_and_keeps_persistent_ones() {
    let shared = Shared::new();
    shared.good(ONE, &[0x16, 0, 0, 0, 0, 0], &[]);
    shared.conflict(TWO, &[0; 6], &[]);
    shared.conflict(TWO, &[0x16, 0, 0, 0, 0, 0], &[]);
    shared.good(TWO, &[0x17, 0, 0, 0, 0, 0], &[]);
    shared.conflict(TWO, &read_10(0, 1), &[0; 512]);
    let reset = TaskManagement::LogicalUnitReset { lun: LUN };
    assert_eq!(shared.0.manage(TWO, reset).now_or_never(), Some(TaskManagementResponse::Complete));
    assert_eq!((shared.sense(ONE), shared.sense(TWO)), (Some((6, 0x29, 3)), Some((6, 0x29, 3))));
    shared.reserve_out(ONE, 0, 0, [0, 1], 0);
    shared.reserve_out(ONE, 1, 1, [1, 0], 0);
    shared.conflict(ONE, &[0x16, 0, 0, 0, 0, 0], &[]);
    assert_eq!(
        shared.0.manage(TWO, TaskManagement::TargetReset).now_or_never(),
        Some(TaskManagementResponse::Complete)
    );
    assert_eq!((shared.sense(ONE), shared.sense(TWO)), (Some((6, 0x29, 3)), Some((6, 0x29, 3))));
    shared.conflict(TWO, &write_10(0, 1), &[0; 512]);
}

#[test]
fn a_lost_nexus_takes_its_simple_reservation_along_and_leaves_its_key() {
    let shared = Shared::new();
    shared.good(ONE, &[0x16, 0, 0, 0, 0, 0], &[]);
    assert_eq!(shared.0.nexus_loss(ONE).now_or_never(), Some(()));
    assert_eq!(shared.sense(TWO), None);
    shared.0.attach(ONE, initiator(1), 1);
    shared.sense(ONE);
    shared.reserve_out(ONE, 0, 0, [0, 1], 0);
    shared.reserve_out(ONE, 1, 3, [1, 0], 0);
    assert_eq!(shared.0.nexus_loss(ONE).now_or_never(), Some(()));
    shared.conflict(TWO, &read_10(0, 1), &[0; 512]);
    // The same port in a new session is the holder again; another session of the host is not.
    let (same, other) = (NexusId(3), NexusId(4));
    shared.0.attach(same, initiator(1), 1);
    let session = TransportId::Iscsi { name: "iqn.host1".into(), isid: Some([9; 6]) };
    shared.0.attach(other, session, 1);
    for nexus in [same, other] {
        assert_eq!(shared.sense(nexus), Some((6, 0x29, 1)));
    }
    shared.good(same, &write_10(0, 1), &[0; 512]);
    shared.conflict(other, &write_10(0, 1), &[0; 512]);
}

#[test]
fn each_type_lets_through_what_the_standard_says() {
    let read = (read_10(0, 1).to_vec(), 512);
    let write = (write_10(0, 1).to_vec(), 512);
    let synchronize = (vec![0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0);
    let inquiry = (vec![0x12, 0, 0, 0, 36, 0], 36);
    // Kind, and whether an unregistered and a registered nexus may read and write.
    for (kind, stranger_reads, member_reads, member_writes) in [
        (1, true, true, false),
        (3, false, false, false),
        (5, true, true, true),
        (6, false, true, true),
        (7, true, true, true),
        (8, false, true, true),
    ] {
        let shared = Shared::new();
        shared.reserve_out(ONE, 0, 0, [0, 1], 0);
        assert_eq!(shared.reserve_out(ONE, 1, kind, [1, 0], 0).status, Status::Good);
        let may = |(cdb, length): &(Vec<u8>, usize)| shared.run(TWO, cdb, &vec![0; *length]).status == Status::Good;
        assert_eq!((may(&read), may(&write), may(&synchronize)), (stranger_reads, false, false), "type {kind}");
        assert!(may(&inquiry) && may(&(vec![0; 6], 0)));
        shared.reserve_out(TWO, 0, 0, [0, 2], 0);
        assert_eq!((may(&read), may(&write)), (member_reads, member_writes), "type {kind}");
        assert_eq!(shared.answer(TWO, 1)[21], kind);
    }
}

#[test]
fn preempt_and_abort_waits_for_the_writes_of_who_is_shut_out() {
    let shared = Shared::new();
    shared.reserve_out(ONE, 0, 0, [0, 1], 0);
    shared.reserve_out(TWO, 0, 0, [0, 2], 0);
    shared.reserve_out(ONE, 1, 7, [1, 0], 0);
    shared.gate(false);
    let data = DataBuffer::from_bytes(&[9; 512]);
    let cdb = write_10(0, 1);
    let request = command(ONE, LUN, &cdb, &data, &data);
    let mut write = pin!(shared.0.execute(&request));
    assert!(poll(&mut write).is_pending());
    let list = DataBuffer::from_bytes(&reserve_out_list([2, 1], 0));
    let cdb = reserve_out_cdb(5, 7);
    let breaker = command(TWO, LUN, &cdb, &list, &list);
    let mut preempt = pin!(shared.0.execute(&breaker));
    assert!(poll(&mut preempt).is_pending());
    // From here on nothing new of the other passes.
    assert_eq!(shared.sense(ONE), Some((6, 0x2A, 5)));
    assert_eq!(shared.sense(ONE), Some((6, 0x2F, 0)));
    shared.conflict(ONE, &write_10(0, 1), &[0; 512]);
    shared.gate(true);
    assert!(matches!(poll(&mut write), Poll::Ready(completion) if completion.aborted));
    assert!(matches!(poll(&mut preempt), Poll::Ready(completion) if completion.status == Status::Good));
    shared.good(TWO, &write_10(0, 1), &[7; 512]);
    assert_eq!(shared.disk().device().disk.bytes()[..512], [7; 512]);
    let keys = shared.answer(TWO, 0);
    assert_eq!(keys[4..], [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2]);
}

/// Keeps records in memory, or fails.
#[derive(Default)]
struct Store {
    records: RefCell<Vec<Vec<u8>>>,
    fails: Cell<bool>,
}

impl ReservationStore for Store {
    fn save<'a>(&'a self, record: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>> {
        Box::pin(async {
            if self.fails.get() {
                return Err(StoreError { source: std::io::Error::other("the store is full") });
            }
            self.records.borrow_mut().push(record.to_vec());
            Ok(())
        })
    }
}

#[test]
fn reservations_with_aptpl_survive_a_restart_and_those_without_do_not() {
    let store = Rc::new(Store::default());
    let shared = Shared::new();
    // Without a store APTPL is refused.
    assert_eq!(shared.reserve_out(ONE, 0, 0, [0, 1], 1).status, Status::CheckCondition);
    shared.0.keep_reservations(Lun(0), store.clone(), None).unwrap();
    shared.reserve_out(ONE, 0, 0, [0, 1], 1);
    shared.reserve_out(ONE, 1, 3, [1, 0], 0);
    assert_eq!(store.records.borrow().len(), 2);
    let saved = store.records.borrow().last().cloned().unwrap();

    let restarted = Shared::new();
    restarted.0.keep_reservations(Lun(0), store.clone(), Some(&saved)).unwrap();
    restarted.conflict(TWO, &read_10(0, 1), &[0; 512]);
    restarted.good(ONE, &write_10(0, 1), &[0; 512]);
    assert_eq!(restarted.answer(ONE, 3), shared.answer(ONE, 3));
    let garbage = Shared::new().0.keep_reservations(Lun(0), store.clone(), Some(b"garbage"));
    assert_eq!(garbage, Err(RestoreError::NotARecord { length: 7 }));

    // Registering without APTPL takes the record away.
    restarted.reserve_out(ONE, 0, 0, [1, 5], 0);
    let saved = store.records.borrow().last().cloned().unwrap();
    let again = Shared::new();
    again.0.keep_reservations(Lun(0), store, Some(&saved)).unwrap();
    again.good(TWO, &write_10(0, 1), &[0; 512]);
}

#[test]
fn a_change_that_cannot_be_saved_is_refused_and_changes_nothing() {
    let store = Rc::new(Store::default());
    let shared = Shared::new();
    shared.0.keep_reservations(Lun(0), store.clone(), None).unwrap();
    shared.reserve_out(ONE, 0, 0, [0, 1], 1);
    store.fails.set(true);
    let completion = shared.reserve_out(ONE, 1, 3, [1, 0], 0);
    assert_eq!(completion.sense.unwrap().as_bytes()[2], 4);
    assert_eq!(shared.answer(ONE, 1).len(), 8);
    shared.good(TWO, &write_10(0, 1), &[0; 512]);
}

#[test]
fn a_compare_and_write_is_not_seen_half_done_by_another_initiator() {
    let shared = Shared::new();
    shared.gate(false);
    let swap = DataBuffer::from_bytes(&[[0u8; 512], [9u8; 512]].concat());
    let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];
    let (first, second) = (command(ONE, LUN, &cdb, &swap, &swap), command(TWO, LUN, &cdb, &swap, &swap));
    let mut first = pin!(shared.0.execute(&first));
    let mut second = pin!(shared.0.execute(&second));
    assert!(poll(&mut first).is_pending() && poll(&mut second).is_pending());
    assert_eq!(shared.disk().device().running.get(), 1);
    shared.gate(true);
    assert!(matches!(poll(&mut first), Poll::Ready(completion) if completion.status == Status::Good));
    assert!(matches!(poll(&mut second), Poll::Ready(completion) if completion.status == Status::CheckCondition));
}
