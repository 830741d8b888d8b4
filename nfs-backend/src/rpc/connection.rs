//! Owns: the connection of a client: making it, reading from it, ending it when it is of no use, making the next.
//! Promises: what was written and is not acknowledged in time never arrives; a server that stops answering is noticed.
//! Must not know: what calls mean.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::Interest;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};

use super::calls::Calls;
use super::client::{Link, Shared};
use super::message;
use super::receive::receive;
use super::record::{Assembler, Diversion, Located};

/// Bytes that are read ahead; longer records are read straight into their own memory.
const STAGING: usize = 64 << 10;
/// Bytes that are read ahead while answers are awaited whose data have memory of their own to go to.
const STAGING_FOR_HEADERS: usize = 4 << 10;
/// Most bytes of a long record that are asked for at once.
const CHUNK: usize = 256 << 10;
/// How long a connection may take to come about.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

/// Looks after the connection until the client is closed.
pub(super) async fn keep(shared: Rc<Shared>) {
    let mut staging = vec![0; STAGING].into_boxed_slice();
    let mut assembler = Assembler::new(shared.options.most_reply);
    let mut pause = SHORTEST_PAUSE;
    while shared.closed.borrow().is_none() {
        match timeout(CONNECT_WITHIN, connect(&shared)).await {
            Ok(Ok(stream)) => {
                if serve(&shared, stream, &mut staging, &mut assembler).await {
                    pause = SHORTEST_PAUSE;
                }
            }
            Ok(Err(error)) => *shared.trouble.borrow_mut() = error.to_string(),
            Err(_) => *shared.trouble.borrow_mut() = "it does not answer".to_owned(),
        }
        if shared.closed.borrow().is_some() {
            return;
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = closing(&shared) => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn closing(shared: &Shared) {
    while shared.closed.borrow().is_none() {
        poll_fn(|context| shared.attention.hear(context)).await;
    }
}

async fn connect(shared: &Shared) -> std::io::Result<TcpStream> {
    let stream = match rustix::process::geteuid().is_root() {
        true => from_reserved_port(shared.address).await?,
        false => TcpStream::connect(shared.address).await?,
    };
    stream.set_nodelay(true)?;
    // Whatever ends the connection, this process's death too, unsent bytes are dropped.
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    let user_timeout = u32::try_from(shared.options.user_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&stream, user_timeout)?;
    Ok(stream)
}

/// Servers want the root of a client to come from a port below 1024 (RFC 1813, 4.4.1 hints at why; exports(5), `secure`).
async fn from_reserved_port(address: SocketAddr) -> std::io::Result<TcpStream> {
    const ATTEMPTS: u32 = 8;
    const PORTS: std::ops::Range<u16> = 665..1024;
    let any = if address.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    for _ in 0..ATTEMPTS {
        let random = getrandom::u32().map_err(std::io::Error::other)? as u16;
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if socket.bind(SocketAddr::new(any, PORTS.start + random % (PORTS.end - PORTS.start))).is_err() {
            continue;
        }
        match socket.connect(address).await {
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::AddrNotAvailable | std::io::ErrorKind::AddrInUse) => {}
            other => return other,
        }
    }
    TcpStream::connect(address).await
}

/// What ended a wait.
enum Event {
    Readable,
    Writable,
    Recovered,
    Attention,
    Tick,
}

/// Serves a connection until it ends. True: it was of use.
async fn serve(shared: &Shared, stream: TcpStream, staging: &mut [u8], assembler: &mut Assembler) -> bool {
    let stream = Rc::new(stream);
    let epoch = shared.epoch.get();
    assembler.reset();
    shared.is_full.set(false);
    *shared.link.borrow_mut() = Link::Recovering(stream.clone());
    let recovery = shared.recovery.borrow().as_ref().map(|recovery| recovery());
    let mut recovery = std::pin::pin!(async move {
        if let Some(recovery) = recovery {
            recovery.await;
        }
    });
    let mut recovering = true;
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let answer_within = shared.options.answer_within.as_secs().max(1);
    while shared.epoch.get() == epoch {
        let event = poll_fn(|context| {
            let recovery = recovering.then_some(recovery.as_mut());
            wait(shared, &stream, &mut ticks, recovery, context)
        })
        .await;
        match event {
            Event::Readable => match take_what_came(shared, &stream, staging, assembler) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => shared.disconnect(&error.to_string()),
            },
            Event::Writable => {
                shared.is_full.set(false);
                shared.flush();
            }
            Event::Recovered => {
                recovering = false;
                if shared.epoch.get() == epoch {
                    *shared.link.borrow_mut() = Link::Up(stream.clone());
                    shared.recovered.notify_waiters();
                    shared.flush();
                }
            }
            Event::Attention => shared.flush(),
            Event::Tick => {
                let now = shared.tick.get() + 1;
                shared.tick.set(now);
                let is_closed = shared.options.gate.as_ref().is_some_and(|gate| !gate.is_open());
                if shared.calls.borrow().waits_since_before(now.saturating_sub(answer_within)) {
                    shared.disconnect("an answer does not come");
                } else if is_closed && shared.calls.borrow().waits_for_gated() {
                    // The kernel may hold bytes of requests that must not arrive any more.
                    shared.disconnect("the gate is closed");
                } else {
                    shared.flush();
                }
            }
        }
    }
    !recovering
}

/// What there is to do, in this order.
fn wait(
    shared: &Shared,
    stream: &TcpStream,
    ticks: &mut Interval,
    recovery: Option<Pin<&mut impl Future<Output = ()>>>,
    context: &mut Context<'_>,
) -> Poll<Event> {
    if shared.attention.hear(context).is_ready() {
        return Poll::Ready(Event::Attention);
    }
    // An error of the socket is told by the call that follows.
    if stream.poll_read_ready(context).is_ready() {
        return Poll::Ready(Event::Readable);
    }
    if shared.is_full.get() && stream.poll_write_ready(context).is_ready() {
        return Poll::Ready(Event::Writable);
    }
    if recovery.is_some_and(|recovery| recovery.poll(context).is_ready()) {
        return Poll::Ready(Event::Recovered);
    }
    ticks.poll_tick(context).map(|_| Event::Tick)
}

/// Reads once what the socket has, to where it belongs.
fn take_what_came(
    shared: &Shared,
    stream: &TcpStream,
    staging: &mut [u8],
    assembler: &mut Assembler,
) -> io::Result<()> {
    let ahead = if shared.calls.borrow().expects_much() { STAGING_FOR_HEADERS } else { STAGING };
    let staging = &mut staging[..ahead];
    let mut direct = 0;
    let landing = assembler.diverted().and_then(|part| Some((buffer_of(shared, assembler)?, part)));
    let (came, room) = if let Some((buffer, part)) = &landing {
        direct = part.1;
        stream.try_io(Interest::READABLE, || receive(stream.as_fd(), buffer, *part, staging))?
    } else if assembler.missing() > STAGING {
        let memory = assembler.room(CHUNK);
        let room = memory.len();
        let read = stream.try_read(memory);
        if assembler.filled(CHUNK, *read.as_ref().unwrap_or(&0)) {
            deliver(shared, assembler);
        }
        return read.and_then(|came| ended_or_drained(stream, came, room));
    } else {
        (stream.try_read(staging)?, staging.len())
    };
    ended_or_drained(stream, came, room)?;
    let landed = came.min(direct);
    if landed > 0 && assembler.passed(landed) {
        deliver(shared, assembler);
    }
    take(shared, assembler, &staging[..came - landed]);
    Ok(())
}

/// Makes an end of the stream an error, and saves a read that would find nothing.
fn ended_or_drained(stream: &TcpStream, came: usize, room: usize) -> io::Result<()> {
    if came == 0 {
        return Err(io::Error::other("the server closed the connection"));
    }
    if came < room {
        // Whatever comes from now on is told anew.
        let _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
    Ok(())
}

/// Where data of the record under way go, if its call still waits for them.
fn buffer_of(shared: &Shared, assembler: &Assembler) -> Option<scsi::DataBuffer> {
    let calls = shared.calls.borrow();
    let slot = calls.find(message::xid_of(assembler.record()).ok()?)?;
    calls.landing(slot).map(|landing| landing.buffer.clone())
}

/// Data of replies go to the memory of the calls that they answer.
struct ToCallers<'a>(&'a RefCell<Calls>);

impl Diversion for ToCallers<'_> {
    fn locate(&mut self, head: &[u8]) -> Located {
        let calls = self.0.borrow();
        let slot = message::xid_of(head).ok().and_then(|xid| calls.find(xid));
        let Some(landing) = slot.and_then(|slot| calls.landing(slot)) else { return Located::Nowhere };
        match (landing.locate)(head) {
            Located::At(range) if range.len() > landing.buffer.len() => Located::Nowhere,
            Located::Later(length) => Located::Later(length.max(head.len() + 1)),
            located => located,
        }
    }

    fn place(&mut self, head: &[u8], offset: usize, bytes: &[u8]) {
        let calls = self.0.borrow();
        let slot = message::xid_of(head).ok().and_then(|xid| calls.find(xid));
        // The call may have been given up in the middle of its answer: nobody wants the rest.
        if let Some(landing) = slot.and_then(|slot| calls.landing(slot)) {
            landing.buffer.copy_from(offset, bytes);
        }
    }
}

/// Takes what was read ahead.
fn take(shared: &Shared, assembler: &mut Assembler, mut bytes: &[u8]) {
    let epoch = shared.epoch.get();
    while shared.epoch.get() == epoch {
        match assembler.feed(&mut bytes, &mut ToCallers(&shared.calls)) {
            Ok(true) => deliver(shared, assembler),
            Ok(false) => return,
            Err(error) => shared.disconnect(&error.to_string()),
        }
    }
}

/// Hands a whole record to the call that it answers. One that answers none is dropped: a call that was given up, or a second answer.
fn deliver(shared: &Shared, assembler: &mut Assembler) {
    let mut calls = shared.calls.borrow_mut();
    let landed = assembler.landed();
    match message::xid_of(assembler.record()) {
        Ok(xid) => match calls.find(xid) {
            Some(slot) => calls.answer(slot, landed, |memory| assembler.take(memory)),
            None => assembler.forget(),
        },
        Err(error) => {
            drop(calls);
            shared.disconnect(&format!("no reply came, but something else: {error}"));
        }
    }
}
