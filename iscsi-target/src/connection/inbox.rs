//! Owns: cutting the stream of bytes that comes in into PDUs.
//! Promises: memory is bounded by the longest data segment that this target has declared; digests are checked before anything is believed.
//! Must not know: what PDUs mean.

use std::rc::Rc;

use iscsi::login::parameters::OWN_SEGMENT;
use iscsi::pdu::{DIGEST, Digests, HEADER, Header, digest, padded};
use tokio::net::TcpStream;

/// Bytes that one PDU takes at most: header, additional headers, data, digests.
const LONGEST: usize = HEADER + 255 * 4 + DIGEST + OWN_SEGMENT as usize + DIGEST;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The other side closed it, or the network did.
    #[error("the connection was closed")]
    Closed,
    /// The operating system reports an error.
    #[error("the connection failed: {0}")]
    System(#[from] std::io::Error),
    /// A header's digest is wrong: where the next PDU begins nobody knows (RFC 7143, 7.8).
    #[error("a header's digest is wrong")]
    HeaderDigest,
    /// More data than was declared to be possible.
    #[error("a data segment of {0} bytes, where {OWN_SEGMENT} are the most")]
    TooLong(usize),
}

/// A PDU in the inbox.
pub struct Arrived<'a> {
    /// Its header.
    pub header: Header,
    /// Its data, without padding.
    pub data: &'a [u8],
    /// Whether the digest of its data is right, or there is none.
    pub is_sound: bool,
}

/// What comes in.
pub struct Inbox {
    stream: Rc<TcpStream>,
    bytes: Vec<u8>,
    /// Bytes at the start that have been dealt with.
    done: usize,
    digests: Digests,
}

impl Inbox {
    /// An empty inbox.
    pub fn new(stream: Rc<TcpStream>) -> Self {
        Self { stream, bytes: Vec::with_capacity(16 << 10), done: 0, digests: Digests::default() }
    }

    /// From now on PDUs have these digests.
    pub fn set_digests(&mut self, digests: Digests) {
        self.digests = digests;
        self.bytes.reserve(LONGEST);
    }

    /// The next PDU. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Arrived<'_>, Broken> {
        let checked = |on: bool| if on { DIGEST } else { 0 };
        self.want(HEADER).await?;
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&self.bytes[self.done..self.done + HEADER]);
        let header = Header(bytes);
        let headers = HEADER + header.additional_length();
        let data_length = header.data_length();
        if data_length > OWN_SEGMENT as usize {
            return Err(Broken::TooLong(data_length));
        }
        let data_at = headers + checked(self.digests.header);
        let data_end = data_at + padded(data_length);
        let total = data_end + if data_length > 0 { checked(self.digests.data) } else { 0 };
        self.want(total).await?;
        let pdu = &self.bytes[self.done..self.done + total];
        self.done += total;
        if self.digests.header && pdu[headers..data_at] != digest(&pdu[..headers]) {
            return Err(Broken::HeaderDigest);
        }
        let is_sound = total == data_end || pdu[data_end..] == digest(&pdu[data_at..data_end]);
        Ok(Arrived { header, data: &pdu[data_at..data_at + data_length], is_sound })
    }

    /// Reads until `count` bytes are there.
    async fn want(&mut self, count: usize) -> Result<(), Broken> {
        while self.bytes.len() - self.done < count {
            if self.done > 0 {
                self.bytes.drain(..self.done);
                self.done = 0;
            }
            let missing = count - self.bytes.len();
            if self.bytes.capacity() - self.bytes.len() < missing {
                self.bytes.reserve(missing);
            }
            match self.stream.try_read_buf(&mut self.bytes) {
                Ok(0) => return Err(Broken::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.stream.readable().await?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Err(Broken::Closed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
