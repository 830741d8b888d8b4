//! Owns: what a worker of a host does with its operations, and what it tells the oracles of their answers.
//! Promises: before an operation begins the oracles know what it may do; what was acknowledged is told as certain.
//! Must not know: what befalls hosts, how verdicts are made.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::error::{FsError, FsErrorKind};
use engine::file::{Mover, OpenFile, OpenMode};
use engine::format::dirent::ObjectRef;
use engine::volume::{RenameFlags, Stat, Volume};
use futures_util::future::join;

use super::data;
use super::names::{Done, Event, Id};
use super::plan::{Operation, Part, Place, Target};
use super::run::{FileId, Host, Life, Run};
use super::stamp::{self, SECTOR};

/// Tries to open what somebody may hold who is gone, and the pause between them: as long as a takeover takes.
const OPEN_TRIES: u32 = 10;
const OPEN_PAUSE: Duration = Duration::from_millis(900);

/// An object for the history of names.
pub fn id_of(stat: &Stat) -> Id {
    (stat.object.fd.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stat.attributes.born_ns as u64) & ((1 << 61) - 1)
}

/// An object for the oracle of data.
pub fn file_id(stat: &Stat) -> FileId {
    (stat.object.fd.get(), stat.attributes.born_ns)
}

impl Run {
    /// Directory and name of a place.
    pub fn at(&self, place: Place) -> (ObjectRef, [u8; 1]) {
        (self.fresh.directories[usize::from(place % 2)], [b'a' + place])
    }
}

/// What an operation may do to names, if anything.
fn possible(operation: &Operation) -> Option<Event> {
    match operation {
        Operation::Create(place) | Operation::MakeDirectory(place) => Some(Event::Created(*place, None)),
        Operation::Unlink(place) | Operation::RemoveDirectory(place) => Some(Event::Removed(*place)),
        Operation::Rename(from, to) => Some(Event::Renamed(*from, *to)),
        Operation::Look(_) | Operation::Use { .. } => None,
    }
}

/// What an answer says about the names.
enum Told {
    Certain(Event),
    /// Refused without effect.
    Nothing,
    /// It may have been done.
    Doubt,
}

/// Carries out the operations of one worker, until they are done or the incarnation is over.
pub async fn work(run: Rc<Run>, host: Rc<Host>, worker: usize) {
    let Some(volume) = host.volume.borrow().clone() else { return };
    loop {
        let nth = host.next[worker].get();
        let Some(step) = host.plan.workers[worker].get(nth).cloned() else { return };
        run.sim.sleep(Duration::from_micros(step.pause_us)).await;
        if host.life.get() != Life::Up {
            return;
        }
        let from = run.sim.now();
        let event = possible(&step.operation);
        *host.at[worker].borrow_mut() = Some((from, step.operation.clone(), event.clone()));
        let told = operate(&run, &host, &volume, &step.operation).await;
        let to = run.sim.now();
        host.at[worker].take();
        host.next[worker].set(nth + 1);
        run.witness.lock().mix(to ^ nth as u64);
        let done = match (told, event) {
            (Told::Certain(event), _) => Some(Done { from, to, certain: true, event }),
            (Told::Doubt, Some(event)) => Some(Done { from, to: u64::MAX, certain: false, event }),
            _ => None,
        };
        run.history.borrow_mut().extend(done);
        if Duration::from_nanos(to - from) > run.longest() {
            run.find(format!("{:?}: {:?} took {} s", host.no(), step.operation, (to - from) / 1_000_000_000));
        }
    }
}

async fn operate(run: &Rc<Run>, host: &Host, volume: &Volume, operation: &Operation) -> Told {
    let (told, error) = match operation {
        Operation::Create(place) => {
            let (directory, name) = run.at(*place);
            let made = volume.create(directory, &name, super::volume::new_file(), None).await.map(|(stat, _)| stat);
            created(run, *place, made)
        }
        Operation::MakeDirectory(place) => {
            let (directory, name) = run.at(*place);
            created(run, *place, volume.make_directory(directory, &name, 0o755, 7, 8).await)
        }
        Operation::Unlink(place) => {
            let (directory, name) = run.at(*place);
            removed(*place, volume.unlink(directory, &name).await.map(drop))
        }
        Operation::RemoveDirectory(place) => {
            let (directory, name) = run.at(*place);
            removed(*place, volume.remove_directory(directory, &name).await.map(drop))
        }
        Operation::Rename(from, to) => {
            let ((directory, name), (other, new)) = (run.at(*from), run.at(*to));
            match volume.rename(directory, &name, other, &new, RenameFlags::default()).await {
                Ok(_) => (Told::Certain(Event::Renamed(*from, *to)), None),
                Err(error) if error.kind() == FsErrorKind::NotFound => (Told::Certain(Event::Missing(*from)), None),
                Err(error) => failed(error),
            }
        }
        Operation::Look(place) => (look(run, host, volume, *place).await.0, None),
        Operation::Use { target, write, parts } => {
            let told = use_file(run, host, volume, *target, *write, parts).await;
            run.line(host.no(), format!("{operation:?}: ended"));
            return told;
        }
    };
    let outcome = match &error {
        None => "done".to_owned(),
        Some(error) => error.to_string(),
    };
    run.line(host.no(), format!("{operation:?}: {outcome}"));
    if let Some(error) = error {
        run.judge(host, &error, &|| format!("{operation:?}"));
    }
    told
}

/// What an error says: refused, or in doubt.
fn failed(error: FsError) -> (Told, Option<FsError>) {
    let told = match error.kind() {
        FsErrorKind::Io | FsErrorKind::Fenced | FsErrorKind::Corrupt => Told::Doubt,
        _ => Told::Nothing,
    };
    (told, Some(error))
}

fn created(run: &Run, place: Place, made: Result<Stat, FsError>) -> (Told, Option<FsError>) {
    match made {
        Ok(stat) => {
            run.file_of(file_id(&stat), 0);
            (Told::Certain(Event::Created(place, Some(id_of(&stat)))), None)
        }
        Err(error) if error.kind() == FsErrorKind::Exists => (Told::Certain(Event::Taken(place)), None),
        Err(error) => failed(error),
    }
}

fn removed(place: Place, gone: Result<(), FsError>) -> (Told, Option<FsError>) {
    match gone {
        Ok(()) => (Told::Certain(Event::Removed(place)), None),
        Err(error) => match error.kind() {
            FsErrorKind::NotFound => (Told::Certain(Event::Missing(place)), None),
            FsErrorKind::IsDirectory | FsErrorKind::NotDirectory => (Told::Certain(Event::Taken(place)), None),
            _ => failed(error),
        },
    }
}

async fn look(run: &Run, host: &Host, volume: &Volume, place: Place) -> (Told, Option<Stat>) {
    let (directory, name) = run.at(place);
    match volume.lookup(directory, &name).await {
        Ok(stat) => (Told::Certain(Event::Found(place, id_of(&stat))), Some(stat)),
        Err(error) if error.kind() == FsErrorKind::NotFound => (Told::Certain(Event::Missing(place)), None),
        Err(error) => {
            run.judge(host, &error, &|| format!("look-up of {place}"));
            (Told::Nothing, None)
        }
    }
}

async fn use_file(run: &Run, host: &Host, volume: &Volume, target: Target, write: bool, parts: &[Part]) -> Told {
    let (told, stat) = match target {
        Target::Disk(nth) => (Told::Nothing, Some(run.fresh.disks[usize::from(nth)].clone())),
        Target::File(place) => look(run, host, volume, place).await,
    };
    let Some(stat) = stat else { return told };
    let id = file_id(&stat);
    let mode = if write { OpenMode::WRITE } else { OpenMode::READ };
    let file = match open(run, host, volume, &stat, mode).await {
        Some(file) => file,
        None => return told,
    };
    run.file_of(id, 0);
    let no = host.no();
    let exact = write || matches!(target, Target::Disk(_));
    let session = Session { run, host, volume, id, file: &file, exact };
    if write {
        run.files.borrow_mut().get_mut(&id).expect("it is known").opened(no);
        session.check_size();
    }
    let env = host.env.borrow().clone().expect("a mounted host has a clock");
    let mut mover = Mover::new(volume.files().data_luns(), 64 << 10, env.thread_clock());
    for part in parts {
        if host.life.get() != Life::Up {
            break;
        }
        let result = session.part(&mut mover, part).await;
        run.witness.lock().mix(u64::from(result.is_ok()));
        if let Err(error) = result {
            run.line(no, format!("    {part:?}: {error}"));
            run.judge(host, &error, &|| format!("{part:?}"));
        } else {
            run.line(no, format!("    {part:?} of {target:?}"));
        }
    }
    close(run, host, volume, id, file, write).await;
    told
}

/// Opens; while a lock may be that of a host that is gone it is waited for.
async fn open(run: &Run, host: &Host, volume: &Volume, stat: &Stat, mode: OpenMode) -> Option<Arc<OpenFile>> {
    let tries = if run.plan.events.is_empty() { 1 } else { OPEN_TRIES };
    for attempt in 1..=tries {
        match volume.open(stat.object, mode).await {
            Ok(file) => return Some(file),
            Err(error) if error.kind() == FsErrorKind::Busy && attempt < tries && host.life.get() == Life::Up => {
                run.sim.sleep(OPEN_PAUSE).await;
            }
            Err(error) => {
                run.line(host.no(), format!("    open: {error}"));
                run.judge(host, &error, &|| format!("open of {}", stat.object.fd));
                return None;
            }
        }
    }
    None
}

async fn close(run: &Run, host: &Host, volume: &Volume, id: FileId, file: Arc<OpenFile>, write: bool) {
    let closed = volume.close(file).await;
    let no = host.no();
    if let Err(error) = &closed {
        run.line(no, format!("    close: {error}"));
        run.judge(host, error, &|| "close".to_owned());
    }
    if !write {
        return;
    }
    let mut files = run.files.borrow_mut();
    let known = files.get_mut(&id).expect("it is known");
    let Some(count) = known.writers.get_mut(&no) else { return };
    *count -= 1;
    if *count > 0 {
        return;
    }
    known.writers.remove(&no);
    match closed {
        Ok(()) => known.model.flushed(run.sim.now()),
        Err(_) => {
            known.model.in_doubt();
            known.model.crashed();
        }
    }
}

/// A file while it is open.
struct Session<'a> {
    run: &'a Run,
    host: &'a Host,
    volume: &'a Volume,
    id: FileId,
    file: &'a Arc<OpenFile>,
    /// Nobody else changes it: what is read is certain.
    exact: bool,
}

impl Session<'_> {
    fn model<T>(&self, ask: impl FnOnce(&mut super::content::FileModel) -> T) -> T {
        ask(&mut self.run.files.borrow_mut().get_mut(&self.id).expect("it is known").model)
    }

    /// Its lock was taken by another incarnation: what it is told is no promise any more.
    fn is_stale(&self) -> bool {
        let files = self.run.files.borrow();
        let writers = &files[&self.id].writers;
        if self.file.mode() == OpenMode::READ { !writers.is_empty() } else { !writers.contains_key(&self.host.no()) }
    }

    fn is_busy(&self) -> bool {
        self.run.files.borrow()[&self.id].busy.get()
    }

    fn set_busy(&self, busy: bool) {
        self.run.files.borrow()[&self.id].busy.set(busy);
    }

    fn told(&self, result: Result<(), String>) {
        if let Err(wrong) = result {
            self.run.find(format!("{:?}: {wrong}", self.host.no()));
        }
    }

    fn check_size(&self) {
        if !self.is_busy() {
            let (size, now) = (self.file.size(), self.run.sim.now());
            self.told(self.model(|model| model.check_size(size, now)));
        }
    }

    async fn part(&self, mover: &mut Mover, part: &Part) -> Result<(), FsError> {
        if let Part::Rest(ms) = part {
            self.run.sim.sleep(Duration::from_millis((*ms).into())).await;
            return Ok(());
        }
        if let Part::Read { sector, count, by_thread } = *part {
            return self.read(mover, sector, count, by_thread).await;
        }
        // Two workers of one host at one file: what is expected would not be certain.
        if !self.exact || self.file.mode() == OpenMode::READ || self.is_busy() || self.is_stale() {
            return Ok(());
        }
        self.set_busy(true);
        let result = self.change(mover, part).await;
        if self.is_stale() {
            return result;
        }
        self.set_busy(false);
        if result.is_err() && !matches!(part, Part::Flush) {
            self.model(|model| model.in_doubt());
        }
        result
    }

    async fn change(&self, mover: &mut Mover, part: &Part) -> Result<(), FsError> {
        let (files, now) = (self.volume.files(), || self.run.sim.now());
        match *part {
            Part::Write { sector, count, by_thread } => {
                let sectors = sector..sector + count;
                let bytes = self.stamped(sectors.clone());
                let write = self.run.writes.get();
                let offset = u64::from(sector) * SECTOR as u64;
                if by_thread {
                    data::write(&self.run.sim, files, mover, self.file, offset, &bytes).await?;
                } else {
                    data::write_on_actor(files, self.file, offset, &bytes).await?;
                }
                self.acknowledged(|model| model.written(sectors, write, true, now()));
            }
            Part::Flush => {
                self.volume.flush(self.file).await?;
                self.acknowledged(|model| model.flushed(now()));
            }
            Part::Resize(sectors) => {
                let bytes = u64::from(sectors) * SECTOR as u64;
                self.model(|model| model.resized(bytes, false, now()));
                files.set_size(self.file, bytes).await?;
                self.acknowledged(|model| model.resized(bytes, true, now()));
            }
            Part::Punch { sector, count } => {
                let size = (self.file.size() / SECTOR as u64) as u32;
                let sectors = sector.min(size)..(sector + count).min(size);
                self.model(|model| model.cleared(sectors.clone(), false, now()));
                let bytes = u64::from(sectors.start) * SECTOR as u64..u64::from(sectors.end) * SECTOR as u64;
                files.punch(self.file, bytes).await?;
                self.acknowledged(|model| model.cleared(sectors, true, now()));
            }
            Part::Race { sector, count } => return self.race(sector..sector + count).await,
            Part::Read { .. } | Part::Rest(_) => {}
        }
        Ok(())
    }

    /// Writes sectors on the actor and punches them at the same time: one of both comes last, and the late one harms nobody.
    async fn race(&self, sectors: std::ops::Range<u32>) -> Result<(), FsError> {
        let files = self.volume.files();
        let size = (self.file.size() / SECTOR as u64) as u32;
        let sectors = sectors.start.min(size)..sectors.end.min(size);
        let bytes = self.stamped(sectors.clone());
        self.model(|model| model.cleared(sectors.clone(), false, self.run.sim.now()));
        let range = u64::from(sectors.start) * SECTOR as u64..u64::from(sectors.end) * SECTOR as u64;
        let (written, punched) =
            join(data::write_on_actor(files, self.file, range.start, &bytes), files.punch(self.file, range.clone()))
                .await;
        written.and(punched)
    }

    /// The bytes of a new write of these sectors, of which the oracle is told.
    fn stamped(&self, sectors: std::ops::Range<u32>) -> Vec<u8> {
        let write = self.run.writes.get() + 1;
        self.run.writes.set(write);
        let number = self.model(|model| {
            model.begin_write(sectors.clone(), write);
            model.number
        });
        let mut bytes = vec![0; sectors.len() * SECTOR];
        for (nth, piece) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            stamp::fill(piece, number, sectors.start + nth as u32, write);
        }
        bytes
    }

    /// Tells the oracle of what was acknowledged, unless the lock is another host's by now.
    fn acknowledged(&self, tell: impl FnOnce(&mut super::content::FileModel)) {
        if !self.is_stale() {
            self.model(tell);
        }
    }

    async fn read(&self, mover: &mut Mover, sector: u32, count: u32, by_thread: bool) -> Result<(), FsError> {
        let exact = self.exact && !self.is_busy() && !self.is_stale();
        let since = self.run.sim.now();
        let (offset, length) = (u64::from(sector) * SECTOR as u64, count as usize * SECTOR);
        let files = self.volume.files();
        if exact {
            self.set_busy(true);
        }
        let read = if by_thread {
            data::read(&self.run.sim, files, mover, self.file, offset, length).await
        } else {
            files.read(self.file, offset, length).await
        };
        if self.is_stale() && self.exact {
            return read.map(drop);
        }
        if exact {
            self.set_busy(false);
        }
        let bytes = read?;
        let now = self.run.sim.now();
        let since = (!exact).then_some(since);
        if !bytes.is_empty() && bytes.len() < length && !exact {
            self.told(self.model(|model| model.check_size_seen(offset + bytes.len() as u64, since.unwrap_or(0))));
        }
        for (nth, piece) in bytes.chunks_exact(SECTOR).enumerate() {
            let at = sector + nth as u32;
            let result = self.model(|model| model.check(at, stamp::read(piece, model.number, at), since, now));
            if result.is_err() {
                self.told(result);
                break;
            }
        }
        Ok(())
    }
}
