//! Owns: the adapter's interrupt register and the level of its pin.
//! Promises: completions and the ends of commands are shown one after the other, never together, and none is lost; the pin is the
//! level of what is shown.
//! Must not know: what has completed.

use std::sync::Arc;

use parking_lot::Mutex;

use super::registers::Told;
use crate::hba::InterruptLine;

/// Something is shown.
const VALID: u8 = 0x80;
/// A command is complete.
const COMMAND_COMPLETE: u8 = 0x04;
/// An outgoing mailbox is free again.
const OUTBOX_FREE: u8 = 0x02;
/// An incoming mailbox has been filled.
const INBOX_LOADED: u8 = 0x01;
/// What mailboxes tell, which may be shown together.
const MAILBOXES: u8 = OUTBOX_FREE | INBOX_LOADED;

#[derive(Clone, Copy, Debug)]
struct State {
    shown: u8,
    /// What waits to be shown. Linux looks at one bit of the register only, and forgets the others with its acknowledgement;
    /// FreeBSD, while it waits for a command, serves what is shown before it.
    waiting: u8,
    /// What is shown may assert the line.
    loud: bool,
    enabled: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { shown: 0, waiting: 0, loud: false, enabled: true }
    }
}

/// See the module.
pub(super) struct Interrupts {
    state: Mutex<State>,
    line: Arc<dyn InterruptLine>,
}

impl Interrupts {
    /// Nothing is shown; what will be asserts the line.
    pub(super) fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self { state: Mutex::default(), line }
    }

    /// The interrupt register.
    pub(super) fn shown(&self) -> u8 {
        self.state.lock().shown
    }

    /// The interrupt line of the 8259s that the pin is wired to.
    pub(super) fn number(&self) -> u8 {
        self.line.number()
    }

    /// An incoming mailbox has been filled.
    pub(super) fn inbox_loaded(&self) {
        self.change(|state| state.mailbox(INBOX_LOADED));
    }

    /// An outgoing mailbox is free again.
    pub(super) fn outbox_free(&self) {
        self.change(|state| state.mailbox(OUTBOX_FREE));
    }

    /// A command is complete.
    pub(super) fn command_complete(&self, told: Told) {
        self.change(|state| {
            if state.shown != 0 {
                state.waiting |= COMMAND_COMPLETE;
                return;
            }
            (state.shown, state.loud) = (VALID | COMMAND_COMPLETE, told == Told::Interrupt);
        });
    }

    /// The guest acknowledges what is shown; what waits comes next.
    pub(super) fn acknowledge(&self) {
        self.change(|state| {
            let mailboxes = state.waiting & MAILBOXES;
            let next = if mailboxes != 0 { mailboxes } else { state.waiting };
            state.waiting &= !next;
            (state.shown, state.loud) = (if next == 0 { 0 } else { VALID | next }, next != 0);
        });
    }

    /// May the line be asserted?
    pub(super) fn enable(&self, enabled: bool) {
        self.change(|state| state.enabled = enabled);
    }

    /// As after power on.
    pub(super) fn reset(&self) {
        self.change(|state| *state = State::default());
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        self.line.set_level(state.shown != 0 && state.loud && state.enabled);
    }
}

impl State {
    fn mailbox(&mut self, bit: u8) {
        if self.shown & COMMAND_COMPLETE != 0 {
            self.waiting |= bit;
            return;
        }
        (self.shown, self.loud) = (self.shown | VALID | bit, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hba::testing::Line;
    use std::sync::atomic::Ordering;

    #[test]
    fn mailboxes_and_commands_are_shown_in_turn_and_none_is_lost() {
        let line = Arc::new(Line::default());
        let interrupts = Interrupts::new(line.clone());
        let seen = || (interrupts.shown(), line.level.load(Ordering::SeqCst));
        interrupts.inbox_loaded();
        interrupts.outbox_free();
        assert_eq!(seen(), (0x83, true));
        interrupts.command_complete(Told::Interrupt);
        assert_eq!(seen(), (0x83, true));
        interrupts.acknowledge();
        assert_eq!(seen(), (0x84, true));
        interrupts.inbox_loaded();
        interrupts.command_complete(Told::Interrupt);
        assert_eq!(seen(), (0x84, true));
        interrupts.acknowledge();
        assert_eq!(seen(), (0x81, true));
        interrupts.enable(false);
        assert_eq!(seen(), (0x81, false));
        interrupts.enable(true);
        interrupts.acknowledge();
        assert_eq!(seen(), (0x84, true));
        interrupts.acknowledge();
        assert_eq!(seen(), (0, false));
        interrupts.command_complete(Told::BitOnly);
        assert_eq!(seen(), (0x84, false));
        interrupts.reset();
        assert_eq!(seen(), (0, false));
    }
}
