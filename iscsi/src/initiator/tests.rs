//! Promises of the initiator against targets that do what they are told, right or wrong: a script each.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;
use scsi::path::{PathAnswer, PathData, PathError, ScsiPath};

use super::*;
use crate::login::{Admission, Doorkeeper, Login as TargetLogin, Status};
use crate::pdu::{
    AsyncMessage, DIGEST, DataIn, Digests, HEADER, Header, LoginResponse, LogoutResponse, NO_TAG, NopIn,
    ReadyToTransfer, Reject, RejectReason, Request, Residual, ScsiCommand, ScsiResponse, Sequence,
    TaskManagementAnswer, append, padded,
};

struct Door;

impl Doorkeeper for Door {
    fn admit(&self, _: &str, _: Option<&str>) -> Result<Admission, Status> {
        Ok(Admission { group: 1, credentials: None })
    }

    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
}

/// The target's end of a connection in its full feature phase.
struct Peer {
    stream: TcpStream,
    digests: Digests,
    status: u32,
    expected: u32,
    /// Commands beyond those that have come which are taken.
    window: u32,
}

impl Peer {
    fn log_in(stream: TcpStream) -> Option<Peer> {
        let mut peer = Peer { stream, digests: Digests::default(), status: 100, expected: 1, window: 32 };
        let mut login = TargetLogin::new();
        loop {
            let (header, data) = peer.receive_raw()?;
            let Ok(Request::Login(request)) = Request::decode(&header) else { return None };
            let answer = login.step(&request, &data, &Door).ok()?;
            let response = LoginResponse {
                transit: answer.transit,
                continues: false,
                current: answer.current,
                next: answer.next,
                isid: request.isid,
                tsih: 1,
                tag: request.tag,
                status: (0, 0),
            };
            let sequence = peer.with_status();
            peer.send(response.encode(sequence), &answer.text);
            if answer.is_last() {
                peer.digests = login.parameters.digests;
                return Some(peer);
            }
        }
    }

    fn receive_raw(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).ok()?;
        let header = Header(header);
        let mut skip = [0; DIGEST];
        if self.digests.header {
            self.stream.read_exact(&mut skip).ok()?;
        }
        let mut data = vec![0; padded(header.data_length())];
        self.stream.read_exact(&mut data).ok()?;
        if self.digests.data && !data.is_empty() {
            self.stream.read_exact(&mut skip).ok()?;
            assert_eq!(skip, crate::pdu::digest(&data), "the initiator's digest");
        }
        data.truncate(header.data_length());
        Some((header, data))
    }

    /// The next request that is no ping; those are answered.
    fn receive(&mut self) -> Option<(Request, Vec<u8>)> {
        loop {
            let (header, data) = self.receive_raw()?;
            let request = Request::decode(&header).expect("the initiator sends what is in order");
            if let Request::Nop(nop) = request
                && nop.tag != NO_TAG
            {
                let sequence = self.with_status();
                self.send(NopIn { lun: [0; 8], tag: nop.tag, transfer_tag: NO_TAG }.encode(sequence), &[]);
                continue;
            }
            if let Some(number) = request.number()
                && !header.is_immediate()
            {
                assert_eq!(number, self.expected, "commands come in order");
                self.expected += 1;
            }
            return Some((request, data));
        }
    }

    /// The next command.
    fn command(&mut self) -> Option<(ScsiCommand, Vec<u8>)> {
        match self.receive()? {
            (Request::Command(command), data) => Some((command, data)),
            (Request::Logout(logout), _) => {
                let sequence = self.with_status();
                self.send(LogoutResponse { tag: logout.tag, response: 0 }.encode(sequence), &[]);
                None
            }
            (other, _) => panic!("no command: {other:?}"),
        }
    }

    fn with_status(&mut self) -> Sequence {
        let sequence = self.without_status();
        self.status += 1;
        sequence
    }

    fn without_status(&self) -> Sequence {
        Sequence { status: self.status, expected: self.expected, most: self.expected + self.window - 1 }
    }

    fn send(&mut self, header: [u8; HEADER], data: &[u8]) {
        let mut bytes = Vec::new();
        append(&mut bytes, header, data, self.digests);
        let _ = self.stream.write_all(&bytes);
    }

    fn respond(&mut self, tag: u32, status: u8, residual: Residual, sense: &[u8]) {
        let mut data = Vec::new();
        if !sense.is_empty() {
            data.extend_from_slice(&(sense.len() as u16).to_be_bytes());
            data.extend_from_slice(sense);
        }
        let response = ScsiResponse { tag, response: 0, status, data_count: 0, residual };
        let sequence = self.with_status();
        self.send(response.encode(sequence), &data);
    }

    fn good(&mut self, tag: u32) {
        self.respond(tag, 0, Residual::None, &[]);
    }

    fn data(&mut self, data: DataIn, bytes: &[u8]) {
        let sequence = if data.status.is_some() { self.with_status() } else { self.without_status() };
        self.send(data.encode(sequence), bytes);
    }

    /// Serves commands well until the connection ends: reads get bytes of their opcode.
    fn serve(&mut self) {
        while let Some((command, _)) = self.command() {
            self.answer(&command);
        }
    }

    fn answer(&mut self, command: &ScsiCommand) {
        match command.reads {
            true => {
                let status = Some((0, Residual::None));
                let data = DataIn { is_final: true, tag: command.tag, number: 0, offset: 0, status };
                self.data(data, &vec![command.cdb[0]; command.expected as usize]);
            }
            false => self.good(command.tag),
        }
    }
}

/// A target that follows a script for each of its connections.
struct Scripted {
    url: Url,
    listener: TcpListener,
    is_over: Arc<AtomicU32>,
    /// The connection of the moment.
    current: Arc<Mutex<Option<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Scripted {
    fn new(script: impl Fn(u32, &mut Peer) + Send + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let is_over = Arc::new(AtomicU32::new(0));
        let current = Arc::new(Mutex::new(None));
        let (accepting, over, now) = (listener.try_clone().unwrap(), is_over.clone(), current.clone());
        let thread = std::thread::spawn(move || {
            let mut nth = 0;
            while let Ok((stream, _)) = accepting.accept() {
                if over.load(Ordering::SeqCst) != 0 {
                    return;
                }
                stream.set_nodelay(true).unwrap();
                *now.lock().unwrap() = Some(stream.try_clone().unwrap());
                if let Some(mut peer) = Peer::log_in(stream) {
                    script(nth, &mut peer);
                    let _ = peer.stream.shutdown(Shutdown::Both);
                    nth += 1;
                }
            }
        });
        let url = format!("iscsi://{address}/iqn.2026-01.test:disk/1");
        Scripted { url: Url::parse_with(&url, &|_| None).unwrap(), listener, is_over, current, thread: Some(thread) }
    }

    fn connect(&self) -> Initiator {
        self.connect_with(options())
    }

    fn connect_with(&self, options: Options) -> Initiator {
        Initiator::connect(&self.url, options).expect("a login")
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.is_over.store(1, Ordering::SeqCst);
        if let Some(stream) = &*self.current.lock().unwrap() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Lets the accepting thread look.
        let _ = TcpStream::connect(self.listener.local_addr().unwrap());
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.expect("the script is followed to its end");
            }
        }
    }
}

/// Short waits for what a target never does; long ones for what it does.
fn options() -> Options {
    Options {
        initiator: "iqn.2026-01.test:host".to_owned(),
        abort_time: Duration::from_millis(300),
        patience: Duration::from_secs(60),
        ..Options::default()
    }
}

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

fn read(initiator: &Initiator, into: &mut [u8], time: Duration) -> Result<PathAnswer, PathError> {
    initiator.execute(&[0x28; 10], PathData::In(into), time)
}

fn write(initiator: &Initiator, from: &[u8], time: Duration) -> Result<PathAnswer, PathError> {
    initiator.execute(&[0x2A; 10], PathData::Out(from), time)
}

fn plain(initiator: &Initiator, time: Duration) -> Result<PathAnswer, PathError> {
    initiator.execute(&[0; 6], PathData::None, time)
}

fn good(transferred: usize) -> Result<PathAnswer, PathError> {
    Ok(PathAnswer { status: 0, sense: Vec::new(), transferred })
}

fn is_unknown<T: std::fmt::Debug>(result: Result<T, PathError>, word: &str) {
    assert!(matches!(&result, Err(PathError::Unknown(why)) if why.contains(word)), "{result:?}");
}

fn is_not_sent<T: std::fmt::Debug>(result: Result<T, PathError>, word: &str) {
    assert!(matches!(&result, Err(PathError::NotSent(why)) if why.contains(word)), "{result:?}");
}

#[path = "tests/carrying_out.rs"]
mod carrying_out;
#[path = "tests/ends.rs"]
mod ends;
#[path = "tests/futures.rs"]
mod futures;
#[path = "tests/hostile.rs"]
mod hostile;
