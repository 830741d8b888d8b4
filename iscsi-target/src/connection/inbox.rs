//! Owns: cutting the stream of bytes that comes in into PDUs.
//! Promises: memory is bounded by the longest data segment that this target has declared; digests are checked before anything is believed;
//! large data go from the socket to where the caller wants them.
//! Must not know: what PDUs mean.

use std::io::{ErrorKind, IoSliceMut};
use std::rc::Rc;

use iscsi::login::parameters::OWN_SEGMENT;
use iscsi::pdu::{DIGEST, Digests, HEADER, Header, digest, padded};

use super::pace::Pace;
use super::socket::Socket;
use crate::memory::Landing;

/// The longest data segment during the login: what is agreed on holds for what comes after it (RFC 7143, 13.12).
const LOGIN_SEGMENT: usize = 8192;
/// Bytes that are read ahead: small PDUs come many at a time.
const AHEAD: usize = 64 << 10;
/// The same behind data that went straight to their place: the next ones are to do so too.
const BEHIND_LARGE: usize = 4 << 10;
/// Data of at least so many bytes are worth to be put in their place at once.
pub const LARGE: usize = 16 << 10;

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
    #[error("a data segment of {length} bytes, where {most} are the most")]
    TooLong {
        /// As the header says.
        length: usize,
        /// As this target has said.
        most: usize,
    },
}

/// The data of a PDU.
pub struct Arrived<'a> {
    /// Where they are.
    pub data: Data<'a>,
    /// Whether their digest is right, or there is none.
    pub is_sound: bool,
}

/// Where data are, without padding.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// In the inbox.
    Here(&'a [u8]),
    /// So many bytes, in the place that they were to have.
    Landed(usize),
}

impl<'a> Data<'a> {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Data::Here(bytes) => bytes.len(),
            Data::Landed(length) => *length,
        }
    }

    /// Those that are in the inbox.
    pub fn here(&self) -> &'a [u8] {
        match *self {
            Data::Here(bytes) => bytes,
            Data::Landed(_) => &[],
        }
    }
}

/// What comes in.
pub struct Inbox {
    socket: Rc<Socket>,
    /// What was read and not dealt with is `start..end` of it.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes that are read ahead.
    ahead: usize,
    /// The longest data segment.
    most: usize,
    digests: Digests,
    pace: Pace,
}

impl Inbox {
    /// An empty inbox, for a login.
    pub fn new(socket: Rc<Socket>) -> Self {
        Self {
            socket,
            bytes: Vec::new(),
            start: 0,
            end: 0,
            ahead: HEADER + LOGIN_SEGMENT,
            most: LOGIN_SEGMENT,
            digests: Digests::default(),
            pace: Pace::default(),
        }
    }

    /// The login is over: from now on PDUs have these digests, and as many data as this target has declared.
    pub fn begin(&mut self, digests: Digests) {
        self.digests = digests;
        self.most = OWN_SEGMENT as usize;
        self.ahead = AHEAD;
    }

    /// Can data go straight to their place? Where they have a digest it is checked first.
    pub fn lands(&self) -> bool {
        !self.digests.data
    }

    /// The header of the next PDU; its data are asked for before the next header is.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn header(&mut self) -> Result<Header, Broken> {
        self.want(HEADER).await?;
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&self.bytes[self.start..self.start + HEADER]);
        let header = Header(bytes);
        let headers = HEADER + header.additional_length();
        let total = headers + if self.digests.header { DIGEST } else { 0 };
        self.want(total).await?;
        let whole = &self.bytes[self.start..self.start + total];
        if self.digests.header && whole[headers..] != digest(&whole[..headers]) {
            return Err(Broken::HeaderDigest);
        }
        let length = header.data_length();
        if length > self.most {
            return Err(Broken::TooLong { length, most: self.most });
        }
        self.start += total;
        Ok(header)
    }

    /// The data of the PDU with the header that came last. They go into `landing` if there is one, which has that length.
    ///
    /// # Errors
    /// [`Broken`]
    pub async fn data(&mut self, header: &Header, landing: Option<Landing>) -> Result<Arrived<'_>, Broken> {
        let length = header.data_length();
        let Some(landing) = landing else {
            self.ahead = self.ahead.max(if self.most > LOGIN_SEGMENT { AHEAD } else { 0 });
            let total = padded(length) + if self.digests.data && length > 0 { DIGEST } else { 0 };
            self.want(total).await?;
            let start = self.start;
            self.start += total;
            let whole = &self.bytes[start..self.start];
            let is_sound = total == padded(length) || whole[padded(length)..] == digest(&whole[..padded(length)]);
            return Ok(Arrived { data: Data::Here(&whole[..length]), is_sound });
        };
        self.ahead = BEHIND_LARGE;
        let mut done = length.min(self.end - self.start);
        landing.put(0, &self.bytes[self.start..self.start + done]);
        self.start += done;
        while done < length {
            // All that was there has landed.
            (self.start, self.end) = (0, 0);
            self.reserve(self.ahead);
            let behind = IoSliceMut::new(&mut self.bytes[..self.ahead]);
            match landing.fill(done, |rest| self.socket.read(&mut [rest, behind])) {
                Ok(0) => return Err(Broken::Closed),
                Ok(count) => {
                    let landed = count.min(length - done);
                    done += landed;
                    self.end = count - landed;
                }
                Err(error) => self.recover(error).await?,
            }
        }
        let padding = padded(length) - length;
        self.want(padding).await?;
        self.start += padding;
        Ok(Arrived { data: Data::Landed(length), is_sound: true })
    }

    /// Makes the buffer at least so long. It is as long as the longest PDU needed so far.
    fn reserve(&mut self, length: usize) {
        if self.bytes.len() < length {
            self.bytes.resize(length, 0);
        }
    }

    /// Reads until `count` bytes are there.
    async fn want(&mut self, count: usize) -> Result<(), Broken> {
        while self.end - self.start < count {
            if self.start > 0 {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let most = self.ahead.max(count);
            self.reserve(most);
            match self.socket.read(&mut [IoSliceMut::new(&mut self.bytes[self.end..most])]) {
                Ok(0) => return Err(Broken::Closed),
                Ok(read) => self.end += read,
                Err(error) => self.recover(error).await?,
            }
        }
        Ok(())
    }

    /// After an error: waits, if that was all that it meant.
    async fn recover(&mut self, error: std::io::Error) -> Result<(), Broken> {
        match error.kind() {
            ErrorKind::WouldBlock => Ok(self.pace.wait(&self.socket).await?),
            ErrorKind::ConnectionReset => Err(Broken::Closed),
            _ => Err(error.into()),
        }
    }
}
