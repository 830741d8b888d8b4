//! Owns COM1, a 16550: output to a sink, input from the host's standard input where asked for.
//! Promises that a guest's output is never held back once it ended a line, and that input never overruns the FIFO.
//! Must not know what the guest says.

use crate::bus::BusDevice;
use crate::error::{Error, Kind, Result};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use vm_superio::serial::{NoEvents, Serial};
use vm_superio::{Trigger, serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// First port of COM1, and how many it has.
pub const COM1_PORT: u64 = 0x3F8;
/// How many ports a 16550 has.
pub const COM1_PORTS: u64 = 8;

/// Where COM1's output goes: `stdio`, `file:PATH` or `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialSink {
    /// Standard output; standard input is COM1's input.
    Stdio,
    /// A file, made or overwritten.
    File(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for SerialSink {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<SerialSink, String> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(SerialSink::Stdio),
            ("none", _) => Ok(SerialSink::None),
            (_, Some(path)) if !path.is_empty() => Ok(SerialSink::File(path.into())),
            _ => Err("expected stdio, file:PATH or none".into()),
        }
    }
}

impl SerialSink {
    /// Opens the sink.
    ///
    /// # Errors
    /// [`Kind::Host`] when the file cannot be made.
    pub fn open(&self) -> Result<Box<dyn Write + Send>> {
        match self {
            SerialSink::Stdio => Ok(Box::new(io::stdout())),
            SerialSink::None => Ok(Box::new(io::sink())),
            SerialSink::File(path) => {
                let file = File::create(path).map_err(|cause| {
                    let object = format!("serial output {}", path.display());
                    Error::new(Kind::Host, object, cause, "Give --serial file:PATH a path that can be written")
                })?;
                Ok(Box::new(file))
            }
        }
    }
}

/// Collects a line, or what fits in it, before it goes to the sink: the guest sends byte by byte.
struct LineBuffer {
    line: Vec<u8>,
    sink: Box<dyn Write + Send>,
}

const LINE_MAX: usize = 4096;

impl Write for LineBuffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if self.line.len() >= LINE_MAX || self.line.last() == Some(&b'\n') {
            self.drain()?;
        }
        Ok(bytes.len())
    }

    /// The 16550 model flushes after each byte: that is what the buffer is there to absorb.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LineBuffer {
    fn drain(&mut self) -> io::Result<()> {
        let written = self.sink.write_all(&self.line).and_then(|()| self.sink.flush());
        self.line.clear();
        written
    }
}

struct Edge(EventFd);

impl Trigger for Edge {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// COM1.
pub struct SerialPort {
    uart: Mutex<Serial<Edge, NoEvents, LineBuffer>>,
}

impl SerialPort {
    /// A port without a sink, which interrupts nobody before [`Self::reset`].
    ///
    /// # Errors
    /// [`Kind::Host`] when the host gives no event descriptor.
    pub fn new() -> Result<SerialPort> {
        let nobody =
            EventFd::new(EFD_NONBLOCK).map_err(|cause| Error::host("event descriptor of the serial port", cause))?;
        let buffer = LineBuffer { line: Vec::new(), sink: Box::new(io::sink()) };
        Ok(SerialPort { uart: Mutex::new(Serial::new(Edge(nobody), buffer)) })
    }

    /// Sends all further output to `sink`.
    pub fn write_to(&self, sink: Box<dyn Write + Send>) {
        self.uart.lock().writer_mut().sink = sink;
    }

    /// Puts the port back to its state at power-on, with the same sink; it interrupts through `interrupt` from now on.
    pub fn reset(&self, interrupt: EventFd) {
        self.flush();
        let mut uart = self.uart.lock();
        let sink = std::mem::replace(&mut uart.writer_mut().sink, Box::new(io::sink()));
        *uart = Serial::new(Edge(interrupt), LineBuffer { line: Vec::new(), sink });
    }

    /// How many bytes [`Self::input`] takes now.
    pub fn input_room(&self) -> usize {
        self.uart.lock().fifo_capacity()
    }

    /// Gives the guest `bytes` to read. Bytes beyond [`Self::input_room`] are dropped, as on the real part.
    pub fn input(&self, bytes: &[u8]) {
        report(self.uart.lock().enqueue_raw_bytes(bytes).map(|_| ()));
    }

    /// Writes an unfinished line to the sink.
    pub fn flush(&self) {
        if let Err(cause) = self.uart.lock().writer_mut().drain() {
            tracing::warn!(%cause, "serial output is lost");
        }
    }
}

fn report(result: std::result::Result<(), serial::Error<io::Error>>) {
    if let Err(cause) = result {
        tracing::warn!(?cause, "serial port");
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let [byte] = data {
            *byte = self.uart.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            report(self.uart.lock().write(offset as u8, *byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_reaches_the_sink_when_it_ends_and_the_rest_at_the_flush() {
        let sink = Shared::default();
        let port = SerialPort::new().expect("a port");
        port.write_to(Box::new(sink.clone()));
        for byte in b"one\ntwo" {
            port.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock(), b"one\n");
        port.flush();
        assert_eq!(*sink.0.lock(), b"one\ntwo");
    }

    #[test]
    fn input_beyond_the_fifo_is_dropped_not_kept() {
        let port = SerialPort::new().expect("a port");
        let room = port.input_room();
        port.input(&vec![b'x'; room + 10]);
        assert_eq!(port.input_room(), 0);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!((byte[0], port.input_room()), (b'x', 1));
    }

    #[test]
    fn sinks_are_parsed_and_anything_else_is_refused() {
        assert_eq!("stdio".parse(), Ok(SerialSink::Stdio));
        assert_eq!("file:/a/b".parse(), Ok(SerialSink::File("/a/b".into())));
        assert_eq!("none".parse(), Ok(SerialSink::None));
        for text in ["", "file:", "tty", "STDIO"] {
            assert!(text.parse::<SerialSink>().is_err(), "{text}");
        }
    }
}
