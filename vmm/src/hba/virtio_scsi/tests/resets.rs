//! Resets, aborts and stops are synchronous for guest memory, whatever the storage is doing.

use super::guest::*;
use crate::hba::HostBusAdapter;

/// Starts two reads that wait at the gate, then does `deed` while the gate is still closed; opens it a while later.
/// Returns whether `deed` returned before.
fn with_reads_in_flight(guest: &Guest, deed: impl FnOnce(&Guest)) -> bool {
    guest.set_bytes(DATA, &[0x55; 0x4000]);
    guest.gate.close();
    for tag in [10, 11] {
        guest.submit(&Io::new(tag, &read_10(0, 1)).data(DATA + tag * 512, 512, true));
    }
    guest.notify(2);
    eventually("two waiting reads", || guest.gate.waiting() == 2);
    returns_before_the_gate_opens(&guest.gate, || deed(guest))
}

#[test]
fn a_reset_forgets_everything_and_touches_no_memory_afterwards() {
    type Reset = (&'static str, fn(&Guest));
    let resets: [Reset; 2] = [("device", |guest| guest.write(0x14, &[0])), ("platform", |guest| guest.adapter.reset())];
    let guest = Guest::ready();
    for (name, reset) in resets {
        assert!(!with_reads_in_flight(&guest, reset), "{name}: the write returned while the storage was at work");
        guest.assert_quiet();
        assert_eq!((guest.read(0x14, 1), guest.read(0x1000, 1), guest.done(2)), (0, 0, None), "{name}");
        guest.notify(2);
        guest.assert_quiet();
        guest.bring_up();
        assert_eq!(guest.run(&Io::new(1, &[0; 6])).status, if name == "device" { 0 } else { 2 });
        assert_eq!(guest.run(&Io::new(2, &read_10(0, 1)).data(DATA, 512, true)).status, 0);
    }
}

#[test]
fn commands_that_task_management_ends_are_answered_before_it() {
    // Kind, its tag, which of the tags 10 and 11 end and how, and what the unit then reports.
    for (kind, tag, ended, response, attention) in [
        (0, 11, &[11][..], 2, false),
        (1, 0, &[10, 11], 2, false),
        (3, 0, &[10, 11], 2, false),
        (4, 0, &[10, 11], 4, true),
        (5, 0, &[10, 11], 4, true),
    ] {
        let guest = Guest::ready();
        with_reads_in_flight(&guest, |guest| guest.manage(kind, address(0, 0), tag));
        assert_eq!(guest.managed(), 0, "kind {kind}");
        let mut seen: Vec<_> = std::iter::from_fn(|| guest.done(2)).filter(|done| done.response == response).collect();
        seen.sort_by_key(|done| done.tag);
        assert_eq!(seen.iter().map(|done| done.tag).collect::<Vec<_>>(), ended, "kind {kind}");
        if ended.len() == 2 {
            guest.assert_quiet();
        } else {
            eventually("the other command's end", || guest.gate.waiting() == 0);
            while guest.done(2).is_some() {}
        }
        guest.submit(&Io::new(77, &[0; 6]));
        guest.notify(2);
        let mut done = guest.wait(2);
        while done.tag != 77 {
            done = guest.wait(2);
        }
        assert_eq!(
            (done.status, done.sense.get(12..14)),
            if attention { (2, Some(&[0x29, 3][..])) } else { (0, None) }
        );
    }
}

#[test]
fn queries_and_requests_about_nobody_have_their_own_responses() {
    let guest = Guest::ready();
    let ask = |kind, lun, tag| {
        guest.manage(kind, lun, tag);
        guest.managed()
    };
    guest.gate.close();
    guest.submit(&Io::new(5, &read_10(0, 1)).data(DATA, 512, true));
    guest.notify(2);
    eventually("the waiting read", || guest.gate.waiting() == 1);
    let here = address(0, 0);
    assert_eq!((ask(6, here, 5), ask(6, here, 6), ask(7, here, 0)), (10, 0, 10));
    assert_eq!((ask(0, here, 6), ask(2, here, 0), ask(9, here, 0)), (0, 0, 11));
    assert_eq!((ask(0, address(1, 0), 5), ask(0, address(0, 1), 5)), (3, 12));
    guest.gate.open();
    assert_eq!(guest.wait(2).status, 0);
    assert_eq!((ask(6, here, 5), ask(7, here, 0)), (0, 0));
    // Asynchronous notifications: none is there.
    let area = guest.area(0);
    guest.set_bytes(area, &[1, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    guest.set_bytes(area + 128, &[0xEE; 6]);
    guest.put(0, &[(area, 16, false), (area + 128, 5, true)]);
    guest.notify(0);
    eventually("the answer", || guest.take(0).is_some());
    assert_eq!(guest.bytes(area + 128, 6), [0, 0, 0, 0, 0, 0xEE]);
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_then_nothing_answers() {
    let guest = Guest::ready();
    with_reads_in_flight(&guest, |guest| guest.adapter.stop().unwrap());
    guest.assert_quiet();
    guest.notify(2);
    guest.write(0x14, &[0]);
    guest.adapter.reset();
    guest.adapter.stop().unwrap();
    guest.assert_quiet();
}
