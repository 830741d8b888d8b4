//! Owns: the register window of the BT-958 and the course of a command: its bytes in, its reply out, the diagnosis after a reset.
//! Promises: pure; each access gives at most one thing to do; a command is bounded.
//! Must not know: what a command does, guest memory, threads.

use super::commands::{self, Command, Finish};
use crate::hba::window;

/// Size of the window in bytes, as ports and as memory. Only the first four are registers.
pub(super) const WINDOW_SIZE: u32 = 32;

/// A register of one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    /// Written: control; read: status.
    Control,
    /// Written: commands and their parameters; read: their replies.
    Command,
    Interrupt,
    Geometry,
    Reserved,
}

/// The window as pieces in ascending order; source: BusLogic's MultiMaster register set, as Linux's BusLogic.h has it.
const WINDOW: &[(Register, u32)] = &[
    (Register::Control, 1),
    (Register::Command, 1),
    (Register::Interrupt, 1),
    (Register::Geometry, 1),
    (Register::Reserved, WINDOW_SIZE - 4),
];

const _: () = assert!(window::size(WINDOW) == WINDOW_SIZE);

/// The register at `offset`.
pub(super) fn register_at(offset: u64) -> Register {
    window::register_at(WINDOW, offset).unwrap_or(Register::Reserved)
}

/// CONTROL: reset the adapter and the bus.
pub(super) const HARD_RESET: u8 = 0x80;
/// CONTROL: reset the adapter.
pub(super) const SOFT_RESET: u8 = 0x40;
/// CONTROL: acknowledge the interrupt.
pub(super) const ACKNOWLEDGE: u8 = 0x20;
/// CONTROL: reset the bus.
pub(super) const BUS_RESET: u8 = 0x10;

/// STATUS: the diagnosis after a reset is under way.
const DIAGNOSING: u8 = 0x80;
/// STATUS: there are no mailboxes.
const MAILBOXES_WANTED: u8 = 0x20;
/// STATUS: a command may begin.
const READY: u8 = 0x10;
/// STATUS: a byte of a reply may be read.
const DATA_IN: u8 = 0x04;
/// STATUS: the last command was not one.
const INVALID: u8 = 0x01;

/// GEOMETRY: disks of more than 1 GiB have 255 heads and 63 sectors. Drivers take any value but FFh for an adapter.
pub(super) const GEOMETRY: u8 = 0x80;

/// The command that has the adapter look at the outgoing mailboxes.
const START_MAILBOXES: u8 = 0x02;

/// What a write to the command register asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Look at the outgoing mailboxes.
    Mailboxes,
    /// A command is complete; [`Port::finish`] comes next.
    Run(Command),
}

/// How the end of a command is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// By the interrupt "command complete".
    Interrupt,
    /// By that interrupt's bit, but not by the line.
    BitOnly,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Parameters(Command),
    Executing,
    Reply {
        bytes: Vec<u8>,
        next: usize,
        told: Option<Told>,
    },
    /// A reset is being carried out.
    Resetting,
    /// It is done, and the driver has not seen the diagnosis yet, which it waits for.
    Diagnosing,
}

/// The state behind status and command register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    phase: Phase,
    invalid: bool,
    mailboxes_wanted: bool,
}

impl Default for Port {
    fn default() -> Self {
        Self { phase: Phase::Idle, invalid: false, mailboxes_wanted: true }
    }
}

impl Port {
    /// A read of STATUS. Drivers wait to see the diagnosis begin and end, after either reset, however late they look: it ends with
    /// the read that shows it.
    pub(super) fn status(&mut self) -> u8 {
        let phase = match self.phase {
            Phase::Resetting => return DIAGNOSING,
            Phase::Diagnosing => {
                self.phase = Phase::Idle;
                return DIAGNOSING;
            }
            Phase::Idle => READY,
            Phase::Reply { .. } => DATA_IN,
            Phase::Parameters(_) | Phase::Executing => 0,
        };
        let wanted = if self.mailboxes_wanted { MAILBOXES_WANTED } else { 0 };
        phase | wanted | if self.invalid { INVALID } else { 0 }
    }

    /// A write to COMMAND: a command's code or one of its parameters; out of turn it is ignored.
    pub(super) fn write(&mut self, byte: u8) -> Option<Event> {
        match &mut self.phase {
            Phase::Idle if byte == START_MAILBOXES => return Some(Event::Mailboxes),
            Phase::Idle => {
                self.invalid = false;
                self.phase = Phase::Parameters(Command { opcode: byte, parameters: Vec::new() });
            }
            Phase::Parameters(command) => command.parameters.push(byte),
            Phase::Executing | Phase::Reply { .. } | Phase::Resetting | Phase::Diagnosing => return None,
        }
        let Phase::Parameters(command) = &mut self.phase else { return None };
        let wanted = commands::parameters(command.opcode, &command.parameters);
        if command.parameters.len() < wanted.unwrap_or(0) {
            return None;
        }
        let command = std::mem::take(command);
        self.phase = Phase::Executing;
        Some(Event::Run(command))
    }

    /// The command that [`Self::write`] gave has ended; how that is to be told now, if it is.
    pub(super) fn finish(&mut self, finish: Finish) -> Option<Told> {
        if self.phase != Phase::Executing {
            // A reset has come between.
            return None;
        }
        self.phase = Phase::Idle;
        let (bytes, told) = match finish {
            Finish::Done => return Some(Told::Interrupt),
            Finish::DoneQuietly => return None,
            Finish::DoneWithoutLine => return Some(Told::BitOnly),
            Finish::Invalid => {
                self.invalid = true;
                return Some(Told::Interrupt);
            }
            Finish::Reply(bytes) => (bytes, Some(Told::Interrupt)),
            Finish::ReplyQuietly(bytes) => (bytes, None),
        };
        if bytes.is_empty() {
            return told;
        }
        self.phase = Phase::Reply { bytes, next: 0, told };
        None
    }

    /// A read of DATA-IN: the next byte of the reply, 0 if there is none, and behind the last one how the end is to be told.
    pub(super) fn data(&mut self) -> (u8, Option<Told>) {
        let Phase::Reply { bytes, next, told } = &mut self.phase else { return (0, None) };
        let byte = bytes[*next];
        *next += 1;
        if *next < bytes.len() {
            return (byte, None);
        }
        let told = *told;
        self.phase = Phase::Idle;
        (byte, told)
    }

    /// The interrupt has been acknowledged.
    pub(super) fn acknowledge(&mut self) {
        self.invalid = false;
    }

    /// There are mailboxes now.
    pub(super) fn has_mailboxes(&mut self) {
        self.mailboxes_wanted = false;
    }

    /// A reset begins.
    pub(super) fn begin_reset(&mut self) {
        *self = Self { phase: Phase::Resetting, ..Self::default() };
    }

    /// A reset has been carried out.
    pub(super) fn end_reset(&mut self) {
        self.phase = Phase::Diagnosing;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn registers_are_where_drivers_look_for_them() {
        let expected = [Register::Control, Register::Command, Register::Interrupt, Register::Geometry];
        assert_eq!([0, 1, 2, 3].map(register_at), expected);
        assert!([4, 31, 32, u64::MAX].into_iter().all(|offset| register_at(offset) == Register::Reserved));
    }

    #[test]
    fn a_command_is_ready_parameters_reply_and_ready_again() {
        let mut port = Port::default();
        assert_eq!((port.status(), port.write(0x8D)), (0x30, None));
        assert_eq!(port.status(), 0x20);
        let command = Command { opcode: 0x8D, parameters: vec![2] };
        assert_eq!((port.write(2), port.status()), (Some(Event::Run(command)), 0x20));
        assert_eq!((port.write(0x02), port.finish(Finish::Reply(vec![7, 8])), port.status()), (None, None, 0x24));
        assert_eq!((port.write(0x02), port.data(), port.status()), (None, (7, None), 0x24));
        assert_eq!((port.data(), port.status()), ((8, Some(Told::Interrupt)), 0x30));
        assert_eq!((port.data(), port.finish(Finish::Done)), ((0, None), None));
    }

    #[test]
    fn a_reset_shows_its_diagnosis_once_however_late_the_driver_looks() {
        let mut port = Port::default();
        port.write(0x8D);
        port.begin_reset();
        assert_eq!([port.status(), port.status()], [0x80, 0x80]);
        port.end_reset();
        assert_eq!(
            (port.write(0x02), port.write(0x04)),
            (None, None),
            "nothing is taken before the driver has seen it"
        );
        assert_eq!([port.status(), port.status()], [0x80, 0x30]);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_keeps_commands_bounded(accesses in prop::collection::vec((0u8..8, any::<u8>()), 0..600)) {
            let mut port = Port::default();
            for (kind, byte) in accesses {
                match kind {
                    0 => {
                        prop_assert_eq!(port.status() & 0x4A, 0, "failed, busy and reserved bits");
                    }
                    1 => {
                        port.data();
                    }
                    2 => port.acknowledge(),
                    3 if byte < 16 => {
                        port.begin_reset();
                        port.end_reset();
                    }
                    _ => {
                        if let Some(Event::Run(command)) = port.write(byte) {
                            prop_assert!(command.parameters.len() <= 257);
                            port.finish(Finish::Reply(vec![1; usize::from(byte % 4)]));
                        }
                    }
                }
            }
        }
    }
}
