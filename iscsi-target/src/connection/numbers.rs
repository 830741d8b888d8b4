//! Owns: the numbers of a session: commands in, statuses out (RFC 7143, 4.2.2).
//! Promises: a command is taken once and in order; the window never shrinks in the initiator's eyes.
//! Must not know: PDUs, commands.

use std::cell::Cell;

use iscsi::pdu::Sequence;

/// Commands of one session that may be under way.
pub const DEPTH: u32 = 128;

/// What is to be done with a request, by its command number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is its turn.
    Now,
    /// It is outside of the window: it was not sent, as it were.
    Outside,
    /// One before it is missing, which on the only connection of a session can never come any more.
    Gap,
}

/// The numbers of a session with one connection.
#[derive(Debug)]
pub struct Numbers {
    status: Cell<u32>,
    expected: Cell<u32>,
    most: Cell<u32>,
    active: Cell<u32>,
}

impl Numbers {
    /// The numbers at the first login request.
    pub fn new(command: u32, status: u32) -> Self {
        Self {
            status: Cell::new(status),
            expected: Cell::new(command),
            most: Cell::new(command.wrapping_add(DEPTH - 1)),
            active: Cell::new(0),
        }
    }

    /// Takes the number of a request that is not immediate.
    pub fn take(&self, number: u32) -> Turn {
        let expected = self.expected.get();
        let ahead = number.wrapping_sub(expected) as i32;
        if ahead < 0 || (self.most.get().wrapping_sub(number) as i32) < 0 {
            return Turn::Outside;
        }
        if ahead > 0 {
            return Turn::Gap;
        }
        self.expected.set(expected.wrapping_add(1));
        Turn::Now
    }

    /// A command is under way.
    pub fn begin(&self) {
        self.active.set(self.active.get() + 1);
    }

    /// It has ended.
    pub fn end(&self) {
        self.active.set(self.active.get() - 1);
    }

    /// Commands under way.
    pub fn active(&self) -> u32 {
        self.active.get()
    }

    /// For a PDU that carries a status, which takes a number.
    pub fn with_status(&self) -> Sequence {
        let sequence = self.without_status();
        self.status.set(sequence.status.wrapping_add(1));
        sequence
    }

    /// For a PDU without a status.
    pub fn without_status(&self) -> Sequence {
        let free = DEPTH.saturating_sub(self.active.get());
        let most = self.expected.get().wrapping_add(free).wrapping_sub(1);
        if (most.wrapping_sub(self.most.get()) as i32) > 0 {
            self.most.set(most);
        }
        Sequence { status: self.status.get(), expected: self.expected.get(), most: self.most.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_taken_once_in_order_and_inside_the_window() {
        let numbers = Numbers::new(u32::MAX - 1, 5);
        assert_eq!(numbers.take(u32::MAX - 1), Turn::Now);
        assert_eq!(numbers.take(u32::MAX - 1), Turn::Outside, "a second time");
        assert_eq!(numbers.take(0), Turn::Gap);
        assert_eq!(numbers.take(u32::MAX), Turn::Now);
        assert_eq!(numbers.take(0), Turn::Now, "numbers wrap (RFC 1982)");
        let told = numbers.without_status();
        assert_eq!((told.status, told.expected, told.most), (5, 1, DEPTH));
        assert_eq!(numbers.take(told.most.wrapping_add(1)), Turn::Outside);
        assert_eq!((numbers.with_status().status, numbers.with_status().status), (5, 6));
    }

    proptest! {
        #[test]
        fn the_window_never_shrinks(start: u32, steps in prop::collection::vec(any::<bool>(), 0..300)) {
            let numbers = Numbers::new(start, 0);
            let mut most = numbers.without_status().most;
            for begins in steps {
                if begins {
                    if numbers.take(numbers.without_status().expected) == Turn::Now {
                        numbers.begin();
                    }
                } else if numbers.active() > 0 {
                    numbers.end();
                }
                let told = numbers.without_status();
                prop_assert!((told.most.wrapping_sub(most) as i32) >= 0);
                prop_assert!(told.most.wrapping_sub(told.expected).wrapping_add(1) <= DEPTH);
                prop_assert!(numbers.active() <= DEPTH);
                most = told.most;
            }
        }
    }
}
