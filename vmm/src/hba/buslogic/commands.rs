//! Owns: the adapter's commands but the one that starts mailboxes: how many parameters each has, what it answers, what it changes.
//! Promises: a command that is none, or whose parameters make no sense, is told to be invalid and changes nothing.
//! Must not know: registers, threads. Source: Linux, drivers/scsi/BusLogic.h, and FreeBSD's driver bt.

use vm_memory::{Bytes, GuestAddress};

use super::local_ram::{LOCAL_RAM_SIZE, local_ram};
use super::mailboxes::{Format, Setup};
use crate::hba::GuestMemory;
use crate::hba::queue::OWN_TARGET;

/// Target numbers, the adapter's own included: a wide bus.
pub(super) const TARGETS: u8 = 16;
/// The most elements of a scatter/gather list.
pub(super) const MAX_ELEMENTS: u16 = 8192;

/// A command with its parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) opcode: u8,
    pub(super) parameters: Vec<u8>,
}

/// How a command ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// Well.
    Done,
    /// Well, and the host is not told.
    DoneQuietly,
    /// Well, and the host is told, but not by the line.
    DoneWithoutLine,
    /// By a reply, behind whose last byte it is told.
    Reply(Vec<u8>),
    /// By a reply and nothing else.
    ReplyQuietly(Vec<u8>),
    /// It is no command, or makes no sense.
    Invalid,
}

/// What is to be done before the host learns of the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    /// Use these mailboxes, and forget all that was before.
    Mailboxes(Setup),
    /// Look only at the next outgoing mailbox, or at all of them.
    StrictOrder(bool),
    /// CCBs have the extended format of logical unit numbers, or the legacy one.
    ExtendedUnits(bool),
    /// Interrupt for outgoing mailboxes that have become free, or not.
    OutboxInterrupt(bool),
    /// Assert the interrupt line, or not.
    Line(bool),
}

/// What commands ask after.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// Interrupt line.
    pub(super) line: u8,
    /// A bit for each target that is there.
    pub(super) present: u16,
}

const BUFFER_SIZE: usize = 64;

/// What commands leave behind for others.
pub(super) struct Settings {
    mailboxes: Option<Setup>,
    /// Transfer rate, bus on time, bus off time: of ISA buses, and without effect.
    times: [u8; 3],
    /// What the host has changed of the local RAM.
    local_ram: Option<[u8; LOCAL_RAM_SIZE]>,
    buffer: [u8; BUFFER_SIZE],
    fifo: [u8; BUFFER_SIZE],
}

impl Default for Settings {
    fn default() -> Self {
        let empty = [0; BUFFER_SIZE];
        Self { mailboxes: None, times: [0; 3], local_ram: None, buffer: empty, fifo: empty }
    }
}

/// How many parameters a command has, as far as those that there are tell; `None` for no command.
pub(super) fn parameters(opcode: u8, so_far: &[u8]) -> Option<usize> {
    let more = |index: usize| so_far.get(index).map_or(0, |count| usize::from(*count));
    Some(match opcode {
        0x00 | 0x04 | 0x0A | 0x0B | 0x20 | 0x23 | 0x24 | 0x84 | 0x85 | 0x86 => 0,
        0x05 | 0x07 | 0x08 | 0x09 | 0x0D | 0x1F | 0x25 | 0x8B | 0x8C | 0x8D | 0x8F | 0x95 | 0x96 => 1,
        0x21 => 1 + more(0),
        0x91 => 2,
        0x90 => 2 + more(1),
        0x1A..=0x1D => 3,
        0x01 | 0x06 => 4,
        0x81 => 5,
        _ => return None,
    })
}

/// Carries a command out. The deed, if there is one, comes before the end is told.
pub(super) fn carry_out(
    command: &Command,
    settings: &mut Settings,
    facts: Facts,
    memory: &GuestMemory,
) -> (Finish, Option<Deed>) {
    let simple = |finish| (finish, None);
    let reply = |bytes: &[u8]| (Finish::Reply(bytes.to_vec()), None);
    match (command.opcode, command.parameters.as_slice()) {
        // Test of the interrupt; timing of buses that are not there; diagnostics; options.
        (0x00 | 0x20 | 0x06 | 0x21, _) => simple(Finish::Done),
        (0x07, [on]) => simple(settings.set_time(1, *on)),
        (0x08, [off]) => simple(settings.set_time(2, *off)),
        (0x09, [rate]) => simple(settings.set_time(0, *rate)),
        (0x01, [count, high, middle, low]) => {
            let base = u32::from_be_bytes([0, *high, *middle, *low]);
            settings.use_mailboxes(Setup { format: Format::Bits24, base, count: *count })
        }
        (0x81, [count, base @ ..]) => {
            let base = base.try_into().map_or(0, u32::from_le_bytes);
            settings.use_mailboxes(Setup { format: Format::Bits32, base, count: *count })
        }
        // Kind of board and custom features, then the first digits of the firmware's version, 5.07B.
        (0x04, _) => reply(b"AA50"),
        (0x84, _) => reply(b"7"),
        (0x85, _) => reply(b"B"),
        (0x8B, [length]) => simple(padded(b"958 ", *length)),
        (0x05, [on @ 0..=1]) => (Finish::DoneQuietly, Some(Deed::OutboxInterrupt(*on == 1))),
        (0x25, [on]) => (Finish::DoneWithoutLine, Some(Deed::Line(*on != 0))),
        (0x8F, [strict @ 0..=1]) => (Finish::Done, Some(Deed::StrictOrder(*strict == 1))),
        (0x96, [extended @ 0..=1]) => (Finish::Done, Some(Deed::ExtendedUnits(*extended == 1))),
        (0x0A, _) => reply(&units(facts.present, 0)),
        (0x23, _) => reply(&units(facts.present, 8)),
        (0x24, _) => reply(&facts.present.to_le_bytes()),
        (0x0B, _) => reply(&configuration(facts.line)),
        (0x0D, [length]) => simple(padded(&settings.setup(facts), *length)),
        (0x8D, [length]) => simple(padded(&settings.extended_setup(), *length)),
        // Periods in units of 10 ns: 5 for Ultra, 0 for nobody there.
        (0x8C, [length]) => simple(padded(&per_target(facts.present, 0, 16, 5), *length)),
        // No ISA ports; termination of both halves, and that these facts are valid.
        (0x86, _) => reply(&[ISA_PORTS_OFF, facts.line, 0x93, 0]),
        (0x95, [ISA_PORTS_OFF | 7]) => simple(Finish::DoneQuietly),
        (0x1F, [byte]) => reply(&[*byte]),
        (0x91, [offset, count]) => {
            let ram = settings.local_ram.unwrap_or_else(|| local_ram(facts.line));
            let bytes = (0..*count).map(|index| ram[usize::from(offset.wrapping_add(index))]);
            simple(Finish::ReplyQuietly(bytes.collect()))
        }
        (0x90, [offset, _, bytes @ ..]) => {
            let ram = settings.local_ram.get_or_insert_with(|| local_ram(facts.line));
            for (index, byte) in (*offset..=u8::MAX).chain(0..*offset).zip(bytes) {
                ram[usize::from(index)] = *byte;
            }
            simple(Finish::Done)
        }
        (0x1A..=0x1D, [high, middle, low]) => {
            let address = GuestAddress(u32::from_be_bytes([0, *high, *middle, *low]).into());
            let buffer = if command.opcode < 0x1C { &mut settings.buffer } else { &mut settings.fifo };
            // Even codes bring the host's bytes here.
            let moved = match command.opcode % 2 {
                0 => memory.read_slice(buffer, address),
                _ => memory.write_slice(buffer, address),
            };
            simple(if moved.is_ok() { Finish::Done } else { Finish::Invalid })
        }
        _ => simple(Finish::Invalid),
    }
}

/// "Modify I/O address" and "PCI information": the adapter has no ports at an ISA address.
const ISA_PORTS_OFF: u8 = 6;

impl Settings {
    fn set_time(&mut self, index: usize, value: u8) -> Finish {
        self.times[index] = value;
        Finish::Done
    }

    fn use_mailboxes(&mut self, setup: Setup) -> (Finish, Option<Deed>) {
        if setup.count == 0 {
            return (Finish::Invalid, None);
        }
        self.mailboxes = Some(setup);
        (Finish::Done, Some(Deed::Mailboxes(setup)))
    }

    fn mailboxes(&self) -> (u8, u32) {
        self.mailboxes.map_or((0, 0), |setup| (setup.count, setup.base))
    }

    /// "Inquire setup information": 34 bytes.
    fn setup(&self, facts: Facts) -> Vec<u8> {
        /// Synchronous transfers are negotiated; parity is checked.
        const FLAGS: u8 = 0x03;
        /// Synchronous with an offset of 15.
        const SYNCHRONOUS: u8 = 0x8F;
        let (count, base) = self.mailboxes();
        let mut setup = vec![FLAGS];
        setup.extend(self.times);
        setup.push(count);
        setup.extend(&base.to_be_bytes()[1..]);
        setup.extend(per_target(facts.present, 0, 8, SYNCHRONOUS));
        // Targets 0 to 7 may disconnect; this is a BusLogic adapter, of a PCI bus; they may be wide, and are.
        setup.extend(b"\xFFBDF\xFF\xFF");
        setup.extend(per_target(facts.present, 8, 8, SYNCHRONOUS));
        // Targets 8 to 15 may disconnect; reserved; they may be wide, and are.
        setup.extend([0xFF, 0, 0xFF, 0xFF]);
        setup
    }

    /// "Inquire extended setup information": 14 bytes.
    fn extended_setup(&self) -> Vec<u8> {
        /// Level-triggered interrupts.
        const LEVEL: u8 = 0x40;
        /// A wide bus, and Ultra.
        const WIDE_ULTRA: u8 = 0x09;
        let (count, base) = self.mailboxes();
        // A bus of EISA's kind, which PCI is, and no BIOS.
        let mut setup = vec![b'E', 0];
        setup.extend(MAX_ELEMENTS.to_le_bytes());
        setup.push(count);
        setup.extend(base.to_le_bytes());
        setup.push(LEVEL);
        setup.extend(b"07B");
        setup.push(WIDE_ULTRA);
        setup
    }
}

/// Exactly `length` bytes: as many of `bytes` as there are, then zeros.
fn padded(bytes: &[u8], length: u8) -> Finish {
    let mut reply = bytes.to_vec();
    reply.resize(length.into(), 0);
    Finish::Reply(reply)
}

/// `value` for each of `count` targets from `first` on that is there, 0 for the others.
fn per_target(present: u16, first: u8, count: u8, value: u8) -> Vec<u8> {
    (first..first + count).map(|target| if present >> target & 1 == 1 { value } else { 0 }).collect()
}

/// A bitmap of logical units for each of eight targets.
fn units(present: u16, first: u8) -> Vec<u8> {
    per_target(present, first, 8, 1)
}

/// "Inquire configuration": DMA channel (none matters on PCI), interrupt line as a bit, own number on the bus.
fn configuration(line: u8) -> [u8; 3] {
    const DMA_CHANNEL: u8 = 0x40;
    let bit = match line {
        9..=12 | 14 | 15 => 1 << (line - 9),
        _ => 0,
    };
    [DMA_CHANNEL, bit, OWN_TARGET]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FACTS: Facts = Facts { line: 11, present: 0x0103 };

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 8192)]).unwrap()
    }

    fn run(settings: &mut Settings, opcode: u8, parameters: &[u8]) -> (Finish, Option<Deed>) {
        carry_out(&Command { opcode, parameters: parameters.to_vec() }, settings, FACTS, &memory())
    }

    #[test]
    fn setup_information_is_laid_out_as_drivers_read_it() {
        let mut settings = Settings::default();
        let setup = Setup { format: Format::Bits32, base: 0x0012_3456, count: 0xD3 };
        let done = run(&mut settings, 0x81, &[0xD3, 0x56, 0x34, 0x12, 0]);
        assert_eq!(done, (Finish::Done, Some(Deed::Mailboxes(setup))));
        for (opcode, time) in [(0x07, 11), (0x08, 12), (0x09, 10)] {
            assert_eq!(run(&mut settings, opcode, &[time]).0, Finish::Done);
        }
        let expected = [
            0x03, 10, 11, 12, 0xD3, 0x12, 0x34, 0x56, 0x8F, 0x8F, 0, 0, 0, 0, 0, 0, 0xFF, 0x42, 0x44, 0x46, 0xFF, 0xFF,
            0x8F, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0, 0xFF, 0xFF,
        ];
        assert_eq!(run(&mut settings, 0x0D, &[34]).0, Finish::Reply(expected.to_vec()));
        assert_eq!(run(&mut settings, 0x0D, &[4]).0, Finish::Reply(expected[..4].to_vec()));
        assert_eq!(run(&mut settings, 0x0D, &[36]).0, Finish::Reply([&expected[..], &[0, 0]].concat()));
        let expected = [0x45, 0, 0x00, 0x20, 0xD3, 0x56, 0x34, 0x12, 0, 0x40, 0x30, 0x37, 0x42, 0x09];
        assert_eq!(run(&mut settings, 0x8D, &[14]).0, Finish::Reply(expected.to_vec()));
        let periods = [5, 5, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(run(&mut settings, 0x8C, &[16]).0, Finish::Reply(periods.to_vec()));
    }

    #[test]
    fn what_makes_no_sense_is_invalid_and_changes_nothing() {
        let mut settings = Settings::default();
        for (opcode, parameters) in [
            (0x81, &[0, 0, 0, 1, 0][..]),
            (0x01, &[0, 0, 0x10, 0]),
            (0x05, &[2]),
            (0x8F, &[9]),
            (0x96, &[2]),
            (0x95, &[0]),
            (0x95, &[8]),
            (0x1C, &[0xFF, 0xFF, 0xFF]),
            (0x1D, &[0, 0x1F, 0xF0]),
            (0x03, &[]),
            (0x83, &[]),
            (0xFF, &[]),
        ] {
            assert_eq!(run(&mut settings, opcode, parameters), (Finish::Invalid, None), "{opcode:#x}");
        }
        assert_eq!(settings.mailboxes, None);
    }

    #[test]
    fn local_ram_is_read_back_as_it_was_stored_around_its_end() {
        let mut settings = Settings::default();
        assert_eq!(run(&mut settings, 0x90, &[0xFE, 3, 1, 2, 3]).0, Finish::Done);
        assert_eq!(run(&mut settings, 0x91, &[0xFD, 5]).0, Finish::ReplyQuietly(vec![0, 1, 2, 3, 0]));
        assert_eq!(run(&mut settings, 0x91, &[0, 0]).0, Finish::ReplyQuietly(vec![]));
    }

    #[test]
    fn the_buffers_go_to_memory_and_come_back() {
        let memory = memory();
        let mut settings = Settings::default();
        let mut run = |opcode, address: u16| {
            let parameters = [&[0][..], &address.to_be_bytes()].concat();
            carry_out(&Command { opcode, parameters }, &mut settings, FACTS, &memory).0
        };
        let content: Vec<u8> = (1..=64).collect();
        memory.write_slice(&content, GuestAddress(0x100)).unwrap();
        let mut back = vec![0; 64];
        for (put, get) in [(0x1A, 0x1B), (0x1C, 0x1D)] {
            assert_eq!((run(put, 0x100), run(get, 0x200)), (Finish::Done, Finish::Done));
            memory.read_slice(&mut back, GuestAddress(0x200)).unwrap();
            assert_eq!(back, content);
            memory.write_slice(&[0; 64], GuestAddress(0x200)).unwrap();
        }
    }

    proptest! {
        #[test]
        fn any_command_is_answered_with_a_bounded_reply(commands in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 257)), 1..8)) {
            let mut settings = Settings::default();
            for (opcode, mut bytes) in commands {
                let mut wanted = 0;
                while let Some(count) = parameters(opcode, &bytes[..wanted]).filter(|count| *count > wanted) {
                    wanted = count;
                }
                bytes.truncate(wanted);
                match run(&mut settings, opcode, &bytes).0 {
                    Finish::Reply(reply) | Finish::ReplyQuietly(reply) => prop_assert!(reply.len() <= 255),
                    _ => {}
                }
            }
        }
    }
}
