//! Promises of the adapter as a guest sees them.

mod garbage;
mod guest;
mod probes;
mod resets;

use self::guest::*;

#[test]
fn data_go_by_address_and_by_list() {
    let guest = Guest::ready();
    let data: Vec<u8> = (0..2048).map(|index| (index * 7 / 3) as u8).collect();
    guest.set_bytes(DATA, &data);
    assert_eq!(guest.run(1, &Ccb::new(&write_10(8, 4)).data(OUT, DATA, 2048)), (0, 0, 1));
    let target = DATA + 0x1_0000;
    let parts = [(target, 100), (target + 100, 924), (target + 5000, 0), (target + 1024, 1024)];
    guest.set_bytes(LISTS, &list(&parts));
    for opcode in [2, 4] {
        let ccb = Ccb::new(&read_10(8, 4)).opcode(opcode).data(IN, LISTS, 32);
        guest.set_bytes(target, &[0; 2048]);
        assert_eq!((guest.run(2, &ccb), guest.bytes(target, 2048)), ((0, 0, 1), data.clone()));
    }
    // Where the direction is left to the CDB, and where there are no data at all.
    guest.set_bytes(target, &[0; 512]);
    assert_eq!(guest.run(3, &Ccb::new(&read_10(8, 1)).data(0, target, 512)), (0, 0, 1));
    assert_eq!(guest.bytes(target, 512), data[..512]);
    assert_eq!(guest.run(4, &Ccb::new(&write_10(9, 1)).data(0, DATA, 512)), (0, 0, 1));
    assert_eq!(guest.run(5, &Ccb::new(&[0; 6]).data(NO_DATA, DATA, 0)), (0, 0, 1));
}

#[test]
fn a_short_transfer_is_success_and_only_told_to_who_asks_for_the_residual() {
    let guest = Guest::ready();
    guest.set_bytes(DATA, &[0xAA; 255]);
    guest.set_bytes(LISTS, &list(&[(DATA, 5), (DATA + 5, 250)]));
    let page = [0x12, 1, 0xB2, 0, 255, 0];
    let length = |number: u64| u32::from_le_bytes(guest.bytes(CCBS + 64 * number + 4, 4).try_into().unwrap());
    for (number, opcode, data, given, left) in
        [(0, 0, DATA, 255, 255), (1, 2, LISTS, 16, 16), (2, 3, DATA, 255, 247), (3, 4, LISTS, 16, 247)]
    {
        assert_eq!(guest.run(number, &Ccb::new(&page).opcode(opcode).data(IN, data, given)), (0, 0, 1));
        assert_eq!((length(number), guest.bytes(DATA + 8, 247)), (left, vec![0xAA; 247]), "opcode {opcode}");
    }
    // More than there is room for: what fits is moved.
    assert_eq!(guest.run(4, &Ccb::new(&read_10(0, 2)).opcode(3).data(IN, DATA, 512)), (0, 0, 1));
    assert_eq!((length(4), guest.bytes(DATA + 512, 1)), (0, vec![0]));
}

#[test]
fn a_check_condition_brings_as_much_sense_as_there_is_room_for() {
    let guest = Guest::ready();
    for (sense_length, arrives) in [(96, 18), (0, 14), (1, 0), (4, 4)] {
        guest.set_bytes(SENSE, &[0xAA; 32]);
        let ccb = Ccb { sense_length, ..Ccb::new(&[0xC1; 6]) };
        assert_eq!(guest.run(1, &ccb), (0, 2, 4));
        let sense = guest.bytes(SENSE, 19);
        assert_eq!(sense.iter().rposition(|byte| *byte != 0xAA).map_or(0, |last| last + 1), arrives);
        assert!(arrives == 0 || sense[..3] == [0x70, 0, 5]);
    }
    let nowhere = Ccb { sense: MEMORY as u32 - 4, ..Ccb::new(&[0xC1; 6]) };
    assert_eq!(guest.run(2, &nowhere), (0x1B, 2, 4));
}

#[test]
fn absent_targets_are_not_there_and_absent_units_answer_for_themselves() {
    let guest = Guest::ready();
    for target in [1, 7, 15, 16, 255] {
        assert_eq!(guest.run(1, &Ccb::new(&[0; 6]).target(target)), (0x11, 0, 4), "target {target}");
    }
    let inquiry = Ccb { lun: 1, ..Ccb::new(&[0x12, 0, 0, 0, 36, 0]).data(IN, DATA, 36) };
    assert_eq!((guest.run(2, &inquiry), guest.bytes(DATA, 1)), ((0, 0, 1), vec![0x7F]));
    let ready = Ccb { lun: 1, ..Ccb::new(&[0; 6]) };
    assert_eq!((guest.run(3, &ready), guest.bytes(SENSE + 12, 2)), ((0, 2, 4), vec![0x25, 0]));
}

#[test]
fn ccbs_that_make_no_sense_are_refused() {
    let guest = Guest::ready();
    let read = Ccb::new(&read_10(0, 1));
    for address in [MEMORY as u64, MEMORY as u64 - 100, 0xFFFF_FF00] {
        assert_eq!(guest.run(1, &read.clone().data(IN, address, 512)), (0x1A, 0, 4), "data at {address:x}");
        assert_eq!(guest.run(1, &read.clone().opcode(2).data(IN, address, 1024)), (0x1A, 0, 4), "list at {address:x}");
    }
    guest.set_bytes(LISTS, &list(&[(DATA, 100), (0xFFFF_0000, 412)]));
    assert_eq!(guest.run(1, &read.clone().opcode(4).data(IN, LISTS, 16)), (0x1A, 0, 4));
    // Lists of half an element, and of more elements than there may be.
    for length in [4, 8 * 8193] {
        assert_eq!(guest.run(1, &read.clone().opcode(2).data(IN, LISTS, length)), (0x1A, 0, 4));
    }
    for opcode in [0x01, 0x05, 0x80, 0xFF] {
        assert_eq!(guest.run(1, &read.clone().opcode(opcode).data(IN, DATA, 512)), (0x16, 0, 4));
    }
    assert_eq!(guest.run(1, &Ccb::new(&[])), (0x1A, 0, 4));
    let long = Ccb::new(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]).data(IN, DATA, 512);
    assert_eq!(guest.run(1, &long), (0x1A, 0, 4));
    assert_eq!(guest.run(1, &read.clone().data(IN | 0xE0, DATA, 512)), (0x1A, 0, 4), "a kind of tag that is none");
    guest.send(0xFFFF_F000, 1);
    assert_eq!(guest.wait(), (0xFFFF_F000, 0x1A, 0, 4));
    for tag in [0x20, 0x60, 0xA0] {
        assert_eq!(guest.run(1, &read.clone().data(IN | tag, DATA, 512)), (0, 0, 1), "tag {tag:x}");
    }
}

#[test]
fn completions_wait_for_incoming_mailboxes_and_overwrite_none() {
    let guest = Guest::ready();
    for number in 0..40 {
        guest.start(number, &Ccb::new(&[0; 6]));
    }
    let first = MAILBOXES + 8 * (u64::from(COUNT));
    eventually("full mailboxes", || (0..u64::from(COUNT)).all(|number| guest.bytes(first + 8 * number + 7, 1) == [1]));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let (address, host, scsi, completion) = guest.wait();
        assert!(seen.insert(address) && (host, scsi, completion) == (0, 0, 1));
    }
    assert_eq!((seen.len(), guest.take()), (40, None));
}

#[test]
fn strict_order_stops_at_a_free_mailbox_and_passes_codes_that_are_none() {
    let guest = Guest::ready();
    // The mailbox behind the next one: not looked at until the next one is used.
    let (next, later) = (MAILBOXES + 8, MAILBOXES + 16);
    let address = guest.put(1, &Ccb::new(&[0; 6])) as u32;
    let entry = [&address.to_le_bytes()[..], &[0, 0, 0, 1]].concat();
    guest.set_bytes(later, &entry);
    guest.write(1, 0x02);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((guest.bytes(later + 7, 1), guest.take()), (vec![1], None));
    guest.set_bytes(next + 7, &[9]);
    guest.write(1, 0x02);
    assert_eq!(guest.wait(), (address.into(), 0, 0, 1));
    assert_eq!((guest.bytes(next + 7, 1), guest.bytes(later + 7, 1)), (vec![0], vec![0]));
}

#[test]
fn mailboxes_and_ccbs_of_24_bits_work_for_old_drivers() {
    let guest = Guest::new();
    let [_, high, middle, low] = (MAILBOXES as u32).to_be_bytes();
    guest.set_bytes(MAILBOXES, &[0; 16]);
    guest.command(&[0x01, 2, high, middle, low], 0);
    let send = |mailbox: u64, opcode: u8, cdb: &[u8], address: u64, length: u32| {
        let [_, a, b, c] = length.to_be_bytes();
        let [_, d, e, f] = (address as u32).to_be_bytes();
        let mut ccb = vec![opcode, IN, cdb.len() as u8, 0, a, b, c, d, e, f];
        ccb.resize(0x12, 0);
        ccb.extend(cdb);
        guest.set_bytes(CCBS, &ccb);
        let [_, a, b, c] = (CCBS as u32).to_be_bytes();
        guest.set_bytes(MAILBOXES + 4 * mailbox, &[0, a, b, c]);
        guest.set_bytes(MAILBOXES + 4 * mailbox, &[1]);
        guest.write(1, 0x02);
        let into = MAILBOXES + 8 + 4 * mailbox;
        eventually("an incoming mailbox", || guest.bytes(into, 1) != [0]);
        assert_eq!(guest.bytes(into + 1, 3), [a, b, c]);
        let code = guest.bytes(into, 1)[0];
        guest.set_bytes(into, &[0]);
        (code, guest.bytes(CCBS + 0x0E, 2))
    };
    // The power-on attention: sense data behind the CDB.
    assert_eq!(send(0, 0, &[0; 6], 0, 0), (4, vec![0, 2]));
    assert_eq!(guest.bytes(CCBS + 0x12 + 6, 3), [0x70, 0, 6]);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    assert_eq!(send(1, 3, &inquiry, DATA, 64), (1, vec![0, 0]));
    assert_eq!((guest.bytes(DATA + 8, 8), guest.bytes(CCBS + 4, 3)), (b"VMware  ".to_vec(), vec![0, 0, 28]));
    guest.set_bytes(LISTS, &[0, 0, 8, 0x10, 0x10, 0, 0, 0, 56, 0x10, 0x20, 0]);
    assert_eq!(send(0, 4, &inquiry, LISTS, 12), (1, vec![0, 0]));
    assert_eq!((guest.bytes(DATA + 0x2000, 8), guest.bytes(CCBS + 4, 3)), (b"VMware  ".to_vec(), vec![0, 0, 28]));
}
