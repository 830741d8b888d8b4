//! Owns: finding out what a SCSI unit can do for a volume: what it says, and what it does when it is tried.
//! Promises: without a scratch block nothing is written; with one, that block has its bytes back at the end, and reservations are tried
//! only where nobody is registered. Must not know: how a finding is printed.

use std::sync::Barrier;

use scsi::PathData;
use vmfs_core::error::{FsError, FsErrorKind};
use vmfs_core::lun::{Compared, DataLun, Fencing, LunErrorKind, PathOwner};
use vmfs_core::units::SlotId;

use crate::answer::{Verdict, verdict};
use crate::commands;
use crate::device::{COMMAND_TIME, Device, Facts, Failure};
use crate::facts::{ReservationCapabilities, identity};
use crate::open::{device_of_node, device_of_url, scsi_disk};
use crate::reservations::{ALL_REGISTRANTS, REGISTRANTS_ONLY};

/// Rounds in which two initiators race for one block.
const ROUNDS: u32 = 64;
/// Bytes at the start of a LUN that a volume never writes (docs/FORMAT.md).
const UNTOUCHED: u64 = 1 << 20;

/// Commands that a volume uses: name, operation code, service action, whether a shared volume needs it.
const COMMANDS: [(&str, u8, Option<u8>, bool); 9] = [
    ("READ(16)", 0x88, None, true),
    ("WRITE(16)", 0x8A, None, true),
    ("COMPARE AND WRITE", 0x89, None, true),
    ("SYNCHRONIZE CACHE(16)", 0x91, None, true),
    ("UNMAP", 0x42, None, false),
    ("WRITE SAME(16)", 0x93, None, false),
    ("PERSISTENT RESERVE IN", 0x5E, Some(0), false),
    ("PERSISTENT RESERVE OUT", 0x5F, Some(0), false),
    ("PREEMPT AND ABORT", 0x5F, Some(5), false),
];

/// What is known of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supported {
    /// Its name.
    pub command: &'static str,
    /// The unit says that it has it; `None`: it says nothing.
    pub told: Option<bool>,
    /// A volume that hosts share needs it.
    pub needed: bool,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// What, as a sentence.
    pub what: &'static str,
    /// `Ok`: it does; `Err`: what it did instead.
    pub result: Result<(), String>,
}

/// What was found out about a unit.
#[derive(Clone, Debug)]
pub struct Probe {
    /// How messages name it.
    pub name: String,
    /// What it says of itself.
    pub facts: Facts,
    /// What mkfs.vmfs would record as its identity; empty: it has none.
    pub identity: String,
    /// Commands.
    pub commands: Vec<Supported>,
    /// Reservations; `None`: it has none.
    pub reservations: Option<ReservationCapabilities>,
    /// Trials; none without a scratch block.
    pub trials: Vec<Trial>,
    /// What could not be tried, and why.
    pub untried: Vec<String>,
    /// Hosts on several machines can share it.
    pub shared: bool,
    /// The storage can keep out a host that has lost its lease (fence grade A).
    pub grade_a: bool,
}

fn refuse(name: &str, why: impl std::fmt::Display) -> FsError {
    FsError::refused(FsErrorKind::Invalid, format!("{name}: {why}"))
}

/// Looks at a SCSI unit. `scratch`: byte offset of a block that may be written to, in agreement with whoever owns the LUN. `Ok(None)`: it
/// is no SCSI unit.
pub fn probe(name: &str, scratch: Option<u64>) -> Result<Option<Probe>, FsError> {
    let read_only = scratch.is_none();
    let open = || -> Result<Option<Device>, FsError> {
        if name.starts_with("iscsi://") {
            return device_of_url(name, read_only).map(Some);
        }
        scsi_disk(name)?.map(|(node, found)| device_of_node(name, &node, &found, read_only)).transpose()
    };
    let Some(first) = open()? else { return Ok(None) };
    let mut probe = look(&first).map_err(|failure| refuse(&first.name, failure.why))?;
    if let Some(offset) = scratch {
        let second = open()?.ok_or_else(|| refuse(name, "it is gone"))?;
        check_scratch(&first, offset)?;
        probe.trials = try_compare_and_write(&first, &second, offset).map_err(|why| refuse(&first.name, why))?;
        if probe.reservations.is_some() {
            match try_reservations(&first, &second, offset).map_err(|why| refuse(&first.name, why))? {
                Ok(trials) => probe.trials.extend(trials),
                Err(why) => probe.untried.push(why),
            }
        }
    }
    conclude(&mut probe);
    Ok(Some(probe))
}

fn conclude(probe: &mut Probe) {
    let failed = |what: &str| probe.trials.iter().any(|trial| trial.what.contains(what) && trial.result.is_err());
    let missing = probe.commands.iter().any(|command| command.needed && command.told == Some(false));
    probe.shared = probe.facts.limits.compare_and_write > 0 && !missing && !failed("compare");
    let offered = probe.reservations.is_some_and(|can| can.has(ALL_REGISTRANTS) || can.has(REGISTRANTS_ONLY));
    let aborts =
        probe.commands.iter().all(|command| command.command != "PREEMPT AND ABORT" || command.told != Some(false));
    probe.grade_a = probe.shared && offered && aborts && !failed("registration");
}

/// What the unit says.
pub(crate) fn look(device: &Device) -> Result<Probe, Failure> {
    let mut commands = Vec::with_capacity(COMMANDS.len());
    for (command, operation, action, needed) in COMMANDS {
        let asked = device.read_in(&commands::report_supported(operation, action, 64), 64);
        let told = match asked {
            Ok(bytes) => match bytes.get(1).map(|flags| flags & 7) {
                Some(1) => Some(false),
                Some(3 | 5) => Some(true),
                _ => None,
            },
            Err(failure) if failure.unsupported => None,
            Err(failure) => return Err(failure),
        };
        commands.push(Supported { command, told, needed });
    }
    let named = identity(device.facts.wwid.as_deref(), device.facts.serial.as_deref());
    Ok(Probe {
        name: device.name.clone(),
        facts: device.facts.clone(),
        identity: String::from_utf8_lossy(named.bytes()).into_owned(),
        commands,
        reservations: device.capabilities()?,
        trials: Vec::new(),
        untried: Vec::new(),
        shared: false,
        grade_a: false,
    })
}

/// A block of a volume is nobody's to try things on.
fn check_scratch(device: &Device, offset: u64) -> Result<(), FsError> {
    let block = device.block_bytes() as u64;
    if !offset.is_multiple_of(block) || offset.checked_add(block).is_none_or(|end| end > device.bytes()) {
        let why = format!("there is no whole block at {offset}: blocks have {block} bytes, the LUN {}", device.bytes());
        return Err(refuse(&device.name, why));
    }
    let mut head = vec![0; 4096];
    device.read_head(&mut head).map_err(|why| refuse(&device.name, why))?;
    if vmfs_core::volume::lock_mode_of(&head).is_some() && offset >= UNTOUCHED {
        let why =
            format!("it carries a volume: only what lies before byte {UNTOUCHED} is not the volume's, {offset} is");
        return Err(refuse(&device.name, why));
    }
    Ok(())
}

/// A block of random bytes: what was there before is never met again.
fn image(block: usize) -> Vec<u8> {
    let mut bytes = vec![0; block];
    if getrandom::fill(&mut bytes).is_err() {
        bytes.fill(0x5A);
    }
    bytes
}

fn read(device: &Device, offset: u64) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; device.block_bytes()];
    device.read_at(offset, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn trial(what: &'static str, result: Result<(), String>) -> Trial {
    Trial { what, result }
}

fn expect<T: PartialEq + std::fmt::Debug>(found: T, wanted: &T) -> Result<(), String> {
    if found == *wanted { Ok(()) } else { Err(format!("{found:?} instead of {wanted:?}")) }
}

fn same(found: &[u8], wanted: &[u8]) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err("the block holds other bytes than it should".to_owned()) }
}

/// Tries compare-and-write from two initiators. Whatever it comes to, the block has its bytes back, or the error says that it has not.
pub(crate) fn try_compare_and_write(first: &Device, second: &Device, offset: u64) -> Result<Vec<Trial>, String> {
    let before = read(first, offset)?;
    let mut trials = Vec::new();
    let mut tried = |what, result| trials.push(trial(what, result));
    let block = first.block_bytes();
    let said = |result: Result<Compared, vmfs_core::lun::LunError>| result.map_err(|error| error.to_string());
    let (one, two, other) = (image(block), image(block), image(block));

    let written = said(first.compare(offset, &before, &one)).and_then(|found| expect(found, &Compared::Written));
    tried("a compare-and-write of the right bytes writes", written.and_then(|()| same(&read(second, offset)?, &one)));
    let missed = said(second.compare(offset, &before, &other)).and_then(|found| expect(found, &Compared::Miscompare));
    tried("a compare-and-write of other bytes writes nothing", missed.and_then(|()| same(&read(first, offset)?, &one)));
    tried("of two initiators that compare and write at once, one wins each time", race(first, second, offset));
    let now = read(first, offset)?;
    tried("a compare-and-write with too few data is refused and writes nothing", short(first, offset, &now));
    if first.facts.provisioning.unmap {
        let unwritten = || -> Result<(), String> {
            first.unmap(offset, block as u64).map_err(|error| error.to_string())?;
            let now = read(second, offset)?;
            expect(said(first.compare(offset, &now, &two))?, &Compared::Written)?;
            same(&read(second, offset)?, &two)
        };
        tried("a compare-and-write of a block that was given back finds what it reads as", unwritten());
    }
    first
        .write_at(offset, &before)
        .and_then(|()| first.flush())
        .map_err(|error| format!("the scratch block was not put back: {error}"))?;
    same(&read(second, offset)?, &before).map_err(|_| "the scratch block was not put back".to_owned())?;
    Ok(trials)
}

fn race(first: &Device, second: &Device, offset: u64) -> Result<(), String> {
    let block = first.block_bytes();
    for round in 0..ROUNDS {
        let now = read(first, offset)?;
        let (ours, theirs) = (image(block), image(block));
        let start = Barrier::new(2);
        let (one, two) = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                start.wait();
                second.compare(offset, &now, &theirs)
            });
            start.wait();
            (first.compare(offset, &now, &ours), other.join())
        });
        let two = two.map_err(|_| "a thread ended".to_owned())?;
        let (one, two) = (one.map_err(|error| error.to_string())?, two.map_err(|error| error.to_string())?);
        let winner = match (one, two) {
            (Compared::Written, Compared::Miscompare) => ours,
            (Compared::Miscompare, Compared::Written) => theirs,
            both => return Err(format!("in round {round} the two were told {both:?}")),
        };
        same(&read(second, offset)?, &winner)?;
    }
    Ok(())
}

fn short(device: &Device, offset: u64, now: &[u8]) -> Result<(), String> {
    let cdb = commands::compare_and_write(offset / device.block_bytes() as u64, false);
    // One block where two are needed. It is sent past the loop that repeats: whatever comes of it is the finding.
    let answer = device.path().execute(&cdb, PathData::Out(now), COMMAND_TIME);
    if let Ok(answer) = answer
        && verdict(&answer) == Verdict::Done
    {
        return Err("it was carried out".to_owned());
    }
    same(&read(device, offset)?, now)
}

/// Tries a registration, and its removal by another host; or says why that cannot be tried.
pub(crate) fn try_reservations(
    first: &Device,
    second: &Device,
    offset: u64,
) -> Result<Result<Vec<Trial>, String>, String> {
    const WHAT: &str = "a host whose registration another one removes writes nothing more";
    let said = |failure: Failure| failure.why;
    let there = first.read_reservation().map_err(said)?;
    if !there.keys.is_empty() || there.kind.is_some() {
        let paths = there.keys.len();
        return Ok(Err(format!("reservations: {paths} paths are registered; try it while nobody uses the LUN")));
    }
    if first.tenancy.is_some() {
        let why = "reservations: this machine has one port to the disk, and a second one would have to be shut out";
        return Ok(Err(why.to_owned()));
    }
    let key = |image: Vec<u8>| u64::from_be_bytes(image[..8].try_into().expect("8 bytes")).max(1);
    let owner = |slot| PathOwner { slot: SlotId(slot), key: key(image(8)) };
    let (one, two) = (owner(0), owner(1));
    let bytes = read(first, offset)?;
    let result = (|| {
        first.own(one).map_err(said)?;
        second.own(two).map_err(said)?;
        second.write_at(offset, &bytes).map_err(|error| error.to_string())?;
        expect(first.shut_out_victim(two).map_err(said)?, &Fencing::Proven)?;
        match second.write_at(offset, &bytes) {
            Err(error) if error.kind == LunErrorKind::Fenced => Ok(()),
            Err(error) => Err(format!("its write failed in another way: {error}")),
            Ok(()) => Err("its write was carried out".to_owned()),
        }
    })();
    second.disown();
    first.disown();
    let left = first.read_reservation().map_err(said)?;
    let clean =
        if left.keys.is_empty() { Ok(()) } else { Err(format!("{} registrations stay behind", left.keys.len())) };
    Ok(Ok(vec![trial(WHAT, result), trial("a registration that is taken off leaves nothing behind", clean)]))
}
