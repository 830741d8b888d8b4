//! Owns: one message with descriptors on a Unix socket (SOCK_SEQPACKET, SCM_RIGHTS).
//! Promises: a message is at most [`MAX_MESSAGE`] bytes and [`MAX_DESCRIPTORS`] descriptors; more than that is an error, never cut.
//! Must not know: what messages say.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors of a message.
pub const MAX_DESCRIPTORS: usize = 4;

/// Sends one message.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.is_empty() || bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        let text = format!("a message of {} bytes and {} descriptors is not sent", bytes.len(), descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for the descriptors"));
    }
    let sent = retry(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::WriteZero, "a message was cut")) }
}

/// Receives one message into `buffer`; `None` when the other side has closed.
pub fn receive(socket: impl AsFd, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<OwnedFd>>> {
    buffer.resize(MAX_MESSAGE, 0);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let answer = retry(|| recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if answer.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than this program accepts"));
    }
    buffer.truncate(answer.bytes);
    Ok(if answer.bytes == 0 { None } else { Some(descriptors) })
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn descriptors_arrive_with_their_message_and_work() {
        let (here, there) = pair();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"content").unwrap();
        send(&here, b"one", &[file.as_fd()]).unwrap();
        send(&here, b"two", &[]).unwrap();
        let mut buffer = Vec::new();
        let mut descriptors = receive(&there, &mut buffer).unwrap().unwrap();
        assert_eq!((buffer.as_slice(), descriptors.len()), (&b"one"[..], 1));
        let mut text = String::new();
        let mut received = std::fs::File::from(descriptors.remove(0));
        received.rewind().unwrap();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert_eq!(receive(&there, &mut buffer).unwrap().unwrap().len(), 0);
        assert_eq!(buffer, b"two");
        drop(here);
        assert!(receive(&there, &mut buffer).unwrap().is_none());
    }

    #[test]
    fn too_long_messages_and_too_many_descriptors_are_errors_on_both_sides() {
        let (here, there) = pair();
        assert!(send(&here, &vec![0; MAX_MESSAGE + 1], &[]).is_err());
        assert!(send(&here, b"", &[]).is_err());
        assert!(send(&here, b"x", &[there.as_fd(); MAX_DESCRIPTORS + 1]).is_err());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let many = [there.as_fd(); 8];
        control.push(SendAncillaryMessage::ScmRights(&many));
        sendmsg(&here, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        assert!(receive(&there, &mut Vec::new()).is_err());
    }
}
