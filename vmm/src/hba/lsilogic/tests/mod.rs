//! Promises of the adapter as a guest sees them.

mod garbage;
mod guest;
mod probes;
mod resets;

use std::sync::atomic::Ordering;

use self::guest::*;

#[test]
fn data_go_through_lists_of_all_shapes() {
    let guest = Guest::ready();
    let data: Vec<u8> = (0..2048).map(|index| (index * 7 / 3) as u8).collect();
    guest.set_bytes(DATA, &data);
    let write = Io::new(1, &write_10(8, 4)).data(OUT, DATA, 2048);
    assert_eq!(guest.run(write), Answer::Context(1));
    let target = DATA + 0x1_0000;
    // Two elements in the frame, then a chain of 32 bits, then one of 64 bits within that segment.
    let second = [simple32(0x10, target as u32 + 300, 700), simple64(0x92, target + 1000, 24)].concat();
    let third = [simple64(0x12, target + 1024, 1000), simple32(0xD1, target as u32 + 2024, 400)].concat();
    let chain64 = simple64(0x32, LISTS + 0x100, third.len() as u32);
    guest.set_bytes(LISTS, &[second.clone(), chain64].concat());
    guest.set_bytes(LISTS + 0x100, &third);
    let first = [simple64(0x12, target, 100), simple32(0x90, target as u32 + 100, 200)].concat();
    let chain_at = ((0x30 + first.len()) / 4) as u8;
    let chain = chain32(LISTS as u32, second.len() as u16 + 12, (second.len() / 4) as u8);
    let io = Io::new(2, &read_10(8, 4)).list(IN, 2048, chain_at, [first, chain].concat());
    assert_eq!(guest.run(io), Answer::Context(2));
    assert_eq!(guest.bytes(target, 2048), data);
    assert_eq!(guest.bytes(target + 2048, 376), [0; 376]);
    // A chain element that is simply next, without its offset being said.
    let short = [simple32(0x10, target as u32, 512), chain32(LISTS as u32 + 0x200, 8, 0)].concat();
    guest.set_bytes(LISTS + 0x200, &simple32(0xD1, target as u32 + 512, 512));
    guest.set_bytes(target, &[0; 1024]);
    assert_eq!(guest.run(Io::new(3, &read_10(8, 2)).list(IN, 1024, 0, short)), Answer::Context(3));
    assert_eq!(guest.bytes(target, 1024), data[..1024]);
}

#[test]
fn a_short_transfer_is_an_underrun_with_its_true_count() {
    let guest = Guest::ready();
    guest.set_bytes(DATA, &[0xAA; 255]);
    let answer = guest.run(Io::new(1, &[0x12, 1, 0xB2, 0, 255, 0]).data(IN, DATA, 255));
    assert_eq!(outcome(answer), (0x45, 0, 0, 8));
    assert_eq!(guest.bytes(DATA + 8, 247), [0xAA; 247]);
    // A command that wants more than there is room for moves what fits.
    let answer = guest.run(Io::new(2, &read_10(0, 2)).data(IN, DATA, 512));
    assert_eq!(outcome(answer), (0x44, 0, 0, 512));
}

#[test]
fn a_check_condition_brings_its_sense_data() {
    let guest = Guest::ready();
    guest.set_bytes(SENSE, &[0xAA; 32]);
    let reply = guest.run(Io::new(1, &[0xC1; 6])).message();
    assert_eq!((reply[2], reply[0x0C], reply[0x0D], word(&reply, 0x18)), (9, 2, 1, 18));
    let sense = guest.bytes(SENSE, 19);
    assert_eq!((sense[0], sense[2], sense[12], sense[18]), (0x70, 5, 0x20, 0xAA));
    // With data that were asked for, it is an underrun too; a sense buffer outside RAM is told.
    let mut io = Io::new(2, &[0xC1; 6]).data(IN, DATA, 36);
    assert_eq!(outcome(guest.run(io.clone())), (0x45, 2, 1, 0));
    io.sense = MEMORY as u32 - 4;
    assert_eq!(outcome(guest.run(io)), (0x45, 2, 2, 0));
}

#[test]
fn absent_targets_are_not_there_and_absent_units_answer_for_themselves() {
    let guest = Guest::ready();
    for (target, status) in [(1, 0x43), (7, 0x43), (15, 0x43), (16, 0x42), (255, 0x42)] {
        let answer = guest.run(Io::new(5, &[0; 6]).for_target(target));
        assert_eq!(outcome(answer), (status, 0, 4, 0), "target {target}");
    }
    let mut io = Io::new(6, &[0; 6]);
    io.bus = 1;
    assert_eq!(outcome(guest.run(io)).0, 0x41);
    let mut io = Io::new(7, &[0x12, 0, 0, 0, 36, 0]).data(IN, DATA, 36);
    io.lun = 1;
    assert_eq!((guest.run(io), guest.bytes(DATA, 1)), (Answer::Context(7), vec![0x7F]));
    let mut io = Io::new(8, &[0; 6]);
    io.lun = 1;
    assert_eq!((outcome(guest.run(io)).1, guest.bytes(SENSE + 12, 2)), (2, vec![0x25, 0]));
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let guest = Guest::ready();
    let read = Io::new(1, &read_10(0, 1));
    for address in [MEMORY as u64, MEMORY as u64 - 100, 0xFFFF_FF00] {
        let answer = guest.run(read.clone().data(IN, address, 512));
        assert_eq!(outcome(answer), (3, 0, 4, 0), "data at {address:x}");
        let list = chain32(address as u32, 16, 0);
        assert_eq!(outcome(guest.run(read.clone().list(IN, 512, 0, list))).0, 3, "list at {address:x}");
    }
    let wide = simple64(0xD3, 1 << 52, 512);
    assert_eq!(outcome(guest.run(read.clone().list(IN, 512, 0, wide))).0, 3);
    // A list that is shorter than the data, one with an unknown type, one that leads to itself.
    assert_eq!(outcome(guest.run(read.clone().list(IN, 512, 0, simple32(0xD1, DATA as u32, 100)))).0, 3);
    assert_eq!(outcome(guest.run(read.clone().list(IN, 512, 0, simple32(0x81, DATA as u32, 512)))).0, 3);
    guest.set_bytes(LISTS, &chain32(LISTS as u32, 8, 0));
    assert_eq!(outcome(guest.run(read.clone().list(IN, 512, 0, chain32(LISTS as u32, 8, 0)))).0, 3);
    for control in [3 << 24, 3 << 8, 7 << 8] {
        assert_eq!(outcome(guest.run(read.clone().data(control, DATA, 512))).0, 7, "control {control:x}");
    }
    let mut long = read.data(IN, DATA, 512);
    long.cdb = vec![0; 17];
    assert_eq!(outcome(guest.run(long)).0, 7);
    // Functions that are unknown or that there is no firmware for.
    for (function, status) in [(0x15, 1), (0x16, 1), (0x17, 1), (0x09, 1), (0x12, 1), (0xFF, 1), (0x08, 0)] {
        let mut frame = vec![0; 32];
        frame[3] = function;
        guest.post(&frame);
        assert_eq!(word(&guest.wait().message(), 0x0C) >> 16, status, "function {function:x}");
    }
}

#[test]
fn a_message_in_the_wrong_state_is_told_so() {
    let guest = Guest::new();
    for words in [&[0x0600_0000, 0, 0][..], &[0x0700_0001, 0, 0], &[0x0400_0000, 0, 0, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(word(&guest.handshake(words), 0x0C) >> 16, 8);
    }
    assert_eq!(guest.read(0x00) >> 24, 0x10);
    // The message unit takes nothing but what leads out of the fault.
    guest.bring_up();
    guest.write(0x40, 0xFFFF_0000);
    eventually("the fault", || guest.read(0x00) >> 28 == 4);
    assert_eq!(guest.read(0x00) & 0xFFFF, 0x8112);
    guest.write(0x00, 0x4000_0000);
    assert_eq!(guest.read(0x00) >> 24, 0x10);
    guest.bring_up();
    assert_eq!(outcome(guest.run(Io::new(1, &[0; 6]))).1, 2);
}

#[test]
fn every_credit_can_be_used_at_once_and_frames_are_waited_for() {
    let guest = Guest::ready();
    for round in 0..4 {
        for context in 0..256 {
            guest.post(&Io::new(round << 8 | context, &read_10(0, 1)).data(IN, DATA, 512).frame());
        }
        let mut contexts: Vec<u32> = (0..256).map(|_| guest.wait().context() & 0xFF).collect();
        contexts.sort();
        assert_eq!(contexts, (0..256).collect::<Vec<_>>());
    }
    // More failures than there are reply frames: the rest waits until frames are lent again.
    for context in 0..100 {
        guest.post(&Io::new(context, &[0xC1; 6]).frame());
    }
    let mut replies = Vec::new();
    eventually("the lent frames' use", || {
        let reply = guest.read(0x44);
        if reply != u32::MAX {
            replies.push(reply << 1);
        }
        replies.len() == REPLY_FRAMES as usize
    });
    assert_eq!(guest.read(0x44), u32::MAX);
    let mut contexts: Vec<u32> = replies.iter().map(|&frame| word(&guest.bytes(frame.into(), 12), 8)).collect();
    replies.into_iter().for_each(|frame| guest.write(0x44, frame));
    contexts.extend((REPLY_FRAMES..100).map(|_| guest.wait().context()));
    contexts.sort();
    assert_eq!(contexts, (0..100).collect::<Vec<_>>());
}

#[test]
fn intx_is_high_while_there_are_replies_and_they_are_not_masked() {
    let guest = Guest::ready();
    assert_eq!((guest.read(0x44), guest.line.level.load(Ordering::SeqCst)), (u32::MAX, false));
    guest.post(&Io::new(1, &[0; 6]).frame());
    eventually("the level", || guest.line.level.load(Ordering::SeqCst));
    assert_eq!(guest.read(0x30) & 8, 8);
    guest.write(0x30, 0);
    assert!(guest.line.level.load(Ordering::SeqCst), "a write to the status does not end it");
    guest.write(0x34, 9);
    assert!(!guest.line.level.load(Ordering::SeqCst));
    guest.write(0x34, 1);
    assert!(guest.line.level.load(Ordering::SeqCst));
    assert_eq!(guest.take(), Some(Answer::Context(1)));
    assert_eq!((guest.take(), guest.line.level.load(Ordering::SeqCst)), (None, false));
    assert_eq!(guest.line.messages.load(Ordering::SeqCst), 0);
}

#[test]
fn disks_come_and_go_with_an_event() {
    let guest = Guest::ready();
    assert_eq!(guest.handshake(&[0x0700_0001, 0, 0x99])[0x14], 0x0A);
    guest.adapter.attach(disk(3, &guest.gate)).unwrap();
    let event = guest.wait().message();
    assert_eq!((event[3], event[7], word(&event, 8), word(&event, 0x14)), (7, 0x80, 0x99, 6));
    assert_eq!(outcome(guest.run(Io::new(1, &[0; 6]).for_target(3))).1, 2);
    guest.adapter.detach(3).unwrap();
    assert_eq!(word(&guest.wait().message(), 0x14), 6);
    assert_eq!(outcome(guest.run(Io::new(2, &[0; 6]).for_target(3))).0, 0x43);
    for target in [7, 16, 255] {
        assert!(guest.adapter.attach(disk(target, &guest.gate)).is_err());
    }
    // Switched off again: nothing comes.
    guest.handshake(&[0x0700_0000, 0, 0x99]);
    guest.adapter.attach(disk(3, &guest.gate)).unwrap();
    guest.run(Io::new(3, &[0; 6]).for_target(3));
    assert_eq!(guest.take(), None);
}
