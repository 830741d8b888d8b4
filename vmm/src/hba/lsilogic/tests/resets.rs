//! Resets, aborts and stops are synchronous for guest memory, whatever the storage is doing.

use super::guest::*;
use crate::hba::HostBusAdapter;

/// Starts two reads that wait at the gate, then does `deed` while the gate is still closed; opens it a while later.
/// Returns whether `deed` returned before.
fn with_reads_in_flight(guest: &Guest, deed: impl FnOnce(&Guest)) -> bool {
    guest.set_bytes(DATA, &[0x55; 0x4000]);
    guest.gate.close();
    for context in [10, 11] {
        let address = DATA + u64::from(context) * 512;
        guest.post(&Io::new(context, &read_10(0, 1)).data(IN, address, 512).frame());
    }
    eventually("two waiting reads", || guest.gate.waiting() == 2);
    returns_before_the_gate_opens(&guest.gate, || deed(guest))
}

#[test]
fn every_kind_of_reset_forgets_everything_and_touches_no_memory_afterwards() {
    const KEYS: [u32; 6] = [0xF, 4, 0xB, 2, 7, 0xD];
    type Reset = (&'static str, fn(&Guest));
    let resets: [Reset; 4] = [
        ("message unit", |guest| guest.write(0x00, 0x4000_0000)),
        ("I/O unit", |guest| guest.write(0x00, 0x4100_0000)),
        ("adapter", |guest| {
            KEYS.iter().for_each(|&key| guest.write(0x04, key));
            guest.write(0x08, 0x04);
        }),
        ("platform", |guest| guest.adapter.reset()),
    ];
    let guest = Guest::ready();
    for (name, reset) in resets {
        assert!(!with_reads_in_flight(&guest, reset), "{name}: the write returned while the storage was at work");
        guest.assert_quiet();
        assert_eq!((guest.read(0x00) >> 24, guest.read(0x44), guest.read(0x30)), (0x10, u32::MAX, 0), "{name}");
        guest.bring_up();
        // Only the message unit's leaves the bus alone.
        let told = outcome_of_ready(&guest);
        assert_eq!(told, if name == "message unit" { 0 } else { 2 }, "{name}");
        assert_eq!(guest.run(Io::new(2, &read_10(0, 1)).data(IN, DATA, 512)), Answer::Context(2));
    }
}

fn outcome_of_ready(guest: &Guest) -> u8 {
    match guest.run(Io::new(1, &[0; 6])) {
        Answer::Context(_) => 0,
        message => outcome(message).1,
    }
}

#[test]
fn commands_that_task_management_ends_are_answered_before_it() {
    // Kind, its task, what ends of contexts 10 and 11, and what the unit then reports.
    for (kind, task, ended, attention) in [
        (1, 11, &[11][..], None),
        (2, 0, &[10, 11], None),
        (6, 0, &[10, 11], None),
        (3, 0, &[10, 11], Some([0x29, 3])),
        (5, 0, &[10, 11], Some([0x29, 3])),
        (4, 0, &[10, 11], Some([0x29, 2])),
    ] {
        for by_doorbell in [true, false] {
            let guest = Guest::ready();
            let frame = management(0x99, kind, 0, task);
            with_reads_in_flight(&guest, |guest| {
                if by_doorbell {
                    let words: Vec<u32> = frame.chunks_exact(4).map(|bytes| word(bytes, 0)).collect();
                    guest.send_by_doorbell(&words);
                    assert_eq!(guest.read(0x30) & 1, 1);
                    assert_eq!(guest.read(0x00) & 1 << 27, 0, "no reply by the doorbell");
                    guest.write(0x30, 0);
                } else {
                    guest.post(&frame);
                }
            });
            let mut seen = Vec::new();
            loop {
                let answer = guest.wait();
                if answer.context() == 0x99 {
                    let reply = answer.message();
                    assert_eq!((reply[2], reply[3], reply[4], reply[5]), (6, 1, 0, kind));
                    assert_eq!((word(&reply, 0x0C) >> 16, word(&reply, 0x14)), (0, ended.len() as u32));
                    break;
                }
                if ended.contains(&answer.context()) {
                    seen.push(answer.context());
                    assert_eq!(outcome(answer), (0x48, 0, 8, 0));
                }
            }
            seen.sort();
            assert_eq!(seen, ended, "kind {kind}");
            if ended.len() == 2 {
                guest.assert_quiet();
            }
            while guest.gate.waiting() > 0 {
                std::thread::yield_now();
            }
            let mut ready = guest.wait_for(Io::new(77, &[0; 6]));
            match attention {
                Some(code) => {
                    assert_eq!((outcome(ready).1, guest.bytes(SENSE + 12, 2)), (2, code.to_vec()));
                    ready = guest.wait_for(Io::new(78, &[0; 6]));
                    assert_eq!(ready, Answer::Context(78));
                }
                None => assert_eq!(ready, Answer::Context(77)),
            }
        }
    }
}

impl Guest {
    /// The answer to `io`, whatever else comes before.
    fn wait_for(&self, io: Io) -> Answer {
        self.post(&io.frame());
        loop {
            let answer = self.wait();
            if answer.context() == io.context {
                return answer;
            }
        }
    }
}

#[test]
fn a_bus_reset_is_told_as_an_event() {
    let guest = Guest::ready();
    guest.handshake(&[0x0700_0001, 0, 0x42]);
    guest.post(&management(0x99, 4, 0, 0));
    let event = guest.wait().message();
    assert_eq!((event[3], word(&event, 8), word(&event, 0x14)), (7, 0x42, 4));
    assert_eq!(guest.wait().context(), 0x99);
}

#[test]
fn tasks_are_found_while_they_run_and_not_afterwards() {
    let guest = Guest::ready();
    let query = |kind, task| {
        guest.post(&management(0x99, kind, 0, task));
        let reply = guest.wait().message();
        (reply[4], word(&reply, 0x14))
    };
    guest.gate.close();
    guest.post(&Io::new(5, &read_10(0, 1)).data(IN, DATA, 512).frame());
    assert_eq!(query(7, 5), (8, 0));
    assert_eq!((query(7, 6), query(1, 6), query(8, 0), query(9, 0)), ((0, 0), (0, 0), (0, 0), (4, 0)));
    guest.gate.open();
    assert_eq!(guest.wait(), Answer::Context(5));
    assert_eq!((query(7, 5), query(1, 5)), ((0, 0), (0, 0)));
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_then_nothing_answers() {
    let guest = Guest::ready();
    with_reads_in_flight(&guest, |guest| guest.adapter.stop().unwrap());
    guest.assert_quiet();
    guest.write(0x40, FRAMES as u32);
    guest.write(0x00, 0x4000_0000);
    guest.adapter.reset();
    guest.adapter.stop().unwrap();
    guest.assert_quiet();
}
