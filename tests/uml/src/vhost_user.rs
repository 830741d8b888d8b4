//! Owns: vhost-user messages as a back end receives and answers them (the QEMU project's document "Vhost-user Protocol").
//! Promises: a message is read whole, with its file; lengths and numbers that make no sense are errors.
//! Must not know: what the device behind it is.
//!
//! The crate vhost has this protocol too, but not its in-band notifications, in which a kick is a message that the front end waits for:
//! only with them User-Mode Linux's writes to registers take effect before it goes on.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Requests of a front end.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_MEMORY_TABLE: u32 = 5;
    pub const SET_RING_SIZE: u32 = 8;
    pub const SET_RING_ADDRESSES: u32 = 9;
    pub const SET_RING_BASE: u32 = 10;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_BACK_CHANNEL: u32 = 21;
    pub const RING_KICK: u32 = 35;
}

/// Request of a back end: a ring has something.
const BACK_END_RING_CALL: u32 = 4;

/// The device is a modern one, and protocol features can be agreed on.
pub const FEATURES: u64 = 1 << 32 | 1 << 30;
/// Answers to every request that wants one, a back channel, in-band notifications.
pub const PROTOCOL_FEATURES: u64 = 1 << 3 | 1 << 5 | 1 << 14;

const HEADER: usize = 12;
const VERSION: u32 = 1;
const IS_REPLY: u32 = 1 << 2;
const NEEDS_REPLY: u32 = 1 << 3;
/// Longer than any request in use.
const MOST_PAYLOAD: usize = 4096;

/// A request of the front end.
pub struct Message {
    /// Which.
    pub request: u32,
    /// Is an answer to be sent when it has been carried out?
    pub needs_reply: bool,
    payload: Vec<u8>,
    /// The file that came with it.
    pub file: Option<File>,
}

impl Message {
    /// The number of `N` bytes at `offset` in the payload.
    pub fn number<const N: usize>(&self, offset: usize) -> io::Result<[u8; N]> {
        let bytes = self.payload.get(offset..offset + N).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| nonsense(format!("request {} is too short", self.request)))
    }

    /// 32 bits at `offset`.
    pub fn word(&self, offset: usize) -> io::Result<u32> {
        self.number(offset).map(u32::from_le_bytes)
    }

    /// 64 bits at `offset`.
    pub fn long(&self, offset: usize) -> io::Result<u64> {
        self.number(offset).map(u64::from_le_bytes)
    }
}

/// The back end's side of a connection.
pub struct Connection(UnixStream);

impl Connection {
    /// Over a stream that a front end has opened.
    pub fn new(stream: UnixStream) -> Connection {
        Connection(stream)
    }

    /// The next request; `None` when the front end has gone.
    pub fn receive(&mut self) -> io::Result<Option<Message>> {
        let mut header = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received =
            rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::WAITALL)?;
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.bytes != HEADER || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(nonsense("a message ends in its header, or has too many files".to_owned()));
        }
        let mut files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files.map(File::from).collect::<Vec<_>>()),
            _ => None,
        });
        let mut files = files.next().unwrap_or_default();
        if files.len() > 1 {
            return Err(nonsense(format!("{} files with one message", files.len())));
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, length) = (word(0), word(4), word(8) as usize);
        if length > MOST_PAYLOAD {
            return Err(nonsense(format!("request {request} says that it has {length} bytes")));
        }
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload)?;
        Ok(Some(Message { request, needs_reply: flags & NEEDS_REPLY != 0, payload, file: files.pop() }))
    }

    /// Answers `request` by a number.
    pub fn reply(&mut self, request: u32, value: u64) -> io::Result<()> {
        self.0.write_all(&message(request, VERSION | IS_REPLY, &value.to_le_bytes()))
    }
}

/// The channel on which the back end asks.
pub struct BackChannel(UnixStream);

impl BackChannel {
    /// Over the file that came with [`request::SET_BACK_CHANNEL`].
    pub fn new(file: File) -> BackChannel {
        BackChannel(UnixStream::from(std::os::fd::OwnedFd::from(file)))
    }

    /// Tells the front end that ring `index` has something.
    pub fn call(&mut self, index: u32) -> io::Result<()> {
        let state = u64::from(index).to_le_bytes();
        self.0.write_all(&message(BACK_END_RING_CALL, VERSION, &state))
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [request, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

pub fn nonsense(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Guest memory: one region, and where the front end has it in its own address space.
pub struct MemoryMap {
    /// The memory, at its guest-physical addresses.
    pub memory: GuestMemoryMmap<()>,
    guest: u64,
    user: u64,
    length: u64,
}

impl MemoryMap {
    /// Maps what [`request::SET_MEMORY_TABLE`] describes.
    pub fn new(message: &mut Message) -> io::Result<MemoryMap> {
        let regions = message.word(0)?;
        if regions != 1 {
            return Err(nonsense(format!("{regions} regions of memory; one is expected")));
        }
        let (guest, length, user, offset) = (message.long(8)?, message.long(16)?, message.long(24)?, message.long(32)?);
        let file = message.file.take().ok_or_else(|| nonsense("a region of memory without a file".to_owned()))?;
        let failed = |cause: &dyn std::fmt::Display| nonsense(format!("guest memory cannot be mapped: {cause}"));
        let size = usize::try_from(length).map_err(|cause| failed(&cause))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(|cause| failed(&cause))?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or_else(|| failed(&"its addresses wrap around"))?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|cause| failed(&cause))?;
        Ok(MemoryMap { memory, guest, user, length })
    }

    /// The guest-physical address of what the front end has at `user`.
    pub fn guest_address(&self, user: u64) -> io::Result<GuestAddress> {
        let offset = user.checked_sub(self.user).filter(|offset| *offset < self.length);
        offset
            .map(|offset| GuestAddress(self.guest + offset))
            .ok_or_else(|| nonsense(format!("{user:#x} is no memory")))
    }
}
