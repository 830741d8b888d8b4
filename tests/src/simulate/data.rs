//! Owns: reads and writes as a thread of a mount does them, with the actor's help where the data path asks for it.
//! Promises: a frozen gate is waited for, a poisoned one is an error.
//! Must not know: what is in the bytes.

use std::time::Duration;

use engine::error::{FsError, FsErrorKind};
use engine::file::{Files, Mover, Need, OpenFile, Stop};
use engine::gate::GateState;
use engine::sim::Sim;

/// How often a closed gate is looked at.
const GATE_PAUSE: Duration = Duration::from_millis(20);
/// Rounds of asking the actor before a request is given up.
const MOST_ROUNDS: u32 = 5000;

/// Writes all of `bytes`, on the data path.
pub async fn write(
    sim: &Sim,
    files: &Files,
    mover: &mut Mover,
    file: &OpenFile,
    offset: u64,
    bytes: &[u8],
) -> Result<(), FsError> {
    let mut done = 0;
    for _ in 0..MOST_ROUNDS {
        let moved = mover.write(file, offset + done as u64, &bytes[done..]);
        done += moved.bytes;
        if done == bytes.len() && moved.stop.is_none() {
            return Ok(());
        }
        let (at, rest) = (offset + done as u64, &bytes[done..]);
        let end = at + rest.len() as u64;
        match moved.stop {
            None => {}
            Some(Stop::Need(Need::Allocation)) => {
                let grant = files.allocate(file, at..end).await?;
                if !grant.is_empty() {
                    let filled = mover.fill(grant, at, rest);
                    done += filled.bytes;
                    if let Some(stop) = filled.stop {
                        resolve(sim, files, file, stop, at..end).await?;
                    }
                }
            }
            Some(Stop::Need(Need::Inline)) => done += files.write(file, at, rest).await?,
            Some(stop) => resolve(sim, files, file, stop, at..end).await?,
        }
        if done == bytes.len() {
            return Ok(());
        }
    }
    Err(given_up(file))
}

/// Writes all of `bytes` on the actor.
pub async fn write_on_actor(files: &Files, file: &OpenFile, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
    let mut done = 0;
    while done < bytes.len() {
        done += files.write(file, offset + done as u64, &bytes[done..]).await?;
    }
    Ok(())
}

/// Reads up to `length` bytes on the data path; fewer only at the end of the file.
pub async fn read(
    sim: &Sim,
    files: &Files,
    mover: &mut Mover,
    file: &OpenFile,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, FsError> {
    let mut bytes = vec![0xa5; length];
    let mut done = 0;
    for _ in 0..MOST_ROUNDS {
        let moved = mover.read(file, offset + done as u64, &mut bytes[done..]);
        done += moved.bytes;
        let at = offset + done as u64;
        match moved.stop {
            None => {
                bytes.truncate(done);
                return Ok(bytes);
            }
            Some(Stop::Unlocked) => {
                let rest = files.read(file, at, length - done).await?;
                bytes.truncate(done);
                bytes.extend(rest);
                return Ok(bytes);
            }
            Some(stop) => resolve(sim, files, file, stop, at..at + (length - done) as u64).await?,
        }
    }
    Err(given_up(file))
}

async fn resolve(
    sim: &Sim,
    files: &Files,
    file: &OpenFile,
    stop: Stop,
    range: std::ops::Range<u64>,
) -> Result<(), FsError> {
    match stop {
        Stop::Need(Need::Runs) => files.load_runs(file, range).await,
        Stop::Need(Need::Extension) => files.extend(file, range.start).await,
        Stop::Need(need) => Err(FsError::refused(FsErrorKind::Invalid, format!("{}: {need:?}", file.fd()))),
        Stop::Gate(GateState::Poisoned) => {
            Err(FsError::refused(FsErrorKind::Fenced, format!("{}: this host was fenced", file.fd())))
        }
        Stop::Gate(_) => {
            sim.sleep(GATE_PAUSE).await;
            Ok(())
        }
        Stop::Failed(error) => Err(error.into()),
        Stop::MissingLun(lun) => Err(FsError::MissingLun { lun }),
        Stop::Unlocked => Err(FsError::refused(FsErrorKind::Invalid, format!("{} is not locked here", file.fd()))),
    }
}

fn given_up(file: &OpenFile) -> FsError {
    FsError::refused(FsErrorKind::Io, format!("{}: {MOST_ROUNDS} rounds without an end", file.fd()))
}
