//! Owns: looking through a mounted volume for damage while hosts work on it: what is looked at, how fast, and what is believed.
//! Promises: it writes nothing; damage is told only when it is still there after more looks and what names it has not changed meanwhile,
//! so that changes of any host are no findings; one scrub of a mount at a time. Must not know: how findings are shown.
//!
//! ```text
//! fixed cells of each LUN -> block tables (find the containers) -> unit containers -> root cells, and below each: body, mapping or
//! directory, the reverse map of what it reaches, and its data when that is asked for
//! ```
//!
//! A lost LUN is no damage: it is told as such, and so are the objects that it hurts, by `status`.

mod objects;
mod paths;
mod space;

use std::collections::BTreeSet;
use std::time::Duration;

use super::Inner;
use crate::check::Structure;
use crate::context::Member;
use crate::env::Instant;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Arena;
use crate::format::header::LunHeader;
use crate::format::heartbeat::Heartbeat;
use crate::format::layout::{
    ARENA_OFFSET, FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, HEARTBEAT_OFFSET, header_cell, header_copy_cell,
};
use crate::format::member;
use crate::format::{Cell, CellKind, FormatError};
use crate::lun::LunError;
use crate::units::{BlockAddress, CellAddress, FdId, LunIndex, SLOTS};

/// Findings that are listed; more are counted.
const MOST_LISTED: usize = 100;
/// Looks at a cell that fails its checks before it is believed to be damaged, each of them [`crate::cas`]'s reads of a torn cell.
const LOOKS: u32 = 4;
/// Between two of them: longer than any change of a cell takes.
const PAUSE: Duration = Duration::from_millis(100);
/// Looks at two cells that say the same in the end, but not while one of them is being changed: some seconds.
const AGREE_LOOKS: u32 = 20;

/// What a scrub looks at, and how fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Reads the data of files too.
    pub data: bool,
    /// Most bytes read in a second; `None`: as fast as it goes.
    pub bytes_per_second: Option<u64>,
}

/// Damage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubFinding {
    /// Structure of FORMAT.md; [`Structure::Lun`] for file data, and for what the LUN does not give.
    pub structure: Structure,
    /// Where: a cell address, a block, a unit, or the name of a LUN.
    pub at: String,
    /// The object concerned.
    pub object: Option<FdId>,
    /// A path of it, if one is known.
    pub path: Option<Vec<u8>>,
    /// What is wrong.
    pub what: String,
}

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Damage, as far as it is listed.
    pub findings: Vec<ScrubFinding>,
    /// Findings in all.
    pub found: u64,
    /// Objects looked at.
    pub objects: u64,
    /// Objects that changed all the time, so that not all of them could be looked at.
    pub unsettled: u64,
    /// Bytes read.
    pub bytes: u64,
    /// LUNs that are lost: what lies there was not looked at.
    pub lost: Vec<LunIndex>,
}

impl ScrubReport {
    /// Nothing is wrong, and everything was there to be looked at.
    pub fn is_clean(&self) -> bool {
        self.found == 0 && self.lost.is_empty()
    }
}

/// Damage whose object's path is not looked for yet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Problem {
    structure: Structure,
    at: String,
    object: Option<FdId>,
    what: String,
}

/// What a cell must be.
type Legal<'a> = &'a dyn Fn(&Cell) -> Result<(), FormatError>;

/// A cell that failed its checks when it was first read.
type Suspect<'a> = (CellAddress, Legal<'a>);

fn is_legal(cell: &Result<Cell, FormatError>, legal: Legal<'_>) -> bool {
    cell.as_ref().is_ok_and(|cell| legal(cell).is_ok())
}

struct Scrub<'a> {
    inner: &'a Inner,
    options: ScrubOptions,
    number: u64,
    began: Instant,
    tell: &'a mut dyn FnMut(u64, u64),
    /// Bytes of what is looked at: progress, which knows nothing of reads that are repeated.
    done: u64,
    total: u64,
    problems: Vec<Problem>,
    report: ScrubReport,
    fd_containers: BTreeSet<BlockAddress>,
    unit_containers: BTreeSet<BlockAddress>,
    data_blocks: u64,
    /// Objects of which something is told already.
    told: BTreeSet<FdId>,
    /// Objects whose root cell is damaged.
    unrooted: BTreeSet<FdId>,
}

/// Looks through the volume; `tell` hears how far it is, in bytes. A later scrub of the same mount ends this one.
pub(super) async fn scrub(
    inner: &Inner,
    options: ScrubOptions,
    tell: &mut dyn FnMut(u64, u64),
) -> Result<ScrubReport, FsError> {
    let number = inner.scrubs.get() + 1;
    inner.scrubs.set(number);
    let mut scrub = Scrub {
        inner,
        options,
        number,
        began: inner.context.env().now(),
        tell,
        done: 0,
        total: 0,
        problems: Vec::new(),
        report: ScrubReport::default(),
        fd_containers: BTreeSet::new(),
        unit_containers: BTreeSet::new(),
        data_blocks: 0,
        told: BTreeSet::new(),
        unrooted: BTreeSet::new(),
    };
    scrub.run().await?;
    Ok(scrub.answer().await)
}

impl Scrub<'_> {
    async fn run(&mut self) -> Result<(), FsError> {
        let members = self.inner.context.members();
        let fixed = 3 * SLOTS as u64 * FIXED_STRIDE;
        let tables: u64 = members.iter().map(|member| space::table_bytes(member)).sum();
        self.total = members.len() as u64 * fixed + tables;
        for member in &members {
            self.fixed_cells(member).await?;
        }
        for member in &members {
            self.block_table(member).await?;
        }
        let block = self.inner.info.block_size.bytes();
        let containers = self.unit_containers.len() as u64 + self.fd_containers.len() as u64;
        let data = if self.options.data { self.data_blocks } else { 0 };
        // The units in use are read twice: as cells of their container, and as what their object says of them.
        self.total += (containers + self.unit_containers.len() as u64 + data) * block;
        for container in self.unit_containers.clone() {
            self.unit_container(container).await?;
        }
        for container in self.fd_containers.clone() {
            self.fd_container(container).await?;
        }
        self.report.lost = self.inner.context.lost_luns();
        (self.tell)(self.total, self.total);
        Ok(())
    }

    /// Waits until the bytes just read are within the rate; an error when nobody waits for this scrub any more.
    async fn paced(&mut self, bytes: u64) -> Result<(), FsError> {
        let refuse = |why: &str| Err(FsError::refused(FsErrorKind::Busy, format!("the scrub has ended: {why}")));
        if self.inner.scrubs.get() != self.number {
            return refuse("another one of this mount has begun");
        }
        if self.inner.closing.get() {
            return refuse("the volume is being unmounted");
        }
        if let Some(over) = self.inner.context.over() {
            return Err(over);
        }
        self.report.bytes += bytes;
        let Some(rate) = self.options.bytes_per_second else { return Ok(()) };
        let due_ns = u128::from(self.report.bytes) * 1_000_000_000 / u128::from(rate.max(1));
        let due = self.began.after(Duration::from_nanos(due_ns as u64));
        let now = self.inner.context.env().now();
        if due > now {
            self.inner.context.env().sleep(Duration::from_nanos(due.0 - now.0)).await;
        }
        Ok(())
    }

    /// So many bytes of what is to be looked at are done.
    fn advance(&mut self, bytes: u64) {
        self.done = (self.done + bytes).min(self.total);
        (self.tell)(self.done, self.total);
    }

    fn problem(&mut self, structure: Structure, at: impl ToString, object: Option<FdId>, what: impl ToString) {
        let problem = Problem { structure, at: at.to_string(), object, what: what.to_string() };
        self.told.extend(object);
        self.report.found += 1;
        if self.problems.len() < MOST_LISTED {
            self.problems.push(problem);
        }
    }

    /// A range that a LUN did not give: told, unless the LUN is lost.
    fn unread(&mut self, member: &Member, at: CellAddress, object: Option<FdId>, error: LunError) {
        let error = FsError::from(error);
        if !self.inner.context.is_loss(&error) && self.inner.context.member(member.index).is_ok() {
            self.problem(Structure::Lun, at, object, error);
        }
    }

    /// Looks at cells until they are what they must be. Gives those that are not after all looks, with what is wrong.
    async fn confirm(&mut self, mut suspects: Vec<Suspect<'_>>) -> Result<Vec<(CellAddress, String)>, FsError> {
        let mut wrong = Vec::new();
        for _ in 0..LOOKS {
            if suspects.is_empty() {
                return Ok(Vec::new());
            }
            self.inner.context.env().sleep(PAUSE).await;
            wrong.clear();
            let mut left = Vec::new();
            for (at, legal) in suspects {
                if let Some(what) = self.fault(at, legal).await {
                    wrong.push((at, what));
                    left.push((at, legal));
                }
                self.paced(self.inner.context.cell_size().bytes() as u64).await?;
            }
            suspects = left;
        }
        wrong.retain(|(at, _)| !self.inner.context.is_lost(at.lun));
        Ok(wrong)
    }

    /// What is wrong with a cell now.
    async fn fault(&self, at: CellAddress, legal: Legal<'_>) -> Option<String> {
        match self.inner.context.read_cell(at).await {
            Ok(cell) => legal(&cell).err().map(|cause| cause.to_string()),
            Err(FsError::Corrupt { cause, .. }) => Some(cause.to_string()),
            Err(FsError::MissingLun { .. }) => None,
            Err(error) => Some(error.to_string()),
        }
    }

    /// Cells in fixed places: header, members, header copy, heartbeats, arenas.
    async fn fixed_cells(&mut self, member: &Member) -> Result<(), FsError> {
        let size = self.inner.context.cell_size();
        let header = |cell: &Cell| {
            cell.expect_kind(CellKind::Header)?;
            LunHeader::decode(size, cell.payload()).map(drop)
        };
        let entry = |cell: &Cell| {
            cell.expect_kind(CellKind::Member)?;
            let entry = member::Member::decode(cell.payload())?;
            let place = (cell.address().offset - HEADER_OFFSET) / FIXED_STRIDE;
            let stray = FormatError::Value { structure: "member", field: "index", value: entry.index.get().into() };
            if u64::from(entry.index.get()) == place { Ok(()) } else { Err(stray) }
        };
        let heartbeat = |cell: &Cell| {
            cell.expect_kind(CellKind::Heartbeat)?;
            Heartbeat::decode(cell.payload()).map(drop)
        };
        let arena = |cell: &Cell| {
            cell.expect_kind(CellKind::Arena)?;
            Arena::decode(size, cell.payload()).map(drop)
        };
        let regions: [(u64, usize, Structure, Legal<'_>); 5] = [
            (HEADER_OFFSET, 1, Structure::Header, &header),
            (HEADER_OFFSET + FIXED_STRIDE, 254, Structure::Member, &entry),
            (HEADER_COPY_OFFSET, 1, Structure::HeaderCopy, &header),
            (HEARTBEAT_OFFSET, SLOTS, Structure::Heartbeat, &heartbeat),
            (ARENA_OFFSET, SLOTS, Structure::Arena, &arena),
        ];
        for (offset, count, structure, legal) in regions {
            let first = CellAddress { lun: member.index, offset };
            let bytes = count as u64 * FIXED_STRIDE;
            match self.inner.context.io.read_strided(&member.lun, first, FIXED_STRIDE, count).await {
                Ok(cells) => {
                    let places = (0..).map(|nth| CellAddress { offset: offset + nth * FIXED_STRIDE, ..first });
                    let bad = cells.into_iter().zip(places).filter(|(cell, _)| !is_legal(cell, legal));
                    for (at, wrong) in self.confirm(bad.map(|(_, at)| (at, legal)).collect()).await? {
                        self.problem(structure, at, None, wrong);
                    }
                }
                Err(error) => self.unread(member, first, None, error),
            }
            self.paced(bytes).await?;
            self.advance(bytes);
        }
        self.header_and_copy(member).await
    }

    /// Header and copy agree, but for the moment between their two changes.
    async fn header_and_copy(&mut self, member: &Member) -> Result<(), FsError> {
        for _ in 0..AGREE_LOOKS {
            let copy = self.inner.context.read_cell(header_copy_cell(member.index)).await;
            let header = self.inner.context.read_cell(header_cell(member.index)).await;
            match (header, copy) {
                (Ok(header), Ok(copy)) if header.payload() != copy.payload() => {}
                // One that cannot be read is told already.
                _ => return Ok(()),
            }
            self.inner.context.env().sleep(2 * PAUSE).await;
            self.paced(0).await?;
        }
        self.problem(
            Structure::HeaderCopy,
            header_copy_cell(member.index),
            None,
            "it says something else than the header",
        );
        Ok(())
    }
}
