//! Owns: where the log goes: standard error, a file, or the system log.
//! Promises: an event that cannot be logged is dropped; logging never stops the mount.
//! Must not know: what is logged.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Where log lines go.
#[derive(Clone)]
pub enum Sink {
    /// Standard error.
    Stderr,
    /// A file, appended to.
    File(Arc<File>),
    /// The system log (syslog(3), RFC 3164 lines on /dev/log).
    SystemLog(Arc<UnixDatagram>),
    /// Nowhere: there is no system log.
    Nowhere,
}

impl Sink {
    /// Appends to a file.
    pub fn file(path: &Path) -> io::Result<Sink> {
        Ok(Sink::File(Arc::new(File::options().create(true).append(true).open(path)?)))
    }

    /// The system log, if there is one.
    pub fn system_log() -> Sink {
        let connected = UnixDatagram::unbound().and_then(|socket| {
            socket.connect("/dev/log")?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        connected.map_or(Sink::Nowhere, |socket| Sink::SystemLog(Arc::new(socket)))
    }
}

/// Begins to log to `sink`: warnings and information, or more when `verbose`. `VMFS_LOG` overrides the levels (EnvFilter).
pub fn start(sink: Sink, verbose: bool) {
    let default = if verbose { "debug,fuser=info" } else { "info,fuser=warn" };
    let filter = EnvFilter::try_from_env("VMFS_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_target(false).with_writer(sink);
    // Only a second call in one process fails, which then keeps the first log.
    let _ = subscriber.try_init();
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { sink: self.clone(), text: Vec::new() }
    }
}

/// One line on its way.
pub struct Line {
    sink: Sink,
    text: Vec<u8>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Nobody is left to be told when the log itself cannot be written.
        let _ = match &self.sink {
            Sink::Stderr => io::stderr().write_all(&self.text),
            Sink::File(file) => (&**file).write_all(&self.text),
            Sink::SystemLog(socket) => {
                // 30: facility daemon, severity informational.
                let mut line = format!("<30>mount.vmfs[{}]: ", std::process::id()).into_bytes();
                line.extend_from_slice(self.text.trim_ascii_end());
                socket.send(&line).map(drop)
            }
            Sink::Nowhere => Ok(()),
        };
    }
}
