//! Owns: making a volume: what is refused, the plan, and carrying it out.
//! Promises: nothing is written before the plan is carried out; an interrupted mkfs leaves no volume; every table entry is right.
//! Must not know: command lines, how progress is shown.

mod execute;
mod extent;
mod signature;

use std::fmt;
use std::rc::Rc;

use futures_util::future::join_all;

pub use execute::{MkfsSummary, Progress, execute};
pub use extent::{NewExtent, check_extent, format_extent};
pub use signature::{Signature, find_signature};

use crate::cas::CellIo;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::cell::probe;
use crate::format::header::{DeviceIdentity, LeaseTimes, LockMode, LunHeader, MAX_LABEL};
use crate::format::layout::{FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, LunLayout, Segment, UNTOUCHED_BYTES};
use crate::format::{Cell, CellContext, CellKind};
use crate::lease;
use crate::lun::Lun;
use crate::slot;
use crate::units::{BlockSize, CellAddress, CellSize, LunIndex, MAX_MEMBERS, SlotId, Uuid};

/// Smallest LUN: 64 MiB.
pub const SMALLEST_LUN: u64 = 64 << 20;
/// Largest LUN: 64 TiB.
pub const LARGEST_LUN: u64 = 64 << 40;
/// Blocks that the first LUN must hold: root cells, units, and one to use.
const FIRST_LUN_BLOCKS: u64 = 3;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct MkfsOptions {
    /// Label, at most 64 bytes.
    pub label: String,
    /// File block size.
    pub block_size: BlockSize,
    /// Cell size; `None`: the devices' logical block size, for image files the file system's (512 bytes where it can do that).
    pub cell_size: Option<CellSize>,
    /// Lease parameters.
    pub lease: LeaseTimes,
    /// Overwrite a known signature, or a volume that a host uses.
    pub force: bool,
    /// UUID of the volume; `None`: a new one.
    pub volume: Option<Uuid>,
    /// Permission bits of the root directory.
    pub root_mode: u32,
    /// Owner of the root directory.
    pub root_uid: u32,
    /// Group of the root directory.
    pub root_gid: u32,
}

impl Default for MkfsOptions {
    fn default() -> MkfsOptions {
        MkfsOptions {
            label: String::new(),
            block_size: BlockSize::DEFAULT,
            cell_size: None,
            lease: LeaseTimes::DEFAULT,
            force: false,
            volume: None,
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
        }
    }
}

/// One LUN of a plan.
#[derive(Clone, Debug)]
pub struct PlannedLun {
    /// Path or URL.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// New identity.
    pub lun_uuid: Uuid,
    /// What the device says of itself.
    pub identity: DeviceIdentity,
    /// Geometry.
    pub layout: LunLayout,
    /// What is there now and will be lost, if anything is known.
    pub overwrites: Option<String>,
}

impl PlannedLun {
    /// Index in the volume.
    pub fn index(&self) -> LunIndex {
        self.layout.lun
    }
}

/// What mkfs will do; print it before carrying it out.
#[derive(Clone, Debug)]
pub struct MkfsPlan {
    /// Volume UUID.
    pub volume: Uuid,
    /// What was asked for, with the cell size decided.
    pub options: MkfsOptions,
    /// Cell size.
    pub cell_size: CellSize,
    /// How compare-and-write is done.
    pub lock_mode: LockMode,
    /// The LUNs in the order given; index 1 first.
    pub luns: Vec<PlannedLun>,
}

impl MkfsPlan {
    /// Volume and cell size, as every reader of a cell needs them.
    pub fn context(&self) -> CellContext {
        CellContext { volume: self.volume, cell_size: self.cell_size }
    }

    /// Bytes that will hold files, all LUNs together.
    pub fn capacity(&self) -> u64 {
        self.luns.iter().map(|lun| lun.layout.block_count() * self.options.block_size.bytes()).sum()
    }
}

impl fmt::Display for MkfsPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = if self.options.label.is_empty() { "none" } else { &self.options.label };
        writeln!(f, "volume      {}", self.volume)?;
        writeln!(f, "label       {label}")?;
        writeln!(f, "cells       {} bytes", self.cell_size.bytes())?;
        writeln!(f, "blocks      {} KiB", self.options.block_size.bytes() >> 10)?;
        let lease = &self.options.lease;
        writeln!(f, "lease       {} ms, renewed every {} ms", lease.lease_ms, lease.renew_ms)?;
        let shared = match self.lock_mode {
            LockMode::SingleMachine => "by the processes of one machine",
            LockMode::CompareAndWrite => "by all hosts that see the LUNs",
        };
        writeln!(f, "shared      {shared}")?;
        writeln!(f, "capacity    {} MiB", self.capacity() >> 20)?;
        for lun in &self.luns {
            writeln!(
                f,
                "LUN {:<3}     {}: {} MiB, {} blocks",
                lun.index().get(),
                lun.name,
                lun.bytes >> 20,
                lun.layout.block_count()
            )?;
            if let Some(lost) = &lun.overwrites {
                writeln!(f, "            will be lost: {lost}")?;
            }
        }
        Ok(())
    }
}

/// Checks LUNs and options and decides everything; reads only. Takes some seconds when a LUN holds a volume that looks in use.
pub async fn plan(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>], options: MkfsOptions) -> Result<MkfsPlan, FsError> {
    check_options(luns, &options)?;
    let cell_size = choose_cell_size(luns, options.cell_size)?;
    let lock_mode = luns[0].lock_mode();
    let volume = options.volume.unwrap_or_else(|| new_uuid(env));
    let found: Vec<Option<String>> = join_all(luns.iter().map(|lun| inspect(env, lun, options.force)))
        .await
        .into_iter()
        .collect::<Result<_, _>>()?;
    let mut planned = Vec::with_capacity(luns.len());
    for (nth, (lun, overwrites)) in luns.iter().zip(found).enumerate() {
        let index = LunIndex::new(nth as u8 + 1).expect("the number of LUNs was checked");
        planned.push(PlannedLun {
            name: lun.name().to_owned(),
            bytes: lun.bytes(),
            lun_uuid: new_uuid(env),
            identity: lun.identity(),
            layout: layout_of(lun, index, cell_size, options.block_size)?,
            overwrites,
        });
    }
    Ok(MkfsPlan { volume, options, cell_size, lock_mode, luns: planned })
}

fn invalid(message: String) -> FsError {
    FsError::refused(FsErrorKind::Invalid, message)
}

fn check_options(luns: &[Rc<dyn Lun>], options: &MkfsOptions) -> Result<(), FsError> {
    if luns.is_empty() || luns.len() > MAX_MEMBERS {
        return Err(invalid(format!("a volume has 1 to {MAX_MEMBERS} LUNs, {} were given", luns.len())));
    }
    if options.label.len() > MAX_LABEL {
        let length = options.label.len();
        return Err(invalid(format!("the label has {length} bytes, at most {MAX_LABEL} are possible")));
    }
    if options.root_mode & !0o7777 != 0 {
        return Err(invalid(format!("{:o} is no permission mode", options.root_mode)));
    }
    lease::check(&options.lease)?;
    for (nth, lun) in luns.iter().enumerate() {
        let same = |other: &&Rc<dyn Lun>| {
            other.name() == lun.name() || (!lun.identity().bytes().is_empty() && other.identity() == lun.identity())
        };
        if let Some(other) = luns[..nth].iter().find(same) {
            return Err(invalid(format!("{} and {} are the same LUN; give each LUN once", other.name(), lun.name())));
        }
        if lun.lock_mode() != luns[0].lock_mode() {
            return Err(invalid(format!(
                "{} and {} can not be shared in the same way; take LUNs of one kind for a volume",
                luns[0].name(),
                lun.name()
            )));
        }
        if lun.alignment() as u64 > FIXED_STRIDE {
            return Err(invalid(format!("{}: its blocks of {} bytes are too large", lun.name(), lun.alignment())));
        }
    }
    Ok(())
}

fn choose_cell_size(luns: &[Rc<dyn Lun>], asked: Option<CellSize>) -> Result<CellSize, FsError> {
    let mut chosen: Option<(CellSize, String)> = asked.map(|size| (size, "the cell size asked for".to_owned()));
    for lun in luns {
        let Some(size) = lun.cell_size() else { continue };
        match &chosen {
            Some((other, whose)) if *other != size => {
                return Err(invalid(format!(
                    "{} has blocks of {} bytes, {whose} is {} bytes; all LUNs of a volume need the same",
                    lun.name(),
                    size.bytes(),
                    other.bytes()
                )));
            }
            _ => chosen = Some((size, format!("the block size of {}", lun.name()))),
        }
    }
    Ok(match chosen {
        Some((size, _)) => size,
        None if luns.iter().all(|lun| lun.alignment() <= CellSize::B512.bytes()) => CellSize::B512,
        None => CellSize::B4096,
    })
}

fn layout_of(
    lun: &Rc<dyn Lun>,
    index: LunIndex,
    cell_size: CellSize,
    block_size: BlockSize,
) -> Result<LunLayout, FsError> {
    let (name, bytes) = (lun.name(), lun.bytes());
    if !(SMALLEST_LUN..=LARGEST_LUN).contains(&bytes) {
        return Err(invalid(format!("{name} has {} KiB; a LUN has 64 MiB to 64 TiB: give another size", bytes >> 10)));
    }
    let needed = if index.get() == 1 { FIRST_LUN_BLOCKS } else { 1 };
    match Segment::whole_lun(bytes, cell_size, block_size) {
        Some(segment) if segment.block_count >= needed => {
            Ok(LunLayout { lun: index, cell_size, block_size, segments: vec![segment] })
        }
        _ => Err(invalid(format!(
            "{name} has {} MiB: too small for blocks of {} KiB; choose a smaller block size",
            bytes >> 20,
            block_size.bytes() >> 10
        ))),
    }
}

/// What the LUN holds now; an error when that must not be overwritten.
async fn inspect(env: &Rc<dyn Env>, lun: &Rc<dyn Lun>, force: bool) -> Result<Option<String>, FsError> {
    if lun.bytes() < SMALLEST_LUN {
        return Ok(None);
    }
    let head = lun.read(0, (HEADER_COPY_OFFSET + FIXED_STRIDE) as usize).await?;
    for offset in [HEADER_OFFSET, HEADER_COPY_OFFSET] {
        if let Ok((context, index)) = probe(offset, &head[offset as usize..]) {
            return inspect_volume(env, lun, force, (context, index), offset, &head[offset as usize..]).await;
        }
    }
    match find_signature(&head[..(UNTOUCHED_BYTES + FIXED_STRIDE) as usize]) {
        Some(found) if !force => Err(FsError::refused(
            FsErrorKind::Exists,
            format!(
                "{}: holds {found}; nothing was written. Check that this is the right LUN, then use --force",
                lun.name()
            ),
        )),
        found => Ok(found.map(|signature| signature.to_string())),
    }
}

/// As [`inspect`], where a header of this format was found.
async fn inspect_volume(
    env: &Rc<dyn Env>,
    lun: &Rc<dyn Lun>,
    force: bool,
    (context, index): (CellContext, LunIndex),
    offset: u64,
    bytes: &[u8],
) -> Result<Option<String>, FsError> {
    let at = CellAddress { lun: index, offset };
    let cell = Cell::decode(&context, at, &bytes[..context.cell_size.bytes()]);
    if let Ok(cell) = &cell
        && cell.header().kind == CellKind::Moved
    {
        let what = format!("{index} of the VMFS volume {}, from which it was taken out", context.volume);
        if force {
            return Ok(Some(what));
        }
        let message = format!("{}: held {what}; nothing was written. Use --force", lun.name());
        return Err(FsError::refused(FsErrorKind::Exists, message));
    }
    let header = cell.and_then(|cell| LunHeader::decode(context.cell_size, cell.payload()));
    let volume = header.as_ref().map_or(context.volume, |header| header.volume_of(context.volume));
    let label = header.map_or_else(|_| "damaged".to_owned(), |header| format!("label {:?}", header.label));
    let what = format!("{index} of the VMFS volume {volume} ({label})");
    let io = CellIo::new(context, env.clone());
    let users = slot::hosts_in_use(&io, lun, index).await?;
    if force {
        return Ok(Some(if users.is_empty() { what } else { format!("{what}, in use by {}", names(&users)) }));
    }
    Err(if users.is_empty() {
        FsError::refused(
            FsErrorKind::Exists,
            format!("{}: holds {what}; nothing was written. Use --force if it may be lost", lun.name()),
        )
    } else {
        FsError::refused(
            FsErrorKind::Busy,
            format!("{}: holds {what}, in use by {}; unmount it there first", lun.name(), names(&users)),
        )
    })
}

fn names(users: &[(SlotId, crate::format::heartbeat::Heartbeat)]) -> String {
    users.iter().map(|(slot, h)| format!("{} ({slot})", h.host_name)).collect::<Vec<_>>().join(", ")
}

pub(crate) fn new_uuid(env: &Rc<dyn Env>) -> Uuid {
    let mut bytes = [0; 16];
    env.random(&mut bytes);
    // RFC 9562, section 5.4: version 4, variant 10.
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Uuid(bytes)
}
