//! Owns: an NFSv3 server in memory that does what a test tells it to do wrong.
//! Promises: unstable writes are lost at a restart, as a server with a cache loses them; it keeps no cache of replies: what comes twice is done twice.
//! Must not know: the client.

use std::collections::BTreeMap;
use std::sync::MutexGuard;

use nfs_backend::xdr::{Reader, Writer, XdrError};

use super::faulty::{Fault, Faulty, Plan, Service};

pub const LOOKUP: u32 = 3;
pub const READ: u32 = 6;
pub const WRITE: u32 = 7;
pub const CREATE: u32 = 8;
pub const SYMLINK: u32 = 10;
pub const REMOVE: u32 = 12;
pub const COMMIT: u32 = 21;
const ROOT: u64 = 1;

#[derive(Clone, Default)]
struct File {
    /// What a READ gives.
    data: Vec<u8>,
    /// What is there after a restart.
    durable: Vec<u8>,
    created_by: Option<[u8; 8]>,
    changed: u32,
}

struct State {
    files: BTreeMap<u64, File>,
    names: BTreeMap<Vec<u8>, u64>,
    /// Symbolic links, by number: name and target. They are not among the names.
    links: BTreeMap<u64, (Vec<u8>, Vec<u8>)>,
    next: u64,
    boots: u64,
    calls: u64,
    /// Bytes that all files may have.
    room: usize,
    plan: Plan,
    seen: BTreeMap<u32, u64>,
}

/// The server. It ends when it is dropped.
pub struct TestServer(Faulty<State>);

impl TestServer {
    pub fn start() -> TestServer {
        Self::start_at("127.0.0.1:0")
    }

    /// At an address.
    pub fn start_at(address: &str) -> TestServer {
        let state = State {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            links: BTreeMap::new(),
            next: ROOT,
            boots: 1,
            calls: 0,
            room: 256 << 20,
            plan: Box::new(|_, _| Fault::None),
            seen: BTreeMap::new(),
        };
        TestServer(Faulty::start(address, state))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state()
    }

    pub fn url(&self, name: &str) -> String {
        format!("nfs://{}/export/{name}?mountport={}", self.0.address, self.0.address.port())
    }

    pub fn plan(&self, plan: impl FnMut(u32, u64) -> Fault + Send + 'static) {
        self.state().plan = Box::new(plan);
    }

    pub fn allow(&self, room: usize) {
        self.state().room = room;
    }

    /// How often a procedure was called.
    pub fn seen(&self, procedure: u32) -> u64 {
        self.state().seen.get(&procedure).copied().unwrap_or(0)
    }

    pub fn restart(&self) {
        self.0.restart(State::restart);
    }

    pub fn put(&self, name: &str, content: &[u8]) {
        let mut state = self.state();
        state.next += 1;
        let number = state.next;
        let file = File { data: content.to_vec(), durable: content.to_vec(), ..File::default() };
        state.files.insert(number, file);
        state.names.insert(name.into(), number);
    }

    pub fn remove(&self, name: &str) {
        let mut state = self.state();
        if let Some(number) = state.names.remove(name.as_bytes()) {
            state.files.remove(&number);
        }
    }

    /// Makes a symbolic link.
    pub fn link(&self, name: &str, target: &str) {
        let mut state = self.state();
        state.next += 1;
        let number = state.next;
        state.links.insert(number, (name.into(), target.into()));
    }

    /// Targets of all symbolic links.
    pub fn links(&self) -> Vec<String> {
        self.state().links.values().map(|(_, target)| String::from_utf8_lossy(target).into_owned()).collect()
    }

    /// What would be there after a restart.
    pub fn durable(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        state.names.get(name.as_bytes()).map(|number| state.files[number].durable.clone()).unwrap_or_default()
    }

    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }
}

impl Service for State {
    fn fault(&mut self, program: u32, procedure: u32, _: Reader<'_>) -> Fault {
        self.calls += 1;
        if program != 100_003 {
            return Fault::None;
        }
        *self.seen.entry(procedure).or_default() += 1;
        (self.plan)(procedure, self.calls)
    }

    fn restart(&mut self) {
        self.boots += 1;
        self.files.values_mut().for_each(|file| file.data = file.durable.clone());
    }

    fn results(&mut self, program: u32, procedure: u32, arguments: Reader<'_>, status: Option<u32>) -> Vec<u8> {
        match status {
            Some(status) => with_status(procedure, status),
            None if program == 100_005 => mount(arguments),
            None => carry_out(self, procedure, arguments).unwrap_or_else(|_| with_status(procedure, 22)),
        }
    }
}

fn mount(mut arguments: Reader<'_>) -> Vec<u8> {
    let mut results = Vec::new();
    match arguments.text(1024) {
        Ok("/export") => {
            results.put_u32(0);
            results.put_opaque(&ROOT.to_be_bytes());
            results.put_u32(1);
            results.put_u32(1);
        }
        _ => results.put_u32(2),
    }
    results
}

/// Results of a procedure that failed: wcc_data or post_op_attr without attributes.
fn with_status(procedure: u32, status: u32) -> Vec<u8> {
    let mut results = Vec::new();
    results.put_u32(status);
    let words = match procedure {
        1 => 0,
        2 | 7 | 8 | 10 | 12 | 21 => 2,
        14 => 4,
        _ => 1,
    };
    (0..words).for_each(|_| results.put_u32(0));
    results
}

fn put_attributes(to: &mut Vec<u8>, number: u64, file: Option<&File>) {
    let kind = if file.is_some() { 1 } else { 2 };
    for word in [kind, 0o644, 1, 0, 0] {
        to.put_u32(word);
    }
    let size = file.map_or(4096, |file| file.data.len() as u64);
    for long in [size, size, 0, 9, number] {
        to.put_u64(long);
    }
    let changed = file.map_or(0, |file| file.changed);
    for word in [0, 0, 0, 0, changed, 0] {
        to.put_u32(word);
    }
}

fn carry_out(state: &mut State, procedure: u32, mut arguments: Reader<'_>) -> Result<Vec<u8>, XdrError> {
    let mut to = Vec::new();
    let fail = |status| Ok(with_status(procedure, status));
    if procedure == 0 {
        return Ok(to);
    }
    let Ok(number) = arguments.opaque(64)?.try_into().map(u64::from_be_bytes) else { return fail(10001) };
    if number != ROOT && !state.files.contains_key(&number) && !state.links.contains_key(&number) {
        return fail(70);
    }
    to.put_u32(0);
    match procedure {
        1 => put_attributes(&mut to, number, state.files.get(&number)),
        2 => {
            let mut size = None;
            for field in 0..4 {
                if arguments.bool()? {
                    match field {
                        3 => size = Some(arguments.u64()?),
                        _ => _ = arguments.u32()?,
                    }
                }
            }
            for _ in 0..2 {
                if arguments.u32()? == 2 {
                    arguments.u64()?;
                }
            }
            let Some(file) = state.files.get_mut(&number) else { return fail(22) };
            if arguments.bool()? && arguments.u32()? != file.changed {
                return fail(10002);
            }
            if let Some(size) = size {
                file.data.resize(size as usize, 0);
                file.durable.resize(size as usize, 0);
            }
            file.changed += 1;
            to.put_u64(0);
        }
        LOOKUP => {
            let name = arguments.opaque(255)?;
            let link = state.links.iter().find(|(_, (link, _))| link == name).map(|(number, _)| number);
            let Some(found) = state.names.get(name).or(link) else { return fail(2) };
            to.put_opaque(&found.to_be_bytes());
            to.put_bool(true);
            put_attributes(&mut to, *found, state.files.get(found));
            to.put_bool(false);
        }
        5 => {
            let Some((_, target)) = state.links.get(&number) else { return fail(22) };
            to.put_bool(false);
            to.put_opaque(target);
        }
        SYMLINK => {
            let name = arguments.opaque(255)?.to_vec();
            // No attributes.
            for _ in 0..6 {
                arguments.u32()?;
            }
            let target = arguments.opaque(1024)?.to_vec();
            if state.names.contains_key(&name) || state.links.values().any(|(link, _)| *link == name) {
                return fail(17);
            }
            state.next += 1;
            state.links.insert(state.next, (name, target));
            to.put_bool(false);
            to.put_bool(false);
            to.put_u64(0);
        }
        READ => {
            let (position, length) = (arguments.u64()? as usize, arguments.u32()? as usize);
            let Some(file) = state.files.get(&number) else { return fail(21) };
            let from = position.min(file.data.len());
            let until = (position + length).min(file.data.len()).max(from);
            to.put_bool(false);
            to.put_u32((until - from) as u32);
            to.put_bool(until == file.data.len());
            to.put_opaque(&file.data[from..until]);
        }
        WRITE => {
            let (position, length, stable) = (arguments.u64()? as usize, arguments.u32()? as usize, arguments.u32()?);
            let data = arguments.opaque(1 << 20)?;
            let used: usize = state.files.values().map(|file| file.data.len()).sum();
            let Some(file) = state.files.get_mut(&number) else { return fail(21) };
            let end = position + length;
            if used + end.saturating_sub(file.data.len()) > state.room || data.len() != length {
                return fail(28);
            }
            file.data.resize(file.data.len().max(end), 0);
            file.data[position..end].copy_from_slice(data);
            if stable == 2 {
                file.durable.resize(file.data.len(), 0);
                file.durable[position..end].copy_from_slice(data);
            }
            (file.created_by, file.changed) = (None, file.changed + 1);
            to.put_u64(0);
            to.put_u32(length as u32);
            to.put_u32(stable);
            to.extend_from_slice(&state.boots.to_be_bytes());
        }
        CREATE => {
            let name = arguments.opaque(255)?.to_vec();
            if arguments.u32()? != 2 {
                return fail(10004);
            }
            let verifier: [u8; 8] = arguments.array()?;
            let known = state.names.get(&name).copied();
            let made = match known {
                Some(known) if state.files[&known].created_by == Some(verifier) => known,
                Some(_) => return fail(17),
                None => {
                    state.next += 1;
                    state.files.insert(state.next, File { created_by: Some(verifier), ..File::default() });
                    state.names.insert(name, state.next);
                    state.next
                }
            };
            to.put_bool(true);
            to.put_opaque(&made.to_be_bytes());
            to.put_bool(false);
            to.put_u64(0);
        }
        REMOVE => {
            let Some(gone) = state.names.remove(arguments.opaque(255)?) else { return fail(2) };
            state.files.remove(&gone);
            to.put_u64(0);
        }
        14 => {
            let Some(moved) = state.names.remove(arguments.opaque(255)?) else { return fail(2) };
            arguments.opaque(64)?;
            if let Some(replaced) = state.names.insert(arguments.opaque(255)?.to_vec(), moved) {
                state.files.remove(&replaced);
            }
            to.put_u64(0);
            to.put_u64(0);
        }
        17 => {
            let cookie = arguments.u64()?;
            to.put_bool(false);
            to.put_u64(0);
            // Three at a time, so that a directory takes several calls.
            let rest: Vec<_> = state.names.iter().skip(cookie as usize).collect();
            for (nth, (name, number)) in rest.iter().take(3).enumerate() {
                to.put_bool(true);
                to.put_u64(**number);
                to.put_opaque(name);
                to.put_u64(cookie + nth as u64 + 1);
                to.put_bool(false);
                to.put_bool(true);
                to.put_opaque(&number.to_be_bytes());
            }
            to.put_bool(false);
            to.put_bool(rest.len() <= 3);
        }
        18 => {
            to.put_bool(false);
            for long in [100, 50, 40, 0, 0, 0] {
                to.put_u64(long);
            }
            to.put_u32(0);
        }
        19 => {
            to.put_bool(false);
            for word in [65536, 65536, 1, 65536, 65536, 1, 4096] {
                to.put_u32(word);
            }
            to.put_u64(1 << 40);
            to.put_u64(0);
            to.put_u32(0);
        }
        COMMIT => {
            let Some(file) = state.files.get_mut(&number) else { return fail(21) };
            file.durable = file.data.clone();
            to.put_u64(0);
            to.extend_from_slice(&state.boots.to_be_bytes());
        }
        _ => return fail(10004),
    }
    Ok(to)
}
