//! Promises of units of other kinds, and of the commands that work across units.

use super::*;

/// A target with two disks of which the second has another name.
pub(super) fn two_disks() -> Fixture {
    let fixture = Fixture::new();
    let other = Identity { serial: "other".into(), naa: *b"\x60\x00\xC2\x9Ftest-disk-01" };
    let disk = MemoryDisk::with_identity(GEOMETRY, other);
    fixture.0.insert(Lun(1), Disk::new(disk, DiskOptions::default()));
    assert_eq!(fixture.check(&[0; 6]), (6, 0x3F, 0x0E));
    fixture
}

/// An EXTENDED COPY list: one segment of `blocks` blocks between the targets with these NAA designators.
fn copy_list(targets: [&[u8; 16]; 2], blocks: u16, from: u64, to: u64) -> Vec<u8> {
    let mut list = vec![1, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    for naa in targets {
        list.extend_from_slice(&[0xE4, 0, 0, 0, 1, 3, 0, 16]);
        list.extend_from_slice(naa);
        list.extend_from_slice(&[0, 0, 0, 0, 0, 0, 2, 0]);
    }
    list.extend_from_slice(&[0x02, 0, 0, 24, 0, 0, 0, 1, 0, 0]);
    list.extend_from_slice(&blocks.to_be_bytes());
    list.extend_from_slice(&from.to_be_bytes());
    list.extend_from_slice(&to.to_be_bytes());
    list
}

pub(super) fn copy_cdb(length: usize) -> Vec<u8> {
    let mut cdb = vec![0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    cdb.extend_from_slice(&(length as u32).to_be_bytes());
    cdb.extend_from_slice(&[0, 0]);
    cdb
}

const NAA: &[u8; 16] = b"\x60\x00\xC2\x9Ftest-disk-00";
const OTHER: &[u8; 16] = b"\x60\x00\xC2\x9Ftest-disk-01";

#[test]
fn blocks_are_copied_from_one_unit_to_another() {
    let fixture = two_disks();
    let data: Vec<u8> = (0..1024u32).map(|index| index as u8 | 1).collect();
    fixture.output(&write_10(4, 2), &data);
    let status = [0x84, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    assert_eq!(fixture.check(&status), (5, 0x24, 0));
    let list = copy_list([NAA, OTHER], 2, 4, 9);
    assert_eq!(fixture.output(&copy_cdb(list.len()), &list).status, Status::Good);
    let other = fixture.0.disks().remove(1).1;
    assert_eq!(other.device().bytes()[9 * 512..11 * 512], data);
    assert_eq!(fixture.input(&status, 64), [0, 0, 0, 8, 1, 0, 1, 0, 0, 0, 4, 0]);
}

#[test]
fn overlapping_blocks_are_copied_as_if_they_were_read_first() {
    let fixture = Fixture::new();
    let data: Vec<u8> = (0..8u8).flat_map(|block| [block; 512]).collect();
    fixture.output(&write_10(0, 8), &data);
    let list = copy_list([NAA, NAA], 6, 0, 2);
    assert_eq!(fixture.output(&copy_cdb(list.len()), &list).status, Status::Good);
    assert_eq!(fixture.disk().bytes()[1024..8 * 512], data[..6 * 512]);
}

#[test]
fn a_copy_that_is_wrong_in_any_part_copies_nothing() {
    let fixture = two_disks();
    fixture.output(&write_10(0, 2), &[5; 1024]);
    let refuse = |list: &[u8]| fixture.check_with(&copy_cdb(list.len()), list);
    let right = copy_list([NAA, OTHER], 2, 0, 0);
    assert_eq!(refuse(&copy_list([NAA, b"\x60\x00\xC2\x9Ftest-disk-02"], 2, 0, 0)), (0xA, 0x0D, 2));
    assert_eq!(refuse(&copy_list([NAA, OTHER], 2, 0, 255)), (0xA, 0, 0));
    assert_eq!(refuse(&right[..right.len() - 1]), (5, 0x1A, 0));
    let mut wrong = right.clone();
    wrong[16] = 0xE0;
    assert_eq!(refuse(&wrong), (5, 0x26, 7));
    let mut wrong = right.clone();
    wrong[80] = 0x03;
    assert_eq!(refuse(&wrong), (5, 0x26, 9));
    let mut inline = right;
    inline[15] = 1;
    assert_eq!(refuse(&inline), (5, 0x26, 0x0B));
    assert_eq!(fixture.0.disks().remove(1).1.device().bytes(), vec![0; 256 * 512]);
}

#[test]
fn what_the_buffer_does_not_take_is_counted_and_the_rest_is_done() {
    let fixture = Fixture::new();
    let run = |cdb: &[u8], out: &DataBuffer, into: &DataBuffer| {
        let request = Command { short_buffer: ShortBuffer::Truncate, ..command(NEXUS, Some(Lun(0)), cdb, out, into) };
        fixture.0.execute(&request).now_or_never().unwrap()
    };
    let none = DataBuffer::empty();
    let completion = run(&write_10(0, 2), &DataBuffer::from_bytes(&[3; 700]), &none);
    assert_eq!((completion.status, completion.transferred, completion.overflow), (Status::Good, 700, 324));
    assert_eq!(fixture.disk().bytes()[..1024], [[3; 512], [0; 512]].concat());
    let into = DataBuffer::zeroed(600, 8);
    let completion = run(&read_10(0, 2), &none, &into);
    assert_eq!((completion.status, completion.transferred, completion.overflow), (Status::Good, 600, 424));
    assert_eq!(into.to_vec(), [vec![3; 512], vec![0; 88]].concat());
    let completion = run(&[0x12, 0, 0, 0, 36, 0], &none, &DataBuffer::zeroed(10, 8));
    assert_eq!((completion.transferred, completion.overflow), (10, 26));
    // What cannot be done in part is refused, and so is a block too many.
    for length in [256, 1024] {
        let completion = run(&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &DataBuffer::from_bytes(&vec![9; length]), &none);
        assert_eq!(completion.status, Status::CheckCondition);
    }
    assert_eq!(fixture.disk().bytes()[..512], [3; 512]);
}

#[test]
fn or_write_sets_bits_and_clears_none() {
    let fixture = Fixture::new();
    fixture.output(&write_10(1, 1), &[0x0F; 512]);
    let cdb = [0x8B, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0];
    assert_eq!(fixture.output(&cdb, &[0xA0; 512]).transferred, 512);
    assert_eq!(fixture.disk().bytes()[512..1024], [0xAF; 512]);
}

#[test]
fn an_atomic_write_is_offered_by_devices_that_promise_it_only() {
    let cdb = [0x9C, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0];
    let limits = [0x12, 1, 0xB0, 0, 64, 0];
    let fixture = Fixture::new();
    assert_eq!(fixture.check_with(&cdb, &[1; 4096]), (5, 0x20, 0));
    assert_eq!(fixture.input(&limits, 64)[44..48], [0; 4]);
    fixture.disk().promise_atomic_writes(4096);
    assert_eq!(fixture.output(&cdb, &[1; 4096]).status, Status::Good);
    assert_eq!(fixture.input(&limits, 64)[44..48], 8u32.to_be_bytes());
    let mut longer = cdb;
    longer[13] = 9;
    assert_eq!(fixture.check_with(&longer, &[1; 4608]), (5, 0x24, 0));
}

fn removable() -> Fixture {
    let target = Target::new();
    let options = DiskOptions { removable: true, ..DiskOptions::default() };
    target.insert(Lun(0), Disk::new(MemoryDisk::new(GEOMETRY), options));
    target.attach(NEXUS, initiator(1), 1);
    let fixture = Fixture(target);
    fixture.check(&[0; 6]);
    fixture
}

#[test]
fn a_medium_is_ejected_unless_an_initiator_that_is_still_there_forbids_it() {
    let fixture = removable();
    let (eject, load) = ([0x1B, 0, 0, 0, 2, 0], [0x1B, 0, 0, 0, 3, 0]);
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 36, 0], 36)[1], 0x80);
    let other = NexusId(2);
    fixture.0.attach(other, initiator(2), 1);
    let none = DataBuffer::empty();
    let by_other =
        |cdb: &[u8]| fixture.0.execute(&command(other, Some(Lun(0)), cdb, &none, &none)).now_or_never().unwrap();
    by_other(&[0; 6]);
    assert_eq!(by_other(&[0x1E, 0, 0, 0, 1, 0]).status, Status::Good);
    assert_eq!(fixture.check(&eject), (5, 0x53, 2));
    assert_eq!(fixture.0.nexus_loss(other).now_or_never(), Some(()));
    assert_eq!(fixture.output(&eject, &[]).status, Status::Good);
    assert_eq!(fixture.check(&[0; 6]), (2, 0x3A, 2));
    assert_eq!(fixture.check_with(&read_10(0, 1), &[0; 512]), (2, 0x3A, 2));
    assert_eq!(fixture.check(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), (2, 0x3A, 2));
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
    // What forbids removal forbids loading.
    assert_eq!(fixture.output(&[0x1E, 0, 0, 0, 1, 0], &[]).status, Status::Good);
    assert_eq!(fixture.check(&load), (5, 0x53, 2));
    assert_eq!(fixture.output(&[0x1E, 0, 0, 0, 0, 0], &[]).status, Status::Good);
    assert_eq!(fixture.output(&load, &[]).status, Status::Good);
    assert_eq!(fixture.input(&read_10(0, 1), 512).len(), 512);
    // To stop the motor neither moves the medium nor keeps it from being used.
    assert_eq!(fixture.output(&[0x1B, 0, 0, 0, 0, 0], &[]).status, Status::Good);
    assert_eq!(fixture.input(&[0; 6], 0), []);
    // A power condition does not move the medium.
    assert_eq!(fixture.output(&[0x1B, 0, 0, 0, 0x32, 0], &[]).status, Status::Good);
    assert_eq!(fixture.input(&[0; 6], 0), []);
}

#[test]
fn a_cd_rom_has_its_own_commands_and_takes_no_writes() {
    let geometry = Geometry { logical_block: 2048, blocks: 64, read_only: true, thin: false, ..GEOMETRY };
    let target = Target::new();
    let options = DiskOptions { kind: DeviceKind::CdRom, ..DiskOptions::default() };
    target.insert(Lun(0), Disk::new(MemoryDisk::new(geometry), options));
    target.attach(NEXUS, initiator(1), 1);
    let fixture = Fixture(target);
    fixture.check(&[0; 6]);
    assert_eq!(fixture.input(&[0x12, 0, 0, 0, 36, 0], 36)[..2], [5, 0x80]);
    assert_eq!(fixture.input(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8), [0, 0, 0, 63, 0, 0, 8, 0]);
    let contents = fixture.input(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0], 64);
    assert_eq!(contents, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0, 0, 0, 0, 64]);
    assert_eq!(fixture.input(&[0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], 8), [0, 6, 4, 0x10, 0, 2, 0, 0]);
    assert_eq!(fixture.input(&[0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0], 8)[7], 8);
    assert_eq!(fixture.input(&read_10(1, 1), 2048).len(), 2048);
    assert_eq!(fixture.check_with(&write_10(1, 1), &[0; 2048]), (5, 0x20, 0));
    let disk = Fixture::new();
    assert_eq!(disk.check(&[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0]), (5, 0x20, 0));
}

#[test]
fn sanitize_in_the_background_keeps_the_medium_out_of_reach_until_it_is_done() {
    let fixture = Fixture::new();
    fixture.output(&write_10(0, 1), &[7; 512]);
    let target = std::rc::Rc::new(fixture.0);
    let mut background = Box::pin(target.clone().background());
    assert!(background.as_mut().now_or_never().is_none());
    let run = |cdb: &[u8], data: &[u8]| {
        let data = DataBuffer::from_bytes(data);
        target.execute(&command(NEXUS, Some(Lun(0)), cdb, &data, &data)).now_or_never().unwrap()
    };
    let overwrite = [0x48, 0x81, 0, 0, 0, 0, 0, 0, 8, 0];
    assert_eq!(run(&overwrite, &[1, 0, 0, 4, 1, 2, 3, 4]).status, Status::Good);
    let sense = run(&read_10(0, 1), &[0; 512]).sense.unwrap();
    assert_eq!((sense.as_bytes()[2], &sense.as_bytes()[12..14]), (2, &[4, 0x1B][..]));
    assert_eq!(run(&[0x12, 0, 0, 0, 36, 0], &[0; 36]).status, Status::Good);
    assert!(background.as_mut().now_or_never().is_none());
    assert_eq!(run(&[0; 6], &[]).status, Status::Good);
    let disk = target.disks().remove(0).1;
    assert_eq!(disk.device().bytes(), [1, 2, 3, 4].repeat(64 * 512));
    for wrong in [[0, 0, 0, 4, 1, 2, 3, 4], [1, 0, 0, 0, 1, 2, 3, 4], [1, 0, 2, 4, 1, 2, 3, 4]] {
        assert_eq!(run(&overwrite, &wrong).status, Status::CheckCondition);
    }
    assert_eq!(run(&[0; 6], &[]).status, Status::Good);
}

#[test]
fn a_sanitize_that_failed_is_told_until_it_is_left() {
    let fixture = Fixture::new();
    fixture.disk().fail_with(Some(StorageError::Medium { position: 0, errno: 5 }));
    assert_eq!(fixture.check(&[0x48, 0x22, 0, 0, 0, 0, 0, 0, 0, 0]), (3, 0x0C, 2));
    fixture.disk().fail_with(None);
    assert_eq!(fixture.check(&[0; 6]), (3, 0x31, 3));
    assert_eq!(fixture.output(&[0x48, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0], &[]).status, Status::Good);
    assert_eq!(fixture.input(&[0; 6], 0), []);
}

#[test]
fn a_port_in_standby_lets_only_harmless_commands_through() {
    let fixture = Fixture::new();
    let port = |relative_id, group| TargetPort { relative_id, group, name: Some(format!("iqn.t,t,0x000{group}")) };
    fixture.0.set_ports(vec![port(1, 1), port(2, 2)]);
    let flags = |fixture: &Fixture| fixture.input(&[0x12, 0, 0, 0, 36, 0], 36)[5] & 0x30;
    assert_eq!((flags(&Fixture::new()), flags(&fixture)), (0, 0x10));
    fixture.0.set_access_state(1, AccessState::Standby);
    assert_eq!(fixture.check(&[0; 6]), (6, 0x2A, 6));
    assert_eq!(fixture.check_with(&read_10(0, 1), &[0; 512]), (2, 4, 0x0B));
    let groups = fixture.input(&[0xA3, 0x0A, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0], 255);
    assert_eq!(groups[4..16], [2, 0x0F, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1]);
    assert_eq!(groups[16], 0);
    let names = fixture.input(&[0x12, 1, 0x83, 0, 255, 0], 255);
    assert!(names.windows(15).any(|window| window == b"iqn.t,t,0x0001\0"));
    fixture.0.set_access_state(1, AccessState::ActiveOptimized);
    fixture.check(&[0; 6]);
    assert_eq!(fixture.input(&read_10(0, 1), 512).len(), 512);
}

#[test]
fn the_well_known_unit_lists_the_others_and_itself_when_asked() {
    let fixture = Fixture::new();
    let into = DataBuffer::zeroed(64, 8);
    let run = |cdb: &[u8]| fixture.run(Lun::REPORT_LUNS, cdb, &DataBuffer::empty(), &into);
    assert_eq!(run(&[0xA0, 0, 1, 0, 0, 0, 0, 0, 0, 64, 0, 0]).transferred, 16);
    assert_eq!(into.to_vec()[8..16], [0xC1, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(run(&[0x12, 0, 0, 0, 36, 0]).transferred, 36);
    assert_eq!(into.to_vec()[0], 0x1E);
    assert_eq!(run(&[0; 6]).status, Status::Good);
    assert_eq!(run(&read_10(0, 1)).sense.unwrap().as_bytes()[12], 0x20);
}

#[test]
fn a_unit_that_is_taken_away_leaves_no_command_behind() {
    let fixture = two_disks();
    let task = fixture.0.enter(NEXUS, Some(Lun(1)), 1, TaskAttribute::Simple);
    assert!(fixture.0.remove(Lun(1)).now_or_never().unwrap().is_some());
    assert!(task.is_aborted());
    assert_eq!(fixture.check(&[0; 6]), (6, 0x3F, 0x0E));
    assert!(!fixture.0.has(Lun(1)));
}

#[test]
fn log_pages_tell_the_space_of_a_thin_disk() {
    let fixture = Fixture::new();
    assert_eq!(fixture.input(&[0x4D, 0, 0x40, 0, 0, 0, 0, 0, 64, 0], 64), [0, 0, 0, 1, 0]);
    assert_eq!(fixture.check(&[0x4D, 0, 0x4C, 0, 0, 0, 0, 0, 64, 0]), (5, 0x24, 0));
    fixture.disk().set_space(Some(Space { used: 2 << 20, available: 5 << 20 }));
    let page = fixture.input(&[0x4D, 0, 0x4C, 0, 0, 0, 0, 0, 64, 0], 64);
    assert_eq!(page[..12], [0x0C, 0, 0, 24, 0, 1, 3, 8, 0, 0, 0, 5]);
    assert_eq!(page[16..24], [0, 2, 3, 8, 0, 0, 0, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_copy_list_is_carried_out_or_refused_without_a_change(
        changes in prop::collection::vec((0usize..108, prop_oneof![Just(0u8), 0u8..8, any::<u8>()]), 0..5),
        cut in 0usize..4,
    ) {
        let fixture = two_disks();
        fixture.output(&write_10(0, 2), &[5; 1024]);
        let mut list = copy_list([NAA, OTHER], 2, 0, 0);
        for (at, value) in changes {
            list[at] = value;
        }
        list.truncate(list.len() - cut);
        let before: Vec<_> = fixture.0.disks().iter().map(|(_, disk)| disk.device().bytes()).collect();
        let completion = fixture.output(&copy_cdb(list.len()), &list);
        let after: Vec<_> = fixture.0.disks().iter().map(|(_, disk)| disk.device().bytes()).collect();
        prop_assert!(completion.status == Status::Good || before == after);
    }
}
