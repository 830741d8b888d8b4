//! Owns: taking an emptied member LUN out of the volume while all hosts go on.
//! Promises: refused before anything changes, or gone through by this or any later call; nothing of it rests on a lease or on an answer of
//! other hosts. Must not know: how a cell moves.
//!
//! ```text
//! header: draining ──> carried ──> carried, window ──> every cell moves, the header last ──> member tables: carried, window
//!                      what is free ceases to be       whoever meets a moved cell follows     the device is not asked for any more
//! ```

use std::rc::Rc;
use std::time::Duration;

use super::membership::{self, Tables};
use super::types::RemoveReport;
use super::{Inner, background};
use crate::context::Member;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{HAS_WINDOW, LunHeader, MemberState};
use crate::format::heartbeat::{FOLLOWS_MOVED, SlotState};
use crate::format::layout::{
    ARENA_OFFSET, FIXED_STRIDE, HEADER_COPY_OFFSET, HEADER_OFFSET, HEARTBEAT_OFFSET, LunLayout, TABLE_OFFSET,
};
use crate::format::moved::{PIECE_ALIGNMENT, Piece};
use crate::mkfs::Progress;
use crate::slot;
use crate::units::{BlockNo, CellAddress, CellSize, LunIndex, MAX_MEMBERS, SLOTS, SlotRef};
use crate::window::MemberLun;
use crate::window::map::{self, Placed, Window};
use crate::window::mover::{Batch, Way};

/// Cells that move at a time.
const AT_ONCE: u64 = 256;
/// Looks, one a second, until hosts have given back what they keep ready on a LUN that is emptied.
const LOOKS: u32 = 15;

fn refuse<T>(kind: FsErrorKind, message: String) -> Result<T, FsError> {
    Err(FsError::refused(kind, message))
}

pub(super) async fn remove(
    inner: &Rc<Inner>,
    lun: LunIndex,
    progress: &mut dyn FnMut(Progress),
) -> Result<RemoveReport, FsError> {
    inner.for_writing()?;
    let _one = inner.draining.lock().await;
    let member = inner.context.member(lun)?;
    let name = member.lun.name().to_owned();
    let Some(own) = member.lun.as_member().and_then(MemberLun::own) else {
        return refuse(FsErrorKind::Invalid, format!("{name} was taken out of the volume already"));
    };
    Tables::read(inner).await.check_all_there(inner)?;
    if let Some(lost) = inner.context.lost_luns().first() {
        return refuse(FsErrorKind::Io, format!("{lost} does not answer: bring it back before a LUN is taken out"));
    }
    let (_, header) = membership::read_header(inner, &member).await?;
    check_hosts(inner).await?;
    match header.state {
        MemberState::Carried => {}
        MemberState::Draining => {
            check_empty(inner, &member).await?;
            check_room(inner, &member).await?;
        }
        state => {
            let message = format!("{name} is {state:?}: empty it first, with vmfs extent drain");
            return refuse(FsErrorKind::Invalid, message);
        }
    }
    announce(inner).await?;
    // Who came in before that was read is seen now.
    check_hosts(inner).await?;
    let carried = |header: &LunHeader| match header.state {
        MemberState::Draining | MemberState::Carried if header.growing == SlotRef::NOBODY => {
            Ok(LunHeader { state: MemberState::Carried, ..header.clone() })
        }
        state => refuse(FsErrorKind::Busy, format!("{name} is {state:?} by now, or is being grown; try again")),
    };
    let header = membership::change_header(inner, &member, carried).await?;
    let at = match header.window {
        Some(at) => at,
        None => prepare(inner, &member).await?,
    };
    let carrier = match inner.context.carriers().get(at.lun) {
        Some(carrier) => carrier,
        None => return refuse(FsErrorKind::Io, format!("{} is not there: {name} moves to it; bring it back", at.lun)),
    };
    let io = &inner.context.io;
    let window = Window::open(io.context(), carrier.clone(), at).await?;
    let writer = inner.context.own_slot(lun)?;
    let window_bytes = window.end() - at.offset;
    let way = Way { io, lun, own, carrier, window: at, writer };
    move_all(inner, &member, &way, &window.pieces, progress).await?;
    finish(inner, &member).await?;
    Ok(RemoveReport { lun, name, window: at, window_bytes })
}

/// Refuses while a host lives that runs a release which takes a moved cell for a damaged one.
async fn check_hosts(inner: &Inner) -> Result<(), FsError> {
    for member in inner.context.members() {
        for found in slot::read_slots(&inner.context.io, &member.lun, member.index).await? {
            let (_, heartbeat) = found?;
            let lives = matches!(heartbeat.state, SlotState::Live | SlotState::Breaking);
            if lives && heartbeat.abilities & FOLLOWS_MOVED == 0 {
                let message = format!(
                    "host {} runs a release that cannot go on when a LUN is taken out; update it, or unmount there first",
                    heartbeat.host_name
                );
                return refuse(FsErrorKind::Unsupported, message);
            }
        }
    }
    Ok(())
}

/// Refuses unless nothing but root cells is left. What hosts keep ready for their next changes is given back within seconds.
async fn check_empty(inner: &Inner, member: &Member) -> Result<(), FsError> {
    let name = member.lun.name();
    for look in 1.. {
        let found = inner.objects.space().occupied(member.index).await?;
        if found.windows > 0 {
            let message =
                format!("{name} carries what stays of a LUN that was taken out before: it cannot be taken out");
            return refuse(FsErrorKind::Invalid, message);
        }
        if found.block_count() + found.unit_count() > 0 {
            let message = format!(
                "{name} is not empty: {} data blocks and {} units are there; give vmfs extent drain again",
                found.block_count(),
                found.unit_count()
            );
            return refuse(FsErrorKind::Busy, message);
        }
        if found.unsettled + found.pooled == 0 {
            return Ok(());
        }
        if look == LOOKS {
            let message = format!(
                "{name} is not empty: {} blocks or units wait for the recovery of a host that is gone, {} are kept ready by hosts; see \
                 vmfs status, and try again",
                found.unsettled, found.pooled
            );
            return refuse(FsErrorKind::Busy, message);
        }
        inner.objects.space().units.top_up(&inner.objects.space().blocks).await?;
        if !background::sleep(inner, Duration::from_secs(1)).await {
            inner.go_on()?;
        }
    }
    unreachable!("the loop ends at LOOKS");
}

/// The LUNs that may carry the window, those with the most free space first.
fn candidates(inner: &Inner, lun: LunIndex) -> Vec<LunIndex> {
    let blocks = &inner.objects.space().blocks;
    let others = inner.context.members().into_iter().map(|member| member.index);
    let mut others: Vec<LunIndex> =
        others.filter(|other| *other != lun && !inner.context.is_draining(*other)).collect();
    others.sort_by_key(|other| std::cmp::Reverse(blocks.count(*other).free));
    others
}

fn window_blocks(inner: &Inner, pieces: &[Piece]) -> u64 {
    map::window_bytes(inner.info.cell_size, pieces).div_ceil(inner.info.block_size.bytes())
}

fn no_room(inner: &Inner, name: &str, blocks: u64) -> FsError {
    let mib = (blocks << inner.info.block_size.shift()) >> 20;
    let message = format!(
        "{mib} MiB stay of {name} (root cells, slots, tables), and no other LUN in use has so much free space in one piece; remove \
         files or add an extent"
    );
    FsError::refused(FsErrorKind::NoSpace, message)
}

async fn check_room(inner: &Inner, member: &Member) -> Result<(), FsError> {
    let (space, name) = (inner.objects.space(), member.lun.name());
    let others = candidates(inner, member.index);
    if others.is_empty() {
        let message = format!("{name} is the only LUN in use: add another one first, with vmfs extent add");
        return refuse(FsErrorKind::Invalid, message);
    }
    let pieces = pieces(&member.layout(), &space.fd_containers(member.index).await?);
    let blocks = window_blocks(inner, &pieces);
    for other in others {
        if space.has_run(other, blocks).await? {
            return Ok(());
        }
    }
    Err(no_room(inner, name, blocks))
}

/// Says in every header that the volume has a window: releases that do not know any refuse it.
async fn announce(inner: &Inner) -> Result<(), FsError> {
    for member in inner.context.members() {
        let edit =
            |header: &LunHeader| Ok(LunHeader { incompatible: header.incompatible | HAS_WINDOW, ..header.clone() });
        membership::change_header(inner, &member, edit).await?;
    }
    Ok(())
}

/// Makes what is free on the LUN cease to be, takes and formats a window and writes into the header where it is. Gives the one that is
/// there then: another host may have been faster.
async fn prepare(inner: &Inner, member: &Member) -> Result<CellAddress, FsError> {
    let (space, lun, name) = (inner.objects.space(), member.index, member.lun.name());
    let sealed = space.seal(lun).await?;
    if sealed.in_use > 0 {
        let message = format!(
            "{name} is not empty: a host put something there before it had read that it is being taken out; give vmfs extent drain, \
             then this again"
        );
        return refuse(FsErrorKind::Busy, message);
    }
    let layout = member.layout();
    let pieces = pieces(&layout, &sealed.fd_containers);
    let count = window_blocks(inner, &pieces);
    let lun_bytes = member.header.borrow().lun_bytes;
    let map = map::map_cells(inner.info.cell_size, lun, lun_bytes, &pieces);
    let mut taken = None;
    for carrier in candidates(inner, lun) {
        taken = space.take_window(carrier, lun, count, &map).await?;
        if taken.is_some() {
            break;
        }
    }
    let Some(at) = taken else { return Err(no_room(inner, name, count)) };
    let edit = |header: &LunHeader| match header.state {
        MemberState::Carried => Ok(LunHeader { window: header.window.or(Some(at)), ..header.clone() }),
        state => refuse(FsErrorKind::Busy, format!("{name} is {state:?} by now")),
    };
    let decided = membership::change_header(inner, member, edit).await?.window.unwrap_or(at);
    if decided != at {
        space.give_window_back(at, lun, count).await?;
    }
    Ok(decided)
}

/// What of a LUN goes into a window: fixed cells and the first table, the other tables, the containers of root cells.
fn pieces(layout: &LunLayout, fd_containers: &[BlockNo]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for segment in &layout.segments {
        let table = segment.table_cells(layout.cell_size) * layout.cell_size.bytes() as u64;
        let from = if segment.table_offset == TABLE_OFFSET { HEADER_OFFSET } else { segment.table_offset };
        let end = (segment.table_offset + table).next_multiple_of(PIECE_ALIGNMENT);
        pieces.push(Piece { from, length: end - from });
    }
    let length = layout.block_size.bytes();
    pieces.extend(
        fd_containers.iter().filter_map(|block| layout.block_offset(*block)).map(|from| Piece { from, length }),
    );
    pieces
}

/// All cells that move, in their order: the header is the last.
fn batches(layout: &LunLayout, placed: &[Placed]) -> Option<Vec<Batch>> {
    let cell = layout.cell_size.bytes() as u64;
    let mut spans: Vec<(u64, u64, u64)> = Vec::new();
    for container in placed.get(layout.segments.len()..)? {
        spans.push((container.piece.from, cell, container.piece.length / cell));
    }
    for segment in &layout.segments {
        spans.push((segment.table_offset, cell, segment.table_cells(layout.cell_size)));
    }
    spans.push((ARENA_OFFSET, FIXED_STRIDE, SLOTS as u64));
    spans.push((HEADER_OFFSET + FIXED_STRIDE, FIXED_STRIDE, MAX_MEMBERS as u64));
    spans.push((HEARTBEAT_OFFSET, FIXED_STRIDE, SLOTS as u64));
    spans.push((HEADER_COPY_OFFSET, FIXED_STRIDE, 1));
    spans.push((HEADER_OFFSET, FIXED_STRIDE, 1));
    let mut all = Vec::new();
    for (first, stride, count) in spans {
        for nth in (0..count).step_by(AT_ONCE as usize) {
            let (from, some) = (first + nth * stride, AT_ONCE.min(count - nth));
            let (to, together) = map::find(placed, from)?;
            if together < (some - 1) * stride + cell {
                return None;
            }
            all.push(Batch { from, to, stride, count: some as usize });
        }
    }
    Some(all)
}

async fn move_all(
    inner: &Inner,
    member: &Member,
    way: &Way<'_>,
    placed: &[Placed],
    progress: &mut dyn FnMut(Progress),
) -> Result<(), FsError> {
    inner.context.read_geometry(member).await?;
    let Some(batches) = batches(&member.layout(), placed) else {
        let message = format!("the window {} does not hold what {} has; run fsck.vmfs", way.window, member.index);
        return refuse(FsErrorKind::Corrupt, message);
    };
    let cell: CellSize = inner.info.cell_size;
    let bytes = |batch: &Batch| (batch.count * cell.bytes()) as u64;
    let total_bytes = batches.iter().map(bytes).sum();
    let mut done_bytes = 0;
    for batch in &batches {
        inner.go_on()?;
        way.move_batch(batch).await?;
        done_bytes += bytes(batch);
        progress(Progress { done_bytes, total_bytes });
    }
    Ok(())
}

/// The LUN's last cell has left: this host uses the window, all tables say so, and every host looks at them.
async fn finish(inner: &Inner, member: &Member) -> Result<(), FsError> {
    let (_, header) = membership::read_header(inner, member).await?;
    member.note_header(header);
    membership::settle(inner).await?;
    let members = inner.context.members();
    let mut generation = 0;
    for present in &members {
        generation = generation.max(membership::read_header(inner, present).await?.1.volume_generation);
    }
    for present in &members {
        membership::raise(inner, present, generation + 1).await?;
    }
    inner.membership.notify_one();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::layout::Segment;
    use crate::units::BlockSize;

    #[test]
    fn every_cell_that_moves_has_a_place_of_its_own_in_the_window_and_the_header_is_the_last() {
        for cell_size in [CellSize::B512, CellSize::B4096] {
            for shift in [16, 20, 24] {
                let block_size = BlockSize::from_shift(shift).unwrap();
                let first = Segment::whole_lun(128 << 20, cell_size, block_size).unwrap();
                let end = first.end(block_size).next_multiple_of(4096);
                let more = Segment::covering(first.block_count, end, 512 << 20, cell_size, block_size).unwrap();
                let lun = LunIndex::new(3).unwrap();
                let layout = LunLayout { lun, cell_size, block_size, segments: vec![first, more] };
                let containers: Vec<BlockNo> =
                    [0, 1, 4, first.block_count].into_iter().filter_map(BlockNo::new).collect();
                let pieces = pieces(&layout, &containers);
                let window = 5 << 24;
                let placed = map::place(cell_size, window, &pieces);
                let batches = batches(&layout, &placed).unwrap();
                assert_eq!(batches.last().map(|batch| (batch.from, batch.count)), Some((HEADER_OFFSET, 1)));
                let mut taken = std::collections::BTreeSet::new();
                let beyond = window + map::window_bytes(cell_size, &pieces);
                for batch in &batches {
                    for nth in 0..batch.count as u64 {
                        let to = batch.to + nth * batch.stride;
                        assert!(taken.insert(to) && to >= window + map::map_bytes(cell_size, pieces.len()));
                        assert!(to + cell_size.bytes() as u64 <= beyond);
                        assert_eq!(to % cell_size.bytes() as u64, 0);
                    }
                }
                let tables: u64 = layout.table_cell_count();
                let roots = containers.len() as u64 * block_size.bytes() / cell_size.bytes() as u64;
                assert_eq!(taken.len() as u64, tables + roots + 2 + 254 + 2 * 256);
            }
        }
    }
}
