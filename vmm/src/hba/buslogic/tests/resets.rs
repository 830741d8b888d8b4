//! Resets, aborts and stops are synchronous for guest memory, whatever the storage is doing.

use super::guest::*;
use crate::hba::HostBusAdapter;

const FIRST: u64 = CCBS + 64 * 10;
const SECOND: u64 = CCBS + 64 * 11;

/// Starts two reads that wait at the gate, as CCBs 10 and 11, then does `deed` while the gate is still closed; opens it a while
/// later. Returns whether `deed` returned before.
fn with_reads_in_flight(guest: &Guest, deed: impl FnOnce(&Guest)) -> bool {
    guest.set_bytes(DATA, &[0x55; 0x4000]);
    guest.gate.close();
    for number in [10, 11] {
        guest.start(number, &Ccb::new(&read_10(0, 1)).data(IN, DATA + number * 512, 512));
    }
    eventually("two waiting reads", || guest.gate.waiting() == 2);
    returns_before_the_gate_opens(&guest.gate, || deed(guest))
}

/// The answer to TEST UNIT READY, and the additional sense code that comes with it.
fn ready(guest: &Guest) -> (u8, Vec<u8>) {
    (guest.run(20, &Ccb::new(&[0; 6])).1, guest.bytes(SENSE + 12, 2))
}

#[test]
fn every_kind_of_reset_forgets_everything_and_touches_no_memory_afterwards() {
    let guest = Guest::ready();
    for (name, how, attention) in [("hard", Some(0x80), true), ("soft", Some(0x40), false), ("platform", None, true)] {
        let early = with_reads_in_flight(&guest, |guest| match how {
            Some(how) => guest.write(0, how),
            None => guest.adapter.reset(),
        });
        assert!(!early, "{name}: the write returned while the storage was at work");
        guest.assert_quiet();
        if how.is_some() {
            assert_eq!(guest.read(0), 0x80, "{name}: a driver waits for the diagnosis to be seen");
        }
        assert_eq!((guest.read(0), guest.read(2), guest.take()), (0x30, 0, None), "{name}");
        guest.bring_up();
        if attention {
            assert_eq!(ready(&guest), (2, vec![0x29, 2]), "{name}");
        }
        assert_eq!(ready(&guest).0, 0, "{name}");
        assert_eq!(guest.run(2, &Ccb::new(&read_10(0, 1)).data(IN, DATA, 512)), (0, 0, 1));
    }
}

#[test]
fn a_bus_reset_answers_everything_first_and_raises_no_reset_interrupt() {
    let guest = Guest::ready();
    assert!(!with_reads_in_flight(&guest, |guest| guest.write(0, 0x10)));
    let mut ended = [guest.wait(), guest.wait()];
    ended.sort();
    assert_eq!(ended, [(FIRST, 0x22, 0, 4), (SECOND, 0x22, 0, 4)]);
    guest.assert_quiet();
    assert_eq!((guest.read(0), guest.read(2) & 0x08), (0x10, 0));
    assert_eq!((ready(&guest), ready(&guest).0), ((2, vec![0x29, 2]), 0));
}

#[test]
fn an_aborted_ccb_comes_back_as_such_and_is_never_touched_again() {
    let guest = Guest::ready();
    guest.set_bytes(DATA, &[0x55; 0x4000]);
    guest.gate.close();
    for number in [10, 11] {
        guest.start(number, &Ccb::new(&read_10(0, 1)).data(IN, DATA + number * 512, 512));
    }
    eventually("two waiting reads", || guest.gate.waiting() == 2);
    guest.send(SECOND, 2);
    std::thread::sleep(HEARD);
    assert_eq!(guest.take(), None, "the storage still has the memory of the aborted one");
    guest.gate.open();
    let mut ended = [guest.wait(), guest.wait()];
    ended.sort();
    assert_eq!(ended, [(FIRST, 0, 0, 1), (SECOND, 0x26, 0, 2)]);
    guest.assert_quiet();
}

#[test]
fn an_abort_of_what_is_not_under_way_finds_nothing_and_leaves_the_ccb_alone() {
    let guest = Guest::ready();
    let address = guest.put(3, &Ccb::new(&[0; 6]));
    let before = guest.bytes(address, 40);
    guest.send(address, 2);
    assert_eq!((guest.wait(), guest.bytes(address, 40)), ((address, 0, 0, 3), before));
    // Nor is there one outside of memory.
    guest.send(0xFFFF_F000, 2);
    assert_eq!(guest.wait(), (0xFFFF_F000, 0, 0, 3));
}

#[test]
fn a_device_reset_forgets_the_targets_ccbs_without_posting_them() {
    let guest = Guest::ready();
    let other = disk(1, &guest.gate);
    guest.adapter.attach(other).unwrap();
    with_reads_in_flight(&guest, |guest| {
        guest.start(12, &Ccb::new(&read_10(0, 1)).data(IN, DATA + 0x2000, 512).target(1));
        guest.start(13, &Ccb::new(&[]).opcode(0x81));
        guest.start(14, &Ccb::new(&[]).opcode(0x81).target(5));
    });
    let mut ended = [guest.wait(), guest.wait(), guest.wait()];
    ended.sort();
    let at = |number: u64| CCBS + 64 * number;
    // The other disk has its own power-on attention.
    assert_eq!(ended, [(at(12), 0, 2, 4), (at(13), 0, 0, 1), (at(14), 0x11, 0, 4)]);
    guest.assert_quiet();
    assert_eq!(guest.take(), None);
    assert_eq!((ready(&guest), ready(&guest).0), ((2, vec![0x29, 3]), 0));
}

#[test]
fn a_disk_that_is_pulled_out_ends_its_ccbs_and_is_gone() {
    let guest = Guest::ready();
    with_reads_in_flight(&guest, |guest| guest.adapter.detach(0).unwrap());
    let mut ended = [guest.wait(), guest.wait()];
    ended.sort();
    assert_eq!(ended, [(FIRST, 0x11, 0, 4), (SECOND, 0x11, 0, 4)]);
    assert_eq!(guest.run(1, &Ccb::new(&[0; 6])), (0x11, 0, 4));
    eventually("an interrupt", || guest.read(2) == 0x81);
    guest.write(0, 0x20);
    assert_eq!(guest.command(&[0x24], 2), [0, 0]);
    guest.adapter.attach(disk(9, &guest.gate)).unwrap();
    assert_eq!((guest.command(&[0x24], 2), guest.command(&[0x23], 8)), (vec![0, 2], vec![0, 1, 0, 0, 0, 0, 0, 0]));
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_then_nothing_answers() {
    let guest = Guest::ready();
    with_reads_in_flight(&guest, |guest| guest.adapter.stop().unwrap());
    guest.assert_quiet();
    guest.write(1, 0x02);
    guest.write(0, 0x80);
    guest.adapter.reset();
    guest.adapter.stop().unwrap();
    guest.assert_quiet();
}
