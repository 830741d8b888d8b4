//! Garbage from a guest never panics the adapter and never keeps it busy for ever.

use proptest::prelude::*;

use super::guest::*;
use crate::hba::HostBusAdapter;

#[test]
fn rings_that_lie_need_a_reset_which_helps() {
    let guest = Guest::ready();
    type Lie = (&'static str, fn(&Guest));
    let lies: [Lie; 6] = [
        ("available index", |guest| guest.set_bytes(QUEUES + 0x2_0000 + AVAILABLE + 2, &[0xFF, 0x7F])),
        ("head outside of the table", |guest| {
            guest.submit(&Io::new(1, &[0; 6]));
            guest.set_bytes(QUEUES + 0x2_0000 + AVAILABLE + 4, &[0xFF; 256]);
        }),
        ("chain to itself", |guest| {
            guest.submit(&Io::new(1, &[0; 6]));
            (0..128).for_each(|index| guest.set_bytes(QUEUES + 0x2_0000 + 16 * index + 12, &[1, 0, index as u8, 0]));
        }),
        ("no room for the response", |guest| {
            guest.put(2, &[(DATA, 51, false), (DATA, 107, true)]);
        }),
        ("indirect table in an indirect table", |guest| {
            guest.indirect.set(true);
            guest.submit(&Io::new(1, &[0; 6]));
            guest.indirect.set(false);
            (0..16).for_each(|chain| guest.set_bytes(QUEUES + 0x2_8000 + 0x400 * chain + 12, &[4, 0]));
        }),
        ("response outside of memory", |guest| {
            guest.put(2, &[(DATA, 51, false), (MEMORY as u64, 108, true)]);
        }),
    ];
    for (name, lie) in lies {
        guest.read(0x1000, 1);
        lie(&guest);
        guest.notify(2);
        eventually(name, || guest.read(0x14, 1) & 64 != 0);
        eventually(name, || guest.read(0x1000, 1) & 2 != 0);
        guest.bring_up();
        assert_eq!(guest.read(0x14, 1), 15, "{name}");
        assert_eq!(guest.run(&Io::new(2, &[0; 6])).status, 0, "{name}");
    }
    // Rings outside of memory are not started.
    guest.write(0x14, &[0]);
    (0..2u32).for_each(|select| {
        guest.write(0x08, &select.to_le_bytes());
        guest.write(0x0C, &select.to_le_bytes());
    });
    guest.write(0x14, &[11]);
    guest.write(0x16, &[2, 0]);
    guest.write(0x20, &(MEMORY as u64).to_le_bytes());
    guest.write(0x1C, &[1, 0]);
    guest.write(0x14, &[15]);
    assert_eq!(guest.read(0x14, 1), 15 | 64);
}

/// One thing that a guest may do.
#[derive(Clone, Debug)]
enum Deed {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Chain(u16, Vec<Buffer>),
    Io { queue: u16, lun: [u8; 8], cdb: Vec<u8>, data: Vec<Buffer>, indirect: bool },
    Memory(u64, Vec<u8>),
}

fn deed() -> impl Strategy<Value = Deed> {
    let bytes = || prop::collection::vec(prop_oneof![4 => Just(0u8), 2 => 0u8..48, 1 => any::<u8>()], 0..33);
    let offset = prop_oneof![0u64..0x40, Just(0x1000), 0x2000u64..0x2030, Just(0x3000), any::<u64>()];
    let place = prop_oneof![3 => DATA..DATA + 0x1000, 1 => 0u64..MEMORY as u64, 1 => any::<u64>()];
    let buffer = (place, prop_oneof![0u32..2048, any::<u32>()], any::<bool>());
    let buffers = || prop::collection::vec(buffer.clone(), 1..6);
    let lun = prop_oneof![3 => Just(address(0, 0)), 1 => any::<[u8; 8]>()];
    prop_oneof![
        (offset.clone(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(offset, data)| Deed::Write(offset, data)),
        (offset, 1usize..9).prop_map(|(offset, length)| Deed::Read(offset, length)),
        (0u16..6, buffers()).prop_map(|(queue, chain)| Deed::Chain(queue, chain)),
        (2u16..6, lun, bytes(), buffers(), any::<bool>()).prop_map(|(queue, lun, mut cdb, mut data, indirect)| {
            cdb.truncate(32);
            data.truncate(2);
            Deed::Io { queue, lun, cdb, data, indirect }
        }),
        (QUEUES..QUEUES + 0x6_0000, bytes()).prop_map(|(address, bytes)| Deed::Memory(address, bytes)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_registers_and_chains_leave_the_adapter_alive(deeds in prop::collection::vec(deed(), 1..40)) {
        let guest = Guest::ready();
        for deed in deeds {
            match deed {
                Deed::Write(offset, data) => guest.write(offset, &data),
                Deed::Read(offset, length) => {
                    guest.read(offset, length);
                }
                Deed::Chain(queue, buffers) => {
                    guest.put(queue, &buffers);
                    guest.notify(queue);
                }
                Deed::Io { queue, lun, cdb, data, indirect } => {
                    guest.indirect.set(indirect);
                    guest.submit(&Io { queue, lun, data, ..Io::new(9, &cdb) });
                    guest.notify(queue);
                    guest.indirect.set(false);
                }
                Deed::Memory(address, bytes) => guest.set_bytes(address, &bytes),
            }
        }
        // Whatever has happened: a reset works, and then the disk does.
        guest.bring_up();
        let works = (0..8).any(|tag| guest.run(&Io::new(tag, &[0; 6])).status == 0);
        prop_assert!(works);
        guest.adapter.stop().unwrap();
    }
}
