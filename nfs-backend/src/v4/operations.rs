//! Owns: the operations of NFSv4.1 (RFC 8881, 18) on files, as calls of a server with the same forms as those of NFSv3.
//! Promises: replies are checked against what was asked for; what changes something is done once, whatever connections it takes.
//! Must not know: locks, disks.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::attributes::{Mask, OF_FILE, OF_SERVER, OF_SPACE, SIZE, Values};
use super::calls::{Ask, Reply, expect, operation};
use super::grants::Grants;
use super::server::{Granted, Own, Sessions};
use super::session::Session;
use super::states::{ACCESS_BOTH, Claim, DENY_WRITE, Open, StateId, read_opened};
use crate::error::{NfsError, Status};
use crate::nfs3::{Attributes, Committed, FileHandle, FsInfo, FsStat, MAX_HANDLE_V4, Stability, Written};
use crate::rpc::{Client, Sending};
use crate::xdr::{Reader, Writer, XdrError};

/// Bytes of a request or reply around its data, at most.
const AROUND: u32 = 1024;
/// Longest target of a symbolic link.
const MAX_LINK: usize = 1024;
/// NF4LNK.
const LINK: u32 = 5;

/// An NFSv4.1 server, and how long its answers are waited for.
pub struct Server {
    client: Client,
    sessions: Sessions,
    /// How long a call may take. `None`: as long as the client lives.
    patience: Cell<Option<Duration>>,
}

const fn read_only(name: &'static str, operations: u32) -> Ask {
    Ask { name, operations, keep: false }
}

const fn changing(name: &'static str, operations: u32) -> Ask {
    Ask { name, operations, keep: true }
}

fn put_handle(to: &mut Vec<u8>, handle: &FileHandle) {
    to.put_u32(operation::PUTFH);
    to.put_opaque(handle.as_bytes());
}

impl Server {
    /// Calls by `client` in sessions of its own, each of which may take `patience`.
    pub fn new(client: Client, patience: Option<Duration>) -> Self {
        Self { client, sessions: Sessions::Own(Own::new()), patience: Cell::new(patience) }
    }

    /// Calls by `client` in the sessions, and on the open file, of a lock.
    pub(crate) fn granted(client: Client, grants: Arc<Grants>) -> Self {
        Self { client, sessions: Sessions::Granted(Granted::new(grants)), patience: Cell::new(None) }
    }

    /// Calls in sessions that [`Server::use_session`] says.
    pub(super) fn bare(client: Client) -> Self {
        Self { client, sessions: Sessions::Given(RefCell::new(None)), patience: Cell::new(None) }
    }

    /// From now on calls go by this session.
    pub(super) fn use_session(&self, session: Option<Rc<Session>>) {
        if let Sessions::Given(current) = &self.sessions {
            *current.borrow_mut() = session;
        }
    }

    /// The session that calls go by.
    pub(super) fn given(&self) -> Option<Rc<Session>> {
        match &self.sessions {
            Sessions::Given(current) => current.borrow().clone(),
            _ => None,
        }
    }

    /// How long calls may take from now on.
    pub(super) fn set_patience(&self, patience: Option<Duration>) {
        self.patience.set(patience);
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    pub(super) fn how(&self) -> Sending {
        let deadline = self.patience.get().map(|patience| Instant::now() + patience);
        Sending { repeat: true, gated: false, recovery: false, deadline }
    }

    /// Operations on one file.
    async fn on(
        &self,
        ask: Ask,
        how: Sending,
        file: &FileHandle,
        mut build: impl FnMut(&mut Vec<u8>, &Session),
    ) -> Result<Reply<'_>, NfsError> {
        let build = |to: &mut Vec<u8>, session: &Session| {
            put_handle(to, file);
            build(to, session);
        };
        self.ask(Ask { operations: ask.operations + 1, ..ask }, how, build).await
    }

    /// The server's root.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn root(&self) -> Result<FileHandle, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::PUTROOTFH);
            to.put_u32(operation::GETFH);
        };
        let reply = self.ask(read_only("PUTROOTFH", 2), self.how(), build).await?;
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::PUTROOTFH)?;
            read_handle(&mut reader)
        };
        parse().map_err(NfsError::nonsense("PUTROOTFH"))
    }

    async fn values(&self, file: &FileHandle, asked: Mask) -> Result<Values, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::GETATTR);
            asked.write(to);
        };
        let reply = self.on(read_only("GETATTR", 1), self.how(), file, build).await?;
        read_attributes(&mut reply.results(), asked)
    }

    /// Attributes of a file. An owner or group that the server names by text is `u32::MAX`.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn attributes(&self, file: &FileHandle) -> Result<Attributes, NfsError> {
        self.values(file, OF_FILE).await?.of_file().map_err(NfsError::nonsense("GETATTR"))
    }

    /// Limits of the server.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn limits(&self, root: &FileHandle) -> Result<FsInfo, NfsError> {
        const UNKNOWN: u64 = 64 << 10;
        let mut session = (0, 0);
        let build = |to: &mut Vec<u8>, current: &Session| {
            session = (current.channel().most_response, current.channel().most_request);
            to.put_u32(operation::GETATTR);
            OF_SERVER.write(to);
        };
        let reply = self.on(read_only("GETATTR", 1), self.how(), root, build).await?;
        let values = read_attributes(&mut reply.results(), OF_SERVER)?;
        let most = |limit: Option<u64>, of_session: u32| {
            u32::try_from(limit.unwrap_or(UNKNOWN)).unwrap_or(u32::MAX).min(of_session - AROUND)
        };
        let (most_read, most_write) = (most(values.most_read, session.0), most(values.most_write, session.1));
        Ok(FsInfo { most_read, most_write, most_file: u64::MAX })
    }

    /// How long the server keeps what is open for a client that is silent (lease_time, RFC 8881, 5.8.1.11).
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn lease(&self, root: &FileHandle) -> Result<Duration, NfsError> {
        let lease = self.values(root, OF_SERVER).await?.lease;
        lease.map(|seconds| Duration::from_secs(seconds.into())).ok_or_else(|| NfsError::Nonsense {
            procedure: "GETATTR",
            cause: "the server does not say how long its lease is".into(),
        })
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn space(&self, root: &FileHandle) -> Result<FsStat, NfsError> {
        let values = self.values(root, OF_SPACE).await?;
        Ok(FsStat { total: values.total, free: values.free, available: values.available })
    }

    /// The file of a name; `None` if there is none.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn lookup(
        &self,
        directory: &FileHandle,
        name: &[u8],
    ) -> Result<Option<(FileHandle, Option<Attributes>)>, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::LOOKUP);
            to.put_opaque(name);
            to.put_u32(operation::GETFH);
            to.put_u32(operation::GETATTR);
            OF_FILE.write(to);
        };
        let reply = match self.on(read_only("LOOKUP", 3), self.how(), directory, build).await {
            Err(error) if error.is(Status::NOENT) => return Ok(None),
            other => other?,
        };
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::PUTFH)?;
            expect(&mut reader, operation::LOOKUP)?;
            let handle = read_handle(&mut reader)?;
            Ok((handle, Some(read_values(&mut reader, OF_FILE)?.of_file()?)))
        };
        parse().map(Some).map_err(NfsError::nonsense("LOOKUP"))
    }

    /// Reads at most `length` bytes at `position` and hands them to `sink`. Gives their number, and whether the file ends there.
    ///
    /// # Errors
    /// [`NfsError`]; `Nonsense` for more bytes than were asked for.
    pub async fn read(
        &self,
        file: &FileHandle,
        position: u64,
        length: u32,
        sink: impl FnOnce(&[u8]),
    ) -> Result<(u32, bool), NfsError> {
        let mut wanted = length;
        let build = |to: &mut Vec<u8>, session: &Session| {
            wanted = length.min(session.channel().most_response - AROUND);
            to.put_u32(operation::READ);
            session.state().write(to);
            to.put_u64(position);
            to.put_u32(wanted);
        };
        let reply = self.on(read_only("READ", 1), self.how(), file, build).await?;
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::PUTFH)?;
            expect(&mut reader, operation::READ)?;
            Ok((reader.bool()?, reader.opaque(wanted as usize)?))
        };
        let (is_end, data) = parse().map_err(NfsError::nonsense("READ"))?;
        if data.is_empty() && !is_end && length > 0 {
            return Err(NfsError::Nonsense { procedure: "READ", cause: "no bytes, and yet not the end".into() });
        }
        sink(data);
        Ok((data.len() as u32, is_end))
    }

    /// Writes `data` at `position`.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn write(
        &self,
        file: &FileHandle,
        position: u64,
        data: &[u8],
        stability: Stability,
        (gated, recovery): (bool, bool),
    ) -> Result<Written, NfsError> {
        let length = data.len() as u32;
        let build = |to: &mut Vec<u8>, session: &Session| put_write(to, session.state(), position, stability, data);
        let reply = self.on(changing("WRITE", 1), Sending { gated, recovery, ..self.how() }, file, build).await?;
        read_written(&mut reply.results(), length, stability)
    }

    /// Makes what was written to a file durable.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn commit(&self, file: &FileHandle, recovery: bool) -> Result<Committed, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::COMMIT);
            to.put_u64(0);
            to.put_u32(0);
        };
        let reply = self.on(changing("COMMIT", 1), Sending { recovery, ..self.how() }, file, build).await?;
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::PUTFH)?;
            expect(&mut reader, operation::COMMIT)?;
            reader.array()
        };
        Ok(Committed { verifier: parse().map_err(NfsError::nonsense("COMMIT"))? })
    }

    /// Makes a file of `size` bytes without content. `None`: there is such a file.
    ///
    /// # Errors
    /// [`NfsError`]: it may be there then, of another size.
    pub async fn create(&self, directory: &FileHandle, name: &str, size: u64) -> Result<Option<FileHandle>, NfsError> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).expect("the system gives random numbers");
        let (verifier, owner) = (*random.first_chunk().expect("longer than a verifier"), &random[8..]);
        let claim = Claim::New(directory, name, verifier);
        let open = Open { client: 0, owner, access: ACCESS_BOTH, deny: DENY_WRITE, claim };
        let (state, handle) = match self.open(&open).await {
            Err(error) if error.is(Status::EXIST) => return Ok(None),
            other => other?,
        };
        let sized = self.set_size(&handle, &state, size).await;
        self.close(&handle, &state).await?;
        sized.map(|()| Some(handle))
    }

    async fn set_size(&self, file: &FileHandle, state: &StateId, size: u64) -> Result<(), NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::SETATTR);
            state.write(to);
            Mask::of(&[SIZE]).write(to);
            to.put_opaque(&size.to_be_bytes());
        };
        self.on(changing("SETATTR", 1), self.how(), file, build).await.map(drop)
    }

    /// Removes a name; `false`: there was none. Sent only while the gate is open if it is `gated`.
    ///
    /// # Errors
    /// [`NfsError`]; after `Unknown` the name may go yet.
    pub async fn remove(&self, directory: &FileHandle, name: &[u8], gated: bool) -> Result<bool, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::REMOVE);
            to.put_opaque(name);
        };
        match self.on(changing("REMOVE", 1), Sending { gated, ..self.how() }, directory, build).await {
            Err(error) if error.is(Status::NOENT) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Makes a symbolic link; `false`: the name is there already.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn make_link(&self, directory: &FileHandle, name: &str, target: &str) -> Result<bool, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::CREATE);
            to.put_u32(LINK);
            to.put_opaque(target.as_bytes());
            to.put_opaque(name.as_bytes());
            Mask::of(&[]).write(to);
            to.put_opaque(b"");
        };
        match self.on(changing("CREATE", 1), self.how(), directory, build).await {
            Err(error) if error.is(Status::EXIST) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// The target of a symbolic link; `None`: there is no such name.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn link_target(&self, directory: &FileHandle, name: &str) -> Result<Option<Vec<u8>>, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::LOOKUP);
            to.put_opaque(name.as_bytes());
            to.put_u32(operation::READLINK);
        };
        let reply = match self.on(read_only("READLINK", 2), self.how(), directory, build).await {
            Err(error) if error.is(Status::NOENT) => return Ok(None),
            other => other?,
        };
        let mut reader = reply.results();
        let mut parse = || {
            [operation::PUTFH, operation::LOOKUP, operation::READLINK]
                .iter()
                .try_for_each(|operation| expect(&mut reader, *operation))?;
            Ok(reader.opaque(MAX_LINK)?.to_vec())
        };
        parse().map(Some).map_err(NfsError::nonsense("READLINK"))
    }

    /// Opens a file: its state, and its handle.
    pub(super) async fn open(&self, open: &Open<'_>) -> Result<(StateId, FileHandle), NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::OPEN);
            open.write(to);
            to.put_u32(operation::GETFH);
        };
        let reply = self.on(changing("OPEN", 2), self.how(), open.handle(), build).await?;
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::PUTFH)?;
            expect(&mut reader, operation::OPEN)?;
            Ok((read_opened(&mut reader)?, read_handle(&mut reader)?))
        };
        parse().map_err(NfsError::nonsense("OPEN"))
    }

    /// Gives an open file back.
    pub(super) async fn close(&self, file: &FileHandle, state: &StateId) -> Result<(), NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::CLOSE);
            to.put_u32(0);
            state.write(to);
        };
        self.on(changing("CLOSE", 1), self.how(), file, build).await.map(drop)
    }

    /// The status of a state.
    pub(super) async fn test(&self, state: &StateId) -> Result<Status, NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| {
            to.put_u32(operation::TEST_STATEID);
            to.put_u32(1);
            state.write(to);
        };
        let reply = self.ask(read_only("TEST_STATEID", 1), self.how(), build).await?;
        let mut reader = reply.results();
        let mut parse = || {
            expect(&mut reader, operation::TEST_STATEID)?;
            match reader.u32()? {
                1 => Ok(Status(reader.u32()?)),
                other => Err(XdrError::Value(other)),
            }
        };
        parse().map_err(NfsError::nonsense("TEST_STATEID"))
    }

    /// Writes a few bytes at the start of a file that is open as `state`, durably.
    pub(super) async fn write_as(&self, file: &FileHandle, state: &StateId, bytes: &[u8]) -> Result<(), NfsError> {
        let build = |to: &mut Vec<u8>, _: &Session| put_write(to, state, 0, Stability::FileSync, bytes);
        let length = bytes.len() as u32;
        let reply = self.on(changing("WRITE", 1), self.how(), file, build).await?;
        match read_written(&mut reply.results(), length, Stability::FileSync)?.count {
            count if count == length => Ok(()),
            count => {
                let cause = format!("a record of {length} bytes of which {count} are written");
                Err(NfsError::Nonsense { procedure: "WRITE", cause })
            }
        }
    }
}

fn put_write(to: &mut Vec<u8>, state: &StateId, position: u64, stability: Stability, data: &[u8]) {
    to.put_u32(operation::WRITE);
    state.write(to);
    to.put_u64(position);
    to.put_u32(if stability == Stability::FileSync { 2 } else { 0 });
    to.put_opaque(data);
}

fn read_written(reader: &mut Reader<'_>, length: u32, stability: Stability) -> Result<Written, NfsError> {
    let mut parse = || {
        expect(reader, operation::PUTFH)?;
        expect(reader, operation::WRITE)?;
        Ok((reader.u32()?, reader.u32()?, reader.array()?))
    };
    let (count, committed, verifier) = parse().map_err(NfsError::nonsense("WRITE"))?;
    let nonsense = |cause: String| Err(NfsError::Nonsense { procedure: "WRITE", cause });
    if count > length || (count == 0 && length > 0) || committed > 2 {
        return nonsense(format!("{count} of {length} bytes written"));
    }
    if stability == Stability::FileSync && committed != 2 {
        return nonsense("less durable than asked for".into());
    }
    Ok(Written { count, is_durable: committed == 2, verifier })
}

/// The results of PUTFH and GETATTR.
fn read_attributes(reader: &mut Reader<'_>, asked: Mask) -> Result<Values, NfsError> {
    let mut parse = || {
        expect(reader, operation::PUTFH)?;
        read_values(reader, asked)
    };
    parse().map_err(NfsError::nonsense("GETATTR"))
}

/// The result of GETFH.
fn read_handle(reader: &mut Reader<'_>) -> Result<FileHandle, XdrError> {
    expect(reader, operation::GETFH)?;
    FileHandle::new(reader.opaque(MAX_HANDLE_V4)?)
}

/// The result of GETATTR.
fn read_values(reader: &mut Reader<'_>, asked: Mask) -> Result<Values, XdrError> {
    expect(reader, operation::GETATTR)?;
    Values::read(reader, asked)
}
