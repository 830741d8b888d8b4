//! Promises that hold for whatever initiators send: corpora of CDBs and parameter lists, and mutations of them.

use super::mutation::for_each;
use super::units::{copy_cdb, two_disks};
use super::*;

#[test]
fn cdbs_end_with_a_status_and_move_no_more_than_there_is_room_for() {
    for (kind, block) in [(DeviceKind::Disk, 512), (DeviceKind::Disk, 4096), (DeviceKind::CdRom, 2048)] {
        let geometry = Geometry { logical_block: block, ..GEOMETRY };
        let target = Target::new();
        let options = DiskOptions { kind, removable: true, ..DiskOptions::default() };
        target.insert(Lun(0), Disk::new(MemoryDisk::new(geometry), options));
        target.attach(NEXUS, initiator(1), 1);
        // Room for two blocks, with what parameter lists begin with.
        let data: Vec<u8> = (0..2 * block).map(|n| if n < 24 { (n % 9) as u8 } else { 0 }).collect();
        for_each(include_str!("corpus/cdb.txt"), |cdb| {
            let buffer = DataBuffer::from_bytes(&data);
            for short_buffer in [ShortBuffer::Truncate, ShortBuffer::Refuse] {
                let request = Command { short_buffer, ..command(NEXUS, Some(Lun(0)), cdb, &buffer, &buffer) };
                let completion = target.execute(&request).now_or_never().expect("a memory disk never waits");
                assert!(completion.transferred <= data.len() as u64, "{cdb:02x?}");
                assert_eq!(completion.status == Status::CheckCondition, completion.sense.is_some(), "{cdb:02x?}");
                let sense = completion.sense.as_ref().map_or(&[0x70][..], |sense| sense.as_bytes());
                assert!(matches!(sense[0] & 0x7F, 0x70 | 0x72), "{cdb:02x?}");
            }
        });
    }
}

#[test]
fn reservation_lists_are_carried_out_or_change_nothing() {
    // An input is a CDB of ten bytes and its parameter list, sent by one of two initiators in turn.
    let fixture = Fixture::new();
    let other = NexusId(2);
    fixture.0.attach(other, initiator(2), 1);
    let mut turn = 0u32;
    for_each(include_str!("corpus/reservation.txt"), |input| {
        let (cdb, list) = input.split_at(input.len().min(10));
        turn += 1;
        let nexus = if turn.is_multiple_of(3) { other } else { NEXUS };
        let before = fixture.0.reservations(Lun(0)).unwrap();
        let (out, none) = (DataBuffer::from_bytes(list), DataBuffer::empty());
        let request = command(nexus, Some(Lun(0)), cdb, &out, &none);
        let completion = fixture.0.execute(&request).now_or_never().expect("nothing waits");
        let after = fixture.0.reservations(Lun(0)).unwrap();
        if completion.status != Status::Good {
            assert_eq!(format!("{before:?}"), format!("{after:?}"), "{input:02x?}");
        }
        // Who holds a reservation is registered, or it is of all registrants.
        let holders = after.registrants.iter().filter(|registrant| registrant.holds).count();
        assert!(after.kind.is_none() || holders > 0, "{input:02x?}: {after:?}");
        assert!(after.registrants.len() <= 64 && after.registrants.iter().all(|registrant| registrant.key != 0));
    });
}

#[test]
fn copy_lists_are_carried_out_or_change_nothing() {
    let fixture = two_disks();
    fixture.output(&write_10(0, 2), &[5; 1024]);
    let bytes = || fixture.0.disks().iter().map(|(_, disk)| disk.device().bytes()).collect::<Vec<_>>();
    for_each(include_str!("corpus/copy.txt"), |list| {
        let before = bytes();
        let completion = fixture.output(&copy_cdb(list.len()), list);
        assert!(completion.status == Status::Good || before == bytes(), "{list:02x?}");
    });
}
