//! Owns: which session a request goes by, and what is done when that is none any more.
//! Promises: a request whose session or state has ended is sent in the next one only if the keeper of the lock has vouched for that.
//! Must not know: files.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{timeout, timeout_at};

use super::calls::{Ask, Pauses, Reply, exchange};
use super::establish::{self, Identity};
use super::grants::Grants;
use super::operations::Server;
use super::session::Session;
use super::states::StateId;
use super::status::{COMPLETE_ALREADY, STALE_CLIENT, Verdict, judge};
use crate::error::NfsError;
use crate::rpc::{Client, Sending};
use crate::xdr::Writer;

/// How often who waits for a session looks whether it is still of use.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Where sessions come from.
pub(super) enum Sessions {
    /// Made here, as often as needed; nothing is open.
    Own(Own),
    /// Handed over by the keeper of a lock.
    Granted(Granted),
    /// This one, until its owner says another.
    Given(RefCell<Option<Rc<Session>>>),
}

pub(super) struct Own {
    identity: RefCell<Identity>,
    current: tokio::sync::Mutex<Option<Rc<Session>>>,
}

pub(super) struct Granted {
    grants: Arc<Grants>,
    current: RefCell<Option<Rc<Session>>>,
}

impl Own {
    pub fn new() -> Self {
        Self { identity: RefCell::new(Identity::new()), current: tokio::sync::Mutex::default() }
    }

    async fn session(&self, client: &Client, how: Sending) -> Result<Rc<Session>, NfsError> {
        let mut current = self.current.lock().await;
        if let Some(session) = current.as_ref().filter(|session| !session.is_ended()) {
            return Ok(session.clone());
        }
        let (mut pauses, mut attempts) = (Pauses::new(), 0);
        let session = loop {
            let error = match self.establish(client, how).await {
                Ok(session) => break session,
                Err(error) => error,
            };
            // The server may be started again at any moment; another no is its last word.
            let status = error.status();
            let was_restarted = status.is_some_and(|status| status == STALE_CLIENT || judge(status) != Verdict::Final);
            attempts += 1;
            if status.is_none() || !(was_restarted || attempts < 3) || !pauses.wait(how.deadline).await {
                return Err(error);
            }
        };
        *current = Some(session.clone());
        Ok(session)
    }

    async fn establish(&self, client: &Client, how: Sending) -> Result<Rc<Session>, NfsError> {
        // With another verifier: whatever is left of a session before goes.
        self.identity.borrow_mut().begin_anew();
        let identity = self.identity.borrow().clone();
        let known = establish::exchange_id(client, &identity, how).await?;
        let (id, channel) = establish::create_session(client, (known.client, known.sequence), how).await?;
        let session = Session::new(id, 0, channel, StateId::ANONYMOUS);
        complete_reclaim(client, &session, how).await?;
        Ok(session)
    }
}

/// Says that nothing more of what was open before a restart is claimed (RFC 8881, 18.51).
pub(super) async fn complete_reclaim(client: &Client, session: &Session, how: Sending) -> Result<(), NfsError> {
    use super::calls::operation::RECLAIM_COMPLETE;
    let ask = Ask { name: "RECLAIM_COMPLETE", operations: 1, keep: true };
    let build = |to: &mut Vec<u8>| {
        to.put_u32(RECLAIM_COMPLETE);
        to.put_bool(false);
    };
    let how = Sending { recovery: true, gated: false, ..how };
    let mut pauses = Pauses::new();
    loop {
        let error = match exchange(client, session, ask, how, build).await {
            Err(error) => error,
            Ok(_) => return Ok(()),
        };
        match error.status() {
            Some(COMPLETE_ALREADY) => return Ok(()),
            Some(status) if judge(status) == Verdict::Busy && pauses.wait(how.deadline).await => {}
            _ => return Err(error),
        }
    }
}

impl Granted {
    pub fn new(grants: Arc<Grants>) -> Self {
        Self { grants, current: RefCell::default() }
    }

    async fn session(&self, client: &Client) -> Result<Rc<Session>, NfsError> {
        if let Some(session) = self.current.borrow().as_ref() {
            if !session.is_ended() {
                return Ok(session.clone());
            }
            // What its slots have counted is not known any more.
            self.grants.complain(session.epoch());
        }
        // The keeper may never hand out another one; whoever closes the client ends the wait.
        let grant = loop {
            if let Ok(grant) = timeout(LOOK_EVERY, self.grants.usable()).await {
                break grant;
            }
            if let Some(error) = client.ended("SEQUENCE") {
                return Err(error);
            }
        };
        let mut current = self.current.borrow_mut();
        Ok(match current.as_ref().filter(|session| session.epoch() == grant.epoch && !session.is_ended()) {
            Some(session) => session.clone(),
            None => current.insert(Session::new(grant.session, grant.epoch, grant.channel, grant.state)).clone(),
        })
    }
}

impl Sessions {
    async fn current(&self, client: &Client, how: Sending) -> Result<Rc<Session>, NfsError> {
        match self {
            Sessions::Own(own) => own.session(client, how).await,
            Sessions::Granted(granted) => granted.session(client).await,
            Sessions::Given(session) => {
                let closed = || NfsError::Closed { procedure: "SEQUENCE", cause: "there is no session".into() };
                session.borrow().clone().ok_or_else(closed)
            }
        }
    }

    /// The session is of no use. True: there may be another one.
    fn replace(&self, session: &Session) -> bool {
        match self {
            Sessions::Own(_) => session.end(),
            Sessions::Granted(granted) => {
                session.end();
                granted.grants.complain(session.epoch());
            }
            Sessions::Given(_) => return false,
        }
        true
    }
}

impl Server {
    /// One request, by a session that is of use, asked again while the server has no time or is in grace. `build` gets the session.
    pub(super) async fn ask(
        &self,
        ask: Ask,
        how: Sending,
        mut build: impl FnMut(&mut Vec<u8>, &Session),
    ) -> Result<Reply<'_>, NfsError> {
        let (client, sessions) = (self.client(), self.sessions());
        let mut pauses = Pauses::new();
        loop {
            let current = sessions.current(client, how);
            let session = match how.deadline {
                None => current.await?,
                Some(deadline) => timeout_at(deadline, current).await.unwrap_or_else(|_| {
                    let (server, cause) = (client.name().to_owned(), "it gives no session in time".to_owned());
                    Err(NfsError::Unreachable { procedure: ask.name, server, cause })
                })?,
            };
            let (procedure, status) = match exchange(client, &session, ask, how, |to| build(to, &session)).await {
                Err(NfsError::Refused { procedure, status }) => (procedure, status),
                other => return other,
            };
            let is_retried = match judge(status) {
                Verdict::Busy => pauses.wait(how.deadline).await,
                Verdict::Session => sessions.replace(&session) && pauses.wait(how.deadline).await,
                _ if status == STALE_CLIENT => sessions.replace(&session) && pauses.wait(how.deadline).await,
                Verdict::State => {
                    *session.state() != StateId::ANONYMOUS
                        && sessions.replace(&session)
                        && pauses.wait(how.deadline).await
                }
                Verdict::Slot | Verdict::Final => false,
            };
            if !is_retried {
                return Err(NfsError::Refused { procedure, status });
            }
        }
    }
}
