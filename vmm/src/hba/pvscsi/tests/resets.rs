//! Resets, aborts and stops are synchronous for guest memory, whatever the storage is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::guest::*;
use super::status;
use crate::hba::HostBusAdapter;
use crate::hba::testing::Gate;

/// Starts two reads that wait at the gate and leaves a third in the ring, then writes `command` while the gate is still
/// closed. Returns when the register write has returned; it must not before the gate was opened.
fn with_reads_in_flight(guest: &mut Guest, command: u32, words: &[u32]) {
    guest.set_bytes(DATA, &[0x55; 4096]);
    guest.gate.close();
    for context in [10, 11] {
        guest.put(&Io::new(context, &read_10(0, 1)).into_guest(DATA + context * 512, 512));
    }
    guest.kick();
    eventually("two waiting reads", || guest.gate.waiting() == 2);
    guest.put(&Io::new(12, &read_10(0, 1)).into_guest(DATA, 512));

    let gate = guest.gate.clone();
    let early = returns_before_the_gate_opens(&gate, || _ = guest.command(command, words));
    assert!(!early, "the write returned while the storage was at work");
}

#[test]
fn a_bus_reset_answers_everything_before_the_register_write_returns() {
    let mut guest = Guest::ready();
    with_reads_in_flight(&mut guest, 4, &[]);
    let mut answers: Vec<_> =
        (0..3).map(|_| guest.take().map(|entry| (entry.context.get(), status(&entry))).unwrap()).collect();
    answers.sort();
    assert_eq!(answers, [(10, (0x22, 0)), (11, (0x22, 0)), (12, (0x22, 0))]);
    guest.assert_quiet();
    // The next command is told; after that the disk works.
    let attention = guest.run(Io::new(1, &[0; 6]));
    assert_eq!((status(&attention), guest.bytes(SENSE + 12, 2)), ((0, 2), vec![0x29, 2]));
    assert_eq!(status(&guest.run(Io::new(2, &read_10(0, 1)).into_guest(DATA, 512))), (0, 0));
}

#[test]
fn an_adapter_reset_forgets_everything_and_touches_no_memory_afterwards() {
    let mut guest = Guest::ready();
    let produced = guest.state(0x0C);
    with_reads_in_flight(&mut guest, 1, &[]);
    assert_eq!(guest.state(0x0C), produced);
    guest.assert_quiet();
    guest.put(&Io::new(13, &read_10(0, 1)).into_guest(DATA, 512));
    guest.kick();
    guest.assert_quiet();
    assert_eq!(guest.set_up_rings(2), 0);
    assert_eq!(guest.run(Io::new(1, &[0; 6])).scsi_status.get(), 2);
}

#[test]
fn a_device_reset_ends_only_the_requests_of_its_target() {
    let mut guest = Guest::ready();
    let other = Arc::new(Gate::default());
    guest.adapter.attach(disk(1, &other)).unwrap();
    guest.run(Io::new(0, &[0; 6]).for_target(1));
    other.close();
    guest.put(&Io::new(20, &read_10(0, 1)).into_guest(DATA + 0x2000, 512).for_target(1));
    with_reads_in_flight(&mut guest, 5, &[0, 0, 0]);
    let mut answers: Vec<_> =
        (0..3).map(|_| guest.take().map(|entry| (entry.context.get(), status(&entry))).unwrap()).collect();
    answers.sort();
    assert_eq!(answers, [(10, (0x25, 0)), (11, (0x25, 0)), (12, (0x25, 0))]);
    assert!(guest.take().is_none());
    other.open();
    assert_eq!((guest.wait().context.get(), guest.take().is_none()), (20, true));
    assert_eq!((guest.run(Io::new(1, &[0; 6])).scsi_status.get(), guest.bytes(SENSE + 12, 2)), (2, vec![0x29, 3]));
    assert_eq!(status(&guest.run(Io::new(1, &[0; 6]).for_target(1))), (0, 0));
}

#[test]
fn an_abort_ends_one_request_and_leaves_the_others() {
    let mut guest = Guest::ready();
    with_reads_in_flight(&mut guest, 6, &[11, 0, 0, 0]);
    let mut answers: Vec<_> = (0..3).map(|_| guest.wait()).map(|entry| (entry.context.get(), status(&entry))).collect();
    answers.sort();
    assert_eq!(answers, [(10, (0, 0)), (11, (0x26, 0)), (12, (0, 0))]);
}

#[test]
fn a_request_that_still_waits_in_the_ring_is_aborted_at_once() {
    let mut guest = Guest::ready();
    guest.gate.close();
    guest.put(&Io::new(30, &read_10(0, 1)).into_guest(DATA, 512));
    assert_eq!(guest.command(6, &[30, 0, 0, 0]), 0);
    assert_eq!(status(&guest.take().unwrap()), (0x26, 0));
    // Unknown, and ended already: nothing happens.
    assert_eq!(guest.command(6, &[30, 0, 0, 0]), 0);
    assert_eq!(guest.command(6, &[31, 0, 99, 0]), 0);
    assert!(guest.take().is_none());
}

#[test]
fn a_stop_waits_for_what_is_in_flight() {
    let guest = Guest::ready();
    guest.set_bytes(DATA, &[0x55; 512]);
    guest.gate.close();
    guest.put(&Io::new(1, &read_10(0, 1)).into_guest(DATA, 512));
    guest.kick();
    eventually("a waiting read", || guest.gate.waiting() == 1);
    std::thread::scope(|scope| {
        let stopper = scope.spawn(|| guest.adapter.stop());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stopper.is_finished());
        guest.gate.open();
        stopper.join().unwrap().unwrap();
    });
    guest.assert_quiet();
}

#[test]
fn a_guest_that_never_stops_kicking_cannot_keep_a_reset_waiting() {
    let guest = Guest::ready();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Requests that the storage answers at once, put faster than they are taken; completions are never taken.
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if guest.state(0).wrapping_sub(guest.state(4)) < 32 {
                    guest.put(&Io::new(1, &[0; 6]));
                }
                guest.set_state(0x10, guest.state(0x0C));
                guest.kick();
            }
        });
        for _ in 0..20 {
            assert_eq!(guest.command(4, &[]), 0);
        }
        done.store(true, Ordering::SeqCst);
    });
}
