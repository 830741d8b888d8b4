//! Owns: the receiving half of a connection: cutting the stream of bytes into headers and data.
//! Promises: memory is a fixed staging area and the small data that were asked for; digests are checked; a wait ends with the tick.
//! Must not know: what PDUs mean, whose memory data go into.

use std::io::{self, IoSliceMut, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};

use super::error::Broken;
use super::receiving::Route;
use crate::pdu::{DIGEST, Digests, HEADER, Header, digest, padded};

/// Bytes that are received ahead. Larger data go past it, straight to where they belong.
const STAGING: usize = 16 << 10;
/// The longest header: with all additional segments and a digest.
const LONGEST_HEADER: usize = HEADER + 255 * 4 + DIGEST;
const _: () = assert!(LONGEST_HEADER <= STAGING);

/// What a receive has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// So many bytes straight into the memory that was given; the rest is staged.
    Bytes(usize),
    /// Nothing within the tick.
    Quiet,
}

/// Where the data of the PDU under way are.
#[derive(Debug)]
pub(super) struct Payload {
    pub header: Header,
    /// Bytes of data that have not come yet.
    pub remaining: usize,
    /// Padding and digest that have not come yet.
    tail: usize,
    running: u32,
    told: [u8; 8],
}

/// The receiving half.
pub(super) struct Inbox {
    stream: Arc<TcpStream>,
    /// Which connection of the session it is.
    pub epoch: u64,
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    digests: Digests,
    tick: Duration,
    /// The longest data segment that the target may send.
    limit: usize,
    /// The PDU under way, once its header is there.
    pub payload: Option<Payload>,
    /// Data of PDUs that go into nobody's memory, as far as they are kept.
    pub small: Vec<u8>,
    /// Where the data of the PDU under way go.
    pub route: Route,
    keep: usize,
    /// Receives take what is there, and do not wait.
    pub at_once: bool,
    /// The last receive has brought less than there was room for: the socket had no more.
    pub is_drained: bool,
}

impl Inbox {
    /// Of a new connection. `limit`: the longest data segment; `keep`: how much of the data of other PDUs than Data-In is kept.
    pub fn new(stream: Arc<TcpStream>, limit: usize, keep: usize) -> Self {
        Self {
            stream,
            epoch: 0,
            staging: vec![0; STAGING].into_boxed_slice(),
            start: 0,
            end: 0,
            digests: Digests::default(),
            tick: Duration::ZERO,
            limit,
            payload: None,
            small: Vec::new(),
            route: Route::default(),
            keep,
            at_once: false,
            is_drained: false,
        }
    }

    /// From now on PDUs have these digests and at most these lengths.
    pub fn agree(&mut self, digests: Digests, limit: usize, keep: usize) {
        (self.digests, self.limit, self.keep) = (digests, limit, keep);
        self.small = Vec::with_capacity(keep.min(4096));
    }

    /// How long a receive waits; at least a millisecond.
    pub fn set_tick(&mut self, tick: Duration) -> io::Result<()> {
        let tick = tick.max(Duration::from_millis(1));
        if tick != self.tick {
            self.stream.set_read_timeout(Some(tick))?;
            self.tick = tick;
        }
        Ok(())
    }

    /// Bytes that are staged.
    pub fn staged(&self) -> usize {
        self.end - self.start
    }

    /// Receives once: first into `memory`, then into the staging area, which has to be empty if there is memory.
    pub fn receive(&mut self, memory: &mut [u8]) -> Result<Came, Broken> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.staging.len() - self.end < LONGEST_HEADER {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        debug_assert!(memory.is_empty() || self.end == 0);
        let direct = memory.len();
        let rest = &mut self.staging[self.end..];
        let room = direct + rest.len();
        let received = match direct {
            _ if self.at_once => now(&self.stream, &mut [IoSliceMut::new(memory), IoSliceMut::new(rest)]),
            0 => (&*self.stream).read(rest),
            _ => (&*self.stream).read_vectored(&mut [IoSliceMut::new(memory), IoSliceMut::new(rest)]),
        };
        self.is_drained = !matches!(received, Ok(count) if count == room);
        match received {
            Ok(0) => Err(Broken::Closed),
            Ok(count) => {
                self.end += count.saturating_sub(direct);
                Ok(Came::Bytes(count.min(direct)))
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(Came::Quiet),
                io::ErrorKind::Interrupted => Ok(Came::Bytes(0)),
                _ => Err(error.into()),
            },
        }
    }

    /// The next header, if all of it is staged; its data are under way then.
    pub fn next_header(&mut self) -> Result<Option<Header>, Broken> {
        let checked = |on: bool| if on { DIGEST } else { 0 };
        let bytes = &self.staging[self.start..self.end];
        let Some(basic) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let header = Header(*basic);
        let headers = HEADER + header.additional_length();
        let whole = headers + checked(self.digests.header);
        // What is too long is refused before more is waited for.
        let length = header.data_length();
        if length > self.limit {
            return Err(Broken::TooLong(length));
        }
        if bytes.len() < whole {
            return Ok(None);
        }
        if self.digests.header && bytes[headers..whole] != digest(&bytes[..headers]) {
            return Err(Broken::Digest("a header"));
        }
        self.start += whole;
        let tail = padded(length) - length + if length > 0 { checked(self.digests.data) } else { 0 };
        self.small.clear();
        self.payload = Some(Payload { header, remaining: length, tail, running: 0, told: [0; 8] });
        Ok(Some(header))
    }

    /// Whether the rest of the PDU under way, or else a whole one, is staged.
    pub fn has_more(&self) -> bool {
        match &self.payload {
            Some(payload) => self.staged() >= payload.remaining + payload.tail,
            None => {
                let bytes = &self.staging[self.start..self.end];
                bytes.first_chunk::<HEADER>().is_some_and(|basic| {
                    let header = Header(*basic);
                    bytes.len() >= HEADER + header.additional_length() + padded(header.data_length()) + 2 * DIGEST
                        || header.data_length() == 0
                })
            }
        }
    }

    /// Moves staged data of the PDU under way into `memory`; gives their number.
    pub fn unstage(&mut self, memory: &mut [u8]) -> usize {
        let Some(payload) = &mut self.payload else { return 0 };
        let count = payload.remaining.min(self.end - self.start).min(memory.len());
        let bytes = &self.staging[self.start..self.start + count];
        memory[..count].copy_from_slice(bytes);
        self.start += count;
        self.account(&memory[..count]);
        count
    }

    /// Takes staged data of the PDU under way into the small data; what is beyond those that are kept is forgotten.
    pub fn keep_staged(&mut self) -> usize {
        let Some(payload) = &self.payload else { return 0 };
        let count = payload.remaining.min(self.end - self.start);
        let (start, room) = (self.start, self.keep - self.small.len().min(self.keep));
        self.small.extend_from_slice(&self.staging[start..start + count.min(room)]);
        self.start += count;
        if let Some(payload) = &mut self.payload {
            payload.remaining -= count;
            if self.digests.data {
                payload.running = crc32c::crc32c_append(payload.running, &self.staging[start..start + count]);
            }
        }
        count
    }

    /// These data of the PDU under way are in their place.
    pub fn account(&mut self, bytes: &[u8]) {
        if let Some(payload) = &mut self.payload {
            payload.remaining -= bytes.len();
            if self.digests.data {
                payload.running = crc32c::crc32c_append(payload.running, bytes);
            }
        }
    }

    /// Ends the PDU under way, if padding and digest are there: then its header.
    pub fn finish(&mut self) -> Result<Option<Header>, Broken> {
        let Some(payload) = &mut self.payload else { return Ok(None) };
        if payload.remaining > 0 || self.end - self.start < payload.tail {
            return Ok(None);
        }
        let (header, tail) = (payload.header, payload.tail);
        let told = &mut payload.told[..tail];
        told.copy_from_slice(&self.staging[self.start..self.start + tail]);
        self.start += tail;
        if self.digests.data && header.data_length() > 0 {
            let (padding, told) = told.split_at(tail - DIGEST);
            let running = crc32c::crc32c_append(payload.running, padding);
            if told != running.to_le_bytes() {
                return Err(Broken::Digest("data"));
            }
        }
        self.payload = None;
        Ok(Some(header))
    }

    /// One whole PDU, its data in [`Inbox::small`]; receives at most once. For logins and the like.
    pub fn whole(&mut self) -> Result<Option<Header>, Broken> {
        for is_last in [false, true] {
            if self.payload.is_none() {
                self.next_header()?;
            }
            self.keep_staged();
            if let Some(header) = self.finish()? {
                return Ok(Some(header));
            }
            if !is_last {
                self.receive(&mut [])?;
            }
        }
        Ok(None)
    }
}

/// Receives what is there.
fn now(stream: &TcpStream, memory: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    Ok(recvmsg(stream, memory, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT)?.bytes)
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
