//! Owns: what all passes of a check share: the members as they were read, what was reached, what is damaged.
//! Promises: a damaged cell is told once; whether a mark may be there is decided in one place.
//! Must not know: the order of the passes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::finding::{Finding, LunCounts, Observer, Phase, Progress, Report, Severity, Structure};
use super::probe::damaged;
use super::reader::{Reader, Unread};
use super::remedy::Remedies;
use super::sparse_bits::SparseBits;
use crate::format::arena::{Arena, Place};
use crate::format::header::LunHeader;
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::format::layout::LunLayout;
use crate::format::table_entry::TableEntry;
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{BlockAddress, BlockNo, CellAddress, FdId, LunIndex, SlotRef};

/// One member LUN as the check sees it.
pub(super) struct MemberView {
    pub header: LunHeader,
    pub layout: LunLayout,
    /// By slot; `None`: damaged.
    pub slots: Vec<Option<Heartbeat>>,
    /// By slot; `None`: damaged.
    pub arenas: Vec<Option<Arena>>,
    pub counts: LunCounts,
    pub fd_containers: BTreeSet<BlockNo>,
    pub unit_containers: BTreeSet<BlockNo>,
    /// Pieces of the table with an entry that must be reached from an object.
    pub table_pieces: BTreeSet<u64>,
    /// Blocks whose table entry could not be read.
    pub unknown_blocks: SparseBits,
    /// Data blocks that an object reaches.
    pub reached: SparseBits,
}

/// Everything that the passes share.
pub(super) struct Checker<'a> {
    pub reader: Reader,
    pub observer: &'a mut dyn Observer,
    pub report: Report,
    pub remedies: Remedies,
    pub members: BTreeMap<LunIndex, MemberView>,
    pub root: FdId,
    /// Objects that ought to have a name, by FD.
    pub unnamed: SparseBits,
    /// Objects that a directory names, by FD.
    pub named: SparseBits,
    /// Parent of each directory.
    pub parents: HashMap<FdId, FdId>,
    /// Objects of which not everything could be read: what they reach is not known.
    pub damaged: HashSet<FdId>,
    /// Objects whose space is being freed: what they reach need not be theirs any more.
    pub unlinked: HashSet<FdId>,
    /// The object in state creating whose body is being read. Until it has a name its body need not be there: root cell, unit entry
    /// and the unit's cells go out together.
    pub being_created: Option<FdId>,
    /// What is wrong with bodies of such objects, should they turn out to have a name.
    pub if_named: Vec<(FdId, Finding)>,
    /// Windows by the LUN whose cells they carry: where they begin, and end if all cells are there.
    pub windows: BTreeMap<LunIndex, (CellAddress, Option<u64>)>,
    /// Units that an object reaches, by container.
    pub units_reached: HashMap<BlockAddress, Vec<u64>>,
    told: HashSet<CellAddress>,
}

/// The error of a cell that is not of `kind`, or that says it belongs to an object where such a cell belongs to none.
pub(super) fn expect_plain(cell: &Cell, kind: CellKind) -> Result<(), FormatError> {
    cell.expect_kind(kind)?;
    let header = cell.header();
    let stray = |field, value| Err(FormatError::Value { structure: "cell", field, value });
    match kind {
        CellKind::Root | CellKind::Blank | CellKind::Body => Ok(()),
        CellKind::PointerBlock | CellKind::Inner | CellKind::Bucket => Ok(()),
        _ if header.owner.is_some() => stray("owner", header.owner.map_or(0, FdId::get)),
        _ if header.index != 0 => stray("index", header.index.into()),
        _ if header.link.0 != 0 => stray("link", header.link.0),
        _ if header.token.0 != 0 => stray("token", header.token.0),
        _ => Ok(()),
    }
}

/// Whether somebody will take a mark away.
pub(super) struct Judgement {
    pub severity: Severity,
    pub why: String,
}

impl<'a> Checker<'a> {
    pub fn new(reader: Reader, observer: &'a mut dyn Observer, root: FdId, report: Report) -> Checker<'a> {
        Checker {
            reader,
            observer,
            report,
            remedies: Remedies::default(),
            members: BTreeMap::new(),
            root,
            unnamed: SparseBits::default(),
            named: SparseBits::default(),
            parents: HashMap::new(),
            damaged: HashSet::new(),
            unlinked: HashSet::new(),
            being_created: None,
            if_named: Vec::new(),
            windows: BTreeMap::new(),
            units_reached: HashMap::new(),
            told: HashSet::new(),
        }
    }

    pub fn tell(&mut self, finding: Finding) {
        if let Some(fd) = self.being_created
            && finding.severity == Severity::Error
        {
            self.if_named.push((fd, finding));
            return;
        }
        match finding.severity {
            Severity::Error => self.report.errors += 1,
            Severity::Recoverable => self.report.recoverable += 1,
            Severity::Info => self.report.infos += 1,
        }
        self.observer.finding(finding);
    }

    /// Tells what is wrong with bodies of objects in state creating that have a name all the same: a name comes after the body.
    pub fn tell_of_named(&mut self) {
        for (owner, finding) in std::mem::take(&mut self.if_named) {
            if self.named.contains(owner.get()) {
                self.tell(finding);
            }
        }
    }

    pub fn error(
        &mut self,
        structure: Structure,
        at: impl ToString,
        object: Option<FdId>,
        field: &'static str,
        found: impl ToString,
        expected: impl ToString,
    ) {
        let in_object = matches!(
            structure,
            Structure::RootCell | Structure::Body | Structure::PointerBlock | Structure::InnerUnit | Structure::Bucket
        );
        if let Some(fd) = object.filter(|_| in_object) {
            self.remedies.objects.insert(fd);
        }
        self.naming_error(structure, at, object, field, found, expected);
    }

    /// As [`Checker::error`], for what is wrong between an object and its names: the object itself is sound.
    pub fn naming_error(
        &mut self,
        structure: Structure,
        at: impl ToString,
        object: Option<FdId>,
        field: &'static str,
        found: impl ToString,
        expected: impl ToString,
    ) {
        self.tell(Finding {
            severity: Severity::Error,
            structure,
            at: at.to_string(),
            object,
            field,
            found: found.to_string(),
            expected: expected.to_string(),
        });
    }

    pub fn progress(&mut self, phase: Phase, done: u64, total: u64) {
        self.observer.progress(Progress { phase, done, total });
    }

    /// Tells why a cell was not had, once for each cell.
    pub fn tell_unread(&mut self, structure: Structure, at: CellAddress, object: Option<FdId>, why: &Unread) {
        if !self.told.insert(at) {
            return;
        }
        match why {
            Unread::Damaged(error) => {
                let finding = Finding { object, ..damaged(structure, at.to_string(), error) };
                self.tell(finding);
            }
            Unread::Failed(Some(error)) => {
                self.error(Structure::Lun, at.lun, object, "read", error, "a LUN that can be read");
            }
            Unread::Failed(None) | Unread::Missing => {}
        }
    }

    /// Reads a cell of this kind; `None` when it was not had, which has been told.
    pub async fn cell(
        &mut self,
        structure: Structure,
        at: CellAddress,
        kind: CellKind,
        object: Option<FdId>,
    ) -> Option<Cell> {
        let read = match self.reader.cell(at).await {
            Ok(cell) => expect_plain(&cell, kind).map(|()| cell).map_err(Unread::Damaged),
            Err(unread) => Err(unread),
        };
        match read {
            Ok(cell) => Some(cell),
            Err(why) => {
                self.tell_unread(structure, at, object, &why);
                None
            }
        }
    }

    /// Whether a mark of {slot, low bits of a generation} on `lun` will be taken away by somebody: its incarnation lives or waits
    /// for recovery, and recovery will come to `place`.
    pub fn judge_entry(&self, lun: LunIndex, entry: &TableEntry, place: Place) -> Judgement {
        let slot = usize::from(entry.slot.0);
        let Some(member) = self.members.get(&lun) else { return Judgement::unknown("its LUN is not there") };
        let Some(heartbeat) = &member.slots[slot] else { return Judgement::unknown("its slot is damaged") };
        if heartbeat.state == SlotState::Free || heartbeat.generation.low() != entry.generation_low {
            return Judgement::nobody(entry.slot, heartbeat);
        }
        self.judge_place(member, slot, heartbeat, place)
    }

    /// As [`Checker::judge_entry`], for a mark that has the whole incarnation.
    pub fn judge_mark(&self, lun: LunIndex, mark: SlotRef, place: Place) -> Judgement {
        let slot = usize::from(mark.slot.0);
        let Some(member) = self.members.get(&lun) else { return Judgement::unknown("its LUN is not there") };
        let Some(heartbeat) = &member.slots[slot] else { return Judgement::unknown("its slot is damaged") };
        if heartbeat.state == SlotState::Free || heartbeat.generation != mark.generation {
            return Judgement::nobody(mark.slot, heartbeat);
        }
        self.judge_place(member, slot, heartbeat, place)
    }

    fn judge_place(&self, member: &MemberView, slot: usize, heartbeat: &Heartbeat, place: Place) -> Judgement {
        let Some(arena) = &member.arenas[slot] else { return Judgement::unknown("its arena is damaged") };
        let name = &heartbeat.host_name;
        if arena.generation == heartbeat.generation && (arena.anywhere || arena.places.contains(&place)) {
            let why = format!("left by host {name:?} in slot{slot}, taken away when it goes on or is recovered");
            return Judgement { severity: Severity::Recoverable, why };
        }
        let why =
            format!("host {name:?} in slot{slot} has not listed {place:?} in its arena: recovery will not come here");
        Judgement { severity: Severity::Error, why }
    }
}

impl Judgement {
    fn unknown(why: &str) -> Judgement {
        Judgement { severity: Severity::Recoverable, why: format!("nothing can be said about who left it: {why}") }
    }

    fn nobody(slot: crate::units::SlotId, heartbeat: &Heartbeat) -> Judgement {
        let why = format!(
            "nothing: {slot} is {} at generation {}, so nobody will take it away",
            if heartbeat.state == SlotState::Free { "free" } else { "in use" },
            heartbeat.generation
        );
        Judgement { severity: Severity::Error, why }
    }
}
