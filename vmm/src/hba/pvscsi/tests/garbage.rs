//! Garbage from a guest never panics the adapter and never keeps it busy for ever.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::guest::*;
use super::status;
use crate::hba::HostBusAdapter;

#[test]
fn indices_that_lie_kill_the_rings_and_nothing_else() {
    let mut guest = Guest::ready();
    let (consumed, produced) = (guest.state(4), guest.state(0x0C));
    guest.set_state(0, consumed.wrapping_add(33));
    guest.kick();
    // A command's return says that the queue has looked.
    assert_eq!(guest.command(6, &[1, 0, 0, 0]), 0);
    // Dead until a reset: even true indices are not looked at.
    guest.set_state(0, consumed);
    assert_eq!(guest.command(4, &[]), 0);
    guest.put(&Io::new(1, &[0; 6]));
    guest.kick();
    assert_eq!(guest.command(4, &[]), 0);
    assert_eq!((guest.state(4), guest.state(0x0C)), (consumed, produced));
    assert_eq!(guest.command(1, &[]), 0);
    assert_eq!(guest.set_up_rings(1), 0);
    assert_eq!(guest.run(Io::new(2, &[0; 6])).scsi_status.get(), 2);
    assert_eq!(status(&guest.run(Io::new(3, &[0; 6]))), (0, 0));
}

#[test]
fn a_completion_consumer_that_lies_kills_the_rings() {
    let mut guest = Guest::ready();
    guest.set_state(0x10, 99);
    guest.put(&Io::new(1, &[0; 6]));
    guest.kick();
    eventually("the request's being taken", || guest.state(4) == 2);
    assert_eq!(guest.command(4, &[]), 0);
    assert!(guest.state(0x0C) == 1 && guest.take().is_none());
}

#[test]
fn rings_outside_ram_are_refused() {
    let guest = Guest::new();
    let mut words = vec![0; 132];
    words[..3].copy_from_slice(&[1, 1, 1]);
    (words[4], words[68]) = (0x10, 0x40);
    assert_eq!(guest.command(3, &words), 0);
    for (word, value) in [(2, 0x400), (4, 0x400), (68, 0x400), (3, 1), (5, u32::MAX), (69, 0xF_FFFF)] {
        let mut wrong = words.clone();
        wrong[word] = value;
        assert_eq!(guest.command(3, &wrong), u32::MAX, "word {word}");
    }
    // No rings: a message ring cannot be added either.
    let mut message_ring = vec![1, 0, 0x70];
    message_ring.resize(34, 0);
    assert_eq!(guest.command(8, &message_ring), u32::MAX);
}

/// One thing that a guest may do.
#[derive(Clone, Debug)]
enum Deed {
    Write(u64, u32),
    Words(u32, Vec<u32>),
    Memory(u64, Vec<u8>),
    Descriptor(u32, Vec<u8>),
    Produce(u32),
}

fn deed() -> impl Strategy<Value = Deed> {
    let offset =
        prop_oneof![Just(0u64), Just(4), Just(8), Just(0x100C), Just(0x2010), Just(0x3014), Just(0x4018), 0u64..0x9000];
    let small = prop_oneof![Just(0u32), 0u32..64, any::<u32>()];
    let bytes = prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..48, 1 => any::<u8>()], 0..200);
    prop_oneof![
        (offset, small.clone()).prop_map(|(offset, value)| Deed::Write(offset, value)),
        (0u32..12, prop::collection::vec(small.clone(), 0..140)).prop_map(|(number, words)| Deed::Words(number, words)),
        (0u64..0xA0000, bytes.clone()).prop_map(|(address, bytes)| Deed::Memory(address, bytes)),
        (0u32..32, bytes).prop_map(|(slot, bytes)| Deed::Descriptor(slot, bytes)),
        (0u32..40).prop_map(Deed::Produce),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_registers_and_rings_leave_the_adapter_alive(deeds in prop::collection::vec(deed(), 1..40)) {
        let mut guest = Guest::ready();
        for deed in deeds {
            match deed {
                Deed::Write(offset, value) => guest.write(offset, value),
                Deed::Words(number, words) => {
                    guest.command(number, &words);
                }
                Deed::Memory(address, bytes) => guest.set_bytes(address, &bytes),
                Deed::Descriptor(slot, bytes) => {
                    let address = REQUESTS + u64::from(slot) * 128;
                    guest.memory.write(&bytes[..bytes.len().min(128)], GuestAddress(address)).unwrap();
                }
                Deed::Produce(count) => {
                    guest.set_state(0, guest.state(4).wrapping_add(count));
                    guest.kick();
                }
            }
        }
        // Whatever has happened: a reset works, and then the disk does.
        prop_assert_eq!(guest.command(1, &[]), 0);
        prop_assert_eq!(guest.set_up_rings(1), 0);
        let mut completion = guest.run(Io::new(1, &[0; 6]));
        for _ in 0..8 {
            if completion.scsi_status.get() == 0 {
                break;
            }
            completion = guest.run(Io::new(1, &[0; 6]));
        }
        prop_assert_eq!(status(&completion), (0, 0));
        guest.adapter.stop().unwrap();
    }
}
