//! Promises of the adapter as a guest sees them.

mod garbage;
mod guest;
mod resets;

use std::sync::atomic::Ordering;

use self::guest::*;
use crate::hba::HostBusAdapter;

#[test]
fn the_linux_driver_brings_the_adapter_up() {
    // What virtio_pci_modern and virtio_scsi read and write, in their order: offset, width, and the value read or written.
    enum Step {
        R(u64, usize, u64),
        W(u64, usize, u64),
    }
    use Step::{R, W};
    let guest = Guest::new();
    let identity = guest.adapter.pci_identity();
    assert_eq!((identity.vendor, identity.device, identity.revision), (0x1AF4, 0x1048, 1));
    let kinds: Vec<u8> = identity.vendor_capabilities.iter().map(|capability| capability[1]).collect();
    assert_eq!((kinds, identity.register_window), (vec![1, 2, 3, 4, 5], Some(4)));
    let steps = [
        W(0x14, 1, 0),
        R(0x14, 1, 0),
        W(0x14, 1, 1),
        W(0x14, 1, 3),
        W(0x00, 4, 0),
        R(0x04, 4, 0x1000_0006),
        W(0x00, 4, 1),
        R(0x04, 4, 1),
        W(0x00, 4, 2),
        R(0x04, 4, 0),
        W(0x08, 4, 0),
        W(0x0C, 4, 0x1000_0006),
        W(0x08, 4, 1),
        W(0x0C, 4, 1),
        W(0x14, 1, 11),
        R(0x14, 1, 11),
        // num_queues, sizes, limits.
        R(0x2000, 4, 4),
        R(0x2004, 4, 254),
        R(0x2008, 4, 0xFFFF),
        R(0x200C, 4, 128),
        W(0x2014, 4, 96),
        W(0x2018, 4, 32),
        R(0x2014, 4, 96),
        R(0x2018, 4, 32),
        R(0x201C, 2, 0),
        R(0x201E, 2, 64),
        R(0x2020, 4, 16383),
        R(0x12, 2, 6),
        W(0x16, 2, 5),
        R(0x18, 2, 256),
        R(0x1C, 2, 0),
        R(0x1E, 2, 0),
        W(0x16, 2, 6),
        R(0x18, 2, 0),
        R(0x15, 1, 0),
        R(0x10, 2, 0xFFFF),
    ];
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            R(offset, width, value) => assert_eq!(guest.read(offset, width), value, "step {number}"),
            W(offset, width, value) => guest.write(offset, &value.to_le_bytes()[..width]),
        }
    }
    guest.bring_up();
    let inquiry = Io::new(1, &[0x12, 0, 0, 0, 36, 0]).data(DATA, 36, true);
    let done = guest.run(&inquiry);
    assert_eq!((done.response, done.status, done.residual, done.written), (0, 0, 0, 108 + 36));
    assert_eq!(guest.bytes(DATA + 8, 8), b"VMware  ");
}

#[test]
fn data_go_through_any_layout_of_buffers() {
    let guest = Guest::ready();
    let data: Vec<u8> = (0..2048).map(|index| (index * 7 / 3) as u8).collect();
    guest.set_bytes(DATA, &data);
    for indirect in [false, true] {
        guest.indirect.set(indirect);
        let write = Io::new(1, &write_10(8, 4)).data(DATA, 1000, false).data(DATA + 1000, 1048, false);
        assert_eq!((guest.run(&write).status, guest.run(&write).written), (0, 108));
        let target = DATA + 0x1_0000;
        guest.set_bytes(target, &[0; 4096]);
        let read = Io::new(2, &read_10(8, 4)).data(target, 100, true).data(target + 100, 1948, true);
        let done = guest.run(&read);
        assert_eq!((done.response, done.status, done.residual, done.written), (0, 0, 0, 108 + 2048));
        assert_eq!(guest.bytes(target, 2048), data);
    }
    // Header, data and response in one buffer each way.
    let area = guest.area(2);
    let mut bytes = vec![0; 51];
    (bytes[0], bytes[2], bytes[19]) = (1, 0x40, 0x2A);
    (bytes[24], bytes[27]) = (9, 1);
    bytes.extend([0x77; 512]);
    guest.set_bytes(DATA, &bytes);
    guest.indirect.set(false);
    guest.put(2, &[(DATA, 563, false), (area + 128, 108, true)]);
    guest.notify(2);
    assert_eq!(guest.wait(2).status, 0);
    guest.run(&Io::new(3, &read_10(9, 1)).data(DATA, 512, true));
    assert_eq!(guest.bytes(DATA, 512), [0x77; 512]);
}

#[test]
fn residuals_and_overruns_are_told() {
    let guest = Guest::ready();
    guest.set_bytes(DATA, &[0xAA; 255]);
    let done = guest.run(&Io::new(1, &[0x12, 1, 0xB2, 0, 255, 0]).data(DATA, 255, true));
    assert_eq!((done.response, done.status, done.residual, done.written), (0, 0, 247, 108 + 8));
    assert_eq!(guest.bytes(DATA + 8, 247), [0xAA; 247]);
    let done = guest.run(&Io::new(2, &read_10(0, 2)).data(DATA, 512, true));
    assert_eq!((done.response, done.residual), (1, 0));
}

#[test]
fn errors_come_with_sense_data_and_absent_targets_are_bad() {
    let guest = Guest::ready();
    let done = guest.run(&Io::new(1, &[0xC1; 6]));
    assert_eq!((done.response, done.status, done.sense.len()), (0, 2, 18));
    assert_eq!((done.sense[2], done.sense[12]), (5, 0x20));
    for target in [1, 7, 64, 65, 255] {
        assert_eq!(guest.run(&Io::new(2, &[0; 6]).for_target(target)).response, 3, "target {target}");
    }
    for lun in [[0; 8], [2, 0, 0x40, 0, 0, 0, 0, 0], [0xC1, 1, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(guest.run(&Io { lun, ..Io::new(3, &[0; 6]) }).response, 3, "{lun:?}");
    }
    let absent = Io { lun: address(0, 1), ..Io::new(4, &[0x12, 0, 0, 0, 36, 0]) }.data(DATA, 36, true);
    assert_eq!((guest.run(&absent).status, guest.bytes(DATA, 1)), (0, vec![0x7F]));
    let absent = guest.run(&Io { lun: address(0, 1), ..Io::new(5, &[0; 6]) });
    assert_eq!((absent.status, absent.sense[12]), (2, 0x25));
    // Data outside of memory, and data both ways.
    for address in [MEMORY as u64, MEMORY as u64 - 100, u64::MAX - 10, 1 << 52] {
        assert_eq!(guest.run(&Io::new(6, &read_10(0, 1)).data(address, 512, true)).response, 9);
    }
    assert_eq!(guest.run(&Io::new(7, &read_10(0, 1)).data(DATA, 512, true).data(DATA, 512, false)).response, 9);
    assert_eq!(guest.run(&Io::new(8, &read_10(0, 1)).data(DATA, 512, true)).status, 0);
}

#[test]
fn all_queues_work_and_wrap() {
    let guest = Guest::ready();
    for tag in 0..1000 {
        let queue = 2 + (tag % 4) as u16;
        let block = (tag % 200) as u8;
        guest.set_bytes(DATA, &[block; 512]);
        let done = guest.run(&Io { queue, ..Io::new(tag, &write_10(block, 1)).data(DATA, 512, false) });
        assert_eq!((done.response, done.status), (0, 0));
    }
    // As many at once as the queues have room for, with one notification each.
    for queue in 2..6 {
        (0..16).for_each(|tag| guest.submit(&Io { queue, ..Io::new(tag, &read_10(7, 1)).data(DATA, 512, true) }));
    }
    guest.notify(3);
    for queue in 2..6 {
        let mut tags: Vec<u64> = (0..16).map(|_| guest.wait(queue).tag).collect();
        tags.sort();
        assert_eq!(tags, (0..16).collect::<Vec<_>>());
    }
    assert_eq!(guest.bytes(DATA, 512), [7; 512]);
    // The doorbell's event works like the register.
    let doorbells = guest.adapter.doorbells().unwrap();
    guest.submit(&Io::new(77, &[0; 6]));
    doorbells[0].event.write(1).unwrap();
    assert_eq!((guest.wait(2).tag, doorbells[0].offset), (77, 0x3000));
}

#[test]
fn interrupts_come_only_when_they_are_wanted_and_reading_the_status_ends_them() {
    let guest = Guest::ready();
    eventually("the level", || guest.line.level.load(Ordering::SeqCst));
    assert_eq!((guest.read(0x1000, 1), guest.line.level.load(Ordering::SeqCst)), (1, false));
    assert_eq!(guest.read(0x1000, 1), 0);
    guest.set_bytes(QUEUES + 0x2_0000 + AVAILABLE, &[1, 0]);
    guest.run(&Io::new(1, &[0; 6]));
    // Another queue still wants its own.
    guest.run(&Io { queue: 3, ..Io::new(2, &[0; 6]) });
    eventually("the other queue's interrupt", || guest.read(0x1000, 1) == 1);
    guest.run(&Io::new(3, &[0; 6]));
    assert_eq!(guest.adapter.detach(9).err().map(|_| ()), Some(()));
    assert_eq!(guest.read(0x1000, 1), 0);
}

#[test]
fn disks_come_and_go_with_an_event_and_one_that_was_missed_is_told_later() {
    let guest = Guest::ready();
    guest.adapter.attach(disk(3, &guest.gate)).unwrap();
    for _ in 0..2 {
        let area = guest.area(1);
        guest.put(1, &[(area, 16, true)]);
    }
    let event = || {
        let (chain, written) = guest.take(1).expect("an event");
        assert_eq!(written, 16);
        guest.bytes(QUEUES + 0x1_0000 + 0x4000 + u64::from(chain) * 256, 16)
    };
    guest.adapter.detach(3).unwrap();
    assert_eq!(event(), [1, 0, 0, 0x80, 1, 3, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    guest.adapter.attach(disk(3, &guest.gate)).unwrap();
    assert_eq!(event(), [1, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(guest.run(&Io::new(1, &[0; 6]).for_target(3)).status, 2);
    assert!(guest.adapter.attach(disk(7, &guest.gate)).is_err());
}
