//! Owns: a server of remote procedure calls by TCP, whose calls go wrong as a test has planned it.
//! Promises: each fault is what its name says; a dropped server has ended.
//! Must not know: what is called.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nfs_backend::xdr::{Reader, Writer, XdrError};

/// What goes wrong with a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// It is not done, the connection ends.
    CutBefore,
    /// It is done, the connection ends without a reply.
    CutAfter,
    /// It is done, no reply comes.
    NoReply,
    /// It is done, and answered some time later.
    Late(Duration),
    /// It is done, and answered twice.
    Twice,
    /// It is not done, and answered with this status.
    Status(u32),
    /// It is done, and these bytes come as its results.
    Results(Vec<u8>),
    /// These bytes come instead of a reply.
    Bytes(Vec<u8>),
    /// The server was started anew before it is done.
    Restart,
}

/// Decides by procedure number and the number of the call.
pub type Plan = Box<dyn FnMut(u32, u64) -> Fault + Send>;

/// What is served.
pub trait Service: Send + 'static {
    /// Decides what goes wrong with a call that has come.
    fn fault(&mut self, program: u32, procedure: u32, arguments: Reader<'_>) -> Fault;
    /// Starts anew.
    fn restart(&mut self);
    /// Does a call; with `status` it is not done, and this is what it says.
    fn results(&mut self, program: u32, procedure: u32, arguments: Reader<'_>, status: Option<u32>) -> Vec<u8>;
}

/// A server. It ends when it is dropped.
pub struct Faulty<S: Service> {
    pub address: SocketAddr,
    service: Arc<Mutex<S>>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    ends: Arc<AtomicBool>,
}

impl<S: Service> Faulty<S> {
    pub fn start(address: &str, service: S) -> Faulty<S> {
        let listener = TcpListener::bind(address).expect("a port is free");
        let address = listener.local_addr().expect("a bound socket has an address");
        let server =
            Faulty { address, service: Arc::new(Mutex::new(service)), streams: Arc::default(), ends: Arc::default() };
        let (service, streams, ends) = (server.service.clone(), server.streams.clone(), server.ends.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                let (service, streams) = (service.clone(), streams.clone());
                streams.lock().unwrap().push(stream.try_clone().expect("a socket has a second descriptor"));
                std::thread::spawn(move || drop(serve(stream, &service, &streams)));
            }
        });
        server
    }

    pub fn state(&self) -> MutexGuard<'_, S> {
        self.service.lock().unwrap()
    }

    /// Starts the service anew: all connections end.
    pub fn restart(&self, restart: impl FnOnce(&mut S)) {
        let mut service = self.state();
        restart(&mut service);
        cut_all(&self.streams);
    }
}

impl<S: Service> Drop for Faulty<S> {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        cut_all(&self.streams);
    }
}

fn cut_all(streams: &Mutex<Vec<TcpStream>>) {
    streams.lock().unwrap().drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
}

fn serve<S: Service>(
    mut stream: TcpStream,
    service: &Mutex<S>,
    streams: &Mutex<Vec<TcpStream>>,
) -> std::io::Result<()> {
    loop {
        let mut mark = [0; 4];
        stream.read_exact(&mut mark)?;
        let mut call = vec![0; (u32::from_be_bytes(mark) & 0x7FFF_FFFF) as usize];
        stream.read_exact(&mut call)?;
        let Ok((xid, program, procedure, arguments)) = header(&call) else { return Ok(()) };
        let (fault, results) = {
            let mut service = service.lock().unwrap();
            let fault = service.fault(program, procedure, arguments);
            let status = match &fault {
                Fault::CutBefore => return stream.shutdown(Shutdown::Both),
                Fault::Restart => {
                    service.restart();
                    cut_all(streams);
                    return Ok(());
                }
                Fault::Status(status) => Some(*status),
                _ => None,
            };
            let results = service.results(program, procedure, arguments, status);
            (fault, results)
        };
        let reply = |results: &[u8]| {
            let mut reply = Vec::new();
            for word in [0x8000_0000 | (24 + results.len()) as u32, xid, 1, 0, 0, 0, 0] {
                reply.put_u32(word);
            }
            reply.extend_from_slice(results);
            reply
        };
        match fault {
            Fault::CutAfter => return stream.shutdown(Shutdown::Both),
            Fault::NoReply => {}
            Fault::Late(time) => {
                std::thread::sleep(time);
                stream.write_all(&reply(&results))?;
            }
            Fault::Twice => stream.write_all(&[reply(&results), reply(&results)].concat())?,
            Fault::Results(bytes) => stream.write_all(&reply(&bytes))?,
            Fault::Bytes(bytes) => stream.write_all(&bytes)?,
            _ => stream.write_all(&reply(&results))?,
        }
    }
}

fn header(call: &[u8]) -> Result<(u32, u32, u32, Reader<'_>), XdrError> {
    let mut reader = Reader::new(call);
    let xid = reader.u32()?;
    let (_call, _version, program, _, procedure) =
        (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
    for _ in 0..2 {
        reader.u32()?;
        reader.opaque(400)?;
    }
    Ok((xid, program, procedure, reader))
}
