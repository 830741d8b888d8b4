//! Owns: the load generator: a number of requests in flight on one io_uring, for a fixed time.
//! Promises: every transport is loaded by the same code; only where a request goes differs.
//! Must not know: what is compared with what.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use lockd::client::{DirectFile, GrantPiece, Segment};
use tokio_uring::buf::{IoBuf, IoBufMut};
use tokio_uring::fs::File;
use vmfs_core::buf::AlignedBuf;
use vmfs_core::gate::GateState;

use crate::random::Random;

/// What a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads at random places.
    RandomRead,
    /// Writes at random places.
    RandomWrite,
    /// Reads in order, round and round.
    Read,
    /// Writes in order, round and round.
    Write,
    /// Writes in order, once from start to end, and a flush; measured until that has ended.
    WriteOnce,
}

/// A workload.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in the report.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// Bytes of a request.
    pub block: u64,
    /// Requests in flight.
    pub depth: u32,
}

/// The workloads of the report.
pub const WORKLOADS: [Workload; 9] = [
    Workload { name: "randread-4k-qd1", kind: Kind::RandomRead, block: 4096, depth: 1 },
    Workload { name: "randread-4k-qd32", kind: Kind::RandomRead, block: 4096, depth: 32 },
    Workload { name: "randwrite-4k-qd1", kind: Kind::RandomWrite, block: 4096, depth: 1 },
    Workload { name: "randwrite-4k-qd32", kind: Kind::RandomWrite, block: 4096, depth: 32 },
    Workload { name: "read-128k-qd1", kind: Kind::Read, block: 128 << 10, depth: 1 },
    Workload { name: "read-1m-qd4", kind: Kind::Read, block: 1 << 20, depth: 4 },
    Workload { name: "write-1m-qd4", kind: Kind::Write, block: 1 << 20, depth: 4 },
    Workload { name: "thin-first-write-1m", kind: Kind::WriteOnce, block: 1 << 20, depth: 4 },
    Workload { name: "thick-first-write-1m", kind: Kind::WriteOnce, block: 1 << 20, depth: 4 },
];

/// Where requests go.
pub enum Target {
    /// A file or device, opened for direct I/O.
    File(OwnedFd),
    /// A disk of a mount, straight on the LUNs.
    Direct(Box<DirectFile>),
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Requests completed.
    pub requests: u64,
    /// From the first to the last completion.
    pub elapsed: Duration,
}

impl Measured {
    /// This run and another one.
    pub fn and(self, other: Measured) -> Measured {
        Measured { requests: self.requests + other.requests, elapsed: self.elapsed + other.elapsed }
    }

    /// Requests a second.
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }
}

struct Memory(AlignedBuf);

// SAFETY: the buffer's memory is a heap allocation that does not move with the value, and lives as long as it.
unsafe impl IoBuf for Memory {
    fn stable_ptr(&self) -> *const u8 {
        self.0.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.0.len()
    }

    fn bytes_total(&self) -> usize {
        self.0.len()
    }
}

// SAFETY: as above; all of the memory is initialised, and exclusive access comes with the mutable reference.
unsafe impl IoBufMut for Memory {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    unsafe fn set_init(&mut self, _: usize) {}
}

struct Shared {
    target: Target,
    files: Vec<File>,
    workload: Workload,
    size: u64,
    next: Cell<u64>,
    random: RefCell<Random>,
    end: Instant,
    done: Cell<u64>,
}

/// Loads the first `size` bytes of `target` for `time` (`WriteOnce`: until all of it is written and flushed).
pub fn run(target: Target, workload: Workload, size: u64, time: Duration, seed: u64) -> io::Result<Measured> {
    let duplicate = |fd: &OwnedFd| fd.as_fd().try_clone_to_owned();
    let descriptors = match &target {
        Target::File(fd) => vec![duplicate(fd)?],
        Target::Direct(file) => {
            let by_session = || io::Error::other("a LUN is reached by sessions, not by a descriptor");
            let copies = file.luns().map(|lun| duplicate(lun.access.descriptor().ok_or_else(by_session)?));
            copies.collect::<Result<_, _>>()?
        }
    };
    tokio_uring::start(async move {
        let files = descriptors.into_iter().map(|fd| File::from_std(fd.into())).collect();
        let start = Instant::now();
        let shared = Rc::new(Shared {
            target,
            files,
            workload,
            size,
            next: Cell::new(0),
            random: RefCell::new(Random::new(seed)),
            end: start + time,
            done: Cell::new(0),
        });
        let tasks: Vec<_> = (0..workload.depth).map(|_| tokio_uring::spawn(one_in_flight(shared.clone()))).collect();
        for task in tasks {
            task.await.map_err(io::Error::other)??;
        }
        if workload.kind == Kind::WriteOnce {
            match &shared.target {
                Target::File(_) => shared.files[0].sync_data().await?,
                Target::Direct(file) => file.flush().map_err(io::Error::other)?,
            }
        }
        Ok(Measured { requests: shared.done.get(), elapsed: start.elapsed() })
    })
}

impl Shared {
    fn next_offset(&self) -> Option<u64> {
        let blocks = self.size / self.workload.block;
        let nth = match self.workload.kind {
            Kind::RandomRead | Kind::RandomWrite => self.random.borrow_mut().below(blocks),
            Kind::Read | Kind::Write => self.next.replace(self.next.get() + 1) % blocks,
            Kind::WriteOnce => {
                let nth = self.next.replace(self.next.get() + 1);
                return (nth < blocks).then_some(nth * self.workload.block);
            }
        };
        (Instant::now() < self.end).then_some(nth * self.workload.block)
    }

    async fn transfer(&self, file: usize, position: u64, buf: Memory) -> io::Result<Memory> {
        let wanted = buf.0.len();
        let (result, buf) = match self.workload.kind {
            Kind::RandomRead | Kind::Read => self.files[file].read_at(buf, position).await,
            _ => self.files[file].write_at(buf, position).submit().await,
        };
        match result? {
            moved if moved == wanted => Ok(buf),
            moved => Err(io::Error::other(format!("{moved} of {wanted} bytes at {position}"))),
        }
    }

    /// One request of a disk on its LUNs: resolve, ask the gate, move, drop the reference.
    async fn direct(&self, disk: &DirectFile, offset: u64, buf: Memory) -> io::Result<Memory> {
        let length = buf.0.len() as u64;
        loop {
            let mut whole = None;
            let mut unknown = false;
            disk.resolve(offset, length, &mut |segment| match segment {
                Segment::Data { lun, offset, length: part, reference } if part == length => {
                    whole = Some((lun, offset, reference));
                }
                Segment::Unknown { .. } => unknown = true,
                Segment::Data { .. } | Segment::Zero { .. } => {}
            });
            if let Some((lun, position, _reference)) = whole {
                if disk.gate(lun) != GateState::Open {
                    return Err(io::Error::other("the gate is closed"));
                }
                return self.transfer(lun, position, buf).await;
            }
            if unknown {
                disk.load(offset, length).map_err(io::Error::other)?;
            } else {
                self.first_write(disk, offset, length).await?;
                return Ok(buf);
            }
        }
    }

    async fn first_write(&self, disk: &DirectFile, offset: u64, length: u64) -> io::Result<()> {
        if matches!(self.workload.kind, Kind::RandomRead | Kind::Read) {
            return Err(io::Error::other("the disk has holes: it was not filled"));
        }
        let Some(grant) = disk.allocate(offset, length).await.map_err(io::Error::other)? else { return Ok(()) };
        let pieces: Vec<GrantPiece> = grant.pieces().to_vec();
        for piece in pieces {
            let buf = Memory(AlignedBuf::zeroed(piece.length as usize));
            self.transfer(piece.lun, piece.offset, buf).await?;
        }
        grant.filled().map_err(io::Error::other)
    }
}

async fn one_in_flight(shared: Rc<Shared>) -> io::Result<()> {
    let mut buf = Memory(AlignedBuf::zeroed(shared.workload.block as usize));
    buf.0.fill(0x5a);
    while let Some(offset) = shared.next_offset() {
        buf = match &shared.target {
            Target::File(_) => shared.transfer(0, offset, buf).await?,
            Target::Direct(disk) => shared.direct(disk, offset, buf).await?,
        };
        shared.done.set(shared.done.get() + 1);
    }
    Ok(())
}
