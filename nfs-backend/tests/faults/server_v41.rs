//! Owns: an NFSv4.1 server in memory that does what a test tells it to do wrong.
//! Promises: a request of a slot is carried out once, however often it comes; what is open is lost with a restart, unless it is claimed in grace;
//! what is written under a state that is none is refused.
//! Must not know: the client.

use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use nfs_backend::xdr::{Reader, Writer, XdrError};

use super::faulty::{Fault, Faulty, Plan, Service};

pub const CLOSE: u32 = 4;
pub const COMMIT: u32 = 5;
pub const OPEN: u32 = 18;
pub const READ: u32 = 25;
pub const REMOVE: u32 = 28;
pub const WRITE: u32 = 38;
pub const TEST_STATEID: u32 = 55;
/// Seconds that the server says its lease has. It ends only when a test says so.
pub const LEASE: u32 = 4;
/// How long what was open before a restart may be claimed.
const GRACE: Duration = Duration::from_secs(2);
const ROOT: u64 = 1;
const SLOTS: u32 = 12;
const BAD_SESSION: u32 = 10052;

#[derive(Clone, Default)]
struct File {
    data: Vec<u8>,
    durable: Vec<u8>,
    verifier: Option<[u8; 8]>,
    link: Option<Vec<u8>>,
}

struct Client {
    owner: Vec<u8>,
    verifier: [u8; 8],
    confirmed: bool,
    sequence: u32,
}

#[derive(Clone, Default)]
struct Slot {
    sequence: u32,
    reply: Option<Vec<u8>>,
}

struct Session {
    client: u64,
    slots: Vec<Slot>,
}

#[derive(Clone)]
struct Opened {
    client: u64,
    owner: Vec<u8>,
    file: u64,
    access: u32,
    deny: u32,
}

struct State {
    files: BTreeMap<u64, File>,
    names: BTreeMap<Vec<u8>, u64>,
    clients: BTreeMap<u64, Client>,
    sessions: BTreeMap<[u8; 16], Session>,
    opened: BTreeMap<[u8; 12], Opened>,
    /// What was open before the restart, and may be claimed for some time.
    grace_until: Instant,
    before: Vec<(Vec<u8>, Opened)>,
    next: u64,
    boots: u64,
    calls: u64,
    plan: Plan,
    done: BTreeMap<u32, u64>,
    replayed: u64,
    /// Owners of clients that are told to come later, and until when.
    kept_away: (Vec<Vec<u8>>, Instant),
}

/// The server. It ends when it is dropped.
pub struct TestServer(Faulty<State>);

impl TestServer {
    pub fn start() -> TestServer {
        let state = State {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            clients: BTreeMap::new(),
            sessions: BTreeMap::new(),
            opened: BTreeMap::new(),
            grace_until: Instant::now(),
            before: Vec::new(),
            next: ROOT,
            boots: 1,
            calls: 0,
            plan: Box::new(|_, _| Fault::None),
            done: BTreeMap::new(),
            replayed: 0,
            kept_away: (Vec::new(), Instant::now()),
        };
        TestServer(Faulty::start("127.0.0.1:0", state))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state()
    }

    pub fn url(&self, name: &str) -> String {
        format!("nfs://127.0.0.1:{}/{name}?version=4.1", self.0.address.port())
    }

    /// Decides by the operation that a request is about and the number of the request.
    pub fn plan(&self, plan: impl FnMut(u32, u64) -> Fault + Send + 'static) {
        self.state().plan = Box::new(plan);
    }

    pub fn put(&self, name: &str, content: &[u8]) {
        let file = File { data: content.to_vec(), durable: content.to_vec(), ..File::default() };
        self.state().add(name.as_bytes(), file);
    }

    /// How often an operation was carried out.
    pub fn done(&self, operation: u32) -> u64 {
        self.state().done.get(&operation).copied().unwrap_or(0)
    }

    /// Requests that were answered from memory.
    pub fn replayed(&self) -> u64 {
        self.state().replayed
    }

    pub fn restart(&self, grace: bool) {
        self.0.restart(|state| state.restart_with(grace));
    }

    /// All leases are over: clients, sessions and what they had open are gone. Those who had something open are not let in again for so long.
    pub fn expire(&self, keep_away: Duration) {
        let mut state = self.state();
        let holders: Vec<_> = state.opened.values().map(|opened| opened.client).collect();
        let owners = holders.iter().filter_map(|client| state.clients.get(client).map(|client| client.owner.clone()));
        state.kept_away = (owners.collect(), Instant::now() + keep_away);
        state.clients.clear();
        state.sessions.clear();
        state.opened.clear();
    }

    /// What is there, links not counted.
    pub fn names(&self) -> Vec<String> {
        let state = self.state();
        let names = state.names.iter().filter(|(_, file)| state.files[file].link.is_none());
        names.map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
    }

    /// Clients that are known, files that are open.
    pub fn known(&self) -> (usize, usize) {
        let state = self.state();
        (state.clients.len(), state.opened.len())
    }

    pub fn durable(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        state.names.get(name.as_bytes()).map(|number| state.files[number].durable.clone()).unwrap_or_default()
    }
}

impl Service for State {
    fn fault(&mut self, _: u32, _: u32, arguments: Reader<'_>) -> Fault {
        self.calls += 1;
        (self.plan)(first_operation(arguments).unwrap_or(0), self.calls)
    }

    fn restart(&mut self) {
        self.restart_with(true);
    }

    fn results(&mut self, _: u32, _: u32, arguments: Reader<'_>, status: Option<u32>) -> Vec<u8> {
        self.compound(arguments, status).unwrap_or_else(|_| words(&[10036, 0, 0]))
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The first operation of a request behind SEQUENCE and PUTFH: what it is about.
fn first_operation(mut arguments: Reader<'_>) -> Result<u32, XdrError> {
    arguments.opaque(64)?;
    let (_minor, count) = (arguments.u32()?, arguments.u32()?);
    for _ in 0..count {
        match arguments.u32()? {
            53 => drop(arguments.array::<32>()?),
            22 => drop(arguments.opaque(128)?),
            operation => return Ok(operation),
        }
    }
    Ok(0)
}

impl State {
    /// Starts anew; with `grace` what was open may be claimed for some time.
    fn restart_with(&mut self, grace: bool) {
        self.boots += 1;
        self.files.values_mut().for_each(|file| file.data = file.durable.clone());
        let opened = std::mem::take(&mut self.opened);
        self.before.clear();
        self.grace_until = Instant::now() + GRACE;
        if grace {
            let named = |opened: Opened| self.clients.get(&opened.client).map(|client| (client.owner.clone(), opened));
            self.before = opened.into_values().filter_map(named).collect();
        }
        self.clients.clear();
        self.sessions.clear();
    }

    fn add(&mut self, name: &[u8], file: File) -> u64 {
        self.next += 1;
        self.files.insert(self.next, file);
        self.names.insert(name.into(), self.next);
        self.next
    }

    /// One request: with `status` the last operation fails, SEQUENCE if it is about the session.
    fn compound(&mut self, mut arguments: Reader<'_>, status: Option<u32>) -> Result<Vec<u8>, XdrError> {
        let tag = arguments.opaque(64)?;
        let (minor, count) = (arguments.u32()?, arguments.u32()?);
        if minor != 1 || !tag.is_empty() {
            return Ok(words(&[10021, 0, 0]));
        }
        let mut peek = arguments;
        if peek.u32()? != 53 {
            return self.without_session(arguments);
        }
        arguments = peek;
        let id: [u8; 16] = arguments.array()?;
        let (sequence, slot, _highest, _keep) =
            (arguments.u32()?, arguments.u32()?, arguments.u32()?, arguments.bool()?);
        let refused = |status| Ok(words(&[status, 0, 1, 53, status]));
        let Some(session) = self.sessions.get(&id) else { return refused(BAD_SESSION) };
        let client = session.client;
        let Some(known) = session.slots.get(slot as usize) else { return refused(10053) };
        if sequence == known.sequence
            && let Some(reply) = known.reply.clone()
        {
            self.replayed += 1;
            return Ok(reply);
        }
        if sequence != known.sequence.wrapping_add(1) {
            return refused(10063);
        }
        if status == Some(BAD_SESSION) {
            self.sessions.remove(&id);
            return refused(BAD_SESSION);
        }
        let mut results = words(&[53, 0]);
        results.extend_from_slice(&id);
        results.extend(words(&[sequence, slot, SLOTS - 1, SLOTS - 1, 0]));
        let (mut handle, mut done, mut outcome) = (0, 1, 0);
        for nth in 1..count {
            let operation = arguments.u32()?;
            done += 1;
            results.put_u32(operation);
            let forced = status.filter(|_| nth + 1 == count);
            let mut one = Vec::new();
            outcome = match forced {
                Some(status) => status,
                None => self.carry_out(operation, client, &mut handle, &mut arguments, &mut one)?,
            };
            results.put_u32(outcome);
            if outcome != 0 {
                break;
            }
            *self.done.entry(operation).or_default() += 1;
            results.extend(one);
        }
        let reply = [words(&[outcome, 0, done]), results].concat();
        if let Some(session) = self.sessions.get_mut(&id) {
            session.slots[slot as usize] = Slot { sequence, reply: Some(reply.clone()) };
        }
        Ok(reply)
    }

    fn without_session(&mut self, mut arguments: Reader<'_>) -> Result<Vec<u8>, XdrError> {
        let operation = arguments.u32()?;
        let mut to = words(&[0, 0, 1, operation, 0]);
        let fail = |status| Ok(words(&[status, 0, 1, operation, status]));
        match operation {
            42 => {
                let verifier = arguments.array()?;
                let owner = arguments.opaque(1024)?.to_vec();
                if self.kept_away.0.contains(&owner) && Instant::now() < self.kept_away.1 {
                    return fail(10008);
                }
                let known = self.clients.iter().find(|(_, client)| client.owner == owner).map(|(id, _)| *id);
                if let Some(id) = known.filter(|id| self.clients[id].verifier == verifier) {
                    to.put_u64(id);
                    to.put_u32(self.clients[&id].sequence);
                    to.put_u32(if self.clients[&id].confirmed { 0x8001_0000 } else { 0x0001_0000 });
                } else {
                    if let Some(id) = known {
                        self.forget(id);
                    }
                    self.next += 1;
                    let id = self.boots << 32 | self.next;
                    self.clients.insert(id, Client { owner, verifier, confirmed: false, sequence: 1 });
                    to.put_u64(id);
                    to.put_u32(1);
                    to.put_u32(0x0001_0000);
                }
                to.put_u32(0);
            }
            43 => {
                let (id, sequence) = (arguments.u64()?, arguments.u32()?);
                let Some(client) = self.clients.get_mut(&id) else { return fail(10022) };
                // A session that is asked for a second time is the same one.
                if sequence.wrapping_add(1) != client.sequence && sequence != client.sequence {
                    return fail(10063);
                }
                (client.confirmed, client.sequence) = (true, sequence.wrapping_add(1));
                let session: [u8; 16] = [id.to_be_bytes(), (self.boots << 32 | u64::from(sequence)).to_be_bytes()]
                    .concat()
                    .try_into()
                    .unwrap();
                let fresh = || Session { client: id, slots: vec![Slot::default(); SLOTS as usize] };
                self.sessions.entry(session).or_insert_with(fresh);
                to.extend_from_slice(&session);
                to.extend(words(&[sequence, 0, 0, 1 << 20, 1 << 20, 4096, 16, SLOTS, 0]));
                to.extend(words(&[0, 4096, 4096, 0, 2, 1, 0]));
            }
            44 => {
                if self.sessions.remove(&arguments.array()?).is_none() {
                    return fail(BAD_SESSION);
                }
            }
            57 => {
                let id = arguments.u64()?;
                if self.sessions.values().any(|session| session.client == id) {
                    return fail(10074);
                }
                self.forget(id);
            }
            _ => return fail(10071),
        }
        Ok(to)
    }

    fn forget(&mut self, client: u64) {
        self.clients.remove(&client);
        self.sessions.retain(|_, session| session.client != client);
        self.opened.retain(|_, opened| opened.client != client);
    }

    /// Whether a state allows a client to write to a file.
    fn check_write(&self, other: &[u8; 12], client: u64, file: u64) -> u32 {
        match self.opened.get(other) {
            Some(opened) if opened.client == client && opened.file == file => 0,
            Some(_) => 10025,
            None if *other != [0; 12] => 10025,
            None if self.opened.values().any(|opened| opened.file == file && opened.deny & 2 != 0) => 10012,
            None => 0,
        }
    }

    fn open(
        &mut self,
        client: u64,
        at: u64,
        arguments: &mut Reader<'_>,
    ) -> Result<Result<([u8; 12], u64), u32>, XdrError> {
        let _sequence = arguments.u32()?;
        let (access, deny) = (arguments.u32()? & 3, arguments.u32()?);
        arguments.u64()?;
        let owner = arguments.opaque(64)?.to_vec();
        let creates = arguments.u32()? == 1;
        let mut verifier = None;
        if creates {
            if arguments.u32()? == 3 {
                verifier = Some(arguments.array()?);
            }
            (0..arguments.u32()?).try_for_each(|_| arguments.u32().map(drop))?;
            arguments.opaque(64)?;
        }
        let claim = arguments.u32()?;
        let file = match claim {
            0 => {
                let name = arguments.opaque(255)?;
                match self.names.get(name).copied() {
                    Some(known) if verifier.is_some() && self.files[&known].verifier != verifier => return Ok(Err(17)),
                    Some(known) => known,
                    None if creates => self.add(name, File { verifier, ..File::default() }),
                    None => return Ok(Err(2)),
                }
            }
            1 => {
                let name = self.clients.get(&client).map(|client| client.owner.clone()).unwrap_or_default();
                let claimed = self.before.iter().position(|(owner, opened)| *owner == name && opened.file == at);
                let Some(claimed) = claimed.filter(|_| Instant::now() < self.grace_until) else {
                    return Ok(Err(10033));
                };
                self.before.remove(claimed);
                at
            }
            _ => at,
        };
        if claim != 1 && Instant::now() < self.grace_until && self.before.iter().any(|(_, opened)| opened.file == file)
        {
            return Ok(Err(10013));
        }
        let other = self.opened.values().any(|opened| {
            opened.file == file
                && (opened.client != client || opened.owner != owner)
                && (opened.deny & access != 0 || deny & opened.access != 0)
        });
        if other {
            return Ok(Err(10015));
        }
        let same = |opened: &Opened| opened.client == client && opened.owner == owner && opened.file == file;
        let known = self.opened.iter().find(|(_, opened)| same(opened)).map(|(other, _)| *other);
        let other = known.unwrap_or_else(|| {
            self.next += 1;
            let mut other = [0; 12];
            other[..4].copy_from_slice(&(self.boots as u32).to_be_bytes());
            other[4..].copy_from_slice(&self.next.to_be_bytes());
            other
        });
        self.opened.insert(other, Opened { client, owner, file, access, deny });
        Ok(Ok((other, file)))
    }

    fn carry_out(
        &mut self,
        operation: u32,
        client: u64,
        handle: &mut u64,
        arguments: &mut Reader<'_>,
        to: &mut Vec<u8>,
    ) -> Result<u32, XdrError> {
        match operation {
            24 => *handle = ROOT,
            22 => {
                let Ok(number) = arguments.opaque(128)?.try_into().map(u64::from_be_bytes) else { return Ok(10001) };
                if number != ROOT && !self.files.contains_key(&number) {
                    return Ok(70);
                }
                *handle = number;
            }
            10 => to.put_opaque(&handle.to_be_bytes()),
            15 => match self.names.get(arguments.opaque(255)?) {
                Some(found) => *handle = *found,
                None => return Ok(2),
            },
            9 => self.attributes(*handle, arguments, to)?,
            OPEN => match self.open(client, *handle, arguments)? {
                Err(status) => return Ok(status),
                Ok((other, file)) => {
                    *handle = file;
                    to.put_u32(1);
                    to.extend_from_slice(&other);
                    to.put_bool(true);
                    to.put_u64(0);
                    to.put_u64(0);
                    to.extend(words(&[4, 0, 3, 0]));
                }
            },
            CLOSE => {
                arguments.array::<8>()?;
                let other: [u8; 12] = arguments.array()?;
                if self.opened.remove(&other).is_none() {
                    return Ok(10025);
                }
                to.put_u32(0);
                to.extend_from_slice(&other);
            }
            READ => {
                arguments.array::<16>()?;
                let (position, length) = (arguments.u64()? as usize, arguments.u32()? as usize);
                let Some(file) = self.files.get(handle) else { return Ok(21) };
                let from = position.min(file.data.len());
                let until = (position + length).min(file.data.len()).max(from);
                to.put_bool(until == file.data.len());
                to.put_opaque(&file.data[from..until]);
            }
            WRITE => {
                arguments.u32()?;
                let other: [u8; 12] = arguments.array()?;
                let (position, stable) = (arguments.u64()? as usize, arguments.u32()?);
                let data = arguments.opaque(1 << 20)?;
                match self.check_write(&other, client, *handle) {
                    0 => {}
                    status => return Ok(status),
                }
                let Some(file) = self.files.get_mut(handle) else { return Ok(21) };
                let end = position + data.len();
                file.data.resize(file.data.len().max(end), 0);
                file.data[position..end].copy_from_slice(data);
                if stable == 2 {
                    file.durable.resize(file.data.len(), 0);
                    file.durable[position..end].copy_from_slice(data);
                }
                to.put_u32(data.len() as u32);
                to.put_u32(stable);
                to.extend_from_slice(&self.boots.to_be_bytes());
            }
            COMMIT => {
                arguments.array::<12>()?;
                let Some(file) = self.files.get_mut(handle) else { return Ok(21) };
                file.durable = file.data.clone();
                to.extend_from_slice(&self.boots.to_be_bytes());
            }
            34 => {
                arguments.array::<16>()?;
                (0..arguments.u32()?).try_for_each(|_| arguments.u32().map(drop))?;
                let Ok(size) = arguments.opaque(64)?.try_into().map(u64::from_be_bytes) else { return Ok(22) };
                let Some(file) = self.files.get_mut(handle) else { return Ok(21) };
                file.data.resize(size as usize, 0);
                file.durable.resize(size as usize, 0);
                to.put_u32(0);
            }
            REMOVE => {
                let Some(gone) = self.names.remove(arguments.opaque(255)?) else { return Ok(2) };
                self.files.remove(&gone);
                to.extend(words(&[1, 0, 0, 0, 0]));
            }
            6 => {
                arguments.u32()?;
                let link = Some(arguments.opaque(1024)?.to_vec());
                let name = arguments.opaque(255)?;
                if self.names.contains_key(name) {
                    return Ok(17);
                }
                *handle = self.add(name, File { link, ..File::default() });
                (0..arguments.u32()?).try_for_each(|_| arguments.u32().map(drop))?;
                arguments.opaque(64)?;
                to.extend(words(&[1, 0, 0, 0, 0, 0]));
            }
            27 => match self.files.get(handle).and_then(|file| file.link.as_ref()) {
                Some(link) => to.put_opaque(link),
                None => return Ok(22),
            },
            TEST_STATEID => {
                let count = arguments.u32()?;
                to.put_u32(count);
                for _ in 0..count {
                    arguments.u32()?;
                    let known = self.opened.contains_key(&arguments.array::<12>()?);
                    to.put_u32(if known { 0 } else { 10025 });
                }
            }
            58 => {
                arguments.bool()?;
                let owner = self.clients.get(&client).map(|client| client.owner.clone()).unwrap_or_default();
                self.before.retain(|(before, _)| *before != owner);
            }
            _ => return Ok(10044),
        }
        Ok(0)
    }

    fn attributes(&self, number: u64, arguments: &mut Reader<'_>, to: &mut Vec<u8>) -> Result<(), XdrError> {
        let mut asked = [0; 2];
        for nth in 0..arguments.u32()? as usize {
            let word = arguments.u32()?;
            asked[nth.min(1)] |= word;
        }
        let file = self.files.get(&number);
        let size = file.map_or(4096, |file| file.data.len() as u64);
        let kind = file.map_or(2, |file| if file.link.is_some() { 5 } else { 1 });
        let mut list = Vec::new();
        let mut mask = [0u32; 2];
        for attribute in [1, 4, 10, 20, 30, 31, 42, 43, 44, 45u32] {
            if asked[attribute as usize / 32] & 1 << (attribute % 32) == 0 {
                continue;
            }
            mask[attribute as usize / 32] |= 1 << (attribute % 32);
            match attribute {
                1 => list.put_u32(kind),
                4 | 45 => list.put_u64(size),
                10 => list.put_u32(LEASE),
                20 => list.put_u64(number),
                30 | 31 => list.put_u64(65536),
                _ => list.put_u64(u64::from(attribute)),
            }
        }
        to.put_u32(2);
        mask.iter().for_each(|word| to.put_u32(*word));
        to.put_opaque(&list);
        Ok(())
    }
}
