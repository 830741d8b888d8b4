//! Owns: putting right what lies at a fixed place: headers and their copies, member cells, heartbeats, arenas.
//! Promises: a damaged structure is made from a second copy or from what its neighbours prove; a generation is never used again.
//! Must not know: blocks and objects.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::Work;
use super::ground::{Ground, Member, raw_cell};
use super::tables::plain;
use crate::cas::{CellChange, CellIo};
use crate::check::probe::{self, Probed};
use crate::container::FORMATTED_SEQ;
use crate::env::Env;
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::{Arena, Place};
use crate::format::cell;
use crate::format::header::{LunHeader, MemberState};
use crate::format::heartbeat::{Heartbeat, SlotState};
use crate::format::layout::{
    FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, LunLayout, arena_cell, header_cell, header_copy_cell,
    heartbeat_cell, member_cell,
};
use crate::format::member;
use crate::format::{Cell, CellContext, CellHeader, CellKind};
use crate::lun::{Compared, Lun};
use crate::units::{CellAddress, Generation, Link, LunIndex, SLOTS, SlotId, SlotRef, Token};
use crate::window::MemberLun;

/// What a lost generation is set ahead by: more joins than a slot sees in a lifetime.
const GENERATIONS_AHEAD: u64 = 1 << 24;

/// Makes damaged headers from their copies and damaged copies from their headers. The header decides where both are sound.
pub(super) async fn mend_headers(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>], work: &mut Work<'_>) -> Result<(), FsError> {
    for lun in luns {
        if lun.bytes() < HEADER_COPY_OFFSET + FIXED_STRIDE {
            continue;
        }
        let (header, copy) = (header_at(lun, HEADER_OFFSET).await?, header_at(lun, HEADER_COPY_OFFSET).await?);
        let (context, source, at) = match (header, copy) {
            (Some((context, header)), Some((_, copy))) if header.payload() != copy.payload() => {
                (context, header, HEADER_COPY_OFFSET)
            }
            (Some((context, header)), None) => (context, header, HEADER_COPY_OFFSET),
            (None, Some((context, copy))) => (context, copy, HEADER_OFFSET),
            _ => continue,
        };
        let io = CellIo::new(context, env.clone());
        let size = context.cell_size.bytes();
        let raw = raw_cell(lun, at, size).await?;
        let address = CellAddress { offset: at, ..source.address() };
        let new = match Cell::decode(&context, address, &raw) {
            Ok(old) => io.successor(&old, CellChange::payload(&source, source.payload().to_vec()), SlotRef::NOBODY),
            Err(_) => {
                let header = CellHeader {
                    kind: CellKind::Header,
                    address,
                    seq: FORMATTED_SEQ,
                    op_id: io.op_id(),
                    writer: SlotRef::NOBODY,
                    owner: None,
                    link: Link(0),
                    index: 0,
                    token: Token(0),
                };
                Cell::encode(&context, header, source.payload())
            }
        };
        if lun.compare_and_write(at, &raw, new.image()).await? != Compared::Written {
            let message = format!("the header of {} was changed meanwhile: a host uses the volume", lun.name());
            return Err(FsError::refused(FsErrorKind::Busy, message));
        }
        let (what, from) = if at == HEADER_OFFSET { ("header", "copy") } else { ("header copy", "header") };
        work.repaired(format!("{what} of {}: restored from the {from}", lun.name()));
    }
    Ok(())
}

async fn header_at(lun: &Rc<dyn Lun>, offset: u64) -> Result<Option<(CellContext, Cell)>, FsError> {
    let bytes = lun.read(offset, FIXED_STRIDE as usize).await?;
    let Ok((context, index)) = cell::probe(offset, &bytes) else { return Ok(None) };
    let at = CellAddress { lun: index, offset };
    let cell = Cell::decode(&context, at, &bytes[..context.cell_size.bytes()]).ok();
    let sound = cell.filter(|cell| {
        cell.header().kind == CellKind::Header && LunHeader::decode(context.cell_size, cell.payload()).is_ok()
    });
    Ok(sound.map(|cell| (context, cell)))
}

/// The members as their headers say.
pub(super) async fn ground(env: &Rc<dyn Env>, luns: &[Rc<dyn Lun>]) -> Result<Ground, FsError> {
    let probed = probe::probe_all(luns, &mut Vec::new()).await?;
    let io = CellIo::new(probed[0].context, env.clone());
    let member = |probed: Probed| {
        let layout: LunLayout = probed.layout();
        (probed.header.lun_index, Member { lun: probed.lun, header: probed.header, layout, unfenced: None })
    };
    Ok(Ground { io, again: "repair again", members: probed.into_iter().map(member).collect() })
}

/// Changes the headers of all members, each before its copy.
pub(super) async fn change_headers(ground: &mut Ground, change: impl Fn(&mut LunHeader)) -> Result<bool, FsError> {
    let mut changed = false;
    for lun in ground.members.keys().copied().collect::<Vec<_>>() {
        let mut header = ground.member(lun)?.header.clone();
        change(&mut header);
        if header == ground.member(lun)?.header {
            continue;
        }
        for at in [header_cell(lun), header_copy_cell(lun)] {
            ground.put(at, plain(CellKind::Header, header.encode())).await?;
        }
        ground.members.get_mut(&lun).expect("it is a key").header = header;
        changed = true;
    }
    Ok(changed)
}

/// Member cells: those that are damaged or differ are made like the newest member's, or from the headers.
pub(super) async fn mend_members(ground: &mut Ground, work: &mut Work<'_>) -> Result<(), FsError> {
    let newest =
        ground.members.values().max_by_key(|m| (m.header.volume_generation, std::cmp::Reverse(m.header.lun_index)));
    let newest = newest.map(|member| member.header.lun_index).expect("there is a member");
    let order: Vec<LunIndex> =
        std::iter::once(newest).chain(ground.members.keys().copied().filter(|lun| *lun != newest)).collect();
    let mut in_use = 0;
    for index in (1..=254).filter_map(LunIndex::new) {
        let mut read: BTreeMap<LunIndex, Option<member::Member>> = BTreeMap::new();
        for lun in &order {
            let cell = ground.read_kind(member_cell(*lun, index), CellKind::Member).await?;
            let found = cell.and_then(|cell| member::Member::decode(cell.payload()).ok());
            read.insert(*lun, found.filter(|found| found.index == index));
        }
        let decided = order.iter().find_map(|lun| read[lun].clone());
        let decided = decided.unwrap_or_else(|| from_header(ground, index));
        in_use += u16::from(!matches!(decided.state, MemberState::Free | MemberState::Removed));
        for lun in &order {
            let found = &read[lun];
            if found.as_ref() == Some(&decided) {
                continue;
            }
            let at = member_cell(*lun, index);
            let question = format!("member cell {at} differs from the other LUNs'. Make it the same?");
            if found.is_none() || work.allowed(&question) {
                ground.put(at, plain(CellKind::Member, decided.encode())).await?;
                work.repaired(format!("member cell {at}: made as the volume's other members have it"));
            }
        }
    }
    let header = ground.member(newest)?.header.clone();
    let differs =
        ground.members.values().any(|member| member.header.member_count != in_use || unlike(&member.header, &header));
    if differs
        && work.allowed(
            "the headers contradict each other. Make them say what the newest member and the member cells say?",
        )
    {
        change_headers(ground, |own| {
            own.member_count = in_use;
            if own.state == MemberState::Active && header.state == MemberState::Active {
                own.volume_generation = header.volume_generation;
            }
            own.label.clone_from(&header.label);
            own.lease = header.lease;
            own.lock_mode = header.lock_mode;
            own.root = header.root;
        })
        .await?;
        work.repaired("headers: made to agree".to_owned());
    }
    Ok(())
}

fn unlike(own: &LunHeader, other: &LunHeader) -> bool {
    let facts = |h: &LunHeader| (h.volume_generation, h.label.clone(), h.lease, h.lock_mode as u8, h.root);
    facts(own) != facts(other)
}

fn from_header(ground: &Ground, index: LunIndex) -> member::Member {
    match ground.members.get(&index) {
        Some(member) => {
            let window = member.lun.as_member().and_then(MemberLun::window).map(|window| window.at);
            // As long as not all cells have moved, the LUN itself is needed.
            let state = match member.header.state {
                MemberState::Carried if window.is_none() => MemberState::Draining,
                state => state,
            };
            member::Member {
                lun_uuid: member.header.lun_uuid,
                lun_bytes: member.header.lun_bytes,
                index,
                state,
                identity: member.header.identity.clone(),
                window,
            }
        }
        None => member::Member::free(index),
    }
}

/// All heartbeats and arenas of a LUN.
pub(super) async fn mend_slots(ground: &Ground, lun: LunIndex, work: &mut Work<'_>) -> Result<(), FsError> {
    let size = ground.context().cell_size;
    for slot in (0..SLOTS).map(|nth| SlotId(nth as u8)) {
        let (at, arena_at) = (heartbeat_cell(lun, slot), arena_cell(lun, slot));
        let cell = ground.read_kind(at, CellKind::Heartbeat).await?;
        let found = cell.and_then(|cell| Heartbeat::decode(cell.payload()).ok());
        let arena = ground.read_kind(arena_at, CellKind::Arena).await?;
        let arena = arena.and_then(|cell| Arena::decode(size, cell.payload()).ok());
        let listed = arena.as_ref().map_or(Generation(0), |arena| arena.generation);
        let heartbeat = match found {
            Some(found) if sound(&found) && found.generation >= listed => found,
            found => {
                let known = found.map_or(Generation(0), |found| found.generation).max(listed);
                let ahead = Generation((known.0 + GENERATIONS_AHEAD).min((1 << Generation::BITS) - 2));
                let free = Heartbeat { generation: ahead, ..Heartbeat::free() };
                ground.put(at, plain(CellKind::Heartbeat, free.encode())).await?;
                work.repaired(format!("heartbeat cell {at}: made anew as a free slot of generation {ahead}"));
                free
            }
        };
        let layout = &ground.member(lun)?.layout;
        let exists = |place: &Place| match place {
            Place::TableCell(nth) => *nth < layout.table_cell_count(),
            Place::UnitContainer(block) | Place::FdContainer(block) => *block < layout.block_count(),
        };
        if arena.as_ref().is_none_or(|arena| !arena.places.iter().all(exists)) {
            let anywhere = heartbeat.state != SlotState::Free;
            let anew = Arena { generation: heartbeat.generation, anywhere, places: Vec::new() };
            ground.put(arena_at, plain(CellKind::Arena, anew.encode())).await?;
            work.repaired(format!("arena cell {arena_at}: made anew"));
        }
    }
    Ok(())
}

/// Whether a heartbeat is one that a host or a recovery can have left.
fn sound(found: &Heartbeat) -> bool {
    if found.state == SlotState::Free {
        let left = Heartbeat { generation: found.generation, ..Heartbeat::free() };
        return *found == left || *found == Heartbeat::recovered(found);
    }
    found.generation.0 != 0 && found.incarnation != 0 && crate::lease::check(&found.lease).is_ok()
}
