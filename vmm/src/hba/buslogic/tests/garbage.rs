//! Garbage from a guest never panics the adapter and never keeps it busy for ever.

use proptest::prelude::*;

use super::guest::*;
use crate::hba::HostBusAdapter;

/// One thing that a guest may do.
#[derive(Clone, Debug)]
enum Deed {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Command(Vec<u8>),
    Mailbox(u64, Vec<u8>),
    Ccb { opcode: u8, flags: u8, target: u8, lun: u8, cdb: Vec<u8>, length: u32, data: u32, sense: u32 },
    Memory(u64, Vec<u8>),
}

fn deed() -> impl Strategy<Value = Deed> {
    let byte = || prop_oneof![3 => 0u8..4, 1 => any::<u8>()];
    let bytes = move |most| prop::collection::vec(byte(), 0..most);
    let offset = || prop_oneof![4 => 0u64..4, 1 => any::<u64>()];
    let address = || prop_oneof![4 => 0u32..MEMORY as u32 + 4096, 1 => any::<u32>()];
    let opcode = prop_oneof![
        Just(0x81u8),
        Just(0x01),
        Just(0x8F),
        Just(0x96),
        Just(0x90),
        Just(0x91),
        0u8..0x28,
        0x80u8..0xA0,
        any::<u8>()
    ];
    let list = prop::collection::vec((address(), 0u32..4096), 0..6).prop_map(|parts| {
        list(&parts.iter().map(|(address, length)| (u64::from(*address), *length)).collect::<Vec<_>>())
    });
    let ccb = (0u8..5, byte(), 0u8..3, byte(), bytes(16), 0u32..4096, address(), address()).prop_map(
        |(opcode, flags, target, lun, cdb, length, data, sense)| Deed::Ccb {
            opcode,
            flags: flags << 3,
            target,
            lun,
            cdb,
            length,
            data,
            sense,
        },
    );
    prop_oneof![
        (offset(), prop::collection::vec(byte(), 1..5)).prop_map(|(offset, bytes)| Deed::Write(offset, bytes)),
        (offset(), 1usize..5).prop_map(|(offset, length)| Deed::Read(offset, length)),
        (opcode, bytes(8)).prop_map(|(opcode, mut bytes)| {
            bytes.insert(0, opcode);
            Deed::Command(bytes)
        }),
        (0u64..u64::from(COUNT) * 2, bytes(9)).prop_map(|(number, bytes)| Deed::Mailbox(number, bytes)),
        ccb,
        (LISTS..LISTS + 0x100, list).prop_map(|(address, list)| Deed::Memory(address, list)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_registers_mailboxes_and_ccbs_leave_the_adapter_alive(deeds in prop::collection::vec(deed(), 1..40)) {
        let guest = Guest::ready();
        for (number, deed) in (0u64..).zip(deeds) {
            match deed {
                Deed::Write(offset, bytes) => guest.adapter.write(offset, &bytes),
                Deed::Read(offset, length) => guest.adapter.read(offset, &mut vec![0; length]),
                Deed::Command(bytes) => {
                    bytes.iter().for_each(|byte| guest.write(1, *byte));
                    (0..4).for_each(|_| {
                        guest.read(1);
                    });
                }
                Deed::Mailbox(number, bytes) => {
                    guest.set_bytes(MAILBOXES + 8 * number, &bytes);
                    guest.write(1, 0x02);
                }
                Deed::Ccb { opcode, flags, target, lun, cdb, length, data, sense } => {
                    let sense_length = length as u8;
                    let ccb = Ccb { opcode, flags, target, lun, cdb, length, data, sense_length, sense };
                    let address = guest.put(number, &ccb);
                    let mailbox = MAILBOXES + 8 * (number % u64::from(COUNT));
                    guest.set_bytes(mailbox, &[&(address as u32).to_le_bytes()[..], &[0, 0, 0, 1]].concat());
                    guest.write(1, 0x02);
                }
                Deed::Memory(address, bytes) => guest.set_bytes(address, &bytes),
            }
        }
        // Whatever has happened: a reset works, and then the disk does.
        guest.reset(0x80);
        guest.bring_up();
        let works = (0..8).any(|_| guest.run(1, &Ccb::new(&[0; 6])) == (0, 0, 1));
        prop_assert!(works);
        guest.adapter.stop().unwrap();
    }
}
