//! Owns: checking members, heartbeats and arenas.
//! Promises: after it, the checker knows every incarnation that may have left something.
//! Must not know: blocks and objects.

use super::finding::{Finding, Severity, Structure};
use super::reader::Unread;
use super::state::Checker;
use crate::format::arena::{Arena, Place};
use crate::format::header::MemberState;
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::format::layout::{arena_cell, heartbeat_cell, member_cell};
use crate::format::member::Member;
use crate::format::{Cell, CellKind, FormatError};
use crate::units::{CellAddress, CellSize, LunIndex, SlotId};

impl Checker<'_> {
    /// Reads a fixed cell and decodes its payload.
    async fn fixed<T>(
        &mut self,
        structure: Structure,
        at: CellAddress,
        kind: CellKind,
        decode: impl FnOnce(CellSize, &Cell) -> Result<T, FormatError>,
    ) -> Option<T> {
        let cell = self.cell(structure, at, kind, None).await?;
        match decode(self.reader.context.cell_size, &cell) {
            Ok(value) => Some(value),
            Err(error) => {
                self.tell_unread(structure, at, None, &Unread::Damaged(error));
                None
            }
        }
    }

    /// The member cells of all LUNs: the same everywhere, and every member in use was given.
    pub(super) async fn check_members(&mut self, reference: LunIndex) {
        let luns: Vec<LunIndex> = self.members.keys().copied().collect();
        let mut in_use = 0;
        for index in (1..=254).filter_map(LunIndex::new) {
            let mut decided: Option<Member> = None;
            for lun in std::iter::once(reference).chain(luns.iter().copied().filter(|lun| *lun != reference)) {
                let at = member_cell(lun, index);
                let decode = |_, cell: &Cell| Member::decode(cell.payload());
                let Some(member) = self.fixed(Structure::Member, at, CellKind::Member, decode).await else { continue };
                if member.index != index {
                    self.error(Structure::Member, at, None, "index", member.index, index);
                    continue;
                }
                match &decided {
                    None => decided = Some(member),
                    Some(first) if *first != member => {
                        let found = format!("{:?} {} ({} bytes)", member.state, member.lun_uuid, member.lun_bytes);
                        let expected = format!(
                            "{:?} {} ({} bytes), as on {reference}",
                            first.state, first.lun_uuid, first.lun_bytes
                        );
                        self.error(Structure::Member, at, None, "content", found, expected);
                    }
                    Some(_) => {}
                }
            }
            if let Some(member) = decided {
                // An index that is only reserved does not count: its LUN is not formatted.
                let reserved = member.state == MemberState::Joining && member.lun_bytes == 0;
                in_use += u16::from(!reserved && !matches!(member.state, MemberState::Free | MemberState::Removed));
                self.check_member(&member, member_cell(reference, index));
            }
        }
        let counted = self.members[&reference].header.member_count;
        if counted != in_use {
            let expected = format!("{in_use}, as in the member cells");
            self.error(Structure::Header, reference, None, "member_count", counted, expected);
        }
    }

    fn check_member(&mut self, member: &Member, at: CellAddress) {
        let given = self.members.get(&member.index).map(|view| (view.header.lun_uuid, view.header.lun_bytes));
        match (member.state, given) {
            (MemberState::Free, None) => {
                if *member != Member::free(member.index) {
                    self.error(Structure::Member, at, None, "content", "fields of an index never used", "zeros");
                }
            }
            (MemberState::Active | MemberState::Draining | MemberState::Carried, None) => {
                self.report.missing.push(member.index);
                let found = format!("{} ({}), which was not given or has no header", member.index, member.lun_uuid);
                self.error(Structure::Member, at, None, "state", found, "every member in use");
            }
            (_, None) => {}
            (MemberState::Free | MemberState::Removed, Some((uuid, _))) => {
                let found = format!("{:?}, but LUN {uuid} says it is this member", member.state);
                self.error(Structure::Member, at, None, "state", found, "active");
            }
            (_, Some((uuid, bytes))) => {
                if uuid != member.lun_uuid {
                    self.error(
                        Structure::Member,
                        at,
                        None,
                        "lun_uuid",
                        member.lun_uuid,
                        format!("{uuid}, as in the LUN's header"),
                    );
                }
                if bytes != member.lun_bytes {
                    self.error(
                        Structure::Member,
                        at,
                        None,
                        "lun_bytes",
                        member.lun_bytes,
                        format!("{bytes}, as in the LUN's header"),
                    );
                }
            }
        }
    }

    /// All heartbeats and arenas.
    pub(super) async fn check_slots(&mut self) {
        let luns: Vec<LunIndex> = self.members.keys().copied().collect();
        for lun in luns {
            for slot in (0..=255).map(SlotId) {
                let at = heartbeat_cell(lun, slot);
                let decode = |_, cell: &Cell| Heartbeat::decode(cell.payload());
                let heartbeat = self.fixed(Structure::Heartbeat, at, CellKind::Heartbeat, decode).await;
                let arena_at = arena_cell(lun, slot);
                let decode = |size, cell: &Cell| Arena::decode(size, cell.payload());
                let arena = self.fixed(Structure::Arena, arena_at, CellKind::Arena, decode).await;
                if let Some(heartbeat) = &heartbeat {
                    self.check_heartbeat(heartbeat, at);
                }
                if let (Some(heartbeat), Some(arena)) = (&heartbeat, &arena) {
                    self.check_arena(lun, heartbeat, arena, arena_at);
                }
                let view = self.members.get_mut(&lun).expect("the keys are the members'");
                view.slots.push(heartbeat);
                view.arenas.push(arena);
            }
        }
    }

    fn check_heartbeat(&mut self, heartbeat: &Heartbeat, at: CellAddress) {
        if heartbeat.state == SlotState::Free {
            if *heartbeat != free_at(heartbeat) && *heartbeat != Heartbeat::recovered(heartbeat) {
                let expected = "a generation, and of a recovered one incarnation and fence grade";
                self.error(Structure::Heartbeat, at, None, "state", "free, with fields of a host", expected);
            }
            return;
        }
        if heartbeat.generation.0 == 0 || heartbeat.incarnation == 0 {
            let found = format!("generation {} incarnation {}", heartbeat.generation, heartbeat.incarnation);
            self.error(Structure::Heartbeat, at, None, "generation", found, "a host's are not 0");
        }
        if crate::lease::check(&heartbeat.lease).is_err() {
            let found = format!("{:?}", heartbeat.lease);
            self.error(Structure::Heartbeat, at, None, "lease", found, "times that fit each other");
        }
        self.tell(Finding {
            severity: Severity::Recoverable,
            structure: Structure::Heartbeat,
            at: at.to_string(),
            object: None,
            field: "state",
            found: format!("{:?}: host {:?} ({})", heartbeat.state, heartbeat.host_name, heartbeat.host),
            expected: "free: it is still mounted there, or that host died and was not recovered".to_owned(),
        });
    }

    fn check_arena(&mut self, lun: LunIndex, heartbeat: &Heartbeat, arena: &Arena, at: CellAddress) {
        if arena.generation > heartbeat.generation {
            let expected = format!("at most {}, the slot's", heartbeat.generation);
            self.error(Structure::Arena, at, None, "generation", arena.generation, expected);
        }
        let layout = &self.members[&lun].layout;
        let wrong: Vec<Place> = arena.places.iter().copied().filter(|place| !exists(layout, *place)).collect();
        for place in wrong {
            self.error(Structure::Arena, at, None, "places", format!("{place:?}"), format!("a place that {lun} has"));
        }
    }
}

/// What a slot looks like after a clean leave at this generation.
fn free_at(heartbeat: &Heartbeat) -> Heartbeat {
    Heartbeat { generation: heartbeat.generation, ..Heartbeat::free() }
}

fn exists(layout: &crate::format::layout::LunLayout, place: Place) -> bool {
    match place {
        Place::TableCell(nth) => nth < layout.table_cell_count(),
        Place::UnitContainer(block) | Place::FdContainer(block) => block < layout.block_count(),
    }
}
