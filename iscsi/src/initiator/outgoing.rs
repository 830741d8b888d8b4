//! Owns: the sending half of a connection.
//! Promises: PDUs go out whole and in the order in which they are given; a wait ends at its deadline.
//! Must not know: what PDUs mean.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
        Self { stream: None, epoch: 0, agreed: Agreed::default() }
    }

    /// Sends a header with its data.
    pub fn send(&self, mut header: [u8; HEADER], data: &[u8], deadline: Instant) -> Result<(), Unsent> {
        header[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        let mut head = [0; HEADER + DIGEST];
        head[..HEADER].copy_from_slice(&header);
        let mut head_length = HEADER;
        if self.agreed.digests.header {
            head[HEADER..].copy_from_slice(&digest(&header));
            head_length += DIGEST;
        }
        let padding = padded(data.len()) - data.len();
        let mut tail = [0; 3 + DIGEST];
        let mut tail_length = padding;
        if self.agreed.digests.data && !data.is_empty() {
            let sum = crc32c::crc32c_append(crc32c::crc32c(data), &tail[..padding]);
            tail[padding..padding + DIGEST].copy_from_slice(&sum.to_le_bytes());
            tail_length += DIGEST;
        }
        self.write([&head[..head_length], data, &tail[..tail_length]], deadline)
    }

    fn write(&self, parts: [&[u8]; 3], deadline: Instant) -> Result<(), Unsent> {
        let Some(stream) = &self.stream else { return Err(Unsent { cause: Broken::Closed, is_partial: false }) };
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
            return Err(Unsent { cause, is_partial: sent > 0 });
        }
        Ok(())
    }
}
