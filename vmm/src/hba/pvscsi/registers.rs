//! Owns: the register window and the command/data state machine of the adapter.
//! Promises: pure; each register write gives at most one [`Action`]; a new command may interrupt one that wants more data.
//! Must not know: guest memory, threads, what a command does.

use crate::hba::window;

/// Size of BAR 0 in bytes: Linux asks for at least eight pages.
pub(super) const WINDOW_SIZE: u32 = 0x8000;

/// Offset of the kick register for everything but reads and writes.
pub(super) const KICK_NON_RW_IO: u64 = 0x3014;
/// Offset of the kick register for reads and writes.
pub(super) const KICK_RW_IO: u64 = 0x4018;

/// A register of 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Command,
    CommandData,
    CommandStatus,
    LastStatus,
    InterruptStatus,
    InterruptMask,
    Kick,
    Debug,
    Reserved,
}

/// The window as pieces in ascending order; sources: the register offsets of the Linux driver's vmw_pvscsi.h.
const WINDOW: &[(Register, u32)] = &[
    (Register::Command, 4),
    (Register::CommandData, 4),
    (Register::CommandStatus, 4),
    (Register::Reserved, 0x100 - 0x0C),
    (Register::LastStatus, 16),
    (Register::Reserved, 0x100C - 0x110),
    (Register::InterruptStatus, 4),
    (Register::Reserved, 0x2010 - 0x1010),
    (Register::InterruptMask, 4),
    (Register::Reserved, 0x3014 - 0x2014),
    (Register::Kick, 4),
    (Register::Debug, 4),
    (Register::Reserved, 0x4018 - 0x301C),
    (Register::Kick, 4),
    (Register::Reserved, WINDOW_SIZE - 0x401C),
];

const _: () = assert!(window::size(WINDOW) == WINDOW_SIZE);

/// The register that holds the byte at `offset`.
pub(super) fn register_at(offset: u64) -> Register {
    window::register_at(WINDOW, offset).unwrap_or(Register::Reserved)
}

/// COMMAND_STATUS: done.
pub(super) const STATUS_OK: u32 = 0;
/// COMMAND_STATUS: not supported, or failed.
pub(super) const STATUS_FAILED: u32 = u32::MAX;
/// COMMAND_STATUS: more data words are wanted. Anything but [`STATUS_FAILED`] tells a probing driver "supported".
pub(super) const STATUS_NEEDS_DATA: u32 = u32::MAX - 1;
/// COMMAND_STATUS of SETUP_REQCALLTHRESHOLD: the threshold is in force. Drivers take only a non-zero value for that.
pub(super) const STATUS_THRESHOLD_ENABLED: u32 = 1;

/// The rings that SETUP_RINGS gives, in guest page numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RingSetup {
    /// Page of the shared ring state.
    pub(super) state: u64,
    /// Pages of the request ring, 1 to 32.
    pub(super) request: Vec<u64>,
    /// Pages of the completion ring, 1 to 32.
    pub(super) completion: Vec<u64>,
}

/// A complete command with its checked parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    AdapterReset,
    SetupRings(RingSetup),
    ResetBus,
    ResetDevice { target: u32, lun: [u8; 8] },
    Abort { context: u64, target: u32 },
    Config { completion_address: u64, page_address: u64, page: u32 },
    SetupMessageRing { pages: Vec<u64> },
    SetupCallThreshold { enable: bool },
}

/// What follows from a write to COMMAND or COMMAND_DATA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing to do; COMMAND_STATUS becomes this.
    Status(u32),
    /// Carry this out; its result becomes COMMAND_STATUS.
    Execute(Call),
}

/// Most data words of a command: those of SETUP_RINGS.
const MAX_WORDS: usize = 132;
/// Most pages of the request and of the completion ring.
pub(super) const MAX_RING_PAGES: usize = 32;
/// Most pages of the message ring.
pub(super) const MAX_MESSAGE_PAGES: usize = 16;

/// The command register and its data words.
#[derive(Debug)]
pub(super) struct CommandPort {
    number: u32,
    wanted: usize,
    words: Vec<u32>,
}

impl CommandPort {
    pub(super) fn new() -> Self {
        Self { number: 0, wanted: 0, words: Vec::with_capacity(MAX_WORDS) }
    }

    /// A write to COMMAND: whatever came before is forgotten.
    pub(super) fn command(&mut self, number: u32) -> Action {
        self.number = number;
        self.words.clear();
        let Some(wanted) = data_words(number) else {
            self.wanted = 0;
            return Action::Status(STATUS_FAILED);
        };
        self.wanted = wanted;
        if wanted == 0 { self.complete() } else { Action::Status(STATUS_NEEDS_DATA) }
    }

    /// A write to COMMAND_DATA; `None` if no command wants data.
    pub(super) fn data(&mut self, word: u32) -> Option<Action> {
        if self.words.len() == self.wanted {
            return None;
        }
        self.words.push(word);
        Some(if self.words.len() == self.wanted { self.complete() } else { Action::Status(STATUS_NEEDS_DATA) })
    }

    fn complete(&mut self) -> Action {
        self.wanted = 0;
        let call = self.call();
        self.words.clear();
        call.map_or(Action::Status(STATUS_FAILED), Action::Execute)
    }

    fn long(&self, index: usize) -> u64 {
        u64::from(self.words[index]) | u64::from(self.words[index + 1]) << 32
    }

    fn longs(&self, index: usize, count: usize) -> Vec<u64> {
        (0..count).map(|number| self.long(index + 2 * number)).collect()
    }

    /// The command's parameters, or `None` if they are impossible.
    fn call(&self) -> Option<Call> {
        let count = |index: usize, limit: usize| {
            let count = self.words[index] as usize;
            (1..=limit).contains(&count).then_some(count)
        };
        Some(match self.number {
            1 => Call::AdapterReset,
            3 => {
                let (request, completion) = (count(0, MAX_RING_PAGES)?, count(1, MAX_RING_PAGES)?);
                Call::SetupRings(RingSetup {
                    state: self.long(2),
                    request: self.longs(4, request),
                    completion: self.longs(4 + 2 * MAX_RING_PAGES, completion),
                })
            }
            4 => Call::ResetBus,
            5 => {
                let mut lun = [0; 8];
                lun[..4].copy_from_slice(&self.words[1].to_le_bytes());
                lun[4..].copy_from_slice(&self.words[2].to_le_bytes());
                Call::ResetDevice { target: self.words[0], lun }
            }
            6 => Call::Abort { context: self.long(0), target: self.words[2] },
            7 => Call::Config { completion_address: self.long(0), page_address: self.long(2), page: self.words[4] },
            8 => Call::SetupMessageRing { pages: self.longs(2, count(0, MAX_MESSAGE_PAGES)?) },
            10 => Call::SetupCallThreshold { enable: self.words[0] != 0 },
            _ => return None,
        })
    }
}

/// How many data words a command takes; `None` for one that is not supported (ISSUE_SCSI, DEVICE_UNPLUG, unknown numbers).
fn data_words(number: u32) -> Option<usize> {
    Some(match number {
        1 | 4 => 0,
        3 => MAX_WORDS,
        5 => 3,
        6 => 4,
        7 => 6,
        8 => 2 + 2 * MAX_MESSAGE_PAGES,
        10 => 1,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn registers_are_where_drivers_look_for_them() {
        let expected = [
            (0x0000, Register::Command),
            (0x0004, Register::CommandData),
            (0x0008, Register::CommandStatus),
            (0x0100, Register::LastStatus),
            (0x010C, Register::LastStatus),
            (0x0110, Register::Reserved),
            (0x100C, Register::InterruptStatus),
            (0x2010, Register::InterruptMask),
            (KICK_NON_RW_IO, Register::Kick),
            (0x3018, Register::Debug),
            (KICK_RW_IO, Register::Kick),
            (0x401C, Register::Reserved),
            (u64::MAX, Register::Reserved),
        ];
        for (offset, register) in expected {
            assert_eq!(register_at(offset), register, "offset {offset:x}");
        }
    }

    #[test]
    fn a_probe_leaves_the_port_ready_for_the_real_command() {
        let mut port = CommandPort::new();
        assert_eq!(port.command(8), Action::Status(STATUS_NEEDS_DATA));
        assert_eq!(port.command(10), Action::Status(STATUS_NEEDS_DATA));
        assert_eq!(port.command(2), Action::Status(STATUS_FAILED));
        assert_eq!(port.command(11), Action::Status(STATUS_FAILED));
        assert_eq!(port.data(1), None);
        assert_eq!(port.command(10), Action::Status(STATUS_NEEDS_DATA));
        assert_eq!(port.data(1), Some(Action::Execute(Call::SetupCallThreshold { enable: true })));
        assert_eq!(port.data(1), None);
        assert_eq!(port.command(4), Action::Execute(Call::ResetBus));
    }

    #[test]
    fn setup_rings_takes_exactly_132_words() {
        let mut port = CommandPort::new();
        port.command(3);
        let mut words = vec![1, 2, 0x10, 0];
        words.resize(4 + 64, 0);
        words[4] = 0x11;
        words.extend_from_slice(&[0x12, 0, 0x13, 1]);
        words.resize(132, 0);
        for &word in &words[..131] {
            assert_eq!(port.data(word), Some(Action::Status(STATUS_NEEDS_DATA)));
        }
        let setup = RingSetup { state: 0x10, request: vec![0x11], completion: vec![0x12, 0x1_0000_0013] };
        assert_eq!(port.data(0), Some(Action::Execute(Call::SetupRings(setup))));
    }

    #[test]
    fn impossible_ring_sizes_fail() {
        for (number, words, count) in [(3, 132, 0), (3, 132, 33), (8, 34, 0), (8, 34, 17)] {
            let mut port = CommandPort::new();
            port.command(number);
            let last = (0..words).map(|_| port.data(count)).last().flatten();
            assert_eq!(last, Some(Action::Status(STATUS_FAILED)), "command {number}, {count} pages");
        }
    }

    proptest! {
        #[test]
        fn any_sequence_of_writes_is_taken(writes in prop::collection::vec((0u32..12, 0u32..140), 0..20)) {
            let mut port = CommandPort::new();
            for (command, words) in writes {
                port.command(command);
                for word in 0..words {
                    port.data(word);
                }
                prop_assert!(port.words.len() <= MAX_WORDS);
            }
        }
    }
}
