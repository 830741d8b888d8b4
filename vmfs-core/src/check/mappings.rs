//! Owns: walking the mapping of a file or disk: inner units, pointer blocks, pointers.
//! Promises: every unit and block that it reaches is claimed; memory is one pointer block.
//! Must not know: what the table entries say (claiming compares them).

use super::finding::{Finding, Severity, Structure};
use super::objects::Found;
use super::probe::damaged;
use super::state::Checker;
use super::units::Claim;
use crate::format::body::{Body, DiskFormat, MappingRoot};
use crate::format::layout::{pointers_per_block, pointers_per_cell};
use crate::format::pointer::{BlockPointer, Granules, stored_at, unpack_pb_reference};
use crate::format::table_entry::EntryKind;
use crate::format::unit::{UNIT_REF_BYTES, UnitRef};
use crate::mapping::tree::{MAX_FILE_BLOCKS, UPPER_INDEX, UPPER_REFS};
use crate::units::UnitAddress;

/// What the walk counts.
#[derive(Default)]
struct Walk {
    blocks: u64,
    /// Blocks below the end of a disk.
    inside: u64,
    /// Of those, the ones whose every granule is written.
    whole: u64,
    /// Everything could be read.
    complete: bool,
}

impl Checker<'_> {
    pub(super) async fn check_mapping(&mut self, found: &Found, body: &Body, root: &MappingRoot) {
        let mut walk = Walk { complete: true, ..Walk::default() };
        let end = body.attributes.size.div_ceil(self.members[&found.fd.lun()].header.block_size.bytes());
        match root {
            MappingRoot::PointerBlocks(refs) => {
                for (number, at) in refs.iter().enumerate() {
                    self.check_pointer_block(found, number as u64, *at, end, &mut walk).await;
                }
            }
            MappingRoot::Inner { height, refs } => {
                for (slot, reference) in refs.iter().enumerate() {
                    let Some(reference) = reference else { continue };
                    match height {
                        3 => self.check_leaf(found, slot as u64, reference, end, &mut walk).await,
                        _ => self.check_upper(found, slot as u64, reference, end, &mut walk).await,
                    }
                }
            }
        }
        if walk.complete {
            self.check_counts(found, body, &walk, end);
        }
    }

    fn check_counts(&mut self, found: &Found, body: &Body, walk: &Walk, end: u64) {
        let at = found.root.body.map_or(String::new(), |body| body.at.to_string());
        if body.attributes.blocks != walk.blocks {
            self.remedies.counts.insert(found.fd, walk.blocks);
        }
        let mut say = |severity, field, found_text: String, expected: String| {
            let object = Some(found.fd);
            self.tell(Finding {
                severity,
                structure: Structure::Body,
                at: at.clone(),
                object,
                field,
                found: found_text,
                expected,
            });
        };
        let counted = body.attributes.blocks;
        if counted != walk.blocks {
            let expected = format!("{}; a host died while it published blocks, only du(1) shows it", walk.blocks);
            say(Severity::Recoverable, "blocks", counted.to_string(), expected);
        }
        match body.attributes.disk {
            Some(DiskFormat::ZeroedThick | DiskFormat::EagerZeroedThick) if walk.inside < end => {
                let expected = format!("all {end} blocks of a thick disk, unless it is being made or was trimmed");
                say(Severity::Info, "mapping", format!("{} blocks", walk.inside), expected);
            }
            Some(DiskFormat::EagerZeroedThick) if walk.whole < end => {
                let expected = format!("all {end} blocks written, unless it is being made or was trimmed");
                say(Severity::Info, "mapping", format!("{} whole blocks", walk.whole), expected);
            }
            _ => {}
        }
    }

    async fn check_upper(&mut self, found: &Found, slot: u64, reference: &UnitRef, end: u64, walk: &mut Walk) {
        let index = UPPER_INDEX | slot as u32;
        let Some(stream) = self.read_unit(found, EntryKind::Inner, index, reference).await else {
            walk.complete = false;
            return;
        };
        for nth in 0..UPPER_REFS.min(stream.len() / UNIT_REF_BYTES) {
            let leaf = UnitRef::unpack(self.reader.context.cell_size, &stream[nth * UNIT_REF_BYTES..]);
            match leaf {
                Ok(None) => {}
                Ok(Some(leaf)) => {
                    let number = slot * UPPER_REFS as u64 + nth as u64;
                    self.check_leaf(found, number, &leaf, end, walk).await;
                }
                Err(error) => self.broken_reference(found, reference.at, &error, walk),
            }
        }
    }

    async fn check_leaf(&mut self, found: &Found, leaf: u64, reference: &UnitRef, end: u64, walk: &mut Walk) {
        let Some(stream) = self.read_unit(found, EntryKind::Inner, leaf as u32, reference).await else {
            walk.complete = false;
            return;
        };
        let per = pointers_per_block(self.reader.context.cell_size);
        for nth in 0..per.min(stream.len() / 8) {
            let stored = stored_at(&stream, nth, "inner unit").unwrap_or(0);
            match unpack_pb_reference(stored) {
                Ok(at) => self.check_pointer_block(found, leaf * per as u64 + nth as u64, at, end, walk).await,
                Err(error) => self.broken_reference(found, reference.at, &error, walk),
            }
        }
    }

    fn broken_reference(
        &mut self,
        found: &Found,
        at: UnitAddress,
        error: &crate::format::FormatError,
        walk: &mut Walk,
    ) {
        let finding = damaged(Structure::InnerUnit, at.to_string(), error);
        self.tell(Finding { object: Some(found.fd), ..finding });
        self.damaged.insert(found.fd);
        walk.complete = false;
    }

    async fn check_pointer_block(
        &mut self,
        found: &Found,
        number: u64,
        at: Option<UnitAddress>,
        end: u64,
        walk: &mut Walk,
    ) {
        let Some(unit) = at else { return };
        let size = self.reader.context.cell_size;
        let claim = Claim { owner: found.fd, kind: EntryKind::PointerBlock, index: number as u32 };
        let from = format!("the mapping of the root cell {}", found.at);
        self.check_lun_set(found, Structure::PointerBlock, unit.lun, &unit.to_string());
        if number * pointers_per_block(size) as u64 >= MAX_FILE_BLOCKS {
            self.error(Structure::PointerBlock, unit, Some(found.fd), "index", number, "within 2^32 file blocks");
        }
        if !self.claim_unit(claim, unit, &from).await {
            self.damaged.insert(found.fd);
            walk.complete = false;
            return;
        }
        let layout = self.members[&unit.lun].layout.clone();
        for nth in 0..size.cells_per_unit() {
            let at = layout.unit_cell(unit, nth).expect("the unit was claimed");
            let Some(cell) = self.owned_cell(found, EntryKind::PointerBlock, claim.index, at).await else {
                self.damaged.insert(found.fd);
                walk.complete = false;
                continue;
            };
            let token = cell.header().token;
            if token > found.root.lock.token {
                let expected = format!("at most {}, the lock's", found.root.lock.token);
                self.error(Structure::PointerBlock, at, Some(found.fd), "token", token, expected);
            }
            let per = pointers_per_cell(size);
            let first = number * pointers_per_block(size) as u64 + (nth * per) as u64;
            for place in 0..per {
                let stored = stored_at(cell.payload(), place, "PB cell").unwrap_or(0);
                if stored != 0 {
                    self.check_pointer(found, first + place as u64, stored, &at.to_string(), end, walk).await;
                }
            }
        }
    }

    async fn check_pointer(&mut self, found: &Found, block: u64, stored: u64, cell: &str, end: u64, walk: &mut Walk) {
        let pointer = match BlockPointer::unpack(stored) {
            Ok(Some(pointer)) => pointer,
            Ok(None) => return,
            Err(error) => {
                let finding = damaged(Structure::PointerBlock, cell.to_owned(), &error);
                self.tell(Finding { object: Some(found.fd), ..finding });
                self.damaged.insert(found.fd);
                walk.complete = false;
                return;
            }
        };
        if pointer.shared {
            self.error(Structure::PointerBlock, cell, Some(found.fd), "shared", 1, "0 in this version");
        }
        self.check_lun_set(found, Structure::PointerBlock, pointer.at.lun, cell);
        let claim = Claim { owner: found.fd, kind: EntryKind::Data, index: block as u32 };
        self.claim_block(claim, pointer.at, &format!("the PB cell {cell}")).await;
        walk.blocks += 1;
        walk.inside += u64::from(block < end);
        walk.whole += u64::from(block < end && pointer.valid == Granules::ALL);
    }
}
