//! Owns: the procedures of NFSv3 (RFC 1813, 3.3) as calls of a server.
//! Promises: replies are checked against what was asked for; a server that has no time (JUKEBOX) is asked again; what may not be done
//! twice is not sent twice, or says that it was. Must not know: locks, disks.

use std::time::Duration;

use scsi::DataBuffer;
use tokio::time::{Instant, sleep};

use super::values::{Attributes, FileHandle, FsInfo, FsStat, NewAttributes, Time, Verifier};
use crate::error::{NfsError, Status};
use crate::rpc::message::{self, Verdict};
use crate::rpc::record::Located;
use crate::rpc::{Answer, Call, Client, Procedure, Sending};
use crate::xdr::{Reader, Writer, XdrError};

/// Longest name that is taken from a server.
const MAX_NAME: usize = 255;
/// Pause before a server that had no time is asked again for the first time.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause before a server that had no time is asked again.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Bytes of a directory that are asked for at once.
const DIRECTORY_BYTES: u32 = 32 << 10;

pub(super) const fn nfs(number: u32, name: &'static str) -> Procedure {
    Procedure { program: 100_003, version: 3, number, name }
}

const GETATTR: Procedure = nfs(1, "GETATTR");
const SETATTR: Procedure = nfs(2, "SETATTR");
const LOOKUP: Procedure = nfs(3, "LOOKUP");
const READ: Procedure = nfs(6, "READ");
const WRITE: Procedure = nfs(7, "WRITE");
const CREATE: Procedure = nfs(8, "CREATE");
const REMOVE: Procedure = nfs(12, "REMOVE");
const RENAME: Procedure = nfs(14, "RENAME");
const READDIRPLUS: Procedure = nfs(17, "READDIRPLUS");
const FSSTAT: Procedure = nfs(18, "FSSTAT");
const FSINFO: Procedure = nfs(19, "FSINFO");
const COMMIT: Procedure = nfs(21, "COMMIT");

/// How durable a WRITE has to be before it is answered (stable_how).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Not at all: a COMMIT follows.
    Unstable,
    /// Data and attributes.
    FileSync,
}

/// What a WRITE did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes from the beginning of what was asked.
    pub count: u32,
    /// They are durable already.
    pub is_durable: bool,
    /// Changes when the server may have lost what was not durable.
    pub verifier: Verifier,
}

/// What a COMMIT did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// What was written under this verifier is durable.
    pub verifier: Verifier,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the file.
    pub fileid: u64,
    /// Its name.
    pub name: Vec<u8>,
    /// Its attributes, if the server gave them.
    pub attributes: Option<Attributes>,
    /// Its handle, if the server gave it.
    pub handle: Option<FileHandle>,
}

/// An NFSv3 server, and how long its answers are waited for.
pub struct Server {
    client: Client,
    /// How long a call may take. `None`: as long as the client lives.
    patience: Option<Duration>,
}

/// The results of one reply, its status read.
pub(super) struct Results<'a> {
    answer: Answer<'a>,
    skip: usize,
}

impl Results<'_> {
    pub(super) fn reader(&self) -> Reader<'_> {
        Reader::new(&self.answer.results().rest()[self.skip..])
    }
}

impl Server {
    /// Calls by `client`, each of which may take `patience`.
    pub fn new(client: Client, patience: Option<Duration>) -> Self {
        Self { client, patience }
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    fn sending(&self, deadline: Option<Instant>, repeat: bool, gated: bool, recovery: bool) -> Sending {
        Sending { repeat, gated, recovery, deadline }
    }

    fn deadline(&self) -> Option<Instant> {
        self.patience.map(|patience| Instant::now() + patience)
    }

    /// One call that may be repeated, asked again while the server has no time.
    pub(super) async fn ask(
        &self,
        procedure: Procedure,
        arguments: impl FnMut(&mut Vec<u8>),
        gated: bool,
        recovery: bool,
    ) -> Result<Results<'_>, NfsError> {
        self.ask_by(procedure, arguments, self.sending(self.deadline(), true, gated, recovery)).await
    }

    async fn ask_by(
        &self,
        procedure: Procedure,
        mut arguments: impl FnMut(&mut Vec<u8>),
        how: Sending,
    ) -> Result<Results<'_>, NfsError> {
        self.ask_with(procedure, |call| arguments(call.arguments()), how).await
    }

    async fn ask_with(
        &self,
        procedure: Procedure,
        mut prepare: impl FnMut(&mut Call<'_>),
        how: Sending,
    ) -> Result<Results<'_>, NfsError> {
        let mut pause = SHORTEST_PAUSE;
        loop {
            let mut call = self.client.begin(procedure, how.recovery).await?;
            prepare(&mut call);
            match Self::results(call, how, procedure.name).await {
                Err(error) if error.is(Status::JUKEBOX) && may_ask_again(how, &mut pause).await => {}
                other => return other,
            }
        }
    }

    async fn results<'a>(call: Call<'a>, how: Sending, procedure: &'static str) -> Result<Results<'a>, NfsError> {
        let answer = call.send(how).await?;
        let status = answer.results().u32().map_err(NfsError::nonsense(procedure))?;
        match status {
            0 => Ok(Results { answer, skip: 4 }),
            status => Err(NfsError::Refused { procedure, status: Status(status) }),
        }
    }

    /// Attributes of a file.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn attributes(&self, file: &FileHandle) -> Result<Attributes, NfsError> {
        let results = self.ask(GETATTR, |to| to.put_opaque(file.as_bytes()), false, false).await?;
        Attributes::read(&mut results.reader()).map_err(NfsError::nonsense("GETATTR"))
    }

    /// Sets attributes; with a `guard` only if the file's ctime is that (the server says `NOT_SYNC` otherwise). Sent once: after
    /// [`NfsError::Unknown`] the file may or may not have them.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn set_attributes(
        &self,
        file: &FileHandle,
        new: NewAttributes,
        guard: Option<Time>,
    ) -> Result<(), NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(file.as_bytes());
            new.write(to);
            to.put_bool(guard.is_some());
            if let Some(guard) = guard {
                guard.write(to);
            }
        };
        self.ask_by(SETATTR, arguments, self.sending(self.deadline(), guard.is_none(), false, false)).await.map(drop)
    }

    /// Gives a file another size; what comes in addition reads as zeros. Sent only while the gate is open if it is `gated`; repeated over a new
    /// connection.
    ///
    /// # Errors
    /// [`NfsError`]: the file may have the old or the new size.
    pub async fn set_size(&self, file: &FileHandle, size: u64, gated: bool) -> Result<(), NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(file.as_bytes());
            NewAttributes { mode: None, size: Some(size) }.write(to);
            to.put_bool(false);
        };
        self.ask(SETATTR, arguments, gated, false).await.map(drop)
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
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(directory.as_bytes());
            to.put_opaque(name);
        };
        let results = match self.ask(LOOKUP, arguments, false, false).await {
            Err(error) if error.is(Status::NOENT) => return Ok(None),
            other => other?,
        };
        let mut reader = results.reader();
        let mut found = || Ok((FileHandle::read(&mut reader)?, Attributes::read_optional(&mut reader)?));
        found().map(Some).map_err(NfsError::nonsense("LOOKUP"))
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
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(file.as_bytes());
            to.put_u64(position);
            to.put_u32(length);
        };
        let results = self.ask(READ, arguments, false, false).await?;
        let (data, is_end) = read_results(&mut results.reader(), length).map_err(NfsError::nonsense("READ"))?;
        check_read(data.len(), is_end, length)?;
        sink(data);
        Ok((data.len() as u32, is_end))
    }

    /// Reads at most as many bytes at `position` as `buffer` holds, straight into it. Gives their number, and whether the file ends there. What
    /// else the buffer holds then is not defined, also after an error.
    ///
    /// # Errors
    /// [`NfsError`]; `Nonsense` for more bytes than were asked for.
    pub async fn read_to(
        &self,
        file: &FileHandle,
        position: u64,
        buffer: &DataBuffer,
    ) -> Result<(u32, bool), NfsError> {
        let length = buffer.len() as u32;
        let prepare = |call: &mut Call<'_>| {
            let to = call.arguments();
            to.put_opaque(file.as_bytes());
            to.put_u64(position);
            to.put_u32(length);
            call.land(buffer.clone(), locate_read);
        };
        let how = self.sending(self.deadline(), true, false, false);
        let results = self.ask_with(READ, prepare, how).await?;
        let mut reader = results.reader();
        let read = match results.answer.landed() {
            0 => read_results(&mut reader, length).map(|(data, is_end)| {
                buffer.copy_from(0, data);
                (data.len(), is_end)
            }),
            landed => read_head(&mut reader).and_then(|(count, is_end)| {
                let length = reader.u32()?;
                let is_all = length == count && length as usize == landed;
                if is_all { Ok((landed, is_end)) } else { Err(XdrError::Value(length)) }
            }),
        };
        let (count, is_end) = read.map_err(NfsError::nonsense("READ"))?;
        check_read(count, is_end, length)?;
        Ok((count as u32, is_end))
    }

    /// Writes `data` at `position`; repeated over a new connection, for it writes the same again. The vector is sent from where it is, and is
    /// the same afterwards, or empty after an error.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn write(
        &self,
        file: &FileHandle,
        position: u64,
        data: &mut Vec<u8>,
        stability: Stability,
        (gated, recovery): (bool, bool),
    ) -> Result<Written, NfsError> {
        let how = self.sending(self.deadline(), true, gated, recovery);
        let length = data.len() as u32;
        let mut pause = SHORTEST_PAUSE;
        let answer = loop {
            let mut call = self.client.begin(WRITE, recovery).await?;
            let to = call.arguments();
            to.put_opaque(file.as_bytes());
            to.put_u64(position);
            to.put_u32(length);
            to.put_u32(if stability == Stability::FileSync { 2 } else { 0 });
            to.put_u32(length);
            call.attach(std::mem::take(data));
            let mut answer = call.send(how).await?;
            *data = answer.take_attached();
            match answer.results().u32().map_err(NfsError::nonsense("WRITE"))? {
                0 => break answer,
                status if Status(status) == Status::JUKEBOX => drop(answer),
                status => return Err(NfsError::Refused { procedure: "WRITE", status: Status(status) }),
            }
            if !may_ask_again(how, &mut pause).await {
                return Err(NfsError::Refused { procedure: "WRITE", status: Status::JUKEBOX });
            }
        };
        let results = Results { answer, skip: 4 };
        let mut reader = results.reader();
        let mut parse = || {
            Attributes::read_after(&mut reader)?;
            Ok((reader.u32()?, reader.u32()?, reader.array()?))
        };
        let (count, committed, verifier) = parse().map_err(NfsError::nonsense("WRITE"))?;
        if count > length || (count == 0 && length > 0) || committed > 2 {
            return Err(NfsError::Nonsense { procedure: "WRITE", cause: format!("{count} of {length} bytes written") });
        }
        let is_durable = committed == 2;
        if stability == Stability::FileSync && !is_durable {
            return Err(NfsError::Nonsense { procedure: "WRITE", cause: "less durable than asked for".into() });
        }
        Ok(Written { count, is_durable, verifier })
    }

    /// Makes what was written to a file durable.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn commit(&self, file: &FileHandle, recovery: bool) -> Result<Committed, NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(file.as_bytes());
            to.put_u64(0);
            to.put_u32(0);
        };
        let results = self.ask(COMMIT, arguments, false, recovery).await?;
        let mut reader = results.reader();
        let mut parse = || {
            Attributes::read_after(&mut reader)?;
            reader.array()
        };
        Ok(Committed { verifier: parse().map_err(NfsError::nonsense("COMMIT"))? })
    }

    /// Makes a file by an exclusive CREATE: atomic on the server, and safe to repeat with the same verifier, which has to be random. `None`: there is
    /// such a file, and it was not made with this verifier.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn create_exclusive(
        &self,
        directory: &FileHandle,
        name: &[u8],
        verifier: Verifier,
    ) -> Result<Option<FileHandle>, NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(directory.as_bytes());
            to.put_opaque(name);
            to.put_u32(2);
            to.extend_from_slice(&verifier);
        };
        let results = match self.ask(CREATE, arguments, false, false).await {
            Err(error) if error.is(Status::EXIST) => return Ok(None),
            other => other?,
        };
        let mut reader = results.reader();
        let mut parse = || if reader.bool()? { FileHandle::read(&mut reader).map(Some) } else { Ok(None) };
        if let Some(handle) = parse().map_err(NfsError::nonsense("CREATE"))? {
            return Ok(Some(handle));
        }
        match self.lookup(directory, name).await? {
            Some((handle, _)) => Ok(Some(handle)),
            None => Err(NfsError::Nonsense { procedure: "CREATE", cause: "the file is not there".into() }),
        }
    }

    /// Removes a name; `false`: there was none. Sent once, and only while the gate is open if it is `gated`.
    ///
    /// # Errors
    /// [`NfsError`]; after `Unknown` the name may go yet.
    pub async fn remove(&self, directory: &FileHandle, name: &[u8], gated: bool) -> Result<bool, NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(directory.as_bytes());
            to.put_opaque(name);
        };
        match self.ask_by(REMOVE, arguments, self.sending(self.deadline(), false, gated, false)).await {
            Err(error) if error.is(Status::NOENT) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Gives a file another name, and takes that from any other file. Sent once, and only while the gate is open if it is `gated`.
    ///
    /// # Errors
    /// [`NfsError`]; after `Unknown` it may happen yet.
    pub async fn rename(
        &self,
        (directory, name): (&FileHandle, &[u8]),
        (new_directory, new_name): (&FileHandle, &[u8]),
        gated: bool,
    ) -> Result<(), NfsError> {
        let arguments = |to: &mut Vec<u8>| {
            to.put_opaque(directory.as_bytes());
            to.put_opaque(name);
            to.put_opaque(new_directory.as_bytes());
            to.put_opaque(new_name);
        };
        self.ask_by(RENAME, arguments, self.sending(self.deadline(), false, gated, false)).await.map(drop)
    }

    /// The entries of a directory, at most `most`.
    ///
    /// # Errors
    /// [`NfsError`]; `Nonsense` for a directory that does not end.
    pub async fn entries(&self, directory: &FileHandle, most: usize) -> Result<Vec<Entry>, NfsError> {
        let (mut entries, mut cookie, mut verifier) = (Vec::new(), 0, [0; 8]);
        loop {
            let arguments = |to: &mut Vec<u8>| {
                to.put_opaque(directory.as_bytes());
                to.put_u64(cookie);
                to.extend_from_slice(&verifier);
                to.put_u32(DIRECTORY_BYTES / 4);
                to.put_u32(DIRECTORY_BYTES);
            };
            let results = self.ask(READDIRPLUS, arguments, false, false).await?;
            let before = (entries.len(), cookie);
            let is_end = read_entries(&mut results.reader(), &mut entries, &mut cookie, &mut verifier)
                .map_err(NfsError::nonsense("READDIRPLUS"))?;
            if is_end {
                return Ok(entries);
            }
            if entries.len() > most || (entries.len(), cookie) == before {
                return Err(NfsError::Nonsense {
                    procedure: "READDIRPLUS",
                    cause: "the directory does not end".into(),
                });
            }
        }
    }

    /// Limits of the server.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn limits(&self, root: &FileHandle) -> Result<FsInfo, NfsError> {
        let results = self.ask(FSINFO, |to| to.put_opaque(root.as_bytes()), false, false).await?;
        let mut reader = results.reader();
        let mut parse = || {
            Attributes::read_optional(&mut reader)?;
            let most_read = reader.u32()?;
            skip(&mut reader, 2)?;
            let most_write = reader.u32()?;
            skip(&mut reader, 3)?;
            Ok(FsInfo { most_read, most_write, most_file: reader.u64()? })
        };
        parse().map_err(NfsError::nonsense("FSINFO"))
    }

    /// Space of the file system.
    ///
    /// # Errors
    /// [`NfsError`]
    pub async fn space(&self, root: &FileHandle) -> Result<FsStat, NfsError> {
        let results = self.ask(FSSTAT, |to| to.put_opaque(root.as_bytes()), false, false).await?;
        let mut reader = results.reader();
        let mut parse = || {
            Attributes::read_optional(&mut reader)?;
            Ok(FsStat { total: reader.u64()?, free: reader.u64()?, available: reader.u64()? })
        };
        parse().map_err(NfsError::nonsense("FSSTAT"))
    }
}

/// Waits for the next attempt with a server that has no time. False: there is no time for one.
async fn may_ask_again(how: Sending, pause: &mut Duration) -> bool {
    if how.deadline.is_some_and(|by| Instant::now() + *pause >= by) {
        return false;
    }
    sleep(*pause).await;
    *pause = (*pause * 2).min(LONGEST_PAUSE);
    true
}

/// READ3resok before its data: how many there are, and whether the file ends with them.
fn read_head(reader: &mut Reader<'_>) -> Result<(u32, bool), XdrError> {
    Attributes::read_optional(reader)?;
    Ok((reader.u32()?, reader.bool()?))
}

/// READ3resok, of at most `most` bytes.
fn read_results<'a>(reader: &mut Reader<'a>, most: u32) -> Result<(&'a [u8], bool), XdrError> {
    let (count, is_end) = read_head(reader)?;
    let data = reader.opaque(most as usize)?;
    if data.len() as u64 == u64::from(count) { Ok((data, is_end)) } else { Err(XdrError::Value(count)) }
}

fn check_read(count: usize, is_end: bool, wanted: u32) -> Result<(), NfsError> {
    match count == 0 && !is_end && wanted > 0 {
        true => Err(NfsError::Nonsense { procedure: "READ", cause: "no bytes, and yet not the end".into() }),
        false => Ok(()),
    }
}

/// Bytes of a reply to READ before its data, if attributes come with it and the verifier is empty.
const READ_HEADER: usize = 128;

/// Finds the data in a reply to READ.
fn locate_read(head: &[u8]) -> Located {
    let find = || {
        let Verdict::Accepted(at) = message::verdict(head)? else { return Ok(0..0) };
        let mut reader = Reader::new(&head[at..]);
        if reader.u32()? != 0 {
            return Ok(0..0);
        }
        read_head(&mut reader)?;
        let length = reader.u32()? as usize;
        let start = head.len() - reader.rest().len();
        Ok(start..start.saturating_add(length))
    };
    match find() {
        Ok(range) if range.is_empty() => Located::Nowhere,
        Ok(range) => Located::At(range),
        Err(XdrError::Short) if head.len() < READ_HEADER => Located::Later(READ_HEADER),
        Err(XdrError::Short) => Located::Later(head.len() + READ_HEADER),
        Err(_) => Located::Nowhere,
    }
}

/// Passes over integers that are of no interest.
fn skip(reader: &mut Reader<'_>, integers: usize) -> Result<(), XdrError> {
    (0..integers).try_for_each(|_| reader.u32().map(drop))
}

/// READDIRPLUS3resok. True: the directory ends here.
fn read_entries(
    reader: &mut Reader<'_>,
    entries: &mut Vec<Entry>,
    cookie: &mut u64,
    verifier: &mut Verifier,
) -> Result<bool, XdrError> {
    Attributes::read_optional(reader)?;
    *verifier = reader.array()?;
    while reader.bool()? {
        let (fileid, name) = (reader.u64()?, reader.opaque(MAX_NAME)?.to_vec());
        *cookie = reader.u64()?;
        let attributes = Attributes::read_optional(reader)?;
        let handle = if reader.bool()? { Some(FileHandle::read(reader)?) } else { None };
        entries.push(Entry { fileid, name, attributes, handle });
    }
    reader.bool()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_results_make_a_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), flag in 0u8..2) {
            // Attributes that are likely to be read on.
            let mut likely = vec![0, 0, 0, flag, 0, 0, 0, 1 + flag];
            likely.extend(&bytes);
            for bytes in [&bytes, &likely] {
                let (mut entries, mut cookie, mut verifier) = (Vec::new(), 0, [0; 8]);
                let _ = read_entries(&mut Reader::new(bytes), &mut entries, &mut cookie, &mut verifier);
                prop_assert!(entries.len() <= bytes.len() / 16);
                let accepted = [1u32, 1, 0, 0, 0, 0, 0].map(u32::to_be_bytes).concat();
                match locate_read(&[&accepted, bytes.as_slice()].concat()) {
                    Located::At(range) => prop_assert!(range.start <= accepted.len() + bytes.len() && !range.is_empty()),
                    Located::Later(length) => prop_assert!(length > accepted.len() + bytes.len()),
                    Located::Nowhere => {}
                }
                let _ = Attributes::read_optional(&mut Reader::new(bytes)).is_ok();
                let _ = Attributes::read_after(&mut Reader::new(bytes)).is_ok();
                let _ = FileHandle::read(&mut Reader::new(bytes)).is_ok();
            }
        }
    }
}
