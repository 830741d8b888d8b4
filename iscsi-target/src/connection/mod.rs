//! Owns: one connection from its first byte to its last: login, then the full feature phase.
//! Promises: a connection that ends in any way leaves no command running and nothing locked; others never notice.
//! Must not know: which targets there are, how disks are stored.

mod collecting;
mod inbox;
mod numbers;
mod outbox;
mod pace;
mod session;
mod socket;

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use iscsi::login::{self, Login};
use iscsi::pdu::{LoginRequest, LoginResponse, Request, Sequence};

use crate::server::{Joined, Server};
use inbox::{Broken, Inbox};
use numbers::Numbers;
use outbox::Outbox;
pub use session::Session;
pub use socket::Socket;

/// Time for a login (RFC 7143 leaves it to the target).
const LOGIN_TIME: Duration = Duration::from_secs(15);

/// Where a connection came in.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    /// The initiator's address.
    pub peer: SocketAddr,
    /// The address that it reached.
    pub local: SocketAddr,
    /// Number of the portal, from 1 on: its portal group and its relative port.
    pub portal: u16,
}

/// Serves a connection to its end.
pub async fn serve(server: Rc<Server>, socket: Socket, entrance: Entrance) {
    let socket = Rc::new(socket);
    let outbox = Rc::new(Outbox::new(socket.clone()));
    let sender = tokio_uring::spawn({
        let outbox = outbox.clone();
        async move { outbox.send().await }
    });
    let mut inbox = Inbox::new(socket.clone());
    let peer = entrance.peer;
    let arrival = server.arrive(&socket, peer);
    let mut logged_in = None;
    match tokio::time::timeout(LOGIN_TIME, log_in(&server, &mut inbox, &outbox, entrance)).await {
        Err(_) => tracing::info!(%peer, "no login within {} s", LOGIN_TIME.as_secs()),
        Ok(Err(error)) => tracing::debug!(%peer, %error, "the login ended"),
        Ok(Ok(session)) => logged_in = session,
    }
    drop(arrival);
    if let Some((login, first, numbers)) = logged_in {
        let session = Session::begin(&server, socket, outbox.clone(), &login, &first, numbers, entrance).await;
        let farewell = session.run(&mut inbox).await;
        session.end(farewell).await;
    }
    outbox.close();
    let _ = sender.await;
}

type LoggedIn = (Login, LoginRequest, Numbers);

/// The login phase. None: it was refused, and the response says why.
async fn log_in(
    server: &Rc<Server>,
    inbox: &mut Inbox,
    outbox: &Outbox,
    entrance: Entrance,
) -> Result<Option<LoggedIn>, Broken> {
    let mut login = Login::new();
    let mut begun: Option<(LoginRequest, Numbers)> = None;
    loop {
        let header = inbox.header().await?;
        let arrived = inbox.data(&header, None).await?;
        let request = match Request::decode(&header) {
            Ok(Request::Login(request)) => request,
            // Anything else before the login is over ends the connection (RFC 7143, 6.3).
            _ => {
                let (isid, tag) =
                    begun.as_ref().map_or(([0; 6], header.task_tag()), |(first, _)| (first.isid, first.tag));
                let refusal = refusal(isid, tag, login::INVALID_DURING_LOGIN);
                outbox.push(refusal.encode(Sequence::default()), &[]);
                return Ok(None);
            }
        };
        if begun.is_none() {
            begun = Some((request, Numbers::new(request.number, request.expected_status)));
        }
        let Some((first, numbers)) = &begun else { unreachable!("set above") };
        let same = first.isid == request.isid && first.tsih == request.tsih && first.connection == request.connection;
        let step = match same {
            false => Err(login::INITIATOR_ERROR),
            // A session has one connection: one that would be its second is told so.
            true if request.tsih != 0 => Err(match server.has_session(request.tsih) {
                true => login::TOO_MANY_CONNECTIONS,
                false => login::NO_SESSION,
            }),
            true => login.step(&request, arrived.data.here(), &server.doorkeeper(entrance)),
        };
        let answer = match step {
            Ok(answer) => answer,
            Err(status) => {
                let (peer, initiator, target) = (entrance.peer, &login.initiator, &login.target);
                tracing::info!(%peer, ?initiator, ?target, class = status.0, detail = status.1, "a login is refused");
                outbox.push(refusal(request.isid, request.tag, status).encode(numbers.with_status()), &[]);
                return Ok(None);
            }
        };
        let is_last = answer.is_last();
        let tsih = match is_last.then(|| server.reserve_session()) {
            None => 0,
            Some(Joined::As(tsih)) => tsih,
            Some(Joined::Full) => {
                outbox.push(
                    refusal(request.isid, request.tag, login::OUT_OF_RESOURCES).encode(numbers.with_status()),
                    &[],
                );
                return Ok(None);
            }
        };
        let response = LoginResponse {
            transit: answer.transit,
            continues: false,
            current: answer.current,
            next: answer.next,
            isid: request.isid,
            tsih,
            tag: request.tag,
            status: login::SUCCESS,
        };
        if is_last {
            server.reinstate(&login, request.isid).await;
        }
        outbox.push(response.encode(numbers.with_status()), &answer.text);
        if is_last {
            inbox.begin(login.parameters.digests);
            outbox.set_digests(login.parameters.digests);
            let (first, numbers) = begun.expect("the login has begun");
            return Ok(Some((login, LoginRequest { tsih, ..first }, numbers)));
        }
    }
}

fn refusal(isid: [u8; 6], tag: u32, status: login::Status) -> LoginResponse {
    LoginResponse { transit: false, continues: false, current: 0, next: 0, isid, tsih: 0, tag, status }
}
