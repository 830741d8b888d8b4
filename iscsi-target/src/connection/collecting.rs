//! Owns: the data of one write on their way in: immediate, unsolicited, asked for by R2Ts (RFC 7143, 4.2.4 and 11.7, 11.8).
//! Promises: every byte is put in its place once; whatever comes out of order, twice or beyond is an error that ends the command.
//! Must not know: sockets, the device server.

use std::collections::VecDeque;

use iscsi::login::parameters::Parameters;
use iscsi::pdu::{DataOut, NO_TAG, ScsiCommand};
use scsi::DataBuffer;

use super::inbox::Data;
use crate::memory::Landing;

/// What is wrong with the data of a command, as additional sense code and qualifier with ABORTED COMMAND (SPC-4, table F.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Data that nobody asked for (RFC 7143, 11.4.7.2).
    Unexpected,
    /// Fewer data than were asked for.
    TooFew,
    /// Out of order, or beyond what was asked for.
    OutOfPlace,
    /// The digest is wrong.
    Digest,
}

impl Flaw {
    /// Additional sense code and qualifier.
    pub fn sense(self) -> (u8, u8) {
        match self {
            Flaw::Unexpected => (0x0C, 0x0C),
            Flaw::TooFew => (0x0C, 0x0D),
            Flaw::OutOfPlace => (0x4B, 0x00),
            Flaw::Digest => (0x47, 0x05),
        }
    }
}

/// A sequence that an R2T has asked for.
#[derive(Clone, Copy, Debug)]
struct Burst {
    transfer_tag: u32,
    end: u32,
}

/// An R2T to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Tag.
    pub transfer_tag: u32,
    /// Its number.
    pub number: u32,
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

/// A write whose data are still coming.
pub struct Collecting {
    /// The command.
    pub command: ScsiCommand,
    /// Where the data go. It may be shorter than what the initiator has: the rest is taken and forgotten.
    pub buffer: DataBuffer,
    received: u32,
    /// Number of the next PDU of the running sequence.
    next: u32,
    unsolicited_end: Option<u32>,
    bursts: VecDeque<Burst>,
    asked: u32,
    wishes: u32,
    burst: u32,
    outstanding: u32,
}

impl Collecting {
    /// Begins with what the command itself carries.
    pub fn begin(
        command: ScsiCommand,
        immediate: Data<'_>,
        agreed: &Parameters,
        buffer: DataBuffer,
    ) -> Result<Collecting, Flaw> {
        let length = immediate.len() as u32;
        let most = agreed.first_burst.min(command.expected);
        if length > 0 && (!agreed.immediate_data || length > most) || (!command.is_final && agreed.initial_ready) {
            return Err(Flaw::Unexpected);
        }
        let unsolicited_end = (!command.is_final).then_some(most);
        let mut collecting = Collecting {
            command,
            buffer,
            received: 0,
            next: 0,
            unsolicited_end,
            bursts: VecDeque::new(),
            asked: 0,
            wishes: 0,
            burst: agreed.burst,
            outstanding: agreed.outstanding_ready,
        };
        collecting.put(immediate);
        collecting.asked = collecting.received;
        Ok(collecting)
    }

    /// Everything is there.
    pub fn is_complete(&self) -> bool {
        self.received == self.command.expected
    }

    /// R2Ts so far.
    pub fn wishes(&self) -> u32 {
        self.wishes
    }

    /// The next R2T, if it is time for one. `transfer_tag` becomes its tag.
    pub fn wish(&mut self, transfer_tag: u32) -> Option<Wish> {
        let full = self.bursts.len() as u32 >= self.outstanding;
        if self.unsolicited_end.is_some() || full || self.asked >= self.command.expected {
            return None;
        }
        let length = self.burst.min(self.command.expected - self.asked);
        let wish = Wish { transfer_tag, number: self.wishes, offset: self.asked, length };
        self.asked += length;
        self.wishes += 1;
        self.bursts.push_back(Burst { transfer_tag, end: self.asked });
        Some(wish)
    }

    /// The place of the data of a Data-Out, if it comes as it should.
    pub fn landing(&self, out: &DataOut, length: usize) -> Option<Landing> {
        self.check(out, length).ok()?;
        Landing::new(&self.buffer, self.received as usize, length)
    }

    /// Where the sequence ends that a Data-Out of `length` bytes belongs to, if it comes as it should.
    fn check(&self, out: &DataOut, length: usize) -> Result<u32, Flaw> {
        let end = match (out.transfer_tag, self.unsolicited_end, self.bursts.front()) {
            (NO_TAG, Some(end), _) => end,
            (NO_TAG, None, _) => return Err(Flaw::Unexpected),
            (tag, _, Some(burst)) if tag == burst.transfer_tag => burst.end,
            _ => return Err(Flaw::OutOfPlace),
        };
        let after = u64::from(out.offset) + length as u64;
        if out.number != self.next || out.offset != self.received || after > u64::from(end) {
            return Err(Flaw::OutOfPlace);
        }
        Ok(end)
    }

    /// Takes a Data-Out.
    pub fn take(&mut self, out: &DataOut, data: Data<'_>) -> Result<(), Flaw> {
        let end = self.check(out, data.len())?;
        self.put(data);
        self.next += 1;
        if !out.is_final {
            return Ok(());
        }
        self.next = 0;
        if self.unsolicited_end.take().is_some() {
            self.asked = self.received;
        } else {
            self.bursts.pop_front();
            if self.received != end {
                return Err(Flaw::TooFew);
            }
        }
        Ok(())
    }

    fn put(&mut self, data: Data<'_>) {
        let bytes = data.here();
        let room = self.buffer.len().saturating_sub(self.received as usize);
        let kept = bytes.len().min(room);
        if kept > 0 {
            self.buffer.copy_from(self.received as usize, &bytes[..kept]);
        }
        self.received += data.len() as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn command(expected: u32, is_final: bool) -> ScsiCommand {
        ScsiCommand {
            is_final,
            reads: false,
            writes: true,
            attribute: 0,
            lun: [0; 8],
            tag: 1,
            expected,
            number: 0,
            cdb: [0; 16],
        }
    }

    fn agreed() -> Parameters {
        Parameters {
            initial_ready: false,
            burst: 1024,
            first_burst: 512,
            outstanding_ready: 2,
            ..Parameters::default()
        }
    }

    fn out(transfer_tag: u32, number: u32, offset: u32, is_final: bool) -> DataOut {
        DataOut { is_final, tag: 1, transfer_tag, number, offset }
    }

    #[test]
    fn immediate_unsolicited_and_asked_for_data_come_together() {
        let bytes: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let buffer = DataBuffer::zeroed(3000, 8);
        let mut write =
            Collecting::begin(command(3000, false), Data::Here(&bytes[..100]), &agreed(), buffer).ok().unwrap();
        assert_eq!(write.wish(7), None, "not before the unsolicited ones are there");
        write.take(&out(NO_TAG, 0, 100, false), Data::Here(&bytes[100..300])).unwrap();
        write.take(&out(NO_TAG, 1, 300, true), Data::Here(&bytes[300..512])).unwrap();
        assert_eq!(write.wish(7), Some(Wish { transfer_tag: 7, number: 0, offset: 512, length: 1024 }));
        assert_eq!(write.wish(8), Some(Wish { transfer_tag: 8, number: 1, offset: 1536, length: 1024 }));
        assert_eq!(write.wish(9), None, "two are outstanding");
        write.take(&out(7, 0, 512, true), Data::Here(&bytes[512..1536])).unwrap();
        assert_eq!(write.wish(9), Some(Wish { transfer_tag: 9, number: 2, offset: 2560, length: 440 }));
        write.take(&out(8, 0, 1536, true), Data::Here(&bytes[1536..2560])).unwrap();
        write.take(&out(9, 0, 2560, true), Data::Here(&bytes[2560..])).unwrap();
        assert!(write.is_complete());
        assert_eq!((write.buffer.to_vec(), write.wishes()), (bytes, 3));
    }

    #[test]
    fn what_is_not_as_it_should_be_is_told_apart() {
        let begin = |command, data: &[u8], agreed: &Parameters| {
            Collecting::begin(command, Data::Here(data), agreed, DataBuffer::zeroed(2048, 8)).err()
        };
        let strict = Parameters { initial_ready: true, immediate_data: false, ..agreed() };
        assert_eq!(begin(command(2048, true), &[1], &strict), Some(Flaw::Unexpected));
        assert_eq!(begin(command(2048, false), &[], &strict), Some(Flaw::Unexpected));
        assert_eq!(begin(command(2048, true), &[0; 513], &agreed()), Some(Flaw::Unexpected), "beyond the first burst");
        assert_eq!(begin(command(4, true), &[0; 5], &agreed()), Some(Flaw::Unexpected), "more than announced");

        let asked = || {
            let buffer = DataBuffer::zeroed(2048, 8);
            let mut write = Collecting::begin(command(2048, true), Data::Here(&[]), &agreed(), buffer).ok().unwrap();
            write.wish(5).unwrap();
            write
        };
        assert_eq!(asked().take(&out(NO_TAG, 0, 0, true), Data::Here(&[0; 512])), Err(Flaw::Unexpected));
        assert_eq!(asked().take(&out(6, 0, 0, true), Data::Here(&[0; 512])), Err(Flaw::OutOfPlace), "another tag");
        assert_eq!(asked().take(&out(5, 1, 0, true), Data::Here(&[0; 1024])), Err(Flaw::OutOfPlace), "another number");
        assert_eq!(asked().take(&out(5, 0, 4, true), Data::Here(&[0; 512])), Err(Flaw::OutOfPlace), "another place");
        assert_eq!(asked().take(&out(5, 0, 0, true), Data::Here(&[0; 1025])), Err(Flaw::OutOfPlace), "too much");
        assert_eq!(asked().take(&out(5, 0, 0, true), Data::Here(&[0; 1000])), Err(Flaw::TooFew));
    }

    proptest! {
        #[test]
        fn any_data_end_in_an_error_or_in_their_place(
            expected in 0u32..5000,
            is_final: bool,
            pdus in prop::collection::vec((0u32..4, 0u32..3, 0u32..5000, any::<bool>(), 0usize..1500), 0..20),
        ) {
            let begun = Collecting::begin(command(expected, is_final), Data::Here(&[]), &agreed(), DataBuffer::zeroed(1000, 8));
            let mut write = begun.ok().unwrap();
            for (nth, (tag, number, offset, last, length)) in pdus.into_iter().enumerate() {
                let _ = write.wish(nth as u32 % 3);
                let tag = if tag == 3 { NO_TAG } else { tag };
                if write.take(&out(tag, number, offset, last), Data::Here(&vec![1; length])).is_err() {
                    break;
                }
                prop_assert!(write.received <= expected);
            }
        }
    }
}
