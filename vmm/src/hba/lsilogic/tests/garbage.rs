//! Garbage from a guest never panics the adapter and never keeps it busy for ever.

use proptest::prelude::*;

use super::guest::*;
use crate::hba::HostBusAdapter;

/// One thing that a guest may do.
#[derive(Clone, Debug)]
enum Deed {
    Write(u64, u32),
    Read(u64),
    Message(Vec<u32>),
    Frame(Vec<u8>),
    Io { cdb: Vec<u8>, control: u32, length: u32, chain: u8, list: Vec<u8>, target: u8 },
    Memory(u64, Vec<u8>),
}

fn deed() -> impl Strategy<Value = Deed> {
    let offset = prop_oneof![
        Just(0x00u64),
        Just(0x04),
        Just(0x08),
        Just(0x30),
        Just(0x34),
        Just(0x40),
        Just(0x44),
        0u64..0x60,
        any::<u64>()
    ];
    let value = prop_oneof![
        Just(0x4000_0000u32),
        Just(0x4203_0000),
        (0u32..=255).prop_map(|words| 0x4200_0000 | words << 16),
        0u32..16,
        0u32..MEMORY as u32,
        any::<u32>()
    ];
    let bytes = || prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..48, 1 => any::<u8>()], 0..128);
    let element = prop_oneof![
        (any::<u8>(), any::<u32>(), any::<u32>()).prop_map(|(flags, address, length)| simple32(
            flags,
            address,
            length & 0xFF_FFFF
        )),
        (0u32..0x40).prop_map(|at| chain32(LISTS as u32 + 4 * at, 64, 1)),
        (0x10u8..0x14, 0u32..MEMORY as u32, 0u32..2048).prop_map(|(flags, address, length)| simple64(
            flags,
            address.into(),
            length
        )),
    ];
    let list = prop::collection::vec(element, 0..6).prop_map(|list| list.concat());
    let io = (bytes(), prop_oneof![Just(IN), Just(OUT), any::<u32>()], 0u32..4096, any::<u8>(), list.clone(), 0u8..3)
        .prop_map(|(mut cdb, control, length, chain, mut list, target)| {
            cdb.truncate(16);
            list.truncate(80);
            Deed::Io { cdb, control, length, chain, list, target }
        });
    let words = prop::collection::vec(
        prop_oneof![2 => Just(0u32), 1 => (0u32..0x20).prop_map(|function| function << 24), 1 => any::<u32>()],
        1..32,
    );
    prop_oneof![
        (offset.clone(), value).prop_map(|(offset, value)| Deed::Write(offset, value)),
        offset.prop_map(Deed::Read),
        words.prop_map(Deed::Message),
        bytes().prop_map(Deed::Frame),
        io,
        (LISTS..LISTS + 0x100, list).prop_map(|(address, list)| Deed::Memory(address, list)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_registers_and_frames_leave_the_adapter_alive(deeds in prop::collection::vec(deed(), 1..40)) {
        let guest = Guest::ready();
        for deed in deeds {
            match deed {
                Deed::Write(offset, value) => guest.write(offset, value),
                Deed::Read(offset) => {
                    guest.read(offset);
                }
                Deed::Message(words) => {
                    guest.write(0x00, 0x4200_0000 | (words.len() as u32) << 16);
                    words.into_iter().for_each(|word| guest.write(0x00, word));
                    (0..8).for_each(|_| {
                        guest.read(0x00);
                    });
                }
                Deed::Frame(bytes) => guest.post(&bytes[..bytes.len().min(128)]),
                Deed::Io { cdb, control, length, chain, list, target } => {
                    let mut io = Io::new(9, &cdb).list(control, length, chain, list).for_target(target);
                    io.sense = length;
                    guest.post(&io.frame());
                }
                Deed::Memory(address, bytes) => guest.set_bytes(address, &bytes),
            }
        }
        // Whatever has happened: a reset by the keys works, and then the disk does.
        [0xF, 4, 0xB, 2, 7, 0xD].iter().for_each(|&key| guest.write(0x04, key));
        guest.write(0x08, 0x04);
        prop_assert_eq!(guest.read(0x00) >> 24, 0x10);
        guest.bring_up();
        let works = (0..8).any(|_| guest.run(Io::new(1, &[0; 6])) == Answer::Context(1));
        prop_assert!(works);
        guest.adapter.stop().unwrap();
    }
}
