//! Owns: how a connection comes about: addresses, TCP, login, being referred elsewhere.
//! Promises: each attempt ends in time, in a connection in its full feature phase or in an error that says what to do.
//! Must not know: commands.

use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chap::{STRONG, WEAK};
use super::error::{Broken, ConnectCause, ConnectError};
use super::inbox::Inbox;
use super::login::{Agreed, Login, OWN_SEGMENT, Step, Wanted};
use super::options::{MOST_COMMANDS, Options};
use super::outgoing::{Outgoing, TICK};
use super::url::{Url, host_and_port, portal};
use crate::login::{AUTHENTICATION_FAILED, INITIATOR_ERROR, MAX_NAME};
use crate::pdu::{Answer, Header, Sequence};

/// The longest data segment before anything was agreed on (RFC 7143, 13.12).
const LOGIN_SEGMENT: usize = 8192;
/// Data of responses, rejects and the like that are kept.
const KEPT: usize = 1024;
/// Portals that a target may refer to in a row.
const MOST_MOVES: usize = 4;

/// A connection in its full feature phase.
pub(super) struct Connection {
    pub stream: Arc<TcpStream>,
    pub inbox: Box<Inbox>,
    pub agreed: Agreed,
    /// Numbers of the last login response.
    pub sequence: Sequence,
    /// Which of the target's portal groups it leads to, if it says so: with it a session is the same one.
    pub group: Option<String>,
}

/// Who connects where.
#[derive(Clone)]
pub(super) struct Connector {
    pub url: Url,
    pub options: Options,
    isid: [u8; 6],
}

impl Connector {
    /// # Errors
    /// [`ConnectCause::Option`], for what makes no sense.
    pub fn new(url: &Url, options: &Options) -> Result<Self, ConnectError> {
        let refuse = |cause: String| ConnectError { portal: url.to_string(), cause: ConnectCause::Option(cause) };
        let mut options = options.clone();
        options.initiator = url.initiator.clone().unwrap_or(options.initiator);
        options.header_digest = url.header_digest.unwrap_or(options.header_digest);
        options.data_digest = url.data_digest.unwrap_or(options.data_digest);
        if options.initiator.is_empty() || options.initiator.len() > MAX_NAME {
            return Err(refuse(format!("the name of an initiator has 1 to {MAX_NAME} bytes: '{}'", options.initiator)));
        }
        if !(1..=MOST_COMMANDS).contains(&options.commands) {
            return Err(refuse(format!("{} commands at once cannot be: 1 to {MOST_COMMANDS} can", options.commands)));
        }
        if options.max_transfer > 1 << 30 {
            return Err(refuse("a command moves at most 1 GiB".to_owned()));
        }
        let isid = match options.isid {
            Some(isid) => isid,
            None => {
                let mut random = [0; 3];
                getrandom::fill(&mut random).map_err(|error| refuse(format!("no random bytes: {error}")))?;
                // Type 2, "random" (RFC 7143, 11.12.5).
                [0x80, random[0], random[1], random[2], 0, 0]
            }
        };
        Ok(Self { url: url.clone(), options, isid })
    }

    /// A session with the target.
    ///
    /// # Errors
    /// [`ConnectError`], naming the URL.
    pub fn connect(&self) -> Result<Connection, ConnectError> {
        self.run(Some(&self.url.target), KEPT).map_err(|cause| ConnectError { portal: self.url.to_string(), cause })
    }

    /// A discovery session with the portal.
    ///
    /// # Errors
    /// [`ConnectError`], naming the portal.
    pub fn connect_to_discover(&self) -> Result<Connection, ConnectError> {
        self.run(None, OWN_SEGMENT as usize)
            .map_err(|cause| ConnectError { portal: format!("iscsi://{}", self.url.portal()), cause })
    }

    fn run(&self, target: Option<&str>, keep: usize) -> Result<Connection, ConnectCause> {
        let (mut host, mut port) = (self.url.host.clone(), self.url.port);
        let mut algorithms = STRONG;
        let mut moves = 0;
        loop {
            match self.attempt(&host, port, target, keep, algorithms)? {
                Attempt::Done(connection) => return Ok(connection),
                // Some targets mean another algorithm by the number of SHA-256: they are tried once more with MD5.
                Attempt::Doubted if algorithms == STRONG => algorithms = WEAK,
                Attempt::Doubted => return Err(ConnectCause::Refused(AUTHENTICATION_FAILED)),
                Attempt::Moved(to) => {
                    moves += 1;
                    if moves > MOST_MOVES {
                        return Err(ConnectCause::Moved(to));
                    }
                    let address = to.split(',').next().unwrap_or_default();
                    (host, port) = host_and_port(address).map_err(ConnectCause::Address)?;
                }
            }
        }
    }

    fn attempt(
        &self,
        host: &str,
        port: u16,
        target: Option<&str>,
        keep: usize,
        algorithms: &'static str,
    ) -> Result<Attempt, ConnectCause> {
        let stream = Arc::new(self.reach(host, port)?);
        let deadline = Instant::now() + self.options.login_time;
        let mut inbox = Box::new(Inbox::new(stream.clone(), LOGIN_SEGMENT, LOGIN_SEGMENT));
        inbox.set_tick(TICK).map_err(ConnectCause::Connect)?;
        let mut wire = Outgoing::of(stream.clone(), Agreed::default());
        let mut login = Login::new(Wanted {
            initiator: &self.options.initiator,
            target,
            account: self.url.account.as_ref(),
            target_account: self.url.target_account.as_ref(),
            algorithms,
            header_digest: self.options.header_digest,
            data_digest: self.options.data_digest,
            isid: self.isid,
        });
        let (mut request, mut text) = login.begin();
        let mut expected_status = 0;
        loop {
            request.expected_status = expected_status;
            wire.send(request.encode(), &text, deadline).map_err(|unsent| ConnectCause::Broken(unsent.cause))?;
            let header = self.response(&mut inbox, deadline)?;
            let response = match Answer::decode(&header) {
                Ok(Answer::Login(response)) => response,
                Ok(_) => return Err(ConnectCause::Protocol("the answer is none to a login")),
                Err(malformed) => return Err(ConnectCause::Broken(malformed.into())),
            };
            let sequence = Sequence::decode(&header);
            expected_status = sequence.status.wrapping_add(1);
            let mut random = [0; 17];
            getrandom::fill(&mut random).map_err(|error| ConnectCause::Option(format!("no random bytes: {error}")))?;
            match login.step(&response, &inbox.small, random) {
                Ok(Step::Send(next, say)) => (request, text) = (next, say),
                Ok(Step::Moved(to)) => return Ok(Attempt::Moved(to)),
                Ok(Step::Done) => {
                    let (agreed, group) = (login.agreed, login.group.take());
                    inbox.agree(agreed.digests, OWN_SEGMENT as usize, keep);
                    return Ok(Attempt::Done(Connection { stream, inbox, agreed, sequence, group }));
                }
                // A response of another length is an error to some, not a wrong password.
                Err(ConnectCause::Refused(AUTHENTICATION_FAILED | INITIATOR_ERROR)) if login.is_strong() => {
                    return Ok(Attempt::Doubted);
                }
                Err(cause) => return Err(cause),
            }
        }
    }

    /// A TCP connection with one of the host's addresses.
    fn reach(&self, host: &str, port: u16) -> Result<TcpStream, ConnectCause> {
        let resolve = |error: std::io::Error| ConnectCause::Resolve(format!("{}: {error}", portal(host, port)));
        let mut failure = None;
        for address in (host, port).to_socket_addrs().map_err(resolve)?.take(8) {
            let connected = TcpStream::connect_timeout(&address, self.options.connect_time).and_then(|stream| {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(TICK))?;
                Ok(stream)
            });
            match connected {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.map_or_else(|| ConnectCause::Resolve("it has none".to_owned()), ConnectCause::Connect))
    }

    fn response(&self, inbox: &mut Inbox, deadline: Instant) -> Result<Header, ConnectCause> {
        match receive_whole(inbox, deadline) {
            Ok(Some(header)) => Ok(header),
            Ok(None) => Err(ConnectCause::Time(self.options.login_time)),
            Err(broken) => Err(ConnectCause::Broken(broken)),
        }
    }

    /// The pause before the nth attempt to connect again.
    pub fn pause(&self, nth: u32) -> Duration {
        let pause = Duration::from_millis(100 << nth.saturating_sub(1).min(10));
        if nth == 0 { Duration::ZERO } else { pause.min(self.options.longest_pause) }
    }
}

/// The next PDU, its data with the inbox; none: not in time.
pub(super) fn receive_whole(inbox: &mut Inbox, deadline: Instant) -> Result<Option<Header>, Broken> {
    loop {
        if let Some(header) = inbox.whole()? {
            return Ok(Some(header));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
    }
}

enum Attempt {
    Done(Connection),
    /// The password was not believed, and it may be the algorithm.
    Doubted,
    Moved(String),
}
