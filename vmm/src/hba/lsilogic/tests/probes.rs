//! What the drivers of Linux, FreeBSD and SeaBIOS do to the registers when they find the adapter, as data.

use super::guest::*;

/// One thing that a driver does.
enum Step {
    /// Writes a register.
    W(u64, u32),
    /// Reads a register: offset, the bits that it looks at, and what they must be.
    R(u64, u32, u32),
    /// Sends a message by the doorbell in Linux's way; some bytes of its reply must be these.
    M(&'static [u32], &'static [(usize, &'static [u8])]),
    /// Sends a message by the request FIFO; some bytes of its reply must be these.
    F(&'static [u32], &'static [(usize, &'static [u8])]),
}
use Step::{F, M, R, W};

fn replay(guest: &Guest, steps: &[Step]) {
    let check = |number: usize, reply: &[u8], expected: &[(usize, &[u8])]| {
        for (offset, bytes) in expected {
            let found = &reply[*offset..offset + bytes.len()];
            assert_eq!(found, *bytes, "step {number}, byte {offset:#x} of {reply:02x?}");
        }
    };
    for (number, step) in steps.iter().enumerate() {
        match *step {
            W(offset, value) => guest.write(offset, value),
            R(offset, mask, value) => assert_eq!(guest.read(offset) & mask, value, "step {number}"),
            M(words, expected) => check(number, &guest.handshake(words), expected),
            F(words, expected) => {
                guest.post(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
                check(number, &guest.wait().message(), expected);
            }
        }
    }
}

const IOC_FACTS: Step = M(
    &[0x0300_0000, 0, 0x1234],
    &[
        (0x00, &[0x02, 0x01, 15, 0x03]),
        (0x08, &[0x34, 0x12]),
        (0x0E, &[0, 0]),
        (0x14, &[0x80]),
        (0x16, &[8, 0, 0, 1, 32, 0]),
        (0x1E, &[0x04, 0x01]),
        (0x24, &[0, 1, 1, 0]),
        (0x2E, &[16, 1]),
        (0x34, &[0; 4]),
        (0x38, &[0x20, 0x29, 0x03, 0x01]),
    ],
);
const PORT_FACTS: Step =
    M(&[0x0500_0000, 0, 0], &[(2, &[10, 5]), (0x15, &[1]), (0x16, &[16, 0, 7, 0, 9, 0]), (0x0E, &[0, 0])]);
const PORT_ENABLE: Step = M(&[0x0600_0000, 0, 0], &[(2, &[5, 6]), (0x0E, &[0, 0])]);
const EVENTS_ON: Step =
    M(&[0x0700_0001, 0, 0x55], &[(0, &[1, 0, 8, 7]), (7, &[0x80, 0x55]), (0x14, &[0x0A, 0, 0, 0]), (0x1C, &[1])]);

/// CONFIG by the FIFO: action, header as {number, type}, address, and the header that comes back.
macro_rules! header {
    ($number:literal, $kind:literal, $header:expr) => {
        F(
            &[0x0400_0000, 0, 9, 0, 0, ($kind << 8 | $number) << 16, 0, 0xD000_0000, u32::MAX],
            &[(2, &[6, 4]), (0x0E, &[0, 0]), (0x14, $header)],
        )
    };
}

#[test]
fn the_linux_driver_brings_the_adapter_up() {
    let guest = Guest::new();
    // The adapter is READY; facts, then a diagnostic reset by the keys as in mpt_diag_reset, then all again.
    replay(
        &guest,
        &[
            R(0x00, 0xF000_0000, 0x1000_0000),
            R(0x34, 9, 9),
            W(0x34, u32::MAX),
            W(0x30, 0),
            IOC_FACTS,
            PORT_FACTS,
            W(0x04, 0xFF),
            W(0x04, 4),
            W(0x04, 0xB),
            W(0x04, 2),
            W(0x04, 7),
            W(0x04, 0xD),
            R(0x08, 0x80, 0x80),
            W(0x08, 0x82),
            R(0x08, 0x02, 0x02),
            W(0x08, 0x86),
            R(0x08, 0x80 | 0x40 | 0x20 | 0x04 | 0x02, 0x20),
            R(0x00, 0xF000_0000, 0x1000_0000),
            W(0x04, 0xFF),
            W(0x04, 4),
            W(0x04, 0xB),
            W(0x04, 2),
            W(0x04, 7),
            W(0x04, 0xD),
            W(0x08, 0x80),
            R(0x08, 0x20, 0),
            W(0x04, u32::MAX),
            R(0x08, 0x80, 0),
            IOC_FACTS,
            PORT_FACTS,
        ],
    );
    (0..REPLY_FRAMES).for_each(|number| guest.lend(number));
    replay(
        &guest,
        &[
            M(&[0x0200_0004, 0x0001_1000, 0, 80, 0, 0, 0, 0, 0, 0, 0], &[(0, &[4, 0, 5, 2, 0, 0x10, 1])]),
            R(0x00, 0xFF00_0000, 0x2400_0000),
            PORT_ENABLE,
            EVENTS_ON,
            W(0x34, 1),
            header!(0, 3, &[2, 3, 0, 3]),
            header!(2, 3, &[2, 19, 2, 0x23]),
            header!(1, 4, &[5, 4, 1, 0x14]),
            header!(0, 4, &[4, 3, 0, 4]),
            header!(1, 1, &[3, 4, 1, 0x11]),
            header!(4, 1, &[0, 3, 4, 1]),
            header!(2, 0, &[2, 8, 2, 0]),
            header!(0, 9, &[0, 19, 0, 9]),
        ],
    );
    // Port page 0 by a 32-bit element, and device page 1 written and read back by 64-bit ones.
    guest.set_bytes(DATA, &[0xAA; 32]);
    assert_eq!(guest.config(1, [0, 0, 0, 3], 0, &simple32(0xD1, DATA as u32, 12)).0, 0);
    assert_eq!(guest.bytes(DATA, 14), [2, 3, 0, 3, 0x00, 0x0A, 0x7F, 0x20, 3, 0, 0, 0, 0xAA, 0xAA]);
    guest.set_bytes(DATA, &[0, 0, 0, 0, 0x02, 0x0A, 0x7F, 0x20, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(2, [5, 4, 1, 0x14], 0, &simple64(0xD7, DATA, 16)).0, 0);
    assert_eq!(guest.config(1, [4, 3, 0, 4], 0, &simple64(0xD3, DATA, 12)).0, 0);
    assert_eq!(guest.bytes(DATA + 4, 8), [0x00, 0x0A, 0x7F, 0x20, 1, 0, 0, 0]);
    let inquiry = guest.run(Io::new(1, &[0x12, 0, 0, 0, 36, 0]).data(IN, DATA, 36));
    assert_eq!((inquiry, guest.bytes(DATA + 8, 8)), (Answer::Context(1), b"VMware  ".to_vec()));
}

#[test]
fn the_linux_driver_takes_over_from_firmware() {
    let guest = Guest::new();
    replay(
        &guest,
        &[
            M(&[0x0200_0002, 0x0001_0800, 0, 4, 0, 0], &[(0, &[2, 0, 5, 2])]),
            // It finds an operational adapter whose master is not a peer, and resets the message unit.
            R(0x00, 0xFF00_0000, 0x2200_0000),
            W(0x00, 0x4000_0000),
            R(0x30, 1 << 31, 0),
            R(0x00, 0xFF00_0000, 0x1000_0000),
            IOC_FACTS,
        ],
    );
    guest.bring_up();
    assert_eq!(outcome(guest.run(Io::new(1, &[0; 6]))).1, 2);
}

#[test]
fn the_freebsd_driver_writes_port_page_1_and_reads_it_back() {
    let guest = Guest::new();
    replay(&guest, &[W(0x00, 0x4000_0000), R(0x00, 0xF000_0000, 0x1000_0000), IOC_FACTS, PORT_FACTS]);
    guest.bring_up();
    replay(&guest, &[PORT_ENABLE, EVENTS_ON]);
    // RAID: no volumes, so that the driver detaches from it.
    replay(&guest, &[header!(2, 1, &[4, 5, 2, 1]), header!(3, 1, &[0, 3, 3, 1])]);
    assert_eq!(guest.config(1, [4, 5, 2, 1], 0, &simple32(0xD1, DATA as u32, 20)).0, 0);
    assert_eq!(guest.bytes(DATA + 4, 16), [0; 16]);
    guest.set_bytes(DATA, &[3, 4, 1, 0x13, 7, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(2, [3, 4, 1, 0x13], 0, &simple32(0xD5, DATA as u32, 16)).0, 0);
    guest.set_bytes(DATA, &[0; 16]);
    assert_eq!(guest.config(1, [3, 4, 1, 0x13], 0, &simple32(0xD1, DATA as u32, 16)).0, 0);
    assert_eq!(guest.bytes(DATA, 8), [3, 4, 1, 0x13, 7, 0, 0x80, 0]);
    for target in 0..16 {
        for number in [0, 1] {
            let list = simple32(0xD0, u32::MAX, 0);
            let (status, header) = guest.config(0, [0, 0, number, 4], target, &list);
            assert_eq!((status, header[1]), (0, 3 + number), "device page {number} of target {target}");
            assert_eq!(guest.config(1, header, target, &simple32(0xD1, DATA as u32, 16)).0, 0);
        }
    }
    assert_eq!(guest.config(0, [0, 0, 0, 8], 0, &simple32(0xD0, u32::MAX, 0)).0, 0x22);
}

#[test]
fn seabios_brings_the_adapter_up_and_reads_with_its_tiny_reply_frame() {
    let guest = Guest::new();
    // The trace of an INQUIRY: one write of all words, ten reads without an acknowledgement, one at the end.
    let mut steps = vec![W(0x00, 0x4000_0000), W(0x34, 9), W(0x30, 0), W(0x00, 0x4206_0000)];
    steps.extend([0x0200_0002, 0x0001_0800, 0, 4, 0, 0].map(|word| W(0x00, word)));
    steps.extend([0x0002, 0x0205, 0x0800, 0x0001, 0, 0, 0, 0, 0, 0].map(|half| R(0x00, 0xFFFF, half)));
    steps.extend([W(0x30, 0), W(0x44, 0x4_005C)]);
    replay(&guest, &steps);
    assert_eq!(guest.read(0x00) & 0xF800_0000, 0x2000_0000, "operational, no handshake");
    guest.set_bytes(0x4_0000, &[0xAA; 256]);
    let frame = |context: u32, cdb: &[u8], control, length: u32| {
        let io = Io::new(context, cdb).data(control, DATA, length);
        // A frame at a multiple of 4 only.
        guest.set_bytes(0x2_0004, &io.frame());
        guest.write(0x40, 0x2_0004);
        eventually("the reply bit", || guest.read(0x30) & 8 != 0);
        let reply = guest.read(0x44);
        assert_eq!((guest.read(0x44), guest.read(0x30) & 8), (u32::MAX, 0));
        reply
    };
    // The first TEST UNIT READY fails with the power-on attention: an address reply of four bytes.
    assert_eq!(frame(0x1234_5678, &[0; 6], 0, 0), 0x8000_0000 | 0x4_005C >> 1);
    assert_eq!(guest.bytes(0x4_0058, 12), [0xAA, 0xAA, 0xAA, 0xAA, 0, 0, 9, 0, 0xAA, 0xAA, 0xAA, 0xAA]);
    guest.write(0x44, 0x4_005C);
    for (context, cdb, length) in [
        (0x7FFF_FFFF, vec![0x03, 0, 0, 0, 18, 0], 18),
        (2, vec![0; 6], 0),
        (3, vec![0x12, 0, 0, 0, 36, 0], 36),
        (4, vec![0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8),
        (5, read_10(0, 1).to_vec(), 512),
    ] {
        assert_eq!(frame(context, &cdb, if length > 0 { IN } else { 0 }, length), context);
    }
}
