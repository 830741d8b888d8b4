//! Promises of the adapter as a guest sees them.

mod garbage;
mod guest;
mod resets;

use std::sync::atomic::Ordering;

use scsi::StorageError;
use vm_memory::{Bytes, GuestAddress};

use self::guest::*;
use super::entries::*;
use crate::hba::{AdapterError, HostBusAdapter};

fn status(completion: &CompletionEntry) -> (u16, u16) {
    (completion.host_status.get(), completion.scsi_status.get())
}

#[test]
fn the_probe_sequence_of_the_linux_driver_is_accepted() {
    let mut guest = Guest::new();
    // CONFIG comes before the first reset: the number of targets.
    guest.set_bytes(DATA, &[0xAA; 600]);
    assert_eq!(guest.command(7, &[DATA as u32, 0, 0, 0x2120, 0x1958, 0]), 0);
    assert_eq!(guest.bytes(DATA + 6, 2), [0, 0]);
    assert_eq!(guest.bytes(DATA + 0x1D8, 4), [65, 0, 0, 0]);
    assert_eq!(guest.bytes(DATA + 480, 120), [0xAA; 120]);
    guest.write(0, 1);
    // Is there a message ring? Only the command number is written.
    assert_ne!(guest.command(8, &[]), u32::MAX);
    assert_eq!(guest.set_up_rings(8), 0);
    assert_eq!((guest.state(0x08), guest.state(0x14), guest.state(0x18)), (8, 10, 0));
    let mut message_ring = vec![1, 0, (MESSAGES >> 12) as u32];
    message_ring.resize(34, 0);
    assert_eq!(guest.command(8, &message_ring), 0);
    assert_eq!(guest.state(0x88), 5);
    assert_ne!(guest.command(10, &[]), u32::MAX);
    assert_ne!(guest.command(10, &[1]), 0);
    guest.write(0x2010, 0xF);
    assert_eq!(guest.read(0x2010), 0xF);
    let completion = guest.run(Io::new(1, &[0x12, 0, 0, 0, 36, 0]).into_guest(DATA, 36));
    assert_eq!((status(&completion), completion.data_length.get()), ((0, 0), 36));
    assert_eq!(guest.bytes(DATA + 8, 8), b"VMware  ");
}

#[test]
fn unknown_commands_fail_and_unknown_registers_read_as_zero() {
    let guest = Guest::new();
    for number in [0, 2, 9, 11, 0xFFFF_FFFF] {
        assert_eq!(guest.command(number, &[]), u32::MAX, "command {number}");
    }
    assert_eq!(guest.command(7, &[DATA as u32, 0, 0, 0x2120, 0x1959, 0]), 0);
    assert_eq!(guest.bytes(DATA + 6, 2), [0x1A, 0]);
    assert_eq!(guest.command(7, &[0, 0x1000, 0, 0x2120, 0x1958, 0]), u32::MAX);
    for offset in [0x0, 0xC, 0x100, 0x3018, 0x7FFC, 0x8000, u64::MAX - 3] {
        assert_eq!(guest.read(offset), 0, "offset {offset:x}");
    }
    let mut parts = [0; 3];
    assert_eq!(guest.command(2, &[]), u32::MAX);
    guest.adapter.read(9, &mut parts);
    assert_eq!(parts, [0xFF; 3]);
}

#[test]
fn what_a_guest_writes_it_reads_back() {
    let mut guest = Guest::ready();
    let data: Vec<u8> = (0..4096u32).map(|index| (index % 251) as u8).collect();
    guest.set_bytes(DATA, &data);
    let written = guest.run(Io::new(1, &write_10(8, 8)).out_of_guest(DATA, 4096));
    assert_eq!((status(&written), written.data_length.get()), ((0, 0), 4096));
    let read = guest.run(Io::new(2, &read_10(8, 8)).into_guest(DATA + 8192, 4096));
    assert_eq!((status(&read), read.data_length.get()), ((0, 0), 4096));
    assert_eq!(guest.bytes(DATA + 8192, 4096), data);
}

#[test]
fn scattered_memory_and_chained_lists_are_one_transfer() {
    let mut guest = Guest::ready();
    let data: Vec<u8> = (0..1024u32).map(|index| (index % 241) as u8).collect();
    guest.set_bytes(DATA, &data);
    assert_eq!(status(&guest.run(Io::new(1, &write_10(0, 2)).out_of_guest(DATA, 1024))), (0, 0));
    let element = |at: u64, address: u64, length: u32, flags: u32| {
        guest.set_bytes(at, &[&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes()].concat());
    };
    let (list, next) = (0x90000, 0x91000);
    element(list, DATA + 0x10001, 100, 0);
    element(list + 16, 0, 0, 0);
    element(list + 32, next, 0, ELEMENT_CHAIN);
    element(next, DATA + 0x20000, 700, 0);
    // Longer than the request: the rest is ignored, and so is what follows.
    element(next + 16, DATA + 0x30000, 9000, 0);
    let mut io = Io::new(2, &read_10(0, 2)).into_guest(list, 1024);
    io.flags |= FLAG_SCATTER_GATHER;
    let completion = guest.run(io);
    assert_eq!((status(&completion), completion.data_length.get()), ((0, 0), 1024));
    assert_eq!(guest.bytes(DATA + 0x10001, 100), data[..100]);
    assert_eq!(guest.bytes(DATA + 0x20000, 700), data[100..800]);
    assert_eq!(guest.bytes(DATA + 0x30000, 300), [&data[800..], &[0; 76]].concat());
}

#[test]
fn a_short_transfer_is_a_success_with_its_true_length() {
    let mut guest = Guest::ready();
    guest.set_bytes(DATA, &[0xAA; 255]);
    let completion = guest.run(Io::new(1, &[0x12, 1, 0xB2, 0, 255, 0]).into_guest(DATA, 255));
    assert_eq!((status(&completion), completion.data_length.get()), ((0, 0), 8));
    assert_eq!(guest.bytes(DATA + 8, 247), [0xAA; 247]);
}

#[test]
fn a_transfer_longer_than_the_buffer_is_a_data_overrun() {
    let mut guest = Guest::ready();
    let completion = guest.run(Io::new(1, &read_10(0, 2)).into_guest(DATA, 512));
    assert_eq!(status(&completion), (0x12, 0));
}

#[test]
fn absent_targets_and_luns_time_out_at_selection() {
    let mut guest = Guest::ready();
    for target in [1, 7, 64, 65, 255] {
        let completion = guest.run(Io::new(5, &[0; 6]).for_target(target));
        assert_eq!(status(&completion), (0x11, 0), "target {target}");
    }
    let mut io = Io::new(6, &[0x12, 0, 0, 0, 36, 0]).into_guest(DATA, 36);
    io.lun = 1;
    assert_eq!(status(&guest.run(io)), (0x11, 0));
}

#[test]
fn a_check_condition_brings_its_sense_data() {
    let mut guest = Guest::ready();
    guest.set_bytes(SENSE, &[0xAA; 32]);
    let completion = guest.run(Io::new(1, &[0xFF; 6]));
    assert_eq!((status(&completion), completion.sense_length.get()), ((0, 2), 18));
    let sense = guest.bytes(SENSE, 19);
    assert_eq!((sense[0], sense[2], sense[12], sense[18]), (0x70, 5, 0x20, 0xAA));
    // No room for sense data is no error; a sense buffer outside RAM is one.
    let mut io = Io::new(2, &[0xFF; 6]);
    io.sense_address = MEMORY as u64 - 4;
    assert_eq!(status(&guest.run(io)), (0x1B, 0));
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut guest = Guest::ready();
    let outside = [MEMORY as u64, MEMORY as u64 - 100, u64::MAX - 10, 1 << 52];
    for address in outside {
        let completion = guest.run(Io::new(1, &read_10(0, 1)).into_guest(address, 512));
        assert_eq!(status(&completion), (0x1A, 0), "address {address:x}");
        let mut listed = Io::new(2, &read_10(0, 1)).into_guest(address, 512);
        listed.flags |= FLAG_SCATTER_GATHER;
        assert_eq!(status(&guest.run(listed)), (0x1A, 0), "list at {address:x}");
    }
    let huge = guest.run(Io::new(3, &read_10(0, 1)).into_guest(DATA, u64::MAX));
    assert_eq!(status(&huge), (0x1A, 0));
    let mut elsewhere = Io::new(4, &[0; 6]);
    elsewhere.flags |= FLAG_OUT_OF_BAND_CDB;
    assert_eq!(status(&guest.run(elsewhere)), (0x1A, 0));
}

#[test]
fn a_list_that_leads_to_itself_ends_in_an_error() {
    let mut guest = Guest::ready();
    guest.set_bytes(0x90000, &[&0x90000u64.to_le_bytes()[..], &[0; 4], &1u32.to_le_bytes()].concat());
    let mut io = Io::new(1, &read_10(0, 1)).into_guest(0x90000, 512);
    io.flags |= FLAG_SCATTER_GATHER;
    assert_eq!(status(&guest.run(io)), (0x1A, 0));
}

#[test]
fn the_rings_wrap() {
    let mut guest = Guest::ready();
    for context in 0..1000 {
        let block = (context % 200) as u8;
        guest.set_bytes(DATA, &[block; 512]);
        assert_eq!(status(&guest.run(Io::new(context, &write_10(block, 1)).out_of_guest(DATA, 512))), (0, 0));
    }
    assert_eq!((guest.state(0), guest.state(4)), (1001, 1001));
    let read = guest.run(Io::new(9, &read_10(7, 1)).into_guest(DATA, 512));
    assert_eq!((status(&read), guest.bytes(DATA, 512)), ((0, 0), vec![7; 512]));
}

#[test]
fn one_kick_is_enough_for_a_full_ring() {
    let mut guest = Guest::ready();
    for context in 0..32 {
        guest.put(&Io::new(context, &read_10(0, 1)).into_guest(DATA, 512));
    }
    guest.kick();
    let mut contexts: Vec<u64> = (0..32).map(|_| guest.wait().context.get()).collect();
    contexts.sort();
    assert_eq!(contexts, (0..32).collect::<Vec<_>>());
}

#[test]
fn answers_wait_for_room_in_the_completion_ring() {
    let mut guest = Guest::ready();
    // 128 entries in the completion ring: five rounds of 32 requests overfill it while the guest takes nothing.
    for round in 0..5 {
        for context in 0..32 {
            guest.put(&Io::new(round * 32 + context, &read_10(0, 1)).into_guest(DATA, 512));
        }
        guest.kick();
        eventually("the requests' being taken", || guest.state(4) == guest.state(0));
    }
    eventually("a full ring", || guest.state(0x0C) == 1 + 128);
    let mut contexts: Vec<u64> = (0..160).map(|_| guest.wait().context.get()).collect();
    contexts.sort();
    assert_eq!(contexts, (0..160).collect::<Vec<_>>());
}

#[test]
fn intx_is_the_level_of_status_and_mask() {
    let mut guest = Guest::ready();
    eventually("the level", || guest.line.level.load(Ordering::SeqCst));
    assert_eq!(guest.read(0x100C), 1);
    guest.write(0x100C, 1);
    assert!(!guest.line.level.load(Ordering::SeqCst));
    guest.write(0x2010, 0);
    guest.run(Io::new(1, &[0; 6]));
    eventually("the status", || guest.read(0x100C) == 1);
    assert!(!guest.line.level.load(Ordering::SeqCst));
    guest.write(0x2010, 3);
    assert!(guest.line.level.load(Ordering::SeqCst));
    assert_eq!(guest.line.messages.load(Ordering::SeqCst), 0);
    // A reset takes the interrupt back.
    guest.write(0, 1);
    assert!(!guest.line.level.load(Ordering::SeqCst));
    assert_eq!((guest.read(0x100C), guest.read(0x2010)), (0, 0));
}

#[test]
fn each_batch_sends_a_message_although_the_status_is_never_cleared() {
    let mut guest = Guest::ready();
    guest.write(0x100C, 0xF);
    guest.line.msi.store(true, Ordering::SeqCst);
    for round in 1..4 {
        guest.run(Io::new(round, &[0; 6]));
        eventually("a message", || guest.line.messages.load(Ordering::SeqCst) == round as usize);
        assert!(!guest.line.level.load(Ordering::SeqCst));
    }
    guest.write(0x2010, 0);
    guest.run(Io::new(9, &[0; 6]));
    assert_eq!(guest.read(0x100C), 1);
    assert_eq!(guest.line.messages.load(Ordering::SeqCst), 3);
}

#[test]
fn disks_come_and_go_with_a_message() {
    let mut guest = Guest::ready();
    let mut message_ring = vec![1, 0, (MESSAGES >> 12) as u32];
    message_ring.resize(34, 0);
    assert_eq!(guest.command(8, &message_ring), 0);
    guest.adapter.attach(disk(3, &guest.gate)).unwrap();
    assert_eq!((guest.state(0x80), guest.read(0x100C) & 0xC), (1, 4));
    assert_eq!(guest.bytes(MESSAGES, 12), [0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(status(&guest.run(Io::new(1, &[0; 6]).for_target(3))), (0, 2));
    assert!(matches!(guest.adapter.attach(disk(3, &guest.gate)), Err(AdapterError::TargetTaken { target: 3 })));
    guest.adapter.detach(3).unwrap();
    assert_eq!(guest.bytes(MESSAGES + 128, 12), [1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(status(&guest.run(Io::new(2, &[0; 6]).for_target(3))), (0x11, 0));
    for target in [7, 65, 255] {
        assert!(matches!(guest.adapter.attach(disk(target, &guest.gate)), Err(AdapterError::NoTarget { .. })));
    }
    assert!(matches!(guest.adapter.detach(3), Err(AdapterError::NoTarget { target: 3, .. })));
}

#[test]
fn a_disk_that_cannot_be_opened_is_named() {
    let memory = std::sync::Arc::new(crate::hba::GuestMemory::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
    let attachment = crate::hba::Attachment::<GatedDisk>::new(2, scsi::DiskOptions::default(), || async {
        Err(Box::new(StorageError::NotReady) as crate::hba::OpenError)
    });
    let line = std::sync::Arc::new(crate::hba::testing::Line::default());
    let error = super::PvScsi::start("test", memory, line, vec![attachment]).err().unwrap();
    assert_eq!(error.to_string(), "cannot open the disk of target 2: the device is not ready yet");
}

#[test]
fn after_a_stop_nothing_answers_and_nothing_hangs() {
    let mut guest = Guest::ready();
    guest.run(Io::new(1, &read_10(0, 1)).into_guest(DATA, 512));
    guest.adapter.stop().unwrap();
    guest.adapter.stop().unwrap();
    guest.put(&Io::new(2, &read_10(0, 1)).into_guest(DATA, 512));
    guest.kick();
    guest.write(0, 1);
    guest.adapter.reset();
    assert!(guest.take().is_none());
    assert!(matches!(guest.adapter.detach(0), Err(AdapterError::ThreadLost)));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(STATE + 4)).unwrap(), 2);
}

#[test]
fn a_kick_through_the_doorbell_descriptor_works_like_the_register() {
    let mut guest = Guest::ready();
    let doorbells = guest.adapter.doorbells().unwrap();
    assert_eq!(doorbells.iter().map(|bell| (bell.offset, bell.width)).collect::<Vec<_>>(), [(0x3014, 4), (0x4018, 4)]);
    for (context, bell) in doorbells.iter().enumerate() {
        guest.put(&Io::new(context as u64, &[0; 6]));
        bell.event.write(1).unwrap();
        assert_eq!(guest.wait().context.get(), context as u64);
    }
}
