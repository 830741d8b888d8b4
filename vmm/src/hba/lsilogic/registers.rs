//! Owns: the register window of the 53C1030, the keys of its diagnostic register, and the doorbell's handshake.
//! Promises: pure; each access gives at most one thing to do; a message that comes by the doorbell is bounded.
//! Must not know: guest memory, threads, what a message means.

use crate::hba::window;

/// Size of the register file's memory window in bytes; the I/O window shows the first 256 of them.
pub(super) const WINDOW_SIZE: u32 = 0x2_0000;
/// Size of the I/O window.
pub(super) const IO_WINDOW_SIZE: u32 = 0x100;

/// A register of 4 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Doorbell,
    WriteSequence,
    HostDiagnostic,
    InterruptStatus,
    InterruptMask,
    RequestFifo,
    ReplyFifo,
    Reserved,
}

/// The window as pieces in ascending order; source: the System Interface Register Set of Linux's lsi/mpi.h.
const WINDOW: &[(Register, u32)] = &[
    (Register::Doorbell, 4),
    (Register::WriteSequence, 4),
    (Register::HostDiagnostic, 4),
    // Test base, diagnostic read/write data and address: nothing behind them.
    (Register::Reserved, 0x30 - 0x0C),
    (Register::InterruptStatus, 4),
    (Register::InterruptMask, 4),
    (Register::Reserved, 0x40 - 0x38),
    (Register::RequestFifo, 4),
    (Register::ReplyFifo, 4),
    // The high-priority request FIFO is not there: IOC FACTS says so.
    (Register::Reserved, WINDOW_SIZE - 0x48),
];

const _: () = assert!(window::size(WINDOW) == WINDOW_SIZE);

/// The register that holds the byte at `offset`.
pub(super) fn register_at(offset: u64) -> Register {
    window::register_at(WINDOW, offset).unwrap_or(Register::Reserved)
}

/// HOST INTERRUPT STATUS: a reply is in the reply FIFO.
pub(super) const REPLY_INTERRUPT: u32 = 1 << 3;
/// HOST INTERRUPT STATUS: the doorbell has something for the host.
pub(super) const DOORBELL_INTERRUPT: u32 = 1;
/// The interrupts that exist, in status and mask alike.
pub(super) const INTERRUPTS: u32 = REPLY_INTERRUPT | DOORBELL_INTERRUPT;
/// What an empty reply FIFO reads as.
pub(super) const FIFO_EMPTY: u32 = u32::MAX;

/// HOST DIAGNOSTIC: the register may be written.
const DIAGNOSTIC_WRITE_ENABLED: u32 = 0x80;
/// HOST DIAGNOSTIC: the adapter has been reset by this register; the host clears it.
const RESET_HISTORY: u32 = 0x20;
/// HOST DIAGNOSTIC: reset the adapter.
const RESET_ADAPTER: u32 = 0x04;
/// HOST DIAGNOSTIC: bits that keep what was written: prevent boot, read/write enable, disable ARM, memory enable.
const DIAGNOSTIC_KEPT: u32 = 0x200 | 0x10 | 0x02 | 0x01;
/// The values that, written to WRITE SEQUENCE one after the other, make HOST DIAGNOSTIC writable.
const KEYS: [u32; 5] = [0x4, 0xB, 0x2, 0x7, 0xD];

/// WRITE SEQUENCE and HOST DIAGNOSTIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Diagnostic {
    value: u32,
    keys_seen: usize,
}

impl Diagnostic {
    /// The register as it reads.
    pub(super) fn value(&self) -> u32 {
        self.value
    }

    /// A write to WRITE SEQUENCE. A wrong key starts the sequence anew; once enabled, any key disables.
    pub(super) fn key(&mut self, value: u32) {
        if self.value & DIAGNOSTIC_WRITE_ENABLED != 0 {
            self.value &= !DIAGNOSTIC_WRITE_ENABLED;
            self.keys_seen = 0;
        }
        let key = value & 0xF;
        self.keys_seen = if key == KEYS[self.keys_seen] { self.keys_seen + 1 } else { usize::from(key == KEYS[0]) };
        if self.keys_seen == KEYS.len() {
            self.keys_seen = 0;
            self.value |= DIAGNOSTIC_WRITE_ENABLED;
        }
    }

    /// A write to HOST DIAGNOSTIC; true if it resets the adapter.
    pub(super) fn write(&mut self, value: u32) -> bool {
        if self.value & DIAGNOSTIC_WRITE_ENABLED == 0 {
            return false;
        }
        if value & RESET_ADAPTER != 0 {
            *self = Self { value: RESET_HISTORY, keys_seen: 0 };
            return true;
        }
        let history = self.value & value & RESET_HISTORY;
        self.value = DIAGNOSTIC_WRITE_ENABLED | history | value & DIAGNOSTIC_KEPT;
        false
    }
}

/// Most double words of a message that comes by the doorbell: those of a request frame.
pub(super) const MESSAGE_WORDS: usize = 32;

/// What a write to the doorbell asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DoorbellEvent {
    /// Reset the message unit.
    MessageUnitReset,
    /// Reset the whole I/O unit.
    IoUnitReset,
    /// A message is complete; [`Doorbell::reply`] or [`Doorbell::accept`] comes next.
    Message(Vec<u8>),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    Receive {
        wanted: usize,
        words: Vec<u32>,
    },
    Send {
        words: Vec<u16>,
        next: usize,
    },
}

/// The doorbell's handshake. Linux polls the interrupt bit between all steps; SeaBIOS writes all words at once, reads the
/// whole reply without acknowledging anything, and acknowledges once at the end. Both work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Doorbell {
    phase: Phase,
}

impl Doorbell {
    /// Is a handshake under way?
    pub(super) fn is_active(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// A write. `interrupt` sets the doorbell's interrupt bit.
    pub(super) fn write(&mut self, value: u32, interrupt: impl FnOnce()) -> Option<DoorbellEvent> {
        const MESSAGE_UNIT_RESET: u32 = 0x40;
        const IO_UNIT_RESET: u32 = 0x41;
        const HANDSHAKE: u32 = 0x42;
        if let Phase::Receive { wanted, words } = &mut self.phase {
            words.push(value);
            if words.len() < *wanted {
                return None;
            }
            let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.phase = Phase::Idle;
            return Some(DoorbellEvent::Message(bytes));
        }
        match value >> 24 {
            MESSAGE_UNIT_RESET => Some(DoorbellEvent::MessageUnitReset),
            IO_UNIT_RESET => Some(DoorbellEvent::IoUnitReset),
            HANDSHAKE => {
                let wanted = (value >> 16 & 0xFF) as usize;
                if (1..=MESSAGE_WORDS).contains(&wanted) {
                    self.phase = Phase::Receive { wanted, words: Vec::with_capacity(wanted) };
                    interrupt();
                }
                None
            }
            _ => None,
        }
    }

    /// Has the host fetch `message` word by word. Set the doorbell's interrupt bit afterwards.
    pub(super) fn reply(&mut self, message: &[u8]) {
        let words = message.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word)).collect();
        self.phase = Phase::Send { words, next: 0 };
    }

    /// A read: the next word of the reply, if one is being fetched; 0 behind its end.
    pub(super) fn read(&mut self) -> u16 {
        let Phase::Send { words, next } = &mut self.phase else { return 0 };
        let word = words.get(*next).copied().unwrap_or(0);
        *next = (*next + 1).min(words.len());
        word
    }

    /// A write to the interrupt status. True: the interrupt bit is to be cleared. While a reply is fetched it stays; the
    /// acknowledgement behind the last word leaves one more to be seen.
    pub(super) fn acknowledge(&mut self) -> bool {
        match &self.phase {
            Phase::Send { words, next } if *next < words.len() => false,
            Phase::Send { .. } => {
                self.phase = Phase::Idle;
                false
            }
            Phase::Idle | Phase::Receive { .. } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn registers_are_where_drivers_look_for_them() {
        let expected = [
            (0x00, Register::Doorbell),
            (0x04, Register::WriteSequence),
            (0x08, Register::HostDiagnostic),
            (0x0C, Register::Reserved),
            (0x30, Register::InterruptStatus),
            (0x34, Register::InterruptMask),
            (0x38, Register::Reserved),
            (0x40, Register::RequestFifo),
            (0x44, Register::ReplyFifo),
            (0x48, Register::Reserved),
            (u64::MAX, Register::Reserved),
        ];
        for (offset, register) in expected {
            assert_eq!(register_at(offset), register, "offset {offset:x}");
        }
    }

    #[test]
    fn only_the_right_keys_open_the_diagnostic_register() {
        let mut diagnostic = Diagnostic::default();
        assert!(!diagnostic.write(0x04));
        for key in [0xF, 0x4, 0xB, 0x2, 0x7, 0x4, 0xB, 0x2, 0x7] {
            diagnostic.key(key);
            assert_eq!(diagnostic.value(), 0);
        }
        diagnostic.key(0xD);
        assert_eq!(diagnostic.value(), 0x80);
        assert!(!diagnostic.write(0x82));
        assert_eq!(diagnostic.value(), 0x82);
        assert!(diagnostic.write(0x84));
        assert_eq!(diagnostic.value(), 0x20);
        for key in [0xF, 0x4, 0xB, 0x2, 0x7, 0xD] {
            diagnostic.key(key);
        }
        diagnostic.write(0x80);
        assert_eq!(diagnostic.value(), 0x80);
        diagnostic.key(0xF);
        assert_eq!(diagnostic.value(), 0);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_keeps_the_handshake_bounded(
            accesses in prop::collection::vec((0u8..4, any::<u32>(), 0usize..80), 0..200),
        ) {
            let mut doorbell = Doorbell::default();
            for (kind, value, length) in accesses {
                match kind {
                    0 => {
                        if let Some(DoorbellEvent::Message(bytes)) = doorbell.write(value, || {}) {
                            prop_assert!((4..=4 * MESSAGE_WORDS).contains(&bytes.len()));
                            doorbell.reply(&vec![1; length]);
                        }
                    }
                    1 => {
                        doorbell.write(0x4200_0000 | value & 0x00FF_0000, || {});
                    }
                    2 => {
                        doorbell.read();
                    }
                    _ => {
                        doorbell.acknowledge();
                    }
                }
            }
        }
    }
}
