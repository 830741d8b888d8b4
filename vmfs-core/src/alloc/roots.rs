//! Owns: free root cells, and making containers.
//! Promises: a container is believed only after every cell of it was written durably (rule R2); FD containers are never given back.
//! Must not know: objects.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::sync::Mutex;

use super::arena::Arenas;
use super::blocks::{Blocks, Containers};
use super::units::Purpose;
use crate::container::Formatter;
use crate::context::{Context, Moment};
use crate::error::{FsError, FsErrorKind};
use crate::format::arena::Place;
use crate::format::layout::roots_per_container;
use crate::format::root_cell::{ObjectState, RootCell};
use crate::format::table_entry::EntryKind;
use crate::format::{Cell, CellKind};
use crate::sabotage::{Sabotage, active};
use crate::units::{BlockAddress, FdId, LunIndex, OpId};

/// Free root cells remembered of a LUN.
const REMEMBERED: usize = 1024;
/// Table cells looked through for containers before a new one is made.
pub const LOOKED_THROUGH: usize = 256;

#[derive(Default)]
struct Candidates {
    /// Each with its image, and a moment from which on that was known.
    free: Vec<(FdId, Cell, Moment)>,
    /// Containers that were read to their end and had nothing free.
    exhausted: Vec<BlockAddress>,
    looked: bool,
}

/// The FD containers of a mounted volume.
pub struct Roots {
    context: Rc<Context>,
    arenas: Rc<Arenas>,
    containers: Rc<Containers>,
    candidates: RefCell<BTreeMap<LunIndex, Rc<Mutex<Candidates>>>>,
}

impl Roots {
    /// For a mounted volume.
    pub fn new(context: Rc<Context>, arenas: Rc<Arenas>, containers: Rc<Containers>) -> Roots {
        Roots { context, arenas, containers, candidates: RefCell::default() }
    }

    fn of(&self, lun: LunIndex) -> Rc<Mutex<Candidates>> {
        self.candidates.borrow_mut().entry(lun).or_default().clone()
    }

    /// A root cell of `lun` that was free when last seen, with its image and when that was known; its container is listed in the
    /// arena. Another host may have taken it: then the compare-and-write is lost and the next one is asked for. `NoSpace` when the
    /// LUN is full.
    pub async fn take(&self, blocks: &Blocks, lun: LunIndex) -> Result<(FdId, Cell, Moment), FsError> {
        if self.context.is_draining(lun) {
            let message = format!("{lun} is being emptied: nothing new is put there");
            return Err(FsError::refused(FsErrorKind::NoSpace, message));
        }
        let candidates = self.of(lun);
        let mut candidates = candidates.lock().await;
        if !candidates.looked {
            blocks.scan(lun, 0, LOOKED_THROUGH).await?;
            candidates.looked = true;
        }
        let mut looked_again = false;
        loop {
            if let Some((fd, cell, moment)) = candidates.free.pop() {
                self.note(fd).await?;
                return Ok((fd, cell, moment));
            }
            let known: Vec<BlockAddress> = self
                .containers
                .fds
                .borrow()
                .iter()
                .filter(|at| at.lun == lun && !candidates.exhausted.contains(at))
                .copied()
                .collect();
            for container in &known {
                if self.read_container(*container, &mut candidates).await? {
                    break;
                }
            }
            if candidates.free.is_empty() {
                let Some(at) = blocks.take_for_container(lun, Purpose::Normal).await? else {
                    // Other hosts may have freed root cells since the containers were read.
                    if !candidates.exhausted.is_empty() && !looked_again {
                        looked_again = true;
                        candidates.exhausted.clear();
                        continue;
                    }
                    let message = format!("no room for another file on {lun}; remove files or add an extent");
                    return Err(FsError::refused(FsErrorKind::NoSpace, message));
                };
                format_container(&self.context, blocks, at, EntryKind::FdContainer).await?;
            }
        }
    }

    /// Remembers free root cells of a container, from a place derived from the own slot on.
    async fn read_container(&self, container: BlockAddress, candidates: &mut Candidates) -> Result<bool, FsError> {
        let member = self.context.member(container.lun)?;
        let slot = self.context.own_slot(container.lun)?;
        let count = roots_per_container(member.layout().cell_size, member.layout().block_size);
        let first = FdId::new(container, 0).and_then(|fd| member.layout().root_cell(fd));
        let missing = || FsError::refused(FsErrorKind::Corrupt, format!("there is no FD container {container}"));
        let cells = self.context.io.read_span(&member.lun, first.ok_or_else(missing)?, count as usize).await?;
        let moment = self.context.now();
        let start = u64::from(slot.slot.0.reverse_bits()) * count / 256;
        for step in 0..count {
            let nth = ((start + step) % count) as usize;
            let Ok(cell) = &cells[nth] else { continue };
            let is_free = cell.header().kind == CellKind::Root
                && RootCell::decode(member.layout().cell_size, cell.payload())
                    .is_ok_and(|root| root.state == ObjectState::Free);
            if is_free && candidates.free.len() < REMEMBERED {
                let fd = FdId::new(container, nth as u16).expect("a container has at most 2^15 root cells");
                candidates.free.push((fd, cell.clone(), moment));
            }
        }
        // The first of the list is taken last: neighbours of the start come first.
        candidates.free.reverse();
        // One look at the own slot now is evidence for all of them.
        self.context.prove_live_since(container.lun, moment).await?;
        if candidates.free.is_empty() {
            candidates.exhausted.push(container);
        }
        Ok(!candidates.free.is_empty())
    }

    /// Lists the container of a root cell in the arena, before a mark is set in that cell.
    pub async fn note(&self, fd: FdId) -> Result<(), FsError> {
        self.arenas.note(fd.lun(), Place::FdContainer(fd.container().block.get())).await
    }

    /// Another host took a root cell of `container` first: what is remembered of it is old, and it is read again when it is needed.
    pub async fn forget_container(&self, container: BlockAddress) {
        let candidates = self.of(container.lun);
        candidates.lock().await.free.retain(|(fd, _, _)| fd.container() != container);
    }

    /// A root cell became free; `cell` is its image, which descends by own changes alone from one that was known at `moment`.
    pub async fn give_back(&self, fd: FdId, cell: Cell, moment: Moment) {
        let candidates = self.of(fd.lun());
        let mut candidates = candidates.lock().await;
        candidates.exhausted.retain(|at| *at != fd.container());
        if candidates.free.len() < REMEMBERED {
            candidates.free.push((fd, cell, moment));
        }
    }

    /// Forgets everything: this host was fenced.
    pub fn forget(&self) {
        self.candidates.borrow_mut().clear();
    }
}

/// Writes all cells of a block that was taken in state formatting, durably, and makes it a container.
pub async fn format_container(
    context: &Context,
    blocks: &Blocks,
    at: BlockAddress,
    kind: EntryKind,
) -> Result<(), FsError> {
    let member = context.member(at.lun)?;
    let writer = context.own_slot(at.lun)?;
    let offset = member.layout().block_offset(at.block);
    let mut op_id = || if active(Sabotage::CellsAlike) { OpId([0; 16]) } else { context.io.op_id() };
    let mut formatter =
        Formatter { context: context.io.context(), layout: &member.layout(), writer, op_id: &mut op_id };
    let image = match kind {
        EntryKind::FdContainer => formatter.fd_container(at.block),
        _ => formatter.unit_container(at.block),
    };
    let (Some(image), Some(offset)) = (image, offset) else {
        return Err(FsError::refused(FsErrorKind::Corrupt, format!("{} has no block {}", at.lun, at.block.get())));
    };
    if let Err(error) = context.gate_is_open(at.lun, context.env().now()) {
        member.set_unresolved();
        return Err(error);
    }
    if let Err(error) = member.lun.write(offset, image).await {
        // A plain write may be alive still: the block stays in state formatting until recovery (rule R3).
        member.set_unresolved();
        return Err(error.into());
    }
    let finished = blocks.finish_container(at, kind).await;
    if finished.is_err() {
        member.set_unresolved();
    }
    finished
}
