//! Promises of the device server as a transport sees them.

use futures_util::FutureExt;
use proptest::prelude::*;

use crate::testing::{GEOMETRY, MemoryDisk};
use crate::*;

mod corpora;
mod mutation;
mod nexuses;
mod units;

const NEXUS: NexusId = NexusId(1);

/// An iSCSI initiator port.
fn initiator(number: u8) -> TransportId {
    TransportId::Iscsi { name: format!("iqn.host{number}"), isid: Some([number; 6]) }
}

/// A simple command that is refused if its buffer is too short.
fn command<'a>(
    nexus: NexusId,
    lun: Option<Lun>,
    cdb: &'a [u8],
    data_out: &'a DataBuffer,
    data_in: &'a DataBuffer,
) -> Command<'a> {
    let (attribute, short_buffer) = (TaskAttribute::Simple, ShortBuffer::Refuse);
    Command { nexus, lun, tag: 0, attribute, short_buffer, cdb, data_out, data_in }
}

/// A target with one disk at LUN 0, its power-on attention already reported.
struct Fixture(Target<MemoryDisk>);

impl Fixture {
    fn new() -> Self {
        Self::with(GEOMETRY)
    }

    fn with(geometry: Geometry) -> Self {
        let target = Target::new();
        target.insert(Lun(0), Disk::new(MemoryDisk::new(geometry), DiskOptions::default()));
        target.attach(NEXUS, initiator(1), 1);
        let fixture = Self(target);
        assert_eq!(fixture.check(&[0; 6]), (6, 0x29, 0x01));
        fixture
    }

    fn disk(&self) -> DiskRef {
        DiskRef(self.0.disks().remove(0).1)
    }

    fn run(&self, lun: Lun, cdb: &[u8], out: &DataBuffer, into: &DataBuffer) -> Completion {
        self.0.execute(&command(NEXUS, Some(lun), cdb, out, into)).now_or_never().expect("a memory disk never waits")
    }

    /// A command with data to the initiator: what came of `room` bytes.
    fn input(&self, cdb: &[u8], room: usize) -> Vec<u8> {
        let into = DataBuffer::zeroed(room, 8);
        let completion = self.run(Lun(0), cdb, &DataBuffer::empty(), &into);
        assert_eq!((completion.status, completion.overrun), (Status::Good, false), "{completion:?}");
        into.slice(0..completion.transferred as usize).to_vec()
    }

    /// A command with data from the initiator.
    fn output(&self, cdb: &[u8], data: &[u8]) -> Completion {
        self.run(Lun(0), cdb, &DataBuffer::from_bytes(data), &DataBuffer::empty())
    }

    /// Key, code and qualifier of a command that must fail, with a buffer for both directions.
    fn check_with(&self, cdb: &[u8], data: &[u8]) -> (u8, u8, u8) {
        let buffer = DataBuffer::from_bytes(data);
        let completion = self.run(Lun(0), cdb, &buffer, &buffer);
        assert_eq!((completion.status, completion.transferred), (Status::CheckCondition, 0), "{completion:?}");
        let sense = completion.sense.unwrap();
        let bytes = sense.as_bytes();
        match bytes[0] & 0x7F {
            0x70 => (bytes[2], bytes[12], bytes[13]),
            _ => (bytes[1], bytes[2], bytes[3]),
        }
    }

    fn check(&self, cdb: &[u8]) -> (u8, u8, u8) {
        self.check_with(cdb, &[])
    }
}

/// The storage of the fixture's disk.
struct DiskRef(std::rc::Rc<Disk<MemoryDisk>>);

impl std::ops::Deref for DiskRef {
    type Target = MemoryDisk;

    fn deref(&self) -> &MemoryDisk {
        self.0.device()
    }
}

fn write_10(lba: u32, blocks: u16) -> [u8; 10] {
    let [a, b, c, d] = lba.to_be_bytes();
    let [high, low] = blocks.to_be_bytes();
    [0x2A, 0, a, b, c, d, 0, high, low, 0]
}

fn read_10(lba: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = write_10(lba, blocks);
    cdb[0] = 0x28;
    cdb
}

#[test]
fn what_was_written_is_read_back_by_every_form() {
    let fixture = Fixture::new();
    let data: Vec<u8> = (0..1024u32).map(|index| (index * 7) as u8).collect();
    let completion = fixture.output(&write_10(3, 2), &data);
    assert_eq!((completion.status, completion.transferred), (Status::Good, 1024));
    assert_eq!(fixture.input(&[0x08, 0, 0, 3, 2, 0], 1024), data);
    assert_eq!(fixture.input(&read_10(3, 2), 1024), data);
    assert_eq!(fixture.input(&[0xA8, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0], 1024), data);
    assert_eq!(fixture.input(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0], 1024), data);
}

#[test]
fn a_buffer_longer_than_the_transfer_leaves_a_residual() {
    let fixture = Fixture::new();
    assert_eq!(fixture.input(&read_10(0, 1), 4096).len(), 512);
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 255, 0], 255).len(), 96);
    assert_eq!(fixture.input(&[0x12, 1, 0x80, 0, 255, 0], 255).len(), 4 + 32);
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 5, 0], 255).len(), 5);
}

#[test]
fn a_buffer_shorter_than_the_transfer_is_an_overrun_and_nothing_is_done() {
    let fixture = Fixture::new();
    let completion = fixture.output(&write_10(0, 2), &[0xFF; 1023]);
    assert!(completion.overrun);
    assert_eq!(completion.transferred, 0);
    assert_eq!(fixture.disk().bytes(), vec![0; 256 * 512]);
}

#[test]
fn blocks_beyond_the_capacity_are_refused() {
    let fixture = Fixture::new();
    let buffer = vec![0; 1024];
    assert_eq!(fixture.check_with(&read_10(255, 2), &buffer), (5, 0x21, 0));
    assert_eq!(fixture.check_with(&read_10(257, 0), &buffer), (5, 0x21, 0));
    assert_eq!(fixture.input(&read_10(256, 0), 0), []);
    let wrapping = [0x88, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0];
    assert_eq!(fixture.check_with(&wrapping, &buffer), (5, 0x21, 0));
}

#[test]
fn capacity_is_told_in_both_forms() {
    let fixture = Fixture::new();
    assert_eq!(fixture.input(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), [0, 0, 0, 255, 0, 0, 2, 0]);
    let long = fixture.input(&[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
    assert_eq!(long[..16], [0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 2, 0, 0, 3, 0xC0, 0]);
}

#[test]
fn forced_unit_access_and_a_disabled_cache_both_make_writes_durable() {
    let fixture = Fixture::new();
    fixture.output(&write_10(0, 1), &[1; 512]);
    assert_eq!(fixture.disk().forced_writes(), 0);
    let mut forced = write_10(0, 1);
    forced[1] = 8;
    fixture.output(&forced, &[1; 512]);
    assert_eq!(fixture.disk().forced_writes(), 1);
    // MODE SELECT(6), caching page with WCE 0.
    let mut list = vec![0, 0, 0, 0, 8, 0x12];
    list.resize(24, 0);
    assert_eq!(fixture.output(&[0x15, 0x10, 0, 0, 24, 0], &list).status, Status::Good);
    fixture.output(&write_10(0, 1), &[1; 512]);
    assert_eq!(fixture.disk().forced_writes(), 2);
    assert_eq!(fixture.input(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0), []);
    assert_eq!(fixture.disk().flushes(), 1);
}

#[test]
fn mode_select_by_one_nexus_is_told_to_the_others_only() {
    let fixture = Fixture::new();
    let other = NexusId(2);
    fixture.0.attach(other, initiator(2), 1);
    let run = |cdb: &[u8]| {
        let none = DataBuffer::empty();
        fixture.0.execute(&command(other, Some(Lun(0)), cdb, &none, &none)).now_or_never().unwrap()
    };
    assert_eq!(run(&[0; 6]).status, Status::CheckCondition);
    let mut list = vec![0, 0, 0, 0, 8, 0x12];
    list.resize(24, 0);
    fixture.output(&[0x15, 0x10, 0, 0, 24, 0], &list);
    assert_eq!(fixture.run(Lun(0), &[0; 6], &DataBuffer::empty(), &DataBuffer::empty()).status, Status::Good);
    assert_eq!(&run(&[0; 6]).sense.unwrap().as_bytes()[12..14], &[0x2A, 1]);
    assert_eq!(run(&[0; 6]).status, Status::Good);
}

#[test]
fn a_write_protected_disk_takes_no_write_of_any_kind() {
    let fixture = Fixture::with(Geometry { read_only: true, ..GEOMETRY });
    let data = vec![0; 1024];
    assert_eq!(fixture.check_with(&write_10(0, 1), &data), (7, 0x27, 0));
    assert_eq!(fixture.check_with(&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &data), (7, 0x27, 0));
    assert_eq!(fixture.check_with(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &data), (7, 0x27, 0));
    assert_eq!(fixture.check_with(&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], &data), (7, 0x27, 0));
    assert_eq!(fixture.input(&[0x1A, 8, 8, 0, 255, 0], 255)[2], 0x90);
}

#[test]
fn descriptor_sense_is_used_when_the_control_page_asks_for_it() {
    let fixture = Fixture::new();
    let mut list = vec![0, 0, 0, 0, 0x0A, 0x0A, 4, 0x10];
    list.resize(16, 0);
    assert_eq!(fixture.output(&[0x15, 0x10, 0, 0, 16, 0], &list).status, Status::Good);
    let completion = fixture.output(&read_10(1000, 1), &[0; 512]);
    assert_eq!(completion.sense.unwrap().as_bytes()[..8], [0x72, 5, 0x21, 0, 0, 0, 0, 12]);
}

#[test]
fn unmap_checks_the_whole_list_before_it_gives_anything_back() {
    let fixture = Fixture::new();
    fixture.output(&write_10(0, 4), &[5; 2048]);
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    list.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    list.extend_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0];
    assert_eq!(fixture.check_with(&cdb, &list), (5, 0x21, 0));
    assert_eq!(fixture.disk().bytes()[..2048], [5; 2048]);
    list[30] = 0;
    assert_eq!(fixture.output(&cdb, &list).transferred, 40);
    assert_eq!(fixture.disk().bytes()[..1024], [0; 1024]);
    assert_eq!(fixture.disk().bytes()[1024..2048], [5; 1024]);
}

#[test]
fn unmap_limits_are_those_that_were_announced() {
    let fixture = Fixture::new();
    let mut list = vec![0; 8 + 257 * 16];
    list[2..4].copy_from_slice(&(257u16 * 16).to_be_bytes());
    let [high, low] = (list.len() as u16).to_be_bytes();
    assert_eq!(fixture.check_with(&[0x42, 0, 0, 0, 0, 0, 0, high, low, 0], &list), (5, 0x26, 0));
    assert_eq!(fixture.check_with(&[0x42, 0, 0, 0, 0, 0, 0, 0, 7, 0], &list), (5, 0x1A, 0));
    let thick = Fixture::with(Geometry { thin: false, ..GEOMETRY });
    assert_eq!(thick.check_with(&[0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0], &list), (5, 0x20, 0));
}

#[test]
fn write_same_repeats_its_block_or_writes_zeros() {
    let fixture = Fixture::new();
    let pattern: Vec<u8> = (0..512u32).map(|index| index as u8 | 1).collect();
    let completion = fixture.output(&[0x41, 0, 0, 0, 0, 1, 0, 0, 3, 0], &pattern);
    assert_eq!((completion.status, completion.transferred), (Status::Good, 512));
    assert_eq!(fixture.disk().bytes()[512..2048], pattern.repeat(3));
    // WRITE SAME(16) with UNMAP and NDOB: no data at all.
    let cdb = [0x93, 0x09, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0];
    assert_eq!(fixture.output(&cdb, &[]).status, Status::Good);
    assert_eq!(fixture.disk().bytes()[1024..1536], [0; 512]);
    // No count: it would go on to the end.
    assert_eq!(fixture.check_with(&[0x41, 0, 0, 0, 0, 1, 0, 0, 0, 0], &pattern), (5, 0x24, 0));
    assert_eq!(fixture.check_with(&[0x41, 0, 0, 0, 1, 1, 0, 0, 0, 0], &pattern), (5, 0x21, 0));
}

#[test]
fn lba_status_tells_runs() {
    let fixture = Fixture::new();
    fixture.output(&write_10(8, 8), &[1; 4096]);
    let answer = fixture.input(&[0x9E, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 56, 0, 0], 56);
    assert_eq!(answer[..4], [0, 0, 0, 52]);
    let run = |index: usize| (answer[8 + index * 16 + 7], answer[8 + index * 16 + 11], answer[8 + index * 16 + 12]);
    assert_eq!([run(0), run(1), run(2)], [(0, 8, 1), (8, 8, 0), (16, 240, 1)]);
    assert_eq!(fixture.check(&[0x9E, 0x12, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 56, 0, 0]), (5, 0x21, 0));
}

#[test]
fn compare_and_write_writes_only_after_a_match() {
    let fixture = Fixture::new();
    let cdb = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0];
    let swap = [[0u8; 512], [9u8; 512]].concat();
    let completion = fixture.output(&cdb, &swap);
    assert_eq!((completion.status, completion.transferred), (Status::Good, 1024));
    let completion = fixture.output(&cdb, &swap);
    // Miscompare at byte 0.
    assert_eq!(completion.sense.unwrap().as_bytes()[..14], [0xF0, 0, 0xE, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x1D, 0]);
    assert_eq!(fixture.disk().bytes()[7 * 512..8 * 512], [9; 512]);
    let many = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 129, 0, 0];
    assert_eq!(fixture.check_with(&many, &swap), (5, 0x24, 0));
}

#[test]
fn verify_tells_where_the_first_difference_is() {
    let fixture = Fixture::new();
    fixture.output(&write_10(0, 2), &[3; 1024]);
    assert_eq!(fixture.output(&[0x2F, 2, 0, 0, 0, 0, 0, 0, 2, 0], &[3; 1024]).transferred, 1024);
    assert_eq!(fixture.output(&[0x2F, 6, 0, 0, 0, 0, 0, 0, 2, 0], &[3; 512]).transferred, 512);
    assert_eq!(fixture.output(&[0x2F, 0, 0, 0, 0, 0, 0, 0, 2, 0], &[]).status, Status::Good);
    let mut other = [3; 1024];
    other[700] = 4;
    let sense = fixture.output(&[0x2F, 2, 0, 0, 0, 0, 0, 0, 2, 0], &other).sense.unwrap();
    assert_eq!((sense.as_bytes()[2], &sense.as_bytes()[3..7]), (0xE, &700u32.to_be_bytes()[..]));
    assert_eq!(fixture.output(&[0x2E, 2, 0, 0, 0, 4, 0, 0, 1, 0], &[8; 512]).transferred, 512);
}

#[test]
fn storage_errors_become_the_sense_of_the_table() {
    let fixture = Fixture::new();
    let data = vec![0; 512];
    let cases = [
        (StorageError::OutOfSpace { position: 0 }, (7, 0x27, 7), (7, 0x27, 7)),
        (StorageError::Medium { position: 0, errno: 5 }, (3, 0x11, 0), (3, 0x0C, 2)),
        (StorageError::LockLost, (4, 0x3E, 1), (4, 0x3E, 1)),
        (StorageError::NotReady, (2, 4, 1), (2, 4, 1)),
    ];
    for (error, reading, writing) in cases {
        fixture.disk().fail_with(Some(error));
        assert_eq!(fixture.check_with(&read_10(0, 1), &data), reading);
        assert_eq!(fixture.check_with(&write_10(0, 1), &data), writing);
    }
    fixture.disk().fail_with(Some(StorageError::Frozen));
    assert_eq!(fixture.output(&write_10(0, 1), &data).status, Status::Busy);
}

#[test]
fn a_stopped_disk_moves_no_data_until_it_is_started() {
    let fixture = Fixture::new();
    assert_eq!(fixture.output(&[0x1B, 0, 0, 0, 0, 0], &[]).status, Status::Good);
    assert_eq!(fixture.disk().flushes(), 1);
    assert_eq!(fixture.check(&[0; 6]), (2, 4, 2));
    assert_eq!(fixture.check_with(&read_10(0, 1), &[0; 512]), (2, 4, 2));
    assert_eq!(fixture.input(&[3, 0, 0, 0, 18, 0], 18)[12..14], [4, 2]);
    assert_eq!(fixture.output(&[0x1B, 0, 0, 0, 1, 0], &[]).status, Status::Good);
    assert_eq!(fixture.input(&read_10(0, 1), 512).len(), 512);
}

#[test]
fn an_absent_lun_answers_inquiry_request_sense_and_report_luns_only() {
    let fixture = Fixture::new();
    let into = DataBuffer::zeroed(255, 8);
    let run = |cdb: &[u8]| fixture.run(Lun(3), cdb, &DataBuffer::empty(), &into);
    assert_eq!(run(&[0x12, 0, 0, 0, 36, 0]).transferred, 36);
    assert_eq!(into.to_vec()[0], 0x7F);
    assert_eq!(run(&[3, 0, 0, 0, 18, 0]).status, Status::Good);
    assert_eq!(into.to_vec()[12], 0x25);
    assert_eq!(run(&[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0]).transferred, 16);
    assert_eq!(run(&[0; 6]).sense.unwrap().as_bytes()[12..14], [0x25, 0]);
    assert_eq!(run(&read_10(0, 1)).sense.unwrap().as_bytes()[12..14], [0x25, 0]);
}

#[test]
fn report_luns_lists_units_and_inquiry_bypasses_attentions() {
    let target = Target::new();
    for lun in [7, 0] {
        target.insert(Lun(lun), Disk::new(MemoryDisk::new(GEOMETRY), DiskOptions::default()));
    }
    target.attach(NEXUS, initiator(1), 1);
    let fixture = Fixture(target);
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
    let luns = fixture.input(&[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
    assert_eq!(luns, [0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fixture.check(&[0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0]), (5, 0x24, 0));
    // REQUEST SENSE takes the attention that is still pending.
    assert_eq!(fixture.input(&[3, 0, 0, 0, 18, 0], 18)[12..14], [0x29, 1]);
    assert_eq!(fixture.input(&[0; 6], 0), []);
}

#[test]
fn a_reset_restores_mode_parameters_and_is_reported() {
    let fixture = Fixture::new();
    let mut list = vec![0, 0, 0, 0, 8, 0x12];
    list.resize(24, 0);
    fixture.output(&[0x15, 0x10, 0, 0, 24, 0], &list);
    fixture.0.reset(UnitAttention::BusReset);
    assert_eq!(fixture.check(&[0; 6]), (6, 0x29, 2));
    assert_eq!(fixture.input(&[0x1A, 8, 8, 0, 255, 0], 255)[6], 4);
}

#[test]
fn supported_operation_codes_are_told_one_by_one_and_all_together() {
    let fixture = Fixture::new();
    let one = fixture.input(&[0xA3, 0x0C, 1, 0x93, 0, 0, 0, 0, 1, 0, 0, 0], 256);
    assert_eq!(one[..6], [0, 3, 0, 16, 0x93, 0x19]);
    assert_eq!(fixture.input(&[0xA3, 0x0C, 1, 0xA2, 0, 0, 0, 0, 1, 0, 0, 0], 256), [0, 1, 0, 0]);
    let action = fixture.input(&[0xA3, 0x0C, 0x82, 0x9E, 0, 0x10, 0, 0, 1, 0, 0, 0], 256);
    assert_eq!((action.len(), action[1]), (4 + 16 + 12, 0x83));
    assert_eq!(fixture.check(&[0xA3, 0x0C, 1, 0x9E, 0, 0, 0, 0, 1, 0, 0, 0]), (5, 0x24, 0));
    let all = fixture.input(&[0xA3, 0x0C, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0], 4096);
    assert_eq!(u32::from_be_bytes([all[0], all[1], all[2], all[3]]) as usize + 4, all.len());
    let ours = cdb::OPERATIONS.iter().filter(|one| one.is_for(DeviceKind::Disk) && one.opcode() != 0x9C).count();
    assert_eq!(all.len(), 4 + ours * 8);
}

/// A CDB that is likely to be accepted: an operation of the table with only bits that it evaluates, most high bytes 0.
fn plausible_cdb() -> impl Strategy<Value = Vec<u8>> {
    let operation = (0..cdb::OPERATIONS.len()).prop_map(|index| cdb::OPERATIONS[index]);
    (operation, prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..8, 1 => any::<u8>()], 16)).prop_map(
        |(operation, random)| {
            let mut cdb: Vec<u8> = operation.usage.iter().zip(random).map(|(usage, byte)| usage & byte).collect();
            cdb[0] = operation.opcode();
            cdb[1] = operation.service_action.unwrap_or(cdb[1]);
            cdb
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn no_command_panics_or_moves_more_than_its_buffer(
        commands in prop::collection::vec(
            (
                prop_oneof![4 => plausible_cdb(), 1 => prop::collection::vec(any::<u8>(), 0..20)],
                prop::collection::vec(prop_oneof![3 => Just(0u8), 2 => 0u8..20, 1 => any::<u8>()], 0..1100),
            ),
            1..6,
        ),
        large: bool,
        truncate: bool,
        cd_rom: bool,
    ) {
        let geometry = Geometry { logical_block: if large { 4096 } else { 512 }, ..GEOMETRY };
        let target = Target::new();
        let kind = if cd_rom { DeviceKind::CdRom } else { DeviceKind::Disk };
        target.insert(Lun(0), Disk::new(MemoryDisk::new(geometry), DiskOptions { kind, ..DiskOptions::default() }));
        target.attach(NEXUS, initiator(1), 1);
        let none = DataBuffer::empty();
        target.execute(&command(NEXUS, Some(Lun(0)), &[0; 6], &none, &none)).now_or_never();
        let short_buffer = if truncate { ShortBuffer::Truncate } else { ShortBuffer::Refuse };
        for (cdb, data) in commands {
            let buffer = DataBuffer::from_bytes(&data);
            let request = Command { short_buffer, ..command(NEXUS, Some(Lun(0)), &cdb, &buffer, &buffer) };
            let completion = target.execute(&request).now_or_never().expect("a memory disk never waits");
            prop_assert!(completion.transferred <= data.len() as u64);
            prop_assert_eq!(completion.status == Status::CheckCondition, completion.sense.is_some());
        }
    }
}
