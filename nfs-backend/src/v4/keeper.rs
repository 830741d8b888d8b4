//! Owns: the share reservation that is the lock of a disk, from OPEN to CLOSE, and the thread that keeps it alive on a session of its own.
//! Promises: the tenure ends well before the server's lease; a lock that was lost on the server counts as kept only if nobody else has had it since.
//! Must not know: how data are moved.
//!
//! Whoever has opened the data for writing, and denied that to others, writes who he is into the owner file before anything else. So whoever
//! opens it again and finds his own name there knows that nobody had it in between.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::establish::{self, Identity};
use super::grants::Grants;
use super::operations::Server;
use super::server::complete_reclaim;
use super::session::{Channel, Session, SessionId};
use super::states::{ACCESS_BOTH, ACCESS_WRITE, Claim, DENY_NONE, DENY_WRITE, Open, StateId};
use super::status::{SEQ_MISORDERED, SHARE_DENIED, STALE_CLIENT, Verdict, judge};
use crate::error::{NfsError, Status};
use crate::lock::{Content, Holder, LockError, Loss, Owner, Record, SharedTenure, State, Timing, boot_time};
use crate::nfs3::FileHandle;
use crate::rpc::{Client, Credential, Options};

/// How long a call may take while the lock is being taken or given back.
const PATIENCE: Duration = Duration::from_secs(15);
/// A connection on which an answer does not come for so long is given up.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The pause after a renewal that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// How often a session is asked for again at once.
const ATTEMPTS: usize = 3;
/// How often a disk that is locked is asked for again.
const TRY_EVERY: Duration = Duration::from_millis(500);
/// Bytes of an owner file that are looked at.
const LOOK: u32 = 128;
/// The shortest lease that leaves time to freeze and to renew.
const SHORTEST_LEASE: Duration = Duration::from_secs(4);
/// Longer leases are treated as this.
const LONGEST_LEASE: Duration = Duration::from_secs(3600);
const MOST_RENEW: Duration = Duration::from_secs(10);
const MOST_REPLY: usize = 64 << 10;

/// The times that a server's lease leaves: renewed in a quarter of it, stopped after half of it.
///
/// # Errors
/// [`NfsError::Nonsense`] if it is too short.
pub(crate) fn timing(lease: Duration) -> Result<Timing, NfsError> {
    if lease < SHORTEST_LEASE {
        let cause = format!("a lease of {lease:?}, where {SHORTEST_LEASE:?} is the least that can be kept alive");
        return Err(NfsError::Nonsense { procedure: "GETATTR", cause });
    }
    let lease = lease.min(LONGEST_LEASE);
    Ok(Timing { renew: (lease / 4).min(MOST_RENEW), gate: lease / 2, flight: lease / 4, stale: lease })
}

/// A disk to be locked.
pub(crate) struct FileLock {
    pub address: SocketAddr,
    pub credential: Credential,
    /// The server's name.
    pub name: String,
    pub directory: FileHandle,
    pub data: FileHandle,
    /// Number of the data within its file system.
    pub fileid: u64,
    pub owner: Owner,
    pub timing: Timing,
    pub tenure: Arc<SharedTenure>,
    pub grants: Arc<Grants>,
    pub stop: Arc<Notify>,
}

/// Name of the file that says who has a disk.
pub(crate) fn owner_file(fileid: u64) -> String {
    format!(".own-{fileid:x}")
}

/// What a client is to the server.
struct Member {
    identity: Identity,
    client: u64,
    /// For the next CREATE_SESSION.
    sequence: u32,
    session: Option<SessionId>,
    /// The data's session.
    data: Option<SessionId>,
    channel: Channel,
    /// What was open before may be claimed yet.
    may_reclaim: bool,
}

/// What is held.
struct Holding {
    member: Member,
    state: StateId,
    record: Record,
    owner_file: FileHandle,
    owner_state: StateId,
}

/// Who has a disk, as far as the server and the owner file tell; `None`: nobody.
///
/// # Errors
/// [`LockError`]
pub async fn look(
    server: &Server,
    directory: &FileHandle,
    data: &FileHandle,
    fileid: u64,
) -> Result<Option<(Holder, Content)>, LockError> {
    let file = owner_file(fileid);
    let failed = |cause| LockError::Nfs { file: file.clone(), cause };
    let open = Open { client: 0, owner: b"look", access: ACCESS_WRITE, deny: DENY_NONE, claim: Claim::File(data) };
    match server.open(&open).await {
        Ok((state, _)) => {
            server.close(data, &state).await.map_err(failed)?;
            Ok(None)
        }
        Err(error) if error.is(SHARE_DENIED) => {
            let content = Content::of(&read_owner(server, directory, &file).await.map_err(failed)?);
            Ok(Some((holder(&file, &content), content)))
        }
        Err(error) => Err(failed(error)),
    }
}

/// The bytes of the owner file; none if there is no file.
async fn read_owner(server: &Server, directory: &FileHandle, name: &str) -> Result<Vec<u8>, NfsError> {
    let mut bytes = Vec::new();
    let Some((file, _)) = server.lookup(directory, name.as_bytes()).await? else { return Ok(bytes) };
    match server.read(&file, 0, LOOK, |data| bytes.extend_from_slice(data)).await {
        Err(error) if error.is(Status::STALE) || error.is(Status::NOENT) => Ok(Vec::new()),
        other => other.map(|_| bytes),
    }
}

fn holder(file: &str, content: &Content) -> Holder {
    let record = match content {
        Content::Record(record) => Some(record.clone()),
        _ => None,
    };
    Holder { file: file.to_owned(), record }
}

/// Whether the session, the client or the open file is gone.
fn is_gone(error: &NfsError) -> bool {
    error
        .status()
        .is_some_and(|status| matches!(judge(status), Verdict::Session | Verdict::State) || status == STALE_CLIENT)
}

impl FileLock {
    /// Takes the lock, tells `done`, keeps it until it is told to stop, and gives it back.
    pub fn run(self, done: &mpsc::Sender<Result<(), LockError>>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime needs only memory and an event descriptor");
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let options = Options {
                name: self.name.clone(),
                credential: self.credential.clone(),
                answer_within: ANSWER_WITHIN,
                user_timeout: self.timing.flight,
                most_reply: MOST_REPLY,
                gate: Some(self.tenure.clone()),
            };
            let server = Server::bare(Client::new(self.address, options));
            server.set_patience(Some(PATIENCE));
            let taken = tokio::select! {
                taken = self.acquire(&server) => taken,
                () = self.stop.notified() => return,
            };
            match taken {
                Ok(holding) => {
                    let _ = done.send(Ok(()));
                    server.set_patience(None);
                    self.keep(&server, holding).await;
                }
                Err(error) => {
                    let _ = done.send(Err(error));
                }
            }
        });
    }

    fn failed(&self, cause: NfsError) -> LockError {
        LockError::Nfs { file: owner_file(self.fileid), cause }
    }

    /// Becomes known to the server, by the same name as before, and makes a session for the keeper.
    async fn join(&self, server: &Server, member: &mut Member) -> Result<(), NfsError> {
        let client = server.client();
        let before = member.client;
        for session in [member.data.take(), member.session.take()].into_iter().flatten() {
            // The server may know it no more.
            let _ = establish::destroy_session(client, &session, server.how()).await;
        }
        let mut attempts = 0;
        loop {
            let known = establish::exchange_id(client, &member.identity, server.how()).await?;
            if !known.is_confirmed || known.client != member.client {
                (member.client, member.sequence) = (known.client, known.sequence);
            }
            match self.make_session(server, member).await {
                Ok((id, channel)) => {
                    member.may_reclaim |= member.client != before;
                    (member.session, member.data, member.channel) = (Some(id), None, channel);
                    server.use_session(Some(Session::new(id, 0, channel, StateId::ANONYMOUS)));
                    return Ok(());
                }
                // The server was started again just now.
                Err(error) if error.is(STALE_CLIENT) && attempts < ATTEMPTS => {}
                // It counts otherwise: only one who begins anew is counted anew. What was open is opened again.
                Err(error) if error.is(SEQ_MISORDERED) && attempts < ATTEMPTS => member.identity.begin_anew(),
                Err(error) => return Err(error),
            }
            attempts += 1;
        }
    }

    async fn make_session(&self, server: &Server, member: &mut Member) -> Result<(SessionId, Channel), NfsError> {
        let at = (member.client, member.sequence);
        let made = establish::create_session(server.client(), at, server.how()).await?;
        member.sequence = member.sequence.wrapping_add(1);
        Ok(made)
    }

    /// Hands the data a session.
    async fn grant(&self, server: &Server, member: &mut Member, state: &StateId) -> Result<(), NfsError> {
        if let Some(old) = member.data.take() {
            // It may have gone already.
            let _ = establish::destroy_session(server.client(), &old, server.how()).await;
        }
        let (id, channel) = self.make_session(server, member).await?;
        member.data = Some(id);
        self.grants.grant(id, channel, state.current());
        Ok(())
    }

    fn open<'a>(&'a self, client: u64, claim: Claim<'a>) -> Open<'a> {
        Open { client, owner: b"disk", access: ACCESS_BOTH, deny: DENY_WRITE, claim }
    }

    async fn acquire(&self, server: &Server) -> Result<Holding, LockError> {
        let channel = Channel { most_request: 0, most_response: 0, slots: 0 };
        let identity = Identity::new();
        let mut member =
            Member { identity, client: 0, sequence: 0, session: None, data: None, channel, may_reclaim: false };
        let mut state = None;
        let taken = self.take(server, &mut member, &mut state).await;
        match (taken, state) {
            (Ok((record, owner_file, owner_state)), Some(state)) => {
                Ok(Holding { member, state, record, owner_file, owner_state })
            }
            (taken, state) => {
                // Nobody is to wait until the lease of somebody has ended who has nothing.
                let _ = tokio::time::timeout(PATIENCE, self.retire(server, &member, state)).await;
                Err(taken.err().unwrap_or(LockError::Contended))
            }
        }
    }

    /// Gets the share, says who has it, and hands the data a session. `share` is what is open then, also if the rest fails.
    async fn take(
        &self,
        server: &Server,
        member: &mut Member,
        share: &mut Option<StateId>,
    ) -> Result<(Record, FileHandle, StateId), LockError> {
        let failed = |cause| self.failed(cause);
        self.join(server, member).await.map_err(failed)?;
        complete(server).await.map_err(failed)?;
        member.may_reclaim = false;
        let state = *share.insert(self.wait_for_share(server, member).await?);
        let sent = boot_time();
        let record = Record {
            counter: 0,
            incarnation: random(),
            process: self.owner.process,
            since: wall_clock(),
            host: Record::fitting(&self.owner.host),
        };
        let (owner_file, owner_state) = self.write_owner(server, member.client, &record).await.map_err(failed)?;
        // What was open may have gone meanwhile: only what is open now counts.
        let status = server.test(&state.current()).await.map_err(failed)?;
        if status != Status(0) {
            return Err(failed(NfsError::Refused { procedure: "TEST_STATEID", status }));
        }
        self.grant(server, member, &state).await.map_err(failed)?;
        self.tenure.renewed(sent, &self.timing);
        Ok((record, owner_file, owner_state))
    }

    /// Opens the data and denies writing to others; waits for a holder who gives no sign of life until the server's lease has ended his.
    async fn wait_for_share(&self, server: &Server, member: &mut Member) -> Result<StateId, LockError> {
        let name = owner_file(self.fileid);
        let deadline = Instant::now() + self.timing.stale * 2 + Duration::from_secs(10);
        let mut first = None;
        loop {
            let error = match server.open(&self.open(member.client, Claim::File(&self.data))).await {
                Ok((state, _)) => return Ok(state),
                Err(error) => error,
            };
            if is_gone(&error) {
                self.join(server, member).await.map_err(|cause| self.failed(cause))?;
                complete(server).await.map_err(|cause| self.failed(cause))?;
            } else if error.is(SHARE_DENIED) {
                let bytes = read_owner(server, &self.directory, &name).await.map_err(|cause| self.failed(cause))?;
                let content = Content::of(&bytes);
                let holder = holder(&name, &content);
                let known = first.get_or_insert_with(|| {
                    let longest = self.timing.stale;
                    tracing::warn!("{name}: waiting for {longest:?} at most whether {holder} gives a sign of life");
                    content.clone()
                });
                if holder.record.is_some() && *known != content {
                    return Err(LockError::Held(holder));
                }
                if Instant::now() >= deadline {
                    return Err(match holder.record {
                        Some(_) => LockError::Held(holder),
                        None => LockError::Denied(name),
                    });
                }
            } else if error.status().is_none_or(|status| judge(status) != Verdict::Busy) || Instant::now() >= deadline {
                return Err(self.failed(error));
            }
            tokio::time::sleep(TRY_EVERY).await;
        }
    }

    /// Opens the owner file, which is made if there is none, and writes the record. Writes of others who have lost the lock do not reach it: what
    /// they had open has ended.
    async fn write_owner(
        &self,
        server: &Server,
        client: u64,
        record: &Record,
    ) -> Result<(FileHandle, StateId), NfsError> {
        let name = owner_file(self.fileid);
        let (state, file) = server.open(&self.open(client, Claim::Name(&self.directory, &name))).await?;
        server.write_as(&file, &state.current(), &record.encode()).await?;
        Ok((file, state))
    }

    async fn keep(&self, server: &Server, mut holding: Holding) {
        let mut pause = self.timing.renew;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.grants.complaint() => {}
                () = self.stop.notified() => break,
            }
            let renewed = tokio::select! {
                renewed = self.renew(server, &mut holding) => renewed,
                () = self.stop.notified() => break,
            };
            pause = match renewed {
                Ok(()) => self.timing.renew,
                Err(Loss::Unsure(error)) => {
                    tracing::debug!(%error, disk = self.fileid, "not renewed");
                    PAUSE.min(self.timing.renew)
                }
                Err(Loss::Gone(cause)) => {
                    tracing::warn!(disk = self.fileid, cause, "the lock is lost");
                    self.tenure.lose(&cause);
                    break;
                }
            };
        }
        server.set_patience(Some(PATIENCE));
        let _ = tokio::time::timeout(PATIENCE, self.leave(server, &holding)).await;
    }

    /// Renews the server's lease, and makes sure that the data are still open.
    async fn renew(&self, server: &Server, holding: &mut Holding) -> Result<(), Loss> {
        let sent = boot_time();
        match server.test(&holding.state.current()).await {
            Ok(Status(0)) => {}
            Ok(_) => return self.regain(server, holding).await,
            Err(error) if is_gone(&error) => return self.regain(server, holding).await,
            Err(error) => return Err(Loss::Unsure(error)),
        }
        self.tenure.renewed(sent, &self.timing);
        holding.record.counter += 1;
        let record = holding.record.encode();
        // For people, and for those who wait: the lock does not depend on it.
        if let Err(error) = server.write_as(&holding.owner_file, &holding.owner_state.current(), &record).await {
            match self.write_owner(server, holding.member.client, &holding.record).await {
                Ok((file, state)) => (holding.owner_file, holding.owner_state) = (file, state),
                Err(_) => tracing::warn!(%error, "the owner file {} is not written", owner_file(self.fileid)),
            }
        }
        if self.grants.is_wanting() {
            self.grant(server, &mut holding.member, &holding.state).await.map_err(Loss::Unsure)?;
        }
        Ok(())
    }

    /// The server has lost the session or the open file: gets them back, if nobody else has had the disk since.
    async fn regain(&self, server: &Server, holding: &mut Holding) -> Result<(), Loss> {
        self.tenure.close();
        self.join(server, &mut holding.member).await.map_err(Loss::Unsure)?;
        let sent = boot_time();
        let client = holding.member.client;
        let mut is_open = false;
        if holding.member.may_reclaim {
            match server.open(&self.open(client, Claim::Previous(&self.data))).await {
                Ok((state, _)) => (holding.state, is_open) = (state, true),
                Err(error) => tracing::debug!(%error, "the open file cannot be claimed"),
            }
        } else {
            is_open = server.test(&holding.state.current()).await.map_err(Loss::Unsure)? == Status(0);
        }
        complete(server).await.map_err(Loss::Unsure)?;
        holding.member.may_reclaim = false;
        if !is_open {
            match server.open(&self.open(client, Claim::File(&self.data))).await {
                Ok((state, _)) => holding.state = state,
                Err(error) if error.is(SHARE_DENIED) => {
                    self.is_ours(server, holding, false).await?;
                    return Err(Loss::Unsure(error));
                }
                Err(error) => return Err(Loss::Unsure(error)),
            }
        }
        self.is_ours(server, holding, true).await?;
        holding.record.counter += 1;
        let written = self.write_owner(server, client, &holding.record).await.map_err(Loss::Unsure)?;
        (holding.owner_file, holding.owner_state) = written;
        self.grant(server, &mut holding.member, &holding.state).await.map_err(Loss::Unsure)?;
        self.tenure.renewed(sent, &self.timing);
        tracing::info!(disk = self.fileid, "the lock was lost on the server, and had again before anybody else");
        Ok(())
    }

    /// Whether the owner file still names this holder. Where he has the data open (`held`) it says for certain; else it may be about to change.
    async fn is_ours(&self, server: &Server, holding: &Holding, held: bool) -> Result<(), Loss> {
        let name = owner_file(self.fileid);
        let bytes = read_owner(server, &self.directory, &name).await.map_err(Loss::Unsure)?;
        match Content::of(&bytes) {
            Content::Record(record) if record.incarnation == holding.record.incarnation => Ok(()),
            content @ Content::Record(_) => {
                let holder = holder(&name, &content);
                Err(Loss::Gone(format!("the lock was not renewed in time and was taken by {holder}")))
            }
            _ if held => Err(Loss::Gone(format!("the owner file {name} is gone: somebody else has had the disk"))),
            _ => Ok(()),
        }
    }

    /// Gives everything back, as far as it is still there.
    async fn leave(&self, server: &Server, holding: &Holding) {
        let member = &holding.member;
        // Nobody writes any more. What was written and not flushed goes along as far as it can.
        if self.tenure.state() == State::Open {
            let _ = server.commit(&self.data, false).await;
            let name = owner_file(self.fileid);
            if let Err(error) = server.remove(&self.directory, name.as_bytes(), true).await {
                tracing::debug!(%error, name, "not removed");
            }
        }
        let _ = server.close(&holding.owner_file, &holding.owner_state.current()).await;
        self.retire(server, member, Some(holding.state)).await;
    }

    /// Gives the share back, if there is one, and makes the server forget the client.
    async fn retire(&self, server: &Server, member: &Member, share: Option<StateId>) {
        let client = server.client();
        if let Some(state) = share
            && let Err(error) = server.close(&self.data, &state.current()).await
            && self.tenure.state() != State::Lost
        {
            let after = self.timing.stale;
            tracing::warn!(%error, "the lock could not be given back; it is free after {after:?}");
        }
        for session in [member.data, member.session].into_iter().flatten() {
            let _ = establish::destroy_session(client, &session, server.how()).await;
        }
        let _ = establish::destroy_client(client, member.client, server.how()).await;
    }
}

/// RECLAIM_COMPLETE in the keeper's session.
async fn complete(server: &Server) -> Result<(), NfsError> {
    match server.given() {
        Some(session) => complete_reclaim(server.client(), &session, server.how()).await,
        None => Ok(()),
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system gives random numbers");
    bytes
}

/// Seconds since 1970, for people.
fn wall_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_closes_and_the_last_byte_dies_well_before_the_lease_ends() {
        for seconds in [4, 10, 60, 90, 100_000] {
            let lease = Duration::from_secs(seconds);
            let timing = timing(lease).expect("long enough");
            assert!(timing.renew * 2 <= timing.gate && timing.gate + timing.flight < lease, "{timing:?}");
            assert!(timing.margin() >= Duration::from_secs(1), "{timing:?}");
        }
        assert!(timing(Duration::from_secs(3)).is_err());
    }
}
