//! Owns: COMPOUND (RFC 8881, 16.2): one request in a slot of a session, and what its reply says before the results that matter.
//! Promises: a reply counts only if it is for this session, slot and sequence number. Must not know: files; where sessions come from.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::establish;
use super::session::Session;
use super::status::{self, NOT_BOUND, UNCACHED, Verdict, judge};
use crate::error::{NfsError, Status};
use crate::rpc::{Answer, Client, Procedure, Sending};
use crate::xdr::{Reader, Writer, XdrError};

/// Operations, by number (RFC 8881, 16.2.3 and 18).
pub(super) mod operation {
    pub const CLOSE: u32 = 4;
    pub const COMMIT: u32 = 5;
    pub const CREATE: u32 = 6;
    pub const GETATTR: u32 = 9;
    pub const GETFH: u32 = 10;
    pub const LOOKUP: u32 = 15;
    pub const OPEN: u32 = 18;
    pub const PUTFH: u32 = 22;
    pub const PUTROOTFH: u32 = 24;
    pub const READ: u32 = 25;
    pub const READLINK: u32 = 27;
    pub const REMOVE: u32 = 28;
    pub const SETATTR: u32 = 34;
    pub const WRITE: u32 = 38;
    pub const BIND_CONN_TO_SESSION: u32 = 41;
    pub const EXCHANGE_ID: u32 = 42;
    pub const CREATE_SESSION: u32 = 43;
    pub const DESTROY_SESSION: u32 = 44;
    pub const SEQUENCE: u32 = 53;
    pub const TEST_STATEID: u32 = 55;
    pub const DESTROY_CLIENTID: u32 = 57;
    pub const RECLAIM_COMPLETE: u32 = 58;
}

/// Longest tag that a server may answer with.
const MAX_TAG: usize = 1024;
const MINOR_VERSION: u32 = 1;
/// The first pause before a server that had no time is asked again, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// The RPC procedure that everything goes by.
pub(super) const fn compound(name: &'static str) -> Procedure {
    Procedure { program: 100_003, version: 4, number: 1, name }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// The operation that matters, for messages.
    pub name: &'static str,
    /// How many operations there are besides SEQUENCE.
    pub operations: u32,
    /// The server keeps the reply: a second time it is not done again. Without, what is asked for changes nothing.
    pub keep: bool,
}

/// Growing pauses.
pub(super) struct Pauses(Duration);

impl Pauses {
    pub fn new() -> Self {
        Self(PAUSES.0)
    }

    /// Waits. False: the deadline would be over.
    pub async fn wait(&mut self, deadline: Option<Instant>) -> bool {
        if deadline.is_some_and(|by| Instant::now() + self.0 >= by) {
            return false;
        }
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSES.1);
        true
    }
}

/// COMPOUND4args before the operations.
pub(super) fn begin(to: &mut Vec<u8>, operations: u32) {
    to.put_opaque(b"");
    to.put_u32(MINOR_VERSION);
    to.put_u32(operations);
}

/// COMPOUND4res before the results: its status and the number of results.
pub(super) fn read_head(reader: &mut Reader<'_>) -> Result<(Status, u32), XdrError> {
    let status = Status(reader.u32()?);
    reader.opaque(MAX_TAG)?;
    Ok((status, reader.u32()?))
}

/// The result of an operation: its number, and that it was done.
pub(super) fn expect(reader: &mut Reader<'_>, operation: u32) -> Result<(), XdrError> {
    for expected in [operation, 0] {
        let found = reader.u32()?;
        if found != expected {
            return Err(XdrError::Value(found));
        }
    }
    Ok(())
}

/// What a reply says of the request as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// The slot has counted it. The last operation's status, and so many bytes before the other results.
    Counted(Status, usize),
    /// It was refused before.
    Refused(Status),
}

fn parse(results: Reader<'_>, session: &[u8; 16], slot: u32, sequence: u32) -> Result<Head, XdrError> {
    let mut reader = results;
    let (status, count) = read_head(&mut reader)?;
    if count == 0 {
        return match status.0 {
            0 => Err(XdrError::Short),
            _ => Ok(Head::Refused(status)),
        };
    }
    let operation = reader.u32()?;
    if operation != operation::SEQUENCE {
        return Err(XdrError::Value(operation));
    }
    match reader.u32()? {
        0 => {}
        refused if refused == status.0 => return Ok(Head::Refused(status)),
        other => return Err(XdrError::Value(other)),
    }
    let (id, found_sequence, found_slot): ([u8; 16], u32, u32) = (reader.array()?, reader.u32()?, reader.u32()?);
    if id != *session || found_sequence != sequence || found_slot != slot {
        return Err(XdrError::Value(found_sequence));
    }
    let (_highest, _target, _flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
    Ok(Head::Counted(status, results.rest().len() - reader.rest().len()))
}

/// A reply whose last operation was done.
pub(super) struct Reply<'a> {
    pub answer: Answer<'a>,
    skip: usize,
}

impl Reply<'_> {
    /// The results behind that of SEQUENCE.
    pub fn results(&self) -> Reader<'_> {
        Reader::new(&self.answer.results().rest()[self.skip..])
    }
}

/// Sends one request in a slot of the session; `build` writes the operations.
///
/// # Errors
/// [`NfsError`]; the status of the operation that failed, or of a session that has ended.
pub(super) async fn exchange<'a>(
    client: &'a Client,
    session: &Session,
    ask: Ask,
    how: Sending,
    mut build: impl FnMut(&mut Vec<u8>),
) -> Result<Reply<'a>, NfsError> {
    let refused = |status| NfsError::Refused { procedure: ask.name, status };
    let mut pauses = Pauses::new();
    loop {
        let Some(mut slot) = session.take(how.recovery).await else { return Err(refused(status::dead_session())) };
        let mut call = client.begin(compound(ask.name), how.recovery).await?;
        let to = call.arguments();
        begin(to, ask.operations + 1);
        to.put_u32(operation::SEQUENCE);
        to.extend_from_slice(session.id());
        for word in [slot.sequence, slot.number, session.channel().slots - 1, u32::from(ask.keep)] {
            to.put_u32(word);
        }
        build(to);
        slot.sent();
        // Over a new connection it is the same request of the same slot.
        let answer = match call.send(Sending { repeat: true, ..how }).await {
            Err(error @ (NfsError::Unreachable { .. } | NfsError::Denied { .. })) => {
                slot.unused();
                return Err(error);
            }
            other => other?,
        };
        let head = parse(answer.results(), session.id(), slot.number, slot.sequence);
        let status = match head.map_err(NfsError::nonsense(ask.name))? {
            Head::Counted(Status(0), skip) => {
                slot.answered();
                return Ok(Reply { answer, skip });
            }
            Head::Counted(status, _) => {
                slot.answered();
                if status == UNCACHED && !ask.keep {
                    continue;
                }
                return Err(refused(status));
            }
            Head::Refused(status) => status,
        };
        match judge(status) {
            // Its slot cannot be used any more. As each has an end, so has this.
            Verdict::Slot => {}
            Verdict::Busy => {
                slot.unused();
                drop(slot);
                if !pauses.wait(how.deadline).await {
                    return Err(refused(status));
                }
            }
            _ if status == UNCACHED && !ask.keep => slot.answered(),
            _ if status == NOT_BOUND => {
                slot.unused();
                drop(answer);
                establish::bind(client, session.id(), how).await?;
            }
            _ => {
                slot.unused();
                return Err(refused(status));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn a_reply_counts_only_for_its_own_session_slot_and_number() {
        let reply =
            |slot, sequence| [words(&[0, 0, 2, 53, 0]), vec![7; 16], words(&[sequence, slot, 9, 9, 0, 22, 0])].concat();
        let parse = |bytes: &[u8]| parse(Reader::new(bytes), &[7; 16], 3, 5);
        let good = reply(3, 5);
        assert_eq!(parse(&good), Ok(Head::Counted(Status(0), good.len() - 8)));
        assert!(parse(&reply(4, 5)).is_err() && parse(&reply(3, 6)).is_err());
        assert_eq!(parse(&words(&[10052, 0, 1, 53, 10052])), Ok(Head::Refused(Status(10052))));
        assert_eq!(parse(&words(&[10021, 0, 0])), Ok(Head::Refused(Status(10021))));
        assert!(parse(&words(&[0, 0, 0])).is_err() && parse(&words(&[0, 0, 1, 22, 0])).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), like: bool) {
            let likely = [words(&[0, 0, 2, 53, 0]), vec![7; 16], words(&[5, 3]), bytes.clone()].concat();
            let bytes = if like { &likely } else { &bytes };
            if let Ok(Head::Counted(_, skip)) = parse(Reader::new(bytes), &[7; 16], 3, 5) {
                prop_assert!(skip <= bytes.len());
            }
        }
    }
}
