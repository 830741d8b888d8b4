//! Owns: a member LUN that became larger: its new blocks get a table and become part of the volume.
//! Promises: one host at a time writes the table of a new segment, and one that died while it did is proven dead before the next one
//! begins; the header's change is the one moment from which the blocks count; until then nothing is different for anybody.
//! Must not know: how a LUN grows, who asks.
//!
//! ```text
//! claim      header: growing = {slot}       nothing reaches the space behind the last segment
//! format     plain writes of the new table
//! commit     header: one segment more, the new size, growing = nobody
//! tell       member cells on all LUNs: the new size
//! ```

use super::{Inner, membership};
use crate::buf::AlignedBuf;
use crate::container::FORMATTED_SEQ;
use crate::context::Member;
use crate::error::{FsError, FsErrorKind};
use crate::format::header::{LunHeader, MemberState};
use crate::format::heartbeat::SlotState;
use crate::format::layout::{FIXED_STRIDE, MAX_SEGMENTS, Segment, entries_per_cell};
use crate::format::table_entry::TableCell;
use crate::format::{Cell, CellHeader, CellKind};
use crate::lun::LunErrorKind;
use crate::mkfs::{LARGEST_LUN, Progress};
use crate::slot;
use crate::units::{CellAddress, Link, LunIndex, SlotRef, Token};
use crate::volume::types::Grown;

/// Bytes of one write of the table.
const CHUNK: usize = 1 << 20;

pub(super) async fn grow(inner: &Inner, lun: LunIndex, progress: &mut dyn FnMut(Progress)) -> Result<Grown, FsError> {
    inner.for_writing()?;
    let _one = inner.extending.lock().await;
    let member = inner.context.member(lun)?;
    let by = inner.context.own_slot(lun)?;
    let (_, before) = membership::read_header(inner, &member).await?;
    let bytes = member.lun.bytes().min(LARGEST_LUN);
    let segment = next_segment(inner, &member, &before, bytes)?;
    if before.growing != SlotRef::NOBODY {
        check_gone(inner, &member, before.growing).await?;
    }
    // From the image that was looked at: a claim of somebody else in between is another one.
    let (claimed, known) = (by, (before.growing, before.segments.clone()));
    let claim = |header: &LunHeader| match header.growing {
        owner if header.segments == known.1 && (owner == known.0 || owner == claimed) => {
            Ok(LunHeader { growing: claimed, ..header.clone() })
        }
        _ => Err(refuse(
            FsErrorKind::Busy,
            format!("{} is being grown by another host; see vmfs extent list", member.lun.name()),
        )),
    };
    membership::change_header(inner, &member, claim).await?;
    let give_back = |header: &LunHeader| {
        let growing = if header.growing == by { SlotRef::NOBODY } else { header.growing };
        Ok(LunHeader { growing, ..header.clone() })
    };
    match write_table(inner, &member, by, &segment, progress).await {
        Ok(()) => {}
        Err(Failed { error, alive: false }) => {
            membership::change_header(inner, &member, give_back).await?;
            return Err(error);
        }
        // What is on its way may arrive when another table is there by then: the claim stands until this incarnation is proven gone.
        Err(Failed { error, alive: true }) => {
            member.set_unresolved();
            return Err(error);
        }
    }
    let grown = |header: &LunHeader| {
        if header.segments.contains(&segment) {
            return Ok(header.clone());
        }
        if header.growing != by {
            let message = format!("{}: another host went on with its growth; see vmfs extent list", member.lun.name());
            return Err(refuse(FsErrorKind::Stale, message));
        }
        let segments = header.segments.iter().copied().chain([segment]).collect();
        let lun_bytes = header.lun_bytes.max(bytes);
        Ok(LunHeader { segments, lun_bytes, growing: SlotRef::NOBODY, ..header.clone() })
    };
    membership::change_header(inner, &member, grown).await?;
    tracing::info!(lun = member.lun.name(), %lun, bytes, "the LUN has grown");
    // The other tables; who looks at the members next does it otherwise.
    if let Err(error) = membership::settle(inner).await {
        tracing::warn!(%error, "the new size is told to the other LUNs later");
        inner.membership.notify_one();
    }
    Ok(Grown { from_bytes: before.lun_bytes, to_bytes: bytes, blocks: segment.block_count })
}

fn refuse(kind: FsErrorKind, message: String) -> FsError {
    FsError::refused(kind, message)
}

/// The segment that the new space makes.
fn next_segment(inner: &Inner, member: &Member, header: &LunHeader, bytes: u64) -> Result<Segment, FsError> {
    let (name, info) = (member.lun.name(), &inner.info);
    if header.state != MemberState::Active {
        return Err(refuse(FsErrorKind::Invalid, format!("{name} is {:?}: only a LUN in use grows", header.state)));
    }
    if header.segments.len() >= MAX_SEGMENTS {
        let message = format!(
            "{name} has grown {} times, which is all that its header has room for; add another LUN",
            MAX_SEGMENTS - 1
        );
        return Err(refuse(FsErrorKind::NoSpace, message));
    }
    let last = header.segments.last().expect("a header has a segment");
    let (first, from) = (last.first_block + last.block_count, last.end(info.block_size).next_multiple_of(FIXED_STRIDE));
    Segment::covering(first, from, bytes, info.cell_size, info.block_size).ok_or_else(|| {
        let message = format!(
            "{name} has {bytes} bytes and its volume uses {} of them: it has not become larger by one block; make it larger first",
            header.lun_bytes
        );
        refuse(FsErrorKind::Invalid, message)
    })
}

/// A claim counts until its host is known to be gone for certain: its slot was broken, or left.
async fn check_gone(inner: &Inner, member: &Member, owner: SlotRef) -> Result<(), FsError> {
    let (_, found) = slot::read_slot(&inner.context.io, &member.lun, member.index, owner.slot).await?;
    let may_live = matches!(found.state, SlotState::Live | SlotState::Breaking);
    if found.generation != owner.generation || !may_live {
        return Ok(());
    }
    inner.context.suspect(member.index, owner.slot);
    let own = inner.context.own_slot(member.index)? == owner;
    let what = if own {
        "an earlier attempt of this host ended with a write whose end is not known; unmount and mount again, then repeat".to_owned()
    } else {
        format!("host {:?} is growing it; wait for its end, or until it is taken over", found.host_name)
    };
    Err(refuse(FsErrorKind::Busy, format!("{}: {what}", member.lun.name())))
}

/// A table that could not be written.
struct Failed {
    error: FsError,
    /// A write may still arrive.
    alive: bool,
}

async fn write_table(
    inner: &Inner,
    member: &Member,
    by: SlotRef,
    segment: &Segment,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Failed> {
    let size = inner.info.cell_size.bytes();
    let cells = segment.block_count.div_ceil(entries_per_cell(inner.info.cell_size) as u64);
    let total_bytes = cells * size as u64;
    let free = TableCell::free(inner.info.cell_size).encode();
    let mut done = 0;
    while done < cells {
        let count = ((CHUNK / size) as u64).min(cells - done);
        let length = count as usize * size;
        // What aligns the last piece lies between the table and the first block.
        let mut buf = AlignedBuf::zeroed(length.next_multiple_of(member.lun.alignment()));
        let offset = segment.table_offset + done * size as u64;
        for (nth, image) in buf[..length].chunks_exact_mut(size).enumerate() {
            let header = CellHeader {
                kind: CellKind::BlockTable,
                address: CellAddress { lun: member.index, offset: offset + (nth * size) as u64 },
                seq: FORMATTED_SEQ,
                op_id: inner.context.io.op_id(),
                writer: by,
                owner: None,
                link: Link(0),
                index: 0,
                token: Token(0),
            };
            Cell::encode_into(inner.context.io.context(), &header, &free, image);
        }
        inner.go_on().map_err(|error| Failed { error, alive: false })?;
        let open = inner.context.gate_is_open(member.index, inner.context.env().now());
        open.map_err(|error| Failed { error, alive: false })?;
        member.lun.write(offset, buf).await.map_err(|error| {
            let alive = error.kind != LunErrorKind::NotDone;
            Failed { error: error.into(), alive }
        })?;
        done += count;
        progress(Progress { done_bytes: done * size as u64, total_bytes });
    }
    Ok(())
}
