//! Owns: what a PB cell says after blocks were written, and after they were taken away.
//! Promises: a pointer only gains the granules it is given; a cell that names another block than expected is refused, not overwritten.
//! Must not know: runs, commits, I/O.

use std::collections::BTreeMap;

use super::granules::BlockState;
use super::tree::Shape;
use crate::format::pointer::{BlockPointer, Granules, pointer_at};
use crate::format::{Cell, FormatError};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, CellSize};

/// One block to publish: where it lies and the granules that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The block.
    pub at: BlockAddress,
    /// Granules that were filled since they were last published.
    pub bits: Granules,
    /// No pointer names the block yet.
    pub fresh: bool,
}

impl Pending {
    /// What a flush publishes of a block.
    pub fn of(state: &BlockState) -> Pending {
        let bits = if active(Sabotage::GranulesWhole) { Granules::ALL } else { state.filled };
        Pending { at: state.place.at, bits, fresh: state.fresh }
    }
}

/// Blocks to publish by pointer block, then by cell and place in it: number of the file block and what to publish.
pub type Plan = BTreeMap<u32, BTreeMap<usize, Vec<(u64, Pending)>>>;

/// Sorts blocks by the cells that name them.
pub fn plan(shape: Shape, blocks: impl IntoIterator<Item = (u64, Pending)>) -> Plan {
    let mut plan = Plan::new();
    for (block, pending) in blocks {
        let place = shape.place(block);
        plan.entry(place.pb).or_default().entry(place.cell).or_default().push((block, pending));
    }
    plan
}

/// Why a pointer cannot be changed as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The cell does not decode.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The pointer names another block than this host wrote.
    #[error("file block {block} is at {found:?}, this host wrote {expected}")]
    Other {
        /// File block.
        block: u64,
        /// What the cell names.
        found: Option<BlockAddress>,
        /// What was written.
        expected: BlockAddress,
    },
}

/// The payload of `cell` with `blocks` published; `None` when it already says so.
pub fn with_published(shape: Shape, cell: &Cell, blocks: &[(u64, Pending)]) -> Result<Option<Vec<u8>>, PublishError> {
    let mut payload = cell.payload().to_vec();
    let mut changed = false;
    for (block, pending) in blocks {
        let nth = shape.place(*block).nth;
        let old = pointer_at(&payload, nth)?;
        let valid = match old {
            Some(pointer) if pointer.at == pending.at => pointer.valid,
            None if pending.fresh => Granules::NONE,
            other => {
                let found = other.map(|pointer| pointer.at);
                return Err(PublishError::Other { block: *block, found, expected: pending.at });
            }
        };
        let new = Some(BlockPointer { at: pending.at, valid: valid.union(pending.bits), shared: false });
        if new != old {
            put(&mut payload, nth, new);
            changed = true;
        }
    }
    Ok(changed.then_some(payload))
}

/// The stream of a new pointer block with these blocks.
pub fn new_stream(shape: Shape, blocks: impl IntoIterator<Item = (u64, Pending)>) -> Vec<u8> {
    let mut stream = vec![0; shape.per_pb() as usize * 8];
    for (block, pending) in blocks {
        let nth = (block % shape.per_pb()) as usize;
        put(&mut stream, nth, Some(BlockPointer { at: pending.at, valid: pending.bits, shared: false }));
    }
    stream
}

/// What is taken from one file block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taking {
    /// Granules that read as zeros afterwards.
    pub granules: Granules,
    /// The block goes when nothing is left of it that was asked to stay.
    pub drop_block: bool,
}

/// The pointers of a cell with something taken from them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// New payload; `None` when nothing changes.
    pub payload: Option<Vec<u8>>,
    /// File blocks whose pointer goes.
    pub dropped: Vec<(u32, BlockAddress)>,
    /// File blocks that stay without some granules.
    pub cleared: Vec<(u32, BlockAddress, Granules)>,
}

/// Takes from each of `blocks` (within this cell) what `taking` says.
pub fn without(
    shape: Shape,
    cell: &Cell,
    first_block: u64,
    blocks: std::ops::Range<u64>,
    taking: impl Fn(u64) -> Taking,
) -> Result<Taken, FormatError> {
    let mut taken = Taken::default();
    let mut payload = cell.payload().to_vec();
    let end = blocks.end.min(first_block + shape.per_cell());
    for block in blocks.start.max(first_block)..end {
        let nth = (block - first_block) as usize;
        let Some(pointer) = pointer_at(&payload, nth)? else { continue };
        let what = taking(block);
        if what.drop_block {
            put(&mut payload, nth, None);
            taken.dropped.push((block as u32, pointer.at));
        } else if pointer.valid.0 & what.granules.0 != 0 {
            let valid = pointer.valid.without(what.granules);
            put(&mut payload, nth, Some(BlockPointer { valid, ..pointer }));
            let cleared = Granules(pointer.valid.0 & what.granules.0);
            taken.cleared.push((block as u32, pointer.at, cleared));
        }
    }
    if !taken.dropped.is_empty() || !taken.cleared.is_empty() {
        taken.payload = Some(payload);
    }
    Ok(taken)
}

/// The payload of `cell` with blocks at other places: {file block, where it lay, where it lies}. `None`: a pointer names another place.
pub fn with_moved(
    shape: Shape,
    cell: &Cell,
    moves: &[(u64, BlockAddress, BlockAddress)],
) -> Result<Option<Vec<u8>>, FormatError> {
    let mut payload = cell.payload().to_vec();
    for (block, from, to) in moves {
        let nth = shape.place(*block).nth;
        match pointer_at(&payload, nth)? {
            Some(pointer) if pointer.at == *from => put(&mut payload, nth, Some(BlockPointer { at: *to, ..pointer })),
            _ => return Ok(None),
        }
    }
    Ok(Some(payload))
}

/// The pointers of a PB cell's payload, in order.
pub fn pointers(cell: CellSize, payload: &[u8]) -> Result<Vec<Option<BlockPointer>>, FormatError> {
    (0..crate::format::layout::pointers_per_cell(cell)).map(|nth| pointer_at(payload, nth)).collect()
}

fn put(payload: &mut [u8], nth: usize, pointer: Option<BlockPointer>) {
    payload[nth * 8..nth * 8 + 8].copy_from_slice(&BlockPointer::pack(pointer).to_le_bytes());
}
