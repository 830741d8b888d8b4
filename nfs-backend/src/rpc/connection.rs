//! Owns: the connection of a client: making it, reading from it, ending it when it is of no use, making the next.
//! Promises: what was written and is not acknowledged in time never arrives; a server that stops answering is noticed.
//! Must not know: what calls mean.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::AsyncReadExt;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::client::{Link, Shared};
use super::message;
use super::record::Assembler;

/// Bytes that are read ahead; longer records are read straight into their own memory.
const STAGING: usize = 64 << 10;
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
        shared.attention.notified().await;
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
    Read(std::io::Result<usize>),
    Writable,
    Recovered,
    Attention,
    Tick,
}

/// Serves a connection until it ends. True: it was of use.
async fn serve(shared: &Shared, stream: TcpStream, staging: &mut [u8], assembler: &mut Assembler) -> bool {
    let (mut reader, writer) = stream.into_split();
    let writer = Rc::new(writer);
    let epoch = shared.epoch.get();
    assembler.reset();
    shared.is_full.set(false);
    *shared.link.borrow_mut() = Link::Recovering(writer.clone());
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
        // A long record goes straight to where it stays.
        let direct = if assembler.missing() > STAGING { CHUNK } else { 0 };
        let event = {
            let memory = if direct > 0 { assembler.room(direct) } else { &mut *staging };
            wait(shared, &mut reader, memory, &writer, &mut ticks, recovering.then_some(recovery.as_mut())).await
        };
        let came = if let Event::Read(Ok(count)) = event { count } else { 0 };
        let is_whole = direct > 0 && assembler.filled(direct, came);
        match event {
            Event::Read(Ok(0)) => shared.disconnect("the server closed the connection"),
            Event::Read(Ok(_)) if direct > 0 => {
                if is_whole {
                    deliver(shared, assembler);
                }
            }
            Event::Read(Ok(count)) => take(shared, assembler, &staging[..count]),
            Event::Read(Err(error)) => shared.disconnect(&error.to_string()),
            Event::Writable => {
                shared.is_full.set(false);
                shared.flush();
            }
            Event::Recovered => {
                recovering = false;
                if shared.epoch.get() == epoch {
                    *shared.link.borrow_mut() = Link::Up(writer.clone());
                    shared.recovered.notify_waiters();
                    shared.flush();
                }
            }
            Event::Attention => {}
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

async fn wait(
    shared: &Shared,
    reader: &mut OwnedReadHalf,
    memory: &mut [u8],
    writer: &tokio::net::tcp::OwnedWriteHalf,
    ticks: &mut tokio::time::Interval,
    recovery: Option<std::pin::Pin<&mut impl Future<Output = ()>>>,
) -> Event {
    let is_recovering = recovery.is_some();
    let recovered = async {
        match recovery {
            Some(recovery) => recovery.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        read = reader.read(memory) => Event::Read(read),
        _ = writer.writable(), if shared.is_full.get() => Event::Writable,
        () = recovered, if is_recovering => Event::Recovered,
        () = shared.attention.notified() => Event::Attention,
        _ = ticks.tick() => Event::Tick,
    }
}

/// Takes what was read ahead.
fn take(shared: &Shared, assembler: &mut Assembler, mut bytes: &[u8]) {
    let epoch = shared.epoch.get();
    while shared.epoch.get() == epoch {
        match assembler.feed(&mut bytes) {
            Ok(true) => deliver(shared, assembler),
            Ok(false) => return,
            Err(error) => shared.disconnect(&error.to_string()),
        }
    }
}

/// Hands a whole record to the call that it answers. One that answers none is dropped: a call that was given up, or a second answer.
fn deliver(shared: &Shared, assembler: &mut Assembler) {
    let mut calls = shared.calls.borrow_mut();
    match message::xid_of(assembler.record()) {
        Ok(xid) => match calls.find(xid) {
            Some(slot) => calls.answer(slot, |memory| assembler.take(memory)),
            None => assembler.forget(),
        },
        Err(error) => {
            drop(calls);
            shared.disconnect(&format!("no reply came, but something else: {error}"));
        }
    }
}
