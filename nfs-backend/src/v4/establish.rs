//! Owns: how a client becomes known to a server and gets sessions: EXCHANGE_ID, CREATE_SESSION, and their ends (RFC 8881, 18.35 to 18.37, 18.50).
//! Promises: each may be sent again. Must not know: files.

use super::calls::{Pauses, begin, compound, expect, operation, read_head};
use super::session::{Channel, FEWEST_SLOTS, MOST_SLOTS, SessionId};
use super::status::{Verdict, judge};
use crate::error::{NfsError, Status};
use crate::file::MOST_BYTES;
use crate::rpc::{Client, Sending};
use crate::xdr::{Reader, Writer, XdrError};

/// EXCHGID4_FLAG_USE_NON_PNFS.
const USE_NON_PNFS: u32 = 0x0001_0000;
/// EXCHGID4_FLAG_CONFIRMED_R: the server has known this client already.
const CONFIRMED: u32 = 0x8000_0000;
/// Bytes of a request or reply besides its data.
const MOST_HEADERS: u32 = 4 << 10;
/// Bytes of a reply that the server keeps for a slot.
const MOST_KEPT_REPLY: u32 = 4 << 10;
/// The shortest request of use: data and headers.
const FEWEST_BYTES: u32 = MOST_HEADERS + 4096;
const MOST_OPERATIONS: u32 = 16;
/// Program of calls that the server makes; it has no connection for them.
const CALLBACK_PROGRAM: u32 = 0x4000_0000;

/// Who the client is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// Unique among all clients of the server (co_ownerid).
    pub owner: Vec<u8>,
    /// Another one makes the server forget what the owner had open.
    pub verifier: [u8; 8],
}

impl Identity {
    /// One that nobody has had.
    pub fn new() -> Identity {
        let mut random = [0; 24];
        getrandom::fill(&mut random).expect("the system gives random numbers");
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let text: String = random[8..].iter().map(|byte| format!("{byte:02x}")).collect();
        let owner = format!("vmfs {host} {} {text}", std::process::id()).into_bytes();
        Identity { owner, verifier: *random.first_chunk().expect("longer than a verifier") }
    }

    /// The same owner, who has lost all that he had.
    pub fn begin_anew(&mut self) {
        getrandom::fill(&mut self.verifier).expect("the system gives random numbers");
    }
}

/// What the server says of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub client: u64,
    /// For the next CREATE_SESSION, of a client that was not known.
    pub sequence: u32,
    /// It was known before, with what it had open.
    pub is_confirmed: bool,
}

/// One operation without a session; `parse` reads its results.
async fn alone<T>(
    client: &Client,
    (name, number): (&'static str, u32),
    how: Sending,
    mut build: impl FnMut(&mut Vec<u8>),
    parse: impl Fn(&mut Reader<'_>) -> Result<T, XdrError>,
) -> Result<T, NfsError> {
    let how = Sending { repeat: true, gated: false, recovery: true, ..how };
    let mut pauses = Pauses::new();
    loop {
        let mut call = client.begin(compound(name), true).await?;
        begin(call.arguments(), 1);
        call.arguments().put_u32(number);
        build(call.arguments());
        let answer = call.send(how).await?;
        let mut reader = answer.results();
        let (status, _) = read_head(&mut reader).map_err(NfsError::nonsense(name))?;
        match status {
            Status(0) => {
                let mut whole = || {
                    expect(&mut reader, number)?;
                    parse(&mut reader)
                };
                return whole().map_err(NfsError::nonsense(name));
            }
            status if judge(status) == Verdict::Busy && pauses.wait(how.deadline).await => {}
            status => return Err(NfsError::Refused { procedure: name, status }),
        }
    }
}

/// Makes the client known.
pub(super) async fn exchange_id(client: &Client, identity: &Identity, how: Sending) -> Result<Known, NfsError> {
    let build = |to: &mut Vec<u8>| {
        to.extend_from_slice(&identity.verifier);
        to.put_opaque(&identity.owner);
        // No protection of state (SP4_NONE), no name of an implementation.
        for word in [USE_NON_PNFS, 0, 0] {
            to.put_u32(word);
        }
    };
    let parse = |reader: &mut Reader<'_>| {
        let (client, sequence, flags) = (reader.u64()?, reader.u32()?, reader.u32()?);
        match reader.u32()? {
            0 => Ok(Known { client, sequence, is_confirmed: flags & CONFIRMED != 0 }),
            other => Err(XdrError::Value(other)),
        }
    };
    alone(client, ("EXCHANGE_ID", operation::EXCHANGE_ID), how, build, parse).await
}

fn put_channel(to: &mut Vec<u8>, bytes: u32, kept: u32, operations: u32, slots: u32) {
    for word in [0, bytes, bytes, kept, operations, slots, 0] {
        to.put_u32(word);
    }
}

fn read_session(reader: &mut Reader<'_>) -> Result<(SessionId, Channel), XdrError> {
    let id = reader.array()?;
    let (_sequence, _flags, _padding) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let (most_request, most_response) = (reader.u32()?, reader.u32()?);
    let (_kept, operations, slots) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let limits = [(most_request, FEWEST_BYTES), (most_response, FEWEST_BYTES), (operations, 8), (slots, FEWEST_SLOTS)];
    match limits.iter().find(|(given, needed)| given < needed) {
        Some((given, _)) => Err(XdrError::Value(*given)),
        None => Ok((id, Channel { most_request, most_response, slots: slots.min(MOST_SLOTS) })),
    }
}

/// Makes a session of a client; the first confirms him.
pub(super) async fn create_session(
    client: &Client,
    (id, sequence): (u64, u32),
    how: Sending,
) -> Result<(SessionId, Channel), NfsError> {
    let build = |to: &mut Vec<u8>| {
        to.put_u64(id);
        to.put_u32(sequence);
        to.put_u32(0);
        put_channel(to, MOST_BYTES + MOST_HEADERS, MOST_KEPT_REPLY, MOST_OPERATIONS, MOST_SLOTS);
        put_channel(to, MOST_HEADERS, 0, 2, 1);
        // Calls of the server: AUTH_NONE, if ever.
        for word in [CALLBACK_PROGRAM, 1, 0] {
            to.put_u32(word);
        }
    };
    alone(client, ("CREATE_SESSION", operation::CREATE_SESSION), how, build, read_session).await
}

/// Binds the connection to a session, for a server that does not do so by itself.
pub(super) async fn bind(client: &Client, session: &SessionId, how: Sending) -> Result<(), NfsError> {
    const FORE: u32 = 1;
    let build = |to: &mut Vec<u8>| {
        to.extend_from_slice(session);
        to.put_u32(FORE);
        to.put_bool(false);
    };
    alone(client, ("BIND_CONN_TO_SESSION", operation::BIND_CONN_TO_SESSION), how, build, |_| Ok(())).await
}

/// Ends a session.
pub(super) async fn destroy_session(client: &Client, session: &SessionId, how: Sending) -> Result<(), NfsError> {
    let build = |to: &mut Vec<u8>| to.extend_from_slice(session);
    alone(client, ("DESTROY_SESSION", operation::DESTROY_SESSION), how, build, |_| Ok(())).await
}

/// Makes the server forget a client, who has no session and nothing open.
pub(super) async fn destroy_client(client: &Client, id: u64, how: Sending) -> Result<(), NfsError> {
    alone(client, ("DESTROY_CLIENTID", operation::DESTROY_CLIENTID), how, |to| to.put_u64(id), |_| Ok(())).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_session_that_is_of_no_use_is_refused() {
        let reply = |request: u32, slots: u32| {
            let words = [1, 0, 0, request, 1 << 20, 4096, 16, slots, 0];
            [vec![3; 16], words.iter().flat_map(|word: &u32| word.to_be_bytes()).collect()].concat()
        };
        let (id, channel) = read_session(&mut Reader::new(&reply(1 << 20, 1000))).expect("good");
        assert_eq!((id, channel.slots), ([3; 16], MOST_SLOTS));
        assert!(read_session(&mut Reader::new(&reply(1 << 20, 1))).is_err(), "no slot for a recovery");
        assert!(read_session(&mut Reader::new(&reply(512, 8))).is_err(), "no room for data");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read_session(&mut Reader::new(&bytes));
        }
    }
}
