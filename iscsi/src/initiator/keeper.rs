//! Owns: the one thread of a session: it connects again, pings, answers pings, listens while nobody else does, and ends the session.
//! Promises: each of its waits ends; the end of a session is called proven only by the target's own word.
//! Must not know: commands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connect::{Connection, Connector, receive_whole};
use super::error::Broken;
use super::outgoing::Outgoing;
use super::session::{Life, Link, Ping, Shared};
use super::tasks::{LOGOUT, PING};
use crate::pdu::{Answer, HEADER, LogoutRequest, NO_TAG, NopOut};

/// How often it looks, if nobody tells it to.
const LOOK: Duration = Duration::from_millis(500);
/// For sending what is its own.
const SEND_TIME: Duration = Duration::from_secs(1);
/// For the answer to a logout.
const LOGOUT_TIME: Duration = Duration::from_secs(5);
/// How often an answer to a logout is looked for.
const GLANCE: Duration = Duration::from_millis(20);

/// The keeper of a session.
pub(super) struct Keeper {
    pub shared: Arc<Shared>,
    pub connector: Connector,
    /// The portal group of the last session.
    pub group: Option<String>,
}

/// What there is to do.
enum Job {
    Wait(Duration),
    Connect,
    Tend,
    End(Instant),
    Leave,
}

impl Keeper {
    /// Works until the session's owner is gone.
    pub fn run(mut self) {
        let mut attempts = 0;
        let mut last = Instant::now();
        loop {
            let job = {
                let mut core = self.shared.core.lock();
                let job = match (&core.life, &core.link) {
                    (Life::Dropped, _) => Job::Leave,
                    (Life::Ended { .. }, _) => Job::Wait(LOOK),
                    (Life::Ending(by), _) => Job::End(*by),
                    (Life::Running, Link::Up(_)) => Job::Tend,
                    (Life::Running, Link::Down { .. }) => {
                        let pause = self.connector.pause(attempts).max(core.stay_away);
                        match pause.checked_sub(last.elapsed()).filter(|left| !left.is_zero()) {
                            Some(left) => Job::Wait(left),
                            None => Job::Connect,
                        }
                    }
                };
                if let Job::Wait(time) = job {
                    self.shared.changed.wait_for(&mut core, time);
                    continue;
                }
                job
            };
            match job {
                Job::Wait(_) => {}
                Job::Connect => {
                    attempts += 1;
                    if self.connect() {
                        attempts = 0;
                    }
                    last = Instant::now();
                }
                Job::Tend => {
                    self.tend();
                    // The first attempt after a loss is made at once.
                    last = Instant::now();
                }
                Job::End(by) => {
                    let is_proven = self.end(by);
                    self.shared.core.lock().life = Life::Ended { is_proven };
                    self.shared.changed.notify_all();
                }
                Job::Leave => {
                    self.log_out(Instant::now() + SEND_TIME);
                    return;
                }
            }
        }
    }

    fn connect(&mut self) -> bool {
        match self.connector.connect() {
            Ok(connection) => {
                self.group = connection.group.clone();
                self.shared.install(connection);
                true
            }
            Err(error) => {
                tracing::warn!(path = %self.shared.name, cause = %error.cause, "no connection");
                let mut core = self.shared.core.lock();
                core.stay_away = Duration::ZERO;
                if let Link::Down { cause, is_lasting, .. } = &mut core.link {
                    *cause = error.cause.to_string().into();
                    *is_lasting = error.cause.is_lasting();
                }
                // Those who wait see whether it makes sense.
                core.rouse_all(!0);
                false
            }
        }
    }

    /// Looks after a connection that is there, then waits a little.
    fn tend(&self) {
        let shared = &self.shared;
        let (inbox, pings, ping, logs_out, silent, epoch) = {
            let mut core = shared.core.lock();
            let is_idle = core.tasks.is_idle();
            let inbox = if is_idle { core.inbox.take() } else { None };
            let pings: Vec<Ping> = core.pings.drain(..).collect();
            let ping = core.pinged.is_none() && core.heard.elapsed() >= shared.options.ping_after;
            let silent = core.pinged.is_some_and(|since| since.elapsed() >= shared.options.ping_time);
            let logs_out = core.leave_by.is_some_and(|by| is_idle || Instant::now() >= by);
            (inbox, pings, ping, logs_out, silent, core.epoch)
        };
        if let Some(inbox) = inbox {
            shared.receive_idle(inbox);
        } else {
            // Nobody may be left asleep while nobody receives.
            shared.pass_on();
        }
        if silent && shared.core.lock().pinged.is_some() {
            return shared.fail(epoch, &Broken::Silent);
        }
        for Ping { lun, transfer_tag } in pings {
            self.send(|number, status| NopOut { lun, tag: NO_TAG, transfer_tag, number }.encode(status));
        }
        if ping {
            shared.core.lock().pinged = Some(Instant::now());
            self.send(|number, status| NopOut { lun: [0; 8], tag: PING, transfer_tag: NO_TAG, number }.encode(status));
        }
        if logs_out {
            tracing::info!(path = %shared.name, "the target asks for a logout");
            self.log_out(Instant::now() + LOGOUT_TIME);
            return;
        }
        let mut core = shared.core.lock();
        let is_quiet = core.pings.is_empty() && core.life == Life::Running && core.leave_by.is_none();
        if is_quiet && matches!(core.link, Link::Up(_)) {
            shared.changed.wait_for(&mut core, LOOK);
        } else if core.leave_by.is_some() {
            shared.changed.wait_for(&mut core, GLANCE);
        }
    }

    /// Sends a PDU of its own, if there is a connection. When that fails, so does the connection.
    fn send(&self, encode: impl FnOnce(u32, u32) -> [u8; HEADER]) {
        let shared = &self.shared;
        let deadline = Instant::now() + SEND_TIME;
        // Somebody else may be sending much: the next look tries again, or sees that the target takes nothing.
        let Some(mut wire) = shared.wire.try_lock_until(deadline) else { return };
        let header = {
            let core = shared.core.lock();
            if !matches!(core.link, Link::Up(_)) {
                return;
            }
            encode(core.tasks.next_number(), core.tasks.expected_status())
        };
        let epoch = wire.epoch;
        if let Err(unsent) = wire.send(header, &[], deadline) {
            drop(wire);
            shared.fail(epoch, &unsent.cause);
        }
    }

    /// Logs out and closes the connection. True: the target says that the session is closed.
    fn log_out(&self, by: Instant) -> bool {
        let shared = &self.shared;
        let epoch = {
            let mut core = shared.core.lock();
            if !matches!(core.link, Link::Up(_)) {
                return false;
            }
            core.logged_out = None;
            core.epoch
        };
        self.send(|number, status| LogoutRequest { reason: 0, tag: LOGOUT, connection: 0, number }.encode(status));
        loop {
            let inbox = {
                let mut core = shared.core.lock();
                if let Some(response) = core.logged_out {
                    drop(core);
                    shared.fail(epoch, &Broken::LoggedOut);
                    return response == 0;
                }
                if core.epoch != epoch || !matches!(core.link, Link::Up(_)) {
                    return false;
                }
                if Instant::now() >= by {
                    drop(core);
                    shared.fail(epoch, &Broken::Silent);
                    return false;
                }
                let inbox = core.inbox.take();
                if inbox.is_none() {
                    shared.changed.wait_for(&mut core, GLANCE);
                }
                inbox
            };
            if let Some(inbox) = inbox {
                shared.receive_idle(inbox);
            }
        }
    }

    /// Ends the session for good. True: the target has said that nothing of it is left, by acknowledging its logout, or by letting the
    /// same initiator port log in anew, which ends the former session first (RFC 7143, 6.3.5).
    fn end(&self, by: Instant) -> bool {
        if self.log_out(by.min(Instant::now() + LOGOUT_TIME)) {
            return true;
        }
        let mut attempts = 0;
        while Instant::now() < by && self.shared.core.lock().life != Life::Dropped {
            match self.connector.connect() {
                Ok(connection) => {
                    let is_same = connection.group == self.group;
                    farewell(connection);
                    return is_same;
                }
                Err(error) => {
                    tracing::warn!(path = %self.shared.name, cause = %error.cause, "the end of the session is not proven yet");
                    if error.cause.is_lasting() {
                        return false;
                    }
                    attempts += 1;
                    let pause = self.connector.pause(attempts).min(by.saturating_duration_since(Instant::now()));
                    let mut core = self.shared.core.lock();
                    self.shared.changed.wait_for(&mut core, pause);
                }
            }
        }
        false
    }
}

/// Logs out of a session that has no commands; whether the target answers does not matter.
pub(super) fn farewell(connection: Connection) {
    let Connection { stream, mut inbox, agreed, sequence, .. } = connection;
    let mut wire = Outgoing::of(stream, agreed);
    let logout = LogoutRequest { reason: 0, tag: LOGOUT, connection: 0, number: sequence.expected };
    let deadline = Instant::now() + SEND_TIME;
    if wire.send(logout.encode(sequence.status.wrapping_add(1)), &[], deadline).is_err() {
        return;
    }
    while let Ok(Some(header)) = receive_whole(&mut inbox, deadline) {
        if matches!(Answer::decode(&header), Ok(Answer::Logout(_)) | Err(_)) || Instant::now() >= deadline {
            return;
        }
    }
}
