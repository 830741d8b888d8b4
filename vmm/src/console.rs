//! Owns the thread that carries standard input to the guest's serial port.
//! Promises to end when told, even while nobody types, and to give the guest no more than its FIFO takes.
//! Must not know terminals' modes: lines arrive as the terminal gives them.

use crate::error::{Error, Result};
use crate::serial::SerialPort;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// How long to wait for the guest to read when its FIFO is full.
const FULL_WAIT: rustix::time::Timespec = rustix::time::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// A running carrier of standard input; dropping it ends and joins its thread.
pub struct InputCarrier {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl InputCarrier {
    /// Starts to carry standard input to `port`, until its end.
    ///
    /// # Errors
    /// [`crate::error::Kind::Host`] when the host gives no event descriptor or thread.
    pub fn start(port: Arc<SerialPort>) -> Result<InputCarrier> {
        InputCarrier::carry_from(std::io::stdin(), port)
    }

    fn carry_from(input: impl AsFd + Send + 'static, port: Arc<SerialPort>) -> Result<InputCarrier> {
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|cause| Error::host("event descriptor of the console", cause))?;
        let told = stop.try_clone().map_err(|cause| Error::host("event descriptor of the console", cause))?;
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                if let Err(cause) = carry(&input, &port, told) {
                    tracing::warn!(%cause, "standard input is no longer carried to the guest");
                }
            })
            .map_err(|cause| Error::host("thread of the console", cause))?;
        Ok(InputCarrier { stop, thread: Some(thread) })
    }
}

impl Drop for InputCarrier {
    fn drop(&mut self) {
        if let Err(cause) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%cause, "the console thread cannot be told to end");
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(input: &impl AsFd, port: &SerialPort, stop: impl AsFd) -> std::io::Result<()> {
    let mut bytes = [0; 64];
    loop {
        let room = port.input_room().min(bytes.len());
        let mut polled = [PollFd::new(&stop, PollFlags::IN), PollFd::new(input, PollFlags::IN)];
        let (watched, timeout) = if room == 0 { (1, Some(&FULL_WAIT)) } else { (2, None) };
        match poll(&mut polled[..watched], timeout) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if !polled[0].revents().is_empty() {
            return Ok(());
        }
        if room > 0 {
            // By descriptor, since the standard library's reader would take more than it is asked for and keep it.
            let count = rustix::io::read(input, &mut bytes[..room])?;
            if count == 0 {
                return Ok(());
            }
            port.input(&bytes[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use std::io::Write;

    /// What the guest would read, by looking at the line status until enough is there.
    fn take(port: &SerialPort, bytes: usize) -> Vec<u8> {
        let (mut status, mut byte) = ([0], [0]);
        let mut taken = Vec::new();
        while taken.len() < bytes {
            port.read(5, &mut status);
            if status[0] & 1 != 0 {
                port.read(0, &mut byte);
                taken.push(byte[0]);
            }
        }
        taken
    }

    #[test]
    fn input_reaches_the_guest_in_order_and_the_carrier_ends_while_nobody_types() {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let port = Arc::new(SerialPort::new().expect("a port"));
        let carrier = InputCarrier::carry_from(reader, Arc::clone(&port)).expect("started");
        let text: Vec<u8> = (0..500).map(|index| b'a' + (index % 26) as u8).collect();
        writer.write_all(&text).expect("typed");
        assert_eq!(take(&port, text.len()), text);
        drop(carrier);
    }
}
