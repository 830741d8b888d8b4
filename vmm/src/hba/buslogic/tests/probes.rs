//! What the drivers of Linux and FreeBSD do to the registers when they find the adapter, as data.

use super::guest::*;
use crate::hba::HostBusAdapter;

/// One thing that a driver does.
enum Step {
    /// Writes a register.
    W(u64, u8),
    /// Reads a register, which must be this.
    R(u64, u8),
    /// Reads status until the adapter has been busy with a reset and is ready again.
    Reset(u8),
    /// Sends a command with its parameters, and gets this reply.
    C(&'static [u8], &'static [u8]),
}
use Step::{C, R, Reset, W};

fn replay(guest: &Guest, steps: &[Step]) {
    for (number, step) in steps.iter().enumerate() {
        match *step {
            W(register, value) => guest.write(register, value),
            R(register, value) => assert_eq!(guest.read(register), value, "step {number}"),
            Reset(how) => guest.reset(how),
            C(bytes, reply) => assert_eq!(guest.command(bytes, reply.len()), reply, "step {number}: {bytes:02x?}"),
        }
    }
}

const PCI_INFORMATION: Step = C(&[0x86], &[6, 11, 0x93, 0]);
const EXTENDED_SETUP: Step = C(&[0x8D, 14], &[b'E', 0, 0x00, 0x20, 0, 0, 0, 0, 0, 0x40, b'0', b'7', b'B', 0x09]);
const BOARD: Step = C(&[0x04], b"AA50");
const FIRMWARE_DIGIT: Step = C(&[0x84], b"7");
const FIRMWARE_LETTER: Step = C(&[0x85], b"B");
const MODEL: Step = C(&[0x8B, 5], b"958 \0");
const CONFIGURATION: Step = C(&[0x0B], &[0x40, 0x04, 7]);
const SETUP_BEFORE_MAILBOXES: Step = C(
    &[0x0D, 34],
    &[
        3, 0, 0, 0, 0, 0, 0, 0, 0x8F, 0, 0, 0, 0, 0, 0, 0, 0xFF, b'B', b'D', b'F', 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 0, 0,
        0xFF, 0, 0xFF, 0xFF,
    ],
);
const SETTINGS: Step = C(
    &[0x91, 0x40, 0x40],
    &[
        0, 0, 0x40, b' ', b'9', b'5', b'8', b' ', b' ', 0, 4, 0, 0x8B, 0, 7, 0x27, 0, 0, 4, 0xFF, 0xFF, 0xFF, 0xFF,
        0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0, 0, 0, 0, 7, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
);

#[test]
fn the_linux_driver_finds_and_configures_the_adapter() {
    let guest = Guest::new();
    let identity = guest.adapter.pci_identity();
    assert_eq!((identity.vendor, identity.device, identity.msi_vectors), (0x104B, 0x1040, 0));
    replay(
        &guest,
        &[
            // blogic_init_mm_probeinfo: which ISA ports, away with them, scan order, board.
            W(0, 0x20),
            PCI_INFORMATION,
            C(&[0x95, 6], &[]),
            C(&[0x91, 0x6D, 1], &[0]),
            BOARD,
            // blogic_probe, blogic_hwreset, blogic_checkadapter.
            R(0, 0x30),
            R(2, 0x00),
            R(3, 0x80),
            Reset(0x80),
            EXTENDED_SETUP,
            // blogic_rdconfig.
            BOARD,
            CONFIGURATION,
            SETUP_BEFORE_MAILBOXES,
            EXTENDED_SETUP,
            FIRMWARE_DIGIT,
            MODEL,
            FIRMWARE_LETTER,
            R(3, 0x80),
            PCI_INFORMATION,
            SETTINGS,
            // blogic_initadapter: 211 mailboxes, strict round robin, extended units.
            C(&[0x81, 0xD3, 0x00, 0x00, 0x01, 0x00], &[]),
            C(&[0x8F, 1], &[]),
            C(&[0x96, 1], &[]),
            R(0, 0x10),
            // blogic_inquiry.
            C(&[0x24], &[1, 0]),
            C(
                &[0x0D, 34],
                &[
                    3, 0, 0, 0, 0xD3, 1, 0, 0, 0x8F, 0, 0, 0, 0, 0, 0, 0, 0xFF, b'B', b'D', b'F', 0xFF, 0xFF, 0, 0, 0,
                    0, 0, 0, 0, 0, 0xFF, 0, 0xFF, 0xFF,
                ],
            ),
            C(&[0x8C, 16], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ],
    );
}

#[test]
fn the_freebsd_driver_finds_and_configures_the_adapter() {
    let guest = Guest::new();
    replay(
        &guest,
        &[
            PCI_INFORMATION,
            C(&[0x95, 6], &[]),
            R(0, 0x30),
            R(2, 0x00),
            R(3, 0x80),
            Reset(0x80),
            EXTENDED_SETUP,
            BOARD,
            FIRMWARE_DIGIT,
            FIRMWARE_LETTER,
            EXTENDED_SETUP,
            MODEL,
            SETTINGS,
            CONFIGURATION,
            C(&[0x81, 0xC0, 0x00, 0x00, 0x01, 0x00], &[]),
            C(&[0x8F, 0], &[]),
            R(0, 0x10),
        ],
    );
    // Mailboxes in any order: it takes the first one that is free, the adapter goes round.
    for mailbox in [5, 3, 190] {
        let ccb = Ccb::new(&[0x12, 0, 0, 0, 36, 0]).opcode(4).data(IN, LISTS, 8);
        guest.set_bytes(LISTS, &list(&[(DATA, 96)]));
        let address = guest.put(mailbox, &ccb);
        guest.set_bytes(MAILBOXES + 8 * mailbox, &(address as u32).to_le_bytes());
        guest.set_bytes(MAILBOXES + 8 * mailbox + 7, &[1]);
        guest.write(1, 0x02);
        // In normal operation it asks for transfer settings at any time.
        assert_eq!(guest.command(&[0x0D, 33], 33)[4], 0xC0);
    }
    let incoming = |number: u64| MAILBOXES + 8 * (0xC0 + number);
    eventually("three incoming mailboxes", || (0..3).all(|number| guest.bytes(incoming(number) + 7, 1) == [1]));
    let mut ended: Vec<_> = (0..3).map(|number| guest.bytes(incoming(number), 4)).collect();
    ended.sort();
    let mut sent: Vec<_> = [5, 3, 190].map(|number| ((CCBS + 64 * number) as u32).to_le_bytes().to_vec()).to_vec();
    sent.sort();
    assert_eq!(ended, sent);
    assert_eq!(guest.bytes(CCBS + 64 * 190 + 4, 4), 60u32.to_le_bytes());
}

#[test]
fn a_command_that_is_none_is_told_and_forgotten_with_the_acknowledgement() {
    let guest = Guest::ready();
    eventually("the interrupt of the first command", || guest.read(2) == 0x81);
    guest.write(0, 0x20);
    replay(
        &guest,
        &[
            W(1, 0xFF),
            R(0, 0x11),
            R(2, 0x84),
            W(0, 0x20),
            R(0, 0x10),
            R(2, 0x00),
            // No mailboxes: the old ones stay.
            W(1, 0x81),
            W(1, 0),
            W(1, 0),
            W(1, 0),
            W(1, 0),
            W(1, 0),
            R(0, 0x11),
            W(0, 0x20),
            // Commands that tell nobody of their end.
            W(1, 0x05),
            W(1, 0),
            R(2, 0x00),
            W(1, 0x95),
            W(1, 6),
            R(2, 0x00),
            W(1, 0x91),
            W(1, 0x43),
            W(1, 1),
            R(0, 0x04),
            R(1, b' '),
            R(0, 0x10),
            R(2, 0x00),
            R(1, 0x00),
        ],
    );
    assert_eq!(guest.run(1, &Ccb::new(&[0; 6])), (0, 0, 1));
}

#[test]
fn the_line_follows_the_interrupt_register_and_can_be_kept_low() {
    use std::sync::atomic::Ordering::SeqCst;
    let guest = Guest::ready();
    let high = || guest.line.level.load(SeqCst);
    eventually("the interrupt of the first command", high);
    guest.write(0, 0x20);
    assert_eq!((guest.read(2), high()), (0, false));
    replay(&guest, &[W(1, 0x25), W(1, 0), R(2, 0x84)]);
    assert!(!high());
    guest.write(0, 0x20);
    guest.run(1, &Ccb::new(&[0; 6]));
    eventually("the inbox bit", || guest.read(2) == 0x81);
    assert!(!high());
    // On again: its own end is no reason for the line, but what is shown is.
    replay(&guest, &[W(1, 0x25), W(1, 1), R(2, 0x81)]);
    assert!(high());
    replay(&guest, &[W(0, 0x20), R(2, 0x84), W(0, 0x20), R(2, 0x00)]);
    assert!(!high());
    replay(&guest, &[W(1, 0x05), W(1, 1)]);
    guest.run(2, &Ccb::new(&[0; 6]));
    eventually("both bits of the mailboxes", || guest.read(2) == 0x83);
}

#[test]
fn a_soft_reset_and_new_mailboxes_are_linuxs_way_out() {
    let guest = Guest::ready();
    guest.reset(0x40);
    assert_eq!((guest.read(2), guest.read(0)), (0, 0x30));
    // The mailboxes are elsewhere now, and of another number.
    let elsewhere = MAILBOXES + 0x1000;
    guest.set_bytes(elsewhere, &[0; 64]);
    guest.command(&[&[0x81, 4][..], &(elsewhere as u32).to_le_bytes()].concat(), 0);
    guest.command(&[0x8F, 1], 0);
    guest.command(&[0x96, 1], 0);
    for round in 0..9 {
        let address = guest.put(round, &Ccb::new(&[0; 6])) as u32;
        let (out, into) = (elsewhere + 8 * (round % 4), elsewhere + 8 * (4 + round % 4));
        guest.set_bytes(out, &[&address.to_le_bytes()[..], &[0, 0, 0, 1]].concat());
        guest.write(1, 0x02);
        eventually("the incoming mailbox", || guest.bytes(into + 7, 1) == [1]);
        assert_eq!((guest.bytes(into, 4), guest.bytes(out + 7, 1)), (address.to_le_bytes().to_vec(), vec![0]));
        guest.set_bytes(into + 7, &[0]);
    }
}
