//! Owns: what a check says: findings, their weight, totals, progress.
//! Promises: a finding names structure, place, object, field, what was found and what is expected.
//! Must not know: how anything is found out, how it is shown.

use std::fmt;

use crate::units::{FdId, LunIndex, Uuid};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Nothing is wrong: for people.
    Info,
    /// What a host that died, or still lives, legitimately leaves: recovery or that host's next step takes it away.
    Recoverable,
    /// A rule of the format is broken.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Info => "info",
            Severity::Recoverable => "recoverable",
            Severity::Error => "error",
        })
    }
}

/// Which structure of FORMAT.md a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Structure {
    /// The LUN as a whole.
    Lun,
    /// Header cell.
    Header,
    /// Copy of the header cell.
    HeaderCopy,
    /// Member cell.
    Member,
    /// Heartbeat cell.
    Heartbeat,
    /// Arena cell.
    Arena,
    /// Cell of the block table.
    BlockTable,
    /// Cell of a unit container's table.
    UnitTable,
    /// Root cell.
    RootCell,
    /// Body.
    Body,
    /// Pointer block.
    PointerBlock,
    /// Inner unit of a mapping or of a directory.
    InnerUnit,
    /// Bucket of a directory.
    Bucket,
    /// Cell of a unit that is in no use.
    FreeUnit,
}

impl Structure {
    /// Its name, as FORMAT.md has it.
    pub fn name(self) -> &'static str {
        match self {
            Structure::Lun => "LUN",
            Structure::Header => "header",
            Structure::HeaderCopy => "header copy",
            Structure::Member => "member",
            Structure::Heartbeat => "heartbeat",
            Structure::Arena => "arena",
            Structure::BlockTable => "block table",
            Structure::UnitTable => "unit table",
            Structure::RootCell => "root cell",
            Structure::Body => "body",
            Structure::PointerBlock => "pointer block",
            Structure::InnerUnit => "inner unit",
            Structure::Bucket => "bucket",
            Structure::FreeUnit => "free unit",
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Weight.
    pub severity: Severity,
    /// Structure.
    pub structure: Structure,
    /// Where: a cell address, a block, a unit, or the name of a LUN.
    pub at: String,
    /// The object concerned.
    pub object: Option<FdId>,
    /// The field's name in FORMAT.md, or what the statement is about.
    pub field: &'static str,
    /// What was found.
    pub found: String,
    /// What is expected, or what follows.
    pub expected: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.severity, self.structure.name(), self.at)?;
        if let Some(object) = self.object {
            write!(f, " of {object}")?;
        }
        write!(f, ": {}: found {}", self.field, self.found)?;
        if !self.expected.is_empty() {
            write!(f, ", expected {}", self.expected)?;
        }
        Ok(())
    }
}

/// What a check is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading the block tables; counted in bytes.
    BlockTables,
    /// Reading unit containers; counted in bytes.
    Units,
    /// Reading root cells and everything that they reach; counted in FD containers.
    Objects,
    /// Looking for space that nothing reaches; counted in bytes and unit containers.
    Space,
}

/// How far a phase is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// Done.
    pub done: u64,
    /// To do in all.
    pub total: u64,
}

/// Takes what a check finds, as it is found.
pub trait Observer {
    /// Something was found.
    fn finding(&mut self, finding: Finding);
    /// Some work is done.
    fn progress(&mut self, progress: Progress) {
        let _ = progress;
    }
}

impl Observer for Vec<Finding> {
    fn finding(&mut self, finding: Finding) {
        self.push(finding);
    }
}

/// Objects by type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectCounts {
    /// Ordinary files.
    pub files: u64,
    /// Virtual disks.
    pub disks: u64,
    /// Directories, the root directory included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Raw device mappings.
    pub raw_devices: u64,
}

/// Blocks and units of one LUN by use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LunCounts {
    /// Path or URL.
    pub name: String,
    /// Blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Blocks with file data.
    pub data: u64,
    /// FD containers.
    pub fd_containers: u64,
    /// Unit containers.
    pub unit_containers: u64,
    /// Blocks with a mark: formatting, retiring.
    pub marked: u64,
    /// Blocks in quarantine.
    pub quarantined: u64,
    /// Units that an object can use.
    pub units: u64,
    /// Free ones of them.
    pub free_units: u64,
}

/// Totals of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The volume.
    pub volume: Uuid,
    /// Its label.
    pub label: String,
    /// Findings of weight error.
    pub errors: u64,
    /// Findings of weight recoverable.
    pub recoverable: u64,
    /// Findings of weight info.
    pub infos: u64,
    /// Objects, without those that have lost their name for good.
    pub objects: ObjectCounts,
    /// By LUN, ascending.
    pub luns: Vec<(LunIndex, LunCounts)>,
    /// Members that were not given or could not be read; what lies there was not checked.
    pub missing: Vec<LunIndex>,
}

impl Report {
    /// No rule is broken. Recoverable leftovers are no fault.
    pub fn is_clean(&self) -> bool {
        self.errors == 0
    }
}
