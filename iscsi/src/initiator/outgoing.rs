//! Owns: the sending half of a connection.
//! Promises: PDUs go out whole and in the order in which they are given; a wait ends at its deadline; who may not wait leaves what the
//! socket does not take, and that goes out before anything else.
//! Must not know: what PDUs mean.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use super::error::Broken;
use super::login::Agreed;
use crate::pdu::{DIGEST, HEADER, digest, padded};

/// How long one write waits before the deadline is looked at.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// The sending half, or none while there is no connection.
pub(super) struct Outgoing {
    pub stream: Option<Arc<TcpStream>>,
    pub epoch: u64,
    pub agreed: Agreed,
    /// The rest of a PDU that the socket did not take at once, and how much of that has gone out.
    rest: Vec<u8>,
    gone: usize,
}

/// A PDU that could not be sent.
#[derive(Debug)]
pub(super) struct Unsent {
    pub cause: Broken,
    /// Some of it was.
    pub is_partial: bool,
}

impl Outgoing {
    pub fn new() -> Self {
        Self { stream: None, epoch: 0, agreed: Agreed::default(), rest: Vec::new(), gone: 0 }
    }

    /// That of a connection.
    pub fn of(stream: Arc<TcpStream>, agreed: Agreed) -> Self {
        Self { stream: Some(stream), agreed, ..Self::new() }
    }

    /// Sends a header with its data.
    pub fn send(&mut self, header: [u8; HEADER], data: &[u8], deadline: Instant) -> Result<(), Unsent> {
        if !self.is_clear() {
            self.write([&self.rest[self.gone..], &[], &[]], deadline).map_err(|(cause, sent)| {
                self.gone += sent;
                Unsent { cause, is_partial: false }
            })?;
            self.forget_rest();
        }
        let frame = self.frame(header, data);
        self.write(frame.parts(data), deadline).map_err(|(cause, sent)| Unsent { cause, is_partial: sent > 0 })
    }

    /// Hands a header with its data to the socket as far as it takes them, and keeps the rest. Only while [`Outgoing::is_clear`].
    pub fn send_now(&mut self, header: [u8; HEADER], data: &[u8]) -> Result<(), Unsent> {
        let frame = self.frame(header, data);
        let parts = frame.parts(data);
        let unsent = |cause| Unsent { cause, is_partial: false };
        let Some(stream) = &self.stream else { return Err(unsent(Broken::Closed)) };
        let mut sent = now(stream, &parts.map(IoSlice::new)).map_err(unsent)?;
        for part in parts {
            let gone = sent.min(part.len());
            self.rest.extend_from_slice(&part[gone..]);
            sent -= gone;
        }
        Ok(())
    }

    /// Hands on what was kept. True: nothing of it is left.
    pub fn clear_now(&mut self) -> Result<bool, Broken> {
        if self.is_clear() {
            return Ok(true);
        }
        let Some(stream) = &self.stream else { return Err(Broken::Closed) };
        self.gone += now(stream, &[IoSlice::new(&self.rest[self.gone..])])?;
        if self.gone < self.rest.len() {
            return Ok(false);
        }
        self.forget_rest();
        Ok(true)
    }

    /// Whether nothing is kept.
    pub fn is_clear(&self) -> bool {
        self.rest.is_empty()
    }

    /// Another connection begins, or all was sent.
    pub fn forget_rest(&mut self) {
        self.rest.clear();
        self.gone = 0;
    }

    fn frame(&self, mut header: [u8; HEADER], data: &[u8]) -> Frame {
        header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        let mut frame =
            Frame { head: [0; HEADER + DIGEST], head_length: HEADER, tail: [0; 3 + DIGEST], tail_length: 0 };
        frame.head[..HEADER].copy_from_slice(&header);
        if self.agreed.digests.header {
            frame.head[HEADER..].copy_from_slice(&digest(&header));
            frame.head_length += DIGEST;
        }
        let padding = padded(data.len()) - data.len();
        frame.tail_length = padding;
        if self.agreed.digests.data && !data.is_empty() {
            let sum = crc32c::crc32c_append(crc32c::crc32c(data), &frame.tail[..padding]);
            frame.tail[padding..padding + DIGEST].copy_from_slice(&sum.to_le_bytes());
            frame.tail_length += DIGEST;
        }
        frame
    }

    /// Sends all of these bytes, or says why not and how many it has sent.
    fn write(&self, parts: [&[u8]; 3], deadline: Instant) -> Result<(), (Broken, usize)> {
        let Some(stream) = &self.stream else { return Err((Broken::Closed, 0)) };
        let mut stream = &**stream;
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut sent = 0;
        while sent < total {
            let mut skip = sent;
            let mut left = [IoSlice::new(&[]); 3];
            let mut count = 0;
            for part in parts {
                let gone = skip.min(part.len());
                skip -= gone;
                if gone < part.len() {
                    left[count] = IoSlice::new(&part[gone..]);
                    count += 1;
                }
            }
            let cause = match stream.write_vectored(&left[..count]) {
                Ok(0) => Broken::Closed,
                Ok(some) => {
                    sent += some;
                    continue;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if Instant::now() < deadline => continue,
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Broken::Stalled,
                    _ => error.into(),
                },
            };
            return Err((cause, sent));
        }
        Ok(())
    }
}

/// What goes around the data of a PDU.
struct Frame {
    head: [u8; HEADER + DIGEST],
    head_length: usize,
    tail: [u8; 3 + DIGEST],
    tail_length: usize,
}

impl Frame {
    fn parts<'a>(&'a self, data: &'a [u8]) -> [&'a [u8]; 3] {
        [&self.head[..self.head_length], data, &self.tail[..self.tail_length]]
    }
}

/// Sends what the socket takes without waiting: so many bytes.
fn now(stream: &TcpStream, parts: &[IoSlice<'_>]) -> Result<usize, Broken> {
    loop {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(stream, parts, &mut SendAncillaryBuffer::default(), flags) {
            Ok(sent) => return Ok(sent),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(0),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}
