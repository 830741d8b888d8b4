//! Owns: a target that runs in this process, and initiators' paths to its unit whose commands can go astray.
//! Promises: commands are carried out one after another, in the order in which they arrive; a fault hits one command of one path.
//! Must not know: what commands mean.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::MemoryDisk;
use crate::{
    Command, DataBuffer, Disk, DiskOptions, Geometry, Identity, Lun, NexusId, PathAnswer, PathData, PathError,
    ReservationStore, ScsiPath, ShortBuffer, StoreError, Target, TaskAttribute, TransportId,
};

/// What happens to one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathFault {
    /// It is carried out, and its answer is lost.
    AnswerLost,
    /// It is lost on its way.
    CommandLost,
    /// It is carried out only when [`TestPath::deliver`] says; its sender does not wait.
    Late,
    /// It is not sent.
    NotSent,
    /// The target answers so, and carries out nothing.
    Answer(PathAnswer),
}

/// A record that nobody reads again.
struct Memory;

impl ReservationStore for Memory {
    fn save<'a>(&'a self, _: &'a [u8]) -> Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

type Work = Box<dyn FnOnce(&Target<MemoryDisk>) + Send>;

/// A target with one unit, a disk in memory, on a thread of its own, until the last path is dropped.
#[derive(Clone)]
pub struct TestTarget {
    work: Sender<Work>,
    nexuses: Arc<AtomicU32>,
}

impl TestTarget {
    /// One with a disk of this geometry and these names, which keeps its reservations.
    pub fn start(geometry: Geometry, identity: Identity) -> TestTarget {
        let target = TestTarget::forgetful(geometry, identity);
        target.with(|target| target.keep_reservations(Lun(0), Rc::new(Memory), None).expect("nothing is restored"));
        target
    }

    /// The same, whose reservations do not survive a loss of its power.
    pub fn forgetful(geometry: Geometry, identity: Identity) -> TestTarget {
        let (work, todo) = mpsc::channel::<Work>();
        std::thread::spawn(move || {
            let target = Target::new();
            target.insert(Lun(0), Disk::new(MemoryDisk::with_identity(geometry, identity), DiskOptions::default()));
            todo.into_iter().for_each(|work| work(&target));
        });
        TestTarget { work, nexuses: Arc::default() }
    }

    /// Does something on the target's thread.
    ///
    /// # Panics
    /// When the target's thread has ended.
    pub fn with<T: Send + 'static>(&self, work: impl FnOnce(&Target<MemoryDisk>) -> T + Send + 'static) -> T {
        let (give, take) = mpsc::channel();
        let work: Work = Box::new(move |target| {
            // Whoever asked may have gone.
            let _ = give.send(work(target));
        });
        self.work.send(work).expect("the target runs");
        take.recv().expect("the target answers")
    }

    /// A new initiator port with a path to the unit.
    pub fn path(&self) -> Arc<TestPath> {
        let number = self.nexuses.fetch_add(1, Ordering::Relaxed) + 1;
        let initiator =
            TransportId::Iscsi { name: format!("iqn.test:{number}"), isid: Some([0, 0, 0, 0, 0, number as u8]) };
        self.with(move |target| target.attach(NexusId(number), initiator, 1));
        Arc::new(TestPath {
            target: self.clone(),
            nexus: NexusId(number),
            name: format!("test-path-{number}"),
            faults: Mutex::default(),
            late: Mutex::default(),
            log: Mutex::default(),
        })
    }
}

/// A command that is on its way.
struct Late {
    cdb: Vec<u8>,
    out: Vec<u8>,
    room: usize,
}

/// A path of one initiator port.
pub struct TestPath {
    target: TestTarget,
    nexus: NexusId,
    name: String,
    /// For the next commands with this operation code.
    faults: Mutex<VecDeque<(u8, PathFault)>>,
    late: Mutex<Vec<Late>>,
    /// Operation codes and statuses that were answered.
    log: Mutex<Vec<(u8, u8)>>,
}

impl TestPath {
    /// The next command with this operation code that no earlier fault waits for meets this.
    pub fn fail(&self, operation: u8, fault: PathFault) {
        self.faults.lock().expect("no holder panics").push_back((operation, fault));
    }

    /// Lets the commands that are late arrive. Gives their statuses.
    pub fn deliver(&self) -> Vec<u8> {
        let late = std::mem::take(&mut *self.late.lock().expect("no holder panics"));
        late.into_iter().map(|command| self.carry_out(command).0.status).collect()
    }

    /// Operation codes and statuses of the answers so far.
    pub fn log(&self) -> Vec<(u8, u8)> {
        self.log.lock().expect("no holder panics").clone()
    }

    /// Number of commands with this operation code that were answered.
    pub fn count(&self, operation: u8) -> usize {
        self.log().iter().filter(|(code, _)| *code == operation).count()
    }

    fn fault(&self, operation: u8) -> Option<PathFault> {
        let mut faults = self.faults.lock().expect("no holder panics");
        let nth = faults.iter().position(|(code, _)| *code == operation)?;
        faults.remove(nth).map(|(_, fault)| fault)
    }

    fn carry_out(&self, command: Late) -> (PathAnswer, Vec<u8>) {
        let (nexus, operation) = (self.nexus, command.cdb[0]);
        let (answer, data) = self.target.with(move |target| {
            let (out, into) = (DataBuffer::from_bytes(&command.out), DataBuffer::zeroed(command.room, 512));
            let command = Command {
                nexus,
                lun: Some(Lun(0)),
                tag: 0,
                attribute: TaskAttribute::Simple,
                short_buffer: ShortBuffer::Truncate,
                cdb: &command.cdb,
                data_out: &out,
                data_in: &into,
            };
            let completion = at_once(target.execute(&command));
            let sense = completion.sense.map(|sense| sense.as_bytes().to_vec()).unwrap_or_default();
            let transferred = completion.transferred as usize;
            (PathAnswer { status: completion.status as u8, sense, transferred }, into.to_vec())
        });
        self.log.lock().expect("no holder panics").push((operation, answer.status));
        (answer, data)
    }
}

impl ScsiPath for TestPath {
    fn name(&self) -> &str {
        &self.name
    }

    fn execute(&self, cdb: &[u8], data: PathData<'_>, _: Duration) -> Result<PathAnswer, PathError> {
        let (out, room) = match &data {
            PathData::None => (Vec::new(), 0),
            PathData::In(into) => (Vec::new(), into.len()),
            PathData::Out(from) => (from.to_vec(), 0),
        };
        let command = Late { cdb: cdb.to_vec(), out, room };
        let unknown = || Err(PathError::Unknown("nobody answers".to_owned()));
        match self.fault(cdb[0]) {
            Some(PathFault::NotSent) => return Err(PathError::NotSent("the path is down".to_owned())),
            Some(PathFault::Answer(answer)) => return Ok(answer),
            Some(PathFault::CommandLost) => return unknown(),
            Some(PathFault::Late) => {
                self.late.lock().expect("no holder panics").push(command);
                return unknown();
            }
            Some(PathFault::AnswerLost) => {
                self.carry_out(command);
                return unknown();
            }
            None => {}
        }
        let (answer, bytes) = self.carry_out(command);
        if let PathData::In(into) = data {
            into.copy_from_slice(&bytes);
        }
        Ok(answer)
    }

    fn max_transfer(&self) -> usize {
        1 << 20
    }

    fn settled(&self) -> bool {
        // What is late never arrives.
        self.late.lock().expect("no holder panics").clear();
        true
    }

    fn end(&self) -> bool {
        self.settled()
    }
}

/// A disk in memory never waits.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return value;
        }
        std::thread::yield_now();
    }
}
